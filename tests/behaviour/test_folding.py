"""The folded mode follows the in-place one: the same factors, gradients and effective weights, with W left alone.

What both are compared with in the end is `tests/support/reference.py`, as tests/conformance compares the in-place mode.
"""

import contextlib
import copy
import gc
import io
import math
import pickle
import types
import warnings
from functools import partial

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple, WeightMismatchError
from tests.support import reference, strategies
from tests.support.compare import relative
from tests.support.strategies import INNERS

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD
RATIO = 2.0
# Muon computes in bfloat16, where a difference in the last bit of float64 may show as one of a thousandth.
TOLERANCE = {"Muon": 2e-2}
# What is left of a gradient of exactly zero decides about these: signs, and quotients of two tiny numbers.
inners = st.sampled_from(sorted(INNERS))


class Run:
    """One layer of any layout, whose forward pass multiplies by a 0-d tensor; with microbatches and clipping."""

    def __init__(
        self,
        mode,
        layout="linear",
        *,
        seed=0,
        inner=AdamW,
        zero=True,
        dtype=torch.float64,
        triple=None,
        s=0.5,
        **options,
    ):
        self.stored = strategies.make(layout, seed, dtype, zero_A=zero)
        self.W0, self.mode = self.stored.W.clone(), mode
        self.scale = torch.tensor(s, dtype=dtype)
        self.triple = LoRATriple(
            self.stored.W, self.stored.A, self.stored.B, scaling=self.scale, name="q", **self.stored.options
        )
        self.loss = strategies.problem(self.stored.matrices()[0].shape, seed + 1)
        self.options = {"lr": 0.02, "update_ratio": RATIO} | options
        self.optimizer = DeltaLoRAOptimizer(inner, [self.triple], weight_update=mode, **self.options)
        self.t, self.gradients = 0, []

    @property
    def factors(self):
        return [self.stored.A, self.stored.B]

    def effective(self):
        s = self.stored
        return s.matrix(s.W) + self.scale * (s.left(s.A) @ s.right(s.B))

    def backward(self, micro=1):
        self.optimizer.zero_grad()
        for i in range(micro):
            self.loss(self.effective(), micro * self.t + i).backward()
        self.gradients.append([p.grad.clone() for p in self.factors])

    def train(self, steps, micro=1, clip=None):
        for _ in range(steps):
            self.backward(micro)
            if clip == "norm":
                nn.utils.clip_grad_norm_(self.factors, 0.1)
            elif clip == "value":
                nn.utils.clip_grad_value_(self.factors, 0.02)
            self.optimizer.step()
            self.t += 1
        return self

    def ledger(self):
        ((_, ledger),) = self.optimizer.accounts()
        return ledger


def both(steps=0, micro=1, clip=None, **options):
    runs = Run("in_place", **options), Run("folded", **options)
    for run in runs:
        run.train(steps, micro, clip)
    return runs


def assert_follows(folded, in_place, tolerance=1e-10):
    pairs = [*zip(folded.factors, in_place.factors, strict=True), (folded.effective(), in_place.effective())]
    pairs += [pair for gs in zip(folded.gradients, in_place.gradients, strict=True) for pair in zip(*gs, strict=True)]
    for now, expected in pairs:
        assert float((now - expected).detach().norm()) <= tolerance * max(float(expected.detach().norm()), 1e-3)


@given(
    inners,
    strategies.layouts,
    strategies.seeds,
    st.integers(0, 4),
    st.floats(0.1, 8.0),
    st.sampled_from([0.5, -1.3, 4.0]),
    st.sampled_from([None, "norm", "value"]),
    st.integers(1, 3),
    st.booleans(),
)
@example("AdamW_fused", "experts", 1, 2, 2.0, 0.5, "norm", 2, False)
@example("SGD", "transposed_rows", 1, 0, 2.0, 0.5, "value", 3, True)
def test_follows_the_in_place_mode(name, layout, seed, start, ratio, scaling, clip, micro, zero):
    """Over inner optimizers, layouts, start_step, clipping and accumulation: also every gradient that they see."""
    inner, options = INNERS[name]
    stored = strategies.make(layout)
    if name == "Muon" and not stored.A.dim() == stored.B.dim() == 2:
        return
    options = {"inner": inner, "layout": layout, "seed": seed, "zero": zero, "s": scaling} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a LoRA factor became NaN or infinite")
        in_place, folded = both(12, micro, clip, start_step=start, update_ratio=ratio, **options)
    assume(float(in_place.effective().detach().norm()) < 1e3)  # a run that diverges makes much of the last bit
    assert_follows(folded, in_place, TOLERANCE.get(name, 1e-9))


@pytest.mark.parametrize("name", ["AdamW_foreach", "SGD", "Adafactor"])
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_follows_the_dense_loop(name, start, layout):
    """The reference, over 100 steps: dense, float64, independent of the package."""
    inner, options = INNERS[name]
    run = Run("folded", layout, seed=3, inner=inner, zero=False, start_step=start, **options)
    stored = copy.deepcopy(run.stored)
    expected = reference.delta_lora(
        stored.matrices()[0],
        stored.A,
        stored.B,
        run.loss,
        lambda params: inner(params, **options),
        steps=100,
        update_ratio=RATIO,
        start_step=start,
        scaling=0.5,
        left=stored.left,
        right=stored.right,
    )
    for t in range(100):
        run.train(1)
        product = stored.left(expected.A[t + 1]) @ stored.right(expected.B[t + 1])
        assert relative(run.effective().detach(), expected.W[t + 1] + 0.5 * product) < 1e-11
    assert relative(run.stored.A.detach(), expected.A[-1]) < 1e-11
    moved = expected.W[-1] - run.stored.matrix(run.W0)
    assert relative(run.optimizer.displacement("q").product(), moved) < 1e-10


@pytest.mark.parametrize("inner", [AdamW, SGD])
@pytest.mark.parametrize("start", [0, 5])
def test_follows_in_float32_over_200_steps(inner, start):
    in_place, folded = both(200, inner=inner, dtype=torch.float32, start_step=start, zero=start == 0)
    assert_follows(folded, in_place, 1e-4)


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_w_is_never_written_from_a_zero_product(layout):
    run = Run("folded", layout).train(5)
    assert torch.equal(run.stored.W, run.W0)
    assert float(run.scale) == 0.5 * (1 + RATIO)
    assert run.optimizer.buffer_bytes == 0
    assert not run.ledger().moved


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_w_is_written_once_from_another_one(layout):
    """At step K, by lambda s A_K B_K, and only in the part of W that is the triple's."""
    run = Run("folded", layout, zero=False, start_step=2).train(2)
    assert torch.equal(run.stored.W, run.W0)
    assert float(run.scale) == 0.5
    _, A, B = run.stored.matrices()
    expected = run.stored.matrix(run.W0) - RATIO * 0.5 * (A @ B)
    run.train(1)
    after = run.stored.W.clone()
    torch.testing.assert_close(run.stored.matrix(after), expected, rtol=0, atol=1e-12)
    untouched = after.clone()
    run.stored.matrix(untouched).copy_(run.stored.matrix(run.W0)) if run.stored.W.dim() == 2 else untouched.copy_(
        run.W0
    )
    assert torch.equal(untouched, run.W0)
    run.train(3)
    assert torch.equal(run.stored.W, after)


def test_a_step_does_not_change_the_effective_weight_where_it_folds():
    """With lr = 0, at step K: what is taken from W comes back by the branch."""
    run = Run("folded", zero=False, start_step=0, lr=0.0)
    before = run.effective().detach().clone()
    run.train(1)
    assert float(run.scale) == 0.5 * (1 + RATIO)
    torch.testing.assert_close(run.effective().detach(), before, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("start", [0, 3, 50])
def test_before_the_start_and_without_a_ratio_it_is_the_inner_optimizer(start):
    """Bit for bit."""
    plain, run = Run("folded", update_ratio=0.0), Run("folded", start_step=start)
    for r in (plain, run):
        r.train(start)
    assert torch.equal(plain.stored.A, run.stored.A)
    assert torch.equal(plain.stored.B, run.stored.B)
    assert float(run.scale) == float(plain.train(3).scale) == 0.5


def test_a_layer_without_gradients_is_folded_when_it_has_some():
    """An expert that no token reached: until then the step leaves its factors as they are, and so nothing is due."""
    outcomes = []
    for mode in ("in_place", "folded"):
        layers = [layer(str(i), i, zero=i == 0) for i in range(2)]
        optimizer = DeltaLoRAOptimizer(SGD, [t for *_, t in layers], lr=0.1, momentum=0.9, weight_update=mode)
        for t in range(6):
            optimizer.zero_grad()
            for i, (s, scale, _) in enumerate(layers):
                if i == 0 or t in (2, 5):
                    strategies.problem(s.W.shape, i)(s.W + scale * (s.A @ s.B), t).backward()
            optimizer.step()
            if mode == "folded":
                assert [float(scale) for _, scale, _ in layers] == [1.5, 0.5 if t < 2 else 1.5]
        outcomes.append([(s.W + scale * (s.A @ s.B)).detach() for s, scale, _ in layers])
    for now, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-10, atol=1e-10)


