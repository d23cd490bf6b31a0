"""DeltaLoRAFactory: Trainer's model whenever Trainer makes it, and what is refused by name."""

from typing import Any

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer
from deltaopt.integrations.trainer import DeltaLoRACallback, DeltaLoRAFactory
from tests.support.compare import assert_same_bits, bits, refused, relative, same
from tests.support.models import RATIO, causal_lm, deltas, layers, transformers, weights
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.trainer_runs import OPTIONS, arguments, ours, trainer_of

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]


def assert_moved_from(base: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Every W is the base plus RATIO times PEFT's own delta, which was zero at first."""
    change = deltas(model)
    for name, W in weights(model).items():
        assert float(change[name].norm()) > 1e-3
        assert relative(W - base[name], RATIO * change[name]) < 1e-10


def test_model_init_makes_a_new_model_for_each_run(accelerator_of, tmp_path):
    trainer = trainer_of(arguments(tmp_path), (DeltaLoRAFactory, OPTIONS))
    base = weights(causal_lm(B_zero=True))
    trainer.train()
    first, model = ours(trainer), trainer.model
    assert_moved_from(base, model)
    trained = bits(model)
    trainer.train()
    assert ours(trainer) is not first
    assert trainer.model is not model
    assert ours(trainer).step_count == 3
    assert_same_bits(trainer.model, trained)  # from the pristine base again


def test_training_twice_goes_on_with_the_same_optimizer(accelerator_of, tmp_path):
    model = causal_lm(B_zero=True)
    base = weights(model)
    trainer = trainer_of(arguments(tmp_path), (DeltaLoRAFactory, OPTIONS), model)
    trainer.train()
    first = ours(trainer)
    trainer.train()
    assert ours(trainer) is first
    assert first.step_count == 6
    assert_moved_from(base, model)


def test_a_smaller_batch_after_a_lack_of_memory(accelerator_of, tmp_path):
    """auto_find_batch_size begins again with the A and B, and so with the W, of the attempt that failed."""
    model = causal_lm(B_zero=True)
    base = weights(model)
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 4}
    trainer = trainer_of(arguments(tmp_path, **settings), (DeltaLoRAFactory, OPTIONS), model)
    compute_loss, sizes = trainer.compute_loss, []

    def runs_out(model: nn.Module, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if len(sizes) == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return compute_loss(model, inputs, **options)

    trainer.compute_loss = runs_out
    trainer.train()
    assert sizes[:3] == [4, 4, 4]
    assert all(size < 4 for size in sizes[3:])
    assert ours(trainer).step_count == 2 + 3
    assert_moved_from(base, model)


def test_each_trial_of_a_search_begins_with_a_pristine_w(accelerator_of, tmp_path):
    """The learning rate is that of the trial, and update_ratio may be searched too."""
    optuna = pytest.importorskip("optuna", reason="runs where optuna is installed")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    base, seen = weights(causal_lm(B_zero=True)), []
    args = arguments(tmp_path, save_strategy="steps", save_steps=3)
    options = {"inner": torch.optim.AdamW, "args": args, "update_ratio": RATIO}

    class Look(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            optimizer = getattr(optimizer, "optimizer", optimizer)
            pristine = all(torch.equal(W, base[name]) for name, W in weights(model).items())
            seen.append((pristine, optimizer.param_groups[0]["lr"], optimizer.groups[0].update_ratio))

    settings = [(1e-3, 1.0), (1e-2, 2.0)]

    def space(trial):
        learning_rate, options["update_ratio"] = settings[trial.suggest_categorical("number", [0, 1])]
        return {"learning_rate": learning_rate}

    trainer = trainer_of(args, (DeltaLoRAFactory, options), callbacks=[Look()])
    trainer.add_callback(DeltaLoRACallback())
    trainer.hyperparameter_search(
        hp_space=space,
        n_trials=2,
        compute_objective=lambda metrics: metrics["eval_loss"],
        direction="minimize",
        backend="optuna",
        sampler=optuna.samplers.GridSampler({"number": [0, 1]}, seed=0),
    )
    assert sorted(seen) == [(True, *each) for each in settings]
    exports = [tmp_path / f"run-{trial}" / "checkpoint-3" / "export" / "adapter_model.safetensors" for trial in (0, 1)]
    assert all(file.is_file() for file in exports)


def test_the_arguments_give_what_the_options_do_not(tmp_path):
    args = arguments(tmp_path, learning_rate=3e-3, weight_decay=0.25)
    optimizer = DeltaLoRAFactory()(causal_lm(), inner=torch.optim.AdamW, args=args)
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(3e-3, 0.25)}
    optimizer = DeltaLoRAFactory()(causal_lm(), inner=torch.optim.Rprop, args=args, lr=1e-1)  # has no weight decay
    assert optimizer.param_groups[0]["lr"] == 1e-1


def test_adamw_is_the_default_as_trainers_is():
    assert type(DeltaLoRAFactory()(causal_lm(), lr=1e-2).inner) is torch.optim.AdamW


def test_it_has_no_empty_groups_and_trains_what_else_requires_grad():
    model = causal_lm()
    norm = model.base_model.model.model.norm.weight.requires_grad_()
    optimizer = DeltaLoRAFactory()(model, **OPTIONS, weight_decay=0.1)
    assert all(group["params"] for group in optimizer.param_groups)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert any(p is norm for p in trained)
    assert len(trained) == 2 * len(layers(model)) + 1


WRONG = {
    "no class": (
        {"inner": "adamw", "lr": 1e-2},
        r"`inner` is 'adamw', expected the class.*\"inner\": torch.optim.AdamW",
    ),
    "unknown": (
        {**OPTIONS, "updte_ratio": 1.0, "momentun": 0.9},
        r"neither DeltaLoRAOptimizer nor AdamW takes updte_ratio, momentun \(did you mean update_ratio\?\)\. They ",
    ),
    "triples": ({**OPTIONS, "triples": []}, "nor AdamW takes triples"),
    "no lr": ({"inner": torch.optim.SGD}, r"the learning rate of SGD is missing.* add \"lr\": 2e-4, or \"args\": args"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused_by_name_before_anything_changes(case):
    options, match = WRONG[case]
    model = causal_lm()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    refused(lambda: DeltaLoRAFactory()(model, **options), TypeError, match, lambda: bits(model))
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_model_without_lora_is_refused_by_name():
    with pytest.raises(ValueError, match=r"(?s)in this LlamaForCausalLM: .*unload\(\)"):
        DeltaLoRAFactory()(causal_lm().unload(), **OPTIONS)


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (
            (DeltaLoRAOptimizer, {"inner": torch.optim.AdamW, "lr": 1e-2}),
            "the first argument is an optimizer class .* got a list",
        ),
        ((DeltaLoRAOptimizer, {"lr": 1e-2}), "the first argument is an optimizer class .* got a list"),
        ((DeltaLoRAOptimizer.for_model, OPTIONS), r"for_model\(model, inner, ...\): model and inner missing"),
    ],
    ids=["class", "class without inner", "for_model"],
)
def test_what_is_no_factory_is_refused_with_the_factorys_name(optimizer, match, accelerator_of, tmp_path):
    model = causal_lm()
    trainer = trainer_of(arguments(tmp_path), optimizer, model)
    before = bits(model)
    with pytest.raises(TypeError, match=rf"(?s){match}.*optimizer_cls_and_kwargs take \(deltaopt.*DeltaLoRAFactory"):
        trainer.train()
    assert same(bits(model), before)
    trainer_of(arguments(tmp_path), (DeltaLoRAFactory, OPTIONS), model).train()  # as the message says
    moved = [not same(W, before[name]) for name, W in bits(model).items() if "base_layer" in name]
    assert moved
    assert all(moved)


def test_a_factory_that_was_made_already_is_refused_with_what_to_write(accelerator_of, tmp_path):
    trainer = trainer_of(arguments(tmp_path), (DeltaLoRAFactory(), OPTIONS), causal_lm())
    with pytest.raises(TypeError, match=r"made already\. Give it the class: .*=\(DeltaLoRAFactory, "):
        trainer.train()
