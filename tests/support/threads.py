"""Several ranks as threads of this process, for meshes that would need more processes than a small machine runs.

It is the group of torch's own tests: collectives copy between the threads. Random numbers that a thread draws from the
global generator depend on the other threads, so each has to take a generator of its own.
"""

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch._C._distributed_c10d import _set_thread_isolation_mode
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from tests.support.kept_pair import LIMIT, forget_meshes

GRACE = 5.0
"""Seconds that the threads have to end after one has failed."""


def on_threads(work: Callable[..., Any], *arguments: Any, world_size: int = 4, limit: float = LIMIT) -> list[Any]:
    """Call `work(rank, *arguments)` in `world_size` threads that are the ranks of a group.

    Returns:
        What they return, in the order of the ranks.

    Raises:
        AssertionError: with the traceback of each rank that raised, or the names of those that took too long. Those
            threads cannot be ended; the process is of no more use where they do not wait for a collective.
    """
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    store = dist.HashStore()

    def rank_of_the_group(rank: int) -> None:
        try:
            timeout = timedelta(seconds=limit)
            dist.init_process_group("threaded", store=store, rank=rank, world_size=world_size, timeout=timeout)
            results[rank] = work(rank, *arguments)
        except SystemExit:
            pass  # in a collective, when another rank had failed
        except BaseException as error:
            failures[rank] = traceback.format_exc()
            ProcessLocalGroup.exception_handle(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    _set_thread_isolation_mode(True)
    _install_threaded_pg()
    if not hasattr(world := distributed_c10d._world, "comms"):  # torch 2.11 forgets it, and reads it at the end
        world.comms = []
    try:
        threads = [
            threading.Thread(target=rank_of_the_group, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(world_size)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + limit
        while any(thread.is_alive() for thread in threads) and time.monotonic() < end and not failures:
            for thread in threads:
                thread.join(0.01)
        late = [thread.name for thread in threads if thread.is_alive()]
        if late:
            ProcessLocalGroup.exception_handle(TimeoutError())
            for thread in threads:
                thread.join(GRACE)
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        _set_thread_isolation_mode(False)
        forget_meshes()
    if failures:
        raise AssertionError("\n".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)))
    if len(results) < world_size:
        raise AssertionError(f"after {limit:g} s these had not ended: {', '.join(late)}")
    return [results[rank] for rank in range(world_size)]


@contextmanager
def noted(*names: str) -> Iterator[list[str]]:
    """Note the names of these methods of the groups as they are called, by all threads together.

    torch's own `CommDebugMode` does not see what these groups do.
    """
    calls: list[str] = []

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return method(*args, **kwargs)

        return call

    methods = {name: counting(name, getattr(ProcessLocalGroup, name)) for name in names}
    with mock.patch.multiple(ProcessLocalGroup, **methods):
        yield calls
