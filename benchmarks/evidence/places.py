"""Where data and models lie on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """Folders. No number of a result depends on them.

    Attributes:
        data: a folder of ``e2e/``, ``webnlg2017/``, ``glue/<task>/``, ``xsum/`` and ``docstrings/``, each with gzipped
            JSON lines (benchmarks/README.md). What it lacks is taken from the hub, where there is a network.
        models: a folder of model folders in Hugging Face form.
    """

    data: Path | None = None
    models: Path | None = None
