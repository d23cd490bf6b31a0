"""The delta of the factors and its one fused product (Eq. 6 of the paper).

    W <- W + coef * (A'B' - AB),    A'B' - AB = [A' - A | A] @ [B' ; B' - B] = U @ V

U is (c, 2r) and V is (2r, d), so one `addmm_` reads and writes W once. The dense product is never formed,
and a small change is not lost as the difference of two large products.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaopt.fused import Addition, FusedWrites, fused_kernel
from deltaopt.guard import FiniteGuard
from deltaopt.ledger import Ledger, warn_of_lost
from deltaopt.noise import label_hashes
from deltaopt.rounding import full_precision
from deltaopt.triple import LoRATriple, Stored
from deltaopt.writing import Write


class BufferKind(NamedTuple):
    """What triples have in common that share buffers: shapes of the factors, dtype of the computation, device."""

    A: torch.Size
    B: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, triple: LoRATriple, stored: Stored) -> BufferKind:
        """The kind of a triple."""
        A, B = triple.factor_matrices(stored)
        return cls(A.shape, B.shape, stored.compute_dtype(), A.device)


class Move(NamedTuple):
    """One triple in one step: its tensors, what multiplies the delta, whose buffers it can share, its account."""

    triple: LoRATriple
    stored: Stored
    coef: float
    kind: BufferKind
    ledger: Ledger

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as matrices, as they are now."""
        return self.triple.factor_matrices(self.stored)


