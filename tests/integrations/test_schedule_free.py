"""Schedule-free inside: train() and eval() reach it by hand, through Accelerate and through Trainer, and W follows."""

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer
from tests.integrations.test_trainer import trainer_for, wrapped
from tests.support.compare import bits, relative
from tests.support.models import batches, causal_lm, deltas, loss_of, transformers, weights
from tests.support.peft_runs import RATIO, assert_models_follow, assert_telescoped, peft_asks_by_an_old_name

schedulefree = pytest.importorskip("schedulefree", reason="runs where schedulefree is installed")

pytestmark = [peft_asks_by_an_old_name, pytest.mark.extra]


def schedule_free_run(rule="in_place"):
    model = causal_lm(torch.float64)
    return model, DeltaLoRAOptimizer.for_model(
        model, schedulefree.AdamWScheduleFree, lr=2e-2, update_ratio=RATIO, weight_update=rule
    )


def train(model, optimizer, data):
    for ids in data:
        optimizer.train()
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()


def test_W_belongs_to_the_factors_in_both_modes():
    model, optimizer = schedule_free_run()
    start, first = weights(model), deltas(model)
    train(model, optimizer, batches(4))
    training = deltas(model)
    assert_telescoped(model, start, first)
    optimizer.eval()
    name = next(iter(training))
    assert relative(deltas(model)[name], training[name]) > 1e-3
    assert_telescoped(model, start, first)
    with pytest.raises(Exception, match="not in train mode"):
        optimizer.step()
    train(model, optimizer, batches(2))
    assert_telescoped(model, start, first)


def test_the_rules_agree_in_both_modes():
    runs = {rule: schedule_free_run(rule) for rule in ("folded", "in_place")}
    for model, optimizer in runs.values():
        train(model, optimizer, batches(3))
    for mode in ("eval", "train"):
        for _, optimizer in runs.values():
            getattr(optimizer, mode)()
        assert_models_follow(runs["folded"][0], runs["in_place"][0])


def test_accelerate_reaches_it(accelerator_of):
    accelerator = accelerator_of()
    model, plain = schedule_free_run()
    start, first = weights(model), deltas(model)
    model, optimizer = accelerator.prepare(model, plain)
    train(model, optimizer, batches(3))
    optimizer.eval()
    assert not plain.param_groups[0]["train_mode"]
    assert_telescoped(model, start, first)
    optimizer.train()
    assert plain.param_groups[0]["train_mode"]
    assert_telescoped(model, start, first)


class Telescoped(transformers.TrainerCallback):
    """Checks W wherever Trainer calls back."""

    def __init__(self, model):
        self.start, self.first, self.modes = weights(model), deltas(model), []

    def look(self, args, state, control, model=None, optimizer=None, **options):
        self.modes.append(optimizer.param_groups[0]["train_mode"])
        if state.global_step:
            assert_telescoped(model, self.start, self.first)

    on_step_end = on_evaluate = on_save = on_train_end = look


def test_trainer_evaluates_saves_and_resumes(accelerator_of, tmp_path):
    def trainer_in(folder):
        model = causal_lm(torch.float64)
        trainer, _ = trainer_for(
            model, folder, arguments={"eval_strategy": "steps", "eval_steps": 3, "warmup_steps": 0}
        )
        trainer.optimizer = DeltaLoRAOptimizer.for_model(
            model, schedulefree.AdamWScheduleFree, lr=2e-2, update_ratio=RATIO
        )
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1.0)
        watching = Telescoped(model)
        trainer.add_callback(watching)
        return trainer, watching

    trainer, watching = trainer_in(tmp_path / "whole")
    trainer.train()
    assert {True, False} <= set(watching.modes)
    resumed, _ = trainer_in(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for run in (trainer, resumed):
        wrapped(run).eval()
    end = bits(trainer.model)
    for name, parameter in resumed.model.named_parameters():
        assert relative(parameter, end[name]) <= 1e-8, name


def test_trainer_with_another_inner_optimizer_evaluates(accelerator_of, tmp_path):
    """It calls `eval` and `train` of every optimizer that has them."""
    model = causal_lm(torch.float64)
    trainer, _ = trainer_for(model, tmp_path, arguments={"max_steps": 2, "save_strategy": "no"})
    trainer.train()
    before = bits(model)
    trainer.evaluate()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
