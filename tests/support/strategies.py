"""The draws of hypothesis, and the tables it draws from: layouts, shapes, dtypes, rules, inner optimizers, events.

A `Stored` is one layer as a library may hold it, with c != d != r. Its functions between stored tensors and the
matrices of the mathematics are written from each library's forward pass, not from the package's views.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from deltaopt import Factor, LoRATriple

C, D, R = 5, 7, 3
E = 2
KERNELS = {"conv1d": (3,), "conv2d": (2, 3), "conv3d": (1, 2, 3)}


@dataclass
class Stored:
    """W, A and B as stored; `matrix(W)` is the dense (c, d) or (e, c, d) matrix, `left`/`right` the factors."""

    W: Tensor
    A: Tensor
    B: Tensor
    matrix: Callable[[Tensor], Tensor]
    left: Callable[[Tensor], Tensor]
    right: Callable[[Tensor], Tensor]
    options: dict
    layout: str = ""
    factors: Callable[[Tensor, Tensor], tuple] = lambda A, B: (A, B)
    """What A and B are registered as."""

    def triple(self, scaling: float | Tensor = 1.0, name: str | None = None) -> LoRATriple:
        return LoRATriple(self.W, *self.factors(self.A, self.B), scaling=scaling, name=name, **self.options)

    def twin(self) -> "Stored":
        """Copy the tensors, without their hooks and gradients."""
        A, B = (factor.detach().clone().requires_grad_() for factor in (self.A, self.B))
        return replace(self, W=self.W.detach().clone(), A=A, B=B)

    def __reduce__(self):
        # The functions are of the layout, so that a copy is made by deepcopy and pickle alike.
        return _again, (self.layout, self.W, self.A, self.B)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Dense copies of W, A and B as matrices."""
        return (
            self.matrix(self.W.detach()).clone(),
            self.left(self.A.detach()).clone(),
            self.right(self.B.detach()).clone(),
        )


def _same(t: Tensor) -> Tensor:
    return t


def _linear(new):
    return Stored(new(C, D), new(C, R), new(R, D), _same, _same, _same, {})


def _transposed(new):
    return Stored(new(D, C), new(C, R), new(R, D), lambda W: W.T, _same, _same, {"layout": "transposed"})


def _embedding(new):
    # 7 rows of width 5; the branch looks up columns of B and multiplies by A.
    return Stored(new(D, C), new(C, R), new(R, D), lambda W: W.T, _same, _same, {"layout": "embedding"})


def _rows(new):
    return Stored(new(3 * C, D), new(C, R), new(R, D), lambda W: W[C : 2 * C], _same, _same, {"rows": (C, 2 * C)})


def _columns(new):
    return Stored(new(C, D + 4), new(C, R), new(R, D), lambda W: W[:, 2 : 2 + D], _same, _same, {"columns": (2, 2 + D)})


def _transposed_rows(new):
    # The query part of GPT-2's fused c_attn, stored (in, 3 * out).
    return Stored(
        new(D, 3 * C),
        new(C, R),
        new(R, D),
        lambda W: W[:, C : 2 * C].T,
        _same,
        _same,
        {"layout": "transposed", "rows": (C, 2 * C)},
    )


def _conv(kernel, channels_last=False):
    d1 = 4

    def build(new):
        W, B = new(C, d1, *kernel), new(R, d1, *kernel)
        if channels_last:
            W, B = (t.to(memory_format=torch.channels_last) for t in (W, B))
        flat = lambda t: t.reshape(t.shape[0], -1)  # noqa: E731
        return Stored(W, new(C, R, *[1] * len(kernel)), B, flat, flat, flat, {"layout": "conv"})

    return build


def _conv_in_order(new):
    # loralib: (B @ A).view(W.shape), with factors of (c * k, r) and (r, d1 * k).
    return Stored(
        new(C, 4, 2, 2),
        new(C * 2, R),
        new(R, 4 * 2),
        lambda W: W.reshape(C * 2, 4 * 2),
        _same,
        _same,
        {"layout": "conv_in_order"},
    )


def _experts(new):
    return Stored(new(E, C, D), new(E, C, R), new(E, R, D), _same, _same, _same, {"layout": "experts"})


