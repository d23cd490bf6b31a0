"""An adapter that leaves without the movement of W is loud where it is written, and in plain PEFT where it is read."""

import copy
import dataclasses
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple, find_triples
from deltaopt.integrations.peft import save_adapter
from tests.integrations.test_trainer import trainer_for
from tests.support.compare import relative
from tests.support.models import batches, causal_lm, optimizer_for, plain_loop
from tests.support.peft_layers import READ, config_in, mlp, tiny_llama, tokens, train_model
from tests.support.peft_runs import STARTS, peft_asks_by_an_old_name

# isort: split
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]

ALONE = "the adapter alone, but Delta-LoRA has moved the weights under it"
KEY = "needs_base_weights_moved_by_deltaopt_see_docs_export"


def quiet(what) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        what()


def loud(what, name: str) -> None:
    """It warns once, where it was called, and not again."""
    with pytest.warns(UserWarning, match=f"^{name} .*{ALONE}") as caught:
        what()
    assert [warning.filename for warning in caught] == [__file__]
    quiet(what)


def moved_llm(rule: str = "in_place", start: str = "zero") -> tuple[nn.Module, DeltaLoRAOptimizer]:
    options = {**STARTS[start], "weight_update": rule}
    model = causal_lm(torch.float32, options.pop("B_zero"))
    optimizer = optimizer_for(model, **options)
    plain_loop(model, optimizer, batches(5))
    return model, optimizer


@pytest.fixture
def moved():
    """A small PeftModel whose W has moved, and its optimizer."""
    model = get_peft_model(mlp(7, 5, 4), LoraConfig(r=2, target_modules=["0", "1"]))
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2)
    train_model(model, optimizer, torch.randn(4, 7))
    return model, optimizer


# where it is written


def test_the_tensors_of_the_adapter_alone_are_loud(moved):
    loud(lambda: get_peft_model_state_dict(moved[0]), "get_peft_model_state_dict")


def test_another_adapter_is_quiet_and_keeps_the_warning_for_the_one_that_moved(moved, tmp_path):
    model = moved[0]
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "1"]))
    quiet(lambda: model.save_pretrained(tmp_path, selected_adapters=["other"]))
    quiet(lambda: get_peft_model_state_dict(model, adapter_name="other"))
    loud(lambda: model.save_pretrained(tmp_path), "save_pretrained")


def test_a_model_with_transformers_own_adapter_is_loud():
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    train_model(model, DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2), tokens())
    loud(model.get_adapter_state_dict, "get_adapter_state_dict")


def test_accelerates_documented_way_to_save_is_loud(accelerator_of, tmp_path):
    """It collects the tensors first, so that no layer is asked for them while the adapter is saved."""
    model, optimizer = moved_llm()
    accelerator = accelerator_of()
    prepared, _ = accelerator.prepare(model, optimizer)
    state = accelerator.get_state_dict(prepared)
    loud(
        lambda: accelerator.unwrap_model(prepared).save_pretrained(
            tmp_path, state_dict=state, is_main_process=accelerator.is_main_process
        ),
        "save_pretrained",
    )
    assert KEY in config_in(tmp_path)


def test_the_folded_rule_is_loud_where_it_has_written_w(tmp_path):
    model, _ = moved_llm("folded", "later")
    loud(lambda: model.save_pretrained(tmp_path), "save_pretrained")
    assert KEY in config_in(tmp_path)


def test_the_folded_rule_is_quiet_where_it_has_not(tmp_path):
    model, _ = moved_llm("folded", "zero")
    quiet(lambda: model.save_pretrained(tmp_path))
    quiet(lambda: get_peft_model_state_dict(model))
    assert KEY not in config_in(tmp_path)


def test_everything_together_is_quiet(moved, accelerator_of, tmp_path):
    model, optimizer = moved
    quiet(model.state_dict)
    quiet(lambda: accelerator_of().save_model(model, str(tmp_path / "model")))
    quiet(lambda: save_adapter(model, optimizer, tmp_path / "adapter"))
    assert KEY not in config_in(tmp_path / "adapter")
    loud(lambda: get_peft_model_state_dict(model), "get_peft_model_state_dict")  # it was not used up


