"""The statistics of the evidence, against published examples, integrals of the t density and simulations."""

import math
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from benchmarks.evidence.comparison import (
    Cell,
    corrected,
    detectable,
    detectable_effect,
    difference,
    equivalence,
    seeds_needed,
)
from benchmarks.evidence.measures import MEASURES, measure
from benchmarks.evidence.result import Result
from benchmarks.evidence.setting import Setting

SETTING = Setting("t", "m", "lora", "lora", lr=1e-3, seed=0, split="test", steps=10, batch_size=2, max_length=8)

# Student's data on sleep, and what R prints for t.test(..., paired = TRUE): t = -4.0621, df = 9, p-value = 0.002833,
# 95 percent confidence interval -2.4598858 -0.7001142, mean -1.58.
FIRST = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
SECOND = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def runs(values, row="lora", metric="accuracy", **changes):
    setting = replace(SETTING, row=row, **changes)
    return [
        Result(replace(setting, seed=seed), {metric: value, "loss": 1.0}, data="d") for seed, value in enumerate(values)
    ]


def cell(values, row="lora", **changes):
    return Cell.of(runs(values, row, **changes), len(values))


def t_tail(t, df):
    """Return P(T > t) of Student's t, by Simpson's rule with the substitution t = tan(u)."""
    constant = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    u = np.linspace(math.atan(t), math.pi / 2, 20001)[:-1]
    x = np.tan(u)
    height = np.append(constant * (1 + x**2 / df) ** (-(df + 1) / 2) * (1 + x**2), 0.0 if df > 1 else constant)
    step = (math.pi / 2 - math.atan(t)) / 20000
    return step / 3 * (height[0] + 4 * height[1:-1:2].sum() + 2 * height[2:-1:2].sum() + height[-1])


def test_a_paired_difference_is_that_of_the_published_example():
    found = difference(cell(FIRST, "delta"), cell(SECOND), "accuracy")
    assert (found.row, found.reference, found.what) == ("delta", "lora", "accuracy")
    assert found.mean == pytest.approx(-1.58)
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-7)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert found.spread == pytest.approx(1.58 / 4.0621 * math.sqrt(10), rel=1e-4)


def test_the_mean_and_its_standard_error():
    made = cell((0.1, 0.2, 0.6))
    assert made.mean("accuracy") == pytest.approx(0.3)
    assert made.standard_error("accuracy") == pytest.approx(math.sqrt(0.04 + 0.01 + 0.09) / math.sqrt(2 * 3))
    assert made.mean(lambda run: run.setting.seed) == 1
    assert (made.seeds, made.lr, made.row, made.task) == ((0, 1, 2), 1e-3, "lora", "t")


def test_runs_are_paired_by_seed_whatever_their_order():
    ours, theirs = runs(FIRST, "delta"), runs(SECOND)
    shuffled = [ours[i] for i in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    found = difference(Cell.of(shuffled, 10), Cell.of(theirs, 10), "accuracy")
    assert found == difference(Cell.of(ours, 10), Cell.of(theirs, 10), "accuracy")


def test_differences_that_do_not_vary_have_a_point_as_interval():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = difference(cell((0.1, 0.7), "delta"), cell((0.1, 0.7)), "accuracy")
        other = difference(cell((0.92, 0.72), "delta"), cell((0.91, 0.71)), "accuracy")  # equal but for binary dust
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert (other.mean, other.low, other.high, other.p) == (0.01, 0.01, 0.01, 0)


def test_holm_is_that_of_the_published_definition():
    first = difference(cell(FIRST, "delta"), cell(SECOND), "accuracy")
    family = [replace(first, p=p) for p in (0.04, 0.01, 0.02, 0.9)]
    assert [each.corrected for each in corrected(family)] == pytest.approx([0.08, 0.04, 0.06, 0.9])
    assert [each.p for each in corrected(family)] == [0.04, 0.01, 0.02, 0.9]
    assert corrected([]) == []
    assert corrected([first])[0].corrected == pytest.approx(first.p)


@pytest.mark.parametrize("margin", [1.0, 1.8, 2.5])
def test_equivalence_is_two_one_sided_tests(margin):
    found = equivalence(cell(FIRST, "delta"), cell(SECOND), "accuracy", margin)
    error = 1.58 / 4.062128
    sides = [t_tail((-1.58 + margin) / error, 9), t_tail((margin + 1.58) / error, 9)]
    assert found.p == pytest.approx(max(sides), rel=1e-4)
    assert found.shown == (max(sides) < 0.05) == (-margin < found.low and found.high < margin)
    # The interval's ends are where a one-sided test is at 5 %.
    assert t_tail((found.high + 1.58) / error, 9) == pytest.approx(0.05, rel=1e-4)
    assert found.low + found.high == pytest.approx(-3.16)


def test_equal_runs_are_equivalent_and_apart_ones_are_not():
    ours, theirs = cell((0.5, 0.6, 0.8), "delta"), cell((0.4, 0.5, 0.7))
    assert equivalence(theirs, theirs, "accuracy", 0.01).p == 0
    assert equivalence(ours, theirs, "accuracy", 0.01).p == 1
    assert equivalence(ours, theirs, "accuracy", 0.11).shown
    assert not equivalence(ours, theirs, "accuracy", 0.11).refuted
    assert equivalence(ours, theirs, "accuracy", 0.09).refuted
    assert equivalence(theirs, ours, "accuracy", 0.09).refuted
    with pytest.raises(ValueError, match="margin of accuracy must be above 0, got 0"):
        equivalence(ours, theirs, "accuracy", 0.0)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_a_difference_of_the_detectable_size_is_found_in_eight_of_ten_simulations(seeds):
    count = 20_000
    samples = np.random.default_rng(seeds).normal(detectable_effect(seeds), 1.0, (count, seeds))
    t = samples.mean(1) / (samples.std(1, ddof=1) / math.sqrt(seeds))
    critical = {3: 4.302653, 5: 2.776445, 10: 2.262157}[seeds]  # from printed tables
    assert np.mean(abs(t) > critical) == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / count))


