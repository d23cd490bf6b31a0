"""Delta-LoRA with a constant ratio that never writes W after step K: ``weight_update="folded"``.

While lambda = update_ratio is constant, the moves of W add up to the change of the product (docs/method.md):

    W[t] + s A[t] B[t]  =  (W[K] - lambda s A[K] B[K])  +  (1 + lambda) s A[t] B[t]

So at step K the constant is taken from W, once, and the branch is scaled by (1 + lambda) s from then on. That makes the
gradients of A and B 1 + lambda times as large; a hook on each of them divides by it before anything sees them.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from deltaopt.accounts import Accounts
from deltaopt.distributed import is_sharded
from deltaopt.groups import DeltaGroup
from deltaopt.ledger import Ledger, branch_of
from deltaopt.lowrank import Term
from deltaopt.scaling import holder_of
from deltaopt.triple import LoRATriple, Stored
from deltaopt.writing import Write

MODES = ("in_place", "folded")


class Due(NamedTuple):
    """A triple into whose branch `ratio` is to be folded now, and the ledger of its W."""

    triple: LoRATriple
    ledger: Ledger
    ratio: float


class Folding:
    """Folds the update_ratio of an optimizer's triples into their branches, and divides the factors' gradients.

    A factor's hook obeys one of these objects, the last that took the factor over, while that one lives.
    """

    def __init__(self, copied: bool = False) -> None:
        self._own: set[_Divisor] = set()
        self._copied = copied  # from one that has seen gradients, which may have been copied too

    def __reduce__(self) -> tuple[type[Folding], tuple[bool]]:
        # A copy divides the gradients of copied factors, and has to find them first.
        return Folding, (self._see_gradients(),)

    def leave(self) -> None:
        """Let gradients be as they are made, until `attach` or `check` takes the factors again."""
        for divisor in self._own:
            if divisor.owner() is self:
                divisor.owner = _nobody

    def take_over(self, triples: Sequence[LoRATriple]) -> None:
        """Divide the gradients of these triples' factors from now on."""
        self._attach(triples, taking_over=True)

    def attach(self, triples: Sequence[LoRATriple]) -> None:
        """See that the hooks are on the factors there are now: those of a copy are new ones.

        Raises:
            RuntimeError: if another optimizer has taken a factor over, or a gradient has come undivided.
        """
        self._attach(triples, taking_over=False)

    def check(self, triples: Sequence[LoRATriple]) -> None:
        """As `attach`, at every step, for factors that were attached: looks only at who has them."""
        if any(divisor.owner() is not self for divisor in self._own):
            self.attach(triples)
            self._own = {divisor for divisor in self._own if divisor.owner() is self}

    def due(self, groups: Sequence[DeltaGroup], ledgers: Sequence[Ledger], step: int, with_closure: bool) -> list[Due]:
        """What is to be folded at the start of step number `step`.

        Triples made of tensors have time until these have gradients (a closure may make them), as this step leaves
        them as they are until then: where the model has replaced its parameters, they never have any.

        Raises:
            ValueError: if a ratio that was folded has changed since.
        """
        refuse_changing_ratios(groups)
        of_triples = _ratios(groups, step)
        changed = [
            f"{t.label} ({t.folded:g}, now {ratio:g})" for t, ratio in of_triples if t.folded not in (0.0, ratio)
        ]
        if changed:
            raise ValueError(
                f"update_ratio has changed since it was folded into the branch of {', '.join(changed)}: "
                'weight_update="folded" is exact for a constant ratio only. Put update_ratio and start_step back, or '
                'use weight_update="in_place"'
            )
        pending = [
            Due(triple, ledger, ratio)
            for (triple, ratio), ledger in zip(of_triples, ledgers, strict=True)
            if ratio != triple.folded
        ]
        in_use = {d.triple.scaling_place for d in pending if with_closure or _is_in_use(d.triple)}
        due = [d for d in pending if d.triple.scaling_place in in_use]
        if due:
            _refuse_unequal(dict(of_triples))
        return due

    @torch.no_grad()
    def begin(self, due: Sequence[Due], accounts: Accounts, write: Write) -> None:
        """Take lambda s A B from each W that is due, where that is not zero, and scale the branch by (1 + lambda) s.

        The effective weight is as before. This waits for the device, once in a run.

        Raises:
            RuntimeError: if a W that can not be written would have to be, or a branch can not be folded (any more).
            ValueError: if a factor is NaN or infinite. In all cases nothing was changed.
        """
        found = [
            f"{d.triple.label}: {problem}"
            for d in due
            for problem in (
                *d.triple.folding_problems(),
                *d.triple.precision_problems(d.triple.scaling * (1.0 + d.ratio)),
            )
        ]
        if found:
            raise RuntimeError("update_ratio can not be folded now (nothing was changed):\n  " + "\n  ".join(found))
        moving = []
        for d in due:
            scaling, A, B = branch_of(d.triple)
            if bool(A.any()) and bool(B.any()):
                moving.append((d, Term(-d.ratio * scaling, A, B)))
        accounts.refuse_not_finite([d.triple for d in due])
        found = [f"{d.triple.label}: {problem}" for d, _ in moving for problem in d.triple.weight_problems()]
        if found:
            raise RuntimeError(
                "the product A @ B is not zero at start_step, so update_ratio * scaling * A @ B has to be taken from W "
                "once, and these can not be written (nothing was changed). Set start_step=0 and start from a zero "
                "product, as LoRA's usual initialisation does:\n  " + "\n  ".join(found)
            )
        with ExitStack() as undo:
            for triple, _, ratio in due:
                undo.callback(_set, triple, triple.folded)
                _set(triple, ratio)
            unset = [f"{d.triple.label} ({d.triple.branch_scaling:g})" for d in due if d.triple.scaling_problems()]
            if unset:
                raise RuntimeError(
                    f"the scaling of {', '.join(unset)} was set and is another one now (nothing was changed): does "
                    "set_scaling set what scaling= reads?"
                )
            accounts.open(d.ledger for d, _ in moving)
            for (triple, ledger, _), term in moving:
                write.terms_(triple, ledger, [term])
                undo.callback(write.terms_, triple, ledger, [term._replace(coef=-term.coef)])
            undo.pop_all()
        for (triple, ledger, _), term in moving:
            ledger.beside(triple).add(term)
        self._divide([triple for triple, *_ in due])

    @contextmanager
    def restored(self, triples: Sequence[LoRATriple], records: Iterable[Mapping[str, Any]]) -> Iterator[None]:
        """Scale the branches, and divide the gradients, as in the run that was saved.

        If what is done within it fails, the branches are as before.
        """
        with ExitStack() as undo:
            for triple, record in zip(triples, records, strict=True):
                undo.callback(_set, triple, triple.folded, triple.scaling)
                _set(triple, record["folded"], record["scaling"])
            yield
            undo.pop_all()
        self._divide(triples)

    def refuse_undivided(self, triples: Iterable[LoRATriple], stored: Iterable[Stored]) -> None:
        """Refuse gradients that did not come through their factor's hook, where a ratio was folded before.

        Args:
            triples: of the optimizer.
            stored: their tensors.
        """
        all_called = self._copied or all(divisor.called for divisor in self._own)
        found = [
            triple.label
            for triple, (_, *factors) in zip(triples, stored, strict=True)
            if triple.folded
            and any(_is_made_beside_hooks(f) or (not all_called and _came_past_its_hook(f)) for f in factors)
        ]
        if found:
            raise RuntimeError(
                f"{', '.join(found)}: its gradients did not come through backward() to A and B (torch.func.grad, "
                "per-sample gradients, gradients that are added to main_grad within backward(), or an engine that "
                "copies them from other tensors), so they were not divided and are 1 + update_ratio times too large "
                '(nothing was changed): use backward(), or weight_update="in_place"'
            )

    @contextmanager
    def watching(self, groups: Sequence[DeltaGroup], step: int) -> Iterator[None]:
        """Refuse an inner step within it that moves factors which never got a gradient, from step K on.

        What a zeroth-order optimizer finds at A and B that it has moved a little, W of Delta-LoRA takes no part in.
        """
        if self._see_gradients():
            yield
            return
        watched = [t for t, ratio in _ratios(groups, step) if ratio and t.A.grad is None and t.B.grad is None]
        before = [(t, [factor.detach().clone() for factor in (t.A, t.B)]) for t in watched]
        yield
        if self._see_gradients():  # a closure has made them
            return
        found = [t.label for t, factors in before if not all(map(torch.equal, factors, (t.A, t.B)))]
        if found:
            raise RuntimeError(
                f"{', '.join(found)}: the inner optimizer has changed its A and B, which got no gradients. One that "
                "evaluates the loss at other A and B instead of using gradients leaves W of Delta-LoRA as it is "
                'meanwhile, and a folded W goes along: use weight_update="in_place"'
            )

    @contextmanager
    def unfolded(self, triples: Sequence[LoRATriple]) -> Iterator[None]:
        """Within it every branch adds scaling * A @ B, as beside a W that moves, and gradients are whole."""
        with ExitStack() as undo:
            for divisor in self._own:
                undo.callback(setattr, divisor, "value", divisor.value)
                divisor.value = 1.0
            for triple in triples:
                if triple.folded:
                    undo.callback(triple.set_branch_scaling, triple.branch_scaling)
                    triple.set_branch_scaling(triple.scaling)
            yield

    def _see_gradients(self) -> bool:
        """Whether any gradient came through the hooks, ever."""
        return self._copied or any(divisor.called for divisor in self._own)

    def _attach(self, triples: Iterable[LoRATriple], taking_over: bool) -> None:
        for triple in triples:
            for letter, factor in (("A", triple.A), ("B", triple.B)):
                divisor = _divisor_of(factor)
                if divisor is None:
                    divisor = _Divisor()
                    _register_first(factor, divisor)
                divisor.label = f"{triple.label}: {letter}"
                if is_sharded(factor):
                    _follow_into_forward(triple, letter, divisor)
                if divisor.owner() is self:
                    self._own.add(divisor)
                    continue
                if divisor.owner() is not None and not taking_over:
                    raise RuntimeError(
                        f"{triple.label}: another optimizer was built on its {letter} since, and the gradients are its "
                        "own: step that one"
                    )
                if triple.folded and not taking_over and factor.grad is not None and bool(factor.grad.any()):
                    raise RuntimeError(
                        f"{triple.label}: the gradient of its {letter} was made while this optimizer had no hook on it "
                        "(it was copied or converted, or another optimizer had it), and is 1 + update_ratio times too "
                        "large (nothing was changed): call optimizer.zero_grad() first, then backward()"
                    )
                divisor.owner, divisor.value = weakref.ref(self), 1.0 + triple.folded
                divisor.scaling = triple.branch_scaling
                self._own.add(divisor)

    def _divide(self, triples: Iterable[LoRATriple]) -> None:
        """By what was folded; called when branches were scaled for good."""
        for triple in triples:
            triple.keep_branch_scaling()
            for divisor in map(_divisor_of, (triple.A, triple.B)):
                assert divisor is not None
                divisor.value, divisor.scaling = 1.0 + triple.folded, triple.branch_scaling


