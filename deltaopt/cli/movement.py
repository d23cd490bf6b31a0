"""How far each W had moved when a state was saved, by its ledgers and by what else the checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaopt.checkpoint.fingerprint import Fingerprint
from deltaopt.checkpoint.format import KEY, split_ledgers, split_record
from deltaopt.checkpoint.records import SavedLedger, factor_fingerprint
from deltaopt.cli.outcome import UserError, refusals
from deltaopt.layouts import LAYOUTS
from deltaopt.lowrank import Term
from deltaopt.messages import layers
from deltaopt.norms import norm_of, product_of

Key = tuple[tuple[int, ...], str, int]
"""Shape, dtype and hash of a tensor."""


OF_RECORD = {
    "ledgers": object,
    "weight_update": str,
    "step_count": int,
    "skipped_updates": int,
    "rounding_seed": int,
    "groups": list,
}
OF_GROUP = {"start_step": int, "update_ratio": float | int | None, "triples": list}
OF_TRIPLE = {"name": str, "scaling": float | int, "folded": float | int, "A": list, "B": list}
"""The entries of a state's record that are read, of its groups and of their triples, and their types."""


class Layer(NamedTuple):
    """One W and its branch when the state was saved.

    Attributes:
        name: of the triple.
        rank: of A and B.
        scaling: what the branch multiplied A @ B by, without a ratio that is folded into it.
        dtype: of W; None of one that could not be read (quantized, offloaded).
        moves: the number of steps that moved it; None if the state does not say.
        asked: the Frobenius norm of what it was asked to move by, in the branch where a ratio is folded; None if that
            is not known.
        relative: the same, divided by the norm of the base, or of the W in the checkpoint if the base is not there;
            None if neither is.
        folded: the update_ratio that is folded into the branch; 0.0 if none is.
        moved: True if W itself is another one than its base, so that A and B alone are another model.
        weight: how the checkpoint holds W: "moved", as its "base", or "absent".
        note: what else is to be said; empty if nothing.
    """

    name: str
    rank: int
    scaling: float
    dtype: str | None
    moves: int | None
    asked: float | None
    relative: float | None
    folded: float
    moved: bool
    weight: str
    note: str


class SavedWeight(NamedTuple):
    """What a state says of one W.

    Attributes:
        ledger: as saved.
        factors: the fingerprints of A and B; None where these were computed from other parameters.
    """

    ledger: SavedLedger
    factors: tuple[dict[str, Any], dict[str, Any]] | None


def record_of(state: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, SavedWeight]]:
    """Return our record in a state, and the weights by the names of the triples; none if their ledgers are left out.

    Args:
        state: as saved.
        where: names it in messages.

    Raises:
        UserError: for another schema, and where a ledger is missing or damaged.
    """
    for group in state["param_groups"]:
        _checked(group.get(KEY, {"schema": None}), {"schema": object}, where)
    with refusals(ValueError, prefix=f"{where}: "):
        record, inner = split_record(state)
        found, *_ = split_ledgers(inner, record["schema"])
    names = _checked_names(record, where)
    if not record["ledgers"]:
        return record, {}
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{where}: the ledger of {layers(missing)} is missing: whatever carried the state has dropped or cut the "
            "optimizer's `state`. Take another checkpoint"
        )
    return record, {name: _saved(found[name], name, where) for name in names}


def _checked_names(record: Any, where: str) -> list[str]:
    """Return the names of the triples.

    Raises:
        UserError: if an entry of the record that is read is missing, or something else than it was.
    """
    names = []
    for group in _checked(record, OF_RECORD, where)["groups"]:
        for triple in _checked(group, OF_GROUP, where)["triples"]:
            names.append(_checked(triple, OF_TRIPLE, where)["name"])
            for letter in "AB":
                if len(triple[letter]) < 2:
                    raise _damaged(where, f"shape of {letter}", triple[letter])
    return names


