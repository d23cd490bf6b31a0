"""``inspect CHECKPOINT``: the run, the step, how far each W had moved, and which adapter is right with it."""

from __future__ import annotations

import argparse
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaopt.cli.adapters import AdapterFolder
from deltaopt.cli.checkpoint import Checkpoint, SavedState, opened
from deltaopt.cli.files import tensors_of_model
from deltaopt.cli.movement import Layer, SavedWeight, are_factors_of, layers_of, record_of
from deltaopt.cli.outcome import Outcome, UserError
from deltaopt.tables import grouped, span, table

ROWS = 14
"""The layers that have a row of their own; more are shown by the last part of their names."""

UNKNOWN = "?"
"""A number that the state does not tell; a column of these alone is left out."""

EXAMPLES = """examples:
  deltaopt inspect run/checkpoint-500            a checkpoint of Trainer's
  deltaopt inspect state                         a folder of Accelerate's save_state
  deltaopt inspect optimizer.pt --adapter mine   a file of optimizer.state_dict(), and the adapter saved with it
  deltaopt inspect run/checkpoint-500 --base models/llama    how far each W moved, relative to the base
  deltaopt inspect mine                          an adapter: does it need weights that have moved?
  deltaopt inspect run/checkpoint-500 --json     the same as data, every layer by itself
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.description = (
        "Say what is in a checkpoint: which run and step, how far each W had moved, and which adapter gives the "
        "trained model. Nothing in the files is executed."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a file with optimizer.state_dict(), also within a dict or a Lightning checkpoint; or a folder of "
        "Trainer's, of Accelerate's save_state, or of a PEFT adapter",
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="the folder of the adapter that was saved with it, where it has none itself"
    )
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="the folder of the pretrained weights, to say how far each W moved relative to it",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Look into the checkpoint.

    Raises:
        UserError: if it is none, or cannot be read.
    """
    checkpoint = opened(arguments.checkpoint, arguments.adapter)
    if not checkpoint.states:
        return _adapter_alone(checkpoint)
    records = [record_of(state.content, f"{state.file}{state.place}") for state in checkpoint.states]
    checkpoint = _with_own_adapter(checkpoint, [saved for _, saved in records], arguments.adapter)
    base = [] if arguments.base is None else _base(Path(arguments.base))
    pairs = zip(checkpoint.states, records, strict=True)
    parts = [_state(checkpoint, state, record, saved, base) for state, (record, saved) in pairs]
    _check_base(arguments.base, parts)
    moved = any(layer["moved"] for part in parts for layer in part.data["layers"])
    whole = all(layer["weight"] == "moved" for part in parts for layer in part.data["layers"] if layer["moved"])
    folded = any(layer["folded"] for part in parts for layer in part.data["layers"])
    use = _use(checkpoint, moved, moved and whole, folded, arguments.base or "MODEL")
    step = "" if checkpoint.trainer_step is None else f", global step {checkpoint.trainer_step}"
    text = [f"{checkpoint.path}: {checkpoint.kind}{step}", *(part.text for part in parts)]
    data: dict[str, Any] = {
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "trainer_step": checkpoint.trainer_step,
        "states": [part.data for part in parts],
        "adapter": None if checkpoint.adapter is None else checkpoint.adapter.summary(),
        "export": None if checkpoint.export is None else str(checkpoint.export),
        "moved": moved,
        **use.data,
    }
    return Outcome("\n".join([*text, use.text]), data)


def _with_own_adapter(
    checkpoint: Checkpoint, saved: Sequence[Mapping[str, SavedWeight]], named: str | None
) -> Checkpoint:
    """Return the checkpoint, without an adapter in its folder that is of another step or run.

    Args:
        checkpoint: as opened.
        saved: the weights of its states.
        named: the adapter that the user has named.

    Raises:
        UserError: if that is the one.
    """
    adapter = checkpoint.adapter
    if adapter is None or are_factors_of(
        [weight for each in saved for weight in each.values()], adapter.tensors.values()
    ):
        return checkpoint
    if named is not None:
        raise UserError(
            f"--adapter {named} is not the adapter of this state: none of its tensors is an A or B as they were. Take "
            "the one that was saved at the same moment"
        )
    warnings.warn(
        f"the adapter in {adapter.path} was left out: none of its tensors is an A or B of the state next to it, so it "
        "is of another step, or an export",
        stacklevel=2,
    )
    return checkpoint._replace(adapter=None)


