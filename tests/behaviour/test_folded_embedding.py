"""Factors whose gradients are sparse, and triples of tensors alone, under the folded rule."""

import copy

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support.compare import COPIES, bits, relative, same
from tests.support.folded import folded_optimizer
from tests.support.runs import RATIO
from tests.support.strategies import RULES

START_STEPS = {"zero": 0, "later": 3}


class Table(nn.Module):
    """Rows of a table and of A, whose gradient is sparse."""

    def __init__(self, zero: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.base = nn.Embedding(12, 4, dtype=torch.float64).requires_grad_(False)
        self.A = nn.Embedding(12, 2, sparse=True, dtype=torch.float64)
        self.B = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))
        self.scaling = 0.5
        if zero:
            nn.init.zeros_(self.A.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.base(ids) + self.scaling * self.A(ids) @ self.B

    def triple(self) -> LoRATriple:
        return LoRATriple((self.base, "weight"), (self.A, "weight"), (self, "B"), scaling=(self, "scaling"), name="t")


class SparseAndDense(torch.optim.Optimizer):
    """SparseAdam for the first parameter and SGD for the second."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})
        A, B = self.param_groups[0]["params"]
        self.parts = torch.optim.SparseAdam([A], lr=lr), torch.optim.SGD([B], lr=lr)

    def step(self, closure=None):
        for part in self.parts:
            part.step()


@pytest.mark.parametrize("start", START_STEPS)
@pytest.mark.parametrize("inner", [torch.optim.SGD, SparseAndDense])
def test_a_run_with_sparse_gradients_follows_the_one_in_place(inner, start):
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 12, (8, 5), generator=generator)
    ends = []
    for mode in RULES[::-1]:
        model = Table(zero=start == "zero")
        W0 = model.base.weight.clone()
        optimizer = DeltaLoRAOptimizer(
            inner,
            [model.triple()],
            lr=0.1,
            update_ratio=RATIO,
            start_step=START_STEPS[start],
            weight_update=mode,
        )
        for ids in data:
            optimizer.zero_grad()
            (model(ids) - 1).square().mean().backward()
            assert model.A.weight.grad.is_sparse
            optimizer.step()
        assert model.scaling == (0.5 * (1 + RATIO) if mode == "folded" else 0.5)
        assert torch.equal(model.base.weight, W0) == (mode == "folded" and start == "zero")
        ends.append((model.A.weight, model.B, model(torch.arange(12))))
    for p, q in zip(*ends, strict=True):
        assert relative(p, q) <= 1e-10


def test_a_copy_with_sparse_gradients_continues():
    model = Table(zero=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [model.triple()], lr=0.1, weight_update="folded")
    ids = torch.arange(5)

    def train(model, optimizer):
        optimizer.zero_grad()
        (model(ids) - 1).square().mean().backward()
        optimizer.step()

    train(model, optimizer)
    train(model, optimizer)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer)
    train(other, other_optimizer)
    assert same(bits(other), bits(model))


def test_a_gradient_of_a_copy_that_was_made_undivided_is_refused_though_sparse():
    """Before the copy of the optimizer has seen the copied factor."""
    model = Table(zero=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [model.triple()], lr=0.1, weight_update="folded")
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.arange(5)) - 1).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    model.A.weight = nn.Parameter(model.A.weight.detach().clone())
    optimizer.param_groups[0]["params"][0] = model.A.weight
    (model(torch.arange(5)) - 1).square().mean().backward()
    with pytest.raises(RuntimeError, match="too large"):
        optimizer.step()


@pytest.mark.parametrize("way", COPIES)
def test_triples_of_plain_tensors_are_copied_without_a_warning(way):
    torch.manual_seed(0)
    W, A, B = torch.randn(4, 6), torch.zeros(4, 2).requires_grad_(), torch.randn(2, 6).requires_grad_()
    scaling = torch.tensor(1.0)
    triple = LoRATriple(W, A, B, scaling=scaling, name="t")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update="folded")
    x = torch.randn(3, 6)

    def train(optimizer, scaling):
        (t,) = optimizer.triples
        optimizer.zero_grad()
        (x @ t.W.mT + scaling * x @ (t.A @ t.B).mT - 1).square().mean().backward()
        optimizer.step()
        return t

    for _ in range(3):
        train(optimizer, scaling)
    other, other_scaling = COPIES[way]((optimizer, scaling))
    original, twin = train(optimizer, scaling), train(other, other_scaling)
    assert float(other_scaling) == 3.0
    assert all(map(torch.equal, original.tensors(), twin.tensors()))


def test_factors_are_saved_without_a_warning(tmp_path):
    """torch.save warns of tensors with hooks, unless these say that they need not be saved."""
    A = torch.zeros(4, 2).requires_grad_()
    triple = LoRATriple(torch.randn(4, 6), A, torch.randn(2, 6).requires_grad_(), scaling=torch.tensor(1.0))
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update="folded")
    torch.save(A, tmp_path / "A.pt")
    assert torch.equal(torch.load(tmp_path / "A.pt", weights_only=True), A)
    assert optimizer.step_count == 0


def test_triples_of_tensors_that_the_model_has_replaced_are_not_folded():
    """As fully_shard and assign=True replace them: nothing would train, and the branch of the others be scaled."""
    model = Table(zero=False)
    triple = LoRATriple(model.base.weight, model.A.weight, model.B, scaling=(model, "scaling"), name="t")
    optimizer = folded_optimizer(triple)
    ids = torch.arange(12)
    for module, name in ((model.base, "weight"), (model.A, "weight"), (model, "B")):
        p = getattr(module, name)
        setattr(module, name, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
    before = model(ids)
    before.square().mean().backward()
    optimizer.step()
    assert torch.equal(model(ids), before)
    assert model.scaling == 0.5
