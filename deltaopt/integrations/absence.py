"""Why a model has no LoRA layer to train, and what to do about it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping

from torch import nn

from deltaopt.messages import names
from deltaopt.modules import class_of


def why_none(model: nn.Module, adapter: str, libraries: Mapping[str, str]) -> str:
    """Say why nothing was found.

    Args:
        model: in which nothing was found.
        adapter: the adapter that was looked for.
        libraries: by the module of each library, ours that reads its layers.
    """
    for library, integration in libraries.items():
        if library in sys.modules:
            explain = getattr(importlib.import_module(integration), "why_none", None)
            reason = None if explain is None else explain(model, adapter)
            if reason is not None:
                return f"no LoRA layer to train in this {class_of(model).__name__}: {reason}"
    return f"no LoRA layer in this {class_of(model).__name__}: {_unknown(model)}"


def _unknown(model: nn.Module) -> str:
    branches = {name: module for name, module in model.named_modules() if _looks_like_a_branch(module)}
    if branches:
        kinds = sorted({class_of(module).__name__ for module in branches.values()})
        return (
            f"{names(list(branches))} of class {', '.join(kinds)} look{'s' * (len(branches) == 1)} like LoRA, but the "
            "class is not known here. Register LoRATriple(W, A, B, scaling=alpha / r) by hand, or give the class a "
            "method lora_triples(self)"
        )
    return (
        "add the branches first: with PEFT get_peft_model(model, LoraConfig(...)), or model.add_adapter(LoraConfig"
        "(...)) in transformers and diffusers. (After merge_and_unload() and unload() none is left: take the model "
        "from before.) Or register LoRATriple(W, A, B, scaling=alpha / r) by hand"
    )


def _looks_like_a_branch(module: nn.Module) -> bool:
    held = {name.lower() for name in (*module._parameters, *module._modules)}
    return {"lora_a", "lora_b"} <= held
