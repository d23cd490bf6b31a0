"""Records: what a checkpoint keeps of each W's ledger, as plain numbers and strings, and back."""

from __future__ import annotations

import base64
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deltaopt.checkpoint.fingerprint import Fingerprint, numbered_blocks_hash, whole_hash
from deltaopt.factors import Computed
from deltaopt.groups import checked_count
from deltaopt.ledger import Ledger
from deltaopt.lowrank import Term
from deltaopt.overwritten import Difference, overwriting
from deltaopt.sharding import gathered, is_sharded
from deltaopt.tensors import FLOATS, offload_problems
from deltaopt.triple import LoRATriple
from deltaopt.weight import WeightState, fingerprints

IDENTITY = "(identity)"
"""Stands for the numbers of an identity matrix, next to a ledger's dense one; no base64."""


SHARDED, ELSEWHERE, PACKED = "sharded", "offloaded", "packed"
"""Why a W could not be read. The numbers of a packed one are not those of the weight that it was made of."""

HASHING = 2
WHOLE_HASHES = {1: numbered_blocks_hash, HASHING: whole_hash}
"""How all of a tensor is hashed, by what a record says; states of schema 4 and 5 say nothing, which is 1."""


def triple_record(triple: LoRATriple, A: Tensor, B: Tensor) -> dict[str, Any]:
    """Return what a checkpoint keeps of a triple to know it again.

    Args:
        triple: as registered.
        A: its factor as a (c, r) matrix.
        B: its factor as a (r, d) matrix.
    """
    return {
        "name": triple.label,
        "A": list(A.shape),
        "B": list(B.shape),
        **branch_record(triple),
    }


def branch_record(triple: LoRATriple) -> dict[str, Any]:
    """Return what a triple's branch multiplies A @ B by: its scaling, and the update_ratio that is folded into it.

    With them goes the factor of A in a state_dict of its module.
    """
    return {"scaling": triple.scaling, "folded": triple.folded, "stored": triple.stored_factor}


def ledger_records(weights: Sequence[WeightState]) -> Iterator[dict[str, Any]]:
    """Yield the ledger of each W with the fingerprints of this moment. Waits for the device.

    `SavedLedger` makes the ledger of it again.
    """
    for weight, now, difference in zip(weights, weight_records(weights), overwriting(weights), strict=True):
        yield _ledger_record(weight, now, difference)


def _ledger_record(weight: WeightState, now: dict[str, Any] | None, difference: Difference | None) -> dict[str, Any]:
    ledger = weight.placed_ledger()
    if ledger.is_matrix:
        ledger.sum_up()  # the terms that wait to be added to it would be saved next to it
    # W may have moved in places that the sample misses: a few rows of an embedding, or in 16 bits.
    hides = weight.base is not None and weight.base.record() == now
    return {
        "coef": ledger.coef,
        "terms": [] if ledger.lost else [_term_record(term) for term in ledger.terms if not term.is_zero()],
        "end": _end_record(weight, ledger),
        **({"current": ledger.is_current()} if weight.triple.follows_between_steps else {}),
        "origin": None if weight.origin is None else _term_record(weight.origin),
        "lost": ledger.lost,
        "rebased": weight.rebased,
        "moves": weight.moves,
        "folded_since": weight.folded_since,
        "base": None if weight.base is None else weight.base.record(),
        "W": now,
        "unreadable": None if now is not None else unreadable(weight),
        "hashing": HASHING,
        "overwritten": _difference_record(difference),
        "whole": weight.whole_hash() if hides else None,
        "A": _factor_record(weight.tensors.left),
        # A state_dict of the model gives A multiplied and rounded.
        "bits": _tensor_record(gathered(weight.tensors.stored[0])) if weight.triple.stores_A else None,
        "stored": weight.triple.stored_factor,
        "B": _factor_record(weight.tensors.right),
    }


def weight_records(weights: Sequence[WeightState]) -> list[dict[str, Any] | None]:
    """Return what a checkpoint keeps to know each W again; None of one that cannot be read (quantized, offloaded)."""
    readable = [weight for weight in weights if not weight.weight_problems()]
    found = dict(zip(readable, fingerprints(readable), strict=True))
    return [found[weight].record() if weight in found else None for weight in weights]


def unreadable(weight: WeightState) -> str:
    """Return what sort of W cannot be read: `SHARDED`, `ELSEWHERE` or `PACKED`."""
    W, module = weight.tensors.W, weight.triple.weight_module()
    if is_sharded(W) or hasattr(W, "ds_id"):
        return SHARDED
    return ELSEWHERE if W.is_meta or (module is not None and offload_problems(module)) else PACKED


def factor_fingerprint(factor: Tensor, hashed: Callable[[Tensor], int] = whole_hash) -> Fingerprint:
    """Take the fingerprint of a factor, of all of it, hashed as states of this version hold it or as `hashed` does."""
    return Fingerprint(gathered(factor), hashed)


def _factor_record(factor: Tensor | Computed) -> Any:
    """Return the fingerprint of a factor; of a computed one those of its parameters, in a list."""
    if isinstance(factor, Tensor):
        return factor_fingerprint(factor).record()
    return [factor_fingerprint(parameter).record() for parameter in factor.parameters]


def _as_list(records: Any) -> list[Any]:
    return records if isinstance(records, list) else [records]