def _base(folder: Path) -> list[tuple[str, Tensor]]:
    base = list(tensors_of_model(folder))
    if not base:
        raise UserError(f"--base {folder} is no folder with weights of a model (model*.safetensors)")
    return base


def _check_base(base: str | None, parts: Sequence[Outcome]) -> None:
    """Raise UserError if no W of the base is the one of any layer."""
    layers = [layer for part in parts for layer in part.data["layers"] if layer["asked"] is not None]
    if base is not None and layers and all(layer["relative"] is None for layer in layers):
        raise UserError(f"--base {base} is not the model that was fine-tuned: no tensor in it is a W of this state")


def _state(
    checkpoint: Checkpoint,
    state: SavedState,
    record: dict[str, Any],
    saved: Mapping[str, SavedWeight],
    base: list[tuple[str, Tensor]],
) -> Outcome:
    where = f"{state.file.name}{state.place}"
    factors = [] if checkpoint.adapter is None else list(checkpoint.adapter.tensors.items())
    layers = layers_of(record, saved, checkpoint.weights(), factors, base)
    groups = [
        {
            "update_ratio": group["update_ratio"],
            "start_step": group["start_step"],
            "layers": len(group["triples"]),
        }
        for group in record["groups"]
    ]
    data = {
        "place": where,
        "schema": record["schema"],
        "weight_update": record["weight_update"],
        "step": record["step_count"],
        "skipped_updates": record["skipped_updates"],
        "rounding_seed": record["rounding_seed"],
        "groups": groups,
        "layers": [layer._asdict() for layer in layers],
    }
    return Outcome("\n".join(_lines(data, layers)), data)


def _lines(data: dict[str, Any], layers: Sequence[Layer]) -> list[str]:
    groups = data["groups"]
    settings = [
        f"update_ratio {_ratio(group['update_ratio'])}, start_step {group['start_step']}"
        + (f" ({group['layers']} layers)" if len(groups) > 1 else "")
        for group in groups
    ]
    folded = any(layer.folded for layer in layers)
    asked = [layer for layer in layers if layer.asked or (layer.asked is None and layer.moved)]
    dtypes = ", ".join(sorted({layer.dtype or "a format that cannot be read (quantized?)" for layer in layers}))
    lines = [
        f"state: {data['place']}, schema {data['schema']}, weight_update {data['weight_update']!r}",
        f"steps: {data['step']}; {'; '.join(settings)}; skipped updates: {data['skipped_updates']}",
        f"layers whose {'effective ' * folded}W was asked to move: {len(asked)} of {len(layers)}; "
        f"rank {span([layer.rank for layer in layers], '{}'.format)}; W is in {dtypes}, {_places(layers)}",
    ]
    rows = [("moves", "asked for", "of W", "layers"), *(_row(name, row) for name, row in by_last_name(layers))]
    columns = [column for column in zip(*rows, strict=True) if any(cell != UNKNOWN for cell in column[1:])]
    lines += table(list(zip(*columns, strict=True)))
    for note in dict.fromkeys(layer.note for layer in layers if layer.note):
        about = [layer.name for layer in layers if layer.note == note]
        lines.append(f"note: {note}" + (f" ({len(about)} of {len(layers)} layers)" if len(about) < len(layers) else ""))
    return lines


def by_last_name(layers: Sequence[Layer]) -> list[tuple[str, list[Layer]]]:
    """Return rows of a table: each layer by itself or, of more than `ROWS`, those of one last name together."""
    if len(layers) <= ROWS:
        return [(layer.name, [layer]) for layer in layers]
    rows = grouped(layers, _last_name)
    return [(f"{len(row)}: ...{_last_name(row[0])}" if len(row) > 1 else row[0].name, row) for row in rows]


def _last_name(layer: Layer) -> str:
    return layer.name.rpartition(".")[2]


