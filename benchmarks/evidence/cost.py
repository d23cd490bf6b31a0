"""What a training step of each method costs: time and memory, side by side in one run on one model and one batch."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.evidence.grid import Experiment
from benchmarks.evidence.methods import prepare
from benchmarks.evidence.models import load_model
from benchmarks.evidence.places import Places
from benchmarks.evidence.rows import Row
from benchmarks.evidence.setting import Setting
from benchmarks.evidence.tasks import open_task
from benchmarks.evidence.training import Trainer
from benchmarks.memory import peak_allocation
from benchmarks.unfinished import write_whole

ROUNDS = 15
STEPS = 4
"""Steps of one row in a round; a round's figure is their mean."""

REFERENCE = "lora"
"""The row that ratios of a round are formed with."""


def rows_of(experiment: Experiment) -> list[Row]:
    """Return a row of each method: the others cost the same.

    A ratio that rises would be measured at its beginning, where W stands still.
    """
    of_method = {row.method: row for row in reversed(experiment.of_rows())}
    return [row for row in experiment.of_rows() if row is of_method[row.method] and row.method != "ratio-up"]


def measure(experiment: Experiment, rows: Sequence[Row], places: Places, device: str, rounds: int) -> dict[str, Any]:
    """Return times and bytes of a step for each row.

    All rows are in memory at once, and take turns: other load on the machine meets all of them alike. The order within
    a round is rotated.
    """
    trainers = {row.name: _trainer(experiment.example(row), places, device) for row in rows}
    batches = {name: itertools.cycle([next(t.task.training_batches())]) for name, t in trainers.items()}
    counts = {name: itertools.count() for name in trainers}

    def step(name: str) -> None:
        trainers[name].step(next(counts[name]), dict(next(batches[name])))

    for name in trainers:  # optimizers make their states, ours its buffers
        step(name)
        step(name)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    names = list(trainers)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(_timed(lambda name=name: step(name), device))  # type: ignore[misc]
    found = {}
    for name, trainer in trainers.items():
        ratios = [own / other for own, other in zip(seconds[name], seconds[REFERENCE], strict=True)]
        found[name] = {
            "seconds": seconds[name],
            "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
            "trained": sum(p.numel() for p in trainer.trained),
            "gradient_bytes": sum(p.nbytes for p in trainer.trained),
            "state_bytes": state_bytes(trainer.prepared.optimizer),
            "peak_bytes": peak_allocation(lambda name=name: step(name), device),  # type: ignore[misc]
        }
    return found


def write(path: Path, found: dict[str, Any], experiment: Experiment, machine: dict[str, Any], commit: str) -> None:
    """Write the file of a measurement."""
    setting = {"task": experiment.task, "model": experiment.model, **experiment.setting}
    write_whole(path, json.dumps({"setting": setting, "machine": machine, "commit": commit, "rows": found}) + "\n")


def state_bytes(optimizer: Optimizer) -> int:
    """Return what an optimizer keeps from step to step, with the buffers of ours."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(v.nbytes for v in values if isinstance(v, Tensor)) + getattr(optimizer, "buffer_bytes", 0)


def _trainer(setting: Setting, places: Places, device: str) -> Trainer:
    # Long enough that no restart and no change of a budget falls into the measurement.
    setting = replace(setting, steps=1_000_000, start=0.0)
    task = open_task(setting, places, device)
    model = load_model(setting, places, task.labels).to(device).train()
    return Trainer(setting, prepare(setting, model), task, device)


def _timed(step: Callable[[], None], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    _wait(device)
    return (time.perf_counter() - start) / STEPS


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
