"""The tables of docs/evidence.md, and what is said with them, from result files alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.evidence.catalogue import task_named
from benchmarks.evidence.comparison import (
    Cell,
    corrected,
    detectable,
    difference,
    equivalence,
    seeds_needed,
)
from benchmarks.evidence.figures import forgotten
from benchmarks.evidence.grid import Experiment, Grid
from benchmarks.evidence.measures import PUBLIC_LORA_BLEU, measure
from benchmarks.evidence.repetition import repetition
from benchmarks.evidence.result import Result
from benchmarks.evidence.rows import HEAD_SWEEP, PLAIN_PAIRS, RANK_SWEEP, RATIO_SWEEP, ROWS
from benchmarks.evidence.standing import ALPHA, DELTA, LORA, Evidence
from benchmarks.evidence.sweeps import equal_heads, equal_rates, rank_sweep, ratio_sweep
from benchmarks.evidence.task_tables import NOT_MEASURED, differences, metrics_of, result_tables
from benchmarks.evidence.wording import (
    caption,
    count,
    figure,
    interval,
    machine_of,
    mean,
    origin,
    p_of,
    picture,
    probability,
)
from benchmarks.markdown import Column, narrow_tables, paragraphs, table

PAPER = {
    "e2e": {"BLEU": "1.24", "NIST": "0.13", "METEOR": "0.86", "ROUGE-L": "1.13", "CIDEr": "0.08"},
    "webnlg": {"BLEU": "0.79, 1.08 and 0.91 on three parts", "METEOR": "0.01 of 1 (1 here)", "TER": "0.02 less"},
}
"""The paper's gains of Delta-LoRA over LoRA."""


def evidence_tables(folder: Path) -> dict[str, Callable[[], str]]:
    """Return the blocks of the pages by name, each with the function that makes it.

    Args:
        folder: that holds a folder of results for each grid; it need not exist.
    """
    read: dict[str, Evidence] = {}

    def made(block: Callable[[Evidence], str]) -> str:
        if not read:
            read["full"] = Evidence.read(folder)
        return block(read["full"])

    blocks: dict[str, Callable[[Evidence], str]] = {
        "in short": in_short,
        "what was run": what_was_run,
        **{name: partial(task_block, name=name) for name in Evidence([]).compared},
        "single looks": single_looks,
        "equivalence": equivalences,
        "coincidence": coincidence,
        "equal rates": equal_rates,
        "equal heads": equal_heads,
        "made twice": repetition,
        "lambda and K": ratio_sweep,
        "rank": rank_sweep,
        "layers": layers,
        "forgetting": forgetting,
        "what the seeds can show": power,
        "the paper's numbers": paper,
    }
    costs: dict[str, Callable[[], str]] = {
        f"evidence: cost, {device}": partial(cost, folder, device) for device in ("cpu", "cuda")
    }
    return {f"evidence: {name}": partial(made, block) for name, block in blocks.items()} | costs


def report(grid: Grid, results: Sequence[Result]) -> str:
    """Return the tables of all comparisons of a grid, for a reader's own run."""
    evidence = Evidence(results, grid)
    parts = [f"## {name}\n\n{result_tables(evidence, each)}" for name, each in evidence.compared.items()]
    if evidence.heads is not None:
        parts.append(f"## Equal heads\n\n{equal_heads(evidence)}")
    return "\n\n".join([*parts, f"## Delta-LoRA and a larger alpha\n\n{equivalences(evidence)}"]) + "\n"


def task_block(evidence: Evidence, name: str) -> str:
    """Return the tables and pictures of one task."""
    tables = result_tables(evidence, evidence.compared[name])
    rates = picture(f"rates-{name}", f"{name}: metric against learning rate, one panel a row")
    losses = picture(f"losses-{name}", f"{name}: training loss, one panel a row")
    return paragraphs(tables, rates, losses)


def in_short(evidence: Evidence) -> str:
    """Return the table of the front page, the fairest comparison of a task first."""
    rows = []
    for title, experiment in sorted(evidence.pictured.items(), key=lambda item: item[1] is not evidence.heads):
        of = evidence.trio(experiment)
        if len(of) < 3:
            continue
        metric = experiment.metric
        apart = interval(difference(of[DELTA], of[LORA], metric))
        rows.append((title, measure(metric).title, *(mean(cell, metric) for cell in of.values()), apart))
    if not rows:
        return NOT_MEASURED
    return table(("task", "", "LoRA", "Delta-LoRA", "LoRA, larger alpha", "Delta-LoRA - LoRA [95 %]"), rows)


