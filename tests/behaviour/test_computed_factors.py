"""Factors that are rows or functions of trained parameters: every event, and parameters that serve several triples."""

import copy

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, Factor, LoRATriple, export_adapter
from tests.support import strategies
from tests.support.compare import COPIES, assert_close, refused, relative, same, through_a_file
from tests.support.runs import LayerRun, assert_agrees, assert_follows
from tests.support.small import refuses_triples
from tests.support.strategies import COMPUTED, EVENTS, each_rule

each_layout = pytest.mark.parametrize("layout", COMPUTED)


def trained(rule: str, layout: str, **options) -> LayerRun:
    return LayerRun(rule, layout, zero=False, start_step=1, **options).train(4)


@each_layout
@each_rule
def test_a_run_resumes(rule, layout):
    """With the whole model bit for bit; with the parameters of A and B alone to the last bits of W."""
    run = trained(rule, layout)
    whole, beside = run.twin(), run.twin(whole=False)
    for each in (run, whole, beside):
        each.train(3)
    assert all(map(torch.equal, whole.tensors, run.tensors))
    assert_follows(beside, run, 1e-12)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("layout", COMPUTED)
def test_another_parameter_is_noticed_by_load_state_dict(layout, number):
    run = trained("in_place", layout)
    factors = [factor.detach().clone() for factor in run.factors]
    factors[number][-1, -1] += 1.0
    other = run.twin(load=False, factors=factors)
    name = run.triple.parameter_names[number]
    message = rf"{name.replace('(', '[(]').replace(')', '[)]')} has other contents"
    with pytest.raises(ValueError, match=message):
        other.optimizer.load_state_dict(run.optimizer.state_dict())


@each_layout
def test_the_rules_agree_in_all_they_tell(layout):
    assert_agrees(trained("in_place", layout), trained("folded", layout))


@pytest.mark.parametrize("event", sorted({*EVENTS["in_place"]}))
@each_layout
def test_every_event_in_place(event, layout):
    """Let it happen between steps, and compare the movement with the dense account."""
    run = trained("in_place", layout)
    run.happen(event)
    run.train(3)
    assert_close(run.moved(), run.asked, 1e-12 * run.size())
    assert_close(run.displacement(), run.asked, 1e-12 * run.size())


@each_layout
@each_rule
def test_restart_keeps_the_effective_weight(rule, layout):
    run = trained(rule, layout)
    before = run.effective_exactly()
    run.happen("restart")
    assert_close(run.effective_exactly(), before, 1e-13)
    _, A, B = run.stored.matrices()
    assert not A.any()
    assert float(B.abs().max()) <= B.shape[-1] ** -0.5
    assert not run.optimizer.state


@each_rule
def test_restart_without_a_way_to_assign_is_refused(rule):
    run = trained(rule, "diagonal")
    run.optimizer.triples[0].factor_sources["B"].assign = None
    refused(
        run.optimizer.restart,
        ValueError,
        r"q: its B is computed from .*give the Factor a function assign=, or .*writes the parameters themselves",
        kept=lambda: run.tensors,
    )
    run.train()

    def reinit(triple: LoRATriple) -> None:
        triple.A.zero_()
        run.stored.B.fill_(0.5)

    before = run.effective_exactly()
    run.optimizer.restart(reinit)
    assert_close(run.effective_exactly(), before, 1e-13)
    assert bool((run.stored.B == 0.5).all())


@pytest.mark.parametrize("way", COPIES)
@each_layout
@each_rule
def test_a_copy_trains_on_its_own_parameters(rule, layout, way):
    run = trained(rule, layout)
    kept = [tensor.clone() for tensor in run.tensors]
    twin = COPIES[way](run)
    twin.train(3)
    assert all(map(torch.equal, run.tensors, kept))
    run.train(3)
    assert all(map(torch.equal, run.tensors, twin.tensors))


@each_layout
def test_resync_follows_parameters_of_an_earlier_step(layout):
    run = trained("in_place", layout)
    factors, expected = [factor.detach().clone() for factor in run.factors], run.moved()
    run.train(3)
    with torch.no_grad():
        for factor, value in zip(run.factors, factors, strict=True):
            factor.copy_(value)
    run.optimizer.resync()
    assert_close(run.moved(), expected, 1e-12)


