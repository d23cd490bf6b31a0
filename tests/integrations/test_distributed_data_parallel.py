"""DistributedDataParallel: every rank moves its own copy of W, and all copies stay equal, bit for bit."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deltaopt import DeltaLoRAOptimizer, LoRATriple, export_adapter
from tests.support import reference
from tests.support.compare import relative, same, through_a_file
from tests.support.distributed import WORLD, on_all_ranks
from tests.support.strategies import each_rule

pytestmark = pytest.mark.extra

RATIO, SCALING, LATER = 1.5, 0.5, 3

ROUNDED = 1e-6
"""Relative: sums of float32 in another order, and what was trained with them since."""


class Layer(nn.Linear):
    """A frozen linear layer with a branch in float32, as it is written by hand."""

    def __init__(self, d: int, c: int, dtype: torch.dtype, zero: bool) -> None:
        super().__init__(d, c, bias=False)
        self.weight.data = self.weight.data.to(dtype)
        self.weight.requires_grad_(False)
        self.A = nn.Parameter(torch.zeros(c, 3) if zero else 0.3 * torch.randn(c, 3))
        self.B = nn.Parameter(0.3 * torch.randn(3, d))
        self.scaling = SCALING

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.float().T + self.scaling * (x @ self.B.T) @ self.A.T

    def triple(self, name: str) -> LoRATriple:
        return LoRATriple((self, "weight"), (self, "A"), (self, "B"), scaling=(self, "scaling"), name=name)


@dataclass(frozen=True)
class Kind:
    """How W is stored and written, and when it begins to move."""

    dtype: torch.dtype = torch.float32
    rule: str = "in_place"
    rounding: str = "auto"
    start_step: int = 0
    inner: type[torch.optim.Optimizer] = torch.optim.AdamW

    def __str__(self) -> str:
        parts = (self.dtype, self.rule, self.rounding, self.start_step, self.inner.__name__)
        return "-".join(str(part).removeprefix("torch.") for part in parts)


KINDS = [
    Kind(),
    Kind(inner=torch.optim.SGD),
    Kind(start_step=LATER),
    Kind(torch.bfloat16, rounding="stochastic"),
    Kind(torch.bfloat16, rounding="compensated", start_step=LATER),
    Kind(torch.bfloat16, rounding="nearest"),
    Kind(torch.float16, rounding="stochastic", start_step=LATER),
    Kind(torch.float16, rounding="compensated"),
    Kind(rule="folded"),
    Kind(rule="folded", start_step=LATER),
    Kind(torch.bfloat16, rule="folded"),
]


class Run:
    """Two layers, the same bits for equal seeds; `share` is this rank's part of each batch, None the whole batch."""

    def __init__(self, kind: Kind, share: int | None = None, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(seed)
        zero = kind.start_step == 0
        self.kind, self.share = kind, share
        self.model = nn.Sequential(Layer(24, 32, kind.dtype, zero), nn.Tanh(), Layer(32, 12, kind.dtype, zero))
        self.options = {"rounding": kind.rounding, **options}
        self.optimizer = self.new_optimizer()
        self.forward: Callable[[Tensor], Tensor] = self.model

    def new_optimizer(self) -> DeltaLoRAOptimizer:
        return DeltaLoRAOptimizer(
            self.kind.inner,
            [self.model[0].triple("first"), self.model[2].triple("last")],
            lr=0.01,
            update_ratio=RATIO,
            start_step=self.kind.start_step,
            weight_update=self.kind.rule,
            **self.options,
        )

    def parallel(self, **options: Any) -> "Run":
        self.forward = DistributedDataParallel(self.model, **options)
        return self

    def train(self, steps: range, parts: int = 1, micro: int = 1) -> "Run":
        """Train on batches that depend on the step alone, each in `parts` shares, and each share in `micro` batches."""
        for step in steps:
            self.optimizer.zero_grad()
            batch = batch_of(step)
            pieces = [(x, y) for x, y in self.pieces(batch, parts)]
            small = [(xs, ys) for x, y in pieces for xs, ys in zip(x.chunk(micro), y.chunk(micro), strict=True)]
            for i, (x, y) in enumerate(small):
                last = i == len(small) - 1
                parallel = isinstance(self.forward, DistributedDataParallel)
                with contextlib.nullcontext() if last or not parallel else self.forward.no_sync():
                    ((self.forward(x) - y).square().mean() / len(small)).backward()
            self.optimizer.step()
        return self

    def pieces(self, batch: tuple[Tensor, Tensor], parts: int) -> list[tuple[Tensor, Tensor]]:
        x, y = batch
        if self.share is not None:
            x, y = x.chunk(WORLD)[self.share], y.chunk(WORLD)[self.share]
        return list(zip(x.chunk(parts), y.chunk(parts), strict=True))

    def state(self) -> dict[str, Any]:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load(self, state: dict[str, Any], whole: bool = True) -> "Run":
        state = through_a_file(state)
        kept = {name: t for name, t in state["model"].items() if whole or not name.endswith("weight")}
        self.model.load_state_dict(kept, strict=whole)
        self.optimizer.load_state_dict(state["optimizer"])
        return self

    def layers(self) -> list[Layer]:
        return [self.model[0], self.model[2]]

    @torch.no_grad()
    def effective(self) -> list[Tensor]:
        """What each layer multiplies by, in float64."""
        return [m.weight.double() + m.scaling * m.A.double() @ m.B.double() for m in self.layers()]


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, 24, generator=generator)
    return x, torch.randn(16, 12, generator=generator)


