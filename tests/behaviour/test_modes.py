"""Modes of torch that decide what new tensors are: a default device, and inference mode."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple, export_adapter, merged_weights
from tests.support.compare import same
from tests.support.runs import LayerRun
from tests.support.small import HandmadeLayer
from tests.support.strategies import RULES

KINDS = [
    (torch.float64, "auto"),
    (torch.float32, "auto"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "compensated"),
    (torch.float16, "stochastic"),
    (torch.float16, "nearest"),
]
each_kind = pytest.mark.parametrize(("dtype", "rounding"), KINDS, ids=str)
each_rule = pytest.mark.parametrize("rule", RULES)


def new_run(rule: str, dtype: torch.dtype, rounding: str, **options: Any) -> LayerRun:
    """A run whose inner optimizer makes no tensors by itself that are not like its parameters, as AdamW does."""
    options = {"inner": torch.optim.SGD, "momentum": 0.9, "keep_base": "cpu", **options}
    factors = {"factor_dtype": torch.promote_types(dtype, torch.float32)}
    return LayerRun(rule, "experts", zero=False, dtype=dtype, rounding=rounding, **factors, **options)


def base_of(run: LayerRun) -> Tensor:
    with run.optimizer.base_weights():
        return run.stored.W.clone()


def pair(low_rank: Any) -> list[Tensor]:
    return [low_rank.A, low_rank.B]


EVENTS: dict[str, Callable[[LayerRun], Any]] = {
    "state_dict": lambda run: run.optimizer.state_dict(),
    "displacement": lambda run: pair(run.optimizer.displacement("q")),
    "base_weights": base_of,
    "residual": lambda run: run.optimizer.residual("q"),
    "export_adapter": lambda run: pair(export_adapter(run.optimizer)["q"]),
    "merged_weights": lambda run: merged_weights(run.optimizer)["q"],
    "accounts": lambda run: run.optimizer.accounts()[0].ledger.terms,
    "load_state_dict": lambda run: run.optimizer.load_state_dict(run.optimizer.state_dict()),
    "resync": lambda run: run.optimizer.resync(),
    "restart": lambda run: run.optimizer.restart(generator=torch.Generator("cpu").manual_seed(run.t)),
    "rebase": lambda run: run.optimizer.rebase(),
}


def life(run: LayerRun, mode: Callable[[], AbstractContextManager], steps_too: bool) -> list[Any]:
    """Train, with every event between two steps, those within `mode`; return what they gave and what is left."""
    results = []
    for event in (lambda run: None, *EVENTS.values()):
        with mode():
            results.append(copy.deepcopy(event(run)))
        run.backward()
        with mode() if steps_too else nullcontext():
            run.optimizer.step()
        if event is EVENTS["accounts"]:
            run.optimizer.groups[0].update_ratio = 1.5 if run.rule == "in_place" else 2.0
    return [*results, *run.tensors, run.scale, run.optimizer.state_dict()]


def on_the_meta_device() -> AbstractContextManager:
    """Torch's mode for new tensors that are made without a device; `set_default_device` is the same mode."""
    return torch.device("meta")


@each_rule
@each_kind
def test_a_default_device_changes_nothing(rule, dtype, rounding):
    """Live a whole life while tensors without a device are made elsewhere, as with torch.set_default_device."""
    found, expected = (
        life(new_run(rule, dtype, rounding), mode, steps_too=True) for mode in (on_the_meta_device, nullcontext)
    )
    assert same(found, expected)


@each_rule
def test_an_optimizer_is_built_and_resumed_with_a_default_device(rule):
    run = new_run(rule, torch.bfloat16, "compensated").train(3)
    with on_the_meta_device():
        other = run.twin(whole=False, keep_base="device")
    assert other.stored.W.device.type == "cpu"
    resumed = run.twin(whole=False, keep_base="device")
    assert same(other.train(2).tensors, resumed.train(2).tensors)


