"""The base by itself of 16-bit weights: exact with a copy of the base, else within a bound that `residual` gives."""

import copy
import warnings

import pytest
import torch

from tests.support.sixteen_bits import BOTH_DTYPES, spacing
from tests.support.strategies import ROUNDINGS, each_rule
from tests.support.switched import base_output, layer_and_input, optimizer_of, train

each_dtype = pytest.mark.parametrize("dtype", BOTH_DTYPES)
each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)


class Run:
    """A 16-bit layer, a copy of it from before there was a triple, and an optimizer that has moved its W."""

    def __init__(self, kind, dtype, rule, factors=torch.float32, **options):
        self.layer, self.x = layer_and_input(kind, dtype, factors)
        self.frozen = copy.deepcopy(self.layer)
        self.optimizer = optimizer_of(self.layer, weight_update=rule, eps=1e-3, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*rounding to nearest")
            train(self.layer, self.optimizer, self.x, 6)
        assert (self.layer.weight - self.frozen.weight).abs().max() > 1e-2

    def residual(self):
        """Return what rounding did to W, stored as W is."""
        source = {"w": self.frozen.weight}
        return sum(
            branch.placed(self.optimizer.residual(name, source=source).double(), self.layer.weight)
            for name, branch in self.layer.branches.items()
        )

    def exactly(self, weight, bias=True):
        """Return what the layer computes from a weight, in float64."""
        x = self.x.double() if self.x.is_floating_point() else self.x
        layer = self.frozen
        return layer.computed(weight.double(), layer.bias.double() if bias and layer.bias is not None else None, x)


@each_rounding
@each_rule
@each_dtype
@pytest.mark.parametrize("kind", ["linear", "transposed", "embedding", "conv2d"])
@pytest.mark.parametrize("place", ["cpu", "device"])
def test_with_a_copy_of_the_base_the_output_is_exact(place, kind, dtype, rule, rounding):
    run = Run(kind, dtype, rule, rounding=rounding, keep_base=place)
    assert torch.equal(base_output(run.layer, run.x), base_output(run.frozen, run.x))


@each_rounding
@each_rule
@each_dtype
@pytest.mark.parametrize("factors", [torch.float32, None])
@pytest.mark.parametrize("kind", ["linear", "transposed", "embedding", "conv2d", "fused"])
def test_without_a_copy_the_output_is_within_a_bound(kind, factors, dtype, rule, rounding):
    """The output is the base's exact one plus residual @ x, rounded twice: as the moved W's output, and as the result.

    Each rounding is by at most half a spacing of the output's dtype there.
    """
    run = Run(kind, dtype, rule, factors, rounding=rounding)
    found, moved = base_output(run.layer, run.x), run.exactly(run.layer.weight)
    expected = run.exactly(run.frozen.weight) + run.exactly(run.residual(), bias=False)
    two_roundings = (spacing(moved, dtype) + spacing(found, dtype)) / 2
    assert found.dtype == dtype
    assert bool(((found.double() - expected).abs() <= 1.01 * two_roundings).all())  # 1 %: float32's own rounding


@each_rule
@each_dtype
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d", "fused"])
def test_with_compensated_rounding_the_residual_is_half_a_spacing_of_W(kind, dtype, rule):
    """So that the bound is known without the base: |x| @ half a spacing of W, and the two roundings."""
    run = Run(kind, dtype, rule, rounding="compensated")
    half = spacing(run.layer.weight, dtype) / 2
    # Steps are summed up in float32, which rounds as the weight was large, also where it has come close to zero.
    sums = 2.0**-20 * run.frozen.weight.abs().double()
    assert bool((run.residual().abs() <= half + sums).all())
    coarse = Run(kind, dtype, rule, rounding="nearest")
    if rule == "in_place":  # folded, W is written once
        assert bool((coarse.residual().abs() > half).any())
