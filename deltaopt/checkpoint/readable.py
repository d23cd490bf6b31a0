"""What `load` cannot read: found in an object before it is written, with its place there.

`torch.load(weights_only=True)` refuses a whole file for one object of a class that it does not know. Here each object
of an unusual class is written to memory and read back by itself, so that torch decides, and classes that the user has
allowed by `torch.serialization.add_safe_globals` pass.
"""

from __future__ import annotations

import io
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

NAMED = 8
"""Objects that one message names; it counts the others."""

_READ = (type(None), bool, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set)
_TENSORS = (Tensor, nn.Parameter)


def check_readable(obj: Any) -> None:
    """Raise TypeError for an object that holds something that `load` cannot read.

    Args:
        obj: what is to be saved; it is not changed.
    """
    found = list(_unreadable(obj, "", seen=set()))
    if found:
        named = "".join(f"\n  {place or 'the object itself'}: {kind}" for place, kind in found[:NAMED])
        others = f"\n  and {len(found) - NAMED} more" * (len(found) > NAMED)
        raise TypeError(
            f"this cannot be saved, since load would refuse the file (nothing was written):{named}{others}\n"
            "Expected are tensors, numbers, strings, None, dicts, lists, tuples and sets. Turn it into these, leave it "
            "out, or allow its class by torch.serialization.add_safe_globals, before saving and before loading"
        )


def _unreadable(value: Any, place: str, seen: set[int]) -> Iterator[tuple[str, str]]:
    """Yield the place and the class of each object that cannot be read; containers in `seen` were looked into."""
    kind = type(value)
    if kind in _READ or (kind is int and abs(value) < 2**64):
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if kind in _TENSORS or kind in _CONTAINERS:
        for name, attribute in vars(value).items() if hasattr(value, "__dict__") else ():
            yield from _unreadable(attribute, f"{place}.{name}", seen)
    if isinstance(value, dict) and kind in _CONTAINERS:
        for key, item in value.items():
            yield from _unreadable(key, f"{place}[{key!r}] (the key)", seen)
            yield from _unreadable(item, f"{place}[{key!r}]", seen)
    elif kind in _CONTAINERS:
        for number, item in enumerate(value):
            yield from _unreadable(item, f"{place}[{number}]" if kind is not set else f"{place} element", seen)
    elif kind not in _TENSORS and not _comes_back(value):
        described = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        yield place, f"{described} of {value.bit_length()} bits" if kind is int else described


def _comes_back(value: Any) -> bool:
    """Tell if torch writes this object and reads it with ``weights_only=True``."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # pickle and torch.load have many: PicklingError, AttributeError, RuntimeError, ...
        return False
    return True
