"""The scaling of a branch is a finite number that is not zero."""

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer
from tests.support.small import small_layer, small_triple


@pytest.mark.parametrize("scaling", [0.0, 0, float("nan"), float("inf"), -float("inf")])
def test_refuses_a_scaling_that_is_zero_or_not_finite(scaling):
    with pytest.raises(ValueError, match=r"layer0.q: scaling must be finite and not zero, got"):
        small_triple("layer0.q", scaling=scaling)
    with pytest.raises(ValueError, match="scaling must be finite and not zero"):
        DeltaLoRAOptimizer(torch.optim.SGD, [small_layer()], scaling=scaling)


@pytest.mark.parametrize("scaling", ["2", None, True, 1j])
def test_refuses_a_scaling_that_is_no_number(scaling):
    with pytest.raises(TypeError, match=r"scaling is a number \(alpha / r\), got"):
        small_triple(scaling=scaling)
