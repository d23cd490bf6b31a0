"""All of torch.optim: a class that is not named here has a row by itself."""

import inspect

import torch
from torch import optim
from torch.optim import Optimizer

from tests.inner_optimizers.row import Row, row

SEVERAL_PLACES = {
    (
        "folded",
        "follows",
    ): "LBFGS evaluates the loss at several A and B in a step. W of Delta-LoRA stays in a step, and "
    'a folded one goes along. Take `weight_update="in_place"`.'
}
NO_GRAPH = {"follows": "W is moved without a graph."}
ON_A_GPU = {
    "follows": "torch takes `capturable=True` on a GPU alone, and this table was made on a CPU. The capture of a "
    "whole step into a CUDA graph is refused, since the ratio and the count of steps would be frozen in it."
}
DENSE = {"follows": "The gradients of A and B are dense. Made sparse by the loop, they train as in the row below."}

OPTIONS = {
    "ASGD": {"dtype": torch.float32},  # these two keep a float32 number, which torch loads in the dtype of A
    "NAdam": {"dtype": torch.float32},
    "Muon": {"dtype": torch.float32},  # computes in bfloat16
    "Rprop": {"lr": 0.001},
    "LBFGS": {"lr": 0.1, "max_iter": 3, "drive": "closure", "batches": "one", "notes": SEVERAL_PLACES},
    "SparseAdam": {"notes": DENSE},
}
"""What a class needs that does not train well with its defaults and lr=0.01."""

CLASSES = sorted(
    (kind for kind in vars(optim).values() if inspect.isclass(kind) and issubclass(kind, Optimizer)),
    key=lambda kind: kind.__name__.lower(),
)
CLASSES.remove(Optimizer)


class SparseAdamOfSparse(optim.SparseAdam):
    """Makes the gradients sparse, which those of factors are not by themselves."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad.to_sparse()
        return super().step(closure)


def variants(kind: type[Optimizer]) -> list[Row]:
    adam = kind is not optim.SGD
    return [
        row("torch", kind, foreach=True, lr=0.01),
        row("torch", kind, fused=True, lr=0.01),
        row("torch", kind, maximize=True, lr=0.001),
        row("torch", kind, "lr=a tensor", lr=torch.tensor(0.01)),
        *([row("torch", kind, amsgrad=True, lr=0.01)] if adam else []),
        *([row("torch", kind, capturable=True, lr=0.01, notes=ON_A_GPU)] if adam else []),
        *([] if adam else [row("torch", kind, momentum=0.9, nesterov=True, weight_decay=0.01, lr=0.01)]),
        row("torch", kind, differentiable=True, lr=0.01, notes=NO_GRAPH),
    ]


ROWS: list[Row] = [
    *[row("torch", kind, **{"lr": 0.01, **OPTIONS.get(kind.__name__, {})}) for kind in CLASSES],
    row("torch", SparseAdamOfSparse, "of sparse gradients", lr=0.01),
    row("torch", optim.LBFGS, **{**OPTIONS["LBFGS"], "line_search_fn": "strong_wolfe"}),
    *variants(optim.Adam),
    *variants(optim.AdamW),
    *variants(optim.SGD),
]
