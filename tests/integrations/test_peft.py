"""PEFT's layers as triples: W moves by what PEFT itself calls the delta weight, or the layer is refused by name."""

import copy
import re

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple, find_triples, other_parameters

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")

import transformers
from peft import AdaLoraConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from transformers.pytorch_utils import Conv1D

from tests.support import strategies
from tests.support.compare import in_order, naming, refused
from tests.support.models import RATIO
from tests.support.peft_layers import (
    CASES,
    HOOKS_CAN_NOT,
    PEFT_CAN_NOT,
    assert_step_refused,
    gpt2_config,
    image,
    layer_weights,
    lora_layers,
    mlp,
    peft_deltas,
    quantized,
    randomised,
    rows_of_tokens,
    tied_outputs_are_named,
    tied_weights_are_meant,
    tiny_llama,
    train_model,
    weight,
)
from tests.support.peft_runs import peft_asks_by_an_old_name

pytestmark = peft_asks_by_an_old_name

TRAINABLE = sorted(CASES.keys() - PEFT_CAN_NOT)


def with_adapters(model: nn.Module, *targets: str, **config) -> nn.Module:
    """Give the model random adapters, in float64."""
    config = {"r": 3, "lora_alpha": 5, "target_modules": list(targets), **config}
    return randomised(get_peft_model(model, LoraConfig(**config)))