def _checked(entry: Any, kinds: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise _damaged(where, next(iter(kinds)), entry)
    for key, kind in kinds.items():
        if key not in entry or not isinstance(entry[key], kind):
            raise _damaged(where, key, entry.get(key))
    return entry


def _damaged(where: str, what: str, found: object) -> UserError:
    return UserError(
        f"{where}: the record of the run was edited or damaged: its {what} is {found!r}. Take another checkpoint"
    )


def are_factors_of(saved: Iterable[SavedWeight], tensors: Iterable[Tensor]) -> bool:
    """Tell if A and B of a weight, as saved, are among the tensors; True where the state does not say what they were.

    An export may hold the same B with another A. Of a folded weight the checkpoint holds A multiplied, so B decides.
    """
    saved = list(saved)
    known = [(weight.ledger.bits is not None, weight.factors) for weight in saved if weight.factors is not None]
    pairs = [(folded, _key(A), _key(B)) for folded, (A, B) in known]
    forms = {key[:2] for _, A, B in pairs for key in (A, B)}
    candidates = (each for each in tensors if (tuple(each.shape), str(each.dtype).removeprefix("torch.")) in forms)
    found = {key for tensor in candidates for key in _keys_of_factor(tensor, saved)}
    return not pairs or any(B in found and (folded or A in found) for folded, A, B in pairs)


def layers_of(
    record: dict[str, Any],
    saved: Mapping[str, SavedWeight],
    weights: Iterable[tuple[str, Tensor]],
    factors: Iterable[tuple[str, Tensor]],
    base: Iterable[tuple[str, Tensor]] = (),
) -> list[Layer]:
    """Return what is known of each W. Tensors are found by their contents, whatever their names.

    Args:
        record: of the state.
        saved: by the triples' names.
        weights: names and tensors of the checkpoint; each is read once.
        factors: those of its adapter.
        base: those of a pretrained model.
    """
    triples = [triple for group in record["groups"] for triple in group["triples"]]
    known = _Known(saved.values())
    for _, tensor in chain(factors, weights):
        known.look_at(tensor)
    known.here = set(known.norms)
    for _, tensor in base:
        known.look_at(tensor)
    return [_layer(triple, saved.get(triple["name"]), known) for triple in triples]


class _Known:
    """The tensors of a checkpoint that ledgers have noted the fingerprints of."""

    def __init__(self, saved: Iterable[SavedWeight]) -> None:
        saved = self._saved = list(saved)
        self._factors = {_key(record) for each in saved for record in each.factors or ()}
        self._weights = {_key(record) for each in saved for record in _records_of_weight(each.ledger).values()}
        self._factor_forms = {key[:2] for key in self._factors}
        self._weight_dtypes: dict[tuple[int, ...], set[str]] = {}
        for shape, dtype, _ in self._weights:
            self._weight_dtypes.setdefault(shape, set()).add(dtype)
        self.factors: dict[Key, Tensor] = {}
        self.norms: dict[Key, float] = {}
        """Of each W that was looked at."""
        self.here: set[Key] = set()
        """Those that the checkpoint holds."""

    @torch.no_grad()
    def look_at(self, tensor: Tensor) -> None:
        """Keep the tensor if it is a factor, and its norm if it is a W."""
        shape = tuple(tensor.shape)
        if (shape, str(tensor.dtype).removeprefix("torch.")) in self._factor_forms:
            self.factors |= dict.fromkeys(_keys_of_factor(tensor, self._saved) & self._factors, tensor)
        for dtype in self._weight_dtypes.get(shape, ()):
            W = tensor.to(getattr(torch, dtype))  # a base may be stored in another dtype than it trained in
            key = _key(Fingerprint(W).record())
            if key in self._weights:
                self.norms[key] = float(torch.linalg.vector_norm(W, dtype=torch.promote_types(W.dtype, torch.float32)))


@torch.no_grad()
def _layer(triple: dict[str, Any], weight: SavedWeight | None, known: _Known) -> Layer:
    rank, folded = int(triple["B"][-2]), float(triple["folded"])
    if weight is None:
        note = "the state was saved without its ledgers: how far W had moved is not known"
        return Layer(triple["name"], rank, triple["scaling"], None, None, None, None, folded, True, "absent", note)
    saved, factors = weight.ledger, _factors(triple, weight, known)
    of_weight = _displacement(saved, factors)
    asked = of_weight
    if folded and of_weight is not None:
        asked = None if factors is None else [*of_weight, Term(folded * triple["scaling"], *factors)]
    norm = _norm(asked)
    keys = {where: _key(record) for where, record in _records_of_weight(saved).items()}
    place = next((where for where, key in keys.items() if key in known.here), "absent")
    of_base = next((known.norms[key] for key in reversed(keys.values()) if key in known.norms), None)
    moved = saved.base is not None and _norm(of_weight) != 0.0
    return Layer(
        name=triple["name"],
        rank=rank,
        scaling=float(triple["scaling"]),
        dtype=None if saved.W is None else saved.W["dtype"],
        moves=saved.moves,
        asked=norm,
        relative=None if norm is None or not of_base else norm / of_base,
        folded=folded,
        moved=moved,
        weight="base" if place == "moved" and not moved else place,
        note=_note(weight, norm),
    )


def _records_of_weight(saved: SavedLedger) -> dict[str, dict[str, Any]]:
    """Return the fingerprints of W when it was saved, and of its base; those that are known."""
    base = None if saved.base is None else saved.base.record()
    return {where: record for where, record in (("moved", saved.W), ("base", base)) if record is not None}


def _note(weight: SavedWeight, asked: float | None) -> str:
    saved, notes = weight.ledger, []
    if saved.ledger.lost is not None:
        notes.append(saved.ledger.lost)
    elif asked is None and weight.factors is None:
        notes.append("A or B was computed from other parameters: optimizer.report() says how far W was asked to move")
    elif asked is None:
        notes.append("how far W was asked to move follows from A and B, which the checkpoint does not hold")
    if saved.rebased:
        notes.append("its base is what W was at rebase() or without_ledger(), and not the pristine one")
    if saved.overwritten is not None:
        notes.append("somebody else had written W: it was not its base + displacement")
    return "; ".join(notes)


def _factors(triple: dict[str, Any], weight: SavedWeight, known: _Known) -> tuple[Tensor, Tensor] | None:
    """Return A and B as they were saved, as (c, r) and (r, d) in float64; None if the checkpoint does not hold them."""
    if weight.factors is None:
        return None
    A, B = (known.factors.get(_key(record)) for record in weight.factors)
    if weight.ledger.bits is not None:  # the checkpoint holds A multiplied
        A = weight.ledger.bits
    if A is None or B is None:
        return None
    return _matrix(A, triple["A"], "A").to(torch.float64), _matrix(B, triple["B"], "B").to(torch.float64)


def _matrix(tensor: Tensor, shape: list[int], letter: str) -> Tensor:
    """View a factor as the matrix of this shape, or as the stack of them."""
    if list(tensor.shape) == shape:
        return tensor
    layout = LAYOUTS["experts" if len(shape) == 3 else "conv"]
    stack = torch.empty(shape[0], device="meta")
    return layout.left(tensor, stack) if letter == "A" else layout.right(tensor, stack)


def _displacement(saved: SavedLedger, factors: tuple[Tensor, Tensor] | None) -> list[Term] | None:
    """Return the terms of what W itself was asked to move by; None if they are not known."""
    ledger = saved.ledger
    if ledger.lost is not None or (saved.end_is_live and ledger.coef != 0 and factors is None):
        return None
    terms = [term.to(torch.device("cpu"), torch.float64) for term in ledger.terms]
    end = factors if saved.end_is_live else ledger.end
    if end is not None and ledger.coef != 0:
        terms.append(Term(ledger.coef, end[0].to(torch.float64), end[1].to(torch.float64)))
    return terms


def _norm(terms: list[Term] | None) -> float | None:
    """Return the Frobenius norm of a sum of terms that were saved in float32; None if they are not known."""
    return None if terms is None else norm_of(product_of(terms), eps=torch.finfo(torch.float32).eps)


def _saved(record: Any, name: str, where: str) -> SavedWeight:
    try:
        factors = record["A"], record["B"]
        return SavedWeight(SavedLedger(record), factors if all(isinstance(each, dict) for each in factors) else None)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{where}: the ledger of {name} is damaged or incomplete: {error!r}") from error


def _key(record: dict[str, Any]) -> Key:
    return tuple(record["shape"]), record["dtype"], record["hash"]


def _keys_of_factor(tensor: Tensor, saved: Sequence[SavedWeight]) -> set[Key]:
    """Return the key of a factor as each of the ledgers would hold it."""
    return {_key(factor_fingerprint(tensor, hashed).record()) for hashed in {each.ledger.whole_hash for each in saved}}
