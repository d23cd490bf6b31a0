"""The folded update: the ratio goes into the branch, and W is written only where the ratio changes.

While lambda = update_ratio is constant, the moves of W add up to the change of the product (docs/method.md):

    W[t] + s A[t] B[t]  =  (W[k] - lambda s A[k] B[k])  +  (1 + lambda) s A[t] B[t]

So where lambda changes, from `old` (0 before step K) to `new`, (new - old) s A B is taken from W and the branch is
scaled by (1 + new) s. That makes the gradients of A and B 1 + new times as large; a hook on each of them divides by it
before anything sees them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from deltaopt import gradient_hooks
from deltaopt.all_or_nothing import Event, Issued
from deltaopt.checks import claim_problems, weight_problems
from deltaopt.factors import Factor, looked_up
from deltaopt.gradient_hooks import GradientHooks, evaluated_once, is_in_use
from deltaopt.groups import DeltaGroup, UpdateRatio
from deltaopt.guard import FiniteGuard
from deltaopt.host import Host
from deltaopt.ledger import Ledger
from deltaopt.lowrank import Term
from deltaopt.messages import names, problems_of, raise_problems
from deltaopt.outside import warn_of_loads
from deltaopt.rounding.writer import Writer
from deltaopt.rule import Closure, UpdateRule
from deltaopt.sharding import is_sharded
from deltaopt.triple import LoRATriple
from deltaopt.weight import WeightState


class FoldedUpdate(UpdateRule):
    """Folds the update_ratio of each weight into its branch, and divides the factors' gradients.

    Args:
        host: decides what is read from a device. Default: nothing that would wait for it, once a W was written.
    """

    name = "folded"
    moves_weights = False
    scales_branches = True

    def __init__(self, host: Host | None = None) -> None:
        super().__init__()
        self._host = host if host is not None else Host()
        self._hooks = GradientHooks()
        self._change: _Change | None = None
        self._checked_ratios: dict[DeltaGroup, UpdateRatio] = {}
        self._changed: list[Ledger] = []
        self._counts: dict[WeightState, int | None] = {}

    def check_inner(self, inner: Optimizer) -> None:
        """Raise ValueError for an optimizer that evaluates the loss at several places within a step."""
        gradient_hooks.check_inner(inner)

    def check_groups(self, groups: Sequence[DeltaGroup]) -> None:
        """Raise ValueError for triples that share a factor and have other settings; those of a callable show later."""
        _check_all_rows([triple for group in groups for triple in group.triples])
        constant = [group for group in groups if not callable(group.update_ratio)]
        _check_equal({triple: (group.update_ratio, group.start_step) for group in constant for triple in group.triples})

    def weight_problems(self, weight: WeightState, unwritable: list[str]) -> list[str]:
        """Say why the branch cannot be scaled, or why W would have to be written and cannot be."""
        found = _folding_problems(weight.triple)
        if unwritable and callable(weight.group.update_ratio):
            found.append(_varying_sentence(unwritable))
        return found

    def factor_problems(self, weight: WeightState, letter: str, factor: Tensor) -> list[str]:
        """Say why a factor cannot be trained; a sharded one can, if its replacement in the forward pass is known."""
        if not is_sharded(factor):
            return super().factor_problems(weight, letter, factor)
        if weight.triple.is_looked_up:
            return []
        return [
            f"{letter} is sharded and was registered as a tensor, so that what FSDP2 puts in its place in the forward "
            f"pass is not known: register (module, {letter!r}), or use find_triples"
        ]

    def attach(self, weights: Sequence[WeightState]) -> None:
        """Divide the gradients of these weights' factors, for this optimizer alone; let state_dicts give A for s."""
        for weight in weights:
            weight.triple.store_for_first_scaling()
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

    @torch.no_grad()
    def before_step(self, weights: Sequence[WeightState], writer: Writer, closure: Closure | None) -> None:
        """Fold the ratios that are other ones than in the last step; after that the branch moves what W would.

        The effective weight stays. A factor that is NaN or infinite leaves every W as it is, and is counted: then the
        branches have their new scaling and the effective weights jump.

        Raises:
            ValueError: if triples with different ratios share a factor or the place of a scaling.
            RuntimeError: if gradients came undivided, a W that cannot be written would have to be, or a branch cannot
                be folded. Nothing is changed then.
        """
        self.flush()
        self._changed = []
        warn_of_loads(weights)
        self._hooks.refuse_undivided(weights)
        self._refuse_varying(weights)
        due = _due(weights, with_closure=closure is not None)
        if not due:
            return
        if self.ranks is not None:
            self.ranks.meet("a change of update_ratio", {"layers": len(due)})
        _check_foldable(due)
        terms = {weight: _taken(weight) for weight in due}
        finite = self._guard.verdict([factor for term in terms.values() for factor in (term.A, term.B)])
        parts = [_Part.of(weight, term) for weight, term in self._moving(terms, finite)]
        change = _Change(due, parts, writer, self._guard, finite)
        before = [(weight.triple, weight.triple.folded) for weight in due]
        try:
            self._scale([(weight.triple, weight.ratio) for weight in due])
            _check_set(due)
            self._change = change  # from here on an exception is raised after the rest is done
            change.complete()
        except BaseException:
            if self._change is None:
                self._scale(before)
            else:
                change.complete()
                self._change = None
            raise
        self._change = None
        self._changed = [part.ledger for part in parts]

    def after_step(self, weights: Sequence[WeightState], writer: Writer, whole: bool = True) -> None:
        """Count the step; sum up terms of the ledgers that it has extended, if they have become many."""
        if whole:
            for weight, count in self._counts.items():
                if any(parameter.grad is not None for parameter in weight.tensors.stored):
                    weight.moves = count
        self._upkeep.after_step(self._changed)
        self._changed = []

    @contextmanager
    def inner_step(self, weights: Sequence[WeightState], closure: Closure | None) -> Iterator[Closure | None]:
        """Watch the inner optimizer: it may evaluate the loss once, with A and B as they are, and needs gradients."""
        self._counts = {weight: weight.count_after_a_move() for weight in weights if weight.triple.folded}
        if closure is not None and any(weight.triple.folded for weight in weights):
            closure = evaluated_once(closure, [weight.triple for weight in weights])
        with self._hooks.watching(weights):
            yield closure

    def unfold(self, weights: Sequence[WeightState]) -> None:
        """Let every branch add scaling * A @ B, as next to a W that moves, and leave the gradients whole."""
        self._hooks.pause()
        for triple in (weight.triple for weight in weights):
            if triple.folded:
                triple.set_branch_scaling(triple.scaling)

    def fold_again(self, weights: Sequence[WeightState]) -> None:
        """Undo `unfold`, also half of it."""
        with ExitStack() as each:  # all of them, though a setter raises
            each.callback(self._hooks.resume)
            for triple in (weight.triple for weight in weights):
                if triple.folded:
                    each.callback(triple.set_branch_scaling, triple.branch_scaling)

    def restore(self, weights: Sequence[WeightState], records: Sequence[Mapping[str, Any]]) -> None:
        """Scale the branches, and divide the gradients, as in the run that was saved."""
        with ExitStack() as each:  # all of them, though a setter raises
            each.callback(self._hooks.divide, [weight.triple for weight in weights])
            for weight, record in zip(weights, records, strict=True):
                each.callback(_set, weight.triple, record["folded"], record["scaling"])

    def forget(self) -> None:
        """Forget a change that could not be completed."""
        self._change = None

    def flush(self) -> None:
        """Complete a change of W that an exception has interrupted."""
        if self._change is not None:
            Event("a change of update_ratio", self._change.complete, self._change.unfinished).complete_later()
            self._change = None

    def settler(self) -> Callable[[], None]:
        """Return `flush` of this rule while it lives: its hooks on the gradients must not live on with the model."""
        rule = weakref.ref(self)

        def settle() -> None:
            living = rule()
            if living is not None:
                living.flush()

        return settle

    def _refuse_varying(self, weights: Sequence[WeightState]) -> None:
        """Raise RuntimeError where a callable ratio was set since the last step, and a W cannot be written."""
        ratios = {weight.group: weight.group.update_ratio for weight in weights}
        new = {group for group, ratio in ratios.items() if self._checked_ratios.get(group) is not ratio}
        raise_problems(
            RuntimeError,
            "update_ratio cannot be folded now (nothing was changed)",
            [
                problem
                for weight in weights
                if weight.group in new and callable(weight.group.update_ratio)
                if (unwritable := weight.weight_problems())
                for problem in problems_of(weight.label, [_varying_sentence(unwritable)])
            ],
        )
        self._checked_ratios = ratios

    def _moving(self, terms: Mapping[WeightState, Term], finite: Tensor) -> list[tuple[WeightState, Term]]:
        """Return copies of the terms that W is to move by: none if a factor is not finite.

        On a GPU the host does not wait for that, so that all terms come back, of zeros if a factor is not finite. It
        waits only where a W was never written, to leave that alone while its product is zero, or cannot be.

        Raises:
            RuntimeError: if such a W would have to be written.
        """
        unwritable = [weight for weight in terms if weight.weight_problems()]
        reads = self._host.reads(finite.device)
        if not reads and not unwritable and all(weight.moved for weight in terms):
            return [(weight, _masked(term, finite)) for weight, term in terms.items()]
        if not bool(finite):
            return []
        moving = [(weight, term.cloned()) for weight, term in terms.items() if not term.is_zero()]
        _check_writable([weight for weight, _ in moving])
        return moving

    def _scale(self, ratios: Sequence[tuple[LoRATriple, float]]) -> None:
        """Scale each branch by 1 + its ratio, and divide the gradients by it; all of them, though a setter raises."""
        with ExitStack() as each:
            each.callback(self._hooks.divide, [triple for triple, _ in ratios])
            for triple, ratio in reversed(ratios):
                each.callback(_set, triple, ratio)

    def __getstate__(self) -> dict[str, Any]:
        # What is known of the device belongs to the process; an interrupted change was completed before.
        return {"skipped_updates": self.skipped_updates, "hooks": self._hooks, "host": self._host}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FoldedUpdate.__init__(self, state["host"])
        self._hooks, self.skipped_updates = state["hooks"], state["skipped_updates"]


