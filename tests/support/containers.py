"""What every container of LoRA branches has to do, whatever library it is of: one case, and the checks of it.

The reference is the library's own layer in float64 with a plain optimizer: after each step W is moved by lambda times
the change of the dense delta, which each case computes by itself (Eq. 6 as it is printed).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, export_adapter, find_triples
from tests.support.compare import close, relative, same, through_a_file
from tests.support.strategies import RULES

RATIO, START, STEPS = 0.7, 2, 20
each_rule = pytest.mark.parametrize("rule", RULES)


@dataclass
class Case:
    """A model of one container.

    Args:
        build: makes the model, with the same bits at each call.
        x: its input.
        names: of the triples.
        deltas: the model -> by name of a triple, W and the branch's dense delta (scaling included) for it. Both are
            views or values of W's shape, or of the part of W that moves.
        change: (view of W, A @ B) -> the product as that view is shaped.
        forward: (model, x) -> its output.
        adapter: that trains.
    """

    build: Callable[[], nn.Module]
    x: Tensor
    names: list[str]
    deltas: Callable[[nn.Module], dict[str, tuple[Tensor, Tensor]]]
    change: Callable[[Tensor, Tensor], Tensor] = lambda W, product: product.view(W.shape)
    forward: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)
    adapter: str = "default"

    def model(self) -> nn.Module:
        """The model in float64, all factors random."""
        torch.manual_seed(0)
        model = self.build().double()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_().mul_(0.4)
        return model

    def loss(self, model: nn.Module, t: int) -> Tensor:
        """A loss of step t."""
        output = self.forward(model, self.x)
        generator = torch.Generator().manual_seed(t)
        target = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        return (output - target.to(output.dtype)).square().mean()


def optimizer_for(model: nn.Module, rule: str = "in_place", **options) -> DeltaLoRAOptimizer:
    options = {"lr": 0.02, "update_ratio": RATIO, "start_step": START, "weight_update": rule, **options}
    return DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, **options)


def train(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        optimizer.zero_grad()
        case.loss(model, t).backward()
        optimizer.step()


def dense_step(case: Case, model: nn.Module, inner: torch.optim.Optimizer, t: int, start: int = START) -> None:
    """One step of the paper's loop on a model that deltaopt does not know."""
    before = {name: delta.detach().clone() for name, (_, delta) in case.deltas(model).items()}
    train(case, model, inner, range(t, t + 1))
    if t >= start:
        with torch.no_grad():
            for name, (W, delta) in case.deltas(model).items():
                W += RATIO * (delta - before[name])


def check_follows(case: Case, rule: str) -> None:
    """W, the factors and the output follow the dense loop to 1e-12."""
    model = case.model()
    dense = copy.deepcopy(model)
    optimizer = optimizer_for(model, rule, adapter=case.adapter)
    assert [triple.label for triple in optimizer.triples] == case.names
    inner = torch.optim.AdamW([p for p in dense.parameters() if p.requires_grad], lr=0.02)
    start = {name: W.detach().clone() for name, (W, _) in case.deltas(dense).items()}
    for t in range(STEPS):
        train(case, model, optimizer, range(t, t + 1))
        dense_step(case, dense, inner, t)
        for (name, ours), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
            if ours.requires_grad or rule == "in_place":
                assert close(ours, theirs), (t, name)
        assert relative(case.forward(model, case.x), case.forward(dense, case.x)) <= 1e-12
    for name, (W, _) in case.deltas(dense).items():
        assert relative(W, start[name]) > 1e-2, name  # the reference has moved


def check_16_bits(case: Case) -> None:
    """A 16-bit W is where it was asked to be, to the last place, and has moved."""
    model = case.model().to(torch.bfloat16)
    for layer in model.modules():
        if hasattr(layer, "merge_weights"):
            layer.merge_weights = False  # loralib's merging rounds
    before = {name: W.detach().double().clone() for name, (W, _) in case.deltas(model).items()}
    case = copy.copy(case)
    case.x = case.x.to(torch.bfloat16) if case.x.is_floating_point() else case.x
    optimizer = optimizer_for(model, rounding="compensated")
    train(case, model, optimizer, range(STEPS))
    for name, (W, _) in case.deltas(model).items():
        A, B, _ = optimizer.displacement(name)
        asked = before[name] + case.change(W, A.double() @ B.double())
        torch.testing.assert_close(W.detach().double(), asked, rtol=2.0**-8, atol=1e-4)
        assert relative(W, before[name]) > 1e-2


def check_resumes(case: Case, rule: str) -> None:
    """A run that goes on from the states of model and optimizer has the bits of one that was not interrupted."""
    whole, first, second = case.model(), case.model(), case.model()
    train(case, whole, optimizer_for(whole, rule, adapter=case.adapter), range(10))
    optimizer = optimizer_for(first, rule, adapter=case.adapter)
    train(case, first, optimizer, range(5))
    saved = through_a_file({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    second.load_state_dict(saved["model"])
    optimizer = optimizer_for(second, rule, adapter=case.adapter)
    optimizer.load_state_dict(saved["optimizer"])
    train(case, second, optimizer, range(5, 10))
    assert same(dict(whole.named_parameters()), dict(second.named_parameters()))


def check_exports(case: Case, rule: str) -> None:
    """The exported adapter on the pristine weights, with the branches off, gives the trained output."""
    model = case.model()
    pristine = copy.deepcopy(model)
    optimizer = optimizer_for(model, rule, adapter=case.adapter)
    train(case, model, optimizer, range(STEPS))
    exported = export_adapter(optimizer)
    assert list(exported) == case.names
    with torch.no_grad():
        for name, (W, _) in case.deltas(pristine).items():
            W += case.change(W, exported[name].A @ exported[name].B)
        trained = dict(model.named_parameters())
        for name, parameter in pristine.named_parameters():
            if parameter.requires_grad:  # what else trains is as it was trained
                parameter.copy_(torch.zeros_like(parameter) if "lora" in name else trained[name])
        output = case.forward(pristine, case.x)
        assert relative(output, case.forward(model, case.x)) <= 1e-12
        assert relative(output, case.forward(case.model(), case.x)) > 1e-2


def check_dropout(case: Case, rule: str, set_dropout: Callable[[nn.Module], None], match: str) -> None:
    """Dropout is refused by name, at the search and at a step, unless it is allowed."""
    model = case.model()
    optimizer = optimizer_for(model, rule, adapter=case.adapter)
    set_dropout(model)
    with pytest.raises(ValueError, match=match):
        find_triples(model)
    case.loss(model, 0).backward()
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    if rule == "folded":
        with pytest.raises(ValueError, match="would apply to what W moves by too"):
            optimizer_for(model, rule, allow_dropout=True)
    else:
        train(case, model, optimizer_for(model, rule, allow_dropout=True), range(3))


def check_leaves(case: Case, rule: str) -> None:
    """A state_dict gives a fresh model the trained output; a copy of model and optimizer goes on with the same bits."""
    model, fresh = case.model(), case.model()
    optimizer = optimizer_for(model, rule, adapter=case.adapter)
    train(case, model, optimizer, range(5))
    fresh.load_state_dict(through_a_file(model.state_dict()))
    with torch.no_grad():
        assert relative(case.forward(fresh, case.x), case.forward(model, case.x)) <= 1e-12
        assert same(case.forward(copy.deepcopy(model), case.x), case.forward(model, case.x))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(case, model, optimizer, range(5, 8))
    train(case, twin, twin_optimizer, range(5, 8))
    assert same(dict(twin.named_parameters()), dict(model.named_parameters()))
