"""torch.distributed.checkpoint, in one process: asking for a state is no step, and a loaded state resumes."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.parallel import DistributedDataParallel

from deltaopt.checkpoint.compensation import compensation_bits
from tests.support.compare import assert_same_bits, bits
from tests.support.distributed import assert_same_on_all_ranks, on_all_ranks, shares
from tests.support.internals import as_schema_4, compensation_of, terms_of
from tests.support.models import batches, layers
from tests.support.nightly import one_in
from tests.support.peft_runs import (
    DATA,
    RATIO,
    STARTS,
    STOP,
    K,
    ModelRun,
    ScheduledRun,
    assert_models_close,
    assert_rebuilds_bfloat16_with_one_rounding,
    assert_resumes_bit_for_bit,
    assert_resumes_to_rounding,
    assert_same_runs,
    begun,
    each_kind,
    fresh,
    peft_asks_by_an_old_name,
    scramble,
)
from tests.support.strategies import RULES, each_rule

pytestmark = [
    peft_asks_by_an_old_name,
    # torch says so of a checkpoint of one process, which is what these tests write.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
]

STATEFUL_AND_NOT: dict[str, dict[str, Any]] = {
    "AdamW": {"inner": torch.optim.AdamW, "weight_decay": 0.1},
    "AdamW_fused": {"inner": torch.optim.AdamW, "fused": True},
    "SGD": {"inner": torch.optim.SGD, "momentum": 0.9},
    "SGD_stateless": {"inner": torch.optim.SGD},
}
each_inner = pytest.mark.parametrize("inner", STATEFUL_AND_NOT)


@each_inner
@each_rule
def test_asking_for_the_optimizer_state_does_not_count_as_a_step(inner, rule):
    """A distributed checkpoint makes an empty state by one step with lr = 0: K must not come a step early."""

    def begin() -> ModelRun:
        return ModelRun(rule, "later", start_step=2, **STATEFUL_AND_NOT[inner])

    def has_moved(run: ModelRun) -> list[bool]:
        W = {triple.name: triple.W for triple in run.optimizer.triples}
        return [not torch.equal(W[name], start[f"{name}.base_layer.weight"]) for name in W]

    run = begin()
    start, scalings = bits(run.model), run.scalings()
    dcp.get_optimizer_state_dict(run.model, run.optimizer)
    dcp.get_optimizer_state_dict(run.model, run.optimizer)
    assert run.optimizer.step_count == 0
    assert_same_bits(run.model, start)
    assert run.scalings() == scalings

    for r in (run, begin()):
        r.train(batches(2))
        assert not any(has_moved(r))
        assert r.scalings() == scalings
        r.train(batches(1, seed=2))
        assert r.optimizer.step_count == 3
        assert all(has_moved(r))  # the folded rule takes the product of step K from W
        assert (r.scalings() == scalings) == (rule == "in_place")


@each_inner
@each_rule
def test_asking_for_the_state_of_a_run_does_not_count_as_a_step(inner, rule):
    """An inner optimizer without a state, as SGD without momentum, is stepped with lr = 0 each time it is saved."""
    run = ModelRun(rule, "later", start_step=0, **STATEFUL_AND_NOT[inner]).train(batches(2))
    run.optimizer.zero_grad()
    before, scalings = bits(run.model), run.scalings()
    dcp.get_optimizer_state_dict(run.model, run.optimizer)
    assert run.optimizer.step_count == 2
    assert_same_bits(run.model, before)
    assert run.scalings() == scalings


@pytest.mark.parametrize(("inner", "rule", "start", "stop"), one_in(2, STATEFUL_AND_NOT, RULES, STARTS, [2, 5]))
def test_a_round_trip_resumes_bit_for_bit(inner, rule, start, stop):
    """From before K, where the branch of a fresh model has the saved scaling, and from after it."""
    data, options = batches(8), STATEFUL_AND_NOT[inner]
    run = ModelRun(rule, start, **options).train(data[:stop])
    run.optimizer.zero_grad()
    model_state = copy.deepcopy(dcp.get_model_state_dict(run.model))
    state = copy.deepcopy(dcp.get_optimizer_state_dict(run.model, run.optimizer))
    run.train(data[stop:])

    other = ModelRun(rule, start, start_step=K + 2, **options)
    dcp.set_model_state_dict(other.model, model_state)
    dcp.set_optimizer_state_dict(other.model, other.optimizer, state)
    assert other.optimizer.step_count == stop
    assert other.optimizer.groups[0].start_step == STARTS[start]["start_step"]
    if inner.startswith("AdamW"):
        assert all(float(s["step"]) == stop for s in other.optimizer.state.values())
        assert len(other.optimizer.state) == 2 * len(layers(other.model))
    other.train(data[stop:])
    assert_same_runs(run, other)


def dcp_save(run: ScheduledRun, folder: Path, **options: Any) -> None:
    states = dcp.get_state_dict(run.model, run.optimizer, options=dcp.StateDictOptions(**options))
    state = {**dict(zip(("model", "optimizer"), states, strict=True)), **run.small_state()}
    checkpoint.save(state, checkpoint_id=folder)


def dcp_load(run: ScheduledRun, folder: Path, **options: Any) -> None:
    """Load by torch's recipe: the state of the fresh objects says what is read from the files."""
    options = dcp.StateDictOptions(**options)
    model, optimizer = dcp.get_state_dict(run.model, run.optimizer, options=options)
    state = {"model": model, "optimizer": optimizer, **run.small_state()}
    checkpoint.load(state, checkpoint_id=folder)
    dcp.set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    run.load_small(state)


