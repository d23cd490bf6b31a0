"""Every method of the comparison: what it trains, by which rule, and what it does around a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.evidence.adalora import AdaLora
from benchmarks.evidence.adapters import (
    ADAPTER,
    adapted_names,
    add_lora,
    head_parameters,
    lora_triples,
    moved_changes,
    put_lora_start,
    random_numbers,
    train_only,
    trained_parameters,
)
from benchmarks.evidence.dylora import add_dylora, drawn_ranks
from benchmarks.evidence.prepared import Prepared
from benchmarks.evidence.restarts import Restarts
from benchmarks.evidence.setting import Setting
from deltaopt import DeltaLoRAOptimizer, LoRATriple, find_triples, other_parameters, schedules
from deltaopt.analysis import LayerChange, dense_changes, layer_changes

Prepare = Callable[[Setting, nn.Module], Prepared]


def prepare(setting: Setting, model: nn.Module) -> Prepared:
    """Make a model ready to be trained by the setting's method.

    Args:
        setting: of the run. The fresh factors come from its seed, the same for all methods that start as LoRA does.
        model: on its device, with the pretrained weights and a fresh head. It is changed.

    Raises:
        ValueError: for an unknown method, or a model or rank that the method cannot train.
    """
    if setting.method not in METHODS:
        raise ValueError(f"{setting.row}: no method is called {setting.method!r}. There are {', '.join(METHODS)}")
    return METHODS[setting.method](setting, model)


def _everything(setting: Setting, model: nn.Module) -> Prepared:
    model.requires_grad_(True)
    return _dense(setting, model, _adamw(setting, model))


def _frozen_embeddings(setting: Setting, model: nn.Module) -> Prepared:
    """Train all but the tables of words, positions and segments; an output layer that is tied to one is frozen too."""
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    return _dense(setting, model, _adamw(setting, model))


def _query_and_value(setting: Setting, model: nn.Module) -> Prepared:
    """Train W_Q and W_V without their biases: what LoRA adapts."""
    train_only(model, [model.get_parameter(name) for name in _weight_names(model)])
    return _dense(setting, model, _adamw(setting, model))


def _sgd(setting: Setting, model: nn.Module) -> Prepared:
    """Train everything without momentum, so that the optimizer keeps no state."""
    if setting.head_lr is not None:
        raise ValueError(
            f"{setting.row}: head_lr={setting.head_lr:g} is a learning rate of AdamW, in whose scale SGD's is not: "
            f"leave it out for SGD"
        )
    model.requires_grad_(True)
    sgd = torch.optim.SGD(model.parameters(), lr=setting.lr, weight_decay=setting.weight_decay, fused=True)
    return _dense(setting, model, sgd)


def _lora(setting: Setting, model: nn.Module, *, larger: bool = False, rslora: bool = False) -> Prepared:
    """Train LoRA with alpha, or with alpha (1 + lambda)."""
    alpha = setting.alpha * (_one_more(setting) if larger else 1.0)
    layers = add_lora(setting, model, alpha=alpha, rslora=rslora)
    return Prepared(model, _adamw(setting, model), changes=lambda: layer_changes(lora_triples(layers)))


def _lora_plus(setting: Setting, model: nn.Module) -> Prepared:
    """Train the factor that starts at zero with 1 + lambda times the learning rate."""
    layers = add_lora(setting, model, alpha=setting.alpha)
    factors = [layer.lora_B[ADAPTER].weight for layer in layers.values()]
    faster = {"params": factors, "lr": setting.lr * _one_more(setting)}
    return Prepared(model, _adamw(setting, model, faster), changes=lambda: layer_changes(lora_triples(layers)))


def _adalora(setting: Setting, model: nn.Module) -> Prepared:
    adalora = AdaLora(setting, model)
    return Prepared(
        model,
        _adamw(setting, model),
        after_step=adalora.after_step,
        extra_loss=adalora.orthogonality,
        changes=adalora.changes,
        state=adalora.state,
        load_state=adalora.load_state,
    )


def _dylora(setting: Setting, model: nn.Module) -> Prepared:
    """Train at a rank drawn for each step. Which one is a function of seed and step: a checkpoint keeps nothing."""
    layers = add_dylora(model, adapted_names(model), setting.rank, setting.alpha, setting.dropout)
    generator = random_numbers(setting, "factors")
    for layer in layers.values():
        put_lora_start(layer.A, layer.B, generator)
    train_only(model, (p for layer in layers.values() for p in (layer.A, layer.B)))
    ranks = drawn_ranks(setting.rank, setting.steps, random_numbers(setting, "ranks"))

    def draw(step: int) -> None:
        for layer in layers.values():
            layer.rank = ranks[step]

    def changes() -> list[LayerChange]:
        scaling = setting.alpha / setting.rank
        return layer_changes(
            [LoRATriple(layer.base_layer.weight, layer.A, layer.B, scaling, name) for name, layer in layers.items()]
        )

    return Prepared(model, _adamw(setting, model), before_step=draw, changes=changes)


def _delta(
    setting: Setting,
    model: nn.Module,
    *,
    ratio: Callable[[Setting], Any] = lambda setting: setting.update_ratio,
    restarts: bool = False,
) -> Prepared:
    """Train LoRA and move W, by `deltaopt` as a user would."""
    layers = add_lora(setting, model, alpha=setting.alpha)
    triples = find_triples(model, allow_dropout=setting.dropout > 0)
    optimizer = DeltaLoRAOptimizer(
        torch.optim.AdamW,
        triples,
        _groups(setting, model, other_parameters(model, triples)),
        update_ratio=ratio(setting),
        start_step=setting.start_step,
        rounding_seed=setting.seed,
        **_adamw_options(setting),
    )
    prepared = Prepared(model, optimizer, changes=lambda: moved_changes(optimizer, list(layers)))
    if restarts:
        schedule = Restarts(optimizer, setting)
        prepared.before_step, prepared.after_step = schedule.before_step, schedule.after_step
    return prepared


def _dense(setting: Setting, model: nn.Module, optimizer: Optimizer) -> Prepared:
    """Compare W_Q and W_V with a copy of them on the CPU."""
    weights = _weight_names(model)
    before = _copied(model, weights)

    def changes() -> list[LayerChange]:
        rows = dense_changes(before, _copied(model, weights), weights)
        return [row._replace(name=row.name.removesuffix(".weight")) for row in rows]

    return Prepared(model, optimizer, changes=changes)


def _weight_names(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name in adapted_names(model)]


def _copied(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    return {name: model.get_parameter(name).detach().to("cpu", copy=True) for name in names}


def _groups(setting: Setting, model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Return the parameters, the fresh head among them with its own learning rate if the setting has one."""
    parameters = list(parameters)
    if setting.head_lr is None:
        return [{"params": parameters}] if parameters else []
    of_head = {id(p) for p in head_parameters(model)}
    head = {"params": [p for p in parameters if id(p) in of_head], "lr": setting.head_lr}
    others = {"params": [p for p in parameters if id(p) not in of_head]}
    return [group for group in (others, head) if group["params"]]


