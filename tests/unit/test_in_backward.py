"""Optimizers that step within the backward pass are refused: by what they are, what they leave, and what they do."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer
from deltaopt.in_backward import BackwardWatch
from tests.support.compare import refused
from tests.support.small import HandmadeLayer, small_layer
from tests.support.strategies import each_rule

ADAMW = torch.optim.AdamW


def backward(layer: HandmadeLayer) -> None:
    (layer.weight + layer.scaling * layer.A @ layer.B).square().mean().backward()


def optimizer_of(layer: HandmadeLayer, rule: str, **options) -> DeltaLoRAOptimizer:
    return DeltaLoRAOptimizer(ADAMW, [layer.triple()], lr=0.01, weight_update=rule, **options)


def step_by_hooks(factors: list[torch.Tensor], make: Callable = ADAMW) -> None:
    """Train each parameter by an optimizer of its own, as torch's tutorial has it."""
    optimizers = {factor: make([factor], lr=0.01) for factor in factors}

    def hook(factor: torch.Tensor) -> None:
        optimizers[factor].step()
        optimizers[factor].zero_grad()

    for factor in factors:
        factor.register_post_accumulate_grad_hook(hook)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("hooks_first", [False, True])
@each_rule
def test_a_second_step_without_gradients_on_other_factors_raises(rule, hooks_first, fused):
    """A fused optimizer leaves no other trace: it does not count a change of the parameter."""
    layer, make = HandmadeLayer(), lambda params, lr: ADAMW(params, lr=lr, fused=fused)
    if hooks_first:
        step_by_hooks([layer.A, layer.B], make)
    optimizer = optimizer_of(layer, rule)
    if not hooks_first:
        step_by_hooks([layer.A, layer.B], make)
    backward(layer)
    optimizer.step()
    backward(layer)
    message = (
        r"A and B of 1 layer \(q\) changed since the last step, and no factor has a gradient.*let this optimizer alone"
    )
    refused(optimizer.step, RuntimeError, message, kept=lambda: [p.detach() for p in layer.parameters()])
    assert optimizer.step_count == 1


@each_rule
def test_a_hook_that_leaves_the_gradient_is_no_optimizer(rule):
    layer, seen = HandmadeLayer(), []
    for factor in (layer.A, layer.B):
        factor.register_post_accumulate_grad_hook(lambda factor: seen.append(float(factor.grad.norm())))
    optimizer = optimizer_of(layer, rule)
    for _ in range(3):
        optimizer.zero_grad()
        backward(layer)
        optimizer.step()
    assert len(seen) == 6


@each_rule
def test_steps_without_gradients_are_taken_where_nothing_trains(rule):
    """A layer that no input reaches, restarts, loaded states and modes are no optimizer in the backward pass."""
    layer = HandmadeLayer()
    layer.A.register_post_accumulate_grad_hook(lambda factor: None)
    optimizer = optimizer_of(layer, rule)
    events: list[Callable[[], object]] = [
        optimizer.restart,
        optimizer.eval,
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: None,
    ]
    for event in events:
        optimizer.step()
        event()
    optimizer.step()
    assert optimizer.step_count == len(events) + 1


def test_without_hooks_nothing_is_kept():
    W, A, B = small_layer()
    A.grad = B.grad = None
    optimizer, watch = DeltaLoRAOptimizer(ADAMW, [(W, A, B)], lr=0.01), BackwardWatch()
    for weight in optimizer.weights():
        weight.resolve()
    watch.look(optimizer.weights())
    watch.note()
    with torch.no_grad():
        A.add_(1)
    watch.look(optimizer.weights())
    assert not watch._kept


def test_an_inner_optimizer_may_change_factors_without_gradients():
    """One that has its gradients elsewhere, as `main_grad` of an engine, or that evaluates the loss alone."""

    class Elsewhere(ADAMW):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(0.1)

    W, A, B = small_layer()
    A.grad = B.grad = None
    A.register_post_accumulate_grad_hook(lambda p: None)
    optimizer = DeltaLoRAOptimizer(Elsewhere, [(W, A, B)], lr=0.01)
    before, start = W.clone(), (A @ B).detach()
    for _ in range(3):
        optimizer.step()
    torch.testing.assert_close(W, before + 2.0 * ((A @ B).detach() - start))


@each_rule
def test_a_step_within_the_backward_pass_raises(rule):
    layer = HandmadeLayer()
    optimizer = optimizer_of(layer, rule)
    for factor in (layer.A, layer.B):
        factor.register_post_accumulate_grad_hook(lambda factor: optimizer.step())
    message = r"step\(\) was called within a backward pass .* Call it once after the backward pass"
    refused(lambda: backward(layer), RuntimeError, message, kept=lambda: [p.detach() for p in layer.parameters()])
    assert optimizer.step_count == 0


