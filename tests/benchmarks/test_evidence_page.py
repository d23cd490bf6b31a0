"""The tables of the evidence say what the results say, and say what is missing."""

import copy
import json
import math
import statistics
from dataclasses import replace
from functools import partial

import pytest

from benchmarks.evidence import page, wording
from benchmarks.evidence.comparison import corrected, detectable_effect, difference
from benchmarks.evidence.control import coincidence, equivalences, tuned_equivalences
from benchmarks.evidence.grid import Experiment, Grid
from benchmarks.evidence.grids import FULL
from benchmarks.evidence.measures import measure
from benchmarks.evidence.page import evidence_tables, report
from benchmarks.evidence.repetition import made_twice, repetition
from benchmarks.evidence.result import Result, write_result
from benchmarks.evidence.rows import HEAD_SWEEP, PLAIN_PAIRS, RANK_SWEEP, RATIO_SWEEP, RATIOS, ROWS
from benchmarks.evidence.standing import Evidence, standings
from benchmarks.evidence.sweeps import (
    beyond_the_control,
    equal_heads,
    equal_rates,
    rank_sweep,
    ratio_sweep,
    swept_ranks,
    swept_ratios,
)
from benchmarks.evidence.task_tables import corrected_differences, result_tables
from benchmarks.markdown import WIDTH
from tests.benchmarks.made_results import complete, made
from tests.docs.test_markdown_tables import faults, fits_a_screen, tables_of

NOT_MEASURED = "Not measured yet."
SETTING = {"steps": 40, "batch_size": 2, "max_length": 8}
LRS = dict.fromkeys(("adapter", "dense", "sgd"), (1e-3, 4e-3, 1.6e-2))
PLAIN = tuple(row.name for row in PLAIN_PAIRS[-1])
BLOCKS = [page.in_short, page.what_was_run, page.single_looks, equivalences, coincidence, page.forgetting]
BLOCKS += [equal_rates, equal_heads, ratio_sweep, rank_sweep, page.power, page.paper]


def experiment(task="docstrings", rows=("lora", "delta", "alpha"), seeds=3, **more):
    return Experiment(task, "tiny", rows, SETTING, LRS, seeds=seeds, **more)


@pytest.fixture(scope="module")
def grid():
    compared = ("full", "lora", "delta", "lora-lr3", "alpha", *PLAIN)
    texts = [experiment(task, ("lora", "delta", "alpha")) for task in ("e2e", "webnlg")]
    sweeps = [experiment(rows=[row.name for row in rows], seeds=2) for rows in (HEAD_SWEEP, RATIO_SWEEP, RANK_SWEEP)]
    looks = experiment("cola", ("lora",), seeds=1)
    return Grid("test", (experiment(rows=compared, seeds=2), *texts, *sweeps, looks))


@pytest.fixture(scope="module")
def evidence(grid):
    return Evidence(complete(grid), grid)


def runs(row, values, lr=4e-3, metric="accuracy", **changes):
    """Return the tuning runs that choose `lr`, and test runs with these values."""
    asked = experiment()
    tuning = [made(setting) for rate in LRS["adapter"] for setting in asked._tuning(ROWS[row], rate)]
    for run in tuning:
        run.metrics["accuracy"] = 0.9 if run.setting.lr == lr else 0.5
    settings = [asked._setting(ROWS[row], lr, seed, "test") for seed in range(3)]
    results = [made(setting) for setting in settings[: len(values)]]
    for run, value in zip(results, values, strict=True):
        run.metrics = {metric: value}
        for name, changed in changes.items():
            setattr(run, name, changed)
    return [*tuning, *results]


