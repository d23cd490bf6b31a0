"""UpdateRule: what the optimizer asks of the two ways to bring about Eq. 6, in_place.py and folded.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from deltaopt.groups import DeltaGroup
from deltaopt.guard import FiniteGuard
from deltaopt.outside import Watch
from deltaopt.ranks import Ranks
from deltaopt.rounding.writer import Writer
from deltaopt.sharding import is_sharded, local_part, sharding_problems
from deltaopt.tensors import tensor_problems
from deltaopt.upkeep import Upkeep
from deltaopt.weight import WeightState

Closure: TypeAlias = Callable[[], float]


class UpdateRule:
    """One way to move the effective weights.

    The optimizer is built with one and never asks which it is, only what it does to weights and branches. The methods
    are listed in the order in which a run meets them; what a rule does not need does nothing.

    Attributes:
        name: the value of the argument ``weight_update``.
        moves_weights: True if every W moves, so that checkpoints hold a place for the compensation of each.
        scales_branches: True if branches get another scaling, which export and loading have to look at.
        watch: for changes of A and B from outside; None if W need not follow them.
        ranks: those that share sharded weights or factors; None where nothing is sharded.
        rank_timeout: seconds that they wait for each other; None for as long as the default process group does.
    """

    name: str
    moves_weights: bool
    scales_branches: bool
    watch: Watch | None = None
    ranks: Ranks | None = None
    rank_timeout: float | None = None

    def __init__(self) -> None:
        self._guard = FiniteGuard()
        self._upkeep = Upkeep()

    @property
    def skipped_updates(self) -> int:
        """The number of updates that left every W alone because a factor was not finite. Waits for the device."""
        return self._guard.skipped

    @skipped_updates.setter
    def skipped_updates(self, count: int) -> None:
        self._guard = FiniteGuard(count)

    def skipped_at_a_glance(self) -> str:
        """Say how many updates were skipped, as far as the host knows; empty if it knows of none."""
        return self._guard.at_a_glance()

    def check_inner(self, inner: Optimizer) -> None:
        """Raise ValueError for an inner optimizer that this rule cannot follow."""

    def check_groups(self, groups: Sequence[DeltaGroup]) -> None:
        """Raise ValueError for settings that this rule cannot follow."""

    def weight_problems(self, weight: WeightState, unwritable: list[str]) -> list[str]:
        """Say why this rule cannot move a weight.

        Args:
            weight: with its tensors resolved.
            unwritable: the problems of reading and writing W in place.
        """
        raise NotImplementedError("an update rule has to say which weights it cannot move")

    def factor_problems(self, weight: WeightState, letter: str, factor: Tensor) -> list[str]:
        """Say why this rule cannot train a factor."""
        found = sharding_problems(letter, factor) if is_sharded(factor) else []
        return found or tensor_problems(letter, local_part(factor))

    def attach(self, weights: Sequence[WeightState]) -> None:
        """Claim the gradients of these weights' factors, for this rule's optimizer."""

    def follow(self, weights: Sequence[WeightState], replaced: bool) -> None:
        """Note the tensors there are now, before each event.

        Args:
            weights: all of the optimizer.
            replaced: True if some are not those of the last event.

        Raises:
            RuntimeError: if another optimizer has claimed a factor, or gradients came past this rule.
        """

    def release(self) -> None:
        """Stop acting on the gradients, until the next `follow`."""

    def before_step(self, weights: Sequence[WeightState], writer: Writer, closure: Closure | None) -> None:
        """Do what has to be done before the inner step; each weight's `ratio` is that of this step."""
        raise NotImplementedError("an update rule has to say what it does before the inner step")

    def inner_step(
        self, weights: Sequence[WeightState], closure: Closure | None
    ) -> AbstractContextManager[Closure | None]:
        """Return a context for the inner step, which gives the closure to hand over."""
        return nullcontext(closure)

    def after_step(self, weights: Sequence[WeightState], writer: Writer, whole: bool = True) -> None:
        """Do what has to be done after the inner step; after an exception, what is left of it.

        Args:
            weights: all of the optimizer.
            writer: of the step.
            whole: False if the inner step has raised. It may have changed some of the factors.
        """

    def warn(self, stacklevel: int) -> None:
        """Warn of the first update that was skipped, and of ledgers that will grow large.

        Called last, since a warning may be made an error.
        """
        self._guard.warn(stacklevel + 1)
        self._upkeep.warn(stacklevel + 1)

    def unwritten(self) -> list[str]:
        """Return the labels of the weights that an interrupted step has not moved yet."""
        return []

    def flush(self) -> None:
        """Complete what past steps have left open, and the ledgers; waits for the device."""

    def settler(self) -> Callable[[], None]:
        """Return a function that does what `flush` does, for hooks on the model, which outlive the optimizer."""
        return self.flush

    def unfold(self, weights: Sequence[WeightState]) -> None:
        """Let every branch add scaling * A @ B, as next to a W that moves."""

    def fold_again(self, weights: Sequence[WeightState]) -> None:
        """Undo `unfold`, also half of it; may be called again after an exception."""

    def restore(self, weights: Sequence[WeightState], records: Sequence[Mapping[str, Any]]) -> None:
        """Put the branches into the state of a saved run; may be called again after an exception.

        A rule that scales none meets another scaling where a folded run came before the saved one.
        """
        for weight, record in zip(weights, records, strict=True):
            if record["scaling"] != weight.triple.scaling:
                weight.triple.store_for_first_scaling()
                weight.triple.scaling = record["scaling"]
                weight.triple.set_branch_scaling(record["scaling"])

    def forget(self) -> None:
        """Forget what an interrupted step has left open: a state was loaded, which says where every W is."""

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that stay from step to step."""
        return 0
