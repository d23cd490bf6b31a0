"""Resuming: after a checkpoint was loaded, W is left alone, rebuilt from its ledger, or refused.

Some tools save the whole model and some the adapter alone. Only W itself tells which.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaopt.all_or_nothing import call_the_rest
from deltaopt.checkpoint.compensation import is_compensation, loaded_compensation, saved_shape
from deltaopt.checkpoint.records import PACKED, SavedLedger, factor_fingerprint, unreadable, weight_records
from deltaopt.messages import Problem, layers, problems_of, raise_problems
from deltaopt.overwritten import base_samples
from deltaopt.rounding.blocks import cut_off
from deltaopt.rounding.writer import Writer, add_terms_, put_
from deltaopt.sharding import gathered, local_part, put_whole_, summed_over_ranks
from deltaopt.stored_factors import raw_form, stored_form
from deltaopt.weight import Compensation, WeightState

_rebuilt_for: dict[int, int] = {}
"""Hash of all of a W that was rebuilt -> the hash that was saved of the one it was rebuilt for. They differ by
rounding, so this is how a second load of the same state knows it. Facts about contents, hence for the process."""


LOAD_IN_ITS_FORMAT = "load the base in the format it was trained in"


class WeightMismatchError(ValueError):
    """The weights of the model are not those that a loaded optimizer state belongs to.

    Nothing was changed. The message names the layers, and what to do.
    """


class Resumption(NamedTuple):
    """The effect of loading a state on one W: it is rebuilt from its ledger, on a base, or left alone.

    A W that is left alone gets the compensation of its rounding that was saved, if one was. `done` and `written` have
    an entry for each part of it that was carried out. An A that is there as a state_dict of the model has it gets the
    bits of the saved run.
    """

    weight: WeightState
    saved: SavedLedger
    rebuild: bool
    base: Tensor | None
    compensation: Tensor | None
    done: list[Any]
    written: list[Any]

    @torch.no_grad()
    def carry_out(self, writer: Writer) -> None:
        """Give the weight its saved ledger, and let `writer` rebuild W if need be.

        May be called again after an exception.
        """
        weight = self.weight
        if self.saved.bits is not None:
            put_whole_(weight.tensors.stored[0], self.saved.bits)
        calls: list[Callable[[], Any]] = [partial(self.saved.give_to, weight)]
        if self.rebuild and self.base is None:
            calls.insert(0, weight.copy_base)  # W is the base
        elif self.base is not None:
            calls.append(partial(put_, weight, self.base))
        call_the_rest(self.done, calls)
        if self.rebuild:
            weight.note_write()
            writer.add_terms_(weight, weight.displacement(), self.written)
            note_rebuilt(weight, self.saved)
        elif self.compensation is not None and self._keeps_compensation(writer):
            weight.writable_compensation(weight.part()).copy_(self.compensation)
        if weight.moved:
            weight.triple.weight_moves()
        else:
            weight.triple.weight_rests()

    def _keeps_compensation(self, writer: Writer) -> bool:
        """Tell if something may have been cut off from W: it was written in the saved run, and is as it was rounded."""
        is_compensated = writer.rounding.of(self.weight.tensors.W.dtype) == "compensated"
        return is_compensated and self.weight.base is not None

    def note_base_sample(self, present: Tensor | None) -> None:
        """Note what tells later if somebody else writes W, or had done so in the saved run; last of all.

        Args:
            present: the sample of the base that W shows now.
        """
        known = None if self.rebuild or self.saved.overwritten is None else self.saved.overwritten.base
        self.weight.base_sample = present if known is None else known


def note_rebuilt(weight: WeightState, saved: SavedLedger) -> None:
    """Let a later load of the same state know a W that was moved to where it was saved, up to rounding.

    Not where that is the base: the load would take the rounded one as the base.
    """
    if saved.W is not None and saved.base is not None:
        _rebuilt_for[weight.whole_hash()] = _saved_hash(saved)


def plan(
    weights: Sequence[WeightState], records: Mapping[str, Any], compensations: Mapping[str, Tensor]
) -> list[Resumption]:
    """Compare each W, A and B with the fingerprints that were saved, and decide; changes nothing.

    Args:
        weights: as registered now, with their tensors resolved.
        records: of the saved ledgers, by the triples' names.
        compensations: that were saved, by the triples' names, of which `forms_of_compensations` raises nothing.

    Raises:
        ValueError: if the ledger of a triple is missing or damaged.
        WeightMismatchError: if a W is neither what it was when the state was saved nor what it was before its
            first move, if a factor is not what was saved, or if W would have to be rebuilt and cannot be.
    """
    ledgers = saved_ledgers(weights, records)
    decided: list[Resumption] = []
    problems: list[Problem] = []
    for weight, W, saved in zip(weights, weight_records(weights), ledgers, strict=True):
        kept = compensations.get(weight.label)
        compensation = None if kept is None else loaded_compensation(weight, kept)
        resumption, found = _decide(weight, W, saved, compensation)
        decided.append(resumption)
        problems += problems_of(weight.label, found)
    raise_problems(
        WeightMismatchError,
        "the model's weights do not belong to this optimizer state (nothing was changed)",
        problems,
        "Load the model's weights (at least A, B and what else trained, onto the base that was fine-tuned) of "
        "the same checkpoint before the optimizer's state. If the weights were changed on purpose, load "
        "deltaopt.without_ledger(state), which takes W as it is now as the new base. An optimizer with keep_base "
        "goes back to adapters of its own run without their base being loaded",
    )
    return decided


def forms_of_compensations(weights: Sequence[WeightState], compensations: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the name and the form of each saved compensation, which has to be the same on all ranks.

    Args:
        weights: as registered now, with their tensors resolved.
        compensations: that were saved, by the triples' names.

    Raises:
        ValueError: if one does not fit its W.
    """
    forms = []
    for weight in weights:
        kept = compensations.get(weight.label)
        if kept is None:
            continue
        found = f"{kept.dtype} of shape {tuple(kept.shape)}" if isinstance(kept, Tensor) else repr(kept)
        if not is_compensation(weight, kept):
            shape = saved_shape(weight)
            raise ValueError(
                f"{weight.label}: its saved compensation is damaged, expected torch.uint8 of shape {(*shape, 2)} (or, "
                f"of an earlier version, torch.int16 of shape {shape}), got {found}. Take another checkpoint, or load "
                "deltaopt.without_compensation(state)"
            )
        forms.append((weight.label, f"{found} as {getattr(kept, 'placements', None)}"))
    return forms


