"""The folded rule's own behaviour: when it folds, when it writes W, and what it refuses.

That it follows the paper is in tests/conformance; a ratio that changes has test_folded_ratio.py.
"""

import math

import pytest
import torch

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support import internals, reference, strategies
from tests.support.compare import refused, through_a_file
from tests.support.folded import (
    DEFAULT_RATIO,
    folded_optimizer,
    in_place_and_folded,
    linear_layer,
    packed_layer,
)
from tests.support.runs import LayerRun, assert_agrees, assert_follows
from tests.support.strategies import RULES, each_rule


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_from_a_zero_product_the_ratio_goes_into_the_branch_alone(layout):
    run = LayerRun("folded", layout).train(5)
    assert torch.equal(run.stored.W, run.W0)
    assert float(run.scale) == 0.5 * (1 + DEFAULT_RATIO)
    assert run.optimizer.buffer_bytes == 0
    assert not internals.has_moved(run.optimizer)


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_from_another_product_w_is_written_once(layout):
    """At step K, by lambda s A_K B_K, and only in the part of W that is the triple's."""
    run = LayerRun("folded", layout, zero=False, start_step=2).train(2)
    assert torch.equal(run.stored.W, run.W0)
    assert float(run.scale) == 0.5
    expected = run.base() - DEFAULT_RATIO * 0.5 * run.product()
    run.train(1)
    after = run.stored.W.clone()
    torch.testing.assert_close(run.stored.matrix(after), expected, rtol=0, atol=1e-12)
    mine = torch.zeros_like(after, dtype=torch.bool)
    mine[place_of(layout)] = True
    assert torch.equal(after[~mine], run.W0[~mine])
    assert bool((after[mine] != run.W0[mine]).all())
    run.train(3)
    assert torch.equal(run.stored.W, after)


def place_of(layout):
    """The part of the stored W that the triple has, written out."""
    C, D = strategies.C, strategies.D
    return {
        "rows": slice(C, 2 * C),
        "columns": (slice(None), slice(2, 2 + D)),
        "transposed_rows": (slice(None), slice(C, 2 * C)),
    }.get(layout, slice(None))


