"""WeightState: everything about one W in training, in one record."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaopt.all_or_nothing import Issued
from deltaopt.checkpoint.fingerprint import Fingerprint, whole_hash, whole_hash_part
from deltaopt.claims import Claim
from deltaopt.groups import DeltaGroup
from deltaopt.layouts import MatrixView
from deltaopt.ledger import Ledger, combined
from deltaopt.lowrank import LowRank, Term, joined
from deltaopt.overwritten import base_samples
from deltaopt.rounding.blocks import lifted
from deltaopt.sharding import (
    Piece,
    Sharding,
    gather_all,
    gathered,
    is_sharded,
    is_sharded_alike,
    local_part,
    piece_of,
    sharding_problems,
    summed_over_ranks,
    without_numbers,
)
from deltaopt.tensors import is_plain, offload_problems, tensor_problems
from deltaopt.triple import LoRATriple
from deltaopt.triple_tensors import Tensors


class Compensation(NamedTuple):
    """The part of a 16-bit W that rounding has cut off: `bits` (int16, as the part of W that moves), W's `dtype`."""

    bits: Tensor
    dtype: torch.dtype


class _Kept(NamedTuple):
    """What is kept next to a W, in pieces as W had them with another sharding."""

    sharding: Sharding
    compensation: Compensation | None
    base_copy: Tensor | None


