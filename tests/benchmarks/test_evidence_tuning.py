"""The learning rate of a row is the one with the best mean over the tuning seeds."""

from dataclasses import replace

import pytest

from benchmarks.evidence.result import Result
from benchmarks.evidence.setting import Setting
from benchmarks.evidence.tuning import best_lr

SETTING = Setting("t", "m", "lora", "lora", lr=1e-3, seed=0, split="tuning", steps=10, batch_size=2, max_length=8)


def run(lr, seed, value, metric="accuracy", diverged=False, **changes):
    metrics = {} if diverged else {metric: value}
    return Result(replace(SETTING, lr=lr, seed=seed, **changes), metrics, diverged=diverged, data="d")


def test_the_best_mean_wins_and_not_the_best_run():
    runs = [run(1, 0, 0.9), run(1, 1, 0.1), run(2, 0, 0.6), run(2, 1, 0.6), run(3, 0, 0.2), run(3, 1, 0.3)]
    assert best_lr(runs, "accuracy") == (2, False)
    assert best_lr(list(reversed(runs)), "accuracy") == (2, False)


@pytest.mark.parametrize("metric", ["loss", "TER"])
def test_smaller_losses_are_better(metric):
    assert best_lr([run(lr, 0, value, metric) for lr, value in ((1, 3.0), (2, 1.0), (3, 2.0))], metric) == (2, False)


@pytest.mark.parametrize(("values", "best"), [((3, 2, 1), 1), ((1, 2, 3), 3)])
def test_the_edge_of_the_grid_is_said(values, best):
    assert best_lr([run(lr + 1, 0, value) for lr, value in enumerate(values)], "accuracy") == (best, True)


def test_ties_go_to_the_smaller_learning_rate():
    assert best_lr([run(4, 0, 0.5), run(2, 0, 0.5), run(1, 0, 0.1)], "accuracy") == (2, False)


def test_a_learning_rate_with_a_diverged_run_loses():
    runs = [run(1, 0, 0.1), run(1, 1, 0.1), run(2, 0, 0.9), run(2, 1, 0, diverged=True)]
    assert best_lr(runs, "accuracy") == (1, True)
    runs = [run(1, 0, 9.0, "loss"), run(2, 0, 0, "loss", diverged=True), run(3, 0, float("nan"), "loss")]
    assert best_lr(runs, "loss") == (1, True)


def test_where_all_diverged_the_grid_is_extended_downwards():
    assert best_lr([run(lr, 0, 0, diverged=True) for lr in (3, 1, 2)], "accuracy") == (1, True)


def test_test_runs_are_not_looked_at():
    runs = [run(1, 0, 0.2), run(2, 0, 0.3), run(3, 0, 0.1)]
    assert best_lr([*runs, run(3, 0, 1.0, split="test")], "accuracy") == (2, False)
    with pytest.raises(ValueError, match="no tuning run"):
        best_lr([run(3, 0, 1.0, split="test")], "accuracy")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run(2, 0, 0.1, rank=4), "differ in more than"),
        (run(2, 0, 0.1, row="delta"), "differ in more than"),
        (replace(run(2, 0, 0.1), data="other"), "differ in more than"),
        (run(1, 0, 0.3), "two tuning runs of one seed"),
        (run(2, 1, 0.3), r"unequal tuning seeds \(lr 1: seeds \[0\], lr 2: seeds \[1\]\)"),
        (run(2, 0, 0.3, "loss"), "has no 'accuracy', only loss"),
    ],
    ids=["rank", "row", "data", "seed", "seeds", "metric"],
)
def test_what_cannot_be_compared_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        best_lr([run(1, 0, 0.2), other], "accuracy")
