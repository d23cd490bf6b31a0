"""What each W was asked to move by since it was registered, as low-rank terms.

While coef = lambda s is constant, the moves telescope (docs/method.md):

    W[t] - W[K] = coef * (A[t] B[t] - A[K] B[K])

so one anchor and the present product say all of it, whatever the number of steps. A changed coef, factors that were
changed between two steps, and a restart, which adds the branch to W, each add a term.
"""

from __future__ import annotations

import base64
import ctypes
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from deltaopt.distributed import gathered
from deltaopt.fingerprint import Fingerprint, whole_hash
from deltaopt.lowrank import LowRank, Term, joined
from deltaopt.rounding import NoiseFactors, Scratch, add_product_, lifted
from deltaopt.tensors import FLOATS
from deltaopt.triple import LoRATriple, Stored

Factors: TypeAlias = "tuple[Tensor, Tensor]"
"""A (c, r) and B (r, d)."""


SMALL_RANK = 64
"""A summed rank that is always allowed."""


def rank_bound(c: int, d: int, r: int) -> int:
    """The summed rank from which on terms for a (c, d) weight are merged: as large as a dense matrix, or small."""
    return max(c * d // (c + d), 4 * r, SMALL_RANK)


class Compensation(NamedTuple):
    """What rounding has cut off from a 16-bit W: `bits` (int16, as the part of W that moves) beside a W of `dtype`."""

    bits: Tensor
    dtype: torch.dtype


class Ledger:
    """The account of one W.

    W was asked to move by `terms`, plus `coef` times the product of the factors in `end`.

    Attributes:
        terms: closed terms: anchors with a negative coefficient, and what changes of coef left behind.
        coef: the coefficient of the product that is still moving; 0.0 before the first move.
        end: A (c, r) and B (r, d) as the last move left them; None before the first move.
        base: the fingerprint of W before its first move; None until then.
        origin: what the start of A and B had taken out of the pristine weight (PiSSA, OLoRA); None if nothing.
        lost: why the displacement is not known any more; None while it is.
        compensation: with compensated rounding, what was cut off from W so far, to be added the next time.
        rebased: whether the base is known to be another weight than the pristine one: after `rebase`, or where W had
            moved when it was registered.
    """

    def __init__(self) -> None:
        self.terms: list[Term] = []
        self.coef = 0.0
        self.end: Factors | None = None
        self.base: Fingerprint | None = None
        self.origin: Term | None = None
        self.lost: str | None = None
        self.compensation: Compensation | None = None
        self.rebased = False

    @property
    def nbytes(self) -> int:
        """Bytes of the closed terms, and of the compensation."""
        compensation = self.compensation.bits.nbytes if self.compensation is not None else 0
        return sum(term.A.nbytes + term.B.nbytes for term in self.terms) + compensation

    @property
    def moved(self) -> bool:
        """Whether W was asked to move, as far as the host knows."""
        return self.base is not None

    def to(self, device: torch.device, dtype: torch.dtype) -> Ledger:
        """This ledger, its tensors where W is now and in the dtype of the computation."""
        self.terms = [term.to(device, dtype) for term in self.terms]
        if self.origin is not None:
            self.origin = self.origin.to(device, dtype)
        if self.end is not None and (self.end[0].device, self.end[0].dtype) != (device, dtype):
            A, B = self.end
            self.end = A.to(device, dtype), B.to(device, dtype)
        return self

    def beside(self, triple: LoRATriple) -> Ledger:
        """This ledger, where the triple's W is now: models are moved and cast between steps."""
        stored = triple.stored()
        return self.to(stored.W.device, stored.compute_dtype())

    def compensation_of(self, part: Tensor) -> Tensor | None:
        """What was cut off from `part`, the part of W that moves, if that is known."""
        held = self.compensation
        if held is None or held.dtype != part.dtype or held.bits.shape != part.shape:
            return None  # W was cast or replaced since
        bits = held.bits.to(part.device)
        # A convolution's matrix has its columns in the order of memory, which channels_last changes.
        if part.dim() > 2 and bits.stride() != torch.empty_like(part, dtype=torch.int16, device="meta").stride():
            bits = torch.empty_like(part, dtype=torch.int16).copy_(bits)
        if bits is not held.bits:
            self.compensation = Compensation(bits, held.dtype)
        return bits

    def kept_compensation(self, part: Tensor) -> Tensor:
        """What was cut off from `part`, to be written; zero at first."""
        bits = self.compensation_of(part)
        if bits is None:
            bits = torch.zeros_like(part, dtype=torch.int16)
            self.compensation = Compensation(bits, part.dtype)
        return bits

    def extend(self, coef: float, start: Factors, before: Factors | None) -> None:
        """Enter that a move began which does not just go on; where it comes to is then kept in `end`.

        Args:
            coef: lambda s of this move.
            start: A and B at its start.
            before: A and B as the last move left them, if they are others.
        """
        if before is None:
            self._close(self.coef - coef, start)
        else:
            self._close(self.coef, before)
            self._close(-coef, start)
        self.coef = coef

    def add(self, term: Term) -> None:
        """Enter that W was asked to move by `term`, apart from the moves of steps."""
        self._close(term.coef, (term.A, term.B))

    def restart(self, scaling: float, branch: Factors) -> None:
        """Enter that scaling * A @ B of the branch was added to W, and that A and B start afresh."""
        if self.end is not None and all(map(torch.equal, self.end, branch)):
            scaling, self.end = self.coef + scaling, None
        self.close()
        self._close(scaling, branch)

    def close(self) -> None:
        """Enter that the next move begins anew: with factors of another rank."""
        if self.end is not None:
            self._close(self.coef, self.end)
        self.coef, self.end = 0.0, None

    def displacement(self) -> list[Term]:
        """Terms that add up to what W was asked to move by; empty when that is nothing.

        Raises:
            RuntimeError: if it is not known any more, with the reason.
        """
        if self.lost is not None:
            raise RuntimeError(self.lost)
        self.terms = [term for term in self.terms if not _is_zero(term)]
        live = [] if self.end is None else [Term(self.coef, *self.end)]
        return self.terms + [term for term in live if not _is_zero(term)]

    def _close(self, coef: float, factors: Factors) -> None:
        """Append a term of its own, merged with the others once their ranks have summed up too far."""
        known_zero = coef == 0 or (factors[0].device.type == "cpu" and not all(factor.any() for factor in factors))
        if self.lost is not None or known_zero:
            return
        A, B = factors
        term = Term(coef, A.detach().clone(), B.detach().clone())
        self.terms.append(term)
        *_, c, r = A.shape
        d = B.shape[-1]
        bound = rank_bound(c, d, r)
        if sum(term.rank for term in self.terms) <= bound:
            return
        merged = joined(self.terms).compressed()
        self.terms = [Term(1.0, merged.A, merged.B)]
        limit = bound - 2 * r  # room for two more, or every one of them would be merged
        if merged.rank > limit:
            self.terms = []
            self.lost = (
                "the displacement is not known as low-rank terms any more: update_ratio changed so often (or there "
                f"were so many restarts, or changes of A and B between steps) that its rank passed {limit}, the limit "
                f"for a weight of {c} x {d}. W itself goes on exactly. Save checkpoints that hold W, keep a copy of "
                'the base (keep_base="cpu"), or change update_ratio in fewer, larger steps'
            )

    def record(self, triple: LoRATriple) -> dict[str, Any]:
        """Plain numbers and strings, from which `SavedLedger` makes the ledger again. Waits for the device."""
        stored = triple.stored()
        self.beside(triple)
        return {
            "coef": self.coef,
            "terms": [] if self.lost else [_term_record(term) for term in self.terms if not _is_zero(term)],
            "end": self._end_record(triple, stored),
            "origin": None if self.origin is None else _term_record(self.origin),
            "lost": self.lost,
            "rebased": self.rebased,
            "base": None if self.base is None else self.base.record(),
            "W": (now := weight_record(triple, stored)),
            "whole": whole_hash(triple.moved_part(stored.W)) if self._hides(now) else None,
            **{letter: factor_fingerprint(getattr(stored, letter)).record() for letter in "AB"},
        }

    def _hides(self, now: dict[str, Any] | None) -> bool:
        """Whether W may have moved in places that the sample misses: a few rows of an embedding, or in 16 bits."""
        return self.base is not None and self.base.record() == now

    def _end_record(self, triple: LoRATriple, stored: Stored) -> Any:
        """The word "live" where A and B still are what the last move left, which is the rule; else the factors."""
        if self.end is None:
            return None
        live = triple.factor_matrices(stored)
        if all(torch.equal(kept, now.detach().to(kept.dtype)) for kept, now in zip(self.end, live, strict=True)):
            return "live"
        return [_tensor_record(factor) for factor in self.end]


class SavedLedger:
    """A ledger as it was saved, with the fingerprints of that moment."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.ledger = Ledger()
        self.ledger.coef = float(record["coef"])
        self.ledger.terms = [_term_of(term) for term in record["terms"]]
        self.ledger.origin = None if record["origin"] is None else _term_of(record["origin"])
        self.ledger.lost = None if record["lost"] is None else str(record["lost"])
        self.ledger.rebased = bool(record["rebased"])
        self.ledger.base = None if record["base"] is None else Fingerprint.of_record(record["base"])
        self.end = record["end"]
        if self.end not in (None, "live"):
            A, B = self.end
            self.ledger.end = _tensor_of(A), _tensor_of(B)
        self.whole = None if record["whole"] is None else int(record["whole"])
        self.now = {letter: Fingerprint.of_record(record[letter]).record() for letter in "AB"}
        W = record["W"]
        self.W = None if W is None else Fingerprint.of_record(W).record()

    def placed(self, triple: LoRATriple) -> Ledger:
        """The ledger with its tensors where the triple's are, in the dtype of its computation."""
        if self.end == "live":
            A, B = triple.factor_matrices(triple.stored())
            self.ledger.end = A.detach().clone(), B.detach().clone()
        return self.ledger.beside(triple)


def warn_of_lost(ledgers: Iterable[Ledger], stacklevel: int) -> bool:
    """Say so if a displacement was given up; returns whether one was."""
    lost = [ledger.lost for ledger in ledgers if ledger.lost]
    if lost:
        warnings.warn(f"of some weights {lost[0]}", RuntimeWarning, stacklevel=stacklevel + 1)
    return bool(lost)


def displacement_of(triple: LoRATriple, ledger: Ledger) -> list[Term]:
    """What the W of `triple` was asked to move by.

    Raises:
        RuntimeError: if it is not known any more, with the layer's name and the reason.
    """
    if ledger.lost is not None:
        raise RuntimeError(f"{triple.label}: {ledger.lost}")
    return ledger.beside(triple).displacement()


def branch_of(triple: LoRATriple) -> Term:
    """What the branch adds now, branch_scaling * A @ B, in the dtype of the computation. To be read, not written."""
    stored = triple.stored()
    stored = stored._replace(A=gathered(stored.A), B=gathered(stored.B))
    A, B = (factor.detach().to(stored.compute_dtype()) for factor in triple.factor_matrices(stored))
    return Term(triple.branch_scaling, A, B)


def whole_change(triple: LoRATriple, ledger: Ledger, from_pristine: bool = False) -> LowRank:
    """The displacement of W and the branch beside it, as one product.

    Args:
        triple: with the branch.
        ledger: of its W.
        from_pristine: with what the start of A and B had taken out of the pristine weight.

    Raises:
        RuntimeError: if the displacement is not known any more.
    """
    branch = branch_of(triple)
    terms = [*displacement_of(triple, ledger), branch]
    if from_pristine and ledger.origin is not None:
        coef, A, B = ledger.origin
        terms.append(Term(-coef, A, B))
    return joined([term for term in _combined(terms) if not _is_zero(term)] or [branch])


def _combined(terms: list[Term]) -> list[Term]:
    """The same sum, with terms of equal factors as one."""
    combined: list[Term] = []
    for term in terms:
        for i, (coef, A, B) in enumerate(combined):
            if torch.equal(A, term.A) and torch.equal(B, term.B):
                combined[i] = Term(coef + term.coef, A, B)
                break
        else:
            combined.append(term)
    return combined


def weight_fingerprint(triple: LoRATriple, stored: Stored) -> Fingerprint:
    """Of the part of W that moves."""
    return Fingerprint(triple.moved_part(stored.W))


def weight_record(triple: LoRATriple, stored: Stored) -> dict[str, Any] | None:
    """What a checkpoint keeps to know W again; None of one that can not be read (quantized, offloaded)."""
    return None if triple.weight_problems() else weight_fingerprint(triple, stored).record()


def factor_fingerprint(factor: Tensor) -> Fingerprint:
    """Of a factor, all of it."""
    return Fingerprint(gathered(factor), whole=True)


@torch.no_grad()
def add_terms_(
    triple: LoRATriple,
    part: Tensor,
    terms: list[Term],
    coef: float = 1.0,
    noise: NoiseFactors | None = None,
    compensation: Tensor | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Part += coef * the sum of the terms, computed in float64 and rounded once.

    Terms may be much larger than their sum: an anchor takes most of the running product away again.

    Args:
        triple: whose layout it is.
        part: the part of W that moves, or a tensor of its shape and order of strides; written in place.
        terms: of `triple`.
        coef: what multiplies all of them.
        noise: see `deltaopt.rounding.add_product_`.
        compensation: see there; as `part`.
        scratch: see there.
    """
    if not terms:
        return
    total = joined(term.to(part.device, torch.float64) for term in terms)
    kept = None if compensation is None else triple.part_matrix(compensation)
    add_product_(triple.part_matrix(part), total.A, triple.columns_of(triple.W, total.B), coef, noise, kept, scratch)


@torch.no_grad()
def full_part(triple: LoRATriple, ledger: Ledger) -> Tensor:
    """A copy of the part of W that moves; with what compensated rounding has cut off, in float32, where it has."""
    part = triple.moved_part(triple.W).detach()
    compensation = ledger.compensation_of(part)
    return part.clone() if compensation is None else lifted(part, compensation)


def _is_zero(term: Term) -> bool:
    return term.coef == 0 or not bool(term.A.any()) or not bool(term.B.any())


def _term_record(term: Term) -> dict[str, Any]:
    return {"coef": term.coef, "A": _tensor_record(term.A), "B": _tensor_record(term.B)}


def _term_of(record: dict[str, Any]) -> Term:
    return Term(float(record["coef"]), _tensor_of(record["A"]), _tensor_of(record["B"]))


def _tensor_record(tensor: Tensor) -> dict[str, Any]:
    tensor = tensor.detach().cpu().contiguous()
    data = ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "data": base64.b64encode(data).decode("ascii")}


def _tensor_of(record: dict[str, Any]) -> Tensor:
    dtype = getattr(torch, record["dtype"])
    if dtype not in FLOATS:
        raise ValueError(f"a tensor of {dtype}")
    data = bytearray(base64.b64decode(record["data"], validate=True))
    return torch.frombuffer(data, dtype=dtype).reshape(record["shape"]).clone()