class Fused(nn.Module):
    """W of three parts (15, 7); the first and the last have branches, which share both parameters."""

    C, R, D = 5, 3, 7

    def __init__(self, zero: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

        self.weight, self.up, self.down = new(15, 7).requires_grad_(False), new(10, 3), new(6, 7)
        if zero:
            self.up.data.zero_()
        self.scaling = 0.5

    def triples(self) -> list[LoRATriple]:
        return [
            LoRATriple(
                (self, "weight"),
                Factor.rows((self, "up"), i * 5, (i + 1) * 5),
                Factor.rows((self, "down"), i * 3, (i + 1) * 3),
                scaling=(self, "scaling"),
                rows=(part * 5, part * 5 + 5),
                name="qv"[i],
            )
            for i, part in ((0, 0), (1, 2))
        ]

    def branch(self) -> Tensor:
        product = [self.up[5 * i : 5 * i + 5] @ self.down[3 * i : 3 * i + 3] for i in (0, 1)]
        return torch.cat([product[0], torch.zeros(5, 7, dtype=torch.float64), product[1]])

    def effective(self) -> Tensor:
        return self.weight + self.scaling * self.branch()


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> None:
    problem = strategies.Problem(torch.Size((15, 7)), 1)
    for t in range(first, first + count):
        optimizer.zero_grad()
        problem(module.effective(), t).backward()
        optimizer.step()


@pytest.mark.parametrize("zero", [False, True])
@each_rule
def test_branches_that_share_their_parameters_follow_the_dense_loop(rule, zero):
    module, plain = Fused(zero), Fused(zero)
    options = {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.1}
    optimizer = DeltaLoRAOptimizer(
        torch.optim.AdamW, module.triples(), start_step=2, update_ratio=0.7, weight_update=rule, **options
    )
    inner = torch.optim.AdamW([plain.up, plain.down], **options)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    for t in range(60):
        steps(module, optimizer, 1, t)
        before = plain.branch().detach()
        steps(plain, inner, 1, t)
        if t >= 2:
            plain.weight += 0.7 * 0.5 * (plain.branch().detach() - before)
        assert relative(module.effective(), plain.effective()) < 1e-12
        assert relative(module.up, plain.up) < 1e-12
        assert relative(module.down, plain.down) < 1e-12


def test_the_gradient_of_shared_parameters_is_divided_once():
    module, plain = Fused(), Fused()
    optimizer = DeltaLoRAOptimizer(
        torch.optim.SGD, module.triples(), lr=0.0, update_ratio=1.5, weight_update="folded", start_step=0
    )
    steps(module, optimizer, 1)
    optimizer.zero_grad()
    for each in (module, plain):
        strategies.Problem(torch.Size((15, 7)), 1)(each.effective(), 0).backward()
    assert relative(module.up.grad, plain.up.grad) < 1e-12
    assert relative(module.down.grad, plain.down.grad) < 1e-12


def test_a_state_dict_of_shared_parameters_is_right_for_the_first_scaling():
    module, fresh = Fused(), Fused()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, module.triples(), lr=0.01, weight_update="folded")
    steps(module, optimizer, 3)
    assert module.scaling == 1.5
    fresh.load_state_dict(module.state_dict())
    assert relative(fresh.effective(), module.effective()) < 1e-12


@each_rule
def test_shared_parameters_resume_beside_the_base(rule):
    module, fresh = Fused(), Fused()
    options = {"lr": 0.02, "weight_update": rule, "start_step": 1}
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, module.triples(), **options)
    steps(module, optimizer, 4)
    state = through_a_file(optimizer.state_dict())
    adapter = {name: tensor for name, tensor in module.state_dict().items() if name != "weight"}
    fresh.load_state_dict(adapter, strict=False)
    resumed = DeltaLoRAOptimizer(torch.optim.AdamW, fresh.triples(), **options)
    resumed.load_state_dict(copy.deepcopy(state))
    assert torch.equal(fresh.up, module.up)
    for each, its in ((module, optimizer), (fresh, resumed)):
        steps(each, its, 3, 4)
    assert relative(fresh.effective(), module.effective()) < 1e-12
    assert {name: change.rank for name, change in export_adapter(resumed).items()} == {"q": 6, "v": 6}


def test_folding_asks_for_one_ratio_of_shared_parameters():
    module = Fused()
    groups = [
        {"triples": [triple], "update_ratio": ratio} for triple, ratio in zip(module.triples(), (1, 2), strict=True)
    ]
    inner = torch.optim.SGD([module.up, module.down], lr=0.1)
    with pytest.raises(ValueError, match=r"v: its up \(of A\) is a factor of q too, which has another update_ratio"):
        DeltaLoRAOptimizer(inner, groups, weight_update="folded")