class _Divisor:
    """A hook that divides what reaches one factor, while its owner lives."""

    __torch_unserializable__ = True  # a factor that is saved leaves it behind, without a warning

    def __init__(self) -> None:
        self.label = ""
        self.value = 1.0
        self.scaling = 1.0  # of the branch with that value
        self.owner: Callable[[], object | None] = _nobody
        self.called = False

    def __call__(self, grad: Tensor) -> Tensor | None:
        self.called = True
        if self.value == 1.0 or self.owner() is None:
            return None
        if grad.requires_grad:
            raise RuntimeError(
                f"{self.label}: a second derivative through its gradient (create_graph=True) can not be had in the "
                'folded mode, where only its first factor would be divided: use weight_update="in_place"'
            )
        return grad / self.value


def _nobody() -> None:
    """Who owns a factor that nobody has taken."""


_divisors = WeakTensorKeyDictionary()
"""The hook of each factor that ever had one: two would divide twice.

Its weak references do more. ``Module.to`` may exchange the inside of a parameter (that of FSDP2 always), and drop its
hooks without a word; torch refuses that while there are weak references to it.
"""


def _divisor_of(factor: Tensor) -> _Divisor | None:
    """The hook that divides what reaches this factor, or the whole parameter of FSDP2 in its place, if there is one."""
    divisor: _Divisor | None = _divisors.get(factor)
    if divisor is not None:
        return divisor
    hooks: Any = factor._backward_hooks or {}
    followers = (getattr(hook, "__self__", None) for hook in hooks.values())
    return next((follower.divisor for follower in followers if isinstance(follower, _Follower)), None)