def what_was_run(evidence: Evidence) -> str:
    """Return what the grid has, and what is missing of it."""
    if not evidence.results:
        return NOT_MEASURED
    rows, missing = [], []
    for experiment in evidence.grid.experiments:
        found = evidence.standings(experiment)
        complete = sum(each.cell is not None for each in found)
        tuned = sum(len(each.tuning) for each in found)
        kind = _kind(evidence, experiment)
        rows.append((experiment.task, kind, f"{complete} of {len(found)}", str(experiment.seeds), str(tuned)))
        without = [f"{each.row.title} ({each.missing})" for each in found if each.cell is None]
        if len(without) == len(found) > 1:
            missing.append(f"{experiment.task}, {kind}: all {len(found)} rows")
        elif without:
            missing.append(f"{experiment.task}, {kind}: {', '.join(without)}")
    repeated = evidence.again.results if evidence.again is not None else []
    runs = [*evidence.results, *repeated]
    hours, diverged = sum(run.seconds for run in runs) / 3600, sum(run.diverged for run in runs)
    told = (
        f"{len(runs)} runs with {hours:.1f} hours of training, {diverged} of which diverged; {len(repeated)} of them "
        f"are of a second tuning or of a rate set by hand. {origin(runs)}"
    )
    left_out = f"Left out: {'; '.join(missing)}." if missing else "Nothing was left out."
    head = ("task", "rows", "complete", "seeds a cell", "tuning runs")
    return paragraphs(told, table(head, rows), left_out)


def single_looks(evidence: Evidence) -> str:
    """Return the runs of tasks that a small model does not learn."""
    rows = []
    for experiment in evidence.looks:
        for name, cell in evidence.cells(experiment).items():
            values = ", ".join(f"{measure(m).title} {measure(m).number(cell.mean(m))}" for m in cell.metrics)
            rows.append((experiment.task, ROWS[name].title, count(experiment.seeds, "seed"), f"{cell.lr:g}", values))
    return table(("task", "row", "", "lr", "result"), rows) if rows else NOT_MEASURED


def equivalences(evidence: Evidence) -> str:
    """Return the test that Delta-LoRA and LoRA with the larger alpha are the same, on every task."""
    rows = []
    for title, experiment in evidence.pictured.items():
        of = evidence.trio(experiment)
        if not {DELTA, ALPHA} <= of.keys():
            continue
        lrs = " / ".join(f"{of[name].lr:g}" for name in (DELTA, ALPHA))
        for metric in _with_margins(experiment, of):
            rows.append(_equivalence(title, lrs, of[DELTA], of[ALPHA], metric))
    for title, (delta, alpha) in _one_rate(evidence).items():
        metrics = task_named(delta.task).metric, "loss"
        rows += [_equivalence(title, f"{delta.lr:g}", delta, alpha, metric) for metric in metrics]
    if not rows:
        return NOT_MEASURED
    head = ("task", "", "lr", "Delta-LoRA - larger alpha", "90 % interval", "margin", "p", "the same?")
    return table(head, rows)


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


def layers(evidence: Evidence) -> str:
    """Return the pictures of what training changed in the layers."""
    cosines = picture("cosines", "cosine of each layer's W_Q and W_V to the pretrained ones: the paper's Fig. 3")
    ranks = picture("ranks", "effective rank of the change of each row")
    return paragraphs(cosines, ranks) or NOT_MEASURED


def forgetting(evidence: Evidence) -> str:
    """Return how much more each row's loss is on texts that the pretrained model wrote."""
    parts = []
    for task, experiment in evidence.compared.items():
        of = {
            name: cell
            for name, cell in evidence.cells(experiment).items()
            if all(run.forgetting is not None for run in cell.results)
        }
        if not of:
            continue
        tested, _ = metrics_of(experiment, of.values())
        names = ("row", [ROWS[name].title for name in of])
        family = (
            corrected([difference(cell, of[LORA], forgotten, "forgetting") for row, cell in of.items() if row != LORA])
            if LORA in of and experiment.seeds > 1
            else []
        )
        by_row = {each.row: each for each in family}
        columns: list[Column] = [
            (measure(tested[0]).title, [mean(cell, tested[0]) for cell in of.values()]),
            ("forgetting", [figure(cell, forgotten, 4) for cell in of.values()]),
            ("difference to LoRA", [interval(by_row[name]) if name in by_row else "" for name in of]),
            ("p", [p_of(by_row[name]) if name in by_row else "" for name in of]),
        ]
        parts += [
            f"{task}. " + caption(experiment, list(of.values()), len(family)),
            narrow_tables(names, [columns]),
            picture(f"forgetting-{task}", f"{task}: metric against forgetting"),
        ]
    return paragraphs(*parts) or NOT_MEASURED


