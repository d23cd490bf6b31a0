"""The ledgers of all triples, and what is done with them: rebase, restart, resync, save and resume."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch

from deltaopt.base import PLACES, BaseSource, KeptBase, at_base
from deltaopt.ledger import Ledger, add_terms_, branch_of, displacement_of, weight_fingerprint
from deltaopt.lowrank import LowRank, Term, joined
from deltaopt.resume import plan, warn_of_rounding
from deltaopt.triple import LoRATriple

Reinit: TypeAlias = Callable[[LoRATriple], object]


class Account(NamedTuple):
    """A triple and the ledger of its W."""

    triple: LoRATriple
    ledger: Ledger


class Accounts:
    """One account for each triple, in order, and copies of the bases if they are kept.

    Args:
        triples: as registered.
        keep_base: None, "cpu" or "device".
    """

    def __init__(self, triples: Iterable[LoRATriple], keep_base: str | None = None) -> None:
        if keep_base not in PLACES:
            raise ValueError(f"keep_base is one of {PLACES}, got {keep_base!r}")
        self._kept = KeptBase(keep_base) if keep_base is not None else None
        self._accounts: list[Account] = []
        self.add(triples)

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts)

    @property
    def triples(self) -> list[LoRATriple]:
        """All triples, in order."""
        return [triple for triple, _ in self]

    @property
    def ledgers(self) -> list[Ledger]:
        """All ledgers, in order."""
        return [ledger for _, ledger in self]

    @property
    def nbytes(self) -> int:
        """Bytes of the ledgers' terms and of the copies of the base."""
        return sum(ledger.nbytes for ledger in self.ledgers) + (self._kept.nbytes if self._kept is not None else 0)

    def add(self, triples: Iterable[LoRATriple]) -> None:
        """Open an account for each of these."""
        for triple in triples:
            ledger = Ledger()
            if triple.took_from_base():
                start = branch_of(triple)
                ledger.origin = Term(start.coef, start.A.clone(), start.B.clone())
            self._accounts.append(Account(triple, ledger))
            if self._kept is not None:
                self._kept.keep(triple)

    def open(self, ledgers: Iterable[Ledger]) -> None:
        """Note what the W's of these ledgers are now, if they have not moved before: this is their base."""
        fresh = {id(ledger) for ledger in ledgers if ledger.base is None}
        for triple, ledger in self._accounts if fresh else ():
            if id(ledger) in fresh:
                ledger.base = weight_fingerprint(triple, triple.stored())
                if self._kept is not None:
                    self._kept.keep(triple)
                triple.weight_moves()

    def find(self, name: str) -> Account:
        """The account of the triple `name`.

        Raises:
            KeyError: if there is none, with the names there are.
        """
        for account in self:
            if account.triple.label == name:
                return account
        names = self.triples
        raise KeyError(
            f"no triple {name!r}; there are {', '.join(t.label for t in names[:8])}{', ..' * (len(names) > 8)}"
        )

    def displacement(self, name: str) -> LowRank:
        """What the W of `name` was asked to move by."""
        triple, ledger = self.find(name)
        _, A, B = branch_of(triple)
        return joined(displacement_of(triple, ledger) or [Term(0.0, A[..., :0], B[..., :0, :])])

    def rebase(self) -> None:
        """Take every W as it is now as its base."""
        self._accounts = [Account(triple, Ledger()) for triple in self.triples]
        for triple in self.triples:
            triple.weight_rests()

    @torch.no_grad()
    def fold(self, reinit: Reinit) -> None:
        """Add every branch to its W, then let `reinit` start A and B afresh."""
        self._refuse_not_finite()
        self.open(self.ledgers)
        for triple, ledger in self:
            branch = branch_of(triple)
            add_terms_(triple, triple.W, [branch])
            ledger.beside(triple).fold(branch.coef, (branch.A, branch.B))
        for triple in self.triples:
            reinit(triple)

    @torch.no_grad()
    def resync(self) -> None:
        """Move every W by coef times the change of the product since its last move."""
        self._refuse_not_finite()
        for triple, ledger in self:
            if ledger.end is None:
                continue
            _, A_now, B_now = branch_of(triple)
            A, B = ledger.beside(triple).end or (A_now, B_now)
            if A.shape == A_now.shape:
                terms = [Term(ledger.coef, A_now - A, B_now), Term(ledger.coef, A, B_now - B)]
            else:  # an adapter of another rank
                terms = [Term(ledger.coef, A_now, B_now), Term(-ledger.coef, A, B)]
            add_terms_(triple, triple.W, terms)
            ledger.end = A_now.clone(), B_now.clone()

    @contextmanager
    def at_base(self, source: BaseSource | None, method: str | None) -> Iterator[None]:
        """See `DeltaLoRAOptimizer.base_weights`."""
        with at_base(self.triples, self.ledgers, self._kept, source, method):
            yield

    def records(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps of each ledger."""
        return [ledger.record(triple) for triple, ledger in self]

    def resumption(self, records: Mapping[str, Any]) -> Callable[[], None]:
        """Check a loaded state against the weights; what is returned carries the loading out.

        Raises:
            ValueError, WeightMismatchError: see `deltaopt.resume.plan`. Nothing was changed.
        """
        kept = self._kept
        decided = plan(self.triples, records, kept.find if kept is not None else lambda triple, base: None)

        def carry_out() -> None:
            for resumption in decided:
                if kept is not None and resumption.rebuild and resumption.base is None:
                    kept.keep(resumption.triple)  # W is the base
            self._accounts = [Account(resumption.triple, resumption.carry_out()) for resumption in decided]
            for triple, ledger in self:
                if ledger.base is not None:
                    triple.weight_moves()
                else:
                    triple.weight_rests()
            warn_of_rounding(decided)
            self._warn_of_bases_not_kept()

        return carry_out

    def _warn_of_bases_not_kept(self) -> None:
        kept = self._kept
        if kept is None:
            return
        missing = [t.label for t, ledger in self if ledger.base is not None and kept.find(t, ledger.base) is None]
        if missing:
            warnings.warn(
                f"keep_base: the W of {len(missing)} layers ({missing[0]}, ..) had moved before this optimizer was "
                "built, so their base could not be kept. Hand in the pristine weights once, base_weights(source=...): "
                "they are kept from then on",
                RuntimeWarning,
                stacklevel=4,
            )

    def _refuse_not_finite(self) -> None:
        bad = [t.label for t, (_, A, B) in ((t, branch_of(t)) for t in self.triples) if not _finite(A, B)]
        if bad:
            raise ValueError(
                f"a factor of {', '.join(bad)} is NaN or infinite, which would reach W (nothing was changed)"
            )


def zero_product(generator: torch.Generator | None = None) -> Reinit:
    """LoRA's usual start: A is zero, and B uniform in +- 1 / sqrt(d), as kaiming_uniform_(a=sqrt(5)) makes it."""

    def reinit(triple: LoRATriple) -> None:
        _, _, B = branch_of(triple)
        bound = B.shape[-1] ** -0.5
        triple.A.zero_()
        triple.B.uniform_(-bound, bound, generator=generator)

    return reinit


def _finite(*tensors: torch.Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