def lines(text, start):
    """Return the cells of the lines of all tables that begin with a cell."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {start} |")
    ]


def of_one(results):
    asked = experiment()
    return result_tables(Evidence(results, Grid("test", (asked,))), asked)


def test_means_errors_and_differences_are_those_of_the_values():
    ours, theirs = (0.71, 0.78, 0.76), (0.70, 0.74, 0.75)
    text = of_one([*runs("lora", theirs), *runs("delta", ours)])
    line = lines(text, "Delta-LoRA")[0]
    error = statistics.stdev(ours) / math.sqrt(3)
    assert line[1:3] == ["0.004", f"{100 * statistics.fmean(ours):.2f} ± {100 * error:.2f}"]
    apart = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]  # 1, 4, 1
    half = 4.302653 * statistics.stdev(apart) / math.sqrt(3)
    assert line[3] == f"+2.00 [{2 - half:+.2f}, {2 + half:+.2f}]"
    t = 2 / (statistics.stdev(apart) / math.sqrt(3))  # with 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2)
    assert line[4] == f"{1 - t / math.sqrt(2 + t**2):.2f}"
    assert lines(text, "LoRA")[0][3:] == ["", ""]
    assert "p by Holm over 1 comparison." in text


def test_a_table_says_when_a_part_of_the_test_inputs_was_measured():
    asked = replace(experiment(), setting={**SETTING, "test_examples": 400})
    grid = Grid("test", (asked,))
    text = result_tables(Evidence(complete(grid), grid), asked)
    assert "K 0, measured on 400 test inputs. 3 seeds a cell" in text
    assert "test inputs" not in of_one(complete(Grid("test", (experiment(),))))


def test_p_values_are_corrected_for_all_comparisons_of_the_table():
    shared = [*runs("lora", (0.70, 0.74, 0.75)), *runs("delta", (0.71, 0.78, 0.76))]
    alone = lines(of_one(shared), "Delta-LoRA")[0][4]
    text = of_one([*shared, *runs("alpha", (0.71, 0.78, 0.76))])
    assert "Holm over 2 comparisons" in text
    assert float(lines(text, "Delta-LoRA")[0][4]) == pytest.approx(2 * float(alone), abs=0.011)


def test_a_cell_of_too_few_runs_is_left_out_and_said():
    text = of_one([*runs("lora", (0.7, 0.7, 0.8)), *runs("delta", (0.7, 0.8))])
    assert not lines(text, "Delta-LoRA")
    assert text.endswith(
        "Left out: Delta-LoRA (2 of 3 runs made), LoRA, alpha x (1 + lambda) (not tuned yet)."
    )  # fmt: skip
    text = of_one([*runs("lora", (0.7, 0.7, 0.8)), *runs("delta", ())])
    assert "Delta-LoRA (not run yet)" in text


def test_a_cell_with_a_diverged_run_has_no_mean_and_no_difference():
    diverged = runs("delta", (0.7, 0.8, 0.9))
    diverged[-1] = replace(diverged[-1], diverged=True, metrics={})
    text = of_one([*runs("lora", (0.7, 0.7, 0.8)), *diverged, *runs("alpha", (0.8, 0.7, 0.9))])
    assert lines(text, "Delta-LoRA")[0][2:] == ["1 of 3 diverged", "", ""]
    assert "Holm over 1 comparison" in text


def test_without_lora_there_are_no_differences():
    text = of_one(runs("delta", (0.7, 0.8, 0.9)))
    assert "difference" not in text
    assert lines(text, "Delta-LoRA")


def test_the_edge_of_the_tuning_is_said():
    asked = experiment(extensions=0)
    text = result_tables(Evidence(runs("lora", (0.7, 0.8, 0.8), lr=1.6e-2), Grid("test", (asked,))), asked)
    assert "The best learning rate is at the edge of those tried: LoRA (0.016)." in text
    assert "at the edge" not in of_one(runs("lora", (0.7, 0.8, 0.8)))


def test_other_results_do_not_get_into_a_cell():
    """Of other settings, tasks and models, as an interrupted change of the grid leaves them."""
    cell = runs("lora", (0.7, 0.7, 0.8))
    strangers = [replace(run, setting=replace(run.setting, steps=30)) for run in cell]
    strangers += [replace(run, setting=replace(run.setting, model="other")) for run in cell]
    assert of_one([*cell, *strangers]) == of_one(cell)


def test_what_cannot_be_counted_is_refused():
    cell = runs("lora", (0.7, 0.7, 0.8))
    with pytest.raises(ValueError, match="two results are of one setting, docstrings/lora/test-"):
        standings(experiment(), [*cell, cell[-1]])
    cell[-1] = replace(cell[-1], data="other")
    with pytest.raises(ValueError, match="were run on different data"):
        standings(experiment(), cell)


def test_machines_versions_and_commits_are_said_once_each():
    cell = runs("lora", (0.7, 0.7, 0.8))
    cell[-1] = replace(cell[-1], machine={"device": "A GPU"}, commit="def")
    assert "A Processor, 1 thread; A GPU; torch 2, python 3; commits abc, def." in of_one(cell)


def test_figures_of_the_layers_and_of_the_loss():
    layer = {"effective_rank": 3.0, "cosine": 0.5}
    cell = runs("lora", (0.7, 0.7, 0.8), layers=[layer, {"effective_rank": None, "cosine": 0.7}])
    for run in cell:
        run.losses = [9.0] * 18 + [1.0, 2.0]
        run.trained = 12345
    assert lines(of_one(cell), "LoRA")[1][1:] == ["0.001 .. 0.016 (3)", "12,345", "1.5000", "3.0", "0.60000"]


def test_scored_texts_stand_for_a_task(evidence):
    text = result_tables(evidence, evidence.compared["e2e"])
    assert lines(text, "row")[0][2] == "BLEU"
    assert all(name in text for name in ("NIST", "METEOR", "ROUGE-L", "CIDEr"))


def test_the_runs_that_should_coincide_are_no_rows_but_have_a_table(evidence):
    assert not lines(result_tables(evidence, evidence.compared["docstrings"]), "its alpha control")
    cells = evidence.coinciding(evidence.compared["docstrings"])
    delta, alpha = (cells[name].results[1] for name in PLAIN)
    apart = [abs(a - b) for a, b in zip(delta.losses, alpha.losses, strict=True)]
    line = next(line for line in lines(coincidence(evidence), f"{delta.setting.lr:g}") if line[2] == "1")
    assert line[1] == ("yes" if delta.setting.model_dropout else "no")
    assert float(line[4].partition(",")[0]) == pytest.approx(max(apart), rel=0.06)
    assert line[4].endswith(f", by step {10 * (apart.index(max(apart)) + 1)}")


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "yes"), (0.011, "not shown"), (0.02, "no")])
def test_equivalence_is_of_delta_lora_and_the_larger_alpha(shift, verdict):
    values = (0.701, 0.742, 0.753)
    other = tuple(value + shift + noise for value, noise in zip(values, (0.001, -0.001, 0.002), strict=True))
    results = [*runs("delta", values), *runs("alpha", other, lr=1e-3)]
    for run in results:  # so that 0.001 is not at the edge
        if run.setting.row == "alpha" and run.setting.split == "tuning":
            run.metrics["accuracy"] = 0.9 if run.setting.lr == 1e-3 else 0.5
    asked = experiment(extensions=0)
    line = lines(equivalences(Evidence(results, Grid("test", (asked,)))), "docstrings")[0]
    assert line[1:3] == ["accuracy, %", "0.004 / 0.001"]
    assert float(line[3]) == pytest.approx(-100 * shift - 0.07, abs=0.01)
    assert line[5] == "1"
    assert line[-1] == verdict


def test_the_control_is_compared_at_one_rate_with_and_without_clipping(evidence, grid):
    """At the rate of the pair without clipping, whatever was tuned; of the runs beside it, where there are any."""
    lr = PLAIN_PAIRS[-1][0].lr
    heads = evidence.heads
    clipped = [made(heads._setting(row, lr, seed, "test")) for row in HEAD_SWEEP[1:3] for seed in range(heads.seeds)]
    assert not lines(equivalences(evidence), "equal heads, one rate, clipped")
    text = equivalences(Evidence([*evidence.results, *clipped], grid))
    assert equivalences(Evidence(evidence.results, grid, clipped)) == text
    of = {(run.setting.row, run.setting.seed): run.metrics["accuracy"] for run in [*evidence.results, *clipped]
          if run.setting.lr == lr and run.setting.split == "test"}  # fmt: skip
    pairs = {"clipped": HEAD_SWEEP[1:3], "not clipped": PLAIN_PAIRS[-1]}
    for title, (delta, alpha) in pairs.items():
        line = lines(text, f"equal heads, one rate, {title}")[0]
        apart = statistics.fmean(of[delta.name, seed] - of[alpha.name, seed] for seed in range(heads.seeds))
        assert line[2] == f"{lr:g}"
        assert float(line[3]) == pytest.approx(100 * apart, abs=0.0051)


def test_runs_of_another_grid_in_the_folder_change_no_table(evidence, grid):
    """Of the same tasks, rows, rates and seeds, as `--precision bfloat16` leaves them."""
    heads, lr = evidence.heads, PLAIN_PAIRS[-1][0].lr
    own = [*evidence.results, *(made(each) for row in HEAD_SWEEP[1:3] for each in heads.at_rate(row, lr))]
    others = [replace(run, setting=replace(run.setting, precision="bfloat16"), losses=[9.0]) for run in own]
    for run in others:
        run.metrics = {name: value / 2 for name, value in run.metrics.items()}
    alone, mixed = (Evidence(found, grid, found) for found in (own, [*others, *own]))
    shown = [block for block in BLOCKS if block is not page.what_was_run]
    assert [block(mixed) for block in shown] == [block(alone) for block in shown]
    assert report(grid, mixed.results) == report(grid, alone.results)


def test_the_tuned_pairs_are_the_lines_of_the_table(evidence):
    found = tuned_equivalences(evidence)
    table = [line for title in evidence.pictured for line in lines(equivalences(evidence), title)]
    assert [("yes" if each.shown else "no" if each.refuted else "not shown") for each in found] == [
        line[-1] for line in table
    ]


@pytest.mark.parametrize(("title", "row"), [("docstrings", "delta"), ("equal heads", "delta-head"), ("e2e", "delta")])
def test_bold_in_the_short_table_is_what_has_a_low_p_in_the_table_of_the_task(evidence, title, row):
    experiment = evidence.pictured[title]
    family = corrected_differences(evidence, experiment)
    each = next(each for each in family if (each.row, each.what) == (row, experiment.metric))
    reference = "lora-head" if title == "equal heads" else "lora"
    cells = evidence.cells(experiment)
    assert each.mean == pytest.approx(difference(cells[row], cells[reference], experiment.metric).mean)
    assert lines(page.in_short(evidence), title)[0][-1].startswith("**") == (each.corrected < 0.05)


def test_a_squared_error_has_no_margin():
    grid = Grid("test", (experiment("stsb"), experiment("mrpc")))
    evidence = Evidence(complete(grid), grid)
    for text in (equivalences(evidence), page.power(evidence)):
        assert [line[1] for line in lines(text, "stsb")] == ["Pearson, %"]
        assert [line[1] for line in lines(text, "mrpc")] == ["accuracy, %", "loss"]


def test_rows_with_equal_heads_are_compared_among_themselves(evidence):
    text = equal_heads(evidence)
    cells = evidence.cells(evidence.heads)
    for name in ("lora-head", "delta-head", "alpha-head"):
        line = lines(text, ROWS[name].title)[0]
        assert line[1] == f"{cells[name].lr:g}"
        assert line[3].startswith(f"{100 * cells[name].mean('accuracy'):.2f}")
        assert bool(line[4]) == (name != "lora-head")
        ranks = [layer["effective_rank"] for run in cells[name].results for layer in run.layers]
        assert lines(text, ROWS[name].title)[1][3] == f"{statistics.fmean(ranks):.1f}"
    apart = difference(cells["delta-head"], cells["lora-head"], "accuracy")
    assert lines(text, "Delta-LoRA")[0][4].startswith(f"{100 * apart.mean:+.2f}")
    assert f"p by Holm over {2 * (len(HEAD_SWEEP) - 1)} comparisons" in text
    assert "K 0, the head's learning rate 0.005." in text


@pytest.mark.parametrize("sweep", [ratio_sweep, rank_sweep])
def test_the_sweeps_show_each_rate_that_was_tried(evidence, sweep):
    text = sweep(evidence)
    part = text[text.index("Accuracy, %, held out of the training data") :]
    for row in RATIO_SWEEP if sweep is ratio_sweep else (*HEAD_SWEEP[:3], *RANK_SWEEP):
        tuning = [run for run in evidence.results if (run.setting.row, run.setting.split) == (row.name, "tuning")]
        expected = {f"{r.setting.lr:g}": f"{100 * r.metrics['accuracy']:.2f}" for r in tuning if not r.diverged}
        tables = zip(lines(part, "row"), lines(part, row.title), strict=True)
        found = {rate: value for head, line in tables for rate, value in zip(head, line, strict=True) if value}
        assert {rate: value for rate, value in found.items() if rate != "row"} == expected


def test_equal_rates_are_means_of_the_tuning(evidence):
    text = equal_rates(evidence)
    for task, row in (("docstrings", "delta"), ("e2e", "alpha")):
        asked = evidence.compared[task]
        standing = next(each for each in evidence.standings(asked) if each.row.name == row)
        part = text[text.index(f"{task}: {measure(asked.metric).title}, held out") :]
        rates, line = lines(part, "row")[0][1:], lines(part, ROWS[row].title)[0][1:]
        for lr, value in zip(rates, line, strict=True):
            held = [run for run in standing.tuning if f"{run.setting.lr:g}" == lr]
            lost = not held or any(run.diverged for run in held)
            mean = None if lost else statistics.fmean(run.metrics[asked.metric] for run in held)
            assert value == ("" if mean is None else measure(asked.metric).number(mean))


def test_what_the_loss_would_choose_is_said():
    asked, results = experiment(), [*runs("lora", (0.7, 0.7, 0.7)), *runs("delta", (0.7, 0.7, 0.7))]
    for run in results:
        better = 1e-3 if run.setting.row == "delta" else 4e-3
        run.metrics["loss"] = 0.5 if run.setting.lr == better else 0.6
    text = equal_rates(Evidence(results, Grid("test", (asked,))))
    told = "Of the rates that were tried, the held-out loss is lowest at another one in 1 of 2 rows: "
    assert text.endswith(f"{told}docstrings: Delta-LoRA (0.001, at the edge, instead of 0.004).")


@pytest.mark.parametrize("block", [equal_heads, ratio_sweep, rank_sweep])
def test_a_row_that_diverged_is_named(evidence, block):
    rows = {equal_heads: "adalora-head", ratio_sweep: "delta-ratio8-k50", rank_sweep: "alpha-r32"}
    results = [
        replace(run, diverged=True, metrics={})
        if (run.setting.row, run.setting.split, run.setting.seed) == (rows[block], "test", 1)
        else run
        for run in evidence.results
    ]
    assert f"Without a mean: {ROWS[rows[block]].title} (1 of 2 diverged)." in block(Evidence(results, evidence.grid))


def test_the_sweep_over_lambda_and_k_has_a_cell_for_each(evidence):
    text = ratio_sweep(evidence)
    cells = evidence.cells(evidence.heads) | evidence.cells(evidence.of_rows(RATIO_SWEEP))
    lora, by_row = cells["lora-head"].mean("accuracy"), {each.row: each for each in swept_ratios(evidence)[1]}
    for ratio in (0.5, 2.0, 8.0):
        values, differences = lines(text, f"{ratio:g}")
        assert len(values) == len(differences) == 5
        for start, value, apart in zip((0.0, 0.05, 0.2, 0.5), values[1:], differences[1:], strict=True):
            row = RATIOS[ratio, start].name
            mean = cells[row].mean("accuracy")
            assert value.startswith(f"{100 * mean:.2f} ± ")
            assert apart.strip("*").startswith(f"{100 * (mean - lora):+.2f}")
            assert apart.startswith("**") == apart.endswith("**") == (by_row[row].corrected < 0.05)
    assert "Holm over 12 comparisons" in text
    assert "lambda 2" not in text.split(".")[0], "the caption names what the rows have in common"


def test_the_ranks_are_compared_with_lora_of_the_same_rank(evidence):
    text = rank_sweep(evidence)
    first, second, third = lines(text, "16")
    cells = evidence.cells(evidence.of_rows(RANK_SWEEP))
    apart = 100 * (cells["delta-r16"].mean("accuracy") - cells["lora-r16"].mean("accuracy"))
    assert first[1] == "16,000"
    assert float(second[1].split()[0]) == pytest.approx(apart, abs=0.0051)
    beyond = difference(cells["delta-r16"], cells["alpha-r16"], "accuracy")
    assert third[1].startswith(f"{100 * beyond.mean:+.2f} [{100 * beyond.low:+.2f}, {100 * beyond.high:+.2f}], ")
    found = [difference(of["delta"], of["alpha"], "accuracy") for of in swept_ranks(evidence)[0].values()]
    assert {each.corrected for each in beyond_the_control(evidence).values()} == {
        each.corrected for each in corrected(found)
    }
    assert [line[0] for line in lines(text, "8")] == ["8", "8", "8"], "r 8 comes from the comparison of methods"


def test_forgetting_is_a_rise_of_the_loss(evidence):
    text = page.forgetting(evidence)
    cell = evidence.cells(evidence.compared["e2e"])["delta"]
    rise = statistics.fmean(after - before for before, after in (run.forgetting for run in cell.results))
    assert lines(text, "Delta-LoRA")[0][2] == f"{rise:.4f}"
    assert "docstrings" not in text


def test_what_the_seeds_can_show(evidence):
    line = lines(page.power(evidence), "docstrings")[0]
    assert line[2] == "2"
    assert float(line[4]) == pytest.approx(11.55 * float(line[3]), rel=0.02)
    assert float(line[5]) > float(line[4])


def test_what_the_seeds_can_show_is_corrected_for_all_comparisons_of_a_table(evidence):
    text = page.power(evidence)
    for title, of in {"equal heads": 2 * (len(HEAD_SWEEP) - 1), "lambda and K": len(RATIOS), "rank": 10}.items():
        line = lines(text, title)[0]
        assert line[1] == "accuracy, %"
        factor = detectable_effect(2, 0.05 / of) / detectable_effect(2)
        assert float(line[5]) == pytest.approx(factor * float(line[4]), rel=0.02)


def test_the_papers_numbers_stand_next_to_ours(evidence, grid):
    """E2E's with the model whose texts are sentences."""
    larger = replace(evidence.compared["e2e"], model="SmolLM2-larger")
    both = Evidence(complete(Grid("test", (*grid.experiments, larger))), Grid("test", (*grid.experiments, larger)))
    text = page.paper(both)
    of = both.cells(larger)
    ours = difference(of["delta"], of["lora"], "BLEU").mean
    assert lines(text, "e2e, SmolLM2")[0][1:3] == ["BLEU", "1.24"]
    assert lines(text, "e2e, SmolLM2")[0][3].startswith(f"{ours:+.2f} [")
    assert "68.9 to 70.4 BLEU" in text
    assert "spread of 1.5 points" in text
    assert "not measured" not in text
    assert lines(page.paper(evidence), "e2e, SmolLM2")[0][3] == "not measured"


