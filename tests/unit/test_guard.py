"""A NaN or infinite factor never reaches any W; the step is counted and reported once."""

import copy

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from deltaopt.guard import FiniteGuard
from deltaopt.update import FactoredDelta
from tests.support import internals, strategies

WARNING = "became NaN or infinite: the update of every W was skipped"


def poisoned(dtype=torch.float32, **options):
    """Two layers of different shapes; the next step makes one factor of the second not finite."""
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
    stored, optimizer = poisoned(dtype)
    before = [s.W.clone() for s in stored]
    getattr(stored[1], letter).grad.view(-1)[0] = value
    with pytest.warns(RuntimeWarning, match=WARNING):
        optimizer.step()
    assert all(torch.equal(s.W, w) for s, w in zip(stored, before, strict=True))
    assert optimizer.skipped_updates == 1
    assert optimizer.step_count == 1


def test_a_factor_that_was_bad_before_the_step():
    stored, optimizer = poisoned()
    before = stored[0].W.clone()
    with torch.no_grad():
        stored[1].B[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match=WARNING):
        optimizer.step()
    assert torch.equal(stored[0].W, before)


def test_later_ones_are_counted_without_a_warning():
    stored, optimizer = poisoned()
    stored[0].A.grad[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match=WARNING):
        optimizer.step()
    optimizer.step()  # warnings are errors here
    assert optimizer.skipped_updates == 2


def test_the_warning_points_at_the_users_line():
    stored, optimizer = poisoned()
    stored[0].A.grad[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match=WARNING) as caught:
        optimizer.step()
    assert caught[0].filename == __file__


def test_during_the_warm_up_nothing_is_checked_or_counted():
    stored, optimizer = poisoned(start_step=5)
    stored[0].A.grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.skipped_updates == 0


def test_finite_steps_are_applied_and_not_counted():
    stored, optimizer = poisoned()
    before = stored[0].W.clone()
    optimizer.step()
    assert optimizer.skipped_updates == 0
    assert not torch.equal(stored[0].W, before)


def test_the_count_survives_copies():
    stored, optimizer = poisoned()
    stored[0].A.grad[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match=WARNING):
        optimizer.step()
    assert copy.deepcopy(optimizer).skipped_updates == 1


def masked_update(monkeypatch, change, dtype=torch.float32):
    """The path of a GPU, where the host does not know which W's move, taken on a CPU."""
    from deltaopt import update

    stored = [strategies.make("linear", seed, dtype=dtype) for seed in range(3)]
    delta = FactoredDelta()
    delta.snapshot([internals.move_of(LoRATriple(s.W, s.A, s.B), 0.5) for s in stored])
    before = [s.matrices() for s in stored]
    with torch.no_grad():
        change(stored)
    monkeypatch.setattr(update, "_known_to_host", lambda device: False)
    delta.apply_(FiniteGuard(), internals.AUTO)
    return stored, before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masking_moves_what_changed_and_nothing_else(monkeypatch, dtype):
    def change(stored):
        stored[1].A.mul_(1.5)
        stored[2].B.add_(0.25)

    stored, before = masked_update(monkeypatch, change, dtype)
    assert torch.equal(stored[0].W, before[0][0])
    for s, old in zip(stored[1:], before[1:], strict=True):
        W, A, B = (t.double() for t in s.matrices())
        W_old, A_old, B_old = (t.double() for t in old)
        assert torch.allclose(W, W_old + 0.5 * (A @ B - A_old @ B_old), rtol=0.01)


def test_masking_makes_every_coefficient_negative(monkeypatch):
    """Whatever the sign of scaling: +0 times a negative number is -0, and adding that keeps every bit."""
    from deltaopt import update, writing

    stored = [strategies.make("linear", seed) for seed in range(2)]
    delta, coefs, dense = FactoredDelta(), (0.5, -0.5), []
    delta.snapshot([internals.move_of(s.triple(), coef) for s, coef in zip(stored, coefs, strict=True)])
    before = [s.matrices() for s in stored]
    with torch.no_grad():
        for s in stored:
            s.A.mul_(1.5)
    monkeypatch.setattr(update, "_known_to_host", lambda device: False)
    monkeypatch.setattr(writing, "add_to_weight_", lambda triple, W, U, V, coef, *_: dense.append((coef, U @ V)))
    delta.apply_(FiniteGuard(), internals.AUTO)
    for (used, product), coef, (_, A, B) in zip(dense, coefs, before, strict=True):
        assert used == -0.5
        assert torch.allclose(used * product, coef * 0.5 * A @ B, atol=1e-14)


def test_masking_drops_everything_for_one_bad_factor(monkeypatch):
    def change(stored):
        stored[1].A.mul_(1.5)
        stored[2].B[0, 0] = float("inf")

    with pytest.warns(RuntimeWarning, match=WARNING):
        stored, before = masked_update(monkeypatch, change)
    assert all(torch.equal(s.W, old[0]) for s, old in zip(stored, before, strict=True))
