"""Did W move? What report() and print(optimizer) say, against dense float64 references."""

import copy
import itertools
import json
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple
from deltaopt.guard import FiniteGuard
from tests.support import internals, strategies
from tests.support.compare import through_a_file
from tests.support.histories import histories, random_run
from tests.support.runs import LayerRun, SmallSteps, noisy_run
from tests.support.small import run_without_displacement, small_layer, small_triple
from tests.support.strategies import each_rule


def layer_of(run: LayerRun, index: int = 0):
    return run.optimizer.report().layers[index]


def glance(optimizer: DeltaLoRAOptimizer) -> str:
    """The line of print(optimizer) on W."""
    (line,) = [line for line in repr(optimizer).splitlines() if re.search(r"\bW\b", line)]
    return line


def size(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def about(number: float, tolerance: float = 1e-9):
    return pytest.approx(number, rel=tolerance, abs=tolerance)


@given(
    layout=strategies.layouts,
    seed=strategies.seeds,
    start_step=strategies.start_steps,
    zero=st.booleans(),
    keep_base=st.sampled_from([None, "cpu"]),
    history=histories(min_size=1, max_size=10),
)
def test_the_sizes_and_counts_are_those_of_the_dense_account(layout, seed, start_step, zero, keep_base, history):
    """Hold for both rules, whatever happens between the steps."""
    rule, events = history
    run = random_run(rule, layout, seed, start_step=start_step, zero=zero, keep_base=keep_base)
    moves = 0
    for event in events:
        steps = run.optimizer.step_count
        run.happen(event)
        counted = event == "step" or (event == "skipped" and rule == "folded")  # which has its gradients
        moves += counted and steps >= start_step
        layer = layer_of(run)
        assert layer.moves == moves
        assert layer.asked == about(size(run.asked))
        assert layer.asked_relative == about(size(run.asked) / size(run.base()), 1e-6)
        assert layer.kept == (1.0 if layer.asked else None)
    assert json.loads(json.dumps(run.optimizer.report().as_dict()))["layers"][0]["moves"] == moves


@pytest.mark.filterwarnings("ignore:.* changed between two steps:UserWarning")
@given(seed=strategies.seeds, events=strategies.events("in_place", min_size=1))
def test_the_path_of_a_gpu_counts_the_same(seed, events):
    """The host learns of each move later; print does not wait for it."""
    run, twin = (
        noisy_run(seed=seed, weight_update=internals.as_on_a_gpu(reports=itertools.repeat(False)), start_step=1),
        noisy_run(seed=seed, start_step=1),
    )
    for event in events:
        run.happen(event)
        twin.happen(event)
    assert run.optimizer.report().as_dict() == twin.optimizer.report().as_dict()


def test_print_waits_for_no_device():
    run = noisy_run(weight_update=internals.as_on_a_gpu(reports=itertools.repeat(False)))
    run.train(3)
    assert len(internals.pending_updates(run.optimizer)) == 3
    assert "no step has reported a move of W yet in 3 steps" in glance(run.optimizer)
    assert len(internals.pending_updates(run.optimizer)) == 3
    assert layer_of(run).moves == 3
    assert glance(run.optimizer) == "W asked to move: 1 of 1, 3 moves in 3 steps"


def kept_of(run: SmallSteps) -> float:
    """The share of what W was asked to move by that its bits hold, from dense matrices."""
    landed, asked = run.stored.W.double() - run.W0.double(), run.asked
    return float((landed * asked).sum() / asked.square().sum())


@pytest.mark.parametrize(
    ("rounding", "keep_base"), [("nearest", "cpu"), ("stochastic", "device"), ("compensated", None)]
)
def test_what_rounding_kept_of_the_movement(rounding, keep_base):
    run = SmallSteps(rounding=rounding, keep_base=keep_base, update_ratio=2.0).train(20)
    layer = layer_of(run)
    assert layer.kept == about(kept_of(run), 1e-5)
    assert layer.asked == about(size(run.asked), 1e-5)
    assert layer.asked_relative == about(size(run.asked) / size(run.W0), 1e-4)
    assert (layer.kept < 0.7) == (rounding == "nearest")
    assert ("held by the optimizer" in layer.note) == (rounding == "compensated")
    assert f"{100 * layer.kept:.1f} %" in str(run.optimizer.report())


@pytest.mark.parametrize("layout", ["transposed", "conv2d_channels_last", "packed_experts", "transposed_rows"])
def test_what_rounding_kept_in_other_layouts(layout):
    run = noisy_run(layout, dtype=torch.bfloat16, factor_dtype=torch.float32, keep_base="cpu", rounding="nearest")
    run.train(4)
    landed = (run.stored.matrix(run.stored.W).double() - run.base()).contiguous()
    expected = float((landed * run.asked).sum() / run.asked.square().sum())
    assert layer_of(run).kept == about(expected, 1e-5)
    assert 0.5 < expected < 1.5
    assert expected != 1.0


def test_what_rounding_kept_of_a_folded_weight():
    """The constant at step K is taken from W, which rounds it; the branch holds the rest exactly."""
    options = {"dtype": torch.bfloat16, "factor_dtype": torch.float32, "start_step": 2, "rounding": "nearest"}
    run = noisy_run(rule="folded", keep_base="cpu", **options).train(4)
    expected = float((run.moved() * run.asked).sum() / run.asked.square().sum())
    assert layer_of(run).kept == about(expected, 1e-5)
    assert expected != 1.0
    assert layer_of(noisy_run(rule="folded", **options).train(4)).kept is None
    never_written = noisy_run(rule="folded", zero=True, dtype=torch.bfloat16, factor_dtype=torch.float32).train(4)
    assert layer_of(never_written).kept == 1.0


def test_without_a_base_it_is_unknown():
    run = SmallSteps(rounding="stochastic", update_ratio=2.0).train(20)
    layer = layer_of(run)
    assert layer.kept is None
    assert layer.note == "what rounding kept of a 16-bit W is unknown without keep_base"
    assert layer.asked_relative == about(size(run.asked) / size(run.W0), 1e-2)
    assert "unknown without keep_base" in str(run.optimizer.report())


def test_a_matrix_of_terms():
    """A ratio that changes at every step makes the ledger one matrix."""
    run = noisy_run(update_ratio=lambda step: 1.0 + 0.1 * (step % 7))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        internals.keep_few_terms(patch)
        warnings.filterwarnings("ignore", "update_ratio")
        run.train(12)
    assert internals.ledger_of(run.optimizer).is_matrix
    layer = layer_of(run)
    assert (layer.moves, layer.kept) == (12, 1.0)
    assert layer.asked == about(size(run.asked))
    assert layer.asked_relative == about(size(run.asked) / size(run.base()))


def test_a_displacement_that_is_not_known():
    optimizer, _, _ = run_without_displacement()
    (layer,) = optimizer.report().layers
    assert (layer.asked, layer.asked_relative, layer.kept) == (None, None, None)
    assert layer.note.startswith("the displacement is not known")
    assert "layers whose W was asked to move: 1 of 1" in str(optimizer.report())


def test_steps_that_change_nothing_are_no_moves():
    """A ratio of 0, a learning rate of 0 and missing gradients leave W alone."""
    run = noisy_run(update_ratio=0.0).train(2)
    assert glance(run.optimizer) == "no W has moved in 2 steps; ratio 0: W rests"
    assert layer_of(run).next_step == "ratio 0: W rests"
    run.optimizer.groups[0].update_ratio = 1.5
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.train(2)
    run.optimizer.zero_grad()
    run.optimizer.step()
    layer = layer_of(run)
    assert (layer.moves, layer.asked, layer.kept, layer.moved) == (0, 0.0, None, False)
    assert layer.next_step == "moves W by update_ratio 1.5"
    assert "layers whose W was asked to move: 0 of 1; skipped" in str(run.optimizer.report())


def test_a_run_whose_updates_were_all_skipped_has_moved_no_w():
    run = noisy_run()
    for _ in range(2):
        run.happen("skipped")
    assert glance(run.optimizer) == "no step has reported a move of W yet in 2 steps; skipped updates: 2"


def test_skipped_updates_are_counted():
    run = noisy_run().train(2)
    run.happen("skipped")
    report = run.optimizer.report()
    assert (report.skipped_updates, report.layers[0].moves, report.step_count) == (1, 2, 3)
    assert "skipped updates: 1" in str(report)
    assert glance(run.optimizer).endswith("2 moves in 3 steps; skipped updates: 1")
    resumed = run.twin()
    assert glance(resumed.optimizer).endswith("2 moves in 3 steps; skipped updates: 1")


def test_print_says_of_a_device_what_the_host_has_heard():
    """At least that many, without reading the device."""
    guard = FiniteGuard(2)
    assert guard.at_a_glance() == "skipped updates: 2"
    guard.count(torch.tensor(False, device="meta"), [])
    assert guard.at_a_glance() == "skipped updates: 2 or more"


def test_a_16_bit_w_that_kept_nothing_was_asked_to_move():
    """Rounding to nearest loses what is small; without a base nobody can say that it has moved."""
    run = SmallSteps(rounding="nearest", update_ratio=1e-4).train(3)
    assert torch.equal(run.stored.W, run.W0)
    assert glance(run.optimizer) == "W asked to move: 1 of 1, 3 moves in 3 steps"
    assert "layers whose W was asked to move: 1 of 1" in str(run.optimizer.report())


def test_what_the_next_step_does():
    in_place, folded = (noisy_run(rule=rule, start_step=2) for rule in ("in_place", "folded"))
    waits = "waits for start_step=2, 2 more steps before W moves"
    for run in (in_place, folded):
        assert layer_of(run).next_step == waits
        assert glance(run.optimizer) == f"no W has moved in 0 steps; {waits}"
        run.train(2)
    assert layer_of(in_place).next_step == "moves W by update_ratio 1.5"
    assert layer_of(folded).next_step == "folds update_ratio 1.5 into the branch (0 so far)"
    folded.train(2)
    layer = layer_of(folded)
    assert layer.next_step == "moves the branch, with update_ratio 1.5 folded in (since step 2)"
    assert (layer.folded, layer.folded_since, layer.moves) == (1.5, 2, 2)
    assert (
        glance(folded.optimizer) == "update_ratio is folded into 1 of 1 branches, which move for W, 2 moves in 4 steps"
    )
    folded.optimizer.groups[0].update_ratio = 2.5
    assert layer_of(folded).next_step == "folds update_ratio 2.5 into the branch (1.5 so far, since step 2)"
    folded.optimizer.groups[0].update_ratio = 0.0
    assert layer_of(folded).next_step == "takes update_ratio 1.5 out of the branch"
    folded.train()
    layer = layer_of(folded)
    assert (layer.folded, layer.folded_since, layer.next_step) == (0.0, None, "ratio 0: W rests")


@each_rule
def test_a_callable_ratio_is_that_of_the_next_step(rule):
    run = noisy_run(rule=rule, update_ratio=lambda step: float(step % 2))
    assert layer_of(run).next_ratio == 0.0
    assert layer_of(run.train()).next_ratio == 1.0
    assert "no W has moved in 1 step" in glance(run.optimizer)


@each_rule
def test_the_counts_outlive_a_resume(rule):
    """Of the whole model, of the adapter alone, and of a copy."""
    run = noisy_run(rule=rule, start_step=1).train(4)
    run.optimizer.groups[0].update_ratio = 0.5
    run.train(2)
    before = run.optimizer.report()
    assert (before.layers[0].moves, before.layers[0].folded_since) == (5, 4 if rule == "folded" else None)
    for again in (run.twin(), run.twin(whole=False), copy.deepcopy(run)):
        report = again.optimizer.report()
        assert report.layers[0].moves == 5
        assert report.layers[0].folded_since == before.layers[0].folded_since
        assert layer_of(again.train()).moves == 6


def test_a_new_base_begins_at_zero():
    run = noisy_run().train(3)
    run.optimizer.rebase()
    layer = layer_of(run)
    assert (layer.moves, layer.asked, layer.moved) == (0, 0.0, False)
    twin = run.train(2).twin(state=deltaopt.without_ledger(through_a_file(run.optimizer.state_dict())))
    assert layer_of(twin).moves == 0


@pytest.mark.parametrize("gone", ["moves", "folded_since"])
@each_rule
def test_a_state_of_an_earlier_version_says_unknown(rule, gone):
    """It did not count."""
    run = noisy_run(rule=rule).train(3)
    state = through_a_file(run.optimizer.state_dict())
    internals.change_ledger(state, run.name, lambda record: record.pop(gone))
    twin = run.twin(state=state).train()
    layer = layer_of(twin)
    if gone == "moves":
        assert layer.moves is None
        assert "an unknown number of moves" in glance(twin.optimizer)
        assert re.search(r"^unknown ", str(twin.optimizer.report()), re.MULTILINE)
    else:
        assert (layer.moves, layer.folded_since) == (4, None)
        assert "since" not in layer.next_step
    assert layer.asked == about(size(twin.asked))


def test_a_state_of_an_earlier_version_that_had_not_moved_is_known():
    run = noisy_run(start_step=5).train(3)
    state = through_a_file(run.optimizer.state_dict())
    internals.change_ledger(state, run.name, lambda record: record.pop("moves"))
    assert layer_of(run.twin(state=state)).moves == 0


@pytest.mark.parametrize("bad", [-1, 1.5, "many"])
def test_a_damaged_count_is_refused(bad):
    run = noisy_run().train(2)
    state = through_a_file(run.optimizer.state_dict())
    internals.change_ledger(state, run.name, lambda record: record.update(moves=bad))
    with pytest.raises(ValueError, match=r"its saved ledger is damaged or incomplete: .*moves"):
        run.twin(state=state)


@each_rule
@pytest.mark.parametrize("keep_base", [None, "cpu"])
def test_within_base_weights(keep_base, rule):
    run = noisy_run(rule=rule, keep_base=keep_base, start_step=1).train(4)
    before = layer_of(run)
    with run.optimizer.base_weights():
        layer = layer_of(run)
        assert glance(run.optimizer).endswith("3 moves in 4 steps")
    assert (layer.moves, layer.asked, layer.kept) == (3, about(before.asked), 1.0)
    if keep_base is None:
        assert layer.asked_relative is None
        assert "not looked at within base_weights()" in layer.note
    else:
        assert layer.asked_relative == about(before.asked_relative)


def test_after_an_interrupted_step(monkeypatch):
    """It is completed first, and counted once; print says what the host knows meanwhile."""
    triples = [small_triple(name, seed) for seed, name in enumerate("abc")]
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1)
    with monkeypatch.context() as patch:
        internals.fail_at_write(patch, 2, 3)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert "no step has reported a move of W yet in 0 steps" in glance(optimizer)
    assert [layer.moves for layer in optimizer.report().layers] == [1, 1, 1]
    assert glance(optimizer) == "W asked to move: 3 of 3, 1 move in 1 step"


