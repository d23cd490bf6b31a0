"""Comparisons: relative distances, states bit for bit, files, refusals."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda objects: pickle.loads(pickle.dumps(objects)),
}
"""How an object with all that it holds is copied."""


def relative(actual: Tensor, expected: Tensor) -> float:
    """The distance by the size of what is expected, in the Frobenius norm and float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    """Tell if the distance is at most `tolerance`, relative where `expected` is larger than 1."""
    return float((actual - expected).detach().norm()) <= tolerance * max(1.0, float(expected.detach().norm()))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """No element differs by more than `tolerance`, times the largest element of `expected` where that is above 1."""
    atol = tolerance * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def same(a: Any, b: Any) -> bool:
    """Tell if two nested states are equal, their tensors bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_bits(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def through_a_file(state: Any) -> Any:
    """Return what a file gives back, read with weights_only=True."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def in_order(*parts: str) -> str:
    """A pattern of a message that has all of these parts, in this order."""
    return "(?s)" + ".*".join(re.escape(part) for part in parts)


def naming(*names: str) -> str:
    """The beginning of a pattern of a message that has all of these names, in any order, and then what follows."""
    return "(?s)" + "".join(f"(?=.*{re.escape(name)})" for name in names) + ".*"


def refused(
    action: Callable[[], object],
    error: type[Exception] | tuple[type[Exception], ...],
    match: str,
    kept: Callable[[], Any] = lambda: None,
) -> str:
    """Assert that `action` raises and leaves `kept()` as it was, bit for bit.

    Args:
        action: what is refused.
        error: what it raises.
        match: a pattern of the message.
        kept: the state that must not change.

    Returns:
        The whole message.
    """
    before = copy.deepcopy(kept())
    with pytest.raises(error, match=match) as caught:
        action()
    assert same(kept(), before)
    return str(caught.value)
