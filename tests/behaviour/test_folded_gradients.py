"""The folded rule divides what reaches A and B: closures, hooks, copies, and more than one optimizer."""

import copy
import gc

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support import internals, strategies
from tests.support.compare import COPIES, refused, same
from tests.support.folded import (
    CallsTwice,
    HoldsItsOptimizer,
    folded_optimizer,
    in_place_and_folded,
    linear_layer,
    warns_of_a_takeover,
)
from tests.support.runs import LayerRun, assert_follows
from tests.support.strategies import each_rule


def test_gradients_that_are_asked_for_are_divided_too():
    in_place, folded = in_place_and_folded(3)
    found = [torch.autograd.grad(r.loss(r.effective(), 0), r.factors) for r in (folded, in_place)]
    for now, expected in zip(*found, strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-10, atol=1e-12)


def test_gradients_that_are_not_zeroed_continue_through_step_K():
    in_place, folded = in_place_and_folded(start_step=2, zero=False)
    for run in (in_place, folded):
        for t in range(6):
            run.loss(run.effective(), t).backward()
            run.optimizer.step()
    assert_follows(folded, in_place)


def test_gradients_within_base_weights_are_those_of_the_branch_there():
    in_place, folded = in_place_and_folded(3)
    for run in (in_place, folded):
        with run.optimizer.base_weights():
            run.backward()
    for now, expected in zip(folded.gradients[-1], in_place.gradients[-1], strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-10, atol=1e-12)
    for run in (in_place, folded):
        run.train(2)
    assert_follows(folded, in_place)


def test_before_step_K_gradients_may_be_differentiated_again():
    run = LayerRun("folded", start_step=9).train(1)
    grads = torch.autograd.grad(run.loss(run.effective(), 0), run.factors, create_graph=True)
    assert all(grad.requires_grad for grad in grads)


@pytest.mark.parametrize("zero", [True, False])
def test_from_step_K_on_a_second_derivative_is_refused(zero):
    """It has a part that is 1 + update_ratio times as large and a part that is not."""
    run = LayerRun("folded", zero=zero).train(1)
    refused(
        lambda: torch.autograd.grad(run.loss(run.effective(), 1), run.factors, create_graph=True),
        RuntimeError,
        r"^q: A: a second derivative through its gradient \(create_graph=True\) .*weight_update=\"in_place\"",
        lambda: [*run.tensors, float(run.scale)],
    )
    run.train(1)
    assert run.optimizer.step_count == 2


def test_an_optimizer_that_looks_elsewhere_within_a_step_is_refused():
    run = LayerRun("folded", inner=CallsTwice, start_step=2)

    def closure():
        run.backward()
        return 0.0

    run.optimizer.step(closure)
    run.optimizer.step(closure)  # nothing is folded before step K, so nothing differs
    with pytest.raises(RuntimeError, match=r"called the closure a second time within a step.*weight_update=\"in_pl"):
        run.optimizer.step(closure)


def test_a_second_closure_call_is_refused_where_one_layer_is_folded():
    triples = [linear_layer(name, i)[2] for i, name in enumerate("ab")]
    groups = [{"triples": triples[:1]}, {"triples": triples[1:], "update_ratio": 0.0}]
    optimizer = DeltaLoRAOptimizer(CallsTwice, groups, lr=0.1, weight_update="folded")
    with pytest.raises(RuntimeError, match="called the closure a second time within a step"):
        optimizer.step(lambda: 0.0)


class Sharpness(torch.optim.SGD):
    """SAM as it is usually written: from gradients that are there it goes uphill, asks once, and comes back."""

    @torch.no_grad()
    def step(self, closure):
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        old = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(p.grad, alpha=0.1)
        with torch.enable_grad():
            loss = closure()
        for p, kept in zip(parameters, old, strict=True):
            p.copy_(kept)
        super().step()
        return loss


def test_a_closure_that_is_called_elsewhere_is_refused():
    run = LayerRun("folded", inner=Sharpness, lr=0.01)
    run.backward()
    match = (
        r"the inner optimizer has called the closure after it had changed A or B of q within a step.*load a checkpoint"
    )
    with pytest.raises(RuntimeError, match=match):
        run.optimizer.step(lambda: pytest.fail("it was evaluated"))
    in_place = LayerRun("in_place", inner=Sharpness, lr=0.01)
    in_place.backward()
    in_place.optimizer.step(in_place.backward)  # W stays, as it should


