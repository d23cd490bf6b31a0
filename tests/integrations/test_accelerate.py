"""Accelerate: prepare() loads the optimizer's own state, accumulation and clipping follow, load_state() resumes."""

import pytest
from torch.optim import lr_scheduler

from tests.support.compare import assert_same_bits, bits, same
from tests.support.models import batches, causal_lm, loss_of, optimizer_for, plain_loop, weights
from tests.support.nightly import one_in
from tests.support.peft_runs import (
    DATA,
    STARTS,
    STOP,
    ModelRun,
    assert_models_follow,
    assert_same_models,
    assert_same_runs,
    begun,
    branch_scalings,
    each_kind,
    effective,
    fresh,
    peft_asks_by_an_old_name,
)
from tests.support.strategies import RULES, each_rule

pytestmark = peft_asks_by_an_old_name


def test_prepare_keeps_the_param_groups_linked(accelerator_of):
    """`prepare` calls load_state_dict, after which a wrapper that keeps its own lists is cut off."""
    model = causal_lm()
    inner_optimizer = optimizer_for(model)
    scheduler = lr_scheduler.LambdaLR(inner_optimizer, lambda step: 1.0)
    model, optimizer, scheduler = accelerator_of().prepare(model, inner_optimizer, scheduler)
    assert optimizer.optimizer is inner_optimizer
    assert optimizer.optimizer.param_groups is optimizer.optimizer.inner.param_groups
    assert optimizer.optimizer.state is optimizer.optimizer.inner.state
    assert optimizer.param_groups is inner_optimizer.inner.param_groups


@each_rule
def test_a_schedule_that_reaches_zero_stops_training(rule, accelerator_of):
    """From then on no parameter changes, and no effective weight."""
    accelerator = accelerator_of()
    model = causal_lm()
    optimizer = optimizer_for(model, weight_update=rule)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    moved, moved_effectively = [], []
    for ids in batches(4):
        before, before_effectively = bits(model), effective(model)
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, ids))
        optimizer.step()
        scheduler.step()
        moved.append({name for name, p in model.named_parameters() if not same(p.detach(), before[name])})
        now = effective(model)
        moved_effectively.append({name for name in now if not same(now[name], before_effectively[name])})
    count = len(optimizer.optimizer.triples)
    # The folded rule writes W in the first step alone, from which the product is taken.
    assert [len(names) for names in moved] == [3 * count, (3 if rule == "in_place" else 2) * count, 0, 0]
    assert [len(names) for names in moved_effectively] == [count, count, 0, 0]
    assert optimizer.optimizer.inner.param_groups[0]["lr"] == 0
    assert optimizer.optimizer.step_count == 4


@pytest.mark.parametrize(("clips", "start", "rule"), one_in(2, [False, True], STARTS, RULES))
def test_accumulation_equals_the_plain_loop_bit_for_bit(clips, start, rule, accelerator_of):
    """With a scheduler, and gradients that are clipped or not; a folded run follows the plain one in place."""
    data, begin = batches(14), STARTS[start]["start_step"]

    def schedule(step: int) -> float:
        return 1 / (1 + step)

    def plain_run(rule: str) -> ModelRun:
        run = ModelRun(rule, start)
        scheduler = lr_scheduler.LambdaLR(run.optimizer, schedule)
        for i, ids in enumerate(data):
            run.backward(ids, 0.5)
            if i % 2:
                if clips:
                    run.clip()
                run.optimizer.step()
                scheduler.step()
                run.optimizer.zero_grad()
        return run

    accelerator, run = accelerator_of(gradient_accumulation_steps=2), ModelRun(rule, start)
    W_start = weights(run.model)
    scheduler = lr_scheduler.LambdaLR(run.optimizer, schedule)
    model, optimizer, scheduler = accelerator.prepare(run.model, run.optimizer, scheduler)
    for i, ids in enumerate(data):
        W, before = weights(model), (bits(model), branch_scalings(model))
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, ids))
            if clips and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        steps = (i + 1) // 2
        assert run.optimizer.step_count == steps
        assert i % 2 or same((bits(model), branch_scalings(model)), before)
        if rule == "in_place":
            moves = i % 2 == 1 and steps > begin
        else:
            moves = i % 2 == 1 and steps == begin + 1 and start == "later"
        assert all(same(new, W[name]) != moves for name, new in weights(model).items()), i

    written = [not same(W, W_start[name]) for name, W in weights(model).items()]
    assert written == [rule == "in_place" or start == "later"] * len(written)
    assert_same_models(model, plain_run(rule).model)
    if rule == "folded":
        assert_models_follow(model, plain_run("in_place").model)


@pytest.mark.parametrize(("stop", "start", "rule"), one_in(2, [2, 5], STARTS, RULES))
def test_load_state_resumes_bit_for_bit(stop, start, rule, accelerator_of, tmp_path):
    """A full checkpoint holds the moved W: from before K and from after it, in fresh objects and in the same ones."""
    data, accelerator = batches(8), accelerator_of()

    def prepared():
        run = ModelRun(rule, start)
        return run, accelerator.prepare(run.model, run.optimizer)

    run, objects = prepared()
    plain_loop(*objects, data[:stop])
    accelerator.save_state(tmp_path)
    plain_loop(*objects, data[stop:])
    if rule == "folded":
        assert_models_follow(run.model, ModelRun("in_place", start).train(data).model)
    else:
        assert_same_bits(run.model, bits(ModelRun("in_place", start).train(data).model))

    accelerator.free_memory()
    other, objects = prepared()
    for _ in range(2):  # the second time the same objects return, maybe to before K
        accelerator.load_state(tmp_path)
        assert other.optimizer.step_count == stop
        plain_loop(*objects, data[stop:])
        assert_same_models(other.model, run.model)


@each_kind
def test_load_state_resumes_what_rounds_and_has_other_settings(dtype, rounding, accelerator_of, tmp_path):
    """`prepare` of the fresh objects loads the optimizer's own state, then `load_state` the saved one."""

    def prepared(accelerator, run):
        run.scheduler = lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (1 + step))
        run.model, optimizer, run.scheduler = accelerator.prepare(run.model, run.optimizer, run.scheduler)

        def train(data):
            for ids in data:
                optimizer.zero_grad()
                accelerator.backward(loss_of(run.model, ids))
                optimizer.step()
                run.scheduler.step()

        return train

    run, other, accelerator = begun(dtype, rounding=rounding), fresh(dtype, rounding=rounding), accelerator_of()
    train = prepared(accelerator, run)
    train(DATA[:STOP])
    accelerator.save_state(tmp_path)
    train(DATA[STOP:])

    accelerator = accelerator_of()
    train_other = prepared(accelerator, other)
    accelerator.load_state(tmp_path)
    assert other.optimizer.step_count == STOP
    train_other(DATA[STOP:])
    assert_same_runs(run, other)
