"""The paper's loop in float64 with dense products. Imports torch alone and shares nothing with the package.

Written from Algorithm 1 and Eq. 6: keep A B, let the optimizer step on A and B, and from iteration K on
add lambda * s times the change of the product to W.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class DenseRun:
    """W, A, B after each step, the start included."""

    W: list[Tensor]
    A: list[Tensor]
    B: list[Tensor]


def product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B, for a stack of experts one by one."""
    if A.dim() == 2:
        return A @ B
    return torch.stack([A[e] @ B[e] for e in range(len(A))])


def delta_lora(
    W: Tensor,
    A: Tensor,
    B: Tensor,
    loss: Callable[[Tensor, int], Tensor],
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    *,
    steps: int,
    update_ratio: float | Callable[[int], float],
    start_step: int,
    scaling: float,
    left: Callable[[Tensor], Tensor] = lambda A: A,
    right: Callable[[Tensor], Tensor] = lambda B: B,
    factor_dtype: torch.dtype = torch.float64,
    create_graph: bool = False,
) -> DenseRun:
    """Delta-LoRA on one layer.

    Args:
        W: (c, d) or (e, c, d).
        A: what is trained; `left(A)` is (c, r) or (e, c, r).
        B: what is trained; `right(B)` is (r, d) or (e, r, d).
        loss: (effective weight W + scaling * A B, step) -> scalar.
        make_optimizer: builds the optimizer that trains [A, B].
        steps: how many.
        update_ratio: lambda, or step -> lambda.
        start_step: K.
        scaling: s.
        left: stored A -> its matrix.
        right: stored B -> its matrix.
        factor_dtype: what A and B are trained in; their product is of float64 if `left` and `right` make it so.
        create_graph: of the backward pass, for optimizers that take second derivatives.
    """
    W = W.detach().to(torch.float64).clone()
    A, B = (nn.Parameter(t.detach().to(factor_dtype, copy=True)) for t in (A, B))
    optimizer = make_optimizer([A, B])
    run = DenseRun([W.clone()], [A.detach().clone()], [B.detach().clone()])
    for t in range(steps):
        old_product = product(left(A), right(B)).detach().clone()

        def closure(W: Tensor = W, step: int = t) -> Tensor:
            optimizer.zero_grad()
            value = loss(W + scaling * product(left(A), right(B)), step)
            value.backward(create_graph=create_graph)
            return value

        optimizer.step(closure)
        if t >= start_step:
            ratio = update_ratio(t) if callable(update_ratio) else update_ratio
            W = W + ratio * scaling * (product(left(A), right(B)).detach() - old_product)
        run.W.append(W.clone())
        run.A.append(A.detach().clone())
        run.B.append(B.detach().clone())
    return run


def replay(W: Tensor, products: list[Tensor], coefs: list[float]) -> list[Tensor]:
    """W after each step, from the dense products A B before and after it: no optimizer, no feedback."""
    run = [W.to(torch.float64)]
    for before, after, coef in zip(products[:-1], products[1:], coefs, strict=True):
        run.append(run[-1] + coef * (after - before))
    return run
