"""The texts that a pretrained decoder writes, and a model's loss on them."""

import copy

import pytest
import torch

from benchmarks.evidence import forgetting, training
from benchmarks.evidence.forgetting import own_texts, text_loss
from benchmarks.evidence.methods import METHODS, prepare
from benchmarks.evidence.models import load_model, load_tokenizer
from benchmarks.evidence.places import Places
from benchmarks.evidence.tasks import open_task
from benchmarks.evidence.training import Trainer
from tests.support.evidence_models import prompts, setting, targets, write_model, write_rows

BEGIN, END = 1, 2


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = write_model(folder / "llama", "llama")
    return model, load_tokenizer(setting("e2e", "llama"), Places(models=folder))


@pytest.fixture(autouse=True)
def _fresh():
    forgetting._cache.clear()


def test_texts_are_the_seed_s_and_leave_the_generator_alone(decoder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    texts = own_texts(*decoder, 0, 20, length=30)
    assert torch.equal(torch.rand(3), expected)
    forgetting._cache.clear()
    assert own_texts(*decoder, 0, 20, length=30) == texts
    assert own_texts(*decoder, 1, 20, length=30) != texts
    assert len(texts) == 20
    assert all(text[0] == BEGIN and 2 <= len(text) <= 31 for text in texts)
    assert all(END not in text[:-1] for text in texts)
    assert {text[-1] == END for text in texts} == {True, False}


def test_texts_are_drawn_from_the_model_s_own_probabilities(decoder):
    model, _ = decoder
    texts = own_texts(*decoder, 0, 4000, length=1)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[BEGIN]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([text[1] for text in texts]), minlength=len(expected)) / len(texts)
    assert (counts - expected).abs().max() < 0.03


def test_texts_are_written_once_a_process_for_equal_weights(decoder, monkeypatch):
    model, tokenizer = decoder
    texts = own_texts(model, tokenizer, 0, 4, length=5)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.lm_head.weight.add_(0.5)
    monkeypatch.setattr(forgetting, "_drawn", lambda *given: "written")
    assert own_texts(copy.deepcopy(model), tokenizer, 0, 4, length=5) is texts
    assert own_texts(moved, tokenizer, 0, 4, length=5) == "written"


def test_another_process_reads_the_texts_from_the_folder(decoder, tmp_path, monkeypatch):
    texts = own_texts(*decoder, 0, 4, length=5, folder=tmp_path / "new")
    forgetting._cache.clear()
    with monkeypatch.context() as patched:
        patched.setattr(forgetting, "_drawn", lambda *given: pytest.fail("they were drawn again"))
        assert own_texts(*decoder, 0, 4, length=5, folder=tmp_path / "new") == texts
    assert own_texts(*decoder, 1, 4, length=5, folder=tmp_path / "new") != texts
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_the_loss_is_the_model_s_own_over_all_tokens(decoder):
    model, _ = decoder
    texts = own_texts(*decoder, 0, 20, length=30)
    total = count = 0
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([text])
            total += model(input_ids=ids, labels=ids).loss.item() * (len(text) - 1)
            count += len(text) - 1
    assert text_loss(model, texts) == pytest.approx(total / count, rel=1e-5)


def test_texts_end_with_the_model_s_context(tmp_path):
    model = write_model(tmp_path / "gpt2", "gpt2")
    tokenizer = load_tokenizer(setting("e2e", "gpt2"), Places(models=tmp_path))
    texts = own_texts(model, tokenizer, 0, 16, length=1000)
    assert max(map(len, texts)) == 64
    assert text_loss(model, texts) > 0


def test_refuses_a_model_on_another_device(decoder):
    model, tokenizer = decoder
    with pytest.raises(ValueError, match="called with the model on the CPU"):
        own_texts(copy.deepcopy(model).to("meta"), tokenizer, 0, 1)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_model(folder / "models" / "llama", "llama")
    write_rows(folder / "e2e/train.jsonl.gz", targets(10))
    write_rows(folder / "e2e/test.jsonl.gz", prompts(3))
    return Places(folder)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_begins_as_the_pretrained_model_which_is_measured_once(places, method, monkeypatch):
    monkeypatch.setattr(training, "_before", {})
    asked = setting("e2e", "llama", method=method)
    task, model = open_task(asked, places, "cpu"), load_model(asked, places, None)
    texts = own_texts(model, load_tokenizer(asked, places), 0, 4)
    with torch.no_grad():
        expected = text_loss(model, texts)
    trainer = Trainer(asked, prepare(asked, model), task, "cpu", texts)
    assert trainer._loss_of_the_pretrained() == expected
    monkeypatch.setattr(forgetting, "text_loss", lambda model, texts: 1 / 0)
    other = setting("e2e", "llama", method="delta", seed=3)
    second = Trainer(other, prepare(other, load_model(other, places, None)), task, "cpu", texts)
    assert second._loss_of_the_pretrained() == expected
