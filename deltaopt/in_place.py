"""The update in place: every W moves by the delta of its factors, in one fused product (Eq. 6 of the paper).

    W <- W + coef * (A'B' - AB),    A'B' - AB = [A' - A | A] @ [B' ; B' - B] = U @ V

U is (c, 2r) and V is (2r, d), so one `addmm_` reads and writes W once. The dense product is never formed,
and a small change is not lost as the difference of two large products.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaopt.factor_buffers import DeviceBuffers, FactorBuffers, HostBuffers, Kind, LedgerUpdates
from deltaopt.gradient_hooks import leave_whole
from deltaopt.host import Host
from deltaopt.ledger import Ledger
from deltaopt.outside import Watch
from deltaopt.rounding.blocks import NoiseFactors, Scratch, add_product_, full_precision
from deltaopt.rounding.writer import Writer
from deltaopt.rule import Closure, UpdateRule
from deltaopt.sharded_moves import ShardedMoves
from deltaopt.sharding import local_part
from deltaopt.tensors import FLOATS, WAY_OUT, is_plain
from deltaopt.weight import WeightState


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


class InPlaceUpdate(UpdateRule):
    """Keeps the factors of all weights from before the inner step, then moves every W by their delta.

    Args:
        host: decides what is read from a device, and when. Default: without ever waiting for it.
    """

    name = "in_place"
    moves_weights = True
    scales_branches = False
    watch: Watch

    def __init__(self, host: Host | None = None) -> None:
        super().__init__()
        self._host = host if host is not None else Host()
        self._kinds: dict[WeightState, Kind] = {}
        self._buffers: dict[Kind, FactorBuffers] = {}
        self._sharded = ShardedMoves(self._host)
        self._move: _Move | None = None
        self._pending: deque[LedgerUpdates] = deque()
        self._extended: list[Ledger] = []
        self.watch = Watch()

    def weight_problems(self, weight: WeightState, unwritable: list[str]) -> list[str]:
        """Say why W cannot be written, with the way out for packed and quantized ones."""
        if weight.is_sharded and weight.triple.follows_between_steps:
            return [
                "its layer changes A and B between steps (AdaLoRA's budget), which W follows in place where A, B and W "
                'are whole, not where they are sharded: use weight_update="folded", or LoRA'
            ]
        W = local_part(weight.tensors.W)
        if is_plain(W) and W.dtype in FLOATS:
            return unwritable
        return [f"{unwritable[0]}. {WAY_OUT}", *unwritable[1:]]

    def attach(self, weights: Sequence[WeightState]) -> None:
        """Leave the gradients of these weights' factors whole, though an earlier folded run divided them."""
        self.watch.add(weights)
        leave_whole([weight.triple for weight in weights], self)

    def follow(self, weights: Sequence[WeightState], replaced: bool) -> None:
        """Forget how the weights were grouped, if some tensors are other ones."""
        if replaced:
            self._kinds.clear()

    @torch.no_grad()
    def before_step(self, weights: Sequence[WeightState], writer: Writer, closure: Closure | None) -> None:
        """Keep A and B of every weight that moves in this step, in the dtype of the computation."""
        self._move = None
        self.watch.rests = False
        self._complete_ledgers(wait=False)
        moving: dict[Kind, list[WeightState]] = {}
        for weight in weights:
            if weight.ratio == 0:
                weight.ledger.rests += 1
            elif not weight.is_sharded:
                moving.setdefault(self._kind(weight), []).append(weight)
        kept, self._buffers = self._buffers, {}
        for kind, members in moving.items():
            buffers = kept.get(kind)
            if buffers is None or not buffers.serve(members):
                self._complete_ledgers(wait=True)
                buffers = self._buffers_for(kind, members)
            self._buffers[kind] = buffers
            buffers.snapshot()
            self.watch.note(buffers.changed_outside)
            buffers.changed_outside = []
        sharded = [weight for weight in weights if weight.ratio > 0 and weight.is_sharded]
        self._sharded.snapshot(sharded)
        if moving or sharded:
            self._move = _Move(list(self._buffers.values()), self._sharded)
            self.watch.rests = True

    @torch.no_grad()
    def after_step(self, weights: Sequence[WeightState], writer: Writer, whole: bool = True) -> None:
        """Compute W += coef * (A'B' - AB) for every weight that moves, or for none if a factor is not finite.

        A W whose factors did not change keeps its bits. After an exception a further call completes the move.
        """
        move = self._move
        if move is None:
            return
        try:
            self._complete(move, writer, whole)
        except BaseException:
            for part in move.parts:
                part.freeze()
            raise
        self._move = None
        self.watch.rests = False
        self.watch.note(move.sharded.changed_outside)
        move.sharded.changed_outside = []
        for part in move.parts:
            part.release()
        self._complete_ledgers(wait=False)
        self._upkeep.after_step(self._extended)
        self._extended = []

    def _complete(self, move: _Move, writer: Writer, whole: bool) -> None:
        """Do what is left of a move."""
        if move.finite is None:
            marks = [mark for buffers in move.buffers for mark in buffers.marks()]
            if not whole and not any(buffers.changed() for buffers in move.buffers):
                return
            move.agreed, move.finite = self._verdict(marks, move.sharded)
        if move.sharded.slots and move.agreed:
            move.sharded.bring()
        for part in move.parts:
            part.note_bases()
        for buffers in move.buffers:
            with full_precision(buffers.device):
                buffers.write(move.finite, writer)
        move.sharded.write(writer)
        for buffers in move.buffers:
            self._note_ledgers(buffers.record(move.finite))
        if move.sharded.slots:
            self._note_ledgers(move.sharded.record(move.agreed))
        self._guard.count(move.finite, move.counted)

    def _verdict(self, marks: list[Tensor], sharded: ShardedMoves) -> tuple[bool, Tensor]:
        """Tell if all factors are finite, on all ranks where weights are sharded: for the host, and as a 0-d bool.

        Without sharded weights the host does not know it, and gets False.

        Raises:
            FactorsDifferError: on all ranks, if whole factors next to a sharded W differ between them.
        """
        self._guard.on_all_ranks = bool(sharded.slots)
        if not sharded.slots:
            return False, self._guard.verdict(marks)
        assert self.ranks is not None
        return sharded.agree(self._guard.verdict(marks) if marks else None, self.ranks.group)

    def warn(self, stacklevel: int) -> None:
        """Warn of factors that were changed between steps, too."""
        super().warn(stacklevel + 1)
        self.watch.warn()

    def unwritten(self) -> list[str]:
        """Return the labels of the weights that an interrupted step has not moved yet."""
        move = self._move
        return [] if move is None else [label for part in move.parts for label in part.unwritten()]

    def forget(self) -> None:
        """Forget a move that could not be completed, and what the device has not reported of earlier ones."""
        self._move = None
        self.watch.rests = False
        self._pending.clear()

    def flush(self) -> None:
        """Record the moves of all past steps in the ledgers. Waits for the device."""
        self._complete_ledgers(wait=True)
        self.watch.warn()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffers.nbytes for buffers in self._buffers.values()) + self._sharded.nbytes

    def _buffers_for(self, kind: Kind, members: Sequence[WeightState]) -> FactorBuffers:
        device = kind[-1]
        kernel = self._host.kernel(device)
        if kernel is None and self._host.reads(device):
            return HostBuffers(kind, members)
        return DeviceBuffers(kind, members, kernel)

    def _note_ledgers(self, recorded: list[Ledger] | LedgerUpdates) -> None:
        """Note the ledgers that were extended; or queue the updates whose outcome the device has not reported yet."""
        if isinstance(recorded, LedgerUpdates):
            if recorded not in self._pending:
                self._pending.append(recorded)
        else:
            self._extended = [*self._extended, *recorded]

    def _complete_ledgers(self, wait: bool) -> None:
        """Record the moves of past steps that the host knows of; with `wait`, of all past steps."""
        while self._pending and (wait or self._host.arrived(self._pending[0].event)):
            self._note_ledgers(self._pending[0].record())
            self.watch.note(self._pending.popleft().changed_outside or ())

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


class _Move:
    """The move of one step.

    Attributes:
        buffers: of the weights that move, with all tensors whole.
        sharded: of the others.
        parts: both.
        finite: 0-d bool: the verdict of the guard; None until it is known.
        agreed: the same for the host, where weights are sharded.
        counted: has an entry once the guard has counted the verdict.
    """

    def __init__(self, buffers: list[FactorBuffers], sharded: ShardedMoves) -> None:
        self.buffers = buffers
        self.sharded = sharded
        self.parts: list[FactorBuffers | ShardedMoves] = [*buffers, sharded]
        self.finite: Tensor | None = None
        self.agreed = False
        self.counted: list[Any] = []
