"""What the sentences of the pages are about: single figures of the results, looked up by task and row."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.evidence.comparison import Cell, Difference, Equivalence, difference
from benchmarks.evidence.control import tuned_equivalences
from benchmarks.evidence.figures import best_by_loss, mean_rank, over_rates
from benchmarks.evidence.grid import Experiment
from benchmarks.evidence.measures import measure
from benchmarks.evidence.repetition import Twice, made_twice
from benchmarks.evidence.result import Result
from benchmarks.evidence.rows import PLAIN_PAIRS, RATIOS, ROWS
from benchmarks.evidence.standing import DELTA, LORA, Evidence
from benchmarks.evidence.sweeps import beyond_the_control, swept_ranks, swept_ratios
from benchmarks.evidence.task_tables import corrected_differences, forgetting_differences

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

    @cached_property
    def again(self) -> Facts:
        """The same of the runs that were made on another machine as well.

        Raises:
            KeyError: if none was.
        """
        if self.evidence.again is None:
            raise KeyError("no runs were made a second time")
        return Facts(self.evidence.again, self.folder)

    def cells(self, task: str) -> dict[str, Cell]:
        """Return the complete cells of a task by the names of their rows."""
        found = self.evidence.cells(self.evidence.pictured[task])
        return {name.removesuffix(ENDING): cell for name, cell in found.items()}

    def has(self, task: str) -> bool:
        """Return whether LoRA and Delta-LoRA were measured on a task."""
        return {LORA, DELTA} <= self.cells(task).keys()

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
        family = corrected_differences(self.evidence, self.evidence.pictured[task])
        return {
            each.row.removesuffix(ENDING) for each in family if each.what == (what or family[0].what) and each.shown
        }

    def rank(self, task: str, row: str) -> float:
        """Return how many times the effective rank of LoRA's change that of a row is."""
        cells = self.cells(task)
        return _mean(cells[row], mean_rank) / _mean(cells[LORA], mean_rank)

    def trained(self, task: str, row: str) -> float:
        """Return how many times the parameters that LoRA trains a row does."""
        cells = self.cells(task)
        return cells[row].results[0].trained / cells[LORA].results[0].trained

    def shown_to_forget_otherwise(self) -> set[tuple[str, str]]:
        """Return the tasks and rows of which a table shows that they forget more or less than LoRA."""
        tasks = self.evidence.compared.items()
        return {
            (name, apart.row)
            for name, task in tasks
            for apart in forgetting_differences(self.evidence, task)
            if apart.shown
        }

    def lr(self, task: str, row: str) -> float:
        """Return the tuned learning rate of a row."""
        return self.cells(task)[row].lr

    def held_out(self, task: str, row: str, lr: float) -> float:
        """Return the mean of the metric over the tuning runs of a row at one learning rate."""
        return over_rates(self._tuning(task, row), self.metric(task), self.evidence.pictured[task].tuning_seeds)[lr]

    def held_out_of(self, row: str, what: str) -> dict[float, float]:
        """Return the mean of a metric over the tuning runs of a row of docstrings, by its full name, at each rate."""
        experiment, tuning = self._tuning_of(row)
        return over_rates(tuning, what, experiment.tuning_seeds)

    def held_out_by_seed(self, row: str, what: str, lr: float) -> dict[int, float]:
        """Return a metric of the tuning runs of a row of docstrings, by its full name, at one rate, by their seeds."""
        tuning = self._tuning_of(row)[1]
        return {run.setting.seed: run.metrics[what] for run in tuning if run.setting.lr == lr}

    def lr_by_loss(self, row: str) -> float:
        """Return the learning rate that the held-out loss would choose for a row of docstrings, by its full name."""
        experiment, tuning = self._tuning_of(row)
        return best_by_loss(tuning, experiment.tuning_seeds)

    def pair(self, number: int) -> tuple[Cell, Cell]:
        """Return one of `PLAIN_PAIRS`: Delta-LoRA and its control, where nothing interferes."""
        for experiment in self.evidence.compared.values():
            of = self.evidence.coinciding(experiment)
            if of:
                delta, alpha = (of[row.name] for row in PLAIN_PAIRS[number])
                return delta, alpha
        raise KeyError(f"no runs of {PLAIN_PAIRS[number][0].name}")

    def at_rate(self, row: str, lr: float) -> Cell:
        """Return a row of docstrings, by its full name, at another learning rate than its tuned one."""
        heads = self.evidence.heads
        cell = None if heads is None else self.evidence.at_rate(heads, ROWS[row], lr)
        if cell is None:
            raise KeyError(f"no runs of {row} at {lr:g}")
        return cell

    def swept(self, ratio: float, start: float) -> Cell:
        """Return Delta-LoRA with equal heads at a lambda and a K, a share of the run."""
        found, row = self._ratios[0], RATIOS[ratio, start].name
        if row not in found:
            raise KeyError(f"no runs of {row}")
        return found[row]

    def shown_of_ratios(self) -> set[tuple[float, float]]:
        """Return the lambda and K at which the table shows that Delta-LoRA differs from LoRA."""
        shown = {each.row for each in self._ratios[1] if each.shown}
        return {of for of, row in RATIOS.items() if row.name in shown}

    def of_rank(self, rank: int, row: str) -> Cell:
        """Return LoRA, Delta-LoRA or the control with equal heads at a rank."""
        return self._ranks[0][rank][row]

    def apart_at_rank(self, rank: int, row: str, reference: str = LORA) -> Difference:
        """Return the difference of one of them to another one of the same rank, in the accuracy."""
        return difference(self.of_rank(rank, row), self.of_rank(rank, reference), self.metric(HEADS))

    def shown_to_differ_from_control(self) -> set[int]:
        """Return the ranks at which the table shows that Delta-LoRA differs from LoRA with the larger alpha."""
        return {rank for rank, each in beyond_the_control(self.evidence).items() if each.shown}

    def shown_of_ranks(self) -> set[tuple[int, str]]:
        """Return the ranks and rows of which the table shows that they differ from LoRA."""
        return {of for of, each in self._ranks[1].items() if each.shown}

    @cached_property
    def of_the_control(self) -> list[Equivalence]:
        """The tests that Delta-LoRA and the larger alpha are the same, with a learning rate tuned for each."""
        return tuned_equivalences(self.evidence)

    @property
    def twice(self) -> Mapping[str, Twice]:
        """The rows that were tuned and run twice."""
        return made_twice(self.evidence)

    @cached_property
    def cost(self) -> Mapping[str, Any]:
        """The rows of the cost on a CPU."""
        found: Mapping[str, Any] = json.loads((self.folder / "cost_cpu.json").read_text("utf8"))["rows"]
        return found

    @cached_property
    def _ratios(self) -> tuple[dict[str, Cell], list[Difference]]:
        return swept_ratios(self.evidence)

    @cached_property
    def _ranks(self) -> tuple[dict[int, dict[str, Cell]], dict[tuple[int, str], Difference]]:
        return swept_ranks(self.evidence)

    def _tuning_of(self, row: str) -> tuple[Experiment, Sequence[Result]]:
        for experiment in self.evidence.grid.experiments:
            if row in experiment.rows and experiment.task == "docstrings":
                return experiment, next(e.tuning for e in self.evidence.standings(experiment) if e.row.name == row)
        raise KeyError(f"docstrings has no row {row}")

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
