"""The evidence's open tasks: batches, losses, evaluations and written texts, against the models' own."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from benchmarks.evidence import decoding, examples, models, tokens
from benchmarks.evidence.decoding import NoRepeat
from benchmarks.evidence.metrics import measure
from benchmarks.evidence.models import load_model, load_tokenizer
from benchmarks.evidence.places import Places
from benchmarks.evidence.tasks import open_task
from benchmarks.evidence.tokens import IGNORED, Form, Ragged, load_tokens
from tests.support.evidence_models import pairs, prompts, setting, targets, words, write_model, write_rows

pytest.importorskip("sklearn", reason="runs where scikit-learn is installed")
pytest.importorskip("scipy", reason="runs where scipy is installed")

PAD, START, END = 0, 1, 2


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Returns a folder of small data and one of tiny models, for all tests here, which read alone."""
    folder = tmp_path_factory.mktemp("evidence")
    for task, labels in (("mrpc", 2), ("mnli", 3), ("stsb", 5)):
        write_rows(folder / f"glue/{task}/train.jsonl.gz", pairs(30, labels))
        write_rows(folder / f"glue/{task}/dev.jsonl.gz", pairs(23, labels, first=100))
    write_rows(folder / "glue/mnli/dev_mismatched.jsonl.gz", pairs(9, 3, first=200))
    for task in ("e2e", "xsum"):
        write_rows(folder / f"{task}/train.jsonl.gz", targets(10, each=2))
        write_rows(folder / f"{task}/test.jsonl.gz", prompts(9))
    for kind in ("bert", "llama", "gpt2", "bart"):
        write_model(folder / "models" / kind, kind)
    for cache in (examples._examples, models._template, models._tokenizer, tokens._cache):
        getattr(cache, "cache_clear", getattr(cache, "clear", None))()
    return Places(folder)


def opened(places, task, model, **given):
    made = setting(task, model, **given)
    found = open_task(made, places, "cpu")
    return found, load_model(made, places, found.labels).eval(), load_tokenizer(made, places)


def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def test_batches_have_every_example_once_before_any_comes_again(places):
    task, _, _ = opened(places, "mrpc", "bert", batch_size=7)
    rows = [
        [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]
        for b in itertools.islice(task.training_batches(), 30)
    ]
    assert all(len(batch) == 7 for batch in rows)
    seen = list(itertools.chain(*rows))
    first, second = seen[:30], seen[30:60]
    assert sorted(first) == sorted(second)
    assert first != second
    held = load_tokens(setting("mrpc", "bert"), places).train.columns["input_ids"]
    every = [held.padded(torch.tensor([i]), PAD)[0][0].tolist() for i in range(30)]
    assert sorted(map(list, first)) == sorted(every)


def test_the_order_is_the_seed_s_alone(places):
    def order(**given):
        task, _, _ = opened(places, "mrpc", "bert", **given)
        torch.rand(5)
        return torch.cat([b["labels"] for b in itertools.islice(task.training_batches(), 15)]).tolist()

    assert order() == order(lr=1.0, method="other")
    assert order() != order(seed=1)


def test_batches_begin_where_a_run_continues(places):
    task, _, _ = opened(places, "mrpc", "bert", batch_size=7)
    whole = [b["input_ids"].tolist() for b in itertools.islice(task.training_batches(), 12)]
    assert [b["input_ids"].tolist() for b in itertools.islice(task.training_batches(9), 3)] == whole[9:]


def test_a_batch_is_as_long_as_its_longest_example(places):
    task, _, tokenizer = opened(places, "mrpc", "bert", batch_size=3)
    for batch in itertools.islice(task.training_batches(), 10):
        assert (batch["attention_mask"].sum(1).max()) == batch["input_ids"].shape[1]
        assert torch.equal(batch["attention_mask"], (batch["input_ids"] != tokenizer.pad_token_id).long())


def test_tokens_are_made_once_for_settings_that_differ_elsewhere(places):
    one = load_tokens(setting("mrpc", "bert"), places)
    assert load_tokens(setting("mrpc", "bert", lr=0.5, seed=4, rank=2), places) is one
    assert load_tokens(setting("mrpc", "bert", max_length=5), places) is not one
    assert load_tokens(setting("mrpc", "bert", split="tuning"), places) is not one


