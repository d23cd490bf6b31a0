"""Resumed = uninterrupted, whatever had happened to the run before it was saved."""

import copy
import io
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaopt import DeltaLoRAOptimizer, LoRATriple, WeightMismatchError
from deltaopt.fingerprint import SAMPLES, sampled_positions
from tests.support import strategies
from tests.unit.test_ledger import EVENTS, Run, S, close, lost

AdamW = torch.optim.AdamW
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.float64])
events = st.lists(st.sampled_from(EVENTS), max_size=8)


def saved(run):
    """What a file gives back, read with weights_only=True."""
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(run, whole):
    """A new layer and optimizer with the state of `run`: on its W, or on the pristine base with its A and B."""
    twin = copy.copy(run)
    twin.asked, twin.stored = run.asked.clone(), copy.deepcopy(run.stored)
    if not whole:
        twin.stored.W = run.W0.clone()
    twin.optimizer = DeltaLoRAOptimizer(AdamW, [twin.stored.triple(S, name="q")], lr=9.0, start_step=77)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the 16-bit W of 1 layers .* was rebuilt")
        twin.optimizer.load_state_dict(saved(run))
    return twin


def tensors(run):
    return [t.detach() for t in (run.stored.W, run.stored.A, run.stored.B)]


@given(
    layout=strategies.layouts,
    dtype=DTYPES,
    seed=strategies.seeds,
    start_step=strategies.start_steps,
    zero_A=st.booleans(),
    before=events,
    after=events,
)
def test_with_W_in_the_checkpoint_bit_for_bit(layout, dtype, seed, start_step, zero_A, before, after):
    run = Run(layout, seed, dtype, zero_A, start_step=start_step, lr=1e-3 if dtype == torch.bfloat16 else 0.02)
    for event in before:
        run.happen(event)
    twin = resumed(run, whole=True)
    for event in after:
        run.happen(event)
        twin.happen(event)
    assert all(map(torch.equal, tensors(run), tensors(twin)))
    assert torch.equal(run.displacement(), twin.displacement())
    assert run.optimizer.skipped_updates == twin.optimizer.skipped_updates
    assert str(run.optimizer.state_dict()) == str(twin.optimizer.state_dict())


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_factors_that_change_right_after_loading_are_an_outside_change(layout):
    """The loaded ledger has its own copy of where the last move came to."""
    run = Run(layout)
    run.step()
    twin = resumed(run, whole=True)
    twin.happen("outside")
    assert close(twin.displacement(), twin.asked)
    twin.step()
    assert close(twin.displacement(), twin.asked)
    assert close(twin.moved(), twin.asked)


@given(
    layout=strategies.layouts,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=strategies.seeds,
    start_step=strategies.start_steps,
    zero_A=st.booleans(),
    before=events,
    after=events,
)
def test_from_the_base_and_the_adapter_to_rounding(layout, dtype, seed, start_step, zero_A, before, after):
    run = Run(layout, seed, dtype, zero_A, start_step=start_step)
    for event in before:
        run.happen(event)
    twin = resumed(run, whole=False)
    for event in after:
        run.happen(event)
        twin.happen(event)
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(tensors(run), tensors(twin), strict=True):
        assert close(theirs, ours, 40 * eps)
    assert close(twin.displacement(), run.asked, 8 * eps * run.size())
    again = resumed(twin, whole=False)  # a checkpoint of the resumed run, on the base once more
    assert close(again.stored.W, run.stored.W, 40 * eps)


@given(layout=strategies.layouts, before=events.filter(lambda some: "step" in some))
def test_in_16_bits_the_base_and_the_adapter_give_the_displacement_rounded_once(layout, before):
    run = Run(layout, dtype=torch.bfloat16)
    for event in before:
        run.happen(event)
    asked = run.displacement()
    twin = resumed(run, whole=False)
    if torch.equal(run.stored.W, run.W0):
        return
    dense = run.stored.matrix(run.W0.double()) + asked
    assert close(twin.stored.matrix(twin.stored.W.double()), dense, torch.finfo(torch.bfloat16).eps)


@given(layout=strategies.layouts, seed=strategies.seeds, whole=st.booleans(), loads=st.integers(2, 4))
def test_loading_any_number_of_times_moves_W_once(layout, seed, whole, loads):
    """The same state, by the same optimizer and by new ones; and each one's own, as accelerator.prepare does."""
    run = Run(layout, seed, torch.float32)
    for _ in range(3):
        run.step()
    state, twin = saved(run), resumed(run, whole)
    W = twin.stored.W.clone()
    for _ in range(loads):
        twin.optimizer.load_state_dict(state)
        twin.optimizer.load_state_dict(twin.optimizer.state_dict())
        other = DeltaLoRAOptimizer(AdamW, [twin.stored.triple(S, name="q")])
        other.load_state_dict(state)
        assert torch.equal(twin.stored.W, W)
    assert close(W, run.stored.W, 1e-6)


