"""The ledger: what W was asked to move by, whatever happened to A, B, update_ratio and the step."""

import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deltaopt
from deltaopt import DeltaLoRAOptimizer, update
from deltaopt.ledger import SMALL_RANK, Ledger
from tests.support import reference, strategies

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD
S = 0.5

# What can happen to a run between two steps.
EVENTS = ("step", "step", "step", "ratio", "off", "outside", "skipped", "restart")


class Run:
    """One layer in training, with a dense float64 account of every move of W beside it."""

    def __init__(self, layout="linear", seed=0, dtype=torch.float64, zero_A=False, **options):
        self.stored = strategies.make(layout, seed, dtype=dtype, zero_A=zero_A)
        self.options = {"lr": 0.02, "update_ratio": 1.5} | options
        self.optimizer = DeltaLoRAOptimizer(AdamW, [self.stored.triple(S, name="q")], **self.options)
        self.W0 = self.stored.W.clone()
        self.start = self.product()
        self.asked = torch.zeros_like(self.stored.matrices()[0], dtype=torch.float64)
        self.t = 0

    def product(self):
        _, A, B = self.stored.matrices()
        return reference.product(A.double(), B.double())

    def step(self, grad=None):
        generator = torch.Generator().manual_seed(self.t)
        for factor in (self.stored.A, self.stored.B):
            noise = torch.randn(factor.shape, generator=generator, dtype=torch.float64).to(factor.dtype)
            factor.grad = noise if grad is None else torch.full_like(factor, grad)
        before = self.product()
        ratio = self.optimizer.groups[0].ratio_at(self.optimizer.step_count)
        self.optimizer.step()
        self.t += 1
        change = self.product() - before
        if ratio > 0 and bool(change.isfinite().all()):
            self.asked += ratio * S * change

    def happen(self, event):
        group = self.optimizer.groups[0]
        with torch.no_grad():
            if event == "step":
                self.step()
            elif event == "ratio":
                group.update_ratio = group.update_ratio * 0.75 + 0.5
            elif event == "off":
                group.update_ratio, ratio = 0.0, group.update_ratio
                self.step()
                group.update_ratio = ratio
            elif event == "outside":
                self.stored.A.data.mul_(1.25)
                self.stored.B.data.add_(0.125)
            elif event == "restart":
                self.asked += S * self.product()
                self.optimizer.restart(generator=torch.Generator().manual_seed(self.t))
            else:
                kept = self.stored.A.clone(), self.stored.B.clone()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "a LoRA factor became NaN")
                    self.step(grad=float("nan"))
                self.stored.A.copy_(kept[0])
                self.stored.B.copy_(kept[1])
                for state in self.optimizer.state.values():
                    state["exp_avg"].zero_()
                    state["exp_avg_sq"].zero_()

    def displacement(self):
        return self.optimizer.displacement("q").product().double()

    def size(self):
        """Of the terms, which may be much larger than their sum: what rounding in one dtype is relative to."""
        terms = self.optimizer.accounts()[0].ledger.displacement()
        return max(1.0, sum(abs(t.coef) * float((t.A.double() @ t.B.double()).norm()) for t in terms))

    def moved(self):
        return (self.stored.matrix(self.stored.W.double()) - self.stored.matrix(self.W0.double())).contiguous()


def close(a, b, tolerance=1e-12):
    return float((a - b).norm()) <= tolerance * max(1.0, float(b.norm()))


@given(
    layout=strategies.layouts,
    seed=strategies.seeds,
    start_step=strategies.start_steps,
    zero_A=st.booleans(),
    events=st.lists(st.sampled_from(EVENTS), min_size=1, max_size=14),
)
def test_the_displacement_is_what_W_was_asked_to_move_by_and_did(layout, seed, start_step, zero_A, events):
    run = Run(layout, seed, start_step=start_step, zero_A=zero_A)
    for event in events:
        run.happen(event)
        assert close(run.displacement(), run.asked)
        assert close(run.moved(), run.asked)


@given(seed=strategies.seeds, events=st.lists(st.sampled_from(EVENTS), min_size=1, max_size=10))
def test_the_path_of_a_gpu_keeps_the_same_ledger(seed, events):
    """Where the host is told later whether a step was applied, and from where it began."""
    run = Run("linear", seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "_known_to_host", lambda device: False)
        patch.setattr(update._Entry, "arrived", lambda self: False)
        for event in events:
            run.happen(event)
        assert close(run.displacement(), run.asked)
        assert close(run.moved(), run.asked)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("changed", ["A", "B"])
