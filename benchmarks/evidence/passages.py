"""The sentences of the pages that have numbers of results: see `prose.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.evidence.comparison import Cell, Difference, detectable_effect, difference, equivalence
from benchmarks.evidence.facts import HEADS, TEST_TEXTS, Facts, largest_difference, largest_gap, sampling_error
from benchmarks.evidence.measures import PUBLIC_LORA_BLEU, measure
from benchmarks.evidence.prose import Passage
from benchmarks.evidence.standing import ALPHA, DELTA, LORA

LARGER = (DELTA, ALPHA, "lora-plus", "rslora")
"""Rows that are LoRA with a larger branch, but for clipping."""

RESTARTING, CHANGING = ("restarts", "delta-restarts"), ("ratio-up", "ratio-down")
"""Rows that raise the rank of the change."""


def _positive(number: float, digits: int = 1) -> str:
    """Return a size in the direction that the words say.

    Raises:
        ValueError: if it has the other one.
    """
    if number <= 0:
        raise ValueError(f"the page says that {number:g} is above 0, write it anew")
    return f"{number:.{digits}f}"


def _bound(number: float) -> str:
    """Return an upper bound, rounded up."""
    return f"{math.ceil(10 * number) / 10:.1f}"


def _interval(difference: Difference, digits: int) -> list[str]:
    """Return its mean, which is above 0, and the ends of its 95 % interval."""
    factor = measure(difference.what).factor
    mean, low, high = (factor * end for end in (difference.mean, difference.low, difference.high))
    return [_positive(mean, digits), f"{low:+.{digits}f}", f"{high:+.{digits}f}"]


def _ends(numbers: Iterable[float]) -> tuple[float, float]:
    """Return the smallest and the largest."""
    found = sorted(numbers)
    return found[0], found[-1]


def _best(facts: Facts, task: str) -> str:
    """Return the row of a task that is best in its metric."""
    cells = facts.cells(task)
    return max(cells, key=lambda row: cells[row].mean(facts.metric(task)))


def _two_highest_losses(facts: Facts, task: str) -> set[str]:
    """Return the two rows of a task with the highest loss."""
    cells = facts.cells(task)
    return set(sorted(cells, key=lambda row: cells[row].mean("loss"))[-2:])


def _shown_better(facts: Facts, task: str) -> set[str]:
    """Return the rows of a task that were shown to be better than LoRA, in its metric or in the loss."""
    by_metric = {row for row in facts.shown(task) if facts.points(task, row) > 0}
    return by_metric | {row for row in facts.shown(task, "loss") if facts.apart(task, row, "loss").mean < 0}


def _ranks(facts: Facts, rows: Sequence[str]) -> list[float]:
    """Return the ranks of the changes, LoRA's as 1, in both tasks that classify."""
    return [facts.rank(task, row) for task in TEST_TEXTS for row in rows if row in facts.cells(task)]


def _clipped(facts: Facts, row: str) -> tuple[Cell, Cell]:
    """Return a row of equal heads with the norm of the gradient clipped and without, at one rate."""
    delta, alpha = facts.pair(2)
    free = {DELTA: delta, ALPHA: alpha}[row]
    return facts.at_rate(row, free.lr), free


def _later(facts: Facts) -> Difference:
    """Return the difference of Delta-LoRA from 20 % of the run on to Delta-LoRA from its first step on."""
    return difference(facts.swept(2.0, 0.2), facts.cells(HEADS)[DELTA], "accuracy")


def _cost(facts: Facts, what: str, row: str) -> float:
    """Return how many times the cost of LoRA that of a row is."""
    return float(facts.cost[row][what] / facts.cost[LORA][what])


