"""The ledger of one W: what it was asked to move by, as low-rank terms. It writes no weight.

While coef = lambda s is constant, the moves telescope (docs/method.md):

    W[t] - W[K] = coef * (A[t] B[t] - A[K] B[K])

so one anchor and the present product say all of it, whatever the number of steps. A changed coef, factors that were
changed between two steps, and a restart, which adds the branch to W, each add a term.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from copy import copy
from typing import TypeAlias

import torch
from torch import Tensor

from deltaopt.lowrank import Term, joined

Factors: TypeAlias = "tuple[Tensor, Tensor]"
"""A (c, r) and B (r, d)."""


SMALL_RANK = 64
"""A summed rank that is always allowed."""


def rank_bound(c: int, d: int, r: int) -> int:
    """Return the summed rank above which terms are merged: as large as a dense (c, d) matrix, or small."""
    return max(c * d // (c + d), 4 * r, SMALL_RANK)


class Ledger:
    """The movement of one W: the sum of `terms`, plus `coef` times the product of the factors in `end`.

    Attributes:
        terms: closed terms: anchors with a negative coefficient, and what changes of coef left behind.
        coef: the coefficient of the product that is still moving; 0.0 before the first move.
        end: A (c, r) and B (r, d) as the last move left them; None before the first move.
        lost: why the displacement is not known any more; None while it is.
    """

    def __init__(self) -> None:
        self.terms: list[Term] = []
        self.coef = 0.0
        self.end: Factors | None = None
        self.lost: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the closed terms."""
        return sum(term.A.nbytes + term.B.nbytes for term in self.terms)

    def to(self, device: torch.device, dtype: torch.dtype) -> Ledger:
        """Move the tensors to `device` and `dtype`; return the ledger itself."""
        self.terms = [term.to(device, dtype) for term in self.terms]
        if self.end is not None and (self.end[0].device, self.end[0].dtype) != (device, dtype):
            A, B = self.end
            self.end = A.to(device, dtype), B.to(device, dtype)
        return self

    def extend(self, coef: float, start: Factors, before: Factors | None) -> None:
        """Record a move that does not continue the last one; the caller then keeps its result in `end`.

        Args:
            coef: lambda s of this move.
            start: A and B at its start.
            before: A and B as the last move left them, if they are others.
        """
        if before is None:
            self._close(self.coef - coef, start)
        else:
            self._close(self.coef, before)
            self._close(-coef, start)
        self.coef = coef

    def add(self, term: Term) -> None:
        """Record that W was asked to move by `term`, apart from the moves of steps."""
        self._close(term.coef, (term.A, term.B))

    def plus(self, term: Term) -> Ledger:
        """Return this ledger with `term` added; this one stays as it is."""
        twin = copy(self)
        twin.terms = list(self.terms)
        twin.add(term)
        return twin

    def restart(self, scaling: float, branch: Factors) -> None:
        """Record that scaling * A @ B of the branch was added to W, and that A and B start afresh."""
        if self.end is not None and all(map(torch.equal, self.end, branch)):
            scaling, self.end = self.coef + scaling, None
        self.close()
        self._close(scaling, branch)

    def close(self) -> None:
        """Close the running product, so that the next move is a first one: with factors of another rank."""
        if self.end is not None:
            self._close(self.coef, self.end)
        self.coef, self.end = 0.0, None

    def displacement(self) -> list[Term]:
        """Return terms that add up to what W was asked to move by; empty when that is nothing.

        Raises:
            RuntimeError: if it is not known any more, with the reason.
        """
        if self.lost is not None:
            raise RuntimeError(self.lost)
        self.terms = [term for term in self.terms if not term.is_zero()]
        running = [] if self.end is None else [Term(self.coef, *self.end)]
        return self.terms + [term for term in running if not term.is_zero()]

    def _close(self, coef: float, factors: Factors) -> None:
        """Append a term of its own; merge all terms once their ranks have summed up too far."""
        known_zero = coef == 0 or (factors[0].device.type == "cpu" and not all(factor.any() for factor in factors))
        if self.lost is not None or known_zero:
            return
        A, B = factors
        term = Term(coef, A.detach().clone(), B.detach().clone())
        self.terms.append(term)
        *_, c, r = A.shape
        d = B.shape[-1]
        bound = rank_bound(c, d, r)
        if sum(term.rank for term in self.terms) <= bound:
            return
        merged = joined(self.terms).compressed()
        self.terms = [Term(1.0, merged.A, merged.B)]
        limit = bound - 2 * r  # room for two more, or each new term would cause a merge
        if merged.rank > limit:
            self.terms = []
            self.lost = (
                "the displacement is not known as low-rank terms any more: update_ratio changed so often (or there "
                f"were so many restarts, or changes of A and B between steps) that its rank passed {limit}, the limit "
                f"for a weight of {c} x {d}. W itself stays exact. Save checkpoints that hold W, keep a copy of "
                'the base (keep_base="cpu"), or change update_ratio in fewer, larger steps'
            )


def warn_of_lost(ledgers: Iterable[Ledger], stacklevel: int) -> bool:
    """Warn if a displacement was given up; return True if one was."""
    lost = [ledger.lost for ledger in ledgers if ledger.lost]
    if lost:
        warnings.warn(f"for some weights {lost[0]}", RuntimeWarning, stacklevel=stacklevel + 1)
    return bool(lost)


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
