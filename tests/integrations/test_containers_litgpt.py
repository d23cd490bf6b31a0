"""litgpt's layers: found, followed, saved, exported, also within its GPT."""

import pytest
import torch
from torch import nn

from deltaopt import find_triples
from tests.support import containers
from tests.support.containers import Case, each_rule, optimizer_for, train

lora = pytest.importorskip("litgpt.lora", reason="runs where litgpt is installed")
pytestmark = pytest.mark.extra

rows = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def build(*layers):
    model = nn.Sequential(*layers)
    lora.mark_only_lora_as_trainable(model)
    return model


def linear_case():
    def deltas(model):
        layers = {"0": model[0], "2": model[2]}
        return {name: (x.linear.weight, x.scaling * x.lora_B @ x.lora_A) for name, x in layers.items()}

    def layers():
        return build(
            lora.LoRALinear(7, 5, r=3, lora_alpha=2, bias=True), nn.Tanh(), lora.LoRALinear(5, 4, r=2, lora_alpha=3)
        )

    return Case(layers, rows, ["0", "2"], deltas)


CASES = {"linear": linear_case()}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
@each_rule
def test_follows_the_dense_loop(case, rule):
    containers.check_follows(case, rule)


@each_case
def test_moves_a_16_bit_weight(case):
    containers.check_16_bits(case)


@each_case
@each_rule
def test_resumes_bit_for_bit(case, rule):
    containers.check_resumes(case, rule)


@each_case
@each_rule
def test_exports(case, rule):
    containers.check_exports(case, rule)


@each_rule
def test_refuses_dropout(rule):
    def set_dropout(model):
        model[0].lora_dropout = nn.Dropout(0.25)

    match = r"0: it has lora_dropout=0\.25, .*section 4\.2.*set it to 0, or say allow_dropout=True"
    containers.check_dropout(CASES["linear"], rule, set_dropout, match)


@each_rule
def test_a_merged_model_is_refused_with_the_way_out(rule):
    case = CASES["linear"]
    model = case.model()
    optimizer = optimizer_for(model, rule)
    train(case, model, optimizer, range(3))
    for layer in (model[0], model[2]):
        layer.merge()
    match = r"(?s)merged into W, .*: litgpt's merge\(\) has no way back\. Load the weights and the factors again"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    with pytest.raises(ValueError, match=match):
        optimizer_for(model, rule)


def test_a_model_whose_weights_still_train_is_refused():
    model = nn.Sequential(*[lora.LoRALinear(7, 7, r=3) for _ in range(400)])
    with pytest.raises(ValueError, match=r"litgpt\.lora\.mark_only_lora_as_trainable\(model\) first") as refused:
        find_triples(model)
    assert len(str(refused.value).splitlines()) == 2
    assert len(str(refused.value)) < 400
    lora.mark_only_lora_as_trainable(model)
    assert len(find_triples(model)) == 400
