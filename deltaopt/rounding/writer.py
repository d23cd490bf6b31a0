"""The writer: the only code that writes a W. It knows the rounding, and the event of the run, which decides the noise.

The arithmetic on tensors is in blocks.py and, on a GPU, in _triton.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaopt.lowrank import Term, joined
from deltaopt.plain import as_int
from deltaopt.rounding.blocks import NoiseFactors, Scratch, add_product_, full_precision
from deltaopt.rounding.noise import Keys, label_hashes, noise_factors
from deltaopt.weight import WeightState

MODES = ("auto", "nearest", "stochastic", "compensated")


class Rounding(NamedTuple):
    """The rounding of an optimizer, and the seed of its noise."""

    mode: str
    seed: int

    def of(self, dtype: torch.dtype) -> str:
        """Return how a W of this dtype is rounded: "nearest", "stochastic" or "compensated"."""
        if dtype.itemsize > 2:
            return "nearest"
        return "stochastic" if self.mode == "auto" else self.mode

    def during(self, event: str, step: int, repeat: int = 0) -> Writer:
        """Return the writer of `event` in step `step`, for the `repeat`-th time there: each has noise of its own."""
        return Writer(self, event, step, repeat, Scratch())


def checked_rounding(mode: object, seed: object) -> Rounding:
    """Return the `Rounding` that a user asked for.

    Raises:
        ValueError, TypeError: if there is no such mode, or the seed is not an int of 64 bits.
    """
    if mode not in MODES:
        raise ValueError(f"rounding is one of {', '.join(MODES)}, got {mode!r}")
    return Rounding(str(mode), checked_seed(seed))


def checked_seed(seed: object) -> int:
    """Return a seed as an int, or raise an error."""
    number = as_int(seed)
    if number is None:
        raise TypeError(f"rounding_seed is an int, the same on every rank, got {seed!r}")
    if not 0 <= number < 2**64:
        raise ValueError(f"rounding_seed is at least 0 and below 2^64, got {seed}")
    return number


class Writer(NamedTuple):
    """Adds products to weights, each rounded as the optimizer rounds, with the noise of one event."""

    rounding: Rounding
    event: str
    step: int
    repeat: int
    scratch: Scratch

    def add_product_(
        self,
        weight: WeightState,
        U: Tensor,
        V: Tensor,
        coef: float,
        noise: NoiseFactors | None = None,
        written: list[Any] | None = None,
    ) -> None:
        """Add coef * U @ V to the part of W that moves.

        Args:
            weight: whose W is written.
            U: (c, k) or (e, c, k), float32 or float64; of a sharded W its rows that are here.
            V: (k, d) or (e, k, d), with its columns in B's order; of a sharded W those that are here.
            coef: the factor of the product.
            noise: of this matrix, or of the block that is here; used if this W is rounded stochastically.
            written: the blocks that were written, see `deltaopt.rounding.blocks.add_product_`.
        """
        view, W, kept = weight.view, weight.here, None
        if W.dtype.itemsize > 2:
            noise = weight.compensation = None
        elif self.stochastic:
            weight.compensation = None
        else:
            noise, kept = None, self.compensation(weight)
            kept = None if kept is None else view.part_matrix(kept)
        add_product_(view.weight(W), U, view.ordered(V, W), coef, noise, kept, self.scratch, written)

    def add_term_(self, weight: WeightState, term: Term, written: list[Any] | None = None) -> None:
        """Add one term, computed in its own dtype (float32 or float64), to the part of W that moves.

        Args:
            weight: whose W is written.
            term: of `weight`.
            written: the blocks that were written, see `deltaopt.rounding.blocks.add_product_`.
        """
        with full_precision(term.A.device):
            self.add_product_(weight, *weight.cut(term.A, term.B), term.coef, self.noise_of(weight), written)

    def add_terms_(self, weight: WeightState, terms: list[Term], written: list[Any] | None = None) -> None:
        """Add the sum of the terms, computed in float64, to the part of W that moves.

        Args:
            weight: whose W is written.
            terms: of `weight`.
            written: the blocks that were written, see `deltaopt.rounding.blocks.add_product_`.
        """
        part, noise, kept = weight.part(), self.noise_of(weight), self.compensation(weight)
        add_terms_(weight, part, terms, noise=noise, compensation=kept, scratch=self.scratch, written=written)

    @property
    def keys(self) -> Keys:
        """The keys of this event's noise."""
        return Keys.of(self.rounding.seed, self.event, self.step, self.repeat)

    @property
    def stochastic(self) -> bool:
        """True if a 16-bit W is rounded stochastically."""
        return self.rounding.of(torch.bfloat16) == "stochastic"

    def noise(self, hashes: Tensor, c: int, d: int, device: torch.device) -> NoiseFactors:
        """Make the noise of (c, d) matrices with these hashes."""
        return noise_factors(self.keys, _on(device, hashes), c, d)

    def noise_of(self, weight: WeightState) -> NoiseFactors | None:
        """Make the noise of one W, or of its block that is here; None where it is rounded in another way."""
        matrix, piece = weight.matrix(), weight.piece
        if self.rounding.of(matrix.dtype) != "stochastic":
            return None
        *lead, c, d = matrix.shape if piece is None else piece.whole
        noise = self.noise(label_hashes([weight.label], lead)[0], c, d, matrix.device)
        return noise if piece is None else piece.cut(*noise)

    def compensation(self, weight: WeightState) -> Tensor | None:
        """Return what rounding has cut off from W so far, to be added and written; None if this W keeps nothing."""
        if self.rounding.of(weight.tensors.W.dtype) != "compensated":
            weight.compensation = None  # of a W that was cast since
            return None
        return weight.writable_compensation(weight.part())

    def no_compensation(self, weight: WeightState) -> Tensor | None:
        """Return zeros, which are not kept, of a W that was never written; None if this W will keep nothing."""
        if self.rounding.of(weight.tensors.W.dtype) != "compensated" or weight.weight_problems():
            return None
        return torch.zeros_like(weight.part(), dtype=torch.int16)


@torch.no_grad()
def add_terms_(
    weight: WeightState,
    part: Tensor,
    terms: Iterable[Term],
    coef: float = 1.0,
    noise: NoiseFactors | None = None,
    compensation: Tensor | None = None,
    scratch: Scratch | None = None,
    written: list[Any] | None = None,
) -> None:
    """Add coef * the sum of the terms, computed in float64 and rounded once, to a tensor like W's moving part.

    Terms may be much larger than their sum: an anchor takes most of the running product away again.

    Args:
        weight: whose layout it is.
        part: the part of W that moves, or a copy with its shape and order of strides; written in place.
        terms: of `weight`.
        coef: what multiplies all of them.
        noise: see `deltaopt.rounding.blocks.add_product_`.
        compensation: see there; of the form of `part`.
        scratch: see there.
        written: see there.
    """
    terms = [term.to(part.device, torch.float64) for term in terms]
    if not terms:
        return
    (A, B, _), view = joined(terms), weight.view
    U, V = weight.cut(A, B)
    matrix, V = view.part_matrix(part), view.ordered(V, weight.here)
    kept = None if compensation is None else view.part_matrix(compensation)
    add_product_(matrix, U, V, coef, noise, kept, scratch, written)


@torch.no_grad()
def put_(weight: WeightState, bits: Tensor) -> None:
    """Write the part of W that moves, bit for bit."""
    weight.part().copy_(bits)


def _on(device: torch.device, hashes: Tensor) -> Tensor:
    """Send a tensor of the host to the device, without waiting."""
    return hashes.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else hashes.to(device)
