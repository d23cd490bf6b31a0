"""Noting what was done."""

import copy
import ctypes
import signal
from functools import partial

import pytest
import torch

from deltaopt.all_or_nothing import Issued, note


class _InterruptError(Exception):
    pass


def test_a_call_is_noted_and_its_result_is_not_kept():
    done, results = [], [torch.ones(1)]
    note(done, results.pop)
    assert (len(done), results) == (1, [])
    assert not any(isinstance(entry, torch.Tensor) for entry in done)


def test_a_call_that_raises_is_not_noted():
    done = []
    with pytest.raises(ZeroDivisionError):
        note(done, partial(divmod, 1, 0))
    assert done == []


def test_a_signal_during_the_call_is_handled_after_it_is_noted():
    """Raise it in C, as one that arrives during a product: its handler runs before the next line of Python."""

    def interrupt(number, frame):
        raise _InterruptError

    send, done = getattr(ctypes.CDLL(None), "raise"), []
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(_InterruptError):
            note(done, partial(send, int(signal.SIGUSR1)))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(done) == 1


def test_a_mode_does_not_make_a_call_in_python_of_it():
    """Leave a default device, and any other mode of torch's, out of the call: its lines could be interrupted."""

    class Asking(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            raise _InterruptError

    A, B, done = torch.ones(2, 2), torch.ones(2, 2), []
    with Asking():
        note(done, partial(torch.Tensor.addmm_, A, B, B))
    assert len(done) == 1
    assert torch.equal(A, torch.full((2, 2), 3.0))


class Sent:
    """What a collective returns that is under way."""

    def __init__(self):
        self.waited = 0

    def wait(self):
        self.waited += 1


def test_a_computation_that_begins_again_waits_for_what_it_has_issued():
    issued, sent = Issued(), [Sent(), Sent(), Sent()]
    waiting = list(sent)
    assert [issued.output(name, partial(waiting.pop, 0)) for name in "ab"] == ["a", "b"]
    assert [issued.again().output("c", partial(waiting.pop, 0)), issued.output("d", None)] == ["a", "b"]
    assert issued.output("e", partial(waiting.pop, 0)) == "e"
    assert [work.waited for work in sent] == [2, 2, 1]


def test_a_collective_that_could_not_be_issued_or_that_failed_is_not_lost():
    issued = Issued()
    with pytest.raises(ZeroDivisionError):
        issued.output("a", partial(divmod, 1, 0))
    assert not issued.begun
    fails = [True]

    def wait(work):
        if fails:
            raise RuntimeError("its connection is closed")

    with pytest.raises(RuntimeError, match="closed"):
        issued.again().output("b", partial(fails.copy), wait)
    with pytest.raises(RuntimeError, match="closed"):
        issued.again().output("c", None, wait)
    fails.clear()
    assert issued.again().output("c", None, wait) == "b"


def test_a_copy_knows_of_no_collective():
    issued = Issued()
    issued.output("a", Sent)  # what cannot be copied in a run, and means nothing elsewhere
    assert issued.begun
    assert not copy.deepcopy(issued).begun
