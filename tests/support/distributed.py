"""Several processes on one machine: each test calls one function on all ranks of a gloo group."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WORLD = 2

# The processes are forked from one that has imported these once.
PRELOADED = ["torch", "torch.distributed.fsdp", "peft", "transformers", "tests.support.peft_runs"]


def on_all_ranks(work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Call `work(rank, *arguments)` in `WORLD` processes, and raise what one of them raises."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(
        _worker, (work, str(folder / "init"), arguments), nprocs=WORLD, start_method="forkserver"
    )


def _worker(rank: int, work: Callable[..., None], init: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=WORLD)
    work(rank, *arguments)
    dist.destroy_process_group()


def shares(data: list[Tensor], rank: int) -> list[Tensor]:
    """The part of each batch that is this rank's."""
    return [ids.chunk(WORLD)[rank] for ids in data]


def assert_same_on_all_ranks(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        first = p.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, p), name
