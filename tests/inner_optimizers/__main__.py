"""Run every row and write docs/inner-optimizers.md: `python -m tests.inner_optimizers`, one minute."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from tests.inner_optimizers.checks import cells_of
from tests.inner_optimizers.page import PAGE, installed, rendered
from tests.inner_optimizers.table import CELLS


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for row, rule in CELLS:
        found[row.key, rule] = cells_of(row, rule)
        print(f"{row.key}, {rule}: {found[row.key, rule]}", file=sys.stderr)
    PAGE.write_text(rendered(found, installed()), "utf8")
    print(f"{PAGE} written", file=sys.stderr)


main()