def test_gradients_that_are_asked_for_are_divided_too():
    in_place, folded = both(3)
    found = [torch.autograd.grad(r.loss(r.effective(), 0), r.factors) for r in (folded, in_place)]
    for now, expected in zip(*found, strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-10, atol=1e-12)


def test_gradients_that_are_not_zeroed_go_on_through_step_K():
    in_place, folded = both(start_step=2, zero=False)
    for run in (in_place, folded):
        for t in range(6):
            run.loss(run.effective(), t).backward()
            run.optimizer.step()
    assert_follows(folded, in_place)


def test_a_closure_is_evaluated_once():
    in_place, folded = both(start_step=1)
    for run in (in_place, folded):
        for t in range(4):
            run.optimizer.step(lambda run=run, t=t: (run.backward(), run.loss(run.effective(), t))[1])
    assert_follows(folded, in_place)


class Twice(SGD):
    def step(self, closure=None):
        closure()
        return super().step(closure)


def test_an_optimizer_that_looks_elsewhere_within_a_step_is_refused():
    run = Run("folded", inner=Twice, start_step=2)

    def closure():
        run.backward()
        return 0.0

    run.optimizer.step(closure)
    run.optimizer.step(closure)  # nothing is folded before step K, so nothing differs
    with pytest.raises(RuntimeError, match="called the closure a second time within a step"):
        run.optimizer.step(closure)
    with pytest.raises(ValueError, match=r"LBFGS evaluates the loss several times.*weight_update=\"in_place\""):
        Run("folded", inner=torch.optim.LBFGS)


# What the ledger, the exports and a restart say of it.


def assert_agrees(folded, in_place, tolerance=1e-10):
    """Everything that is told of the change of W, and what the layer is without it."""
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)  # noqa: E731
    assert_follows(folded, in_place)
    close(*(run.optimizer.displacement("q").product() for run in (folded, in_place)))
    exported = [deltaopt.export_adapter(run.optimizer)["q"] for run in (folded, in_place)]
    close(*(change.product() for change in exported))
    assert exported[0].rank <= exported[1].rank
    close(*(deltaopt.merged_weights(run.optimizer)["q"] for run in (folded, in_place)))
    within = []
    for run in (folded, in_place):
        with run.optimizer.base_weights():
            within.append((run.stored.W.clone(), run.effective().detach().clone()))
    for now, expected in zip(*within, strict=True):
        close(now, expected)
    assert_follows(folded, in_place)


@pytest.mark.parametrize(("start", "zero"), [(0, True), (0, False), (3, False), (20, False)])
@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_what_is_told_of_the_change_agrees(layout, start, zero):
    in_place, folded = both(8, layout=layout, start_step=start, zero=zero)
    assert_agrees(folded, in_place)


def test_the_base_comes_back_bit_for_bit_from_a_kept_copy():
    run = Run("folded", zero=False, keep_base="cpu").train(4)
    moved = run.stored.W.clone()
    assert not torch.equal(moved, run.W0)
    with run.optimizer.base_weights():
        assert torch.equal(run.stored.W, run.W0)
        assert float(run.scale) == 0.5
    assert torch.equal(run.stored.W, moved)
    assert float(run.scale) == 0.5 * (1 + RATIO)


@pytest.mark.parametrize("zero", [True, False], ids=["zero product", "another product"])
@pytest.mark.parametrize("start", [0, 4, 30])
def test_a_restart_agrees(start, zero):
    """Also where the new product is not zero, of which W gives lambda s then."""

    @torch.no_grad()
    def reinit(triple):
        generator = torch.Generator().manual_seed(5)
        triple.A.copy_(torch.randn(triple.A.shape, generator=generator, dtype=torch.float64) * (not zero))
        triple.B.copy_(torch.randn(triple.B.shape, generator=generator, dtype=torch.float64))

    in_place, folded = both(6, start_step=start, zero=False)
    for _ in range(2):
        before = folded.effective().detach().clone()
        for run in (in_place, folded):
            run.optimizer.restart(reinit)
        if zero:
            torch.testing.assert_close(folded.effective().detach(), before, rtol=1e-12, atol=1e-12)
        assert_agrees(folded, in_place)
        for run in (in_place, folded):
            run.train(4)
        assert_agrees(folded, in_place)


def test_changed_factors_need_no_resync():
    in_place, folded = both(8)
    best = [p.detach().clone() for p in folded.factors]
    for run in (in_place, folded):
        run.train(5)
        with torch.no_grad():
            for p, before in zip(run.factors, best, strict=True):
                p.copy_(before)
    assert float((folded.effective() - in_place.effective()).detach().norm()) > 1e-3
    in_place.optimizer.resync()
    assert_agrees(folded, in_place)
    folded.optimizer.resync()  # nothing to do
    assert_agrees(folded, in_place)


def test_rebase_counts_from_the_weight_that_is_there():
    run = Run("folded", zero=False).train(5)
    run.optimizer.rebase()
    _, A, B = run.stored.matrices()
    torch.testing.assert_close(run.optimizer.displacement("q").product(), RATIO * 0.5 * (A @ B))
    change = deltaopt.export_adapter(run.optimizer)["q"].product()
    torch.testing.assert_close(run.stored.W + change, run.effective().detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["auto", "nearest", "compensated"])
def test_a_16_bit_weight_is_rounded_once(dtype, rounding):
    stored = strategies.make("linear", dtype=dtype, factor_dtype=torch.float32)
    W0, (_, A, B) = stored.W.clone(), stored.matrices()
    triple = LoRATriple(stored.W, stored.A, stored.B, scaling=torch.tensor(0.5), name="q")
    optimizer = DeltaLoRAOptimizer(AdamW, [triple], lr=1e-2, weight_update="folded", rounding=rounding, keep_base="cpu")
    for _ in range(3):
        (stored.A.sum() + stored.B.sum()).backward()
        optimizer.step()
        optimizer.state_dict()
    exact = W0.double() - RATIO * 0.5 * (A.double() @ B.double())
    spacing = torch.finfo(dtype).eps * torch.maximum(exact.abs(), W0.double().abs())
    assert bool(((stored.W.double() - exact).abs() <= spacing).all())
    with optimizer.base_weights():
        assert torch.equal(stored.W, W0)


# State.


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(run, state, factors, W, s=0.5):
    """A fresh layer with these tensors and this scaling, which has loaded the state."""
    twin = Run(run.mode, s=s, **run.options)
    with torch.no_grad():
        twin.stored.W.copy_(W)
        for p, value in zip(twin.factors, factors, strict=True):
            p.copy_(value)
    twin.optimizer.load_state_dict(state)
    twin.t, twin.gradients = run.t, list(run.gradients)
    return twin


@pytest.mark.parametrize("scaled", ["as at first", "as it was left"])
@pytest.mark.parametrize("W", ["saved", "base"])
@pytest.mark.parametrize(
    ("start", "stop", "zero"), [(0, 4, True), (3, 6, False), (6, 6, False), (9, 4, False), (0, 0, True)]
)
def test_a_resumed_run_goes_on(start, stop, zero, W, scaled):
    """Bit for bit with W as it was; from the base to rounding. The branch is scaled by the state."""
    run = Run("folded", zero=zero, start_step=start).train(stop)
    state, factors = saved(run.optimizer.state_dict()), [p.detach().clone() for p in run.factors]
    s = 0.5 if scaled == "as at first" else float(run.scale)
    twin = resumed(run, state, factors, run.stored.W if W == "saved" else run.W0, s)
    assert float(twin.scale) == float(run.scale)
    assert twin.optimizer.triples[0].scaling == 0.5
    for r in (run, twin):
        r.train(7)
    assert_agrees(twin, run)
    if W == "saved":
        assert all(map(torch.equal, twin.factors, run.factors))


def test_a_state_may_be_loaded_where_it_was_saved():
    """As Accelerate does in `prepare`."""
    run, twin = Run("folded", start_step=2, zero=False).train(4), Run("folded", start_step=2, zero=False).train(4)
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    for r in (run, twin):
        r.train(3)
    assert_agrees(run, twin, 1e-14)


def test_an_older_state_takes_the_ratio_out_of_the_branch():
    run = Run("folded", start_step=3, zero=False).train(2)
    state, factors = saved(run.optimizer.state_dict()), [p.detach().clone() for p in run.factors]
    run.train(4)
    last = [p.detach().clone() for p in run.factors]
    assert float(run.scale) == 1.5
    with torch.no_grad():
        run.stored.W.copy_(run.W0)
        for p, value in zip(run.factors, factors, strict=True):
            p.copy_(value)
    run.optimizer.load_state_dict(state)
    assert float(run.scale) == 0.5
    run.t = 2
    run.train(4)
    assert all(map(torch.equal, run.factors, last))


