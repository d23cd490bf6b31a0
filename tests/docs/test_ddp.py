"""The script of docs/ddp.md under torchrun, with two processes."""

import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import BLOCKS, ROOT

[SCRIPT] = [block for block in BLOCKS if block.title == "ddp.py"]


@pytest.mark.extra
def test_the_script_runs_in_two_processes(tmp_path):
    if missing := SCRIPT.missing():
        pytest.skip(f"runs where {' and '.join(missing)} is installed")
    script = tmp_path / "ddp.py"
    script.write_text(SCRIPT.code, "utf8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PYTHONWARNINGS"] = "error:::__main__"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank (\d) of 2: resumed bit for bit", done.stdout)) == ["0", "1"]
