"""Changes of A, B and W between steps: restart, resync, the modes of an inner optimizer, and LoRA's start."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from deltaopt.all_or_nothing import Issued, call_the_rest, note
from deltaopt.checks import check_factors, check_writable, on_any_rank
from deltaopt.ledger import Factors
from deltaopt.lowrank import Term
from deltaopt.messages import layers
from deltaopt.random_starts import put_normal_, put_uniform_, start_generator
from deltaopt.ranks import Ranks
from deltaopt.roll_call import RollCall
from deltaopt.rounding.writer import Writer, put_
from deltaopt.sharding import as_whole, local_part
from deltaopt.triple import LoRATriple
from deltaopt.weight import WeightState

Reinit: TypeAlias = Callable[[LoRATriple], object]


class Restart:
    """Every branch is added to its W, and A and B start afresh.

    Args:
        weights: with their tensors resolved.
        writer: of the event.
        ranks: that share sharded weights, all of which raise if one has such a factor; None where nothing is sharded.

    Raises:
        ValueError: if a factor is NaN or infinite.
        RuntimeError: if a W cannot be written. Nothing is changed then.
    """

    def __init__(self, weights: Sequence[WeightState], writer: Writer, ranks: Ranks | None = None) -> None:
        check_factors(weights, ranks)
        check_writable(weights)
        self._weights = weights
        self._writer = writer
        self._branches = [weight.branch().cloned() for weight in weights]
        self._before = self._copies()
        self._start: list[list[Tensor]] | None = None
        self._written: list[list[Any]] = [[] for _ in weights]
        self._recorded: list[list[Any]] = [[] for _ in weights]
        self._issued = [(Issued(), Issued()) for _ in weights]

    @torch.no_grad()
    def make_start(self, reinit: Reinit, roll_call: RollCall) -> None:
        """Let `reinit` write the new A and B on all ranks, and look at them."""
        for weight in self._weights:
            with weight.triple.written():
                reinit(weight.triple)
        roll_call.meet()
        check_factors(self._weights, roll_call.ranks)
        start = self._copies()
        self._put_back()
        self._start = start

    def has_start(self) -> bool:
        """Tell if there is a start of A and B."""
        return self._start is not None

    def give_up(self) -> None:
        """Forget the start, as that of another rank has failed."""
        self._start = None

    @torch.no_grad()
    def carry_out(self) -> bool:
        """Add every branch to its W, where there is a start of A and B; else put these back, and return False.

        A weight after the other gets its branch and its new factors: the effective weights are right after each of
        them. A folded branch begins with (1 + lambda) s times its new product, of which W gives lambda s. May be called
        again after an exception.
        """
        if self._start is None:
            self._put_back()
            return False
        for weight, branch, start, written, recorded, (of_start, of_base) in zip(
            self._weights, self._branches, self._start, self._written, self._recorded, self._issued, strict=True
        ):
            triple = weight.triple
            given = []
            if triple.folded:
                given = [weight.branch_of(start, of_start)._replace(coef=-triple.folded * triple.scaling)]
            weight.note_base(of_base)
            self._writer.add_terms_(weight, [branch, *given], written)
            _put(weight.tensors.parameters, start)
            ledger = weight.placed_ledger()
            call_the_rest(
                recorded,
                [
                    partial(ledger.restart, branch.coef, (branch.A, branch.B)),
                    *(partial(ledger.add, term) for term in given),
                ],
            )
        return True

    def unfinished(self) -> list[str]:
        """Return the labels of the weights that have not got all of their branch."""
        return [w.label for w, recorded in zip(self._weights, self._recorded, strict=True) if not recorded]

    def _copies(self) -> list[list[Tensor]]:
        return [[p.detach().clone() for p in weight.tensors.parameters] for weight in self._weights]

    def _put_back(self) -> None:
        own = [parameter for weight in self._weights for parameter in weight.tensors.parameters]
        _put(own, [value for values in self._before for value in values])


class Resync:
    """Every W whose ratio is not 0 now is moved by coef times the change of the product since its last move.

    Args:
        weights: with their tensors resolved.
        writer: of the event.
        ranks: as of `Restart`.

    Raises:
        ValueError: if a factor is NaN or infinite. Nothing is changed then.
    """

    @torch.no_grad()
    def __init__(self, weights: Sequence[WeightState], writer: Writer, ranks: Ranks | None = None) -> None:
        check_factors(weights, ranks)
        self._writer = writer
        self._ledgers = [(weight.ledger, weight.ratio != 0) for weight in weights]
        self._moves: list[Any] = []
        for weight in weights:
            before, (_, A, B) = weight.placed_ledger().end, weight.branch().cloned()
            if before is not None and weight.ratio != 0 and not all(map(torch.equal, before, (A, B))):
                self._moves.append(_ResyncMove(weight, before, (A, B), self._known_base(weight), [], [], Issued()))

    @torch.no_grad()
    def carry_out(self) -> None:
        """Write the weights; may be called again after an exception."""
        for weight, before, now, base, put, written, issued in self._moves:
            weight.note_base(issued)
            ledger = weight.ledger
            ledger.end = now
            if base is None:
                terms = [Term(ledger.coef, *now), Term(-ledger.coef, *before)]
            else:
                if not put:
                    note(put, partial(put_, weight, base))
                terms = ledger.displacement()
            self._writer.add_terms_(weight, terms, written)
        for ledger, follows in self._ledgers:
            ledger.set_current(follows)
            ledger.told = frozenset()

    def unfinished(self) -> list[str]:
        """Return the labels of the weights that were not moved yet."""
        return [move.weight.label for move in self._moves if not move.written]

    def warn(self) -> None:
        """Warn of 16-bit weights that were moved in one rounded step."""
        rounded = [move.weight.label for move in self._moves if move.base is None and self._in_steps(move.weight)]
        if rounded:
            warnings.warn(
                f"resync() moved the 16-bit weights of {layers(rounded)} in one rounded step; training had rounded "
                "after each step, so they differ slightly from what they were with these factors. With keep_base they "
                "would be base + displacement. If W was loaded with these factors, or averaged with them, it was where "
                "it belongs before resync(), and is not now: load that model again, and its optimizer's state",
                RuntimeWarning,
                stacklevel=3,
            )

    def _known_base(self, weight: WeightState) -> Tensor | None:
        """Return the copy of the base, if W is to become base + displacement, rounded once."""
        if weight.base is None or not self._in_steps(weight) or weight.ledger.lost is not None:
            return None
        return weight.base_copy(weight.base)

    def _in_steps(self, weight: WeightState) -> bool:
        """Tell if W was rounded after each step, and what was cut off is not known."""
        dtype = weight.tensors.W.dtype
        return dtype.itemsize == 2 and self._writer.rounding.of(dtype) != "compensated"


class Following:
    """Every W is moved by coef times what another event than a step changes the product by, where W follows A and B.

    The inner optimizer exchanges A and B for others that belong to the same step: schedule-free has one point at which
    it takes gradients, and another one to evaluate.

    Args:
        weights: with their tensors resolved, before the event.
        writer: of the event.
        ranks: as of `Restart`; none moves a W where one has a factor that is not finite.
    """

    @torch.no_grad()
    def __init__(self, weights: Sequence[WeightState], writer: Writer, ranks: Ranks | None = None) -> None:
        self._writer = writer
        self._ranks = ranks
        self._weights = [weight for weight in weights if weight.placed_ledger().is_current()]
        self._starts = [_factors_of(weight) for weight in self._weights]
        self._moves: list[_FollowingMove] | None = None
        self._issued = [Issued() for _ in self._weights]
        self._agreed = Issued()

    @torch.no_grad()
    def carry_out(self) -> None:
        """Write the weights; may be called again after an exception."""
        if self._moves is None:
            ends = [_factors_of(*pair) for pair in zip(self._weights, self._issued, strict=True)]
            bad = [not factor.isfinite().all() for pair in ends for factor in pair]
            found, differing = on_any_rank(bad, self._weights, self._ranks, self._agreed)
            # Of factors that differ between ranks the next step says so.
            follows = not any(found) and not differing
            self._moves = [
                _FollowingMove(weight, start, end, _changed_outside(weight, start), [], [], Issued())
                for weight, start, end in zip(self._weights, self._starts, ends, strict=True)
                if follows and not all(map(torch.equal, start, end))
            ]
        for weight, start, end, left, written, recorded, issued in self._moves:
            ledger = weight.ledger
            weight.note_base(issued)
            self._writer.add_terms_(weight, [Term(ledger.coef, *end), Term(-ledger.coef, *start)], written)
            if left is not None and not recorded:
                note(recorded, partial(ledger.extend, ledger.coef, start, left))
            ledger.end = end

    def unfinished(self) -> list[str]:
        """Return the labels of the weights that were not moved yet."""
        return [move.weight.label for move in self._moves or () if not move.written]


class _FollowingMove(NamedTuple):
    """The move of one W, by the change of A and B from `start` to `end`.

    The last move left A and B at `left`, if somebody else has changed them since; else it is None.
    """

    weight: WeightState
    start: Factors
    end: Factors
    left: Factors | None
    written: list[Any]
    recorded: list[Any]
    issued: Issued


def _changed_outside(weight: WeightState, now: Factors) -> Factors | None:
    """Return A and B as the last move left them, if they are others than `now`."""
    end = weight.ledger.end
    assert end is not None
    return None if all(map(torch.equal, end, now)) else end


def _factors_of(weight: WeightState, issued: Issued | None = None) -> Factors:
    """Copy A and B of one weight, in the dtype of the computation."""
    _, A, B = weight.branch_of(weight.tensors.parameters, issued).cloned()
    return A, B


class _ResyncMove(NamedTuple):
    """The move of one W: from A and B before to those now; or from its base, which is put back first."""

    weight: WeightState
    before: Factors
    now: Factors
    base: Tensor | None
    put: list[Any]
    written: list[Any]
    issued: Issued


def _put(factors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write factors in one call, so that no exception leaves some of them."""
    torch._foreach_copy_(list(map(local_part, factors)), list(map(local_part, values)))


def lora_start(generator: torch.Generator | None, writer: Writer) -> Reinit:
    """Return LoRA's usual start, or that of the triple's library, with a product of zero.

    A is zero and B uniform in +- 1 / sqrt(d), as kaiming_uniform_(a=sqrt(5)) makes it; in embeddings B, of which rows
    are looked up, is zero and A standard normal.

    Args:
        generator: of the random numbers. Default: one for each triple, equal on all ranks, by the seed, step and repeat
            of `writer`.
        writer: of the restart.
    """

    def reinit(triple: LoRATriple) -> None:
        numbers = generator
        if numbers is None:
            numbers = start_generator(writer.rounding.seed, writer.step, writer.repeat, triple.label)
        if triple.start(numbers):
            return
        A, B = triple.A, triple.B
        if triple.layout == "embedding":
            put_normal_(A, 1.0, numbers)
            B.zero_()
            return
        _, right = triple.view.factors(*map(as_whole, (triple.W, A, B)))
        A.zero_()
        put_uniform_(B, right.shape[-1] ** -0.5, numbers)

    return reinit
