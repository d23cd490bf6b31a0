"""What a command gives back: text for a reader and data for a program, or one line that says what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

SHOWN = 300
"""Characters of another library's message that are shown."""


class Outcome(NamedTuple):
    """The result of a command.

    Attributes:
        text: what is printed; may have several lines.
        data: the same as dicts, lists, numbers and strings, printed with ``--json``.
    """

    text: str
    data: dict[str, Any]


class UserError(Exception):
    """Something is wrong with what was given. The message is printed in one line, without a traceback."""


@contextmanager
def refusals(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turn the exceptions with which a function refuses what it was given into a `UserError`.

    Put it around the call of that function alone, so that a defect elsewhere keeps its traceback.

    Args:
        kinds: which the function documents. Default: ValueError, TypeError and RuntimeError.
        prefix: what the message begins with, such as a path.
    """
    caught = kinds or (ValueError, TypeError, RuntimeError)
    try:
        yield
    except caught as error:
        raise UserError(prefix + str(error)) from error


def one_line(text: str) -> str:
    """Return a message of several lines as one; after a headline that ends in a colon, its lines are separated."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    joined = ""
    for line in lines:
        separator = "" if not joined else " " if joined[-1] in ":.;," else "; "
        joined += separator + line
    return joined


def reason_of(error: Exception) -> str:
    """Return what another library says of an input, in one line that is not long."""
    text = one_line(str(error)) or type(error).__name__
    return text[:SHOWN] + " ..." * (len(text) > SHOWN)
