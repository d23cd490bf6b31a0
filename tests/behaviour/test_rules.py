"""Properties of every rule: displacement, export, merged weights, the base, restarts and checkpoints.

What W was asked to move by is known from the dense account that `LayerRun` keeps of its own factors.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deltaopt
from tests.support import strategies
from tests.support.compare import assert_close, close, refused
from tests.support.runs import LayerRun, assert_agrees
from tests.support.strategies import EVENTS, LAYOUTS, ROUNDINGS, RULES, SCHEDULES, each_rule


@torch.no_grad()
def assert_account(run: LayerRun, tolerance: float = 1e-10) -> None:
    """Compare what the optimizer tells of the change of W: it is the dense account, and so is what W has made of it."""
    change = run.asked + run.scaling * run.product()
    assert close(run.displacement(), run.asked, tolerance)
    assert close(run.moved(), run.asked, tolerance)
    assert close(deltaopt.export_adapter(run.optimizer)["q"].product(), change, tolerance)
    merged = run.stored.matrix(deltaopt.merged_weights(run.optimizer)["q"])
    assert close(merged, run.base() + change, tolerance)
    before = [t.clone() for t in run.tensors]
    with run.optimizer.base_weights():
        assert close(run.stored.W, run.W0, tolerance)
        assert float(run.scale) == run.scaling
    assert all(map(torch.equal, run.tensors, before))


@pytest.mark.parametrize(("start", "zero"), [(0, True), (0, False), (3, False), (20, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_rule
def test_what_is_told_of_the_change_is_the_dense_account(rule, layout, start, zero):
    run = LayerRun(rule, layout, start_step=start, zero=zero).train(8)
    assert (float(run.asked.norm()) > 1e-2) == (start < 8)
    assert_account(run)


@given(
    data=st.data(),
    rule=strategies.rules,
    layout=strategies.layouts,
    seed=strategies.seeds,
    start=strategies.start_steps,
    ratio=strategies.ratios,
    zero=st.booleans(),
)
def test_whatever_happened_the_account_is_right(data, rule, layout, seed, start, ratio, zero):
    run = LayerRun(rule, layout, seed=seed, zero=zero, start_step=start, update_ratio=ratio, gradients="noise")
    for event in data.draw(strategies.events(rule)):
        run.happen(event)
        assert_account(run)


def test_every_rule_has_its_events():
    assert EVENTS.keys() == set(RULES)


@pytest.mark.parametrize("start", [0, 3, 50])
@each_rule
def test_before_the_start_it_is_the_inner_optimizer_bit_for_bit(rule, start):
    run, plain = LayerRun(rule, start_step=start), LayerRun(rule, update_ratio=0.0)
    for r in (run, plain):
        r.train(start)
    assert all(map(torch.equal, run.tensors, plain.tensors))
    assert float(run.scale) == float(plain.scale) == 0.5


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float64, "auto"), *((d, r) for d in (torch.bfloat16, torch.float16) for r in ("auto", *ROUNDINGS))],
)
@pytest.mark.parametrize("place", ["cpu", "device"])
@each_rule
def test_the_base_comes_back_bit_for_bit_from_a_kept_copy(rule, place, dtype, rounding):
    options = {"dtype": dtype, "factor_dtype": max(dtype, torch.float32, key=lambda d: d.itemsize)}
    run = LayerRun(rule, zero=False, keep_base=place, rounding=rounding, **options).train(4)
    moved, scale = run.stored.W.clone(), float(run.scale)
    assert not torch.equal(moved, run.W0)
    with run.optimizer.base_weights():
        assert torch.equal(run.stored.W, run.W0)
        assert float(run.scale) == 0.5
    assert torch.equal(run.stored.W, moved)
    assert float(run.scale) == scale == (1.5 if rule == "folded" else 0.5)


@pytest.mark.parametrize("zero", [True, False], ids=["to zero", "to another product"])
@pytest.mark.parametrize("start", [0, 4, 30])
@each_rule
def test_a_restart_moves_the_branch_into_w(rule, start, zero):
    """Also where the new product is not zero, of which a rule may have to take a part from W."""

    @torch.no_grad()
    def reinit(triple):
        generator = torch.Generator().manual_seed(5)
        triple.A.copy_(torch.randn(triple.A.shape, generator=generator, dtype=torch.float64) * (not zero))
        triple.B.copy_(torch.randn(triple.B.shape, generator=generator, dtype=torch.float64))

    run = LayerRun(rule, start_step=start, zero=False).train(6)
    for _ in range(2):
        effective = run.effective_exactly()
        run.asked += run.scaling * run.product()
        run.optimizer.restart(reinit)
        if zero:
            assert_close(run.effective_exactly(), effective, 1e-12)
        else:
            assert not close(run.effective_exactly(), effective, 1e-3)
        assert_account(run)
        run.train(4)
        assert_account(run)


@each_rule
def test_a_restart_with_a_product_that_is_not_finite_changes_nothing(rule):
    run = LayerRun(rule, zero=False).train(3)
    refused(
        lambda: run.optimizer.restart(lambda triple: triple.A.fill_(math.nan)),
        ValueError,
        "a factor of q is NaN or infinite",
        lambda: [*run.tensors, float(run.scale)],
    )


@pytest.mark.parametrize("W", ["saved", "base"])
@pytest.mark.parametrize(
    ("start", "stop", "zero"), [(0, 4, True), (3, 6, False), (6, 6, False), (9, 4, False), (0, 0, True)]
)
@each_rule
def test_a_resumed_run_continues(rule, start, stop, zero, W):
    """Bit for bit with W as it was; from the base to rounding."""
    run = LayerRun(rule, zero=zero, start_step=start).train(stop)
    twin = run.twin(whole=W == "saved", start_step=77, update_ratio=0.25, lr=9.0)
    for r in (run, twin):
        r.train(7)
        assert_account(r)
    assert_agrees(twin, run)
    if W == "saved":
        assert all(map(torch.equal, twin.tensors, run.tensors))


@pytest.mark.parametrize("W", ["saved", "base"])
@pytest.mark.parametrize("stop", [0, 1, 5, 9])
@pytest.mark.parametrize("schedule", SCHEDULES)
@each_rule
def test_a_run_resumes_in_the_middle_of_a_schedule(rule, schedule, stop, W):
    """The callable is not in the state; the ratio of the last step is, where the branch holds it."""
    run = LayerRun(rule, zero=False, start_step=1, update_ratio=SCHEDULES[schedule]).train(stop)
    twin = run.twin(whole=W == "saved", start_step=77)
    for r in (run, twin):
        r.train(6)
        assert_account(r)
    assert_agrees(twin, run)
    if W == "saved":
        assert all(map(torch.equal, twin.tensors, run.tensors))


@each_rule
def test_a_state_may_be_loaded_where_it_was_saved(rule):
    """As Accelerate does in `prepare`."""
    run, whole = (LayerRun(rule, start_step=2, zero=False).train(4) for _ in range(2))
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    for r in (run, whole):
        r.train(3)
    assert all(map(torch.equal, run.tensors, whole.tensors))


@each_rule
def test_a_state_of_another_rule_is_refused(rule):
    (other,) = set(RULES) - {rule}
    state, run = LayerRun(rule).train(2).optimizer.state_dict(), LayerRun(other).train(1)
    refused(
        lambda: run.optimizer.load_state_dict(state),
        ValueError,
        rf"saved with weight_update='{rule}', this optimizer has '{other}'",
        lambda: [*run.tensors, float(run.scale), run.optimizer.state_dict()],
    )
