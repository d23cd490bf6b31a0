"""The result of one run, and its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.evidence.setting import Setting
from benchmarks.unfinished import write_whole


@dataclass
class Result:
    """What a run has measured.

    Attributes:
        setting: of the run.
        metrics: the task's metrics by name: "accuracy", "f1", "matthews", "pearson", "spearman" as shares, "BLEU",
            "NIST", "METEOR", "ROUGE-L", "CIDEr", "TER" as published, and "loss", the mean cross entropy (of a token,
            where texts are written) or squared error. Smaller is better for "loss" and "TER" alone. The metrics of
            written texts are added to the file later, by ``score``. Empty for a run that diverged.
        losses: the mean training loss of each tenth step, a stretch of ten steps each.
        layers: `LayerChange._asdict()` of each adapted layer: how far W* = W + s A B went from W0.
        trained: number of parameters with a gradient. total: number of parameters.
        seconds: of training, without evaluation. step_seconds: the median step's.
        peak_bytes: of the device's memory, None on a CPU.
        diverged: a loss was not finite; training stopped there.
        forgetting: (before, after): the model's loss on texts that the pretrained model wrote; None where not measured.
        texts: what a generating task wrote for each evaluated input.
        data: the fingerprint of the task's examples.
        machine, versions, commit: on and with which the run was made.
    """

    setting: Setting
    metrics: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    trained: int = 0
    total: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    peak_bytes: int | None = None
    diverged: bool = False
    forgetting: tuple[float, float] | None = None
    texts: list[str] | None = None
    data: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"setting": self.setting.as_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Result:
        """Return the result that `as_json` has described.

        Raises:
            TypeError, KeyError, ValueError: if it is not one.
        """
        if missing := {f.name for f in fields(cls)} - values.keys():
            raise KeyError(f"no {', '.join(sorted(missing))}")
        held = {**values, "setting": Setting.from_json(values["setting"])}
        held.pop("evaluations", None)  # older files have what was measured during the run as well
        if held["forgetting"] is not None:
            held["forgetting"] = tuple(held["forgetting"])
        return cls(**held)


def write_result(folder: Path, result: Result) -> Path:
    """Write the file of a run below a grid's folder, as a whole or not at all, and return its path."""
    path = folder / result.setting.path
    values = _rounded(result.as_json()) | {"setting": result.setting.as_json()}  # unrounded: it names the file
    write_whole(path, json.dumps(values) + "\n")
    return path


def read_result(path: Path) -> Result | None:
    """Return the result of a file; None if there is no file, or one that was cut off.

    Raises:
        ValueError: for a whole file that is no result, or that of another setting than its name says.
    """
    try:
        values = json.loads(path.read_text("utf8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return None
    try:
        result = Result.from_json(values)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not the result of a run of this version: {error}. Move it elsewhere") from error
    if path.parts[-3:] != Path(result.setting.path).parts:
        raise ValueError(f"{path} holds another run, {result.setting.path}: rename the file or move it elsewhere")
    return result


def read_results(folder: Path) -> list[Result]:
    """Return every result below a folder, in the order of their names; files that were cut off are left out.

    Raises:
        ValueError: as `read_result`.
    """
    found = (read_result(path) for path in sorted(folder.glob("*/*/*.json")))
    return [result for result in found if result is not None]


def _rounded(value: Any) -> Any:
    """Return plain JSON values with 7 significant digits: what float32 holds."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {key: _rounded(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(held) for held in value]
    return value
