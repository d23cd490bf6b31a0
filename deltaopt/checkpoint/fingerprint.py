"""Telling whether a weight is the one that was saved, without reading all of it and without waiting for a GPU.

A fixed set of positions, spread over the whole tensor with one in each row at least, is read, and their bits are
hashed with the position. The hashes are summed, so that those of the shards of a tensor add up to the tensor's own.
So do those of `whole_hash`, which reads every element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, reduce
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaopt.all_or_nothing import Issued
from deltaopt.sharding import Piece, summed_over_ranks
from deltaopt.tensors import outside_inference_mode

SAMPLES = 4096
"""How many elements are read, if there are not more rows. A tensor with no more elements is read as a whole."""

BLOCK_ELEMENTS = 1 << 18
"""How many elements `whole_hash` reads at a time."""

STACKED_ELEMENTS = 1 << 15
"""How many elements of several tensors are hashed at a time, if one has no more: a CPU's cache holds them."""

KEPT_PLACES = 1 << 15
"""The places of a shape are kept if they are no more than that."""

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint:
    """Shape, dtype and a hash of a tensor's contents.

    Args:
        tensor: a tensor of float16, bfloat16, float32 or float64.
        whole: hashes all elements, which waits for the device, as `whole_hash`. None: a sample is hashed, and the hash
            stays on the device until it is asked for.
    """

    def __init__(self, tensor: Tensor, whole: Callable[[Tensor], int] | None = None) -> None:
        content = whole(tensor) if whole is not None else content_hash(tensor.detach())
        self._describe(tensor.shape, tensor.dtype, content)

    @classmethod
    def of_each(cls, tensors: Sequence[Tensor]) -> list[Fingerprint]:
        """Take the fingerprint of each tensor, of a sample; tensors of one shape are hashed together."""
        hashes = content_hashes([tensor.detach() for tensor in tensors])
        return [cls._of(tensor.shape, tensor.dtype, content) for tensor, content in zip(tensors, hashes, strict=True)]

    @classmethod
    def of_pieces(
        cls,
        parts: Sequence[Tensor],
        pieces: Sequence[Piece],
        sharded: Sequence[Tensor],
        issued: Issued | None = None,
    ) -> list[Fingerprint]:
        """Take the fingerprint of each sharded W, or of its part that moves, as a whole; all ranks have to call this.

        Args:
            parts: this rank's part of each.
            pieces: where that lies.
            sharded: each W, which tells what ranks hold its other parts.
            issued: of a call that an exception may let begin again.
        """
        places = [piece.place_of_part() for piece in pieces]
        shapes = [list(W.shape) if shape is None else shape for W, (_, shape) in zip(sharded, places, strict=True)]
        own = [
            content_hash(part.detach(), start, shape) * piece.is_first
            for part, piece, (start, _), shape in zip(parts, pieces, places, shapes, strict=True)
        ]
        hashes = summed_over_ranks(own, sharded, issued)
        return [cls._of(shape, part.dtype, h) for shape, part, h in zip(shapes, parts, hashes, strict=True)]

    @classmethod
    def _of(cls, shape: Sequence[int], dtype: torch.dtype, content: Tensor) -> Fingerprint:
        twin = cls.__new__(cls)
        twin._describe(shape, dtype, content)
        return twin

    def _describe(self, shape: Sequence[int], dtype: torch.dtype, content: Tensor | int) -> None:
        self.shape = list(shape)
        self.dtype = str(dtype).removeprefix("torch.")
        self._content = content

    def record(self) -> dict[str, Any]:
        """Plain numbers and strings, to be saved and to be compared. Waits for the device."""
        self._content = int(self._content)
        return {"shape": self.shape, "dtype": self.dtype, "hash": self._content}

    def __getstate__(self) -> dict[str, Any]:
        return self.record()

    def __setstate__(self, record: dict[str, Any]) -> None:
        self.shape, self.dtype, self._content = list(record["shape"]), record["dtype"], record["hash"]

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Fingerprint:
        """The fingerprint that `record` was made of."""
        twin = cls.__new__(cls)
        twin.__setstate__(record)
        return twin


