"""The pictures of the evidence show the numbers of the results, and those that cannot be drawn are absent."""

import math
import statistics
from dataclasses import replace

import pytest
from matplotlib import pyplot as plt

from benchmarks.evidence import pictures
from benchmarks.evidence.figures import mean_rank
from benchmarks.evidence.grid import Experiment, Grid
from benchmarks.evidence.pictures import draw_all, write_all
from benchmarks.evidence.rows import HEAD_SWEEP, ROWS
from benchmarks.evidence.standing import Evidence
from tests.benchmarks.made_results import complete

LRS = dict.fromkeys(("adapter", "dense", "sgd"), (1e-3, 4e-3, 1.6e-2))


def experiment(task, rows):
    setting = {"steps": 40, "batch_size": 2, "max_length": 8}
    return Experiment(task, "tiny", rows, setting, LRS, seeds=2, tuning_seeds=2)


@pytest.fixture(scope="module")
def evidence():
    rows = ("full", "lora", "delta", "alpha", "lora-lr3")
    grid = Grid("test", (experiment("docstrings", rows), experiment("e2e", ("lora", "delta"))))
    return Evidence(complete(grid), grid)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def panel(figure, row):
    return next(axis for axis in figure.axes if axis.get_title() == ROWS[row].title)


def points(line):
    return dict(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))


def drawn(axis, colour, marker=None):
    """Return the lines of a colour that join points."""
    found = [line for line in axis.lines if line.get_color() == colour and len(line.get_xdata()) > 1]
    return [points(line) for line in found if line.get_linestyle() == "-" and marker in (None, line.get_marker())]


def test_a_row_of_the_learning_rates_has_the_means_of_its_tuning_runs(evidence):
    asked = evidence.compared["docstrings"]
    figure = pictures.rates(evidence, asked)
    assert [axis.get_title() for axis in figure.axes] == [
        ROWS[name].title for name in ("full", "lora", "delta", "alpha")
    ], "a row that takes another one's rate has no panel"
    runs = [run for run in evidence.results if (run.setting.task, run.setting.row) == ("docstrings", "delta")]
    expected = {}
    for lr in {run.setting.lr for run in runs if run.setting.split == "tuning"}:
        at = [run for run in runs if run.setting.lr == lr and run.setting.split == "tuning"]
        expected[lr] = 100 * statistics.fmean(run.metrics["accuracy"] for run in at)
    axis = panel(figure, "delta")
    assert drawn(axis, pictures.COLOUR) == [pytest.approx(expected)]
    assert len(drawn(axis, pictures.OTHERS)) == 2
    assert drawn(axis, pictures.REFERENCE) == drawn(panel(figure, "lora"), pictures.REFERENCE, "o")
    ring = next(line for line in axis.lines if line.get_markersize() == 10)
    best = max(expected, key=expected.get)
    assert points(ring) == {best: pytest.approx(expected[best])}
    low, high = axis.get_ylim()
    assert low < max(expected.values()) < high


def test_rows_with_equal_heads_are_drawn_against_their_own_lora(evidence):
    heads = experiment("docstrings", [row.name for row in HEAD_SWEEP])
    grid = Grid("test", (*evidence.grid.experiments, heads))
    evidence = Evidence(complete(grid), grid)
    figure = pictures.rates(evidence, evidence.pictured["equal heads"])
    lora = panel(figure, "lora-head")
    assert lora.title.get_color() == pictures.REFERENCE
    assert panel(figure, "delta-head").title.get_color() == pictures.COLOUR
    held = drawn(lora, pictures.REFERENCE, "o")
    assert len(held) == 1
    assert drawn(panel(figure, "delta-head"), pictures.REFERENCE) == held
    curves = pictures.losses(evidence, evidence.pictured["equal heads"])
    held = drawn(panel(curves, "lora-head"), pictures.REFERENCE)
    assert len(held) == 1
    assert drawn(panel(curves, "delta-head"), pictures.REFERENCE) == held
    assert len(drawn(panel(curves, "delta-head"), pictures.COLOUR)) == 1


def test_the_best_losses_are_in_sight_though_others_are_far_away(evidence):
    figure = pictures.rates(evidence, evidence.compared["e2e"])
    axis = panel(figure, "delta")
    values = drawn(axis, pictures.COLOUR)[0].values()
    low, high = axis.get_ylim()
    assert low < min(values) < high


def test_a_rate_at_which_a_run_diverged_is_a_cross_and_no_point(evidence):
    asked = evidence.compared["docstrings"]
    lost = max(standing.tried[-1] for standing in evidence.standings(asked) if standing.row.name == "delta")
    results = [
        replace(run, diverged=True, metrics={}) if (run.setting.row, run.setting.lr) == ("delta", lost) else run
        for run in evidence.results
    ]
    axis = panel(pictures.rates(Evidence(results, evidence.grid), asked), "delta")
    assert lost not in drawn(axis, pictures.COLOUR)[0]
    assert [list(line.get_xdata()) for line in axis.lines if line.get_marker() == "x"] == [[lost]]