def test_an_outside_change_of_one_factor_of_one_of_several_layers(monkeypatch, changed, gpu):
    """Layers of one shape share buffers; what each was is told apart."""
    monkeypatch.setattr(update, "_known_to_host", lambda device: not gpu)
    stored = [strategies.make("linear", seed) for seed in range(3)]
    W0 = [s.W.clone() for s in stored]
    optimizer = DeltaLoRAOptimizer(SGD, [s.triple(S, name=f"{i}") for i, s in enumerate(stored)], lr=0.1)
    factors = [f for s in stored for f in (s.A, s.B)]
    noisy_step(optimizer, *factors)
    getattr(stored[1], changed).data.mul_(1.5)
    for _ in range(2):
        noisy_step(optimizer, *factors)
    for i, (s, W) in enumerate(zip(stored, W0, strict=True)):
        assert close(optimizer.displacement(f"{i}").product(), s.W - W)
    assert [len(ledger.terms) for _, ledger in optimizer.accounts()] == [1, 3, 1]


@pytest.mark.parametrize("late", [False, True])
def test_entries_do_not_pile_up_where_the_host_is_told_later(monkeypatch, late):
    """At most those of the steps that the device has not told of yet."""
    run = Run()
    monkeypatch.setattr(update, "_known_to_host", lambda device: False)
    told = iter([False, False, True, True] * 20)
    monkeypatch.setattr(update._Entry, "arrived", lambda self: next(told) if late else True)
    for _ in range(12):
        run.step()
        assert len(run.optimizer._delta._entries) <= (3 if late else 0)


@pytest.mark.parametrize(("zero_A", "start_step", "rank"), [(True, 0, 3), (False, 0, 6), (True, 2, 6)])
def test_with_a_constant_ratio_it_takes_two_terms_at_most(zero_A, start_step, rank):
    run = Run(zero_A=zero_A, start_step=start_step)
    for _ in range(40):
        run.step()
    assert run.optimizer.displacement("q").rank == rank
    assert len(run.optimizer.accounts()[0].ledger.terms) == rank // 3 - 1
    assert close(run.displacement(), run.asked)


