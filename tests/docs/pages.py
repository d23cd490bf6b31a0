"""The pages of the project, and the blocks of code in them."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
"""Found and not listed: a new page is tested without a change here."""

FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
TITLED = re.compile(r'python title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """One fenced block: its page, what stands behind the fence, its code, and the line before the code."""

    page: Path
    info: str
    code: str
    line: int

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def title(self) -> str | None:
        """Return the name of the file that the block is, or None."""
        found = TITLED.fullmatch(self.info)
        return found[1] if found else None

    def missing(self) -> list[str]:
        """Return the libraries that it imports and that are not installed."""
        names = set()
        for node in ast.walk(ast.parse(self.code)):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
        return sorted(name for name in names if find_spec(name) is None)


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = page.read_text("utf8")
    return [
        Block(page, found["info"], found["code"], text.count("\n", 0, found.start("code")))
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
