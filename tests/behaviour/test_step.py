"""A step of DeltaLoRAOptimizer as torch, its schedulers and its users see it."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support import internals
from tests.support.compare import assert_close, refused, same
from tests.support.runs import LayerRun, assert_follows
from tests.support.small import HandmadeLayer, random_steps, small_layer
from tests.support.strategies import each_rule


def dense_change(before, after):
    """Return the change of the product between two copies of (A, B)."""
    return after[0].double() @ after[1].double() - before[0].double() @ before[1].double()


@each_rule
def test_W_is_in_no_group_and_has_no_state(rule):
    run = LayerRun(rule).train(2)
    W = run.stored.W
    assert all(p is not W for group in run.optimizer.param_groups for p in group["params"])
    assert W not in run.optimizer.state
    assert W.grad is None


@pytest.mark.parametrize("start_step", [0, 1, 4])
@each_rule
def test_the_first_K_steps_leave_W_and_its_branch_alone(rule, start_step):
    run = LayerRun(rule, zero=False, start_step=start_step).train(start_step)
    assert torch.equal(run.stored.W, run.W0)
    assert float(run.scale) == run.scaling
    assert run.optimizer.step_count == start_step
    run.train(1)
    assert not torch.equal(run.stored.W, run.W0)
    assert float(run.moved().norm()) > 1e-3


def test_a_callable_update_ratio_gets_the_number_of_the_step():
    asked = []

    def ratio(step):
        asked.append(step)
        return 0.0 if step == 3 else 0.5 * step

    W, A, B = small_layer()
    optimizer = DeltaLoRAOptimizer(
        torch.optim.SGD, [(W, A, B), small_layer(seed=1)], lr=0.1, update_ratio=ratio, start_step=1
    )
    for t in range(5):
        before = [x.detach().clone() for x in (W, A, B)]
        optimizer.step()
        coef = 0.0 if t in (0, 3) else 0.5 * t
        expected = before[0].double() + coef * dense_change(before[1:], (A.detach(), B.detach()))
        assert torch.allclose(W.double(), expected, atol=1e-6)
        assert torch.equal(W, before[0]) == (coef == 0.0)
    assert asked == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_callable_update_ratio_is_checked_before_anything_changes(value):
    W, A, B = small_layer()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=0.1, update_ratio=lambda step: value)
    refused(
        optimizer.step,
        ValueError,
        r"update_ratio\(0\) must be finite and not negative",
        kept=lambda: ([t.detach() for t in (W, A, B)], optimizer.step_count),
    )


def all_of(run):
    """Return what a refused event must leave alone."""
    optimizer = run.optimizer
    inner = [optimizer.state.get(factor) for factor in run.factors]
    return run.tensors, run.scale, optimizer.step_count, inner, optimizer.state_dict()


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), None, True, "2"])
def test_a_ratio_that_turns_bad_in_mid_run_is_refused_until_it_is_mended(value):
    """A callable that fails at step 5; the run then ends where one without the fault does."""
    given = {5: value}
    run = LayerRun(update_ratio=lambda step: given.get(step, 2.0)).train(5)
    whole = LayerRun(update_ratio=lambda step: 2.0).train(5)
    run.backward()
    message = r"update_ratio\(5\) (must be finite and not negative|is a number)"
    for event in (run.optimizer.step, lambda: run.optimizer.step(run.closure), run.optimizer.resync):
        refused(event, (ValueError, TypeError), message, kept=lambda: all_of(run))
    given.clear()
    for r in (run, whole):
        r.train(3)
    assert same(all_of(run), all_of(whole))


def test_a_bad_ratio_of_one_group_leaves_the_others_alone():
    layers = [small_layer(seed=seed) for seed in range(2)]
    ratios = [lambda step: 2.0, lambda step: -1.0 if step == 2 else 2.0]
    groups = [{"triples": [layer], "update_ratio": ratio} for layer, ratio in zip(layers, ratios, strict=True)]
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, groups, lr=0.1)
    for _ in range(2):
        optimizer.step()
    tensors = [tensor.detach() for layer in layers for tensor in layer]
    refused(
        optimizer.step, ValueError, r"update_ratio\(2\) must be", kept=lambda: (tensors, optimizer.inner.state_dict())
    )


@each_rule
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_bad_ratio_that_is_set_in_mid_run_is_refused_and_the_run_continues(rule, value):
    run, whole = (LayerRun(rule).train(5) for _ in range(2))
    (group,) = run.optimizer.groups
    refused(
        lambda: setattr(group, "update_ratio", value),
        ValueError,
        "update_ratio must be finite and not negative",
        kept=lambda: (group.update_ratio, *all_of(run)),
    )
    for r in (run, whole):
        r.train(3)
    assert same(all_of(run), all_of(whole))


@each_rule
def test_a_closure_is_evaluated_once_and_its_value_returned(rule):
    run, calls = LayerRun(rule, start_step=1), []

    def closure():
        calls.append(torch.is_grad_enabled())
        return run.closure()

    for t in range(4):
        run.t = t
        expected = run.loss(run.effective(), t).detach()
        loss = run.optimizer.step(closure)
        assert calls == [True] * (t + 1)
        assert loss.requires_grad
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    assert run.optimizer.step() is None
    assert len(calls) == 4


@pytest.mark.parametrize("start_step", [0, 2])
@each_rule
def test_by_a_closure_and_without_one_is_the_same(rule, start_step):
    by_closure, plain = (LayerRun(rule, zero=False, start_step=start_step) for _ in range(2))
    by_closure.train(5, by_closure=True)
    plain.train(5)
    for now, expected in zip(by_closure.tensors, plain.tensors, strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(by_closure.scale, plain.scale)


@each_rule
def test_zero_grad(rule):
    run = LayerRun(rule, zero=False).train(2)
    assert all(float(factor.grad.abs().sum()) > 0 for factor in run.factors)
    run.optimizer.zero_grad(set_to_none=False)
    assert all(float(factor.grad.abs().sum()) == 0 for factor in run.factors)
    run.optimizer.zero_grad()
    assert all(factor.grad is None for factor in run.factors)


@each_rule
def test_a_failing_inner_step_keeps_the_effective_weight_and_the_count(rule):
    run = LayerRun(rule, zero=False)
    run.backward()

    def closure():
        raise KeyError("data ran out")

    before = run.effective().detach().clone()
    with pytest.raises(KeyError, match="data ran out"):
        run.optimizer.step(closure)
    torch.testing.assert_close(run.effective().detach(), before, rtol=1e-14, atol=1e-14)
    assert run.optimizer.step_count == 0
    run.train(1)
    assert not torch.equal(run.stored.W, run.W0)
    torch.testing.assert_close(run.moved(), 2.0 * run.scaling * (run.product() - run.start))


LR_SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 / (1 + t)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=2, cycle_momentum=False),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.5, anneal_epochs=3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_schedulers_reach_the_inner_optimizer(name):
    """Compare with the inner optimizer alone; warnings about the order of calls are errors here."""
    wrapped, plain = small_layer(), small_layer()
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [wrapped], lr=0.1)
    control = torch.optim.AdamW(plain[1:], lr=0.1)
    rates = []
    for opt in (optimizer, control):
        scheduler = LR_SCHEDULERS[name](opt)
        seen = []
        for _ in range(5):
            random_steps(opt)
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
            seen.append(opt.param_groups[0]["lr"])
        rates.append(seen)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    assert optimizer.inner.param_groups[0]["lr"] == rates[0][-1]
    assert torch.equal(wrapped[1], plain[1])


def test_a_scheduler_of_the_inner_optimizer_keeps_working():
    inner = torch.optim.AdamW((triple := small_layer())[1:], lr=0.1)
    scheduler = lr_scheduler.StepLR(inner, 1, gamma=0.5)
    optimizer = DeltaLoRAOptimizer(inner, [triple])
    random_steps(optimizer)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


# Copies.

by_deepcopy_and_pickle = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))], ids=["deepcopy", "pickle"]
)


def trains(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))
        (x @ (model.weight + model.scaling * model.A @ model.B).mT).square().mean().backward()
        optimizer.step()


@by_deepcopy_and_pickle
@each_rule
@pytest.mark.filterwarnings("ignore:backward hook .* on tensor will not be serialized:UserWarning")
def test_copies_with_their_model_continue_alike(rule, copied):
    model = HandmadeLayer()
    W0 = model.weight.clone()
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [model.triple()], lr=0.1, start_step=1, weight_update=rule)
    trains(model, optimizer, 3)
    twin_model, twin = copied((model, optimizer))
    assert twin.triples[0].W is twin_model.weight
    assert twin.triples[0].W is not model.weight
    assert twin.step_count == 3
    for m, opt in ((model, optimizer), (twin_model, twin)):
        trains(m, opt, 3)
    assert all(map(torch.equal, model.parameters(), twin_model.parameters()))
    assert model.scaling == twin_model.scaling
    assert not torch.equal(model.weight, W0)


@by_deepcopy_and_pickle
@each_rule
@pytest.mark.filterwarnings("ignore:backward hook .* on tensor will not be serialized:UserWarning")
def test_copies_of_tensors_continue_alike(rule, copied):
    run = LayerRun(rule, zero=False, start_step=2).train(5)
    twin = copy.copy(run)
    parts = copied((run.stored, run.scale, run.triple, run.optimizer))
    twin.stored, twin.scale, twin.triple, twin.optimizer = parts
    twin.gradients = list(run.gradients)
    for r in (run, twin):
        r.train(4)
    assert twin.stored.A is not run.stored.A
    assert all(map(torch.equal, run.tensors, twin.tensors))
    assert torch.equal(run.scale, twin.scale)
    assert_follows(twin, run, 0.0)


def test_a_model_that_holds_its_optimizer_can_be_copied():
    model = HandmadeLayer()
    model.optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [model.triple()], lr=0.1)
    twin = copy.deepcopy(model)
    trains(twin, twin.optimizer, 1)
    assert twin.optimizer.triples[0].W is twin.weight
    assert not torch.equal(twin.weight, model.weight)


@each_rule
def test_a_copy_alone_does_not_touch_the_original(rule):
    run = LayerRun(rule, zero=False).train(2)
    before = [t.clone() for t in (*run.tensors, run.scale)]
    twin = copy.deepcopy(run)
    twin.train(2)
    assert all(map(torch.equal, before, (*run.tensors, run.scale)))
    assert not torch.equal(twin.stored.A, run.stored.A)


def test_repr_names_the_triples_and_the_inner_optimizer():
    text = repr(DeltaLoRAOptimizer(torch.optim.AdamW, [small_layer()], lr=0.1, update_ratio=0.5, start_step=7))
    assert "Triples 0: 1, update_ratio=0.5, start_step=7" in text
    assert "AdamW (" in text


# Precision.


def test_the_delta_is_computed_without_autocast_and_in_full_precision(monkeypatch):
    """Look at the settings themselves: this CPU may give the same bits either way."""
    seen = []
    note = lambda *_: seen.append((torch.is_autocast_enabled("cpu"), torch.backends.mkldnn.matmul.fp32_precision))  # noqa: E731
    internals.note_products(monkeypatch, note)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [small_layer()], lr=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step()
    torch.backends.fp32_precision = "bf16"
    try:
        optimizer.step()
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # still taken from above
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        optimizer.step()
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # set for itself
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "none"
    assert [autocast for autocast, _ in seen] == [False] * 3
    assert seen[1][1] == seen[2][1] == "ieee"


@each_rule
def test_inside_autocast_the_delta_stays_in_float32(rule):
    plain, cast = (LayerRun(rule, zero=False, dtype=torch.float32) for _ in range(2))
    for run, enabled in ((plain, False), (cast, True)):
        for _ in range(2):
            run.backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                run.step()
    assert all(map(torch.equal, plain.tensors, cast.tensors))
    assert not torch.equal(cast.stored.W, cast.W0)


def test_low_matmul_precision_does_not_reach_the_delta_and_is_put_back():
    exact, low = (small_layer(c=768, d=768, r=8) for _ in range(2))
    random_steps(DeltaLoRAOptimizer(torch.optim.SGD, [exact], lr=0.1), 2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        random_steps(DeltaLoRAOptimizer(torch.optim.SGD, [low], lr=0.1), 2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(exact[0], low[0])


def test_an_update_between_forward_and_backward_is_an_error_of_autograd():
    """Let autograd see the in-place update; through `.data` it would give wrong gradients silently."""
    W, A, B = small_layer()
    x = torch.randn(3, 4, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=0.1)
    loss = (x @ W).square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_rule
def test_no_warning_in_a_plain_run(rule):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LayerRun(rule).train(3).optimizer.step_count == 3


@each_rule
def test_a_compiled_step_moves_W_as_the_eager_one(rule):
    eager, compiled = (LayerRun(rule, zero=False, dtype=torch.float32, inner=torch.optim.SGD) for _ in range(2))
    torch.compiler.reset()
    step = torch.compile(compiled.optimizer.step, backend="eager")
    for _ in range(3):
        for run, do in ((eager, eager.optimizer.step), (compiled, step)):
            run.backward()
            do()
            run.t += 1
    assert torch.allclose(eager.effective(), compiled.effective(), atol=1e-6)
    assert torch.allclose(eager.stored.W, compiled.stored.W, atol=1e-6)
    assert not torch.allclose(eager.stored.W, eager.W0, atol=1e-3)
    assert compiled.optimizer.step_count == 3


@pytest.mark.filterwarnings("ignore:.* changed between two steps:UserWarning")
def test_a_factor_that_shrinks_in_place_gets_other_buffers():
    W, A, B = small_layer()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=0.1)
    for rank in (2, 1):
        A.data, B.data = A.data[:, :rank], B.data[:rank]
        A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
        before = W.clone(), (A @ B).detach()
        optimizer.step()
        assert torch.allclose(W - before[0], 2.0 * ((A @ B).detach() - before[1]), atol=1e-5)


def test_a_model_is_trained_through_its_parameters():
    """Move the W of a module that is looked up, not the tensor that was there when the optimizer was built."""
    model = HandmadeLayer()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [model.triple()], lr=0.1)
    trains(model, optimizer, 1)
    old = model.weight
    model.weight = nn.Parameter(old.detach().clone(), requires_grad=False)
    kept = old.clone()
    trains(model, optimizer, 2)
    assert torch.equal(old, kept)
    assert not torch.equal(model.weight, kept)
    assert isinstance(optimizer.triples[0], LoRATriple)


def test_a_setting_that_is_changed_within_a_step_is_for_the_next_one():
    """The ratio of a step is that of its start, for W and for the ledger, whatever a closure does."""
    run = LayerRun(zero=False, dtype=torch.float64).train(1)
    before, ratio = run.product(), run.optimizer.groups[0].update_ratio

    def closure():
        run.optimizer.groups[0].update_ratio = 3 * ratio
        run.optimizer.resync()
        run.optimizer.zero_grad()
        return run.closure()

    W = run.stored.matrices()[0]
    run.optimizer.step(closure)
    expected = ratio * run.scaling * (run.product() - before)
    assert_close(run.stored.matrices()[0] - W, expected, 1e-12)
    assert_close(run.displacement(), run.moved(), 1e-12)
