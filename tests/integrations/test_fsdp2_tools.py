"""FSDP2 under Accelerate, Trainer, Lightning and TRL, in two processes: what they train, save and resume."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler

from deltaopt.__main__ import main
from deltaopt.integrations.peft import save_adapter
from deltaopt.integrations.trainer import DeltaLoRAFactory
from tests.support.compare import relative, same
from tests.support.distributed import WORLD, on_all_ranks, shares
from tests.support.fsdp_rig import fsdp_on_cpus, plugin
from tests.support.models import batches, causal_lm, loss_of, optimizer_for, peft, plain_loop, transformers
from tests.support.nightly import later
from tests.support.peft_runs import EXACT, ModelRun, branch_scalings, peft_asks_by_an_old_name
from tests.support.trainer_runs import Run, distance, logits_from, logits_of

pytestmark = [peft_asks_by_an_old_name, pytest.mark.extra]

LOGITS = 2e-5
"""Of float32 logits that are as large as 4."""

SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
"""How accelerate saves: each rank its part with torch.distributed.checkpoint, or rank 0 the whole in one file."""


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The bits of all parameters, on all ranks."""
    return {
        name: p.detach().full_tensor() if isinstance(p, DTensor) else p.detach().clone()
        for name, p in model.named_parameters()
    }


def assert_same_on_ranks(results: list[Any]) -> Any:
    assert same(results[0], results[1])
    return results[0]


# Accelerate


def prepared(run: ModelRun, kind: str) -> Callable[[list[Tensor]], None]:
    """Return how this run is trained, with accumulation over two batches, clipping and a schedule."""
    from accelerate import Accelerator

    with fsdp_on_cpus():
        accelerator = Accelerator(
            cpu=True,
            fsdp_plugin=plugin(state_dict_type=kind),
            gradient_accumulation_steps=2,
            step_scheduler_with_optimizer=False,
        )
    assert accelerator.is_fsdp2
    assert accelerator.num_processes == WORLD
    run.scheduler = lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (1 + step))
    model, optimizer, scheduler = accelerator.prepare(run.model, run.optimizer, run.scheduler)
    assert all(isinstance(triple.W, DTensor) for triple in run.optimizer.triples)

    def train(data: list[Tensor]) -> None:
        for ids in shares(data, accelerator.process_index):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, ids))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(run.factors(), 0.05)
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()

    train.accelerator = accelerator
    return train


@pytest.mark.parametrize(
    ("rule", "start", "kind"),
    [
        ("in_place", "zero", SHARDED),
        later("in_place", "later", FULL),
        ("folded", "zero", FULL),
    ],
)
def test_accelerate_follows_one_process_and_resumes_bit_for_bit(rule, start, kind, tmp_path):
    assert_same_on_ranks(on_all_ranks(accelerate_on_rank, rule, start, kind, tmp_path))


def accelerate_on_rank(rank: int, rule: str, start: str, kind: str, folder: Path) -> list[Any]:
    data = batches(12)
    run, alone = ModelRun(rule, start), ModelRun(rule, start)
    train = prepared(run, kind)
    train(data[:8])
    scheduler = lr_scheduler.LambdaLR(alone.optimizer, lambda step: 1 / (1 + step))
    for i, ids in enumerate(data[:8]):
        alone.backward(ids, 0.5)
        if i % 2:
            alone.clip()
            alone.step()
            scheduler.step()
    expected, found = whole(alone.model), whole(run.model)
    assert branch_scalings(run.model) == branch_scalings(alone.model)
    for name, p in found.items():
        assert relative(p, expected[name]) <= EXACT, name

    save_adapter(train.accelerator.unwrap_model(run.model), run.optimizer, folder / "exported")
    run.optimizer.check_synced()
    train.accelerator.save_state(str(folder / "state"))
    train(data[8:])
    end = whole(run.model)
    with torch.no_grad():
        base = causal_lm(torch.float64, B_zero=True).unload()
        logits = logits_of(peft.PeftModel.from_pretrained(base, folder / "exported"))
    assert distance(logits, logits_of(alone.model)) <= LOGITS

    train.accelerator.load_state(str(folder / "state"))  # into the same objects
    assert run.optimizer.step_count == 4
    train(data[8:])
    assert same(whole(run.model), end)
    train.accelerator.free_memory()
    other = ModelRun(rule, start, lr=3e-2)
    train = prepared(other, kind)
    train.accelerator.load_state(str(folder / "state"))
    train(data[8:])
    assert same(whole(other.model), end)
    assert branch_scalings(other.model) == branch_scalings(run.model)
    return [end]


