"""The changes of all layers over training, noted every now and then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltaopt.analysis.changes import LayerChange, layer_changes
from deltaopt.optimizer import DeltaLoRAOptimizer
from deltaopt.wrappers import unwrap


class History:
    """What `layer_changes` returned at some steps of a run.

    Args:
        optimizer: whose layers are noted; a wrapped one too. Default: none, for a history that is read from a file.

    Attributes:
        steps: at which the changes were noted, in calls of ``step()``.
        changes: what `layer_changes` returned then.

    Example:
        >>> import torch
        >>> W, A, B = torch.eye(4), torch.ones(4, 1, requires_grad=True), torch.zeros(1, 4, requires_grad=True)
        >>> optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=0.5, update_ratio=1.0)
        >>> history = History(optimizer)
        >>> for _ in range(2):
        ...     B.grad = torch.tensor([[-1.0, 0.0, 0.0, 0.0]])
        ...     _ = optimizer.step()
        ...     history.record()
        >>> history.steps, history.series("weight_norm")
        ([1, 2], {'triple0': [1.0, 2.0]})
    """

    def __init__(self, optimizer: DeltaLoRAOptimizer | None = None) -> None:
        self._optimizer = None if optimizer is None else unwrap(optimizer)
        self.steps: list[int] = []
        self.changes: list[list[LayerChange]] = []

    def record(self) -> None:
        """Note the changes now, between two steps. It costs what `layer_changes` does.

        Raises:
            RuntimeError: if this history has no optimizer; or as `layer_changes`.
        """
        if self._optimizer is None:
            raise RuntimeError("this History was made without an optimizer: make it by History(optimizer) to record")
        self.changes.append(layer_changes(self._optimizer))
        self.steps.append(self._optimizer.step_count)

    def series(self, figure: str) -> dict[str, list[float | None]]:
        """Return one figure over the steps, by name of the layer; None where it was not known.

        Args:
            figure: a field of `LayerChange`, such as ``"weight_norm"``.

        Raises:
            ValueError: for another name.
        """
        known = [name for name in LayerChange._fields if name != "name"]
        if figure not in known:
            raise ValueError(f"figure is one of {', '.join(known)}, got {figure!r}")
        names = dict.fromkeys(change.name for changes in self.changes for change in changes)
        rows = [{change.name: getattr(change, figure) for change in changes} for changes in self.changes]
        return {name: [row.get(name) for row in rows] for name in names}

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain Python types, for ``json.dump``."""
        return {"steps": list(self.steps), "changes": [[row._asdict() for row in rows] for rows in self.changes]}

    @classmethod
    def from_dict(cls, held: Mapping[str, Any]) -> History:
        """Return the history that `as_dict` has described."""
        history = cls()
        history.steps = list(held["steps"])
        history.changes = [[LayerChange(**row) for row in rows] for rows in held["changes"]]
        return history
