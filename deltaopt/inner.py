"""The inner optimizer: building it, what it must and must not hold, stepping it without firing hooks twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from deltaopt.distributed import gathered, is_sharded
from deltaopt.groups import ParamsInput
from deltaopt.triple import LoRATriple, Stored


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


def check_membership(inner: Optimizer, triples: Sequence[LoRATriple], stored: Sequence[Stored]) -> None:
    """Refuse an inner optimizer that does not hold the very Parameter objects of every A and B, or that holds a W."""
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    if all(id(W) not in held and id(A) in held and id(B) in held for W, A, B in stored):
        return
    parameters, problems = f"the parameters of the inner {type(inner).__name__}", []
    for triple, tensors in zip(triples, stored, strict=True):
        if id(tensors.W) in held:
            problems.append(
                f"{triple.label}: W is among {parameters}; give it what requires grad only, "
                "[p for p in model.parameters() if p.requires_grad]"
            )
        problems += [
            f"{triple.label}: {letter} is not among {parameters}"
            for letter in "AB"
            if id(getattr(tensors, letter)) not in held
        ]
    shards = any(is_sharded(p) for group in inner.param_groups for p in group["params"])
    if shards and not any(is_sharded(factor) for tensors in stored for factor in (tensors.A, tensors.B)):
        problems.append(
            "its parameters are shards of FSDP2, and those of the layers are whole: a forward pass has put these in "
            "their place and kept them, as one without gradients does for the outermost module. Call model.reshard() "
            "first, and go on with this optimizer"
        )
    raise ValueError(
        "the inner optimizer does not fit the triples. It must hold the very Parameter objects of every A and B "
        "and no W. If they were replaced after it was built (sharding, XLA, assign=True), build the optimizer "
        "afterwards; optimizers that step flattened copies (DeepSpeed ZeRO, FSDP1, CPU offload) can not be "
        "wrapped:\n  " + "\n  ".join(problems)
    )


def refuse_weights(triples: Sequence[LoRATriple], params: Sequence[Any]) -> None:
    """Refuse W among parameters that the inner optimizer is to train."""
    weights = {id(triple.W): triple.label for triple in triples}
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    taken = [weights[id(p)] for p in tensors if id(p) in weights]
    if taken:
        raise ValueError(f"params holds the W of {', '.join(taken)}, which this optimizer moves itself: leave it out")


def is_state_initialisation(inner: Optimizer) -> bool:
    """Whether the step to come only makes the inner state exist.

    torch.distributed.checkpoint calls `step` for that wherever `state` is empty, with lr = 0 and zero
    gradients. The gradients are looked at, which waits for the device, only then.
    """
    if inner.state or not all(_is_zero(g.get("lr", 1.0)) for g in inner.param_groups):
        return False
    grads = [p.grad for g in inner.param_groups for p in g["params"] if p.grad is not None]
    return bool(grads) and not any(bool(gathered(grad).any()) for grad in grads)  # of shards ranks could disagree


def _is_zero(lr: float | Tensor) -> bool:
    """Whether a learning rate is 0, as far as the host can tell without waiting for a device."""
    return not (isinstance(lr, Tensor) and lr.device.type != "cpu") and float(lr) == 0.0
