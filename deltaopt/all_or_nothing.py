"""Events that are all or nothing: one that is interrupted is completed, at once or at the next use.

An event writes several weights, and an exception can come between any two lines: a signal handler raises, memory runs
out. So the second half of each event is a function that may be called again and then does what is left of it. Setting
an attribute or copying into a tensor may be repeated. Adding to a W must not be, so each addition is noted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from deltaopt.messages import layers


def note(done: list[Any], call: Callable[[], Any]) -> None:
    """Call, and append an entry to `done`, with no moment in between at which a signal handler could raise.

    A Ctrl-C that arrives while a large product is being written is handled right after it, before the next line of
    Python: a mark set in a statement of its own would be missing, and the product would be added again.

    Args:
        done: one entry for each call so far.
        call: a `functools.partial` of a function in C, such as a method of a tensor. Within one in Python an exception
            can come before or after its effect.
    """
    if torch._C._len_torch_function_stack() == 0:
        done.extend(map(type, map(operator.call, (call,))))  # the type stands for the result, which may be a whole W
        return
    with torch._C.DisableTorchFunction():  # a mode, such as a default device, would make a call in Python of it
        done.extend(map(type, map(operator.call, (call,))))


def call_the_rest(done: list[Any], calls: Sequence[Callable[[], Any]]) -> None:
    """Make the calls that are not noted in `done` yet, in order; see `note`."""
    for call in calls[len(done) :]:
        note(done, call)


def note_result(results: list[Any], call: Callable[[], Any]) -> Any:
    """Do as `note`, and keep the result in the list; return it."""
    results.extend(map(operator.call, (call,)))
    return results[-1]


class Issued:
    """The collectives of one computation, each of which is issued once, however often the computation begins again.

    The other ranks answer a collective once. A rank that issued it again after an exception would wait for ever, or be
    answered by the next one. So the issue is noted with its output, and the computation, which asks for the same
    collectives in the same order each time, is given that output. A copy of it knows of none.
    """

    def __init__(self) -> None:
        self._issued: list[tuple[Any, Any]] = []
        self._count = 0

    def again(self) -> Issued:
        """Begin with the first one; return itself."""
        self._count = 0
        return self

    def output(self, output: Any, issue: Callable[[], Any], wait: Callable[[Any], object] | None = None) -> Any:
        """Issue the next collective, unless that was done before; return its output once it has come.

        Args:
            output: that the collective writes; the one of before is returned if it was issued before.
            issue: a `functools.partial` of a function in C, see `note`; it returns what to wait for, or None.
            wait: waits for that. Default: its method `wait`.
        """
        if self._count == len(self._issued):
            self._issued.extend(zip((output,), map(operator.call, (issue,)), strict=True))
        output, work = self._issued[self._count]
        if wait is not None:
            wait(work)
        elif work is not None:
            work.wait()
        self._count += 1
        return output

    @property
    def begun(self) -> bool:
        """True once a collective was issued."""
        return bool(self._issued)

    def __reduce__(self) -> tuple[type[Issued], tuple[()]]:
        return Issued, ()


class Event:
    """An event that is under way, or was interrupted.

    Args:
        what: its name, for messages.
        finish: does what is left of it, each time it is called.
        unfinished: returns the labels of the layers that are not in order yet. Default: of none.
        begun: gets an entry once the event has changed something, and so has to be completed. Default: it is then
            known by the exception that interrupts it.
    """

    def __init__(
        self,
        what: str,
        finish: Callable[[], None],
        unfinished: Callable[[], list[str]] | None = None,
        begun: list[Any] | None = None,
    ) -> None:
        self._what = what
        self._finish = finish
        self._unfinished = unfinished
        self.outer: Event | None = None
        self._begun = begun if begun is not None else []
        self._interrupted = False
        self._finished = False

    def has_to_be_completed(self) -> bool:
        """Tell if it was interrupted after it had changed something; one that is under way may not have yet."""
        return bool(self._begun) or self._interrupted

    def complete(self) -> None:
        """Do what is left of it, if anything is."""
        if not self._finished:
            self._finish()
            self._finished = True

    def complete_now(self) -> None:
        """Do what is left of it after an exception."""
        self._interrupted = True
        self.complete()

    def complete_later(self) -> None:
        """Do what is left of it, long after it was interrupted.

        Raises:
            RuntimeError: if that fails too.
        """
        try:
            self.complete()
        except Exception as error:
            left = [] if self._unfinished is None else self._unfinished()
            raise RuntimeError(
                f"{self._what} was interrupted earlier, and completing it has failed now"
                + (f": {layers(left)} not in order" if left else "")
                + f" ({type(error).__name__}: {error}). It is completed first whenever this optimizer is used, so "
                "remove the cause (free memory) and call again; or load the weights and the optimizer state of a "
                "checkpoint"
            ) from error


class Events:
    """The events of one optimizer: each is completed before another one begins."""

    def __init__(self) -> None:
        self._under_way: Event | None = None

    @contextmanager
    def begin(
        self,
        what: str,
        finish: Callable[[], None],
        unfinished: Callable[[], list[str]] | None = None,
        begun: list[Any] | None = None,
    ) -> Iterator[None]:
        """Call `finish` at the end. If it, or what is within, is interrupted, do what is left of it at once.

        If that fails too, it is left for `complete`. The arguments are those of `Event`.
        """
        event = Event(what, finish, unfinished, begun)
        event.outer = self._under_way
        self._under_way = event
        try:
            yield
            event.complete()
        except BaseException:
            event.complete_now()
            self._under_way = event.outer
            raise
        self._under_way = event.outer

    def complete(self) -> None:
        """Complete events that were interrupted, but not one that is under way: a closure may ask for a state.

        Raises:
            RuntimeError: if it cannot be completed.
        """
        while (event := self._under_way) is not None and event.has_to_be_completed():
            event.complete_later()
            self._under_way = event.outer

    def supersede(self) -> None:
        """Forget what could not be completed before the event under way, which says where everything is."""
        if self._under_way is not None:
            self._under_way.outer = None
