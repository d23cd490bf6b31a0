"""DeltaLoRAOptimizer as a torch optimizer: construction, steps, hooks, schedulers, copies, groups."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support import strategies

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD


def layer(c=4, d=6, r=2, seed=0, zero_A=False):
    """(W, A, B) with gradients on A and B."""
    generator = torch.Generator().manual_seed(seed)
    W, A, B = (torch.randn(s, generator=generator) for s in ((c, d), (c, r), (r, d)))
    if zero_A:
        A.zero_()
    A.requires_grad_()
    B.requires_grad_()
    A.grad, B.grad = (torch.randn(t.shape, generator=generator) for t in (A, B))
    return W, A, B


def steps(optimizer, count, seed=0):
    """`count` steps on random gradients for everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()


def expected_W(W, A, B, A_new, B_new, coef):
    W, A, B, A_new, B_new = (t.detach().double() for t in (W, A, B, A_new, B_new))
    return W + coef * (A_new @ B_new - A @ B)


def test_is_a_torch_optimizer():
    optimizer = DeltaLoRAOptimizer(AdamW, [layer()], lr=1e-2)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer.inner, AdamW)
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert optimizer.state is optimizer.inner.state
    assert optimizer.defaults is optimizer.inner.defaults


def test_W_is_in_no_group_and_has_no_state():
    W, A, B = layer()
    optimizer = DeltaLoRAOptimizer(AdamW, [(W, A, B)], lr=1e-2)
    steps(optimizer, 2)
    assert all(p is not W for group in optimizer.param_groups for p in group["params"])
    assert W not in optimizer.state
    assert W.grad is None


def test_a_built_inner_optimizer():
    W, A, B = layer()
    inner = AdamW([{"params": [A], "lr": 1e-2}, {"params": [B], "lr": 1e-3}])
    optimizer = DeltaLoRAOptimizer(inner, [LoRATriple(W, A, B, scaling=0.5)], update_ratio=3.0)
    before = [t.detach().clone() for t in (W, A, B)]
    optimizer.step()
    assert optimizer.inner is inner
    assert torch.allclose(W.double(), expected_W(*before, A, B, 1.5), atol=1e-6)


def test_a_factory_of_inner_optimizers():
    optimizer = DeltaLoRAOptimizer(lambda params, lr: SGD(params, lr=lr, momentum=0.9), [layer()], lr=0.3)
    assert optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("start_step", [0, 1, 4])
def test_the_first_K_calls_leave_W_alone(start_step):
    W, A, B = layer()
    optimizer = DeltaLoRAOptimizer(SGD, [(W, A, B)], lr=0.1, start_step=start_step)
    frozen = W.clone()
    steps(optimizer, start_step)
    assert torch.equal(W, frozen)
    assert optimizer.step_count == start_step
    steps(optimizer, 1)
    assert not torch.equal(W, frozen)


def test_a_callable_update_ratio_gets_the_number_of_the_step():
    asked = []

    def ratio(step):
        asked.append(step)
        return 0.0 if step == 3 else 0.5 * step

    W, A, B = layer()
    optimizer = DeltaLoRAOptimizer(SGD, [(W, A, B), layer(seed=1)], lr=0.1, update_ratio=ratio, start_step=1)
    for t in range(5):
        before = [x.detach().clone() for x in (W, A, B)]
        optimizer.step()
        coef = 0.0 if t in (0, 3) else 0.5 * t
        assert torch.allclose(W.double(), expected_W(*before, A, B, coef), atol=1e-6)
        assert torch.equal(W, before[0]) == (coef == 0.0)
    assert asked == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_callable_update_ratio_is_checked_before_anything_changes(value):
    W, A, B = layer()
    optimizer = DeltaLoRAOptimizer(SGD, [(W, A, B)], lr=0.1, update_ratio=lambda step: value)
    before = [t.detach().clone() for t in (W, A, B)]
    with pytest.raises(ValueError, match=r"update_ratio\(0\) must be finite and not negative"):
        optimizer.step()
    assert all(map(torch.equal, before, (W, A, B)))
    assert optimizer.step_count == 0


