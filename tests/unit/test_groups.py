"""The input of a user: triples and other parameters, alone or in groups, and the settings of each group."""

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from deltaopt.weight import WeightState
from tests.support.compare import refused
from tests.support.runs import LayerRun
from tests.support.small import random_steps, small_layer
from tests.support.strategies import RULES

numpy = pytest.importorskip("numpy", reason="runs where numpy is installed")


def plain_parameter(count=3, **options):
    """Make a parameter that is no factor."""
    return torch.ones(count, requires_grad=True, **options)


def built(triples, *params, **options):
    return DeltaLoRAOptimizer(torch.optim.SGD, triples, *params, **options)


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


# Parameters next to the factors.


def test_other_parameters_train_in_the_group_of_the_factors():
    head = plain_parameter()
    optimizer = built([small_layer()], [head], lr=0.1)
    assert [len(g["params"]) for g in optimizer.param_groups] == [3]
    head.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(head, torch.full((3,), 0.9))


def test_factors_among_the_other_parameters_are_not_repeated():
    W, A, B = small_layer()
    head = plain_parameter()
    optimizer = built([(W, A, B)], [A, head, B], lr=0.1)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in (A, B, head)]
    grouped = built([{"triples": [(W, A, B)], "params": [A, head, B]}], lr=0.1)
    assert [id(p) for p in grouped.param_groups[0]["params"]] == [id(p) for p in (A, B, head)]


def test_other_parameters_as_groups_and_named():
    W, A, B = small_layer()
    head, bias = plain_parameter(3), plain_parameter(2)
    grouped = built([(W, A, B)], [{"params": [head], "lr": 0.5}, {"params": [bias]}], lr=0.1)
    assert rates(grouped) == [0.1, 0.5, 0.1]
    named = built([LoRATriple(W, A, B, name="q")], [("head", head)], lr=0.1)
    assert named.param_groups[0]["param_names"] == ["q.A", "q.B", "head"]


def test_two_groups_of_triples_leave_plain_parameters_a_group_of_their_own():
    groups = [{"triples": [small_layer(seed=1)], "lr": 0.1}, {"triples": [small_layer(seed=2)], "lr": 0.2}]
    assert rates(built(groups, [plain_parameter()], lr=0.3)) == [0.1, 0.2, 0.3]


def test_add_param_group_with_triples_and_without():
    optimizer, other = built([small_layer(seed=1)], lr=0.1), small_layer(seed=2)
    optimizer.add_param_group({"params": [plain_parameter()], "lr": 0.5})
    optimizer.add_param_group({"triples": [other], "lr": 0.2, "update_ratio": 1.0, "start_step": 2})
    assert rates(optimizer) == [0.1, 0.5, 0.2]
    assert [t.name for t in optimizer.triples] == ["triple0", "triple1"]
    before = other[0].clone()
    random_steps(optimizer, 2)
    assert torch.equal(other[0], before)
    random_steps(optimizer, 1)
    assert not torch.equal(other[0], before)


def test_reads_generators_of_parameters_once():
    """Leave no parameter out: a generator that a check has used up would, and they would never train."""
    head, bias = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    optimizer = built([{"triples": [small_layer(seed=1)], "params": head.parameters()}], bias.parameters())
    assert [len(g["params"]) for g in optimizer.param_groups] == [6]
    optimizer.add_param_group({"params": (p for p in torch.nn.Linear(3, 2).parameters())})
    optimizer.add_param_group({"triples": [small_layer(seed=2)], "params": torch.nn.Linear(3, 2).parameters()})
    optimizer.add_param_group({"triples": [small_layer(seed=3)], "params": plain_parameter(2)})
    assert [len(g["params"]) for g in optimizer.param_groups] == [6, 2, 4, 3]


def test_add_param_group_refuses_and_changes_nothing():
    W, A, B = small_layer()
    optimizer = built([LoRATriple(W, A, B, name="q")], lr=0.1)
    fresh = small_layer(seed=3)
    for group, message in (
        ({"triples": [(W, *fresh[1:])]}, "its W shares memory with the W of q"),
        ({"triples": []}, "empty 'triples' list"),
        ({"params": [W]}, "params holds the W of q, which this optimizer moves itself"),
        ({"params": W}, "params holds the W of q"),
        ({"triples": [fresh], "params": [W]}, "params holds the W of q"),
    ):
        refused(
            lambda group=group: optimizer.add_param_group(group),
            ValueError,
            message,
            kept=lambda: [len(held) for held in (optimizer.param_groups, optimizer.groups, optimizer.triples)],
        )
    assert len(optimizer.param_groups) == len(optimizer.groups) == len(optimizer.triples) == 1


# What is no list of triples or of parameters.


