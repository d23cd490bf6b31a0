"""Several adapters of one PEFT model in one folded optimizer: one W, and a name for each branch."""

import copy

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, find_triples

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")

from peft import LoraConfig, get_peft_model

from deltaopt.integrations.peft import save_adapter
from tests.support.compare import through_a_file
from tests.support.peft_layers import assert_loads, image, mlp, train_model
from tests.support.strategies import RULES


def with_two_adapters():
    """(plain, model, triples): both adapters are active, and theirs differ in rank and alpha."""
    plain = mlp(7, 5, 4).double()
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=4, target_modules=["0", "1"]))
    model.base_model.set_adapter(["default", "other"])
    return plain, model, [*find_triples(model), *find_triples(model, "other")]


def test_two_adapters_train_in_one_folded_optimizer(tmp_path):
    plain, model, triples = with_two_adapters()
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=1e-2, weight_update="folded", update_ratio=1.5)
    names = [triple.label for triple in optimizer.triples]
    x = image(7)
    train_model(model, optimizer, x)
    assert names == [*names[:2], *(f"{name} (other)" for name in names[:2])]
    for (key, W), layer in zip(plain.named_parameters(), (0, 0, 1, 1), strict=True):
        if "weight" in key:
            assert torch.equal(model.base_model.model[layer].base_layer.weight, W)
    for adapter in ("default", "other"):
        errors = save_adapter(model, optimizer, tmp_path / adapter, adapter=adapter)
        assert set(errors.values()) == {0.0}
        assert len(errors) == 2
        model.set_adapter(adapter)
        assert_loads(plain, tmp_path / adapter, model, x)


def test_a_state_of_one_adapter_has_the_names_it_had():
    """Name a branch after its layer alone where that is enough: states that were saved so still load."""
    _, model, triples = with_two_adapters()
    alone = DeltaLoRAOptimizer(torch.optim.AdamW, triples[2:], lr=1e-2, weight_update="folded")
    assert [t.label for t in alone.triples] == [t.label for t in triples[:2]]
    alone.load_state_dict(through_a_file(alone.state_dict()))
    added = DeltaLoRAOptimizer(torch.optim.AdamW, triples[:2], lr=1e-2, weight_update="folded")
    added.add_param_group({"triples": find_triples(model, "other")})
    assert [t.label for t in added.triples[2:]] == [f"{t.label} (other)" for t in triples[:2]]


@pytest.mark.parametrize("rule", RULES)
def test_one_adapter_twice_is_refused_by_name(rule):
    _, _, triples = with_two_adapters()
    with pytest.raises(ValueError, match=r"its W shares memory with the W of base_model\.model\.0"):
        DeltaLoRAOptimizer(torch.optim.AdamW, [*triples[:2], *triples[:1]], lr=1e-2, weight_update=rule)
