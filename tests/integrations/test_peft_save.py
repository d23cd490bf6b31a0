"""save_adapter: plain PEFT loads what it writes onto the pristine base and computes what the trained model does."""

import copy
import itertools
import os
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple, find_triples, other_parameters
from deltaopt.checkpoint import files

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")

import peft
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from deltaopt.integrations.peft import save_adapter
from tests.support.compare import naming, same
from tests.support.elsewhere import run_without_this_package
from tests.support.internals import ledger_of
from tests.support.peft_layers import (
    CASES,
    CONFIG,
    GUARD,
    PEFT_CAN_NOT,
    READ,
    TENSORS,
    Bare,
    Classifier,
    Experts,
    assert_loads,
    config_in,
    gpt2_config,
    mlp,
    output,
    tied_outputs_are_named,
    tied_weights_are_meant,
    tiny_llama,
    tokens,
    train_model,
)
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.peft_starts import from_a_start, three_layers

pytestmark = [
    peft_asks_by_an_old_name,
    # PEFT sets the flag for each layer itself and says so.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning:peft"),
]


def trained_optimizer(model: nn.Module, x, *, restart: bool = False, ratios=(1.5,), adapter="default", **options):
    """Build an optimizer and take some steps with each of the ratios."""
    optimizer = DeltaLoRAOptimizer.for_model(
        model, torch.optim.AdamW, lr=2e-2, adapter=adapter, update_ratio=ratios[0], **options
    )
    for ratio in ratios:
        optimizer.groups[0].update_ratio = ratio
        train_model(model, optimizer, x)
    if restart:
        optimizer.restart(generator=torch.Generator().manual_seed(0))
        train_model(model, optimizer, x)
    return optimizer


def check(plain: nn.Module, config: LoraConfig, x, folder, tolerance: float = 1e-5, **options) -> PeftModel:
    """Train, save, load and compare."""
    model = get_peft_model(copy.deepcopy(plain), config)
    optimizer = trained_optimizer(model, x, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before_config = copy.deepcopy(model.peft_config["default"])
    errors = save_adapter(model, optimizer, folder)
    assert errors == dict.fromkeys([triple.name for triple in optimizer.triples], 0.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.peft_config["default"] == before_config
    return assert_loads(plain, folder, model, x, tolerance)


def layers_of(model: nn.Module) -> list[peft.tuners.lora.LoraLayer]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def inputs(*size: int) -> Tensor:
    return torch.randn(4, *size)


RUNS = {
    "from_the_start": {},
    "after_two_steps": {"start_step": 2},
    "changing_ratio": {"ratios": (1.5, 0.5, 2.0), "start_step": 1},
    "with_a_restart": {"restart": True},
    "no_movement": {"ratios": (0.0,)},
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("zero_product", [True, False])
def test_plain_peft_gives_the_trained_outputs(tmp_path, run, zero_product):
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["0", "1"], init_lora_weights=zero_product)
    plain = mlp(7, 5, 4).double()
    check(plain, config, inputs(7).double(), tmp_path / "adapter", tolerance=1e-12, **RUNS[run])


@pytest.mark.parametrize("name", sorted(CASES.keys() - PEFT_CAN_NOT))
def test_every_kind_of_layer(tmp_path, name):
    build, targets, make, config = CASES[name]
    x = make()
    x = x.float() if x.is_floating_point() else x
    config = LoraConfig(r=2, lora_alpha=5, target_modules=targets, **config)
    check(build(), config, x, tmp_path / "adapter", start_step=1)


def test_the_factors_of_peft_alone_are_not_the_trained_model(tmp_path):
    """PEFT's own save gives another output, which is why save_adapter exists."""
    plain, x = mlp(7, 5), inputs(7)
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["0"]))
    trained_optimizer(model, x)
    with pytest.warns(UserWarning, match=GUARD):
        model.save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match="not close"), pytest.warns(UserWarning, match=READ):
        assert_loads(plain, tmp_path, model, x, tolerance=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"1": 3}},
        {"alpha_pattern": {"2": 16}},
        {"use_rslora": True},
        {"rank_pattern": {"0": 1, "2": 4}, "alpha_pattern": {"0": 2}, "use_rslora": True},
    ],
)
def test_ranks_and_scalings_of_each_layer(tmp_path, config):
    plain = mlp(7, 5, 6, 4)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["0", "1", "2"], **config)
    loaded = check(plain, config, inputs(7), tmp_path)
    scalings = [layer.scaling["default"] for layer in layers_of(loaded)]
    assert scalings == [1.0, 1.0, 1.0]


