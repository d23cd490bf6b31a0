"""The mathematics of the update as properties, over random layouts, shapes and values."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.memory import peak_allocation
from deltaopt import DeltaLoRAOptimizer, LoRATriple
from deltaopt.factor_buffers import factored_delta, factored_delta_
from deltaopt.in_place import InPlaceUpdate, delta_lora_
from deltaopt.rounding.blocks import Scratch
from tests.support import internals, strategies
from tests.support.compare import assert_close


def random64(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def change_factors(stored, seed, scale=1.0):
    """Set the factors to other random values, as an inner step would."""
    with torch.no_grad():
        stored.A.add_(random64(*stored.A.shape, seed=seed), alpha=scale)
        stored.B.add_(random64(*stored.B.shape, seed=seed + 1), alpha=scale)


@contextmanager
def update_of(*weights):
    """Move these weights by what changes their factors within it."""
    rule = InPlaceUpdate()
    rule.before_step(weights, internals.AUTO, None)
    yield
    rule.after_step(weights, internals.AUTO)


def move_once(stored, coef, seed, scale=1.0):
    """Update `stored` once for a change of its factors; return the dense matrices before and after."""
    before = stored.matrices()
    with update_of(internals.weight_of(stored.triple(), coef)):
        change_factors(stored, seed, scale)
    return before, stored.matrices()


@given(strategies.shapes, strategies.seeds, st.sampled_from([(), (2,)]))
def test_the_free_functions_are_equation_6(shape, seed, lead):
    """Need tensors alone: no triple, no optimizer."""
    c, d, r = shape
    W, A, A_new = (random64(*lead, *size, seed=seed + i) for i, size in enumerate(((c, d), (c, r), (c, r))))
    B, B_new = random64(*lead, r, d, seed=seed + 3), random64(*lead, r, d, seed=seed + 4)
    expected = W + 0.7 * (A_new @ B_new - A @ B)
    U, V = torch.cat([A_new, A], dim=-1), torch.cat([B_new, B], dim=-2)
    factored_delta_(U, V)
    assert_close(W + 0.7 * U @ V, expected, 1e-13)
    delta_lora_(W, *factored_delta((A, B), (A_new, B_new)), 0.7)
    assert_close(W, expected, 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_free_function_rounds_a_16_bit_weight_once(dtype):
    W = random64(5, 7, seed=0).to(dtype)
    A, B, A_new, B_new = (random64(*size, seed=i).float() for i, size in enumerate([(5, 3), (3, 7), (5, 3), (3, 7)]))
    exact = W.double() + 0.1 * (A_new.double() @ B_new.double() - A.double() @ B.double())
    delta_lora_(W, *factored_delta((A, B), (A_new, B_new)), 0.1)
    assert torch.equal(W, exact.to(dtype))


@given(strategies.layouts, strategies.seeds, strategies.ratios, strategies.scalings)
def test_factored_delta_is_the_dense_delta(layout, seed, ratio, scaling):
    """Check that [A' - A | A] @ [B' ; B' - B] = A'B' - AB."""
    (W, A, B), (W_new, A_new, B_new) = move_once(strategies.make(layout, seed), ratio * scaling, seed)
    assert_close(W_new - W, ratio * scaling * (A_new @ B_new - A @ B), 1e-13)


@given(strategies.shapes, strategies.seeds)
def test_factored_delta_at_any_shape(shape, seed):
    c, d, r = shape
    stored = strategies.Stored(
        random64(c, d, seed=seed),
        random64(c, r, seed=seed + 1),
        random64(r, d, seed=seed + 2),
        lambda W: W,
        lambda A: A,
        lambda B: B,
        {},
    )
    (W, A, B), (W_new, A_new, B_new) = move_once(stored, 0.5, seed)
    assert_close(W_new - W, 0.5 * (A_new @ B_new - A @ B), 1e-13)


@given(strategies.layouts, strategies.seeds)
def test_a_small_change_of_large_factors_is_not_lost(layout, seed):
    """Keep what is below 1e-7 of the two products, which subtracting them in float32 loses."""
    stored = strategies.make(layout, seed, dtype=torch.float32)
    stored.W.zero_()
    with torch.no_grad():
        stored.A.mul_(100.0)
        stored.B.mul_(100.0)
    (_, A, B), (W_new, A_new, B_new) = move_once(stored, 1.0, seed, scale=1e-3)
    A, B, A_new, B_new = (t.double() for t in (A, B, A_new, B_new))
    exact = A_new @ B_new - A @ B
    factored = float((W_new.double() - exact).norm() / exact.norm())
    subtracted = float(((A_new.float() @ B_new.float() - A.float() @ B.float()).double() - exact).norm() / exact.norm())
    assert factored < 1e-6
    assert factored < subtracted


@given(strategies.layouts, strategies.seeds, strategies.start_steps, strategies.scalings)
def test_telescoping(layout, seed, start_step, scaling):
    """Check that W[t] - W[K] = lambda s (A[t] B[t] - A[K] B[K]), whatever the path."""
    stored = strategies.make(layout, seed)
    optimizer = DeltaLoRAOptimizer(
        torch.optim.SGD, [stored.triple(scaling)], update_ratio=1.5, start_step=start_step, lr=0.1
    )
    frozen, anchor = stored.matrices()[0], None
    for t in range(10):
        if t == start_step:
            anchor = stored.matrices()
        stored.A.grad, stored.B.grad = random64(*stored.A.shape, seed=t), random64(*stored.B.shape, seed=50 + t)
        optimizer.step()
    W, A, B = stored.matrices()
    assert torch.equal(anchor[0], frozen)
    assert_close(W - frozen, 1.5 * scaling * (A @ B - anchor[1] @ anchor[2]), 1e-13)


@given(strategies.seeds, st.integers(0, 3))
def test_rank_of_the_change(seed, start_step):
    """Stay at 2r however many steps, at r from a zero product at step K; grow with a changing ratio."""
    ranks = []
    for ratio, zero in ((1.5, False), (1.5, start_step == 0), (lambda t: 0.2 * t, False)):
        W, A, B = random64(20, 20, seed=seed), random64(20, 2, seed=seed + 1), random64(2, 20, seed=seed + 2)
        A.mul_(0.0 if zero else 1.0).requires_grad_()
        B.requires_grad_()
        frozen = W.clone()
        optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], update_ratio=ratio, start_step=start_step, lr=0.1)
        for t in range(12):
            A.grad, B.grad = random64(20, 2, seed=seed + 3 + t), random64(2, 20, seed=seed + 50 + t)
            optimizer.step()
        ranks.append(int(torch.linalg.matrix_rank(W - frozen, rtol=1e-9)))
    assert ranks[:2] == [4, 2 if start_step == 0 else 4]
    assert ranks[2] > 4


