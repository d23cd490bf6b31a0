"""Groups: the triples and other parameters that a user hands over, with the settings they share.

A `DeltaGroup` is to W what a param group is to A and B: some triples, and the update_ratio and start_step
they share. The options of the inner optimizer (lr, weight_decay, ...) go into its own param groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from deltaopt.messages import names
from deltaopt.plain import as_float, as_int, plain
from deltaopt.scaling import checked_scaling
from deltaopt.triple import LoRATriple

UpdateRatio: TypeAlias = float | Callable[[int], float]
TriplesInput: TypeAlias = Iterable[Any]
ParamsInput: TypeAlias = Iterable[Any]


@dataclass(frozen=True)
class Settings:
    """The settings of a group, checked once: wherever one of them is set. Numbers become plain Python numbers.

    Attributes:
        update_ratio: lambda, finite and at least 0; or a callable step -> lambda.
        start_step: K, at least 0.
        scaling: s of plain tuples.

    Raises:
        ValueError, TypeError: for values out of range.
    """

    update_ratio: UpdateRatio
    start_step: int
    scaling: float

    def __post_init__(self) -> None:
        if not callable(self.update_ratio):
            object.__setattr__(self, "update_ratio", checked_ratio(self.update_ratio, "update_ratio"))
        object.__setattr__(self, "start_step", checked_count(self.start_step, "start_step"))
        object.__setattr__(self, "scaling", checked_scaling(self.scaling, "DeltaLoRAOptimizer"))


class DeltaGroup:
    """Triples that share one update_ratio (lambda) and one start_step (K). Both may be set between steps.

    Args:
        triples: of the group.
        settings: of the group.
    """

    def __init__(self, triples: list[LoRATriple], settings: Settings) -> None:
        self.triples = triples
        self._settings = settings

    @property
    def update_ratio(self) -> UpdateRatio:
        """Lambda, or a callable step -> lambda."""
        return self._settings.update_ratio

    @update_ratio.setter
    def update_ratio(self, ratio: UpdateRatio) -> None:
        self._settings = replace(self._settings, update_ratio=ratio)

    @property
    def start_step(self) -> int:
        """K, the number of steps that leave W alone."""
        return self._settings.start_step

    @start_step.setter
    def start_step(self, count: int) -> None:
        self._settings = replace(self._settings, start_step=count)

    def ratio_at(self, step: int) -> float:
        """Return lambda for the step number `step`, counted from 0; 0.0 during the warm-up.

        Raises:
            ValueError, TypeError: if a callable update_ratio returns a value out of range.
        """
        ratio = self.update_ratio
        if step < self.start_step:
            return 0.0
        return checked_ratio(ratio(step), f"update_ratio({step})") if callable(ratio) else ratio

    def __repr__(self) -> str:
        settings = f"update_ratio={self.update_ratio}, start_step={self.start_step}"
        return f"{type(self).__name__}({len(self.triples)} triples, {settings})"


def parse_triples(
    triples: TriplesInput, settings: Settings, first: int = 0
) -> tuple[list[DeltaGroup], list[dict[str, Any]]]:
    """Return the delta groups, and for each of them the options of its inner param group.

    Args:
        triples: LoRATriples and (W, A, B) tuples, or dicts {"triples": [...], options}.
        settings: what a group without its own update_ratio, start_step or scaling takes.
        first: the number that names the first triple without a name.
    """
    if isinstance(triples, (Tensor, Mapping, LoRATriple, str)):
        raise TypeError(
            f"triples is a list of LoRATriple, of (W, A, B) tuples or of dicts with a 'triples' key, "
            f"got a {type(triples).__name__}"
        )
    entries = list(triples)
    if not entries:
        raise ValueError(
            "triples is empty: there is no W to move. find_triples(model) lists the LoRA layers of a model; "
            "for plain training use the inner optimizer alone"
        )
    dicts = [isinstance(entry, Mapping) for entry in entries]
    if any(dicts) and not all(dicts):
        raise TypeError("triples mixes dicts with triples: put all of them into dicts, or none")
    if not any(dicts):
        entries = [{"triples": entries}]
    groups, options = [], []
    for entry in entries:
        group, rest = _parse_group(dict(entry), settings, first)
        first += len(group.triples)
        groups.append(group)
        options.append(rest)
    return groups, options


def factor_params(triples: Iterable[LoRATriple]) -> dict[Tensor, str]:
    """Return what trains of A and B of each triple in order, each parameter once, with a name."""
    named: dict[Tensor, str] = {}
    for triple in triples:
        for name, parameter in zip(triple.parameter_names, triple.stored, strict=True):
            if parameter.requires_grad:
                named.setdefault(parameter, f"{triple.label}.{name}")
    return named


def inner_groups(
    groups: Sequence[DeltaGroup], options: Sequence[dict[str, Any]], params: ParamsInput
) -> list[dict[str, Any]]:
    """Return the param groups an inner optimizer is built from: the factors, and what else trains.

    Options that are scalars of numpy become plain numbers, as a checkpoint needs them.
    Plain tensors in `params` join the factors where all triples form one group, and are a group of their own
    otherwise. Factors among plain tensors are not repeated.
    """
    if isinstance(params, Tensor):
        raise TypeError("params is a list of tensors or of param groups, got a Tensor: write [it]")
    others = [entry for entry in map(_with_list, params) if not isinstance(entry, Mapping) or entry.get("params", True)]
    if any(isinstance(entry, LoRATriple) for entry in others):
        raise TypeError(
            "params is a list of tensors or of param groups, got a LoRATriple: params is what trains besides the "
            "factors, other_parameters(model, triples). Leave the triples out of it"
        )
    if len({isinstance(entry, Mapping) for entry in others}) > 1:
        raise TypeError("params mixes tensors with param groups: put all of them into groups, or none")
    factors = factor_params(t for group in groups for t in group.triples)
    named = any(isinstance(entry, tuple) for entry in others) or any(
        isinstance(p, tuple) for rest in options for p in rest.get("params", ())
    )
    built = []
    for group, rest in zip(groups, options, strict=True):
        own = factor_params(group.triples)
        extra = [p for p in rest.get("params", ()) if _tensor(p) not in factors]
        members = [(name, p) if named else p for p, name in own.items()]
        built.append({**plain(rest), "params": members + extra})
    if others and all(isinstance(entry, Mapping) for entry in others):
        _refuse_factors(others, factors)
        return built + [plain(dict(entry)) for entry in others]
    rest_params = [p for p in others if _tensor(p) not in factors]
    if len(built) == 1:
        built[0]["params"] += rest_params
    elif rest_params:
        built.append({"params": rest_params})
    return built


def _with_list(entry: Any) -> Any:
    """Return a param group with a list of parameters, which may be read more than once; other entries as they are."""
    return {**entry, "params": as_list(entry["params"])} if isinstance(entry, Mapping) and "params" in entry else entry


def _refuse_factors(param_groups: Iterable[Mapping[str, Any]], factors: Mapping[Tensor, str]) -> None:
    """Raise ValueError for factors in param groups: it would not be clear whose options they take."""
    given = [factors[p] for group in param_groups for p in map(_tensor, group["params"]) if p in factors]
    if given:
        raise ValueError(
            f"params has {names(given)} in its param groups, which the triples bring: leave the factors out, as "
            "other_parameters(model, triples) does. Their own options go with the triples, "
            '{"triples": triples, "weight_decay": 0.1}'
        )


def as_list(params: Any) -> list[Any]:
    """Return the "params" of a group as a list, so that a generator can be read more than once."""
    return [params] if isinstance(params, Tensor) else list(params)


def checked_ratio(ratio: object, what: str) -> float:
    """Return an update_ratio as a float, or raise an error that calls it `what`."""
    number = as_float(ratio)
    if number is None:
        raise TypeError(f"{what} is a number (or a callable step -> number), got {ratio!r}")
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{what} must be finite and not negative, got {ratio}")
    return number


def checked_count(count: object, what: str) -> int:
    """Return a number of steps as an int, or raise an error that calls it `what`."""
    number = as_int(count)
    if number is None:
        raise TypeError(f"{what} is an int (a number of steps), got {count!r}")
    if number < 0:
        raise ValueError(f"{what} must not be negative, got {count}")
    return number


def _parse_group(entry: dict[str, Any], settings: Settings, first: int) -> tuple[DeltaGroup, dict[str, Any]]:
    if "triples" not in entry:
        raise ValueError(f"a dict in triples needs the key 'triples', got the keys {sorted(map(str, entry))}")
    own = {name: entry.pop(name) for name in ("update_ratio", "start_step", "scaling") if name in entry}
    if own:
        settings = replace(settings, **own)
    if "params" in entry:
        entry["params"] = as_list(entry["params"])
    members = list(entry.pop("triples"))
    if not members:
        raise ValueError("a dict in triples has an empty 'triples' list: there is no W to move")
    return DeltaGroup([_as_triple(m, settings.scaling, i) for i, m in enumerate(members, first)], settings), entry


def _as_triple(entry: object, scaling: float, number: int) -> LoRATriple:
    if isinstance(entry, LoRATriple):
        return entry if entry.name is not None else entry.named(f"triple{number}")
    if isinstance(entry, tuple) and len(entry) == 3:
        return LoRATriple(*entry, scaling=scaling, name=f"triple{number}")
    raise TypeError(
        f"triples[{number}] is a LoRATriple or a tuple (W, A, B), got {type(entry).__name__}"
        + (f" of length {len(entry)}" if isinstance(entry, tuple) else "")
        + ": find_triples(model) returns the triples of a model; what else trains is given as params"
    )


def _tensor(entry: Any) -> Any:
    return entry[1] if isinstance(entry, tuple) else entry