def _adamw(setting: Setting, model: nn.Module, *apart: dict[str, Any]) -> Optimizer:
    """Return AdamW over all trained parameters. Groups with options of their own stand apart."""
    elsewhere = {id(p) for group in apart for p in group["params"]}
    parameters = [p for p in trained_parameters(model) if id(p) not in elsewhere]
    return torch.optim.AdamW([*_groups(setting, model, parameters), *apart], **_adamw_options(setting))


def _adamw_options(setting: Setting) -> dict[str, Any]:
    """Return the same options for all methods. A fused step is one call for all parameters, on a GPU and on a CPU."""
    return {"lr": setting.lr, "weight_decay": setting.weight_decay, "eps": setting.eps, "fused": True}


def _one_more(setting: Setting) -> float:
    return 1 + setting.update_ratio


def _ramp(setting: Setting, start: float, end: float) -> schedules.Ramp:
    """Return a ratio that goes from `start` to `end` times lambda between step K and the end, in 10 stages."""
    moving = setting.steps - setting.start_step
    ratio = setting.update_ratio
    return schedules.linear(start * ratio, end * ratio, moving, min(10, moving), setting.start_step)


METHODS: Mapping[str, Prepare] = {
    "full": _everything,
    "full-frozen-embeddings": _frozen_embeddings,
    "full-qv": _query_and_value,
    "sgd": _sgd,
    "lora": _lora,
    "lora-plus": _lora_plus,
    "rslora": partial(_lora, rslora=True),
    "adalora": _adalora,
    "dylora": _dylora,
    "delta": _delta,
    "alpha": partial(_lora, larger=True),
    "ratio-up": partial(_delta, ratio=partial(_ramp, start=0.0, end=1.0)),
    "ratio-down": partial(_delta, ratio=partial(_ramp, start=1.0, end=0.0)),
    "restarts": partial(_delta, ratio=lambda setting: 0.0, restarts=True),
    "delta-restarts": partial(_delta, restarts=True),
}
"""The methods by name, each with what makes a model ready for it."""
