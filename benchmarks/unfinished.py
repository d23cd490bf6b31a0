"""What a benchmark has measured so far, in a file: a run that was cut short continues where it ended."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Unfinished:
    """Measurements by name, in a JSON file that is written after each of them.

    What the file holds from other settings is ignored, and replaced by the first measurement.

    Args:
        path: of the file; its folder is made.
        settings: all that the measurements depend on, as plain JSON types.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        check_writable(path)
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        held = _read(path)
        self._found: dict[str, Any] = held["found"] if held and held["settings"] == self._settings else {}

    def get(self, name: str) -> Any:
        """Return what was measured under this name; None if nothing was."""
        return self._found.get(name)

    def put(self, name: str, value: Any) -> None:
        """Write one more measurement to the file."""
        self._found[name] = value
        write_whole(self._path, json.dumps({"settings": self._settings, "found": self._found}))

    def finish(self) -> None:
        """Remove the file, once its measurements are in the file of results."""
        self._path.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Make the folder of a file, and raise OSError if the file cannot be written there: before the work, not after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file")
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def write_whole(path: Path, text: str) -> None:
    """Write a file as a whole or not at all, in a folder that is made if need be. Other processes may write it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, "utf8")
    os.replace(part, path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        held = json.loads(path.read_text("utf8"))
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) and held.keys() == {"settings", "found"} else None
