"""The folded rule on sharded models, against the paper's loop in one process; and ranks that do not act alike."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from deltaopt import DeltaLoRAOptimizer, LoRATriple, RanksDisagreeError, export_adapter, merged_weights
from deltaopt.integrations.trainer import DeltaLoRAFactory
from tests.integrations.test_tensor_parallel_base import load_split, save_llama
from tests.support.compare import relative
from tests.support.distributed import on_all_ranks
from tests.support.nightly import later, one_in
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.sharded_layers import here
from tests.support.sharded_runs import LR, ShardedRun, branched, net, triples_of, whole
from tests.support.strategies import RULES, each_rule
from tests.support.tensor_parallel import SCALING, Adapted, Block, batch, block, split
from tests.support.threads import on_threads

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]

RATIO, STEPS = 1.5, 6

ROUNDED = 1e-6
"""Relative: float32 sums in another order, and what was trained with them since."""


def dense_loop(
    model: nn.Module,
    layers: Sequence[tuple[nn.Parameter, nn.Parameter, nn.Parameter, float]],
    loss: Callable[[int], Tensor],
    ratio: float = RATIO,
) -> list[Tensor]:
    """Return W + s A B of layers (W, A, B, s), in float64, after the paper's loop on whole batches."""
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    for step in range(STEPS):
        before = [(A.detach().double(), B.detach().double()) for _, A, B, _ in layers]
        A_and_B = [(A.clone(), B.clone()) for A, B in before]
        inner.zero_grad()
        loss(step).backward()
        inner.step()
        for (W, A, B, s), (old_A, old_B) in zip(layers, A_and_B, strict=True):
            W.data += (ratio * s * (A.detach().double() @ B.detach().double() - old_A @ old_B)).to(W.dtype)
    return [W.detach().double() + s * A.detach().double() @ B.detach().double() for W, A, B, s in layers]


def effective(layers: Sequence[tuple[Tensor, Tensor, Tensor, float]]) -> list[Tensor]:
    """The same of a model that is sharded."""
    return [whole(W).double() + s * whole(A).double() @ whole(B).double() for W, A, B, s in layers]


def parts_of(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter, nn.Parameter, float]]:
    return [(layer.base.weight, layer.A, layer.B, layer.scaling) for layer in branched(model)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).float() - 1).square().mean()


def rows(step: int, rank: int | None = None) -> Tensor:
    x = torch.randn(8, 13, generator=torch.Generator().manual_seed(100 + step))
    return x if rank is None else x.chunk(2)[rank]


def alone(ratio: float = RATIO) -> list[Tensor]:
    model = net(zero=True)
    return dense_loop(model, parts_of(model), lambda step: loss_of(model, rows(step)), ratio)


def trained_on_shards(rank: int, ratio: float = RATIO, one_piece: bool = False, **options: Any) -> list[Tensor]:
    """Train a folded model under `fully_shard`; every size of it is uneven, and a B of one row leaves a rank empty."""
    model = net(zero=True)
    for part in [] if one_piece else branched(model):
        fully_shard(part, **options)
    fully_shard(model, **options)
    optimizer = DeltaLoRAOptimizer(
        torch.optim.AdamW, triples_of(model), lr=LR, update_ratio=ratio, weight_update="folded"
    )
    before = [whole(W) for W, *_ in parts_of(model)]
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, rows(step, rank)).backward()
        optimizer.step()
    assert all(torch.equal(whole(W), old) for (W, *_), old in zip(parts_of(model), before, strict=True))
    return effective(parts_of(model))


@pytest.mark.parametrize("one_piece", [False, True], ids=["layers", "root"])
@pytest.mark.parametrize("reshard", [True, False])
def test_folded_shards_follow_the_dense_loop(reshard, one_piece):
    for found in on_all_ranks(shards_on_rank, reshard, one_piece):
        assert max(map(relative, found, alone())) < ROUNDED


def shards_on_rank(rank: int, reshard: bool, one_piece: bool) -> list[Tensor]:
    return trained_on_shards(rank, one_piece=one_piece, reshard_after_forward=reshard)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=str)
def test_folded_replicas_of_shards_follow_the_dense_loop(shape):
    for found in on_all_ranks(replicas_on_rank, shape):
        assert max(map(relative, found, alone())) < ROUNDED


