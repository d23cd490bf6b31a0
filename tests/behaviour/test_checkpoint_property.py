"""A resumed run is the uninterrupted one, whatever had happened to the run before it was saved."""

import contextlib
import copy
import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from deltaopt import DeltaLoRAOptimizer, LoRATriple, WeightMismatchError
from deltaopt.checkpoint.fingerprint import SAMPLES, sampled_positions
from tests.support import strategies
from tests.support.compare import close, refused, same, through_a_file
from tests.support.histories import after, histories, random_run
from tests.support.small import run_without_displacement
from tests.support.strategies import RULES


@contextlib.contextmanager
def rebuilt_with_a_warning():
    """Ignore that 16-bit weights were rebuilt in one rounded step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*16-bit .* rebuilt")
        yield


def resumed_run(run, whole, **options):
    """Load the state of `run` onto its W, or the pristine base with its A and B, over other settings."""
    with rebuilt_with_a_warning():
        return run.twin(whole=whole, **{"lr": 9.0, "start_step": 77, "update_ratio": 0.1, **options})


def assert_same_state(run, other):
    assert all(map(torch.equal, (*run.tensors, run.scale), (*other.tensors, other.scale)))
    assert torch.equal(run.displacement(), other.displacement())
    assert run.optimizer.skipped_updates == other.optimizer.skipped_updates
    assert same(run.optimizer.state_dict(), other.optimizer.state_dict())


@given(
    layout=strategies.layouts,
    dtype=strategies.dtypes,
    seed=strategies.seeds,
    start_step=strategies.start_steps,
    zero=st.booleans(),
    history=histories(max_size=16),
    cut=st.floats(0, 1),
)
def test_with_W_in_the_checkpoint_bit_for_bit(layout, dtype, seed, start_step, zero, history, cut):
    rule, events = history
    lr = 1e-3 if dtype == torch.bfloat16 else 0.02
    place = round(cut * len(events))
    run = random_run(rule, layout, seed=seed, dtype=dtype, zero=zero, start_step=start_step, lr=lr)
    after(run, events[:place])
    twin = resumed_run(run, whole=True)
    assert_same_state(run, twin)
    for event in events[place:]:
        run.happen(event)
        twin.happen(event)
    assert_same_state(run, twin)


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_factors_that_change_right_after_loading_are_an_outside_change(layout):
    """Give the loaded ledger a copy of its own of where the last move came to."""
    run = random_run("in_place", layout).train(1)
    twin = resumed_run(run, whole=True)
    twin.happen("outside")
    assert close(twin.displacement(), twin.asked)
    twin.train(1)
    assert close(twin.displacement(), twin.asked)
    assert close(twin.moved(), twin.asked)


@given(
    layout=strategies.layouts,
    dtype=strategies.wide_dtypes,
    seed=strategies.seeds,
    start_step=strategies.start_steps,
    zero=st.booleans(),
    history=histories(max_size=16),
    cut=st.floats(0, 1),
)
def test_from_the_base_and_the_adapter_to_rounding(layout, dtype, seed, start_step, zero, history, cut):
    rule, events = history
    place, eps = round(cut * len(events)), torch.finfo(dtype).eps
    run = random_run(rule, layout, seed=seed, dtype=dtype, zero=zero, start_step=start_step)
    after(run, events[:place])
    twin = resumed_run(run, whole=False)
    for event in events[place:]:
        run.happen(event)
        twin.happen(event)
    for ours, theirs in zip(run.tensors, twin.tensors, strict=True):
        assert close(theirs, ours, 40 * eps)
    assert torch.equal(run.scale, twin.scale)
    assert close(twin.displacement(), run.asked, 8 * eps * run.size())
    again = resumed_run(twin, whole=False)  # a checkpoint of the resumed run, on the base once more
    assert close(again.stored.W, run.stored.W, 40 * eps)


@pytest.mark.parametrize("scaled", ["as at first", "as it was left"])
@pytest.mark.parametrize("whole", [True, False], ids=["on W", "on the base"])
@pytest.mark.parametrize(
    ("start_step", "stop", "zero"), [(0, 4, True), (3, 6, False), (6, 6, False), (9, 4, False), (0, 0, True)]
)
@pytest.mark.parametrize("rule", RULES)
def test_the_branch_is_scaled_by_the_state(rule, start_step, stop, zero, whole, scaled):
    """Resume before, at and after step K, with the branch as it was at first or as the run had left it."""
    run = random_run(rule, zero=zero, start_step=start_step).train(stop)
    twin = run.twin(whole=whole, scaling=float(run.scale) if scaled == "as it was left" else None)
    assert torch.equal(twin.scale, run.scale)
    assert twin.optimizer.triples[0].scaling == run.scaling
    for r in (run, twin):
        r.train(7)
    if whole:
        assert_same_state(run, twin)
    else:
        assert all(close(theirs, ours, 1e-12) for ours, theirs in zip(run.tensors, twin.tensors, strict=True))


@given(layout=strategies.layouts, history=histories(min_size=1).filter(lambda drawn: "step" in drawn[1]))
def test_in_16_bits_the_base_and_the_adapter_give_the_displacement_rounded_once(layout, history):
    rule, events = history
    run = after(random_run(rule, layout, dtype=torch.bfloat16), events)
    assume(not torch.equal(run.stored.W, run.W0))
    twin = resumed_run(run, whole=False)
    assert torch.equal(twin.scale, run.scale)
    carried = (float(run.scale) - run.scaling) * run.product()  # by the branch of the folded rule
    dense = run.base() + run.displacement() - carried
    assert close(twin.stored.matrix(twin.stored.W.double()), dense, torch.finfo(torch.bfloat16).eps)


@given(
    rule=strategies.rules,
    layout=strategies.layouts,
    seed=strategies.seeds,
    whole=st.booleans(),
    loads=st.integers(2, 4),
)
def test_loading_any_number_of_times_moves_W_once(rule, layout, seed, whole, loads):
    """Load the same state by the same optimizer and by new ones, and each one's own, as accelerator.prepare does."""
    run = random_run(rule, layout, seed=seed, dtype=torch.float32).train(3)
    state, twin = through_a_file(run.optimizer.state_dict()), resumed_run(run, whole)
    W, scale = twin.stored.W.clone(), twin.scale.clone()
    for _ in range(loads):
        twin.optimizer.load_state_dict(state)
        twin.optimizer.load_state_dict(twin.optimizer.state_dict())
        assert torch.equal(twin.scale, scale)
        if rule == "in_place":
            other = DeltaLoRAOptimizer(twin.inner, [twin.new_triple()])
            other.load_state_dict(state)
        assert torch.equal(twin.stored.W, W)
    assert close(W, run.stored.W, 1e-6)
    assert torch.equal(scale, run.scale)


