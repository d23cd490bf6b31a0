"""The base by itself while something is open: reports of a GPU, steps that were interrupted, closures."""

import copy
import gc
import itertools
import os
import warnings
from functools import partial

import pytest
import torch

from tests.support import internals
from tests.support.compare import assert_close
from tests.support.interruption import interrupt, interrupted_at
from tests.support.nightly import one_in
from tests.support.strategies import RULES, each_rule
from tests.support.switched import base_output, layer_and_input, optimizer_of, train

SAMPLED = 11 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 113
"""Every so many lines of an event one is interrupted."""


class Run:
    """A layer, a copy of it from before there was a triple, and its optimizer."""

    def __init__(self, kind="linear", steps=4, **options):
        self.layer, self.x = layer_and_input(kind)
        self.frozen = copy.deepcopy(self.layer)
        self.optimizer = optimizer_of(self.layer, **options)
        self.train(steps)

    def train(self, steps=1):
        train(self.layer, self.optimizer, self.x, steps)

    def backward(self):
        self.optimizer.zero_grad()
        loss = (self.layer(self.x) - 0.5).square().mean()
        loss.backward()
        return loss

    def assert_base(self):
        assert_close(base_output(self.layer, self.x), base_output(self.frozen, self.x), 1e-12)

    def has_moved(self):
        return bool((self.layer.weight - self.frozen.weight).abs().max() > 1e-2)


# The path of a GPU, on which the host learns later whether a step was applied.

REPORTS = {
    "at once": lambda: itertools.repeat(True),
    "never by themselves": lambda: itertools.repeat(False),
    "now and then": lambda: itertools.cycle([False, False, True]),
}


@pytest.mark.parametrize("reports", REPORTS)
@pytest.mark.parametrize("kind", ["linear", "embedding", "fused"])
def test_a_reference_pass_waits_for_the_reports(kind, reports):
    """After each step, and not only after the last one."""
    run = Run(kind, steps=0, weight_update=internals.as_on_a_gpu(reports=REPORTS[reports]()))
    for _ in range(4):
        run.train()
        run.assert_base()
    assert run.has_moved()
    run.train(3)
    assert internals.pending_updates(run.optimizer) or reports == "at once"
    run.assert_base()
    assert not internals.pending_updates(run.optimizer)


