"""How many runs share a device at once."""

from __future__ import annotations

import os

import torch

from benchmarks.evidence.grid import Grid
from benchmarks.evidence.recipes import BART, GPT2, ROBERTA

GIB_OF_RUN = {ROBERTA: 9.0, GPT2: 24.0, BART: 60.0}
"""Memory of the hungriest run of a recipe on a GPU: fine-tuning at full length, or writing with beams. Estimates."""

SMALL = 3.0
"""Of any other model."""


def workers_for(grid: Grid, device: str) -> int:
    """Return the number of processes: one for each core, on a GPU no more than fit into its free memory."""
    cores = len(os.sched_getaffinity(0))
    if torch.device(device).type != "cuda":
        return cores
    need = max(GIB_OF_RUN.get(each.model, SMALL) for each in grid.experiments)
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(cores, int(free / 2**30 / need)))


def workers_option(text: str) -> int | None:
    """Return the number of an option ``--workers``; None for "auto".

    Raises:
        ValueError: for anything else.
    """
    if text == "auto":
        return None
    if (number := int(text)) < 0:
        raise ValueError(text)
    return number
