"""Every method of the evidence on a tiny model: what trains, what it computes, and that a cut run continues exactly."""

import dataclasses
import io
import sys
import types

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

try:
    from benchmarks.evidence import models  # noqa: F401
except ImportError:
    stand_in = types.ModuleType("benchmarks.evidence.models")
    stand_in.projections = lambda model: {
        kind: [name for name, _ in model.named_modules() if name.endswith(f"self.{kind}")]
        for kind in ("query", "value")
    }
    sys.modules["benchmarks.evidence.models"] = stand_in

from benchmarks.evidence.methods import METHODS, prepare
from benchmarks.evidence.setting import Setting

LAYERS, WIDTH, LABELS, WORDS = 2, 16, 3, 12
NAMES = [f"bert.encoder.layer.{i}.attention.self.{kind}" for i in range(LAYERS) for kind in ("query", "value")]


def setting_of(method, **changes):
    values = {
        "task": "toy", "model": "tiny", "row": method, "method": method, "lr": 1e-2, "seed": 3, "split": "test",
        "steps": 12, "batch_size": 8, "max_length": 6, "rank": 4, "alpha": 8.0, "start": 0.0, "warmup": 0.25,
        "model_dropout": False,
    }  # fmt: skip
    return Setting(**(values | changes))


def tiny_model(dropout=0.0):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=8,
        num_labels=LABELS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config).train()


def batch_of(step, count=8):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, WORDS, (count, 6), generator=generator)
    return {"input_ids": ids}, ids[:, 0] % LABELS


class Run:
    """The loop of the runner in short, with its checkpoint."""

    def __init__(self, setting, model=None):
        self.setting = setting
        self.model = tiny_model() if model is None else model
        self.prepared = prepare(setting, self.model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.prepared.optimizer, self.share)
        self.losses = []

    def share(self, step):
        warmup, steps = self.setting.warmup_steps, self.setting.steps
        return (step + 1) / (warmup + 1) if step < warmup else (steps - step) / (steps - warmup)

    def train(self, start=0, stop=None):
        prepared = self.prepared
        for step in range(start, self.setting.steps if stop is None else stop):
            inputs, labels = batch_of(step % 4)
            prepared.before_step(step)
            loss = torch.nn.functional.cross_entropy(prepared.model(**inputs).logits, labels)
            self.losses.append(loss.item())
            if prepared.extra_loss is not None:
                loss = loss + prepared.extra_loss()
            loss.backward()
            if self.setting.clip is not None:
                trained = [p for p in prepared.model.parameters() if p.grad is not None]
                torch.nn.utils.clip_grad_norm_(trained, self.setting.clip)
            prepared.optimizer.step()
            prepared.after_step(step)
            prepared.optimizer.zero_grad()
            self.schedule.step()
        return self

    def saved(self):
        file = io.BytesIO()
        parts = {"model": self.model, "optimizer": self.prepared.optimizer, "schedule": self.schedule}
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save(states | {"method": self.prepared.state()}, file)
        return file

    def load(self, file):
        file.seek(0)
        states = torch.load(file, weights_only=True)
        self.model.load_state_dict(states["model"])
        self.prepared.optimizer.load_state_dict(states["optimizer"])
        self.schedule.load_state_dict(states["schedule"])
        self.prepared.load_state(states["method"])
        return self

    def trained(self):
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def logits_of(run):
    run.model.eval()
    with torch.no_grad():
        return run.model(**batch_of(99)[0]).logits


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(method):
    run = Run(setting_of(method, steps=40, lr=0.5 if method == "sgd" else 2e-2)).train()
    first, last = sum(run.losses[:4]) / 4, sum(run.losses[-4:]) / 4
    assert last < 0.9 * first
    changes = run.prepared.changes()
    assert [change.name for change in changes] == NAMES
    for change in changes:
        assert 0 < change.change_norm < 100
        assert change.effective_rank is not None
        assert -1 <= change.cosine < 1


@pytest.mark.parametrize("cut", [5, 7])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_cut_continues_bit_for_bit(method, cut):
    setting = setting_of(method, start=0.25 if "delta" in method else 0.0)
    whole = Run(setting).train()
    file = Run(setting).train(stop=cut).saved()
    torch.manual_seed(77)  # nothing may come from the global generator
    rest = Run(setting).load(file).train(start=cut)
    assert rest.losses == whole.losses[cut:]
    assert whole.model.state_dict().keys() == rest.model.state_dict().keys()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, rest.model.state_dict()[name]), name
    assert rest.prepared.changes() == whole.prepared.changes()