def test_a_layer_whose_name_ends_like_anothers_keeps_its_own_rank(tmp_path):
    """PEFT's patterns fit the end of a name: "0" would fit "block.0" too."""
    plain = nn.Sequential(nn.Linear(7, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.Linear(6, 6))
    ranks = {"^0": 1, r"^1\.0": 2}
    config = LoraConfig(r=3, target_modules=["0", "1.0", "1.1", "2"], rank_pattern=ranks)
    check(plain, config, inputs(7), tmp_path)
    assert config_in(tmp_path)["rank_pattern"] == ranks
    assert config_in(tmp_path)["alpha_pattern"] == ranks


@pytest.mark.parametrize("target", ["all-linear", r".*\.(q_proj|down_proj)", ["v_proj", "up_proj"]])
def test_targets_as_a_list_a_regex_or_a_word(tmp_path, target):
    check(tiny_llama(), LoraConfig(r=2, target_modules=target, task_type="CAUSAL_LM"), tokens(), tmp_path)


def test_gpt2_with_all_its_layers(tmp_path):
    plain = transformers.GPT2LMHeadModel(gpt2_config(tie_word_embeddings=False))
    targets = ["c_attn", "c_fc", "c_proj", "wte", "lm_head"]
    config = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=True, rank_pattern={"wte": 3, "c_fc": 1})
    check(plain, config, tokens(), tmp_path, start_step=1)
    assert config_in(tmp_path)["target_modules"] == sorted(targets)


def test_the_moved_embedding_is_not_written(tmp_path):
    """PEFT would save it with the adapter, and add the exported change to it."""
    plain = tiny_llama(tie_word_embeddings=False)
    check(plain, LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"]), tokens(), tmp_path)
    assert not [key for key in load_file(tmp_path / TENSORS) if "base_layer" in key]


def test_an_embedding_by_a_name_that_peft_knows_in_a_model_that_it_does_not(tmp_path):
    """PEFT would warn that it cannot save it."""
    plain = nn.Sequential()
    plain.add_module("embed_tokens", nn.Embedding(9, 6))
    check(plain, LoraConfig(r=2, target_modules=["embed_tokens"]), torch.randint(0, 9, (4, 5)), tmp_path)


# The head is another weight, so PEFT has nothing to say about tied ones.
def test_an_embedding_that_was_resized_and_is_a_target_is_not_written(tmp_path):
    transformers.GPT2LMHeadModel(gpt2_config(tie_word_embeddings=False)).save_pretrained(tmp_path / "base")
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    plain.resize_token_embeddings(24, mean_resizing=False)
    check(plain, LoraConfig(r=2, target_modules=["wte"]), tokens(24), tmp_path)
    assert len(load_file(tmp_path / TENSORS)) == 2


def test_a_mixture_of_experts(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        use_cache=False,
        initializer_range=0.3,
    )
    config = (
        LoraConfig(
            r=2,
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            use_rslora=True,
        ),
        transformers.MixtralForCausalLM(config),
    )
    check(config[1], config[0], tokens(), tmp_path, start_step=1)


def test_parameters_of_unlike_ranks(tmp_path):
    """Each is compressed to its own rank and padded to one: PEFT warns of a rank_pattern for a parameter."""
    plain = nn.Sequential(Experts(3, 5, 4, False), nn.Linear(5, 7), Bare())
    config = LoraConfig(
        r=1,
        lora_alpha=3,
        target_modules=["1"],
        target_parameters=["0.up", "0.down", "2.matrix"],
        rank_pattern={"up": 2},
        init_lora_weights=False,
    )
    # PEFT takes rank_pattern for modules only in its warning; the rank itself is set.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match")
        loaded = check(plain, config, inputs(5), tmp_path)
    assert config_in(tmp_path)["r"] == 4
    assert config_in(tmp_path)["rank_pattern"] == {"^1": 2}
    assert {layer.r["default"] for layer in layers_of(loaded) if isinstance(layer, peft.tuners.lora.ParamWrapper)} == {
        4
    }


class Routed(Experts):
    """Stacks of matrices, and a linear layer in the same module."""

    def __init__(self) -> None:
        super().__init__(3, 5, 4, False)
        self.gate = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.gate(x))


def test_a_layer_inside_of_a_module_whose_parameters_are_targets(tmp_path):
    """Its name contains the wrappers of the parameters, and PEFT looks its rank up by a name without them."""
    config = LoraConfig(
        r=2, target_modules=["gate", "1"], target_parameters=["0.up", "0.down"], rank_pattern={"gate": 3}
    )
    loaded = check(nn.Sequential(Routed(), nn.Linear(5, 5)), config, inputs(5), tmp_path)
    assert config_in(tmp_path)["rank_pattern"] == {r"^0\.gate": 3}
    ranks = [layer.r["default"] for layer in layers_of(loaded) if type(layer) is peft.tuners.lora.Linear]
    assert ranks == [3, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["head", "norm"]},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"lora_bias": True, "target_modules": ["hidden"], "lora_alpha": 5},
        {"trainable_token_indices": {"embed": [1, 4]}},
    ],
    ids=lambda options: next(iter(options)) + str(options.get("bias", "")),
)
def test_other_trained_parameters_are_saved_too(tmp_path, options):
    x = torch.randint(0, 9, (4, 5))
    check(Classifier(), LoraConfig(r=2, **{"target_modules": ["hidden"], **options}), x, tmp_path)


