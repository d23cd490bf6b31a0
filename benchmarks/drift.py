"""The share of its displacement that a 16-bit W keeps under each rounding.

Every setting trains a few LoRA layers, each by itself. A layer is a regression. Its inputs x have unequal scales. Its
target weight is W_0 + Delta, with Delta of low rank. Its labels have as much noise as signal from Delta. The loss is
the squared error over small batches. A starts at zero and B uniform in +-1 / sqrt(d); AdamW trains both in float32 with
a cosine schedule. The forward pass is W x + s A (B x) with the W that has moved. The layers share with fine-tuning what
decides how much rounding loses: a pretrained weight of some scale, updates of the size of AdamW's learning rate,
gradients of signal and noise, and a forward pass that sees the moved W. They are no transformer, and no layer feeds
another.

D is the displacement that was asked for, in float64 from the factors (our rows: `optimizer.displacement`). The bits of
W have the displacement L = W_T - W_0. The fraction kept is <L, D> / <D, D>, and the relative error is |L - D| / |D|.
Both are computed for each layer; the table has the mean over layers with its standard error. Compensated rounding keeps
a remainder of W, so a second fraction counts W and remainder together: the bits of an element do not change while it is
asked to move by less than half a spacing, though nothing is lost.

    python -m benchmarks.drift [--quick] [--fresh] [--device cuda] [--threads N] [--seed N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import deltaopt
from benchmarks.machine import cpu_name, usable_device
from benchmarks.unfinished import check_writable, write_whole
from deltaopt import DeltaLoRAOptimizer, LoRATriple

ROUNDINGS = ("nearest", "stochastic", "compensated")
DENSE = "dense"
"""The pattern of public code: keep the dense product from before the step, then W += coef * (A @ B - old)."""

SHAPES = 3 * ((128, 768), (256, 768), (96, 1536))
"""Few rows, and the inner sizes of real layers: d decides the size of B's entries, and so that of the updates."""
QUICK_SHAPES = 2 * ((32, 64), (48, 40))
TARGET_STD = 0.002
"""Standard deviation of Delta: a tenth of the usual one of W, and the same for every W, so that the factors agree."""
EXAMPLES = 2048
BATCH = 16


@dataclass(frozen=True)
class Setting:
    """One training run. The defaults are the reference setting."""

    method: str
    """A rounding of `DeltaLoRAOptimizer`, or `DENSE`."""
    dtype: str = "bfloat16"
    """Dtype of W."""
    factors: str = "float32"
    """Dtype of A, B and the forward pass."""
    std: float = 0.02
    lr: float = 1e-4
    update_ratio: float = 0.5
    steps: int = 400
    rank: int = 16
    scaling: float = 2.0
    shapes: tuple[tuple[int, int], ...] = SHAPES
    feedback: bool = True
    """True: the forward pass uses the W that was written. False: W_0 + D, so that all methods get equal factors."""
    seed: int = 0

    @property
    def coef(self) -> float:
        return self.update_ratio * self.scaling

    @property
    def row(self) -> str:
        """Dtype of W and rounding, as the table names them."""
        dense = f"dense pattern, A and B in {self.factors}" if self.method == DENSE else self.method
        return f"{dense} (control)" if self.dtype == "float32" else dense

    def record(self) -> dict[str, Any]:
        """Return the setting as the JSON file holds it."""
        return asdict(self) | {"shapes": [list(shape) for shape in self.shapes]}


VARIATIONS: dict[str, dict[str, Any]] = {
    "reference": {},
    "reference, same factors": {"feedback": False},
    "W ~ N(0, 0.005)": {"std": 0.005},
    "W ~ N(0, 0.1)": {"std": 0.1},
    "lr 1e-5": {"lr": 1e-5},
    "lr 1e-3": {"lr": 1e-3},
    "update_ratio 2": {"update_ratio": 2.0},
    "4000 steps": {"steps": 4000},
}
"""Changes to the reference setting, one at a time.

The rows with equal factors for all methods show if a rounding is unbiased. A run that sees its own W trains against the
noise of rounding in it. So a part of D is opposite to the noise, and the fraction kept is a little below 1.
"""


