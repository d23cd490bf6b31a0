"""The product is added in blocks of any size, to weights of any stride, and rounded once: near, at random, or kept.

Statistical tests hold a mean over seeds against its standard error, and show by a control that nearest rounding
and truncation fail them.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaopt.rounding.blocks import add_product_, cut_off, lifted
from deltaopt.rounding.noise import Keys, label_hashes, noise_factors
from tests.support import internals, strategies
from tests.support.sixteen_bits import BOTH_DTYPES, int16_of, normal, spacing
from tests.support.strategies import ROUNDINGS

sides = st.integers(1, 12)
each_dtype = pytest.mark.parametrize("dtype", BOTH_DTYPES)
each_mode = pytest.mark.parametrize("mode", ROUNDINGS)


def noise_for(W, seed=0):
    *lead, c, d = W.shape
    return noise_factors(Keys.of(seed, "move", 0), label_hashes(["q"], lead)[0], c, d)


def how(mode, W, seed=0):
    """Return the arguments of `add_product_` that make it round in this way."""
    if mode == "stochastic":
        return {"noise": noise_for(W, seed)}
    return {"compensation": torch.zeros_like(W, dtype=torch.int16)} if mode == "compensated" else {}


def every_value(dtype):
    """Return all finite numbers of a 16-bit dtype, as one row."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()].view(1, -1)


def add_(W, delta, **options):
    """Add a float32 row of the shape of W to W."""
    add_product_(W, torch.ones(1, 1), delta, 1.0, **options)


@given(sides, sides, st.integers(1, 5), st.integers(1, 40), st.booleans(), strategies.seeds)
@each_mode
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("stacked", [False, True])
@each_dtype
def test_blocks_add_up_to_the_whole(dtype, stacked, wide, mode, c, d, k, block, turned, seed):
    lead = (2,) if stacked else ()
    W = normal(*lead, d, c, seed=seed, dtype=dtype).mT if turned else normal(*lead, c, d, seed=seed, dtype=dtype)
    U, V = normal(*lead, c, k, seed=seed + 1, dtype=wide), normal(*lead, k, d, seed=seed + 2, dtype=wide)
    exact = W.double() + 0.7 * (U.double() @ V.double())
    with pytest.MonkeyPatch.context() as patch:
        internals.use_blocks_of(patch, block)
        add_product_(W, U, V, 0.7, **how(mode, W, seed))
    allowed = (1.01 if mode == "stochastic" else 0.51) * spacing(exact, dtype) * 2
    noise = 1e-6 * (U.double().abs() @ V.double().abs())
    assert bool(((W.double() - exact).abs() <= allowed + noise).all())


@given(sides, sides, st.integers(1, 40), strategies.seeds)
@pytest.mark.parametrize("mode", ["stochastic", "compensated"])
@pytest.mark.parametrize("stacked", [False, True])
@each_dtype
def test_blocks_and_strides_do_not_change_a_bit(dtype, stacked, mode, c, d, block, seed):
    """Tie the noise and the compensation to the element (i, j), for products that float32 holds exactly."""
    lead = (2,) if stacked else ()
    first = normal(*lead, c, d, seed=seed, dtype=dtype)
    second = first.mT.clone(memory_format=torch.contiguous_format).mT  # of one row or column too
    U, V = (normal(*lead, *shape, seed=seed).round() for shape in ((c, 1), (1, d)))
    kept = []
    for W, elements in ((first, 1 << 20), (second, block)):
        options = how(mode, W, seed)
        with pytest.MonkeyPatch.context() as patch:
            internals.use_blocks_of(patch, elements)
            for _ in range(2):
                add_product_(W, U, V, 2.0**-9, **options)
        kept.append(options.get("compensation"))
    assert torch.equal(first, second)
    assert mode == "stochastic" or torch.equal(*kept)


