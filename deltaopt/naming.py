"""Names of layers without what wrappers of the model put into them: torch.compile, DDP, FSDP1, checkpoint wrappers.

A name is the key of a layer's ledger in saved states and of its rounding noise, so it must not depend on whether the
model was wrapped when the optimizer was built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.optim.swa_utils import AveragedModel

WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Attributes in which torch.compile, FSDP1, activation checkpointing and Lightning's Fabric hold what they wrap.

Nobody else uses these names, so they tell of a wrapper by themselves.
"""

HOLD_MODULE = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
"""Wrappers that hold what they wrap as `module`, a name that any model may use for a layer of its own."""

_PLACES = (*WRAPPED, "module")


def names_without_wrappers(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return by name the same name without the steps from a wrapper to what it wraps.

    Names that would then be equal stay as they are.

    Args:
        model: that has modules of these names.
        names: as in ``model.named_modules()``.
    """
    short = short_names(model, names)
    count = Counter(short.values())
    found = {name: shorter if count[shorter] == 1 else name for name, shorter in short.items()}
    return found if len(set(found.values())) == len(found) else {name: name for name in found}


def differ_by_wrappers(one: str, other: str) -> bool:
    """Tell if two names may be of one layer, in a model that was wrapped when one of them was given.

    Names alone do not tell a wrapper's `module` from another one: the caller has to know more of the two layers.
    """
    return one == other or _without_words(one) == _without_words(other)


def renamed(saved: Iterable[str], present: Iterable[str]) -> dict[str, str]:
    """Return by saved name the present one, for names in the same order; nothing for those that are other names."""
    return {old: new for old, new in zip(saved, present, strict=True) if differ_by_wrappers(old, new)}


def under_present_names(entries: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the same entries, those in `names` under their present name."""
    return {names.get(name, name): entry for name, entry in entries.items()}


def name_without_wrappers(model: nn.Module, name: str) -> str:
    """Return the name of a module, or the key of a state dict, without the steps from a wrapper to what it wraps.

    Some wrappers leave themselves out of the keys of their state dicts.
    """
    return short_names(model, [name])[name]


def short_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return by name what `name_without_wrappers` makes of it; what they begin with alike is looked up once."""
    known: dict[str, _Place] = {"": _Place("", model)}
    return {name: _place(name, known).name for name in names}


class _Place(NamedTuple):
    """The name of a module without wrappers, and the module; None behind a key of a state dict."""

    name: str
    module: nn.Module | None


def _place(name: str, known: dict[str, _Place]) -> _Place:
    """Return the place of a module or a key, which `known` remembers by name, as all places on the way to it."""
    found = known.get(name)
    if found is None:
        above, _, part = name.rpartition(".")
        found = known[name] = _step(_place(above, known), part)
    return found


def _step(above: _Place, part: str) -> _Place:
    """Return the place of a part of `above`; it is `above` itself where the part is a step into a wrapper."""
    name, module = above
    while (inside := _wrapped_by(module)) is not None:
        module = inside[1]
        if part == inside[0]:
            return _Place(name, module)
    return _Place(f"{name}.{part}" if name else part, None if module is None else module._modules.get(part))


def _wrapped_by(module: nn.Module | None) -> tuple[str, nn.Module] | None:
    """Return the attribute and the module that a wrapper holds; None of a module that is no wrapper."""
    if module is None or module._modules.keys().isdisjoint(_PLACES):
        return None
    places = ("module",) if isinstance(module, HOLD_MODULE) else WRAPPED
    return next(((name, inside) for name in places if (inside := module._modules.get(name)) is not None), None)


def _without_words(name: str) -> list[str]:
    return [part for part in name.split(".") if part not in WRAPPED and part != "module"]
