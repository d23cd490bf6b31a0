"""Weights that somebody else has written since they moved: an average of models that was copied in, for example.

The ledger does not know of that, so base + displacement is not W any more. A sample of the base shows it: W minus its
displacement has to equal the base there, up to rounding. Rounding hides it in 16 bits, unless it is compensated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from deltaopt.checkpoint.fingerprint import kept_index
from deltaopt.messages import layers, warn_user
from deltaopt.rounding.blocks import lifted
from deltaopt.tensors import FLOATS, is_plain

if TYPE_CHECKING:
    from deltaopt.weight import WeightState

SAMPLES = 256

CAST = 2.0**-8
"""What a cast to 16 bits and back may change, relative to an element: half a spacing of bfloat16."""

SPACING = 2.0**-23
"""Of float32, in which W, or W with what rounding has cut off from it, is summed up; float64 is finer."""

BY_SOMEBODY_ELSE = "was written by somebody else since (an average was copied in, or other weights were loaded)"


class Difference(NamedTuple):
    """Some elements of a base, and what W minus its displacement is there instead; both in float64."""

    base: Tensor
    found: Tensor

    def same_as(self, other: Difference) -> bool:
        """Tell if another one is the same writing, up to the rounding of casts."""
        ours, theirs = self.found - self.base, other.found - other.base
        return torch.allclose(ours, theirs.to(ours.device), rtol=CAST, atol=CAST * float(ours.abs().max()))


class _Sample(NamedTuple):
    """Some elements of W minus its displacement, the size of the terms of that sum, and where it is reliable."""

    rest: Tensor
    displacement: Tensor
    size: Tensor
    reliable: Tensor


def base_sample(weight: WeightState) -> Tensor | None:
    """Return some elements of W minus its displacement, in float64; None where rounding or packing hides them."""
    sample = _sample(weight)
    return None if sample is None else sample.rest


@torch.no_grad()
def overwriting(weight: WeightState) -> Difference | None:
    """Return what somebody else has made of the base since W moved; None if nothing is known of that.

    An element counts if it is off by more than one cast and all roundings of the steps can have added up to, in all
    of them in one direction, so that no W that training alone has written is found. Waits for the device.
    """
    base = weight.base_sample
    if weight.claim is not None and weight.claim.base_overwritten:
        return None  # another optimizer has moved W
    if base is None or weight.moves is None or not weight.moved or weight.triple.merge_problems():
        return None  # a branch that is merged into W comes out again
    sample = _sample(weight)
    if sample is None is None or base.shape != sample.rest.shape:
        return None
    base = base.to(sample.rest.device)
    size = sample.size + base.abs()
    # 4: W may have been larger on its way. 25 and 100: events other than steps, and products that cancel.
    rounding = SPACING * (4 * (weight.moves + 25) * size + 100 * size.max())
    off = torch.where(sample.reliable, sample.rest - base, 0.0)
    if bool((off.abs() <= CAST * size + rounding).all()):
        return None
    if weight.tensors.W.dtype.itemsize == 2 and not _is_systematic(off, sample.displacement, size):
        return None
    return Difference(base, sample.rest)


def _is_systematic(off: Tensor, displacement: Tensor, size: Tensor) -> bool:
    """Tell if a 16-bit W is off as averages or other weights make it, and not by the roundings of other events.

    Each merge and unmerge of a branch rounds W twice. That adds up, but with no regard to the displacement: its signs
    agree with 73 of 100 signs, or with 27, once in 10^12 times.
    """
    agreement = off.sign() * displacement.sign()
    known = int(agreement.count_nonzero())
    along = known >= SAMPLES // 4 and abs(float(agreement.sum())) > 0.45 * max(known, SAMPLES)
    return along or float((off.abs() > 0.5 * size).double().mean()) > 0.05


def is_hidden(weight: WeightState) -> bool:
    """Tell if rounding hides from `overwriting` what others write into W: in 16 bits, if it is not compensated."""
    W = weight.tensors.W
    return is_plain(W) and W.dtype.itemsize == 2 and weight.known_compensation(weight.part()) is None


def overwritten(weights: Iterable[WeightState]) -> list[str]:
    """Return the labels of the weights that somebody else has written since they moved. Waits for the device."""
    return [weight.label for weight in weights if overwriting(weight) is not None]


def warn_of_overwritten(weights: Sequence[WeightState], what: str) -> None:
    """Warn if a W is not base + displacement any more, before something is said of it. Waits for the device."""
    if found := overwritten(weights):
        warn_user(
            f"{what} counts what training has moved each W by, and the W of {layers(found)} {BY_SOMEBODY_ELSE}: it is "
            "not the model as it is now. Take W as it is as the base (optimizer.rebase()), merge "
            "(deltaopt.merged_weights), or load the weights and the optimizer's state of a checkpoint"
        )


def refuse_overwritten(weights: Sequence[WeightState], what: str) -> None:
    """Raise a ValueError if a W is not base + displacement any more, before it is moved on. Waits for the device."""
    found = overwritten(weights)
    if found:
        raise ValueError(
            f"{what} moves each W from where the last move left it, and the W of {layers(found)} was written by "
            "somebody else since (a whole model was loaded, or an average of all parameters was copied in): nothing "
            "was changed. For a model that was loaded, load the optimizer's state of that moment with "
            "load_state_dict(). Or take W as it is as the base: optimizer.rebase()"
        )


@torch.no_grad()
def _sample(weight: WeightState) -> _Sample | None:
    W = weight.tensors.W
    if not is_plain(W) or W.is_meta or W.dtype not in FLOATS or weight.ledger.lost is not None or not W.numel():
        return None
    view, part = weight.triple.view, weight.part().detach()
    compensation = weight.known_compensation(part) if W.dtype.itemsize == 2 else None
    if W.dtype.itemsize == 2 and compensation is None and weight.moved:
        return None
    matrix = view.part_matrix(part)
    index = kept_index(tuple(matrix.shape), SAMPLES, W.device)
    *experts, i, j = index
    there = matrix[index]
    reliable = there.abs() < torch.finfo(W.dtype).max  # a sum that saturated is another one
    if compensation is not None:
        there = lifted(there, view.part_matrix(compensation)[index])
    W_there = there.double()
    displacement, size = torch.zeros_like(W_there), W_there.abs()
    for coef, A, B in weight.placed_ledger().displacement():
        B = view.ordered(B, W)
        rows, columns = (A[i], B[:, j].mT) if not experts else (A[experts[0], i], B[experts[0], :, j])
        products = coef * rows.double() * columns.double()
        displacement = displacement + products.sum(-1)
        size = size + products.abs().sum(-1)
    return _Sample(W_there - displacement, displacement, size, reliable)