def test_a_closure_may_run_the_backward_pass():
    layer = HandmadeLayer()
    optimizer, before = optimizer_of(layer, "in_place"), layer.weight.clone()

    def closure() -> float:
        optimizer.zero_grad()
        backward(layer)
        return 0.0

    for _ in range(3):
        optimizer.step(closure)
    assert not torch.equal(layer.weight, before)


def apply_in_backward(layer: HandmadeLayer) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(ADAMW, [layer.A, layer.B], {"lr": 0.01})


APPLIED = (
    r"A and B of 1 layer \(q\) have optimizers that step within the backward pass \(_apply_optimizer_in_backward\)"
)


@each_rule
def test_apply_optimizer_in_backward_is_refused_when_the_optimizer_is_built(rule):
    layer = HandmadeLayer()
    apply_in_backward(layer)
    refused(lambda: optimizer_of(layer, rule), ValueError, APPLIED)


@each_rule
def test_apply_optimizer_in_backward_afterwards_is_refused_in_the_first_step(rule):
    layer = HandmadeLayer()
    optimizer = optimizer_of(layer, rule)
    apply_in_backward(layer)
    backward(layer)
    refused(optimizer.step, ValueError, APPLIED)
    assert optimizer.step_count == 0


class OptimizerInBackwardWrapper:
    """torchtune's, as far as it matters: it holds an optimizer for each parameter, and is none itself."""

    def __init__(self, optim_map: dict[str, torch.optim.Optimizer]) -> None:
        self.optim_map = optim_map

    def step(self) -> None: ...


def of_torchtune(layer: HandmadeLayer) -> object:
    return OptimizerInBackwardWrapper({"A": ADAMW([layer.A]), "B": ADAMW([layer.B])})


def of_transformers(layer: HandmadeLayer) -> object:
    library = pytest.importorskip("transformers", reason="runs where transformers is installed")
    optimizers = {factor: ADAMW([factor]) for factor in (layer.A, layer.B)}
    return library.trainer_pt_utils.LayerWiseDummyOptimizer(optimizer_dict=optimizers, lr=0.01)


def lomo(layer: HandmadeLayer) -> object:
    library = pytest.importorskip("pytorch_optimizer", reason="runs where pytorch_optimizer is installed")
    return library.LOMO(layer, lr=0.01)


def adalomo(layer: HandmadeLayer) -> object:
    library = pytest.importorskip("pytorch_optimizer", reason="runs where pytorch_optimizer is installed")
    return library.AdaLOMO(layer, lr=0.01)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (of_torchtune, "OptimizerInBackwardWrapper .*torchtune"),
        pytest.param(of_transformers, "LayerWiseDummyOptimizer .*galore_adamw_layerwise", marks=pytest.mark.extra),
        pytest.param(lomo, "LOMO .*LOMO and AdaLOMO", marks=pytest.mark.extra),
        pytest.param(adalomo, "AdaLOMO .*LOMO and AdaLOMO", marks=pytest.mark.extra),
    ],
)
def test_an_inner_optimizer_that_steps_in_the_backward_pass_is_refused_by_name(make, kind):
    layer = HandmadeLayer()
    inner = make(layer)
    message = rf"the inner {kind}.*step\(\) would find nothing to do, and W would never move. Take an optimizer"
    refused(lambda: DeltaLoRAOptimizer(inner, [layer.triple()]), TypeError, message)
    if isinstance(inner, torch.optim.Optimizer):
        refused(
            lambda: DeltaLoRAOptimizer(type(inner), [layer.triple()], lr=0.01), (TypeError, ValueError), kind.split()[0]
        )


class HostCopies(torch.optim.AdamW):
    """Steps copies of the parameters, as torchao's CPUOffloadOptimizer does with large ones."""

    def __init__(self, params: list[nn.Parameter], **options) -> None:
        super().__init__([nn.Parameter(p.detach().clone()) for p in params], **options)


def test_an_optimizer_of_copies_in_the_memory_of_the_host_is_refused():
    layer = HandmadeLayer()
    inner = HostCopies([layer.A, layer.B], lr=0.01)
    message = r"q: A is not among the parameters of the inner HostCopies"
    refused(lambda: DeltaLoRAOptimizer(inner, [layer.triple()]), ValueError, f"(?s)CPU offload.*{message}")
