"""The folded update: a constant ratio goes into the branch, and W is not written after step K.

While lambda = update_ratio is constant, the moves of W add up to the change of the product (docs/method.md):

    W[t] + s A[t] B[t]  =  (W[K] - lambda s A[K] B[K])  +  (1 + lambda) s A[t] B[t]

So at step K the constant is taken from W, once, and the branch is scaled by (1 + lambda) s from then on. That makes the
gradients of A and B 1 + lambda times as large; a hook on each of them divides by it before anything sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deltaopt import gradient_hooks
from deltaopt.checks import check_finite, claim_problems, weight_problems
from deltaopt.gradient_hooks import GradientHooks, evaluated_once, is_in_use
from deltaopt.groups import DeltaGroup
from deltaopt.messages import names, problems_of, raise_problems
from deltaopt.rounding.writer import Writer
from deltaopt.rule import Closure, UpdateRule
from deltaopt.sharding import is_sharded
from deltaopt.triple import LoRATriple
from deltaopt.weight import WeightState


class FoldedUpdate(UpdateRule):
    """Folds the update_ratio of each weight into its branch, and divides the factors' gradients."""

    name = "folded"
    moves_weights = False
    scales_branches = True

    def __init__(self) -> None:
        self._hooks = GradientHooks()
        self.skipped_updates = 0

    def check_inner(self, inner: Optimizer) -> None:
        """Raise ValueError for an optimizer that evaluates the loss at several places within a step."""
        gradient_hooks.check_inner(inner)

    def check_groups(self, groups: Sequence[DeltaGroup]) -> None:
        """Raise ValueError for a ratio that is no constant, and for triples that share a factor and differ."""
        _check_constant(groups)
        _check_equal({triple: (group.update_ratio, group.start_step) for group in groups for triple in group.triples})

    def check_ratios(self, groups: Sequence[DeltaGroup]) -> None:
        """Raise ValueError for a callable update_ratio, which may change."""
        _check_constant(groups)

    def weight_problems(self, weight: WeightState, unwritable: list[str]) -> list[str]:
        """Say why the branch cannot be scaled; W need not be written."""
        return weight.triple.folding_problems()

    def factor_problems(self, weight: WeightState, letter: str, factor: Tensor) -> list[str]:
        """Say why a factor cannot be trained; a sharded one can, if its replacement in the forward pass is known."""
        if not is_sharded(factor):
            return super().factor_problems(weight, letter, factor)
        if not isinstance(weight.triple.sources[letter], Tensor):
            return []
        return [
            f"{letter} is sharded and was registered as a tensor, so that what FSDP2 puts in its place in the forward "
            f"pass is not known: register (module, {letter!r}), or use find_triples"
        ]

    def attach(self, weights: Sequence[WeightState]) -> None:
        """Divide the gradients of these weights' factors, for this optimizer alone."""
        self._hooks.claim([weight.triple for weight in weights])

    def follow(self, weights: Sequence[WeightState], replaced: bool) -> None:
        """Put hooks on the factors there are now, and see that no other optimizer has claimed them."""
        triples = [weight.triple for weight in weights]
        if replaced:
            self._hooks.attach(triples)
        self._hooks.check(triples)

    def release(self) -> None:
        """Leave the gradients whole, until the next `follow`."""
        self._hooks.leave()

    def before_step(self, weights: Sequence[WeightState], writer: Writer, closure: Closure | None) -> None:
        """Fold the ratio into the branches for which step K has come; after that the branch moves what W would.

        Raises:
            ValueError: if a ratio that was folded has changed since, or a factor is NaN or infinite.
            RuntimeError: if gradients came undivided, a W that cannot be written would have to be, or a branch cannot
                be folded. Nothing is changed then.
        """
        self._hooks.refuse_undivided(weights)
        due = _due(weights, with_closure=closure is not None)
        if due:
            self._fold(due, writer)

    @contextmanager
    def inner_step(self, weights: Sequence[WeightState], closure: Closure | None) -> Iterator[Closure | None]:
        """Watch the inner optimizer: it may evaluate the loss once, with A and B as they are, and needs gradients."""
        if closure is not None and any(weight.triple.folded for weight in weights):
            closure = evaluated_once(closure, [weight.triple for weight in weights])
        with self._hooks.watching(weights):
            yield closure

    @contextmanager
    def unfolded(self, weights: Sequence[WeightState]) -> Iterator[None]:
        """Let every branch add scaling * A @ B within it, as next to a W that moves; gradients are whole."""
        with ExitStack() as undo:
            undo.enter_context(self._hooks.undivided())
            for triple in (weight.triple for weight in weights):
                if triple.folded:
                    undo.callback(triple.set_branch_scaling, triple.branch_scaling)
                    triple.set_branch_scaling(triple.scaling)
            yield

    @contextmanager
    def restored(self, weights: Sequence[WeightState], records: Iterable[Mapping[str, Any]]) -> Iterator[None]:
        """Scale the branches, and divide the gradients, as in the run that was saved.

        If an exception leaves it, the branches are as before.
        """
        triples = [weight.triple for weight in weights]
        with ExitStack() as undo:
            for triple, record in zip(triples, records, strict=True):
                undo.callback(_set, triple, triple.folded, triple.scaling)
                _set(triple, record["folded"], record["scaling"])
            yield
            undo.pop_all()
        self._hooks.divide(triples)

    @torch.no_grad()
    def _fold(self, due: Sequence[WeightState], writer: Writer) -> None:
        """Take lambda s A B from each W, where that is not zero, and scale the branch by (1 + lambda) s.

        The effective weight is as before. This waits for the device, once in a run.
        """
        _check_foldable(due)
        branches = [(weight, weight.branch()) for weight in due]
        moving = [
            (weight, branch._replace(coef=-weight.ratio * branch.coef))
            for weight, branch in branches
            if not branch.is_zero()
        ]
        check_finite(due)
        _check_writable([weight for weight, _ in moving])
        with ExitStack() as undo:
            for weight in due:
                undo.callback(_set, weight.triple, weight.triple.folded)
                _set(weight.triple, weight.ratio)
            _check_set(due)
            for weight, _ in moving:
                weight.note_base()
            for weight, term in moving:
                writer.add_terms_(weight, [term])
                undo.callback(writer.add_terms_, weight, [term._replace(coef=-term.coef)])
            undo.pop_all()
        for weight, term in moving:
            weight.placed_ledger().add(term)
        self._hooks.divide([weight.triple for weight in due])


