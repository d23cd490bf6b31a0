"""torch's optimizers for several ranks, inside and around: ZeroRedundancy, PostLocalSGD, applied in backward."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import (
    PostLocalSGDOptimizer,
    ZeroRedundancyOptimizer,
    _apply_optimizer_in_backward,
)

from deltaopt import DeltaLoRAOptimizer
from tests.support.compare import bits, refused, relative, same, through_a_file
from tests.support.distributed import assert_same_on_all_ranks, on_all_ranks
from tests.support.small_ranks import (
    LR,
    RATIO,
    average_gradients,
    dense_run,
    effective,
    small_batches,
    small_loss,
    small_model,
    triples_of,
)
from tests.support.strategies import each_rule

pytestmark = pytest.mark.extra

ADAMW = torch.optim.AdamW


def factors_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def backward(model: nn.Module, batch: Tensor) -> None:
    model.zero_grad()
    small_loss(model, batch).backward()


def zero_inside(model: nn.Module, rule: str, built: bool) -> DeltaLoRAOptimizer:
    options = {"update_ratio": RATIO, "weight_update": rule}
    if built:
        inner = ZeroRedundancyOptimizer(factors_of(model), ADAMW, parameters_as_bucket_view=True, lr=LR)
        return DeltaLoRAOptimizer(inner, triples_of(model), **options)
    return DeltaLoRAOptimizer(ZeroRedundancyOptimizer, triples_of(model), optimizer_class=ADAMW, lr=LR, **options)


@each_rule
@pytest.mark.parametrize("built", [False, True])
def test_zero_redundancy_inside_follows_one_process_and_resumes(rule, built):
    on_all_ranks(zero_inside_on_rank, rule, built)


def zero_inside_on_rank(rank: int, rule: str, built: bool) -> None:
    def train(model: nn.Module, optimizer: DeltaLoRAOptimizer, first: int) -> None:
        for i, batch in enumerate(small_batches(12, rank)):
            if first <= i < first + 6:
                backward(model, batch)
                average_gradients(model)
                optimizer.step()

    model = small_model()
    optimizer = zero_inside(model, rule, built)
    train(model, optimizer, 0)
    optimizer.inner.consolidate_state_dict(to=0)
    states = [copy.deepcopy(optimizer.state_dict()) if rank == 0 else None]
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, 6)
    assert_same_on_all_ranks(model)
    for found, expected in zip(effective(model), dense_run(12), strict=True):
        assert relative(found, expected) < 1e-6

    dist.broadcast_object_list(states, 0)
    other = small_model()
    resumed = zero_inside(other, rule, built)
    other.load_state_dict(weights)
    resumed.load_state_dict(states[0])
    train(other, resumed, 6)
    assert same(bits(other), bits(model))


@pytest.fixture
def _one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def by_its_class(model: nn.Module, rule: str) -> object:
    return ZeroRedundancyOptimizer(factors_of(model), DeltaLoRAOptimizer, lr=LR)


def by_its_class_with_triples(model: nn.Module, rule: str) -> object:
    return ZeroRedundancyOptimizer(factors_of(model), DeltaLoRAOptimizer, lr=LR, triples=triples_of(model))


def by_a_factory(model: nn.Module, rule: str) -> object:
    """Picks the triples of its shard."""

    def make(groups: list[dict], lr: float) -> DeltaLoRAOptimizer:
        held = {id(p) for group in groups for p in group["params"]}
        own = [triple for triple in triples_of(model) if {id(triple.A), id(triple.B)} <= held]
        return DeltaLoRAOptimizer(ADAMW, own, lr=lr, weight_update=rule)

    return ZeroRedundancyOptimizer(factors_of(model), make, lr=LR)


def built_before(model: nn.Module, rule: str) -> object:
    optimizer = DeltaLoRAOptimizer(ADAMW, triples_of(model), lr=LR, weight_update=rule)
    return ZeroRedundancyOptimizer(factors_of(model), lambda groups, **options: optimizer, lr=LR)


@each_rule
@pytest.mark.parametrize("make", [by_its_class, by_its_class_with_triples, by_a_factory])
@pytest.mark.usefixtures("_one_rank")
def test_zero_redundancy_around_is_refused(make, rule):
    message = r"a ZeroRedundancyOptimizer is around.*DeltaLoRAOptimizer\(ZeroRedundancyOptimizer, triples, optimizer_"
    with pytest.raises(TypeError, match=message):
        make(small_model(), rule)


@each_rule
@pytest.mark.usefixtures("_one_rank")
def test_a_step_by_zero_redundancy_is_refused(rule):
    model = small_model()
    outer: torch.optim.Optimizer = built_before(model, rule)
    backward(model, next(small_batches(1)))
    refused(outer.step, RuntimeError, "a ZeroRedundancyOptimizer is around", kept=lambda: bits(model))


@each_rule
@pytest.mark.parametrize("way", ["class", "factory"])
def test_an_optimizer_that_is_applied_in_backward_is_refused(way, rule):
    model = small_model()
    make: Callable = DeltaLoRAOptimizer
    if way == "factory":
        make = lambda params, lr: DeltaLoRAOptimizer(ADAMW, triples_of(model), lr=lr, weight_update=rule)  # noqa: E731
    with pytest.raises(TypeError, match=r"_apply_optimizer_in_backward makes .* Call step\(\) of one optimizer after"):
        _apply_optimizer_in_backward(make, factors_of(model), {"lr": LR})


def local_sgd_inside(model: nn.Module, **options) -> DeltaLoRAOptimizer:
    inner = PostLocalSGDOptimizer(ADAMW(factors_of(model), lr=LR), PeriodicModelAverager(period=4))
    return DeltaLoRAOptimizer(inner, triples_of(model), update_ratio=RATIO, **options)


def local_sgd_around(model: nn.Module, **options) -> PostLocalSGDOptimizer:
    optimizer = DeltaLoRAOptimizer(ADAMW, triples_of(model), lr=LR, update_ratio=RATIO, **options)
    return PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(period=4))


LOCAL_SGD = {
    "in place, float32": (local_sgd_inside, torch.float32, {}),
    "in place, compensated": (local_sgd_inside, torch.bfloat16, {"rounding": "compensated"}),
    "folded, inside": (local_sgd_inside, torch.bfloat16, {"weight_update": "folded"}),
    "folded, around": (local_sgd_around, torch.float32, {"weight_update": "folded"}),
}


@pytest.mark.parametrize("way", LOCAL_SGD)
def test_local_sgd_leaves_every_rank_with_the_same_weights(way):
    on_all_ranks(local_sgd_on_rank, way)


def local_sgd_on_rank(rank: int, way: str) -> None:
    """W is what the paper's loop makes of the averaged A and B: its movement is that of the product."""
    make, dtype, options = LOCAL_SGD[way]
    model = small_model(dtype)
    start = bits(model)
    optimizer = make(model, **options)
    for batch in small_batches(41, rank):  # the last one averages
        backward(model, batch)
        optimizer.step()
    for name in ("0", "2"):
        W, A, B = (f"{name}.{key}" for key in ("base.weight", "A", "B"))
        now = bits(model)
        for factor in (A, B):
            first = now[factor].clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, now[factor])
        moved = now[W].double() - start[W].double()
        first = moved.clone()
        dist.broadcast(first, 0)
        if "folded" in way:
            assert not moved.any()
            continue
        asked = RATIO * 0.5 * (now[A].double() @ now[B].double())
        if dtype == torch.float32:
            assert relative(moved, first) < 5e-5  # each rank has rounded on its own way
            assert relative(moved, asked) < 5e-5
        else:
            assert torch.equal(moved, first)
            spacing = 2.0**-8 * now[W].abs().max().double()
            assert (moved - asked).abs().max() <= spacing


