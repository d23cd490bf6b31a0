"""FSDP2 in place: each rank moves its piece of W, as one process would move all of it. One test per behaviour."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import deltaopt
from deltaopt import DeltaLoRAOptimizer, export_adapter, merged_weights
from deltaopt.analysis import layer_changes
from deltaopt.metrics import movement_metrics
from tests.support.distributed import on_all_ranks
from tests.support.nightly import later, one_in
from tests.support.sharded_runs import (
    KINDS,
    WAYS,
    Branched,
    ShardedRun,
    branched,
    net,
    shard,
    switch,
    triples_of,
    whole,
)
from tests.support.threads import on_threads

each_kind = pytest.mark.parametrize("kind", KINDS)
SOME_KINDS = ["float32", "bfloat16", "bfloat16-compensated"]
some_kinds = pytest.mark.parametrize("kind", SOME_KINDS)

COMPUTED = {"rtol": 1e-5, "atol": 1e-6}
"""Of float32 numbers of order 1 that went through a few sums."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [pytest.param("float32", marks=pytest.mark.nightly), "bfloat16"])
def test_weights_move_as_in_one_process(way, kind):
    on_all_ranks(moves_on_rank, way, kind)


def moves_on_rank(rank: int, way: str, kind: str) -> None:
    run = ShardedRun(rank, kind, way).train(5)
    run.assert_follows()
    run.assert_moved()


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "float32" else later(kind) for kind in KINDS],
)
def test_fifty_steps_do_not_drift_apart(kind):
    on_all_ranks(fifty_steps_on_rank, kind)


def fifty_steps_on_rank(rank: int, kind: str) -> None:
    run = ShardedRun(rank, kind).train(50)
    run.assert_follows(**({"rtol": 1e-5, "atol": 1e-6} if kind == "float32" else {}))


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("layers", "float32"),
        ("one piece, not resharded", "bfloat16"),
        ("columns", "float32"),
        ("factors ignored", "bfloat16"),
    ],
)
def test_hybrid_sharding_moves_every_replica_alike(way, kind):
    on_threads(hybrid_on_rank, way, kind)