def cost(folder: Path, device: str) -> str:
    """Return the time and the memory of a step of every row, side by side in one run (`cost.py`)."""
    path = folder / f"cost_{device}.json"
    if not path.exists():
        return NOT_MEASURED
    found = json.loads(path.read_text("utf8"))
    rows, setting, machine = found["rows"], found["setting"], found["machine"]

    def column(text: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return [text(row) for row in rows.values()]

    groups: list[list[Column]] = [
        [
            ("ms a step", column(lambda row: f"{1e3 * statistics.median(row['seconds']):.1f}")),
            ("LoRA = 1 (lowest .. highest)", column(lambda row: _ratio(row["ratio"]))),
        ],
        [("trained", column(lambda row: f"{row['trained']:,}"))],
        [("gradients", column(lambda row: _mebibytes(row["gradient_bytes"])))],
        [("optimizer", column(lambda row: _mebibytes(row["state_bytes"])))],
        [("step", column(lambda row: _mebibytes(row["peak_bytes"])))],
    ]
    told = (
        f"{setting['model']} on {setting['task']}, {setting['batch_size']} texts of at most {setting['max_length']} "
        f"tokens; {machine_of(machine)}; commit {found['commit']}. A ratio is formed within each round; memory in MiB: "
        "of the gradients, what the optimizer keeps, and the most that a step allocates."
    )
    return paragraphs(told, narrow_tables(("row", [ROWS[name].title for name in rows]), groups))


def power(evidence: Evidence) -> str:
    """Return which differences so few seeds find, from the spread that the runs had."""
    rows = []
    for task, experiment in evidence.compared.items():
        of = evidence.cells(experiment)
        tested = _with_margins(experiment, of)
        family = differences(of, tested)
        for name in tested:
            found = sorted((each for each in family if each.what == name), key=lambda each: each.spread)
            if not found:
                continue
            middle, how = found[(len(found) - 1) // 2], measure(name)
            needed = seeds_needed(middle, how.stored_margin)
            rows.append(
                (
                    task,
                    how.title,
                    str(experiment.seeds),
                    how.number(middle.spread),
                    how.number(detectable(middle)),
                    how.number(detectable(middle, len(family))),
                    f"{how.margin:g}",
                    "more than 1000" if needed is None else str(needed),
                )
            )
    if not rows:
        return NOT_MEASURED
    head = ("task", "", "seeds", "spread", "found, alone", "found, in the table", "margin", "seeds for the margin")
    return table(head, rows)


def paper(evidence: Evidence) -> str:
    """Return the paper's gains over LoRA next to ours."""
    low, high = PUBLIC_LORA_BLEU
    rows = []
    for task, gains in PAPER.items():
        of = evidence.cells(evidence.compared[task])
        for name, gain in gains.items():
            known = {LORA, DELTA} <= of.keys() and all(name in of[row].metrics for row in (LORA, DELTA))
            ours = interval(difference(of[DELTA], of[LORA], name)) if known else "not measured"
            rows.append((task, name, gain, ours))
    spread = (
        f"Public runs of plain LoRA with GPT-2 Medium on E2E have {low:g} to {high:g} BLEU. This spread of "
        f"{high - low:.1f} points is larger than the paper's gain of {PAPER['e2e']['BLEU']} there."
    )
    glue = (
        "On GLUE the paper reports 90.19 for Delta-LoRA on MRPC and 95.1 on SST-2, with RoBERTa-base. The models here "
        "are much smaller, so that only the differences to LoRA can be compared."
    )
    head = ("task", "", "the paper's gain over LoRA", "here, Delta-LoRA - LoRA [95 %]")
    return paragraphs(table(head, rows), spread, glue)


def _with_margins(experiment: Experiment, of: Mapping[str, Cell]) -> list[str]:
    """Return the metrics that are tested and have a margin. That of the loss is for cross entropy alone."""
    tested, _ = metrics_of(experiment, of.values())
    return [name for name in tested if name != "loss" or task_named(experiment.task).kind != "regress"]


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


def _equivalence(title: str, lrs: str, delta: Cell, alpha: Cell, metric: str) -> tuple[str, ...]:
    how = measure(metric)
    each = equivalence(delta, alpha, metric, how.stored_margin)
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


def _kind(evidence: Evidence, experiment: Experiment) -> str:
    if (name := next((name for name, each in evidence.compared.items() if each is experiment), None)) is not None:
        return "comparison with LoRA" + name.removeprefix(experiment.task)
    sweeps = {
        "equal heads": evidence.heads,
        "lambda and K": evidence.of_rows(RATIO_SWEEP),
        "rank": evidence.of_rows(RANK_SWEEP),
    }
    return next((kind for kind, each in sweeps.items() if experiment is each), "a single look")


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f} .. {ratio['highest']:.2f})"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f}"
