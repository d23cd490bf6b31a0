"""All modules of a model in one walk without recursion, and their classes.

torch's own walk hands each module through a generator a level.
"""

from __future__ import annotations

from torch import nn


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return what ``dict(model.named_modules())`` is, in the same order, several times as fast.

    Args:
        model: a deep model has thousands of modules, ten levels down.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[name] = module
        if module._modules:
            prefix = f"{name}." if name else ""
            children = [(prefix + key, child) for key, child in module._modules.items() if child is not None]
            waiting += reversed(children)
    return found


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module; of one that `fully_shard` was called on, the class that it had before."""
    kind = type(module)
    while len(kind.__bases__) == 2 and kind.__bases__[0].__module__.startswith("torch.distributed."):
        kind = kind.__bases__[1]
    return kind
