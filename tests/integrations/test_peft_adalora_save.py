"""save_adapter of AdaLoRA: a plain LoRA adapter with which PEFT computes what the trained model does."""

import copy

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer
from tests.integrations.test_peft_adalora import ADAMW, STEPS, adalora_model, batch, layers_of, peft, train
from tests.support.compare import refused, relative
from tests.support.peft_layers import TENSORS, config_in
from tests.support.strategies import each_rule

pytest.importorskip("safetensors", reason="runs where safetensors is installed")
from safetensors.torch import load_file

from deltaopt.integrations.peft import save_adapter

pytestmark = pytest.mark.extra


def optimizer_of(model: nn.Module, rule: str = "in_place", **options) -> DeltaLoRAOptimizer:
    return DeltaLoRAOptimizer.for_model(
        model, torch.optim.AdamW, update_ratio=0.7, weight_update=rule, **{"start_step": 3, **ADAMW, **options}
    )


def loaded(folder, base: nn.Module | None = None) -> peft.PeftModel:
    """Load the folder with plain PEFT on the pristine base; a warning is an error here."""
    return peft.PeftModel.from_pretrained(adalora_model().unload() if base is None else base, folder)


def states(model: nn.Module) -> tuple[dict[str, Tensor], object]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, copy.deepcopy(model.peft_config)


@each_rule
def test_plain_lora_computes_the_trained_outputs_at_every_step_of_the_schedule(rule, tmp_path):
    orth = 0.0 if rule == "folded" else 0.5
    model, x = adalora_model(orth), batch(99)[0]
    optimizer = optimizer_of(model, rule)
    for t in range(STEPS):
        train(model, optimizer, range(t, t + 1), orth)
        before, config = states(model)
        saved = save_adapter(model, optimizer, tmp_path / str(t))
        assert set(saved.values()) == {0.0}
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert model.peft_config == config
        assert relative(loaded(tmp_path / str(t))(x), model(x)) < 1e-12
    optimizer.resync()
    final = save_adapter(model, optimizer, tmp_path / "final")
    assert sum(final.ranks.values()) < sum(saved.ranks.values()) or rule == "folded"
    assert relative(loaded(tmp_path / "final")(x), model(x)) < 1e-12


@pytest.mark.filterwarnings("ignore:Could not find a config file in mine")  # PEFT looks for its vocabulary
def test_the_files_are_those_of_a_plain_lora_adapter(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 6), nn.Linear(6, 6)).double()
    pristine = copy.deepcopy(base)
    config = peft.AdaLoraConfig(
        target_modules=["0", "2"], modules_to_save=["3"], bias="lora_only", init_r=4, target_r=2, total_step=20,
        lora_alpha=8,
    )  # fmt: skip
    model = peft.get_peft_model(base, config).double()
    model.peft_config["default"].base_model_name_or_path = "mine"
    optimizer = optimizer_of(model, start_step=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    train(model, optimizer, range(3))
    save_adapter(model, optimizer, tmp_path)
    written = config_in(tmp_path)
    assert written["peft_type"] == "LORA"
    assert sorted(written["target_modules"]) == ["0", "2"]
    assert (written["modules_to_save"], written["bias"]) == (["3"], "lora_only")
    assert written["base_model_name_or_path"] == "mine"
    assert not set(written) & {"target_r", "init_r", "tinit", "tfinal", "deltaT", "total_step", "orth_reg_weight"}
    assert not [key for key in load_file(tmp_path / TENSORS) if "lora_E" in key or "ranknum" in key]
    x = batch(3)[0]
    assert relative(loaded(tmp_path, pristine)(x), model(x)) < 1e-12


def test_a_model_that_peft_has_cut_to_its_budget_can_be_saved(tmp_path):
    """PEFT cuts a model so when it loads an adapter; of a layer without budget the scaling is no number any more."""
    model, x = adalora_model(), batch(99)[0]
    optimizer = optimizer_of(model)
    train(model, optimizer, range(STEPS))
    with torch.no_grad():
        layers_of(model)[0].lora_E["default"].zero_()
    budget = [True, True, False, True]
    with torch.no_grad():
        layers_of(model)[1].lora_E["default"][2] = 0.0
    expected = model(x).detach()
    model.base_model.resize_modules_by_rank_pattern({"0.lora_E": [False] * 4, "2.lora_E": budget}, "default")
    model.double()
    assert [len(layer.lora_E["default"]) for layer in layers_of(model)] == [0, 3]
    assert relative(model(x), expected) < 1e-12
    save_adapter(model, optimizer, tmp_path)
    assert relative(loaded(tmp_path)(x), expected) < 1e-12


def test_a_layer_without_a_rank_whose_W_has_moved_is_refused(tmp_path):
    """Another optimizer than the one that is handed in has moved it."""
    model = adalora_model()
    first = optimizer_of(model, start_step=0)
    train(model, first, range(3))
    with torch.no_grad():
        layers_of(model)[0].lora_E["default"].zero_()
    budget = {"0.lora_E": [False] * 4, "2.lora_E": [True] * 4}
    model.base_model.resize_modules_by_rank_pattern(budget, "default")
    model.double()
    first.release()
    with pytest.warns(UserWarning, match="moved by an earlier optimizer"):
        second = optimizer_of(model, start_step=0)
    assert [triple.label for triple in second.triples] == ["base_model.model.2"]
    message = r"base_model\.model\.0: AdaLoRA has taken all of its rank.*merge_and_unload"
    refused(lambda: save_adapter(model, second, tmp_path / "adapter"), ValueError, message)
    assert not (tmp_path / "adapter").exists()


@each_rule
def test_a_layer_whose_budget_is_taken_away_keeps_its_movement(rule, tmp_path):
    """All of E is zero in training; and in a model that PEFT has cut down to the budget, its factors have no rank."""
    orth = 0.0 if rule == "folded" else 0.5
    model, x = adalora_model(orth), batch(99)[0]
    optimizer = optimizer_of(model, rule)
    train(model, optimizer, range(8), orth)
    layer = layers_of(model)[0]
    before = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_E["default"].zero_()
    assert relative(before, adalora_model().base_model.model[0].base_layer.weight) > 1e-3
    save_adapter(model, optimizer, tmp_path / "masked")
    assert relative(loaded(tmp_path / "masked")(x), model(x)) < 1e-12
    if rule == "in_place":
        optimizer.resync()
        saved = save_adapter(model, optimizer, tmp_path / "resync")
        assert relative(loaded(tmp_path / "resync")(x), model(x)) < 1e-12
        assert saved.ranks["base_model.model.0"] <= 4


def test_a_layer_that_was_loaded_without_a_rank_is_written_as_zeros(tmp_path):
    model, x = adalora_model(), batch(99)[0]
    layers_of(model)[0].update_layer("default", 0, 8, model.peft_config["default"])
    model.double()
    optimizer = optimizer_of(model, start_step=0)
    for t in range(3):
        optimizer.zero_grad()
        (model(batch(t)[0]) - batch(t)[1]).square().mean().backward()
        optimizer.step()
    saved = save_adapter(model, optimizer, tmp_path)
    assert list(saved) == ["base_model.model.2"]
    assert relative(loaded(tmp_path)(x), model(x)) < 1e-12