def assert_moves_by_peft_delta(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    """Assert that every W moves by RATIO times the change of PEFT's delta weight, in each step, to 1e-12."""
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO)
    assert [triple.name for triple in optimizer.triples] == list(lora_layers(model))
    for _ in range(steps):
        before, deltas_before = layer_weights(model), peft_deltas(model)
        train_model(model, optimizer, x, steps=1)
        after, deltas_after = layer_weights(model), peft_deltas(model)
        for name, W in before.items():
            asked = RATIO * (deltas_after[name] - deltas_before[name])
            assert asked.abs().max() > 1e-4, name
            torch.testing.assert_close(after[name], W + asked, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def case(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Build (the plain model, the same with adapters, an input), in float64."""
    build, targets, inputs, config = CASES[name]
    plain = build().double()
    return plain, with_adapters(copy.deepcopy(plain), *targets, **config), inputs()


@pytest.mark.parametrize("name", TRAINABLE)
def test_w_moves_by_pefts_own_delta_weight(name):
    _, model, x = case(name)
    assert_moves_by_peft_delta(model, x)


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_forward_pass_after_training_is_a_dense_one(name):
    """The plain model with W0 + RATIO * (delta - delta0) + delta written into it gives the same output."""
    plain, model, x = case(name)
    start = peft_deltas(model)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO)
    train_model(model, optimizer, x, steps=3)
    end = peft_deltas(model)
    with torch.no_grad():
        untouched = plain(x)
        for label in end:
            path = label.removeprefix("base_model.model.").replace(".base_layer", "")
            module = plain.get_submodule(path.split(".")[0])
            W = getattr(module, path.split(".")[1] if "." in path else "weight")
            W += RATIO * (end[label] - start[label]) + end[label]
        assert (plain(x) - untouched).abs().max() > 1e-2
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-11)


# PEFT sets the flag for each layer itself and says so.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning:peft")
def test_the_orientation_is_the_layers_own_not_the_configs():
    """PEFT flips the shared config's fan_in_fan_out while it walks over a model with both kinds of layers."""
    model = with_adapters(nn.Sequential(nn.Linear(6, 6), Conv1D(6, 6), nn.Linear(6, 6)), "0", "1", "2")
    assert [layer.fan_in_fan_out for layer in lora_layers(model).values()] == [False, True, False]
    assert_moves_by_peft_delta(model, image(6))


@pytest.mark.parametrize(
    ("config", "ranks", "scalings"),
    [
        ({}, [3, 3, 3], [5 / 3, 5 / 3, 5 / 3]),
        ({"use_rslora": True}, [3, 3, 3], [5 / 3**0.5] * 3),
        ({"rank_pattern": {"1": 2}}, [3, 2, 3], [5 / 3, 5 / 2, 5 / 3]),
        ({"alpha_pattern": {"2": 16}}, [3, 3, 3], [5 / 3, 5 / 3, 16 / 3]),
        (
            {"rank_pattern": {"0": 1, "2": 4}, "alpha_pattern": {"0": 2}, "use_rslora": True},
            [1, 3, 4],
            [2.0, 5 / 3**0.5, 2.5],
        ),
    ],
)
def test_ranks_and_scalings_are_each_layers_own(config, ranks, scalings):
    model = with_adapters(mlp(7, 5, 6, 4), "0", "1", "2", **config)
    triples = find_triples(model)
    assert [triple.B.shape[0] for triple in triples] == ranks
    assert [triple.scaling for triple in triples] == pytest.approx(scalings)
    assert_moves_by_peft_delta(model, image(7))


@given(strategies.peft_layers)
def test_any_shape_rank_and_alpha(drawn):
    config = dict(drawn)
    kind, c, d = (config.pop(key) for key in ("kind", "c", "d"))
    plain, x = {
        "linear": (nn.Linear(d, c), image(d)),
        "conv1d_gpt2": (Conv1D(c, d), image(d)),
        "embedding": (nn.Embedding(d, c), rows_of_tokens(d)),
        "conv2d": (nn.Conv2d(d, c, (1, 2)), image(d, 2, 2)),
    }[kind]
    model = with_adapters(nn.Sequential(plain), "0", fan_in_fan_out=kind == "conv1d_gpt2", **config)
    (layer,) = lora_layers(model).values()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, find_triples(model), lr=1e-3, update_ratio=RATIO)
    W, delta = weight(layer).clone(), layer.get_delta_weight("default").detach()
    train_model(model, optimizer, x, steps=1)
    asked = RATIO * (layer.get_delta_weight("default").detach() - delta)
    assert asked.abs().max() > 0
    torch.testing.assert_close(weight(layer), W + asked, rtol=1e-12, atol=1e-12)


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" not in name]


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, None) for name in TRAINABLE] + [(name, "hooks") for name in TRAINABLE if name not in HOOKS_CAN_NOT],
)
def test_base_weights_and_disable_adapter_give_the_pristine_output(name, method):
    plain, model, x = case(name)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO, start_step=1)
    train_model(model, optimizer, x, steps=4)
    with torch.no_grad():
        trained, pristine = model(x), plain(x)
        assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), base_parameters(model), strict=True))
        with optimizer.base_weights(method=method), model.disable_adapter():
            torch.testing.assert_close(model(x), pristine, rtol=0, atol=1e-11)
        assert torch.equal(model(x), trained)


@pytest.mark.parametrize("name", sorted(HOOKS_CAN_NOT - PEFT_CAN_NOT))
def test_hooks_are_refused_where_a_layer_computes_something_else_from_w(name):
    _, model, x = case(name)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO, start_step=1)
    train_model(model, optimizer, x, steps=4)
    refused(
        lambda: optimizer.base_weights(method="hooks").__enter__(),
        RuntimeError,
        "computes from W is not known here",
        lambda: model.state_dict(),
    )


def lm_loss(model: nn.Module) -> Tensor:
    ids = torch.arange(12).view(2, 6)
    return model(input_ids=ids, labels=ids).loss


def lm_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    lm_loss(model).backward()
    optimizer.step()


