"""Tables of layers for a terminal: aligned columns, and one pattern for names that differ in their numbers."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

WIDTH = 118
"""The characters of the widest line."""

GAP = "  "

LISTED = 4
"""Numbers and ranges that a pattern lists."""


def table(rows: Sequence[Sequence[str]], wrapped: int | None = None) -> list[str]:
    """Return rows of cells as lines, with aligned columns.

    Args:
        rows: the first one holds the heads.
        wrapped: the column whose cells take several lines where a line would be wider than `WIDTH`. Default: none.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if wrapped is not None:
        others = sum(widths) - widths[wrapped] + len(GAP) * (len(widths) - 1)
        widths[wrapped] = min(widths[wrapped], max(24, WIDTH - others))
    lines = []
    for row in rows:
        pieces = [""] if wrapped is None else _pieces(row[wrapped], widths[wrapped])
        for i, piece in enumerate(pieces):
            cells = [piece if k == wrapped else cell * (i == 0) for k, cell in enumerate(row)]
            lines.append(GAP.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return lines


def paragraph(text: str, indent: str = "") -> list[str]:
    """Return a sentence as lines that are not wider than `WIDTH`, those after the first one indented further."""
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + GAP, break_on_hyphens=False)


def grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Return the items with equal keys as lists, in the order of the first ones."""
    found: dict[Hashable, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def span(numbers: Iterable[float | None], shown: Callable[[float], str], unknown: str = "unknown") -> str:
    """Return the smallest and the largest number as text; one of them if they look alike.

    Args:
        numbers: None for those that are not known.
        shown: writes a number.
        unknown: is returned if none is known.
    """
    known = [number for number in numbers if number is not None]
    if not known:
        return unknown
    low, high = shown(min(known)), shown(max(known))
    return low if low == high else f"{low} to {high}"


def patterns(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names by what they have in common: "h.{0..11}.attn.{q,v}" of 24 of them.

    Names share a pattern where they differ in their numbers, or in their last part and have the same numbers. A
    pattern that stands for more names than there are begins with their count, as in "3 of h.{0..1}.mlp.{0..1}".
    """
    numbered: dict[str, dict[tuple[int, ...], str]] = {}
    for name in dict.fromkeys(names):
        parts = name.split(".")
        numbers = tuple(int(part) for part in parts if _is_number(part))
        numbered.setdefault(".".join("#" if _is_number(part) else part for part in parts), {})[numbers] = name
    siblings: dict[tuple[bool, str, frozenset[tuple[int, ...]]], list[str]] = {}
    for template, members in numbered.items():
        stem, _, last = template.rpartition(".")
        key = (False, template) if last == "#" else (True, stem)
        siblings.setdefault((*key, frozenset(members)), []).append(template)
    found = {}
    for (_, stem, sets), templates in siblings.items():
        lasts = [template.removeprefix(f"{stem}.") for template in templates]
        template = templates[0] if len(templates) == 1 else f"{stem}.{{{','.join(lasts)}}}".lstrip(".")
        held = [name for t in templates for name in numbered[t].values()]
        found[_filled(template, sets, len(held))] = held
    return found


def _filled(template: str, numbers: frozenset[tuple[int, ...]], count: int) -> str:
    """Put the numbers into the places of a template."""
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    written = iter(map(_range, columns))
    text = re.sub(r"(?<![^.])#(?![^.])", lambda _: next(written), template)
    possible = 1
    for column in columns:
        possible *= len(column)
    return text if possible == len(numbers) else f"{count} of {text}"


def _range(numbers: Sequence[int]) -> str:
    """Return numbers in order as "3", "{0..11}" or "{0..2,4..11}"; of many runs, the first ones and the last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    pieces = [
        piece
        for run in runs
        for piece in ([f"{run[0]}..{run[-1]}"] if len(run) > 2 else [str(number) for number in run])
    ]
    if len(pieces) > LISTED:
        pieces = [*pieces[: LISTED - 1], "...", pieces[-1]]
    return pieces[0] if len(numbers) == 1 else f"{{{','.join(pieces)}}}"


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and str(int(part)) == part


def _pieces(cell: str, width: int) -> list[str]:
    """Break a cell behind dots and spaces; in the middle of a word only where that is too long by itself."""
    lines = [""]
    for word in re.findall(r"[^. ]*[. ]?", cell):
        room = width - len(GAP) * (len(lines) > 1)
        if lines[-1] and len((lines[-1] + word).rstrip()) > room:
            lines.append("")
            room = width - len(GAP)
        while len(word.rstrip()) > room:
            lines[-1], word = word[:room], word[room:]
            lines.append("")
            room = width - len(GAP)
        lines[-1] += word
    return [lines[0], *(GAP + line for line in lines[1:] if line)]
