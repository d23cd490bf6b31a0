"""One row of the tables: a case, what becomes of it with each rule, and the tests that prove it."""

from __future__ import annotations

from dataclasses import dataclass

VERDICTS = ("exact", "to rounding", "refused", "differs", "upstream", "not measured", "-")
"""What a cell begins with; `docs/devices.md` says what each means."""

UNPROVED = ("upstream", "not measured")
"""Verdicts that need a reason in the place of a test."""


@dataclass(frozen=True)
class Row:
    """A case of several ranks.

    Args:
        case: what a user does.
        in_place: what becomes of it, beginning with one of `VERDICTS`.
        folded: the same with the folded rule.
        tests: that prove it, as "folder/test_file.py::test_name" in tests/.
        note: how much it differs, by which name it is refused, or why no test proves it.
    """

    case: str
    in_place: str
    folded: str
    tests: tuple[str, ...] = ()
    note: str = ""

    @property
    def is_unproved(self) -> bool:
        """Tell if no cell says anything that a test of ours could show."""
        return all(cell.startswith((*UNPROVED, "-")) for cell in (self.in_place, self.folded))


@dataclass(frozen=True)
class Section:
    """One table: its heading, what stands before it, and its rows."""

    heading: str
    text: str
    rows: tuple[Row, ...]


def both(case: str, verdict: str, *tests: str, note: str = "") -> Row:
    """Return a row of which both rules have the same verdict."""
    return Row(case, verdict, verdict, tests, note)
