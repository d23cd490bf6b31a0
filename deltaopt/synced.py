"""What has to be the same on the ranks of a run, compared: `DeltaLoRAOptimizer.check_synced`.

Under data parallelism nothing is sent in a step. A W that is moved by equal steps from equal bits stays equal; where
one of these was not equal, nothing else would show it: the factors are the same on all ranks, and each W is another
one. So it is with a block of a sharded W that several ranks hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deltaopt.checkpoint.fingerprint import whole_hash
from deltaopt.groups import DeltaGroup
from deltaopt.layouts import shape
from deltaopt.messages import layers
from deltaopt.ranks import Ranks, RanksDisagreeError, alike, named, on_ranks
from deltaopt.sharding import is_sharded, local_part, place_of
from deltaopt.tensors import is_plain
from deltaopt.weight import WeightState

EVENT = "check_synced()"

Bits = list[list[str]]
"""Of each tensor, which part of it is on this rank, and the hash of that: compared between ranks with the same part."""

Facts = dict[str, str | Bits | None]
"""Values by name as text. None is not compared: a rank cannot read it, or keeps it in a form of its own."""

SAME = "give every rank the same"

WAYS_OUT = {
    "step count": (
        "a rank has left out a step(): all ranks have to take the same steps (under torch.distributed.algorithms.Join "
        "with uneven inputs the rank that ends first takes over the model of the last one, but not its optimizer)"
    ),
    "skipped updates": (
        "a factor became NaN or infinite on some ranks only, after the gradients were averaged (clipping or a hook "
        "that differs, broken memory): these ranks left W alone, and the others moved it"
    ),
    "restarts and resyncs": "all ranks have to call restart(), resync(), train() and eval() alike",
    "torch": "install the same version everywhere: another one may round and draw otherwise",
    "deltaopt": "install the same version everywhere",
    "W": (
        "load or broadcast the weights before the model is wrapped and the optimizer is built. "
        "DistributedDataParallel copies rank 0's once, in its constructor, and not with init_sync=False"
    ),
    "A and B": "their gradients were not averaged, a rank has left out a step(), or they began with other values",
    "the base": "W was another one when it first moved: load or broadcast the weights before",
    "the compensation": "it was lost on a rank: load_state_dict() with the whole state on every rank",
    "the ledger": "A and B were others in an earlier step, or W was loaded with the state of another one",
}
"""By what differs: why, and what to do. Settings have `SAME`."""

BITS = ("A and B", "W", "the base", "the compensation", "the ledger")
"""Compared as hashes, which a message does not show. The first ones may be the cause of the others."""

CLOSING = (
    "What differs stays different: load one checkpoint of the model and of the optimizer on every rank; or, before the "
    "first step, broadcast the model from one rank and build the optimizer again"
)


def ranks_of(group: Any) -> Ranks:
    """Return the ranks of a process group, by default of the default group; none where this process has no group."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks(())
    if group is None:
        return Ranks(range(dist.get_world_size()))
    found = dist.get_process_group_ranks(group)
    return Ranks(found if dist.get_rank() in found else ())


def check(ranks: Ranks, facts: Mapping[str, Any] | None, error: Exception | None, event: str = EVENT) -> None:
    """Compare what all ranks say; a collective.

    Args:
        ranks: that are compared.
        facts: of this rank, see `facts_of`.
        error: why this rank has none.
        event: that compares them, for messages.

    Raises:
        RanksDisagreeError: on all ranks, with everything that differs.
        Exception: `error`, on the rank that has it.
    """
    lines = differences(ranks.gather(event, facts, error))
    if lines:
        raise RanksDisagreeError("\n".join(["the ranks are not in sync:", *(f"  {line}" for line in lines), CLOSING]))


def facts_of(
    run: Mapping[str, object], groups: Sequence[DeltaGroup], weights: Sequence[WeightState], contents: bool = True
) -> dict[str, Any]:
    """Return what is compared of this rank: of the run as a whole, and of each layer in order.

    Args:
        run: settings and counts of the optimizer, by name.
        groups: of the triples.
        weights: all of them.
        contents: compare what is in the tensors too. Every element of each W is read, and the device is waited for.
    """
    from deltaopt import __version__

    whole = {**run, "number of groups": len(groups), "torch": torch.__version__, "deltaopt": __version__}
    return {
        "run": {name: str(value) for name, value in whole.items()},
        "layers": [[weight.label, _settings(weight) | (_contents(weight) if contents else {})] for weight in weights],
    }


