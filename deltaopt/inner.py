"""The inner optimizer: building it from its class, and stepping it without firing everybody's hooks twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from deltaopt.groups import ParamsInput


def refuse_unused(options: list[dict[str, Any]], params: ParamsInput, inner_kwargs: dict[str, Any]) -> None:
    """Refuse options and parameters that a built inner optimizer would never see."""
    unused = [key for rest in options for key in rest] + list(inner_kwargs)
    if unused:
        raise TypeError(
            f"{', '.join(sorted(unused))}: no effect, because the inner optimizer is already built. Set "
            "them where it is built, or hand over its class"
        )
    if list(params):
        raise TypeError(
            "params: no effect, because the inner optimizer is already built. Give it these parameters, or hand "
            "over its class"
        )


def build_inner(
    inner: Callable[..., Optimizer], param_groups: list[dict[str, Any]], kwargs: dict[str, Any]
) -> Optimizer:
    """The optimizer that a class or a factory makes, or an error that says what it was given."""
    name = getattr(inner, "__name__", repr(inner))
    if type(inner).__module__.startswith("deepspeed"):
        raise TypeError(f"inner is a {type(inner).__name__}: DeepSpeed's optimizers step flattened copies of A and B")
    if not callable(inner):
        raise TypeError(f"inner is an optimizer class or a built torch.optim.Optimizer, got a {type(inner).__name__}")
    try:
        built = inner(param_groups, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{name} could not be built from the factors and {kwargs}: {error}. Its arguments are given as "
            "keyword arguments of DeltaLoRAOptimizer"
        ) from error
    if not isinstance(built, Optimizer):
        raise TypeError(f"{name} made a {type(built).__name__}, which is no torch.optim.Optimizer")
    return built


@contextmanager
def global_hooks_held() -> Iterator[None]:
    """Hooks for every optimizer have fired, or will, for this one; they shall not fire for its inner one too."""
    registries: tuple[dict[int, Any], ...] = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    held = [dict(hooks) for hooks in registries]
    for hooks in registries:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in zip(registries, held, strict=True):
            registered_meanwhile = dict(hooks)
            hooks.clear()
            hooks.update(kept | registered_meanwhile)
