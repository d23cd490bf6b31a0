"""Several ranks: nothing of what wrappers do to a model between steps is taken for a change from outside."""

import copy
import os
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from deltaopt import export_adapter
from tests.support.distributed import WORLD, on_all_ranks, shares
from tests.support.models import batches, loss_of, optimizer_for
from tests.support.peft_runs import ModelRun, peft_asks_by_an_old_name

pytestmark = [peft_asks_by_an_old_name, pytest.mark.extra]


def data_parallel(run):
    return DistributedDataParallel(run.model), run.optimizer


def sharded(run):
    for layer in run.model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(run.model)
    return run.model, optimizer_for(run.model, weight_update="folded")


def prepared(run):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == WORLD
    return accelerator.prepare(run.model, run.optimizer)


WRAPPERS = {
    "DDP": (data_parallel, torch.bfloat16),
    "FSDP2": (sharded, torch.float32),
    "Accelerate": (prepared, torch.float32),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_no_false_alarm(wrapper):
    """With evaluations between steps, of the base too, a checkpoint, and a way back to it."""
    on_all_ranks(train_on_rank, wrapper)


def train_on_rank(rank: int, wrapper: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    wrapped, dtype = WRAPPERS[wrapper]
    model, optimizer = wrapped(ModelRun(dtype=dtype, rounding="compensated"))
    data = shares(batches(2), rank)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="deltaopt|tests")
        warnings.filterwarnings("error", ".*(W of|A and B)")
        train(model, optimizer, data)
        state, saved = checkpoint(model, optimizer, wrapper)
        train(model, optimizer, data)
        resume(model, optimizer, state, saved, wrapper)
        train(model, optimizer, data)
        export_adapter(optimizer)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> None:
    for ids in data:
        model.train()
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        evaluate(model, ids)
        with getattr(model, "module", model).disable_adapter():
            evaluate(model, ids)


@torch.no_grad()
def evaluate(model: nn.Module, ids: torch.Tensor) -> None:
    model.eval()
    loss_of(model, ids)


def checkpoint(model, optimizer, wrapper):
    if wrapper == "FSDP2":
        return copy.deepcopy(get_state_dict(model, optimizer))
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())


def resume(model, optimizer, state, saved, wrapper):
    if wrapper == "FSDP2":
        set_model_state_dict(model, state)  # `set_state_dict` loads the optimizer first
        set_optimizer_state_dict(model, optimizer, saved)
        return
    model.load_state_dict(state)
    optimizer.load_state_dict(saved)
