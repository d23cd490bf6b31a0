"""Delta-LoRA and its control, LoRA with the larger alpha: do runs of the two agree?"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.evidence.catalogue import task_named
from benchmarks.evidence.comparison import Cell, Equivalence, equivalence
from benchmarks.evidence.measures import measure
from benchmarks.evidence.result import Result
from benchmarks.evidence.rows import HEAD_SWEEP, PLAIN_PAIRS
from benchmarks.evidence.standing import ALPHA, DELTA, Evidence
from benchmarks.evidence.task_tables import NOT_MEASURED, has_margin, metrics_of
from benchmarks.evidence.wording import probability
from benchmarks.markdown import table


def equivalences(evidence: Evidence) -> str:
    """Return the test that Delta-LoRA and LoRA with the larger alpha are the same, on every task."""
    rows = [
        _line(title, f"{delta.lr:g} / {alpha.lr:g}", within_margin(delta, alpha, metric))
        for title, delta, alpha, metric in _tuned_pairs(evidence)
    ]
    for title, (delta, alpha) in _one_rate(evidence).items():
        metrics = task_named(delta.task).metric, "loss"
        rows += [_line(title, f"{delta.lr:g}", within_margin(delta, alpha, metric)) for metric in metrics]
    if not rows:
        return NOT_MEASURED
    head = ("task", "", "lr", "Delta-LoRA - larger alpha", "90 % interval", "margin", "p", "the same?")
    return table(head, rows)


def tuned_equivalences(evidence: Evidence) -> list[Equivalence]:
    """Return the tests of the two with a learning rate tuned for each, one for each line of the table."""
    return [within_margin(delta, alpha, metric) for _, delta, alpha, metric in _tuned_pairs(evidence)]


def within_margin(delta: Cell, alpha: Cell, metric: str) -> Equivalence:
    """Return the test that two cells agree in a metric, up to its margin."""
    return equivalence(delta, alpha, metric, measure(metric).stored_margin)


def coincidence(evidence: Evidence) -> str:
    """Return how far the losses of Delta-LoRA and its control are apart in the run where they should not be."""
    rows = []
    for experiment in evidence.compared.values():
        of = evidence.coinciding(experiment)
        for pair in PLAIN_PAIRS:
            cells = [of[row.name] for row in pair if row.name in of]
            if len(cells) == len(pair):
                results = zip(*(cell.results for cell in cells), strict=True)
                rows += [_coincidence(delta, alpha, experiment.metric) for delta, alpha in results]
    if not rows:
        return NOT_MEASURED
    head = (
        "lr",
        "dropout",
        "seed",
        "training loss",
        "largest difference",
        "test, Delta-LoRA",
        "test, control",
    )
    return table(head, rows)


def _tuned_pairs(evidence: Evidence) -> Iterator[tuple[str, Cell, Cell, str]]:
    """Yield the task's title, Delta-LoRA, the control and a metric for each that has a margin."""
    for title, experiment in evidence.pictured.items():
        of = evidence.trio(experiment)
        if {DELTA, ALPHA} <= of.keys():
            tested, _ = metrics_of(experiment, of.values())
            for metric in (name for name in tested if has_margin(experiment, name)):
                yield title, of[DELTA], of[ALPHA], metric


def _one_rate(evidence: Evidence) -> dict[str, list[Cell]]:
    """Return Delta-LoRA and the control at the learning rate of the pair without clipping, with and without it."""
    rows = PLAIN_PAIRS[-1]
    of = {name: cell for each in evidence.compared.values() for name, cell in evidence.coinciding(each).items()}
    found = {"equal heads, one rate, not clipped": [of[row.name] for row in rows if row.name in of]}
    if evidence.heads is not None:
        beside = evidence.again or evidence  # those of the machine that the pair was run on
        clipped = [beside.at_rate(evidence.heads, row, rows[0].lr) for row in HEAD_SWEEP[1:3]]
        found["equal heads, one rate, clipped"] = [cell for cell in clipped if cell is not None]
    return {title: cells for title, cells in found.items() if len(cells) == 2 and len(cells[0].results) > 1}


def _line(title: str, lrs: str, each: Equivalence) -> tuple[str, ...]:
    how = measure(each.difference.what)
    return (
        title,
        how.title,
        lrs,
        how.signed(each.difference.mean),
        f"{how.signed(each.low)} .. {how.signed(each.high)}",
        f"{how.margin:g}",
        probability(each.p),
        "yes" if each.shown else "no" if each.refuted else "not shown",
    )


def _coincidence(delta: Result, alpha: Result, metric: str) -> tuple[str, ...]:
    apart = [abs(ours - theirs) for ours, theirs in zip(delta.losses, alpha.losses, strict=True)]
    stretch = delta.setting.steps / len(apart)
    how = measure(metric)
    return (
        f"{delta.setting.lr:g}",
        "yes" if delta.setting.model_dropout else "no",
        str(delta.setting.seed),
        f"{delta.losses[0]:.3f} .. {delta.losses[-1]:.3f}",
        f"{max(apart):.1e}, by step {stretch * (1 + apart.index(max(apart))):.0f}",
        *(f"{how.number(run.metrics[metric])}, loss {run.metrics['loss']:.5f}" for run in (delta, alpha)),
    )
