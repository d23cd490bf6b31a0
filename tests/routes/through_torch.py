"""Routes of torch: states, files, copies."""

import copy
import warnings

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tests.routes.route import NotSeen, route
from tests.routes.runs import Model, Run
from tests.support.elsewhere import run_without_this_package

FOLDED = ("folded, zero product", "folded, product not zero")
STATE_INTO_PARAMETERS = NotSeen(
    FOLDED,
    "`state_dict()` gives A for the registered scaling, and this branch has a larger one. Writing to a parameter calls "
    "nothing.",
    "Put a state back with `model.load_state_dict(state)`, or keep copies of `named_parameters()` instead.",
)
STATE_AS_PARAMETERS = NotSeen(
    FOLDED,
    "`state_dict()` gives A for the registered scaling, and this branch has a larger one. `functional_call` calls "
    "nothing that would know.",
    "Give it `dict(model.named_parameters())`.",
)


@route("torch", "`other.load_state_dict(model.state_dict())`")
def state_dict(run: Run) -> Model:
    run.train()
    other = run.fresh()
    other.load_state_dict(run.model.state_dict())
    return other


def _base_of(model: PeftModel, run: Run) -> Tensor:
    """Return an output that is right if the base's output is: the trained one, off by as much as that of the base."""
    with model.disable_adapter():
        return run.truth + run.output(model) - run.output(run.base())


@route(
    "torch",
    "`other.load_state_dict(model.state_dict())`, then the base by `other.disable_adapter()`",
    not_seen=NotSeen(
        ("in place", "folded, product not zero"),
        "The other model gets the moved W, and no values say how far it has moved.",
        "Take `copy.deepcopy(model)`; or load the optimizer's state with it: "
        "`DeltaLoRAOptimizer.for_model(other, ...)`, then `load_state_dict`.",
    ),
)
def base_of_a_state_dict(run: Run) -> Model:
    run.train()
    other = run.fresh()
    other.load_state_dict(run.model.state_dict())
    return _base_of(other, run)


@route("torch", "the same, with the optimizer's state loaded as well")
def base_of_both_states(run: Run) -> Model:
    run.train()
    other = run.fresh()
    other.load_state_dict(run.model.state_dict())
    optimizer = run.optimizer_of(other)
    optimizer.load_state_dict(run.optimizer.state_dict())
    return _base_of(other, run)


@route("torch", "`copy.deepcopy(model)`, then the base by `disable_adapter()`")
def base_of_a_deepcopy(run: Run) -> Model:
    run.train()
    return _base_of(copy.deepcopy(run.model), run)


@route("torch", "`other.load_state_dict(model.state_dict(), assign=True)`")
def state_dict_assigned(run: Run) -> Model:
    run.train()
    other = run.fresh()
    other.load_state_dict(run.model.state_dict(), assign=True)
    return other


@route("torch", "`torch.save(model.state_dict(), file)`, `torch.load(file)`")
def state_dict_in_a_file(run: Run) -> Model:
    run.train()
    torch.save(run.model.state_dict(), run.folder / "model.pt")
    other = run.fresh()
    other.load_state_dict(torch.load(run.folder / "model.pt"))
    return other


@route("torch", "`copy.deepcopy(model.state_dict())`")
def state_dict_copied(run: Run) -> Model:
    run.train()
    other = run.fresh()
    other.load_state_dict(copy.deepcopy(run.model.state_dict()))
    return other


@route("torch", "a state of the same model, loaded back after more training")
def state_dict_of_before(run: Run) -> Model:
    run.train()
    best = copy.deepcopy(run.model.state_dict())
    truth = run.truth
    run.train()
    run.truth = truth
    run.model.load_state_dict(best)
    return run.model


@route("torch", "the same, put back with `parameter.copy_(state[name])`", not_seen=STATE_INTO_PARAMETERS)
def state_dict_of_before_copied_in(run: Run) -> Model:
    run.train()
    best = copy.deepcopy(run.model.state_dict())
    truth = run.truth
    run.train()
    run.truth = truth
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            parameter.copy_(best[name])
    return run.model


@route("torch", "the same, put back with `model.state_dict()[name].copy_(state[name])`")
def state_dict_of_before_written_into_a_state_dict(run: Run) -> Model:
    run.train()
    best = copy.deepcopy(run.model.state_dict())
    truth = run.truth
    run.train()
    run.truth = truth
    for name, tensor in run.model.state_dict().items():
        tensor.copy_(best[name])
    return run.model


