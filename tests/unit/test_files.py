"""save and load: a file is whole or as it was, and a file that is not whole is refused."""

import os
import platform
import re
import subprocess
import sys

import pytest
import torch

from deltaopt import load, save
from deltaopt.checkpoint import files

either_format = pytest.mark.parametrize(
    "name", ["state.pt", pytest.param("model.safetensors", marks=pytest.mark.extra)]
)


def test_what_is_saved_is_loaded_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "state.pt"
    for value in (1, 2):
        save({"a": torch.full((3,), value), "n": value}, path)
        found = load(path)
        assert found["n"] == value
        assert torch.equal(found["a"], torch.full((3,), value))
    assert os.listdir(tmp_path) == ["state.pt"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    save({"n": 1}, path)
    with pytest.raises((AttributeError, TypeError), match=r"pickle|local object"):
        save({"f": lambda: None}, path)
    assert load(path) == {"n": 1}
    assert os.listdir(tmp_path) == ["state.pt"]


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
    for cut in [0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 200, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"{name} cannot be read, it was cut off"):
            load(path)


@pytest.mark.extra
def test_what_a_killed_process_has_left_is_removed_by_the_next_save(tmp_path):
    """Remove parts of this machine and this file; a process that runs may still be writing."""
    path = tmp_path / "state.pt"
    node, gone = platform.node(), subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [f".state.pt.{node}.{gone.pid}.abc.part", f".state.pt.{node}.{os.getppid()}.abc.part", ".other.part"]
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    save({"n": 1}, path)
    assert sorted(os.listdir(tmp_path)) == sorted([*left[1:], "state.pt"])


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"f": os.getcwd}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt cannot be read"):
        load(tmp_path / "state.pt")


@either_format
def test_refuses_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        load(tmp_path / name)
