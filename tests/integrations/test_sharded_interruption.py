"""A signal on one rank after the roll call of a step: no collective is issued twice, and all ranks end the step alike.

One rank is interrupted at the lines of the package, one at a time. Then its step has ended as on the other rank and as
on one process, and the next steps run. The suite takes some of the lines, `make nightly` takes all.
"""

import inspect
import os
import signal
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from deltaopt import DeltaLoRAOptimizer
from deltaopt.in_place import InPlaceUpdate
from deltaopt.ranks import Ranks
from deltaopt.roll_call import RollCall
from tests.support.distributed import WORLD, on_all_ranks
from tests.support.interruption import interrupt
from tests.support.sharded import S0, WHOLE, Layer, Run, linear, part, transposed

SAMPLED = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 31
"""Of so many lines one is taken."""

LIMIT = 30.0 + 600.0 / SAMPLED
LAYERS = [linear(13, 17, 4), linear(6, 3, 1)]
CASES: dict[str, tuple[list[Layer], Any, str]] = {
    "the first step": (LAYERS, ([S0],) * 3, "first"),
    "after a change outside": (LAYERS, ([S0],) * 3, "outside"),
    "another ratio": ([transposed(8, 6, 2), *LAYERS], ([S0],) * 3, "ratio"),
    "whole factors": (LAYERS, ([S0], WHOLE, WHOLE), "first"),
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "the roll call": RollCall.meet,
    "the moves": inspect.unwrap(InPlaceUpdate.after_step),
}


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
    line = first = 1 + len(case) % SAMPLED
    raised = torch.ones(1)
    while raised.item():
        run = prepared(Run(layers, torch.bfloat16, placements, mesh), moment)
        if rank == 1:
            raised[0] = interrupt(lambda run=run: run.steps(1), FUNCTIONS[within], line)
        else:
            run.steps(1)
        dist.broadcast(raised, 1)
        run.steps(1)
        found = [part(W) for W, *_ in run.tensors]
        same = [part(run.placed(W, placements[0])) for W in weights]
        assert all(map(torch.equal, found, same)), line
        for here, there in zip(run.displacements(), displacements, strict=True):
            torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6, msg=lambda text: f"line {line}: {text}")
        run.optimizer.check_synced()
        line += SAMPLED
    return (line - first) // SAMPLED


@pytest.mark.extra
@pytest.mark.filterwarnings("ignore:A and B of .* changed between two steps:UserWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("within", FUNCTIONS)
def test_a_rank_that_is_interrupted_at_a_line_ends_the_step_as_the_others_do(case, within):
    layers, _, moment = CASES[case]
    counts = on_all_ranks(interrupted_on_rank, case, within, expected(layers, moment), limit=LIMIT)
    assert counts[0] == counts[1] > 1