@each_rule
@pytest.mark.parametrize(("dtype", "rounding"), KINDS[1:4], ids=str)
@pytest.mark.parametrize("moved", [False, True], ids=["before the first move", "after it"])
@pytest.mark.parametrize("event", EVENTS)
def test_an_event_in_inference_mode_leaves_tensors_that_can_be_trained(rule, dtype, rounding, moved, event):
    """Compare with a run whose event was outside: state that is made in inference mode could never be written."""
    runs = [new_run(rule, dtype, rounding, keep_base="cpu" if moved else None) for _ in range(2)]
    if event == "residual" and not moved:
        runs = [new_run(rule, dtype, rounding) for _ in range(2)]
    for run, mode in zip(runs, (torch.inference_mode, nullcontext), strict=True):
        run.train(2 if moved else 0)
        with mode():
            EVENTS[event](run)
        run.train(2)
        run.optimizer.restart(generator=torch.Generator().manual_seed(0))
        run.train(2)
    results = [[*run.tensors, run.scale, run.optimizer.state_dict()] for run in runs]
    assert same(*results)


@each_rule
@each_kind
def test_a_whole_life_with_events_in_inference_mode(rule, dtype, rounding):
    found, expected = (
        life(new_run(rule, dtype, rounding), mode, steps_too=False) for mode in (torch.inference_mode, nullcontext)
    )
    assert same(found, expected)


@each_rule
def test_an_optimizer_is_built_in_inference_mode(rule):
    """Build it, and add triples, where copies of the base and inner state are made."""

    def built(mode: Callable[[], AbstractContextManager]) -> list[Tensor]:
        torch.manual_seed(0)
        layers = [HandmadeLayer(), HandmadeLayer()]
        with mode():
            triples = [layer.triple(name) for layer, name in zip(layers, "qk", strict=True)]
            optimizer = DeltaLoRAOptimizer(
                torch.optim.Adagrad, triples[:1], lr=0.1, weight_update=rule, keep_base="device"
            )
            optimizer.add_param_group({"triples": triples[1:], "lr": 0.2})
        for _ in range(3):
            optimizer.zero_grad()
            loss = sum(((layer.weight + layer.scaling * layer.A @ layer.B) ** 2).sum() for layer in layers)
            loss.backward()
            optimizer.step()
        return [parameter.detach() for layer in layers for parameter in layer.parameters()]

    assert same(built(torch.inference_mode), built(nullcontext))


@contextmanager
def evaluated(optimizer: DeltaLoRAOptimizer) -> Iterator[None]:
    with torch.inference_mode(), optimizer.base_weights():
        yield


@each_rule
def test_the_inference_mode_of_the_caller_holds_within_base_weights(rule):
    run = new_run(rule, torch.float64, "auto").train(2)
    with evaluated(run.optimizer):
        assert torch.is_inference_mode_enabled()
        assert torch.ones(1).is_inference()
    assert not torch.is_inference_mode_enabled()
    with run.optimizer.base_weights():
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    run.train(2)


def test_a_step_in_inference_mode_leaves_tensors_that_can_be_trained():
    runs = [new_run("in_place", torch.float32, "auto") for _ in range(2)]
    for run, mode in zip(runs, (torch.inference_mode, nullcontext), strict=True):
        run.backward()
        with mode():
            run.optimizer.step()
        run.train(2)
    assert same(runs[0].tensors, runs[1].tensors)


def test_an_embedding_layer_has_a_life_with_a_default_device():
    """Restart an embedding, whose start draws other random numbers."""

    def lived(mode: Callable[[], AbstractContextManager]) -> list[Tensor]:
        torch.manual_seed(0)
        layer = nn.Embedding(9, 6).requires_grad_(False)
        A, B = torch.randn(6, 2, requires_grad=True), torch.randn(2, 9, requires_grad=True)
        optimizer = DeltaLoRAOptimizer(
            torch.optim.SGD, [LoRATriple((layer, "weight"), A, B, layout="embedding", name="e")], lr=0.1
        )
        for factor in (A, B):
            factor.grad = torch.ones_like(factor)
        with mode():
            optimizer.step()
            optimizer.restart(generator=torch.Generator("cpu").manual_seed(0))
        return [layer.weight.detach(), A.detach(), B.detach()]

    assert same(lived(on_the_meta_device), lived(nullcontext))
