"""Compensations as bytes: bit for bit there and back, whatever the shape and the strides."""

import pytest
import torch

from deltaopt.checkpoint.compensation import compensation_bits, compensation_bytes


def numbers(*shape):
    return torch.randint(-(2**15), 2**15, shape, generator=torch.Generator().manual_seed(0)).to(torch.int16)


KINDS = {
    "matrix": lambda: numbers(5, 7),
    "one element": lambda: numbers(1, 1),
    "one column": lambda: numbers(6, 1),
    "empty": lambda: numbers(0, 7),
    "experts": lambda: numbers(2, 5, 7),
    "transposed": lambda: numbers(7, 5).mT,
    "columns": lambda: numbers(5, 12)[:, 3:10],
    "channels last": lambda: numbers(4, 3, 2, 2).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind):
    bits = KINDS[kind]()
    found = compensation_bytes(bits)
    assert (found.dtype, found.shape) == (torch.uint8, (*bits.shape, 2))
    assert found.data_ptr() == bits.data_ptr()
    words = found.to(torch.int32)
    assert torch.equal((words[..., 0] | words[..., 1] << 8).to(torch.int16), bits)
    assert torch.equal(compensation_bits(found), bits)
    assert torch.equal(compensation_bits(found.clone()), bits)


def test_rows_and_columns_of_the_bytes_are_those_of_the_bits():
    """Shards of the bytes are the bytes of shards, at an odd place in memory too."""
    bits = numbers(9, 8)
    found = compensation_bytes(bits)
    for piece in ((slice(3, 7), slice(None)), (slice(None), slice(1, 4)), (slice(2, 2), slice(None))):
        assert torch.equal(compensation_bits(found[piece]), bits[piece])
    memory = torch.empty(found.numel() + 1, dtype=torch.uint8)
    odd = memory[1:].view(found.shape).copy_(found)
    assert torch.equal(compensation_bits(odd), bits)
