"""The code in the README runs as it is printed."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

README = (Path(__file__).parent.parent / "README.md").read_text("utf8")


def namespace():
    """What the README takes for granted: a PEFT model, and a layer made by hand."""
    model = get_peft_model(nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]), LoraConfig(r=2, target_modules=r"\d"))
    W, A, B = torch.randn(4, 6), torch.zeros(4, 2, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    factors = [p for p in model.parameters() if p.requires_grad]
    return {
        "torch": torch,
        "model": model,
        "get_peft_model": lambda model, config: model,
        "LoraConfig": LoraConfig,
        "W": W,
        "A": A,
        "B": B,
        "alpha": 4,
        "r": 2,
        "groups_with_every_A_and_B": [{"params": factors[::2]}, {"params": factors[1::2], "lr": 1e-2}],
    }


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks(block):
    names = namespace()
    exec(block, names)
    names["optimizer"].step()
    assert names["optimizer"].step_count == 1


def test_the_diff():
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    names = namespace()
    exec("from deltaopt import DeltaLoRAOptimizer", names)
    exec("\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-")), names)
    assert names["optimizer"].groups[0].start_step == 500
