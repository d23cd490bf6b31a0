"""Messages of the core: each test provokes one, does literally what it says, and sees the run be right."""

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, Factor, LoRATriple
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
    for as_given in (lambda p: p, lambda p: {"params": [p]}):
        W, A, B = small_layer()
        optimizer = DeltaLoRAOptimizer(SGD([A, B, head], lr=0.1), [(W, A, B)], [as_given(head)])
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


@pytest.mark.parametrize("built", [False, True], ids=["class", "built"])
def test_views_of_fused_parameters_are_refused_with_the_factors_that_take_them(built):
    """Two branches whose factors are rows of two parameters, as those of a fused query, key and value."""
    torch.manual_seed(0)
    W, A, B = torch.randn(12, 6), torch.randn(8, 2, requires_grad=True), torch.randn(4, 6, requires_grad=True)

    def optimizer_of(*triples):
        if built:
            return DeltaLoRAOptimizer(SGD([A, B], lr=0.1), triples, update_ratio=2.0)
        return DeltaLoRAOptimizer(SGD, triples, lr=0.1, update_ratio=2.0)

    with pytest.raises(ValueError, match=r"A and B are computed .*\(SliceBackward0\).* Factor\.rows\(parameter, start"):
        optimizer_of(LoRATriple(W[8:], A[4:], B[2:], name="v"))
    with pytest.raises(ValueError, match=r"A \(8, 2\) and B \(4, 6\) do not fit W .* Factor\.rows\(parameter, start"):
        optimizer_of(LoRATriple(W, A, B, name="qv"))
    q = LoRATriple(W[:4], Factor.rows(A, 0, 4), Factor.rows(B, 0, 2), name="q")
    v = LoRATriple(W[8:], Factor.rows(A, 4, 8), Factor.rows(B, 2, 4), name="v")
    optimizer, expected, a, b = optimizer_of(q, v), W.clone(), A.detach().clone(), B.detach().clone()
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    optimizer.step()
    expected[:4] += 2.0 * ((a - 0.1)[:4] @ (b - 0.1)[:2] - a[:4] @ b[:2])
    expected[8:] += 2.0 * ((a - 0.1)[4:] @ (b - 0.1)[2:] - a[4:] @ b[2:])
    torch.testing.assert_close(W, expected)


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


def trained(W, A, B, name="q"):
    optimizer = DeltaLoRAOptimizer(SGD, [LoRATriple(W, A, B, name=name)], lr=0.1, update_ratio=2.0)
    random_steps(optimizer)
    return optimizer


MOVED = r"the weights of 1 layer \(q\) were moved by an earlier optimizer"


def test_a_cell_that_is_run_twice_says_that_W_has_moved_and_loading_the_state_counts_from_the_base():
    W, A, B = small_layer()
    pristine = W.clone()
    optimizer = trained(W, A, B)
    state = optimizer.state_dict()
    with pytest.warns(UserWarning, match=MOVED):
        optimizer = DeltaLoRAOptimizer(SGD, [LoRATriple(W, A, B, name="q")], lr=0.1, update_ratio=2.0)
    optimizer.load_state_dict(state)  # as it says
    random_steps(optimizer)
    torch.testing.assert_close(optimizer.displacement("q").product(), W - pristine)


def test_a_cell_that_is_run_twice_may_go_on_from_the_moved_weights():
    W, A, B = small_layer()
    optimizer = trained(W, A, B)
    moved = W.clone()
    with pytest.warns(UserWarning, match=f"{MOVED}.* As they are now they are the base"):
        optimizer = trained(W, A, B)
    torch.testing.assert_close(optimizer.displacement("q").product(), W - moved)


def test_where_the_pristine_weights_were_loaded_again_or_the_optimizer_is_gone_there_is_no_word():
    W, A, B = small_layer()
    pristine = W.clone()
    optimizer = trained(W, A, B)
    W.copy_(pristine)  # "to start from the pristine weights, load the model again"
    optimizer = trained(W, A, B)
    torch.testing.assert_close(optimizer.displacement("q").product(), W - pristine)
    del optimizer
    trained(W, A, B)


# Problems of many layers.

MANY = 224
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")


