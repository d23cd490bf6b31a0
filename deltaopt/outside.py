"""Changes of A and B that the optimizer has not made: between its steps. In place W does not follow them.

A loaded adapter, an averaged one, Lookahead: A and B then differ from those that the last move left, to which W
belongs. A comparison finds that, since the ledger keeps the factors as the last move left them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaopt.ledger import Factors
from deltaopt.messages import layers, warn_user
from deltaopt.overwritten import BY_SOMEBODY_ELSE, is_hidden, overwriting, overwritten, warn_of_overwritten
from deltaopt.tensors import is_plain

if TYPE_CHECKING:
    from deltaopt.weight import WeightState

CASTS = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that a model may have been in for a while."""

IN_A_STEP = (
    "A and B of {} were changed between two steps, by something other than this optimizer (an adapter was loaded or "
    "averaged, or another optimizer such as Lookahead wrote it). Each W stays where the last move left it, as this "
    "change is no step: call optimizer.resync() after changing A and B, if W is to follow; or load the optimizer's "
    "state of that moment, if W was loaded with them. Until then no further change is reported"
)

IN_A_FORWARD_PASS = (
    "A and B of {} are not those that the last move of W left. If an adapter was loaded or averaged, W does not belong "
    "to it: call optimizer.resync(), or load the optimizer's state of that checkpoint. If another optimizer trains A "
    "and B now, W is right as it is"
)

HIDDEN_IN_A_FORWARD_PASS = (
    "{} (If every W was replaced with A and B, by an average of the whole model, you need to do nothing: rounding "
    "hides that in 16 bits)"
)

HIDDEN_IN_AN_EXPORT = (
    "A and B of {} are not those that the last move of W left, and rounding hides whether their 16-bit W was replaced "
    "too: an exported adapter counts W as the last move left it. After an average of the whole model that is not the "
    "model as it is now: merge (deltaopt.merged_weights). After a change of A and B alone call optimizer.resync() first"
)

AT_THE_BASE = (
    f"the W of {{}} {BY_SOMEBODY_ELSE}, so that W minus what training has moved it by is not the base, and neither is "
    "the output without the adapter. Load the weights and the optimizer's state of a checkpoint, or take W as it is as "
    "the base (optimizer.rebase())"
)


def changed(end: Factors, now: Factors) -> bool:
    """Tell if A and B differ from `end` by more than a cast: a model may have been cast, and cast back.

    Args:
        end: A and B as the last move left them.
        now: A and B now, in any dtype. The shapes are the same.
    """
    return not all(_is_cast(kept, factor) for kept, factor in zip(end, now, strict=True))


def _is_cast(kept: Tensor, now: Tensor) -> bool:
    now = now.detach().to(kept.device, kept.dtype)
    return torch.equal(kept, now) or any(torch.equal(kept.to(dtype).to(kept.dtype), now) for dtype in CASTS)


LOADED = (
    "A and B of {} were loaded as they were with another update_ratio in the branch (before start_step, or before a "
    "change of the ratio), and their W was written since, so that it does not belong to them. Load all weights of that "
    "moment instead, or call optimizer.resync(state) with the optimizer's state of that moment"
)


def warn_of_loads(weights: Iterable[WeightState]) -> None:
    """Warn if A and B in a scaled branch were loaded without the W that belongs to them, once for each load."""
    loads = {
        load: None
        for weight in weights
        if (load := weight.triple.load) is not None and not load.said and weight.is_off_base()
        if not weight.written_by_others and not weight.at_base
    }
    for load in loads:
        load.said = True
        warn_user(LOADED.format(layers(load.labels)))


class Watch:
    """Watches the factors of all weights that one optimizer moves in place.

    Attributes:
        rests: True within a step, where A and B are on their way.
    """

    def __init__(self) -> None:
        self.rests = False
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
        found = _not_overwritten(_not_reported(found, "step"))
        if found:
            warn_user(IN_A_STEP.format(layers([weight.label for weight in found])))

    def look(self, first: WeightState | None = None) -> None:
        """Warn if W does not belong to A and B, once for each W until `resync` or a loaded state; name all layers.

        Args:
            first: looks at this weight first, and at the others only if its W was left behind. Default: looks at all.
        """
        if self.rests or (first is not None and not _left_behind([first])):
            return
        found = _not_reported(_left_behind(self._weights), "forward")
        if found:
            text = IN_A_FORWARD_PASS.format(layers([weight.label for weight in found]))
            warn_user(HIDDEN_IN_A_FORWARD_PASS.format(text) if any(map(is_hidden, found)) else text)

    def look_at_base(self, first: WeightState) -> None:
        """Warn if W minus its displacement, which `first` needs, is not the base, once for each W; name all layers."""
        if self.rests or not first.written_by_others or _is_traced():
            return
        first.written_by_others = False
        if overwritten([first]):
            found = _not_reported(overwritten([*self._weights]), "base")
            if found:
                warn_user(AT_THE_BASE.format(layers([weight.label for weight in found])))


def warn_before_export(weights: Sequence[WeightState]) -> None:
    """Warn if a W, or perhaps a W, was written by somebody else, so that an adapter is not the model as it is now."""
    warn_of_overwritten(weights, "an exported adapter")
    labels = [weight.label for weight in weights if weight.moved and is_hidden(weight) and _is_elsewhere(weight)]
    if labels:
        warn_user(HIDDEN_IN_AN_EXPORT.format(layers(labels)))


def _left_behind(weights: Iterable[WeightState]) -> list[WeightState]:
    """Return the weights that belong to other factors than the present ones, if no warning has said so."""
    # Where W was replaced with A and B, by the average of a whole model, it belongs to them.
    return _not_overwritten([w for w in weights if "forward" not in w.ledger.told and _is_elsewhere(w)])


def _not_overwritten(weights: Sequence[WeightState]) -> list[WeightState]:
    """Return the weights that nobody else has written since they moved, as far as that is known."""
    return [weight for weight, found in zip(weights, overwriting(weights), strict=True) if found is None]


@torch.no_grad()
def _is_elsewhere(weight: WeightState) -> bool:
    """Tell if A and B differ from those that the last move of W left, and W is not at its base."""
    ledger = weight.ledger
    if not ledger.is_current() or weight.at_base or weight.triple.follows_between_steps:
        return False
    tensors = weight.tensors
    if not all(map(is_plain, (tensors.W, *tensors.stored))) or tensors.stored[0].is_meta or _is_traced():
        return False
    end, now = ledger.end, weight.factors()
    assert end is not None
    if end[0].shape != now[0].shape:
        return end[0].shape[-1] != now[0].shape[-1] and weight.is_off_base()
    return changed(end, now) and weight.is_off_base()


def _is_traced() -> bool:
    """Tell if tensors have no values to look at: in a transform of `torch.func`, or where a graph is made."""
    return torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack() > 0


def _not_reported(weights: Iterable[WeightState], where: str) -> list[WeightState]:
    """Return the weights whose change no warning has reported there, and note that one does now."""
    found = [weight for weight in weights if where not in weight.ledger.told]
    for weight in found:
        weight.ledger.told |= {where}
    return found