@each_rule
@pytest.mark.usefixtures("_one_rank")
def test_local_sgd_inside_resumes(rule):
    """Its own count of steps is in the state: the next average comes when it would have come."""
    model, other = small_model(), small_model()
    optimizer, resumed = (local_sgd_inside(each, weight_update=rule) for each in (model, other))
    data = list(small_batches(10))
    for batch in data[:7]:
        backward(model, batch)
        optimizer.step()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert resumed.inner.averager.step == 7
    for each, own in ((model, optimizer), (other, resumed)):
        for batch in data[7:]:
            backward(each, batch)
            own.step()
    assert same(bits(other), bits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["auto", "stochastic", "nearest"])
@pytest.mark.usefixtures("_one_rank")
def test_local_sgd_inside_is_refused_where_rounding_would_part_the_ranks(rounding, dtype):
    model = small_model(dtype)
    message = r"PostLocalSGDOptimizer inside.*16-bit W of 2 layers .*layer0, .*layer1\).*rounding=.compensated"
    with pytest.raises(ValueError, match=message):
        local_sgd_inside(model, rounding=rounding)
    float32 = small_model()
    optimizer = local_sgd_inside(float32, rounding=rounding)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"triples": [triple.named(f"other {triple.label}") for triple in triples_of(model)]})
    float32[0].base.to(dtype)
    refused(optimizer.step, ValueError, r"16-bit W of 1 layer \(layer0\)", kept=lambda: bits(float32))


@pytest.mark.usefixtures("_one_rank")
def test_local_sgd_around_is_refused_in_place():
    model = small_model()
    optimizer = local_sgd_around(model)
    backward(model, next(small_batches(1)))
    message = r"a PostLocalSGDOptimizer is around.*Put it inside"
    refused(optimizer.step, RuntimeError, message, kept=lambda: bits(model))
