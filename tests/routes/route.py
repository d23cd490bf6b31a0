"""One route, and what becomes of a model on it."""

from __future__ import annotations

import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

import deltaopt
from tests.routes.runs import Model, Run
from tests.support.accelerate_state import forgotten

RIGHT, WRONG = 2e-4, 2e-3
"""Float32 models: a share of what training changed below which a model is right, and above which it is wrong."""

PACKAGE = Path(deltaopt.__file__).parent
ABOUT_US = re.compile(r"delta[-_]?lora|deltaopt", re.IGNORECASE)
"""Other libraries are heard if they say this; this package always is."""

MISTAKES = (AssertionError, AttributeError, ImportError, KeyError, NameError, TypeError)
"""Errors of these types are taken for mistakes in a route, unless this package raises them."""

SHOWN = 70
"""As many characters of a message are shown in the table."""


@dataclass(frozen=True)
class NotSeen:
    """Why a wrong model on a route is not noticed, and what to do instead.

    Args:
        columns: where it is so.
        reason: why neither side can say anything.
        way_out: what gives the right model.
    """

    columns: tuple[str, ...]
    reason: str
    way_out: str


@dataclass(frozen=True)
class Route:
    """A way by which a model leaves.

    Args:
        library: its name as a distribution.
        name: the calls, as a user writes them.
        take: trains the model of a run, lets it leave, and returns the model at the other end.
        kind: of the model.
        not_seen: where it is wrong without a word.
    """

    library: str
    name: str
    take: Callable[[Run], Model]
    kind: type[Run] = Run
    not_seen: NotSeen | None = None

    @property
    def key(self) -> str:
        return self.take.__name__

    def is_not_seen_in(self, column: str) -> bool:
        return self.not_seen is not None and column in self.not_seen.columns


def routes_of(module: ModuleType) -> list[Route]:
    """Return the routes that a module declares, in its order."""
    return [way for way in vars(module).values() if isinstance(way, Route) and way.take.__module__ == module.__name__]


def route(library: str, name: str, kind: type[Run] = Run, not_seen: NotSeen | None = None) -> Callable[..., Route]:
    """Make a route of the function that takes it; what is not named here is as in `Route`."""
    return lambda take: Route(library, name, take, kind, not_seen)


@dataclass
class Outcome:
    """What became of a model: "right", "loud" or "silent".

    Args:
        kind: one of these.
        error: from the truth, as a share of what training changed; None where an error was raised.
        words: what was said on the way, by this package or of it, an error first.
    """

    kind: str
    error: float | None
    words: list[str] = field(default_factory=list)

    @property
    def cell(self) -> str:
        """As the table shows it; what is said of a model that is right shows too, as it may be a false alarm."""
        if not self.words:
            return self.kind
        return f'{self.kind}{":" if self.kind == "loud" else ", saying"} "{shortened(self.words[0])}"'


def shortened(message: str) -> str:
    """Return the beginning of a message, without what differs between machines, as a cell of a table."""
    message = re.sub(r"(?<!\w)/\S*/", ".../", message)  # the folder of a run
    words = " ".join(message.split()).replace("|", "/").replace('"', "'").replace("`", "")
    return words if len(words) <= SHOWN else words[:SHOWN].rsplit(" ", 1)[0] + " ..."


def outcome_of(way: Route, column: str, folder: Path) -> Outcome:
    """Send a model down a route.

    Raises:
        AssertionError: if the model at the other end is neither right nor clearly wrong.
        Exception: if the route itself is wrong.
    """
    torch.manual_seed(0)
    run = way.kind(column, folder)
    with heard() as words, forgotten():
        try:
            error = run.error(way.take(run))
        except Exception as exception:
            if isinstance(exception, MISTAKES) and not _is_of_this_package(
                traceback.extract_tb(exception.__traceback__)
            ):
                raise
            return Outcome("loud", None, [str(exception), *words])
    assert not RIGHT < error < WRONG, f"{way.key}, {column}: off by {error:.1e}, which is neither right nor wrong"
    kind = "right" if error <= RIGHT else "loud" if words else "silent"
    return Outcome(kind, error, words)


@contextmanager
def heard() -> Iterator[list[str]]:
    """Give what is said inside, by this package or of it: warnings, and lines of logs."""
    words: list[str] = []
    handler = _Listener(words)
    loggers = [logging.getLogger(name) for name in (None, "transformers", "diffusers", "accelerate")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_, **__: _note(words, str(message), traceback.extract_stack()[:-1])
            yield words
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _Listener(logging.Handler):
    def __init__(self, words: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.words = words

    def emit(self, record: logging.LogRecord) -> None:
        _note(self.words, record.getMessage())


def _note(words: list[str], message: str, stack: list[traceback.FrameSummary] | None = None) -> None:
    called = [frame for frame in stack or [] if frame.filename != warnings.__file__]
    if ABOUT_US.search(message) or _is_of_this_package(called):
        words.append(message)


def _is_of_this_package(stack: list[traceback.FrameSummary]) -> bool:
    """Tell if the innermost call is one of this package."""
    return bool(stack) and Path(stack[-1].filename).is_relative_to(PACKAGE)
