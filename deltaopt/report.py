"""The answer to "did W move?": by how much, what rounding kept of it, and what the next step will do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deltaopt.base import base_by_compensation
from deltaopt.groups import DeltaGroup
from deltaopt.lowrank import LowRank, joined
from deltaopt.messages import counted, names
from deltaopt.tables import grouped, span, table
from deltaopt.weight import WeightState

BLOCK_ELEMENTS = 1 << 20
"""Elements of a W that are converted to float64 at a time."""


@dataclass(frozen=True)
class LayerReport:
    """The movement of one W since its base.

    Attributes:
        name: of the triple.
        moves: the number of steps that moved it, or in which a branch with a folded ratio moved for it; None if a state
            of an earlier version was loaded, which does not say.
        asked: the Frobenius norm of what it was asked to move by, in the branch where a ratio is folded; None if that
            is not known.
        asked_relative: the same, divided by the norm of the base W; None if that is not known.
        kept: the share of it that W and a folded branch hold after rounding, 1.0 if nothing was lost; None where there
            is no movement or no base to compare with.
        folded: the update_ratio that is folded into the branch; 0.0 if none is.
        folded_since: the number of the step, counted from 0, that folded it; None if none is, or that is not known.
        next_ratio: the update_ratio of the next step; 0.0 while it waits for `start_step`.
        next_step: what the next step will do.
        note: why something is not known, or what else holds the movement; empty if there is nothing to say.
    """

    name: str
    moves: int | None
    asked: float | None
    asked_relative: float | None
    kept: float | None
    folded: float
    folded_since: int | None
    next_ratio: float
    next_step: str
    note: str

    @property
    def moved(self) -> bool:
        """True if the effective weight was asked to move: W, or what a folded branch holds in its place."""
        return bool(self.moves) if self.asked is None else self.asked != 0.0


@dataclass(frozen=True)
class Report:
    """The movement of all W that an optimizer moves. Its string is a short table, in which equal layers share a row.

    Attributes:
        step_count: the number of steps.
        weight_update: the name of the rule.
        skipped_updates: the number of steps that left every W alone because a factor was NaN or infinite.
        layers: one `LayerReport` for each triple, in order.
    """

    step_count: int
    weight_update: str
    skipped_updates: int
    layers: list[LayerReport]

    def as_dict(self) -> dict[str, Any]:
        """Return it as dicts, lists, numbers and strings, as JSON and loggers take them."""
        return asdict(self)

    @property
    def _folds(self) -> bool:
        return any(layer.folded for layer in self.layers)

    def __str__(self) -> str:
        moved = sum(layer.moved for layer in self.layers)
        headline = (
            f"steps: {self.step_count} ({self.weight_update}); layers whose {'effective ' * self._folds}W was "
            f"asked to move: {moved} of {len(self.layers)}; skipped updates: {self.skipped_updates}"
        )
        rows = [("moves", "asked for", "of W", "kept", "next step", "layers"), *map(_row, grouped(self.layers, _facts))]
        notes = dict.fromkeys(layer.note for layer in self.layers if layer.note)
        return "\n".join([headline, *table(rows), *notes])


def report_of(
    weights: Sequence[WeightState], step_count: int, weight_update: str, skipped_updates: int, at_base: bool
) -> Report:
    """Return the report on these weights, whose ledgers hold every step. Waits for the device.

    Args:
        weights: of the optimizer.
        step_count: the number of steps.
        weight_update: the name of the rule.
        skipped_updates: the number of steps that left every W alone.
        at_base: within `base_weights`.
    """
    ratios = {group: group.ratio_at(step_count) for group in {weight.group: None for weight in weights}}
    layers = [
        _layer(weight, ratios[weight.group], step_count, weight_update == "folded", at_base) for weight in weights
    ]
    return Report(step_count, weight_update, skipped_updates, layers)


def at_a_glance(weights: Sequence[WeightState], step_count: int, skipped: str) -> str:
    """Say in a line if W was asked to move, by what the host knows; nothing is read from a device.

    Args:
        weights: of the optimizer.
        step_count: the number of steps.
        skipped: says how many updates were skipped; empty if none is known.
    """
    return "; ".join(part for part in (_moves_in(weights, step_count), skipped, *_waiting(weights, step_count)) if part)


def _moves_in(weights: Sequence[WeightState], step_count: int) -> str:
    total, steps = len(weights), counted(step_count, "step")
    moved = [weight for weight in weights if weight.moves or weight.moved]
    folded = [weight for weight in weights if weight.triple.folded]
    if not moved and not folded:
        return f"no W has moved in {steps}"
    where = f"W asked to move: {len(moved)} of {total}"
    if folded:
        where = f"update_ratio is folded into {len(folded)} of {total} branches, which move for W"
    counts = [weight.moves for weight in folded or moved]
    if not folded and not any(count is None or count for count in counts):
        return f"no step has reported a move of W yet in {steps}"
    return f"{where}, {_times(counts)} in {steps}"


def _times(counts: Sequence[int | None]) -> str:
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return "an unknown number of moves"
    if not any(known):
        return "no move by a step reported yet"
    low, high = min(known), max(known)
    return counted(high, "move") if low == high else f"{low} to {high} moves"


def _waiting(weights: Sequence[WeightState], step_count: int) -> list[str]:
    """Say which layers the next step leaves alone, where that is by a number of the user's."""
    groups = {weight.group: None for weight in weights}
    sentences = {_rests(group, step_count): None for group in groups if _rests(group, step_count)}
    some = "" if len(groups) == 1 else "in some groups "
    return [f"{some}{sentence}" for sentence in sentences]


