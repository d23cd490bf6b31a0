"""Every moment of a run can be exported, merged, taken back to its base, saved, resumed and copied.

The suite takes every moment with both rules and some dtypes of W, each in one layout; `make nightly` takes all of them.
"""

import contextlib
import itertools
import os
import warnings
from typing import NamedTuple

import pytest
import torch

import deltaopt
from tests.support.compare import COPIES, close, same, through_a_file
from tests.support.runs import LayerRun
from tests.support.sixteen_bits import spacing
from tests.support.strategies import LAYOUTS, RULES

# An export of a 16-bit W says so of factors that somebody else has changed.
pytestmark = pytest.mark.filterwarnings("ignore:A and B of .* rounding hides whether")

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


class Moment(NamedTuple):
    """What has happened to a run, whose product starts at zero or not and which moves W from step K on."""

    events: str
    K: int = 0
    zero: bool = False


MOMENTS = {
    "before the first step": Moment(""),
    "before the first step, zero product": Moment("", zero=True),
    "after a first step at lr 0": Moment("still"),
    "after a first step at lr 0, zero product": Moment("still", zero=True),
    "after steps before K": Moment("step step", K=4),
    "before step K": Moment("step step", K=2),
    "after step K at lr 0": Moment("step step still", K=2),
    "after step K": Moment("step step step", K=2),
    "after step K of 0": Moment("step"),
    "after step K of 0, zero product": Moment("step", zero=True),
    "long after step K": Moment("step " * 6, K=2),
    "long after step K, zero product": Moment("step " * 6, zero=True),
    "skipped first step": Moment("skipped"),
    "skipped step before K": Moment("step skipped", K=3),
    "skipped step K": Moment("step skipped", K=1),
    "skipped step": Moment("step step skipped"),
    "a step after a skipped one": Moment("step step skipped step"),
    "restarted before the first step": Moment("restart"),
    "restarted before K": Moment("step restart", K=4),
    "restarted": Moment("step step restart"),
    "restarted twice": Moment("step restart restart"),
    "a step after a restart": Moment("step step restart step"),
    "a step at lr 0 after a restart": Moment("step step restart still"),
    "rebased before the first step": Moment("rebase"),
    "rebased before K": Moment("step rebase", K=4),
    "rebased": Moment("step step rebase"),
    "a step after a rebase": Moment("step step rebase step"),
    "rebased after a restart": Moment("step restart rebase"),
    "restarted after a rebase": Moment("step rebase restart step"),
    "changed from outside": Moment("step step outside"),
    "changed from outside before the first step": Moment("outside"),
    "a step after a change from outside": Moment("step step outside step"),
    "resynced": Moment("step step outside resync"),
    "resynced before the first step": Moment("outside resync"),
    "resynced before K": Moment("step outside resync", K=3),
    "a step after a resync": Moment("step step outside resync step"),
    "a new ratio": Moment("step step ratio"),
    "a step at a new ratio": Moment("step step ratio step"),
    "a step at lr 0 at a new ratio": Moment("step step ratio still"),
    "a ratio of 0": Moment("step step off"),
    "a step at a ratio of 0": Moment("step step off step"),
    "a ratio of 0 from the start": Moment("off step"),
    "a ratio up again": Moment("step step off step ratio"),
    "a step at a ratio up again": Moment("step step off step ratio step"),
    "a ratio up again, zero product": Moment("step step off step ratio step", zero=True),
    "restarted at a ratio of 0": Moment("step step off step restart"),
    "resynced at a ratio of 0": Moment("step step off step outside resync"),
    "all of it": Moment("step ratio step restart step outside resync rebase off step skipped ratio step", K=1),
}

