"""The tables of one task: each row with its metrics, its difference to LoRA, and what it did to the layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.evidence.catalogue import task_named
from benchmarks.evidence.comparison import Cell, Difference, corrected, difference
from benchmarks.evidence.figures import forgotten, last_loss, mean_cosine, mean_rank
from benchmarks.evidence.grid import Experiment
from benchmarks.evidence.measures import measure
from benchmarks.evidence.rows import HEAD_SWEEP
from benchmarks.evidence.standing import LORA, Evidence, Standing
from benchmarks.evidence.wording import caption, figure, interval, mean, p_of, said, tried
from benchmarks.markdown import Column, narrow_tables, paragraphs

NOT_MEASURED = "Not measured yet."


def result_tables(evidence: Evidence, experiment: Experiment) -> str:
    """Return all rows of an experiment: metrics, differences to LoRA, and what training did to the layers."""
    found = evidence.standings(experiment)
    shown = [each for each in found if each.cell is not None]
    if not shown:
        return NOT_MEASURED
    complete = evidence.cells(experiment)
    tested, others = metrics_of(experiment, complete.values())
    family = corrected_differences(evidence, experiment)
    names = ("row", [each.row.title for each in shown])
    groups: list[list[Column]] = [[("lr", [f"{each.lr:g}" for each in shown])]]
    groups += [_metric_columns(shown, metric, family) for metric in tested]
    groups += [[(measure(name).title, [mean(each.cell, name) for each in shown])] for name in others]
    details: list[list[Column]] = [
        [("lr tried", [tried(each) for each in shown])],
        [("trained", [f"{each.cell.results[0].trained:,}" for each in shown if each.cell])],
        [("training loss", [figure(each.cell, last_loss, 4) for each in shown])],
        [
            ("rank", [figure(each.cell, mean_rank, 1) for each in shown]),
            ("cosine", [figure(each.cell, mean_cosine, 5) for each in shown]),
        ],
    ]
    return paragraphs(
        caption(evidence, experiment, [each.cell for each in shown if each.cell], len(family)),
        narrow_tables(names, groups),
        narrow_tables(names, details),
        said(found),
    )


def metrics_of(experiment: Experiment, of: Iterable[Cell]) -> tuple[list[str], list[str]]:
    """Return the metrics that are tested, and those that are only shown.

    Tested are the first one that stands for the task, BLEU where texts were scored and otherwise the one of the tuning,
    and the loss.
    """
    held = [cell.metrics for cell in of]
    known = [name for name in (held[0] if held else []) if all(name in each for each in held)]
    wanted = ["BLEU", experiment.metric, "loss"]
    tested = [name for name in dict.fromkeys(wanted) if name in known][:2]
    return tested, [name for name in known if name not in tested]


def has_margin(experiment: Experiment, metric: str) -> bool:
    """Return whether a metric has a margin. That of the loss is for cross entropy alone."""
    return metric != "loss" or task_named(experiment.task).kind != "regress"


def corrected_differences(evidence: Evidence, experiment: Experiment) -> list[Difference]:
    """Return the differences to LoRA in the table of an experiment, corrected for their number."""
    of = evidence.cells(experiment)
    tested, _ = metrics_of(experiment, of.values())
    return differences(of, tested, HEAD_SWEEP[0].name if experiment is evidence.heads else LORA)


def differences(of: Mapping[str, Cell], metrics: Sequence[str], reference: str = LORA) -> list[Difference]:
    """Return the differences of all rows to one, corrected for their number."""
    if reference not in of or len(of[reference].results) < 2:
        return []
    return corrected(
        [difference(cell, of[reference], name) for name in metrics for row, cell in of.items() if row != reference]
    )


def measured_forgetting(of: Mapping[str, Cell]) -> dict[str, Cell]:
    """Return the cells whose runs were measured on texts of the pretrained model."""
    return {name: cell for name, cell in of.items() if all(run.forgetting is not None for run in cell.results)}


def forgetting_differences(evidence: Evidence, experiment: Experiment) -> list[Difference]:
    """Return how much more the rows of an experiment forget than LoRA, corrected for their number."""
    of = measured_forgetting(evidence.cells(experiment))
    if LORA not in of or experiment.seeds < 2:
        return []
    return corrected([difference(cell, of[LORA], forgotten, "forgetting") for row, cell in of.items() if row != LORA])


def _metric_columns(shown: Sequence[Standing], metric: str, family: Sequence[Difference]) -> list[Column]:
    by_row = {each.row: each for each in family if each.what == metric}
    found = [by_row.get(each.row.name) for each in shown]
    return [
        (measure(metric).title, [mean(each.cell, metric) for each in shown]),
        ("difference to LoRA", [interval(each) if each else "" for each in found]),
        ("p", [p_of(each) if each else "" for each in found]),
    ]
