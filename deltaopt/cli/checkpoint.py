"""What a user calls a checkpoint: a file, or a folder of Trainer's, Accelerate's or PEFT's; which parts it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from deltaopt.checkpoint.format import KEY
from deltaopt.cli.adapters import CONFIG, AdapterFolder, adapter_in
from deltaopt.cli.files import read, read_json, states_in, tensors_in, tensors_of_model
from deltaopt.cli.outcome import UserError

TRAINER = "a checkpoint of transformers' Trainer"
ACCELERATE = "a folder of Accelerate's save_state"
LIGHTNING = "a Lightning checkpoint"
FILE = "a file of torch.save"
ADAPTER = "a PEFT adapter"
EXPORT = "an adapter that DeltaLoRACallback has exported"

STATE_FILES = ("optimizer.pt", "deltaopt_state.pt", "optimizer*.bin")
"""The files in which Trainer, `DeltaLoRACallback` and Accelerate keep states of optimizers, as patterns."""

FOR_DCP = (
    "is a folder of torch.distributed.checkpoint, which only unpickling reads. Make one file of it, if you trust it: "
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} checkpoint.pt. Then give that file"
)


class SavedState(NamedTuple):
    """A state of a `DeltaLoRAOptimizer`.

    Attributes:
        file: that holds it.
        place: within what the file holds, such as "['optimizer']"; empty if the file holds nothing else.
        content: what `state_dict()` returned, maybe without the inner optimizer's moments.
    """

    file: Path
    place: str
    content: dict[str, Any]


class Checkpoint(NamedTuple):
    """The parts of a checkpoint.

    Attributes:
        path: as given.
        kind: what it is, in words.
        states: of every `DeltaLoRAOptimizer` in it.
        adapter: its adapter; None if it has none.
        export: the folder with the adapter for the pristine base; None if it has none.
        trainer_step: the `global_step` of Trainer; None if it is none of Trainer's.
        weights: yields the names and tensors of the model's weights in it.
    """

    path: Path
    kind: str
    states: list[SavedState]
    adapter: AdapterFolder | None
    export: Path | None
    trainer_step: int | None
    weights: Callable[[], Iterator[tuple[str, Tensor]]]


def opened(path: str, adapter: str | None = None) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: of a file or a folder.
        adapter: the folder of the adapter that belongs to it. Default: the one in the folder.

    Raises:
        UserError: if it is none, or cannot be read.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: there is no such file or folder")
    given = None if adapter is None else _given_adapter(Path(adapter))
    return _folder(place, given) if place.is_dir() else _file(place, given)


def _given_adapter(folder: Path) -> AdapterFolder:
    if not (folder / CONFIG).is_file():
        raise UserError(f"--adapter {folder} is no folder of an adapter: it has no {CONFIG}")
    return AdapterFolder(folder)


def _file(path: Path, adapter: AdapterFolder | None) -> Checkpoint:
    content = read(path)
    states = _ours([(path, content)], path)
    kind = LIGHTNING if isinstance(content, dict) and "pytorch-lightning_version" in content else FILE
    return Checkpoint(path, kind, states, adapter, None, None, lambda: tensors_in(content))


def _folder(path: Path, adapter: AdapterFolder | None) -> Checkpoint:
    files = [file for pattern in STATE_FILES for file in sorted(path.glob(pattern))]
    if (path / "optimizer.pt") in files:  # from which Trainer resumes, whatever is next to it
        files = [path / "optimizer.pt"]
    states = _ours([(file, read(file)) for file in files], path)
    if not states:
        _refuse_folder(path)
    trainer = path / "trainer_state.json"
    kind, step = _kind(path, files), None
    if trainer.is_file():
        step = read_json(trainer).get("global_step")
        if not isinstance(step, int):
            raise UserError(f"{trainer} is no state of Trainer: its global_step is {step!r}, expected a whole number")
    adapter = adapter if adapter is not None else adapter_in(path)
    exports = [folder for folder in (path / "export", path / "export" / "lora") if (folder / CONFIG).is_file()]
    export = exports[0] if exports else None
    return Checkpoint(path, kind, states, adapter, export, step, lambda: tensors_of_model(path))


def _kind(path: Path, files: list[Path]) -> str:
    if files:
        return ACCELERATE if files[0].suffix == ".bin" else TRAINER
    export = path.parent if path.parts[-2:] == ("export", "lora") else path
    is_export = export.name == "export" and (export.parent / "trainer_state.json").is_file()
    return EXPORT if is_export else ADAPTER


def _ours(files: list[tuple[Path, Any]], given: Path) -> list[SavedState]:
    """Return the states of a `DeltaLoRAOptimizer` in these files.

    Args:
        files: and what they hold.
        given: by the user, one of the files or their folder.

    Raises:
        UserError: if there are none, and files that should have one.
    """
    found = [SavedState(file, *each) for file, content in files for each in states_in(content)]
    ours = [state for state in found if any(KEY in group for group in state.content["param_groups"])]
    if found and not ours:
        raise UserError(
            f"{found[0].file} holds the state of another optimizer than a DeltaLoRAOptimizer: nothing in it says that "
            "a W has moved. Where plain LoRA was trained, its adapter is right on the base by itself"
        )
    if files and not ours:
        file = files[0][0]
        more = f": give its folder, {file.parent}" if file == given and (file.parent / CONFIG).is_file() else ""
        raise UserError(f"{file} holds no state of an optimizer, as optimizer.state_dict() returns it{more}")
    return ours


def _refuse_folder(path: Path) -> None:
    """Raise UserError for a folder without a state, unless it has an adapter."""
    if (path / CONFIG).is_file():
        return
    if (path / ".metadata").is_file():
        raise UserError(f"{path} {FOR_DCP.format(path=path)}")
    runs = sorted(
        (each for each in path.glob("checkpoint-*") if each.name.removeprefix("checkpoint-").isdigit()),
        key=lambda each: int(each.name.removeprefix("checkpoint-")),
    )
    if runs:
        raise UserError(f"{path} holds {len(runs)} checkpoints: give one of them, such as {runs[-1]}")
    files = sorted(each.name for pattern in ("*.pt", "*.pth", "*.ckpt") for each in path.glob(pattern))
    if files:
        raise UserError(
            f"{path} is no checkpoint of Trainer, Accelerate or PEFT: give a file, such as {path / files[0]}"
        )
    raise UserError(
        f"{path} is no checkpoint: it has no {', '.join(STATE_FILES)} (of an optimizer) and no {CONFIG} (of an adapter)"
    )
