"""Tables: aligned columns within the width of a screen, and patterns that stand for names."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaopt.tables import WIDTH, paragraph, patterns, table


def names_of(pattern):
    """Return the names that a pattern stands for, written out."""
    places = []
    for text in re.split(r"(\{[^}]*\})", pattern):
        pieces = text.strip("{}").split(",") if text.startswith("{") else [text]
        places.append([number for piece in pieces for number in written_out(piece)])
    return {"".join(parts) for parts in itertools.product(*places)}


def written_out(piece):
    match = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
    return [str(i) for i in range(int(match[1]), int(match[2]) + 1)] if match else [piece]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"h.{i}.{last}" for i in range(12) for last in "qk"], ["h.{0..11}.{q,k}"]),
        (["h.0.q", "h.2.q"], ["h.{0,2}.q"]),
        (["h.0.q", "h.1.q", "h.1.k"], ["h.{0,1}.q", "h.1.k"]),
        ([f"l.{i}.q" for i in (0, 1, 2, 4, 5, 6, 7, 9)], ["l.{0..2,4..7,9}.q"]),
        (["0", "1"], ["{0,1}"]),
        (["q", "k"], ["{q,k}"]),
        (["h.q"], ["h.q"]),
        (["h.01.q", "h.1.q"], ["h.01.q", "h.1.q"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["3 of a.{0,1}.b.{0,1}"]),
        ([f"l.{i}" for i in (0, 3, 4, 9, 12)], ["l.{0,3,4,...,12}"]),
    ],
)
def test_a_pattern_stands_for_names_that_are_alike(names, expected):
    assert list(patterns(names)) == expected


parts = st.sampled_from(["a", "b", "0", "1", "2", "3", "10"])


@given(st.sets(st.lists(parts, min_size=1, max_size=4).map(".".join), max_size=12))
def test_patterns_hold_each_name_once(names):
    found = patterns(sorted(names))
    assert sorted(name for held in found.values() for name in held) == sorted(names)
    for pattern, held in found.items():
        if " of " not in pattern and "..." not in pattern:
            assert names_of(pattern) == set(held)
        assert len(held) == (int(pattern.split(" of ")[0]) if " of " in pattern else len(held))


@given(st.lists(st.text("ab. ", max_size=300), min_size=1, max_size=4))
def test_a_wrapped_column_keeps_lines_narrow_and_loses_nothing(cells):
    rows = [("name", "count"), *((cell, "3") for cell in cells)]
    lines = table(rows, wrapped=0)
    assert max(map(len, lines)) <= WIDTH
    letters = "".join(re.findall("[ab.]", "".join(lines[1:])))
    assert letters == "".join(re.findall("[ab.]", "".join(cells)))


def test_columns_are_aligned():
    assert table([("a", "b"), ("long", "x"), ("y", "z")]) == ["a     b", "long  x", "y     z"]


def test_a_paragraph_keeps_to_the_width():
    lines = paragraph("word " * 60, "  ")
    assert max(map(len, lines)) <= WIDTH
    assert [line[:5] for line in lines] == ["  wor", *["    w"] * (len(lines) - 1)]
