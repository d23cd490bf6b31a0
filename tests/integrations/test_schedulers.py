"""torch's schedulers act on the inner optimizer through the wrapper, and W follows the factors."""

import copy

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from deltaopt import DeltaLoRAOptimizer, find_triples
from tests.support.compare import assert_same_bits, bits, relative, same
from tests.support.models import batches, causal_lm, deltas, optimizer_for, plain_loop, weights
from tests.support.peft_runs import (
    EXACT,
    K,
    ModelRun,
    assert_models_follow,
    assert_telescoped,
    both_rules,
    each_start,
    peft_asks_by_an_old_name,
)
from tests.support.strategies import each_rule

pytestmark = peft_asks_by_an_old_name

SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.2, anneal_epochs=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
}
each_schedule = pytest.mark.parametrize("name", SCHEDULES)


def advance(name: str, scheduler) -> None:
    scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])


@each_schedule
@each_rule
def test_schedulers_reach_the_inner_optimizer(name, rule):
    """Each schedule on the wrapper gives the factors and the learning rates it gives on the bare inner optimizer."""
    model, plain = causal_lm(), causal_lm()
    options = {"lr": 0.05, "momentum": 0.9}
    # update_ratio 0: the factors of both models then see the same W
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, update_ratio=0.0, weight_update=rule, **options)
    bare = torch.optim.SGD([p for t in find_triples(plain) for p in (t.A, t.B)], **options)
    runs = []
    for m, o, inner in ((model, optimizer, optimizer.inner), (plain, bare, bare)):
        scheduler, lrs = SCHEDULES[name](o), []
        for ids in batches(6):
            plain_loop(m, o, [ids])
            advance(name, scheduler)
            lrs.append((inner.param_groups[0]["lr"], inner.param_groups[0]["momentum"]))
        runs.append(lrs)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 1
    assert_same_bits(model, bits(plain))


@each_schedule
def test_w_follows_the_factors_under_every_schedule(name):
    model = causal_lm()
    optimizer = optimizer_for(model, torch.optim.AdamW)
    W0, delta0 = weights(model), deltas(model)
    scheduler = SCHEDULES[name](optimizer)
    for ids in batches(5):
        plain_loop(model, optimizer, [ids])
        advance(name, scheduler)
    assert_telescoped(model, W0, delta0)


@each_schedule
@each_start
def test_a_folded_run_follows_the_one_in_place_under_every_schedule(name, start):
    def train(run: ModelRun) -> list[float]:
        scheduler, lrs = SCHEDULES[name](run.optimizer), []
        for ids in batches(6):
            run.train([ids])
            advance(name, scheduler)
            lrs.append(run.optimizer.inner.param_groups[0]["lr"])
        return lrs

    folded, in_place = both_rules(train, start, inner=torch.optim.SGD, lr=0.05, momentum=0.9)
    assert_models_follow(folded.model, in_place.model)


@each_rule
@each_start
def test_a_schedule_that_reaches_zero_stops_the_effective_weights(rule, start):
    """Bit for bit, but where the folded rule takes the product of step K from W."""
    run = ModelRun(rule, start)
    scheduler = lr_scheduler.LambdaLR(run.optimizer, lambda step: float(step < 2))
    ends = []
    for ids in batches(K + 2):
        run.train([ids])
        scheduler.step()
        ends.append(run.effective())
    assert not same(ends[0], ends[1])
    assert same(ends[1], ends[2])
    if (rule, start) == ("folded", "later"):
        assert all(relative(W, ends[1][name]) <= EXACT for name, W in ends[-1].items())
    else:
        assert same(ends[1], ends[-1])


@each_rule
def test_a_scheduler_still_acts_after_the_optimizer_was_loaded(rule):
    """load_state_dict rebinds the lists of a plain Optimizer; the scheduler that was built before still acts."""
    run = ModelRun(rule, "later", start_step=0)
    scheduler = lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.0 if step else 1.0)
    run.train(batches(1))
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    scheduler.step()
    assert run.optimizer.inner.param_groups[0]["lr"] == 0.0
    before, scalings = bits(run.model), run.scalings()
    run.train(batches(2))
    assert_same_bits(run.model, before)
    assert run.scalings() == scalings
