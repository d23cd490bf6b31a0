"""state_dict and load_state_dict: what they carry, and that a wrong state changes nothing."""

import base64
import copy
import struct

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support import internals, strategies
from tests.support.compare import refused, same, through_a_file
from tests.support.runs import LayerRun, noisy_step
from tests.support.strategies import RULES


@pytest.fixture(params=RULES)
def rule(request):
    return request.param


@pytest.fixture
def saved_state(rule):
    """Return the state of a run of three steps."""
    return layer_run(rule).train(3).optimizer.state_dict()


def layer_run(rule="in_place", **options):
    return LayerRun(rule, **{"lr": 0.01, "zero": False, "update_ratio": 0.7, **options})


def trained_run(rule, **options):
    """Train a run for one step, so that the inner optimizer has a state that may not change."""
    return layer_run(rule, **options).train(1)


def loading_is_refused(run, state, message, error=ValueError):
    """Assert that loading raises, and that W, A, B, the branch and the whole state are as before, bit for bit."""
    return refused(
        lambda: run.optimizer.load_state_dict(state),
        error,
        message,
        kept=lambda: (run.tensors, run.scale, run.optimizer.state_dict(), run.optimizer.step_count),
    )


@pytest.mark.parametrize("start_step", [0, 6])
@pytest.mark.parametrize(
    ("rule", "inner"),
    [
        *((rule, inner) for rule in RULES for inner in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor)),
        ("in_place", torch.optim.LBFGS),
    ],
)
def test_a_resumed_run_continues_bit_for_bit(rule, inner, start_step):
    """Load the model's weights too. A start_step of 6 is passed after the resume at 4."""
    run = layer_run(rule, inner=inner, start_step=start_step, update_ratio=1.5).train(4, by_closure=True)
    resumed = run.twin(start_step=99, update_ratio=0.1)
    assert resumed.optimizer.step_count == 4
    assert resumed.optimizer.groups[0].start_step == start_step
    assert resumed.optimizer.groups[0].update_ratio == 1.5
    for r in (run, resumed):
        r.train(6, by_closure=True)
    assert all(map(torch.equal, (*run.tensors, run.scale), (*resumed.tensors, resumed.scale)))
    assert same(run.optimizer.state_dict(), resumed.optimizer.state_dict())


def test_param_groups_stay_linked_after_loading(rule):
    """Share them: a scheduler that writes into groups the inner optimizer does not read has no effect."""
    run = layer_run(rule).train(2)
    optimizer = run.optimizer
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert optimizer.state is optimizer.inner.state
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    before = run.stored.A.detach().clone()
    run.train(1)
    assert torch.equal(run.stored.A, before)


def test_loading_does_not_move_W_and_may_be_repeated(rule):
    """Load a state where it was saved, as Accelerate does in `prepare`: the run continues as if nothing was loaded."""
    run, undisturbed = layer_run(rule).train(3), layer_run(rule).train(3)
    before, state = [t.clone() for t in (*run.tensors, run.scale)], run.optimizer.state_dict()
    for _ in range(2):
        run.optimizer.load_state_dict(state)
    assert all(map(torch.equal, before, (*run.tensors, run.scale)))
    assert run.optimizer.step_count == 3
    for r in (run, undisturbed):
        r.train(3)
    assert all(map(torch.equal, run.tensors, undisturbed.tensors))


def test_an_earlier_state_takes_the_run_back():
    """Take the ratio out of the branch again where the state is from before step K."""
    run = layer_run("folded", start_step=3).train(2)
    state, factors = through_a_file(run.optimizer.state_dict()), [p.detach().clone() for p in run.factors]
    run.train(4)
    last, scale = [t.clone() for t in run.tensors], float(run.scale)
    assert scale == pytest.approx(run.scaling * 1.7)
    with torch.no_grad():
        run.stored.W.copy_(run.W0)
        for p, value in zip(run.factors, factors, strict=True):
            p.copy_(value)
    run.optimizer.load_state_dict(state)
    assert float(run.scale) == run.scaling
    run.t = 2
    run.train(4)
    assert all(map(torch.equal, run.tensors, last))
    assert float(run.scale) == scale


