"""AdaLoRA: layers whose branch is P diag(E) Q * scaling / (rank + 1e-5); in PEFT P is lora_B, E lora_E, Q lora_A.

PEFT's budget, ``model.base_model.update_and_allocate(step)`` after each step, sets entries of E to zero. W follows the
product with these entries masked: the next move counts from where the last one ended.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig
from peft.tuners.adalora import SVDLinear
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn

from deltaopt.factors import Factor, FactorSource
from deltaopt.integrations.peft.triple import PeftTriple
from deltaopt.lowrank import LowRank
from deltaopt.random_starts import put_normal_

LAYERS = (SVDLinear,)
"""The layers of AdaLoRA whose W can be moved."""

SHARED_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "trainable_token_indices",
)
"""The fields of a config that mean the same in AdaLoRA and in LoRA. AdaLoRA has LoRA's other ones and ignores them."""


def is_adalora(layer: nn.Module) -> bool:
    """Tell if a layer is one of AdaLoRA."""
    return isinstance(layer, AdaLoraLayer)


def is_adalora_config(config: object) -> bool:
    """Tell if a config is one of AdaLoRA."""
    return isinstance(config, AdaLoraConfig)


def has_rank(layer: Any, adapter: str) -> bool:
    """Tell if anything is left of an adapter: PEFT loads a layer whose budget was taken away with a rank of 0."""
    return not is_adalora(layer) or adapter not in layer.lora_E or bool(layer.lora_E[adapter].numel())


class AdaLoraTriple(PeftTriple):
    """A triple of one AdaLoRA layer: A is P, and B is diag(E) Q."""

    _tolerance = 1e-5  # a cast of the model rounds the number 1e-5 in what the layer divides by
    follows_between_steps = True
    _known_divisor: tuple[object, float] | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if options.get("attach", True):
            # PEFT freezes it, and then casts it into a new parameter that trains where the base is not in float32.
            self.layer.ranknum[self.adapter].requires_grad_(False)

    def _sources_of_factors(self) -> tuple[FactorSource, FactorSource]:
        """Return where A is in the layer, and what B is computed from."""
        E, Q = (self.layer, f"lora_E.{self.adapter}"), (self.layer, f"lora_A.{self.adapter}")
        return (self.layer, f"lora_B.{self.adapter}"), Factor(scaled_rows, E, Q, assign=put_scaled_rows)

    def _present_scaling(self) -> float | None:
        """Return what the layer multiplies the branch by; None where the adapter was deleted."""
        scaling = self.layer.scaling.get(self.adapter)
        return None if scaling is None else scaling / self._divisor()

    def _divisor(self) -> float:
        """Return what the layer divides the branch by. On a device it is read again only where it was replaced."""
        rank: Tensor = self.layer.ranknum[self.adapter]
        if rank.device.type == "cpu":
            return divisor_of(self.layer, self.adapter)
        seen = id(rank), rank._version, rank.data_ptr(), rank.dtype
        if self._known_divisor is None or self._known_divisor[0] != seen:
            self._known_divisor = seen, divisor_of(self.layer, self.adapter)
        return self._known_divisor[1]

    def scaling_problems(self) -> list[str]:
        """Say if the layer's scaling is another one than `branch_scaling`; that of a branch without a rank is none."""
        return super().scaling_problems() if has_rank(self.layer, self.adapter) else []

    def _setter(self) -> Callable[[Any, float], None]:
        return partial(set_divided_scaling, self.adapter)

    def _scaling_of_copies(self) -> tuple[nn.Module, Callable[[nn.Module, float], object]]:
        return self.layer, partial(_rescale, self.adapter)

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> bool:
        """Write the start that PEFT gives an AdaLoRA layer: E zero, P and Q normal with a deviation of 0.02."""
        for parameter in (self.layer.lora_B[self.adapter], self.layer.lora_A[self.adapter]):
            put_normal_(parameter, 0.02, generator)
        self.layer.lora_E[self.adapter].zero_()
        return True

    def folding_problems(self) -> list[str]:
        """Say what W would do and a folded branch does not; the orthogonality loss does not pass the branch."""
        found = super().folding_problems()
        weights = [getattr(configs[self.adapter], "orth_reg_weight", 0.0) for configs in self._configs]
        if any(weights):
            found.append(
                f"AdaLoRA's orthogonality loss (orth_reg_weight={max(weights):g}) reaches lora_A and lora_B past the "
                "branch, so that its gradient is no larger in a scaled branch and must not be divided: use "
                'weight_update="in_place", or orth_reg_weight=0'
            )
        return found


def as_lora(config: LoraConfig) -> LoraConfig:
    """Return the config of a plain LoRA adapter for the layers of one of AdaLoRA; its ranks are to be set."""
    return LoraConfig(**{field: getattr(config, field) for field in SHARED_FIELDS if hasattr(config, field)})


def no_change(layer: Any) -> LowRank:
    """Return zeros as the change of a layer."""
    W = layer.get_base_layer().weight
    dtype = torch.promote_types(W.dtype, torch.float32)
    return LowRank(
        torch.zeros(layer.out_features, 1, dtype=dtype, device=W.device),
        torch.zeros(1, layer.in_features, dtype=dtype, device=W.device),
    )


def scaled_rows(E: Tensor, Q: Tensor) -> Tensor:
    """Return diag(E) Q, for E (r, 1) and Q (r, d), with the bits of PEFT's forward pass."""
    return Q * E


def put_scaled_rows(value: Tensor, E: Tensor, Q: Tensor) -> None:
    """Write E and Q so that diag(E) Q is `value`."""
    Q.copy_(value)
    E.fill_(1.0)


def divisor_of(layer: Any, adapter: str) -> float:
    """Return what a layer divides its branch by."""
    rank = layer.ranknum[adapter].detach()
    if rank.is_meta:  # no weights are loaded yet: the budget is whole
        return float(layer.r[adapter]) + 1e-5
    return float(rank + 1e-5)


def set_divided_scaling(adapter: str, layer: Any, value: float) -> None:
    """Let a layer multiply its branch by `value`, after it has divided by its rank."""
    layer.scaling[adapter] = layer.lora_alpha[adapter] = value * divisor_of(layer, adapter)


def _rescale(adapter: str, layer: Any, ratio: float) -> None:
    layer.scaling[adapter] = layer.lora_alpha[adapter] = layer.scaling[adapter] * ratio
