"""loralib: the scaling of its layers is a number that the forward pass multiplies by."""

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, LoRATriple


def test_a_folded_layer_follows_the_one_in_place_and_merges_the_same():
    lora = pytest.importorskip("loralib", reason="runs where loralib is installed")
    x = torch.randn(5, 6)
    outputs = []
    for mode in ("in_place", "folded"):
        torch.manual_seed(0)
        module = lora.Linear(6, 4, r=2, lora_alpha=3)
        lora.mark_only_lora_as_trainable(module)
        triple = LoRATriple(
            *((module, n) for n in ("weight", "lora_B", "lora_A")), scaling=(module, "scaling"), name="q"
        )
        optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update=mode)
        for _ in range(5):
            optimizer.zero_grad()
            module(x).tanh().sum().backward()
            optimizer.step()
        outputs.append(module(x).detach())
        module.eval()  # loralib adds scaling * B @ A to the weight now
        torch.testing.assert_close(module(x).detach(), outputs[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
