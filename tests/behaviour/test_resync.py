"""resync: W follows factors that were put there from outside, as after load_best_model_at_end."""

import pytest
import torch
from hypothesis import given

from tests.support import internals, strategies
from tests.support.compare import close
from tests.support.histories import random_run
from tests.support.runs import LayerRun, noisy_run
from tests.support.strategies import RULES


@torch.no_grad()
def put_back(run: LayerRun, factors: list[torch.Tensor]) -> None:
    """Copy earlier factors into the run, as a Trainer does that loads its best adapter."""
    for factor, kept in zip(run.factors, factors, strict=True):
        factor.copy_(kept)


@given(rule=strategies.rules, layout=strategies.layouts, seed=strategies.seeds, start_step=strategies.start_steps)
def test_moves_W_to_where_it_was_with_these_factors(rule, layout, seed, start_step):
    run = random_run(rule, layout, seed, start_step=start_step).train(start_step + 2)
    effective, factors = run.effective_exactly(), [t.detach().clone() for t in run.factors]
    run.train(3)
    put_back(run, factors)
    run.optimizer.resync()
    assert close(run.effective_exactly(), effective, 1e-11)
    assert close(run.displacement(), run.moved(), 1e-11)
    W = run.stored.W.clone()
    run.optimizer.resync()  # nothing is left to move
    assert torch.equal(run.stored.W, W)


@given(layout=strategies.layouts, seed=strategies.seeds)
def test_outside_changes_after_it_are_told_apart(layout, seed):
    run = noisy_run(layout, seed).train(3)
    run.stored.A.data.mul_(0.5)
    run.optimizer.resync()
    run.asked = run.moved()
    run.happen("outside")
    assert close(run.displacement(), run.asked)
    run.train(1)
    assert close(run.displacement(), run.asked)


def test_without_it_an_outside_change_moves_nothing():
    run = noisy_run().train(1)
    W = run.stored.W.clone()
    run.happen("outside")
    assert torch.equal(run.stored.W, W)
    assert close(run.displacement(), run.moved())


def test_the_folded_rule_needs_none():
    """Follow changed factors by the branch at once, to the weights that the in-place rule has after resync."""
    in_place, folded = (LayerRun(rule).train(8) for rule in RULES)
    factors = [t.detach().clone() for t in folded.factors]
    for run in (in_place, folded):
        run.train(5)
        put_back(run, factors)
    assert not close(in_place.effective_exactly(), folded.effective_exactly(), 1e-4)
    in_place.optimizer.resync()
    assert close(in_place.effective_exactly(), folded.effective_exactly(), 1e-10)
    before = [t.clone() for t in (*folded.tensors, folded.scale)]
    folded.optimizer.resync()
    assert all(map(torch.equal, before, (*folded.tensors, folded.scale)))


def test_leaves_a_W_alone_that_does_not_follow_now():
    run = noisy_run().train(1)
    for _ in range(2):
        run.happen("off")
    run.optimizer.groups[0].update_ratio = 0.0
    W = run.stored.W.clone()
    run.optimizer.resync()
    assert torch.equal(run.stored.W, W)


@pytest.mark.parametrize("options", [{}, {"keep_base": "cpu"}], ids=["warns", "takes the kept base"])
def test_of_16_bits_warns_or_takes_the_kept_base(options):
    """Move back at once what many small moves, each rounded, have left elsewhere."""
    run = noisy_run(dtype=torch.bfloat16, lr=1e-3, **options).train(2)
    factors = [t.detach().clone() for t in run.factors]
    run.train(2)
    put_back(run, factors)
    if options:
        run.optimizer.resync()
        dense = run.W0.double() + run.displacement()
        assert close(run.stored.W.double(), dense, torch.finfo(torch.bfloat16).eps)
    else:
        with pytest.warns(RuntimeWarning, match=r"16-bit weights of 1 layer \(q\) in one rounded step"):
            run.optimizer.resync()
    assert close(run.displacement(), 1.5 * run.scaling * (run.product() - run.start), 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_before_the_first_move_does_nothing(rule):
    run = random_run(rule, start_step=3).train(1)
    run.stored.A.data.mul_(1.25)
    run.optimizer.resync()
    assert torch.equal(run.stored.W, run.W0)
    assert float(run.scale) == run.scaling
    assert not internals.has_moved(run.optimizer)


def test_to_an_adapter_of_another_rank():
    run = noisy_run().train(1)
    product = run.product()
    run.stored.A.data, run.stored.B.data = torch.ones(5, 2, dtype=torch.float64), torch.ones(2, 7, dtype=torch.float64)
    W = run.moved()
    run.optimizer.resync()
    assert close(run.moved(), W + 1.5 * run.scaling * (run.product() - product))
    assert close(run.displacement(), run.moved())