def saved_ledgers(weights: Sequence[WeightState], records: Mapping[str, Any]) -> list[SavedLedger]:
    """Return the saved ledger of each weight.

    Args:
        weights: as registered now, with their tensors resolved.
        records: of the saved ledgers, by the triples' names.

    Raises:
        ValueError: if the ledger of a triple is missing or damaged.
    """
    missing = [weight.label for weight in weights if weight.label not in records]
    if missing:
        raise ValueError(
            f"the state has no ledger for {layers(missing)}: whatever carried it has dropped or cut the optimizer's "
            "`state`. Save optimizer.state_dict() as it is, or load without_ledger(state), which takes W as it is now "
            "as the base"
        )
    return [_parsed(weight, records[weight.label]) for weight in weights]


def carry_out(decided: Sequence[Resumption], writer: Writer) -> list[str]:
    """Do what was decided; return the labels of the weights whose compensation is not known.

    May be called again after an exception.
    """
    for resumption in decided:
        resumption.carry_out(writer)
    missing = _compensate([resumption.weight for resumption in decided if not resumption.rebuild], writer)
    samples = base_samples([resumption.weight for resumption in decided])
    for resumption, sample in zip(decided, samples, strict=True):
        resumption.note_base_sample(sample)
    return missing


@torch.no_grad()
def rescaled_factors(
    weights: Sequence[WeightState], branches: Sequence[Mapping[str, Any]]
) -> list[tuple[WeightState, Tensor]]:
    """Return each A that changes as its branch gets the saved scaling; its present values are for the present scaling.

    Args:
        weights: as registered now, with their tensors resolved.
        branches: for each, the saved scaling and what is folded.
    """
    found = []
    for weight, branch in zip(weights, branches, strict=True):
        triple = weight.triple
        factor = triple.stored_factor / triple.stored_factor_at(branch["scaling"] * (1.0 + branch["folded"]))
        if factor != 1.0:
            found.append((weight, stored_form(gathered(weight.tensors.stored[0]).detach(), factor)))
    return found