def assert_lm_moves(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    before, deltas = layer_weights(model), peft_deltas(model)
    lm_step(model, optimizer)
    for name, delta in peft_deltas(model).items():
        asked = RATIO * (delta - deltas[name])
        assert asked.abs().max() > 1e-5, name
        torch.testing.assert_close(layer_weights(model)[name], before[name] + asked, rtol=0, atol=1e-12)


# PEFT sets the flag for lm_head, an nn.Linear, itself.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning:peft")
def test_all_layers_of_a_gpt2_at_once():
    """c_attn is (8, 24), c_fc (8, 12) and both c_proj differ: one model with four shapes, and its embedding."""
    model = with_adapters(
        transformers.GPT2LMHeadModel(gpt2_config(tie_word_embeddings=False)),
        *("c_attn", "c_fc", "c_proj", "wte", "lm_head"),
        fan_in_fan_out=True,
    )
    triples = find_triples(model)
    assert len(triples) == 2 * 4 + 2
    assert [triple.layout for triple in triples].count("transposed") == 8
    assert_lm_moves(model, DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=1e-2, update_ratio=RATIO))


def test_triples_come_in_the_order_and_with_the_names_of_the_modules():
    model = with_adapters(tiny_llama(), "q_proj", "v_proj", "down_proj")
    prefix = "base_model.model.model.layers"
    assert [triple.name for triple in find_triples(model)] == [
        f"{prefix}.{layer}.{name}"
        for layer in range(2)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]


def test_nested_wrappers_of_one_module_have_names_of_their_own():
    _, model, _ = case("experts_3_7x5_up_down")
    names = [triple.name for triple in find_triples(model)]
    assert len(set(names)) == 2
    assert {name.split(".")[-1] for name in names} == {"up", "down"}


def test_pefts_names_are_translated():
    model = with_adapters(mlp(7, 5), "0")
    (triple,) = find_triples(model)
    (layer,) = lora_layers(model).values()
    assert triple.W is layer.base_layer.weight
    assert triple.A is layer.lora_B["default"].weight
    assert triple.B is layer.lora_A["default"].weight


def test_the_adapter_is_chosen_by_name():
    model = randomised(get_peft_model(mlp(7, 5), LoraConfig(r=3, target_modules=["0"]), adapter_name="mine"), "mine")
    with pytest.raises(
        ValueError, match=r"in this PeftModel: no layer holds .* 'default', .* the adapter 'mine': give adapter='mine'"
    ):
        find_triples(model)
    (triple,) = find_triples(model, "mine")
    assert triple.A is model.base_model.model[0].lora_B["mine"].weight
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, adapter="mine", lr=0.1)
    W = triple.W.clone()
    train_model(model, optimizer, image(7), steps=1)
    assert not torch.equal(triple.W, W)


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)].removeprefix("base_model.model.") for p in parameters]


def assert_everything_trains(model: nn.Module, x: Tensor, others: list[str]) -> None:
    """Assert that `others` are the other parameters, and that one step changes them, the factors and every W."""
    triples = find_triples(model)
    assert names_of(model, other_parameters(model, triples)) == others
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, update_ratio=RATIO)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_model(model, optimizer, x, steps=1)
    W_names = names_of(model, [triple.W for triple in triples])
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == (parameter.requires_grad or name.removeprefix("base_model.model.") in W_names), name


def test_modules_to_save_train_with_the_triples():
    model = with_adapters(mlp(7, 5, 4), "0", modules_to_save=["1"])
    head = ["1.modules_to_save.default.weight", "1.modules_to_save.default.bias"]
    assert_everything_trains(model, image(7), head)


@pytest.mark.parametrize(("bias", "others"), [("none", []), ("lora_only", [0]), ("all", [0, 1])])
# PEFT's note that a trained bias changes the base model.
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning:peft")
def test_biases_train_with_the_triples(bias, others):
    model = with_adapters(mlp(7, 5, 4), "0", bias=bias)
    names = ["0.base_layer.bias", "1.bias"]
    assert_everything_trains(model, image(7), [names[i] for i in others])


def test_the_bias_of_lora_b_trains_and_moves_no_weight():
    model = with_adapters(mlp(7, 5, 4), "0", lora_bias=True)
    assert_everything_trains(model, image(7), ["0.lora_B.default.bias"])
    assert_moves_by_peft_delta(with_adapters(mlp(7, 5, 4), "0", lora_bias=True), image(7))


