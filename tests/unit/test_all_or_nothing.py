"""Noting what was done."""

import ctypes
import signal
from functools import partial

import pytest
import torch

from deltaopt.all_or_nothing import note


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
