"""Restarts as in ReLoRA (arXiv 2307.05695): the branch is added to W, and A and B begin afresh.

It happens after each quarter of the run but the last, with the states of A and B in AdamW cleared. The learning rate
then rises again: within the share of a quarter that the warm-up has of the whole run, up to the run's own schedule,
which goes on. The head takes part in that, as everything that trains does in ReLoRA; its state in AdamW stays.
"""

from __future__ import annotations

from benchmarks.evidence.setting import Setting
from deltaopt import DeltaLoRAOptimizer

QUARTERS = 4


class Restarts:
    """What a run with restarts does around a step. All of it follows from the number of the step.

    Args:
        optimizer: with the triples. Its "lr" is set by the run's schedule before each `before_step`.
        setting: of the run.
    """

    def __init__(self, optimizer: DeltaLoRAOptimizer, setting: Setting) -> None:
        self._optimizer = optimizer
        steps = setting.steps
        self.at = sorted({round(steps * k / QUARTERS) for k in range(1, QUARTERS)} - {0, steps})
        """The numbers of completed steps after which A and B begin afresh."""
        self.warmup = round(setting.warmup * steps / QUARTERS)

    def before_step(self, step: int) -> None:
        """Lower the learning rate of a step that comes soon after a restart."""
        since = min((step - restart for restart in self.at if restart <= step), default=self.warmup)
        if since < self.warmup:
            for group in self._optimizer.param_groups:
                group["lr"] *= (since + 1) / (self.warmup + 1)

    def after_step(self, step: int) -> None:
        """Restart after the last step of a quarter."""
        if step + 1 in self.at:
            self._optimizer.restart()
