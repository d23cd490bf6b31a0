"""LoRA-FA: PEFT's own optimizer freezes lora_A and projects the gradient of lora_B; W follows lora_B alone."""

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, find_triples
from tests.support.compare import relative, through_a_file
from tests.support.strategies import each_rule

peft = pytest.importorskip("peft", reason="runs where peft is installed")
optimizers = pytest.importorskip("peft.optimizers", reason="runs where peft is installed")
pytestmark = pytest.mark.extra


def lora_model() -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 6))
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"])).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


def lorafa(model: nn.Module) -> torch.optim.Optimizer:
    return optimizers.create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=0.01, weight_decay=0.01)


def layers_of(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]


def products(model: nn.Module) -> list[Tensor]:
    return [layer.get_delta_weight("default").detach().clone() for layer in layers_of(model)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, t: int) -> None:
    generator = torch.Generator().manual_seed(100 + t)
    x, y = (torch.randn(9, n, generator=generator, dtype=torch.float64) for n in (7, 6))
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


def wrapped(model: nn.Module, rule: str) -> DeltaLoRAOptimizer:
    inner = lorafa(model)
    return DeltaLoRAOptimizer(inner, find_triples(model), update_ratio=0.7, start_step=2, weight_update=rule)


@each_rule
def test_follows_the_dense_loop(rule):
    model, plain = lora_model(), lora_model()
    optimizer, inner = wrapped(model, rule), lorafa(plain)
    start, x = [layer.lora_A["default"].weight.clone() for layer in layers_of(model)], torch.eye(7, dtype=torch.float64)
    for t in range(40):
        before = products(plain)
        step(model, optimizer, t)
        step(plain, inner, t)
        if t >= 2:
            for layer, old, new in zip(layers_of(plain), before, products(plain), strict=True):
                layer.base_layer.weight.data += 0.7 * (new - old)
        assert relative(model(x), plain(x)) < 1e-12
        for layer, its in zip(layers_of(model), layers_of(plain), strict=True):
            assert relative(layer.lora_B["default"].weight, its.lora_B["default"].weight) < 1e-11
    for layer, A in zip(layers_of(model), start, strict=True):
        assert torch.equal(layer.lora_A["default"].weight, A)


@each_rule
def test_a_run_resumes_and_evaluates(rule):
    """Also after disable_adapter(), which unfreezes lora_A."""
    model, fresh = lora_model(), lora_model()
    optimizer = wrapped(model, rule)
    for t in range(4):
        step(model, optimizer, t)
    x = torch.eye(7, dtype=torch.float64)
    with model.disable_adapter(), fresh.disable_adapter():
        assert relative(model(x), fresh(x)) < 1e-12
    fresh.load_state_dict(model.state_dict())
    resumed = wrapped(fresh, rule)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for t in range(4, 8):
        step(model, optimizer, t)
        step(fresh, resumed, t)
    assert relative(fresh(x), model(x)) < 1e-12
