"""Messages about PEFT's models: each test provokes one, does literally what it says, and sees the run be right."""

import copy
import warnings

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, find_triples, other_parameters
from deltaopt.integrations.peft import save_adapter
from tests.support.peft_layers import lora_layers, mlp, output, peft, train_model, weight

pytestmark = pytest.mark.extra

AdamW = torch.optim.AdamW
OPTIONS = {"lr": 1e-2, "update_ratio": 2.0}


def adapted(**config):
    """(model, x) with the same bits at each call; a product of zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["0", "1"], **config})
    return peft.get_peft_model(mlp(6, 8, 5), config).double(), torch.randn(4, 6, dtype=torch.float64)


def assert_same_model(model, other, x):
    with torch.no_grad():
        torch.testing.assert_close(output(model.eval(), x), output(other.eval(), x), rtol=1e-12, atol=1e-12)


def uninterrupted(rule="in_place", steps=4, **config):
    model, x = adapted(**config)
    train_model(model, DeltaLoRAOptimizer.for_model(model, AdamW, weight_update=rule, **OPTIONS), x, steps)
    return model


@pytest.mark.parametrize("built", [False, True], ids=["class", "built"])
def test_a_model_in_the_place_of_triples_is_for_for_model(built):
    model, x = adapted()
    inner = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2) if built else AdamW
    with pytest.raises(TypeError, match=r"got a model \(PeftModel\)\. Write DeltaLoRAOptimizer\.for_model\(model"):
        DeltaLoRAOptimizer(inner, model)
    train_model(model, DeltaLoRAOptimizer.for_model(model, inner, **({} if built else OPTIONS)), x, 4)
    assert_same_model(model, uninterrupted(), x)


def test_for_model_takes_a_built_optimizer_that_holds_the_head():
    config = {"target_modules": ["0"], "modules_to_save": ["1"]}
    model, x = adapted(**config)
    everything = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(TypeError, match=r"already built and does not hold 2 of the 2 other .* hand over its class"):
        DeltaLoRAOptimizer.for_model(model, AdamW([t for t in everything if t.shape in {(8, 2), (2, 6)}]))
    train_model(model, DeltaLoRAOptimizer.for_model(model, AdamW(everything, lr=1e-2)), x, 4)
    assert_same_model(model, uninterrupted(**config), x)


@pytest.mark.parametrize("rule", ["in_place", "folded"])
def test_parameters_that_a_load_has_replaced_are_taken_by_a_new_optimizer_with_the_state(rule, tmp_path):
    model, x = adapted()
    optimizer = DeltaLoRAOptimizer.for_model(model, AdamW, weight_update=rule, **OPTIONS)
    train_model(model, optimizer, x, 2)
    state = optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "save_pretrained writes the adapter alone")
        model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "default", is_trainable=True, low_cpu_mem_usage=True)
    with pytest.raises(
        ValueError, match=r"replaced .*low_cpu_mem_usage=True\), build the optimizer afterwards, and load"
    ):
        train_model(model, optimizer, x, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the weights of 2 layers .* were moved by an earlier .* load the state")
        optimizer = DeltaLoRAOptimizer.for_model(model, AdamW, weight_update=rule, **OPTIONS)
    optimizer.load_state_dict(state)
    train_model(model, optimizer, x, 2)
    assert_same_model(model, uninterrupted(rule), x)


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_a_merged_model_goes_on_as_the_message_says(way, tmp_path):
    model, x = adapted()
    optimizer = DeltaLoRAOptimizer.for_model(model, AdamW, **OPTIONS)
    train_model(model, optimizer, x, 2)
    checkpoint = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    state = optimizer.state_dict()
    getattr(model, way)()
    with pytest.raises(
        RuntimeError, match=r"unmerge_adapter\(\).* merge_and_unload\(\) leaves no adapter .* load the base"
    ):
        optimizer.step()
    if way == "merge_adapter":
        model.unmerge_adapter()
    else:
        model, _ = adapted()
        model.load_state_dict(checkpoint, strict=False)
        optimizer = DeltaLoRAOptimizer.for_model(model, AdamW, **OPTIONS)
        optimizer.load_state_dict(state)
    train_model(model, optimizer, x, 2)
    assert_same_model(model, uninterrupted(), x)


def test_a_plain_run_goes_on_with_its_moments_as_the_message_says():
    model, x = adapted()
    plain = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train_model(model, plain, x, 2)
    twin, saved = copy.deepcopy(model), copy.deepcopy(plain.state_dict())
    with pytest.raises(ValueError, match=r"To keep the moments .* hand it over: DeltaLoRAOptimizer\(inner, triples\)"):
        DeltaLoRAOptimizer.for_model(model, AdamW, lr=1e-2).load_state_dict(plain.state_dict())
    inner = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inner.load_state_dict(plain.state_dict())
    optimizer = DeltaLoRAOptimizer(inner, find_triples(model), update_ratio=0.0)
    train_model(model, optimizer, x, 2)
    plain_twin = AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    plain_twin.load_state_dict(saved)
    train_model(twin, plain_twin, x, 2)
    assert_same_model(model, twin, x)


def test_folded_with_two_adapters_says_nothing():
    """No layer of a folded optimizer raises, and no movement is in W."""
    model, x = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0", "1"]))
    model.double()
    before = {name: weight(layer).clone() for name, layer in lora_layers(model).items()}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        optimizer = DeltaLoRAOptimizer.for_model(model, AdamW, adapter=adapter, weight_update="folded", **OPTIONS)
        train_model(model, optimizer, x, 2)
    for name, layer in lora_layers(model).items():
        assert torch.equal(weight(layer), before[name])


def test_param_groups_with_factors_are_refused_with_what_to_hand_over():
    model, x = adapted(target_modules=["0"], modules_to_save=["1"])
    triples = find_triples(model)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 0.01}, {"params": []}]
    with pytest.raises(ValueError, match=r"in its param groups, .* other_parameters\(model, triples\)"):
        DeltaLoRAOptimizer(AdamW, triples, groups, **OPTIONS)
    groups[0]["params"] = other_parameters(model, triples)
    train_model(model, DeltaLoRAOptimizer(AdamW, triples, groups, **OPTIONS), x, 4)
    assert_same_model(model, uninterrupted(target_modules=["0"], modules_to_save=["1"]), x)


KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


class Many(torch.nn.Module):
    """32 blocks of 7 layers."""

    def __init__(self):
        super().__init__()
        blocks = (torch.nn.ModuleDict({kind: torch.nn.Linear(2, 2) for kind in KINDS}) for _ in range(32))
        self.layers = torch.nn.ModuleList(blocks)


def many(**config):
    return peft.get_peft_model(Many(), peft.LoraConfig(r=1, target_modules=KINDS, **config))


def many_tied():
    model = many()
    for layer in lora_layers(model).values():
        layer.another = torch.nn.ParameterList([layer.get_base_layer().weight])
    find_triples(model)


def many_changed(change):
    model = many()
    optimizer = DeltaLoRAOptimizer.for_model(model, AdamW, lr=1e-2)
    change(model)
    optimizer.step()


def rescale(model):
    for i, layer in enumerate(lora_layers(model).values(), start=1):
        layer.set_scale("default", 1 + i)


def many_saved(tmp_path):
    save_adapter(many(), DeltaLoRAOptimizer.for_model(many(), AdamW, lr=1e-2), tmp_path)


@pytest.mark.parametrize(
    ("provoke", "says"),
    [
        (lambda folder: find_triples(many(lora_dropout=0.05)), "lora_dropout=0.05.*224 layers"),
        (lambda folder: many_tied(), "its W is .*likewise in 223 layers"),
        (lambda folder: many_changed(lambda model: model.merge_adapter()), "merged into W.*224 layers"),
        (lambda folder: many_changed(rescale), "its scaling was .*likewise in 223 layers"),
        (many_saved, "it is no layer of this PeftModel.*224 layers"),
    ],
)
def test_a_problem_of_224_layers_is_told_once(provoke, says, tmp_path):
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){says}") as caught:
        provoke(tmp_path)
    assert len(str(caught.value)) < 1500


def test_a_save_of_224_layers_warns_once(tmp_path):
    model = many()
    optimizer = DeltaLoRAOptimizer.for_model(model, AdamW, lr=1e-2)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    with pytest.warns(UserWarning, match="save_pretrained writes the adapter alone") as caught:
        model.save_pretrained(tmp_path)
    (warning,) = caught
    assert len(str(warning.message)) < 1500
