"""Checkpoints of runs on several ranks: onto the same ranks and others, between FSDP2, tensor parallelism and DDP.

The gradients are the same in every form, so that what is resumed equals one process that was never interrupted.
"""

import copy
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import deltaopt
from deltaopt import RanksDisagreeError, WeightMismatchError
from deltaopt.__main__ import main
from deltaopt.sharding import put_whole_
from tests.support.compare import same
from tests.support.distributed import on_all_ranks
from tests.support.internals import as_schema_4
from tests.support.nightly import later, one_in
from tests.support.placed_runs import FORMS, PlacedRun, placed, whole
from tests.support.sharded import S0, WHOLE, Run, linear
from tests.support.sharded_runs import LAST_PLACES, ShardedRun
from tests.support.strategies import RULES, each_rule
from tests.support.threads import on_threads

# torch says so of a checkpoint of one process.
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)

STOP, END = 4, 6
SHARDED = [form for form in FORMS if form not in ("whole", "ddp")]
ON_RANKS = ["ddp", *SHARDED]
WHOLE_STATE = {"full_state_dict": True, "cpu_offload": True}

REBUILT = {"rtol": 1e-5, "atol": 1e-6}
"""Of a float32 W that was rebuilt from its base."""


def begun(form: str, kind: str, rule: str) -> PlacedRun:
    """A run with several terms, an anchor, and a start that took its product out of W."""
    run = PlacedRun(form, kind, weight_update=rule, start_step=1, started=True).train(range(2))
    run.optimizer.groups[0].update_ratio = 1.1
    return run.train(range(2, STOP))


def fresh(form: str, kind: str, rule: str) -> PlacedRun:
    """What a new process has: other settings and other weights."""
    return PlacedRun(form, kind, weight_update=rule, start_step=99, started=True).scramble()


def assert_same(run: PlacedRun | dict[str, Any], other: PlacedRun | dict[str, Any]) -> None:
    """All that a checkpoint brings back is equal bit for bit."""
    found, expected = (each.all_of_it() if isinstance(each, PlacedRun) else each for each in (other, run))
    assert found.keys() == expected.keys()
    assert [name for name in found if not same(found[name], expected[name])] == []


def assert_close(run: PlacedRun, other: PlacedRun, **tolerance: float) -> None:
    """The weights are equal bit for bit in 16 bits, and up to a tolerance in float32."""
    for (name, p), q in zip(run.model.named_parameters(), other.model.parameters(), strict=True):
        limits = (tolerance or LAST_PLACES) if p.dtype == torch.float32 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(whole(q), whole(p), **limits, msg=lambda text, name=name: f"{name}: {text}")


CASES = [
    *[("in_place", "bfloat16-compensated", form) for form in ("ddp", "fsdp", "tp")],
    ("in_place", "float32", "fsdp"),
    ("folded", "float32", "fsdp"),
    *[
        later(*case)
        for case in [
            *[("in_place", "bfloat16-compensated", form) for form in ON_RANKS if form not in ("ddp", "fsdp", "tp")],
            ("in_place", "bfloat16", "tp"),
            ("folded", "float32", "ddp"),
            ("folded", "float32", "tp"),
            ("folded", "bfloat16-compensated", "fsdp"),
        ]
    ],
]


@pytest.mark.parametrize(("rule", "kind", "form"), CASES)
def test_a_distributed_checkpoint_is_loaded_into_every_form(rule, kind, form, tmp_path):
    on_all_ranks(every_form_on_rank, rule, kind, form, tmp_path)


def every_form_on_rank(rank: int, rule: str, kind: str, form: str, folder: Path) -> None:
    run = begun(form, kind, rule)
    run.save(folder)
    others = [fresh(other, kind, rule).load(folder) for other in ON_RANKS]
    for other in others:
        assert_same(run, other)
    run.train(range(STOP, END))
    for name, other in zip(ON_RANKS, others, strict=True):
        other.train(range(STOP, END))
        if name == form:
            assert_same(run, other)
        else:
            assert_close(run, other)


# another number of ranks


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("form", "rule"), one_in(2, ["fsdp", "tp"], RULES))
def test_two_ranks_continue_as_one(form, rule, tmp_path, one_rank):
    kind = "bfloat16-compensated"
    saved, _ = on_all_ranks(saved_on_rank, form, kind, rule, tmp_path / "saved")
    for found in (fresh("whole", kind, rule), fresh(form, kind, rule)):
        found.load(tmp_path / "saved")
        assert_same(saved, found)
        assert_close(begun("whole", kind, rule).train(range(STOP, END)), found.train(range(STOP, END)))


