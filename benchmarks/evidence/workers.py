"""Make the runs of a grid in several processes: the result files say what is done, the parent alone what is next."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.evidence.grid import Grid
from benchmarks.evidence.places import Places
from benchmarks.evidence.result import Result, read_results, write_result
from benchmarks.evidence.setting import Setting
from benchmarks.machine import machine, quieten, versions
from benchmarks.unfinished import check_writable


@dataclass(frozen=True)
class Job:
    """What every run of a call shares, and its result does not depend on.

    Attributes:
        folder: of the grid's results.
        places: of data and models.
        device: to train on.
        deadline: when to stop, as `time.monotonic()`; runs that are cut short keep a checkpoint.
        commit: of the code.
    """

    folder: Path
    places: Places
    device: str
    deadline: float
    commit: str


class InUseError(Exception):
    """Another call is working on the same folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other calls out of a grid's folder.

    Raises:
        InUseError: if one is in it.
        OSError: if the folder cannot be written.
    """
    path = folder / "lock"
    check_writable(path)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(f"another call is making runs in {folder}: wait for it, or give another --out") from None
        yield


def work(grid: Grid, job: Job, workers: int) -> Iterator[Result | tuple[Setting, Exception]]:
    """Make the runs of a grid that have no result file, and yield each when it is done, or with its error.

    A run that failed is not tried again by this call, nor are those that were running when a process was killed. It
    ends when no run is left that can be made, or at the deadline.

    Args:
        grid: names the runs.
        job: of all of them.
        workers: processes; 0 to make the runs in this one.
    """
    if not workers:
        with as_a_worker():
            yield from _work_here(grid, job)
        return
    results = read_results(job.folder)
    running: dict[Future[Result | None], Setting] = {}
    failed: set[Setting] = set()
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()

    def new_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(os.getpid(),))

    pool = new_pool()
    try:
        while True:
            busy = {*running.values(), *failed}
            left = [s for s in grid.needed(results) if s not in busy] if time.monotonic() < job.deadline else []
            for setting in left[: workers - len(running)]:
                running[pool.submit(make, setting, job)] = setting
            if not running:
                return
            broken = False
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                setting = running.pop(future)
                if (error := future.exception()) is not None:
                    if not isinstance(error, Exception):
                        raise error
                    failed.add(setting)
                    yield setting, error
                    broken |= isinstance(error, BrokenProcessPool)
                elif (result := future.result()) is not None:
                    results.append(result)
                    yield result
            if broken:  # a process was killed, and takes the others' runs with it
                for future in list(running):
                    setting = running.pop(future)
                    failed.add(setting)
                    yield setting, BrokenProcessPool("another process of this call was killed")
                pool.shutdown(wait=False)
                pool = new_pool()
    finally:
        pool.shutdown(wait=not running, cancel_futures=True)
        for process in multiprocessing.active_children():
            if running and process not in others:
                process.terminate()


def _work_here(grid: Grid, job: Job) -> Iterator[Result | tuple[Setting, Exception]]:
    results = read_results(job.folder)
    failed: set[Setting] = set()
    while time.monotonic() < job.deadline:
        left = [setting for setting in grid.needed(results) if setting not in failed]
        if not left:
            return
        try:
            result = make(left[0], job)
        except Exception as error:
            failed.add(left[0])
            yield left[0], error
        else:
            if result is None:
                return
            results.append(result)
            yield result


def make(setting: Setting, job: Job) -> Result | None:
    """Make one run and write its file; None if the deadline came first."""
    from benchmarks.evidence.training import DeadlineError, Limits, run

    checkpoint = job.folder / "unfinished" / f"{setting.row}-{setting.digest}.pt"
    try:
        result = run(setting, job.places, job.device, Limits(job.deadline, checkpoint, job.commit))
    except DeadlineError:
        return None
    result.machine, result.versions, result.commit = machine(job.device), versions(), job.commit
    write_result(job.folder, result)
    checkpoint.unlink(missing_ok=True)
    return result


@contextmanager
def as_a_worker() -> Iterator[None]:
    """Set up this process as a worker for a while."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warns, fills = (
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    flash, efficient = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    _begin()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.cuda.enable_mem_efficient_sdp(efficient)


def _begin() -> None:
    """Set up a process: one thread, and the same kernels for the same numbers."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs a kernel for each new tensor
    # Of CUDA's attention kernels these two add up in an order of their own each time.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    quieten()


def _begin_worker(parent: int) -> None:
    """Set up a worker, which ends with its parent."""
    _begin()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def commit_of(folder: Path) -> str:
    """Return the commit that is checked out, with "+" where files differ from it; "unknown" outside a checkout."""
    try:
        commit = _git(folder, "rev-parse", "--short=10", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()