def test_a_scaling_that_a_checkpoint_of_the_model_holds():
    """A buffer is loaded before the optimizer's state, so that it is ahead of what the optimizer knows."""
    run = Run("folded").train(3)
    state, factors = saved(run.optimizer.state_dict()), [p.detach().clone() for p in run.factors]
    twin = Run("folded", **run.options)
    twin.scale.copy_(run.scale)
    with torch.no_grad():
        for p, value in zip(twin.factors, factors, strict=True):
            p.copy_(value)
    with pytest.raises(RuntimeError, match=r"q: its scaling was 0\.5 when it was registered .* and is 1\.5 now"):
        twin.optimizer.step()
    twin.optimizer.load_state_dict(state)
    twin.t, twin.gradients = 3, list(run.gradients)
    assert_agrees(twin.train(2), run.train(2))


@pytest.mark.parametrize("mode", ["in_place", "folded"])
def test_a_state_of_the_other_mode_is_refused(mode):
    run, other = Run(mode).train(2), Run("folded" if mode == "in_place" else "in_place")
    with pytest.raises(ValueError, match=rf"saved with weight_update='{mode}', this optimizer has '{other.mode}'"):
        other.optimizer.load_state_dict(run.optimizer.state_dict())


@pytest.mark.parametrize("damage", ["ratio", "type", "missing", "mode"])
def test_a_damaged_record_is_refused(damage):
    run = Run("folded").train(2)
    state = copy.deepcopy(run.optimizer.state_dict())
    record = state["param_groups"][0]["deltaopt"]
    triple = record["groups"][0]["triples"][0]
    if damage == "missing":
        del triple["folded"]
    elif damage == "mode":
        del record["weight_update"]
    else:
        triple["folded"] = {"ratio": -1.0, "type": "2"}[damage]
    before = float(run.scale)
    with pytest.raises(ValueError, match=r"damaged or incomplete|folded must be finite and not negative"):
        run.optimizer.load_state_dict(state)
    assert float(run.scale) == before


def test_another_base_is_refused():
    run = Run("folded").train(3)
    with pytest.raises(WeightMismatchError, match="q: W has other contents than when the state was saved"):
        resumed(run, run.optimizer.state_dict(), run.factors, run.W0 + 1e-3)


# Copies, and more than one optimizer.


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["deepcopy", "pickle"]
)
@pytest.mark.filterwarnings("ignore:backward hook .* on tensor will not be serialized:UserWarning")
def test_a_copy_goes_on_as_the_original(copied):
    run = Run("folded", start_step=2, zero=False).train(5)
    loss, run.loss = run.loss, None
    for function in ("matrix", "left", "right"):  # of lambdas, which are not pickled
        setattr(run.stored, function, None)
    parts = copied((run.stored, run.scale, run.triple, run.optimizer))
    twin = object.__new__(Run)
    twin.__dict__ |= run.__dict__ | dict(zip(("stored", "scale", "triple", "optimizer"), parts, strict=True))
    twin.gradients = list(run.gradients)
    for r in (run, twin):
        r.loss = loss
        for function in ("matrix", "left", "right"):
            setattr(r.stored, function, lambda t: t)
        r.train(4)
    assert twin.stored.A is not run.stored.A
    assert all(map(torch.equal, run.factors, twin.factors))
    assert_follows(twin, run, 0.0)


def with_its_optimizer(mode="folded"):
    """A module that holds the optimizer of its factors, and is copied with it."""
    torch.manual_seed(0)
    model = nn.Module()
    model.W = nn.Parameter(torch.randn(4, 6), requires_grad=False)
    model.A, model.B = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.randn(2, 6))
    model.scaling = 0.5
    triple = LoRATriple((model, "W"), (model, "A"), (model, "B"), scaling=(model, "scaling"), name="q")
    model.optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update=mode)
    return model


def backward_of(model):
    (model.W + model.scaling * model.A @ model.B).square().sum().backward()


def test_gradients_from_before_a_copy_knew_of_its_factors_are_refused():
    """Where the copy could not be told at once: its module was not complete."""
    model = with_its_optimizer()
    backward_of(model)
    model.optimizer.step()
    twin = copy.deepcopy(model)
    assert twin.scaling == 1.5
    for m in (model, twin):
        m.optimizer.zero_grad()
        backward_of(m)
    torch.testing.assert_close(twin.A.grad, model.A.grad)
    fresh = copy.deepcopy(twin.optimizer._folding)
    deltaopt.folding._divisors.pop(twin.A)
    twin.A._backward_hooks.clear()
    twin.optimizer._folding, twin.optimizer._signatures = fresh, []
    with pytest.raises(
        RuntimeError, match=r"q: the gradient of its A .*no hook on it.* optimizer\.zero_grad\(\) first"
    ):
        twin.optimizer.step()
    twin.optimizer.zero_grad()
    twin.optimizer.step()


def test_a_converted_model_keeps_its_hooks():
    runs = [with_its_optimizer(), with_its_optimizer("in_place")]
    for model in runs:
        backward_of(model)
        model.optimizer.step()
        model.optimizer.zero_grad()
        model.double()
        backward_of(model)
    for factor, expected in zip((runs[0].A, runs[0].B), (runs[1].A, runs[1].B), strict=True):
        assert factor.dtype == torch.float64
        torch.testing.assert_close(factor.grad, expected.grad, rtol=1e-5, atol=1e-5)


def test_a_conversion_that_would_lose_the_hooks_is_refused(monkeypatch):
    """By torch itself, which then exchanges the inside of parameters: without this, gradients would be undivided."""
    model = with_its_optimizer()
    backward_of(model)
    model.optimizer.step()
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    with pytest.raises(RuntimeError, match="Couldn't swap"):
        model.double()
    monkeypatch.undo()
    model.optimizer.zero_grad()
    backward_of(model)
    grad = model.A.grad
    model.optimizer = None
    gc.collect()
    model.A.grad = None
    backward_of(model)
    torch.testing.assert_close(model.A.grad, 3 * grad)


def goes_on():
    """What a second optimizer on the same factors says."""
    return pytest.warns(
        UserWarning, match=r"an earlier optimizer has folded .* q \(0\.5, now 1\.5\), .* ratios multiply"
    )


def test_a_later_optimizer_takes_the_factors_over():
    """It begins with the scaling that it finds, and divides by its own ratio alone."""
    first = Run("folded").train(3)
    W, scale = first.stored.W, first.scale
    twin = Run("folded", s=1.5)
    with torch.no_grad():
        for p, value in zip(twin.factors, first.factors, strict=True):
            p.copy_(value)
    twin.t, twin.loss = first.t, first.loss
    twin.stored.W.copy_(W)
    triple = LoRATriple(W, *first.factors, scaling=scale, name="q")
    first_optimizer = first.optimizer
    with goes_on():
        first.optimizer = DeltaLoRAOptimizer(AdamW, [triple], weight_update="folded", **first.options)
    first.gradients = []
    for r in (first, twin):
        r.train(4)
    assert float(scale) == 1.5 * 3
    assert_follows(first, twin)
    with pytest.raises(RuntimeError, match="q: its scaling was"):
        first_optimizer.step()


@pytest.mark.parametrize("mode", ["folded", "in_place"])
def test_an_optimizer_whose_factors_were_taken_over_does_not_step(mode):
    """Not at the second attempt either: the gradients are whole, or divided for the other one."""
    run = Run("folded").train(2)
    triple = LoRATriple(run.stored.W, *run.factors, scaling=run.scale, name="q")
    with goes_on():
        other = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update=mode)
    before = [p.detach().clone() for p in run.factors]
    for _ in range(2):
        run.backward()
        with pytest.raises(RuntimeError, match="q: another optimizer was built on its A since"):
            run.optimizer.step()
    assert all(map(torch.equal, run.factors, before))
    del other, triple
    gc.collect()
    if mode == "folded":
        match = "q: the gradient of its A was made while .* another optimizer had it"  # which is gone
        with pytest.raises(RuntimeError, match=match):
            run.optimizer.step()
        run.train(1)


def test_without_its_optimizer_a_gradient_is_what_autograd_makes():
    run = Run("folded").train(2)
    run.backward()
    divided = run.gradients[-1]
    run.optimizer = run.triple = None
    gc.collect()
    for p in run.factors:
        p.grad = None
    run.loss(run.effective(), run.t).backward()
    for p, expected in zip(run.factors, divided, strict=True):
        torch.testing.assert_close(p.grad, 3 * expected)


def test_triples_of_another_folded_run_are_refused():
    run = Run("folded").train(2)
    for mode in ("in_place", "folded"):
        with pytest.raises(
            ValueError, match="another optimizer has folded its update_ratio into the branch of q: make"
        ):
            DeltaLoRAOptimizer(AdamW, [run.triple], weight_update=mode)


