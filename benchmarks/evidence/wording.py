"""How cells, differences and the circumstances of runs are written in tables and captions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.evidence.comparison import Cell, Difference
from benchmarks.evidence.grid import Experiment
from benchmarks.evidence.measures import measure
from benchmarks.evidence.result import Result
from benchmarks.evidence.rows import ROWS
from benchmarks.evidence.setting import Setting
from benchmarks.evidence.standing import Evidence, Standing

PICTURES = Path(__file__).parents[2] / "docs" / "evidence"

Some = TypeVar("Some", bound=Hashable)

DEFAULTS = {
    field.name: field.default for field in fields(Setting) if field.name in ("rank", "alpha", "update_ratio", "start")
}


def caption(evidence: Evidence, experiment: Experiment, of: Sequence[Cell], comparisons: int) -> str:
    """Return over what the numbers are, and on and with what they were made."""
    setting = of[0].results[0].setting
    tuned = (
        f"the learning rate of each row tuned on {count(experiment.tuning_seeds, 'other seed')} and on a held-out "
        "part of the training data"
        if experiment.tuning_seeds
        else "at one learning rate"
    )
    spread = ", mean ± standard error" if experiment.seeds > 1 else ""
    paired = (
        " Differences to LoRA are paired by seed, with 95 % intervals; "
        f"p by Holm over {count(comparisons, 'comparison')}."
        if comparisons
        else ""
    )
    runs = [run for cell in of for run in cell.results]
    return (
        f"{setting.model}, {setting.steps} steps of {setting.batch_size}{_shared(experiment, setting)}. "
        f"{count(experiment.seeds, 'seed')} a cell{spread}; {tuned}.{paired} "
        f"{origin(runs)}{_tuned_elsewhere(evidence, of)}"
    )


def _shared(experiment: Experiment, setting: Setting) -> str:
    """Return what all rows share: rank, alpha, lambda, K, the learning rate of the head, and how many are measured."""
    own = set.intersection(*(set(ROWS[name].changes) for name in experiment.rows))
    shared = replace(setting, **{name: experiment.setting.get(name, default) for name, default in DEFAULTS.items()})
    told = {
        "rank": f"r {shared.rank}",
        "alpha": f"alpha {shared.alpha:g}",
        "update_ratio": f"lambda {shared.update_ratio:g}",
        "start": f"K {shared.start_step}",
    }
    head = "" if setting.head_lr is None else f", the head's learning rate {setting.head_lr:g}"
    few = "" if setting.test_examples is None else f", measured on {setting.test_examples} test inputs"
    return "".join(f", {text}" for name, text in told.items() if name not in own) + head + few


def origin(results: Sequence[Result]) -> str:
    """Return machines, versions and commits of results, each of them once."""
    machines = once(machine_of(run.machine) for run in results)
    versions = once(", ".join(f"{name} {number}" for name, number in run.versions.items()) for run in results)
    commits = once(run.commit for run in results)
    return f"{'; '.join(machines)}; {'; '.join(versions)}; commit{'s' * (len(commits) > 1)} {', '.join(commits)}."


def _tuned_elsewhere(evidence: Evidence, of: Sequence[Cell]) -> str:
    """Return how many tuning runs were made on another machine than the runs of their row; empty without such."""
    total, others = 0, []
    for cell in of:
        known, tuning = {machine_of(run.machine) for run in cell.results}, evidence.tuning(cell)
        total += len(tuning)
        others += [name for name in (machine_of(run.machine) for run in tuning) if name not in known]
    if not others:
        return ""
    return (
        f" {len(others)} of the {total} tuning runs were made on another machine than the runs of their row "
        f"({', '.join(once(others))})."
    )


def said(found: Sequence[Standing]) -> str:
    """Return the sentences about rows that are missing or diverged, or whose tuning is open; empty without such."""
    left_out = [f"{each.row.title} ({each.missing})" for each in found if each.cell is None]
    lost = [f"{each.row.title} ({mean(each.cell, '')})" for each in found if each.cell and each.cell.diverged]
    edges = [f"{each.row.title} ({each.lr:g})" for each in found if each.cell is not None and each.at_edge]
    sentences = []
    if left_out:
        sentences.append(f"Left out: {', '.join(left_out)}.")
    if lost:
        sentences.append(f"Without a mean: {', '.join(lost)}.")
    if edges:
        sentences.append(f"The best learning rate is at the edge of those tried: {', '.join(edges)}.")
    return " ".join(sentences)


def mean(cell: Cell | None, metric: str) -> str:
    """Return mean and standard error of a metric; empty where a run has none of it."""
    if cell is None:
        return ""
    if cell.diverged:
        return f"{cell.diverged} of {len(cell.results)} diverged"
    if metric not in cell.metrics:
        return ""
    how = measure(metric)
    error = f" ± {how.number(cell.standard_error(metric))}" if len(cell.results) > 1 else ""
    return how.number(cell.mean(metric)) + error


def figure(cell: Cell | None, of: Callable[[Result], float | None], digits: int) -> str:
    """Return the mean of a figure over the runs; empty where a run has none."""
    if cell is None or cell.diverged:
        return ""
    values = [of(run) for run in cell.results]
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.{digits}f}" if len(known) == len(values) else ""


def interval(each: Difference) -> str:
    """Return a difference with its 95 % interval."""
    how = measure(each.what)
    return f"{how.signed(each.mean)} [{how.signed(each.low)}, {how.signed(each.high)}]"


def marked(each: Difference) -> str:
    """Return a difference with its 95 % interval, in bold if it is shown."""
    return f"**{interval(each)}**" if each.shown else interval(each)


def p_of(each: Difference) -> str:
    """Return the p-value of a difference, the corrected one where there is one."""
    return probability(each.p if each.corrected is None else each.corrected)


def probability(p: float) -> str:
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def tried(each: Standing) -> str:
    """Return the learning rates that a row was tuned over, or whose it takes."""
    if each.row.lr_of is not None:
        source, factor = each.row.lr_of
        return f"{ROWS[source].title}'s" + (f" x {factor:g}" if factor != 1 else "")
    if each.row.lr is not None:
        return "fixed"
    return f"{each.tried[0]:g} .. {each.tried[-1]:g} ({len(each.tried)})" if each.tried else ""


def machine_of(machine: Mapping[str, Any]) -> str:
    """Return the name of a GPU, or that of the processor with the threads of a run."""
    device = machine.get("device", "cpu")
    threads = count(machine.get("torch_threads", 1), "thread")
    return f"{machine.get('cpu', 'CPU')}, {threads}" if device == "cpu" else str(device)


def count(number: int, of: str) -> str:
    return f"{number} {of}{'s' * (number != 1)}"


def once(values: Iterable[Some]) -> list[Some]:
    """Return each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))


def picture(name: str, title: str) -> str:
    """Return the link to a picture of `pictures.py`; empty if it was not drawn."""
    path = PICTURES / f"{file_name(name)}.png"
    return f"![{title}]({PICTURES.name}/{path.name})" if path.exists() else ""


def file_name(name: str) -> str:
    """Return the name of a picture without what a link cannot hold."""
    return name.replace(", ", "-").replace(" ", "-").replace("/", "-")
