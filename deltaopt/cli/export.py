"""``export CHECKPOINT --base MODEL --out DIR``: what training changed, as one PEFT adapter on the pristine base."""

from __future__ import annotations

import argparse
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from deltaopt.checkpoint.format import COMPENSATION, KEY
from deltaopt.checkpoint.resume import WeightMismatchError
from deltaopt.cli.adapters import AdapterFolder
from deltaopt.cli.checkpoint import Checkpoint, opened
from deltaopt.cli.movement import SavedWeight, record_of
from deltaopt.cli.outcome import Outcome, UserError, refusals
from deltaopt.messages import layers
from deltaopt.naming import differ_by_wrappers
from deltaopt.optimizer import DeltaLoRAOptimizer
from deltaopt.triple import LoRATriple

EXAMPLES = """examples:
  deltaopt export run/checkpoint-500 --base models/llama --out served
  deltaopt export run/checkpoint-500 --base models/llama --out served --rank 16
  deltaopt export optimizer.pt --adapter mine --base models/llama --out served
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.description = (
        "Write what training changed, the movement of W and the branch, as one plain PEFT LoRA adapter for the "
        "pristine base. It needs the base and the checkpoint, and not the training script. It runs on the CPU."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint of Trainer's, or a file with optimizer.state_dict()"
    )
    parser.add_argument("--base", metavar="MODEL", required=True, help="the pretrained model: a folder, or a Hub name")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder to write")
    parser.add_argument(
        "--adapter", metavar="DIR", help="the folder of the adapter that was saved with it, where it has none itself"
    )
    parser.add_argument("--rank", metavar="R", type=_rank, help="compress each layer to this rank; default: exact")
    parser.add_argument(
        "--force",
        action="store_true",
        help="write to a folder that is not empty: files of the same names are replaced, others stay",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Write the adapter, and load it again.

    Raises:
        UserError: if something is wrong with what was given. Nothing is written then.
    """
    out = Path(arguments.out)
    _check_out(out, arguments)
    checkpoint = opened(arguments.checkpoint, arguments.adapter)
    state, adapter = _parts(checkpoint)
    record, weights = record_of(state, f"{checkpoint.states[0].file}{checkpoint.states[0].place}")
    if not weights:
        raise UserError(f"{checkpoint.path} was saved by without_ledger(): how far W had moved is not in it")
    _check_installed()
    from deltaopt.cli.base_model import check_fits, load_base, logits_of, quiet, with_adapter

    with quiet():
        from deltaopt.integrations.peft import save_adapter

    base = load_base(arguments.base, adapter, _dtype(weights, adapter))
    kind, dtype = type(base).__name__, str(next(base.parameters()).dtype).removeprefix("torch.")
    check_fits(base, weights, arguments.base)
    model = with_adapter(base, adapter)
    optimizer = _optimizer(model, record)
    _load(optimizer, record, state, arguments.base)
    with refusals():
        saved = save_adapter(model, optimizer, out, arguments.rank)
    trained = logits_of(model)
    del optimizer, base, model
    # What was written has to load where it will be used: on a base that nothing has touched.
    fresh = with_adapter(load_base(arguments.base, adapter, getattr(torch, dtype)), AdapterFolder(out))
    difference = None if trained is None else _relative(logits_of(fresh), trained)
    same = "" if difference is None else f"; its output differs from the trained model's by {difference:.2g} (relative)"
    if trained is not None and difference is None:
        same = "; the trained model's output is NaN or infinite, so it was not compared"
    text = [
        f"{out}: {saved!r}",
        f"of step {record['step_count']}, {len(saved)} layers, for {arguments.base} as it is ({kind}, {dtype})",
        f"checked: it loads on the base{same}",
    ]
    data = {
        "out": str(out),
        "base": arguments.base,
        "base_class": kind,
        "dtype": dtype,
        "step": record["step_count"],
        "rank": saved.rank,
        "trained_rank": saved.trained,
        "error": max(saved.values()),
        "output_difference": difference,
        "layers": {name: {"rank": saved.ranks[name], "error": error} for name, error in saved.items()},
    }
    return Outcome("\n".join(text), data)


def _rank(text: str) -> int:
    try:
        rank = int(text)
    except ValueError:
        rank = 0
    if rank < 1:
        raise argparse.ArgumentTypeError(f"a positive number, got {text!r}")
    return rank


def _check_out(out: Path, arguments: argparse.Namespace) -> None:
    """Raise UserError if the folder is a file, one of those that are read, or not empty, or cannot be made."""
    place = Path(os.path.realpath(out))
    there = next(parent for parent in (place, *place.parents) if parent.exists() or parent.is_symlink())
    if not there.is_dir() and there != place:
        raise UserError(f"--out {out} cannot be made: {there} is a file")
    if there.is_symlink():
        raise UserError(f"--out {out} cannot be made: {there} is a link to itself")
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {out} cannot be written: no permission for {there}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    read = {"checkpoint": arguments.checkpoint, "--adapter": arguments.adapter, "--base": arguments.base}
    for what, path in read.items():
        if path is not None and place == Path(os.path.realpath(path)):
            raise UserError(f"--out {out} is the folder of the {what}, which would be overwritten: name another one")
    if out.is_dir() and any(out.iterdir()) and not arguments.force:
        raise UserError(f"--out {out} is not empty: name another folder, or say --force to replace what is written")


