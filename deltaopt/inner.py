"""The inner optimizer: it is built here, stepped without firing hooks twice, and asked what a step is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from deltaopt.sharding import gathered


def build_inner(
    inner: Callable[..., Optimizer], param_groups: list[dict[str, Any]], kwargs: dict[str, Any]
) -> Optimizer:
    """Return the optimizer that a class or a factory makes, or raise an error that says what it was given."""
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
    """Hold back the hooks for every optimizer, which fire for the wrapper, while the inner optimizer steps."""
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


def is_state_initialisation(inner: Optimizer) -> bool:
    """Tell if the step to come only makes the inner state exist.

    torch.distributed.checkpoint calls `step` for that wherever `state` is empty, with lr = 0 and zero
    gradients. The gradients are looked at, which waits for the device, only then.
    """
    if inner.state or not all(_is_zero(g.get("lr", 1.0)) for g in inner.param_groups):
        return False
    grads = [p.grad for g in inner.param_groups for p in g["params"] if p.grad is not None]
    return bool(grads) and not any(bool(gathered(grad).any()) for grad in grads)  # of shards ranks could disagree


def _is_zero(lr: float | Tensor) -> bool:
    """Tell if a learning rate is 0, as far as the host knows without waiting for a device."""
    return not (isinstance(lr, Tensor) and lr.device.type != "cpu") and float(lr) == 0.0
