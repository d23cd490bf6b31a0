"""Layouts are views: what is written into the matrix of W is in the stored W, and a message says what does not fit."""

import pytest
import torch

from deltaopt import LoRATriple
from tests.support import strategies
from tests.support.small import refuses_triples, small_layer, small_triple

ALL = strategies.LAYOUTS | strategies.MORE_LAYOUTS


@pytest.mark.parametrize("layout", ALL)
def test_the_matrix_of_W_is_a_view(layout):
    stored = strategies.make(layout)
    view = stored.triple().view.weight(stored.W)
    assert torch.equal(view, stored.matrix(stored.W)) or layout == "conv2d_channels_last"
    view.fill_(42.0)
    assert bool((stored.matrix(stored.W) == 42.0).all())


@pytest.mark.parametrize("layout", ALL)
def test_the_factors_multiply_in_the_order_of_the_weight(layout):
    """Hold also where the columns of the matrix of W stand in another order than in storage."""
    stored = strategies.make(layout)
    triple = stored.triple()
    A, B = (factor.detach() for factor in triple.view.factors(*triple.tensors()))
    stored.W.zero_()
    triple.view.weight(stored.W).add_(A @ triple.view.ordered(B, stored.W))
    _, dense_A, dense_B = stored.matrices()
    assert torch.allclose(stored.matrix(stored.W), dense_A @ dense_B, atol=1e-14)


def test_names_swapped_factors():
    W, A, B = small_layer()
    message = refuses_triples(LoRATriple(W, B, A, name="layer0.q"))
    assert "layer0.q: A (2, 6) and B (4, 2) are swapped: W is (4, 6) = (c, d)" in message
    assert "PEFT's lora_B is A here" in message


def test_names_swapped_factors_of_a_square_weight():
    W, A, B = small_layer(c=6, d=6)
    assert "are swapped" in refuses_triples((W, B, A))


@pytest.mark.parametrize(
    ("A_shape", "B_shape"), [((4, 2), (3, 6)), ((5, 2), (2, 6)), ((4, 2), (2, 5)), ((4, 0), (0, 6)), ((4,), (2, 6))]
)
def test_refuses_mismatched_shapes(A_shape, B_shape):
    A, B = torch.randn(A_shape, requires_grad=True), torch.randn(B_shape, requires_grad=True)
    message = refuses_triples(LoRATriple(torch.randn(4, 6), A, B, name="layer0.q"))
    assert f"layer0.q: A {A_shape} and B {B_shape} do not fit W (4, 6)" in message
    assert "expected A of shape (4, r) and B of shape (r, 6)" in message


def test_refuses_a_weight_of_other_dimensions_than_its_layout():
    message = refuses_triples(LoRATriple(torch.randn(24), *small_layer()[1:], name="flat"))
    assert "flat: layout 'linear' expects W stored as (c, d), got (24,)" in message
    assert "FSDP1" in message


def test_refuses_a_slice_beyond_the_weight():
    assert "q: no matrix view of W (4, 6)" in refuses_triples(small_triple(rows=(2, 9)))


def test_refuses_a_convolution_without_a_matrix_view():
    W = torch.randn(4, 3, 2, 5)[..., :2]
    A, B = torch.randn(4, 2, requires_grad=True), torch.randn(2, 3, 2, 2, requires_grad=True)
    assert "no matrix view of W (4, 3, 2, 2)" in refuses_triples(LoRATriple(W, A, B, layout="conv"))


def test_refuses_columns_of_a_convolution():
    W, A, B = torch.randn(5, 4, 3), torch.zeros(5, 2, 1), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"^q: columns is not for layout 'conv', .*: give B all of them"):
        LoRATriple(W, A, B, layout="conv", columns=(0, 6), name="q")


@pytest.mark.parametrize("layout", ALL)
def test_a_matrix_like_that_of_W_is_put_in_the_order_of_the_factors(layout):
    stored = strategies.make(layout)
    view = stored.triple().view
    assert torch.equal(view.in_order_of_factors(view.weight(stored.W), stored.W), stored.matrix(stored.W))
