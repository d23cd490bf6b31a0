"""DyLoRA against a dense reference, written from the paper."""

import pytest
import torch
from torch import nn

from benchmarks.evidence.dylora import DyLoraLinear, add_dylora, drawn_ranks
from benchmarks.evidence.methods import prepare
from tests.support.evidence_runs import NAMES, Run, effective_weights, setting_of, tiny_model

C, D, R, ALPHA = 5, 7, 4, 6.0


@pytest.fixture
def layer():
    torch.manual_seed(1)
    layer = DyLoraLinear(nn.Linear(D, C).double().requires_grad_(False), R, ALPHA)
    nn.init.normal_(layer.A)
    nn.init.normal_(layer.B)
    return layer


def dense(W, bias, A, B, b, x):
    """Eq. of the paper: the branch truncated to rank b, and scaled by alpha / b, as one matrix."""
    update = torch.zeros_like(W)
    for k in range(b):
        update = update + torch.outer(A[:, k], B[k])
    return x @ (W + ALPHA / b * update).T + bias


def test_follows_the_dense_reference_over_many_steps(layer):
    W, bias = layer.base_layer.weight.clone(), layer.base_layer.bias.clone()
    A, B = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B))
    own = torch.optim.AdamW([layer.A, layer.B], lr=1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW([A, B], lr=1e-2, weight_decay=0.1)
    for b in drawn_ranks(R, 50, torch.Generator().manual_seed(0)):
        x, y = torch.randn(3, 2, D, dtype=torch.float64), torch.randn(3, 2, C, dtype=torch.float64)
        layer.rank = b
        (layer(x) - y).square().mean().backward()
        (dense(W, bias, A, B, b, x) - y).square().mean().backward()
        assert not layer.A.grad[:, b:].any()
        assert not layer.B.grad[b:].any()
        for optimizer in (own, reference):
            optimizer.step()
            optimizer.zero_grad()
        assert torch.allclose(layer.A, A, rtol=0, atol=1e-12)
        assert torch.allclose(layer.B, B, rtol=0, atol=1e-12)
    assert torch.equal(layer.base_layer.weight, W)


def test_all_of_the_leading_columns_and_rows_train(layer):
    layer.rank = 3
    layer(torch.randn(2, D, dtype=torch.float64)).square().sum().backward()
    assert layer.A.grad.any(0).tolist() == [True, True, True, False]
    assert layer.B.grad.any(1).tolist() == [True, True, True, False]


def test_it_is_evaluated_at_the_full_rank(layer):
    x = torch.randn(2, D, dtype=torch.float64)
    layer.rank = 1
    base = layer.base_layer
    expected = dense(base.weight, base.bias, layer.A, layer.B, R, x)
    assert torch.allclose(layer.eval()(x), expected)
    assert not torch.allclose(layer.train()(x), expected)


def test_layers_keep_their_names():
    model = nn.ModuleDict({"q": nn.Linear(D, C), "rest": nn.ModuleList([nn.Linear(C, C)])})
    layers = add_dylora(model, ["q", "rest.0"], R, ALPHA)
    assert list(layers) == ["q", "rest.0"]
    assert model["q"] is layers["q"]
    assert model["rest"][0] is layers["rest.0"]


def test_ranks_are_uniform_and_of_the_seed():
    ranks = drawn_ranks(8, 8000, torch.Generator().manual_seed(0))
    counts = torch.tensor(ranks).bincount()
    assert counts[0] == 0
    assert counts.shape == (9,)
    assert (counts[1:] - 1000).abs().max() < 5 * 1000**0.5
    assert drawn_ranks(8, 8000, torch.Generator().manual_seed(0)) == ranks
    assert drawn_ranks(8, 8000, torch.Generator().manual_seed(1)) != ranks


def test_every_layer_of_a_step_has_the_same_rank_and_steps_have_others():
    model = tiny_model()
    prepared, ranks = prepare(setting_of("dylora", steps=50), model), []
    for step in range(50):
        prepared.before_step(step)
        ranks.append({model.get_submodule(name).rank for name in NAMES})
    assert {len(found) for found in ranks} == {1}
    assert set.union(*ranks) == {1, 2, 3, 4}


def test_the_changes_are_those_at_the_full_rank_whatever_the_last_step_had():
    run = Run(setting_of("dylora", steps=9)).train()
    before, after = effective_weights(tiny_model()), effective_weights(run.model)
    for change in run.prepared.changes():
        moved = float((after[change.name] - before[change.name]).norm())
        assert change.change_norm == pytest.approx(moved, rel=1e-4)
