"""Trainer with AdaLoRA's budget: checkpoints with their adapters, resuming, and ``deltaopt export`` of them."""

from pathlib import Path

import pytest
import torch

from deltaopt.__main__ import main
from deltaopt.integrations.trainer import DeltaLoRACallback, DeltaLoRAFactory
from tests.support.models import causal_lm, peft, transformers
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.strategies import each_rule
from tests.support.trainer_runs import OPTIONS, Record, arguments, distance, logits_from, trainer_of

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]

STEPS = 8
CLOSE = 2e-5
"""Of logits, in float32."""


class Budget(transformers.TrainerCallback):
    """PEFT's own advice, at the one moment at which Trainer has the gradients still."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step + 1)


def adalora_trainer(folder: Path, rule: str):
    """A budget that is cut in steps 4 and 5, down to nothing in some layers."""
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        target_modules=["q_proj", "v_proj", "up_proj"],
        orth_reg_weight=0.0 if rule == "folded" else 0.5,
        task_type="CAUSAL_LM",
        init_r=4,
        target_r=1,
        tinit=3,
        tfinal=3,
        total_step=STEPS,
        lora_alpha=8,
    )
    model, record = peft.get_peft_model(causal_lm(torch.float32, B_zero=True).unload(), config), Record()
    options = {**OPTIONS, "weight_update": rule, "start_step": 1}
    args = arguments(folder, max_steps=STEPS, save_strategy="steps", save_steps=2, learning_rate=5e-2)
    callbacks = [Budget(), record, DeltaLoRACallback()]
    return trainer_of(args, (DeltaLoRAFactory, options), model, callbacks=callbacks), record


@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape")  # PEFT, of layers without a budget
@each_rule
def test_checkpoints_hold_a_plain_adapter_and_can_be_resumed(rule, accelerator_of, tmp_path, capsys):
    trainer, record = adalora_trainer(tmp_path / "run", rule)
    trainer.train()
    budget = trainer.model.peft_config["default"].rank_pattern
    assert 0 in {sum(row) for row in budget.values()}
    for step in (2, 4, 6, 8):
        served = tmp_path / "run" / f"checkpoint-{step}" / "export" / "lora"
        assert distance(logits_from(served), record.logits[step]) < CLOSE, step
    resumed, its = adalora_trainer(tmp_path / "resumed", rule)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert list(its.logits) == list(range(3, STEPS + 1))
    assert distance(its.logits[3], record.logits[3]) < CLOSE
    assert sorted(resumed.model.peft_config) == ["default"]

    base, out = tmp_path / "base", tmp_path / "out"
    causal_lm(torch.float32, B_zero=True).unload().save_pretrained(base)
    capsys.readouterr()

    def export(step: int) -> int:
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        return main(["export", str(checkpoint), "--base", str(base), "--out", str(out / str(step))])

    assert export(2) == 0
    assert distance(logits_from(out / "2"), record.logits[2]) < CLOSE
    capsys.readouterr()
    assert export(8) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "AdaLoRA's budget has cut" in printed.err
    assert "checkpoint-8/export/lora" in printed.err
    assert not (out / "8").exists()
