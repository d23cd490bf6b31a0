"""Moving every W back to where an earlier state of this run had it, for the A and B of that time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaopt.all_or_nothing import Issued, note
from deltaopt.checkpoint.records import SavedLedger, weight_records
from deltaopt.checkpoint.resume import WeightMismatchError, factor_problems, note_rebuilt, saved_ledgers
from deltaopt.checks import check_factors
from deltaopt.ledger import combined
from deltaopt.lowrank import Term
from deltaopt.messages import problems_of, raise_problems
from deltaopt.overwritten import Difference, overwriting
from deltaopt.ranks import Ranks
from deltaopt.restarts import Resync
from deltaopt.rounding.writer import Writer, put_
from deltaopt.sharding import put_whole_
from deltaopt.weight import Compensation, WeightState


class Recall(Resync):
    """Every W is moved by its saved displacement minus its present one, and gets the saved ledger.

    Args:
        weights: with their tensors resolved.
        records: of the saved ledgers, by the triples' names.
        writer: of the event.
        ranks: as of `Resync`.
        restore: scales the branches as they were scaled when the state was saved.

    Raises:
        ValueError: if a factor is NaN or infinite, or a ledger is missing or damaged.
        WeightMismatchError: if the state is not one of this run, or A and B are not those of the state. Nothing is
            changed then.
    """

    @torch.no_grad()
    def __init__(
        self,
        weights: Sequence[WeightState],
        records: Mapping[str, Any],
        writer: Writer,
        ranks: Ranks | None,
        restore: Callable[[], None],
    ) -> None:
        check_factors(weights, ranks)
        self._writer = writer
        self._restore = restore
        ledgers = saved_ledgers(weights, records)
        raise_problems(
            WeightMismatchError,
            "resync(): the weights cannot follow this state (nothing was changed)",
            [
                problem
                for weight, saved, here in zip(weights, ledgers, overwriting(weights), strict=True)
                for problem in problems_of(weight.label, _problems(weight, saved, here))
            ],
            "Take a state that this very optimizer has saved since its weights were registered, load the adapter that "
            "was saved with it, and call resync(state) then. For a state of another run load the pristine weights, "
            "that adapter, and the state with load_state_dict()",
        )
        self._moves = [self._move(weight, saved) for weight, saved in zip(weights, ledgers, strict=True)]

    def _move(self, weight: WeightState, saved: SavedLedger) -> _Move:
        target = _placed(weight, saved)
        away = [term._replace(coef=-term.coef) for term in weight.displacement()]
        terms = [term for term in combined([*target, *away]) if not term.is_zero()]
        base = self._known_base(weight) if terms else None
        return _Move(weight, saved, terms if base is None else target, base if terms else None, [], [], [], Issued())

    @torch.no_grad()
    def carry_out(self) -> None:
        """Write the weights; may be called again after an exception."""
        self._restore()
        for weight, saved, terms, base, put, written, before, issued in self._moves:
            if saved.bits is not None:
                put_whole_(weight.tensors.stored[0], saved.bits)
            if terms or base is not None:
                weight.note_base(issued)
                if base is not None and not put:
                    note(put, partial(put_, weight, base))
                self._writer.add_terms_(weight, terms, written)
                note_rebuilt(weight, saved)
            if not before:
                before.append((weight.base, weight.compensation))
            saved.give_to(weight)
            # A W that has moved to its base again is there up to rounding only, and what was cut off is as it was left.
            weight.base, weight.compensation = before[0]


class _Move(NamedTuple):
    """The move of one W by `terms`; from its base, which is put back first, where that is known."""

    weight: WeightState
    saved: SavedLedger
    terms: list[Term]
    base: Tensor | None
    put: list[Any]
    written: list[Any]
    before: list[tuple[Any, Compensation | None]]
    issued: Issued


def _placed(weight: WeightState, saved: SavedLedger) -> list[Term]:
    """Return the saved displacement, where W is and in the dtype of the computation."""
    tensors = weight.tensors
    return saved.ledger_for(weight).to(tensors.W.device, tensors.compute_dtype()).displacement()


def _is_otherwise(here: Difference | None, then: Difference | None) -> bool:
    """Tell if what others have written to W is not what they had written when the state was saved."""
    return (here is None) != (then is None) or (here is not None and then is not None and not here.same_as(then))


def _problems(weight: WeightState, saved: SavedLedger, overwritten: Difference | None) -> list[str]:
    found = [reason for ledger in (saved.ledger, weight.ledger) if (reason := ledger.lost) is not None]
    # A W that has not moved is its base.
    here = weight_records([weight])[0] if weight.base is None else weight.base.record()
    if here != (saved.W if saved.base is None else saved.base.record()):
        found.append("the state counts from another base than this optimizer has moved W from")
    elif _is_otherwise(overwritten, saved.overwritten):
        found.append(
            "its W was written by somebody else, before the state was saved or since (a whole model was loaded, or an "
            "average was copied in). If all weights of that moment are loaded, load the state with load_state_dict()"
        )
    return found + factor_problems(weight, saved)
