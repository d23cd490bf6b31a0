"""One optimizer or two of a library: transformers, schedulefree, prodigyopt, lion-pytorch, galore-torch."""

from __future__ import annotations

import galore_torch
import lion_pytorch
import prodigyopt
import schedulefree
import torch
import transformers

from tests.inner_optimizers.layers import Layer
from tests.inner_optimizers.row import Row, row

NO_OPTIMIZER = {
    "follows": "It is no `torch.optim.Optimizer`, and steps z, where no gradient was taken: around a "
    "DeltaLoRAOptimizer it is refused in the second step. Take `AdamWScheduleFree` or another class of the library."
}

PICKLED = {"resumes": "The optimizer keeps an object of its own in its state, which `weights_only=True` refuses."}


def wrapper(layer: Layer) -> torch.optim.Optimizer:
    return schedulefree.ScheduleFreeWrapper(torch.optim.SGD(layer.factors, lr=0.05))  # type: ignore[return-value]


def galore(kind: type[torch.optim.Optimizer], **options) -> Row:
    group = {"rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    name = f"`{kind.__name__.replace('AdamW', 'GaLoreAdamW').replace('Adafactor', 'GaLoreAdafactor')}`, rank=2"
    return Row("galore-torch", name, lambda layer: kind([{"params": layer.factors, **group}], **options), notes=PICKLED)


ROWS: list[Row] = [
    row("transformers", transformers.Adafactor, "its defaults (relative_step, scale_parameter)", lr=None),
    row("transformers", transformers.Adafactor, lr=0.01, relative_step=False, scale_parameter=True, beta1=0.9),
    row("transformers", transformers.Adafactor, lr=0.01, relative_step=False, scale_parameter=False),
    row("schedulefree", schedulefree.AdamWScheduleFree, lr=0.02, warmup_steps=2),
    row("schedulefree", schedulefree.SGDScheduleFree, lr=0.1),
    row("schedulefree", schedulefree.RAdamScheduleFree, lr=0.02),
    Row("schedulefree", "`ScheduleFreeWrapper`", wrapper, notes=NO_OPTIMIZER),
    row("prodigyopt", prodigyopt.Prodigy, lr=1.0, d0=1e-3),
    row("lion-pytorch", lion_pytorch.Lion, lr=0.01),
    row("lion-pytorch", lion_pytorch.Lion, lr=0.01, decoupled_weight_decay=True, weight_decay=0.1),
    galore(galore_torch.GaLoreAdamW, lr=0.01),
    galore(galore_torch.GaLoreAdafactor, lr=None),
]
