"""Reading files that users have: whole, cut off, or something else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaopt.checkpoint.files import load
from deltaopt.cli.outcome import UserError


def read(path: Path) -> Any:
    """Read a file of torch's or of safetensors; nothing in it is executed.

    Raises:
        UserError: if it is cut off, or holds objects of classes that `torch.load(weights_only=True)` refuses.
    """
    try:
        return load(path)
    except ValueError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error.__cause__))
        if refused:
            raise UserError(
                f"{path} holds an object of {refused[1]}, and torch.load(weights_only=True) reads tensors, numbers, "
                "strings and containers alone: save optimizer.state_dict() in a file of its own"
            ) from error
        expected = "safetensors' format" if path.suffix == ".safetensors" else "what torch.save writes"
        raise UserError(f"{path} cannot be read: it was cut off, or is not {expected}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a JSON object.

    Raises:
        UserError: if it is something else.
    """
    try:
        fields = json.loads(path.read_text("utf8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): it is cut off, or something else") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} is no JSON object, so it is no config")
    return fields


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter by their names.

    Raises:
        UserError: if the file cannot be read, or holds no tensors with names.
    """
    content = read(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected the tensors of an adapter by their names")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def tensors_of_model(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of the model's weights in a folder, one at a time."""
    for path in sorted(folder.glob("model*.safetensors")):
        yield from _tensors(path)
    for path in sorted(folder.glob("pytorch_model*.bin")):
        yield from tensors_in(read(path))


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read: it was cut off, or is not safetensors' format") from error


def tensors_in(content: Any, place: str = "", depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors in nested dicts, leaving out states of optimizers."""
    if isinstance(content, Tensor):
        yield place, content
    elif isinstance(content, dict) and depth and not is_state(content):
        for key, value in content.items():
            yield from tensors_in(value, f"{place}.{key}".lstrip("."), depth - 1)


def states_in(content: Any, place: str = "", depth: int = 4) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the content of each state of an optimizer, in nested dicts and lists."""
    if is_state(content):
        yield place, content
    elif isinstance(content, dict) and depth:
        for key, value in content.items():
            yield from states_in(value, f"{place}[{key!r}]", depth - 1)
    elif isinstance(content, (list, tuple)) and depth:
        for number, value in enumerate(content):
            yield from states_in(value, f"{place}[{number}]", depth - 1)


def is_state(content: Any) -> bool:
    """Tell if this has the form of `torch.optim.Optimizer.state_dict()`."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("state"), dict)
        and isinstance(content.get("param_groups"), (list, tuple))
        and all(isinstance(group, dict) for group in content["param_groups"])
    )
