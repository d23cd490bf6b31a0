"""The delta of the factors and its one fused product (Eq. 6 of the paper).

    W <- W + coef * (A'B' - AB),    A'B' - AB = [A' - A | A] @ [B' ; B' - B] = U @ V

U is (c, 2r) and V is (2r, d), so one `addmm_` reads and writes W once. The dense product is never formed,
and a small change is not lost as the difference of two large products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaopt.guard import FiniteGuard
from deltaopt.rounding import add_product_
from deltaopt.triple import LoRATriple, Stored


class BufferKind(NamedTuple):
    """What triples have in common that share buffers: shapes of the factors, dtype of the computation, device."""

    A: torch.Size
    B: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, triple: LoRATriple, stored: Stored) -> BufferKind:
        """The kind of a triple; float32, or float64 where a tensor of it is."""
        A, B = triple.factor_matrices(stored)
        dtype = torch.float32
        for tensor in stored:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return cls(A.shape, B.shape, dtype, A.device)


class Move(NamedTuple):
    """One triple in one step: its tensors, what multiplies the delta, and whose buffers it can share."""

    triple: LoRATriple
    stored: Stored
    coef: float
    kind: BufferKind

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as matrices, as they are now."""
        return self.triple.factor_matrices(self.stored)


class FactoredDelta:
    """Keeps the factors of many triples from before the inner step, then moves every W by their delta.

    Triples of equal shape share one pair of buffers (n, c, 2r) and (n, 2r, d), kept from step to step, so
    that the differences take a few launches for all of them.
    """

    def __init__(self) -> None:
        self._stacks: dict[BufferKind, _Stack] = {}

    @torch.no_grad()
    def snapshot(self, moves: Sequence[Move]) -> None:
        """Keep A and B of every move, in the dtype of the computation."""
        grouped: dict[BufferKind, list[Move]] = {}
        for move in moves:
            grouped.setdefault(move.kind, []).append(move)
        kept, self._stacks = self._stacks, {}
        for kind, members in grouped.items():
            stack = kept.get(kind)
            self._stacks[kind] = (
                stack if stack is not None and len(stack) == len(members) else _Stack(kind, len(members))
            )
            self._stacks[kind].snapshot(members)

    @torch.no_grad()
    def apply_(self, guard: FiniteGuard) -> None:
        """W += coef * (A'B' - AB) for every move of the snapshot, or for none if a factor is not finite.

        A W whose factors did not change keeps its bits.
        """
        stacks = list(self._stacks.values())
        sizes = [stack.difference() for stack in stacks]
        if not sizes:
            return
        finite = guard.verdict(sizes)
        for stack, size in zip(stacks, sizes, strict=True):
            with _full_precision(size.device):
                stack.add_to_weights_(size.gt(0) & finite.to(size.device))

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers hold."""
        return sum(stack.U.nbytes + stack.V.nbytes for stack in self._stacks.values())


class _Stack:
    """U and V of the moves of one kind."""

    def __init__(self, kind: BufferKind, n: int) -> None:
        *lead, c, r = kind.A
        self.U = torch.empty(n, *lead, c, 2 * r, dtype=kind.dtype, device=kind.device)
        self.V = torch.empty(n, *lead, 2 * r, kind.B[-1], dtype=kind.dtype, device=kind.device)
        self._A_new, self._A_old = self.U.split(r, dim=-1)
        self._B_new, self._B_old = self.V.split(r, dim=-2)
        # Views are made once: there are several for each W, and every step would make them anew.
        self._pairs = list(zip(self.U, self.V, strict=True))
        self._new = self._A_new.unbind(0) + self._B_new.unbind(0)
        self._old = self._A_old.unbind(0) + self._B_old.unbind(0)
        self._members: Sequence[Move] = ()

    def __len__(self) -> int:
        return len(self.U)

    def snapshot(self, members: Sequence[Move]) -> None:
        self._members = members
        torch._foreach_copy_(self._old, self._factors())

    def difference(self) -> Tensor:
        """Make U = [A' - A | A] and V = [B' ; B' - B]; returns (n,) sizes of the change, 0 where there is none."""
        torch._foreach_copy_(self._new, self._factors())
        self._A_new.sub_(self._A_old)
        torch.sub(self._B_new, self._B_old, out=self._B_old)
        return torch.maximum(_size(self._A_new), _size(self._B_old))

    def add_to_weights_(self, keep: Tensor) -> None:
        """Add coef * U @ V to the W's that `keep`, (n,) bool on the device, names.

        On a CPU the others are passed over. On a GPU `keep` is not known to the host: there the factors of
        the others become +0 and the coefficient is made negative, as adding -0 leaves every bit as it is.
        """
        if _known_to_host(keep.device):
            chosen, coefs = keep.tolist(), [move.coef for move in self._members]
        else:
            chosen, coefs = [True] * len(self), self._mask_(keep)
        for move, (U, V), coef, moves in zip(self._members, self._pairs, coefs, chosen, strict=True):
            if moves:
                add_product_(move.triple.weight_matrix(move.stored.W), U, V, coef)
        self._members = ()

    def _mask_(self, keep: Tensor) -> list[float]:
        """Zero U and V where not kept, and turn the signs so that every coefficient is negative; returns these."""
        drop = ~keep.view(-1, *[1] * (self.U.dim() - 1))
        turned = [U for move, (U, _) in zip(self._members, self._pairs, strict=True) if move.coef > 0]
        if turned:
            torch._foreach_neg_(turned)
        self.U.masked_fill_(drop, 0.0)
        self.V.masked_fill_(drop, 0.0)
        return [-abs(move.coef) for move in self._members]

    def _factors(self) -> tuple[Tensor, ...]:
        A, B = zip(*(move.factors() for move in self._members), strict=True)
        return A + B


def _known_to_host(device: torch.device) -> bool:
    """Whether the host can read a tensor there without waiting."""
    return device.type == "cpu"


def _size(change: Tensor) -> Tensor:
    """Largest magnitude in each of the n changes; NaN or infinite if one entry is."""
    # torch.linalg.vector_norm(ord=inf) says the same without the temporary, but is 5 times slower on a CPU.
    return change.abs().amax(dim=tuple(range(1, change.dim())))


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 or bf16 shortcut in float32 products: the delta has few bits to spare."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    with torch.autocast(device.type, enabled=False):
        if before in ("none", "ieee"):
            yield
            return
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = "none"  # as it was, if what was read came from torch.backends.fp32_precision
            if matmul.fp32_precision != before:
                matmul.fp32_precision = before
