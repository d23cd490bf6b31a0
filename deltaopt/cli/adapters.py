"""A folder of a PEFT adapter, read without PEFT: its config, its tensors, and whether it needs a moved W."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaopt.cli.files import read_json, read_tensors
from deltaopt.cli.outcome import UserError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
NEEDS_MOVED = "needs_base_weights_moved_by_deltaopt_see_docs_export"
"""The key that deltaopt adds to the config of an adapter that is saved alone once W has moved."""


class AdapterFolder:
    """A folder with an adapter.

    Args:
        path: with an ``adapter_config.json``.

    Attributes:
        path: as given.
        config: what that file says.

    Raises:
        UserError: if the config cannot be read, or the weights are missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        if not isinstance(self.config.get("peft_type"), str):
            raise UserError(f"{path / CONFIG} has no peft_type, so it is no config of a PEFT adapter")
        weights = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not weights:
            raise UserError(
                f"{path} has an {CONFIG} and no weights ({' or '.join(WEIGHTS)}): the folder was copied or downloaded "
                "in part. Save or copy the adapter again"
            )
        self._weights = weights[0]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the adapter by their names in the file."""
        return read_tensors(self._weights)

    def check(self) -> None:
        """Raise UserError if the weights cannot be read."""
        assert self.tensors is not None

    @property
    def needs_moved_weights(self) -> bool:
        """True if it was saved alone, after W had moved: on the pristine base it is another model."""
        return NEEDS_MOVED in self.config

    @property
    def is_cut(self) -> bool:
        """True if AdaLoRA's budget had taken some ranks when it was saved: PEFT then leaves out their rows."""
        if self.config.get("peft_type") != "ADALORA":
            return False
        budget = self.config.get("rank_pattern") or {}
        return any(not all(kept) for kept in budget.values() if isinstance(kept, list))

    def summary(self) -> dict[str, Any]:
        """Return what a reader wants to know of it, as plain data."""
        config = self.config
        pattern = config.get("rank_pattern")
        ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
        return {
            "path": str(self.path),
            "method": config.get("peft_type"),
            "rank": max((rank for rank in ranks if isinstance(rank, int)), default=None),
            "alpha": config.get("lora_alpha"),
            "base_model": config.get("base_model_name_or_path"),
            "tensors": len(self.tensors),
            "needs_moved_weights": self.needs_moved_weights,
        }


def adapter_in(folder: Path) -> AdapterFolder | None:
    """Return the adapter of a folder: in it, or in its only subfolder with one, where PEFT puts adapters with a name.

    Raises:
        UserError: if there are several, or it cannot be read.
    """
    if (folder / CONFIG).is_file():
        return AdapterFolder(folder)
    named = sorted(path.parent for path in folder.glob(f"*/{CONFIG}") if path.parent.name != "export")
    if len(named) > 1:
        raise UserError(
            f"{folder} has several adapters ({', '.join(path.name for path in named)}): choose one with --adapter DIR"
        )
    return AdapterFolder(named[0]) if named else None
