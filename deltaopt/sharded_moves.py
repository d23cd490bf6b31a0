"""The moves of weights of which each rank holds a block, or whose factors are sharded (FSDP2, tensor parallelism).

    W[I, J] <- W[I, J] + coef * U[I] @ V[:, J]

Each rank keeps its parts of A and B from before the inner step. After it one all-reduce tells all ranks alike what has
changed and whether all of it is finite; the parts that a rank needs and does not have are brought by one all-gather for
all layers together; the rest is local. The host waits for that all-reduce, once in each step.

What is decided about a ledger is decided from the same numbers on all ranks: its terms are whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaopt.all_or_nothing import Issued, note
from deltaopt.factor_buffers import factored_delta
from deltaopt.host import Host
from deltaopt.ledger import Factors, Ledger
from deltaopt.rounding.batch import Addition, KernelBatch
from deltaopt.rounding.blocks import full_precision
from deltaopt.rounding.noise import label_hashes
from deltaopt.rounding.writer import Writer
from deltaopt.sharding import (
    Block,
    at_hand,
    gather_all,
    highest,
    is_sharded_alike,
    local_part,
    with_local_part,
)
from deltaopt.unlinked import hashes_of, raise_if_they_differ, take_whether_they_differ, unlinked_parts
from deltaopt.weight import WeightState, note_bases


class _Slot:
    """One weight, and its rank's parts of the parameters of A and B.

    Args:
        weight: that moves.
        host: tells if the parts can be compared before the inner step without waiting for their device.

    Attributes:
        weight: as given.
        end: the parts as the last move left them; None before the first one.
        shards: the same as sharded tensors, each with its part in `end`.
        mark: what the ledger has as its end since then; with another one `end` is out of date.
        start, now: the parts before and after the inner step.
        coef: lambda times s, of this step.
        count: the number of moves after it.
        changed, continues: what all ranks have found: A or B has changed in this step; the start is the last end.
        differs: the same: factors that are not sharded with W are not equal on all ranks.
        delta: U and V of this rank's block; None until they are made.
        whole_start: A and B before the inner step, all of them, where the ledger gets a term of them.
        written: an entry for each block of W that was written.
        extended: an entry once the ledger has got terms.
        recorded: True once it has all that it gets.
    """

    def __init__(self, weight: WeightState, host: Host) -> None:
        self.weight = weight
        self._host = host
        self.end: list[Tensor] | None = None
        self.shards: list[Tensor] = []
        self.mark: object = None
        self.start: list[Tensor] = []
        self.now: list[Tensor] = []
        self.coef = 0.0
        self.count: int | None = None
        self.changed = self.continues = self.differs = False
        self.delta: tuple[Tensor, Tensor] | None = None
        self.whole_start: Factors | None = None
        self.written: list[Any] = []
        self.extended: list[Any] = []
        self.recorded = False

    def snapshot(self) -> None:
        """Keep this rank's parts of A and B as they are before the inner step."""
        weight = self.weight
        self.coef = weight.ratio * weight.triple.scaling
        self.count = weight.count_after_a_move()
        self.delta, self.whole_start, self.written, self.extended, self.recorded = None, None, [], [], False
        if self.end is not None and weight.ledger.end_mark() is not self.mark:
            self.end = None  # a restart, a loaded state, or another event has come in between
        parts = self.parts()
        reads = all(self._host.reads(part.device) for part in parts)
        is_end = reads and self.end is not None and _same(parts, self.end)
        self.start = self.end if self.end is not None and is_end else [part.clone() for part in parts]

    def parts(self) -> list[Tensor]:
        """Return this rank's parts of the parameters of A and B."""
        return [local_part(parameter.detach()) for parameter in self.weight.tensors.parameters]

    def keep_end(self) -> None:
        """Keep A' and B' as what the move has left."""
        parameters = self.weight.tensors.parameters
        if self.end is None or not all(map(_is_alike, parameters, self.shards)):
            end = [part.clone() for part in self.now]
            self.end = None  # until it is in the shards too
            self.shards = [with_local_part(*pair) for pair in zip(parameters, end, strict=True)]
            self.end = end
        else:
            torch._foreach_copy_(self.end, self.now)

    def own_facts(self) -> list[Tensor]:
        """Return what this rank knows: not finite, changed, other than the last end; hashes of what may differ."""
        self.now = self.now or self.parts()
        device = self.now[0].device
        finite = torch.stack([part.isfinite().all() for part in (*self.start, *self.now)]).all()
        changed = ~torch.stack([_equal(old, new) for old, new in zip(self.start, self.now, strict=True)]).all()
        if self.end is None or not _alike(self.start, self.end):
            other = torch.ones((), dtype=torch.bool, device=device)
        elif self.start is self.end:
            other = torch.zeros((), dtype=torch.bool, device=device)
        else:  # here or on the device, as the host may not have compared them
            other = ~torch.stack([_equal(*pair) for pair in zip(self.start, self.end, strict=True)]).all()
        facts = [torch.stack([~finite, changed, other]).to(torch.int64)]
        return [*facts, *hashes_of(unlinked_parts(self.weight, self.now))]

    def take(self, facts: list[int]) -> bool:
        """Take from `facts` what all ranks have found of this weight; return whether all of it is finite."""
        not_finite, changed, other = facts[:3]
        del facts[:3]
        self.changed, self.continues = bool(changed), not other
        self.differs = take_whether_they_differ(facts, unlinked_parts(self.weight, self.now))
        return not not_finite

    @property
    def device(self) -> torch.device:
        """The device of W."""
        return self.weight.tensors.W.device

    @property
    def fits_kernel(self) -> bool:
        """True if the kernel can write this W: one of 16 bits, with factors in float32 or less."""
        tensors = self.weight.tensors
        return tensors.W.element_size() == 2 and tensors.compute_dtype() == torch.float32

    def block_delta(self) -> tuple[Tensor, Tensor]:
        """Return U (..., c, 2r) and V (..., 2r, d) of this rank's block, which `bring` has made."""
        assert self.delta is not None
        return self.delta

    def block(self) -> Block:
        """Return where the block of W that is here lies in all of it."""
        piece = self.weight.piece
        return tuple((0, n) for n in self.whole_shape()) if piece is None else piece.block

    def whole_shape(self) -> Sequence[int]:
        """Return the shape of all of W's matrix."""
        piece = self.weight.piece
        return self.weight.matrix().shape if piece is None else piece.whole

    @property
    def needs_whole_start(self) -> bool:
        """True if the ledger gets terms of the factors at the start of this step."""
        return not self.continues or self.coef != self.weight.ledger.coef


