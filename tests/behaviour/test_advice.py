"""Messages of the core: each test provokes one, does literally what it says, and sees the run be right."""

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support.reference import delta_lora
from tests.support.small import HandmadeLayer, random_steps, small_layer

SGD = torch.optim.SGD


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, t: DeltaLoRAOptimizer(SGD, m, lr=0.1), r"triples is a list .* got a model \(HandmadeLayer\)"),
        (lambda m, t: DeltaLoRAOptimizer(SGD(m.parameters()), m), r"got a model .*for_model\(model, .*find_triples"),
        (lambda m, t: DeltaLoRAOptimizer(m, SGD, lr=0.1), r"first argument is an optimizer class .* got a model"),
        (lambda m, t: DeltaLoRAOptimizer([t], SGD, lr=0.1), "first argument is an optimizer class .* got a list"),
        (lambda m, t: DeltaLoRAOptimizer(SGD, lr=0.1), r"the triples are missing\. Write .*for_model"),
        (lambda m, t: DeltaLoRAOptimizer(SGD, m.parameters(), lr=0.1), r"triples\[0\] is .* got Parameter: find_tr"),
        (lambda m, t: DeltaLoRAOptimizer(SGD, [m.A], [t], lr=0.1), r"triples\[0\] is .* got Parameter: find_triples"),
        (lambda m, t: DeltaLoRAOptimizer(SGD, [t], [t], lr=0.1), "got a LoRATriple: params is what trains besides the"),
        (lambda m, t: DeltaLoRAOptimizer(SGD, [t], m, lr=0.1), r"params is .* a model .* other_parameters\(model"),
        (lambda m, t: DeltaLoRAOptimizer(SGD, [t], 0.1), "params, the third argument, .* got 0.1.* by name"),
        (lambda m, t: DeltaLoRAOptimizer("sgd", [t], lr=0.1), "got a str: write torch.optim.AdamW, not 'sgd'"),
        (lambda m, t: DeltaLoRAOptimizer(DeltaLoRAOptimizer, [t], lr=0.1), "the class DeltaLoRAOptimizer itself"),
        (lambda m, t: DeltaLoRAOptimizer.for_model(SGD, m, lr=0.1), "first argument is the model .* got SGD"),
        (lambda m, t: DeltaLoRAOptimizer.for_model([t], SGD, lr=0.1), "first argument is the model .* got a list"),
        (lambda m, t: DeltaLoRAOptimizer(SGD, [t], lr=0.1, update_rato=2.0), r"did you mean update_ratio\?"),
        (lambda m, t: DeltaLoRAOptimizer(lambda p: None, [t]), "made a NoneType, .* let it return the optimizer"),
        (
            lambda m, t: DeltaLoRAOptimizer(lambda p: torch.optim.lr_scheduler.ConstantLR(SGD(p)), [t]),
            r"made a ConstantLR, .* ConstantLR\(optimizer, ...\)",
        ),
    ],
)
def test_an_argument_in_the_wrong_place_is_named_with_the_call_that_was_meant(call, says):
    layer = HandmadeLayer()
    with pytest.raises(TypeError, match=says):
        call(layer, layer.triple())
    optimizer = DeltaLoRAOptimizer(SGD, [layer.triple()], lr=0.1, update_ratio=2.0)  # as all of them say
    before = layer.weight.clone()
    random_steps(optimizer)
    assert not torch.equal(layer.weight, before)


def test_a_built_optimizer_that_holds_what_else_trains_may_be_given_it_again():
    W, A, B = small_layer()
    head = torch.randn(3, requires_grad=True)
    with pytest.raises(TypeError, match=r"SGD is already built and does not hold 1 of the 1 .*\(shapes \(3,\)\)"):
        DeltaLoRAOptimizer(SGD([A, B], lr=0.1), [(W, A, B)], [head])
    for params in ([head], [{"params": [head]}]):
        optimizer = DeltaLoRAOptimizer(SGD([A, B, head], lr=0.1), [(W, A, B)], params)
        head.grad = torch.ones(3)
        before = head.detach().clone()
        optimizer.step()
        torch.testing.assert_close(head.detach(), before - 0.1)
    with pytest.raises(TypeError, match="weight_decay: no effect, because the inner optimizer is already built"):
        DeltaLoRAOptimizer(SGD([A, B, head]), [(W, A, B)], [{"params": [head], "weight_decay": 0.1}])


def test_empty_param_groups_are_left_out():
    W, A, B = small_layer()
    head = torch.randn(3, requires_grad=True)
    groups = [{"params": iter([head]), "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    optimizer = DeltaLoRAOptimizer(SGD, [(W, A, B)], groups, lr=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]


def test_factors_in_param_groups_are_refused_by_name():
    W, A, B = small_layer()
    with pytest.raises(ValueError, match=r"params has q\.A, q\.B in its param groups, .* leave the factors out"):
        DeltaLoRAOptimizer(SGD, [LoRATriple(W, A, B, name="q")], [{"params": [A, B], "weight_decay": 0.1}], lr=0.1)
    triples = {"triples": [(W, A, B)], "weight_decay": 0.1}  # as the message says
    assert DeltaLoRAOptimizer(SGD, [triples], lr=0.1).param_groups[0]["weight_decay"] == 0.1


def test_a_plain_optimizers_moments_are_taken_over_as_the_message_says():
    """The inner optimizer is built as the plain one was, loads its state, and is handed over."""
    W, A, B = (tensor.detach().double() for tensor in small_layer())
    goal = torch.randn(4, 6, dtype=torch.float64)

    def loss(weight, step):
        return (weight - goal).square().sum()

    def inner_of(params):
        return torch.optim.AdamW(params, lr=0.05)

    run = delta_lora(W, A, B, loss, inner_of, steps=6, update_ratio=1.5, start_step=3, scaling=0.5)
    a, b = (factor.clone().requires_grad_() for factor in (A, B))

    def train(optimizer, weight, steps):
        for step in range(steps):
            optimizer.zero_grad()
            loss(weight + 0.5 * a @ b, step).backward()
            optimizer.step()

    plain = inner_of([b, a])  # as model.parameters() of PEFT has them
    train(plain, W, 3)
    moved = W.clone()
    optimizer = DeltaLoRAOptimizer(inner_of, [(moved, a, b)], scaling=0.5, update_ratio=1.5)
    with pytest.raises(ValueError, match=r"not saved by a DeltaLoRAOptimizer.*build the inner optimizer as .* hand it"):
        optimizer.load_state_dict(plain.state_dict())
    inner = inner_of([b, a])
    inner.load_state_dict(plain.state_dict())
    train(DeltaLoRAOptimizer(inner, [(moved, a, b)], scaling=0.5, update_ratio=1.5), moved, 3)
    torch.testing.assert_close(moved, run.W[-1], rtol=1e-12, atol=1e-12)
