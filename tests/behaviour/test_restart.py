"""restart: the branch goes into W, A and B start afresh, and the ledger of W continues."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deltaopt
from deltaopt import DeltaLoRAOptimizer
from tests.support import internals, strategies
from tests.support.compare import COPIES, close, refused, through_a_file
from tests.support.histories import random_run
from tests.support.runs import noisy_run
from tests.support.small import HandmadeLayer, random_steps
from tests.support.strategies import RULES


@given(
    rule=strategies.rules,
    layout=strategies.layouts,
    seed=strategies.seeds,
    steps=st.integers(0, 3),
    start_step=strategies.start_steps,
)
def test_a_restart_keeps_the_effective_weight(rule, layout, seed, steps, start_step):
    run = random_run(rule, layout, seed, start_step=start_step).train(steps)
    before = run.effective_exactly()
    run.happen("restart")
    assert close(run.effective_exactly(), before)
    _, _, B = run.stored.matrices()
    if layout == "embedding":  # PEFT starts these the other way round
        assert not B.any()
        assert run.stored.A.all()
    else:
        assert not run.stored.A.any()
        assert 0 < float(B.abs().max()) <= B.shape[-1] ** -0.5


@pytest.mark.parametrize("rule", RULES)
def test_clears_gradients_and_inner_state_of_the_factors_and_of_nothing_else(rule):
    run, head = random_run(rule), torch.zeros(3, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [run.triple], [head], lr=0.1, weight_update=rule)
    run.set_gradients()
    head.grad = torch.ones_like(head)
    optimizer.step()
    optimizer.restart()
    assert list(optimizer.state) == [head]
    assert all(factor.grad is None for factor in run.factors)
    assert head.grad is not None
    assert optimizer.step_count == 1
    run.set_gradients()
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in (*run.factors, head)] == [1, 1, 2]


def test_a_generator_repeats_it_and_the_global_one_is_left_alone():
    runs = [noisy_run() for _ in range(2)]
    for run in runs:
        before = torch.get_rng_state()
        run.optimizer.restart(generator=torch.Generator().manual_seed(7))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0].stored.B, runs[1].stored.B)
    runs[1].optimizer.restart()
    assert not torch.equal(runs[0].stored.B, runs[1].stored.B)


@pytest.mark.parametrize("layout", ["linear", "embedding"])
def test_the_default_start_is_the_same_whatever_the_global_seed_and_leaves_it_alone(layout):
    """As two ranks with other seeds have it."""
    runs = [random_run("in_place", layout).train(2) for _ in range(2)]
    for seed, run in enumerate(runs):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        run.optimizer.restart()
        assert torch.equal(torch.get_rng_state(), before)
    for mine, other in zip(runs[0].factors, runs[1].factors, strict=True):
        assert torch.equal(mine, other)


def test_each_default_start_has_numbers_of_its_own():
    """By the seed, the step, the restarts since that step and the layer: nothing else."""
    starts = []
    for seed in (0, 1):
        layers = [HandmadeLayer() for _ in range(2)]
        triples = [layer.triple(name) for layer, name in zip(layers, "qk", strict=True)]
        optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1, rounding_seed=seed)
        for _ in range(2):
            for _ in range(2):
                optimizer.restart()
                starts += [layer.B.detach().clone() for layer in layers]
            random_steps(optimizer)
    assert len(starts) == 16
    assert not any(torch.equal(starts[i], starts[j]) for i in range(16) for j in range(i))
    numbers = torch.stack(starts).flatten() * 7**0.5  # uniform in +- 1, of a standard deviation of 1 / sqrt(3)
    assert float(numbers.abs().max()) <= 1
    assert abs(float(numbers.mean())) < 4 * (3 * numbers.numel()) ** -0.5
    assert abs(float(numbers.square().mean()) - 1 / 3) < 4 * (4 / 45 / numbers.numel()) ** 0.5


@pytest.mark.parametrize("rule", RULES)
def test_a_start_of_ones_own(rule):
    seen = []

    def reinit(triple):
        seen.append(triple.name)
        nn.init.zeros_(triple.B)
        nn.init.ones_(triple.A)

    run = random_run(rule).train(1)
    before = run.effective_exactly()
    run.optimizer.restart(reinit)
    assert seen == ["q"]
    assert bool((run.stored.A == 1).all())
    assert close(run.effective_exactly(), before)
    run.asked = run.moved()
    run.train(1)
    assert close(run.displacement(), run.asked)


@pytest.mark.parametrize("rule", RULES)
def test_a_reinit_that_fails_leaves_everything_as_it_was(rule):
    def reinit(triple):
        triple.B.zero_()
        raise KeyError("no start for q")

    run = random_run(rule).train(1)
    refused(
        lambda: run.optimizer.restart(reinit),
        KeyError,
        "no start for q",
        kept=lambda: (run.tensors, run.scale, run.optimizer.state_dict()),
    )
    assert len(run.optimizer.state) == 2
    run.train(1)
    assert close(run.displacement(), run.moved())


def test_the_history_of_lbfgs_is_cleared_wherever_it_is_kept():
    stored, head = strategies.make("linear"), torch.zeros(3, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.LBFGS([head, stored.A, stored.B]), [stored.triple()])

    def closure():
        optimizer.zero_grad()
        loss = (stored.A @ stored.B - 1).square().sum() + (head - 1).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.state[head]["old_dirs"]
    optimizer.restart()
    assert len(optimizer.state) == 0


def test_any_number_of_restarts_has_an_exact_account():
    """Add the rank of the factors each time: the terms become as large as W, and then one matrix."""
    W, A, B = torch.randn(60, 60), torch.randn(60, 20, requires_grad=True), torch.randn(20, 60, requires_grad=True)
    W, W0 = W.double(), W.double()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=0.1)

    def start(triple):
        triple.A.normal_()
        triple.B.normal_()

    sizes = []
    for _ in range(20):
        optimizer.restart(start)
        sizes.append(optimizer.buffer_bytes)
        assert close(optimizer.displacement("triple0").product(), W - W0, 1e-12)
    assert max(sizes) <= (160 * 120 + 60 * 60) * 8
    with optimizer.base_weights():
        assert close(W, W0, 1e-12)


@pytest.mark.parametrize("start_step", [0, 4, 30])
@pytest.mark.parametrize("rule", RULES)
def test_a_reinit_that_leaves_a_product_is_accounted_for(rule, start_step):
    """Let the effective weight jump, as documented; W and its ledger still agree, twice in a run."""

    @torch.no_grad()
    def reinit(triple):
        generator = torch.Generator().manual_seed(5)
        for factor in (triple.A, triple.B):
            factor.copy_(torch.randn(factor.shape, generator=generator, dtype=factor.dtype))

    run = random_run(rule, start_step=start_step).train(6)
    for _ in range(2):
        run.asked += run.scaling * run.product()
        run.optimizer.restart(reinit)
        assert close(run.displacement(), run.asked)
        run.train(4)
        assert close(run.displacement(), run.asked)
        assert close(run.moved(), run.asked)
        change = deltaopt.export_adapter(run.optimizer)["q"].product()
        assert close(run.base() + change, run.effective_exactly(), 1e-11)


@pytest.mark.parametrize("rule", RULES)
def test_a_restart_that_changes_no_factor(rule):
    run = random_run(rule).train(1)
    run.optimizer.restart(lambda triple: None)
    run.train(2)
    assert close(run.displacement(), run.moved())


@pytest.mark.parametrize("action", ["restart", "resync"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("rule", RULES)
def test_refuses_a_factor_that_is_not_finite(rule, value, action):
    run = random_run(rule).train(1)
    with torch.no_grad():
        run.stored.B[1, 2] = value
    before = [t.clone() for t in (run.stored.W, run.stored.A.detach(), run.scale)]
    with pytest.raises(ValueError, match="a factor of q is NaN or infinite"):
        getattr(run.optimizer, action)()
    assert all(map(torch.equal, before, (run.stored.W, run.stored.A.detach(), run.scale)))


@pytest.mark.parametrize("action", ["restart", "resync"])
@pytest.mark.parametrize("rule", RULES)
def test_refuses_a_merged_branch(rule, action):
    layer = HandmadeLayer()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [layer.triple()], lr=0.1, weight_update=rule)
    layer.merged = True
    refused(
        getattr(optimizer, action),
        RuntimeError,
        "q: the branch is merged into W",
        kept=lambda: ([p.detach() for p in layer.parameters()], layer.scaling),
    )


def test_a_restart_ends_what_the_ledger_follows():
    run = noisy_run().train(2)
    assert internals.ledger_of(run.optimizer).end is not None
    run.optimizer.restart()
    assert internals.ledger_of(run.optimizer).end is None


def test_a_refused_restart_does_not_change_the_noise_of_the_next_one():
    """Nothing is changed by it, not even which noise the next write gets."""
    runs = [random_run("in_place", dtype=torch.bfloat16, zero=False) for _ in range(2)]

    def fail(triple):
        raise OSError("no start")

    refused(lambda: runs[0].optimizer.restart(fail), OSError, "no start", kept=lambda: runs[0].tensors)
    for run in runs:
        run.optimizer.restart(generator=torch.Generator().manual_seed(1))
    assert all(map(torch.equal, runs[0].tensors, runs[1].tensors))


def again(run):
    """Return the W of a restart after which W, A and B are put back, so that the next one differs in noise alone."""
    W, A, B = (tensor.clone() for tensor in run.tensors)
    run.optimizer.restart(generator=torch.Generator().manual_seed(1))
    landed = run.stored.W.clone()
    with torch.no_grad():
        for tensor, value in zip(run.tensors, (W, A, B), strict=True):
            tensor.copy_(value)
    return landed


def stochastic_run():
    return random_run("in_place", dtype=torch.bfloat16, zero=False, rounding="stochastic").train(2)


def test_each_restart_between_two_steps_has_noise_of_its_own():
    run = stochastic_run()
    landed = [again(run) for _ in range(3)]
    assert not any(torch.equal(landed[i], landed[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


WAYS = {"state_dict": lambda run: run.twin(), **COPIES}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("events", [["restart"], ["resync"], ["restart", "resync", "restart"]], ids="-".join)
def test_a_run_that_is_resumed_after_a_restart_does_not_repeat_its_noise(way, events):
    run = stochastic_run()
    first = again(copy.deepcopy(run))
    for event in events:
        again(run) if event == "restart" else run.optimizer.resync()
    run.optimizer.rebase()  # W was put back by hand
    other = WAYS[way](run)
    landed, expected = again(other), again(run)
    assert torch.equal(landed, expected)
    assert not torch.equal(landed, first)
    for r in (run, other):
        r.train(1)
    assert torch.equal(again(run), again(other))


def test_a_state_without_the_number_of_restarts_reads_as_none():
    run = stochastic_run()
    state = through_a_file(run.optimizer.state_dict())
    record = internals.record_of(state)
    assert record.pop("repeats") == 0
    twin = run.twin(state=state)
    assert torch.equal(again(twin), again(run))


@pytest.mark.parametrize("repeats", [-1, 1.5, "1", None])
def test_refuses_a_number_of_restarts_that_is_none(repeats):
    run = stochastic_run()
    state = through_a_file(run.optimizer.state_dict())
    internals.record_of(state)["repeats"] = repeats
    refused(
        lambda: run.optimizer.load_state_dict(state), ValueError, "repeats (must|is an int)", kept=lambda: run.tensors
    )