class ShardedMoves:
    """The moves of all sharded weights of one optimizer.

    As with `FactorBuffers` the methods of a step are called in the order in which they stand here, and may be called
    again after an exception: what was issued to the other ranks is noted.

    Args:
        host: knows the kernel for 16-bit weights on a device.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._launched: list[Any] = []
        self._known: dict[WeightState, _Slot] = {}
        self.slots: list[_Slot] = []
        self.changed_outside: list[WeightState] = []
        self._brought = False
        self._forget_issued()

    def _forget_issued(self) -> None:
        self._verdict, self._factors, self._bases = Issued(), Issued(), Issued()

    @property
    def nbytes(self) -> int:
        """Bytes that stay from step to step on this rank: its parts of A and B as the last moves left them."""
        return sum(part.nbytes for slot in self._known.values() for part in slot.end or ())

    def snapshot(self, members: Sequence[WeightState]) -> None:
        """Keep A and B of these weights, and lambda times s, as they are before the inner step."""
        self._known = {weight: self._known.get(weight) or _Slot(weight, self._host) for weight in members}
        self.slots, self._brought, self._launched = list(self._known.values()), False, []
        self._forget_issued()
        for slot in self.slots:
            slot.now = []
            slot.snapshot()

    def agree(self, others_finite: Tensor | None, group: Any) -> tuple[bool, Tensor]:
        """Take what all ranks know of all weights; tell if all factors are finite, for the host and as a 0-d bool.

        Args:
            others_finite: what this rank knows of other weights that move in the same step, a bool; None if none does.
            group: of all ranks, which have to call this.

        Raises:
            FactorsDifferError: on all ranks, if factors that are not sharded with W differ.
        """
        facts = [fact for slot in self.slots for fact in slot.own_facts()]
        home = facts[0].device
        if others_finite is not None:
            facts.append((~others_finite).to(home, torch.int64).view(1))
        agreed = highest(torch.cat([fact.to(home) for fact in facts]), group, self._verdict).tolist()
        finite = self._take(agreed) and not any(agreed)
        return finite, torch.full((), finite, dtype=torch.bool, device=home)

    def _take(self, facts: list[int]) -> bool:
        """Take what all ranks together know from `facts`; return whether all factors of these weights are finite."""
        finite = True
        for slot in self.slots:
            finite &= slot.take(facts)
        raise_if_they_differ(slot.weight for slot in self.slots if slot.differs)
        return finite

    def note_bases(self) -> None:
        """Note what every W is before its first move."""
        note_bases([slot.weight for slot in self.slots], self._bases)

    @torch.no_grad()
    def bring(self) -> None:
        """Bring what the blocks here need of the factors, by one collective for all weights that have changed."""
        if self._brought:
            return
        wanted: list[_Wanted] = []
        for slot in self.slots:
            if slot.changed or slot.needs_whole_start:
                wanted += _wanted(slot)
        values = gather_all([want.parameter for want in wanted], [want.value for want in wanted], self._factors)
        brought: dict[tuple[int, int, bool], Tensor] = {}
        for want, value in zip(wanted, values, strict=True):
            brought[id(want.slot), want.place, want.is_new] = value
        for slot in self.slots:
            if slot.changed:
                slot.delta = factored_delta(*(_block(slot, is_new, brought) for is_new in (False, True)))
            if slot.needs_whole_start:
                whole = [brought[id(slot), i, False] for i in range(len(slot.start))]
                slot.whole_start = slot.weight.branch_of(whole)[1:]
        self._brought = True
        self._factors = Issued()  # which lets go of what was brought

    @torch.no_grad()
    def write(self, writer: Writer) -> None:
        """Add this rank's block of coef * (A'B' - AB) to every W whose factors have changed on any rank."""
        moving = [slot for slot in self.slots if slot.delta is not None]
        by_device: dict[torch.device, list[_Slot]] = {}
        for slot in moving:
            by_device.setdefault(slot.device, []).append(slot)
        for device, slots in by_device.items():
            kernel = self._host.kernel(device)
            with full_precision(device):
                if kernel is not None:
                    self._write_by_kernel(kernel, [slot for slot in slots if slot.fits_kernel], writer)
                for slot in slots:
                    if kernel is None or not slot.fits_kernel:
                        U, V = slot.block_delta()
                        noise = writer.noise_of(slot.weight)
                        writer.add_product_(slot.weight, U, V, slot.coef, noise, slot.written)

    def _write_by_kernel(self, kernel: ModuleType, slots: Sequence[_Slot], writer: Writer) -> None:
        additions = []
        for place, slot in enumerate(slots):
            weight, (U, V) = slot.weight, slot.block_delta()
            *lead, (first_row, _), (first_column, _) = slot.block()
            hashes = label_hashes([weight.label], slot.whole_shape()[:-2])[0]
            if lead:
                hashes = hashes[slice(*lead[0])]
            kept = writer.compensation(weight)
            additions.append(Addition(weight, U, V, slot.coef, kept, hashes, place, first_row, first_column))
        if additions:
            keep = torch.ones(len(additions), dtype=torch.bool, device=slots[0].device)
            keys = writer.keys if writer.stochastic else None
            KernelBatch(kernel).add_(additions, keep, keys, self._launched)
            for slot in slots:
                slot.written = self._launched

    def record(self, finite: bool) -> list[Ledger]:
        """Extend the ledgers whose moves do not continue the last ones, and keep A' and B'; return these ledgers."""
        if not finite:
            for slot in self.slots:
                slot.weight.ledger.set_current(False)
            return []
        for slot in self.slots:
            ledger = slot.weight.placed_ledger()
            if slot.whole_start is not None and not slot.recorded:
                before = None if slot.continues or not ledger.has_end else ledger.end
                goes_on = slot.continues or (before is not None and all(map(torch.equal, before, slot.whole_start)))
                is_known = slot.weight in self.changed_outside
                if before is not None and not goes_on and ledger.is_current() and not is_known:
                    self.changed_outside.append(slot.weight)
                if not slot.extended and (not goes_on or slot.coef != ledger.coef):
                    before = None if goes_on else before or slot.whole_start
                    note(slot.extended, partial(ledger.extend, slot.coef, slot.whole_start, before))
                slot.recorded = True
            if slot.changed:
                slot.weight.moves = slot.count
            if slot.changed or slot.end is None:
                slot.keep_end()
            slot.mark = ledger.end_later(partial(_whole_end, slot.weight, slot.shards))
            ledger.set_current()
        return [slot.weight.ledger for slot in self.slots if slot.extended]

    def release(self) -> None:
        """Let go of what only a step needs."""
        for slot in self.slots:
            slot.start, slot.now, slot.delta, slot.whole_start = [], [], None, None

    def freeze(self) -> None:
        """Keep A' and B' for a completion later: somebody may have changed the factors until then."""
        for slot in self.slots:
            slot.now = [part.clone() for part in slot.now]

    def unwritten(self) -> list[str]:
        """Return the labels of the weights of which no block was written."""
        return [slot.weight.label for slot in self.slots if not slot.written]