def test_folding_asks_for_the_triples_of_all_rows():
    first, _ = Fused().triples()
    with pytest.raises(ValueError, match=r"q: its A is rows of a parameter .* of which 5 rows belong to no triple"):
        DeltaLoRAOptimizer(torch.optim.SGD, [first], lr=0.1, weight_update="folded")
    DeltaLoRAOptimizer(torch.optim.SGD, [first], lr=0.1)


def test_folding_refuses_an_A_that_no_parameter_stands_for():
    stored = strategies.make("linear")
    triple = LoRATriple(stored.W, Factor(torch.tanh, stored.A), stored.B, scaling=torch.tensor(1.0), name="q")
    with pytest.raises(ValueError, match=r"q: its A is computed from .*weight_update=\"in_place\""):
        DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update="folded")


@pytest.mark.parametrize("letter", ["A", "B"])
@each_rule
def test_a_factor_may_be_frozen_on_purpose(rule, letter):
    """W follows the one that trains, and the optimizer holds that one alone; after an unfreezing it says so."""
    run = LayerRun(rule, zero=False, start_step=1)
    run.optimizer.release()
    frozen = getattr(run.stored, letter).requires_grad_(False)
    run.optimizer = run.new_optimizer()
    assert [len(group["params"]) for group in run.optimizer.param_groups] == [1]
    kept, before = frozen.clone(), run.product()
    for t in range(10):
        run.optimizer.zero_grad()
        run.loss(run.effective(), t).backward()
        run.step()
        before = run.product() if t == 0 else before
    assert torch.equal(frozen, kept)
    assert_close(run.moved(), 2.0 * run.scaling * (run.product() - before), 1e-12)
    state = through_a_file(run.optimizer.state_dict())
    run.optimizer.load_state_dict(state)
    frozen.requires_grad_()
    refused(run.optimizer.step, ValueError, f"if they were frozen then, freeze them again.*\n.*{letter} is not among")


@pytest.mark.parametrize(
    ("compute", "problem"),
    [
        (torch.linalg.inv, "q: B cannot be computed from parameters of the shapes (2, 6): "),
        (torch.isnan, "q: B is computed as a torch.bool, expected a tensor of floating point numbers"),
        (torch.t, "q: A (4, 2) and B (6, 2) do not fit W (4, 6)"),
    ],
)
def test_refuses_what_computes_no_factor(compute, problem):
    W, A, B = torch.randn(4, 6), torch.randn(4, 2, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    assert problem in refuses_triples(LoRATriple(W, A, Factor(compute, B), name="q"))


def test_refuses_factors_that_could_not_be_copied():
    hidden = torch.randn(2, 1)
    with pytest.raises(TypeError, match="compute of a Factor holds a Tensor of its surroundings"):
        Factor(lambda Q: hidden * Q, torch.randn(2, 6))
    with pytest.raises(TypeError, match="compute of a Factor is a function of the parameters' tensors, got 3"):
        Factor(3, torch.randn(2, 6))
    with pytest.raises(
        TypeError, match=r"a parameter of a Factor is a tensor or \(module, 'attribute.path'\), got str"
    ):
        Factor(torch.t, "weight")
    with pytest.raises(ValueError, match="computed from one parameter or more"):
        Factor(torch.t)
    with pytest.raises(ValueError, match="start, stop with 0 <= start < stop, got 3, 3"):
        Factor.rows(torch.randn(2, 6), 3, 3)


def test_the_parameters_are_told_apart_from_the_factors():
    P, E, Q = (torch.randn(shape, requires_grad=True) for shape in ((4, 2), (2, 1), (2, 6)))
    triple = LoRATriple(torch.randn(4, 6), P, Factor(torch.mul, E, Q), name="q")
    assert same(list(triple.parameters), [P, E, Q])
    assert all(p is q for p, q in zip(triple.parameters, (P, E, Q), strict=True))
    assert torch.equal(triple.B, E * Q)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
    assert [p is q for p, q in zip(optimizer.param_groups[0]["params"], (P, E, Q), strict=True)] == [True] * 3
    assert repr(Factor.rows(P, 0, 2)) == "Factor.rows((4, 2), 0, 2)"
