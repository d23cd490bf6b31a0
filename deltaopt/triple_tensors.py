"""The tensors of a triple at one moment: W, and A and B or what these are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from deltaopt.factors import Computed
from deltaopt.sharding import local_part
from deltaopt.tensors import FLOATS, PLAIN


class Tensors(NamedTuple):
    """The tensors of a triple as they are stored at one moment.

    Attributes:
        W: the frozen weight.
        left: A, or what it is computed from.
        right: B, or what it is computed from.
    """

    W: Tensor
    left: Tensor | Computed
    right: Tensor | Computed

    @property
    def A(self) -> Tensor:
        """The left factor; a computed one as the present values of its parameters make it."""
        return self.left if isinstance(self.left, Tensor) else self.left.value()

    @property
    def B(self) -> Tensor:
        """The right factor; a computed one as the present values of its parameters make it."""
        return self.right if isinstance(self.right, Tensor) else self.right.value()

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that A is made of, then those of B, in the order of `LoRATriple.parameter_names`."""
        if isinstance(self.left, Tensor) and isinstance(self.right, Tensor):
            return self.left, self.right
        return *_stored(self.left), *_stored(self.right)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that A and B are made of, each once."""
        return tuple(dict.fromkeys(self.stored))

    def at(self, values: Sequence[Tensor]) -> Tensors:
        """Return these tensors with other ones in the place of `parameters`."""
        placed = dict(zip(self.parameters, values, strict=True))
        return self._replace(left=_replaced(self.left, placed), right=_replaced(self.right, placed))

    def signature(self) -> tuple[object, ...]:
        """Return a value that changes when a tensor is replaced or moved."""
        return tuple(
            [
                (id(tensor), part.data_ptr() if type(part) in PLAIN else None, tensor.shape, tensor.dtype)
                for tensor in (self.W, *self.stored)
                for part in [tensor if type(tensor) in PLAIN else local_part(tensor)]
            ]
        )

    def compute_dtype(self) -> torch.dtype:
        """Return the dtype for products of the factors: float32, or float64 where one of the tensors is."""
        dtypes = (t.dtype for t in (self.W, *self.stored) if t.dtype in FLOATS)
        return reduce(torch.promote_types, dtypes, torch.float32)


def _stored(factor: Tensor | Computed) -> tuple[Tensor, ...]:
    return (factor,) if isinstance(factor, Tensor) else factor.parameters


def _replaced(factor: Tensor | Computed, placed: dict[Tensor, Tensor]) -> Tensor | Computed:
    if isinstance(factor, Tensor):
        return placed[factor]
    return factor._replace(parameters=tuple(placed[parameter] for parameter in factor.parameters))
