"""A NaN or infinite factor never reaches any W; the step is counted and reported once."""

import contextlib
import copy

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer
from tests.support import internals, strategies
from tests.support.runs import LayerRun

NOT_FINITE = "became NaN or infinite: the update of every W was skipped"


def two_layers(dtype=torch.float32, **options):
    """Build two layers of different shapes whose factors have gradients."""
    stored = [strategies.make(layout, dtype=dtype) for layout in ("linear", "rows")]
    triples = [s.triple(name=str(i)) for i, s in enumerate(stored)]
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1, **options)
    for s in stored:
        s.A.grad, s.B.grad = torch.ones_like(s.A), torch.ones_like(s.B)
    return stored, optimizer


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("letter", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_of_any_layer_is_touched(value, letter, dtype):
    stored, optimizer = two_layers(dtype)
    before = [s.W.clone() for s in stored]
    getattr(stored[1], letter).grad.view(-1)[0] = value
    with pytest.warns(RuntimeWarning, match=NOT_FINITE):
        optimizer.step()
    assert all(torch.equal(s.W, w) for s, w in zip(stored, before, strict=True))
    assert optimizer.skipped_updates == 1
    assert optimizer.step_count == 1


def test_a_factor_that_was_bad_before_the_step():
    stored, optimizer = two_layers()
    before = stored[0].W.clone()
    with torch.no_grad():
        stored[1].B[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match=NOT_FINITE):
        optimizer.step()
    assert torch.equal(stored[0].W, before)


def test_later_ones_are_counted_without_a_warning():
    stored, optimizer = two_layers()
    stored[0].A.grad[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match=NOT_FINITE):
        optimizer.step()
    optimizer.step()  # warnings are errors here
    assert optimizer.skipped_updates == 2


def test_the_warning_points_at_the_users_line():
    stored, optimizer = two_layers()
    stored[0].A.grad[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match=NOT_FINITE) as caught:
        optimizer.step()
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("ignore:A and B of .* were changed between two steps")
@pytest.mark.parametrize("rule", strategies.RULES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_reaches_no_weight_by_either_rule(rule, value):
    """Make a factor bad at the step that first moves W, and later."""
    for start_step in (0, 2):
        run = LayerRun(rule, zero=False, start_step=start_step).train(2)
        W = run.stored.W.clone()
        with torch.no_grad():
            run.stored.B[0, 0] = value
        run.backward()
        if rule == "folded" and start_step == 0:
            run.optimizer.step()  # the ratio stays, so W is not written
        else:
            with pytest.warns(RuntimeWarning, match=NOT_FINITE), told_of_the_change(run, start_step):
                run.optimizer.step()
        assert run.optimizer.skipped_updates == (rule != "folded" or start_step == 2)
        assert torch.equal(run.stored.W, W)
        assert float(run.scale) == (0.5 if rule == "in_place" else 1.5)


def told_of_the_change(run, start_step):
    """Expect the warning of a W in place that has moved before B was changed."""
    if run.rule != "in_place" or start_step > 0:
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match="were changed between two steps")


def test_during_the_warm_up_nothing_is_checked_or_counted():
    stored, optimizer = two_layers(start_step=5)
    stored[0].A.grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_updates == 0


def test_finite_steps_are_applied_and_not_counted():
    stored, optimizer = two_layers()
    before = stored[0].W.clone()
    optimizer.step()
    assert optimizer.skipped_updates == 0
    assert not torch.equal(stored[0].W, before)


def test_the_count_survives_copies():
    stored, optimizer = two_layers()
    stored[0].A.grad[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match=NOT_FINITE):
        optimizer.step()
    assert copy.deepcopy(optimizer).skipped_updates == 1


def masked_update(change, dtype=torch.float32):
    """Take the path of a GPU on a CPU: the host does not know which weights move."""
    stored = [strategies.make("linear", seed, dtype=dtype) for seed in range(3)]
    rule, weights = internals.as_on_a_gpu()(), [internals.weight_of(s.triple(), 0.5) for s in stored]
    rule.before_step(weights, internals.AUTO, None)
    before = [s.matrices() for s in stored]
    with torch.no_grad():
        change(stored)
    rule.after_step(weights, internals.AUTO)
    rule.warn(stacklevel=1)
    return stored, before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masking_moves_what_changed_and_nothing_else(dtype):
    def change(stored):
        stored[1].A.mul_(1.5)
        stored[2].B.add_(0.25)

    stored, before = masked_update(change, dtype)
    assert torch.equal(stored[0].W, before[0][0])
    for s, old in zip(stored[1:], before[1:], strict=True):
        W, A, B = (t.double() for t in s.matrices())
        W_old, A_old, B_old = (t.double() for t in old)
        assert torch.allclose(W, W_old + 0.5 * (A @ B - A_old @ B_old), rtol=0.01)


def test_masking_makes_every_coefficient_negative():
    """Keep every bit whatever the sign of scaling: +0 times a negative number is -0, which is added without effect."""
    stored = [strategies.make("linear", seed) for seed in range(2)]
    rule, coefs, dense = internals.as_on_a_gpu()(), (0.5, -0.5), []
    weights = [internals.weight_of(s.triple(), coef) for s, coef in zip(stored, coefs, strict=True)]
    rule.before_step(weights, internals.AUTO, None)
    before = [s.matrices() for s in stored]
    with torch.no_grad():
        for s in stored:
            s.A.mul_(1.5)
    rule.after_step(weights, internals.coefs_noted(lambda coef, U, V: dense.append((coef, U @ V))))
    assert len(dense) == len(weights)
    for (used, product), coef, (_, A, B) in zip(dense, coefs, before, strict=True):
        assert used == -0.5
        assert torch.allclose(used * product, coef * 0.5 * A @ B, atol=1e-14)


def test_masking_drops_everything_for_one_bad_factor():
    def change(stored):
        stored[1].A.mul_(1.5)
        stored[2].B[0, 0] = float("inf")

    with pytest.warns(RuntimeWarning, match=NOT_FINITE):
        stored, before = masked_update(change)
    assert all(torch.equal(s.W, old[0]) for s, old in zip(stored, before, strict=True))
