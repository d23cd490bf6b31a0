"""The folded rule with a ratio that changes: when W is written, what an interruption or a bad factor leaves.

That it follows the paper with every schedule is in tests/conformance, what it tells of the change in test_rules.
"""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple
from deltaopt.lowrank import Term
from tests.support import internals, strategies
from tests.support.compare import close, refused, relative
from tests.support.folded import folded_optimizer, in_place_and_folded, linear_layer, packed_layer
from tests.support.interruption import interrupt
from tests.support.nightly import one_in
from tests.support.runs import LayerRun, assert_agrees, assert_follows
from tests.support.strategies import SCHEDULES, R

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
NOT_FINITE = "became NaN or infinite: the update of every W was skipped"


@pytest.mark.parametrize("zero", [True, False], ids=["zero product", "another product"])
@each_schedule
def test_w_is_written_where_the_ratio_changes_and_nowhere_else(monkeypatch, schedule, zero):
    """By one product of inner size r, and not at all while the product is zero."""
    ratio, sizes = SCHEDULES[schedule], internals.inner_sizes(monkeypatch)
    run, old = LayerRun("folded", zero=zero, update_ratio=ratio), 0.0
    for t in range(12):
        before, product = run.stored.W.clone(), run.product()
        run.train()
        expected = before - (ratio(t) - old) * run.scaling * product
        written = ratio(t) != old and bool(product.any())
        assert torch.equal(run.stored.W, before) != written
        torch.testing.assert_close(run.stored.W, expected, rtol=0, atol=1e-13)
        assert sizes == [R] * written
        assert float(run.scale) == run.scaling * (1 + ratio(t))
        old = ratio(t)
        sizes.clear()


SETTINGS = [
    {"update_ratio": 1.0},
    {"update_ratio": 0.0},
    {"update_ratio": 3.0, "start_step": 12},
    {"start_step": 0},
    {"update_ratio": SCHEDULES["oscillating"]},
    {"update_ratio": 0.5},
]


@pytest.mark.parametrize("zero", [True, False])
def test_settings_that_change_between_steps_are_followed(zero):
    runs = in_place_and_folded(2, zero=zero)
    for settings in SETTINGS:
        for run in runs:
            for name, value in settings.items():
                setattr(run.optimizer.groups[0], name, value)
            run.train(2)
        in_place, folded = runs
        assert_agrees(folded, in_place)
    assert float(folded.scale) == 0.75


@given(
    events=strategies.events("folded", min_size=4, max_size=14),
    layout=strategies.layouts,
    schedule=strategies.schedules,
    seed=strategies.seeds,
    zero=st.booleans(),
)
def test_whatever_happens_it_agrees_with_the_rule_in_place(events, layout, schedule, seed, zero):
    runs = in_place_and_folded(layout=layout, seed=seed, zero=zero, update_ratio=SCHEDULES[schedule])
    for event in events:
        for run in runs:
            if event in ("ratio", "off"):  # these count from a number
                run.optimizer.groups[0].update_ratio = run.optimizer.groups[0].ratio_at(run.optimizer.step_count)
            run.happen(event)
    in_place, folded = runs
    assert_agrees(folded, in_place)


@each_schedule
def test_gradients_that_are_not_zeroed_continue_through_a_change(schedule):
    in_place, folded = in_place_and_folded(zero=False, update_ratio=SCHEDULES[schedule])
    for run in (in_place, folded):
        for t in range(10):
            run.loss(run.effective(), t).backward()
            run.optimizer.step()
    assert_follows(folded, in_place)


@each_schedule
def test_a_closure_sees_the_ratio_of_its_step(schedule):
    runs = in_place_and_folded(zero=False, update_ratio=SCHEDULES[schedule])
    for run in runs:
        run.train(10, by_closure=True)
    in_place, folded = runs
    assert_agrees(folded, in_place)


def test_an_inner_step_that_fails_after_a_change_may_be_repeated():
    in_place, folded = in_place_and_folded(3, zero=False, update_ratio=SCHEDULES["ramp"])
    for run in (in_place, folded):
        run.backward()
        kept = [factor.grad.clone() for factor in run.factors]
        with pytest.raises(ZeroDivisionError, match="division by zero"):
            run.optimizer.step(lambda: 1 / 0)
        for factor, gradient in zip(run.factors, kept, strict=True):
            factor.grad = gradient
        run.step()
        run.train(2)
    assert_agrees(folded, in_place)


def test_compensated_rounding_keeps_every_change():
    """W with what was cut off is the base and all changes, to float32."""
    options = {"dtype": torch.bfloat16, "factor_dtype": torch.float32, "rounding": "compensated"}
    run = LayerRun("folded", zero=False, update_ratio=SCHEDULES["random"], **options).train(20)
    terms = internals.ledger_of(run.optimizer).displacement()
    asked = sum(term.coef * term.A.double() @ term.B.double() for term in terms)
    assert len(terms) > 10
    assert close(internals.full_weight(run.optimizer).double() - run.base(), asked, 1e-5)