def test_several_groups():
    """Layers with equal answers share a row."""
    names = [f"layer{i}" for i in range(6)]
    triples = [small_triple(name, seed) for seed, name in enumerate(names)]
    groups = [
        {"triples": triples[:3]},
        {"triples": triples[3:5], "update_ratio": 0.0},
        {"triples": triples[5:], "start_step": 9},
    ]
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, groups, lr=0.1, update_ratio=0.5)
    optimizer.step()
    report = optimizer.report()
    assert [layer.moves for layer in report.layers] == [1, 1, 1, 0, 0, 0]
    _, head, *rows = str(report).splitlines()
    assert head.split() == ["moves", "asked", "for", "of", "W", "kept", "next", "step", "layers"]
    assert [re.split(r"  +", row)[-2:] for row in rows] == [
        ["moves W by update_ratio 0.5", "3: layer0, layer1, ..."],
        ["ratio 0: W rests", "2: layer3, layer4"],
        ["waits for start_step=9, 8 more steps before W moves", "layer5"],
    ]
    assert glance(optimizer) == (
        "W asked to move: 3 of 6, 1 move in 1 step; in some groups ratio 0: W rests; in some groups waits for "
        "start_step=9, 8 more steps before W moves"
    )


def test_a_quantized_weight():
    """W is packed and never written: its norm is not known, the movement of the branch is."""
    W, A, B = small_layer()
    packed = torch.zeros(W.numel() // 2, 1, dtype=torch.uint8)
    with torch.no_grad():
        A.zero_()
    scale = torch.tensor(0.5)
    optimizer = DeltaLoRAOptimizer(
        torch.optim.SGD, [LoRATriple(packed, A, B, scaling=scale, name="q")], lr=0.1, weight_update="folded"
    )
    for _ in range(2):
        optimizer.zero_grad()
        ((scale * A @ B) - 1.0).square().sum().backward()
        optimizer.step()
    (layer,) = optimizer.report().layers
    assert layer.asked == about(size(2.0 * 0.5 * (A @ B).detach().double()), 1e-6)
    assert (layer.moves, layer.asked_relative, layer.kept) == (2, None, 1.0)
    assert layer.note.startswith("W cannot be read (")
    assert "of W" in str(optimizer.report())


def test_another_optimizer_has_moved_it_since():
    W, A, B = small_layer()
    first = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=0.1)
    first.step()
    with pytest.warns(UserWarning, match="moved by an earlier optimizer"):
        second = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=0.1)
    second.step()
    with pytest.raises(RuntimeError, match="report"):
        first.report()
    assert glance(first) == "W asked to move: 1 of 1, 1 move in 1 step"
