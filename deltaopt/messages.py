"""Messages about layers: all of them in one message, and a problem that several share in one sentence."""

from __future__ import annotations

import itertools
import re
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

NAMED_OF_SEVERAL = 3
"""The same, where there are several sentences."""

WRITTEN_OUT = 1000
"""Characters of problems that one message writes out; it counts the others."""

NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


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
    """Return each distinct problem once, with the layers it is about.

    Sentences that differ only in numbers (shapes, numbers of layers) and in the layer's name are one problem, given in
    the words of its first layer. Of many problems the first ones are written out and the others counted.
    """
    alike: dict[str, list[Problem]] = {}
    kinds: dict[str, str] = {}  # by sentence: a layer's name may be a word or a number in it by chance
    for problem in dict.fromkeys(problems):
        kind = kinds.setdefault(problem.sentence, _without_name_and_numbers(problem))
        alike.setdefault(kind, []).append(problem)
    named = NAMED if len(alike) == 1 else NAMED_OF_SEVERAL
    lines = [_line(same, named) for same in alike.values()]
    ends = itertools.accumulate(map(len, lines))
    written = max(1, sum(end <= WRITTEN_OUT for end in ends))
    if (more := len(lines) - written) > 0:
        lines[written:] = [f"... and {counted(more, 'more problem')}"]
    return lines


def _without_name_and_numbers(problem: Problem) -> str:
    sentence = problem.sentence
    if any(map(str.isalpha, problem.label)):
        sentence = re.sub(rf"(?<!\w){re.escape(problem.label)}(?!\w)", "@", sentence)
    return NUMBER.sub("#", sentence)


def _line(alike: Sequence[Problem], named: int) -> str:
    label, sentence = alike[0]
    if len(alike) == 1:
        return f"{label}: {sentence}"
    labels = [problem.label for problem in alike]
    if all(problem.sentence == sentence for problem in alike):
        return f"{sentence} ({layers(labels, ': ', named)})"
    return f"{label}: {sentence} (and likewise in {layers(labels[1:], ': ', named)})"


def layers(labels: Sequence[str], opening: str = " (", named: int = NAMED) -> str:
    """Return for example "3 layers (q, k, v)"; with the opening ": ", "3 layers: q, k, v"."""
    return f"{counted(len(labels), 'layer')}{opening}{names(labels, named)}{')' * opening.endswith('(')}"


def counted(count: int, noun: str) -> str:
    """Return for example "1 layer" or "3 layers"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def names(labels: Sequence[str], named: int = NAMED) -> str:
    """Return the labels in a row; of many, the first ones and three dots."""
    return ", ".join(labels[:named]) + ", ..." * (len(labels) > named)


def warn_user(text: str) -> None:
    """Warn at the line of the user's program that called this package."""
    frame, stacklevel = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(AROUND):
        frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(text, UserWarning, stacklevel=stacklevel)
