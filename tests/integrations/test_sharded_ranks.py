"""Ranks that share sharded weights end every event alike: all of them move W, or all raise and none does."""

import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from deltaopt.checkpoint import resume
from tests.support.distributed import WORLD, on_all_ranks
from tests.support.nightly import later
from tests.support.sharded import S0, WHOLE, R, Run
from tests.support.told import LAYERS, SHARDED, assert_told, run_on_rank, told

PATIENCE = 1.0
"""Seconds that a rank waits for one that does not come."""


def raises_in_its_inner_step(rank: int) -> Any:
    run = run_on_rank()
    if rank == 1:

        def fail(closure: Any = None) -> None:
            raise ArithmeticError("of this rank alone")

        run.optimizer.inner.step = fail
    first = told(run, lambda: run.steps(1))
    run.optimizer.inner.__dict__.pop("step", None)
    run.steps(1)  # all of them can go on
    return first, run.optimizer.step_count


def test_an_exception_in_the_inner_step_of_one_rank_ends_the_step_on_all():
    results = on_all_ranks(raises_in_its_inner_step)
    message = "RanksDisagreeError: rank 1 raised ArithmeticError: of this rank alone, in step()"
    assert_told([first for first, _ in results], message, "ArithmeticError: of this rank alone")
    assert [count for _, count in results] == [3, 3]


def fails_its_checks(rank: int) -> Any:
    run = run_on_rank()
    if rank == 0:
        for _, *factors in run.tensors:
            for factor in factors:
                factor.requires_grad_(False)
    return told(run, lambda: run.steps(1))


def test_a_check_that_fails_on_one_rank_ends_the_step_on_all():
    assert_told(on_all_ranks(fails_its_checks), "ValueError: these triples cannot be", "rank 0 raised ValueError")


def fails_its_look_up(rank: int, are_sharded_later: bool) -> Any:
    mesh, owner = init_device_mesh("cpu", (WORLD,)), torch.nn.Module()
    generator = torch.Generator().manual_seed(0)

    def put(name: str, tensor: torch.Tensor) -> None:
        setattr(owner, name, torch.nn.Parameter(tensor, requires_grad=name != "W"))

    def shard() -> None:
        for name in "WAB":
            put(name, distribute_tensor(getattr(owner, name).detach(), mesh, [S0], src_data_rank=None))

    for name, shape in (("W", (8, 6)), ("A", (8, 2)), ("B", (2, 6))):
        put(name, torch.randn(shape, generator=generator))
    if not are_sharded_later:
        shard()
    triple = LoRATriple((owner, "W"), (owner, "A"), (owner, "B"), name="layer")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, rank_timeout=30.0)
    if are_sharded_later:
        shard()
    factors = [owner.A, owner.B]
    for factor in factors:
        factor.grad = factor.detach() * 1.0
    optimizer.param_groups[0]["params"] = factors[rank == 0 :]
    begin, said = time.monotonic(), []
    for _ in range(2):
        try:
            optimizer.step()
            said.append("fine")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        optimizer.param_groups[0]["params"] = factors
    return said, time.monotonic() - begin


@pytest.mark.parametrize("are_sharded_later", [False, True])
def test_a_tensor_that_is_refused_on_one_rank_in_the_first_event_is_told_on_all(are_sharded_later):
    ((here, *after), seconds), ((there, *after_there), _) = on_all_ranks(fails_its_look_up, are_sharded_later)
    assert here.startswith("ValueError: the inner optimizer does not fit")
    assert there.startswith("RanksDisagreeError: rank 0 raised ValueError: the inner optimizer does not fit")
    assert after == after_there == ["fine"]  # none is a meeting ahead
    assert seconds < 20


def leaves_out_a_step(rank: int) -> Any:
    run = run_on_rank(rank_timeout=PATIENCE)
    return told(run, run.optimizer.state_dict if rank == 0 else lambda: run.steps(1))


def test_ranks_in_different_calls_are_told_which():
    text = "RanksDisagreeError: rank 0 is in state_dict(), rank 1 is in step(): all ranks have to call"
    results = on_all_ranks(leaves_out_a_step)
    assert [said[: len(text)] for said, *_ in results] == [text, text]
    assert all(same for _, same, _ in results)


def is_alone(rank: int, call: str) -> Any:
    run = run_on_rank(rank_timeout=PATIENCE + rank_free_number(call))
    if rank == 1:
        time.sleep(PATIENCE + 2)  # else the other one would find that its process has ended
        return "left out"
    calls: dict[str, Callable[[], object]] = {
        "step()": lambda: run.steps(1),
        "state_dict()": run.optimizer.state_dict,
        "displacement()": lambda: run.optimizer.displacement("layer 0"),
    }
    return told(run, calls[call])


def rank_free_number(call: str) -> float:
    """A number of the call: after a timeout a control group is of no more use, and each timeout has its own group."""
    return len(call) / 1000


