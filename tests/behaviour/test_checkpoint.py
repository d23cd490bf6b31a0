"""state_dict and load_state_dict: what they carry, and that a wrong state changes nothing."""

import base64
import copy
import io
import struct

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from deltaopt.state import SCHEMA, _sealed, split_ledgers
from tests.support import strategies

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD


def train(stored, optimizer, steps, first=0):
    loss = strategies.problem(stored.W.shape)
    for t in range(first, first + steps):
        optimizer.zero_grad()
        loss(stored.W + 0.5 * stored.A @ stored.B, t).backward()
        optimizer.step()


def build(stored, inner=AdamW, name="q", **options):
    return DeltaLoRAOptimizer(inner, [stored.triple(0.5, name=name)], lr=0.01, **options)


def saved_and_read(state):
    """Through a file, as `weights_only=True` reads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("start_step", [0, 6])
@pytest.mark.parametrize("inner", [AdamW, SGD, torch.optim.Adafactor, torch.optim.LBFGS])
def test_a_resumed_run_goes_on_bit_for_bit(inner, start_step):
    """With the model's weights loaded too. start_step 6 is passed after the resume at 4."""
    whole = strategies.make("linear")
    optimizer = build(whole, inner, start_step=start_step, update_ratio=1.5)
    half = None
    loss = strategies.problem(whole.W.shape)

    def step(stored, opt, t):
        def closure():
            opt.zero_grad()
            value = loss(stored.W + 0.5 * stored.A @ stored.B, t)
            value.backward()
            return value

        opt.step(closure)

    for t in range(10):
        if t == 4:
            half, state = copy.deepcopy(whole), saved_and_read(optimizer.state_dict())
        step(whole, optimizer, t)
    resumed = build(half, inner, start_step=99, update_ratio=0.1)
    resumed.load_state_dict(state)
    assert resumed.step_count == 4
    assert resumed.groups[0].start_step == start_step
    assert resumed.groups[0].update_ratio == 1.5
    for t in range(4, 10):
        step(half, resumed, t)
    assert all(map(torch.equal, (whole.W, whole.A, whole.B), (half.W, half.A, half.B)))