def test_what_was_run_twice_is_compared_over_both_tunings(evidence, grid):
    """`second` has LoRA as it was, Delta-LoRA at another rate, and lacks a run of the control."""
    second = [copy.deepcopy(run) for run in evidence.results if run.setting.row in ("lora-head", "delta-head")]
    tuned, other = evidence.cells(evidence.heads)["delta-head"].lr, min(LRS["adapter"])
    for run in [run for run in second if run.setting.row == "delta-head"]:
        run.setting = replace(run.setting, lr={tuned: other, other: tuned}.get(run.setting.lr, run.setting.lr))
        run.metrics["accuracy"] -= 0.03 * (run.setting.split == "test")
        if run.setting.split == "tuning" and run.setting.lr == tuned:  # `other` is the lowest: one more was tried
            second.append(replace(run, setting=replace(run.setting, lr=other / 4), metrics={"accuracy": 0.0}))
    second += [run for run in evidence.results if run.setting.row == "alpha-head"][:-1]
    both = Evidence(evidence.results, grid, second)
    text, twice = repetition(both), made_twice(both)
    assert list(twice) == ["lora-head", "delta-head"]
    assert [each.is_of_one_rate for each in twice.values()] == [True, False]
    assert [each.gap for each in twice.values()] == pytest.approx([0, -3], abs=1e-9)
    first = [100 * run.metrics["accuracy"] for run in both.cells(both.heads)["delta-head"].results]
    assert twice["delta-head"].expected == pytest.approx(statistics.stdev(first) / math.sqrt(len(first)) * math.sqrt(2))
    cells = [cell for line in lines(text, "Delta-LoRA") for cell in line[1:]]
    assert cells[:2] == [f"{tuned:g}", f"{other:g}"]
    assert cells[4] == "-3.00"
    lora = 100 * both.cells(both.heads)["lora-head"].mean("accuracy")
    assert cells[5:] == [f"{statistics.fmean(first) - lora - less:+.2f}" for less in (0, 3)]
    assert f"The two lie {3 / math.sqrt(2):.2f} apart" in text
    assert f"{len(second)} of them are of a second tuning" in page.what_was_run(both)


