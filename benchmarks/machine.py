"""The machine that a result was measured on."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch


def usable_device(name: str, parser: argparse.ArgumentParser) -> torch.device:
    """Return the device of an option ``--device``, or end with a message where torch does not know or reach it."""
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {name} is no device that torch can use here: {str(error).splitlines()[0]}")


def cpu_name() -> str:
    """Return the name of the processor, as far as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
