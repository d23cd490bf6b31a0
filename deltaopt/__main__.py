"""The command line, ``python -m deltaopt``: parses the arguments, runs a command, prints what it found."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import deltaopt
from deltaopt.cli.outcome import UserError, one_line

COMMANDS = {
    "inspect": "say what is in a checkpoint: the run, the step, how far W moved, which adapter to use",
    "doctor": "say which layers would be taken, what is refused and what to change, and which rule fits",
    "export": "write what training changed, W's movement and the branch, as one plain PEFT adapter",
}
"""The name of each command, which is that of its file in `deltaopt.cli`, and its line in the help."""

HIDDEN = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning)
"""Warnings for programmers, which a user of the command line can do nothing about."""

WIDTH = 88
"""Characters in a line of a description."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and print its result, or one line that says what is wrong.

    Args:
        argv: the arguments. Default: those of the process.

    Returns:
        The exit code: 0; 1 if something is wrong with what was given, or the output has no place; 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 for a wrong usage, and with 0 for ``--help`` and ``--version``.
    """
    arguments = parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.resetwarnings()
            for category in HIDDEN:
                warnings.simplefilter("ignore", category)
            warnings.showwarning = _show_warning
            outcome = importlib.import_module(f"deltaopt.cli.{arguments.command}").run(arguments)
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        message = one_line(_described(error))
        if arguments.json:
            _print(json.dumps({"error": message}))
        else:
            print(f"deltaopt {arguments.command}: error: {message}", file=sys.stderr)
        return 1
    return _print(json.dumps(_finite(outcome.data), indent=2) if arguments.json else outcome.text)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    whole = argparse.ArgumentParser(
        prog="deltaopt",
        description="Look into runs of Delta-LoRA and take their results elsewhere.",
        epilog="deltaopt COMMAND --help has examples. Exit codes: 0; 1 if something is wrong with what was given; "
        "2 for a wrong usage.",
    )
    whole.add_argument("--version", action="version", version=f"deltaopt {deltaopt.__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        importlib.import_module(f"deltaopt.cli.{name}").add_arguments(command)
        if command.description is not None:  # examples keep their lines, so nothing else wraps it
            command.description = textwrap.fill(command.description, WIDTH)
        command.add_argument("--json", action="store_true", help='print JSON; an error too, as {"error": ...}')
    return whole


def _print(text: str) -> int:
    """Print to the standard output; return 1 if it is closed, as by ``| head``, or cannot be written."""
    try:
        print(text, flush=True)
    except OSError as error:
        # What is left in the buffer would be written again at exit, with a message of Python's own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"deltaopt: error: the result cannot be printed: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _finite(value: Any) -> Any:
    """Return data with None for NaN and infinite numbers, which JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {one_line(str(message))}", file=sys.stderr)


def _described(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