def test_a_second_tuning_without_lora_has_no_difference_to_it(evidence, grid):
    second = [run for run in evidence.results if run.setting.row == "delta-head"]
    text = repetition(Evidence(evidence.results, grid, second))
    assert "again - as shown" in text
    assert "difference to LoRA" not in text


def test_what_was_run_and_what_was_left_out(evidence, grid):
    assert page.what_was_run(evidence).endswith("Nothing was left out.")
    missing = [run for run in evidence.results if not (run.setting.row == "alpha" and run.setting.split == "test")]
    text = page.what_was_run(Evidence(missing, grid))
    assert f"{len(missing)} runs" in text
    assert lines(text, "docstrings")[0][1:4] == ["comparison with LoRA", "4 of 5", "2"]
    assert "Left out: docstrings, comparison with LoRA: LoRA, alpha x (1 + lambda) (not run yet); e2e, comp" in text


def test_a_single_look(evidence):
    assert lines(page.single_looks(evidence), "cola")[0][1:3] == ["LoRA", "1 seed"]


def test_a_single_seed_has_no_error_and_no_difference():
    asked = experiment(seeds=1)
    results = complete(Grid("test", (asked,)))
    evidence = Evidence(results, Grid("test", (asked,)))
    assert "±" not in result_tables(evidence, asked)
    for block in (page.in_short, equivalences, page.power):
        assert block(evidence) == NOT_MEASURED


