"""Factors that are computed from trained parameters: rows of a parameter, or any function of several parameters.

Libraries train other tensors than the A and B of W + scaling * A @ B: several branches as rows of one parameter
(loralib's MergedLinear, litgpt's LoRAQKVLinear), or diag(E) Q in the place of a factor (AdaLoRA). The parameters are
what an optimizer holds, and what gets gradients; the values of the factors are computed whenever they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from deltaopt.plain import as_int

TensorSource: TypeAlias = "Tensor | tuple[nn.Module, str]"
"""A tensor, or a module and the dotted name of an attribute that is looked up at every step."""


class Factor:
    """A factor A or B that is computed from trained parameters.

    The result has the shape in which `LoRATriple` takes a factor. It is computed again after each step of the inner
    optimizer, which holds the parameters. They may serve several triples.

    Args:
        compute: a function of the parameters' tensors that returns the factor and writes nothing. It is the one by
            which the forward pass makes the factor, and gives the same bits for the same tensors. It is copied and
            pickled with the triple: a function of a module, or `functools.partial` of one.
        parameters: each a tensor, or ``(module, "attribute.path")``.
        assign: a function ``assign(value, *tensors)`` that writes the tensors in place so that `compute` returns
            `value`, for `DeltaLoRAOptimizer.restart`. Default: none is known. Rows of a parameter need none.

    Attributes:
        compute, assign: as given.
        sources: the parameters, as given.
        bounds: (start, stop) of a factor that is rows of one parameter; None of others.

    Raises:
        TypeError: for a `compute` or `assign` that is no function, or that holds tensors or modules itself, which a
            copy would share with the original; and for a parameter that is no tensor and no place of one.
        ValueError: without parameters.

    Example:
        AdaLoRA trains P, E and Q, and its branch adds P diag(E) Q:

        >>> import torch
        >>> from deltaopt import Factor, LoRATriple
        >>> P, E, Q = torch.randn(4, 2), torch.zeros(2, 1), torch.randn(2, 6)
        >>> W = torch.nn.Linear(6, 4, bias=False).weight.requires_grad_(False)
        >>> P, E, Q = (parameter.requires_grad_() for parameter in (P, E, Q))
        >>> LoRATriple(W, P, Factor(torch.mul, E, Q), scaling=0.5)
        LoRATriple('unnamed': W (4, 6), A (4, 2), B (2, 6), scaling=0.5)
    """

    def __init__(
        self,
        compute: Callable[..., Tensor],
        *parameters: TensorSource,
        assign: Callable[..., object] | None = None,
    ) -> None:
        if not parameters:
            raise ValueError("a Factor is computed from one parameter or more: Factor(compute, parameter, ...)")
        self.compute = _checked_function(compute, "compute")
        self.assign = None if assign is None else _checked_function(assign, "assign")
        self.sources = tuple(checked_source(parameter, "a parameter of a Factor") for parameter in parameters)
        self.bounds: tuple[int, int] | None = None

    @classmethod
    def rows(cls, parameter: TensorSource, start: int, stop: int) -> Factor:
        """Return the rows ``parameter[start:stop]`` as a factor.

        Args:
            parameter: a tensor, or ``(module, "attribute.path")``.
            start: the first row.
            stop: the row after the last one.

        Raises:
            ValueError: if these are no bounds of rows.
        """
        first, end = as_int(start), as_int(stop)
        if first is None or end is None or not 0 <= first < end:
            raise ValueError(f"the rows of a Factor are start, stop with 0 <= start < stop, got {start!r}, {stop!r}")
        factor = cls(partial(_rows, start=first, stop=end), parameter)
        factor.bounds = first, end
        return factor

    @property
    def is_view(self) -> bool:
        """True if the factor is a part of its parameter, so that writing it writes the parameter."""
        return self.bounds is not None

    def is_same(self, other: object) -> bool:
        """Tell if another factor is the same function of the same parameters."""
        if not isinstance(other, Factor) or self.bounds != other.bounds or len(self.sources) != len(other.sources):
            return False
        functions = self.bounds is not None or self.compute == other.compute
        return functions and all(map(same_source, self.sources, other.sources))

    def __repr__(self) -> str:
        paths = ", ".join(shown(source) for source in self.sources)
        if self.bounds is not None:
            return f"Factor.rows({paths}, {self.bounds[0]}, {self.bounds[1]})"
        return f"Factor({getattr(self.compute, '__name__', self.compute)!s}, {paths})"


INSTEAD_OF_VIEWS = (
    "register Factor.rows(parameter, start, stop) for rows of a parameter, or Factor(function, parameter, ...). "
    "find_triples(model) does so for the libraries that it knows"
)
"""What to do with several branches in one parameter, and with factors that are no parameters."""

FactorSource: TypeAlias = "TensorSource | Factor"
"""What a factor of a triple is registered as."""


class Computed(NamedTuple):
    """A computed factor with the tensors of its parameters as they are at one moment."""

    factor: Factor
    parameters: tuple[Tensor, ...]

    def value(self) -> Tensor:
        """Compute the factor; not differentiable, and a view of the parameter where it is rows of one."""
        with torch.no_grad():
            value: Tensor = self.factor.compute(*self.parameters)
            return value


def same_source(one: object, other: object) -> bool:
    """Tell if two sources of a W or a factor are the same; tensors are compared by identity."""
    if isinstance(one, Factor):
        return one.is_same(other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return one[0] is other[0] and one[1] == other[1]
    return one is other


def checked_source(source: object, what: str) -> TensorSource:
    """Return a tensor or a place of one.

    Raises:
        TypeError: if it is something else.
    """
    if isinstance(source, Tensor):
        return source
    if isinstance(source, tuple) and len(source) == 2:
        module, path = source
        if isinstance(module, nn.Module) and isinstance(path, str):
            return module, path
    raise TypeError(f"{what} is a tensor or (module, 'attribute.path'), got {type(source).__name__}")


def checked_factor(source: object, letter: str) -> FactorSource:
    """Return what a factor is registered as.

    Raises:
        TypeError: if it is something else.
    """
    return source if isinstance(source, Factor) else checked_source(source, letter)


def looked_up(source: TensorSource, label: str) -> Tensor:
    """Return the tensor of a source as it is stored now.

    Raises:
        RuntimeError: if the attribute is missing, with the layer's name.
    """
    if isinstance(source, Tensor):
        return source
    module, path = source
    try:
        return attrgetter(path)(module)  # type: ignore[no-any-return]
    except AttributeError as error:
        raise RuntimeError(
            f"{label}: {path} is not in its {type(module).__name__} ({error}): it is misspelt, or the adapter "
            "was deleted or renamed, or the layer replaced. Register what is there now"
        ) from error


def shown(source: TensorSource) -> str:
    """Write a parameter for a message: its path, or its shape."""
    return f"{tuple(source.shape)}" if isinstance(source, Tensor) else source[1]


def _rows(parameter: Tensor, start: int, stop: int) -> Tensor:
    return parameter.narrow(0, start, stop - start)


def _checked_function(function: Any, what: str) -> Callable[..., Any]:
    if not callable(function):
        raise TypeError(f"{what} of a Factor is a function of the parameters' tensors, got {function!r}")
    inside = function.func if isinstance(function, partial) else function
    if isinstance(inside, FunctionType):
        for cell in inside.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                if isinstance(cell.cell_contents, (Tensor, nn.Module)):
                    raise TypeError(
                        f"{what} of a Factor holds a {type(cell.cell_contents).__name__} of its surroundings, which a "
                        "copy would share with the original: hand it over as a parameter, or take functools.partial of "
                        "a function of a module"
                    )
    return function  # type: ignore[no-any-return]