@each_mode
@each_dtype
def test_every_value_keeps_its_bits_when_nothing_is_added(dtype, mode):
    """Keep subnormal numbers, the largest ones and both zeros; -0 is what a masked product adds."""
    W = every_value(dtype)
    before, options = W.clone(), how(mode, W)
    add_product_(W, torch.zeros(1, 1), torch.zeros_like(W, dtype=torch.float32), -1.0, **options)
    assert torch.equal(int16_of(W), int16_of(before))
    assert not options.get("compensation", torch.zeros(1)).any()


VALUES = torch.tensor(
    [1.0001, -0.0203, 3e-5, -7e-6, 1e-8, 6.1e-5, 65503.0, -2e-8, 6.0999e-5, 1 / 3, -2.5e-9, 0.12499],
    dtype=torch.float64,
)


def deviations(dtype, write, seeds=4000):
    """Return how far the mean over `seeds` of `write(x, seed)` is from x, in standard errors of a fair coin."""
    x = VALUES.float().view(1, -1)
    total = torch.zeros_like(x, dtype=torch.float64)
    for seed in range(seeds):
        total += write(x, seed).double()
    low = torch.tensor([_floor(float(value), dtype) for value in x.flatten()], dtype=torch.float64)
    width = spacing(x.double(), dtype)
    fraction = (x.double() - low) / width
    deviation = (fraction * (1 - fraction) / seeds).sqrt() * width
    return ((total / seeds - x.double()) / deviation).abs()


def _floor(value, dtype):
    """Return the largest value of the dtype that is not above."""
    near = torch.tensor(value).to(dtype)
    below = torch.nextafter(near, torch.tensor(-torch.inf, dtype=dtype))
    return float(below if float(near) > value else near)


@each_dtype
def test_the_mean_of_stochastic_rounding_is_the_sum_itself(dtype):
    """Stay within 4.5 standard errors at 12 values, of normal and subnormal size; biased rounding is 20 off."""

    def stochastic(x, seed):
        W = torch.zeros_like(x, dtype=dtype)
        add_(W, x, noise=noise_for(W, seed))
        return W

    def truncated(x, seed):
        near = x.to(dtype)
        toward_zero = torch.nextafter(near, torch.zeros_like(near))
        return torch.where(near.abs() > x.abs(), toward_zero, near)

    assert float(deviations(dtype, stochastic).max()) < 4.5
    for biased in (truncated, lambda x, seed: x.to(dtype)):
        assert float(deviations(dtype, biased, seeds=4000).median()) > 20


@each_dtype
def test_small_updates_add_up_in_the_mean(dtype):
    """Add a hundredth of a spacing 400 times: nearest rounding keeps none of it."""
    W = torch.full((64, 64), 1.0, dtype=dtype)
    near, exact, step = W.clone(), W.clone(), torch.finfo(dtype).eps / 100
    compensation = torch.zeros_like(W, dtype=torch.int16)
    U, V = torch.ones(64, 1), torch.ones(1, 64)
    for seed in range(400):
        add_product_(W, U, V, step, noise=noise_for(W, seed))
        add_product_(near, U, V, step)
        add_product_(exact, U, V, step, compensation=compensation)
    assert bool((near == 1.0).all())
    kept = (W.double() - 1) / (400 * step)
    assert abs(float(kept.mean()) - 1) < 4.5 * float(kept.std()) / 64
    assert bool((exact.double() - 1 == 400 * step).all())


@each_dtype
def test_seeds(dtype):
    def rounded(seed):
        W = normal(30, 30, seed=1, dtype=dtype)
        add_product_(W, normal(30, 1, seed=2), normal(1, 30, seed=3), 1e-4, noise=noise_for(W, seed))
        return W

    assert torch.equal(rounded(5), rounded(5))
    assert not torch.equal(rounded(5), rounded(6))


