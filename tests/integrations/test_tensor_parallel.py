"""W moves in place where tensor parallelism, and FSDP2 on top of it, shard it: exactly as in one process."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from tests.support.compare import relative
from tests.support.distributed import on_all_ranks
from tests.support.sharded_layers import OnPartOfTheMesh, Spread, here, placed, set_gradients, trained
from tests.support.tensor_parallel import Block, Course, assert_same_course, block, course, followed, split
from tests.support.threads import on_threads

pytestmark = pytest.mark.extra

KINDS = (
    (torch.float32, "auto"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "compensated"),
    (torch.float16, "nearest"),
)
STEPS = 4
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
ONE_DIMENSION = [(Shard(0),), (Shard(1),), (Replicate(),), None]
TWO_DIMENSIONS = [
    *((first, second) for first in (Shard(0), Shard(1), Replicate()) for second in (Shard(0), Shard(1), Replicate())),
    (_StridedShard(0, split_factor=2), Shard(0)),
    (_StridedShard(1, split_factor=2), Shard(1)),
    None,
]


def compare_with_one_process(
    rank: int, mesh_shape: tuple[int, ...], layers: list[Spread], dtype, settings, expected, displacements
) -> list:
    mesh = init_device_mesh("cpu", mesh_shape)
    spread = trained(layers, dtype, STEPS, mesh, **settings)
    for triple, layer, tensors, moved in zip(spread.triples, layers, expected, displacements, strict=True):
        for found, tensor, placements in zip((triple.W, triple.A, triple.B), tensors, layer.placements, strict=True):
            assert torch.equal(here(found), here(placed(tensor, mesh, placements))), layer
        assert relative(spread.displacement(triple.name).product(), moved) < 1e-6
    return [weight.base and weight.base.record() for weight in spread._weights]


def compare(mesh: tuple[int, ...], layers: list[Spread], kind: tuple, settings: dict) -> None:
    settings = {**settings, "rounding": kind[1]}
    alone = trained(layers, kind[0], STEPS, **settings)
    expected = [tuple(t.detach() for t in (triple.W, triple.A, triple.B)) for triple in alone.triples]
    displacements = [alone.displacement(triple.name).product() for triple in alone.triples]
    bases = [weight.base and weight.base.record() for weight in alone._weights]
    arguments = (mesh, layers, kind[0], settings, expected, displacements)
    size = torch.Size(mesh).numel()
    assert on_threads(compare_with_one_process, *arguments, world_size=size) == [bases] * size


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


@settings(max_examples=20 if NIGHTLY else 12)
@given(layers=spread_layers(ONE_DIMENSION), kind=st.sampled_from(KINDS), settings=SETTINGS)
def test_every_placement_on_two_ranks_moves_w_as_in_one_process(layers, kind, settings):
    compare((2,), layers, kind, settings)


@settings(max_examples=40 if NIGHTLY else 6)
@given(layers=spread_layers(TWO_DIMENSIONS), kind=st.sampled_from(KINDS), settings=SETTINGS)
def test_every_placement_on_two_by_two_ranks_moves_w_as_in_one_process(layers, kind, settings):
    compare((2, 2), layers, kind, settings)


def split_over_two(rank: int, dtype: torch.dtype, settings: dict) -> tuple[Course, dict[str, int]]:
    found, optimizer = course(split(block(dtype), init_device_mesh("cpu", (2,))), STEPS, **settings)
    with CommDebugMode() as seen:
        optimizer.step()
    return found, {str(call): count for call, count in seen.get_comm_counts().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_parallelize_module_moves_w_as_in_one_process_and_gathers_nothing(kind):
    dtype, settings = kind[0], {"rounding": kind[1], "start_step": 1}
    (found, calls), (other, _) = on_all_ranks(split_over_two, dtype, settings)
    assert all(map(torch.equal, found.weights, other.weights))
    assert calls == {"c10d.allreduce_": 1}  # the verdict of all ranks
    assert_same_course(found, followed(block(dtype), found.factors, **settings))
    if dtype is torch.float32:
        alone, _ = course(block(dtype), STEPS, **settings)
        assert all(relative(*pair) < 1e-4 for pair in zip(found.displacements, alone.displacements, strict=True))


def fully_sharded(model: Block, mesh: DeviceMesh) -> Block:
    """FSDP2 over one dimension of the mesh, on tensor parallelism over the other."""
    split(model, mesh["tp"])
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def fully_sharded_on_split(rank: int, dtype: torch.dtype, settings: dict) -> Course:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = fully_sharded(block(dtype), mesh)
    placements = [tuple(layer.base.weight.placements) for layer in (model.up, model.down)]
    assert placements == [(_StridedShard(0, split_factor=2), Shard(0)), (Shard(0), Shard(1))]
    rows = slice(0, 2) if mesh.get_local_rank("dp") == 0 else slice(2, 4)
    return course(model, STEPS, rows, **settings)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_fully_shard_on_tensor_parallelism_moves_w_as_in_one_process(kind):
    dtype, settings = kind[0], {"rounding": kind[1]}
    found, *others = on_threads(fully_sharded_on_split, dtype, settings)
    assert all(torch.equal(W, other) for rank in others for W, other in zip(found.weights, rank.weights, strict=True))
    assert_same_course(found, followed(block(dtype), found.factors, **settings))
    if dtype is torch.float32:
        alone, _ = course(block(dtype), STEPS, **settings)
        assert all(relative(*pair) < 1e-4 for pair in zip(found.displacements, alone.displacements, strict=True))


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