@pytest.mark.parametrize("triples", [[], (), iter(())])
def test_refuses_an_empty_list_of_triples(triples):
    with pytest.raises(ValueError, match=r"triples is empty: there is no W to move. find_triples\(model\)"):
        built(triples)


def test_refuses_an_empty_group_of_triples():
    with pytest.raises(ValueError, match="empty 'triples' list"):
        built([{"triples": []}])


@pytest.mark.parametrize(
    ("triples", "message"),
    [
        (lambda: small_layer()[0], "triples is a list of LoRATriple, .*, got a Tensor"),
        (lambda: {"triples": [small_layer()]}, "got a dict"),
        (lambda: LoRATriple(*small_layer()), "got a LoRATriple"),
        (lambda: [small_layer()[:2]], r"triples\[0\] is a LoRATriple or a tuple \(W, A, B\), got tuple of length 2"),
        (lambda: list(small_layer()), r"triples\[0\] is a LoRATriple or a tuple \(W, A, B\), got Tensor"),
        (lambda: [{"triples": [small_layer()]}, small_layer()], "triples mixes dicts with triples"),
    ],
)
def test_refuses_what_is_no_list_of_triples(triples, message):
    with pytest.raises(TypeError, match=message):
        built(triples())


def test_refuses_a_group_without_triples():
    with pytest.raises(ValueError, match=r"needs the key 'triples', got the keys \['params'\]"):
        built([{"params": []}])


def test_refuses_params_that_mix_tensors_and_groups():
    with pytest.raises(TypeError, match="params mixes tensors with param groups"):
        built([small_layer()], [plain_parameter(), {"params": [plain_parameter(2)]}])


def test_refuses_params_as_a_bare_tensor():
    with pytest.raises(TypeError, match="params is a list of tensors or of param groups, got a Tensor"):
        built([small_layer()], plain_parameter())


# Settings.


@pytest.mark.parametrize("rule", RULES)
def test_groups_have_their_own_settings(rule):
    """Compare what each layer multiplies by with the dense account of its own ratio, scaling and start."""
    first, second = (LayerRun(rule, seed=seed, zero=False, scaling=scaling) for seed, scaling in ((1, 0.5), (2, 2.0)))
    second.name = "k"
    groups = [
        {"triples": [first.new_triple()], "lr": 0.1, "update_ratio": 1.0},
        {"triples": [second.new_triple()], "lr": 0.2, "start_step": 1},
    ]
    optimizer = built(groups, update_ratio=2.0, lr=0.9, weight_update=rule)
    assert rates(optimizer) == [0.1, 0.2]
    first_start, second_start = first.product(), second.product()
    for t in range(4):
        optimizer.zero_grad()
        for run in (first, second):
            run.t = t
            run.set_gradients()
        optimizer.step()
        if t == 0:
            second_start = second.product()
        torch.testing.assert_close(first.moved(), 1.0 * 0.5 * (first.product() - first_start))
        torch.testing.assert_close(second.moved(), 2.0 * 2.0 * (second.product() - second_start))
    assert float(first.moved().norm()) > 0.1
    assert float(second.moved().norm()) > 0.1


def test_the_scaling_of_a_group_is_that_of_its_tuples():
    optimizer = built([{"triples": [small_layer()], "scaling": 0.5}, {"triples": [small_layer(seed=1)]}], scaling=3.0)
    assert [t.name for t in optimizer.triples] == ["triple0", "triple1"]
    assert [t.scaling for t in optimizer.triples] == [0.5, 3.0]


