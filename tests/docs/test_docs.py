"""The code of every page runs as it is printed: each block by itself, in an empty namespace, without a warning."""

import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import BLOCKS, PAGES, README, ROOT
from tests.support.nightly import later
from tests.support.scripts import run_script

SNIPPETS = [block for block in BLOCKS if block.info == "python"]
SCRIPTS = [block for block in BLOCKS if block.title]
"""Blocks that have a title are files: they run in a process of their own."""
COMMANDS = ("text", "sh", "console")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("block", SNIPPETS, ids=str)
def test_a_block_runs_by_itself(block, tmp_path, monkeypatch):
    if missing := block.missing():
        pytest.skip(f"runs where {' and '.join(missing)} is installed")
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * block.line + block.code, str(block.page), "exec")  # so that an error has the line of the page
    exec(code, {"__name__": "a_block_of_a_page"})


@pytest.mark.extra
@pytest.mark.parametrize(
    "block",
    # tests/docs/test_ddp.py runs the script of that page on two ranks.
    [
        later(block, id=str(block)) if block.title == "ddp.py" else pytest.param(block, id=str(block))
        for block in SCRIPTS
    ],
)
def test_a_script_runs_by_itself(block, tmp_path):
    """In a folder and a process of its own, without a network. Warnings that the script causes are errors."""
    if missing := block.missing():
        pytest.skip(f"runs where {' and '.join(missing)} is installed")
    (tmp_path / block.title).write_text(block.code, "utf8")
    ranks = re.match(r"# torchrun (--nproc_per_node=\d+) ", block.code)
    if ranks is None:
        done = run_script(tmp_path / block.title, tmp_path)
        assert done.code == 0, done.errors
        return
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error:::__main__", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", ranks[1], block.title]
    launched = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert launched.returncode == 0, launched.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_code_is_left_out(page):
    """Every fence is a block that is run here, or says that it is a diff, a command or text. Python has a fence."""
    text = page.read_text("utf8")
    blocks = [block for block in BLOCKS if block.page == page]
    assert len(re.findall(r"^\s*(```|~~~)", text, re.MULTILINE)) == 2 * len(blocks)
    run = [*SNIPPETS, *SCRIPTS]
    assert [str(block) for block in blocks if block not in run and block.info not in ("diff", *COMMANDS)] == []
    for block in blocks:
        if block.info in COMMANDS:
            assert not re.search(r"^\s*(import|from) \w", block.code, re.MULTILINE), f"{block} is Python"
    assert not re.search(r"^ {4,}(import \w+|from [\w.]+ import .*)$", FENCED.sub("", text), re.MULTILINE)


def test_there_are_blocks_to_run():
    """A change of the pattern of a fence must not leave these tests without cases."""
    assert len(SNIPPETS) > 15
    assert len(SCRIPTS) >= 2
    assert any(block.page == README for block in SNIPPETS)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.info == "diff"], ids=str)
def test_both_sides_of_a_diff_are_python(block):
    for side in "-+":
        lines = [line[1:] for line in block.code.splitlines() if line[:1] in (" ", side)]
        compile("\n".join(lines), str(block), "exec")


def test_the_readme_links_to_every_page():
    readme = README.read_text("utf8")
    pages = [page.relative_to(ROOT) for page in PAGES if page != README]
    assert [str(page) for page in pages if f"]({page})" not in readme and f"]({page}#" not in readme] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_place(page):
    """Every link within the project names a file that is there, and a heading that the file has."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text("utf8"))):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text("utf8"))):
            broken.append(target)
    assert broken == []


def anchors(text):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
