"""One PEFT layer and one of its adapters as a triple. PEFT's ``lora_B`` is our A, and its ``lora_A`` is our B."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import nn

from deltaopt.factors import FactorSource
from deltaopt.integrations.layer_triple import dropout_problems, folded_dropout_problems
from deltaopt.integrations.peft.moved_config import Configs, note_moved, prepare
from deltaopt.integrations.peft.output_hooks import hook_for, hooks_on
from deltaopt.integrations.peft.scaled_copies import factor_paths, set_scaling
from deltaopt.movement import Movement
from deltaopt.save_watch import SaveWatch, is_watched, leave
from deltaopt.scaling import holder_of
from deltaopt.triple import LoRATriple
from deltaopt.triple_tensors import Tensors

CONVOLUTIONS = (lora.Conv1d, lora.Conv2d, lora.Conv3d)


SUBTRACTING = ("pissa", "corda", "olora", "lora_ga")
"""The beginnings of the values of ``init_lora_weights`` for which PEFT takes the first A @ B out of W."""


class PeftTriple(LoRATriple):
    """A triple of one PEFT layer and one of its adapters, whose tensors are looked up at every step.

    Args:
        layer: PEFT's.
        adapter: the name of the adapter.
        name: of the triple.
        allow_dropout: see `find_triples`.
        start: ``init_lora_weights`` of the adapter's config.
        saves: watches the model for saves of the adapter alone.
        configs: the dicts with the adapter's config that are above the layer.
        attach: put the hook on the layer that an optimizer needs, and prepare the configs for a move. Without, the
            triple tells of the layer and leaves it as it is.
    """

    _tolerance = 1e-9  # of the scaling

    def __init__(
        self,
        layer: lora.LoraLayer,
        adapter: str,
        name: str,
        allow_dropout: bool = False,
        start: bool | str = True,
        saves: SaveWatch | None = None,
        configs: Sequence[Configs] = (),
        attach: bool = True,
    ) -> None:
        self.layer = layer
        self.adapter = adapter
        self._allow_dropout = allow_dropout
        self._start = start
        self._configs = configs
        self._alpha = layer.lora_alpha[adapter]
        super().__init__(
            (layer, _weight_path(layer)),
            *self._sources_of_factors(),
            scaling=self._present_scaling(),
            name=name,
            layout=_layout(layer),
        )
        self._set_scaling = self._setter()
        self.saves = saves
        if not attach:
            return
        for each in configs:
            prepare(each, adapter)
        self.layer_hook = hook_for(layer, adapter, holder_of(*self.W_source)[1], self.view, name)
        self.output_hook = self.layer_hook
        self.layer_hook.scale_copies()

    def _sources_of_factors(self) -> tuple[FactorSource, FactorSource]:
        """Return where A and B are in the layer."""
        A, B = factor_paths(self.layer, self.adapter)
        return (self.layer, A), (self.layer, B)

    def _present_scaling(self) -> Any:
        """Return what the layer multiplies the branch by; None where the adapter was deleted."""
        return self.layer.scaling.get(self.adapter)

    def _setter(self) -> Callable[[Any, float], None]:
        """Return a function of a layer and a scaling that lets this layer, or a copy, multiply the branch by that."""
        return partial(set_scaling, self.adapter, self._alpha / self.scaling)

    @property
    def longer_name(self) -> str:
        """The name with the adapter's: an optimizer may train several adapters of one layer."""
        return f"{self.label} ({self.adapter})"

    def took_from_base(self, tensors: Tensors) -> bool:
        """Tell if A and B are the start that PEFT has taken out of W: by PiSSA, CorDA, OLoRA or LoRA-GA."""
        return self._subtracts() and self._is_at_its_start(tensors)

    def has_moved(self) -> bool:
        """Tell if W has moved for this adapter, or for one whose movement the layer does not leave out by itself."""
        return has_moved(self.layer, self.adapter)

    def count_movement(self, movement: Movement) -> None:
        """Leave this movement of W out of the layer's output from now on, where this very adapter takes no part."""
        super().count_movement(movement)
        self.layer_hook.note_adapter()

    def weight_moves(self) -> None:
        """Let every save of the adapter alone warn, and its config say so: it leaves the movement of W out."""
        saves = self._watch_saves(self.layer, self.adapter)
        for configs in self._configs:
            note_moved(configs, self.adapter, saves)
        self.layer_hook.note_companions()

    def weight_rests(self) -> None:
        """Let saves of the adapter be: W is the base."""
        leave(self.layer, self.adapter)
        self.layer_hook.forget_companions()

    def branch_problems(self) -> list[str]:
        """Say if the branch was merged, rescaled or given dropout since it was registered."""
        allowed = self._allow_dropout and not self.folded
        return self.change_problems() or ([] if allowed else dropout_problems(*self._dropout()))

    def _dropout(self) -> tuple[object, str]:
        return self.layer.lora_dropout[self.adapter], "lora_dropout"

    def change_problems(self) -> list[str]:
        """Say why W and branch_scaling * A @ B are not what the layer computes with."""
        return self.merge_problems() or self.scaling_problems()

    def scaling_problems(self) -> list[str]:
        """Say if the layer's scaling is another one than `branch_scaling`."""
        now = self._present_scaling()
        if now is not None and math.isclose(
            now, self.branch_scaling, rel_tol=self._tolerance
        ):  # PEFT recomputes it from alpha
            return []
        when = "folded" if self.folded else "registered"
        return [
            f"its scaling was {self.branch_scaling:g} when it was {when} and is {now} now (set_scale, scale_layer): "
            "build the optimizer again, or put the scaling back"
        ]

    def _set_branch(self, value: float) -> None:
        self._set_scaling(self.layer, value)

    def _scaling_of_copies(self) -> tuple[nn.Module, Callable[[nn.Module, float], object]]:
        return self.layer, partial(_rescale, self.adapter, self._set_scaling)

    def folding_problems(self) -> list[str]:
        """Say what W would do and a folded branch does not, or the other way round."""
        found = []
        if getattr(self.layer.get_base_layer(), "max_norm", None) is not None:
            found.append(
                "its embedding has max_norm, which rewrites the rows of W in each forward pass, but not the branch's: "
                'use weight_update="in_place"'
            )
        found += folded_dropout_problems(*self._dropout())
        if self.layer.lora_bias.get(self.adapter, False):
            found.append(
                'its branch has a bias (lora_bias=True), which weight_update="folded" would scale as well: use '
                'weight_update="in_place"'
            )
        return found

    def pristine_problems(self, origin_known: bool) -> list[str]:
        """Say why the change of this layer since the pristine base is not known.

        Args:
            origin_known: what the start of A and B took out of the base was seen, or is in a loaded state.
        """
        if self._start == "loftq":
            return [
                "LoftQ has replaced its base weight by a quantized one, which is not the pristine one minus a product "
                "of low rank: save all weights, merge_and_unload().save_pretrained(directory)"
            ]
        if not self._subtracts():
            return []
        if str(self._start).lower() == "olora" and self.layout == "transposed":
            return [
                "PEFT's OLoRA takes A @ B out of a Conv1D's weight without transposing it, so W was another one than "
                "the branch belongs to: use another init_lora_weights"
            ]
        if origin_known:
            return []
        return [
            f"init_lora_weights={self._start!r} takes the start of A and B out of W, but what that was is not known: "
            "the adapter was trained before the optimizer was built (with rank 1 it cannot be known), or rebase() was "
            "called. Load the optimizer's "
            "state that was saved with the adapter, or save all weights, merge_and_unload().save_pretrained(directory)"
        ]

    def _subtracts(self) -> bool:
        # Embeddings and convolutions start as ever, whatever the config says.
        rewritten = isinstance(self.layer, (lora.Linear, lora.ParamWrapper))
        return rewritten and isinstance(self._start, str) and self._start.lower().startswith(SUBTRACTING)

    @torch.no_grad()
    def _is_at_its_start(self, tensors: Tensors) -> bool:
        """Tell if the columns of A are orthogonal, as at all of these starts. For rank 1 nothing is known.

        Those of a trained adapter that was loaded are not. PEFT then takes its own new start out of W, or none.
        """
        A = self.view.factors(tensors.W, tensors.A, tensors.B)[0].float()
        if A.shape[-1] == 1:
            return False
        lengths = A.norm(dim=-2)
        cosines = A.mT @ A / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)).clamp_min(1e-30)
        cosines.diagonal(dim1=-2, dim2=-1).zero_()
        dtypes = [tensor.dtype for tensor in (tensors.W, *tensors.stored)]  # PEFT computes the start in W's dtype
        coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
        return float(cosines.abs().max()) <= max(1e-3, 2 * coarsest)


