"""Factors that somebody else changes between steps: in place W does not follow, and one warning says so."""

import copy
import re

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, schedules
from tests.support import internals
from tests.support.compare import close
from tests.support.runs import LayerRun, noisy_run

TOLD = re.escape("A and B of 1 layer (q) were changed between two steps") + ".*no step: call optimizer.resync()"
HOSTS = {"cpu": "in_place", "gpu": internals.as_on_a_gpu()}
each_host = pytest.mark.parametrize("rule", HOSTS.values(), ids=HOSTS)


@torch.no_grad()
def change(run, factor=0.5):
    """Change A as an averaged adapter does."""
    run.stored.A.mul_(factor)


@each_host
def test_the_next_step_says_so_once(rule):
    run = LayerRun(rule).train(2)
    change(run)
    with pytest.warns(UserWarning, match=TOLD) as caught:
        run.train(1)
    assert len(caught) == 1
    change(run)
    run.train(1)  # not again: warnings are errors
    run.optimizer.resync()
    run.train(1)
    change(run)
    with pytest.warns(UserWarning, match=TOLD):
        run.train(1)


def test_at_the_line_that_calls_step():
    run = LayerRun().train(1)
    torch.optim.lr_scheduler.LinearLR(run.optimizer)  # wraps `step` once more
    change(run)
    with pytest.warns(UserWarning, match=TOLD) as caught:
        run.optimizer.step()
    assert caught[0].filename == __file__


def test_all_layers_in_one_sentence():
    runs = [noisy_run(seed=seed) for seed in range(3)]
    for run, name in zip(runs, "qkv", strict=True):
        run.name = name
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [run.new_triple() for run in runs], lr=0.1)

    def step():
        for run in runs:
            run.t += 1
            run.set_gradients()
        optimizer.step()

    step()
    change(runs[0])
    change(runs[2])
    with pytest.warns(UserWarning, match=re.escape("A and B of 2 layers (q, v)")):
        step()


def test_through_data_as_averages_are_copied():
    run = LayerRun().train(2)
    run.stored.B.data.copy_(run.stored.B.data * 0.5)
    with pytest.warns(UserWarning, match=TOLD):
        run.train(1)


@each_host
def test_an_adapter_of_another_rank(rule):
    run = noisy_run(rule=rule, inner=torch.optim.SGD).train(1)
    run.stored.A.data, run.stored.B.data = torch.ones(5, 2, dtype=torch.float64), torch.ones(2, 7, dtype=torch.float64)
    with pytest.warns(UserWarning, match=TOLD):
        run.train(1)


def test_a_gpu_reports_later():
    """Warn in the step that learns of it, or when somebody asks for what waits for the device."""
    reports = iter([*[False] * 9])
    run = LayerRun(internals.as_on_a_gpu(reports=reports)).train(2)
    change(run)
    run.train(1)
    with pytest.warns(UserWarning, match=TOLD):
        run.optimizer.state_dict()
    run = LayerRun(internals.as_on_a_gpu(reports=iter([*[False] * 6, *[True] * 9]))).train(2)
    change(run)
    run.train(1)
    with pytest.warns(UserWarning, match=TOLD):
        run.train(1)


@each_host
def test_not_before_the_first_move(rule):
    run = LayerRun(rule, start_step=3).train(2)
    change(run)
    run.train(1)
    change(run)
    run.train(2)
    assert run.optimizer.step_count == 5


@each_host
def test_not_where_W_rested_while_A_and_B_trained(rule):
    run = LayerRun(rule, update_ratio=lambda t: 2.0 if t % 3 == 0 else 0.0).train(8)
    run = LayerRun(rule, update_ratio=schedules.linear(1.0, 2.0, steps=4, stages=2)).train(6)
    run.optimizer.groups[0].update_ratio = 0.0
    run.train(1)
    change(run)
    run.train(1)
    run.optimizer.groups[0].update_ratio = 1.0
    run.train(2)


@each_host
def test_not_after_resync_restart_rebase_base_weights_or_a_loaded_state(rule):
    run = LayerRun(rule).train(2)
    for event in (run.optimizer.resync, run.optimizer.restart, run.optimizer.rebase):
        change(run)
        event()
        run.train(2)
    with run.optimizer.base_weights():
        pass
    run.train(1)
    state, tensors = copy.deepcopy(run.optimizer.state_dict()), [t.clone() for t in run.tensors]
    run.train(2)
    with torch.no_grad():
        for own, kept in zip((run.stored.W, *run.factors), tensors, strict=True):
            own.copy_(kept)
    run.optimizer.load_state_dict(state)
    run.train(2)


