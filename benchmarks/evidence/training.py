"""Train one setting, in as many calls as it takes, and measure it. Every method trains by this loop."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.evidence import forgetting
from benchmarks.evidence.catalogue import task_named
from benchmarks.evidence.methods import prepare
from benchmarks.evidence.models import load_model, load_tokenizer
from benchmarks.evidence.places import Places
from benchmarks.evidence.prepared import Prepared
from benchmarks.evidence.result import Result
from benchmarks.evidence.setting import Setting
from benchmarks.evidence.tasks import OpenTask, open_task
from benchmarks.finetune import random_state, set_random_state
from deltaopt import load, save

STRETCH = 10
"""Steps whose training loss is one point of the curve. The losses leave the device so often, and no oftener."""

OWN_TEXTS = 64
"""Texts of the pretrained model by which forgetting is measured."""


_before: dict[tuple[Any, ...], float] = {}
"""Losses of pretrained models on their own texts, measured once a process: with a large model one takes a minute."""


class DeadlineError(Exception):
    """The time of the call is up; the run is in its checkpoint."""


@dataclass
class Limits:
    """When a call has to end, as `time.monotonic()`, and where the run that it cuts short is kept.

    Who writes the result removes the checkpoint.

    A checkpoint of other data or of another commit is not continued.
    """

    deadline: float = math.inf
    checkpoint: Path | None = None
    commit: str = ""


@dataclass
class Progress:
    """What a run has measured so far, and what a checkpoint keeps of it."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    before: float | None = None
    diverged: bool = False


def run(setting: Setting, places: Places, device: str, limits: Limits | None = None) -> Result:
    """Train one setting, from its checkpoint if an earlier call was cut short, and return what it measured.

    Args:
        setting: of the run.
        places: of data and models.
        device: "cpu", "cuda" or "cuda:1".
        limits: of the call. Default: none.

    Raises:
        DeadlineError: if the time of the call is up first; the checkpoint holds the run.
        ValueError, OSError: if data or model cannot be used.
    """
    limits = limits or Limits()
    gc.collect()  # the model of the run before
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    task = open_task(setting, places, device)
    model = load_model(setting, places, task.labels)
    with _attention(setting, device):
        texts = _own_texts(setting, places, model, limits)
        trainer = Trainer(setting, prepare(setting, model.to(device)), task, device, texts)
        progress = trainer.finish(limits)

        result = Result(setting, data=task.fingerprint, diverged=progress.diverged, losses=progress.losses)
        result.seconds = progress.seconds
        result.step_seconds = statistics.median(progress.step_seconds) if progress.step_seconds else 0.0
        result.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        result.total = sum(p.numel() for p in model.parameters())
        if not progress.diverged:
            with trainer.evaluating() as evaluated:
                result.metrics = task.evaluate(evaluated)
                result.texts = task.generate(evaluated) if trainer.writes else None
                if progress.before is not None:
                    result.forgetting = (progress.before, forgetting.text_loss(evaluated, texts))
            result.layers = [change._asdict() for change in trainer.prepared.changes()]
    result.peak_bytes = torch.cuda.max_memory_allocated(device) if cuda else None
    return result