class TwiceTheSame(nn.Module):
    """Two linear layers with one weight, stored as the transpose of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight = nn.Parameter(torch.randn(8, 8).mT)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    """Safetensors takes no two names for one tensor, and none that is not contiguous."""
    plain = Classifier()
    plain.norm = TwiceTheSame()
    x = torch.randint(0, 9, (4, 5))
    assert not copy.deepcopy(plain).norm.first.weight.is_contiguous()
    check(plain, LoraConfig(r=2, target_modules=["hidden"], modules_to_save=["norm"]), x, tmp_path)


def test_a_classifier_of_transformers(tmp_path):
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=3
    )
    plain = transformers.BertForSequenceClassification(config)
    loaded = check(plain, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]), tokens(), tmp_path)
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)
    assert any("classifier" in key for key in load_file(tmp_path / TENSORS))


def test_another_adapter_name(tmp_path):
    plain, x = mlp(7, 5), inputs(7)
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["0"]), adapter_name="mine")
    save_adapter(model, trained_optimizer(model, x, adapter="mine"), tmp_path)
    assert_loads(plain, tmp_path, model, x)
    assert list(load_file(tmp_path / TENSORS)) == [f"base_model.model.0.lora_{letter}.weight" for letter in "AB"]


def test_two_adapters_of_one_optimizer(tmp_path):
    plain, x = mlp(7, 5, 4), inputs(7)
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["0"]), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["1"]))
    model.base_model.set_adapter(["first", "second"])
    triples = [*find_triples(model, "first"), *find_triples(model, "second")]
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=2e-2)
    train_model(model, optimizer, x)
    with pytest.raises(ValueError, match=r"several adapters \(first, second\).*adapter='first'"):
        save_adapter(model, optimizer, tmp_path)
    assert list(save_adapter(model, optimizer, tmp_path / "1", adapter="first")) == ["base_model.model.0"]
    assert list(save_adapter(model, optimizer, tmp_path / "2", adapter="second")) == ["base_model.model.1"]
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "1", adapter_name="a")
    loaded.load_adapter(tmp_path / "2", "b")
    loaded.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-5)


def test_a_model_with_transformers_own_adapters(tmp_path):
    plain, x = tiny_llama(), tokens()
    model = copy.deepcopy(plain)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    save_adapter(model, trained_optimizer(model, x), tmp_path)
    assert_loads(plain, tmp_path, model, x)
    other = copy.deepcopy(plain)
    other.load_adapter(tmp_path)
    torch.testing.assert_close(output(other.eval(), x), output(model.eval(), x), rtol=0, atol=1e-5)


def test_an_adapter_injected_into_a_plain_module(tmp_path):
    plain, x = mlp(7, 5), inputs(7)
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), copy.deepcopy(plain))
    save_adapter(model, trained_optimizer(model, x), tmp_path)
    assert_loads(plain, tmp_path, model, x)


@pytest.mark.parametrize(
    "wrap", [lambda m: m.base_model, nn.DataParallel, torch.compile], ids=["tuner", "dp", "compile"]
)
def test_a_wrapper_around_the_model_does_not_matter(tmp_path, wrap):
    plain, x = mlp(7, 5), inputs(7)
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["0"]))
    save_adapter(wrap(model), trained_optimizer(model, x), tmp_path)
    assert_loads(plain, tmp_path, model, x)


def test_everything_else_of_the_config_is_kept(tmp_path):
    plain = tiny_llama(num_hidden_layers=3)
    config = LoraConfig(
        r=2,
        lora_alpha=7,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        task_type="CAUSAL_LM",
        revision="main",
        init_lora_weights="gaussian",
    )
    check(plain, config, tokens(), tmp_path)
    written = config_in(tmp_path)
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (2, 2, False)
    assert (written["init_lora_weights"], written["inference_mode"]) == (True, True)
    kept = ("target_modules", "layers_to_transform", "layers_pattern", "task_type", "revision")
    expected = {**config.to_dict(), "target_modules": ["q_proj", "v_proj"]}
    assert {field: written[field] for field in kept} == {field: expected[field] for field in kept}
    assert written["auto_mapping"] is None


def test_the_name_of_the_base_is_kept(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    check(plain, LoraConfig(r=2, target_modules=["q_proj"]), tokens(), tmp_path)
    assert config_in(tmp_path)["base_model_name_or_path"] == str(tmp_path / "base")


def test_the_name_of_the_base_is_written_where_peft_has_not_done_so(tmp_path):
    """`inject_adapter_in_model` does not write it."""
    tiny_llama().save_pretrained(tmp_path / "base")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), plain)
    assert model.peft_config["default"].base_model_name_or_path is None
    save_adapter(model, trained_optimizer(model, tokens()), tmp_path)
    assert config_in(tmp_path)["base_model_name_or_path"] == str(tmp_path / "base")


# PEFT says that it saves the embeddings.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True` as the embedding layer has been resized")
def test_embeddings_that_were_resized_are_saved_as_peft_saves_them(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    plain.resize_token_embeddings(24, mean_resizing=False)
    check(plain, LoraConfig(r=2, target_modules=["q_proj"]), tokens(24), tmp_path)
    embeddings = load_file(tmp_path / TENSORS)["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(embeddings, plain.get_input_embeddings().weight)


def test_without_a_task_type_the_class_of_the_base_is_written(tmp_path):
    check(mlp(7, 5), LoraConfig(r=2, target_modules=["0"]), inputs(7), tmp_path)
    mapping = {"base_model_class": "Sequential", "parent_library": "torch.nn.modules.container"}
    assert config_in(tmp_path)["auto_mapping"] == mapping


def test_a_bf16_base_keeps_float32_factors(tmp_path):
    plain, x = mlp(7, 5).bfloat16(), inputs(7).bfloat16()
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["0"]))
    optimizer = trained_optimizer(model, x)
    save_adapter(model, optimizer, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / TENSORS).values()} == {torch.float32}
    assert_loads(plain, tmp_path, model, x, tolerance=0.03)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        *itertools.product(["pissa", "pissa_niter_4", "corda", "lora_ga"], [nn.Linear, Conv1D]),
        ("olora", nn.Linear),  # on a Conv1D PEFT's factors have wrong shapes
    ],
)
def test_starts_that_are_taken_out_of_the_base(tmp_path, start, kind):
    """The adapter belongs to the base as it was before, and PEFT does not rewrite it again."""
    plain, x = three_layers(kind), torch.randn(32, 6)
    model = from_a_start(start, plain, x, fan_in_fan_out=kind is Conv1D)
    weight = model.base_model.model[0].base_layer.weight
    assert not torch.equal(weight, plain[0].weight)
    x = x.detach()
    save_adapter(model, trained_optimizer(model, x, start_step=1), tmp_path)
    assert config_in(tmp_path)["init_lora_weights"] is True
    assert_loads(plain, tmp_path, model, x)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_in_16_bits_is_known_too(tmp_path, start):
    """Its columns are orthogonal only up to the rounding of bf16, which shows in some of many layers."""
    plain, x = mlp(*[12] * 9).bfloat16(), torch.randn(32, 12).bfloat16()
    config = LoraConfig(r=5, target_modules="all-linear", init_lora_weights=start)
    model = get_peft_model(copy.deepcopy(plain), config)
    columns = [nn.functional.normalize(layer.lora_B["default"].weight.detach(), dim=0) for layer in layers_of(model)]
    assert max(float((c.T @ c).fill_diagonal_(0).abs().max()) for c in columns) > 1e-3
    save_adapter(model, trained_optimizer(model, x), tmp_path)
    assert_loads(plain, tmp_path, model, x, tolerance=0.03)


@pytest.mark.parametrize("start", ["orthogonal", "gaussian", "eva"])
# PEFT has something to say about EVA.
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'", "ignore:lora with eva initialization")
def test_starts_that_leave_the_base_alone(tmp_path, start):
    check(mlp(7, 5), LoraConfig(r=2, target_modules=["0"], init_lora_weights=start), inputs(7), tmp_path)


def test_an_embedding_next_to_pissa_starts_as_ever(tmp_path):
    x = torch.randint(0, 9, (4, 5))
    config = LoraConfig(r=2, target_modules=["embed", "hidden"], init_lora_weights="pissa")
    check(Classifier(), config, x, tmp_path)


def test_pissa_continues_after_a_resume(tmp_path):
    """The optimizer's state knows the start, though the loaded factors are no longer at it."""
    plain, x = three_layers(), torch.randn(32, 6)
    model = from_a_start("pissa", plain, x)
    optimizer = trained_optimizer(model, x)
    other = from_a_start("pissa", plain, x)
    other.load_state_dict(model.state_dict())
    resumed = DeltaLoRAOptimizer.for_model(other, torch.optim.AdamW, lr=2e-2, update_ratio=1.5)
    with pytest.raises(ValueError, match=naming("model.0", "model.2") + "init_lora_weights='pissa'.*not known"):
        save_adapter(other, resumed, tmp_path)
    resumed.load_state_dict(optimizer.state_dict())
    train_model(other, resumed, x)
    save_adapter(other, resumed, tmp_path)
    assert_loads(plain, tmp_path, other, x)


