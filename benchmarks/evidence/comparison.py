"""The statistics: cells of runs over seeds, paired differences, equivalence, and what so few seeds can show.

Runs of one seed share the fresh head, the order of the examples and the draw of the factors, so rows are compared
within seeds. All tests are t-tests of these differences, two-sided at 5 % unless said otherwise; the distributions are
those of scipy and statsmodels.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from benchmarks.evidence.result import Result

LEVEL = 0.05
POWER = 0.8

DECIMALS = 9
"""Differences are rounded to so many decimals. Files hold 7 digits, so only what binary numbers add is lost."""

SHARED = ("task", "model", "split", "steps", "batch_size", "max_length", "train_examples", "test_examples")
"""What the settings of two cells must have in common to be compared."""

Value = Callable[[Result], float]


@dataclass(frozen=True)
class Cell:
    """The runs of one row on one task at one learning rate, in the order of their seeds. `Cell.of` checks them."""

    results: tuple[Result, ...]

    @classmethod
    def of(cls, results: Sequence[Result], seeds: int) -> Cell:
        """Return the cell of these runs.

        Args:
            results: the test runs, one a seed.
            seeds: number of runs that the grid promises.

        Raises:
            ValueError: if there are fewer or more, if a seed is there twice, or if runs differ in their settings apart
                from the seed, or in their data.
        """
        runs = sorted(results, key=lambda result: result.setting.seed)
        if not runs:
            raise ValueError(f"a cell of {seeds} seeds has no runs")
        first = runs[0].setting
        name = f"{first.task}, {first.row}"
        for run in runs:
            if run.setting.split != "test":
                raise ValueError(f"{name}: {run.setting.path} is no test run")
            if replace(run.setting, seed=first.seed) != first:
                raise ValueError(f"{name}: {run.setting.path} and {first.path} differ in more than the seed")
            if run.data != runs[0].data:
                raise ValueError(f"{name}: seeds {first.seed} and {run.setting.seed} were run on different data")
        found = [run.setting.seed for run in runs]
        if len(set(found)) < len(found):
            raise ValueError(f"{name}: a seed is there twice, of {found}")
        if len(found) != seeds:
            raise ValueError(f"{name}: the grid says {seeds} seeds, got {len(found)}: {found}")
        return cls(tuple(runs))

    @property
    def task(self) -> str:
        return self.results[0].setting.task

    @property
    def row(self) -> str:
        return self.results[0].setting.row

    @property
    def lr(self) -> float:
        return self.results[0].setting.lr

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.setting.seed for run in self.results)

    @property
    def diverged(self) -> int:
        """How many of the runs diverged. A cell with such runs has no mean."""
        return sum(run.diverged for run in self.results)

    @property
    def metrics(self) -> list[str]:
        """The metrics that all runs have."""
        return [name for name in self.results[0].metrics if all(name in run.metrics for run in self.results)]

    def values(self, what: str | Value) -> NDArray[np.float64]:
        """Return a figure of each run: a metric, or what a function makes of the result.

        Raises:
            ValueError: if a run diverged, or lacks the metric.
        """
        if self.diverged:
            raise ValueError(f"{self.task}, {self.row}: {self.diverged} of {len(self.results)} runs diverged")
        if isinstance(what, str):
            if what not in self.metrics:
                raise ValueError(f"{self.task}, {self.row}: not every run has {what!r}")
            return np.array([run.metrics[what] for run in self.results])
        return np.array([what(run) for run in self.results])

    def mean(self, what: str | Value) -> float:
        return float(self.values(what).mean())

    def standard_error(self, what: str | Value) -> float:
        """Return the standard error of the mean over seeds.

        Raises:
            ValueError: for a single seed, and as `values`.
        """
        return float(stats.sem(_several(self.values(what), f"{self.task}, {self.row}")))


@dataclass(frozen=True)
class Difference:
    """Of one row to another, on one figure.

    Attributes:
        row, reference: names.
        what: the metric.
        values: one for each seed.
        mean: over them.
        low, high: the 95 % interval of the mean.
        p: that there is no difference, by a paired t-test.
        corrected: p for the family of all comparisons of a table, by Holm; None before `corrected` was called.
    """

    row: str
    reference: str
    what: str
    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    p: float
    corrected: float | None = None

    @property
    def spread(self) -> float:
        """The standard deviation over seeds."""
        return statistics.stdev(self.values)

    @property
    def shown(self) -> bool:
        """Whether the corrected p is below 5 %; not before it was corrected."""
        return self.corrected is not None and self.corrected < LEVEL


def difference(cell: Cell, reference: Cell, what: str | Value, name: str | None = None) -> Difference:
    """Return the difference of a cell to another one, paired by seed.

    Args:
        cell: of a row.
        reference: what it is compared with.
        what: a metric, or a function of a result.
        name: of the figure. Default: the metric.

    Raises:
        ValueError: if the cells are of different seeds, data or tasks, or of a single seed; as `Cell.values`.
    """
    found = _differences(cell, reference, what)
    mean = float(found.mean())
    name = name or (what if isinstance(what, str) else "")
    told = (cell.row, reference.row, name, tuple(map(float, found)), mean)
    if np.ptp(found) == 0:
        return Difference(*told, low=mean, high=mean, p=float(mean == 0))
    test = stats.ttest_1samp(found, 0.0)
    interval = test.confidence_interval(1 - LEVEL)
    return Difference(*told, low=float(interval.low), high=float(interval.high), p=float(test.pvalue))


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences of a table with p-values that hold for all of them together (Holm)."""
    if not differences:
        return []
    values = multipletests([each.p for each in differences], alpha=LEVEL, method="holm")[1]
    return [replace(each, corrected=float(p)) for each, p in zip(differences, values, strict=True)]


