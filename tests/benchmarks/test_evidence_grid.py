"""Which runs a grid still needs follows from its result files; several processes make them; none is counted twice."""

import json
import multiprocessing
import os
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.evidence import __main__ as program
from benchmarks.evidence import workers
from benchmarks.evidence.grid import TUNING_SEED, Experiment, Grid
from benchmarks.evidence.grids import GRIDS
from benchmarks.evidence.places import Places
from benchmarks.evidence.result import Result, read_result, read_results, write_result
from benchmarks.evidence.setting import Setting
from tests.benchmarks.made_results import complete

SHARED = {"steps": 20, "batch_size": 4, "max_length": 8}
SETTING = Setting("sst2", "tiny", "lora", "lora", 1e-3, 0, "test", **SHARED)


def experiment(rows=("lora", "delta", "lora-lr3"), lrs=(1e-3, 3e-3, 1e-2), **changes):
    given = {"seeds": 2, "tuning_seeds": 1, "extensions": 2} | changes
    return Experiment("sst2", "tiny", rows, SHARED, {"adapter": lrs, "dense": lrs, "sgd": lrs}, **given)


def made(setting, accuracy=0.5):
    return Result(setting, dict.fromkeys(("accuracy", "matthews", "pearson"), accuracy) | {"loss": 1.0})


def filled(grid, accuracy):
    """Make every run that a grid asks for, until it asks for none. Return the results in the order of being made."""
    results = []
    while needed := grid.needed(results):
        results += [made(setting, accuracy(setting)) for setting in needed]
    return results


def best_at(lr):
    """Return an accuracy that is highest at a learning rate."""
    return lambda setting: 0.9 - abs(setting.lr - lr)


def test_learning_rates_are_tuned_before_the_seeds_are_run():
    results = filled(Grid("g", [experiment(rows=("lora",))]), best_at(3e-3))
    assert [(r.setting.split, r.setting.lr, r.setting.seed) for r in results] == [
        ("tuning", 1e-3, TUNING_SEED),
        ("tuning", 3e-3, TUNING_SEED),
        ("tuning", 1e-2, TUNING_SEED),
        ("test", 3e-3, 0),
        ("test", 3e-3, 1),
    ]


@pytest.mark.parametrize(
    ("best", "tried"), [(1.0, [1e-3, 3e-3, 1e-2, 0.033, 0.11]), (1e-9, [1.1e-4, 3.3e-4, 1e-3, 3e-3, 1e-2])]
)
def test_a_grid_is_extended_where_its_best_value_is_at_the_edge(best, tried):
    asked = experiment(rows=("lora",), extensions=2)
    results = filled(Grid("g", [asked]), best_at(best))
    lrs = sorted({r.setting.lr for r in results if r.setting.split == "tuning"})
    assert lrs == pytest.approx(tried, rel=0.02)
    assert {r.setting.lr for r in results if r.setting.split == "test"} == {lrs[-1] if best > 1e-2 else lrs[0]}


def test_a_row_may_take_another_rows_learning_rate():
    results = filled(Grid("g", [experiment(rows=("lora", "lora-lr3"))]), best_at(3e-3))
    lrs = {r.setting.lr for r in results if r.setting.row == "lora-lr3"}
    assert lrs == {9e-3}
    assert len([r for r in results if r.setting.row == "lora-lr3"]) == 2


def test_without_tuning_seeds_the_first_learning_rate_is_taken():
    results = filled(Grid("g", [experiment(rows=("lora",), tuning_seeds=0)]), best_at(1.0))
    assert [(r.setting.split, r.setting.lr) for r in results] == [("test", 1e-3)] * 2


def test_results_of_other_settings_do_not_count():
    asked = experiment(rows=("lora",))
    other = [made(replace(setting, steps=21)) for setting in asked.needed([])]
    assert list(asked.needed(other)) == list(asked.needed([]))


