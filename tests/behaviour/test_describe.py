"""describe(): which parameters are taken, said of triples and of optimizers."""

import json

import pytest
import torch
from torch import nn

import deltaopt
from deltaopt import DeltaLoRAOptimizer, Factor, LoRATriple, describe
from deltaopt.tables import WIDTH
from tests.support.small import HandmadeLayer, random_steps, small_layer, small_triple


def the_row(*triples):
    (row,) = describe(list(triples)).rows
    return row


def test_a_row_says_what_the_triple_is():
    W = torch.randn(9, 6, dtype=torch.bfloat16)
    A, B = (torch.randn(shape, requires_grad=True) for shape in ((4, 2), (2, 6)))
    row = the_row(LoRATriple(W, A, B, scaling=0.5, name="q", rows=(1, 5)))
    assert (row.name, row.shape, row.dtype, row.device) == ("q", (9, 6), "bfloat16", "cpu")
    assert (row.r, row.scaling, row.layout, row.rows, row.columns) == (2, 0.5, "linear", (1, 5), None)
    assert [(p.name, p.factor, p.shape, p.trains) for p in row.parameters] == [
        ("q.A", "A", (4, 2), True),
        ("q.B", "B", (2, 6), True),
    ]
    assert (row.moves, row.kept_bytes) == (4 * 6, 4 * 2 * (4 + 6))


@pytest.mark.parametrize(
    ("triple", "rule", "why"),
    [
        (small_triple(scaling=torch.tensor(0.5)), "either", ""),
        (HandmadeLayer().triple(), "either", ""),
        (small_triple(), "in_place", "its scaling is a number that cannot be set"),
        (LoRATriple(torch.zeros(12, dtype=torch.uint8), *small_layer()[1:], scaling=torch.tensor(1.0)), "folded", "W "),
    ],
)
def test_which_rule_takes_it(triple, rule, why):
    """The optimizer agrees: each rule that is said to take it builds, and the other one raises with this reason."""
    row = the_row(triple)
    assert row.rule == rule
    assert row.why.startswith(why)
    for update in ("in_place", "folded"):
        if rule in ("either", update):
            DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update=update)
        else:
            with pytest.raises(ValueError, match="these triples cannot be used") as raised:
                DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update=update)
            assert row.why in str(raised.value)


def test_plain_tuples_and_groups_are_taken_as_the_optimizer_takes_them():
    groups = [{"triples": [small_layer(), small_triple("k")], "lr": 0.1}, {"triples": [small_layer()], "scaling": 3.0}]
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, groups, lr=0.2)
    groups = [{"triples": [small_layer(), small_triple("k")], "lr": 0.1}, {"triples": [small_layer()], "scaling": 3.0}]
    rows = describe(groups).rows
    assert [row.name for row in rows] == [triple.label for triple in optimizer.triples] == ["triple0", "k", "triple2"]
    assert [row.scaling for row in rows] == [1.0, 1.0, 3.0]


def refusals():
    W, A, B = small_layer()
    merged = HandmadeLayer()
    merged.merged = True
    deleted = HandmadeLayer()
    gone = deleted.triple()
    del deleted.A
    return {
        "merged": (merged.triple(), "the branch is merged into W"),
        "frozen": (LoRATriple(W, A.detach(), B.detach()), "neither A nor B requires grad"),
        "swapped": (LoRATriple(W, B.detach().requires_grad_(), A.detach().requires_grad_()), "are swapped"),
        "trained W": (LoRATriple(W.clone().requires_grad_(), A, B), "W requires grad"),
        "deleted": (gone, "A is not in its HandmadeLayer"),
    }


@pytest.mark.parametrize("case", refusals())
def test_a_bad_triple_is_listed_and_does_not_raise(case):
    bad, reason = refusals()[case]
    good = small_triple("good", seed=1)
    told = describe([bad, good])
    assert [row.name for row in told.rows] == ["good"]
    (left,) = told.left_out
    assert left.kind == "refused"
    assert reason in left.why
    with pytest.raises((ValueError, RuntimeError)) as raised:
        DeltaLoRAOptimizer(torch.optim.SGD, [bad, good], lr=0.1)
    assert left.why.split("; ")[0] in str(raised.value)
    assert reason in " ".join(str(told).split())


def test_one_weight_in_two_triples_is_refused_in_place_only():
    W, A, B = small_layer()
    _, C, D = small_layer(seed=1)
    scaling = torch.tensor(1.0), torch.tensor(1.0)
    told = describe([LoRATriple(W, A, B, scaling[0], name="q"), LoRATriple(W, C, D, scaling[1], name="k")])
    assert [(row.name, row.rule) for row in told.rows] == [("q", "either"), ("k", "folded")]
    assert "its W shares memory with the W of q" in told.rows[1].why
    assert [row.sharing for row in told.rows] == [("one W is in 2 triples",)] * 2


def test_a_shared_factor_and_a_shared_scaling_are_said_and_counted_once():
    W, A, B = small_layer()
    V, C, _ = small_layer(seed=1)
    scaling = torch.tensor(0.5)
    told = describe([LoRATriple(W, A, B, scaling, name="q"), LoRATriple(V, C, B, scaling, name="k")])
    assert told.trained == A.numel() + C.numel() + B.numel()
    assert [row.parameters[1].name for row in told.rows] == ["q.B", "q.B"]
    for row in told.rows:
        assert row.sharing == ("B is in 2 triples", "one number is the scaling of 2 triples")
    assert "shared: B is in 2 triples ({q,k})" in str(told)


