"""Routes of deltaopt, which give the trained model always."""

from typing import Any

import torch
from peft import PeftModel

import deltaopt
from deltaopt.integrations.peft import save_adapter
from tests.routes.route import route
from tests.routes.runs import Model, Run, UNetRun


@route("deltaopt", "`save_adapter(model, optimizer, dir)`, `PeftModel.from_pretrained(base, dir)`")
def adapter_in_peft(run: Run) -> Model:
    run.train()
    save_adapter(run.model, run.optimizer, run.folder)
    return PeftModel.from_pretrained(run.base(), run.folder)


@route(
    "deltaopt",
    '`save_adapter(unet, optimizer, dir)`, `unet.load_lora_adapter(dir, prefix="base_model.model", weight_name=...)`',
    UNetRun,
)
def adapter_in_diffusers(run: Run) -> Model:
    run.train()
    save_adapter(run.model, run.optimizer, run.folder)
    other = run.base()
    other.load_lora_adapter(run.folder, prefix="base_model.model", weight_name="adapter_model.safetensors")
    return other


@route("deltaopt", "`merged_weights(optimizer)` in the base")
def merged_weights(run: Run) -> Model:
    run.train()
    other, merged = run.base(), deltaopt.merged_weights(run.optimizer)
    with torch.no_grad():
        for name, W in merged.items():
            other.get_submodule(name.removeprefix("base_model.model.")).weight.copy_(W)
    return other


def _resumed(run: Run, state: dict[str, Any], model_state: dict[str, Any]) -> Model:
    other = run.fresh()
    other.load_state_dict(model_state, strict=False)
    run.optimizer_of(other).load_state_dict(state)
    return other


@route("deltaopt", "`model.state_dict()` and `optimizer.state_dict()`, loaded in this order")
def both_states(run: Run) -> Model:
    run.train()
    deltaopt.save([run.optimizer.state_dict(), run.model.state_dict()], run.folder / "run.pt")
    return _resumed(run, *deltaopt.load(run.folder / "run.pt"))


@route("deltaopt", "A and B of `model.state_dict()`, and `optimizer.state_dict()`")
def adapter_and_optimizer(run: Run) -> Model:
    run.train()
    adapter = {name: tensor for name, tensor in run.model.state_dict().items() if "lora_" in name}
    deltaopt.save([run.optimizer.state_dict(), adapter], run.folder / "run.pt")
    return _resumed(run, *deltaopt.load(run.folder / "run.pt"))
