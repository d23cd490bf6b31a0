"""Hooks on A and B for the folded rule: they divide what reaches each factor, and watch what comes past them.

Everything that watches other people's machinery for the folded rule is here: autograd's hooks, FSDP2's exchange of
parameters, gradients that are made without hooks, optimizers that evaluate the loss elsewhere within a step.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from deltaopt.factors import TensorSource, looked_up
from deltaopt.messages import names, warn_user
from deltaopt.scaling import holder_of
from deltaopt.sharding import is_sharded
from deltaopt.triple import LoRATriple
from deltaopt.weight import WeightState


class GradientHooks:
    """Divides the gradients of the factors of one folded optimizer by 1 + the ratio that is in their branch.

    A factor's hook obeys one of these objects, the last that claimed the factor, while that one lives.
    """

    def __init__(self, copied: bool = False) -> None:
        self._own: set[_Divisor] = set()
        self._frozen = False  # some factors took no hook, as they required no gradients
        self._copied = copied  # from one that has seen gradients, which may have been copied too

    def __reduce__(self) -> tuple[type[GradientHooks], tuple[bool]]:
        # A copy divides the gradients of copied factors, and has to find them first.
        return GradientHooks, (self._see_gradients(),)

    def claim(self, triples: Sequence[LoRATriple]) -> None:
        """Divide the gradients of these triples' factors for this optimizer, whoever divided them before."""
        self._attach(triples, claiming=True)

    def attach(self, triples: Sequence[LoRATriple]) -> None:
        """Put hooks on the factors there are now: those of a copy are new ones.

        Raises:
            RuntimeError: if another optimizer has claimed a factor, or a gradient has come undivided.
        """
        self._attach(triples, claiming=False)

    def check(self, triples: Sequence[LoRATriple]) -> None:
        """Do as `attach`, for factors that were attached: looks only at who has them. Called at every step."""
        if self._frozen or any(divisor.owner() is not self for divisor in self._own):
            self._frozen = False
            self.attach(triples)
            self._own = {divisor for divisor in self._own if divisor.owner() is self}

    def leave(self) -> None:
        """Stop dividing, until `attach` or `check` takes the factors again."""
        for divisor in self._own:
            if divisor.owner() is self:
                divisor.owner = _nobody

    def divide(self, triples: Iterable[LoRATriple]) -> None:
        """Divide by 1 + what is folded into each branch now, whose scaling was set for good."""
        for triple in triples:
            for divisor in map(_divisor_of, triple.parameters):
                if divisor is not None:  # else it is frozen, and gets its hook with this value later
                    divisor.value, divisor.scaling = 1.0 + triple.folded, triple.branch_scaling

    def pause(self) -> None:
        """Leave the gradients whole, until `resume`."""
        for divisor in self._own:
            divisor.paused = True

    def resume(self) -> None:
        """Divide the gradients again, after `pause`."""
        for divisor in self._own:
            divisor.paused = False

    def refuse_undivided(self, weights: Iterable[WeightState]) -> None:
        """Refuse gradients that did not come through their factor's hook, where a ratio was folded before."""
        all_called = self._copied or all(divisor.called for divisor in self._own)
        found = [
            weight.label
            for weight in weights
            if weight.triple.folded
            and any(
                _is_made_without_hooks(p) or (not all_called and _came_past_its_hook(p)) for p in weight.tensors.stored
            )
        ]
        if found:
            raise RuntimeError(
                f"{names(found)}: its gradients did not come through backward() to A and B (torch.func.grad, "
                "per-sample gradients, gradients that are added to main_grad within backward(), or an engine that "
                "copies them from other tensors), so they were not divided and are 1 + update_ratio times too large "
                '(nothing was changed): use backward(), or weight_update="in_place"'
            )

    @contextmanager
    def watching(self, weights: Iterable[WeightState]) -> Iterator[None]:
        """Refuse an inner step within it that moves factors which never got a gradient, from step K on.

        A zeroth-order optimizer evaluates the loss at A and B that it has moved a little. W of Delta-LoRA does not
        follow such a move; a folded W would.
        """
        if self._see_gradients():
            yield
            return
        triples = [w.triple for w in weights if w.ratio and all(p.grad is None for p in w.triple.parameters)]
        before = [(t, [parameter.detach().clone() for parameter in t.parameters]) for t in triples]
        yield
        if self._see_gradients():  # a closure has made them
            return
        found = [t.label for t, values in before if not all(map(torch.equal, values, t.parameters))]
        if found:
            raise RuntimeError(
                f"{names(found)}: the inner optimizer has changed its A and B, which got no gradients. One that "
                "evaluates the loss at other A and B instead of using gradients leaves W of Delta-LoRA as it is "
                'meanwhile, and a folded W moves with them: use weight_update="in_place"'
            )

    def _see_gradients(self) -> bool:
        """Tell if any gradient came through the hooks, ever."""
        return self._copied or any(divisor.called for divisor in self._own)

    def _attach(self, triples: Iterable[LoRATriple], claiming: bool) -> None:
        for triple in triples:
            for letter, source, factor in zip(
                triple.parameter_names, triple.parameter_sources, triple.stored, strict=True
            ):
                divisor = _divisor_of(factor)
                if divisor is None and not factor.requires_grad:
                    self._frozen = True  # torch refuses a hook until it requires grad
                    continue
                if divisor is None:
                    divisor = _Divisor()
                    _register_first(factor, divisor)
                divisor.label = f"{triple.label}: {letter}"
                if is_sharded(factor):
                    _follow_into_forward(triple, source, divisor)
                if divisor.owner() is self:
                    self._own.add(divisor)
                    continue
                if divisor.owner() is not None and not claiming:
                    raise RuntimeError(
                        f"{triple.label}: another optimizer was built on its {letter} since, and the gradients are its "
                        "own: step that one"
                    )
                if triple.folded and not claiming and factor.grad is not None and bool(factor.grad.any()):
                    raise RuntimeError(
                        f"{triple.label}: the gradient of its {letter} was made while this optimizer had no hook on it "
                        "(it was copied or converted, or another optimizer had it), and is 1 + update_ratio times too "
                        "large (nothing was changed): call optimizer.zero_grad() first, then backward()"
                    )
                divisor.owner, divisor.value = weakref.ref(self), 1.0 + triple.folded
                divisor.scaling = triple.branch_scaling
                self._own.add(divisor)


