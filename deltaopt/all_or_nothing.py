"""Noting what was done, so that an interrupted event can be completed: nothing twice, and nothing left out."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any


def note(done: list[Any], call: Callable[[], Any]) -> None:
    """Call, and append the result to `done`, with no moment in between at which a signal handler could raise.

    A Ctrl-C that arrives while a large product is being written is handled right after it, before the next line of
    Python: a mark set in a statement of its own would be missing, and the product would be added again.

    Args:
        done: one entry for each call so far.
        call: a `functools.partial` of a function in C, such as a method of a tensor. Within one in Python an exception
            can come before or after its effect.
    """
    done.extend(map(operator.call, (call,)))
