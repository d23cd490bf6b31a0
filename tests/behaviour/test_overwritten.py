"""A W that somebody else has written since it moved: whatever counts from the ledger says so, and nothing else does."""

import copy

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, LoRATriple, WeightMismatchError, export_adapter, schedules
from deltaopt.checkpoint.format import split_ledgers, split_record
from deltaopt.checkpoint.records import SavedLedger
from tests.support.compare import assert_close, close, through_a_file
from tests.support.runs import SmallSteps, noisy_run
from tests.support.strategies import LAYOUTS

TOLD = r"an exported adapter counts .* W of 1 layer \(q0?\) was written by somebody else since"
REBUILT = r"the W of 1 layer \(q0?\) was not base \+ displacement when the state was saved.* rebuilt as base"
OTHERWISE = r"(?s)cannot follow this state.*q: its W was written by somebody else, .*load_state_dict\(\)"
COMPENSATED = {"rounding": "compensated"}
F32 = torch.float32
LAYERS = [(24, 16, 2, F32), (16, 24, 2, F32), (24, 16, 3, F32), (24, 16, 2, torch.bfloat16), (9, 7, 2, torch.float64)]


@torch.no_grad()
def averaged(run, earlier, weight=0.5):
    """Copy the mean of the present W and an earlier one into W, as averages of models are copied."""
    run.stored.W.data.lerp_(earlier.to(run.stored.W), weight)