def replicas_on_rank(rank: int, shape: tuple[int, int]) -> list[Tensor]:
    return trained_on_shards(rank, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")))


@pytest.mark.parametrize("output", [None, torch.float32], ids=str)
def test_in_mixed_precision_a_folded_branch_is_as_far_off_as_a_lora_of_its_scaling(output):
    """Compute in bfloat16 is what both are off by: the folded branch is (1 + ratio) times as large."""
    lora, folded = on_all_ranks(mixed_precision_on_rank, output)[0]
    lora = max(map(relative, lora, alone(0.0)))
    folded = max(map(relative, folded, alone()))
    assert ROUNDED < lora < 2e-2
    assert folded <= 2 * (1 + RATIO) * lora


def mixed_precision_on_rank(rank: int, output: torch.dtype | None) -> tuple[list[Tensor], list[Tensor]]:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output)
    lora, folded = (trained_on_shards(rank, ratio, mp_policy=policy) for ratio in (0.0, RATIO))
    return lora, folded


EVENTS: dict[str, Callable[[DeltaLoRAOptimizer], Any]] = {
    "restart": lambda optimizer: optimizer.restart(),
    "resync": lambda optimizer: optimizer.resync(),
    "rebase": lambda optimizer: optimizer.rebase(),
    "merged_weights": merged_weights,
    "residual": lambda optimizer: {"l1": optimizer.residual("l1")},
    "report": lambda optimizer: str(optimizer.report()),
}


@pytest.mark.parametrize(("event", "start"), one_in(2, EVENTS, [{"start_step": 1, "keep_base": "cpu"}, {"zero": True}]))
def test_an_event_of_a_folded_run_is_that_of_one_process(event, start):
    on_all_ranks(event_on_rank, event, start)


def event_on_rank(rank: int, event: str, start: dict[str, Any]) -> None:
    run = ShardedRun(rank, weight_update="folded", **start)

    def train(steps: int) -> None:
        for _ in range(steps):
            for model in (run.model, run.alone):  # the reference, which then follows, has to see gradients as well
                run.backward(model, run.t)
            run.optimizer.step()
            run.follow()
            run.t += 1

    train(3)
    found, expected = run.both(EVENTS[event])
    if event in ("merged_weights", "residual"):
        for name, value in expected.items():
            torch.testing.assert_close(whole(found[name]), value, rtol=1e-5, atol=1e-6)
    elif event == "report":
        assert found == expected
    run.assert_follows()
    train(2)
    run.assert_follows()
    for triple in run.optimizer.triples:
        moved, of_reference = run.both(lambda optimizer, name=triple.label: optimizer.displacement(name).product())
        torch.testing.assert_close(moved, of_reference, rtol=1e-5, atol=1e-6)


# ranks that do not act alike


@each_rule
def test_a_loss_of_nan_on_one_rank_is_every_shard_s(rule):
    """FSDP2 sums it up before it shards the gradients."""
    on_all_ranks(nan_on_rank, rule)


def nan_on_rank(rank: int, rule: str) -> None:
    run = ShardedRun(rank, weight_update=rule, zero=True)
    for step in range(2):
        run.backward(run.model, step)
        run.optimizer.step()
    before = [whole(W) for W in run.weights(run.model)]
    run.optimizer.zero_grad()
    loss = loss_of(run.model, rows(2, rank))
    (loss * float("nan") if rank == 1 else loss).backward()
    if rule == "in_place":
        with pytest.warns(RuntimeWarning, match="a LoRA factor became NaN"):
            run.optimizer.step()
    else:
        run.optimizer.step()
    assert run.optimizer.skipped_updates == (rule == "in_place")
    assert all(torch.equal(whole(W), old) for W, old in zip(run.weights(run.model), before, strict=True))
    assert all(whole(A).isnan().all() for _, A, _, _ in parts_of(run.model))


PATIENCE = 1.0
"""Seconds that a rank waits for one that does not come."""

CALLS: dict[str, Callable[[DeltaLoRAOptimizer], Any]] = {
    "step": lambda optimizer: optimizer.step(),
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "displacement": lambda optimizer: optimizer.displacement("l0"),
    "export_adapter": export_adapter,
}


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (call, rule) if (call, rule) in [("step", "folded"), ("export_adapter", "in_place")] else later(call, rule)
        for call in CALLS
        for rule in RULES
    ],
)
def test_a_rank_that_is_alone_in_a_call_is_told_who_did_not_come(call, rule):
    """Step K of the folded rule takes the product from W, for which all ranks have to be there."""
    said = on_all_ranks(alone_on_rank, call, rule)
    assert re.search(r"rank 1 did not come to .* within 1\.\d+ seconds: all ranks have to call it", said[0])


