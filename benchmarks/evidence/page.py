"""The tables of docs/evidence.md, and what is said with them, from result files alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.evidence.comparison import Cell, detectable, difference, seeds_needed
from benchmarks.evidence.control import coincidence, equivalences
from benchmarks.evidence.figures import forgotten
from benchmarks.evidence.grid import Experiment, Grid
from benchmarks.evidence.measures import PUBLIC_LORA_BLEU, measure
from benchmarks.evidence.repetition import repetition
from benchmarks.evidence.result import Result
from benchmarks.evidence.rows import RANK_SWEEP, RATIO_SWEEP, ROWS
from benchmarks.evidence.standing import DELTA, E2E_SMOLLM2, LORA, Evidence
from benchmarks.evidence.sweeps import equal_heads, equal_rates, rank_sweep, ratio_sweep, swept_ranks, swept_ratios
from benchmarks.evidence.task_tables import (
    NOT_MEASURED,
    corrected_differences,
    forgetting_differences,
    has_margin,
    measured_forgetting,
    result_tables,
)
from benchmarks.evidence.wording import (
    caption,
    count,
    figure,
    interval,
    machine_of,
    marked,
    mean,
    once,
    origin,
    p_of,
    picture,
)
from benchmarks.markdown import Column, narrow_tables, paragraphs, table

PAPER = {
    E2E_SMOLLM2: {"BLEU": "1.24", "NIST": "0.13", "METEOR": "0.86", "ROUGE-L": "1.13", "CIDEr": "0.08"},
    "webnlg": {"BLEU": "0.79, 1.08 and 0.91 on three parts", "METEOR": "0.01 of 1 (1 here)", "TER": "0.02 less"},
}
"""The paper's gains of Delta-LoRA over LoRA, by the comparison of this page that they stand next to."""


def evidence_tables(folder: Path, read: Callable[[], Evidence]) -> dict[str, Callable[[], str]]:
    """Return the blocks of the pages by name, each with the function that makes it.

    Args:
        folder: with the files of the costs; it need not exist.
        read: returns the results, and is called when a block is made.
    """

    def made(block: Callable[[Evidence], str]) -> str:
        return block(read())

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
        metric, ours = experiment.metric, of[DELTA].row
        family = corrected_differences(evidence, experiment)
        apart = next(each for each in family if (each.row, each.what) == (ours, metric))
        means = (mean(cell, metric) for cell in of.values())
        rows.append((title, measure(metric).title, *means, marked(apart)))
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


def layers(evidence: Evidence) -> str:
    """Return the pictures of what training changed in the layers."""
    cosines = picture("cosines", "cosine of each layer's W_Q and W_V to the pretrained ones: the paper's Fig. 3")
    ranks = picture("ranks", "effective rank of the change of each row")
    return paragraphs(cosines, ranks) or NOT_MEASURED


def forgetting(evidence: Evidence) -> str:
    """Return how much more each row's loss is on texts that the pretrained model wrote."""
    parts = []
    for task, experiment in evidence.compared.items():
        of = measured_forgetting(evidence.cells(experiment))
        if not of:
            continue
        metric, names = experiment.metric, ("row", [ROWS[name].title for name in of])
        family = forgetting_differences(evidence, experiment)
        by_row = {each.row: each for each in family}
        columns: list[Column] = [
            (measure(metric).title, [mean(cell, metric) for cell in of.values()]),
            ("forgetting", [figure(cell, forgotten, 4) for cell in of.values()]),
            ("difference to LoRA", [interval(by_row[name]) if name in by_row else "" for name in of]),
            ("p", [p_of(by_row[name]) if name in by_row else "" for name in of]),
        ]
        parts += [
            f"{task}. " + caption(evidence, experiment, list(of.values()), len(family)),
            f"The pretrained model's loss on its own texts is {_own_loss(of.values()):.4f}.",
            narrow_tables(names, [columns]),
            picture(f"forgetting-{task}", f"{task}: metric against forgetting"),
        ]
    return paragraphs(*parts) or NOT_MEASURED


def _own_loss(of: Iterable[Cell]) -> float:
    """Return the loss of the pretrained model on the texts by which forgetting is measured."""
    return statistics.fmean(run.forgetting[0] for cell in of for run in cell.results if run.forgetting is not None)


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
        "of the gradients, what the optimizer keeps, and the most that a step allocates, the gradients among it. No "
        "change of lambda and no restart falls into these steps."
    )
    return paragraphs(told, narrow_tables(("row", [ROWS[name].title for name in rows]), groups))


def power(evidence: Evidence) -> str:
    """Return which differences so few seeds find, from the spread that the runs had."""
    families = {title: (each, corrected_differences(evidence, each)) for title, each in evidence.pictured.items()}
    found_of = {"lambda and K": swept_ratios(evidence)[1], "rank": list(swept_ranks(evidence)[1].values())}
    families |= {title: (each, found_of[title]) for title, each in _sweeps(evidence).items()}
    rows = []
    for title, (experiment, family) in families.items():
        for name in once(each.what for each in family):
            if not has_margin(experiment, name):
                continue
            found = sorted((each for each in family if each.what == name), key=lambda each: each.spread)
            middle, how = found[(len(found) - 1) // 2], measure(name)
            needed = seeds_needed(middle, how.stored_margin)
            rows.append(
                (
                    title,
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
        of = evidence.cells(evidence.compared[task]) if task in evidence.compared else {}
        for name, gain in gains.items():
            known = {LORA, DELTA} <= of.keys() and all(name in of[row].metrics for row in (LORA, DELTA))
            ours = interval(difference(of[DELTA], of[LORA], name)) if known else "not measured"
            rows.append((task, name, gain, ours))
    spread = (
        f"Public runs of plain LoRA with GPT-2 Medium on E2E have {low:g} to {high:g} BLEU. This spread of "
        f"{high - low:.1f} points is larger than the paper's gain of {PAPER[E2E_SMOLLM2]['BLEU']} there."
    )
    glue = (
        "On GLUE the paper reports 90.19 for Delta-LoRA on MRPC and 95.1 on SST-2, with RoBERTa-base. What it has for "
        "LoRA there is not at hand, so that there is no gain to compare."
    )
    head = ("task", "", "the paper's gain over LoRA", "here, Delta-LoRA - LoRA [95 %]")
    return paragraphs(table(head, rows), spread, glue)


def _kind(evidence: Evidence, experiment: Experiment) -> str:
    if (name := next((name for name, each in evidence.compared.items() if each is experiment), None)) is not None:
        return "comparison with LoRA" + name.removeprefix(experiment.task)
    sweeps = {"equal heads": evidence.heads, **_sweeps(evidence)}
    return next((kind for kind, each in sweeps.items() if experiment is each), "a single look")


def _sweeps(evidence: Evidence) -> dict[str, Experiment]:
    """Return the sweeps of the grid by name."""
    found = {"lambda and K": evidence.of_rows(RATIO_SWEEP), "rank": evidence.of_rows(RANK_SWEEP)}
    return {name: experiment for name, experiment in found.items() if experiment is not None}


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f} .. {ratio['highest']:.2f})"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f}"
