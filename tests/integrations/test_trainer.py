"""transformers' Trainer: both ways to give it the optimizer, its checkpoints of the adapter alone, its best model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, WeightMismatchError
from tests.support.compare import assert_same_bits, bits, refused, relative, same
from tests.support.models import Rows, batches, causal_lm, deltas, layers, optimizer_for, peft, transformers, weights
from tests.support.nightly import one_in
from tests.support.peft_layers import config_in
from tests.support.peft_runs import (
    EXACT,
    RATIO,
    REBUILT,
    STARTS,
    ModelRun,
    assert_models_close,
    assert_models_follow,
    assert_same_models,
    assert_telescoped,
    branch_scalings,
    effective,
    peft_asks_by_an_old_name,
)
from tests.support.strategies import RULES, each_rule

pytestmark = peft_asks_by_an_old_name

STEPS = 8
PRECISION = {"in_place": (torch.float32, REBUILT), "folded": (torch.float64, EXACT)}
"""Of a resumed run: the in-place rule rebuilds W from its ledger, the folded one has nothing to rebuild."""


class OptimizerFactory:
    """No Optimizer class, hence called as `OptimizerFactory()(model, **options)`, with the adapters loaded already."""

    def __call__(self, model: nn.Module, **options: Any) -> DeltaLoRAOptimizer:
        return DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, **options)


ROUTES = {
    "optimizers": lambda model, options: {"optimizers": (optimizer_for(model, **options), None)},
    "factory": lambda model, options: {
        "optimizer_cls_and_kwargs": (OptimizerFactory, {"lr": 1e-2, "update_ratio": RATIO, **options})
    },
}
each_route = pytest.mark.parametrize("route", ROUTES)


class Notes(transformers.TrainerCallback):
    """A Trainer's run: each batch, each step's learning rate, the deltas and the effective weights after it."""

    def __init__(self, trainer: transformers.Trainer) -> None:
        self.trainer, self.compute_loss = trainer, trainer.compute_loss
        self.batches: list[tuple[Tensor, Any]] = []
        self.lrs: list[float] = []
        self.deltas: dict[int, dict[str, Tensor]] = {}
        self.effective: dict[int, dict[str, Tensor]] = {}
        trainer.compute_loss = self.listening
        trainer.add_callback(self)

    def listening(self, model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
        self.batches.append((inputs["input_ids"].clone(), options.get("num_items_in_batch")))
        return self.compute_loss(model, inputs, **options)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.lrs.append(wrapped(self.trainer).inner.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.deltas[state.global_step] = deltas(model)
        self.effective[state.global_step] = effective(model)


def wrapped(trainer: transformers.Trainer) -> DeltaLoRAOptimizer:
    """The optimizer that accelerate has wrapped by the time of the first step."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def trainer_for(
    model: nn.Module, folder: Path, route: str = "optimizers", arguments: dict[str, Any] | None = None, **options: Any
) -> tuple[transformers.Trainer, Notes]:
    """Build a Trainer of `model` that saves at steps 3 and 6 of 8; `options` are the optimizer's."""
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "steps",
        "save_steps": 3,
        "disable_tqdm": True,
        **(arguments or {}),
    }
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Rows(9),
        eval_dataset=Rows(2),
        **ROUTES[route](model, options),
    )
    return trainer, Notes(trainer)


@pytest.fixture
def trainer_of(accelerator_of, tmp_path):
    """Makes Trainers of a fresh model with either rule; accelerate's global state is forgotten before and after."""

    def build(
        name: str = "run",
        rule: str = "in_place",
        start: str = "later",
        route: str = "optimizers",
        dtype: torch.dtype = torch.float64,
        **arguments: Any,
    ) -> tuple[transformers.Trainer, Notes]:
        options = {**STARTS[start], "weight_update": rule}
        model = causal_lm(dtype, options.pop("B_zero"))
        return trainer_for(model, tmp_path / name, route, arguments, **options)

    return build


