"""Sharded tensors: which piece of W a rank holds, and bringing what is on other ranks.

DTensor is known here alone, and in split_output.py.

FSDP2 and tensor parallelism make a DTensor of a parameter: each rank has a block of it, which mesh and placements tell.
A W that moves in place is never gathered: each rank adds its rows of A times its columns of B to its block.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import product
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from deltaopt.all_or_nothing import Issued
from deltaopt.layouts import MatrixView

Block: TypeAlias = "tuple[tuple[int, int], ...]"
"""(start, stop) along each dimension of a whole tensor."""


def is_sharded(tensor: Tensor) -> bool:
    """Tell if this is a DTensor, as FSDP2 and tensor parallelism make of parameters."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # nothing is one before that was imported
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded_alike(one: Tensor, other: Tensor) -> bool:
    """Tell if each rank has the same part of two tensors, which have one shape then."""
    if is_sharded(one) and is_sharded(other):
        ours, theirs = _spec(one), _spec(other)
        return bool(one.shape == other.shape and ours.mesh == theirs.mesh and ours.placements == theirs.placements)
    return one.shape == other.shape and not is_sharded(one) and not is_sharded(other)


def gathered(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor; every rank has to call this. Another tensor comes back as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def put_whole_(tensor: Tensor, whole: Tensor) -> None:
    """Copy all of a tensor into a sharded one, each rank its part, or into another one."""
    tensor = tensor.detach()
    if is_sharded(tensor):
        module: Any = sys.modules["torch.distributed.tensor"]
        like: Any = tensor
        whole = whole.to(like.to_local().device)
        whole = module.distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    tensor.copy_(whole)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor; another tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Tell if two tensors begin at one place in memory; of a sharded one, which may be empty here, it is the object."""
    if one is other or is_sharded(one) or is_sharded(other):
        return one is other
    return one.data_ptr() == other.data_ptr()


def as_whole(tensor: Tensor) -> Tensor:
    """Return a tensor without numbers that has the shape and strides of all of a sharded one; another one as it is."""
    if not is_sharded(tensor):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def without_numbers(tensor: Tensor) -> Tensor:
    """Return a tensor without memory that is sharded as `tensor` is: what `with_local_part` needs of it."""
    return with_local_part(tensor, local_part(tensor.detach()).to("meta"))


def part_like(tensor: Tensor, W: Tensor, stored: Block) -> Tensor:
    """Return what a sharded W would have on this rank of a tensor of its shape, which may have more dimensions behind.

    All ranks have to call this, with tensors that are sharded alike.

    Args:
        tensor: whole or sharded in any way.
        W: sharded.
        stored: where this rank's part of W lies in it.
    """
    if is_sharded(tensor):
        if is_sharded_alike(tensor, W):
            return local_part(tensor)
        tensor = gather_all([tensor])[0]
    return tensor[tuple(slice(*bounds) for bounds in stored)]


def with_local_part(tensor: Tensor, local: Tensor, trailing: Sequence[int] = ()) -> Tensor:
    """Return a tensor that is sharded as `tensor` is, with this rank's part `local`; a `local` next to a plain one.

    Args:
        tensor: tells shape, mesh and placements.
        local: of the shape of the local part of `tensor`, with `trailing` dimensions behind them.
        trailing: whole dimensions behind those of `tensor`.
    """
    if not is_sharded(tensor):
        return local
    module: Any = sys.modules["torch.distributed.tensor"]
    like: Any = tensor
    shape = torch.Size((*tensor.shape, *trailing))
    stride = torch.empty(shape, device="meta").stride()
    sharded: Tensor = module.DTensor.from_local(
        local.contiguous(), like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )
    return sharded


def ranks_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the global ranks that hold parts of these tensors, ascending; none where nothing is sharded."""
    meshes = {id(mesh): mesh for tensor in tensors if is_sharded(tensor) for mesh in [_spec(tensor).mesh]}
    return tuple(sorted({int(rank) for mesh in meshes.values() for rank in mesh.mesh.flatten().tolist()}))


def absent_ranks(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the ranks, of those that hold parts of these tensors, that this job does not have; none if it has all."""
    import torch.distributed as dist

    ranks = ranks_of(tensors)
    here = dist.get_world_size() if ranks and dist.is_initialized() else 1
    return tuple(rank for rank in ranks if rank >= here)


def place_of(tensor: Tensor) -> str:
    """Return a text that is the same on all ranks that hold the same part of a sharded tensor; empty for another one.

    Ranks of two meshes, as FSDP2 has on top of tensor parallelism, hold the same of what both have sharded alike.
    """
    if not is_sharded(tensor):
        return ""
    spec = _spec(tensor)
    at = zip(spec.mesh.get_coordinate(), spec.mesh.shape, spec.placements, strict=True)
    return ", ".join(f"{place} of {size}" for place, size, placement in at if not placement.is_replicate())


class Piece(NamedTuple):
    """The block of W's matrix, or of the part of it that moves, that one rank holds.

    Attributes:
        whole: the shape of all of the matrix, (c, d) or (e, c, d).
        block: where this rank's block lies in it.
        view: of this rank's tensor as the block: the same layout, with the rows and columns that are here.
        stored: where this rank's tensor lies in the stored W.
        is_first: True on one of the ranks that hold the same block, to be counted once.
    """

    whole: tuple[int, ...]
    block: Block
    view: MatrixView
    stored: Block
    is_first: bool

    def cut(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """View the rows of A (..., c, r) and the columns of B (..., r, d) whose product is this block."""
        return self.rows_of(A), self.columns_of(B)

    def rows_of(self, A: Tensor) -> Tensor:
        """View the rows of a (..., c, r) that are those of this block."""
        *lead, rows, _ = (slice(*bounds) for bounds in self.block)
        return A[(*lead, rows)]

    def columns_of(self, B: Tensor) -> Tensor:
        """View the columns of a (..., r, d) that are those of this block."""
        *lead, _, columns = (slice(*bounds) for bounds in self.block)
        return B[(*lead, slice(None), columns)]

    def lead_of(self, stack: Tensor) -> Tensor:
        """View the matrices of a stack (e, ...) that are those of this block; a single matrix as it is."""
        return stack[tuple(slice(*bounds) for bounds in self.block[:-2])]

    def block_of(self, matrix: Tensor) -> Tensor:
        """View this block of a whole (..., c, d)."""
        return matrix[tuple(slice(*bounds) for bounds in self.block)]

    def place_of_part(self) -> tuple[list[int], list[int] | None]:
        """Return where the part of W that moves begins on this rank, and the whole part's shape; None if W's own."""
        if self.view.moves_all:
            return [start for start, _ in self.stored], None
        return [start for start, _ in self.block], list(self.whole)


def piece_of(W: Tensor, view: MatrixView) -> Piece | None:
    """Return the piece of a sharded W that is on this rank; None of another W.

    Args:
        W: with placements of which `sharding_problems` says nothing.
        view: of all of W as a matrix.
    """
    if not is_sharded(W):
        return None
    spec = _spec(W)
    return _piece(tuple(W.shape), tuple(spec.mesh.shape), tuple(spec.mesh.get_coordinate()), spec.placements, view)


@lru_cache(maxsize=4096)
def _piece(
    shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: Any, view: MatrixView
) -> Piece:
    stored = tuple(_bounds(n, dim, mesh, coordinate, placements) for dim, n in enumerate(shape))
    local_view = view
    block = list(stored)
    if view.layout in ("transposed", "embedding", "transposed_experts"):
        block[-1], block[-2] = block[-2], block[-1]
    elif view.layout == "conv":
        block = [stored[0], (0, prod(shape[1:]))]
    elif view.layout == "conv_in_order":
        k = shape[-1]
        block = [(stored[0][0] * k, stored[0][1] * k), (0, prod(shape[1:]) // k)]
    if not view.moves_all:
        bounds = []
        for dim, moving in ((-2, view.rows), (-1, view.columns)):
            first, last = block[dim]
            start, stop = moving if moving is not None else (0, _matrix_shape(shape, view)[dim])
            low = min(max(first, start), last)
            high = max(min(last, stop), low)
            bounds.append((low - first, high - first))
            low_in_part = min(max(low - start, 0), stop - start)
            block[dim] = (low_in_part, low_in_part + high - low)
        local_view = MatrixView(view.layout, *bounds)
    is_first = all(at == 0 for at, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())
    return Piece(_matrix_shape(shape, view), tuple(block), local_view, stored, is_first)


def _matrix_shape(shape: tuple[int, ...], view: MatrixView) -> tuple[int, ...]:
    return tuple(view.weight(torch.empty(shape, device="meta")).shape)


def _bounds(
    n: int, dim: int, mesh: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]
) -> tuple[int, int]:
    """Return where the run of the n entries along a dimension that are on this rank begins and ends."""
    here = _entries(n, dim, mesh, coordinate, placements)
    return (int(here[0]), int(here[-1]) + 1) if len(here) else (0, 0)


def _entries(n: int, dim: int, mesh: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any]) -> Tensor:
    """Return the places of the entries along a dimension that are on this rank."""
    here = torch.arange(n, device="cpu")
    for size, at, placement in zip(mesh, coordinate, placements, strict=True):
        if _shards(placement, dim):
            here = _split_entries(here, size, placement)[at]
    return here


def _split_entries(here: Tensor, size: int, placement: Any) -> list[Tensor]:
    """Cut a vector as a placement cuts its dimension for this many ranks."""
    return _along_zero(placement)._split_tensor(here, size, with_padding=False, contiguous=False)[0]  # type: ignore[no-any-return]


def _shards(placement: Any, dim: int) -> bool:
    """Tell if a placement shards this dimension: `Shard`, or the `_StridedShard` of FSDP2 on tensor parallelism."""
    return not placement.is_replicate() and not placement.is_partial() and placement.dim == dim


def _along_zero(placement: Any) -> Any:
    """Return the same placement for dimension 0."""
    if not _is_strided(placement):
        return _plain_shard()
    module: Any = sys.modules["torch.distributed.tensor.placement_types"]
    return module._StridedShard(0, split_factor=placement.split_factor)


def _spec(tensor: Tensor) -> Any:
    return tensor._spec  # type: ignore[attr-defined]


def sharded_matrix(matrix: Tensor, piece: Piece, W: Tensor) -> Tensor:
    """Return the sharded tensor whose block on each rank is `matrix`; all ranks have to call this.

    Where torch has no placement for such blocks (a part of W alone, or a convolution in loralib's order), they are
    gathered, and all of the matrix comes back.

    Args:
        matrix: this rank's block, in the order of the rows and columns of the whole matrix.
        piece: tells where it lies.
        W: sharded.
    """
    layout = piece.view.layout if piece.view.moves_all else None
    if layout in ("transposed", "embedding", "transposed_experts"):
        return with_local_part(W, matrix.mT).mT
    if layout == "conv":
        return with_local_part(W, matrix.view(local_part(W).shape)).flatten(1)
    if layout in ("linear", "experts"):
        return with_local_part(W, matrix)
    return placed_in_whole(matrix, piece, W)


def sharding_problems(letter: str, tensor: Tensor, view: MatrixView | None = None) -> list[str]:
    """Say why the parts of a sharded tensor cannot be read and written where they are; alike on all ranks of its mesh.

    Args:
        letter: names it.
        tensor: a DTensor.
        view: of W as a matrix; None for a factor, of which all can be brought.
    """
    spec = _spec(tensor)
    kinds = f"a DTensor (FSDP2, tensor parallelism) with the placements {tuple(spec.placements)}"
    if spec.mesh.get_coordinate() is None:
        ranks = sorted(spec.mesh.mesh.flatten().tolist())
        return [
            f"{letter} is {kinds} on a device mesh of the ranks {ranks}, of which this process is none: build the "
            "optimizer on the ranks of that mesh alone"
        ]
    if any((spec.mesh.mesh.diff(dim=dim) < 0).any() for dim in range(spec.mesh.ndim)):
        return [
            f"{letter} is {kinds} on a device mesh with the ranks {spec.mesh.mesh.tolist()}: torch hands out parts in "
            "the order of the ranks, not in that of the mesh. Build the mesh with ascending ranks along each dimension"
        ]
    if any(placement.is_partial() for placement in spec.placements):
        return [
            f"{letter} is {kinds}: its parts have yet to be summed up over the ranks, so that no rank has its numbers. "
            "Redistribute it to Shard or Replicate before the optimizer is built"
        ]
    shape, mesh = tuple(tensor.shape), tuple(spec.mesh.shape)
    if (found := _uneven(shape, mesh, spec.placements)) is not None:
        dim, parts = found
        return [
            f"{letter} is {kinds}, and dimension {dim} of its shape {shape} is cut so unevenly over the mesh of {mesh} "
            "ranks that the placements do not say which part a rank has: give the layer a size that can be divided by "
            f"{parts}, or let only one of FSDP2 and tensor parallelism shard it"
        ]
    if view is None:
        return []
    sharded = {placement.dim for placement in spec.placements if not placement.is_replicate()}
    if view.layout in ("conv", "conv_in_order") and sharded - {0}:
        return [
            f"{letter} is {kinds}, and a convolution's W can be moved in place where it is sharded along dimension 0, "
            "its output channels, alone: shard it there (fully_shard does), or keep this layer whole"
        ]
    if (several := _scattered(shape, mesh, spec.placements)) is not None:
        return [
            f"{letter} is {kinds}, which give a rank several runs of dimension {several}, and only one run can be "
            "moved in place: redistribute it to Shard, as parallelize_module and fully_shard have it, or keep this "
            "layer whole"
        ]
    return []


@lru_cache(maxsize=4096)
def _uneven(shape: tuple[int, ...], mesh: tuple[int, ...], placements: Any) -> tuple[int, int] | None:
    """Return the dimension that FSDP2 cuts in another way than the placements say, and into how many parts.

    FSDP2 cuts what tensor parallelism has left on a rank. `_StridedShard` says that from the other side, which comes to
    the same unless the last parts have fewer entries than others, or none.
    """
    for k, placement in enumerate(placements):
        if not _is_strided(placement):
            continue
        dim = placement.dim
        later = prod(
            size for size, other in zip(mesh[k + 1 :], placements[k + 1 :], strict=True) if _shards(other, dim)
        )
        if placement.split_factor != later:
            continue
        for at in product(*map(range, mesh)):
            cut = torch.arange(shape[dim], device="cpu")
            for size, place, other in reversed(list(zip(mesh, at, placements, strict=True))):
                if _shards(other, dim):
                    cut = _split_entries(cut, size, _plain_shard())[place]
            if not torch.equal(cut, _entries(shape[dim], dim, mesh, at, placements)):
                return dim, prod(size for size, other in zip(mesh, placements, strict=True) if _shards(other, dim))
    return None


@lru_cache(maxsize=4096)
def _scattered(shape: tuple[int, ...], mesh: tuple[int, ...], placements: Any) -> int | None:
    """Return a dimension of which some rank has several runs."""
    for dim in {placement.dim for placement in placements if _is_strided(placement)}:
        for at in product(*map(range, mesh)):
            here = _entries(shape[dim], dim, mesh, at, placements)
            if len(here) and int(here[-1] - here[0]) != len(here) - 1:
                return int(dim)
    return None


def _is_strided(placement: Any) -> bool:
    module: Any = sys.modules["torch.distributed.tensor.placement_types"]
    return isinstance(placement, module._StridedShard)


def _plain_shard() -> Any:
    module: Any = sys.modules["torch.distributed.tensor.placement_types"]
    return module.Shard(0)


def mesh_problem(tensors: Sequence[Tensor]) -> str | None:
    """Say why the ranks of these tensors do not form one group, of which all know alike who is in it."""
    meshes = {mesh for tensor in tensors if is_sharded(tensor) for mesh in [_spec(tensor).mesh]}
    ranks = ranks_of(tensors)
    if not meshes or any(mesh.size() == len(ranks) for mesh in meshes):
        return None
    found = sorted({tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in meshes})
    named = " and ".join(f"{list(held)}" for held in found)
    return (
        f"its tensors are DTensors (FSDP2, tensor parallelism) on device meshes of the ranks {named}, and none of "
        f"these meshes holds all of {list(ranks)}: shard W, A and B over one mesh, or replicate them along its other "
        "dimension"
    )


def at_hand(factor: Tensor, side: int, W: Tensor, view: MatrixView) -> bool:
    """Tell if this rank's part of a stored factor is just what its block of W needs; alike on all ranks.

    Args:
        factor: A (c, r) or B (r, d), a tensor that is no function of others.
        side: the dimension that it has in common with W's matrix: 0 of A, 1 of B.
        W: sharded.
        view: of all of W as a matrix.
    """
    if not is_sharded(factor) or not view.moves_all or view.layout not in ("linear", "transposed", "embedding"):
        return False
    ours, theirs, stored_side = _spec(factor), _spec(W), side if view.layout == "linear" else 1 - side
    return ours.mesh == theirs.mesh and all(
        _shards(placement, side) and _split(placement) == _split(of_W)
        if _shards(of_W, stored_side)
        else placement.is_replicate()
        for placement, of_W in zip(ours.placements, theirs.placements, strict=True)
    )


def parts_unlinked(factor: Tensor, W: Tensor) -> tuple[int, int] | None:
    """Say how a factor lies next to a sharded W if nothing keeps it the same for all ranks of W.

    A plain factor is the whole of it on each rank. One on a mesh of fewer ranks, as FSDP2 makes of what tensor
    parallelism has left whole, has equal parts on the ranks that have the same place in their mesh.

    Returns:
        The number of parts, and which of them is here; None if the factor's mesh holds all ranks of W.
    """
    if not is_sharded(factor):
        return 1, 0
    mesh, ranks = _spec(factor).mesh, set(_spec(W).mesh.mesh.flatten().tolist())
    if ranks <= set(mesh.mesh.flatten().tolist()):
        return None
    at = 0
    for place, size in zip(mesh.get_coordinate(), mesh.shape, strict=True):
        at = at * size + place
    return mesh.size(), at


def _split(placement: Any) -> tuple[type, int]:
    return type(placement), getattr(placement, "split_factor", 1)


def highest(numbers: Tensor, group: Any, issued: Issued | None = None) -> Tensor:
    """Return the largest of each number on all ranks of a group.

    Args:
        numbers: of this rank; they may be overwritten.
        group: the process group.
        issued: of a call that an exception may let begin again.
    """
    return _all_reduced(numbers, "MAX", group, Issued() if issued is None else issued.again())


def summed_over_ranks(
    numbers: Sequence[Tensor], sharded: Sequence[Tensor], issued: Issued | None = None
) -> list[Tensor]:
    """Add up tensors of one shape over all ranks that hold parts of a sharded one, by one collective for each mesh.

    Args:
        numbers: one for each of `sharded`.
        sharded: DTensors.
        issued: of a call that an exception may let begin again.
    """
    issued = Issued() if issued is None else issued.again()
    meshes: dict[Any, list[int]] = {}
    for i, tensor in enumerate(sharded):
        meshes.setdefault(_spec(tensor).mesh, []).append(i)
    found = list(numbers)
    for mesh, members in meshes.items():
        total = torch.stack([numbers[i] for i in members])
        for dim in range(mesh.ndim):
            total = _all_reduced(total, "SUM", mesh.get_group(dim), issued)
        for i, number in zip(members, total.unbind(), strict=True):
            found[i] = number
    return found


def placed_in_whole(part: Tensor, piece: Piece, W: Tensor) -> Tensor:
    """Return all of a matrix of which each rank has a block, by one sum with zeros over the ranks of W.

    Args:
        part: this rank's block; it may have further dimensions behind those of the matrix.
        piece: where it lies.
        W: tells which ranks hold the others.
    """
    whole = part.new_zeros((*piece.whole, *part.shape[len(piece.whole) :]))
    if piece.is_first:
        piece.block_of(whole).copy_(part)
    return summed_over_ranks([whole], [W])[0]


class Sharding(NamedTuple):
    """Which block of a W is on this rank, and how all of it is sharded.

    Attributes:
        piece: None of a W that is here as a whole.
        pattern: a tensor without numbers that is sharded as W is; None where W is whole, and in a copy by pickle.
    """

    piece: Piece | None
    pattern: Tensor | None

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """The ranks that hold what is not here; None where that is not known."""
        if self.piece is None:
            return ()
        return None if self.pattern is None else ranks_of([self.pattern])

    def moved_to(self, there: Sharding, part: Tensor) -> Tensor:
        """Return what this rank has of a tensor that lies as W, once W is sharded as in `there`.

        All of it is gathered for a moment, unless it is here; all ranks have to call this.

        Args:
            there: with a piece.
            part: what this rank has of it now.
        """
        assert there.piece is not None
        old, new = self.piece, there.piece
        if old is None:
            whole = part
        elif old.view.moves_all:
            assert self.pattern is not None
            whole = gather_all([self.pattern], [part])[0]
        else:
            assert self.pattern is not None
            placed = placed_in_whole(part.contiguous().unsqueeze(-1).view(torch.uint8), old, self.pattern)
            whole = placed.view(part.dtype).squeeze(-1)
        return whole[tuple(slice(*bounds) for bounds in (new.stored if new.view.moves_all else new.block))].clone()


def gather_all(
    tensors: Sequence[Tensor], locals_: Sequence[Tensor] | None = None, issued: Issued | None = None
) -> list[Tensor]:
    """Return all of each sharded tensor, by one collective for each dimension of a mesh along which any is sharded.

    Every rank has to call this with its parts of the same tensors. Plain and replicated ones come back as they are.

    Args:
        tensors: of any dtypes and shapes.
        locals_: other values of the local parts, in the order of `tensors`. Default: their own.
        issued: of a call that an exception may let begin again, with the same tensors and values.
    """
    issued = Issued() if issued is None else issued.again()
    found = [local_part(tensor.detach()) for tensor in tensors] if locals_ is None else list(locals_)
    by_mesh: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_sharded(tensor):
            by_mesh.setdefault(_spec(tensor).mesh, []).append(i)
    for mesh, members in by_mesh.items():
        # A later dimension of the mesh cuts what an earlier one has left, so it is put together before.
        for mesh_dim in reversed(range(mesh.ndim)):
            cut = [i for i in members if not _spec(tensors[i]).placements[mesh_dim].is_replicate()]
            if cut:
                cuts = [_cut(tensors[i], mesh_dim) for i in cut]
                for i, whole in zip(cut, _gather(cuts, [found[i] for i in cut], mesh, mesh_dim, issued), strict=True):
                    found[i] = whole
    return found


class _Cut(NamedTuple):
    """How one dimension of a mesh cuts what the earlier ones have left of a tensor here.

    Attributes:
        dim: of the tensor, that is cut.
        shapes: of the parts, by rank.
        order: the places of the parts' entries, one part after the other; None if that is their order.
    """

    dim: int
    shapes: list[list[int]]
    order: Tensor | None

    def put_together(self, parts: Sequence[Tensor]) -> Tensor:
        """Return what was cut."""
        whole = torch.cat(list(parts), self.dim)
        return whole if self.order is None else whole.index_select(self.dim, self.order.argsort().to(whole.device))


def _cut(tensor: Tensor, mesh_dim: int) -> _Cut:
    spec = _spec(tensor)
    return _known_cut(
        tuple(tensor.shape), tuple(spec.mesh.shape), tuple(spec.mesh.get_coordinate()), spec.placements, mesh_dim
    )


@lru_cache(maxsize=4096)
def _known_cut(
    shape: tuple[int, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: Any, mesh_dim: int
) -> _Cut:
    before = [
        len(_entries(n, dim, mesh[:mesh_dim], coordinate[:mesh_dim], placements[:mesh_dim]))
        for dim, n in enumerate(shape)
    ]
    placement = placements[mesh_dim]
    parts = _split_entries(torch.arange(before[placement.dim], device="cpu"), mesh[mesh_dim], placement)
    shapes = [[*before[: placement.dim], len(part), *before[placement.dim + 1 :]] for part in parts]
    order = torch.cat(parts)
    in_order = torch.equal(order, torch.arange(len(order), device="cpu"))
    return _Cut(placement.dim, shapes, None if in_order else order)


def _gather(cuts: Sequence[_Cut], parts: Sequence[Tensor], mesh: Any, mesh_dim: int, issued: Issued) -> list[Tensor]:
    """Gather the parts of several tensors, as bytes: no backend can send every dtype.

    Where there are many more ranks than rows an all-gather would be padded to a row for each rank. A sum with zeros
    is as exact, of bytes, and sends twice the numbers however many ranks there are.
    """
    n, group, here = mesh.size(mesh_dim), mesh.get_group(mesh_dim), mesh.get_local_rank(mesh_dim)
    sizes = [[prod(shape) * part.element_size() for shape in cut.shapes] for cut, part in zip(cuts, parts, strict=True)]
    totals = [sum(by_rank[rank] for by_rank in sizes) for rank in range(n)]
    mine = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])
    longest = max(totals)
    if n * longest > 2 * sum(totals):
        starts = [sum(totals[:rank]) for rank in range(n)]
        received = mine.new_zeros(sum(totals))
        received[starts[here] : starts[here] + totals[here]] = mine
        received = _all_reduced(received, "SUM", group, issued)
    else:
        starts = [rank * longest for rank in range(n)]
        padded = torch.cat([mine, mine.new_zeros(longest - mine.numel())]) if mine.numel() < longest else mine
        received = _all_gathered(padded, n, group, issued)
    read, wholes = list(starts), []
    for cut, part, by_rank in zip(cuts, parts, sizes, strict=True):
        shards = []
        for rank, (shape, nbytes) in enumerate(zip(cut.shapes, by_rank, strict=True)):
            # A clone, since a view of another dtype has to begin at a multiple of its size.
            shards.append(received[read[rank] : read[rank] + nbytes].clone().view(part.dtype).view(shape))
            read[rank] += nbytes
        wholes.append(cut.put_together(shards))
    return wholes


# The groups' own methods, which are in C: an issue within torch's functions, in Python, could not be noted with it.


def _all_reduced(numbers: Tensor, operation: str, group: Any, issued: Issued) -> Tensor:
    import torch.distributed as dist

    options = dist.AllreduceOptions()
    options.reduceOp, options.asyncOp = getattr(dist.ReduceOp, operation), False
    reduced: Tensor = issued.output(numbers, partial(group.allreduce, [numbers], options))
    return reduced


def _all_gathered(part: Tensor, n: int, group: Any, issued: Issued) -> Tensor:
    from torch._C._distributed_c10d import AllgatherOptions

    options = AllgatherOptions()
    options.asyncOp = False
    gather = getattr(group, "all_gather_single", None) or group._allgather_base  # the name since torch 2.13
    output = part.new_empty(n * part.numel())
    whole: Tensor = issued.output(output, partial(gather, output, part, options))
    return whole
