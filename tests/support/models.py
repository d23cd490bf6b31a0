"""A tiny Llama with PEFT adapters, its data and its training, for the tests that run other people's code."""

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer
from tests.support.runs import RATIO

peft = pytest.importorskip("peft", reason="runs where peft is installed")
transformers = pytest.importorskip("transformers", reason="runs where transformers is installed")

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def causal_lm(
    dtype: torch.dtype = torch.float64, B_zero: bool = False, factors: torch.dtype | None = None
) -> nn.Module:
    """A tiny Llama with PEFT adapters, in `dtype` or, as PEFT has them, in `factors`; the same bits at each call."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
        initializer_range=0.3,
    )
    adapter = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapter).to(dtype)
    if not B_zero:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_().mul_(0.2)
                    if factors is not None:
                        parameter.data = parameter.data.to(factors)
    return model


def batches(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 24, (4, 8), generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name.split("model.layers.")[1]: module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.base_layer.weight.detach().clone() for name, layer in layers(model).items()}


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's own scaling * B @ A of every layer."""
    return {name: layer.get_delta_weight("default").detach().clone() for name, layer in layers(model).items()}


def optimizer_for(model: nn.Module, inner=torch.optim.AdamW, **options) -> DeltaLoRAOptimizer:
    return DeltaLoRAOptimizer.for_model(model, inner, update_ratio=RATIO, **{"lr": 1e-2, **options})


def plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor]) -> list[float]:
    losses = []
    for ids in data:
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.rows = torch.cat(batches(count)).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}