class FactoredDelta:
    """Keeps the factors of many triples from before the inner step, then moves every W by their delta.

    Triples of equal shape share one set of buffers, (n, c, 2r), (n, 2r, d) and, for the ledgers, (n, c, r) and
    (n, r, d), kept from step to step, so that the differences take a few launches for all of them.
    """

    def __init__(self) -> None:
        self._stacks: dict[BufferKind, _Stack] = {}
        self._entries: deque[_Entry] = deque()
        self._warned = False

    @torch.no_grad()
    def snapshot(self, moves: Sequence[Move]) -> None:
        """Keep A and B of every move, in the dtype of the computation."""
        self.settle(wait=False)
        grouped: dict[BufferKind, list[Move]] = {}
        for move in moves:
            grouped.setdefault(move.kind, []).append(move)
        kept, self._stacks = self._stacks, {}
        for kind, members in grouped.items():
            stack = kept.get(kind)
            if stack is None or not stack.serves(members):
                self.settle()
                stack = _Stack(kind, members)
            self._stacks[kind] = stack
            stack.snapshot(members)

    @torch.no_grad()
    def apply_(self, guard: FiniteGuard, write: Write) -> None:
        """W += coef * (A'B' - AB) for every move of the snapshot, or for none if a factor is not finite.

        A W whose factors did not change keeps its bits.

        Args:
            guard: tells whether all factors are finite.
            write: how the W's are written.
        """
        stacks = list(self._stacks.values())
        sizes = [stack.difference() for stack in stacks]
        if not sizes:
            return
        finite = guard.verdict(sizes)
        for stack, size in zip(stacks, sizes, strict=True):
            applied = finite.to(size.device)
            with full_precision(size.device):
                stack.add_to_weights_(size.gt(0) & applied, write)
            self._entries += stack.account(applied)
        self.settle(wait=False)

    def settle(self, wait: bool = True) -> None:
        """Enter into the ledgers what the device has told of past steps; with `wait`, of all of them."""
        while self._entries and (wait or self._entries[0].arrived()):
            extended = self._entries.popleft().enter()
            if not self._warned:
                self._warned = warn_of_lost(extended, stacklevel=6)

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers hold."""
        return sum(stack.nbytes for stack in self._stacks.values())


class _Stack:
    """U and V of the moves of one kind, and the factors that their last moves came to."""

    def __init__(self, kind: BufferKind, members: Sequence[Move]) -> None:
        self._ledgers = ledgers = [move.ledger for move in members]
        n, (*lead, c, r), d = len(ledgers), kind.A, kind.B[-1]
        self._shape = *lead, c, d
        self._known_hashes: Tensor | None = None
        self._fused: FusedWrites | None = None
        self.U = torch.empty(n, *lead, c, 2 * r, dtype=kind.dtype, device=kind.device)
        self.V = torch.empty(n, *lead, 2 * r, d, dtype=kind.dtype, device=kind.device)
        self._A_new, self._A_old = self.U.split(r, dim=-1)
        self._B_new, self._B_old = self.V.split(r, dim=-2)
        # Not a number at first: equal to nothing, so that what was never moved does not seem to go on.
        self._A_end = torch.full_like(self._A_old, torch.nan, memory_format=torch.contiguous_format)
        self._B_end = torch.full_like(self._B_old, torch.nan, memory_format=torch.contiguous_format)
        # Views are made once: there are several for each W, and every step would make them anew.
        self._pairs = list(zip(self.U, self.V, strict=True))
        self._new = self._A_new.unbind(0) + self._B_new.unbind(0)
        self._old = self._A_old.unbind(0) + self._B_old.unbind(0)
        self._end = self._A_end.unbind(0) + self._B_end.unbind(0)
        self._ends = list(zip(self._A_end, self._B_end, strict=True))
        for ledger, end in zip(ledgers, self._ends, strict=True):
            ledger.to(kind.device, kind.dtype)
            if ledger.end is not None and ledger.end[0].shape != end[0].shape:
                ledger.close()
            if ledger.end is not None:
                torch._foreach_copy_(end, ledger.end)
                ledger.end = end
        self._members: Sequence[Move] = ()
        self._now: tuple[Tensor, ...] = ()
        self._entry: _Entry | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.U, self.V, self._A_end, self._B_end))

    def serves(self, members: Sequence[Move]) -> bool:
        """Whether these are the moves that the buffers were made for, and the ledgers have kept them."""
        return len(members) == len(self._ledgers) and all(
            move.ledger is ledger and (ledger.end is end or ledger.end is None)
            for move, ledger, end in zip(members, self._ledgers, self._ends, strict=True)
        )

    def snapshot(self, members: Sequence[Move]) -> None:
        self._members = members
        torch._foreach_copy_(self._old, self._factors())
        self._entry = self._begin()

    def difference(self) -> Tensor:
        """Make U = [A' - A | A] and V = [B' ; B' - B]; returns (n,) sizes of the change, 0 where there is none."""
        self._now = self._factors()
        torch._foreach_copy_(self._new, self._now)
        self._A_new.sub_(self._A_old)
        torch.sub(self._B_new, self._B_old, out=self._B_old)
        return torch.maximum(_size(self._A_new), _size(self._B_old))

    def add_to_weights_(self, keep: Tensor, write: Write) -> None:
        """Add coef * U @ V to the W's that `keep`, (n,) bool on the device, names.

        On a CPU the others are passed over, and in the kernel too. Elsewhere on a GPU, where `keep` is not known to the
        host, the factors of the others become +0 and the coefficient is made negative, as adding -0 leaves every bit.
        """
        rest = self._add_by_kernel_(keep, write)
        if not rest:
            return
        if _known_to_host(keep.device):
            kept = keep.tolist()
            rest, coefs = [i for i in rest if kept[i]], [move.coef for move in self._members]
        else:
            coefs = self._mask_(keep)
        narrow = any(self._members[i].stored.W.element_size() == 2 for i in rest)
        c, d = self._shape[-2:]
        noises = write.noise(self._hashes(), c, d, keep.device) if narrow and write.stochastic else None
        for i in rest:
            move, (U, V) = self._members[i], self._pairs[i]
            noise = None if noises is None else (noises[0][i], noises[1][i])
            write.product_(move.triple, move.ledger, move.stored.W, U, V, coefs[i], noise)

    def _add_by_kernel_(self, keep: Tensor, write: Write) -> list[int]:
        """What `add_to_weights_` does, for the 16-bit W's where there is a kernel; returns which are left."""
        kernel = fused_kernel(keep.device) if self.U.dtype == torch.float32 else None
        narrow = [move.stored.W.element_size() == 2 for move in self._members]
        if kernel is None or not any(narrow):
            return list(range(len(narrow)))
        if self._fused is None:
            self._fused = FusedWrites(kernel)
        additions = [
            Addition(move.triple, move.ledger, move.stored.W, U, V, move.coef, hashes, place)
            for place, (move, (U, V), hashes) in enumerate(zip(self._members, self._pairs, self._hashes(), strict=True))
            if narrow[place]
        ]
        self._fused.add_(additions, keep, write)
        return [i for i, fused in enumerate(narrow) if not fused]

    def account(self, applied: Tensor) -> list[_Entry]:
        """Keep the factors that the moves came to, if they were `applied` (0-d bool on the device).

        Returns:
            What is to be entered into the ledgers, nothing where the moves just go on.
        """
        entry, now = self._entry, self._now
        self._members, self._now, self._entry = (), (), None
        if _known_to_host(applied.device):
            if not applied:
                return []
            torch._foreach_copy_(self._end, now)
        else:
            before = self._A_end.clone(), self._B_end.clone()
            torch._foreach_copy_(self._end, now)
            for end, kept in zip((self._A_end, self._B_end), before, strict=True):
                end.copy_(torch.where(applied, end, kept))
        if entry is None:
            return []
        entry.hear(applied)
        return [entry]

    def _begin(self) -> _Entry | None:
        """How the moves begin: on a CPU of those that do not just go on, on a GPU, where nobody knows, of all."""
        known = _known_to_host(self.U.device)
        starts, ends = (self._A_old, self._B_old), (self._A_end, self._B_end)
        if known and all(map(torch.equal, starts, ends)):
            goes_on = torch.ones(len(self._ledgers), dtype=torch.bool)
        else:
            A_same, B_same = ((start == end).flatten(1).all(1) for start, end in zip(starts, ends, strict=True))
            goes_on = A_same & B_same
        chosen = list(range(len(self._ledgers)))
        if known:
            told = goes_on.tolist()
            chosen = [i for i in chosen if not (told[i] and self._members[i].coef == self._ledgers[i].coef)]
            if not chosen:
                return None
        A, B, A_before, B_before = (t.clone() for t in (*starts, *ends))
        beginnings = [
            _Beginning(
                self._ledgers[i],
                self._members[i].coef,
                (A[i], B[i]),
                (A_before[i], B_before[i]),
                self._ends[i],
            )
            for i in chosen
        ]
        return _Entry(beginnings, goes_on[chosen] if known else goes_on)

    def _mask_(self, keep: Tensor) -> list[float]:
        """Zero U and V where not kept, and turn the signs so that every coefficient is negative; returns these."""
        drop = ~keep.view(-1, *[1] * (self.U.dim() - 1))
        turned = [U for move, (U, _) in zip(self._members, self._pairs, strict=True) if move.coef > 0]
        if turned:
            torch._foreach_neg_(turned)
        self.U.masked_fill_(drop, 0.0)
        self.V.masked_fill_(drop, 0.0)
        return [-abs(move.coef) for move in self._members]

    def _hashes(self) -> Tensor:
        """Of each W's matrices, made once: they are text at first."""
        if self._known_hashes is None:
            self._known_hashes = label_hashes([move.triple.label for move in self._members], self._shape[:-2])
        return self._known_hashes

    def _factors(self) -> tuple[Tensor, ...]:
        A, B = zip(*(move.factors() for move in self._members), strict=True)
        return A + B


class _Beginning(NamedTuple):
    """Of one move: the factors at its start, those that the last move came to, and where the new ones are kept."""

    ledger: Ledger
    coef: float
    start: tuple[Tensor, Tensor]
    before: tuple[Tensor, Tensor]
    end: tuple[Tensor, Tensor]


class _Entry:
    """What one step may have to enter into ledgers, once the device has told whether it did.

    Args:
        beginnings: of the moves.
        goes_on: (n,) bool on the device, whether the factors at the start are those of the last move.
    """

    def __init__(self, beginnings: list[_Beginning], goes_on: Tensor) -> None:
        self._beginnings = beginnings
        self._told = goes_on
        self._event: torch.cuda.Event | None = None

    def hear(self, applied: Tensor) -> None:
        """Take what the device knows on its way to the host, without waiting."""
        told = torch.cat([self._told, applied.view(1)])
        if told.device.type != "cuda":
            self._told = told
            return
        self._told = torch.empty(told.shape, dtype=torch.bool, pin_memory=True)
        self._told.copy_(told, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(told.device))

    def arrived(self) -> bool:
        """Whether it can be entered without waiting."""
        return self._event is None or self._event.query()

    def enter(self) -> list[Ledger]:
        """Extend the ledgers that have something new, and return these."""
        if self._event is not None:
            self._event.synchronize()
        *goes_on, applied = self._told.tolist()
        extended = []
        for move, continues in zip(self._beginnings, goes_on, strict=True):
            if applied and not (continues and move.coef == move.ledger.coef):
                move.ledger.extend(move.coef, move.start, None if continues else move.before)
                move.ledger.end = move.end
                extended.append(move.ledger)
        return extended


def _known_to_host(device: torch.device) -> bool:
    """Whether the host can read a tensor there without waiting."""
    return device.type == "cpu"


def _size(change: Tensor) -> Tensor:
    """Largest magnitude in each of the n changes; NaN or infinite if one entry is."""
    # torch.linalg.vector_norm(ord=inf) says the same without the temporary, but is 5 times slower on a CPU.
    return change.abs().amax(dim=tuple(range(1, change.dim())))
