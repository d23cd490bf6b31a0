"""PEFT models under the folded rule: adapted, trained, compared with W moved in place, and read back."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import deltaopt
from deltaopt import DeltaLoRAOptimizer, find_triples, other_parameters
from tests.support.compare import through_a_file
from tests.support.peft_layers import CASES, PEFT_CAN_NOT, lora_layers, output, peft, randomised, train_model

FOLDED_RATIO, ALPHA = 1.5, 5
LARGER = ALPHA * (1 + FOLDED_RATIO)
"""What the alpha is when the ratio is in the branch."""

NAMES = sorted(CASES.keys() - PEFT_CAN_NOT)
SOME = ["linear", "conv1d_gpt2", "embedding", "conv2d", "experts_3_7x5_up_down"]


class Trained(NamedTuple):
    """A model and what trains it."""

    model: nn.Module
    optimizer: DeltaLoRAOptimizer


def adapted(plain: nn.Module, *targets: str, zero: bool = True, **config: Any) -> nn.Module:
    """A copy of `plain` in float64 with adapters, whose product is zero or random."""
    config = {"r": 2, "lora_alpha": ALPHA, "target_modules": list(targets), **config}
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**config)).double()
    return model if zero else randomised(model)


def optimizer_of(model: nn.Module, inner: type = torch.optim.AdamW, **options: Any) -> DeltaLoRAOptimizer:
    options = {"lr": 2e-2, "update_ratio": FOLDED_RATIO, "weight_update": "folded", **options}
    return DeltaLoRAOptimizer.for_model(model, inner, **options)


def folded(model: nn.Module, x: Any, steps: int = 3, **options: Any) -> DeltaLoRAOptimizer:
    """An optimizer of `model` after some steps."""
    optimizer = optimizer_of(model, **options)
    train_model(model, optimizer, x, steps)
    return optimizer


def grouped(model: nn.Module, ratios: list[float], **options: Any) -> DeltaLoRAOptimizer:
    """An optimizer with a ratio for each triple."""
    triples = find_triples(model)
    groups = [{"triples": [t], "update_ratio": r} for t, r in zip(triples, ratios, strict=True)]
    return DeltaLoRAOptimizer(torch.optim.AdamW, groups, other_parameters(model, triples), lr=2e-2, **options)


def both_rules_on(
    model: nn.Module, x: Any, steps: int = 4, make: Callable[..., DeltaLoRAOptimizer] = optimizer_of, **options: Any
) -> list[Trained]:
    """(folded, in place): copies of `model` after the same training."""
    runs = []
    for rule in ("folded", "in_place"):
        twin = copy.deepcopy(model)
        runs.append(Trained(twin, make(twin, weight_update=rule, **options)))
        train_model(*runs[-1], x, steps)
    return runs


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """No element differs by more."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@torch.no_grad()
def assert_alike(one: Trained, other: Trained, x: Any, tolerance: float = 1e-10) -> None:
    """A, B, the displacement, the effective weights and the output are the same."""
    for mine, its in zip(one.optimizer.triples, other.optimizer.triples, strict=True):
        assert_near(mine.A, its.A, tolerance)
        assert_near(mine.B, its.B, tolerance)
        asked = other.optimizer.displacement(its.name).product()
        assert_near(one.optimizer.displacement(mine.name).product(), asked, tolerance)
    merged = deltaopt.merged_weights(other.optimizer)
    for name, W in deltaopt.merged_weights(one.optimizer).items():
        assert_near(W, merged[name], tolerance)
    assert_near(output(one.model, x), output(other.model, x), tolerance)


def assert_trained_alike(one: nn.Module, other: nn.Module, x: Any) -> None:
    """Assert that what trains is the same in both models to the last bit, and so is what they compute."""
    its = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, its[name]), name
    with torch.no_grad():
        assert torch.equal(output(one.eval(), x), output(other.eval(), x))


def layer_scalings(model: nn.Module) -> list[float]:
    return [layer.scaling["default"] for layer in lora_layers(model).values()]


def alphas(model: nn.Module) -> list[float]:
    return [layer.lora_alpha["default"] for layer in lora_layers(model).values()]


def state_of(optimizer: DeltaLoRAOptimizer) -> dict:
    """Its state after a way through a file."""
    return through_a_file(optimizer.state_dict())