ADAPTER_ALONE = NotSeen(
    ("in place", "folded, product not zero"),
    "A whole state is asked for, from which the moved W is left out later.",
    "Save `optimizer.state_dict()` with it to resume, or use `save_adapter`.",
)


@route("torch", "A and B of `model.state_dict()`, `other.load_state_dict(..., strict=False)`", not_seen=ADAPTER_ALONE)
def state_dict_of_the_adapter(run: Run) -> Model:
    run.train()
    adapter = {name: tensor for name, tensor in run.model.state_dict().items() if "lora_" in name}
    torch.save(adapter, run.folder / "adapter.pt")
    other = run.fresh()
    other.load_state_dict(torch.load(run.folder / "adapter.pt"), strict=False)
    return other


PARAMETERS_ALONE = NotSeen(
    FOLDED,
    "The scaling of the branch is no parameter, and reading parameters calls nothing.",
    "Take `model.state_dict()`, or `copy.deepcopy(model)`.",
)


@route("torch", "`dict(model.named_parameters())` copied into another model", not_seen=PARAMETERS_ALONE)
def named_parameters(run: Run) -> Model:
    run.train()
    other, trained = run.fresh(), dict(run.model.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(trained[name])
    return other


@route("torch", "`parameters_to_vector`, `vector_to_parameters` into another model", not_seen=PARAMETERS_ALONE)
def vector(run: Run) -> Model:
    run.train()
    other = run.fresh()
    vector_to_parameters(parameters_to_vector(run.model.parameters()).detach(), other.parameters())
    return other


@route("torch", "`functional_call(other, model.state_dict(), inputs)`")
def functional_call_of_another(run: Run) -> Model:
    run.train()
    other, state = run.fresh().eval(), run.model.state_dict()
    with torch.no_grad():
        return torch.func.functional_call(other, state, (), {"input_ids": run.inputs}).logits


@route("torch", "`functional_call(model, model.state_dict(), inputs)`", not_seen=STATE_AS_PARAMETERS)
def functional_call(run: Run) -> Model:
    run.train()
    with torch.no_grad():
        return torch.func.functional_call(run.model, run.model.state_dict(), (), {"input_ids": run.inputs}).logits


@route("torch", "`functional_call(model, dict(model.named_parameters()), inputs)`")
def functional_call_of_parameters(run: Run) -> Model:
    run.train()
    with torch.no_grad():
        parameters = dict(run.model.named_parameters())
        return torch.func.functional_call(run.model, parameters, (), {"input_ids": run.inputs}).logits


@route("torch", "`copy.deepcopy(model)`")
def deepcopy(run: Run) -> Model:
    run.train()
    return copy.deepcopy(run.model)


@route("torch", "`copy.deepcopy(model)`, then its `state_dict()` into another model")
def deepcopy_and_state_dict(run: Run) -> Model:
    run.train()
    other = run.fresh()
    other.load_state_dict(copy.deepcopy(run.model).state_dict())
    return other


ELSEWHERE = """
    import torch
    model, inputs = torch.load(files[0], weights_only=False)
    with torch.no_grad():
        torch.save(model.eval()(input_ids=inputs).logits, files[1])
"""


@route("torch", "`torch.save(model, file)`, `torch.load(file)` in a process without deltaopt")
def whole_model_in_a_file(run: Run) -> Model:
    run.train()
    torch.save((run.model, run.inputs), run.folder / "model.pt")
    if said := run_without_this_package(ELSEWHERE, run.folder / "model.pt", run.folder / "output.pt"):
        warnings.warn(said, stacklevel=1)
    return torch.load(run.folder / "output.pt")


@route("torch", '`checkpoint.save({"model": model})`, `checkpoint.load({"model": other})`')
def distributed_checkpoint_of_the_module(run: Run) -> Model:
    run.train()
    checkpoint.save({"model": run.model}, checkpoint_id=run.folder)
    other = run.fresh()
    checkpoint.load({"model": other}, checkpoint_id=run.folder)
    return other


@route("torch", "`get_model_state_dict(model)`, `checkpoint.save`, `checkpoint.load`, `set_model_state_dict`")
def distributed_checkpoint(run: Run) -> Model:
    run.train()
    checkpoint.save(get_model_state_dict(run.model), checkpoint_id=run.folder)
    other = run.fresh()
    state = get_model_state_dict(other)
    checkpoint.load(state, checkpoint_id=run.folder)
    set_model_state_dict(other, state)
    return other
