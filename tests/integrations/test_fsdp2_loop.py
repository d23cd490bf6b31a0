"""What a training loop does with the optimizer of a model under `fully_shard`, in two processes."""

import copy
import pickle

import pytest
import torch
from torch.optim import lr_scheduler

from tests.support.distributed import WORLD, on_all_ranks
from tests.support.sharded_runs import ShardedRun, whole

pytestmark = pytest.mark.extra

each_rule = pytest.mark.parametrize("rule", ["in_place", "folded"])


@each_rule
def test_a_step_that_the_scaler_leaves_out_on_one_rank_is_left_out_on_all(rule):
    """An overflow in one rank's part of a gradient, which torch reports to all ranks of the shards."""
    on_all_ranks(scaled_on_rank, rule)


def scaled_on_rank(rank: int, rule: str) -> None:
    run = ShardedRun(rank)
    optimizer = run.new_optimizer(run.model, weight_update=rule, start_step=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10)
    for t in range(4):
        optimizer.zero_grad()
        scaler.scale((run.model(run.batch(t).chunk(WORLD)[rank]) - 1).square().mean()).backward()
        if t == 2 and rank == 1:
            run.factors(run.model)[0].grad.to_local()[0, 0] = torch.inf
        before = [whole(p) for p in run.model.parameters()]  # A, B, W of each layer
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(old, whole(p)) for old, p in zip(before, run.model.parameters(), strict=True)]
        assert same == ([True] * len(same) if t == 2 else [False, False, rule == "folded" and t > 0] * 3)
        assert scaler.get_scale() == 2.0 ** (8 if t < 2 else 7)
    assert optimizer.step_count == 3


def test_gradients_that_are_summed_over_batches_before_they_are_reduced():
    on_all_ranks(accumulated_on_rank)


def accumulated_on_rank(rank: int) -> None:
    run, other = ShardedRun(rank, "bfloat16"), ShardedRun(rank, "bfloat16")
    for t in range(6):
        run.model.set_requires_gradient_sync(t % 2 == 1)
        for each in (run, other):
            ((each.model(each.batch(t).chunk(WORLD)[rank]) - 1).square().mean() / 2).backward()
        if t % 2:
            for each in (run, other):
                norm = torch.nn.utils.clip_grad_norm_(each.factors(each.model), 0.05)
                assert norm.full_tensor() > 0.05
                each.optimizer.step()
                each.follow()
                each.optimizer.zero_grad(set_to_none=t == 1)
            assert all(p.grad is None or not whole(p.grad).any() for p in run.factors(run.model))
    run.assert_follows()
    run.assert_moved()
    # One reduced gradient of two batches is the sum of two reduced ones, up to the order of the sums.
    for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(whole(p), whole(q), rtol=2.0**-7, atol=1e-5)


def test_a_schedule_sets_the_learning_rate_of_the_sharded_factors():
    on_all_ranks(scheduled_on_rank)


def scheduled_on_rank(rank: int) -> None:
    run, resting = ShardedRun(rank), ShardedRun(rank)
    scheduler = lr_scheduler.StepLR(run.optimizer, step_size=2, gamma=0.0)
    for _ in range(2):
        run.train()
        scheduler.step()
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.0]
    resting.train(2)
    run.train(2)  # a learning rate of 0: neither A, B nor W change
    run.assert_follows()
    for p, q in zip(run.model.parameters(), resting.model.parameters(), strict=True):
        assert torch.equal(whole(p), whole(q))


def test_the_layers_of_fsdp2_can_be_neither_copied_nor_pickled():
    """By torch, so that the optimizer, which holds them, cannot be either. Its state_dict can."""
    on_all_ranks(copied_on_rank)


def copied_on_rank(rank: int) -> None:
    run = ShardedRun(rank)
    for each in (run.model, run.optimizer):
        with pytest.raises(AssertionError, match="FSDP does not support deepcopy"):
            copy.deepcopy(each)
        with pytest.raises((pickle.PicklingError, AttributeError), match="pickle"):
            pickle.dumps(each)
    run.train(2)
    copied = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.load_state_dict(copied)
    run.train(2).assert_follows()
