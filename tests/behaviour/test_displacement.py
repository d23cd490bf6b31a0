"""The displacement: what W was asked to move by, whatever happened to A, B, update_ratio and the step."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deltaopt
from deltaopt import DeltaLoRAOptimizer
from tests.support import internals, strategies
from tests.support.compare import close, through_a_file
from tests.support.histories import after, histories, random_run
from tests.support.runs import SCALING, noisy_run, noisy_step
from tests.support.small import HandmadeLayer, wide_layer


@given(
    layout=strategies.layouts,
    seed=strategies.seeds,
    start_step=strategies.start_steps,
    zero=st.booleans(),
    history=histories(min_size=1, max_size=14),
)
def test_is_what_W_was_asked_to_move_by_and_did(layout, seed, start_step, zero, history):
    """Hold for both rules, after each event."""
    rule, events = history
    run = random_run(rule, layout, seed, start_step=start_step, zero=zero)
    for event in events:
        run.happen(event)
        assert close(run.displacement(), run.asked)
        assert close(run.moved(), run.asked)


@pytest.mark.filterwarnings("ignore:.* changed between two steps:UserWarning")
@given(seed=strategies.seeds, events=strategies.events("in_place", min_size=1))
def test_the_path_of_a_gpu_keeps_the_same_ledger(seed, events):
    """Let the host learn later whether a step was applied, and from where it began."""
    run = noisy_run(seed=seed, weight_update=internals.as_on_a_gpu(reports=itertools.repeat(False)))
    after(run, events)
    assert close(run.displacement(), run.asked)
    assert close(run.moved(), run.asked)


@pytest.mark.filterwarnings("ignore:.* changed between two steps:UserWarning")
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("changed", ["A", "B"])
def test_an_outside_change_of_one_factor_of_one_of_several_layers(changed, gpu):
    """Tell apart what each layer was, though layers of one shape share buffers."""
    options = {"weight_update": internals.as_on_a_gpu()} if gpu else {}
    stored = [strategies.make("linear", seed) for seed in range(3)]
    W0 = [s.W.clone() for s in stored]
    triples = [s.triple(SCALING, name=f"{i}") for i, s in enumerate(stored)]
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1, **options)
    factors = [f for s in stored for f in (s.A, s.B)]
    noisy_step(optimizer, *factors)
    getattr(stored[1], changed).data.mul_(1.5)
    for _ in range(2):
        noisy_step(optimizer, *factors)
    for i, (s, W) in enumerate(zip(stored, W0, strict=True)):
        assert close(optimizer.displacement(f"{i}").product(), s.W - W)
    assert [len(internals.terms_of(optimizer, i)) for i in range(3)] == [1, 3, 1]


@pytest.mark.parametrize("late", [False, True])
def test_pending_updates_do_not_pile_up(late):
    """Keep at most those of the steps that the device has not reported yet."""
    reports = itertools.cycle([False, False, True, True] if late else [True])
    run = noisy_run(weight_update=internals.as_on_a_gpu(reports=reports))
    for _ in range(12):
        run.train()
        assert len(internals.pending_updates(run.optimizer)) <= (3 if late else 0)


@pytest.mark.parametrize(("zero", "start_step", "rank"), [(True, 0, 3), (False, 0, 6), (True, 2, 6)])
def test_takes_two_terms_at_most_with_a_constant_ratio(zero, start_step, rank):
    run = noisy_run(zero=zero, start_step=start_step).train(40)
    assert run.optimizer.displacement("q").rank == rank
    assert len(internals.terms_of(run.optimizer)) == rank // 3 - 1
    assert close(run.displacement(), run.asked)


def test_a_changed_ratio_adds_one_term():
    run = noisy_run(zero=True, update_ratio=lambda step: 1.0 + step // 10).train(30)
    assert len(internals.terms_of(run.optimizer)) == 2
    assert close(run.displacement(), run.asked)


@pytest.mark.parametrize("rule", strategies.RULES)
def test_before_the_first_move_it_is_zero(rule):
    run = random_run(rule, start_step=5).train(1)
    found = run.optimizer.displacement("q")
    assert (found.A.shape, found.B.shape, found.rank) == ((5, 0), (0, 7), 0)
    assert torch.equal(found.product(), torch.zeros(5, 7, dtype=torch.float64))


@pytest.mark.parametrize("rule", strategies.RULES)
def test_refuses_a_name_that_is_not_there(rule):
    run = random_run(rule)
    with pytest.raises(KeyError, match="no triple 'k'; there are q"):
        run.optimizer.displacement("k")


@pytest.mark.parametrize("gpu", [False, True])
def test_a_ratio_that_changes_every_step_has_an_exact_account_and_one_warning(gpu):
    """Pass the limit of 75 after ten changes, and go on until all of the rank is there."""
    options = {"weight_update": internals.as_on_a_gpu()} if gpu else {}
    optimizer, W, A, B = wide_layer(lambda step: 1.0 + 0.01 * step, **options)
    W0, dense = W.clone(), W.clone()

    def train(steps):
        for _ in range(steps):
            before, ratio = (A @ B).detach(), 1.0 + 0.01 * optimizer.step_count
            noisy_step(optimizer, A, B)
            dense.add_((A @ B).detach() - before, alpha=ratio)

    with pytest.warns(RuntimeWarning, match=r"In about 5 steps .* 0\.687 MiB .*schedules\.linear") as caught:
        train(6)
    assert [warning.filename for warning in caught] == [noisy_step.__code__.co_filename]
    for _ in range(6):
        train(10)
        assert close(W, dense)
        found = optimizer.displacement("triple0")
        assert close(found.product(), W - W0, 1e-11)
        exported = deltaopt.export_adapter(optimizer)["triple0"]
        assert close(W0 + exported.product(), W + (A @ B).detach(), 1e-11)
        with optimizer.base_weights():
            assert close(W, W0, 1e-11)
    assert (found.rank, exported.rank) == (300, 300)
    compressed = deltaopt.export_adapter(optimizer, rank=5)["triple0"]
    assert (compressed.rank, compressed.error > 0) == (5, True)
    assert optimizer.buffer_bytes < 8 * (3 * 8 * 600 + 75 * 600 + 300 * 300)


@pytest.mark.filterwarnings("ignore:.* changed between two steps:UserWarning")
def test_an_exact_export_of_a_matrix_has_the_rank_of_the_change():
    """Repeat the same factors: the terms pass the limit, the rank of their sum does not."""
    ratio = {"now": 1.0}
    optimizer, W, A, B = wide_layer(lambda step: ratio["now"])
    W0 = W.clone()
    noisy_step(optimizer, A, B)
    A.grad = B.grad = None
    kept = A.detach().clone()

    def repeat():
        for i in range(40):
            ratio["now"] = 1.0 + i % 7
            A.data.copy_(kept * (1 + i % 3))
            optimizer.step()

    with pytest.warns(RuntimeWarning, match="or A and B were changed between them"):
        repeat()
    assert internals.ledger_of(optimizer).is_matrix
    assert close(optimizer.displacement("triple0").product(), W - W0, 1e-10)
    exported = deltaopt.export_adapter(optimizer)["triple0"]
    assert exported.rank <= 16
    assert close(W0 + exported.product(), W + A.detach() @ B.detach(), 1e-10)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_hundreds_of_changes_in_every_layout(layout, seed, monkeypatch):
    """Sum up after a few terms, with changes from outside and restarts between."""
    internals.keep_few_terms(monkeypatch)
    run = noisy_run(layout, seed, update_ratio=lambda step: 1.0 + math.sin(step) ** 2)
    for event in ["outside", "restart", "skipped"] * 2:
        run.train(40)
        run.happen(event)
        assert internals.ledger_of(run.optimizer).is_matrix
        assert close(run.displacement(), run.asked, 1e-11)
        assert close(run.moved(), run.asked, 1e-11)


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_with_a_matrix_is_resumed(whole):
    """Save nothing of the identity next to the matrix, and no term that has yet to be added to it."""
    optimizer, W, A, B = wide_layer(lambda step: 1.0 + 0.01 * step)
    W0 = W.clone()

    def train(optimizer, *factors, steps):
        for _ in range(steps):
            torch.manual_seed(optimizer.step_count)
            noisy_step(optimizer, *factors)

    with pytest.warns(RuntimeWarning, match="update_ratio has changed"):
        train(optimizer, A, B, steps=14)
    small = len(str(wide_layer(1.0)[0].state_dict()))
    assert len(internals.ledger_of(optimizer).terms) > 1
    state = optimizer.state_dict()
    assert len(internals.ledger_of(optimizer).terms) == 1
    assert len(str(state)) - small < 300 * 300 * 8 * 4 / 3 + 20_000  # base64 of a matrix of float64

    twin, W2, A2, B2 = wide_layer(lambda step: 1.0 + 0.01 * step)
    with torch.no_grad():
        for now, saved in zip((W2, A2, B2), (W if whole else W0, A, B), strict=True):
            now.copy_(saved)
    twin.load_state_dict(through_a_file(state))
    assert close(W2, W, 0.0 if whole else 1e-12)
    assert internals.ledger_of(twin).is_matrix
    train(optimizer, A, B, steps=9)
    train(twin, A2, B2, steps=9)
    assert close(W2, W, 0.0 if whole else 1e-12)
    assert close(twin.displacement("triple0").product(), W2 - W0, 1e-11)


def test_the_displacement_of_a_small_weight_has_no_more_than_its_rank():
    run = noisy_run(update_ratio=lambda step: 1.0 + step % 5).train(100)
    assert close(run.displacement(), run.asked, 1e-10)
    assert run.optimizer.displacement("q").rank == 5


def test_factors_of_another_rank_start_a_new_term():
    run = noisy_run().train(1)
    stored, optimizer = run.stored, run.optimizer
    stored.A.data, stored.B.data = stored.A.data[:, :2].clone(), stored.B.data[:2].clone()
    optimizer.state.clear()
    run.changed_outside = True
    run.train(2)
    assert close(run.displacement(), run.asked)
    assert close(run.moved(), run.asked)


@pytest.mark.parametrize("rule", strategies.RULES)
def test_a_copy_has_a_ledger_of_its_own(rule):
    run = random_run(rule).train(1)
    twin = copy.deepcopy(run)
    asked = run.asked.clone()
    twin.train(2)
    assert close(run.displacement(), asked)
    assert close(twin.displacement(), twin.asked)
    assert not close(twin.displacement(), asked, 1e-3)
    run.train(1)
    assert close(run.displacement(), run.asked)


def built_on_a_module():
    """Return a layer, its optimizer, and W before the first step."""
    layer = HandmadeLayer(scaling=1.0)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [layer.triple()], lr=0.1, update_ratio=1.0)
    return layer, optimizer, layer.weight.detach().double()


def test_a_model_that_changes_its_dtype_takes_its_ledger_along():
    """Change the dtype as `model.double()` does: the Parameter objects stay."""
    layer, optimizer, W0 = built_on_a_module()
    noisy_step(optimizer, layer.A, layer.B)
    layer.double()
    noisy_step(optimizer, layer.A, layer.B)
    found = optimizer.displacement("q").product()
    assert found.dtype == torch.float64
    assert close(found, layer.weight - W0, 1e-5)


@pytest.mark.parametrize(
    "action",
    [
        lambda optimizer: optimizer.displacement("q"),
        lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
        deltaopt.export_adapter,
        lambda optimizer: optimizer.accounts(),
        lambda optimizer: optimizer.resync(),
        lambda optimizer: optimizer.restart(),
    ],
    ids=["displacement", "load_state_dict", "export_adapter", "accounts", "resync", "restart"],
)
def test_a_model_that_is_cast_and_cast_back_between_two_steps(action):
    """Ask for the displacement, rebuild, export, resync or restart in between."""
    layer, optimizer, W0 = built_on_a_module()
    for _ in range(3):
        noisy_step(optimizer, layer.A, layer.B)
        layer.double()
        action(optimizer)
        layer.float()
        noisy_step(optimizer, layer.A, layer.B)
        noisy_step(optimizer, layer.A, layer.B)
        found = optimizer.displacement("q").product()
        assert found.dtype == torch.float32
        assert close(found, layer.weight.double() - W0, 1e-5)


def test_the_bytes_of_a_ledger_are_counted():
    run = noisy_run(dtype=torch.float32)
    kept = 3 * (5 + 7) * 4
    run.train(1)
    assert run.optimizer.buffer_bytes == kept + 3 * (5 + 7) * 4


@pytest.mark.parametrize("rule", strategies.RULES)
def test_a_rule_that_has_nothing_to_keep_keeps_nothing(rule):
    """Take no buffers for the folded rule, whose displacement is in the branch."""
    run = random_run(rule, zero=True).train(3)
    assert (run.optimizer.buffer_bytes == 0) == (rule == "folded")
    assert internals.has_moved(run.optimizer) == (rule == "in_place")
