"""Among other people's code: training loops, Accelerate, Trainer, GradScaler, distributed checkpoints, schedulers."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import lr_scheduler, swa_utils

from deltaopt import DeltaLoRAOptimizer, find_triples
from tests.support.compare import assert_same_bits, bits
from tests.support.models import (
    RATIO,
    Rows,
    batches,
    causal_lm,
    deltas,
    layers,
    loss_of,
    optimizer_for,
    plain_loop,
    transformers,
    weights,
)

# PEFT asks transformers models by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def assert_telescoped(
    model: nn.Module, W_start: dict[str, Tensor], delta_K: dict[str, Tensor], atol: float = 1e-12
) -> None:
    """Every W is its start plus RATIO times what PEFT's delta weight changed by since step K."""
    end = deltas(model)
    for name, W in weights(model).items():
        asked = RATIO * (end[name] - delta_K[name])
        assert asked.abs().max() > 100 * atol, name
        torch.testing.assert_close(W, W_start[name] + asked, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_a_plain_loop_learns_and_moves_w_by_the_telescoped_delta():
    model, K = causal_lm(), 4
    optimizer = optimizer_for(model, start_step=K, lr=5e-2, weight_decay=0.02)
    data = batches(1) * 30
    W0 = weights(model)
    losses = plain_loop(model, optimizer, data[:K])
    for name, W in weights(model).items():
        assert torch.equal(W, W0[name])
    delta_K = deltas(model)
    losses += plain_loop(model, optimizer, data[K:])
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.step_count == len(data)
    assert_telescoped(model, W0, delta_K)


def test_the_usual_start_with_a_zero_factor():
    """PEFT's init makes the branch zero: W has moved by RATIO times the whole delta."""
    model = causal_lm(B_zero=True)
    W0, zero = weights(model), deltas(model)
    assert all(float(delta.abs().max()) == 0 for delta in zero.values())
    plain_loop(model, optimizer_for(model), batches(5))
    assert_telescoped(model, W0, zero)


def test_gradient_clipping_and_accumulation_in_a_plain_loop():
    """One update per step, however many micro-batches there were, and none from zero_grad or backward."""
    model = causal_lm()
    optimizer = optimizer_for(model)
    W0, delta0 = weights(model), deltas(model)
    for i, ids in enumerate(batches(6)):
        before = bits(model)
        (loss_of(model, ids) / 2).backward()
        assert_same_bits(model, before)
        if i % 2:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.step_count == 3
    assert_telescoped(model, W0, delta0)


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


def test_a_schedule_that_reaches_zero_stops_a_under_accelerate(accelerator_of):
    accelerator = accelerator_of()
    model = causal_lm()
    optimizer = optimizer_for(model)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    moved = []
    for ids in batches(4):
        before = bits(model)
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, ids))
        optimizer.step()
        scheduler.step()
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
    of_layers = {triple.name for triple in optimizer.optimizer.triples}
    assert len(moved[0]) == len(moved[1]) == 3 * len(of_layers)
    assert moved[2] == moved[3] == set()
    assert optimizer.optimizer.inner.param_groups[0]["lr"] == 0
    assert optimizer.optimizer.step_count == 4


def test_accelerate_with_accumulation_equals_the_plain_loop_bit_for_bit(accelerator_of):
    data, schedule = batches(8), lambda step: 1 / (1 + step)

    plain = causal_lm()
    plain_optimizer = optimizer_for(plain, start_step=1)
    plain_scheduler = lr_scheduler.LambdaLR(plain_optimizer, schedule)
    for i, ids in enumerate(data):
        (loss_of(plain, ids) / 2).backward()
        if i % 2:
            plain_optimizer.step()
            plain_scheduler.step()
            plain_optimizer.zero_grad()

    accelerator = accelerator_of(gradient_accumulation_steps=2)
    model = causal_lm()
    start = weights(model)
    optimizer = optimizer_for(model, start_step=1)
    scheduler = lr_scheduler.LambdaLR(optimizer, schedule)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for i, ids in enumerate(data):
        W = weights(model)
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, ids))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        assert optimizer.optimizer.step_count == (i + 1) // 2
        moves = i % 2 == 1 and i > 1
        assert all(torch.equal(new, W[name]) != moves for name, new in weights(model).items()), i

    assert all(not torch.equal(W, start[name]) for name, W in weights(model).items())
    assert_same_bits(model, bits(plain))