def warn_of_folded(triples: Iterable[LoRATriple], stacklevel: int) -> None:
    """Tell of branches that an earlier optimizer has scaled, where a new one would go on from there unawares."""
    found = [
        f"{triple.label} ({triple.scaling / divisor.value:g}, now {triple.scaling:g})"
        for triple in triples
        if (divisor := _divisor_of(triple.A)) is not None
        and divisor.value != 1.0
        and math.isclose(triple.scaling, divisor.scaling, rel_tol=1e-9)
    ]
    if found:
        warnings.warn(
            f"an earlier optimizer has folded its update_ratio into the scaling of {', '.join(found)}, and this one "
            "counts from the larger scaling, so that the ratios multiply. Put the scaling back first (with PEFT: load "
            "the adapter onto a new model), or load that optimizer's state into this one, if that is not meant",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def leave_whole(triples: Iterable[LoRATriple], owner: Optimizer) -> None:
    """Leave the gradients of these triples as they are while `owner` lives, which moves W in place."""
    for triple in triples:
        for factor in (triple.A, triple.B):
            divisor = _divisor_of(factor)
            if divisor is not None:
                divisor.owner, divisor.value = weakref.ref(owner), 1.0


def _is_made_beside_hooks(factor: Tensor) -> bool:
    """Whether Opacus, or the fused gradients of Megatron and TransformerEngine, have left their mark on it."""
    return getattr(factor, "grad_sample", None) is not None or getattr(factor, "grad_added_to_main_grad", False)


def _came_past_its_hook(factor: Tensor) -> bool:
    """Whether it has a gradient, and none ever came through its hook. Waits for the device, if so."""
    divisor = _divisor_of(factor)
    called = divisor is not None and divisor.called
    return not called and factor.grad is not None and bool(factor.grad.any())


def _is_in_use(triple: LoRATriple) -> bool:
    """Whether the factors are known to be those that the model trains now."""
    looked_up = not any(isinstance(triple.factor_source(letter), Tensor) for letter in "AB")
    if looked_up or triple.A.grad is not None or triple.B.grad is not None:
        return True
    return any(divisor is not None and divisor.called for divisor in map(_divisor_of, (triple.A, triple.B)))


def _register_first(factor: Tensor, hook: _Divisor) -> None:
    """Register a hook that runs before those that are there: one that clamps shall see what it sees in place."""
    _divisors[factor] = hook
    handle = factor.register_hook(hook)
    hooks: Any = factor._backward_hooks
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)


