"""Events of a PEFT model are all or nothing too: a sample of the lines, see tests/behaviour/test_interruption.py."""

import copy

import pytest
import torch

pytest.importorskip("peft", reason="runs where peft is installed")

from deltaopt.integrations.peft import save_adapter
from tests.support.compare import relative
from tests.support.interruption import interrupt, interrupted_at
from tests.support.models import batches, causal_lm
from tests.support.nightly import one_in
from tests.support.peft_layers import assert_loads
from tests.support.peft_runs import ModelRun, peft_asks_by_an_old_name

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]

DATA = batches(6)


def step(run):
    run.optimizer.step()


def restart(run):
    run.optimizer.restart(generator=torch.Generator().manual_seed(3))


def base_weights(run):
    with run.optimizer.base_weights(), run.model.disable_adapter():
        pass


def load_state_dict(run):
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


EVENTS = {event.__name__: event for event in (step, restart, base_weights, load_state_dict)}


def run_before(rule, name):
    """Return a run before an event: before step K, at which the product is not zero, or two steps after it."""
    run = ModelRun(rule, "later").train(DATA[: 3 if name == "step" else 5])
    run.backward(DATA[5])
    return run


@pytest.mark.parametrize(("name", "rule", "share"), one_in(2, EVENTS, ["in_place", "folded"], [0.1, 0.5, 0.8, 0.97]))
def test_an_interrupted_event_leaves_an_adapter_that_is_right(name, rule, share, tmp_path):
    whole, run = run_before(rule, name), run_before(rule, name)
    before = run.effective()
    with interrupted_at(EVENTS[name], None) as lines:
        EVENTS[name](whole)
    interrupt(lambda: EVENTS[name](run), EVENTS[name], int(share * lines.lines))
    run.optimizer.state_dict()
    ends = before, whole.effective()
    now = run.effective()
    assert any(max(relative(now[layer], end[layer]) for layer in end) < 1e-12 for end in ends)
    save_adapter(run.model, run.optimizer, tmp_path / "adapter")
    assert_loads(causal_lm(torch.float64, False).unload(), tmp_path / "adapter", run.model, DATA[0])
    run.optimizer.zero_grad()
    run.train(DATA[:1])
