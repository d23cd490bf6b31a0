"""ONE runner for a toy layer: any layout, dtype, rule and inner optimizer, with a dense account of what W was asked."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support import reference, strategies
from tests.support.compare import assert_close, through_a_file
from tests.support.internals import ledger_of

RATIO = 0.7
"""The `update_ratio` of the runs that are compared with the reference."""

SCALING = 0.5
"""Of the branch of a `LayerRun`, before a rule folds anything into it."""


class LayerRun:
    """One layer in training, whose forward pass multiplies its branch by a 0-d tensor.

    Args:
        rule: how W is moved, a value of `weight_update`.
        layout: a key of `strategies.LAYOUTS`.
        seed: of the tensors and of the problem.
        inner: the inner optimizer.
        zero: whether A starts at zero, as LoRA has it.
        dtype: of W.
        factor_dtype: of A and B; that of W where it is None.
        scaling: what the branch is multiplied by at first.
        gradients: of a "loss" (`strategies.Problem`), or "noise" whose seed is the step.
        device: where the tensors are.
        options: of the optimizer.
    """

    name = "q"
    changed_outside = False

    def __init__(
        self,
        rule: str = "in_place",
        layout: str = "linear",
        *,
        seed: int = 0,
        inner: type[torch.optim.Optimizer] = torch.optim.AdamW,
        zero: bool = True,
        dtype: torch.dtype = torch.float64,
        factor_dtype: torch.dtype | None = None,
        scaling: float = SCALING,
        gradients: str = "loss",
        device: str = "cpu",
        **options: Any,
    ) -> None:
        self.rule, self.inner, self.seed, self.gradients_of = rule, inner, seed, gradients
        self.options = {"lr": 0.02, "update_ratio": 2.0} | options
        self._begin(strategies.make(layout, seed, dtype, factor_dtype, zero, device), scaling)

    def _begin(self, stored: strategies.Stored, scaling: float) -> None:
        self.stored, self.scaling = stored, scaling
        self.W0 = stored.W.clone()
        self.loss = strategies.Problem(stored.matrices()[0].shape, self.seed + 1)
        self.start = self.product()
        self.asked = torch.zeros_like(self.stored.matrices()[0], dtype=torch.float64)
        self.t, self.gradients = 0, []
        self._register(scaling)

    def _register(self, scaling: float) -> None:
        """Build the optimizer of the tensors that are there."""
        self.scale = torch.tensor(scaling, dtype=torch.float64, device=self.stored.W.device)
        self.triple = self.new_triple()
        self.optimizer = self.new_optimizer()

    def new_triple(self) -> LoRATriple:
        """Another triple of the same layer."""
        return self.stored.triple(self.scale, self.name)

    def new_optimizer(self, **options: Any) -> DeltaLoRAOptimizer:
        """Another optimizer of the same triple."""
        options = {"weight_update": self.rule, **self.options, **options}
        return DeltaLoRAOptimizer(self.inner, [self.triple], **options)

    # what the layer is now

    @property
    def factors(self) -> list[Tensor]:
        return [self.stored.A, self.stored.B]

    @property
    def tensors(self) -> list[Tensor]:
        return [t.detach() for t in (self.stored.W, self.stored.A, self.stored.B)]

    def product(self) -> Tensor:
        """A @ B, dense and float64."""
        _, A, B = self.stored.matrices()
        return reference.product(A.double(), B.double())

    def effective(self) -> Tensor:
        """Return what the layer multiplies by, as its forward pass computes it."""
        s = self.stored
        return s.matrix(s.W) + self.scale * (s.left(s.A) @ s.right(s.B)).to(s.W.dtype)

    @torch.no_grad()
    def effective_exactly(self) -> Tensor:
        """Return the same for the stored tensors, in float64."""
        return self.stored.matrix(self.stored.W.double()) + float(self.scale) * self.product()

    def base(self) -> Tensor:
        """W as it was registered, in float64."""
        return self.stored.matrix(self.W0.double())

    @torch.no_grad()
    def moved(self) -> Tensor:
        """Return what W has moved by: by itself, and by what the branch has more than its own scaling."""
        return (self.effective_exactly() - self.scaling * self.product() - self.base()).contiguous()

    def displacement(self) -> Tensor:
        return self.optimizer.displacement(self.name).product().double()

    def size(self) -> float:
        """Return the size of the terms, to which rounding is relative; it may be much larger than that of their sum."""
        terms = ledger_of(self.optimizer).displacement()
        return max(1.0, sum(abs(t.coef) * float((t.A.double() @ t.B.double()).norm()) for t in terms))

    # what happens to it

    def set_gradients(self, micro: int = 1) -> None:
        """Give A and B the gradients of this step."""
        if self.gradients_of == "noise":
            generator = torch.Generator().manual_seed(self.t)
            self._push(torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in self.factors)
            return
        for i in range(micro):
            self.loss(self.effective(), micro * self.t + i).backward()

    def _push(self, gradients: Iterable[Tensor]) -> None:
        """Give these gradients to A and B by a backward pass, as some rules ask for."""
        with torch.enable_grad():
            for factor, gradient in zip(self.factors, gradients, strict=True):
                (factor * gradient.to(factor)).sum().backward()

    def backward(self, micro: int = 1) -> None:
        """Make the gradients of this step from none, and note them."""
        self.optimizer.zero_grad()
        self.set_gradients(micro)
        self.gradients.append([p.grad.clone() for p in self.factors])

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        value = self.loss(self.effective(), self.t)
        value.backward()
        return value

    def step(self, *arguments: Any) -> None:
        """Let the optimizer step with the gradients that are there, and keep the dense account."""
        before, ratio = self.product(), self.optimizer.groups[0].ratio_at(self.optimizer.step_count)
        with warnings.catch_warnings():
            if self.changed_outside:
                warnings.filterwarnings("ignore", ".* changed between two steps")
            self.optimizer.step(*arguments)
        self.t += 1
        change = self.product() - before
        if ratio > 0 and bool(change.isfinite().all()):
            self.asked += ratio * self.scaling * change

    def train(self, steps: int = 1, micro: int = 1, clip: str | None = None, by_closure: bool = False) -> Self:
        """Take `steps` steps, of `micro` batches each, with gradients clipped by "norm" or "value"."""
        for _ in range(steps):
            if by_closure:
                self.step(self.closure)
                continue
            self.backward(micro)
            if clip == "norm":
                nn.utils.clip_grad_norm_(self.factors, 0.1)
            elif clip == "value":
                nn.utils.clip_grad_value_(self.factors, 0.02)
            self.step()
        return self

    @torch.no_grad()
    def happen(self, event: str) -> None:
        """One of `strategies.EVENTS`."""
        group = self.optimizer.groups[0]
        if event == "step":
            with torch.enable_grad():
                self.train()
        elif event == "ratio":
            group.update_ratio = group.update_ratio * 0.75 + 0.5
        elif event == "off":
            group.update_ratio, ratio = 0.0, group.update_ratio
            self.happen("step")
            group.update_ratio = ratio
        elif event == "outside":
            self.changed_outside = True
            self.stored.A.data.mul_(1.25)
            self.stored.B.data.add_(0.125)
        elif event == "restart":
            self.asked += self.scaling * self.product()
            self.optimizer.restart(generator=torch.Generator().manual_seed(self.t))
        elif event == "skipped":
            self._skipped_step()
        else:
            raise ValueError(f"no event {event!r}")

    def _skipped_step(self) -> None:
        """Step with gradients of NaN, then put the factors and the moments back as a user does."""
        kept = [factor.detach().clone() for factor in self.factors]
        self.optimizer.zero_grad()
        self._push(torch.full_like(factor, float("nan")) for factor in self.factors)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a LoRA factor became NaN")
            self.step()
        for factor, value in zip(self.factors, kept, strict=True):
            factor.data.copy_(value)
        for state in self.optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].zero_()

    # copies

    def twin(
        self,
        *,
        whole: bool = True,
        state: dict | None = None,
        factors: list[Tensor] | None = None,
        scaling: float | None = None,
        load: bool = True,
        **options: Any,
    ) -> Self:
        """A new layer and optimizer that have loaded a state.

        Args:
            whole: whether W is this run's, or the base.
            state: what is loaded; this run's, after a way through a file, where it is None.
            factors: A and B; this run's where it is None.
            scaling: of the new layer's branch; as at first where it is None.
            load: whether anything is loaded.
            options: of the new optimizer, over those of this run.
        """
        other = copy.copy(self)
        other.stored, other.asked, other.gradients = self.stored.twin(), self.asked.clone(), list(self.gradients)
        other.options = {**self.options, **options}
        with torch.no_grad():
            other.stored.W.copy_(self.stored.W if whole else self.W0)
            for factor, value in zip(other.factors, factors or self.factors, strict=True):
                factor.copy_(value)
        other._register(self.scaling if scaling is None else scaling)
        if load:
            other.optimizer.load_state_dict(through_a_file(self.optimizer.state_dict()) if state is None else state)
        return other


def noisy_run(layout: str = "linear", seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> LayerRun:
    """A run whose gradients do not depend on W, from a product that is not zero."""
    options = {"zero": False, "gradients": "noise", "update_ratio": 1.5, **options}
    return LayerRun(options.pop("rule", "in_place"), layout, seed=seed, dtype=dtype, **options)


class SmallSteps(LayerRun):
    """A layer as language models have it: small weights, small steps, A zero at first, gradients with a direction."""

    C, D, R = 48, 40, 4

    def __init__(self, dtype: torch.dtype = torch.bfloat16, seed: int = 0, rule: str = "in_place", **options: Any):
        generator = torch.Generator().manual_seed(seed)
        W = (0.02 * torch.randn(self.C, self.D, generator=generator)).to(dtype)
        B = (torch.rand(self.R, self.D, generator=generator) * 2 - 1) * self.D**-0.5
        self.goal = torch.randn(self.C, self.D, generator=generator)
        stored = strategies.make("linear")
        stored.W, stored.A, stored.B = W, torch.zeros(self.C, self.R, requires_grad=True), B.requires_grad_()
        self.rule, self.inner, self.seed, self.gradients_of = rule, torch.optim.AdamW, seed, "direction"
        self.name = f"q{seed}"
        self.options = {"lr": 2e-5, "update_ratio": 0.5} | options
        self._begin(stored, self.options.pop("scaling", 2.0))

    def set_gradients(self, micro: int = 1) -> None:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.t)
        G = self.goal + 2 * torch.randn(self.C, self.D, generator=generator)
        with torch.no_grad():
            gradients = G @ self.stored.B.mT, self.stored.A.mT @ G
        self._push(gradients)

    def landed(self) -> Tensor:
        """Return what W itself has moved by."""
        return self.stored.W.double() - self.W0.double()

    def kept(self) -> float:
        """The fraction of the displacement that W has made."""
        asked = self.displacement()
        return float((self.landed() * asked).sum() / asked.square().sum())

    def same_as(self, other: "SmallSteps") -> bool:
        return all(map(torch.equal, self.tensors, other.tensors))


def noisy_step(optimizer: torch.optim.Optimizer, *factors: Tensor) -> None:
    """One step with random gradients."""
    for factor in factors:
        factor.grad = torch.randn_like(factor)
    optimizer.step()


def assert_follows(run: LayerRun, other: LayerRun, tolerance: float = 1e-10) -> None:
    """Assert equal factors, gradients and effective weights, whatever the rules are."""
    pairs = [*zip(run.factors, other.factors, strict=True), (run.effective(), other.effective())]
    pairs += [pair for gs in zip(run.gradients, other.gradients, strict=True) for pair in zip(*gs, strict=True)]
    for now, expected in pairs:
        assert float((now - expected).detach().norm()) <= tolerance * max(float(expected.detach().norm()), 1e-3)


def assert_agrees(run: LayerRun, other: LayerRun, tolerance: float = 1e-10) -> None:
    """All that an optimizer tells of the change of W is the same, and so is the layer without the change."""
    assert_follows(run, other, tolerance)
    assert_close(run.displacement(), other.displacement(), tolerance)
    exports = [deltaopt.export_adapter(r.optimizer)[r.name] for r in (run, other)]
    assert_close(exports[0].product(), exports[1].product(), tolerance)
    merged = [deltaopt.merged_weights(r.optimizer)[r.name] for r in (run, other)]
    assert_close(*merged, tolerance)
    within = []
    for r in (run, other):
        with r.optimizer.base_weights():
            within.append((r.stored.W.clone(), r.effective().detach().clone()))
    for now, expected in zip(*within, strict=True):
        assert_close(now, expected, tolerance)
    assert_follows(run, other, tolerance)