def test_a_full_state_that_is_loaded_again_gives_a_scaled_branch_its_factors():
    """The function of torch writes it into the parameters, and then hands these to load_state_dict."""
    on_all_ranks(full_state_on_rank)


def full_state_on_rank(rank: int) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    model = causal_lm()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = optimizer_for(model, weight_update="folded")
    plain_loop(model, optimizer, shares(batches(2), rank))
    before = whole(model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for options in ({"full_state_dict": True}, {"full_state_dict": True, "broadcast_from_rank0": True}):
        plain_loop(model, optimizer, shares(batches(2), rank))
        set_model_state_dict(model, dict(state), options=StateDictOptions(**options))
        for name, p in whole(model).items():
            assert relative(p, before[name]) <= EXACT, name


def test_the_command_line_exports_a_full_state_of_shards(tmp_path):
    """The one file that rank 0 writes, with the adapter next to it, as one adapter on the pristine base."""
    expected = assert_same_on_ranks(on_all_ranks(full_file_on_rank, tmp_path))
    causal_lm(torch.float32, B_zero=True).unload().save_pretrained(tmp_path / "base")
    places = {"--base": "base", "--adapter": "adapter", "--out": "out"}
    assert (
        main(
            ["export", str(tmp_path / "optimizer.pt"), *(s for k, v in places.items() for s in (k, str(tmp_path / v)))]
        )
        == 0
    )
    assert distance(logits_from(tmp_path / "out"), expected) <= LOGITS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as below
        assert distance(logits_from(tmp_path / "adapter"), expected) > 1e-3


def full_file_on_rank(rank: int, folder: Path) -> Tensor:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model = causal_lm(torch.float32, B_zero=True)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = optimizer_for(model)
    plain_loop(model, optimizer, shares(batches(4), rank))
    weights, state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(state, folder / "optimizer.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the movement of W is not in it
            model.save_pretrained(folder / "adapter", state_dict=weights)
    return logits_of(model)


# Trainer


def trainer_run(folder: Path, rule: str, start: str, kind: str = SHARDED, resume_from: Path | None = None, **more: Any):
    """Trainer shards what a factory's optimizer has been built for: no method of it is overridden."""
    fsdp = {"version": 2, "state_dict_type": kind, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    rows = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "dataloader_drop_last": True}
    with fsdp_on_cpus():
        return Run(folder, rule, start, resume_from, fsdp=True, fsdp_config=fsdp, **{**rows, "max_steps": 4, **more})


@pytest.mark.parametrize(
    ("rule", "start", "kind"),
    [later("in_place", "zero", SHARDED), ("in_place", "later", FULL), ("folded", "later", SHARDED)],
)
def test_trainer_follows_one_process_and_resumes(rule, start, kind, accelerator_of, tmp_path):
    """A checkpoint holds the adapter alone, so that W is rebuilt, and an export as soon as a W has moved."""
    found = assert_same_on_ranks(on_all_ranks(trainer_on_rank, rule, start, kind, tmp_path))
    alone = Run(tmp_path / "alone", rule, start, per_device_train_batch_size=4, max_steps=5, dataloader_drop_last=True)
    for step, logits in alone.train().record.logits.items():
        assert distance(found[step], logits) <= LOGITS, step
    for step in (4, 5):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        assert (checkpoint / "export").is_dir()
        assert distance(logits_from(checkpoint / "export"), found[step]) <= LOGITS
    assert distance(found[4], found[5]) > 1e-2


def trainer_on_rank(rank: int, rule: str, start: str, kind: str, folder: Path) -> dict[int, Tensor]:
    warnings.filterwarnings("error", ".*(adapter|Delta-LoRA)", UserWarning)
    saved = {"save_steps": 4, "max_steps": 5, "eval_strategy": "steps", "eval_steps": 1}
    saved |= {"logging_strategy": "steps", "logging_steps": 2}
    run = trainer_run(folder / "run", rule, start, kind, **saved).train()
    assert isinstance(run.trainer.model_wrapped, FSDPModule)
    *_, logs = (logs for logs in run.record.logs if "loss" in logs)
    assert logs["deltaopt/moved_weights"] == len(run.optimizer.triples)
    checkpoint = folder / "run" / "checkpoint-4"
    other = trainer_run(folder / "other", rule, start, kind, checkpoint, **saved).train(checkpoint)
    assert other.optimizer.step_count == 5
    assert distance(other.record.begin, run.record.logits[4]) <= LOGITS
    assert distance(other.record.logits[5], run.record.logits[5]) <= LOGITS
    return run.record.logits


def test_a_sharded_checkpoint_without_the_optimizer_holds_how_far_w_has_moved(tmp_path):
    """Which Trainer takes with full states only."""
    assert_same_on_ranks(on_all_ranks(small_on_rank, tmp_path))


def small_on_rank(rank: int, folder: Path) -> Tensor:
    settings = {"save_only_model": True, "max_steps": 3}
    run = trainer_run(folder / "run", "in_place", "zero", FULL, **settings).train()
    checkpoint = folder / "run" / "checkpoint-2"
    other = trainer_run(folder / "other", "in_place", "zero", FULL, checkpoint, **settings).train(checkpoint)
    assert other.optimizer.step_count == 3
    assert distance(other.record.begin, run.record.logits[2]) <= LOGITS
    return other.record.begin


@pytest.mark.parametrize("kind", [SHARDED, later(FULL)])
def test_the_best_model_has_the_w_of_its_step_and_is_what_is_pushed(kind, tmp_path):
    expected = assert_same_on_ranks(on_all_ranks(best_on_rank, kind, tmp_path))
    assert distance(logits_from(tmp_path / "export"), expected) <= LOGITS
    assert distance(logits_from(tmp_path / "checkpoint-4" / "export"), expected) > 1e-2


class PushesWithin(transformers.TrainerCallback):
    """Does what Trainer does when it pushes a checkpoint: one process alone calls the callbacks."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 3 and args.process_index == 0:
            (Path(args.output_dir) / "export").mkdir()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.trainer.callback_handler.on_push_begin(args, state, control)
            self.told = [str(warning.message) for warning in caught]
            assert not (Path(args.output_dir) / "export").exists()


def best_on_rank(rank: int, kind: str, folder: Path) -> Tensor:
    warnings.filterwarnings("error", ".*(adapter|Delta-LoRA)", UserWarning)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score"}
    run = trainer_run(folder, "in_place", "later", kind, **best, eval_strategy="steps", eval_steps=1, save_steps=1)
    trainer, pushes = run.trainer, PushesWithin()
    pushes.trainer = trainer
    trainer.add_callback(pushes)
    trainer.compute_metrics = lambda predictions: {"score": -abs(trainer.state.global_step - 2)}
    trainer.args.hub_strategy, trainer.args.push_to_hub = "end", True  # after the constructor, which would connect
    run.train()
    assert trainer.state.best_global_step == 2
    assert [told.startswith("what is pushed now has no folder 'export'") for told in pushes.told] == [True] * (
        rank == 0
    )
    if rank == 0:
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert distance(logits_of(trainer.model), run.record.logits[2]) <= LOGITS
    assert distance(run.record.logits[4], run.record.logits[2]) > 1e-2
    return run.record.logits[2]


# Lightning


@pytest.mark.parametrize(("rule", "distributed"), [("in_place", True), ("folded", False)])
def test_lightning_follows_one_process_and_resumes_bit_for_bit(rule, distributed, tmp_path):
    """With `ModelParallelStrategy`, whose checkpoint is a folder that all ranks write, or one file."""
    pytest.importorskip("lightning", reason="runs where lightning is installed")
    assert_same_on_ranks(on_all_ranks(lightning_on_rank, rule, distributed, tmp_path))


def lightning_on_rank(rank: int, rule: str, distributed: bool, folder: Path) -> dict[str, Tensor]:
    from lightning.pytorch.strategies import ModelParallelStrategy

    from tests.integrations.test_lightning import AdapterModule, fit

    class ShardedModule(AdapterModule):
        def configure_model(self) -> None:
            mesh = self.device_mesh["data_parallel"]
            if not isinstance(self.model, FSDPModule):
                for layer in self.model.get_base_model().model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(self.model, mesh=mesh)

    def fitted(steps: int, module: AdapterModule, checkpoint: Path | None = None) -> Any:
        strategy = ModelParallelStrategy(WORLD, 1, save_distributed_checkpoint=distributed)
        return fit(module, folder, steps, checkpoint, batch=2, devices=WORLD, strategy=strategy)

    run, half, resumed, alone = (kind(torch.float64, rule) for kind in [ShardedModule] * 3 + [AdapterModule])
    fitted(6, run)
    fitted(3, half).save_checkpoint(folder / "half.ckpt")
    trainer = fitted(6, resumed, folder / "half.ckpt")
    assert trainer.optimizers[0].step_count == 6
    assert same(whole(resumed.model), whole(run.model))
    assert branch_scalings(resumed.model) == branch_scalings(run.model)

    optimizer = optimizer_for(alone.model, start_step=1, weight_update=rule)
    scheduler = lr_scheduler.LinearLR(optimizer, total_iters=8)
    for _ in range(6):
        plain_loop(alone.model, optimizer, batches(1))
        scheduler.step()
    expected = whole(alone.model)
    for name, p in whole(run.model).items():
        assert relative(p, expected[name]) <= EXACT, name
    return whole(run.model)


# TRL


@pytest.mark.parametrize(("rule", "start"), [("in_place", "config"), ("folded", "config_later")])
def test_the_reference_of_dpo_is_the_sharded_base(rule, start, tmp_path):
    """Its log-probabilities in each forward pass equal those of a frozen copy that is not sharded."""
    pytest.importorskip("trl", reason="runs where trl is installed")
    off, moved = assert_same_on_ranks(on_all_ranks(dpo_on_rank, rule, start, tmp_path))
    assert max(off) <= LOGITS
    assert min(moved) > 0.1


def dpo_on_rank(rank: int, rule: str, start: str, folder: Path) -> tuple[list[float], list[float]]:
    from tests.support import trl_runs

    model = trl_runs.STARTS[start].model()
    frozen = trl_runs.frozen_copy(model)
    fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    with fsdp_on_cpus():
        trainer = trl_runs.trainer_for("dpo", start, rule, folder, model, None, fsdp, {})
    trainer.optimizer = None  # the factory makes another one when Trainer has the model ready
    options = {"lr": trl_runs.LEARNING_RATE, "update_ratio": trl_runs.UPDATE_RATIO, "weight_update": rule}
    options |= trl_runs.STARTS[start].options
    trainer.optimizer_cls_and_kwargs = (DeltaLoRAFactory, options)
    record = trl_runs.ReferenceRecord(trainer, frozen)
    trainer.train()
    assert isinstance(trainer.model_wrapped, FSDPModule)
    assert len(record.passes) == trl_runs.STEPS
    assert max(record.passes) <= LOGITS
    return record.off, record.moved
