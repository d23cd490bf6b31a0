"""Quantized bases, which the folded rule alone trains: bitsandbytes, torchao, and the layers of GPTQ, AWQ and AQLM."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import deltaopt
from deltaopt import find_triples

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear

from deltaopt.integrations.peft import save_adapter
from tests.support.compare import same
from tests.support.peft_folded import (
    ALPHA,
    FOLDED_RATIO,
    LARGER,
    Trained,
    alphas,
    assert_near,
    assert_trained_alike,
    folded,
    layer_scalings,
    optimizer_of,
    state_of,
)
from tests.support.peft_layers import (
    config_in,
    layer_weights,
    output,
    quantized,
    train_model,
)
from tests.support.peft_runs import peft_asks_by_an_old_name

pytestmark = [
    peft_asks_by_an_old_name,
    # PEFT notes that it could not merge.
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning:peft"),
]


class Packed(nn.Module):
    """A linear layer as those of GPTQ and AWQ: packed numbers in buffers, and no `weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = 64, 32
        self.register_buffer("qweight", torch.randint(-8, 8, (64, 32), dtype=torch.int32))
        self.register_buffer("scales", torch.rand(32) / 40)
        self.register_buffer("bias", torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight * self.scales).to(x.dtype) + self.bias.to(x.dtype)


class QuantizedLinear(nn.Module):
    """A linear layer of this name and with these Parameters, in this order, as AQLM's: it has no `weight` either."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 64, 32
        self.codebooks = nn.Parameter(torch.randn(1, 16, 1, 8) / 8)
        self.codes = nn.Parameter(torch.randint(0, 16, (32, 8, 1), dtype=torch.int8), requires_grad=False)
        self.scales = nn.Parameter(torch.rand(32, 1, 1, 1))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codebooks[0, self.codes[..., 0].int(), 0].flatten(1) * self.scales[:, 0, 0]).to(x.dtype).T


def torchao_linear() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="runs where torchao is installed")
    base = nn.Sequential(nn.Linear(64, 32, bias=False))
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    return base[0]


KINDS = {
    "bnb4": (lambda: quantized(4), None),
    "bnb8": (lambda: quantized(8), None),
    "torchao": (torchao_linear, None),
    "gptq": (Packed, {Packed: GPTQLoraLinear}),
    "awq": (Packed, {Packed: AwqLoraLinear}),
    "aqlm": (QuantizedLinear, {QuantizedLinear: AqlmLoraLinear}),
}


STORED = {
    "bnb4": "W is a bitsandbytes",
    "bnb8": "W is a bitsandbytes",
    "torchao": "W is a torchao",
    "gptq": "W has dtype torch.int32",
    "awq": "W has dtype torch.int32",
    "aqlm": "W ",
}


every_kind = pytest.mark.parametrize("kind", KINDS)


def quantized_base(kind: str) -> nn.Module:
    """A quantized layer and one that is not, both to be targets."""
    base = nn.Sequential(KINDS[kind][0](), nn.Tanh(), nn.Linear(32, 8))
    if kind.startswith("bnb"):
        setattr(base, f"is_loaded_in_{kind[-1]}bit", True)
    return base


def quantized_config(kind: str, **config) -> LoraConfig:
    made = LoraConfig(**{"r": 3, "lora_alpha": ALPHA, "target_modules": ["0", "2"], **config})
    if KINDS[kind][1] is not None:  # PEFT takes these layers where their libraries are installed
        made._register_custom_module(KINDS[kind][1])
    return made


def quantized_model(base: nn.Module, kind: str, zero: bool = True, **config) -> nn.Module:
    model = get_peft_model(copy.deepcopy(base), quantized_config(kind, **config))
    if not zero:
        with torch.no_grad():
            model.base_model.model[0].lora_B["default"].weight.normal_()
    return model


def loaded_onto(base: nn.Module, folder, kind: str, **options) -> PeftModel:
    config = LoraConfig.from_pretrained(folder)
    if KINDS[kind][1] is not None:
        config._register_custom_module(KINDS[kind][1])
    return PeftModel.from_pretrained(copy.deepcopy(base), folder, config=config, **options)


class Beside(nn.Module):
    """A quantized layer, and a zero weight that may move in its place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.zero = layer, nn.Linear(64, 32, bias=False)
        nn.init.zeros_(self.zero.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.zero(x)


@every_kind
def test_a_quantized_base_trains_as_if_it_moved(kind):
    base, x = quantized_base(kind), torch.randn(6, 64)
    model = quantized_model(base, kind)
    reference = copy.deepcopy(base)
    reference[0] = Beside(reference[0])
    reference.requires_grad_(False)
    reference = get_peft_model(reference, LoraConfig(r=3, lora_alpha=ALPHA, target_modules=["0.zero", "2"]))
    with torch.no_grad():
        for mine, its in zip(find_triples(model), find_triples(reference), strict=True):
            its.A.copy_(mine.A)
            its.B.copy_(mine.B)
    assert find_triples(model)[0].layer is model.base_model.model[0]
    mine = Trained(model, folded(model, x, 4, lr=1e-2))
    its = Trained(reference, folded(reference, x, 4, lr=1e-2, weight_update="in_place"))
    assert float(layer_weights(reference)["base_model.model.0.zero"].abs().max()) > 1e-2
    for one, other in zip(mine.optimizer.triples, its.optimizer.triples, strict=True):
        assert other.A.abs().max() > 1e-2
        assert_near(one.A, other.A, 1e-4)
        assert_near(one.B, other.B, 1e-4)
    with torch.no_grad():
        assert_near(output(model, x), output(reference, x), 1e-3)


@every_kind
def test_an_adapter_of_a_quantized_base_is_saved_and_loaded(kind, tmp_path):
    base, x = quantized_base(kind), torch.randn(6, 64)
    model = quantized_model(base, kind, use_rslora=True)
    optimizer = folded(model, x)
    model.save_pretrained(tmp_path / "peft")
    save_adapter(model, optimizer, tmp_path / "ours")
    assert config_in(tmp_path / "peft")["lora_alpha"] == ALPHA
    with torch.no_grad():
        expected = output(model.eval(), x)
        with model.disable_adapter():
            assert (output(model, x) - expected).abs().max() > 1e-2
        for folder in ("peft", "ours"):
            assert_near(output(loaded_onto(base, tmp_path / folder, kind).eval(), x), expected, 1e-5)


@every_kind
@pytest.mark.parametrize("from_code", [True, False])
def test_a_quantized_run_continues_bit_for_bit(kind, from_code, tmp_path):
    base, x = quantized_base(kind), torch.randn(6, 64)
    model = quantized_model(base, kind)
    optimizer = folded(model, x)
    model.save_pretrained(tmp_path)
    state = state_of(optimizer)
    if from_code:
        other = quantized_model(base, kind)
        set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    else:
        other = loaded_onto(base, tmp_path, kind, is_trainable=True)
    resumed = optimizer_of(other)
    resumed.load_state_dict(state)
    train_model(model, optimizer, x)
    train_model(other, resumed, x)
    assert_trained_alike(model, other, x)
    assert alphas(model) == alphas(other) == [LARGER] * 2


def bits_of(model: nn.Module) -> dict[str, bytes]:
    """All tensors, of packed ones the numbers in them."""
    found = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            plain = tensor.dequantize() if type(tensor).__module__.startswith("torchao") else tensor
            found[name] = plain.detach().contiguous().view(torch.uint8).numpy().tobytes() if plain.dim() else b""
    return found


@every_kind
@pytest.mark.parametrize("start_step", [0, 2])
def test_a_product_that_is_not_zero_is_refused_for_a_quantized_base(kind, start_step):
    """By name, and the layer next to it does not change either."""
    base, x = quantized_base(kind), torch.randn(6, 64)
    model = quantized_model(base, kind, zero=start_step > 0)
    optimizer = folded(model, x, start_step, start_step=start_step)
    output(model, x).square().mean().backward()
    before, config, state = bits_of(model), copy.deepcopy(model.peft_config["default"]), state_of(optimizer)
    match = rf"(?s)nothing was changed.*start_step=0.*zero product.*model\.0: {re.escape(STORED[kind])}"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=match) as caught:
            optimizer.step()
        assert "model.2" not in str(caught.value)
    assert bits_of(model) == before
    assert layer_scalings(model) == [ALPHA / 3] * 2
    assert model.peft_config["default"] == config
    assert optimizer.step_count == start_step
    assert same(state_of(optimizer), state)


@every_kind
def test_a_callable_ratio_is_refused_for_a_quantized_base(kind):
    """When the optimizer is built, and at the step after it was set."""
    model, x = quantized_model(quantized_base(kind), kind), torch.randn(6, 64)
    match = rf"(?s)model\.0: {re.escape(STORED[kind])}.*a callable update_ratio may change at any step: use a number"
    with pytest.raises(ValueError, match=match):
        optimizer_of(model, update_ratio=lambda step: 2.0)
    optimizer = folded(model, x)
    before, state = bits_of(model), state_of(optimizer)
    optimizer.groups[0].update_ratio = lambda step: FOLDED_RATIO
    with pytest.raises(RuntimeError, match=match):
        train_model(model, optimizer, x)
    optimizer.groups[0].update_ratio = FOLDED_RATIO
    assert bits_of(model) == before
    assert same(state_of(optimizer), state)
    train_model(model, optimizer, x)


@every_kind
def test_a_changed_ratio_is_refused_for_a_quantized_base(kind):
    model, x = quantized_model(quantized_base(kind), kind), torch.randn(6, 64)
    optimizer = folded(model, x)
    before, state = bits_of(model), state_of(optimizer)
    optimizer.groups[0].update_ratio = 0.25
    match = rf"(?s)the product A @ B is not zero.*nothing was changed.*model\.0: {re.escape(STORED[kind])}"
    with pytest.raises(RuntimeError, match=match):
        train_model(model, optimizer, x)
    optimizer.groups[0].update_ratio = FOLDED_RATIO
    assert bits_of(model) == before
    assert same(state_of(optimizer), state)
    train_model(model, optimizer, x)


@every_kind
def test_a_quantized_base_is_refused_in_place(kind):
    model = quantized_model(quantized_base(kind), kind)
    match = rf"(?s)model\.0: {re.escape(STORED[kind])}.*weight_update=\"folded\""
    with pytest.raises(ValueError, match=match):
        optimizer_of(model, weight_update="in_place")


@every_kind
def test_what_needs_the_weight_of_a_quantized_base_is_refused_by_name(kind):
    model, x = quantized_model(quantized_base(kind), kind), torch.randn(6, 64)
    optimizer = folded(model, x)
    before = bits_of(model)
    match = rf"(?s)cannot be written \(nothing was changed\).*model\.0: {re.escape(STORED[kind])}"
    with pytest.raises(RuntimeError, match=match):
        optimizer.restart()
    match = rf"(?s)cannot be merged.*model\.0: {re.escape(STORED[kind])}"
    with pytest.raises(RuntimeError, match=match):
        deltaopt.merged_weights(optimizer)
    with pytest.raises(RuntimeError, match=rf"model\.0: {re.escape(STORED[kind])}"):
        optimizer.residual("base_model.model.0")
    assert not optimizer.residual("base_model.model.2").any()
    assert bits_of(model) == before
    train_model(model, optimizer, x)
    assert optimizer.step_count == 6


@every_kind
def test_the_base_and_the_displacement_of_a_quantized_run(kind):
    base, x = quantized_base(kind), torch.randn(6, 64)
    model = quantized_model(base, kind)
    optimizer = folded(model, x, keep_base="cpu")
    triple = optimizer.triples[0]
    assert_near(optimizer.displacement(triple.name).product(), FOLDED_RATIO * ALPHA / 3 * triple.A @ triple.B, 1e-5)
    with torch.no_grad():
        trained = output(model.eval(), x)
        with optimizer.base_weights():
            assert (output(model, x) - trained).abs().max() > 1e-3
            with model.disable_adapter():
                assert_near(output(model, x), output(copy.deepcopy(base).eval(), x), 1e-6)
        assert torch.equal(output(model, x), trained)


def test_another_format_of_the_base_is_refused_on_resume():
    base, x = quantized_base("gptq"), torch.randn(6, 64)
    model = quantized_model(base, "gptq")
    state = folded(model, x).state_dict()
    other = copy.deepcopy(base)
    other[0] = nn.Linear(64, 32)
    other = get_peft_model(other, LoraConfig(r=3, lora_alpha=ALPHA, target_modules=["0", "2"]))
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    resumed = optimizer_of(other)
    match = r"(?s)model\.0: W can be read now .* and could not when the state was saved"
    with pytest.raises(deltaopt.WeightMismatchError, match=match):
        resumed.load_state_dict(state)
    assert layer_scalings(other) == [ALPHA / 3] * 2
