"""torchtune's LoRALinear, or a twin of its contract: found, followed, saved, exported, and disabled for a reference."""

import copy
import pickle

import pytest
import torch
from torch import nn

from deltaopt import find_triples
from tests.support import containers
from tests.support.compare import relative
from tests.support.containers import Case, each_rule, optimizer_for, train
from tests.support.torchtune_twin import torchtune as torchtune

pytestmark = pytest.mark.extra

rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture
def case(torchtune):
    def deltas(model):
        layers = {"0": model[0], "2": model[2]}
        return {
            name: (layer.weight, layer.alpha / layer.rank * layer.lora_b.weight @ layer.lora_a.weight)
            for name, layer in layers.items()
        }

    def build():
        linear = torchtune.LoRALinear
        model = nn.Sequential(linear(7, 5, rank=3, alpha=2.0, use_bias=True), nn.Tanh(), linear(5, 4, rank=2, alpha=3))
        torchtune.set_trainable_params(model, torchtune.get_adapter_params(model))
        return model

    return Case(build, rows, ["0", "2"], deltas)


@each_rule
def test_follows_the_dense_loop(case, rule):
    containers.check_follows(case, rule)


def test_moves_a_16_bit_weight(case):
    containers.check_16_bits(case)


@each_rule
def test_resumes_bit_for_bit(case, rule):
    containers.check_resumes(case, rule)


@each_rule
def test_copies_and_states_are_the_trained_model(case, rule):
    containers.check_leaves(case, rule)


@each_rule
def test_exports(case, rule):
    containers.check_exports(case, rule)


@each_rule
def test_refuses_dropout(case, rule):
    def set_dropout(model):
        model[0].dropout = nn.Dropout(0.25)

    match = r"0: it has dropout=0\.25, .*section 4\.2.*set dropout=0, or pass allow_dropout=True"
    containers.check_dropout(case, rule, set_dropout, match)


@each_rule
@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_disabled_adapter_leaves_the_base(case, rule, torchtune, copied):
    """The reference model of DPO: the movement of W is left out while the branch is disabled, in copies too."""
    model = case.model()
    with torch.no_grad(), torchtune.disable_adapter(model):
        base = model(rows)
    optimizer = optimizer_for(model, rule)
    train(case, model, optimizer, range(6))
    model = copied(model)
    with torch.no_grad():
        trained = model(rows)
        with torchtune.disable_adapter(model):
            assert relative(model(rows), base) <= 1e-12
        assert torch.equal(model(rows), trained)
    assert relative(trained, base) > 1e-2


@each_rule
def test_another_alpha_is_refused(case, rule):
    model = case.model()
    optimizer = optimizer_for(model, rule)
    train(case, model, optimizer, range(3))
    model[0].alpha *= 2
    case.loss(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"0: alpha / rank was .* and is .* now: put alpha back"):
        optimizer.step()
    model[0].alpha /= 2
    optimizer.step()


def test_unknown_layers_are_refused_together(torchtune, case):
    model = case.model()
    model.append(object.__new__(torchtune.QATLoRALinear))
    model.append(object.__new__(torchtune.DoRALinear))
    for layer in model[3:]:
        nn.Module.__init__(layer)
    model[2].weight.requires_grad_()
    with pytest.raises(ValueError, match="these torchtune layers cannot be used") as refused:
        find_triples(model)
    lines = str(refused.value)
    assert "3: QATLoRALinear has a forward pass of its own" in lines
    assert "4: DoRALinear divides by the norm of W" in lines
    assert "2: its weight still requires grad: call torchtune.modules.peft.set_trainable_params(model" in lines
    assert "  0: " not in lines


def test_a_merged_layer_is_refused(case):
    model = case.model()
    model[0].merged = True
    with pytest.raises(ValueError, match=r"0: the branch is merged into W, .*: load the weights again"):
        optimizer_for(model)
