"""The base by itself, for triples made by hand: with ``is_active`` a module gives the base's output where it is off."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support.compare import COPIES, assert_close
from tests.support.strategies import each_rule
from tests.support.switched import (
    LAYERS,
    Branch,
    C,
    D,
    Linear,
    R,
    base_output,
    layer_and_input,
    off,
    optimizer_of,
    train,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

each_kind = pytest.mark.parametrize("kind", LAYERS)


def close(actual, expected):
    assert_close(actual, expected, TOLERANCE[actual.dtype])


class Run:
    """A layer, a copy of it from before there was a triple, and an optimizer that has moved its W."""

    def __init__(self, kind="linear", rule="in_place", dtype=torch.float64, steps=4, **options):
        self.layer, self.x = layer_and_input(kind, dtype)
        self.frozen = copy.deepcopy(self.layer)
        self.optimizer = optimizer_of(self.layer, weight_update=rule, **options)
        self.train(steps)

    def train(self, steps):
        train(self.layer, self.optimizer, self.x, steps)
        assert (self.layer.weight - self.frozen.weight).abs().max() > 1e-2

    def assert_base(self):
        assert_base(self.layer, self.frozen, self.x)


@torch.no_grad()
def assert_base(layer, frozen, x):
    """With all branches off the output is that of the frozen copy; with all on it is another one, and as before."""
    policy = layer(x)
    close(base_output(layer, x), base_output(frozen, x))
    assert torch.equal(layer(x), policy)
    assert (policy - frozen(x)).abs().max() > 1e-2


@each_rule
@pytest.mark.parametrize("dtype", TOLERANCE)
@each_kind
def test_where_the_branch_is_off_the_output_is_the_bases(kind, dtype, rule):
    """In place, and folded from a product that is not zero, which is taken from W at step K."""
    run = Run(kind, rule, dtype)
    run.assert_base()
    run.train(2)
    run.assert_base()


@each_rule
@each_kind
def test_before_W_has_moved_nothing_is_computed(kind, rule):
    layer, x = layer_and_input(kind)
    frozen, optimizer = copy.deepcopy(layer), optimizer_of(layer, weight_update=rule, start_step=2)
    for steps in (0, 2):
        train(layer, optimizer, x, steps)
        assert torch.equal(base_output(layer, x), base_output(frozen, x))
    train(layer, optimizer, x, 1)
    close(base_output(layer, x), base_output(frozen, x))
    assert not torch.equal(layer.weight, frozen.weight)


@each_rule
def test_each_part_of_a_fused_weight_has_its_own_switch(rule):
    run = Run("fused", rule)
    with torch.no_grad():
        policy, base = run.layer(run.x), base_output(run.frozen, run.x)
        for names in ("q", "v", "qk"):
            with off(run.layer, *names):
                found = run.layer(run.x)
            for i, part in enumerate("qkv"):
                rows = slice(C * i, C * (i + 1))
                close(found[..., rows], (base if part in names else policy)[..., rows])


@each_rule
@pytest.mark.parametrize("place", ["cpu", "device"])
@each_kind
def test_with_a_copy_of_the_base_it_is_exact(kind, place, rule):
    """Where all of W moves: of a part of W no copy of all of it is kept."""
    run = Run(kind, rule, torch.float32, keep_base=place)
    if kind in ("fused", "columns", "transposed_rows"):
        run.assert_base()
    else:
        assert torch.equal(base_output(run.layer, run.x), base_output(run.frozen, run.x))


@pytest.mark.parametrize("event", ["ratio", "restart", "resync", "rebase", "reload"])
@each_rule
@pytest.mark.parametrize("kind", ["linear", "fused"])
def test_after_every_event(kind, rule, event):
    run = Run(kind, rule)
    optimizer = run.optimizer
    if event == "ratio":
        optimizer.groups[0].update_ratio = 0.5
    elif event == "resync":
        with torch.no_grad():
            for triple in optimizer.triples:
                triple.A.add_(0.1)
        optimizer.resync()
    elif event == "reload":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        getattr(optimizer, event)()
    if event == "rebase":
        with torch.no_grad():
            run.frozen.weight.copy_(run.layer.weight)
    close(base_output(run.layer, run.x), base_output(run.frozen, run.x))
    train(run.layer, optimizer, run.x, 2)
    run.assert_base()


@each_rule
@pytest.mark.parametrize("whole", [True, False])
def test_a_resumed_run_knows_of_the_movement(rule, whole):
    """The whole model was saved, or the factors alone: W is rebuilt from the base then."""
    run = Run(rule=rule)
    saved = copy.deepcopy((run.layer.state_dict(), run.optimizer.state_dict()))
    layer, x = copy.deepcopy(run.frozen), run.x
    if not whole:
        saved[0]["weight"] = run.frozen.weight.clone()
    optimizer = optimizer_of(layer, weight_update=rule)
    layer.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    close(layer.weight, run.layer.weight)
    assert_base(layer, run.frozen, x)


@each_rule
@pytest.mark.parametrize("keep", [None, "cpu"])
@each_kind
def test_within_base_weights_nothing_is_subtracted_twice(kind, keep, rule):
    run = Run(kind, rule, keep_base=keep)
    with run.optimizer.base_weights():
        close(base_output(run.layer, run.x), base_output(run.frozen, run.x))
    run.assert_base()


class Outside(nn.Module):
    """A module of torch's own, with the branch next to it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, C).requires_grad_(False)
        self.branch = Branch({"layout": "linear"}, D)

    def forward(self, x):
        out = self.linear(x)
        return out + x @ self.branch.product(self.linear.weight).mT if self.branch.on else out

    def triple(self, **options):
        return self.branch.triple(self.linear, **options)


