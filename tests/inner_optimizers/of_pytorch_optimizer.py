"""A good part of pytorch_optimizer, with its wrappers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_optimizer as library
import torch
from torch.optim import Optimizer

from tests.inner_optimizers.layers import Layer
from tests.inner_optimizers.row import Row, row

NAME = "pytorch-optimizer"

CLASSES = [
    "AdaBelief", "AdamP", "ADOPT", "AdEMAMix", "Adan", "Amos", "CAME", "GrokFastAdamW", "Kate", "Lamb", "LaProp",
    "LARS", "MADGRAD", "NovoGrad", "Ranger", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "Shampoo", "SOAP",
    "StableAdamW", "Tiger",
]  # fmt: skip

PICKLED = {"resumes": "The optimizer keeps an object of its own in its state, which `weights_only=True` refuses."}

SECOND_DERIVATIVES = {
    ("folded", "follows"): "A folded weight goes along with A and B, so that second derivatives are others than those "
    'of a W that stays. Take `weight_update="in_place"`.'
}

TWO_PLACES = {
    ("folded", "follows"): "SAM takes its second gradient at other A and B. W of Delta-LoRA stays in a step, and a "
    'folded one goes along. Take `weight_update="in_place"`.'
}

AROUND = {
    ("in_place", "follows"): "It writes A and B after the step, so that W does not follow its interpolation. Put it "
    "inside: `DeltaLoRAOptimizer(Lookahead(torch.optim.AdamW(factors)), triples)`."
}


def wrapped(wrapper: Callable[..., Optimizer], **options: Any) -> Callable[[Layer], Optimizer]:
    return lambda layer: wrapper(torch.optim.AdamW(layer.factors, lr=0.01), **options)


def bare(layer: Layer) -> Optimizer:
    return torch.optim.AdamW(layer.factors, lr=0.01)


def sam(layer: Layer) -> Optimizer:
    return library.SAM(layer.factors, torch.optim.AdamW, lr=0.01)


def galore(layer: Layer) -> Optimizer:
    group = {"rank": 2, "update_proj_gap": 3, "scale": 0.25, "projection_type": "std"}
    return library.GaLore([{"params": layer.factors, **group}], lr=0.01)


ROWS: list[Row] = [
    *[row(NAME, getattr(library, name), lr=0.01) for name in CLASSES],
    row(NAME, library.Ranger21, lr=0.01, num_iterations=8),
    row(NAME, library.ScalableShampoo, lr=0.01, notes=PICKLED),
    row(NAME, library.SophiaH, lr=0.01, update_period=2, drive="graph", notes=SECOND_DERIVATIVES),
    row(NAME, library.AdaHessian, lr=0.01, drive="graph", notes=SECOND_DERIVATIVES),
    Row(NAME, "`GaLore`, rank=2", galore, notes=PICKLED),
    Row(NAME, "`SAM` of AdamW", sam, drive="both", notes=TWO_PLACES),
    Row(NAME, "`Lookahead` of AdamW, inside", wrapped(library.Lookahead, k=3)),
    Row(NAME, "`Lookahead` around", bare, around=partial(library.Lookahead, k=3), notes=AROUND),
    Row(NAME, "`ScheduleFreeWrapper` of AdamW", wrapped(library.ScheduleFreeWrapper)),
    Row(NAME, "`OrthoGrad` of AdamW", wrapped(library.OrthoGrad)),
]
