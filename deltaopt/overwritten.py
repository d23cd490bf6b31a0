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

STACKED_ELEMENTS = 1 << 16
"""How many products of elements of A and B are computed at a time, if one W has no more: a CPU's cache holds them."""

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


class _Gathered(NamedTuple):
    """What the sample of one W is computed from, read at the same places of all tensors.

    Attributes:
        W: elements of it.
        cut_off: what compensated rounding has cut off there; None where it does not compensate.
        terms: of the displacement, as their coefficient, the rows of A and the columns of B, both (places, r).
    """

    W: Tensor
    cut_off: Tensor | None
    terms: list[tuple[float, Tensor, Tensor]]

    def kind(self) -> tuple[object, ...]:
        """Return what weights have in common whose samples are computed together."""
        ranks = tuple((rows.dtype, rows.shape[-1]) for _, rows, _ in self.terms)
        return self.W.dtype, self.W.device, self.W.shape, self.cut_off is None, ranks


class _Samples(NamedTuple):
    """Some elements of several W minus their displacements, with a row for each W.

    Attributes:
        weights: whose samples these are.
        rest: W minus its displacement, in float64.
        displacement: as it was taken off.
        size: of the terms of that sum.
        reliable: where it is.
    """

    weights: list[WeightState]
    rest: Tensor
    displacement: Tensor
    size: Tensor
    reliable: Tensor


def base_samples(weights: Sequence[WeightState]) -> list[Tensor | None]:
    """Return some elements of each W minus its displacement, in float64; None where rounding or packing hides them."""
    found = {w: rest.clone() for group in _samples(weights) for w, rest in zip(group.weights, group.rest, strict=True)}
    return [found.get(weight) for weight in weights]


@torch.no_grad()
def overwriting(weights: Sequence[WeightState]) -> list[Difference | None]:
    """Return what somebody else has made of each base since W moved; None if nothing is known of that.

    An element counts if it is off by more than one cast and all roundings of the steps can have added up to, in all
    of them in one direction, so that no W that training alone has written is found. Waits for the device, once.
    """
    judged = [(group, *_judged(group)) for group in _samples(weight for weight in weights if _is_comparable(weight))]
    found: dict[WeightState, Difference] = {}
    for group, base, verdicts in judged:
        for i, verdict in enumerate(verdicts.tolist()):
            if verdict:
                found[group.weights[i]] = Difference(base[i].clone(), group.rest[i].clone())
    return [found.get(weight) for weight in weights]


def _is_comparable(weight: WeightState) -> bool:
    """Tell if W can be compared with a sample of its base."""
    if weight.claim is not None and weight.claim.base_overwritten:
        return False  # another optimizer has moved W
    if weight.base_sample is None or weight.moves is None or not weight.moved:
        return False
    return not weight.triple.merge_problems()  # a branch that is merged into W comes out again


def _judged(group: _Samples) -> tuple[Tensor, Tensor]:
    """Return the samples of the bases, and a verdict on each W: if somebody else has written it."""
    rest, W = group.rest, group.weights[0].tensors.W
    base = torch.stack([_base_of(weight, row) for weight, row in zip(group.weights, rest, strict=True)])
    moves = torch.tensor([[weight.moves] for weight in group.weights], dtype=torch.float64, device=rest.device)
    size = group.size + base.abs()
    # 4: W may have been larger on its way. 25 and 100: events other than steps, and products that cancel.
    rounding = SPACING * (4 * (moves + 25) * size + 100 * size.amax(-1, keepdim=True))
    off = torch.where(group.reliable, rest - base, 0.0)
    found = ~(off.abs() <= CAST * size + rounding).all(-1)
    if W.dtype.itemsize == 2:
        found &= _is_systematic(off, group.displacement, size)
    return base, found


def _base_of(weight: WeightState, rest: Tensor) -> Tensor:
    """Return the sample of the base; of a W with another number of places by now `rest`, as nothing is known of it."""
    base = weight.base_sample
    return rest if base is None or base.shape != rest.shape else base.to(rest.device)


