"""litgpt: a layer holds its base as ``linear``, the factors and the scaling; ``lora_B`` is our A, ``lora_A`` our B."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

from litgpt import lora
from torch import nn

from deltaopt.factors import Factor
from deltaopt.integrations.layer_triple import (
    OWN_PROTOCOL,
    LayerTriple,
    dropout_problems,
    first_of,
    named_branches,
    survey_of,
)
from deltaopt.integrations.survey import Survey
from deltaopt.triple import LoRATriple

UNMERGE = (
    "litgpt's merge() has no way back. Load the weights and the factors again into a model that was not merged, and "
    "merge a copy"
)

HEADLINE = "these litgpt layers cannot be used"


def survey(model: nn.Module, adapter: str, allow_dropout: bool, attach: bool) -> Survey:
    """Return every layer of litgpt with a branch; see `deltaopt.integrations.LIBRARIES`."""
    return survey_of(named_branches(model, lora.LoRALayer), _refusal, _triples, allow_dropout)


def _triples(name: str, layer: Any, allow_dropout: bool) -> Iterator[LoRATriple]:
    make = partial(
        LayerTriple,
        layer,
        weight="linear.weight",
        dropout="lora_dropout",
        unmerge=UNMERGE,
        allow_dropout=allow_dropout,
        scaling=(layer, "scaling"),
    )
    A, B = (layer, "lora_B"), (layer, "lora_A")
    if not isinstance(layer, lora.LoRAQKVLinear):
        yield make(A, B, name=name)
        return
    rows, first = layer.lora_ind.tolist(), 0
    letters = [letter for letter, enabled in zip("qkv", layer.enable_lora, strict=True) if enabled]
    for i, (letter, size) in enumerate(zip(letters, layer.qkv_shapes, strict=True)):
        runs = _runs(rows[first : first + size])
        for k, (start, stop) in enumerate(runs):
            yield make(
                Factor.rows(A, first, first + stop - start),
                Factor.rows(B, i * layer.r, (i + 1) * layer.r),
                name=f"{name}.{letter}" if len(runs) == 1 else f"{name}.{letter}.{k}",
                rows=(start, stop),
            )
            first += stop - start


def _runs(rows: list[int]) -> list[tuple[int, int]]:
    """Return the (start, stop) of consecutive rows: some versions of litgpt keep q, k and v of a group together."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
    return [(rows[start], rows[stop - 1] + 1) for start, stop in pairwise([*starts, len(rows)])]


def _refusal(layer: Any, allow_dropout: bool) -> str | None:
    if not isinstance(layer, lora.LoRALinear):
        return f"{type(layer).__name__} is no class of litgpt itself: {OWN_PROTOCOL}"
    if type(layer).forward not in (lora.LoRALinear.forward, lora.LoRAQKVLinear.forward):
        return f"{type(layer).__name__} has a forward pass of its own: {OWN_PROTOCOL}"
    if layer.linear.weight.is_meta:
        return "its weight is on the meta device, without values: load the weights first"
    if layer.linear.weight.requires_grad:
        return "its weight still requires grad: call litgpt.lora.mark_only_lora_as_trainable(model) first"
    return first_of([] if allow_dropout else dropout_problems(layer.lora_dropout, "lora_dropout"))
