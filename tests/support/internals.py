"""The only place in the tests that names what the package keeps for itself.

A test that has to look behind the public interface calls a function of this file. When the package is rebuilt, this
file is adapted and the tests stay.
"""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaopt import DeltaLoRAOptimizer, LoRATriple, folding, rounding, update, writing
from deltaopt.ledger import Ledger, full_part
from deltaopt.state import _sealed, split_ledgers
from deltaopt.update import BufferKind, FactoredDelta, Move
from deltaopt.writing import checked_rounding

AUTO = checked_rounding("auto", 0).during("move", 0)
"""Writes W as an optimizer does in its first step when nothing else is asked for."""


def move_of(triple: LoRATriple, coef: float) -> Move:
    """One update of one triple, as the optimizer makes it."""
    now = triple.stored()
    return Move(triple, now, coef, BufferKind.of(triple, now), Ledger())


def ledger_of(optimizer: DeltaLoRAOptimizer, index: int = 0) -> Ledger:
    return optimizer.accounts()[index].ledger


def terms_of(optimizer: DeltaLoRAOptimizer, index: int = 0) -> list[Any]:
    """The low-rank terms that the ledger keeps, without those of the last move."""
    return ledger_of(optimizer, index).terms


def has_moved(optimizer: DeltaLoRAOptimizer, index: int = 0) -> bool:
    """Whether W of this triple was ever moved."""
    return ledger_of(optimizer, index).moved


def compensation_of(optimizer: DeltaLoRAOptimizer, index: int = 0) -> Tensor | None:
    """The bits that rounding cut off from a 16-bit W, or None where nothing is kept."""
    kept = ledger_of(optimizer, index).compensation
    return None if kept is None else kept.bits


def full_weight(optimizer: DeltaLoRAOptimizer, index: int = 0) -> Tensor:
    """The part of W that moves, with what rounding cut off from it."""
    triple, ledger = optimizer.accounts()[index]
    return full_part(triple, ledger)


def pending_entries(optimizer: DeltaLoRAOptimizer) -> list[Any]:
    """Ledger updates whose outcome the device has not reported yet."""
    return optimizer._delta._entries


def new_delta() -> FactoredDelta:
    return FactoredDelta()


def outcome_unknown_to_host(patch: pytest.MonkeyPatch, arrived: bool | None = None) -> None:
    """Take the path of a GPU, where the host learns later whether a step was applied.

    Args:
        patch: undoes it.
        arrived: whether a report counts as arrived; None asks the device.
    """
    patch.setattr(update, "_known_to_host", lambda device: False)
    if arrived is not None:
        patch.setattr(update._Entry, "arrived", lambda self: arrived)


def arrivals(patch: pytest.MonkeyPatch, arrived: Any) -> None:
    """Let `arrived()` answer whether the report of a step has arrived."""
    patch.setattr(update._Entry, "arrived", lambda self: arrived())


def use_kernel(patch: pytest.MonkeyPatch, kernel: Any) -> None:
    """Let optimizers write 16-bit weights by this kernel, or by blocks of torch operations where it is None."""
    patch.setattr(update, "fused_kernel", lambda device: kernel)


def kernel_for(device: torch.device) -> Any:
    """The kernel that optimizers take on this device, or None."""
    return update.fused_kernel(device)


def forget_hooks(optimizer: DeltaLoRAOptimizer, *factors: Tensor) -> None:
    """Lose the hooks of these factors, as a copy does that was made before its module was complete."""
    fresh = copy.deepcopy(optimizer._folding)
    for factor in factors:
        folding._divisors.pop(factor)
        factor._backward_hooks.clear()
    optimizer._folding, optimizer._signatures = fresh, []


def note_products(patch: pytest.MonkeyPatch, note: Any) -> None:
    """Call `note(coef, U, V)` in place of adding coef * U @ V to a W that moves in place."""
    patch.setattr(writing, "add_to_weight_", lambda triple, W, U, V, coef, *_: note(coef, U, V))


def use_blocks_of(patch: pytest.MonkeyPatch, elements: int) -> None:
    """Lift 16-bit weights to 32 bits in blocks of this many elements."""
    patch.setattr(rounding, "BLOCK_ELEMENTS", elements)


def buffer_addresses(optimizer: DeltaLoRAOptimizer) -> list[int]:
    """Where the buffers are that the factors are kept in during a step."""
    return [stack.U.data_ptr() for stack in optimizer._delta._stacks.values()]


def fail_at_write(patch: pytest.MonkeyPatch, number: int) -> None:
    """Let the write of this number, counted from 1, run out of memory before it changes anything."""
    add_terms, count = writing.add_terms_, itertools.count(1)

    def failing(*arguments: Any, **options: Any) -> None:
        if next(count) == number:
            raise torch.OutOfMemoryError("out of memory")
        add_terms(*arguments, **options)

    patch.setattr(writing, "add_terms_", failing)


def record_of(state: dict) -> dict[str, Any]:
    """What a state says of the triples and their settings; it may be edited."""
    return state["param_groups"][0]["deltaopt"]


def change_ledger(state: dict[str, Any], name: str, change: Any) -> None:
    """Let `change` edit the saved ledger of the only triple of a state, under a checksum that fits."""
    ledgers, _, _ = split_ledgers(state)
    change(ledgers[name])
    (number,) = (n for n, entries in state["state"].items() if entries.get("deltaopt"))
    state["state"][number] = state["state"][number] | {"deltaopt": _sealed(ledgers)}
