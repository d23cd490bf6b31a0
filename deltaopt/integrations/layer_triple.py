"""One layer of a LoRA library as a triple: what the layer itself says of dropout, merging and its own weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from deltaopt.factors import FactorSource
from deltaopt.integrations.protocol import describes_itself
from deltaopt.integrations.survey import Survey
from deltaopt.messages import Problem
from deltaopt.modules import modules_of
from deltaopt.naming import names_without_wrappers
from deltaopt.scaling import ScalingSource, SetScaling
from deltaopt.triple import LoRATriple

OWN_PROTOCOL = "register LoRATriple(W, A, B, scaling=alpha / r) by hand, or give the class a method lora_triples(self)"
"""The way out for a class that is not known, or computes in a way of its own."""


class LayerTriple(LoRATriple):
    """A triple of one layer, which is asked for dropout and for merging at every step.

    Args:
        layer: that has the branch.
        A: see `LoRATriple`.
        B: see `LoRATriple`.
        weight: the path of W in the layer.
        name: of the triple.
        dropout: the name of the attribute that is applied to the branch's input.
        unmerge: what to do where the branch is merged into W.
        allow_dropout: see `find_triples`.
        scaling: see `LoRATriple`.
        layout: see `LoRATriple`.
        rows: see `LoRATriple`.
        set_scaling: see `LoRATriple`.
    """

    def __init__(
        self,
        layer: nn.Module,
        A: FactorSource,
        B: FactorSource,
        *,
        weight: str = "weight",
        name: str,
        dropout: str,
        unmerge: str,
        allow_dropout: bool,
        scaling: ScalingSource,
        layout: str = "linear",
        rows: tuple[int, int] | None = None,
        set_scaling: SetScaling | None = None,
    ) -> None:
        self.layer: Any = layer
        self._dropout_name, self._unmerge, self._allow_dropout = dropout, unmerge, allow_dropout
        super().__init__(
            (layer, weight), A, B, scaling=scaling, name=name, layout=layout, rows=rows, set_scaling=set_scaling
        )

    def merge_problems(self) -> list[str]:
        """Say if the branch is in W already."""
        if not getattr(self.layer, "merged", False):
            return []
        return [f"the branch is merged into W, so that what trains is not what W holds: {self._unmerge}"]

    def branch_problems(self) -> list[str]:
        """Say if the branch was merged, rescaled or given dropout since it was registered."""
        allowed = self._allow_dropout and not self.folded
        found = super().branch_problems()
        return found or ([] if allowed else dropout_problems(*self._dropout()))

    def folding_problems(self) -> list[str]:
        """Say what W would do and a folded branch does not, or the other way round."""
        return [*super().folding_problems(), *folded_dropout_problems(*self._dropout())]

    def _dropout(self) -> tuple[object, str]:
        return getattr(self.layer, self._dropout_name, None), self._dropout_name


def dropout_problems(dropout: object, attribute: str) -> list[str]:
    """Say that a branch has dropout; empty if it has none.

    Args:
        dropout: what is applied to the branch's input.
        attribute: what its library calls it.
    """
    if not isinstance(dropout, nn.Dropout) or dropout.p == 0:
        return []
    return [
        f"it has {attribute}={dropout.p:g}, with which the gradients of W and of the product A @ B differ "
        f"(section 4.2 of the paper): set {attribute}=0, or pass allow_dropout=True for an ablation"
    ]


def folded_dropout_problems(dropout: object, attribute: str) -> list[str]:
    """Say that a branch has dropout, which cannot be folded even for an ablation; arguments as `dropout_problems`."""
    if not dropout_problems(dropout, attribute):
        return []
    return [
        f'it has {attribute}, which weight_update="folded" would apply to what W moves by too: set {attribute}=0, or '
        'use weight_update="in_place" with allow_dropout=True'
    ]


def survey_of(
    layers: Mapping[str, Any],
    refusal: Callable[[Any, bool], str | None],
    triples: Callable[[str, Any, bool], Iterable[LoRATriple]],
    allow_dropout: bool,
) -> Survey:
    """Return what the layers of a library are.

    Args:
        layers: by name.
        refusal: ``refusal(layer, allow_dropout)`` says why a layer cannot be used; None if it can.
        triples: ``triples(name, layer, allow_dropout)`` gives those of a layer that can.
        allow_dropout: see `find_triples`.
    """
    reasons = {name: refusal(layer, allow_dropout) for name, layer in layers.items()}
    refused = {name: why for name, why in reasons.items() if why is not None}
    return Survey(
        triples=[
            t for name, layer in layers.items() if name not in refused for t in triples(name, layer, allow_dropout)
        ],
        refused=[Problem(name, why) for name, why in refused.items()],
        elsewhere=[],
        layers=list(layers.values()),
        refused_layers=[layers[name] for name in refused],
    )


def first_of(*problems: list[str]) -> str | None:
    """Return the first sentence of these lists; None if all are empty."""
    return next((sentence for found in problems for sentence in found), None)


def named_branches(model: nn.Module, kinds: Any) -> dict[str, nn.Module]:
    """Return those `named_layers` that have a branch: the classes of loralib and litgpt make none for a rank of 0."""
    return {name: layer for name, layer in named_layers(model, kinds).items() if hasattr(layer, "lora_A")}


def named_layers(model: nn.Module, kinds: Any) -> dict[str, nn.Module]:
    """Return by name the modules of these classes that do not describe themselves; the model itself by its class."""
    found = {
        name: module
        for name, module in modules_of(model).items()
        if isinstance(module, kinds) and not describes_itself(module)
    }
    names = names_without_wrappers(model, found)
    return {names[name] or type(module).__name__: module for name, module in found.items()}
