"""What each of two ranks is told of an event that one of them cannot take part in."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests.support.distributed import WORLD
from tests.support.sharded import S0, Run, linear, part

SHARDED = ([S0], [S0], [S0])
LAYERS = [linear(13, 17, 4), linear(6, 3, 1)]


def run_on_rank(placements: Any = SHARDED, steps: int = 2, **options: Any) -> Run:
    run = Run(LAYERS, torch.bfloat16, placements, init_device_mesh("cpu", (WORLD,)), **options)
    run.steps(steps)
    return run


def told(run: Run, call: Callable[[], object]) -> tuple[str, bool, float]:
    """What a rank is told, whether its part of every W is as before, and after how many seconds."""
    before = _weights(run)
    begin, said = time.monotonic(), "fine"
    try:
        call()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return said, all(map(torch.equal, before, _weights(run))), time.monotonic() - begin


def assert_told(results: list[tuple[str, bool, float]], *texts: str) -> None:
    for (said, same, seconds), text in zip(results, texts, strict=True):
        assert text in said
        assert same
        assert seconds < 20


def _weights(run: Run) -> list[Tensor]:
    return [part(W) for W, *_ in run.tensors]
