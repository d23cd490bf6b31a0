"""docs/inner-optimizers.md: written from what the checks found, and read again."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path

from tests.inner_optimizers.row import COLUMNS, RULES, Row
from tests.inner_optimizers.table import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "inner-optimizers.md"

NARROW = ", float32"
HEADS = ("follows", "resumes", "state format")

Found = Mapping[tuple[str, str], Mapping[str, str]]
"""What the checks found, by row and rule, and then by column."""

TITLE = """\
# Inner optimizers

`DeltaLoRAOptimizer` takes any `torch.optim.Optimizer` over A and B. This table says what was found with each, for both
rules. The tests in `tests/inner_optimizers` run every row and write this page (`python -m tests.inner_optimizers`).

- **follows:** A, B, W and the effective weight are in every step those of the paper's loop with the bare optimizer and
  dense products, to 1e-12 relative. A and B are in float64, or in float32 in both where the row says so, as the
  optimizer takes or computes in no more than that.
- **resumes:** the model and the state go through `torch.save` and `torch.load(weights_only=True)` into a new model and
  a new optimizer, and all that follows is bit for bit what it is without the interruption.
- **state format:** the saved state, without the keys that begin with `deltaopt`, is what the bare optimizer saves, and
  the bare optimizer loads it.

A rule that looks at the size of a parameter (Adafactor's `scale_parameter`, LAMB, LARS, weight decay) sees the same A
and B in both rules, and gradients of the same size, so the rules agree there as well. Schedule-free is compared where
gradients are taken, and after `eval()`. SAM's W moves by the net step, and rests where the second gradient is taken.
"""

IN_BACKWARD = """
## Optimizers that step within the backward pass

A and B then change where no `step()` sees it, so that W could not follow. All of these are refused, by name as far as
they have one (`tests/unit/test_in_backward.py`):

- LOMO and AdaLOMO, the layerwise optimizers of transformers (`optim="galore_adamw_layerwise"`) and torchtune's
  `OptimizerInBackwardWrapper`, when the optimizer is built.
- Factors with `torch.distributed.optim._apply_optimizer_in_backward`, then or in the first step, and a
  `DeltaLoRAOptimizer` that it makes.
- Optimizers in hooks (`register_post_accumulate_grad_hook`), in the second step: no factor has a gradient, and some
  have changed.
- A `DeltaLoRAOptimizer` in such a hook: `step()` raises within a backward pass.
"""


def rendered(found: Found, versions: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        found: for every row and rule.
        versions: of the libraries, by name.
    """
    notes: dict[str, int] = {}
    lines = [TITLE, _line("library", "optimizer", "rule", *HEADS), _line(*["---"] * (3 + len(COLUMNS)))]
    for row in ROWS:
        by_rule = {rule: _cells(row, rule, found[row.key, rule], notes) for rule in RULES}
        name = row.name + (NARROW if row.is_narrow else "")
        same = by_rule["in_place"] == by_rule["folded"]
        for rule in RULES[:1] if same else RULES:
            said = "both" if same else rule.replace("_", " ")
            lines.append(_line(f"{row.library} {versions[row.library]}", name, said, *by_rule[rule]))
    return "\n".join(
        [*lines, IN_BACKWARD, "## Notes", "", *(f"{number}. {note}" for note, number in notes.items()), ""]
    )


def read(text: str) -> tuple[dict[tuple[str, str], dict[str, str]], dict[str, str]]:
    """Return what a page says was found, and the versions of the libraries that it names."""
    by_name = {(row.library, row.name): row for row in ROWS}
    found: dict[tuple[str, str], dict[str, str]] = {}
    versions: dict[str, str] = {}
    for line in text.splitlines():
        if re.match(r"\| [\w-]+ \d", line):
            library_and_version, name, said, *cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
            library, versions[library] = library_and_version.split(" ")[0], library_and_version.split(" ")[1]
            row = by_name.get((library, name.removesuffix(NARROW)))
            for rule in RULES if said == "both" else [said.replace(" ", "_")]:
                if row is not None:
                    cells = [re.sub(r" \(note \d+\)$", "", cell) for cell in cells]
                    found[row.key, rule] = dict(zip(COLUMNS, cells, strict=True))
    return found, versions


def installed() -> dict[str, str]:
    """Return the versions of the libraries, without what says how they were built."""
    return {row.library: importlib.metadata.version(row.library).partition("+")[0] for row in ROWS}


def _cells(row: Row, rule: str, found: Mapping[str, str], notes: dict[str, int]) -> list[str]:
    """Return the cells of a row, with the numbers of their notes; `notes` gets those that are new."""
    cells = []
    for column in COLUMNS:
        note = row.note(rule, column) if found[column] != "yes" else None
        number = "" if note is None else f" (note {notes.setdefault(note, len(notes) + 1)})"
        cells.append(found[column] + number)
    return cells


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
