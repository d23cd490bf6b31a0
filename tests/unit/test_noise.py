"""The noise of stochastic rounding is uniform, independent where it matters, and a function of what names it."""

import itertools

import pytest
import torch

from deltaopt.rounding.noise import EVENTS, Keys, label_hashes, noise_factors

CUT = 16
GOLDEN_KEYS = Keys(66041136, 122831992)
GOLDEN_FACTORS = [688246821, -350146335, 699351089, -228583039]


def noise_of(c, d, seed=0, event="move", step=0, label="q"):
    """Return the upper bits of R C as the fraction of a spacing, (c, d) float64 in [0, 1)."""
    R, C = noise_factors(Keys.of(seed, event, step), label_hashes([label], ())[0], c, d)
    assert R.dtype == C.dtype == torch.int32
    assert bool((R & 1).all())
    assert bool((C & 1).all())
    return (((R * C) >> CUT) & 0xFFFF).double() / 2**16


def independent_noise(c, d, seed):
    return torch.rand(c, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums_of_rows_and_columns(c, d, seed):
    """Return noise that is as cheap, and pairwise independent too; but see below."""
    generator = torch.Generator().manual_seed(seed)
    R, C = torch.rand(c, 1, generator=generator), torch.rand(1, d, generator=generator)
    return ((R + C) % 1.0).double()


def test_it_is_uniform():
    """Count 64 bins of 2^22 numbers: a noise whose low bits alone vary, or that repeats, is off by hundreds."""
    u = noise_of(2048, 2048)
    counts = torch.histc(u.float(), bins=64, min=0, max=1).double()
    expected = u.numel() / 64
    assert float(((counts - expected).square() / expected).sum()) < 63 + 5 * (2 * 63) ** 0.5


def test_each_element_is_uniform_over_the_steps():
    samples = torch.stack([noise_of(4, 5, step=step) for step in range(4000)])
    assert bool(((samples.mean(0) - 0.5).abs() < 4.5 * (1 / 12 / 4000) ** 0.5).all())
    assert bool((((samples < 0.01).double().mean(0) - 0.01).abs() < 4.5 * (0.01 * 0.99 / 4000) ** 0.5).all())


def test_two_elements_are_independent():
    """Correlate no pair of events "rounds up": in one row, in one column and across."""
    up = torch.stack([noise_of(3, 3, step=step) < 0.3 for step in range(4000)]).double().flatten(1)
    centred = (up - up.mean(0)) / up.std(0)
    correlations = (centred.T @ centred / 4000)[~torch.eye(9, dtype=torch.bool)]
    assert float(correlations.abs().max()) < 4.5 / 4000**0.5


@pytest.mark.parametrize("fraction", ["constant", "rank one", "rows", "random"])
def test_its_errors_do_not_line_up(fraction):
    """Compare the spectral norm of the rounding errors with that of independent noise, whatever is rounded.

    For noise of the form R_i + C_j, pairwise independent as well, it is several times as large: an error of low rank.
    """
    n = 512
    generator = torch.Generator().manual_seed(1)
    row, column = torch.rand(n, 1, generator=generator), torch.rand(1, n, generator=generator)
    f = {
        "constant": torch.full((n, n), 0.3),
        "rank one": 0.1 + 0.8 * row * column,
        "rows": row.expand(n, n),
        "random": torch.rand(n, n, generator=generator),
    }[fraction].double()

    def norm(u):
        errors = (u < f).double() - f
        return float(torch.linalg.matrix_norm(errors, 2) / errors.square().mean().sqrt())

    usual = max(norm(independent_noise(n, n, seed)) for seed in range(3))
    assert max(norm(noise_of(n, n, seed=seed)) for seed in range(3)) < 1.05 * usual
    assert min(norm(sums_of_rows_and_columns(n, n, seed)) for seed in range(3)) > 2.5 * usual


def test_it_is_a_function_of_seed_event_step_and_label():
    settings = [
        {},
        *({"seed": seed} for seed in (1, -1, 2**32, 2**40 + 1)),
        *({"event": event} for event in EVENTS if event != "move"),
        *({"step": step} for step in (1, 2, 10**6)),
        *({"label": label} for label in ("k", "q.", "")),
    ]
    made = [noise_of(7, 6, **setting) for setting in settings]
    again = [noise_of(7, 6, **setting) for setting in settings]
    assert all(map(torch.equal, made, again))
    for a, b in itertools.combinations(made, 2):
        assert float((a == b).double().mean()) < 0.1


@pytest.mark.parametrize("seed", [0x9E3779B9, 0x9E3779B9 << 32])
def test_no_seed_has_the_noise_of_another_one_transposed(seed):
    """Take up the seed in both keys differently: else the difference of their constants would exchange them."""
    rows, columns = Keys.of(0, "move", 0)
    assert Keys.of(seed, "move", 0) != (columns, rows)
    assert not {rows, columns} & set(Keys.of(seed, "move", 0))


def test_matrices_of_a_stack_have_noise_of_their_own():
    R, C = noise_factors(Keys.of(0, "move", 0), label_hashes(["experts", "others"], (3,)), 4, 5)
    assert R.shape == (2, 3, 4, 1)
    assert C.shape == (2, 3, 1, 5)
    assert len(set(R.flatten().tolist())) == R.numel()


@pytest.mark.parametrize("rows", [(0, 7), (2, 3), (5, 7), (4, 4)])
@pytest.mark.parametrize("columns", [(0, 5), (1, 2), (3, 5), (5, 5)])
def test_a_block_has_the_block_of_the_noise(rows, columns):
    keys, hashes = Keys.of(0, "move", 0), label_hashes(["experts", "others"], (3,))
    R, C = noise_factors(keys, hashes, 7, 5)
    (r0, r1), (c0, c1) = rows, columns
    R_block, C_block = noise_factors(keys, hashes, r1 - r0, c1 - c0, first_row=r0, first_column=c0)
    assert torch.equal(R_block, R[..., r0:r1, :])
    assert torch.equal(C_block, C[..., c0:c1])


def test_it_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    noise_of(5, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_stays_the_same_in_later_versions():
    """Keep the noise that a resumed run started with."""
    assert Keys.of(2**33 + 5, "restart", 12) == GOLDEN_KEYS
    R, C = noise_factors(GOLDEN_KEYS, label_hashes(["layer0.q"], ())[0], 2, 2)
    assert R.flatten().tolist() + C.flatten().tolist() == GOLDEN_FACTORS


def test_unknown_events_are_refused():
    with pytest.raises(ValueError, match="not in tuple"):
        Keys.of(0, "merge", 0)


def test_each_time_in_a_step_has_keys_of_its_own():
    made = [Keys.of(0, event, 3, repeat) for event in EVENTS for repeat in range(4)]
    assert len(set(made)) == len(made)