def test_a_classifier_head_trains_with_the_triples():
    classifier = transformers.GPT2ForSequenceClassification(gpt2_config(num_labels=3, pad_token_id=0))
    model = with_adapters(classifier, "c_attn", task_type="SEQ_CLS", fan_in_fan_out=True)
    triples = find_triples(model)
    others = other_parameters(model, triples)
    assert names_of(model, others) == ["score.modules_to_save.default.weight"]
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2)
    head, W = others[0].detach().clone(), triples[0].W.clone()
    model(input_ids=torch.arange(1, 7).view(2, 3), labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    assert not torch.equal(others[0], head)
    assert not torch.equal(triples[0].W, W)


def test_for_model_leaves_the_frozen_weights_out_of_the_inner_optimizer():
    model = with_adapters(mlp(7, 5, 4), "0", modules_to_save=["1"])
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2)
    held = [p for group in optimizer.inner.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == 4


def test_transformers_add_adapter_without_a_peft_model():
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]), adapter_name="default")
    model = randomised(model)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, update_ratio=RATIO)
    assert optimizer.triples[0].name == "model.layers.0.self_attn.q_proj"
    assert_lm_moves(model, optimizer)


def test_inject_adapter_in_model_without_a_peft_model():
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1"])
    model = randomised(inject_adapter_in_model(config, mlp(7, 5, 4)))
    assert [triple.name for triple in find_triples(model)] == ["0", "1"]
    assert_moves_by_peft_delta(model, image(7))


def test_a_bf16_weight_moves_with_float32_adapters():
    """PEFT makes the adapters of a 16-bit model float32; W moves by the float32 delta, rounded once."""
    model = get_peft_model(
        mlp(7, 5, bias=False).bfloat16(), LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
    )
    (layer,) = lora_layers(model).values()
    assert weight(layer).dtype == torch.bfloat16
    assert layer.lora_A["default"].weight.dtype == torch.float32
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=0.1, update_ratio=RATIO)
    for _ in range(3):
        W, delta = weight(layer).float(), layer.get_delta_weight("default").detach().double()
        train_model(model, optimizer, torch.randn(4, 7, dtype=torch.bfloat16), steps=1)
        asked = RATIO * (layer.get_delta_weight("default").detach().double() - delta)
        assert not torch.equal(weight(layer).float(), W)
        # A unit in the last place of bf16's 8 bits: one of the two neighbours.
        torch.testing.assert_close(weight(layer).double(), W + asked, rtol=2**-7, atol=1e-6)


def test_w_is_found_again_after_a_conversion_of_the_model():
    model = get_peft_model(mlp(7, 5), LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, update_ratio=RATIO)
    train_model(model, optimizer, torch.randn(2, 7), steps=1)
    model.to(torch.float64)
    before, deltas = layer_weights(model), peft_deltas(model)
    train_model(model, optimizer, image(7), steps=1)
    for name, delta in peft_deltas(model).items():
        asked = RATIO * (delta - deltas[name])
        assert asked.abs().max() > 1e-4
        torch.testing.assert_close(layer_weights(model)[name], before[name] + asked, rtol=0, atol=1e-12)


def test_a_new_parameter_in_the_base_layer_is_the_one_that_moves():
    model = with_adapters(mlp(7, 5), "0")
    (layer,) = lora_layers(model).values()
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, update_ratio=RATIO)
    train_model(model, optimizer, image(7), steps=1)
    old = layer.base_layer.weight
    old_bits = old.detach().clone()
    new = nn.Parameter(torch.randn(5, 7, dtype=torch.float64), requires_grad=False)
    layer.base_layer.weight = new
    start, delta = new.clone(), layer.get_delta_weight("default").detach()
    train_model(model, optimizer, image(7), steps=1)
    asked = RATIO * (layer.get_delta_weight("default").detach() - delta)
    torch.testing.assert_close(new, start + asked, rtol=0, atol=1e-12)
    assert layer.base_layer.weight is new
    assert torch.equal(old, old_bits)


