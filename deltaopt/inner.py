"""The inner optimizer: building it, stepping it without firing hooks twice, and what else is asked of it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from difflib import get_close_matches
from functools import cache
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import LRScheduler

from deltaopt.messages import names
from deltaopt.ranks import Ranks
from deltaopt.sharding import local_part

OURS = ("update_ratio", "start_step", "scaling", "rounding", "rounding_seed", "weight_update", "keep_base")
"""Keyword arguments of `DeltaLoRAOptimizer` that are no options of an inner optimizer."""

LOOK = "the look at the gradients in step()"
"""What ranks are in that ask each other if a step with a learning rate of 0 has gradients."""

LEAVES_FROZEN_ALONE: set[tuple[str, str]] = set()
"""Module and class of optimizers that may hold a frozen W: they do not touch parameters without a gradient.

`deltaopt.integrations.inner_optimizers` fills it.
"""


def leaves_frozen_alone(inner: Optimizer) -> bool:
    """Tell if an optimizer may hold a frozen W. Others may write it: Lookahead pulls it back to where it was."""
    return (type(inner).__module__, type(inner).__qualname__) in LEAVES_FROZEN_ALONE


def build_inner(
    inner: Callable[..., Optimizer], param_groups: list[dict[str, Any]], kwargs: dict[str, Any]
) -> Optimizer:
    """Return the optimizer that a class or a factory makes, or raise an error that says what it was given."""
    name = getattr(inner, "__name__", repr(inner))
    try:
        built = inner(param_groups, **kwargs)
    except TypeError as error:
        near = {match for option in kwargs for match in get_close_matches(option, OURS, n=1)}
        raise TypeError(
            f"{name} could not be built from the factors and {reprlib.repr(kwargs)}: {error}. Its arguments are given "
            "as keyword arguments of DeltaLoRAOptimizer" + (f" (did you mean {names(sorted(near))}?)" if near else "")
        ) from error
    if isinstance(built, LRScheduler):
        raise TypeError(
            f"{name} made a {type(built).__name__}, which is no torch.optim.Optimizer: build the scheduler of the "
            f"DeltaLoRAOptimizer, {type(built).__name__}(optimizer, ...)"
        )
    if not isinstance(built, Optimizer):
        raise TypeError(
            f"{name} made a {type(built).__name__}, which is no torch.optim.Optimizer: let it return the optimizer"
        )
    return built


def step_inner(inner: Optimizer, closure: Callable[[], float] | None) -> float | None:
    """Step the inner optimizer, without the hooks for every optimizer: they fire for the wrapper.

    Hooks of the inner optimizer itself fire. An optimizer that the inner one steps is another optimizer, for which the
    hooks for every optimizer fire as they do without a wrapper.
    """
    # Within torch.compile they fire for the inner one too: a function with other globals cannot be traced.
    step = inner.step if torch.compiler.is_compiling() else _without_global_hooks(inner)
    return step() if closure is None else step(closure)


def _without_global_hooks(inner: Optimizer) -> Callable[..., Any]:
    """Return the method `step` in which torch finds no hooks for every optimizer.

    They are in two dicts of the process, which other threads use meanwhile. So the dicts stay as they are, and torch's
    own wrapper of `step`, which runs all hooks, is given other globals.
    """
    on_instance = vars(inner).get("step")
    by_scheduler = hasattr(on_instance, "_wrapped_by_lr_sched")
    hooked: Any = type(inner).step
    is_torch_wrapper = isinstance(hooked, FunctionType) and hooked.__globals__ is vars(torch_optimizer)
    if not is_torch_wrapper or (on_instance is not None and not by_scheduler):
        return inner.step  # somebody else's wrapper: torch's cannot be reached within it
    if by_scheduler:
        inner._opt_called = True  # type: ignore[attr-defined]  # all that the scheduler's wrapper does
    code, names = _quiet(hooked.__code__)
    return MethodType(FunctionType(code, names, hooked.__name__, None, hooked.__closure__), inner)


@cache
def _quiet(code: CodeType) -> tuple[CodeType, dict[str, Any]]:
    """Return a copy of the code and its globals, the same at each call: torch.compile keeps results with both."""
    none: dict[int, Any] = {}
    names = {"_global_optimizer_pre_hooks": none, "_global_optimizer_post_hooks": none}
    return code.replace(), {**vars(torch_optimizer), **names}


def is_in_mode(inner: Optimizer, mode: str) -> bool:
    """Tell if an optimizer that has modes says that it is in this one, "train" or "eval"; False if it does not say."""
    says = [group.get("train_mode") for group in inner.param_groups]
    return all(isinstance(trains, bool) and trains is (mode == "train") for trains in says)


def check_no_schedule_free_around(inner: Optimizer) -> None:
    """Raise RuntimeError if a schedule-free wrapper steps this optimizer: A and B are then not where gradients were.

    Such a wrapper leaves its numbers in the param groups, where an inner optimizer with modes has its own.
    """
    if not hasattr(inner, "train") and any({"lr_max", "weight_sum"} <= group.keys() for group in inner.param_groups):
        raise RuntimeError(
            "a ScheduleFreeWrapper is around this optimizer: it puts other values into A and B for each step, and W "
            "would belong to those. Take a schedule-free optimizer inside, such as schedulefree.AdamWScheduleFree: "
            "DeltaLoRAOptimizer(AdamWScheduleFree, triples, lr=...)"
        )


def forget_state(inner: Optimizer, factors: Sequence[Tensor]) -> None:
    """Drop what an optimizer, and each optimizer that it holds, keeps for these factors.

    It is found in ``state``, in other dicts whose keys are parameters, and in the optimizers among the attributes, in
    lists and dicts too. An optimizer that keeps something for parameters in another form, by position for example, has
    to be reset by its own means.
    """
    for optimizer in nested(inner):
        if isinstance(optimizer, torch.optim.LBFGS):  # keeps all of its history under one parameter
            optimizer.state.clear()
        is_lookahead = any("slow_params" in optimizer.state.get(factor, ()) for factor in factors)
        for value in [optimizer.state, *vars(optimizer).values()]:
            if isinstance(value, MutableMapping):
                for factor in factors:
                    value.pop(factor, None)
        if is_lookahead:  # notes where the factors are when it is built, and not in its first step
            for group in optimizer.param_groups:
                optimizer.init_group(group)  # type: ignore[attr-defined]


def nested(inner: Optimizer) -> list[Optimizer]:
    """Return an optimizer and all that it holds, each once."""
    found: dict[int, Optimizer] = {}
    seen: set[int] = set()
    places: list[Any] = [inner]
    while places:
        place = places.pop()
        if id(place) in seen:
            continue
        seen.add(id(place))
        if isinstance(place, Optimizer):
            found[id(place)] = place
            places += [value for name, value in vars(place).items() if name not in ("state", "param_groups")]
        elif isinstance(place, Mapping):
            places += place.values()
        elif isinstance(place, list | tuple | set):
            places += place
    return list(found.values())


def is_state_initialisation(inner: Optimizer, ranks: Ranks | None = None) -> bool:
    """Tell if the step to come only makes the inner state exist.

    torch.distributed.checkpoint calls `step` for that wherever `state` is empty, with lr = 0 and zero
    gradients. The gradients are looked at, which waits for the device, only then.

    Args:
        inner: about to step.
        ranks: that share sharded tensors, and have to decide alike: each sees its part of the gradients.
    """
    if inner.state or not all(_is_zero(g.get("lr", 1.0)) for g in inner.param_groups):
        return False
    grads = [p.grad for g in inner.param_groups for p in g["params"] if p.grad is not None]
    is_zero = bool(grads) and not any(bool(local_part(grad).any()) for grad in grads)
    return is_zero if ranks is None else all(ranks.gather(LOOK, is_zero).values())


def _is_zero(lr: float | Tensor | None) -> bool:
    """Tell if a learning rate is 0, as far as the host knows without waiting for a device.

    Optimizers that find their own have None (Adafactor with relative_step).
    """
    return lr is not None and not (isinstance(lr, Tensor) and lr.device.type != "cpu") and float(lr) == 0.0
