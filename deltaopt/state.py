"""What a checkpoint of the optimizer holds beside the inner optimizer's own state.

It is written into every param group as plain numbers, strings, lists and dicts: that form survives
`torch.load(weights_only=True)`, Accelerate's and Lightning's device moves and
`torch.distributed.checkpoint`, all of which drop or refuse other places and types. The last one's
`flatten_optimizer_state_dict=True` drops it all the same, and such a state is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltaopt.groups import DeltaGroup, checked_count, checked_ratio

SCHEMA = 1
KEY = "deltaopt"


def add_record(
    state_dict: dict[str, Any], groups: Sequence[DeltaGroup], step_count: int, skipped_updates: int
) -> dict[str, Any]:
    """The inner optimizer's state_dict with our record in each param group; the input is not changed."""
    record = {
        "schema": SCHEMA,
        "step_count": step_count,
        "skipped_updates": skipped_updates,
        "groups": [
            {
                # As with LambdaLR, a callable is code and not state.
                "update_ratio": None if callable(g.update_ratio) else g.update_ratio,
                "start_step": g.start_step,
                "triples": [triple.record() for triple in g.triples],
            }
            for g in groups
        ],
    }
    param_groups = [{**group, KEY: record} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": param_groups}


def split_record(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(our record, the inner optimizer's state_dict); the input is not changed.

    Raises:
        ValueError: if there is no record, or one of another schema.
    """
    param_groups = [dict(group) for group in state_dict["param_groups"]]
    records = [group.pop(KEY, None) for group in param_groups]
    if not records or any(record is None for record in records):
        raise ValueError(
            "this state was not saved by a DeltaLoRAOptimizer: it has no step count and no triples. To take over "
            "the moments of a plain optimizer's state, load it into optimizer.inner instead"
        )
    schema = records[0].get("schema")
    if schema != SCHEMA:
        raise ValueError(
            f"this state has the schema {schema}, this version of deltaopt reads {SCHEMA}: load it "
            "with the version that wrote it"
        )
    return records[0], {**state_dict, "param_groups": param_groups}


def check_record(record: dict[str, Any], groups: Sequence[DeltaGroup]) -> None:
    """Refuse a record of other triples, and a damaged one.

    Raises:
        ValueError: naming each triple that differs, with what was saved and what is here.
    """
    try:
        found = _differences(record["groups"], groups)
        checked_count(record["step_count"], "step_count")
        checked_count(record["skipped_updates"], "skipped_updates")
        for saved in record["groups"]:
            checked_count(saved["start_step"], "start_step")
            if saved["update_ratio"] is not None:
                checked_ratio(saved["update_ratio"], "update_ratio")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the saved record of triples is damaged or incomplete: {error!r}") from error
    if found:
        raise ValueError(
            "the saved state belongs to other triples (register them as in the run that was saved):\n  "
            + "\n  ".join(found)
        )


def _differences(saved_groups: list[dict[str, Any]], groups: Sequence[DeltaGroup]) -> list[str]:
    if len(saved_groups) != len(groups):
        return [f"the saved state has {len(saved_groups)} groups of triples, this optimizer {len(groups)}"]
    found = []
    for saved, group in zip(saved_groups, groups, strict=True):
        here = [triple.record() for triple in group.triples]
        if len(saved["triples"]) != len(here):
            found.append(f"{len(saved['triples'])} triples were saved, {len(here)} are registered")
            continue
        found += [
            f"{new['name']}: saved {_told(old)}, registered {_told(new)}"
            for old, new in zip(saved["triples"], here, strict=True)
            if old != new
        ]
    return found


def restore_settings(record: dict[str, Any], groups: Sequence[DeltaGroup]) -> None:
    """Set update_ratio and start_step as saved. A callable update_ratio stays, it is never saved."""
    for saved, group in zip(record["groups"], groups, strict=True):
        group.start_step = saved["start_step"]
        if saved["update_ratio"] is not None and not callable(group.update_ratio):
            group.update_ratio = saved["update_ratio"]


def _told(record: dict[str, Any]) -> str:
    return ", ".join(f"{key} {tuple(v) if isinstance(v, list) else v}" for key, v in record.items())
