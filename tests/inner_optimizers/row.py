"""One row of the table: an inner optimizer, how it is built, and how a training loop drives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from deltaopt import DeltaLoRAOptimizer
from tests.inner_optimizers.layers import C, D, Layer, PeftLayer, R

RULES = ("in_place", "folded")
COLUMNS = ("follows", "resumes", "format")


@dataclass(frozen=True)
class Row:
    """An inner optimizer.

    Args:
        library: its name as a distribution.
        name: as a user writes it.
        build: makes the optimizer of a layer's A and B, which it asks the layer for.
        inner: a class or a factory, which DeltaLoRAOptimizer builds from param groups; what `build` makes where None.
        options: of that class.
        drive: how a loop steps: "gradient" (`loss.backward()`, `step()`), "closure" (`step(closure)`), or "both"
            (`loss.backward()`, `step(closure)`), or "graph" (`loss.backward(create_graph=True)`, `step()`).
        batches: "new" at every step, or "one" for optimizers that remember the loss.
        dtype: of A and B, float32 where the optimizer takes or computes in no more.
        shape: (c, d, r).
        layer: the kind.
        tolerance: of what is compared with the reference, relative.
        around: wraps the DeltaLoRAOptimizer, instead of being inside.
        notes: what a cell that is not "yes" means and what to do, by column; or by (rule, column).
    """

    library: str
    name: str
    build: Callable[[Any], Optimizer]
    inner: Callable[..., Optimizer] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    drive: str = "gradient"
    batches: str = "new"
    dtype: torch.dtype = torch.float64
    shape: tuple[int, int, int] = (C, D, R)
    layer: type[Layer] | type[PeftLayer] = Layer
    tolerance: float = 1e-12
    around: Callable[[DeltaLoRAOptimizer], Optimizer] | None = None
    notes: Mapping[str | tuple[str, str], str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.library} {self.name}"

    @property
    def ratio(self) -> float:
        """Return the `update_ratio`.

        Where A and B are in float32 it is 1: the scaling and the gradients of a folded branch then differ from those
        of one in place by powers of two, which round nothing, so that the two can be compared bit for bit.
        """
        return 1.0 if self.is_narrow else 0.7

    @property
    def is_narrow(self) -> bool:
        """Tell if A and B are not in float64."""
        return self.dtype != torch.float64

    def note(self, rule: str, column: str) -> str | None:
        return self.notes.get((rule, column), self.notes.get(column))

    def wrap(self, layer: Any, rule: str, start_step: int) -> DeltaLoRAOptimizer:
        """Return the optimizer of a layer, as a user writes it."""
        settings = {"update_ratio": self.ratio, "start_step": start_step, "weight_update": rule}
        if self.inner is None:
            built = self.build(layer)
            return DeltaLoRAOptimizer(built, layer.triples(), **settings)
        return DeltaLoRAOptimizer(self.inner, layer.triples(), **settings, **self.options)


def row(library: str, inner: type[Optimizer], label: str = "", **options: Any) -> Row:
    """Return the row of an optimizer class.

    Args:
        library: its name as a distribution.
        inner: the class.
        label: what the row says of the options; the options themselves, if nothing is given.
        options: those of `Row` that are named in `SETTINGS`, and those of the class.
    """
    settings = {key: options.pop(key) for key in SETTINGS if key in options}
    said = label or ", ".join(f"{key}={value}" for key, value in options.items() if key not in UNSAID)
    name = f"`{inner.__name__}`" + (f", {said}" if said else "")
    return Row(library, name, lambda layer: inner(layer.factors, **options), inner, options, **settings)


SETTINGS = ("drive", "batches", "dtype", "shape", "layer", "tolerance", "notes")
UNSAID = ("lr", "eps", "weight_decay")