def outside(**options):
    """Return (net, copy of it from before there was a triple, optimizer that has moved its W, input)."""
    torch.manual_seed(0)
    net, x = Outside().double(), torch.randn(4, D, dtype=torch.float64)
    frozen = copy.deepcopy(net)
    options = {"lr": 2e-2, **options}
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [net.triple()], **options)
    train(net, optimizer, x)
    for each in (net, frozen):
        each.branches = {"q": each.branch}
    return net, frozen, optimizer, x


@each_rule
@pytest.mark.parametrize("keep", [None, "device"])
def test_a_module_of_torchs_own_with_the_branch_next_to_it(keep, rule):
    net, frozen, optimizer, x = outside(weight_update=rule, keep_base=keep, start_step=1)
    assert_base(net, frozen, x)
    for method in ("copy", "hooks"):
        with optimizer.base_weights(method=method):
            close(base_output(net, x), base_output(frozen, x))
        assert_base(net, frozen, x)


@pytest.mark.parametrize("keep", [None, "device"])
def test_what_a_hook_of_the_user_adds_stays(keep):
    """As where the branch itself, or another one, is such a hook, put on before or after the triple is made."""
    torch.manual_seed(0)
    layer, x = Linear(D, C).with_branches(q=Branch({"layout": "linear"}, D)), torch.randn(4, D, dtype=torch.float64)
    frozen = copy.deepcopy(layer)
    layer.register_forward_hook(lambda module, args, output: output + 10.0)
    optimizer = optimizer_of(layer, keep_base=keep)
    layer.register_forward_hook(lambda module, args, output: 2.0 * output)
    train(layer, optimizer, x)
    close(base_output(layer, x), 2.0 * (base_output(frozen, x) + 10.0))


@pytest.mark.parametrize("keep", [None, "device"])
def test_a_forward_pass_with_further_arguments(keep):
    class Shifted(Linear):
        def forward(self, x, shift):
            return super().forward(x) + shift

    torch.manual_seed(0)
    layer, x = Shifted(D, C).with_branches(q=Branch({"layout": "linear"}, D)), torch.randn(4, D, dtype=torch.float64)
    frozen = copy.deepcopy(layer)
    optimizer = optimizer_of(layer, keep_base=keep)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x, 1.0).square().mean().backward()
        optimizer.step()
    with torch.no_grad(), off(layer), off(frozen):
        close(layer(x, 3.0), frozen(x, 3.0))
        close(layer(x=x, shift=3.0), frozen(x, 3.0))
        close(layer(shift=3.0, x=x), frozen(x, 3.0))
        close(layer(shift=torch.tensor(3.0), x=x), frozen(x, 3.0))