def test_a_step_does_not_change_the_effective_weight_where_it_folds():
    """With lr = 0, at step K: what is taken from W comes back by the branch."""
    run = LayerRun("folded", zero=False, start_step=0, lr=0.0)
    before = run.effective().detach().clone()
    run.train(1)
    assert float(run.scale) == 0.5 * (1 + DEFAULT_RATIO)
    torch.testing.assert_close(run.effective().detach(), before, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("ratio", [lambda step: 2.0, strategies.SCHEDULES["ramp"]], ids=["constant", "ramp"])
def test_a_layer_without_gradients_is_folded_when_it_has_some(ratio):
    """An expert that no token reached: until then the step leaves its factors as they are, so it need not change."""
    outcomes = []
    for mode in ("in_place", "folded"):
        layers = [linear_layer(str(i), i, zero=i == 0) for i in range(2)]
        optimizer = DeltaLoRAOptimizer(
            torch.optim.SGD, [t for *_, t in layers], lr=0.1, momentum=0.9, update_ratio=ratio, weight_update=mode
        )
        for t in range(6):
            optimizer.zero_grad()
            for i, (s, scale, _) in enumerate(layers):
                if i == 0 or t in (2, 5):
                    strategies.Problem(s.W.shape, i)(s.W + scale * (s.A @ s.B), t).backward()
            optimizer.step()
            if mode == "folded":
                scaled = 0.5 * (1 + ratio(t))
                assert [float(scale) for _, scale, _ in layers] == [scaled, 0.5 if t < 2 else scaled]
        outcomes.append([(s.W + scale * (s.A @ s.B)).detach() for s, scale, _ in layers])
    for now, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("without", [0, 1], ids=["A", "B"])
def test_one_factor_with_a_gradient_is_enough(without):
    in_place, folded = in_place_and_folded(zero=False)
    for run in (in_place, folded):
        for _ in range(3):
            run.backward()
            run.factors[without].grad = None
            run.optimizer.step()
            run.t += 1
    assert float(folded.scale) == 1.5
    assert_follows(folded, in_place)


def test_changed_factors_need_no_resync():
    in_place, folded = in_place_and_folded(8)
    best = [p.detach().clone() for p in folded.factors]
    for run in (in_place, folded):
        run.train(5)
        with torch.no_grad():
            for p, before in zip(run.factors, best, strict=True):
                p.copy_(before)
    assert float((folded.effective() - in_place.effective()).detach().norm()) > 1e-3
    in_place.optimizer.resync()
    assert_agrees(folded, in_place)
    before = [t.clone() for t in folded.tensors]
    folded.optimizer.resync()  # nothing to do
    assert all(map(torch.equal, folded.tensors, before))
    assert_agrees(folded, in_place)


def test_rebase_counts_from_the_weight_that_is_there():
    run = LayerRun("folded", zero=False).train(5)
    run.optimizer.rebase()
    _, A, B = run.stored.matrices()
    torch.testing.assert_close(run.optimizer.displacement("q").product(), DEFAULT_RATIO * 0.5 * (A @ B))
    change = deltaopt.export_adapter(run.optimizer)["q"].product()
    torch.testing.assert_close(run.stored.W + change, run.effective().detach())


GROUPS = [
    {"update_ratio": 0.0},
    {"update_ratio": 3.0, "lr": 0.01},
    {"start_step": 3},
    {"update_ratio": 1.0, "start_step": 1},
    {"update_ratio": strategies.SCHEDULES["ramp"]},
]


@pytest.mark.parametrize("late", [0, 2], ids=["at once", "added later"])
@each_rule
def test_groups_of_several_ratios_and_starts_follow_the_dense_loop(rule, late):
    """Each with its own settings; two of them are added after `late` steps."""
    layers = [linear_layer(str(i), i, zero=i not in (2, 4)) for i in range(5)]
    problems = [strategies.Problem(s.W.shape, i) for i, (s, *_) in enumerate(layers)]
    groups = [{"triples": [triple], **options} for (*_, triple), options in zip(layers, GROUPS, strict=True)]
    expected = []
    for i, ((s, *_), options, problem) in enumerate(zip(layers, GROUPS, problems, strict=True)):
        first, lr = late if i > 1 else 0, options.get("lr", 0.02)
        ratio = options.get("update_ratio", DEFAULT_RATIO)
        run = reference.delta_lora(
            *(s.W, s.A, s.B),
            lambda W, t, problem=problem, first=first: problem(W, t + first),
            lambda params, lr=lr: torch.optim.AdamW(params, lr=lr),
            steps=8 - first,
            update_ratio=(lambda t, ratio=ratio, first=first: ratio(t + first)) if callable(ratio) else ratio,
            start_step=max(0, options.get("start_step", 0) - first),
            scaling=0.5,
        )
        expected.append(run.W[-1] + 0.5 * run.A[-1] @ run.B[-1])
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, groups[: 2 if late else 5], lr=0.02, weight_update=rule)
    for t in range(8):
        if late and t == late:
            for group in groups[2:]:
                optimizer.add_param_group(group)
        optimizer.zero_grad()
        for (s, scale, _), problem in zip(layers, problems, strict=True):
            problem(s.W + scale * (s.A @ s.B), t).backward()
        optimizer.step()
    for (s, scale, _), effective in zip(layers, expected, strict=True):
        torch.testing.assert_close((s.W + scale * (s.A @ s.B)).detach(), effective, rtol=1e-10, atol=1e-10)
    last = [0.5, 2.0, 1.5, 1.0, 0.5 * (1 + GROUPS[4]["update_ratio"](7))]
    assert [float(scale) for _, scale, _ in layers] == (last if rule == "folded" else [0.5] * 5)


def test_a_factor_of_two_layers():
    """Its gradient is divided once for both; where their ratios differ, it cannot be."""
    outcomes = []
    for mode in ("in_place", "folded"):
        (s, scale, triple), (other, scale_2, _) = linear_layer("a", 0), linear_layer("b", 1)
        shared = LoRATriple(other.W, s.A, other.B, scaling=scale_2, name="b")
        optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [triple, shared], lr=0.02, weight_update=mode)
        for t in range(5):
            optimizer.zero_grad()
            loss = strategies.Problem(s.W.shape)
            (loss(s.W + scale * (s.A @ s.B), t) + loss(other.W + scale_2 * (s.A @ other.B), t)).backward()
            optimizer.step()
        outcomes.append([s.A.detach(), s.B.detach(), other.B.detach()])
    for now, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("other", [{"update_ratio": 1.0}, {"start_step": 4}])
