"""Where W has to be after a checkpoint was loaded: leave it, rebuild it from the ledger, or refuse.

Some tools save the whole model and some the adapter alone; there is no other way to tell than to look at W.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from deltaopt.distributed import gathered
from deltaopt.fingerprint import Fingerprint, whole_hash
from deltaopt.ledger import Ledger, SavedLedger, displacement_of, factor_fingerprint, weight_record
from deltaopt.triple import LoRATriple
from deltaopt.writing import Write

_rebuilt_for: dict[int, int] = {}
"""Hash of all of a W that was rebuilt -> the hash that was saved of the one it was rebuilt for. They differ by
rounding, so this is how a second load of the same state knows it. Facts about contents, hence for the process."""


class WeightMismatchError(ValueError):
    """The weights of the model are not those that a loaded optimizer state belongs to.

    Nothing was changed. The message names the layers, and what to do.
    """


FindBase: TypeAlias = Callable[[LoRATriple, Fingerprint], Tensor | None]
"""A triple and the fingerprint of its base -> a copy of that base, if one is kept."""


class Resumption(NamedTuple):
    """What loading a state does to one triple: its ledger, whether W is rebuilt from it, and on which base.

    A W that is left alone gets the compensation of its rounding that was saved, if one was.
    """

    triple: LoRATriple
    saved: SavedLedger
    rebuild: bool
    base: Tensor | None = None
    compensation: Tensor | None = None

    @torch.no_grad()
    def carry_out(self, write: Write) -> Ledger:
        """Let `write` rebuild W if need be; returns the ledger to go on with."""
        ledger, part = self.saved.placed(self.triple), self.triple.moved_part(self.triple.W)
        if self.rebuild:
            if self.base is not None:
                part.copy_(self.base)
            write.terms_(self.triple, ledger, displacement_of(self.triple, ledger))
            _rebuilt_for[whole_hash(part)] = _saved_hash(self.saved)
        elif self.compensation is not None and write.rounding.of(part.dtype) == "compensated":
            ledger.kept_compensation(part).copy_(self.compensation)
        return ledger


def plan(
    triples: Sequence[LoRATriple],
    ledgers: Sequence[Ledger],
    records: Mapping[str, Any],
    compensations: Mapping[str, Tensor],
    find_base: FindBase,
) -> list[Resumption]:
    """Compare each W, A and B with the fingerprints that were saved, and decide; changes nothing.

    Args:
        triples: as registered now.
        ledgers: of these, as they are now.
        records: of the saved ledgers, by the triples' names.
        compensations: that were saved, by the triples' names.
        find_base: what the base is taken from where W was moved from it by this optimizer.

    Raises:
        ValueError: if the ledger of a triple is missing or damaged.
        WeightMismatchError: if a W is neither what it was when the state was saved nor what it was before its
            first move, if a factor is not what was saved, or if W would have to be rebuilt and can not be.
    """
    missing = [t.label for t in triples if t.label not in records]
    if missing:
        raise ValueError(
            f"the state has no ledger for {', '.join(missing)}: whatever carried it has dropped or cut the optimizer's "
            "`state`. Save optimizer.state_dict() as it is, or load without_ledger(state), which takes W as it is now "
            "as the base"
        )
    decided, found = [], []
    for triple, present in zip(triples, ledgers, strict=True):
        saved = _parsed(triple, records[triple.label])
        kept = _checked_compensation(triple, compensations.get(triple.label))
        resumption, problems = _decide(triple, present, saved, kept, find_base)
        decided.append(resumption)
        found += [f"{triple.label}: {problem}" for problem in problems]
    if found:
        raise WeightMismatchError(
            "the model's weights do not belong to this optimizer state (nothing was changed):\n  "
            + "\n  ".join(found)
            + "\nLoad the model's weights (at least A, B and what else trained, onto the base that was fine-tuned) of "
            "the same checkpoint before the optimizer's state. If the weights were changed on purpose, load "
            "deltaopt.without_ledger(state), which takes W as it is now as the new base. An optimizer with keep_base "
            "goes back to adapters of its own run without their base being loaded"
        )
    return decided


def warn_of_what_was_done(decided: Sequence[Resumption], write: Write) -> None:
    """Say where W was not what was saved nor the base, and where 16 bits were rebuilt: roundings are in no ledger."""
    replaced = [r.triple.label for r in decided if r.base is not None]
    if replaced:
        warnings.warn(
            f"the W of {len(replaced)} layers ({replaced[0]}, ..) was neither what it was when the state was saved nor "
            "its base: it was rebuilt on the copy that keep_base had kept. What else had changed it is gone",
            RuntimeWarning,
            stacklevel=4,
        )
    in_steps = [r.triple for r in decided if r.rebuild and r.triple.W.element_size() == 2]
    rounded = [triple.label for triple in in_steps if write.rounding.of(triple.W.dtype) != "compensated"]
    if rounded:
        warnings.warn(
            f"the 16-bit W of {len(rounded)} layers ({rounded[0]}, ..) was rebuilt as base + displacement, rounded "
            "once. The saved run had rounded after each step, so W is not quite what it was: save the whole model to "
            "resume exactly",
            RuntimeWarning,
            stacklevel=4,
        )


def _parsed(triple: LoRATriple, record: Any) -> SavedLedger:
    try:
        saved = SavedLedger(record)
        expected = [list(factor.shape) for factor in triple.factor_matrices(triple.stored())]
        _check_shapes(saved.ledger, expected)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{triple.label}: its saved ledger is damaged or incomplete: {error!r}") from error
    return saved


def _check_shapes(ledger: Ledger, expected: list[list[int]]) -> None:
    (*lead, c, _), (*_, d) = expected
    terms = ledger.terms + ([ledger.origin] if ledger.origin is not None else [])
    pairs = [(term.A, term.B) for term in terms] + ([ledger.end] if ledger.end is not None else [])
    for A, B in pairs:
        if [*A.shape[:-1]] != [*lead, c] or [*B.shape[:-2], B.shape[-1]] != [*lead, d] or A.shape[-1] != B.shape[-2]:
            raise ValueError(f"a term of {tuple(A.shape)} and {tuple(B.shape)} for a weight of {(*lead, c, d)}")
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError("a term that is not finite")


def _checked_compensation(triple: LoRATriple, kept: Any) -> Tensor | None:
    if kept is None:
        return None
    shape = triple.moved_part(triple.W).shape
    if isinstance(kept, Tensor) and kept.dtype == torch.int16 and kept.shape == shape:
        return kept
    told = f"{kept.dtype} of shape {tuple(kept.shape)}" if isinstance(kept, Tensor) else repr(kept)
    raise ValueError(
        f"{triple.label}: its saved compensation is damaged, expected torch.int16 of shape {tuple(shape)}, got {told}. "
        "Take another checkpoint, or load deltaopt.without_compensation(state)"
    )


@torch.no_grad()
def _decide(
    triple: LoRATriple, present: Ledger, saved: SavedLedger, compensation: Tensor | None, find_base: FindBase
) -> tuple[Resumption, list[str]]:
    """(what to do, why it can not be done)."""
    stored = triple.stored()
    found = []
    for letter in "AB":
        factor = _as_saved(gathered(getattr(stored, letter)).detach(), saved.now[letter]["dtype"])
        here = factor_fingerprint(factor).record()
        if here != saved.now[letter]:
            found.append(f"{letter} {_told(here, saved.now[letter])}")
    W, ledger = weight_record(triple, stored), saved.ledger
    if W is None or saved.W is None:
        return Resumption(triple, saved, rebuild=False), found + _format_problems(W, saved)
    part = triple.moved_part(stored.W)
    match = _what_is_there(part, W, saved)
    if match == "rebuilt":  # in other bits than were saved, by this optimizer if it knows what it cut off
        compensation = present.compensation_of(part)
    if match is not None:
        return Resumption(triple, saved, rebuild=False, compensation=compensation), found
    problem, base = None, None
    if ledger.base is None:
        problem = _told(W, saved.W)
    elif ledger.base.record() != W:
        problem = f"{_told(W, saved.W)}, and not what it was before its first move either"
        moved_from_it = present.base is not None and present.base.record() == ledger.base.record()
        if moved_from_it and W["dtype"] == ledger.base.dtype:
            base = find_base(triple, ledger.base)
            problem = problem if base is None else None
    elif saved.whole is not None and present.moved:
        problem = (
            "has moved in this process in few places, so that its fingerprint does not tell whether it is its base: "
            "load the state in a new process, or the whole model with it"
        )
    found += [f"W {problem}"] if problem is not None else []
    if ledger.lost is not None:
        found.append(f"W can not be moved from its base to where it was: {ledger.lost}")
    return Resumption(triple, saved, rebuild=True, base=base), found


def _what_is_there(part: Tensor, W: dict[str, Any], saved: SavedLedger) -> str | None:
    """Whether W, with this fingerprint, is the one that was "saved", or was "rebuilt" for it before, or neither."""
    assert saved.W is not None
    if any(W[key] != saved.W[key] for key in ("shape", "dtype")):
        return None
    if saved.whole is None and W["hash"] == saved.W["hash"]:
        return "saved"
    if saved.whole is None and not _rebuilt_for:
        return None
    whole = whole_hash(part)
    if whole == saved.whole:
        return "saved"
    return "rebuilt" if _rebuilt_for.get(whole) == _saved_hash(saved) else None


def _saved_hash(saved: SavedLedger) -> int:
    assert saved.W is not None
    return int(saved.W["hash"]) if saved.whole is None else saved.whole


def _format_problems(W: dict[str, Any] | None, saved: SavedLedger) -> list[str]:
    """Of a W that could not be read when the state was saved, or can not now: both, and never moved, is as it was."""
    if W is None and saved.W is None:
        return []
    here, then = ("can not be read", "could") if W is None else ("can be read", "could not")
    return [
        f"W {here} now (quantized or offloaded weights can not) and {then} when the state was saved: load the base in "
        "the format it was trained in"
    ]


def _as_saved(factor: Tensor, dtype: str) -> Tensor:
    """A factor in the dtype it was saved from, if that is the same number; PEFT loads 16-bit adapters in float32."""
    cast = factor.to(getattr(torch, dtype))
    return cast if torch.equal(cast.to(factor.dtype), factor) else factor


def _told(here: dict[str, Any], saved: dict[str, Any]) -> str:
    differing = [key for key in ("shape", "dtype") if here[key] != saved[key]]
    if differing:
        return " and ".join(f"has the {key} {here[key]}, saved was {saved[key]}" for key in differing)
    return "has other contents than when the state was saved"
