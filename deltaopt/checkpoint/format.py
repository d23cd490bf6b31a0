"""The format of a checkpoint: what `state_dict()` holds next to the inner optimizer's own state, written and read.

The settings are written into every param group as plain numbers, strings, lists and dicts. The ledger of each triple is
one string under the triple's name, in the state of a parameter that the triple trains. These forms survive
`torch.load(weights_only=True)`, Accelerate's and Lightning's device moves and `torch.distributed.checkpoint`, all of
which drop or refuse other places and types. (A tensor whose shape depends on what was saved, as that of a ledger does,
cannot be loaded by the last one. Its `flatten_optimizer_state_dict=True` takes numbers and tensors only, and refuses
the state when it is to be saved.)
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from deltaopt.checkpoint.compensation import saved_compensation
from deltaopt.checkpoint.records import ledger_records, triple_record
from deltaopt.groups import DeltaGroup, checked_count, checked_ratio
from deltaopt.messages import Problem, raise_problems
from deltaopt.naming import differ_by_wrappers, renamed
from deltaopt.plain import plain
from deltaopt.rounding.writer import checked_seed
from deltaopt.scaling import checked_scaling
from deltaopt.sharding import absent_ranks, ranks_of
from deltaopt.weight import WeightState

SCHEMA = 6
READ = (4, 5, 6)
"""The schemas that are read. In 4 the state of each A held the ledgers of all its triples, in one string. Up to 5 all
of a tensor was hashed in another way, and a compensation was saved as the int16 that it is."""
KEY = "deltaopt"
LEDGER = f"{KEY}.ledger."
"""In the state of a parameter, followed by the name of the triple."""
COMPENSATION = f"{KEY}.compensation."
"""In the state of a parameter, followed by the name of the triple."""
INNER = f"{KEY}.inner"
"""At the top: the state of an inner optimizer that has a form of its own, as Lookahead's."""


def inner_state(inner: Optimizer) -> dict[str, Any]:
    """Return the state_dict of the inner optimizer, in torch's form and with plain numbers and strings.

    One of another form is taken whole, under a key of its own, next to the places of our entries.

    numpy's scalars among the options of the param groups become plain numbers in the groups too: numpy computes
    ``lr * weight_decay`` of two float32 in float32, and the run that continues has to compute as the resumed one will.

    Raises:
        RuntimeError: if it is no dict, or its param groups are not those of the optimizer (shards, for example).
    """
    for group in inner.param_groups:
        group |= {key: plain(option) for key, option in group.items() if key != "params"}
    state_dict = inner.state_dict()
    if isinstance(state_dict, Mapping) and not {"state", "param_groups"} <= state_dict.keys():
        state_dict = _in_torchs_form(state_dict, inner)
    problem = _form_problem(state_dict, inner)
    if problem is not None:
        raise RuntimeError(
            f"the state of the inner {type(inner).__name__} cannot be saved: its state_dict() {problem}. Expected the "
            "form of torch.optim.Optimizer, {'state': {number: ...}, 'param_groups': [{'params': [numbers], ...}]}, in "
            "which the ledgers have their place"
        )
    return plain(state_dict)  # type: ignore[no-any-return]