def assert_close(run: Run, other: Run, tolerance: float = ROUNDED) -> None:
    for now, expected in zip(run.effective(), other.effective(), strict=True):
        assert relative(now, expected) <= tolerance


def assert_same_on_ranks(results: list[Any]) -> Any:
    assert len(results) == WORLD
    assert same(results[0], results[1])
    return results[0]


each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


@each_kind
def test_ranks_stay_equal_and_follow_one_process_and_resume_bit_for_bit(kind):
    assert_same_on_ranks(on_all_ranks(train_and_resume_on_rank, kind))


def train_and_resume_on_rank(rank: int, kind: Kind) -> dict[str, Any]:
    run = Run(kind, rank).parallel().train(range(6))
    state = run.state()
    run.train(range(6, 12))

    # What the all-reduce sums are the halves of the shares' gradients, as one process sums them.
    alone = Run(kind).train(range(12), parts=WORLD)
    assert same(run.state(), alone.state())
    whole = Run(kind).train(range(12))
    assert_close(run, whole, ROUNDED if kind.dtype == torch.float32 or kind.rule == "folded" else 1e-3)

    assert same(Run(kind, rank, seed=7).load(state).parallel().train(range(6, 12)).state(), run.state())
    assert same(Run(kind, seed=7).load(state).train(range(6, 12), parts=WORLD).state(), run.state())
    if kind.rule == "in_place":
        assert_moved_by_the_change_of_the_products(kind)
    return run.state()


def assert_moved_by_the_change_of_the_products(kind: Kind) -> None:
    """W of one process, which is every rank's, against dense products in float64."""
    run = Run(kind)
    start = [m.weight.double() for m in run.layers()]
    products = [[m.A.detach().double() @ m.B.detach().double() for m in run.layers()]]
    for step in range(12):
        run.train(range(step, step + 1), parts=WORLD)
        products.append([m.A.detach().double() @ m.B.detach().double() for m in run.layers()])
    coefs = [0.0] * kind.start_step + [RATIO * SCALING] * (12 - kind.start_step)
    spacing = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[kind.dtype]
    for i, layer in enumerate(run.layers()):
        expected = reference.replay(start[i], [p[i] for p in products], coefs)[-1]
        moved = (expected - start[i]).norm()
        once = float(spacing * expected.norm())
        error = float((layer.weight.double() - expected).norm())
        assert error <= (once if kind.rounding == "compensated" else 4 * once)
        assert moved > 10 * once


WAYS: dict[str, dict[str, Any]] = {
    "accumulation": {},
    "static graph": {"static_graph": True},
    "views of buckets": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 1e-4},
    "unused parameters": {"find_unused_parameters": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4], KINDS[9]], ids=str)
def test_every_way_of_ddp_gives_the_same_run(kind, way):
    assert_same_on_ranks(on_all_ranks(way_on_rank, kind, way))


def way_on_rank(rank: int, kind: Kind, way: str) -> dict[str, Any]:
    micro = 2 if way == "accumulation" else 1
    run = Run(kind, rank).parallel(**WAYS[way]).train(range(4), micro=micro)
    state = run.state()
    run.train(range(4, 8), micro=micro)
    if micro == 1:
        assert same(run.state(), Run(kind).train(range(8), parts=WORLD).state())
    else:
        assert_close(run, Run(kind).train(range(8)), ROUNDED if kind.dtype == torch.float32 else 1e-3)
    other = Run(kind, rank, seed=7).load(state).parallel(**WAYS[way]).train(range(4, 8), micro=micro)
    assert same(other.state(), run.state())
    return run.state()


@pytest.mark.parametrize("keep_base", [None, "cpu", "device"])
@pytest.mark.parametrize("first", ["optimizer first", "DDP first"])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2], KINDS[4], KINDS[9]], ids=str)
def test_a_w_that_differs_before_ddp_is_that_of_rank_0(kind, first, keep_base):
    assert_same_on_ranks(on_all_ranks(different_on_rank, kind, first, keep_base))