@pytest.mark.parametrize("call", ["step()", "state_dict()", later("displacement()")])
def test_a_rank_that_does_not_come_is_named_after_the_timeout(call):
    (said, same, seconds), other = on_all_ranks(is_alone, call)
    assert other == "left out"
    assert f"rank 1 did not come to {call} within 1" in said
    assert same
    assert PATIENCE <= seconds < PATIENCE + 15


def has_another_setting(rank: int, option: str, value: Any) -> Any:
    run = run_on_rank(steps=0, **({option: value} if rank == 1 else {}))
    return told(run, lambda: run.steps(1))


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("update_ratio", 3.0, "update_ratio of 2 layers (layer 0, layer 1): 2.0 on rank 0, 3.0 on rank 1"),
        ("start_step", 1, "start_step of 2 layers (layer 0, layer 1): 0 on rank 0, 1 on rank 1"),
        ("rounding_seed", 7, "rounding_seed: 0 on rank 0, 7 on rank 1"),
        ("rounding", "nearest", "rounding: auto on rank 0, nearest on rank 1"),
        ("keep_base", "cpu", "keep_base: None on rank 0, cpu on rank 1"),
    ],
)
def test_ranks_with_different_settings_are_told_at_the_first_step(option, value, text):
    assert_told(on_all_ranks(has_another_setting, option, value), text, text)


def has_other_layers(rank: int, layers: Any, dtypes: Any) -> Any:
    run = Run(layers[rank], dtypes[rank], SHARDED, init_device_mesh("cpu", (WORLD,)))
    return told(run, lambda: run.steps(1))


@pytest.mark.parametrize(
    ("layers", "dtypes", "text"),
    [
        ([LAYERS, LAYERS[:1]], [torch.float32] * 2, "1 layer (layer 1) only on rank 0"),
        (
            [LAYERS, LAYERS[::-1]],
            [torch.float32] * 2,
            "shapes of 1 layer (layer 0): (13, 17), (13, 4)",
        ),
        ([LAYERS] * 2, [torch.float32, torch.bfloat16], "dtypes of 2 layers (layer 0, layer 1): float32, float32"),
    ],
    ids=["sets", "order", "dtypes"],
)
def test_ranks_with_different_layers_are_told_at_the_first_step(layers, dtypes, text):
    assert_told(on_all_ranks(has_other_layers, layers, dtypes), text, text)


def has_another_version(rank: int) -> Any:
    import deltaopt

    run, version = run_on_rank(steps=0), deltaopt.__version__
    deltaopt.__version__ = f"{version}.{rank}"
    try:
        return told(run, lambda: run.steps(1))
    finally:
        deltaopt.__version__ = version


def test_ranks_with_different_versions_are_told_at_the_first_step():
    assert_told(on_all_ranks(has_another_version), *["install the same version everywhere"] * 2)


def sets_another_ratio_later(rank: int) -> Any:
    run = run_on_rank()
    run.optimizer.groups[0].update_ratio = 2.0 + rank
    return told(run, lambda: run.steps(1))


def test_a_ratio_that_is_set_on_one_rank_is_told_at_the_next_step():
    text = "update_ratio: [2.0] on rank 0, [3.0] on rank 1"
    assert_told(on_all_ranks(sets_another_ratio_later), text, text)


def has_nan_on_one_rank(rank: int) -> Any:
    run = run_on_rank()
    for _, *factors in run.tensors:
        for factor in factors:
            factor.grad = factor.detach() * 0
    if rank == 1:
        run.tensors[0][1].grad.to_local().fill_(torch.nan)
    said = told(run, run.optimizer.step)
    return said, run.optimizer.skipped_updates


def test_a_number_that_is_not_finite_on_one_rank_leaves_w_on_all():
    for said, skipped in on_all_ranks(has_nan_on_one_rank):
        assert said[:2] == ("fine", True)
        assert skipped == 1


def has_factors_of_its_own(rank: int) -> Any:
    run = run_on_rank(([S0], WHOLE, WHOLE), steps=1)
    if rank == 1:
        with torch.no_grad():
            run.tensors[1][2][0, 0] += 2.0**-20
    return told(run, lambda: run.steps(1)), (told(run, run.optimizer.state_dict)[0], run.optimizer.step_count)


def test_whole_factors_that_differ_next_to_a_sharded_weight_are_refused_on_all_ranks():
    text = "FactorsDifferError: W was not moved, on no rank:\n  layer 1: W is sharded"
    results = on_all_ranks(has_factors_of_its_own)
    assert_told([first for first, _ in results], text, text)
    assert [after for _, after in results] == [("fine", 1)] * WORLD  # a refused step is not counted


EVENTS_OF_FACTORS: dict[str, Callable[[Run], object]] = {
    "restart": lambda run: run.optimizer.restart(),
    "resync": lambda run: run.optimizer.resync(),
}


def has_factors_of_its_own_in(rank: int, event: str) -> Any:
    run = run_on_rank(([S0], WHOLE, WHOLE))
    if rank == 1:
        with torch.no_grad():
            run.tensors[1][2][0, 0] += 2.0**-20
    return told(run, lambda: EVENTS_OF_FACTORS[event](run))