def test_factors_replaced_by_load_adapter_are_refused(tmp_path):
    model = with_adapters(mlp(7, 5), "0")
    model.save_pretrained(tmp_path)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1)
    train_model(model, optimizer, image(7), steps=1)
    model.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=True)
    model(image(7)).sum().backward()
    match = r"(?s)must hold the very Parameter objects.*build the optimizer afterwards.*model\.0: A is not among"
    assert_step_refused(model, optimizer, ValueError, match)


def test_factors_loaded_in_place_are_trained_on(tmp_path):
    """The default of load_adapter copies into the same Parameters, and training continues from the loaded values."""
    model = with_adapters(mlp(7, 5), "0")
    model.save_pretrained(tmp_path)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, update_ratio=RATIO)
    train_model(model, optimizer, image(7), steps=2)
    moved = layer_weights(model)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    deltas = peft_deltas(model)
    with pytest.warns(UserWarning, match=r"A and B of 1 layer .* were changed between two steps"):
        train_model(model, optimizer, image(7), steps=1)
    for name, delta in peft_deltas(model).items():
        torch.testing.assert_close(layer_weights(model)[name], moved[name] + RATIO * (delta - deltas[name]))


def test_parameters_replaced_by_a_conversion_are_refused():
    model = get_peft_model(mlp(7, 5), LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert_step_refused(model, optimizer, ValueError, r"(?s)must hold the very Parameter objects.*model\.0: B is not")


def search_refused(model: nn.Module, *parts: str, adapter: str = "default", **options) -> str:
    """Assert that `find_triples` raises with all of `parts` in this order; return its message."""
    return refused(lambda: find_triples(model, adapter, **options), ValueError, in_order(*parts))


def optimizer_refused(model: nn.Module, *parts: str, **options) -> str:
    """Assert that `find_triples` passes, and that the optimizer raises; return its message."""
    triples = find_triples(model, **options)
    return refused(lambda: DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1), ValueError, in_order(*parts))


def bad_layers(message: str, problem: str, *names: str) -> list[str]:
    """List the layers that have this problem by the message, in a line each or in one line for all."""
    lines = "\n".join(line for line in message.splitlines() if problem in line)
    return [name for name in names if re.search(rf"{re.escape(name)}[:,)]", lines)]


def test_dropout_is_refused():
    model = with_adapters(mlp(7, 5), "0", lora_dropout=0.25)
    search_refused(model, "base_model.model.0: it has lora_dropout=0.25", "set lora_dropout=0", "allow_dropout=True")


def test_dropout_is_accepted_when_asked_for():
    model = with_adapters(mlp(7, 5), "0", lora_dropout=0.25)
    assert len(find_triples(model, allow_dropout=True)) == 1
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, update_ratio=RATIO, allow_dropout=True)
    before, deltas = layer_weights(model), peft_deltas(model)
    train_model(model, optimizer, image(7), steps=1)
    for name, delta in peft_deltas(model).items():
        torch.testing.assert_close(layer_weights(model)[name], before[name] + RATIO * (delta - deltas[name]))


def test_dora_is_refused():
    model = with_adapters(mlp(7, 5), "0", use_dora=True)
    search_refused(model, "base_model.model.0: its branch is a LoRA variant (DoraLinearVariant)", "use plain LoRA")


def test_adalora_on_a_convolution_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    model = get_peft_model(model, AdaLoraConfig(target_modules=["0"], init_r=3, target_r=2, total_step=10))
    search_refused(
        model, "base_model.model.0: it is a peft.tuners.adalora.layer.SVDConv2d", "W can be moved in lora.Linear"
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


def test_multihead_attention_is_refused():
    """Its in_proj_weight is another Parameter after every forward pass."""
    model = get_peft_model(Attention(), LoraConfig(r=3, target_modules=["attn"]))
    search_refused(
        model, "base_model.model.attn: it is a peft.tuners.lora.layer.MultiheadAttention", "W can be moved in"
    )


# PEFT makes the layer and notes that it cannot be merged.
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning:peft")
def test_a_grouped_convolution_is_refused():
    model = with_adapters(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), "0", r=4)
    message = search_refused(model, "base_model.model.0: its convolution has groups")
    assert "target_modules" in message, "the message names no way out"


