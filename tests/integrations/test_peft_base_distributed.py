"""The base by itself on several ranks: data parallel and fully sharded models, against frozen copies."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.support.distributed import assert_same_on_all_ranks, on_all_ranks, shares
from tests.support.models import batches, causal_lm, loss_of, optimizer_for
from tests.support.nightly import one_in
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.strategies import each_rule

# isort: split
from peft import LoraConfig

pytestmark = peft_asks_by_an_old_name

EXACT = {"rtol": 0, "atol": 1e-11}
"""Of float64 outputs of order 1."""

IDS = batches(1, seed=9)[0]


def logits_of(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits


@torch.no_grad()
def assert_reference(model: nn.Module, frozen: nn.Module, *callers: nn.Module) -> None:
    """Without the adapter each caller gives the frozen copy's output, the same on all ranks; with it, another one."""
    with model.disable_adapter(), frozen.disable_adapter():
        expected = logits_of(frozen)
        for caller in callers:
            found = logits_of(caller)
            torch.testing.assert_close(found, expected, **EXACT)
            first = found.clone()
            dist.broadcast(first, 0)
            assert torch.equal(found, first)
    assert (logits_of(callers[0]) - logits_of(frozen)).abs().max() > 1e-2


@each_rule
def test_a_data_parallel_model_gives_the_base(rule):
    on_all_ranks(data_parallel_on_rank, rule)


def data_parallel_on_rank(rank: int, rule: str) -> None:
    model = causal_lm()
    frozen = copy.deepcopy(model)
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_for(model, weight_update=rule, start_step=1)
    for ids in shares(batches(4), rank):
        optimizer.zero_grad()
        with torch.no_grad(), model.disable_adapter(), frozen.disable_adapter():
            torch.testing.assert_close(logits_of(ddp, ids), logits_of(frozen, ids), **EXACT)
        loss_of(ddp, ids).backward()
        optimizer.step()
    assert_reference(model, frozen, ddp, ddp.module)
    assert_same_on_all_ranks(model)


def test_another_adapter_trains_data_parallel_on_the_base():
    """The factors of ours are parameters that the forward pass does not use."""
    on_all_ranks(another_adapter_on_rank)


def another_adapter_on_rank(rank: int) -> None:
    model = causal_lm()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    for p in model.parameters():
        dist.broadcast(p.data, 0)
    model = model.double()
    frozen = copy.deepcopy(model)
    optimizer = optimizer_for(model)
    for ids in batches(3):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()
    optimizer.zero_grad()
    gradients = []
    for net in (model, frozen):
        net.set_adapter("other")
        for name, p in net.named_parameters():
            p.requires_grad_("lora_" in name)
        ddp = DistributedDataParallel(net, find_unused_parameters=True)
        for ids in shares(batches(2), rank):
            loss_of(ddp, ids).backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if ".other." in name})
    assert len(gradients[0]) == 8
    for name, grad in gradients[0].items():
        assert grad.any()
        torch.testing.assert_close(grad, gradients[1][name], **EXACT)


@pytest.mark.parametrize(
    ("parts", "reshard", "rule"), one_in(2, ["layers", "linears"], [True, False], ["in_place", "folded"])
)
def test_a_fully_sharded_model_gives_the_base(parts, reshard, rule):
    on_all_ranks(fully_sharded_on_rank, parts, reshard, rule)


@pytest.mark.parametrize("parts", ["layers", "linears"])
def test_a_fully_sharded_model_gives_the_base_that_was_kept(parts):
    on_all_ranks(fully_sharded_on_rank, parts, True, "in_place", "cpu")


def fully_sharded_on_rank(rank: int, parts: str, reshard: bool, rule: str, keep_base: str | None = None) -> None:
    model = causal_lm(B_zero=True)
    frozen = copy.deepcopy(model)
    if parts == "layers":
        found = list(model.base_model.model.model.layers)
    else:
        found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for part in (*found, model):
        fully_shard(part, reshard_after_forward=reshard)
    optimizer = optimizer_for(model, weight_update=rule, keep_base=keep_base)
    for ids in shares(batches(4), rank):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()
        with torch.no_grad(), model.disable_adapter(), frozen.disable_adapter():
            torch.testing.assert_close(logits_of(model), logits_of(frozen), **EXACT)
            for part in (*found, model):  # the parameters that PEFT then finds are marked as trained again
                part.reshard()
    assert_reference(model, frozen, model)