def alone_on_rank(rank: int, call: str, rule: str) -> str:
    # After a timeout a control group is of no more use, and each timeout has its own.
    patience = PATIENCE + (1 + [*CALLS].index(call) + len(CALLS) * (rule == "folded")) / 100
    run = ShardedRun(rank, weight_update=rule, start_step=2, rank_timeout=patience)
    for step in range(2):
        run.backward(run.model, step)
        run.optimizer.step()
    run.backward(run.model, 2)
    before = [W.to_local().clone() for W in run.weights(run.model)]
    if rank == 1:
        time.sleep(PATIENCE + 2)  # its process would be said to have ended
        return ""
    with pytest.raises(RuntimeError) as told:
        CALLS[call](run.optimizer)
    assert all(torch.equal(W.to_local(), old) for W, old in zip(run.weights(run.model), before, strict=True))
    return str(told.value)


@pytest.mark.parametrize("name", ["update_ratio", "start_step", "scaling"])
def test_other_settings_on_one_rank_of_a_folded_run_are_told_at_the_first_step(name):
    for said in on_all_ranks(another_setting_on_rank, name):
        assert re.search(rf"{name} of 3 layers \(l0, l1, l2\): [\d.]+ on rank 0, [\d.]+ on rank 1: give every", said)


def another_setting_on_rank(rank: int, name: str) -> str:
    run = ShardedRun(rank, weight_update="folded", zero=True, **({name: rank} if name != "scaling" else {}))
    if name == "scaling":
        for layer in branched(run.model):
            layer.scaling *= 1 + rank
        run.optimizer = run.new_optimizer(run.model)
    run.backward(run.model, 0)
    with pytest.raises(RanksDisagreeError) as told:
        run.optimizer.step()
    return str(told.value)


def test_an_error_of_one_rank_in_a_folded_step_ends_it_on_all():
    first, second = on_all_ranks(error_on_rank)
    assert first.startswith("rank 1 raised ArithmeticError: of this rank alone")
    assert second == "of this rank alone"


def error_on_rank(rank: int) -> str:
    run = ShardedRun(rank, weight_update="folded", zero=True, rank_timeout=5.0)
    for step in range(2):
        run.backward(run.model, step)
        run.optimizer.step()
    if rank == 1:

        def fail(closure: Any = None) -> None:
            raise ArithmeticError("of this rank alone")

        run.optimizer.inner.step = fail
    run.backward(run.model, 2)
    try:
        run.optimizer.step()
    except (ArithmeticError, RanksDisagreeError) as error:
        return str(error)
    return "fine"


# tensor parallelism


