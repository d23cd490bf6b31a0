"""The only place in the tests that names what the package keeps for itself.

A test that has to look behind the public interface calls a function of this file. When the package is rebuilt, this
file is adapted and the tests stay.
"""

import copy
import inspect
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaopt import DeltaLoRAOptimizer, LoRATriple, claims, factor_buffers, gradient_hooks, ledger
from deltaopt import weight as weight_module
from deltaopt.checkpoint.fingerprint import Fingerprint
from deltaopt.checkpoint.format import KEY, LEDGER, _sealed, split_ledgers
from deltaopt.folded import FoldedUpdate
from deltaopt.groups import DeltaGroup, Settings
from deltaopt.host import Host
from deltaopt.in_place import InPlaceUpdate
from deltaopt.ledger import Ledger
from deltaopt.rounding import blocks, writer
from deltaopt.rounding.writer import Writer, checked_rounding
from deltaopt.weight import WeightState

AUTO = checked_rounding("auto", 0).during("move", 0)
"""Writes W as an optimizer does in its first step when nothing else is asked for."""


def weight_of(triple: LoRATriple, coef: float) -> WeightState:
    """Return one weight as it is in a step that multiplies the delta by `coef`."""
    weight = WeightState(triple, DeltaGroup([triple], Settings(1.0, 0, 1.0)))
    triple.scaling, weight.ratio = math.copysign(1.0, coef), abs(coef)
    return weight


def coefs_noted(note: Callable[[float, Tensor, Tensor], object]) -> Writer:
    """Return a writer that calls `note(coef, U, V)` in place of adding coef * U @ V to W."""

    class Noting(Writer):
        def add_product_(self, weight, U, V, coef, noise=None, written=None):
            note(coef, U, V)

    return Noting(*AUTO)


def ledger_of(optimizer: DeltaLoRAOptimizer, index: int = 0) -> Ledger:
    return optimizer.accounts()[index].ledger


def terms_of(optimizer: DeltaLoRAOptimizer, index: int = 0) -> list[Any]:
    """Return the low-rank terms that the ledger keeps, without those of the last move."""
    return ledger_of(optimizer, index).terms


def keep_few_terms(patch: pytest.MonkeyPatch) -> None:
    """Let ledgers sum up terms as soon as their rank passes 4 r, so that a few moves of a small layer get there."""
    patch.setattr(ledger, "SMALL_RANK", 0)


def has_moved(optimizer: DeltaLoRAOptimizer, index: int = 0) -> bool:
    """Tell if W of this triple was ever moved."""
    return optimizer.weights()[index].moved


def compensation_of(optimizer: DeltaLoRAOptimizer, index: int = 0) -> Tensor | None:
    """Return the bits that rounding cut off from a 16-bit W, or None where nothing is kept."""
    kept = optimizer.weights()[index].compensation
    return None if kept is None else kept.bits


def forget_compensation(optimizer: DeltaLoRAOptimizer, index: int = 0) -> None:
    optimizer.weights()[index].compensation = None


def full_weight(optimizer: DeltaLoRAOptimizer, index: int = 0) -> Tensor:
    """Return the part of W that moves, with what rounding cut off from it."""
    return optimizer.weights()[index].full_part()


def pending_updates(optimizer: DeltaLoRAOptimizer) -> list[Any]:
    """Return the ledger updates whose outcome the device has not reported yet."""
    return list(optimizer._rule._pending)


class _HostOfAGpu(Host):
    def __init__(self, reads: bool, reports: Iterator[bool] | None, kernel: Any) -> None:
        self._reads, self._reports, self._kernel = reads, reports, kernel

    def reads(self, device: torch.device) -> bool:
        return self._reads

    def arrived(self, event: Any) -> bool:
        return super().arrived(event) if self._reports is None else next(self._reports)

    def kernel(self, device: torch.device) -> Any:
        return self._kernel


def as_on_a_gpu(
    reads: bool = False, reports: Iterator[bool] | None = None, kernel: Any = None
) -> Callable[[], InPlaceUpdate]:
    """Return a `weight_update` that takes the path of a GPU, where the host learns later whether a step was applied.

    Args:
        reads: the host can read the device after all.
        reports: answer, one after the other, whether the report of a step has arrived; None asks the device.
        kernel: writes 16-bit weights; None for blocks of torch operations.
    """
    return partial(InPlaceUpdate, _HostOfAGpu(reads, reports, kernel))


def folded_as_on_a_gpu() -> Callable[[], FoldedUpdate]:
    """Return a `weight_update` that folds as on a GPU, where the host does not know whether W is written."""
    return partial(FoldedUpdate, _HostOfAGpu(reads=False, reports=None, kernel=None))