# A factor that is not finite.


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("host", ["of a CPU", "of a GPU"])
def test_a_factor_that_is_not_finite_at_a_change_reaches_no_weight(host, value):
    """Of two layers neither is written; the branches change, W and the ledgers stay, and it is counted."""
    rule = "folded" if host == "of a CPU" else internals.folded_as_on_a_gpu()
    layers = [linear_layer(name, seed, zero=False) for seed, name in enumerate("ab")]
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [t for *_, t in layers], lr=0.0, weight_update=rule)

    def step():
        optimizer.zero_grad()
        for s, scale, _ in layers:
            (s.W + scale * (s.A @ s.B)).square().sum().backward()
        optimizer.step()

    step()
    weights = [s.W.clone() for s, *_ in layers]
    displaced = [t.product() for t in map(optimizer.displacement, "ab")]
    A = layers[0][0].A.detach()
    kept = A.clone()
    optimizer.groups[0].update_ratio = 5.0
    A[0, 0] = value
    with pytest.warns(RuntimeWarning, match=NOT_FINITE) as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    A.copy_(kept)
    assert [torch.equal(s.W, W) for (s, *_), W in zip(layers, weights, strict=True)] == [True, True]
    assert [float(scale) for _, scale, _ in layers] == [3.0, 3.0]
    assert optimizer.skipped_updates == copy.deepcopy(optimizer).skipped_updates == 1
    for (s, *_), before in zip(layers, displaced, strict=True):  # the branch has 3 s A B more, and W no term for it
        name = "ab"[s is layers[1][0]]
        expected = before + 3.0 * 0.5 * (s.A @ s.B).detach()
        torch.testing.assert_close(optimizer.displacement(name).product(), expected)
    step()
    optimizer.groups[0].update_ratio = 1.0
    step()  # W is written again
    assert not any(torch.equal(s.W, W) for (s, *_), W in zip(layers, weights, strict=True))
    assert optimizer.skipped_updates == 1


@pytest.mark.parametrize("ratio", [1.0, 5.0], ids=["down", "up"])
@pytest.mark.parametrize("scaling", [0.5, -0.5])
@pytest.mark.parametrize("host", ["of a CPU", "of a GPU"])
def test_it_leaves_every_bit(host, scaling, ratio):
    """Also those of -0.0, which a product of zeros would turn into 0.0."""
    rule = "folded" if host == "of a CPU" else internals.folded_as_on_a_gpu()
    run = LayerRun("folded", zero=False, scaling=scaling, weight_update=rule, lr=0.0).train(1)
    W = run.stored.W
    W.copy_(torch.where(W > 0.5, -0.0, W))
    before = W.clone().view(torch.int64)
    assert bool(((W == 0) & W.signbit()).any())
    run.optimizer.groups[0].update_ratio = ratio
    with torch.no_grad():
        run.stored.B[0, 0] = math.nan
    with pytest.warns(RuntimeWarning, match=NOT_FINITE):
        run.optimizer.step()
    assert torch.equal(W.view(torch.int64), before)


def test_later_ones_are_counted_without_a_warning():
    run = LayerRun("folded", zero=False, lr=0.0).train(1)
    with torch.no_grad():
        run.stored.B[0, 0] = math.nan
    run.optimizer.groups[0].update_ratio = 1.0
    with pytest.warns(RuntimeWarning, match=NOT_FINITE):
        run.optimizer.step()
    run.optimizer.groups[0].update_ratio = 3.0
    run.optimizer.step()  # warnings are errors here
    run.optimizer.step()  # no change
    assert run.optimizer.skipped_updates == 2


# A host that does not wait.


@each_schedule
@pytest.mark.parametrize("zero", [True, False])
def test_masking_gives_the_same_bits(schedule, zero):
    runs = [
        LayerRun("folded", zero=zero, update_ratio=SCHEDULES[schedule], **options).train(12)
        for options in ({}, {"weight_update": internals.folded_as_on_a_gpu()})
    ]
    assert all(map(torch.equal, *(run.tensors for run in runs)))
    assert_agrees(*runs)


def test_a_host_that_does_not_read_waits_until_w_was_written_and_never_again(monkeypatch):
    """Before that it has to know whether W stays pristine."""
    asked, is_zero = [], Term.is_zero
    monkeypatch.setattr(Term, "is_zero", lambda term: (asked.append(1), is_zero(term))[1])
    rule = internals.folded_as_on_a_gpu()
    run, waits = LayerRun("folded", update_ratio=SCHEDULES["ramp"], start_step=1, weight_update=rule), []
    for _ in range(6):
        run.train()
        waits.append(bool(asked))
        asked.clear()
    assert waits == [False, True, False, False, False, False]


