"""The place of a branch's scaling, how the folded rule sets it, and what it refuses."""

import contextlib
import copy
import math
import re
from functools import partial

import pytest
import torch
from torch import nn

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support import strategies
from tests.support.compare import refused
from tests.support.folded import ScaledLayer, folded_optimizer, warns_of_a_takeover
from tests.support.runs import LayerRun


@pytest.mark.parametrize("place", ["number", "buffer", "nested", "alpha"])
def test_the_scaling_is_set_where_the_layer_has_it(place):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = []
    for mode in ("in_place", "folded"):
        module = ScaledLayer(place)
        optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [module.triple()], lr=0.02, start_step=1, weight_update=mode)
        for _ in range(5):
            optimizer.zero_grad()
            module(x).tanh().sum().backward()
            optimizer.step()
        outputs.append(module(x).detach())
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    assert float(module.branch_scaling()) == 1.5


def test_a_buffer_that_is_replaced_is_still_the_scaling():
    """As `Module.to` does with buffers."""
    module = ScaledLayer("buffer")
    triple = LoRATriple(*module.tensors(), scaling=module.scaling, name="q")
    before = module.scaling
    module.to(torch.float32)
    assert module.scaling is not before
    optimizer = folded_optimizer(triple)
    module(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert float(module.scaling) == 1.5


def test_a_function_is_called_where_there_is_a_tensor_too():
    stored, scale, seen = strategies.make("linear", zero_A=True), torch.tensor(0.5), []
    triple = LoRATriple(
        *(stored.W, stored.A, stored.B), scaling=scale, set_scaling=lambda s: (seen.append(s), scale.fill_(s)), name="q"
    )
    optimizer = folded_optimizer(triple)
    stored.A.grad = torch.ones_like(stored.A)
    optimizer.step()
    assert seen == [1.5]


def test_a_scaling_that_somebody_else_changes_is_refused():
    run = LayerRun("folded").train(2)
    run.scale.fill_(0.5)
    with pytest.raises(
        RuntimeError, match=r"q: its scaling was 1\.5 when it was registered or last set and is 0\.5 now"
    ):
        run.optimizer.step()


def test_a_scaling_that_is_gone_is_refused():
    module = ScaledLayer("number")
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [module.triple()], weight_update="folded")
    del module.scaling
    with pytest.raises(RuntimeError, match=r"q: its scaling is not where it was registered: .*scaling"):
        optimizer.step()


def test_a_scaling_may_be_off_by_rounding_alone():
    run = LayerRun("folded").train(2)
    run.scale.mul_(1 + 1e-13)
    run.train(1)
    run.scale.mul_(1 + 1e-9)
    with pytest.raises(RuntimeError, match="q: its scaling was"):
        run.optimizer.step()


def test_a_scaling_that_was_put_back_is_not_warned_of():
    run = LayerRun("folded").train(2)
    run.scale.fill_(0.5)
    triple = run.new_triple()
    run.optimizer = folded_optimizer(triple)
    run.train(2)
    assert run.scale == 1.5


def test_a_scaling_that_cannot_be_set_is_refused_with_the_ways_out():
    stored = strategies.make("linear")
    for triples in ([stored.triple(0.5, "q")], [(stored.W, stored.A, stored.B)]):
        with pytest.raises(
            ValueError, match=r"its scaling is a number that cannot be set.*0-d tensor.*set_scaling=.*in_p"
        ):
            DeltaLoRAOptimizer(torch.optim.AdamW, triples, weight_update="folded")


@pytest.mark.parametrize(
    ("scaling", "error", "message"),
    [
        (torch.ones(2), ValueError, r"q: a scaling that is a tensor is 0-d, .* got torch\.float32 of shape \(2,\)"),
        (torch.tensor(2), ValueError, "of floating point, .* got torch.int64"),
        (torch.tensor(1.0, requires_grad=True), ValueError, "does not require grad"),
        (torch.tensor(0.0), ValueError, "q: scaling must be finite and not zero"),
        (torch.tensor(math.nan), ValueError, "q: scaling must be finite and not zero"),
        ((nn.Identity(), "scaling"), ValueError, "q: its scaling is not where it was registered: .*scaling"),
        ((nn.Identity(), 3), TypeError, "q: scaling is a number, a 0-d tensor or"),
        (("layer", "scaling"), TypeError, "q: scaling is a number, a 0-d tensor or"),
        ("2", TypeError, "q: scaling is a number"),
    ],
)
def test_scalings_that_are_none(scaling, error, message):
    stored = strategies.make("linear")
    with pytest.raises(error, match=message):
        stored.triple(scaling, "q")
    with pytest.raises(TypeError, match="q: set_scaling is a function of the new scaling, got 3"):
        LoRATriple(stored.W, stored.A, stored.B, set_scaling=3, name="q")