def _row(name: str, layers: Sequence[Layer]) -> tuple[str, str, str, str]:
    relative = [None if layer.relative is None else 100 * layer.relative for layer in layers]
    return (
        span([layer.moves for layer in layers], "{}".format, UNKNOWN),
        span([layer.asked for layer in layers], "{:.3g}".format, UNKNOWN),
        span(relative, "{:.3g} %".format, UNKNOWN),
        name,
    )


def _ratio(ratio: float | None) -> str:
    return "a callable (not saved)" if ratio is None else f"{ratio:g}"


def _places(layers: Sequence[Layer]) -> str:
    found = {layer.weight for layer in layers}
    if found == {"absent"}:
        return "and not in this checkpoint"
    if "absent" in found:
        return "and in this checkpoint for some layers alone"
    return "and in this checkpoint as it had moved" if "moved" in found else "and in this checkpoint as its base"


def _use(checkpoint: Checkpoint, moved: bool, whole: bool, folded: bool, base: str) -> Outcome:
    """Say which adapter gives the trained model, and on which weights."""
    own = None if checkpoint.adapter is None else str(checkpoint.adapter.path)
    options = [*_adapter_option(checkpoint), "--base", base, "--out", "DIR"]
    command = shlex.join(["deltaopt", "export", str(checkpoint.path), *options])
    if not moved:
        note = "its factors hold the folded ratio" if folded else "no W has moved"
        text = f"use: {own or 'the adapter that was saved with it'}, on the base as it is ({note})"
        return Outcome(text, {"use": own, "use_on": "base", "command": None})
    alone, are = ("A and B", "are") if own is None else (f"the adapter in {own}", "is")
    if checkpoint.export is not None:
        text = f"use: {checkpoint.export}, on the pristine base. {alone[0].upper()}{alone[1:]} {are} for resuming only"
        return Outcome(text, {"use": str(checkpoint.export), "use_on": "base", "command": None})
    if whole:
        text = f"use: all weights of this checkpoint together; {alone} without this W {are} another model. "
    else:
        text = f"use: none of these files by itself; {alone} {are} right only next to the moved W. "
    if checkpoint.adapter is not None and checkpoint.adapter.config["peft_type"] != "LORA":
        text += (
            "For plain LoRA factors on the pristine base, resume the run and take deltaopt.export_adapter(optimizer): "
            f"PEFT's files of {checkpoint.adapter.config['peft_type']} cannot hold the change of W"
        )
        return Outcome(text, {"use": None, "use_on": "moved weights", "command": None})
    text += f"For an adapter on the pristine base: {command}"
    return Outcome(text, {"use": None, "use_on": "moved weights", "command": command})


def _adapter_option(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.adapter is None:
        return ["--adapter", "DIR"]
    inside = checkpoint.adapter.path.is_relative_to(checkpoint.path)
    return [] if inside else ["--adapter", str(checkpoint.adapter.path)]


def _adapter_alone(checkpoint: Checkpoint) -> Outcome:
    assert checkpoint.adapter is not None
    adapter = checkpoint.adapter.summary()
    lines = [
        f"{checkpoint.path}: {checkpoint.kind} ({adapter['method'] or 'of an unknown method'}), without a state of "
        "a DeltaLoRAOptimizer",
        f"rank {adapter['rank']}, alpha {adapter['alpha']}, {adapter['tensors']} tensors, base model: "
        f"{adapter['base_model'] or 'not said'}",
        _use_of(checkpoint.adapter),
    ]
    use = None if checkpoint.adapter.needs_moved_weights else adapter["path"]
    data: dict[str, Any] = {
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "trainer_step": None,
        "states": [],
        "adapter": adapter,
        "export": None,
        "moved": True if checkpoint.adapter.needs_moved_weights else None,
        "use": use,
        "use_on": "base" if use else "moved weights",
        "command": None,
    }
    return Outcome("\n".join(lines), data)


def _use_of(adapter: AdapterFolder) -> str:
    if not adapter.needs_moved_weights:
        return f"use: {adapter.path}, on its base. Nothing in the folder says that a W has moved under it"
    return (
        "use: not by itself. It was saved alone after Delta-LoRA had moved W, and on the pristine base it is another "
        "model. With the optimizer's state of the same moment: deltaopt export STATE.pt "
        f"--adapter {shlex.quote(str(adapter.path))} --base MODEL --out DIR"
    )
