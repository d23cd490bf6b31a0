"""Choosing an update rule, and what the base class does where a rule needs nothing."""

import copy
import types

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer
from deltaopt.folded import FoldedUpdate
from deltaopt.host import Host
from deltaopt.in_place import InPlaceUpdate
from deltaopt.optimizer import RULES
from deltaopt.rule import UpdateRule
from tests.support import strategies
from tests.support.runs import LayerRun


def test_each_name_has_its_rule():
    assert {"in_place": InPlaceUpdate, "folded": FoldedUpdate} == RULES


@pytest.mark.parametrize("name", RULES)
def test_a_callable_that_makes_a_rule_does_what_the_name_does(name):
    by_name, by_callable = LayerRun(name, zero=False), LayerRun(name, zero=False, weight_update=RULES[name])
    by_name.train(4)
    by_callable.train(4)
    assert by_callable.optimizer.weight_update == name
    assert all(map(torch.equal, by_name.tensors, by_callable.tensors))


@pytest.mark.parametrize("what", ["both", "", None, ["in_place"], InPlaceUpdate()])
def test_other_rules_are_refused(what):
    stored = strategies.make("linear")
    with pytest.raises(ValueError, match="weight_update is one of in_place, folded, got"):
        DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple()], lr=0.1, weight_update=what)


def test_a_callable_that_makes_something_else_is_refused():
    stored = strategies.make("linear")
    with pytest.raises(TypeError, match="weight_update made a str, expected an UpdateRule"):
        DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple()], lr=0.1, weight_update=lambda: "in_place")


@pytest.mark.parametrize("kind", RULES.values())
def test_a_rule_keeps_its_host_when_it_is_copied(kind):
    class Other(Host):
        pass

    rule = kind(Other())
    rule.skipped_updates = 3
    twin = copy.deepcopy(rule)
    assert type(twin._host) is Other
    assert twin.skipped_updates == 3


def test_the_base_class_does_nothing_that_it_was_not_asked_for():
    rule = UpdateRule()
    closure = lambda: 1.0  # noqa: E731
    with rule.inner_step([], closure) as handed:
        assert handed is closure
    assert rule.nbytes == rule.skipped_updates == 0
    with pytest.raises(NotImplementedError, match="before the inner step"):
        rule.before_step([], None, None)


def test_the_host_reads_a_cpu_and_asks_an_event_whether_it_has_passed():
    host = Host()
    for passed in (False, True):
        assert host.arrived(types.SimpleNamespace(query=lambda passed=passed: passed)) is passed
    assert host.reads(torch.device("cpu"))
    assert not host.reads(torch.device("cuda"))
    assert host.arrived(None)
    assert host.kernel(torch.device("cpu")) is None
