"""The ledger's algebra: terms that add up to what W was asked to move by."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaopt import ledger as ledger_module
from deltaopt.ledger import Ledger, rank_limit
from deltaopt.lowrank import Term
from tests.support import internals, strategies
from tests.support.compare import assert_close, close

PLACES = [Path(ledger_module.__file__).parent / name for name in ("ledger.py", "lowrank.py", "all_or_nothing.py")]
"""The files whose lines an exception can come between."""


def factors_of(generator, c=9, d=7, r=2, lead=()):
    A, B = torch.randn(*lead, c, r, generator=generator), torch.randn(*lead, r, d, generator=generator)
    return A.double(), B.double()


def sum_of(ledger, shape=(9, 7)):
    return sum((t.coef * t.A @ t.B for t in ledger.displacement()), torch.zeros(shape, dtype=torch.float64))


def ledger_with_a_matrix(shape=(9, 7), lead=(), seed=0, dtype=torch.float64):
    """Return a ledger that has summed up some terms, with others that wait and a product that runs, and their sum."""
    generator = torch.Generator().manual_seed(seed)
    ledger, dense = Ledger(), torch.zeros(*lead, *shape, dtype=torch.float64)

    def add(count):
        for _ in range(count):
            term = Term(0.7, *(factor.to(dtype) for factor in factors_of(generator, *shape, lead=lead)))
            ledger.add(term)
            dense.add_(term.coef * term.A.double() @ term.B.double())

    add(3)
    ledger.sum_up()
    add(2)
    start, end = (tuple(factor.to(dtype) for factor in factors_of(generator, *shape, lead=lead)) for _ in range(2))
    ledger.extend(0.3, start, None)
    ledger.end = end
    dense.add_(0.3 * (end[0].double() @ end[1].double() - start[0].double() @ start[1].double()))
    return ledger, dense


def test_a_ledger_with_one_more_term_leaves_the_first_as_it_is():
    generator = torch.Generator().manual_seed(0)
    first, second = Term(0.7, *factors_of(generator)), Term(-0.2, *factors_of(generator))
    ledger = Ledger()
    ledger.add(first)
    longer = ledger.plus(second)
    assert_close(sum_of(ledger), first.coef * first.A @ first.B)
    assert_close(sum_of(longer), first.coef * first.A @ first.B + second.coef * second.A @ second.B)


@given(seed=strategies.seeds, events=strategies.ledger_events, few=st.booleans())
def test_terms_add_up_to_the_dense_account(seed, events, few):
    """Mix moves, changes of the coefficient, of the factors between moves, additions, restarts and sums."""
    with pytest.MonkeyPatch.context() as patch:
        if few:
            internals.keep_few_terms(patch)
        follow(seed, events)


def follow(seed, events):
    generator = torch.Generator().manual_seed(seed)
    ledger, dense, coef = Ledger(), torch.zeros(9, 7, dtype=torch.float64), 0.5
    live = factors_of(generator)
    for event in events:
        if event == "coef":
            coef += 0.25
        elif event == "outside":
            live = factors_of(generator)
        elif event == "sum":
            ledger.sum_up(work=3 * 9 * 7 * 2)
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


def test_a_product_that_has_not_changed_adds_nothing_to_its_anchor():
    generator = torch.Generator().manual_seed(0)
    first, later = factors_of(generator), factors_of(generator)
    ledger = Ledger()
    ledger.extend(0.5, first, None)
    ledger.end = first
    assert ledger.displacement() == []
    ledger.extend(1.5, first, None)  # another coefficient, and still the same factors
    assert ledger.displacement() == []
    ledger.end = later
    assert_close(sum_of(ledger), 1.5 * (later[0] @ later[1] - first[0] @ first[1]))


@pytest.mark.parametrize(
    ("c", "d", "r", "limit"), [(768, 768, 8, 192), (384, 384, 8, 96), (9, 7, 2, 64), (300, 300, 40, 160)]
)
def test_terms_are_kept_until_they_are_half_as_large_as_the_weight(c, d, r, limit):
    assert rank_limit(c, d, r) == limit


def test_terms_that_nobody_sums_up_are_so_once_they_are_as_large_as_the_weight():
    """Take restarts alone: 64 is the limit, twice that the end. No step comes that would do it in shares."""
    ledger, generator = Ledger(), torch.Generator().manual_seed(0)
    sizes, dense = [], torch.zeros(9, 7, dtype=torch.float64)
    for _ in range(200):
        branch = factors_of(generator)
        ledger.restart(2.0, branch)
        dense += 2.0 * branch[0] @ branch[1]
        sizes.append(ledger.nbytes)
    assert max(sizes) == (128 * (9 + 7) + 9 * 7) * 8
    assert ledger.is_matrix
    assert_close(sum_of(ledger), dense, 1e-12)


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (7, 7)])
def test_a_matrix_is_a_term_of_the_smallest_rank(shape, lead):
    ledger, dense = ledger_with_a_matrix(shape, lead)
    assert_close(sum_of(ledger, (*lead, *shape)), dense, 1e-13)
    assert [term.rank for term in ledger.terms] == [2, 2, 2, 7]
    ledger.sum_up()
    assert [term.rank for term in ledger.terms] == [7]
    assert_close(sum_of(ledger, (*lead, *shape)), dense, 1e-13)


def test_what_was_a_matrix_is_one_again():
    """Set terms as a state that is loaded does: the identity is not kept, and later terms go on being added."""
    ledger, dense = ledger_with_a_matrix()
    twin = Ledger()
    twin.terms, twin.coef, twin.end = ledger.terms, ledger.coef, ledger.end
    assert twin.is_matrix
    assert twin.nbytes == ledger.nbytes == 3 * 2 * (9 + 7) * 8 + 9 * 7 * 8
    assert_close(sum_of(twin), dense, 1e-13)
    other = Ledger()
    other.terms = [Term(2.0, *ledger.terms[-1][1:]), Term(1.0, torch.ones(9, 7), torch.ones(7, 7))]
    assert not other.is_matrix


def test_work_is_limited_but_never_nothing():
    """Add one term at least; else as many as fit."""
    ledger, generator = Ledger(), torch.Generator().manual_seed(0)
    for _ in range(6):
        ledger.add(Term(1.0, *factors_of(generator)))
    one = ledger.work()
    assert one == 9 * 7 * 2
    assert [ledger.sum_up(work) for work in (0, 2 * one, one - 1, 100 * one, 100 * one)] == [
        one,
        2 * one,
        one,
        2 * one,
        0,
    ]


def test_a_float32_matrix_loses_no_more_than_rounding():
    ledger, generator = Ledger(), torch.Generator().manual_seed(0)
    dense = torch.zeros(30, 20, dtype=torch.float64)
    for t in range(500):
        A, B = (factor.float() for factor in factors_of(generator, 30, 20))
        coef = 1.0 / (t + 1)
        ledger.add(Term(coef, A, B))
        ledger.sum_up()
        dense += coef * A.double() @ B.double()
    assert ledger.terms[0].A.dtype == torch.float32
    assert close(sum_of(ledger, (30, 20)), dense, 1e-6)


def test_a_matrix_of_inference_mode_is_written_outside_of_it():
    """A state_dict that was made in inference mode has summed terms up."""
    with torch.inference_mode():
        ledger, dense = ledger_with_a_matrix()
        ledger = copy.deepcopy(ledger)
    assert ledger.terms[-1].A.is_inference()
    ledger.sum_up()
    assert_close(sum_of(ledger), dense, 1e-13)


EVENTS = {
    "extend": lambda ledger, one, other: ledger.extend(0.9, one, None),
    "extend after an outside change": lambda ledger, one, other: ledger.extend(0.9, one, other),
    "add": lambda ledger, one, other: ledger.add(Term(0.4, *one)),
    "restart": lambda ledger, one, other: ledger.restart(2.0, one),
    "restart from the end": lambda ledger, one, other: ledger.restart(2.0, ledger.end),
    "close": lambda ledger, one, other: ledger.close(),
    "displacement": lambda ledger, one, other: ledger.displacement(),
    "to": lambda ledger, one, other: ledger.to(torch.device("cpu"), torch.float64),
    "sum up": lambda ledger, one, other: ledger.sum_up(),
    "sum up one": lambda ledger, one, other: ledger.sum_up(0),
}


class _InterruptError(BaseException):
    pass


def interrupted(action, number):
    """Raise at line number `number` of those that `action` runs in the ledger; return False if it runs fewer."""
    places, seen = set(map(str, PLACES)), 0

    def tracer(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename not in places:
            return None
        if event == "line":
            seen += 1
            if seen == number:
                raise _InterruptError
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        action()
    except _InterruptError:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("event", EVENTS)
def test_an_exception_at_any_line_finds_the_ledger_before_or_after(event, few, monkeypatch):
    """What was recorded and coef change together, and a ledger that was interrupted can be used as any other."""
    if few:
        internals.keep_few_terms(monkeypatch)  # the limit is then passed within the event
    kept, _ = ledger_with_a_matrix()
    generator = torch.Generator().manual_seed(9)
    one, other, third = (factors_of(generator) for _ in range(3))
    for _ in range(8 if few else 0):
        kept.restart(1.0, factors_of(generator))
    kept.end = third

    def told(ledger):
        return sum_of(ledger), ledger.coef, ledger.end is None

    def later(ledger):
        ledger.extend(1.1, other, ledger.end)
        ledger.end = one
        ledger.sum_up()
        return told(ledger)

    def equal(a, b):
        return close(a[0], b[0], 1e-12) and a[1:] == b[1:]

    complete = copy.deepcopy(kept)
    EVENTS[event](complete, one, other)
    expected = {"before": told(copy.deepcopy(kept)), "after": told(copy.deepcopy(complete))}
    ends = {"before": later(copy.deepcopy(kept)), "after": later(copy.deepcopy(complete))}
    number = 1
    while True:
        ledger = copy.deepcopy(kept)
        if not interrupted(lambda ledger=ledger: EVENTS[event](ledger, one, other), number):
            break
        found = [name for name, account in expected.items() if equal(told(copy.deepcopy(ledger)), account)]
        assert found, number
        end = later(ledger)
        assert any(equal(end, ends[name]) for name in found), number
        number += 1
    assert number > 3


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
    for _ in range(2):
        ledger.add(Term(0.5, torch.ones(3, 1), torch.ones(1, 4)))
    ledger.sum_up(0)
    assert ledger.to(torch.device("cpu"), dtype) is ledger
    assert {t.dtype for t in ledger.end} == {t.dtype for term in ledger.terms for t in term[1:]} == {dtype}