def test_inputs_are_cut_at_the_longest_length(places):
    task, _, _ = opened(places, "mrpc", "bert", max_length=4)
    assert max(b["input_ids"].shape[1] for b in itertools.islice(task.training_batches(), 8)) == 4


@pytest.mark.parametrize(("smoothing", "reference"), [(0.0, True), (0.1, False)])
def test_the_loss_of_classes_is_the_model_s_own(smoothing, reference, places):
    task, model, _ = opened(places, "mnli", "bert", label_smoothing=smoothing)
    batch = next(task.training_batches())
    with torch.no_grad():
        output = model(**batch)
    loss = task.loss(output, batch["labels"])
    log = output.logits.log_softmax(-1)
    smoothed = (1 - smoothing) * -log.gather(1, batch["labels"][:, None]).mean() - smoothing * log.mean()
    torch.testing.assert_close(loss, smoothed)
    assert math.isclose(loss, output.loss, rel_tol=1e-6) == reference


def test_the_loss_of_a_regression_is_the_squared_error(places):
    task, model, _ = opened(places, "stsb", "bert")
    batch = next(task.training_batches())
    with torch.no_grad():
        output = model(**inputs(batch))
    assert task.labels == 1
    assert batch["labels"].tolist() == [round(label) for label in batch["labels"].tolist()]
    expected = ((output.logits[:, 0].double() - batch["labels"].double()) ** 2).mean()
    torch.testing.assert_close(task.loss(output, batch["labels"]).double(), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_of_a_decoder_is_its_own_of_the_target_alone(kind, places):
    task, model, tokenizer = opened(places, "e2e", kind)
    batch = next(task.training_batches())
    with torch.no_grad():
        loss = task.loss(model(**inputs(batch)), batch["labels"])
        total = count = 0
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            kept = labels != IGNORED
            target = labels[kept].tolist()
            first = int(kept.nonzero()[0])
            prompt = ids[: first + 1].tolist()
            assert prompt[-1] == START  # the separator
            assert target[-1] == END
            assert ids[first + 1 :][: len(target) - 1].tolist() == target[:-1]
            whole = torch.tensor([[*prompt, *target]])
            alone = torch.tensor([[IGNORED] * len(prompt) + target])
            total += model(input_ids=whole, labels=alone).loss * len(target)
            count += len(target)
            text = tokenizer.decode(prompt, skip_special_tokens=True)
            assert "|" in text
    torch.testing.assert_close(loss, total / count)


def test_an_encoder_decoder_s_loss_is_its_own(places):
    task, model, _ = opened(places, "xsum", "bart")
    batch = next(task.training_batches())
    with torch.no_grad():
        loss = task.loss(model(**inputs(batch)), batch["labels"])
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"])
    torch.testing.assert_close(loss, expected.loss)


def test_a_long_input_loses_its_end_and_the_target_is_whole(places):
    task, _, _ = opened(places, "e2e", "llama", max_length=8)
    for batch in itertools.islice(task.training_batches(), 5):
        assert batch["input_ids"].shape[1] <= 7
        assert ((batch["labels"] == END).sum(1) == 1).all()
        assert ((batch["input_ids"] == START).sum(1) == 1).all()


def test_a_form_is_the_pretrained_model_s(places):
    tokenizer = load_tokenizer(setting("e2e", "gpt2"), places)
    assert Form.of(tokenizer, str(places.data / "models/gpt2")) == Form((), START, END, " ", None)
    nameless = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    with pytest.raises(ValueError, match="neither its generation config nor its tokenizer names a token that"):
        Form.of(nameless, str(places.data / "no folder"))


def test_refuses_an_encoder_decoder_s_task_for_a_decoder(places):
    with pytest.raises(ValueError, match="no decoder_start_token_id: it is no encoder-decoder"):
        open_task(setting("xsum", "llama"), places, "cpu")


def test_accuracy_and_loss_are_those_of_one_example_at_a_time(places):
    task, model, tokenizer = opened(places, "mnli", "bert")
    found = task.evaluate(model)
    rows = [(row, "") for row in pairs(23, 3, first=100)] + [(row, "_mismatched") for row in pairs(9, 3, first=200)]
    right, losses = {"": [], "_mismatched": []}, {"": [], "_mismatched": []}
    with torch.no_grad():
        for row, part in rows:
            read = tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")
            output = model(**read, labels=torch.tensor([row["label"]]))
            right[part].append(int(output.logits.argmax()) == row["label"])
            losses[part].append(output.loss.item())
    expected = {}
    for part in right:
        expected[f"loss{part}"] = sum(losses[part]) / len(losses[part])
        expected[f"accuracy{part}"] = sum(right[part]) / len(right[part])
    assert found == pytest.approx(expected, rel=1e-5)
    assert task.metric == "accuracy"


def test_the_first_examples_can_be_evaluated_alone(places):
    task, model, _ = opened(places, "mrpc", "bert", test_examples=5)
    whole, _, _ = opened(places, "mrpc", "bert")
    assert sum(len(rows) for rows, _ in task._evaluated) == 5
    assert task.evaluate(model) != whole.evaluate(model)
    assert task.fingerprint != whole.fingerprint


@pytest.mark.parametrize(("task", "kind"), [("e2e", "llama"), ("xsum", "bart")])
def test_the_loss_of_texts_is_that_of_every_token_of_every_reference(task, kind, places):
    opening, model, tokenizer = opened(places, task, kind)
    total = count = 0
    with torch.no_grad():
        for row in prompts(9):
            for reference in row["references"]:
                prompt, target = (tokenizer(text).input_ids for text in (row["input"], reference))
                if kind == "llama":
                    prompt, target = [*prompt, START], [*target, END]
                    output = model(
                        input_ids=torch.tensor([prompt + target]),
                        labels=torch.tensor([[IGNORED] * len(prompt) + target]),
                    )
                else:
                    output = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([target]))
                total += output.loss.item() * len(target)
                count += len(target)
    assert opening.evaluate(model) == pytest.approx({"loss": total / count}, rel=1e-5)
    assert (opening.metric, opening.labels) == ("loss", None)


