"""Noting what was done."""

import signal
from functools import partial

import pytest
import torch

from deltaopt.all_or_nothing import note


class _InterruptError(Exception):
    pass


def test_the_result_of_the_call_is_noted():
    done = ["before"]
    note(done, lambda: 3)
    assert done == ["before", 3]


def test_a_call_that_raises_is_not_noted():
    done = []
    with pytest.raises(ZeroDivisionError):
        note(done, partial(divmod, 1, 0))
    assert done == []


def test_a_signal_during_the_call_is_handled_after_it_is_noted():
    def interrupt(number, frame):
        raise _InterruptError

    A, done, begun = torch.randn(1500, 1500), [], 0

    def multiply_for_ever():
        nonlocal begun
        while True:
            begun += 1
            note(done, partial(A.mm, A))

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.005)
        with pytest.raises(_InterruptError):
            multiply_for_ever()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # The loop itself takes next to no time, so the signal came during a product: that product is in the list.
    assert len(done) == begun
