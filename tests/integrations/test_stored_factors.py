"""Routes by which a folded model leaves its process without the optimizer's state: what arrives computes the same."""

import copy

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple, find_triples
from tests.support.compare import through_a_file
from tests.support.elsewhere import run_without_this_package
from tests.support.models import RATIO

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")

import peft

from tests.support.peft_folded import (
    ALPHA,
    SOME,
    Trained,
    adapted,
    alphas,
    assert_near,
    assert_trained_alike,
    folded,
    optimizer_of,
    state_of,
)
from tests.support.peft_layers import CASES, assert_loads, image, mlp, output, train_model
from tests.support.peft_runs import peft_asks_by_an_old_name

pytestmark = [peft_asks_by_an_old_name, pytest.mark.extra]


def by_state_dict(model: nn.Module, fresh: nn.Module, folder) -> None:
    fresh.load_state_dict(model.state_dict(), strict=True)


def by_assignment(model: nn.Module, fresh: nn.Module, folder) -> None:
    fresh.load_state_dict(through_a_file(model.state_dict()), assign=True)


def by_pefts_state(model: nn.Module, fresh: nn.Module, folder) -> None:
    torch.save(peft.get_peft_model_state_dict(model), folder / "adapter.pt")
    peft.set_peft_model_state_dict(fresh, torch.load(folder / "adapter.pt", weights_only=True))


def by_pefts_files(model: nn.Module, fresh: nn.Module, folder) -> None:
    model.save_pretrained(folder)
    fresh.load_adapter(folder, "default")


def by_loralib(model: nn.Module, fresh: nn.Module, folder) -> None:
    loralib = pytest.importorskip("loralib", reason="runs where loralib is installed")
    fresh.load_state_dict(loralib.lora_state_dict(model), strict=False)


def by_accelerate(model: nn.Module, fresh: nn.Module, folder) -> None:
    accelerate = pytest.importorskip("accelerate", reason="runs where accelerate is installed")
    accelerate.Accelerator(cpu=True).save_model(model, folder)
    accelerate.load_checkpoint_in_model(fresh, folder)


def by_distributed_checkpoint(model: nn.Module, fresh: nn.Module, folder) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    dcp.load({"model": fresh.state_dict()}, checkpoint_id=folder, no_dist=True)


WHOLE = [by_state_dict, by_assignment, by_accelerate, by_distributed_checkpoint]
ROUTES = [*WHOLE, by_pefts_state, by_pefts_files, by_loralib]
quiet = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)", "ignore:.*no_dist")


@quiet
@pytest.mark.parametrize("route", ROUTES)
def test_a_fresh_model_computes_the_same(route, tmp_path):
    plain, x = mlp(7, 5, 6, 4).double(), image(7)
    config = {"alpha_pattern": {"1": 3}, "rank_pattern": {"2": 3}}
    model = adapted(plain, "0", "1", "2", **config)
    folded(model, x)
    fresh = adapted(plain, "0", "1", "2", **config)
    before = alphas(fresh)
    route(model, fresh, tmp_path)
    assert_near(output(fresh, x), output(model, x), 1e-12)
    assert (output(plain, x) - output(fresh, x)).abs().max() > 1e-2
    assert alphas(fresh) == before


@quiet
@pytest.mark.parametrize("route", WHOLE)
def test_a_fresh_model_of_a_w_that_was_written_computes_the_same(route, tmp_path):
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1", zero=False)
    folded(model, x, 4, update_ratio=lambda step: 0.5 + 0.3 * step)
    fresh = adapted(plain, "0", "1")
    route(model, fresh, tmp_path)
    assert_near(output(fresh, x), output(model, x), 1e-12)


@pytest.mark.parametrize("name", SOME)
def test_every_kind_of_layer(name, tmp_path):
    build, targets, inputs, config = CASES[name]
    plain, x = build().double(), inputs()
    model = adapted(plain, *targets, **config)
    optimizer = folded(model, x)
    fresh = adapted(plain, *targets, **config)
    fresh.load_state_dict(through_a_file(model.state_dict()))
    assert_near(output(fresh, x), output(model, x), 1e-12)
    resumed = optimizer_of(fresh)
    resumed.load_state_dict(state_of(optimizer))
    for run in (Trained(model, optimizer), Trained(fresh, resumed)):
        train_model(*run, x)
    assert_trained_alike(model, fresh, x)