# A W that cannot be written.


def packed_run(**options):
    """(optimizer, layer, its scaling, a step) of a W that cannot be written, whose A starts at zero."""
    stored, scale = packed_layer(zero=True), torch.tensor(0.5)
    optimizer = folded_optimizer(stored.triple(scale, "q"), **options)

    def step():
        (stored.A.sum() + stored.B.sum()).backward()
        optimizer.step()

    return optimizer, stored, scale, step


def test_a_changed_ratio_is_refused_for_a_weight_that_cannot_be_written():
    """Nothing is changed, and with the ratio put back it trains."""
    optimizer, stored, scale, step = packed_run()
    step()
    optimizer.groups[0].update_ratio = 1.0
    refused(
        step,
        RuntimeError,
        r"(?s)update_ratio changes \(at start_step from 0\) while the product A @ B is not zero.*nothing was changed.*"
        r"leave update_ratio as it is.*q: W has dtype torch\.uint8",
        lambda: [scale, stored.W, stored.A.detach(), stored.B.detach(), optimizer.step_count],
    )
    optimizer.groups[0].update_ratio = 2.0
    step()
    assert optimizer.step_count == 2


def test_a_changed_ratio_is_taken_for_such_a_weight_while_the_product_is_zero():
    optimizer, _, scale, step = packed_run(lr=0.0)
    step()
    optimizer.groups[0].update_ratio = 1.0
    step()
    assert float(scale) == 1.0
    assert not optimizer.weights()[0].moved


def test_such_a_weight_with_a_factor_that_is_not_finite_is_not_asked_to_be_written():
    optimizer, stored, scale, step = packed_run(lr=0.0)
    with torch.no_grad():
        stored.A[0, 0] = math.nan
    with pytest.warns(RuntimeWarning, match=NOT_FINITE):
        step()
    assert (float(scale), optimizer.skipped_updates) == (1.5, 1)


VARYING = r"q: W has dtype torch\.uint8.*a callable update_ratio may change at any step: use a number"


def test_a_callable_ratio_is_refused_for_a_weight_that_cannot_be_written():
    with pytest.raises(ValueError, match=f"(?s)these triples cannot be used.*{VARYING}"):
        packed_run(update_ratio=lambda step: 2.0)
    optimizer = folded_optimizer(linear_layer("a", 1)[2])
    group = {"triples": [packed_layer(zero=True).triple(torch.tensor(0.5), "q")], "update_ratio": lambda step: 2.0}
    with pytest.raises(ValueError, match=f"(?s)these triples cannot be used.*{VARYING}"):
        optimizer.add_param_group(group)
    assert len(optimizer.triples) == 1


def test_a_callable_ratio_that_is_set_later_is_refused_for_such_a_weight():
    optimizer, stored, scale, step = packed_run()
    step()
    optimizer.groups[0].update_ratio = lambda step: 2.0
    for _ in range(2):
        refused(
            step,
            RuntimeError,
            f"(?s)nothing was changed.*{VARYING}",
            lambda: [scale, stored.W, stored.A.detach(), stored.B.detach(), optimizer.step_count],
        )
    optimizer.groups[0].update_ratio = 2.0
    step()
    assert optimizer.step_count == 2


# Layers that share something.


def test_callables_of_layers_that_share_a_factor_are_compared_at_each_step():
    (s, _, triple), (t, scale, _) = linear_layer("a", 0), linear_layer("b", 1)
    shared = LoRATriple(t.W, s.A, t.B, scaling=scale, name="b")
    groups = [
        {"triples": [triple], "update_ratio": lambda step: 1.0 + (step > 1)},
        {"triples": [shared], "update_ratio": lambda step: 1.0},
    ]
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD([s.A, s.B, t.B], lr=0.1), groups, weight_update="folded")

    def step():
        (s.A.sum() + s.B.sum() + t.B.sum()).backward()
        optimizer.step()

    step()
    step()
    refused(
        step,
        ValueError,
        "b: its A is a factor of a too, which has another update_ratio",
        lambda: [scale, s.W, t.W, s.A.detach(), s.B.detach(), optimizer.step_count],
    )


def test_a_ratio_that_changes_every_step_is_warned_of_once_and_stays_exact():
    torch.manual_seed(0)
    W, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in ((300, 300), (300, 8), (8, 300)))
    W0, scale = W.clone(), torch.tensor(1.0, dtype=torch.float64)
    triple = LoRATriple(W, A.requires_grad_(), B.requires_grad_(), scaling=scale, name="q")
    optimizer = folded_optimizer(triple, update_ratio=lambda step: 1.0 + step / 50)

    def train():
        for _ in range(30):
            optimizer.zero_grad()
            sum((f * torch.randn_like(f)).sum() for f in (A, B)).backward()
            optimizer.step()

    with pytest.warns(RuntimeWarning, match="kept as matrices as large as the weights") as caught:
        train()
    assert [warning.filename for warning in caught] == [__file__]
    assert internals.ledger_of(optimizer).is_matrix
    effective = W + scale * (A @ B).detach()
    assert close(W0 + deltaopt.export_adapter(optimizer)["q"].product(), effective, 1e-12)