def test_gradients_that_come_past_the_hooks_are_refused():
    """torch.func.grad makes them so, and engines that copy gradients from other tensors: nothing divides those."""
    run = LayerRun("folded", zero=True)

    def loss(A, B):
        return run.loss(run.stored.W + run.scale * (A @ B), run.t)

    def step():
        for factor, grad in zip(run.factors, torch.func.grad(loss, (0, 1))(*run.factors), strict=True):
            factor.grad = grad.detach()
        run.optimizer.step()
        run.t += 1

    step()  # these gradients were made before the ratio was folded, and are whole
    refused(
        step,
        RuntimeError,
        r"q: its gradients did not come through backward\(\).*not divided",
        lambda: [*run.tensors, float(run.scale), run.optimizer.step_count],
    )
    assert run.optimizer.step_count == 1


class Unasked(torch.optim.SGD):
    """Moves the factors without gradients, as zeroth-order optimizers do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(group["lr"])


def test_gradients_that_come_past_one_hook_are_refused():
    """Though those of other layers came through theirs."""
    layers = [linear_layer(name, seed) for seed, name in enumerate("ab")]
    optimizer = folded_optimizer(*(triple for *_, triple in layers))

    def step():
        optimizer.zero_grad()
        (a, scale, _), (b, *_) = layers
        (a.W + scale * a.A @ a.B).square().sum().backward()
        b.A.grad, b.B.grad = torch.ones_like(b.A), torch.ones_like(b.B)
        optimizer.step()

    step()
    refused(step, RuntimeError, r"^b: its gradients did not come through backward\(\)", lambda: layers[0][0].A.detach())


@pytest.mark.parametrize(("mark", "value"), [("grad_sample", torch.ones(1)), ("grad_added_to_main_grad", True)])
def test_gradients_that_are_made_without_the_hooks_are_refused(mark, value):
    """By what libraries leave on a factor which make them within the backward pass: Opacus, Megatron's fused ones."""
    run = LayerRun("folded").train(1)
    run.backward()
    setattr(run.stored.B, mark, value)
    with pytest.raises(
        RuntimeError, match=r"q: its gradients .*per-sample gradients, .*main_grad .*nothing was changed"
    ):
        run.optimizer.step()
    delattr(run.stored.B, mark)
    run.train(1)


@pytest.mark.parametrize("registered", ["tensors", "modules"])
@pytest.mark.parametrize("start", [0, 2])
def test_an_inner_optimizer_that_needs_no_gradients_is_refused(registered, start):
    stored = strategies.make("linear", zero_A=True)
    holder = nn.Module()
    holder.W, holder.A, holder.B = (nn.Parameter(t, t.requires_grad) for t in (stored.W, stored.A, stored.B))
    holder.s = 0.5
    triple = LoRATriple(holder.W, holder.A, holder.B, scaling=(holder, "s"), name="q")
    if registered == "modules":
        triple = LoRATriple((holder, "W"), (holder, "A"), (holder, "B"), scaling=(holder, "s"), name="q")
    optimizer = DeltaLoRAOptimizer(Unasked, [triple], lr=0.1, weight_update="folded", start_step=start)
    for _ in range(start):
        optimizer.step()  # nothing is to be folded yet
    with pytest.raises(RuntimeError, match="q: the inner optimizer has changed its A and B, which got no gradients"):
        optimizer.step()


