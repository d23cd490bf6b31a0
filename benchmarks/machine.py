"""The machine and the software that a result was measured on."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import Processes
from deltaopt import __version__


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


def machine(device: str) -> dict[str, Any]:
    """Return what the times depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processes": Processes().count,
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Return the versions that run. Ours need not be installed: this may be a checkout."""
    others = {name: importlib.metadata.version(name) for name in ("transformers", "peft")}
    return {"deltaopt": __version__, "torch": torch.__version__, **others, "python": platform.python_version()}


def quieten() -> None:
    """Silence what needs no attention: the fresh classifier head, which we want, and PEFT's use of an old name."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
