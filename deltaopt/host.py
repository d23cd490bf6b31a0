"""What the host can do with a device without waiting for it."""

from __future__ import annotations

from types import ModuleType

import torch

from deltaopt.rounding.batch import fused_kernel


class Host:
    """The things that the host can do with a device without waiting for it.

    A test on a CPU hands in a subclass that acts as the host of a GPU.
    """

    def reads(self, device: torch.device) -> bool:
        """Tell if the host can read a tensor on the device without waiting."""
        return device.type == "cpu"

    def arrived(self, event: torch.cuda.Event | None) -> bool:
        """Tell if a message from the device has arrived: the one whose end is marked by `event`."""
        return event is None or event.query()

    def kernel(self, device: torch.device) -> ModuleType | None:
        """Return the module with the kernel for 16-bit weights on the device; None where there is none."""
        return fused_kernel(device)