def saved_on_rank(rank: int, form: str, kind: str, rule: str, folder: Path) -> dict[str, Any]:
    run = begun(form, kind, rule)
    run.save(folder)
    return run.all_of_it()


@each_rule
def test_one_process_continues_as_two_ranks(rule, tmp_path):
    begun("whole", "bfloat16-compensated", rule).save(tmp_path)
    on_all_ranks(continued_on_rank, "bfloat16-compensated", rule, tmp_path)


def continued_on_rank(rank: int, kind: str, rule: str, folder: Path) -> None:
    for form in ON_RANKS:
        expected = begun("whole", kind, rule)
        found = fresh(form, kind, rule).load(folder)
        assert_same(expected, found)
        assert_close(expected.train(range(STOP, END)), found.train(range(STOP, END)))


# whole states


def load_whole(run: PlacedRun, state: dict[str, Any], **options: Any) -> None:
    """Model first, see docs/resume.md."""
    given = dcp.StateDictOptions(**WHOLE_STATE, **options)
    dcp.set_model_state_dict(run.model, state["model"], options=given)
    dcp.set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"], options=given)


@pytest.mark.parametrize(("kind", "rule"), one_in(2, ["bfloat16-compensated", "float32"], RULES))
def test_a_whole_state_is_loaded_into_every_form(kind, rule):
    on_all_ranks(whole_state_on_rank, kind, rule)


def whole_state_on_rank(rank: int, kind: str, rule: str) -> None:
    run = begun("fsdp", kind, rule)
    state = run.states(**WHOLE_STATE)
    assert bool(state["optimizer"]) == (rank == 0)
    for form in ON_RANKS:
        other = fresh(form, kind, rule)
        for _ in range(2):  # a folded branch is scaled the second time
            load_whole(other, copy.deepcopy(state), broadcast_from_rank0=True)
            assert_same(run, other)
    on_both: list[Any] = [state]
    dist.broadcast_object_list(on_both)
    other = fresh("tp", kind, rule)
    load_whole(other, on_both[0])
    assert_same(run, other)


@pytest.mark.parametrize("rule", ["in_place", "folded"])
def test_a_whole_state_in_a_file_is_inspected_by_the_command_line(rule, tmp_path, capsys):
    on_all_ranks(file_on_rank, rule, tmp_path / "last.pt")
    assert main(["inspect", str(tmp_path / "last.pt")]) == 0
    said, errors = capsys.readouterr()
    assert errors == ""
    assert f"weight_update '{rule}'" in said
    assert "steps: 4; update_ratio 1.1, start_step 1" in said
    assert "3 of 3" in said


def file_on_rank(rank: int, rule: str, path: Path) -> None:
    state = begun("fsdp", "bfloat16-compensated", rule).states(**WHOLE_STATE)
    if rank == 0:
        torch.save(state, path)


@each_rule
def test_a_checkpoint_that_is_written_meanwhile_has_the_state_of_its_beginning(rule, tmp_path):
    on_all_ranks(asynchronous_on_rank, rule, tmp_path)


def asynchronous_on_rank(rank: int, rule: str, folder: Path) -> None:
    run = begun("fsdp", "bfloat16-compensated", rule)
    expected = run.all_of_it()
    group = dist.new_group(backend="gloo")
    response = checkpoint.async_save(run.states(), checkpoint_id=folder, process_group=group)
    run.train(range(STOP, END))
    response.result()
    other = fresh("fsdp", "bfloat16-compensated", rule).load(folder)
    assert_same(expected, other.all_of_it())
    assert_same(run, other.train(range(STOP, END)))


# the adapter alone


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("float32", "in_place"),
        ("bfloat16-compensated", "in_place"),
        ("float32", "folded"),
        later("bfloat16-compensated", "folded"),
    ],
)
def test_an_adapter_resumes_in_every_form_from_the_pristine_base(kind, rule, tmp_path):
    on_all_ranks(adapter_on_rank, kind, rule, tmp_path)


def adapter_on_rank(rank: int, kind: str, rule: str, folder: Path) -> None:
    trained = {"ignore_frozen_params": True, "strict": False}
    run = begun("fsdp", kind, rule)
    checkpoint.save(run.states(**trained), checkpoint_id=folder)
    run.train(range(STOP, END))
    for form in ON_RANKS:
        other = PlacedRun(form, kind, weight_update=rule, start_step=99, started=True)
        with torch.no_grad():
            for p in other.factors():
                p.add_(placed(torch.ones(p.shape), p))
        states = other.states(**trained)
        checkpoint.load(states, checkpoint_id=folder)
        dcp.set_state_dict(
            other.model,
            other.optimizer,
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
            options=dcp.StateDictOptions(**trained),
        )
        assert_close(run, other.train(range(STOP, END)), **REBUILT)


