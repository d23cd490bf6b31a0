"""Checkpoints of a folded run: the branch is scaled by the state, W is the base."""

import copy

import pytest
import torch

from deltaopt import DeltaLoRAOptimizer, LoRATriple, WeightMismatchError
from tests.support import internals, strategies
from tests.support.compare import refused, through_a_file
from tests.support.folded import folded_optimizer, packed_layer
from tests.support.runs import LayerRun, assert_agrees


@pytest.mark.parametrize("scaled", [0.5, 1.5], ids=["as at first", "as it was left"])
def test_the_branch_is_scaled_by_the_state(scaled):
    run = LayerRun("folded").train(4)
    twin = run.twin(scaling=scaled)
    assert float(twin.scale) == float(run.scale) == 1.5
    assert twin.optimizer.triples[0].scaling == 0.5
    for r in (run, twin):
        r.train(7)
    assert_agrees(twin, run)
    assert all(map(torch.equal, twin.tensors, run.tensors))


def test_an_older_state_takes_the_ratio_out_of_the_branch():
    run = LayerRun("folded", start_step=3, zero=False).train(2)
    state, factors = through_a_file(run.optimizer.state_dict()), [p.detach().clone() for p in run.factors]
    run.train(4)
    last = [p.detach().clone() for p in run.factors]
    assert float(run.scale) == 1.5
    with torch.no_grad():
        run.stored.W.copy_(run.W0)
        for p, value in zip(run.factors, factors, strict=True):
            p.copy_(value)
    run.optimizer.load_state_dict(state)
    assert float(run.scale) == 0.5
    run.t = 2
    run.train(4)
    assert all(map(torch.equal, run.factors, last))


def test_a_scaling_that_a_checkpoint_of_the_model_holds():
    """A buffer is loaded before the optimizer's state, so that it is ahead of what the optimizer knows."""
    run = LayerRun("folded").train(3)
    state, twin = through_a_file(run.optimizer.state_dict()), run.twin(load=False)
    twin.scale.copy_(run.scale)
    with pytest.raises(RuntimeError, match=r"q: its scaling was 0\.5 when it was registered .* and is 1\.5 now"):
        twin.optimizer.step()
    twin.optimizer.load_state_dict(state)
    assert_agrees(twin.train(2), run.train(2))


FOLDED_RECORDS = {
    "missing": "the saved record of triples is damaged or incomplete: KeyError",
    "no rule": "the saved record of triples is damaged or incomplete: KeyError",
    "negative": "folded must be finite and not negative, got -1.0",
    "a word": "the saved record of triples is damaged or incomplete: TypeError",
}


@pytest.mark.parametrize("damage", FOLDED_RECORDS)
def test_a_damaged_record_is_refused(damage):
    run = LayerRun("folded").train(2)
    state = copy.deepcopy(run.optimizer.state_dict())
    record = internals.record_of(state)
    triple = record["groups"][0]["triples"][0]
    if damage == "missing":
        del triple["folded"]
    elif damage == "no rule":
        del record["weight_update"]
    else:
        triple["folded"] = {"negative": -1.0, "a word": "2"}[damage]
    refused(
        lambda: run.optimizer.load_state_dict(state),
        ValueError,
        FOLDED_RECORDS[damage],
        lambda: [*run.tensors, float(run.scale), run.optimizer.state_dict()],
    )


def test_another_base_is_refused():
    run = LayerRun("folded").train(3)
    twin = run.twin(load=False)
    twin.stored.W += 1e-3
    with pytest.raises(WeightMismatchError, match="q: W has other contents than when the state was saved"):
        twin.optimizer.load_state_dict(run.optimizer.state_dict())


def test_a_packed_weight_is_not_taken_for_a_plain_one_that_was_saved():
    plain, packed = (
        folded_optimizer(stored.triple(torch.tensor(0.5), "q"))
        for stored in (strategies.make("linear", zero_A=True), packed_layer(zero=True))
    )
    for optimizer, other, match in (
        (packed, plain, r"q: W cannot be read now .* and could when the state was saved"),
        (plain, packed, r"q: W can be read now .* and could not when the state was saved"),
    ):
        refused(
            lambda optimizer=optimizer, other=other: optimizer.load_state_dict(other.state_dict()),
            WeightMismatchError,
            match,
        )


