"""A NaN or infinite factor never reaches W, and finding that out never waits for a GPU.

The verdict stays a tensor on the device: it masks the update there, and it is added to a count there.
On CUDA the count travels to the host in the background and is looked at in a later step, when it has
arrived by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deltaopt.all_or_nothing import note


class FiniteGuard:
    """Decides whether a step's update is applied, counts the ones that are not, warns about the first.

    Attributes:
        on_all_ranks: True where the ranks decide together: none of them applies what another one does not.
    """

    def __init__(self, skipped: int = 0) -> None:
        self.on_all_ranks = False
        self._before = skipped
        self._count: Tensor | None = None
        self._arrived: tuple[Tensor, torch.cuda.Event] | None = None
        self._warned = False

    @property
    def skipped(self) -> int:
        """The number of updates that were not applied. Waits for the device."""
        return self._before + (int(self._count) if self._count is not None else 0)

    def at_a_glance(self) -> str:
        """Say how many there are by what the host knows; empty if it knows of none. Nothing is read from a device."""
        on_host = self._count is None or self._count.device.type == "cpu"
        if on_host:
            return f"skipped updates: {self.skipped}" if self.skipped else ""
        known = self._before
        if self._arrived is not None and self._arrived[1].query():
            known += int(self._arrived[0])
        return f"skipped updates: {known} or more" if known else ""

    @staticmethod
    def verdict(tensors: Sequence[Tensor]) -> Tensor:
        """Tell if all numbers on all devices are finite: a 0-d bool on the device of the first."""
        home = tensors[0].device
        return torch.stack([_moved(tensor.isfinite().all(), home) for tensor in tensors]).all()

    def count(self, finite: Tensor, counted: list[Any]) -> None:
        """Count an update that is not applied.

        Args:
            finite: the verdict on the update.
            counted: gets an entry with the count. After an exception a call with the same list counts nothing twice.
        """
        if self._count is None or self._count.device != finite.device:
            self._before, self._count = self.skipped, torch.zeros((), dtype=torch.int64, device=finite.device)
            self._arrived = None
        if not counted:
            note(counted, partial(self._count.add_, ~finite))

    def warn(self, stacklevel: int) -> None:
        """Warn of the first update that was skipped, as far as that is known on the host without waiting."""
        if not self._warned and self._count is not None:
            self._look(self._count, stacklevel + 1)

    def _look(self, count: Tensor, stacklevel: int) -> None:
        if count.device.type != "cuda":
            self._warn_if(int(count) > 0, stacklevel + 1)
            return
        if self._arrived is None:
            on_host = torch.zeros((), dtype=torch.int64, device="cpu", pin_memory=True)
            self._arrived = on_host, torch.cuda.Event()
        elif not self._arrived[1].query():
            return
        on_host, event = self._arrived
        arrived = int(on_host) > 0
        on_host.copy_(count, non_blocking=True)
        event.record(torch.cuda.current_stream(count.device))
        self._warn_if(arrived, stacklevel + 1)

    def _warn_if(self, skipped: bool, stacklevel: int) -> None:
        if skipped:
            self._warned = True
            where, others = ("", "") if self.on_all_ranks else _of_ranks()
            warnings.warn(
                f"a LoRA factor became NaN or infinite{where}: the update of every W{' there' if where else ''} was "
                f"skipped, and W is as it was. {others}Later ones are counted in optimizer.skipped_updates without a "
                "warning. Lower the learning rate, clip the gradients or use a GradScaler",
                RuntimeWarning,
                stacklevel=stacklevel + 1,
            )


def _of_ranks() -> tuple[str, str]:
    """Return the words for this rank, and what to ask the other ranks; nothing where there is one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return "", ""
    return (
        f" on rank {dist.get_rank()}",
        "Where the other ranks did not skip it, W is another one there: optimizer.check_synced() on all ranks tells. ",
    )


def _moved(flag: Tensor, device: torch.device) -> Tensor:
    # Into host memory a copy that does not wait could be read before it is there.
    return flag.to(device, non_blocking=device.type != "cpu")
