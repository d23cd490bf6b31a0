"""Changes of A and B from outside: between steps, by somebody else than the optimizer. A W in place does not follow.

A loaded adapter, an averaged one, Lookahead: A and B are then others than the last move left, and W belongs to those.
The factors tell, since the ledger keeps them as the last move left them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaopt.ledger import Factors
from deltaopt.messages import layers, warn_user

if TYPE_CHECKING:
    from deltaopt.weight import WeightState

CASTS = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that a model may have been in for a while."""

IN_A_STEP = (
    "A and B of {} were changed between two steps, by something else than this optimizer (an adapter was loaded or "
    "averaged, or another optimizer such as Lookahead wrote it). Each W stays where the last move left it, as this "
    "change is no step: call optimizer.resync() after changing A and B, if W is to follow. Later changes are not told "
    "until then"
)

IN_A_FORWARD_PASS = (
    "A and B of {} are not those that the last move of W left, so W does not belong to them (an adapter was loaded or "
    "averaged): call optimizer.resync(), or load the optimizer's state of that checkpoint"
)


def changed(end: Factors, now: Factors) -> bool:
    """Tell if A and B are others than `end`, and not only rounded: a model may have been cast, and cast back.

    Args:
        end: A and B as the last move left them.
        now: A and B now, in any dtype. The shapes are the same.
    """
    return not all(_is_cast(kept, factor) for kept, factor in zip(end, now, strict=True))


def _is_cast(kept: Tensor, now: Tensor) -> bool:
    now = now.detach().to(kept.device, kept.dtype)
    return torch.equal(kept, now) or any(torch.equal(kept.to(dtype).to(kept.dtype), now) for dtype in CASTS)


class Watch:
    """Watches the factors of all weights that one optimizer moves in place."""

    def __init__(self) -> None:
        self._weights: dict[WeightState, None] = {}
        self._found: list[WeightState] = []

    def add(self, weights: Iterable[WeightState]) -> None:
        """Watch these weights too."""
        self._weights.update(dict.fromkeys(weights))

    def note(self, weights: Iterable[WeightState]) -> None:
        """Note weights whose factors a step has found elsewhere, until `warn`."""
        self._found += weights

    def warn(self) -> None:
        """Warn of what steps have found, once for each W until `resync` or a loaded state."""
        found, self._found = self._found, []
        labels = [weight.label for weight in _not_told(found, "step")]
        if labels:
            warn_user(IN_A_STEP.format(layers(labels)))

    def look(self, weights: Sequence[WeightState], is_changed: Callable[[WeightState], bool]) -> None:
        """Warn if the factors of one of these weights are others than the last move left; name all such layers.

        Args:
            weights: to look at first.
            is_changed: tells it of one weight.
        """
        if not any(is_changed(weight) for weight in weights):
            return
        labels = [weight.label for weight in _not_told(filter(is_changed, self._weights), "forward")]
        if labels:
            warn_user(IN_A_FORWARD_PASS.format(layers(labels)))


def _not_told(weights: Iterable[WeightState], where: str) -> list[WeightState]:
    """Return those whose change was not told yet, and note that it is."""
    found = [weight for weight in weights if where not in weight.ledger.told]
    for weight in found:
        weight.ledger.told |= {where}
    return found