def test_a_factor_of_layers_that_differ_is_refused(other):
    (s, _, triple), (t, scale, _) = linear_layer("a", 0), linear_layer("b", 1)
    shared = LoRATriple(t.W, s.A, t.B, scaling=scale, name="b")
    inner = torch.optim.AdamW([s.A, s.B, t.B])
    with pytest.raises(ValueError, match="b: its A is a factor of a too, which has another update_ratio or start_step"):
        DeltaLoRAOptimizer(inner, [{"triples": [triple]}, {"triples": [shared], **other}], weight_update="folded")
    optimizer = DeltaLoRAOptimizer(
        inner, [{"triples": [triple]}, {"triples": [shared]}], weight_update="folded", start_step=1
    )
    for name, value in other.items():
        setattr(optimizer.groups[1], name, value)
    for factor in (s.A, s.B, t.B):
        factor.grad = torch.ones_like(factor)
    optimizer.step()
    with pytest.raises(ValueError, match="b: its A is a factor of a too"):
        optimizer.step()


def test_a_second_factor_of_layers_that_differ_is_refused():
    (s, _, triple), (t, scale, _) = linear_layer("a", 0), linear_layer("b", 1)
    shared = LoRATriple(t.W, t.A, s.B, scaling=scale, name="b")
    groups = [{"triples": [triple]}, {"triples": [shared], "update_ratio": 1.0}]
    with pytest.raises(ValueError, match="b: its B is a factor of a too"):
        DeltaLoRAOptimizer(torch.optim.AdamW([s.A, s.B, t.A]), groups, weight_update="folded")


def test_a_later_group_that_differs_in_a_shared_factor_is_refused():
    (s, _, triple), (t, scale, _) = linear_layer("a", 0), linear_layer("b", 1)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW([s.A, s.B, t.B]), [triple], weight_update="folded")
    shared = LoRATriple(t.W, s.A, t.B, scaling=scale, name="b")
    with pytest.raises(ValueError, match="b: its A is a factor of a too"):
        optimizer.add_param_group({"triples": [shared], "update_ratio": 1.0})
    assert len(optimizer.triples) == 1


def test_a_factor_of_another_group_does_not_hold_up_a_fold():
    """One that is NaN in layers whose ratio is 0 reaches no W."""
    (s, scale, triple), (t, _, other) = linear_layer("a", 0), linear_layer("b", 1)
    groups = [{"triples": [triple]}, {"triples": [other], "update_ratio": 0.0}]
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, groups, lr=0.1, weight_update="folded")
    with torch.no_grad():
        t.A[0, 0] = math.nan
    s.A.grad = torch.ones_like(s.A)
    optimizer.step()
    assert float(scale) == 1.5


@pytest.mark.parametrize("mode", ["fold", None, "In_place", True])
def test_rules_that_do_not_exist_are_refused(mode):
    with pytest.raises(ValueError, match="weight_update is one of in_place, folded, got"):
        LayerRun(mode)


def packed_run(start=0, **options):
    """(layer, its scaling, optimizer, a step) of a W that cannot be written."""
    stored, scale = packed_layer(zero=start == 0), torch.tensor(0.5)
    optimizer = folded_optimizer(stored.triple(scale, "q"), start_step=start, **options)

    def step():
        (stored.A.sum() + stored.B.sum()).backward()
        optimizer.step()

    return stored, scale, optimizer, step


def test_a_weight_that_cannot_be_written_is_refused_in_place():
    triple = packed_layer().triple(torch.tensor(0.5), "q")
    with pytest.raises(ValueError, match=r"q: W has dtype torch\.uint8, .*weight_update=\"folded\""):
        DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)


def test_a_weight_that_cannot_be_written_needs_a_zero_product():
    stored, scale, optimizer, step = packed_run(start=2)
    step()
    step()
    refused(
        step,
        RuntimeError,
        r"(?s)the product A @ B is not zero.*nothing was changed.*Set start_step=0.*q: W has dtype torch\.uint8",
        lambda: [scale, stored.A.detach(), stored.B.detach(), optimizer.step_count],
    )
    assert float(scale) == 0.5


def test_a_weight_that_cannot_be_written_trains_from_a_zero_product():
    """Refuse what needs W; the displacement, the export and the base of the branch do not need it."""
    stored, scale, optimizer, step = packed_run(keep_base="cpu")
    W = stored.W.clone()
    step()
    assert float(scale) == 1.5
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    step()
    assert torch.equal(stored.W, W)
    for action in (optimizer.restart, lambda: deltaopt.merged_weights(optimizer), lambda: optimizer.residual("q")):
        refused(action, RuntimeError, r"q: W has dtype torch\.uint8", lambda: [scale, stored.W, stored.A.detach()])
    with optimizer.base_weights():
        assert float(scale) == 0.5
    change = deltaopt.export_adapter(optimizer)["q"]
    torch.testing.assert_close(change.product(), 1.5 * (stored.A @ stored.B).detach())