# Groups.


def layer(name, seed, zero=True):
    stored = strategies.make("linear", seed, zero_A=zero)
    scale = torch.tensor(0.5, dtype=torch.float64)
    return stored, scale, LoRATriple(stored.W, stored.A, stored.B, scaling=scale, name=name)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "added later"])
def test_groups_of_several_ratios_and_starts(late):
    outcomes = []
    for mode in ("in_place", "folded"):
        layers = [layer(str(i), i, zero=i != 2) for i in range(4)]
        groups = [
            {"triples": [layers[0][2]], "update_ratio": 0.0},
            {"triples": [layers[1][2]], "update_ratio": 3.0, "lr": 0.01},
            {"triples": [layers[2][2]], "start_step": 3},
            {"triples": [layers[3][2]], "update_ratio": 1.0, "start_step": 1},
        ]
        optimizer = DeltaLoRAOptimizer(AdamW, groups[: 2 if late else 4], lr=0.02, weight_update=mode)
        for t in range(8):
            if late and t == 2:
                for group in groups[2:]:
                    optimizer.add_param_group(group)
            optimizer.zero_grad()
            for i, (stored, scale, _) in enumerate(layers):
                loss = strategies.problem(stored.W.shape, i)
                loss(stored.W + scale * (stored.A @ stored.B), t).backward()
            optimizer.step()
        outcomes.append([(s.W + scale * (s.A @ s.B)).detach() for s, scale, _ in layers])
        if mode == "folded":
            assert [float(scale) for _, scale, _ in layers] == [0.5, 2.0, 1.5, 1.0]
    for now, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-10, atol=1e-10)


def test_a_factor_of_two_layers():
    """Its gradient is divided once for both; where their ratios differ, it can not be."""
    outcomes = []
    for mode in ("in_place", "folded"):
        (s, scale, triple), (other, scale_2, _) = layer("a", 0), layer("b", 1)
        shared = LoRATriple(other.W, s.A, other.B, scaling=scale_2, name="b")
        optimizer = DeltaLoRAOptimizer(AdamW, [triple, shared], lr=0.02, weight_update=mode)
        for t in range(5):
            optimizer.zero_grad()
            loss = strategies.problem(s.W.shape)
            (loss(s.W + scale * (s.A @ s.B), t) + loss(other.W + scale_2 * (s.A @ other.B), t)).backward()
            optimizer.step()
        outcomes.append([s.A.detach(), s.B.detach(), other.B.detach()])
    for now, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("other", [{"update_ratio": 1.0}, {"start_step": 4}])
def test_a_factor_of_layers_that_differ_is_refused(other):
    (s, _, triple), (t, scale, _) = layer("a", 0), layer("b", 1)
    shared = LoRATriple(t.W, s.A, t.B, scaling=scale, name="b")
    groups = [{"triples": [triple], "params": [s.A, s.B]}, {"triples": [shared], **other}]
    inner = AdamW([s.A, s.B, t.B])
    with pytest.raises(ValueError, match="b: its A is a factor of a too, which has another update_ratio or start_step"):
        DeltaLoRAOptimizer(
            inner, [{k: v for k, v in g.items() if k != "params"} for g in groups], weight_update="folded"
        )
    groups[1] = {"triples": [shared]}
    optimizer = DeltaLoRAOptimizer(
        inner, [{"triples": [triple]}, {"triples": [shared]}], weight_update="folded", start_step=1
    )
    for name, value in other.items():
        setattr(optimizer.groups[1], name, value)
    for factor in (s.A, s.B, t.B):
        factor.grad = torch.ones_like(factor)
    optimizer.step()
    with pytest.raises(ValueError, match="b: its A is a factor of a too"):
        optimizer.step()


# Where the scaling is.


class Layer(nn.Module):
    """As a library may write it: `how` says where the branch's scaling is."""

    def __init__(self, how):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        new = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.weight = nn.Parameter(new(4, 6), requires_grad=False)
        self.lora_B, self.lora_A = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64)), nn.Parameter(new(2, 6))
        self.rank, self.alpha, self.scaling, self.config = 2, 1.0, 0.5, types.SimpleNamespace(scaling=0.5)
        if how == "buffer":
            del self.scaling
            self.register_buffer("scaling", torch.tensor(0.5, dtype=torch.float64))
        self.how = how

    def forward(self, x):
        scaling = {"alpha": self.alpha / self.rank, "nested": self.config.scaling}.get(self.how, self.scaling)
        return x @ self.weight.mT + scaling * (x @ self.lora_A.mT @ self.lora_B.mT)

    def triple(self):
        tensors = [(self, name) for name in ("weight", "lora_B", "lora_A")]
        if self.how == "alpha":  # as in torchtune, where forward divides alpha by the rank
            return LoRATriple(*tensors, scaling=0.5, name="q", set_scaling=self.set_scaling)
        path = "config.scaling" if self.how == "nested" else "scaling"
        return LoRATriple(*tensors, scaling=(self, path), name="q")

    def set_scaling(self, scaling):
        self.alpha = scaling * self.rank


@pytest.mark.parametrize("how", ["number", "buffer", "nested", "alpha"])
def test_the_scaling_is_set_where_the_layer_has_it(how):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = []
    for mode in ("in_place", "folded"):
        module = Layer(how)
        optimizer = DeltaLoRAOptimizer(AdamW, [module.triple()], lr=0.02, start_step=1, weight_update=mode)
        for _ in range(5):
            optimizer.zero_grad()
            module(x).tanh().sum().backward()
            optimizer.step()
        outputs.append(module(x).detach())
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    now = {"alpha": module.alpha / 2, "nested": module.config.scaling}.get(how, module.scaling)
    assert float(now) == 1.5