def own_form(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return what the inner optimizer saved, which `inner_state` may have put under a key of its own."""
    return state_dict.get(INNER, state_dict)  # type: ignore[no-any-return]


def _in_torchs_form(state_dict: Mapping[str, Any], inner: Optimizer) -> dict[str, Any]:
    """Return a state of torch's form, with empty places for our entries, that holds a state of another form."""
    sizes = [len(group["params"]) for group in inner.param_groups]
    numbers = iter(range(sum(sizes)))
    return {"state": {}, "param_groups": [{"params": list(islice(numbers, size))} for size in sizes], INNER: state_dict}


def _form_problem(state_dict: Any, inner: Optimizer) -> str | None:
    """Say why a state_dict has no places for our entries; None if it has."""
    if not isinstance(state_dict, Mapping):
        return f"is a {type(state_dict).__name__}"
    saved = [
        len(group["params"]) if isinstance(group, Mapping) and "params" in group else None
        for group in state_dict["param_groups"]
    ]
    here = [len(group["params"]) for group in inner.param_groups]
    return None if saved == here else f"has param groups of {saved} parameters, the optimizer has {here}"


def add_record(
    state_dict: dict[str, Any],
    groups: Sequence[DeltaGroup],
    weights: Sequence[WeightState],
    step_count: int,
    repeats: int,
    skipped_updates: int,
    rounding_seed: int,
    weight_update: str,
) -> dict[str, Any]:
    """Return the inner optimizer's state_dict with our record in each param group; the input is not changed.

    Args:
        state_dict: of the inner optimizer.
        groups: with their settings.
        weights: with their tensors resolved.
        step_count: the number of steps.
        repeats: the number of restarts and resyncs since the last step, so that the next one has noise of its own.
        skipped_updates: the number of steps that left every W alone.
        rounding_seed: of stochastic rounding.
        weight_update: the name of the rule.
    """
    record = {
        "schema": SCHEMA,
        "step_count": step_count,
        "repeats": repeats,
        "skipped_updates": skipped_updates,
        "rounding_seed": rounding_seed,
        "weight_update": weight_update,
        "groups": [
            {
                # As with LambdaLR, a callable is code and not state.
                "update_ratio": None if callable(group.update_ratio) else group.update_ratio,
                "start_step": group.start_step,
                "triples": _triple_records(group, weights),
            }
            for group in groups
        ],
        "ledgers": True,
    }
    return _with_record(state_dict, record)


def _triple_records(group: DeltaGroup, weights: Sequence[WeightState]) -> list[dict[str, Any]]:
    return [triple_record(weight.triple, *weight.factors()) for weight in weights if weight.group is group]


def _with_record(state_dict: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    param_groups = [{**group, KEY: record} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": param_groups}


def split_record(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return our record and the inner optimizer's state_dict; the input is not changed.

    Raises:
        ValueError: if there is no record, or one of another schema.
    """
    missing = {"state", "param_groups"} - state_dict.keys()
    if missing:
        raise ValueError(f"this is no state of an optimizer: it has no {' and no '.join(sorted(missing))}")
    param_groups = [dict(group) for group in state_dict["param_groups"]]
    records = [group.pop(KEY, None) for group in param_groups]
    if not records or any(record is None for record in records):
        raise ValueError(
            "this state was not saved by a DeltaLoRAOptimizer: it has no step count and no triples. Load the "
            "adapter that was saved with it and begin a new run. To keep the moments of a plain optimizer, build the "
            "inner optimizer as that one was built, load its state into it, and hand it over: "
            "DeltaLoRAOptimizer(inner, triples)"
        )
    schema = records[0].get("schema")
    if schema not in READ:
        *earlier, last = READ
        read = f"{', '.join(map(str, earlier))} and {last}"
        raise ValueError(
            f"this state has the schema {schema}, this version of deltaopt reads {read}: load "
            "it with the version that wrote it"
        )
    return records[0], {**state_dict, "param_groups": param_groups}


def add_ledgers(
    state_dict: dict[str, Any],
    inner: Optimizer,
    weights: Sequence[WeightState],
    compensations: Mapping[WeightState, Tensor | None],
) -> dict[str, Any]:
    """Return `state_dict` with each triple's ledger and compensation, under its name; the input is not changed.

    They are kept in the state of a parameter, since some tools keep nothing else: in that of the triple's A, or of the
    first parameter that trains where A does not.
    """
    numbers = {
        id(p): number
        for group, saved in zip(inner.param_groups, state_dict["param_groups"], strict=True)
        for p, number in zip(group["params"], saved["params"], strict=True)
    }
    # torch.distributed.checkpoint wants state for all parameters or for none.
    state: dict[Any, dict[str, Any]] = {number: {KEY: ""} for number in numbers.values()} | state_dict["state"]
    for weight, record in zip(weights, ledger_records(weights), strict=True):
        number = next(numbers[id(parameter)] for parameter in weight.tensors.stored if id(parameter) in numbers)
        # The empty entry is the place of ledgers of schema 4, which a distributed checkpoint may bring.
        ledger = {LEDGER + weight.label: _sealed({weight.label: record})}
        state[number] = {KEY: "", **state[number], **ledger}
        compensation = compensations.get(weight)
        if compensation is not None:
            state[number][COMPENSATION + weight.label] = saved_compensation(weight, compensation)
    return {**state_dict, "state": state}


def split_ledgers(
    state_dict: dict[str, Any], schema: int = SCHEMA
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Take out of a state_dict, which is not changed, what `add_ledgers` has put in.

    Args:
        state_dict: of the inner optimizer, with our entries in its `state`.
        schema: that it was saved with. A distributed checkpoint of schema 4 comes in a template of this schema, whose
            own ledgers are those of a fresh optimizer.

    Returns:
        The records of the ledgers and the compensations as they were saved, by the triples' names, and the state_dict
        without them.

    Raises:
        ValueError: if a ledger was edited or cut off.
    """
    state = dict(state_dict["state"])
    found: dict[str, Any] = {}
    compensations: dict[str, Any] = {}
    for number, entries in state_dict["state"].items():
        if not isinstance(entries, Mapping):
            continue
        ours = [key for key in entries if key == KEY or str(key).startswith(f"{KEY}.")]
        for key in ours:
            if key.startswith(COMPENSATION):
                compensations[key.removeprefix(COMPENSATION)] = entries[key]
            elif entries[key] != "" and (key == KEY) == (schema == 4):
                found |= _opened(entries[key])
        if ours:
            state[number] = {key: value for key, value in entries.items() if key not in ours}
            if not state[number]:  # made for the ledger: the inner optimizer had nothing there
                del state[number]
    return found, compensations, {**state_dict, "state": state}


def present_names(record: dict[str, Any], weights: Sequence[WeightState]) -> dict[str, str]:
    """Return by the name under which each triple was saved its name now: a wrapper of the model may have changed it."""
    saved = [triple["name"] for group in record["groups"] for triple in group["triples"]]
    return renamed(saved, [weight.label for weight in weights])


def check_complete(state_dict: dict[str, Any]) -> None:
    """Raise ValueError for a state of which only the part of one rank is here, and the other ranks are not."""
    of_each = [entries for entries in state_dict["state"].values() if isinstance(entries, Mapping)]
    tensors = [value for entries in of_each for value in entries.values() if isinstance(value, Tensor)]
    absent = absent_ranks(tensors)
    if absent:
        raise ValueError(
            f"this state holds one rank's part of sharded tensors of the ranks {list(ranks_of(tensors))}, of which "
            f"this job has no {', '.join(map(str, absent))}: a file that each rank wrote for itself is for as many "
            "ranks. Save with torch.distributed.checkpoint, or with full_state_dict=True, for any number of ranks"
        )


def without_ledger(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Copy a state of `DeltaLoRAOptimizer` that asks nothing of W, A and B when it is loaded.

    For weights that were changed on purpose since it was saved (pruned, merged, cast): loading it restores the
    inner optimizer's state, the step count and the settings, and takes each W as it is then as the new base. What W
    had moved by before is not known any more, as after `DeltaLoRAOptimizer.rebase`.

    Args:
        state_dict: what `DeltaLoRAOptimizer.state_dict` returned; it is not changed.

    Raises:
        ValueError: if it is not such a state.
    """
    record, inner_state = split_record(state_dict)
    *_, inner_state = split_ledgers(inner_state, record["schema"])
    return _with_record(inner_state, {**record, "ledgers": False})


def without_compensation(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Copy a state of `DeltaLoRAOptimizer` without what compensated rounding has cut off from each W.

    That is as large as the weights. With an adapter it is of no use, since W and the compensation are rebuilt from the
    base; with the whole model a run resumes bit for bit with it. Without it the compensation is computed where the
    optimizer has a copy of the base (`keep_base`), or starts at zero with a warning.

    Args:
        state_dict: what `DeltaLoRAOptimizer.state_dict` returned; it is not changed.

    Raises:
        ValueError: if it is not such a state.
    """
    split_record(state_dict)
    state = {
        number: {key: value for key, value in entries.items() if not str(key).startswith(COMPENSATION)}
        for number, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _sealed(ledgers: dict[str, Any]) -> str:
    text = json.dumps(ledgers)
    return f"{zlib.crc32(text.encode()):08x} {text}"


def _opened(sealed: str) -> dict[str, Any]:
    try:
        seal, _, text = sealed.partition(" ")
        if int(seal, 16) == zlib.crc32(text.encode()):
            return dict(json.loads(text))
    except (AttributeError, ValueError):
        pass
    raise ValueError("a saved ledger was edited or cut off: its checksum differs. Take another checkpoint")


def check_record(
    record: dict[str, Any], groups: Sequence[DeltaGroup], weights: Sequence[WeightState], weight_update: str
) -> None:
    """Raise ValueError for a record of other triples, of the other `weight_update`, and for a damaged one.

    The message names each triple that differs, with what was saved and what is here.
    """
    try:
        found = _differences(record["groups"], groups, weights)
        checked_count(record["step_count"], "step_count")
        checked_count(repeats_of(record), "repeats")
        checked_count(record["skipped_updates"], "skipped_updates")
        checked_seed(record["rounding_seed"])
        if not isinstance(record["ledgers"], bool):
            raise TypeError(f"ledgers is {record['ledgers']!r}")
        saved_mode = record["weight_update"]
        for saved in record["groups"]:
            checked_count(saved["start_step"], "start_step")
            if saved["update_ratio"] is not None:
                checked_ratio(saved["update_ratio"], "update_ratio")
            for triple in saved["triples"]:
                checked_ratio(triple["folded"], "folded")
                checked_scaling(_stored(triple), "stored")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the saved record of triples is damaged or incomplete: {error!r}") from error
    if saved_mode != weight_update:
        raise ValueError(
            f"the state was saved with weight_update={saved_mode!r}, this optimizer has {weight_update!r}: they differ "
            "in what is in W and what in the branch. Build the optimizer as in the run that was saved"
        )
    raise_problems(
        ValueError, "the saved state belongs to other triples (register them as in the run that was saved)", found
    )


def repeats_of(record: dict[str, Any]) -> int:
    """Return the number of restarts and resyncs since the last step; a state that does not hold it says 0."""
    return record.get("repeats", 0)  # type: ignore[no-any-return]


def _differences(
    saved_groups: list[dict[str, Any]], groups: Sequence[DeltaGroup], weights: Sequence[WeightState]
) -> list[Problem]:
    if len(saved_groups) != len(groups):
        return [Problem("groups", f"the saved state has {len(saved_groups)}, this optimizer {len(groups)}")]
    found: list[Problem] = []
    for saved, group in zip(saved_groups, groups, strict=True):
        here = _triple_records(group, weights)
        if len(saved["triples"]) != len(here):
            found.append(Problem("triples", f"{len(saved['triples'])} were saved, {len(here)} are registered"))
            continue
        found += [
            Problem(new["name"], f"saved {_described(old)}, registered {_described(new)}")
            for old, new in zip(saved["triples"], here, strict=True)
            if not _are_same(old, new)
        ]
    return found


def _are_same(saved: dict[str, Any], here: dict[str, Any]) -> bool:
    """Tell if two records are of one triple.

    A folded branch may be registered with its present scaling, or with the first one, which stored factors are for.
    """
    if not differ_by_wrappers(saved["name"], here["name"]) or any(saved[key] != here[key] for key in "AB"):
        return False
    if saved["scaling"] == here["scaling"]:
        return True
    now, stored = saved["scaling"] * (1.0 + saved["folded"]), _stored(saved)
    possible = [now] * (saved["folded"] > 0) + [now / stored] * (stored != 1.0)
    return any(math.isclose(scaling, here["scaling"], rel_tol=1e-6) for scaling in possible)


def _stored(triple: dict[str, Any]) -> float:
    """Return the factor of A in state_dicts; a state that does not hold it says 1."""
    return float(triple.get("stored", 1.0))


def restore_settings(record: dict[str, Any], groups: Sequence[DeltaGroup]) -> None:
    """Set update_ratio and start_step as saved. A callable update_ratio stays, it is never saved."""
    for saved, group in zip(record["groups"], groups, strict=True):
        group.start_step = saved["start_step"]
        if saved["update_ratio"] is not None and not callable(group.update_ratio):
            group.update_ratio = saved["update_ratio"]


def _described(record: dict[str, Any]) -> str:
    shown = {key: value for key, value in record.items() if key not in ("folded", "stored")}
    return ", ".join(f"{key} {tuple(v) if isinstance(v, list) else v}" for key, v in shown.items())
