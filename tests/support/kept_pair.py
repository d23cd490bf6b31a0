"""Two processes of a gloo group that are kept from test to test, so that each of them imports once.

They are forked, and ended with the process of the tests: also where that one is killed. Any failure ends them, since
what a rank has left half done would show in the next test, which gets new ones.
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.accelerate_state import forgotten

WORLD = 2

LIMIT = 120.0
"""Seconds for one call, on all ranks together."""

CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}
"""Exit codes of processes that have crashed. An abort is none of them: its message says why."""

GRACE = 5.0
"""Seconds that the other rank has after the first one has failed: it may wait for that one for ever."""

# The processes are forked from one that has imported these once.
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.nn.parallel",
    "peft",
    "transformers.models.llama.modeling_llama",
    "tests.support.peft_runs",
]


class CrashError(AssertionError):
    """A rank has crashed."""


def call(work: Callable[..., Any], arguments: tuple[Any, ...], limit: float) -> list[Any]:
    """Call `work(rank, *arguments)` in both processes, and return what they return, in the order of the ranks.

    Kept processes make hundreds of groups, and have crashed in that once in many runs, with no cause found. So what
    crashes is called again in new ones, where it has to pass, and the run's warnings show the stack of the crash.
    """
    task = pickle.dumps((work, arguments, limit))
    try:
        return _call(task, limit)
    except CrashError as crash:
        warnings.warn(f"a rank has crashed in {work.__name__}, which is called again\n{crash}", stacklevel=3)
        return _call(task, limit)


def _call(task: bytes, limit: float) -> list[Any]:
    pair = _pair()
    try:
        return pair.call(task, limit)
    except BaseException:
        _pair.cache_clear()
        pair.close()
        raise


@functools.cache
def _pair() -> "Pair":
    return Pair()


class Pair:
    """The two processes, and a folder where they meet and where their output goes."""

    def __init__(self) -> None:
        multiprocessing.set_forkserver_preload(PRELOADED)
        context = multiprocessing.get_context("forkserver")
        self._folder = tempfile.TemporaryDirectory()
        self._processes, self._lines = [], []
        for rank in range(WORLD):
            line, far_end = context.Pipe()
            process = context.Process(target=_serve, args=(rank, far_end, self._folder.name), name=f"rank {rank}")
            process.start()
            far_end.close()
            self._processes.append(process)
            self._lines.append(line)
        atexit.register(self.close)

    def call(self, task: bytes, limit: float) -> list[Any]:
        """Raise AssertionError with the traceback of each rank that raised, did not end in time, or is gone.

        It is a CrashError if one of them has crashed.
        """
        end = time.monotonic() + limit
        for line in self._lines:
            with contextlib.suppress(OSError):  # it has been killed, which its answer tells
                line.send_bytes(task)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(results) + len(failures) < WORLD:
            waiting = {line: rank for rank, line in enumerate(self._lines) if rank not in {*results, *failures}}
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                why = f"still waited {GRACE:g} s later" if failures else f"took longer than {limit:g} s"
                for rank in waiting.values():
                    failures[rank] = f"{why}, at\n{self._place(rank)}"
                break
            for line in ready:
                rank = waiting[line]
                try:
                    fine, answer = pickle.loads(line.recv_bytes())
                except (EOFError, OSError):
                    self._processes[rank].join()
                    fine, answer = False, f"the process has ended, with {self._processes[rank].exitcode}"
                if fine:
                    results[rank] = answer
                else:
                    failures[rank] = answer
                    end = min(end, time.monotonic() + GRACE)
        if failures:
            told = [f"rank {rank}: {failures[rank]}{self._said(rank)}" for rank in sorted(failures)]
            crashed = any(self._processes[rank].exitcode in CRASHES for rank in failures)
            raise (CrashError if crashed else AssertionError)("\n".join(told))
        return [results[rank] for rank in range(WORLD)]

    def close(self) -> None:
        atexit.unregister(self.close)
        for process, line in zip(self._processes, self._lines, strict=True):
            process.kill()
            process.join()
            process.close()
            line.close()
        self._folder.cleanup()

    def _place(self, rank: int) -> str:
        """The stack of the process now."""
        process = self._processes[rank]
        if process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)  # see `_serve`
        time.sleep(0.1)
        return _text(_place(self._folder.name, rank))

    def _said(self, rank: int) -> str:
        said = _text(_output(self._folder.name, rank))
        return f"\nrank {rank} printed:\n{said}" if said else ""


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _place(folder: str, rank: int) -> Path:
    return Path(folder, f"place{rank}")


def _output(folder: str, rank: int) -> Path:
    return Path(folder, f"output{rank}")


def _serve(rank: int, line: Connection, folder: str) -> None:
    """Do one task after the other, until the process of the tests is gone."""
    output = _output(folder, rank).open("ab", buffering=0)
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    faulthandler.enable(output)
    faulthandler.register(signal.SIGUSR1, _place(folder, rank).open("w"), all_threads=False)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = dist.FileStore(str(Path(folder, "store")), WORLD)
    gc.freeze()  # what has been imported is not searched after each test
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(line, tasks), daemon=True).start()
    count = 0
    while True:
        task = tasks.get()
        count += 1
        os.truncate(output.fileno(), 0)
        line.send_bytes(_answer(rank, task, dist.PrefixStore(str(count), store)))


def _listen(line: Connection, tasks: "queue.SimpleQueue[bytes]") -> None:
    while True:
        try:
            tasks.put(line.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)  # the main thread may wait for the other rank


def _answer(rank: int, task: bytes, store: dist.Store) -> bytes:
    try:
        work, arguments, limit = pickle.loads(task)
        with _fresh_state():
            timeout = timedelta(seconds=limit)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timeout)
            result = work(rank, *arguments)
        return pickle.dumps((True, result))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


@contextlib.contextmanager
def _fresh_state() -> Iterator[None]:
    """A test finds what the first one found; after one that raised nobody needs it, see `call`."""
    environment, folder = dict(os.environ), Path.cwd()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with warnings.catch_warnings(), forgotten():
        yield
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    forget_meshes()


def forget_meshes() -> None:
    """Empty torch's caches of layouts, in which the meshes of groups that are gone equal the new ones."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
