"""Every cell of docs/routes.md is what a model that takes the route shows; no cell is silent."""

import pytest

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")
pytest.importorskip("accelerate", reason="runs where accelerate is installed")
pytest.importorskip("lightning", reason="runs where lightning is installed")
pytest.importorskip("diffusers", reason="runs where diffusers is installed")
pytest.importorskip("loralib", reason="runs where loralib is installed")

from tests.routes.page import PAGE, read, rendered, shown
from tests.routes.route import Outcome, outcome_of
from tests.routes.runs import COLUMNS
from tests.routes.table import BEING_MENDED, CELLS, ROUTES

pytestmark = pytest.mark.extra

WRITE = "run `python -m tests.routes`, which writes the page, and read what changed"


@pytest.mark.parametrize(("way", "column"), CELLS, ids=[f"{way.key}-{column}" for way, column in CELLS])
def test_a_model_that_leaves_is_right_or_loud(way, column, tmp_path):
    outcome = outcome_of(way, column, tmp_path)
    if (way.key, column) in BEING_MENDED:
        assert outcome.kind == "silent", f"it is {outcome.cell} now: take it out of BEING_MENDED"
    elif way.is_not_seen_in(column):
        assert outcome.kind == "silent", f"it is {outcome.cell} now: take the column out of not_seen, and {WRITE}"
    else:
        assert outcome.kind != "silent", f"another model came out, off by {outcome.error:.2f}, and nothing was said"
    assert read(PAGE.read_text("utf8"))[0].get((way.key, column)) == shown(way, column, outcome.cell), WRITE


def test_the_page_is_the_one_that_the_routes_make():
    """The versions of the libraries may be others than those installed."""
    text = PAGE.read_text("utf8")
    cells, versions = read(text)
    assert cells.keys() == {(way.key, column) for way, column in CELLS}, WRITE
    assert rendered(cells, versions) == text, WRITE
    assert {cell for cell, said in cells.items() if said == "silent"} == BEING_MENDED


def test_the_routes_have_names_of_their_own():
    assert len({way.key for way in ROUTES}) == len({(way.library, way.name) for way in ROUTES}) == len(ROUTES)
    assert {way.key for way in ROUTES} >= {key for key, _ in BEING_MENDED}
    assert all(not way.not_seen or {*way.not_seen.columns} <= COLUMNS.keys() for way in ROUTES)


def test_a_cell_shows_the_beginning_of_what_was_said():
    said = "save_adapter | writes `it`, and\n more " + "words " * 40
    cell = Outcome("loud", 1.0, [said, "another"]).cell
    assert cell.startswith('loud: "save_adapter / writes it, and more words')
    assert cell.endswith(' ..."')
    assert Outcome("right", 0.0, ["a false alarm"]).cell == "right"
