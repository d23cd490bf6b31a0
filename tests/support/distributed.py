"""Several ranks: each test calls one function on all ranks of a group, see `kept_pair` and `threads`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support import kept_pair
from tests.support.kept_pair import LIMIT, WORLD


def on_all_ranks(work: Callable[..., Any], *arguments: Any, limit: float = LIMIT) -> list[Any]:
    """Call `work(rank, *arguments)` in `WORLD` processes of a gloo group, which are kept for the next call.

    Args:
        work: a function of a module, which is sent by its name.
        arguments: sent by pickle.
        limit: in seconds. Beyond it the processes are killed.

    Returns:
        What they return, in the order of the ranks.

    Raises:
        AssertionError: with the traceback of each rank that raised, that took too long, or that is gone.
    """
    return kept_pair.call(work, arguments, limit)


def shares(data: list[Tensor], rank: int) -> list[Tensor]:
    """The part of each batch that is this rank's."""
    return [ids.chunk(WORLD)[rank] for ids in data]


def assert_same_on_all_ranks(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        first = p.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, p), name