def _settings(weight: WeightState) -> Facts:
    triple, group, tensors = weight.triple, weight.group, weight.tensors
    stored = (tensors.W, *tensors.stored)
    ratio = f"a callable, last {weight.ratio}" if callable(group.update_ratio) else str(group.update_ratio)
    return {
        "update_ratio": ratio,
        "start_step": str(group.start_step),
        "scaling": f"{triple.scaling}",
        "the folded update_ratio": str(triple.folded),
        "layout": f"{triple.layout}, rows={triple.rows}, columns={triple.columns}",
        "shapes": ", ".join(map(shape, stored)),
        "dtypes": ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in stored),
        "placements": ", ".join(map(_placed, stored)) if any(map(is_sharded, stored)) else None,
    }


def _contents(weight: WeightState) -> Facts:
    tensors, kept, place = weight.tensors, weight.compensation, place_of(weight.tensors.W)
    is_gathered = weight.piece is not None and not is_sharded(tensors.W)
    readable = is_plain(local_part(tensors.W)) and not weight.weight_problems()
    return {
        "A and B": _bits(*tensors.stored),
        "W": _bits(weight.part(), place=place) if readable else None,
        "the compensation": "none" if kept is None else None if is_gathered else _bits(kept.bits, place=place),
        "the base": "none" if weight.base is None else str(weight.base.record()),
        "the ledger": _ledger(weight),
    }


def _ledger(weight: WeightState) -> str | None:
    ledger = weight.ledger
    end = ledger.end or ()
    if ledger.lost is not None:
        return ledger.lost
    # When terms are summed up depends on when a device's messages arrive.
    terms = [] if ledger.is_matrix else [term for term in ledger.terms if not term.is_zero()]
    hashes = [_bits(*(tensor for term in terms for tensor in term[1:])), _bits(*end)]
    if None in hashes or ledger.is_matrix:
        return None
    return json.dumps([ledger.coef, [term.coef for term in terms], hashes])


def _placed(tensor: Tensor) -> str:
    if not is_sharded(tensor):
        return "whole"
    sharded: Any = tensor
    return f"{tuple(sharded.placements)} on a mesh of {tuple(sharded.device_mesh.shape)}"


def _bits(*tensors: Tensor, place: str = "") -> Bits | None:
    """Return hashes of all elements that are here; None where one of the tensors is not readable here.

    Args:
        tensors: sharded or not.
        place: which part of a sharded one these tensors are, where they are not sharded themselves.
    """
    if any(not is_plain(local_part(tensor)) or tensor.is_meta for tensor in tensors):
        return None
    hashes: dict[str, list[int]] = {}
    for tensor in tensors:
        hashes.setdefault(place_of(tensor) or place, []).append(whole_hash(local_part(tensor)))
    return [[at, hashlib.blake2b(str(found).encode(), digest_size=8).hexdigest()] for at, found in hashes.items()]


_Parts = tuple[tuple[int, ...], ...]
"""Ranks with equal values, the most first."""


class _Setting(NamedTuple):
    """A setting that differs: layers in which it does so alike are told in one line.

    Attributes:
        name: of the setting.
        between: the ranks.
        values: in that order.
    """

    name: str
    between: _Parts
    values: tuple[str, ...]