FULL_STATES = {"full_state_dict": True, "cpu_offload": True}


def full_dcp_save(run: ScheduledRun, folder: Path) -> None:
    options = dcp.StateDictOptions(**FULL_STATES)
    state = {
        "model": dcp.get_model_state_dict(run.model, options=options),
        "optimizer": dcp.get_optimizer_state_dict(run.model, run.optimizer, options=options),
    }
    torch.save({**state, **run.small_state()}, folder / "last.pt")


def full_dcp_load(run: ScheduledRun, folder: Path) -> None:
    state = torch.load(folder / "last.pt", weights_only=True)
    options = dcp.StateDictOptions(**FULL_STATES)
    dcp.set_model_state_dict(run.model, state["model"], options=options)
    dcp.set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"], options=options)
    run.load_small(state)


WHOLE_CHECKPOINTS = {"files": (dcp_save, dcp_load), "full_states": (full_dcp_save, full_dcp_load)}
WITHOUT_FROZEN: dict[str, Any] = {"ignore_frozen_params": True, "strict": False}
ADAPTER_CHECKPOINT = tuple(functools.partial(function, **WITHOUT_FROZEN) for function in (dcp_save, dcp_load))


@each_kind
@pytest.mark.parametrize("way", WHOLE_CHECKPOINTS)
def test_with_the_whole_model_a_run_resumes_bit_for_bit(way, dtype, rounding, tmp_path):
    assert_resumes_bit_for_bit(WHOLE_CHECKPOINTS[way], tmp_path, dtype, rounding)


@pytest.mark.parametrize("start_step", [1, STOP + 2])
def test_from_the_base_and_the_trained_parameters_a_run_resumes_to_rounding(start_step, tmp_path):
    """W had moved when it was saved, or had not yet."""
    assert_resumes_to_rounding(ADAPTER_CHECKPOINT, tmp_path, start_step)


def test_a_bfloat16_weight_is_rebuilt_with_one_rounding_and_says_so(tmp_path):
    assert_rebuilds_bfloat16_with_one_rounding(ADAPTER_CHECKPOINT, tmp_path)