def test_factors_without_a_product_are_refused_with_a_packed_weight():
    stored = packed_layer()
    B = stored.B.detach()[:2].clone().requires_grad_()
    triple = LoRATriple(stored.W, stored.A, B, scaling=torch.tensor(1.0), name="q")
    with pytest.raises(ValueError, match=r"q: A \(5, 3\) and B \(2, 7\) have no product"):
        DeltaLoRAOptimizer(torch.optim.SGD, [triple], weight_update="folded")


def test_factors_of_other_dimensions_are_refused_with_a_packed_weight():
    stored = packed_layer()
    A = stored.A.detach()[None].clone().requires_grad_()
    triple = LoRATriple(stored.W, A, stored.B, scaling=torch.tensor(1.0), name="q")
    with pytest.raises(ValueError, match=r"q: A \(1, 5, 3\) and B \(3, 7\) have no product"):
        DeltaLoRAOptimizer(torch.optim.SGD, [triple], weight_update="folded")


@pytest.mark.parametrize("W", [{"dtype": torch.float8_e4m3fn}, {"device": "meta"}], ids=["float8", "meta"])
def test_a_weight_that_is_never_read_may_be_anything(W):
    stored, scale = strategies.make("linear", zero_A=True), torch.tensor(0.5)
    triple = LoRATriple(stored.W.to(**W), stored.A, stored.B, scaling=scale, name="q")
    optimizer = folded_optimizer(triple)
    (stored.A.sum() + stored.B.sum()).backward()
    optimizer.step()
    assert float(scale) == 1.5
    torch.testing.assert_close(optimizer.displacement("q").product(), (stored.A @ stored.B).detach())


def test_an_unnamed_triple_is_not_folded_twice():
    stored, scale = strategies.make("linear"), torch.tensor(0.5, dtype=torch.float64)
    triple = LoRATriple(stored.W, stored.A, stored.B, scaling=scale)
    optimizer = folded_optimizer(triple)
    stored.A.grad = torch.ones_like(stored.A)
    optimizer.step()
    assert triple.branch_scaling == 1.5
    with pytest.raises(ValueError, match="another optimizer has folded its update_ratio"):
        folded_optimizer(triple)


def test_a_weight_with_another_user_is_refused():
    """In place the other user moves with W; folded, W stays, and the other user would train another model."""
    W, A, B = torch.randn(4, 6), torch.zeros(4, 2, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    triple = LoRATriple(W, A, B, scaling=torch.tensor(0.5), name="head")
    triple.tie()
    with pytest.raises(ValueError, match=r'head: its W is used in another place too.*weight_update="in_place"'):
        DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update="folded")
    DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)


def test_triples_that_another_optimizer_has_folded_are_refused():
    """All by name, under either rule, and when they are added later; the first optimizer continues."""
    layers = [linear_layer(name, seed) for seed, name in enumerate("ab")]
    first = folded_optimizer(*(triple for *_, triple in layers))

    def step():
        first.zero_grad()
        for s, scale, _ in layers:
            (s.W + scale * s.A @ s.B).square().sum().backward()
        first.step()

    step()
    match = r"another optimizer has folded its update_ratio into the branch of a, b: make"
    for rule in RULES:
        refused(
            lambda rule=rule: DeltaLoRAOptimizer(torch.optim.AdamW, first.triples, weight_update=rule),
            ValueError,
            match,
            lambda: [scale for _, scale, _ in layers],
        )
    other = folded_optimizer(linear_layer("c", 2)[2])
    refused(
        lambda: other.add_param_group({"triples": first.triples[:1]}),
        ValueError,
        "another optimizer has folded its update_ratio into the branch of a: make",
    )
    step()
    assert first.step_count == 2


def test_a_write_that_fails_at_step_K_is_made_again(monkeypatch):
    """At once, so that the branches and what was taken from W agree when the error is raised."""
    layers = [linear_layer(str(i), i, zero=False) for i in range(3)]
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [t for *_, t in layers], lr=0.0, weight_update="folded")
    for s, *_ in layers:
        s.A.grad = torch.ones_like(s.A)
    effective = [(s.W + scale * (s.A @ s.B)).detach() for s, scale, _ in layers]
    internals.fail_at_write(monkeypatch, 3)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        optimizer.step()
    assert optimizer.step_count == 0
    monkeypatch.undo()
    for gradient in (1.0, None):
        assert [float(scale) for _, scale, _ in layers] == [1.5] * 3
        for (s, scale, _), expected in zip(layers, effective, strict=True):
            torch.testing.assert_close((s.W + scale * (s.A @ s.B)).detach(), expected, rtol=1e-14, atol=1e-14)
        if gradient:
            optimizer.zero_grad()
            optimizer.step()
    assert optimizer.step_count == 1