@pytest.mark.parametrize("name", GRIDS)
def test_the_grids_ask_for_each_run_once(name):
    results = filled(GRIDS[name], lambda setting: 0.5)
    paths = [r.setting.path for r in results]
    assert len(set(paths)) == len(paths)
    assert {len(e.cell(row, results)) for e in GRIDS[name].experiments for row in e.of_rows()} <= {1, 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": 1.0}, "start=1 of 20 steps is step K = 20, so that W would never move"),
        ({"start": 0.99}, "K = 20"),
        ({"start": -0.1}, "a share of the run from 0"),
        ({"steps": 0}, "at least 1 step"),
        ({"split": "dev"}, "split is one of tuning, test, got 'dev'"),
        ({"precision": "half"}, "precision is one of float32, bfloat16"),
    ],
)
def test_settings_that_make_no_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTING, **changes)


def test_unknown_rows_are_refused():
    with pytest.raises(ValueError, match="unknown rows lorra; known are full"):
        experiment(rows=("lorra",))


class TestFiles:
    def test_come_back(self, tmp_path):
        result = Result(SETTING, {"accuracy": 1 / 3}, [2.0], forgetting=(1.0, 2.0))
        path = write_result(tmp_path, result)
        assert path == tmp_path / SETTING.path
        assert read_results(tmp_path) == [replace(result, metrics={"accuracy": 0.3333333})]

    def test_of_older_runs_are_read(self, tmp_path):
        path = write_result(tmp_path, made(SETTING))
        path.write_text(json.dumps(json.loads(path.read_text()) | {"evaluations": [[10, {"accuracy": 0.5}]]}))
        assert read_result(path) == made(SETTING)

    def test_cut_off_do_not_count(self, tmp_path):
        path = write_result(tmp_path, made(SETTING))
        path.write_text(path.read_text()[:-10])
        assert read_results(tmp_path) == []

    def test_of_something_else_are_named(self, tmp_path):
        path = write_result(tmp_path, made(SETTING))
        path.write_text(json.dumps({"setting": SETTING.as_json()}))
        with pytest.raises(ValueError, match=r"is not the result of a run of this version: .*no .*metrics"):
            read_result(path)

    def test_under_another_name_are_not_counted_twice(self, tmp_path):
        path = write_result(tmp_path, made(SETTING))
        path.with_name("copy.json").write_text(path.read_text())
        with pytest.raises(ValueError, match=r"copy\.json holds another run, sst2/lora/test-lr0.001-seed0"):
            read_results(tmp_path)


def make(setting, job):
    """Stand in for a run: fail, be cut short by the deadline, or write a file."""
    if setting.lr == 1e-2:
        raise ValueError("no such run")
    if time.monotonic() > job.deadline:
        return None
    result = made(setting, best_at(3e-3)(setting))
    write_result(job.folder, result)
    return result


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "make", make)
    return workers.Job(tmp_path, Places(None, None), "cpu", time.monotonic() + 600, "abc")


