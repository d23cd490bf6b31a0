"""PEFT's LoRA layers as triples. Its ``lora_B`` is our A, and its ``lora_A`` is our B.

Layers are told by their class, not by ``PeftModel``: transformers and diffusers inject them without one.
"""

from __future__ import annotations

import warnings

from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from deltaopt.triple import LoRATriple

CONVOLUTIONS = (lora.Conv1d, lora.Conv2d, lora.Conv3d)
SUPPORTED = (lora.Linear, lora.Embedding, *CONVOLUTIONS, lora.ParamWrapper)


class PeftTriple(LoRATriple):
    """A triple of one PEFT layer and one of its adapters, whose tensors are looked up at every step."""

    def __init__(self, layer: lora.LoraLayer, adapter: str, name: str, allow_dropout: bool = False) -> None:
        self._layer = layer
        self._adapter = adapter
        self._allow_dropout = allow_dropout
        embedding = isinstance(layer, lora.Embedding)
        A = f"lora_embedding_B.{adapter}" if embedding else f"lora_B.{adapter}.weight"
        B = f"lora_embedding_A.{adapter}" if embedding else f"lora_A.{adapter}.weight"
        super().__init__(
            (layer, _weight_path(layer)),
            (layer, A),
            (layer, B),
            scaling=layer.scaling[adapter],
            name=name,
            layout=_layout(layer),
        )

    def branch_problems(self) -> list[str]:
        """Merged, or rescaled or given dropout since it was registered."""
        if merged := super().branch_problems():
            return merged
        scaling = self._layer.scaling.get(self._adapter)
        if scaling != self.scaling:
            return [
                f"its scaling was {self.scaling:g} when it was registered and is {scaling} now (set_scale, "
                "scale_layer): build the optimizer again, or put the scaling back"
            ]
        return [] if self._allow_dropout else _dropout_problems(self._layer, self._adapter)


def find(model: nn.Module, adapter: str, allow_dropout: bool) -> list[LoRATriple]:
    """The triples of every PEFT LoRA layer of `model` that holds `adapter`.

    Raises:
        ValueError: for layers that Delta-LoRA can not move, all in one message.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and adapter in _adapters(module)
    ]
    refused = [
        f"{name}: {reason}" for name, layer in layers if (reason := _refusal(layer, adapter, allow_dropout)) is not None
    ]
    if refused:
        raise ValueError("these PEFT layers can not be used:\n  " + "\n  ".join(refused))
    _warn_about_companions(layers, adapter)
    return [PeftTriple(layer, adapter, _label(name, layer), allow_dropout) for name, layer in layers]


def _adapters(module: BaseTunerLayer) -> set[str]:
    held = ("lora_A", "lora_embedding_A")
    return {adapter for attribute in held for adapter in getattr(module, attribute, {})}


def _refusal(layer: lora.LoraLayer, adapter: str, allow_dropout: bool) -> str | None:
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if type(layer) not in SUPPORTED:
        supported = ", ".join(cls.__name__ for cls in SUPPORTED)
        return (
            f"it is a {kind} (a quantized base, or another method than LoRA). W can be moved in lora.{supported} on "
            "a base in 16 or 32 bits"
        )
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        return f"its branch is a LoRA variant ({variant}), which is not scaling * B @ A: use plain LoRA"
    if getattr(layer.get_base_layer(), "groups", 1) != 1:
        return "its convolution has groups, for which scaling * B @ A is no change of W: leave it out of target_modules"
    problems = [] if allow_dropout else _dropout_problems(layer, adapter)
    return problems[0] if problems else None


def _dropout_problems(layer: lora.LoraLayer, adapter: str) -> list[str]:
    dropout = layer.lora_dropout[adapter]
    if not isinstance(dropout, nn.Dropout) or dropout.p == 0:
        return []
    return [
        f"it has lora_dropout={dropout.p:g}, with which the gradients of W and of the product A @ B differ "
        "(section 4.2 of the paper): set lora_dropout=0, or say allow_dropout=True for an ablation"
    ]


def _warn_about_companions(layers: list[tuple[str, lora.LoraLayer]], adapter: str) -> None:
    others = {other for _, layer in layers for other in _adapters(layer)} - {adapter}
    if others:
        warnings.warn(
            f"adapters {', '.join(sorted(others))} sit on the same weights as {adapter!r}, which will move: they "
            "were made for weights that did not",
            stacklevel=4,
        )


def _label(name: str, layer: lora.LoraLayer) -> str:
    # Wrappers of several parameters of one module are nested: "experts", "experts.base_layer".
    return f"{name}.{layer.parameter_name}" if isinstance(layer, lora.ParamWrapper) else name


def _weight_path(layer: lora.LoraLayer) -> str:
    depth, inside = 0, layer
    while hasattr(inside, "base_layer"):
        depth, inside = depth + 1, inside.base_layer
    attribute = layer.parameter_name if isinstance(layer, lora.ParamWrapper) else "weight"
    return ".".join(["base_layer"] * depth + [attribute])


def _layout(layer: lora.LoraLayer) -> str:
    if isinstance(layer, lora.ParamWrapper):
        if layer.get_param().dim() == 2:
            return "linear"
        # PEFT tells (e, out, in) from (e, in, out) by this flag; to a single expert it adds B @ A as it is.
        swapped = layer._did_swap_in_out_features or layer.num_experts == 1
        return "experts" if swapped else "transposed_experts"
    if isinstance(layer, lora.Embedding):
        return "embedding"
    if isinstance(layer, CONVOLUTIONS):
        return "conv"
    return "transposed" if layer.fan_in_fan_out else "linear"