def test_a_merged_adapter_is_refused_at_registration():
    model = with_adapters(mlp(7, 5), "0")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged into W.*unmerge_adapter\(\)"):
        DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1)
    model.unmerge_adapter()
    assert len(DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1).triples) == 1


def test_an_adapter_merged_between_find_triples_and_the_optimizer_is_refused():
    model = with_adapters(mlp(7, 5), "0")
    triples = find_triples(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged into W.*unmerge_adapter\(\)"):
        DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_step_while_the_adapter_is_merged_is_refused(merge):
    model = with_adapters(mlp(7, 5, 4), "0", "1")
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1)
    train_model(model, optimizer, image(7), steps=1)
    model(image(7)).sum().backward()
    getattr(model, merge)()
    match = naming("model.0", "model.1") + r"moved now.* is merged into W.*unmerge_adapter\(\)"
    assert_step_refused(model, optimizer, RuntimeError, match)


def test_training_continues_after_unmerging():
    model = with_adapters(mlp(7, 5), "0")
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, update_ratio=RATIO)
    train_model(model, optimizer, image(7), steps=1)
    model.merge_adapter()
    model.unmerge_adapter()
    before, deltas = layer_weights(model), peft_deltas(model)
    train_model(model, optimizer, image(7), steps=1)
    for name, delta in peft_deltas(model).items():
        torch.testing.assert_close(layer_weights(model)[name], before[name] + RATIO * (delta - deltas[name]))


def test_evaluation_with_the_adapter_disabled_does_not_disturb_the_next_step():
    model = with_adapters(mlp(7, 5), "0")
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, update_ratio=RATIO)
    train_model(model, optimizer, image(7), steps=1)
    before, deltas = layer_weights(model), peft_deltas(model)
    with model.disable_adapter(), torch.no_grad():
        model(image(7))
    train_model(model, optimizer, image(7), steps=1)
    for name, delta in peft_deltas(model).items():
        torch.testing.assert_close(layer_weights(model)[name], before[name] + RATIO * (delta - deltas[name]))


@pytest.mark.parametrize(
    "rescale", [lambda layer: layer.set_scale("default", 0.5), lambda layer: layer.scale_layer(0.5)]
)
def test_a_changed_scaling_is_refused(rescale):
    model = with_adapters(mlp(7, 5), "0", r=4, lora_alpha=8)
    (layer,) = lora_layers(model).values()
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1)
    model(image(7)).sum().backward()
    rescale(layer)
    match = r"model\.0: its scaling was 2 when it was registered and is 1\.0 now.*build the optimizer again, or put"
    assert_step_refused(model, optimizer, RuntimeError, match)
    layer.set_scale("default", 1.0)
    optimizer.step()
    assert optimizer.step_count == 1


def test_a_deleted_adapter_is_refused_by_name():
    model = with_adapters(mlp(7, 5), "0")
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["0"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert_step_refused(model, optimizer, (RuntimeError, ValueError), r"model\.0")


@pytest.mark.parametrize(("bits", "kind"), [(8, "Linear8bitLt"), (4, "Linear4bit")])
def test_a_bitsandbytes_base_is_refused_in_place(bits, kind):
    base = nn.Sequential(quantized(bits))
    setattr(base, f"is_loaded_in_{bits}bit", True)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["0"]))
    assert type(model.base_model.model[0]).__name__ == kind
    ways = 'weight_update="folded"', "16 or 32 bits"
    optimizer_refused(model, "base_model.model.0: W is a bitsandbytes", *ways)


