"""What a checkpoint without ``optimizer.pt`` keeps of the optimizer: how far W was asked to move, and the settings."""

from __future__ import annotations

from typing import Any

from deltaopt.checkpoint.format import KEY, split_ledgers, split_record, without_compensation
from deltaopt.optimizer import DeltaLoRAOptimizer


def small_state(optimizer: DeltaLoRAOptimizer) -> dict[str, Any]:
    """Return the state without the inner optimizer's moments and options, and without what rounding has cut off.

    With FSDP every rank has to call it.
    """
    state = without_compensation(optimizer.state_dict())
    return {
        "state": {
            number: ours
            for number, entries in state["state"].items()
            if (ours := {key: entry for key, entry in entries.items() if _is_ours(key) and entry != ""})
        },
        "param_groups": [{"params": group["params"], KEY: group[KEY]} for group in state["param_groups"]],
    }


def whole_state(small: dict[str, Any], optimizer: DeltaLoRAOptimizer) -> dict[str, Any]:
    """Return a state that `optimizer` can load: what was saved, with its own present moments and options.

    Raises:
        ValueError: if the optimizer has other parameters.
    """
    record, here = split_record(optimizer.state_dict())
    *_, here = split_ledgers(here, record["schema"])
    counts = [[len(group["params"]) for group in state["param_groups"]] for state in (small, here)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"the saved state has param groups of {counts[0]} parameters, this optimizer of {counts[1]}: build it as "
            "in the run that was saved"
        )
    state = dict(here["state"])
    for number, entries in small["state"].items():
        state[number] = {**state.get(number, {}), **entries}
    groups = [
        {**group, KEY: saved[KEY]} for group, saved in zip(here["param_groups"], small["param_groups"], strict=True)
    ]
    return {**here, "state": state, "param_groups": groups}


def _is_ours(key: object) -> bool:
    return str(key).split(".")[0] == KEY
