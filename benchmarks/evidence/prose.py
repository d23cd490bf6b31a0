"""The numbers in the sentences of the pages: they come from the results, as those of the tables do.

A sentence is written by hand, and stands in a page and here, where each of its numbers is a ``{}``. The numbers are
filled in when the pages are made. What its words say beyond the numbers is checked then: a sentence that does not hold
any more has to be written anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.evidence.comparison import Difference, detectable_effect, difference
from benchmarks.evidence.facts import HEADS, TEST_TEXTS, Facts, largest_difference, largest_gap, sampling_error
from benchmarks.evidence.measures import PUBLIC_LORA_BLEU, measure
from benchmarks.evidence.standing import ALPHA, DELTA, LORA

LARGER = (DELTA, ALPHA, "lora-plus", "rslora")
"""Rows that are LoRA with a larger branch, but for clipping."""

RESTARTING, CHANGING = ("restarts", "delta-restarts"), ("ratio-up", "ratio-down")
"""Rows that raise the rank of the change."""

NUMBER = r"([-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)"


@dataclass(frozen=True)
class Passage:
    """A part of a page with numbers of results.

    Attributes:
        text: the words, with a single space where the page may break the line, and ``{}`` for each number.
        numbers: makes the numbers, in the order of the text.
        holds: whether the words are right.
    """

    text: str
    numbers: Callable[[Facts], Sequence[str]] = lambda facts: ()
    holds: Callable[[Facts], bool] = lambda facts: True

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the text of the page, with a group for each number."""
        words = [re.escape(word).replace(r"\{\}", NUMBER) for word in self.text.split(" ")]
        return re.compile(r"\s+".join(words))


def filled_in(page: str, passages: Sequence[Passage], facts: Facts) -> str:
    """Return a page with the numbers of its passages.

    Args:
        page: its text.
        passages: each of them stands in it once.
        facts: the results.

    Raises:
        ValueError: if a passage is not there, or there twice; if it has more or fewer numbers than are made for it, or
            its words do not hold.
    """
    for passage in passages:
        found = list(passage.pattern.finditer(page))
        if len(found) != 1:
            raise ValueError(f"the page has {len(found)} times, expected once: {passage.text!r}")
        if not passage.holds(facts):
            raise ValueError(f"the results do not show any more what the page says, write it anew: {passage.text!r}")
        page = page[: found[0].start()] + _with(found[0], passage.numbers(facts)) + page[found[0].end() :]
    return page


def _with(match: re.Match[str], numbers: Sequence[str]) -> str:
    if len(numbers) != match.re.groups:
        raise ValueError(f"{len(numbers)} numbers for {match.re.groups} places: {match[0]!r}")
    text = match[0]
    for place in range(len(numbers), 0, -1):
        start, end = (position - match.start() for position in match.span(place))
        text = text[:start] + numbers[place - 1] + text[end:]
    return text


def _size(number: float) -> str:
    return f"{abs(number):.1f}"


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


def _ranks(facts: Facts, rows: Sequence[str]) -> list[float]:
    """Return the ranks of the changes, LoRA's as 1, in both tasks that classify."""
    return [facts.rank(task, row) for task in TEST_TEXTS for row in rows if row in facts.cells(task)]


def _cost_of_clipping(facts: Facts, row: str) -> Difference:
    """Return by how much the loss is higher with the norm of the gradient clipped."""
    delta, alpha = facts.pair(2)
    free = {DELTA: delta, ALPHA: alpha}[row]
    return difference(facts.at_rate(row, free.lr), free, "loss")


def _cost(facts: Facts, what: str, row: str) -> float:
    """Return how many times the cost of LoRA that of a row is."""
    return float(facts.cost[row][what] / facts.cost[LORA][what])


