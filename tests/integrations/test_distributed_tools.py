"""Two processes under Accelerate, Trainer, Lightning and TRL, with what each of them saves and resumes."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import lr_scheduler

from deltaopt.integrations.peft import save_adapter
from tests.support.compare import bits, relative, same
from tests.support.distributed import WORLD, on_all_ranks, shares
from tests.support.models import batches, causal_lm, loss_of, optimizer_for, peft
from tests.support.nightly import later, one_in
from tests.support.peft_runs import (
    EXACT,
    REBUILT,
    STARTS,
    ModelRun,
    assert_models_follow,
    assert_same_models,
    each_start,
    effective,
    peft_asks_by_an_old_name,
)
from tests.support.strategies import each_rule
from tests.support.trainer_runs import Run, distance, logits_from, logits_of

pytestmark = [peft_asks_by_an_old_name, pytest.mark.extra]

LOGITS = 1e-5
"""Of float32 logits that are as large as 4."""


def assert_same_on_ranks(results: list[Any]) -> Any:
    assert same(results[0], results[1])
    return results[0]


# Accelerate


def prepared(run: ModelRun, first: str, **options: Any) -> Callable[[list[Tensor]], None]:
    """Return how this run, prepared in an order, is trained; `.accelerator` is what prepared it."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, **options)
    assert accelerator.num_processes == WORLD
    run.scheduler = lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (1 + step))
    if first == "model":
        model, optimizer, scheduler = accelerator.prepare(run.model, run.optimizer, run.scheduler)
    else:
        optimizer, model, scheduler = accelerator.prepare(run.optimizer, run.model, run.scheduler)

    def train(data: list[Tensor]) -> None:
        for ids in shares(data, accelerator.process_index):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, ids))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(run.factors(), 0.05)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    train.accelerator = accelerator
    return train


@pytest.mark.parametrize(
    ("rule", "start", "first"),
    one_in(2, [("in_place", "later"), ("folded", "zero"), ("folded", "later")], ["model", "optimizer"]),
)
def test_accelerate_follows_one_process(rule, start, first):
    """With accumulation, clipping and a schedule."""
    assert_same_on_ranks(on_all_ranks(accelerate_on_rank, start, rule, first))


def accelerate_on_rank(rank: int, start: str, rule: str, first: str) -> dict[str, Tensor]:
    run, alone, data = ModelRun(rule, start), ModelRun("in_place", start), batches(12)
    prepared(run, first, gradient_accumulation_steps=2)(data)
    # Accelerate steps a schedule once for each process.
    scheduler = lr_scheduler.LambdaLR(alone.optimizer, lambda step: 1 / (1 + WORLD * step))
    for i, ids in enumerate(data):
        alone.backward(ids, 0.5)
        if i % 2:
            alone.clip()
            alone.step()
            scheduler.step()
    expected = effective(alone.model)
    for name, W in effective(run.model).items():
        assert relative(W, expected[name]) <= EXACT, name
    if rule == "folded":
        assert_models_follow(run.model, alone.model)
    return bits(run.model)


@pytest.mark.parametrize(
    ("dtype", "rule", "start"),
    [
        later(torch.float32, "in_place", "zero", id="float32"),
        pytest.param(torch.bfloat16, "in_place", "later", id="bfloat16"),
        pytest.param(torch.float32, "folded", "later", id="folded"),
        later(torch.bfloat16, "folded", "zero", id="folded-bfloat16"),
    ],
)
def test_accelerate_resumes_bit_for_bit(dtype, start, rule, tmp_path):
    assert_same_on_ranks(on_all_ranks(accelerate_resumes_on_rank, dtype, start, rule, tmp_path))


def accelerate_resumes_on_rank(rank: int, dtype: torch.dtype, start: str, rule: str, folder: Path) -> dict[str, Tensor]:
    """In fresh objects, and in the same ones, which return to the time of the save."""
    data = batches(8)
    run = ModelRun(rule, start, dtype, torch.float32)
    train = prepared(run, "model")
    train(data[:5])
    train.accelerator.save_state(str(folder))
    train.accelerator.wait_for_everyone()
    train(data[5:])
    expected = bits(run.model)
    train.accelerator.free_memory()

    other = ModelRun(rule, start, dtype, torch.float32, lr=3e-2)
    train = prepared(other, "model")
    for _ in range(2):
        train.accelerator.load_state(str(folder))
        assert other.optimizer.step_count == 5
        train(data[5:])
        assert same(bits(other.model), expected)
        assert_same_models(run.model, other.model)
    return expected


