"""The paper's recipes as grids: RoBERTa-base on GLUE, GPT-2 Medium on E2E and WebNLG, BART-large on XSum.

Sources: [D] the Delta-LoRA paper (arXiv 2309.02411), [L] Table 9 and 11 of the LoRA paper (arXiv 2106.09685), [S] the
scripts of microsoft/LoRA, [A] the XSum script of the AdaLoRA repository. Where [D] is silent, what it builds on is
taken; what none of them says is marked "usual".

The learning rates are the published ones. The grids with "-tuned" in the name tune each row as the project's own grids
do, on the published rate, a third and three times of it, and have controls of which none is published. Steps follow
from the official sizes of the training sets, so that a grid is planned without data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.evidence.grid import Experiment, Grid
from benchmarks.evidence.rows import Kind

ROBERTA, GPT2, BART = "FacebookAI/roberta-base", "openai-community/gpt2-medium", "facebook/bart-large"

SYSTEMS = (
    "lora",
    "delta",
    "alpha",
    "lora-lr3",
    "full",
    "adalora",
    "dylora",
    "full-qv",
    "full-frozen-embeddings",
    "delta-dropout",
)
"""Every system that [D] compares, and LoRA with the larger alpha, the control that it lacks."""

CONTROLS = ("lora-plus", "rslora", "sgd", "ratio-down", "restarts", "delta-restarts")
"""What no paper has a learning rate of: rows of the tuned grids alone."""

SIZES = {
    "mrpc": 3_668,
    "rte": 2_490,
    "stsb": 5_749,
    "cola": 8_551,
    "sst2": 67_349,
    "qnli": 104_743,
    "qqp": 363_846,
    "mnli": 392_702,
    "e2e": 42_061,
    "webnlg": 18_025,
    "xsum": 204_045,
}
"""Training examples. E2E, WebNLG and all of GLUE but QNLI, QQP and MNLI were counted in the files."""


class Glue(NamedTuple):
    """What differs between the tasks of GLUE, for LoRA with RoBERTa-base."""

    lr: float
    epochs: int
    batch_size: int


GLUE = {
    # The smallest data first. [L]; those of [S] were compared, which lack CoLA's, and SST-2's batch is [L]'s alone.
    # [S] has these batches on each of 8 GPUs. It begins MRPC, RTE and STS-B from a model of MNLI; here all begin from
    # the plain model.
    "mrpc": Glue(4e-4, 30, 16),
    "rte": Glue(5e-4, 80, 32),
    "stsb": Glue(4e-4, 40, 16),
    "cola": Glue(4e-4, 80, 32),
    "sst2": Glue(5e-4, 60, 16),
    "qnli": Glue(4e-4, 25, 32),
    "qqp": Glue(5e-4, 25, 16),
    "mnli": Glue(5e-4, 30, 16),
}

ON_GLUE: Mapping[str, Any] = {
    "max_length": 256,  # [D]; [S] 512
    "rank": 8,
    "update_ratio": 0.5,  # [D]
    "weight_decay": 0.1,  # [S]
    "warmup": 0.06,
    "start": 0.06,  # [D]: K is the number of warm-up steps
}
LR_OF_ROBERTA = 2e-5
"""Of fine-tuning: usual."""

TO_TEXT: Mapping[str, Any] = {
    "batch_size": 8,
    "max_length": 512,
    "rank": 4,
    "alpha": 32.0,
    "update_ratio": 2.0,  # [D]
    "weight_decay": 0.01,
    "label_smoothing": 0.1,
    "clip": None,  # [S]
    "eps": 1e-6,  # [S]: its own AdamW's
    "beams": 10,
    "length_penalty": 0.8,  # [D] and [S]; for E2E [L] has 0.9
    "no_repeat": 4,
    "new_tokens": 64,  # [S]
}
LRS_OF_SGD = (5e-3, 1.5e-2, 5e-2)
"""No published rate is known; the grid is extended as the others are."""

EPOCHS_TO_TEXT, WARMUP_TO_TEXT, START_TO_TEXT = 5, 500, 500

SUMMARIES: Mapping[str, Any] = {
    "batch_size": 64,  # [A]: 8 on each of 8 GPUs
    "max_length": 768,  # [A]; it cuts targets at 64 tokens, which few have
    "rank": 8,  # [A]: what AdaLoRA's budget shrinks to
    "alpha": 32.0,  # [A]
    "update_ratio": 0.5,  # [D]
    "weight_decay": 0.0,  # [A]
    "beams": 8,  # [A]
    "length_penalty": 1.0,  # usual
    "no_repeat": 3,  # BART's own config
    "new_tokens": 64,  # [A]
    # Not published: 67 TFLOP a step and 11,334 documents do not fit into one GPU and calls of 25 minutes otherwise.
    "precision": "bfloat16",
    "test_examples": 2_000,
}
EPOCHS_OF_XSUM, WARMUP_OF_XSUM, START_OF_XSUM = 25, 3_000, 1_000
"""[A], [A] and [D]."""


def steps_of(task: str, epochs: int, batch_size: int) -> int:
    return epochs * math.ceil(SIZES[task] / batch_size)


def glue(alpha: float, tuned: bool = False) -> list[Experiment]:
    """Return the recipes of GLUE. [S] has alpha 16, [L] says 8."""
    return [
        _experiment(
            task,
            ROBERTA,
            SYSTEMS,
            {**ON_GLUE, "steps": steps_of(task, of.epochs, of.batch_size), "batch_size": of.batch_size, "alpha": alpha},
            lr=of.lr,
            dense_lr=LR_OF_ROBERTA,
            tuned=tuned,
        )
        for task, of in GLUE.items()
    ]


def to_text(task: str, tuned: bool = False) -> list[Experiment]:
    """Return the recipe of E2E or WebNLG. LoRA has a dropout in its branch there, which Delta-LoRA leaves out."""
    steps = steps_of(task, EPOCHS_TO_TEXT, TO_TEXT["batch_size"])
    shares = {"steps": steps, "warmup": WARMUP_TO_TEXT / steps, "start": START_TO_TEXT / steps}
    rows = ("lora", "delta", "alpha", "lora-dropout", *SYSTEMS[3:])
    return [_experiment(task, GPT2, rows, {**TO_TEXT, **shares}, lr=2e-4, dense_lr=5e-5, tuned=tuned)]


def summaries(tuned: bool = False) -> list[Experiment]:
    """Return the recipe of XSum."""
    steps = steps_of("xsum", EPOCHS_OF_XSUM, SUMMARIES["batch_size"])
    shares = {"steps": steps, "warmup": WARMUP_OF_XSUM / steps, "start": START_OF_XSUM / steps}
    return [_experiment("xsum", BART, SYSTEMS, {**SUMMARIES, **shares}, lr=5e-4, dense_lr=3e-5, tuned=tuned)]


def _experiment(
    task: str, model: str, rows: Sequence[str], setting: Mapping[str, Any], *, lr: float, dense_lr: float, tuned: bool
) -> Experiment:
    def rates(published: float) -> tuple[float, ...]:
        return tuple(float(f"{published * factor:.2g}") for factor in (1 / 3, 1, 3)) if tuned else (published,)

    lrs: Mapping[Kind, Sequence[float]] = {"adapter": rates(lr), "dense": rates(dense_lr), "sgd": LRS_OF_SGD}
    rows = (*rows, *CONTROLS) if tuned else rows
    return Experiment(task, model, rows, setting, lrs, tuning_seeds=int(tuned))


PAPER = (
    Grid("paper-glue", glue(16.0)),
    Grid("paper-glue-alpha8", glue(8.0)),
    Grid("paper-e2e", to_text("e2e")),
    Grid("paper-webnlg", to_text("webnlg")),
    Grid("paper-xsum", summaries()),
    Grid("paper-glue-tuned", glue(16.0, tuned=True)),
    Grid("paper-e2e-tuned", to_text("e2e", tuned=True)),
    Grid("paper-webnlg-tuned", to_text("webnlg", tuned=True)),
    Grid("paper-xsum-tuned", summaries(tuned=True)),
)