KINDS = {
    "float64": (torch.float64, "auto"),
    "float32": (torch.float32, "auto"),
    "bfloat16": (torch.bfloat16, "stochastic"),
    "bfloat16 compensated": (torch.bfloat16, "compensated"),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def cases(count, offset=0):
    """Return the moments, rules, dtypes and layouts of a test: `count` of the dtypes for each moment and rule."""
    if os.environ.get("HYPOTHESIS_PROFILE") == "nightly":
        return [*itertools.product(MOMENTS, RULES, KINDS, LAYOUTS)]
    layouts = itertools.cycle(LAYOUTS)
    return [
        (name, rule, list(KINDS)[(i + j + offset + 2 * k) % 4], next(layouts))
        for i, name in enumerate(MOMENTS)
        for j, rule in enumerate(RULES)
        for k in range(count)
    ]


def each_case(*arguments):
    return pytest.mark.parametrize(("name", "rule", "kind", "layout"), cases(*arguments))


class Run(LayerRun):
    """A run that knows how often W was rounded; the gradients of a 16-bit one do not depend on its noise."""

    def __init__(self, name, rule, kind, layout):
        moment, (dtype, rounding) = MOMENTS[name], KINDS[kind]
        gradients, factors = ("noise", torch.float32) if dtype.itemsize == 2 else ("loss", dtype)
        super().__init__(
            rule,
            layout,
            dtype=dtype,
            factor_dtype=factors,
            gradients=gradients,
            zero=moment.zero,
            start_step=moment.K,
            rounding=rounding,
            update_ratio=1.5,
        )
        self.roundings, self.largest = 0, self.base().abs()
        for event in moment.events.split():
            W = self.stored.W.clone()
            self.happen(event)
            self.roundings += not torch.equal(self.stored.W, W)
            self.largest = self.largest.maximum(self.stored.matrix(self.stored.W).abs().double())

    @torch.no_grad()
    def happen(self, event):
        group = self.optimizer.groups[0]
        if event == "still":
            rate, self.optimizer.param_groups[0]["lr"] = self.optimizer.param_groups[0]["lr"], 0.0
            super().happen("step")
            self.optimizer.param_groups[0]["lr"] = rate
        elif event == "off":
            group.update_ratio = 0.0
        elif event == "resync":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"resync\(\) moved the 16-bit weights")
                self.optimizer.resync()
        elif event == "rebase":
            self.optimizer.rebase()
            self.W0, self.roundings = self.stored.W.clone(), 0
        else:
            super().happen(event)

    def rounded(self, roundings=None):
        """Return how far W may be from where it was asked to be, for each element."""
        dtype = self.stored.W.dtype
        if dtype in TOLERANCE:
            return torch.full((), TOLERANCE[dtype] * self.size(), dtype=torch.float64)
        W = self.stored.matrix(self.stored.W).double()
        largest = self.largest.maximum(W.abs())
        roundings = self.roundings if roundings is None else roundings
        if self.options["rounding"] == "compensated":
            return 0.501 * spacing(W, dtype) + 1e-5
        return roundings * 2 * spacing(largest, dtype) + 1e-5


@each_case(2)
def test_the_base_and_the_exported_adapter_are_the_effective_weight(name, rule, kind, layout):
    run = Run(name, rule, kind, layout)
    found = deltaopt.export_adapter(run.optimizer)["q"]
    assert found.error == 0.0
    assert_within(run.base() + found.product(), run.effective_exactly(), run.rounded())
    assert_within(run.displacement(), run.moved(), run.rounded())
    short = deltaopt.export_adapter(run.optimizer, rank=2)["q"]
    U, s, Vh = torch.linalg.svd(found.product().double(), full_matrices=False)
    best = U[..., :2] @ torch.diag_embed(s[..., :2]) @ Vh[..., :2, :]
    assert short.rank <= 2  # less where nothing has changed
    assert close(short.product().double(), best, 1e-4)
    assert short.error == pytest.approx(float(s[..., 2:].norm() / s.norm().clamp(min=1e-30)), abs=1e-5)


@each_case(2, 1)
def test_the_merged_weight_is_W_and_its_branch(name, rule, kind, layout):
    run = Run(name, rule, kind, layout)
    W = run.stored.W.clone()
    merged = deltaopt.merged_weights(run.optimizer)["q"]
    asked = run.base() + deltaopt.export_adapter(run.optimizer)["q"].product()
    last = 0.0 if W.dtype in TOLERANCE else spacing(run.stored.matrix(merged).double(), W.dtype)
    assert_within(run.stored.matrix(merged), run.effective_exactly(), run.rounded(1) + last)
    assert_within(run.stored.matrix(merged), asked, run.rounded() + last)
    assert (merged.dtype, merged.shape) == (W.dtype, W.shape)
    assert torch.equal(run.stored.W, W)


