"""Weights that somebody else has written since they moved: an average of models that was copied in, for example.

The ledger does not know of that, so base + displacement is not W any more. A sample of the base tells, as far as the
rounding of W does not hide it: for float32 and float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaopt.checkpoint.fingerprint import sampled_positions
from deltaopt.messages import layers, warn_user
from deltaopt.tensors import is_plain

if TYPE_CHECKING:
    from deltaopt.weight import WeightState

SAMPLES = 256
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Of W against base + displacement, relative to the largest element of the sample: what rounding may add up to."""


@torch.no_grad()
def base_sample(weight: WeightState) -> Tensor | None:
    """Return some elements of W minus its displacement, in float64; None where rounding or packing hides them."""
    W = weight.tensors.W
    if not is_plain(W) or W.is_meta or W.dtype not in TOLERANCE or weight.ledger.lost is not None or not W.numel():
        return None
    matrix = weight.matrix()
    *lead, c, d = matrix.shape
    places = sampled_positions([matrix.numel()], SAMPLES, W.device)
    experts, i, j = places // (c * d), places // d % c, places % d
    found = (matrix[experts, i, j] if lead else matrix[i, j]).double()
    for coef, A, B in weight.placed_ledger().displacement():
        B = weight.triple.view.ordered(B, W)
        rows, columns = (A[experts, i], B[experts, :, j]) if lead else (A[i], B[:, j].mT)
        found -= coef * (rows.double() * columns.double()).sum(-1)
    return found


def warn_of_overwritten(weights: Sequence[WeightState], what: str) -> None:
    """Warn if a W is not base + displacement any more, before something is said of it. Waits for the device."""
    found = overwritten(weights)
    if found:
        warn_user(
            f"{what} counts what training has moved each W by, and the W of {layers(found)} was written by somebody "
            "else since (an average was copied in, or other weights were loaded): it is not the model as it is now. "
            "Take W as it is as the base (optimizer.rebase()), merge (deltaopt.merged_weights), or load the weights "
            "and the optimizer's state of a checkpoint"
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


def overwritten(weights: Iterable[WeightState]) -> list[str]:
    """Return the labels of the weights that are not base + displacement any more. Waits for the device."""
    return [weight.label for weight in weights if weight.moved and _is_overwritten(weight)]


def _is_overwritten(weight: WeightState) -> bool:
    before, W = weight.base_sample, weight.tensors.W
    now = None if before is None else base_sample(weight)
    if before is None or now is None:
        return False
    largest = torch.maximum(before.abs().max(), weight.part().detach().abs().max().double().to(before.device))
    if bool(((now.to(before.device) - before).abs() <= TOLERANCE[W.dtype] * largest).all()):
        return False
    matrix = weight.matrix().detach()
    return not any(torch.equal(matrix.to(dtype).to(W.dtype), matrix) for dtype in (torch.float16, torch.bfloat16))