def test_groups_have_their_own_settings():
    first, second = layer(seed=1), layer(seed=2)
    optimizer = DeltaLoRAOptimizer(
        SGD,
        [
            {"triples": [first], "lr": 0.1, "update_ratio": 1.0, "scaling": 0.5},
            {"triples": [second], "lr": 0.2, "start_step": 1},
        ],
        update_ratio=2.0,
        lr=0.9,
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert [t.name for t in optimizer.triples] == ["triple0", "triple1"]
    before = [t.detach().clone() for t in (*first, *second)]
    optimizer.step()
    assert torch.allclose(first[0].double(), expected_W(*before[:3], *first[1:], 0.5), atol=1e-6)
    assert torch.equal(second[0], before[3])
    middle = [t.detach().clone() for t in second]
    optimizer.step()
    assert torch.allclose(second[0].double(), expected_W(*middle, *second[1:], 2.0), atol=1e-6)


@pytest.mark.parametrize(
    ("attribute", "value", "error"),
    [
        ("update_ratio", -1.0, ValueError),
        ("update_ratio", float("nan"), ValueError),
        ("update_ratio", float("inf"), ValueError),
        ("update_ratio", "2", TypeError),
        ("start_step", -1, ValueError),
        ("start_step", 0.5, TypeError),
    ],
)
def test_settings_of_a_group_are_checked_when_they_are_used(attribute, value, error):
    W, A, B = layer()
    optimizer = DeltaLoRAOptimizer(SGD, [(W, A, B)], lr=0.1)
    setattr(optimizer.groups[0], attribute, value)
    before = [t.detach().clone() for t in (W, A, B)]
    with pytest.raises(error, match=attribute):
        optimizer.step()
    assert all(map(torch.equal, before, (W, A, B)))


def test_settings_of_a_group_can_be_changed_between_steps():
    W, A, B = layer()
    optimizer = DeltaLoRAOptimizer(SGD, [(W, A, B)], lr=0.1)
    optimizer.groups[0].update_ratio = 0.0
    before = W.clone()
    optimizer.step()
    assert torch.equal(W, before)


def test_other_parameters_train_in_the_group_of_the_factors():
    W, A, B = layer()
    head = torch.ones(3, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(SGD, [(W, A, B)], [head], lr=0.1)
    assert [len(g["params"]) for g in optimizer.param_groups] == [3]
    head.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(head, torch.full((3,), 0.9))


def test_factors_among_the_other_parameters_are_not_repeated():
    W, A, B = layer()
    head = torch.ones(3, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(SGD, [(W, A, B)], [A, head, B], lr=0.1)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in (A, B, head)]
    grouped = DeltaLoRAOptimizer(SGD, [{"triples": [(W, A, B)], "params": [A, head, B]}], lr=0.1)
    assert [id(p) for p in grouped.param_groups[0]["params"]] == [id(p) for p in (A, B, head)]


def test_other_parameters_as_groups_and_named():
    W, A, B = layer()
    head, bias = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    grouped = DeltaLoRAOptimizer(SGD, [(W, A, B)], [{"params": [head], "lr": 0.5}, {"params": [bias]}], lr=0.1)
    assert [g["lr"] for g in grouped.param_groups] == [0.1, 0.5, 0.1]
    named = DeltaLoRAOptimizer(SGD, [LoRATriple(W, A, B, name="q")], [("head", head)], lr=0.1)
    assert named.param_groups[0]["param_names"] == ["q.A", "q.B", "head"]


def test_two_groups_of_triples_leave_plain_parameters_a_group_of_their_own():
    head = torch.ones(3, requires_grad=True)
    groups = [{"triples": [layer(seed=1)], "lr": 0.1}, {"triples": [layer(seed=2)], "lr": 0.2}]
    optimizer = DeltaLoRAOptimizer(SGD, groups, [head], lr=0.3)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2, 0.3]


def test_add_param_group_with_triples_and_without():
    W, A, B = layer(seed=1)
    optimizer = DeltaLoRAOptimizer(SGD, [(W, A, B)], lr=0.1)
    other = layer(seed=2)
    head = torch.ones(3, requires_grad=True)
    optimizer.add_param_group({"params": [head], "lr": 0.5})
    optimizer.add_param_group({"triples": [other], "lr": 0.2, "update_ratio": 1.0, "start_step": 2})
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5, 0.2]
    assert [t.name for t in optimizer.triples] == ["triple0", "triple1"]
    before = other[0].clone()
    steps(optimizer, 2)
    assert torch.equal(other[0], before)
    steps(optimizer, 1)
    assert not torch.equal(other[0], before)


