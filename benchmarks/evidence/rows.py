"""The rows of the tables: a method, what it changes in a setting, and how its learning rate is found."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
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

HEAD_LR = 5e-3
"""Of a fresh head that trains alike in all rows. In the others it shares the learning rate of the factors, so that a
row whose factors need a lower one has a slower head as well."""

_UNCLIPPED = {"clip": None, "head_lr": HEAD_LR}
_PLAIN = {"clip": None, "eps": 1e-8, "start": 0.0, "model_dropout": False}

PLAIN_PAIRS = (
    (
        Row("plain-delta-slow", "Delta-LoRA, no clipping, no dropout, lr 5e-4", "delta", changes=_PLAIN, lr=5e-4),
        Row("plain-alpha-slow", "its alpha control", "alpha", changes=_PLAIN, lr=5e-4),
    ),
    (
        Row("plain-delta", "Delta-LoRA, no clipping, no dropout", "delta", changes=_PLAIN, lr_of=("delta", 1.0)),
        Row("plain-alpha", "its alpha control", "alpha", changes=_PLAIN, lr_of=("delta", 1.0)),
    ),
    (
        Row("unclipped-delta", "Delta-LoRA, no clipping, equal heads", "delta", changes=_UNCLIPPED, lr=1.5e-3),
        Row("unclipped-alpha", "its alpha control", "alpha", changes=_UNCLIPPED, lr=1.5e-3),
    ),
)
"""Each pair is one model in exact arithmetic: one learning rate, no clipping, K = 0.

At the low rate training does not amplify what rounding has made different; at the tuned one it may. The third pair
differs from the rows with equal heads by the clipping alone."""

COINCIDENCE = tuple(row for pair in PLAIN_PAIRS for row in pair)


def _with_head(row: Row) -> Row:
    return replace(row, name=f"{row.name}-head", changes={**row.changes, "head_lr": HEAD_LR})


_OF_HEADS = (
    "lora",
    "delta",
    "alpha",
    "ratio-down",
    "ratio-up",
    "restarts",
    "delta-restarts",
    "adalora",
    "lora-plus",
    "rslora",
)
HEAD_SWEEP = tuple(_with_head(next(row for row in MAIN if row.name == name)) for name in _OF_HEADS)
"""Rows with equal heads. The sweeps have equal heads too, and begin from these."""

_LORA, _DELTA, _ALPHA = HEAD_SWEEP[:3]


def _ratio_sweep() -> Iterator[tuple[tuple[float, float], Row]]:
    for ratio, start in itertools.product((0.5, 2.0, 8.0), (0.0, 0.05, 0.2, 0.5)):
        title = f"Delta-LoRA, lambda {ratio:g}, K = {100 * start:g} %"
        changes = {**_DELTA.changes, "update_ratio": ratio, "start": start}
        swept = replace(_DELTA, name=f"delta-ratio{ratio:g}-k{100 * start:g}", title=title, changes=changes)
        yield (ratio, start), _DELTA if (ratio, start) == (2.0, 0.0) else swept


def _rank_sweep() -> Iterator[tuple[int, tuple[Row, ...]]]:
    """Yield LoRA, Delta-LoRA and the control. alpha / r stays: a larger rank is no larger scaling."""
    for rank in (2, 4, 8, 16, 32):
        yield rank, tuple(_of_rank(row, rank) for row in (_LORA, _DELTA, _ALPHA))


def _of_rank(row: Row, rank: int) -> Row:
    if rank == 8:
        return row
    changes = {**row.changes, "rank": rank, "alpha": 2.0 * rank}
    return replace(row, name=f"{row.method}-r{rank}", title=f"{row.title}, r {rank}", changes=changes)


RATIOS: Mapping[tuple[float, float], Row] = dict(_ratio_sweep())
"""Delta-LoRA by (lambda, K as a share of the run)."""

RANKS: Mapping[int, tuple[Row, ...]] = dict(_rank_sweep())
"""LoRA, Delta-LoRA and the control by rank."""

RATIO_SWEEP = tuple(row for row in RATIOS.values() if row not in HEAD_SWEEP)
RANK_SWEEP = tuple(row for rows in RANKS.values() for row in rows if row not in HEAD_SWEEP)

WIDER = (Row("lora-wide", "LoRA, r 16, alpha 128", "lora", changes={"rank": 16, "alpha": 128.0}),)
"""LoRA with four times the rank of a decoder's rows: as high as the change with restarts can have. alpha / r stays."""

PUBLISHED = (Row("lora-dropout", "LoRA, dropout 0.1 in the branch", "lora", changes={"dropout": 0.1}),)
"""Rows of the published recipes alone: LoRA as its own code has it on E2E and WebNLG."""

ROWS: Mapping[str, Row] = {
    row.name: row for row in (*MAIN, *COINCIDENCE, *HEAD_SWEEP, *WIDER, *PUBLISHED, *RATIO_SWEEP, *RANK_SWEEP)
}
