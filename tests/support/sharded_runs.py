"""ONE runner for a small model under `fully_shard`, with the same model in one process next to it.

The factors that the sharded run has trained are replayed into the other one step by step, so that a difference of the
weights is one of the moves alone, and not of the order in which gradients are summed up over ranks.
"""

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from deltaopt import DeltaLoRAOptimizer, LoRATriple

SIZES = [(13, 18, 4), (18, 11, 3), (11, 7, 1)]
"""(d, c, r) of the layers: uneven, and with r = 1 a B of which the second of two ranks has nothing."""

KINDS: dict[str, tuple[torch.dtype, str]] = {
    "float32": (torch.float32, "auto"),
    "bfloat16": (torch.bfloat16, "stochastic"),
    "bfloat16-compensated": (torch.bfloat16, "compensated"),
    "bfloat16-nearest": (torch.bfloat16, "nearest"),
    "float16": (torch.float16, "stochastic"),
}
"""Dtype of W, and its rounding."""

RATIO, SCALING, LR = 2.0, 0.5, 1e-2

LAST_PLACES = {"rtol": 4 * 2.0**-23, "atol": 4 * 2.0**-24}
"""A float32 W is equal but for the order of the sums in a product of blocks, which begins each step from there."""


class Branched(nn.Module):
    """A frozen linear layer with a branch that can be switched off."""

    def __init__(self, d: int, c: int, r: int, dtype: torch.dtype, numbers: torch.Generator, zero: bool) -> None:
        super().__init__()
        W, A, B = (torch.randn(shape, generator=numbers) for shape in ((c, d), (c, r), (r, d)))
        self.base = nn.Linear(d, c, bias=False, device="meta")
        self.base.weight = nn.Parameter((W * 0.3).to(dtype), requires_grad=False)
        self.A, self.B = nn.Parameter(A * (0.0 if zero else 0.2)), nn.Parameter(B * 0.5)
        self.scaling = SCALING
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x.to(self.base.weight.dtype)).to(x.dtype)
        return y + self.scaling * (x @ self.B.mT) @ self.A.mT if self.active else y


def net(dtype: torch.dtype = torch.float32, zero: bool = False) -> nn.Sequential:
    """The same numbers at each call; no global random numbers, which ranks that are threads would share."""
    numbers = torch.Generator().manual_seed(0)
    return nn.Sequential(*(Branched(*size, dtype, numbers, zero) for size in SIZES))


def branched(model: nn.Module) -> list[Branched]:
    return [module for module in model.modules() if isinstance(module, Branched)]


def triples_of(model: nn.Module, make: type[LoRATriple] = LoRATriple) -> list[LoRATriple]:
    return [
        make(
            (layer.base, "weight"),
            (layer, "A"),
            (layer, "B"),
            scaling=(layer, "scaling"),
            name=f"l{i}",
            is_active=layer_is_active(layer),
        )
        for i, layer in enumerate(branched(model))
    ]


def layer_is_active(layer: Branched) -> Callable[[], bool]:
    return lambda: layer.active


def switch(model: nn.Module, active: bool) -> None:
    for layer in branched(model):
        layer.active = active


