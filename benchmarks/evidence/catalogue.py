"""The tasks by name: what is learned, where the examples are, and by which metrics it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["classify", "regress", "continue", "rewrite"]
"""A label, a number, a text that a decoder writes after its input, a text that an encoder-decoder writes."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        kind: decides the model's class, the loss and the evaluation.
        folder: of its files below the data folder.
        metrics: what an evaluation returns in addition to "loss"; the first one is the main metric. Empty for tasks
            that write texts: these are tuned by "loss", and their texts are scored later.
        scores: what `scores.score_texts` returns.
        labels: number of classes; None where the data tells.
        test: the split that results are of.
        more: a second split that is evaluated where it is given, and the ending of its metrics' names.
        hub: name and configuration of the data set on the hub; empty where there is only the folder.
        columns: the hub's names for the columns of the files.
        hub_splits: the hub's names for `test` and `more`.
    """

    kind: Kind
    folder: str
    metrics: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    labels: int | None = None
    test: str = "dev"
    more: tuple[str, str] | None = None
    hub: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    hub_splits: tuple[str, ...] = ("validation",)

    @property
    def writes(self) -> bool:
        return self.kind in ("continue", "rewrite")

    @property
    def metric(self) -> str:
        """The main metric, by which the learning rate is tuned."""
        return self.metrics[0] if self.metrics else "loss"


def _glue(
    name: str,
    metrics: tuple[str, ...],
    columns: tuple[str, ...],
    labels: int = 2,
    more: tuple[str, str] | None = None,
    hub_splits: tuple[str, ...] = ("validation",),
) -> Task:
    return Task(
        kind="classify" if labels > 1 else "regress",
        folder=f"glue/{name}",
        metrics=metrics,
        labels=labels,
        more=more,
        hub=("nyu-mll/glue", name),
        columns=columns,
        hub_splits=hub_splits,
    )


PAIR = ("sentence1", "sentence2")
TASKS = {
    "docstrings": Task("classify", "docstrings", ("accuracy",), test="test"),
    "cola": _glue("cola", ("matthews",), ("sentence",)),
    "sst2": _glue("sst2", ("accuracy",), ("sentence",)),
    "mrpc": _glue("mrpc", ("accuracy", "f1"), PAIR),
    "rte": _glue("rte", ("accuracy",), PAIR),
    "stsb": _glue("stsb", ("pearson", "spearman"), PAIR, labels=1),
    "mnli": _glue(
        "mnli",
        ("accuracy",),
        ("premise", "hypothesis"),
        labels=3,
        more=("dev_mismatched", "mismatched"),
        hub_splits=("validation_matched", "validation_mismatched"),
    ),
    "qnli": _glue("qnli", ("accuracy",), ("question", "sentence")),
    "qqp": _glue("qqp", ("accuracy", "f1"), ("question1", "question2")),
    "e2e": Task("continue", "e2e", scores=("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"), test="test"),
    "webnlg": Task("continue", "webnlg2017", scores=("BLEU", "METEOR", "TER"), test="test"),
    "xsum": Task(
        "rewrite",
        "xsum",
        scores=("ROUGE-1", "ROUGE-2", "ROUGE-L"),
        test="test",
        hub=("EdinburghNLP/xsum",),
        columns=("document", "summary"),
        hub_splits=("test",),
    ),
}


def task_named(name: str) -> Task:
    """Return a task.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[name]