@each_rule
@each_start
def test_one_process_of_accelerate_saves_what_plain_peft_loads(start, rule, tmp_path):
    assert_same_on_ranks(on_all_ranks(accelerate_saves_on_rank, start, rule, tmp_path))


def accelerate_saves_on_rank(rank: int, start: str, rule: str, folder: Path) -> Tensor:
    run = ModelRun(rule, start, torch.float32)
    train = prepared(run, "model")
    train(batches(6))
    if train.accelerator.is_main_process:
        save_adapter(run.model, run.optimizer, folder / "exported")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in place: that W is not in it
            run.model.save_pretrained(folder / "plain")
    train.accelerator.wait_for_everyone()
    trained = logits_of(run.model)
    for name in ("exported", "plain"):
        base = causal_lm(torch.float32, STARTS[start]["B_zero"]).unload()
        found = logits_of(peft.PeftModel.from_pretrained(base, folder / name))
        fits = name == "exported" or (rule == "folded" and start == "zero")
        assert distance(found, trained) <= LOGITS if fits else distance(found, trained) > 1e-3, name
    return trained


# Trainer


@pytest.mark.parametrize(("rule", "start"), one_in(2, ["folded", "in_place"], STARTS))
def test_trainer_follows_one_process_and_resumes(start, rule, accelerator_of, tmp_path):
    """As torchrun starts it. A checkpoint holds the adapter alone; W is rebuilt on every rank."""
    found = assert_same_on_ranks(on_all_ranks(trainer_on_rank, start, rule, tmp_path))
    alone = Run(tmp_path / "alone", rule, start, per_device_train_batch_size=2 * WORLD, **ROWS).train()
    for step, logits in alone.record.logits.items():
        assert distance(found[step], logits) <= LOGITS, step
    assert distance(found[6], alone.record.begin) > 1e-2
    checkpoint = tmp_path / "run" / "checkpoint-6"
    exported = checkpoint if (rule, start) == ("folded", "zero") else checkpoint / "export"
    assert distance(logits_from(exported), found[6]) <= LOGITS


ROWS = {"dataloader_drop_last": True}
"""Two processes with small batches see the rows of one with large ones."""


