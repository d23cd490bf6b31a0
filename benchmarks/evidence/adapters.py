"""LoRA on the query and value projections of a model: where it sits, how it starts, and how far it took each layer.

PEFT's layers are put into the model itself, without a wrapper around it, so that modules keep their names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.evidence.models import projections
from benchmarks.evidence.setting import Setting
from deltaopt import DeltaLoRAOptimizer, LoRATriple
from deltaopt.analysis import LayerChange, dense_changes, layer_changes

ADAPTER = "default"
HEADS = ("classifier", "score", "classification_head", "pre_classifier", "pooler")
"""What transformers calls a fresh head or a part of it, next to the pretrained model: of BERT and RoBERTa, Llama, BART,
DistilBERT, DeBERTa. BERT's pooler is a part of the pretrained model."""


def adapted_names(model: nn.Module) -> list[str]:
    """Return the names of the query and value projections, in the order of the model.

    Raises:
        ValueError: as `projections`.
    """
    found = projections(model)
    chosen = {*found["query"], *found["value"]}
    return [name for name, _ in model.named_modules() if name in chosen]


def train_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let these parameters and the fresh head train, and nothing else."""
    model.requires_grad_(False)
    for parameter in [*parameters, *head_parameters(model)]:
        parameter.requires_grad_(True)


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the fresh head; none of a language model."""
    return [p for name, module in model.named_children() if name in HEADS for p in module.parameters()]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def random_numbers(setting: Setting, purpose: str) -> torch.Generator:
    """Return a generator on the CPU, of its own for each purpose: the same numbers on every device."""
    digest = hashlib.sha256(f"{purpose} {setting.seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))


def add_lora(setting: Setting, model: nn.Module, *, alpha: float, rslora: bool = False) -> dict[str, Any]:
    """Put LoRA into the model; return its layers by name. They and the head train."""
    names = adapted_names(model)
    config = LoraConfig(
        r=setting.rank,
        lora_alpha=alpha,
        lora_dropout=setting.dropout,
        target_modules=names,
        use_rslora=rslora,
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws a start of its own, from the generator that dropout draws from
        inject_adapter_in_model(config, model, ADAPTER)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    generator = random_numbers(setting, "factors")
    for layer in layers.values():
        put_lora_start(layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight, generator)
    train_only(model, (p for layer in layers.values() for p in _factors(layer)))
    return layers


@torch.no_grad()
def put_lora_start(A: Tensor, B: Tensor, generator: torch.Generator) -> None:
    """Write LoRA's usual start: A (c, r) is zero, and B (r, d) uniform in +- 1 / sqrt(d)."""
    A.zero_()
    bound = B.shape[1] ** -0.5
    B.copy_(torch.empty(B.shape).uniform_(-bound, bound, generator=generator))


def lora_triples(layers: dict[str, Any]) -> list[LoRATriple]:
    """Return what PEFT's layers hold as triples, with the names of their modules."""
    return [
        LoRATriple(layer.base_layer.weight, *_factors(layer), layer.scaling[ADAPTER], name)
        for name, layer in layers.items()
    ]


def moved_changes(optimizer: DeltaLoRAOptimizer, names: Sequence[str]) -> list[LayerChange]:
    """Return how far an optimizer that moves W took each layer, with the ranks in every case.

    `layer_changes` leaves the ranks out where a ratio that changed, or restarts, have made a full matrix of a change.
    """
    triples = {triple.name: triple for triple in optimizer.triples}
    rows = {row.name: row for row in layer_changes(optimizer)}
    for name, row in rows.items():
        if row.effective_rank is None and row.change_norm > 0:
            rows[name] = _with_ranks(row, _change(optimizer, triples[name]))
    return [rows[name] for name in names]


@torch.no_grad()
def _change(optimizer: DeltaLoRAOptimizer, triple: LoRATriple) -> Tensor:
    """Return W* - W0."""
    A, B = (p.detach() for p in triple.parameters)
    return (optimizer.displacement(triple.label).product() + triple.scaling * A @ B).cpu()


def _with_ranks(row: LayerChange, change: Tensor) -> LayerChange:
    (dense,) = dense_changes({row.name: torch.zeros_like(change)}, {row.name: change})
    return row._replace(effective_rank=dense.effective_rank, numerical_rank=dense.numerical_rank)


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A (c, r) and B (r, d), which PEFT calls lora_B and lora_A."""
    return layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
