"""The fingerprint of a weight: what it sees, that shards add up to it, and that it reads a sample only."""

import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import peak_allocation
from deltaopt.checkpoint.fingerprint import (
    BLOCK_ELEMENTS,
    SAMPLES,
    Fingerprint,
    content_hash,
    numbered_blocks_hash,
    sampled_positions,
    whole_hash,
    whole_hash_part,
)
from tests.support import strategies

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def random_weight(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_flipped_bit_anywhere_in_a_small_tensor_changes_it(dtype):
    W = random_weight(3, 5, dtype=dtype)
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[W.element_size()]
    seen = {int(content_hash(W))}
    for place in range(W.numel()):
        for bit in (0, 7, 8 * W.element_size() - 2):
            changed = W.clone()
            changed.view(word).view(-1)[place] ^= 1 << bit
            seen.add(int(content_hash(changed)))
    assert len(seen) == 1 + 3 * W.numel()


def test_it_tells_elements_that_changed_places():
    W = random_weight(40, 30)
    assert int(content_hash(W)) != int(content_hash(W.flip(0)))
    assert int(content_hash(W)) != int(content_hash(W.T.contiguous()))


def test_it_tells_nan_zeros_and_signs():
    zeros = torch.zeros(4, 4)
    assert len({int(content_hash(t)) for t in (zeros, -zeros, zeros + torch.nan, zeros + torch.inf)}) == 4


@pytest.mark.parametrize(
    "shape", [(1,), (7, 3), (64, 64), (65, 64), (300, 500), (8, 100, 90), (4097,), (9000, 7), (5000, 1)]
)
def test_positions_are_distinct_ascending_and_spread(shape):
    n = torch.Size(shape).numel()
    places = sampled_positions(shape, SAMPLES, torch.device("cpu"))
    rows = shape[0] if len(shape) > 1 else 1
    assert len(places) == (n if n <= SAMPLES else min(n, rows * -(-SAMPLES // rows)))
    assert len((places // (n // rows)).unique()) == rows
    assert bool((places.diff() > 0).all())
    assert int(places[0]) >= 0
    assert int(places[-1]) < n
    assert n == 1 or int(places.diff().max()) <= 2 * -(-n // len(places))


@pytest.mark.parametrize("n", [2**33 + 5, 2**40])
def test_positions_of_very_large_tensors_do_not_overflow(n):
    places = sampled_positions((n,), SAMPLES, torch.device("cpu"))
    assert bool((places.diff() > 0).all())
    assert n - 2 * n // SAMPLES < int(places[-1]) < n


@given(
    shape=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    cuts=st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1)), max_size=4),
    seed=strategies.seeds,
    dtype=st.sampled_from(FLOATS),
)
def test_the_hashes_of_shards_add_up_to_that_of_the_whole(shape, cuts, seed, dtype):
    """Cut W into rectangular pieces in any way, empty ones too."""
    W = random_weight(*shape, dtype=dtype, seed=seed)
    pieces = pieces_of(W, cuts)
    assert added(content_hash, pieces, W) == int(content_hash(W))
    assert added(whole_hash_part, pieces, W) == whole_hash(W)


def pieces_of(W, cuts):
    """Cut W at each (dimension, fraction), and say where the pieces begin."""
    pieces = [((0,) * W.dim(), W)]
    for dim, where in cuts:
        dim %= W.dim()
        cut = []
        for start, piece in pieces:
            n = round(where * piece.shape[dim])
            moved = tuple(s + (n if i == dim else 0) for i, s in enumerate(start))
            cut += [(start, piece.narrow(dim, 0, n)), (moved, piece.narrow(dim, n, piece.shape[dim] - n))]
        pieces = cut
    return pieces


def added(hashed, pieces, W):
    return int(sum((hashed(piece, start, W.shape) for start, piece in pieces), torch.zeros((), dtype=torch.int64)))


@pytest.mark.parametrize("shape", [(700, 900), (13, 5), (5000, 60), (3, 200, 500), (1, 600_000)])
@pytest.mark.parametrize(
    "cuts", [[(0, 0.5)], [(1, 0.37)], [(0, 0.4), (1, 0.7)], [(0, 0.0)], [(1, 1.0), (0, 0.1), (0, 0.5)], [(-1, 0.01)]]
)
def test_large_weights_in_pieces_add_up(shape, cuts):
    """Shard(0), Shard(1), blocks in two dimensions, uneven and empty ones; in tensors of their own and as views."""
    W = random_weight(*shape, dtype=torch.bfloat16)
    pieces = pieces_of(W, cuts)
    for hashed, whole in ((content_hash, int(content_hash(W))), (whole_hash_part, whole_hash(W))):
        assert added(hashed, pieces, W) == whole
        assert added(hashed, [(start, piece.clone()) for start, piece in pieces], W) == whole


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 7), (2, 3, 2, 2), (9,)])
def test_the_whole_hash_in_pieces_that_are_elements(shape):
    """Each element is a piece, so that every place is computed on its own; and none has the number of another."""
    W = torch.zeros(shape)
    pieces = [(place, W[tuple(slice(i, i + 1) for i in place)]) for place in itertools.product(*map(range, shape))]
    found = [int(whole_hash_part(piece, place, shape)) for place, piece in pieces]
    assert signed(sum(found)) == whole_hash(W)
    assert len(set(found)) == len(found)


class Passing(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_pieces_are_hashed_alike_with_and_without_what_was_kept():
    """Devices compute what a CPU keeps, and so do modes of torch, in which nothing may be kept."""
    W = random_weight(40, 300)
    pieces = pieces_of(W, [(0, 0.3), (1, 0.6)])
    found = [(int(content_hash(p, start, W.shape)), int(whole_hash_part(p, start, W.shape))) for start, p in pieces]
    with Passing():
        again = [(int(content_hash(p, start, W.shape)), int(whole_hash_part(p, start, W.shape))) for start, p in pieces]
    assert again == found
    with torch.inference_mode():
        inside = [int(content_hash(p[:9, :8], start, (41, 301))) for start, p in pieces]
    assert [int(content_hash(p[:9, :8], start, (41, 301))) for start, p in pieces] == inside


def test_strides_and_devices_of_the_storage_do_not_matter():
    W = random_weight(6, 4, 5, 5)
    assert int(content_hash(W.to(memory_format=torch.channels_last))) == int(content_hash(W))
    assert int(content_hash(W.transpose(0, 1).contiguous().transpose(0, 1))) == int(content_hash(W))
    assert int(content_hash(torch.stack([W, W], -1)[..., 0])) == int(content_hash(W))


def test_a_usual_update_is_seen():
    """Change a large W by low rank: that reaches all of the sample, and bfloat16 rounds most of it away."""
    W = random_weight(512, 512, dtype=torch.bfloat16) * 0.02
    U, V = random_weight(512, 4, seed=1) * 1e-3, random_weight(4, 512, seed=2) * 1e-2
    moved = (W.float() + U @ V).bfloat16()
    assert 0 < int((moved != W).sum()) < W.numel() // 2
    assert Fingerprint(moved).record() != Fingerprint(W).record()


def test_it_says_shape_and_dtype_and_survives_pickling():
    W = random_weight(6, 4, dtype=torch.bfloat16)
    record = Fingerprint(W).record()
    assert record == {"shape": [6, 4], "dtype": "bfloat16", "hash": int(content_hash(W))}
    assert pickle.loads(pickle.dumps(Fingerprint(W))).record() == record
    assert Fingerprint.of_record(record).record() == record


def test_it_reads_a_sample_and_not_the_weight():
    W = random_weight(3000, 1000).T
    assert peak_allocation(lambda: Fingerprint(W).record()) < W.nbytes / 10


@pytest.mark.parametrize("shape", [(3, 5), (700, 900), (200_000,), (1, 700_000), (3, 600_000)])
def test_the_whole_hash_sees_every_element_in_its_place(shape):
    W = random_weight(*shape)
    for hashed in (whole_hash, numbered_blocks_hash):
        seen = {hashed(W), hashed(W.flip(0)), hashed(W.roll(1))}
        for place in (0, W.numel() // 3, W.numel() - 1):
            changed = W.clone()
            changed.view(-1)[place] += 1e-3
            seen.add(hashed(changed))
        assert len(seen) == (6 if shape[0] > 1 else 5)


def test_the_whole_hash_tells_a_square_from_its_transpose_and_zeros_by_their_shape():
    W = random_weight(64, 64)
    assert whole_hash(W) != whole_hash(W.T)
    assert len({whole_hash(torch.zeros(shape)) for shape in ((4, 6), (6, 4), (24,), (1, 24), (2, 2, 6))}) == 5


def test_the_whole_hash_is_its_definition():
    """Sum the scrambled words: each with its place, which is of the numbers of its indices."""
    W = random_weight(3, 4, 5)
    total = 3  # dimensions
    for n in W.shape:
        total = mixed(total ^ n)
    for place in itertools.product(*map(range, W.shape)):
        word = int(W[place].view(torch.int32))
        for dim, i in enumerate(place):
            word ^= mixed(i) * pow(0x2545F4914F6CDD1D, dim, 2**64)
        total += mixed(word % 2**64)
    assert signed(total) == whole_hash(W)


def test_the_whole_hash_takes_bounded_memory():
    W = random_weight(3000, 1000)
    assert peak_allocation(lambda: whole_hash(W)) < 30 * 8 * BLOCK_ELEMENTS


def mixed(x):
    """Scramble a number of 64 bits, in Python's integers."""
    for shift, factor in ((32, 0x2545F4914F6CDD1D), (29, 0x369DEA0F31A53F85), (32, 0x27BB2EE687B0B0FD)):
        x = (x ^ (x >> shift)) * factor % 2**64
    return x ^ (x >> 32)


def signed(x):
    return x % 2**64 - (2**64 if x % 2**64 >= 2**63 else 0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 5), (64, 65), (5000,), (4200, 2), (3, 70, 41)])
def test_the_hash_is_the_sum_over_the_sample_of_mixed_places_and_bits(shape, dtype):
    W = random_weight(*shape, dtype=dtype)
    bits = W.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[W.element_size()]).flatten().tolist()
    places = sampled_positions(shape, SAMPLES, torch.device("cpu")).tolist()
    expected = signed(sum(mixed(mixed(place) ^ bits[place] % 2**64) for place in places))
    assert int(content_hash(W)) == expected
    assert int(content_hash(W.mT.contiguous().mT if W.dim() > 1 else torch.stack([W, W], 1)[:, 0])) == expected


