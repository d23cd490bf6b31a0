"""restart, rebase and resync: the account of W goes on, begins anew, or W follows A and B."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.behaviour.test_export import effective
from tests.support import strategies
from tests.unit.test_ledger import Run, S, close


@given(layout=strategies.layouts, seed=strategies.seeds, steps=st.integers(0, 3), start_step=st.integers(0, 4))
def test_a_restart_keeps_the_effective_weight(layout, seed, steps, start_step):
    run = Run(layout, seed, start_step=start_step)
    for _ in range(steps):
        run.step()
    before = effective(run)
    run.happen("restart")
    assert close(effective(run), before)
    _, _, B = run.stored.matrices()
    if layout == "embedding":  # PEFT starts these the other way round
        assert not B.any()
        assert run.stored.A.all()
    else:
        assert not run.stored.A.any()
        assert 0 < float(B.abs().max()) <= B.shape[-1] ** -0.5


def test_it_clears_gradients_and_inner_state_of_the_factors_and_of_nothing_else():
    stored, head = strategies.make("linear"), torch.zeros(3, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [stored.triple()], [head], lr=0.1)
    for p in (stored.A, stored.B, head):
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.restart()
    assert list(optimizer.state) == [head]
    assert stored.A.grad is None
    assert stored.B.grad is None
    assert head.grad is not None
    assert optimizer.step_count == 1
    assert optimizer.accounts()[0].ledger.end is None
    stored.A.grad, stored.B.grad = torch.ones_like(stored.A), torch.ones_like(stored.B)
    optimizer.step()
    assert float(optimizer.state[stored.A]["step"]) == 1


def test_a_generator_repeats_it_and_the_global_one_is_left_alone():
    runs = [Run() for _ in range(2)]
    for run in runs:
        before = torch.get_rng_state()
        run.optimizer.restart(generator=torch.Generator().manual_seed(7))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0].stored.B, runs[1].stored.B)
    runs[1].optimizer.restart()
    assert not torch.equal(runs[0].stored.B, runs[1].stored.B)


def test_a_start_of_ones_own():
    seen = []

    def reinit(triple):
        seen.append(triple.name)
        nn.init.zeros_(triple.B)
        nn.init.ones_(triple.A)

    run = Run()
    run.step()
    before = effective(run)
    run.optimizer.restart(reinit)
    assert seen == ["q"]
    assert bool((run.stored.A == 1).all())
    assert close(effective(run), before)
    run.asked = run.moved()
    run.step()
    assert close(run.displacement(), run.asked)


def test_a_reinit_that_fails_leaves_everything_as_it_was():
    def reinit(triple):
        triple.B.zero_()
        raise ZeroDivisionError

    run = Run()
    run.step()
    before, moments = [t.detach().clone() for t in (run.stored.W, run.stored.A, run.stored.B)], len(run.optimizer.state)
    with pytest.raises(ZeroDivisionError):
        run.optimizer.restart(reinit)
    assert all(map(torch.equal, before, (run.stored.W, run.stored.A, run.stored.B)))
    assert len(run.optimizer.state) == moments == 2
    run.step()
    assert close(run.displacement(), run.moved())


def test_the_history_of_lbfgs_is_cleared_wherever_it_is_kept():
    stored, head = strategies.make("linear"), torch.zeros(3, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.LBFGS([head, stored.A, stored.B]), [stored.triple()])

    def closure():
        optimizer.zero_grad()
        loss = (stored.A @ stored.B - 1).square().sum() + (head - 1).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.state[head]["old_dirs"]
    optimizer.restart()
    assert len(optimizer.state) == 0


def test_restarts_that_use_up_the_ledger_say_so_at_once():
    """Each restart adds the rank of the factors; at a rank of c d / (c + d) the terms would be as large as W."""
    W, A, B = torch.randn(300, 300), torch.randn(300, 40, requires_grad=True), torch.randn(40, 300, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=0.1)

    def start(triple):
        triple.A.normal_()
        triple.B.normal_()

    for _ in range(4):
        optimizer.restart(start)
    with pytest.warns(RuntimeWarning, match="so many restarts.*rank passed 80") as caught:
        optimizer.restart(start)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_reinit_that_leaves_a_product_is_accounted_for():
    """The effective weight jumps, as documented; W and its ledger still agree."""
    run = Run()
    run.step()
    run.optimizer.restart(lambda triple: None)
    for _ in range(2):
        run.step()
    assert close(run.displacement(), run.moved())


@pytest.mark.parametrize("action", ["restart", "resync"])
def test_a_factor_that_is_not_finite_is_refused(action):
    run = Run()
    run.step()
    with torch.no_grad():
        run.stored.B[1, 2] = torch.inf
    before = [t.detach().clone() for t in (run.stored.W, run.stored.A)]
    with pytest.raises(ValueError, match="a factor of q is NaN or infinite"):
        getattr(run.optimizer, action)()
    assert all(map(torch.equal, before, (run.stored.W, run.stored.A)))


@pytest.mark.parametrize("action", ["restart", "resync"])
def test_a_merged_branch_is_refused(action):
    layer = nn.Linear(7, 5, bias=False).requires_grad_(False)
    layer.A, layer.B = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3, 7))
    optimizer = DeltaLoRAOptimizer(
        torch.optim.SGD, [LoRATriple((layer, "weight"), (layer, "A"), (layer, "B"), name="q")], lr=0.1
    )
    layer.merged, W = True, layer.weight.clone()
    with pytest.raises(RuntimeError, match="q: the branch is merged into W"):
        getattr(optimizer, action)()
    assert torch.equal(layer.weight, W)


def test_rebase_takes_the_present_weight_as_the_base():
    run = Run(keep_base="cpu")
    run.step()
    run.stored.W.mul_(run.stored.W.abs() > 0.5)  # pruned by hand
    run.optimizer.rebase()
    assert run.optimizer.displacement("q").rank == 0
    run.W0, run.asked = run.stored.W.clone(), torch.zeros_like(run.asked)
    for _ in range(3):
        run.step()
    assert close(run.displacement(), run.asked)
    assert close(run.moved(), run.asked)
    with run.optimizer.base_weights():
        assert torch.equal(run.stored.W, run.W0)


@given(layout=strategies.layouts, seed=strategies.seeds, start_step=st.integers(0, 3))
def test_resync_moves_W_to_where_it_was_with_these_factors(layout, seed, start_step):
    """As after load_best_model_at_end: A and B of an earlier step come back, W should too."""
    run = Run(layout, seed, start_step=start_step)
    for _ in range(start_step + 2):
        run.step()
    best = effective(run), [t.detach().clone() for t in (run.stored.A, run.stored.B)]
    for _ in range(3):
        run.step()
    for factor, kept in zip((run.stored.A, run.stored.B), best[1], strict=True):
        factor.data.copy_(kept)
    run.optimizer.resync()
    assert close(effective(run), best[0])
    assert close(run.displacement(), run.moved())
    W = run.stored.W.clone()
    run.optimizer.resync()  # nothing is left to move
    assert torch.equal(run.stored.W, W)
    run.asked = run.moved()
    run.happen("outside")
    assert close(run.displacement(), run.asked)
    run.step()
    assert close(run.displacement(), run.asked)


def test_without_resync_an_outside_change_moves_nothing():
    run = Run()
    run.step()
    W = run.stored.W.clone()
    run.happen("outside")
    assert torch.equal(run.stored.W, W)
    assert close(run.displacement(), run.moved())


def test_resync_leaves_a_W_alone_that_does_not_follow_now():
    run = Run()
    run.step()
    for _ in range(2):
        run.happen("off")
    run.optimizer.groups[0].update_ratio = 0.0
    W = run.stored.W.clone()
    run.optimizer.resync()
    assert torch.equal(run.stored.W, W)


def test_resync_of_16_bits_warns_or_takes_the_kept_base():
    """Rounding has left W elsewhere than many small moves asked for; one large move back is not rounded away."""
    for options in ({}, {"keep_base": "cpu"}):
        run = Run(dtype=torch.bfloat16, lr=1e-3, **options)
        for _ in range(2):
            run.step()
        factors = [t.detach().clone() for t in (run.stored.A, run.stored.B)]
        for _ in range(2):
            run.step()
        for factor, kept in zip((run.stored.A, run.stored.B), factors, strict=True):
            factor.data.copy_(kept)
        if options:
            run.optimizer.resync()
            dense = run.W0.double() + run.displacement()
            assert close(run.stored.W.double(), dense, torch.finfo(torch.bfloat16).eps)
        else:
            with pytest.warns(RuntimeWarning, match=r"the 16-bit W of 1 layers \(q, ..\) was moved back at once"):
                run.optimizer.resync()
        assert close(run.displacement(), 1.5 * S * (run.product() - run.start), 1e-5)


def test_resync_before_the_first_move_does_nothing():
    run = Run(start_step=3)
    run.step()
    run.happen("outside")
    run.optimizer.resync()
    assert torch.equal(run.stored.W, run.W0)
    assert not run.optimizer.accounts()[0].ledger.moved


def test_resync_to_an_adapter_of_another_rank():
    run = Run()
    run.step()
    product = S * 1.5 * run.product()
    run.stored.A.data, run.stored.B.data = torch.ones(5, 2, dtype=torch.float64), torch.ones(2, 7, dtype=torch.float64)
    W = run.moved()
    run.optimizer.resync()
    assert close(run.moved(), W + S * 1.5 * run.product() - product)
    assert close(run.displacement(), run.moved())
