"""The format of a saved state: each ledger under its triple's name, and the schemas that are read."""

import pytest
import torch

import deltaopt
from deltaopt import DeltaLoRAOptimizer
from deltaopt.checkpoint.format import KEY, LEDGER, READ, SCHEMA, split_ledgers, split_record
from tests.support import strategies
from tests.support.compare import refused, same, through_a_file
from tests.support.internals import as_schema_4
from tests.support.runs import noisy_run, noisy_step

numpy = pytest.importorskip("numpy", reason="runs where numpy is installed")


def two_triples_of_one_A() -> tuple[DeltaLoRAOptimizer, list[torch.Tensor]]:
    q, k = strategies.make("linear", seed=1), strategies.make("linear", seed=2)
    k.A = q.A
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [q.triple(1.0, "q"), k.triple(1.0, "k")], lr=0.1)
    return optimizer, [q.A, q.B, k.B]


def test_each_ledger_is_under_the_name_of_its_triple():
    optimizer, factors = two_triples_of_one_A()
    noisy_step(optimizer, *factors)
    entries = optimizer.state_dict()["state"][0]
    ours = sorted(key for key in entries if key.startswith(LEDGER))
    assert ours == [f"{LEDGER}k", f"{LEDGER}q"]
    assert all(isinstance(entries[key], str) for key in ours)


def test_triples_that_share_a_parameter_are_resumed():
    (optimizer, factors), (fresh, others) = two_triples_of_one_A(), two_triples_of_one_A()
    noisy_step(optimizer, *factors)
    with torch.no_grad():
        for factor, other in zip(factors, others, strict=True):
            other.copy_(factor)
        for triple, other in zip(optimizer.triples, fresh.triples, strict=True):
            other.W.copy_(triple.W)
    assert all(fresh.displacement(name).rank == 0 for name in "qk")
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    for name in "qk":
        assert optimizer.displacement(name).rank > 0
        assert torch.equal(fresh.displacement(name).product(), optimizer.displacement(name).product())


def test_schema_4_is_read_as_what_it_says():
    run = noisy_run(zero=False, start_step=1)
    run.train(4)
    state = run.optimizer.state_dict()
    old = as_schema_4(state)
    assert same(split_ledgers(split_record(old)[1], schema=4), split_ledgers(split_record(state)[1]))
    twin = run.twin(load=False)
    assert twin.optimizer.step_count == 0
    twin.optimizer.load_state_dict(through_a_file(old))
    assert torch.equal(twin.displacement(), run.displacement())
    run.train(3)
    twin.train(3)
    assert all(map(torch.equal, run.tensors, twin.tensors))


def test_what_is_made_of_schema_4_can_be_loaded():
    run = noisy_run()
    run.train(2)
    old = as_schema_4(run.optimizer.state_dict())
    for made in (deltaopt.without_compensation, deltaopt.without_ledger):
        twin = run.twin(load=False)
        twin.optimizer.load_state_dict(made(old))
        assert twin.optimizer.step_count == 2
        assert twin.optimizer.weights()[0].moved == (made is deltaopt.without_compensation)


def test_a_state_says_its_schema():
    assert noisy_run().optimizer.state_dict()["param_groups"][0][KEY]["schema"] == SCHEMA


@pytest.mark.parametrize("schema", [3, 7, None, "5"])
def test_other_schemas_are_refused_with_those_that_are_read(schema):
    run = noisy_run()
    state = run.optimizer.state_dict()
    state["param_groups"][0][KEY]["schema"] = schema
    with pytest.raises(ValueError, match=f"has the schema {schema}, this version of deltaopt reads 4, 5 and 6"):
        run.optimizer.load_state_dict(state)


@pytest.mark.parametrize("schema", READ)
def test_ledgers_of_the_other_schema_are_not_read(schema):
    """A distributed checkpoint of schema 4 comes in a template of schema 6, with ledgers of a fresh optimizer."""
    run, fresh = noisy_run(zero=False), noisy_run(zero=False)
    run.train(2)
    state, other = run.optimizer.state_dict(), fresh.optimizer.state_dict()
    if schema == 4:
        state, template = as_schema_4(state), other
        for number, entries in template["state"].items():
            state["state"][number] |= {key: entry for key, entry in entries.items() if key.startswith(LEDGER)}
    else:
        for number, entries in as_schema_4(other)["state"].items():
            state["state"][number] |= {KEY: entries[KEY]}
    fresh.stored.W.copy_(run.stored.W)
    with torch.no_grad():
        fresh.stored.A.copy_(run.stored.A)
        fresh.stored.B.copy_(run.stored.B)
    fresh.optimizer.load_state_dict(state)
    assert torch.equal(fresh.displacement(), run.displacement())
    assert float(run.displacement().norm()) > 0