def many_triples(r: int = 1, dtype: torch.dtype = torch.float32) -> list[LoRATriple]:
    """Triples of 32 blocks with 7 layers, under the names that a large model gives them."""
    torch.manual_seed(0)
    return [
        LoRATriple(
            torch.randn(2, 3, dtype=dtype),
            torch.randn(2, r, requires_grad=True),
            torch.randn(r, 3, requires_grad=True),
            name=f"base_model.model.model.layers.{i // 7}.self_attn.{KINDS[i % 7]}",
        )
        for i in range(MANY)
    ]


def optimizer_of(triples, **options):
    return DeltaLoRAOptimizer(SGD, triples, lr=0.1, **options)


def trained_many(**options):
    optimizer = optimizer_of(many_triples(**options))
    random_steps(optimizer)
    return optimizer


def misshapen():
    triples = many_triples()
    return optimizer_of(
        [LoRATriple(torch.randn(2 + i, 3), t.A, t.B, name=t.name) for i, t in enumerate(triples, start=1)]
    )


def frozen():
    triples = many_triples()
    for triple in triples:
        triple.A.requires_grad_(False)
        triple.B.requires_grad_(False)
    return optimizer_of(triples)


def tied():
    triples = many_triples()
    return optimizer_of([*triples, *(LoRATriple(t.W, *small_layer(2, 3)[1:], name=f"{t.name}_twin") for t in triples)])


def resumed(triples, change=lambda triple: None):
    state = trained_many().state_dict()
    optimizer = optimizer_of(triples)
    for triple in triples:
        change(triple)
    optimizer.load_state_dict(state)


def superseded():
    first = trained_many()
    with pytest.warns(UserWarning, match="224 layers .* were moved") as caught:
        second = optimizer_of(first.triples)
    assert len(str(caught[0].message)) < 1500
    random_steps(second)
    first.state_dict()


def not_finite():
    optimizer = trained_many()
    for triple in optimizer.triples:
        triple.A.data.fill_(float("nan"))
    optimizer.restart()


def not_through_backward():
    layers = [HandmadeLayer() for _ in range(12)]
    triples = [layer.triple(f"base_model.model.model.layers.{i}.self_attn.q_proj") for i, layer in enumerate(layers)]
    optimizer = optimizer_of(triples, weight_update="folded")
    sum((layer.scaling * layer.A @ layer.B).sum() for layer in layers).backward()
    optimizer.step()
    for triple in triples:
        triple.A.grad_sample = torch.ones(1)
    optimizer.step()


@pytest.mark.parametrize(
    ("provoke", "says"),
    [
        (misshapen, r"\(3, 3\).*likewise in 223 layers"),
        (frozen, "neither A nor B requires grad.*224 layers"),
        (tied, "its W shares memory.*likewise in 31 layers"),
        (lambda: optimizer_of([t.named("q") for t in many_triples()]), "q: two triples have this name"),
        (lambda: DeltaLoRAOptimizer(SGD([torch.ones(1, requires_grad=True)]), many_triples()), "224 layers"),
        (lambda: optimizer_of(many_triples()).add_param_group({"triples": many_triples()}), "two triples have this"),
        (lambda: resumed(many_triples(r=2)), "belongs to other triples.*likewise in 223 layers"),
        (lambda: resumed([t.named(f"blocks.{i}") for i, t in enumerate(many_triples())]), "other triples"),
        (lambda: resumed(many_triples(), lambda t: t.A.data.add_(1)), "A has other contents.*224 layers"),
        (lambda: resumed(many_triples(), lambda t: t.W.add_(1)), "W has other contents.*224 layers"),
        (superseded, "another optimizer was built on the W of base_model"),
        (not_finite, "a factor of .* is NaN or infinite"),
        (not_through_backward, r"its gradients did not come through backward\(\)"),
        (lambda: trained_many(dtype=torch.bfloat16).base_weights().__enter__(), "cannot be brought back.*224 layers"),
    ],
)
def test_a_problem_of_224_layers_is_told_once(provoke, says):
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){says}") as caught:
        provoke()
    lines = str(caught.value).split("\n")
    assert len(str(caught.value)) < 1500
    assert len(set(lines)) == len(lines)


def test_the_report_of_224_layers_is_short():
    assert len(str(trained_many().report())) < 700
    assert len(str(trained_many(dtype=torch.bfloat16).report())) < 700