PASSAGES: Mapping[str, Sequence[Passage]] = {
    "docs/evidence.md": (
        Passage(
            "the 95 % intervals of its gain end at {} points on docstrings with [equal "
            "heads](#does-the-learning-rate-decide) and at {} on SST-2. They leave out the choice of the rate: with "
            "equal heads and the next higher rate Delta-LoRA is {} points ahead, [{}, {}].",
            lambda facts: [
                *(_bound(facts.bounds(task, DELTA)[1]) for task in (HEADS, "sst2")),
                *_interval(difference(facts.at_rate(DELTA, 2.7e-3), facts.cells(HEADS)[LORA], "accuracy"), 1),
            ],
            lambda facts: (
                facts.lr(HEADS, DELTA) == 1.5e-3 and all(DELTA not in facts.shown(t) for t in (HEADS, "sst2"))
            ),
        ),
        Passage(
            "On E2E its loss is {} higher, [{}, {}], which is not shown once corrected for {} comparisons.",
            lambda facts: [
                *_interval(facts.apart("e2e", DELTA, "loss"), 3),
                str(2 * (len(facts.cells("e2e")) - 1)),
            ],
            lambda facts: facts.apart("e2e", DELTA, "loss").low > 0 and DELTA not in facts.shown("e2e", "loss"),
        ),
        Passage(
            "With equal heads and a finer grid Delta-LoRA's difference to LoRA is {} points higher than with a head "
            "that shares the rate of the factors. None of the {} other rows with equal heads was shown to be better "
            "than LoRA.",
            lambda facts: [
                _positive(facts.points(HEADS, DELTA) - facts.points("docstrings", DELTA)),
                str(len(facts.cells(HEADS)) - 1),
            ],
            lambda facts: not _shown_better(facts, HEADS),
        ),
        Passage(
            "With equal heads the rank of the change is {} times LoRA's for Delta-LoRA, {} and {} times with a "
            "changing lambda, {} and {} times with restarts. A changing lambda is {} and {} points ahead of LoRA, "
            "neither of which is shown; Delta-LoRA with restarts lies {} points behind.",
            lambda facts: [
                *(f"{facts.rank(HEADS, row):.1f}" for row in (DELTA, *CHANGING, *RESTARTING)),
                *(_positive(facts.points(HEADS, row)) for row in CHANGING),
                _positive(-facts.points(HEADS, "delta-restarts")),
            ],
            lambda facts: (
                facts.shown(HEADS) == {"delta-restarts"}
                and min(facts.rank(HEADS, row) for row in (*CHANGING, *RESTARTING)) > facts.rank(HEADS, DELTA)
            ),
        ),
        Passage(
            "Fine-tuning is {} to {} points ahead of LoRA. On docstrings plain SGD, which keeps no state, had the "
            "highest mean of all rows.",
            lambda facts: [_positive(gain) for gain in _ends(facts.points(task, "full") for task in TEST_TEXTS)],
            lambda facts: all("full" in facts.shown(t) for t in TEST_TEXTS) and _best(facts, "docstrings") == "sgd",
        ),
        Passage("differ by {} points of BLEU", lambda facts: [f"{PUBLIC_LORA_BLEU[1] - PUBLIC_LORA_BLEU[0]:.1f}"]),
        Passage("finds a true difference of {} spreads", lambda facts: [f"{detectable_effect(5):.1f}"]),
        Passage(
            "of {} to {} points comes from the choice of the test texts alone",
            lambda facts: [f"{error:.1f}" for error in _ends(sampling_error(facts, task) for task in TEST_TEXTS)],
        ),
        Passage(
            "learns little of this task: its loss stays at {} times that of fine-tuning",
            lambda facts: [f"{facts.cells('e2e')[LORA].mean('loss') / facts.cells('e2e')['full'].mean('loss'):.1f}"],
        ),
        Passage(
            "On SST-2 no adapter was shown to differ from LoRA but LoRA with restarts, which lies {} points behind. "
            "Delta-LoRA is within {} points of LoRA there, whichever way; fine-tuning is {} points better.",
            lambda facts: [
                _positive(-facts.points("sst2", "restarts")),
                _bound(max(map(abs, facts.bounds("sst2", DELTA)))),
                _positive(facts.points("sst2", "full")),
            ],
            lambda facts: facts.shown("sst2") == {"restarts", "full"},
        ),
        Passage(
            "On docstrings fine-tuning of all weights is {} points better than LoRA, and plain SGD, which keeps no "
            "state, has the highest mean, {} points above LoRA's.",
            lambda facts: [_positive(facts.points("docstrings", row)) for row in ("full", "sgd")],
            lambda facts: _best(facts, "docstrings") == "sgd" and {"full", "sgd"} <= facts.shown("docstrings"),
        ),
        Passage(
            "AdaLoRA's loss is lower than LoRA's; its learning rate, and so its head's, is {} times as high.",
            lambda facts: [f"{facts.lr('docstrings', 'adalora') / facts.lr('docstrings', LORA):.1f}"],
            lambda facts: (
                "adalora" in facts.shown("docstrings", "loss") and facts.apart("docstrings", "adalora", "loss").mean < 0
            ),
        ),
        Passage(
            "Delta-LoRA, the larger alpha, LoRA+ and rsLoRA lie {} to {} points behind, the last two with a p above "
            "0.05.",
            lambda facts: [_positive(gap) for gap in _ends(-facts.points("docstrings", row) for row in LARGER)],
            lambda facts: facts.shown("docstrings") & set(LARGER) == {DELTA, ALPHA},
        ),
        Passage(
            "At 0.0005 the losses of the two agree to about {} over the whole run.",
            lambda facts: [f"{largest_gap(facts.pair(0)):.1e}"],
            lambda facts: facts.pair(0)[0].lr == 5e-4,
        ),
        Passage(
            "by up to {} points, so that a difference of that size between two single runs means nothing there",
            lambda facts: [f"{100 * largest_difference(facts.pair(1), 'accuracy'):.1f}"],
        ),
        Passage(
            "At 0.0015 and norm 1 the loss of the larger alpha is {} higher than without clipping; Delta-LoRA's is as "
            "before.",
            lambda facts: [_interval(difference(*_clipped(facts, ALPHA), "loss"), 3)[0]],
            lambda facts: (
                facts.pair(2)[0].lr == 1.5e-3
                and difference(*_clipped(facts, ALPHA), "loss").low > 0
                and equivalence(*_clipped(facts, DELTA), "loss", measure("loss").stored_margin).shown
            ),
        ),
        Passage(
            "There Delta-LoRA is {} points of accuracy ahead of the control, at the rates of now {}:",
            lambda facts: [
                _interval(difference(facts.at_rate(DELTA, 2.7e-3), facts.at_rate(ALPHA, 1.5e-3), "accuracy"), 1)[0],
                _interval(facts.apart(HEADS, DELTA, reference=ALPHA), 1)[0],
            ],
        ),
        Passage(
            "On SST-2 at 0.005 Delta-LoRA breaks down and LoRA does not; at 0.0005 Delta-LoRA is ahead;",
            holds=lambda facts: (
                facts.held_out("sst2", DELTA, 5e-3) < 0.6 < 0.8 < facts.held_out("sst2", LORA, 5e-3)
                and facts.held_out("sst2", DELTA, 5e-4) > facts.held_out("sst2", LORA, 5e-4)
            ),
        ),
        Passage(
            "With equal heads Delta-LoRA, which lay {} points behind, was not shown to be behind any more, nor to be "
            "ahead.",
            lambda facts: [_positive(-facts.points("docstrings", DELTA))],
            lambda facts: DELTA not in facts.shown(HEADS) | facts.shown(HEADS, "loss"),
        ),
        Passage(
            "A changing lambda, which raises the rank of the change, was not shown to gain anything either. Restarts "
            "have the highest rank and the highest loss, and with them Delta-LoRA is behind LoRA, at a rate that the "
            "held-out loss would not have chosen;",
            holds=lambda facts: (
                facts.shown(HEADS) == facts.shown(HEADS, "loss") == {"delta-restarts"}
                and _two_highest_losses(facts, HEADS) == set(RESTARTING)
                and facts.points(HEADS, "delta-restarts") < 0
                and facts.best_by_loss(HEADS, "delta-restarts") != facts.lr(HEADS, "delta-restarts")
            ),
        ),
        Passage(
            "With lambda 2 a start at 20 % of the run, where Delta-LoRA is not just a larger alpha, comes out {} "
            "points lower than a start at once, [{}, {}]: no difference was shown.",
            lambda facts: [
                _positive(-100 * _later(facts).mean),
                *(f"{100 * end:+.1f}" for end in (_later(facts).low, _later(facts).high)),
            ],
            lambda facts: _later(facts).low < 0 < _later(facts).high,
        ),
        Passage(
            "With restarts the rank of the change is {} to {} times that of LoRA, with a changing lambda up to {} "
            "times. None of these rows was shown to be better than LoRA on either task, nor with equal heads.",
            lambda facts: [f"{rank:.1f}" for rank in (*_ends(_ranks(facts, RESTARTING)), max(_ranks(facts, CHANGING)))],
            lambda facts: (
                not any(_shown_better(facts, task) & {*RESTARTING, *CHANGING} for task in (*TEST_TEXTS, HEADS))
            ),
        ),
        Passage(
            "what it keeps is {} times as large as AdamW's state of the factors. Fine-tuning takes {} times as long, "
            "and its gradients and states are {} times as large.",
            lambda facts: [
                f"{_cost(facts, 'state_bytes', DELTA):.1f}",
                f"{facts.cost['full']['ratio']['median']:.1f}",
                f"{_cost(facts, 'gradient_bytes', 'full'):.0f}",
            ],
            lambda facts: all(
                abs(facts.cost[row]["ratio"]["median"] - 1) < 0.05 for row in (DELTA, *RESTARTING, "ratio-down")
            ),
        ),
    ),
    "README.md": (
        Passage(
            "Delta-LoRA lies {} points behind.",
            lambda facts: [_positive(-facts.points("docstrings", DELTA))],
            lambda facts: DELTA in facts.shown("docstrings"),
        ),
    ),
}
"""By the names of the pages, in the order of a page."""
