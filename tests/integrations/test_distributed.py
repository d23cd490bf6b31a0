"""Several ranks: data parallel and fully sharded models of PEFT, one test per behaviour."""

import contextlib
import copy
import gc
import re
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support.compare import relative, same
from tests.support.distributed import WORLD, assert_same_on_all_ranks, on_all_ranks, shares
from tests.support.models import RATIO, batches, layers, loss_of, optimizer_for
from tests.support.peft_runs import (
    EXACT,
    FIRST_SCALING,
    STARTS,
    K,
    ModelRun,
    assert_models_follow,
    branch_scalings,
    each_start,
    effective,
    peft_asks_by_an_old_name,
)
from tests.support.strategies import each_rule

pytestmark = peft_asks_by_an_old_name


def shard(model: nn.Module, parts: Callable[[nn.Module], Iterable[nn.Module]] | None = None, **options) -> None:
    for part in model.base_model.model.model.layers if parts is None else list(parts(model)):
        fully_shard(part, **options)
    fully_shard(model, **options)


def linears(model: nn.Module) -> list[nn.Module]:
    """Parts of the layers too, the factors among them."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def factors_of_one_layer(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if re.search(r"layers\.1\..*down_proj\.lora_.\.", name)]


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


@each_start
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_a_data_parallel_run_equals_one_process_on_the_whole_batch(start, wrapped_first):
    on_all_ranks(data_parallel_on_rank, start, wrapped_first)


def data_parallel_on_rank(rank: int, start: str, wrapped_first: bool) -> None:
    options = {"gradient_as_bucket_view": True} if wrapped_first else {}
    run, alone = ModelRun("folded", start), ModelRun("in_place", start)
    ddp = DistributedDataParallel(run.model, **options)
    if wrapped_first:
        run.optimizer = optimizer_for(run.model, weight_update="folded", start_step=STARTS[start]["start_step"])
    data = batches(14)
    for i, ids in enumerate(shares(data, rank)):
        with contextlib.nullcontext() if i % 2 else ddp.no_sync():
            (loss_of(ddp, ids) / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_(run.factors(), 0.05)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=not options)
    for i, ids in enumerate(data):
        alone.backward(ids, 0.5)
        if i % 2:
            nn.utils.clip_grad_norm_(alone.factors(), 0.05)
            alone.step()
    assert_models_follow(run.model, alone.model)
    assert_same_on_all_ranks(run.model)
    assert branch_scalings(run.model) == {FIRST_SCALING * (1 + RATIO)}


@each_rule
def test_factors_that_are_sharded_too_late_are_refused(rule):
    on_all_ranks(sharded_too_late_on_rank, rule)


def sharded_too_late_on_rank(rank: int, rule: str) -> None:
    run = ModelRun(rule, "later", start_step=0)
    shard(run.model)
    before = whole(run.model)
    loss_of(run.model, batches(1)[0]).backward()
    with pytest.raises(ValueError, match=r"A is not among the parameters .*q_proj"):
        run.optimizer.step()
    assert same(whole(run.model), before)
    assert branch_scalings(run.model) == {FIRST_SCALING}


def test_folded_factors_that_are_sharded_are_registered_by_their_places():
    on_all_ranks(registered_as_tensors_on_rank)


def registered_as_tensors_on_rank(rank: int) -> None:
    model = ModelRun("in_place").model
    shard(model)
    layer = next(iter(layers(model).values()))
    W, A, B = layer.base_layer.weight, layer.lora_B["default"].weight, layer.lora_A["default"].weight
    triple = LoRATriple(W, A, B, scaling=torch.tensor(1.0), name="q")
    with pytest.raises(ValueError, match=r"q: A is sharded and was registered as a tensor.*register \(module, 'A'\)"):
        DeltaLoRAOptimizer(torch.optim.SGD, [triple], weight_update="folded")


def test_a_product_that_is_not_zero_is_taken_from_sharded_weights():
    on_all_ranks(nonzero_product_on_rank)


def nonzero_product_on_rank(rank: int) -> None:
    run, alone = ModelRun("folded", "later"), ModelRun("in_place", "later")
    before = alone.effective()
    shard(run.model)
    for each, options in ((run, {"weight_update": "folded"}), (alone, {})):
        each.optimizer = optimizer_for(each.model, torch.optim.SGD, start_step=K, lr=0.05, **options)
    data = batches(K + 3)
    run.train(shares(data, rank))
    alone.train(data)
    run.model.reshard()
    assert branch_scalings(run.model) == {FIRST_SCALING * (1 + RATIO)}
    trained = ModelRun("folded", "later").model
    trained.load_state_dict(whole(run.model))
    for layer in layers(trained).values():
        layer.scaling["default"] = FIRST_SCALING * (1 + RATIO)
    for name, W in effective(trained).items():
        assert relative(W, alone.effective()[name]) <= EXACT
        assert relative(W, before[name]) > 1e-3


def test_a_sharded_factor_that_was_replaced_is_followed():
    on_all_ranks(replaced_shards_on_rank)


def replaced_shards_on_rank(rank: int) -> None:
    """FSDP2 keeps its unsharded parameter, with the hook of the first one, when ``assign=True`` replaces the shards."""
    run = ModelRun("folded")
    shard(run.model)
    run.optimizer = optimizer_for(run.model, weight_update="folded")
    data = batches(2)
    run.train(shares(data, rank))
    del run.optimizer
    gc.collect()
    trained = {id(p) for p in run.factors()}
    names = [name for name, p in run.model.named_parameters() if id(p) in trained]
    run.model.load_state_dict({name: p.clone() for name, p in run.model.state_dict().items()}, assign=True)
    for name, p in run.model.named_parameters():
        p.requires_grad_(name in names)
        if "lora_B" in name:
            nn.init.zeros_(p)
    run.optimizer = optimizer_for(run.model, torch.optim.SGD, weight_update="folded", lr=0.0)
    run.backward(shares(data, rank)[0])
    run.optimizer.step()
    whole_ones = [p.grad.full_tensor() for p in run.factors()]
    run.optimizer.zero_grad()
    run.backward(shares(data, rank)[0])
    for p, before in zip(run.factors(), whole_ones, strict=True):
        # With a product of zero the branch is as it was, but for its scaling, by which the gradient is divided.
        torch.testing.assert_close(p.grad.full_tensor(), before)


SHARDED: dict[str, dict] = {
    "plain": {},
    "not resharded after forward": {"reshard_after_forward": False},
    "checkpointing": {},
    "reentrant checkpointing": {},
    "accumulation": {},
    "every linear layer by itself": {"parts": linears},
    "the factors of one layer by themselves": {"parts": factors_of_one_layer},
    "one piece": {"parts": lambda model: []},
}


ONE_MORE = {
    "in_place": {*SHARDED} - {"plain", "every linear layer by itself"},
    "folded": {"checkpointing"},
}
"""Of the ways of each rule; trainers of TRL, which checkpoint in this way, are sharded too."""


@pytest.mark.parametrize(
    ("way", "rule"),
    [
        pytest.param(way, rule, marks=[pytest.mark.nightly] * (way in ONE_MORE[rule]))
        for way in SHARDED
        for rule in ONE_MORE
    ],
)
def test_sharded_models_follow_one_process_and_resume_bit_for_bit(way, rule):
    on_all_ranks(sharded_models_on_rank, way, rule)


def sharded_models_on_rank(rank: int, way: str, rule: str) -> None:
    """FSDP2 brings gradients to the shards past the hooks of the sharded parameters."""

    def new() -> ModelRun:
        run = ModelRun(rule)
        if "checkpointing" in way:
            run.model.enable_input_require_grads()
            run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": "reent" in way})
            run.model.train()
        shard(run.model, **SHARDED[way])
        run.optimizer = optimizer_for(run.model, torch.optim.SGD, weight_update=rule, momentum=0.9, lr=0.05)
        return run

    micro = 2 if way == "accumulation" else 1

    def train(run: ModelRun, data: list[Tensor]) -> None:
        for i, ids in enumerate(data):
            last = i % micro == micro - 1
            if isinstance(run.factors()[0], dist.tensor.DTensor):
                run.model.set_requires_gradient_sync(last)
                ids = ids.chunk(WORLD)[rank]
            run.backward(ids, 1 / micro)
            if last:
                nn.utils.clip_grad_norm_(run.factors(), 0.05)
                run.step()

    run, alone = new(), ModelRun("in_place")
    alone.optimizer = optimizer_for(alone.model, torch.optim.SGD, momentum=0.9, lr=0.05)
    train(run, batches(4))
    state, trained = copy.deepcopy(run.optimizer.state_dict()), whole(run.model)
    twin = new()
    with torch.no_grad():
        for name, p in twin.model.named_parameters():
            p.copy_(dist.tensor.distribute_tensor(trained[name], p.device_mesh, p.placements))
    twin.optimizer.load_state_dict(state)
    for each in (run, twin):
        train(each, batches(2, seed=2))
    train(alone, batches(4) + batches(2, seed=2))
    for sharded, resumed, p in zip(run.factors(), twin.factors(), alone.factors(), strict=True):
        assert relative(sharded.full_tensor(), p) <= EXACT, way
        assert torch.equal(sharded.full_tensor(), resumed.full_tensor()), way
    if rule == "in_place":
        for name, W in whole(run.model).items():
            assert torch.equal(W, whole(twin.model)[name]), way
            assert relative(W, dict(alone.model.named_parameters())[name]) <= EXACT, way
    ratio = RATIO if rule == "folded" else 0
    assert branch_scalings(run.model) == branch_scalings(twin.model) == {FIRST_SCALING * (1 + ratio)}
    name = run.optimizer.triples[0].label
    moved = [r.optimizer.displacement(name).product() for r in (run, alone)]
    assert relative(*moved) <= EXACT


def test_whole_parameters_that_were_kept_are_told_from_replaced_ones():
    on_all_ranks(kept_whole_parameters_on_rank)


def kept_whole_parameters_on_rank(rank: int) -> None:
    """The outermost module of FSDP2 keeps them after a forward pass, and a backward pass is not to come."""
    run, twin = ModelRun("folded"), ModelRun("folded")
    for r in (run, twin):
        shard(r.model, lambda model: [])
        r.optimizer = optimizer_for(r.model, torch.optim.SGD, weight_update="folded", lr=0.05)
        r.train(shares(batches(2), rank))
    with torch.no_grad():
        loss_of(run.model, batches(1)[0])
    with pytest.raises(ValueError, match=r"(?s)A is not among.*q_proj.*are shards of FSDP2.*model\.reshard\(\) first"):
        run.optimizer.state_dict()
    run.optimizer.zero_grad()
    run.model.reshard()
    run.optimizer.state_dict()
    for r in (run, twin):
        r.train(shares(batches(2), rank))
    assert same(whole(run.model), whole(twin.model))


def test_a_conversion_that_would_lose_the_hooks_is_refused():
    on_all_ranks(conversion_on_rank)


def conversion_on_rank(rank: int) -> None:
    """FSDP2 exchanges the inside of its parameters; torch refuses that while something refers to them weakly."""
    run = ModelRun("folded")
    shard(run.model)
    run.optimizer = optimizer_for(run.model, weight_update="folded")
    with pytest.raises(RuntimeError, match="Couldn't swap"):
        run.model.float()


@each_start
def test_factors_that_stay_whole_follow_with_sharded_weights(start):
    on_all_ranks(whole_factors_on_rank, start)


def whole_factors_on_rank(rank: int, start: str) -> None:
    run = ModelRun("folded", start)
    shard(run.model, ignored_params=set(run.factors()))
    sharded = [layer.base_layer.weight for layer in layers(run.model).values()]
    assert all(isinstance(W, dist.tensor.DTensor) for W in sharded)
    run.optimizer = optimizer_for(run.model, weight_update="folded", start_step=STARTS[start]["start_step"])

    def train(data):
        for ids in shares(data, rank):
            run.backward(ids)
            for p in run.factors():
                dist.all_reduce(p.grad)
                p.grad /= WORLD
            nn.utils.clip_grad_norm_(run.factors(), 0.05)
            run.step()

    alone = ModelRun("in_place", start)
    train(batches(8))
    for ids in batches(8):
        alone.backward(ids)
        nn.utils.clip_grad_norm_(alone.factors(), 0.05)
        alone.step()
    for p, q in zip(run.factors(), alone.factors(), strict=True):
        assert relative(p, q) <= EXACT
    assert branch_scalings(run.model) == {FIRST_SCALING * (1 + RATIO)}
    assert run.optimizer.state_dict()["state"].keys() == alone.optimizer.state_dict()["state"].keys()


def test_the_state_dict_of_a_sharded_model_is_for_the_registered_scaling():
    on_all_ranks(sharded_state_dict_on_rank)


def sharded_state_dict_on_rank(rank: int) -> None:
    run = ModelRun("folded")
    shard(run.model)
    run.optimizer = optimizer_for(run.model, weight_update="folded")
    ids = batches(1)[0].chunk(WORLD)[rank]
    for _ in range(2):
        run.backward(ids)
        run.step()
    expected = run.model(input_ids=ids).logits.detach()
    run.model.reshard()
    trained = whole(run.model)
    stored = {name: tensor.full_tensor() for name, tensor in run.model.state_dict().items()}
    fresh = ModelRun("folded").model
    fresh.load_state_dict(stored)
    assert relative(fresh(input_ids=ids).logits.detach(), expected) <= EXACT
    run.model.load_state_dict(run.model.state_dict())
    assert same(whole(run.model), trained)
    shard(fresh)
    resumed = optimizer_for(fresh, weight_update="folded")
    resumed.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert same(whole(fresh), trained)
