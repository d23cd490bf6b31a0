"""docs/devices.md is what the rows say, and the rows name tests that exist."""

import pytest

from tests.devices.page import PAGE, functions_of, named_tests, rendered
from tests.devices.row import UNPROVED, VERDICTS
from tests.devices.rows import SECTIONS

WIDTH = 100

ROWS = [row for section in SECTIONS for row in section.rows]
WRITE = "run `python -m tests.devices`, which writes the page if the tests that it names pass"


def test_the_page_is_what_the_rows_say():
    assert PAGE.read_text("utf8") == rendered(), WRITE


def test_the_tests_that_are_named_exist():
    assert [test for test in named_tests() if test.split("::")[1] not in functions_of(test.split("::")[0])] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.case)
def test_a_row_is_proved_or_says_why_not(row):
    for cell in (row.in_place, row.folded):
        assert cell.startswith(VERDICTS)
        if cell.startswith((*UNPROVED, "differs")):
            assert row.note
    assert row.tests or row.is_unproved


def test_the_tables_are_as_wide_as_a_page():
    assert [line for line in rendered().splitlines() if line.startswith("|") and len(line) > WIDTH] == []


def test_cases_have_names_of_their_own():
    for section in SECTIONS:
        cases = [row.case for row in section.rows]
        assert len({*cases}) == len(cases)
