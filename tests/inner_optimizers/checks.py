"""What a row says of one rule: whether it follows, resumes, and keeps the state's format.

- **follows:** A, B, W and what the layer multiplies by are in every step those of the paper's loop, in which the bare
  optimizer trains A and B of a layer with dense products (tests/support/reference.py). The factors that a step begins
  and ends with count. So for SAM it is the net step, and not the way to the point where the second gradient is taken,
  during which W rests. For schedule-free it is the point where gradients are taken; at the end `eval()` puts the
  averaged one into A and B, and W goes along. For Lookahead inside it is the step with the interpolation.
- **resumes:** the model and the optimizer's state go through `torch.save` and `torch.load(weights_only=True)` into a
  new model and a new optimizer. All that follows is bit for bit what it is without the interruption.
- **format:** the saved state, without the keys that begin with "deltaopt", has the keys, types and shapes of what the
  bare optimizer saves after the same steps, and a bare optimizer loads it and saves it again as it is.
"""

from __future__ import annotations

import io
import itertools
import pickle
import re
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deltaopt
from tests.inner_optimizers.layers import SCALING
from tests.inner_optimizers.row import COLUMNS, Row
from tests.support import reference
from tests.support.compare import relative, same, through_a_file
from tests.support.strategies import Problem

STEPS, START = 8, 2
PACKAGE = Path(deltaopt.__file__).parent
INNER = "deltaopt.inner"
"""Where the state of an optimizer is that is not of torch's form."""

SHOWN = 70
"""As many characters of a message are shown in the table."""


