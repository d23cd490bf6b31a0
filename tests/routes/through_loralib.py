"""Routes of loralib."""

import loralib
import torch

from tests.routes.route import route
from tests.routes.runs import LoralibRun, Model, Run


@route("loralib", "`lora_state_dict(model)`, `load_state_dict(..., strict=False)` on the base", LoralibRun)
def lora_state_dict(run: Run) -> Model:
    run.train()
    torch.save(loralib.lora_state_dict(run.model), run.folder / "lora.pt")
    other = run.fresh()
    other.load_state_dict(torch.load(run.folder / "lora.pt"), strict=False)
    return other


@route("loralib", "`other.load_state_dict(model.state_dict())`", LoralibRun)
def loralib_state_dict(run: Run) -> Model:
    run.train()
    other = run.fresh()
    other.load_state_dict(run.model.state_dict())
    return other


@route("loralib", "`model.eval()` merges, `model.state_dict()` into plain layers", LoralibRun)
def loralib_merged(run: Run) -> Model:
    run.train()
    run.model.eval()
    other = run.base()
    other.load_state_dict(run.model.state_dict(), strict=False)
    return other