def test_what_can_be_detected_scales_with_the_spread_and_shrinks_with_seeds():
    found = difference(cell((0.1, 0.2, 0.4, 0.1, 0.3), "delta"), cell((0.2, 0.2, 0.2, 0.2, 0.2)), "accuracy")
    assert detectable(found) == pytest.approx(1.682 * found.spread, rel=1e-3)
    assert detectable(found, 10) > 1.5 * detectable(found)
    assert seeds_needed(found, detectable(found)) == 5
    assert seeds_needed(found, detectable(found) * 0.99) == 6
    assert seeds_needed(found, detectable(found) / 100) is None
    assert seeds_needed(replace(found, values=(0.1, 0.1)), 0.2) == 2


def changed(place, **changes):
    found = runs((0.1, 0.2, 0.3))
    fields = {name: changes.pop(name) for name in ("data", "metrics", "diverged") if name in changes}
    found[place] = replace(found[place], setting=replace(found[place].setting, **changes), **fields)
    return found


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "a cell of 3 seeds has no runs"),
        (runs((0.1, 0.2)), r"the grid says 3 seeds, got 2: \[0, 1\]"),
        (runs((0.1, 0.2, 0.3, 0.4)), r"the grid says 3 seeds, got 4"),
        (changed(1, seed=0), r"a seed is there twice, of \[0, 0, 2\]"),
        (changed(1, data="other"), "seeds 0 and 1 were run on different data"),
        (changed(1, rank=2), "differ in more than the seed"),
        (changed(1, lr=2e-3), "differ in more than the seed"),
        (changed(1, row="delta"), "differ in more than the seed"),
        (changed(1, split="tuning"), "is no test run"),
    ],
    ids=["none", "fewer", "more", "twice", "data", "rank", "lr", "row", "tuning"],
)
def test_a_cell_of_other_runs_than_the_grids_is_refused(results, message):
    with pytest.raises(ValueError, match=message):
        Cell.of(results, 3)


def test_a_cell_with_a_diverged_run_has_no_mean():
    made = Cell.of(changed(1, diverged=True, metrics={}), 3)
    assert made.diverged == 1
    with pytest.raises(ValueError, match="t, lora: 1 of 3 runs diverged"):
        made.mean("accuracy")


def test_a_metric_that_a_run_lacks():
    made = Cell.of(changed(1, metrics={"loss": 1.0}), 3)
    assert made.metrics == ["loss"]
    with pytest.raises(ValueError, match="not every run has 'accuracy'"):
        made.mean("accuracy")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (cell((0.1, 0.2), "delta"), r"t: delta and lora have different seeds, \[0, 1\] and \[0, 1, 2\]"),
        (cell((0.1, 0.2, 0.3), "delta", steps=20), "they differ in steps"),
        (cell((0.1, 0.2, 0.3), "delta", task="u", model="n"), "they differ in task, model"),
        (
            Cell.of([replace(run, data="other") for run in runs((0.1, 0.2, 0.3), "delta")], 3),
            "were run on different data",
        ),
    ],
    ids=["seeds", "steps", "task", "data"],
)
def test_cells_that_are_no_pair_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        difference(other, cell((0.1, 0.2, 0.3)), "accuracy")


@pytest.mark.parametrize(
    "figure",
    [
        partial(Cell.standard_error, what="accuracy"),
        lambda one: difference(one, one, "accuracy"),
        lambda one: equivalence(one, one, "accuracy", 1.0),
    ],
    ids=["standard error", "difference", "equivalence"],
)
def test_one_seed_has_no_spread(figure):
    with pytest.raises(ValueError, match="one seed has no spread"):
        figure(cell((0.1,)))


def test_how_numbers_are_written():
    share, loss = MEASURES["accuracy"], MEASURES["loss"]
    assert (share.number(0.91234), share.signed(0.01), share.signed(-0.01)) == ("91.23", "+1.00", "-1.00")
    assert (loss.number(0.5), loss.signed(-1e-6), loss.signed(1e-6)) == ("0.500", "0.000", "0.000")
    assert (share.stored_margin, loss.stored_margin) == (0.01, 0.02)
    assert measure("a new one").title == "a new one"
    assert measure("BLEU_seen") == replace(MEASURES["BLEU"], title="BLEU, seen")
