"""What the tests of the command line share: a call of it in this process, and checkpoints of real runs."""

import json
from pathlib import Path

import pytest

from deltaopt.__main__ import main


@pytest.fixture
def call(capsys):
    """Call the command line; return what it printed, after a look at the exit code."""

    def called(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()  # of what a test has done before
        assert main([str(argument) for argument in arguments]) == code
        out, err = capsys.readouterr()
        if code == 0:
            assert err == ""
            return out
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith(f"deltaopt {arguments[0]}: error: ")
        return err.removeprefix(f"deltaopt {arguments[0]}: error: ").rstrip()

    return called


@pytest.fixture
def data_of(call):
    """Call the command line with ``--json``; return the data."""
    return lambda *arguments: json.loads(call(*arguments, "--json"))


@pytest.fixture(scope="package")
def base(tmp_path_factory) -> Path:
    """The folder of the pretrained model of `tests.support.models`, in float32."""
    from tests.support.models import causal_lm, torch  # after register_assert_rewrite

    folder = tmp_path_factory.mktemp("base")
    causal_lm(torch.float32, B_zero=True).unload().save_pretrained(folder)
    return folder


RUNS = {
    "in place": ("in_place", "zero", {}),
    "in place from step 1": ("in_place", "later", {}),
    "folded": ("folded", "zero", {}),
    "folded from step 1": ("folded", "later", {}),
    "small": ("in_place", "later", {"save_only_model": True}),
}


class Runs(dict):
    """Runs of Trainer with checkpoints at steps 2 and 4, by name; each is made when a test asks for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str):
        from tests.support.accelerate_state import forgotten
        from tests.support.trainer_runs import Run

        rule, start, settings = RUNS[name]
        options = {"start_step": 1} if start == "later" else {}
        with forgotten():
            run = Run(self.folder / name, rule, start, options=options, **{"max_steps": 4, **settings}).train()
        run.checkpoint = self.folder / name / "checkpoint-4"
        self[name] = run
        return run


@pytest.fixture(scope="package")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))
