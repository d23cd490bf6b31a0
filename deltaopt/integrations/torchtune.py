"""torchtune: a layer multiplies its branch by alpha / rank; ``lora_b`` is our A, ``lora_a`` is our B."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from deltaopt.base_hooks import Absence, OutputHook, hook_of
from deltaopt.integrations.layer_triple import (
    OWN_PROTOCOL,
    LayerTriple,
    dropout_problems,
    first_of,
    named_layers,
    survey_of,
)
from deltaopt.integrations.survey import Survey
from deltaopt.triple import LoRATriple

UNMERGE = "load the weights again into a model that was not merged"

HEADLINE = "these torchtune layers cannot be used"


def survey(model: nn.Module, adapter: str, allow_dropout: bool, attach: bool) -> Survey:
    """Return every layer of torchtune with a branch; see `deltaopt.integrations.LIBRARIES`."""
    found = survey_of(_layers(model), _refusal, _triples, allow_dropout)
    if attach and not found.refused:
        for triple in found.triples:
            assert isinstance(triple, TorchtuneTriple)
            triple.attach()
    return found


def _layers(model: nn.Module) -> dict[str, Any]:
    return named_layers(model, _classes("LoRALinear", "DoRALinear"))


def _triples(name: str, layer: Any, allow_dropout: bool) -> list[LoRATriple]:
    return [TorchtuneTriple(layer, name, allow_dropout)]


class TorchtuneTriple(LayerTriple):
    """A triple of one LoRALinear of torchtune.

    Args:
        layer: torchtune's.
        name: of the triple.
        allow_dropout: see `find_triples`.
    """

    def __init__(self, layer: Any, name: str, allow_dropout: bool) -> None:
        super().__init__(
            layer,
            (layer, "lora_b.weight"),
            (layer, "lora_a.weight"),
            name=name,
            dropout="dropout",
            unmerge=UNMERGE,
            allow_dropout=allow_dropout,
            scaling=layer.alpha / layer.rank,
            set_scaling=partial(_set_scaling, layer),
        )

    def attach(self) -> None:
        """Put the hook on the layer that leaves the movement of W out where the branch is disabled."""
        hook = hook_of(self.layer, DisabledHook, "")
        if hook is None:
            hook = DisabledHook(self.layer, "", self.view, self.label)
            hook.put_on()
        self.output_hook = hook

    def scaling_problems(self) -> list[str]:
        """Say if the layer's alpha / rank is another number than `branch_scaling`."""
        now = self.layer.alpha / self.layer.rank
        if math.isclose(now, self.branch_scaling, rel_tol=1e-9):
            return []
        return [
            f"alpha / rank was {self.branch_scaling:g} when it was registered or last set and is {now:g} now: put "
            "alpha back, or build the triple and the optimizer again"
        ]

    def _scaling_of_copies(self) -> tuple[nn.Module, Callable[[nn.Module, float], object]]:
        return self.layer, _rescale


class DisabledHook(OutputHook):
    """The hook that leaves the movement of W out in torchtune's ``disable_adapter(model)``."""

    def absence(self, module: nn.Module, arguments: Mapping[str, Any]) -> Absence:
        """Tell if the layer's branch is disabled."""
        return bool(getattr(module, "disabled", False))

    def holder(self, module: nn.Module) -> tuple[nn.Module, str]:
        """Return the layer itself."""
        return module, "weight"


def _set_scaling(layer: Any, value: float) -> None:
    layer.alpha = value * layer.rank


def _rescale(layer: Any, ratio: float) -> None:
    layer.alpha *= ratio


def _classes(*names: str) -> tuple[Any, ...]:
    """Return classes of torchtune, as far as this version has them."""
    library = sys.modules["torchtune.modules.peft"]
    return tuple(getattr(library, name) for name in names if hasattr(library, name))


def _refusal(layer: Any, allow_dropout: bool) -> str | None:
    (plain,) = _classes("LoRALinear")
    if not isinstance(layer, plain):
        return (
            f"{type(layer).__name__} divides by the norm of W and the branch together, so that W and A @ B have "
            "gradients of their own: use LoRALinear"
        )
    if type(layer).forward is not plain.forward:
        return f"{type(layer).__name__} has a forward pass of its own (QATLoRALinear rounds W in it): {OWN_PROTOCOL}"
    if layer.weight.requires_grad:
        return (
            "its weight still requires grad: call torchtune.modules.peft.set_trainable_params(model, "
            "get_adapter_params(model)) first"
        )
    return first_of([] if allow_dropout else dropout_problems(layer.dropout, "dropout"))
