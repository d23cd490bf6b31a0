"""`torch.compile(optimizer.step)` where W, A and B are sharded."""

from typing import Any

import torch

from tests.support.distributed import WORLD, on_all_ranks
from tests.support.sharded import part
from tests.support.told import run_on_rank


def compiles_its_step(rank: int) -> Any:
    eager, compiled = (run_on_rank(steps=0) for _ in range(2))
    before, hooked = [part(W) for W, *_ in eager.tensors], []
    compiled.optimizer.register_step_post_hook(lambda *arguments: hooked.append(rank))
    torch.compiler.reset()
    compiled.optimizer.step = torch.compile(compiled.optimizer.step, backend="eager")
    for run in (compiled, eager):  # the first of them makes the group in which the ranks meet
        run.steps(3)
    pairs = [
        (part(one), part(other))
        for ours, theirs in zip(eager.tensors, compiled.tensors, strict=True)
        for one, other in zip(ours, theirs, strict=True)
    ]
    moved = [not torch.equal(part(W), W_0) for (W, *_), W_0 in zip(eager.tensors, before, strict=True) if W_0.numel()]
    return all(torch.equal(*pair) for pair in pairs), all(moved), compiled.optimizer.step_count, len(hooked)


def test_a_compiled_step_moves_shards_as_the_eager_one():
    assert on_all_ranks(compiles_its_step) == [(True, True, 3, 3)] * WORLD
