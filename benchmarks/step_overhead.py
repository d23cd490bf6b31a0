"""Time and memory of the update of W, compared with the patterns of public code.

Each row of `ROWS` builds one function for a case, a number of equal layers. The functions are called in turn. Each
round shuffles their order, so that noise and drift of the machine affect all of them alike; ratios are formed within a
round. Before each call the caches are filled with other memory, as the forward and backward pass of a training step
would do. Each row has its own factors and optimizer, and all share the weights, but for those of our optimizers: these
refuse weights that another one moves.

    python -m benchmarks.step_overhead [--device cuda] [--rounds N] [--threads N] [--out FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.machine import cpu_name, usable_device
from benchmarks.memory import peak_allocation
from benchmarks.unfinished import Unfinished, check_writable, write_whole
from deltaopt import DeltaLoRAOptimizer, LoRATriple
from deltaopt.factor_buffers import factored_delta
from deltaopt.in_place import delta_lora_
from deltaopt.rounding.batch import fused_kernel
from deltaopt.rounding.blocks import Scratch
from deltaopt.rounding.noise import Keys, label_hashes, noise_factors

UPDATE_RATIO = 2.0
SCALING = 1.0
COEF = UPDATE_RATIO * SCALING
LEARNING_RATE = 1e-4
SMALL = 1e-4
"""A factor for products alone: W is added to in every round and stays finite."""
WARM_UP_ROUNDS = 2
TOKENS = 256
"""Rows of the input of a whole training step: few, so that the cost of the optimizer weighs more than in practice."""
FLUSH_BYTES = 128 << 20
"""More than the last-level cache of the machines it was written for (CPU: 32 MiB, GPU: 50 MiB)."""


@dataclass(frozen=True)
class Case:
    """Equal LoRA layers: `count` weights of c x d in `dtype`, factors of `rank` in float32 (PEFT's default)."""

    name: str
    count: int
    c: int
    d: int
    rank: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {self.count} x ({self.c} x {self.d}), r = {self.rank}, W in {dtype}"


SHAPES = (
    ("RoBERTa-base q, v", 24, 768, 768, 8),
    ("GPT-2 Medium q, v", 48, 1024, 1024, 4),
    ("4096 x 4096", 8, 4096, 4096, 16),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = tuple(Case(*shape, dtype) for shape in SHAPES for dtype in DTYPES)


@dataclass(frozen=True)
class Layers:
    """The tensors of a case; the factors hold gradients, so every inner step changes them."""

    W: list[Tensor]
    A: list[nn.Parameter]
    B: list[nn.Parameter]

    @property
    def factors(self) -> list[nn.Parameter]:
        return [*self.A, *self.B]

    def __iter__(self):
        return zip(self.W, self.A, self.B, strict=True)


def make_weights(case: Case, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [
        (torch.randn(case.c, case.d, generator=generator, device=device) * 0.02).to(case.dtype)
        for _ in range(case.count)
    ]


def make_layers(case: Case, weights: list[Tensor]) -> Layers:
    """Make layers of the given weights and of new factors, which are equal from call to call."""
    device = weights[0].device
    generator = torch.Generator(device).manual_seed(1)

    def factor(*shape: int) -> nn.Parameter:
        made = nn.Parameter(torch.randn(*shape, generator=generator, device=device) * 0.02)
        made.grad = torch.randn(*shape, generator=generator, device=device) * 1e-3
        return made

    A = [factor(case.c, case.rank) for _ in weights]
    B = [factor(case.rank, case.d) for _ in weights]
    return Layers(weights, A, B)


@dataclass(frozen=True)
class Row:
    """One thing to measure: `run` does it once; `buffer_bytes` returns the memory it keeps from step to step."""

    run: Callable[[], object]
    buffer_bytes: Callable[[], int] = lambda: 0


def inner_row(layers: Layers) -> Row:
    return Row(_inner(layers).step)


def wrapped_row(layers: Layers, rounding: str = "auto") -> Row:
    triples = [LoRATriple(*layer, scaling=SCALING, name=str(i)) for i, layer in enumerate(layers)]
    optimizer = DeltaLoRAOptimizer(
        torch.optim.AdamW, triples, update_ratio=UPDATE_RATIO, rounding=rounding, lr=LEARNING_RATE
    )
    return _keeping_row(optimizer.step, optimizer)


def backward_row(layers: Layers, folded: bool = False) -> Row:
    """Let autograd bring gradients to the factors, then step: plain LoRA, or the folded mode.

    The folded mode divides the gradients on their way, and its step checks the factors before the inner step.
    """
    gradients = [factor.grad for factor in layers.factors]
    optimizer, _ = _lora(layers, folded)

    def run() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(layers.factors, gradients)
        optimizer.step()

    return _keeping_row(run, optimizer)


def training_row(layers: Layers, folded: bool = False) -> Row:
    """Do a whole training step of plain LoRA or of the folded mode: all layers on one input, backward pass, step."""
    optimizer, scaling = _lora(layers, folded)
    W = layers.W[0]
    generator = torch.Generator(W.device).manual_seed(2)
    x = torch.randn(TOKENS, W.shape[1], generator=generator, device=W.device).requires_grad_()  # as within a network

    def run() -> None:
        optimizer.zero_grad()
        x.grad = None
        outputs = [x @ W.mT + scaling * (x @ B.mT @ A.mT) for W, A, B in layers]
        torch.stack([output.square().mean() for output in outputs]).sum().backward()
        optimizer.step()

    return _keeping_row(run, optimizer)


def addmm_row(layers: Layers) -> Row:
    """Add only the products, of prepared factors in W's dtype: the least that the update can cost."""
    factors = [
        (torch.cat([A, A], dim=1).detach().to(W.dtype), torch.cat([B, B]).detach().to(W.dtype)) for W, A, B in layers
    ]

    def run() -> None:
        for W, (U, V) in zip(layers.W, factors, strict=True):
            W.addmm_(U, V, alpha=SMALL)

    return Row(run)


class _Product(NamedTuple):
    """W += SMALL * U @ V, with what compensated rounding has cut off from W."""

    W: Tensor
    U: Tensor
    V: Tensor
    compensation: Tensor | None


def write_row(layers: Layers, rounding: str = "stochastic") -> Row:
    """Add only the products, of prepared float32 factors, and round as the optimizer does.

    On CUDA the fused kernel does it, elsewhere blocks of torch operations.
    """
    device = layers.W[0].device
    hashes = label_hashes([str(i) for i in range(len(layers.W))], ())
    keys = Keys.of(0, "move", 0) if rounding == "stochastic" else None
    products = []
    for W, A, B in layers:
        U, V = factored_delta((A.detach(), B.detach()), (1.5 * A.detach(), 2.0 * B.detach()))  # 2 A B
        kept = torch.zeros_like(W, dtype=torch.int16) if rounding == "compensated" else None
        products.append(_Product(W, U, V, kept))
    kernel = fused_kernel(device)
    if kernel is not None:
        batch = kernel.Batch([kernel.Product(*p, int(hashes[i]), i) for i, p in enumerate(products)])
        keep = torch.ones(len(products), dtype=torch.bool, device=device)
        return Row(lambda: batch.add_([SMALL] * len(products), keep, keys))

    def run() -> None:
        scratch = Scratch()  # the weights of a step share their blocks
        noises = None if keys is None else noise_factors(keys, hashes.to(device), *layers.W[0].shape)
        for i, (W, U, V, kept) in enumerate(products):
            noise = None if noises is None else (noises[0][i], noises[1][i])
            delta_lora_(W, U, V, SMALL, noise, kept, scratch)

    return Row(run)


def pass_row(layers: Layers) -> Row:
    """Read and write every W once."""

    def run() -> None:
        for W in layers.W:
            W.mul_(1.0)

    return Row(run)


def dense_row(layers: Layers) -> Row:
    """Do the first pattern of public code: clones of the factors, two dense products and their difference.

    As in such code, there is no cast for a 16-bit W: torch promotes the sum to float32 and rounds it.
    """
    inner = _inner(layers)

    @torch.no_grad()
    def run() -> None:
        old = [(A.clone(), B.clone()) for _, A, B in layers]
        inner.step()
        for (W, A, B), (A_old, B_old) in zip(layers, old, strict=True):
            W += COEF * (A @ B - A_old @ B_old)

    return Row(run)


def product_row(layers: Layers) -> Row:
    """Do the second pattern of public code: keep the dense product from before the step. 16 bits as in `dense_row`."""
    inner = _inner(layers)

    @torch.no_grad()
    def run() -> None:
        old = [A @ B for _, A, B in layers]
        inner.step()
        for (W, A, B), AB in zip(layers, old, strict=True):
            W += COEF * (A @ B - AB)

    return Row(run)


def _inner(layers: Layers) -> torch.optim.Optimizer:
    return torch.optim.AdamW(layers.factors, lr=LEARNING_RATE)


def _lora(layers: Layers, folded: bool) -> tuple[torch.optim.Optimizer, Tensor]:
    """Return the optimizer (plain LoRA or folded mode) after its first step, and the scaling of the branches."""
    scaling = torch.tensor(SCALING, device=layers.W[0].device)
    optimizer = _inner(layers)
    if folded:
        triples = [LoRATriple(*layer, scaling=scaling, name=str(i)) for i, layer in enumerate(layers)]
        optimizer = DeltaLoRAOptimizer(
            torch.optim.AdamW, triples, update_ratio=UPDATE_RATIO, lr=LEARNING_RATE, weight_update="folded"
        )
    optimizer.step()  # folds: W is written here and never after
    return optimizer, scaling


def _keeping_row(run: Callable[[], object], optimizer: torch.optim.Optimizer) -> Row:
    return Row(run, lambda: optimizer.buffer_bytes if isinstance(optimizer, DeltaLoRAOptimizer) else 0)


ROWS: dict[str, Callable[[Layers], Row]] = {
    "inner": inner_row,
    "lora": backward_row,
    "folded": partial(backward_row, folded=True),
    "training": training_row,
    "folded_training": partial(training_row, folded=True),
    "wrapped": wrapped_row,
    "nearest": partial(wrapped_row, rounding="nearest"),
    "compensated": partial(wrapped_row, rounding="compensated"),
    "addmm": addmm_row,
    "write": write_row,
    "write_nearest": partial(write_row, rounding="nearest"),
    "write_compensated": partial(write_row, rounding="compensated"),
    "pass": pass_row,
    "dense": dense_row,
    "product": product_row,
}
"""The rows to measure. To add one, add an entry here, and one in `RATIOS` for each comparison."""

NARROW = ("nearest", "compensated", "write", "write_nearest", "write_compensated")
"""The rows for 16-bit weights only: rounding changes nothing for the others."""

WIDE = ("training", "folded_training")
"""The rows for float32 weights only: other dtypes change the matrix products of the model, and nothing in deltaopt."""

CLAIMING = ("folded", "folded_training", "wrapped", "nearest", "compensated")
"""The rows with an optimizer of ours, which gets weights of its own."""

PARTS = (
    *("inner", "lora", "folded", "training", "folded_training"),
    *("addmm", "pass", "write", "write_nearest", "write_compensated"),
)
"""The rows that do a part of the step's work, or leave W alone. The tests compare W of the other rows with ours."""

RATIOS: dict[str, Callable[[Mapping[str, float]], float]] = {
    "folded / lora": lambda ms: ms["folded"] / ms["lora"],
    "folded_training / training": lambda ms: ms["folded_training"] / ms["training"],
    "(wrapped - inner) / addmm": lambda ms: (ms["wrapped"] - ms["inner"]) / ms["addmm"],
    "(wrapped - inner) / pass": lambda ms: (ms["wrapped"] - ms["inner"]) / ms["pass"],
    "write / addmm": lambda ms: ms["write"] / ms["addmm"],
    "write / write_nearest": lambda ms: ms["write"] / ms["write_nearest"],
    "write / pass": lambda ms: ms["write"] / ms["pass"],
    "write_compensated / addmm": lambda ms: ms["write_compensated"] / ms["addmm"],
    "write_compensated / pass": lambda ms: ms["write_compensated"] / ms["pass"],
    "(dense - inner) / (wrapped - inner)": lambda ms: (ms["dense"] - ms["inner"]) / (ms["wrapped"] - ms["inner"]),
    "(product - inner) / (wrapped - inner)": lambda ms: (ms["product"] - ms["inner"]) / (ms["wrapped"] - ms["inner"]),
}
"""The ratios: each is formed from the times of one round, then summarised over the rounds."""


def rows_of(case: Case) -> dict[str, Callable[[Layers], Row]]:
    """Return the rows that are measured for a case."""
    absent = WIDE if case.dtype.itemsize == 2 else NARROW
    return {name: row for name, row in ROWS.items() if name not in absent}


def ratios_of(case: Case) -> dict[str, Callable[[Mapping[str, float]], float]]:
    """Return the ratios whose rows are measured for a case."""
    absent = ROWS.keys() - rows_of(case).keys()
    return {name: ratio for name, ratio in RATIOS.items() if not absent & set(name.split(" / "))}


def measure(case: Case, device: torch.device, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Measure time and memory of every row for one case."""
    weights = make_weights(case, device)
    rows = {
        name: build(make_layers(case, [W.clone() for W in weights] if name in CLAIMING else weights))
        for name, build in rows_of(case).items()
    }
    flush = torch.zeros(FLUSH_BYTES // 4, device=device)
    for _ in range(WARM_UP_ROUNDS):
        for row in rows.values():
            row.run()
    peaks = {name: peak_allocation(row.run, device) for name, row in rows.items()}
    times = _interleaved_times(rows, flush, rounds, random.Random(seed))
    return {
        "case": asdict(case) | {"dtype": str(case.dtype)},
        "rows": {
            name: _spread([ms[name] for ms in times])
            | {"peak_extra_bytes": peaks[name], "buffer_bytes": row.buffer_bytes()}
            for name, row in rows.items()
        },
        "ratios": {name: _spread([ratio(ms) for ms in times]) for name, ratio in ratios_of(case).items()},
    }


def _interleaved_times(
    rows: Mapping[str, Row], flush: Tensor, rounds: int, order: random.Random
) -> list[dict[str, float]]:
    names = list(rows)
    times = []
    for _ in range(rounds):
        order.shuffle(names)
        measured = {}
        for name in names:
            flush.sum()  # read, not written: the measured call would pay for writing dirty lines back
            measured[name] = _milliseconds(rows[name].run, flush.device)
        times.append(measured)
    return times


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize(device)
    return begin_event.elapsed_time(end_event)


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    )
    return {"median": middle.item(), "p10": low.item(), "p90": high.item()}


def describe(device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the settings and the machine, for the file of results."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "warm_up_rounds": WARM_UP_ROUNDS,
        "update_ratio": UPDATE_RATIO,
        "scaling": SCALING,
        "lr": LEARNING_RATE,
        "inner": "torch.optim.AdamW",
        "flush_bytes": FLUSH_BYTES,
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(case: Case, result: Mapping[str, Any]) -> str:
    """Return one case as printed: milliseconds, MiB, and the ratios below; the spread is 10 % to 90 %."""
    lines = [str(case), f"  {'row':<18}{'median ms':>11}{'spread':>19}{'peak extra MiB':>16}{'buffers MiB':>13}"]
    for name, row in result["rows"].items():
        spread = f"{row['p10']:.2f} .. {row['p90']:.2f}"
        memory = f"{row['peak_extra_bytes'] / 2**20:>16.2f}{row['buffer_bytes'] / 2**20:>13.2f}"
        lines.append(f"  {name:<18}{row['median']:>11.2f}{spread:>19}{memory}")
    for name, ratio in result["ratios"].items():
        lines.append(f"  {name:<40}{ratio['median']:>8.2f}  ({ratio['p10']:.2f} .. {ratio['p90']:.2f})")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] = CASES) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=15, help="measured calls of each row (default 15)")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU (default: torch's own choice)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/step_overhead_<device>.json")
    options = parser.parse_args(arguments)
    device = usable_device(options.device, parser)
    if options.threads:
        torch.set_num_threads(options.threads)

    settings = describe(device, options.rounds)
    out = options.out or Path(__file__).parent / "results" / f"step_overhead_{device.type}.json"
    lasting = {name: value for name, value in settings.items() if name != "load_average"}
    try:
        check_writable(out)
        unfinished = Unfinished(out.with_suffix(".unfinished.json"), lasting)
    except OSError as error:
        parser.error(f"--out cannot be written: {error}")
    print(
        ", ".join(
            f"{key} {settings[key]}" for key in ("device_name", "threads", "rounds", "load_average", "torch", "python")
        )
    )
    results = []
    for case in cases:
        held = unfinished.get(str(case))
        if held is None:
            held = measure(case, device, options.rounds)
            unfinished.put(str(case), held)
        results.append(held)
        print("\n" + table(case, held), flush=True)
        gc.collect()  # the optimizers' reference cycles hold this case's tensors

    write_whole(out, json.dumps({"settings": settings, "cases": results}, indent=2) + "\n")
    unfinished.finish()
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
