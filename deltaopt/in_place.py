"""The update in place: every W moves by the delta of its factors, in one fused product (Eq. 6 of the paper).

    W <- W + coef * (A'B' - AB),    A'B' - AB = [A' - A | A] @ [B' ; B' - B] = U @ V

U is (c, 2r) and V is (2r, d), so one `addmm_` reads and writes W once. The dense product is never formed,
and a small change is not lost as the difference of two large products.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from deltaopt.gradient_hooks import leave_whole
from deltaopt.guard import FiniteGuard
from deltaopt.ledger import Factors, Ledger, warn_of_lost
from deltaopt.rounding.batch import Addition, KernelBatch, fused_kernel
from deltaopt.rounding.blocks import NoiseFactors, Scratch, add_product_, full_precision
from deltaopt.rounding.noise import label_hashes
from deltaopt.rounding.writer import Writer
from deltaopt.rule import Closure, UpdateRule
from deltaopt.tensors import FLOATS, WAY_OUT, is_plain
from deltaopt.weight import WeightState

Kind: TypeAlias = "tuple[torch.Size, torch.Size, torch.dtype, torch.device]"
"""The properties that weights in the same buffers share: shapes of A and B, dtype of the computation, device."""


def factored_delta_(U: Tensor, V: Tensor) -> None:
    """Turn U = [A' | A] and V = [B' ; B] into [A' - A | A] and [B' ; B' - B], whose product is A'B' - AB.

    Args:
        U: (..., c, 2r), written in place.
        V: (..., 2r, d), written in place.
    """
    A_new, A_old = U.chunk(2, dim=-1)
    B_new, B_old = V.chunk(2, dim=-2)
    A_new.sub_(A_old)
    torch.sub(B_new, B_old, out=B_old)


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


@torch.no_grad()
def delta_lora_(
    W: Tensor,
    U: Tensor,
    V: Tensor,
    coef: float,
    noise: NoiseFactors | None = None,
    compensation: Tensor | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Move one W by Eq. 6, W += coef * (A'B' - AB), with U and V of `factored_delta`.

    Args:
        W: (c, d) or (e, c, d), float16, bfloat16, float32 or float64; written in place.
        U: (c, 2r) or (e, c, 2r), float32 or float64.
        V: (2r, d) or (e, 2r, d).
        coef: lambda * s, update_ratio times scaling.
        noise: rounds a 16-bit W stochastically, see `deltaopt.rounding.blocks.add_product_`. Default: to nearest.
        compensation: rounds a 16-bit W with compensation, see there.
        scratch: memory for blocks, see there.
    """
    with full_precision(W.device):
        add_product_(W, U, V, coef, noise, compensation, scratch)


class Host:
    """The things that the host can do with a device without waiting for it.

    A test on a CPU hands in a subclass that acts as the host of a GPU.
    """

    def reads(self, device: torch.device) -> bool:
        """Tell if the host can read a tensor on the device without waiting."""
        return device.type == "cpu"

    def arrived(self, event: torch.cuda.Event | None) -> bool:
        """Tell if a message from the device has arrived: the one whose end is marked by `event`."""
        return event is None or event.query()

    def kernel(self, device: torch.device) -> ModuleType | None:
        """Return the module with the kernel for 16-bit weights on the device; None where there is none."""
        return fused_kernel(device)


class InPlaceUpdate(UpdateRule):
    """Keeps the factors of all weights from before the inner step, then moves every W by their delta.

    Weights with factors of equal shape share one set of buffers, (n, c, 2r), (n, 2r, d) and, for the ledgers, (n, c, r)
    and (n, r, d), kept from step to step, so that the differences take a few launches for all of them.

    Args:
        host: decides what is read from a device, and when. Default: without ever waiting for it.
    """

    name = "in_place"
    moves_weights = True
    scales_branches = False

    def __init__(self, host: Host | None = None) -> None:
        self._host = host if host is not None else Host()
        self._guard = FiniteGuard()
        self._kinds: dict[WeightState, Kind] = {}
        self._buffers: dict[Kind, _Buffers] = {}
        self._pending: deque[_LedgerUpdates] = deque()
        self._warned = False

    def weight_problems(self, weight: WeightState, unwritable: list[str]) -> list[str]:
        """Say why W cannot be written, with the way out for packed and quantized ones."""
        W = weight.tensors.W
        if is_plain(W) and W.dtype in FLOATS:
            return unwritable
        return [f"{unwritable[0]}. {WAY_OUT}", *unwritable[1:]]

    def attach(self, weights: Sequence[WeightState]) -> None:
        """Leave the gradients of these weights' factors whole, though an earlier folded run divided them."""
        leave_whole([weight.triple for weight in weights], self)

    def follow(self, weights: Sequence[WeightState], replaced: bool) -> None:
        """Forget how the weights were grouped, if some tensors are other ones."""
        if replaced:
            self._kinds.clear()

    @torch.no_grad()
    def before_step(self, weights: Sequence[WeightState], writer: Writer, closure: Closure | None) -> None:
        """Keep A and B of every weight that moves in this step, in the dtype of the computation."""
        self._complete_ledgers(wait=False)
        moving: dict[Kind, list[WeightState]] = {}
        for weight in weights:
            if weight.ratio > 0:
                moving.setdefault(self._kind(weight), []).append(weight)
        kept, self._buffers = self._buffers, {}
        for kind, members in moving.items():
            buffers = kept.get(kind)
            if buffers is None or not buffers.serve(members):
                self._complete_ledgers(wait=True)
                buffers = _Buffers(kind, members, self._host)
            self._buffers[kind] = buffers
            buffers.snapshot()

    @torch.no_grad()
    def after_step(self, weights: Sequence[WeightState], writer: Writer) -> None:
        """Compute W += coef * (A'B' - AB) for every weight that moves, or for none if a factor is not finite.

        A W whose factors did not change keeps its bits.
        """
        if not self._buffers:
            return
        for buffers in self._buffers.values():
            buffers.note_bases()
        changes = [(buffers, buffers.difference()) for buffers in self._buffers.values()]
        finite = self._guard.verdict([size for _, size in changes])
        for buffers, size in changes:
            applied = finite.to(size.device)
            with full_precision(size.device):
                keep = size.gt(0) & applied
                others = buffers.add_by_kernel_(keep, writer)
                for slot, coef, noise in buffers.products(others, keep, writer):
                    writer.add_product_(slot.weight, slot.U, slot.V, coef, noise)
            updates = buffers.ledger_updates(applied)
            if updates is not None:
                self._pending.append(updates)
        self._complete_ledgers(wait=False)

    def flush(self) -> None:
        """Record the moves of all past steps in the ledgers. Waits for the device."""
        self._complete_ledgers(wait=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffers.nbytes for buffers in self._buffers.values())

    @property
    def skipped_updates(self) -> int:
        """The number of steps that left every W alone because a factor was not finite. Waits for the device."""
        return self._guard.skipped

    @skipped_updates.setter
    def skipped_updates(self, count: int) -> None:
        self._guard = FiniteGuard(count)

    def _complete_ledgers(self, wait: bool) -> None:
        """Record the moves of past steps that the host knows of; with `wait`, of all past steps."""
        while self._pending and (wait or self._host.arrived(self._pending[0].event)):
            extended = self._pending.popleft().record()
            if not self._warned:
                self._warned = warn_of_lost(extended, stacklevel=6)

    def _kind(self, weight: WeightState) -> Kind:
        kind = self._kinds.get(weight)
        if kind is None:
            A, B = weight.factors()
            kind = self._kinds[weight] = A.shape, B.shape, weight.tensors.compute_dtype(), A.device
        return kind

    def __getstate__(self) -> dict[str, Any]:
        # The buffers and what is known of devices belong to the process; the ledgers were completed before.
        return {"skipped_updates": self.skipped_updates, "host": self._host}

    def __setstate__(self, state: dict[str, Any]) -> None:
        InPlaceUpdate.__init__(self, state["host"])
        self.skipped_updates = state["skipped_updates"]


class _Slot(NamedTuple):
    """The place of one weight in its buffers: views that are made once, as every step would make them again.

    Attributes:
        weight: whose slot it is.
        ledger: of this weight when the buffers were made; `rebase` and loading give it another one.
        U: (c, 2r).
        V: (2r, d).
        end: A and B as the last move left them, which the ledger shares.
        place: its index.
    """

    weight: WeightState
    ledger: Ledger
    U: Tensor
    V: Tensor
    end: Factors
    place: int


class _Buffers:
    """U and V of the weights of one kind, and the factors that their last moves came to."""

    def __init__(self, kind: Kind, members: Sequence[WeightState], host: Host) -> None:
        self._host = host
        (*lead, c, r), (*_, d), dtype, device = kind
        n = len(members)
        self._shape = *lead, c, d
        self._known_hashes: Tensor | None = None
        self._by_kernel: KernelBatch | None = None
        self.U = torch.empty(n, *lead, c, 2 * r, dtype=dtype, device=device)
        self.V = torch.empty(n, *lead, 2 * r, d, dtype=dtype, device=device)
        self._A_new, self._A_old = self.U.split(r, dim=-1)
        self._B_new, self._B_old = self.V.split(r, dim=-2)
        # Not a number at first: equal to nothing, so that a first move does not seem to continue another.
        self._A_end = torch.full_like(self._A_old, torch.nan, memory_format=torch.contiguous_format)
        self._B_end = torch.full_like(self._B_old, torch.nan, memory_format=torch.contiguous_format)
        self._new = self._A_new.unbind(0) + self._B_new.unbind(0)
        self._old = self._A_old.unbind(0) + self._B_old.unbind(0)
        self._end = self._A_end.unbind(0) + self._B_end.unbind(0)
        self._slots = [
            _Slot(weight, weight.ledger, self.U[i], self.V[i], (self._end[i], self._end[n + i]), i)
            for i, weight in enumerate(members)
        ]
        for slot in self._slots:
            ledger = slot.ledger.to(device, dtype)
            if ledger.end is not None and ledger.end[0].shape != slot.end[0].shape:
                ledger.close()
            if ledger.end is not None:
                torch._foreach_copy_(slot.end, ledger.end)
                ledger.end = slot.end
        self._coefs: list[float] = []
        self._now: tuple[Tensor, ...] = ()
        self._updates: _LedgerUpdates | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.U, self.V, self._A_end, self._B_end))

    def serve(self, members: Sequence[WeightState]) -> bool:
        """Tell if the buffers were made for these weights, and the ledgers still share them."""
        return len(members) == len(self._slots) and all(
            slot.weight is members[slot.place]
            and slot.weight.ledger is slot.ledger
            and (slot.ledger.end is slot.end or slot.ledger.end is None)
            for slot in self._slots
        )

    def snapshot(self) -> None:
        """Keep A and B, and lambda times s, as they are before the inner step."""
        self._coefs = [slot.weight.ratio * slot.weight.triple.scaling for slot in self._slots]
        torch._foreach_copy_(self._old, self._factors())
        self._updates = self._possible_updates()

    def note_bases(self) -> None:
        """Note what every W is before its first move."""
        for slot in self._slots:
            slot.weight.note_base()

    def difference(self) -> Tensor:
        """Make U = [A' - A | A] and V = [B' ; B' - B]; return (n,) sizes of the change, 0 where there is none."""
        self._now = self._factors()
        torch._foreach_copy_(self._new, self._now)
        factored_delta_(self.U, self.V)
        return torch.maximum(_size(self._A_new), _size(self._B_old))

    def add_by_kernel_(self, keep: Tensor, writer: Writer) -> list[_Slot]:
        """Write the 16-bit weights that `keep`, (n,) bool, names, where there is a kernel; return the other slots."""
        kernel = self._host.kernel(keep.device) if self.U.dtype == torch.float32 else None
        if kernel is None:
            return self._slots
        narrow: list[_Slot] = []
        others: list[_Slot] = []
        for slot in self._slots:
            (narrow if slot.weight.tensors.W.element_size() == 2 else others).append(slot)
        if not narrow:
            return others
        if self._by_kernel is None:
            self._by_kernel = KernelBatch(kernel)
        hashes = self._hashes()
        additions = [
            Addition(slot.weight, slot.U, slot.V, self._coefs[i], writer.compensation(slot.weight), hashes[i], i)
            for slot in narrow
            for i in [slot.place]
        ]
        self._by_kernel.add_(additions, keep, writer.keys if writer.stochastic else None)
        return others

    def products(
        self, slots: list[_Slot], keep: Tensor, writer: Writer
    ) -> list[tuple[_Slot, float, NoiseFactors | None]]:
        """Return the slots whose product coef * U @ V is to be added, with coef and the noise of the matrix.

        On a CPU these are the slots that `keep`, (n,) bool, names. On a GPU the host does not know them, so all slots
        come back: the factors of the others become +0 and every coefficient negative, as adding -0 leaves every bit.
        """
        if not slots:
            return []
        masked = not self._host.reads(keep.device)
        if masked:
            self._mask_(keep)
        else:
            kept = keep.tolist()
            slots = [slot for slot in slots if kept[slot.place]]
        narrow = any(slot.weight.tensors.W.element_size() == 2 for slot in slots)
        c, d = self._shape[-2:]
        noises = writer.noise(self._hashes(), c, d, keep.device) if narrow and writer.stochastic else None
        return [
            (
                slot,
                -abs(self._coefs[slot.place]) if masked else self._coefs[slot.place],
                None if noises is None else (noises[0][slot.place], noises[1][slot.place]),
            )
            for slot in slots
        ]

    def ledger_updates(self, applied: Tensor) -> _LedgerUpdates | None:
        """Keep the factors that the moves came to, if they were `applied` (0-d bool on the device).

        Returns:
            The updates of the ledgers; None where all moves continue the last ones.
        """
        updates, now = self._updates, self._now
        self._now, self._updates = (), None
        if self._host.reads(applied.device):
            if not applied:
                return None
            torch._foreach_copy_(self._end, now)
        else:
            A_before, B_before = self._A_end.clone(), self._B_end.clone()
            torch._foreach_copy_(self._end, now)
            self._A_end.copy_(torch.where(applied, self._A_end, A_before))
            self._B_end.copy_(torch.where(applied, self._B_end, B_before))
        if updates is not None:
            updates.send(applied)
        return updates

    def _possible_updates(self) -> _LedgerUpdates | None:
        """Return the ledger updates that this step may need.

        On a CPU: those of moves that do not continue the last one. On a GPU: all, since the host cannot tell yet.
        """
        reads = self._host.reads(self.U.device)
        if reads and torch.equal(self._A_old, self._A_end) and torch.equal(self._B_old, self._B_end):
            continues = torch.ones(len(self._slots), dtype=torch.bool, device=self.U.device)
        else:
            continues = _equal(self._A_old, self._A_end) & _equal(self._B_old, self._B_end)
        slots = self._slots
        if reads:
            known = continues.tolist()
            slots = [slot for slot in slots if not (known[slot.place] and self._coefs[slot.place] == slot.ledger.coef)]
            if not slots:
                return None
            continues = continues[[slot.place for slot in slots]]
        start, before = (self._A_old.clone(), self._B_old.clone()), (self._A_end.clone(), self._B_end.clone())
        return _LedgerUpdates([(slot, self._coefs[slot.place]) for slot in slots], start, before, continues)

    def _mask_(self, keep: Tensor) -> None:
        """Zero U and V where not kept, and turn the sign of U where the coefficient is positive."""
        drop = ~keep.view(-1, *[1] * (self.U.dim() - 1))
        turned = [slot.U for slot in self._slots if self._coefs[slot.place] > 0]
        if turned:
            torch._foreach_neg_(turned)
        self.U.masked_fill_(drop, 0.0)
        self.V.masked_fill_(drop, 0.0)

    def _hashes(self) -> Tensor:
        """Hash the labels of each W's matrices, once."""
        if self._known_hashes is None:
            self._known_hashes = label_hashes([slot.weight.label for slot in self._slots], self._shape[:-2])
        return self._known_hashes

    def _factors(self) -> tuple[Tensor, ...]:
        factors = [slot.weight.factors() for slot in self._slots]
        return (*(A for A, _ in factors), *(B for _, B in factors))


