"""The ledgers of all triples, and what is done with them: rebase, restart, resync, save and resume."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from deltaopt.base import PLACES, BaseSource, KeptBase, Pristine, at_base, base_by_compensation, not_in_source
from deltaopt.fingerprint import Fingerprint
from deltaopt.ledger import (
    Ledger,
    add_terms_,
    branch_of,
    displacement_of,
    full_part,
    warn_of_lost,
    weight_fingerprint,
)
from deltaopt.lowrank import LowRank, Term, joined
from deltaopt.resume import plan, warn_of_what_was_done
from deltaopt.rounding import cut_off
from deltaopt.triple import LoRATriple
from deltaopt.writing import Write

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
            ledger.rebased = triple.has_moved()
            if triple.took_from_base():
                ledger.origin = branch_of(triple).cloned()
            self._accounts.append(Account(triple, ledger))
            if self._kept is not None and not triple.weight_problems():
                self._kept.keep(triple)

    def open(self, ledgers: Iterable[Ledger]) -> None:
        """Note what the W's of these ledgers are, if they have not moved before and will now: this is their base."""
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
        folded = [Term(triple.folded * triple.scaling, A, B)] if triple.folded else []
        return joined(displacement_of(triple, ledger) + folded or [Term(0.0, A[..., :0], B[..., :0, :])])

    def rebase(self) -> None:
        """Take every W as it is now as its base."""
        self._accounts = [Account(triple, Ledger()) for triple in self.triples]
        for _, ledger in self:
            ledger.rebased = True
        for triple in self.triples:
            triple.weight_rests()

    @torch.no_grad()
    def restart(self, reinit: Reinit, write: Write) -> None:
        """Let `reinit` start A and B afresh, and `write` add every branch as it was before to its W.

        A folded branch begins with (1 + lambda) s times its new product, of which W gives lambda s.
        """
        self.refuse_not_finite()
        self._refuse_unwritable()
        branches = [branch_of(triple).cloned() for triple in self.triples]
        kept = [(factor, factor.clone()) for triple in self.triples for factor in (triple.A, triple.B)]
        try:
            for triple in self.triples:
                reinit(triple)
            self.refuse_not_finite()
        except BaseException:
            for factor, before in kept:
                factor.copy_(before)
            raise
        self.open(self.ledgers)
        known = [ledger for ledger in self.ledgers if not ledger.lost]
        for (triple, ledger), branch in zip(self, branches, strict=True):
            terms = [branch]
            ledger.beside(triple).restart(branch.coef, (branch.A, branch.B))
            if triple.folded:
                terms.append(branch_of(triple)._replace(coef=-triple.folded * triple.scaling))
                ledger.add(terms[-1])
            write.terms_(triple, ledger, terms)
        warn_of_lost(known, stacklevel=4)

    @torch.no_grad()
    def resync(self, follows: Iterable[bool], write: Write) -> None:
        """Let `write` move every W that `follows` by coef times the change of the product since its last move."""
        self.refuse_not_finite()
        rounded = []
        for (triple, ledger), follow in zip(self, follows, strict=True):
            before, (_, A, B) = ledger.beside(triple).end, branch_of(triple).cloned()
            if before is None or not follow or all(map(torch.equal, before, (A, B))):
                continue
            ledger.end = A, B
            in_steps = triple.W.element_size() == 2 and write.rounding.of(triple.W.dtype) != "compensated"
            base = self._find_base(triple, ledger.base) if ledger.base is not None and in_steps else None
            if base is not None and ledger.lost is None:
                triple.moved_part(triple.W).copy_(base)
                write.terms_(triple, ledger, ledger.displacement())
                continue
            write.terms_(triple, ledger, [Term(ledger.coef, A, B), Term(-ledger.coef, *before)])
            rounded += [triple.label] if in_steps else []
        if rounded:
            warnings.warn(
                f"the 16-bit W of {len(rounded)} layers ({rounded[0]}, ..) was moved back at once, from where rounding "
                "had left it in many small steps: it is not what it was with these factors. With keep_base it would be "
                "base + displacement; or load a checkpoint that holds W",
                RuntimeWarning,
                stacklevel=4,
            )

    def at_base(self, source: BaseSource | None, method: str | None) -> AbstractContextManager[None]:
        """See `DeltaLoRAOptimizer.base_weights`."""
        return at_base(self.triples, self.ledgers, self._kept, source, method)

    def records(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps of each ledger."""
        return [ledger.record(triple) for triple, ledger in self]

    def compensations(self, write: Write, template: bool) -> list[Tensor | None]:
        """What a checkpoint keeps of each compensation; with `template`, zeros where there is none yet."""
        return [
            write.compensation(triple, ledger, triple.W) if template or ledger.compensation is not None else None
            for triple, ledger in self
        ]

    def residual(self, name: str, source: BaseSource | None) -> Tensor:
        """See `DeltaLoRAOptimizer.residual`."""
        triple, ledger = self.find(name)
        if problems := triple.weight_problems():
            raise RuntimeError(f"{name}: {problems[0]}")
        part = triple.moved_part(triple.W).detach()
        dtype = torch.promote_types(part.dtype, torch.float32)
        if ledger.base is None:
            return triple.part_matrix(torch.zeros_like(part, dtype=dtype))
        find = self._find_base if source is None else Pristine(source).find
        base = find(triple, ledger.base)
        if base is None and source is not None:
            raise ValueError(not_in_source(triple, ledger.base))
        if base is None and base_by_compensation(triple, ledger) is not None:
            return triple.part_matrix(part - full_part(triple, ledger))
        if base is None:
            raise RuntimeError(
                f"{name}: what rounding did is known with W from before its first move only: hand it in, "
                'residual(name, source=...), or build the optimizer with keep_base="cpu"'
            )
        asked = base.to(part.device, torch.float64, copy=True)
        add_terms_(triple, asked, displacement_of(triple, ledger))
        return triple.part_matrix((part - asked).to(dtype))

    def resumption(
        self, records: Mapping[str, Any], compensations: Mapping[str, Tensor], write: Write
    ) -> Callable[[], None]:
        """Check a loaded state against the weights; what is returned carries the loading out.

        Args:
            records: of the saved ledgers, by the triples' names.
            compensations: that were saved, by the triples' names.
            write: how W's are written that are rebuilt.

        Raises:
            ValueError, WeightMismatchError: see `deltaopt.resume.plan`. Nothing was changed.
        """
        kept = self._kept
        decided = plan(self.triples, self.ledgers, records, compensations, self._find_base)

        def carry_out() -> None:
            for resumption in decided:
                if kept is not None and resumption.rebuild and resumption.base is None:
                    kept.keep(resumption.triple)  # W is the base
            self._accounts = [Account(resumption.triple, resumption.carry_out(write)) for resumption in decided]
            for triple, ledger in self:
                if ledger.moved:
                    triple.weight_moves()
                else:
                    triple.weight_rests()
            self._compensate(write, [account for account, r in zip(self, decided, strict=True) if not r.rebuild])
            warn_of_what_was_done(decided, write)
            self._warn_of_bases_not_kept()

        return carry_out

    def _compensate(self, write: Write, left_alone: Iterable[Account]) -> None:
        """Find out what had been cut off from W's of which a checkpoint does not tell."""
        missing = []
        for triple, ledger in left_alone:
            part = triple.moved_part(triple.W)
            if write.rounding.of(part.dtype) != "compensated" or ledger.base is None or ledger.compensation is not None:
                continue
            base = self._find_base(triple, ledger.base) if ledger.lost is None else None
            if base is None:
                missing.append(triple.label)
                continue
            full = base.to(part.device, torch.float32, copy=True)
            add_terms_(triple, full, displacement_of(triple, ledger))
            ledger.kept_compensation(part).copy_(cut_off(part, full))
        if missing:
            warnings.warn(
                f"what rounding had cut off from the 16-bit W of {len(missing)} layers ({missing[0]}, ..) is not in "
                "the state, and without a copy of the base (keep_base) it can not be computed: it starts at zero, and "
                "W goes on from its bits",
                RuntimeWarning,
                stacklevel=4,
            )

    def _find_base(self, triple: LoRATriple, base: Fingerprint) -> Tensor | None:
        return self._kept.find(triple, base) if self._kept is not None else None

    def _warn_of_bases_not_kept(self) -> None:
        kept = self._kept
        if kept is None:
            return
        missing = [t.label for t, ledger in self if ledger.base and kept.find(t, ledger.base) is None]
        if missing:
            warnings.warn(
                f"keep_base: the W of {len(missing)} layers ({missing[0]}, ..) had moved before this optimizer was "
                "built, so their base could not be kept. Hand in the pristine weights once, base_weights(source=...): "
                "they are kept from then on",
                RuntimeWarning,
                stacklevel=4,
            )

    def _refuse_unwritable(self) -> None:
        found = [f"{triple.label}: {problem}" for triple in self.triples for problem in triple.weight_problems()]
        if found:
            raise RuntimeError("these W can not be written (nothing was changed):\n  " + "\n  ".join(found))

    def refuse_not_finite(self, triples: Iterable[LoRATriple] | None = None) -> None:
        """Refuse factors, of all triples or of these, that are NaN or infinite, before their product is added to W."""
        chosen = self.triples if triples is None else triples
        bad = [t.label for t, (_, A, B) in ((t, branch_of(t)) for t in chosen) if not _finite(A, B)]
        if bad:
            raise ValueError(
                f"a factor of {', '.join(bad)} is NaN or infinite, which would reach W (nothing was changed)"
            )


def lora_start(generator: torch.Generator | None = None) -> Reinit:
    """LoRA's usual start, with a product of zero.

    A is zero and B uniform in +- 1 / sqrt(d), as kaiming_uniform_(a=sqrt(5)) makes it; in embeddings B, of which rows
    are looked up, is zero and A standard normal.
    """

    def reinit(triple: LoRATriple) -> None:
        if triple.layout == "embedding":
            triple.A.normal_(generator=generator)
            triple.B.zero_()
            return
        _, _, B = branch_of(triple)
        bound = B.shape[-1] ** -0.5
        triple.A.zero_()
        triple.B.uniform_(-bound, bound, generator=generator)

    return reinit


def _finite(*tensors: torch.Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
