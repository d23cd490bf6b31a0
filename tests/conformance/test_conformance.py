"""One suite over every inner optimizer, layout and dtype: does W follow the paper's loop, step by step?

The reference is `tests/support/reference.py`: dense, float64, independent of the package.
"""

import copy
import itertools

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer
from tests.support import reference, strategies
from tests.support.compare import relative
from tests.support.strategies import INNERS, MATRICES_ONLY

optim = torch.optim

STEPS = 300
RATIO, SCALING, START = 0.7, 0.5, 3


def wrapped_run(stored, optimizer, loss, steps, each=lambda t: None):
    """Train `stored` with `optimizer`; `each(t)` is called after every step."""
    for t in range(steps):

        def closure(step=t):
            optimizer.zero_grad()
            product = stored.left(stored.A) @ stored.right(stored.B)
            value = loss(stored.matrix(stored.W) + SCALING * product.to(stored.W.dtype), step)
            value.backward()
            return value

        optimizer.step(closure)
        each(t)


def pairs():
    for name in INNERS:
        for layout in strategies.LAYOUTS:
            stored = strategies.make(layout)
            if name not in MATRICES_ONLY or stored.A.dim() == stored.B.dim() == 2:
                yield name, layout


@pytest.mark.parametrize(("name", "layout"), pairs())
def test_follows_the_dense_loop_in_float64(name, layout):
    inner, options = INNERS[name]
    stored = strategies.make(layout, seed=3)
    W = stored.matrices()[0]
    # The reference trains the factors as they are stored: some optimizers (Adafactor, Muon) look at the shape.
    stored_factors = copy.deepcopy(stored)
    loss = strategies.problem(W.shape)
    expected = reference.delta_lora(
        W,
        stored_factors.A,
        stored_factors.B,
        loss,
        lambda params: inner(params, **options),
        steps=STEPS,
        update_ratio=RATIO,
        start_step=START,
        scaling=SCALING,
        left=stored.left,
        right=stored.right,
    )
    optimizer = DeltaLoRAOptimizer(inner, [stored.triple(SCALING)], update_ratio=RATIO, start_step=START, **options)
    frozen = stored.W.clone()
    errors = []

    def compare(t):
        W_now, A_now, B_now = stored.matrices()
        if t < START:
            assert torch.equal(stored.W, frozen)
        errors.append(
            max(
                relative(W_now, expected.W[t + 1]),
                relative(A_now, stored.left(expected.A[t + 1])),
                relative(B_now, stored.right(expected.B[t + 1])),
            )
        )

    wrapped_run(stored, optimizer, loss, STEPS, compare)
    assert relative(expected.W[-1], W) > 1e-3, "the problem does not move W, so the comparison shows nothing"
    assert max(errors) < 1e-12


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("layout", sorted(set(strategies.LAYOUTS) - {"conv2d_channels_last"}))
def test_follows_lbfgs(layout, line_search):
    """W against the dense products of the factors that LBFGS left behind, after every step.

    A run of its own is no reference here: LBFGS makes another trajectory of a difference in the last bit.
    Its own code can not view channels_last gradients.
    """
    stored = strategies.make(layout, seed=3)
    W, A, B = stored.matrices()
    loss = strategies.problem(W.shape)
    optimizer = DeltaLoRAOptimizer(
        optim.LBFGS,
        [stored.triple(SCALING)],
        update_ratio=RATIO,
        start_step=START,
        lr=0.1,
        max_iter=3,
        line_search_fn=line_search,
    )
    products, weights = [A @ B], [W]

    def record(t):
        W_now, A_now, B_now = stored.matrices()
        products.append(A_now @ B_now)
        weights.append(W_now)

    wrapped_run(stored, optimizer, lambda weight, t: loss(weight, 0), 100, record)
    coefs = [RATIO * SCALING if t >= START else 0.0 for t in range(100)]
    expected = reference.replay(W, products, coefs)
    assert relative(expected[-1], W) > 1e-3
    assert max(map(relative, weights, expected)) < 1e-12


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float32, "auto"),
        *itertools.product((torch.bfloat16, torch.float16), ("nearest", "stochastic", "compensated")),
    ],
)
@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_lower_precision_rounds_each_sum_once(layout, dtype, rounding, factor_dtype):
    """Each step alone: W' is the float64 sum of W and the dense delta, rounded to W's dtype once.

    With compensation W is all the sums so far, rounded once.
    """
    stored = strategies.make(layout, seed=5, dtype=dtype, factor_dtype=factor_dtype)
    optimizer = DeltaLoRAOptimizer(
        optim.AdamW, [stored.triple(SCALING)], update_ratio=RATIO, lr=0.03, rounding=rounding
    )
    loss = strategies.problem(stored.matrix(stored.W).shape)
    before = [t.double() for t in stored.matrices()]
    exact, noise, moved = before[0], 0.0, 0

    def compare(t):
        nonlocal before, exact, noise, moved
        after = [t.double() for t in stored.matrices()]
        delta = after[1] @ after[2] - before[1] @ before[2]
        exact = exact + RATIO * SCALING * delta
        spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
        noise = noise + 1e-6 * (before[1].abs() @ before[2].abs() + after[1].abs() @ after[2].abs())
        # Half a spacing is nearest rounding, one of the two neighbours stochastic rounding; beside it float32's own
        # rounding of the product.
        allowed = (1.01 if rounding == "stochastic" else 0.51) * spacing + noise
        assert bool(((after[0] - exact).abs() <= allowed).all())
        moved += int((after[0] != before[0]).sum())
        before = after
        if rounding != "compensated":
            exact, noise = after[0], 0.0

    wrapped_run(stored, optimizer, loss, 20, compare)
    assert moved > 0
    assert stored.W.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "layout"), pairs())
def test_ratio_zero_is_the_inner_optimizer_bit_for_bit(name, layout, dtype):
    inner, options = INNERS[name]
    factor_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    plain = strategies.make(layout, seed=7, dtype=dtype, factor_dtype=factor_dtype)
    wrapped = copy.deepcopy(plain)
    loss = strategies.problem(plain.matrix(plain.W).shape)
    wrapped_run(plain, inner([plain.A, plain.B], **options), loss, 8)
    optimizer = DeltaLoRAOptimizer(inner, [wrapped.triple(SCALING)], update_ratio=0.0, **options)
    wrapped_run(wrapped, optimizer, loss, 8)
    for a, b in ((plain.W, wrapped.W), (plain.A, wrapped.A), (plain.B, wrapped.B)):
        assert torch.equal(a, b)
    assert optimizer.buffer_bytes == 0


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_unchanged_factor_keeps_the_bits_of_W(layout, dtype, rounding):
    """Also those of -0.0, which a product of zeros would turn into 0.0."""
    stored = strategies.make(layout, seed=9, dtype=dtype)
    stored.W.copy_(torch.where(stored.W > 0.5, -0.0, stored.W))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[stored.W.element_size()]
    before = stored.W.clone().view(bits)
    optimizer = DeltaLoRAOptimizer(optim.SGD, [stored.triple(SCALING)], lr=0.0, rounding=rounding)
    wrapped_run(stored, optimizer, strategies.problem(stored.matrix(stored.W).shape), 3)
    optimizer.zero_grad()
    optimizer.step()  # no gradients at all
    assert optimizer.step_count == 4
    assert torch.equal(stored.W.view(bits), before)