class _Follower:
    """A forward pre-hook that puts the hook of a sharded factor on what is in its place while the layer computes.

    FSDP2 exchanges the factor for a whole parameter, always the same one, and brings that one's gradient to the shards
    by itself, past the factor's own hooks. It may do so before the layer computes, or only before the part of it does
    that holds the factor.
    """

    def __init__(self, triple: LoRATriple, letter: str, path: str) -> None:
        self._triple, self._letter, self.path = triple, letter, path
        self.divisor = _Divisor()
        self._on: Callable[[], Tensor | None] = lambda: None

    def __call__(self, module: nn.Module, args: Any) -> None:
        factor = getattr(self._triple, self._letter)
        if factor.requires_grad and factor is not self._on() and not is_sharded(factor):
            factor.register_hook(self._divide)
            self._on = weakref.ref(factor)

    def _divide(self, grad: Tensor) -> Tensor | None:
        return self.divisor(grad)


def _follow_into_forward(triple: LoRATriple, letter: str, divisor: _Divisor) -> None:
    source = triple.factor_source(letter)
    assert not isinstance(source, Tensor)  # refused otherwise
    module, path = source
    part, _ = holder_of(module, path)
    hooks = [hook for m in (module, part) for hook in m._forward_pre_hooks.values()]
    follower = next((h for h in hooks if isinstance(h, _Follower) and h.path == path), _Follower(triple, letter, path))
    follower.divisor = divisor  # another one where the sharded parameter was replaced
    for place in dict.fromkeys((module, part)):
        if follower not in place._forward_pre_hooks.values():
            place.register_forward_pre_hook(follower)


