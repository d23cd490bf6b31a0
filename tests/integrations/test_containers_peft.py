"""Models with PEFT's layers and no PeftModel (`add_adapter`), and with several adapters: followed, saved, exported."""

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, find_triples
from tests.support import containers
from tests.support.compare import relative
from tests.support.containers import RATIO, STEPS, Case, dense_step, each_rule, train
from tests.support.models import peft as peft  # skips where PEFT and transformers are not installed

# isort: split
from peft import LoraConfig

from tests.support.peft_layers import lora_layers, mlp, tiny_llama

pytestmark = pytest.mark.extra

ids = torch.arange(12).view(2, 6)
rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def deltas_of(adapter):
    def deltas(model):
        # PEFT's own scaling * B @ A, in the shape of W.
        layers = lora_layers(model).items()
        return {name: (layer.get_base_layer().weight, layer.get_delta_weight(adapter)) for name, layer in layers}

    return deltas


def transformers_model():
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    return model


def transformers_case():
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]
    return Case(
        transformers_model, ids, names, deltas_of("default"), forward=lambda model, x: model(input_ids=x).logits
    )


def diffusers_model():
    diffusers = pytest.importorskip("diffusers", reason="runs where diffusers is installed")
    sizes = {"sample_size": 4, "in_channels": 2, "out_channels": 2, "cross_attention_dim": 6, "norm_num_groups": 2}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = diffusers.UNet2DConditionModel(
        **sizes, **blocks, block_out_channels=(4,), layers_per_block=1, attention_head_dim=2
    )
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["attn1.to_q", "attn2.to_v", "conv_in"]))
    return unet


def diffusers_case():
    torch.manual_seed(0)
    names = list(lora_layers(diffusers_model()))
    context = torch.randn(1, 3, 6, dtype=torch.float64)
    forward = lambda unet, x: unet(x, 1, context).sample  # noqa: E731
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    return Case(diffusers_model, x, names, deltas_of("default"), forward=forward)


def two_adapters():
    model = peft.get_peft_model(mlp(7, 5, 4), LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=4, target_modules=["0", "1"]))
    return model


def other_model():
    """Only the second adapter is active, and trains."""
    model = two_adapters()
    model.set_adapter("other")
    return model


def other_case():
    return Case(other_model, rows, [f"base_model.model.{i}" for i in "01"], deltas_of("other"), adapter="other")


CASES = {"transformers": transformers_case, "diffusers": diffusers_case, "second adapter": other_case}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


@each_rule
def test_follows_the_dense_loop(case, rule):
    containers.check_follows(case, rule)


@each_rule
def test_resumes_bit_for_bit(case, rule):
    containers.check_resumes(case, rule)


@each_rule
def test_copies_and_states_are_the_trained_model(case, rule):
    containers.check_leaves(case, rule)


@each_rule
def test_exports(case, rule):
    containers.check_exports(case, rule)


def test_two_adapters_move_the_weight_together():
    """Both are active and train in one folded optimizer: W moves for the sum of their products, from LoRA's start."""

    def deltas(model):
        found = [deltas_of(adapter)(model).items() for adapter in ("default", "other")]
        return {(i, name): value for i, items in enumerate(found) for name, value in items}

    def build():
        model = two_adapters()
        model.base_model.set_adapter(["default", "other"])
        return model

    case = Case(build, rows, [], deltas)
    model, dense = case.model(), case.model()
    in_place = r"(?s)0 \(other\): its W shares memory .* train together with weight_update=\"folded\""
    triples = [*find_triples(model), *find_triples(model, "other")]
    with pytest.raises(ValueError, match=in_place):
        DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=0.02)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *dense.named_parameters()]:
            if "lora_B" in name:
                parameter.zero_()
    options = {"update_ratio": RATIO, "start_step": 0, "weight_update": "folded", "lr": 0.02}
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, **options)
    inner = torch.optim.AdamW([p for p in dense.parameters() if p.requires_grad], lr=0.02)
    for t in range(STEPS):
        train(case, model, optimizer, range(t, t + 1))
        dense_step(case, dense, inner, t, start=0)
        assert relative(model(rows), dense(rows)) <= 1e-12
