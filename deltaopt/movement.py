"""The movement of one W since its base, as the hooks on its layer see it: that of a running optimizer, or of a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from deltaopt.checkpoint.fingerprint import Fingerprint
from deltaopt.lowrank import Term
from deltaopt.tensors import outside_inference_mode

if TYPE_CHECKING:
    from deltaopt.weight import WeightState


class Movement(Protocol):
    """What a hook asks of one W. All of it may change from one forward pass to the next."""

    def moved(self) -> bool:
        """Tell if W is another one than its base now."""

    def terms(self) -> Sequence[Term]:
        """Return low-rank terms that add up to what W was asked to move by.

        Raises:
            RuntimeError: if that is not known, with the layer's name and the reason.
        """

    def base(self) -> Tensor | None:
        """Return a copy of the part of W that moves, from before its first move; None if none is kept."""

    def belongs_to(self, part: Tensor) -> bool:
        """Tell if it is the movement of this W, given as the part that moves; that of a copy may have been written."""

    def weight(self) -> Tensor | None:
        """Return W as it is stored now; None in a copy, which does not know it."""


class RunningMovement:
    """The movement that an optimizer counts. It outlives the optimizer, as W does.

    Args:
        state: of the W.
        settle: completes what the optimizer has left open: an interrupted step, reports that a GPU has not sent.
    """

    def __init__(self, state: WeightState, settle: Callable[[], None]) -> None:
        self.state = state
        self._settle = settle
        self._mark: tuple[object, ...] = ()  # of the ledger, when the terms were looked up
        self._terms: Sequence[Term] = ()

    def moved(self) -> bool:
        """Tell if W was written since its base, and no `base_weights` has brought that back for a while."""
        claim = self.state.claim
        return self.state.base is not None and (claim is None or not claim.owner.at_base)

    @torch.no_grad()
    def terms(self) -> Sequence[Term]:
        """Return the terms of the ledger; those that are still moving are the ledger's own tensors."""
        with outside_inference_mode():
            self._settle()
            ledger = self.state.ledger
            if not _is_at(self._mark, (ledger, *ledger.mark())):
                if ledger.lost is not None:
                    raise RuntimeError(f"{self.state.label}: {ledger.lost}")
                self._terms = ledger.displacement()
                self._mark = ledger, *ledger.mark()
        return self._terms

    def base(self) -> Tensor | None:
        """Return the copy of ``keep_base``, if it is of the base."""
        base = self.state.base
        return None if base is None or not self.state.copies_base else self.state.base_copy(base)

    def belongs_to(self, part: Tensor) -> bool:
        """Return True: whoever writes W in the place of the optimizer says so by `rebase` or by loading a state."""
        return True

    def weight(self) -> Tensor:
        """Return W as it is stored now."""
        return self.state.triple.W


class CopiedMovement:
    """The movement of a W that was copied or pickled with its model: it does not change any more.

    Args:
        terms: that add up to it.
        fingerprint: of the part of W that moves.
    """

    def __init__(self, terms: Sequence[Term], fingerprint: Fingerprint | None) -> None:
        self._terms = [term.cloned() for term in terms]
        self.fingerprint = fingerprint
        self._checked: tuple[object, ...] | None = None

    def moved(self) -> bool:
        """Tell if there is any."""
        return bool(self._terms)

    def terms(self) -> Sequence[Term]:
        """Return the terms as they were when the copy was made."""
        return self._terms

    def base(self) -> None:
        """Return None: a copy of the base is not copied."""

    def record(self) -> dict[str, Any] | None:
        """Return W's fingerprint as plain data."""
        return None if self.fingerprint is None else self.fingerprint.record()

    @classmethod
    def of_record(cls, terms: Sequence[Sequence[Any]], record: dict[str, Any] | None) -> CopiedMovement:
        """Return the movement that was pickled as plain data."""
        return cls([Term(*term) for term in terms], None if record is None else Fingerprint.of_record(record))

    def belongs_to(self, part: Tensor) -> bool:
        """Tell if W is what it was when it was copied."""
        # A tensor of inference mode has no version, so that it is compared at each call.
        version = None if part.is_inference() else (part._version, part.data_ptr(), part.dtype)
        if version is None or self._checked != version:
            if self.fingerprint is None or Fingerprint(part).record() != self.fingerprint.record():
                return False
            self._checked = version
        return True

    def weight(self) -> None:
        """Return None."""


def copied(movement: Movement, part: Tensor) -> CopiedMovement:
    """Return the movement as it is now, for a copy of the layer and of the part of W that moves."""
    if not movement.moved():
        return CopiedMovement((), None)
    return CopiedMovement(movement.terms(), Fingerprint(part))


def is_shared(movement: Movement, memo: dict[int, Any]) -> bool:
    """Tell if a `deepcopy` that is under way leaves W out, so that the copy has the very same one."""
    W = movement.weight()
    return W is not None and memo.get(id(W)) is W


def _is_at(mark: tuple[object, ...], now: tuple[object, ...]) -> bool:
    """Compare two marks of ledgers, without looking into tensors."""
    return len(mark) == len(now) and all(
        one is other or (isinstance(one, int) and one == other) for one, other in zip(mark, now, strict=True)
    )