@pytest.fixture
def run():
    """A run with the average of two of its models in W."""
    run = noisy_run().train(2)
    early = run.stored.W.clone()
    averaged(run.train(3), early)
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_says_so(layout):
    """Say nothing of W as training has left it, whatever happened; and all of one that holds the mean of two models."""
    run = noisy_run(layout).train(2)
    early = run.stored.W.clone()
    run.train(3)
    run.optimizer.restart(generator=torch.Generator().manual_seed(0))
    run.train(2)
    export_adapter(run.optimizer)
    kept = run.stored.W.clone()
    averaged(run, early)
    with pytest.warns(UserWarning, match=TOLD):
        export_adapter(run.optimizer)
    run.stored.W.data.copy_(kept)  # exchanged for an evaluation, and put back
    export_adapter(run.optimizer)
    averaged(run, early)
    run.optimizer.rebase()
    run.train(1)
    export_adapter(run.optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_small_moves_where_rounding_is_compensated(dtype):
    """An average that differs from W by less than a hundredth of it; in 16 bits by less than their spacing."""
    run = SmallSteps(dtype, **COMPENSATED).train(20)
    early = run.stored.W.clone()
    run.train(60)
    export_adapter(run.optimizer)
    before = run.stored.W.clone()
    averaged(run, early, 0.6)
    assert float((run.stored.W - before).norm() / before.norm()) < 0.01
    with pytest.warns(UserWarning, match=TOLD):
        export_adapter(run.optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_other_weights(dtype):
    """Pruned ones, say; one of ten elements is enough."""
    run = SmallSteps(dtype, **COMPENSATED).train(5)
    run.stored.W.data[torch.rand(run.stored.W.shape, generator=torch.Generator().manual_seed(0)) < 0.1] = 0.0
    with pytest.warns(UserWarning, match=TOLD):
        export_adapter(run.optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_never_of_merging_and_unmerging(dtype):
    """Which rounds a W twice, as other people's evaluations do, again and again."""
    run = SmallSteps(dtype, lr=2e-4, **COMPENSATED)
    for _ in range(60):
        run.train(1)
        for sign in (1, -1):
            run.stored.W.data += (sign * run.scaling * run.product()).to(dtype)
        export_adapter(run.optimizer)


def test_of_some_layers_among_others():
    """Layers of several shapes, ranks and dtypes, of which some were pruned: these alone are named."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape, dtype):
        return torch.nn.Parameter(torch.randn(*shape, generator=generator).to(dtype))

    triples = [
        LoRATriple(made(c, d, dtype=dtype).requires_grad_(False), made(c, r, dtype=F32), made(r, d, dtype=F32), 1.0, n)
        for n, (c, d, r, dtype) in zip("abcdefghij", LAYERS * 2, strict=True)
    ]
    inner = torch.optim.SGD([factor for triple in triples for factor in triple.stored], lr=1e-2)
    optimizer = DeltaLoRAOptimizer(inner, triples, update_ratio=0.5, rounding="compensated")
    for _ in range(3):
        for triple in triples:
            for factor in triple.stored:
                factor.grad = torch.randn(factor.shape, generator=generator)
        optimizer.step()
    export_adapter(optimizer)
    for triple in triples:
        if triple.label in "bdi":
            triple.W.data[::2] = 0.0
    with pytest.warns(UserWarning, match=r"W of 3 layers \(b, d, i\) was written by somebody else"):
        export_adapter(optimizer)


def test_not_where_rounding_hides_it():
    run = noisy_run(dtype=torch.bfloat16, factor_dtype=torch.float32).train(2)
    early = run.stored.W.clone()
    averaged(run.train(2), early)
    export_adapter(run.optimizer)


def test_where_rounding_hides_it_the_factors_may_tell():
    """W may have been averaged with A and B, or not: an export says what it counts."""
    run = noisy_run(dtype=torch.bfloat16, factor_dtype=torch.float32).train(3)
    run.stored.A.data.mul_(0.5)
    with pytest.warns(UserWarning, match=r"A and B of 1 layer \(q0?\).*rounding hides whether their 16-bit W"):
        export_adapter(run.optimizer)
    with pytest.warns(RuntimeWarning, match="in one rounded step"):
        run.optimizer.resync()
    export_adapter(run.optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("W", ["as it is", "zero", "large", "tiny", "with outliers", "saturated"])
def test_never_of_training(W, dtype):
    """Whatever W is, and whatever its steps were."""
    if W == "saturated" and dtype != torch.float16:
        return
    for lr, update_ratio in ((1e-5, 2.0), (0.3, schedules.linear(0.5, 3.0, steps=20, stages=7))):
        options = {"lr": lr, "update_ratio": update_ratio, "weight_decay": 0.3}
        run = noisy_run(dtype=dtype, factor_dtype=torch.float32, **COMPENSATED, **options)
        factor = {"zero": 0.0, "large": 1e3, "tiny": 1e-6, "saturated": 3e4}.get(W, 1.0)
        run.stored.W.data.mul_(factor)
        if W == "with outliers":
            run.stored.W.data[0] *= 1e3
        with torch.no_grad():
            for value in ("up", "down"):
                for factor in run.factors if W == "saturated" else ():
                    factor.mul_(30.0 if value == "up" else 1 / 30)
                run.optimizer.resync()
                with torch.enable_grad():
                    run.train(15)
                export_adapter(run.optimizer)
        state = copy.deepcopy(run.optimizer.state_dict())
        run.optimizer.load_state_dict(state)
        run.train(1)
        export_adapter(run.optimizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_never_of_a_cast(own, dtype):
    """Nor of one that was trained on since, or that stays."""
    if own == dtype:
        return
    run = noisy_run(dtype=own, factor_dtype=torch.float32, **COMPENSATED).train(3)
    run.stored.W.data = run.stored.W.data.to(dtype).to(own)
    exported = export_adapter(run.optimizer)
    assert close(exported["q"].product().double(), run.effective_exactly() - run.base(), 1e-2)
    run.train(5)
    export_adapter(run.optimizer)
    run.stored.W.data = run.stored.W.data.to(dtype)
    export_adapter(run.optimizer)
    run.train(5)
    export_adapter(run.optimizer)


def saved_record(state):
    """Return what a state holds of its only W."""
    record, inner = split_record(state)
    (found,) = split_ledgers(inner, record["schema"])[0].values()
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_resume_with_the_adapter_alone_says_so(dtype):
    """It rebuilds another W; with the whole model it continues, and an export says so there too."""
    run = noisy_run() if dtype == torch.float64 else SmallSteps(dtype, lr=2e-4, **COMPENSATED)
    early = run.train(2).stored.W.clone()
    run.twin(whole=False)  # nothing to say
    averaged(run.train(20), early, 0.7)
    with pytest.warns(RuntimeWarning, match=REBUILT):
        rebuilt = run.twin(whole=False)
    assert not torch.equal(rebuilt.stored.W, run.stored.W)
    rebuilt.train(1)
    export_adapter(rebuilt.optimizer)
    whole = run.twin()
    for _ in range(2):
        whole.train(2)
        with pytest.warns(UserWarning, match=TOLD):
            export_adapter(whole.optimizer)
        whole = whole.twin()
    with pytest.warns(RuntimeWarning, match=REBUILT):
        whole.twin(whole=False)


def test_a_damaged_note_of_it_is_refused(run):
    for shape, message in (([3, 5], "is invalid"), ([35, 2], "expected 2|positional")):
        record = saved_record(run.optimizer.state_dict())
        record["overwritten"]["shape"] = shape
        with pytest.raises((RuntimeError, TypeError), match=message):  # which `load_state_dict` names
            SavedLedger(record)


def test_W_minus_its_displacement_is_not_taken_for_the_base(run):
    """Refuse, unless the base is at hand; an average that is the base of what comes needs nothing."""
    before = run.stored.W.clone()
    for method in (None, "copy", "hooks"):
        visit = run.optimizer.base_weights(method=method)
        with pytest.raises(RuntimeError, match=r"was written by somebody else since.* is not the base: hand in"):
            visit.__enter__()
    with run.optimizer.base_weights(source={"W": run.W0}):
        assert torch.equal(run.stored.W, run.W0)
    assert torch.equal(run.stored.W, before)
    run.optimizer.rebase()
    run.train(2)
    with run.optimizer.base_weights():
        assert_close(run.stored.W, before, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_with_keep_base_the_base_is_right(dtype):
    run = noisy_run(dtype=dtype, factor_dtype=torch.float32, keep_base="cpu", **COMPENSATED).train(3)
    averaged(run, run.W0)
    with run.optimizer.base_weights():
        assert torch.equal(run.stored.W, run.W0)


def test_resync_with_a_state(run):
    """Say so where the W of the state and this one are not written by others alike."""
    first = noisy_run().train(2)
    early, state, factors = first.stored.W.clone(), copy.deepcopy(first.optimizer.state_dict()), first.tensors[1:]
    factors = [factor.clone() for factor in factors]

    def back(to):
        with torch.no_grad():
            for own, kept in zip(first.factors, to, strict=True):
                own.copy_(kept)

    first.train(3)
    back(factors)
    first.optimizer.resync(state)
    assert_close(first.stored.W, early, 1e-12)
    first.train(3)
    averaged(first, early)
    later = copy.deepcopy(first.optimizer.state_dict())
    there, later_factors = first.stored.W.clone(), [factor.clone() for factor in first.factors]
    first.train(2)
    back(later_factors)
    first.optimizer.resync(later)  # both were written alike
    assert_close(first.stored.W, there, 1e-12)
    back(factors)
    with pytest.raises(WeightMismatchError, match=OTHERWISE):
        first.optimizer.resync(state)


def test_a_step_says_nothing_of_factors_that_were_averaged_with_W():
    """W belongs to them: `resync` would move it once more."""
    run = noisy_run().train(2)
    early = [tensor.clone() for tensor in run.tensors]
    run.train(3)
    with torch.no_grad():
        for own, kept in zip((run.stored.W, *run.factors), early, strict=True):
            own.lerp_(kept, 0.5)
    run.train(1)


def test_what_is_saved_passes_through_files(run):
    state = through_a_file(run.optimizer.state_dict())
    saved = SavedLedger(saved_record(state))
    assert saved.overwritten is not None
    assert_close(saved.overwritten.base, run.W0.double().flatten(), 1e-12)


@pytest.mark.parametrize("with_state", [False, True])
def test_resync_refuses_a_w_that_was_loaded_with_its_factors(with_state):
    """W is in its place already, so that moving it would make another model."""
    run = noisy_run().train(2)
    model = [tensor.clone() for tensor in run.tensors]
    state = copy.deepcopy(run.optimizer.state_dict())
    run.train(2)
    with torch.no_grad():
        for tensor, kept in zip(run.tensors, model, strict=True):
            tensor.copy_(kept)
    with pytest.raises(ValueError, match=r"(?s)resync\(\).*q.* was written by.*load_state_dict\(\)"):
        run.optimizer.resync(*[state] * with_state)
    assert all(map(torch.equal, run.tensors, model))
    run.optimizer.load_state_dict(state)
    run.optimizer.resync()
    assert all(map(torch.equal, run.tensors, model))
