"""What the README says of a user's script is true of one."""

import re

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from deltaopt import DeltaLoRAOptimizer
from tests.docs.pages import BLOCKS, README, ROOT


def optimizer_of(side):
    """Run one side of the diff, and return its model and its optimizer."""
    (diff,) = [block.code for block in BLOCKS if block.page == README and block.info == "diff"]
    torch.manual_seed(0)
    names = {
        "torch": torch,
        "get_peft_model": lambda model, config: get_peft_model(model, LoraConfig(r=2, target_modules=r"\d")),
        "LoraConfig": LoraConfig,
        "DeltaLoRAOptimizer": DeltaLoRAOptimizer,
        "model": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
    }
    exec("\n".join(line[1:] for line in diff.splitlines() if line[:1] in (" ", side)), names)
    return names["model"], names["optimizer"]


def test_the_diff_moves_W_in_a_short_run():
    """Up to start_step both sides do the same. After 20 steps every W has moved, and the report says so."""
    (before, plain), (after, optimizer) = optimizer_of("-"), optimizer_of("+")
    for step in range(20):
        if step == 10:
            assert all(map(torch.equal, before.parameters(), after.parameters()))
        for model, its in ((before, plain), (after, optimizer)):
            its.zero_grad()
            model(torch.ones(3, 8)).square().mean().backward()
            its.step()
    assert all(layer.moved and layer.moves == 10 for layer in optimizer.report().layers)
    assert not any(map(torch.equal, weights(before), weights(after)))


def weights(model):
    return [p for name, p in model.named_parameters() if "base_layer.weight" in name]


def test_the_commands_name_what_the_makefile_and_the_package_have():
    readme, makefile = README.read_text("utf8"), (ROOT / "Makefile").read_text("utf8")
    (commands,) = [block.code for block in BLOCKS if block.page == README and block.info == "sh"]
    assert re.search(r"^demo:", makefile, re.MULTILINE)
    assert "make demo" in readme
    for script in re.findall(r"python (\S+\.py)", commands):
        assert (ROOT / script).exists()
    for package in re.findall(r"--no-deps (\S+)", commands):
        assert package in makefile, "the README and `make demo` install the same model"