class _Wanted(NamedTuple):
    """One parameter of which this rank needs more than its own part."""

    slot: _Slot
    place: int
    is_new: bool
    parameter: Tensor
    value: Tensor


def _wanted(slot: _Slot) -> list[_Wanted]:
    """Return the parameters of which all is needed: those whose part here is not just what the block needs."""
    found, tensors = [], slot.weight.tensors
    for place, parameter in enumerate(tensors.parameters):
        needed = slot.changed and not _is_at_hand(slot, parameter)
        if needed or slot.needs_whole_start:
            found.append(_Wanted(slot, place, False, parameter, slot.start[place]))
        if needed:
            found.append(_Wanted(slot, place, True, parameter, slot.now[place]))
    return found


def _is_at_hand(slot: _Slot, parameter: Tensor) -> bool:
    """Tell if this rank has all that its block needs of A or B: known from placements, and so alike on all ranks."""
    weight, tensors = slot.weight, slot.weight.tensors
    return weight.piece is not None and any(
        parameter is factor and at_hand(parameter, side, tensors.W, weight.triple.view)
        for side, factor in enumerate((tensors.left, tensors.right))
    )


def _block(slot: _Slot, is_new: bool, brought: dict[tuple[int, int, bool], Tensor]) -> Factors:
    """Return the rows of A and the columns of B that this rank's block of W needs, in the dtype of the computation."""
    weight, tensors = slot.weight, slot.weight.tensors
    near = {parameter: _is_at_hand(slot, parameter) for parameter in tensors.parameters}
    parts = enumerate(slot.now if is_new else slot.start)
    values = [
        part if here else brought[id(slot), i, is_new] for (i, part), here in zip(parts, near.values(), strict=True)
    ]
    at = tensors.at(values)
    A, B = weight.triple.view.factors(tensors.W, at.A, at.B)
    if weight.piece is not None:
        A = A if isinstance(tensors.left, Tensor) and near[tensors.left] else weight.piece.rows_of(A)
        B = B if isinstance(tensors.right, Tensor) and near[tensors.right] else weight.piece.columns_of(B)
    dtype = tensors.compute_dtype()
    return A.to(dtype), B.to(dtype)


def _whole_end(weight: WeightState, shards: Sequence[Tensor], issued: Issued) -> Factors:
    """Gather A and B as the last move left them; all ranks have to call this."""
    _, A, B = weight.branch_of(shards, issued).cloned()
    return A, B


def _is_alike(one: Tensor, other: Tensor) -> bool:
    """Tell if this rank's part of one tensor may be kept in that of the other."""
    return is_sharded_alike(one, other) and one.dtype == other.dtype and one.device == other.device


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return _alike(one, other) and all(map(torch.equal, one, other))


def _alike(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return [(t.shape, t.dtype, t.device) for t in one] == [(t.shape, t.dtype, t.device) for t in other]


def _equal(old: Tensor, new: Tensor) -> Tensor:
    """Compare two parts: 0-d bool on their device; NaN differs."""
    return (old == new).all()
