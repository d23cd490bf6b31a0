"""Figures that tables and pictures show: of one run, in addition to its metrics, and of the runs of a tuning."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from benchmarks.evidence.result import Result


def last_loss(run: Result) -> float:
    """Return the mean training loss of the last tenth."""
    return statistics.fmean(run.losses[-max(1, len(run.losses) // 10) :])


def mean_rank(run: Result) -> float | None:
    """Return the effective rank of the change, the mean over layers; None where no layer has one."""
    return _mean_of(layer["effective_rank"] for layer in run.layers)


def mean_cosine(run: Result) -> float | None:
    """Return the cosine of the effective to the pretrained weight, the mean over layers."""
    return _mean_of(layer["cosine"] for layer in run.layers)


def forgotten(run: Result) -> float:
    """Return by how much the loss rose on texts that the pretrained model wrote."""
    if run.forgetting is None:
        raise ValueError(f"{run.setting.path}: forgetting was not measured")
    before, after = run.forgetting
    return after - before


def over_rates(runs: Sequence[Result], metric: str, seeds: int) -> dict[float, float]:
    """Return the mean of a metric at each learning rate of which all seeds are there and none diverged."""
    values: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        values[run.setting.lr].append(math.nan if run.diverged else run.metrics[metric])
    means = {lr: statistics.fmean(found) for lr, found in sorted(values.items()) if len(found) == seeds}
    return {lr: mean for lr, mean in means.items() if math.isfinite(mean)}


def best_by_loss(runs: Sequence[Result], seeds: int) -> float:
    """Return the learning rate with the lowest mean loss."""
    losses = over_rates(runs, "loss", seeds)
    return min(losses, key=losses.__getitem__)


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
