"""export_adapter and merged_weights: the base and one adapter give what the trained W and its branch give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deltaopt
from deltaopt import LoRATriple
from tests.support import reference, strategies
from tests.unit.test_ledger import EVENTS, Run, S, close


def effective(run):
    """The trained effective weight, from the stored tensors alone."""
    W, A, B = (t.double() for t in run.stored.matrices())
    return W + S * reference.product(A, B)


def base(run):
    return run.stored.matrix(run.W0.double())


@given(
    layout=strategies.layouts,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=strategies.seeds,
    start_step=strategies.start_steps,
    zero_A=st.booleans(),
    events=st.lists(st.sampled_from(EVENTS), max_size=10),
)
def test_the_base_and_the_exported_adapter_are_the_trained_weight(layout, dtype, seed, start_step, zero_A, events):
    """Over layouts, dtypes, start_step, changing update_ratio, outside changes, skipped steps and restarts."""
    run = Run(layout, seed, dtype, zero_A, start_step=start_step)
    for event in events:
        run.happen(event)
    found = deltaopt.export_adapter(run.optimizer)["q"]
    assert found.error == 0.0
    assert close(base(run) + found.product().double(), effective(run), 8 * torch.finfo(dtype).eps * run.size())


@pytest.mark.parametrize(("zero_A", "start_step", "rank"), [(True, 0, 3), (False, 0, 6), (True, 2, 6), (True, 99, 3)])
def test_its_rank_is_r_or_2r_with_a_constant_ratio(zero_A, start_step, rank):
    run = Run(zero_A=zero_A, start_step=start_step)
    for _ in range(20):
        run.step()
    found = deltaopt.export_adapter(run.optimizer)["q"]
    assert found.rank == rank
    assert found.A.shape == (5, rank)
    assert found.B.shape == (rank, 7)
    assert not found.A.requires_grad


def test_after_three_restarts_it_has_the_rank_of_four_adapters():
    generator = torch.Generator().manual_seed(0)
    W, A, B = torch.randn(40, 30), torch.zeros(40, 3, requires_grad=True), torch.randn(3, 30, requires_grad=True)
    W0 = W.clone()
    optimizer = deltaopt.DeltaLoRAOptimizer(torch.optim.AdamW, [(W, A, B)], lr=0.05, update_ratio=0.5, scaling=S)
    for i in range(4):
        for _ in range(5):
            A.grad, B.grad = (torch.randn(f.shape, generator=generator) for f in (A, B))
            optimizer.step()
        if i < 3:
            optimizer.restart(generator=generator)
    found = deltaopt.export_adapter(optimizer)["triple0"]
    whole = (W + S * A @ B).detach()
    assert found.rank == 12
    assert torch.linalg.matrix_rank((whole - W0).double(), rtol=1e-5) == 12
    assert close(W0 + found.product(), whole, 1e-6)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("layout", ["linear", "experts"])
def test_compressed_it_is_the_best_adapter_of_that_rank(layout, rank):
    run = Run(layout, start_step=2)
    for _ in range(8):
        run.step()
    found, change = deltaopt.export_adapter(run.optimizer, rank=rank)["q"], effective(run) - base(run)
    U, s, Vh = torch.linalg.svd(change, full_matrices=False)
    best = U[..., :rank] @ torch.diag_embed(s[..., :rank]) @ Vh[..., :rank, :]
    assert found.rank == rank
    assert close(found.product(), best)
    assert found.error == pytest.approx(float((change - best).norm() / change.norm()), rel=1e-6)
    assert found.error > 1e-4


def test_a_rank_that_is_large_enough_changes_nothing():
    run = Run(zero_A=True)
    run.step()
    exact, allowed = (deltaopt.export_adapter(run.optimizer, rank)["q"] for rank in (None, 3))
    assert all(map(torch.equal, (exact.A, exact.B), (allowed.A, allowed.B)))


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match="rank is a positive int or None"):
        deltaopt.export_adapter(Run().optimizer, rank)


def test_within_base_weights_it_is_refused():
    run = Run()
    run.step()
    with run.optimizer.base_weights(), pytest.raises(RuntimeError, match=r"within base_weights\(\)"):
        deltaopt.export_adapter(run.optimizer)
    with run.optimizer.base_weights(), pytest.raises(RuntimeError, match=r"within base_weights\(\)"):
        deltaopt.merged_weights(run.optimizer)


class Taking(LoRATriple):
    """A start of A and B that was taken out of W, as PiSSA makes it."""

    def took_from_base(self):
        return True


@pytest.mark.parametrize("start_step", [0, 2])
def test_from_pristine_counts_from_before_the_start_was_taken_out(start_step):
    stored = strategies.make("linear")
    W0, W_pristine = stored.W.clone(), stored.W + S * (stored.A @ stored.B).detach()
    triple = Taking(stored.W, stored.A, stored.B, scaling=S, name="q")
    optimizer = deltaopt.DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, start_step=start_step)
    for _ in range(4):
        stored.A.grad, stored.B.grad = torch.ones_like(stored.A), torch.randn_like(stored.B)
        optimizer.step()
    trained = (stored.W + S * stored.A @ stored.B).detach()
    found = deltaopt.export_adapter(optimizer, from_pristine=True)["q"]
    assert found.rank == (6 if start_step == 0 else 9)
    assert close(W_pristine + found.product(), trained)
    assert close(W0 + deltaopt.export_adapter(optimizer)["q"].product(), trained)


@given(layout=strategies.layouts, dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_merged_weights_are_W_with_the_branch_rounded_once(layout, dtype):
    run = Run(layout, dtype=dtype)
    run.step()
    kept = run.stored.W.clone()
    merged = deltaopt.merged_weights(run.optimizer)["q"]
    assert (merged.shape, merged.dtype, merged.stride()) == (kept.shape, dtype, kept.stride())
    assert torch.equal(run.stored.W, kept)
    assert close(run.stored.matrix(merged).double(), effective(run), torch.finfo(dtype).eps)


def test_merged_weights_of_slices_of_one_weight_hold_all_branches():
    W = torch.randn(15, 7)
    factors = [[torch.randn(5, 2, requires_grad=True), torch.randn(2, 7, requires_grad=True)] for _ in range(3)]
    triples = [
        LoRATriple(W, A, B, scaling=S, name=name, rows=(5 * i, 5 * i + 5))
        for i, (name, (A, B)) in enumerate(zip("qkv", factors, strict=True))
    ]
    optimizer = deltaopt.DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1)
    dense = W + S * torch.cat([(A @ B).detach() for A, B in factors])
    for merged in deltaopt.merged_weights(optimizer).values():
        assert close(merged, dense, 1e-6)


def test_merged_weights_leave_what_does_not_move_as_it_is():
    run = Run("rows")
    run.step()
    merged = deltaopt.merged_weights(run.optimizer)["q"]
    assert torch.equal(merged[:5], run.stored.W[:5])
    assert torch.equal(merged[10:], run.stored.W[10:])
    assert not torch.equal(merged[5:10], run.stored.W[5:10])
