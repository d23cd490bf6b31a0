"""Every W as it was before training, for a while: the reference model of DPO, an evaluation of the base."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from deltaopt.files import load
from deltaopt.fingerprint import Fingerprint
from deltaopt.hooks import hook_problem, subtract_from_output
from deltaopt.ledger import Ledger, add_terms_, displacement_of, full_part
from deltaopt.lowrank import joined
from deltaopt.triple import LoRATriple

BaseSource: TypeAlias = "Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]"
"""Pristine weights: a state_dict, a model, a file, or a folder of .safetensors files."""

METHODS = (None, "copy", "hooks")
PLACES = (None, "cpu", "device")


class KeptBase:
    """Copies of the W's from before their first move.

    Args:
        place: "cpu", or "device" for where each W is.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._copies: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(copy.nbytes for copy in self._copies.values())

    def keep(self, triple: LoRATriple, base: Tensor | None = None) -> None:
        """Copy W as it is now, or `base`; a copy that is there already is written over."""
        part = triple.moved_part(triple.W).detach() if base is None else base
        held = self._copies.get(triple.label)
        if held is None or held.shape != part.shape or held.dtype != part.dtype:
            device = "cpu" if self._place == "cpu" else triple.W.device
            held = self._copies[triple.label] = torch.empty_like(part, device=device)
        held.copy_(part)

    def find(self, triple: LoRATriple, base: Fingerprint) -> Tensor | None:
        """The copy, unless it is of a W that had moved already, when a checkpoint with the whole model was loaded."""
        held = self._copies.get(triple.label)
        return held if held is not None and Fingerprint(held).record() == base.record() else None


class Pristine:
    """Pristine weights from elsewhere, found by what is in them: names differ between libraries."""

    def __init__(self, source: BaseSource) -> None:
        self._by_shape: dict[torch.Size, list[Tensor]] = {}
        for tensor in _tensors(source):
            self._by_shape.setdefault(tensor.shape, []).append(tensor)

    def find(self, triple: LoRATriple, base: Fingerprint) -> Tensor | None:
        """The part of the tensor that this W was before its first move; None if it is not among the weights."""
        W, expected = triple.W, base.record()
        for tensor in self._by_shape.get(W.shape, ()):
            part = triple.moved_part(tensor.detach().to(getattr(torch, base.dtype)))
            if Fingerprint(part).record() == expected:
                return part
        return None


@contextmanager
def at_base(
    triples: Sequence[LoRATriple],
    ledgers: Sequence[Ledger],
    kept: KeptBase | None,
    source: BaseSource | None,
    method: str | None,
) -> Iterator[None]:
    """Let every W be, or every layer compute, what it was before its first move; see `base_weights`."""
    if method not in METHODS:
        raise ValueError(f"method is one of {METHODS}, got {method!r}")
    if method == "hooks" and source is not None:
        raise ValueError(
            "source and method='hooks' exclude each other: hooks take the displacement off, and need no base"
        )
    pristine = Pristine(source) if source is not None else None
    decided, problems = [], []
    for triple, ledger in zip(triples, ledgers, strict=True):
        if ledger.base is None:
            continue
        base, problem = _base_of(triple, ledger, kept, pristine, method)
        decided.append((triple, ledger, base))
        problems += [f"{triple.label}: {problem}"] if problem is not None else []
    if problems:
        raise RuntimeError("the base can not be had (nothing was changed):\n  " + "\n  ".join(problems))
    with ExitStack() as undo:
        for triple, ledger, base in decided:
            if isinstance(base, Tensor):
                undo.callback(_put, triple, triple.moved_part(triple.W).detach().clone())
                _put(triple, base)
                continue
            terms = displacement_of(triple, ledger)
            if terms and base == "hooks":
                undo.callback(subtract_from_output(triple, joined(terms)).remove)
            elif terms:
                undo.callback(_put, triple, triple.moved_part(triple.W).detach().clone())
                add_terms_(triple, triple.moved_part(triple.W), terms, -1.0)
        yield


@torch.no_grad()
def base_by_compensation(triple: LoRATriple, ledger: Ledger) -> Tensor | None:
    """A 16-bit W with what compensated rounding has cut off, minus its displacement, if that is what it was.

    It is not where float32's own rounding shows (a zero), where W saturated, or where the compensation began later.
    """
    part = triple.moved_part(triple.W).detach()
    if ledger.base is None or ledger.lost is not None or ledger.compensation_of(part) is None:
        return None
    full = full_part(triple, ledger)
    add_terms_(triple, full, displacement_of(triple, ledger), -1.0)
    found = full.to(part.dtype)
    return found if Fingerprint(found).record() == ledger.base.record() else None


@torch.no_grad()
def _put(triple: LoRATriple, bits: Tensor) -> None:
    """Write W, which is looked up: a model may have been moved or cast in between."""
    triple.moved_part(triple.W).copy_(bits)


def _base_of(
    triple: LoRATriple, ledger: Ledger, kept: KeptBase | None, pristine: Pristine | None, method: str | None
) -> tuple[Tensor | str, str | None]:
    """(the exact base, or "computed" or "hooks", and why that does not do)."""
    assert ledger.base is not None
    ways = 'hand in the pristine weights, base_weights(source=...), or build the optimizer with keep_base="cpu"'
    if method != "hooks":
        found = None
        if pristine is not None:
            found = pristine.find(triple, ledger.base)
            if found is None:
                return "", not_in_source(triple, ledger.base)
            if kept is not None and kept.find(triple, ledger.base) is None:
                kept.keep(triple, found)
        elif kept is not None:
            found = kept.find(triple, ledger.base)
        if found is None:
            found = base_by_compensation(triple, ledger)
        if found is not None:
            return found, None
        if triple.W.element_size() > 2:
            return "computed", ledger.lost and f"{ledger.lost}; or {ways}"
    if method == "copy":
        return "", (
            f"W is {triple.W.dtype}, in which adding and then subtracting does not lead back: {ways}; or take "
            'method="hooks"'
        )
    problem = ledger.lost or hook_problem(triple)
    return "hooks", problem and f"{problem}; {ways}"


def not_in_source(triple: LoRATriple, base: Fingerprint) -> str:
    """The sentence for a W that `Pristine` does not find."""
    return (
        f"no tensor of the source, taken as {base.dtype}, is what this W of {tuple(triple.W.shape)} was before its "
        "first move: hand in the checkpoint that the fine-tuning began from, as the model stores it"
    )


def _tensors(source: BaseSource) -> Iterable[Tensor]:
    if isinstance(source, nn.Module):
        return source.state_dict().values()
    if isinstance(source, Mapping):
        return [value for value in source.values() if isinstance(value, Tensor)]
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source is a state_dict, a model, a file or a folder, got a {type(source).__name__}")
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"no .safetensors file in {path}: hand in a state_dict")
    return [tensor for file in files for tensor in _tensors(load(file))]
