"""Claims: which of the optimizers that were built on one W may write it, and which of them still know where it is.

Each optimizer counts the movement of a W as its own. Two that move one W in turn would both be wrong, and nothing in
their tensors tells. So the last one that was built, loaded a state or rebased holds the W; earlier ones can be read
until it has written W, and are refused by name afterwards.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import count
from typing import Literal, TypeAlias

from torch import Tensor

from deltaopt.sharding import local_part, piece_of
from deltaopt.tensors import is_plain, overlapping_pairs
from deltaopt.triple import LoRATriple

Use: TypeAlias = Literal["write", "read", "base"]
"""What an event does with a W: it may write it, it reads what was recorded of it, or it looks for its base."""


class Claimant:
    """The owner of the claims of one optimizer, which do not compete with each other.

    Attributes:
        at_base: True while every W is at the base of this optimizer.
    """

    def __init__(self) -> None:
        self.at_base = False


class Claim:
    """The claim of one optimizer on the W of one triple. Others are found by memory: views of W that overlap.

    Args:
        triple: whose W it is.
        owner: of the claims of the same optimizer.
        waits: True if W may never be written (folded): it is then claimed by the first write, and only its base
            depends on what other optimizers do until then.
        moved: tells if W is not at its base.
    """

    def __init__(self, triple: LoRATriple, owner: Claimant, waits: bool, moved: Callable[[], bool]) -> None:
        self.triple = triple
        self.owner = owner
        self.moved = moved
        self._waits = waits
        self._untaken = False
        self._number = 0
        self._wrote = False
        self._overwritten = False
        self._siblings: list[str] = []  # triples of the same optimizer on the same memory
        self._newer: list[weakref.ref[Claim]] = []  # whose optimizers hold W in place of this one's
        self._informs: list[weakref.ref[Claim]] = []  # of the others, once this one's optimizer writes W
        with _lock:
            _living.add(self)

    @property
    def superseded(self) -> bool:
        """True if another optimizer that still exists was built on W since."""
        return bool(self._newer) and not self._waits and any(other() is not None for other in self._newer)

    @property
    def base_overwritten(self) -> bool:
        """True if another optimizer has written W since this claim was made."""
        return self._overwritten

    @property
    def overwritten(self) -> bool:
        """True if another optimizer has written a W that this one had claimed."""
        return self._overwritten and not self._waits

    def is_settled(self) -> bool:
        """Tell if W was written and no other optimizer shares it: then nothing has to be checked or noted."""
        return self._wrote and not (self._waits or self._newer or self._informs or self._overwritten)

    def forbids(self, use: Use) -> bool:
        """Tell if the optimizer must not do this with W any more."""
        if self._informs and use != "read" and any(other.owner.at_base for other in _alive(self._informs)):
            return True  # W is at the base of an earlier optimizer, which will put its own bits back
        if use == "base":
            return self._overwritten
        return self.overwritten or (use == "write" and self.superseded)

    def first_write_problems(self) -> list[str]:
        """Say why a claim that waits cannot be made now.

        Two adapters of one optimizer share a W: what is written for one would be in the output of the other wherever
        that one is active alone. It would be right for the sum of both only, and the optimizer cannot see which of them
        are active.
        """
        if self._waits and self._siblings:
            return [
                f"W would have to be written, and it is the W of {', '.join(self._siblings)} too, whose adapter was "
                "not made for that: begin with a zero product, as LoRA's usual initialisation does, or train only one"
            ]
        if self._waits and any(other() is not None for other in self._newer):
            return [f"W would have to be written, and {SINCE}"]
        return []

    def before_write(self) -> None:
        """Note that W is about to be written by this claim's optimizer.

        Raises:
            RuntimeError: for a claim that waited, if another optimizer holds W by now, or another adapter needs it.
        """
        if self._waits:
            problems = self.first_write_problems()
            if problems:
                raise RuntimeError(f"{self.triple.label}: {problems[0]}")
            self._waits, self._untaken = False, True
        if self._untaken:
            take([self])
            self._untaken = False  # after it: an exception in between lets the next write take it
        self._wrote = True
        if self._informs:
            for other in _alive(self._informs):
                other._overwritten = True
            self._informs = []

    def _matrix(self) -> Tensor | None:
        """View the part of W that moves; None where it cannot be read now."""
        return _matrix_of(self.triple)


def _matrix_of(triple: LoRATriple) -> Tensor | None:
    with suppress(RuntimeError, ValueError, IndexError):
        W, view = triple.W, triple.view
        piece = piece_of(W, view)
        if piece is not None:
            W, view = local_part(W.detach()), piece.view
        return view.weight(W) if is_plain(W) and not W.is_meta and W.numel() else None
    return None


SINCE = "another optimizer was built on it since, or has loaded a state or rebased"

_living: weakref.WeakSet[Claim] = weakref.WeakSet()
_numbers = count(1)
_lock = threading.RLock()


def moved_by_others(triples: Sequence[LoRATriple]) -> set[LoRATriple]:
    """Return those triples whose W has moved for an optimizer that exists, and that are about to be registered.

    A layer that leaves the movement of other adapters out of its output by itself is not among them.
    """
    with _lock:
        others = [claim for claim in _living if claim._wrote and not claim.owner.at_base]
    held = [(claim, matrix) for claim in others if (matrix := claim._matrix()) is not None]
    if not held:
        return set()
    new = [(triple, W) for triple in triples if triple.output_hook is None and (W := _matrix_of(triple)) is not None]
    pairs = overlapping_pairs([*(matrix for _, matrix in held), *(matrix for _, matrix in new)])
    shared = [(held[i][0], new[j - len(held)][0]) for i, j in pairs if i < len(held) <= j]
    return {triple for claim, triple in shared if claim.moved()}


def take(claims: Sequence[Claim]) -> None:
    """Give these claims precedence over all others on the same memory."""
    number = next(_numbers)
    for claim in claims:
        claim._number, claim._wrote, claim._overwritten = number, False, False
    follow(claims)


def follow(claims: Sequence[Claim]) -> None:
    """Find the claims of other optimizers on the memory of these, whose tensors may be other ones than before."""
    with _lock:
        try:
            _follow(claims)
        except BaseException:
            _follow(claims)  # the relations of others were forgotten, and have to be found again
            raise


def _follow(claims: Sequence[Claim]) -> None:
    others = [claim for claim in _living if claim._number]
    places = [(claim, matrix) for claim in others if (matrix := claim._matrix()) is not None]
    following = set(claims)
    for claim in others:
        claim._siblings = []
        _forget_relations(claim, following)
    for i, j in overlapping_pairs([matrix for _, matrix in places]):
        older, newer = sorted((places[i][0], places[j][0]), key=lambda claim: claim._number)
        if older.owner is newer.owner:
            if older.triple is not newer.triple:  # else one is no longer in use, and an exception holds it
                older._siblings.append(newer.triple.label)
                newer._siblings.append(older.triple.label)
        elif older in following or newer in following:
            _relate(older, newer)


def _relate(older: Claim, newer: Claim) -> None:
    if not newer._waits:
        older._newer.append(weakref.ref(newer))
        newer._informs.append(weakref.ref(older))
        older._overwritten |= newer._wrote
    elif not older._waits:  # the base of `newer` is W as it was when it was built
        older._informs.append(weakref.ref(newer))


def _forget_relations(claim: Claim, following: set[Claim]) -> None:
    if claim in following:
        claim._newer, claim._informs = [], []
    elif claim._newer or claim._informs:
        claim._newer = [weakref.ref(other) for other in _alive(claim._newer) if other not in following]
        claim._informs = [weakref.ref(other) for other in _alive(claim._informs) if other not in following]


def _alive(references: Iterable[weakref.ref[Claim]]) -> list[Claim]:
    return [claim for reference in references if (claim := reference()) is not None]
