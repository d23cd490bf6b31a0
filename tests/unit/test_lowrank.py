"""Sums of low-rank products: joining and compressing, against the dense matrix and its SVD."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaopt.lowrank import LowRank, Term, change_of, joined
from tests.support import strategies
from tests.support.compare import relative


def random_terms(ranks, shape=(9, 6), lead=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    c, d = shape

    def new(*size):
        return torch.randn(*lead, *size, generator=generator, dtype=torch.float64)

    return [Term(1.5 - i, new(c, r), new(r, d)) for i, r in enumerate(ranks)]


def dense_sum(some):
    return sum(t.coef * t.A @ t.B for t in some)


@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    lead=st.sampled_from([(), (3,)]),
    seed=strategies.seeds,
)
def test_joined_terms_multiply_to_their_sum(ranks, lead, seed):
    some = random_terms(ranks, lead=lead, seed=seed)
    whole = joined(some)
    assert whole.rank == sum(ranks)
    assert torch.allclose(whole.product(), dense_sum(some), atol=1e-12)
    exact = whole.compressed()
    assert exact.rank == min(sum(ranks), 6)
    assert exact.error == 0.0
    assert torch.allclose(exact.product(), dense_sum(some), atol=1e-12)


@given(rank=st.integers(1, 8), lead=st.sampled_from([(), (3,)]), seed=strategies.seeds)
def test_compression_is_the_best_one_and_says_its_error(rank, lead, seed):
    some = random_terms([3, 4], lead=lead, seed=seed)
    found, matrix = joined(some).compressed(rank), dense_sum(some)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    best = U[..., :rank] @ torch.diag_embed(S[..., :rank]) @ Vh[..., :rank, :]
    assert found.rank <= rank
    assert torch.allclose(found.product(), best, atol=1e-10)
    assert found.error == pytest.approx(float((matrix - best).norm() / matrix.norm()), abs=1e-10)


def test_both_factors_get_an_equal_share_of_the_size():
    found = joined(random_terms([3])).compressed()
    assert torch.allclose(found.A.mT @ found.A, found.B @ found.B.mT, atol=1e-12)


def test_terms_that_cancel_leave_a_small_rank():
    a, b = random_terms([4, 2])
    found = joined([a, b, a._replace(coef=-a.coef)]).compressed()
    assert found.rank == 2
    assert torch.allclose(found.product(), dense_sum([b]), atol=1e-12)


def test_factors_of_very_different_sizes_keep_their_product():
    """Keep what is of size one, though a huge column of A meets a tiny row of B."""
    A, B = torch.randn(9, 2), torch.randn(2, 6)
    scaled = LowRank(A * torch.tensor([1e8, 1.0]), B * torch.tensor([[1e-8], [1.0]])).compressed()
    assert scaled.rank == 2
    assert torch.allclose(scaled.product(), A @ B, atol=1e-5)


def test_the_zero_matrix():
    nothing = LowRank(torch.zeros(4, 3), torch.ones(3, 5)).compressed(2)
    assert (nothing.rank, nothing.error) == (1, 0.0)
    assert torch.equal(nothing.product(), torch.zeros(4, 5))
    empty = LowRank(torch.zeros(4, 0), torch.zeros(0, 5))
    assert torch.equal(empty.product(), torch.zeros(4, 5))
    assert torch.equal(empty.compressed().product(), torch.zeros(4, 5))


def test_float32_factors_stay_float32_and_lose_no_more_than_rounding():
    some = [Term(t.coef, t.A.float(), t.B.float()) for t in random_terms([4, 4], shape=(80, 60))]
    found = joined(some).compressed()
    assert (found.A.dtype, found.B.dtype, found.rank) == (torch.float32, torch.float32, 8)
    whole = dense_sum([Term(t.coef, t.A.double(), t.B.double()) for t in some])
    assert float((found.product() - whole).norm() / whole.norm()) < 1e-6


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_a_sum_has_an_identity_on_its_shorter_side(shape, lead):
    some = random_terms([5, 7], shape, lead)
    found = joined(some).summed()
    assert (found.rank, found.error) == (6, 0.0)
    assert torch.allclose(found.product(), dense_sum(some), atol=1e-12)
    identity = found.B if shape[1] <= shape[0] else found.A
    assert torch.equal(identity, torch.eye(6, dtype=torch.float64).expand(*lead, 6, 6))


@given(lead=st.sampled_from([(), (3,)]), seed=strategies.seeds, coef=st.sampled_from([2.0, -0.7]))
def test_the_change_of_a_product_loses_nothing_by_cancellation_in_float32(lead, seed, coef):
    """The two products are 10^6 times as large as their difference, which float32 alone would lose."""
    A, B, A_step, B_step = (t for term in random_terms([4, 4], lead=lead, seed=seed) for t in term[1:])
    before = Term(-coef, A.float(), B.float())
    after = Term(coef, (A + 1e-6 * A_step).float(), (B + 1e-6 * B_step).float())
    expected = dense_sum([term.to(A.device, torch.float64) for term in (before, after)])
    found = change_of([before, after])
    assert found.A.dtype == torch.float32
    assert relative(found.A.double() @ found.B.double(), expected) < 1e-4


def test_a_single_term_is_its_own_change_and_other_sums_are_none():
    one, other, third = random_terms([2, 2, 2])
    assert torch.allclose(change_of([one]).product(), dense_sum([one]))
    wider = random_terms([3])[0]
    assert change_of([]) is change_of([one, other]) is change_of([one, other, third]) is None
    assert change_of([one._replace(coef=-wider.coef), wider]) is None
