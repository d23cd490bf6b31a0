"""What the sentences of the pages are about: single figures of the results, looked up by task and row."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.evidence.comparison import LEVEL, Cell, Difference, difference
from benchmarks.evidence.figures import best_by_loss, mean_rank, over_rates
from benchmarks.evidence.measures import measure
from benchmarks.evidence.result import Result
from benchmarks.evidence.rows import PLAIN_PAIRS, RATIO_SWEEP, RATIOS, ROWS
from benchmarks.evidence.standing import LORA, Evidence
from benchmarks.evidence.task_tables import differences, metrics_of

HEADS = "equal heads"
"""The comparison on docstrings in which all heads train alike."""

TEST_TEXTS = {"docstrings": 572, "sst2": 872}
"""How many test examples the classified tasks have."""

ENDING = "-head"
"""Of the names of rows with equal heads."""


class Facts:
    """The results of the full grid and the costs.

    Tasks have the names of `Evidence.pictured`; rows of equal heads are named without their ending.

    Args:
        evidence: the results.
        folder: with the files of the costs.
    """

    def __init__(self, evidence: Evidence, folder: Path) -> None:
        self.evidence, self.folder = evidence, folder

    def cells(self, task: str) -> dict[str, Cell]:
        """Return the complete cells of a task by the names of their rows."""
        found = self.evidence.cells(self.evidence.pictured[task])
        return {name.removesuffix(ENDING): cell for name, cell in found.items()}

    def apart(self, task: str, row: str, metric: str | None = None, reference: str = LORA) -> Difference:
        """Return the difference of a row to another one, in the task's metric if no other is named."""
        cells = self.cells(task)
        return difference(cells[row], cells[reference], metric or self.metric(task))

    def points(self, task: str, row: str) -> float:
        """Return the difference of a row to LoRA in the units of the tables."""
        return measure(self.metric(task)).factor * self.apart(task, row).mean

    def bounds(self, task: str, row: str) -> tuple[float, float]:
        """Return the 95 % interval of `points`."""
        apart, factor = self.apart(task, row), measure(self.metric(task)).factor
        return factor * apart.low, factor * apart.high

    def metric(self, task: str) -> str:
        """Return what a task is measured by."""
        return self.evidence.pictured[task].metric

    def shown(self, task: str, what: str | None = None) -> set[str]:
        """Return the rows whose difference to LoRA the tables show, corrected for the number of comparisons.

        Args:
            task: of the table.
            what: a metric. Default: the first one of the table.
        """
        cells, experiment = self.cells(task), self.evidence.pictured[task]
        tested, _ = metrics_of(experiment, cells.values())
        family = differences(cells, tested)
        return {
            each.row.removesuffix(ENDING)
            for each in family
            if each.what == (what or tested[0]) and each.corrected is not None and each.corrected < LEVEL
        }

    def rank(self, task: str, row: str) -> float:
        """Return how many times the effective rank of LoRA's change that of a row is."""
        cells = self.cells(task)
        return _mean(cells[row], mean_rank) / _mean(cells[LORA], mean_rank)

    def lr(self, task: str, row: str) -> float:
        """Return the tuned learning rate of a row."""
        return self.cells(task)[row].lr

    def held_out(self, task: str, row: str, lr: float) -> float:
        """Return the mean of the metric over the tuning runs of a row at one learning rate."""
        return over_rates(self._tuning(task, row), self.metric(task), self.evidence.pictured[task].tuning_seeds)[lr]

    def best_by_loss(self, task: str, row: str) -> float:
        """Return the learning rate that the held-out loss would choose."""
        return best_by_loss(self._tuning(task, row), self.evidence.pictured[task].tuning_seeds)

    def pair(self, number: int) -> tuple[Cell, Cell]:
        """Return one of `PLAIN_PAIRS`: Delta-LoRA and its control, where nothing interferes."""
        for experiment in self.evidence.compared.values():
            of = self.evidence.coinciding(experiment)
            if of:
                delta, alpha = (of[row.name] for row in PLAIN_PAIRS[number])
                return delta, alpha
        raise KeyError(f"no runs of {PLAIN_PAIRS[number][0].name}")

    def at_rate(self, row: str, lr: float) -> Cell:
        """Return a row of equal heads at another learning rate than its tuned one."""
        heads = self.evidence.heads
        cell = None if heads is None else self.evidence.at_rate(heads, ROWS[row + ENDING], lr)
        if cell is None:
            raise KeyError(f"no runs of {row}{ENDING} at {lr:g}")
        return cell

    def swept(self, ratio: float, start: float) -> Cell:
        """Return Delta-LoRA with equal heads at a lambda and a K, a share of the run."""
        sweep, row = self.evidence.of_rows(RATIO_SWEEP), RATIOS[ratio, start].name
        found = {} if sweep is None else self.evidence.cells(sweep)
        if row not in found:
            raise KeyError(f"no runs of {row}")
        return found[row]

    @cached_property
    def cost(self) -> Mapping[str, Any]:
        """The rows of the cost on a CPU."""
        found: Mapping[str, Any] = json.loads((self.folder / "cost_cpu.json").read_text("utf8"))["rows"]
        return found

    def _tuning(self, task: str, row: str) -> Sequence[Result]:
        found = self.evidence.standings(self.evidence.pictured[task])
        return next(each.tuning for each in found if each.row.name.removesuffix(ENDING) == row)


def largest_gap(pair: tuple[Cell, Cell]) -> float:
    """Return the largest difference of the training losses of two cells, over seeds and steps."""
    runs = zip(pair[0].results, pair[1].results, strict=True)
    return max(abs(a - b) for ours, theirs in runs for a, b in zip(ours.losses, theirs.losses, strict=True))


def largest_difference(pair: tuple[Cell, Cell], metric: str) -> float:
    """Return the largest difference of a metric of two cells within a seed."""
    return max(map(abs, difference(*pair, metric).values))


def sampling_error(facts: Facts, task: str) -> float:
    """Return the standard error of LoRA's accuracy, in points, that comes from the choice of the test texts."""
    share = facts.cells(task)[LORA].mean(facts.metric(task))
    return 100 * math.sqrt(share * (1 - share) / TEST_TEXTS[task])


def _mean(cell: Cell, of: Callable[[Result], float | None]) -> float:
    return statistics.fmean(value for run in cell.results if (value := of(run)) is not None)
