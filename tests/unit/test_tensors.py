"""Sorts of tensors: those that can be moved in place, and those that share memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple, tensors
from deltaopt.tensors import memory_overlaps, overlapping_pairs
from tests.support.small import refuses_triples, small_layer

slices = st.tuples(st.integers(0, 7), st.integers(1, 5)).map(lambda r: (r[0], min(8, r[0] + r[1])))


@given(st.tuples(*[slices] * 3), st.tuples(*[slices] * 3))
def test_overlap_of_blocks_of_a_stack_is_exact(first_block, second_block):
    base = torch.zeros(8, 8, 8)
    first, second = (base[tuple(slice(*r) for r in block)] for block in (first_block, second_block))
    first.add_(1)
    second.add_(1)
    shared = bool((base > 1).any())
    assert memory_overlaps(first, second) == shared


@given(slices, slices, slices, slices, st.booleans(), st.booleans())
def test_overlap_of_slices_is_exact(rows_1, columns_1, rows_2, columns_2, turn_1, turn_2):
    base = torch.zeros(8, 8)
    first, second = base[slice(*rows_1), slice(*columns_1)], base[slice(*rows_2), slice(*columns_2)]
    first.add_(1)
    second.add_(1)
    shared = bool((base > 1).any())
    first, second = first.T if turn_1 else first, second.T if turn_2 else second
    if min(*first.shape, *second.shape) > 1:
        assert memory_overlaps(first, second) == shared
    else:  # a single row or column has no leading stride to compare: never called disjoint when it is not
        assert memory_overlaps(first, second) or not shared


def test_overlap_of_two_shapes_of_one_memory():
    """Find the columns 0 and 1 of an (8, 8) among the columns 8 and 9 of the same memory as (4, 16)."""
    base = torch.zeros(64)
    assert memory_overlaps(base.view(8, 8)[:, :2], base.view(4, 16)[:, 8:10])
    around_the_edge = base.as_strided((2, 3), (8, 1), 6)  # columns 6, 7 and then 0 of the next row
    assert memory_overlaps(around_the_edge, base.view(8, 8)[:, :2])


def test_separate_tensors_do_not_overlap():
    assert not memory_overlaps(torch.zeros(3), torch.zeros(3))


def refuses_weight(W, module=None):
    """Return the message with which this W, or the `weight` of this module, is refused."""
    return refuses_triples(LoRATriple(W if module is None else (module, "weight"), *small_layer()[1:], name="q"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn])
def test_refuses_dtypes_that_cannot_be_moved(dtype):
    assert f"q: W has dtype {dtype}, expected float16, bfloat16" in refuses_weight(torch.zeros(4, 6).to(dtype))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_names_a_way_out_for_integer_and_float8_weights(dtype):
    message = refuses_weight(torch.zeros(4, 6).to(dtype))
    assert f"q: W has dtype {dtype}, expected " in message
    assert 'weight_update="folded"' in message
    assert "16 or 32 bits" in message


@pytest.mark.extra
def test_names_a_way_out_for_packed_weights():
    """Take quant_storage=bfloat16, with which the packed numbers pass every test of the dtype."""
    bnb = pytest.importorskip("bitsandbytes", reason="runs where bitsandbytes is installed")
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_storage=torch.bfloat16)
    _, A, B = small_layer(32, 64)
    message = refuses_triples(LoRATriple(layer.weight, A, B, name="q"))
    assert "q: W is a bitsandbytes" in message
    assert "Params4bit, " in message
    assert 'weight_update="folded"' in message
    assert "16 or 32 bits" in message


def test_refuses_complex_factors():
    W, _, B = small_layer()
    A = torch.randn(4, 2, dtype=torch.complex64, requires_grad=True)
    assert "q: A has dtype torch.complex64" in refuses_triples(LoRATriple(W, A, B, name="q"))


def test_refuses_a_weight_on_the_meta_device():
    message = refuses_weight(torch.empty(4, 6, device="meta"))
    assert "q: W is on the meta device (offloaded, or not loaded yet)" in message


def test_refuses_an_inference_tensor():
    with torch.inference_mode():
        W = torch.randn(4, 6)
    assert "q: W was made under torch.inference_mode()" in refuses_weight(W)


def test_refuses_a_tensor_that_only_looks_plain():
    class Packed(torch.Tensor):
        pass

    message = refuses_weight(torch.randn(4, 6).as_subclass(Packed))
    assert "Packed, expected a plain tensor or Parameter: quantized, sharded" in message


def test_refuses_a_deepspeed_partition():
    W = torch.randn(4, 6)
    W.ds_id = 7  # how ZeRO-3 marks its parameters
    assert "q: W is partitioned by DeepSpeed ZeRO-3" in refuses_weight(W)


def test_refuses_an_expanded_weight():
    assert "q: W is expanded (strides (0, 1))" in refuses_weight(torch.randn(1, 6).expand(4, 6))


def test_refuses_an_offloaded_layer():
    class Hook:
        offload = True

    class Chain:
        hooks = (Hook(),)

    for hook in (Hook(), Chain()):
        linear = nn.Linear(6, 4, bias=False).requires_grad_(False)
        linear._hf_hook = hook  # how accelerate marks a module
        assert "q: W is offloaded by an accelerate hook" in refuses_weight(None, linear)


def test_refuses_a_weight_that_is_computed():
    """Refuse it: a parametrization makes a new tensor at each access, in which an update is lost."""
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4, bias=False)).requires_grad_(False)
    message = refuses_weight(None, linear)
    assert "at each access (a parametrization such as weight_norm)" in message
    assert "q: W is computed " in message


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_views_of_two_shapes_that_follow_each_other_do_not_overlap(order):
    memory = torch.zeros(24)
    views = memory[:12].view(3, 4), memory[12:].view(4, 3)
    assert not memory_overlaps(views[order[0]], views[order[1]])
    one_more = memory[11:23].view(4, 3)
    assert memory_overlaps(*((views[0], one_more) if order == (0, 1) else (one_more, views[0])))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.integers(1, 3), st.booleans()), max_size=9))
def test_overlapping_pairs_are_those_of_a_comparison_of_all(views):
    """Find among strided views of two storages the same pairs as by comparing each with each, in the same order."""
    storages = torch.zeros(64), torch.zeros(64)
    strided = [storages[other][start : start + n * stride : stride] for start, n, stride, other in views]
    expected = [(i, j) for j in range(len(strided)) for i in range(j) if memory_overlaps(strided[i], strided[j])]
    assert overlapping_pairs(strided) == expected


def test_views_behind_each_other_are_not_compared_with_each_other(monkeypatch):
    """Register 200 triples whose W, A and B lie in three flat buffers without one comparison of two views."""
    count, (c, d, r) = 200, (4, 6, 2)
    W = torch.randn(count, c, d)
    A, B = torch.randn(count, c, r), torch.randn(count, r, d)
    triples = [LoRATriple(W[i], A[i].requires_grad_(), B[i].requires_grad_(), name=f"{i}") for i in range(count)]
    compared = []
    monkeypatch.setattr(tensors, "memory_overlaps", lambda *views: compared.append(views) or memory_overlaps(*views))
    DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1)
    assert len(compared) == 0
    with pytest.raises(ValueError, match="199: its W shares memory with the W of 7"):
        DeltaLoRAOptimizer(
            torch.optim.SGD, [*triples[:-1], LoRATriple(W[7], *triples[-1].tensors()[1:], name="199")], lr=0.1
        )
    assert len(compared) == 1