@given(strategies.layouts, strategies.seeds, strategies.ratios)
def test_linear_in_the_coefficient(layout, seed, ratio):
    """Enter update_ratio and scaling as their product, in which the change of W is linear."""
    one, many = strategies.make(layout, seed), strategies.make(layout, seed)
    (W, *_), (W_one, *_) = move_once(one, 1.0, seed)
    _, (W_many, *_) = move_once(many, ratio, seed)
    assert_close(W_many - W, ratio * (W_one - W), 1e-13)


@given(strategies.seeds, st.permutations(range(strategies.R)))
def test_invariant_to_the_order_of_rank_components(seed, order):
    plain, permuted = strategies.make("linear", seed), strategies.make("linear", seed)
    before, after = (plain.matrices(), move_once(plain, 1.0, seed)[1])
    with torch.no_grad():
        permuted.A.copy_(before[1][:, order])
        permuted.B.copy_(before[2][order])
        with update_of(internals.weight_of(permuted.triple(), 1.0)):
            permuted.A.copy_(after[1][:, order])
            permuted.B.copy_(after[2][order])
    assert_close(permuted.W, plain.W, 1e-13)


@given(strategies.seeds)
def test_block_rows_move_as_their_own_triples(seed):
    """Move a fused weight registered in two row blocks as the two weights it holds."""
    whole = strategies.make("linear", seed)
    top, bottom = slice(0, 2), slice(2, strategies.C)
    fused = whole.W.clone()
    parts = [
        LoRATriple(fused, whole.A.detach()[s].clone().requires_grad_(), whole.B, rows=(s.start, s.stop), name=str(i))
        for i, s in enumerate((top, bottom))
    ]
    before = whole.matrices()
    with update_of(*(internals.weight_of(t, 1.0) for t in parts)), torch.no_grad():
        change_factors(whole, seed)
        for part, rows in zip(parts, (top, bottom), strict=True):
            part.A.copy_(whole.A[rows])
    assert_close(fused - before[0], whole.A.detach() @ whole.B.detach() - before[1] @ before[2], 1e-13)


