"""Exceptions at any line of the package, as a signal or a failing allocation may raise them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import deltaopt

PACKAGE = str(Path(deltaopt.__file__).parent)


class Interruption:
    """Counts the lines of the package that run within one function."""

    def __init__(self) -> None:
        self.lines = 0


@contextmanager
def interrupted_at(
    function: Callable[..., Any], line: int | None, error: type[BaseException] = KeyboardInterrupt
) -> Iterator[Interruption]:
    """Raise `error` at the line of this number, counted from 1, that runs within `function`; None for none."""
    found, code, depth = Interruption(), function.__code__, 0

    def within(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal depth
        if event == "line":
            found.lines += 1
            if found.lines == line:
                raise error("at a line")
        elif event == "return" and frame.f_code is code:
            depth -= 1
        return within

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal depth
        if frame.f_code is code:
            depth += 1
        return within if depth and frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield found
    finally:
        sys.settrace(before)


def interrupt(
    event: Callable[[], Any], function: Callable[..., Any], line: int, error: type[BaseException] = KeyboardInterrupt
) -> bool:
    """Run `event`, and raise `error` at a line within `function`; return False if fewer lines have run.

    How many there are can change from run to run: claims ask after all optimizers that still exist.
    """
    raised = False
    try:
        with interrupted_at(function, line, error) as interruption:
            event()
    except error as caught:
        raised = str(caught) == "at a line"
    assert raised == (interruption.lines >= line), f"line {line}: the exception was lost"
    return raised