def test_a_changed_ratio_adds_one_term():
    run = Run(zero_A=True, update_ratio=lambda step: 1.0 + step // 10)
    for _ in range(30):
        run.step()
    assert len(run.optimizer.accounts()[0].ledger.terms) == 2
    assert close(run.displacement(), run.asked)


def test_before_the_first_move_it_is_nothing():
    run = Run(start_step=5)
    run.step()
    found = run.optimizer.displacement("q")
    assert (found.A.shape, found.B.shape, found.rank) == ((5, 0), (0, 7), 0)
    assert torch.equal(found.product(), torch.zeros(5, 7, dtype=torch.float64))


def test_a_name_that_is_not_there():
    with pytest.raises(KeyError, match="no triple 'k'; there are q"):
        Run().optimizer.displacement("k")


def wide(update_ratio, rank=8, width=300, **options):
    A = torch.zeros(width, rank, dtype=torch.float64, requires_grad=True)
    B = torch.randn(rank, width, dtype=torch.float64, requires_grad=True)
    W = torch.randn(width, width, dtype=torch.float64)
    return DeltaLoRAOptimizer(AdamW, [(W, A, B)], lr=0.01, update_ratio=update_ratio, **options), W, A, B


def noisy_step(optimizer, *factors):
    for factor in factors:
        factor.grad = torch.randn_like(factor)
    optimizer.step()


def lost(**options):
    """(optimizer, W, W before) of a run whose displacement is not known any more."""
    optimizer, W, A, B = wide(lambda step: 1.0 + step / 50, **options)
    W0 = W.clone()

    def train():
        for _ in range(24):
            noisy_step(optimizer, A, B)

    with pytest.warns(RuntimeWarning, match="not known as low-rank terms"):
        train()
    return optimizer, W, W0


def test_a_ratio_that_changes_every_step_is_given_up_with_one_warning():
    """Each change adds a rank r; W goes on exactly, and what needs the displacement says why it can not be had."""
    optimizer, W, A, B = wide(lambda step: 1.0 + 0.01 * step)
    dense = W.clone()

    def train():
        for t in range(24):
            before = (A @ B).detach()
            noisy_step(optimizer, A, B)
            dense.add_((A @ B).detach() - before, alpha=1.0 + 0.01 * t)

    with pytest.warns(RuntimeWarning, match=r"passed 134.*300 x 300.*keep_base") as caught:
        train()
    assert [warning.filename for warning in caught] == [__file__]
    assert close(W, dense)
    with pytest.raises(RuntimeError, match="triple0: the displacement is not known as low-rank terms any more"):
        optimizer.displacement("triple0")
    with pytest.raises(RuntimeError, match="triple0: the displacement is not known as low-rank terms any more"):
        deltaopt.export_adapter(optimizer)


def test_terms_that_add_up_to_a_small_rank_are_merged():
    """The same factors over and over: the summed rank passes the bound, the rank of the sum does not."""
    ratio = {"now": 1.0}
    optimizer, W, A, B = wide(lambda step: ratio["now"])
    W0 = W.clone()
    noisy_step(optimizer, A, B)
    A.grad = B.grad = None
    with torch.no_grad():
        kept = A.clone()
        for i in range(40):
            ratio["now"] = 1.0 + i % 7
            A.copy_(kept * (1 + i % 3))
            optimizer.step()
    found = optimizer.displacement("triple0")
    assert found.rank <= 150 + 8
    assert close(found.product(), W - W0, 1e-10)


def test_the_rank_after_merging_counts():
    """Eighteen products of rank 8, and one of them again: 144, between the limit of 134 and the bound of 150."""
    ledger, generator = Ledger(), torch.Generator().manual_seed(0)
    factors = [(torch.randn(300, 8, generator=generator), torch.randn(8, 300, generator=generator)) for _ in range(18)]
    for i in range(18):
        ledger.extend(1.0 + i, factors[i], None)
        assert ledger.lost is None
    ledger.extend(20.0, factors[3], None)
    assert "passed 134" in ledger.lost
    assert ledger.terms == []


def test_a_small_weight_may_have_all_its_rank():
    run = Run(update_ratio=lambda step: 1.0 + step % 5)
    for _ in range(100):
        run.step()
    assert close(run.displacement(), run.asked, 1e-10)
    assert run.optimizer.displacement("q").rank <= SMALL_RANK + 6


def test_factors_of_another_rank_begin_anew():
    run = Run()
    run.step()
    stored, optimizer = run.stored, run.optimizer
    stored.A.data, stored.B.data = stored.A.data[:, :2].clone(), stored.B.data[:2].clone()
    optimizer.state.clear()
    run.step()
    run.step()
    assert close(run.displacement(), run.asked)
    assert close(run.moved(), run.asked)


def test_a_copy_has_a_ledger_of_its_own():
    run = Run()
    run.step()
    twin = copy.deepcopy(run)
    asked = run.asked.clone()
    twin.step()
    twin.step()
    assert close(run.displacement(), asked)
    assert close(twin.displacement(), twin.asked)
    run.step()
    assert close(run.displacement(), run.asked)


def test_a_model_that_changes_its_dtype_takes_its_ledger_along():
    """As `model.double()` does: the Parameter objects stay, their dtype does not."""
    layer = torch.nn.Linear(7, 5, bias=False).requires_grad_(False)
    layer.A, layer.B = torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(3, 7))
    triple = deltaopt.LoRATriple((layer, "weight"), (layer, "A"), (layer, "B"), name="q")
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, update_ratio=1.0)
    W0 = layer.weight.detach().double()
    noisy_step(optimizer, layer.A, layer.B)
    layer.double()
    noisy_step(optimizer, layer.A, layer.B)
    found = optimizer.displacement("q").product()
    assert found.dtype == torch.float64
    assert close(found, layer.weight - W0, 1e-5)


def test_a_model_that_is_cast_and_cast_back_between_two_steps():
    """And is asked for its displacement, rebuilt, restarted and resynced meanwhile."""
    layer = torch.nn.Linear(7, 5, bias=False).requires_grad_(False)
    layer.A, layer.B = torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(3, 7))
    triple = deltaopt.LoRATriple((layer, "weight"), (layer, "A"), (layer, "B"), name="q")
    optimizer = DeltaLoRAOptimizer(SGD, [triple], lr=0.1, update_ratio=1.0)
    W0 = layer.weight.detach().double()
    actions = [
        lambda: optimizer.displacement("q"),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: deltaopt.export_adapter(optimizer),
        lambda: optimizer.accounts(),
        optimizer.resync,
        optimizer.restart,
    ]
    for action in actions:
        noisy_step(optimizer, layer.A, layer.B)
        layer.double()
        action()
        layer.float()
        noisy_step(optimizer, layer.A, layer.B)
        noisy_step(optimizer, layer.A, layer.B)
        found = optimizer.displacement("q").product()
        assert found.dtype == torch.float32
        assert close(found, layer.weight.double() - W0, 1e-5)


def test_the_bytes_of_a_ledger_are_counted():
    run = Run(dtype=torch.float32)
    buffers = 3 * 3 * (5 + 7) * 4
    run.step()
    assert run.optimizer.buffer_bytes == buffers + 3 * (5 + 7) * 4
    assert Ledger().nbytes == 0
