"""Changes of A, B and W between steps: restart, resync, and LoRA's start."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from deltaopt.checks import check_finite, check_writable
from deltaopt.lowrank import Term
from deltaopt.messages import layers
from deltaopt.rounding.writer import Writer, put_
from deltaopt.triple import LoRATriple
from deltaopt.weight import WeightState

Reinit: TypeAlias = Callable[[LoRATriple], object]


@torch.no_grad()
def restart(weights: Sequence[WeightState], reinit: Reinit, writer: Writer) -> None:
    """Let `reinit` start A and B afresh, and add every branch as it was before to its W.

    A folded branch begins with (1 + lambda) s times its new product, of which W gives lambda s.
    """
    check_finite(weights)
    check_writable(weights)
    branches = {weight: weight.branch().cloned() for weight in weights}
    kept = [(factor, factor.clone()) for weight in weights for factor in weight.tensors[1:]]
    try:
        for weight in weights:
            reinit(weight.triple)
        check_finite(weights)
    except BaseException:
        for factor, before in kept:
            factor.copy_(before)
        raise
    for weight in weights:
        weight.note_base()
    for weight, branch in branches.items():
        triple, terms = weight.triple, [branch]
        weight.placed_ledger().restart(branch.coef, (branch.A, branch.B))
        if triple.folded:
            terms.append(weight.branch()._replace(coef=-triple.folded * triple.scaling))
            weight.ledger.add(terms[-1])
        writer.add_terms_(weight, terms)


@torch.no_grad()
def resync(weights: Sequence[WeightState], writer: Writer) -> None:
    """Move every W whose ratio is not 0 now by coef times the change of the product since its last move."""
    check_finite(weights)
    rounded = []
    for weight in weights:
        before, (_, A, B) = weight.placed_ledger().end, weight.branch().cloned()
        if before is None or weight.ratio == 0 or all(map(torch.equal, before, (A, B))):
            continue
        ledger, dtype = weight.ledger, weight.tensors.W.dtype
        ledger.end = A, B
        in_steps = dtype.itemsize == 2 and writer.rounding.of(dtype) != "compensated"
        base = weight.base_copy(weight.base) if weight.base is not None and in_steps else None
        if base is not None and ledger.lost is None:
            put_(weight, base)
            writer.add_terms_(weight, ledger.displacement())
            continue
        writer.add_terms_(weight, [Term(ledger.coef, A, B), Term(-ledger.coef, *before)])
        rounded += [weight.label] if in_steps else []
    if rounded:
        warnings.warn(
            f"resync() moved the 16-bit weights of {layers(rounded)} in one rounded step; training had rounded after "
            "each step, so they differ slightly from what they were with these factors. With keep_base they would be "
            "base + displacement; or load a checkpoint that holds W",
            RuntimeWarning,
            stacklevel=4,
        )


def lora_start(generator: torch.Generator | None = None) -> Reinit:
    """Return LoRA's usual start, with a product of zero.

    A is zero and B uniform in +- 1 / sqrt(d), as kaiming_uniform_(a=sqrt(5)) makes it; in embeddings B, of which rows
    are looked up, is zero and A standard normal.
    """

    def reinit(triple: LoRATriple) -> None:
        A, B = triple.A, triple.B
        if triple.layout == "embedding":
            A.normal_(generator=generator)
            B.zero_()
            return
        _, right = triple.view.factors(triple.W, A, B)
        bound = right.shape[-1] ** -0.5
        A.zero_()
        B.uniform_(-bound, bound, generator=generator)

    return reinit