@pytest.mark.parametrize("keep", [None, "cpu"])
@each_rule
@pytest.mark.parametrize("kind", sorted(LAYERS.keys() - {"embedding"}))
def test_gradients_flow_to_the_input_of_the_base(kind, rule, keep):
    run = Run(kind, rule, keep_base=keep)
    grads = []
    for layer in (run.layer, run.frozen):
        x = run.x.clone().requires_grad_()
        with off(layer):
            layer(x).square().mean().backward()
        grads.append(x.grad)
    close(*grads)


# Copies.


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
@each_rule
@each_kind
def test_a_copy_of_the_model_has_the_same_base(kind, rule, way):
    """And switches of its own, whatever the original does afterwards."""
    run = Run(kind, rule)
    twin = way(run.layer)
    run.train(2)
    assert_base(twin, run.frozen, run.x)
    run.assert_base()


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
@each_rule
def test_a_copy_of_model_and_optimizer_goes_its_own_way(rule, way):
    run = Run("fused", rule)
    twin, optimizer = way((run.layer, run.optimizer))
    train(twin, optimizer, run.x, 2)
    assert_base(twin, run.frozen, run.x)
    run.assert_base()
    run.train(1)
    assert_base(twin, run.frozen, run.x)


@each_rule
def test_it_outlives_the_optimizer(rule):
    run = Run("fused", rule)
    gone = weakref.ref(run.optimizer)
    del run.optimizer
    gc.collect()
    assert gone() is None
    run.assert_base()


@each_rule
def test_a_triple_made_twice_has_one_hook(rule):
    """The optimizer that was built last counts, and so does the function that was given last."""
    layer, x = layer_and_input("fused")
    frozen = copy.deepcopy(layer)
    asked = []
    layer.triples(is_active=lambda: pytest.fail("an earlier triple's function was asked"))
    layer.triples()
    optimizer = optimizer_of(layer, weight_update=rule)
    assert len(layer._forward_hooks) == 3
    train(layer, optimizer, x)
    assert_base(layer, frozen, x)
    layer.branches["q"].triple(layer, is_active=lambda: bool(asked.append("q")))
    base_output(layer, x)
    assert asked == ["q"]
    assert len(layer._forward_hooks) == 3


def test_without_is_active_nothing_is_hooked():
    layer, x = layer_and_input()
    optimizer = optimizer_of(layer)
    triple = layer.branches["q"].triple(layer, is_active=None)
    assert triple.output_hook is None
    del optimizer
    layer, x = layer_and_input()
    frozen = copy.deepcopy(layer)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, layer.triples(is_active=None), lr=2e-2)
    train(layer, optimizer, x)
    assert not layer._forward_hooks
    assert (base_output(layer, x) - base_output(frozen, x)).abs().max() > 1e-2


# Several branches on one W.


@pytest.mark.parametrize("keep", [None, "cpu"])
@pytest.mark.parametrize("first", ["q", "other"])
@each_rule
def test_two_branches_that_moved_one_W_in_turn_have_their_own_movement(rule, first, keep):
    """Whichever hook comes first, each branch keeps its movement when the other one is off."""
    torch.manual_seed(0)
    branches = {name: Branch({"layout": "linear"}, D) for name in ("q", "other")}
    layer, x = Linear(D, C).with_branches(**branches), torch.randn(4, D, dtype=torch.float64)
    frozen = copy.deepcopy(layer)
    layer.branches[first].triple(layer)
    with off(layer, "other"):
        train(layer, optimizer_of_branch(layer, "q", weight_update=rule, keep_base=keep), x)
        with torch.no_grad():
            q_alone = layer(x)
    with off(layer, "q"):
        train(layer, optimizer_of_branch(layer, "other", weight_update=rule, keep_base=keep), x)
        other_alone, W = layer(x).detach(), layer.weight.clone()
        with torch.no_grad(), off(layer, "other"):
            close(layer(x), base_output(frozen, x))
    with torch.no_grad():
        with off(layer, "other"):
            close(layer(x), q_alone)
        with off(layer):
            close(layer(x), base_output(frozen, x))
        moved = q_alone - base_output(frozen, x) - x @ layer.branches["q"].product(W).mT
        assert moved.abs().max() > 1e-2
        both = q_alone + other_alone - base_output(frozen, x)
        close(layer(x), both)


def optimizer_of_branch(layer, name, **options):
    triple = layer.branches[name].triple(layer, name)
    return DeltaLoRAOptimizer(torch.optim.AdamW, [triple], lr=2e-2, start_step=1, **options)


