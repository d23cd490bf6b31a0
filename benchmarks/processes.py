"""The processes that ``torchrun`` has started for one benchmark, or this one alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class Processes:
    """This process among those that train one model together.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        first: whether it is the one that prints and writes.
    """

    def __init__(self) -> None:
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.first = self.rank == 0

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap a model, so that a backward pass averages the gradients over the processes."""
        return DistributedDataParallel(model) if self.count > 1 else model

    def share(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """Return this process's rows of a batch, and what the mean loss over them is to be multiplied by.

        The average over the processes is then the mean over the whole batch, also where its rows cannot be divided
        equally. A process without a row of its own gets one that counts 0, since it has to take part.
        """
        rows = len(batch["labels"])
        mine = len(range(self.rank, rows, self.count))
        part = slice(self.rank, None, self.count) if mine else slice(0, 1)
        return {name: tensor[part] for name, tensor in batch.items()}, mine * self.count / rows

    def mean(self, value: Tensor) -> float:
        return float(self._sum(value.detach().clone())) / self.count

    def total(self, *counts: int) -> list[int]:
        return [int(count) for count in self._sum(torch.tensor(counts))]

    def from_first(self, value: T) -> T:
        """Return what the first process gives here."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def each(self, value: T) -> list[T]:
        """Return what every process gives here."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def _sum(self, value: Tensor) -> Tensor:
        if self.count > 1:
            value = value.to("cuda") if dist.get_backend() == "nccl" else value.cpu()
            dist.all_reduce(value)
        return value


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the group that ``torchrun`` asks for; give it, and the device of this process."""
    started = dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1
    on_cuda = torch.device(device).type == "cuda"
    if not started:
        if on_cuda:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield Processes(), device
    finally:
        if not started:
            dist.destroy_process_group()