@given(strategies.seeds)
def test_transposition(seed):
    """Give the same update for (W, A, B) and (W^T, B^T, A^T)."""
    stored = strategies.make("linear", seed)
    turned = strategies.Stored(
        stored.W.T.contiguous(),
        stored.B.detach().T.clone(),
        stored.A.detach().T.clone(),
        lambda W: W,
        lambda A: A,
        lambda B: B,
        {},
    )
    with update_of(internals.weight_of(turned.triple(), 0.7)):
        _, (W, A, B) = move_once(stored, 0.7, seed)
        turned.A.copy_(B.T)
        turned.B.copy_(A.T)
    assert_close(turned.W.T, W, 1e-13)


def one_step(inner, seed, lr, **options):
    """Return gradients, matrices before and after, of one step with update_ratio 1, scaling 1 on random gradients."""
    stored = strategies.make("linear", seed)
    stored.A.grad, stored.B.grad = random64(*stored.A.shape, seed=seed + 1), random64(*stored.B.shape, seed=seed + 2)
    gradients = stored.A.grad.clone(), stored.B.grad.clone()
    before = stored.matrices()
    optimizer = DeltaLoRAOptimizer(inner, [stored.triple()], update_ratio=1.0, lr=lr, **options)
    optimizer.step()
    return gradients, before, stored.matrices()


@given(strategies.seeds, st.floats(1e-3, 0.5))
def test_expansion_for_sgd(seed, eta):
    """Check Eq. 5 with the signs worked out: delta = -eta A g_B - eta g_A B + eta^2 g_A g_B, exactly."""
    (g_A, g_B), (W, A, B), (W_new, *_) = one_step(torch.optim.SGD, seed, eta)
    assert_close(W_new - W, -eta * A @ g_B - eta * g_A @ B + eta**2 * g_A @ g_B, 1e-13)


@given(strategies.seeds, st.floats(0.0, 0.5))
def test_expansion_for_adamw(seed, beta):
    """Check A.1 with decoupled weight decay beta: delta = -eta A g_B - eta g_A B - 2 eta beta A B + O(eta^2).

    g_A and g_B are the normalised gradients. The paper leaves out the last term. What remains after these
    terms falls with the square of eta.
    """
    remainders = []
    for eta in (1e-3, 1e-4):
        (g_A, g_B), (W, A, B), (W_new, *_) = one_step(torch.optim.AdamW, seed, eta, weight_decay=beta, eps=1e-12)
        normal_A, normal_B = g_A.sign(), g_B.sign()  # the first step of Adam, eps -> 0
        first_order = -eta * A @ normal_B - eta * normal_A @ B - 2 * eta * beta * A @ B
        remainders.append(float((W_new - W - first_order).norm()))
    assert remainders[0] <= 1e-6 * 200
    assert math.isclose(remainders[0] / remainders[1], 100.0, rel_tol=0.05)


