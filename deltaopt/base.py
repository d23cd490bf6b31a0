"""The base: every W as it was before training, for a while, and what rounding did to W since."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaopt.all_or_nothing import note_result
from deltaopt.base_hooks import subtract_always
from deltaopt.checkpoint.files import load
from deltaopt.layer_output import output_problem
from deltaopt.lowrank import Term, change_of
from deltaopt.messages import Problem, raise_problems
from deltaopt.overwritten import BY_SOMEBODY_ELSE, overwritten
from deltaopt.rounding.blocks import add_product_, full_precision
from deltaopt.rounding.writer import add_terms_, put_
from deltaopt.sharding import gathered, part_like, sharded_matrix
from deltaopt.tensors import outside_inference_mode
from deltaopt.weight import WeightState

BaseSource: TypeAlias = "Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]"
"""Pristine weights: a state_dict, a model, a file, or a folder of .safetensors files."""

OVERWRITTEN = f"W {BY_SOMEBODY_ELSE}, so that W minus its displacement is not the base"

SIXTEEN_BITS = "W is {}, in which adding and then subtracting does not lead back"

METHODS = (None, "copy", "hooks")


class Pristine:
    """Pristine weights from elsewhere, found by what is in them: names differ between libraries.

    They may be sharded, as those of a model are. All ranks have to look in the same ones then, or for a sharded W.
    """

    def __init__(self, source: BaseSource) -> None:
        self._by_shape: dict[torch.Size, list[Tensor]] = {}
        for tensor in _tensors(source):
            self._by_shape.setdefault(tensor.shape, []).append(tensor)

    def find(self, weight: WeightState) -> Tensor | None:
        """Return the part of the tensor that this W was before its first move; None if no tensor is."""
        assert weight.base is not None
        expected, dtype = weight.base.record(), getattr(torch, weight.base.dtype)
        W, piece = weight.tensors.W, weight.piece
        for tensor in self._by_shape.get(W.shape, ()):
            here = gathered(tensor.detach()) if piece is None else part_like(tensor.detach(), W, piece.stored)
            part = weight.view.part(here.to(dtype))
            if weight.fingerprint_of(part).record() == expected:
                return part
        return None

    def __repr__(self) -> str:
        """Return a text that is the same on all ranks that look in the same tensors."""
        tensors = [tensor for alike in self._by_shape.values() for tensor in alike]
        return f"{len(tensors)} tensors with {sum(tensor.numel() for tensor in tensors)} elements"


def pristine_in(source: BaseSource | None, method: str | None = None) -> Pristine | None:
    """Return the pristine weights in what `base_weights` was given; None without a source.

    Raises:
        ValueError, TypeError, OSError: for arguments that are of no use.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {METHODS}, got {method!r}")
    if method == "hooks" and source is not None:
        raise ValueError(
            "source and method='hooks' exclude each other: hooks take the displacement off, and need no base"
        )
    with outside_inference_mode():
        return Pristine(source) if source is not None else None


class Visit:
    """Every W is, or every layer computes, what it was before its first move; see `DeltaLoRAOptimizer.base_weights`.

    Args:
        weights: with their tensors resolved.
        pristine: weights from elsewhere.
        method: of `METHODS`.

    Raises:
        RuntimeError: if a base cannot be brought back. Nothing is changed then.
    """

    def __init__(self, weights: Sequence[WeightState], pristine: Pristine | None, method: str | None) -> None:
        self._weights = weights
        self._terms = {
            weight: [] if weight.ledger.lost is not None else weight.displacement()
            for weight in weights
            if weight.base is not None
        }
        self._ways = _ways_to_base(self._terms, pristine, method)
        self._moved: dict[WeightState, _Bits] = {}
        self._hooks: list[RemovableHandle] = []
        raise_problems(
            RuntimeError,
            "the base cannot be brought back (nothing was changed)",
            [Problem(weight.label, way.sentence) for weight, way in self._ways.items() if isinstance(way, _NoWay)],
        )

    def enter(self) -> None:
        """Bring the base back, after a copy of the bits that each W has now."""
        for weight, way in self._ways.items():
            terms = [] if isinstance(way, Tensor) else self._terms[weight]
            if way == "hooks" and terms:
                owner = weight.triple.weight_module()
                assert owner is not None
                note_result(
                    self._hooks,
                    partial(subtract_always, owner, weight.tensors.W, weight.triple.view, terms, weight.label),
                )
            elif terms or isinstance(way, Tensor):
                self._moved[weight] = _Bits.of(weight)
                if isinstance(way, Tensor):
                    put_(weight, way)
                else:
                    _take_off_(weight, terms)
        for weight in self._weights:
            weight.forget()  # the model may be moved or cast meanwhile

    def leave(self) -> None:
        """Give every W its bits again; may be called again after an exception."""
        for handle in self._hooks:
            handle.remove()
        for bits in self._moved.values():
            bits.put_back()

    def unfinished(self) -> list[str]:
        """Return the labels of the weights that may be at their base."""
        return [weight.label for weight in self._moved]


