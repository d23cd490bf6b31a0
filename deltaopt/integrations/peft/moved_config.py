"""An adapter's config once W has moved: what is written of it has a key that makes plain PEFT warn.

PEFT names the keys of an ``adapter_config.json`` that it does not know, and not their values. So the name of the key
tells who reads it what is wrong.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from functools import cache
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import layer as lora
from torch import nn

from deltaopt.modules import modules_of
from deltaopt.pickled import IfInstalled
from deltaopt.save_watch import SaveWatch, is_saving

KEY = "needs_base_weights_moved_by_deltaopt_see_docs_export"

EXPLANATION = (
    "Delta-LoRA (deltaopt) has moved the weights under this adapter too, and this folder does not hold that movement: "
    "on the pristine base the adapter is another model than the one that was trained. For serving, write it with "
    "deltaopt.integrations.peft.save_adapter(model, optimizer, directory). For resuming, load the optimizer's state, "
    "which moves the weights."
)

Configs = dict[str, Any]
"""The configs of a model's adapters, by their names."""


class _Moved:
    """Mixed into the class of a config; the class keeps its name, as it is a LoraConfig to everybody else."""

    _deltaopt_saves: SaveWatch | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and the key if a library is saving the adapter while W has moved: warns of it once."""
        fields: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        save = None if self._deltaopt_saves is None else self._deltaopt_saves.note_save()
        if save is not None and save.takes_notes:
            fields[KEY] = EXPLANATION
        return fields

    def __eq__(self, other: object) -> bool:
        return bool(plain(self) == plain(other))

    __hash__ = None  # type: ignore[assignment]  # as every config

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # PEFT's save writes a copy of the config where it converts a PiSSA adapter.
        saves = self._deltaopt_saves if is_saving() else copy.deepcopy(self._deltaopt_saves, memo)
        return moved(copy.deepcopy(plain(self), memo), saves)

    def __reduce__(self) -> tuple[Any, ...]:
        # Where this package is missing, the first of the two is taken.
        return IfInstalled(__name__, "unpickled_config", operator.getitem), ((plain(self), self._deltaopt_saves), 0)


def moved(config: Any, saves: SaveWatch | None) -> Any:
    """Return a copy of a config that has the key when it is saved, as long as a W of `saves` has moved."""
    kind: type = type(config)
    copied: Any = object.__new__(_moved_class(kind))
    copied.__dict__.update(config.__dict__, _deltaopt_saves=saves)
    return copied


def plain(config: Any) -> Any:
    """Return a copy of a config as an object of its library alone; another object as it is."""
    if not isinstance(config, _Moved):
        return config
    copied: Any = object.__new__(type(config).__mro__[2])
    copied.__dict__.update({name: value for name, value in config.__dict__.items() if name != "_deltaopt_saves"})
    return copied


def unpickled_config(config_and_watch: tuple[Any, SaveWatch | None], first: int) -> Any:
    """Return the config of a model that is unpickled.

    Args:
        config_and_watch: the plain config, and what watches the model.
        first: which of the two is taken where this package is not installed.
    """
    return moved(*config_and_watch)


def prepare(configs: Configs, adapter: str) -> None:
    """Replace the config of an adapter by a copy that can be told of a move: it may be the user's own, or serve others.

    It is done before W moves, as a compiled model is compiled again where its config is another object.
    """
    config = configs.get(adapter)
    if isinstance(config, LoraConfig) and not isinstance(config, _Moved):
        configs[adapter] = moved(config, None)


def note_moved(configs: Configs, adapter: str, saves: SaveWatch) -> None:
    """Let the config of an adapter know that W has moved."""
    prepare(configs, adapter)
    config = configs.get(adapter)
    if isinstance(config, _Moved):
        config._deltaopt_saves = saves


def configs_by_layer(modules: Iterable[nn.Module], adapter: str) -> dict[int, list[Configs]]:
    """Return, by the id of each LoRA layer within these modules, every dict of configs above it with this adapter."""
    found: dict[int, list[Configs]] = {}
    seen: set[tuple[int, int]] = set()
    for module in modules:
        configs = getattr(module, "peft_config", None)
        if not isinstance(configs, dict) or adapter not in configs or (id(configs), id(module)) in seen:
            continue  # a PeftModel, its tuner and its model share one
        for inner in modules_of(module).values():
            if (id(configs), id(inner)) not in seen:
                seen.add((id(configs), id(inner)))
                if isinstance(inner, lora.LoraLayer):
                    found.setdefault(id(inner), []).append(configs)
    return found


@cache
def _moved_class(kind: type) -> type:
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__", "__annotations__")}
    return type(kind.__name__, (_Moved, kind), names)