def test_a_later_optimizer_of_the_same_branch_knows_that_W_had_moved():
    """Its base is not the pristine weight, as its checkpoints say."""
    run = Run()
    with pytest.warns(UserWarning, match=r"the weights of 1 layer \(q\) were moved by an earlier optimizer"):
        later = optimizer_of(run.layer)
    assert later.weights()[0].rebased
    assert not run.optimizer.weights()[0].rebased


# Bad input.


@pytest.mark.parametrize("value", [True, "q", 0])
def test_is_active_that_is_no_function_is_refused(value):
    layer, _ = layer_and_input()
    with pytest.raises(TypeError, match=f"q: is_active is a function without arguments, got {value!r}"):
        layer.branches["q"].triple(layer, is_active=value)
    assert not layer._forward_hooks


def test_a_W_that_is_a_tensor_is_refused():
    layer, _ = layer_and_input()
    branch = layer.branches["q"]
    with pytest.raises(TypeError, match=r'q: is_active needs the module .* register \(\(module, "weight"\), A, B\)'):
        LoRATriple(layer.weight, branch.A, branch.B, name="q", is_active=branch.is_on)


@pytest.mark.parametrize("layout", ["experts", "transposed_experts"])
def test_experts_are_refused(layout):
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(2, C, C), requires_grad=False)
    A, B = torch.randn(2, C, R, requires_grad=True), torch.randn(2, R, C, requires_grad=True)
    with pytest.raises(ValueError, match=f"q: is_active is not for the layout '{layout}', whose output is no product"):
        LoRATriple((module, "weight"), A, B, name="q", layout=layout, is_active=lambda: True)
    assert not module._forward_hooks


def test_rows_of_a_convolution_are_refused():
    module = nn.Conv1d(4, 2 * C, 3)
    A, B = torch.randn(C, R, 1, requires_grad=True), torch.randn(R, 4, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"q: is_active is not for the layout 'conv' with rows, .*base_weights"):
        LoRATriple((module, "weight"), A, B, name="q", layout="conv", rows=(0, C), is_active=lambda: True)
    assert not module._forward_hooks


def test_a_convolution_of_ones_own_is_refused():
    """What it does with stride and padding is not known."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(C, 4, 3), requires_grad=False)
    A, B = torch.randn(C, R, 1, requires_grad=True), torch.randn(R, 4, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"q: is_active is not for .* 'conv' of a Module, .* nn\.Conv1d"):
        LoRATriple((module, "weight"), A, B, name="q", layout="conv", is_active=lambda: True)
    assert not module._forward_hooks


def test_an_embedding_with_max_norm_is_refused():
    module = nn.Embedding(D, C, max_norm=1.0).requires_grad_(False)
    A, B = torch.randn(C, R, requires_grad=True), torch.randn(R, D, requires_grad=True)
    with pytest.raises(ValueError, match=r"q: is_active is not for an embedding with max_norm, .*base_weights"):
        LoRATriple((module, "weight"), A, B, name="q", layout="embedding", is_active=lambda: True)
    assert not module._forward_hooks


def test_is_active_that_raises_lets_the_forward_pass_raise():
    """And nothing else is wrong afterwards."""
    run = Run()

    def fail():
        raise LookupError("no adapter by this name")

    run.layer.branches["q"].triple(run.layer, is_active=fail)
    with pytest.raises(LookupError, match="no adapter by this name"):
        run.layer(run.x)
    run.layer.branches["q"].triple(run.layer)
    run.train(1)
    run.assert_base()


def test_a_hook_that_somebody_removed_is_named_at_the_next_step():
    run = Run("fused")
    run.layer._forward_hooks.clear()
    before = [p.detach().clone() for p in run.layer.parameters()]
    with pytest.raises(RuntimeError, match=r"3 layers \(q, k, v\) were removed"):
        train(run.layer, run.optimizer, run.x, 1)
    assert all(map(torch.equal, before, run.layer.parameters()))
    run.train(1)
    run.assert_base()


def test_a_copy_whose_W_was_written_since_is_refused():
    run = Run()
    twin = copy.deepcopy(run.layer)
    with torch.no_grad():
        twin.weight.mul_(0.5)
    twin(run.x)
    with pytest.raises(RuntimeError, match=r"q: .* was written since"):
        base_output(twin, run.x)