def test_pissa_after_rebase_is_refused(tmp_path):
    model = from_a_start("pissa", three_layers(), torch.randn(32, 6))
    optimizer = trained_optimizer(model, torch.randn(32, 6))
    optimizer.rebase()
    assert_refused(
        tmp_path, model, optimizer, naming("model.0", "model.2") + r"init_lora_weights='pissa'.*rebase\(\) was called"
    )


def test_loftq_is_refused(tmp_path):
    """PEFT's LoftQ needs a GPU, so only the config names it here."""
    model = get_peft_model(mlp(7, 5), LoraConfig(r=2, target_modules=["0"]))
    model.peft_config["default"].init_lora_weights = "loftq"
    assert_refused(
        tmp_path, model, trained_optimizer(model, inputs(7)), r"model\.0: LoftQ has replaced its base weight.*merge_and"
    )


@pytest.mark.parametrize("start", ["olora", "OLoRA"])  # PEFT takes both
def test_olora_on_a_square_conv1d_is_refused(tmp_path, start):
    plain, x = nn.Sequential(Conv1D(6, 6)), inputs(6)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=start, fan_in_fan_out=True)
    model = get_peft_model(copy.deepcopy(plain), config)
    assert (model(x) - plain(x)).abs().max() > 1e-3  # the fault is PEFT's
    assert_refused(tmp_path, model, trained_optimizer(model, x), r"model\.0: PEFT's OLoRA .*without transposing")