@pytest.mark.parametrize("start", [0, 2])
def test_gradients_that_are_kept_elsewhere_are_divided(start):
    """As engines do that accumulate in float32: a hook takes the gradient into `main_grad`, and `.grad` is None."""

    class Main(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = p.main_grad
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = p.main_grad = None

    def take(p):
        p.main_grad, p.grad = p.grad, None

    runs = (
        in_place_and_folded(inner=torch.optim.SGD, start_step=start),
        in_place_and_folded(inner=Main, start_step=start),
    )
    for run in runs[1]:
        for p in run.factors:
            p.register_post_accumulate_grad_hook(take)
    for run in (*runs[0], *runs[1]):
        for t in range(5):
            run.optimizer.zero_grad()
            run.loss(run.effective(), t).backward()
            run.optimizer.step()
    assert float(runs[1][1].scale) == 1.5
    assert_follows(runs[1][1], runs[0][0])


@pytest.mark.parametrize("way", COPIES)
@each_rule
@pytest.mark.filterwarnings("ignore:backward hook .* on tensor will not be serialized:UserWarning")
def test_a_copy_continues_as_the_original_and_apart_from_it(rule, way):
    run = LayerRun(rule, start_step=2, zero=False).train(5)
    twin, before = COPIES[way](run), [t.clone() for t in run.tensors]
    twin.train(4)
    assert all(map(torch.equal, run.tensors, before))
    run.train(4)
    assert all(map(torch.equal, run.tensors, twin.tensors))
    assert same(run.optimizer.state_dict(), twin.optimizer.state_dict())
    assert float(run.scale) == float(twin.scale)


def test_gradients_from_before_a_copy_knew_of_its_factors_are_refused():
    """Where the copy could not be told at once: its module was not complete."""
    model = HoldsItsOptimizer()
    model.backward()
    model.optimizer.step()
    twin = copy.deepcopy(model)
    assert twin.scaling == 1.5
    for m in (model, twin):
        m.optimizer.zero_grad()
        m.backward()
    torch.testing.assert_close(twin.A.grad, model.A.grad)
    internals.forget_hooks(twin.optimizer, twin.A)
    with pytest.raises(
        RuntimeError, match=r"q: the gradient of its A .*no hook on it.* optimizer\.zero_grad\(\) first"
    ):
        twin.optimizer.step()
    twin.optimizer.zero_grad()
    twin.optimizer.step()


def test_gradients_of_a_copy_from_before_step_K_are_taken():
    """Nothing is to be divided by yet, and the step that folds divides what comes after it."""
    model = HoldsItsOptimizer()
    twin = copy.deepcopy(model)
    for m in (model, twin):
        for _ in range(2):
            m.backward()
            m.optimizer.step()
    assert twin.scaling == 1.5
    assert torch.equal(twin.A, model.A)


def test_a_copy_keeps_its_divided_gradients():
    """Plain tensors take theirs along."""
    run = LayerRun("folded").train(2)
    run.backward()
    A, optimizer = copy.deepcopy((run.stored.A, run.optimizer))
    assert A.grad is not None
    optimizer.state_dict()
    optimizer.step()
    run.optimizer.step()
    assert torch.equal(A, run.stored.A)


def test_a_copy_with_gradients_of_zero_is_not_refused():
    """As `model.zero_grad(set_to_none=False)` leaves them."""
    model = HoldsItsOptimizer()
    (model.W + model.scaling * model.A @ model.B).square().sum().backward()
    model.optimizer.step()
    twin = copy.deepcopy(model)
    twin.A.grad, twin.B.grad = torch.zeros_like(twin.A), torch.zeros_like(twin.B)
    twin.optimizer.step()
    assert torch.equal(twin.A, model.A)


def test_a_converted_model_keeps_its_hooks():
    runs = [HoldsItsOptimizer(), HoldsItsOptimizer("in_place")]
    for model in runs:
        model.backward()
        model.optimizer.step()
        model.optimizer.zero_grad()
        model.double()
        model.backward()
    for factor, expected in zip((runs[0].A, runs[0].B), (runs[1].A, runs[1].B), strict=True):
        assert factor.dtype == torch.float64
        torch.testing.assert_close(factor.grad, expected.grad, rtol=1e-5, atol=1e-5)


def test_a_conversion_that_would_lose_the_hooks_is_refused(monkeypatch):
    """By torch itself, which then exchanges the inside of parameters: without this, gradients would be undivided."""
    model = HoldsItsOptimizer()
    model.backward()
    model.optimizer.step()
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    with pytest.raises(RuntimeError, match="Couldn't swap"):
        model.double()
    monkeypatch.undo()
    model.optimizer.zero_grad()
    model.backward()
    grad = model.A.grad
    model.optimizer = None
    gc.collect()
    model.A.grad = None
    model.backward()
    torch.testing.assert_close(model.A.grad, 3 * grad)


def test_a_later_optimizer_takes_the_factors_over():
    """It begins with the scaling that it finds, and divides by its own ratio alone."""
    run = LayerRun("folded").train(3)
    twin, first = run.twin(scaling=1.5, load=False), run.optimizer
    run.triple = run.new_triple()
    with warns_of_a_takeover():
        run.optimizer = run.new_optimizer()
    for r in (run, twin):
        r.gradients = []
        r.train(4)
    assert float(run.scale) == 1.5 * 3
    assert_follows(run, twin)
    with pytest.raises(RuntimeError, match="q: its scaling was"):
        first.step()


@pytest.mark.parametrize("mode", ["folded", "in_place"])
def test_an_optimizer_whose_factors_were_taken_over_does_not_step(mode):
    """Not at the second attempt either: the gradients are whole, or divided for the other one."""
    run = LayerRun("folded").train(2)
    triple = run.new_triple()
    with warns_of_a_takeover():
        other = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update=mode)
    before = [p.detach().clone() for p in run.factors]
    for _ in range(2):
        run.backward()
        with pytest.raises(RuntimeError, match="q: another optimizer was built on its A since"):
            run.optimizer.step()
    assert all(map(torch.equal, run.factors, before))
    del other, triple
    gc.collect()
    if mode == "folded":
        match = "q: the gradient of its A was made while .* another optimizer had it"  # which is gone
        with pytest.raises(RuntimeError, match=match):
            run.optimizer.step()
        run.train(1)


