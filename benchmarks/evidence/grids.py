"""The grids: which rows are compared on which tasks, and with what settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.grid import Experiment, Grid
from benchmarks.evidence.recipes import PAPER
from benchmarks.evidence.rows import COINCIDENCE, HEAD_SWEEP, MAIN, RANK_SWEEP, RATIO_SWEEP, Kind, Row

MINILM, STORIES = "all-MiniLM-L6-v2", "stories260k"

ENCODER_LRS: Mapping[Kind, Sequence[float]] = {
    "adapter": (5e-4, 1.5e-3, 5e-3),
    "dense": (5e-5, 1.5e-4, 5e-4),
    "sgd": (5e-3, 1.5e-2, 5e-2),
}
FINE_LRS = (5e-4, 9e-4, 1.5e-3, 2.7e-3, 5e-3)

DECODER_LRS: Mapping[Kind, Sequence[float]] = {
    "adapter": (1.5e-3, 5e-3, 1.5e-2),
    "dense": (5e-4, 1.5e-3, 5e-3),
    "sgd": (5e-2, 1.5e-1, 5e-1),
}

KEY = ("lora", "delta", "alpha", "lora-lr3", "full", "adalora", "ratio-down", "restarts", "delta-restarts")
"""The rows of the larger tasks."""

PAIR = ("lora", "delta", "alpha")
"""The rows of the tasks that only confirm."""

DOCSTRINGS = {"steps": 300, "batch_size": 16, "max_length": 32}
GLUE = {"steps": 400, "batch_size": 16, "max_length": 64}
PAIRS_OF_GLUE = {"steps": 600, "batch_size": 16, "max_length": 96}
TO_TEXT = {
    "steps": 1000,
    "batch_size": 8,
    "max_length": 320,
    "rank": 4,
    "alpha": 32.0,
    "start": 500 / 26_290,  # the paper's K = 500 of five epochs in batches of 8
    "weight_decay": 0.01,
    "warmup": 500 / 26_290,
    "label_smoothing": 0.1,
    "beams": 10,
    "length_penalty": 0.8,
    "no_repeat": 0,  # of a near-character vocabulary four tokens are half a word
}


def _names(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(row.name for row in rows)


def _encoder(task: str, metric: str, rows: Sequence[str], setting: Mapping[str, Any], **more: Any) -> Experiment:
    return Experiment(task, MINILM, metric, rows, setting, ENCODER_LRS, **more)


def _decoder(task: str, rows: Sequence[str], **more: Any) -> Experiment:
    return Experiment(task, STORIES, "loss", rows, TO_TEXT, DECODER_LRS, **more)


FULL = Grid(
    "full",
    (
        _encoder("docstrings", "accuracy", (*_names(MAIN), *_names(COINCIDENCE)), DOCSTRINGS, tuning_seeds=2),
        _encoder("sst2", "accuracy", KEY, GLUE, tuning_seeds=2),
        _decoder("e2e", KEY),
        _encoder("stsb", "pearson", PAIR, PAIRS_OF_GLUE, tuning_seeds=2),
        _encoder("mrpc", "accuracy", PAIR, PAIRS_OF_GLUE, tuning_seeds=2),
        _decoder("webnlg", PAIR),
        Experiment("docstrings", MINILM, "accuracy", _names(HEAD_SWEEP), DOCSTRINGS, {"adapter": FINE_LRS}),
        _encoder("docstrings", "accuracy", _names(RATIO_SWEEP), DOCSTRINGS, tuning_seeds=2),
        _encoder("docstrings", "accuracy", _names(RANK_SWEEP), DOCSTRINGS, tuning_seeds=2),
        _encoder("cola", "matthews", ("lora",), GLUE, seeds=1),
        _encoder("rte", "accuracy", ("lora",), PAIRS_OF_GLUE, seeds=1),
    ),
)

SMALL = Grid("small", (_encoder("docstrings", "accuracy", (*PAIR, "lora-lr3", "ratio-down"), DOCSTRINGS),))

GRIDS = {grid.name: grid for grid in (FULL, SMALL, *PAPER)}