@given(
    rule=strategies.rules,
    layout=strategies.layouts,
    seed=strategies.seeds,
    letter=st.sampled_from("WAB"),
    place=st.integers(0, 9),
)
def test_one_changed_number_is_refused_and_nothing_is_changed(rule, layout, seed, letter, place):
    run = random_run(rule, layout, seed=seed).train(1)
    state, twin = through_a_file(run.optimizer.state_dict()), resumed_run(run, whole=True)
    part = twin.triple.view.part(twin.stored.W) if letter == "W" else getattr(twin.stored, letter).detach()
    part[tuple(min(place, n - 1) for n in part.shape)] *= 1.0000001
    refused(
        lambda: twin.optimizer.load_state_dict(state),
        WeightMismatchError,
        f"q: {letter} has other contents",
        kept=lambda: (twin.tensors, twin.scale),
    )


@pytest.mark.parametrize("rule", RULES)
def test_what_a_slice_leaves_alone_may_change(rule):
    """Change other rows of a fused weight, which belong to other triples or to none."""
    run = random_run(rule, "rows").train(1)
    twin = resumed_run(run, whole=True)
    twin.stored.W[0] += 1
    twin.optimizer.load_state_dict(run.optimizer.state_dict())
    twin.stored.W[5] += 1
    with pytest.raises(WeightMismatchError, match="q: W has other contents"):
        twin.optimizer.load_state_dict(run.optimizer.state_dict())