def test_weight_decay_term_is_not_negligible():
    """Leave out the last term of the expansion above: what remains falls only as eta."""
    remainders = []
    for eta in (1e-3, 1e-4):
        (g_A, g_B), (W, A, B), (W_new, *_) = one_step(torch.optim.AdamW, 0, eta, weight_decay=0.3, eps=1e-12)
        remainders.append(float((W_new - W + eta * A @ g_B.sign() + eta * g_A.sign() @ B).norm()))
    assert math.isclose(remainders[0] / remainders[1], 10.0, rel_tol=0.05)


def gradients_of_weight_and_product(seed, drop):
    """Return the gradients by W and by AB of a LoRA layer, with `drop` applied to the input of its branch."""
    stored = strategies.make("linear", seed)
    W, AB = stored.W.requires_grad_(), (stored.A @ stored.B).detach().requires_grad_()
    x, target = random64(strategies.D, 6, seed=seed + 3), random64(strategies.C, 6, seed=seed + 4)
    (W @ x + AB @ drop(x) - target).square().mean().backward()
    return W.grad, AB.grad


@given(strategies.seeds)
def test_gradients_of_weight_and_product_are_equal_without_dropout(seed):
    """Check Eq. 4, the ground on which W may follow A B."""
    for_weight, for_product = gradients_of_weight_and_product(seed, lambda x: x)
    assert_close(for_weight, for_product, 1e-13)


@given(strategies.seeds)
def test_gradients_of_weight_and_product_differ_with_dropout(seed):
    """Check Eq. 7, the reason why dropout in the branch is refused."""
    mask = (random64(strategies.D, 6, seed=seed) > 0).double() * 2
    for_weight, for_product = gradients_of_weight_and_product(seed, lambda x: x * mask)
    assert float((for_weight - for_product).norm() / for_weight.norm()) > 1e-2


def large_layers(dtype, layout="linear", c=1500, d=1200, r=4, count=3, **options):
    """Build `count` layers whose dense delta would stand out in a measurement of memory."""
    triples = []
    for i in range(count):
        W = torch.zeros(*((c, d) if layout == "linear" else (d, c)), dtype=dtype)
        A, B = torch.randn(c, r, requires_grad=True), torch.randn(r, d, requires_grad=True)
        A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
        triples.append(LoRATriple(W, A, B, name=str(i), layout=layout))
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=1e-3, **options)
    optimizer.step()  # buffers are made in the first step that moves W
    return optimizer


def test_the_dense_delta_is_never_allocated():
    for layout in ("linear", "transposed"):
        optimizer = large_layers(torch.float32, layout)
        dense = 1500 * 1200 * 4
        assert peak_allocation(optimizer.step, "cpu") < dense / 20


@pytest.mark.parametrize("layout", ["linear", "transposed"])
@pytest.mark.parametrize(
    ("rounding", "dtype", "buffers"),
    [
        *(("nearest", torch.bfloat16, 1), ("stochastic", torch.bfloat16, 2), ("compensated", torch.bfloat16, 3)),
        *(("nearest", torch.float16, 1), ("stochastic", torch.float16, 3), ("compensated", torch.float16, 4)),
    ],
)
def test_16_bit_weights_are_lifted_in_bounded_blocks(rounding, dtype, buffers, layout, monkeypatch):
    """Take a block in float32 or int32 for each buffer; W itself would be five of them."""
    internals.use_blocks_of(monkeypatch, 1 << 18)
    optimizer = large_layers(dtype, layout, rounding=rounding)
    assert peak_allocation(optimizer.step, "cpu") < 4 * buffers * (1 << 18) + 400_000