def _rests(group: DeltaGroup, step_count: int) -> str:
    if step_count < group.start_step:
        more = counted(group.start_step - step_count, "more step")
        return f"waits for start_step={group.start_step}, {more} before W moves"
    return "ratio 0: W rests" if group.update_ratio == 0 else ""


def _layer(weight: WeightState, ratio: float, step: int, folds: bool, at_base: bool) -> LayerReport:
    known = _Known(weight, at_base)
    asked = None if known.asked is None else known.asked.norm()
    relative = asked / known.base_norm if asked is not None and known.base_norm else None
    return LayerReport(
        weight.label,
        weight.moves,
        asked,
        relative,
        known.kept if asked else None,
        weight.triple.folded,
        weight.folded_since,
        ratio,
        _next_step(weight, ratio, step, folds),
        known.note,
    )


def _next_step(weight: WeightState, ratio: float, step: int, folds: bool) -> str:
    if resting := _rests(weight.group, step):
        return resting if not weight.triple.folded else f"takes update_ratio {weight.triple.folded:g} out of the branch"
    if not folds:
        return f"moves W by update_ratio {ratio:g}" if ratio else "ratio 0: W rests"
    since = "" if weight.folded_since is None else f"since step {weight.folded_since}"
    if ratio == weight.triple.folded:
        known = since and f" ({since})"
        return f"moves the branch, with update_ratio {ratio:g} folded in{known}" if ratio else "ratio 0: W rests"
    so_far = f"{weight.triple.folded:g} so far{since and f', {since}'}"
    return f"folds update_ratio {ratio:g} into the branch ({so_far})"


class _Known:
    """What can be known of the movement of one W.

    Attributes:
        asked: what it was asked to move by; None if that is not known.
        base_norm: the norm of the base; None if that is not known.
        kept: the share of the movement that is there after rounding; None if that is not known.
        note: why something is not known.
    """

    @torch.no_grad()
    def __init__(self, weight: WeightState, at_base: bool) -> None:
        self.asked: _Product | None = None
        self.base_norm: float | None = None
        self.kept: float | None = None
        self.note = ""
        if weight.ledger.lost is not None:
            self.note = weight.ledger.lost
            return
        dense = weight.ledger.is_matrix
        self.asked = _Product(weight.asked_movement(), dense)
        if problems := weight.weight_problems():
            self.kept = 1.0
            self.note = f"W cannot be read ({problems[0]}), so its norm is not known"
            return
        terms = weight.displacement()
        part = weight.part().detach()
        base = None if weight.base is None else weight.base_copy(weight.base)
        if not terms:
            self.base_norm, self.kept = _norm(weight, part), 1.0
        elif base is not None:
            self.base_norm = _norm(weight, base)
        elif at_base:
            self.note = "the norm of the base, and what rounding kept, are not looked at within base_weights()"
        else:
            moved = _Product(joined(terms), dense)
            square = _norm(weight, part) ** 2 - 2 * moved.inner(weight, part) + moved.norm() ** 2
            self.base_norm = math.sqrt(max(square, 0.0))
        if terms and part.element_size() > 2:
            self.kept = 1.0
        elif terms and not at_base:
            self._compare(weight, part, base)

    def _compare(self, weight: WeightState, part: Tensor, base: Tensor | None) -> None:
        """Compare a 16-bit W with its base."""
        assert self.asked is not None
        if base is None:
            base = base_by_compensation(weight)
        if weight.compensation is not None:
            self.note = "compensated rounding: what the bits of W do not hold is held by the optimizer"
        if base is None:
            self.note = "what rounding kept of a 16-bit W is unknown without keep_base"
        elif size := self.asked.norm() ** 2:
            held = self.asked.inner(weight, part) - self.asked.inner(weight, base.to(part.device))
            if weight.triple.folded:
                held += self.asked.inner_of_branch(weight)
            self.kept = held / size


