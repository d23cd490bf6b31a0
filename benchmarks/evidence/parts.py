"""Parts of a grid: some tasks and rows, another precision, or a dry run of a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.evidence.catalogue import TASKS
from benchmarks.evidence.grid import Experiment, Grid
from benchmarks.evidence.rows import ROWS

DRY = {"train_examples": 64, "test_examples": 8}
"""What a dry run reads."""


def only(grid: Grid, names: Sequence[str]) -> Grid:
    """Return the runs of some tasks, of some rows, or of some rows on some tasks.

    Args:
        grid: with all runs.
        names: of tasks and rows. No task means all of them, and so with rows. A row that takes its learning rate from
            the tuning of another one brings that row along.

    Raises:
        ValueError: for a name that is none of the grid's.
    """
    tasks = [each.task for each in grid.experiments]
    rows = [row for each in grid.experiments for row in each.rows]
    if unknown := [name for name in names if name not in (*tasks, *rows)]:
        known = ", ".join(dict.fromkeys((*tasks, *rows)))
        raise ValueError(f"{grid.name} has no task and no row {', '.join(unknown)}; it has {known}")
    wanted = {name for name in names if name in ROWS} or set(rows)
    found = []
    for each in grid.experiments:
        if each.task in names or not TASKS.keys() & set(names):
            sources = {ROWS[name].lr_of[0] for name in wanted & set(each.rows) if ROWS[name].lr_of}  # type: ignore[index]
            needed = wanted | sources if each.tuning_seeds else wanted
            found.append(replace(each, rows=[name for name in each.rows if name in needed]))
    return replace(grid, experiments=found)


def in_precision(grid: Grid, precision: str) -> Grid:
    """Return the same runs in "float32" or "bfloat16"."""
    return replace(grid, experiments=[_with(each, precision=precision) for each in grid.experiments])


def dry(grid: Grid, steps: int) -> Grid:
    """Return a run of a few steps for each method and task, on a few examples: to see whether everything is there."""
    return replace(grid, experiments=[_dry(each, steps) for each in grid.experiments])


def _dry(experiment: Experiment, steps: int) -> Experiment:
    of_method = {ROWS[name].method: name for name in reversed(experiment.rows)}  # the first row of each
    return replace(
        _with(experiment, steps=steps, **DRY),
        rows=[name for name in experiment.rows if of_method[ROWS[name].method] == name],
        lrs={kind: lrs[:1] for kind, lrs in experiment.lrs.items()},
        seeds=1,
        tuning_seeds=min(experiment.tuning_seeds, 1),
    )


def _with(experiment: Experiment, **changes: object) -> Experiment:
    return replace(experiment, setting={**experiment.setting, **changes})