def test_a_packed_weight_that_says_it_is_bf16_is_refused():
    """With quant_storage=bfloat16 the packed numbers pass every test of the dtype."""
    layer = quantized(4, quant_storage=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.is_floating_point()
    rows = layer.weight.shape[0]
    A, B = torch.randn(rows, 3, requires_grad=True), torch.randn(3, 1, requires_grad=True)
    with pytest.raises(ValueError, match=r"(?s)packed: W is a bitsandbytes\S+Params4bit.*load the layer in 16 or 32"):
        DeltaLoRAOptimizer(torch.optim.SGD, [LoRATriple(layer.weight, A, B, name="packed")], lr=0.1)


@tied_weights_are_meant
def test_a_tied_lm_head_is_refused():
    model = with_adapters(tiny_llama(tie_word_embeddings=True), "lm_head")
    search_refused(
        model,
        "Leave them out of target_modules, or pass allow_tied=True",
        "base_model.model.lm_head: its W is ",
        "embed_tokens.weight and ",
        "lm_head.base_layer.weight",
    )
    with pytest.raises(ValueError, match=r"(?s)allow_tied=True.*lm_head"):
        DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1)


@tied_outputs_are_named
@tied_weights_are_meant
def test_a_tied_lm_head_moves_with_the_embedding_when_asked_for():
    model = with_adapters(tiny_llama(tie_word_embeddings=True), "lm_head")
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1, update_ratio=RATIO, allow_tied=True)
    assert_lm_moves(model, optimizer)
    assert model.get_input_embeddings().weight is model.base_model.model.lm_head.base_layer.weight


@tied_weights_are_meant
def test_a_tied_embedding_is_refused():
    model = with_adapters(tiny_llama(tie_word_embeddings=True), "embed_tokens")
    search_refused(model, "allow_tied=True", "embed_tokens: its W is ", "lm_head.weight")


@tied_weights_are_meant
def test_tied_adapters_are_refused():
    """ensure_weight_tying makes four Parameters on two storages, for one W: it would move twice."""
    model = with_adapters(tiny_llama(tie_word_embeddings=True), "embed_tokens", "lm_head", ensure_weight_tying=True)
    message, names = search_refused(model, "its W is "), ["model.embed_tokens", "model.lm_head"]
    assert bad_layers(message, "its W is ", *names) == names
    optimizer_refused(model, "lm_head: its W shares memory with the W of ", "embed_tokens", allow_tied=True)


def test_replicated_layers_are_refused():
    model = with_adapters(tiny_llama(), "q_proj", layer_replication=[[0, 2], [0, 2]])
    assert len(lora_layers(model)) == 4
    message = search_refused(model, "its W is ", "layers.2.self_attn.q_proj.base_layer.weight")
    names = [f"layers.{i}.self_attn.q_proj" for i in range(4)]
    assert bad_layers(message, "its W is ", *names) == names
    optimizer_refused(model, "layers.2.self_attn.q_proj: its W shares memory", "keep one of them", allow_tied=True)


def test_a_weight_on_the_meta_device_is_refused():
    model = with_adapters(mlp(7, 5), "0")
    (layer,) = lora_layers(model).values()
    layer.base_layer.to("meta")
    optimizer_refused(model, "base_model.model.0: W is on the meta device", "load the model onto a real device")


def test_a_weight_offloaded_by_accelerate_is_refused():
    accelerate = pytest.importorskip("accelerate", reason="runs where accelerate is installed")
    model = with_adapters(mlp(7, 5), "0")
    accelerate.cpu_offload(model, execution_device="cpu")
    optimizer_refused(model, "base_model.model.0: W is on the meta", "offloaded by an accelerate hook")


@pytest.mark.parametrize("sequential", [False, True])
def test_an_offload_hook_is_seen_before_it_has_taken_the_weight_away(sequential):
    hooks = pytest.importorskip("accelerate.hooks", reason="runs where accelerate is installed")
    model = with_adapters(mlp(7, 5), "0")
    (layer,) = lora_layers(model).values()
    hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True)
    layer.base_layer._hf_hook = hooks.SequentialHook(hook) if sequential else hook
    optimizer_refused(model, "model.0: W is offloaded by an accelerate hook", "device_map", "in memory")