def test_a_whole_model_resumes_in_a_fresh_one_bit_for_bit():
    """With a ratio whose product with A rounds, in the dtype of A."""
    plain, x = mlp(7, 5, 4), image(7).float()
    model = adapted(plain, "0", "1").float()
    optimizer = folded(model, x, update_ratio=0.7)
    fresh = adapted(plain, "0", "1").float()
    fresh.load_state_dict(through_a_file(model.state_dict()))
    resumed = optimizer_of(fresh)
    resumed.load_state_dict(state_of(optimizer))
    for run in (Trained(model, optimizer), Trained(fresh, resumed)):
        train_model(*run, x)
    assert_trained_alike(model, fresh, x)


def test_two_adapters_of_one_layer():
    plain, x = mlp(7, 5).double(), image(7)

    def with_two() -> nn.Module:
        model = adapted(plain, "0")
        model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=2, target_modules=["0"]))
        model.double().base_model.set_adapter(["default", "other"])
        return model

    model, fresh = with_two(), with_two()
    groups = [{"triples": find_triples(model, name)} for name in ("default", "other")]
    groups[0]["update_ratio"] = 0.5
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, groups, lr=2e-2, update_ratio=RATIO, weight_update="folded")
    train_model(model, optimizer, x)
    for name in ("default", "other"):
        peft.set_peft_model_state_dict(
            fresh, through_a_file(peft.get_peft_model_state_dict(model, adapter_name=name)), adapter_name=name
        )
    assert_near(output(fresh, x), output(model, x), 1e-12)


def test_an_adapter_that_is_made_again_is_stored_as_it_is():
    """Its factor went with the layer of the old one."""
    model, x = adapted(mlp(7, 5), "0"), image(7)
    folded(model, x)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    model.add_adapter("default", peft.LoraConfig(r=2, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=False))
    A = "base_model.model.0.lora_B.default.weight"
    assert torch.equal(model.state_dict()[A], dict(model.named_parameters())[A])


def test_an_earlier_adapter_returns_into_the_running_model(tmp_path):
    """As Trainer's load_best_model_at_end does it."""
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1")
    optimizer = folded(model, x, 2)
    model.save_pretrained(tmp_path)
    expected = output(model, x).detach()
    train_model(model, optimizer, x)
    model.load_adapter(tmp_path, "default")
    assert_near(output(model, x), expected, 1e-12)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-12)


