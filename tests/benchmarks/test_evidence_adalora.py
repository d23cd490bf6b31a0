"""AdaLoRA in the evidence's loop against PEFT's own model: its loss, its budget and what is masked."""

import itertools

import peft
import pytest
import torch

from benchmarks.evidence.adalora import AdaLora
from benchmarks.evidence.methods import prepare
from tests.support.evidence_runs import NAMES, WIDTH, Run, batch_of, setting_of, tiny_model


def values_of(model):
    return {name: model.get_submodule(name).lora_E["default"].detach().clone() for name in NAMES}


def test_the_run_ends_with_the_target_budget():
    run, ranks = Run(setting_of("adalora", steps=40, rank=8, lr=2e-2)), []
    run.train(watch=lambda step: ranks.append(sum(int(E.count_nonzero()) for E in values_of(run.model).values())))
    assert set(ranks[:4]) == {len(NAMES) * 8}  # tinit
    assert set(ranks[20:]) == {len(NAMES) * 6}  # tfinal
    assert all(later <= earlier for earlier, later in itertools.pairwise(ranks))
    assert sum(change.numerical_rank for change in run.prepared.changes()) == len(NAMES) * 6


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_loss_and_the_masks_are_those_of_pefts_model():
    """The same run by PEFT's model alone, which adds its term itself, and masks from its own lists."""
    setting = setting_of("adalora", steps=20, rank=4, lr=2e-2, clip=None, warmup=0.0)
    run = Run(setting)
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS", init_r=4, target_r=3, tinit=2, tfinal=10, total_step=20, lora_alpha=8, target_modules=NAMES
    )
    other = peft.get_peft_model(tiny_model(), config)
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    twins = {}
    for name, p in other.named_parameters():
        if p.requires_grad:
            twins[name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")] = p
    assert trained.keys() == twins.keys()
    with torch.no_grad():
        for name, p in trained.items():
            twins[name].copy_(p)
    optimizer = torch.optim.AdamW(twins.values(), lr=setting.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, run.share)
    for step in range(20):
        run.train(step, step + 1)
        inputs, labels = batch_of(step % 4)
        other(**inputs, labels=labels).loss.backward()
        optimizer.step()
        other.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        schedule.step()
        for name, p in trained.items():
            assert torch.allclose(p, twins[name], rtol=1e-4, atol=1e-6), (step, name)
    assert any(not E.all() for E in values_of(run.model).values())


def test_the_orthogonality_term_is_computed_in_float32():
    prepared = prepare(setting_of("adalora"), tiny_model())
    expected = prepared.extra_loss()
    with torch.autocast("cpu", torch.bfloat16):
        found = prepared.extra_loss()
    assert torch.equal(found, expected)


def test_the_start_is_of_the_seed():
    models = [tiny_model() for _ in range(3)]
    for seed, model in zip((1, 1, 2), models, strict=True):
        prepare(setting_of("adalora", seed=seed), model)
    same, again, other = (model.get_submodule(NAMES[0]) for model in models)
    assert torch.equal(same.lora_A["default"], again.lora_A["default"])
    assert not torch.equal(same.lora_A["default"], other.lora_A["default"])
    assert not same.lora_E["default"].any()
    assert same.lora_B["default"].shape == (WIDTH, 4)
    assert 0.015 < torch.cat([same.lora_A["default"].flatten(), same.lora_B["default"].flatten()]).std() < 0.025


def test_rank_1_has_no_budget_to_give_away():
    with pytest.raises(ValueError, match=r"cell: AdaLoRA .* rank=2 at least, got 1"):
        AdaLora(setting_of("adalora", row="cell", rank=1), tiny_model())


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_short_run_has_a_schedule(steps):
    run = Run(setting_of("adalora", steps=steps)).train()
    assert len(run.losses) == steps