@dataclass(frozen=True)
class Equivalence:
    """Of two rows, on one figure.

    Attributes:
        difference: of the two.
        margin: the largest difference that counts as none, fixed before the runs.
        low, high: the 90 % interval; it lies within the margin exactly where p is below 5 %.
        p: that the difference is at least as large as the margin: the larger p of two one-sided paired t-tests.
    """

    difference: Difference
    margin: float
    low: float
    high: float
    p: float

    @property
    def shown(self) -> bool:
        return self.p < LEVEL

    @property
    def refuted(self) -> bool:
        """Whether a difference larger than the margin was shown, each side at 5 %."""
        return self.low > self.margin or self.high < -self.margin


def equivalence(cell: Cell, control: Cell, what: str, margin: float) -> Equivalence:
    """Test if two cells are the same up to a margin.

    Raises:
        ValueError: for a margin that is not above 0; as `difference`.
    """
    if not margin > 0:
        raise ValueError(f"the margin of {what} must be above 0, got {margin:g}")
    apart = difference(cell, control, what)
    if apart.low == apart.high:
        return Equivalence(apart, margin, apart.mean, apart.mean, float(abs(apart.mean) >= margin))
    described = DescrStatsW(np.array(apart.values))
    p, _, _ = described.ttost_mean(-margin, margin)
    low, high = described.tconfint_mean(2 * LEVEL)
    return Equivalence(apart, margin, float(low), float(high), float(p))


@cache
def detectable_effect(seeds: int, level: float = LEVEL, power: float = POWER) -> float:
    """Return the smallest true difference that a paired t-test finds with this power, in standard deviations of it."""
    return float(TTestPower().solve_power(nobs=seeds, alpha=level, power=power))


def detectable(apart: Difference, comparisons: int = 1) -> float:
    """Return the smallest true difference that would be found with 80 % power, from the spread of the seeds.

    Args:
        apart: the difference whose spread is taken.
        comparisons: of the table; Holm's first test is at 5 % divided by their number.
    """
    return detectable_effect(len(apart.values), LEVEL / comparisons) * apart.spread


def seeds_needed(apart: Difference, size: float, most: int = 1000) -> int | None:
    """Return the seeds with which a true difference of a size is found with 80 % power; None if more than `most`."""
    if apart.spread == 0:
        return 2
    test, effect, counts = TTestPower(), size / apart.spread, range(2, most + 1)
    place = bisect_left(counts, POWER, key=lambda count: float(test.power(effect, count, LEVEL)))
    return counts[place] if place < len(counts) else None


def _differences(cell: Cell, reference: Cell, what: str | Value) -> NDArray[np.float64]:
    names = f"{cell.task}: {cell.row} and {reference.row}"
    if cell.seeds != reference.seeds:
        raise ValueError(f"{names} have different seeds, {list(cell.seeds)} and {list(reference.seeds)}")
    ours, theirs = cell.results[0], reference.results[0]
    if unequal := [field for field in SHARED if getattr(ours.setting, field) != getattr(theirs.setting, field)]:
        raise ValueError(f"{names} cannot be compared: they differ in {', '.join(unequal)}")
    if ours.data != theirs.data:
        raise ValueError(f"{names} were run on different data")
    return _several(np.round(cell.values(what) - reference.values(what), DECIMALS), names)


def _several(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    if len(values) < 2:
        raise ValueError(f"{name}: one seed has no spread, expected at least two")
    return values
