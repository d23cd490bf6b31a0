"""Every event is all or nothing: an exception at any line of the package leaves things in order.

Each event is interrupted at its lines, one at a time, at several moments of a run. Afterwards the base and the exported
adapter give the effective weight, the fingerprints fit, the next step runs, and the run ends where the uninterrupted
one does, or where one without the event does. The suite takes some of the lines, `make nightly` takes all.
"""

import copy
import itertools
import os
import re
import signal
import warnings
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple
from deltaopt.rounding.writer import Writer
from tests.support import internals
from tests.support.compare import close, same
from tests.support.interruption import interrupt
from tests.support.nightly import one_in
from tests.support.strategies import RULES

# A run without a resync ends in such steps.
pytestmark = pytest.mark.filterwarnings("ignore:A and B of .* changed between two steps:UserWarning")

SAMPLED = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 37
"""Of so many lines one is taken, another one for each event and moment."""


class Layer(torch.nn.Module):
    """A layer of W and its branch, with a loss whose gradients depend on nothing but its tensors."""

    def __init__(self, c, d, seed, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        W, A, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((c, d), (c, 2), (2, d)))
        self.W = torch.nn.Parameter(W.to(dtype), requires_grad=False)
        factors = torch.float64 if dtype == torch.float64 else torch.float32
        self.A, self.B = torch.nn.Parameter(A.to(factors)), torch.nn.Parameter(B.to(factors))
        self.scaling = 0.5
        self.target = torch.randn(c, d, generator=generator, dtype=torch.float64)

    def effective(self):
        return self.W.double() + self.scaling * (self.A.double() @ self.B.double())

    def triple(self, name):
        return LoRATriple((self, "W"), (self, "A"), (self, "B"), scaling=(self, "scaling"), name=name)


class World:
    """Two layers of different shapes and the optimizer of both, from step 2 on."""

    def __init__(self, rule="in_place", dtype=torch.float64, third=False, **options):
        shapes = [(3, 4), (5, 3), *([(4, 4)] if third else [])]
        self.layers = torch.nn.ModuleList(Layer(*shape, i, dtype) for i, shape in enumerate(shapes))
        self.pristine = [layer.W.detach().clone() for layer in self.layers]
        triples = [layer.triple(name) for layer, name in zip(self.layers, "abc", strict=False)]
        options = {"update_ratio": 1.5, "start_step": 2, "lr": 0.02} | options
        self.optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples[:2], weight_update=rule, **options)
        self.spare = triples[2:]

    def backward(self):
        self.optimizer.zero_grad()
        sum((layer.effective() - layer.target).square().mean() for layer in self.layers).backward()

    def train(self, steps):
        for _ in range(steps):
            self.backward()
            self.optimizer.step()
        return self

    def tensors(self):
        """Return what a run comes to."""
        return [t.detach().clone() for layer in self.layers for t in (layer.W, layer.A, layer.B)] + [
            torch.tensor([layer.scaling for layer in self.layers])
        ]

    def assert_in_order(self):
        optimizer = self.optimizer
        state = optimizer.state_dict()  # completes what was interrupted
        effective = [layer.effective().detach() for layer in self.layers]
        exported = deltaopt.export_adapter(optimizer)
        for layer, weight, W0, now in zip(self.layers, optimizer.weights(), self.pristine, effective, strict=False):
            if layer.W.dtype == torch.float64 and not weight.rebased:
                assert close(W0 + exported[weight.label].product(), now)
        optimizer.load_state_dict(state)  # compares all fingerprints
        assert all(map(torch.equal, effective, (layer.effective().detach() for layer in self.layers)))
        assert same(optimizer.state_dict(), state)


def global_state():
    """Return what an event must not change for the rest of the process."""
    return (
        dict(torch_optimizer._global_optimizer_pre_hooks),
        dict(torch_optimizer._global_optimizer_post_hooks),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.get_default_device(),
    )


def step(world):
    world.optimizer.step()


def step_with_closure(world):
    def closure():
        world.backward()
        return 1.0

    world.optimizer.step(closure)


def step_at_another_ratio(world):
    world.optimizer.step()  # `world_at` has set the ratio


def restart(world):
    world.optimizer.restart(generator=torch.Generator().manual_seed(9))


def resync(world):
    world.optimizer.resync()  # `world_at` has changed the factors


def rebase(world):
    world.optimizer.rebase()


def base_weights(world):
    with world.optimizer.base_weights():
        pass


def state_dict(world):
    world.optimizer.state_dict()


def load_state_dict(world):
    world.optimizer.load_state_dict(world.saved)


def add_param_group(world):
    if len(world.optimizer.groups) == 1:  # repeated after it was completed, it would be refused
        world.optimizer.add_param_group({"triples": world.spare, "lr": 0.01})


def zero_grad(world):
    world.optimizer.zero_grad()


def deepcopy(world):
    copy.deepcopy((world.layers, world.optimizer))


def flush(world):
    world.optimizer.displacement("a")


