"""Messages about layers: all of them in one message, and a problem that several share in one sentence."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGE = str(Path(__file__).parent)

AROUND = (PACKAGE, str(Path(torch.optim.__file__).parent), str(Path(torch.__file__).parent / "utils"))
"""The files between a user's line and this package: torch wraps `step`, and its schedulers do so again."""

NAMED = 8
"""Layers that one sentence names; it counts the others."""


class Problem(NamedTuple):
    """One sentence about one layer."""

    label: str
    sentence: str


def problems_of(label: str, sentences: Iterable[str]) -> list[Problem]:
    """Give each sentence the label of its layer."""
    return [Problem(label, sentence) for sentence in sentences]


def raise_problems(error: type[Exception], headline: str, problems: Iterable[Problem], closing: str = "") -> None:
    """Raise `error` with one line for each distinct problem; return if there is none.

    Args:
        error: the class of the exception.
        headline: what cannot be done; a colon and the lines follow.
        problems: of all layers.
        closing: what to do about all of them, as a last line.
    """
    lines = problem_lines(problems)
    if lines:
        raise error("\n".join([f"{headline}:", *(f"  {line}" for line in lines), *([closing] if closing else [])]))


def problem_lines(problems: Iterable[Problem]) -> list[str]:
    """Return each distinct sentence once, with the layers it is about."""
    by_sentence: dict[str, list[str]] = {}
    for label, sentence in problems:
        by_sentence.setdefault(sentence, []).append(label)
    return [
        f"{labels[0]}: {sentence}" if len(labels) == 1 else f"{sentence} ({layers(labels, ': ')})"
        for sentence, labels in by_sentence.items()
    ]


def layers(labels: Sequence[str], opening: str = " (") -> str:
    """Return for example "3 layers (q, k, v)"; with the opening ": ", "3 layers: q, k, v"."""
    count = f"{len(labels)} layer{'s' * (len(labels) != 1)}"
    return f"{count}{opening}{names(labels)}{')' * opening.endswith('(')}"


def names(labels: Sequence[str]) -> str:
    """Return the labels in a row; of many, the first ones and three dots."""
    return ", ".join(labels[:NAMED]) + ", ..." * (len(labels) > NAMED)


def warn_user(text: str) -> None:
    """Warn at the line of the user's program that called this package."""
    frame, stacklevel = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(AROUND):
        frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(text, UserWarning, stacklevel=stacklevel)
