"""The grids: which rows are compared on which tasks, and with what settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evidence.grid import Experiment, Grid
from benchmarks.evidence.recipes import PAPER
from benchmarks.evidence.rows import COINCIDENCE, HEAD_LR, HEAD_SWEEP, MAIN, RANK_SWEEP, RATIO_SWEEP, WIDER, Kind, Row

MINILM, STORIES, SMOLLM2 = "all-MiniLM-L6-v2", "stories260k", "SmolLM2-135M-Instruct-Q4_1"

ENCODER_LRS: Mapping[Kind, Sequence[float]] = {
    "adapter": (5e-4, 1.5e-3, 5e-3),
    "dense": (5e-5, 1.5e-4, 5e-4),
    "sgd": (5e-3, 1.5e-2, 5e-2),
}

EQUAL_HEADS_LRS: Mapping[Kind, Sequence[float]] = {"adapter": (5e-4, 9e-4, 1.5e-3, 2.7e-3, 5e-3)}
SWEEP_LRS: Mapping[Kind, Sequence[float]] = {"adapter": (9e-4, 1.5e-3, 2.7e-3)}

DECODER_LRS: Mapping[Kind, Sequence[float]] = {
    "adapter": (1.5e-3, 5e-3, 1.5e-2),
    "dense": (5e-4, 1.5e-3, 5e-3),
    "sgd": (5e-2, 1.5e-1, 5e-1),
}

ONE_LR: Mapping[Kind, Sequence[float]] = {"adapter": (1.5e-3,)}
OTHER_SIZE_LRS: Mapping[Kind, Sequence[float]] = {"adapter": (5e-4, 1.5e-3, 5e-3)}

KEY = ("lora", "delta", "alpha", "lora-lr3", "full", "adalora", "ratio-down", "restarts", "delta-restarts")
"""The rows of the larger tasks."""

PAIR = ("lora", "delta", "alpha")
"""The rows of the smaller comparisons."""

DOCSTRINGS = {"steps": 300, "batch_size": 16, "max_length": 32}
GLUE = {"steps": 400, "batch_size": 16, "max_length": 64}
PAIRS_OF_GLUE = {"steps": 400, "batch_size": 16, "max_length": 96}
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
CONTEXT = 512
"""Of stories260k. An eighth of WebNLG's training examples are longer than 320 tokens."""

HIGHER_RANK = WIDER[0].changes
"""With r 4 this small model learns little of E2E; with r 16 it learns some of it."""

SHORTER = {"steps": 500, "test_examples": 200}
"""For WebNLG: one core takes 14 minutes for 1,000 steps of its longer texts, and 4 to 8 to write E2E's 630 texts."""

OTHER_SIZE = {
    **TO_TEXT,
    "steps": 80,
    "batch_size": 4,
    "max_length": 160,
    "no_repeat": 4,
    "new_tokens": 64,
    "test_examples": 24,
}
"""135 million parameters: with two runs at once a step takes 3 seconds, and a text 7."""


def _names(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(row.name for row in rows)


def _encoder(task: str, rows: Sequence[str], setting: Mapping[str, Any], **more: Any) -> Experiment:
    return Experiment(task, MINILM, rows, setting, **{"lrs": ENCODER_LRS, **more})


def _decoder(task: str, rows: Sequence[str], setting: Mapping[str, Any]) -> Experiment:
    return Experiment(task, STORIES, rows, setting, DECODER_LRS)


FULL = Grid(
    "full",
    (
        _encoder("docstrings", (*_names(MAIN), *_names(COINCIDENCE)), DOCSTRINGS, tuning_seeds=2),
        _encoder("sst2", KEY, GLUE, tuning_seeds=2),
        _decoder("e2e", (*KEY, *_names(WIDER)), TO_TEXT),
        _encoder("docstrings", _names(HEAD_SWEEP), DOCSTRINGS, lrs=EQUAL_HEADS_LRS, tuning_seeds=2),
        _encoder("cola", ("lora",), GLUE, lrs=ONE_LR, seeds=1, tuning_seeds=0),
        _encoder("rte", ("lora",), PAIRS_OF_GLUE, lrs=ONE_LR, seeds=1, tuning_seeds=0),
        _encoder("stsb", PAIR, {**PAIRS_OF_GLUE, "head_lr": HEAD_LR}, lrs=SWEEP_LRS, tuning_seeds=2),
        _encoder("mrpc", PAIR, {**PAIRS_OF_GLUE, "head_lr": HEAD_LR}, lrs=SWEEP_LRS, tuning_seeds=2),
        _decoder("webnlg", PAIR, {**TO_TEXT, **HIGHER_RANK, **SHORTER, "max_length": CONTEXT}),
        _encoder("docstrings", _names(RATIO_SWEEP), DOCSTRINGS, lrs=SWEEP_LRS, tuning_seeds=2),
        _encoder("docstrings", _names(RANK_SWEEP), DOCSTRINGS, lrs=SWEEP_LRS, tuning_seeds=2),
        Experiment("e2e", SMOLLM2, PAIR, OTHER_SIZE, OTHER_SIZE_LRS),
    ),
)

SMALL = Grid("small", (_encoder("docstrings", _names(HEAD_SWEEP[:3]), DOCSTRINGS, lrs=SWEEP_LRS),))

GRIDS = {grid.name: grid for grid in (FULL, SMALL, *PAPER)}
