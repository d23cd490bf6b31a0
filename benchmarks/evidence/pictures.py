"""The pictures of docs/evidence.md, from result files alone.

One panel a row: up to twenty lines in one panel cannot be told apart. Each panel has LoRA in black, and all other rows
in grey where they are needed to compare.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import matplotlib

from benchmarks.evidence.comparison import Cell
from benchmarks.evidence.figures import forgotten, mean_rank, over_rates
from benchmarks.evidence.grid import Experiment
from benchmarks.evidence.measures import measure
from benchmarks.evidence.result import Result
from benchmarks.evidence.rows import ROWS
from benchmarks.evidence.standing import DELTA, LORA, Evidence, Standing
from benchmarks.evidence.tuning import smaller_is_better
from benchmarks.evidence.wording import PICTURES, file_name
from deltaopt.analysis import LayerChange, plot_cosines

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

FINE_TUNING = "full"
PANELS = 4
"""In a line."""

REFERENCE = "black"
OTHERS = "0.85"
COLOUR = "tab:red"

Points = Mapping[float, float]
"""A line: values of y by x."""


def write_all(results: Path, folder: Path = PICTURES) -> list[Path]:
    """Draw all pictures that the results of the whole grid allow, and remove those that they do not allow.

    Args:
        results: folder that holds a folder of results for each grid.
        folder: of the pictures.

    Returns:
        The files that were written.
    """
    return draw_all(Evidence.read(results), folder)


def draw_all(evidence: Evidence, folder: Path) -> list[Path]:
    """Draw all pictures of a grid into a folder; see `write_all`."""
    figures: dict[str, Figure | None] = {"cosines": cosines(evidence), "ranks": ranks(evidence)}
    for name, experiment in evidence.pictured.items():
        figures[f"rates-{name}"] = rates(evidence, experiment)
        figures[f"losses-{name}"] = losses(evidence, experiment)
    for name, experiment in evidence.compared.items():
        figures[f"forgetting-{name}"] = forgetting(evidence, experiment)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, figure in figures.items():
        path = folder / f"{file_name(name)}.png"
        path.unlink(missing_ok=True)
        if figure is not None:
            _save(figure, path)
            written.append(path)
    return written


def rates(evidence: Evidence, experiment: Experiment) -> Figure | None:
    """Draw the metric of the tuning against the learning rate, one panel a row, with a ring at the chosen rate."""
    found = {each.row.name: each for each in evidence.standings(experiment)}
    lines = {name: over_rates(each.tuning, experiment.metric, experiment.tuning_seeds) for name, each in found.items()}
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return None
    how = measure(experiment.metric)
    lines = {name: {lr: how.factor * value for lr, value in line.items()} for name, line in lines.items()}
    smaller = smaller_is_better(experiment.metric)
    best = min if smaller else max
    reference = _reference(lines)
    tried = [lr for line in lines.values() for lr in line]
    ticks = LogLocator(subs=(1, 3) if max(tried) < 100 * min(tried) else (1,))
    figure, axes = _panels(lines, reference)
    for name, axis in axes.items():
        for other in (each for each in lines if each not in (name, reference)):
            axis.plot(*_line(lines[other]), color=OTHERS, lw=0.8, zorder=1)
        if reference is not None:
            axis.plot(*_line(lines[reference]), color=REFERENCE, lw=1.2, zorder=2)
            axis.axhline(best(lines[reference].values()), color=REFERENCE, lw=0.8, ls=":", zorder=1)
        colour = _colour(name, reference)
        axis.plot(*_line(lines[name]), "o-", color=colour, ms=3.5, lw=1.8, zorder=3)
        _ring(axis, found[name], lines[name], colour, 0.93 if smaller else 0.07)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticks)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    first = next(iter(axes.values()))
    first.set_ylim(*_limits(lines, smaller))
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel(f"{how.title}, held out", fontsize=9)
    return figure


def losses(evidence: Evidence, experiment: Experiment) -> Figure | None:
    """Draw the training loss over the steps, the mean over the seeds of the tuned rate, one panel a row."""
    cells = evidence.cells(experiment)
    lines = {name: _smooth(_mean_losses(cell)) for name, cell in cells.items()}
    if not lines:
        return None
    reference = _reference(lines)
    figure, axes = _panels(lines, reference)
    for name, axis in axes.items():
        if reference is not None:
            axis.plot(*_line(lines[reference]), color=REFERENCE, lw=1.0)
        if name != reference:
            axis.plot(*_line(lines[name]), color=COLOUR, lw=1.4)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("training loss, running mean", fontsize=9)
    return figure


def cosines(evidence: Evidence) -> Figure | None:
    """Draw the paper's Fig. 3, of one seed of the first experiment: the cosine of each layer to the pretrained one."""
    cells = evidence.cells(next(iter(evidence.compared.values())))
    runs = {
        ROWS[name].title: [LayerChange(**layer) for layer in cells[name].results[0].layers]
        for name in (FINE_TUNING, LORA, DELTA)
        if name in cells and cells[name].results[0].layers
    }
    return plot_cosines(runs) if runs else None


