"""Time and memory of everything around the steps: building the optimizer, its first step, saving, the base.

The model is a Llama of 271 M parameters in float32 with LoRA of rank 8 on all seven projections of 16 layers, so that
112 weights move. Each run is a process of its own with a fresh model, and the table has the medians of all runs. Times
are of the processor, which other work on the machine disturbs less than a clock.

    python -m benchmarks.first_use [--runs N] [--threads N] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import cpu_name
from deltaopt import DeltaLoRAOptimizer, find_triples

RANK = 8
LAYERS = 16
HIDDEN = 1024
INTERMEDIATE = 4096
TOKENS = 32
LATER_STEPS = 5
SMALL_TRIPLES = 300
SMALL_SIDE = 16
SMALL_RANK = 2
SMALL_STEPS = 20
REPEATS = 3
"""Of events that leave everything as it was."""
HERE = Path(__file__).parent
ROWS = {
    "find_triples": "`find_triples(model)`",
    "for_model": "`DeltaLoRAOptimizer.for_model(model, AdamW)`, with `find_triples`",
    "prepare": "`accelerator.prepare(optimizer)` before the first step",
    "first_step": "the first step",
    "later_step": "a later step",
    "inner_step": "a step of AdamW alone",
    "state_dict": "`state_dict()`",
    "load_state_dict": "`load_state_dict(state)`, the model being where it was saved",
    "prepare_again": "`accelerator.prepare(optimizer)` after some steps",
    "deepcopy": "`copy.deepcopy(optimizer)`, with A, B and W",
    "save_adapter": "`save_adapter(...)`",
    "base_weights": '`base_weights(method="copy")`, entered and left',
    "base_hooks": '`base_weights(method="hooks")`, entered and left',
    "enabled": f"a forward pass of {TOKENS} tokens",
    "disabled": "the same in `model.disable_adapter()`: the hooks leave the movement out",
}


class Times:
    """Seconds of the processor, by row."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def of(self, row: str) -> Iterator[None]:
        """Time what is within as one repetition of a row."""
        begin = time.process_time()
        yield
        self.seconds.setdefault(row, []).append(time.process_time() - begin)

    def medians(self) -> dict[str, float]:
        """Return the median of each row."""
        return {row: statistics.median(seconds) for row, seconds in self.seconds.items()}


def llama() -> nn.Module:
    """Return the model, its LoRA with a product that is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=128,
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=RANK, lora_alpha=16, lora_dropout=0.0, target_modules=names, init_lora_weights=False)
    model: nn.Module = get_peft_model(LlamaForCausalLM(config), lora)
    return model.eval()


def give_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter a gradient, so that a step changes all of them."""
    generator = torch.Generator().manual_seed(1)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3


def measure() -> dict[str, Any]:
    """Meet the optimizer as a user does, once; return seconds by row, and bytes."""
    from accelerate import Accelerator

    from deltaopt.integrations.peft import save_adapter

    times, model = Times(), llama()
    accelerator = Accelerator(cpu=True)
    for _ in range(REPEATS):
        with times.of("find_triples"):
            find_triples(model)
    with times.of("for_model"):
        optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-4, update_ratio=2.0)
    with times.of("prepare"):
        accelerator.prepare(optimizer)
    give_gradients(optimizer)
    with times.of("first_step"):
        optimizer.step()
    for _ in range(LATER_STEPS):
        with times.of("later_step"):
            optimizer.step()
    for _ in range(REPEATS):
        with times.of("state_dict"):
            state = optimizer.state_dict()
        with times.of("load_state_dict"):
            optimizer.load_state_dict(state)
    with times.of("prepare_again"):
        accelerator.prepare(optimizer)
    optimizer.step()
    for _ in range(REPEATS):
        with times.of("base_weights"), optimizer.base_weights(method="copy"):
            pass
        with times.of("base_hooks"), optimizer.base_weights(method="hooks"):
            pass
    tokens = torch.arange(TOKENS).unsqueeze(0)
    with torch.no_grad():
        for _ in range(REPEATS):
            with times.of("enabled"):
                model(tokens)
            with model.disable_adapter(), times.of("disabled"):  # type: ignore[operator]
                model(tokens)
    with tempfile.TemporaryDirectory() as folder, times.of("save_adapter"):
        save_adapter(model, optimizer, folder)
    with times.of("deepcopy"):
        copy.deepcopy(optimizer)
    factors = [p for group in optimizer.param_groups for p in group["params"]]
    inner = torch.optim.AdamW(factors, lr=1e-4)
    for _ in range(LATER_STEPS):
        with times.of("inner_step"):
            inner.step()
    return {
        "seconds": times.medians(),
        "bytes": {
            "W": sum(triple.W.nbytes for triple in optimizer.triples),
            "factors": sum(factor.nbytes for factor in factors),
            "AdamW": 2 * sum(factor.nbytes for factor in factors),
            "buffers": optimizer.buffer_bytes,
            "state": sum(len(v) for s in state["state"].values() for v in s.values() if isinstance(v, str)),
        },
        "small": {name: 1e6 * seconds for name, seconds in small_steps().items()},
    }


def small_steps() -> dict[str, float]:
    """Return seconds of a triple and step for many tiny triples, with the update and of AdamW alone."""
    generator = torch.Generator().manual_seed(2)

    def made(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=generator))

    triples = [
        (made(SMALL_SIDE, SMALL_SIDE).requires_grad_(False), made(SMALL_SIDE, SMALL_RANK), made(SMALL_RANK, SMALL_SIDE))
        for _ in range(SMALL_TRIPLES)
    ]
    found = {}
    wrapped = DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=1e-4)
    inner = torch.optim.AdamW([factor for _, A, B in triples for factor in (A, B)], lr=1e-4)
    for name, optimizer in (("wrapped", wrapped), ("inner", inner)):
        give_gradients(optimizer)
        found[name] = _median_time(optimizer.step) / SMALL_TRIPLES
    return found


def _median_time(call: Callable[[], object]) -> float:
    times = Times()
    call()
    for _ in range(SMALL_STEPS):
        with times.of("call"):
            call()
    return times.medians()["call"]


def in_processes(runs: int, threads: int) -> list[dict[str, Any]]:
    """Measure in processes of their own, one after the other."""
    command = [sys.executable, "-m", "benchmarks.first_use", "--once", "--threads", str(threads)]
    found = []
    for _ in range(runs):
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE.parent)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each number of all runs, with the lowest and the highest."""
    return {
        kind: {
            name: {
                "median": statistics.median(run[kind][name] for run in runs),
                "low": min(run[kind][name] for run in runs),
                "high": max(run[kind][name] for run in runs),
            }
            for name in runs[0][kind]
        }
        for kind in runs[0]
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "first_use.json")
    parser.add_argument("--once", action="store_true", help="measure in this process and print the numbers alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.once:
        print(json.dumps(measure()))
        return
    settings = {
        "runs": options.runs,
        "threads": options.threads,
        "device_name": cpu_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }
    found = {"settings": settings, **summary(in_processes(options.runs, options.threads))}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in ROWS:
        print(f"{row:16} {1e3 * found['seconds'][row]['median']:9.1f} ms")


if __name__ == "__main__":
    main()