def test_the_weights_of_a_step_are_written_in_the_same_blocks(monkeypatch):
    """Reuse memory: fresh pages cost as much as the arithmetic on them."""
    optimizer, blocks = large_layers(torch.bfloat16, rounding="compensated"), {}

    def block(scratch, name, like, dtype, made=Scratch.block):
        found = made(scratch, name, like, dtype)
        blocks.setdefault((name, found.dtype, found.shape), []).append(found.data_ptr())
        return found

    monkeypatch.setattr(Scratch, "block", block)
    optimizer.step()
    assert {(name, dtype) for name, dtype, _ in blocks} == {
        ("sum", torch.float32),
        ("bits", torch.int32),
        ("marks", torch.int32),
    }
    assert all(len(places) >= 3 and len(set(places)) == 1 for places in blocks.values())
    assert len({places[0] for places in blocks.values()}) == 3


def test_a_block_is_of_the_shape_and_dtype_that_is_asked_for():
    scratch = Scratch()
    first = scratch.block("sum", torch.empty(4, 6, dtype=torch.bfloat16), torch.float32)
    assert (first.shape, first.dtype) == ((4, 6), torch.float32)
    for like, dtype, same in ((torch.empty(3, 5), torch.float32, True), (torch.empty(4, 6), torch.float64, False)):
        other = scratch.block("sum", like, dtype)
        assert (other.shape, other.dtype, other.is_contiguous()) == (like.shape, dtype, True)
        assert (other.data_ptr() == first.data_ptr()) is same
    assert scratch.block("sum", torch.empty(7, 6), torch.float32).shape == (7, 6)


def test_buffers_are_kept_from_step_to_step():
    optimizer = large_layers(torch.float32)
    first = internals.buffer_addresses(optimizer)
    optimizer.step()
    assert internals.buffer_addresses(optimizer) == first
    kept, anchor = 1, 1
    assert optimizer.buffer_bytes == (kept + anchor) * 3 * 4 * 4 * (1500 + 1200)


def chunked_steps(patch, elements, dtype=torch.float32, bad=None):
    """Return W of 5 equal layers after 3 steps, in the second of which a factor may become `bad`."""
    internals.use_chunks_of(patch, elements)
    stored = [strategies.make("linear", seed, dtype) for seed in range(5)]
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [s.triple(name=str(i)) for i, s in enumerate(stored)], lr=0.1)
    for t in range(3):
        for i, s in enumerate(stored):
            s.A.grad, s.B.grad = (random64(*f.shape, seed=10 * t + i).to(f) for f in (s.A, s.B))
        if t == 1 and bad is not None:
            stored[3].B.grad[0, 0] = bad
        optimizer.step()
    return [s.W for s in stored], optimizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights_at_a_time", [1, 2])
def test_weights_move_alike_however_many_at_a_time(weights_at_a_time, dtype, monkeypatch):
    whole, _ = chunked_steps(monkeypatch, 1 << 20, dtype)
    stored = strategies.make("linear", 0)
    elements = weights_at_a_time * 2 * (stored.A.numel() + stored.B.numel())
    parts, _ = chunked_steps(monkeypatch, elements, dtype)
    assert all(map(torch.equal, whole, parts))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_factor_in_any_chunk_stops_them_all(bad, monkeypatch):
    """Skip two steps of three for every W: the one in which a factor goes bad, and the one that begins with it."""
    with pytest.warns(RuntimeWarning, match="became NaN or infinite"):
        parts, optimizer = chunked_steps(monkeypatch, 1, bad=bad)
    assert optimizer.skipped_updates == 2
    assert all(W.isfinite().all() for W in parts)


def test_large_factors_are_not_taken_for_infinite_ones(monkeypatch):
    """Look at each number, where their sum is beyond the largest one."""
    internals.use_chunks_of(monkeypatch, 1)
    triples = []
    for i in range(2):
        A, B = torch.full((2, 1), 3e38, requires_grad=True), torch.full((1, 4), 1e-38, requires_grad=True)
        A.grad, B.grad = torch.zeros_like(A), torch.full_like(B, -1e-38)
        triples.append(LoRATriple(torch.zeros(2, 4), A, B, name=str(i)))
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=1.0, update_ratio=1.0)
    optimizer.step()
    assert optimizer.skipped_updates == 0
    torch.testing.assert_close(triples[0].W, torch.full((2, 4), 3.0))
