"""Description: what an optimizer takes of a model and what it leaves out, as data and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deltaopt.messages import counted, names
from deltaopt.tables import grouped, paragraph, patterns, table

REFUSED, OTHER, UNBRANCHED, NO_WEIGHT = "refused", "other adapter or method", "no branch", "trains without a W"
"""The kinds of what is left out, in the order in which they are printed."""


@dataclass(frozen=True)
class FactorParameter:
    """A parameter that a triple's factors are made of.

    Attributes:
        name: of its layer, and its own there; the same for all triples that share it.
        factor: "A" or "B" where the parameter is the factor itself; else empty, as for a slice or a function of it.
        shape: as it is stored.
        dtype: of its numbers.
        trains: False if it is frozen.
    """

    name: str
    factor: str
    shape: tuple[int, ...]
    dtype: str
    trains: bool

    @property
    def count(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TakenLayer:
    """One triple.

    Attributes:
        name: of the triple.
        shape: of W as it is stored; of the product A @ B where W is packed.
        dtype: of W; the name of its class where it is no plain tensor.
        device: of W.
        r: the rank of the branch.
        scaling: what the branch multiplies A @ B by.
        layout: how W is stored, see `LoRATriple`.
        rows: the rows of W's matrix that move, (start, stop); None for all.
        columns: the same for its columns.
        parameters: that A and B are made of.
        rule: "either"; or the only ``weight_update`` that takes it, "in_place" or "folded". Of an optimizer, its own.
        why: why the other rule does not take it; empty if it does.
        sharing: sentences on what it shares with other triples and modules.
        moves: the number of elements of W that move.
        kept_bytes: what ``"in_place"`` keeps from step to step: r (c + d) numbers on a CPU, three times as much on
            a GPU. The folded rule keeps none of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    r: int
    scaling: float
    layout: str
    rows: tuple[int, int] | None
    columns: tuple[int, int] | None
    parameters: tuple[FactorParameter, ...]
    rule: str
    why: str
    sharing: tuple[str, ...]
    moves: int
    kept_bytes: int


@dataclass(frozen=True)
class LeftOut:
    """Something of the model that is no triple.

    Attributes:
        kind: ``"refused"``: a LoRA layer that `find_triples` or the optimizer refuses; ``"other adapter or method"``:
            a layer that holds only other adapters, or those of another method; ``"no branch"``: a layer with a weight
            and no branch next to it; ``"trains without a W"``: a parameter that trains and is no factor.
        name: of the layer or the parameter.
        why: what it is, or why it is refused and what to do.
        count: the number of its elements, for a parameter; else 0.
    """

    kind: str
    name: str
    why: str
    count: int = 0


