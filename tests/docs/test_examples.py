"""The examples run as they are, each in a process of its own and without a network."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS = {"trainer": "transformers", "sft_then_dpo": "trl"}


@pytest.mark.extra
@pytest.mark.parametrize("name", NEEDS)
def test_an_example_ends_with_the_trained_model(name, tmp_path):
    if find_spec(NEEDS[name]) is None:
        pytest.skip(f"runs where {NEEDS[name]} is installed")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error:::__main__", str(ROOT / "examples" / f"{name}.py"), "--steps", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(re.findall(r"logits within (\S+) of the trained model's", done.stdout)[-1]) < 1e-4


def test_every_example_is_run_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(NEEDS)
