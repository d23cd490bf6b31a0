"""An optimizer whose 16-bit weights go through the kernel makes the weights it would make without it.

On the CPU the kernel runs in Triton's interpreter. tests/unit/test_triton.py has the kernel itself.
"""

import copy
import sys
import warnings
import weakref

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from deltaopt.rounding import batch
from deltaopt.rounding.batch import fused_kernel, try_out
from deltaopt.rounding.blocks import add_product_
from deltaopt.rounding.noise import Keys, label_hashes, noise_factors
from tests.support import internals, strategies
from tests.support.strategies import ROUNDINGS

pytest.importorskip("triton", reason="runs where Triton is installed")

from deltaopt.rounding import _triton

pytestmark = [
    pytest.mark.extra,
    pytest.mark.skipif(
        not _triton.is_available(torch.device("cpu")),
        reason="runs where Triton interprets (TRITON_INTERPRET=1, no CUDA)",
    ),
]

each_rounding_of_a_batch = pytest.mark.parametrize("mode", ROUNDINGS)


class CountingKernel:
    """The kernel, as on a GPU. `made` has the number of products of each batch that optimizers made of it."""

    Product = _triton.Product

    def __init__(self):
        made = self.made = []

        class Batch(_triton.Batch):
            def __init__(self, products):
                made.append(len(products))
                super().__init__(products)

        self.Batch = Batch

    def rule(self, reads=True):
        """Return a `weight_update` that takes this kernel."""
        return internals.as_on_a_gpu(reads=reads, kernel=self)


@pytest.fixture
def kernel():
    return CountingKernel()


def gradients(stored, seed):
    """Set integers, as the factors are: their products are exact in float32, whatever the order of the sums."""
    generator = torch.Generator().manual_seed(seed)
    for s in stored:
        for factor in (s.A, s.B):
            factor.grad = torch.randint(-2, 3, factor.shape, generator=generator).to(factor)


def integer_layers(layouts, dtype, seed=0):
    stored = [strategies.make(layout, seed + i, dtype, torch.float32) for i, layout in enumerate(layouts)]
    with torch.no_grad():
        for s in stored:
            s.A.round_()
            s.B.round_()
    return stored


def batch_optimizer(stored, mode, rule):
    triples = [s.triple(scaling=2.0**-9, name=str(i)) for i, s in enumerate(stored)]
    options = {"update_ratio": 1.0, "rounding": mode, "weight_update": rule}
    return DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=1.0, **options)


def batched_run(stored, mode, rule, schedule=(1.0, 1.0, 1.0)):
    optimizer = batch_optimizer(stored, mode, rule)
    for t, ratio in enumerate(schedule):
        optimizer.groups[0].update_ratio = ratio
        gradients(stored, t)
        optimizer.step()
    return optimizer


def compensations(optimizer):
    """Return what was cut off, for each W."""
    return [internals.compensation_of(optimizer, i) for i in range(len(optimizer.triples))]


@each_rounding_of_a_batch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_every_layout_as_by_blocks(layout, dtype, mode, kernel):
    here, there = integer_layers([layout] * 2, dtype), integer_layers([layout] * 2, dtype)
    first = batched_run(here, mode, kernel.rule())
    assert len(kernel.made) == 1
    second = batched_run(there, mode, "in_place")
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.W.view(torch.int16), b.W.view(torch.int16))
    for a, b in zip(compensations(first), compensations(second), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def additions_of(optimizer, **place):
    """What one step adds to each W: the product of its factors, with the noise of the triple's name."""
    weights = optimizer.weights()
    hashes = [label_hashes([w.label], w.matrix().shape[:-2])[0] for w in weights]
    return [batch.Addition(w, *w.factors(), 2.0**-9, None, hashes[i], i, **place) for i, w in enumerate(weights)]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["linear", "transposed", "experts"])
def test_an_addition_to_a_block_takes_its_place(layout, kernel):
    """Make one batch for each place. Compare with the blocks of torch operations, which are given the noise."""
    stored = integer_layers([layout], torch.bfloat16)
    optimizer = batch_optimizer(stored, "stochastic", "in_place")
    keys, keep, before = Keys(3, 4), torch.ones(1, dtype=torch.bool), stored[0].W.clone()
    batches, [weight] = batch.KernelBatch(kernel), optimizer.weights()
    for place in ((0, 0), (5, 0), (5, 9)):
        [addition] = additions_of(optimizer, first_row=place[0], first_column=place[1])
        stored[0].W.copy_(before)
        batches.add_([addition], keep, keys)
        found = stored[0].W.clone()
        stored[0].W.copy_(before)
        noise = noise_factors(keys, addition.hashes, *weight.matrix().shape[-2:], *place)
        add_product_(weight.matrix(), addition.U, addition.V, addition.coef, noise)
        assert torch.equal(found, stored[0].W)
    assert len(kernel.made) == 3