def test_not_where_resync_was_called_while_W_rests():
    run = LayerRun().train(2)
    run.optimizer.groups[0].update_ratio = 0.0
    change(run)
    run.optimizer.resync()
    run.optimizer.groups[0].update_ratio = 1.0
    run.train(1)


def test_not_after_a_state_that_was_saved_while_W_rests():
    run = LayerRun().train(2)
    run.optimizer.groups[0].update_ratio = 0.0
    run.train(2)
    state = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.load_state_dict(state)
    run.optimizer.groups[0].update_ratio = 1.0
    run.train(2)


@each_host
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_not_where_the_factors_were_cast(rule, dtype):
    run = noisy_run(rule=rule, inner=torch.optim.SGD, dtype=torch.float32).train(2)
    for tensor in (run.stored.W, *run.factors):
        tensor.data = tensor.data.to(dtype)
    run.stored.A.grad = run.stored.B.grad = None
    run.train(1)
    for tensor in (run.stored.W, *run.factors):
        tensor.data = tensor.data.to(dtype).float()
    run.stored.A.grad = run.stored.B.grad = None
    run.train(1)


@each_host
def test_not_after_an_update_that_was_skipped(rule):
    """The other layers' factors have moved in that step, and W with none of them; a warning has said so."""
    run = LayerRun(rule).train(2)
    good = [t.clone() for t in run.tensors]
    run.stored.A.grad = torch.full_like(run.stored.A, torch.nan)
    run.stored.B.grad = torch.zeros_like(run.stored.B)
    with pytest.warns(RuntimeWarning, match="a LoRA factor became NaN"):
        run.optimizer.step()
    with torch.no_grad():
        for own, kept in zip(run.factors, good[1:], strict=True):
            own.copy_(kept)
    for state in run.optimizer.state.values():
        state.clear()
    run.train(2)


@each_host
def test_not_after_steps_that_raised(rule):
    run = LayerRun(rule).train(2)

    def closure():
        raise KeyError("in a closure")

    for _ in range(2):
        with pytest.raises(KeyError, match="in a closure"):
            run.optimizer.step(closure)
    run.train(1)

    def half_a_step(closure=None):
        change(run)
        raise MemoryError("half-way")

    run.optimizer.inner.step = half_a_step
    with pytest.raises(MemoryError, match="half-way"):
        run.optimizer.step()
    del run.optimizer.inner.step
    run.train(2)


@each_host
def test_copies_are_watched_too(rule):
    run = LayerRun(rule).train(2)
    twin = copy.deepcopy(run).train(1)
    change(twin)
    with pytest.warns(UserWarning, match=TOLD):
        twin.train(1)
    run.train(1)


def test_the_folded_rule_has_nothing_to_say():
    run = LayerRun("folded").train(2)
    change(run)
    run.train(2)


def test_a_warning_that_is_an_error_finds_the_step_done():
    run, whole = LayerRun().train(2), LayerRun().train(2)
    change(run)
    change(whole)
    with pytest.raises(UserWarning, match=TOLD):  # warnings are errors here
        run.train(1)
    with pytest.warns(UserWarning, match=TOLD):
        whole.train(1)
    assert run.optimizer.step_count == whole.optimizer.step_count == 3
    assert all(map(torch.equal, run.tensors, whole.tensors))


class Lookahead:
    """Moves slow weights half-way to the fast ones at each second step, as the papers and libraries do."""

    def __init__(self, optimizer):
        self.optimizer, self.steps = optimizer, 0
        self.slow = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for slow, p in zip(self.slow, (p for g in self.optimizer.param_groups for p in g["params"]), strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)


def test_lookahead_around_the_optimizer():
    """Tell of it; and with resync() after each of its writes, W follows the slow weights exactly."""
    run = LayerRun()
    lookahead = Lookahead(run.optimizer)

    def train(after):
        for _ in range(6):
            run.optimizer.zero_grad()
            run.set_gradients()
            lookahead.step()
            run.t += 1
            after()

    with pytest.warns(UserWarning, match=TOLD) as caught:
        train(lambda: None)
    assert len(caught) == 1
    run = LayerRun()
    lookahead = Lookahead(run.optimizer)
    train(run.optimizer.resync)
    assert close(run.moved(), 2.0 * run.scaling * (run.product() - run.start), 1e-12)
