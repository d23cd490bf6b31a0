"""A run that is killed many times, often in the middle of a save, ends where an uninterrupted one does."""

import subprocess
import sys
from pathlib import Path

import pytest

import deltaopt
from tests.support import crash_loop
from tests.support.compare import bits, relative, same
from tests.support.nightly import later


@pytest.mark.parametrize("saves", ["whole", later("adapter")])
def test_a_run_that_is_killed_again_and_again_ends_where_it_would_have(saves, tmp_path):
    """25 times, at any moment, many of them in the middle of a save: the file is an old one or a new one, always."""
    steps, kills, killed = 200, 25, tmp_path / "killed.pt"
    command = [sys.executable, "-m", "tests.support.crash_loop", killed, saves, *map(str, (steps, kills, 0))]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 0, "no kill fell into a save"

    crash_loop.train(tmp_path / "whole.pt", saves, steps)
    ends = [deltaopt.load(path) for path in (tmp_path / "whole.pt", killed)]
    assert ends[0]["step"] == ends[1]["step"] == steps
    if saves == "whole":
        assert same(*ends)
    else:
        assert same(*(end["scheduler"] for end in ends))
    # With the adapter alone, this rebuilds W.
    uninterrupted, resumed = (crash_loop.train(path, saves, steps) for path in (tmp_path / "whole.pt", killed))
    expected, tolerance = bits(uninterrupted), 0.0 if saves == "whole" else 1e-6
    for name, parameter in resumed.named_parameters():
        assert relative(parameter, expected[name]) <= tolerance, name