class _Product:
    """A low-rank matrix, or a stack of them, with norms and inner products that do not cancel.

    Args:
        product: the factors, (c, R) and (R, d), or with a leading e.
        dense: one of the factors is an identity, so that the other one is the matrix.
    """

    def __init__(self, product: LowRank, dense: bool) -> None:
        A, B = (factor.to(torch.float64) for factor in (product.A, product.B))
        self._dense = A @ B if dense else None
        if not dense:
            self._Q_A, R_A = torch.linalg.qr(A)
            self._Q_B, R_B = torch.linalg.qr(B.mT)
            self._core = R_A @ R_B.mT

    def norm(self) -> float:
        """Return the Frobenius norm."""
        return float((self._core if self._dense is None else self._dense).norm())

    def inner(self, weight: WeightState, part: Tensor) -> float:
        """Return the inner product with a tensor like the part of W that moves, which is read in blocks.

        Of a sharded W each rank has a block; all have to call this.
        """
        matrix = weight.view.part_matrix(part)
        order = self._order(weight, matrix)
        total = matrix.new_zeros((), dtype=torch.float64)
        dense = self._dense
        if dense is not None:
            dense = (dense if weight.piece is None else weight.piece.block_of(dense))[..., order]
        else:
            Q_A, Q_B = weight.cut(self._Q_A, self._Q_B.mT)
            Q_B, core = Q_B.mT[..., order, :], self._core if weight.piece is None else weight.piece.lead_of(self._core)
        for place, rows in _blocks(matrix):
            block = matrix[place][rows].to(torch.float64)
            if dense is not None:
                total += (block * dense[place][rows]).sum()
            else:
                total += (Q_A[place][rows].mT @ block @ Q_B[place] * core[place]).sum()
        return float(weight.summed(total))

    def inner_of_branch(self, weight: WeightState) -> float:
        """Return the inner product with what a folded branch holds for W."""
        _, A, B = weight.branch()
        A, B = A.to(torch.float64), B.to(torch.float64)
        if self._dense is not None:
            inner = (self._dense * (A @ B)).sum()
        else:
            inner = ((self._Q_A.mT @ A) @ (B @ self._Q_B) * self._core).sum()
        return weight.triple.folded * weight.triple.scaling * float(inner)

    def _order(self, weight: WeightState, matrix: Tensor) -> Tensor:
        """Return the places of the columns of W's matrix among those of B."""
        columns = torch.arange(matrix.shape[-1], device=matrix.device).unsqueeze(0)
        return weight.view.ordered(columns, weight.here)[0]


def _blocks(matrix: Tensor) -> Iterator[tuple[tuple[int, ...], slice]]:
    """Yield the index of each expert and a slice of rows, so that all rows come once."""
    *lead, c, d = matrix.shape
    size = max(1, BLOCK_ELEMENTS // max(1, d))
    places: list[tuple[int, ...]] = [(e,) for e in range(lead[0])] if lead else [()]
    for place in places:
        for start in range(0, c, size):
            yield place, slice(start, start + size)


def _norm(weight: WeightState, part: Tensor) -> float:
    """Return the norm of a tensor like the part of W that moves, which may be a copy in host memory."""
    dtype = torch.float64 if part.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(part, dtype=dtype)
    if weight.piece is None:
        return float(norm)
    return math.sqrt(float(weight.summed(norm.to(weight.here.device, torch.float64) ** 2)))


def _facts(layer: LayerReport) -> tuple[Any, ...]:
    """Return all of a layer apart from sizes: layers with equal facts share a row."""
    known = layer.asked is None, layer.asked_relative is None, layer.kept is None, layer.kept in (None, 1.0)
    return (layer.moves, layer.moved, *known, layer.next_step, layer.note)


def _row(layers: Sequence[LayerReport]) -> tuple[str, ...]:
    first = layers[0]
    labels = names([layer.name for layer in layers], 2)
    return (
        "unknown" if first.moves is None else str(first.moves),
        span([layer.asked for layer in layers], "{:.3g}".format),
        span([layer.asked_relative and 100 * layer.asked_relative for layer in layers], "{:.3g} %".format),
        _kept(layers),
        first.next_step,
        labels if len(layers) == 1 else f"{len(layers)}: {labels}",
    )


def _kept(layers: Sequence[LayerReport]) -> str:
    if layers[0].kept is None:
        return "unknown" if layers[0].moved else "-"
    if layers[0].kept == 1.0:
        return "all"
    return span([layer.kept and 100 * layer.kept for layer in layers], "{:.1f} %".format)