@given(strategies.seeds, st.integers(1, 6))
def test_compensated_bfloat16_is_a_float32_weight(seed, steps):
    """Hold bit for bit: the weight is its upper half, rounded to nearest, the compensation what is missing."""
    W = normal(6, 9, seed=seed, dtype=torch.bfloat16)
    full, compensation = W.float(), torch.zeros_like(W, dtype=torch.int16)
    for step in range(steps):
        U, V = normal(6, 4, seed=seed + step), normal(4, 9, seed=seed - step)
        add_product_(W, U, V, 1e-3, compensation=compensation)
        full.addmm_(U, V, alpha=1e-3)
        assert torch.equal(lifted(W, compensation), full)
    # Ties, which rounding to nearest makes even, go up here.
    assert bool(((full.bfloat16() == W) | (compensation.to(torch.int32).abs() == 2**15)).all())


def test_compensated_float16_is_as_good_as_float32():
    """Hold also below its smallest normal number, where float32 has finer steps: 2^-37 apart is what is kept."""
    scale = 10.0 ** torch.randint(-9, 4, (1, 20000), generator=torch.Generator().manual_seed(1))
    full = (normal(1, 20000, seed=2) * scale).clamp(-65504, 65504)
    W = torch.zeros_like(full, dtype=torch.float16)
    compensation = torch.zeros_like(W, dtype=torch.int16)
    add_(W, full, compensation=compensation)
    back = lifted(W, compensation)
    assert bool(((back.double() - full.double()).abs() <= 2.0**-38).all())
    assert bool((back == full)[full.abs() >= 2.0**-14].all())
    assert bool(((W.double() - full.double()).abs() <= 0.5 * spacing(full.double(), torch.float16)).all())
    before = int16_of(W).clone(), compensation.clone()
    add_product_(W, torch.zeros(1, 1), torch.zeros_like(full), -1.0, compensation=compensation)
    assert torch.equal(int16_of(W), before[0])
    assert torch.equal(compensation, before[1])


@each_mode
@each_dtype
def test_what_would_overflow_becomes_the_largest_value(dtype, mode):
    largest = torch.finfo(dtype).max
    W = torch.tensor([[largest, -largest, largest, 0.0, 1.0]], dtype=dtype)
    delta = torch.tensor([[largest, -largest, 0.0, torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max]])
    options = how(mode, W)
    for _ in range(2):
        add_(W, delta, **options)
        assert W.tolist() == [[largest, -largest, largest, largest, -largest]]
    if mode == "compensated":  # and it comes down again
        add_(W, torch.full_like(delta, -largest / 2), **options)
        assert W[0, 0] == largest / 2


