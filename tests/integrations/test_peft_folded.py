"""PEFT layers with weight_update="folded": A, B and outputs as in place, and adapters that plain PEFT loads."""

import copy
import io
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple, find_triples, other_parameters

peft = pytest.importorskip("peft", reason="runs where peft is installed")
transformers = pytest.importorskip("transformers", reason="runs where transformers is installed")

from peft import (  # noqa: E402
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.aqlm import AqlmLoraLinear  # noqa: E402
from peft.tuners.lora.awq import AwqLoraLinear  # noqa: E402
from peft.tuners.lora.gptq import GPTQLoraLinear  # noqa: E402

from deltaopt.integrations.peft import save_adapter  # noqa: E402
from tests.support.peft_layers import (  # noqa: E402
    CASES,
    GUARD,
    HOOKS_CAN_NOT,
    PEFT_CAN_NOT,
    Classifier,
    Experts,
    assert_loads,
    assert_step_refused,
    config_in,
    image,
    lora_layers,
    mlp,
    output,
    quantized,
    randomised,
    tied_weights_are_meant,
    tiny_llama,
    tokens,
    train,
    weights,
)

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD
RATIO, ALPHA = 1.5, 5
LARGER = ALPHA * (1 + RATIO)
NAMES = sorted(CASES.keys() - PEFT_CAN_NOT)
SOME = ["linear", "conv1d_gpt2", "embedding", "conv2d", "experts_3_7x5_up_down"]

pytestmark = [
    # PEFT asks transformers models by a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT notes that it could not merge.
    pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning:peft"),
]


class Run(NamedTuple):
    """A model and what trains it."""

    model: nn.Module
    optimizer: DeltaLoRAOptimizer


def adapted(plain: nn.Module, *targets: str, zero: bool = True, **config) -> nn.Module:
    """A copy of `plain` in float64 with adapters, whose product is zero or random."""
    config = {"r": 2, "lora_alpha": ALPHA, "target_modules": list(targets), **config}
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(**config)).double()
    return model if zero else randomised(model)


def optimizer_of(model: nn.Module, inner: type = AdamW, **options) -> DeltaLoRAOptimizer:
    options = {"lr": 2e-2, "update_ratio": RATIO, "weight_update": "folded", **options}
    return DeltaLoRAOptimizer.for_model(model, inner, **options)


def folded(model: nn.Module, x, steps: int = 3, **options) -> DeltaLoRAOptimizer:
    """An optimizer of `model` after some steps."""
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, x, steps)
    return optimizer


def both(model: nn.Module, x, steps: int = 4, make: Callable[..., DeltaLoRAOptimizer] = optimizer_of, **options):
    """(folded, in place): copies of `model` after the same training."""
    runs = []
    for mode in ("folded", "in_place"):
        twin = copy.deepcopy(model)
        runs.append(Run(twin, make(twin, weight_update=mode, **options)))
        train(*runs[-1], x, steps)
    return runs


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@torch.no_grad()
def assert_alike(one: Run, other: Run, x, tolerance: float = 1e-10) -> None:
    """A, B, the displacement, the effective weights and the output are the same."""
    for mine, its in zip(one.optimizer.triples, other.optimizer.triples, strict=True):
        close(mine.A, its.A, tolerance)
        close(mine.B, its.B, tolerance)
        asked = other.optimizer.displacement(its.name).product()
        close(one.optimizer.displacement(mine.name).product(), asked, tolerance)
    merged = deltaopt.merged_weights(other.optimizer)
    for name, W in deltaopt.merged_weights(one.optimizer).items():
        close(W, merged[name], tolerance)
    close(output(one.model, x), output(other.model, x), tolerance)


def assert_same_bits(one: nn.Module, other: nn.Module, x) -> None:
    """What trains is the same in both models to the last bit, and so is what they compute."""
    its = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, its[name]), name
    with torch.no_grad():
        assert torch.equal(output(one.eval(), x), output(other.eval(), x))


def scalings(model: nn.Module) -> list[float]:
    return [layer.scaling["default"] for layer in lora_layers(model).values()]


def alphas(model: nn.Module) -> list[float]:
    return [layer.lora_alpha["default"] for layer in lora_layers(model).values()]


