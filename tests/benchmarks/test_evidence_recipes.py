"""The published recipes: what they plan, and that they run on tiny models of their architectures, in several calls."""

import itertools
import math
import os
import re
import subprocess
import time
import types

import pytest
import torch
import transformers
from huggingface_hub import constants

from benchmarks.evidence import __main__ as program
from benchmarks.evidence import packing, parts, training
from benchmarks.evidence.grids import GRIDS
from benchmarks.evidence.recipes import BART, GPT2, LRS_OF_SGD, PAPER, ROBERTA
from benchmarks.evidence.result import read_results
from benchmarks.evidence.rows import ROWS
from benchmarks.evidence.tasks import OpenTask
from tests.support import evidence_models as tiny
from tests.support.nightly import later

GLUE = ("mrpc", "rte", "stsb", "cola", "sst2", "qnli", "qqp", "mnli")


def planned(name, row, task=None):
    """Return the settings of a row's reported runs."""
    grid = GRIDS[name]
    (experiment,) = (each for each in grid.experiments if each.task == (task or grid.experiments[0].task))
    return experiment.cell(ROWS[row], [])


class TestPlans:
    """Numbers from the papers and scripts that the module names."""

    @pytest.mark.parametrize(
        ("task", "lr", "batch_size", "steps"),
        [
            ("mrpc", 4e-4, 16, 6_900),
            ("rte", 5e-4, 32, 6_240),
            ("stsb", 4e-4, 16, 14_400),
            ("cola", 4e-4, 32, 21_440),
            ("sst2", 5e-4, 16, 252_600),
            ("qnli", 4e-4, 32, 81_850),
            ("qqp", 5e-4, 16, 568_525),
            ("mnli", 5e-4, 16, 736_320),
        ],
    )
    def test_of_glue(self, task, lr, batch_size, steps):
        runs = planned("paper-glue", "delta", task)
        assert [run.seed for run in runs] == [0, 1, 2, 3, 4]
        run = runs[0]
        assert (run.model, run.lr, run.batch_size, run.steps) == ("FacebookAI/roberta-base", lr, batch_size, steps)
        assert (run.rank, run.alpha, run.update_ratio, run.weight_decay, run.max_length) == (8, 16, 0.5, 0.1, 256)
        assert run.start_step == run.warmup_steps == round(0.06 * steps)

    def test_of_the_other_alpha_differs_in_alpha_alone(self):
        (one, *_), (other, *_) = (planned(name, "lora") for name in ("paper-glue", "paper-glue-alpha8"))
        changed = {name for name, value in vars(one).items() if getattr(other, name) != value}
        assert (changed, other.alpha) == ({"alpha"}, 8)

    @pytest.mark.parametrize(("name", "steps"), [("paper-e2e", 26_290), ("paper-webnlg", 11_270)])
    def test_of_texts(self, name, steps):
        run = planned(name, "delta")[0]
        assert (run.model, run.lr, run.batch_size, run.steps) == ("openai-community/gpt2-medium", 2e-4, 8, steps)
        assert (run.rank, run.alpha, run.update_ratio, run.weight_decay, run.label_smoothing) == (4, 32, 2, 0.01, 0.1)
        assert (run.start_step, run.warmup_steps) == (500, 500)
        assert (run.beams, run.length_penalty, run.no_repeat, run.dropout) == (10, 0.8, 4, 0)
        assert planned(name, "lora-dropout")[0].dropout == 0.1

    def test_of_summaries(self):
        run = planned("paper-xsum", "delta")[0]
        assert (run.model, run.update_ratio, run.start_step) == ("facebook/bart-large", 0.5, 1_000)

    def test_have_the_rows_of_the_paper(self):
        papers = {"full", "full-frozen-embeddings", "full-qv", "lora", "adalora", "dylora", "delta"}
        for grid in PAPER:
            assert all(papers | {"alpha", "lora-lr3", "delta-dropout"} <= set(e.rows) for e in grid.experiments)

    def test_take_the_published_learning_rate_or_tune_around_it(self):
        assert {run.lr for run in planned("paper-e2e", "lora-lr3")} == {6e-4}
        tuned = GRIDS["paper-e2e-tuned"].experiments[0]
        assert tuned.tried(ROWS["delta"], []) == [6.7e-5, 2e-4, 6e-4]
        assert {s.split for s in tuned.needed([])} == {"tuning"}
        assert {"sgd", "lora-plus", "rslora", "restarts"} & set(GRIDS["paper-e2e"].experiments[0].rows) == set()
        assert {"sgd", "lora-plus", "rslora", "restarts"} <= set(tuned.rows)
        assert tuned.tried(ROWS["sgd"], []) == list(LRS_OF_SGD)


