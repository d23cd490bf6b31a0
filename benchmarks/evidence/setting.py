"""All that the numbers of one run depend on, and the name of its result file."""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Split = Literal["tuning", "test"]
"""What a run is measured on: a held-out part of the training data, or the examples that the task's results are of."""


@dataclass(frozen=True)
class Setting:
    """One run. With the data, the software and the kind of device, it decides every number of the result.

    Attributes:
        task: a name of `tasks.TASKS`.
        model: a folder's name or a hub name.
        row: a name of `rows.ROWS`: the row of the tables that the run belongs to.
        method: a name of `methods.METHODS`: what is trained, and by which rule.
        lr: the highest learning rate of the schedule.
        seed: of the fresh head, the fresh factors, the order of the examples, and dropout.
        split: what is evaluated. A tuning run does not train on the examples that it is measured on.
        steps: number of optimizer steps.
        batch_size: examples in a step.
        max_length: tokens that are read of an example.
        rank: r.
        alpha: the branch is scaled by alpha / r.
        update_ratio: lambda of the methods that move W, the factor of their controls.
        start: K as a share of `steps`, at least 0 and less than 1.
        weight_decay: AdamW's.
        warmup: share of the steps in which the learning rate rises; it then falls to 0 in a straight line.
        label_smoothing: of the training loss.
        clip: the largest norm of the gradient; None to leave it as it is.
        eps: AdamW's.
        head_lr: of the fresh head, where it does not share `lr` with the factors.
        dropout: in the branch, for the paper's ablation.
        model_dropout: False turns the model's own dropout off.
        precision: "float32", or "bfloat16" for autocast.
        train_examples: train on so many examples at most, the first ones.
        test_examples: evaluate at most so many examples of each split, spread evenly over it.
        beams: of the search that writes texts; 1 takes the likeliest token each time.
        length_penalty: a beam's log probability is divided by its length to this power.
        no_repeat: no run of so many tokens is written twice in a text; 0 for no such rule, which a vocabulary of near
            characters needs.
        new_tokens: the longest text that is written; None for as many tokens as the longest training target has.
    """

    task: str
    model: str
    row: str
    method: str
    lr: float
    seed: int
    split: Split
    steps: int
    batch_size: int
    max_length: int
    rank: int = 8
    alpha: float = 16.0
    update_ratio: float = 2.0
    start: float = 0.0
    weight_decay: float = 0.0
    warmup: float = 0.06
    label_smoothing: float = 0.0
    clip: float | None = 1.0
    eps: float = 1e-8
    head_lr: float | None = None
    dropout: float = 0.0
    model_dropout: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    train_examples: int | None = None
    test_examples: int | None = None
    beams: int = 10
    length_penalty: float = 0.8
    no_repeat: int = 4
    new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"{self.row}: a run takes at least 1 step, got steps={self.steps}")
        if not 0 <= self.start < 1 or self.start_step >= self.steps:
            raise ValueError(
                f"{self.row}: start={self.start:g} of {self.steps} steps is step K = {self.start_step}, so that W "
                f"would never move: give a share of the run from 0 to less than 1"
            )
        for name, allowed in (("split", Split), ("precision", Literal["float32", "bfloat16"])):
            if getattr(self, name) not in typing.get_args(allowed):
                known = ", ".join(typing.get_args(allowed))
                raise ValueError(f"{self.row}: {name} is one of {known}, got {getattr(self, name)!r}")

    @property
    def start_step(self) -> int:
        """K: the steps before W begins to move."""
        return round(self.start * self.steps)

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.steps)

    @property
    def path(self) -> str:
        """The result file, below the folder of a grid."""
        return f"{self.task}/{self.row}/{self.split}-lr{self.lr:g}-seed{self.seed}-{self.digest}.json"

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that tell settings of one row apart."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()[:8]

    def as_json(self) -> dict[str, Any]:
        """Return the setting as plain values, without `head_lr` where it is not used: older files have none."""
        values = asdict(self)
        return values if self.head_lr is not None else {k: v for k, v in values.items() if k != "head_lr"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Setting:
        """Return the setting that `as_json` has described.

        Raises:
            TypeError: for unknown or missing names.
        """
        return cls(**values)