def test_our_keys_are_neither_in_the_live_groups_nor_in_the_state(rule):
    """Let schedulers and the inner optimizer see what they made; a test for an empty state stays right."""
    run = layer_run(rule)
    assert len(run.optimizer.state) == 0
    state = run.optimizer.state_dict()
    run.optimizer.load_state_dict(state)
    plain = torch.optim.AdamW(run.factors, lr=0.01)
    assert run.optimizer.param_groups[0].keys() == plain.param_groups[0].keys()
    assert set(state["param_groups"][0]) - set(plain.state_dict()["param_groups"][0]) == {"deltaopt"}
    assert [set(entries) for entries in state["state"].values()] == [{"deltaopt", "deltaopt.ledger.q"}, {"deltaopt"}]
    assert len(run.optimizer.state) == 0


def test_a_callable_update_ratio_is_kept_and_not_saved():
    ratio = lambda step: 1.0 / (1 + step)  # noqa: E731
    optimizer = layer_run(update_ratio=ratio).optimizer
    state = through_a_file(optimizer.state_dict())
    assert internals.record_of(state)["groups"][0]["update_ratio"] is None
    optimizer.load_state_dict(state)
    assert optimizer.groups[0].update_ratio is ratio
    constant = layer_run(update_ratio=0.3).optimizer
    constant.load_state_dict(state)
    assert constant.groups[0].update_ratio == 0.3
    optimizer.load_state_dict(through_a_file(constant.state_dict()))
    assert optimizer.groups[0].update_ratio is ratio


def test_skipped_updates_are_carried():
    run = layer_run(inner=torch.optim.SGD)

    def bad_step(r):
        for factor in r.factors:
            factor.grad = torch.zeros_like(factor)
        r.stored.A.grad.fill_(float("nan"))
        with pytest.warns(RuntimeWarning, match="NaN or infinite"):
            r.optimizer.step()

    bad_step(run)
    other = run.twin()
    assert other.optimizer.skipped_updates == 1
    bad_step(other)
    assert other.optimizer.skipped_updates == 2


def test_hooks_of_state_dict_and_load_state_dict_fire(rule):
    optimizer, fired = layer_run(rule).optimizer, []
    optimizer.register_state_dict_pre_hook(lambda opt: fired.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: fired.append(state.pop("note")))
    optimizer.register_load_state_dict_post_hook(lambda opt: fired.append("loaded"))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert fired == ["save", 1, "loaded"]
    assert state["note"] == 1


def test_a_state_that_a_hook_hands_back_is_the_one_that_is_loaded(rule):
    optimizer = layer_run(rule).optimizer
    state = optimizer.state_dict()
    (group,) = state["param_groups"]
    optimizer.register_load_state_dict_pre_hook(lambda opt, _: {**state, "param_groups": [{**group, "lr": 0.5}]})
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5


# Refusals.


def test_refuses_a_state_of_a_plain_optimizer(rule):
    run = trained_run(rule)
    plain = torch.optim.AdamW(run.factors)
    loading_is_refused(run, plain.state_dict(), "not saved by a DeltaLoRAOptimizer.*begin a new run")


@pytest.mark.parametrize("key", ["state", "param_groups"])
def test_refuses_half_a_state(rule, saved_state, key):
    del saved_state[key]
    loading_is_refused(trained_run(rule), saved_state, f"no state of an optimizer: it has no {key}")


def registered_again(run, triples, rule):
    """Give the run another optimizer, of these triples."""
    run.optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=0.01, weight_update=rule)
    return run


def test_refuses_a_state_of_another_name(rule, saved_state):
    run = layer_run(rule)
    run.name = "k"
    registered_again(run, [run.new_triple()], rule)
    loading_is_refused(run, saved_state, r"k: saved name q, .*registered name k")


