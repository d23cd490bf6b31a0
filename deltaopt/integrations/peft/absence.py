"""Why a model has no LoRA layer of PEFT to train: another adapter, another method, a frozen adapter, none at all."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from deltaopt.integrations.peft.scaled_copies import factor_paths

METHODS = {
    "ia3": ("IA3", "multiplies activations by a vector"),
    "oft": ("OFT", "rotates W"),
    "boft": ("BOFT", "rotates W"),
    "hra": ("HRA", "reflects W"),
    "vera": ("VeRA", "trains two vectors between frozen random matrices"),
    "vblora": ("VB-LoRA", "mixes its factors from a shared bank of vectors"),
    "randlora": ("RandLora", "trains two diagonals between frozen random matrices"),
    "loha": ("LoHa", "multiplies two products element by element"),
    "lokr": ("LoKr", "adds a Kronecker product"),
    "fourierft": ("FourierFT", "trains Fourier coefficients"),
    "ln_tuning": ("LN tuning", "trains the norms themselves"),
}
"""By PEFT's module of a method's layers: its name, and what it does instead of adding A @ B to W."""


def why_none(model: nn.Module, adapter: str) -> str | None:
    """Say why no layer of PEFT holds this LoRA adapter; None if the model has nothing of PEFT."""
    tuners = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    held = sorted({name for module in tuners for name in lora_adapters(module)})
    if held:
        there = f"the adapter{'s' * (len(held) > 1)} {', '.join(map(repr, held))}"
        return f"no layer holds the adapter {adapter!r}, the model has {there}: give adapter={held[0]!r}"
    others = dict.fromkeys(_method(module) for module in tuners)
    if others:
        return " and ".join(_says(method) for method in others) + _INSTEAD
    configs = _configs(model)
    if configs and all(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        kinds = sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()})
        return f"its adapter is of {', '.join(kinds)}, which trains tokens in front of the input" + _INSTEAD
    if configs:
        return (
            f"it has the config of {', '.join(map(repr, configs))} and no layer of it. After merge_and_unload(), "
            "unload() or delete_adapter() none is left: call get_peft_model(model, LoraConfig(...)) for a new one, or "
            "take the model from before"
        )
    return None


def frozen_adapter(model: nn.Module, layers: Iterable[Any], adapter: str) -> str | None:
    """Say that an adapter was loaded for inference; None if one of its factors trains, or its config says otherwise."""
    config = _configs(model).get(adapter)
    if config is None or not getattr(config, "inference_mode", False):
        return None
    factors = [attrgetter(path)(layer) for layer in layers for path in factor_paths(layer, adapter)]
    if not factors or any(factor.requires_grad for factor in factors):
        return None
    return (
        f"all factors of the adapter {adapter!r} are frozen, as it was loaded for inference: load it with "
        "PeftModel.from_pretrained(model, path, is_trainable=True), or load_adapter(..., is_trainable=True)"
    )


def lora_adapters(module: nn.Module) -> set[str]:
    """Return the names of a layer's LoRA adapters; empty for layers of other methods."""
    held = ("lora_A", "lora_embedding_A")
    return {adapter for attribute in held for adapter in getattr(module, attribute, {})}


_INSTEAD = (
    ". Delta-LoRA moves W by the change of a product A @ B of two trained factors: use LoRA, "
    "get_peft_model(model, LoraConfig(...))"
)


def _method(module: nn.Module) -> str:
    """Return PEFT's module of the method that a layer is of."""
    kind = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("peft.tuners."))
    return kind.__module__.split(".")[2]


def _says(method: str) -> str:
    name, does = METHODS.get(method, (method, "adds no product of two trained factors"))
    return f"its adapter is of {name}, which {does}"


def _configs(model: nn.Module) -> dict[str, Any]:
    """Return the adapters' configs, which PeftModel, its tuner or transformers' model holds."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and configs:
            return configs
    return {}
