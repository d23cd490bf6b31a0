"""Which combinations of parameters the suite takes, and which are left to `make nightly`."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def one_in(share: int, *axes: Iterable[Any]) -> list[Any]:
    """Return all combinations of the axes' values, of which all but one in `share` are marked as `nightly`.

    Each value of each axis is in some that the suite takes; with a share of 2, each pair of values of three axes is.

    Args:
        share: no larger than the second longest axis.
        axes: the values of each parameter. Tuples are values of several parameters.
    """
    values = [list(axis) for axis in axes]
    assert sorted(map(len, values))[-2] >= share, "some value would be in no case"
    cases = []
    for places in product(*(range(len(axis)) for axis in values)):
        case = [axis[place] for axis, place in zip(values, places, strict=True)]
        flat = [part for value in case for part in (value if isinstance(value, tuple) else (value,))]
        cases.append(later(*flat) if sum(places) % share else pytest.param(*flat))
    return cases


def later(*values: Any, **options: Any) -> Any:
    """Return one case that is left to `make nightly`."""
    return pytest.param(*values, marks=pytest.mark.nightly, **options)