def unfinished(decided: Sequence[Resumption]) -> list[str]:
    """Return the labels of the weights that have to be rebuilt and were not yet."""
    return [resumption.weight.label for resumption in decided if resumption.rebuild and not resumption.written]


def warn(decided: Sequence[Resumption], uncompensated: list[str], writer: Writer) -> None:
    """Warn of what is not as it was in the saved run; last, as a warning may be made an error."""
    if uncompensated:
        warnings.warn(
            f"the state does not hold the part of the 16-bit W of {layers(uncompensated)} that compensated "
            "rounding had cut off, and without a copy of the base (keep_base) that part cannot be computed: it starts "
            "at zero, and W continues from its bits",
            RuntimeWarning,
            stacklevel=3,
        )
    _warn_of_what_was_not_compared(decided)
    _warn_of_what_was_done(decided, writer)
    _warn_of_bases_not_kept([resumption.weight for resumption in decided])


def _compensate(left_alone: Sequence[WeightState], writer: Writer) -> list[str]:
    """Recompute compensations that the checkpoint does not hold; return the labels of those that cannot be."""
    missing = []
    for weight in left_alone:
        part = weight.part()
        if writer.rounding.of(part.dtype) != "compensated" or weight.base is None or weight.compensation is not None:
            continue
        base = weight.base_copy(weight.base) if weight.ledger.lost is None else None
        if base is None:
            missing.append(weight.label)
            continue
        full = base.to(part.device, torch.float32, copy=True)
        add_terms_(weight, full, weight.displacement())
        weight.compensation = Compensation(cut_off(part, full), part.dtype)
    return missing


def _warn_of_what_was_not_compared(decided: Sequence[Resumption]) -> None:
    """Say where an earlier version could not read W and did not say why, which may be that it was quantized."""
    unknown = [r.weight for r in decided if r.saved.W is None and r.saved.unreadable is None]
    readable = [weight.label for weight in unknown if not weight.weight_problems()]
    if readable:
        warnings.warn(
            f"the W of {layers(readable)} could not be read when the state was saved (it was sharded, quantized or "
            "offloaded), so it was not compared with the one that is there: see that it is the base that was "
            "fine-tuned, in the format it was trained in",
            RuntimeWarning,
            stacklevel=4,
        )


def _warn_of_what_was_done(decided: Sequence[Resumption], writer: Writer) -> None:
    """Say where W was neither what was saved nor the base, and where it was rebuilt from less than it was made of."""
    others = [r.weight.label for r in decided if r.rebuild and r.saved.overwritten is not None]
    if others:
        warnings.warn(
            f"the W of {layers(others)} was not base + displacement when the state was saved: somebody else had "
            "written it (an average was copied in, or it was pruned), and the state does not hold that. It was rebuilt "
            "as base + displacement, which is another weight. Load the whole model of that checkpoint; or call "
            "rebase() after such changes, and save the whole model then",
            RuntimeWarning,
            stacklevel=4,
        )
    replaced = [r.weight.label for r in decided if r.base is not None]
    if replaced:
        warnings.warn(
            f"the W of {layers(replaced)} was neither what it was when the state was saved nor its base: it was "
            "rebuilt on the copy that keep_base had kept. What else had changed it is gone",
            RuntimeWarning,
            stacklevel=4,
        )
    rounded = [
        r.weight.label
        for r in decided
        if r.rebuild
        and (dtype := r.weight.tensors.W.dtype).itemsize == 2
        and writer.rounding.of(dtype) != "compensated"
    ]
    if rounded:
        warnings.warn(
            f"the 16-bit W of {layers(rounded)} was rebuilt as base + displacement, rounded once. The saved run had "
            "rounded after each step, so W differs slightly from what it was: save the whole model to resume exactly",
            RuntimeWarning,
            stacklevel=4,
        )


