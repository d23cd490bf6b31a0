"""The machine that a result was measured on."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch


def device_name(text: str) -> str:
    """Return the name of a device that is here: the type of an option ``--device``.

    Raises:
        argparse.ArgumentTypeError: if torch does not know or cannot reach the device.
    """
    try:
        torch.zeros((), device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is no device that torch can use here: {reason}") from error
    return text


def cpu_name() -> str:
    """Return the name of the processor, as far as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