def test_metrics_of_known_predictions():
    expected, predicted = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    found = measure(("accuracy", "f1", "matthews"), predicted, expected)
    assert found == pytest.approx({"accuracy": 3 / 5, "f1": 4 / 6, "matthews": (2 - 1) / 6})
    numbers = torch.tensor([0.0, 1.0, 2.0, 4.0])
    assert measure(("pearson", "spearman"), -(numbers**3), numbers)["spearman"] == pytest.approx(-1.0)
    assert measure(("pearson", "spearman"), 3 * numbers + 1, numbers) == pytest.approx({"pearson": 1, "spearman": 1})


def test_equal_predictions_for_all_are_worth_nothing():
    labels = torch.tensor([1, 0, 1])
    assert measure(("f1", "matthews"), torch.zeros(3, dtype=torch.long), labels) == {"f1": 0.0, "matthews": 0.0}
    assert measure(("pearson", "spearman"), torch.ones(3), labels.float()) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("package", ["scipy", "sklearn"])
def test_names_the_packages_of_the_metrics(package, monkeypatch):
    for name in (package, f"{package}.stats", f"{package}.metrics"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn scipy"):
        measure(("accuracy",), torch.tensor([1]), torch.tensor([1]))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_repeat_forbids_what_transformers_forbids(size):
    generator = torch.Generator().manual_seed(size)
    own, theirs = NoRepeat(size, 0), transformers.NoRepeatNGramLogitsProcessor(size)
    for length in (1, size - 1, size, 20):
        if length:
            ids, scores = torch.randint(0, 3, (16, length), generator=generator), torch.rand(16, 3, generator=generator)
            assert torch.equal(own(ids, scores.clone()), theirs(ids, scores.clone()))


def test_no_repeat_leaves_the_prompt_alone():
    ids, scores = torch.tensor([[1, 2, 1]]), torch.zeros(1, 3)
    assert NoRepeat(2, 0)(ids, scores).tolist() == [[0, 0, -math.inf]]
    assert NoRepeat(2, 1)(ids, scores).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(("task", "kind"), [("e2e", "llama"), ("e2e", "gpt2"), ("xsum", "bart")])
@pytest.mark.parametrize("beams", [1, 4])
def test_texts_are_those_of_one_input_at_a_time(task, kind, beams, places, monkeypatch):
    opening, model, tokenizer = opened(places, task, kind, beams=beams, no_repeat=0, new_tokens=6)
    texts = opening.generate(model)
    for budget in (2 * beams * 12, 1):  # a few in a batch, and one
        monkeypatch.setattr(decoding, "TOKENS", budget)
        assert opening.generate(model) == texts
    alone = []
    for row in prompts(9):
        ids = tokenizer(row["input"]).input_ids + ([START] if task == "e2e" else [])
        written = model.generate(
            torch.tensor([ids]), max_new_tokens=6, num_beams=beams, do_sample=False, eos_token_id=END, use_cache=True,
            attention_mask=torch.ones(1, len(ids), dtype=torch.long), pad_token_id=PAD,
            **({"length_penalty": 0.8} if beams > 1 else {}),
        )[0, len(ids) if task == "e2e" else 1 :]  # fmt: skip
        alone.append(tokenizer.decode(written, skip_special_tokens=True))
    assert texts == alone
    assert len(set(texts)) > 1


def test_no_run_of_tokens_is_written_twice(places):
    def runs(no_repeat):
        made = setting("e2e", "llama", beams=2, no_repeat=no_repeat)
        plain = SimpleNamespace(pad_token_id=PAD, decode=lambda ids, **options: " ".join(map(str, ids)))
        model, prompt = load_model(made, places, None), load_tokens(made, places).prompts
        texts = decoding.write(model, prompt, plain, made, END, 20, torch.device("cpu"))
        return [[*itertools.pairwise(text.split())] for text in texts]

    assert all(len(set(text)) == len(text) for text in runs(2))
    assert any(len(set(text)) < len(text) for text in runs(0))


def test_a_text_is_as_long_as_the_longest_training_target_at_most(places):
    opening, model, _ = opened(places, "e2e", "llama", beams=1, no_repeat=0)
    longest = max(len(row["target"].split()) for row in targets(10, each=2)) + 1
    assert load_tokens(setting("e2e", "llama"), places).longest == longest
    assert max(len(text.split()) for text in opening.generate(model)) <= longest


def test_a_text_fits_the_model_s_context(places):
    opening, model, _ = opened(places, "e2e", "gpt2", beams=1, no_repeat=0, new_tokens=1000)
    assert max(len(text.split()) for text in opening.generate(model)) <= 64


def test_tasks_of_labels_write_nothing(places):
    task, model, _ = opened(places, "mrpc", "bert")
    assert task.generate(model) is None


def test_texts_end_where_the_end_is_written(places):
    class Ending:
        config = SimpleNamespace(is_encoder_decoder=False, max_position_embeddings=64)
        generation_config = transformers.GenerationConfig()

        def generate(self, input_ids, **options):
            said = torch.tensor([[5, 6, END, 7]]).expand(len(input_ids), -1)
            return torch.cat((input_ids, said), 1)

    made = setting("e2e", "llama", beams=1)
    tokenizer = load_tokenizer(made, places)
    texts = decoding.write(Ending(), Ragged([[1, 4], [1, 4, 4]]), tokenizer, made, END, 9, torch.device("cpu"))
    assert texts == ["green blue"] * 2


def test_ragged_pads_on_either_side():
    held = Ragged([[5], [6, 7, 8], [], [9, 4]])
    rows = torch.tensor([3, 0, 2])
    values, mask = held.padded(rows, -1)
    assert values.tolist() == [[9, 4], [5, -1], [-1, -1]]
    assert mask.tolist() == [[True, True], [True, False], [False, False]]
    values, mask = held.padded(rows, -1, left=True)
    assert values.tolist() == [[9, 4], [-1, 5], [-1, -1]]
    assert mask.tolist() == [[True, True], [False, True], [False, False]]
    assert len(held) == 4


def test_the_words_of_the_tests_differ():
    assert words(12) != words(21)
