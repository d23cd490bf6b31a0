"""Every cell of docs/routes.md is what a model that takes the route shows; no cell is silent."""

import logging
import warnings
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")
pytest.importorskip("accelerate", reason="runs where accelerate is installed")
pytest.importorskip("lightning", reason="runs where lightning is installed")
pytest.importorskip("diffusers", reason="runs where diffusers is installed")
pytest.importorskip("loralib", reason="runs where loralib is installed")

from deltaopt.messages import warn_user
from tests.routes.page import PAGE, read, rendered, shown
from tests.routes.route import Outcome, Route, heard, outcome_of
from tests.routes.runs import COLUMNS
from tests.routes.table import CELLS, ROUTES

pytestmark = pytest.mark.extra

WRITE = "run `python -m tests.routes`, which writes the page, and read what changed"


@pytest.mark.parametrize(("way", "column"), CELLS, ids=[f"{way.key}-{column}" for way, column in CELLS])
def test_a_model_that_leaves_is_right_or_loud(way, column, tmp_path):
    outcome = outcome_of(way, column, tmp_path)
    if way.is_not_seen_in(column):
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
    assert "silent" not in cells.values()


def test_the_routes_have_names_of_their_own():
    assert len({way.key for way in ROUTES}) == len({(way.library, way.name) for way in ROUTES}) == len(ROUTES)
    assert all(not way.not_seen or {*way.not_seen.columns} <= COLUMNS.keys() for way in ROUTES)


def test_what_is_heard_is_said_by_this_package_or_of_it(tmp_path):
    with heard() as words:
        warn_user("one of ours")
        warnings.warn("Unexpected keyword arguments ['deltaopt']", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        logging.getLogger("diffusers").warning("moved by %s", "Delta-LoRA")
        logging.getLogger("diffusers").warning("something else")
    assert words == ["one of ours", "Unexpected keyword arguments ['deltaopt']", "moved by Delta-LoRA"]


def taken(route):
    return outcome_of(Route("torch", "a route of this test", route), "in place", Path())


def test_what_is_right_loud_silent_and_a_mistake():
    """The kinds differ by what comes out and by what is said; a mistake in a route is no outcome."""

    def silent(run):
        run.train()
        return run.base()

    def loud(run):
        warn_user("one of ours")
        return silent(run)

    def refused(run):
        raise RuntimeError("torch refuses it")

    def right(run):
        run.train()
        warn_user("one of ours")
        return run.model

    def mistaken(run):
        return run.modle

    def neither(run):
        run.train()
        return run.truth + 1e-3 * (run.truth - run.output(run.base()))

    assert taken(silent).kind == "silent"
    assert taken(silent).error == pytest.approx(1)
    assert (taken(loud).kind, taken(loud).words) == ("loud", ["one of ours"])
    assert (taken(refused).kind, taken(refused).cell) == ("loud", 'loud: "torch refuses it"')
    assert taken(right).kind == "right"
    with pytest.raises(AttributeError, match="modle"):
        taken(mistaken)
    with pytest.raises(AssertionError, match="neither right nor wrong"):
        taken(neither)


def test_a_cell_shows_the_beginning_of_what_was_said():
    said = "save_adapter | writes `it`, and\n more " + "words " * 40
    cell = Outcome("loud", 1.0, [said, "another"]).cell
    assert cell.startswith('loud: "save_adapter / writes it, and more words')
    assert cell.endswith(' ..."')
    assert Outcome("right", 0.0, ["a false alarm"]).cell == 'right, saying "a false alarm"'
    assert Outcome("right", 0.0).cell == "right"