def test_a_batch_is_kept_while_its_tensors_are(kernel):
    stored = integer_layers(["linear", "linear"], torch.bfloat16)
    optimizer = batched_run(stored, "stochastic", kernel.rule())
    assert kernel.made == [2]
    optimizer.groups[0].update_ratio = 0.5
    gradients(stored, 9)
    optimizer.step()
    assert kernel.made == [2]
    stored[0].W.data = stored[0].W.clone()
    optimizer.step()
    assert kernel.made == [2, 2]


def test_a_schedule_of_the_ratio_makes_one_batch(kernel):
    """Move the weights as without the kernel."""
    here, there = (
        integer_layers(["linear", "experts"], torch.bfloat16),
        integer_layers(["linear", "experts"], torch.bfloat16),
    )
    batched_run(here, "stochastic", kernel.rule(), schedule=[2.0, 1.0, 0.5])
    assert kernel.made == [1, len(here[1].W)]
    batched_run(there, "stochastic", "in_place", schedule=[2.0, 1.0, 0.5])
    assert all(torch.equal(a.W, b.W) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("layout", ["linear", "transposed", "experts", "columns"])
def test_a_replaced_weight_is_not_held(layout, kernel):
    """Free what was on the device at once after `model.cpu()`, not at the next step."""
    module = torch.nn.Module()
    s = integer_layers([layout], torch.bfloat16)[0]
    module.W = torch.nn.Parameter(s.W, requires_grad=False)
    triple = LoRATriple((module, "W"), s.A, s.B, scaling=2.0**-9, **s.options)
    optimizer = DeltaLoRAOptimizer(
        torch.optim.SGD, [triple], lr=1.0, rounding="compensated", weight_update=kernel.rule()
    )
    gradients([s], 0)
    optimizer.step()
    gone = weakref.ref(s.W.untyped_storage())
    module.W.data = s.W.clone()
    s.W = None
    assert gone() is None


@each_rounding_of_a_batch
def test_autograd_hears_of_the_write(mode, kernel):
    """Tell it through the Parameter that W is now, after one was replaced by another in the same place."""
    module = torch.nn.Module()
    s = integer_layers(["transposed"], torch.bfloat16)[0]
    module.W = torch.nn.Parameter(s.W, requires_grad=False)
    triple = LoRATriple((module, "W"), s.A, s.B, scaling=2.0**-9, **s.options)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=1.0, rounding=mode, weight_update=kernel.rule())
    for t in range(2):
        gradients([s], t)
        before = module.W._version
        optimizer.step()
        assert module.W._version > before
        module.W = torch.nn.Parameter(module.W.data, requires_grad=False)
    assert len(kernel.made) == 1


@pytest.mark.parametrize("known", [True, False], ids=["known to the host", "not known"])
def test_wide_weights_next_to_narrow_ones(known, kernel):
    """Share buffers, as they are of one shape: one of each moves, one of each does not."""
    stored = integer_layers(["linear"] * 4, torch.bfloat16)
    for s in stored[2:]:
        s.W = s.W.float()
    before = copy.deepcopy(stored)
    optimizer = batch_optimizer(stored, "nearest", kernel.rule(reads=known))
    gradients(stored, 0)
    for s in stored[1::2]:
        s.A.grad, s.B.grad = torch.zeros_like(s.A), torch.zeros_like(s.B)
    optimizer.step()
    assert kernel.made == [2]
    for i, (s, old) in enumerate(zip(stored, before, strict=True)):
        if i % 2:
            assert torch.equal(s.W, old.W)
            continue
        delta = s.A.double() @ s.B.double() - old.A.double() @ old.B.double()
        assert torch.equal(s.W, (old.W.double() + delta * 2.0**-9).to(s.W.dtype))


@each_rounding_of_a_batch
def test_a_bad_factor_reaches_no_weight(mode, kernel):
    stored = integer_layers(["linear", "experts"], torch.bfloat16)
    optimizer = batched_run(stored, mode, kernel.rule(reads=False))
    before = [s.W.clone() for s in stored], copy.deepcopy(compensations(optimizer))
    gradients(stored, 9)
    stored[1].B.grad.flatten()[0] = torch.inf
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a LoRA factor became NaN or infinite")
        optimizer.step()
    assert optimizer.skipped_updates == 1
    assert all(torch.equal(s.W, W) for s, W in zip(stored, before[0], strict=True))
    assert mode != "compensated" or all(map(torch.equal, compensations(optimizer), before[1]))


