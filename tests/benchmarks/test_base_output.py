"""The measurement of the base by itself, on a small model in the place of the demo's."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")

from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import base_output
from deltaopt import DeltaLoRAOptimizer
from deltaopt.base_hooks import OutputHook
from tests.support.peft_runs import peft_asks_by_an_old_name

pytestmark = peft_asks_by_an_old_name


def small(targets: list[str]) -> tuple[nn.Module, DeltaLoRAOptimizer]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20000,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=12,
    )
    model = get_peft_model(BertForSequenceClassification(config), LoraConfig(r=2, target_modules=targets))
    return model, DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2)


def test_it_measures_with_and_without_hooks_and_writes_a_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(base_output, "adapted", small)
    base_output.main(["--rounds", "2", "--threads", "1", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text("utf8"))
    assert json.loads(capsys.readouterr().out) == found
    assert found["hooks"] == 4
    assert found["rounds"] == 2
    assert all(value > 0 for value in found["ms"].values())


def test_a_model_without_hooks_trains_as_the_one_with_hooks():
    models = [small(["query"]) for _ in range(2)]
    base_output.without_hooks(*models[1])
    assert not any(isinstance(h, OutputHook) for m in models[1][0].modules() for h in m._forward_hooks.values())
    ids = torch.arange(8).view(2, 4)
    for model, optimizer in models:
        model.eval()
        for _ in range(2):
            model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(models[0][0].parameters(), models[1][0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(base_output, "measure", None)
    with pytest.raises(SystemExit, match="2"):
        base_output.main(["--out", str(tmp_path)])
    assert "is a folder, expected a file" in capsys.readouterr().err