SETTLED = (
    Passage(
        "of {} to {} points comes from the choice of the test texts alone",
        lambda facts: [f"{error:.1f}" for error in sorted(sampling_error(facts, task) for task in TEST_TEXTS)],
    ),
    Passage("finds a true difference of {} spreads", lambda facts: [f"{detectable_effect(5):.1f}"]),
    Passage("differ by {} points of BLEU", lambda facts: [f"{PUBLIC_LORA_BLEU[1] - PUBLIC_LORA_BLEU[0]:.1f}"]),
    Passage(
        "learns little of this task: its loss stays at {} times that of fine-tuning",
        lambda facts: [f"{facts.cells('e2e')[LORA].mean('loss') / facts.cells('e2e')['full'].mean('loss'):.1f}"],
    ),
    Passage(
        "On SST-2 no adapter was shown to differ from LoRA but restarts, which cost {} points. Delta-LoRA is within {} "
        "points of LoRA there, whichever way; fine-tuning is {} points better.",
        lambda facts: [
            _size(facts.points("sst2", "restarts")),
            _size(max(map(abs, facts.bounds("sst2", DELTA)))),
            _size(facts.points("sst2", "full")),
        ],
        lambda facts: facts.shown("sst2") == {"restarts", "full"} and facts.points("sst2", "restarts") < 0,
    ),
    Passage(
        "On docstrings fine-tuning of all weights is {} points better than LoRA, and the best row is plain SGD, {} "
        "points better, which keeps no state.",
        lambda facts: [_size(facts.points("docstrings", row)) for row in ("full", "sgd")],
        lambda facts: _best(facts, "docstrings") == "sgd" and {"full", "sgd"} <= facts.shown("docstrings"),
    ),
    Passage(
        "AdaLoRA's loss is lower than LoRA's; its learning rate, and so its head's, is {} times as high.",
        lambda facts: [f"{facts.lr('docstrings', 'adalora') / facts.lr('docstrings', LORA):.1f}"],
        lambda facts: "adalora" in facts.shown("docstrings", "loss"),
    ),
    Passage(
        "Delta-LoRA, the larger alpha, LoRA+ and rsLoRA lie {} to {} points behind, the last two with a p above 0.05.",
        lambda facts: [_size(gap) for gap in _ends(-facts.points("docstrings", row) for row in LARGER)],
        lambda facts: facts.shown("docstrings") & set(LARGER) == {DELTA, ALPHA},
    ),
    Passage(
        "At 0.0005 the losses of the two agree to {} over the whole run.",
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
        lambda facts: [f"{_cost_of_clipping(facts, ALPHA).mean:.3f}"],
        lambda facts: (
            facts.pair(2)[0].lr == 1.5e-3
            and _cost_of_clipping(facts, ALPHA).low > 0
            and abs(_cost_of_clipping(facts, DELTA).mean) < measure("loss").margin / 4
        ),
    ),
    Passage(
        "it had chosen 0.0027 for Delta-LoRA and 0.0015 for the control, where the two are {} points of accuracy apart",
        lambda facts: [
            _size(100 * difference(facts.at_rate(DELTA, 2.7e-3), facts.at_rate(ALPHA, 1.5e-3), "accuracy").mean)
        ],
    ),
    Passage(
        "With restarts the rank of the change is {} to {} times that of LoRA, with a changing lambda up to {} times.",
        lambda facts: [f"{rank:.1f}" for rank in (*_ends(_ranks(facts, RESTARTING)), max(_ranks(facts, CHANGING)))],
    ),
    Passage(
        "what it keeps is {} times as large as AdamW's state of the factors. Fine-tuning takes {} times as long, and "
        "its gradients and states are {} times as large.",
        lambda facts: [
            f"{_cost(facts, 'state_bytes', DELTA):.1f}",
            f"{facts.cost['full']['ratio']['median']:.1f}",
            f"{_cost(facts, 'gradient_bytes', 'full'):.0f}",
        ],
        lambda facts: all(
            abs(facts.cost[row]["ratio"]["median"] - 1) < 0.05 for row in (DELTA, *RESTARTING, "ratio-down")
        ),
    ),
)