def _due(weights: Sequence[WeightState], with_closure: bool) -> list[WeightState]:
    """Return the weights whose ratio is to be folded at the start of this step.

    Triples made of tensors have time until these have gradients (a closure may make them), as this step leaves
    them as they are until then: where the model has replaced its parameters, they never have any.
    """
    changed = [
        f"{weight.label} ({weight.triple.folded:g}, now {weight.ratio:g})"
        for weight in weights
        if weight.triple.folded not in (0.0, weight.ratio)
    ]
    if changed:
        raise ValueError(
            f"update_ratio has changed since it was folded into the branch of {names(changed)}: "
            'weight_update="folded" is exact for a constant ratio only. Put update_ratio and start_step back, or '
            'use weight_update="in_place"'
        )
    pending = [weight for weight in weights if weight.ratio != weight.triple.folded]
    in_use = {w.triple.branch.place() for w in pending if with_closure or is_in_use(w.triple)}
    due = [weight for weight in pending if weight.triple.branch.place() in in_use]
    if due:
        _check_equal({weight.triple: weight.ratio for weight in weights})
    return due


def _set(triple: LoRATriple, ratio: float, scaling: float | None = None) -> None:
    triple.scaling = triple.scaling if scaling is None else scaling
    triple.folded = ratio
    triple.set_branch_scaling(triple.branch_scaling)


def _check_constant(groups: Iterable[DeltaGroup]) -> None:
    """Raise ValueError for a callable update_ratio, which may change."""
    for group in groups:
        if callable(group.update_ratio):
            raise ValueError(
                f'{names([triple.label for triple in group.triples])}: weight_update="folded" needs a constant '
                f"update_ratio, got {group.update_ratio!r}: what W was moved by is then no multiple of the running "
                'product, and cannot be folded into the branch. Use weight_update="in_place"'
            )


def _check_equal(settings: Mapping[LoRATriple, object]) -> None:
    """Raise ValueError for a factor, or a place of a scaling, that triples of different settings share."""
    users: dict[object, LoRATriple] = {}
    for triple, setting in settings.items():
        for what, place in (
            ("A is a factor", id(triple.A)),
            ("B is a factor", id(triple.B)),
            ("scaling is that", triple.branch.place()),
        ):
            other = users.setdefault(place, triple)
            if settings[other] != setting:
                raise ValueError(
                    f"{triple.label}: its {what} of {other.label} too, which has another update_ratio or start_step, "
                    "and cannot be divided or set for both: give them the same, or use "
                    'weight_update="in_place"'
                )


def _check_foldable(due: Iterable[WeightState]) -> None:
    """Raise RuntimeError for branches whose scaling cannot be set to (1 + lambda) s."""
    raise_problems(
        RuntimeError,
        "update_ratio cannot be folded now (nothing was changed)",
        [
            problem
            for weight in due
            for problem in problems_of(weight.label, [*weight.triple.folding_problems(), *_precision_problems(weight)])
        ],
    )


def _precision_problems(weight: WeightState) -> list[str]:
    """Say if the branch's scaling is a tensor that cannot hold (1 + lambda) s in the precision of the computation."""
    scaling = weight.triple.scaling * (1.0 + weight.ratio)
    rounded = weight.triple.branch.rounded(scaling)
    if abs(rounded - scaling) <= torch.finfo(weight.tensors.compute_dtype()).eps * abs(scaling):
        return []
    return [
        f"its scaling is a tensor in which (1 + update_ratio) * scaling = {scaling:g} is rounded to {rounded:g}: "
        "keep it in the dtype of the computation"
    ]


def _check_writable(moving: Sequence[WeightState]) -> None:
    """Raise RuntimeError for weights that cannot be written."""
    raise_problems(
        RuntimeError,
        "the product A @ B is not zero at start_step, so update_ratio * scaling * A @ B has to be taken from W "
        "once, and these cannot be written (nothing was changed). Set start_step=0 and start from a zero "
        "product, as LoRA's usual initialisation does",
        weight_problems(moving) + claim_problems(moving),
    )


def _check_set(due: Iterable[WeightState]) -> None:
    """Raise RuntimeError if a setter did not set what the branch multiplies by."""
    unset = [f"{w.label} ({w.triple.branch_scaling:g})" for w in due if w.triple.scaling_problems()]
    if unset:
        raise RuntimeError(
            f"the scaling of {names(unset)} was set and is another one now (nothing was changed): does "
            "set_scaling set what scaling= reads?"
        )
