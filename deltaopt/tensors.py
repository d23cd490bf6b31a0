"""Sorts of tensors: plain, 16-bit, quantized, offloaded; and overlaps in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PLAIN = (Tensor, nn.Parameter)
WAY_OUT = (
    'Take weight_update="folded", which does not write W where the product A @ B is zero at start_step, or load the '
    "layer in 16 or 32 bits"
)


NOT_LOADED = (
    "is on the meta device (offloaded, or not loaded yet), where an in-place update would be lost: load the model onto "
    "a real device first"
)


def tensor_problems(letter: str, tensor: Tensor) -> list[str]:
    """Say why this tensor, called `letter`, cannot be read and written as a matrix of numbers."""
    if tensor.is_meta:
        return [f"{letter} {NOT_LOADED}"]
    if hasattr(tensor, "ds_id"):
        return [f"{letter} is partitioned by DeepSpeed ZeRO-3, which this optimizer cannot move"]
    if not is_plain(tensor):
        return [
            f"{letter} is a {type(tensor).__module__}.{type(tensor).__qualname__}, expected a plain tensor or "
            "Parameter: quantized, sharded and wrapped ones cannot be read and written as a matrix"
        ]
    if tensor.dtype not in FLOATS:
        return [
            f"{letter} has dtype {tensor.dtype}, expected float16, bfloat16, float32 or float64: integer, float8 and "
            "packed ones cannot be read and written as a matrix"
        ]
    if any(stride == 0 and n > 1 for stride, n in zip(tensor.stride(), tensor.shape, strict=True)):
        return [
            f"{letter} is expanded (strides {tensor.stride()}): several of its elements are one number in memory. "
            "Give a tensor of its own, .contiguous()"
        ]
    if tensor.is_inference():
        return [f"{letter} was made under torch.inference_mode() and cannot be updated: load the model outside of it"]
    return []


def offload_problems(owner: nn.Module) -> list[str]:
    """Say if accelerate keeps the weights of this module elsewhere and fetches them for each forward pass."""
    hook = getattr(owner, "_hf_hook", None)
    if any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ()))):
        return [
            "W is offloaded by an accelerate hook, so an in-place update would be lost: give the model a device_map "
            "that keeps this layer in memory"
        ]
    return []


def is_plain(tensor: Tensor) -> bool:
    """Tell if this is a tensor of its own, and no packed, sharded or fake one that only looks like it."""
    return type(tensor) in PLAIN


def same_view(first: Tensor, second: Tensor) -> bool:
    """Tell if two tensors are the same view of the same memory."""
    return (first.data_ptr(), first.shape, first.stride()) == (second.data_ptr(), second.shape, second.stride())


def overlapping_pairs(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the index pairs (i, j), i < j, of views that share an element, in the order of j and then i.

    Views are compared only where their extents in one storage meet, so that thousands of views that lie one behind the
    other in a flat buffer take O(n log n).
    """
    extents = sorted((t.untyped_storage().data_ptr(), *_span(t), i) for i, t in enumerate(tensors))
    found = []
    current, open_views = None, list[tuple[int, int]]()
    for storage, start, end, i in extents:
        if storage != current:
            current, open_views = storage, []
        open_views = [(other_end, j) for other_end, j in open_views if other_end > start]
        found += [(min(i, j), max(i, j)) for _, j in open_views if memory_overlaps(tensors[i], tensors[j])]
        open_views.append((end, i))
    return sorted(found, key=lambda pair: (pair[1], pair[0]))


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave `torch.inference_mode` for a while, without turning gradients on.

    What is kept for later must not be made in it: torch refuses for ever to write such a tensor outside.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def memory_overlaps(first: Tensor, second: Tensor) -> bool:
    """Tell if two views share an element. Exact for slices of one array, else by their extents."""
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return False
    spans = [_span(t) for t in (first, second)]
    if spans[0][1] <= spans[1][0] or spans[1][1] <= spans[0][0]:
        return False
    boxes = [_box(t) for t in (first, second)]
    if boxes[0] is None or boxes[1] is None or boxes[0][0] != boxes[1][0]:
        return True
    return all(a[0] < b[1] and b[0] < a[1] for a, b in zip(boxes[0][1], boxes[1][1], strict=True))


def _span(tensor: Tensor) -> tuple[int, int]:
    """First element in the storage, and the one behind the last."""
    start = int(tensor.storage_offset())
    if tensor.is_contiguous() and tensor.numel():
        return start, start + tensor.numel()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + last + 1


def _box(tensor: Tensor) -> tuple[tuple[int, ...], list[tuple[int, int]]] | None:
    """(strides, [first and one behind the last along each]) of a slice of a row-major array, or None."""
    sides = sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True)
    strides = tuple(stride for stride, _ in sides)
    if not strides or strides[-1] != 1:
        return None
    ranges, rest = [], int(tensor.storage_offset())
    for outer, (stride, n) in zip((None, *strides), sides, strict=False):
        start, rest = divmod(rest, stride)
        if outer is not None and start + n > outer // stride:
            return None
        ranges.append((start, start + n))
    return strides, ranges