@pytest.mark.parametrize("scaling", [(), (nn.Identity(),), (nn.Identity(), "scaling", 1)])
def test_a_scaling_is_a_module_and_one_path(scaling):
    stored = strategies.make("linear")
    with pytest.raises(TypeError, match="q: scaling is a number, a 0-d tensor or"):
        stored.triple(scaling, "q")


def test_a_property_that_cannot_be_set_is_refused_at_once():
    class Fixed(ScaledLayer):
        scaling = property(lambda self: 0.5, lambda self, value: None)

    class ReadOnly(Fixed):
        scaling = property(lambda self: 0.5)

    module = Fixed("number")
    module.__class__ = ReadOnly
    with pytest.raises(ValueError, match=r"q: its scaling is scaling, a property of ReadOnly that cannot be set"):
        DeltaLoRAOptimizer(torch.optim.SGD, [module.triple()], weight_update="folded")


@pytest.mark.parametrize(
    ("ratio", "told"), [(1.7, "1.35 is rounded to 1.35156"), (1.6, "1.3 is rounded to 1.29688"), (2.0, "")]
)
def test_a_scaling_that_its_tensor_cannot_hold_is_refused(ratio, told):
    """In bfloat16 0.5 * 2.7 is rounded up, 0.5 * 2.6 down, and 0.5 * 3 is exact."""
    stored, scale = strategies.make("linear", dtype=torch.float32, zero_A=True), torch.tensor(0.5, dtype=torch.bfloat16)
    optimizer = folded_optimizer(stored.triple(scale, "q"), update_ratio=ratio)
    stored.A.grad = torch.ones_like(stored.A)
    if ratio == 2.0:
        optimizer.step()
        assert float(scale) == 1.5
    else:
        match = f"q: its scaling is a tensor in which .* = {re.escape(told)}"
        refused(optimizer.step, RuntimeError, match, lambda: [scale, stored.W, stored.A.detach()])


def test_a_setter_that_fails_changes_nothing():
    stored, other = strategies.make("linear"), strategies.make("linear", 1)
    scale = torch.tensor(0.5, dtype=torch.float64)

    def fail(value):
        raise OSError("no such layer")

    triples = [
        stored.triple(scale, "a"),
        LoRATriple(other.W, other.A, other.B, scaling=0.5, set_scaling=fail, name="b"),
    ]
    optimizer = folded_optimizer(*triples)
    W = stored.W.clone()
    for s in (stored, other):
        s.A.grad = torch.ones_like(s.A)
    with pytest.raises(OSError, match="no such layer"):
        optimizer.step()
    assert float(scale) == 0.5
    assert [t.folded for t in triples] == [0.0, 0.0]
    assert torch.equal(stored.W, W)


def test_a_setter_that_sets_something_else_is_refused():
    layer = nn.Module()
    layer.scaling = 0.5
    stored = strategies.make("linear", zero_A=True)
    triple = LoRATriple(
        stored.W,
        stored.A,
        stored.B,
        scaling=(layer, "scaling"),
        name="q",
        set_scaling=partial(setattr, layer, "scalign"),
    )
    optimizer = folded_optimizer(triple)
    stored.A.grad = torch.ones_like(stored.A)
    before = stored.A.detach().clone()
    match = (
        r"the scaling of q \(1\.5\) was set and is another one now \(nothing was changed\): does set_scaling set what"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=match):
            optimizer.step()
    assert torch.equal(stored.A, before)
    assert (triple.folded, triple.branch_scaling, optimizer.step_count) == (0.0, 0.5, 0)


def sets_a_layer_of_its_own(scaling):
    """As one at the top of a script does, with no closure."""


