"""Ramps of update_ratio in stages: their values, and the account of a weight that follows one."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deltaopt
from deltaopt import DeltaLoRAOptimizer, schedules
from tests.support import internals, strategies
from tests.support.compare import assert_close
from tests.support.runs import noisy_run

MAKERS = {
    "linear": (schedules.linear, lambda x: x),
    "cosine": (schedules.cosine, lambda x: (1 - math.cos(math.pi * x)) / 2),
}
"""By name: the function, and its curve from (0, 0) to (1, 1)."""

each_maker = pytest.mark.parametrize("name", MAKERS)
ratios = st.integers(0, 100).map(lambda n: n / 10)
lengths = st.integers(1, 12).flatmap(lambda stages: st.tuples(st.integers(stages, 200), st.just(stages)))
begins = st.integers(0, 50)


@each_maker
@given(start=ratios, end=ratios, length=lengths, begin=begins)
def test_changes_as_often_as_it_has_stages(name, start, end, length, begin):
    """Run from start to end, both exactly, one way, and each time by one stage."""
    (steps, stages), (maker, curve) = length, MAKERS[name]
    ratio = maker(start, end, steps, stages, begin)
    values = [ratio(step) for step in range(begin + steps + 20)]
    assert set(values[: begin + 1]) == {start}
    assert set(values[begin + steps :]) == {end}
    assert values == sorted(values, reverse=end < start)
    distinct = sorted(set(values), reverse=end < start)
    assert len(distinct) == (stages + 1 if start != end else 1)
    if start != end:
        assert distinct == pytest.approx([start + (end - start) * curve(k / stages) for k in range(stages + 1)])


@each_maker
@given(start=ratios, end=ratios, length=lengths, begin=begins)
def test_each_step_has_the_nearest_stage_of_the_curve(name, start, end, length, begin):
    (steps, stages), (maker, curve) = length, MAKERS[name]
    ratio = maker(start, end, steps, stages, begin)
    for done in range(steps + 1):
        stage = math.floor(Fraction(done * stages, steps) + Fraction(1, 2))
        assert ratio(begin + done) == pytest.approx(start + (end - start) * curve(stage / stages))


@each_maker
@given(start=ratios, end=ratios, length=lengths)
def test_the_mean_over_the_ramp_is_that_of_the_curve(name, start, end, length):
    """Count the first and the last step by half, as the trapezoid rule does."""
    (steps, stages), (maker, _) = length, MAKERS[name]
    ratio = maker(start, end, steps, stages)
    mean = (sum(ratio(step) for step in range(1, steps)) + (ratio(0) + ratio(steps)) / 2) / steps
    assert abs(mean - (start + end) / 2) <= abs(end - start) / (2 * steps) + 1e-9


@each_maker
def test_is_compared_copied_pickled_and_printed(name):
    ratio = MAKERS[name][0](0, 2, steps=100, stages=4, begin=3)
    assert repr(ratio) == f"schedules.{name}(start=0.0, end=2.0, steps=100, stages=4, begin=3)"
    assert eval(repr(ratio)) == ratio
    for twin in (copy.copy(ratio), copy.deepcopy(ratio), pickle.loads(pickle.dumps(ratio))):
        assert twin == ratio
        assert [twin(t) for t in range(120)] == [ratio(t) for t in range(120)]
    with pytest.raises(AttributeError, match="cannot assign to field 'steps'"):
        ratio.steps = 7


def test_takes_numbers_of_numpy():
    ratio = schedules.linear(np.float32(0.5), np.float64(2), np.int64(30), np.int32(3), np.uint8(2))
    assert ratio == schedules.linear(0.5, 2.0, 30, 3, 2)
    assert {type(value) for value in (ratio.start, ratio.end)} == {float}
    assert {type(value) for value in (ratio.steps, ratio.stages, ratio.begin)} == {int}
    assert type(ratio(np.int64(17))) is float


REFUSED = {
    "no stages": ({"stages": 0}, ValueError, r"stages is at least 1 \(how often the ratio changes\), got 0"),
    "negative stages": ({"stages": -3}, ValueError, "stages is at least 1 .*, got -3"),
    "a bool": ({"stages": True}, TypeError, "stages is an int .*, got True"),
    "a float": ({"stages": 4.0}, TypeError, r"stages is an int .*, got 4\.0"),
    "more stages than steps": ({"steps": 9}, ValueError, "steps=9 is too short for stages=10: .* stages=9 at most"),
    "no steps": ({"steps": 0}, ValueError, "steps is at least 1 .*, got 0"),
    "steps in a text": ({"steps": "100"}, TypeError, "steps is an int .*, got '100'"),
    "a negative begin": ({"begin": -1}, ValueError, "begin is at least 0 .*, got -1"),
    "a begin that is a float": ({"begin": 1.5}, TypeError, r"begin is an int .*, got 1\.5"),
    "a negative start": ({"start": -0.5}, ValueError, r"start is a value of update_ratio, .*not negative, got -0\.5"),
    "an end that is not a number": ({"end": math.nan}, ValueError, "end is a value .*finite.*, got nan"),
    "an infinite end": ({"end": math.inf}, ValueError, "end is a value .*finite.*, got inf"),
    "a start that is a text": ({"start": "0"}, TypeError, "start is a number .*, got '0'"),
    "an end that is a bool": ({"end": True}, TypeError, "end is a number .*, got True"),
    "a start that is a tensor": ({"start": torch.tensor(1.0)}, TypeError, r"start is a number .*tensor\(1\.\)"),
}


@each_maker
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_makes_no_ramp(name, case):
    changes, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        MAKERS[name][0](**({"start": 0.0, "end": 2.0, "steps": 100} | changes))


def test_refuses_a_curve_that_is_not_there():
    with pytest.raises(ValueError, match="curve is one of linear, cosine, got 'square'"):
        schedules.Ramp("square", 0.0, 1.0, 10)


@each_maker
@given(start=ratios, end=ratios, stages=st.integers(1, 6), begin=st.integers(0, 5), seed=strategies.seeds)
def test_the_account_of_a_weight_stays_exact_and_small(name, start, end, stages, begin, seed):
    """Compare with a dense loop in float64; base and export give the effective weight."""
    ratio = MAKERS[name][0](start, end, 3 * stages, stages, begin)
    run = noisy_run(seed=seed, update_ratio=ratio)
    run.train(begin + 3 * stages + 3)
    assert len(internals.terms_of(run.optimizer)) <= stages + 1
    assert_close(run.base() + run.displacement(), run.base() + run.asked, 1e-12)
    change = deltaopt.export_adapter(run.optimizer)["q"]
    assert_close(run.base() + change.product(), run.effective_exactly(), 1e-12)


def test_an_optimizer_shows_its_schedule():
    W, A, B = torch.randn(4, 6), torch.zeros(4, 2, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=0.1, update_ratio=schedules.cosine(2, 0, 50))
    assert "update_ratio=schedules.cosine(start=2.0, end=0.0, steps=50, stages=10, begin=0)" in repr(optimizer)
