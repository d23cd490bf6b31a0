"""The scaling of a branch is a finite number that is not zero."""

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer
from tests.support.small import small_layer, small_triple

numpy = pytest.importorskip("numpy", reason="runs where numpy is installed")


@pytest.mark.parametrize("scaling", [0.0, 0, float("nan"), float("inf"), -float("inf")])
def test_refuses_a_scaling_that_is_zero_or_not_finite(scaling):
    with pytest.raises(ValueError, match=r"layer0.q: scaling must be finite and not zero, got"):
        small_triple("layer0.q", scaling=scaling)
    with pytest.raises(ValueError, match="scaling must be finite and not zero"):
        DeltaLoRAOptimizer(torch.optim.SGD, [small_layer()], scaling=scaling)


@pytest.mark.parametrize("scaling", ["2", None, True, 1j, numpy.True_, numpy.ones(1)])
def test_refuses_a_scaling_that_is_no_number(scaling):
    with pytest.raises(TypeError, match=r"scaling is a number \(alpha / r\), got"):
        small_triple(scaling=scaling)


@pytest.mark.parametrize("number", [numpy.float64, numpy.float32, numpy.int64], ids=lambda f: f.__name__)
def test_a_number_of_numpy_becomes_a_plain_one(number):
    layer = torch.nn.Module()
    layer.scaling = number(2)
    for triple in (small_triple(scaling=number(2)), small_triple(scaling=(layer, "scaling"))):
        assert (type(triple.scaling), triple.scaling) == (float, 2.0)
