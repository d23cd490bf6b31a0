"""The roll call of one event: all ranks that share sharded tensors are in it and well, or each of them stops."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch

from deltaopt.ranks import Meeting, Ranks, RanksDisagreeError
from deltaopt.sharding import highest, ranks_of
from deltaopt.weight import WeightState


class RollCall:
    """The meeting of all ranks in one event; it takes place once, whatever is called how often.

    A signal on one rank does not end it: it is continued by the next call.

    Args:
        ranks: that share sharded tensors; None where nothing is sharded, and nobody has to come.
        event: its name, for messages.
        known: returns facts that have to be the same on all ranks; it is asked in the meeting, as an event completes
            first what was interrupted before it.

    Attributes:
        ranks: as given.
        facts: more of them, added before the meeting.
        failed: True if a rank has failed, or has not come.
    """

    def __init__(self, ranks: Ranks | None, event: str, known: Callable[[], Mapping[str, object]] = dict) -> None:
        self.ranks = ranks
        self._event = event
        self._known = known if ranks is not None else dict  # it may hold the optimizer, which holds its last event
        self.facts: dict[str, object] = {}
        self._over = False
        self._meeting = Meeting()
        self.failed = False

    @property
    def is_first(self) -> bool:
        """True on one of the ranks, which writes files for all; in a process that shares nothing too."""
        return self.ranks is None or self.ranks.is_first

    def meet(self, contents: Mapping[str, object] | None = None) -> None:
        """Return once all ranks are in the event.

        Args:
            contents: more facts by name, each of which is compared by a short hash of all that it holds.

        Raises:
            RanksDisagreeError: if one has failed, is in another event, or does not come.
        """
        if self._over or self.ranks is None:
            return
        for name, content in (contents or {}).items():
            self.facts[name] = content if isinstance(content, int) else _fingerprint_of(content)
        try:
            self.ranks.meet(self._event, {**self._known(), **self.facts}, meeting=self._meeting)
        except RanksDisagreeError:
            self._end(failed=True)
            raise
        self._end(failed=False)

    def tell(self, error: BaseException) -> None:
        """Tell the other ranks that this one has failed, if it has not told them that it is well; they raise then."""
        if self._over or self.ranks is None or self._meeting.issued.begun:
            return
        known = self._known
        self._end(failed=True)
        with suppress(BaseException):  # the caller raises its own error
            self.ranks.meet(self._event, {**known(), **self.facts}, error, self._meeting)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell the other ranks of an exception within it, if they are still to meet."""
        try:
            yield
        except BaseException as error:
            self.tell(error)
            raise

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Take a meeting of the same ranks for this one if it fails: all of them know that, and have left the event."""
        try:
            yield
        except BaseException:
            self._end(failed=True)
            raise

    def _end(self, failed: bool) -> None:
        self._over, self.failed, self._known = True, failed, dict

    def before(self, finish: Callable[[], None], succeeded: Callable[[], bool] = lambda: True) -> Callable[[], None]:
        """Return a function that meets and then calls `finish`, which looks at `failed`.

        Args:
            finish: may be called again after an exception.
            succeeded: tells if this rank has come to the end of what precedes `finish`; if not, the others are told.
        """

        def together() -> None:
            if succeeded():
                self.meet()
            else:
                self.tell(sys.exc_info()[1] or RuntimeError("interrupted"))
            finish()

        return together


def _fingerprint_of(facts: object) -> str:
    """Return a short text that is another one for other facts: numbers, strings, lists and dicts."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def ranks_that_share(weights: Sequence[WeightState], timeout: float | None, known: Ranks | None = None) -> Ranks | None:
    """Return the ranks that hold parts of the sharded tensors of these weights; None if there are none.

    Args:
        weights: with their tensors resolved.
        timeout: seconds that they wait for each other; None for as long as the default process group does.
        known: what the last call has returned; it is returned again if it is still right.
    """
    ranks = ranks_of([tensor for weight in weights for tensor in (weight.tensors.W, *weight.tensors.stored)])
    if not ranks:
        return None
    return known if known is not None and known.ranks == ranks else Ranks(ranks, timeout)


def look_at_written(weights: Sequence[WeightState], ranks: Ranks) -> None:
    """Look into each sharded W that was written since the last event on any rank; all of them have to call this.

    A loader may leave out a rank that holds nothing of a W, and so has nothing to write.
    """
    sharded = [weight for weight in weights if weight.is_sharded]
    if not sharded:
        return
    written = torch.tensor([weight.is_written() for weight in sharded], device=sharded[0].tensors.W.device)
    for weight, found in zip(sharded, highest(written.to(torch.int64), ranks.group).tolist(), strict=True):
        if found:
            weight.look_at_written()


def checked_timeout(timeout: object) -> float | None:
    """Return a timeout in seconds, or raise an error."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"rank_timeout is a number of seconds or None, got {timeout!r}")
    if not 0 < timeout < math.inf:
        raise ValueError(f"rank_timeout is a positive number of seconds, got {timeout!r}")
    return float(timeout)