before_folded_step = inspect.unwrap(FoldedUpdate.before_step)
"""The function in which the folded rule changes W and the branches."""


def inner_sizes(patch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that is given the inner size of each product that is added to a W."""
    sizes, add_product = [], writer.add_product_

    def noting(W: Tensor, U: Tensor, *arguments: Any) -> None:
        sizes.append(U.shape[-1])
        add_product(W, U, *arguments)

    patch.setattr(writer, "add_product_", noting)
    return sizes


class _HostWithoutKernel(Host):
    def kernel(self, device: torch.device) -> None:
        return None


def without_kernel() -> Callable[[], InPlaceUpdate]:
    """Return a `weight_update` that writes 16-bit weights by blocks of torch operations on every device."""
    return partial(InPlaceUpdate, _HostWithoutKernel())


def kernel_for(device: torch.device) -> Any:
    """Return the kernel that optimizers take on this device, or None."""
    return Host().kernel(device)


def forget_hooks(optimizer: DeltaLoRAOptimizer, *factors: Tensor) -> None:
    """Lose the hooks of these factors, as a copy does that was made before its module was complete."""
    fresh = copy.deepcopy(optimizer._rule)
    for factor in factors:
        gradient_hooks._divisors.pop(factor)
        factor._backward_hooks.clear()
    optimizer._rule, optimizer._seen = fresh, False
    optimizer._weights = [copy.copy(weight) for weight in optimizer._weights]


def note_products(patch: pytest.MonkeyPatch, note: Callable[[float, Tensor, Tensor], object]) -> None:
    """Let optimizers call `note(coef, U, V)` in place of adding coef * U @ V to a W that moves in place."""
    patch.setattr(Writer, "add_product_", lambda self, weight, U, V, coef, *options: note(coef, U, V))


def use_blocks_of(patch: pytest.MonkeyPatch, elements: int) -> None:
    """Lift 16-bit weights to 32 bits in blocks of this many elements."""
    patch.setattr(blocks, "BLOCK_ELEMENTS", elements)


def fingerprints_of_weights(patch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that gets each W whose fingerprint is taken from now on."""
    taken: list[Tensor] = []

    class Noted(Fingerprint):
        def __init__(self, tensor: Tensor, whole: Any = None) -> None:
            taken.append(tensor)
            super().__init__(tensor, whole)

        @classmethod
        def of_each(cls, tensors: Sequence[Tensor]) -> list[Fingerprint]:
            taken.extend(tensors)
            return Fingerprint.of_each(tensors)

    patch.setattr(weight_module, "Fingerprint", Noted)
    return taken


def buffer_addresses(optimizer: DeltaLoRAOptimizer) -> list[int]:
    """Return the places of the buffers that stay from step to step."""
    return [buffers.slots[0].end[0].data_ptr() for buffers in optimizer._rule._buffers.values()]


def fail_at_write(patch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Let the writes of these numbers, counted from 1, run out of memory before they change anything."""
    add_product, count = writer.add_product_, itertools.count(1)

    def failing(*arguments: Any, **options: Any) -> None:
        if next(count) in numbers:
            raise torch.OutOfMemoryError("out of memory")
        add_product(*arguments, **options)

    patch.setattr(writer, "add_product_", failing)


def record_of(state: dict) -> dict[str, Any]:
    """Return what a state says of the triples and their settings; it may be edited."""
    return state["param_groups"][0]["deltaopt"]


def change_ledger(state: dict[str, Any], name: str, change: Any) -> None:
    """Let `change` edit the saved ledger of a triple, under a checksum that fits."""
    ledgers, _, _ = split_ledgers(state)
    change(ledgers[name])
    for entries in state["state"].values():
        if LEDGER + name in entries:
            entries[LEDGER + name] = _sealed({name: ledgers[name]})


def as_schema_4(state: dict[str, Any]) -> dict[str, Any]:
    """Write a state as 6f8145d did: the ledgers of all triples of one A in one string."""
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        group[KEY] = {**group[KEY], "schema": 4}
    for entries in state["state"].values():
        ours = [key for key in entries if key.startswith(LEDGER)]
        found = {name: record for key in ours for name, record in json.loads(entries.pop(key)[9:]).items()}
        if found:
            entries[KEY] = _sealed(found)
    return state


def use_chunks_of(patch: pytest.MonkeyPatch, elements: int) -> None:
    """Make U and V of as many weights at a time as have this many elements of them; of one weight at least."""
    patch.setattr(factor_buffers, "CHUNK_ELEMENTS", elements)


def renew_locks() -> None:
    """Forget who holds the package's locks."""
    claims._lock = threading.RLock()
