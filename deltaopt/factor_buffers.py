"""The factors of weights that move in place, as the last move left them, and the delta that a step makes of them.

Weights whose factors have equal shapes share one set of buffers, so that a step takes a few launches for all of them.
What stays from step to step is r (c + d) numbers for each weight: A and B as the last move left them. They serve the
ledger, and they are the snapshot of the next step, unless A or B was changed in between: then a copy is.

A host that cannot read its device without waiting does not know whether they were changed. It keeps U and V as well.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from deltaopt.all_or_nothing import call_the_rest, note
from deltaopt.ledger import Factors, Ledger
from deltaopt.outside import changed
from deltaopt.rounding.batch import Addition, KernelBatch
from deltaopt.rounding.blocks import NoiseFactors
from deltaopt.rounding.noise import label_hashes
from deltaopt.rounding.writer import Writer
from deltaopt.weight import WeightState, note_bases

Kind: TypeAlias = "tuple[torch.Size, torch.Size, torch.dtype, torch.device]"
"""The properties that weights in the same buffers share: shapes of A and B, dtype of the computation, device."""

CHUNK_ELEMENTS = 1 << 20
"""The largest number of elements of U and V together that are made at a time on a CPU, if one weight has no more."""


def factored_delta_(U: Tensor, V: Tensor) -> None:
    """Turn U = [A' | A] and V = [B' ; B] into [A' - A | A] and [B' ; B' - B], whose product is A'B' - AB.

    Args:
        U: (..., c, 2r), written in place.
        V: (..., 2r, d), written in place.
    """
    for call in _delta_calls(U, V):
        call()


def factored_delta(before: Factors, after: Factors) -> tuple[Tensor, Tensor]:
    """Return U and V with U @ V = A'B' - AB.

    Args:
        before: A (..., c, r) and B (..., r, d).
        after: A' and B', of the same shapes.

    Returns:
        U (..., c, 2r) and V (..., 2r, d).
    """
    U, V = torch.cat([after[0], before[0]], dim=-1), torch.cat([after[1], before[1]], dim=-2)
    factored_delta_(U, V)
    return U, V


class Slot(NamedTuple):
    """The place of one weight in its buffers.

    Attributes:
        weight: whose slot it is.
        ledger: of this weight when the buffers were made; `rebase` and loading give it another one.
        end: A and B as the last move left them, which the ledger shares.
        place: its index.
    """

    weight: WeightState
    ledger: Ledger
    end: Factors
    place: int


class FactorBuffers:
    """The buffers of the weights of one kind, and the move of the step under way.

    The methods of a step are called in the order in which they stand here. Each of them may be called again after an
    exception, and then does what is left of its work.
    """

    def __init__(self, kind: Kind, members: Sequence[WeightState]) -> None:
        (*self._lead, self._c, self._r), (*_, self._d), self.dtype, self.device = kind
        n = len(members)
        # Not a number at first, so that a first move does not seem to continue another.
        self._A_end = torch.full((n, *kind[0]), torch.nan, dtype=self.dtype, device=self.device)
        self._B_end = torch.full((n, *kind[1]), torch.nan, dtype=self.dtype, device=self.device)
        self._end = self._A_end.unbind(0) + self._B_end.unbind(0)
        self.slots = [
            Slot(weight, weight.ledger, (self._end[i], self._end[n + i]), i) for i, weight in enumerate(members)
        ]
        # Weights whose factors somebody else has changed since their last move, as far as the host knows.
        self.changed_outside: list[WeightState] = []
        for slot in self.slots:
            ledger = slot.ledger.to(self.device, self.dtype)
            if ledger.end is not None and ledger.end[0].shape != slot.end[0].shape:
                if ledger.is_current() and ledger.end[0].shape[-1] != self._r:  # not only sharded in another way
                    self.changed_outside.append(slot.weight)
                ledger.close()
            if ledger.end is not None:
                torch._foreach_copy_(slot.end, ledger.end)
                ledger.end = slot.end
        # Weights that follow what somebody changes between steps: the next move begins where the last one ended.
        self._following = [slot for slot in self.slots if slot.weight.triple.follows_between_steps]
        self._known_hashes: Tensor | None = None
        self._now: list[Tensor] = []
        self._coefs: list[float] = []
        self._written: list[list[Any]] = []
        self._counts: list[int | None] = []

    @property
    def nbytes(self) -> int:
        """Bytes that stay from step to step."""
        return self._A_end.nbytes + self._B_end.nbytes

    def serve(self, members: Sequence[WeightState]) -> bool:
        """Tell if the buffers were made for these weights, and the ledgers still share them."""
        return len(members) == len(self.slots) and all(
            slot.weight is members[slot.place]
            and slot.weight.ledger is slot.ledger
            and (slot.ledger.end is slot.end or slot.ledger.end is None)
            for slot in self.slots
        )

    def snapshot(self) -> None:
        """Keep A and B, and lambda times s, as they are before the inner step."""
        self._now = []
        self._coefs = [slot.weight.ratio * slot.weight.triple.scaling for slot in self.slots]
        self._written = [[] for _ in self.slots]
        self._counts = [slot.weight.count_after_a_move() for slot in self.slots]

    def note_bases(self) -> None:
        """Note what every W is before its first move."""
        note_bases([slot.weight for slot in self.slots])

    def marks(self) -> list[Tensor]:
        """Look at A' and B', and return tensors that hold a number that is not finite if A, B, A' or B' do."""
        raise NotImplementedError

    def changed(self) -> bool:
        """Tell if any factor is another one than at the start of the step. Waits for the device."""
        raise NotImplementedError

    def write(self, finite: Tensor, writer: Writer) -> None:
        """Add coef * (A'B' - AB) to every W whose factors have changed, if the changes of all are `finite` (0-d)."""
        raise NotImplementedError

    def record(self, finite: Tensor) -> Any:
        """Keep the factors that the moves came to, and extend the ledgers; return what has to wait for the device."""
        raise NotImplementedError

    def freeze(self) -> None:
        """Keep A' and B' for a completion later: somebody may have changed the factors until then."""
        self._now = [factor.detach().clone() for factor in self._now or self._factors()]

    def release(self) -> None:
        """Let go of what only a step needs."""
        self._now = []

    def unwritten(self) -> list[str]:
        """Return the labels of the weights of which no block was written."""
        return [slot.weight.label for slot, written in zip(self.slots, self._written, strict=True) if not written]

    def _factors(self) -> list[Tensor]:
        """Return A of all weights and then B of all weights, as they are now."""
        factors = [slot.weight.factors() for slot in self.slots]
        return [*(A for A, _ in factors), *(B for _, B in factors)]

    def _noise(self, writer: Writer, slots: Sequence[Slot]) -> NoiseFactors | None:
        """Return the noise of all weights, if one of `slots` is rounded stochastically."""
        if not writer.stochastic or not any(slot.weight.tensors.W.element_size() == 2 for slot in slots):
            return None
        return writer.noise(self._hashes(), self._c, self._d, self.device)

    def _hashes(self) -> Tensor:
        """Hash the labels of each W's matrices, once."""
        if self._known_hashes is None:
            self._known_hashes = label_hashes([slot.weight.label for slot in self.slots], self._lead)
        return self._known_hashes


class HostBuffers(FactorBuffers):
    """Buffers that the host can read: it copies A and B only where they are not what the last move left.

    Within a step it stacks A and B to compare them, and keeps the stacks if they are not what the last move left. Then
    it holds U and V of as many weights at a time as fit `CHUNK_ELEMENTS`.
    """

    def __init__(self, kind: Kind, members: Sequence[WeightState]) -> None:
        super().__init__(kind, members)
        count = max(1, CHUNK_ELEMENTS // (2 * prod(self._lead) * self._r * (self._c + self._d)))
        self._chunks = [slice(start, start + count) for start in range(0, len(members), count)]
        self._continues: list[bool] = []
        self._parameters: list[Tensor] = []
        self._start: Factors | None = None
        self._delta: tuple[slice, Tensor, Tensor, Tensor] | None = None
        self._chunks_written = 0
        self._due: list[Move] | None = None
        self._extended: list[Any] = []

    def snapshot(self) -> None:
        """Keep lambda times s; and a copy of A and B, if they are not what the last move left."""
        super().snapshot()
        self._parameters = []
        n, factors = len(self.slots), self._factors()
        parameters = [slot.weight.tensors for slot in self.slots]
        if all(map(operator.is_, factors, [*(t.left for t in parameters), *(t.right for t in parameters)])):
            self._parameters = factors  # which the step changes in place: they need not be viewed again
        A = torch.stack(factors[:n], out=torch.empty_like(self._A_end))
        B = torch.stack(factors[n:], out=torch.empty_like(self._B_end))
        for slot in self._following:
            if slot.ledger.is_current():
                torch._foreach_copy_([A[slot.place], B[slot.place]], slot.end)
        if _same_bits(A, self._A_end) and _same_bits(B, self._B_end):
            self._start, self._continues = (self._A_end, self._B_end), [True] * len(self.slots)
        else:
            self._start = A, B
            self._continues = [
                _same_bits(A_i, slot.end[0]) and _same_bits(B_i, slot.end[1])
                for slot, A_i, B_i in zip(self.slots, A, B, strict=True)
            ]
            self.changed_outside += [
                slot.weight
                for slot, A_i, B_i, continues in zip(self.slots, A, B, self._continues, strict=True)
                if not continues and slot.ledger.is_current() and changed(slot.end, (A_i, B_i))
            ]
        self._delta, self._chunks_written, self._due, self._extended = None, 0, None, []

    def marks(self) -> list[Tensor]:
        """Make the delta, and return its sizes; if it takes several chunks, which are made later, look at A' and B'."""
        self._now = self._now or self._parameters or self._factors()
        assert self._start is not None
        if len(self._chunks) > 1:
            tensors = self._now if all(self._continues) else [*self._now, *self._start]
            totals = torch.stack([tensor.detach().abs().sum(dtype=self.dtype) for tensor in tensors])
            if bool((totals < torch.finfo(self.dtype).max / 4).all()):  # then no difference is infinite either
                return [totals]
        return [self._delta_of(chunk)[2] for chunk in self._chunks]

    def changed(self) -> bool:
        """Tell if any factor is another one than at the start of the step."""
        return any(bool(self._delta_of(chunk)[2].any()) for chunk in self._chunks)

    def write(self, finite: Tensor, writer: Writer) -> None:
        """Add the delta to every W whose factors have changed, a chunk of weights after the other."""
        if not finite:
            return
        noises = self._noise(writer, self.slots)
        for number, chunk in enumerate(self._chunks):
            if number < self._chunks_written:
                continue
            U, V, sizes = self._delta_of(chunk)
            for slot, U_i, V_i, size in zip(self.slots[chunk], U.unbind(0), V.unbind(0), sizes.tolist(), strict=True):
                if size > 0:
                    i = slot.place
                    noise = None if noises is None else (noises[0][i], noises[1][i])
                    writer.add_product_(slot.weight, U_i, V_i, self._coefs[i], noise, self._written[i])
            self._chunks_written = number + 1

    def record(self, finite: Tensor) -> list[Ledger]:
        """Extend the ledgers whose moves do not continue the last ones, and keep A' and B'; return these ledgers."""
        if not finite:
            for slot in self.slots:
                if not slot.weight.triple.follows_between_steps:
                    slot.ledger.set_current(False)
            return []
        assert self._start is not None
        if self._due is None:
            self._due = [
                Move(slot, coef, (self._start[0][i], self._start[1][i]), None if continues else slot.end)
                for i, (slot, coef, continues) in enumerate(zip(self.slots, self._coefs, self._continues, strict=True))
                if not continues or coef != slot.ledger.coef
            ]
        extended = extend_ledgers(self._due, self._extended)
        for slot, count, written in zip(self.slots, self._counts, self._written, strict=True):
            if written:
                slot.weight.moves = count
        torch.stack(self._now[: len(self.slots)], out=self._A_end)
        torch.stack(self._now[len(self.slots) :], out=self._B_end)
        for slot in self.slots:
            slot.ledger.set_current()
        return extended

    def release(self) -> None:
        """Let go of what only a step needs."""
        super().release()
        self._parameters = []
        self._start = self._delta = self._due = None

    def _delta_of(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return U = [A' - A | A], V = [B' ; B' - B] and sizes of a chunk of weights; those of the last one are kept.

        The size is the largest magnitude in a weight's A' - A and B' - B: 0 if it does not move.
        """
        assert self._start is not None
        if self._delta is None or self._delta[0] != chunk:
            A, B = (stack[chunk] for stack in self._start)
            U, V = A.new_empty(*A.shape[:-1], 2 * self._r), B.new_empty(*B.shape[:-2], 2 * self._r, self._d)
            (A_change, A_old), (B_new, B_change) = U.split(self._r, dim=-1), V.split(self._r, dim=-2)
            A_old.copy_(A)
            n = len(self.slots)
            torch.sub(torch.stack(self._now[:n][chunk], out=torch.empty_like(A)), A, out=A_change)
            B_new.copy_(torch.stack(self._now[n:][chunk], out=torch.empty_like(B)))
            torch.sub(B_new, B, out=B_change)
            self._delta = chunk, U, V, torch.maximum(_size(A_change), _size(B_change))
        return self._delta[1:]


class DeviceBuffers(FactorBuffers):
    """Buffers on a device that the host cannot read without waiting: nothing here waits.

    U and V stay from step to step, as the kernel's table holds their places. The factors from before the inner step
    are in their second halves, until the delta is made there.

    Args:
        kind: of the weights.
        members: the weights.
        kernel: the module that writes 16-bit weights; None for blocks of torch operations.
    """

    def __init__(self, kind: Kind, members: Sequence[WeightState], kernel: ModuleType | None) -> None:
        super().__init__(kind, members)
        n = len(members)
        self.U = torch.empty(n, *self._lead, self._c, 2 * self._r, dtype=self.dtype, device=self.device)
        self.V = torch.empty(n, *self._lead, 2 * self._r, self._d, dtype=self.dtype, device=self.device)
        self._A_new, self._A_old = self.U.split(self._r, dim=-1)
        self._B_new, self._B_old = self.V.split(self._r, dim=-2)
        self._new = self._A_new.unbind(0) + self._B_new.unbind(0)
        self._old = self._A_old.unbind(0) + self._B_old.unbind(0)
        self._by_kernel = KernelBatch(kernel) if kernel is not None and self.dtype == torch.float32 else None
        self._making: list[Any] = []
        self._masking: list[Any] = []
        self._launched: list[Any] = []
        self._sizes: Tensor | None = None
        self._updates: LedgerUpdates | None = None
        # By slot, the number of steps without a move when it last moved, if the next move may begin there.
        self._rests = {slot.place: slot.ledger.rests for slot in self._following if slot.ledger.is_current()}

    @property
    def nbytes(self) -> int:
        """Bytes that stay from step to step."""
        return super().nbytes + self.U.nbytes + self.V.nbytes

    def snapshot(self) -> None:
        """Keep A and B, lambda times s, and all that the ledgers may need once the device has reported."""
        super().snapshot()
        torch._foreach_copy_(self._old, self._factors())
        for slot in self._following:
            self._begin_at_the_end(slot)
        self._making, self._masking, self._launched, self._sizes = [], [], [], None
        self._updates = LedgerUpdates(
            list(zip(self.slots, self._coefs, strict=True)),
            start=(self._A_old.clone(), self._B_old.clone()),
            before=(self._A_end.clone(), self._B_end.clone()),
            continues=_equal(self._A_old, self._A_end) & _equal(self._B_old, self._B_end),
        )

    def marks(self) -> list[Tensor]:
        """Make the delta, and return its sizes: 0 where nothing has changed."""
        if self._sizes is None:
            self._now = self._now or self._factors()
            copying = partial(torch._foreach_copy_, self._new, self._now)
            call_the_rest(self._making, [copying, *_delta_calls(self.U, self.V)])
            self._sizes = torch.maximum(_size(self._A_new), _size(self._B_old))
        return [self._sizes]

    def changed(self) -> bool:
        """Tell if any factor is another one than at the start of the step. Waits for the device."""
        return bool(self.marks()[0].any())

    def write(self, finite: Tensor, writer: Writer) -> None:
        """Add the delta to every W; the device leaves those alone whose factors did not change, or all of them."""
        keep = self.marks()[0].gt(0) & finite.to(self.device)
        others = self.slots
        if self._by_kernel is not None:
            narrow = [slot for slot in self.slots if slot.weight.tensors.W.element_size() == 2]
            others = [slot for slot in self.slots if slot.weight.tensors.W.element_size() != 2]
            self._write_by_kernel(self._by_kernel, narrow, keep, writer)
        if not others:
            return
        # The host does not know which ones to leave out. Their factors become +0 and all coefficients negative: adding
        # -0 leaves every bit. (cuBLAS adds +0 to a float32 W all the same, so that a -0.0 there becomes 0.0.)
        turned = [self.U[slot.place] for slot in self.slots if self._coefs[slot.place] > 0]
        drop = ~keep.view(-1, *[1] * (self.U.dim() - 1))
        masking: list[Callable[[], object]] = [partial(torch._foreach_neg_, turned)] if turned else []
        masking += [partial(self.U.masked_fill_, drop, 0.0), partial(self.V.masked_fill_, drop, 0.0)]
        call_the_rest(self._masking, masking)
        noises = self._noise(writer, others)
        for slot in others:
            i = slot.place
            noise = None if noises is None else (noises[0][i], noises[1][i])
            coef = -abs(self._coefs[i])
            writer.add_product_(slot.weight, self.U[i], self.V[i], coef, noise, self._written[i])

    def record(self, finite: Tensor) -> LedgerUpdates:
        """Keep A and B where the move was applied; return the updates of the ledgers, on their way to the host."""
        assert self._updates is not None
        applied = finite.to(self.device)
        torch._foreach_copy_(self._end, self._now)
        for end, before in zip((self._A_end, self._B_end), self._updates.before, strict=True):
            end.copy_(torch.where(applied, end, before))
        self._updates.send(applied, self.marks()[0].gt(0) & applied)
        self._rests = {slot.place: slot.weight.ledger.rests for slot in self._following}
        return self._updates

    def release(self) -> None:
        """Let go of what only a step needs, the copies of the factors too: the ledgers' updates hold them."""
        super().release()
        self._updates = self._sizes = None

    def _begin_at_the_end(self, slot: Slot) -> None:
        """Let a move begin where the last one ended, unless A and B were trained without a move since."""
        i = slot.place
        if self._rests.get(i) != slot.ledger.rests:
            return
        for old, end in ((self._A_old[i], self._A_end[i]), (self._B_old[i], self._B_end[i])):
            old.copy_(torch.where(end.isnan().any(), old, end))  # no move was applied yet

    def _write_by_kernel(self, batch: KernelBatch, slots: Sequence[Slot], keep: Tensor, writer: Writer) -> None:
        if not slots:
            return
        hashes = self._hashes()
        additions = [
            Addition(slot.weight, self.U[i], self.V[i], self._coefs[i], writer.compensation(slot.weight), hashes[i], i)
            for slot in slots
            for i in [slot.place]
        ]
        batch.add_(additions, keep, writer.keys if writer.stochastic else None, self._launched)
        for slot in slots:
            self._written[slot.place] = self._launched


class LedgerUpdates:
    """The ledger updates that one step may need, until the host knows whether it does.

    Args:
        moves: slots, and what multiplied their deltas in this step.
        start: A and B of all slots at the start of the step.
        before: A and B of all slots as the last moves left them.
        continues: one bool a move, on the device: True if the factors at the start are those of the last move.
    """

    def __init__(self, moves: Sequence[tuple[Slot, float]], start: Factors, before: Factors, continues: Tensor) -> None:
        self.before = before
        self._moves = moves
        self._start = start
        self._continues = continues
        self._rests = [slot.ledger.rests for slot, _ in moves]
        self.changed_outside: list[WeightState] | None = None
        self._flags: Tensor | None = None
        self._counts: list[tuple[WeightState, int | None]] = []
        self._due: list[Move] | None = None
        self._extended: list[Any] = []
        self.event: torch.cuda.Event | None = None

    def send(self, applied: Tensor, moved: Tensor) -> None:
        """Send what the device knows to the host, without waiting.

        Args:
            applied: 0-d bool: whether the step moved any W.
            moved: one bool a move: whether it changed this W.
        """
        flags = torch.cat([self._continues, moved, applied.view(1)])
        if flags.device.type != "cuda":
            self._flags = flags
            return
        self._flags = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
        self._flags.copy_(flags, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record(torch.cuda.current_stream(flags.device))

    def record(self) -> list[Ledger]:
        """Extend the ledgers whose moves were applied and do not continue the last ones; return these."""
        assert self._flags is not None
        if self.event is not None:
            self.event.synchronize()
        *flags, applied = self._flags.tolist()
        continues, moved = flags[: len(self._moves)], flags[len(self._moves) :]
        if self.changed_outside is None:
            self.changed_outside = [
                slot.weight
                for (slot, _), rests, goes_on in zip(self._moves, self._rests, continues, strict=True)
                if not goes_on and slot.ledger.end is not None and slot.ledger.rests_at_end == rests
                if applied and changed(self._at(slot, self.before), self._at(slot, self._start))
            ]
        if self._due is None:
            weights = [slot.weight for slot, _ in self._moves]
            self._counts = [
                (w, w.count_after_a_move()) for w, has_moved in zip(weights, moved, strict=True) if has_moved
            ]
            moves = [
                Move(slot, coef, self._at(slot, self._start), None if goes_on else self._at(slot, self.before))
                for (slot, coef), goes_on in zip(self._moves, continues, strict=True)
            ]
            self._due = [move for move in moves if applied and not move.continues_the_last()]
        for weight, count in self._counts:
            weight.moves = count
        extended = extend_ledgers(self._due, self._extended)
        for (slot, _), rests in zip(self._moves, self._rests, strict=True):
            if applied or not slot.weight.triple.follows_between_steps:
                slot.ledger.rests_at_end = rests if applied else -1
        return extended

    @staticmethod
    def _at(slot: Slot, stacks: Factors) -> Factors:
        return stacks[0][slot.place], stacks[1][slot.place]


class Move(NamedTuple):
    """The move of one W in one step, for its ledger.

    Attributes:
        slot: of the weight.
        coef: lambda times s.
        start: A and B at the start of the step.
        before: A and B as the last move left them, if they are others; else None.
    """

    slot: Slot
    coef: float
    start: Factors
    before: Factors | None

    def continues_the_last(self) -> bool:
        """Tell if the ledger knows of this move by `end` alone."""
        return self.before is None and self.coef == self.slot.ledger.coef


def extend_ledgers(moves: Sequence[Move], extended: list[Any]) -> list[Ledger]:
    """Extend the ledgers of these moves, and let them share the factors in the buffers; return the ledgers.

    Args:
        moves: that do not continue the last ones.
        extended: one entry for each of the moves that was done. After an exception a call does the others.
    """
    for slot, coef, start, before in moves[len(extended) :]:
        note(extended, partial(slot.ledger.extend, coef, start, before))
    for move in moves:
        move.slot.ledger.end = move.slot.end
    return [move.slot.ledger for move in moves]


def _delta_calls(U: Tensor, V: Tensor) -> list[Callable[[], object]]:
    """Return the calls that make `factored_delta_`: each writes over what it has read, so it must be made once."""
    A_new, A_old = U.chunk(2, dim=-1)
    B_new, B_old = V.chunk(2, dim=-2)
    return [partial(A_new.sub_, A_old), partial(torch.sub, B_new, B_old, out=B_old)]


def _size(change: Tensor) -> Tensor:
    """Return the largest magnitude in each of the n changes; NaN or infinite if one number is."""
    # torch.linalg.vector_norm(ord=inf) says the same without the temporary, but is 5 times slower on a CPU.
    return change.abs().amax(dim=tuple(range(1, change.dim())))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Compare two contiguous tensors; as integers, which takes half as long."""
    word = torch.int64 if one.numel() * one.element_size() % 8 == 0 else torch.int32
    return torch.equal(one.view(-1).view(word), other.view(-1).view(word))


def _equal(one: Tensor, other: Tensor) -> Tensor:
    """Compare two stacks of n tensors: (n,) bool."""
    return (one == other).flatten(1).all(1)