def test_compression_gives_the_best_approximation_and_its_error(tmp_path):
    plain, x = mlp(12, 10).double(), inputs(12).double()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(plain), config)
    optimizer = trained_optimizer(model, x, start_step=1, ratios=(1.5, 0.5))
    merged = copy.deepcopy(model).merge_and_unload()
    whole = merged[0].weight.detach() - plain[0].weight.detach()
    singular_values = torch.linalg.svdvals(whole)
    for rank in (1, 2, 4):
        errors = save_adapter(model, optimizer, tmp_path / str(rank), rank)
        assert config_in(tmp_path / str(rank))["r"] == rank
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / str(rank))
        change = loaded.merge_and_unload()[0].weight.detach() - plain[0].weight.detach()
        error = float((change - whole).norm() / whole.norm())
        assert error > 1e-4
        assert errors == {"base_model.model.0": pytest.approx(error, rel=1e-9)}
        assert error == pytest.approx(float(singular_values[rank:].norm() / singular_values.norm()), rel=1e-9)


def test_the_rank_is_twice_that_of_the_branch_and_the_same_after_a_zero_product(tmp_path):
    for zero, rank in ((True, 2), (False, 4)):
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=zero)
        check(mlp(7, 5), config, inputs(7), tmp_path / str(rank))
        assert config_in(tmp_path / str(rank))["r"] == rank


@pytest.mark.parametrize("name", ["linear", "conv1d_gpt2", "embedding", "conv2d", "experts_3_7x5_up_down"])
def test_merged_weights_are_what_merge_and_unload_gives(name):
    build, targets, make, config = CASES[name]
    plain = build().double()
    model = get_peft_model(plain, LoraConfig(r=2, lora_alpha=5, target_modules=targets, **config))
    optimizer = trained_optimizer(model, make())
    merged = deltaopt.merged_weights(optimizer)
    unloaded = dict(model.merge_and_unload().named_parameters())
    assert len(merged) == len(optimizer.triples)
    for label, W in merged.items():
        path = label.removeprefix("base_model.model.").replace(".base_layer", "")
        expected = unloaded[path] if path in unloaded else unloaded[f"{path}.weight"]
        torch.testing.assert_close(W, expected.detach(), rtol=0, atol=1e-13)


def saved_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_other_files_in_the_folder_stay_and_no_part_is_left(tmp_path):
    folder = tmp_path / "deep" / "adapter"
    plain, x = mlp(7, 5), inputs(7)
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["0"]))
    optimizer = trained_optimizer(model, x)
    save_adapter(model, optimizer, folder)
    assert set(saved_files(folder)) == {CONFIG, TENSORS}
    (folder / "README.md").write_text("mine")
    before = saved_files(folder)
    train_model(model, optimizer, x)
    save_adapter(model, optimizer, str(folder))
    after = saved_files(folder)
    assert set(after) == {CONFIG, TENSORS, "README.md"}
    assert after["README.md"] == b"mine"
    assert after[CONFIG] == before[CONFIG]
    assert after[TENSORS] != before[TENSORS]
    assert_loads(plain, folder, model, x)
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


class KilledError(BaseException):
    """An exception that no `except Exception` catches."""


def killed_at(call: int, patch: pytest.MonkeyPatch) -> None:
    """Let the process end instead of the `call`-th change of a folder."""
    left = itertools.count(call, -1)

    def dying(change):
        def changed(*args, **kwargs):
            if next(left) == 0:
                raise KilledError
            return change(*args, **kwargs)

        return changed

    for owner, name in ((os, "replace"), (os, "rename"), (files.Path, "unlink")):
        patch.setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize("same_config", [True, False])
def test_a_process_killed_at_any_moment_leaves_no_mixture(tmp_path, monkeypatch, same_config):
    old = {"config": b"1", "tensors": b"old"}
    new = {"config": b"1" if same_config else b"2", "tensors": b"new"}
    seen = []
    for call in itertools.count():
        folder = tmp_path / str(call)
        folder.mkdir()
        for name, content in old.items():
            (folder / name).write_bytes(content)
        with monkeypatch.context() as patch:
            killed_at(call, patch)
            try:
                with files.replacing_together(folder, last="config") as part:
                    for name, content in new.items():
                        (part / name).write_bytes(content)
            except KilledError:
                finished = False
            else:
                finished = True
        seen.append(saved_files(folder))
        if finished:
            break
    between = [new] if same_config else [{"tensors": b"old"}, {"tensors": b"new"}]
    assert seen == [old, *between, new]


