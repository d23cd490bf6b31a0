"""Arguments of the optimizer in the wrong place: what was handed over instead, and the call that was meant."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from deltaopt.around import check_not_built_within

FOR_TRAINER = (
    "For Trainer's optimizer_cls_and_kwargs take (deltaopt.integrations.trainer.DeltaLoRAFactory, "
    '{"inner": torch.optim.AdamW, "lr": 2e-4, ...}), which builds the optimizer for its model'
)

FOR_MODEL = "DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=...)"

BY_TRIPLES = "DeltaLoRAOptimizer(torch.optim.AdamW, find_triples(model), lr=...)"


def check_call(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Raise TypeError for a call without triples, before Python complains about it with a message that leads nowhere.

    Another optimizer that builds this one is refused too.

    Args:
        arguments: of the constructor, by position; without any, as copies are made, nothing is checked.
        options: by name.
    """
    if not arguments:
        return
    check_not_built_within()
    inner = arguments[0]
    if isinstance(inner, (list, tuple, dict, Iterator)):
        raise TypeError(
            "DeltaLoRAOptimizer: the first argument is an optimizer class or a built optimizer, got a "
            f"{type(inner).__name__} (parameters, as for another optimizer). Write {FOR_MODEL}, or {BY_TRIPLES}. "
            f"{FOR_TRAINER}"
        )
    if isinstance(inner, nn.Module):
        raise TypeError(
            f"DeltaLoRAOptimizer: the first argument is an optimizer class or a built optimizer, got a model "
            f"({type(inner).__name__}). Write {FOR_MODEL}"
        )
    if len(arguments) == 1 and "triples" not in options:
        raise TypeError(f"DeltaLoRAOptimizer: the triples are missing. Write {FOR_MODEL}, or {BY_TRIPLES}")


def check_inner(inner: object) -> None:
    """Raise TypeError for an inner optimizer that is none, steps copies of A and B, or would move W too."""
    kind = type(inner).__name__
    if type(inner).__module__.startswith("deepspeed") and not isinstance(inner, Optimizer):
        raise TypeError(
            f"inner is a {kind}: DeepSpeed's optimizers step flattened copies of A and B, which W cannot follow. Train "
            "without ZeRO, for example with DDP or FSDP2"
        )
    if not callable(inner) and not isinstance(inner, Optimizer):
        raise TypeError(
            f"inner is an optimizer class or a built torch.optim.Optimizer, got a {kind}: write torch.optim.AdamW, not "
            f"{reprlib.repr(inner)}"
        )
    if isinstance(inner, Optimizer) and hasattr(inner, "triples"):
        raise TypeError(
            "inner is a DeltaLoRAOptimizer already, which would move W twice: wrap its `inner`, or use "
            "add_param_group for more triples"
        )
    if isinstance(inner, type) and issubclass(inner, Optimizer) and hasattr(inner, "for_model"):
        raise TypeError(
            f"inner is the class {inner.__name__} itself, which would move W twice. Give the class of the optimizer "
            "that trains A and B, such as torch.optim.AdamW"
        )


def check_triples(triples: object) -> None:
    """Raise TypeError for a model in the place of triples."""
    if isinstance(triples, nn.Module):
        raise TypeError(
            f"triples is a list of triples, got a model ({type(triples).__name__}). Write {FOR_MODEL}, or {BY_TRIPLES}"
        )


def check_params(params: object) -> None:
    """Raise TypeError for what is no list in the place of what else trains."""
    if isinstance(params, nn.Module):
        raise TypeError(
            f"params is a list of tensors or of param groups, got a model ({type(params).__name__}): write "
            "other_parameters(model, triples)"
        )
    if not isinstance(params, Iterable):
        raise TypeError(
            f"params, the third argument, is a list of tensors or of param groups, got {params!r}. Give options such "
            "as lr and update_ratio by name"
        )


def check_model(model: object, inner: object) -> None:
    """Raise TypeError for another first argument of `for_model` than a model, or no inner optimizer."""
    missing = [name for name, given in (("model", model), ("inner", inner)) if given is None]
    if missing:
        raise TypeError(
            f"for_model(model, inner, ...): {' and '.join(missing)} missing. The model is one with LoRA layers, "
            f"`inner` an optimizer class such as torch.optim.AdamW. {FOR_TRAINER}"
        )
    if not isinstance(model, nn.Module):
        what = model.__name__ if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(
            f"for_model(model, inner, ...): the first argument is the model with LoRA layers, got {what}. Write "
            f"{FOR_MODEL}; with triples of your own, DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=...)"
        )
