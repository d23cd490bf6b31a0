"""Routes of PEFT."""

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from tests.routes.route import NotSeen, route
from tests.routes.runs import Model, Run


@route("peft", "`model.save_pretrained(dir)`, `PeftModel.from_pretrained(base, dir)`")
def save_pretrained(run: Run) -> Model:
    run.train()
    run.model.save_pretrained(run.folder)
    return PeftModel.from_pretrained(run.base(), run.folder)


@route("peft", "`model.save_pretrained(dir)`, `other.load_adapter(dir, name)`")
def load_adapter(run: Run) -> Model:
    run.train()
    run.model.save_pretrained(run.folder)
    other = run.fresh()
    other.load_adapter(run.folder, "trained")
    other.set_adapter("trained")
    return other


@route("peft", "`get_peft_model_state_dict(model)`, `set_peft_model_state_dict(other, ...)`")
def peft_state_dict(run: Run) -> Model:
    run.train()
    torch.save(get_peft_model_state_dict(run.model), run.folder / "adapter.pt")
    other = run.fresh()
    set_peft_model_state_dict(other, torch.load(run.folder / "adapter.pt"))
    return other


@route("peft", "`model.merge_and_unload()`, `save_pretrained(dir)`, `from_pretrained(dir)`")
def merge_and_unload(run: Run) -> Model:
    run.train()
    merged = run.model.merge_and_unload()
    merged.save_pretrained(run.folder)
    return type(merged).from_pretrained(run.folder)


@route("peft", "`model.merge_adapter()`, `model.state_dict()` of the merged model")
def merge_adapter(run: Run) -> Model:
    run.train()
    run.model.merge_adapter()
    state = run.model.state_dict()
    other = run.fresh()
    other.load_state_dict({key: tensor for key, tensor in state.items() if "lora_" not in key}, strict=False)
    return other


COMBINED = NotSeen(
    ("in place", "folded, product not zero"),
    "PEFT computes the new adapter from A and B; the movement of W belongs to the adapter that made it.",
    "Write each adapter with `save_adapter`, load them onto the base, and combine those.",
)


@route("peft", '`model.add_weighted_adapter(["default"], [1.0], "sum")`, `model.set_adapter("sum")`', not_seen=COMBINED)
def add_weighted_adapter(run: Run) -> Model:
    run.train()
    run.model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    run.model.set_adapter("sum")
    return run.model
