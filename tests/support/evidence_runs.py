"""A tiny classifier, its data, and the loop of the evidence's runner in short, with its checkpoint."""

import io

import torch
import transformers

from benchmarks.evidence.methods import prepare
from benchmarks.evidence.setting import Setting

LAYERS, WIDTH, LABELS, WORDS = 1, 16, 3, 12
NAMES = [f"bert.encoder.layer.{i}.attention.self.{kind}" for i in range(LAYERS) for kind in ("query", "value")]


def setting_of(method, **changes):
    values = {
        "task": "toy", "model": "tiny", "row": method, "method": method, "lr": 1e-2, "seed": 3, "split": "test",
        "steps": 12, "batch_size": 8, "max_length": 6, "rank": 4, "alpha": 8.0, "start": 0.0, "warmup": 0.25,
    }  # fmt: skip
    return Setting(**(values | changes))


def tiny_model():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=8,
        num_labels=LABELS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return transformers.BertForSequenceClassification(config).train()


def batch_of(step, count=8):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, WORDS, (count, 6), generator=generator)
    return {"input_ids": ids}, ids[:, 0] % LABELS


class Run:
    """One run.

    Args:
        setting: of the run.
        model: to train. Default: the tiny one.
    """

    def __init__(self, setting, model=None):
        self.setting = setting
        self.model = tiny_model() if model is None else model
        self.prepared = prepare(setting, self.model)
        self.optimizer = self.prepared.optimizer
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.share)
        self.losses = []

    def share(self, step):
        warmup, steps = self.setting.warmup_steps, self.setting.steps
        return (step + 1) / (warmup + 1) if step < warmup else (steps - step) / (steps - warmup)

    def train(self, start=0, stop=None, watch=lambda step: None):
        """Take the steps from `start` to `stop`; `watch` is called right after each."""
        for step in range(start, self.setting.steps if stop is None else stop):
            self.prepared.before_step(step)
            self.backward(step)
            self.optimizer.step()
            self.prepared.after_step(step)
            watch(step)
            self.optimizer.zero_grad()
            self.schedule.step()
        return self

    def backward(self, step):
        inputs, labels = batch_of(step % 4)
        loss = torch.nn.functional.cross_entropy(self.model(**inputs).logits, labels)
        self.losses.append(loss.item())
        if self.prepared.extra_loss is not None:
            loss = loss + self.prepared.extra_loss()
        loss.backward()
        if self.setting.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.setting.clip)

    def saved(self):
        """Return a checkpoint as a file."""
        file = io.BytesIO()
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save(states | {"method": self.prepared.state()}, file)
        return file

    def load(self, file):
        file.seek(0)
        states = torch.load(file, weights_only=True)
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        self.schedule.load_state_dict(states["schedule"])
        self.prepared.load_state(states["method"])
        return self


def effective_weights(model):
    """Return what each adapted layer multiplies by while it is evaluated, read off its outputs."""
    model.eval()
    found = {}
    with torch.no_grad():
        for name in NAMES:
            layer = model.get_submodule(name)
            eye = torch.eye(WIDTH, dtype=next(layer.parameters()).dtype)
            found[name] = (layer(eye) - layer(torch.zeros_like(eye))).T
    model.train()
    return found
