"""Models without a LoRA layer to train: `find_triples` says why, and what to do."""

import copy

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer, find_triples
from tests.support.compare import assert_same_bits, bits
from tests.support.models import peft as peft  # skips where PEFT and transformers are not installed

# isort: split
from peft import LoraConfig, PeftModel, get_peft_model

from tests.support.peft_layers import mlp, tiny_llama, tokens, train_model

pytestmark = pytest.mark.extra


def refused(model, *parts, adapter="default", error=ValueError):
    """Assert that the search and `for_model` raise one sentence with all of `parts`, and that nothing changes."""
    before, hooks = bits(model), [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(error) as caught:
        find_triples(model, adapter)
    for part in parts:
        assert part in str(caught.value)
    with pytest.raises(error):
        DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, adapter=adapter, lr=0.1)
    assert_same_bits(model, before)
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    return str(caught.value)


OTHERS = {
    "LoHa": (peft.LoHaConfig(r=2, target_modules=["0"]), "multiplies two products element by element"),
    "OFT": (peft.OFTConfig(oft_block_size=2, target_modules=["0"]), "rotates W"),
    "IA3": (peft.IA3Config(target_modules=["0"], feedforward_modules=[]), "multiplies activations by a vector"),
    "VeRA": (peft.VeraConfig(r=2, target_modules=["0"]), "trains two vectors between frozen random matrices"),
    "LoKr": (peft.LoKrConfig(r=2, target_modules=["0"]), "adds a Kronecker product"),
}


@pytest.mark.parametrize("method", OTHERS)
def test_another_method_of_peft_is_named(method):
    config, does = OTHERS[method]
    model = get_peft_model(mlp(8, 6), copy.deepcopy(config))
    message = refused(model, f"its adapter is of {method}, which {does}", "get_peft_model(model, LoraConfig(...))")
    assert "\n" not in message


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_prompt_is_named():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny_llama(), config)
    refused(model, "its adapter is of PROMPT_TUNING, which trains tokens in front of the input")


def test_a_plain_model_is_told_to_add_branches():
    message = refused(
        mlp(7, 5),
        "no LoRA layer in this Sequential: add the branches first: with PEFT get_peft_model(model, LoraConfig(...))",
        "model.add_adapter(LoraConfig(...)) in transformers and diffusers",
        "LoRATriple(W, A, B, scaling=alpha / r) by hand",
    )
    assert "adapter's name" not in message


def test_a_model_whose_adapter_was_merged_away_is_told_so():
    model = get_peft_model(mlp(7, 5), LoraConfig(r=2, target_modules=["0"]))
    refused(model.merge_and_unload(), "After merge_and_unload() and unload() none is left: take the model from before")
    model = get_peft_model(mlp(7, 5), LoraConfig(r=2, target_modules=["0"]))
    model.merge_and_unload()
    refused(model, "it has the config of 'default' and no layer of it", "After merge_and_unload()")


def test_a_wrong_name_lists_the_adapters():
    model = get_peft_model(mlp(7, 5), LoraConfig(r=2, target_modules=["0"]), adapter_name="two")
    model.add_adapter("one", LoraConfig(r=2, target_modules=["0"]))
    advice = "no layer holds the adapter 'three', the model has the adapters 'one', 'two': give adapter='one'"
    refused(model, advice, adapter="three")
    assert len(find_triples(model, adapter="one")) == 1


def test_an_adapter_that_was_loaded_for_inference_is_named_and_loads_for_training(tmp_path):
    get_peft_model(mlp(7, 5), LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(mlp(7, 5), tmp_path)
    advice = "PeftModel.from_pretrained(model, path, is_trainable=True)"
    refused(model, "all factors of the adapter 'default' are frozen", advice)
    model = PeftModel.from_pretrained(mlp(7, 5), tmp_path, is_trainable=True)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1)
    train_model(model, optimizer, torch.randn(2, 7))


def test_an_adapter_that_was_loaded_into_a_model_for_inference_is_named(tmp_path):
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    model = tiny_llama()
    model.load_adapter(tmp_path)
    refused(model, "all factors of the adapter 'default' are frozen", "is_trainable=True")
    other = tiny_llama()
    other.load_adapter(tmp_path, is_trainable=True)
    train_model(other, DeltaLoRAOptimizer.for_model(other, torch.optim.SGD, lr=0.1), tokens())


def test_an_unknown_class_is_named():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4, 2))

    refused(nn.Sequential(Mine(), nn.Tanh()), "0 of class Mine looks like LoRA", "a method lora_triples(self)")


@pytest.mark.parametrize("count", [2, 400])
def test_a_problem_of_many_layers_is_one_sentence(count):
    config = LoraConfig(r=2, target_modules=[str(i) for i in range(count)], lora_dropout=0.05)
    message = refused(get_peft_model(nn.Sequential(*[nn.Linear(4, 4) for _ in range(count)]), config))
    assert len(message.splitlines()) == 2
    assert len(message) < 600
    assert f"{count} layers: base_model.model.0, " in message