def test_loralib():
    """`scaling` of its layers is a number that forward multiplies by."""
    lora = pytest.importorskip("loralib", reason="runs where loralib is installed")
    x = torch.randn(5, 6)
    outputs = []
    for mode in ("in_place", "folded"):
        torch.manual_seed(0)
        module = lora.Linear(6, 4, r=2, lora_alpha=3)
        lora.mark_only_lora_as_trainable(module)
        triple = LoRATriple(
            *((module, n) for n in ("weight", "lora_B", "lora_A")), scaling=(module, "scaling"), name="q"
        )
        optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update=mode)
        for _ in range(5):
            optimizer.zero_grad()
            module(x).tanh().sum().backward()
            optimizer.step()
        outputs.append(module(x).detach())
        module.eval()  # loralib adds scaling * B @ A to the weight now
        torch.testing.assert_close(module(x).detach(), outputs[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_a_scaling_that_somebody_else_changes_is_refused():
    run = Run("folded").train(2)
    run.scale.fill_(0.5)
    with pytest.raises(
        RuntimeError, match=r"q: its scaling was 1\.5 when it was registered or last set and is 0\.5 now"
    ):
        run.optimizer.step()
    module = Layer("number")
    optimizer = DeltaLoRAOptimizer(AdamW, [module.triple()], weight_update="folded")
    del module.scaling
    with pytest.raises(RuntimeError, match=r"q: its scaling is not where it was registered: .*scaling"):
        optimizer.step()


# Refusals.


def test_a_scaling_that_can_not_be_set_is_refused_with_the_ways_out():
    stored = strategies.make("linear")
    for triples in ([stored.triple(0.5, "q")], [(stored.W, stored.A, stored.B)]):
        with pytest.raises(
            ValueError, match=r"its scaling is a number that can not be set.*0-d tensor.*set_scaling=.*in_p"
        ):
            DeltaLoRAOptimizer(AdamW, triples, weight_update="folded")


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
        LoRATriple(stored.W, stored.A, stored.B, scaling=scaling, name="q")
    with pytest.raises(TypeError, match="q: set_scaling is a function of the new scaling, got 3"):
        LoRATriple(stored.W, stored.A, stored.B, set_scaling=3, name="q")


@pytest.mark.parametrize("mode", ["fold", None, "In_place", True])
def test_modes_that_do_not_exist(mode):
    with pytest.raises(ValueError, match="weight_update is one of in_place, folded, got"):
        Run(mode)


def test_a_changing_ratio_is_refused():
    with pytest.raises(
        ValueError,
        match=r"^q: weight_update=.folded. needs a constant update_ratio, got <function .*: what W .*in_place",
    ):
        Run("folded", update_ratio=lambda t: 1.0)
    run = Run("folded").train(2)
    with pytest.raises(ValueError, match="needs a constant update_ratio"):
        run.optimizer.add_param_group({"triples": [layer("k", 1)[2]], "update_ratio": lambda t: 1.0})
    assert len(run.optimizer.groups) == 1
    (group,) = run.optimizer.groups
    for name, value in (
        ("update_ratio", 1.0),
        ("update_ratio", 0.0),
        ("start_step", 9),
        ("update_ratio", lambda t: 2.0),
    ):
        before = getattr(group, name), run.stored.A.detach().clone()
        setattr(group, name, value)
        with pytest.raises(
            ValueError, match=r"update_ratio has changed since it was folded .* q \(2, now|q: .*constant"
        ):
            run.optimizer.step()
        setattr(group, name, before[0])
        assert torch.equal(run.stored.A, before[1])
    run.train(1)


def packed(stored):
    """A W that can not be read as a matrix."""
    stored.W = torch.randint(0, 255, (C_D // 2, 1), dtype=torch.uint8)
    return stored


C_D = strategies.C * strategies.D + 1


@pytest.mark.parametrize("start", [0, 2])
def test_a_weight_that_can_not_be_written_needs_a_zero_product(start):
    stored, scale = packed(strategies.make("linear", zero_A=start == 0)), torch.tensor(0.5)
    triple = LoRATriple(stored.W, stored.A, stored.B, scaling=scale, name="q")
    with pytest.raises(ValueError, match=r"q: W has dtype torch\.uint8, .*weight_update=\"folded\""):
        DeltaLoRAOptimizer(SGD, [triple], lr=0.1)
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, start_step=start, weight_update="folded", keep_base="cpu")
    W = stored.W.clone()

    def step():
        (stored.A.sum() + stored.B.sum()).backward()
        optimizer.step()

    for _ in range(start):
        step()
    if start:
        before = stored.A.detach().clone()
        with pytest.raises(
            RuntimeError, match=r"(?s)A @ B is not zero at start_step.*nothing was changed.*q: W has dtype"
        ):
            step()
        assert float(scale) == 0.5
        assert torch.equal(stored.A, before)
        assert optimizer.step_count == start
        return
    step()
    assert float(scale) == 1.5
    assert torch.equal(stored.W, W)
    optimizer.load_state_dict(saved(optimizer.state_dict()))
    step()
    for action in (optimizer.restart, lambda: deltaopt.merged_weights(optimizer), lambda: optimizer.residual("q")):
        with pytest.raises(RuntimeError, match=r"q: W has dtype torch\.uint8"):
            action()
    with optimizer.base_weights():
        assert float(scale) == 0.5
    change = deltaopt.export_adapter(optimizer)["q"]
    torch.testing.assert_close(change.product(), 1.5 * (stored.A @ stored.B).detach())


def test_a_packed_weight_is_not_taken_for_a_plain_one_that_was_saved():
    states = []
    for pack in (False, True):
        stored = strategies.make("linear", zero_A=True)
        stored = packed(stored) if pack else stored
        triple = LoRATriple(stored.W, stored.A, stored.B, scaling=torch.tensor(0.5), name="q")
        states.append((DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded"), stored))
    (plain, _), (quantized, _) = states
    with pytest.raises(WeightMismatchError, match=r"q: W can not be read now .* and could when the state was saved"):
        quantized.load_state_dict(plain.state_dict())
    with pytest.raises(WeightMismatchError, match=r"q: W can be read now .* and could not when the state was saved"):
        plain.load_state_dict(quantized.state_dict())


def test_factors_without_a_product_are_refused_beside_a_packed_weight():
    stored = packed(strategies.make("linear"))
    B = stored.B.detach()[:2].clone().requires_grad_()
    triple = LoRATriple(stored.W, stored.A, B, scaling=torch.tensor(1.0), name="q")
    with pytest.raises(ValueError, match=r"q: A \(5, 3\) and B \(2, 7\) have no product"):
        DeltaLoRAOptimizer(SGD, [triple], weight_update="folded")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_factor_that_is_not_finite_reaches_no_weight(value):
    run = Run("folded", zero=False)
    run.backward()
    with torch.no_grad():
        run.stored.B[0, 0] = value
    with pytest.raises(ValueError, match="a factor of q is NaN or infinite"):
        run.optimizer.step()
    assert torch.equal(run.stored.W, run.W0)
    assert float(run.scale) == 0.5


def test_a_setter_that_fails_changes_nothing():
    stored, other = strategies.make("linear"), strategies.make("linear", 1)
    scale = torch.tensor(0.5, dtype=torch.float64)

    def fail(value):
        raise OSError("no such layer")

    triples = [
        LoRATriple(stored.W, stored.A, stored.B, scaling=scale, name="a"),
        LoRATriple(other.W, other.A, other.B, scaling=0.5, set_scaling=fail, name="b"),
    ]
    optimizer = DeltaLoRAOptimizer(SGD, triples, lr=0.1, weight_update="folded")
    W = stored.W.clone()
    for s in (stored, other):
        s.A.grad = torch.ones_like(s.A)
    with pytest.raises(OSError, match="no such layer"):
        optimizer.step()
    assert float(scale) == 0.5
    assert [t.folded for t in triples] == [0.0, 0.0]
    assert torch.equal(stored.W, W)


@pytest.mark.parametrize("fails", ["in the second layer", "in the inner optimizer"])
def test_a_state_that_can_not_be_set_changes_nothing(fails):
    """Of a setter, and of a state that the inner optimizer refuses."""
    scale = torch.tensor(0.5, dtype=torch.float64)
    broken = []

    def set_scaling(value):
        if broken:
            raise OSError("no such layer")

    stored, other = strategies.make("linear", zero_A=True), strategies.make("linear", 1, zero_A=True)
    triples = [
        LoRATriple(stored.W, stored.A, stored.B, scaling=scale, name="a"),
        LoRATriple(other.W, other.A, other.B, scaling=0.5, set_scaling=set_scaling, name="b"),
    ]
    optimizer = DeltaLoRAOptimizer(SGD, triples, lr=0.1, weight_update="folded")
    early, factors = optimizer.state_dict(), [[p.detach().clone() for p in (s.A, s.B)] for s in (stored, other)]
    for _ in range(2):
        (stored.W + scale * (stored.A @ stored.B)).square().sum().backward()
        other.A.grad = torch.zeros_like(other.A)
        optimizer.step()
    assert [t.folded for t in triples] == [2.0, 2.0]
    for s, (A, B) in zip((stored, other), factors, strict=True):
        s.A.detach().copy_(A)
        s.B.detach().copy_(B)
    if fails == "in the second layer":
        broken.append(True)
        with pytest.raises(OSError, match="no such layer"):
            optimizer.load_state_dict(early)
    else:
        early["param_groups"][0]["params"].append(99)
        with pytest.raises(ValueError, match="parameter group"):
            optimizer.load_state_dict(early)
    assert float(scale) == 1.5
    assert [t.folded for t in triples] == [2.0, 2.0]
    assert optimizer.step_count == 2


# Gradients that come past the hooks.


def test_gradients_that_come_past_the_hooks_are_refused():
    """torch.func.grad makes them so, and engines that copy gradients from other tensors: nothing divides those."""
    run = Run("folded", zero=True)

    def loss(A, B):
        return run.loss(run.stored.W + run.scale * (A @ B), run.t)

    for _ in range(2):
        for factor, grad in zip(run.factors, torch.func.grad(loss, (0, 1))(*run.factors), strict=True):
            factor.grad = grad.detach()
        if run.t == 1:
            before = [p.detach().clone() for p in run.factors]
            with pytest.raises(RuntimeError, match=r"q: its gradients did not come through backward\(\).*not divided"):
                run.optimizer.step()
            assert all(map(torch.equal, before, run.factors))
            assert run.optimizer.step_count == 1
            return
        run.optimizer.step()  # these were made before the ratio was folded, and are whole
        run.t += 1


class Unasked(SGD):
    """Moves the factors without gradients, as zeroth-order optimizers do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(group["lr"])


def test_gradients_that_come_past_one_hook_are_refused():
    """Though those of other layers came through theirs."""
    stored = [layer(name, seed) for seed, name in enumerate("ab")]
    triples = [triple for *_, triple in stored]
    optimizer = DeltaLoRAOptimizer(SGD, triples, lr=0.1, weight_update="folded")
    for t in range(2):
        optimizer.zero_grad()
        for s, scale, triple in stored:
            if triple.name == "a":
                (s.W + scale * s.A @ s.B).square().sum().backward()
            else:
                s.A.grad, s.B.grad = torch.ones_like(s.A), torch.ones_like(s.B)
        if t == 1:
            with pytest.raises(RuntimeError, match=r"^b: its gradients did not come through backward\(\)"):
                optimizer.step()
            return
        optimizer.step()


@pytest.mark.parametrize(("mark", "value"), [("grad_sample", torch.ones(1)), ("grad_added_to_main_grad", True)])
def test_gradients_that_are_made_beside_the_hooks_are_refused(mark, value):
    """By what libraries leave on a factor which make them within the backward pass: Opacus, Megatron's fused ones."""
    run = Run("folded").train(1)
    run.backward()
    setattr(run.stored.B, mark, value)
    with pytest.raises(
        RuntimeError, match=r"q: its gradients .*per-sample gradients, .*main_grad .*nothing was changed"
    ):
        run.optimizer.step()
    delattr(run.stored.B, mark)
    run.train(1)


@pytest.mark.parametrize("registered", ["tensors", "modules"])
@pytest.mark.parametrize("start", [0, 2])
def test_an_inner_optimizer_that_needs_no_gradients_is_refused(registered, start):
    stored = strategies.make("linear", zero_A=True)
    holder = nn.Module()
    holder.W, holder.A, holder.B = (nn.Parameter(t, t.requires_grad) for t in (stored.W, stored.A, stored.B))
    holder.s = 0.5
    triple = LoRATriple(holder.W, holder.A, holder.B, scaling=(holder, "s"), name="q")
    if registered == "modules":
        triple = LoRATriple((holder, "W"), (holder, "A"), (holder, "B"), scaling=(holder, "s"), name="q")
    optimizer = DeltaLoRAOptimizer(Unasked, [triple], lr=0.1, weight_update="folded", start_step=start)
    for _ in range(start):
        optimizer.step()  # nothing is to be folded yet
    with pytest.raises(RuntimeError, match="q: the inner optimizer has changed its A and B, which got no gradients"):
        optimizer.step()


@pytest.mark.parametrize("start", [0, 2])
def test_gradients_that_are_kept_elsewhere_are_divided(start):
    """As engines do that accumulate in float32: a hook takes the gradient into `main_grad`, and `.grad` is None."""

    class Main(SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = p.main_grad
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = p.main_grad = None

    def take(p):
        p.main_grad, p.grad = p.grad, None

    runs = both(inner=SGD, start_step=start), both(inner=Main, start_step=start)
    for run in runs[1]:
        for p in run.factors:
            p.register_post_accumulate_grad_hook(take)
    for run in (*runs[0], *runs[1]):
        for t in range(5):
            run.optimizer.zero_grad()
            run.loss(run.effective(), t).backward()
            run.optimizer.step()
    assert float(runs[1][1].scale) == 1.5
    assert_follows(runs[1][1], runs[0][0])


# What it means: docs/method.md.


def lora(alpha, seed=0, inner=AdamW, steps=200, groups=None, **options):
    """Plain LoRA with this scaling of the branch."""
    stored = strategies.make("linear", seed, zero_A=True)
    loss = strategies.problem(stored.W.shape, seed + 1)
    params = groups(stored) if groups else [stored.A, stored.B]
    optimizer = inner(params, **options)
    for t in range(steps):
        optimizer.zero_grad()
        loss(stored.W + alpha * (stored.A @ stored.B), t).backward()
        optimizer.step()
    return (stored.W + alpha * (stored.A @ stored.B)).detach()


def delta_lora(mode="in_place", steps=200, **options):
    return Run(mode, **options).train(steps).effective().detach()


def apart(now, expected):
    """Their distance beside the distance that training went."""
    W0 = strategies.make("linear", 0).W
    return float((now - expected).norm() / (expected - W0).norm())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["in_place", "folded"])
def test_with_adam_it_is_lora_with_a_larger_alpha(mode, weight_decay):
    """Adam divides the scale of gradients out (eps -> 0), with decoupled weight decay too; SGD does not."""
    options = {"lr": 0.02, "eps": 1e-30, "weight_decay": weight_decay}
    assert apart(delta_lora(mode, **options), lora(0.5 * (1 + RATIO), **options)) < 1e-9
    assert apart(delta_lora(mode, inner=SGD, lr=0.02), lora(1.5, inner=SGD, lr=0.02)) > 1e-2


def test_with_adam_it_is_lora_plus_without_weight_decay():
    """A learning rate of (1 + lambda) times the other's for the factor that starts at zero; with weight decay not."""

    def plus(decay):
        groups = lambda s: [{"params": [s.A], "lr": 0.02 * (1 + RATIO)}, {"params": [s.B]}]  # noqa: E731
        return lora(0.5, groups=groups, lr=0.02, eps=1e-30, weight_decay=decay)

    assert apart(delta_lora(lr=0.02, eps=1e-30, weight_decay=0.0), plus(0.0)) < 1e-9
    assert apart(delta_lora(lr=0.02, eps=1e-30, weight_decay=0.1), plus(0.1)) > 1e-2


def test_the_papers_control_is_another_thing():
    """LoRA with three times the learning rate."""
    options = {"eps": 1e-30, "weight_decay": 0.0}
    assert apart(delta_lora(lr=0.02, **options), lora(0.5, lr=0.06, **options)) > 1e-2


@pytest.mark.parametrize("beyond", ["a changing ratio", "a restart", "K > 0", "a gradient's scale"])
def test_what_goes_beyond_a_larger_alpha(beyond):
    """No constant alpha gives it: the change of the effective weight is not (1 + lambda) s A B, or A and B differ."""
    options = {"lr": 0.02, "eps": 1e-30, "weight_decay": 0.0}
    if beyond == "a changing ratio":
        run = Run("in_place", **options | {"update_ratio": lambda t: 2.0 if t % 2 else 0.5}).train(60)
    elif beyond == "a restart":
        run = Run("in_place", **options).train(30)
        run.optimizer.restart(generator=torch.Generator().manual_seed(0))
        run.train(30)
    elif beyond == "K > 0":
        run = Run("in_place", start_step=20, **options).train(60)
    else:
        run = Run("in_place", **options | {"eps": 1e-2}).train(60)
        assert apart(run.effective().detach(), lora(1.5, steps=60, lr=0.02, eps=1e-2, weight_decay=0.0)) > 1e-3
        return
    change = run.effective().detach() - run.W0
    singular = torch.linalg.svdvals(change)
    assert float(singular[strategies.R]) > 1e-3 * float(singular[0])  # of a rank above r, which no alpha makes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = torch.linalg.svdvals(Run("in_place", **options).train(60).effective().detach() - run.W0)
    assert float(plain[strategies.R]) < 1e-12 * float(plain[0])


# What a review found.


def test_gradients_within_base_weights_are_those_of_the_branch_there():
    in_place, folded = both(3)
    for run in (in_place, folded):
        with run.optimizer.base_weights():
            run.backward()
    for now, expected in zip(folded.gradients[-1], in_place.gradients[-1], strict=True):
        torch.testing.assert_close(now, expected, rtol=1e-10, atol=1e-12)
    for run in (in_place, folded):
        run.train(2)
    assert_follows(folded, in_place)


def test_a_buffer_that_is_replaced_is_still_the_scaling():
    """As `Module.to` does with buffers."""
    module = Layer("buffer")
    tensors = [(module, name) for name in ("weight", "lora_B", "lora_A")]
    triple = LoRATriple(*tensors, scaling=module.scaling, name="q")
    before = module.scaling
    module.to(torch.float32)
    assert module.scaling is not before
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded")
    module(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert float(module.scaling) == 1.5


def sets_a_layer_of_its_own(scaling):
    """As one at the top of a script does, with no closure."""


def test_a_setter_that_a_copy_would_share_is_not_copied():
    module = Layer("alpha")
    tensors = [(module, name) for name in ("weight", "lora_B", "lora_A")]
    for function in (lambda s: module.set_scaling(s), sets_a_layer_of_its_own):
        triple = LoRATriple(*tensors, scaling=0.5, name="q", set_scaling=function)
        with pytest.raises(
            TypeError, match=r"q: set_scaling is a plain function.* functools\.partial\(function, layer\)"
        ):
            copy.deepcopy(triple)
    twin_module, twin = copy.deepcopy((module, module.triple()))
    twin.set_branch_scaling(4.0)
    assert (twin_module.alpha, module.alpha) == (8.0, 1.0)


def test_a_property_that_can_not_be_set_is_refused_at_once():
    class Fixed(Layer):
        scaling = property(lambda self: 0.5, lambda self, value: None)

    class ReadOnly(Fixed):
        scaling = property(lambda self: 0.5)

    module = Fixed("number")
    module.__class__ = ReadOnly
    with pytest.raises(ValueError, match="q: its scaling is scaling, a property of ReadOnly that can not be set"):
        DeltaLoRAOptimizer(SGD, [module.triple()], weight_update="folded")


def test_an_unnamed_triple_is_not_folded_twice():
    stored, scale = strategies.make("linear"), torch.tensor(0.5, dtype=torch.float64)
    triple = LoRATriple(stored.W, stored.A, stored.B, scaling=scale)
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded")
    stored.A.grad = torch.ones_like(stored.A)
    optimizer.step()
    assert triple.branch_scaling == 1.5
    with pytest.raises(ValueError, match="another optimizer has folded its update_ratio"):
        DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded")


@pytest.mark.parametrize("mode", ["in_place", "folded"])
def test_a_restart_with_a_product_that_is_not_finite_changes_nothing(mode):
    run = Run(mode, zero=False).train(3)
    before = run.stored.W.clone(), *(p.detach().clone() for p in run.factors)
    with pytest.raises(ValueError, match="a factor of q is NaN or infinite"):
        run.optimizer.restart(lambda triple: triple.A.fill_(math.nan))
    assert all(map(torch.equal, before, (run.stored.W, *run.factors)))


def test_an_export_of_a_branch_that_was_rescaled_is_refused():
    run = Run("folded").train(2)
    run.scale.fill_(0.5)
    for action in (deltaopt.export_adapter, deltaopt.merged_weights):
        with pytest.raises(RuntimeError, match="q: its scaling was"):
            action(run.optimizer)


def test_a_write_that_fails_at_step_K_is_undone(monkeypatch):
    layers = [layer(str(i), i, zero=False) for i in range(3)]
    optimizer = DeltaLoRAOptimizer(SGD, [t for *_, t in layers], lr=0.0, weight_update="folded")
    for s, *_ in layers:
        s.A.grad = torch.ones_like(s.A)
    before = [s.W + scale * (s.A @ s.B).detach() for s, scale, _ in layers]
    writes = []
    whole = deltaopt.writing.add_terms_

    def failing(triple, *args, **kwargs):
        writes.append(triple.label)
        if len(writes) == 3:
            raise torch.OutOfMemoryError("out of memory")
        whole(triple, *args, **kwargs)

    monkeypatch.setattr(deltaopt.writing, "add_terms_", failing)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert [float(scale) for _, scale, _ in layers] == [0.5] * 3
    monkeypatch.undo()
    optimizer.step()
    assert [float(scale) for _, scale, _ in layers] == [1.5] * 3
    for (s, scale, _), effective in zip(layers, before, strict=True):
        torch.testing.assert_close(s.W + scale * (s.A @ s.B).detach(), effective)


@pytest.mark.parametrize(("ratio", "refused"), [(1.7, True), (2.0, False)])
def test_a_scaling_that_its_tensor_can_not_hold_is_refused(ratio, refused):
    stored, scale = strategies.make("linear", dtype=torch.float32, zero_A=True), torch.tensor(0.5, dtype=torch.bfloat16)
    triple = LoRATriple(stored.W, stored.A, stored.B, scaling=scale, name="q")
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, update_ratio=ratio, weight_update="folded")
    stored.A.grad = torch.ones_like(stored.A)
    if refused:
        with pytest.raises(
            RuntimeError, match=r"q: its scaling is a tensor in which .* = 1\.35 is rounded to 1\.35156"
        ):
            optimizer.step()
        assert float(scale) == 0.5
        return
    optimizer.step()
    assert float(scale) == 1.5


@pytest.mark.parametrize("fate", ["could not be built", "is gone"])
def test_an_optimizer_in_place_that_is_no_more_leaves_the_first_one_alone(fate):
    in_place, folded = both(2)
    triple = LoRATriple(folded.stored.W, *folded.factors, scaling=folded.scale, name="q")
    if fate == "could not be built":
        with pytest.raises(ValueError, match="A is not among the parameters"):
            DeltaLoRAOptimizer(SGD([folded.stored.B], lr=0.1), [triple])
    else:
        with goes_on():
            DeltaLoRAOptimizer(SGD, [triple], lr=0.1)
        gc.collect()
    for run in (in_place, folded):
        run.train(2)
    assert_follows(folded, in_place)


def test_a_copy_keeps_its_divided_gradients():
    """Plain tensors take theirs along."""
    run = Run("folded").train(2)
    run.backward()
    A, optimizer = copy.deepcopy((run.stored.A, run.optimizer))
    assert A.grad is not None
    optimizer.state_dict()
    optimizer.step()
    run.optimizer.step()
    assert torch.equal(A, run.stored.A)


def test_a_factor_of_another_group_does_not_hold_up_a_fold():
    """One that is NaN in layers whose ratio is 0 reaches no W."""
    (s, scale, triple), (t, _, other) = layer("a", 0), layer("b", 1)
    groups = [{"triples": [triple]}, {"triples": [other], "update_ratio": 0.0}]
    optimizer = DeltaLoRAOptimizer(SGD, groups, lr=0.1, weight_update="folded")
    with torch.no_grad():
        t.A[0, 0] = math.nan
    s.A.grad = torch.ones_like(s.A)
    optimizer.step()
    assert float(scale) == 1.5


@pytest.mark.parametrize("without", [0, 1], ids=["A", "B"])
def test_one_factor_with_a_gradient_is_enough(without):
    in_place, folded = both(zero=False)
    for run in (in_place, folded):
        for _ in range(3):
            run.backward()
            run.factors[without].grad = None
            run.optimizer.step()
            run.t += 1
    assert float(folded.scale) == 1.5
    assert_follows(folded, in_place)


def test_factors_that_were_taken_back_may_be_taken_over_again():
    run = Run("folded").train(2)
    for _ in range(2):
        triple = LoRATriple(run.stored.W, *run.factors, scaling=run.scale, name="q")
        with goes_on():
            other = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded")
        run.backward()
        with pytest.raises(RuntimeError, match="q: another optimizer was built on its A since"):
            run.optimizer.step()
        del other, triple
        gc.collect()
        run.train(1)


def test_gradients_of_a_copy_from_before_step_K_are_taken():
    """Nothing is to be divided by yet, and the step that folds divides what comes after it."""
    model = with_its_optimizer()
    twin = copy.deepcopy(model)
    for m in (model, twin):
        for _ in range(2):
            backward_of(m)
            m.optimizer.step()
    assert twin.scaling == 1.5
    assert torch.equal(twin.A, model.A)


def test_a_second_factor_of_layers_that_differ_is_refused():
    (s, _, triple), (t, scale, _) = layer("a", 0), layer("b", 1)
    shared = LoRATriple(t.W, t.A, s.B, scaling=scale, name="b")
    groups = [{"triples": [triple]}, {"triples": [shared], "update_ratio": 1.0}]
    with pytest.raises(ValueError, match="b: its B is a factor of a too"):
        DeltaLoRAOptimizer(AdamW([s.A, s.B, t.A]), groups, weight_update="folded")


@pytest.mark.parametrize("scaling", [(), (nn.Identity(),), (nn.Identity(), "scaling", 1)])
def test_a_scaling_is_a_module_and_one_path(scaling):
    stored = strategies.make("linear")
    with pytest.raises(TypeError, match="q: scaling is a number, a 0-d tensor or"):
        LoRATriple(stored.W, stored.A, stored.B, scaling=scaling, name="q")


def test_a_scaling_may_be_off_by_rounding_alone():
    run = Run("folded").train(2)
    run.scale.mul_(1 + 1e-13)
    run.train(1)
    run.scale.mul_(1 + 1e-9)
    with pytest.raises(RuntimeError, match="q: its scaling was"):
        run.optimizer.step()


def test_a_function_is_called_where_there_is_a_tensor_too():
    stored, scale, seen = strategies.make("linear", zero_A=True), torch.tensor(0.5), []
    triple = LoRATriple(
        *(stored.W, stored.A, stored.B), scaling=scale, set_scaling=lambda s: (seen.append(s), scale.fill_(s)), name="q"
    )
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded")
    stored.A.grad = torch.ones_like(stored.A)
    optimizer.step()
    assert seen == [1.5]


@pytest.mark.parametrize("zero", [True, False])
def test_a_state_has_a_compensation_where_the_weight_was_written(zero):
    stored = strategies.make("linear", dtype=torch.bfloat16, factor_dtype=torch.float32, zero_A=zero)
    triple = LoRATriple(stored.W, stored.A, stored.B, scaling=torch.tensor(0.5), name="q")
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded", rounding="compensated")
    (stored.A.sum() + stored.B.sum()).backward()
    optimizer.step()
    kept = [key for state in optimizer.state_dict()["state"].values() for key in state if "compensation" in key]
    assert kept == ([] if zero else ["deltaopt.compensation.q"])


def test_a_state_of_nearly_the_same_scaling_is_refused():
    run = Run("folded").train(2)
    twin = Run("folded", s=1.5 * (1 + 1e-4))
    with pytest.raises(ValueError, match="the saved state belongs to other triples"):
        twin.optimizer.load_state_dict(run.optimizer.state_dict())


def test_other_factors_beside_a_packed_weight_are_refused():
    stored = packed(strategies.make("linear", zero_A=True))
    triple = LoRATriple(stored.W, stored.A, stored.B, scaling=torch.tensor(0.5), name="q")
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded")
    state = saved(optimizer.state_dict())
    with torch.no_grad():
        stored.B.add_(1.0)
    with pytest.raises(WeightMismatchError, match="q: B has other contents than when the state was saved"):
        optimizer.load_state_dict(state)


def test_a_later_group_that_differs_in_a_shared_factor_is_refused():
    (s, _, triple), (t, scale, _) = layer("a", 0), layer("b", 1)
    optimizer = DeltaLoRAOptimizer(AdamW([s.A, s.B, t.B]), [triple], weight_update="folded")
    shared = LoRATriple(t.W, s.A, t.B, scaling=scale, name="b")
    with pytest.raises(ValueError, match="b: its A is a factor of a too"):
        optimizer.add_param_group({"triples": [shared], "update_ratio": 1.0})
    assert len(optimizer.triples) == 1


def test_a_group_that_is_added_takes_its_factors_over():
    run, (*_, triple) = Run("folded", start_step=9).train(1), layer("k", 1)
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded")
    taken = LoRATriple(run.stored.W, *run.factors, scaling=run.scale, name="q")
    optimizer.add_param_group({"triples": [taken], "start_step": 9})
    run.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="q: another optimizer was built on its A since"):
        run.optimizer.step()


def test_a_group_that_is_added_in_place_gets_whole_gradients():
    run, (*_, triple) = Run("folded").train(2), layer("k", 1)
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1)
    run.backward()
    taken = LoRATriple(run.stored.W, *run.factors, scaling=run.scale, name="q")
    with goes_on():
        optimizer.add_param_group({"triples": [taken]})
    run.backward()
    for divided, whole in zip(*run.gradients[-2:], strict=True):
        torch.testing.assert_close(whole, divided * 3)


@pytest.mark.parametrize("W", [{"dtype": torch.float8_e4m3fn}, {"device": "meta"}], ids=["float8", "meta"])
def test_a_weight_that_is_never_read_may_be_anything(W):
    stored, scale = strategies.make("linear", zero_A=True), torch.tensor(0.5)
    triple = LoRATriple(stored.W.to(**W), stored.A, stored.B, scaling=scale, name="q")
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded")
    (stored.A.sum() + stored.B.sum()).backward()
    optimizer.step()
    assert float(scale) == 1.5
    torch.testing.assert_close(optimizer.displacement("q").product(), (stored.A @ stored.B).detach())


def test_factors_of_other_dimensions_are_refused_beside_a_packed_weight():
    stored = packed(strategies.make("linear"))
    A = stored.A.detach()[None].clone().requires_grad_()
    triple = LoRATriple(stored.W, A, stored.B, scaling=torch.tensor(1.0), name="q")
    with pytest.raises(ValueError, match=r"q: A \(1, 5, 3\) and B \(3, 7\) have no product"):
        DeltaLoRAOptimizer(SGD, [triple], weight_update="folded")


def test_a_copy_with_gradients_of_zero_is_not_refused():
    """As `model.zero_grad(set_to_none=False)` leaves them."""
    model = with_its_optimizer()
    (model.W + model.scaling * model.A @ model.B).square().sum().backward()
    model.optimizer.step()
    twin = copy.deepcopy(model)
    twin.A.grad, twin.B.grad = torch.zeros_like(twin.A), torch.zeros_like(twin.B)
    twin.optimizer.step()
    assert torch.equal(twin.A, model.A)


def test_before_step_K_gradients_may_be_differentiated_again():
    run = Run("folded", start_step=9).train(1)
    grads = torch.autograd.grad(run.loss(run.effective(), 0), run.factors, create_graph=True)
    assert all(grad.requires_grad for grad in grads)


def test_a_second_closure_call_is_refused_where_one_layer_is_folded():
    triples = [layer(name, i)[2] for i, name in enumerate("ab")]
    groups = [{"triples": triples[:1]}, {"triples": triples[1:], "update_ratio": 0.0}]
    optimizer = DeltaLoRAOptimizer(Twice, groups, lr=0.1, weight_update="folded")
    with pytest.raises(RuntimeError, match="called the closure a second time within a step"):
        optimizer.step(lambda: 0.0)


def test_in_place_a_changed_scaling_refuses_a_state():
    run = Run("in_place").train(1)
    state = run.optimizer.state_dict()
    run.scale.fill_(1.5)
    with pytest.raises(RuntimeError, match=r"q: its scaling was 0.5"):
        run.optimizer.load_state_dict(state)


def test_in_place_a_state_is_of_the_very_same_scaling():
    run, twin = Run("in_place").train(2), Run("in_place", s=0.5 * (1 + 1e-8))
    with pytest.raises(ValueError, match="the saved state belongs to other triples"):
        twin.optimizer.load_state_dict(run.optimizer.state_dict())


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_state_of_factors_of_another_shape_is_of_other_triples(factor):
    s = strategies.make("linear")
    state = DeltaLoRAOptimizer(SGD, [s.triple(name="q")]).state_dict()
    if factor == "A":
        s.W, s.A = torch.zeros(6, 7), torch.zeros(6, 3, requires_grad=True)
    else:
        s.W, s.B = torch.zeros(5, 8), torch.zeros(3, 8, requires_grad=True)
    with pytest.raises(ValueError, match="the saved state belongs to other triples"):
        DeltaLoRAOptimizer(SGD, [s.triple(name="q")]).load_state_dict(state)


# One place of a scaling for several branches, and tensors that a conversion leaves behind.


def of_one_scaling(how):
    """Two layers whose forward passes multiply by the same number."""
    model = nn.Module()
    model.scale = 0.5
    if how == "tensor":
        model.scale = torch.tensor(0.5, dtype=torch.float64)
    stored = [strategies.make("linear", seed, zero_A=True) for seed in range(2)]
    scaling = model.scale if how == "tensor" else (model, "scale")
    triples = [LoRATriple(s.W, s.A, s.B, scaling=scaling, name=name) for s, name in zip(stored, "ab", strict=True)]
    return model, stored, triples


@pytest.mark.parametrize("how", ["tensor", "attribute"])
@pytest.mark.parametrize("other", [{"update_ratio": 1.0}, {"start_step": 3}])
def test_a_scaling_of_layers_that_differ_is_refused(how, other):
    model, _, (first, second) = of_one_scaling(how)
    groups = [{"triples": [first]}, {"triples": [second], **other}]
    match = (
        "b: its scaling is that of a too, which has another update_ratio or start_step, and can not be .* set for both"
    )
    with pytest.raises(ValueError, match=match):
        DeltaLoRAOptimizer(SGD, groups, lr=0.1, weight_update="folded")
    optimizer = DeltaLoRAOptimizer(SGD, [first], lr=0.1, weight_update="folded")
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group(groups[1])
    assert float(model.scale) == 0.5


@pytest.mark.parametrize("how", ["tensor", "attribute"])
def test_layers_of_one_scaling_are_folded_together(how):
    """Also one that has no gradients yet."""
    ends = []
    for mode in ("in_place", "folded"):
        model, stored, triples = of_one_scaling(how)
        optimizer = DeltaLoRAOptimizer(SGD, triples, lr=0.05, weight_update=mode)
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
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded")

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
    with goes_on() if steps else contextlib.nullcontext():
        optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded")
    step()


# Inner optimizers and libraries that do other things.


class Sharpness(SGD):
    """SAM as it is usually written: from gradients that are there it goes uphill, asks once, and comes back."""

    @torch.no_grad()
    def step(self, closure):
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        old = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(p.grad, alpha=0.1)
        with torch.enable_grad():
            loss = closure()
        for p, kept in zip(parameters, old, strict=True):
            p.copy_(kept)
        super().step()
        return loss


def test_a_closure_that_is_called_elsewhere_is_refused():
    run = Run("folded", inner=Sharpness, lr=0.01)
    run.backward()
    match = (
        r"the inner optimizer has called the closure after it had changed A or B of q within a step.*load a checkpoint"
    )
    with pytest.raises(RuntimeError, match=match):
        run.optimizer.step(lambda: pytest.fail("it was evaluated"))
    in_place = Run("in_place", inner=Sharpness, lr=0.01)
    in_place.backward()
    in_place.optimizer.step(in_place.backward)  # W stays, as it should


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
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded")
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


def test_released_factors_have_whole_gradients_until_they_are_taken_again():
    run = Run("folded").train(2)
    run.backward()
    divided = run.gradients[-1]
    run.optimizer.release()
    for p in run.factors:
        p.grad = None
    run.loss(run.effective(), run.t).backward()
    for p, grad in zip(run.factors, divided, strict=True):
        torch.testing.assert_close(p.grad, 3 * grad)
    with pytest.raises(RuntimeError, match="q: the gradient of its A was made while this optimizer had no hook on it"):
        run.optimizer.step()
    run.backward()
    for now, grad in zip(run.gradients[-1], divided, strict=True):
        torch.testing.assert_close(now, grad)
    assert run.scale == 1.5
    Run("in_place").train(1).optimizer.release()


def test_a_scaling_that_was_put_back_is_not_warned_of():
    run = Run("folded").train(2)
    run.scale.fill_(0.5)
    triple = LoRATriple(run.stored.W, *run.factors, scaling=run.scale, name="q")
    run.optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, weight_update="folded")
    run.train(2)
    assert run.scale == 1.5
