"""The protocol: a class with a method `lora_triples(self)` describes its branches itself."""

import copy

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, Factor, LoRATriple, find_triples
from tests.support import containers
from tests.support.compare import relative
from tests.support.containers import Case, each_rule, optimizer_for

pytestmark = pytest.mark.extra

rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class KeyValue(nn.Module):
    """One W for keys and values, whose branches are rows of one parameter; `on` switches them off."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(8, 7), requires_grad=False)
        self.lora_left, self.lora_right = nn.Parameter(torch.zeros(8, 2)), nn.Parameter(torch.randn(4, 7))
        self.gain, self.on = 0.5, True

    def forward(self, x: Tensor) -> Tensor:
        output = x @ self.W.mT
        if not self.on:
            return output
        left, right = self.lora_left.split(4), self.lora_right.split(2)
        return output + self.gain * torch.cat([x @ b.mT @ a.mT for a, b in zip(left, right, strict=True)], -1)

    def is_on(self) -> bool:
        return self.on

    def lora_triples(self) -> list[LoRATriple]:
        return [
            LoRATriple(
                (self, "W"),
                Factor.rows((self, "lora_left"), 4 * i, 4 * i + 4),
                Factor.rows((self, "lora_right"), 2 * i, 2 * i + 2),
                scaling=(self, "gain"),
                name=name,
                rows=(4 * i, 4 * i + 4),
            )
            for i, name in enumerate("kv")
        ]


class Plain(nn.Module):
    """The shortest description: one triple without a name."""

    def __init__(self, problem: str | None = None) -> None:
        super().__init__()
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.randn(2, 4))
        self.problem, self.on = problem, True

    def is_on(self) -> bool:
        return self.on

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.on * (x @ self.B.mT @ self.A.mT)

    def lora_triples(self):
        if self.problem is not None:
            raise ValueError(self.problem)
        yield LoRATriple((self.base, "weight"), (self, "A"), (self, "B"), is_active=self.is_on)


def kv_case():
    def deltas(model):
        x = model[0]
        factors = zip(x.W.split(4), x.lora_left.split(4), x.lora_right.split(2), strict=True)
        return {f"0.{name}": (W, x.gain * a @ b) for name, (W, a, b) in zip("kv", factors, strict=True)}

    return Case(lambda: nn.Sequential(KeyValue(), nn.Tanh()), rows, ["0.k", "0.v"], deltas)


@each_rule
def test_follows_the_dense_loop(rule):
    containers.check_follows(kv_case(), rule)


@each_rule
def test_resumes_bit_for_bit(rule):
    containers.check_resumes(kv_case(), rule)


@each_rule
def test_copies_and_states_are_the_trained_model(rule):
    containers.check_leaves(kv_case(), rule)


@each_rule
def test_exports(rule):
    containers.check_exports(kv_case(), rule)


def test_moves_a_16_bit_weight():
    containers.check_16_bits(kv_case())


@each_rule
def test_a_container_that_trains_something_else_too_is_left_whole(rule):
    """`for_model` takes what is no parameter of a triple as it is."""
    model = nn.Sequential(kv_case().model()[0], nn.Linear(8, 3).double())
    optimizer = optimizer_for(model, rule)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == 4


def test_is_active_leaves_the_movement_out_under_the_name_of_the_module():
    model = nn.Sequential(Plain())
    x = torch.randn(6, 4)
    model[0].on = False
    base = model(x)
    model[0].on = True
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.5)
    (triple,) = optimizer.triples
    assert triple.label == triple.output_hook.label == "0"
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    W = triple.W.clone()
    with optimizer.base_weights():
        assert relative(W, triple.W) > 1e-3  # it has moved
    model[0].on = False
    torch.testing.assert_close(model(x), base, rtol=1e-5, atol=1e-5)


def test_modules_within_wrappers_keep_their_names():
    model = nn.Sequential(Plain(), nn.Tanh())
    compiled = torch.compile(model)
    assert [triple.label for triple in find_triples(compiled)] == ["0"]
    assert [triple.label for triple in find_triples(model[0])] == ["Plain"]


def test_what_the_method_raises_names_all_layers_in_one_message():
    model = nn.Sequential(*[Plain("its base is quantized: use another") for _ in range(400)], Plain("it has dropout"))
    with pytest.raises(ValueError, match=r"cannot be used, as their lora_triples\(\) says") as refused:
        find_triples(model)
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("  its base is quantized: use another (400 layers: 0, 1, 2, ")
    assert lines[2] == "  400: it has dropout"


WRONG = {
    "no triple": (lambda self: [(1, 2)], TypeError, r"^0: lora_triples\(\) of Wrong returns an iterable of LoRATriple"),
    "nothing": (lambda self: None, TypeError, r"^0: lora_triples\(\) of Wrong returns an iterable of .*, got None"),
    "two without names": (
        lambda self: [*Plain.lora_triples(self), *Plain.lora_triples(self)],
        ValueError,
        r"0: its 2 triples need names that tell them apart, .*got \['', ''\]",
    ),
    "none": (lambda self: [], ValueError, r"no LoRA layer in this Sequential"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_method_that_returns_something_else_is_refused(case):
    method, error, match = WRONG[case]
    wrong = type("Wrong", (Plain,), {"lora_triples": method})()
    with pytest.raises(error, match=match):
        find_triples(nn.Sequential(wrong))


def test_a_single_triple_needs_no_list():
    single = type("Single", (Plain,), {"lora_triples": lambda self: next(Plain.lora_triples(self))})()
    assert [triple.label for triple in find_triples(nn.Sequential(single))] == ["0"]


def test_a_class_that_describes_itself_is_not_read_by_its_library():
    loralib = pytest.importorskip("loralib", reason="runs where loralib is installed")

    class Mine(loralib.Linear):
        def lora_triples(self):
            factors = ((self, "lora_B"), (self, "lora_A"))
            return [LoRATriple((self, "weight"), *factors, scaling=(self, "scaling"), name="mine")]

    model = nn.Sequential(Mine(4, 4, r=2), loralib.Linear(4, 4, r=2))
    assert [triple.label for triple in find_triples(model)] == ["0.mine", "1"]
    twin = copy.deepcopy(model)
    assert find_triples(twin)[0].W is twin[0].weight
