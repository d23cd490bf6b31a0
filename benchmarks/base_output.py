"""What the base by itself costs: a training step with the hooks and without, and a pass for the base's output.

Two equal models train in turn, one without the hooks, so that noise and drift of the machine affect both alike; ratios
are formed within a round. A pass for the base's output (the adapter disabled, after W has moved) is compared with one
that has the adapter: the correction stands in for the branch.

    python -m benchmarks.base_output [--rounds N] [--threads N] [--targets query,value] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from benchmarks.finetune import default_model
from benchmarks.machine import cpu_name
from benchmarks.unfinished import check_writable, write_whole
from deltaopt import DeltaLoRAOptimizer
from deltaopt.base_hooks import OutputHook

ROWS, TOKENS, CLASSES = 16, 64, 12
WARM_UP_ROUNDS = 3


def adapted(targets: list[str]) -> tuple[nn.Module, DeltaLoRAOptimizer]:
    """Build the model of the demo with an adapter, and its optimizer in place."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(default_model(), num_labels=CLASSES)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=["classifier"])
    model = peft.get_peft_model(model, config)
    return model, DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-3, update_ratio=2.0)


def without_hooks(model: nn.Module, optimizer: DeltaLoRAOptimizer) -> int:
    """Take the hooks off, and let the optimizer do without them; return how many there were."""
    count = 0
    for module in model.modules():
        for hook in [hook for hook in module._forward_hooks.values() if isinstance(hook, OutputHook)]:
            hook.take_off()
            count += 1
    for triple in optimizer.triples:
        triple.output_hook = None
    return count


def timed(call: Callable[[], object]) -> float:
    """Return how long a call took, in ms."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure(targets: list[str], rounds: int) -> dict[str, Any]:
    """Return the medians of all rounds."""
    models = {"with": adapted(targets), "without": adapted(targets)}
    hooks = without_hooks(*models["without"])
    ids, labels = torch.randint(1000, 20000, (ROWS, TOKENS)), torch.randint(0, CLASSES, (ROWS,))

    def step(key: str) -> None:
        model, optimizer = models[key]
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def policy(key: str) -> Tensor:
        return models[key][0](input_ids=ids).logits

    def base(key: str) -> None:
        with models[key][0].disable_adapter():
            policy(key)

    calls = {
        "step_with": lambda: step("with"),
        "step_without": lambda: step("without"),
        "policy": lambda: policy("without"),
        "plain_base": lambda: base("without"),
        "base_by_itself": lambda: base("with"),
    }
    for _ in range(WARM_UP_ROUNDS):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            times[name].append(timed(calls[name]))
    medians = {name: median(found) for name, found in times.items()}
    ratios = [a / b for a, b in zip(times["step_with"], times["step_without"], strict=True)]
    return {
        "targets": targets,
        "hooks": hooks,
        "rounds": rounds,
        "ms": {name: round(value, 2) for name, value in medians.items()},
        "training step with hooks / without": round(median(ratios), 4),
        "base by itself / policy": round(medians["base_by_itself"] / medians["policy"], 3),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write one result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--targets", default="query,value", help="names of the layers with an adapter")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    if options.out is not None:
        try:
            check_writable(options.out)
        except OSError as error:
            parser.error(f"--out cannot be written: {error}")
    torch.set_num_threads(options.threads)
    result = measure(options.targets.split(","), options.rounds)
    result |= {"threads": options.threads, "cpu": cpu_name(), "python": platform.python_version()}
    result |= {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        write_whole(options.out, text + "\n")


if __name__ == "__main__":
    main()