class _LedgerUpdates:
    """The ledger updates that one step may need, until the host knows whether it does.

    Args:
        moves: slots, and what multiplied their deltas in this step.
        start: A and B of all slots at the start of the step.
        before: A and B of all slots as the last moves left them.
        continues: one bool a move, on the device: True if the factors at the start are those of the last move.
    """

    def __init__(self, moves: list[tuple[_Slot, float]], start: Factors, before: Factors, continues: Tensor) -> None:
        self._moves = moves
        self._start = start
        self._before = before
        self._flags = continues
        self.event: torch.cuda.Event | None = None

    def send(self, applied: Tensor) -> None:
        """Send what the device knows to the host, without waiting."""
        flags = torch.cat([self._flags, applied.view(1)])
        if flags.device.type != "cuda":
            self._flags = flags
            return
        self._flags = torch.empty(flags.shape, dtype=torch.bool, device="cpu", pin_memory=True)
        self._flags.copy_(flags, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record(torch.cuda.current_stream(flags.device))

    def record(self) -> list[Ledger]:
        """Extend the ledgers whose moves were applied and do not continue the last ones; return these."""
        if self.event is not None:
            self.event.synchronize()
        *continues, applied = self._flags.tolist()
        extended = []
        for number, (slot, coef) in enumerate(self._moves):
            ledger, i = slot.ledger, slot.place
            if applied and not (continues[number] and coef == ledger.coef):
                before = None if continues[number] else (self._before[0][i], self._before[1][i])
                ledger.extend(coef, (self._start[0][i], self._start[1][i]), before)
                ledger.end = slot.end
                extended.append(ledger)
        return extended


def _size(change: Tensor) -> Tensor:
    """Return the largest magnitude in each of the n changes; NaN or infinite if one number is."""
    # torch.linalg.vector_norm(ord=inf) says the same without the temporary, but is 5 times slower on a CPU.
    return change.abs().amax(dim=tuple(range(1, change.dim())))


def _equal(one: Tensor, other: Tensor) -> Tensor:
    """Compare two stacks of n tensors: (n,) bool."""
    return (one == other).flatten(1).all(1)
