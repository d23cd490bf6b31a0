"""resync(state): W follows factors of an earlier moment, whatever has happened since."""

import pytest
import torch
from hypothesis import given

from deltaopt import DeltaLoRAOptimizer, WeightMismatchError, without_ledger
from tests.support import strategies
from tests.support.compare import close, refused, through_a_file
from tests.support.histories import after, histories, random_run
from tests.support.interruption import interrupt
from tests.support.runs import LayerRun, noisy_run


def kept(run: LayerRun) -> tuple[dict, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The state of this moment, the factors, the effective weight, and what W has moved by."""
    state = through_a_file(run.optimizer.state_dict())
    return state, [t.detach().clone() for t in run.factors], run.effective_exactly(), run.moved()


@torch.no_grad()
def put_back(run: LayerRun, factors: list[torch.Tensor]) -> None:
    for factor, value in zip(run.factors, factors, strict=True):
        factor.copy_(value)


@given(layout=strategies.layouts, before=histories(), since=histories())
def test_W_is_where_it_was_whatever_has_happened_since(layout, before, since):
    """Other ratios, restarts, steps that do not move W; from before the first move too."""
    run = after(random_run("in_place", layout, start_step=1), before[1])
    state, factors, effective, moved = kept(run)
    after(run, since[1])
    put_back(run, factors)
    run.optimizer.resync(state)
    assert close(run.effective_exactly(), effective, 1e-11)
    assert close(run.displacement(), moved, 1e-11)
    run.asked = moved
    after(run, ["ratio", "step", "outside", "step", "restart", "step"])
    assert close(run.displacement(), run.asked, 1e-10)
    assert close(run.displacement(), run.moved(), 1e-10)


def test_of_the_plain_resync_the_same_would_be_wrong():
    """A ratio that has changed since, and no way to tell what it was."""
    run = noisy_run().train(2)
    state, factors, effective, _ = kept(run)
    run.train(1)
    run.happen("ratio")
    run.train(2)
    put_back(run, factors)
    run.optimizer.resync()
    assert not close(run.effective_exactly(), effective, 1e-4)
    run.optimizer.resync(state)
    assert close(run.effective_exactly(), effective, 1e-11)


@given(before=histories(), since=histories())
def test_a_folded_branch_is_scaled_as_it_was(before, since):
    run = after(random_run("folded", start_step=2), before[1])
    state, factors, effective, _ = kept(run)
    after(run, since[1])
    put_back(run, factors)
    run.optimizer.resync(state)
    assert close(run.effective_exactly(), effective, 1e-10)


def test_of_a_folded_branch_whose_ratio_is_the_same_w_stays():
    run = random_run("folded").train(2)
    state, factors, effective, _ = kept(run)
    run.train(2)
    put_back(run, factors)
    W = run.stored.W.clone()
    run.optimizer.resync(state)
    assert torch.equal(run.stored.W, W)
    assert close(run.effective_exactly(), effective, 1e-11)


def test_in_16_bits_with_compensated_rounding_as_in_float32():
    run = noisy_run(dtype=torch.bfloat16, lr=1e-3, rounding="compensated").train(2)
    state, factors, *_ = kept(run)
    run.train(3)
    put_back(run, factors)
    run.optimizer.resync(state)
    assert close(run.stored.W.double(), run.base() + run.displacement(), torch.finfo(torch.bfloat16).eps)
    assert float(run.optimizer.residual(run.name).abs().max()) <= 2.0**-8 * float(run.stored.W.abs().max())


def test_in_16_bits_it_warns_of_one_rounding_or_takes_the_kept_base():
    for options in ({}, {"keep_base": "cpu"}):
        run = noisy_run(dtype=torch.bfloat16, lr=1e-3, **options).train(2)
        state, factors, *_ = kept(run)
        run.train(2)
        put_back(run, factors)
        if options:
            run.optimizer.resync(state)
            dense = run.W0.double() + run.displacement()
            assert close(run.stored.W.double(), dense, torch.finfo(torch.bfloat16).eps)
        else:
            with pytest.warns(RuntimeWarning, match=r"16-bit weights of 1 layer \(q\) in one rounded step"):
                run.optimizer.resync(state)


def test_states_that_do_not_belong_here_are_refused_with_nothing_changed():
    run = noisy_run().train(2)
    state, factors, *_ = kept(run)
    other = noisy_run(seed=5).train(2)
    run.train(2)

    def changes() -> list[torch.Tensor]:
        return run.tensors

    for given_state, match in (
        (state, r"A and B|A has other contents"),
        (other.optimizer.state_dict(), "counts from another base than this optimizer has moved W from"),
    ):
        refused(lambda s=given_state: run.optimizer.resync(s), WeightMismatchError, match, changes)
    refused(lambda: run.optimizer.resync(without_ledger(state)), ValueError, "the state has no ledger for", changes)
    refused(
        lambda: run.optimizer.resync({"state": {}, "param_groups": []}), ValueError, "not saved by a Delta", changes
    )
    put_back(run, factors)
    run.optimizer.resync(state)


def test_of_a_W_that_has_got_another_base_since_it_is_refused_from_before_the_first_move_too():
    run = noisy_run()
    state, factors, *_ = kept(run)
    run.train(2)
    run.optimizer.rebase()
    put_back(run, factors)
    refused(lambda: run.optimizer.resync(state), WeightMismatchError, "from another base", lambda: run.tensors)
    run.train(1)
    put_back(run, factors)
    refused(lambda: run.optimizer.resync(state), WeightMismatchError, "from another base", lambda: run.tensors)


@pytest.mark.parametrize("keep_base", [None, "cpu"])
def test_the_same_state_may_be_loaded_after_it(keep_base):
    """For its moments and its step count. W is left alone, without a word."""
    run = noisy_run(keep_base=keep_base).train(2)
    state, factors, *_ = kept(run)
    run.train(2)
    put_back(run, factors)
    run.optimizer.resync(state)
    moved = run.moved()
    run.optimizer.load_state_dict(state)
    assert torch.equal(run.moved(), moved)
    assert run.optimizer.step_count == 2


def test_interrupted_at_any_line_it_is_done_or_not():
    """W and what is known of it agree, and a second call leads to the same place. A sample of the lines."""

    def moved_on() -> tuple[LayerRun, dict, torch.Tensor]:
        run = noisy_run().train(1)
        state, factors, effective, _ = kept(run)
        run.happen("ratio")
        run.train(2)
        put_back(run, factors)
        return run, state, effective

    line = 3
    while True:
        run, state, effective = moved_on()
        if not interrupt(lambda r=run, s=state: r.optimizer.resync(s), DeltaLoRAOptimizer.resync, line):
            break
        assert close(run.displacement(), run.moved(), 1e-11), f"line {line}"
        run.optimizer.resync(state)
        assert close(run.effective_exactly(), effective, 1e-11), f"line {line}"
        line += 17
    assert line > 200