def test_accelerate_saves_and_resumes_bit_for_bit(accelerator_of, tmp_path):
    """A full checkpoint holds the moved W: after load_state the run goes on as if it had not stopped."""
    accelerator = accelerator_of()
    data = batches(6)

    def prepared():
        model = causal_lm()
        return accelerator.prepare(model, optimizer_for(model, start_step=1))

    model, optimizer = prepared()
    plain_loop(model, optimizer, data[:3])
    accelerator.save_state(tmp_path)
    plain_loop(model, optimizer, data[3:])
    end = bits(model)

    accelerator.free_memory()
    model, optimizer = prepared()
    accelerator.load_state(tmp_path)
    assert optimizer.optimizer.step_count == 3
    plain_loop(model, optimizer, data[3:])
    assert_same_bits(model, end)


class Watch(transformers.TrainerCallback):
    """Notes PEFT's deltas after `K` steps, and each step's learning rate as the inner optimizer has it."""

    def __init__(self, optimizer_of, K: int) -> None:
        self.optimizer_of, self.K, self.lrs = optimizer_of, K, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.lrs.append(self.optimizer_of().inner.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.K:
            self.delta_K = deltas(model)


@pytest.fixture
def trainer_of(tmp_path, accelerator_of):
    def build(model: nn.Module, K: int, **options) -> tuple[transformers.Trainer, Watch]:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            warmup_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to=[],
            logging_strategy="no",
            save_strategy="steps",
            save_steps=3,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(6), **options)
        # accelerate has wrapped it by then
        watch = Watch(lambda: getattr(trainer.optimizer, "optimizer", trainer.optimizer), K)
        trainer.add_callback(watch)
        return trainer, watch

    return build


def assert_trained(trainer: transformers.Trainer, watch: Watch, W0: dict[str, Tensor]) -> None:
    optimizer = trainer.optimizer.optimizer
    assert trainer.state.global_step == 6
    assert optimizer.step_count == trainer.state.global_step
    assert watch.lrs == pytest.approx([0, 0.005, 0.01, 0.0075, 0.005, 0.0025])
    assert_telescoped(trainer.model, W0, watch.delta_K)


def test_trainer_with_optimizers(trainer_of, tmp_path):
    """Warm-up, accumulation, a schedule that reaches the inner optimizer, and a checkpoint that loads safely."""
    model = causal_lm()
    W0 = weights(model)
    trainer, watch = trainer_of(model, K=2, optimizers=(optimizer_for(model, start_step=2), None))
    trainer.train()
    assert_trained(trainer, watch, W0)
    saved = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    fresh = causal_lm()
    fresh.load_state_dict(model.state_dict())
    optimizer = optimizer_for(fresh, start_step=5)
    optimizer.load_state_dict(saved)
    assert optimizer.step_count == 6
    assert optimizer.groups[0].start_step == 2
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    assert len(moments) == 2 * len(layers(model))
    for old, new in zip(moments, optimizer.state.values(), strict=True):
        assert torch.equal(old, new["exp_avg"])


def test_a_trainer_warns_of_adapters_that_are_saved_without_the_optimizer(trainer_of, tmp_path):
    """Its checkpoints to resume from hold optimizer.pt, and with it the movement of W; the final adapter does not."""
    model = causal_lm()
    trainer, _ = trainer_of(model, K=0, optimizers=(optimizer_for(model), None))
    trainer.train()  # writes checkpoints, and a warning would be an error
    with pytest.warns(UserWarning, match=r"save_pretrained writes the adapter alone.*save_adapter\(model, optimizer"):
        trainer.save_model(str(tmp_path / "final"))


def test_a_trainer_with_save_only_model_warns(trainer_of):
    model = causal_lm()
    trainer, _ = trainer_of(model, K=0, optimizers=(optimizer_for(model), None))
    trainer.args.save_only_model = True
    with pytest.warns(UserWarning, match="save_pretrained writes the adapter alone"):
        trainer.train()


