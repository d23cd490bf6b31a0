"""WeightState: tensors are looked up once for each event and let go of after it; the base, and copies."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple, claims
from deltaopt.weight import WeightState
from tests.support import strategies
from tests.support.runs import LayerRun, noisy_run, noisy_step


class Counting(nn.Module):
    """A layer that counts how often its tensors are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = strategies.make("linear", dtype=torch.float32)
        self.looked_up = {"W": 0, "A": 0, "B": 0}

    def __getattr__(self, name: str):
        if name in ("W", "A", "B"):
            self.looked_up[name] += 1
            return getattr(self.tensors, name)
        return super().__getattr__(name)

    def optimizer(self) -> DeltaLoRAOptimizer:
        triple = LoRATriple((self, "W"), (self, "A"), (self, "B"), name="q")
        return DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)


def test_the_constructor_looks_W_up_three_times(monkeypatch):
    """Once to check it, once to see that the same tensor comes again, and once to find other optimizers on it.

    While another optimizer lives that has moved its W, it is looked up once more.
    """
    monkeypatch.setattr(claims, "_living", weakref.WeakSet())  # those of other tests
    layer = Counting()
    layer.optimizer()
    assert layer.looked_up["W"] == 3


def test_a_step_looks_each_tensor_up_once():
    layer = Counting()
    optimizer = layer.optimizer()
    noisy_step(optimizer, layer.tensors.A, layer.tensors.B)  # the base is noted
    layer.looked_up = dict.fromkeys("WAB", 0)
    noisy_step(optimizer, layer.tensors.A, layer.tensors.B)
    assert layer.looked_up == {"W": 1, "A": 1, "B": 1}


def failing_step(optimizer: DeltaLoRAOptimizer) -> None:
    with pytest.raises(ValueError, match="in the closure"):
        optimizer.step(lambda: float("in the closure"))


EVENTS_OF_A_WEIGHT = {
    "step": lambda o: None,
    "state_dict": lambda o: o.state_dict(),
    "load_state_dict": lambda o: o.load_state_dict(o.state_dict()),
    "base_weights": lambda o: o.base_weights().__enter__(),
    "resync": lambda o: o.resync(),
    "restart": lambda o: o.restart(),
    "rebase": lambda o: o.rebase(),
    "residual": lambda o: o.residual("q"),
    "export": deltaopt.merged_weights,
    "a step that fails": failing_step,
}


@pytest.mark.parametrize("event", EVENTS_OF_A_WEIGHT)
def test_no_event_keeps_a_replaced_weight_alive(event):
    module = nn.Module()
    stored = strategies.make("linear", dtype=torch.float32)
    for name in "WAB":
        setattr(module, name, nn.Parameter(getattr(stored, name).detach(), requires_grad=name != "W"))
    optimizer = DeltaLoRAOptimizer(
        torch.optim.SGD, [LoRATriple(*((module, n) for n in "WAB"), name="q")], lr=0.1, keep_base="cpu"
    )
    noisy_step(optimizer, module.A, module.B)
    EVENTS_OF_A_WEIGHT[event](optimizer)
    old = weakref.ref(module.W)
    module.W = nn.Parameter(module.W.detach().clone(), requires_grad=False)
    gc.collect()
    assert old() is None


def test_a_failing_step_lets_go_of_its_tensors_too():
    run = noisy_run()
    run.set_gradients()
    with pytest.raises(ZeroDivisionError, match="in the closure"):
        run.optimizer.step(lambda: (_ for _ in ()).throw(ZeroDivisionError("in the closure")))
    weight = run.optimizer.weights()[0]
    assert weight._tensors is None


@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "deepcopy", "pickle"]
)
def test_a_copy_has_its_tensors_checked_at_its_first_event(how):
    """Also one that is made in the middle of an event, when the tensors are known."""
    original = noisy_run().optimizer.weights()[0]
    original.resolve()
    weight = how(original)
    assert weight._tensors is None
    assert weight.resolve()
    weight.accept()
    assert not weight.resolve()


def test_a_replaced_tensor_is_noticed_until_it_is_accepted():
    run = noisy_run()
    weight = run.optimizer.weights()[0]
    assert not weight.resolve()
    run.stored.A.data = run.stored.A.data.clone()
    assert weight.resolve()
    assert weight.resolve()
    weight.accept()
    assert not weight.resolve()


def test_the_base_is_noted_once():
    run = LayerRun(dtype=torch.float32, keep_base="cpu")
    weight: WeightState = run.optimizer.weights()[0]
    assert not weight.moved
    before = run.stored.W.clone()
    run.train(2)
    assert weight.moved
    kept = weight.base_copy(weight.base)
    assert torch.equal(kept, before)
    weight.note_base()
    assert torch.equal(weight.base_copy(weight.base), before)


@pytest.mark.parametrize("layout", ["linear", "rows", "conv2d_channels_last", "packed_experts"])
def test_the_part_and_the_matrix_are_views_of_W(layout):
    stored = strategies.make(layout)
    weight = DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple()], lr=0.1).weights()[0]
    for view in (weight.part(), weight.matrix(), weight.triple.view.part_matrix(weight.part())):
        assert view.untyped_storage().data_ptr() == stored.W.untyped_storage().data_ptr()
    assert weight.matrix().numel() == weight.part().numel()


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_the_branch_is_in_the_dtype_of_the_computation(dtype, expected):
    stored = strategies.make("linear", dtype=torch.bfloat16, factor_dtype=dtype)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple(0.5)], lr=0.1)
    coef, A, B = optimizer.weights()[0].branch()
    assert (coef, A.dtype, B.dtype) == (0.5, expected, expected)
