"""The page docs/command-line.md: its commands print what it shows, except for numbers with a point."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from deltaopt.__main__ import COMMANDS, main
from tests.support.peft_runs import peft_asks_by_an_old_name

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text("utf8")
SHOWN = re.findall(r"```console\n\$ deltaopt ([^\n]*)\n(.*?)```", PAGE, re.DOTALL)
"""The arguments and the output of each command on the page."""


def without_numbers(text: str) -> str:
    """Leave out numbers with a point, and what they do to the width of a column."""
    return re.sub(r"  +", "  ", re.sub(r"\d+\.\d+(e-\d+)?", "#", text))


@pytest.fixture
def place(runs, base, tmp_path, monkeypatch):
    shutil.copytree(runs["in place from step 1"].checkpoint.parent, tmp_path / "run")
    shutil.copytree(base, tmp_path / "base")
    monkeypatch.chdir(tmp_path)


def test_the_commands_print_what_is_shown(place, capsys):
    assert len(SHOWN) == 4
    for arguments, expected in SHOWN:
        capsys.readouterr()
        code = main(shlex.split(arguments))
        out, err = capsys.readouterr()
        assert without_numbers(out + err) == without_numbers(expected)
        assert code == ("error:" in expected)


def test_the_keys_of_the_data(place, capsys):
    for command, more in (("inspect", []), ("export", ["--base", "base", "--out", "served"])):
        capsys.readouterr()
        assert main([command, "run/checkpoint-4", *more, "--json"]) == 0
        (row,) = re.findall(rf"^\| `{command}` \| (.*) \|$", PAGE, re.MULTILINE)
        assert [*json.loads(capsys.readouterr().out)] == re.findall(r"`(\w+)`", row)


def test_the_page_has_every_command():
    assert set(re.findall(r"^\| `(\w+) [A-Z]", PAGE, re.MULTILINE)) == {*COMMANDS}