def test_refuses_a_state_of_another_rank(rule, saved_state):
    run = layer_run(rule)
    A, B = torch.zeros(5, 2, requires_grad=True), torch.zeros(2, 7, requires_grad=True)
    registered_again(run, [LoRATriple(run.stored.W, A, B, scaling=run.scale, name="q")], rule)
    loading_is_refused(
        run, saved_state, r"q: saved name q, A \(5, 3\), B \(3, 7\).*registered name q, A \(5, 2\), B \(2, 7\)"
    )


def test_refuses_a_state_of_another_scaling(rule, saved_state):
    loading_is_refused(trained_run(rule, scaling=2.0), saved_state, "q: saved .*scaling 0.5, registered .*scaling 2.0")


def test_refuses_a_state_of_another_number_of_triples(rule, saved_state):
    runs = [layer_run(rule, seed=seed) for seed in range(2)]
    triples = [run.stored.triple(run.scale, name=f"{i}") for i, run in enumerate(runs)]
    registered_again(runs[0], triples, rule)
    loading_is_refused(runs[0], saved_state, "triples: 1 were saved, 2 are registered")


def test_refuses_a_state_of_another_number_of_groups(rule, saved_state):
    runs = [layer_run(rule, seed=seed) for seed in range(2)]
    groups = [{"triples": [run.stored.triple(run.scale, name=f"{i}")]} for i, run in enumerate(runs)]
    registered_again(runs[0], groups, rule)
    loading_is_refused(runs[0], saved_state, "groups: the saved state has 1, this optimizer 2")


def test_refuses_a_state_of_another_schema(rule, saved_state):
    record = internals.record_of(saved_state)
    schema = record["schema"]
    record["schema"] = schema + 1
    message = f"schema {schema + 1}, this version of deltaopt reads 4, 5 and {schema}"
    loading_is_refused(trained_run(rule), saved_state, message)


def test_refuses_a_state_of_the_other_rule(rule, saved_state):
    (other,) = set(RULES) - {rule}
    message = f"saved with weight_update='{rule}', this optimizer has '{other}'"
    loading_is_refused(trained_run(other), saved_state, message)