def test_an_error_while_writing_leaves_what_was_there(tmp_path, monkeypatch):
    model = get_peft_model(mlp(7, 5), LoraConfig(r=2, target_modules=["0"]))
    optimizer = trained_optimizer(model, inputs(7))
    save_adapter(model, optimizer, tmp_path / "old")
    before = saved_files(tmp_path / "old")
    train_model(model, optimizer, inputs(7))

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(LoraConfig, "save_pretrained", fail)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="no space left"):
            save_adapter(model, optimizer, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert saved_files(tmp_path / "old") == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    model = get_peft_model(mlp(7, 5), LoraConfig(r=2, target_modules=["0"]))
    optimizer = trained_optimizer(model, inputs(7))
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(NotADirectoryError, match="taken is a file, expected a folder"):
        save_adapter(model, optimizer, tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def assert_refused(tmp_path, model, optimizer, match, error=ValueError, **options) -> None:
    with pytest.raises(error, match=match):
        save_adapter(model, optimizer, tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()


@pytest.fixture
def trained_pair():
    """Build a trained model of two layers, and its optimizer."""
    model = get_peft_model(mlp(7, 5, 4), LoraConfig(r=2, target_modules=["0", "1"]))
    return model, trained_optimizer(model, inputs(7))


def test_a_copy_of_the_model_is_refused(tmp_path, trained_pair):
    model, optimizer = trained_pair
    match = naming("model.0", "model.1") + r"nothing was written.*it is no layer of this PeftModel \(a copy"
    assert_refused(tmp_path, copy.deepcopy(model), optimizer, match)


def test_an_unloaded_adapter_is_refused(tmp_path, trained_pair):
    model, optimizer = trained_pair
    merged = model.merge_and_unload()
    assert_refused(tmp_path, merged, optimizer, "a Sequential without a peft_config has no adapter", TypeError)
    assert_refused(
        tmp_path, model, optimizer, naming("model.0", "model.1") + "it is no layer of this PeftModel.*was unloaded"
    )


def test_a_layer_that_is_no_triple_is_refused(tmp_path):
    model = get_peft_model(mlp(7, 5, 4), LoraConfig(r=2, target_modules=["0", "1"]))
    triples = find_triples(model)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples[:1], lr=2e-2)
    train_model(model, optimizer, inputs(7))
    match = r"base_model\.model\.1: it holds 'default' and is no triple.*register it too.*\"update_ratio\": 0\.0"
    assert_refused(tmp_path, model, optimizer, match)
    # The message says to do this.
    optimizer.add_param_group({"triples": triples[1:], "update_ratio": 0.0})
    train_model(model, optimizer, inputs(7))
    assert list(save_adapter(model, optimizer, tmp_path)) == ["base_model.model.0", "base_model.model.1"]


def test_an_unknown_adapter_is_refused(tmp_path, trained_pair):
    model, optimizer = trained_pair
    assert_refused(tmp_path, model, optimizer, "'mine' .*the optimizer trains default", adapter="mine")
    model.peft_config["other"] = model.peft_config.pop("default")
    assert_refused(tmp_path, model, optimizer, "'default' .*the model holds other")


def test_a_deleted_adapter_is_refused(tmp_path, trained_pair):
    model, optimizer = trained_pair
    model.add_adapter("other", LoraConfig(r=3, target_modules=["0"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert_refused(tmp_path, model, optimizer, "'default' .*the model holds other")


def test_a_merged_model_is_refused(tmp_path, trained_pair):
    model, optimizer = trained_pair
    model.merge_adapter()
    assert_refused(
        tmp_path, model, optimizer, naming("model.0", "model.1") + "the branch is merged into W.*unmerge_adapter"
    )
    model.unmerge_adapter()
    save_adapter(model, optimizer, tmp_path)


def test_a_changed_scaling_is_refused(tmp_path, trained_pair):
    model, optimizer = trained_pair
    model.base_model.model[1].scale_layer(0.5)
    assert_refused(tmp_path, model, optimizer, r"model\.1: its scaling was 4 when it was registered and is 2\.0 now")


def test_saving_within_base_weights_is_refused(tmp_path, trained_pair):
    model, optimizer = trained_pair
    with optimizer.base_weights():
        assert_refused(tmp_path, model, optimizer, r"within base_weights\(\).*leave it first", RuntimeError)


def test_a_rank_of_zero_is_refused(tmp_path, trained_pair):
    assert_refused(tmp_path, *trained_pair, "rank is a positive int or None, got 0", rank=0)


def test_triples_made_by_hand_are_refused(tmp_path):
    model = get_peft_model(mlp(7, 5), LoraConfig(r=2, target_modules=["0"]))
    W, A, B = nn.Linear(5, 4).weight.requires_grad_(False), torch.zeros(4, 2), torch.randn(2, 5)
    by_hand = LoRATriple(W, A.requires_grad_(), B.requires_grad_(), name="by_hand")
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [*find_triples(model), by_hand], lr=2e-2)
    assert_refused(tmp_path, model, optimizer, "the triples by_hand are no layers of PEFT.*optimizer of their own")


def test_another_optimizer_is_refused(tmp_path, trained_pair):
    model, optimizer = trained_pair
    assert_refused(tmp_path, model, optimizer.inner, r"no DeltaLoRAOptimizer in this AdamW", TypeError)


def test_a_displacement_that_is_lost_is_refused(tmp_path, trained_pair):
    model, optimizer = trained_pair
    ledger_of(optimizer, 1).lost = "it is lost"
    assert_refused(tmp_path, model, optimizer, r"nothing was written\):\n  base_model\.model\.1: it is lost$")


@tied_weights_are_meant
@tied_outputs_are_named
def test_a_tied_weight_that_moved_in_two_places_is_refused(tmp_path):
    plain = tiny_llama(tie_word_embeddings=True)
    model, x = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["embed_tokens"])), tokens()
    optimizer = trained_optimizer(model, x, allow_tied=True, ratios=(0.0,))
    save_adapter(model, optimizer, tmp_path)  # it has not moved yet
    assert_loads(plain, tmp_path, model, x)
    optimizer.groups[0].update_ratio = 1.0
    train_model(model, optimizer, x)
    match = r"embed_tokens: its W is .*embed_tokens.* and .*lm_head.*moved in all of these places.*merge_and_unload"
    assert_refused(tmp_path, model, optimizer, match)


def quiet(what) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        what()


def test_pefts_save_warns_once_where_it_was_called(tmp_path, trained_pair):
    model, _ = trained_pair
    with pytest.warns(
        UserWarning, match=rf"(?s){GUARD}.*save_adapter\(model, optimizer, directory\).*resume"
    ) as caught:
        model.save_pretrained(tmp_path)
    assert [warning.filename for warning in caught] == [__file__]
    quiet(lambda: model.save_pretrained(tmp_path))


def test_transformers_save_of_an_adapter_warns(tmp_path):
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    trained_optimizer(model, tokens())
    with pytest.warns(UserWarning, match=GUARD) as caught:
        model.save_pretrained(tmp_path)
    assert [warning.filename for warning in caught] == [__file__]


def test_before_the_first_move_nothing_warns(tmp_path):
    model, x = get_peft_model(mlp(7, 5), LoraConfig(r=2, target_modules=["0"])), inputs(7)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, start_step=2)
    quiet(lambda: model.save_pretrained(tmp_path))
    train_model(model, optimizer, x, steps=2)
    quiet(lambda: model.save_pretrained(tmp_path))
    train_model(model, optimizer, x, steps=1)
    with pytest.warns(UserWarning, match=GUARD):
        model.save_pretrained(tmp_path)


def test_saving_everything_or_nothing_does_not_warn(tmp_path, trained_pair):
    model, optimizer = trained_pair
    quiet(lambda: torch.save(model.state_dict(), tmp_path / "model.pt"))
    quiet(lambda: save_adapter(model, optimizer, tmp_path / "adapter"))
    quiet(lambda: pickle.loads(pickle.dumps(model)))
    quiet(lambda: copy.deepcopy((model, optimizer)))
    with pytest.warns(UserWarning, match=GUARD):  # the warning was not used up
        model.save_pretrained(tmp_path)


def test_a_merged_transformers_model_is_saved_without_a_warning(tmp_path):
    plain, x = tiny_llama(), tokens()
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["q_proj"]))
    trained_optimizer(model, x)
    expected = output(model.eval(), x)
    quiet(lambda: model.merge_and_unload().save_pretrained(tmp_path))
    loaded = type(plain).from_pretrained(tmp_path)
    torch.testing.assert_close(output(loaded.eval(), x), expected, rtol=0, atol=1e-5)