def test_a_second_experiment_on_a_task_has_its_models_name():
    larger = replace(experiment(), model="larger")
    assert list(Evidence([], Grid("test", (experiment(), larger))).compared) == ["docstrings", "docstrings, larger"]


def test_the_costs_are_those_of_the_file(tmp_path):
    assert page.cost(tmp_path, "cpu") == NOT_MEASURED
    row = {"seconds": [0.1, 0.3, 0.2], "ratio": {"median": 1.5, "lowest": 1.25, "highest": 2.0}, "trained": 1234}
    row |= {"gradient_bytes": 2**20, "state_bytes": 2**21, "peak_bytes": 2**22}
    setting = {"task": "t", "model": "m", "batch_size": 4, "max_length": 8}
    found = {"setting": setting, "machine": {"device": "cpu", "cpu": "A Processor", "torch_threads": 2}}
    found |= {"commit": "abc", "rows": {"lora": row, "delta": row}}
    (tmp_path / "cost_cpu.json").write_text(json.dumps(found))
    text = page.cost(tmp_path, "cpu")
    assert lines(text, "Delta-LoRA")[0][1:] == ["200.0", "1.50 (1.25 .. 2.00)", "1,234", "1.00", "2.00", "4.00"]
    assert "m on t, 4 texts of at most 8 tokens; A Processor, 2 threads; commit abc." in text


