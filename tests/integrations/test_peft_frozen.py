"""PEFT freezes the factors within disable_adapter(), and users freeze trained models: everything but a step works."""

import copy
from contextlib import ExitStack

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")

from peft import LoraConfig, get_peft_model

from deltaopt.integrations.peft import save_adapter
from tests.support.peft_layers import assert_loads, mlp, output, train_model
from tests.support.strategies import RULES


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", ["adapter first", "weights first"])
def test_base_weights_and_disable_adapter_nest_in_both_orders(rule, order):
    """Compare with the plain model: PEFT freezes the factors within disable_adapter."""
    plain = mlp(7, 5, 4).double()
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"])
    model = get_peft_model(copy.deepcopy(plain), config)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, weight_update=rule)
    x = torch.randn(3, 7, dtype=torch.float64)
    train_model(model, optimizer, x)
    trained = output(model, x)
    contexts = [model.disable_adapter, optimizer.base_weights]
    with torch.no_grad(), ExitStack() as stack:
        for context in contexts if order == "adapter first" else contexts[::-1]:
            stack.enter_context(context())
        torch.testing.assert_close(output(model, x), output(plain, x), rtol=0, atol=1e-6)
    assert torch.equal(output(model, x), trained)
    with model.disable_adapter():
        state = optimizer.state_dict()
        with pytest.raises(ValueError, match="neither A nor B requires grad"):
            optimizer.step()
    optimizer.load_state_dict(state)
    train_model(model, optimizer, x)


@pytest.mark.parametrize("rule", RULES)
def test_a_frozen_model_is_saved(rule, tmp_path):
    plain = mlp(7, 5, 4)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"])
    model = get_peft_model(copy.deepcopy(plain), config)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, weight_update=rule)
    x = torch.randn(3, 7)
    train_model(model, optimizer, x)
    model.requires_grad_(False)
    save_adapter(model, optimizer, tmp_path)
    assert_loads(plain, tmp_path, model, x)