def content_hash(
    part: Tensor,
    start: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
    samples: int | None = SAMPLES,
) -> Tensor:
    """Hash of sampled elements, a 0-d int64 on the tensor's device. Exact: one changed bit in the sample shows.

    Args:
        part: a tensor of float16, bfloat16, float32 or float64 with any strides; or a rectangular piece of one.
        start: where the piece begins in the whole tensor. The hashes of disjoint pieces that make up the whole add
            up to the hash of the whole (int64, wrapping around).
        shape: of the whole tensor.
        samples: how many elements of the whole are read, or one in each row if there are more rows; None for all.
    """
    if start is None:
        return content_hashes([part], samples)[0]
    if part.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=part.device)
    return _piece_hash(part.view(_WORDS[part.element_size()]), start, part.shape if shape is None else shape, samples)


def content_hashes(tensors: Sequence[Tensor], samples: int | None = SAMPLES) -> list[Tensor]:
    """Return the `content_hash` of each tensor. Tensors of one shape are hashed in few launches."""
    kinds: dict[tuple[torch.Size, torch.dtype, torch.device], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(i)
    hashes: dict[int, Tensor] = {}
    for (shape, _, device), members in kinds.items():
        places = _places(tuple(shape), samples, device)
        count = max(1, STACKED_ELEMENTS // max(1, places.mixed.numel()))
        for first in range(0, len(members), count):
            block = members[first : first + count]
            words = torch.stack([_words(tensors[i], places.positions) for i in block])
            hashes |= zip(block, _mixed_(words ^ places.mixed).sum(-1).unbind(), strict=True)
    return [hashes[i] for i in range(len(tensors))]


def _words(tensor: Tensor, positions: Tensor | None) -> Tensor:
    """Return the bits of the elements at these positions of the flattened tensor as integers; None for all of it."""
    words = tensor.view(_WORDS[tensor.element_size()])
    if positions is None:
        return words.reshape(-1)
    if words.is_contiguous():
        return words.view(-1).index_select(0, positions)
    return words[_index(positions, words.shape)]


def _piece_hash(words: Tensor, start: Sequence[int], shape: Sequence[int], samples: int | None) -> Tensor:
    """Return what a piece that begins at `start` adds to the hash of a tensor of this shape."""
    if words.device.type == "cpu" and _is_plain_mode():
        many = prod(shape) > KEPT_PLACES if samples is None else shape[0] > KEPT_PLACES
        found = (_places_in_piece if many else _known_places_in_piece)(
            tuple(start), tuple(words.shape), tuple(shape), samples
        )
        return _mixed_(words[found.indices].to(torch.int64) ^ found.mixed).sum()
    # How many places are inside is not asked, as that waits for the device.
    positions = sampled_positions(shape, samples, words.device)
    index, inside = _index_in_piece(positions, start, words.shape, shape)
    index = tuple(i.clamp(0, n - 1) for i, n in zip(index, words.shape, strict=True))
    return (_mixed_(_mixed(positions) ^ words[index].to(torch.int64)) * inside).sum()


class _PiecePlaces(NamedTuple):
    """The places at which a piece is read.

    Attributes:
        indices: in the piece, for each dimension.
        mixed: the positions in the flattened whole tensor, scrambled.
    """

    indices: tuple[Tensor, ...]
    mixed: Tensor


def _places_in_piece(
    start: tuple[int, ...], piece: tuple[int, ...], shape: tuple[int, ...], samples: int | None
) -> _PiecePlaces:
    with outside_inference_mode():
        positions = sampled_positions(shape, samples, torch.device("cpu"))
        index, inside = _index_in_piece(positions, start, piece, shape)
        return _PiecePlaces(tuple(i[inside] for i in index), _mixed_(positions[inside]))


_known_places_in_piece = lru_cache(maxsize=64)(_places_in_piece)


def _index_in_piece(
    positions: Tensor, start: Sequence[int], piece: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return flat positions as indices that count from the piece's beginning, and which of them are within it."""
    index = tuple(i - first for i, first in zip(_index(positions, shape), start, strict=True))
    within = [(i >= 0) & (i < n) for i, n in zip(index, piece, strict=True)]
    return index, reduce(torch.logical_and, within)


def _index(positions: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Return flat positions as an index in each dimension."""
    # torch.unravel_index says the same, but copies the shape to the device, which waits for it.
    return tuple(positions // prod(shape[i + 1 :]) % n for i, n in enumerate(shape))


class _Places(NamedTuple):
    """The places at which tensors of one shape are read.

    Attributes:
        positions: in the flattened tensor; None where all of it is read.
        mixed: the positions, scrambled.
    """

    positions: Tensor | None
    mixed: Tensor


def _places(shape: tuple[int, ...], samples: int | None, device: torch.device) -> _Places:
    """Return the places for a shape. On a CPU they are computed once: layers have few shapes."""
    n = prod(shape)
    whole = samples is None or n <= samples
    many = n > BLOCK_ELEMENTS if whole else len(shape) > 1 and shape[0] > KEPT_PLACES
    if device.type != "cpu" or many or not _is_plain_mode():
        positions = sampled_positions(shape, samples, device)
        return _Places(None if whole else positions, _mixed(positions))
    if whole:
        return _Places(None, _mixed_range(1 << max(n - 1, 0).bit_length())[:n])
    return _sampled_places(shape, samples)


@lru_cache(maxsize=64)
def _sampled_places(shape: tuple[int, ...], samples: int) -> _Places:
    with outside_inference_mode():
        positions = sampled_positions(shape, samples, torch.device("cpu"))
        return _Places(positions, _mixed(positions))


@cache  # at most twice BLOCK_ELEMENTS in all
def _mixed_range(n: int) -> Tensor:
    with outside_inference_mode():
        return _mixed(torch.arange(n, device="cpu"))


def whole_hash(tensor: Tensor) -> int:
    """Return the hash of all elements. Waits for the device."""
    return int(whole_hash_part(tensor, (0,) * tensor.dim(), tensor.shape))


def whole_hash_part(part: Tensor, start: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return what a rectangular piece adds to the `whole_hash` of a tensor: a 0-d int64 on the piece's device.

    The sum over disjoint pieces that make up the tensor is its `whole_hash` (int64, wrapping around).

    Args:
        part: a tensor of float16, bfloat16, float32 or float64 with any strides.
        start: where the piece begins in the whole tensor.
        shape: of the whole tensor.
    """
    if part.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=part.device)
    hashes = [_block_hash(block, place) for block, place in _placed_blocks(part.detach(), tuple(start))]
    total = hashes[0] if len(hashes) == 1 else torch.stack(hashes).sum()
    # The piece at the beginning stands for the shape.
    return total if any(start) else total + _signed_int(reduce(lambda x, n: _mixed_int(x ^ n), shape, len(shape)))


def _placed_blocks(part: Tensor, start: tuple[int, ...], dim: int = 0) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Give a tensor in rectangular pieces of at most `BLOCK_ELEMENTS`, and where each begins."""
    n = part.shape[dim]
    step = max(1, BLOCK_ELEMENTS * n // part.numel())
    for first in range(0, n, step):
        block = part.narrow(dim, first, min(step, n - first))
        place = (*start[:dim], start[dim] + first, *start[dim + 1 :])
        if block.numel() <= BLOCK_ELEMENTS:
            yield block, place
        else:
            yield from _placed_blocks(block, place, dim + 1)


def _block_hash(block: Tensor, start: tuple[int, ...]) -> Tensor:
    """Return the sum of the hashes of all elements, each scrambled with its place.

    A place is the exclusive or of a number for its index in each dimension. So nearly all of it is computed once for a
    row, and not for each element.
    """
    sides = _index_numbers(start, tuple(block.shape), block.device)
    long = next((dim for dim, n in enumerate(block.shape) if n > 1), 0)
    rows = reduce(torch.bitwise_xor, sides[: long + 1])  # those before have one index
    words = block.view(_WORDS[block.element_size()]).to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    words = words.view(len(rows), -1).bitwise_xor_(rows.unsqueeze(-1))
    if long + 1 < len(sides):
        words ^= reduce(lambda outer, inner: (outer.unsqueeze(-1) ^ inner).view(-1), sides[long + 1 :])
    return _mixed_(words).sum()


def _index_numbers(start: tuple[int, ...], shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Return a number for each index of a block, in each dimension. No dimension has those of another."""
    ends = [first + n for first, n in zip(start, shape, strict=True)]
    if device.type == "cpu" and max(ends) <= BLOCK_ELEMENTS and _is_plain_mode():
        return [
            _known_numbers(d, 1 << (b - 1).bit_length())[a:b] for d, (a, b) in enumerate(zip(start, ends, strict=True))
        ]
    index = torch.cat([torch.arange(first, end, device=device) for first, end in zip(start, ends, strict=True)])
    return [_of_dimension(dim, numbers) for dim, numbers in enumerate(_mixed_(index).split(shape))]


@cache  # at most twice BLOCK_ELEMENTS in all for each dimension, of which all but two are short
def _known_numbers(dim: int, n: int) -> Tensor:
    with outside_inference_mode():
        return _of_dimension(dim, _mixed_range(n))


def _of_dimension(dim: int, numbers: Tensor) -> Tensor:
    return numbers * _signed_int(pow(_ROUNDS[0][1], dim, 1 << 64))


def numbered_blocks_hash(tensor: Tensor) -> int:
    """Return the hash of all elements as states of schema 4 and 5 hold it. Waits for the device.

    Each block of the tensor is hashed with its number, so that it cannot be made of the hashes of pieces.
    """
    hashes = content_hashes(list(_blocks(tensor.detach())), samples=None)
    found = [int(hashes[0])] if len(hashes) == 1 else torch.stack(hashes).tolist()
    return _signed_int(sum(_mixed_int(number + place) for place, number in enumerate(found)))


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """All of a tensor in pieces of bounded size: rows, or pieces of rows, whatever its strides."""
    row = prod(tensor.shape[1:])
    if row <= BLOCK_ELEMENTS:
        yield from tensor.split(max(1, BLOCK_ELEMENTS // row))
        return
    for part in tensor:
        yield from _blocks(part)


def sampled_positions(shape: Sequence[int], samples: int | None, device: torch.device) -> Tensor:
    """Sampled places in a tensor of that shape, ascending: one in each of many equal stretches, at random.

    The stretches are as many as `samples` or more, the same number in each row. A change of a few rows alone is what
    an embedding sees.
    """
    n = prod(shape)
    if samples is None or n <= samples:
        return torch.arange(n, device=device)
    samples = min(n, shape[0] * -(-samples // shape[0])) if len(shape) > 1 else samples
    i = torch.arange(samples, device=device)
    # i * n // samples, in pieces that do not overflow.
    first = i * (n // samples) + i * (n % samples) // samples
    width = n // samples
    return first + _mixed(i).remainder(width)


def kept_index(shape: tuple[int, ...], samples: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return sampled places of a flattened tensor as an index in each dimension, to be read only.

    On a CPU they are computed once: layers have few shapes.
    """
    if device.type != "cpu" or not _is_plain_mode():
        return _sampled_index(shape, samples, device)
    return _known_index(shape, samples)


@lru_cache(maxsize=64)
def _known_index(shape: tuple[int, ...], samples: int) -> tuple[Tensor, ...]:
    with outside_inference_mode():
        return _sampled_index(shape, samples, torch.device("cpu"))


def _sampled_index(shape: tuple[int, ...], samples: int, device: torch.device) -> tuple[Tensor, ...]:
    return _index(sampled_positions((prod(shape),), samples, device), shape)


def _is_plain_mode() -> bool:
    """Tell if tensors may be kept: what is made of fakes, in transforms or in a graph must not be found outside."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
    )


_ROUNDS = ((32, 0x2545F4914F6CDD1D), (29, 0x369DEA0F31A53F85), (32, 0x27BB2EE687B0B0FD))
"""Shifts and odd factors of the scrambling."""


def _mixed(x: Tensor) -> Tensor:
    """Return each int64 scrambled, one-to-one."""
    return _mixed_(x.clone())


def _mixed_(x: Tensor) -> Tensor:
    """Scramble each int64, one-to-one: rounds of xor-shift and odd multiplication."""
    for shift, factor in _ROUNDS:
        # A right shift of a negative int64 drags its sign along; the mask takes it off.
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 32).bitwise_and_(0xFFFFFFFF))


def _mixed_int(x: int) -> int:
    """Do as `_mixed` with one number; return it without a sign."""
    x %= 1 << 64
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> shift)) * factor % (1 << 64)
    return x ^ (x >> 32)


def _signed_int(x: int) -> int:
    """Return the lowest 64 bits of an int, as int64."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)
