"""docs/devices.md: written from the rows."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

from tests.devices.rows import SECTIONS

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "devices.md"

TITLE = """\
# What several devices give, row by row

Every row says what becomes of A, B and W in one case, with each rule, and which tests show it. The rows are in
`tests/devices/rows.py`: `python -m tests.devices` runs all tests that are named here, and writes this page if they
pass. They run on CPUs: two processes of gloo, and meshes of 2 x 2 as threads of one process.
[several-devices.md](several-devices.md) says what to do in each case.

- **exact:** W, A and B are bit for bit the same on all ranks, and W is bit for bit what one process makes of the same
  factors.
- **to rounding:** the same but for float32 sums in another order: relative 1e-6 of the effective weight, if the note
  says nothing else.
- **refused:** an error that names the wrapper, the layers or the rank, and says what to do. Every rank gets one, and no
  W is changed.
- **differs:** by as much as the note says.
- **upstream:** a fault or a limit of the other library, with any optimizer.
- **not measured:** with the reason.
- **-:** nothing that this rule does, or no test of its own.
"""


def rendered() -> str:
    """Return the page."""
    parts = [TITLE]
    for number, section in enumerate(SECTIONS, 1):
        lines = [f"## {section.heading}", ""]
        if section.text:
            lines += [_wrapped(section.text), ""]
        lines += ["| | case | in place | folded |", "|---|---|---|---|"]
        proofs = []
        for i, row in enumerate(section.rows, 1):
            label = f"{number}.{i}"
            lines.append(f"| {label} | {row.case} | {row.in_place} | {row.folded} |")
            said = [row.note] if row.note else []
            by_file: dict[str, list[str]] = {}
            for test in row.tests:
                file, name = test.split("::")
                by_file.setdefault(file, []).append(f"`{name}`")
            for file, names in by_file.items():
                said.append(f"[{Path(file).name}](../tests/{file}): {', '.join(names)}.")
            proofs.append(_wrapped(f"- **{label}** {' '.join(said)}", "  "))
        parts.append("\n".join([*lines, "", *proofs, ""]))
    return "\n".join(parts)


def named_tests() -> list[str]:
    """Return the tests of all rows, in order, each once."""
    return list(dict.fromkeys(test for section in SECTIONS for row in section.rows for test in row.tests))


def functions_of(file: str) -> set[str]:
    """Return the names of the tests of a file, without running it."""
    path = TESTS / file
    if not path.is_file():
        return set()
    tree = ast.parse(path.read_text("utf8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
