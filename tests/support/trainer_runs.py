"""Trainers of a tiny Llama with adapters, with the optimizer by `DeltaLoRAFactory`, and what their model computed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer
from deltaopt.integrations.trainer import DeltaLoRACallback, DeltaLoRAFactory
from tests.support.models import RATIO, Rows, batches, causal_lm, peft, transformers
from tests.support.peft_runs import STARTS

OPTIONS = {"inner": torch.optim.AdamW, "lr": 1e-2, "update_ratio": RATIO}


def arguments(folder: Path, **settings: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 3e-2,
            "lr_scheduler_type": "constant",
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            **settings,
        },
    )


def trainer_of(args: transformers.TrainingArguments, optimizer: Any, model: Any = None, **more: Any):
    if model is None:
        more["model_init"] = lambda: causal_lm(B_zero=True)
    return transformers.Trainer(
        model, args, train_dataset=Rows(9), eval_dataset=Rows(2), optimizer_cls_and_kwargs=optimizer, **more
    )


def ours(trainer: transformers.Trainer) -> DeltaLoRAOptimizer:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    training = model.training
    logits = model.eval()(input_ids=batches(1, seed=9)[0]).logits
    model.train(training)
    return logits


def logits_from(folder: Path) -> Tensor:
    """What plain PEFT computes with the adapter of this folder on the pristine base."""
    base = causal_lm(torch.float32, B_zero=True).unload()
    return logits_of(peft.PeftModel.from_pretrained(base, folder))


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


class Record(transformers.TrainerCallback):
    """The logits when training begins, after each step, and what each log held when this callback saw it."""

    def __init__(self) -> None:
        self.logits: dict[int, Tensor] = {}
        self.begin: Tensor | None = None
        self.logs: list[dict[str, Any]] = []

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        if self.begin is None:
            self.begin = logits_of(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.logits[state.global_step] = logits_of(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


class Run:
    """A Trainer with `DeltaLoRACallback`, of a fresh model with the product of a start.

    Args:
        folder: of the Trainer.
        rule: how W is moved.
        start: a key of `STARTS`.
        resume_from: of the callback.
        options: of the optimizer, next to those of the start.
        dtype: of W.
        settings: of the `TrainingArguments`.
    """

    def __init__(
        self,
        folder: Path,
        rule: str = "in_place",
        start: str = "zero",
        resume_from: Path | None = None,
        options: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        options = {**OPTIONS, **STARTS[start], "weight_update": rule, **(options or {})}
        self.model = causal_lm(dtype, options.pop("B_zero"))
        self.record = Record()
        self.trainer = trainer_of(
            arguments(folder, **{"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **settings}),
            (DeltaLoRAFactory, options),
            self.model,
            callbacks=[self.record, DeltaLoRACallback(resume_from=resume_from)],
        )

    def train(self, resume_from: Path | None = None) -> "Run":
        self.trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        return self

    @property
    def optimizer(self) -> DeltaLoRAOptimizer:
        return ours(self.trainer)