@each_case(2)
def test_the_base_comes_back(name, rule, kind, layout):
    run = Run(name, rule, kind, layout)
    before = [t.clone() for t in (*run.tensors, run.scale)]
    base = {"any name": run.W0}
    with run.optimizer.base_weights(source=base):
        assert torch.equal(run.stored.W, run.W0)
        assert float(run.scale) == run.scaling
    assert all(map(torch.equal, before, (*run.tensors, run.scale)))
    assert_within(run.optimizer.residual("q", base), torch.zeros(()), run.rounded())
    if kind == "bfloat16" and run.roundings:  # not to be computed: the optimizer has neither the base nor its module
        with pytest.raises(RuntimeError, match="hand in the pristine weights"), run.optimizer.base_weights():
            pass
        return
    bound = run.rounded() if kind in ("float64", "float32") else 0.0
    with run.optimizer.base_weights():
        assert_within(run.stored.matrix(run.stored.W), run.base(), bound)
    assert all(map(torch.equal, before, (*run.tensors, run.scale)))


@each_case(1)
def test_with_the_whole_model_a_run_resumes_bit_for_bit(name, rule, kind, layout):
    run = Run(name, rule, kind, layout)
    other = run.twin(**OTHERS)
    assert_same(other.twin(**OTHERS), run)
    assert_continues_alike(other, run)


@each_case(1, 1)
def test_from_the_base_and_the_adapter_a_run_resumes_to_rounding(name, rule, kind, layout):
    run = Run(name, rule, kind, layout)
    state = through_a_file(run.optimizer.state_dict())
    warns = contextlib.nullcontext()
    if kind == "bfloat16" and not torch.equal(run.stored.W, run.W0):
        warns = pytest.warns(RuntimeWarning, match=r"the 16-bit W of 1 layer \(q\) was rebuilt .*, rounded once")
    with warns:
        other = run.twin(whole=False, state=state, **OTHERS)
    other.roundings = 1
    for steps in (0, 2):
        for each in (run, other):
            each.train(steps)
        other.roundings += steps
        assert_within(other.displacement(), run.displacement(), run.rounded(0))
        asked = run.base() + deltaopt.export_adapter(run.optimizer)["q"].product()
        assert_within(other.effective_exactly(), asked, other.rounded())
        for factor, expected in zip(other.factors, run.factors, strict=True):
            assert_within(factor, expected, run.rounded(0).max())


@each_case(1, 2)
def test_a_copy_continues(name, rule, kind, layout):
    run = Run(name, rule, kind, layout)
    others = [make_copy(run) for make_copy in COPIES.values()]
    assert_same(others[0], run)
    assert_continues_alike(others[1], run)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_with_factors_that_are_nan_the_base_comes_back_and_the_run_resumes(rule, kind):
    """Save after the bad step, and put the factors back after the resume."""
    run = Run("long after step K", rule, kind, "linear")
    factors, moved = [factor.detach().clone() for factor in run.factors], run.stored.W.clone()
    run.optimizer.zero_grad()
    run._push(torch.full_like(factor, float("nan")) for factor in run.factors)
    if rule == "in_place":
        with pytest.warns(RuntimeWarning, match="a LoRA factor became NaN or infinite"):
            run.step()
    else:
        run.step()
    assert run.factors[0].isnan().any()
    assert torch.equal(run.stored.W, moved)
    with run.optimizer.base_weights(source={"any name": run.W0}):
        assert torch.equal(run.stored.W, run.W0)
    assert torch.equal(run.stored.W, moved)
    others = [run.twin(**OTHERS), *(make_copy(run) for make_copy in COPIES.values())]
    for each in (run, *others):
        for factor, value in zip(each.factors, factors, strict=True):
            factor.data.copy_(value)
        each.optimizer.state.clear()
        each.train(2)
    for other in others:
        assert_same(other, run)
    assert_within(run.displacement(), run.moved(), run.rounded(10))


OTHERS = {"update_ratio": 9.0, "start_step": 77, "lr": 3.0}
"""Settings that a resumed run takes from the state."""


def assert_within(actual, expected, bound):
    distance = (actual.double() - expected.double()).abs()
    assert bool((distance <= bound).all()), float((distance - bound).max())


def assert_same(other, run):
    assert same([*other.tensors, other.scale], [*run.tensors, run.scale])
    assert same(other.optimizer.state_dict(), run.optimizer.state_dict())
    assert same(deltaopt.export_adapter(other.optimizer), deltaopt.export_adapter(run.optimizer))


def assert_continues_alike(other, run):
    for steps in (0, 2):
        assert_same(other.train(steps), run.train(steps))