def test_float64_factors_do_without_it(kernel):
    stored = [strategies.make("linear", dtype=torch.bfloat16, factor_dtype=torch.float64)]
    before = stored[0].W.clone()
    batched_run(stored, "stochastic", kernel.rule())
    assert kernel.made == []
    assert not torch.equal(stored[0].W, before)


def test_no_kernel_on_a_cpu():
    assert fused_kernel(torch.device("cpu")) is None


@pytest.mark.parametrize("failing", [None, *ROUNDINGS])
def test_each_rounding_is_tried_before_any_is_used(failing, monkeypatch):
    """Pass the CPU for a GPU: the warning says what failed, once, and blocks take over."""

    class Batch(_triton.Batch):
        def add_(self, coefs, keep, keys, launched=None):
            compensated = self.groups[0].likeness.compensated
            if failing == ("compensated" if compensated else "nearest" if keys is None else "stochastic"):
                raise RuntimeError("no C compiler")
            super().add_(coefs, keep, keys, launched)

    monkeypatch.setattr(_triton, "Batch", Batch)
    monkeypatch.setattr(_triton, "is_available", lambda device: True)
    monkeypatch.setattr(batch, "_usable", {})
    monkeypatch.setattr(batch, "try_out", lambda kernel, device: try_out(kernel, torch.device("cpu")))
    device = torch.device("cuda", 0)
    if failing is None:
        assert fused_kernel(device) is _triton
    else:
        with pytest.warns(RuntimeWarning, match=r"the kernel .* cannot be used on cuda:0, .* slower: .*no C compiler"):
            assert fused_kernel(device) is None
        assert fused_kernel(device) is None


def test_warns_of_a_triton_that_cannot_be_imported(monkeypatch):
    """Lack names, as an old Triton does, that the module takes from it."""
    monkeypatch.setattr(batch, "_usable", {})
    monkeypatch.delattr("deltaopt.rounding._triton")
    monkeypatch.setitem(sys.modules, "deltaopt.rounding._triton", None)
    with pytest.warns(RuntimeWarning, match=r"the kernel .* cannot be used on cuda, .* slower"):
        assert fused_kernel(torch.device("cuda")) is None


def test_without_triton_there_is_none(monkeypatch):
    monkeypatch.setattr(_triton, "triton", None)
    monkeypatch.setattr(batch, "_usable", {})
    assert not _triton.is_available(torch.device("cuda"))
    assert fused_kernel(torch.device("cuda")) is None


@pytest.mark.parametrize("other", [lambda W: W.as_strided((5, 7), (1, 5)), lambda W: W.view(torch.float16)])
def test_a_batch_is_not_for_another_tensor_in_the_same_place(other, kernel):
    stored = integer_layers(["linear"], torch.bfloat16)
    optimizer = batched_run(stored, "nearest", kernel.rule())
    stored[0].W.data = other(stored[0].W.data)
    gradients(stored, 9)
    optimizer.step()
    assert kernel.made == [1, 1]


def test_a_batch_is_not_for_another_compensation(kernel):
    stored = integer_layers(["linear"], torch.bfloat16)
    optimizer = batched_run(stored, "compensated", kernel.rule())
    before = internals.compensation_of(optimizer)
    internals.forget_compensation(optimizer)
    gradients(stored, 9)
    optimizer.step()
    assert kernel.made == [1, 1]
    assert internals.compensation_of(optimizer) is not before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_launch_that_was_interrupted_is_not_made_again(error, kernel, monkeypatch):
    """Make one again that has failed; but nobody knows whether one was made that a Ctrl-C has interrupted."""
    stored = integer_layers(["linear"], torch.bfloat16)
    optimizer = batched_run(stored, "stochastic", kernel.rule())
    saved = copy.deepcopy((stored[0].W, stored[0].A.detach(), stored[0].B.detach(), optimizer.state_dict()))
    launch, failed = _triton._Group.add_, []

    def once(group, *arguments):
        if not failed:
            failed.append(True)
            raise error("in the launcher")
        launch(group, *arguments)

    monkeypatch.setattr(_triton._Group, "add_", once)
    gradients(stored, 3)
    if error is RuntimeError:
        with pytest.raises(error, match="in the launcher"):
            optimizer.step()
        assert optimizer.step_count == 4
        optimizer.state_dict()
        return
    with pytest.raises(RuntimeError, match="not known whether it has moved its 16-bit W"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"step\(\) was interrupted earlier.*not known whether it has moved"):
        optimizer.state_dict()
    with torch.no_grad():
        for tensor, kept in zip((stored[0].W, stored[0].A, stored[0].B), saved, strict=False):
            tensor.copy_(kept)
    optimizer.load_state_dict(saved[3])
    gradients(stored, 3)
    optimizer.step()
    assert optimizer.step_count == 4
