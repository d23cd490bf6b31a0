"""What only one rank refuses, however early in an event or late, is told to the others, which do not wait for it."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.optim import post_localSGD_optimizer

from deltaopt import export_adapter
from tests.support.distributed import WORLD, on_all_ranks
from tests.support.sharded import S0, WHOLE, Run
from tests.support.told import assert_told, run_on_rank, told

PATIENCE = 30.0
"""Seconds after which a rank would give up waiting; what is told ends each call long before."""

PLAIN_FACTORS = ([S0], WHOLE, WHOLE)


def within_backward(run: Run) -> None:
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda grad: run.optimizer.step())
    x.sum().backward()


def stepped_by_another(run: Run) -> None:
    names = {"__name__": post_localSGD_optimizer.__name__, "step": run.optimizer.step}
    types.FunctionType(compile("step()", "around", "exec"), names)()


STEPS: dict[str, tuple[Callable[[Run], None], str]] = {
    "backward": (within_backward, "RuntimeError: step() was called within a backward pass"),
    "around": (stepped_by_another, "RuntimeError: step(): a PostLocalSGDOptimizer is around this optimizer"),
}


def steps_where_one_cannot(rank: int, way: str) -> Any:
    run = run_on_rank(rank_timeout=PATIENCE)
    step = STEPS[way][0] if rank == 1 else lambda run: run.steps(1)
    first = told(run, lambda: step(run))
    run.steps(1)
    return first, run.optimizer.step_count


@pytest.mark.parametrize("way", STEPS)
def test_a_step_that_one_rank_refuses_ends_on_all(way):
    results = on_all_ranks(steps_where_one_cannot, way, limit=60.0)
    assert_told([first for first, _ in results], f"rank 1 raised {STEPS[way][1]}", STEPS[way][1])
    assert [count for _, count in results] == [3] * WORLD


def calls_with_another_argument(rank: int, call: str) -> Any:
    run = run_on_rank(rank_timeout=PATIENCE)
    missing, name = rank == 1, "no layer" if rank == 1 else "layer 0"
    base = [W.detach().full_tensor() for W, *_ in run.tensors]
    source = "nowhere.pt" if missing else {str(i): W for i, W in enumerate(base)}
    calls: dict[str, Callable[[], object]] = {
        "displacement()": lambda: run.optimizer.displacement(name),
        "residual()": lambda: run.optimizer.residual(name, {}),
        "base_weights()": lambda: run.optimizer.base_weights(source).__enter__(),
        "export_adapter()": lambda: export_adapter(run.optimizer, 0 if missing else 4),
    }
    first = told(run, calls[call])
    run.steps(1)
    return first, run.optimizer.step_count


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("displacement()", "KeyError: \"no triple 'no layer'"),
        ("residual()", "KeyError: \"no triple 'no layer'"),
        ("base_weights()", "FileNotFoundError: "),
        ("export_adapter()", "ValueError: rank is a positive int"),
    ],
)
def test_an_argument_that_one_rank_cannot_use_ends_the_call_on_all(call, error):
    results = on_all_ranks(calls_with_another_argument, call, limit=60.0)
    assert_told([first for first, _ in results], f"rank 1 raised {error}", error)
    assert [count for _, count in results] == [3] * WORLD


DIFFERENT: dict[str, Callable[[Run, int], object]] = {
    "layer: layer 0 on rank 0, layer 1 on rank 1": lambda run, rank: run.optimizer.displacement(f"layer {rank}"),
    "source: None on rank 0, 0 tensors with 0 elements on rank 1": lambda run, rank: run.optimizer.residual(
        "layer 0", [None, {}][rank]
    ),
    "method: hooks on rank 0, copy on rank 1": lambda run, rank: run.optimizer.base_weights(
        method=["hooks", "copy"][rank]
    ).__enter__(),
    "rank: 4 on rank 0, 5 on rank 1": lambda run, rank: export_adapter(run.optimizer, 4 + rank),
}


def gives_other_arguments(rank: int, difference: str) -> Any:
    run = run_on_rank(rank_timeout=PATIENCE)
    return told(run, lambda: DIFFERENT[difference](run, rank))


@pytest.mark.parametrize("difference", DIFFERENT)
def test_ranks_that_give_different_arguments_are_told(difference):
    text = f"different values:\n  {difference}"
    assert_told(on_all_ranks(gives_other_arguments, difference, limit=60.0), text, text)


def has_nan_in_a_whole_factor(rank: int, event: str) -> Any:
    run = run_on_rank(PLAIN_FACTORS, rank_timeout=PATIENCE)
    kept = run.tensors[1][1].detach().clone()
    if rank == 1:
        run.tensors[1][1].data.fill_(torch.nan)
    first = told(run, getattr(run.optimizer, event))
    run.tensors[1][1].data.copy_(kept)
    run.steps(1)
    return first, run.optimizer.step_count


@pytest.mark.parametrize("event", ["restart", "resync"])
def test_a_whole_factor_that_is_nan_on_one_rank_is_refused_on_all(event):
    text = "ValueError: a factor of layer 1 is NaN or infinite"
    results = on_all_ranks(has_nan_in_a_whole_factor, event, limit=60.0)
    assert_told([first for first, _ in results], text, text)
    assert [count for _, count in results] == [3] * WORLD


def fails_in_a_hook_of_its_state(rank: int) -> Any:
    run = run_on_rank(rank_timeout=PATIENCE)

    def fail(optimizer: Any) -> None:
        if rank == 1:
            raise ArithmeticError("in a hook")

    handle = run.optimizer.register_state_dict_pre_hook(fail)
    first = told(run, run.optimizer.state_dict)
    handle.remove()
    run.steps(1)
    return first, run.optimizer.step_count


def test_a_hook_of_state_dict_that_fails_on_one_rank_ends_it_on_all():
    results = on_all_ranks(fails_in_a_hook_of_its_state, limit=60.0)
    error = "ArithmeticError: in a hook"
    assert_told([first for first, _ in results], f"rank 1 raised {error}", error)
    assert [count for _, count in results] == [3] * WORLD
