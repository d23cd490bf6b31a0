"""PEFT's own save of a folded run, and `save_adapter`: the config keeps the user's alpha, and the values are right."""

import copy

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, find_triples, other_parameters

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)

from deltaopt.integrations.peft import save_adapter
from tests.support.peft_folded import (
    ALPHA,
    FOLDED_RATIO,
    LARGER,
    NAMES,
    SOME,
    adapted,
    alphas,
    assert_alike,
    assert_near,
    both_rules_on,
    folded,
    grouped,
    optimizer_of,
)
from tests.support.peft_layers import (
    CASES,
    GUARD,
    READ,
    Classifier,
    Experts,
    assert_loads,
    config_in,
    image,
    mlp,
    output,
    randomised,
    tiny_llama,
    tokens,
    train_model,
)
from tests.support.peft_runs import peft_asks_by_an_old_name

pytestmark = peft_asks_by_an_old_name


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
        train_model(model, optimizer, x, steps)
        model.save_pretrained(tmp_path / str(steps))
        assert config_in(tmp_path / str(steps)) == config_in(tmp_path / "before")
        loaded = assert_loads(plain, tmp_path / str(steps), model, x, tolerance=1e-10)
        assert alphas(loaded) == before
        assert alphas(model) == [a * (1 + FOLDED_RATIO) for a in before]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_layer_is_saved_by_peft(tmp_path, name):
    build, targets, inputs, config = CASES[name]
    plain, x = build().double(), inputs()
    model = adapted(plain, *targets, **config)
    folded(model, x)
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path)["lora_alpha"] == ALPHA
    assert config_in(tmp_path)["alpha_pattern"] == {}
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


@pytest.mark.parametrize("config", CONFIGS)
def test_an_adapter_of_different_ratios(tmp_path, config):
    plain, x = mlp(7, 5, 6, 4).double(), image(7)
    model = adapted(plain, "0", "1", "2", **CONFIGS[config])
    before = alphas(model)
    train_model(model, grouped(model, [0.5, 0.0, 2.0], weight_update="folded"), x)
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
    train_model(model, grouped(model, [0.5, 2.0], weight_update="folded"), x)
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


def test_a_layer_next_to_parameters_of_another_ratio(tmp_path):
    plain, x = nn.Sequential(Experts(3, 7, 5, False), nn.Linear(7, 6)).double(), image(4, 7)
    model = adapted(plain, "1", target_parameters=["0.up", "0.down"])
    train_model(model, grouped(model, [2.0, 2.0, 0.5], weight_update="folded"), x)
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path)["lora_alpha"] == ALPHA
    assert config_in(tmp_path)["alpha_pattern"] == {}
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


@pytest.mark.parametrize("registered", [[0], [1, 2]])
def test_layers_that_are_no_triples_keep_their_alpha(tmp_path, registered):
    plain, x = mlp(7, 5, 6, 4).double(), image(7)
    model = adapted(plain, "0", "1", "2")
    triples = [find_triples(model)[i] for i in registered]
    others = other_parameters(model, triples)
    optimizer = DeltaLoRAOptimizer(
        torch.optim.AdamW, triples, others, lr=2e-2, update_ratio=FOLDED_RATIO, weight_update="folded"
    )
    train_model(model, optimizer, x)
    assert alphas(model) == [LARGER if i in registered else ALPHA for i in range(3)]
    model.save_pretrained(tmp_path)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


def test_a_layer_whose_name_ends_like_anothers_has_its_own_ratio(tmp_path):
    plain = nn.Sequential(nn.Linear(7, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Linear(6, 6)).double()
    model, x = adapted(plain, "0", "1.0", "1.1", "2"), image(7)
    train_model(model, grouped(model, [0.5, 2.0, 1.0, 1.0], weight_update="folded"), x)
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path)["alpha_pattern"] == {}
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
    mine, its = both_rules_on(model, x)
    assert_near(output(mine.model, x), output(its.model, x))
    mine.model.save_pretrained(tmp_path)
    assert_loads(plain, tmp_path, mine.model, x, tolerance=1e-10)


def test_a_language_model(tmp_path):
    plain, x = tiny_llama().double(), tokens()
    model = adapted(plain, task_type="CAUSAL_LM", target_modules="all-linear", alpha_pattern={"down_proj": 3})
    mine, its = both_rules_on(model, x)
    assert_alike(mine, its, x)
    mine.model.save_pretrained(tmp_path)
    assert config_in(tmp_path)["lora_alpha"] == ALPHA
    assert config_in(tmp_path)["alpha_pattern"] == {"down_proj": 3}
    assert_loads(plain, tmp_path, mine.model, x, tolerance=1e-10)


def test_a_model_with_transformers_own_adapters(tmp_path):
    plain, x = tiny_llama().double(), tokens()
    model = copy.deepcopy(plain)
    model.add_adapter(LoraConfig(r=2, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"]))
    model.double()
    triples = find_triples(model)
    groups = [{"triples": triples[:1], "update_ratio": 0.5}, {"triples": triples[1:], "update_ratio": FOLDED_RATIO}]
    train_model(model, DeltaLoRAOptimizer(torch.optim.AdamW, groups, lr=2e-2, weight_update="folded"), x)
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path)["lora_alpha"] == ALPHA
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)
    other = copy.deepcopy(plain)
    other.load_adapter(tmp_path)
    assert_near(output(other.eval(), x), output(model.eval(), x))


def test_an_adapter_injected_into_a_plain_module(tmp_path):
    plain, x = mlp(7, 5).double(), image(7)
    config = LoraConfig(r=2, lora_alpha=ALPHA, target_modules=["0"])
    model = inject_adapter_in_model(config, copy.deepcopy(plain)).double()
    optimizer = folded(model, x)
    assert model.peft_config["default"].lora_alpha == ALPHA
    save_adapter(model, optimizer, tmp_path)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


