"""The rows of the tables: a method, what it changes in a setting, and how its learning rate is found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Kind = Literal["adapter", "dense", "sgd"]
"""Which grid of learning rates a row is tuned on."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: short, of the files.
        title: in tables.
        method: a name of `methods.METHODS`.
        kind: the grid that its learning rate is tuned on.
        changes: what differs from the setting of the experiment.
        lr_of: (row, factor): take another row's tuned learning rate times a factor, instead of tuning.
        lr: take this learning rate instead of tuning.
    """

    name: str
    title: str
    method: str
    kind: Kind = "adapter"
    changes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    lr_of: tuple[str, float] | None = None
    lr: float | None = None

    @property
    def is_tuned(self) -> bool:
        return self.lr_of is None and self.lr is None


MAIN = (
    # What the paper compares.
    Row("full", "fine-tuning", "full", "dense"),
    Row("full-frozen-embeddings", "fine-tuning, embeddings frozen", "full-frozen-embeddings", "dense"),
    Row("full-qv", "fine-tuning of W_Q and W_V", "full-qv", "dense"),
    Row("lora", "LoRA", "lora"),
    Row("adalora", "AdaLoRA", "adalora"),
    Row("dylora", "DyLoRA", "dylora"),
    Row("delta", "Delta-LoRA", "delta"),
    Row("delta-dropout", "Delta-LoRA, dropout 0.1 in the branch", "delta", changes={"dropout": 0.1}),
    Row("lora-lr3", "LoRA, its learning rate x 3", "lora", lr_of=("lora", 3.0)),
    # Controls that the paper lacks.
    Row("alpha", "LoRA, alpha x (1 + lambda)", "alpha"),
    Row("lora-plus", "LoRA+, ratio 1 + lambda", "lora-plus"),
    Row("rslora", "rsLoRA", "rslora"),
    Row("sgd", "fine-tuning with SGD", "sgd", "sgd"),
    # Where Delta-LoRA is not a larger alpha.
    Row("ratio-up", "Delta-LoRA, lambda warming up", "ratio-up"),
    Row("ratio-down", "Delta-LoRA, lambda dying down", "ratio-down"),
    Row("restarts", "LoRA with restarts", "restarts"),
    Row("delta-restarts", "Delta-LoRA with restarts", "delta-restarts"),
    Row("delta-k5", "Delta-LoRA, K = 5 % of the run", "delta", changes={"start": 0.05}),
    Row("delta-k20", "Delta-LoRA, K = 20 % of the run", "delta", changes={"start": 0.2}),
)

_PLAIN = {"clip": None, "eps": 1e-8, "start": 0.0, "model_dropout": False}

SWEPT_RATIOS = (0.5, 2.0, 8.0)
SWEPT_STARTS = (0.0, 0.05, 0.2, 0.5)
SWEPT_RANKS = (2, 4, 16, 32)
"""8 is the rank of the other rows."""


def _ratio_sweep() -> Iterator[Row]:
    for ratio in SWEPT_RATIOS:
        for start in SWEPT_STARTS:
            title = f"Delta-LoRA, lambda {ratio:g}, K = {100 * start:g} %"
            changes = {"update_ratio": ratio, "start": start}
            yield Row(f"delta-ratio{ratio:g}-k{100 * start:g}", title, "delta", changes=changes)


def _rank_sweep() -> Iterator[Row]:
    for rank in SWEPT_RANKS:
        # alpha / r stays: a larger rank is no larger scaling.
        changes = {"rank": rank, "alpha": 2.0 * rank}
        for name, title in (("lora", "LoRA"), ("delta", "Delta-LoRA"), ("alpha", "LoRA, alpha x (1 + lambda)")):
            yield Row(f"{name}-r{rank}", f"{title}, r {rank}", name, changes=changes)


PLAIN_PAIRS = (
    (
        Row("plain-delta-slow", "Delta-LoRA, no clipping, no dropout, lr 5e-4", "delta", changes=_PLAIN, lr=5e-4),
        Row("plain-alpha-slow", "its alpha control", "alpha", changes=_PLAIN, lr=5e-4),
    ),
    (
        Row("plain-delta", "Delta-LoRA, no clipping, no dropout", "delta", changes=_PLAIN, lr_of=("delta", 1.0)),
        Row("plain-alpha", "its alpha control", "alpha", changes=_PLAIN, lr_of=("delta", 1.0)),
    ),
)
"""Each pair is one model in exact arithmetic: one learning rate, no clipping, K = 0, no dropout.

At the low rate training does not amplify what rounding has made different; at the tuned one it may."""

HEAD_LR = 5e-3
HEAD_SWEEP = (
    Row("lora-head", "LoRA", "lora", changes={"head_lr": HEAD_LR}),
    Row("delta-head", "Delta-LoRA", "delta", changes={"head_lr": HEAD_LR}),
    Row("alpha-head", "LoRA, alpha x (1 + lambda)", "alpha", changes={"head_lr": HEAD_LR}),
)
"""A head that trains alike in all rows. In the others it shares the learning rate of the factors, so that a row whose
factors need a lower one has a slower head as well."""

COINCIDENCE = tuple(row for pair in PLAIN_PAIRS for row in pair)

PUBLISHED = (Row("lora-dropout", "LoRA, dropout 0.1 in the branch", "lora", changes={"dropout": 0.1}),)
"""Rows of the published recipes alone: LoRA as its own code has it on E2E and WebNLG."""

RATIO_SWEEP = tuple(_ratio_sweep())
RANK_SWEEP = tuple(_rank_sweep())

ROWS: Mapping[str, Row] = {
    row.name: row for row in (*MAIN, *COINCIDENCE, *HEAD_SWEEP, *PUBLISHED, *RATIO_SWEEP, *RANK_SWEEP)
}
