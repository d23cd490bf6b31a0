"""Routes of transformers: its own adapters, and Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from peft import LoraConfig, PeftModel

from deltaopt.integrations.trainer import DeltaLoRACallback
from tests.routes.route import route
from tests.routes.runs import Model, Run
from tests.support.models import TARGETS, Rows


class OwnAdapterRun(Run):
    """A Llama with transformers' own adapters."""

    def fresh(self):
        model = self.base().requires_grad_(False)
        model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
        return model


@route(
    "transformers", "`model.add_adapter(...)`, `model.save_pretrained(dir)`, `base.load_adapter(dir)`", OwnAdapterRun
)
def own_adapter(run: Run) -> Model:
    run.train()
    run.model.save_pretrained(run.folder)
    other = run.base()
    other.load_adapter(run.folder)
    return other


class AfterLoading(transformers.TrainerCallback):
    """Writes down what the model computes at the start of a resumed training."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.output = self.run.output(self.run.model)


class Truths(transformers.TrainerCallback):
    """Writes down what the model computes after each step."""

    def __init__(self, run: Run) -> None:
        self.run, self.outputs = run, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.outputs[state.global_step] = self.run.output(self.run.model)
        self.run.truth = self.outputs[state.global_step]


def trainer_of(run: Run, *callbacks: transformers.TrainerCallback, **arguments: Any) -> transformers.Trainer:
    settings = {
        "output_dir": str(run.folder),
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-2,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = transformers.Trainer(
        model=run.model,
        args=transformers.TrainingArguments(**{**settings, **arguments}),
        train_dataset=Rows(9),
        eval_dataset=Rows(2),
        optimizers=(run.optimizer, None),
        callbacks=[*callbacks],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@route("transformers", "Trainer's `checkpoint-N` as an adapter")
def trainer_checkpoint(run: Run) -> Model:
    trainer_of(run, Truths(run)).train()
    return PeftModel.from_pretrained(run.base(), run.folder / "checkpoint-6")


@route("transformers", "`trainer.save_model(dir)` as an adapter")
def trainer_save_model(run: Run) -> Model:
    trainer = trainer_of(run, Truths(run), save_strategy="no")
    trainer.train()
    trainer.save_model(run.folder / "model")
    return PeftModel.from_pretrained(run.base(), run.folder / "model")


@route("transformers", "what Trainer pushes to the hub while it trains")
def trainer_push(run: Run) -> Model:
    trainer = trainer_of(run, Truths(run), hub_strategy="every_save")
    trainer.train()
    uploaded = []
    hub = type("Hub", (), {"upload_folder": lambda self, **options: uploaded.append(Path(options["folder_path"]))})
    original, transformers.trainer.hf_api = transformers.trainer.hf_api, hub
    try:
        trainer.hub_model_id = "nobody/nothing"
        trainer.push_in_progress = None
        trainer._push_from_checkpoint(str(run.folder / "checkpoint-6"))
    finally:
        transformers.trainer.hf_api = original
    return PeftModel.from_pretrained(run.base(), uploaded[0])


def with_callback(trainer: transformers.Trainer) -> transformers.Trainer:
    trainer.add_callback(DeltaLoRACallback())
    return trainer


@route("transformers", "the folder `export` of `checkpoint-N` with `DeltaLoRACallback`, where W has moved")
def trainer_export(run: Run) -> Model:
    with_callback(trainer_of(run, Truths(run))).train()
    checkpoint = run.folder / "checkpoint-6"
    export = checkpoint / "export"
    return PeftModel.from_pretrained(run.base(), export if export.exists() else checkpoint)


def _resumed(run: Run, add: Callable[..., transformers.Trainer] = lambda trainer: trainer, **arguments: Any) -> Model:
    """Stop after 3 of 6 steps; look at the model that a new process resumes with."""
    add(trainer_of(run, Truths(run), max_steps=3, **arguments)).train()
    resumed = type(run)(run.column, run.folder)
    loaded = AfterLoading(resumed)
    trainer = add(trainer_of(resumed, **arguments))
    trainer.add_callback(loaded)
    trainer.train(resume_from_checkpoint=str(run.folder / "checkpoint-3"))
    return loaded.output


@route("transformers", "`trainer.train(resume_from_checkpoint=...)`")
def trainer_resume(run: Run) -> Model:
    return _resumed(run)


@route("transformers", "the same, with `save_only_model=True`")
def trainer_resume_of_the_model_only(run: Run) -> Model:
    return _resumed(run, save_only_model=True)


@route("transformers", "the same, with `save_only_model=True` and `DeltaLoRACallback`")
def trainer_resume_of_the_model_with_callback(run: Run) -> Model:
    return _resumed(run, with_callback, save_only_model=True)


def _best(
    run: Run, add: Callable[..., transformers.Trainer] = lambda trainer: trainer, best: int = 3
) -> transformers.Trainer:
    truths = Truths(run)
    # The best step is the first that is evaluated, as the loss of this metric falls.
    options = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    trainer = add(trainer_of(run, truths, eval_strategy="steps", eval_steps=best, save_steps=best, **options))
    trainer.train()
    assert trainer.state.best_global_step == best
    run.truth = truths.outputs[best]
    return trainer


@route("transformers", "`load_best_model_at_end=True`, then evaluate")
def trainer_best_model(run: Run) -> Model:
    _best(run)
    return run.model


@route("transformers", "the same, with `DeltaLoRACallback`")
def trainer_best_model_with_callback(run: Run) -> Model:
    _best(run, with_callback)
    return run.model


@route("transformers", "`load_best_model_at_end=True` where the best step is before step K, then evaluate")
def trainer_best_model_before_k(run: Run) -> Model:
    _best(run, best=1)
    return run.model


@route("transformers", "the same, with `DeltaLoRACallback`, from before step K")
def trainer_best_model_before_k_with_callback(run: Run) -> Model:
    _best(run, with_callback, best=1)
    return run.model


@route("transformers", "`load_best_model_at_end=True`, then `trainer.save_model(dir)`")
def trainer_best_model_saved(run: Run) -> Model:
    _best(run).save_model(run.folder / "best")
    return PeftModel.from_pretrained(run.base(), run.folder / "best")
