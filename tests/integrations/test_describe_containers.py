"""describe() of other containers: loralib, and modules that describe themselves. Bad layers do not hide good ones."""

import pytest
import torch
from torch import nn

from deltaopt import describe, find_triples
from tests.support.small import HandmadeLayer
from tests.support.torchtune_twin import torchtune as torchtune

pytestmark = pytest.mark.extra


class Described(HandmadeLayer):
    """Describes itself, or raises what it was given."""

    error = None

    def lora_triples(self):
        if self.error is not None:
            raise self.error
        return [self.triple(None)]


def test_modules_that_describe_themselves():
    model = nn.Sequential(Described(), Described(), Described(), nn.Linear(5, 5).requires_grad_(False))
    model[1].error, model[2].error = ValueError("its branch is odd"), TypeError("it is no branch")
    told = describe(model)
    assert [(row.name, row.rule, [p.name for p in row.parameters]) for row in told.rows] == [
        ("0", "either", ["0.A", "0.B"])
    ]
    assert [(entry.kind, entry.name, entry.why) for entry in told.left_out] == [
        ("refused", "1", "its branch is odd"),
        ("refused", "2", "it is no branch"),
        ("no branch", "3", "Linear"),
    ]


def test_loralib():
    loralib = pytest.importorskip("loralib", reason="runs where loralib is installed")
    layers = loralib.Linear(4, 6, r=2), loralib.Linear(6, 4, r=2, lora_dropout=0.1), loralib.Embedding(5, 4, r=2)
    model = nn.Sequential(*layers, nn.Linear(4, 3))
    loralib.mark_only_lora_as_trainable(model)
    told = describe(model)
    assert [(row.name, row.layout, row.shape, row.r) for row in told.rows] == [
        ("0", "linear", (6, 4), 2),
        ("2", "embedding", (5, 4), 2),
    ]
    (bad, plain) = told.left_out
    assert (bad.name, bad.kind) == ("1", "refused")
    assert "lora_dropout=0.1" in bad.why
    assert (plain.name, plain.kind) == ("3", "no branch")
    with pytest.raises(ValueError, match="these loralib layers cannot be used") as raised:
        find_triples(model)
    assert bad.why in str(raised.value)


def test_fused_layers_share_rows():
    """Parts of one W share parameters; layers that are alike still share a row of the table."""
    loralib = pytest.importorskip("loralib", reason="runs where loralib is installed")
    model = nn.Sequential(*(loralib.MergedLinear(6, 9, r=2, enable_lora=[True, False, True]) for _ in range(30)))
    loralib.mark_only_lora_as_trainable(model)
    told = describe(model)
    assert len(told.rows) == 60
    assert told.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert told.rows[0].sharing[-1] == "one W is in 2 triples"
    assert "{0..29}.2  30 x (9, 6) float32" in str(told)
    assert len(str(told).splitlines()) < 12


def test_litgpt():
    lora = pytest.importorskip("litgpt.lora", reason="runs where litgpt is installed")
    model = nn.Sequential(lora.LoRALinear(4, 6, r=2), lora.LoRALinear(6, 4, r=2, lora_dropout=0.1))
    lora.mark_only_lora_as_trainable(model)
    told = describe(model)
    assert [row.name for row in told.rows] == ["0"]
    assert [(entry.name, entry.kind) for entry in told.left_out] == [("1", "refused")]
    assert told.trained == sum(p.numel() for p in model[0].parameters() if p.requires_grad)
    assert torch.is_tensor(find_triples(model[:1])[0].W)


def test_torchtune_layers_get_no_hooks_by_it(torchtune):
    model = nn.Sequential(*[torchtune.LoRALinear(4, 4, rank=2, alpha=2.0) for _ in range(2)])
    torchtune.set_trainable_params(model, torchtune.get_adapter_params(model))
    assert [row.name for row in describe(model).rows] == ["0", "1"]
    assert not any(module._forward_hooks for module in model.modules())
    find_triples(model)
    assert all(module._forward_hooks for module in model)
