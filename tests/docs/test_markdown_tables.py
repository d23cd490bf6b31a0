"""Tables render: head, rule and rows have one number of columns, and the README's are no wider than a screen."""

import re

import pytest

from tests.docs.pages import PAGES, README, ROOT

RULE = re.compile(r"\|?(\s*:?-+:?\s*\|)+\s*(:?-+:?\s*)?")
SCREEN = 100


def fits_a_screen(line):
    """Return whether a line is short enough as it is shown, without the marks of bold."""
    return len(line.replace("**", "")) <= SCREEN


def columns(line):
    r"""Return the number of cells of a line. A bar within a cell is written `\|`, in code as well."""
    return len(re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|")))


def tables_of(text):
    """Return the tables of a page, each a list of lines: what a reader sees as one, whether it renders or not."""
    return [found[0].splitlines() for found in re.finditer(r"(?:^\|.*\n?)+", text, re.MULTILINE)]


def faults(text):
    """Return the lines that keep a table from rendering as it is meant."""
    found = []
    for lines in tables_of(text):
        if len(lines) < 3 or not RULE.fullmatch(lines[1]):
            found.append(lines[0])
        found += [line for line in lines if columns(line) != columns(lines[0])]
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_table_renders(page):
    assert faults(page.read_text("utf8")) == []


def test_the_readmes_tables_fit_a_screen():
    lines = [line for table in tables_of(README.read_text("utf8")) for line in table]
    assert len(lines) > 20
    assert [line for line in lines if not fits_a_screen(line)] == []


@pytest.mark.parametrize(
    "table",
    [
        "| option | default | |\n|---|---|---|---|\n| a | b | c |\n",
        "| a | b |\n|---|---|\n| 1 | 2 | 3 |\n",
        "| a | `b|c` |\n|---|---|\n| 1 | 2 |\n",
        "| a | b |\n| 1 | 2 |\n| 3 | 4 |\n",
    ],
    ids=["rule", "row", "bar", "no rule"],
)
def test_a_fault_is_found(table):
    assert faults(table)
    assert not faults("| a | `b\\|c` |\n|---|:-:|\n| 1 | 2 |\n")
