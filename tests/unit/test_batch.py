"""An optimizer whose 16-bit weights go through the kernel makes the weights it would make without it.

On the CPU the kernel runs in Triton's interpreter. tests/unit/test_triton.py has the kernel itself.
"""

import copy
import sys
import types
import warnings
import weakref

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, fused, update
from deltaopt.fused import fused_kernel, try_out
from tests.support import strategies

pytest.importorskip("triton", reason="runs where Triton is installed")

from deltaopt import _triton

pytestmark = pytest.mark.skipif(
    not _triton.is_available(torch.device("cpu")), reason="runs where Triton interprets (TRITON_INTERPRET=1, no CUDA)"
)

MODES = ["nearest", "stochastic", "compensated"]
SGD = torch.optim.SGD


@pytest.fixture
def with_kernel(monkeypatch):
    """Lets the optimizers of this test take the kernel, as on a GPU, and counts the batches that they make."""
    made = []

    class Batch(_triton.Batch):
        def __init__(self, products):
            made.append(len(products))
            super().__init__(products)

    kernel = types.SimpleNamespace(Batch=Batch, Product=_triton.Product)
    monkeypatch.setattr(update, "fused_kernel", lambda device: kernel)
    return made


def gradients(stored, seed):
    """Integers, as the factors are: their products are exact in float32, whatever the order of the sums."""
    generator = torch.Generator().manual_seed(seed)
    for s in stored:
        for factor in (s.A, s.B):
            factor.grad = torch.randint(-2, 3, factor.shape, generator=generator).to(factor)


def layers(layouts, dtype, seed=0):
    stored = [strategies.make(layout, seed + i, dtype, torch.float32) for i, layout in enumerate(layouts)]
    with torch.no_grad():
        for s in stored:
            s.A.round_()
            s.B.round_()
    return stored


def optimizer_of(stored, mode, **options):
    triples = [s.triple(scaling=2.0**-9, name=str(i)) for i, s in enumerate(stored)]
    return DeltaLoRAOptimizer(SGD, triples, lr=1.0, update_ratio=1.0, rounding=mode, **options)


def run(stored, mode, schedule=(1.0, 1.0, 1.0), **options):
    optimizer = optimizer_of(stored, mode, **options)
    for t, ratio in enumerate(schedule):
        optimizer.groups[0].update_ratio = ratio
        gradients(stored, t)
        optimizer.step()
    return optimizer


def kept(optimizer):
    ledgers = [ledger for _, ledger in optimizer.accounts()]
    return [None if ledger.compensation is None else ledger.compensation.bits for ledger in ledgers]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_every_layout_as_by_blocks(layout, dtype, mode, with_kernel, monkeypatch):
    here, there = layers([layout] * 2, dtype), layers([layout] * 2, dtype)
    first = run(here, mode)
    assert len(with_kernel) == 1
    monkeypatch.setattr(update, "fused_kernel", lambda device: None)
    second = run(there, mode)
    assert len(with_kernel) == 1
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.W.view(torch.int16), b.W.view(torch.int16))
    for a, b in zip(kept(first), kept(second), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_batch_is_kept_while_its_tensors_are(with_kernel):
    stored = layers(["linear", "linear"], torch.bfloat16)
    optimizer = run(stored, "stochastic")
    assert with_kernel == [2]
    optimizer.groups[0].update_ratio = 0.5
    gradients(stored, 9)
    optimizer.step()
    assert with_kernel == [2]
    stored[0].W.data = stored[0].W.clone()
    optimizer.step()
    assert with_kernel == [2, 2]


def test_a_schedule_of_the_ratio_makes_one_batch(with_kernel, monkeypatch):
    """And goes to the weights as it does without the kernel."""
    here, there = layers(["linear", "experts"], torch.bfloat16), layers(["linear", "experts"], torch.bfloat16)
    run(here, "stochastic", schedule=[2.0, 1.0, 0.5])
    assert with_kernel == [1, len(here[1].W)]
    monkeypatch.setattr(update, "fused_kernel", lambda device: None)
    run(there, "stochastic", schedule=[2.0, 1.0, 0.5])
    assert all(torch.equal(a.W, b.W) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("layout", ["linear", "transposed", "experts", "columns"])
def test_a_replaced_weight_is_not_held(layout, with_kernel):
    """As after `model.cpu()`: what was on the device is freed at once, not at the next step."""
    module = torch.nn.Module()
    s = layers([layout], torch.bfloat16)[0]
    module.W = torch.nn.Parameter(s.W, requires_grad=False)
    triple = s.triple(scaling=2.0**-9)
    triple._W = (module, "W")
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=1.0, rounding="compensated")
    gradients([s], 0)
    optimizer.step()
    gone = weakref.ref(s.W.untyped_storage())
    module.W.data = s.W.clone()
    s.W = None
    assert gone() is None


@pytest.mark.parametrize("mode", MODES)
def test_autograd_hears_of_the_write(mode, with_kernel):
    """Through the Parameter that W is now, after an earlier one was replaced by one in the same place."""
    module = torch.nn.Module()
    s = layers(["transposed"], torch.bfloat16)[0]
    module.W = torch.nn.Parameter(s.W, requires_grad=False)
    triple = s.triple(scaling=2.0**-9)
    triple._W = (module, "W")
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=1.0, rounding=mode)
    for t in range(2):
        gradients([s], t)
        before = module.W._version
        optimizer.step()
        assert module.W._version > before
        module.W = torch.nn.Parameter(module.W.data, requires_grad=False)
    assert len(with_kernel) == 1


