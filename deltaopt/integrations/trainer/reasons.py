"""Why a run has moved no weight."""

from __future__ import annotations

from torch import Tensor

from deltaopt.optimizer import DeltaLoRAOptimizer


class Reasons:
    """What was seen before each step, on the host, that a run without any movement may be explained by."""

    def __init__(self) -> None:
        self._largest_lr = 0.0
        self._gradients = False

    def note(self, optimizer: DeltaLoRAOptimizer) -> None:
        """Look at the learning rates and at whether A and B have gradients; nothing waits for the device."""
        for group in optimizer.param_groups:
            lr = group.get("lr")
            self._largest_lr = max(self._largest_lr, 1.0 if lr is None or isinstance(lr, Tensor) else abs(lr))
        if not self._gradients:
            self._gradients = any(f.grad is not None for triple in optimizer.triples for f in triple.parameters)

    def of(self, optimizer: DeltaLoRAOptimizer) -> str:
        """Return the reason, as a sentence with what to do."""
        steps, groups = optimizer.step_count, optimizer.groups
        first = min(group.start_step for group in groups)
        if steps == 0:
            return "no step was taken"
        if first >= steps:
            return f"start_step is {first}, and the run took {steps} steps. Give a smaller start_step"
        if all(group.ratio_at(step) == 0 for group in groups for step in range(group.start_step, steps)):
            return "update_ratio was 0. Give a larger one"
        if self._largest_lr == 0:
            return "the learning rate was 0 in every step"
        if not self._gradients:
            return "no gradients reached A and B. Look at which adapter is active, and at what is detached"
        skipped = optimizer.skipped_updates
        if skipped >= steps - first:
            return f"a factor was NaN or infinite in all of the last {skipped} steps. Give a smaller learning rate"
        return "A and B have not changed"
