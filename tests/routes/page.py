"""docs/routes.md: written from the outcomes, and read again."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path

from tests.routes.route import Route
from tests.routes.runs import COLUMNS
from tests.routes.table import ROUTES

PAGE = Path(__file__).parents[2] / "docs" / "routes.md"

Cells = Mapping[tuple[str, str], str]
"""What the table says, by route and column."""

TITLE = """\
# How a model leaves, and what comes out

Each row trains a small model, lets it leave by the calls that are named, and compares what comes out at the other end
with the trained model: it is *right* (equal up to rounding), another model and *loud* (with the beginning of what is
said), or another model and *not seen*, and then the [way out](#not-seen) is below. The tests in `tests/routes` run
every cell and write this page (`python -m tests.routes`).

- **in place:** `weight_update="in_place"`, the default. W has moved.
- **folded, zero product:** `weight_update="folded"` with LoRA's usual start and `start_step=0`. W is never written, and
  the branch has a larger scaling.
- **folded, product not zero:** the same with `start_step=2`. W was written once, and the branch has a larger scaling.

The other end begins with the pretrained model, built again. Where a route averages, the average of the models from step
K on is right.
"""

NOT_SEEN = """
## Not seen

These calls reach neither code of this library nor a hook of torch's or PEFT's, or do not show what the values are for.
"""


def rendered(cells: Cells, versions: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        cells: of every route and column.
        versions: of the libraries, by name.
    """
    lines = [TITLE, _row("library", "route", *COLUMNS), _row(*["---"] * (2 + len(COLUMNS)))]
    for way in ROUTES:
        found = [cells[way.key, column] for column in COLUMNS]
        lines.append(_row(f"{way.library} {versions[way.library]}", way.name, *found))
    return "\n".join([*lines, NOT_SEEN, *(_way_out(way) for way in ROUTES if way.not_seen), ""])


def read(text: str) -> tuple[dict[tuple[str, str], str], dict[str, str]]:
    """Return the cells of a page, and the versions of the libraries that it names."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \w+ \d", line)]
    by_name = {(way.library, way.name): way for way in ROUTES}
    cells: dict[tuple[str, str], str] = {}
    versions: dict[str, str] = {}
    for library_and_version, name, *found in rows:
        library, versions[library] = library_and_version.split(" ")[0], library_and_version.split(" ")[1]
        way = by_name.get((library, name))
        if way is not None:
            cells |= {(way.key, column): cell for column, cell in zip(COLUMNS, found, strict=True)}
    return cells, versions


def installed() -> dict[str, str]:
    """Return the versions of the libraries, without what says how they were built."""
    return {way.library: importlib.metadata.version(way.library).partition("+")[0] for way in ROUTES}


def shown(way: Route, column: str, outcome_cell: str) -> str:
    """Return a cell as the page has it: what is silent is not seen where the route says so."""
    return "[not seen](#not-seen)" if outcome_cell == "silent" and way.is_not_seen_in(column) else outcome_cell


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _way_out(way: Route) -> str:
    assert way.not_seen is not None
    return f"- **{way.name}** (*{'*; *'.join(way.not_seen.columns)}*): {way.not_seen.reason} {way.not_seen.way_out}"