class Trainer:
    """One model in training."""

    def __init__(
        self, setting: Setting, prepared: Prepared, task: OpenTask, device: str, texts: forgetting.Texts | None = None
    ) -> None:
        self.setting, self.prepared, self.task, self.device = setting, prepared, task, device
        self.texts = texts or []
        self.writes = setting.split == "test" and task_named(setting.task).writes
        self.trained = [p for p in prepared.model.parameters() if p.requires_grad]
        self.scheduler = LambdaLR(prepared.optimizer, self.share_of_lr)

    def share_of_lr(self, step: int) -> float:
        """Return the learning rate of a step as a share of the highest: up in a straight line, then down to 0."""
        setting = self.setting
        if step < setting.warmup_steps:
            return (step + 1) / setting.warmup_steps
        return max(0.0, (setting.steps - step) / (setting.steps - setting.warmup_steps))

    def finish(self, limits: Limits) -> Progress:
        """Take the steps that are left."""
        setting, progress = self.setting, self._continued(limits)
        if progress.step == 0 and self.texts:
            progress.before = self._loss_of_the_pretrained()
        self.prepared.model.train()
        while progress.step < setting.steps and not progress.diverged:
            until = min(progress.step + STRETCH, setting.steps)
            if time.monotonic() > limits.deadline:
                self._save(progress, limits)
                raise DeadlineError(setting.path)
            self._stretch(progress, until)
        if self.writes and not progress.diverged:
            # Writing takes minutes with large models, and memory of its own: training is not repeated if it fails.
            self._save(progress, limits)
            if time.monotonic() > limits.deadline:
                raise DeadlineError(setting.path)
        return progress

    def _stretch(self, progress: Progress, until: int) -> None:
        """Take the steps up to one, and then alone look at their losses."""
        self._synchronize()
        start = time.perf_counter()
        losses = [self.step(step, next(self._batches)) for step in range(progress.step, until)]
        self._synchronize()
        seconds = time.perf_counter() - start
        mean = torch.stack(losses).mean().item()
        progress.seconds += seconds
        progress.step_seconds.append(seconds / len(losses))
        progress.losses.append(mean)
        progress.diverged = not math.isfinite(mean)
        progress.step = until

    def step(self, step: int, batch: dict[str, Tensor]) -> Tensor:
        """Take one step, numbered from 0, and return the loss of the task, without what the method adds to it."""
        prepared, setting = self.prepared, self.setting
        prepared.before_step(step)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with self._precision():
            loss = self.task.loss(prepared.model(**inputs), batch["labels"])
            whole = loss if prepared.extra_loss is None else loss + prepared.extra_loss()
        whole.backward()
        if setting.clip is not None:
            nn.utils.clip_grad_norm_(self.trained, setting.clip)
        prepared.optimizer.step()
        prepared.after_step(step)
        prepared.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return loss.detach()

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Give the model as the method wants it evaluated, without gradients; it is in training again afterwards."""
        self.prepared.before_evaluation()
        try:
            with torch.no_grad(), self._precision():
                yield self.prepared.model.eval()
        finally:
            self.prepared.model.train()
            self.prepared.after_evaluation()

    def _loss_of_the_pretrained(self) -> float:
        """Return the loss of its own texts before training, which is that of the pretrained model in every method."""
        key = (self.setting.model, self.device, self.setting.precision, tuple(map(tuple, self.texts)))
        if key not in _before:
            with self.evaluating() as model:
                _before[key] = forgetting.text_loss(model, self.texts)
        return _before[key]

    def _continued(self, limits: Limits) -> Progress:
        """Return where the run stands, and bring model, optimizer and generators there."""
        path = limits.checkpoint
        held = load(path) if path is not None and path.exists() else None
        if held is not None and held["made_with"] != [self.task.fingerprint, limits.commit]:
            held = None
        progress = Progress() if held is None else Progress(**held["progress"])
        self._batches: Iterator[dict[str, Tensor]] = self.task.training_batches(progress.step)
        torch.manual_seed(self.setting.seed)  # for dropout: how much was drawn before differs between methods
        if held is None:
            return progress
        prepared = self.prepared
        prepared.load_state(held["method"])
        prepared.model.load_state_dict(held["model"])
        prepared.optimizer.load_state_dict(held["optimizer"])
        self.scheduler.load_state_dict(held["scheduler"])
        set_random_state(held["random"], self.device)
        return progress

    def _save(self, progress: Progress, limits: Limits) -> None:
        path = limits.checkpoint
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        prepared = self.prepared
        state = {
            "made_with": [self.task.fingerprint, limits.commit],
            "progress": vars(progress),
            "method": prepared.state(),
            "model": prepared.model.state_dict(),
            "optimizer": prepared.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": random_state(self.device),
        }
        save(state, path)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.setting.precision == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, torch.bfloat16)

    def _synchronize(self) -> None:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)


def _attention(setting: Setting, device: str) -> AbstractContextManager[Any]:
    """Let a CPU use its fused attention for texts: it adds up in one order there, and takes three quarters of the time.

    The short inputs of a classifier gain nothing by it.
    """
    if torch.device(device).type != "cpu" or not task_named(setting.task).writes:
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])


def _own_texts(setting: Setting, places: Places, model: nn.Module, limits: Limits) -> forgetting.Texts:
    """Return texts that the pretrained model writes, if it is one that continues texts; they lie by the checkpoint."""
    if task_named(setting.task).kind != "continue":
        return []
    folder = None if limits.checkpoint is None else limits.checkpoint.parent
    return forgetting.own_texts(model, load_tokenizer(setting, places), seed=0, count=OWN_TEXTS, folder=folder)
