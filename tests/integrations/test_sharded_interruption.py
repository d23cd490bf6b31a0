"""A signal on one rank after the roll call of a step: no collective is issued twice, and all ranks end the step alike.

One rank is interrupted at the lines of the package, one at a time. Then its step has ended as on the other rank and as
on one process, and the next steps run. The suite takes some of the lines, `make nightly` takes more.
"""

import inspect
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from deltaopt.all_or_nothing import Issued
from deltaopt.in_place import InPlaceUpdate
from deltaopt.roll_call import RollCall
from deltaopt.sharded_moves import ShardedMoves
from tests.support.distributed import WORLD, on_all_ranks
from tests.support.interruption import interrupt
from tests.support.sharded import S0, WHOLE, Layer, Run, linear, part, transposed

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
LIMIT = 900.0 if NIGHTLY else 60.0
LAYERS = [linear(13, 17, 4), linear(6, 3, 1)]
CASES: dict[str, tuple[list[Layer], Any, str]] = {
    "the first step": (LAYERS, ([S0],) * 3, "first"),
    "after a change outside": (LAYERS, ([S0],) * 3, "outside"),
    "another ratio": ([transposed(8, 6, 2), *LAYERS], ([S0],) * 3, "ratio"),
    "whole factors": (LAYERS, ([S0], WHOLE, WHOLE), "first"),
}
FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "the roll call": (RollCall.meet, 1 if NIGHTLY else 11),
    "the moves": (inspect.unwrap(InPlaceUpdate.after_step), 7 if NIGHTLY else 97),
}
"""What is interrupted, and of how many of its lines one is taken."""


def prepared(run: Run, moment: str) -> Run:
    """Bring a run to just before the step that is interrupted."""
    if moment == "first":
        return run
    run.steps(2)
    if moment == "outside":
        with torch.no_grad():
            for _, A, _ in run.tensors:
                A.mul_(0.5)
    else:
        run.optimizer.groups[0].update_ratio = 3.0
    return run


def expected(layers: list[Layer], moment: str) -> tuple[list[Tensor], list[Tensor]]:
    run = prepared(Run(layers, torch.bfloat16), moment)
    run.steps(2)
    return [W.detach().clone() for W, *_ in run.tensors], run.displacements()


def interrupted_on_rank(rank: int, case: str, within: str, alone: Any) -> int:
    """Interrupt rank 1 at one line after the other; return how many there were."""
    layers, placements, moment = CASES[case]
    mesh, weights, displacements = init_device_mesh("cpu", (WORLD,)), *alone
    function, stride = FUNCTIONS[within]
    line = first = 1 + len(case) % stride
    raised = torch.ones(1)
    while raised.item():
        run = prepared(Run(layers, torch.bfloat16, placements, mesh), moment)
        if rank == 1:
            raised[0] = interrupt(lambda run=run: run.steps(1), function, line)
        else:
            run.steps(1)
        dist.broadcast(raised, 1)
        run.steps(1)
        found = [part(W) for W, *_ in run.tensors]
        same = [part(run.placed(W, placements[0])) for W in weights]
        assert all(map(torch.equal, found, same)), line
        for here, there in zip(run.displacements(), displacements, strict=True):
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6, msg=f"line {line}")
        line += stride
    return (line - first) // stride


