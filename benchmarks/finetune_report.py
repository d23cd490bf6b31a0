"""The report of the fine-tuning demonstration: introduction, table, explanation and figure."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from benchmarks.finetune_data import Task
from deltaopt import LoRATriple

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")


@dataclass(frozen=True)
class Method:
    """One column of the table; with `update_ratio` None it is AdamW alone."""

    name: str
    alpha: float
    update_ratio: float | None
    folded: bool = False


@dataclass(frozen=True)
class LayerMove:
    """Distance of one layer from the pretrained W0, as norms relative to ||W0|| and as cosines to W0.

    `weight` is that of W itself; `effective` is that of W + s A B, with which the layer computes.
    """

    name: str
    weight: float
    weight_cosine: float
    effective: float
    effective_cosine: float


@dataclass
class Run:
    """Results of one training run, for the report: seconds, bytes, and accuracies as shares."""

    method: Method
    losses: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    layers: list[LayerMove] = field(default_factory=list)
    delta_error: float | None = None
    state_bytes: int = 0
    buffer_bytes: int = 0
    cuda_peak_bytes: int | None = None

    @property
    def final_loss(self) -> float:
        """Mean training loss of the last tenth of the steps."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"final_loss": self.final_loss}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Run:
        """Return the run that `as_json` has described."""
        held = {name: value for name, value in values.items() if name != "final_loss"}
        held["method"] = Method(**held["method"])
        held["accuracies"] = [(step, share) for step, share in held["accuracies"]]
        held["layers"] = [LayerMove(**layer) for layer in held["layers"]]
        return cls(**held)


def weights_of(triples: Iterable[LoRATriple]) -> dict[str, Tensor]:
    """Return a copy of every W, on the CPU."""
    return {t.label: t.view.weight(t.W).detach().to("cpu", copy=True) for t in triples}


def branches_of(triples: Iterable[LoRATriple]) -> dict[str, Tensor]:
    """Return s A B, which each branch adds to W, in float64 on the CPU."""
    branches = {}
    for t in triples:
        A, B = (factor.detach().cpu().double() for factor in t.view.factors(*t.tensors()))
        branches[t.label] = t.branch_scaling * A @ B
    return branches


def moves_of(triples: Sequence[LoRATriple], pretrained: Mapping[str, Tensor]) -> list[LayerMove]:
    """Return the distance of every layer from its pretrained weight."""
    branches, weights = branches_of(triples), weights_of(triples)
    moves = []
    for name, W0 in pretrained.items():
        W0, W = W0.double(), weights[name].double()
        moves.append(LayerMove(name, *distance(W, W0), *distance(W + branches[name], W0)))
    return moves


def distance(W: Tensor, W0: Tensor) -> tuple[float, float]:
    """Return ||W - W0|| / ||W0||, and the cosine between W and W0."""
    cosine = (W * W0).sum() / (W.norm() * W0.norm())
    return float((W - W0).norm() / W0.norm()), float(cosine)


def delta_error(
    triples: Sequence[LoRATriple], pretrained: Mapping[str, Tensor], start: Mapping[str, Tensor], ratio: float
) -> float | None:
    """Return how far W - W0 is from lambda (s A B - s A_K B_K), relative to it; None if W should not have moved.

    The deltas of the steps telescope while lambda is constant, so the whole movement is known without summing them.

    Args:
        triples: the layers after training.
        pretrained: every W0.
        start: every s A_K B_K, as before the first step that moves W.
        ratio: lambda.
    """
    branches, weights = branches_of(triples), weights_of(triples)
    asked = {name: ratio * (branches[name] - start[name]) for name in pretrained}
    error = math.hypot(*(float((weights[n].double() - W0.double() - asked[n]).norm()) for n, W0 in pretrained.items()))
    length = math.hypot(*(float(delta.norm()) for delta in asked.values()))
    return error / length if length else None


def paragraphs(*texts: str) -> str:
    return "\n\n".join(textwrap.fill(" ".join(text.split()), 100) for text in texts)


def introduction(methods: Sequence[Method], task: Task, rank: int, start_step: int, steps: int, model: str) -> str:
    """Return the text before training, for a reader who has heard of neither method."""
    delta = methods[1]
    return paragraphs(
        f"""Fine-tuning {model} with PEFT: {task.description}. {len(task.labels)} labels, {len(task.train)} training
        and {len(task.test)} test texts, {steps} steps a run, {len(methods)} runs.""",
        f"""LoRA leaves every pretrained weight matrix W as it is and trains two thin matrices A and B: the layer
        computes W x + s A B x, with s = alpha / rank = {delta.alpha:g} / {rank}. Delta-LoRA trains A and B in the
        same way and moves W too: after each optimizer step W += lambda * s * (A'B' - A B), where A, B are the factors
        before the step and A', B' after it. W needs no gradient and no optimizer state for that.
        Here lambda (update_ratio) is {delta.update_ratio:g}, and W moves after the first {start_step} steps
        (start_step).""",
        "All runs share the seed: the same initial weights, adapters, dropout masks and order of the texts.",
    )


