"""accelerate's global state, which one test would leave to the next."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def forgotten() -> Iterator[None]:
    """Forget accelerate's state before and after, where it was imported."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
