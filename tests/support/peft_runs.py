"""ONE runner for a tiny PEFT language model: how it is trained, saved, loaded and compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from deltaopt import DeltaLoRAOptimizer
from tests.support.compare import assert_same_bits, bits, relative, same
from tests.support.models import (
    RATIO,
    batches,
    causal_lm,
    deltas,
    layers,
    loss_of,
    optimizer_for,
    plain_loop,
    weights,
)

K = 3
STARTS = {"zero": {"B_zero": True, "start_step": 0}, "later": {"B_zero": False, "start_step": K}}
"""LoRA's usual start, and a product at step K, which the folded rule takes from W once."""

EXACT = 1e-10
"""Relative, Frobenius norm: two float64 runs that are equal but for the order of their sums."""

REBUILT = 1e-6
"""Relative, Frobenius norm: a float32 W rebuilt from its ledger, and what was trained with it since."""

FIRST_SCALING = 2.0
"""The scaling of the branches of `causal_lm`, before a rule folds anything into them."""

each_start = pytest.mark.parametrize("start", STARTS)
KINDS = [(torch.float32, "auto"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "compensated")]
each_kind = pytest.mark.parametrize(("dtype", "rounding"), KINDS, ids=["float32", "bfloat16", "bfloat16-compensated"])

# PEFT asks transformers models by a name that transformers has renamed.
peft_asks_by_an_old_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def effective(model: nn.Module) -> dict[str, Tensor]:
    """Return what every layer multiplies by: W plus PEFT's own delta weight."""
    change = deltas(model)
    return {name: W + change[name] for name, W in weights(model).items()}


def branch_scalings(model: nn.Module) -> set[float]:
    return {layer.scaling["default"] for layer in layers(model).values()}


class ModelRun:
    """A tiny Llama with adapters in training.

    Args:
        rule: how W is moved, a value of `weight_update`.
        start: a key of `STARTS`.
        dtype: of the base weights.
        factors: of A and B; that of the base weights where it is None.
        options: of the optimizer; `B_zero` says whether the product starts at zero.
    """

    def __init__(
        self,
        rule: str = "in_place",
        start: str = "zero",
        dtype: torch.dtype = torch.float64,
        factors: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        settings = {**STARTS[start], **options}
        self.rule = rule
        self.model = causal_lm(dtype, settings.pop("B_zero"), factors)
        self.optimizer: DeltaLoRAOptimizer = optimizer_for(self.model, weight_update=rule, **settings)

    def factors(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def effective(self) -> dict[str, Tensor]:
        return effective(self.model)

    def scalings(self) -> set[float]:
        return branch_scalings(self.model)

    def backward(self, ids: Tensor, factor: float = 1.0) -> None:
        (loss_of(self.model, ids) * factor).backward()

    def clip(self, norm: float = 0.05) -> float:
        return float(nn.utils.clip_grad_norm_(self.factors(), norm))

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, data: list[Tensor]) -> Self:
        plain_loop(self.model, self.optimizer, data)
        return self

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint has to bring back."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class ScheduledRun(ModelRun):
    """A run with a scheduler and a scaler. The factors are float32, as PEFT has them."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(dtype=dtype, factors=torch.float32, B_zero=False, **options)
        self.scheduler = lr_scheduler.OneCycleLR(self.optimizer, max_lr=2e-2, total_steps=2 * len(DATA))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)

    def train(self, data: list[Tensor]) -> Self:
        for ids in data:
            self.optimizer.zero_grad()
            self.scaler.scale(loss_of(self.model, ids)).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
        self.optimizer.zero_grad()
        return self

    def state(self) -> dict[str, Any]:
        return {**super().state(), **self.small_state()}

    def small_state(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler.state_dict(), "scaler": self.scaler.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.load_small(state)

    def load_small(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])


STOP, DATA = 4, batches(8)
"""Where a `ScheduledRun` is saved, and what it is trained on."""


def begun(dtype: torch.dtype = torch.float32, start_step: int = 1, rounding: str = "auto") -> ScheduledRun:
    """Build a run that is to be saved and resumed."""
    return ScheduledRun(dtype, start_step=start_step, rounding=rounding, rounding_seed=1)


def fresh(dtype: torch.dtype = torch.float32, pristine: bool = False, rounding: str = "auto") -> ScheduledRun:
    """Build what a new process has: other settings, other factors, and the pristine base or another one."""
    run = ScheduledRun(dtype, start_step=99, rounding=rounding)
    run.optimizer.groups[0].update_ratio = 3.0
    scramble(run.model, lambda name: "lora_" in name or not pristine)
    return run


@torch.no_grad()
def scramble(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Add noise to the parameters whose names are chosen."""
    for name, parameter in model.named_parameters():
        if chosen(name):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def adapter_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "lora_" in key}


# two models