class Wrapped(nn.Module):
    """As DistributedDataParallel: the model is its `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Holder(nn.Module):
    """As a LightningModule: the model is one of its attributes."""

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
        WRAPPERS[wrapper](model), torch.optim.AdamW, lr=2e-2, update_ratio=FOLDED_RATIO, weight_update="folded"
    )
    train_model(model, optimizer, x)
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
    train_model(model, grouped(model, [0.5, 2.0, 1.0], weight_update="folded"), x)
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
    train_model(
        model,
        DeltaLoRAOptimizer(torch.optim.AdamW, groups, lr=2e-2, update_ratio=FOLDED_RATIO, weight_update="folded"),
        x,
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "first", adapter_name="first")
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.base_model.set_adapter(["first", "second"])
    assert [config.lora_alpha for config in loaded.peft_config.values()] == [8, 8]
    assert_near(output(loaded, x), output(model, x))


def test_another_adapter_name(tmp_path):
    plain, x = mlp(7, 5).double(), image(7)
    config = LoraConfig(r=2, lora_alpha=ALPHA, target_modules=["0"])
    model = get_peft_model(copy.deepcopy(plain), config, adapter_name="mine").double()
    folded(model, x, adapter="mine")
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path / "mine")["lora_alpha"] == ALPHA
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
    optimizer = optimizer_of(model)
    train_model(model, optimizer, x)
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path / "other")["lora_alpha"] == ALPHA
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "other")
    assert_near(output(loaded, x), expected)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


WRITTEN_AT = {
    "after_two_steps": (True, {"start_step": 2}),
    "random_start": (False, {}),
    "random_start_after_a_step": (False, {"start_step": 1}),
}


@pytest.mark.parametrize("start", WRITTEN_AT)
def test_what_peft_leaves_out_is_warned_of_and_written_by_save_adapter(tmp_path, start):
    zero, options = WRITTEN_AT[start]
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1", zero=zero)
    optimizer = optimizer_of(model, **options)
    train_model(model, optimizer, x, options.get("start_step", 0))
    if options:
        model.save_pretrained(tmp_path / "before")
        assert_loads(plain, tmp_path / "before", model, x, tolerance=1e-10)
    train_model(model, optimizer, x, 3)
    with pytest.warns(UserWarning, match=GUARD):
        model.save_pretrained(tmp_path / "peft")
    with pytest.raises(AssertionError, match="not close"), pytest.warns(UserWarning, match=READ):
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
        train_model(model, optimizer, x, steps)
        save_adapter(model, optimizer, tmp_path / str(steps))
        assert_loads(plain, tmp_path / str(steps), model, x, tolerance=1e-10)
    assert config_in(tmp_path / "3")["r"] == (2 if zero else 4)
    assert model.peft_config["default"] == before


def test_save_adapter_after_a_restart(tmp_path):
    plain, x = mlp(7, 5, 4).double(), image(7)
    runs = both_rules_on(adapted(plain, "0", "1"), x)
    for run in runs:
        run.optimizer.restart(generator=torch.Generator().manual_seed(0))
        train_model(*run, x)
    assert_alike(*runs, x)
    save_adapter(*runs[0], tmp_path)
    assert_loads(plain, tmp_path, runs[0].model, x, tolerance=1e-10)


def test_the_adapter_of_a_second_optimizer(tmp_path):
    """It counts from the pristine base, which the first one has not written."""
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1")
    folded(model, x)
    with pytest.warns(UserWarning, match="an earlier optimizer has folded"):
        second = folded(model, x, update_ratio=0.5)
    save_adapter(model, second, tmp_path)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


def test_several_searches_of_a_model_are_saved_as_one(tmp_path):
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
    assert model.peft_config["default"].lora_alpha == 8
    assert not model.peft_config["default"].alpha_pattern
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(pristine, tmp_path)(x), model(x))


def test_a_parameter_of_another_ratio_than_most_layers(tmp_path):
    """Of patterns for parameters PEFT would warn, which would be an error here."""
    plain = nn.Sequential(Experts(3, 7, 5, False), nn.Linear(7, 6), nn.Linear(6, 4)).double()
    model = adapted(plain, "1", "2", target_parameters=["0.up"])
    ratios = [2.0 if triple.label.endswith("up") else 0.5 for triple in find_triples(model)]
    train_model(model, grouped(model, ratios, weight_update="folded"), x := image(4, 7))
    model.save_pretrained(tmp_path)
    assert config_in(tmp_path)["lora_alpha"] == ALPHA
    assert config_in(tmp_path)["alpha_pattern"] == {}
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


def test_the_triples_of_pefts_tuner(tmp_path):
    """Whose layers have other names than in the model that was adapted."""
    plain, x = mlp(7, 5, 6, 4).double(), image(7)
    model = adapted(plain, "0", "1", "2")
    optimizer = grouped(model.base_model, [0.5, 0.0, 2.0], weight_update="folded")
    train_model(model, optimizer, x)
    model.save_pretrained(tmp_path)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)


@pytest.mark.parametrize(("ratio", "alpha"), [(1.0, 6), (0.1, 3.3)])
def test_the_alpha_of_a_layer_is_as_one_would_write_it(ratio, alpha):
    """6 and not 6.0, 3.3 and not 3.3000000000000003."""
    model = adapted(mlp(7, 5), "0", lora_alpha=3)
    folded(model, image(7), update_ratio=ratio)
    assert repr(alphas(model)) == repr([alpha])
