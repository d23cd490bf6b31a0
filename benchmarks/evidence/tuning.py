"""The learning rate of a row, chosen on runs that see nothing of the examples that its results are of."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.evidence.result import Result

SMALLER_IS_BETTER = ("loss", "TER")


def smaller_is_better(metric: str) -> bool:
    return metric in SMALLER_IS_BETTER


def best_lr(results: Sequence[Result], metric: str) -> tuple[float, bool]:
    """Return the learning rate with the best mean of the metric, and whether a better one may lie outside the grid.

    A learning rate at which a run diverged is worse than any at which none did. Of equally good ones the smallest is
    taken, so that a grid on which all runs diverged is extended downwards.

    Args:
        results: of one row; its test runs are not looked at.
        metric: the task's main one.

    Returns:
        The learning rate, and True where it is the smallest or the largest that was tried.

    Raises:
        ValueError: if there are no tuning runs, if they differ in more than learning rate and seed, if two are of one
            learning rate and seed, if learning rates were tried with different seeds, or if a run lacks the metric.
    """
    tried: dict[float, dict[int, float]] = defaultdict(dict)
    runs = [result for result in results if result.setting.split == "tuning"]
    if not runs:
        raise ValueError("there is no tuning run to choose the learning rate from")
    for run in runs:
        setting, first = run.setting, runs[0].setting
        if replace(setting, lr=first.lr, seed=first.seed) != first or run.data != runs[0].data:
            raise ValueError(f"{setting.path} and {first.path} differ in more than learning rate and seed")
        if setting.seed in tried[setting.lr]:
            raise ValueError(f"{setting.task}, {setting.row}: lr {setting.lr:g} has two tuning runs of one seed")
        tried[setting.lr][setting.seed] = _goodness(run, metric)
    if len({frozenset(values) for values in tried.values()}) > 1:
        counts = ", ".join(f"lr {lr:g}: seeds {sorted(values)}" for lr, values in sorted(tried.items()))
        raise ValueError(f"{runs[0].setting.task}, {runs[0].setting.row}: unequal tuning seeds ({counts})")
    means = {lr: statistics.fmean(values.values()) for lr, values in sorted(tried.items())}
    best = max(means, key=means.__getitem__)  # the first of equal ones: the smallest
    return best, best in (min(means), max(means))


def _goodness(run: Result, metric: str) -> float:
    """Return the metric, negated where smaller is better; minus infinity for a run that diverged."""
    if run.diverged:
        return -math.inf
    if metric not in run.metrics:
        raise ValueError(f"{run.setting.path} has no {metric!r}, only {', '.join(run.metrics) or 'nothing'}")
    value = run.metrics[metric]
    if not math.isfinite(value):
        return -math.inf
    return -value if smaller_is_better(metric) else value
