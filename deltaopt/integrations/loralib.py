"""loralib: its layers hold W, A, B and the scaling themselves, and merge the branch into W in evaluation.

loralib's ``lora_B`` is our A, and its ``lora_A`` is our B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import loralib
from torch import Tensor, nn

from deltaopt.factors import Factor
from deltaopt.integrations.layer_triple import (
    OWN_PROTOCOL,
    LayerTriple,
    dropout_problems,
    first_of,
    named_branches,
    survey_of,
)
from deltaopt.integrations.survey import Survey
from deltaopt.messages import layers, warn_user
from deltaopt.triple import LoRATriple

KNOWN: tuple[Any, ...] = (loralib.Linear, loralib.Embedding, loralib.MergedLinear, loralib.ConvLoRA)

UNMERGE = (
    "loralib's eval() did that, and train() takes it out again: call model.train() before steps and before saving "
    "(merge_weights=False keeps a layer from merging)"
)

HEADLINE = "these loralib layers cannot be used"


def survey(model: nn.Module, adapter: str, allow_dropout: bool, attach: bool) -> Survey:
    """Return every layer of loralib with a branch; see `deltaopt.integrations.LIBRARIES`."""
    layers = named_branches(model, loralib.LoRALayer)
    found = survey_of(layers, _refusal, _triples, allow_dropout)
    if attach and not found.refused:
        _warn_of_rounding(layers)
    return found


def _triples(name: str, layer: Any, allow_dropout: bool) -> Iterator[LoRATriple]:
    make = partial(
        LayerTriple,
        layer,
        dropout="lora_dropout",
        unmerge=UNMERGE,
        allow_dropout=allow_dropout,
        scaling=(layer, "scaling"),
    )
    A, B = (layer, "lora_B"), (layer, "lora_A")
    if isinstance(layer, loralib.ConvLoRA):
        yield make(A, B, name=name, weight="conv.weight", layout="conv_in_order")
    elif isinstance(layer, loralib.Embedding):
        yield make(A, B, name=name, layout="embedding")
    elif isinstance(layer, loralib.MergedLinear):
        make = partial(make, layout="transposed" if layer.fan_in_fan_out else "linear")
        parts = [part for part, enabled in enumerate(layer.enable_lora) if enabled]
        out = layer.out_features // len(layer.enable_lora)
        for i, part in enumerate(parts):
            yield make(
                Factor.rows(A, i * out, (i + 1) * out),
                Factor.rows(B, i * layer.r, (i + 1) * layer.r),
                name=f"{name}.{part}",
                rows=(part * out, (part + 1) * out),
            )
    else:
        yield make(A, B, name=name, layout="transposed" if layer.fan_in_fan_out else "linear")


def _refusal(layer: Any, allow_dropout: bool) -> str | None:
    if not isinstance(layer, KNOWN):
        return f"{type(layer).__name__} is no class of loralib itself: {OWN_PROTOCOL}"
    if type(layer).forward not in {kind.forward for kind in KNOWN}:
        return f"{type(layer).__name__} has a forward pass of its own: {OWN_PROTOCOL}"
    found = _conv_problems(layer) if isinstance(layer, loralib.ConvLoRA) else []
    if getattr(layer, "max_norm", None) is not None:
        found.append(
            "it has max_norm, with which loralib's forward pass rewrites lora_A as well as W: build it without max_norm"
        )
    return first_of(found, [] if allow_dropout else dropout_problems(layer.lora_dropout, "lora_dropout"))


def _warn_of_rounding(found: Mapping[str, Any]) -> None:
    merging = [name for name, layer in found.items() if layer.merge_weights and _weight(layer).dtype.itemsize == 2]
    if merging:
        warn_user(
            f"{layers(merging)} merge their branch into W in evaluation and take it out again in training, which "
            "rounds a W of 16 bits twice each time and loses what it has moved by in small steps: set "
            "layer.merge_weights = False for training; the output in evaluation is the same"
        )


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.conv.weight if isinstance(layer, loralib.ConvLoRA) else layer.weight
    return weight


def _conv_problems(layer: Any) -> list[str]:
    conv, A, B = layer.conv, layer.lora_B, layer.lora_A
    if conv.groups != 1:
        return [f"it is a {type(conv).__name__} with groups={conv.groups}, and a product A @ B moves W as a whole"]
    if A.shape[0] * B.shape[1] != conv.weight.numel():
        return [
            f"it is a {type(conv).__name__} with kernel_size={conv.kernel_size}: loralib views the product of its "
            f"factors, ({A.shape[0]}, {B.shape[1]}), as W's {tuple(conv.weight.shape)}, which fits square kernels "
            "alone, so its own forward pass fails too"
        ]
    if not conv.weight.is_contiguous():
        return [
            "its weight is stored in channels_last, and loralib's product is no matrix over that order: call "
            "model.to(memory_format=torch.contiguous_format) first"
        ]
    return []
