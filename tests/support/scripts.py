"""Scripts that run in a process of their own, forked from one that has imported torch, transformers and peft."""

import multiprocessing
import os
import runpy
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tests.support.kept_pair import PRELOADED

LIMIT = 300.0
"""Seconds for one script."""


class Done(NamedTuple):
    """The exit code of a script, and what it printed."""

    code: int
    output: str
    errors: str


def run_script(script: Path, folder: Path, arguments: Sequence[str] = ()) -> Done:
    """Run a file as ``python FILE ARGUMENTS`` does in a folder. Warnings that the script itself causes are errors.

    Raises:
        AssertionError: if it takes too long, with what it printed until then.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as said:
        process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(script, folder, list(arguments), Path(said))
        )
        process.start()
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f"{script.name} took longer than {LIMIT:g} s. It printed\n{_text(said, 'stderr')}")
        done = Done(process.exitcode, _text(said, "stdout"), _text(said, "stderr"))
        process.close()
        return done


def _text(folder: str, name: str) -> str:
    return Path(folder, name).read_text("utf8", errors="replace")


def _run(script: Path, folder: Path, arguments: list[str], said: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        with (said / name).open("wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    warnings.filterwarnings("error", module=r"__main__\Z")
    torch.set_num_threads(1)
    runpy.run_path(str(script), run_name="__main__")