def differences(said: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Return a line for each difference between what the ranks say, what may be the cause of others first."""
    runs = {rank: it["run"] for rank, it in said.items()}
    lines = []
    for name in dict.fromkeys(name for run in runs.values() for name in run):
        values = {rank: run.get(name, "nothing") for rank, run in runs.items()}
        if len(set(values.values())) > 1:
            lines.append(f"{name}: {on_ranks(values)}: {WAYS_OUT.get(name, SAME)}")
    by_layer = {rank: dict(it["layers"]) for rank, it in said.items()}
    lines += _sets(by_layer)
    found: dict[_Setting, list[str]] = {}
    bits: dict[_Parts, dict[str, list[str]]] = {}
    for label in dict.fromkeys(label for facts in by_layer.values() for label in facts):
        for name, parts in _parted({rank: facts[label] for rank, facts in by_layer.items() if label in facts}):
            between = tuple(tuple(ranks) for _, ranks in parts)
            if name in BITS:
                bits.setdefault(between, {}).setdefault(name, []).append(label)
            else:
                found.setdefault(_Setting(name, between, tuple(value for value, _ in parts)), []).append(label)
    lines += [_setting_line(setting, labels) for setting, labels in found.items()]
    explained = bool(lines)
    return lines + [line for between, names in bits.items() for line in _bits_lines(between, names, explained)]


def _sets(by_layer: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Say which triples are not on all ranks; if all are, whether they come in the same order."""
    have: dict[tuple[int, ...], list[str]] = {}
    for label in dict.fromkeys(label for facts in by_layer.values() for label in facts):
        have.setdefault(tuple(rank for rank in sorted(by_layer) if label in by_layer[rank]), []).append(label)
    all_ranks = tuple(sorted(by_layer))
    lines = [
        f"{layers(labels)} only on {named(ranks)}: register the same triples, under the same names, on every rank"
        for ranks, labels in have.items()
        if ranks != all_ranks
    ]
    orders = {rank: json.dumps(list(facts)) for rank, facts in by_layer.items()}
    if not lines and len(set(orders.values())) > 1:
        (_, first), *others = alike(orders)
        other = [rank for _, ranks in others for rank in ranks]
        lines = [
            f"the order of the triples: {named(other)} {'has' if len(other) == 1 else 'have'} another one than "
            f"{named(first)}: hand them over in the same order on every rank"
        ]
    return lines


def _parted(facts: Mapping[int, Facts]) -> list[tuple[str, list[tuple[str, list[int]]]]]:
    """Return each fact of one layer that differs, with its values and their ranks: those of most ranks first."""
    found = []
    for name in next(iter(facts.values()), {}):
        values = {rank: value for rank, its in facts.items() if (value := its.get(name)) is not None}
        for compared in _comparable(values):
            if len(set(compared.values())) > 1:
                found.append((name, sorted(alike(compared), key=lambda part: (-len(part[1]), part[1]))))
    return found


def _comparable(values: Mapping[int, str | Bits]) -> list[dict[int, str]]:
    """Return values of ranks as text, those that have to be equal together: all, or those of one part of a tensor."""
    bits = {rank: value for rank, value in values.items() if not isinstance(value, str)}
    if not any(bits.values()) or len(bits) < len(values):
        return [{rank: str(value) for rank, value in values.items()}]
    places = dict.fromkeys(place for value in bits.values() for place, _ in value)
    return [{rank: hash_ for rank, value in bits.items() for at, hash_ in value if at == place} for place in places]


def _setting_line(setting: _Setting, labels: Sequence[str]) -> str:
    values = {rank: value for value, ranks in zip(setting.values, setting.between, strict=True) for rank in ranks}
    return f"{setting.name} of {layers(labels)}: {on_ranks(values)}: {WAYS_OUT.get(setting.name, SAME)}"


def _bits_lines(between: _Parts, names: Mapping[str, list[str]], explained: bool) -> list[str]:
    """Return a line for all that differs in the same layers between these ranks.

    Args:
        between: the ranks.
        names: of what differs there, with the layers.
        explained: other lines tell the cause.
    """
    first, *others = between
    ranks = sorted(rank for part in others for rank in part)
    differ = f"{named(ranks)} {'differs' if len(ranks) == 1 else 'differ'} from {named(first)}"
    differ += ", and each other" * (len(others) > 1)
    together: dict[tuple[str, ...], list[str]] = {}
    for name in BITS:
        if name in names:
            together.setdefault(tuple(names[name]), []).append(name)
    lines = []
    for labels, its in together.items():
        line = f"{', '.join(its)} of {layers(labels)}: {differ}"
        lines.append(line if explained else f"{line}: {WAYS_OUT[its[0]]}")
        explained = True
    return lines