def _transposed_experts(new):
    return Stored(
        new(E, D, C),
        new(E, C, R),
        new(E, R, D),
        lambda W: W.transpose(1, 2),
        _same,
        _same,
        {"layout": "transposed_experts"},
    )


def _packed_experts(new):
    # PEFT: A (c, r * e) with the expert's index fastest, B (e * r, d) with it slowest.
    return Stored(
        new(E, C, D),
        new(C, R * E),
        new(E * R, D),
        _same,
        lambda A: torch.stack([A[:, e::E] for e in range(E)]),
        lambda B: torch.stack([B[e * R : (e + 1) * R] for e in range(E)]),
        {"layout": "experts"},
    )


LAYOUTS: dict[str, Callable[..., Stored]] = {
    "linear": _linear,
    "transposed": _transposed,
    "embedding": _embedding,
    "rows": _rows,
    "columns": _columns,
    "transposed_rows": _transposed_rows,
    **{name: _conv(kernel) for name, kernel in KERNELS.items()},
    "conv2d_channels_last": _conv(KERNELS["conv2d"], channels_last=True),
    "experts": _experts,
    "transposed_experts": _transposed_experts,
    "packed_experts": _packed_experts,
}


MORE_LAYOUTS = {"conv_in_order": _conv_in_order}
"""Layouts that differ from one of the others in their views alone, so that not every property has to run over them."""


def scaled_rows(B: Tensor) -> Tensor:
    """diag(E) Q, with E in the last column."""
    return B[:, -1:] * B[:, :-1]


def put_scaled_rows(value: Tensor, B: Tensor) -> None:
    B[:, :-1].copy_(value)
    B[:, -1:].fill_(1.0)


def _rows_of_parameters(new):
    return replace(_linear(new), factors=lambda A, B: (Factor.rows(A, 0, C), Factor.rows(B, 0, R)))


def _diagonal(new):
    right = lambda B: torch.diag(B[:, D]) @ B[:, :D]  # noqa: E731
    factors = lambda A, B: (A, Factor(scaled_rows, B, assign=put_scaled_rows))  # noqa: E731
    return Stored(new(C, D), new(C, R), new(R, D + 1), _same, _same, right, {}, factors=factors)


COMPUTED: dict[str, Callable[..., Stored]] = {"rows_of_parameters": _rows_of_parameters, "diagonal": _diagonal}
"""Layers whose factors are views or functions of what trains."""


def make(
    layout: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype | None = None,
    zero_A: bool = False,
    device: str = "cpu",
) -> Stored:
    """A layer with random tensors, factors trained and W frozen."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    stored = (LAYOUTS | MORE_LAYOUTS | COMPUTED)[layout](new)
    stored.layout = layout
    factors = factor_dtype or dtype
    if zero_A:
        stored.A.zero_()
    stored.W = stored.W.to(dtype).to(device)
    stored.A = stored.A.to(factors).to(device).requires_grad_()
    stored.B = stored.B.to(factors).to(device).requires_grad_()
    return stored


def _again(layout: str, W: Tensor, A: Tensor, B: Tensor) -> Stored:
    return replace(make(layout), W=W, A=A, B=B)


class Problem:
    """A noisy linear regression whose answer is a weight of `shape`: (effective weight, step) -> loss."""

    def __init__(self, shape: torch.Size, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.target = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.inputs = torch.randn(16, shape[-1], 12, generator=generator, dtype=torch.float64)
        self.noise = torch.randn(16, *shape[:-1], 12, generator=generator, dtype=torch.float64)

    def __call__(self, weight: Tensor, step: int) -> Tensor:
        weight = weight.cpu()  # one problem, to the last bit, wherever the weight is
        x = self.inputs[step % 16].to(weight.dtype)
        y = (self.target @ self.inputs[step % 16] + 0.3 * self.noise[step % 16]).to(weight.dtype)
        return (weight @ x - y).square().mean()


problem = Problem


optim = torch.optim
INNERS: dict[str, tuple[type[optim.Optimizer], dict]] = {
    "SGD": (optim.SGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}),
    "SGD_nesterov": (optim.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "Adam": (optim.Adam, {"lr": 0.01}),
    "AdamW_foreach": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.05, "foreach": True}),
    "AdamW_fused": (optim.AdamW, {"lr": 0.01, "fused": True}),
    "AdamW_amsgrad": (optim.AdamW, {"lr": 0.01, "amsgrad": True, "foreach": False}),
    "Adafactor": (optim.Adafactor, {"lr": 0.02}),
    "NAdam": (optim.NAdam, {"lr": 0.01}),
    "RAdam": (optim.RAdam, {"lr": 0.01}),
    "RMSprop": (optim.RMSprop, {"lr": 0.005, "momentum": 0.5}),
    "Adagrad": (optim.Adagrad, {"lr": 0.05}),
    "Adadelta": (optim.Adadelta, {"lr": 1.0}),
    "Adamax": (optim.Adamax, {"lr": 0.01}),
    "Rprop": (optim.Rprop, {"lr": 0.001, "step_sizes": (1e-6, 0.01)}),
    "ASGD": (optim.ASGD, {"lr": 0.02}),
    "Muon": (optim.Muon, {"lr": 0.01}),
}
"""Inner optimizers with settings in which they train `Problem`; LBFGS has a test of its own."""

MATRICES_ONLY = {"Muon"}
RULES = ("in_place", "folded")
each_rule = pytest.mark.parametrize("rule", RULES)
ROUNDINGS = ("nearest", "stochastic", "compensated")

EVENTS = {
    "in_place": ("step", "step", "step", "ratio", "off", "outside", "skipped", "restart"),
    "folded": ("step", "step", "step", "ratio", "off", "skipped", "restart"),
}
"""What can happen to a `runs.LayerRun` between two steps, by rule.

