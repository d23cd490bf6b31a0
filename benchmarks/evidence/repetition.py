"""Rows that were tuned and run on two machines: what the choice of a learning rate is worth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.evidence.comparison import Cell
from benchmarks.evidence.measures import measure
from benchmarks.evidence.rows import HEAD_SWEEP, RANK_SWEEP, RATIO_SWEEP, ROWS
from benchmarks.evidence.standing import Evidence
from benchmarks.evidence.task_tables import NOT_MEASURED
from benchmarks.evidence.wording import count, mean, origin
from benchmarks.markdown import Column, narrow_tables, paragraphs

METRIC = "accuracy"
"""Of docstrings, the task of these rows."""


@dataclass(frozen=True)
class Twice:
    """One row that was tuned and run twice.

    Attributes:
        shown: the cell of the other tables.
        again: the cell of the other tuning.
    """

    shown: Cell
    again: Cell

    @property
    def gap(self) -> float:
        """The mean of `again` less that of `shown`, in points."""
        return measure(METRIC).factor * (self.again.mean(METRIC) - self.shown.mean(METRIC))

    @property
    def expected(self) -> float:
        """The standard error of `gap` if the two were runs of one rate that share nothing else."""
        return measure(METRIC).factor * math.hypot(*(c.standard_error(METRIC) for c in (self.shown, self.again)))

    @property
    def is_of_one_rate(self) -> bool:
        """Whether both tunings chose the same learning rate."""
        return self.shown.lr == self.again.lr


def made_twice(evidence: Evidence) -> dict[str, Twice]:
    """Return the rows of the comparison with equal heads and of the sweeps that were made twice, by their names."""
    if evidence.again is None:
        return {}
    found = {}
    for experiment in (evidence.heads, evidence.of_rows(RATIO_SWEEP), evidence.of_rows(RANK_SWEEP)):
        if experiment is not None:
            again = evidence.again.cells(experiment)
            for name, shown in evidence.cells(experiment).items():
                if name in again:
                    found[name] = Twice(shown, again[name])
    return found


def repetition(evidence: Evidence) -> str:
    """Return both cells of every row that was made twice, and how far the two lie apart."""
    twice = made_twice(evidence)
    if not twice:
        return NOT_MEASURED
    of, title = list(twice.values()), measure(METRIC).title
    groups: list[list[Column]] = [
        [
            ("lr, as shown", [f"{each.shown.lr:g}" for each in of]),
            ("again", [f"{each.again.lr:g}" for each in of]),
            (f"{title}, as shown", [mean(each.shown, METRIC) for each in of]),
            ("again", [mean(each.again, METRIC) for each in of]),
            ("again - as shown", [f"{each.gap:+.2f}" for each in of]),
        ],
        [
            ("difference to LoRA, as shown", _apart({name: each.shown for name, each in twice.items()})),
            ("again", _apart({name: each.again for name, each in twice.items()})),
        ],
    ]
    shown, again = (
        origin([run for cell in cells for run in cell.results])
        for cells in ([each.shown for each in of], [each.again for each in of])
    )
    gap, expected = (_root_mean_square(found) for found in ([e.gap for e in of], [e.expected for e in of]))
    return paragraphs(
        f"{count(len(of), 'row')}, tuned and run twice. As shown elsewhere: {shown} Again: {again}",
        narrow_tables(("row", [ROWS[name].title for name in twice]), groups),
        f"The two lie {gap:.2f} apart (root of the mean square). Runs of one rate that share nothing else would lie "
        f"{expected:.2f} apart.",
    )


def _root_mean_square(numbers: Iterable[float]) -> float:
    return math.sqrt(statistics.fmean(number**2 for number in numbers))


def _apart(of: Mapping[str, Cell]) -> list[str]:
    """Return the difference of each row's mean to LoRA's, where LoRA was made twice too."""
    lora, how = of.get(HEAD_SWEEP[0].name), measure(METRIC)
    if lora is None:
        return ["" for _ in of]
    return ["" if cell is lora else how.signed(cell.mean(METRIC) - lora.mean(METRIC)) for cell in of.values()]
