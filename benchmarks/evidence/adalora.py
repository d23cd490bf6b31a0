"""AdaLoRA as PEFT has it, run by the loop of all methods: its budget, and its orthogonality term as a part of the loss.

PEFT's branch adds alpha / r * P diag(E) Q, with r the first rank for all of the run. P is its lora_B, Q its lora_A.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, AdaLoraModel
from torch import Tensor, nn

from benchmarks.evidence.adapters import ADAPTER, adapted_names, random_numbers, train_only
from benchmarks.evidence.setting import Setting
from deltaopt import LoRATriple
from deltaopt.analysis import LayerChange, layer_changes

TINIT, TFINAL, DELTA_T = 0.1, 0.5, 0.01
"""Shares of the run: before the budget shrinks, after it has shrunk, and between two allocations."""


class AdaLora:
    """AdaLoRA on the query and value projections, from `setting.rank` down to three quarters of it on average.

    Args:
        setting: of the run.
        model: gets the layers; they and the head train.

    Raises:
        ValueError: for rank 1, of which no budget can be taken.
    """

    def __init__(self, setting: Setting, model: nn.Module) -> None:
        if setting.rank < 2:
            raise ValueError(f"{setting.row}: AdaLoRA goes down from rank r to 3/4 r, so give rank=2 at least, got 1")
        names = adapted_names(model)
        config = AdaLoraConfig(
            init_r=setting.rank,
            target_r=setting.rank * 3 // 4,
            tinit=round(TINIT * setting.steps),
            tfinal=round(TFINAL * setting.steps),
            deltaT=max(1, round(DELTA_T * setting.steps)),
            total_step=setting.steps,
            lora_alpha=setting.alpha,
            lora_dropout=setting.dropout,
            target_modules=names,
        )
        with torch.random.fork_rng(devices=[]):
            self.tuner = AdaLoraModel(model, config, ADAPTER)
        self.config = config
        self.layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        self._put_start(random_numbers(setting, "factors"))
        train_only(model, (p for layer in self.layers.values() for p in _parameters(layer)))
        self._masks: list[Tensor] | None = None

    def after_step(self, step: int) -> None:
        """Update the importance of each rank from the gradients, and take what is over the budget."""
        if step <= self.config.total_step - self.config.tfinal:
            self.tuner.update_and_allocate(step)
        else:
            self._keep_allocation()

    def orthogonality(self) -> Tensor:
        """Return PEFT's term: the mean of ||P^T P - I|| and ||Q Q^T - I|| over all P and Q, times its weight.

        Matrices of one shape are computed together, in float32 in autocast too.
        """
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for layer in self.layers.values():
            P, _, Q = _parameters(layer)
            for rows in (P.mT, Q):
                by_shape[rows.shape].append(rows)
        norms = []
        for matrices in by_shape.values():
            stack = torch.stack(matrices)
            identity = torch.eye(stack.shape[1], dtype=stack.dtype, device=stack.device)
            with torch.autocast(stack.device.type, enabled=False):
                norms.append(torch.linalg.matrix_norm(stack @ stack.mT - identity))
        term: Tensor = self.config.orth_reg_weight * torch.cat(norms).mean()
        return term

    def changes(self) -> list[LayerChange]:
        """Return how far each layer went."""
        triples = []
        for name, layer in self.layers.items():
            P, E, Q = (p.detach() for p in _parameters(layer))
            scaling = layer.scaling[ADAPTER] / float(layer.ranknum[ADAPTER] + 1e-5)
            triples.append(LoRATriple(layer.base_layer.weight, P, E * Q, scaling, name))
        return layer_changes(triples)

    def state(self) -> dict[str, Any]:
        """Return what the allocator knows."""
        allocator = self.tuner.rankallocator
        return {
            "scores": [dict(allocator.ipt), dict(allocator.exp_avg_ipt), dict(allocator.exp_avg_unc)],
            "pattern": self.config.rank_pattern,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` has returned."""
        allocator, device = self.tuner.rankallocator, next(iter(self.layers.values())).base_layer.weight.device
        allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc = (
            {name: score.to(device) for name, score in scores.items()} for scores in state["scores"]
        )
        self.config.rank_pattern = state["pattern"]
        self._masks = None

    @torch.no_grad()
    def _put_start(self, generator: torch.Generator) -> None:
        """Write AdaLoRA's start, as PEFT does: E is zero, P and Q are normal with a deviation of 0.02."""
        for layer in self.layers.values():
            P, E, Q = _parameters(layer)
            E.zero_()
            for factor in (P, Q):
                factor.copy_(torch.empty(factor.shape).normal_(0.0, 0.02, generator=generator))

    @torch.no_grad()
    def _keep_allocation(self) -> None:
        """Set to zero what the final budget has left out.

        PEFT does the same, and copies its lists to the device at every step.
        """
        values = [layer.lora_E[ADAPTER] for layer in self.layers.values()]
        if self._masks is None:
            self._masks = self._as_masks(self.config.rank_pattern, values)
        torch._foreach_mul_(values, self._masks)

    def _as_masks(self, pattern: dict[str, list[bool]], values: Sequence[Tensor]) -> list[Tensor]:
        kept = [pattern[f"{name}.lora_E.{ADAPTER}"] for name in self.layers]
        return [torch.tensor(rows).view_as(E).to(E) for rows, E in zip(kept, values, strict=True)]


def _parameters(layer: Any) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """Return P (c, r), E (r, 1) and Q (r, d)."""
    return layer.lora_B[ADAPTER], layer.lora_E[ADAPTER], layer.lora_A[ADAPTER]