def test_trainer_with_an_optimizer_factory(trainer_of):
    """A class that is no Optimizer is called as `cls()(model, **kwargs)`: it gets the model, with its adapters."""

    class Factory:
        def __call__(self, model: nn.Module, **options) -> DeltaLoRAOptimizer:
            return DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, **options)

    model = causal_lm()
    W0 = weights(model)
    options = {"lr": 1e-2, "update_ratio": RATIO, "start_step": 2}
    trainer, watch = trainer_of(model, K=2, optimizer_cls_and_kwargs=(Factory, options))
    trainer.train()
    assert_trained(trainer, watch, W0)


def test_trainer_equals_the_plain_loop(trainer_of):
    """The same batches by hand, with the schedule's learning rates, give the same bits."""
    model = causal_lm()
    trainer, watch = trainer_of(model, K=1, optimizers=(optimizer_for(model, start_step=1), None))
    seen, compute_loss = [], trainer.compute_loss

    def listening(model, inputs, **kwargs):
        seen.append((inputs["input_ids"].clone(), kwargs.get("num_items_in_batch")))
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = listening
    trainer.train()

    plain = causal_lm()
    optimizer = optimizer_for(plain, start_step=1)
    plain.train()
    for i, (ids, items) in enumerate(seen):
        plain(input_ids=ids, labels=ids, num_items_in_batch=items).loss.backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = watch.lrs[i // 2]
            optimizer.step()
            optimizer.zero_grad()
    assert len(seen) == 12
    assert_same_bits(model, bits(plain))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_steps_with_unscaled_gradients(fused):
    """A fused AdamW takes the scale from the object it is; a wrapper that said so too would step on scaled ones."""
    model, plain = causal_lm(torch.float32), causal_lm(torch.float32)
    # with its usual tiny eps Adam would not notice the scale
    optimizer, plain_optimizer = (optimizer_for(m, fused=fused, eps=1e-2) for m in (model, plain))
    W0, delta0 = weights(model), deltas(model)
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**12)
    for ids in batches(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, ids)).backward()
        scaler.step(optimizer)
        scaler.update()
    plain_loop(plain, plain_optimizer, batches(3))
    assert optimizer.step_count == 3
    expected = bits(plain)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert_telescoped(model, W0, delta0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_leaves_out_a_step_with_infinite_gradients(fused):
    model = causal_lm(torch.float32)
    optimizer = optimizer_for(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**12)
    for factor, skipped in ((1.0, False), (float("inf"), True), (1.0, False)):
        before, count, scale = bits(model), optimizer.step_count, scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batches(1)[0]) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if skipped else scale)
        assert optimizer.step_count == (count if skipped else count + 1)
        if skipped:
            assert_same_bits(model, before)
        else:
            assert not any(torch.equal(t.W, before[f"{t.name}.base_layer.weight"]) for t in optimizer.triples)
    assert optimizer.skipped_updates == 0


def test_grad_scaler_with_explicit_unscaling_and_clipping():
    """`unscale_` and `step` must be given the same optimizer: the gradients are divided once."""
    model, plain = causal_lm(torch.float32), causal_lm(torch.float32)
    optimizer, plain_optimizer = (optimizer_for(m, torch.optim.SGD, lr=0.1) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**12)
    ids = batches(1)[0]
    scaler.scale(loss_of(model, ids)).backward()
    loss_of(plain, ids).backward()
    scaler.unscale_(optimizer)
    norms = [
        torch.nn.utils.clip_grad_norm_([p for p in m.parameters() if p.requires_grad], 0.1) for m in (model, plain)
    ]
    torch.testing.assert_close(*norms)
    scaler.step(optimizer)
    plain_optimizer.step()
    expected = bits(plain)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)


INNERS = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "AdamW_fused": (torch.optim.AdamW, {"fused": True}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD_stateless": (torch.optim.SGD, {}),
}


