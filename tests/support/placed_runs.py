"""ONE runner for a small model in any form (whole, DDP, FSDP2, tensor parallel) that gets the same gradients in each.

So a run in one form, and what it becomes after it was saved and loaded in another one, are those of one process, bit
for bit.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support.internals import compensation_of
from tests.support.sharded_runs import KINDS, LR, branched, net, triples_of

RATIO = 2.0
COLUMNWISE, ROWWISE = (Shard(0), Shard(0), Replicate()), (Shard(1), Replicate(), Shard(1))
"""The placements of W, A and B under tensor parallelism, in turn."""


def fsdp(model: nn.Module, **options: Any) -> nn.Module:
    for layer in branched(model):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp_columns(model: nn.Module) -> nn.Module:
    """Along dimension 1 where that is even, which FSDP2 asks for."""
    return fsdp(model, shard_placement_fn=lambda p: Shard(1 - p.shape[1] % 2))


def hybrid(model: nn.Module) -> nn.Module:
    """Whole on each of two ranks, as far as FSDP2 calls it that."""
    return fsdp(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))


def tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for i, layer in enumerate(branched(model)):
        of_W, of_A, of_B = ROWWISE if i % 2 else COLUMNWISE
        layer.base.weight = _distributed(layer.base.weight, mesh, of_W)
        layer.A, layer.B = _distributed(layer.A, mesh, of_A), _distributed(layer.B, mesh, of_B)
    return model


def _distributed(p: nn.Parameter, mesh: Any, placement: Any) -> nn.Parameter:
    placed = distribute_tensor(p.detach(), mesh, [placement], src_data_rank=None)
    return nn.Parameter(placed, requires_grad=p.requires_grad)


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "whole": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp": fsdp,
    "fsdp columns": fsdp_columns,
    "hsdp": hybrid,
    "tp": tensor_parallel,
}


class Started(LoRATriple):
    """A triple whose start took its product out of the pristine W, as PiSSA's."""

    def took_from_base(self, tensors: Any) -> bool:
        return True


class PlacedRun:
    """A model in one of `FORMS`, and its optimizer.

    Args:
        form: a key of `FORMS`.
        kind: a key of `KINDS`.
        zero: A starts at zero.
        started: the start of A and B took its product out of W.
        options: of the optimizer.
    """

    def __init__(
        self, form: str, kind: str = "float32", *, zero: bool = False, started: bool = False, **options: Any
    ) -> None:
        dtype, rounding = KINDS[kind]
        self.model = FORMS[form](net(dtype, zero))
        settings = {"rounding": rounding, "rounding_seed": 3, "update_ratio": RATIO, **options}
        inner = {"inner": torch.optim.AdamW, "lr": LR, **settings}
        triples = triples_of(self.model, Started if started else LoRATriple)
        self.optimizer = DeltaLoRAOptimizer(triples=triples, **inner)

    def factors(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def train(self, steps: Sequence[int]) -> Self:
        """Make the steps with these numbers; each has gradients of its own."""
        for step in steps:
            numbers = torch.Generator().manual_seed(1000 + step)
            for p in self.factors():
                p.grad = None
            # Through the backward pass, in which the folded rule divides them.
            gradients = [placed(torch.randn(p.shape, generator=numbers), p) for p in self.factors()]
            torch.autograd.backward(self.factors(), gradients)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return self

    def scramble(self) -> Self:
        """Make another model of it, which a checkpoint has to bring back."""
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(placed(torch.ones(p.shape, dtype=p.dtype), p))
        return self

    def states(self, **options: Any) -> dict[str, Any]:
        model, optimizer = dcp.get_state_dict(self.model, self.optimizer, options=dcp.StateDictOptions(**options))
        return {"model": model, "optimizer": optimizer}

    def save(self, folder: Any) -> None:
        checkpoint.save(self.states(), checkpoint_id=folder)

    def load(self, folder: Any) -> Self:
        states = self.states()
        checkpoint.load(states, checkpoint_id=folder)
        dcp.set_state_dict(
            self.model, self.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
        )
        return self

    def all_of_it(self) -> dict[str, Any]:
        """All that a checkpoint brings back, whole, on every rank: parameters, scalings, and the optimizer's state."""
        state = self.optimizer.state_dict()
        entries = {
            f"{number}.{key}": whole(value) if isinstance(value, Tensor) else value
            for number, of_one in state["state"].items()
            for key, value in of_one.items()
        }
        return {
            **{name.removeprefix("module."): whole(p) for name, p in self.model.named_parameters()},
            **{f"scaling {i}": layer.scaling for i, layer in enumerate(branched(self.model))},
            **entries,
            "groups": state["param_groups"],
        }

    def compensations(self) -> list[Tensor | None]:
        return [compensation_of(self.optimizer, i) for i in range(len(self.optimizer.triples))]


def placed(tensor: Tensor, p: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks know, as it has its part of `p`."""
    if not isinstance(p, DTensor):
        return tensor
    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
