"""The base by itself of PEFT's layers in 16 bits: exact with a copy of the base, else within a bound."""

import copy
import warnings

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer
from tests.support.peft_layers import CASES, lora_layers, output, randomised, train_model, weight
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.sixteen_bits import BOTH_DTYPES, spacing
from tests.support.strategies import ROUNDINGS, each_rule

# isort: split
from peft import LoraConfig, get_peft_model

pytestmark = peft_asks_by_an_old_name

each_dtype = pytest.mark.parametrize("dtype", BOTH_DTYPES)
each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)
PRODUCTS = ["linear_square", "conv1d_gpt2", "embedding", "conv1d", "conv2d"]
EXPERTS = ["experts_3_7x5_up_down", "parameter_2d"]


class Run:
    """A model of one 16-bit layer with two adapters in float32, a copy of it, and an optimizer that has moved its W."""

    def __init__(self, name, dtype, rule, **options):
        torch.manual_seed(0)
        build, targets, inputs, of_case = CASES[name]
        config = {"r": 3, "lora_alpha": 5, "target_modules": list(targets), **of_case}
        model = get_peft_model(build(), LoraConfig(**config))
        model.add_adapter("other", LoraConfig(**config))
        self.model, x = randomised(randomised(model), "other").to(dtype), inputs()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        self.x = x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        self.frozen = copy.deepcopy(self.model)
        self.optimizer = DeltaLoRAOptimizer.for_model(
            self.model, torch.optim.AdamW, lr=2e-2, start_step=1, weight_update=rule, **options
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*rounding to nearest")
            train_model(self.model, self.optimizer, self.x, 6)
        for path, layer in lora_layers(self.model).items():
            assert (weight(layer) - weight(lora_layers(self.frozen)[path])).abs().max() > 1e-2

    @torch.no_grad()
    def base(self, model):
        with model.disable_adapter():
            return output(model, self.x)

    @torch.no_grad()
    def with_the_other(self, model):
        model.set_adapter("other")
        try:
            return output(model, self.x)
        finally:
            model.set_adapter("default")

    def exactly(self, W, bias=True):
        """Return what the base layer computes from a weight, in float64."""
        (layer,) = lora_layers(self.frozen).values()
        inner = copy.deepcopy(layer.get_base_layer()).double()
        inner.weight.data = W.double()
        if not bias and getattr(inner, "bias", None) is not None:
            nn.init.zeros_(inner.bias)
        with torch.no_grad():
            return inner(self.x.double() if self.x.is_floating_point() else self.x)


@each_rounding
@each_rule
@each_dtype
@pytest.mark.parametrize("place", ["cpu", "device"])
@pytest.mark.parametrize("name", PRODUCTS + EXPERTS)
def test_with_a_copy_of_the_base_the_output_is_exact(name, place, dtype, rule, rounding):
    """And next to another adapter within the roundings of the two outputs, of their difference and of the sum."""
    run = Run(name, dtype, rule, rounding=rounding, keep_base=place)
    base = run.base(run.frozen)
    assert torch.equal(run.base(run.model), base)
    expected, found = run.with_the_other(run.frozen), run.with_the_other(run.model)
    with torch.no_grad():
        largest = max(float(t.abs().max()) for t in (expected, base, output(run.model, run.x)))
    assert (found - expected).abs().max() <= 3 * torch.finfo(dtype).eps * largest


@each_rounding
@each_rule
@each_dtype
@pytest.mark.parametrize("name", PRODUCTS)
def test_without_a_copy_the_output_is_within_a_bound(name, dtype, rule, rounding):
    """The output is the base's exact one plus residual @ x, rounded twice: as the moved W's output, and as the result.

    Each rounding is by at most half a spacing of the output's dtype there.
    """
    run = Run(name, dtype, rule, rounding=rounding)
    (layer,), (pristine,) = lora_layers(run.model).values(), lora_layers(run.frozen).values()
    (triple,) = run.optimizer.triples
    residual = run.optimizer.residual(triple.label, source={"w": weight(pristine)}).double()
    residual = residual.mT if triple.layout in ("transposed", "embedding") else residual.view_as(weight(layer))
    found, moved = run.base(run.model), run.exactly(weight(layer))
    expected = run.exactly(weight(pristine)) + run.exactly(residual, bias=False)
    two_roundings = (spacing(moved, dtype) + spacing(found, dtype)) / 2
    assert bool(((found.double() - expected).abs() <= 1.01 * two_roundings).all())


@each_rounding
@each_dtype
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_compute_with_W_minus_the_displacement_rounded_once(name, dtype, rounding):
    run = Run(name, dtype, "in_place", rounding=rounding)
    dense = copy.deepcopy(run.frozen)
    for triple, layer in zip(run.optimizer.triples, lora_layers(dense).values(), strict=True):
        asked = run.optimizer.displacement(triple.label).product().double()
        with torch.no_grad():
            weight(layer).copy_((triple.W.double() - asked).to(dtype))
            assert (weight(layer) - triple.W).abs().max() > 1e-2
    difference = (run.base(run.model) - run.base(dense)).abs().max()
    assert difference <= torch.finfo(dtype).eps * run.base(dense).abs().max()
