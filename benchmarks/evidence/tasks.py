"""A task opened for one run: its batches, its loss, its evaluation, and the texts that it writes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.evidence import decoding
from benchmarks.evidence.catalogue import TASKS, Task, task_named
from benchmarks.evidence.examples import load_examples
from benchmarks.evidence.metrics import measure
from benchmarks.evidence.models import load_tokenizer
from benchmarks.evidence.places import Places
from benchmarks.evidence.setting import Setting
from benchmarks.evidence.tokens import IGNORED, Ragged, Side, Tokens, load_tokens

__all__ = ["TASKS", "OpenTask", "open_task"]

EVALUATED_TOKENS = 4096
"""Tokens of a batch that is evaluated, its padding included."""


def open_task(setting: Setting, places: Places, device: torch.device | str) -> OpenTask:
    """Return the task of a run.

    Raises:
        ValueError, OSError, ModuleNotFoundError: if the task, its data or the model's tokenizer cannot be used; the
            message says what to do.
    """
    examples = load_examples(setting, places)
    tokens = load_tokens(setting, places)
    tokenizer = load_tokenizer(setting, places)
    task = task_named(setting.task)
    return OpenTask(setting, task, tokens, tokenizer, examples.labels, examples.fingerprint, torch.device(device))


class OpenTask:
    """A task with the examples of one setting.

    Whoever evaluates puts the model in evaluation mode and in the precision of the setting.

    Attributes:
        labels: classes, 1 for regression, None where texts are written.
        fingerprint: of the examples.
        metric: the main metric of `evaluate`, by which the learning rate is tuned.
    """

    def __init__(
        self,
        setting: Setting,
        task: Task,
        tokens: Tokens,
        tokenizer: Any,
        labels: int | None,
        fingerprint: str,
        device: torch.device,
    ) -> None:
        self.labels, self.fingerprint, self.metric = labels, fingerprint, task.metric
        self._setting, self._task, self._tokens, self._tokenizer = setting, task, tokens, tokenizer
        self._device = device

    def training_batches(self, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yield batches without end: every example once before any comes again, in an order from the seed alone.

        Args:
            start: leave out so many at the beginning.
        """
        side, size = self._tokens.train, self._setting.batch_size
        generator = torch.Generator().manual_seed(self._setting.seed)
        order = torch.empty(0, dtype=torch.long)
        while True:
            while len(order) < size:
                order = torch.cat((order, torch.randperm(len(side), generator=generator)))
            rows, order = order[:size], order[size:]
            if start > 0:
                start -= 1
            else:
                yield self._batch(side, rows)

    def loss(self, output: Any, labels: Tensor) -> Tensor:
        """Return the training loss of a model's output: smoothed cross entropy, or squared error."""
        return self._loss(output.logits, labels, self._setting.label_smoothing)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return "loss", the mean cross entropy without smoothing or the squared error, and the task's metrics."""
        if self._task.writes:
            return {"loss": self._token_loss(model)}
        found, expected, rows = [], [], []
        for numbers, batch in self._evaluated:
            labels = batch["labels"]
            found.append(self._logits(model, batch).float())
            expected.append(labels)
            rows += numbers
        logits, labels = torch.cat(found).cpu(), torch.cat(expected).cpu()
        parts = [self._tokens.parts[row] for row in rows]
        metrics = {}
        for ending in sorted(set(parts)):  # "" is the first
            here = torch.tensor([part == ending for part in parts])
            metrics |= {
                f"{name}_{ending}" if ending else name: value
                for name, value in self._metrics(logits[here], labels[here]).items()
            }
        return metrics

    @torch.no_grad()
    def generate(self, model: Any) -> list[str] | None:
        """Return what the model writes for each evaluated input, in order; None for tasks that write no texts."""
        if self._tokens.end is None:
            return None
        setting, tokens = self._setting, self._tokens
        new_tokens = setting.new_tokens or tokens.longest
        return decoding.write(model, tokens.prompts, self._tokenizer, setting, tokens.end, new_tokens, self._device)

    def _batch(self, side: Side, rows: Tensor) -> dict[str, Tensor]:
        """Return the examples of these numbers on the device."""
        batch = {}
        for name, column in side.columns.items():
            batch[name], mask = column.padded(rows, 0 if name == "token_type_ids" else self._tokenizer.pad_token_id)
            # A decoder never looks to the right, where the padding is: it needs no mask.
            if name == "input_ids" and self._task.kind != "continue":
                batch["attention_mask"] = mask.long()
        labels = side.labels
        batch["labels"] = labels.padded(rows, IGNORED)[0] if isinstance(labels, Ragged) else labels[rows]
        return {name: self._moved(tensor) for name, tensor in batch.items()}

    def _moved(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    @functools.cached_property
    def _evaluated(self) -> list[tuple[list[int], dict[str, Tensor]]]:
        """The evaluated examples in batches of like length, each with the examples' numbers."""
        side = self._tokens.evaluated
        lengths = side.columns["input_ids"].lengths.tolist()
        batches: list[list[int]] = [[]]
        for row in sorted(range(len(side)), key=lambda row: (-lengths[row], row)):
            if batches[-1] and (len(batches[-1]) + 1) * lengths[batches[-1][0]] > EVALUATED_TOKENS:
                batches.append([])
            batches[-1].append(row)
        return [(rows, self._batch(side, torch.tensor(rows))) for rows in batches]

    def _logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        return logits

    def _loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        if self._task.kind == "regress":
            return F.mse_loss(logits.squeeze(-1).float(), labels, reduction=reduction)
        return F.cross_entropy(
            logits.flatten(0, -2).float(),
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=smoothing,
            reduction=reduction,
        )

    def _token_loss(self, model: nn.Module) -> float:
        sums = []
        for _, batch in self._evaluated:
            labels = batch["labels"]
            loss = self._loss(self._logits(model, batch), labels, reduction="sum")
            sums.append(torch.stack((loss.double(), (labels != IGNORED).sum().double())))
        total, count = torch.stack(sums).sum(0).tolist()
        return total / count

    def _metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        predicted = logits.squeeze(-1) if self._task.kind == "regress" else logits.argmax(-1)
        return {"loss": self._loss(logits, labels).item()} | measure(self._task.metrics, predicted, labels)