def _warn_of_bases_not_kept(weights: Sequence[WeightState]) -> None:
    missing = [w.label for w in weights if w.copies_base and w.base is not None and w.base_copy(w.base) is None]
    if missing:
        warnings.warn(
            f"keep_base: the W of {layers(missing)} had moved before this optimizer was built, so the base could not "
            "be kept. Hand in the pristine weights once, base_weights(source=...): they are kept then",
            RuntimeWarning,
            stacklevel=4,
        )


def _parsed(weight: WeightState, record: Any) -> SavedLedger:
    try:
        saved = SavedLedger(record)
        _check_shapes(saved, [list(factor.shape) for factor in weight.factors()])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{weight.label}: its saved ledger is damaged or incomplete: {error!r}") from error
    return saved


def _check_shapes(saved: SavedLedger, expected: list[list[int]]) -> None:
    (*lead, c, _), (*_, d) = expected
    terms = saved.ledger.terms + ([saved.origin] if saved.origin is not None else [])
    pairs = [(term.A, term.B) for term in terms] + ([saved.ledger.end] if saved.ledger.end is not None else [])
    for A, B in pairs:
        if [*A.shape[:-1]] != [*lead, c] or [*B.shape[:-2], B.shape[-1]] != [*lead, d] or A.shape[-1] != B.shape[-2]:
            raise ValueError(f"a term of {tuple(A.shape)} and {tuple(B.shape)} for a weight of {(*lead, c, d)}")
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError("a term that is not finite")


@torch.no_grad()
def factor_problems(weight: WeightState, saved: SavedLedger) -> list[str]:
    """Say which of A and B, or of their parameters, are not those that were saved."""
    found, names, parameters = [], weight.triple.parameter_names, weight.tensors.stored
    if len(parameters) != len(saved.now):
        return [f"A and B are made of {len(parameters)} parameters, and were of {len(saved.now)} in the saved run"]
    for place, (name, parameter, then) in enumerate(zip(names, parameters, saved.now, strict=True)):
        parameter = _as_saved(gathered(parameter).detach(), then["dtype"])
        here = factor_fingerprint(parameter, saved.whole_hash).record()
        if here != then and not (place == 0 and _is_stored_form(parameter, weight, saved)):
            found.append(f"{name} {_difference(here, then)}")
    return found


@torch.no_grad()
def _decide(
    weight: WeightState, W: dict[str, Any] | None, saved: SavedLedger, compensation: Tensor | None
) -> tuple[Resumption, list[str]]:
    """Return what to do with a W of this record, and why it cannot be done."""
    found = factor_problems(weight, saved)
    ledger = saved.ledger
    if W is None or saved.W is None:
        return _left_alone(weight, saved, None), found + _unread_problems(weight, W, saved)
    part = weight.part()
    match = _what_is_there(weight, W, saved)
    if match == "rebuilt":  # in other bits than were saved, by this optimizer if it knows what it cut off
        compensation = weight.known_compensation(part)
    if match is not None:
        return _left_alone(weight, saved, compensation), found
    problem, base = None, None
    if saved.base is None:
        problem = _difference(W, saved.W)
    elif saved.base.record() != W:
        problem = f"{_difference(W, saved.W)}, and not what it was before its first move either"
        moved_from_it = weight.base is not None and weight.base.record() == saved.base.record()
        if moved_from_it and W["dtype"] == saved.base.dtype:
            base = weight.base_copy(saved.base)
            problem = problem if base is None else None
    elif saved.whole is not None and weight.moved:
        problem = (
            "has moved in this process in few places, so that its fingerprint does not tell whether it is its base: "
            "load the state in a new process, or the whole model with it"
        )
    found += [f"W {problem}"] if problem is not None else []
    if ledger.lost is not None:
        found.append(f"W cannot be moved from its base to where it was: {ledger.lost}")
    return Resumption(weight, saved, True, base, None, [], []), found