class _Part(NamedTuple):
    """The share of one W in a change.

    Attributes:
        weight: whose W is written.
        term: that is added to W.
        ledger: of W after it.
        done: the writes so far, see `Writer.add_term_`.
        issued: the collectives of its base.
    """

    weight: WeightState
    term: Term
    ledger: Ledger
    done: list[Any]
    issued: Issued

    @classmethod
    def of(cls, weight: WeightState, term: Term) -> _Part:
        return cls(weight, term, weight.placed_ledger().plus(term), [], Issued())


class _Change:
    """Writes of weights whose branches have their new scaling, until all of them are done."""

    def __init__(
        self, due: Sequence[WeightState], parts: list[_Part], writer: Writer, guard: FiniteGuard, finite: Tensor
    ) -> None:
        self._due = due
        self.parts = parts
        self._writer = writer
        self._guard = guard
        self._finite = finite
        self._counted: list[Any] = []

    @torch.no_grad()
    def complete(self) -> None:
        """Write what is not written yet."""
        for weight in self._due:
            weight.folded_since = self._writer.step if weight.triple.folded else None
        for weight, term, ledger, done, issued in self.parts:
            weight.note_base(issued)
            self._writer.add_term_(weight, term, done)
            weight.ledger = ledger
        self._guard.count(self._finite, self._counted)

    def unfinished(self) -> list[str]:
        """Return the labels of the weights that were not written yet."""
        return [part.weight.label for part in self.parts if not part.done]


