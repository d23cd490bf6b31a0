"""The examples of the evidence's runs: their splits, their order, and data that cannot be used."""

import collections

import pytest

from benchmarks import finetune_data
from benchmarks.evidence import examples as subject
from benchmarks.evidence.catalogue import TASKS
from benchmarks.evidence.examples import Example, hold_out, load_examples, write_docstrings
from benchmarks.evidence.places import Places
from tests.support.evidence_models import pairs, prompts, setting, targets, write_rows


@pytest.fixture(autouse=True)
def _fresh():
    subject._examples.cache_clear()


def test_tuning_trains_on_no_input_that_it_is_measured_on(tmp_path):
    rows = targets(60, each=4)
    write_rows(tmp_path / "e2e/train.jsonl.gz", rows)
    write_rows(tmp_path / "e2e/test.jsonl.gz", prompts(3))
    found = load_examples(setting("e2e", split="tuning"), Places(tmp_path))
    train, held = {e.text for e in found.train}, {e.text for e in found.evaluated}
    assert not train & held
    assert train | held == {row["input"] for row in rows}
    assert 5 <= len(held) == len(found.evaluated) <= 20
    written = collections.defaultdict(list)
    for row in rows:
        written[row["input"]].append(row["target"])
    assert all(list(e.targets) == written[e.text] for e in found.evaluated)
    assert [(e.text, *e.targets) for e in found.train] == [tuple(row.values()) for row in rows if row["input"] in train]


def test_an_input_is_on_the_same_side_in_any_order_and_case():
    rows = [Example(f"text {i}", label=0) for i in range(200)]
    held = {e.text for e in hold_out(rows)[1]}
    assert {e.text for e in hold_out(rows[::-1])[1]} == held
    assert {e.text.lower() for e in hold_out([Example(e.text.upper(), label=0) for e in rows])[1]} == held


@pytest.mark.parametrize(("count", "low", "high"), [(500, 70, 130), (20_000, 900, 1100)])
def test_a_fifth_and_about_a_thousand_at_most_is_held_out(count, low, high):
    train, held = hold_out([Example(f"text {i}", label=0) for i in range(count)])
    assert low < len(held) < high
    assert len(train) + len(held) == count


def test_repeated_inputs_of_a_classification_are_all_kept():
    rows = [Example("same", label=0)] * 3 + [Example(f"text {i}", label=0) for i in range(100)]
    assert sum(map(len, hold_out(rows))) == 103


def test_results_are_of_the_test_split_after_all_of_the_training_data(tmp_path):
    write_rows(tmp_path / "glue/mrpc/train.jsonl.gz", pairs(20))
    write_rows(tmp_path / "glue/mrpc/dev.jsonl.gz", pairs(7, first=50))
    found = load_examples(setting("mrpc"), Places(tmp_path))
    assert (len(found.train), len(found.evaluated), found.labels) == (20, 7, 2)
    first = load_examples(setting("mrpc", train_examples=3, test_examples=2), Places(tmp_path))
    assert first.train == found.train[:3]
    assert first.evaluated == [found.evaluated[0], found.evaluated[3]]  # spread over all
    more = load_examples(setting("mrpc", test_examples=70), Places(tmp_path))
    assert more.evaluated == found.evaluated


def test_the_fingerprint_is_that_of_the_examples(tmp_path):
    for name, count in (("one", 20), ("two", 20), ("three", 21)):
        write_rows(tmp_path / name / "glue/mrpc/train.jsonl.gz", pairs(count))
        write_rows(tmp_path / name / "glue/mrpc/dev.jsonl.gz", pairs(7))
    one, two, three = (
        load_examples(setting("mrpc"), Places(tmp_path / name)).fingerprint for name in ("one", "two", "three")
    )
    assert one == two != three
    assert load_examples(setting("mrpc", train_examples=20), Places(tmp_path / "three")).fingerprint == one
    assert len(one) == 16


