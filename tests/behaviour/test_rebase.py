"""rebase: the present weight is the base from now on."""

import pytest
import torch

import deltaopt
from tests.support.compare import close
from tests.support.histories import random_run
from tests.support.strategies import RULES


@pytest.mark.parametrize("rule", RULES)
def test_takes_the_present_weight_as_the_base(rule):
    run = random_run(rule, keep_base="cpu", zero=True).train(1)
    run.stored.W.mul_(run.stored.W.abs() > 0.5)  # pruned by hand
    run.optimizer.rebase()
    carried = run.displacement()  # what the branch of the folded rule has more than its own scaling
    assert rule == "folded" or run.optimizer.displacement("q").rank == 0
    assert close(carried, (float(run.scale) - run.scaling) * run.product())
    run.W0, run.asked = run.stored.W.clone(), carried
    run.train(3)
    assert close(run.displacement(), run.asked)
    assert close(run.moved(), run.asked)
    with run.optimizer.base_weights():
        assert torch.equal(run.stored.W, run.W0)


@pytest.mark.parametrize("rule", RULES)
def test_exports_count_from_there(rule):
    run = random_run(rule).train(5)
    run.optimizer.rebase()
    base = run.stored.W.clone()
    for _ in range(2):
        change = deltaopt.export_adapter(run.optimizer)["q"].product()
        torch.testing.assert_close(base + change, run.effective_exactly())
        run.train(3)
    assert not close(base, run.W0, 1e-3)