def checked_weight_update(mode: object) -> str:
    """A mode as it came, or an error."""
    if mode not in MODES:
        raise ValueError(f"weight_update is one of {', '.join(MODES)}, got {mode!r}")
    return str(mode)


def refuse_folded(triples: Iterable[LoRATriple]) -> None:
    """Refuse triples that belong to an optimizer which has folded them: their `scaling` is not the branch's."""
    found = [triple.label for triple in triples if triple.folded]
    if found:
        raise ValueError(
            f"another optimizer has folded its update_ratio into the branch of {', '.join(found)}: make the triples "
            "anew (find_triples, LoRATriple), with the scaling that the branch has now"
        )


def refuse_groups(groups: Sequence[DeltaGroup]) -> None:
    """Refuse groups of which one's ratio is no constant, or that share a factor and differ."""
    refuse_changing_ratios(groups)
    _refuse_unequal({triple: (group.update_ratio, group.start_step) for group in groups for triple in group.triples})


def refuse_changing_ratios(groups: Iterable[DeltaGroup]) -> None:
    """Refuse a callable update_ratio, which may change."""
    for group in groups:
        if callable(group.update_ratio):
            raise ValueError(
                f'{", ".join(triple.label for triple in group.triples)}: weight_update="folded" needs a constant '
                f"update_ratio, got {group.update_ratio!r}: what W was moved by is then no multiple of the running "
                'product, and can not be folded into the branch. Use weight_update="in_place"'
            )


def refuse_inner(inner: Optimizer) -> None:
    """Refuse an optimizer that evaluates the loss at several places within a step."""
    if isinstance(inner, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times within a step, in which W of Delta-LoRA stays; a folded W goes "
            'along with A and B. Use weight_update="in_place"'
        )


def evaluated_once(closure: Callable[[], float], triples: Iterable[LoRATriple]) -> Callable[[], float]:
    """The closure, which may be called once, with A and B as they are now: see `refuse_inner`."""
    calls = 0
    before = [(triple, factor, factor._version) for triple in triples for factor in (triple.A, triple.B)]

    def once() -> float:
        nonlocal calls
        calls += 1
        moved = dict.fromkeys(triple.label for triple, factor, version in before if factor._version != version)
        if calls > 1 or moved:
            what = "called the closure a second time"
            if moved:
                what = f"called the closure after it had changed A or B of {', '.join(moved)}"
            raise RuntimeError(
                f"the inner optimizer has {what} within a step, where W of Delta-LoRA stays and a folded W goes along "
                "with A and B. These are left as the inner optimizer has them now: load a checkpoint, and use "
                'weight_update="in_place"'
            )
        return closure()

    return once


def _ratios(groups: Iterable[DeltaGroup], step: int) -> list[tuple[LoRATriple, float]]:
    return [(triple, group.ratio_at(step)) for group in groups for triple in group.triples]


def _set(triple: LoRATriple, ratio: float, scaling: float | None = None) -> None:
    triple.scaling = triple.scaling if scaling is None else scaling
    triple.folded = ratio
    triple.set_branch_scaling(triple.branch_scaling)


def _refuse_unequal(settings: Mapping[LoRATriple, object]) -> None:
    """Refuse a factor, or a place of a scaling, that several triples share which are not folded alike."""
    users: dict[object, LoRATriple] = {}
    for triple, setting in settings.items():
        for what, place in (
            ("A is a factor", id(triple.A)),
            ("B is a factor", id(triple.B)),
            ("scaling is that", triple.scaling_place),
        ):
            other = users.setdefault(place, triple)
            if settings[other] != setting:
                raise ValueError(
                    f"{triple.label}: its {what} of {other.label} too, which has another update_ratio or start_step, "
                    "and can not be divided or set for both: give them the same, or use "
                    'weight_update="in_place"'
                )
