"""Run every route and write docs/routes.md: `python -m tests.routes`, one minute."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from tests.routes.page import PAGE, installed, rendered, shown
from tests.routes.route import outcome_of
from tests.routes.table import CELLS


def main() -> None:
    torch.set_num_threads(1)
    cells = {}
    for way, column in CELLS:
        with tempfile.TemporaryDirectory() as folder:
            outcome = outcome_of(way, column, Path(folder))
        cells[way.key, column] = shown(way, column, outcome.cell)
        print(f"{way.key}, {column}: {cells[way.key, column]}", file=sys.stderr)
    PAGE.write_text(rendered(cells, installed()), "utf8")
    print(f"{PAGE} written; {sum(cell == 'silent' for cell in cells.values())} cells are silent", file=sys.stderr)


main()
