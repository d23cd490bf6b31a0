"""Parameters of FSDP1, torch.distributed.fsdp.FullyShardedDataParallel: views of one flattened parameter.

Whole ones (NO_SHARD with ``use_orig_params=True``, or within ``summon_full_params``) are matrices that can be written.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

INSTEAD = (
    "Take FSDP2 (torch.distributed.fsdp.fully_shard) or DistributedDataParallel; or keep FSDP1, with{} "
    "use_orig_params=True and either sharding_strategy=NO_SHARD, or an optimizer that is built and called within "
    "FullyShardedDataParallel.summon_full_params(model, writeback=True, with_grads=True)"
)

PIECES = (
    "{} of a flattened parameter of FSDP1 (FullyShardedDataParallel), and cannot be read and written as a matrix there"
)

PAST_HOOKS = (
    "{} of FSDP1 (FullyShardedDataParallel), which brings the gradients to a flattened parameter, past the hooks by "
    'which weight_update="folded" divides them'
)


def fsdp1_problems(W: Tensor, factors: Iterable[tuple[str, Tensor]], divides_gradients: bool) -> list[str]:
    """Say in one sentence which tensors of a triple FSDP1 holds so that it cannot be trained, and what to do.

    Args:
        W: the frozen weight.
        factors: the parameters of A and B, with the names for a message.
        divides_gradients: the rule divides the gradients that reach A and B.
    """
    factors = list(factors)
    pieces = [name for name, tensor in (("W", W), *factors) if _is_piece(tensor)]
    held = [name for name, tensor in factors if _is_held(tensor)]
    if divides_gradients and held:
        problem = PAST_HOOKS.format(_listed(held, "parameter"))
    elif pieces:
        problem = PIECES.format(_listed(pieces, "piece"))
    else:
        return []
    in_place = ' weight_update="in_place",' * divides_gradients
    return [f"{problem}. {INSTEAD.format(in_place)}"]


def _listed(names: list[str], noun: str) -> str:
    """Return for example "A and B are parameters" or "W is a piece"."""
    *first, last = names
    return f"{', '.join(first)} and {last} are {noun}s" if first else f"{last} is a {noun}"


def _is_piece(tensor: Tensor) -> bool:
    """Tell if what is written into this tensor is lost, or it is a piece of a matrix."""
    base = _flat_parameter(tensor)
    if base is not None:
        return base._params is None or hasattr(base, "_full_param_padded")  # gathered for a forward pass
    return tensor.dim() == 1 and getattr(tensor, "_fsdp_flattened", False)


def _is_held(tensor: Tensor) -> bool:
    return _flat_parameter(tensor) is not None or getattr(tensor, "_fsdp_flattened", False)


def _flat_parameter(tensor: Tensor) -> Any:
    base: Any = tensor._base
    return base if getattr(base, "_is_flat_param", False) else None