@pytest.mark.parametrize("rule", RULES)
def test_refuses_a_cast_weight_with_both_dtypes(rule):
    run = random_run(rule, dtype=torch.float32).train(1)
    twin = run.twin(load=False)
    twin.stored.W = twin.stored.W.bfloat16()
    optimizer = DeltaLoRAOptimizer(twin.inner, [twin.stored.triple(twin.scale, name="q")], weight_update=rule)
    with pytest.raises(
        WeightMismatchError, match="q: W has the dtype bfloat16, saved was float32, and not what it was"
    ):
        optimizer.load_state_dict(run.optimizer.state_dict())


def test_a_lost_displacement_cannot_rebuild_W():
    """Rebuild nothing with W in the checkpoint, and refuse the base."""
    optimizer, W, W0 = run_without_displacement()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    moved = W.clone()
    W.copy_(W0)
    with pytest.raises(WeightMismatchError, match=r"triple0: W cannot be moved from its base to where it was: the"):
        optimizer.load_state_dict(state)
    W.copy_(moved)
    optimizer.load_state_dict(state)


def large_embedding(rows=50_000, dtype=torch.float32, **options):
    """Build a large embedding of which training sees few rows, as PEFT starts it."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, 16, generator=generator).to(dtype)
    A, B = torch.randn(16, 2, generator=generator), torch.zeros(2, rows)
    A, B = A.requires_grad_(), B.requires_grad_()
    triple = LoRATriple(W, A, B, name="emb", layout="embedding")
    return W, A, B, DeltaLoRAOptimizer(torch.optim.AdamW, [triple], lr=1e-2, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_rows_that_moved_are_not_overlooked(dtype):
    """Sample each row in the fingerprint, and hash all of W where rounding hid the move in the sample."""
    W, A, B, optimizer = large_embedding(dtype=dtype, rounding="nearest")
    W0, ids = W.clone(), torch.tensor([100, 101, 102])
    for _ in range(5 if dtype == torch.float32 else 1):
        optimizer.zero_grad()
        (W[ids].float() + B.T[ids] @ A.T).square().sum().backward()
        if dtype == torch.bfloat16:  # so small a move that few elements change
            A.grad, B.grad = A.grad * 0, B.grad * 0
            B.grad[0, 100] = 1.0
            optimizer.param_groups[0]["lr"] = 4e-3
        optimizer.step()
    assert 0 < int((W != W0).sum()) <= 16 * (3 if dtype == torch.float32 else 1)
    state = optimizer.state_dict()
    for whole in (True, False):
        W2, A2, B2, other = large_embedding(dtype=dtype, rounding="nearest")
        with torch.no_grad():
            A2.copy_(A)
            B2.copy_(B)
            if whole:
                W2.copy_(W)
        with rebuilt_with_a_warning():
            for _ in range(2):
                other.load_state_dict(state)
        assert torch.allclose(W2.float(), W.float(), atol=1e-6)
        assert not torch.equal(W2, W0)


def test_what_the_sample_misses_is_hashed_as_a_whole():
    """Change one element of a 16-bit W that is not in the sample."""
    generator = torch.Generator().manual_seed(0)
    W0 = torch.randn(300, 300, generator=generator).bfloat16()
    sampled = sampled_positions(W0.shape, SAMPLES, torch.device("cpu")).tolist()
    place = next(i for i in range(W0.numel()) if i not in sampled)
    W, A, B = W0.clone(), torch.zeros(300, 1, requires_grad=True), torch.zeros(1, 300, requires_grad=True)
    with torch.no_grad():
        B[0, place % 300] = 1.0
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=1.0)
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    A.grad[place // 300] = 1.0
    optimizer.step()
    assert (W != W0).nonzero().tolist() == [[place // 300, place % 300]]
    state, moved = optimizer.state_dict(), W.clone()
    optimizer.load_state_dict(state)
    assert torch.equal(W, moved)
    W.copy_(W0)
    with pytest.raises(WeightMismatchError, match="triple0: W has moved in this process in few places"):
        optimizer.load_state_dict(state)  # it might be a W that has moved further
    other = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=1.0)
    with pytest.warns(RuntimeWarning, match="16-bit .* rebuilt"):
        other.load_state_dict(state)
    assert torch.equal(W, moved)
    other.load_state_dict(state)
    assert torch.equal(W, moved)


def test_a_W_that_moved_further_in_places_the_sample_misses_is_not_moved_again():
    """Move where the fingerprint does not look: it is that of the base, at the save and now."""
    generator = torch.Generator().manual_seed(0)
    W, A, B = torch.randn(8, 60_000, generator=generator), torch.randn(8, 2), torch.zeros(2, 60_000)
    A, B = A.requires_grad_(), B.requires_grad_()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=0.1)
    sampled = {place % 60_000 for place in sampled_positions(W.shape, SAMPLES, torch.device("cpu")).tolist()}
    columns = [i for i in range(60_000) if i not in sampled][:3]

    def train():
        A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
        B.grad[:, columns] = 1.0
        optimizer.step()

    train()
    state, factor = optimizer.state_dict(), B.detach().clone()
    train()
    moved = W.clone()
    with torch.no_grad():
        B.copy_(factor)
    with pytest.raises(WeightMismatchError, match="triple0: W has moved in this process in few places"):
        optimizer.load_state_dict(state)
    assert torch.equal(W, moved)


def test_a_rebuilt_W_that_looks_like_its_base_is_no_reason_to_leave_another_base_alone():
    """Show the roundings of the steps in the sample, where one rounding of all does not show."""
    generator = torch.Generator().manual_seed(0)
    W0 = torch.randn(300, 300, generator=generator).bfloat16()
    factors = [torch.zeros(300, 1), torch.zeros(1, 300)]
    hidden = next(i for i in range(90_000) if i not in sampled_positions(W0.shape, SAMPLES, torch.device("cpu")))
    seen = int(sampled_positions(W0.shape, SAMPLES, torch.device("cpu"))[0])

    def build():
        W, (A, B) = W0.clone(), (f.clone().requires_grad_() for f in factors)
        return W, A, B, DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=1.0)

    W, A, B, optimizer = build()
    with torch.no_grad():
        B[0, hidden % 300] = 1.0
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    A.grad[hidden // 300] = 1.0
    optimizer.step()
    W.view(-1)[seen] += 1.0  # as roundings on the way might
    state = optimizer.state_dict()
    factors = [A.detach(), B.detach()]
    for _ in range(3):
        W, *_, other = build()
        with pytest.warns(RuntimeWarning, match="16-bit .* rebuilt"):
            other.load_state_dict(state)
        assert not torch.equal(W, W0)


def test_an_adapter_that_comes_back_in_float32_is_the_same():
    """Cast 16-bit factors to float32, as PEFT's load_adapter does, through which Trainer resumes."""
    run = random_run("in_place", dtype=torch.bfloat16).train(3)
    state, twin = through_a_file(run.optimizer.state_dict()), run.stored.twin()
    for factor in (twin.A, twin.B):
        factor.data = factor.data.float()
    optimizer = DeltaLoRAOptimizer(run.inner, [twin.triple(run.scaling, name="q")])
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.displacement("q").product(), run.optimizer.displacement("q").product())
    twin.A.data[0, 0] += 1e-6
    with pytest.raises(WeightMismatchError, match="q: A has the dtype float32, saved was bfloat16"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_kept_base_lets_a_run_go_back_to_an_adapter_of_its_own(dtype):
    """Load the best checkpoint within one process: W has moved since, and is no base."""
    run = random_run("in_place", dtype=dtype, keep_base="cpu", lr=1e-3).train(1)
    state, factors, W = through_a_file(run.optimizer.state_dict()), copy.deepcopy(run.stored), run.stored.W.clone()
    run.train(1)
    with torch.no_grad():
        run.stored.A.copy_(factors.A)
        run.stored.B.copy_(factors.B)
    for first in (True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.optimizer.load_state_dict(state)
        assert any("rebuilt on the copy that keep_base had kept" in str(w.message) for w in caught) == first
        assert close(run.stored.W.double(), W.double(), torch.finfo(dtype).eps)
    assert not torch.equal(run.stored.W, run.W0)
    with run.optimizer.base_weights():
        assert torch.equal(run.stored.W, run.W0)
