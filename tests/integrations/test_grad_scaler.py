"""torch.amp.GradScaler: the step sees unscaled gradients, and a step with infinite ones is left out."""

import pytest
import torch
from torch import nn

from tests.support.compare import bits, same
from tests.support.models import batches, causal_lm, deltas, loss_of, optimizer_for, plain_loop, weights
from tests.support.peft_runs import (
    STARTS,
    ModelRun,
    assert_models_follow,
    assert_telescoped,
    both_rules,
    branch_scalings,
    each_start,
    effective,
    peft_asks_by_an_old_name,
)
from tests.support.strategies import each_rule

pytestmark = peft_asks_by_an_old_name

each_implementation = pytest.mark.parametrize("fused", [False, True])


def new_scaler(**options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**12, **options)


def assert_equal_to_rounding(model: nn.Module, plain: nn.Module) -> None:
    expected = bits(plain)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert branch_scalings(model) == branch_scalings(plain)


@each_rule
@each_implementation
def test_the_step_sees_unscaled_gradients(fused, rule):
    """A fused AdamW takes the scale from the object it is; a wrapper that said so too would step on scaled ones."""
    model, plain = causal_lm(torch.float32), causal_lm(torch.float32)
    # with its usual tiny eps Adam would not notice the scale
    optimizer, plain_optimizer = (optimizer_for(m, fused=fused, eps=1e-2, weight_update=rule) for m in (model, plain))
    W0, delta0 = weights(model), deltas(model)
    scaler = new_scaler()
    for ids in batches(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, ids)).backward()
        scaler.step(optimizer)
        scaler.update()
    plain_loop(plain, plain_optimizer, batches(3))
    assert optimizer.step_count == 3
    assert_equal_to_rounding(model, plain)
    if rule == "in_place":
        assert_telescoped(model, W0, delta0, atol=1e-6)


@each_rule
@each_implementation
def test_a_step_with_infinite_gradients_is_left_out(fused, rule):
    model = causal_lm(torch.float32)
    optimizer = optimizer_for(model, fused=fused, weight_update=rule)
    scaler = new_scaler()
    for i, (factor, skipped) in enumerate(((1.0, False), (float("inf"), True), (1.0, False))):
        before, count, scale = (bits(model), branch_scalings(model)), optimizer.step_count, scaler.get_scale()
        W, W_effective = weights(model), effective(model)
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batches(1)[0]) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if skipped else scale)
        assert optimizer.step_count == (count if skipped else count + 1)
        if skipped:
            assert same((bits(model), branch_scalings(model)), before)
        else:
            written = rule == "in_place" or i == 0  # the folded rule takes the first product from W
            assert all(same(now, W[name]) != written for name, now in weights(model).items())
            assert not any(same(now, W_effective[name]) for name, now in effective(model).items())
    assert optimizer.skipped_updates == 0


@each_rule
def test_explicit_unscaling_and_clipping(rule):
    """`unscale_` and `step` must be given the same optimizer: the gradients are divided once."""
    model, plain = causal_lm(torch.float32), causal_lm(torch.float32)
    optimizer, plain_optimizer = (optimizer_for(m, torch.optim.SGD, lr=0.1, weight_update=rule) for m in (model, plain))
    scaler = new_scaler()
    ids = batches(1)[0]
    scaler.scale(loss_of(model, ids)).backward()
    loss_of(plain, ids).backward()
    scaler.unscale_(optimizer)
    norms = [nn.utils.clip_grad_norm_([p for p in m.parameters() if p.requires_grad], 0.1) for m in (model, plain)]
    torch.testing.assert_close(*norms)
    scaler.step(optimizer)
    plain_optimizer.step()
    assert_equal_to_rounding(model, plain)


@each_start
@pytest.mark.parametrize("unscale", [False, True])
def test_a_folded_run_follows_the_one_in_place_where_steps_are_left_out(start, unscale):
    """At K, right after it and later; a step that is left out folds nothing."""
    begin = STARTS[start]["start_step"]

    def train(run: ModelRun) -> list[float]:
        scaler, applied, scales = new_scaler(growth_interval=2), 0, []
        for i, ids in enumerate(batches(10)):
            factor = float("inf") if i in (begin, begin + 2, begin + 5) else 1.0
            before = bits(run.model), run.scalings()
            scaler.scale(loss_of(run.model, ids) * factor).backward()
            if unscale:
                scaler.unscale_(run.optimizer)
                run.clip()
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
            applied += factor == 1.0
            assert run.optimizer.step_count == applied
            assert (factor == 1.0) or same((bits(run.model), run.scalings()), before)
            scales.append(scaler.get_scale())
        return scales

    folded, in_place = both_rules(train, start, inner=torch.optim.SGD, lr=0.05)
    assert_models_follow(folded.model, in_place.model)
