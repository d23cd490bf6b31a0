"""Modules of other models that have the same W: a copy of a model that shares its parameters moves with it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator

from torch import nn

from deltaopt.base_hooks import SharerHook, hook_of
from deltaopt.modules import modules_of
from deltaopt.scaling import holder_of
from deltaopt.tensors import is_plain
from deltaopt.triple import LoRATriple


def keep_base_of_sharers(model: nn.Module, triples: Iterable[LoRATriple]) -> None:
    """Leave the movement of each W out of the output of modules outside of `model` that have the same Parameter.

    Nothing tells which models share a tensor, so all modules in memory are looked at; only if a W has more owners than
    the one module that is known. Models that take a W over later are not seen.
    """
    known = {id(module) for module in modules_of(model).values()}
    alone = _references(nn.Linear(1, 1, device="meta"), "weight")
    hooked = [triple for triple in triples if triple.output_hook is not None]
    shared = {id(triple.W): triple for triple in hooked if _has_others(triple, alone)}
    for module, name, key in _owners(shared.keys()) if shared else ():
        first = shared[key].output_hook
        if id(module) not in known and first is not None and hook_of(module, SharerHook, first) is None:
            SharerHook(module, name, first).put_on()


def _has_others(triple: LoRATriple, alone: int) -> bool:
    """Tell if something holds the Parameter of a triple in addition to its module, where it has `alone` references."""
    source = triple.W_source
    if not isinstance(source, tuple) or not is_plain(triple.W):
        return False
    owner, name = holder_of(*source)
    return name in owner._parameters and _references(owner, name) > alone


def _references(owner: nn.Module, name: str) -> int:
    return sys.getrefcount(owner._parameters[name])


def _owners(keys: Iterable[int]) -> Iterator[tuple[nn.Module, str, int]]:
    """Yield each module in memory that has one of these Parameters, its name there, and its id."""
    wanted = set(keys)
    for candidate in gc.get_objects():
        if issubclass(type(candidate), nn.Module):  # isinstance would wake proxies
            for name, parameter in candidate.__dict__.get("_parameters", {}).items():
                if id(parameter) in wanted:
                    yield candidate, name, id(parameter)
