"""Averages of the parameters, by torch and by hand."""

import copy

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from deltaopt.integrations.peft import save_adapter
from tests.routes.route import NotSeen, route
from tests.routes.runs import Model, Run


def _averaged(run: Run) -> nn.Module:
    """Train with an average that is updated from step K on."""
    averaged = AveragedModel(run.model)

    def update() -> None:
        if run.is_averaged:
            averaged.update_parameters(run.model)
            run.remember()

    run.train(each_step=update)
    run.mean()
    return averaged.module


@route("torch", "`AveragedModel(model)` from before training")
def averaged_from_before(run: Run) -> Model:
    assert run.optimizer.step_count == 0
    return _averaged(run)


@route(
    "torch",
    "`AveragedModel(model)` from before the optimizer was built",
    not_seen=NotSeen(
        ("folded, zero product", "folded, product not zero"),
        "Such a copy knows nothing of the optimizer, and the average is written into its parameters, which calls "
        "nothing.",
        "Build the optimizer first, or make the average after step K.",
    ),
)
def averaged_from_before_the_optimizer(run: Run) -> Model:
    return _averaged(run)


@route("torch", "`AveragedModel(model)` from after step K")
def averaged_from_within(run: Run) -> Model:
    run.train()
    return _averaged(run)


@route("torch", "`AveragedModel(model)` from before training, `averaged.module.state_dict()` into another model")
def averaged_and_state_dict(run: Run) -> Model:
    assert run.optimizer.step_count == 0
    averaged, other = _averaged(run), run.fresh()
    other.load_state_dict(averaged.state_dict())
    return other


@route("torch", "`AveragedModel(model)` from after step K, `averaged.module.state_dict()` into another model")
def averaged_within_and_state_dict(run: Run) -> Model:
    run.train()
    averaged, other = _averaged(run), run.fresh()
    other.load_state_dict(averaged.state_dict())
    return other


def _mean_of(run: Run, *, of_all: bool = False) -> dict[str, Tensor]:
    """Train, and average the parameters from step K on: those that train, or all."""
    mean, count = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad or of_all}, 0

    def update() -> None:
        nonlocal count
        if run.is_averaged:
            count += 1
            for name, parameter in run.model.named_parameters():
                if name in mean:
                    mean[name].lerp_(parameter.detach(), 1 / count)
            run.remember()

    run.train(each_step=update)
    run.mean(moves_W=not of_all)
    return mean


def _copy_in(run: Run, mean: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if name in mean:
                parameter.copy_(mean[name])


@route("torch", "an average of A and B, copied into the model")
def average_copied_in(run: Run) -> Model:
    _copy_in(run, _mean_of(run))
    return run.model


@route("torch", "an average of A and B, `model.load_state_dict(average, strict=False)`")
def average_loaded(run: Run) -> Model:
    run.model.load_state_dict(_mean_of(run), strict=False)
    return run.model


@route("torch", "an average of `model.state_dict()`, `model.load_state_dict(average)`")
def average_of_states(run: Run) -> Model:
    states = []

    def update() -> None:
        if run.is_averaged:
            states.append(copy.deepcopy(run.model.state_dict()))
            run.remember()

    run.train(each_step=update)
    run.mean()
    run.model.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    return run.model


@route("torch", "an average of A and B, copied into the model, `optimizer.resync()`")
def average_and_resync(run: Run) -> Model:
    _copy_in(run, _mean_of(run))
    run.optimizer.resync()
    return run.model


@route("torch", "an average of all parameters, copied into the model")
def average_of_all(run: Run) -> Model:
    _copy_in(run, _mean_of(run, of_all=True))
    return run.model


@route("torch", "an average of all parameters, copied into the model, then `save_adapter`")
def average_of_all_saved(run: Run) -> Model:
    _copy_in(run, _mean_of(run, of_all=True))
    save_adapter(run.model, run.optimizer, run.folder)
    return PeftModel.from_pretrained(run.base(), run.folder)