def test_param_groups_stay_linked_after_loading():
    """A scheduler that writes into groups the inner optimizer does not read would have no effect."""
    stored = strategies.make("linear")
    optimizer = build(stored)
    train(stored, optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert optimizer.state is optimizer.inner.state
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    before = stored.A.detach().clone()
    train(stored, optimizer, 1, first=2)
    assert torch.equal(stored.A, before)


def test_loading_does_not_move_W_and_may_be_repeated():
    stored = strategies.make("linear")
    optimizer = build(stored)
    train(stored, optimizer, 3)
    before, state = stored.W.clone(), optimizer.state_dict()
    for _ in range(2):
        optimizer.load_state_dict(state)
    assert torch.equal(stored.W, before)
    assert optimizer.step_count == 3


def test_our_keys_are_neither_in_the_live_groups_nor_in_the_state():
    """Schedulers and the inner optimizer see what they made; "is the state empty" tests stay right."""
    stored = strategies.make("linear")
    optimizer = build(stored)
    assert len(optimizer.state) == 0
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    plain = AdamW([stored.A, stored.B], lr=0.01)
    assert optimizer.param_groups[0].keys() == plain.param_groups[0].keys()
    assert set(state["param_groups"][0]) - set(plain.state_dict()["param_groups"][0]) == {"deltaopt"}
    assert [set(entries) for entries in state["state"].values()] == [{"deltaopt"}] * 2
    assert len(optimizer.state) == 0


def test_a_callable_update_ratio_is_kept_and_not_saved():
    stored = strategies.make("linear")
    ratio = lambda step: 1.0 / (1 + step)  # noqa: E731
    optimizer = build(stored, update_ratio=ratio)
    state = saved_and_read(optimizer.state_dict())
    assert state["param_groups"][0]["deltaopt"]["groups"][0]["update_ratio"] is None
    optimizer.load_state_dict(state)
    assert optimizer.groups[0].update_ratio is ratio
    constant = build(copy.deepcopy(stored), update_ratio=0.3)
    constant.load_state_dict(state)
    assert constant.groups[0].update_ratio == 0.3
    optimizer.load_state_dict(saved_and_read(constant.state_dict()))
    assert optimizer.groups[0].update_ratio is ratio


def test_skipped_updates_are_carried():
    stored = strategies.make("linear")
    optimizer = build(stored, SGD)
    stored.A.grad, stored.B.grad = torch.full_like(stored.A, float("nan")), torch.zeros_like(stored.B)
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        optimizer.step()
    other = build(copy.deepcopy(stored), SGD)
    other.load_state_dict(saved_and_read(optimizer.state_dict()))
    assert other.skipped_updates == 1
    other.param_groups[0]["params"][0].grad = torch.full_like(stored.A, float("nan"))
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        other.step()
    assert other.skipped_updates == 2


def test_hooks_of_state_dict_and_load_state_dict_fire():
    optimizer, fired = build(strategies.make("linear")), []
    optimizer.register_state_dict_pre_hook(lambda opt: fired.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: fired.append(state.pop("note")))
    optimizer.register_load_state_dict_post_hook(lambda opt: fired.append("loaded"))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert fired == ["save", 1, "loaded"]
    assert state["note"] == 1


def test_a_state_that_a_hook_hands_back_is_the_one_that_is_loaded():
    optimizer = build(strategies.make("linear"))
    state = optimizer.state_dict()
    (group,) = state["param_groups"]
    optimizer.register_load_state_dict_pre_hook(lambda opt, _: {**state, "param_groups": [{**group, "lr": 0.5}]})
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5


def refused(optimizer, state, message):
    """Loading raises `message`, and nothing changed."""
    before = copy.deepcopy((optimizer.state_dict(), optimizer.step_count))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict(), optimizer.step_count
    assert str(before) == str(after)


@pytest.fixture
def state():
    stored = strategies.make("linear")
    optimizer = build(stored, update_ratio=0.7)
    train(stored, optimizer, 3)
    return optimizer.state_dict()


def test_a_state_of_a_plain_optimizer(state):
    stored = strategies.make("linear")
    plain = AdamW([stored.A, stored.B])
    refused(build(stored), plain.state_dict(), "not saved by a DeltaLoRAOptimizer.*load it into optimizer.inner")


def test_a_state_of_another_name(state):
    refused(build(strategies.make("linear"), name="k"), state, r"k: saved name q, .*registered name k")


def test_a_state_of_another_rank(state):
    stored = strategies.make("linear")
    A, B = torch.zeros(5, 2, requires_grad=True), torch.zeros(2, 7, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(AdamW, [LoRATriple(stored.W, A, B, scaling=0.5, name="q")])
    refused(optimizer, state, r"q: saved name q, A \(5, 3\), B \(3, 7\).*registered name q, A \(5, 2\), B \(2, 7\)")


def test_a_state_of_another_scaling(state):
    optimizer = DeltaLoRAOptimizer(AdamW, [strategies.make("linear").triple(2.0, name="q")])
    refused(optimizer, state, "q: saved .*scaling 0.5, registered .*scaling 2.0")


def test_a_state_of_another_number_of_triples(state):
    triples = [strategies.make("linear", seed).triple(0.5, name=f"{seed}") for seed in range(2)]
    refused(DeltaLoRAOptimizer(AdamW, triples), state, "1 triples were saved, 2 are registered")


def test_a_state_of_another_number_of_groups(state):
    groups = [{"triples": [strategies.make("linear", seed).triple(0.5, name=f"{seed}")]} for seed in range(2)]
    refused(DeltaLoRAOptimizer(AdamW, groups), state, "the saved state has 1 groups of triples, this optimizer 2")


def test_a_state_of_another_schema(state):
    state["param_groups"][0]["deltaopt"]["schema"] = SCHEMA + 1
    refused(build(strategies.make("linear")), state, f"schema {SCHEMA + 1}, this version of deltaopt reads {SCHEMA}")


@pytest.mark.parametrize("damage", ["schema", "step_count", "skipped_updates", "groups", "negative", "ratio", "text"])
def test_a_damaged_record(state, damage):
    record = state["param_groups"][0]["deltaopt"]
    if damage == "negative":
        record["step_count"] = -1
    elif damage == "ratio":
        record["groups"][0]["update_ratio"] = float("nan")
    elif damage == "text":
        record["groups"][0]["start_step"] = "5"
    else:
        del record[damage]
    refused(
        build(strategies.make("linear")),
        state,
        "damaged or incomplete|has the schema None|must not be negative|must be finite",
    )


def damaged(record, damage):
    """Anchors, and what else a ledger's record says, that no run has written."""
    term = record["terms"][0]
    if damage in record:
        del record[damage]
    elif damage == "shape":
        term["A"]["shape"] = [3, 5]
    elif damage == "size":
        term["A"]["shape"] = [5, 4]
    elif damage == "dtype":
        term["A"]["dtype"] = "int64"
    elif damage == "no dtype":
        term["A"]["dtype"] = "float99"
    elif damage == "text":
        term["B"]["data"] = "?" + term["B"]["data"][1:]
    elif damage == "infinite":
        term["B"]["data"] = base64.b64encode(struct.pack("<21d", *[1e308 * 10] * 21)).decode()
    return record


@pytest.mark.parametrize(
    "damage",
    [
        *("coef", "terms", "end", "origin", "lost", "base", "W", "whole", "A", "B"),
        *("shape", "size", "dtype", "no dtype", "text", "infinite"),
    ],
)
def test_a_ledger_that_no_run_has_written(damage):
    """With a checksum that fits, so that it is the contents that are looked at."""
    stored = strategies.make("linear")
    optimizer = build(stored)
    train(stored, optimizer, 3)
    state = optimizer.state_dict()
    ledgers, _, _ = split_ledgers(state)
    (number,) = (n for n, entries in state["state"].items() if entries.get("deltaopt"))
    state["state"][number] = state["state"][number] | {"deltaopt": _sealed({"q": damaged(ledgers["q"], damage)})}
    refused(optimizer, state, "q: its saved ledger is damaged or incomplete")


def test_a_state_that_the_inner_optimizer_refuses():
    """W is the base, so that it would be rebuilt; it is not, as the inner optimizer comes first."""
    trained, pristine = strategies.make("linear"), strategies.make("linear").W
    optimizer = build(trained)
    train(trained, optimizer, 3)
    head = torch.zeros(2, requires_grad=True)
    triple = LoRATriple(pristine, trained.A, trained.B, scaling=0.5, name="q")
    other = DeltaLoRAOptimizer(AdamW, [triple], [head])
    refused(other, optimizer.state_dict(), "doesn't match the size of optimizer's group")
    assert torch.equal(pristine, strategies.make("linear").W)