def test_mnli_has_a_second_split_where_it_is_given(tmp_path):
    for split in ("train", "dev", "dev_mismatched"):
        write_rows(tmp_path / f"glue/mnli/{split}.jsonl.gz", pairs(6, labels=3))
    found = load_examples(setting("mnli", test_examples=2), Places(tmp_path))
    assert [e.part for e in found.evaluated] == ["", "", "mismatched", "mismatched"]
    (tmp_path / "glue/mnli/dev_mismatched.jsonl.gz").unlink()
    subject._examples.cache_clear()
    assert [e.part for e in load_examples(setting("mnli"), Places(tmp_path)).evaluated] == [""] * 6


def test_webnlg_tells_seen_from_unseen_inputs(tmp_path):
    write_rows(tmp_path / "webnlg2017/train.jsonl.gz", targets(4))
    write_rows(tmp_path / "webnlg2017/test.jsonl.gz", prompts(2, seen=True) + prompts(1, first=3, seen=False))
    found = load_examples(setting("webnlg"), Places(tmp_path))
    assert [e.part for e in found.evaluated] == ["seen", "seen", "unseen"]


def test_fewer_examples_are_of_all_parts_of_a_sorted_split(tmp_path):
    write_rows(tmp_path / "webnlg2017/train.jsonl.gz", targets(4))
    rows = prompts(12, seen=True) + prompts(8, first=12, seen=False)
    write_rows(tmp_path / "webnlg2017/test.jsonl.gz", rows)
    found = load_examples(setting("webnlg", test_examples=5), Places(tmp_path))
    assert [e.text for e in found.evaluated] == [rows[i]["input"] for i in (0, 4, 8, 12, 16)]
    assert [e.part for e in found.evaluated] == ["seen"] * 3 + ["unseen"] * 2