class SavedLedger:
    """A ledger as it was saved, with the fingerprints of that moment.

    Attributes:
        ledger: its terms, on the CPU.
        base: the fingerprint of W before its first move; None if it had not moved.
        origin: what the start of A and B had taken out of the pristine weight; None if nothing.
        rebased: see `WeightState`.
        moves: see there; also None if an earlier version has saved it.
        folded_since: see there.
        whole: the hash of all of W, where its fingerprint was that of its base; else None.
        whole_hash: the function that has made it, and the hashes of A and B.
        W: the record of W's fingerprint when it was saved; None of a W that could not be read.
        unreadable: why it could not, see `unreadable`; None if it could, or an earlier version has saved it.
        overwritten: what somebody else had made of the base until then; None if nothing is known of that.
        now: the record of the fingerprint of each parameter of A, then of B, when it was saved.
        bits: A, or the parameter whose rows it is, as it was; None of a run whose state_dicts give it as it is.
        stored: the factor of A in state_dicts of that moment.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.ledger = Ledger()
        self.ledger.coef = float(record["coef"])
        self.ledger.terms = [_term_of(term) for term in record["terms"]]
        self.ledger.lost = None if record["lost"] is None else str(record["lost"])
        self.origin = None if record["origin"] is None else _term_of(record["origin"])
        self.rebased = bool(record["rebased"])
        self.moves, self.folded_since = (_checked_count(record.get(key), key) for key in ("moves", "folded_since"))
        self.base = None if record["base"] is None else Fingerprint.of_record(record["base"])
        self._end_is_live = record["end"] == "live"
        self._current = bool(record.get("current", self._end_is_live))
        if record["end"] is not None and not self._end_is_live:
            A, B = record["end"]
            self.ledger.end = _tensor_of(A), _tensor_of(B)
        self.whole = None if record["whole"] is None else int(record["whole"])
        self.whole_hash = WHOLE_HASHES[record.get("hashing", 1)]
        self.now = [Fingerprint.of_record(one).record() for letter in "AB" for one in _as_list(record[letter])]
        self.bits = None if record.get("bits") is None else _tensor_of(record["bits"])
        self.stored = float(record.get("stored", 1.0))
        self.overwritten = _difference_of(record.get("overwritten"))
        W = record["W"]
        self.W = None if W is None else Fingerprint.of_record(W).record()
        self.unreadable = None if record.get("unreadable") is None else str(record["unreadable"])

    @property
    def end_is_live(self) -> bool:
        """True if the ledger ends with A and B as they were saved, which the model's or adapter's file holds."""
        return bool(self._end_is_live)

    def ledger_for(self, weight: WeightState) -> Ledger:
        """Return the ledger with the factors of `weight`, which are those that were saved."""
        if self._end_is_live:
            _, A, B = weight.branch().cloned()
            self.ledger.end = A, B
        return self.ledger

    def give_to(self, weight: WeightState) -> None:
        """Copy this ledger into `weight`, whose A and B are those that were saved."""
        self.ledger_for(weight)
        self.ledger.set_current(self._current if weight.triple.follows_between_steps else self._end_is_live)
        weight.ledger, weight.base, weight.origin, weight.rebased = self.ledger, self.base, self.origin, self.rebased
        weight.compensation = None
        never_moved = self.base is None and not weight.triple.folded
        weight.moves = 0 if self.moves is None and never_moved else self.moves
        weight.folded_since = self.folded_since
        weight.placed_ledger()


def _checked_count(count: Any, what: str) -> int | None:
    return None if count is None else checked_count(count, what)


def _end_record(weight: WeightState, ledger: Ledger) -> Any:
    """Return "live" if A and B still are what the last move left, which is the rule; else the factors."""
    if ledger.end is None:
        return None
    if all(torch.equal(kept, now.to(kept.dtype)) for kept, now in zip(ledger.end, weight.branch()[1:], strict=True)):
        return "live"
    return [_tensor_record(factor) for factor in ledger.end]


def _term_record(term: Term) -> dict[str, Any]:
    return {"coef": term.coef, "A": _tensor_record(term.A), "B": _tensor_record(term.B)}


def _term_of(record: dict[str, Any]) -> Term:
    return Term(float(record["coef"]), _tensor_of(record["A"]), _tensor_of(record["B"]))


def _tensor_record(tensor: Tensor) -> dict[str, Any]:
    tensor = tensor.detach().cpu().contiguous()
    if _is_identity(tensor):
        return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "data": IDENTITY}
    data = ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "data": base64.b64encode(data).decode("ascii")}


def _tensor_of(record: dict[str, Any]) -> Tensor:
    dtype = getattr(torch, record["dtype"])
    if dtype not in FLOATS:
        raise ValueError(f"a tensor of {dtype}")
    if record["data"] == IDENTITY:
        *lead, n, _ = record["shape"]
        return torch.eye(n, dtype=dtype).expand(*lead, n, n)
    data = bytearray(base64.b64decode(record["data"], validate=True))
    return torch.frombuffer(data, dtype=dtype).reshape(record["shape"]).clone()


def _difference_record(difference: Difference | None) -> dict[str, Any] | None:
    return None if difference is None else _tensor_record(torch.stack(difference))


def _difference_of(record: dict[str, Any] | None) -> Difference | None:
    return None if record is None else Difference(*_tensor_of(record))


def _is_identity(tensor: Tensor) -> bool:
    n = tensor.shape[-1]
    return tensor.shape[-2] == n and torch.equal(tensor, torch.eye(n, dtype=tensor.dtype).expand_as(tensor))