@each_route
def test_w_moves_by_the_telescoped_delta(route, accelerator_of, tmp_path):
    """With warm-up, accumulation, and a schedule that reaches the inner optimizer.

    A factory that is no Optimizer is called as `cls()(model, **kwargs)`: it gets the model, with its adapters.
    """
    model = causal_lm()
    W0 = weights(model)
    trainer, notes = trainer_for(model, tmp_path, route, start_step=2)
    trainer.train()
    assert wrapped(trainer).step_count == trainer.state.global_step == STEPS
    assert notes.lrs == pytest.approx([0, 0.005, *(0.01 * (8 - step) / 6 for step in range(2, 8))])
    assert_telescoped(trainer.model, W0, notes.deltas[2])


def test_the_optimizer_of_a_checkpoint_loads_safely(accelerator_of, tmp_path):
    """With weights_only=True, into an optimizer with other settings."""
    model = causal_lm()
    trainer, _ = trainer_for(model, tmp_path, start_step=2)
    trainer.train()
    saved = torch.load(tmp_path / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    other = causal_lm()
    other.load_state_dict(model.state_dict())
    optimizer = optimizer_for(other, start_step=5)
    optimizer.load_state_dict(saved)
    assert optimizer.step_count == STEPS
    assert optimizer.groups[0].start_step == 2
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    assert len(moments) == 2 * len(layers(model))
    for old, new in zip(moments, optimizer.state.values(), strict=True):
        assert torch.equal(old, new["exp_avg"])


@pytest.mark.parametrize(("rule", "start"), one_in(2, RULES, ["later", "zero"]))
def test_trainer_equals_the_plain_loop_bit_for_bit(rule, start, trainer_of):
    """Train on the same batches by hand, with the schedule's learning rates."""
    trainer, notes = trainer_of(rule=rule, start=start)
    trainer.train()

    plain = ModelRun(rule, start)
    plain.model.train()
    for i, (ids, items) in enumerate(notes.batches):
        plain.model(input_ids=ids, labels=ids, num_items_in_batch=items).loss.backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
            plain.optimizer.param_groups[0]["lr"] = notes.lrs[i // 2]
            plain.step()
    assert len(notes.batches) == 2 * STEPS
    assert_same_models(trainer.model, plain.model)


@pytest.mark.parametrize(("route", "start", "rule"), one_in(2, ROUTES, STARTS, RULES))
def test_trainer_resumes_from_the_base_and_the_adapter(route, start, rule, trainer_of, tmp_path):
    """From either checkpoint, from one twice, and from the checkpoint of a run that was itself resumed.

    K lies between the checkpoints where it is not 0. A folded run ends as the one in place does.
    """
    dtype, tolerance = PRECISION[rule]

    def ran(name: str, resume_from: str | None = None, rule: str = rule) -> tuple[nn.Module, list[Tensor]]:
        trainer, notes = trainer_of(name, rule, start, route, dtype)
        trainer.train(resume_from_checkpoint=resume_from)
        assert wrapped(trainer).step_count == trainer.state.global_step == STEPS
        return trainer.model, [ids for ids, _ in notes.batches]

    def assert_ends_alike(resumed: nn.Module) -> None:
        if rule == "folded":
            assert_models_follow(resumed, in_place, tolerance)
        assert_models_close(whole, resumed, tolerance)

    whole, seen = ran("whole")
    in_place, _ = ran("in_place", rule="in_place") if rule == "folded" else (whole, seen)
    middle, late = (str(tmp_path / "whole" / f"checkpoint-{step}") for step in (3, 6))
    assert not any((Path(folder) / "model.safetensors").exists() for folder in (middle, late))
    resumed, seen_then = ran("resumed", middle)
    assert len(seen) == 2 * STEPS
    assert same(seen[6:], seen_then)
    assert_ends_alike(resumed)
    assert_same_bits(ran("again", middle)[0], bits(resumed))
    assert_ends_alike(ran("late", late)[0])
    assert_ends_alike(ran("chain", str(tmp_path / "resumed" / "checkpoint-6"))[0])


def test_a_second_resume_of_one_model_is_refused(accelerator_of, tmp_path):
    """W is then what the first run left it at, neither the base nor what was saved: it takes a fresh model."""
    model = causal_lm(torch.float32)
    trainer, _ = trainer_for(model, tmp_path, start_step=2)
    trainer.train()
    refused(
        lambda: trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")),
        WeightMismatchError,
        r"W has other contents .* not what it was before its first move",
        lambda: weights(model),
    )


BEST_OF_EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}


@pytest.mark.parametrize(
    ("route", "rule", "start"),
    one_in(2, ROUTES, [("in_place", "later"), ("in_place", "zero"), ("folded", "zero")]),
)
def test_load_best_model_at_end_gives_the_best_step(route, rule, start, trainer_of):
    """With the in-place rule after resync(): Trainer has put the best step's A and B next to the last step's W.

    The folded rule needs no resync().
    """
    dtype, tolerance = PRECISION[rule]
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", **BEST_OF_EACH_STEP}
    trainer, notes = trainer_of("run", rule, start, route, dtype, **best)
    trainer.compute_metrics = lambda predictions: {"score": -abs(trainer.state.global_step - 5)}
    trainer.train()
    assert trainer.state.best_global_step == 5
    expected, last = notes.effective[5], notes.effective[STEPS]
    loaded = effective(trainer.model)
    needed = [relative(W, expected[name]) > 1000 * tolerance for name, W in loaded.items()]
    assert needed == [rule == "in_place"] * len(loaded)
    wrapped(trainer).resync()
    now = effective(trainer.model)
    assert all(relative(W, expected[name]) <= tolerance for name, W in now.items())
    assert all(relative(W, last[name]) > 1000 * tolerance for name, W in now.items())
    if rule == "folded":
        assert same(now, loaded)
    wrapped(trainer).resync()
    assert same(effective(trainer.model), now)


@each_rule
def test_an_adapter_that_is_saved_without_the_optimizer_warns(rule, trainer_of, tmp_path):
    """Checkpoints to resume from hold optimizer.pt, and with it the movement of W; the final adapter does not.

    The folded rule has moved W where the product was not zero at step K.
    """
    trainer, _ = trainer_of(rule=rule, start="later")
    trainer.train()  # writes checkpoints, and a warning would be an error
    with pytest.warns(UserWarning, match=r"save_pretrained writes the adapter alone.*save_adapter\(model, optimizer"):
        trainer.save_model(str(tmp_path / "final"))


@each_rule
def test_save_only_model_warns(rule, trainer_of):
    trainer, _ = trainer_of(rule=rule, start="later", save_only_model=True)
    with pytest.warns(UserWarning, match="save_pretrained writes the adapter alone"):
        trainer.train()


def test_a_folded_checkpoint_is_a_plain_adapter_for_the_base(trainer_of, tmp_path):
    """Its config has the user's alpha, PEFT alone loads it, and no save warns: a warning would be an error."""
    trainer, _ = trainer_of("run", "folded", "zero", save_only_model=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    ids = batches(1, seed=9)[0]
    for folder in (tmp_path / "run" / f"checkpoint-{STEPS}", tmp_path / "final"):
        config = config_in(folder)
        assert config["lora_alpha"] == 6
        assert config["alpha_pattern"] == {}
        base = causal_lm(B_zero=True).unload()
        loaded = peft.PeftModel.from_pretrained(base, folder).double()
        assert set(branch_scalings(loaded)) == {6 / 3}
        logits = [model(input_ids=ids).logits.detach() for model in (loaded, trainer.model)]
        assert relative(*logits) <= EXACT
