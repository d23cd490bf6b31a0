"""Restarts of the factors within a run: when, with which learning rate, and that the model stays the same."""

import pytest
import torch

from benchmarks.evidence.methods import prepare
from tests.support.evidence_runs import NAMES, Run, effective_weights, setting_of, tiny_model


@pytest.mark.parametrize("method", ["restarts", "delta-restarts"])
def test_the_factors_begin_afresh_after_each_quarter_but_the_last(method):
    run, products = Run(setting_of(method, steps=20)), []
    layer = run.model.get_submodule(NAMES[1])
    run.train(watch=lambda step: products.append(bool(layer.lora_B["default"].weight.any())))
    assert [step + 1 for step, any_product in enumerate(products) if not any_product] == [5, 10, 15]
    assert {change.numerical_rank for change in run.prepared.changes()} == {16}


def test_the_new_start_is_of_the_seed_and_of_the_step():
    starts = set()
    for seed in (0, 1):
        run = Run(setting_of("restarts", seed=seed, steps=20))
        layer = run.model.get_submodule(NAMES[1])

        def note(step, B=layer.lora_A["default"].weight):
            if step + 1 in (5, 10, 15):
                starts.add(tuple(B.flatten().tolist()))

        run.train(watch=note)
    assert len(starts) == 6


def test_a_restart_keeps_the_effective_weights_and_clears_the_state_of_the_factors_alone():
    run = Run(setting_of("delta-restarts", steps=20)).train(stop=4)
    run.prepared.before_step(4)
    run.backward(4)
    run.optimizer.step()
    before, held = effective_weights(run.model), len(run.optimizer.state)
    run.prepared.after_step(4)
    for name, W in effective_weights(run.model).items():
        assert torch.allclose(W, before[name], rtol=0, atol=1e-5)
    assert held == 2 * len(NAMES) + 2
    assert len(run.optimizer.state) == 2  # the head's


def test_the_learning_rate_rises_again_after_a_restart():
    setting = setting_of("restarts", steps=40, warmup=0.2)  # 8 steps of the run, 2 of a quarter
    run, rates = Run(setting), []
    run.train(watch=lambda step: rates.append(run.optimizer.param_groups[0]["lr"] / setting.lr))
    factors = {10: 1 / 3, 11: 2 / 3, 20: 1 / 3, 21: 2 / 3, 30: 1 / 3, 31: 2 / 3}
    assert rates == pytest.approx([run.share(step) * factors.get(step, 1.0) for step in range(40)])


def test_a_run_too_short_for_quarters_restarts_where_it_can():
    run = Run(setting_of("restarts", steps=2)).train()
    assert len(run.losses) == 2
    prepared = prepare(setting_of("restarts", steps=1), tiny_model())
    prepared.before_step(0)
    prepared.after_step(0)