class Replay(torch.optim.Optimizer):
    """Writes the values that it was given, as its step."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {})
        self.values: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p, value in zip(self.param_groups[0]["params"], self.values, strict=True):
            p.copy_(value)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


# FSDP2 shards columns evenly or not at all.
def shard(model: nn.Module, way: str = "layers", **options: Any) -> None:
    """One of `WAYS`."""
    layers = branched(model)
    if way == "W ignored":
        options["ignored_params"] = {layer.base.weight for layer in layers}
    elif way == "all ignored":
        options["ignored_params"] = set(model.parameters())
    elif way == "factors ignored":
        options["ignored_params"] = {p for layer in layers for p in (layer.A, layer.B)}
    elif way == "columns":
        options["shard_placement_fn"] = lambda p: Shard(1 - p.shape[1] % 2)
    elif way == "columns of W":
        options["shard_placement_fn"] = lambda p: Shard(0 if p.requires_grad else 1 - p.shape[1] % 2)
    elif way == "mixed precision":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    elif way in ("not resharded", "one piece, not resharded"):
        options["reshard_after_forward"] = False
    if way == "linear layers":
        for layer in layers:
            fully_shard(layer.base, **options)
    if "one piece" not in way:
        for layer in layers:
            fully_shard(layer, **options)
    fully_shard(model, **options)


WAYS = [
    "layers",
    "linear layers",
    "one piece",
    "not resharded",
    "one piece, not resharded",
    "columns",
    "columns of W",
    "W ignored",
    "factors ignored",
    "all ignored",
    "mixed precision",
]


class ShardedRun:
    """A model under `fully_shard` on this rank, and its copy in one process.

    Args:
        rank: of this process.
        world: the number of ranks.
        kind: a key of `KINDS`.
        way: one of `WAYS`.
        zero: A starts at zero.
        mesh: see `fully_shard`.
        options: of both optimizers.
    """

    def __init__(
        self,
        rank: int,
        kind: str = "float32",
        way: str = "layers",
        *,
        world: int = 2,
        zero: bool = False,
        mesh: Any = None,
        **options: Any,
    ) -> None:
        self.rank, self.world, self.way = rank, world, way
        self.dtype, rounding = KINDS[kind]
        self.zero, self.mesh = zero, {} if mesh is None else {"mesh": mesh}
        self.options = {"rounding": rounding, "rounding_seed": 3, "update_ratio": RATIO, **options}
        self.model, self.alone, self.frozen = (net(self.dtype, zero) for _ in range(3))
        shard(self.model, way, **self.mesh)
        self.optimizer = self.new_optimizer(self.model)
        self.replay = Replay(self.factors(self.alone))
        self.reference = DeltaLoRAOptimizer(self.replay, triples_of(self.alone), **self.options)
        self.t = 0

    def new_model(self, state: dict[str, Tensor] | None = None) -> nn.Module:
        """Another model, sharded in the same way, with whole tensors as its state."""
        model = net(self.dtype, self.zero)
        if state is not None:
            model.load_state_dict(state, strict=False)
        shard(model, self.way, **self.mesh)
        return model

    def new_optimizer(self, model: nn.Module, **options: Any) -> DeltaLoRAOptimizer:
        return DeltaLoRAOptimizer(torch.optim.AdamW, triples_of(model), lr=LR, **{**self.options, **options})

    @staticmethod
    def factors(model: nn.Module) -> list[Tensor]:
        return [p for layer in branched(model) for p in (layer.A, layer.B)]

    @staticmethod
    def weights(model: nn.Module) -> list[Tensor]:
        return [layer.base.weight for layer in branched(model)]

    @property
    def parts(self) -> list[FSDPModule]:
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def reshard(self) -> None:
        """Give up what forward passes without gradients have gathered and kept."""
        for part in self.parts:
            part.reshard()

    def batch(self, t: int) -> Tensor:
        return torch.randn(4 * self.world, SIZES[0][0], generator=torch.Generator().manual_seed(100 + t))

    def backward(self, model: nn.Module, t: int) -> None:
        """Make the gradients of step t, the same on all ranks where the factors are not sharded."""
        for p in self.factors(model):
            p.grad = None
        mine = self.batch(t) if self.is_plain(self.factors(model)) else self.batch(t).chunk(self.world)[self.rank]
        (model(mine) - 1).square().mean().backward()

    @staticmethod
    def is_plain(tensors: Iterable[Tensor]) -> bool:
        return not any(isinstance(tensor, DTensor) for tensor in tensors)

    def train(self, steps: int = 1) -> Self:
        for _ in range(steps):
            self.backward(self.model, self.t)
            self.optimizer.step()
            self.follow()
            self.t += 1
        return self

    def follow(self) -> None:
        """Let the reference make the step that the sharded run has made."""
        self.replay.values = [whole(p) for p in self.factors(self.model)]
        self.reference.step()

    def both(self, event: Callable[[DeltaLoRAOptimizer], Any]) -> tuple[Any, Any]:
        return event(self.optimizer), event(self.reference)

    def assert_follows(self, **tolerance: float) -> None:
        """W is that of the reference: 16 bits exactly, float32 to the last places. The factors are the same."""
        for p, q in zip(self.factors(self.model), self.factors(self.alone), strict=True):
            assert torch.equal(whole(p), q)
        for W, expected in zip(self.weights(self.model), self.weights(self.alone), strict=True):
            self.assert_as(whole(W), expected, **tolerance)

    def assert_as(self, found: Tensor, expected: Tensor, **tolerance: float) -> None:
        expected = expected.detach()
        if tolerance or found.dtype == torch.float32:
            torch.testing.assert_close(found, expected, **(tolerance or LAST_PLACES))
        elif "columns" in self.way:
            # The product of a few columns may differ in float32's last place, which rounding to 16 bits shows seldom.
            assert int((found != expected).sum()) <= 2
            torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=0)
        else:
            assert torch.equal(found, expected)

    def assert_moved(self) -> None:
        for W, before in zip(self.weights(self.model), self.weights(self.frozen), strict=True):
            assert not torch.equal(whole(W), before)