def trainer_on_rank(rank: int, start: str, rule: str, folder: Path) -> dict[int, Tensor]:
    run = Run(folder / "run", rule, start, per_device_train_batch_size=2, **ROWS).train()
    assert run.trainer.args.world_size == WORLD
    assert isinstance(run.trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    dist.barrier()
    checkpoint = folder / "run" / "checkpoint-4"
    other = Run(folder / "other", rule, start, resume_from=checkpoint, per_device_train_batch_size=2, **ROWS).train(
        checkpoint
    )
    assert other.optimizer.step_count == 6
    assert distance(other.record.begin, run.record.logits[4]) <= LOGITS
    assert distance(other.record.logits[6], run.record.logits[6]) <= LOGITS
    return run.record.logits | {-step: logits for step, logits in other.record.logits.items()}


def test_trainer_moves_16_bits_alike_in_all_processes_and_resumes(accelerator_of, tmp_path):
    """A compensated W in bfloat16, which has moved by several of its spacings, and is off by one at most."""
    found = assert_same_on_ranks(on_all_ranks(trainer_in_16_bits_on_rank, tmp_path))
    alone = sixteen_bits_run(tmp_path / "alone", 2 * WORLD).train()
    for name, W in weights_of(alone.trainer.model).items():
        assert distance(found[name], W) <= IN_16_BITS, name
    base = weights_of(causal_lm(torch.bfloat16))
    assert max(distance(found[name], W) for name, W in base.items()) > 1e-2


IN_16_BITS = 2.0**-8
"""One spacing of bfloat16 between 1/2 and 1, more than which no W of the tiny model has."""


def sixteen_bits_run(folder: Path, rows: int, resume_from: Path | None = None) -> Run:
    options = {"rounding": "compensated"}
    settings = {"per_device_train_batch_size": rows, **ROWS}
    return Run(folder, "in_place", "zero", resume_from, options, torch.bfloat16, **settings)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer.weight" in name}


def trainer_in_16_bits_on_rank(rank: int, folder: Path) -> dict[str, Tensor]:
    run = sixteen_bits_run(folder / "run", 2).train()
    assert isinstance(run.trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    assert {W.dtype for W in weights_of(run.trainer.model).values()} == {torch.bfloat16}
    dist.barrier()
    checkpoint = folder / "run" / "checkpoint-4"
    other = sixteen_bits_run(folder / "other", 2, checkpoint).train(checkpoint)
    assert other.optimizer.step_count == 6
    end = weights_of(run.trainer.model)
    for name, W in weights_of(other.trainer.model).items():
        assert distance(end[name], W) <= IN_16_BITS, name
    return end


# Lightning


@pytest.mark.parametrize(
    ("dtype", "rule"),
    [
        pytest.param(torch.float32, "in_place", id="float32"),
        later(torch.bfloat16, "in_place", id="bfloat16"),
        pytest.param(torch.float64, "folded", id="folded"),
    ],
)
def test_lightning_follows_one_process_and_resumes_bit_for_bit(dtype, rule, tmp_path):
    assert_same_on_ranks(on_all_ranks(lightning_on_rank, dtype, rule, tmp_path))


def lightning_on_rank(rank: int, dtype: torch.dtype, rule: str, folder: Path) -> dict[str, Tensor]:
    from tests.integrations.test_lightning import AdapterModule, fit

    parallel = {"devices": WORLD, "strategy": "ddp", "batch": 4 // WORLD}
    whole, half, resumed = (AdapterModule(dtype, rule) for _ in range(3))
    fit(whole, folder, 6, **parallel)
    fit(half, folder, 3, **parallel).save_checkpoint(folder / "half.ckpt")
    trainer = fit(resumed, folder, 6, folder / "half.ckpt", **parallel)
    assert trainer.world_size == WORLD
    assert trainer.optimizers[0].step_count == 6
    assert_same_models(whole.model, resumed.model)

    alone = causal_lm(dtype)
    optimizer = optimizer_for(alone, start_step=1, weight_update=rule)
    scheduler = lr_scheduler.LinearLR(optimizer, total_iters=8)
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(alone, batches(1)[0]).backward()
        optimizer.step()
        scheduler.step()
    expected = effective(alone)
    tolerance = {torch.float64: EXACT, torch.float32: REBUILT, torch.bfloat16: 2e-2}[dtype]
    for name, W in effective(whole.model).items():
        assert relative(W, expected[name]) <= tolerance, name
    return bits(whole.model)


# TRL


@pytest.mark.parametrize(
    ("rule", "start"), [("in_place", "config"), ("folded", "trained"), later("in_place", "trained")]
)
def test_the_reference_of_dpo_is_the_base_on_every_rank(rule, start, tmp_path):
    """Its log-probabilities in each forward pass equal those of a frozen copy, and the losses those with one."""
    pytest.importorskip("trl", reason="runs where trl is installed")
    on_all_ranks(dpo_on_rank, rule, start, tmp_path)


def dpo_on_rank(rank: int, rule: str, start: str, folder: Path) -> None:
    from tests.support import trl_runs

    found = trl_runs.run("dpo", start, rule, folder)
    assert min(found.moved) > 0.1
    assert len(found.passes) == trl_runs.STEPS
    assert max(found.passes) <= LOGITS
    assert max(found.off) <= LOGITS
    with torch.no_grad():
        off = torch.tensor(found.off)
        dist.broadcast(off, 0)
    assert off.tolist() == found.off
    frozen = trl_runs.run("dpo", start, rule, folder, reference="frozen")
    for step, numbers in enumerate(frozen.logged):
        assert found.logged[step] == pytest.approx(numbers, rel=5e-5, abs=5e-5), step