def test_merging_in_the_training_process_is_right_and_quiet(moved):
    """merge_and_unload takes the moved W and the branch."""
    model, _ = moved
    x = torch.randn(4, 7)
    expected = model(x).detach()
    merged = []
    quiet(lambda: merged.append(model.merge_and_unload()))
    torch.testing.assert_close(merged[0](x), expected, rtol=0, atol=1e-6)
    quiet(merged[0].state_dict)


# diffusers


@pytest.fixture(scope="module")
def pristine_unet():
    diffusers = pytest.importorskip("diffusers", reason="runs where diffusers is installed")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


LORA_FILE = "pytorch_lora_weights.safetensors"
IMAGE = {"sample": torch.ones(1, 2, 8, 8) / 3, "timestep": 1, "encoder_hidden_states": torch.ones(1, 3, 8) / 2}


def trained_unet(pristine: nn.Module, **config) -> tuple[nn.Module, DeltaLoRAOptimizer]:
    unet = copy.deepcopy(pristine)
    torch.manual_seed(1)
    unet.add_adapter(LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "to_v", "proj_in"], **config}))
    optimizer = DeltaLoRAOptimizer.for_model(unet, torch.optim.AdamW, lr=5e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (unet(**IMAGE).sample - 1).square().mean().backward()
        optimizer.step()
    return unet, optimizer


def test_diffusers_own_save_is_loud_and_its_file_loads_to_resume_from(pristine_unet, tmp_path):
    unet, optimizer = trained_unet(pristine_unet)
    loud(lambda: unet.save_lora_adapter(tmp_path), "save_lora_adapter")
    resumed = copy.deepcopy(pristine_unet)
    resumed.load_lora_adapter(tmp_path, weight_name=LORA_FILE, prefix=None, adapter_name="default")
    for name, parameter in resumed.named_parameters():
        parameter.requires_grad_("lora_" in name)
    DeltaLoRAOptimizer.for_model(resumed, torch.optim.AdamW, lr=5e-2).load_state_dict(optimizer.state_dict())
    assert relative(resumed(**IMAGE).sample, unet(**IMAGE).sample) < 1e-5
    optimizer.rebase()
    quiet(lambda: unet.save_lora_adapter(tmp_path))


@pytest.mark.filterwarnings("ignore:.*to_dict:FutureWarning")
def test_diffusers_scripts_take_tensors_and_config_loudly(pristine_unet):
    """Its training scripts hand these two to save_lora_weights."""
    from diffusers.training_utils import _collate_lora_metadata

    unet, _ = trained_unet(pristine_unet)
    loud(lambda: get_peft_model_state_dict(unet), "get_peft_model_state_dict")
    assert KEY not in _collate_lora_metadata({"unet": unet})["unet_lora_adapter_metadata"]  # its load would refuse it
    assert KEY not in unet.peft_config["default"].to_dict()  # nothing is written


@pytest.mark.parametrize("config", [{}, {"rank_pattern": {"to_v": 3}}], ids=["one_rank", "two_ranks"])
def test_diffusers_loads_what_save_adapter_writes(pristine_unet, config, tmp_path):
    """In a pipeline, by the model itself, and PEFT loads the other file of the folder."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Pipeline

    unet, optimizer = trained_unet(pristine_unet, **config)
    save_adapter(unet, optimizer, tmp_path)
    with torch.no_grad():
        expected, base = unet(**IMAGE).sample, pristine_unet(**IMAGE).sample
    assert (base - expected).abs().max() > 1e-2

    def in_pipeline(fresh: nn.Module) -> nn.Module:
        """These two are what pipeline.load_lora_weights(directory) calls for its UNet."""
        state, alphas, metadata = Pipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
        Pipeline.load_lora_into_unet(state, alphas, fresh, metadata=metadata)
        return fresh

    def by_itself(fresh: nn.Module) -> nn.Module:
        fresh.load_lora_adapter(tmp_path, weight_name=LORA_FILE, prefix="unet")
        return fresh

    for load in (in_pipeline, by_itself, lambda fresh: PeftModel.from_pretrained(fresh, tmp_path)):
        loaded = load(copy.deepcopy(pristine_unet))
        with torch.no_grad():
            torch.testing.assert_close(loaded(**IMAGE).sample, expected, rtol=0, atol=1e-5)


# loralib


class TwoLayers(nn.Module):
    """Two layers of loralib."""

    def __init__(self) -> None:
        super().__init__()
        lora = pytest.importorskip("loralib", reason="runs where loralib is installed")
        self.first, self.second = lora.Linear(6, 5, r=2, lora_alpha=3), lora.Linear(5, 4, r=2, lora_alpha=3)
        lora.mark_only_lora_as_trainable(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("registered", ["layers", "model"])
def test_loralibs_state_is_loud_for_triples_of_modules(registered):
    loralib = pytest.importorskip("loralib", reason="runs where loralib is installed")
    model = TwoLayers()
    layers = {"first": model.first, "second": model.second}
    places = {name: (layer, "") if registered == "layers" else (model, f"{name}.") for name, layer in layers.items()}
    triples = [
        LoRATriple(
            *((owner, prefix + name) for name in ("weight", "lora_B", "lora_A")),
            scaling=layers[label].scaling,
            name=label,
        )
        for label, (owner, prefix) in places.items()
    ]
    groups = [{"triples": triples[:1]}, {"triples": triples[1:], "update_ratio": 0.0}]
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, groups, lr=2e-2)
    quiet(lambda: loralib.lora_state_dict(model))
    train_model(model, optimizer, torch.randn(4, 6))
    quiet(model.state_dict)
    twin = copy.deepcopy(model)
    loud(lambda: loralib.lora_state_dict(model), "lora_state_dict")
    loud(lambda: loralib.lora_state_dict(twin), "lora_state_dict")
    optimizer.load_state_dict(optimizer.state_dict())  # one layer has moved, the other one has not
    quiet(lambda: loralib.lora_state_dict(model))  # it has been said
    optimizer.rebase()
    train_model(model, optimizer, torch.randn(4, 6))
    loud(lambda: loralib.lora_state_dict(model), "lora_state_dict")
    optimizer.rebase()
    quiet(lambda: loralib.lora_state_dict(model))


# where it is read


@pytest.mark.parametrize("library", ["peft", "transformers"])
def test_plain_peft_warns_of_the_folder_and_has_a_plain_config(library, tmp_path):
    plain, config = tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = copy.deepcopy(plain)
    if library == "peft":
        model = get_peft_model(model, config)
    else:
        model.add_adapter(config)
    train_model(model, DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2), tokens())
    loud(lambda: model.save_pretrained(tmp_path), "save_pretrained")
    with pytest.warns(UserWarning, match=READ):
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    with pytest.warns(UserWarning, match=READ):
        plain.load_adapter(tmp_path)
    for served in (loaded, plain):
        assert type(served.peft_config["default"]) is LoraConfig


def test_the_value_of_the_key_says_what_to_do(moved, tmp_path):
    loud(lambda: moved[0].save_pretrained(tmp_path), "save_pretrained")
    written = config_in(tmp_path)
    assert "save_adapter" in written.pop(KEY)
    plain = LoraConfig(r=2, target_modules=["0", "1"])
    plain.inference_mode = True
    plain.save_pretrained(tmp_path / "plain")
    expected = {**config_in(tmp_path / "plain"), "auto_mapping": written["auto_mapping"]}
    assert {**written, "target_modules": sorted(written["target_modules"])} == {
        **expected,
        "target_modules": sorted(expected["target_modules"]),
    }


def test_the_config_stays_a_plain_one_to_everybody_else(moved):
    model, _ = moved
    config = model.peft_config["default"]
    plain = LoraConfig(r=2, target_modules=["0", "1"])
    assert isinstance(config, LoraConfig)
    assert type(config).__name__ == "LoraConfig"
    assert config == dataclasses.replace(plain, base_model_name_or_path=config.base_model_name_or_path)
    assert plain != dataclasses.replace(config, r=3)
    assert repr(config).startswith("LoraConfig(")
    assert LoraConfig(**config.to_dict()) == config
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert isinstance(other, LoraConfig)


def test_the_users_own_config_serves_other_models(moved, tmp_path):
    config = LoraConfig(r=2, target_modules=["0"])
    models = [get_peft_model(mlp(7, 5), config) for _ in range(2)]
    train_model(models[0], DeltaLoRAOptimizer.for_model(models[0], torch.optim.AdamW, lr=2e-2), torch.randn(4, 7))
    assert type(config) is LoraConfig
    for index, model in enumerate(models):
        with pytest.warns(UserWarning, match=ALONE) if index == 0 else warnings.catch_warnings():
            model.save_pretrained(tmp_path / str(index))
    assert [KEY in config_in(tmp_path / str(index)) for index in range(2)] == [True, False]
    alone = get_peft_model(mlp(7, 5), copy.deepcopy(models[0].peft_config["default"]))
    quiet(lambda: alone.save_pretrained(tmp_path / "alone"))
    assert KEY not in config_in(tmp_path / "alone")


@pytest.mark.parametrize("rest", ["rebase", "load"])
def test_the_key_goes_away_where_w_is_the_base_again(rest, tmp_path):
    model = get_peft_model(mlp(7, 5, 4), LoraConfig(r=2, target_modules=["0", "1"]))
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2)
    first = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for _ in range(2):
        train_model(model, optimizer, torch.randn(4, 7))
        loud(lambda: model.save_pretrained(tmp_path), "save_pretrained")
        assert KEY in config_in(tmp_path)
        if rest == "rebase":
            optimizer.rebase()
        else:
            model.load_state_dict(first[0])
            optimizer.load_state_dict(first[1])
        quiet(lambda: model.save_pretrained(tmp_path))
        assert KEY not in config_in(tmp_path)


def copies_of(model: nn.Module) -> dict[str, nn.Module]:
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "averaged": torch.optim.swa_utils.AveragedModel(model).module,
    }


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "averaged"])
def test_a_copy_of_a_model_that_has_moved_is_loud_by_itself(moved, kind, tmp_path):
    """Also where the original has said it, and where the original is the base again."""
    model, optimizer = moved
    loud(lambda: model.save_pretrained(tmp_path), "save_pretrained")
    twin = copies_of(model)[kind]
    optimizer.rebase()
    state = twin.state_dict()
    loud(lambda: twin.save_pretrained(tmp_path, state_dict=state), "save_pretrained")
    assert KEY in config_in(tmp_path)
    quiet(lambda: model.save_pretrained(tmp_path))
    assert KEY not in config_in(tmp_path)


def test_the_folder_of_an_adapter_that_did_not_move_has_no_key(tmp_path):
    """Two adapters in one model: each has a config of its own."""
    model = get_peft_model(mlp(7, 5, 4), LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["1"]))
    train_model(model, DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2), torch.randn(4, 7))
    loud(lambda: model.save_pretrained(tmp_path), "save_pretrained")
    assert [KEY in config_in(folder) for folder in (tmp_path, tmp_path / "other")] == [True, False]


def test_two_adapters_that_moved_w_are_one_warning_and_two_keys(tmp_path):
    model = get_peft_model(mlp(7, 5, 4), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["1"], init_lora_weights=False))
    model.base_model.set_adapter(["first", "second"])
    triples = [*find_triples(model, "first"), *find_triples(model, "second")]
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, weight_update="folded", lr=2e-2)
    train_model(model, optimizer, torch.randn(4, 7))
    loud(lambda: model.save_pretrained(tmp_path), "save_pretrained")
    assert all(KEY in config_in(tmp_path / name) for name in ("first", "second"))


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pissa_converted_by_peft_has_the_key(tmp_path):
    """PEFT saves a copy of the config then, and reads it again."""
    model = get_peft_model(mlp(7, 5), LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "start")
    train_model(model, DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2), torch.randn(4, 7))
    with pytest.warns(UserWarning, match=ALONE), pytest.warns(UserWarning, match=READ):
        model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert KEY in config_in(tmp_path / "end")


def test_injected_layers_are_loud_without_a_config_of_their_own():
    """The model that was injected into holds the config, and a part of it does not."""
    model = nn.Sequential(inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), mlp(7, 5)))
    train_model(model, DeltaLoRAOptimizer.for_model(model[0][0], torch.optim.AdamW, lr=2e-2), torch.randn(4, 7))
    loud(lambda: get_peft_model_state_dict(model[0]), "get_peft_model_state_dict")


# transformers' Trainer


@pytest.mark.parametrize("rule", ["in_place", "folded"])
def test_trainers_checkpoint_is_written_quietly_and_says_so_when_it_is_served(rule, accelerator_of, tmp_path):
    """It has optimizer.pt next to it, so that Trainer resumes from it, without a word."""
    options = {**STARTS["later"], "weight_update": rule}
    model = causal_lm(torch.float32, options.pop("B_zero"))
    arguments = {"max_steps": 5, "save_steps": 5}
    trainer_for(model, tmp_path, "optimizers", arguments, **options)[0].train()
    folder = tmp_path / "checkpoint-5"
    assert KEY in config_in(folder)
    with pytest.warns(UserWarning, match=READ):
        PeftModel.from_pretrained(causal_lm(torch.float32).unload(), folder)
    accelerator_of()
    again = causal_lm(torch.float32)
    trainer, _ = trainer_for(again, tmp_path / "resumed", "optimizers", {"max_steps": 6}, weight_update=rule)
    quiet(lambda: trainer.train(resume_from_checkpoint=str(folder)))
    assert KEY in config_in(tmp_path / "resumed" / "checkpoint-6")


def test_a_checkpoint_without_its_optimizer_is_loud(accelerator_of, tmp_path):
    model = causal_lm(torch.float32)
    arguments = {"max_steps": 3, "save_steps": 1, "save_only_model": True}
    trainer, _ = trainer_for(model, tmp_path, "optimizers", arguments)
    with pytest.warns(UserWarning, match=ALONE) as caught:
        trainer.train()
    said = [warning for warning in caught if "Delta-LoRA" in str(warning.message)]
    assert [warning.filename for warning in said] == [__file__]  # the line that called train()
    assert all(KEY in config_in(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3))


# the rank


@pytest.mark.parametrize(
    ("start_step", "rank", "wide", "server"),
    [(0, None, 6, 8), (2, None, 12, 16), (2, 6, 6, 8), (2, 8, 8, 8)],
)
def test_save_adapter_says_the_rank_that_it_wrote(start_step, rank, wide, server, tmp_path):
    model = get_peft_model(mlp(40, 30, 20), LoraConfig(r=6, target_modules=["0", "1"]))
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, start_step=start_step)
    train_model(model, optimizer, torch.randn(4, 40), steps=4)
    saved = save_adapter(model, optimizer, tmp_path, rank)
    assert saved.ranks == {triple.name: wide for triple in optimizer.triples}
    assert saved.rank == wide == json.loads((tmp_path / "adapter_config.json").read_text("utf8"))["r"]
    assert f"rank {wide}" in str(saved)
    assert f"--max-lora-rank {server}" in str(saved)
    assert ("trained with rank 6" in str(saved)) == (wide != 6)
    assert dict(saved) == {name: saved[name] for name in saved.ranks}


def test_save_adapter_says_that_ranks_differ(tmp_path):
    model = get_peft_model(mlp(40, 30, 20), LoraConfig(r=2, target_modules=["0", "1"], rank_pattern={"1": 5}))
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2)
    train_model(model, optimizer, torch.randn(4, 40))
    saved = save_adapter(model, optimizer, tmp_path)
    assert saved.rank == 5
    assert "ranks from 2 to 5" in str(saved)
