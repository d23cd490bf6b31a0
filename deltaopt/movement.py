"""The movement of one W since its base, as the hooks on its layer see it: that of a running optimizer, or of a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from deltaopt.checkpoint.fingerprint import Fingerprint
from deltaopt.lowrank import Term
from deltaopt.outside import Watch, warn_of_loads
from deltaopt.tensors import outside_inference_mode

if TYPE_CHECKING:
    from deltaopt.base_hooks import OutputHook
    from deltaopt.weight import WeightState


class Movement(Protocol):
    """What a hook asks of one W. All of it may change from one forward pass to the next."""

    def moved(self) -> bool:
        """Tell if W differs from its base now."""

    def terms(self) -> Sequence[Term]:
        """Return low-rank terms that add up to what W was asked to move by.

        Raises:
            RuntimeError: if that is not known, with the layer's name and the reason.
        """

    def base(self) -> Tensor | None:
        """Return a copy of the part of W that moves, from before its first move; None if none is kept."""

    def problem(self, part: Tensor) -> str | None:
        """Say why it is not the movement of this W, given as the part that moves; None if it is."""

    def weight(self) -> Tensor | None:
        """Return W as it is stored now; None in a copy, which does not know it."""


class RunningMovement:
    """The movement that an optimizer counts. It outlives the optimizer, as W does.

    Args:
        state: of the W.
        settle: completes what the optimizer has left open: an interrupted step, reports that a GPU has not sent.
        watch: of the optimizer, for changes of A and B from outside; None if W need not follow them.
    """

    def __init__(self, state: WeightState, settle: Callable[[], None], watch: Watch | None = None) -> None:
        self.state = state
        self._settle = settle
        self._watch = watch
        self._looked: tuple[object, ...] = ()
        self._mark: tuple[object, ...] = ()  # of the ledger, when the terms were looked up
        self._terms: Sequence[Term] = ()

    def moved(self) -> bool:
        """Tell if W was written since its base, and no `base_weights` has brought that back for a while."""
        return self.state.is_off_base() and not self.state.at_base

    def look(self) -> None:
        """Warn if A and B differ from those that the last move left, so that W does not belong to them.

        With a folded ratio A and B hold what W would move by, and only a load of others than the present ratio's tells.

        On a GPU, where that waits for the device, it looks only in evaluation without gradients, and again only once
        A and B were written in a way that torch counts, or another step was made.
        """
        if self._watch is None:
            warn_of_loads([self.state])
            return
        if self.state.is_sharded:
            return  # steps compare what they start from, on all ranks; a forward pass would gather each layer for that
        on_host = self.state.triple.W.device.type == "cpu"
        if self._watch.rests or not (on_host or not torch.is_grad_enabled()):
            return
        with outside_inference_mode():
            if self.state.ledger.end is None:
                self._settle()
            end = self.state.ledger.end
            if end is None or not (on_host or self._is_new(*self.state.triple.parameters, end[0])):
                return
            self._settle()
            self._watch.look(self.state)

    def look_at_base(self) -> None:
        """Warn if W minus the terms is not the base, as somebody else has written W, and torch has counted that."""
        if self._watch is not None and self.state.written_by_others:
            with outside_inference_mode():
                self._settle()
                self._watch.look_at_base(self.state)

    def _is_new(self, *factors: Tensor) -> bool:
        """Tell if one of these tensors was replaced or written since the last call, as far as torch counts."""
        counts = [None if factor.is_inference() else factor._version for factor in factors]
        before, self._looked = self._looked, (*counts, *(factor.data_ptr() for factor in factors))
        return before != self._looked

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
        """Return the copy of ``keep_base``, if it is of the base; of a sharded W all ranks gather it."""
        base = self.state.base
        usable = base is not None and self.state.copies_base and not self.is_overwritten()
        copy = self.state.base_copy(base) if usable and base is not None else None
        return None if copy is None else self.state.whole(copy)

    def is_overwritten(self) -> bool:
        """Tell if another optimizer has written W since: then a copy of the base lacks what that one has moved."""
        claim = self.state.claim
        return claim is not None and claim.base_overwritten

    def problem(self, part: Tensor) -> None:
        """Return None: whoever writes W in the place of the optimizer says so by `rebase` or by loading a state."""

    def weight(self) -> Tensor:
        """Return W as it is stored now."""
        return self.state.triple.W


class FollowedMovement:
    """The movement that another hook knows, for other modules with the same W.

    Args:
        hook: whose `movement` it is, now and later.
    """

    def __init__(self, hook: OutputHook) -> None:
        self._hook = hook

    def moved(self) -> bool:
        """Tell if W differs from its base now."""
        return self._hook.movement is not None and self._hook.movement.moved()

    def terms(self) -> Sequence[Term]:
        """Return the terms that the other hook knows."""
        return () if self._hook.movement is None else self._hook.movement.terms()

    def base(self) -> Tensor | None:
        """Return the copy of the base that the other hook knows."""
        return None if self._hook.movement is None else self._hook.movement.base()

    def problem(self, part: Tensor) -> str | None:
        """Say why it is not the movement of this W."""
        return None if self._hook.movement is None else self._hook.movement.problem(part)

    def weight(self) -> Tensor | None:
        """Return W as it is stored now."""
        return None if self._hook.movement is None else self._hook.movement.weight()


class LentMovement:
    """The movement that W had when an adapter was copied: it belongs to the copy, next to the base.

    Args:
        hook: of the adapter that W moves for.
        terms: minus the movement, since W does not hold it in addition to what the adapter has moved it by.
    """

    def __init__(self, hook: OutputHook, terms: Sequence[Term]) -> None:
        assert hook.movement is not None
        self._hook = hook
        self._terms = [term.cloned() for term in terms]
        self._base = _base_record(hook.movement)

    @classmethod
    def of(cls, hook: OutputHook) -> LentMovement:
        """Return the movement for a copy of the adapter of this hook; W has not moved since the copy was made."""
        movement = hook.movement
        assert movement is not None
        if isinstance(movement, LentMovement):
            return cls(movement._hook, movement._terms)
        return cls(hook, [term._replace(coef=-term.coef) for term in movement.terms()])

    def moved(self) -> bool:
        """Tell if there is any."""
        return bool(self._terms)

    def terms(self) -> Sequence[Term]:
        """Return minus the movement at the time of the copy."""
        return self._terms

    def base(self) -> None:
        """Return None: there is no copy of W as it was at that time."""

    def problem(self, part: Tensor) -> str | None:
        """Say that W has got another base since, from which the movement would count."""
        movement = self._hook.movement
        if movement is None or _base_record(movement) != self._base:
            return (
                "it was copied from the adapter that trains, with the movement that W had then, and W has got another "
                "base since (rebase(), or another optimizer was built): copy the adapter again"
            )
        return None

    def weight(self) -> Tensor | None:
        """Return W as it is stored now."""
        return None if self._hook.movement is None else self._hook.movement.weight()


def _base_record(movement: Movement) -> object:
    """Return a value that is another one where W has got another base."""
    if isinstance(movement, RunningMovement):
        base = movement.state.base
        return None if base is None else base.record()
    return id(movement)


class CopiedMovement:
    """The movement of a W that was copied or pickled with its model: it does not change any more.

    Args:
        terms: that add up to it.
        fingerprint: of the part of W that moves.
        known: False if the original did not know its movement any more.
    """

    def __init__(self, terms: Sequence[Term], fingerprint: Fingerprint | None, known: bool = True) -> None:
        self._terms = [term.cloned() for term in terms]
        self._fingerprint = fingerprint
        self._known = known
        self._checked: tuple[object, ...] | None = None

    def moved(self) -> bool:
        """Tell if there is any, or may be."""
        return bool(self._terms) or not self._known

    def terms(self) -> Sequence[Term]:
        """Return the terms as they were when the copy was made."""
        return self._terms

    def base(self) -> None:
        """Return None: a copy of the base is not copied."""

    def record(self) -> tuple[Any, ...]:
        """Return it as plain data, to be pickled."""
        terms = [tuple(term) for term in self._terms]
        return terms, None if self._fingerprint is None else self._fingerprint.record(), self._known

    @classmethod
    def of_record(cls, terms: Sequence[Sequence[Any]], record: dict[str, Any] | None, known: bool) -> CopiedMovement:
        """Return the movement that was pickled as plain data."""
        fingerprint = None if record is None else Fingerprint.of_record(record)
        return cls([Term(*term) for term in terms], fingerprint, known)

    def problem(self, part: Tensor) -> str | None:
        """Say that W is not what it was when it was copied."""
        # A tensor of inference mode has no version, so that it is compared at each call.
        version = None if part.is_inference() else (part._version, part.data_ptr(), part.dtype)
        if version is None or self._checked != version:
            if self._fingerprint is None or Fingerprint(part).record() != self._fingerprint.record():
                return (
                    "this W is a copy that was written since (averaged, loaded or cast), so that its movement is not "
                    "known: copy the model again, or take the original"
                )
            self._checked = version
        return None

    def weight(self) -> None:
        """Return None."""


def copied(movement: Movement, part: Tensor) -> CopiedMovement:
    """Return the movement as it is now, for a copy of the layer and of the part of W that moves."""
    if not movement.moved():
        return CopiedMovement((), None)
    try:
        return CopiedMovement(movement.terms(), Fingerprint(part))
    except RuntimeError:  # not known any more, which is no reason not to copy a model
        return CopiedMovement((), None, known=False)


def is_shared(movement: Movement, memo: dict[int, Any]) -> bool:
    """Tell if a `deepcopy` that is under way leaves W out, so that the copy has the very same one."""
    W = movement.weight()
    return W is not None and memo.get(id(W)) is W


def _is_at(mark: tuple[object, ...], now: tuple[object, ...]) -> bool:
    """Compare two marks of ledgers, without looking into tensors."""
    return len(mark) == len(now) and all(
        one is other or (isinstance(one, int) and one == other) for one, other in zip(mark, now, strict=True)
    )
