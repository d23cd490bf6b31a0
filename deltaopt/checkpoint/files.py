"""Files that are whole or not there: written next to their place, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import torch

from deltaopt.checkpoint.readable import check_readable
from deltaopt.plain import plain

PathLike: TypeAlias = "str | os.PathLike[str]"

NO_FOLDER_SYNC = {
    getattr(errno, name)
    for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EACCES", "EPERM", "EBADF", "EISDIR")
    if hasattr(errno, name)
}
"""The errors with which network, FUSE and shared folders say that a folder cannot be opened or flushed."""


@contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """Give a path next to `path` to write a file to, which takes its place at the end, or never.

    A process that is killed at any moment leaves the old file or the new one. An exception leaves the old one. If
    `path` is a symbolic link, it stays, and the file it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    part = _free_name(path.parent, path.name)
    try:
        yield part
        _flush(part)
        os.replace(part, path)
        _flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replacing_together(folder: PathLike, last: str) -> Iterator[Path]:
    """Give a folder for files that belong together, which take their places in `folder` at the end, or never.

    A folder that was not there appears whole. In one that was, other files stay, and a process that is killed at any
    moment leaves the old files, the new ones, or a folder without `last`, never some old and some new ones together.

    Args:
        folder: the place.
        last: the file that says what the others are, such as a config, without which nothing reads them.

    Raises:
        NotADirectoryError: if the place is taken by a file.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a folder: name another place")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = _free_name(folder if folder.is_dir() else folder.parent, folder.name)
    part.mkdir()
    try:
        yield part
        names = sorted(file.name for file in part.iterdir())
        for path in (*(part / name for name in names), part):
            _flush(path)
        if folder.is_dir():
            # Several files cannot be replaced at once. Either order alone would pass through old tensors under a new
            # config or the other way round, which may load and be wrong: so there is no config in between, unless it
            # is the same one.
            if not _same_bytes(part / last, folder / last):
                (folder / last).unlink(missing_ok=True)
                _flush(folder)
            for name in sorted(names, key=last.__eq__):
                os.replace(part / name, folder / name)
                _flush(folder)
        else:
            os.rename(part, folder)
            _flush(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save(obj: Any, path: PathLike) -> None:
    """Save as `torch.save` does, but never half, and nothing that `load` could not read.

    The file is written next to its place, flushed to the disk and renamed. Scalars of numpy are saved as plain numbers.

    Args:
        obj: what to save, such as ``{"model": model.state_dict(), "optimizer": optimizer.state_dict()}``.
        path: the file; a link stays, and the file it leads to is replaced.

    Raises:
        TypeError: if `obj` holds something that `load` could not read, with the place and the class of each.
        ValueError: if `path` ends in .safetensors, which is another format.
        OSError: if the file cannot be written, as where the disk is full. In each case the old file is as it was.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{path} would hold torch's format, and load reads a .safetensors file as one: name it .pt, or write "
            "tensors with safetensors.torch.save_file"
        )
    obj = plain(obj)
    check_readable(obj)
    with replacing(path) as part, open(part, "wb") as file:  # writing to a path, torch does not raise an OSError
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a write failed, then torch could not end its archive
                raise error.__context__ from None
            raise


def load(path: PathLike, map_location: Any = "cpu") -> Any:
    """Read what `save` wrote, with ``weights_only=True``; a .safetensors file as a dict of tensors.

    Args:
        path: the file.
        map_location: as for `torch.load`; default "cpu".

    Raises:
        ValueError: if the file is cut off, or no such file.
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path, device=str(map_location))
        return torch.load(path, map_location=map_location, weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError, ImportError):
        raise
    except Exception as error:  # torch.load has many: RuntimeError, EOFError, OSError, UnpicklingError, ...
        raise ValueError(f"{path} cannot be read, it was cut off or is something else: {error}") from error


def _same_bytes(a: Path, b: Path) -> bool:
    return b.is_file() and a.read_bytes() == b.read_bytes()


def _free_name(folder: Path, name: str) -> Path:
    """Return a name that is not taken; remove what killed processes of this machine have left for `name`.

    It is short, whatever the length of `name`: file systems take 255 bytes, some of them fewer.
    """
    stem = f".deltaopt-{zlib.crc32(f'{platform.node()}/{name}'.encode(errors='surrogateescape')):08x}."
    for left in folder.glob(f"{stem}*.part"):
        pid = left.name.removeprefix(stem).partition(".")[0]
        if pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return folder / f"{stem}{os.getpid()}.{uuid4().hex[:8]}.part"


def _runs(pid: int) -> bool:
    """Tell if there is a process with this number."""
    if os.name != "posix":
        return True  # nothing to ask that does no harm there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _flush(path: Path) -> None:
    """Wait until the file, or the entries of the folder, are on the disk. Not every system can do so for folders."""
    if not path.is_dir():
        _sync(path, os.O_RDWR)  # Windows wants to write what it flushes
    elif os.name == "posix":  # elsewhere a folder cannot be opened
        try:
            _sync(path, os.O_RDONLY)
        except OSError as error:
            if error.errno not in NO_FOLDER_SYNC:
                raise


def _sync(path: Path, flags: int) -> None:
    number = os.open(path, flags)
    try:
        os.fsync(number)
    finally:
        os.close(number)
