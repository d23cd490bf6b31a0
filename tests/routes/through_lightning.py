"""Routes of Lightning."""

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from tests.routes.route import route
from tests.routes.runs import Model, Run
from tests.support.models import batches, loss_of


class Module(lightning.LightningModule):
    """A module whose model and optimizer are those of a run."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run, self.model = run, run.model

    def training_step(self, ids, _):
        return loss_of(self.model, ids)

    def configure_optimizers(self):
        return self.run.optimizer


class Outputs(lightning.Callback):
    """Writes down what the model computes at the start and after each step."""

    def on_train_start(self, trainer: Any, module: Module) -> None:
        self.at_start = module.run.output(module.model)
        module.train()

    def on_train_batch_end(self, trainer: Any, module: Module, *_: Any) -> None:
        module.run.is_trained()
        module.train()


def fit(run: Run, *callbacks: lightning.Callback, epochs: int = 2, checkpoint: Any = None) -> lightning.Trainer:
    """Train for two steps an epoch."""
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run.folder,
        callbacks=[*callbacks],
    )
    data = torch.utils.data.DataLoader(torch.cat(batches(2)), batch_size=4)
    trainer.fit(Module(run), data, ckpt_path=checkpoint)
    return trainer


@route("lightning", "a checkpoint, `Module.load_from_checkpoint(file)`")
def load_from_checkpoint(run: Run) -> Model:
    fit(run, Outputs()).save_checkpoint(run.folder / "last.ckpt")
    fresh = type(run)(run.column, run.folder)
    return Module.load_from_checkpoint(run.folder / "last.ckpt", run=fresh).model


@route("lightning", "a checkpoint, `trainer.fit(module, ckpt_path=file)`")
def resume(run: Run) -> Model:
    fit(run, Outputs()).save_checkpoint(run.folder / "last.ckpt")
    fresh, outputs = type(run)(run.column, run.folder), Outputs()
    fit(fresh, outputs, epochs=3, checkpoint=run.folder / "last.ckpt")
    return outputs.at_start


class Averaging(WeightAveraging):
    """Averages the steps from step K on, and writes them down."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is None or not self.run.is_averaged:
            return False
        self.run.remember()
        return True


@route("lightning", "the callback `WeightAveraging`")
def weight_averaging(run: Run) -> Model:
    fit(run, Averaging(run))
    run.mean()
    return run.model


@route("lightning", "the callback `WeightAveraging`, a checkpoint, `Module.load_from_checkpoint(file)`")
def weight_averaging_checkpoint(run: Run) -> Model:
    trainer = fit(run, Averaging(run))
    run.mean()
    trainer.save_checkpoint(run.folder / "last.ckpt", weights_only=True)
    fresh = type(run)(run.column, run.folder)
    return Module.load_from_checkpoint(run.folder / "last.ckpt", run=fresh).model


class EpochStarts(lightning.Callback):
    """Writes down what `StochasticWeightAveraging` averages."""

    def on_train_epoch_start(self, trainer: Any, module: Module) -> None:
        if trainer.current_epoch >= 2:
            module.run.remember()


@route("lightning", "the callback `StochasticWeightAveraging`")
def stochastic_weight_averaging(run: Run) -> Model:
    # It begins one epoch before the one that is named, with two steps an epoch.
    fit(run, StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=3), EpochStarts(), epochs=5)
    run.mean()
    return run.model