def test_a_setter_that_a_copy_would_share_is_not_copied():
    module = ScaledLayer("alpha")
    for function in (lambda s: module.set_scaling(s), sets_a_layer_of_its_own):
        triple = LoRATriple(*module.tensors(), scaling=0.5, name="q", set_scaling=function)
        with pytest.raises(
            TypeError, match=r"q: set_scaling is a plain function.* functools\.partial\(function, layer\)"
        ):
            copy.deepcopy(triple)
    twin_module, twin = copy.deepcopy((module, module.triple()))
    twin.set_branch_scaling(4.0)
    assert (twin_module.alpha, module.alpha) == (8.0, 1.0)


def test_an_export_of_a_branch_that_was_rescaled_is_refused():
    run = LayerRun("folded").train(2)
    run.scale.fill_(0.5)
    for action in (deltaopt.export_adapter, deltaopt.merged_weights):
        with pytest.raises(RuntimeError, match="q: its scaling was"):
            action(run.optimizer)


def layers_of_one_scaling(how):
    """Two layers whose forward passes multiply by the same number."""
    model = nn.Module()
    model.scale = 0.5
    if how == "tensor":
        model.scale = torch.tensor(0.5, dtype=torch.float64)
    stored = [strategies.make("linear", seed, zero_A=True) for seed in range(2)]
    scaling = model.scale if how == "tensor" else (model, "scale")
    triples = [s.triple(scaling, name) for s, name in zip(stored, "ab", strict=True)]
    return model, stored, triples


@pytest.mark.parametrize("how", ["tensor", "attribute"])
@pytest.mark.parametrize("other", [{"update_ratio": 1.0}, {"start_step": 3}])
def test_a_scaling_of_layers_that_differ_is_refused(how, other):
    model, _, (first, second) = layers_of_one_scaling(how)
    groups = [{"triples": [first]}, {"triples": [second], **other}]
    match = (
        "b: its scaling is that of a too, which has another update_ratio or start_step, and cannot be .* set for both"
    )
    with pytest.raises(ValueError, match=match):
        DeltaLoRAOptimizer(torch.optim.SGD, groups, lr=0.1, weight_update="folded")
    optimizer = folded_optimizer(first)
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group(groups[1])
    assert float(model.scale) == 0.5


@pytest.mark.parametrize("how", ["tensor", "attribute"])
def test_layers_of_one_scaling_are_folded_together(how):
    """Also one that has no gradients yet."""
    ends = []
    for mode in ("in_place", "folded"):
        model, stored, triples = layers_of_one_scaling(how)
        optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.05, weight_update=mode)
        for t in range(6):
            optimizer.zero_grad()
            effective = [s.W + model.scale * s.A @ s.B for s in stored]
            sum(w.square().mean() for w in effective[: 1 + (t > 2)]).backward()
            optimizer.step()
        assert float(model.scale) == (1.5 if mode == "folded" else 0.5)
        ends.append([w.detach() for s in stored for w in (s.A, s.B, s.W + model.scale * s.A @ s.B)])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_buffer_that_a_conversion_left_behind_is_refused(steps):
    """The factors are converted in their place, and a buffer is another one then."""
    layer = nn.Module()
    layer.W = nn.Parameter(torch.randn(4, 6), requires_grad=False)
    layer.A, layer.B = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.randn(2, 6))
    layer.register_buffer("scaling", torch.tensor(0.5))
    triple = LoRATriple(layer.W, layer.A, layer.B, scaling=layer.scaling, name="q")
    optimizer = folded_optimizer(triple)

    def step():
        optimizer.zero_grad()
        (layer.W + layer.scaling * layer.A @ layer.B).square().sum().backward()
        optimizer.step()

    for _ in range(steps):
        step()
    layer.double()
    before = layer.A.detach().clone()
    match = r"q: its scaling .* stayed torch.float32 on cpu when A became torch.float64 on cpu .*Register \(module,"
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            step()
    assert torch.equal(layer.A, before)
    assert layer.scaling == (1.5 if steps else 0.5)
    triple = LoRATriple(layer.W, layer.A, layer.B, scaling=(layer, "scaling"), name="q")
    with warns_of_a_takeover() if steps else contextlib.nullcontext():
        optimizer = folded_optimizer(triple)
    step()
