"""The warning that an adapter leaves alone, for a library that is made here: one module with three functions."""

import copy
import pickle
import types
import warnings

import pytest
import torch
from torch import nn

from deltaopt import save_watch
from deltaopt.save_watch import AdapterSave, SaveWatch, is_saving, is_watched, leave

WARNING = "^save_factors keeps the adapter alone, but Delta-LoRA has moved .*the trained model. Do this. To \\*resume"

SOURCE = """
def save_factors(model, self=None):
    return {name: tensor for name, tensor in model.state_dict().items() if "lora" in name}

def helper(model):
    return save_factors(model)

def checkpoint(model, self=None):
    return helper(model)
"""


@pytest.fixture
def library(monkeypatch):
    module = types.ModuleType("adapters_of_somebody.saving")
    exec(compile(SOURCE, "saving.py", "exec"), module.__dict__)
    row = AdapterSave("keeps", "Do this", lambda owner: owner == "whole")
    monkeypatch.setitem(save_watch.ADAPTER_SAVES, ("adapters_of_somebody", "save_factors"), row)
    monkeypatch.setitem(
        save_watch.RESUMABLE_SAVES, ("adapters_of_somebody", "checkpoint"), lambda owner: owner == "all"
    )
    return module


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))


def watched(model: nn.Module) -> SaveWatch:
    watch = SaveWatch.of(model)
    for layer in model:
        assert watch.watch(layer, "branch") is watch
    return watch


def loud(what) -> None:
    with pytest.warns(UserWarning, match=WARNING) as caught:
        what()
    assert [warning.filename for warning in caught] == [__file__]
    what()  # a warning would be an error


def test_it_warns_once_at_the_line_of_the_caller_and_says_what_to_do(library, model):
    library.save_factors(model)
    watched(model)
    model.state_dict()
    loud(lambda: library.save_factors(model))


def test_the_librarys_own_functions_are_not_the_callers_line(library, model):
    watched(model)
    loud(lambda: library.checkpoint(model))


def test_a_save_of_everything_and_one_with_the_optimizer_are_quiet(library, model):
    watch = watched(model)
    library.save_factors(model, "whole")
    library.checkpoint(model, "all")
    assert not watch.said


def test_leaving_every_branch_silences_it_and_the_next_move_is_said_again(library, model):
    watch = watched(model)
    loud(lambda: library.save_factors(model))
    leave(model[0], "branch")
    assert not is_watched(model[0])
    loud(lambda: library.save_factors(model))  # the other layer has moved
    leave(model[1], "branch")
    library.save_factors(model)
    assert not watch.note_save()
    watched(model)
    loud(lambda: library.save_factors(model))


def test_a_branch_rests_while_another_one_of_its_module_has_moved(library, model):
    watched(model)
    SaveWatch().watch(model[0], "other")
    leave(model[0], "branch")
    leave(model[1], "branch")
    assert is_watched(model[0])
    loud(lambda: library.save_factors(model))


def test_there_is_one_of_each_model_and_of_each_copy(library, model):
    first = SaveWatch.of(model)
    assert SaveWatch.of(model) is first
    assert SaveWatch().watch(model[0], "branch") is not first  # who comes first
    held = SaveWatch.of(model)
    assert held is not first
    assert first.watch(model[0], "other") is held
    loud(lambda: library.save_factors(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert SaveWatch.of(twin) is not held
        loud(lambda twin=twin: library.save_factors(twin))
    alone = copy.deepcopy(held)
    assert not alone.said
    assert not alone.note_save()


def test_it_can_be_asked_whether_a_save_is_running(library, model):
    asked = []
    model.register_state_dict_pre_hook(lambda *_: asked.append(is_saving()))
    library.save_factors(model)
    model.state_dict()
    assert asked == [True, False]


def test_a_watch_does_not_keep_its_modules_alive(model):
    watch = watched(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del model[1]
        model[0] = nn.Linear(3, 2)
        assert not watch._guards
    assert isinstance(model(torch.ones(1, 3)), torch.Tensor)
