"""The numbers in the sentences of the pages: they come from the results, as those of the tables do.

A sentence is written by hand, and stands in a page and in `passages.py`, where each number that is a result is a
``{}``. The numbers are filled in when the pages are made. What the words say, the settings among them, is checked then:
a sentence that does not hold any more has to be written anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.evidence.facts import Facts

NUMBER = r"([-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)"


@dataclass(frozen=True)
class Passage:
    """A part of a page with numbers of results.

    Attributes:
        text: the words, with a single space where the page may break the line, and ``{}`` for each number.
        numbers: makes the numbers, in the order of the text.
        holds: whether the words are right.
    """

    text: str
    numbers: Callable[[Facts], Sequence[str]] = lambda facts: ()
    holds: Callable[[Facts], bool] = lambda facts: True

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the text of the page, with a group for each number."""
        words = [re.escape(word).replace(r"\{\}", NUMBER) for word in self.text.split(" ")]
        return re.compile(r"\s+".join(words))


def filled_in(page: str, passages: Sequence[Passage], facts: Facts) -> str:
    """Return a page with the numbers of its passages.

    Args:
        page: its text.
        passages: each of them stands in it once.
        facts: the results.

    Raises:
        ValueError: if a passage is not there, or there twice; if it has more or fewer numbers than are made for it, or
            its words do not hold.
    """
    for passage in passages:
        found = list(passage.pattern.finditer(page))
        if len(found) != 1:
            raise ValueError(f"the page has {len(found)} times, expected once: {passage.text!r}")
        if not passage.holds(facts):
            raise ValueError(f"the results do not show any more what the page says, write it anew: {passage.text!r}")
        page = page[: found[0].start()] + _with(found[0], passage.numbers(facts)) + page[found[0].end() :]
    return page


def _with(match: re.Match[str], numbers: Sequence[str]) -> str:
    if len(numbers) != match.re.groups:
        raise ValueError(f"{len(numbers)} numbers for {match.re.groups} places: {match[0]!r}")
    text = match[0]
    for place in range(len(numbers), 0, -1):
        start, end = (position - match.start() for position in match.span(place))
        text = text[:start] + numbers[place - 1] + text[end:]
    return text