class _Bits(NamedTuple):
    """What W was before its base was brought back; of a sharded W this rank's part, and where that is."""

    weight: WeightState
    bits: Tensor
    here: Tensor | None

    @classmethod
    def of(cls, weight: WeightState) -> _Bits:
        """Copy W as it is now."""
        return cls(weight, weight.part().detach().clone(), None if weight.piece is None else weight.here.detach())

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the bits into W. The model may have been moved or cast since.

        FSDP2 may have gathered the base for a forward pass and kept it: then that tensor gets the bits too.
        """
        weight = self.weight
        if self.here is None or not weight.is_gathered:
            put_(weight, self.bits)
            weight.note_restored()
            return
        weight.view.part(self.here).copy_(self.bits)
        W: Tensor = weight.tensors.W.detach()
        W.copy_(weight.whole(self.here))
        weight.note_restored(self.here)


@torch.no_grad()
def _take_off_(weight: WeightState, terms: Sequence[Term]) -> None:
    """Subtract the displacement from W: in one pass where nothing large cancels in it, else in float64."""
    part, total = weight.part(), change_of(terms)
    if total is None or part.dtype != total.A.dtype:
        add_terms_(weight, part, terms, -1.0)
        return
    view, (A, B) = weight.view, weight.cut(total.A, total.B)
    with full_precision(part.device):
        add_product_(view.part_matrix(part), A, view.ordered(B, weight.here), -1.0)


@torch.no_grad()
def residual(weight: WeightState, pristine: Pristine | None) -> Tensor:
    """Return what rounding did to W; see `DeltaLoRAOptimizer.residual`."""
    view = weight.view
    if problems := weight.weight_problems():
        raise RuntimeError(f"{weight.label}: {problems[0]}")
    matrix = view.in_order_of_factors(view.part_matrix(_residual(weight, pristine)), weight.here)
    return matrix if weight.piece is None else sharded_matrix(matrix, weight.piece, weight.tensors.W)


def _residual(weight: WeightState, pristine: Pristine | None) -> Tensor:
    """Return the residual as the part of W that moves."""
    part = weight.part().detach()
    dtype = torch.promote_types(part.dtype, torch.float32)
    if weight.base is None:
        return torch.zeros_like(part, dtype=dtype)
    base = weight.base_copy(weight.base) if pristine is None else pristine.find(weight)
    if base is None and pristine is not None:
        raise ValueError(_not_in_source(weight))
    if base is None and base_by_compensation(weight) is not None:
        return part - weight.full_part()
    if base is None:
        raise RuntimeError(
            f"{weight.label}: what rounding did is known with W from before its first move only: hand it in, "
            'residual(name, source=...), or build the optimizer with keep_base="cpu"'
        )
    asked = base.to(part.device, torch.float64, copy=True)
    add_terms_(weight, asked, weight.displacement())
    return (part - asked).to(dtype)


@torch.no_grad()
def base_by_compensation(weight: WeightState) -> Tensor | None:
    """Return a 16-bit W with what compensated rounding has cut off, minus its displacement, if that is the base.

    It is not where float32's own rounding shows (a zero), where W saturated, or where the compensation began later.
    """
    part = weight.part().detach()
    if weight.base is None or weight.ledger.lost is not None or weight.known_compensation(part) is None:
        return None
    full = weight.full_part()
    add_terms_(weight, full, weight.displacement(), -1.0)
    found = full.to(part.dtype)
    return found if weight.fingerprint_of(found).record() == weight.base.record() else None


@torch.no_grad()
def put_back(weight: WeightState) -> str | None:
    """Write the base into W for good, and take it as where W is; return why that cannot be done, if it cannot."""
    if problems := weight.weight_problems():
        return problems[0]
    if weight.base is None:
        return None
    terms = [] if weight.ledger.lost is not None else weight.displacement()
    way = _ways_to_base({weight: terms}, None, "copy")[weight]
    if isinstance(way, _NoWay):
        return way.reason
    weight.note_write()
    if not isinstance(way, Tensor):
        way = weight.part().detach().clone()
        add_terms_(weight, way, terms, -1.0)
    bits = way

    def finish() -> None:
        put_(weight, bits)
        weight.rebase()

    try:
        finish()
    except BaseException:
        finish()
        raise
    return None


class _NoWay:
    """The reason why a base cannot be brought back, and what else would do."""

    def __init__(self, reason: str, ways: str = "") -> None:
        self.reason = reason
        self.sentence = f"{reason}{ways}"


def _ways_to_base(
    displacements: Mapping[WeightState, Sequence[Term]], pristine: Pristine | None, method: str | None
) -> dict[WeightState, Tensor | str | _NoWay]:
    """Return the exact base of each W, or "computed" or "hooks", or why none of them will do.

    Args:
        displacements: of weights that have moved; none of one where that is lost.
        pristine: weights from elsewhere.
        method: of `METHODS`.
    """
    exact = {
        weight: None if method == "hooks" else _exact_base(weight, not terms, pristine)
        for weight, terms in displacements.items()
    }
    others = set(overwritten([weight for weight, way in exact.items() if way is None]))
    return {
        weight: _way_without_bits(weight, displacements[weight], method, weight in others) if way is None else way
        for weight, way in exact.items()
    }


def _exact_base(weight: WeightState, without_terms: bool, pristine: Pristine | None) -> Tensor | str | _NoWay | None:
    """Return the exact base; "computed" where W is it; a reason if the source lacks it; None if it is not known."""
    assert weight.base is not None
    if weight.is_gathered:
        return _NoWay(weight.weight_problems()[0])
    if pristine is not None:
        found = pristine.find(weight)
        if found is None:
            return _NoWay(_not_in_source(weight))
        if weight.copies_base and weight.base_copy(weight.base) is None:
            weight.copy_base(found)
    else:
        found = weight.base_copy(weight.base)
    if found is None:
        found = base_by_compensation(weight)
    if found is not None:
        return found
    if without_terms and weight.ledger.lost is None and weight.fingerprint().record() == weight.base.record():
        return "computed"  # W is the base: its steps were skipped, or at lr 0
    return None


def _way_without_bits(
    weight: WeightState, terms: Sequence[Term], method: str | None, is_overwritten: bool
) -> str | _NoWay:
    """Return "computed" or "hooks", or why neither will do, for a W whose exact base is not known."""
    ways = 'hand in the pristine weights, base_weights(source=...), or build the optimizer with keep_base="cpu"'
    lost = weight.ledger.lost
    if is_overwritten:
        return _NoWay(OVERWRITTEN, f": {ways}; or take W as it is as the base, rebase()")
    if method != "hooks" and weight.tensors.W.element_size() > 2:
        return "computed" if lost is None else _NoWay(lost, f"; or {ways}")
    if method == "copy":
        return _NoWay(SIXTEEN_BITS.format(weight.tensors.W.dtype), f': {ways}; or take method="hooks"')
    triple = weight.triple
    problem = lost or (output_problem(triple.weight_module(), triple.view, triple.tied) if terms else None)
    return "hooks" if problem is None else _NoWay(problem, f"; {ways}")


def _not_in_source(weight: WeightState) -> str:
    assert weight.base is not None
    return (
        f"no tensor of the source, taken as {weight.base.dtype}, is what this W of {tuple(weight.tensors.W.shape)} was "
        "before its first move: hand in the checkpoint that the fine-tuning began from, as the model stores it"
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