# An interruption.


class TwoLayers:
    """Two layers whose ratio changes at every step, with the dense account of what W was asked to move by."""

    def __init__(self) -> None:
        self.layers = [linear_layer(name, seed, zero=False) for seed, name in enumerate("ab")]
        self.problems = [strategies.Problem(s.W.shape, i) for i, (s, *_) in enumerate(self.layers)]
        self.optimizer = folded_optimizer(
            *(t for *_, t in self.layers), inner=torch.optim.AdamW, lr=0.02, update_ratio=SCHEDULES["down to 0 and up"]
        )
        self.expected = self.effective()

    def effective(self):
        return [(s.W + scale * (s.A @ s.B)).detach().clone() for s, scale, _ in self.layers]

    def products(self):
        return [(s.A @ s.B).detach() for s, *_ in self.layers]

    def backward(self):
        self.optimizer.zero_grad()
        for (s, scale, _), problem in zip(self.layers, self.problems, strict=True):
            problem(s.W + scale * (s.A @ s.B), self.optimizer.step_count).backward()

    def step(self):
        """Step, and note what the effective weights then have to be: also where it is interrupted."""
        before, ratio = self.products(), self.optimizer.groups[0].ratio_at(self.optimizer.step_count)
        try:
            self.optimizer.step()
        finally:
            moved = [after - was for after, was in zip(self.products(), before, strict=True)]
            self.expected = [W + (1 + ratio) * 0.5 * delta for W, delta in zip(self.expected, moved, strict=True)]

    def train(self, steps):
        for _ in range(steps):
            self.backward()
            self.step()
        return self

    def assert_in_order(self):
        exported = deltaopt.export_adapter(self.optimizer)
        with self.optimizer.base_weights():
            bases = [s.W.clone() for s, *_ in self.layers]
        for i, (now, expected) in enumerate(zip(self.effective(), self.expected, strict=True)):
            assert relative(now, expected) < 1e-12
            assert relative(bases[i] + exported["ab"[i]].product(), expected) < 1e-12


@pytest.mark.parametrize(("steps", "error"), one_in(2, [0, 2, 5], [KeyboardInterrupt, MemoryError]))
def test_a_change_that_is_interrupted_anywhere_is_whole(steps, error):
    """The effective weights are right at once, and the run ends where an uninterrupted one does."""
    whole = TwoLayers().train(steps + 3)
    for line in itertools.count(1 + steps, 5 if error is KeyboardInterrupt else 11):
        run = TwoLayers().train(steps)
        run.backward()
        if not interrupt(run.step, internals.before_folded_step, line, error):
            assert line > 100
            return
        run.assert_in_order()
        run.train(3)
        run.assert_in_order()
        assert all(relative(now, then) < 1e-12 for now, then in zip(run.effective(), whole.effective(), strict=True))


def test_a_write_that_fails_twice_is_completed_by_the_next_step(monkeypatch):
    """A write that fails is tried again at once; if that fails too, it is done first by what comes next."""
    run, whole = TwoLayers().train(2), TwoLayers().train(5)
    run.backward()
    internals.fail_at_write(monkeypatch, 2, 3)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        run.step()
    assert not all(relative(now, then) < 1e-12 for now, then in zip(run.effective(), run.expected, strict=True))
    monkeypatch.undo()
    run.optimizer.step()  # has the gradients of before
    run.optimizer.zero_grad()
    run.expected = run.effective()
    run.train(2)
    run.assert_in_order()
    assert all(relative(now, then) < 1e-12 for now, then in zip(run.effective(), whole.effective(), strict=True))


@pytest.mark.parametrize("event", ["flush", "state_dict", "deepcopy", "rebase"])
def test_what_a_failed_write_left_open_is_done_before_any_other_event(monkeypatch, event):
    run = TwoLayers().train(2)
    run.backward()
    before = run.effective()
    internals.fail_at_write(monkeypatch, 1, 2)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        run.step()
    monkeypatch.undo()
    actions = {
        "flush": lambda: run.optimizer.displacement("a"),
        "state_dict": run.optimizer.state_dict,
        "deepcopy": lambda: copy.deepcopy(run.optimizer),
        "rebase": run.optimizer.rebase,
    }
    actions[event]()
    assert all(relative(now, then) < 1e-13 for now, then in zip(run.effective(), before, strict=True))
