"""One table of rules against the paper's loop: rule x inner optimizer x layout x dtype, step by step.

The reference is `tests/support/reference.py`: dense, float64, independent of the package. A rule may leave the change
of W to the branch. What is compared is therefore what the layer multiplies by, less what the branch adds by itself.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support import reference, strategies
from tests.support.compare import refused, relative
from tests.support.runs import RATIO, SCALING, LayerRun
from tests.support.strategies import COMPUTED, INNERS, LAYOUTS, ROUNDINGS, RULES, SCHEDULES, fits


class Start(NamedTuple):
    """The step and the product from which W begins to move."""

    step: int
    zero: bool


BEGINNINGS = {"zero product": Start(0, True), "random product": Start(0, False), "step 3": Start(3, False)}


class Row(NamedTuple):
    """The statements about one rule.

    Args:
        steps: how many are compared with the reference, by start.
        change: what the stored W changes by in step t, over lambda * s, from the products before and after the step;
            None where W keeps its bits.
        still: whether a step that does not change A and B keeps the bits of W, by what the product is.
    """

    steps: dict[str, int]
    change: Callable[[int, Start, Tensor, Tensor], Tensor | None]
    still: tuple[bool, ...]


def moves_each_step(t: int, start: Start, before: Tensor, after: Tensor) -> Tensor | None:
    return after - before if t >= start.step else None


def moves_once(t: int, start: Start, before: Tensor, after: Tensor) -> Tensor | None:
    """Return what the branch adds from step K on."""
    return -before if t == start.step and not start.zero else None


TABLE = {
    "in_place": Row({"zero product": 30, "random product": 30, "step 3": 300}, moves_each_step, (True, False)),
    "folded": Row({"zero product": 30, "random product": 30, "step 3": 150}, moves_once, (True,)),
}


STEPS_IN_OTHER_LAYOUTS = 90
"""At most, to save time: the moves are the product of a linear layer in other views."""


def steps_of(rule: str, start: str, layout: str) -> int:
    steps = TABLE[rule].steps[start]
    return steps if layout == "linear" else min(steps, STEPS_IN_OTHER_LAYOUTS)


def test_the_table_has_every_rule():
    assert tuple(TABLE) == RULES


ALIKE = ("SGD_nesterov", "AdamW_amsgrad", "Adamax", "ASGD")
"""Inner optimizers that differ from another row by a variant of its step: `make nightly` takes their other layouts."""


def cases(*columns):
    """The columns x inner optimizer x layout x rule, as far as they fit; the rules of a case follow each other."""
    for *others, name, layout in itertools.product(*columns, INNERS, LAYOUTS):
        marks = [pytest.mark.nightly] if name in ALIKE and layout != "linear" else []
        if fits(name, layout):
            yield from (pytest.param(*others, name, layout, rule, marks=marks) for rule in TABLE)


def assert_is(run: LayerRun, expected: reference.DenseRun, t: int, tolerance: float) -> None:
    """W as the paper has it, A and B are those of the reference after t steps."""
    _, A, B = run.stored.matrices()
    assert relative(run.base() + run.moved(), expected.W[t]) < tolerance
    assert relative(A, run.stored.left(expected.A[t])) < tolerance
    assert relative(B, run.stored.right(expected.B[t])) < tolerance


def reference_of(run: LayerRun, steps: int, start: Start, loss=None, make=None, **options) -> reference.DenseRun:
    """The paper's loop from where `run` is now.

    It trains the factors as they are stored: some optimizers (Adafactor, Muon) look at the shape.
    """
    stored = run.stored.twin()
    settings = {"update_ratio": RATIO, "start_step": start.step, "scaling": SCALING, **options}
    return reference.delta_lora(
        stored.matrices()[0],
        stored.A,
        stored.B,
        loss or run.loss,
        make or (lambda params: run.inner(params, **run.inner_options)),
        steps=steps,
        left=stored.left,
        right=stored.right,
        **settings,
    )


def conforming_run(rule: str, layout: str, start: Start, inner=torch.optim.AdamW, options=None, **others) -> LayerRun:
    settings = {"update_ratio": RATIO, "start_step": start.step, "seed": 3, **others}
    run = LayerRun(rule, layout, inner=inner, zero=start.zero, **settings, **(options or {}))
    run.inner_options = options or {}
    return run


@functools.lru_cache(maxsize=2)
def long_reference(start: str, name: str, layout: str) -> reference.DenseRun:
    """One for all rules."""
    inner, options = INNERS[name]
    steps = max(steps_of(rule, start, layout) for rule in TABLE)
    return reference_of(conforming_run("in_place", layout, BEGINNINGS[start], inner, options), steps, BEGINNINGS[start])


@pytest.mark.parametrize(("start", "name", "layout", "rule"), cases(BEGINNINGS))
def test_follows_the_dense_loop_in_float64(rule, start, name, layout):
    """W, A and B in every step; the stored W changes its bits in those steps that the table says, and in no other."""
    (inner, options), steps, begin = INNERS[name], steps_of(rule, start, layout), BEGINNINGS[start]
    run, expected = conforming_run(rule, layout, begin, inner, options), long_reference(start, name, layout)
    least = 1e-3 if start == "step 3" else 1e-6  # Adafactor moves A by its size, which is zero at first
    assert relative(expected.W[steps], expected.W[0]) > least, "W does not move, so the comparison shows nothing"
    for t in range(steps):
        before, product = run.stored.W.clone(), run.product()
        run.train(by_closure=True)
        written = TABLE[rule].change(t, begin, product, run.product()) is not None
        assert torch.equal(run.stored.W, before) != written
        assert_is(run, expected, t + 1, 1e-12)


@pytest.mark.parametrize("start", ["random product", "step 3"])
@pytest.mark.parametrize("name", ["SGD", "AdamW_foreach"])
@pytest.mark.parametrize("layout", COMPUTED)
@pytest.mark.parametrize("rule", TABLE)
def test_computed_factors_follow_the_dense_loop_in_float64(rule, layout, name, start):
    """What trains are other tensors than A and B."""
    (inner, options), begin = INNERS[name], BEGINNINGS[start]
    run = conforming_run(rule, layout, begin, inner, options)
    expected = reference_of(run, 60, begin)
    assert relative(expected.W[60], expected.W[0]) > 1e-3
    for t in range(60):
        run.train(by_closure=True)
        assert_is(run, expected, t + 1, 1e-12)


class Clipping(NamedTuple):
    """Makes an inner optimizer that clips the gradients itself, for the reference."""

    inner: type[torch.optim.Optimizer]
    options: dict
    clip: str | None

    def __call__(self, params: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = self.inner(params, **self.options)
        step = optimizer.step

        def clipped(closure):
            closure()
            if self.clip == "norm":
                nn.utils.clip_grad_norm_(params, 0.1)
            elif self.clip == "value":
                nn.utils.clip_grad_value_(params, 0.02)
            step()

        optimizer.step = clipped
        return optimizer


@given(
    rule=strategies.rules,
    name=strategies.inners,
    layout=strategies.layouts,
    seed=strategies.seeds,
    start=st.builds(Start, strategies.early_start_steps, st.booleans()),
    ratio=strategies.moving_ratios | strategies.schedules,
    scaling=strategies.some_scalings,
    clip=strategies.clippings,
    micro=strategies.micro_batches,
)
def test_follows_with_any_ratio_scaling_clipping_and_accumulation(
    rule, name, layout, seed, start, ratio, scaling, clip, micro
):
    assume(fits(name, layout))
    inner, options = INNERS[name]
    ratio = SCHEDULES.get(ratio, ratio)
    run = conforming_run(rule, layout, start, inner, options, seed=seed, update_ratio=ratio, scaling=scaling)
    loss = lambda W, t: sum(run.loss(W, micro * t + i) for i in range(micro))  # noqa: E731
    settings = {"update_ratio": ratio, "scaling": scaling}
    expected = reference_of(run, 12, start, loss, Clipping(inner, options, clip), **settings)

    def effective(t: int) -> Tensor:
        A, B = run.stored.left(expected.A[t]), run.stored.right(expected.B[t])
        return expected.W[t] + scaling * reference.product(A, B)

    assume(float(effective(-1).norm()) < 1e3)  # a run that diverges makes much of the last bit
    # Muon computes in bfloat16, where a difference in the last bit of float64 may show as one of a thousandth.
    tolerance = 2e-2 if name == "Muon" else 1e-9
    for t in range(12):
        run.train(1, micro, clip)
        _, A, B = run.stored.matrices()
        assert relative(run.effective_exactly(), effective(t + 1)) < tolerance
        assert relative(A, run.stored.left(expected.A[t + 1])) < tolerance
        assert relative(B, run.stored.right(expected.B[t + 1])) < tolerance


SMOOTH = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-3}),
    "SGD": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}),
}
"""Inner optimizers that do not make much of a difference in the last bit."""


@pytest.mark.parametrize("start", BEGINNINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(("clip", "micro"), [(None, 1), ("norm", 2), ("value", 3)])
@pytest.mark.parametrize("rule", TABLE)
def test_follows_a_ratio_that_changes(rule, clip, micro, name, schedule, start):
    """W, A and B in every step, with gradients that are clipped and accumulated."""
    (inner, options), begin, ratio = SMOOTH[name], BEGINNINGS[start], SCHEDULES[schedule]
    run = conforming_run(rule, "linear", begin, inner, options, update_ratio=ratio)
    loss = lambda W, t: sum(run.loss(W, micro * t + i) for i in range(micro))  # noqa: E731
    expected = reference_of(run, 20, begin, loss, Clipping(inner, options, clip), update_ratio=ratio)
    for t in range(20):
        run.train(1, micro, clip)
        assert_is(run, expected, t + 1, 1e-12)


@pytest.mark.parametrize("start", BEGINNINGS)
@pytest.mark.parametrize("inner", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("rule", TABLE)
def test_follows_in_float32_over_200_steps(rule, inner, start):
    """An eps for which the runs are not chaotic."""
    begin, options = BEGINNINGS[start], {"lr": 0.02, **({"eps": 1e-3} if inner is torch.optim.AdamW else {})}
    run = conforming_run(rule, "linear", begin, inner, options, dtype=torch.float32)
    expected = reference_of(run, 200, begin)
    for t in range(200):
        run.train(by_closure=True)
        assert_is(run, expected, t + 1, 1e-4)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"conv2d_channels_last"}))
def test_follows_lbfgs(layout, line_search):
    """W against the dense products of the factors that LBFGS left behind, after every step.

    A run of its own is no reference here: LBFGS makes another trajectory of a difference in the last bit.
    Its own code cannot view channels_last gradients.
    """
    options = {"lr": 0.1, "max_iter": 3, "line_search_fn": line_search}
    run = conforming_run("in_place", layout, BEGINNINGS["step 3"], torch.optim.LBFGS, options)
    problem = run.loss
    run.loss = lambda weight, t: problem(weight, 0)
    products, weights = [run.product()], [run.stored.matrices()[0]]
    for _ in range(100):
        run.train(by_closure=True)
        products.append(run.product())
        weights.append(run.stored.matrices()[0])
    coefs = [RATIO * SCALING if t >= 3 else 0.0 for t in range(100)]
    expected = reference.replay(weights[0], products, coefs)
    assert relative(expected[-1], weights[0]) > 1e-3
    assert max(map(relative, weights, expected)) < 1e-12


def test_the_folded_rule_refuses_lbfgs():
    refused(
        lambda: LayerRun("folded", inner=torch.optim.LBFGS),
        ValueError,
        r"LBFGS evaluates the loss several times.*weight_update=\"in_place\"",
    )


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "auto"), *itertools.product((torch.bfloat16, torch.float16), ROUNDINGS)],
)
@pytest.mark.parametrize("layout", [*LAYOUTS, *COMPUTED])
@pytest.mark.parametrize(
    ("rule", "start"), [("in_place", Start(1, False)), ("folded", Start(1, False)), ("folded", Start(0, True))], ids=str
)
def test_lower_precision_rounds_each_sum_once(rule, start, layout, dtype, rounding, factor_dtype):
    """Each step alone: W' is the float64 sum of W and the dense change, rounded to W's dtype once.

    With compensation W is all the sums so far, rounded once. Where the table says of no change, W keeps its bits.
    """
    options = {"lr": 0.03, "rounding": rounding}
    run = conforming_run(rule, layout, start, options=options, seed=5, dtype=dtype, factor_dtype=factor_dtype)
    before = [t.double() for t in run.stored.matrices()]
    exact, noise, moved = before[0], 0.0, 0
    for t in range(20):
        bits = run.stored.W.clone()
        run.train(by_closure=True)
        after = [t.double() for t in run.stored.matrices()]
        change = TABLE[rule].change(t, start, before[1] @ before[2], after[1] @ after[2])
        if change is None:
            assert torch.equal(run.stored.W, bits)
            before = after
            continue
        exact = exact + RATIO * SCALING * change
        spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
        noise = noise + 1e-6 * (before[1].abs() @ before[2].abs() + after[1].abs() @ after[2].abs())
        # Half a spacing is nearest rounding, one of the two neighbours stochastic rounding; float32's own rounding of
        # the product adds to it.
        allowed = (1.01 if rounding == "stochastic" else 0.51) * spacing + noise
        assert bool(((after[0] - exact).abs() <= allowed).all())
        moved += int((after[0] != before[0]).sum())
        before = after
        if rounding != "compensated":
            exact, noise = after[0], 0.0
    assert (moved > 0) == (not start.zero)
    assert run.stored.W.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "layout", "rule"), cases())
def test_ratio_zero_is_the_inner_optimizer_bit_for_bit(rule, name, layout, dtype):
    inner, options = INNERS[name]
    factor_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    settings = {"options": options, "seed": 7, "dtype": dtype, "factor_dtype": factor_dtype, "update_ratio": 0.0}
    run, plain = (conforming_run(rule, layout, Start(0, False), inner, **settings) for _ in range(2))
    optimizer, plain.optimizer = plain.optimizer, inner(plain.factors, **options)
    del optimizer
    for _ in range(8):
        run.train(by_closure=True)
        plain.optimizer.step(plain.closure)
        plain.t += 1
    assert all(map(torch.equal, run.tensors, plain.tensors))
    assert float(run.scale) == SCALING
    assert run.optimizer.buffer_bytes == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rule", "zero"), [(rule, zero) for rule, row in TABLE.items() for zero in row.still])
def test_an_unchanged_factor_keeps_the_bits_of_W(rule, zero, layout, dtype, rounding):
    """Also those of -0.0, which a product of zeros would turn into 0.0."""
    run = conforming_run(
        rule, layout, Start(0, zero), torch.optim.SGD, {"lr": 0.0, "rounding": rounding}, seed=9, dtype=dtype
    )
    W = run.stored.W
    W.copy_(torch.where(W > 0.5, -0.0, W))
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[W.element_size()]
    before = W.clone().view(view)
    run.train(3, by_closure=True)
    run.optimizer.zero_grad()
    run.optimizer.step()  # no gradients at all
    assert run.optimizer.step_count == 4
    assert torch.equal(W.view(view), before)