def _taken(weight: WeightState) -> Term:
    """Return what W moves by where its ratio changes, -(new - old) s A B."""
    change = weight.ratio - weight.triple.folded
    return weight.branch()._replace(coef=-change * weight.triple.scaling)


def _masked(term: Term, finite: Tensor) -> Term:
    """Return a copy of the term, of zeros if `finite`, 0-d on any device, is False.

    The coefficient is negative: adding -0 leaves every bit of W, and adding +0 does not.
    """
    here = finite.to(term.A.device, non_blocking=True)
    A = term.A if term.coef < 0 else -term.A
    return Term(-abs(term.coef), torch.where(here, A, 0.0), torch.where(here, term.B, 0.0))


def _due(weights: Sequence[WeightState], with_closure: bool) -> list[WeightState]:
    """Return the weights whose ratio is to be folded at the start of this step.

    Triples made of tensors have time until these have gradients (a closure may make them), as this step leaves
    them as they are until then: where the model has replaced its parameters, they never have any.
    """
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
    triple.forget_load()


def _check_all_rows(triples: Iterable[LoRATriple]) -> None:
    """Raise ValueError for parameters of which some rows belong to no triple: their gradients would be divided too."""
    users: dict[Tensor, list[tuple[int, int]]] = {}
    labels: dict[Tensor, str] = {}
    for triple in triples:
        for letter, source in triple.factor_sources.items():
            if isinstance(source, Factor) and source.bounds is not None:
                parameter = looked_up(source.sources[0], triple.label)
                users.setdefault(parameter, []).append(source.bounds)
                labels.setdefault(parameter, f"{triple.label}: its {letter}")
    problems = []
    for parameter, bounds in users.items():
        taken = {row for start, stop in bounds for row in range(start, stop)}
        if len(taken) < parameter.shape[0]:
            problems.append(
                f"{labels[parameter]} is rows of a parameter of the shape {tuple(parameter.shape)}, of which "
                f"{parameter.shape[0] - len(taken)} rows belong to no triple"
            )
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}. The folded rule divides the gradient of the whole parameter, and scales all that "
            'a state_dict says of it: register the triples of the other rows too, or use weight_update="in_place"'
        )


