"""train() and eval() of an inner optimizer that keeps two points (schedule-free): every W follows A and B to each."""

import copy
import itertools
from contextlib import suppress

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer
from tests.support import internals
from tests.support.compare import close, same
from tests.support.interruption import interrupt
from tests.support.runs import SCALING, LayerRun
from tests.support.strategies import each_rule

RATIO = 2.0
each_host = pytest.mark.parametrize("rule", ["in_place", internals.as_on_a_gpu()], ids=["cpu", "gpu"])


class ScheduleFreeSGD(torch.optim.SGD):
    """Schedule-free SGD with constant weights: gradients at y = 0.9 x + 0.1 z, evaluation at x, the mean of all z."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            group["train_mode"] = False

    def add_param_group(self, param_group):
        super().add_param_group({**param_group, "train_mode": False})

    @torch.no_grad()
    def _go(self, train):
        for group in self.param_groups:
            if group["train_mode"] is not train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 0.1 if train else 1 - 1 / 0.9)
                group["train_mode"] = train

    def train(self):
        self._go(True)

    def eval(self):
        self._go(False)

    @torch.no_grad()
    def step(self, closure=None):
        if not self.param_groups[0]["train_mode"]:
            raise ValueError("not in train mode")
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                z = state.setdefault("z", p.clone())
                state["t"] = state.get("t", 0) + 1
                x = p.lerp(z, 1 - 1 / 0.9)
                z.sub_(p.grad, alpha=group["lr"])
                x.lerp_(z, 1 / state["t"])
                p.copy_(x.lerp(z, 0.1))


class Dense:
    """The reference: moves a copy of W in float64 by coef * (A_now B_now - A_last B_last) whenever it is told to."""

    def __init__(self, run):
        self.run, self.W, self.last = run, run.base().clone(), run.product()

    def follow(self, moves=True):
        now = self.run.product()
        self.W += moves * RATIO * SCALING * (now - self.last)
        self.last = now


def two_points(rule="in_place", steps=0, **options):
    run = LayerRun(rule, inner=ScheduleFreeSGD, zero=False, **{"lr": 0.1, "update_ratio": RATIO, **options})
    run.optimizer.train()
    return run.train(steps)


def assert_follows(run, dense, tolerance=1e-12):
    assert close(run.stored.matrix(run.stored.W.double()), dense.W, tolerance)
    assert close(run.displacement(), dense.W - run.base(), tolerance)


@each_host
def test_W_follows_every_change_of_the_mode(rule):
    run = two_points(rule)
    dense, products = Dense(run), []
    for _ in range(3):
        run.train(1)
        dense.follow()
        for mode in (run.optimizer.eval, run.optimizer.eval, run.optimizer.train, run.optimizer.train):
            mode()
            dense.follow()
            assert_follows(run, dense)
            products.append(run.product())
    assert not close(products[-4], products[-1], 1e-4)  # the two points are two


def test_the_folded_rule_gives_the_same_effective_weights():
    in_place, folded = two_points("in_place", 4), two_points("folded", 4)
    for mode in ("eval", "train"):
        for run in (in_place, folded):
            getattr(run.optimizer, mode)()
        assert close(folded.effective_exactly(), in_place.effective_exactly(), 1e-10)


@each_rule
def test_nothing_moves_before_the_first_move(rule):
    run = two_points(rule, 2, start_step=3)
    run.optimizer.eval()
    run.optimizer.train()
    assert torch.equal(run.stored.W, run.W0)
    assert not internals.has_moved(run.optimizer)


@each_host
def test_a_W_that_rests_stays(rule):
    run = two_points(rule, 2)
    run.optimizer.groups[0].update_ratio = 0.0
    run.train(1)
    W = run.stored.W.clone()
    run.optimizer.eval()
    run.optimizer.train()
    assert torch.equal(run.stored.W, W)


def test_a_change_from_outside_is_still_no_move():
    run = two_points(steps=2)
    dense = Dense(run)
    dense.W = run.stored.matrix(run.stored.W).clone()
    run.stored.A.data.mul_(0.5)
    dense.follow(False)
    with pytest.warns(UserWarning, match="not those that the last move of W left"):
        run.optimizer.eval()
    dense.follow()
    assert close(run.stored.matrix(run.stored.W), dense.W)
    assert close(run.displacement(), dense.W - run.base())


@each_rule
def test_a_step_in_evaluation_mode_changes_nothing(rule):
    run = two_points(rule, 2)
    run.optimizer.eval()
    run.backward()
    before, state = [t.clone() for t in run.tensors], copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(ValueError, match="not in train mode"):
        run.optimizer.step()
    assert all(map(torch.equal, before, run.tensors))
    assert same(run.optimizer.state_dict(), state)
    run.optimizer.train()
    run.train(1)
    assert run.optimizer.step_count == 3


@each_rule
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("saved", ["all", "adapter"])
def test_a_run_resumes_from_each_mode(saved, mode, rule):
    run = two_points(rule, 3)
    getattr(run.optimizer, mode)()
    state = copy.deepcopy(run.optimizer.state_dict())
    other = LayerRun(rule, inner=ScheduleFreeSGD, zero=False, lr=0.1, update_ratio=RATIO)
    with torch.no_grad():
        for own, kept in zip((other.stored.W, *other.factors), (run.stored.W, *run.factors), strict=True):
            if own is not other.stored.W or saved == "all":
                own.copy_(kept)
    other.optimizer.load_state_dict(state)
    other.t = run.t
    for each in (run, other):
        each.optimizer.train()
        each.train(2)
        each.optimizer.eval()
    tolerance = 0 if saved == "all" else 1e-12
    assert close(other.effective_exactly(), run.effective_exactly(), tolerance)


@each_rule
def test_without_modes_nothing_happens(rule):
    run = LayerRun(rule).train(2)
    tensors = [t.clone() for t in run.tensors]
    with run.optimizer.base_weights():  # trainers call them anywhere
        run.optimizer.eval()
    run.optimizer.train()
    assert all(map(torch.equal, tensors, run.tensors))


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_a_16_bit_W_follows(rounding):
    """To rounding; with compensated rounding as in float32."""
    run = two_points(steps=3, dtype=torch.bfloat16, factor_dtype=torch.float32, rounding=rounding)
    for mode in (run.optimizer.eval, run.optimizer.train):
        mode()
        asked = RATIO * SCALING * (run.product() - run.start)
        assert close(run.displacement(), asked, 1e-5)
        W = internals.full_weight(run.optimizer).double() if rounding == "compensated" else run.stored.W.double()
        tolerance = 1e-5 if rounding == "compensated" else 2 * torch.finfo(torch.bfloat16).eps
        assert close(run.stored.matrix(W), run.base() + asked, tolerance)


def test_in_base_weights_it_is_refused():
    run = two_points(steps=2)
    before = [t.clone() for t in run.tensors]
    with run.optimizer.base_weights(), pytest.raises(RuntimeError, match=r"eval\(\) within base_weights\(\)"):
        run.optimizer.eval()
    assert all(map(torch.equal, before, run.tensors))


def test_a_mode_whose_factors_are_not_finite_leaves_W():
    run = two_points(steps=2)
    run.optimizer.inner.state[run.stored.A]["z"].fill_(torch.nan)
    W = run.stored.W.clone()
    run.optimizer.eval()
    assert torch.equal(run.stored.W, W)


@each_host
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_interrupted_at_any_line_W_belongs_to_the_factors(mode, rule):
    for line in itertools.count(1, 19):
        run = two_points(rule, 2)
        if mode == "train":
            run.optimizer.eval()
        event = getattr(run.optimizer, mode)
        happened = interrupt(event, DeltaLoRAOptimizer._set_mode, line)
        run.optimizer.state_dict()
        asked = RATIO * SCALING * (run.product() - run.start)
        assert close(run.moved(), asked), line
        assert close(run.displacement(), asked), line
        event()
        run.optimizer.train()
        run.train(1)
        assert close(run.moved(), RATIO * SCALING * (run.product() - run.start)), line
        if not happened:
            return


def test_a_mode_that_raises_half_way_takes_W_with_it():
    """Move W for the factors that were changed."""
    run = two_points(steps=2)
    run.optimizer.inner.state[run.stored.B]["z"] = "no tensor"
    with suppress(TypeError):
        run.optimizer.eval()
    assert close(run.moved(), RATIO * SCALING * (run.product() - run.start))
    assert close(run.displacement(), run.moved())