def has_moved(layer: lora.LoraLayer, adapter: str) -> bool:
    """Tell if W has moved for an adapter, or for one whose movement the layer does not leave out by itself."""
    hooks = [hook for hook in hooks_on(layer) if hook.movement is not None]
    own = [hook.movement for hook in hooks if hook.adapter == adapter and not hook.is_replaced(layer)]
    if hooks:
        return any(movement is not None and movement.moved() for movement in own)
    return is_watched(layer)


def _rescale(adapter: str, set_scaling: Callable[[Any, float], None], layer: Any, ratio: float) -> None:
    set_scaling(layer, layer.scaling[adapter] * ratio)


def _weight_path(layer: lora.LoraLayer) -> str:
    depth, inside = 0, layer
    while hasattr(inside, "base_layer"):
        depth, inside = depth + 1, inside.base_layer
    attribute = layer.parameter_name if isinstance(layer, lora.ParamWrapper) else "weight"
    if not hasattr(inside, attribute):  # as in GPTQ, AWQ and AQLM, which have packed tensors of other names
        tensors = [*inside.named_parameters(), *inside.named_buffers()]
        attribute = next(name for name, tensor in tensors if not tensor.is_floating_point())
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
    return "transposed" if getattr(layer, "fan_in_fan_out", False) else "linear"
