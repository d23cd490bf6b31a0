"""save and load: a file is whole or as it was, and a file that is not whole is refused."""

import errno
import io
import os
import re
import stat
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict
from fractions import Fraction

import pytest
import torch

from deltaopt import load, save
from deltaopt.checkpoint import files
from tests.support.compare import in_order

numpy = pytest.importorskip("numpy", reason="runs where numpy is installed")

either_format = pytest.mark.parametrize(
    "name", ["state.pt", pytest.param("model.safetensors", marks=pytest.mark.extra)]
)


def named(holder, **attributes):
    """Return the same object with attributes of its own."""
    vars(holder).update(attributes)
    return holder


def test_what_is_saved_is_loaded_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "state.pt"
    for value in (1, 2):
        save({"a": torch.full((3,), value), "n": value}, path)
        found = load(path)
        assert found["n"] == value
        assert torch.equal(found["a"], torch.full((3,), value))
    assert os.listdir(tmp_path) == ["state.pt"]


class FullDisk(io.FileIO):
    """A file whose disk has room for 20,000 bytes."""

    room = 20_000

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save({"n": 1}, path)
    monkeypatch.setattr(files, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save({"a": torch.randn(100, 100)}, path)
    assert caught.value.errno == errno.ENOSPC
    assert load(path) == {"n": 1}
    assert os.listdir(tmp_path) == ["state.pt"]
    save({"n": 2}, path)
    assert load(path) == {"n": 2}


def test_other_errors_of_torch_are_raised_as_they_are(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save({"n": 1}, path)

    def fail(obj, file):
        file.write(b"half")
        raise RuntimeError("no device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="no device"):
        save({"n": 2}, path)
    assert load(path) == {"n": 1}
    assert os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "EACCES", "EBADF", "ENOSYS", "EPERM"])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch, call, name):
    """Network, FUSE and shared folders: the file itself was flushed, and is in its place."""
    original, failed = getattr(os, call), []

    def failing(target, *arguments):
        folder = os.path.isdir(target) if call == "open" else stat.S_ISDIR(os.fstat(target).st_mode)
        if folder:
            failed.append(target)
            raise OSError(getattr(errno, name), "not for folders")
        return original(target, *arguments)

    monkeypatch.setattr(os, call, failing)
    save({"n": 1}, tmp_path / "state.pt")
    with files.replacing_together(tmp_path / "adapter", last="config") as part:
        (part / "config").write_text("new")
    monkeypatch.undo()
    assert len(failed) == 3
    assert load(tmp_path / "state.pt") == {"n": 1}
    assert (tmp_path / "adapter" / "config").read_text() == "new"


@pytest.mark.parametrize(("folders", "name"), [(True, "EIO"), (False, "EINVAL"), (False, "EIO")])
def test_other_errors_of_flushing_are_raised(tmp_path, monkeypatch, folders, name):
    fsync = os.fsync

    def failing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(getattr(errno, name), "bad disk")
        fsync(descriptor)

    save({"n": 1}, tmp_path / "state.pt")
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="bad disk"):
        save({"n": 2}, tmp_path / "state.pt")
    monkeypatch.undo()
    assert load(tmp_path / "state.pt") == {"n": 2 if folders else 1}
    assert os.listdir(tmp_path) == ["state.pt"]


def test_where_folders_cannot_be_opened_and_only_writable_files_be_flushed(tmp_path, monkeypatch):
    """As on Windows."""
    fcntl = pytest.importorskip("fcntl", reason="runs where the mode of a descriptor can be asked for")
    opened, fsync = os.open, os.fsync

    def opening(path, flags, *arguments, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "a folder")
        return opened(path, flags, *arguments, **options)

    def flushing(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not writable")
        fsync(descriptor)

    monkeypatch.setattr(files, "NO_FOLDER_SYNC", set())
    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "name", "neither posix nor nt")
    save({"n": 1}, tmp_path / "state.pt")
    monkeypatch.undo()
    assert load(tmp_path / "state.pt") == {"n": 1}


@pytest.mark.parametrize("place", ["elsewhere/real.pt", "elsewhere/not yet there.pt"])
def test_a_link_stays_and_its_file_is_replaced(tmp_path, place):
    (tmp_path / "elsewhere").mkdir()
    save({"n": 1}, tmp_path / "elsewhere" / "real.pt")
    link = tmp_path / "latest.pt"
    link.symlink_to(place)
    save({"n": 2}, link)
    assert link.is_symlink()
    assert load(link) == load(tmp_path / place) == {"n": 2}
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "latest.pt"]
    assert not [name for name in os.listdir(tmp_path / "elsewhere") if name.endswith(".part")]


@pytest.mark.parametrize("name", ["n" * 250 + ".pt", "層" * 80 + ".pt", "abcd"], ids=["long", "wide", "short"])
def test_long_and_short_names(tmp_path, name):
    for n in (1, 2):
        save({"n": n}, tmp_path / name)
        assert load(tmp_path / name) == {"n": n}
    with files.replacing_together(tmp_path / f"{name[:-3]}d", last="config") as part:
        (part / "config").write_text("new")
    assert sorted(os.listdir(tmp_path)) == sorted([name, f"{name[:-3]}d"])


class Schedule:
    pass


class Warm(Schedule, dict):
    pass