def test_an_earlier_state_of_another_form_moves_w_back(tmp_path):
    """resync(state) gets the state of the sharded run that was saved, as a run of another form has loaded it."""
    on_all_ranks(recall_on_rank, tmp_path)


def recall_on_rank(rank: int, folder: Path) -> None:
    begun("fsdp", "float32", "in_place").save(folder)
    for form in ("tp", "ddp"):
        run = fresh(form, "float32", "in_place").load(folder)
        expected = [whole(p) for p in run.model.parameters()]
        state = copy.deepcopy(run.optimizer.state_dict())
        factors = [whole(p) for p in run.factors()]
        run.train(range(STOP, END))
        for p, value in zip(run.factors(), factors, strict=True):
            put_whole_(p, value)
        run.optimizer.resync(state)
        for p, before in zip(run.model.parameters(), expected, strict=True):
            torch.testing.assert_close(whole(p), before, **REBUILT)


# states of earlier versions


def as_schema_5(state: dict[str, Any]) -> dict[str, Any]:
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group["deltaopt"] = {**group["deltaopt"], "schema": 5}
    for entries in state["state"].values():
        for key in [key for key in entries if "compensation" in key]:
            entries[key] = entries[key].view(torch.int16).squeeze(-1)
    return state


EARLIER: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    4: lambda state: as_schema_4(as_schema_5(state)),
    5: as_schema_5,
}


@pytest.mark.parametrize("schema", EARLIER)
def test_a_state_of_an_earlier_version_is_loaded_into_every_form(schema):
    on_all_ranks(earlier_on_rank, schema)


def earlier_on_rank(rank: int, schema: int) -> None:
    run = begun("whole", "bfloat16", "in_place")
    state = {"model": run.model.state_dict(), "optimizer": EARLIER[schema](run.states()["optimizer"])}
    for form in ON_RANKS:
        other = fresh(form, "bfloat16", "in_place")
        load_whole(other, copy.deepcopy(state))
        assert_same(run, other)


@pytest.mark.parametrize("schema", EARLIER)
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_a_compensation_of_an_earlier_version_is_cut_as_w(placement, schema):
    on_all_ranks(earlier_compensation_on_rank, placement, schema)


def earlier_compensation_on_rank(rank: int, placement: Any, schema: int) -> None:
    layers, placements = [linear(9, 6, 2)], ([placement],) * 3
    options = {"rounding": "compensated"}
    alone = Run(layers, torch.bfloat16, **options)
    run = Run(layers, torch.bfloat16, placements, init_device_mesh("cpu", (2,)), **options)
    alone.steps(2)
    state = EARLIER[schema](alone.optimizer.state_dict())
    for tensors, given in zip(run.tensors, alone.tensors, strict=True):
        for p, value in zip(tensors, given, strict=True):
            put_whole_(p, value.detach())
    run.optimizer.load_state_dict(state)
    [(found, expected)] = [
        (here[key], there[key])
        for here, there in zip(*(r.optimizer.state_dict()["state"].values() for r in (run, alone)), strict=True)
        for key in there
        if "compensation" in key
    ]
    assert expected.any()
    assert torch.equal(whole(found), expected)


# the state before training


@pytest.mark.parametrize("form", ["fsdp", "tp"])
@each_rule
def test_asking_for_the_state_before_training_is_no_step(rule, form):
    on_all_ranks(asking_on_rank, rule, form)


def asking_on_rank(rank: int, rule: str, form: str) -> None:
    options = {"weight_update": rule, "start_step": 2, "inner": torch.optim.SGD, "momentum": 0.9}
    run, other = PlacedRun(form, **options), PlacedRun(form, **options)
    for _ in range(2):
        dcp.get_optimizer_state_dict(run.model, run.optimizer)
    assert run.optimizer.step_count == 0
    for each in (run, other):
        each.train(range(STOP))
    assert_same(run, other)


def test_a_gradient_that_is_zero_on_one_rank_alone_makes_a_step_of_all():
    """Plain factors next to a sharded W, in the first step of a schedule that begins at lr = 0."""
    assert on_all_ranks(zero_on_rank) == [1, 1]


