"""Every initialisation of a LoRA adapter that PEFT knows, on a small model."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.models import peft as peft
from tests.support.peft_layers import lora_layers

# isort: split
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga
from transformers.pytorch_utils import Conv1D

LEAVING = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base as it is."""

TAKEN_OUT = ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")
"""Those that take the first A @ B out of the base."""

STARTS = (*LEAVING, *TAKEN_OUT, "loftq")


def three_layers(kind: type = nn.Linear) -> nn.Sequential:
    sizes = [(8, 6), (5, 8)] if kind is Conv1D else [(6, 8), (8, 5)]
    return nn.Sequential(kind(*sizes[0]), nn.Tanh(), kind(*sizes[1]))


def from_a_start(start: str | bool, plain: nn.Module, x: Tensor, **config: Any) -> nn.Module:
    """Build a model with adapters on a copy of `plain`, whose weights PEFT may rewrite; the same at each call."""
    torch.manual_seed(0)
    base = copy.deepcopy(plain)
    more = {"corda": {"corda_config": CordaConfig(corda_method="kpm")}, "lora_ga": {"lora_ga_config": LoraGAConfig()}}
    named = True if start == "loftq" else start
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["0", "2"], **more.get(start, {}), **config}
    with warnings.catch_warnings():  # PEFT has something to say about EVA
        warnings.filterwarnings("ignore", ".*eva", UserWarning)
        adapter = LoraConfig(init_lora_weights=named, **config)
        if start == "corda":
            preprocess_corda(base, adapter, run_model=lambda: base(x))
        if start == "lora_ga":
            preprocess_loraga(base, adapter, lambda: base(x.clone().requires_grad_()).square().mean().backward())
        model = get_peft_model(base, adapter)
    if start == "eva":
        _look_at_data(model, x)
    if start == "loftq":
        _quantize(model)
    return model


def _look_at_data(model: nn.Module, x: Tensor) -> None:
    """Let EVA see the inputs of the layers."""
    initialize_lora_eva_weights(
        model,
        [x] * 4,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: inputs[0] if isinstance(inputs, tuple) else inputs,
        show_progress_bar=False,
    )


@torch.no_grad()
def _quantize(model: nn.Module) -> None:
    """Do what LoftQ does, which needs a GPU in PEFT: round the base, and start at the best product for the rest."""
    for layer in lora_layers(model).values():
        W = layer.get_base_layer().weight
        rounded = (W * 8).round() / 8
        U, s, Vh = torch.linalg.svd(W - rounded, full_matrices=False)
        r = layer.r["default"]
        layer.lora_B["default"].weight.copy_(U[:, :r] * s[:r].sqrt())
        layer.lora_A["default"].weight.copy_(s[:r, None].sqrt() * Vh[:r])
        W.copy_(rounded)
    model.peft_config["default"].init_lora_weights = "loftq"