def test_a_step_that_the_device_has_skipped_is_no_movement():
    run = Run(weight_update=internals.as_on_a_gpu(reports=itertools.repeat(False)))
    kept = copy.deepcopy(run.layer.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a LoRA factor became NaN")
        run.backward()
        run.layer.branches["q"].A.grad.fill_(float("nan"))
        run.optimizer.step()
        assert run.layer.branches["q"].A.isnan().any()
        run.assert_base()  # the branch that is NaN is off
        assert torch.equal(run.layer.weight, kept["weight"])
        run.layer.load_state_dict(kept)
        run.optimizer.state.clear()
        run.train(2)
    run.assert_base()
    assert run.optimizer.skipped_updates >= 1
    assert not torch.equal(run.layer.weight, kept["weight"])


@pytest.mark.parametrize("keep", [None, "cpu"])
def test_the_folded_rule_on_a_gpu_too(keep):
    run = Run(weight_update=internals.folded_as_on_a_gpu(), keep_base=keep)
    run.assert_base()
    run.optimizer.groups[0].update_ratio = 0.5
    run.train()
    run.assert_base()
    assert run.has_moved()


# Events that were interrupted.


def interrupted(make, happen, error=KeyboardInterrupt):
    """Yield runs in which `happen` was interrupted, at lines all over it."""
    run = make()
    with interrupted_at(happen, None) as whole:
        happen(run)
    assert whole.lines > SAMPLED
    for number, line in enumerate(range(1 + whole.lines % 7, whole.lines, SAMPLED)):
        if number % 10 == 0:
            gc.collect()  # else claims ask after all optimizers of earlier runs
        run = make()
        if interrupt(partial(happen, run), happen, line, error):
            yield run


def step(run):
    run.optimizer.step()


def restart(run):
    run.optimizer.restart()


def resync(run):
    run.optimizer.resync()


def base_weights(run):
    with run.optimizer.base_weights():
        pass


def rebase(run):
    run.optimizer.rebase()


@pytest.mark.parametrize(
    ("rule", "moment", "error"), one_in(2, [*RULES, "gpu"], [1, 3], [KeyboardInterrupt, MemoryError])
)
def test_after_an_exception_in_a_step_the_base_is_right_at_once(rule, moment, error):
    """At any line: what the step has done to W until then is left out, before anything else completes it."""

    def make():
        weight_update = internals.as_on_a_gpu(reports=itertools.repeat(False)) if rule == "gpu" else rule
        run = Run("fused", steps=moment, weight_update=weight_update, update_ratio=lambda t: 1.0 + t)
        run.backward()
        return run

    moved = set()
    for run in interrupted(make, step, error):
        moved.add(run.has_moved())
        run.assert_base()
        run.train()
        run.assert_base()
    assert True in moved
    assert moment == 3 or False in moved


@pytest.mark.parametrize("event", [restart, resync, base_weights])
@each_rule
def test_after_an_exception_in_another_event_too(event, rule):
    def make():
        run = Run("fused", steps=3, weight_update=rule)
        if event is resync:
            with torch.no_grad():
                run.layer.branches["k"].A.add_(0.125)
        return run

    for run in interrupted(make, event):
        run.assert_base()


@each_rule
def test_after_an_exception_in_rebase_the_base_is_the_old_one_or_the_new_one(rule):
    """For all parts of W: the pass completes what was begun, part by part."""
    for run in interrupted(lambda: Run("fused", steps=3, weight_update=rule), rebase):
        moved = run.layer.weight.detach().clone()
        found = base_output(run.layer, run.x)
        with torch.no_grad():
            old = base_output(run.frozen, run.x)
            new = old + run.frozen.computed(moved - run.frozen.weight, None, run.x)
        assert (old - new).abs().max() > 1e-2
        assert any(torch.allclose(found, each, rtol=0, atol=1e-12) for each in (old, new))
        run.optimizer.state_dict()  # completes it
        found = base_output(run.layer, run.x)
        assert any(torch.allclose(found, each, rtol=0, atol=1e-12) for each in (old, new))


# A reference pass within the closure of a step.


@pytest.mark.parametrize("keep", [None, "cpu"])
@pytest.mark.parametrize("inner", ["SGD", "LBFGS"])
@pytest.mark.parametrize("rule", [*RULES, "gpu"])
def test_a_closure_may_evaluate_the_base(rule, inner, keep):
    """As DPO with an optimizer that evaluates the loss several times within a step."""
    if (rule, inner) == ("folded", "LBFGS"):
        pytest.skip("ends when the folded rule takes an optimizer that evaluates the loss several times within a step")
    weight_update = internals.as_on_a_gpu(reports=itertools.repeat(False)) if rule == "gpu" else rule
    options = {"lr": 0.5, "max_iter": 3} if inner == "LBFGS" else {"lr": 0.1}
    run = Run("linear", 0, inner=getattr(torch.optim, inner), weight_update=weight_update, keep_base=keep, **options)
    expected, passes = base_output(run.frozen, run.x), 0

    def closure():
        nonlocal passes
        found = base_output(run.layer, run.x)
        assert_close(found, expected, 1e-12)
        passes += 1
        run.optimizer.zero_grad()
        loss = (run.layer(run.x) - found - 0.5).square().mean()
        loss.backward()
        return loss

    for _ in range(4):
        run.optimizer.step(closure)
    assert passes >= (8 if inner == "LBFGS" else 4)
    assert run.has_moved()
    run.assert_base()


def test_a_closure_that_fails_leaves_the_base_right():
    run = Run()

    def closure():
        base_output(run.layer, run.x)
        raise ZeroDivisionError("in the loss")

    with pytest.raises(ZeroDivisionError, match="in the loss"):
        run.optimizer.step(closure)
    run.assert_base()
    run.train()
    run.assert_base()