def _is_systematic(off: Tensor, displacement: Tensor, size: Tensor) -> Tensor:
    """Tell if each 16-bit W is off as averages or other weights make it, and not by the roundings of other events.

    Each merge and unmerge of a branch rounds W twice. That adds up, but with no regard to the displacement: its signs
    agree with 73 of 100 signs, or with 27, once in 10^12 times.
    """
    agreement = off.sign() * displacement.sign()
    known = agreement.count_nonzero(-1)
    along = (known >= SAMPLES // 4) & (agreement.sum(-1).abs() > 0.45 * known.clamp(min=SAMPLES))
    return along | ((off.abs() > 0.5 * size).double().mean(-1) > 0.05)


def is_hidden(weight: WeightState) -> bool:
    """Tell if rounding hides from `overwriting` what others write into W: in 16 bits, if it is not compensated."""
    W = weight.tensors.W
    return is_plain(W) and W.dtype.itemsize == 2 and weight.known_compensation(weight.part()) is None


def overwritten(weights: Sequence[WeightState]) -> list[WeightState]:
    """Return the weights that somebody else has written since they moved. Waits for the device."""
    found = overwriting(weights)
    return [weight for weight, difference in zip(weights, found, strict=True) if difference is not None]


def warn_of_overwritten(weights: Sequence[WeightState], what: str) -> None:
    """Warn if a W is not base + displacement any more, before something is said of it. Waits for the device."""
    if labels := [weight.label for weight in overwritten(weights)]:
        warn_user(
            f"{what} counts what training has moved each W by, and the W of {layers(labels)} {BY_SOMEBODY_ELSE}: it is "
            "not the model as it is now. Take W as it is as the base (optimizer.rebase()), merge "
            "(deltaopt.merged_weights), or load the weights and the optimizer's state of a checkpoint"
        )


def refuse_overwritten(weights: Sequence[WeightState], what: str) -> None:
    """Raise a ValueError if a W is not base + displacement any more, before it is moved on. Waits for the device."""
    if labels := [weight.label for weight in overwritten(weights)]:
        raise ValueError(
            f"{what} moves each W from where the last move left it, and the W of {layers(labels)} was written by "
            "somebody else since (a whole model was loaded, or an average of all parameters was copied in): nothing "
            "was changed. For a model that was loaded, load the optimizer's state of that moment with "
            "load_state_dict(). Or take W as it is as the base: optimizer.rebase()"
        )


@torch.no_grad()
def _samples(weights: Iterable[WeightState]) -> list[_Samples]:
    """Return the samples of all weights that can be read, those of one kind together."""
    kinds: dict[tuple[object, ...], list[tuple[WeightState, _Gathered]]] = {}
    for weight in weights:
        gathered = _gathered(weight)
        if gathered is not None:
            kinds.setdefault(gathered.kind(), []).append((weight, gathered))
    found = []
    for members in kinds.values():
        largest = max([rows.numel() for _, rows, _ in members[0][1].terms], default=SAMPLES)
        count = max(1, STACKED_ELEMENTS // largest)
        found += [_computed(members[first : first + count]) for first in range(0, len(members), count)]
    return found


def _gathered(weight: WeightState) -> _Gathered | None:
    """Read the places of the sample; None where rounding, packing or a lost ledger hides the base."""
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
    terms = []
    for coef, A, B in weight.placed_ledger().displacement():
        B = view.ordered(B, W)
        if experts:
            terms.append((coef, A[experts[0], i], B[experts[0], :, j]))
        else:
            terms.append((coef, A.index_select(0, i), B.index_select(1, j).mT))
    cut_off = None if compensation is None else view.part_matrix(compensation)[index]
    return _Gathered(matrix[index], cut_off, terms)


def _computed(members: Sequence[tuple[WeightState, _Gathered]]) -> _Samples:
    """Compute the samples of weights of one kind."""
    parts = [gathered for _, gathered in members]
    there = torch.stack([part.W for part in parts])
    reliable = there.abs() < torch.finfo(there.dtype).max  # a sum that saturated is another one
    cut_off = [part.cut_off for part in parts if part.cut_off is not None]
    W = (lifted(there, torch.stack(cut_off)) if cut_off else there).double()
    displacement, size = torch.zeros_like(W), W.abs()
    for terms in zip(*(part.terms for part in parts), strict=True):
        coefs = torch.tensor([coef for coef, _, _ in terms], dtype=torch.float64, device=W.device)
        rows, columns = (torch.stack([term[side] for term in terms]).double() for side in (1, 2))
        products = coefs[:, None, None] * rows * columns
        displacement += products.sum(-1)
        size += products.abs().sum(-1)
    return _Samples([weight for weight, _ in members], W - displacement, displacement, size, reliable)
