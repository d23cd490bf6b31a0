"""Schedules of update_ratio: ramps in a few stages, each a callable step -> ratio.

A ratio that changes at every step makes what W was asked to move by as large as W itself (docs/method.md, "The
ledger"). A ramp in stages changes a few times, and each change adds one low-rank term.
"""

from __future__ import annotations

import math
import numbers
import operator
from dataclasses import dataclass

CURVES = ("linear", "cosine")


@dataclass(frozen=True, repr=False)
class Ramp:
    """A ratio that goes from `start` to `end` in equal stages; made by `linear` and `cosine`, which say more.

    Attributes:
        curve: "linear" or "cosine".
        start: the ratio before the ramp.
        end: the ratio after the ramp.
        steps: the length of the ramp.
        stages: how often the ratio changes.
        begin: the number of the step, counted from 0, at which the ramp begins.

    Raises:
        TypeError, ValueError: for values that make no ramp.
    """

    curve: str
    start: float
    end: float
    steps: int
    stages: int = 10
    begin: int = 0

    def __post_init__(self) -> None:
        if self.curve not in CURVES:
            raise ValueError(f"curve is one of {', '.join(CURVES)}, got {self.curve!r}")
        checked = {
            "start": _ratio(self.start, "start"),
            "end": _ratio(self.end, "end"),
            "steps": _count(self.steps, "steps", "how long the ramp lasts", least=1),
            "stages": _count(self.stages, "stages", "how often the ratio changes", least=1),
            "begin": _count(self.begin, "begin", "the step at which the ramp begins, counted from 0", least=0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.steps < self.stages:
            raise ValueError(
                f"steps={self.steps} is too short for stages={self.stages}: a stage lasts one step at least. Use more "
                f"steps, or stages={self.steps} at most"
            )

    def __call__(self, step: int) -> float:
        """Return the ratio of this step, counted from 0."""
        # Stage k of the ramp lies around the fraction k / stages of its steps. Integers alone: no rounding.
        stage = (2 * self.stages * (int(step) - self.begin) + self.steps) // (2 * self.steps)
        if stage <= 0:
            return self.start
        if stage >= self.stages:
            return self.end
        done = stage / self.stages
        if self.curve == "cosine":
            done = math.sin(math.pi / 2 * done) ** 2  # (1 - cos(pi x)) / 2
        return self.start + (self.end - self.start) * done

    def __repr__(self) -> str:
        names = ("start", "end", "steps", "stages", "begin")
        return f"schedules.{self.curve}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def linear(start: float, end: float, steps: int, stages: int = 10, begin: int = 0) -> Ramp:
    """Return an `update_ratio` that goes from `start` to `end` in equal stages, up or down.

    It changes `stages` times, so it takes `stages + 1` values: ``start + (end - start) * k / stages`` for k = 0, 1, ...
    The k-th change comes where the straight line passes the middle between two values, at the step ``begin + steps *
    (k - 1/2) / stages``, rounded up. So the first value is `start` and the last one `end`, both exactly, the first and
    the last stage of the ramp are half as long as the others, and the mean over the ramp is that of the straight line,
    to within half of a step's share.

    Args:
        start: the ratio until step `begin`, and for half a stage from there; finite and at least 0.
        end: the ratio from half a stage before step `begin + steps` on; finite and at least 0.
        steps: the length of the ramp, at least `stages`.
        stages: how often the ratio changes, at least 1. Each change adds one term of rank r to what the optimizer keeps
            of each weight. Default 10.
        begin: the number of the step at which the ramp begins, counted from 0 as by the optimizer. Default 0. The steps
            before `start_step` count too: ``begin=start_step`` makes the ramp begin where W does.

    Returns:
        A callable step -> ratio, which can be compared, copied and pickled.

    Raises:
        TypeError, ValueError: for values out of range, by name.

    Example:
        >>> from deltaopt import schedules
        >>> ratio = schedules.linear(0.0, 2.0, steps=100, stages=4)
        >>> [ratio(step) for step in (0, 12, 13, 37, 38, 62, 63, 87, 88, 1000)]
        [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5, 2.0, 2.0]
    """
    return Ramp("linear", start, end, steps, stages, begin)


def cosine(start: float, end: float, steps: int, stages: int = 10, begin: int = 0) -> Ramp:
    """Return an `update_ratio` that goes from `start` to `end` along half a cosine, in stages of equal length.

    It changes at the same steps as `linear`. Its values are ``start + (end - start) * (1 - cos(pi k / stages)) / 2``
    for k = 0, 1, ...: slow at both ends, fast in the middle. The mean over the ramp is that of the cosine, to within
    half of a step's share.

    Args:
        start: see `linear`.
        end: see `linear`.
        steps: see `linear`.
        stages: see `linear`.
        begin: see `linear`.

    Returns:
        A callable step -> ratio, which can be compared, copied and pickled.

    Raises:
        TypeError, ValueError: for values out of range, by name.

    Example:
        >>> from deltaopt import schedules
        >>> ratio = schedules.cosine(2.0, 0.0, steps=1000, begin=500)
        >>> ratio(0), round(ratio(700), 3), round(ratio(1000), 3), ratio(1500)
        (2.0, 1.809, 1.0, 0.0)
    """
    return Ramp("cosine", start, end, steps, stages, begin)


def _ratio(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a number (a value of update_ratio), got {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is a value of update_ratio, which must be finite and not negative, got {value}")
    return float(value)


def _count(value: object, name: str, meaning: str, least: int) -> int:
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{name} is an int ({meaning}), got {value!r}")
    if count < least:
        raise ValueError(f"{name} is at least {least} ({meaning}), got {count}")
    return count