@pytest.mark.parametrize("event", EVENTS_OF_FACTORS)
def test_events_refuse_whole_factors_that_differ(event):
    """No later step would tell: a restart makes A and B equal again, and W stays another one on each rank."""
    text = "FactorsDifferError: nothing was changed, on no rank:\n  layer 1: W is sharded"
    assert_told(on_all_ranks(has_factors_of_its_own_in, event), text, text)


def starts_as_it_likes(rank: int) -> Any:
    run = run_on_rank(([S0], WHOLE, WHOLE))

    def start(triple: Any) -> None:
        triple.A.zero_()
        triple.B.fill_(1.0 + rank)

    return told(run, lambda: run.optimizer.restart(start))


def test_a_start_that_differs_between_ranks_is_refused():
    text = "FactorsDifferError: nothing was changed, on no rank:\n  W is sharded"
    assert_told(on_all_ranks(starts_as_it_likes), text, text)


def fails_in_its_restart(rank: int) -> Any:
    run = run_on_rank()

    def start(triple: Any) -> None:
        if rank == 1 and triple.name == "layer 1":
            raise KeyError("no start")
        triple.A.zero_()

    before = [factor.to_local().clone() for _, *factors in run.tensors for factor in factors]
    first = told(run, lambda: run.optimizer.restart(start))
    same = all(map(torch.equal, before, [factor.to_local() for _, *factors in run.tensors for factor in factors]))
    run.steps(1)  # all of them can go on
    return first, same


def test_a_start_that_fails_on_one_rank_leaves_all_ranks_as_they_were():
    results = on_all_ranks(fails_in_its_restart)
    assert_told([first for first, _ in results], "rank 1 raised KeyError: 'no start'", "KeyError: 'no start'")
    assert [same for _, same in results] == [True, True]


def loads_another_state(rank: int) -> Any:
    run = run_on_rank()
    states = [run.optimizer.state_dict()]
    run.steps(1)
    states.append(run.optimizer.state_dict())
    return told(run, lambda: run.optimizer.load_state_dict(states[rank]))


def test_ranks_that_load_different_states_are_told():
    text = "RanksDisagreeError: the ranks are in load_state_dict() with different values:\n  step count: 2 on rank 0"
    assert_told(on_all_ranks(loads_another_state), text, text)


def loads_a_state_that_is_damaged_on_one_rank(rank: int) -> Any:
    run = run_on_rank()
    state = run.optimizer.state_dict()
    if rank == 1:
        state["param_groups"] = [{"params": []}]
    return told(run, lambda: run.optimizer.load_state_dict(state))


def test_a_state_that_is_refused_on_one_rank_is_loaded_on_none():
    results = on_all_ranks(loads_a_state_that_is_damaged_on_one_rank)
    assert "rank 1 raised" in results[0][0]
    assert "Error" in results[1][0]
    assert all(same for _, same, _ in results)


def has_rebuilt_another_weight_alone(rank: int) -> Any:
    run = run_on_rank()
    state, other = run.optimizer.state_dict(), run_on_rank(steps=0)
    with torch.no_grad():
        for (_, *saved), (_, *factors) in zip(run.tensors, other.tensors, strict=True):
            for then, factor in zip(saved, factors, strict=True):
                factor.copy_(then)
    known = {1: 2} if rank == 0 else {}  # as where one rank has loaded a state of a whole model before
    with mock.patch.dict(resume._rebuilt_for, known, clear=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 16 bits are rebuilt up to rounding
        other.optimizer.load_state_dict(state)
        return all(
            (W - then).abs().max().item() < 0.1 for (W, *_), (then, *_) in zip(other.tensors, run.tensors, strict=True)
        )


def test_what_one_rank_has_rebuilt_before_does_not_take_it_elsewhere():
    assert on_all_ranks(has_rebuilt_another_weight_alone, limit=30.0) == [True] * WORLD


def counts_collectives(rank: int, placements: Any) -> Any:
    from torch.distributed.tensor.debug import CommDebugMode

    run = run_on_rank(placements)
    with CommDebugMode() as counted:
        run.optimizer.step()
    return {str(name).rsplit(".", 1)[-1]: count for name, count in counted.get_comm_counts().items()}


@pytest.mark.parametrize(
    ("placements", "expected"),
    [(SHARDED, {"allreduce_": 1, "_allgather_base_": 1}), (([S0], [S0], [R]), {"allreduce_": 1})],
    ids=["factors are brought", "factors are at hand"],
)
def test_a_step_has_one_collective_for_the_verdict_and_one_for_all_factors(placements, expected):
    assert on_all_ranks(counts_collectives, placements) == [expected] * WORLD


@pytest.mark.parametrize(
    ("timeout", "error"), [(0, ValueError), (-1.0, ValueError), ("60", TypeError), (True, TypeError)]
)
def test_a_timeout_is_a_positive_number(timeout, error):
    with pytest.raises(error, match="rank_timeout is a"):
        Run(LAYERS, torch.float32, rank_timeout=timeout)
