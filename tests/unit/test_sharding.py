"""Which block of W a rank holds, and bringing all of sharded tensors, on meshes of threads."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from deltaopt.layouts import MatrixView
from deltaopt.sharding import gather_all, piece_of
from tests.support.sharded_layers import placed
from tests.support.tensor_parallel import fully_sharded_weight
from tests.support.threads import noted, on_threads

pytestmark = pytest.mark.extra

COLLECTIVES = ("allreduce", "all_gather_single" if hasattr(dist, "all_gather_single") else "_allgather_base")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int16, torch.uint8)


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).view(shape).to(dtype)


def placements(dims: int) -> st.SearchStrategy:
    return st.tuples(*[st.sampled_from([Shard(0), Shard(1), Replicate()])] * dims)


def gather_on(rank: int, mesh_shape: tuple[int, ...], cases: list) -> None:
    mesh = init_device_mesh("cpu", mesh_shape)
    wholes = [numbers(shape, dtype) for shape, dtype, _ in cases]
    parts = [placed(tensor, mesh, case[2]) for tensor, case in zip(wholes, cases, strict=True)]
    found = gather_all(parts)
    for tensor, value, case in zip(wholes, found, cases, strict=True):
        assert value.dtype == tensor.dtype, case
        assert torch.equal(value, tensor), case


@settings(max_examples=15)
@given(
    mesh=st.sampled_from([(4,), (2, 2), (1, 4)]),
    data=st.data(),
)
def test_gather_all_brings_everything_by_one_collective_for_each_dimension_of_the_mesh(mesh, data):
    size = st.integers(1, 9)
    cases = data.draw(
        st.lists(st.tuples(st.tuples(size, size), st.sampled_from(DTYPES), placements(len(mesh))), min_size=1)
    )
    needed = sum(any(case[2][dim] != Replicate() for case in cases) for dim in range(len(mesh)))
    with noted(*COLLECTIVES) as calls:
        on_threads(gather_on, mesh, cases)
    assert len(calls) == 4 * needed


def gather_strided(rank: int, sizes: list[int]) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    wholes = [numbers((n, 3), torch.float32) for n in sizes]
    parts = [fully_sharded_weight(W, mesh, 0) for W in wholes]
    found = gather_all(parts)
    assert all(map(torch.equal, found, wholes))
    doubled = gather_all(parts, [part.to_local() * 2 for part in parts])
    assert all(map(torch.equal, doubled, [W * 2 for W in wholes]))


def test_gather_all_puts_shards_of_fsdp2_on_tensor_parallelism_in_order():
    with noted(*COLLECTIVES) as calls:
        on_threads(gather_strided, [1, 2, 3, 4, 5, 7, 8, 13])
    assert len(calls) == 4 * 2 * 2


def gather_on_two_meshes(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    W, A = numbers((5, 4), torch.float32), numbers((3, 4), torch.float32)
    parts = [placed(W, mesh, [Shard(0), Shard(1)]), placed(A, mesh["tp"], [Shard(0)]), A]
    assert all(map(torch.equal, gather_all(parts), [W, A, A]))


def test_gather_all_takes_tensors_of_several_meshes():
    with noted(*COLLECTIVES) as calls:
        on_threads(gather_on_two_meshes)
    assert len(calls) == 4 * 3


def pieces_on(rank: int, mesh_shape: tuple[int, ...], cases: list) -> None:
    mesh = init_device_mesh("cpu", mesh_shape)
    for shape, layout, kinds, rows in cases:
        W = numbers(shape, torch.float64)
        view = MatrixView(layout, rows)
        matrix = view.weight(W)
        sharded = placed(W, mesh, kinds)
        piece = piece_of(sharded, view)
        bounds = tuple(slice(*ends) for ends in piece.block)
        here = piece.view.weight(sharded.to_local())
        assert torch.equal(here, matrix[bounds]), (shape, layout, kinds, rows)
        A, B = torch.randn(matrix.shape[0], 2), torch.randn(2, matrix.shape[1])
        assert torch.equal(torch.mm(*piece.cut(A, B)), (A[bounds[0]] @ B[:, bounds[1]]))


@settings(max_examples=15)
@given(mesh=st.sampled_from([(4,), (2, 2)]), data=st.data())
def test_a_piece_is_the_block_of_the_matrix_that_is_here(mesh, data):
    size = st.integers(1, 9)
    cases = []
    for _ in range(data.draw(st.integers(1, 6))):
        layout = data.draw(st.sampled_from(["linear", "transposed"]))
        shape = data.draw(st.tuples(size, size))
        c = shape[0] if layout == "linear" else shape[1]
        start = data.draw(st.integers(0, c - 1))
        rows = data.draw(st.sampled_from([None, (start, c)]))
        cases.append((shape, layout, data.draw(placements(len(mesh))), rows))
    on_threads(pieces_on, mesh, cases)