def _check_equal(settings: Mapping[LoRATriple, object]) -> None:
    """Raise ValueError for a factor, or a place of a scaling, that triples of different settings share."""
    users: dict[object, LoRATriple] = {}
    for triple, setting in settings.items():
        parameters = zip(triple.parameter_names, triple.stored, strict=True)
        places: list[tuple[str, object]] = [(f"{name} is a factor", id(parameter)) for name, parameter in parameters]
        for what, place in (*places, ("scaling is that", triple.branch.place())):
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
            for problem in problems_of(weight.label, [*_folding_problems(weight.triple), *_precision_problems(weight)])
        ],
    )


def _folding_problems(triple: LoRATriple) -> list[str]:
    """Say why update_ratio cannot be folded into a branch: by what its W and its layer are."""
    found = triple.folding_problems()
    if triple.tied:
        found.append(
            "its W is used in another place too, which would move with it and has no branch: use "
            'weight_update="in_place"'
        )
    return found


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
        "update_ratio changes (at start_step from 0) while the product A @ B is not zero, so a multiple of it has to "
        "be taken from W, and these cannot be written (nothing was changed). Set start_step=0, start from a zero "
        "product, as LoRA's usual initialisation does, and leave update_ratio as it is",
        weight_problems(moving) + claim_problems(moving),
    )


def _varying_sentence(unwritable: Sequence[str]) -> str:
    """Say that a callable ratio may ask for a write of a W with these problems."""
    return (
        f"{unwritable[0]}, so W cannot be written, as it has to be where update_ratio changes while A @ B is not zero; "
        "and a callable update_ratio may change at any step: use a number"
    )


def _check_set(due: Iterable[WeightState]) -> None:
    """Raise RuntimeError if a setter did not set what the branch multiplies by."""
    unset = [f"{w.label} ({w.triple.branch_scaling:g})" for w in due if w.triple.scaling_problems()]
    if unset:
        raise RuntimeError(
            f"the scaling of {names(unset)} was set and is another one now (nothing was changed): does "
            "set_scaling set what scaling= reads?"
        )