@pytest.mark.parametrize("inner", INNERS)
def test_asking_for_the_optimizer_state_does_not_count_as_a_step(inner):
    """A distributed checkpoint makes an empty state by one step with lr = 0: K must not come a step early."""
    cls, options = INNERS[inner]
    model = causal_lm()
    optimizer = optimizer_for(model, cls, start_step=2, **options)
    start = bits(model)
    dcp.get_optimizer_state_dict(model, optimizer)
    dcp.get_optimizer_state_dict(model, optimizer)
    assert optimizer.step_count == 0
    assert_same_bits(model, start)

    other = causal_lm()
    other_optimizer = optimizer_for(other, cls, start_step=2, **options)
    for m, o in ((model, optimizer), (other, other_optimizer)):
        plain_loop(m, o, batches(2))
        assert all(torch.equal(triple.W, start[f"{triple.name}.base_layer.weight"]) for triple in o.triples)
        plain_loop(m, o, batches(1, seed=2))
        assert o.step_count == 3
        assert not any(torch.equal(triple.W, start[f"{triple.name}.base_layer.weight"]) for triple in o.triples)


@pytest.mark.parametrize("inner", INNERS)
def test_asking_for_the_state_of_a_run_does_not_count_as_a_step(inner):
    """An inner optimizer without a state, as SGD without momentum, is stepped with lr = 0 each time it is saved."""
    cls, options = INNERS[inner]
    model = causal_lm()
    optimizer = optimizer_for(model, cls, **options)
    plain_loop(model, optimizer, batches(2))
    optimizer.zero_grad()
    before = bits(model)
    dcp.get_optimizer_state_dict(model, optimizer)
    assert optimizer.step_count == 2
    assert_same_bits(model, before)


@pytest.mark.parametrize("inner", INNERS)
def test_a_distributed_checkpoint_round_trip_goes_on_bit_for_bit(inner):
    cls, options = INNERS[inner]
    data = batches(6)
    model = causal_lm()
    optimizer = optimizer_for(model, cls, start_step=1, **options)
    plain_loop(model, optimizer, data[:3])
    optimizer.zero_grad()
    model_state = copy.deepcopy(dcp.get_model_state_dict(model))
    state = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    plain_loop(model, optimizer, data[3:])

    other = causal_lm()
    other_optimizer = optimizer_for(other, cls, start_step=5, **options)
    dcp.set_model_state_dict(other, model_state)
    dcp.set_optimizer_state_dict(other, other_optimizer, state)
    assert other_optimizer.step_count == 3
    assert other_optimizer.groups[0].start_step == 1
    if inner.startswith("AdamW"):
        assert all(float(s["step"]) == 3 for s in other_optimizer.state.values())
        assert len(other_optimizer.state) == 2 * len(layers(other))
    plain_loop(other, other_optimizer, data[3:])
    assert_same_bits(other, bits(model))


SCHEDULERS = {
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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_reach_the_inner_optimizer(name):
    """Each schedule on the wrapper gives the factors and the learning rates it gives on the bare inner optimizer."""
    model, plain = causal_lm(), causal_lm()
    options = {"lr": 0.05, "momentum": 0.9}
    # update_ratio 0: the factors of both models then see the same W
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.SGD, update_ratio=0.0, **options)
    bare = torch.optim.SGD([p for t in find_triples(plain) for p in (t.A, t.B)], **options)
    runs = []
    for m, o, inner in ((model, optimizer, optimizer.inner), (plain, bare, bare)):
        scheduler, lrs = SCHEDULERS[name](o), []
        for ids in batches(6):
            plain_loop(m, o, [ids])
            scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])
            lrs.append((inner.param_groups[0]["lr"], inner.param_groups[0]["momentum"]))
        runs.append(lrs)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 1
    assert_same_bits(model, bits(plain))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_w_follows_the_factors_under_every_schedule(name):
    model = causal_lm()
    optimizer = optimizer_for(model, torch.optim.AdamW)
    W0, delta0 = weights(model), deltas(model)
    scheduler = SCHEDULERS[name](optimizer)
    for ids in batches(5):
        plain_loop(model, optimizer, [ids])
        scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])
    assert_telescoped(model, W0, delta0)


def test_a_scheduler_goes_on_after_the_optimizer_was_loaded():
    """load_state_dict rebinds the lists of a plain Optimizer; the scheduler that was built before still acts."""
    model = causal_lm()
    optimizer = optimizer_for(model)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    plain_loop(model, optimizer, batches(1))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler.step()
    assert optimizer.inner.param_groups[0]["lr"] == 0.0
    before = bits(model)
    plain_loop(model, optimizer, batches(2))
    assert_same_bits(model, before)