def table(runs: Sequence[Run], task: Task) -> str:
    """Return the numbers of every run in columns, and the two accuracies that need no training."""
    rows = [("", [run.method.name for run in runs])]
    rows += [(label, [show(run) for run in runs]) for label, show in quantities(runs)]
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(runs))]
    lines = []
    for label, cells in rows:
        lines.append(f"{label:<46}" + "".join(f"   {cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    lines.insert(1, "-" * max(map(len, lines)))
    lines.append(f"\nWithout training: always the commonest label {percent(task.majority_accuracy())}")
    if (named := task.named_accuracy()) is not None:
        lines[-1] += f"; the label that the text itself names, else the commonest {percent(named)}"
    return "\n".join(lines) + "."


def quantities(runs: Sequence[Run]) -> list[tuple[str, Callable[[Run], str]]]:
    """Return the rows of the table: a label, and the function that shows its number for a run."""
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("alpha", lambda run: f"{run.method.alpha:g}"),
        ("test accuracy", lambda run: percent(run.accuracies[-1][1])),
        ("training loss, mean of the last tenth", lambda run: f"{run.final_loss:.4f}"),
        ("W moved, ||W - W0|| / ||W0||, mean of layers", lambda run: f"{mean(run, 'weight'):.2e}"),
        ("  cosine of W to W0, mean (least)", lambda run: cosines(run, "weight_cosine")),
        ("W + s A B moved, relative norm, mean of layers", lambda run: f"{mean(run, 'effective'):.2e}"),
        ("  cosine of W + s A B to W0, mean (least)", lambda run: cosines(run, "effective_cosine")),
        ("optimizer.step(), median", lambda run: milliseconds(run.optimizer_seconds)),
        ("whole training step, median", lambda run: milliseconds(run.step_seconds)),
        ("optimizer state", lambda run: megabytes(run.state_bytes)),
        ("buffers for the update of W", lambda run: megabytes(run.buffer_bytes)),
    ]
    if all(run.cuda_peak_bytes is not None for run in runs):
        rows.append(("peak of allocated GPU memory", lambda run: megabytes(run.cuda_peak_bytes or 0)))
    return rows


def reading(runs: Sequence[Run], task: Task, start_step: int) -> str:
    """Return the text after the table: what the numbers show, and what they do not show."""
    delta = runs[1]
    ratio, accuracy = delta.method.update_ratio, delta.accuracies[-1][1]
    spread = math.sqrt(accuracy * (1 - accuracy) / len(task.test))
    texts = [
        moved(delta),
        larger_alpha(runs, start_step) if ratio and delta.delta_error is not None else "",
        *(folded(run, delta) for run in runs if run.method.folded),
    ]
    texts.append(
        f"""Which method is better cannot be read here. This is one seed on a small task, and with {len(task.test)}
        test texts an accuracy has a standard error of {100 * spread:.1f} points by the choice of texts alone.
        Times are medians of single steps on a machine that may do other things: take them as orders of magnitude."""
    )
    return paragraphs(*(text for text in texts if text))


def moved(delta: Run) -> str:
    if delta.delta_error is None:
        return "W did not move: lambda (update_ratio) is 0."
    return f"""With LoRA W stays and only the sum W + s A B changes; with Delta-LoRA both change. The movement of W
    equals lambda * s * (A B at the end - A B when W began to move), as the equation demands at every step: their
    relative difference is {delta.delta_error:.0e}."""


def folded(run: Run, delta: Run) -> str:
    """Return the comparison of the folded run with the run that moves W."""
    apart = max(abs(a - b) for a, b in zip(run.losses, delta.losses, strict=True))
    wrote = "was written once, at start_step" if mean(run, "weight") else "was never written"
    return f"""{run.method.name}: W {wrote}; instead the branch is scaled by (1 + lambda) s. This is the same run as
    Delta-LoRA up to rounding, which training amplifies: the losses of a step differ by at most {apart:.1e}."""


def larger_alpha(runs: Sequence[Run], start_step: int) -> str:
    """Return the explanation of why, with Adam, a constant lambda is a larger alpha."""
    delta = runs[1].method
    factor = 1 + (delta.update_ratio or 0)
    same = f"LoRA with alpha = {delta.alpha:g} * (1 + {delta.update_ratio:g}) = {delta.alpha * factor:g}"
    if start_step:
        return f"""From step {start_step} on the layers computed with {factor:g} times A B, minus a constant.
        With start_step = 0 and Adam, whose steps do not depend on the size of the gradients, that would be {same}.
        Here W moved only later, so this run is not equal to it; but a larger alpha is still the first thing to
        compare with{"" if control(runs) else " (--control)"}."""
    seen = (
        "The third column is that run: it differs from Delta-LoRA only by rounding and by Adam's eps."
        if control(runs)
        else "The option --control adds that run."
    )
    return f"""With a constant lambda from step 0 and Adam, whose steps do not depend on the size of the gradients,
    Delta-LoRA computes the same as {same}. Whatever separates the first two columns, a larger alpha would give as
    well. {seen} It is another method only if W begins to move later (--start-step) or lambda varies during
    training."""


def control(runs: Sequence[Run]) -> bool:
    """Tell if LoRA with the larger alpha is among the runs."""
    return sum(run.method.update_ratio is None for run in runs) > 1


def mean(run: Run, what: str) -> float:
    return statistics.fmean(getattr(layer, what) for layer in run.layers)


def cosines(run: Run, what: str) -> str:
    return f"{mean(run, what):.4f} ({min(getattr(layer, what) for layer in run.layers):.4f})"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def milliseconds(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.median(seconds):.1f} ms"


def megabytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def draw(runs: Sequence[Run], path: Path, title: str) -> None:
    """Plot loss, accuracy, and for each layer the distance from the pretrained weights (as the paper's Fig. 3)."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 9.5), layout="constrained")
    figure.suptitle(title)
    draw_losses(axes[0, 0], runs)
    draw_accuracies(axes[0, 1], runs)
    draw_layers(axes[1, 0], runs, "norm", "||W - W0|| / ||W0||")
    draw_layers(axes[1, 1], runs, "angle", "1 - cosine of W to W0")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_losses(axis: Axes, runs: Sequence[Run]) -> None:
    for run, colour, style in zip(runs, COLOURS, ("-", "-", "--", ":"), strict=False):
        window = max(1, len(run.losses) // 15)
        smooth = torch.tensor(run.losses).unfold(0, window, 1).mean(-1)
        axis.plot(range(1, len(run.losses) + 1), run.losses, color=colour, alpha=0.15)
        axis.plot(range(window, len(run.losses) + 1), smooth, style, color=colour, label=run.method.name)
    axis.set(title="training loss (running mean)", xlabel="step", ylabel="cross entropy", ylim=(0, None))
    axis.legend()


def draw_accuracies(axis: Axes, runs: Sequence[Run]) -> None:
    for run, colour, style in zip(runs, COLOURS, ("o-", "o-", "x--", "+:"), strict=False):
        steps, accuracies = zip(*run.accuracies, strict=True)
        axis.plot(steps, accuracies, style, color=colour, label=run.method.name)
    axis.set(title="test accuracy", xlabel="step")
    axis.legend()


def draw_layers(axis: Axes, runs: Sequence[Run], what: str, title: str) -> None:
    """Draw one mark a layer: hollow for W, filled for W + s A B. Zeros are left out: the axis is logarithmic."""
    names = [short(layer.name) for layer in runs[0].layers]
    for run, colour, marker in zip(runs, COLOURS, "osD^", strict=False):
        own, total = distances(run, what)
        label = f"W, {run.method.name}" + ("" if any(own) else ": 0, not drawn")
        axis.plot([v or math.nan for v in own], marker, color=colour, mfc="none", ms=6, label=label)
        axis.plot([v or math.nan for v in total], marker, color=colour, ms=3, label=f"W + s A B, {run.method.name}")
    axis.set_yscale("log")
    every = math.ceil(len(names) / 48)  # more names than that overlap
    axis.set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=6)
    axis.set_title(f"{title}, per layer")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7)


def distances(run: Run, what: str) -> tuple[list[float], list[float]]:
    """Return for W and for W + s A B, per layer, the relative norm or 1 - cosine; rounding errors count as zero."""
    if what == "norm":
        return [layer.weight for layer in run.layers], [layer.effective for layer in run.layers]
    cosines = ([layer.weight_cosine for layer in run.layers], [layer.effective_cosine for layer in run.layers])
    own, total = ([1 - c if 1 - c > 1e-11 else 0.0 for c in side] for side in cosines)
    return own, total


def short(name: str) -> str:
    """Shorten a module's name to start at its layer's number: ``encoder.layer.0.mlp.up`` -> ``0.mlp.up``."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] :] if numbers else parts[-2:])