def test_factors_that_were_taken_back_may_be_taken_over_again():
    run = LayerRun("folded").train(2)
    for _ in range(2):
        triple = run.new_triple()
        with warns_of_a_takeover():
            other = folded_optimizer(triple)
        run.backward()
        with pytest.raises(RuntimeError, match="q: another optimizer was built on its A since"):
            run.optimizer.step()
        del other, triple
        gc.collect()
        run.train(1)


@pytest.mark.parametrize("fate", ["could not be built", "is gone"])
def test_an_optimizer_in_place_that_is_no_more_leaves_the_first_one_alone(fate):
    in_place, folded = in_place_and_folded(2)
    triple = folded.new_triple()
    if fate == "could not be built":
        with pytest.raises(ValueError, match="A is not among the parameters"):
            DeltaLoRAOptimizer(torch.optim.SGD([folded.stored.B], lr=0.1), [triple])
    else:
        with warns_of_a_takeover():
            DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
        gc.collect()
    for run in (in_place, folded):
        run.train(2)
    assert_follows(folded, in_place)


def test_a_group_that_is_added_takes_its_factors_over():
    run, (*_, triple) = LayerRun("folded", start_step=9).train(1), linear_layer("k", 1)
    optimizer = folded_optimizer(triple)
    taken = run.new_triple()
    optimizer.add_param_group({"triples": [taken], "start_step": 9})
    run.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="q: another optimizer was built on its A since"):
        run.optimizer.step()


def test_a_group_that_is_added_in_place_gets_whole_gradients():
    run, (*_, triple) = LayerRun("folded").train(2), linear_layer("k", 1)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
    run.backward()
    taken = run.new_triple()
    with warns_of_a_takeover():
        optimizer.add_param_group({"triples": [taken]})
    run.backward()
    for divided, whole in zip(*run.gradients[-2:], strict=True):
        torch.testing.assert_close(whole, divided * 3)


def test_released_factors_have_whole_gradients_until_they_are_taken_again():
    run = LayerRun("folded").train(2)
    run.backward()
    divided = run.gradients[-1]
    run.optimizer.release()
    for p in run.factors:
        p.grad = None
    run.loss(run.effective(), run.t).backward()
    for p, grad in zip(run.factors, divided, strict=True):
        torch.testing.assert_close(p.grad, 3 * grad)
    with pytest.raises(RuntimeError, match="q: the gradient of its A was made while this optimizer had no hook on it"):
        run.optimizer.step()
    run.backward()
    for now, grad in zip(run.gradients[-1], divided, strict=True):
        torch.testing.assert_close(now, grad)
    assert run.scale == 1.5
    LayerRun("in_place").train(1).optimizer.release()


def test_without_its_optimizer_a_gradient_is_what_autograd_makes():
    run = LayerRun("folded").train(2)
    run.backward()
    divided = run.gradients[-1]
    run.optimizer = run.triple = None
    gc.collect()
    for p in run.factors:
        p.grad = None
    run.loss(run.effective(), run.t).backward()
    for p, expected in zip(run.factors, divided, strict=True):
        torch.testing.assert_close(p.grad, 3 * expected)
