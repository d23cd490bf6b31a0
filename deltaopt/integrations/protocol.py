"""Modules that describe their LoRA branches themselves: any class with a method ``lora_triples(self)``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from deltaopt.integrations.survey import Survey
from deltaopt.messages import Problem
from deltaopt.naming import names_without_wrappers
from deltaopt.triple import LoRATriple

METHOD = "lora_triples"
HEADLINE = f"these layers cannot be used, as their {METHOD}() says"


def describes_itself(module: nn.Module) -> bool:
    """Tell if the class of a module has the method; wrappers that hand attributes on do not count."""
    return callable(getattr(type(module), METHOD, None))


def survey(model: nn.Module, errors: tuple[type[Exception], ...]) -> Survey:
    """Ask every module of a model that describes itself; the triples are named as the modules.

    Args:
        model: with such modules.
        errors: those that are the answer of a module; others are raised, as TypeError for a method that returns
            something else than triples.
    """
    found = {name: module for name, module in model.named_modules() if describes_itself(module)}
    names = names_without_wrappers(model, found)
    asked = Survey([], [], [], list(found.values()), [])
    for name, module in found.items():
        label = names[name] or type(module).__name__
        try:
            asked.triples.extend(_named(label, names[name], _asked(label, module)))
        except errors as error:
            asked.refused.append(Problem(label, str(error)))
            asked.refused_layers.append(module)
    return asked


def _asked(label: str, module: Any) -> list[LoRATriple]:
    given = module.lora_triples()
    listed = list(given) if isinstance(given, Iterable) else [given]
    wrong = [triple for triple in listed if not isinstance(triple, LoRATriple)]
    if wrong:
        raise TypeError(
            f"{label}: {METHOD}() of {type(module).__name__} returns an iterable of LoRATriple, got {wrong[0]!r}"
        )
    return listed


def _named(label: str, prefix: str, triples: list[LoRATriple]) -> list[LoRATriple]:
    parts = [triple.name or "" for triple in triples]
    if any(count > 1 for count in Counter(parts).values()):
        raise ValueError(
            f"its {len(triples)} triples need names that tell them apart, LoRATriple(..., name='q'), got {parts}"
        )
    named = [
        triple.named(".".join(filter(None, (prefix, part))) or label)
        for triple, part in zip(triples, parts, strict=True)
    ]
    for triple in named:
        if triple.output_hook is not None:
            triple.output_hook.label = triple.label
    return named