def test_injected_layers_that_transformers_saves_whole_do_not_warn(tmp_path):
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tiny_llama())
    trained_optimizer(model, tokens())
    quiet(lambda: model.save_pretrained(tmp_path))
    assert any("q_proj.base_layer" in key for key in load_file(tmp_path / "model.safetensors"))


def test_a_copy_of_model_and_optimizer_has_a_guard_of_its_own(tmp_path, trained_pair):
    other, other_optimizer = pickle.loads(pickle.dumps(trained_pair))
    for model, optimizer in ((other, other_optimizer), trained_pair):
        with pytest.warns(UserWarning, match=GUARD):
            model.save_pretrained(tmp_path)
        optimizer.rebase()
        quiet(lambda model=model: model.save_pretrained(tmp_path))


def test_a_model_that_was_saved_whole_is_loaded_without_this_package(tmp_path, trained_pair):
    """Load it in a process that cannot import deltaopt: what the moved layers hold of it stays behind."""
    model, _ = trained_pair
    x = inputs(7)
    torch.save((model, x), tmp_path / "model.pt")
    code = """
        import torch
        model, x = torch.load(files[0], weights_only=False)
        import peft
        assert type(model.peft_config["default"]) is peft.LoraConfig
        with model.disable_adapter():
            model(x)  # the hook for the base's output does nothing
        found = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.testing.assert_close(model.merge_and_unload()(x), found[0])
        torch.save(found, files[1])
    """
    run_without_this_package(code, tmp_path / "model.pt", tmp_path / "found.pt")
    found, state = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found, output(model, x))
    assert same(dict(state), dict(model.state_dict()))


def test_each_unpickled_model_warns_once(tmp_path, trained_pair):
    model, _ = trained_pair
    for _ in range(2):
        other = pickle.loads(pickle.dumps(model))
        with pytest.warns(UserWarning, match=GUARD):
            other.save_pretrained(tmp_path)
        quiet(lambda other=other: other.save_pretrained(tmp_path))
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=GUARD):
        twin.save_pretrained(tmp_path)


def test_rebase_silences_the_warning_until_the_next_move(tmp_path, trained_pair):
    model, optimizer = trained_pair
    with pytest.warns(UserWarning, match=GUARD):
        model.save_pretrained(tmp_path)
    optimizer.rebase()
    quiet(lambda: model.save_pretrained(tmp_path))
    train_model(model, optimizer, inputs(7), steps=1)
    with pytest.warns(UserWarning, match=GUARD):
        model.save_pretrained(tmp_path)