def hybrid_on_rank(rank: int, way: str, kind: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    run = ShardedRun(rank, kind, way, world=4, mesh=mesh, keep_base="cpu").train(3)
    run.assert_follows()
    run.both(lambda optimizer: optimizer.restart())
    run.train(2).assert_follows()
    run.assert_moved()
    parts = [torch.empty_like(W.to_local()) for W in run.weights(run.model) for _ in range(2)]
    for i, W in enumerate(run.weights(run.model)):
        dist.all_gather(parts[2 * i : 2 * i + 2], W.to_local(), group=mesh.get_group("replicas"))
        assert torch.equal(parts[2 * i], parts[2 * i + 1])
    assert_same_displacements(run)
    reports = run.both(lambda optimizer: optimizer.report())
    assert str(reports[0]) == str(reports[1])
    with run.optimizer.base_weights():
        for W, base in zip(run.weights(run.model), run.weights(run.frozen), strict=True):
            assert torch.equal(whole(W), base)


SETTINGS: dict[str, dict[str, Any]] = {
    "start_step": {"start_step": 2},
    "start_step, from zero": {"start_step": 2, "zero": True},
    "a schedule": {"update_ratio": lambda t: 1 + 0.5 * t},
    "a schedule that rests": {"update_ratio": lambda t: float(t % 2)},
}


@pytest.mark.parametrize(("setting", "kind"), one_in(2, SETTINGS, SOME_KINDS))
def test_ratios_and_start_steps_hold(setting, kind):
    on_all_ranks(setting_on_rank, setting, kind)


def setting_on_rank(rank: int, setting: str, kind: str) -> None:
    run = ShardedRun(rank, kind, **SETTINGS[setting]).train(5)
    run.assert_follows()
    run.assert_moved()
    assert_same_displacements(run)


def assert_same_displacements(run: ShardedRun) -> None:
    for triple in run.optimizer.triples:
        found, expected = run.both(lambda optimizer, name=triple.label: optimizer.displacement(name).product())
        assert found.norm() > 0
        torch.testing.assert_close(found, expected, **COMPUTED)


def outside_change(run: ShardedRun) -> None:
    """Somebody else writes A; in both runs."""
    with torch.no_grad():
        for model in (run.model, run.alone):
            for layer in branched(model):
                layer.A.mul_(0.75)


def resync(run: ShardedRun) -> None:
    outside_change(run)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*in one rounded step")
        run.both(lambda optimizer: optimizer.resync())


def recall(run: ShardedRun) -> None:
    """Back to an earlier state, with its factors."""
    states = run.both(lambda optimizer: copy.deepcopy(optimizer.state_dict()))
    factors = [whole(p) for p in run.factors(run.model)]
    run.train(2)
    with torch.no_grad():
        for model in (run.model, run.alone):
            for p, value in zip(run.factors(model), factors, strict=True):
                deltaopt.sharding.put_whole_(p, value)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*in one rounded step")
        for optimizer, state in zip((run.optimizer, run.reference), states, strict=True):
            optimizer.resync(state)


def change_between_steps(run: ShardedRun) -> None:
    outside_change(run)
    with pytest.warns(UserWarning, match=r"A and B of 3 layers .*were changed between two steps"):
        run.train(1)


EVENTS: dict[str, Callable[[ShardedRun], Any]] = {
    "restart": lambda run: run.both(lambda optimizer: optimizer.restart()),
    "restart with a generator": lambda run: run.both(
        lambda optimizer: optimizer.restart(generator=torch.Generator().manual_seed(7))
    ),
    "rebase": lambda run: run.both(lambda optimizer: optimizer.rebase()),
    "resync": resync,
    "recall": recall,
    "a change from outside": change_between_steps,
    "another ratio": lambda run: run.both(lambda optimizer: setattr(optimizer.groups[0], "update_ratio", 0.5)),
}


@pytest.mark.parametrize(("event", "kind"), one_in(2, EVENTS, SOME_KINDS))
def test_an_event_moves_what_it_moves_in_one_process(event, kind):
    on_all_ranks(event_on_rank, event, kind)


def event_on_rank(rank: int, event: str, kind: str) -> None:
    run = ShardedRun(rank, kind).train(2)
    EVENTS[event](run)
    run.assert_follows()
    run.train(2).assert_follows()
    assert_same_displacements(run)
    changes = run.both(lambda optimizer: export_adapter(optimizer))
    for name, change in changes[0].items():
        torch.testing.assert_close(change.product(), changes[1][name].product(), **COMPUTED)


@each_kind
def test_merged_weights_are_sharded_as_the_weights(kind):
    on_all_ranks(merged_on_rank, kind)


def merged_on_rank(rank: int, kind: str) -> None:
    run = ShardedRun(rank, kind).train(3)
    merged, expected = run.both(merged_weights)
    for triple, (name, W) in zip(run.optimizer.triples, merged.items(), strict=True):
        assert isinstance(W, DTensor)
        assert W.placements == triple.W.placements
        run.assert_as(whole(W), expected[name], **({} if kind != "float32" else COMPUTED))
    run.assert_follows()


@pytest.mark.parametrize("kind", ["bfloat16", "bfloat16-compensated"])
def test_residuals_are_sharded_as_the_weights(kind):
    on_all_ranks(residual_on_rank, kind)


def residual_on_rank(rank: int, kind: str) -> None:
    run = ShardedRun(rank, kind, keep_base="cpu" if kind == "bfloat16" else None).train(3)
    for triple in run.optimizer.triples:
        sources = [None, run.frozen.state_dict(), sharded_source(run)]
        expected = run.reference.residual(triple.label)
        assert expected.any()
        for source in sources:
            found = run.optimizer.residual(triple.label, source=source)
            assert isinstance(found, DTensor)
            assert found.placements == triple.W.placements
            torch.testing.assert_close(whole(found), expected, **COMPUTED)


def sharded_source(run: ShardedRun) -> dict[str, Tensor]:
    """Pristine weights that are sharded themselves."""
    return run.new_model(run.frozen.state_dict()).state_dict()


@pytest.mark.parametrize(
    ("kind", "keep_base"),
    [
        ("float32", None),
        ("bfloat16", None),
        ("bfloat16", "device"),
        *(
            later(*case)
            for case in [("float32", "device"), ("bfloat16-compensated", None), ("bfloat16-compensated", "device")]
        ),
    ],
)
def test_a_report_says_what_it_says_in_one_process(kind, keep_base):
    on_all_ranks(report_on_rank, kind, keep_base)


def report_on_rank(rank: int, kind: str, keep_base: str | None) -> None:
    run = ShardedRun(rank, kind, keep_base=keep_base).train(3)
    found, expected = run.both(lambda optimizer: optimizer.report())
    assert str(found) == str(expected)
    assert all(layer.moved for layer in found.layers)
    for layer, other in zip(found.layers, expected.layers, strict=True):
        assert layer.asked == pytest.approx(other.asked, rel=1e-5)
        assert layer.asked_relative == pytest.approx(other.asked_relative, rel=1e-5)
        assert (layer.kept is None) == (other.kept is None) == (kind == "bfloat16" and keep_base is None)
        assert layer.kept is None or layer.kept == pytest.approx(other.kept, rel=1e-4)
    assert_same_on_ranks(found.as_dict())


def assert_same_on_ranks(value: object) -> None:
    found: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    assert all(other == found[0] for other in found)


def test_figures_are_those_of_one_process():
    on_all_ranks(figures_on_rank)


def figures_on_rank(rank: int) -> None:
    run = ShardedRun(rank).train(3)
    found, expected = run.both(movement_metrics)
    assert found == pytest.approx(expected, rel=1e-5)
    assert_same_on_ranks(found)
    changes, others = run.both(layer_changes)
    for change, other in zip(changes, others, strict=True):
        assert change[1:] == pytest.approx(other[1:], rel=1e-5)
    assert_same_on_ranks(changes)
    untrained = layer_changes(triples_of(run.new_model(run.frozen.state_dict())))
    assert untrained[0].base_norm == pytest.approx(changes[0].base_norm, rel=1e-5)


def test_a_description_counts_what_a_rank_keeps():
    on_all_ranks(description_on_rank)


def description_on_rank(rank: int) -> None:
    run = ShardedRun(rank).train(2)
    row = deltaopt.describe(run.optimizer).rows[1]
    assert row.shape == (11, 18)
    assert row.dtype == "float32, sharded"
    A, B = run.factors(run.model)[2:4]
    assert row.kept_bytes == A.to_local().nbytes + B.to_local().nbytes
    assert deltaopt.describe(run.optimizer).kept_bytes == run.optimizer._rule.nbytes


def test_a_step_takes_one_gather_and_one_reduction():
    on_all_ranks(collectives_on_rank)


def collectives_on_rank(rank: int) -> None:
    run = ShardedRun(rank).train(2)
    run.backward(run.model, run.t)
    with CommDebugMode() as counted:
        run.optimizer.step()
    found = {str(name).rsplit(".", 1)[-1].strip("_"): count for name, count in counted.get_comm_counts().items()}
    assert found == {"allreduce": 1, "allgather_base": 1}


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_a_factor_that_is_not_finite_on_one_rank_stops_every_move(kind):
    on_all_ranks(nan_on_rank, kind)


def nan_on_rank(rank: int, kind: str) -> None:
    run = ShardedRun(rank, kind).train(2)
    before = [whole(W) for W in run.weights(run.model)]
    run.backward(run.model, run.t)
    if rank == 1:
        run.factors(run.model)[0].grad.to_local()[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="a LoRA factor became NaN"):
        run.optimizer.step()
    assert all(torch.equal(whole(W), old) for W, old in zip(run.weights(run.model), before, strict=True))
    assert run.optimizer.skipped_updates == 1


def test_parameters_that_are_sharded_later_need_another_optimizer():
    on_all_ranks(sharded_later_on_rank)


def sharded_later_on_rank(rank: int) -> None:
    model = net()
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples_of(model), lr=1e-2)
    shard(model)
    model(torch.ones(2, 13)).sum().backward()
    with pytest.raises(ValueError, match=r"(?s)build the optimizer afterwards.*A is not among the parameters"):
        optimizer.step()


