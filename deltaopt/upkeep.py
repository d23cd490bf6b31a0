"""The upkeep of ledgers from step to step: terms are summed up in small shares, and a warning comes in advance."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from deltaopt.ledger import Ledger

STREAK = 4
"""A ratio that changed in so many steps, one after the other, is taken to change at every step."""


class Upkeep:
    """Keeps the ledgers of an update rule small, at a bounded cost for each step."""

    def __init__(self) -> None:
        self._streak = 0
        self._text: str | None = None
        self._warned = False

    def after_step(self, extended: Sequence[Ledger]) -> None:
        """Sum up terms that have become too many, and note if a ratio that changes at every step adds them.

        Args:
            extended: the ledgers that were extended since the last call; none after a step that only continued.
        """
        extended = list(dict.fromkeys(extended))  # on a GPU several steps can become known at once
        self._streak = self._streak + 1 if extended else 0
        if not self._warned and self._streak >= STREAK:
            self._text = growth(extended)
        settle(extended)

    def warn(self, stacklevel: int) -> None:
        """Warn once of what the ledgers will grow to.

        Args:
            stacklevel: of the warning, as `warnings.warn` takes it where this is called.
        """
        if self._text is not None and not self._warned:
            self._warned = True
            warnings.warn(self._text, RuntimeWarning, stacklevel=stacklevel + 1)


def settle(ledgers: Sequence[Ledger]) -> None:
    """Sum up terms where they have become too many; a share of the work at each call, so that no step takes long.

    Adding a term to its matrix takes half as many multiplications as the move of W that closed it. One call does twice
    what one new term in each of the ledgers makes necessary, so about as much as the moves of W in that step (and
    one term more at most). The ledgers with the most terms come first.

    Args:
        ledgers: that were extended in this step.
    """
    overdue = [ledger for ledger in ledgers if ledger.overdue()]
    work = 2 * sum(ledger.work() for ledger in ledgers)
    for ledger in sorted(overdue, key=lambda ledger: -ledger.ranks()[0]):
        work -= ledger.sum_up(work)
        if work <= 0:
            return


def growth(ledgers: Sequence[Ledger]) -> str | None:
    """Return a warning of what these ledgers will grow to, if each step extends them; None while they are small."""
    growing = [ledger for ledger in ledgers if _half_way(ledger)]
    if not growing:
        return None
    steps = max(min((ledger.ranks()[1] - ledger.ranks()[0]) // ledger.terms[-1].rank + 1 for ledger in growing), 1)
    size = sum(ledger.matrix_nbytes() for ledger in ledgers) / 2**20
    return (
        f"update_ratio has changed at each of the last {STREAK} steps (or A and B were changed between them), and each "
        f"change adds a term to the ledgers of {len(ledgers)} weights. In about {steps} steps these will be kept as "
        f"matrices as large as the weights: {size:.3g} MiB in all, in memory and in each saved state, and an adapter "
        "that is exported without a rank will have up to the full one. W and its displacement stay exact. To keep "
        "them small, change the ratio in stages: update_ratio=deltaopt.schedules.linear(start, end, steps, stages=10)"
    )


def _half_way(ledger: Ledger) -> bool:
    """Tell if the terms are half of what is kept as terms, and a matrix will take more memory than they do now."""
    rank, limit = ledger.ranks()
    return not ledger.is_matrix and 2 * rank >= limit > 0 and ledger.matrix_nbytes() > ledger.nbytes