def test_a_weight_that_requires_grad_is_refused():
    model = with_adapters(mlp(7, 5), "0")
    (layer,) = lora_layers(model).values()
    layer.base_layer.weight.requires_grad_(True)
    optimizer_refused(model, "base_model.model.0: W requires grad", "requires_grad_(False)")


def test_a_weight_unfrozen_between_steps_is_refused():
    model = with_adapters(mlp(7, 5), "0")
    (layer,) = lora_layers(model).values()
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1)
    train_model(model, optimizer, image(7), steps=1)
    layer.base_layer.weight.requires_grad_(True)
    assert_step_refused(model, optimizer, ValueError, r"model\.0: W requires grad.*requires_grad_\(False\)")


def test_an_inactive_adapter_is_refused():
    model = with_adapters(mlp(7, 5), "0")
    model.add_adapter("other", LoraConfig(r=3, target_modules=["0"]))
    model.set_adapter("other")
    optimizer_refused(model, "base_model.model.0: neither A nor B requires grad", "activate the adapter")


# PEFT notes that the grouped convolution cannot be merged.
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning:peft")
def test_one_message_names_all_bad_layers():
    convolutions = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=2), nn.Conv2d(6, 4, 3))
    model = with_adapters(convolutions, "0", "1", "2", r=4, lora_dropout=0.25)
    message, names = search_refused(model, "it has lora_dropout"), ("model.0", "model.1", "model.2")
    assert bad_layers(message, "it has lora_dropout", *names) == ["model.0", "model.2"]
    assert bad_layers(message, "its convolution has groups", *names) == ["model.1"]
    assert len(message.splitlines()) in (3, 4)


def test_one_message_names_all_bad_tensors():
    model = with_adapters(mlp(7, 5, 4), "0", "1")
    first, second = lora_layers(model).values()
    first.base_layer.weight.requires_grad_(True)
    second.base_layer.to("meta")
    optimizer_refused(model, "model.0: W requires grad", "model.1: W is on the meta device")


def test_two_adapters_of_one_weight_cannot_both_move_it():
    model = with_adapters(mlp(7, 5), "0")
    model.add_adapter("other", LoraConfig(r=3, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    triples = [*find_triples(model), *find_triples(model, "other")]
    triples[1].name = "other"
    with pytest.raises(ValueError, match=r"other: its W shares memory with the W of base_model\.model\.0"):
        DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1)


def test_the_moved_weight_and_the_adapter_reload_to_the_same_outputs():
    """A full state dict holds W; PEFT's adapter alone does not."""
    plain, model, x = case("linear")
    fresh = with_adapters(copy.deepcopy(plain), "0", "1")
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO)
    train_model(model, optimizer, x, steps=3)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_copies_of_model_and_optimizer_train_alike():
    """A deepcopy of both together keeps the triples on the copied model."""
    _, model, x = case("linear")
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO)
    train_model(model, optimizer, x, steps=1)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    bits = layer_weights(model)
    train_model(other, other_optimizer, x, steps=1)
    for name, W in layer_weights(model).items():
        assert torch.equal(W, bits[name])
    train_model(model, optimizer, x, steps=1)
    for name, W in layer_weights(model).items():
        assert not torch.equal(W, bits[name])
        assert torch.equal(W, layer_weights(other)[name])


def test_dropout_that_is_set_after_registration_is_refused_at_the_step():
    model = with_adapters(mlp(7, 5), "0")
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, lr=0.1)
    model.base_model.model[0].lora_dropout["default"] = nn.Dropout(0.1)
    assert_step_refused(model, optimizer, RuntimeError, r"model\.0: it has lora_dropout=0\.1")


def test_a_layer_under_two_names_is_not_tied():
    model = with_adapters(mlp(7, 5), "0")
    model.alias = model.base_model.model
    assert len(find_triples(model)) == 1