def test_hashes_are_those_that_states_hold():
    """Saved by earlier versions: the numbers must stay."""
    ramp = torch.arange(70 * 90, dtype=torch.float32).view(70, 90)
    assert Fingerprint(ramp).record() == {"shape": [70, 90], "dtype": "float32", "hash": -2720959091383727769}
    narrow = ramp.T[:, :50].to(torch.bfloat16)
    assert Fingerprint(narrow, whole=numbered_blocks_hash).record()["hash"] == -6089412971051960110
    assert Fingerprint(narrow, whole=whole_hash).record()["hash"] == -7772209190275720842


def test_places_that_were_kept_in_a_mode_of_torch_serve_outside_it():
    shape = (83, 97)  # of no other test
    with torch.inference_mode():
        inside = int(content_hash(torch.ones(shape)))
    with FakeTensorMode():
        content_hash(torch.ones(89, 97))
    W = torch.ones(shape)
    assert int(content_hash(W)) == inside
    assert int(content_hash(torch.ones(89, 97))) == int(content_hash(torch.ones(97, 89).T))
    assert whole_hash(W) == whole_hash(torch.ones(97, 83).T)


def test_hashes_of_many_tensors_are_those_of_each():
    """Of several shapes, dtypes and strides in turn, more of a kind than are hashed at a time."""
    shapes = [(64, 65), (3, 5), (0, 4), (5000,)]
    tensors = [
        random_weight(*shape, dtype=dtype, seed=i) for i in range(9) for shape in shapes for dtype in FLOATS[1:3]
    ]
    tensors += [tensor.mT.contiguous().mT for tensor in tensors if tensor.dim() > 1]
    together = [fingerprint.record() for fingerprint in Fingerprint.of_each(tensors)]
    assert together == [Fingerprint(tensor).record() for tensor in tensors]
    assert Fingerprint.of_each([]) == []