@each_rule
def test_torchs_recipe_brings_the_factors_back(rule, tmp_path):
    """It loads into the parameters themselves, then the optimizer's state, and the parameters into themselves last."""
    run, twin = ModelRun(rule).train(DATA[:STOP]), ModelRun(rule, start_step=99)
    scramble(twin.model, lambda _: True)
    run.optimizer.zero_grad()
    for each, call in ((run, checkpoint.save), (twin, checkpoint.load)):
        model, optimizer = dcp.get_state_dict(each.model, each.optimizer)
        call({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path)
    dcp.set_state_dict(twin.model, twin.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    for each in (run, twin):
        each.train(DATA[STOP:])
    assert_same_runs(run, twin)


def test_ledgers_of_several_terms_reach_a_fresh_optimizer(tmp_path):
    """The fresh optimizer says what is read, and has no term of its own."""
    run, others = begun(), (fresh(), fresh(pristine=True))
    for ratio, data in ((RATIO, DATA[:2]), (1.1, DATA[2:4]), (0.4, DATA[4:6])):
        run.optimizer.groups[0].update_ratio = ratio
        run.train(data)
    assert all(len(terms_of(run.optimizer, i)) == 3 for i in range(len(run.optimizer.triples)))
    dcp_save(run, tmp_path / "whole")
    dcp_save(run, tmp_path / "adapter", **WITHOUT_FROZEN)
    dcp_load(others[0], tmp_path / "whole")
    dcp_load(others[1], tmp_path / "adapter", **WITHOUT_FROZEN)
    for r in (run, *others):
        assert r.optimizer.groups[0].update_ratio == 0.4
        r.train(DATA[6:])
    assert_same_runs(run, others[0])
    assert_models_close(run.model, others[1].model)


def test_a_checkpoint_of_schema_4_is_loaded_by_a_planner_that_allows_missing_keys(tmp_path):
    """It has no key for the ledger of each triple, which the template of a fresh optimizer asks for."""
    run, other = begun(), fresh()
    run.train(DATA[:STOP])
    model, optimizer = dcp.get_state_dict(run.model, run.optimizer)
    checkpoint.save(
        {"model": model, "optimizer": as_schema_4(optimizer), **run.small_state()}, checkpoint_id=tmp_path / "old"
    )
    model, optimizer = dcp.get_state_dict(other.model, other.optimizer)
    state = {"model": model, "optimizer": optimizer, **other.small_state()}
    planner = checkpoint.DefaultLoadPlanner(allow_partial_load=True)
    checkpoint.load(state, checkpoint_id=tmp_path / "old", planner=planner)
    dcp.set_state_dict(
        other.model, other.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    other.load_small(state)
    for r in (run, other):
        r.train(DATA[STOP:])
    assert_same_runs(run, other)


def test_a_compensation_of_an_earlier_version_comes_through_one_file(tmp_path):
    """It was int16 of W's shape, for which the template of a fresh optimizer has no place."""
    options = {"dtype": torch.bfloat16, "factors": torch.float32, "rounding": "compensated"}
    run, other = ModelRun(**options).train(batches(3)), ModelRun(**options)
    run.optimizer.zero_grad()
    model, optimizer = copy.deepcopy(dcp.get_state_dict(run.model, run.optimizer))
    for entries in optimizer["state"].values():
        for key in [key for key in entries if "compensation" in key]:
            entries[key] = compensation_bits(entries[key])
    checkpoint.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path / "old")
    model, optimizer = dcp.get_state_dict(other.model, other.optimizer)
    with pytest.raises(CheckpointException, match=r"Size mismatch between saved .* for optimizer.*compensation"):
        checkpoint.load({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path / "old")
    dcp_to_torch_save(tmp_path / "old", tmp_path / "old.pt")
    state = torch.load(tmp_path / "old.pt", weights_only=True)
    dcp.set_model_state_dict(other.model, state["model"])
    dcp.set_optimizer_state_dict(other.model, other.optimizer, state["optimizer"])
    for r in (run, other):
        r.train(batches(3, seed=2))
    assert_same_bits(other.model, bits(run.model))
    assert torch.equal(compensation_of(other.optimizer), compensation_of(run.optimizer))


def test_saving_a_flattened_optimizer_state_is_refused():
    """By torch: it would drop what differs between the parameters and is no tensor."""
    run = begun()
    run.train(DATA[:2])
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=True)
    with pytest.raises(NotImplementedError, match=r"Flattening optimizer state_dict only supports .*'str'"):
        dcp.get_optimizer_state_dict(run.model, run.optimizer, options=options)


def test_a_compensated_run_on_two_ranks_resumes_from_a_state_on_one_rank():
    """Torch sends it tensor by tensor, and there is no int16 to send. set_state_dict would load the model last."""
    on_all_ranks(compensated_on_rank)


def compensated_on_rank(rank: int) -> None:
    def new() -> ModelRun:
        run = ModelRun(dtype=torch.bfloat16, factors=torch.float32, rounding="compensated")
        run.model = DistributedDataParallel(run.model)
        return run

    run, twin = new(), new()
    run.train(shares(batches(3), rank))
    run.optimizer.zero_grad()
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    model, state = copy.deepcopy(dcp.get_state_dict(run.model, run.optimizer, options=options))
    assert bool(model) == bool(state) == (rank == 0)
    dcp.set_model_state_dict(twin.model, model, options=options)
    dcp.set_optimizer_state_dict(twin.model, twin.optimizer, state, options=options)
    assert twin.optimizer.step_count == 3
    for r in (run, twin):
        r.train(shares(batches(3, seed=2), rank))
    assert_same_bits(twin.model, bits(run.model))
    for i in range(len(run.optimizer.triples)):
        kept = compensation_of(run.optimizer, i)
        assert kept.any()
        assert torch.equal(compensation_of(twin.optimizer, i), kept)
    assert_same_on_all_ranks(twin.model)
