"""export_adapter and merged_weights: the base and one adapter give what the trained W and its branch give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deltaopt
from deltaopt import LoRATriple
from tests.support import strategies
from tests.support.compare import assert_close, close, refused
from tests.support.histories import after, histories, random_run
from tests.support.runs import SCALING, LayerRun
from tests.support.strategies import RULES


@given(
    layout=strategies.layouts,
    dtype=strategies.wide_dtypes,
    seed=strategies.seeds,
    start_step=strategies.start_steps,
    zero=st.booleans(),
    history=histories(max_size=10),
)
def test_the_base_and_the_exported_adapter_are_the_trained_weight(layout, dtype, seed, start_step, zero, history):
    """Vary layouts, dtypes, start_step and, by rule, update_ratio, outside changes, skipped steps and restarts."""
    rule, events = history
    run = after(random_run(rule, layout, seed=seed, dtype=dtype, zero=zero, start_step=start_step), events)
    found = deltaopt.export_adapter(run.optimizer)["q"]
    assert found.error == 0.0
    tolerance = 8 * torch.finfo(dtype).eps * run.size()
    assert close(run.base() + found.product().double(), run.effective_exactly(), tolerance)


@pytest.mark.parametrize(
    ("rule", "zero", "start_step", "rank"),
    [
        *(("in_place", True, 0, 3), ("in_place", False, 0, 6), ("in_place", True, 2, 6), ("in_place", True, 99, 3)),
        *(("folded", True, 0, 3), ("folded", False, 0, 6), ("folded", True, 2, 6), ("folded", True, 99, 3)),
    ],
)
def test_its_rank_is_r_or_2r_with_a_constant_ratio(rule, zero, start_step, rank):
    run = random_run(rule, zero=zero, start_step=start_step).train(20)
    found = deltaopt.export_adapter(run.optimizer)["q"]
    assert found.rank == rank
    assert found.A.shape == (5, rank)
    assert found.B.shape == (rank, 7)
    assert not found.A.requires_grad


@pytest.mark.parametrize("start_step", [0, 3, 20])
@pytest.mark.parametrize("zero", [True, False], ids=["zero product", "random product"])
@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_both_rules_export_and_merge_the_same(layout, zero, start_step):
    runs = [LayerRun(rule, layout, zero=zero, start_step=start_step).train(8) for rule in RULES]
    assert_close(*(deltaopt.export_adapter(run.optimizer)["q"].product() for run in runs))
    assert_close(*(deltaopt.merged_weights(run.optimizer)["q"] for run in runs))
    assert_close(*(run.optimizer.displacement("q").product() for run in runs))
    ranks = [deltaopt.export_adapter(run.optimizer)["q"].rank for run in runs]
    assert ranks[RULES.index("folded")] <= ranks[RULES.index("in_place")]


@pytest.mark.parametrize("rule", RULES)
def test_after_three_restarts_it_has_the_rank_of_four_adapters(rule):
    generator = torch.Generator().manual_seed(0)
    W, A, B = torch.randn(40, 30), torch.zeros(40, 3, requires_grad=True), torch.randn(3, 30, requires_grad=True)
    W0, scale = W.clone(), torch.tensor(SCALING)
    triple = LoRATriple(W, A, B, scaling=scale, name="q")
    optimizer = deltaopt.DeltaLoRAOptimizer(torch.optim.AdamW, [triple], lr=0.05, update_ratio=0.5, weight_update=rule)
    for i in range(4):
        for _ in range(5):
            optimizer.zero_grad()
            sum((torch.randn(f.shape, generator=generator) * f).sum() for f in (A, B)).backward()
            optimizer.step()
        if i < 3:
            optimizer.restart(generator=generator)
    found = deltaopt.export_adapter(optimizer)["q"]
    whole = (W + scale * A @ B).detach()
    assert found.rank == 12
    assert torch.linalg.matrix_rank((whole - W0).double(), rtol=1e-5) == 12
    assert close(W0 + found.product(), whole, 1e-6)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("layout", ["linear", "experts"])
@pytest.mark.parametrize("rule", RULES)
def test_compressed_it_is_the_best_adapter_of_that_rank(rule, layout, rank):
    run = random_run(rule, layout, start_step=2).train(8)
    found = deltaopt.export_adapter(run.optimizer, rank=rank)["q"]
    change = run.effective_exactly() - run.base()
    U, s, Vh = torch.linalg.svd(change, full_matrices=False)
    best = U[..., :rank] @ torch.diag_embed(s[..., :rank]) @ Vh[..., :rank, :]
    assert found.rank == rank
    assert close(found.product(), best)
    assert found.error == pytest.approx(float((change - best).norm() / change.norm()), rel=1e-6)
    assert found.error > 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_a_rank_that_is_large_enough_changes_nothing(rule):
    run = random_run(rule, zero=True).train(1)
    exact, allowed = (deltaopt.export_adapter(run.optimizer, rank)["q"] for rank in (None, 3))
    assert all(map(torch.equal, (exact.A, exact.B), (allowed.A, allowed.B)))


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_refuses_a_rank_that_is_none(rank):
    run = random_run("in_place")
    with pytest.raises(ValueError, match="rank is a positive int or None"):
        deltaopt.export_adapter(run.optimizer, rank)


@pytest.mark.parametrize("read", [deltaopt.export_adapter, deltaopt.merged_weights])
@pytest.mark.parametrize("rule", RULES)
def test_is_refused_within_base_weights(rule, read):
    run = random_run(rule).train(1)
    with run.optimizer.base_weights():
        refused(lambda: read(run.optimizer), RuntimeError, r"within base_weights\(\)", kept=lambda: run.tensors)


class TakenFromBase(LoRATriple):
    """Say that the start of A and B was taken out of W, as PiSSA does."""

    def took_from_base(self, tensors):
        return True


@pytest.mark.parametrize("start_step", [0, 2])
def test_from_pristine_counts_from_before_the_start_was_taken_out(start_step):
    stored = strategies.make("linear")
    W0, W_pristine = stored.W.clone(), stored.W + SCALING * (stored.A @ stored.B).detach()
    triple = TakenFromBase(stored.W, stored.A, stored.B, scaling=SCALING, name="q")
    optimizer = deltaopt.DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, start_step=start_step)
    for _ in range(4):
        stored.A.grad, stored.B.grad = torch.ones_like(stored.A), torch.randn_like(stored.B)
        optimizer.step()
    trained = (stored.W + SCALING * stored.A @ stored.B).detach()
    found = deltaopt.export_adapter(optimizer, from_pristine=True)["q"]
    assert found.rank == (6 if start_step == 0 else 9)
    assert close(W_pristine + found.product(), trained)
    assert close(W0 + deltaopt.export_adapter(optimizer)["q"].product(), trained)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("rule", RULES)
def test_from_pristine_a_start_that_has_not_changed_is_no_change(rule, steps):
    """Cancel the start of A and B against what it took out of W."""
    stored = strategies.make("linear")
    triple = TakenFromBase(stored.W, stored.A, stored.B, scaling=torch.tensor(SCALING), name="q")
    optimizer = deltaopt.DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.0, weight_update=rule, start_step=9)
    for _ in range(steps):
        (stored.A.sum() + stored.B.sum()).backward()
        optimizer.step()
    found = deltaopt.export_adapter(optimizer, from_pristine=True)["q"]
    assert (found.A.shape, found.B.shape) == (stored.A.shape, stored.B.shape)
    assert not found.product().any()


@given(rule=strategies.rules, layout=strategies.layouts, dtype=strategies.dtypes)
def test_merged_weights_are_W_with_the_branch_rounded_once(rule, layout, dtype):
    run = random_run(rule, layout, dtype=dtype).train(1)
    kept = run.stored.W.clone()
    merged = deltaopt.merged_weights(run.optimizer)["q"]
    assert (merged.shape, merged.dtype, merged.stride()) == (kept.shape, dtype, kept.stride())
    assert torch.equal(run.stored.W, kept)
    assert close(run.stored.matrix(merged).double(), run.effective_exactly(), torch.finfo(dtype).eps)


def test_merged_weights_of_slices_of_one_weight_hold_all_branches():
    W = torch.randn(15, 7)
    factors = [[torch.randn(5, 2, requires_grad=True), torch.randn(2, 7, requires_grad=True)] for _ in range(3)]
    triples = [
        LoRATriple(W, A, B, scaling=SCALING, name=name, rows=(5 * i, 5 * i + 5))
        for i, (name, (A, B)) in enumerate(zip("qkv", factors, strict=True))
    ]
    optimizer = deltaopt.DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1)
    dense = W + SCALING * torch.cat([(A @ B).detach() for A, B in factors])
    for merged in deltaopt.merged_weights(optimizer).values():
        assert close(merged, dense, 1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_merged_weights_leave_what_does_not_move_as_it_is(rule):
    run = random_run(rule, "rows").train(1)
    merged = deltaopt.merged_weights(run.optimizer)["q"]
    assert torch.equal(merged[:5], run.stored.W[:5])
    assert torch.equal(merged[10:], run.stored.W[10:])
    assert not torch.equal(merged[5:10], run.stored.W[5:10])


def test_merged_weights_of_several_layers_hold_their_own_branch():
    """Layers of one shape, which could be taken for each other."""
    stored = [strategies.make("linear", seed) for seed in range(3)]
    optimizer = deltaopt.DeltaLoRAOptimizer(
        torch.optim.SGD, [s.triple(0.5, str(i)) for i, s in enumerate(stored)], lr=0.1
    )
    for name, W in deltaopt.merged_weights(optimizer).items():
        W0, A, B = stored[int(name)].matrices()
        assert_close(W, W0 + 0.5 * A @ B, 1e-12)