def _is_stored_form(A: Tensor, weight: WeightState, saved: SavedLedger) -> bool:
    """Tell if this is the saved A as a state_dict has it, or as a branch that is scaled now has taken it from one."""
    if saved.bits is None or saved.bits.shape != A.shape or saved.bits.dtype != A.dtype:
        return False
    factor = weight.triple.stored_factor
    stored = stored_form(saved.bits.to(A.device), saved.stored)
    return torch.equal(stored_form(A, factor), stored) or torch.equal(raw_form(stored, factor), A)


def _left_alone(weight: WeightState, saved: SavedLedger, compensation: Tensor | None) -> Resumption:
    return Resumption(weight, saved, False, None, compensation, [], [])


def _what_is_there(weight: WeightState, W: dict[str, Any], saved: SavedLedger) -> str | None:
    """Tell if W, with this fingerprint, is the one "saved", or one "rebuilt" for it before; None if neither."""
    assert saved.W is not None
    if any(W[key] != saved.W[key] for key in ("shape", "dtype")):
        return None
    if saved.whole is None and W["hash"] == saved.W["hash"]:
        return "saved"
    if saved.whole is not None and weight.whole_hash(saved.whole_hash) == saved.whole:
        return "saved"
    return "rebuilt" if _was_rebuilt_for(weight, saved) else None


def _was_rebuilt_for(weight: WeightState, saved: SavedLedger) -> bool:
    """Tell if this process has moved W to where it is, for the one that was saved; of a sharded W all ranks have to."""
    if weight.piece is None:
        return bool(_rebuilt_for) and _rebuilt_for.get(weight.whole_hash()) == _saved_hash(saved)
    known = _rebuilt_for.get(weight.whole_hash()) == _saved_hash(saved)
    W = weight.tensors.W
    [others] = summed_over_ranks([torch.tensor(int(not known), device=local_part(W).device)], [W])
    return not int(others)


def _saved_hash(saved: SavedLedger) -> int:
    assert saved.W is not None
    return int(saved.W["hash"]) if saved.whole is None else saved.whole


def _unread_problems(weight: WeightState, W: dict[str, Any] | None, saved: SavedLedger) -> list[str]:
    """Say why a W that cannot be read, or could not when the state was saved, is not taken for the one that was saved.

    One that was never written and is only sharded or elsewhere is taken: nothing has to be done to it.
    """
    if W is None and saved.W is None:
        return []
    written = "was written in the saved run, so that its contents have to be compared: "
    if W is None:
        [problem, *_], form = weight.weight_problems(), unreadable(weight)
        assert saved.W is not None
        if form != PACKED and saved.base is None:
            dtype = str(weight.tensors.W.dtype).removeprefix("torch.")
            return [] if dtype == saved.W["dtype"] else [f"W {_difference({**saved.W, 'dtype': dtype}, saved.W)}"]
        way_out = LOAD_IN_ITS_FORMAT if form == PACKED else written + "resume where it can be read"
        return [f"W cannot be read now ({problem}) and could when the state was saved: {way_out}"]
    if saved.unreadable != PACKED and saved.base is None:
        return []
    form = saved.unreadable or "sharded, quantized or offloaded"
    way_out = LOAD_IN_ITS_FORMAT if saved.unreadable == PACKED else written + "resume in the form in which it was saved"
    return [f"W can be read now (it was {form}) and could not when the state was saved: {way_out}"]


def _as_saved(factor: Tensor, dtype: str) -> Tensor:
    """Cast a factor to the dtype it was saved from, if no number changes; PEFT loads 16-bit adapters in float32."""
    cast = factor.to(getattr(torch, dtype))
    return cast if torch.equal(cast.to(factor.dtype), factor) else factor


def _difference(here: dict[str, Any], saved: dict[str, Any]) -> str:
    differing = [key for key in ("shape", "dtype") if here[key] != saved[key]]
    if differing:
        return " and ".join(f"has the {key} {here[key]}, saved was {saved[key]}" for key in differing)
    return "has other contents than when the state was saved"
