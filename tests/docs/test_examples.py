"""Every script in examples/ runs by itself, as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.extra

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NEEDS = {"lightning_module.py": "lightning"}
"""What a script needs besides PEFT and transformers."""


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_an_example_runs_by_itself(script, tmp_path):
    """In a folder and a process of its own, without a network. Warnings that the script causes are errors."""
    for library in ("peft", "transformers", NEEDS.get(script.name, "torch")):
        pytest.importorskip(library, reason="runs where the libraries of the script are installed")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, "-W", "error:::__main__", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_examples_are_named_in_the_readme_and_shadow_no_library():
    """A script stands first in the search path of its own process: `import lightning` must not find it."""
    readme = (EXAMPLES.parent / "README.md").read_text("utf8")
    assert [script.name for script in SCRIPTS if f"examples/{script.name}" not in readme] == []
    for script in SCRIPTS:
        assert f"import {script.stem}\n" not in "".join(other.read_text("utf8") for other in SCRIPTS)
    assert {script.name for script in SCRIPTS} >= {"lightning_module.py", "serve.py"}