def test_a_rate_of_which_a_tuning_seed_is_missing_is_not_drawn(evidence):
    asked = evidence.compared["docstrings"]
    runs = [run for run in evidence.results if run.setting.row == "delta" and run.setting.split == "tuning"]
    results = [run for run in evidence.results if run is not runs[0]]
    axis = panel(pictures.rates(Evidence(results, evidence.grid), asked), "delta")
    assert runs[0].setting.lr not in drawn(axis, pictures.COLOUR)[0]


def test_a_curve_is_the_running_mean_over_the_seeds(evidence):
    asked = evidence.compared["docstrings"]
    axis = panel(pictures.losses(evidence, asked), "delta")
    curves = [run.losses for run in evidence.cells(asked)["delta"].results]
    means = [statistics.fmean(pair) for pair in zip(*curves, strict=True)]
    assert drawn(axis, pictures.COLOUR) == [pytest.approx({10.0 * (i + 1): mean for i, mean in enumerate(means)})]
    assert len(drawn(axis, pictures.REFERENCE)) == 1


def test_smoothing_keeps_the_number_of_points_and_does_not_look_ahead():
    line = {float(i): float(i) for i in range(30)}
    smooth = pictures._smooth(line)
    assert list(smooth) == list(line)
    assert [smooth[0.0], smooth[1.0], smooth[29.0]] == [0.0, 0.5, 28.5]


def test_the_cosines_are_those_of_one_seed(evidence):
    figure = pictures.cosines(evidence)
    asked = evidence.compared["docstrings"]
    cell = evidence.cells(asked)["delta"]
    layers = {layer["name"]: layer["cosine"] for layer in cell.results[0].layers}
    axis = next(axis for axis in figure.axes if axis.get_title().endswith("query"))
    line = next(line for line in axis.lines if line.get_label() == "Delta-LoRA")
    expected = [value for name, value in layers.items() if name.endswith("query")]
    assert list(line.get_ydata()) == pytest.approx(expected)
    assert {line.get_label() for line in axis.lines} == {"fine-tuning", "LoRA", "Delta-LoRA"}


def test_a_bar_is_the_mean_rank(evidence):
    axis = pictures.ranks(evidence).axes[0]
    cells = evidence.cells(evidence.compared["docstrings"])
    expected = [statistics.fmean(mean_rank(run) for run in cell.results) for cell in cells.values()]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx(expected)
    assert [label.get_text() for label in axis.get_yticklabels()] == [ROWS[name].title for name in cells]


def test_forgetting_is_drawn_where_it_was_measured(evidence):
    assert pictures.forgetting(evidence, evidence.compared["docstrings"]) is None
    axis = pictures.forgetting(evidence, evidence.compared["e2e"]).axes[0]
    cell = evidence.cells(evidence.compared["e2e"])["delta"]
    rise = statistics.fmean(run.forgetting[1] - run.forgetting[0] for run in cell.results)
    marks = [container.lines[0] for container in axis.containers]
    places = [(float(mark.get_xdata()[0]), float(mark.get_ydata()[0])) for mark in marks]
    assert places[1] == pytest.approx((rise, cell.mean("loss")))
    assert math.isfinite(places[0][0])


def test_the_files_are_the_same_for_the_same_results_and_go_with_them(evidence, tmp_path):
    written = draw_all(evidence, tmp_path)
    assert {path.name for path in written} == {
        "cosines.png", "ranks.png", "rates-docstrings.png", "losses-docstrings.png", "rates-e2e.png", "losses-e2e.png",
        "forgetting-e2e.png",
    }  # fmt: skip
    before = {path: path.read_bytes() for path in written}
    draw_all(evidence, tmp_path)
    assert {path: path.read_bytes() for path in written} == before
    assert draw_all(Evidence([], evidence.grid), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_without_results_there_are_no_pictures(tmp_path):
    assert write_all(tmp_path / "no results", tmp_path / "pictures") == []


def test_runs_of_other_settings_are_not_drawn(evidence):
    """As an earlier form of the grid leaves them."""
    asked = evidence.compared["docstrings"]
    strangers = [replace(run, setting=replace(run.setting, steps=30)) for run in evidence.results]
    assert pictures.rates(Evidence(strangers, evidence.grid), asked) is None
    both = pictures.rates(Evidence([*evidence.results, *strangers], evidence.grid), asked)
    alone = pictures.rates(evidence, asked)
    assert drawn(panel(both, "delta"), pictures.COLOUR) == drawn(panel(alone, "delta"), pictures.COLOUR)
