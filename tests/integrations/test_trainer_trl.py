"""DeltaLoRAFactory and DeltaLoRACallback in TRL's trainers, which add the adapter themselves."""

from typing import Any

import pytest
import torch

from deltaopt.integrations.trainer import DeltaLoRACallback, DeltaLoRAFactory
from tests.support.models import peft
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.trainer_runs import distance, ours
from tests.support.trl_runs import PAIRS, datasets, language_model, lora_config, tokenizer, trl

pytestmark = [
    pytest.mark.extra,
    peft_asks_by_an_old_name,
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning"),
]

OPTIMIZER = (DeltaLoRAFactory, {"inner": torch.optim.AdamW, "lr": 1e-2, "update_ratio": 2.0})
TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, [{"text": row["prompt"] + row["chosen"]} for row in PAIRS]),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, PAIRS),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_adapter_of_peft_config_is_trained_and_exported(kind, accelerator_of, tmp_path):
    trainer_type, config, rows = TRAINERS[kind]
    args = config(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        max_length=32,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        report_to="none",
        logging_steps=1,
        save_steps=2,
        disable_tqdm=True,
    )
    own: dict[str, Any] = {"optimizer_cls_and_kwargs": OPTIMIZER} if kind == "sft" else {}
    trainer = trainer_type(
        language_model(),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=lora_config(),
        **own,
    )
    if kind == "dpo":
        trainer.optimizer_cls_and_kwargs = OPTIMIZER
    trainer.add_callback(DeltaLoRACallback(trainer))
    trainer.train()
    assert ours(trainer).step_count == 2
    assert trainer.state.log_history[0]["deltaopt/moved_weights"] == len(ours(trainer).triples)
    ids = tokenizer()("Once upon a time", return_tensors="pt").input_ids
    loaded = peft.PeftModel.from_pretrained(language_model(), tmp_path / "checkpoint-2" / "export").eval()
    with torch.no_grad():
        trained, again, base = (m.eval()(ids).logits for m in (trainer.model, loaded, language_model()))
    assert distance(again, trained) < 1e-4
    assert distance(base, trained) > 1e-2