EVENTS = {
    function.__name__: function
    for function in (
        *(step, step_with_closure, step_at_another_ratio, restart, resync, rebase, base_weights, state_dict),
        *(load_state_dict, add_param_group, zero_grad, deepcopy, flush),
    )
}
MOMENTS = (0, 2, 4)
"""Steps before the event: before the first one, at step K, later."""


def world_at(name, rule, moment, **options):
    """Return a world just before an event; one that loads is a fresh one, to which the saved factors were loaded."""
    third = name == "add_param_group"
    world = World(rule, third=third, **options).train(moment)
    if name == "load_state_dict":
        saved, world = world, World(rule, third=third, **options)
        world.saved = copy.deepcopy(saved.optimizer.state_dict())
        with torch.no_grad():
            for here, there in zip(world.layers, saved.layers, strict=True):
                here.A.copy_(there.A)
                here.B.copy_(there.B)
    if name == "step_at_another_ratio":
        world.optimizer.groups[0].update_ratio = 0.75
    if name == "resync":
        with torch.no_grad():
            for layer in world.layers:
                layer.A.add_(0.125)
    world.backward()
    return world


def ends_of(name, rule, moment, after, **options):
    """Return where a run ends with the event and without it."""
    ends = []
    for happens in (True, False):
        world = world_at(name, rule, moment, **options)
        if happens:
            EVENTS[name](world)
        ends.append(world.train(after).tensors())
    return ends


def assert_all_or_nothing(name, rule, moment, error, sampled=SAMPLED, **options):
    ends = ends_of(name, rule, moment, 2, **options)
    before = global_state()
    for line in itertools.count(1 + (3 * moment + len(name)) % min(sampled, 5), sampled):
        world = world_at(name, rule, moment, **options)
        if not interrupt(partial(EVENTS[name], world), EVENTS[name], line, error):
            assert line > 1, "the event has no line"
            return
        assert global_state() == before, f"line {line}"
        world.assert_in_order()
        end = world.train(2).tensors()
        assert any(all(map(close, end, whole)) for whole in ends), f"line {line}"


@pytest.mark.parametrize(
    ("name", "rule", "moment", "error"), one_in(2, EVENTS, RULES, MOMENTS, [KeyboardInterrupt, MemoryError])
)
def test_an_event_that_is_interrupted_at_any_line_leaves_things_in_order(name, rule, moment, error):
    assert_all_or_nothing(name, rule, moment, error)


@pytest.mark.parametrize(
    "name", ["step", "step_at_another_ratio", "restart", "resync", "load_state_dict", "base_weights"]
)
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_a_16_bit_weight_is_written_once(name, rounding):
    """Round as the uninterrupted run does, bit for bit: no block is written twice, and none is left out."""
    warned = {"resync": "in one rounded step", "load_state_dict": "rounded once"}.get(name, "nothing")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{warned}")
        # An export says so of factors that were changed and that no resync() has followed yet.
        warnings.filterwarnings("ignore", message=".*rounding hides whether")
        assert_all_or_nothing(
            name,
            "in_place",
            4,
            KeyboardInterrupt,
            3 * SAMPLED,
            dtype=torch.bfloat16,
            rounding=rounding,
            keep_base="cpu",
        )


def test_blocks_of_one_weight_are_written_once(monkeypatch):
    internals.use_blocks_of(monkeypatch, 4)
    for rounding in ("nearest", "stochastic", "compensated"):
        assert_all_or_nothing("step", "in_place", 2, KeyboardInterrupt, 31, dtype=torch.float16, rounding=rounding)


def test_a_step_whose_device_the_host_cannot_read():
    """Take the path of a GPU, on which the ledgers learn later what a step came to."""
    for event in ("step", "step_at_another_ratio", "flush"):
        assert_all_or_nothing(event, internals.as_on_a_gpu(), 4, KeyboardInterrupt, 23)


def test_an_inner_step_that_raises_half_way_takes_w_with_it():
    """Count no step, and let each W follow what was done to its factors."""
    world, whole = World().train(3), World().train(3)
    world.backward()
    with torch.no_grad():
        for layer in whole.layers[:1]:
            before = (layer.A @ layer.B).clone()
            layer.A.mul_(2.0)
            layer.W.add_(1.5 * layer.scaling * (layer.A @ layer.B - before))

    def half_a_step(closure=None):
        with torch.no_grad():
            world.layers[0].A.mul_(2.0)
        raise MemoryError("half-way")

    world.optimizer.inner.step = half_a_step
    with pytest.raises(MemoryError, match="half-way"):
        world.optimizer.step()
    del world.optimizer.inner.step
    assert world.optimizer.step_count == 3
    world.assert_in_order()
    assert all(map(close, world.tensors(), whole.tensors()))


