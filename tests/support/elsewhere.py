"""A process in which this package is missing, as on a server or at the other end of a file.

Importing torch, transformers and peft takes most of such a test, so one process serves all tests of a session.
"""

import atexit
import functools
import json
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

LIMIT = 120.0
"""Seconds for one piece of code."""

SERVER = """
import json, sys, traceback, warnings

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("deltaopt", "tests"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    code, files = json.loads(line)
    error = ""
    with warnings.catch_warnings():  # so that no warning is left out since an earlier piece of code gave it
        try:
            exec(compile(code, "elsewhere", "exec"), {"files": files, "__name__": "elsewhere"})
        except BaseException:
            error = traceback.format_exc()
    sys.stderr.flush()
    print(json.dumps(error), file=answers, flush=True)
"""


def run_without_this_package(code: str, *files: Path) -> str:
    """Run code in a process that can import neither this package nor its tests.

    Args:
        code: finds the paths in a list that is called ``files``.
        files: that it reads and writes.

    Returns:
        what the code and the libraries printed: warnings, lines of logs.

    Raises:
        AssertionError: if the code raises, with its traceback; if it ends the process or takes too long.
    """
    if _server().has_ended:
        _server.cache_clear()
    return _server().run(textwrap.dedent(code), [str(file) for file in files])


class Server:
    """The process, which takes one piece of code after the other."""

    def __init__(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115, closed by `close`
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            cwd=tempfile.gettempdir(),
            text=True,
        )
        atexit.register(self.close)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def run(self, code: str, files: list[str]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        start = self._said.seek(0, 2)
        timer = threading.Timer(LIMIT, self._process.kill)
        timer.start()
        try:
            print(json.dumps([code, files]), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        finally:
            timer.cancel()
        self._said.seek(start)
        said = self._said.read().decode()
        if not answer:
            raise AssertionError(f"the process has ended, with {self._process.wait()}:\n{said}")
        error = json.loads(answer)
        assert not error, error
        return said

    def close(self) -> None:
        self._process.communicate()
        self._said.close()


@functools.cache
def _server() -> Server:
    return Server()