DAMAGES = {
    "no schema": (lambda record: record.pop("schema"), "this state has the schema None"),
    "no step_count": (
        lambda record: record.pop("step_count"),
        r"the saved record of triples is damaged or incomplete: KeyError\('step_count'\)",
    ),
    "no skipped_updates": (
        lambda record: record.pop("skipped_updates"),
        r"damaged or incomplete: KeyError\('skipped_updates'\)",
    ),
    "no groups": (lambda record: record.pop("groups"), r"damaged or incomplete: KeyError\('groups'\)"),
    "no rule": (lambda record: record.pop("weight_update"), r"damaged or incomplete: KeyError\('weight_update'\)"),
    "negative": (lambda record: record.update(step_count=-1), "step_count must not be negative, got -1"),
    "ratio": (
        lambda record: record["groups"][0].update(update_ratio=float("nan")),
        "update_ratio must be finite and not negative, got nan",
    ),
    "text": (
        lambda record: record["groups"][0].update(start_step="5"),
        r"damaged or incomplete: TypeError\(\"start_step is an int \(a number of steps\), got '5'\"\)",
    ),
    "no folded ratio": (
        lambda record: record["groups"][0]["triples"][0].pop("folded"),
        r"damaged or incomplete: KeyError\('folded'\)",
    ),
    "negative folded ratio": (
        lambda record: record["groups"][0]["triples"][0].update(folded=-1.0),
        "folded must be finite and not negative, got -1",
    ),
    "folded ratio of text": (
        lambda record: record["groups"][0]["triples"][0].update(folded="2"),
        r"damaged or incomplete: TypeError\(.(unsupported operand type|folded is a number)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refuses_a_damaged_record(rule, saved_state, damage):
    change, message = DAMAGES[damage]
    change(internals.record_of(saved_state))
    loading_is_refused(trained_run(rule), saved_state, message)


def tensor_damage(letter, **changes):
    return lambda ledger: ledger["terms"][0][letter].update(changes)


def not_finite(ledger):
    ledger["terms"][0]["B"]["data"] = base64.b64encode(struct.pack("<21d", *[float("inf")] * 21)).decode()


def not_base64(ledger):
    saved = ledger["terms"][0]["B"]
    saved["data"] = "?" + saved["data"][1:]


LEDGER_DAMAGES = {
    **{
        f"no {key}": (lambda ledger, key=key: ledger.pop(key), rf"KeyError\('{key}'\)")
        for key in ("coef", "terms", "end", "origin", "lost", "base", "W", "whole", "A", "B")
    },
    "shape": (tensor_damage("A", shape=[3, 5]), r"ValueError\('a term of \(3, 5\) and \(3, 7\) for a weight of"),
    "size": (tensor_damage("A", shape=[5, 4]), r"shape '\[5, 4\]' is invalid for input of size 15"),
    "dtype": (tensor_damage("A", dtype="int64"), r"ValueError\('a tensor of torch.int64'\)"),
    "no dtype": (tensor_damage("A", dtype="float99"), "has no attribute 'float99'"),
    "text": (not_base64, "Only base64 data is allowed"),
    "infinite": (not_finite, r"ValueError\('a term that is not finite'\)"),
}


@pytest.mark.parametrize("damage", LEDGER_DAMAGES)
def test_refuses_a_ledger_that_no_run_has_written(damage):
    """Seal it with a checksum that fits, so that the contents are looked at."""
    change, message = LEDGER_DAMAGES[damage]
    run = layer_run().train(3)
    state = copy.deepcopy(run.optimizer.state_dict())
    internals.change_ledger(state, "q", change)
    loading_is_refused(run, state, f"q: its saved ledger is damaged or incomplete: .*{message}")


def test_refuses_a_state_that_the_inner_optimizer_refuses(rule):
    """Rebuild no W then: the inner optimizer comes first."""
    run = layer_run(rule).train(3)
    state = run.optimizer.state_dict()
    other = run.twin(whole=False, load=False)
    head = torch.zeros(2, requires_grad=True)
    other.optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [other.new_triple()], [head], weight_update=rule)
    loading_is_refused(other, state, "doesn't match the size of optimizer's group")
    assert torch.equal(other.stored.W, strategies.make("linear").W)


@pytest.mark.parametrize("moment", ["state_dict", "load_state_dict"])
def test_a_hook_may_replace_a_weight(moment):
    """The state that is saved or loaded then is of the weight that is there."""
    module = nn.Module()
    stored = strategies.make("linear", dtype=torch.float32)
    for name in "WAB":
        setattr(module, name, nn.Parameter(getattr(stored, name).detach(), requires_grad=name != "W"))
    triple = LoRATriple(*((module, name) for name in "WAB"), name="q")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
    noisy_step(optimizer, module.A, module.B)

    def replace(*_) -> None:
        module.W = nn.Parameter(module.W.detach().clone(), requires_grad=False)

    register = getattr(optimizer, f"register_{moment}_pre_hook")
    handle = register(replace)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    handle.remove()
    assert same(optimizer.state_dict(), state)
    assert optimizer.weights()[0].moved


@pytest.mark.filterwarnings("ignore:A and B of 1 layer .* were changed between two steps:UserWarning")
def test_factors_that_were_changed_after_the_last_move_are_saved_as_they_were():
    """The ledger ends with the factors of the last move; those that are there now are not a step's."""
    run = LayerRun(zero=False, gradients="noise").train(3)
    asked = run.displacement()
    with torch.no_grad():
        run.stored.A.mul_(1.5)
    run.changed_outside = True
    twin = run.twin()
    assert torch.equal(twin.displacement(), asked)
    for r in (run, twin):
        r.train(2)
    assert torch.equal(twin.displacement(), run.displacement())
    assert all(map(torch.equal, run.tensors, twin.tensors))
