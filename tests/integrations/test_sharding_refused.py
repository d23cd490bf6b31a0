"""Sharded tensors that cannot be moved or trained: refused by name on all ranks, with a way out, and W untouched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support.sharded_layers import OnPartOfTheMesh, Spread, placed, triples_of
from tests.support.tensor_parallel import fully_sharded_weight
from tests.support.threads import on_threads

pytestmark = pytest.mark.extra

Make = Callable[[DeviceMesh], list[LoRATriple]]


def scattered(mesh: DeviceMesh) -> list[LoRATriple]:
    placements = ((_StridedShard(0, split_factor=2),), (Replicate(),), None)
    return triples_of([Spread((8, 6, 2), "linear", placements)] * 2, torch.float32, mesh)


def partial(W: Any, A: Any) -> Make:
    def make(mesh: DeviceMesh) -> list[LoRATriple]:
        tensors = [DTensor.from_local(torch.ones(4, 4), mesh, [kind]) for kind in (W, A, Replicate())]
        W_, A_, B_ = (nn.Parameter(t, requires_grad=bool(i)) for i, t in enumerate(tensors))
        return [LoRATriple(W_, A_, B_, scaling=1.0, name="q")]

    return make


def descending(mesh: DeviceMesh) -> list[LoRATriple]:
    """On a mesh of the same ranks in the other order, of which the parts are not where its coordinates say."""
    turned = DeviceMesh("cpu", mesh.mesh.flip(0))
    return triples_of([Spread((8, 6, 2), "linear", ((Shard(0),), (Replicate(),), None))], torch.float32, turned)


def packed(mesh: DeviceMesh) -> list[LoRATriple]:
    triples = []
    for name in ("q", "k"):
        W = DTensor.from_local(torch.ones(2, 4, dtype=torch.int8), mesh, [Shard(0)])
        A, B = (nn.Parameter(placed(torch.ones(4, 4), mesh, [Replicate()])) for _ in "AB")
        triples.append(LoRATriple(nn.Parameter(W, requires_grad=False), A, B, scaling=1.0, name=name))
    return triples


def convolution(mesh: DeviceMesh) -> list[LoRATriple]:
    W = placed(torch.ones(4, 4, 3), mesh, [Shard(1)])
    A, B = nn.Parameter(torch.ones(4, 2, 1)), nn.Parameter(torch.ones(2, 4, 3))
    return [LoRATriple(nn.Parameter(W, requires_grad=False), A, B, scaling=1.0, layout="conv", name="conv")]


def refuse(rank: int, mesh_shape: tuple[int, ...], make: Make, settings: dict) -> str:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "tp")[-len(mesh_shape) :])
    triples = make(mesh)
    with pytest.raises(ValueError, match="these triples cannot be used") as refused:
        DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1, **settings)
    return str(refused.value)


def message(make: Make, mesh: tuple[int, ...] = (2,), **settings: Any) -> str:
    found = set(on_threads(refuse, mesh, make, settings, world_size=torch.Size(mesh).numel()))
    assert len(found) == 1  # the same on all ranks
    return found.pop()


def test_partial_sums_are_refused():
    for make, letter in ((partial(Partial(), Replicate()), "W"), (partial(Replicate(), Partial()), "A")):
        said = message(make)
        assert f"q: {letter} is a DTensor (FSDP2, tensor parallelism) with the placements (Partial(sum),)" in said
        assert "Redistribute it to Shard or Replicate" in said


def test_a_mesh_of_descending_ranks_is_refused():
    said = message(descending)
    assert "on a device mesh with the ranks [1, 0]" in said
    assert "Build the mesh with ascending ranks along each dimension" in said


def test_packed_numbers_in_a_sharded_tensor_are_refused():
    said = message(packed)
    assert "W has dtype torch.int8" in said
    assert 'Take weight_update="folded"' in said
    assert said.endswith("(2 layers: q, k)")


def test_a_convolution_sharded_along_its_inputs_is_refused():
    said = message(convolution)
    assert "conv: W is a DTensor (FSDP2, tensor parallelism) with the placements (Shard(dim=1),)" in said
    assert "sharded along dimension 0, its output channels" in said


def test_several_runs_of_a_dimension_are_refused():
    said = message(scattered)
    assert "give a rank several runs of dimension 0" in said
    assert "redistribute it to Shard, as parallelize_module and fully_shard have it" in said
    assert said.endswith("(2 layers: layer0, layer1)")


@pytest.mark.parametrize("n", [7, 13])
def test_sizes_that_fsdp2_on_tensor_parallelism_cuts_in_another_way_than_it_says_are_refused(n):
    def make(mesh: DeviceMesh) -> list[LoRATriple]:
        W = fully_sharded_weight(torch.ones(n, 4), mesh, 0)
        A, B = nn.Parameter(torch.ones(n, 2)), nn.Parameter(torch.ones(2, 4))
        return [LoRATriple(W.requires_grad_(False), A, B, scaling=1.0, name="q")]

    said = message(make, (3, 2))
    assert f"dimension 0 of its shape ({n}, 4) is cut so unevenly over the mesh of (3, 2) ranks" in said
    assert "give the layer a size that can be divided by 6, or let only one of FSDP2 and tensor parallelism" in said


def test_tensors_on_meshes_of_which_none_holds_all_ranks_are_refused():
    def make(mesh: DeviceMesh) -> list[LoRATriple]:
        places = (OnPartOfTheMesh("tp", Shard(0)), OnPartOfTheMesh("dp", Shard(0)), None)
        return triples_of([Spread((8, 6, 2), "linear", places)] * 2, torch.float32, mesh)

    found = on_threads(refuse, (2, 2), make, {})
    assert (
        "on device meshes of the ranks [0, 1] and [0, 2], and none of these meshes holds all of [0, 1, 2]" in found[0]
    )
    assert "[1, 3] and [2, 3]" in found[3]
    assert all("(2 layers: layer0, layer1)" in said for said in found)


def outside(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    first = DeviceMesh("cpu", [0, 1], _init_backend=False, _rank=rank)
    triples = triples_of([Spread((8, 6, 2), "linear", ((Shard(0),), (Shard(0),), (Shard(1),)))], torch.float32, first)
    assert mesh.size() == 4
    if rank < 2:
        DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1)
        return
    with pytest.raises(ValueError, match=r"ranks \[0, 1\], of which this process is none: build the optimizer on"):
        DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1)


def test_a_rank_outside_of_the_mesh_is_refused():
    on_threads(outside)
