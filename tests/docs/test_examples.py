"""The examples run as they are, each in a process of its own and without a network."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS = {
    "ema": "peft",
    "lightning_module": "lightning",
    "serve": "peft",
    "sft_then_dpo": "trl",
    "trainer": "transformers",
}
ARGUMENTS = {"sft_then_dpo": ["--steps", "3"], "trainer": ["--steps", "3"]}


@pytest.mark.extra
@pytest.mark.parametrize("name", NEEDS)
def test_an_example_ends_with_the_trained_model(name, tmp_path):
    if find_spec(NEEDS[name]) is None:
        pytest.skip(f"runs where {NEEDS[name]} is installed")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [str(ROOT / "examples" / f"{name}.py"), *ARGUMENTS.get(name, [])]
    command = [sys.executable, "-W", "error:::__main__", *script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(re.findall(r"logits within (\S+) of the trained model's", done.stdout)[-1]) < 1e-4


def test_every_example_is_run_here():
    """None is called like a library that the others import, as it would be found first."""
    scripts = {path.stem: path.read_text("utf8") for path in (ROOT / "examples").glob("*.py")}
    assert scripts.keys() == NEEDS.keys()
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", "\n".join(scripts.values()), re.MULTILINE))
    assert not imported & scripts.keys()