IN_SHORT = (
    Passage(
        "Gains of more than {} points on docstrings with [equal heads](#does-the-learning-rate-decide) and {} on SST-2 "
        "are ruled out, smaller ones are not.",
        lambda facts: [_size(facts.bounds(task, DELTA)[1]) for task in (HEADS, "sst2")],
        lambda facts: all(
            min(facts.bounds(task, DELTA)) < 0 < max(facts.bounds(task, DELTA)) for task in (HEADS, "sst2")
        ),
    ),
    Passage(
        "On E2E its loss is {} higher than LoRA's, which chance may explain.",
        lambda facts: [f"{facts.apart('e2e', DELTA, 'loss').mean:.3f}"],
        lambda facts: facts.apart("e2e", DELTA, "loss").mean > 0 and DELTA not in facts.shown("e2e", "loss"),
    ),
    Passage(
        "A fresh head that has to share the rate of the factors moved the result by {} points. With equal heads no row "
        "was shown to be better than LoRA.",
        lambda facts: [_size(facts.points(HEADS, DELTA) - facts.points("docstrings", DELTA))],
        lambda facts: (
            all(facts.points(HEADS, row) < 0 for row in facts.shown(HEADS))
            and all(facts.apart(HEADS, row, "loss").mean > 0 for row in facts.shown(HEADS, "loss"))
        ),
    ),
    Passage(
        "A changing lambda and restarts raise it, to {} to {} times that of LoRA. With equal heads a changing lambda "
        "gains no more than {} points, if anything, and Delta-LoRA with restarts lies {} points behind LoRA.",
        lambda facts: [
            *(f"{rank:.1f}" for rank in _ends(facts.rank(HEADS, row) for row in (*RESTARTING, *CHANGING))),
            _size(max(facts.bounds(HEADS, row)[1] for row in CHANGING)),
            _size(facts.points(HEADS, "delta-restarts")),
        ],
        lambda facts: facts.shown(HEADS) == {"delta-restarts"} and facts.points(HEADS, "delta-restarts") < 0,
    ),
    Passage(
        "Fine-tuning is {} to {} points ahead of LoRA. On docstrings plain SGD, which keeps no state, was the best row "
        "of all.",
        lambda facts: [_size(gain) for gain in _ends(facts.points(task, "full") for task in TEST_TEXTS)],
        lambda facts: all("full" in facts.shown(task) for task in TEST_TEXTS) and _best(facts, "docstrings") == "sgd",
    ),
)
WITH_EQUAL_HEADS = (
    Passage(
        "With equal heads Delta-LoRA, which lay {} points behind, is not behind any more; whether it is ahead, five "
        "seeds do not show.",
        lambda facts: [_size(facts.points("docstrings", DELTA))],
        lambda facts: (
            facts.points("docstrings", DELTA) < 0 < facts.points(HEADS, DELTA) and DELTA not in facts.shown(HEADS)
        ),
    ),
    Passage(
        "A changing lambda, which raises the rank of the change, was not shown to gain anything either. Restarts have "
        "the highest rank and the highest loss, and with them Delta-LoRA is behind LoRA;",
        holds=lambda facts: (
            facts.shown(HEADS) == facts.shown(HEADS, "loss") == {"delta-restarts"}
            and _two_highest_losses(facts, HEADS) == set(RESTARTING)
            and min(facts.rank(HEADS, row) for row in RESTARTING)
            > max(facts.rank(HEADS, row) for row in (DELTA, *CHANGING))
        ),
    ),
    Passage(
        "None of these rows was shown to be better than LoRA on either task, nor with equal heads.",
        holds=lambda facts: all(
            row not in facts.shown(task) or facts.points(task, row) < 0
            for task in (*TEST_TEXTS, HEADS)
            for row in (*RESTARTING, *CHANGING)
        ),
    ),
)
FRONT_PAGE = (
    Passage(
        "Delta-LoRA lies {} points behind.",
        lambda facts: [_size(facts.points("docstrings", DELTA))],
        lambda facts: DELTA in facts.shown("docstrings") and facts.points("docstrings", DELTA) < 0,
    ),
)

PASSAGES: Mapping[str, Sequence[Passage]] = {
    "docs/evidence.md": (*IN_SHORT, *SETTLED, *WITH_EQUAL_HEADS),
    "README.md": FRONT_PAGE,
}
"""By the names of the pages."""