@pytest.mark.parametrize("rule", ["in_place", "folded"])
def test_an_optimizer_says_what_it_has_taken(rule):
    layer, head = HandmadeLayer(), nn.Parameter(torch.zeros(3, 5))
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [layer.triple()], [head], lr=0.1, weight_update=rule)
    for _ in range(2):
        (layer.weight + layer.scaling * layer.A @ layer.B).square().sum().backward()
        optimizer.step()
    told = describe(optimizer)
    assert [(row.name, row.rule, row.why, row.scaling) for row in told.rows] == [("q", rule, "", 0.5)]
    assert [(left.kind, left.count) for left in told.left_out] == [("trains without a W", 15)]
    assert f"this optimizer (weight_update='{rule}')" in str(told)


def test_what_it_keeps_is_what_the_optimizer_keeps():
    layers = [HandmadeLayer(), HandmadeLayer(dtype=torch.float64)]
    triples = [layer.triple(name) for layer, name in zip(layers, "qk", strict=True)]
    told = describe(triples)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1)
    random_steps(optimizer, 1)
    buffers = optimizer.buffer_bytes
    assert told.kept_bytes == 3 * (5 + 7) * (4 + 8)
    assert told.kept_bytes <= buffers <= 2 * told.kept_bytes  # the ledger's first term too: the product was not zero


def test_a_frozen_factor_is_said_and_not_counted():
    W, A, B = small_layer()
    told = describe([LoRATriple(W, A, B.detach(), scaling=torch.tensor(1.0), name="q")])
    (row,) = told.rows
    assert [(p.factor, p.trains) for p in row.parameters] == [("A", True), ("B", False)]
    assert told.trained == A.numel()
    assert f"{A.numel()}: A; B frozen" in str(told)


def test_computed_factors_name_their_parameters():
    """Two parts of one W, whose factors are rows of one parameter each, and a factor that is a product."""
    layer = nn.Module()
    layer.W = nn.Parameter(torch.randn(8, 6), requires_grad=False)
    layer.lora_A, layer.lora_B = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(8, 2))
    layer.lora_E = nn.Parameter(torch.randn(2, 1))
    parts = [
        LoRATriple(
            (layer, "W"),
            Factor.rows((layer, "lora_B"), 4 * i, 4 * i + 4),
            Factor(torch.mul, (layer, "lora_E"), (layer, "lora_A")) if i else Factor.rows((layer, "lora_A"), 0, 2),
            scaling=torch.tensor(0.5),
            name="qk"[i],
            rows=(4 * i, 4 * i + 4),
        )
        for i in (0, 1)
    ]
    layer.lora_A.data = layer.lora_A.data[:2].clone()
    told = describe(parts)
    assert [[p.name for p in row.parameters] for row in told.rows] == [
        ["q.lora_B", "q.lora_A"],
        ["q.lora_B", "k.lora_E", "q.lora_A"],
    ]
    assert [row.shape for row in told.rows] == [(8, 6)] * 2
    assert [(row.r, row.moves, row.rows) for row in told.rows] == [(2, 24, (0, 4)), (2, 24, (4, 8))]
    assert told.trained == 8 * 2 + 2 * 6 + 2
    assert "linear, rows 4:8" in str(told)
    assert "30: lora_B, lora_E, lora_A" in str(told)


def many():
    triples = [small_triple(f"model.layers.{i}.attn.{part}", seed=i) for i in range(200) for part in ("q", "v")]
    return [*triples, small_triple("head", seed=500, layout="transposed", columns=(0, 4))]


def test_many_layers_take_few_lines():
    """The one bad layer is named in full; 400 alike ones share a row."""
    told = describe(many())
    lines = str(told).splitlines()
    assert len(told.rows) == 400
    assert "model.layers.{0..199}.attn.{q,v}  400 x (4, 6) float32" in str(told)
    assert "1 layer refused" in str(told)
    assert len(lines) < 12
    assert max(map(len, lines)) <= WIDTH


def test_as_data():
    told = describe(many())
    record = json.loads(json.dumps(told.as_dict()))
    assert record == told.as_dict()
    assert record["rows"][0]["shape"] == [4, 6]
    assert record["left_out"][0]["name"] == "head"
    assert record["trained"] == 400 * (8 + 12)
    assert record["moves"] == 400 * 24


@pytest.mark.parametrize("thing", [None, 3, torch.optim.SGD([torch.zeros(1)], lr=0.1)])
def test_something_else_is_refused(thing):
    with pytest.raises(TypeError, match=r"describe\(\) takes a model, a list of triples or an optimizer, got a "):
        describe(thing)


def test_a_model_without_lora():
    told = describe(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    assert told.rows == []
    assert "has none: add an adapter first" in str(told)
    assert [(left.kind, left.name) for left in told.left_out] == [
        ("trains without a W", name) for name in ("0.weight", "0.bias", "1.weight", "1.bias")
    ]


def test_a_model_of_one_layer_and_one_of_none():
    alone = str(deltaopt.describe(nn.Linear(2, 3).requires_grad_(False)))
    assert "1 layer without a LoRA branch, Linear: the model itself" in alone
    assert "weights are not loaded" not in str(deltaopt.describe(nn.Sequential()))


def test_it_is_public():
    assert deltaopt.describe is describe
