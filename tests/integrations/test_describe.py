"""describe() of PEFT models: what is taken, what is left out and why, for good and bad layers of every kind."""

import copy
import json

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer, describe, find_triples
from deltaopt.tables import WIDTH
from tests.support.models import causal_lm
from tests.support.peft_layers import CASES, PEFT_CAN_NOT, Classifier, gpt2_config, mlp, quantized, tiny_llama

# isort: split
import peft
import transformers
from peft import LoraConfig, get_peft_model

pytestmark = [
    pytest.mark.extra,
    pytest.mark.filterwarnings(
        "ignore:.*is_gradient_checkpointing.*:FutureWarning",
        "ignore:LoRA adapter added to ConvNd layer with groups:UserWarning",
    ),
]


def left(told, kind):
    return {entry.name: entry.why for entry in told.left_out if entry.kind == kind}


def hooks_of(model):
    return {
        name: sorted((key, len(value)) for key, value in vars(module).items() if key.endswith("_hooks"))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", sorted(set(CASES) - PEFT_CAN_NOT))
def test_the_rows_are_the_triples_that_are_found(name):
    build, targets, _, options = CASES[name]
    model = get_peft_model(build(), LoraConfig(r=3, lora_alpha=6, target_modules=targets, **options))
    rows = describe(model).rows
    triples = find_triples(model)
    assert [row.name for row in rows] == [triple.label for triple in triples]
    for row, triple in zip(rows, triples, strict=True):
        assert (row.shape, row.scaling, row.layout) == (tuple(triple.W.shape), triple.scaling, triple.layout)
        assert (row.r, row.rule, row.moves) == (3, "either", triple.W.numel())
        held = dict(model.named_parameters())
        assert [p.shape for p in row.parameters] == [tuple(held[p.name].shape) for p in row.parameters]
        assert [held[p.name] is factor for p, factor in zip(row.parameters, (triple.A, triple.B), strict=True)] == [
            True,
            True,
        ]


def test_it_leaves_the_model_as_it_is():
    model = causal_lm()
    hooks, config = hooks_of(model), model.peft_config["default"]
    unloads = {name: "unload_and_optionally_merge_module" in vars(m) for name, m in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    describe(model)
    assert hooks_of(model) == hooks
    assert model.peft_config["default"] is config
    assert {n: "unload_and_optionally_merge_module" in vars(m) for n, m in model.named_modules()} == unloads
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


class Mixed(nn.Module):
    """One layer of each kind that is refused, and good ones."""

    def __init__(self):
        super().__init__()
        self.good, self.worse = nn.Linear(4, 4), nn.Linear(4, 4)
        self.grouped, self.circular = nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3, padding_mode="circular")
        self.embed, self.unembed = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.unembed.weight = self.embed.weight
        self.free = nn.Conv2d(3, 4, 1)
        self.norm = nn.LayerNorm(4)


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")
def test_each_bad_layer_is_listed_with_its_reason():
    targets = ["good", "worse", "grouped", "circular", "embed"]
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=targets))
    layers = model.base_model.model
    layers.worse.lora_dropout["default"] = nn.Dropout(0.1)
    layers.norm.weight.requires_grad_(True)
    told = describe(model)
    assert [row.name for row in told.rows] == ["base_model.model.good"]
    refused = left(told, "refused")
    assert {name.removeprefix("base_model.model."): why.split(",")[0] for name, why in refused.items()} == {
        "worse": "it has lora_dropout=0.1",
        "grouped": "its convolution has groups",
        "circular": "its convolution has padding_mode='circular' and PEFT's branch pads with zeros",
        "embed": "its W is base_model.model.embed.base_layer.weight and base_model.model.unembed.weight",
    }
    assert left(told, "no branch") == {"base_model.model.free": "Conv2d"}
    assert [(e.name, e.count) for e in told.left_out if e.kind == "trains without a W"] == [
        ("base_model.model.norm.weight", 4)
    ]
    with pytest.raises(ValueError, match="these PEFT layers cannot be used") as raised:
        find_triples(model)
    for name in ("worse", "grouped", "circular"):
        assert refused[f"base_model.model.{name}"] in str(raised.value)


