"""Plain values: numbers and strings of other libraries as Python's own, which every reader of a checkpoint takes.

Learning rates and ratios often come out of numpy or as a 0-d tensor. `torch.load(weights_only=True)` refuses numpy's
types, and subclasses of `float` and `str` with them.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import OrderedDict
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def as_float(value: object) -> float | None:
    """Return a real number as a float, infinite if it is too large for one; None for anything else and for a bool.

    Args:
        value: a number of Python or numpy, or a 0-d tensor on the CPU that does not require grad.
    """
    number = _number(value)
    if not isinstance(number, Real):
        return None
    try:
        return float(number)
    except OverflowError:  # an int of many digits
        return -math.inf if number < 0 else math.inf


def as_int(value: object) -> int | None:
    """Return a whole number as an int; None for anything else, for a float such as 2.0 too, and for a bool.

    Args:
        value: as for `as_float`.
    """
    number = _number(value)
    return int(number) if isinstance(number, Integral) else None


def plain(value: Any) -> Any:
    """Return `value` with numpy's scalars, and subclasses of Python's numbers and strings, as the built-in types.

    Looks into dicts, OrderedDicts, lists and tuples; those that hold nothing to convert are returned themselves.
    Tensors and objects of other types stay as they are.
    """
    return _plain_tree(value, within=set())


def _number(value: object) -> object:
    """Return a number as one that is not of torch or numpy; None for a bool and for a tensor that is no number."""
    if isinstance(value, Tensor):
        # Reading a tensor on a device would wait for it, and a ratio that requires grad would never train.
        if value.dim() or value.device.type != "cpu" or value.requires_grad:
            return None
        value = value.item()
    value = _plain_scalar(value)
    return None if isinstance(value, bool) else value


def _plain_scalar(value: Any) -> Any:
    numpy = sys.modules.get("numpy")  # where it was not imported, nothing is of its types
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return float(value)
    return str.__str__(value) if isinstance(value, str) else value


def _plain_tree(value: Any, within: set[int]) -> Any:
    """Convert a nested value; `within` holds the ids of the containers around it, so that a cycle ends."""
    kind = type(value)
    if kind not in (dict, OrderedDict, list, tuple):
        return _plain_scalar(value)
    if id(value) in within:
        return value
    within = within | {id(value)}
    if kind in (list, tuple):
        items = [_plain_tree(item, within) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else kind(items)
    pairs = [(_plain_scalar(key), _plain_tree(item, within)) for key, item in value.items()]
    if all(a is key and b is item for (a, b), (key, item) in zip(pairs, value.items(), strict=True)):
        return value
    twin = copy.copy(value)  # with the attributes of an OrderedDict, such as _metadata of a model's state_dict
    twin.clear()
    twin.update(pairs)
    return twin
