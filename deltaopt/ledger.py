"""The ledger of one W: what it was asked to move by, as low-rank terms. It writes no weight.

While coef = lambda s is constant, the moves telescope (docs/method.md):

    W[t] - W[K] = coef * (A[t] B[t] - A[K] B[K])

so one anchor and the present product say all of it, whatever the number of steps. A changed coef, factors that were
changed between two steps, and a restart, which adds the branch to W, each add a term. Once the terms are half as large
as W they are summed up in one (c, d) matrix: then the ledger grows no more, whatever happens, and stays exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from deltaopt.all_or_nothing import Issued, note
from deltaopt.lowrank import Term, is_zero, joined, matrix_factors
from deltaopt.rounding.blocks import full_precision

Factors: TypeAlias = "tuple[Tensor, Tensor]"
"""A (c, r) and B (r, d)."""


class _Later:
    """Factors that are gathered from all ranks once they are asked for; by events, which all ranks take part in."""

    def __init__(self, gather: Callable[[Issued], Factors]) -> None:
        self._gather = gather
        self._issued = Issued()
        self._factors: Factors | None = None

    def factors(self) -> Factors:
        if self._factors is None:
            self._factors = self._gather(self._issued)
            self._issued = Issued()  # which lets go of the output
        return self._factors


SMALL_RANK = 64
"""A summed rank that is always kept as terms."""

BATCH = 4
"""Terms that are added to the matrix in one product, if there is time: each product reads and writes all of it."""


def rank_limit(c: int, d: int, r: int) -> int:
    """Return the summed rank up to which terms are kept as they are: half as large as a dense (c, d) matrix."""
    return max(c * d // (c + d) // 2, 4 * r, SMALL_RANK)


class _Batch(NamedTuple):
    """The first `size` terms, which are being added to the matrix; once that is done, `added` is not empty."""

    size: int
    added: list[Tensor]


class _State(NamedTuple):
    """All that a ledger knows.

    It is replaced as a whole, by the last statement of an event: an exception finds the ledger before or after it.
    """

    terms: tuple[Term, ...] = ()
    matrix: Tensor | None = None
    batch: _Batch | None = None
    coef: float = 0.0
    last: Factors | _Later | None = None
    lost: str | None = None

    @property
    def end(self) -> Factors | None:
        return self.last.factors() if isinstance(self.last, _Later) else self.last

    def waiting(self) -> tuple[Term, ...]:
        """Return the terms that are not in the matrix."""
        return self.terms[self.batch.size :] if self.batch is not None and self.batch.added else self.terms

    def closed(self, coef: float, factors: Factors) -> _State:
        """Return the same with one more term, of tensors of its own."""
        A, B = factors
        known_zero = coef == 0 or (A.device.type == "cpu" and any(map(is_zero, factors)))
        if self.lost is not None or known_zero:
            return self
        term = Term(coef, A.detach().clone(), B.detach().clone())
        return self._replace(terms=(*self.waiting(), term), batch=None)


class Ledger:
    """The movement of one W: the sum of `terms`, plus `coef` times the product of the factors in `end`.

    Attributes:
        rests: number of steps that have trained A and B and left W where it was.
        rests_at_end: that number at the last move; another one where `end` is not what a step has left.
        told: where a warning has said that A and B differ from those in `end`.
    """

    def __init__(self) -> None:
        self._state = _State()
        self.rests = self.rests_at_end = 0
        self.told: frozenset[str] = frozenset()

    @property
    def terms(self) -> list[Term]:
        """Closed terms: anchors with a negative coefficient, what changes of coef left behind, and sums of such.

        A sum that is kept as a matrix is a term one of whose factors is the identity.
        """
        matrix = self._state.matrix
        return [*self._state.waiting(), *([] if matrix is None else [Term(1.0, *matrix_factors(matrix))])]

    @terms.setter
    def terms(self, terms: Iterable[Term]) -> None:
        waiting, matrix = [], None
        for term in terms:
            found = _matrix_of(term) if matrix is None else None
            if found is None:
                waiting.append(term)
            else:
                matrix = found
        self._state = self._state._replace(terms=tuple(waiting), matrix=matrix, batch=None)

    @property
    def coef(self) -> float:
        """The coefficient of the product that is still moving; 0.0 before the first move."""
        return self._state.coef

    @coef.setter
    def coef(self, coef: float) -> None:
        self._state = self._state._replace(coef=coef)

    @property
    def end(self) -> Factors | None:
        """A (c, r) and B (r, d) as the last move left them; None before the first move."""
        return self._state.end

    @end.setter
    def end(self, end: Factors | None) -> None:
        self._state = self._state._replace(last=end)

    @property
    def has_end(self) -> bool:
        """True after the first move, since the last restart; without bringing `end` from other ranks."""
        return self._state.last is not None

    def end_later(self, gather: Callable[[Issued], Factors]) -> object:
        """Let `gather` return `end` once it is asked for, on all ranks, by the collectives that it is handed.

        Returns:
            The `end_mark` of it.
        """
        self._state = self._state._replace(last=_Later(gather))
        return self.end_mark()

    def end_mark(self) -> object:
        """Return an object that is another one after every event that has set `end`."""
        return self._state.last

    def is_current(self) -> bool:
        """Tell if A and B are those in `end`, unless somebody else than the optimizer has changed them since."""
        return self.has_end and self.rests_at_end == self.rests

    def set_current(self, current: bool = True) -> None:
        """Note that A and B are those in `end`; or that it is not known how they came to be others."""
        self.rests_at_end = self.rests if current else -1

    @property
    def lost(self) -> str | None:
        """Why the displacement is not known; None while it is. Only a state of an earlier version brings a reason."""
        return self._state.lost

    @lost.setter
    def lost(self, reason: str | None) -> None:
        self._state = self._state._replace(lost=reason)

    @property
    def is_matrix(self) -> bool:
        """True if the closed terms are summed up in one matrix as large as W, with a few that still wait."""
        return self._state.matrix is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the closed terms."""
        terms, matrix = self._state.waiting(), self._state.matrix
        return sum(term.A.nbytes + term.B.nbytes for term in terms) + (0 if matrix is None else matrix.nbytes)

    def to(self, device: torch.device, dtype: torch.dtype) -> Ledger:
        """Move the tensors to `device` and `dtype`; return the ledger itself."""
        state = self._state
        terms = tuple(term.to(device, dtype) for term in state.waiting())
        matrix = None if state.matrix is None else state.matrix.to(device, dtype)
        last = state.last
        if isinstance(last, tuple) and (last[0].device, last[0].dtype) != (device, dtype):
            last = last[0].to(device, dtype), last[1].to(device, dtype)
        self._state = state._replace(terms=terms, matrix=matrix, batch=None, last=last)
        return self

    def extend(self, coef: float, start: Factors, before: Factors | None) -> None:
        """Record a move that does not continue the last one; the caller then keeps its result in `end`.

        Args:
            coef: lambda s of this move.
            start: A and B at its start.
            before: A and B as the last move left them, if they are others.
        """
        state = self._with_room()
        if before is None:
            state = state.closed(state.coef - coef, start)
        else:
            state = state.closed(state.coef, before).closed(-coef, start)
        self._state = state._replace(coef=coef)

    def add(self, term: Term) -> None:
        """Record that W was asked to move by `term`, apart from the moves of steps."""
        self._state = self._with_room().closed(term.coef, (term.A, term.B))

    def plus(self, term: Term) -> Ledger:
        """Return this ledger with `term` added; this one stays as it is."""
        twin = Ledger()
        twin._state = self._state.closed(term.coef, (term.A, term.B))
        return twin

    def restart(self, scaling: float, branch: Factors) -> None:
        """Record that scaling * A @ B of the branch was added to W, and that A and B start afresh."""
        state = self._with_room()
        if state.end is not None and all(map(torch.equal, state.end, branch)):
            scaling += state.coef
        elif state.end is not None:
            state = state.closed(state.coef, state.end)
        self._state = state.closed(scaling, branch)._replace(coef=0.0, last=None)

    def close(self) -> None:
        """Close the running product, so that the next move is a first one: with factors of another rank."""
        state = self._with_room()
        if state.end is not None:
            state = state.closed(state.coef, state.end)
        self._state = state._replace(coef=0.0, last=None)

    def mark(self) -> tuple[object, ...]:
        """Return values that are not the same ones any more once the displacement is another one."""
        last = self._state.last
        return (self._state, last[0]._version, last[1]._version) if isinstance(last, tuple) else (self._state,)

    def displacement(self) -> list[Term]:
        """Return terms that add up to what W was asked to move by; empty when that is nothing.

        Raises:
            RuntimeError: if it is not known, with the reason.
        """
        state = self._state
        if state.lost is not None:
            raise RuntimeError(state.lost)
        waiting = [term for term in state.waiting() if not term.is_zero()]
        self._state = state = state._replace(terms=tuple(waiting), batch=None)
        closed = [] if state.matrix is None else [Term(1.0, *matrix_factors(state.matrix))]
        if state.end is None:
            return waiting + closed
        running = Term(state.coef, *state.end)
        while waiting and all(map(torch.equal, waiting[-1][1:], state.end)):  # A and B have not changed since
            running = running._replace(coef=waiting.pop().coef + running.coef)
        return waiting + closed + ([] if running.is_zero() else [running])

    def ranks(self) -> tuple[int, int]:
        """Return the summed rank of the terms that are not in a matrix, and up to which rank that is none."""
        terms = self._state.waiting()
        return sum(term.rank for term in terms), 0 if not terms else _limit(terms[-1])

    def work(self) -> int:
        """Return the number of multiplications that it takes to add the last closed term to a matrix."""
        terms = self._state.waiting()
        return 0 if not terms else terms[-1].A.numel() * terms[-1].B.shape[-1]

    def matrix_nbytes(self) -> int:
        """Return the bytes of the matrix that all closed terms can be summed up in; 0 where there is no term."""
        terms = self._state.waiting()
        if not terms:
            return 0 if self._state.matrix is None else self._state.matrix.nbytes
        A, B = terms[-1].A, terms[-1].B
        return A.nbytes // A.shape[-1] * B.shape[-1]

    def overdue(self) -> bool:
        """Tell if terms should be summed up: they are more than the limit, or a batch for the matrix there is."""
        rank, limit = self.ranks()
        return len(self._state.waiting()) >= BATCH if self.is_matrix else rank > limit

    def sum_up(self, work: int | None = None) -> int:
        """Add closed terms to the matrix, the oldest first; make the matrix if there is none.

        Args:
            work: about how many multiplications it may take; one term is added in any case. Default: add all.

        Returns:
            How many it took.
        """
        terms, matrix = self._state.waiting(), self._state.matrix
        count = done = 0
        for term in terms:
            cost = term.A.numel() * term.B.shape[-1]
            if count and work is not None and done + cost > work:
                break
            count, done = count + 1, done + cost
        if count == 0:
            return 0
        A, B, _ = joined(terms[:count])
        with torch.no_grad(), full_precision(A.device):
            if matrix is None:
                self._state = self._state._replace(terms=terms[count:], matrix=A @ B, batch=None)
                return done
            if matrix.is_inference():  # which nothing outside of inference mode may write
                matrix = matrix.clone()
            # An exception can come between any two of these statements, and leaves each term counted once.
            batch = _Batch(count, [])
            self._state = self._state._replace(terms=terms, matrix=matrix, batch=batch)
            note(batch.added, partial(matrix.addmm_ if matrix.dim() == 2 else matrix.baddbmm_, A, B))
            self._state = self._state._replace(terms=terms[count:], batch=None)
        return done

    def _with_room(self) -> _State:
        """Return the state, after terms were summed up that `Upkeep` has not come to: many restarts without a step."""
        (rank, limit), terms = self.ranks(), self._state.waiting()
        if terms and rank + terms[-1].rank > 2 * limit:
            self.sum_up()
        return self._state


def combined(terms: Iterable[Term]) -> list[Term]:
    """Return the same sum, with terms of equal factors as one."""
    found: list[Term] = []
    for term in terms:
        for i, (coef, A, B) in enumerate(found):
            if torch.equal(A, term.A) and torch.equal(B, term.B):
                found[i] = Term(coef + term.coef, A, B)
                break
        else:
            found.append(term)
    return found


def _limit(term: Term) -> int:
    *_, c, r = term.A.shape
    return rank_limit(c, term.B.shape[-1], r)


def _matrix_of(term: Term) -> Tensor | None:
    """Return the matrix of a term that is one and an identity; None of another term."""
    A, B = term.A, term.B
    matrix = A if B.shape[-1] <= A.shape[-2] else B
    if term.coef != 1.0 or term.rank != min(A.shape[-2], B.shape[-1]):
        return None
    return matrix if all(map(torch.equal, matrix_factors(matrix), (A, B))) else None
