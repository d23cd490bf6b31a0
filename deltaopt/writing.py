"""How every W is written: with which rounding, and in which event of the run, which decides the noise.

The arithmetic is in rounding.py and, on a GPU, in _triton.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deltaopt.ledger import Ledger, add_terms_
from deltaopt.lowrank import Term
from deltaopt.noise import Keys, label_hashes, noise_factors
from deltaopt.rounding import NoiseFactors, Scratch, add_to_weight_
from deltaopt.triple import LoRATriple

MODES = ("auto", "nearest", "stochastic", "compensated")


class Rounding(NamedTuple):
    """The rounding of an optimizer, and the seed of its noise."""

    mode: str
    seed: int

    def of(self, dtype: torch.dtype) -> str:
        """How a W of this dtype is rounded: "nearest", "stochastic" or "compensated"."""
        if dtype.itemsize > 2:
            return "nearest"
        return "stochastic" if self.mode == "auto" else self.mode

    def during(self, event: str, step: int, repeat: int = 0) -> Write:
        """Writes W in `event` of step `step`, the `repeat`-th time there: another event has other noise."""
        return Write(self, event, step, repeat, Scratch())


def checked_rounding(mode: object, seed: object) -> Rounding:
    """A `Rounding` of what a user gave.

    Raises:
        ValueError, TypeError: if there is no such mode, or the seed is not an int of 64 bits.
    """
    if mode not in MODES:
        raise ValueError(f"rounding is one of {', '.join(MODES)}, got {mode!r}")
    return Rounding(str(mode), checked_seed(seed))


def checked_seed(seed: object) -> int:
    """A seed as it came, or an error."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"rounding_seed is an int, the same on every rank, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"rounding_seed is at least 0 and below 2^64, got {seed}")
    return seed


class Write(NamedTuple):
    """Adds products to W's, each rounded as the optimizer rounds, with the noise of one event."""

    rounding: Rounding
    event: str
    step: int
    repeat: int
    scratch: Scratch

    @property
    def keys(self) -> Keys:
        """Of its noise."""
        return Keys.of(self.rounding.seed, self.event, self.step, self.repeat)

    def product_(
        self,
        triple: LoRATriple,
        ledger: Ledger,
        W: Tensor,
        U: Tensor,
        V: Tensor,
        coef: float,
        noise: NoiseFactors | None,
    ) -> None:
        """The part of W that `triple` moves += coef * U @ V; `noise` is used if this W takes it."""
        if self.rounding.of(W.dtype) != "stochastic":
            noise = None
        add_to_weight_(triple, W, U, V, coef, noise, self.compensation(triple, ledger, W), self.scratch)

    def terms_(self, triple: LoRATriple, ledger: Ledger, terms: list[Term]) -> None:
        """The part of W that `triple` moves += the sum of the terms, computed in float64."""
        part = triple.moved_part(triple.W)
        noise = None
        if self.rounding.of(part.dtype) == "stochastic":
            *lead, c, d = triple.part_matrix(part).shape
            noise = self.noise(label_hashes([triple.label], lead)[0], c, d, part.device)
        kept = self.compensation(triple, ledger, triple.W)
        add_terms_(triple, part, terms, noise=noise, compensation=kept, scratch=self.scratch)

    @property
    def stochastic(self) -> bool:
        """Whether a 16-bit W is rounded stochastically."""
        return self.rounding.of(torch.bfloat16) == "stochastic"

    def noise(self, hashes: Tensor, c: int, d: int, device: torch.device) -> NoiseFactors:
        """Of (c, d) matrices with these hashes."""
        return noise_factors(self.keys, _on(device, hashes), c, d)

    def compensation(self, triple: LoRATriple, ledger: Ledger, W: Tensor) -> Tensor | None:
        """What rounding has cut off from W so far, to be added and written again; None if this W is without."""
        if self.rounding.of(W.dtype) != "compensated":
            ledger.compensation = None  # of a W that was cast since
            return None
        return ledger.kept_compensation(triple.moved_part(W))


def _on(device: torch.device, hashes: Tensor) -> Tensor:
    """A tensor of the host on the device, without waiting."""
    return hashes.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else hashes.to(device)