class Lookahead(torch.optim.Optimizer):
    """Keeps the state of the optimizer it wraps under keys of its own, as several libraries do."""

    def __init__(self, params, lr=0.1, state_dict=None):
        self.base, self.form = torch.optim.SGD(params, lr), state_dict
        super().__init__(self.base.param_groups, {"lr": lr})

    def step(self, closure=None):
        return self.base.step(closure)

    def state_dict(self):
        return self.form(self.base)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda base: [1], "is a list"),
        (
            lambda base: {"state": {}, "param_groups": []},
            r"has param groups of \[\] parameters, the optimizer has \[2\]",
        ),
        (lambda base: {"state": {}, "param_groups": [{"lr": 1}]}, r"has param groups of \[None\] parameters"),
    ],
)
def test_a_state_without_a_place_for_ours_is_refused_with_the_form_that_is_expected(form, message):
    run = noisy_run(inner=Lookahead, state_dict=form).train(1)
    message = rf"the state of the inner Lookahead cannot be saved: its state_dict\(\) {message}.* Expected the form"
    refused(run.optimizer.state_dict, RuntimeError, message, kept=lambda: run.tensors)
    run.train(1)
    assert run.optimizer.step_count == 2


@pytest.mark.parametrize("keys", [(), ("state",), ("slow", "fast")])
def test_a_state_in_another_form_is_kept_whole(keys):
    """The inner optimizer gets back what it saved; with `without_ledger` too."""
    run = noisy_run(inner=Lookahead, state_dict=lambda base: {key: [dict(base.state), 3] for key in keys}).train(1)
    loaded = []
    run.optimizer.inner.load_state_dict = loaded.append
    state = run.optimizer.state_dict()
    for saved in (state, deltaopt.without_ledger(state)):
        run.optimizer.load_state_dict(saved)
        assert loaded.pop() == {key: [{}, 3] for key in keys}
    assert run.optimizer.step_count == 1


def own_types(value):
    """Return the names of the types in a nested value that are not Python's or torch's."""
    if isinstance(value, dict):
        return set().union(*(own_types(item) for pair in value.items() for item in pair))
    if isinstance(value, list | tuple):
        return set().union(*map(own_types, value))
    return {type(value).__name__} - {"int", "float", "bool", "str", "NoneType", "Tensor"}


@pytest.mark.parametrize("number", [numpy.float64, numpy.float32])
def test_numbers_of_numpy_among_the_options_are_saved_as_plain_ones(number):
    """Wherever they come from: the constructor, a group, a built optimizer, a scheduler that sets them later."""
    options = {"lr": number(0.02), "weight_decay": number(0.1), "betas": (number(0.9), 0.99)}
    run = noisy_run(dtype=torch.float32, **options)
    assert not own_types([run.optimizer.param_groups[0][key] for key in options])
    head = torch.zeros(2, requires_grad=True)
    run.optimizer.add_param_group({"params": [head], "lr": number(0.5)})
    run.train(1)
    run.optimizer.param_groups[0]["lr"] = number(0.03)
    state = run.optimizer.state_dict()
    assert not own_types(state)
    assert not own_types([{**group, "params": []} for group in run.optimizer.param_groups])
    assert state["param_groups"][0]["lr"] == number(0.03)
    assert state["param_groups"][1]["lr"] == 0.5


def test_the_run_that_continues_computes_as_the_one_that_resumes():
    """Of two float32 numpy forms the product in float32, Python in float64: 1 - lr * weight_decay differs."""
    run = noisy_run(lr=0.02, weight_decay=0.1).train(1)
    for name in ("lr", "weight_decay"):
        run.optimizer.param_groups[0][name] = numpy.float32(run.optimizer.param_groups[0][name])
    twin = run.twin()
    for r in (run, twin):
        r.train(2)
    assert all(map(torch.equal, run.tensors, twin.tensors))
