"""The scores of written texts: of texts made by hand, and what happens without a library."""

import shutil

import pytest

from benchmarks.evidence import examples, scores
from benchmarks.evidence.places import Places
from benchmarks.evidence.result import Result, read_result, write_result
from benchmarks.evidence.scores import References, references, score_folder, score_texts, tokenised
from tests.support.evidence_models import prompts, setting, targets, write_rows

ONE = "The Vaults is a cheap pub near Café Adriatic, in the city centre."
TWO = "Blue Spice serves French food by the river; it is not family friendly."
THREE = "There is a coffee shop called Giraffe."
WANTED = [References((ONE, "A pub."), "seen"), References((TWO,), "unseen"), References((THREE, ONE, TWO), "seen")]

PLAIN = [References(wanted.texts) for wanted in WANTED]
E2E = ("BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr")


def score(name, texts, wanted=WANTED):
    return scores._scores((name,), texts, [reference.texts for reference in wanted])[name]


@pytest.fixture
def _libraries():
    for library in ("sacrebleu", "nltk", "pycocoevalcap"):
        pytest.importorskip(library, reason=f"runs where {library} is installed")


@pytest.fixture
def _java():
    if shutil.which("java") is None:
        pytest.skip("runs where Java is installed")


@pytest.mark.extra
@pytest.mark.usefixtures("_libraries", "_java")
def test_texts_that_are_a_reference_have_the_best_scores():
    found = score_texts("e2e", [ONE, TWO, THREE], PLAIN)
    assert tuple(found) == E2E
    assert {name: found[name] for name in ("BLEU", "METEOR", "ROUGE-L")} == pytest.approx(
        {"BLEU": 100, "METEOR": 100, "ROUGE-L": 100}
    )
    others = score_texts("e2e", [TWO, THREE, "A pub."], PLAIN)
    assert all(others[name] < found[name] for name in E2E)
    assert found["NIST"] > 3
    assert found["CIDEr"] > 3


@pytest.mark.extra
@pytest.mark.usefixtures("_libraries", "_java")
def test_texts_without_words_have_the_worst_scores():
    for texts in (["", "", ""], [".", ",", ""]):
        found = score_texts("e2e", texts, PLAIN)
        assert found == pytest.approx(dict.fromkeys(E2E, 0), abs=0.5)


@pytest.mark.extra
@pytest.mark.usefixtures("_libraries", "_java")
def test_webnlg_is_scored_as_a_whole_and_by_parts():
    found = score_texts("webnlg", [ONE, ONE, THREE], WANTED)
    assert set(found) == {f"{name}{part}" for name in ("BLEU", "METEOR", "TER") for part in ("", "_seen", "_unseen")}
    assert (found["BLEU_seen"], found["TER_seen"]) == pytest.approx((100, 0))
    assert found["BLEU_unseen"] < found["BLEU"] < 100
    assert found["TER_unseen"] > found["TER"] > 0


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("name", ["BLEU", "NIST", "ROUGE-L", "CIDEr", "TER"])
def test_case_and_the_room_around_punctuation_do_not_count(name):
    texts = [ONE, THREE, THREE]
    changed = [text.upper().replace(".", " .").replace(",", " ,") for text in texts]
    assert score(name, changed) == pytest.approx(score(name, texts))


@pytest.mark.usefixtures("_libraries")
def test_bleu_is_the_geometric_mean_of_precisions_with_the_nearest_reference_s_length():
    wanted = [References(("a b c d e f", "a b c d e f g h i j k l"))]
    # 5 of 6, 4 of 5, 3 of 4 and 2 of 3 runs are right, and 6 words are the length of the nearest reference.
    assert score("BLEU", ["a b c d e x"], wanted) == pytest.approx(
        100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25, rel=1e-6
    )


@pytest.mark.usefixtures("_libraries")
def test_ter_is_the_share_of_edits():
    assert score("TER", ["a b x d"], [References(("a b c d",))]) == pytest.approx(1 / 4)
    assert score("TER", ["c d a b"], [References(("a b c d",))]) == pytest.approx(1 / 4)  # one shift


@pytest.mark.usefixtures("_libraries")
def test_ter_is_sacrebleu_s_of_the_whole():
    import sacrebleu

    texts = ["a b x d e", "x a c", ""]
    wanted = [References(("a b c d", "d e a b x")), References(("a b c",)), References(("a", "a b c d e"))]
    columns = [[w.texts[0] for w in wanted], [w.texts[1] if len(w.texts) > 1 else None for w in wanted]]
    assert score("TER", texts, wanted) == pytest.approx(sacrebleu.TER().corpus_score(texts, columns).score / 100)