class TestParts:
    def test_are_chosen_by_task_and_row(self):
        grid = parts.only(GRIDS["paper-glue"], ["mrpc", "cola", "lora", "delta"])
        assert [(e.task, list(e.rows)) for e in grid.experiments] == [(t, ["lora", "delta"]) for t in ("mrpc", "cola")]
        assert [e.task for e in parts.only(GRIDS["paper-glue"], ["lora"]).experiments] == list(GLUE)
        assert parts.only(GRIDS["paper-e2e"], ["e2e"]).needed([]) == GRIDS["paper-e2e"].needed([])

    def test_bring_the_row_along_that_a_learning_rate_comes_from(self):
        (tuned,) = parts.only(GRIDS["paper-e2e-tuned"], ["lora-lr3"]).experiments
        (given,) = parts.only(GRIDS["paper-e2e"], ["lora-lr3"]).experiments
        assert (tuned.rows, given.rows) == (["lora", "lora-lr3"], ["lora-lr3"])

    def test_of_unknown_names_are_refused(self):
        with pytest.raises(ValueError, match=r"paper-e2e has no task and no row mrpc, lorra; it has e2e, lora, delta"):
            parts.only(GRIDS["paper-e2e"], ["mrpc", "delta", "lorra"])

    def test_may_have_another_precision(self):
        assert {s.precision for s in GRIDS["paper-e2e"].needed([])} == {"float32"}
        assert {s.precision for s in parts.in_precision(GRIDS["paper-e2e"], "bfloat16").needed([])} == {"bfloat16"}

    def test_run_dry_once_for_each_method_and_task(self):
        needed = parts.dry(GRIDS["paper-glue"], 3).needed([])
        assert {s.steps for s in needed} == {3}
        assert len({(s.task, s.method) for s in needed}) == len(needed) == 8 * 8


class TestPacking:
    """A device is asked for its free memory alone."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (78 * 2**30, 80 * 2**30))
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))

    @pytest.mark.usefixtures("gpu")
    @pytest.mark.parametrize(("name", "count"), [("paper-glue", 8), ("paper-e2e", 3), ("paper-xsum", 1), ("full", 16)])
    def test_fills_the_memory_or_the_cores(self, name, count):
        assert packing.workers_for(GRIDS[name], "cuda") == count

    @pytest.mark.usefixtures("gpu")
    def test_is_one_run_for_each_core_of_a_cpu(self):
        assert packing.workers_for(GRIDS["paper-xsum"], "cpu") == 16

    @pytest.mark.parametrize("text", ["-1", "many", "1.5"])
    def test_refuses_other_numbers(self, text, capsys):
        with pytest.raises(SystemExit):
            program.main(["run", "small", "--workers", text])
        assert f"invalid workers_option value: '{text}'" in capsys.readouterr().err


MODELS = {ROBERTA: "roberta", GPT2: "gpt2", BART: "bart"}
LABELS = {"mnli": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folders of tiny models under the names of the recipes, and of a few rows for every task."""
    models, data = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        longer = lambda: transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=256, **tiny.COMMON)  # noqa: E731
        patch.setitem(tiny.CONFIGS, "gpt2", longer)
        for name, kind in MODELS.items():
            tiny.write_model(models / name, kind)
    for task in GLUE:
        for split, count in (("train", 40), ("dev", 6)):
            tiny.write_rows(data / f"glue/{task}/{split}.jsonl.gz", tiny.pairs(count, LABELS.get(task, 2)))
    for folder in ("e2e", "webnlg2017", "xsum"):
        tiny.write_rows(data / folder / "train.jsonl.gz", tiny.targets(40))
        tiny.write_rows(data / folder / "test.jsonl.gz", tiny.prompts(3))
    return ["--models", str(models), "--data", str(data)]


