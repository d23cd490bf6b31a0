"""The alphas of a model's adapter: its config follows the layers, so that PEFT's own save writes what they compute."""

from __future__ import annotations

import copy
import re
from collections import Counter
from weakref import WeakValueDictionary

from peft import LoraConfig
from peft.tuners.lora import layer as lora
from torch import nn

from deltaopt.integrations.peft.adapter_files import configs_of, name_in_base, with_config


class Alphas:
    """The config of one adapter, and all layers of the model that hold it.

    PEFT computes a layer's scaling from ``lora_alpha`` and ``alpha_pattern`` of the config when it loads an adapter.

    Args:
        model: the module with the ``peft_config`` that holds it.
        adapter: its name.

    Attributes:
        changed: True if a layer has another alpha than its config says.
    """

    @classmethod
    def within(cls, model: nn.Module, adapter: str) -> dict[int, Alphas]:
        """Return, by the id of each layer that has a config above it, those of the outermost module that holds it.

        A model may have several: PeftModels side by side in a module of the user's.
        """
        found: dict[int, Alphas] = {}
        for module in model.modules():
            configs = getattr(module, "peft_config", None)
            if isinstance(configs, dict) and isinstance(configs.get(adapter), LoraConfig) and id(module) not in found:
                of_module = cls(module, adapter)
                found |= {id(inner): of_module for inner in module.modules()}
        return found

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self._adapter = adapter
        self.changed = False
        holder = with_config(model)
        self._configs = configs_of(holder)
        config = self._configs[adapter]
        self._layers = [
            (_key(name_in_base(holder, name), module), module)
            for name, module in holder.named_modules()
            if isinstance(module, lora.LoraLayer) and adapter in module.lora_alpha
        ]
        self._first = self._alphas()
        self._first_config = config.lora_alpha, copy.copy(config.alpha_pattern)

    def follow(self) -> None:
        """Let the config say what the layers have."""
        if not self.changed:
            return
        self._write(self._own_config(), self._alphas())
        self.changed = False  # last, so that an interrupted write is made again

    def _write(self, config: LoraConfig, alphas: dict[str, float]) -> None:
        if alphas == self._first:
            config.lora_alpha, config.alpha_pattern = self._first_config
            return
        # PEFT obeys entries for ``target_parameters``, but takes them for mistakes: the common one is best theirs.
        parameters = [layer.lora_alpha[self._adapter] for _, layer in self._layers if _is_parameter(layer)]
        common = parameters[0] if parameters else Counter(alphas.values()).most_common(1)[0][0]
        config.lora_alpha = common
        # PEFT takes the keys for regular expressions that fit the end of a name, and for all of it with a "^".
        config.alpha_pattern = {f"^{re.escape(name)}": a for name, a in alphas.items() if a != common}

    def _own_config(self) -> LoraConfig:
        """Return the adapter's config; a copy, made once, as it may be the user's own and serve other models."""
        config = self._configs[self._adapter]
        if _copies.get(id(config)) is not config:
            config = self._configs[self._adapter] = copy.copy(config)
            _copies[id(config)] = config
        return config

    def _alphas(self) -> dict[str, float]:
        return {name: layer.lora_alpha[self._adapter] for name, layer in self._layers}


_copies: WeakValueDictionary[int, LoraConfig] = WeakValueDictionary()
"""The configs that were made here, by their ids."""


def _key(name: str, layer: lora.LoraLayer) -> str:
    """Return the name that PEFT looks for in ``alpha_pattern``."""
    return f"{name}.{layer.parameter_name}" if _is_parameter(layer) else name


def _is_parameter(layer: nn.Module) -> bool:
    return isinstance(layer, lora.ParamWrapper)
