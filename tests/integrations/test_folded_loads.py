"""A and B in a folded branch that are loaded as they were with another ratio, while W is that of the present one."""

import copy

import pytest
import torch

from tests.support.compare import relative
from tests.support.models import batches, peft
from tests.support.peft_runs import EXACT, K, ModelRun, adapter_of, peft_asks_by_an_old_name

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]

SAID = r"A and B of 10 layers \(.*\) were loaded as they were with another update_ratio.*resync\(state\)"
DATA = batches(2 * K + 2)


@torch.no_grad()
def logits(run):
    return run.model.eval()(input_ids=batches(1, seed=9)[0]).logits


def earlier(run, steps=K - 1):
    """Train before step K and after it; return the logits and what was saved before it."""
    run.train(DATA[:steps])
    then, saved = logits(run), copy.deepcopy(run.state())
    run.model.train()
    run.train(DATA[steps:])
    return then, saved


LOADS = {
    "a state_dict": lambda run, saved: run.model.load_state_dict(adapter_of(saved["model"]), strict=False),
    "plain tensors": lambda run, saved: run.model.load_state_dict(dict(adapter_of(saved["model"])), strict=False),
    "PEFT": lambda run, saved: peft.set_peft_model_state_dict(
        run.model, {key.replace(".default", ""): value for key, value in adapter_of(saved["model"]).items()}
    ),
}


@pytest.mark.parametrize("load", LOADS)
def test_the_first_evaluation_says_so_once(load):
    run = ModelRun("folded", "later")
    then, saved = earlier(run)
    LOADS[load](run, saved)
    with pytest.warns(UserWarning, match=SAID) as told:
        now = logits(run)
    assert len(told) == 1
    assert relative(now, then) > 1e-3
    logits(run)
    run.model.train()
    run.train(DATA[:1])  # neither does the next step


def test_so_does_the_next_step():
    run = ModelRun("folded", "later")
    _, saved = earlier(run)
    LOADS["a state_dict"](run, saved)
    run.model.train()
    with pytest.warns(UserWarning, match=SAID):
        run.train(DATA[:1])


def test_so_it_does_after_a_change_of_the_ratio():
    run = ModelRun("folded", "zero")
    run.train(DATA[:2])
    saved = copy.deepcopy(run.state())
    run.optimizer.groups[0].update_ratio = 0.5
    run.train(DATA[2:4])
    LOADS["a state_dict"](run, saved)
    with pytest.warns(UserWarning, match=SAID):
        logits(run)


@pytest.mark.parametrize("way_out", ["all weights", "resync"])
def test_the_ways_out_are_right_and_quiet(way_out):
    run = ModelRun("folded", "later")
    then, saved = earlier(run)
    if way_out == "all weights":
        run.model.load_state_dict(saved["model"])
    else:
        LOADS["a state_dict"](run, saved)
        run.optimizer.resync(saved["optimizer"])
    assert relative(logits(run), then) < EXACT


def test_with_a_zero_product_nothing_is_said():
    """W was never written, so that it belongs to all of them."""
    run = ModelRun("folded", "zero")
    then, saved = logits(run), copy.deepcopy(run.state())
    run.model.train()
    run.train(DATA[:3])
    LOADS["a state_dict"](run, saved)
    assert relative(logits(run), then) < EXACT


def test_of_the_same_ratio_nothing_is_said():
    run = ModelRun("folded", "later")
    then, saved = earlier(run, steps=K + 2)
    for load in LOADS.values():
        load(run, saved)
        assert relative(logits(run), then) < EXACT
    run.model.train()
    run.train(DATA[:1])
