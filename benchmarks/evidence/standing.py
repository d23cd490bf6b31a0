"""What the result files say so far of a grid: of each row of an experiment its tuning, its cell, or why it has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.evidence.comparison import Cell
from benchmarks.evidence.grid import Experiment, Grid
from benchmarks.evidence.grids import FULL
from benchmarks.evidence.result import Result, read_results
from benchmarks.evidence.rows import COINCIDENCE, HEAD_SWEEP, ROWS, Row

LORA, DELTA, ALPHA = "lora", "delta", "alpha"
"""The rows that questions are about: the reference, the method, and the control with the larger alpha."""

E2E_SMOLLM2 = "e2e, SmolLM2"
"""The comparison whose texts are sentences, by its name in `Evidence.compared`."""

REPEATED = "-again"
"""Ends the name of the folder with runs of a grid that were tuned and made on another machine as well."""


@dataclass(frozen=True)
class Standing:
    """One row of one experiment.

    Attributes:
        row: of `rows.ROWS`.
        lr: the learning rate of its reported runs; None while its tuning is not complete.
        tried: the learning rates that were tried, in order; empty where it takes another row's.
        tuning: its tuning runs.
        cell: all of its reported runs; None while one is missing.
        missing: why there is no cell, for a sentence; empty if there is one.
    """

    row: Row
    lr: float | None
    tried: tuple[float, ...]
    tuning: tuple[Result, ...]
    cell: Cell | None
    missing: str

    @property
    def at_edge(self) -> bool:
        """Whether a better learning rate may lie outside those that were tried."""
        return len(self.tried) > 1 and self.lr in (self.tried[0], self.tried[-1])


class Evidence:
    """The results of a grid, and the blocks that are made of them.

    Args:
        results: of all runs.
        grid: that they are of. Default: the one of docs/evidence.md.
        repeated: the results of runs that were made on another machine as well, with a tuning of their own.
    """

    def __init__(self, results: Sequence[Result], grid: Grid = FULL, repeated: Sequence[Result] = ()) -> None:
        self.results, self.grid = results, grid
        self.again = Evidence(repeated, grid) if repeated else None
        self._standings: dict[int, list[Standing]] = {}

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        """Return the results of docs/evidence.md.

        Args:
            folder: that holds a folder of results for each grid; it need not exist.
        """
        return cls(read_results(folder / FULL.name), repeated=read_results(folder / f"{FULL.name}{REPEATED}"))

    @cached_property
    def compared(self) -> dict[str, Experiment]:
        """The experiments that compare rows with LoRA, without sweeps and single looks, by name.

        The name is the task's; a second experiment on a task has its model's too.
        """
        found: dict[str, Experiment] = {}
        for each in self.grid.experiments:
            if LORA in each.rows and len(each.rows) > 1:
                name = f"{each.task}, {short_name(each.model)}" if each.task in found else each.task
                if name in found:
                    raise ValueError(f"two comparisons of {self.grid.name} are called {name!r}")
                found[name] = each
        return found

    @cached_property
    def pictured(self) -> dict[str, Experiment]:
        """The experiments whose tuning is worth a picture, by name: those that compare, and the one of equal heads."""
        return self.compared | ({"equal heads": self.heads} if self.heads is not None else {})

    @property
    def heads(self) -> Experiment | None:
        """The experiment whose rows have equal heads."""
        return next((each for each in self.grid.experiments if HEAD_SWEEP[0].name in each.rows), None)

    def trio(self, experiment: Experiment) -> dict[str, Cell]:
        """Return LoRA, Delta-LoRA and the control with the larger alpha, as far as there are several seeds of them."""
        names = [row.name for row in HEAD_SWEEP[:3]] if experiment is self.heads else [LORA, DELTA, ALPHA]
        of = self.cells(experiment) if experiment.seeds > 1 else {}
        return {method: of[name] for method, name in zip((LORA, DELTA, ALPHA), names, strict=True) if name in of}

    @property
    def looks(self) -> list[Experiment]:
        """The experiments with LoRA alone."""
        return [each for each in self.grid.experiments if list(each.rows) == [LORA]]

    def standings(self, experiment: Experiment) -> list[Standing]:
        """Return where its rows stand, without those that are no rows of a table."""
        return [each for each in self._all_standings(experiment) if each.row not in COINCIDENCE]

    def cells(self, experiment: Experiment) -> dict[str, Cell]:
        """Return the complete cells in which no run diverged, by the names of their rows."""
        return _sound(self.standings(experiment))

    def tuning(self, cell: Cell) -> tuple[Result, ...]:
        """Return the tuning runs by which the learning rate of a cell was chosen."""
        every = (each for experiment in self.grid.experiments for each in self._all_standings(experiment))
        return next(each.tuning for each in every if each.cell is cell)

    def coinciding(self, experiment: Experiment) -> dict[str, Cell]:
        """Return the cells of the runs that should coincide."""
        return _sound(each for each in self._all_standings(experiment) if each.row in COINCIDENCE)

    def at_rate(self, experiment: Experiment, row: Row, lr: float) -> Cell | None:
        """Return the cell of a row at another learning rate than its tuned one, if it was run there."""
        asked = experiment.at_rate(row, lr)
        runs = [each for each in self.results if each.setting in asked]
        if len(runs) < len(asked) or any(run.diverged for run in runs):
            return None
        return Cell.of(runs, experiment.seeds)

    def _all_standings(self, experiment: Experiment) -> list[Standing]:
        if id(experiment) not in self._standings:
            self._standings[id(experiment)] = standings(experiment, self.results)
        return self._standings[id(experiment)]

    def of_rows(self, rows: Iterable[Row]) -> Experiment | None:
        """Return the experiment of a sweep."""
        names = [row.name for row in rows]
        return next((each for each in self.grid.experiments if list(each.rows) == names), None)


def short_name(model: str) -> str:
    """Return what a model is called, without its owner, size and kind."""
    return model.rpartition("/")[2].partition("-")[0]


def standings(experiment: Experiment, results: Sequence[Result]) -> list[Standing]:
    """Return where each row of an experiment stands.

    Raises:
        ValueError: if two results are of one setting, or the runs of a row do not make up a cell.
    """
    at_hand = (experiment.task, experiment.model)
    results = [result for result in results if (result.setting.task, result.setting.model) == at_hand]
    found: dict[object, Result] = {}
    for result in results:
        if result.setting in found:
            raise ValueError(f"two results are of one setting, {result.setting.path}")
        found[result.setting] = result
    return [_standing(experiment, ROWS[name], results, found) for name in experiment.rows]


def _sound(of: Iterable[Standing]) -> dict[str, Cell]:
    return {each.row.name: each.cell for each in of if each.cell is not None and not each.cell.diverged}


def _standing(experiment: Experiment, row: Row, results: Sequence[Result], found: Mapping[object, Result]) -> Standing:
    needed = {row.name} | ({row.lr_of[0]} if row.lr_of else set())
    results = [result for result in results if result.setting.row in needed]
    tunes = row.is_tuned and experiment.tuning_seeds > 0
    tried = tuple(experiment.tried(row, results)) if tunes else ()
    tuning = tuple(experiment.tuning_results(row, results)) if tunes else ()
    lr = experiment.lr(row, results)
    if lr is None:
        return Standing(row, None, tried, tuning, None, "not tuned yet")
    asked = experiment.cell(row, results)
    runs = [found[setting] for setting in asked if setting in found]
    if len(runs) < len(asked):
        missing = f"{len(runs)} of {len(asked)} runs made" if runs else "not run yet"
        return Standing(row, lr, tried, tuning, None, missing)
    return Standing(row, lr, tried, tuning, Cell.of(runs, experiment.seeds), "")