class _Divisor:
    """A hook that divides what reaches one factor, while its owner lives."""

    __torch_unserializable__ = True  # a factor that is saved leaves it behind, without a warning

    def __init__(self) -> None:
        self.label = ""
        self.value = 1.0
        self.scaling = 1.0  # of the branch with that value
        self.owner: Callable[[], object | None] = _nobody
        self.called = False
        self.paused = False

    def __call__(self, grad: Tensor) -> Tensor | None:
        self.called = True
        if self.value == 1.0 or self.paused or self.owner() is None:
            return None
        if grad.requires_grad:
            raise RuntimeError(
                f"{self.label}: a second derivative through its gradient (create_graph=True) cannot be taken in the "
                'folded mode, where only its first factor would be divided: use weight_update="in_place"'
            )
        return grad / self.value


def _nobody() -> None:
    """Return the owner of a factor that nobody has claimed: none."""


_divisors = WeakTensorKeyDictionary()
"""The hook of each factor that ever had one: two would divide twice.

Its weak references do more. ``Module.to`` may exchange the inside of a parameter (that of FSDP2 always), and drop its
hooks without a word; torch refuses that while there are weak references to it.
"""


def _divisor_of(factor: Tensor) -> _Divisor | None:
    """Return the hook that divides what reaches this factor, or FSDP2's whole parameter in its place; None if none."""
    divisor: _Divisor | None = _divisors.get(factor)
    if divisor is not None:
        return divisor
    hooks: Any = factor._backward_hooks or {}
    followers = (getattr(hook, "__self__", None) for hook in hooks.values())
    return next((follower.divisor for follower in followers if isinstance(follower, _Follower)), None)


def _divisor_of_any(parameters: Iterable[Tensor]) -> _Divisor | None:
    """Return the first hook that one of these parameters has: a frozen one may have none."""
    return next((divisor for divisor in map(_divisor_of, parameters) if divisor is not None), None)


def warn_of_folded(triples: Iterable[LoRATriple]) -> None:
    """Warn of branches that an earlier optimizer has scaled: a new one would count from the larger scaling."""
    found = [
        f"{triple.label} ({triple.scaling / divisor.value:g}, now {triple.scaling:g})"
        for triple in triples
        if (divisor := _divisor_of_any(triple.parameters)) is not None
        and divisor.value != 1.0
        and math.isclose(triple.scaling, divisor.scaling, rel_tol=1e-9)
    ]
    if found:
        warn_user(
            f"an earlier optimizer has folded its update_ratio into the scaling of {names(found)}, and this one "
            "counts from the larger scaling, so that the ratios multiply. If that is not meant, load that optimizer's "
            "state into this one, or put the scaling back first (with PEFT: load the adapter onto a new model)"
        )