class WeightState:
    """One W in training: its triple, its tensors during an event, and what is known of its movement.

    Args:
        triple: as registered.
        group: which gives it its update_ratio and start_step.
        keep_base: "cpu" or "device" to keep a copy of W from before its first move, there or next to W; None for none.

    Attributes:
        ratio: lambda of the last step or `resync`; 0.0 while W rests.
        ledger: what W was asked to move by since its base.
        base: the fingerprint of W before its first move; None until then.
        origin: the product that the start of A and B took out of the pristine weight (PiSSA, OLoRA); None if none.
        rebased: True if the base is known to be another weight than the pristine one: after `rebase`, or where W had
            moved when it was registered.
        compensation: with compensated rounding, what was cut off from W so far; it is added the next time.
        claim: of the optimizer on W; None until it has taken this weight.
        moves: the number of steps that moved W since its base, as far as the device has reported; None if a state of
            an earlier version does not say. With a folded ratio: of steps with gradients, in which the branch moved for
            W.
        folded_since: the number of the step, from 0, that folded the present ratio into the branch; None if none is, or
            that is not known.
        base_sample: some elements of the base, which tell if somebody else writes W; None if not known.
        written_by_others: True if W was written since, as far as torch counts that, and nobody has looked at it yet.
        is_sharded: True if W, A or B was sharded then.
    """

    def __init__(self, triple: LoRATriple, group: DeltaGroup, keep_base: str | None = None) -> None:
        self.triple = triple
        self.group = group
        self.ratio = 0.0
        self.ledger = Ledger()
        self.base: Fingerprint | None = None
        self.origin: Term | None = None
        self.rebased = False
        self.compensation: Compensation | None = None
        self.claim: Claim | None = None
        self.moves: int | None = 0
        self.folded_since: int | None = None
        self.base_sample: Tensor | None = None
        self.written_by_others = False
        self._piece: Piece | None = None
        self.is_sharded = False
        self._pattern: Tensor | None = None  # a W that is sharded, without its numbers
        self._left_behind: _Kept | None = None
        self._copy_place = keep_base
        self._base_copy: Tensor | None = None
        self._copied: Fingerprint | None = None  # of that copy, once it was asked for
        self._tensors: Tensors | None = None
        self._checked: tuple[object, ...] | None = None
        self._accepted_W: weakref.ref[Tensor] | None = None
        self._left: tuple[int, int] | None = None  # the version of W after the last event that moved or read it
        self._back = False  # W was its base again when `_left` was noted

    def register(self) -> None:
        """Record the state of W at registration: moved before, reduced by a start of A and B; copy it if asked."""
        self.rebased = self.triple.has_moved()
        if self.triple.took_from_base(self.tensors):
            self.origin = self.branch().cloned()
        if self._copy_place is not None and not self.weight_problems():
            self.copy_base()

    # The tensors. They are looked up once for each event: libraries replace Parameter objects between events.

    @property
    def tensors(self) -> Tensors:
        """W and the parameters of A and B as the event under way has looked them up, or else as they are stored now."""
        return self.triple.tensors() if self._tensors is None else self._tensors

    def resolve(self) -> bool:
        """Look the tensors up for an event; return True if one of them is not what was checked last."""
        self._tensors = self.triple.tensors()
        if replaced := self._tensors.signature() != self._checked:
            self._checked = None  # until these tensors have passed: they may be refused, and those of before come back
            self._find_piece(self._tensors)
        if self.base is not None and not self.is_sharded:  # for those `look_at_written`
            self._is_base_again(self._tensors.W)  # before the event writes it
        return replaced

    def _find_piece(self, tensors: Tensors) -> None:
        """Note which block of a sharded W is here, unless `weight_problems` has to say why none is."""
        W = tensors.W
        self.is_sharded = any(map(is_sharded, (W, *tensors.stored)))
        if self._is_gathered(W):
            return
        if not is_sharded(W):
            return
        before = Sharding(self._piece, self._pattern)
        if self._sharding_problems(W):
            self._piece, self._pattern, is_kept = None, None, False
        else:
            piece = piece_of(W, self.triple.view)
            # By what all ranks know alike. A copy that was pickled has no pattern.
            is_kept = piece == self._piece if self._pattern is None else is_sharded_alike(W, self._pattern)
            self._piece, self._pattern = piece, without_numbers(W)
        if is_kept:
            return
        if self._left_behind is None and (self.compensation is not None or self._base_copy is not None):
            self._left_behind = _Kept(before, self.compensation, self._base_copy)
        self.compensation, self._base_copy, self._copied = None, None, None
        left = self._left_behind
        if left is not None and left.sharding.pattern is not None and is_sharded_alike(W, left.sharding.pattern):
            self.compensation, self._base_copy, self._left_behind = left.compensation, left.base_copy, None

    @property
    def is_sharded_otherwise(self) -> bool:
        """True if W is sharded in another way than in the last event; alike on all ranks."""
        return self._pattern is not None and is_sharded(W := self.triple.W) and not is_sharded_alike(W, self._pattern)

    @property
    def left_behind(self) -> list[str]:
        """What is kept next to W in the places where W was before it was sharded in another way."""
        left = self._left_behind
        if left is None:
            return []
        parts = {"what compensated rounding has cut off": left.compensation, "the copy of keep_base": left.base_copy}
        return [name for name, part in parts.items() if part is not None]

    def left_behind_problems(self) -> list[str]:
        """Say why that cannot be brought to where W is now."""
        left = self._left_behind
        here = Sharding(self._piece, self._pattern)
        if left is None or left.sharding.ranks in ((), here.ranks):
            return []
        what = " and ".join(self.left_behind)
        ways = "as it was, or build the optimizer again and load a state that was saved before"
        if left.sharding.ranks is None:
            return [
                f"W is sharded in another way than where this optimizer was pickled or copied, and {what} is in pieces "
                f"as they were there: shard W {ways}"
            ]
        return [
            f"W was sharded over the ranks {list(left.sharding.ranks)} and is over the ranks {list(here.ranks or ())} "
            f"now, and {what} is on the former ones: shard W {ways}"
        ]

    def bring_what_was_left(self) -> None:
        """Bring what is kept next to W to where W is now; all ranks have to call this."""
        left = self._left_behind
        if left is None:
            return
        here, device = Sharding(self._piece, self._pattern), self.tensors.W.device
        compensation, copy = left.compensation, left.base_copy
        if compensation is not None:
            bits = left.sharding.moved_to(here, compensation.bits.to(device))
            compensation = compensation._replace(bits=bits)
        if copy is not None:
            copy = left.sharding.moved_to(here, copy.to(device)).to(copy.device)
        self.compensation, self._base_copy, self._copied, self._left_behind = compensation, copy, None, None

    def _is_gathered(self, W: Tensor) -> bool:
        """Tell if W was sharded and is whole now: FSDP2 puts another tensor in its place for a forward pass."""
        return self._piece is not None and not is_sharded(W)

    @property
    def piece(self) -> Piece | None:
        """This rank's block of a sharded W; None of a W that is here as a whole, and was in the last event.

        It stays while FSDP2 has gathered W for a forward pass.
        """
        if self._piece is None and is_sharded(W := self.tensors.W) and not self._sharding_problems(W):
            self._find_piece(self.tensors)  # W was sharded since the last event
        return self._piece

    def accept(self) -> None:
        """Note that the tensors that were looked up have passed all checks."""
        self._checked, self._accepted_W = self.tensors.signature(), weakref.ref(self.tensors.W)

    def has_found(self, W: Tensor) -> bool:
        """Tell if this is the W that the last event has found."""
        return self._accepted_W is not None and self._accepted_W() is W

    def forget(self) -> None:
        """Let go of the tensors after an event, so that a replaced W is freed; note how it has left W."""
        if self._tensors is not None and self.base is not None and not self._is_gathered(self._tensors.W):
            version = _version(self.here)
            if version != self._left:
                self._left, self._back = version, False
        self._tensors = None

    def note_restored(self, here: Tensor | None = None) -> None:
        """Note that W has the bits again that the last event left there.

        Args:
            here: of a sharded W that is gathered now, the tensor that this rank holds.
        """
        W = local_part(self.triple.W) if here is None else here
        if self.base is not None and is_plain(W) and not W.is_meta:
            self._left = _version(W)

    @property
    def label(self) -> str:
        """The name of the triple, for messages."""
        return self.triple.label

    @property
    def here(self) -> Tensor:
        """W, or of a sharded W the tensor that this rank holds."""
        return self.tensors.W if self.piece is None else local_part(self.tensors.W)

    @property
    def view(self) -> MatrixView:
        """The view of `here` as a matrix: that of the triple, but for rows and columns that are on other ranks."""
        return self.triple.view if self.piece is None else self.piece.view

    @property
    def is_gathered(self) -> bool:
        """True if W is sharded, and FSDP2 has put all of it in its place for a forward pass, and kept it there."""
        return self._is_gathered(self.tensors.W)

    def matrix(self) -> Tensor:
        """View the part of W that moves as a (c, d) or (e, c, d) matrix; of a sharded W the block that is here."""
        return self.view.weight(self.here)

    def part(self) -> Tensor:
        """View the part of W that moves, in an order that does not depend on strides where it is all of W.

        Of a sharded W, the part of it that is here.
        """
        return self.view.part(self.here)

    def cut(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the block of a sharded W needs of A (..., c, r) and B (..., r, d); for another W all of them."""
        return (A, B) if self.piece is None else self.piece.cut(A, B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """View A as (c, r) and B as (r, d), with a leading e for experts. To be read, not written.

        Computed factors are computed at each call.
        """
        tensors = self.tensors
        return self.triple.view.factors(tensors.W, tensors.A, tensors.B)

    def weight_problems(self) -> list[str]:
        """Say why W cannot be read as a matrix and written in place."""
        W = self.tensors.W
        if self._is_gathered(W) and (self._accepted_W is None or self._accepted_W() is None):
            # FSDP2 keeps the sharded parameter while a forward pass has a whole one in its place.
            return [
                "W was sharded when this optimizer was built and is a whole tensor now, of which this optimizer would "
                "move one part only: build the optimizer again, of the whole model, and load a state that was saved "
                "before; or put the sharded W back"
            ]
        if self._is_gathered(W):
            return [
                "W was sharded and is whole now, as FSDP2 makes it for a forward pass and keeps it where "
                "reshard_after_forward is False, which it is for the outermost module: what is written into it is "
                "lost. Call model.reshard() first"
            ]
        found = self._sharding_problems(W) if is_sharded(W) else []
        found = found or tensor_problems("W", local_part(W))
        module = self.triple.weight_module()
        if module is not None:
            found += offload_problems(module)
            if self.triple.W is not W:
                found.append(
                    "W is computed at each access (a parametrization such as weight_norm), so an in-place update would "
                    "be lost: register the tensor it is made from, or remove the parametrization"
                )
        return found

    def _sharding_problems(self, W: Tensor) -> list[str]:
        return sharding_problems("W", W, self.triple.view)

    # What W was asked to move by, and the branch next to it.

    def branch(self) -> Term:
        """Return what the branch adds now, branch_scaling * A @ B, in the dtype of the computation. Read only."""
        return self.branch_of(self.tensors.parameters)

    def branch_of(self, parameters: Sequence[Tensor], issued: Issued | None = None) -> Term:
        """Return what `branch` would be with these values of the parameters of A and B; sharded ones are gathered."""
        tensors = self.tensors.at(gather_all(parameters, issued=issued))
        dtype = tensors.compute_dtype()
        A, B = (f.detach().to(dtype) for f in self.triple.view.factors(tensors.W, tensors.A, tensors.B))
        return Term(self.triple.branch_scaling, A, B)

    def placed_ledger(self) -> Ledger:
        """Bring the ledger to where W is now, in the dtype of the computation: models are moved and cast."""
        tensors = self.tensors
        device, dtype = tensors.W.device, tensors.compute_dtype()
        if self.origin is not None:
            self.origin = self.origin.to(device, dtype)
        return self.ledger.to(device, dtype)

    def displacement(self) -> list[Term]:
        """Return terms that add up to what W was asked to move by since its base.

        Raises:
            RuntimeError: if that is not known as low-rank terms any more, with the layer's name and the reason.
        """
        if self.ledger.lost is not None:
            raise RuntimeError(f"{self.label}: {self.ledger.lost}")
        return self.placed_ledger().displacement()

    def asked_movement(self) -> LowRank:
        """Return the displacement as one product; of a folded W, with what its branch holds instead of W."""
        _, A, B = self.branch()
        movement = joined(self.asked_terms() or [Term(0.0, A[..., :0], B[..., :0, :])])
        return movement.summed() if self.ledger.is_matrix else movement

    def asked_terms(self) -> list[Term]:
        """Return terms that add up to the displacement; of a folded W, with what its branch holds instead of W.

        Raises:
            RuntimeError: as `displacement`.
        """
        terms = self.displacement()
        if not self.triple.folded:
            return terms
        _, A, B = self.branch()
        return [*terms, Term(self.triple.folded * self.triple.scaling, A, B)]

    def change(self, from_pristine: bool = False) -> LowRank:
        """Return the displacement of W and the branch next to it as one product.

        Args:
            from_pristine: add what the start of A and B took out of the pristine weight.

        Raises:
            RuntimeError: if the displacement is not known any more.
        """
        branch = self.branch()
        terms = [*self.displacement(), branch]
        if from_pristine and self.origin is not None:
            terms.append(self.origin._replace(coef=-self.origin.coef))
        return joined([term for term in combined(terms) if not term.is_zero()] or [branch._replace(coef=0.0)])

    # The base.

    @property
    def moved(self) -> bool:
        """True if W was asked to move, as far as the host knows."""
        return self.base is not None

    @property
    def at_base(self) -> bool:
        """True while `base_weights` of the optimizer that claims W has brought the base back."""
        return self.claim is not None and self.claim.owner.at_base

    def is_off_base(self) -> bool:
        """Tell if W has moved, and nobody has loaded its base into it since."""
        return self.base is not None and not self._is_base_again(self.triple.W)

    def _is_base_again(self, W: Tensor) -> bool:
        """Tell if somebody has loaded the base into a W that has moved; looks into it if it was written by others."""
        if self._is_gathered(W) or self.is_sharded_otherwise:
            return self._back
        here = local_part(W)
        if self.base is not None and is_plain(here) and not W.is_meta and (version := _version(here)) != self._left:
            self._left = version
            self._back = self.fingerprint_of(self.view.part(here.detach())).record() == self.base.record()
            self.written_by_others = not self._back
        return self._back

    def is_written(self) -> bool:
        """Tell if W was written since the last event, on this rank and as far as torch counts that."""
        W = self.tensors.W
        return self.base is not None and not self._is_gathered(W) and _version(local_part(W)) != self._left

    def look_at_written(self) -> None:
        """Look into a sharded W that some rank has found written; all ranks have to call this."""
        self._left = None
        self._is_base_again(self.tensors.W)

    def fingerprint(self) -> Fingerprint:
        """Take the fingerprint of the part of W that moves; of a sharded W on all ranks, of all of it."""
        return self.fingerprint_of(self.part())

    def fingerprint_of(self, part: Tensor) -> Fingerprint:
        """Take the fingerprint of a tensor that is like `part()`, a copy of the base, say."""
        if self.piece is None:
            return Fingerprint(part)
        return Fingerprint.of_pieces([part], [self.piece], [self._like()])[0]

    def whole_hash(self, hashed: Callable[[Tensor], int] = whole_hash) -> int:
        """Hash all of the part of W that moves; of a sharded W on all ranks.

        Args:
            hashed: the function, `numbered_blocks_hash` for states of earlier versions: that one needs W as a whole.
        """
        if self.piece is None:
            return hashed(self.part())
        if hashed is not whole_hash:
            return hashed(self.triple.view.part(gathered(self.tensors.W)))
        start, shape = self.piece.place_of_part()
        own = whole_hash_part(self.part(), start, self.tensors.W.shape if shape is None else shape)
        return int(self.summed(own))

    def _like(self) -> Tensor:
        """Return a tensor that is sharded as W is, while W itself may be gathered for a forward pass."""
        return self.tensors.W if self._pattern is None else self._pattern

    def whole(self, part: Tensor) -> Tensor:
        """Return all of a tensor that is like a W of which all moves; of a sharded one all ranks have to call this.

        Args:
            part: what is here of it, a copy of the base, say.
        """
        if self.piece is None:
            return part
        return gather_all([self._like()], [part.to(self.tensors.W.device)])[0]

    def summed(self, numbers: Tensor) -> Tensor:
        """Return the sum over the ranks of what each has found of its block of W; all have to call this.

        Args:
            numbers: on W's device. They are returned as they are where W is not sharded.
        """
        if self.piece is None:
            return numbers
        return summed_over_ranks([numbers * self.piece.is_first], [self._like()])[0]

    def note_base(self, issued: Issued | None = None) -> None:
        """Take W as it is now as its base, unless it has moved before. Called before every write; see `note_bases`."""
        note_bases([self], issued)

    def count_after_a_move(self) -> int | None:
        """Return what `moves` is after one more move; the caller sets it, which may be done twice."""
        return None if self.moves is None else self.moves + 1

    def note_write(self) -> None:
        """Let other optimizers on this W know that it is about to be written."""
        if self.claim is not None:
            self.claim.before_write()

    def rebase(self) -> None:
        """Take W as it is now as its base, and forget how it came there."""
        self.ledger, self.base, self.origin, self.compensation = Ledger(), None, None, None
        self.base_sample = None
        self.rebased, self.moves = True, 0
        self.triple.weight_rests()

    def copy_base(self, bits: Tensor | None = None) -> None:
        """Copy W as it is now, or `bits`, over an earlier copy; nothing without ``keep_base``."""
        if self._copy_place is None:
            return
        part = self.part().detach() if bits is None else bits
        self._copied = None
        if self._base_copy is None or self._base_copy.shape != part.shape or self._base_copy.dtype != part.dtype:
            device = "cpu" if self._copy_place == "cpu" else self.tensors.W.device
            self._base_copy = torch.empty_like(part, device=device)
        self._base_copy.copy_(part)

    def base_copy(self, base: Fingerprint) -> Tensor | None:
        """Return the copy, unless it is of another weight: W may have moved before this optimizer was built."""
        if self._base_copy is None:
            return None
        if self._copied is None:
            self._copied = self.fingerprint_of(self._base_copy)
        return self._base_copy if self._copied.record() == base.record() else None

    @property
    def copies_base(self) -> bool:
        """True if copies of the base are asked for."""
        return self._copy_place is not None

    # Compensated rounding.

    def known_compensation(self, part: Tensor) -> Tensor | None:
        """Return what was cut off from `part`, the part of W that moves; None if W was cast or replaced since."""
        held = self.compensation
        if held is None or held.dtype != part.dtype or held.bits.shape != part.shape:
            return None
        bits = held.bits.to(part.device)
        # A convolution's matrix has its columns in the order of memory, which channels_last changes.
        if part.dim() > 2 and bits.stride() != torch.empty_like(part, dtype=torch.int16, device="meta").stride():
            bits = torch.empty_like(part, dtype=torch.int16).copy_(bits)
        if bits is not held.bits:
            self.compensation = Compensation(bits, held.dtype)
        return bits

    def writable_compensation(self, part: Tensor) -> Tensor:
        """Return what was cut off from `part`, to be written; zero at first."""
        bits = self.known_compensation(part)
        if bits is None:
            bits = torch.zeros_like(part, dtype=torch.int16)
            self.compensation = Compensation(bits, part.dtype)
        return bits

    @torch.no_grad()
    def full_part(self) -> Tensor:
        """Copy the part of W that moves; in float32 with what compensated rounding has cut off, where it has."""
        part = self.part().detach()
        compensation = self.known_compensation(part)
        return part.clone() if compensation is None else lifted(part, compensation)

    @property
    def nbytes(self) -> int:
        """Bytes of the closed terms, the compensation and the copy of the base."""
        compensation = self.compensation.bits.nbytes if self.compensation is not None else 0
        return self.ledger.nbytes + compensation + (self._base_copy.nbytes if self._base_copy is not None else 0)

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks its tensors up, and has them checked, at its first step: modules may not be complete yet.
        left_out = ("_tensors", "_checked", "_accepted_W", "_left", "claim", "_pattern")
        return {**self.__dict__, **dict.fromkeys(left_out)}


def note_bases(weights: Sequence[WeightState], issued: Issued | None = None) -> None:
    """Take each W as it is now as its base, unless it has moved before. Called before every write.

    Args:
        weights: about to be written.
        issued: of this call, by the event that may have to make it again; None where no W is sharded.
    """
    resting = []
    for weight in weights:
        if weight.base is not None and (weight.claim is None or weight.claim.is_settled()):
            continue
        if weight.base is None and weight.claim is not None:
            weight.rebased |= weight.claim.base_overwritten
        weight.note_write()
        if weight.base is None:
            resting.append(weight)
    if not resting:
        return
    bases, samples = fingerprints(resting, issued), base_samples(resting)
    for weight, sample in zip(resting, samples, strict=True):
        weight.copy_base()
        weight.base_sample = sample
        weight.triple.weight_moves()
    # Last, of all weights or of none: after an exception all of it is done again, with the collectives of all of them.
    deque(map(setattr, resting, repeat("base"), bases), maxlen=0)


def fingerprints(weights: Sequence[WeightState], issued: Issued | None = None) -> list[Fingerprint]:
    """Take the fingerprint of each W, or of its part that moves, together; of sharded ones on all ranks."""
    pieces = {weight: weight.piece for weight in weights if weight.piece is not None}
    whole = [weight for weight in weights if weight not in pieces]
    found = dict(zip(whole, Fingerprint.of_each([weight.part() for weight in whole]), strict=True))
    parts, sharded = [weight.part() for weight in pieces], [weight.tensors.W for weight in pieces]
    found |= zip(pieces, Fingerprint.of_pieces(parts, list(pieces.values()), sharded, issued), strict=True)
    return [found[weight] for weight in weights]


@contextmanager
def looked_up_once(weights: Sequence[WeightState]) -> Iterator[None]:
    """Look the tensors of all weights up once for what is read of them within, outside of an event."""
    before = [weight._tensors for weight in weights]
    try:
        for weight in weights:
            weight._tensors = weight.tensors
        yield
    finally:
        for weight, tensors in zip(weights, before, strict=True):
            weight._tensors = tensors


def off_base(weight: WeightState) -> Callable[[], bool]:
    """Return a function that tells if this weight is off its base, and does not keep it alive.

    Of a sharded W it tells what the last event has found: looking into it takes all ranks.
    """
    reference = weakref.ref(weight)

    def is_off() -> bool:
        there = reference()
        if there is None or not there.is_sharded:
            return there is not None and there.is_off_base()
        return there.base is not None and not there._back

    return is_off


def _version(W: Tensor) -> tuple[int, int]:
    """Return a value that changes when W is written or replaced."""
    return W._version, W.data_ptr()
