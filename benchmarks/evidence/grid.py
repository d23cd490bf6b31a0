"""A grid of runs: which of them are still to be made follows from the result files alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence.catalogue import task_named
from benchmarks.evidence.result import Result
from benchmarks.evidence.rows import ROWS, Kind, Row
from benchmarks.evidence.setting import Setting
from benchmarks.evidence.tuning import best_lr

TUNING_SEED = 1000
"""The first seed of tuning runs, which share none with the runs that are reported."""

EXTENSIONS = 3
"""How often the grid of a row is extended at most, one value at a time, where the best value is at its edge."""


@dataclass(frozen=True)
class Experiment:
    """Rows that are compared on one task.

    Attributes:
        task: a name of `tasks.TASKS`.
        model: a folder's name or a hub name.
        rows: names of `rows.ROWS`, the most important first.
        setting: what all rows share, as arguments of `Setting`.
        lrs: the learning rates to try, for each kind of row.
        seeds: number of runs in each cell. They have the seeds 0, 1, ...
        tuning_seeds: number of runs for each learning rate that is tried; 0 for one learning rate, `lrs`' first.
    """

    task: str
    model: str
    rows: Sequence[str]
    setting: Mapping[str, Any]
    lrs: Mapping[Kind, Sequence[float]]
    seeds: int = 5
    tuning_seeds: int = 1
    extensions: int = EXTENSIONS

    def __post_init__(self) -> None:
        if unknown := [name for name in self.rows if name not in ROWS]:
            raise ValueError(f"unknown rows {', '.join(unknown)}; known are {', '.join(ROWS)}")

    @property
    def metric(self) -> str:
        """The task's main metric, by which learning rates are tuned."""
        return task_named(self.task).metric

    def example(self, row: Row) -> Setting:
        """Return a setting of a row at a learning rate that is not tuned, to measure what does not depend on it."""
        return self._setting(row, sorted(self.lrs[row.kind])[0], 0, "test")

    def of_rows(self) -> list[Row]:
        return [ROWS[name] for name in self.rows]

    def needed(self, results: Sequence[Result]) -> Iterator[Setting]:
        """Yield the runs that can be made now and are not among these results."""
        made = {result.setting for result in results}
        for row in self.of_rows():
            for setting in self._of_row(row, results):
                if setting not in made:
                    yield setting

    def lr(self, row: Row, results: Sequence[Result]) -> float | None:
        """Return the learning rate of a row's reported runs; None while its tuning runs are not complete."""
        if row.lr is not None:
            return row.lr
        if row.lr_of is not None:
            source, factor = row.lr_of
            found = self.lr(ROWS[source], results)
            return None if found is None else _digits(factor * found)
        if not self.tuning_seeds:
            return self.lrs[row.kind][0]
        grid, found = self.tried(row, results), self.tuning_results(row, results)
        return (
            best_lr([r for r in found if r.setting.lr in grid], self.metric)[0]
            if self._is_complete(row, grid, found)
            else None
        )

    def tried(self, row: Row, results: Sequence[Result]) -> list[float]:
        """Return the learning rates of a row's grid, extended as far as its results asked for."""
        grid = sorted(self.lrs[row.kind])
        found = self.tuning_results(row, results)
        while self._is_complete(row, grid, found):
            lr, at_edge = best_lr([r for r in found if r.setting.lr in grid], self.metric)
            further = self._extended(row, grid, lr) if at_edge else None
            if further is None:
                break
            grid = sorted([*grid, further])
        return grid

    def cell(self, row: Row, results: Sequence[Result]) -> list[Setting]:
        """Return the settings of a row's reported runs; empty while its learning rate is not known."""
        lr = self.lr(row, results)
        return [] if lr is None else self.at_rate(row, lr)

    def at_rate(self, row: Row, lr: float) -> list[Setting]:
        """Return the settings of a row's test runs at a learning rate, which need not be the tuned one."""
        return [self._setting(row, lr, seed, "test") for seed in range(self.seeds)]

    def tuning_results(self, row: Row, results: Sequence[Result]) -> list[Result]:
        """Return the results of a row's tuning runs, at whatever learning rates they were made."""
        own = [r for r in results if r.setting.row == row.name and r.setting.split == "tuning"]
        return [r for r in own if r.setting in self._tuning(row, r.setting.lr)]

    def _of_row(self, row: Row, results: Sequence[Result]) -> Iterator[Setting]:
        if row.is_tuned and self.tuning_seeds:
            for lr in self.tried(row, results):
                yield from self._tuning(row, lr)
        yield from self.cell(row, results)

    def _is_complete(self, row: Row, grid: Sequence[float], found: Sequence[Result]) -> bool:
        made = {result.setting for result in found}
        return all(setting in made for lr in grid for setting in self._tuning(row, lr))

    def _tuning(self, row: Row, lr: float) -> list[Setting]:
        seeds = range(TUNING_SEED, TUNING_SEED + self.tuning_seeds)
        return [self._setting(row, lr, seed, "tuning") for seed in seeds]

    def _extended(self, row: Row, grid: Sequence[float], edge: float) -> float | None:
        """Return the value beyond the edge of a grid, as far as its neighbour; None if it was extended enough."""
        if len(grid) >= len(self.lrs[row.kind]) + self.extensions or len(grid) < 2:
            return None
        grid = sorted(grid)
        step = grid[1] / grid[0] if edge == grid[0] else grid[-1] / grid[-2]
        return _digits(edge / step if edge == grid[0] else edge * step)

    def _setting(self, row: Row, lr: float, seed: int, split: Any) -> Setting:
        given = {**self.setting, **row.changes}
        return Setting(
            task=self.task, model=self.model, row=row.name, method=row.method, lr=lr, seed=seed, split=split, **given
        )


@dataclass(frozen=True)
class Grid:
    """Experiments in the order of their importance."""

    name: str
    experiments: Sequence[Experiment]

    def needed(self, results: Sequence[Result]) -> list[Setting]:
        """Return the runs that can be made now, the most important first."""
        found: dict[Setting, None] = {}
        for experiment in self.experiments:
            found.update(dict.fromkeys(experiment.needed(results)))
        return list(found)


def _digits(lr: float) -> float:
    """Return a learning rate with two digits, so that a grid extended twice has plain names."""
    return float(f"{lr:.{1 - math.floor(math.log10(lr))}f}") if lr < 1 else float(f"{lr:.2g}")
