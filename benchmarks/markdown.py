"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

WIDTH = 110
"""Characters of a line that a screen holds."""

Column: TypeAlias = tuple[str, Sequence[str]]
"""The heading of a column, and its cells."""


def paragraphs(*texts: str) -> str:
    """Return the texts that are not empty, with empty lines between them."""
    return "\n\n".join(text for text in texts if text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    first, *others = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    return "\n".join([first, "|" + "---|" * len(head), *others])


def narrow_tables(first: Column, groups: Iterable[Sequence[Column]], width: int = WIDTH) -> str:
    """Return one table, or several with the same first column where one would be wider than a screen.

    Args:
        first: the column that names the rows.
        groups: columns that stay together.
        width: characters of a line, at most, as long as a group by itself is not wider.
    """
    parts: list[list[Column]] = []
    for group in groups:
        columns = [column for column in group if any(column[1])]
        if not columns:
            continue
        if not parts or _width([first, *parts[-1], *columns]) > width:
            parts.append([])
        parts[-1] += columns
    return paragraphs(*(_of_columns([first, *part]) for part in parts))


def _of_columns(columns: Sequence[Column]) -> str:
    return table([head for head, _ in columns], zip(*(cells for _, cells in columns), strict=True))


def _width(columns: Sequence[Column]) -> int:
    return 1 + sum(3 + max(len(text) for text in (head, *cells)) for head, cells in columns)
