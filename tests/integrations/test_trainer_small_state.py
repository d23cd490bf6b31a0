"""Trainer's save_only_model=True with DeltaLoRACallback: W is restored from a small file, or the resume is refused."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

import deltaopt
from deltaopt import DeltaLoRAOptimizer, WeightMismatchError
from deltaopt.integrations.trainer import DeltaLoRACallback
from tests.support.compare import same
from tests.support.models import Rows, causal_lm, transformers, weights
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.trainer_runs import Run, arguments, distance, logits_of, trainer_of

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]

STATE = "deltaopt_state.pt"
SMALL = {"save_only_model": True, "max_steps": 4}


@pytest.mark.parametrize(("rule", "start"), [("in_place", "zero"), ("folded", "zero"), ("folded", "later")])
def test_a_resumed_run_begins_with_the_w_of_the_checkpoint(rule, start, accelerator_of, tmp_path, caplog):
    """And with its settings; the moments begin afresh, which is said once."""
    options = {"start_step": 1} if start == "later" else {}
    run = Run(tmp_path / "run", rule, start, options=options, **SMALL).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not (checkpoint / "optimizer.pt").exists()
    saved = deltaopt.load(checkpoint / STATE)
    assert not any("exp_avg" in entries for entries in saved["optimizer"]["state"].values())

    resumed = Run(tmp_path / "resumed", rule, start, options={"start_step": 7}, **SMALL)
    with caplog.at_level(logging.WARNING):
        resumed.train(checkpoint)
    assert distance(resumed.record.begin, run.record.logits[2]) < 2e-5
    assert distance(resumed.record.logits[3], run.record.logits[2]) > 1e-2
    assert resumed.optimizer.step_count == 4
    assert resumed.optimizer.groups[0].start_step == options.get("start_step", 0)
    assert caplog.text.count("the inner optimizer starts without moments") == 1
    again = Run(tmp_path / "again", rule, start, **SMALL).train(tmp_path / "resumed" / "checkpoint-4")
    assert distance(again.record.begin, resumed.record.logits[4]) < 2e-5


def test_a_checkpoint_that_was_moved_is_found_where_it_is_named(accelerator_of, tmp_path):
    run = Run(tmp_path / "run", **SMALL).train()
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "run")
    resumed = Run(tmp_path / "resumed", resume_from=tmp_path / "elsewhere", **SMALL).train(tmp_path / "elsewhere")
    assert distance(resumed.record.begin, run.record.logits[2]) < 2e-5


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """checkpoint-2 of two runs, with `save_only_model` and without this callback."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, start in (("one", "zero"), ("two", "later")):
        Run(folder / name, start=start, options={"start_step": 0}, save_only_model=True, max_steps=2).train()
    settings = {"save_strategy": "steps", "save_only_model": True, "max_steps": 2}
    plain = (torch.optim.AdamW, {"lr": 1e-2})
    trainer_of(arguments(folder / "plain", **settings), plain, causal_lm(torch.float32)).train()
    return {name: folder / name / "checkpoint-2" for name in ("one", "two", "plain")}


def assert_refused(folder: Path, checkpoint: Path, error: type[Exception], match: str) -> str:
    """Nothing of W is changed, and nothing is trained."""
    run = Run(folder, **SMALL)
    before = weights(run.model)
    with pytest.raises(error, match=match) as caught:
        run.train(checkpoint)
    assert same(weights(run.model), before)
    assert run.optimizer.step_count == 0
    return str(caught.value)


def test_without_the_file_the_resume_is_refused(checkpoints, accelerator_of, tmp_path):
    copy = shutil.copytree(checkpoints["one"], tmp_path / "checkpoint-2")
    moved = checkpoints["one"].rename(checkpoints["one"].with_name("away"))
    try:
        (copy / STATE).unlink()
        match = (
            rf"resumed at step 2 from a checkpoint without optimizer.pt .* its {STATE} is not in .*resume_from=folder"
        )
        message = assert_refused(tmp_path / "run", copy, ValueError, match)
        assert str(checkpoints["one"]) in message
    finally:
        moved.rename(checkpoints["one"])


def test_the_file_of_another_run_is_refused(checkpoints, accelerator_of, tmp_path):
    copy = shutil.copytree(checkpoints["one"], tmp_path / "run" / "checkpoint-2")
    shutil.copy(checkpoints["two"] / STATE, copy / STATE)
    state = json.loads((copy / "trainer_state.json").read_text())
    state["stateful_callbacks"]["deltaopt"]["folder"] = str(tmp_path / "run")
    (copy / "trainer_state.json").write_text(json.dumps(state))
    assert_refused(tmp_path / "run", copy, ValueError, rf"checkpoint-2/{STATE} is of another run or step")


def test_an_adapter_that_was_replaced_is_refused(checkpoints, accelerator_of, tmp_path):
    copy = shutil.copytree(checkpoints["one"], tmp_path / "checkpoint-2")
    shutil.copy(checkpoints["two"] / "adapter_model.safetensors", copy)
    assert_refused(tmp_path / "run", copy, WeightMismatchError, r"A has other contents than when the state was saved")


def test_a_plain_lora_checkpoint_is_refused(checkpoints, accelerator_of, tmp_path):
    match = r"resumed at step 2 without the optimizer's state: .*for a plain LoRA checkpoint, load its adapter"
    assert_refused(tmp_path / "run", checkpoints["plain"], ValueError, match)


def test_a_plain_lora_checkpoint_with_its_optimizer_is_refused(accelerator_of, tmp_path):
    settings = {"save_strategy": "steps", "max_steps": 2}
    trainer_of(
        arguments(tmp_path / "plain", **settings), (torch.optim.AdamW, {"lr": 1e-2}), causal_lm(torch.float32)
    ).train()
    match = "this state was not saved by a DeltaLoRAOptimizer"
    assert_refused(tmp_path / "run", tmp_path / "plain" / "checkpoint-2", ValueError, match)


def test_ours_is_refused_by_a_plain_trainer(accelerator_of, tmp_path):
    """By torch: Trainer's AdamW has two groups of parameters, ours one."""
    Run(tmp_path / "ours", max_steps=2).train()
    trainer = trainer_of(arguments(tmp_path), (torch.optim.AdamW, {"lr": 1e-2}), causal_lm(torch.float32))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))


def test_an_optimizer_of_other_groups_is_refused(checkpoints, accelerator_of, tmp_path):
    model = causal_lm(torch.float32)
    model.base_model.model.model.norm.weight.requires_grad_()
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2)
    trainer = transformers.Trainer(
        model, arguments(tmp_path, **SMALL), train_dataset=Rows(9), optimizers=(optimizer, None)
    )
    trainer.add_callback(DeltaLoRACallback(trainer))
    with pytest.raises(
        ValueError, match=r"the saved state has param groups of \[20\] parameters, this optimizer of \[21\]"
    ):
        trainer.train(resume_from_checkpoint=str(checkpoints["one"]))
    assert logits_of(model).isfinite().all()