@dataclass(frozen=True)
class Description:
    """What is taken and what is left out. Its string is a table, in which layers that are alike share a row.

    Attributes:
        subject: what was described.
        rows: one `TakenLayer` for each triple, in order.
        left_out: everything else.
        loaded: False for a model on the meta device, of which shapes alone are known.
    """

    subject: str
    rows: list[TakenLayer]
    left_out: list[LeftOut]
    loaded: bool = True

    @property
    def trained(self) -> int:
        """The number of trained elements in all factors; a parameter of several triples counts once."""
        return _trained(self.rows)

    @property
    def moves(self) -> int:
        """The number of elements of all W that move."""
        return sum(row.moves for row in self.rows)

    @property
    def kept_bytes(self) -> int:
        """What ``weight_update="in_place"`` keeps from step to step, see `TakenLayer`."""
        return sum(row.kept_bytes for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return it as dicts, lists, numbers, strings and None, as JSON takes them."""
        fields: dict[str, Any] = _plain(asdict(self))
        return {**fields, "trained": self.trained, "moves": self.moves, "kept_bytes": self.kept_bytes}

    def __str__(self) -> str:
        start = _common_start([row.name for row in self.rows], [e.name for e in self.left_out if e.kind != NO_WEIGHT])
        lines = paragraph(self._headline(start))
        if self.rows:
            lines += table(self._cells(start), wrapped=0)
            lines += paragraph(self._totals())
            lines += ['either: weight_update="in_place" or "folded"'] * any(row.rule == "either" for row in self.rows)
            for row in {(row.rule, row.why, *row.sharing): row for row in self.rows}.values():
                lines += paragraph(f"{row.rule} only: {row.why}") if row.why else []
            lines += self._sharing(start)
        if self.left_out:
            lines += ["left out:", *self._left_out_lines(start)]
        return "\n".join(lines)

    __repr__ = __str__

    def _headline(self, start: str) -> str:
        taken = f"{counted(len(self.rows), 'LoRA layer')} taken of {self.subject}"
        if not self.rows:
            taken = f"no LoRA layer can be taken of {self.subject}"
            if not any(entry.kind in (REFUSED, OTHER) for entry in self.left_out):
                taken += ", which has none: add an adapter first (PEFT: get_peft_model)"
        unloaded = "" if self.loaded else "; its weights are not loaded"
        return f"{taken}{unloaded}" + (f"; names begin with {start!r}" if start else "")

    def _cells(self, start: str) -> list[tuple[str, ...]]:
        devices = len({row.device for row in self.rows}) > 1
        cells: list[tuple[str, ...]] = [("layers", "W", "r", "scaling", "layout", "trained", "rule")]
        for alike in grouped(self.rows, _facts):
            by_name = {row.name.removeprefix(start): row for row in alike}
            for pattern, members in patterns(by_name).items():
                cells.append((pattern, *_row_cells([by_name[name] for name in members], devices)))
        return cells

    def _totals(self) -> str:
        kept = ""
        if any(row.rule != "folded" for row in self.rows):
            kept = f'; "in_place" keeps {in_bytes(self.kept_bytes)} from step to step'
        return (
            f"in total: {counted(len(self.rows), 'layer')}; trained: {self.trained:,} numbers; W that moves: "
            f"{self.moves:,} numbers{kept}"
        )

    def _sharing(self, start: str) -> list[str]:
        found: dict[str, list[str]] = {}
        for row in self.rows:
            for sentence in row.sharing:
                found.setdefault(sentence, []).append(row.name.removeprefix(start))
        return [
            line for sentence, held in found.items() for line in paragraph(f"shared: {sentence} ({names_of(held)})")
        ]

    def _left_out_lines(self, start: str) -> list[str]:
        lines = []
        for kind in (REFUSED, OTHER, NO_WEIGHT, UNBRANCHED):
            of_kind = [entry for entry in self.left_out if entry.kind == kind]
            for alike in grouped(of_kind, lambda entry: entry.why):
                where = names_of([entry.name.removeprefix(start) for entry in alike])
                lines += paragraph(_left_out_sentence(kind, alike, where), "  ")
        return lines


def names_of(labels: Sequence[str]) -> str:
    """Return the patterns of some names; of many patterns, the first ones."""
    return names(list(patterns(labels)))


def _left_out_sentence(kind: str, alike: Sequence[LeftOut], where: str) -> str:
    why, count = alike[0].why, len(alike)
    if kind == NO_WEIGHT:
        total = sum(entry.count for entry in alike)
        return f"{counted(count, 'parameter')} ({total:,} numbers): {why}: {where}"
    if kind == UNBRANCHED:
        return f"{counted(count, 'layer')} without a LoRA branch, {why}: {where}"
    return f"{counted(count, 'layer')} {'refused' if kind == REFUSED else 'left alone'}: {why}: {where}"


def _facts(row: TakenLayer) -> tuple[Any, ...]:
    parameters = tuple((p.factor or short_name(p.name), p.shape, p.trains) for p in row.parameters)
    where = row.layout, row.rows, row.columns
    return (row.shape, row.dtype, row.device, row.r, row.scaling, where, parameters, row.rule, row.why, row.sharing)


def _row_cells(rows: Sequence[TakenLayer], devices: bool) -> tuple[str, ...]:
    first = rows[0]
    parts = [("rows", first.rows), ("columns", first.columns)]
    where = "".join(f", {what} {bounds[0]}:{bounds[1]}" for what, bounds in parts if bounds is not None)
    return (
        f"{len(rows)} x {first.shape} {first.dtype}{f' {first.device}' * devices}",
        str(first.r),
        f"{first.scaling:g}",
        f"{first.layout}{where}",
        _trained_cell(rows),
        first.rule,
    )


def _trained_cell(rows: Sequence[TakenLayer]) -> str:
    parameters = rows[0].parameters
    frozen = [p.factor or short_name(p.name) for p in parameters if not p.trains]
    trained = [p.factor or short_name(p.name) for p in parameters if p.trains]
    return f"{_trained(rows):,}: {', '.join(trained)}" + f"; {', '.join(frozen)} frozen" * bool(frozen)


def _trained(rows: Iterable[TakenLayer]) -> int:
    return sum({p.name: p.count for row in rows for p in row.parameters if p.trains}.values())


def short_name(name: str) -> str:
    """Return the part of a parameter's name that says what it is: "lora_E" of "h.0.q.lora_E.default"."""
    parts = name.split(".")
    return next((part for part in parts if part.startswith("lora_")), parts[-1])


def _common_start(taken: Sequence[str], others: Iterable[str]) -> str:
    """Return the parts, with their dot, that all names begin with: what wrappers of the model put in front."""
    if len(taken) < 2:
        return ""
    split = [label.split(".")[:-1] for label in (*taken, *others)]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1 or parts[0].isdigit():
            break
        common.append(parts[0])
    return "".join(f"{part}." for part in common)


def in_bytes(count: float) -> str:
    """Write a number of bytes in a unit in which it is easily read."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:g} bytes"
        count /= 1024
    return f"{count:.3g} GiB"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