@torch.no_grad()
def assert_models_follow(folded: nn.Module, in_place: nn.Module, tolerance: float = EXACT) -> None:
    """The factors, the effective weights and the output are equal; W and the scaling of the branch are not."""
    for (name, p), (_, q) in zip(folded.named_parameters(), in_place.named_parameters(), strict=True):
        if p.requires_grad:
            assert relative(p, q) <= tolerance, name
    expected, moved = effective(in_place), weights(in_place)
    for name, W in effective(folded).items():
        assert relative(W, expected[name]) <= tolerance, name
    for name, W in weights(folded).items():
        assert relative(W, moved[name]) > 10 * tolerance, name
    ids = batches(1, seed=9)[0]
    assert relative(folded(input_ids=ids).logits, in_place(input_ids=ids).logits) <= tolerance


def assert_models_close(model: nn.Module, other: nn.Module, tolerance: float = REBUILT) -> None:
    """The parameters of `other` are those of `model` to rounding."""
    expected = bits(model)
    for name, parameter in other.named_parameters():
        assert relative(parameter, expected[name]) <= tolerance, name


def assert_same_models(model: nn.Module, other: nn.Module) -> None:
    """The parameters and the scalings of the branches are equal bit for bit."""
    assert_same_bits(other, bits(model))
    assert branch_scalings(other) == branch_scalings(model)


def assert_same_runs(run: ModelRun, other: ModelRun) -> None:
    """The runs are equal bit for bit, down to the ledgers, the moments and the schedule."""
    assert_same_models(run.model, other.model)
    assert same(run.state(), other.state())


def assert_telescoped(
    model: nn.Module, W_start: dict[str, Tensor], delta_K: dict[str, Tensor], atol: float = 1e-12
) -> None:
    """Every W is its start plus RATIO times what PEFT's delta weight has changed by since step K."""
    end = deltas(model)
    for name, W in weights(model).items():
        asked = RATIO * (end[name] - delta_K[name])
        assert asked.abs().max() > 100 * atol, name
        torch.testing.assert_close(W, W_start[name] + asked, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# a run that is saved and resumed

Way = tuple[Callable[[ScheduledRun, Path], None], Callable[[ScheduledRun, Path], None]]
"""How a run is written to a folder, and how a fresh one reads it."""


def assert_resumes_bit_for_bit(way: Way, folder: Path, dtype: torch.dtype, rounding: str) -> None:
    """With the whole model saved, a resumed run equals the one that was not interrupted."""
    save, load = way
    run, other = begun(dtype, rounding=rounding), fresh(dtype, rounding=rounding)
    run.train(DATA[:STOP])
    save(run, folder)
    run.train(DATA[STOP:])
    load(other, folder)
    assert other.optimizer.step_count == STOP
    other.train(DATA[STOP:])
    assert_same_runs(run, other)


def assert_resumes_to_rounding(way: Way, folder: Path, start_step: int) -> None:
    """From the pristine base and the adapter, W is rebuilt, whether it had moved when it was saved or had not."""
    save, load = way
    run, other = begun(start_step=start_step), fresh(pristine=True)
    base = weights(other.model)
    run.train(DATA[:STOP])
    save(run, folder)
    load(other, folder)
    assert_models_close(run.model, other.model)
    moved = [relative(W, base[name]) for name, W in weights(other.model).items()]
    assert all(change > 1000 * REBUILT for change in moved) if start_step < STOP else not any(moved)
    for r in (run, other):
        r.train(DATA[STOP:])
    assert_models_close(run.model, other.model)
    assert all(relative(W, base[name]) > 1000 * REBUILT for name, W in weights(other.model).items())


def assert_rebuilds_bfloat16_with_one_rounding(way: Way, folder: Path) -> None:
    """From the pristine base and the adapter, a 16-bit W is rounded once, with a warning."""
    save, load = way
    run, other = begun(torch.bfloat16), fresh(torch.bfloat16, pristine=True)
    base = {triple.name: triple.W.double() for triple in other.optimizer.triples}
    run.train(DATA[:STOP])
    save(run, folder)
    match = rf"16-bit .*{len(base)} layers .* rebuilt .*, rounded once"
    with pytest.warns(RuntimeWarning, match=match) as caught:
        load(other, folder)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    for triple, saved in zip(other.optimizer.triples, run.optimizer.triples, strict=True):
        exact = base[triple.name] + run.optimizer.displacement(triple.name).product().double()
        W = triple.W.double()
        spacing = torch.ldexp(torch.ones_like(W), torch.frexp(W).exponent - 8)  # 8 bits from 1/2 on
        assert bool(((W - exact).abs() <= 1.001 * spacing).all())  # a neighbour: rounded stochastically
        assert not torch.equal(triple.W, saved.W)  # that one was rounded at each step
    assert same(adapter_of(other.model.state_dict()), adapter_of(run.model.state_dict()))
    before = weights(other.model)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    assert all(torch.equal(W, before[name]) for name, W in weights(other.model).items())
    other.train(DATA[STOP:])


def both_rules(train: Callable[[ModelRun], Any], start: str = "zero", *arguments: Any, **options: Any):
    """Train a folded and an in-place run alike; what `train` returns must be equal too.

    Returns:
        (the folded run, the run in place).
    """
    folded, in_place = (ModelRun(rule, start, *arguments, **options) for rule in ("folded", "in_place"))
    returned = train(folded)
    expected = train(in_place)
    if returned is not None:
        assert returned == pytest.approx(expected, rel=1e-8, abs=1e-12)
    return folded, in_place