@pytest.mark.extra
@pytest.mark.filterwarnings("ignore:A and B of .* changed between two steps:UserWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("within", FUNCTIONS)
def test_a_rank_that_is_interrupted_at_a_line_ends_the_step_as_the_others_do(case, within):
    layers, _, moment = CASES[case]
    counts = on_all_ranks(interrupted_on_rank, case, within, expected(layers, moment), limit=LIMIT)
    assert counts[0] == counts[1] > 1


def interrupted_twice_on_rank(rank: int, number: int, alone: list[Tensor]) -> tuple[list[str], bool]:
    """Interrupt rank 1 after a collective of its first step, and again while the step is completed."""
    run = Run(LAYERS, torch.bfloat16, ([S0],) * 3, init_device_mesh("cpu", (WORLD,)))
    run.optimizer.state_dict()  # has compared the settings
    output, calls, said = Issued.output, [], []

    def interrupting(issued: Issued, *arguments: Any) -> Any:
        found = output(issued, *arguments)
        calls.append(issued)
        if len(calls) >= number and calls.count(calls[number - 1]) <= 2 and issued is calls[number - 1]:
            raise KeyboardInterrupt
        return found

    with mock.patch.object(Issued, "output", interrupting) if rank == 1 else nullcontext():
        for _ in range(3):
            try:
                run.steps(1)
                said.append("fine")
            except KeyboardInterrupt:
                said.append("interrupted")
    return said, all(
        torch.equal(part(W), part(run.placed(there, [S0]))) for (W, *_), there in zip(run.tensors, alone, strict=True)
    )


@pytest.mark.parametrize("number", [1, 2, 3, 4], ids=["the roll call", "the verdict", "the factors", "the bases"])
def test_a_step_that_is_interrupted_twice_is_completed_by_the_next_one(number):
    run = Run(LAYERS, torch.bfloat16)
    run.steps(3)
    others, own = on_all_ranks(interrupted_twice_on_rank, number, [W.detach() for W, *_ in run.tensors], limit=LIMIT)
    assert others == (["fine"] * 3, True)
    assert own == (["interrupted", "fine", "fine"], True)


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Let a signal raise KeyboardInterrupt."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def waits_and_is_interrupted_on_rank(rank: int, waits_in: str, alone: list[Tensor]) -> tuple[int, bool]:
    """Let rank 0 be late, and send a signal to rank 1, which waits for it."""
    run = Run(LAYERS, torch.bfloat16, ([S0],) * 3, init_device_mesh("cpu", (WORLD,)))
    run.steps(1)
    place, name = (run.optimizer.inner, "step") if waits_in == "the roll call" else (ShardedMoves, "agree")
    call = getattr(place, name)

    def late(*arguments: Any) -> Any:
        time.sleep(1.5)
        return call(*arguments)

    with mock.patch.object(place, name, late) if rank == 0 else interrupted_after(0.5):
        run.steps(1)
    run.steps(1)
    same = [
        torch.equal(part(W), part(run.placed(there, [S0]))) for (W, *_), there in zip(run.tensors, alone, strict=True)
    ]
    return run.optimizer.step_count, all(same)


@pytest.mark.parametrize("waits_in", ["the roll call", "the verdict"])
def test_a_signal_while_a_rank_waits_for_the_others_is_raised_after_the_step(waits_in):
    run = Run(LAYERS, torch.bfloat16)
    run.steps(3)
    alone = [W.detach() for W, *_ in run.tensors]
    assert on_all_ranks(waits_and_is_interrupted_on_rank, waits_in, alone, limit=LIMIT) == [(3, True)] * WORLD


def gives_up_its_call_on_rank(rank: int) -> tuple[str, str]:
    """Interrupt rank 1 before it has come to a roll call outside of a step."""
    run = Run(LAYERS, torch.bfloat16, ([S0],) * 3, init_device_mesh("cpu", (WORLD,)))
    run.steps(1)
    said = []
    for count in range(2):
        meet = mock.patch.object(RollCall, "meet", side_effect=KeyboardInterrupt("before it"))
        with meet if (rank, count) == (1, 0) else nullcontext():
            try:
                run.optimizer.state_dict()
                said.append("fine")
            except BaseException as error:
                said.append(f"{type(error).__name__}: {error}")
    return said[0], said[1]


def test_a_rank_that_is_interrupted_before_a_roll_call_tells_the_others():
    others, own = on_all_ranks(gives_up_its_call_on_rank, limit=LIMIT)
    assert others[0].startswith("RanksDisagreeError: rank 1 raised KeyboardInterrupt: before it, in state_dict()")
    assert own[0] == "KeyboardInterrupt: before it"
    assert [others[1], own[1]] == ["fine", "fine"]
