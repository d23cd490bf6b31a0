"""The inner optimizer: how it is built, which hooks it fires, and when a step only makes its state exist."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support.runs import LayerRun
from tests.support.small import random_steps, small_layer
from tests.support.strategies import RULES

# Building.


def test_a_built_inner_optimizer_is_stepped_itself():
    W, A, B = small_layer()
    inner = torch.optim.AdamW([{"params": [A], "lr": 1e-2}, {"params": [B], "lr": 1e-3}])
    optimizer = DeltaLoRAOptimizer(inner, [LoRATriple(W, A, B, scaling=0.5)], update_ratio=3.0)
    frozen, product = W.double(), (A.double() @ B.double()).detach()
    optimizer.step()
    assert optimizer.inner is inner
    assert torch.allclose(W.double(), frozen + 1.5 * ((A.double() @ B.double()).detach() - product), atol=1e-6)
    assert not torch.equal(W.double(), frozen)


def test_a_factory_makes_the_inner_optimizer():
    factory = lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9)  # noqa: E731
    optimizer = DeltaLoRAOptimizer(factory, [small_layer()], lr=0.3)
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_refuses_an_inner_class_with_missing_arguments():
    class Needs(torch.optim.SGD):
        def __init__(self, params, lr, horizon):
            super().__init__(params, lr=lr)

    with pytest.raises(
        TypeError, match=r"Needs could not be built .*'horizon'.*keyword arguments of DeltaLoRAOptimizer"
    ):
        DeltaLoRAOptimizer(Needs, [small_layer()], lr=0.1)


@pytest.mark.parametrize("inner", ["AdamW", None, 3])
def test_refuses_an_inner_that_is_no_optimizer(inner):
    with pytest.raises(TypeError, match=r"inner is an optimizer class or a built torch.optim.Optimizer, got a"):
        DeltaLoRAOptimizer(inner, [small_layer()])


def test_refuses_an_inner_factory_that_makes_something_else():
    with pytest.raises(TypeError, match=r"made a dict, which is no torch.optim.Optimizer"):
        DeltaLoRAOptimizer(lambda groups: {}, [small_layer()])


def test_refuses_options_that_a_built_optimizer_would_not_see():
    W, A, B = small_layer()
    inner = torch.optim.SGD([A, B], lr=0.1)
    with pytest.raises(TypeError, match="lr: no effect, because the inner optimizer is already built"):
        DeltaLoRAOptimizer(inner, [(W, A, B)], lr=0.1)
    with pytest.raises(TypeError, match="lr: no effect"):
        DeltaLoRAOptimizer(inner, [{"triples": [(W, A, B)], "lr": 0.1}])
    with pytest.raises(TypeError, match="params: no effect"):
        DeltaLoRAOptimizer(inner, [(W, A, B)], [torch.ones(2, requires_grad=True)])


# Hooks.


def test_hooks_fire_once_and_after_W_moved():
    W, A, B = small_layer()
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [(W, A, B)], lr=0.1)
    frozen, fired = W.clone(), []

    def note(kind):
        return lambda opt, args, kwargs: fired.append((kind, type(opt).__name__, torch.equal(W, frozen)))

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    try:
        optimizer.step()
        name = "DeltaLoRAOptimizer"
        assert fired == [
            ("global pre", name, True),
            ("pre", name, True),
            ("post", name, False),
            ("global post", name, False),
        ]
        fired.clear()
        torch.optim.SGD([torch.ones(1, requires_grad=True)]).step()  # the hooks for every optimizer are back in place
        assert [kind for kind, *_ in fired] == ["global pre", "global post"]
    finally:
        for handle in handles:
            handle.remove()


def test_global_hooks_survive_a_failing_step():
    optimizer, fired = DeltaLoRAOptimizer(torch.optim.AdamW, [small_layer()], lr=0.1), []
    handle = register_optimizer_step_pre_hook(lambda *a: fired.append(1))
    try:
        with pytest.raises(ZeroDivisionError, match="division by zero"):
            optimizer.step(lambda: 1 / 0)
        optimizer.step()
        assert len(fired) == 2
    finally:
        handle.remove()


def test_a_global_hook_registered_within_a_step_stays():
    optimizer, fired, handles = DeltaLoRAOptimizer(torch.optim.AdamW, [small_layer()], lr=0.1), [], []
    optimizer.step(lambda: handles.append(register_optimizer_step_post_hook(lambda *a: fired.append(1))) or 0.0)
    try:
        fired.clear()
        optimizer.step()
        assert fired == [1]
    finally:
        handles[0].remove()


def test_hooks_of_the_inner_optimizer_fire():
    optimizer, fired = DeltaLoRAOptimizer(torch.optim.AdamW, [small_layer()], lr=0.1), []
    optimizer.inner.register_step_post_hook(lambda *a: fired.append(1))
    optimizer.step()
    assert fired == [1]


# Making the inner state exist, as torch.distributed.checkpoint does.


@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_only_makes_the_state_exist_is_not_counted(rule):
    """Step with lr = 0 and zero gradients where the state is empty, as torch.distributed.checkpoint does."""
    run = LayerRun(rule, zero=False)
    before = [t.clone() for t in (*run.tensors, run.scale)]
    for group in run.optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], torch.Tensor) else 0.0
    for factor in run.factors:
        factor.grad = torch.zeros_like(factor)
    run.optimizer.step()
    assert run.optimizer.step_count == 0
    assert len(run.optimizer.state) == 2
    assert all(map(torch.equal, before, (*run.tensors, run.scale)))
    run.optimizer.step()  # the state is there now, so that this is a step of training
    assert run.optimizer.step_count == 1


@pytest.mark.parametrize("given", ["lr", "gradient", "no gradient"])
def test_a_first_step_of_training_is_counted(given):
    """Count it where the learning rate is not 0, a gradient is not, or there is none at all."""
    triple = small_layer()
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [triple], lr=0.1 if given == "lr" else 0.0)
    for factor in triple[1:]:
        factor.grad = None if given == "no gradient" else torch.full_like(factor, float(given == "gradient"))
    optimizer.step()
    assert optimizer.step_count == 1


def test_lists_and_dicts_of_the_inner_optimizer_are_shared():
    model = nn.Linear(6, 4, bias=False).requires_grad_(False)
    triple = LoRATriple((model, "weight"), *small_layer()[1:], name="q")
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [triple], lr=1e-2)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer.inner, torch.optim.AdamW)
    random_steps(optimizer, 1)
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert optimizer.state is optimizer.inner.state
    assert optimizer.defaults is optimizer.inner.defaults
