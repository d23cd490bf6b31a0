"""The figures of movement, against dense float64 matrices."""

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple, norms
from deltaopt.metrics import movement_metrics
from tests.support.folded import folded_optimizer, packed_layer
from tests.support.internals import keep_few_terms
from tests.support.strategies import each_rule

RATIO, SCALING = 2.0, 0.5


class Layer:
    """W (c, d), or a stack of them, in `dtype`, A and B; `base`, `A`, `B` are kept as they are at first."""

    def __init__(self, name: str, *shape: int, zero: bool = False, dtype: torch.dtype = torch.float64) -> None:
        *lead, c, d = shape
        generator = torch.Generator().manual_seed(len(name))
        factor = torch.float64 if dtype == torch.float64 else torch.float32
        self.W = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        self.A, self.B = (
            nn.Parameter(0.1 * torch.randn(size, generator=generator, dtype=factor))
            for size in ([*lead, c, 3], [*lead, 3, d])
        )
        if zero:
            nn.init.zeros_(self.A)
        scale = torch.tensor(SCALING)
        self.triple = LoRATriple(
            self.W, self.A, self.B, scaling=scale, name=name, layout="experts" if lead else "linear"
        )
        self.base, self.start = self.W.double().clone(), self.product()

    def product(self) -> Tensor:
        return (self.A.double() @ self.B.double()).detach()

    def asked(self) -> Tensor:
        return RATIO * SCALING * (self.product() - self.start)


def random_steps(optimizer: DeltaLoRAOptimizer, count: int = 1, seed: int = 0) -> None:
    """Take steps on random gradients, which come by a backward pass: the folded rule looks at that."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        factors = [factor for triple in optimizer.triples for factor in (triple.A, triple.B)]
        sum((p * torch.randn(p.shape, generator=generator, dtype=p.dtype)).sum() for p in factors).backward()
        optimizer.step()


def expected(layers: list[Layer]) -> dict[str, float]:
    bases, moved = [layer.base for layer in layers], [layer.asked() for layer in layers]
    norm = sum(D.square().sum() for D in moved).sqrt()
    cosines = [torch.cosine_similarity(W.flatten(), (W + D).flatten(), 0) for W, D in zip(bases, moved, strict=True)]
    ranks = []
    for D in moved:
        sigma = torch.linalg.svdvals(D)
        p = sigma / sigma.sum(-1, keepdim=True)
        ranks.append(torch.exp(-(p * p.clamp(min=1e-300).log()).sum(-1)).mean())
    return {
        "displacement_norm": float(norm),
        "relative_displacement": float(norm / sum(W.square().sum() for W in bases).sqrt()),
        "cosine_to_base": float(sum(cosines) / len(cosines)),
        "effective_rank": float(sum(ranks) / len(ranks)),
        "moved_weights": float(len(layers)),
        "skipped_updates": 0.0,
    }


def optimizer_of(layers: list[Layer], **options: object) -> DeltaLoRAOptimizer:
    triples = [layer.triple for layer in layers]
    return DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=1e-2, update_ratio=RATIO, **options)


@each_rule
@pytest.mark.parametrize("zero", [True, False], ids=["zero", "later"])
def test_the_figures_are_those_of_the_dense_matrices(rule, zero, monkeypatch):
    monkeypatch.setattr(norms, "ELEMENTS", 40)  # several blocks of rows
    layers = [Layer("q", 7, 5, zero=zero), Layer("up", 12, 30, zero=zero), Layer("moe", 2, 6, 9, zero=zero)]
    optimizer = optimizer_of(layers, weight_update=rule)
    random_steps(optimizer, 4)
    assert movement_metrics(optimizer) == pytest.approx(expected(layers), rel=1e-9)


def test_a_small_movement_next_to_a_large_product_is_seen():
    """A step of 1e-9 next to a product of 1e3, in float64: a difference of squares would have no digit of it."""
    layer = Layer("q", 8, 6)
    optimizer = optimizer_of([layer])
    with torch.no_grad():
        layer.A.mul_(1e3)
    layer.start = layer.product()
    optimizer.param_groups[0]["lr"] = 1e-9
    random_steps(optimizer)
    found = movement_metrics(optimizer)
    assert found["displacement_norm"] == pytest.approx(float(layer.asked().norm()), rel=1e-5)
    assert 0 < found["displacement_norm"] < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_w_of_fewer_bits_is_read_in_float32(dtype):
    layers = [Layer("q", 40, 30, dtype=dtype)]
    optimizer = optimizer_of(layers, rounding="compensated")
    random_steps(optimizer, 3)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-3  # a bfloat16 W is where rounding has left it
    assert movement_metrics(optimizer) == pytest.approx(expected(layers), rel=tolerance)


def test_a_displacement_kept_as_a_matrix_has_no_effective_rank(monkeypatch):
    keep_few_terms(monkeypatch)
    layer = Layer("q", 8, 6)
    optimizer = optimizer_of([layer])
    for i in range(12):
        optimizer.groups[0].update_ratio = 1.0 + i
        random_steps(optimizer, seed=i)
    assert optimizer.accounts()[0].ledger.is_matrix
    D = layer.W - layer.base
    found = movement_metrics(optimizer)
    assert "effective_rank" not in found
    assert found["displacement_norm"] == pytest.approx(float(D.norm()), rel=1e-9)
    cosine = torch.cosine_similarity(layer.base.flatten(), layer.W.flatten(), 0)
    assert found["cosine_to_base"] == pytest.approx(float(cosine), rel=1e-12)


@each_rule
def test_nothing_has_moved_yet(rule):
    layers = [Layer("q", 7, 5), Layer("up", 12, 30)]
    optimizer = optimizer_of(layers, weight_update=rule, start_step=2)
    random_steps(optimizer, 2)
    found = movement_metrics(optimizer)
    assert found.pop("cosine_to_base") == pytest.approx(1.0, abs=1e-15)
    zero = {"displacement_norm": 0.0, "relative_displacement": 0.0, "moved_weights": 0.0, "skipped_updates": 0.0}
    assert found == zero


@each_rule
def test_steps_that_change_no_factor_move_nothing(rule):
    layers = [Layer("q", 7, 5)]
    optimizer = optimizer_of(layers, weight_update=rule, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.0
    random_steps(optimizer, 2)
    assert movement_metrics(optimizer)["moved_weights"] == 0


def test_skipped_updates_are_counted():
    layer = Layer("q", 7, 5, dtype=torch.float32)
    optimizer = optimizer_of([layer])
    random_steps(optimizer)
    layer.A.grad.fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        optimizer.step()
    with torch.no_grad():
        layer.A.nan_to_num_(0.1)
    assert movement_metrics(optimizer)["skipped_updates"] == 1


def test_a_w_that_cannot_be_read_has_no_cosine():
    stored = packed_layer(zero=True)
    optimizer = folded_optimizer(stored.triple(torch.tensor(SCALING), "packed"), update_ratio=RATIO)
    random_steps(optimizer, 2)
    found = movement_metrics(optimizer)
    A, B = (factor.detach().double() for factor in (stored.A, stored.B))
    assert found.keys() == {"displacement_norm", "effective_rank", "moved_weights", "skipped_updates"}
    assert found["displacement_norm"] == pytest.approx(float(RATIO * SCALING * (A @ B).norm()), rel=1e-9)