def test_generators_of_parameters_are_read_once():
    """A generator that a check has used up would leave its parameters out, and they would never train."""
    head, bias = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    optimizer = DeltaLoRAOptimizer(SGD, [{"triples": [layer(seed=1)], "params": head.parameters()}], bias.parameters())
    assert [len(g["params"]) for g in optimizer.param_groups] == [6]
    given = {"params": (p for p in torch.nn.Linear(3, 2).parameters())}
    optimizer.add_param_group(given)
    optimizer.add_param_group({"triples": [layer(seed=2)], "params": torch.nn.Linear(3, 2).parameters()})
    optimizer.add_param_group({"triples": [layer(seed=3)], "params": torch.ones(2, requires_grad=True)})
    assert [len(g["params"]) for g in optimizer.param_groups] == [6, 2, 4, 3]


def test_add_param_group_refuses_and_changes_nothing():
    W, A, B = layer()
    optimizer = DeltaLoRAOptimizer(SGD, [LoRATriple(W, A, B, name="q")], lr=0.1)
    fresh = layer(seed=3)
    for group, message in (
        ({"triples": [(W, *fresh[1:])]}, "its W shares memory with the W of q"),
        ({"triples": []}, "empty 'triples' list"),
        ({"params": [W]}, "params holds the W of q, which this optimizer moves itself"),
        ({"params": W}, "params holds the W of q"),
        ({"triples": [fresh], "params": [W]}, "params holds the W of q"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == len(optimizer.groups) == len(optimizer.triples) == 1


def test_a_closure_is_evaluated_once_and_its_value_returned():
    W, A, B = layer(zero_A=True)
    x = torch.randn(6, 3)
    optimizer = DeltaLoRAOptimizer(SGD, [(W, A, B)], lr=0.1)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = ((W + A @ B) @ x).square().mean()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.requires_grad
    assert optimizer.step() is None


def test_zero_grad():
    W, A, B = layer()
    optimizer = DeltaLoRAOptimizer(SGD, [(W, A, B)], lr=0.1)
    optimizer.zero_grad(set_to_none=False)
    assert float(A.grad.abs().sum() + B.grad.abs().sum()) == 0.0
    optimizer.zero_grad()
    assert A.grad is None
    assert B.grad is None


def test_a_failing_inner_step_leaves_W_and_the_count():
    W, A, B = layer()
    optimizer = DeltaLoRAOptimizer(SGD, [(W, A, B)], lr=0.1)
    before = W.clone()

    def closure():
        raise KeyError("data ran out")

    with pytest.raises(KeyError, match="data ran out"):
        optimizer.step(closure)
    assert torch.equal(W, before)
    assert optimizer.step_count == 0
    optimizer.step()
    assert not torch.equal(W, before)


def test_hooks_fire_once_and_after_W_moved():
    W, A, B = layer()
    optimizer = DeltaLoRAOptimizer(AdamW, [(W, A, B)], lr=0.1)
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
        SGD([torch.ones(1, requires_grad=True)]).step()  # the hooks for every optimizer are back in place
        assert [kind for kind, *_ in fired] == ["global pre", "global post"]
    finally:
        for handle in handles:
            handle.remove()


def test_global_hooks_survive_a_failing_step():
    optimizer, fired = DeltaLoRAOptimizer(AdamW, [layer()], lr=0.1), []
    handle = register_optimizer_step_pre_hook(lambda *a: fired.append(1))
    try:
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        optimizer.step()
        assert len(fired) == 2
    finally:
        handle.remove()


def test_a_global_hook_registered_within_a_step_stays():
    optimizer, fired, handles = DeltaLoRAOptimizer(AdamW, [layer()], lr=0.1), [], []
    optimizer.step(lambda: handles.append(register_optimizer_step_post_hook(lambda *a: fired.append(1))) or 0.0)
    try:
        fired.clear()
        optimizer.step()
        assert fired == [1]
    finally:
        handles[0].remove()


def test_hooks_of_the_inner_optimizer_fire():
    optimizer, fired = DeltaLoRAOptimizer(AdamW, [layer()], lr=0.1), []
    optimizer.inner.register_step_post_hook(lambda *a: fired.append(1))
    optimizer.step()
    assert fired == [1]


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 / (1 + t)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.2, step_size_up=2, cycle_momentum=False),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.5, anneal_epochs=3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_reach_the_inner_optimizer(name):
    """The same as on the inner optimizer alone; warnings about the order of calls are errors here."""
    wrapped, plain = layer(), layer()
    optimizer = DeltaLoRAOptimizer(AdamW, [wrapped], lr=0.1)
    control = AdamW(plain[1:], lr=0.1)
    lrs = []
    for opt in (optimizer, control):
        scheduler = SCHEDULERS[name](opt)
        seen = []
        for _ in range(5):
            steps(opt, 1)
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
            seen.append(opt.param_groups[0]["lr"])
        lrs.append(seen)
    assert lrs[0] == lrs[1]
    assert len(set(lrs[0])) > 1
    assert optimizer.inner.param_groups[0]["lr"] == lrs[0][-1]
    assert torch.equal(wrapped[1], plain[1])


def test_a_scheduler_of_the_inner_optimizer_keeps_working():
    inner = AdamW((triple := layer())[1:], lr=0.1)
    scheduler = lr_scheduler.StepLR(inner, 1, gamma=0.5)
    optimizer = DeltaLoRAOptimizer(inner, [triple])
    steps(optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_with_their_model_go_on_alike(how):
    model = nn.Linear(6, 4, bias=False).requires_grad_(False)
    A, B = layer(seed=4)[1:]
    triple = LoRATriple((model, "weight"), A, B, scaling=0.5, name="q")
    optimizer = DeltaLoRAOptimizer(AdamW, [triple], lr=0.1, start_step=1)
    steps(optimizer, 3)
    twin_model, twin = how((model, optimizer))
    assert twin.triples[0].W is twin_model.weight
    assert twin.triples[0].W is not model.weight
    assert twin.step_count == 3
    for opt in (optimizer, twin):
        steps(opt, 3, seed=9)
    assert torch.equal(model.weight, twin_model.weight)
    assert torch.equal(A, twin.triples[0].A)


def test_a_model_that_holds_its_optimizer_can_be_copied():
    model = nn.Linear(6, 4, bias=False).requires_grad_(False)
    model.optimizer = DeltaLoRAOptimizer(SGD, [LoRATriple((model, "weight"), *layer()[1:], name="q")], lr=0.1)
    twin = copy.deepcopy(model)
    steps(twin.optimizer, 1)
    assert twin.optimizer.triples[0].W is twin.weight
    assert not torch.equal(twin.weight, model.weight)


def test_a_copy_alone_does_not_touch_the_original():
    W, A, B = layer()
    twin = copy.deepcopy(DeltaLoRAOptimizer(AdamW, [(W, A, B)], lr=0.1))
    before = [t.detach().clone() for t in (W, A, B)]
    steps(twin, 2)
    assert all(map(torch.equal, before, (W, A, B)))


def test_repr_names_the_triples_and_the_inner_optimizer():
    text = repr(DeltaLoRAOptimizer(AdamW, [layer()], lr=0.1, update_ratio=0.5, start_step=7))
    assert "Triples 0: 1, update_ratio=0.5, start_step=7" in text
    assert "AdamW (" in text


def conditions_of_the_product(monkeypatch):
    """What holds while the delta is added: a list of (autocast enabled, precision of float32 products)."""
    from deltaopt import writing

    seen = []

    def note(*args):
        seen.append((torch.is_autocast_enabled("cpu"), torch.backends.mkldnn.matmul.fp32_precision))

    monkeypatch.setattr(writing, "add_to_weight_", note)
    return seen


def test_the_delta_is_computed_without_autocast_and_in_full_precision(monkeypatch):
    """This CPU may give the same bits either way, so the settings are looked at themselves."""
    seen = conditions_of_the_product(monkeypatch)
    optimizer = DeltaLoRAOptimizer(SGD, [layer()], lr=0.1)
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


def test_inside_autocast_the_delta_stays_in_float32():
    plain, cast = strategies.make("linear", dtype=torch.float32), strategies.make("linear", dtype=torch.float32)
    for stored, enabled in ((plain, False), (cast, True)):
        optimizer = DeltaLoRAOptimizer(SGD, [stored.triple()], lr=0.1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            steps(optimizer, 2)
    assert torch.equal(plain.W, cast.W)


def test_low_matmul_precision_does_not_reach_the_delta_and_is_put_back():
    exact, low = (layer(c=768, d=768, r=8) for _ in range(2))
    steps(DeltaLoRAOptimizer(SGD, [exact], lr=0.1), 2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        steps(DeltaLoRAOptimizer(SGD, [low], lr=0.1), 2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(exact[0], low[0])


def test_an_update_between_forward_and_backward_is_an_error_of_autograd():
    """The in-place update is seen by autograd; through `.data` it would give wrong gradients silently."""
    W, A, B = layer()
    W.requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(SGD, [(W, A, B)], lr=0.1)
    loss = (x @ W).square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_warning_in_a_plain_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(DeltaLoRAOptimizer(AdamW, [layer()], lr=0.1), 3)


@pytest.mark.parametrize("ratio", [-0.1, float("nan"), float("inf")])
def test_update_ratio_is_finite_and_not_negative(ratio):
    with pytest.raises(ValueError, match="update_ratio must be finite and not negative, got"):
        DeltaLoRAOptimizer(SGD, [layer()], update_ratio=ratio)


@pytest.mark.parametrize("ratio", ["2", None, True, 1j])
def test_update_ratio_is_a_number_or_a_callable(ratio):
    with pytest.raises(TypeError, match="update_ratio is a number"):
        DeltaLoRAOptimizer(SGD, [layer()], update_ratio=ratio)


@pytest.mark.parametrize(
    ("start_step", "error"), [(-1, ValueError), (1.0, TypeError), ("1", TypeError), (True, TypeError)]
)
def test_start_step_is_an_int_and_not_negative(start_step, error):
    with pytest.raises(error, match="start_step"):
        DeltaLoRAOptimizer(SGD, [layer()], start_step=start_step)


@pytest.mark.parametrize("triples", [[], (), iter(())])
def test_an_empty_list_of_triples(triples):
    with pytest.raises(ValueError, match=r"triples is empty: there is no W to move. find_triples\(model\)"):
        DeltaLoRAOptimizer(SGD, triples)


def test_an_empty_group_of_triples():
    with pytest.raises(ValueError, match="empty 'triples' list"):
        DeltaLoRAOptimizer(SGD, [{"triples": []}])


@pytest.mark.parametrize(
    ("triples", "message"),
    [
        (lambda: layer()[0], "triples is a list of LoRATriple, .*, got a Tensor"),
        (lambda: {"triples": [layer()]}, "got a dict"),
        (lambda: LoRATriple(*layer()), "got a LoRATriple"),
        (lambda: [layer()[:2]], r"triples\[0\] is a LoRATriple or a tuple \(W, A, B\), got tuple of length 2"),
        (lambda: list(layer()), r"triples\[0\] is a LoRATriple or a tuple \(W, A, B\), got Tensor"),
        (lambda: [{"triples": [layer()]}, layer()], "triples mixes dicts with triples"),
    ],
)
def test_what_is_no_list_of_triples(triples, message):
    with pytest.raises(TypeError, match=message):
        DeltaLoRAOptimizer(SGD, triples())


def test_a_group_without_triples():
    with pytest.raises(ValueError, match=r"needs the key 'triples', got the keys \['params'\]"):
        DeltaLoRAOptimizer(SGD, [{"params": []}])


def test_params_that_mix_tensors_and_groups():
    head = torch.ones(3, requires_grad=True)
    with pytest.raises(TypeError, match="params mixes tensors with param groups"):
        DeltaLoRAOptimizer(SGD, [layer()], [head, {"params": [torch.ones(2, requires_grad=True)]}])


def test_params_as_a_bare_tensor():
    with pytest.raises(TypeError, match="params is a list of tensors or of param groups, got a Tensor"):
        DeltaLoRAOptimizer(SGD, [layer()], torch.ones(3, requires_grad=True))


def test_an_inner_class_with_missing_arguments():
    class Needs(SGD):
        def __init__(self, params, lr, horizon):
            super().__init__(params, lr=lr)

    with pytest.raises(
        TypeError, match=r"Needs could not be built .*'horizon'.*keyword arguments of DeltaLoRAOptimizer"
    ):
        DeltaLoRAOptimizer(Needs, [layer()], lr=0.1)


@pytest.mark.parametrize("inner", ["AdamW", None, 3])
def test_an_inner_that_is_no_optimizer(inner):
    with pytest.raises(TypeError, match=r"inner is an optimizer class or a built torch.optim.Optimizer, got a"):
        DeltaLoRAOptimizer(inner, [layer()])


def test_an_inner_factory_that_makes_something_else():
    with pytest.raises(TypeError, match=r"made a dict, which is no torch.optim.Optimizer"):
        DeltaLoRAOptimizer(lambda groups: {}, [layer()])


def test_options_that_a_built_optimizer_can_not_take():
    W, A, B = layer()
    inner = SGD([A, B], lr=0.1)
    with pytest.raises(TypeError, match="lr: no effect, because the inner optimizer is already built"):
        DeltaLoRAOptimizer(inner, [(W, A, B)], lr=0.1)
    with pytest.raises(TypeError, match="lr: no effect"):
        DeltaLoRAOptimizer(inner, [{"triples": [(W, A, B)], "lr": 0.1}])
    with pytest.raises(TypeError, match="params: no effect"):
        DeltaLoRAOptimizer(inner, [(W, A, B)], [torch.ones(2, requires_grad=True)])


def test_factors_that_the_inner_optimizer_does_not_hold():
    W, A, B = layer()
    with pytest.raises(ValueError, match="q: B is not among the parameters of the inner SGD"):
        DeltaLoRAOptimizer(SGD([A]), [LoRATriple(W, A, B, name="q")])


def test_flattened_copies_are_refused():
    """DeepSpeed's and FSDP1's optimizers hold one flat tensor in place of A and B."""
    W, A, B = layer()
    flat = torch.cat([A.detach().flatten(), B.detach().flatten()]).requires_grad_()
    with pytest.raises(ValueError, match=r"flattened copies \(DeepSpeed ZeRO, FSDP1, CPU offload\) can not be wrapped"):
        DeltaLoRAOptimizer(SGD([flat]), [(W, A, B)])


def test_an_optimizer_of_deepspeed_is_refused_by_name():
    class DeepSpeedZeroOptimizer:
        __module__ = "deepspeed.runtime.zero.stage_1_and_2"

        def __call__(self):
            raise AssertionError

    with pytest.raises(TypeError, match="DeepSpeed's optimizers step flattened copies"):
        DeltaLoRAOptimizer(DeepSpeedZeroOptimizer(), [layer()])


def test_W_in_the_inner_optimizer():
    W, A, B = layer()
    with pytest.raises(ValueError, match="q: W is among the parameters of the inner SGD"):
        DeltaLoRAOptimizer(SGD([W, A, B]), [LoRATriple(W, A, B, name="q")])
    with pytest.raises(ValueError, match="q: W is among the parameters"):
        DeltaLoRAOptimizer(SGD, [LoRATriple(W, A, B, name="q")], [W])


def test_a_differentiable_inner_optimizer():
    with pytest.raises(ValueError, match="differentiable=True, but W is moved without a graph"):
        DeltaLoRAOptimizer(SGD, [layer()], lr=0.1, differentiable=True)


def test_an_inner_delta_lora_optimizer():
    W, A, B = layer()
    with pytest.raises(TypeError, match="inner is a DeltaLoRAOptimizer already"):
        DeltaLoRAOptimizer(DeltaLoRAOptimizer(SGD, [(W, A, B)]), [(W, A, B)])


def test_factors_replaced_in_the_groups_after_construction():
    """As XLA's and FSDP2's preparation does; W would silently stay where it is."""
    W, A, B = layer()
    optimizer = DeltaLoRAOptimizer(SGD, [LoRATriple(W, A, B, name="q")], lr=0.1)
    optimizer.param_groups[0]["params"] = [p.detach().clone().requires_grad_() for p in (A, B)]
    with pytest.raises(ValueError, match=r"q: A is not among .*\n.*q: B is not among"):
        optimizer.step()
    assert optimizer.step_count == 0


def test_a_weight_unfrozen_after_construction():
    W, A, B = layer()
    optimizer = DeltaLoRAOptimizer(SGD, [LoRATriple(W, A, B, name="q")], lr=0.1)
    W.requires_grad_()
    with pytest.raises(ValueError, match="q: W requires grad"):
        optimizer.step()


def test_a_weight_that_becomes_unusable_after_construction():
    model = nn.Linear(6, 4, bias=False).requires_grad_(False)
    optimizer = DeltaLoRAOptimizer(SGD, [LoRATriple((model, "weight"), *layer()[1:], name="q")], lr=0.1)
    model.weight = nn.Parameter(torch.empty(4, 6, device="meta"), requires_grad=False)
    with pytest.raises(ValueError, match="q: W is on the meta device"):
        optimizer.step()


def test_compiled_step_moves_W_as_the_eager_one():
    eager, compiled = layer(), layer()
    first, second = (DeltaLoRAOptimizer(SGD, [t], lr=0.1) for t in (eager, compiled))
    torch.compiler.reset()
    step = torch.compile(second.step, backend="eager")
    for _ in range(3):
        first.step()
        step()
    assert torch.allclose(eager[0], compiled[0], atol=1e-6)
    assert second.step_count == 3