def _parts(checkpoint: Checkpoint) -> tuple[dict[str, Any], AdapterFolder]:
    """Return the state and the adapter of the checkpoint.

    Raises:
        UserError: if one of them is missing, or there are several states.
    """
    path = checkpoint.path
    if not checkpoint.states:
        why = (
            "it was saved alone, and needs"
            if checkpoint.adapter and checkpoint.adapter.needs_moved_weights
            else ("nothing in it says that a W has moved. If one has, give")
        )
        raise UserError(
            f"{path} is an adapter without a state of a DeltaLoRAOptimizer: {why} the optimizer's state of the same "
            f"moment: deltaopt export STATE.pt --adapter {path} --base MODEL --out DIR"
        )
    if len(checkpoint.states) > 1:
        places = ", ".join(f"{state.file.name}{state.place}" for state in checkpoint.states)
        raise UserError(f"{path} holds {len(checkpoint.states)} states ({places}): save one in a file of its own")
    if checkpoint.adapter is None:
        raise UserError(
            f"{path} holds no adapter: name the folder of the one that was saved with it, --adapter DIR. A run without "
            "PEFT has none: load its state in its script, and take deltaopt.export_adapter(optimizer)"
        )
    checkpoint.adapter.check()
    if checkpoint.adapter.is_cut:
        there = checkpoint.export is not None
        raise UserError(
            f"AdaLoRA's budget has cut the adapter in {checkpoint.adapter.path}: it lacks rows of the factors that the "
            "state is of. "
            + (
                f"Take {checkpoint.export}, which DeltaLoRACallback has written for the base"
                if there
                else "Call deltaopt.integrations.peft.save_adapter(model, optimizer, DIR) in the program that trains"
            )
        )
    return checkpoint.states[0].content, checkpoint.adapter


def _check_installed() -> None:
    """Raise UserError if a library is missing that loads the base and the adapter."""
    missing = [name for name in ("peft", "transformers") if find_spec(name) is None]
    if missing:
        raise UserError(f"export needs {' and '.join(missing)}: pip install peft transformers")


def _dtype(saved: Mapping[str, SavedWeight], adapter: AdapterFolder) -> torch.dtype:
    """Return the dtype that most W had.

    Raises:
        UserError: if none could be read.
    """
    dtypes = Counter(W["dtype"] for ledger, _ in saved.values() if (W := ledger.W) is not None)
    if not dtypes:
        raise UserError(
            f"the W of {layers(list(saved))} could not be read in training (quantized), and so did not move: use the "
            f"adapter in {adapter.path} as it is, on the base"
        )
    return getattr(torch, dtypes.most_common(1)[0][0])  # type: ignore[no-any-return]


def _optimizer(model: Any, record: dict[str, Any]) -> DeltaLoRAOptimizer:
    """Return an optimizer of the triples in the order of the state. It never steps.

    Raises:
        UserError: if the model has not these layers.
    """
    from deltaopt.integrations import find_triples

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of training, and of layers with dropout or shared weights
        with refusals(ValueError):
            triples = find_triples(model, allow_dropout=True, allow_tied=True)
            names = [triple["name"] for group in record["groups"] for triple in group["triples"]]
            if not _by_name(triples, names):  # of transformers' add_adapter
                triples = find_triples(model.get_base_model(), allow_dropout=True, allow_tied=True)
        found = _by_name(triples, names)
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(f"the adapter on this base has no {layers(missing)}, which the state is of")
        groups = [
            {
                "triples": [found[triple["name"]] for triple in group["triples"]],
                "update_ratio": group["update_ratio"] or 0.0,
                "start_step": group["start_step"],
            }
            for group in record["groups"]
        ]
        with refusals():
            # Compensated: the rebuilt W is as exact as the ledger. SGD: the moments play no part here.
            return DeltaLoRAOptimizer(
                torch.optim.SGD, groups, lr=0.0, weight_update=record["weight_update"], rounding="compensated"
            )


def _by_name(triples: list[LoRATriple], names: list[str]) -> dict[str, LoRATriple]:
    """Return by saved name the triple of this name, or of this name without what wraps a model."""
    exact = {triple.label: triple for triple in triples}
    found = {}
    for name in names:
        triple = exact.get(name) or next((each for each in triples if differ_by_wrappers(each.label, name)), None)
        if triple is not None:
            found[name] = triple
    return found


def _load(optimizer: DeltaLoRAOptimizer, record: dict[str, Any], state: dict[str, Any], base: str) -> None:
    """Load the ledgers and settings of the state, so that every W and branch is as it was.

    Raises:
        UserError: if the base or the adapter are not those of the state.
    """
    ledgers = {
        number: {key: value for key, value in entries.items() if _is_ledger(key)}
        for number, entries in state["state"].items()
    }
    here = optimizer.state_dict()
    groups = [{**group, KEY: record} for group in here["param_groups"]]
    try:
        with refusals(RuntimeError):
            optimizer.load_state_dict({"state": ledgers, "param_groups": groups})
    except WeightMismatchError as error:
        found = [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
        raise UserError(
            f"--base {base} and the adapter are not those of this state (another model, another step, or a base that "
            f"is not pristine): {'; '.join(found)}"
        ) from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _is_ledger(key: object) -> bool:
    return str(key).split(".")[0] == KEY and not str(key).startswith(COMPENSATION)


def _relative(one: torch.Tensor | None, other: torch.Tensor) -> float | None:
    """Return the distance of an output to another one, relative to it; None where that one is not finite."""
    if one is None or not bool(other.isfinite().all()):
        return None
    one, other = one.to(torch.float64), other.to(torch.float64)
    return float((one - other).norm() / max(float(other.norm()), torch.finfo(torch.float64).tiny))