@each_mode
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@each_dtype
def test_a_nan_stays_one(dtype, wide, mode):
    """Try each NaN, in the vectors of a long row and in what is left over of it."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    nans = values[values.isnan()]
    for width in (1, 1003):
        for seed, first in enumerate(range(0, nans.numel(), width if width > 1 else 97)):
            W = torch.nn.functional.pad(nans[first : first + width].view(1, -1), (0, 1), value=1.0)
            U, V = torch.ones(1, 1, dtype=wide), torch.full_like(W, 2.0**-9, dtype=wide)
            add_product_(W, U, V, 1.0, **how(mode, W, seed))
            assert bool(W[:, :-1].isnan().all())
            assert not W[:, -1:].isnan()


@each_dtype
def test_a_weight_that_somebody_else_wrote_takes_no_harm(dtype):
    """Zero a weight, as pruning does, and keep the compensation of the numbers that were there before."""
    W = torch.full((1, 8), 0.02, dtype=dtype)
    compensation = torch.zeros_like(W, dtype=torch.int16)
    add_(W, torch.tensor([[1e-5, -1e-5] * 4]), compensation=compensation)
    assert compensation.min() < 0 < compensation.max()
    W.zero_()
    W[0, 4:] = -0.0
    add_(W, torch.zeros(1, 8), compensation=compensation)
    assert bool((W.abs() < 1e-6).all())


@each_dtype
def test_what_was_cut_off_is_found_from_the_full_weight(dtype):
    full = normal(5, 7, seed=4)
    W = torch.zeros_like(full, dtype=dtype)
    compensation = torch.zeros_like(W, dtype=torch.int16)
    for row in range(5):
        add_(W[row : row + 1], full[row : row + 1], compensation=compensation[row : row + 1])
    assert torch.equal(cut_off(W, full), compensation)
    for other in (torch.nextafter(W, torch.full_like(W, torch.inf)).nextafter(torch.full_like(W, torch.inf)), -W):
        assert not cut_off(other, full).any()  # no rounding of it
    assert not cut_off(W.fill_(torch.nan), full).any()
    assert not cut_off(W.fill_(1.0), full.fill_(torch.inf)).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_what_was_cut_off_is_found_where_float16_becomes_subnormal(sign):
    """Round up to 2^-14: in float32 such a number was where the spacing is twice as fine as there."""
    for part in (0.5, 0.5001, 0.6, 0.75, 0.9999, 1.0):
        W = torch.full((1, 1), sign * (2.0**-14 - 2.0**-24), dtype=torch.float16)
        full = W.float() + sign * part * 2.0**-24
        kept = torch.zeros_like(W, dtype=torch.int16)
        add_(W, full - W.float(), compensation=kept)
        assert torch.equal(cut_off(W, full), kept)


def test_below_a_zero_the_sign_stays():
    """Give a number that is restored across zero the sign of W, as the kernel does."""
    W, kept = torch.zeros(1, 2, dtype=torch.float16).mul_(torch.tensor([1.0, -1.0])), torch.full((1, 2), -1)
    assert torch.equal(lifted(W, kept.to(torch.int16)).signbit(), torch.tensor([[False, True]]))


@pytest.mark.parametrize("scale", [1.0, 2.0**-20])
@each_dtype
def test_beyond_a_tie_half_a_spacing_was_cut_off(dtype, scale):
    """Sum in another order, as a rebuilt weight does: the last bit may differ."""
    W = torch.tensor([[1.5, -1.5]]).mul(scale).to(dtype)
    half = spacing(W.double(), dtype) / 2
    for away in (half, -half):
        full = (W.double() + (1 + 2.0**-8) * away).float()
        kept = cut_off(W, full)
        assert bool(((lifted(W, kept).double() - (W.double() + away)).abs() <= half * 2.0**-11).all())
        before = W.clone(), kept.clone()
        add_(W, torch.zeros(1, 2), compensation=kept)
        assert torch.equal(W, before[0])
        assert torch.equal(kept, before[1])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@each_mode
@each_dtype
def test_a_weight_without_elements(dtype, mode, shape):
    W = torch.zeros(shape, dtype=dtype)
    add_product_(W, torch.ones(shape[0], 2), torch.ones(2, shape[1]), 1.0, **how(mode, W))
    assert W.shape == shape


def test_float32_with_float64_factors_is_rounded_to_nearest():
    W = normal(4, 5, seed=1)
    U, V = normal(4, 2, seed=2, dtype=torch.float64), normal(2, 5, seed=3, dtype=torch.float64)
    expected = (W.double() + 0.5 * (U @ V)).float()
    add_product_(W, U, V, 0.5, noise=noise_for(W))
    assert torch.equal(W, expected)


@each_dtype
def test_beyond_the_largest_value_nothing_is_cut_off(dtype):
    W = torch.full((1, 1), torch.finfo(dtype).max, dtype=dtype)
    assert not cut_off(W, W.float().nextafter(torch.tensor(torch.inf))).any()


@each_dtype
def test_from_the_value_next_to_a_weight_nothing_was_cut_off(dtype):
    W = torch.tensor([[1.5, -1.5, 2.0**-20, -(2.0**-20)]]).to(dtype)
    for away in (torch.inf, -torch.inf):
        assert not cut_off(W, W.nextafter(torch.full_like(W, away)).float()).any()


@each_dtype
def test_from_a_zero_of_the_other_sign_nothing_was_cut_off(dtype):
    full = torch.tensor([[1e-9, -1e-9]])
    assert not cut_off(torch.tensor([[-0.0, 0.0]], dtype=dtype), full).any()
