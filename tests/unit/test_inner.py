"""The inner optimizer: how it is built, which hooks it fires, and when a step only makes its state exist."""

import threading

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
    with pytest.raises(TypeError, match="is already built and does not hold 1 of the 1 other parameters"):
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


def test_hooks_fire_for_other_optimizers_during_a_step():
    """Step another optimizer in another thread while ours evaluates its closure: it finds all hooks in place."""
    optimizer, fired = DeltaLoRAOptimizer(torch.optim.AdamW, [small_layer()], lr=0.1), []
    other = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    handles = [
        register_optimizer_step_pre_hook(lambda opt, *a: fired.append(("pre", opt))),
        register_optimizer_step_post_hook(lambda opt, *a: fired.append(("post", opt))),
    ]

    def closure():
        thread = threading.Thread(target=other.step)
        thread.start()
        thread.join()
        return 0.0

    try:
        optimizer.step(closure)
    finally:
        for handle in handles:
            handle.remove()
    assert fired == [("pre", optimizer), ("pre", other), ("post", other), ("post", optimizer)]


def test_a_scheduler_of_the_inner_optimizer_sees_its_steps():
    """Build a scheduler on the inner optimizer, which wraps its `step`, before the wrapper takes it."""
    W, A, B = small_layer()
    inner, fired = torch.optim.AdamW([A, B], lr=0.1), []
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    optimizer = DeltaLoRAOptimizer(inner, [(W, A, B)])
    handle = register_optimizer_step_post_hook(lambda opt, *a: fired.append(opt))
    try:
        optimizer.step()
    finally:
        handle.remove()
    scheduler.step()  # warns, which is an error here, unless it knows of the step
    assert inner.param_groups[0]["lr"] == 0.05
    assert fired == [optimizer]


def test_a_step_that_was_replaced_is_called():
    """Call what somebody has put in place of the inner optimizer's `step`, on the object or in its class."""
    W, A, B = small_layer()
    inner, called = torch.optim.AdamW([A, B], lr=0.1), []
    optimizer, step = DeltaLoRAOptimizer(inner, [(W, A, B)]), inner.step
    inner.step = lambda *arguments: called.append(1) or step(*arguments)
    before = A.detach().clone()
    optimizer.step()
    assert called == [1]
    assert not torch.equal(A, before)


# Forgetting factors, as a restart has it.


class Wrapping(torch.optim.Optimizer):
    """Steps an optimizer that it holds, and keeps for each parameter how often it stepped."""

    def __init__(self, params, hold=lambda optimizer: optimizer, **options):
        self.held = torch.optim.AdamW(params, **options)
        self.holder, self.steps = hold(self.held), {}
        super().__init__(self.held.param_groups, {})
        self.param_groups = self.held.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.steps[p] = self.steps.get(p, 0) + 1
        return self.held.step(closure)


HOLDS = {
    "attribute": lambda optimizer: optimizer,
    "list": lambda optimizer: [optimizer],
    "dict": lambda optimizer: {"inner": (optimizer,)},
    "wrapper": lambda optimizer: Wrapping([torch.ones(1, requires_grad=True)], lambda _: optimizer),
}


@pytest.mark.parametrize("hold", HOLDS)
def test_a_restart_forgets_the_state_in_nested_optimizers(hold):
    """Restart: the next step has no momentum from before, neither here nor in any optimizer that is held."""
    W, A, B = small_layer()
    head = torch.ones(2, requires_grad=True)
    inner = Wrapping([A, B, head], HOLDS[hold], lr=0.1)
    held = inner.held
    if hold != "attribute":
        del inner.held
        inner.step = held.step
    optimizer = DeltaLoRAOptimizer(inner, [(W, A, B)])
    head.grad = torch.ones(2)
    optimizer.step()
    inner.steps.update(dict.fromkeys((A, B, head), 1))
    inner.itself = inner
    assert set(held.state) == {A, B, head}
    optimizer.restart()
    assert set(held.state) == {head}
    assert list(inner.steps) == [head]


def test_a_step_after_a_restart_is_a_first_step():
    """Compare with a fresh wrapping optimizer on the same factors and gradients."""
    W, A, B = small_layer()
    optimizer = DeltaLoRAOptimizer(Wrapping([A, B], lr=0.1), [(W, A, B)])
    random_steps(optimizer, 3)
    optimizer.restart(generator=torch.Generator().manual_seed(0))
    fresh = [factor.detach().clone().requires_grad_() for factor in (A, B)]
    random_steps(optimizer, 1)
    random_steps(torch.optim.AdamW(fresh, lr=0.1), 1)
    assert torch.equal(A, fresh[0])
    assert torch.equal(B, fresh[1])


@pytest.mark.extra
@pytest.mark.parametrize("rule", RULES)
def test_a_lookahead_inside_restarts_from_the_new_factors(rule):
    """Restart half way to its next interpolation, which then is between the new factors and what follows."""
    library = pytest.importorskip("pytorch_optimizer", reason="runs where pytorch_optimizer is installed")
    run = LayerRun(rule, inner=lambda params, lr: library.Lookahead(torch.optim.SGD(params, lr), k=3)).train(2)
    run.optimizer.restart(generator=torch.Generator().manual_seed(0))
    start = run.stored.B.detach().clone()
    run.train(1)  # the third step of its count
    gradient = run.gradients[-1][1]
    assert torch.allclose(run.stored.B, start - 0.5 * 0.02 * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.extra
@pytest.mark.parametrize("library", ["schedulefree", "pytorch_optimizer"])
@pytest.mark.parametrize("rule", RULES)
def test_a_schedule_free_wrapper_around_is_refused_in_the_second_step(rule, library):
    """In the first one its two points are the same."""
    wrapper = pytest.importorskip(library, reason=f"runs where {library} is installed").ScheduleFreeWrapper
    run = LayerRun(rule, inner=torch.optim.SGD)
    around = wrapper(run.optimizer)
    around.train()
    run.backward()
    around.step()
    run.backward()
    with pytest.raises(
        RuntimeError, match=r"a ScheduleFreeWrapper is around .*DeltaLoRAOptimizer\(AdamWScheduleFree, triples"
    ):
        around.step()
    assert run.optimizer.step_count == 1


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


def test_an_inner_optimizer_without_a_learning_rate_steps():
    """Step one that finds its own learning rate and has None for it, as Adafactor with relative_step."""

    class Relative(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                assert group["lr"] is None
                for p in group["params"]:
                    p.data.sub_(p.grad, alpha=0.1)

    W, A, B = small_layer()
    optimizer = DeltaLoRAOptimizer(Relative, [(W, A, B)], lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    expected = A.detach() - 0.1 * A.grad
    optimizer.step()
    assert torch.equal(A, expected)
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