The folded rule counts a change of the factors from outside as a change of the weight.
"""


def _at_random(step: int) -> float:
    return random.Random(step).choice([0.0, 0.4, 2.5])


SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 0.7,
    "delayed": lambda step: 0.7 * (step >= 4),
    "ramp": lambda step: 0.15 * step,
    "down to 0 and up": lambda step: max(0.0, abs(step - 6) / 3 - 0.5),
    "oscillating": lambda step: 1.0 + math.sin(step),
    "on and off": lambda step: 1.5 * (step % 2),
    "random": _at_random,
}
"""Values of `update_ratio` that are functions of the step."""


def fits(inner: str, layout: str) -> bool:
    """Tell if the inner optimizer takes factors as this layout stores them."""
    stored = make(layout)
    return inner not in MATRICES_ONLY or stored.A.dim() == stored.B.dim() == 2


layouts = st.sampled_from(sorted(LAYOUTS))
seeds = st.integers(0, 2**32 - 1)
ratios = st.floats(0.0, 8.0)
moving_ratios = st.floats(0.1, 8.0)
schedules = st.sampled_from(sorted(SCHEDULES))
scalings = st.floats(-4.0, 4.0).filter(lambda s: abs(s) > 1e-3)
some_scalings = st.sampled_from([0.5, -1.3, 4.0])
start_steps = st.integers(0, 6)
early_start_steps = st.integers(0, 3)
restarts = st.integers(0, 2)
clippings = st.sampled_from([None, "norm", "value"])
micro_batches = st.integers(1, 3)
ledger_events = st.lists(st.sampled_from(["move", "coef", "outside", "add", "restart", "sum"]))
rules = st.sampled_from(RULES)
inners = st.sampled_from(sorted(INNERS))
roundings = st.sampled_from(ROUNDINGS)
wide_dtypes = st.sampled_from([torch.float32, torch.float64])
narrow_dtypes = st.sampled_from([torch.bfloat16, torch.float16])
dtypes = st.sampled_from([torch.bfloat16, torch.float32, torch.float64])
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
"""(c, d, r)."""
peft_layers = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["linear", "conv1d_gpt2", "embedding", "conv2d"]),
        "c": st.integers(1, 9),
        "d": st.integers(1, 9),
        "r": st.integers(1, 10),
        "lora_alpha": st.integers(1, 64),
        "use_rslora": st.booleans(),
    }
)
"""The kind and the size of a layer, and the settings of its adapter."""


def events(rule: str = "in_place", min_size: int = 0, max_size: int = 10) -> st.SearchStrategy[list[str]]:
    """Draw the order of what happens to a run of this rule."""
    return st.lists(st.sampled_from(EVENTS[rule]), min_size=min_size, max_size=max_size)
