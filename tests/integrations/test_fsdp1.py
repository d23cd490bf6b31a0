"""FSDP1: exact with whole parameters (NO_SHARD, summon_full_params), and refused by its name with others."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

from deltaopt import DeltaLoRAOptimizer, find_triples
from tests.support.compare import relative
from tests.support.distributed import on_all_ranks
from tests.support.models import batches, causal_lm, loss_of
from tests.support.small_ranks import (
    LR,
    RATIO,
    dense_run,
    effective,
    small_batches,
    small_loss,
    small_model,
    triples_of,
)
from tests.support.strategies import each_rule

pytestmark = pytest.mark.extra

SHARDED = ["FULL_SHARD", "SHARD_GRAD_OP"]


def wrapped(model: nn.Module, strategy: str, **options: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(
        model,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
        **{"use_orig_params": True, **options},
    )


def optimizer_of(model: nn.Module, rule: str = "in_place") -> DeltaLoRAOptimizer:
    return DeltaLoRAOptimizer(torch.optim.AdamW, triples_of(model), lr=LR, update_ratio=RATIO, weight_update=rule)


def whole(model: nn.Module) -> contextlib.AbstractContextManager:
    return FullyShardedDataParallel.summon_full_params(model, writeback=True, with_grads=True)


@contextlib.contextmanager
def left_alone(model: FullyShardedDataParallel) -> Iterator[None]:
    with FullyShardedDataParallel.summon_full_params(model):
        before = effective(model)
    yield
    with FullyShardedDataParallel.summon_full_params(model):
        assert all(map(torch.equal, before, effective(model)))


@pytest.mark.parametrize("built_first", [False, True])
def test_whole_parameters_follow_one_process(built_first):
    on_all_ranks(whole_parameters_on_rank, built_first)


def whole_parameters_on_rank(rank: int, built_first: bool) -> None:
    model = small_model()
    optimizer = optimizer_of(model) if built_first else None
    outer = wrapped(model, "NO_SHARD")
    optimizer = optimizer or optimizer_of(model)
    for batch in small_batches(10, rank):
        optimizer.zero_grad()
        small_loss(outer, batch).backward()
        optimizer.step()
    for found, expected in zip(effective(model), dense_run(10), strict=True):
        assert relative(found, expected) < 1e-6


@pytest.mark.parametrize("strategy", SHARDED)
def test_steps_within_summoned_parameters_follow_one_process(strategy):
    on_all_ranks(summoned_on_rank, strategy)


def summoned_on_rank(rank: int, strategy: str) -> None:
    model = small_model()
    model[0] = wrapped(model[0], strategy)
    outer = wrapped(model, strategy)

    def train(optimizer: DeltaLoRAOptimizer, first: int) -> None:
        for i, batch in enumerate(small_batches(10, rank)):
            if first <= i < first + 5:
                outer.zero_grad()
                small_loss(outer, batch).backward()
                with whole(outer):
                    optimizer.step()

    with whole(outer):
        optimizer = optimizer_of(model)
    train(optimizer, 0)
    with whole(outer):
        state = optimizer.state_dict()
        resumed = optimizer_of(model)
        resumed.load_state_dict(state)
    train(resumed, 5)
    with whole(outer):
        for found, expected in zip(effective(model), dense_run(10), strict=True):
            assert relative(found, expected) < 1e-6
    message = r"W, A and B are pieces of a flattened parameter of FSDP1.*summon_full_params"
    small_loss(outer, next(small_batches(1, rank))).backward()
    for event in (resumed.step, resumed.state_dict):
        with left_alone(outer), pytest.raises(ValueError, match=message):
            event()


@each_rule
@pytest.mark.parametrize("strategy", SHARDED)
def test_pieces_are_refused_by_the_name_of_fsdp1(strategy, rule):
    on_all_ranks(pieces_on_rank, strategy, rule)


def pieces_on_rank(rank: int, strategy: str, rule: str) -> None:
    """Before and after the optimizer, and where a forward pass has gathered the parameters; in one line."""
    message = {
        "in_place": r"\n  W, A and B are pieces of .*FSDP1.* Take FSDP2 .*\(2 layers: layer0, layer1\)$",
        "folded": r"\n  A and B are parameters of FSDP1 .*weight_update=.in_place.*\(2 layers: layer0, layer1\)$",
    }[rule]
    model = small_model()
    early = optimizer_of(model, rule)
    outer = wrapped(model, strategy)
    with pytest.raises(ValueError, match=message):
        optimizer_of(model, rule)
    loss = small_loss(outer, next(small_batches(1, rank)))
    with pytest.raises(ValueError, match=message):
        optimizer_of(model, rule)
    loss.backward()
    with left_alone(outer), pytest.raises(ValueError, match=message):
        early.step()


def test_whole_parameters_are_refused_in_the_folded_rule():
    """The gradients reach the flattened parameter and not A and B, whose hooks are to divide them."""
    on_all_ranks(whole_and_folded_on_rank)


def whole_and_folded_on_rank(rank: int) -> None:
    model = small_model()
    early = optimizer_of(model, "folded")
    outer = wrapped(model, "NO_SHARD")
    message = r"A and B are parameters of FSDP1 .*past the hooks.*weight_update=.in_place."
    with pytest.raises(ValueError, match=message):
        optimizer_of(model, "folded")
    small_loss(outer, next(small_batches(1, rank))).backward()
    with left_alone(outer), pytest.raises(ValueError, match=message):
        early.step()


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
def test_views_of_a_flattened_parameter_are_refused(strategy):
    """PEFT's policy puts factors and frozen weights into units of their own, which needs no original parameters."""
    on_all_ranks(views_on_rank, strategy)


def test_the_names_are_those_of_the_model():
    on_all_ranks(names_on_rank)


def names_on_rank(rank: int) -> None:
    model = causal_lm()
    names = [triple.label for triple in find_triples(model)]
    decoder = model.base_model.model.model
    for i, layer in enumerate(decoder.layers):
        decoder.layers[i] = wrapped(layer, "NO_SHARD")
    optimizer = DeltaLoRAOptimizer.for_model(wrapped(model, "NO_SHARD"), torch.optim.AdamW, lr=LR)
    assert [triple.label for triple in optimizer.triples] == names


def trains_by_itself(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not list(module.children()) and weight is not None and weight.requires_grad


def views_on_rank(rank: int, strategy: str) -> None:
    model = causal_lm()
    early = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=LR)
    policies = [
        functools.partial(lambda_auto_wrap_policy, lambda_fn=trains_by_itself),
        functools.partial(
            transformer_auto_wrap_policy,
            transformer_layer_cls={type(model.base_model.model.model.layers[0])},
        ),
    ]
    policy = functools.partial(_or_policy, policies=policies)
    outer = wrapped(model, strategy, use_orig_params=False, auto_wrap_policy=policy)
    message = r"\n  W, A and B are pieces of a flattened parameter of FSDP1 .*use_orig_params=True"
    loss_of(outer, batches(1)[0]).backward()
    with pytest.raises(ValueError, match=message):
        early.step()
    for rule, said in (("in_place", message), ("folded", r"\n  A and B are parameters of FSDP1 ")):
        with pytest.raises(ValueError, match=said):
            DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=LR, weight_update=rule)
