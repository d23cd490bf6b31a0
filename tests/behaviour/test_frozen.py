"""Between steps everything works whatever requires_grad says: a trained model may be frozen."""

import copy

import pytest
import torch

from deltaopt import LoRATriple, export_adapter, merged_weights
from tests.support.compare import COPIES, refused, same, through_a_file
from tests.support.runs import LayerRun
from tests.support.small import small_layer
from tests.support.strategies import RULES


def base_of(run: LayerRun) -> torch.Tensor:
    with run.optimizer.base_weights():
        return run.stored.W.detach().clone()


def pair(low_rank) -> list[torch.Tensor]:
    return [low_rank.A, low_rank.B]


EVENTS = {
    "state_dict": lambda run: run.optimizer.state_dict()["state"],
    "base_weights": base_of,
    "displacement": lambda run: pair(run.optimizer.displacement("q")),
    "residual": lambda run: run.optimizer.residual("q"),
    "export": lambda run: pair(export_adapter(run.optimizer)["q"]),
    "merged_weights": lambda run: merged_weights(run.optimizer)["q"],
    "load_state_dict": lambda run: run.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict())),
    "zero_grad": lambda run: run.optimizer.zero_grad(),
    "restart": lambda run: run.optimizer.restart(generator=torch.Generator().manual_seed(0)),
    "resync": lambda run: run.optimizer.resync(),
    "rebase": lambda run: run.optimizer.rebase(),
}


def freeze(run: LayerRun, W: bool = False) -> None:
    for factor in run.factors:
        factor.requires_grad_(False)
    run.stored.W.requires_grad_(W)


def unfreeze(run: LayerRun) -> None:
    for factor in run.factors:
        factor.requires_grad_(True)
    run.stored.W.requires_grad_(False)


def trained(rule: str) -> LayerRun:
    return LayerRun(rule, zero=False, keep_base="cpu").train(3)


@pytest.mark.parametrize("W", [False, True], ids=["W frozen", "W unfrozen"])
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("rule", RULES)
def test_events_of_a_frozen_model(rule, event, W):
    """Do it while A and B are frozen: it gives what it gives while they train, and so does the training after it."""
    frozen, free = trained(rule), trained(rule)
    freeze(frozen, W)
    assert same(EVENTS[event](frozen), EVENTS[event](free))
    unfreeze(frozen)
    for run in (frozen, free):
        run.train(2)
    assert same([*frozen.tensors, frozen.scale], [*free.tensors, free.scale])


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("rule", RULES)
def test_a_frozen_model_is_copied(rule, way):
    """Copy a frozen run, read the copy, unfreeze it and train: its gradients are divided as those of the original."""
    run = trained(rule)
    freeze(run)
    twin = COPIES[way](run)
    assert same(EVENTS["state_dict"](twin), EVENTS["state_dict"](run))
    twin.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    for each in (run, twin):
        unfreeze(each)
        each.train(2)
    assert same([*twin.tensors, twin.scale], [*run.tensors, run.scale])


@pytest.mark.parametrize("W", [False, True], ids=["factor", "weight"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_of_a_frozen_model_is_refused(rule, W):
    run = trained(rule)
    run.backward()
    (run.stored.W.requires_grad_() if W else freeze(run))
    reason = "q: W requires grad: Delta-LoRA moves a frozen W" if W else "q: neither A nor B requires grad"
    refused(run.step, ValueError, reason, lambda: run.tensors)
    unfreeze(run)
    run.step()


def test_triples_are_added_to_a_frozen_model_if_they_train():
    run = trained("in_place")
    freeze(run)
    run.optimizer.add_param_group({"triples": [LoRATriple(*small_layer(), name="added")]})
    W, A, B = (copy.deepcopy(t.detach()) for t in small_layer(seed=1))
    frozen = LoRATriple(W, A, B, name="frozen")
    with pytest.raises(ValueError, match="frozen: neither A nor B requires grad") as caught:
        run.optimizer.add_param_group({"triples": [frozen]})
    assert "q: " not in str(caught.value)
