"""The walk over a model's modules and the names of its layers: what torch and the definition say, with less work."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from deltaopt.modules import modules_of
from deltaopt.naming import name_without_wrappers, short_names


def nested(depth: int) -> nn.Module:
    shared = nn.Linear(2, 2)
    module: nn.Module = nn.Sequential(shared, nn.ModuleDict({"again": shared, "other": nn.ReLU()}))
    for _ in range(depth):
        module = nn.Sequential(nn.Identity(), module, shared)
    module.register_module("nothing", None)
    return module


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_the_walk_gives_what_torch_gives_in_its_order(depth):
    model = nested(depth)
    assert list(modules_of(model).items()) == list(model.named_modules())


def test_a_module_that_holds_itself_is_met_once():
    model = nn.Sequential(nn.ReLU())
    model[0].register_module("above", model)
    assert list(modules_of(model).items()) == list(model.named_modules())


def test_names_are_short_all_at_once_as_one_by_one():
    wrapped = nn.Sequential(AveragedModel(nn.Sequential(nn.Linear(2, 2))), torch.compile(nn.Sequential(nn.ReLU())))
    names = [*wrapped.state_dict(), *(name for name, _ in wrapped.named_modules()), "0.0.weight", "1.0", "0.nowhere.a"]
    assert short_names(wrapped, names) == {name: name_without_wrappers(wrapped, name) for name in names}
    assert short_names(wrapped, names)["0.module.0.weight"] == short_names(wrapped, names)["0.0.weight"] == "0.0.weight"
    assert short_names(wrapped, names)["1._orig_mod.0"] == "1.0"


def test_what_names_begin_with_alike_is_looked_up_once(monkeypatch):
    model, looks = nested(8), []
    monkeypatch.setattr("deltaopt.naming._wrapped_by", lambda module: looks.append(module))
    names = [name for name, _ in model.named_modules()]
    short_names(model, names)
    assert len(looks) < len(names)