def settings(seed: int = 0, quick: bool = False) -> dict[str, list[Setting]]:
    """Return the settings of each variation, in the order of the table."""
    ours = [Setting(method, dtype) for dtype in ("bfloat16", "float16") for method in ROUNDINGS]
    rivals = [Setting(DENSE, "bfloat16", "bfloat16"), Setting(DENSE, "bfloat16"), Setting(DENSE, "float16")]
    groups = {}
    for name, changes in VARIATIONS.items():
        rows = ours if changes else [*ours, *rivals, Setting("nearest", "float32")]
        groups[name] = [replace(row, seed=seed, **changes) for row in rows]
    if quick:
        groups = {name: [replace(s, shapes=QUICK_SHAPES, steps=s.steps // 10) for s in g] for name, g in groups.items()}
    return groups


@dataclass(frozen=True)
class Layer:
    """A frozen W, its factors, and the examples that train them."""

    name: str
    W: Tensor
    A: nn.Parameter
    B: nn.Parameter
    W_0: Tensor
    x: Tensor
    y: Tensor

    def loss(self, batch: Tensor, setting: Setting) -> Tensor:
        """Return the squared error of the examples `batch`."""
        x = self.x[batch]
        W, scaling = self.W, setting.scaling
        if not setting.feedback:  # D is coef * A @ B, as A starts at zero
            W, scaling = self.W_0, scaling + setting.coef
        output = x @ W.to(x.dtype).mT + scaling * (x @ self.B.mT) @ self.A.mT
        return (output - self.y[batch]).square().sum(-1).mean()


def make_layers(setting: Setting, device: torch.device) -> list[Layer]:
    """Make the layers of a setting, equal for every method: random numbers are drawn in float32 on the CPU."""
    generator = torch.Generator().manual_seed(setting.seed)
    return [make_layer(f"{i}: {c} x {d}", c, d, setting, device, generator) for i, (c, d) in enumerate(setting.shapes)]


def make_layer(name: str, c: int, d: int, setting: Setting, device: torch.device, generator: torch.Generator) -> Layer:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W = (normal(c, d) * setting.std).to(getattr(torch, setting.dtype))
    B = (2 * torch.rand(setting.rank, d, generator=generator) - 1) / math.sqrt(d)
    x = normal(EXAMPLES, d) * (0.5 * normal(d)).exp()  # the inputs of a real layer differ in scale too
    Delta = normal(c, setting.rank) @ normal(setting.rank, d) * (TARGET_STD / math.sqrt(setting.rank))
    signal = x @ Delta.mT
    y = x @ W.to(x.dtype).mT + signal + signal.std() * normal(EXAMPLES, c)
    A, B, x, y = (t.to(device, getattr(torch, setting.factors)) for t in (torch.zeros(c, setting.rank), B, x, y))
    W = W.to(device)
    return Layer(name, W, nn.Parameter(A), nn.Parameter(B), W.clone(), x, y)


class Delta:
    """Trains with `DeltaLoRAOptimizer` and the rounding of the setting."""

    def __init__(self, layers: Sequence[Layer], setting: Setting) -> None:
        triples = [LoRATriple(layer.W, layer.A, layer.B, setting.scaling, layer.name) for layer in layers]
        self.optimizer = DeltaLoRAOptimizer(
            torch.optim.AdamW,
            triples,
            lr=setting.lr,
            update_ratio=setting.update_ratio,
            rounding=setting.method,
            rounding_seed=setting.seed,
        )

    def step(self) -> None:
        self.optimizer.step()

    def displacements(self) -> Iterator[Tensor]:
        """Yield D of each layer."""
        for triple in self.optimizer.triples:
            D = self.optimizer.displacement(triple.label)
            yield D.A.double() @ D.B.double()

    def weights(self) -> Iterator[Tensor]:
        """Yield each W together with what compensated rounding has cut off from it."""
        for weight in self.optimizer.weights():
            yield weight.full_part().double()


class DensePattern:
    """Trains as public code does, around an optimizer of the factors."""

    def __init__(self, layers: Sequence[Layer], setting: Setting) -> None:
        self._layers, self._coef = layers, setting.coef
        self._starts = [(layer.A.detach().clone(), layer.B.detach().clone()) for layer in layers]
        self.optimizer = torch.optim.AdamW([f for layer in layers for f in (layer.A, layer.B)], lr=setting.lr)

    def step(self) -> None:
        with torch.no_grad():
            old = [layer.A @ layer.B for layer in self._layers]
        self.optimizer.step()
        with torch.no_grad():
            for layer, AB in zip(self._layers, old, strict=True):
                layer.W.add_(self._coef * (layer.A @ layer.B - AB))

    def displacements(self) -> Iterator[Tensor]:
        """Yield D of each layer, from its first and its present factors."""
        for layer, (A, B) in zip(self._layers, self._starts, strict=True):
            A_now, B_now = layer.A.detach(), layer.B.detach()
            yield self._coef * (A_now.double() @ B_now.double() - A.double() @ B.double())

    def weights(self) -> Iterator[Tensor]:
        """Yield each W; this pattern keeps no remainder."""
        for layer in self._layers:
            yield layer.W.double()


class Drift(NamedTuple):
    """Fraction of a displacement that W kept, and relative error."""

    kept: float
    error: float


def drift(L: Tensor, D: Tensor) -> Drift:
    """Compare L, the displacement of W, with D, the one that was asked for; in float64."""
    L, D = L.double(), D.double()
    return Drift(float((L * D).sum() / (D * D).sum()), float((L - D).norm() / D.norm()))


def checkpoints(steps: int) -> list[int]:
    """Return the steps after which to measure: 1, 2, 5, 10, 20, ... and the last one."""
    marks = (digit * 10**power for power in range(len(str(steps))) for digit in (1, 2, 5))
    return [*(mark for mark in marks if mark < steps), steps]


def train(setting: Setting, device: torch.device) -> dict[str, Any]:
    """Train the layers of a setting; return the measurements at each checkpoint, for each layer."""
    started = time.perf_counter()
    layers = make_layers(setting, device)
    method = (DensePattern if setting.method == DENSE else Delta)(layers, setting)
    schedule = LambdaLR(method.optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / setting.steps)))
    order = torch.Generator().manual_seed(setting.seed + 1)
    marks, rows, losses = checkpoints(setting.steps), [], []
    for step in range(1, setting.steps + 1):
        batch = torch.randint(EXAMPLES, (BATCH,), generator=order).to(device)
        loss = torch.stack([layer.loss(batch, setting) for layer in layers]).sum()
        method.optimizer.zero_grad()
        loss.backward()
        method.step()
        schedule.step()
        if step in marks:
            rows.append({"step": step} | measured(layers, method))
            losses.append(loss.item())
    return {
        "layers": [layer.name for layer in layers],
        "checkpoints": rows,
        "losses": losses,
        "seconds": round(time.perf_counter() - started, 2),
    }


def measured(layers: Sequence[Layer], method: Delta | DensePattern) -> dict[str, list[float]]:
    """Return for each layer: fraction kept, relative error, fraction kept with the remainder, root mean square of D."""
    found: dict[str, list[float]] = {"kept": [], "error": [], "kept_with_remainder": [], "asked_rms": []}
    for layer, D, W in zip(layers, method.displacements(), method.weights(), strict=True):
        landed, whole = (drift(now.double() - layer.W_0.double(), D) for now in (layer.W, W))
        found["kept"].append(landed.kept)
        found["error"].append(landed.error)
        found["kept_with_remainder"].append(whole.kept)
        found["asked_rms"].append(float(D.square().mean().sqrt()))
    return found


class Summary(NamedTuple):
    """Means over the layers of a setting, at one checkpoint."""

    kept: float
    standard_error: float
    worst: str
    worst_kept: float
    error: float
    kept_with_remainder: float

    @property
    def distance(self) -> float:
        """Distance of the fraction kept from 1, in standard errors."""
        if self.kept == 1:
            return 0.0
        return (self.kept - 1) / self.standard_error if self.standard_error else math.copysign(math.inf, self.kept - 1)


def summary(result: Mapping[str, Any], index: int = -1) -> Summary:
    """Summarise a checkpoint of a result. The worst layer is the one that is farthest from 1."""
    row = result["checkpoints"][index]
    kept = row["kept"]
    worst = max(range(len(kept)), key=lambda i: abs(kept[i] - 1))
    return Summary(
        statistics.fmean(kept),
        statistics.stdev(kept) / math.sqrt(len(kept)),
        result["layers"][worst],
        kept[worst],
        statistics.fmean(row["error"]),
        statistics.fmean(row["kept_with_remainder"]),
    )


HEAD = (
    "| setting | W | rounding | kept | distance from 1 | worst layer | relative error | kept, with the remainder |\n"
    "|---|---|---|---|---|---|---|---|"
)


def table_row(name: str, setting: Setting, result: Mapping[str, Any]) -> str:
    """Return the row of a setting, in Markdown; the distance is in standard errors over the layers."""
    s = summary(result)
    digits = decimals(100 * s.standard_error)
    kept = f"{100 * s.kept:.{digits}f} ± {100 * s.standard_error:.{digits}f} %"
    worst = f"{100 * s.worst_kept:.{digits}f} % ({s.worst})"
    remainder = f"{100 * s.kept_with_remainder:.4f} %" if setting.method == "compensated" else ""
    cells = (name, setting.dtype, setting.row, kept, f"{s.distance:+.1f}", worst, f"{s.error:.3g}", remainder)
    return "| " + " | ".join(cells) + " |"


def decimals(error: float) -> int:
    """Return how many decimals show two digits of an error, or one digit of a large one."""
    return min(6, max(1, 1 - math.floor(math.log10(error)))) if 0 < error < math.inf else 1


def environment(device: torch.device) -> dict[str, str]:
    """Return the versions that a result holds for."""
    return {"device": device.type, "torch": torch.__version__, "deltaopt": deltaopt.__version__}


def describe(device: torch.device) -> dict[str, Any]:
    """Return the description of the machine for the file of results."""
    return environment(device) | {
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
    }


class Results:
    """The file of results. It is written after every setting, and read so that no setting is run twice.

    The first write drops results of other settings, versions or devices.
    """

    def __init__(self, path: Path, device: torch.device, wanted: Sequence[Setting], fresh: bool = False) -> None:
        self._path, self._machine, self._environment = path, describe(device), environment(device)
        held = json.loads(path.read_text())["results"] if path.exists() and not fresh else []
        known = {_key(entry["setting"]): entry for entry in held if entry["environment"] == self._environment}
        self._order = [_key(setting.record()) for setting in wanted]
        self._entries = {key: known[key] for key in self._order if key in known}

    def get(self, setting: Setting) -> dict[str, Any] | None:
        return self._entries.get(_key(setting.record()))

    def put(self, setting: Setting, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write a result to the file; return it as the file holds it."""
        found = summary(result)
        entry = {"setting": setting.record(), "environment": self._environment}
        entry |= _rounded({"summary": found._asdict() | {"distance": found.distance}, **result})
        self._entries[_key(entry["setting"])] = entry
        lines = ",\n".join(json.dumps(self._entries[k]) for k in self._order if k in self._entries)
        write_whole(self._path, f'{{"machine": {json.dumps(self._machine)},\n"results": [\n{lines}\n]}}\n')
        return entry


def _key(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _rounded(content: Any) -> Any:
    """Round all floats to eight significant digits, more than the rounding errors of a run leave."""
    if isinstance(content, float):
        return float(f"{content:.8g}")
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    return [_rounded(value) for value in content] if isinstance(content, list) else content


def draw(results: Mapping[Setting, Mapping[str, Any]], path: Path) -> bool:
    """Plot the fraction kept against steps, one panel for each dtype of W; return False if there is no matplotlib."""
    try:
        from matplotlib import pyplot as plt
    except ModuleNotFoundError:
        return False
    dtypes = list(dict.fromkeys(setting.dtype for setting in results))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(9, 3.6), sharey=True, squeeze=False, layout="constrained")
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        axis.axhline(1, color="black", lw=0.8)
        for setting, result in results.items():
            if setting.dtype == dtype:
                steps = [row["step"] for row in result["checkpoints"]]
                found = [summary(result, i) for i in range(len(steps))]
                errors = [s.standard_error for s in found]
                axis.errorbar(steps, [s.kept for s in found], errors, fmt="o-", ms=3, capsize=2, label=setting.method)
        axis.set(title=f"W in {dtype}", xlabel="step", xscale="log")
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="fraction of the displacement kept", ylim=(-0.05, 1.25))
    axes[0, -1].legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def main(arguments: Sequence[str] | None = None, groups: Mapping[str, Sequence[Setting]] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    device = usable_device(options.device, parser)
    if options.threads:
        torch.set_num_threads(options.threads)
    groups = groups or settings(options.seed, options.quick)
    quick = "_quick" if options.quick else ""
    out = options.out or Path(__file__).parent / "results" / f"drift_{device.type}{quick}.json"
    try:
        check_writable(out)
    except OSError as error:
        parser.error(f"--out cannot be written: {error}")
    results = Results(out, device, [setting for group in groups.values() for setting in group], options.fresh)

    print(", ".join(f"{key} {value}" for key, value in describe(device).items()), end=f"\n\n{HEAD}\n")
    found = {}
    for name, group in groups.items():
        for setting in group:
            found[setting] = results.get(setting) or results.put(setting, train(setting, device))
            print(table_row(name, setting, found[setting]), flush=True)
    print(f"\nwritten to {out}")
    longest = max(setting.steps for setting in found)
    plot = out.with_suffix(".png")
    drawn = draw({setting: result for setting, result in found.items() if setting.steps == longest}, plot)
    print(f"and {plot}" if drawn else "no plot: matplotlib is not installed")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small layers and a tenth of the steps")
    parser.add_argument("--fresh", action="store_true", help="run settings again that the file of results holds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, examples and rounding noise (default 0)")
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/drift_<device>.json; the plot is next to it"
    )
    return parser


if __name__ == "__main__":
    main()