def test_other_factors_with_a_packed_weight_are_refused():
    stored = packed_layer(zero=True)
    triple = stored.triple(torch.tensor(0.5), "q")
    optimizer = folded_optimizer(triple)
    state = through_a_file(optimizer.state_dict())
    with torch.no_grad():
        stored.B.add_(1.0)
    with pytest.raises(WeightMismatchError, match="q: B has other contents than when the state was saved"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("fails", ["in the second layer", "in the inner optimizer"])
def test_a_state_that_cannot_be_set_changes_nothing(fails):
    """Undo a failure of a setter, and of a state that the inner optimizer refuses."""
    scale = torch.tensor(0.5, dtype=torch.float64)
    broken = []

    def set_scaling(value):
        if broken:
            raise OSError("no such layer")

    stored, other = strategies.make("linear", zero_A=True), strategies.make("linear", 1, zero_A=True)
    triples = [
        stored.triple(scale, "a"),
        LoRATriple(other.W, other.A, other.B, scaling=0.5, set_scaling=set_scaling, name="b"),
    ]
    optimizer = folded_optimizer(*triples)
    early, factors = optimizer.state_dict(), [[p.detach().clone() for p in (s.A, s.B)] for s in (stored, other)]
    for _ in range(2):
        (stored.W + scale * (stored.A @ stored.B)).square().sum().backward()
        other.A.grad = torch.zeros_like(other.A)
        optimizer.step()
    assert [t.folded for t in triples] == [2.0, 2.0]
    for s, (A, B) in zip((stored, other), factors, strict=True):
        s.A.detach().copy_(A)
        s.B.detach().copy_(B)
    if fails == "in the second layer":
        broken.append(True)
        with pytest.raises(OSError, match="no such layer"):
            optimizer.load_state_dict(early)
    else:
        early["param_groups"][0]["params"].append(99)
        with pytest.raises(ValueError, match="parameter group"):
            optimizer.load_state_dict(early)
    assert float(scale) == 1.5
    assert [t.folded for t in triples] == [2.0, 2.0]
    assert optimizer.step_count == 2


@pytest.mark.parametrize("zero", [True, False])
def test_a_state_has_a_place_for_a_compensation_and_the_optimizer_for_that_of_a_written_weight(zero):
    """A distributed checkpoint brings what the state of a fresh optimizer has a place for."""

    def new() -> DeltaLoRAOptimizer:
        stored = strategies.make("linear", dtype=torch.bfloat16, factor_dtype=torch.float32, zero_A=zero)
        optimizer = folded_optimizer(stored.triple(torch.tensor(0.5), "q"), rounding="compensated")
        (stored.A.sum() + stored.B.sum()).backward()
        optimizer.step()
        return optimizer

    optimizer, twin = new(), new()
    state = optimizer.state_dict()
    [kept] = [entries[key] for entries in state["state"].values() for key in entries if "compensation" in key]
    assert kept.any() != zero
    twin.load_state_dict(state)
    for each in (optimizer, twin):
        assert (internals.compensation_of(each) is None) == zero


def test_a_state_of_nearly_the_same_scaling_is_refused():
    run = LayerRun("folded").train(2)
    twin = LayerRun("folded", scaling=1.5 * (1 + 1e-4))
    with pytest.raises(ValueError, match="the saved state belongs to other triples"):
        twin.optimizer.load_state_dict(run.optimizer.state_dict())


def test_in_place_a_changed_scaling_refuses_a_state():
    run = LayerRun("in_place").train(1)
    state = run.optimizer.state_dict()
    run.scale.fill_(1.5)
    with pytest.raises(RuntimeError, match=r"q: its scaling was 0.5"):
        run.optimizer.load_state_dict(state)


def test_in_place_a_state_is_of_the_very_same_scaling():
    run, twin = LayerRun("in_place").train(2), LayerRun("in_place", scaling=0.5 * (1 + 1e-8))
    with pytest.raises(ValueError, match="the saved state belongs to other triples"):
        twin.optimizer.load_state_dict(run.optimizer.state_dict())


@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_state_of_factors_of_another_shape_is_of_other_triples(factor):
    s = strategies.make("linear")
    state = DeltaLoRAOptimizer(torch.optim.SGD, [s.triple(name="q")]).state_dict()
    if factor == "A":
        s.W, s.A = torch.zeros(6, 7), torch.zeros(6, 3, requires_grad=True)
    else:
        s.W, s.B = torch.zeros(5, 8), torch.zeros(3, 8, requires_grad=True)
    with pytest.raises(ValueError, match="the saved state belongs to other triples"):
        DeltaLoRAOptimizer(torch.optim.SGD, [s.triple(name="q")]).load_state_dict(state)
