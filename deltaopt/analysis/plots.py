"""Figures of the changes, by matplotlib, which is imported where it is needed. They belong to no window."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from deltaopt.analysis.changes import LayerChange
from deltaopt.analysis.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = ("weight", "base_layer", "linear", "default")
"""Last parts of a parameter's name that do not tell one kind of layer from another."""
MARKERS = "osD^vPX*"


class Place(NamedTuple):
    """Where a layer is: the number of its block (None without one), and its name within the block."""

    block: int | None
    kind: str


def plot_cosines(
    runs: Mapping[str, Sequence[LayerChange]], kinds: Sequence[str] | None = None, weight: bool = False
) -> Figure:
    """Plot the cosine of each layer's trained weight to its pretrained one: Fig. 3 of the paper.

    One panel a kind of layer, such as the query, with the number of the block to the right. The lower a mark, the
    further training has turned the weight.

    Args:
        runs: by the name of the method, what `layer_changes` or `dense_changes` returned after its run, for example
            ``{"fine-tuning": ..., "LoRA": ..., "Delta-LoRA": ...}``. Prefixes of names may differ between the runs.
        kinds: the kinds of layers, by the end of their names (``["query", "value"]``). Default: all that every run has.
        weight: take W alone, without the branch.

    Returns:
        A figure of its own: ``figure.savefig("cosines.png")``; a notebook shows it.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: if the runs have no layer in common, or none of a kind.
    """
    name = "W" if weight else "W + s A B"
    field = "weight_cosine" if weight else "cosine"
    return _panels(runs, kinds, lambda change: getattr(change, field), f"cosine of {name} to the pretrained W")


def plot_ranks(
    runs: Mapping[str, Sequence[LayerChange]], kinds: Sequence[str] | None = None, numerical: bool = False
) -> Figure:
    """Plot the rank of each layer's change, one panel a kind of layer.

    Args:
        runs: as `plot_cosines`.
        kinds: as `plot_cosines`.
        numerical: the number of singular values that are not zero, in place of the effective rank.

    Returns:
        A figure of its own.

    Raises:
        ModuleNotFoundError, ValueError: as `plot_cosines`.
    """
    field = "numerical_rank" if numerical else "effective_rank"
    return _panels(runs, kinds, lambda change: getattr(change, field), f"{field.replace('_', ' ')} of the change")


def plot_history(history: History, figure: str = "weight_norm", relative: bool = True) -> Figure:
    """Plot one figure of every layer over the steps of a run.

    Args:
        history: of the run.
        figure: a field of `LayerChange`.
        relative: divide norms by ||W0||, where W can be read.

    Returns:
        A figure of its own, with a legend for up to 12 layers.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: for another field, or a history without a record.
    """
    series = history.series(figure)
    if not series:
        raise ValueError("nothing was recorded in this History: call history.record() during training")
    divide = relative and figure in ("weight_norm", "branch_norm", "change_norm")
    bases = history.series("base_norm")
    drawn = _new_figure(6.4, 4.4)
    axis = drawn.subplots()
    for name, values in series.items():
        base = next((each for each in bases[name] if each), None) if divide else None
        axis.plot(history.steps, [_number(value, base or 1.0) for value in values], label=name, lw=1.2)
    axis.set(xlabel="step", title=figure.replace("_", " ") + (" / ||W0||" if divide else ""))
    axis.grid(alpha=0.3)
    if len(series) <= 12:
        axis.legend(fontsize=7)
    return drawn


def place_of(name: str) -> Place:
    """Split a layer's name at the number of its block: ``encoder.layer.3.attention.query`` -> 3, attention.query.

    Example:
        >>> place_of("model.layers.11.self_attn.q_proj.weight")
        Place(block=11, kind='self_attn.q_proj')
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[-1] in SUFFIXES:
        parts.pop()
    number = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    if number is None:
        return Place(None, parts[-1])
    return Place(int(parts[number]), ".".join(parts[number + 1 :]))


def _panels(
    runs: Mapping[str, Sequence[LayerChange]],
    kinds: Sequence[str] | None,
    value: Callable[[LayerChange], float | None],
    title: str,
) -> Figure:
    places = {run: [(place_of(change.name), change) for change in changes] for run, changes in runs.items()}
    shown = _kinds({run: [place.kind for place, _ in found] for run, found in places.items()}, kinds)
    columns = min(3, len(shown))
    figure = _new_figure(1.2 + 4.0 * columns, 0.8 + 3.2 * math.ceil(len(shown) / columns))
    axes: list[Axes] = list(figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False).flat)
    for axis in axes[len(shown) :]:
        axis.remove()
    for axis, kind in zip(axes, shown, strict=False):
        for (run, found), marker in zip(places.items(), itertools.cycle(MARKERS), strict=False):
            line = [(place.block, value(change)) for place, change in found if _is_of(place.kind, kind)]
            blocks = [position if block is None else block for position, (block, _) in enumerate(line)]
            axis.plot(blocks, [_number(each) for _, each in line], f"{marker}-", ms=4, lw=1, label=run)
        axis.set(title=kind, xlabel="block")
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    return figure


def _kinds(held: Mapping[str, Sequence[str]], asked: Sequence[str] | None) -> list[str]:
    """Return the kinds of layers to show, which every run has."""
    if not held:
        raise ValueError("runs is empty: expected {name of the method: its changes}")
    if asked is None:
        first, *others = held.values()
        asked = [kind for kind in dict.fromkeys(first) if all(kind in kinds for kinds in others)]
        if not asked:
            examples = "; ".join(f"{run}: {', '.join(dict.fromkeys(kinds)) or 'none'}" for run, kinds in held.items())
            raise ValueError(f"the runs have no kind of layer in common ({examples}): name them with kinds=")
    missing = [(kind, run) for kind in asked for run, kinds in held.items() if not any(_is_of(k, kind) for k in kinds)]
    if missing or not asked:
        kind, run = missing[0] if missing else ("", next(iter(held)))
        raise ValueError(
            f"no layer of {run!r} ends with {kind!r}: it has {', '.join(dict.fromkeys(held[run])) or 'none'}"
        )
    return list(asked)


def _is_of(kind: str, asked: str) -> bool:
    return kind == asked or kind.endswith(f".{asked}")


def _number(value: float | None, divisor: float = 1.0) -> float:
    return math.nan if value is None else value / divisor


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the plots of deltaopt.analysis need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")
