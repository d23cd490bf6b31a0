from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    data: Path | None
    models: Path | None