def zero_on_rank(rank: int) -> int:
    run = Run([linear(8, 6, 2)], torch.float32, ([S0], WHOLE, WHOLE), init_device_mesh("cpu", (2,)), rank_timeout=5.0)
    run.optimizer.param_groups[0]["lr"] = 0.0
    for _, *factors in run.tensors:
        for p in factors:
            p.grad = torch.full_like(p, float(rank))
    run.optimizer.step()
    return run.optimizer.step_count


# what goes wrong


class FullOnRankOne(FileSystemWriter):
    def write_data(self, *arguments: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write_data(*arguments)


def test_a_full_disk_on_one_rank_is_named_on_all_and_nothing_is_lost(tmp_path):
    on_all_ranks(full_disk_on_rank, tmp_path)


def full_disk_on_rank(rank: int, folder: Path) -> None:
    run, other = begun("fsdp", "bfloat16", "in_place"), begun("fsdp", "bfloat16", "in_place")
    run.save(folder)
    with pytest.raises(checkpoint.api.CheckpointException, match=r"(?s)ranks:dict_keys\(\[1\]\).*No space left"):
        checkpoint.save(run.states(), storage_writer=FullOnRankOne(folder / "full"))
    assert_same(run, other)
    for each in (run, other):
        each.train(range(STOP, END))
    assert_same(run, other)
    resumed = fresh("fsdp", "bfloat16", "in_place").load(folder)
    assert_same(run, resumed.train(range(STOP, END)))


def test_a_rank_that_cannot_write_its_own_file_loses_nothing(tmp_path):
    """The state is a collective, and the file is a call of each rank: the others have theirs, and all go on."""
    on_all_ranks(own_full_disk_on_rank, tmp_path)


def own_full_disk_on_rank(rank: int, folder: Path) -> None:
    run, other = begun("fsdp", "bfloat16", "in_place"), begun("fsdp", "bfloat16", "in_place")
    own = folder / f"rank{rank}.pt"
    deltaopt.save(run.states(full_state_dict=True), own)
    before, saved = own.read_bytes(), None

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run.train([STOP])
    with mock.patch("torch.save", full if rank == 1 else torch.save):
        try:
            deltaopt.save(run.states(full_state_dict=True), own)
        except OSError as error:
            saved = error
    assert (saved is not None) == (rank == 1)
    assert (own.read_bytes() == before) == (rank == 1)
    dist.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["rank0.pt", "rank1.pt"]
    dist.barrier()
    assert_same(run, other.train([STOP]))
    for each in (run, other):
        each.train(range(STOP + 1, END))
    assert_same(run, other)
    deltaopt.save(run.states(full_state_dict=True), own)
    resumed = fresh("fsdp", "bfloat16", "in_place")
    load_whole(resumed, deltaopt.load(own))
    for each in (run, resumed):
        each.train([END])
    assert_same(run, resumed)


def test_ranks_that_load_different_files_are_told():
    on_all_ranks(different_files_on_rank)


def different_files_on_rank(rank: int) -> None:
    run = begun("fsdp", "float32", "in_place")
    states = [copy.deepcopy(run.optimizer.state_dict())]
    states.append(copy.deepcopy(run.train([STOP]).optimizer.state_dict()))
    before = run.all_of_it()
    with pytest.raises(RanksDisagreeError, match="step count: 4 on rank 0, 5 on rank 1"):
        run.optimizer.load_state_dict(states[rank])
    assert_same(before, run)


def test_a_compensation_that_one_rank_lacks_is_told():
    on_all_ranks(lacking_on_rank)


def lacking_on_rank(rank: int) -> None:
    run = begun("fsdp", "bfloat16-compensated", "in_place")
    before, state = run.all_of_it(), run.optimizer.state_dict()
    with pytest.raises(RanksDisagreeError, match="the saved compensations"):
        run.optimizer.load_state_dict(deltaopt.without_compensation(state) if rank else state)
    assert_same(before, run)


@pytest.mark.parametrize("placements", [[Shard(1)], [Replicate()], None], ids=str)
def test_a_compensation_in_another_placement_is_placed_as_w(placements):
    on_all_ranks(placement_on_rank, placements)


def placement_on_rank(rank: int, placements: Any) -> None:
    run = begun("fsdp", "bfloat16-compensated", "in_place")
    before, state = run.all_of_it(), copy.deepcopy(run.optimizer.state_dict())
    for entries in state["state"].values():
        for key in [key for key in entries if "compensation" in key]:
            of_all = whole(entries[key])
            mesh = entries[key].device_mesh
            entries[key] = of_all if placements is None else distribute_tensor(of_all, mesh, placements)
    run.optimizer.load_state_dict(state)
    assert_same(before, run)


def test_a_compensation_on_two_dimensions_in_another_order_is_placed_as_w():
    """Of a square W the parts have the same shape then."""
    on_threads(order_on_rank)


def order_on_rank(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    run = Run([linear(8, 8, 2)], torch.bfloat16, ([Shard(0), Shard(1)],) * 3, mesh, rounding="compensated")
    run.steps(2)
    state = copy.deepcopy(run.optimizer.state_dict())
    [(entries, key)] = [(e, key) for e in state["state"].values() for key in e if "compensation" in key]
    kept = entries[key].to_local().clone()
    [of_all] = deltaopt.sharding.gather_all([entries[key]])
    entries[key] = distribute_tensor(of_all, mesh, [Shard(1), Shard(0)], src_data_rank=None)
    run.optimizer.load_state_dict(state)
    [found] = [e[key] for e in run.optimizer.state_dict()["state"].values() if key in e]
    assert kept.any()
    assert torch.equal(found.to_local(), kept)


@pytest.mark.parametrize("kind", ["float32", "bfloat16-compensated"])
def test_the_file_that_one_rank_wrote_for_itself_is_refused_by_one_process(kind, tmp_path, one_rank):
    on_all_ranks(own_file_on_rank, kind, tmp_path)
    run = PlacedRun("whole", kind)
    state = torch.load(tmp_path / "0.pt", weights_only=True)
    match = r"holds one rank's part of sharded tensors of the ranks \[0, 1\], of which this job has no 1: .*full_state"
    with pytest.raises(ValueError, match=match):
        run.optimizer.load_state_dict(state)


def own_file_on_rank(rank: int, kind: str, folder: Path) -> None:
    """The ranks that wrote such files read them, each its own."""
    run = begun("fsdp", kind, "in_place")
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    torch.save(state["optimizer"], folder / f"{rank}.pt")
    other = fresh("fsdp", kind, "in_place")
    other.model.load_state_dict(state["model"])
    other.optimizer.load_state_dict(torch.load(folder / f"{rank}.pt", weights_only=True))
    assert_same(run, other)


def test_weights_of_another_checkpoint_are_refused_on_all_ranks():
    on_all_ranks(mismatch_on_rank)


def mismatch_on_rank(rank: int) -> None:
    """Rank 1 alone has other numbers."""
    run = begun("fsdp", "float32", "in_place")
    state = copy.deepcopy(run.optimizer.state_dict())
    with torch.no_grad():
        run.optimizer.triples[0].W.to_local().add_(float(rank))
    with pytest.raises(WeightMismatchError, match="l0: W has other contents"):
        run.optimizer.load_state_dict(state)


def test_what_one_rank_has_rebuilt_alone_decides_nothing():
    """It knows the bits of the rebuilt W from then on, and the other rank does not."""
    on_all_ranks(rebuilt_alone_on_rank)


def rebuilt_alone_on_rank(rank: int) -> None:
    run = begun("whole", "float32", "in_place")
    state, adapter = copy.deepcopy(run.optimizer.state_dict()), run.factors()
    if rank == 0:
        alone = PlacedRun("whole", "float32", started=True)
        for p, value in zip(alone.factors(), adapter, strict=True):
            put_whole_(p, value.detach())
        alone.optimizer.load_state_dict(copy.deepcopy(state))
    for form in ("fsdp", "tp"):
        other = PlacedRun(form, "float32", started=True)
        for p, value in zip(other.factors(), adapter, strict=True):
            put_whole_(p, value.detach())
        whole_state = dcp.StateDictOptions(**WHOLE_STATE)
        dcp.set_optimizer_state_dict(other.model, other.optimizer, run.states()["optimizer"], options=whole_state)
        assert_close(run, other, **REBUILT)


def test_a_run_of_real_passes_resumes_bit_for_bit(tmp_path):
    on_all_ranks(real_on_rank, tmp_path)


def real_on_rank(rank: int, folder: Path) -> None:
    run = ShardedRun(rank, "bfloat16-compensated").train(3)
    model = run.new_model()
    optimizer = run.new_optimizer(model, start_step=99)
    names = ("model", "optimizer")
    run.optimizer.zero_grad()
    saved = dict(zip(names, dcp.get_state_dict(run.model, run.optimizer), strict=True))
    checkpoint.save(saved, checkpoint_id=folder)
    loaded = dict(zip(names, dcp.get_state_dict(model, optimizer), strict=True))
    checkpoint.load(loaded, checkpoint_id=folder)
    dcp.set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for _ in range(2):
        run.backward(model, run.t)
        optimizer.step()
        run.train()
    for p, q in zip(model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(whole(p), whole(q))