def ranks(evidence: Evidence) -> Figure | None:
    """Draw the effective rank of the change, the mean over layers and seeds, one bar a row."""
    experiment = next(iter(evidence.compared.values()))
    cells = evidence.cells(experiment)
    bars = {
        name: [rank for run in cell.results if (rank := mean_rank(run)) is not None] for name, cell in cells.items()
    }
    bars = {name: found for name, found in bars.items() if found}
    if not bars:
        return None
    figure, axis = plt.subplots(figsize=(7.0, 0.9 + 0.26 * len(bars)), layout="constrained")
    places = range(len(bars))
    means = [statistics.fmean(found) for found in bars.values()]
    axis.barh(places, means, color=[_colour(name) for name in bars], height=0.65)
    for place, mean in zip(places, means, strict=True):
        axis.annotate(f"{mean:.1f}", (mean, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    r = next(iter(cells.values())).results[0].setting.rank
    for factor, name in ((1, "r"), (2, "2 r")):
        axis.axvline(factor * r, color="0.5", lw=0.8, ls=":")
        axis.annotate(name, (factor * r, 1), (2, 1), xycoords=("data", "axes fraction"), textcoords="offset points")
    axis.set_yticks(places, [ROWS[name].title for name in bars], fontsize=8)
    axis.invert_yaxis()
    if max(means) > 8 * r:
        axis.set_xscale("log")
    axis.margins(x=0.1)
    axis.set_xlabel(f"effective rank of the change, {experiment.task}")
    return figure


def forgetting(evidence: Evidence, experiment: Experiment) -> Figure | None:
    """Draw the metric against forgetting, with standard errors, one mark a row."""
    cells = {
        name: cell
        for name, cell in evidence.cells(experiment).items()
        if all(run.forgetting is not None for run in cell.results)
    }
    if not cells:
        return None
    metric, how = experiment.metric, measure(experiment.metric)
    figure, axis = plt.subplots(figsize=(7.5, 5.0), layout="constrained")
    colours = matplotlib.colormaps["tab20"]
    for place, (name, cell) in enumerate(cells.items()):
        colour = REFERENCE if name == LORA else colours(place % colours.N)
        x, y = _mean_and_error(cell, forgotten), _mean_and_error(cell, lambda run: how.factor * run.metrics[metric])
        axis.errorbar(
            x[0], y[0], y[1], x[1], fmt="osD^vPX*"[place % 8], color=colour, ms=6, lw=1, label=ROWS[name].title
        )
    axis.set(xlabel="forgetting: rise of the loss on the pretrained model's own texts", ylabel=how.title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure


def _ring(axis: Axes, standing: Standing, line: Points, colour: str, lost_at: float) -> None:
    """Draw a ring at the chosen rate, and a cross at each rate at which a run diverged."""
    if standing.lr is not None and standing.lr in line:
        axis.plot(standing.lr, line[standing.lr], "o", ms=10, mfc="none", mec=colour, zorder=4)
    for lr in (lr for lr in standing.tried if lr not in line):
        axis.plot(lr, lost_at, "x", color=colour, ms=6, transform=axis.get_xaxis_transform())


def _limits(lines: Mapping[str, Points], smaller: bool) -> tuple[float, float]:
    """Return limits that show the differences at the top: the better half of all values, and some room."""
    values = sorted((value for line in lines.values() for value in line.values()), reverse=smaller)
    best, worst = values[-1], values[len(values) // 4]
    room = 0.12 * abs(best - worst) or 0.05 * abs(best) or 1.0
    return (best - room, worst + room) if smaller else (worst - room, best + room)


def _mean_losses(cell: Cell) -> dict[float, float]:
    curves = [run.losses for run in cell.results]
    count = min(map(len, curves))
    steps = cell.results[0].setting.steps
    return {steps * (place + 1) / count: statistics.fmean(curve[place] for curve in curves) for place in range(count)}


def _smooth(line: Points) -> dict[float, float]:
    """Return running means over a fifteenth of the curve."""
    steps, values = list(line), list(line.values())
    window = max(1, len(values) // 15)
    return {step: statistics.fmean(values[max(0, place + 1 - window) : place + 1]) for place, step in enumerate(steps)}


def _mean_and_error(cell: Cell, of: Callable[[Result], float]) -> tuple[float, float]:
    return cell.mean(of), cell.standard_error(of) if len(cell.results) > 1 else 0.0


def _reference(rows: Iterable[str]) -> str | None:
    """Return the row that the others are compared with; None without it."""
    return next((name for name in rows if ROWS[name].method == LORA), None)


def _panels(lines: Mapping[str, Points], reference: str | None) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with a panel for each row, with common axes."""
    columns = min(PANELS, len(lines))
    rows = math.ceil(len(lines) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(0.8 + 2.5 * columns, 0.6 + 1.75 * rows), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    axes = dict(zip(lines, grid.flat, strict=False))
    for name, axis in axes.items():
        axis.set_title(ROWS[name].title, fontsize=8, color=_colour(name, reference))
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in list(grid.flat)[len(lines) :]:
        axis.remove()
    return figure, axes


def _colour(name: str, reference: str | None = LORA) -> str:
    return REFERENCE if name == reference else COLOUR


def _line(points: Points) -> tuple[list[float], list[float]]:
    return list(points), list(points.values())


def _save(figure: Figure, path: Path) -> None:
    """Write a file that is the same for the same results, on one machine."""
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