class Scaled(Adapted):
    """With a scaling that the folded rule can set."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.lora_B(self.lora_A(x))


def scaled_block() -> Block:
    model = block()
    for layer in (model.up, model.down):
        layer.__class__, layer.scaling = Scaled, SCALING
        nn.init.zeros_(layer.lora_B.weight)
    return model


def parts_of_block(model: Block) -> list[tuple[nn.Parameter, nn.Parameter, nn.Parameter, float]]:
    layers = (model.up, model.down)
    return [(layer.base.weight, layer.lora_B.weight, layer.lora_A.weight, layer.scaling) for layer in layers]


def split_and_folded(rank: int, shape: tuple[int, ...]) -> list[Tensor]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[-len(shape) :])
    model = split(scaled_block(), mesh["tp"])
    if len(shape) == 2:
        for part in (model.up, model.down, model):
            fully_shard(part, mesh=mesh["dp"])
    triples = [
        LoRATriple(
            (layer.base, "weight"),
            (layer.lora_B, "weight"),
            (layer.lora_A, "weight"),
            scaling=(layer, "scaling"),
            name=name,
        )
        for name, layer in (("up", model.up), ("down", model.down))
    ]
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=LR, update_ratio=RATIO, weight_update="folded")
    for step in range(STEPS):
        optimizer.zero_grad()
        x = batch(step)
        loss_of(model, x if len(shape) == 1 else x.chunk(2)[mesh.get_local_rank("dp")]).backward()
        optimizer.step()
    return effective(parts_of_block(model))


@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=["tensor parallelism", "FSDP2 on it"])
def test_a_folded_split_model_follows_the_dense_loop(shape):
    model = scaled_block()
    expected = dense_loop(model, parts_of_block(model), lambda step: loss_of(model, batch(step)))
    results = on_all_ranks(split_and_folded, shape) if len(shape) == 1 else on_threads(split_and_folded, shape)
    for found in results:
        assert max(map(relative, found, expected)) < ROUNDED


IDS = torch.arange(12).view(2, 6)


def llama_parts(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter, nn.Parameter, float]]:
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]
    return [
        (
            layer.base_layer.weight,
            layer.lora_B["default"].weight,
            layer.lora_A["default"].weight,
            layer.scaling["default"],
        )
        for layer in layers
    ]


def folded_on_a_plan(rank: int, folder: str) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    model = load_split(folder, tp_size=2)
    start = [whole(B) for _, _, B, _ in llama_parts(model)]
    optimizer = DeltaLoRAOptimizer.for_model(
        model, torch.optim.AdamW, lr=LR, update_ratio=RATIO, weight_update="folded"
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return start, effective(llama_parts(model))


def test_folded_peft_on_a_plan_of_transformers_follows_the_dense_loop(tmp_path):
    save_llama(tmp_path)
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
    for start, found in on_all_ranks(folded_on_a_plan, str(tmp_path)):
        model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path), config)
        for (_, _, B, _), value in zip(llama_parts(model), start, strict=True):
            B.data.copy_(value)
        expected = dense_loop(model, llama_parts(model), lambda _, model=model: model(input_ids=IDS, labels=IDS).loss)
        assert max(map(relative, found, expected)) < ROUNDED


def folded_factors_that_nobody_averages(rank: int, folder: str) -> str:
    torch.manual_seed(0)
    model = load_split(folder, fsdp_size=2)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=LR, weight_update="folded")
    before = [here(triple.W).clone() for triple in optimizer.triples]
    optimizer.check_synced()
    ids = IDS + rank  # each rank has data of its own
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(torch.equal(here(triple.W), W) for triple, W in zip(optimizer.triples, before, strict=True))
    with pytest.raises(RanksDisagreeError) as told:
        optimizer.check_synced()
    return str(told.value)


def test_folded_factors_that_transformers_leaves_whole_and_nobody_averages_are_found(tmp_path):
    """They differ with any optimizer. The folded rule writes no W, and a step compares nothing."""
    save_llama(tmp_path)
    first, second = on_all_ranks(folded_factors_that_nobody_averages, str(tmp_path))
    assert first == second
    assert "A and B of 6 layers" in first


def averaged_by_trainer(rank: int, folder: str, rule: str) -> list[Tensor]:
    """Effective weights after a training in which each rank had rows of its own."""
    from tests.support.trainer_runs import OPTIONS, arguments, ours, transformers

    torch.manual_seed(0)
    model = load_split(folder, fsdp_size=2)
    before = [whole(W) for W, *_ in llama_parts(model)]
    data = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(12)]
    trainer = transformers.Trainer(
        model,
        arguments(Path(folder) / "out"),
        train_dataset=data,
        optimizer_cls_and_kwargs=(DeltaLoRAFactory, {**OPTIONS, "weight_update": rule}),
    )
    trainer.train()
    ours(trainer).check_synced()
    for (W, A, B, s), start in zip(llama_parts(model), before, strict=True):
        moved = whole(W) - start
        if rule == "folded":
            assert not moved.any()
        else:
            torch.testing.assert_close(moved, OPTIONS["update_ratio"] * s * whole(A) @ whole(B), rtol=1e-4, atol=1e-6)
    return effective(llama_parts(model))


def test_factors_that_trainer_averages_next_to_fsdp2_are_the_same(tmp_path):
    save_llama(tmp_path)
    in_place, folded = (on_all_ranks(averaged_by_trainer, str(tmp_path), rule) for rule in RULES)
    for results in (in_place, folded):
        assert all(map(torch.equal, *results))
    assert max(map(relative, in_place[0], folded[0])) < 10 * ROUNDED