def test_variants_merged_layers_and_other_adapters():
    model = get_peft_model(mlp(4, 4, 4, 4), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["1", "2"]))
    told = describe(model)
    assert told.rows == []
    assert "LoRA variant (DoraLinearVariant)" in left(told, "refused")["base_model.model.0"]
    assert left(told, "other adapter or method") == {f"base_model.model.{i}": "it holds 'other' only" for i in (1, 2)}
    model.set_adapter("other")
    told = describe(model, "other")
    assert [row.name for row in told.rows] == ["base_model.model.1", "base_model.model.2"]
    assert left(told, "other adapter or method") == {"base_model.model.0": "it holds 'default' only"}
    model.merge_adapter(["other"])
    told = describe(model, "other")
    assert set(left(told, "refused")) == {"base_model.model.1", "base_model.model.2"}
    assert all("the branch is merged into W" in why for why in left(told, "refused").values())


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(target_modules=["0"]),
        peft.OFTConfig(target_modules=["0"], r=2, oft_block_size=0),
        peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
        peft.VeraConfig(target_modules=["0"], r=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_methods_are_no_lora(config):
    told = describe(get_peft_model(mlp(4, 4, 4), config))
    assert told.rows == []
    assert "another method than LoRA" in left(told, "other adapter or method")["base_model.model.0"]
    assert left(told, "no branch") == {"base_model.model.1": "Linear"}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_for_the_folded_rule(bits):
    model = nn.Sequential(quantized(bits), nn.Linear(32, 8))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "1"]))
    told = describe(model)
    quant, plain = told.rows
    assert (quant.rule, plain.rule) == ("folded", "either")
    assert quant.shape == (32, 64)
    assert quant.dtype in ("uint8 Params4bit", "int8 Int8Params")
    assert 'Take weight_update="folded"' in quant.why
    assert "folded only: W " in str(told)
    DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, weight_update="folded")


def test_a_classifier_with_a_head():
    config = LoraConfig(r=2, target_modules=["hidden", "embed"], modules_to_save=["head"], bias="all")
    told = describe(get_peft_model(Classifier(), config))
    trains = {entry.name.removeprefix("base_model.model."): entry.count for entry in told.left_out if entry.count}
    assert trains == {
        "hidden.base_layer.bias": 8,
        "norm.bias": 8,
        "head.modules_to_save.default.weight": 24,
        "head.modules_to_save.default.bias": 3,
    }
    assert "4 parameters (43 numbers)" in str(told)


def test_a_model_on_the_meta_device():
    """Shapes alone are known; tied weights are found by the Parameter."""
    with torch.device("meta"):
        base = transformers.GPT2LMHeadModel(gpt2_config())
    base.tie_weights()
    config = LoraConfig(r=2, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    told = describe(model)
    assert not told.loaded
    assert [(row.rule, row.shape, row.device) for row in told.rows] == [("either", (8, 24), "meta")] * 2
    assert [*left(told, "refused")] == ["base_model.model.transformer.wte"]
    assert "its weights are not loaded" in str(told)


def test_one_offloaded_layer_of_a_loaded_model():
    model = get_peft_model(mlp(4, 4, 4), LoraConfig(r=2, target_modules=["0", "1"]))
    model.base_model.model[0].base_layer.to("meta")
    told = describe(model)
    assert told.loaded
    assert [row.rule for row in told.rows] == ["folded", "either"]
    assert "W is on the meta device" in told.rows[0].why


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_two_hundred_layers_take_few_lines(dropout):
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    told = describe(get_peft_model(tiny_llama(num_hidden_layers=29), config))
    layers = told.left_out if dropout else told.rows
    assert sum("layers." in layer.name for layer in layers) == 203
    lines = str(told).splitlines()
    assert len(lines) < 16
    assert max(map(len, lines)) <= WIDTH
    assert "layers.{0..28}.self_attn.{q_proj," in str(told)
    assert json.loads(json.dumps(told.as_dict()))["left_out"]


def test_a_compiled_model_has_the_same_names():
    model = causal_lm()
    expected = describe(model).as_dict()
    told = describe(torch.compile(model)).as_dict()
    assert {**told, "subject": ""} == {**expected, "subject": ""}