@given(layout=strategies.layouts, seed=strategies.seeds, letter=st.sampled_from("WAB"), place=st.integers(0, 9))
def test_one_changed_number_is_refused_and_nothing_is_changed(layout, seed, letter, place):
    run = Run(layout, seed)
    run.step()
    state, twin = saved(run), resumed(run, whole=True)
    (triple,) = twin.optimizer.triples
    part = triple.moved_part(twin.stored.W) if letter == "W" else getattr(twin.stored, letter).detach()
    part[tuple(min(place, n - 1) for n in part.shape)] *= 1.0000001
    before = [t.clone() for t in tensors(twin)]
    with pytest.raises(WeightMismatchError, match=f"q: {letter} has other contents"):
        twin.optimizer.load_state_dict(state)
    assert all(map(torch.equal, before, tensors(twin)))


def test_what_a_slice_leaves_alone_may_change():
    """The other rows of a fused weight belong to other triples, or to nobody."""
    run = Run("rows")
    run.step()
    twin = resumed(run, whole=True)
    twin.stored.W[0] += 1
    twin.optimizer.load_state_dict(saved(run))
    twin.stored.W[5] += 1
    with pytest.raises(WeightMismatchError, match="q: W has other contents"):
        twin.optimizer.load_state_dict(saved(run))


def test_a_cast_weight_is_refused_with_both_dtypes():
    run = Run(dtype=torch.float32)
    run.step()
    state, twin = saved(run), copy.deepcopy(run.stored)
    twin.W = twin.W.bfloat16()
    optimizer = DeltaLoRAOptimizer(AdamW, [twin.triple(S, name="q")])
    with pytest.raises(
        WeightMismatchError, match="q: W has the dtype bfloat16, saved was float32, and not what it was"
    ):
        optimizer.load_state_dict(state)


def test_a_lost_displacement_can_not_rebuild_W():
    """And with W in the checkpoint it need not."""
    optimizer, W, W0 = lost()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    moved = W.clone()
    W.copy_(W0)
    with pytest.raises(WeightMismatchError, match="triple0: W can not be moved from its base to where it was: the"):
        optimizer.load_state_dict(state)
    W.copy_(moved)
    optimizer.load_state_dict(state)


def embedding(rows=50_000, dtype=torch.float32, **options):
    """A large embedding of which training sees few rows, as PEFT starts it."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, 16, generator=generator).to(dtype)
    A, B = torch.randn(16, 2, generator=generator), torch.zeros(2, rows)
    A, B = A.requires_grad_(), B.requires_grad_()
    triple = LoRATriple(W, A, B, name="emb", layout="embedding")
    return W, A, B, DeltaLoRAOptimizer(AdamW, [triple], lr=1e-2, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_rows_that_moved_are_not_overlooked(dtype):
    """The fingerprint is a sample: it sees each row, and where rounding hid the move in the sample, all is hashed."""
    W, A, B, optimizer = embedding(dtype=dtype, rounding="nearest")
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
        W2, A2, B2, other = embedding(dtype=dtype, rounding="nearest")
        with torch.no_grad():
            A2.copy_(A)
            B2.copy_(B)
            if whole:
                W2.copy_(W)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the 16-bit W of 1 layers .* was rebuilt")
            for _ in range(2):
                other.load_state_dict(state)
        assert torch.allclose(W2.float(), W.float(), atol=1e-6)
        assert not torch.equal(W2, W0)


def test_what_the_sample_misses_is_hashed_as_a_whole():
    """One element of a 16-bit W that is not in the sample has changed."""
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
    with pytest.warns(RuntimeWarning, match="was rebuilt"):
        other.load_state_dict(state)
    assert torch.equal(W, moved)
    other.load_state_dict(state)
    assert torch.equal(W, moved)


def test_a_W_that_moved_further_in_places_the_sample_misses_is_not_moved_again():
    """Its fingerprint is that of the base still, at the save and now."""
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
    """In 16 bits the steps' own roundings may show in the sample where one rounding of all does not."""
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
        with pytest.warns(RuntimeWarning, match="was rebuilt"):
            other.load_state_dict(state)
        assert not torch.equal(W, W0)


def test_an_adapter_that_comes_back_in_float32_is_the_same():
    """PEFT's load_adapter, through which Trainer resumes, casts 16-bit factors to float32."""
    run = Run(dtype=torch.bfloat16)
    for _ in range(3):
        run.step()
    state, twin = saved(run), copy.deepcopy(run.stored)
    for factor in (twin.A, twin.B):
        factor.data = factor.data.float()
    optimizer = DeltaLoRAOptimizer(AdamW, [twin.triple(S, name="q")])
    optimizer.load_state_dict(state)
    assert torch.equal(optimizer.displacement("q").product(), run.optimizer.displacement("q").product())
    twin.A.data[0, 0] += 1e-6
    with pytest.raises(WeightMismatchError, match="q: A has the dtype float32, saved was bfloat16"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("key", ["state", "param_groups"])
def test_half_a_state_is_refused(key):
    run = Run()
    state = run.optimizer.state_dict()
    del state[key]
    with pytest.raises(ValueError, match=f"no state of an optimizer: it has no {key}"):
        run.optimizer.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_kept_base_lets_a_run_go_back_to_an_adapter_of_its_own(dtype):
    """Within one process, as when the best checkpoint is loaded: W has moved on, and is no base."""
    run = Run(dtype=dtype, keep_base="cpu", lr=1e-3)
    run.step()
    state, factors, W = saved(run), copy.deepcopy(run.stored), run.stored.W.clone()
    run.step()
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
