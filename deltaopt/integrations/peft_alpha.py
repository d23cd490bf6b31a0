"""The alphas of a model's adapter: its config follows the layers, so that PEFT's own save writes what they compute."""

from __future__ import annotations

import copy
import re
from collections import Counter

from peft import LoraConfig
from peft.tuners.lora import layer as lora
from torch import nn

from deltaopt.integrations.peft_save import configs_of, name_in_base, with_config


class Alphas:
    """The config of one adapter, and all layers of the model that hold it.

    PEFT computes a layer's scaling from ``lora_alpha`` and ``alpha_pattern`` of the config when it loads an adapter.

    Args:
        model: a model whose adapters have been added.
        adapter: its name.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self._adapter = adapter
        self._config: LoraConfig | None = None
        self._changed = False
        try:
            holder = with_config(model)
        except TypeError:
            return  # layers without a config: nobody saves them by it
        self._layers = [
            (name_in_base(holder, name), module)
            for name, module in holder.named_modules()
            if isinstance(module, lora.LoraLayer) and adapter in module.lora_alpha
        ]
        self._first = self._alphas()
        if self._layers:
            self._config = configs_of(holder)[adapter]
            self._first_config = self._config.lora_alpha, copy.copy(self._config.alpha_pattern)

    def set(self, layer: lora.LoraLayer, alpha: float) -> None:
        """Give a layer another alpha; the config does not know of it yet."""
        layer.lora_alpha[self._adapter] = int(alpha) if float(alpha).is_integer() else alpha
        self._changed = True

    def follow(self) -> None:
        """Let the config say what the layers have."""
        if self._config is None or not self._changed:
            return
        self._changed = False
        alphas = self._alphas()
        if alphas == self._first:
            self._config.lora_alpha, self._config.alpha_pattern = self._first_config
            return
        # Entries for ``target_parameters`` PEFT takes for mistakes, so these have the common one.
        parameters = [layer.lora_alpha[self._adapter] for _, layer in self._layers if _is_parameter(layer)]
        common = parameters[0] if parameters else Counter(alphas.values()).most_common(1)[0][0]
        self._config.lora_alpha = common
        # PEFT takes the keys for regular expressions that fit the end of a name, and for all of it with a "^".
        self._config.alpha_pattern = {f"^{re.escape(name)}": a for name, a in alphas.items() if a != common}

    def _alphas(self) -> dict[str, float]:
        return {name: layer.lora_alpha[self._adapter] for name, layer in self._layers}


def _is_parameter(layer: nn.Module) -> bool:
    return isinstance(layer, lora.ParamWrapper)
