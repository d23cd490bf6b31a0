"""Copies of an adapter whose branch is scaled: they have its factors as they train, and the alpha of its config.

TRL's trainers make such a "ref" of the adapter that trains on: they add an adapter with the config of the first and
copy the parameters. The config has the user's alpha, and the branch multiplies by more, so that the copy's branch has
to be scaled as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import nn

from deltaopt.scaling import holder_of
from deltaopt.stored_factors import StoredFactor


def scale_copies(layer: Any, new: Iterable[str], others: Iterable[str], label: str) -> bool:
    """Scale the branches of those new adapters that are copies of a scaled one; return True if there were any.

    Args:
        layer: PEFT's.
        new: adapters that were not looked at before.
        others: all adapters of the layer.
        label: names the layer in messages.
    """
    scaled = {name: hook for name in others if (hook := _stored(layer, name)) is not None and hook.factor != 1.0}
    found = False
    for name in new if scaled else ():
        if _stored(layer, name) is not None:
            continue
        first = layer.scaling[name]
        for other, hook in scaled.items():
            if math.isclose(first * hook.factor, layer.scaling[other], rel_tol=1e-9) and are_equal(layer, name, other):
                owner, attribute = holder_of(layer, factor_paths(layer, name)[0])
                own = StoredFactor(attribute, first, f"{label} ({name})")
                own.put_on(owner)
                set_scaling(name, layer.lora_alpha[name] / first, layer, layer.scaling[other])
                own.note(layer.scaling[name])
                found = True
                break
    return found


def factor_paths(layer: lora.LoraLayer, adapter: str) -> tuple[str, str]:
    """Return where A and B of an adapter are in its layer."""
    if isinstance(layer, lora.Embedding):
        return f"lora_embedding_B.{adapter}", f"lora_embedding_A.{adapter}"
    if isinstance(layer.lora_A, nn.ParameterDict):  # AdaLoRA
        return f"lora_B.{adapter}", f"lora_A.{adapter}"
    return f"lora_B.{adapter}.weight", f"lora_A.{adapter}.weight"


def set_scaling(adapter: str, alpha: float, layer: Any, value: float) -> None:
    """Set a layer's scaling, and its alpha, from which PEFT may compute the scaling again.

    Args:
        adapter: the name of the adapter.
        alpha: that belongs to a scaling of 1.
        layer: PEFT's.
        value: the scaling.
    """
    rounded = float(f"{alpha * value:.12g}")
    layer.scaling[adapter] = value
    layer.lora_alpha[adapter] = int(rounded) if rounded.is_integer() else rounded


def are_equal(layer: Any, one: str, other: str) -> bool:
    """Tell if two adapters of a layer have equal factors, and not only zeros."""
    found = [
        [attrgetter(path)(layer).detach() for path in paths]
        for paths in zip(factor_paths(layer, one), factor_paths(layer, other), strict=True)
    ]
    alike = all(a.device == b.device and torch.equal(a, b) for a, b in found)
    return alike and any(bool(a.any()) for a, _ in found)  # after a restart one of them is zero


def _stored(layer: Any, adapter: str) -> StoredFactor | None:
    return StoredFactor.on(*holder_of(layer, factor_paths(layer, adapter)[0]))