@pytest.mark.parametrize("way", ["not resharded", "one piece, not resharded", "factors ignored"])
def test_weights_that_an_evaluation_has_gathered_are_not_written(way):
    on_all_ranks(gathered_on_rank, way)


@torch.no_grad()
def evaluated(run: ShardedRun) -> Tensor:
    return run.model(run.batch(0))


def gathered_on_rank(rank: int, way: str) -> None:
    """What is written into them is lost at the next reshard."""
    run = ShardedRun(rank, "bfloat16", way, keep_base="cpu").train(2)
    evaluated(run)
    if way == "factors ignored":
        for part in run.parts:
            part.unshard()
    for attempt in (run.optimizer.step, run.optimizer.restart, run.optimizer.base_weights().__enter__):
        with pytest.raises(ValueError, match=r"W was sharded and is whole now.*Call model\.reshard\(\) first"):
            attempt()
    assert "W was sharded and is whole now" in str(run.optimizer.report())
    run.reshard()
    run.train(2).assert_follows()


@some_kinds
def test_a_whole_model_resumes_bit_for_bit(kind):
    on_all_ranks(resume_on_rank, kind)


def resume_on_rank(rank: int, kind: str) -> None:
    run = ShardedRun(rank, kind).train(3)
    model = run.new_model({name: whole(p) for name, p in run.model.state_dict().items()})
    optimizer = run.new_optimizer(model)
    optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for _ in range(2):
        run.backward(model, run.t)
        optimizer.step()
        run.train()
    for p, q in zip(model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(whole(p), whole(q))


def test_an_adapter_resumes_on_the_pristine_base():
    on_all_ranks(adapter_on_rank)


def adapter_on_rank(rank: int) -> None:
    run = ShardedRun(rank).train(3)
    state = {name: whole(p) for name, p in run.model.state_dict().items()}
    model = run.new_model({name: value for name, value in state.items() if "base" not in name})
    optimizer = run.new_optimizer(model)
    optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for W, expected in zip(run.weights(model), run.weights(run.model), strict=True):
        torch.testing.assert_close(whole(W), whole(expected), **COMPUTED)


# the base by itself


def exact(kind: str) -> dict[str, float]:
    return COMPUTED if kind == "float32" else {"rtol": 0, "atol": 0}


def assert_gives_the_base(run: ShardedRun, **tolerance: float) -> None:
    """Without the branch the sharded model gives the frozen copy's output; with it, the reference's."""
    models = run.model, run.frozen, run.alone
    for model in models:
        switch(model, False)
    with torch.no_grad():
        expected = run.frozen(run.batch(0))
        torch.testing.assert_close(run.model(run.batch(0)), expected, **tolerance)
    for model in models:
        switch(model, True)
    with torch.no_grad():
        found = run.model(run.batch(0))
        torch.testing.assert_close(found, run.alone(run.batch(0)), rtol=1e-2, atol=1e-3)
    assert (found - expected).abs().max() > 1e-2
    run.reshard()


@pytest.mark.parametrize(
    ("way", "kind", "keep_base"),
    one_in(
        2,
        ["layers", "linear layers", "one piece, not resharded", "W ignored", "factors ignored"],
        [("float32", None), ("bfloat16", "cpu")],
    ),
)
def test_a_branch_that_is_off_leaves_the_base(way, kind, keep_base):
    on_all_ranks(off_on_rank, way, kind, keep_base)


def off_on_rank(rank: int, way: str, kind: str, keep_base: str | None) -> None:
    run = ShardedRun(rank, kind, way, keep_base=keep_base).train(2)
    assert_gives_the_base(run, **exact(kind))
    run.train(1).assert_follows()
    assert_gives_the_base(run, **exact(kind))


def test_reference_passes_in_training_take_at_most_one_more_gather_a_layer():
    on_all_ranks(reference_passes_on_rank)


def reference_passes_on_rank(rank: int) -> None:
    run = ShardedRun(rank).train(2)
    counts = []
    for _ in range(3):
        switch(run.model, False)
        switch(run.frozen, False)
        with torch.no_grad(), CommDebugMode() as counted:
            found = run.model(run.batch(0))
        torch.testing.assert_close(found, run.frozen(run.batch(0)), **COMPUTED)
        counts.append(counted.get_total_counts())
        switch(run.model, True)
        if len(counts) == 2:
            run.train(1)
    layers = len(branched(run.model))
    # A and B are gathered as the last move has left them, once after each step.
    assert counts[1] < counts[0] <= counts[1] + layers
    assert counts[2] == counts[0]


@pytest.mark.parametrize(
    ("way", "kind", "method", "keep_base"),
    one_in(
        2,
        ["layers", "one piece", "not resharded"],
        [
            ("float32", None, None),
            ("float32", "hooks", None),
            ("bfloat16", None, "cpu"),
            ("bfloat16", "source", None),
            ("bfloat16", "sharded source", None),
            ("bfloat16-compensated", None, None),
        ],
    ),
)
def test_base_weights_bring_the_base_back_and_give_it_up_again(way, kind, method, keep_base):
    on_all_ranks(base_weights_on_rank, way, kind, method, keep_base)


def base_weights_on_rank(rank: int, way: str, kind: str, method: str | None, keep_base: str | None) -> None:
    """A forward pass within it gathers the base, and keeps it where it is not resharded."""
    run = ShardedRun(rank, kind, way, keep_base=keep_base).train(3)
    options: dict[str, Any] = {"method": method} if method == "hooks" else {}
    if method == "source":
        options["source"] = run.frozen
    elif method == "sharded source":
        options["source"] = sharded_source(run)
    before = [whole(W) for W in run.weights(run.model)]
    switch(run.frozen, False)
    with torch.no_grad(), run.optimizer.base_weights(**options):
        switch(run.model, False)
        if method != "hooks":
            for W, base in zip(run.weights(run.model), run.weights(run.frozen), strict=True):
                torch.testing.assert_close(whole(W), base, **exact(kind))
        torch.testing.assert_close(run.model(run.batch(0)), run.frozen(run.batch(0)), **exact(kind))
    switch(run.model, True)
    assert (evaluated(run) - run.alone(run.batch(0))).abs().max() < 1e-3
    run.reshard()
    assert all(torch.equal(whole(W), old) for W, old in zip(run.weights(run.model), before, strict=True))
    run.train(2).assert_follows()


# the folded rule


@some_kinds
def test_a_folded_ratio_writes_the_pieces_where_it_changes(kind):
    on_all_ranks(folded_on_rank, kind)


def folded_on_rank(rank: int, kind: str) -> None:
    run = ShardedRun(rank, kind, start_step=2, weight_update="folded")
    for t in range(5):
        if t == 4:
            run.both(lambda optimizer: setattr(optimizer.groups[0], "update_ratio", 0.5))
        run.backward(run.model, t)
        run.backward(run.alone, t)
        run.replay.values = None
        run.optimizer.step()
        run.follow()
    run.assert_follows()
    run.assert_moved()
    assert_same_displacements(run)
    assert math.isclose(branched(run.model)[0].scaling, 0.75)
    assert isinstance(branched(run.model)[0], Branched)


def test_triples_that_are_added_later_move_their_pieces():
    on_all_ranks(added_on_rank)


def added_on_rank(rank: int) -> None:
    run = ShardedRun(rank)
    model = run.new_model()
    first, *rest = triples_of(model)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [first], lr=1e-2, **run.options)
    optimizer.add_param_group({"triples": rest})
    for t in range(3):
        run.backward(model, t)
        optimizer.step()
    run.train(3)
    for W, expected in zip(run.weights(model), run.weights(run.model), strict=True):
        run.assert_as(whole(W), whole(expected))
    with optimizer.base_weights():
        for W, base in zip(run.weights(model), run.weights(run.frozen), strict=True):
            torch.testing.assert_close(whole(W), base, **COMPUTED)


@some_kinds
def test_a_state_of_shards_fits_the_whole_weights_in_one_process(kind):
    on_all_ranks(in_one_process_on_rank, kind)


def in_one_process_on_rank(rank: int, kind: str) -> None:
    run = ShardedRun(rank, kind).train(3)
    model = net(run.dtype)
    model.load_state_dict({name: whole(p) for name, p in run.model.state_dict().items()})
    optimizer = run.new_optimizer(model)
    optimizer.load_state_dict(gathered(run.optimizer.state_dict()))
    before = [W.clone() for W in run.weights(model)]
    assert all(torch.equal(whole(W), old) for W, old in zip(run.weights(run.model), before, strict=True))
    run.backward(model, run.t)
    optimizer.step()
    run.train(1)
    for W, expected in zip(run.weights(model), run.weights(run.model), strict=True):
        torch.testing.assert_close(W, whole(expected), rtol=2.0**-7, atol=1e-6)
    for triple in optimizer.triples:
        name = triple.label
        found, expected = (each.displacement(name).product() for each in (optimizer, run.optimizer))
        torch.testing.assert_close(found, expected, **COMPUTED)


def gathered(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    return whole(state) if isinstance(state, Tensor) else state