@pytest.mark.parametrize("known", [True, False], ids=["known to the host", "not known"])
def test_wide_weights_beside_narrow_ones(known, with_kernel, monkeypatch):
    """Of one shape, so that they share buffers: one of each moves, one of each does not."""
    monkeypatch.setattr(update, "_known_to_host", lambda device: known)
    stored = layers(["linear"] * 4, torch.bfloat16)
    for s in stored[2:]:
        s.W = s.W.float()
    before = copy.deepcopy(stored)
    optimizer = optimizer_of(stored, "nearest")
    gradients(stored, 0)
    for s in stored[1::2]:
        s.A.grad, s.B.grad = torch.zeros_like(s.A), torch.zeros_like(s.B)
    optimizer.step()
    assert with_kernel == [2]
    for i, (s, old) in enumerate(zip(stored, before, strict=True)):
        if i % 2:
            assert torch.equal(s.W, old.W)
            continue
        delta = s.A.double() @ s.B.double() - old.A.double() @ old.B.double()
        assert torch.equal(s.W, (old.W.double() + delta * 2.0**-9).to(s.W.dtype))


@pytest.mark.parametrize("mode", MODES)
def test_a_bad_factor_reaches_no_weight(mode, with_kernel, monkeypatch):
    monkeypatch.setattr(update, "_known_to_host", lambda device: False)
    stored = layers(["linear", "experts"], torch.bfloat16)
    optimizer = run(stored, mode)
    before = [s.W.clone() for s in stored], copy.deepcopy(kept(optimizer))
    gradients(stored, 9)
    stored[1].B.grad.flatten()[0] = torch.inf
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a LoRA factor became NaN or infinite")
        optimizer.step()
    assert optimizer.skipped_updates == 1
    assert all(torch.equal(s.W, W) for s, W in zip(stored, before[0], strict=True))
    assert mode != "compensated" or all(map(torch.equal, kept(optimizer), before[1]))


def test_float64_factors_do_without_it(with_kernel):
    stored = [strategies.make("linear", dtype=torch.bfloat16, factor_dtype=torch.float64)]
    before = stored[0].W.clone()
    run(stored, "stochastic")
    assert with_kernel == []
    assert not torch.equal(stored[0].W, before)


def test_no_kernel_on_a_cpu():
    assert fused_kernel(torch.device("cpu")) is None


@pytest.mark.parametrize("failing", [None, *MODES])
def test_each_rounding_is_tried_before_any_is_used(failing, monkeypatch):
    """On what passes for a GPU here: the warning says what failed, once, and blocks take over."""

    class Batch(_triton.Batch):
        def add_(self, coefs, keep, keys):
            compensated = self.groups[0].likeness.compensated
            if failing == ("compensated" if compensated else "nearest" if keys is None else "stochastic"):
                raise RuntimeError("no C compiler")
            super().add_(coefs, keep, keys)

    monkeypatch.setattr(_triton, "Batch", Batch)
    monkeypatch.setattr(_triton, "is_available", lambda device: True)
    monkeypatch.setattr(fused, "_usable", {})
    monkeypatch.setattr(fused, "try_out", lambda kernel, device: try_out(kernel, torch.device("cpu")))
    device = torch.device("cuda", 0)
    if failing is None:
        assert fused_kernel(device) is _triton
        return
    with pytest.warns(RuntimeWarning, match=r"the kernel .* can not be used on cuda:0, .* slower: .*no C compiler"):
        assert fused_kernel(device) is None
    assert fused_kernel(device) is None


def test_a_triton_that_can_not_be_imported_is_told_of(monkeypatch):
    """An old one lacks names that the module takes from it."""
    monkeypatch.setattr(fused, "_usable", {})
    monkeypatch.delattr("deltaopt._triton")
    monkeypatch.setitem(sys.modules, "deltaopt._triton", None)
    with pytest.warns(RuntimeWarning, match=r"the kernel .* can not be used on cuda, .* slower"):
        assert fused_kernel(torch.device("cuda")) is None


def test_without_triton_there_is_none(monkeypatch):
    monkeypatch.setattr(_triton, "triton", None)
    monkeypatch.setattr(fused, "_usable", {})
    assert not _triton.is_available(torch.device("cuda"))
    assert fused_kernel(torch.device("cuda")) is None


@pytest.mark.parametrize("other", [lambda W: W.as_strided((5, 7), (1, 5)), lambda W: W.view(torch.float16)])
def test_a_batch_is_not_for_another_tensor_in_the_same_place(other, with_kernel):
    stored = layers(["linear"], torch.bfloat16)
    optimizer = run(stored, "nearest")
    stored[0].W.data = other(stored[0].W.data)
    gradients(stored, 9)
    optimizer.step()
    assert with_kernel == [1, 1]


def test_a_batch_is_not_for_another_compensation(with_kernel):
    stored = layers(["linear"], torch.bfloat16)
    optimizer = run(stored, "compensated")
    ((_, ledger),) = optimizer.accounts()
    before, ledger.compensation = ledger.compensation, None
    gradients(stored, 9)
    optimizer.step()
    assert with_kernel == [1, 1]
    assert ledger.compensation.bits is not before.bits