class OutOfMemory:
    """Lets each write of the layer "b" run out of memory before it changes anything, until memory is freed."""

    def __init__(self, patch):
        self.freed = False
        for name in ("add_product_", "add_terms_"):
            patch.setattr(Writer, name, self.failing(getattr(Writer, name)))

    def failing(self, write):
        def wrapped(writer, weight, *arguments, **options):
            if weight.label == "b" and not self.freed:
                raise torch.OutOfMemoryError("out of memory")
            write(writer, weight, *arguments, **options)

        return wrapped


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *((name, "in_place") for name in ("step", "restart", "resync", "load_state_dict")),
        *((name, "folded") for name in ("step_at_another_ratio", "restart")),
    ],
)
def test_an_event_that_cannot_be_completed_says_so_until_it_can(name, rule, monkeypatch):
    ends = ends_of(name, rule, 4, 2)
    world = world_at(name, rule, 4)
    memory = OutOfMemory(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        EVENTS[name](world)
    what = {"step_at_another_ratio": "a change of update_ratio"}.get(name, f"{name}()")
    message = f"{what} was interrupted earlier, and completing it has failed now: 1 layer (b) not in order (OutOfMemory"
    for use in (step, state_dict, restart, base_weights, deepcopy, add_param_group):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            use(world)
    memory.freed = True
    world.assert_in_order()
    end = world.train(2).tensors()  # a change of a folded ratio comes before the inner step, which was not made
    assert any(all(map(close, end, whole)) for whole in ends)


def test_factors_that_change_before_an_event_is_completed_are_no_part_of_it(monkeypatch):
    """Move W by the factors of the interrupted step; what was changed since is a change from outside."""
    world, whole = World().train(4), World().train(5)
    memory = OutOfMemory(monkeypatch)
    world.backward()
    with pytest.raises(torch.OutOfMemoryError):
        world.optimizer.step()
    with torch.no_grad():
        for layer in world.layers:
            layer.A.add_(1.0)
    memory.freed = True
    world.optimizer.state_dict()
    assert all(close(layer.W, there.W) for layer, there in zip(world.layers, whole.layers, strict=True))
    world.assert_in_order()


def test_loading_a_checkpoint_leads_out_of_an_event_that_cannot_be_completed(monkeypatch):
    world = World().train(4)
    saved = copy.deepcopy((world.layers.state_dict(), world.optimizer.state_dict()))
    end = world.train(3).tensors()
    with pytest.MonkeyPatch.context() as patch:
        OutOfMemory(patch)
        world.backward()
        with pytest.raises(torch.OutOfMemoryError):
            world.optimizer.restart()
        world.layers.load_state_dict(saved[0])
        world.optimizer.load_state_dict(saved[1])
        world.optimizer.state_dict()
    assert all(map(close, world.train(3).tensors(), end))


def test_a_load_that_is_interrupted_supersedes_an_event_that_cannot_be_completed():
    """Complete the load alone: the old step is no part of what was loaded."""
    world = World().train(4)
    saved = copy.deepcopy((world.layers.state_dict(), world.optimizer.state_dict()))
    end = world.train(3).tensors()
    with pytest.MonkeyPatch.context() as patch:
        OutOfMemory(patch)
        world.backward()
        with pytest.raises(torch.OutOfMemoryError):
            world.optimizer.step()
    world.layers.load_state_dict(saved[0])

    def fail(*_):
        raise MemoryError("in a hook")

    hook = world.optimizer.inner.register_load_state_dict_post_hook(fail)
    with pytest.raises(MemoryError, match="in a hook"):
        world.optimizer.load_state_dict(saved[1])
    hook.remove()
    assert world.optimizer.step_count == 4
    world.assert_in_order()
    assert all(map(close, world.train(3).tensors(), end))


def test_a_state_that_is_refused_leads_nowhere(monkeypatch):
    """Keep what is left to be done of an interrupted event."""
    world = World().train(4)
    memory = OutOfMemory(monkeypatch)
    world.backward()
    with pytest.raises(torch.OutOfMemoryError):
        world.optimizer.step()
    with pytest.raises(ValueError, match="no state of an optimizer"):
        world.optimizer.load_state_dict({})
    memory.freed = True
    world.assert_in_order()
    assert all(map(close, world.train(1).tensors(), World().train(6).tensors()))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="runs where the system has timers that send signals")
@pytest.mark.parametrize("rule", RULES)
def test_a_signal_at_any_time_leaves_things_in_order(rule):
    """Raise in the handler of a timer, wherever it is: within a product, in torch's own lines, or in ours."""

    def handler(number, frame):
        raise KeyboardInterrupt("a signal")

    delays = torch.rand(40, generator=torch.Generator().manual_seed(0)).mul(0.02).tolist()
    before, world = signal.signal(signal.SIGALRM, handler), World(rule, update_ratio=lambda t: 1.0 + t % 3)
    try:
        for delay in delays:
            signal.setitimer(signal.ITIMER_REAL, 0.001 + delay)
            with suppress(KeyboardInterrupt):
                world.train(1000)
            signal.setitimer(signal.ITIMER_REAL, 0)
            torch.set_grad_enabled(True)  # a signal in the first line of a `torch.no_grad()` leaves it switched off
            world.assert_in_order()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert world.optimizer.step_count > 0