def leave_whole(triples: Iterable[LoRATriple], owner: object) -> None:
    """Leave the gradients of these triples as they are while `owner` lives, a rule that moves W in place."""
    for triple in triples:
        for divisor in map(_divisor_of, triple.parameters):
            if divisor is not None:
                divisor.owner, divisor.value = weakref.ref(owner), 1.0


def _is_made_without_hooks(factor: Tensor) -> bool:
    """Tell if Opacus, or the fused gradients of Megatron and TransformerEngine, have left their mark on it."""
    return getattr(factor, "grad_sample", None) is not None or getattr(factor, "grad_added_to_main_grad", False)


def _came_past_its_hook(factor: Tensor) -> bool:
    """Tell if it has a gradient, and none ever came through its hook. Waits for the device, if so."""
    divisor = _divisor_of(factor)
    called = divisor is not None and divisor.called
    return not called and factor.grad is not None and bool(factor.grad.any())


def is_in_use(triple: LoRATriple) -> bool:
    """Tell if the factors are known to be those that the model trains now."""
    if triple.is_looked_up or any(parameter.grad is not None for parameter in triple.parameters):
        return True
    return any(divisor is not None and divisor.called for divisor in map(_divisor_of, triple.parameters))


def _register_first(factor: Tensor, hook: _Divisor) -> None:
    """Register a hook that runs before those that are there: one that clamps shall see what it sees in place."""
    handle = factor.register_hook(hook)
    _divisors[factor] = hook  # after it: an exception in between leaves a hook that nobody has claimed
    hooks: Any = factor._backward_hooks
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)


class _Follower:
    """A forward pre-hook that puts the hook of a sharded factor on what is in its place while the layer computes.

    FSDP2 exchanges the factor for a whole parameter, always the same one, and brings that one's gradient to the shards
    by itself, past the factor's own hooks. It may do so before the layer computes, or only before the part of it does
    that holds the factor.
    """

    def __init__(self, triple: LoRATriple, source: tuple[nn.Module, str]) -> None:
        self._label, self._source, self.path = triple.label, source, source[1]
        self.divisor = _Divisor()
        self._on: Callable[[], Tensor | None] = lambda: None

    def __call__(self, module: nn.Module, args: Any) -> None:
        factor = looked_up(self._source, self._label)
        # On tensor parallelism what is in its place is a DTensor too: the one that has a hook already is the shard.
        if factor.requires_grad and factor is not self._on() and _divisor_of(factor) is None:
            factor.register_hook(self._divide)
            self._on = weakref.ref(factor)

    def _divide(self, grad: Tensor) -> Tensor | None:
        return self.divisor(grad)


def _follow_into_forward(triple: LoRATriple, source: TensorSource, divisor: _Divisor) -> None:
    assert not isinstance(source, Tensor)  # refused otherwise
    module, path = source
    part, _ = holder_of(module, path)
    hooks = [hook for m in (module, part) for hook in m._forward_pre_hooks.values()]
    follower = next((h for h in hooks if isinstance(h, _Follower) and h.path == path), _Follower(triple, source))
    follower.divisor = divisor  # another one where the sharded parameter was replaced
    for place in dict.fromkeys((module, part)):
        if follower not in place._forward_pre_hooks.values():
            place.register_forward_pre_hook(follower)


def check_inner(inner: Optimizer) -> None:
    """Raise ValueError for an optimizer that evaluates the loss at several places within a step."""
    if isinstance(inner, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times within a step, in which W of Delta-LoRA stays; a folded W goes "
            'along with A and B. Use weight_update="in_place"'
        )


def evaluated_once(closure: Callable[[], float], triples: Iterable[LoRATriple]) -> Callable[[], float]:
    """Return the closure, which then may be called once only, with A and B as they are now: see `check_inner`."""
    calls = 0
    before = [(triple, factor, factor._version) for triple in triples for factor in triple.parameters]

    def once() -> float:
        nonlocal calls
        calls += 1
        moved = dict.fromkeys(triple.label for triple, factor, version in before if factor._version != version)
        if calls > 1 or moved:
            what = "called the closure a second time"
            if moved:
                what = f"called the closure after it had changed A or B of {names(list(moved))}"
            raise RuntimeError(
                f"the inner optimizer has {what} within a step, where W of Delta-LoRA stays and a folded W goes along "
                "with A and B. These are left as the inner optimizer has them now: load a checkpoint, and use "
                'weight_update="in_place"'
            )
        return closure()

    return once