@pytest.fixture
def _process(monkeypatch):
    """Leave the process as it was after runs within it, and let texts be short."""
    threads, filling = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(training, "OWN_TEXTS", 4)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filling


def run(folders, out, grid, *options):
    return program.main(["run", grid, "--workers", "0", "--out", str(out), *folders, *options])


def numbers(out):
    """Return all of the results that does not depend on the clock, by the names of the runs."""
    clocks = ("seconds", "step_seconds")
    return {
        result.setting.path: {name: value for name, value in vars(result).items() if name not in clocks}
        for result in read_results(out)
    }


@pytest.mark.extra
@pytest.mark.usefixtures("_process")
class TestDryRuns:
    @pytest.mark.parametrize(
        ("grid", "only", "count"),
        [
            ("paper-glue", ["mrpc"], 8),
            later("paper-glue", ["delta"], 8),
            ("paper-e2e", [], 8),
            ("paper-webnlg-tuned", ["delta"], 2),
            ("paper-xsum", ["delta", "adalora", "full"], 3),
        ],
    )
    def test_come_to_the_end(self, folders, tmp_path, capsys, grid, only, count):
        options = ["--dry-run", "3", *(["--only", *only] if only else [])]
        assert run(folders, tmp_path, grid, *options) == 0, capsys.readouterr().err
        assert capsys.readouterr().out.endswith("The grid is complete.\n")
        results = read_results(tmp_path)
        assert len(results) == count
        assert not any(result.diverged for result in results)
        assert all(result.metrics["loss"] > 0 for result in results)
        writing = grid != "paper-glue"
        assert all((result.texts is not None) == (writing and result.setting.split == "test") for result in results)
        assert not list((tmp_path / "unfinished").glob("*.pt"))

    @pytest.mark.parametrize(
        ("grid", "only"),
        [
            ("paper-glue", ["cola", "adalora", "dylora"]),
            later("paper-glue", ["cola", "delta", "full"]),
            ("paper-e2e", ["delta", "adalora"]),
            ("paper-xsum", ["delta"]),
        ],
    )
    def test_of_many_calls_give_the_numbers_of_one(self, folders, tmp_path, monkeypatch, capsys, grid, only):
        options = ["--dry-run", "3", "--only", *only]
        monkeypatch.setattr(training, "STRETCH", 1)
        assert run(folders, tmp_path / "one", grid, *options) == 0
        whole = numbers(tmp_path / "one")
        capsys.readouterr()
        # Every second time that the clock is read, the time is up.
        readings = itertools.cycle((-math.inf, math.inf))
        clock = types.SimpleNamespace(monotonic=lambda: next(readings), perf_counter=time.perf_counter)
        monkeypatch.setattr(training, "time", clock)
        checkpoints, unfinished = [], tmp_path / "many" / "unfinished"
        while not checkpoints or checkpoints[-1]:
            assert run(folders, tmp_path / "many", grid, *options, "--seconds", "3600") == 0
            checkpoints.append(len(list(unfinished.glob("*.pt"))))
        assert capsys.readouterr().out.endswith("The grid is complete.\n")
        assert set(checkpoints) == {0, 1}
        assert len(checkpoints) > 2 * len(whole)
        assert numbers(tmp_path / "many") == whole

    def test_in_two_processes_give_the_numbers_of_one(self, folders, tmp_path):
        options = ["--dry-run", "3", "--only", "rte", "lora", "delta"]
        assert run(folders, tmp_path / "one", "paper-glue", *options) == 0
        two = ["run", "paper-glue", "--workers", "2", "--out", str(tmp_path / "two"), *folders, *options]
        assert program.main(two) == 0
        assert len(numbers(tmp_path / "two")) == 2
        assert numbers(tmp_path / "two") == numbers(tmp_path / "one")

    @pytest.mark.parametrize("other", ["commit", "data"])
    def test_do_not_continue_what_was_begun_with_another(self, folders, tmp_path, monkeypatch, other):
        options = ["--dry-run", "3", "--only", "rte", "lora"]
        steps, step = [], training.Trainer.step
        monkeypatch.setattr(training.Trainer, "step", lambda *args: steps.append(args[1]) or step(*args))
        with monkeypatch.context() as patch:
            readings = iter((-math.inf, math.inf))
            patch.setattr(training, "STRETCH", 1)
            clock = types.SimpleNamespace(monotonic=lambda: next(readings), perf_counter=time.perf_counter)
            patch.setattr(training, "time", clock)
            assert run(folders, tmp_path / "out", "paper-glue", *options, "--seconds", "3600", "--commit", "abc") == 0
        assert steps == [0]
        changed = ["--commit", "def"]
        if other == "data":
            for split, count in (("train", 39), ("dev", 6)):
                tiny.write_rows(tmp_path / f"glue/rte/{split}.jsonl.gz", tiny.pairs(count))
            changed = ["--commit", "abc", "--data", str(tmp_path)]
        assert run(folders, tmp_path / "out", "paper-glue", *options, *changed) == 0
        assert steps == [0, 0, 1, 2]

    def test_do_not_train_again_for_texts_that_could_not_be_written(self, folders, tmp_path, monkeypatch, capsys):
        options = ["--dry-run", "3", "--only", "delta"]
        with monkeypatch.context() as patch:
            patch.setattr(OpenTask, "generate", lambda task, model: 1 / 0)
            assert run(folders, tmp_path, "paper-xsum", *options) == 1
        assert "xsum/delta/test-lr0.0005-seed0-" in (error := capsys.readouterr().err)
        assert "ZeroDivisionError" in error
        steps = []
        monkeypatch.setattr(training.Trainer, "step", lambda trainer, step, batch: steps.append(step))
        assert run(folders, tmp_path, "paper-xsum", *options) == 0
        assert steps == []
        assert len(read_results(tmp_path)[0].texts) == 3

    def test_name_the_model_that_is_not_there(self, folders, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        options = ["--models", str(tmp_path), "--dry-run", "3", "--only", "rte", "lora"]
        assert run(folders, tmp_path, "paper-glue", *options) == 1
        error = capsys.readouterr().err
        assert f"OSError: model '{ROBERTA}' is not in {tmp_path}" in error
        assert len(error.splitlines()) == 1


class TestRefusals:
    def test_of_unknown_grids(self, capsys):
        with pytest.raises(SystemExit) as ended:
            program.main(["run", "paper-glu"])
        assert ended.value.code == 2
        assert "invalid choice: 'paper-glu'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--dry-run", "0"], "at least 1 step, got steps=0"),
            (["--only", "lorra"], "paper-xsum has no task and no row lorra"),
        ],
    )
    def test_of_parts_that_there_are_none_of(self, tmp_path, capsys, options, message):
        assert program.main(["status", "paper-xsum", "--out", str(tmp_path), *options]) == 2
        assert message in capsys.readouterr().err


