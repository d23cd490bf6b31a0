"""The code in the README runs as it is printed."""

import copy
import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import deltaopt

README = (Path(__file__).parents[2] / "README.md").read_text("utf8")


def namespace():
    """Build what the README takes for granted: a PEFT model, and a layer made by hand."""
    pristine = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    model = get_peft_model(copy.deepcopy(pristine), LoraConfig(r=2, target_modules=r"\d"))
    W, A, B = torch.randn(4, 6), torch.zeros(4, 2, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    factors = [p for p in model.parameters() if p.requires_grad]
    return {
        "torch": torch,
        "deltaopt": deltaopt,
        "x": torch.randn(3, 8),
        "model": model,
        "pristine": pristine,
        "get_peft_model": lambda model, config: model,
        "LoraConfig": LoraConfig,
        "W": W,
        "A": A,
        "B": B,
        "alpha": 4,
        "r": 2,
        "groups_with_every_A_and_B": [{"params": factors[::2]}, {"params": factors[1::2], "lr": 1e-2}],
    }


def test_python_blocks():
    """Run them in order, and take a step after each."""
    names, blocks = namespace(), re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for steps, block in enumerate(blocks, 1):
        exec(block, names)
        for triple in names["optimizer"].triples:
            triple.A.grad, triple.B.grad = torch.ones_like(triple.A), torch.ones_like(triple.B)
        names["optimizer"].step()
        assert names["optimizer"].step_count == steps
    assert torch.allclose(names["reference"], names["pristine"](names["x"]), atol=1e-5)


def test_the_diff():
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    names = namespace()
    exec("from deltaopt import DeltaLoRAOptimizer", names)
    exec("\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-")), names)
    assert names["optimizer"].groups[0].start_step == 500