@pytest.mark.extra
class TestWorkers:
    def test_make_everything_and_continue(self, job):
        grid = Grid("g", [experiment(rows=("lora",), lrs=(1e-3, 3e-3, 9e-3))])
        first = workers.work(grid, job, 2)
        assert isinstance(next(first), Result)
        first.close()
        begun = {r.setting for r in read_results(job.folder)}
        rest = [done.setting for done in workers.work(grid, job, 2)]
        assert not begun & set(rest)
        assert len(rest) == 5 - len(begun)
        assert grid.needed(read_results(job.folder)) == []
        assert list(workers.work(grid, job, 2)) == []

    def test_make_a_run_again_whose_file_was_cut_off(self, job):
        grid = Grid("g", [experiment(rows=("lora",), lrs=(3e-3,), tuning_seeds=0)])
        whole = [done.setting for done in workers.work(grid, job, 2)]
        path = job.folder / whole[0].path
        text = path.read_text()
        path.write_text(text[: len(text) // 2])
        assert [done.setting for done in workers.work(grid, job, 2)] == whole[:1]
        assert path.read_text() == text
        assert {run.setting for run in read_results(job.folder)} == set(whole)

    def test_name_a_run_that_failed_and_do_the_others(self, job):
        grid = Grid("g", [experiment(rows=("lora", "delta"))])
        done = list(workers.work(grid, job, 2))
        failed = [d for d in done if not isinstance(d, Result)]
        assert [(s.row, s.lr, str(e)) for s, e in sorted(failed, key=lambda d: d[0].row)] == [
            ("delta", 1e-2, "no such run"),
            ("lora", 1e-2, "no such run"),
        ]
        assert len(done) == 6
        assert not multiprocessing.active_children()

    def test_stop_at_the_deadline(self, job):
        late = replace(job, deadline=time.monotonic())
        assert list(workers.work(Grid("g", [experiment()]), late, 2)) == []


def test_a_folder_serves_one_call_at_a_time(tmp_path):
    with workers.locked(tmp_path), pytest.raises(workers.InUseError, match="another call is making runs in"):
        workers.locked(tmp_path).__enter__()


class TestCommandLine:
    def test_says_what_is_left(self, tmp_path, capsys):
        assert program.main(["status", "small", "--out", str(tmp_path)]) == 0
        assert "0 result files; " in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["run", "small", "--data", "nowhere"], "--data nowhere is no folder"),
            (["again", "nothing.json"], "nothing.json: no such file, or one that was cut off"),
        ],
    )
    def test_refuses_what_is_not_there(self, tmp_path, monkeypatch, capsys, arguments, message):
        monkeypatch.chdir(tmp_path)
        assert program.main(arguments) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({}, "the same numbers"),
            ({"commit": "other", "seconds": 7.0}, "the same numbers"),
            ({"data": "other", "layers": [{}]}, "DIFFERENT in data, layers"),
            ({"forgetting": (1.0, 2.0)}, "DIFFERENT in forgetting"),
            ({"metrics": {"accuracy": 0.25}}, "DIFFERENT in metrics ({'accuracy': 0.5, "),
        ],
    )
    def test_makes_a_run_again_and_compares_what_does_not_depend_on_the_clock(
        self, tmp_path, monkeypatch, capsys, changes, told
    ):
        held = made(SETTING)
        now = replace(held, **changes)
        held = replace(held, metrics=held.metrics | {"BLEU": 3.0})  # added later, by `score`
        monkeypatch.setattr(program, "make", lambda setting, job: write_result(job.folder, now))
        assert program.main(["again", str(write_result(tmp_path, held))]) == told.startswith("DIFFERENT")
        assert told in capsys.readouterr().out

    def test_writes_the_docstrings_as_data(self, tmp_path, capsys):
        assert program.main(["docstrings", str(tmp_path)]) == 0
        written = [Path(line.removeprefix("Written: ")) for line in capsys.readouterr().out.splitlines()]
        assert written == [tmp_path / "docstrings" / f"{split}.jsonl.gz" for split in ("train", "test")]
        assert all(path.is_file() for path in written)

    def test_refuses_a_folder_in_use(self, tmp_path, capsys):
        with workers.locked(tmp_path):
            assert program.main(["run", "small", "--out", str(tmp_path)]) == 2
        assert "another call is making runs" in capsys.readouterr().err


def killed(setting, job):
    """Stand in for a run that the system ends."""
    if setting.lr == 1e-3:
        os._exit(9)
    return make(setting, job)


@pytest.mark.extra
def test_a_process_that_is_killed_fails_its_run_and_leaves_the_others(job, monkeypatch):
    monkeypatch.setattr(workers, "make", killed)
    done = list(workers.work(Grid("g", [experiment(rows=("lora",), lrs=(1e-3, 3e-3, 9e-3))]), job, 1))
    assert isinstance(done[0][1], BrokenProcessPool)
    assert [d.setting.lr for d in done[1:]] == [3e-3, 9e-3]


def test_this_process_is_a_worker_for_a_while_only():
    def state():
        return (
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        )

    before = state()
    with workers.as_a_worker():
        assert state() == (1, True, False, False)
    assert state() == before


def test_the_tables_of_a_readers_grid_are_printed(tmp_path, capsys):
    for result in complete(GRIDS["small"]):
        write_result(tmp_path, result)
    assert program.main(["table", "small", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("## Equal heads")
    assert "| LoRA, alpha x (1 + lambda) |" in text
    assert "| equal heads | accuracy, % |" in text
