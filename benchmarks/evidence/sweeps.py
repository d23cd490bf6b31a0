"""The tables of the sweeps: the learning rate, lambda and K, and the rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.evidence.comparison import Cell, Difference, corrected, difference
from benchmarks.evidence.figures import best_by_loss, mean_cosine, mean_rank, over_rates
from benchmarks.evidence.grid import Experiment
from benchmarks.evidence.measures import measure
from benchmarks.evidence.rows import HEAD_SWEEP, RANK_SWEEP, RANKS, RATIO_SWEEP, RATIOS, ROWS, Row
from benchmarks.evidence.standing import ALPHA, DELTA, LORA, Evidence
from benchmarks.evidence.task_tables import NOT_MEASURED, corrected_differences, differences, metrics_of
from benchmarks.evidence.wording import caption, count, figure, interval, marked, mean, once, p_of, picture, said, tried
from benchmarks.markdown import Column, narrow_tables, paragraphs, table

LORA_HEAD = HEAD_SWEEP[0]
SAME_RATES = ("full", LORA, DELTA, ALPHA, *(row.name for row in HEAD_SWEEP[:3]))


def equal_rates(evidence: Evidence) -> str:
    """Return fine-tuning, LoRA, Delta-LoRA and the control at each learning rate, from their tuning."""
    parts = []
    for title, experiment in evidence.pictured.items():
        found = [each for each in evidence.standings(experiment) if each.row.name in SAME_RATES and each.tuning]
        lines = {each.row.title: over_rates(each.tuning, experiment.metric, experiment.tuning_seeds) for each in found}
        if not any(lines.values()):
            continue
        seeds = count(experiment.tuning_seeds, "seed")
        parts += [
            f"{title}: {measure(experiment.metric).title}, held out of the training data, {seeds}.",
            _over_the_rates(lines, experiment.metric),
        ]
    return paragraphs(*parts, _by_the_loss(evidence)) or NOT_MEASURED


def _by_the_loss(evidence: Evidence) -> str:
    """Return for which rows the loss would choose another learning rate; empty without tuned rows."""
    tuned, changed = 0, []
    sweeps = {"lambda and K": evidence.of_rows(RATIO_SWEEP), "ranks": evidence.of_rows(RANK_SWEEP)}
    for title, experiment in (*evidence.pictured.items(), *sweeps.items()):
        if experiment is None:
            continue
        for each in evidence.standings(experiment):
            if each.lr is None or not each.tuning or experiment.metric == "loss":
                continue
            tuned, best = tuned + 1, best_by_loss(each.tuning, experiment.tuning_seeds)
            if best != each.lr:
                edge = ", at the edge," if best in (each.tried[0], each.tried[-1]) else ""
                changed.append(f"{title}: {each.row.title} ({best:g}{edge} instead of {each.lr:g})")
    if not tuned:
        return ""
    told = f"Of the rates that were tried, the held-out loss is lowest at another one in {len(changed)} of {tuned} rows"
    return f"{told}: {'; '.join(changed)}." if changed else f"{told}."


def swept_ratios(evidence: Evidence) -> tuple[dict[str, Cell], list[Difference]]:
    """Return the cells over lambda and K by the names of their rows, and their corrected differences to LoRA."""
    experiment, beginnings = evidence.of_rows(RATIO_SWEEP), _equal_heads(evidence)
    if experiment is None:
        return {}, []
    held = beginnings | evidence.cells(experiment)
    of = {row.name: held[row.name] for row in RATIOS.values() if row.name in held}
    lora = {name: cell for name, cell in beginnings.items() if name == LORA_HEAD.name}
    return of, differences(of | lora, [experiment.metric], LORA_HEAD.name)


def ratio_sweep(evidence: Evidence) -> str:
    """Return the metric over lambda and K, and the differences to LoRA."""
    experiment = evidence.of_rows(RATIO_SWEEP)
    if experiment is None or not evidence.cells(experiment):
        return NOT_MEASURED
    of, family = swept_ratios(evidence)
    lora = _equal_heads(evidence).get(LORA_HEAD.name)
    ratios, starts = once(ratio for ratio, _ in RATIOS), once(start for _, start in RATIOS)
    head = ["lambda", *(f"K = {100 * start:g} %" for start in starts)]

    def grid(text: Callable[[Cell], str]) -> str:
        cells_of = [[of.get(RATIOS[ratio, start].name) for start in starts] for ratio in ratios]
        return table(
            head,
            [
                [f"{ratio:g}", *(text(cell) if cell else "" for cell in line)]
                for ratio, line in zip(ratios, cells_of, strict=True)
            ],
        )

    by_row = {each.row: each for each in family}
    title = measure(experiment.metric).title
    parts = [
        caption(evidence, experiment, list(of.values()), len(family)),
        f"{title[:1].upper()}{title[1:]} (lr)" + (f"; LoRA has {mean(lora, experiment.metric)}:" if lora else ":"),
        grid(lambda cell: f"{mean(cell, experiment.metric)} ({cell.lr:g})"),
    ]
    if family:
        parts += ["Difference to LoRA, bold if p < 0.05:", grid(lambda cell: marked(by_row[cell.row]))]
    held_out = _held_out(evidence, experiment, RATIO_SWEEP)
    return paragraphs(*parts, held_out, said(evidence.standings(experiment)))


def _equal_heads(evidence: Evidence) -> dict[str, Cell]:
    """Return the cells that the sweeps begin from."""
    return evidence.cells(evidence.heads) if evidence.heads else {}


def equal_heads(evidence: Evidence) -> str:
    """Return the rows whose head has the same learning rate in all of them."""
    experiment = evidence.heads
    of = _equal_heads(evidence)
    if experiment is None or LORA_HEAD.name not in of:
        return NOT_MEASURED
    metrics, _ = metrics_of(experiment, of.values())
    found = corrected_differences(evidence, experiment)
    apart = {(each.row, each.what): f"{interval(each)}, {p_of(each)}" for each in found}
    standings = {each.row.name: each for each in evidence.standings(experiment)}
    groups: list[list[Column]] = [[("lr", [f"{cell.lr:g}" for cell in of.values()])]]
    groups[0].append(("lr tried", [tried(standings[name]) for name in of]))
    for metric in metrics:
        columns = [mean(cell, metric) for cell in of.values()], [apart.get((name, metric), "") for name in of]
        groups.append([(measure(metric).title, columns[0]), ("difference to LoRA, p", columns[1])])
    layers = ("rank", mean_rank, 1), ("cosine", mean_cosine, 5)
    groups.append([(name, [figure(cell, figured, digits) for cell in of.values()]) for name, figured, digits in layers])
    return paragraphs(
        caption(evidence, experiment, list(of.values()), len(found)),
        narrow_tables(("row", [ROWS[name].title for name in of]), groups),
        said(evidence.standings(experiment)),
        picture("rates-equal heads", "equal heads: accuracy against learning rate, one panel a row"),
        picture("losses-equal heads", "equal heads: training loss, one panel a row"),
    )


def swept_ranks(evidence: Evidence) -> tuple[dict[int, dict[str, Cell]], dict[tuple[int, str], Difference]]:
    """Return the cells by rank and method, and the corrected differences to LoRA of the same rank."""
    experiment = evidence.of_rows(RANK_SWEEP)
    if experiment is None:
        return {}, {}
    of = _equal_heads(evidence) | evidence.cells(experiment)
    by_rank = {
        rank: {row.method: of[row.name] for row in rows if row.name in of}
        for rank, rows in RANKS.items()
        if any(row.name in of for row in rows)
    }
    found = {
        (rank, name): difference(cells[name], cells[LORA], experiment.metric)
        for rank, cells in by_rank.items()
        for name in (DELTA, ALPHA)
        if {LORA, name} <= cells.keys()
    }
    return by_rank, dict(zip(found, corrected(list(found.values())), strict=True))


def beyond_the_control(evidence: Evidence) -> dict[int, Difference]:
    """Return the differences of Delta-LoRA to LoRA with the larger alpha by rank, corrected for their number."""
    experiment = evidence.of_rows(RANK_SWEEP)
    if experiment is None:
        return {}
    both = {rank: of for rank, of in swept_ranks(evidence)[0].items() if {DELTA, ALPHA} <= of.keys()}
    found = [difference(of[DELTA], of[ALPHA], experiment.metric) for of in both.values()]
    return dict(zip(both, corrected(found), strict=True))


def rank_sweep(evidence: Evidence) -> str:
    """Return LoRA, Delta-LoRA and the control at each rank, compared at the same rank."""
    experiment = evidence.of_rows(RANK_SWEEP)
    if experiment is None or not evidence.cells(experiment):
        return NOT_MEASURED
    by_rank, found = swept_ranks(evidence)
    ranks, how = list(by_rank), measure(experiment.metric)

    def column(name: str) -> list[str]:
        return [
            f"{mean(each[name], experiment.metric)} ({each[name].lr:g})" if name in each else ""
            for each in (by_rank[rank] for rank in ranks)
        ]

    def apart(name: str) -> list[str]:
        return [
            f"{interval(found[rank, name])}, {p_of(found[rank, name])}" if (rank, name) in found else ""
            for rank in ranks
        ]

    of_control = beyond_the_control(evidence)
    beyond = [f"{interval(of_control[r])}, {p_of(of_control[r])}" if r in of_control else "" for r in ranks]
    trained = [f"{next(iter(by_rank[rank].values())).results[0].trained:,}" for rank in ranks]
    groups: list[list[Column]] = [
        [("trained", trained)],
    ]
    groups += [[(f"{ROWS[name].title} (lr)", column(name))] for name in (LORA, DELTA, ALPHA)]
    groups += [[(f"{ROWS[name].title} - LoRA, p", apart(name))] for name in (DELTA, ALPHA)]
    groups += [[(f"Delta-LoRA - {ROWS[ALPHA].title}, p", beyond)]]
    return paragraphs(
        f"Cells: {how.title}, on {experiment.task}, alpha = 2 r. "
        + caption(evidence, experiment, [cell for each in by_rank.values() for cell in each.values()], len(found)),
        narrow_tables(("r", [str(rank) for rank in ranks]), groups),
        _held_out(evidence, experiment, [row for of_rank in RANKS.values() for row in of_rank]),
        said(evidence.standings(experiment)),
    )


def _held_out(evidence: Evidence, sweep: Experiment, rows: Sequence[Row]) -> str:
    """Return the metric of the tuning at each learning rate, of rows of a sweep or of equal heads."""
    tuned = [each for experiment in (evidence.heads, sweep) if experiment for each in evidence.standings(experiment)]
    lines = {each.row.name: over_rates(each.tuning, sweep.metric, sweep.tuning_seeds) for each in tuned}
    title, seeds = measure(sweep.metric).title, count(sweep.tuning_seeds, "seed")
    return paragraphs(
        f"{title[:1].upper()}{title[1:]}, held out of the training data, {seeds}, at each learning rate:",
        _over_the_rates({row.title: lines[row.name] for row in rows if lines.get(row.name)}, sweep.metric),
    )


def _over_the_rates(lines: Mapping[str, Mapping[float, float]], metric: str) -> str:
    """Return a table with a metric of each row at each learning rate."""
    how, rates = measure(metric), sorted({lr for line in lines.values() for lr in line})
    columns: list[Column] = [
        (f"{lr:g}", [how.number(line[lr]) if lr in line else "" for line in lines.values()]) for lr in rates
    ]
    return narrow_tables(("row", list(lines)), [[column] for column in columns])