UNREADABLE = {
    "['f']: function": {"f": lambda: None},
    "['optimizer']['param_groups'][0]['schedule']: tests.unit.test_files.Schedule": {
        "optimizer": {"param_groups": [{"schedule": Schedule()}]}
    },
    "[1][0]: numpy.ndarray": [1, (numpy.ones(2),)],
    "[Fraction(1, 2)] (the key): fractions.Fraction": {Fraction(1, 2): 1},
    "['d']: collections.defaultdict": {"d": defaultdict(int)},
    "['w']: tests.unit.test_files.Warm": {"w": Warm()},
    "the object itself: tests.unit.test_files.Schedule": Schedule(),
    "['n']: int of 3001 bits": {"n": 2**3000},
    "['m']._metadata: slice": {"m": named(OrderedDict(), _metadata=slice(1))},
    "['p'].origin: frozenset": {"p": named(torch.nn.Parameter(torch.ones(1)), origin=frozenset({1}))},
    "['s'] element: frozenset": {"s": {frozenset()}},
}


@pytest.mark.parametrize("message", UNREADABLE)
def test_what_load_cannot_read_is_refused_with_its_place(tmp_path, message):
    path = tmp_path / "state.pt"
    save({"n": 1}, path)
    before = path.stat()
    match = in_order("cannot be saved, since load would refuse the file (nothing was written):", f"\n  {message}\n")
    with pytest.raises(TypeError, match=match):
        save(UNREADABLE[message], path)
    assert path.stat() == before
    assert os.listdir(tmp_path) == ["state.pt"]


def test_many_places_are_named_once_and_counted(tmp_path):
    shared = Schedule()
    with pytest.raises(TypeError, match=in_order("\n  [0]: ", "\n  [7]: ", "\n  and 3 more\n")) as caught:
        save([shared, *(Schedule() for _ in range(10)), shared], tmp_path / "state.pt")
    assert str(caught.value).count("Schedule") == 8


def test_a_class_that_the_user_allows_is_saved_and_loaded(tmp_path):
    path = tmp_path / "state.pt"
    with torch.serialization.safe_globals([Schedule]):
        save({"s": Schedule()}, path)
        assert isinstance(load(path)["s"], Schedule)


def test_what_torch_reads_is_saved(tmp_path):
    cycle = [1, 2.0, 1j, None, True, "x", b"y", {3}, torch.Size([2]), torch.float32, torch.device("cpu"), 2**70]
    cycle.append(cycle)
    parameter = named(torch.nn.Parameter(torch.ones(2)), _is_tied=True)
    sparse, small = torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.float8_e4m3fn)
    state = named(OrderedDict(a=parameter, b=sparse, c=small), _metadata=OrderedDict(version=1))
    save({"cycle": cycle, "state": state, "count": Counter("aab")}, tmp_path / "state.pt")
    found = load(tmp_path / "state.pt")
    assert found["cycle"][:-1] == cycle[:-1]
    assert found["cycle"][-1] is found["cycle"]
    assert found["state"]._metadata == {"version": 1}
    assert torch.equal(found["state"]["a"], parameter)
    assert torch.equal(found["state"]["b"].to_dense(), torch.eye(2))
    assert found["count"] == {"a": 2, "b": 1}


def test_scalars_of_numpy_are_saved_as_plain_numbers(tmp_path):
    save({"best": numpy.float64(0.1), "rates": [numpy.float32(0.5)], numpy.str_("k"): 1}, tmp_path / "state.pt")
    found = load(tmp_path / "state.pt")
    assert found == {"best": 0.1, "rates": [0.5], "k": 1}
    assert {type(found["best"]), type(found["rates"][0])} == {float}


def test_refuses_a_name_that_load_takes_for_another_format(tmp_path):
    with pytest.raises(
        ValueError, match=r"state.safetensors would hold torch's format, and load reads .*: name it .pt"
    ):
        save({"n": 1}, tmp_path / "state.safetensors")
    assert os.listdir(tmp_path) == []


def test_the_data_is_on_the_disk_before_the_file_takes_its_place(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (done.append("fsync"), fsync(fd)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    save({"n": 1}, tmp_path / "state.pt")
    assert done == ["fsync", "replace", "fsync"]


@either_format
def test_a_file_that_was_cut_off_is_refused(tmp_path, name):
    path = tmp_path / name
    if name.endswith("pt"):
        save({"a": torch.randn(50, 50)}, path)
    else:
        safetensors = pytest.importorskip("safetensors.torch", reason="runs where safetensors is installed")
        safetensors.save_file({"a": torch.randn(50, 50)}, path)
    whole = path.read_bytes()
    load(path)
    for cut in {*range(0, len(whole), 97), *range(40), *range(len(whole) - 40, len(whole))}:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"{name} cannot be read, it was cut off"):
            load(path)


@pytest.mark.extra
def test_what_a_killed_process_has_left_is_removed_by_the_next_save(tmp_path):
    """Remove parts of this machine and this file; a process that runs may still be writing."""
    path = tmp_path / "state.pt"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with files.replacing(path) as mine, files.replacing(tmp_path / "other.pt") as other:
        left = [mine.name.replace(f".{os.getpid()}.", f".{pid}.") for pid in (gone.pid, os.getppid())]
        left.append(other.name.replace(f".{os.getpid()}.", f".{gone.pid}."))
        for name in (mine.name, other.name, *left):
            (tmp_path / name).write_bytes(b"half")
    save({"n": 1}, path)
    assert sorted(os.listdir(tmp_path)) == sorted([*left[1:], "state.pt", "other.pt"])


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"f": os.getcwd}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt cannot be read"):
        load(tmp_path / "state.pt")


@either_format
def test_refuses_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        load(tmp_path / name)