def different_on_rank(rank: int, kind: Kind, first: str, keep_base: str | None) -> list[Tensor]:
    """DDP sends rank 0's W to the others when it is built; the base is what it sent."""
    options = {} if keep_base is None else {"keep_base": keep_base}
    alone = Run(kind, **options)
    base = [m.weight.clone() for m in alone.layers()]
    run = Run(kind, rank, seed=rank, **options)
    assert torch.equal(run.model[0].weight, base[0]) == (rank == 0)
    run.parallel()
    if first == "DDP first":
        run.optimizer = run.new_optimizer()
    run.train(range(6))
    alone.train(range(6), parts=WORLD)
    assert same(run.state()["model"], alone.state()["model"])
    with run.optimizer.base_weights():
        found = [m.weight.clone() for m in run.layers()]
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[kind.dtype]
    for now, expected in zip(found, base, strict=True):
        if keep_base is None:
            assert relative(now, expected) <= tolerance
        else:
            assert torch.equal(now, expected)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_with_other_numbers_of_threads_stay_equal(dtype):
    assert_same_on_ranks(on_all_ranks(threads_on_rank, dtype))


def threads_on_rank(rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A product is divided over the threads, and not what each element is the sum of."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 + rank)
    try:
        torch.manual_seed(0)
        model = Layer(900, 700, dtype, zero=False)
        optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [model.triple("one")], lr=0.01, update_ratio=RATIO)
        ddp = DistributedDataParallel(model)
        start = model.weight.clone()
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(4, 900, generator=torch.Generator().manual_seed(2 * step + rank))
            ddp(x).square().mean().backward()
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(model.weight, start)
    return model.state_dict()


@each_rule
def test_a_run_resumes_from_the_adapter_and_the_base(rule):
    """Every rank rebuilds the same bits."""
    results = on_all_ranks(adapter_alone_on_rank, Kind(rule=rule, start_step=LATER))
    assert_same_on_ranks(results)


def adapter_alone_on_rank(rank: int, kind: Kind) -> dict[str, Any]:
    run = Run(kind, rank).parallel().train(range(6))
    other = Run(kind, rank).load(run.state(), whole=False).parallel()
    assert_close(other, run)
    for r in (run, other):
        r.train(range(6, 12))
    assert_close(other, run)
    return other.state()


def test_a_16_bit_w_is_rebuilt_with_one_rounding_alike_on_all_ranks():
    kind = Kind(torch.bfloat16, rounding="stochastic", start_step=LATER)
    W = assert_same_on_ranks(on_all_ranks(rebuilt_on_rank, kind))
    assert len(W) == 2


def rebuilt_on_rank(rank: int, kind: Kind) -> list[Tensor]:
    run = Run(kind, rank).parallel().train(range(6))
    other = Run(kind, rank)
    with pytest.warns(RuntimeWarning, match=r"16-bit .*2 layers .* rebuilt .*, rounded once"):
        other.load(run.state(), whole=False)
    assert_close(other, run, 1e-2)
    other.parallel().train(range(6, 9))
    return [m.weight.detach() for m in other.layers()]


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3], KINDS[9]], ids=str)
def test_a_gradient_of_nan_before_the_reduction_is_every_rank_s(kind):
    assert_same_on_ranks(on_all_ranks(nan_on_rank, kind))


def nan_on_rank(rank: int, kind: Kind) -> list[Tensor]:
    run = Run(kind, rank).parallel().train(range(4))
    W = [m.weight.clone() for m in run.layers()]
    run.optimizer.zero_grad()
    x, y = run.pieces(batch_of(4), 1)[0]
    loss = (run.forward(x) - y).square().mean()
    (loss * (float("nan") if rank == 1 else 1.0)).backward()
    if kind.rule == "in_place":
        with pytest.warns(RuntimeWarning, match="became NaN.*the update of every W there was skipped"):
            run.optimizer.step()
    else:
        run.optimizer.step()
    for layer, before in zip(run.layers(), W, strict=True):
        assert torch.equal(layer.weight, before)
        assert layer.A.isnan().any()
    return [m.weight.detach() for m in run.layers()]


@each_rule
def test_one_rank_alone_saves_and_exports(rule):
    """No other rank has to take part: nothing is sharded."""
    results = on_all_ranks(saving_on_rank, Kind(rule=rule, start_step=LATER))
    assert results[1] is None
    state, adapter = results[0]
    run = Run(Kind(rule=rule, start_step=LATER), seed=3).load(state)
    fresh = Run(Kind(rule=rule, start_step=LATER))
    for pristine, trained, name in zip(fresh.layers(), run.effective(), ("first", "last"), strict=True):
        assert relative(pristine.weight.double() + adapter[name].double(), trained) <= ROUNDED


def saving_on_rank(rank: int, kind: Kind) -> Any:
    run = Run(kind, rank).parallel().train(range(6))
    if rank == 1:
        return None
    return run.state(), {name: delta.product() for name, delta in export_adapter(run.optimizer).items()}