@pytest.mark.usefixtures("_libraries")
def test_rouge_l_weighs_recall_more():
    precision, recall, beta = 1.0, 3 / 5, 1.2
    expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert score("ROUGE-L", ["a c e"], [References(("a b c d e",))]) == pytest.approx(100 * expected)


@pytest.mark.usefixtures("_libraries")
def test_tokens_are_those_of_mteval():
    assert tokenised("It's £20-25, isn't it?") == "it's £20 - 25 , isn't it ?"


def test_xsum_has_rouge_of_stems():
    pytest.importorskip("rouge_score", reason="runs where rouge-score is installed")
    wanted = [References(("The cats sat on the mat.",)), References(("a b c",))]
    found = score_texts("xsum", ["the cat sat on the mat", "a c d"], wanted)
    assert found == pytest.approx({"ROUGE-1": (100 + 200 / 3) / 2, "ROUGE-2": 50, "ROUGE-L": (100 + 200 / 3) / 2})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_texts("e2e", ["a"], WANTED), "e2e: 1 texts, but 3 inputs with references"),
        (lambda: score_texts("e2e", [], []), "e2e: no texts to score"),
        (lambda: score_texts("cola", ["a"], WANTED), "cola writes no texts"),
        (lambda: references("cola", Places(), setting("cola")), "cola writes no texts"),
        (lambda: references("e2e", Places(), setting("webnlg")), "the setting is of webnlg, not of e2e"),
    ],
)
def test_refuses_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("task", "module", "package"),
    [
        ("e2e", "sacrebleu", "sacrebleu"),
        ("e2e", "nltk", "nltk"),
        ("e2e", "pycocoevalcap", "pycocoevalcap"),
        ("xsum", "rouge_score", "rouge-score"),
    ],
)
def test_names_the_package_that_is_missing(task, module, package, monkeypatch):
    if module != "sacrebleu" and task == "e2e":
        pytest.importorskip("sacrebleu", reason="runs where sacrebleu is installed")
    if module == "pycocoevalcap":
        pytest.importorskip("nltk", reason="runs where nltk is installed")
    scores._tokenizer.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=f"these scores need {package}: pip install {package}"):
        score_texts(task, [ONE, TWO, THREE], WANTED)


@pytest.mark.usefixtures("_libraries")
def test_says_that_meteor_needs_java(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"METEOR is a Java program.* install a Java runtime"):
        score("METEOR", [ONE, TWO, THREE])


@pytest.mark.usefixtures("_libraries")
def test_says_why_meteor_failed(monkeypatch, tmp_path):
    scores._end_meteor()
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho 'no memory for the heap' >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(RuntimeError, match="METEOR failed: no memory for the heap"):
        score("METEOR", [ONE, TWO, THREE])


@pytest.fixture
def places(tmp_path):
    examples._examples.cache_clear()
    write_rows(tmp_path / "xsum/train.jsonl.gz", targets(10, each=2))
    write_rows(tmp_path / "xsum/test.jsonl.gz", prompts(9))
    return Places(tmp_path)


def test_references_are_in_the_order_of_the_inputs(places):
    assert references("xsum", places, setting("xsum")) == [References(tuple(r["references"])) for r in prompts(9)]
    held = references("xsum", places, setting("xsum", split="tuning"))
    found = examples.load_examples(setting("xsum", split="tuning"), places)
    assert [reference.texts for reference in held] == [example.targets for example in found.evaluated]


def test_scores_are_added_once_to_the_files_of_a_folder(places, tmp_path):
    pytest.importorskip("rouge_score", reason="runs where rouge-score is installed")
    made = setting("xsum")
    data = examples.load_examples(made, places).fingerprint
    texts = [row["references"][1] for row in prompts(9)]
    path = write_result(tmp_path / "grid", Result(made, {"loss": 2.0}, texts=texts, data=data))
    write_result(tmp_path / "grid", Result(setting("xsum", seed=1), {"loss": 2.0}, data=data))
    assert score_folder(tmp_path / "grid", places) == [path]
    expected = {"loss": 2.0, "ROUGE-1": 100.0, "ROUGE-2": 100.0, "ROUGE-L": 100.0}
    assert read_result(path).metrics == pytest.approx(expected)
    assert score_folder(tmp_path / "grid", places) == []


def test_refuses_to_score_against_other_data(places, tmp_path):
    write_result(tmp_path / "grid", Result(setting("xsum"), texts=["a"] * 9, data="0123456789abcdef"))
    with pytest.raises(ValueError, match=r"made with the data 0123456789abcdef, but .* give the folder that the run"):
        score_folder(tmp_path / "grid", places)