@pytest.mark.parametrize(
    ("attribute", "value", "error", "message"),
    [
        ("update_ratio", -1.0, ValueError, "update_ratio must be finite and not negative, got -1"),
        ("update_ratio", float("nan"), ValueError, "update_ratio must be finite and not negative, got nan"),
        ("update_ratio", float("inf"), ValueError, "update_ratio must be finite and not negative, got inf"),
        ("update_ratio", "2", TypeError, "update_ratio is a number .*, got '2'"),
        ("start_step", -1, ValueError, "start_step must not be negative, got -1"),
        ("start_step", 0.5, TypeError, r"start_step is an int \(a number of steps\), got 0.5"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_settings_of_a_group_are_checked_when_they_are_set(rule, attribute, value, error, message):
    group = LayerRun(rule).train(1).optimizer.groups[0]
    refused(
        lambda: setattr(group, attribute, value), error, message, kept=lambda: (group.update_ratio, group.start_step)
    )


each_sort_of_number = pytest.mark.parametrize(
    "number", [numpy.float64, numpy.float32, numpy.int64, torch.tensor, numpy.longdouble], ids=lambda f: f.__name__
)


@each_sort_of_number
def test_numbers_of_other_libraries_become_plain_ones_where_they_are_set(number):
    optimizer = built([small_layer()], update_ratio=number(2), scaling=number(3), lr=0.1)
    (group,), (triple,) = optimizer.groups, optimizer.triples
    assert (group.update_ratio, triple.scaling) == (2.0, 3.0)
    group.update_ratio = number(4)
    assert group.update_ratio == 4.0
    assert {type(value) for value in (group.update_ratio, triple.scaling)} == {float}


@pytest.mark.parametrize("number", [numpy.int64, numpy.uint8, torch.tensor], ids=lambda f: f.__name__)
def test_whole_numbers_of_other_libraries_become_plain_ones_where_they_are_set(number):
    optimizer = built([small_layer()], start_step=number(2), rounding_seed=number(7), lr=0.1)
    (group,) = optimizer.groups
    assert (type(group.start_step), group.start_step) == (int, 2)
    group.start_step = number(3)
    assert (type(group.start_step), group.start_step) == (int, 3)
    seed = optimizer.state_dict()["param_groups"][0]["deltaopt"]["rounding_seed"]
    assert (type(seed), seed) == (int, 7)


@each_sort_of_number
def test_a_callable_may_return_numbers_of_other_libraries(number):
    run, other = (LayerRun(update_ratio=ratio) for ratio in (lambda step: number(step), float))
    for r in (run, other):
        r.train(3)
    assert all(map(torch.equal, run.tensors, other.tensors))
    assert float(run.moved().norm()) > 0


def test_settings_of_a_group_can_be_changed_between_steps():
    W, A, B = small_layer()
    optimizer = built([(W, A, B)], lr=0.1)
    optimizer.groups[0].update_ratio = 0.0
    before = W.clone()
    optimizer.step()
    assert torch.equal(W, before)


@pytest.mark.parametrize("ratio", [-0.1, float("nan"), float("inf"), 10**400, numpy.float32("nan")])
def test_refuses_an_update_ratio_that_is_negative_or_not_finite(ratio):
    with pytest.raises(ValueError, match="update_ratio must be finite and not negative, got"):
        built([small_layer()], update_ratio=ratio)


@pytest.mark.parametrize("ratio", ["2", None, True, 1j, numpy.True_, numpy.ones(1), torch.ones(1)])
def test_refuses_an_update_ratio_that_is_no_number_and_no_callable(ratio):
    with pytest.raises(TypeError, match="update_ratio is a number"):
        built([small_layer()], update_ratio=ratio)


@pytest.mark.parametrize(
    ("start_step", "error", "message"),
    [
        (-1, ValueError, "start_step must not be negative, got -1"),
        (1.0, TypeError, r"start_step is an int \(a number of steps\), got 1.0"),
        ("1", TypeError, r"start_step is an int \(a number of steps\), got '1'"),
        (True, TypeError, r"start_step is an int \(a number of steps\), got True"),
        (numpy.float64(1), TypeError, r"start_step is an int \(a number of steps\), got np.float64\(1.0\)"),
        (numpy.int64(-1), ValueError, "start_step must not be negative, got -1"),
    ],
)
def test_refuses_a_start_step_that_is_negative_or_no_int(start_step, error, message):
    with pytest.raises(error, match=message):
        built([small_layer()], start_step=start_step)


@pytest.mark.parametrize("mode", ["down", None, "Nearest"])
def test_refuses_roundings_that_do_not_exist(mode):
    with pytest.raises(ValueError, match="rounding is one of auto, nearest, stochastic, compensated, got"):
        built([small_layer()], rounding=mode)


@pytest.mark.parametrize("seed", [1.5, "0", None, True])
def test_refuses_seeds_that_are_no_ints(seed):
    with pytest.raises(TypeError, match="rounding_seed is an int, the same on every rank, got"):
        built([small_layer()], rounding_seed=seed)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_refuses_seeds_of_more_than_64_bits(seed):
    """Refuse them: modulo 2^64 they would repeat the noise of another seed."""
    with pytest.raises(ValueError, match=r"rounding_seed is at least 0 and below 2\^64, got"):
        built([small_layer()], rounding_seed=seed)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_takes_the_first_and_the_last_seed(seed):
    assert built([small_layer()], rounding_seed=seed).step_count == 0


def test_a_group_whose_base_cannot_be_copied_is_not_added(monkeypatch):
    optimizer = built([small_layer()], lr=0.1, keep_base="cpu")

    def fail(weight, bits=None):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(WeightState, "copy_base", fail)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        optimizer.add_param_group({"triples": [small_layer(seed=1)]})
    assert [len(optimizer.triples), len(optimizer.groups), len(optimizer.param_groups)] == [1, 1, 1]


def test_factors_among_named_parameters_are_not_repeated():
    W, A, B = small_layer()
    head = torch.nn.Parameter(torch.zeros(3))
    optimizer = built([(W, A, B)], [("left", A), ("head", head), ("right", B)], lr=0.1)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(A), id(B), id(head)]