def blocks(evidence):
    return [block(evidence) for block in BLOCKS] + [page.task_block(evidence, name) for name in evidence.compared]


def test_every_table_renders_and_fits_a_screen(evidence):
    for text in blocks(evidence):
        assert NOT_MEASURED not in text
        assert tables_of(text)
        assert faults(text) == []
        assert [line for table in tables_of(text) for line in table if len(line) > WIDTH] == []
    assert all(map(fits_a_screen, page.in_short(evidence).splitlines())), "it stands in the README"


def test_the_blocks_read_the_folder_of_the_grid(tmp_path, monkeypatch):
    tables = evidence_tables(tmp_path, partial(Evidence.read, tmp_path))
    paper = tables.pop("evidence: the paper's numbers")
    monkeypatch.setattr(wording, "PICTURES", tmp_path)
    assert {name: table() for name, table in tables.items()} == dict.fromkeys(tables, NOT_MEASURED)
    assert "not measured" in paper()
    look = next(each for each in FULL.experiments if list(each.rows) == ["lora"])
    for result in complete(Grid("test", (look,))):
        write_result(tmp_path / "full", result)
    write_result(tmp_path / "small", Result(replace(look._setting(ROWS["lora"], 1.0, 7, "test"))))
    assert look.task in evidence_tables(tmp_path, partial(Evidence.read, tmp_path))["evidence: single looks"]()


def test_runs_that_were_made_twice_are_read_from_the_second_folder(tmp_path):
    heads = replace(Evidence([]).heads, rows=["lora-head"])
    for folder in ("full", "full-again"):
        for result in complete(Grid("test", (heads,))):
            write_result(tmp_path / folder, result)
    assert list(made_twice(Evidence.read(tmp_path))) == ["lora-head"]


def test_pictures_are_linked_where_they_were_drawn(tmp_path, monkeypatch, evidence):
    monkeypatch.setattr(wording, "PICTURES", tmp_path / "evidence")
    assert page.layers(evidence) == NOT_MEASURED
    (tmp_path / "evidence").mkdir()
    for name in ("ranks", "rates-docstrings"):
        (tmp_path / "evidence" / f"{name}.png").touch()
    assert page.layers(evidence).endswith("](evidence/ranks.png)")
    assert page.task_block(evidence, "docstrings").endswith("](evidence/rates-docstrings.png)")


def test_a_readers_own_grid_has_a_report(evidence, grid):
    text = report(grid, evidence.results)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "## docstrings", "## e2e", "## webnlg", "## Equal heads", "## Delta-LoRA and a larger alpha",
    ]  # fmt: skip