def state_of(optimizer: DeltaLoRAOptimizer) -> dict:
    """Its state after a way through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- the same training


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_layer_from_a_zero_product(name):
    build, targets, inputs, config = CASES[name]
    model, x = adapted(build(), *targets, **config), inputs()
    start = weights(model)
    mine, its = both(model, x)
    for label, W in weights(mine.model).items():
        assert torch.equal(W, start[label])
        assert not torch.equal(weights(its.model)[label], start[label])
    assert alphas(mine.model) == [LARGER] * len(start)
    assert_alike(mine, its, x)


@pytest.mark.parametrize(("zero", "start_step"), [(False, 0), (True, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_layer_where_the_product_is_not_zero(name, zero, start_step):
    """W is written at step K, and not before or after."""
    build, targets, inputs, config = CASES[name]
    model, x = adapted(build(), *targets, zero=zero, **config), inputs()
    start, expected = weights(model), scalings(model)
    mine, its = both(model, x, steps=start_step, start_step=start_step)
    assert scalings(mine.model) == expected
    assert all(torch.equal(W, start[label]) for label, W in weights(mine.model).items())
    train(*mine, x, 1)
    train(*its, x, 1)
    assert scalings(mine.model) == [s * (1 + RATIO) for s in expected]
    once = weights(mine.model)
    assert not any(torch.equal(W, start[label]) for label, W in once.items())
    train(*mine, x, 3)
    train(*its, x, 3)
    assert all(torch.equal(W, once[label]) for label, W in weights(mine.model).items())
    assert_alike(mine, its, x)


def test_the_gradients_are_those_beside_a_w_that_moves():
    model, x = adapted(mlp(7, 5, 4), "0", "1", zero=False), image(7)
    mine, its = both(model, x, inner=SGD)
    for model, optimizer in (mine, its):
        optimizer.zero_grad()
        output(model, x).square().mean().backward()
    for one, other in zip(mine.optimizer.triples, its.optimizer.triples, strict=True):
        assert other.A.grad.abs().max() > 1e-3
        close(one.A.grad, other.A.grad)
        close(one.B.grad, other.B.grad)


def test_gradients_that_add_up_over_several_backward_passes():
    model, x = adapted(mlp(7, 5, 4), "0", "1", zero=False), image(7)
    mine, its = both(model, x, inner=SGD, steps=1)
    for model, optimizer in (mine, its):
        for part in x.split(1):
            output(model, part).square().mean().backward()
        optimizer.step()
    assert_alike(mine, its, x)


def test_16_bits_are_not_written_from_a_zero_product():
    """Where in place rounds W in every step."""
    plain, x = mlp(7, 5, 4).bfloat16(), torch.randn(4, 7).bfloat16()
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["0", "1"]))
    start = weights(model)
    folded(model, x)
    assert all(torch.equal(W, start[label]) for label, W in weights(model).items())


def grouped(model: nn.Module, ratios: list[float], **options) -> DeltaLoRAOptimizer:
    """A ratio for each triple."""
    triples = find_triples(model)
    groups = [{"triples": [t], "update_ratio": r} for t, r in zip(triples, ratios, strict=True)]
    return DeltaLoRAOptimizer(AdamW, groups, other_parameters(model, triples), lr=2e-2, **options)


@pytest.mark.parametrize("zero", [True, False])
def test_groups_of_different_ratios(zero):
    model, x = adapted(mlp(7, 5, 6, 4), "0", "1", "2", zero=zero), image(7)
    mine, its = both(model, x, make=lambda twin, **options: grouped(twin, [0.5, 0.0, 2.0], **options))
    assert alphas(mine.model) == [1.5 * ALPHA, ALPHA, 3 * ALPHA]
    assert_alike(mine, its, x)


def test_copies_of_model_and_optimizer_train_alike():
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    optimizer = folded(model, x, 1)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    other_optimizer.zero_grad()
    for _ in range(2):
        train(model, optimizer, x, 1)
        train(other, other_optimizer, x, 1)
    assert_same_bits(model, other, x)
    assert alphas(model) == alphas(other) == [LARGER] * 2


def test_a_copy_that_is_folded_leaves_the_first_models_alpha_alone():
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    optimizer = optimizer_of(model)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    train(other, other_optimizer, x)
    assert alphas(model) == [ALPHA] * 2
    assert (model.peft_config["default"].lora_alpha, other.peft_config["default"].lora_alpha) == (ALPHA, LARGER)
    train(model, optimizer, x)
    assert_same_bits(model, other, x)


# ---- PEFT's own save


CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"1": 3}, "alpha_pattern": {"2": 16, "0": 4}},
    "all": {"rank_pattern": {"0": 1, "2": 4}, "alpha_pattern": {"0": 2}, "use_rslora": True},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_save_pretrained_is_right_at_any_time(tmp_path, config):
    """Without a warning, which would be an error here."""
    plain, x = mlp(7, 5, 6, 4).double(), image(7)
    model = adapted(plain, "0", "1", "2", **CONFIGS[config])
    before = alphas(model)
    optimizer = optimizer_of(model)
    model.save_pretrained(tmp_path / "before")
    assert config_in(tmp_path / "before")["lora_alpha"] == ALPHA
    for steps in (1, 4):
        train(model, optimizer, x, steps)
        model.save_pretrained(tmp_path / str(steps))
        assert config_in(tmp_path / str(steps))["lora_alpha"] in [a * (1 + RATIO) for a in before]
        loaded = assert_loads(plain, tmp_path / str(steps), model, x, tolerance=1e-10)
        assert alphas(loaded) == [a * (1 + RATIO) for a in before]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_layer_is_saved_by_peft(tmp_path, name):
    build, targets, inputs, config = CASES[name]
    plain, x = build().double(), inputs()
    model = adapted(plain, *targets, **config)
    folded(model, x)
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path)["lora_alpha"] == LARGER
    assert config_in(tmp_path)["alpha_pattern"] == {}
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


@pytest.mark.parametrize("config", CONFIGS)
def test_an_adapter_of_different_ratios(tmp_path, config):
    plain, x = mlp(7, 5, 6, 4).double(), image(7)
    model = adapted(plain, "0", "1", "2", **CONFIGS[config])
    before = alphas(model)
    train(model, grouped(model, [0.5, 0.0, 2.0], weight_update="folded"), x)
    assert alphas(model) == [before[0] * 1.5, before[1], before[2] * 3]
    model.save_pretrained(tmp_path)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


# PEFT looks for the keys of parameters among the modules, and takes them anyway.
parameters_have_patterns = pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")


@parameters_have_patterns
def test_parameters_of_different_ratios(tmp_path):
    """Two wrappers of one module, each with an alpha of its own."""
    plain, x = nn.Sequential(Experts(3, 7, 5, False)).double(), image(4, 7)
    model = adapted(plain, target_parameters=["0.up", "0.down"])
    train(model, grouped(model, [0.5, 2.0], weight_update="folded"), x)
    model.save_pretrained(tmp_path)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


@parameters_have_patterns
def test_parameters_that_had_alphas_of_their_own(tmp_path):
    plain, x = nn.Sequential(Experts(3, 7, 5, False)).double(), image(4, 7)
    model = adapted(plain, target_parameters=["0.up", "0.down"], alpha_pattern={"up": 7})
    assert sorted(alphas(model)) == [ALPHA, 7]
    folded(model, x)
    model.save_pretrained(tmp_path)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


def test_a_layer_beside_parameters_has_an_alpha_of_its_own(tmp_path):
    plain, x = nn.Sequential(Experts(3, 7, 5, False), nn.Linear(7, 6)).double(), image(4, 7)
    model = adapted(plain, "1", target_parameters=["0.up", "0.down"])
    train(model, grouped(model, [2.0, 2.0, 0.5], weight_update="folded"), x)
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path)["lora_alpha"] == 3 * ALPHA
    assert config_in(tmp_path)["alpha_pattern"] == {"^1": 1.5 * ALPHA}
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


@pytest.mark.parametrize("registered", [[0], [1, 2]])
def test_layers_that_are_no_triples_keep_their_alpha(tmp_path, registered):
    plain, x = mlp(7, 5, 6, 4).double(), image(7)
    model = adapted(plain, "0", "1", "2")
    triples = [find_triples(model)[i] for i in registered]
    others = other_parameters(model, triples)
    optimizer = DeltaLoRAOptimizer(AdamW, triples, others, lr=2e-2, update_ratio=RATIO, weight_update="folded")
    train(model, optimizer, x)
    assert alphas(model) == [LARGER if i in registered else ALPHA for i in range(3)]
    model.save_pretrained(tmp_path)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


def test_a_layer_whose_name_ends_like_anothers_keeps_its_own_alpha(tmp_path):
    plain = nn.Sequential(nn.Linear(7, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Linear(6, 6)).double()
    model, x = adapted(plain, "0", "1.0", "1.1", "2"), image(7)
    train(model, grouped(model, [0.5, 2.0, 1.0, 1.0], weight_update="folded"), x)
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path)["alpha_pattern"] == {"^0": 1.5 * ALPHA, r"^1\.0": 3 * ALPHA}
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["head", "norm"]}, {"bias": "lora_only"}, {"trainable_token_indices": {"embed": [1, 4]}}],
    ids=lambda options: next(iter(options)),
)
# PEFT's note that a trained bias changes the base model.
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning:peft")
def test_what_else_trains_is_saved_too(tmp_path, options):
    plain, x = Classifier().double(), torch.randint(0, 9, (4, 5))
    model = adapted(plain, "hidden", **options)
    mine, its = both(model, x)
    close(output(mine.model, x), output(its.model, x))
    mine.model.save_pretrained(tmp_path)
    assert_loads(plain, tmp_path, mine.model, x, tolerance=1e-10)


def test_a_language_model(tmp_path):
    plain, x = tiny_llama().double(), tokens()
    model = adapted(plain, task_type="CAUSAL_LM", target_modules="all-linear", alpha_pattern={"down_proj": 3})
    mine, its = both(model, x)
    assert_alike(mine, its, x)
    mine.model.save_pretrained(tmp_path)
    assert config_in(tmp_path)["lora_alpha"] == LARGER
    assert len(config_in(tmp_path)["alpha_pattern"]) == 2
    assert_loads(plain, tmp_path, mine.model, x, tolerance=1e-10)


def test_a_model_with_transformers_own_adapters(tmp_path):
    plain, x = tiny_llama().double(), tokens()
    model = copy.deepcopy(plain)
    model.add_adapter(LoraConfig(r=2, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"]))
    model.double()
    triples = find_triples(model)
    groups = [{"triples": triples[:1], "update_ratio": 0.5}, {"triples": triples[1:], "update_ratio": RATIO}]
    train(model, DeltaLoRAOptimizer(AdamW, groups, lr=2e-2, weight_update="folded"), x)
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path)["lora_alpha"] == LARGER
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)
    other = copy.deepcopy(plain)
    other.load_adapter(tmp_path)
    close(output(other.eval(), x), output(model.eval(), x))


def test_an_adapter_injected_into_a_plain_module(tmp_path):
    plain, x = mlp(7, 5).double(), image(7)
    config = LoraConfig(r=2, lora_alpha=ALPHA, target_modules=["0"])
    model = inject_adapter_in_model(config, copy.deepcopy(plain)).double()
    optimizer = folded(model, x)
    assert model.peft_config["default"].lora_alpha == LARGER
    save_adapter(model, optimizer, tmp_path)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


class Wrapped(nn.Module):
    """As DistributedDataParallel: the model is its `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Holder(nn.Module):
    """As a LightningModule: the model is one of its attributes, beside others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, nn.MSELoss()


WRAPPERS = {
    "tuner": lambda model: model.base_model,
    "dp": nn.DataParallel,
    "ddp": Wrapped,
    "compile": torch.compile,
    "compiled_ddp": lambda model: torch.compile(Wrapped(model)),
    "holder": Holder,
    "holder_of_ddp": lambda model: Holder(Wrapped(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_triples_of_a_wrapped_model(tmp_path, wrapper):
    """The config of the model inside follows."""
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1")
    optimizer = DeltaLoRAOptimizer.for_model(
        WRAPPERS[wrapper](model), AdamW, lr=2e-2, update_ratio=RATIO, weight_update="folded"
    )
    train(model, optimizer, x)
    model.save_pretrained(tmp_path / "peft")
    assert_loads(plain, tmp_path / "peft", model, x, tolerance=1e-10)
    save_adapter(model, optimizer, tmp_path / "ours")
    assert_loads(plain, tmp_path / "ours", model, x, tolerance=1e-10)


class Two(nn.Module):
    """Two models with adapters of one name, and different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = adapted(mlp(7, 5).double(), "0"), adapted(mlp(5, 6, 4).double(), "0", "1", r=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def test_two_models_of_one_optimizer(tmp_path):
    model, x = Two(), image(7)
    plain = copy.deepcopy(model)
    train(model, grouped(model, [0.5, 2.0, 1.0], weight_update="folded"), x)
    for name in ("first", "second"):
        part, pristine = getattr(model, name), getattr(plain, name).unload()
        part.save_pretrained(tmp_path / name)
        assert_loads(pristine, tmp_path / name, part, image(7 if name == "first" else 5), tolerance=1e-10)


def test_two_adapters_of_one_optimizer(tmp_path):
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["0"]), adapter_name="first").double()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["1"]))
    model.double().base_model.set_adapter(["first", "second"])
    groups = [{"triples": find_triples(model, name)} for name in ("first", "second")]
    groups[0]["update_ratio"] = 0.5
    train(model, DeltaLoRAOptimizer(AdamW, groups, lr=2e-2, update_ratio=RATIO, weight_update="folded"), x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "first", adapter_name="first")
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.base_model.set_adapter(["first", "second"])
    assert [config.lora_alpha for config in loaded.peft_config.values()] == [8 * 1.5, 8 * 2.5]
    close(output(loaded, x), output(model, x))


def test_a_compiled_model_sees_the_other_scaling():
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    mine, its = both(model, x, steps=0, start_step=1)
    compiled = torch.compile(mine.model, backend="eager")
    train(compiled, mine.optimizer, x)
    train(*its, x)
    assert_alike(mine, its, x)
    with torch.no_grad():
        close(output(compiled, x), output(its.model, x))


def test_another_adapter_name(tmp_path):
    plain, x = mlp(7, 5).double(), image(7)
    config = LoraConfig(r=2, lora_alpha=ALPHA, target_modules=["0"])
    model = get_peft_model(copy.deepcopy(plain), config, adapter_name="mine").double()
    folded(model, x, adapter="mine")
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path / "mine")["lora_alpha"] == LARGER
    assert_loads(plain, tmp_path / "mine", model, x, tolerance=1e-10)


def test_two_adapters_of_one_config(tmp_path):
    """PEFT keeps the very object for both, and the other adapter has not changed."""
    plain, x = mlp(7, 5).double(), image(7)
    model = adapted(plain, "0")
    model.add_adapter("other", model.peft_config["default"])
    model = randomised(model, "other")
    model.set_adapter("other")
    with torch.no_grad():
        expected = output(model, x)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="adapters other sit on the same weights"):
        optimizer = optimizer_of(model)
    train(model, optimizer, x)
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path / "other")["lora_alpha"] == ALPHA
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "other")
    close(output(loaded, x), expected)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


def test_the_users_own_config_does_not_change():
    """A second model made with it starts as the first one did."""
    config = LoraConfig(r=2, lora_alpha=ALPHA, target_modules=["0"])
    folded(get_peft_model(mlp(7, 5), config).double(), image(7))
    assert scalings(get_peft_model(mlp(7, 5), config)) == [ALPHA / 2]


STARTS = {
    "after_two_steps": (True, {"start_step": 2}),
    "random_start": (False, {}),
    "random_start_after_a_step": (False, {"start_step": 1}),
}


@pytest.mark.parametrize("start", STARTS)
def test_what_peft_leaves_out_is_warned_of_and_written_by_save_adapter(tmp_path, start):
    zero, options = STARTS[start]
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1", zero=zero)
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, x, options.get("start_step", 0))
    if options:
        model.save_pretrained(tmp_path / "before")
        assert_loads(plain, tmp_path / "before", model, x, tolerance=1e-10)
    train(model, optimizer, x, 3)
    with pytest.warns(UserWarning, match=GUARD):
        model.save_pretrained(tmp_path / "peft")
    with pytest.raises(AssertionError, match="not close"):
        assert_loads(plain, tmp_path / "peft", model, x, tolerance=1e-3)
    assert save_adapter(model, optimizer, tmp_path / "ours") == dict.fromkeys([t.name for t in optimizer.triples], 0.0)
    assert config_in(tmp_path / "ours")["r"] == 4
    assert_loads(plain, tmp_path / "ours", model, x, tolerance=1e-10)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_save_adapter_is_right_always(tmp_path, name, zero):
    build, targets, inputs, config = CASES[name]
    plain, x = build().double(), inputs()
    model = adapted(plain, *targets, zero=zero, **config)
    optimizer = optimizer_of(model)
    before = copy.deepcopy(model.peft_config["default"])
    for steps in (1, 3):
        train(model, optimizer, x, steps)
        save_adapter(model, optimizer, tmp_path / str(steps))
        assert_loads(plain, tmp_path / str(steps), model, x, tolerance=1e-10)
    assert config_in(tmp_path / "3")["r"] == (2 if zero else 4)
    before.lora_alpha = LARGER
    assert model.peft_config["default"] == before


def test_save_adapter_after_a_restart(tmp_path):
    plain, x = mlp(7, 5, 4).double(), image(7)
    runs = both(adapted(plain, "0", "1"), x)
    for run in runs:
        run.optimizer.restart(generator=torch.Generator().manual_seed(0))
        train(*run, x)
    assert_alike(*runs, x)
    save_adapter(*runs[0], tmp_path)
    assert_loads(plain, tmp_path, runs[0].model, x, tolerance=1e-10)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_are_taken_out_of_the_base(tmp_path, start):
    plain, x = mlp(7, 5, 4), image(7)
    runs = both(adapted(plain, "0", "1", init_lora_weights=start), x)
    assert_alike(*runs, x)
    save_adapter(*runs[0], tmp_path)
    assert_loads(plain.double(), tmp_path, runs[0].model, x, tolerance=1e-6)  # PEFT's start is of float32


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_merge_and_unload_gives_the_same_outputs(name, zero):
    build, targets, inputs, config = CASES[name]
    model, x = adapted(build(), *targets, zero=zero, **config), inputs()
    for run in both(model, x):
        with torch.no_grad():
            expected = output(run.model, x)
            close(output(run.model.merge_and_unload(), x), expected)


def test_training_goes_on_after_unmerging():
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    runs = both(model, x)
    for run in runs:
        run.model.merge_adapter()
        assert_step_refused(*run, RuntimeError, r"model\.0: .* is merged into W")
        run.model.unmerge_adapter()
        train(*run, x)
    assert_alike(*runs, x)


# ---- the base


@pytest.mark.parametrize("name", NAMES)
def test_disable_adapter_gives_the_pristine_bits_after_a_zero_product(name):
    build, targets, inputs, config = CASES[name]
    plain, x = build().double(), inputs()
    model = adapted(plain, *targets, **config)
    folded(model, x)
    with torch.no_grad():
        trained = output(model, x)
        with model.disable_adapter():
            assert torch.equal(output(model, x), output(plain, x))
        assert torch.equal(output(model, x), trained)
    assert not torch.equal(trained, output(plain, x))


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(
    ("name", "method"), [(name, m) for name in SOME for m in (None, "hooks") if m is None or name not in HOOKS_CAN_NOT]
)
def test_base_weights_computes_what_it_does_in_place(name, zero, method):
    build, targets, inputs, config = CASES[name]
    plain, x = build().double(), inputs()
    runs = both(adapted(plain, *targets, zero=zero, **config), x)
    found = []
    for model, optimizer in runs:
        before, config = scalings(model), copy.deepcopy(model.peft_config["default"])
        with torch.no_grad():
            trained = output(model, x)
            with optimizer.base_weights(method=method):
                found.append(output(model, x))
                with model.disable_adapter():
                    close(output(model, x), output(plain, x))
            assert torch.equal(output(model, x), trained)
        assert (found[-1] - trained).abs().max() > 1e-3
        assert scalings(model) == before
        assert model.peft_config["default"] == config
        train(model, optimizer, x)
    close(*found)
    assert_alike(*runs, x)


def test_base_weights_before_step_k():
    model, x = adapted(mlp(7, 5), "0"), image(7)
    optimizer = folded(model, x, 2, start_step=3)
    with torch.no_grad():
        trained = output(model, x)
        with optimizer.base_weights():
            assert torch.equal(output(model, x), trained)


# ---- quantized bases


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
    mine = Run(model, folded(model, x, 4, lr=1e-2))
    its = Run(reference, folded(reference, x, 4, lr=1e-2, weight_update="in_place"))
    assert float(weights(reference)["base_model.model.0.zero"].abs().max()) > 1e-2
    for one, other in zip(mine.optimizer.triples, its.optimizer.triples, strict=True):
        assert other.A.abs().max() > 1e-2
        close(one.A, other.A, 1e-4)
        close(one.B, other.B, 1e-4)
    with torch.no_grad():
        close(output(model, x), output(reference, x), 1e-3)


@every_kind
def test_an_adapter_of_a_quantized_base_is_saved_and_loaded(kind, tmp_path):
    base, x = quantized_base(kind), torch.randn(6, 64)
    model = quantized_model(base, kind, use_rslora=True)
    optimizer = folded(model, x)
    model.save_pretrained(tmp_path / "peft")
    save_adapter(model, optimizer, tmp_path / "ours")
    assert config_in(tmp_path / "peft")["lora_alpha"] == LARGER
    with torch.no_grad():
        expected = output(model.eval(), x)
        with model.disable_adapter():
            assert (output(model, x) - expected).abs().max() > 1e-2
        for folder in ("peft", "ours"):
            close(output(loaded_onto(base, tmp_path / folder, kind).eval(), x), expected, 1e-5)


@every_kind
@pytest.mark.parametrize("from_code", [True, False])
def test_a_quantized_run_goes_on_bit_for_bit(kind, from_code, tmp_path):
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
    train(model, optimizer, x)
    train(other, resumed, x)
    assert_same_bits(model, other, x)
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
    """By name, and the layer beside it does not change either."""
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
    assert scalings(model) == [ALPHA / 3] * 2
    assert model.peft_config["default"] == config
    assert optimizer.step_count == start_step
    assert str(state_of(optimizer)) == str(state)


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
    match = rf"(?s)can not be written \(nothing was changed\).*model\.0: {re.escape(STORED[kind])}"
    with pytest.raises(RuntimeError, match=match):
        optimizer.restart()
    match = rf"(?s)can not be merged.*model\.0: {re.escape(STORED[kind])}"
    with pytest.raises(RuntimeError, match=match):
        deltaopt.merged_weights(optimizer)
    with pytest.raises(RuntimeError, match=rf"model\.0: {re.escape(STORED[kind])}"):
        optimizer.residual("base_model.model.0")
    assert not optimizer.residual("base_model.model.2").any()
    assert bits_of(model) == before
    train(model, optimizer, x)
    assert optimizer.step_count == 6


@every_kind
def test_the_base_and_the_displacement_of_a_quantized_run(kind):
    base, x = quantized_base(kind), torch.randn(6, 64)
    model = quantized_model(base, kind)
    optimizer = folded(model, x, keep_base="cpu")
    triple = optimizer.triples[0]
    close(optimizer.displacement(triple.name).product(), RATIO * ALPHA / 3 * triple.A @ triple.B, 1e-5)
    with torch.no_grad():
        trained = output(model.eval(), x)
        with optimizer.base_weights():
            assert (output(model, x) - trained).abs().max() > 1e-3
            with model.disable_adapter():
                close(output(model, x), output(copy.deepcopy(base).eval(), x), 1e-6)
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
    assert scalings(other) == [ALPHA / 3] * 2


# ---- resume


def from_code(plain: nn.Module, folder, **config) -> nn.Module:
    """A new model with the adapter's weights, and the alpha of its config."""
    model = adapted(plain, "0", "1", **config)
    model.load_adapter(folder, "default", is_trainable=True)
    return model


def from_files(plain: nn.Module, folder, **config) -> nn.Module:
    """PEFT's model of a saved adapter, with the larger alpha."""
    return PeftModel.from_pretrained(copy.deepcopy(plain), folder, is_trainable=True)


ways = pytest.mark.parametrize("way", [from_code, from_files])


@ways
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"0": 3}, "rank_pattern": {"1": 3}}])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, way, config):
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1", **config)
    optimizer = folded(model, x)
    model.save_pretrained(tmp_path / "first")
    other = way(plain, tmp_path / "first", **config)
    resumed = optimizer_of(other, update_ratio=0.25)
    resumed.load_state_dict(state_of(optimizer))
    assert scalings(other) == scalings(model)
    assert alphas(other) == pytest.approx(alphas(model), rel=1e-11)
    train(model, optimizer, x)
    train(other, resumed, x)
    assert_same_bits(model, other, x)
    other.save_pretrained(tmp_path / "second")
    assert_loads(plain, tmp_path / "second", model, x, tolerance=1e-10)


@ways
def test_a_resumed_run_whose_w_was_written(tmp_path, way):
    """The adapter, the pristine base and the optimizer's state are enough."""
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1", zero=False)
    optimizer = folded(model, x, start_step=1)
    with pytest.warns(UserWarning, match=GUARD):
        model.save_pretrained(tmp_path / "peft")
    other = way(plain, tmp_path / "peft")
    resumed = optimizer_of(other)
    resumed.load_state_dict(state_of(optimizer))
    train(model, optimizer, x)
    train(other, resumed, x)
    assert_alike(Run(other, resumed), Run(model, optimizer), x, 1e-12)
    save_adapter(other, resumed, tmp_path / "ours")
    assert_loads(plain, tmp_path / "ours", model, x, tolerance=1e-10)


@ways
def test_a_run_that_was_saved_before_step_k_is_resumed(tmp_path, way):
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1")
    optimizer = folded(model, x, 2, start_step=3)
    model.save_pretrained(tmp_path)
    other = way(plain, tmp_path)
    resumed = optimizer_of(other)
    resumed.load_state_dict(state_of(optimizer))
    assert alphas(other) == [ALPHA] * 2
    train(model, optimizer, x)
    train(other, resumed, x)
    assert_same_bits(model, other, x)


@ways
def test_a_state_from_before_step_k_unfolds(tmp_path, way):
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1", alpha_pattern={"1": 3})
    optimizer = optimizer_of(model)
    first, first_state = copy.deepcopy(get_peft_model_state_dict(model)), state_of(optimizer)
    train(model, optimizer, x)
    model.save_pretrained(tmp_path / "later")
    other = way(plain, tmp_path / "later", alpha_pattern={"1": 3})
    resumed = optimizer_of(other)
    resumed.load_state_dict(state_of(optimizer))
    for run in (Run(model, optimizer), Run(other, resumed)):
        set_peft_model_state_dict(run.model, first)
        run.optimizer.load_state_dict(first_state)
        assert scalings(run.model) == [ALPHA / 2, 1.5]
        assert alphas(run.model) == [ALPHA, 3]
        run.model.save_pretrained(tmp_path / "unfolded")
        assert output(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "unfolded"), x).equal(plain(x))
    assert model.peft_config["default"].lora_alpha == ALPHA
    assert model.peft_config["default"].alpha_pattern == {"1": 3}
    fresh = adapted(plain, "0", "1", alpha_pattern={"1": 3})
    set_peft_model_state_dict(fresh, first)
    for run in (Run(model, optimizer), Run(other, resumed), Run(fresh, optimizer_of(fresh))):
        train(*run, x)
        assert_same_bits(run.model, model, x)


def test_a_state_from_before_a_written_w_unfolds_with_the_whole_model():
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    optimizer = folded(model, x, 1, start_step=2)
    whole, state = copy.deepcopy(model.state_dict()), state_of(optimizer)
    train(model, optimizer, x)
    expected = copy.deepcopy(model)
    with pytest.raises(deltaopt.WeightMismatchError, match=r"model\.0: "):
        optimizer.load_state_dict(state)
    assert alphas(model) == [LARGER] * 2
    model.load_state_dict(whole)
    optimizer.load_state_dict(state)
    assert alphas(model) == [ALPHA] * 2
    train(model, optimizer, x)
    assert_same_bits(model, expected, x)


@pytest.mark.parametrize("saved", ["folded", "in_place"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_state_of_the_other_weight_update_is_refused(saved, steps):
    here = {"folded": "in_place", "in_place": "folded"}[saved]
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    optimizer = folded(model, x, steps, weight_update=saved)
    state = state_of(optimizer)
    other = adapted(mlp(7, 5, 4), "0", "1")
    other_optimizer = folded(other, x, 1, weight_update=here)
    before, before_alphas = copy.deepcopy(other.state_dict()), alphas(other)
    match = f"saved with weight_update='{saved}', this optimizer has '{here}'"
    with pytest.raises(ValueError, match=match):
        other_optimizer.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert alphas(other) == before_alphas
    assert other_optimizer.step_count == 1


def test_a_state_of_another_scaling_is_refused():
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1")
    state = state_of(folded(model, x))
    other = adapted(plain, "0", "1", lora_alpha=7)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    with pytest.raises(
        ValueError, match=r"(?s)other triples.*model\.0: saved .*scaling 2\.5.*registered .*scaling 3\.5"
    ):
        optimizer_of(other).load_state_dict(state)
    assert alphas(other) == [7] * 2


# ---- refusals


def refused_folded(model: nn.Module, *parts: str, **options) -> None:
    """The optimizer raises, with all of `parts` in this order, and has changed nothing."""
    before = alphas(model)
    with pytest.raises(ValueError, match="(?s)" + ".*".join(re.escape(part) for part in parts)):
        optimizer_of(model, **options)
    assert alphas(model) == before


def test_dropout_is_refused():
    model = adapted(mlp(7, 5), "0", lora_dropout=0.25)
    with pytest.raises(ValueError, match=r"base_model\.model\.0: it has lora_dropout=0\.25"):
        find_triples(model)
    refused_folded(model, "base_model.model.0: it has lora_dropout=0.25", "set lora_dropout=0")
    ways = "set lora_dropout=0", 'use weight_update="in_place" with allow_dropout=True'
    refused_folded(model, 'model.0: it has lora_dropout, which weight_update="folded"', *ways, allow_dropout=True)
    assert optimizer_of(model, weight_update="in_place", allow_dropout=True).step_count == 0


def test_a_bias_in_the_branch_is_refused():
    model = adapted(mlp(7, 5), "0", lora_bias=True)
    refused_folded(model, "model.0: its branch has a bias (lora_bias=True)", 'use weight_update="in_place"')


@tied_weights_are_meant
def test_a_tied_weight_is_refused():
    """In place the other user of W moves too, which no branch can do."""
    model = adapted(tiny_llama(tie_word_embeddings=True), "lm_head")
    refused_folded(model, "base_model.model.lm_head: ", 'use weight_update="in_place"', allow_tied=True)


def test_a_convolution_whose_branch_pads_otherwise_is_refused():
    """PEFT's branch pads with zeros always, so that it is no change of W."""
    model = adapted(nn.Sequential(nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular")), "0")
    refused_folded(model, "base_model.model.0: ", "padding_mode")


@pytest.mark.parametrize("allow_dropout", [False, True])
def test_dropout_that_is_set_later_is_refused_at_the_step(allow_dropout):
    model, x = adapted(mlp(7, 5), "0"), image(7)
    optimizer = folded(model, x, 1, allow_dropout=allow_dropout)
    model.base_model.model[0].lora_dropout["default"] = nn.Dropout(0.1)
    assert_step_refused(model, optimizer, RuntimeError, r"model\.0: it has lora_dropout=0\.1")


@pytest.mark.parametrize("start_step", [0, 2])
def test_dropout_that_is_set_before_step_k_is_not_folded(start_step):
    """Though it is allowed, as for in place."""
    model, x = adapted(mlp(7, 5), "0"), image(7)
    optimizer = folded(model, x, start_step, start_step=start_step, allow_dropout=True)
    model.base_model.model[0].lora_dropout["default"] = nn.Dropout(0.1)
    output(model, x).square().mean().backward()
    assert_step_refused(model, optimizer, RuntimeError, r"model\.0: it has lora_dropout")
    assert alphas(model) == [ALPHA]


@pytest.mark.parametrize(
    "rescale", [lambda layer: layer.set_scale("default", 0.5), lambda layer: layer.scale_layer(0.5)]
)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_changed_scaling_is_refused(rescale, steps):
    model, x = adapted(mlp(7, 5), "0", lora_alpha=8), image(7)
    optimizer = folded(model, x, steps)
    output(model, x).square().mean().backward()
    rescale(model.base_model.model[0])
    was, now = (r"10 when it was folded", r"5\.0") if steps else ("4 when it was registered", r"2\.0")
    match = rf"model\.0: its scaling was {was} and is {now} now.*build the optimizer again, or put the scaling back"
    assert_step_refused(model, optimizer, RuntimeError, match)


@pytest.mark.parametrize("ratio", [0.7, 1.5, 2.0])
@pytest.mark.parametrize("config", [{"r": 3, "lora_alpha": 5}, {"r": 3, "lora_alpha": 7, "use_rslora": True}])
@pytest.mark.parametrize("back", [lambda layer: layer.set_scale("default", 1.0), lambda layer: layer.unscale_layer()])
def test_a_scaling_that_peft_puts_back_is_accepted(config, ratio, back):
    """PEFT computes it from lora_alpha, in another order of operations."""
    model, x = adapted(mlp(7, 5), "0", **config), image(7)
    optimizer = folded(model, x, 1, update_ratio=ratio)
    (layer,) = lora_layers(model).values()
    layer.set_scale("default", 0.5)
    assert_step_refused(model, optimizer, RuntimeError, r"model\.0: its scaling was")
    back(layer)
    train(model, optimizer, x, 1)
    assert optimizer.step_count == 2


def test_the_triples_of_a_folded_optimizer_are_not_taken_again():
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    optimizer = folded(model, x)
    for mode in ("folded", "in_place"):
        with pytest.raises(
            ValueError, match=r"folded its update_ratio into the branch of .*model\.0, .*model\.1: make"
        ):
            DeltaLoRAOptimizer(SGD, optimizer.triples, lr=0.1, weight_update=mode)
    train(model, optimizer, x)
    other = optimizer_of(adapted(mlp(7, 5), "0"))
    with pytest.raises(ValueError, match=r"folded its update_ratio into the branch of .*model\.0: make"):
        other.add_param_group({"triples": optimizer.triples[:1]})


@pytest.mark.parametrize("mode", ["folded", "in_place"])
@pytest.mark.parametrize("inner", [SGD, AdamW])
def test_a_second_optimizer_goes_on_from_the_present_scaling(inner, mode):
    """The first one still lives, and does not divide the second one's gradients, nor step."""
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    first = folded(model, x, inner=inner)
    with pytest.warns(
        UserWarning, match=r"an earlier optimizer .*model\.0 \(2\.5, now 6\.25\), .* the ratios multiply"
    ):
        second = optimizer_of(model, inner, update_ratio=0.5, weight_update=mode)
    other = adapted(mlp(7, 5, 4), "0", "1", lora_alpha=LARGER)
    other.load_state_dict(model.state_dict())
    reference = optimizer_of(other, inner, update_ratio=0.5, weight_update="in_place")
    train(model, second, x)
    train(other, reference, x)
    assert_alike(Run(model, second), Run(other, reference), x)
    with pytest.raises(RuntimeError, match=r"model\.0: "):
        first.step()
    assert first.step_count == 3
    train(model, second, x)
    train(other, reference, x)
    assert_alike(Run(model, second), Run(other, reference), x)


def test_the_adapter_of_a_second_optimizer(tmp_path):
    """It counts from the pristine base, which the first one has not written."""
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1")
    folded(model, x)
    with pytest.warns(UserWarning, match="an earlier optimizer has folded"):
        second = folded(model, x, update_ratio=0.5)
    save_adapter(model, second, tmp_path)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


def test_a_second_optimizer_after_the_first_one_is_gone():
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    folded(model, x)
    other = adapted(mlp(7, 5, 4), "0", "1", lora_alpha=LARGER)
    other.load_state_dict(model.state_dict())
    for run in (model, other):
        train(run, SGD([p for p in run.parameters() if p.requires_grad], lr=0.1), x)
    assert_same_bits(model, other, x)


def test_triples_made_by_hand_in_a_peft_layer():
    """The layer's scaling by its place: the output is right, PEFT's alpha does not follow."""
    model, x = adapted(mlp(7, 5), "0"), image(7)

    def by_hand(layer: nn.Module) -> LoRATriple:
        A, B = (layer, "lora_B.default.weight"), (layer, "lora_A.default.weight")
        set_scaling = lambda value: layer.scaling.update(default=value)  # noqa: E731
        return LoRATriple((layer, "base_layer.weight"), A, B, layer.scaling["default"], "0", set_scaling=set_scaling)

    def make(twin: nn.Module, **options) -> DeltaLoRAOptimizer:
        return DeltaLoRAOptimizer(AdamW, [by_hand(twin.base_model.model[0])], lr=2e-2, update_ratio=RATIO, **options)

    assert_alike(*both(model, x, make=make), x)


def test_several_searches_of_a_model_write_one_config(tmp_path):
    """Triples of two `find_triples`, added in turn: what is saved is what the layers have in the end."""
    torch.manual_seed(0)
    base = nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)])
    pristine = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=r"\d"))
    a, b = find_triples(model), find_triples(model)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, a[:2], lr=0.1, weight_update="folded")
    x = torch.randn(5, 6)
    for more in (b[2:4], a[4:], None):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if more is not None:
            optimizer.add_param_group({"triples": more})
    assert model.peft_config["default"].lora_alpha == 24
    assert not model.peft_config["default"].alpha_pattern
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(pristine, tmp_path)(x), model(x))


def test_a_config_that_is_unfolded_is_the_users_again(tmp_path):
    """Its patterns too, which are regular expressions of the user's."""
    plain, x = mlp(7, 5, 6, 4).double(), image(7)
    model = adapted(plain, "0", "1", "2", zero=False, alpha_pattern={"[12]": 16})
    given = dict(model.peft_config["default"].alpha_pattern)
    optimizer = optimizer_of(model, start_step=2)
    state, factors = state_of(optimizer), copy.deepcopy(model.state_dict())
    train(model, optimizer, x, 3)
    assert model.peft_config["default"].alpha_pattern != given
    model.load_state_dict(factors)
    optimizer.load_state_dict(state)
    assert model.peft_config["default"].lora_alpha == ALPHA
    assert model.peft_config["default"].alpha_pattern == given


def test_the_common_alpha_is_that_of_a_parameter(tmp_path):
    """Though more layers have another one: of patterns for parameters PEFT warns, which would be an error here."""
    plain = nn.Sequential(Experts(3, 7, 5, False), nn.Linear(7, 6), nn.Linear(6, 4)).double()
    model = adapted(plain, "1", "2", target_parameters=["0.up"])
    ratios = [2.0 if triple.label.endswith("up") else 0.5 for triple in find_triples(model)]
    train(model, grouped(model, ratios, weight_update="folded"), x := image(4, 7))
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path)["lora_alpha"] == 3 * ALPHA
    assert config_in(tmp_path)["alpha_pattern"] == {"^1": 1.5 * ALPHA, "^2": 1.5 * ALPHA}
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


def test_the_triples_of_pefts_tuner(tmp_path):
    """Whose layers have other names than in the model that was adapted."""
    plain, x = mlp(7, 5, 6, 4).double(), image(7)
    model = adapted(plain, "0", "1", "2")
    optimizer = grouped(model.base_model, [0.5, 0.0, 2.0], weight_update="folded")
    train(model, optimizer, x)
    model.save_pretrained(tmp_path)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_slightly_changed_scaling_is_refused(steps):
    model, x = adapted(mlp(7, 5), "0"), image(7)
    optimizer = folded(model, x, steps)
    model.base_model.model[0].scaling["default"] *= 1 + 1e-6
    output(model, x).sum().backward()
    with pytest.raises(RuntimeError, match="its scaling was"):
        optimizer.step()


def test_an_embedding_that_rewrites_its_rows_is_refused():
    model = adapted(nn.Sequential(nn.Embedding(9, 5, max_norm=1.0)), "0")
    with pytest.raises(ValueError, match=r"its embedding has max_norm.*weight_update=\"in_place\""):
        optimizer_of(model)


@pytest.mark.parametrize(("ratio", "alpha"), [(1.0, 6), (0.1, 3.3)])
def test_an_alpha_is_written_as_one_would(tmp_path, ratio, alpha):
    """6 and not 6.0, 3.3 and not 3.3000000000000003."""
    model = adapted(mlp(7, 5), "0", lora_alpha=3)
    folded(model, image(7), update_ratio=ratio)
    model.save_pretrained(tmp_path)
    assert repr(config_in(tmp_path)["lora_alpha"]) == repr(alpha)


def test_the_triples_of_a_part_of_a_model():
    """Where no config is in sight, the layers alone are scaled."""
    model, x = adapted(mlp(7, 5), "0"), image(7)
    optimizer = optimizer_of(model.base_model.model[0])
    train(model, optimizer, x, 2)
    assert alphas(model) == [LARGER]
    assert model.peft_config["default"].lora_alpha == ALPHA