class Training:
    """A layer in training, one step at a time.

    Args:
        row: which optimizer.
        rule: of the DeltaLoRAOptimizer; None for the bare optimizer, with a W that stays.

    Attributes:
        ours: the DeltaLoRAOptimizer, whatever is around it; the bare optimizer without one.
    """

    def __init__(self, row: Row, rule: str | None) -> None:
        self.row, self.t = row, 0
        self.layer = row.layer(row.dtype, row.shape)
        self.ours: Any = row.build(self.layer) if rule is None else row.wrap(self.layer, rule, START)
        self.optimizer = row.around(self.ours) if row.around else self.ours
        self.problem = Problem(self.layer.W.shape, 1)
        switch(self.optimizer, "train")

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.problem(self.layer.weight(), batch(self.row, self.t))
        loss.backward(create_graph=self.row.drive == "graph")
        return loss

    def train(self, steps: int = 1) -> Training:
        for _ in range(steps):
            torch.manual_seed(self.t)
            drive(self.row, self.optimizer.step, self.closure)
            self.t += 1
        return self

    def state(self) -> dict[str, Any]:
        return {"model": self.layer.state_dict(), "optimizer": self.optimizer.state_dict(), "t": self.t}

    def load(self, state: dict[str, Any]) -> Training:
        self.layer.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        switch(self.optimizer, "train")
        self.t = state["t"]
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of W as the paper has it, what the layer multiplies by, A and B."""
        with torch.no_grad():
            A, B = self.layer.A.double().clone(), self.layer.B.double().clone()
            effective = self.layer.weight().clone()
        return {"W": effective - SCALING * (A @ B), "effective": effective, "A": A, "B": B}


def batch(row: Row, t: int) -> int:
    return t if row.batches == "new" else 0


def drive(row: Row, step: Any, closure: Any) -> None:
    """Step as the loop of this optimizer does."""
    if row.drive != "closure":
        closure()
    step(*[closure] if row.drive in ("closure", "both") else [])


def switch(optimizer: Any, mode: str) -> None:
    change = getattr(optimizer, mode, None)
    if callable(change):
        change()


class Dense:
    """The paper's loop with the bare optimizer; `optimizer` is as it leaves it."""

    def __init__(self, row: Row) -> None:
        self.row, self.optimizer = row, None
        start = row.layer(row.dtype, row.shape)
        problem = Problem(start.W.shape, 1)
        self.run = reference.delta_lora(
            start.W,
            start.A,
            start.B,
            lambda weight, t: problem(weight, batch(row, t)),
            self._made,
            steps=STEPS,
            update_ratio=row.ratio,
            start_step=START,
            scaling=SCALING,
            left=Tensor.double,
            right=Tensor.double,
            factor_dtype=row.dtype,
            create_graph=row.drive == "graph",
        )

    def _made(self, factors: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Let the optimizer be driven as its row says, by the one call that the reference makes."""
        self.factors = factors
        self.optimizer = self.row.build(self.row.layer(self.row.dtype, self.row.shape).put(*factors))
        self.bare = self.optimizer
        if self.row.around:
            self.optimizer = self.row.around(self.optimizer)
        switch(self.optimizer, "train")
        return _Driven(self.row, self.optimizer)  # type: ignore[return-value]

    def tensors(self, t: int) -> dict[str, Tensor]:
        W, A, B = self.run.W[t], self.run.A[t].double(), self.run.B[t].double()
        return {"W": W, "effective": W + SCALING * (A @ B), "A": A, "B": B}

    def evaluated(self) -> dict[str, Tensor]:
        """Return the same after `eval()`: W goes along with A and B."""
        before = self.tensors(-1)
        switch(self.optimizer, "eval")
        A, B = (factor.detach().double().clone() for factor in self.factors)
        W = before["W"] + self.row.ratio * SCALING * (A @ B - before["A"] @ before["B"])
        return {"W": W, "effective": W + SCALING * (A @ B), "A": A, "B": B}


class _Driven:
    def __init__(self, row: Row, optimizer: torch.optim.Optimizer) -> None:
        self.row, self.optimizer, self.t = row, optimizer, 0

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self, closure: Any) -> None:
        torch.manual_seed(self.t)
        drive(self.row, self.optimizer.step, closure)
        self.t += 1


def cells_of(row: Row, rule: str) -> dict[str, str]:
    """Return what the table says of a row and a rule, by column.

    Raises:
        AssertionError: if W hardly moves.
        Exception: if the bare optimizer cannot be trained.
    """
    with warnings.catch_warnings(record=True) as said, torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("always")
        try:
            whole = Training(row, rule).train(STEPS)
        except Exception as error:
            return {**dict.fromkeys(COLUMNS, "-"), "follows": refusal(error)}
        dense = Dense(row)
        cells = {
            "follows": follows(row, rule, dense),
            "resumes": resumes(row, rule, whole),
            "format": keeps_format(row, whole, dense),
        }
    ours = [str(warning.message) for warning in said if issubclass(warning.category, UserWarning) and is_ours(warning)]
    if ours:
        cells["follows"] += f', saying "{shortened(ours[0])}"'
    return cells


def follows(row: Row, rule: str, dense: Dense) -> str:
    """Compare every step with the reference, and the mode for evaluation at the end."""
    moved = relative(dense.tensors(STEPS)["W"], dense.tensors(0)["W"])
    assert moved > 1e-4, f"{row.key}: W moves by {moved:.1e} only, so that the comparison shows nothing"
    run = Training(row, rule)
    for t in range(STEPS):
        if not is_close(run.train().tensors(), dense.tensors(t + 1), row.tolerance):
            return "no"
    switch(run.optimizer, "eval")
    return "yes" if is_close(run.tensors(), dense.evaluated(), row.tolerance) else "no"


def is_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> bool:
    return all(relative(actual[name], expected[name]) <= tolerance for name in expected)


def resumes(row: Row, rule: str, whole: Training) -> str:
    """Say how `whole`, after all steps, is had with an interruption half way; or what the bare optimizer says."""
    found = resumption(row, rule, whole)
    if found == "yes":
        return found
    bare = resumption(row, None, Training(row, None).train(STEPS))
    return f"{found}, as without Delta-LoRA" if found == bare else found


def resumption(row: Row, rule: str | None, whole: Training) -> str:
    half = Training(row, rule).train(STEPS // 2)
    try:
        loaded, how = through_a_file(half.state()), "yes"
    except pickle.UnpicklingError:
        loaded, how = copied(half.state()), "with `weights_only=False`"
    except Exception as error:
        return f'cannot be saved: "{shortened(str(error))}"'
    try:
        resumed = Training(row, rule).load(loaded).train(STEPS - half.t)
    except Exception as error:
        return f'cannot be loaded: "{shortened(f"{type(error).__name__}: {error}")}"'
    return how if same(resumed.tensors(), whole.tensors()) else "no"


def keeps_format(row: Row, whole: Training, dense: Dense) -> str:
    """Compare the state of `whole`, less what is ours, with that of the bare optimizer, which has to load it."""
    try:
        kept = without_ours(whole.ours.state_dict())
    except Exception as error:
        return f'cannot be saved: "{shortened(str(error))}"'
    if form(kept) != form(dense.bare.state_dict()):
        return "no"
    fresh = row.build(row.layer(row.dtype, row.shape))
    fresh.load_state_dict(copied(kept))
    return "yes" if alike(fresh.state_dict(), kept) else "no"


def copied(state: Any) -> Any:
    """Return what a file gives back, with objects of every kind in it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def without_ours(state: dict[str, Any]) -> dict[str, Any]:
    """Take out what is ours by the names of the keys, and entries of parameters that have nothing else."""
    if INNER in state:
        return state[INNER]
    groups = [
        {key: value for key, value in group.items() if not key.startswith("deltaopt")}
        for group in state["param_groups"]
    ]
    entries = {
        number: {key: value for key, value in kept.items() if not key.startswith("deltaopt")}
        for number, kept in state["state"].items()
        if isinstance(kept, dict)
    }
    entries = {**state["state"], **entries}
    return {**state, "state": {number: kept for number, kept in entries.items() if kept != {}}, "param_groups": groups}


def form(state: Any) -> Any:
    """Return the keys, the types and the shapes of a state."""
    if isinstance(state, Tensor):
        return type(state), state.dtype, state.shape
    if isinstance(state, dict):
        return {key: form(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state), [form(value) for value in state]
    return type(state)


def alike(a: Any, b: Any) -> bool:
    """Tell if two states hold the same numbers; quantized tensors and objects are compared by what they hold."""
    if isinstance(a, Tensor) and type(a) is not Tensor and hasattr(a, "dequantize"):
        a, b = a.dequantize(), b.dequantize()
    if isinstance(a, dict | list | tuple):
        pairs = [(a[key], b[key]) for key in a] if isinstance(a, dict) else list(zip(a, b, strict=True))
        return form(a) == form(b) and all(itertools.starmap(alike, pairs))
    if isinstance(a, Tensor) or not hasattr(a, "__dict__"):
        return same(a, b)
    return type(a) is type(b) and alike(vars(a), vars(b))


def is_ours(warning: warnings.WarningMessage) -> bool:
    """Tell if a warning is of this package: it names layers and what to do."""
    return Path(warning.filename).is_relative_to(PACKAGE) or bool(
        re.search(r"optimizer\.\w+\(|\bW\b", str(warning.message))
    )


def refusal(error: Exception) -> str:
    """Return the cell of an error: by whom, and the beginning of what is said."""
    frames = traceback.extract_tb(error.__traceback__)
    by = "" if Path(frames[-1].filename).is_relative_to(PACKAGE) else " by the optimizer itself"
    return f'refused{by}: "{shortened(str(error))}"'


def shortened(message: str) -> str:
    """Return the beginning of a message as a cell of a table."""
    words = " ".join(re.sub(r"0x[0-9a-f]+", "", message).split()).replace("|", "/").replace('"', "'").replace("`", "")
    return words if len(words) <= SHOWN else words[:SHOWN].rsplit(" ", 1)[0] + " ..."