def test_a_resume_brings_the_warning_and_a_state_from_before_the_first_move_takes_it(tmp_path):
    def build():
        torch.manual_seed(0)
        model = get_peft_model(mlp(7, 5), LoraConfig(r=2, target_modules=["0"]))
        return model, DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2)

    model, optimizer = build()
    first = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train_model(model, optimizer, inputs(7))
    other, resumed = build()
    quiet(lambda: other.save_pretrained(tmp_path))
    other.load_state_dict(model.state_dict())
    for _ in range(2):  # as accelerate does in prepare()
        resumed.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match=GUARD):
        other.save_pretrained(tmp_path)
    resumed.load_state_dict(optimizer.state_dict())
    quiet(lambda: other.save_pretrained(tmp_path))  # it has been said
    other.load_state_dict(first[0])
    resumed.load_state_dict(first[1])
    train_model(model, optimizer, inputs(7))
    hooks = [len(module._state_dict_pre_hooks) for module in other.modules()]
    assert sum(hooks) == 0


def test_a_second_search_of_the_model_does_not_double_the_warning(tmp_path, trained_pair):
    model, _ = trained_pair
    for _ in range(2):
        with pytest.warns(UserWarning, match=MOVED_BEFORE):
            second = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2)
        train_model(model, second, inputs(7), steps=1)
    with pytest.warns(UserWarning, match=GUARD) as caught:
        model.save_pretrained(tmp_path)
    assert len(caught) == 1
    quiet(lambda: model.save_pretrained(tmp_path))


def test_only_the_layers_that_moved_have_a_hook(tmp_path):
    model = get_peft_model(mlp(7, 5, 4), LoraConfig(r=2, target_modules=["0", "1"]))
    first, second = find_triples(model)
    groups = [{"triples": [first]}, {"triples": [second], "update_ratio": 0.0}]
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, groups, other_parameters(model, [first, second]), lr=2e-2)
    train_model(model, optimizer, inputs(7))
    hooked = [name for name, module in model.named_modules() if module._state_dict_pre_hooks]
    assert hooked == ["base_model.model.0"]
    with pytest.warns(UserWarning, match=GUARD):
        model.save_pretrained(tmp_path)
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does in prepare()
    quiet(lambda: model.save_pretrained(tmp_path))


MOVED_BEFORE = r"the weights of 2 layers \(base_model.model.0, base_model.model.1\) were moved by an earlier optimizer"
OTHER_BASE = "the base of 2 layers .* is what their weights were at rebase"


def test_an_optimizer_on_weights_that_another_has_moved_does_not_take_them_for_pristine(tmp_path, trained_pair):
    """A notebook cell that is run twice does this. The state of the first optimizer says what the base is."""
    model, first = trained_pair
    with pytest.warns(UserWarning, match=MOVED_BEFORE) as caught:
        second = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2)
    assert [warning.filename for warning in caught] == [__file__]
    second.load_state_dict(first.state_dict())
    save_adapter(model, second, tmp_path / "resumed")
    with pytest.warns(UserWarning, match=MOVED_BEFORE):
        third = trained_optimizer(model, inputs(7))
    with pytest.warns(UserWarning, match=OTHER_BASE):
        save_adapter(model, third, tmp_path / "third")


@pytest.mark.parametrize("way", ["rebase", "without_ledger"])
def test_an_adapter_for_another_base_than_the_pristine_one_is_saved_with_a_warning(tmp_path, trained_pair, way):
    model, optimizer = trained_pair
    x = inputs(7)
    if way == "rebase":
        optimizer.rebase()
    else:
        optimizer.load_state_dict(deltaopt.without_ledger(optimizer.state_dict()))
    base = copy.deepcopy(model).unload()  # the weights as they are now, which are the base from now on
    train_model(model, optimizer, x)
    with pytest.warns(UserWarning, match=OTHER_BASE):
        save_adapter(model, optimizer, tmp_path / "adapter")
    served = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(served(x), model(x), atol=1e-5)
    with pytest.warns(UserWarning, match=MOVED_BEFORE):
        again = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2)
    again.load_state_dict(optimizer.state_dict())  # the state knows it too
    with pytest.warns(UserWarning, match=OTHER_BASE):
        save_adapter(model, again, tmp_path / "again")


def test_a_pissa_of_rank_1_is_refused(tmp_path):
    model = get_peft_model(mlp(7, 5, 4), LoraConfig(r=1, target_modules=["0"], init_lora_weights="pissa"))
    optimizer = trained_optimizer(model, inputs(7))
    assert_refused(tmp_path, model, optimizer, r"with rank 1 it cannot be known")


@tied_outputs_are_named
def test_hooks_are_refused_for_a_weight_with_other_users():
    model = mlp(6, 6, 6)
    model[1].weight = model[0].weight
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    optimizer = trained_optimizer(model, inputs(6), allow_tied=True)
    with pytest.raises(RuntimeError, match=r"model\.0: its W is used in another place too"):
        optimizer.base_weights(method="hooks").__enter__()
    with optimizer.base_weights():
        pass
