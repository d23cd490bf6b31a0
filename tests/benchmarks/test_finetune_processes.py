"""The fine-tuning demonstration on two processes, and its checkpoints: killed, continued, and exported."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import finetune
from tests.benchmarks.test_finetune import Interruption, model_folder, pairs, write_jsonl  # noqa: F401, a fixture
from tests.support.compare import relative
from tests.support.distributed import on_all_ranks

pytestmark = pytest.mark.extra

ROUNDED = 2e-5
"""Relative: float32 sums in another order, or a W rebuilt from its ledger, and what was trained since."""

SMALL = "--epochs 9 --batch-size 6 --rank 3 --lr 0.01 --start-step 2 --device cpu"
"""The last batch of an epoch of 37 rows has one row, which cannot be divided."""


LONG, SHORT = ["--max-steps", "40"], ["--max-steps", "9", "--folded"]


class Program:
    """The program with a small model and data; calls that write to folders of different names do not meet."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.data = write_jsonl(folder / "train.jsonl", pairs(37))
        self.test = write_jsonl(folder / "test.jsonl", pairs(13, offset=10))
        self.model = model

    def options(self, name: str, *more: str) -> list[str]:
        out = self.folder / name
        paths = f"--model {self.model} --data {self.data} --test-data {self.test} --out {out} --export {out}/adapter"
        return [*paths.split(), *SMALL.split(), *more]

    def results(self, name: str) -> list[dict]:
        return json.loads((self.folder / name / "results.json").read_text())["runs"]


@pytest.fixture(scope="module")
def still(model_folder, tmp_path_factory) -> Program:  # noqa: F811
    """Of a model without dropout, which every process would draw by itself; "whole" is the run of one process."""
    program = Program(tmp_path_factory.mktemp("still"), Path(model_folder))
    program.model = shutil.copytree(model_folder, program.folder / "model")
    config = json.loads((program.model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (program.model / "config.json").write_text(json.dumps(config))
    finetune.main(program.options("whole", *LONG))
    return program


@pytest.fixture(scope="module")
def program(model_folder, tmp_path_factory) -> Program:  # noqa: F811
    """Of a model with dropout; "whole" is a run that was not cut short."""
    program = Program(tmp_path_factory.mktemp("program"), Path(model_folder))
    finetune.main(program.options("whole", *SHORT))
    return program


def changes(folder: Path) -> dict[str, Tensor]:
    """What the adapter of a folder adds to each weight, and the head."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            found[name] = config["lora_alpha"] / config["r"] * tensors[name.replace("lora_A", "lora_B")] @ tensor
        elif "lora_" not in name:
            found[name] = tensor
    return found


def assert_same_adapter(folder: Path, expected: Path) -> None:
    changed, wanted = changes(folder), changes(expected)
    assert changed.keys() == wanted.keys()
    assert len(wanted) > 10
    for name, tensor in wanted.items():
        assert relative(changed[name], tensor) <= ROUNDED, name


def finetune_on_rank(rank: int, options: list[str]) -> None:
    finetune.main(options)


def test_two_processes_train_as_one_does(still):
    """The loss, the accuracy and the adapter are those of the whole batch."""
    on_all_ranks(finetune_on_rank, still.options("two", *LONG))
    assert {path.name for path in (still.folder / "two").iterdir()} == {
        "adapter",
        "curves.png",
        "results.json",
        "table.txt",
    }
    for run, expected in zip(still.results("two"), still.results("whole"), strict=True):
        assert len(run["losses"]) == 40
        assert run["losses"] == pytest.approx(expected["losses"], rel=ROUNDED)
        assert run["accuracies"] == expected["accuracies"]
        effective = [[layer["effective"] for layer in r["layers"]] for r in (run, expected)]
        assert effective[0] == pytest.approx(effective[1], rel=1e-4)
    assert_same_adapter(still.folder / "two" / "adapter", still.folder / "whole" / "adapter")


def test_two_processes_that_were_killed_are_continued_by_one(still, capsys):
    """As the command line has it."""
    options = still.options("killed", *LONG, "--save-every", "2")
    kill_in_delta_lora(options, still.folder / "killed")
    finetune.main(options)
    assert "Delta-LoRA: continued after step" in capsys.readouterr().out
    assert_same_adapter(still.folder / "killed" / "adapter", still.folder / "whole" / "adapter")


def cut_short(options: list[str], method: str, step: int) -> None:
    """Interrupt a call before this step of this method."""
    take, taken = finetune.training_step, []

    def training_step(model, optimizer, batch, run, group):
        taken.append(run.method.name)
        if taken.count(method) == step:
            raise Interruption
        return take(model, optimizer, batch, run, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "training_step", training_step)
        with pytest.raises(Interruption):
            finetune.main(options)


@pytest.mark.parametrize(
    ("method", "step"),
    [
        pytest.param("LoRA", 4, marks=pytest.mark.nightly),
        ("Delta-LoRA", 2),
        pytest.param("folded", 8, marks=pytest.mark.nightly),
    ],
)
def test_a_run_is_continued_after_its_last_checkpoint(method, step, program, capsys):
    """Before W has begun to move and after that. Dropout draws the numbers that it would have drawn."""
    name, method = f"{method}{step}", "Delta-LoRA, folded" if method == "folded" else method
    cut_short(program.options(name, *SHORT, "--save-every", "1"), method, step)
    finetune.main(program.options(name, *SHORT, "--save-every", "3"))
    printed = capsys.readouterr().out
    assert f"{method}: continued after step {step - 1}, where an earlier call was interrupted" in printed
    for run, expected in zip(program.results(name), program.results("whole"), strict=True):
        assert run["losses"] == pytest.approx(expected["losses"], rel=ROUNDED)
        assert run["accuracies"] == expected["accuracies"]
        assert len(run["step_seconds"]) == 9
        assert (run["delta_error"] is None) == (expected["delta_error"] is None)
        assert (run["delta_error"] or 0) < 1e-4
    assert_same_adapter(program.folder / name / "adapter", program.folder / "whole" / "adapter")


def test_a_checkpoint_of_other_settings_is_not_taken(program, capsys):
    cut_short(program.options("other", *SHORT, "--save-every", "1"), "LoRA", 5)
    finetune.main(program.options("other", "--max-steps", "4"))
    assert "continued after" not in capsys.readouterr().out


def kill_in_delta_lora(options: list[str], out: Path) -> None:
    """Start two processes, and kill them when they have saved the second method's run."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "-m", "benchmarks.finetune", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    family = psutil.Process(process.pid)
    try:
        deadline = time.monotonic() + 100
        while not (out / "unfinished-delta-lora.pt").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        for each in [*family.children(recursive=True), family] if process.poll() is None else []:
            each.kill()
        process.communicate()
    assert not (out / "results.json").exists()


def test_a_share_of_a_batch_counts_as_many_rows_as_it_has():
    losses = on_all_ranks(share_on_rank)
    assert losses[0] == losses[1] == pytest.approx([3.0, 5.0, 1.0])


def share_on_rank(rank: int) -> list[float]:
    """The mean of the rows, divided equally, unequally, and where one process has none."""
    from benchmarks.processes import Processes

    group = Processes()
    found = []
    for rows in ([1.0, 2.0, 4.0, 5.0], [3.0, 4.0, 8.0], [1.0]):
        share, weight = group.share({"labels": torch.tensor(rows)})
        found.append(group.mean(share["labels"].mean() * weight))
    return found
