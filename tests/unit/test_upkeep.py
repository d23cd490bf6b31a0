"""The upkeep of ledgers: bounded work for each step, and one warning in advance."""

import warnings

import pytest
import torch

from deltaopt.ledger import Ledger
from deltaopt.upkeep import STREAK, Upkeep, growth, settle
from tests.support.compare import close

R = 2


class Layers:
    """Some ledgers whose coefficient changes at every step, each with its dense account; a limit of 64, or 32 terms."""

    def __init__(self, shapes):
        self.generator = torch.Generator().manual_seed(0)
        self.ledgers = [Ledger() for _ in shapes]
        self.dense = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        self.live = [self.factors(shape) for shape in shapes]
        self.t = 0

    def factors(self, shape):
        c, d = shape
        A, B = torch.randn(c, R, generator=self.generator), torch.randn(R, d, generator=self.generator)
        return A.double(), B.double()

    def step(self):
        """Move every layer by the change of its factors, with a coefficient of this step."""
        self.t += 1
        for i, (ledger, dense) in enumerate(zip(self.ledgers, self.dense, strict=True)):
            start, coef = self.live[i], 0.1 * self.t
            ledger.extend(coef, start, None)
            ledger.end = self.live[i] = A, B = self.factors(dense.shape)
            dense += coef * (A @ B - start[0] @ start[1])

    def work_of_moves(self):
        return sum(2 * R * dense.numel() for dense in self.dense)

    def exact(self):
        sums = [sum(t.coef * t.A @ t.B for t in ledger.displacement()) for ledger in self.ledgers]
        return all(map(close, sums, self.dense))


@pytest.mark.parametrize("shapes", [[(20, 30)], [(20, 30), (40, 10)], [(20, 20)] * 24], ids=len)
def test_no_step_does_more_than_the_moves_of_W_and_one_term_and_the_account_is_exact(shapes, monkeypatch):
    """Count multiplications and products, over 300 steps that all change the coefficient."""
    layers, works = Layers(shapes), []

    def noting(self, work=None, sum_up=Ledger.sum_up):
        works[-1].append(sum_up(self, work))
        return works[-1][-1]

    monkeypatch.setattr(Ledger, "sum_up", noting)
    waiting = []
    for step in range(300):
        works.append([])
        layers.step()
        settle(layers.ledgers)
        waiting.append(max(ledger.ranks()[0] for ledger in layers.ledgers))
        if step % 30 == 0:
            assert layers.exact()
    assert layers.exact()
    assert not any(works[:32])  # up to the limit nothing is done
    assert max(map(sum, works)) <= layers.work_of_moves() + R * max(dense.numel() for dense in layers.dense)
    assert all(ledger.is_matrix for ledger in layers.ledgers)
    assert max(waiting) <= 2 * 64  # nobody had to sum up by itself
    assert max(waiting[150:]) <= 8 * R  # it keeps pace
    # Batches: each product reads and writes a whole matrix, so a term does not get one of its own.
    assert sum(map(len, works[150:])) <= 150 * len(shapes) / 2


def test_ledgers_that_are_small_are_left_alone():
    layers = Layers([(20, 30)] * 3)
    for _ in range(32):
        layers.step()
        settle(layers.ledgers)
    assert [len(ledger.terms) for ledger in layers.ledgers] == [32] * 3
    settle([])


def warnings_of(steps, layers, upkeep):
    """Take steps; return the number of the step and the text of each warning."""
    caught = []
    for step in steps:
        if step:
            layers.step()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            upkeep.after_step(layers.ledgers * 2 if step else [])  # twice, as on a GPU
            upkeep.warn(stacklevel=1)
        assert all(w.category is RuntimeWarning and w.filename == __file__ for w in found)
        caught += [(layers.t, str(w.message)) for w in found]
    return caught


def test_warns_once_half_way_before_the_ledgers_are_as_large_as_the_weights():
    """Rank 2 for each change: 32 of 64 at step 16, and 65 at step 33."""
    layers, upkeep = Layers([(300, 60)] * 3), Upkeep()
    ((step, text),) = warnings_of([True] * 60, layers, upkeep)
    assert step == 16
    assert "update_ratio has changed at each of the last 4 steps" in text
    assert "the ledgers of 3 weights. In about 17 steps" in text
    assert f"{3 * 300 * 60 * 8 / 2**20:.3g} MiB in all" in text
    assert "update_ratio=deltaopt.schedules.linear(start, end, steps, stages=10)" in text
    layers = Layers([(300, 60)])
    for _ in range(33):
        layers.step()
    assert layers.ledgers[0].overdue()


def test_changes_now_and_then_do_not_warn():
    """Three changes and a step without one, again and again: as many terms, but no ratio that always changes."""
    layers = Layers([(300, 60)])
    assert warnings_of(([True] * (STREAK - 1) + [False]) * 20, layers, Upkeep()) == []
    assert layers.ledgers[0].is_matrix
    assert layers.exact()


def test_a_matrix_that_is_smaller_than_the_terms_is_nothing_to_warn_of():
    layers = Layers([(12, 10)])
    assert warnings_of([True] * 60, layers, Upkeep()) == []
    assert layers.ledgers[0].is_matrix


def test_no_warning_for_ledgers_without_terms():
    assert growth([Ledger()]) is None
    assert growth([]) is None
