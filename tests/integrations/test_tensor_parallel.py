"""W moves in place where tensor parallelism, and FSDP2 on top of it, shard it: exactly as in one process."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from deltaopt import DeltaLoRAOptimizer
from tests.support.compare import relative
from tests.support.distributed import on_all_ranks
from tests.support.sharded_layers import OnPartOfTheMesh, Spread, here, placed, set_gradients, trained
from tests.support.tensor_parallel import Block, block, split, train, triples_of, twin_of, whole
from tests.support.threads import on_threads

pytestmark = pytest.mark.extra

KINDS = (
    (torch.float32, "auto"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "compensated"),
    (torch.float16, "nearest"),
)
STEPS = 4
ONE_DIMENSION = [(Shard(0),), (Shard(1),), (Replicate(),), None]
TWO_DIMENSIONS = [
    *((first, second) for first in (Shard(0), Shard(1), Replicate()) for second in (Shard(0), Shard(1), Replicate())),
    (_StridedShard(0, split_factor=2), Shard(0)),
    (_StridedShard(1, split_factor=2), Shard(1)),
    None,
]


def compare_with_one_process(rank: int, mesh_shape: tuple[int, ...], layers: list[Spread], kind, settings) -> None:
    dtype, rounding = kind
    alone = trained(layers, dtype, STEPS, rounding=rounding, **settings)
    mesh = init_device_mesh("cpu", mesh_shape)
    spread = trained(layers, dtype, STEPS, mesh, rounding=rounding, **settings)
    for one, other, layer in zip(alone.triples, spread.triples, layers, strict=True):
        W, A, B = (
            here(placed(tensor.detach(), mesh, placements))
            for tensor, placements in zip((one.W, one.A, one.B), layer.placements, strict=True)
        )
        assert torch.equal(here(other.A), A), layer
        assert torch.equal(here(other.B), B), layer
        if dtype is torch.float32:  # the last place of a product depends on the sizes
            torch.testing.assert_close(here(other.W), W, rtol=1e-6, atol=1e-5)
        else:
            assert torch.equal(here(other.W), W), layer
        assert relative(spread.displacement(one.name).product(), alone.displacement(one.name).product()) < 1e-6
    assert [w.base.record() for w in spread._weights] == [w.base.record() for w in alone._weights]


@st.composite
def spread_layers(draw, kinds: list) -> list[Spread]:
    found = []
    for _ in range(draw(st.integers(1, 3))):
        c, d, r = draw(st.integers(1, 13)), draw(st.integers(1, 13)), draw(st.integers(1, 4))
        placements = tuple(draw(st.sampled_from(kinds)) for _ in "WAB")
        found.append(Spread((c, d, r), draw(st.sampled_from(["linear", "transposed"])), placements))
    return found


SETTINGS = st.fixed_dictionaries(
    {"start_step": st.integers(0, 2), "update_ratio": st.sampled_from([2.0, lambda step: 1.0 + 0.25 * step])}
)


@settings(max_examples=20)
@given(layers=spread_layers(ONE_DIMENSION), kind=st.sampled_from(KINDS), settings=SETTINGS)
def test_every_placement_on_two_ranks_moves_w_as_in_one_process(layers, kind, settings):
    on_threads(compare_with_one_process, (2,), layers, kind, settings, world_size=2)


@settings(max_examples=12)
@given(layers=spread_layers(TWO_DIMENSIONS), kind=st.sampled_from(KINDS), settings=SETTINGS)
def test_every_placement_on_two_by_two_ranks_moves_w_as_in_one_process(layers, kind, settings):
    on_threads(compare_with_one_process, (2, 2), layers, kind, settings)


def split_over_two(rank: int, kind, settings) -> list:
    """A model split by parallelize_module, next to one process that is given the same factors, and one that trains."""
    dtype, rounding = kind
    model, twin, alone = split(block(dtype), init_device_mesh("cpu", (2,))), block(dtype), block(dtype)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples_of(model), lr=1e-2, rounding=rounding, **settings)
    follower = twin_of(model, twin, rounding=rounding, **settings)
    reference = DeltaLoRAOptimizer(torch.optim.AdamW, triples_of(alone), lr=1e-2, rounding=rounding, **settings)
    for step in range(STEPS):
        train(model, optimizer, [step])
        follower.step()
        train(alone, reference, [step])
    found = [whole(triple.W) for triple in optimizer.triples]
    start = block(dtype)
    for W, triple, one, base in zip(found, follower.triples, reference.triples, triples_of(start), strict=True):
        if dtype is torch.float32:
            torch.testing.assert_close(W, triple.W.detach(), rtol=0, atol=2e-7)
            assert relative(W - base.W, one.W.detach() - base.W) < 1e-5
        else:
            assert torch.equal(W, triple.W)
        assert relative(optimizer.displacement(one.name).product(), follower.displacement(one.name).product()) < 1e-6
    with CommDebugMode() as seen:
        optimizer.step()
    return [{str(call): count for call, count in seen.get_comm_counts().items()}, found]


@pytest.mark.parametrize("kind", KINDS)
def test_parallelize_module_moves_w_as_in_one_process_and_gathers_nothing(kind):
    (calls, first), (_, second) = on_all_ranks(split_over_two, kind, {"start_step": 1})
    assert all(map(torch.equal, first, second))
    assert calls == {"c10d.allreduce_": 1}


def fully_sharded(model: Block, mesh: DeviceMesh) -> Block:
    """FSDP2 over one dimension of the mesh, on tensor parallelism over the other."""
    split(model, mesh["tp"])
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def fully_sharded_on_split(rank: int, kind) -> list:
    dtype, rounding = kind
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, twin = fully_sharded(block(dtype), mesh), block(dtype)
    placements = [tuple(layer.base.weight.placements) for layer in (model.up, model.down)]
    assert placements == [(_StridedShard(0, split_factor=2), Shard(0)), (Shard(0), Shard(1))]
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples_of(model), lr=1e-2, rounding=rounding)
    follower = twin_of(model, twin, rounding=rounding)
    rows = slice(0, 2) if mesh.get_local_rank("dp") == 0 else slice(2, 4)
    for step in range(STEPS):
        train(model, optimizer, [step], rows)
        follower.step()
    for triple, one in zip(optimizer.triples, follower.triples, strict=True):
        if dtype is torch.float32:
            torch.testing.assert_close(whole(triple.W), one.W.detach(), rtol=0, atol=2e-7)
        else:
            assert torch.equal(whole(triple.W), one.W)
        assert relative(optimizer.displacement(one.name).product(), follower.displacement(one.name).product()) < 1e-6
    return [whole(triple.W).float() for triple in optimizer.triples]


@pytest.mark.parametrize("kind", KINDS)
def test_fully_shard_on_tensor_parallelism_moves_w_as_in_one_process(kind):
    found = on_threads(fully_sharded_on_split, kind)
    alone = block(kind[0])
    reference = DeltaLoRAOptimizer(torch.optim.AdamW, triples_of(alone), lr=1e-2, rounding=kind[1])
    train(alone, reference, range(STEPS))
    for W, triple in zip(found[0], reference.triples, strict=True):
        assert relative(W, triple.W.detach()) < (1e-5 if kind[0] is torch.float32 else 1e-2)


def factors_that_differ(rank: int, mesh_shape: tuple[int, ...], layers: list[Spread]) -> None:
    names = ("dp", "tp")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    optimizer = trained(layers, torch.bfloat16, 2, mesh, rounding="nearest")
    before = [here(triple.W).clone() for triple in optimizer.triples]
    set_gradients(optimizer.triples, 2)
    if mesh.get_local_rank("tp") == 1:
        for triple in optimizer.triples[1:]:
            here(triple.A.grad).add_(1.0)
    with pytest.raises(
        ValueError, match=r"(?s)not moved, on no rank.*differ between ranks.*2 layers: layer1, layer2\)$"
    ):
        optimizer.step()
    assert all(torch.equal(here(triple.W), W) for triple, W in zip(optimizer.triples, before, strict=True))


def test_whole_factors_that_differ_move_no_part_of_w():
    layer = Spread((6, 5, 2), "linear", ((Shard(0),), None, None))
    on_threads(factors_that_differ, (2,), [layer] * 3, world_size=2)


def test_factors_sharded_over_fewer_ranks_that_differ_move_no_part_of_w():
    layer = Spread(
        (6, 5, 2), "linear", ((Shard(0), Shard(1)), OnPartOfTheMesh("dp", Shard(0)), (Shard(0), Replicate()))
    )
    on_threads(factors_that_differ, (2, 2), [layer] * 3)
