"""What PEFT builds of a model: LoRA+, LoRA-FA, the Riemannian preconditioner."""

import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer

from tests.inner_optimizers.layers import SCALING, PeftLayer, R
from tests.inner_optimizers.row import Row

ADAMW = torch.optim.AdamW


def loraplus(layer: PeftLayer) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(layer.model, ADAMW, lr=0.01, loraplus_lr_ratio=4)


def riemannian(layer: PeftLayer) -> torch.optim.Optimizer:
    return create_riemannian_optimizer(layer.model, ADAMW, lr=0.01)


def lorafa(layer: PeftLayer) -> torch.optim.Optimizer:
    return create_lorafa_optimizer(layer.model, R, int(SCALING * R), lr=0.01)


ROWS: list[Row] = [
    Row("peft", "`create_loraplus_optimizer`", loraplus, layer=PeftLayer),
    Row("peft", "`create_riemannian_optimizer`", riemannian, layer=PeftLayer),
    Row("peft", "`create_lorafa_optimizer`", lorafa, layer=PeftLayer),
]