class Regression(nn.Module):
    """What a Lightning module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = adapted(mlp(7, 5, 4), "0", "1")

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


@pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
    "ignore:.*does not have many workers.*",
    "ignore:.*is lower than the logging interval.*",
)
def test_lightnings_load_from_checkpoint(tmp_path):
    lightning = pytest.importorskip("lightning", reason="runs where lightning is installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = Regression()

        def training_step(self, x, _):
            return (self.model(x) - 1).square().mean()

        def configure_optimizers(self):
            return optimizer_of(self.model)

    module, x = Module(), image(7)
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(x, batch_size=len(x)))
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "all.ckpt", weights_only=True)
    with torch.no_grad():
        assert_near(loaded.model(x), module.model(x), 1e-12)
        assert (loaded.model(x) - Module().model(x)).abs().max() > 1e-2


def test_loralib_layers_by_hand():
    loralib = pytest.importorskip("loralib", reason="runs where loralib is installed")

    def layer() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(loralib.Linear(7, 5, r=2, lora_alpha=3)).double()

    model, x = layer(), image(7)
    start = copy.deepcopy(model)
    triple = LoRATriple(*((model[0], n) for n in ("weight", "lora_B", "lora_A")), scaling=(model[0], "scaling"))
    model[0].weight.requires_grad_(False)
    train_model(model, DeltaLoRAOptimizer(torch.optim.AdamW, [triple], lr=2e-2, weight_update="folded"), x)
    start.load_state_dict(loralib.lora_state_dict(model), strict=False)
    assert_near(start(x), model(x), 1e-12)
    assert model[0].scaling == 3 * start[0].scaling


def test_a_unet_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="runs where diffusers is installed")
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    def unet() -> nn.Module:
        torch.manual_seed(0)
        blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8,),
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=4,
            **blocks,
        )

    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 2, 8))
    model = unet().requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=ALPHA, target_modules=["to_q", "to_k"]))
    optimizer = optimizer_of(model, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(*inputs).sample - 1).square().mean().backward()
        optimizer.step()
    metadata = model.peft_config["default"].to_dict()
    layers = peft.get_peft_model_state_dict(model)
    Loader.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    state, network_alphas, metadata = Loader.lora_state_dict(tmp_path, return_lora_metadata=True)
    fresh = unet()
    with torch.no_grad():
        before, expected = fresh(*inputs).sample, model(*inputs).sample
        Loader.load_lora_into_unet(state, network_alphas=network_alphas, unet=fresh, metadata=metadata)
        assert_near(fresh(*inputs).sample, expected, 1e-5)
    assert (before - expected).abs().max() > 1e-3


def test_an_average_of_a_peft_model_that_was_made_before_training():
    """W is not written, so the mean of the effective weights is that of A and B alone."""
    plain, x = mlp(7, 5, 4), image(7)
    model, reference, fresh = (adapted(plain, "0", "1") for _ in range(3))
    optimizer = optimizer_of(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    snapshots = []
    for _ in range(3):
        train_model(model, optimizer, x, 1)
        average.update_parameters(model)
        snapshots.append({name: p.detach().clone() for name, p in model.named_parameters()})
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(torch.stack([s[name] for s in snapshots]).mean(0))
            if "lora_B" in name:
                p.mul_(1 + 1.5)
        assert_near(average(x), reference.base_model.model(x), 1e-12)
    fresh.load_state_dict(average.module.state_dict())
    assert_near(output(fresh, x), average(x), 1e-12)
    assert alphas(average.module) == alphas(model)


WITHOUT_THIS_PACKAGE = """
import torch
model, x = torch.load(files[0], weights_only=False)
state = model.state_dict()
assert torch.equal(state["base_model.model.0.lora_B.default.weight"], dict(model.named_parameters())[
    "base_model.model.0.lora_B.default.weight"])
model.load_state_dict(state)
torch.save(model(x).detach(), files[1])
"""


def test_a_whole_model_is_loaded_where_this_package_is_missing(tmp_path):
    """Its state_dict gives the parameters there, and takes them."""
    model, x = adapted(mlp(7, 5), "0"), image(7)
    folded(model, x)
    torch.save((model, x), tmp_path / "model.pt")
    run_without_this_package(WITHOUT_THIS_PACKAGE, tmp_path / "model.pt", tmp_path / "found.pt")
    assert_near(torch.load(tmp_path / "found.pt"), output(model, x), 1e-12)


@pytest.mark.parametrize("rule", ["folded", "in_place"])
def test_a_reference_that_was_copied_from_a_folded_adapter_computes_the_same(rule, tmp_path):
    """As TRL's trainers make one for a second stage, with the config and the parameters of the first."""
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1")
    folded(model, x)
    expected = output(model, x).detach()
    model.add_adapter("ref", model.peft_config["default"])
    model.double()
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].data.copy_(p.data)
    with pytest.warns(UserWarning, match="an earlier optimizer has folded"):
        optimizer = optimizer_of(model, weight_update=rule)
    train_model(model, optimizer, x)
    model.set_adapter("ref")
    assert_near(output(model, x), expected, 1e-12)
    fresh = adapted(plain, "0", "1")
    state = peft.get_peft_model_state_dict(model, adapter_name="ref")
    peft.set_peft_model_state_dict(fresh, through_a_file(state))
    assert_near(output(fresh, x), expected, 1e-12)