class TestMake:
    """What `make evidence-small` and `make evidence-cuda` run; of the latter the folders alone need to be named."""

    def command(self, *given, target="evidence-cuda"):
        alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        command = ["make", "-n", target, *given]
        return subprocess.run(command, env=alone, capture_output=True, text=True, check=False)

    def test_makes_the_grid_of_a_reader_and_prints_its_tables(self):
        text = self.command(target="evidence-small").stdout
        calls = re.findall(r"-m benchmarks\.evidence ([^;&|\n]*)", text)
        run, table = (program.make_parser().parse_args(call.split()) for call in calls)
        assert (run.command, table.command) == (program.run_grid, program.print_tables)
        assert (run.grid, run.out) == (table.grid, table.out)
        assert run.grid == "small"

    def test_runs_the_recipes_without_a_network(self):
        found = self.command("MODELS=m", "DATA=d", "GRID=paper-e2e", "SECONDS=900", "PYTHON=python3.12")
        words = found.stdout.replace("\\\n", " ").split()
        assert words[:2] == ["HF_HUB_OFFLINE=1", "python3.12"]
        options = program.make_parser().parse_args(words[words.index("run") :])
        assert (options.grid, options.device, options.workers, options.seconds) == ("paper-e2e", "cuda", None, 900)
        assert (str(options.models), str(options.data)) == ("m", "d")

    @pytest.mark.parametrize(("given", "missing"), [("MODELS=m", "DATA"), ("DATA=d", "MODELS")])
    def test_asks_for_the_folders(self, given, missing):
        assert f"{missing}=folder" in self.command(given).stderr
