"""Routes of Accelerate."""

import accelerate
from peft import PeftModel
from safetensors.torch import load_model

from tests.routes.route import route
from tests.routes.runs import Model, Run


def prepared(run: Run) -> accelerate.Accelerator:
    """Train the model as Accelerate prepares it."""
    accelerator = accelerate.Accelerator(cpu=True)
    run.train(lambda: None, *accelerator.prepare(run.model, run.optimizer))
    return accelerator


@route("accelerate", "`accelerator.save_state(dir)`, `accelerator.load_state(dir)`")
def save_state(run: Run) -> Model:
    prepared(run).save_state(run.folder)
    accelerator, other = accelerate.Accelerator(cpu=True), run.fresh()
    other, _ = accelerator.prepare(other, run.optimizer_of(other))
    accelerator.load_state(run.folder)
    return other


@route("accelerate", "`accelerator.save_state(dir)`, then its model.safetensors alone")
def save_state_without_the_optimizer(run: Run) -> Model:
    prepared(run).save_state(run.folder)
    other = run.fresh()
    load_model(other, run.folder / "model.safetensors")
    return other


@route("accelerate", "`accelerator.save_model(model, dir)`, `load_checkpoint_in_model(other, dir)`")
def save_model(run: Run) -> Model:
    accelerator = prepared(run)
    accelerator.save_model(run.model, run.folder)
    other = run.fresh()
    accelerate.load_checkpoint_in_model(other, run.folder)
    return other


@route(
    "accelerate",
    "`unwrap_model(model).save_pretrained(dir, state_dict=accelerator.get_state_dict(model))`",
)
def save_pretrained_of_a_state(run: Run) -> Model:
    accelerator = prepared(run)
    state = accelerator.get_state_dict(run.model)
    accelerator.unwrap_model(run.model).save_pretrained(run.folder, state_dict=state)
    return PeftModel.from_pretrained(run.base(), run.folder)
