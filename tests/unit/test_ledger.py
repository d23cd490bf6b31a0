"""The ledger's algebra: terms that add up to what W was asked to move by."""

import pytest
import torch
from hypothesis import given

from deltaopt.ledger import Ledger
from deltaopt.lowrank import Term
from tests.support import strategies
from tests.support.compare import assert_close


def factors_of(generator, c=9, d=7, r=2):
    A, B = torch.randn(c, r, generator=generator), torch.randn(r, d, generator=generator)
    return A.double(), B.double()


def sum_of(ledger, shape=(9, 7)):
    return sum((t.coef * t.A @ t.B for t in ledger.displacement()), torch.zeros(shape, dtype=torch.float64))


def test_a_ledger_with_one_more_term_leaves_the_first_as_it_is():
    generator = torch.Generator().manual_seed(0)
    first, second = Term(0.7, *factors_of(generator)), Term(-0.2, *factors_of(generator))
    ledger = Ledger()
    ledger.add(first)
    longer = ledger.plus(second)
    assert_close(sum_of(ledger), first.coef * first.A @ first.B)
    assert_close(sum_of(longer), first.coef * first.A @ first.B + second.coef * second.A @ second.B)


@given(seed=strategies.seeds, events=strategies.ledger_events)
def test_terms_add_up_to_the_dense_account(seed, events):
    """Mix moves, changes of the coefficient, changes of the factors between moves, additions and restarts."""
    generator = torch.Generator().manual_seed(seed)
    ledger, dense, coef = Ledger(), torch.zeros(9, 7, dtype=torch.float64), 0.5
    live = factors_of(generator)
    for event in events:
        if event == "coef":
            coef += 0.25
        elif event == "outside":
            live = factors_of(generator)
        elif event == "add":
            term = Term(0.7, *factors_of(generator))
            ledger.add(term)
            dense = dense + term.coef * term.A @ term.B
        elif event == "restart":
            ledger.restart(2.0, live)
            dense = dense + 2.0 * live[0] @ live[1]
            live = factors_of(generator)
        else:
            start, end = live, factors_of(generator)
            known = ledger.end is not None and all(map(torch.equal, ledger.end, start))
            if not known or ledger.coef != coef:
                ledger.extend(coef, start, None if known else ledger.end)
            ledger.end = live = end
            dense = dense + coef * (end[0] @ end[1] - start[0] @ start[1])
        assert_close(sum_of(ledger), dense, 1e-12)


def test_moves_of_one_coefficient_take_one_anchor():
    generator = torch.Generator().manual_seed(0)
    ledger, start = Ledger(), factors_of(generator)
    ledger.extend(0.5, start, None)
    for _ in range(5):
        ledger.end = end = factors_of(generator)
        assert [term.coef for term in ledger.displacement()] == [-0.5, 0.5]
    assert_close(sum_of(ledger), 0.5 * (end[0] @ end[1] - start[0] @ start[1]), 1e-13)


def test_the_rank_after_merging_counts():
    """Take eighteen products of rank 8, and one of them again: 144, between the limit of 134 and the bound of 150."""
    ledger, generator = Ledger(), torch.Generator().manual_seed(0)
    factors = [(torch.randn(300, 8, generator=generator), torch.randn(8, 300, generator=generator)) for _ in range(18)]
    for i in range(18):
        ledger.extend(1.0 + i, factors[i], None)
        assert ledger.lost is None
    ledger.extend(20.0, factors[3], None)
    assert "passed 134" in ledger.lost
    assert ledger.terms == []
    with pytest.raises(RuntimeError, match="the displacement is not known as low-rank terms any more"):
        ledger.displacement()


def test_counts_its_bytes():
    ledger = Ledger()
    assert ledger.nbytes == 0
    ledger.add(Term(1.0, torch.ones(9, 2), torch.ones(2, 7)))
    assert ledger.nbytes == 4 * 2 * (9 + 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_tensors_go_along_with_a_change_of_dtype(dtype):
    ledger = Ledger()
    ledger.end = torch.ones(3, 1), torch.ones(1, 4)
    ledger.coef = 2.0
    ledger.add(Term(0.5, torch.ones(3, 1), torch.ones(1, 4)))
    assert ledger.to(torch.device("cpu"), dtype) is ledger
    assert {t.dtype for t in ledger.end} == {t.dtype for term in ledger.terms for t in term[1:]} == {dtype}
