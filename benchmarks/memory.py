"""Peak memory that a piece of code allocates beyond what was allocated before.

On a CUDA device torch's allocator counts. On a CPU the profiler records every allocation and release of torch's
allocator; the largest running sum of them is the peak. Neither counts the scratch memory that a library under torch
(oneDNN, MKL) takes for itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes two lines to the terminal at each use


def peak_allocation(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the bytes allocated on `device` at the worst moment of `fn()`, beyond those held when it begins.

    The result of `fn` is dropped at once. `fn` should release nothing that was allocated before. On a CPU such a
    release is not seen (the profiler does not know the size); on CUDA it lowers the peak.

    Args:
        fn: the code to measure; it is called once.
        device: the device whose memory is counted.

    Returns:
        The peak in bytes, as the allocator rounds the sizes (on CUDA to 512 bytes). A Python number in an
        expression becomes a tensor too and counts its 4 or 8 bytes.

    Example:
        >>> peak_allocation(lambda: torch.empty(1000, dtype=torch.float32))
        4000
    """
    device = torch.device(device)
    return _cuda_peak(fn, device) if device.type == "cuda" else _cpu_peak(fn)


def _cuda_peak(fn: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(fn: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        fn()
    events = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    events.sort(key=lambda event: event[0])  # threads have buffers of their own; equal times keep their order
    return max(accumulate((nbytes for _, nbytes in events), initial=0))