def test_docstrings_that_were_written_are_those_of_the_library(tmp_path, monkeypatch):
    stdlib = tmp_path / "stdlib"
    for package in ("one", "two"):
        (stdlib / package).mkdir(parents=True)
        code = "".join(
            f'def f{i}():\n    """Do what {package} does, number {i}: {"ab"[i % 2]}."""\n' for i in range(40)
        )
        (stdlib / package / "__init__.py").write_text(code)
    real = finetune_data.docstring_task
    monkeypatch.setattr(finetune_data, "docstring_task", lambda: real(stdlib))
    live = load_examples(setting("docstrings"), Places())
    assert [path.name for path in write_docstrings(tmp_path / "data")] == ["train.jsonl.gz", "test.jsonl.gz"]
    monkeypatch.setattr(finetune_data, "docstring_task", pytest.fail)
    read = load_examples(setting("docstrings"), Places(tmp_path / "data"))
    assert (read.fingerprint, read.labels) == (live.fingerprint, 2)
    assert {e.label for e in read.train[:15]} == {0, 1}  # the first ones are of every label


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not task.hub and name != "docstrings"])
def test_refuses_a_data_folder_without_the_task(task, tmp_path):
    folder = TASKS[task].folder
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no folder {folder}: give the folder that holds"):
        load_examples(setting(task), Places(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"no data folder is given: give the folder that holds {folder}/"):
        load_examples(setting(task), Places())


def test_refuses_a_task_that_neither_the_folder_nor_the_hub_has(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="runs where datasets is installed")

    def unreachable(*names, split):
        raise ConnectionError("no route to the hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = f"cola: {tmp_path} has no folder glue/cola, and nyu-mll/glue/cola .* from the hub: no route to the hub$"
    with pytest.raises(FileNotFoundError, match=message):
        load_examples(setting("cola"), Places(tmp_path))


def test_names_the_package_that_reads_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"cola: .*pip install datasets"):
        load_examples(setting("cola"), Places(tmp_path))


def test_reads_the_hub_where_the_folder_lacks_the_task(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="runs where datasets is installed")
    asked = []

    def rows(*names, split):
        asked.append((*names, split))
        return [{"premise": "a red", "hypothesis": f"blue {i}", "label": i, "idx": i} for i in range(3)]

    monkeypatch.setattr(datasets, "load_dataset", rows)
    found = load_examples(setting("mnli"), Places())
    assert [(e.text, e.pair, e.label) for e in found.train] == [("a red", f"blue {i}", i) for i in range(3)]
    splits = ("train", "validation_matched", "validation_mismatched")
    assert asked == [("nyu-mll/glue", "mnli", split) for split in splits]


@pytest.mark.parametrize(("split", "asked"), [("test", "dev"), ("tuning", "train"), ("tuning", "dev")])
def test_refuses_a_task_without_a_split(split, asked, tmp_path):
    held = {"dev": "train", "train": "dev"}[asked]
    write_rows(tmp_path / f"glue/cola/{held}.jsonl.gz", pairs(5))
    with pytest.raises(FileNotFoundError, match=f"cola: .*has no {asked}.jsonl.gz, only {held}.jsonl.gz"):
        load_examples(setting("cola", split=split), Places(tmp_path))


def test_refuses_docstrings_without_a_split(tmp_path):
    write_rows(tmp_path / "docstrings/train.jsonl.gz", pairs(5))
    with pytest.raises(FileNotFoundError, match=r"docstrings: .*has no test.jsonl.gz, only train.jsonl.gz"):
        load_examples(setting("docstrings"), Places(tmp_path))


def test_refuses_an_unknown_task():
    with pytest.raises(ValueError, match="unknown task 'snli': expected one of docstrings, cola"):
        load_examples(setting("snli"), Places())


def test_refuses_a_side_without_examples(tmp_path):
    for split, rows in (("train", pairs(4)), ("dev", [])):
        write_rows(tmp_path / f"glue/cola/{split}.jsonl.gz", rows)
    with pytest.raises(ValueError, match="cola: no example is left to measure on"):
        load_examples(setting("cola"), Places(tmp_path))
    write_rows(tmp_path / "glue/cola/train.jsonl.gz", [])
    with pytest.raises(ValueError, match="cola: no example is left to train on"):
        load_examples(setting("cola"), Places(tmp_path))


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("cola", {"sentence1": "a", "label": 2}, "line 1: label 2; cola expects one of 0 to 1"),
        ("cola", {"sentence1": "a", "label": 0.5}, "label 0.5; cola expects one of 0 to 1"),
        ("cola", {"sentence1": "a", "label": "1"}, "label '1'; cola expects one of 0 to 1"),
        ("cola", {"sentence1": "a", "label": True}, "label True; cola expects one of 0 to 1"),
        ("cola", {"sentence1": "a"}, "label None; cola expects one of 0 to 1"),
        ("cola", {"label": 1}, "line 1: no sentence1"),
        ("cola", ["a", 1], "line 1: expected an object, got list"),
        ("stsb", {"sentence1": "a", "label": "3"}, "label '3'; stsb is regression and expects a number"),
        ("e2e", {"target": "a"}, "line 1: no input"),
        ("e2e", {"input": "a"}, "line 1: no target and no references"),
        ("e2e", {"input": "a", "references": []}, "line 1: no target and no references"),
        ("e2e", {"input": "a", "target": ""}, "line 1: no target and no references"),
    ],
)
def test_refuses_rows_that_do_not_fit(task, row, message, tmp_path):
    write_rows(tmp_path / TASKS[task].folder / "train.jsonl.gz", [row])
    with pytest.raises(ValueError, match=message):
        load_examples(setting(task), Places(tmp_path))


def test_refuses_a_file_that_was_cut_off(tmp_path):
    path = tmp_path / "glue/cola/train.jsonl.gz"
    write_rows(path, pairs(50))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"train.jsonl.gz cannot be read after \d+ rows"):
        load_examples(setting("cola"), Places(tmp_path))
