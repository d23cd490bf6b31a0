"""Random sequences of events on computed factors: W, the parameters and the output follow a dense loop throughout."""

import copy
import random

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, Factor, LoRATriple, export_adapter
from tests.behaviour.test_computed_factors import Fused
from tests.support.compare import relative, through_a_file
from tests.support.strategies import each_rule

pytestmark = pytest.mark.extra

ADAMW = {"lr": 0.02, "eps": 1e-2, "weight_decay": 0.05}
EVENTS = ["step"] * 6 + ["restart", "resync", "base_weights", "fresh", "copy", "ratio", "export", "closure"]


class Scaled(nn.Module):
    """W (15, 7) and a branch P diag(E) Q."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight, self.P, self.E, self.Q = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
            for shape in ((15, 7), (15, 3), (3, 1), (3, 7))
        )
        self.weight.requires_grad_(False)
        self.scaling = 0.5

    def triples(self) -> list[LoRATriple]:
        B = Factor(torch.mul, (self, "E"), (self, "Q"), assign=put)
        return [LoRATriple((self, "weight"), (self, "P"), B, scaling=(self, "scaling"), name="w")]

    def branch(self) -> Tensor:
        return self.P @ torch.diag(self.E.flatten()) @ self.Q

    def effective(self) -> Tensor:
        return self.weight + self.scaling * self.branch()


def put(value: Tensor, E: Tensor, Q: Tensor) -> None:
    Q.copy_(value)
    E.fill_(1.0)


def loss_of(model: nn.Module, t: int) -> Tensor:
    generator = torch.Generator().manual_seed(t)
    return (model.effective() - torch.randn(15, 7, generator=generator, dtype=torch.float64)).square().mean()


def inner_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)


class DenseLoop:
    """The paper's loop on a copy of the model that no optimizer of this package knows."""

    def __init__(self, model: nn.Module, ratio: float, start: int) -> None:
        self.model, self.ratio, self.start, self.count, self.inner = model, ratio, start, 0, inner_of(model)
        self.base = model.weight.detach().clone()

    @torch.no_grad()
    def delta(self) -> Tensor:
        return self.model.scaling * self.model.branch()

    def step(self, t: int) -> None:
        before = self.delta()
        self.inner.zero_grad()
        loss_of(self.model, t).backward()
        self.inner.step()
        if self.count >= self.start:
            self.model.weight.data += self.ratio * (self.delta() - before)
        self.count += 1

    @torch.no_grad()
    def restart(self, started: nn.Module) -> None:
        """W takes up the branch, and the parameters are what another model has drawn."""
        self.model.weight.data += self.delta()
        for own, new in zip(self.model.parameters(), started.parameters(), strict=True):
            if own.requires_grad:
                own.copy_(new)
        self.inner = inner_of(self.model)


@each_rule
@pytest.mark.parametrize("build", [Fused, Scaled])
@pytest.mark.parametrize("seed", range(10))
def test_any_events_follow_the_dense_loop(build, rule, seed):
    chance = random.Random(seed)
    ratio, start = chance.choice([0.7, 1.5, 0.3]), chance.choice([0, 2])
    model = build()
    loop = DenseLoop(copy.deepcopy(model), ratio, start)

    def optimizer_of(model: nn.Module) -> DeltaLoRAOptimizer:
        options = {"update_ratio": ratio, "start_step": start, "weight_update": rule}
        return DeltaLoRAOptimizer(torch.optim.AdamW, model.triples(), **options, **ADAMW)

    optimizer = optimizer_of(model)
    for t in range(30):
        event = chance.choice(EVENTS)
        if event == "step":
            optimizer.zero_grad()
            loss_of(model, t).backward()
            optimizer.step()
            loop.step(t)
        elif event == "restart":
            optimizer.restart(generator=torch.Generator().manual_seed(t))
            loop.restart(model)
        elif event == "resync":
            optimizer.resync()
        elif event == "base_weights":
            before = model.weight.detach().clone()
            with optimizer.base_weights():
                assert relative(model.weight, loop.base) < 1e-11
            assert torch.equal(model.weight, before)
        elif event == "fresh":
            saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            model = build()
            model.load_state_dict(saved["model"])
            optimizer = optimizer_of(model)
            optimizer.load_state_dict(saved["optimizer"])
        elif event == "copy":
            model, optimizer = copy.deepcopy((model, optimizer))
        elif event == "ratio":
            loop.ratio = optimizer.groups[0].update_ratio = chance.choice([0.0, 0.4, 1.2])
        elif event == "export":
            parts = export_adapter(optimizer)
            products = [part.product() for part in parts.values()]
            whole = products[0] if len(parts) == 1 else torch.cat([products[0], 0 * products[0], products[1]])
            assert relative(loop.base + whole, loop.model.effective()) < 1e-11
        elif event == "closure":
            with pytest.raises(ZeroDivisionError):
                optimizer.step(lambda: 1 / 0)
        assert relative(model.effective(), loop.model.effective()) < 1e-11, (event, t)
        for own, its in zip(model.parameters(), loop.model.parameters(), strict=True):
            if own.requires_grad or rule == "in_place":
                assert relative(own, its) < 1e-10 or float((own - its).detach().abs().max()) < 1e-12, (event, t)
