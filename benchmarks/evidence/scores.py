"""The scores of written texts against their references, by libraries that are kept.

For E2E and WebNLG both sides are tokenised alike: by mteval's rules (sacrebleu's "13a"), then lower-cased, as the E2E
challenge's script does for BLEU and NIST. METEOR, ROUGE-L and CIDEr leave tokens of punctuation out, as the COCO
caption scores do; these tokenise by the Penn Treebank's rules, which differ in details.

- BLEU and TER: sacrebleu. BLEU is a percentage, TER a share.
- NIST: nltk, 5-grams. It takes matches of the one reference that fits best, where mteval takes those of all references,
  so it is lower than published scores of several references, and compares only with itself.
- METEOR 1.5 (a Java program), ROUGE-L and CIDEr: pycocoevalcap. METEOR and ROUGE-L are percentages.
- ROUGE-1, -2 and -L for XSum: rouge-score, with stems; F1 as a percentage.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.catalogue import task_named
from benchmarks.evidence.examples import load_examples
from benchmarks.evidence.places import Places
from benchmarks.evidence.result import read_results, write_result
from benchmarks.evidence.setting import Setting

PACKAGES = {"sacrebleu": "sacrebleu", "nltk": "nltk", "pycocoevalcap": "pycocoevalcap", "rouge_score": "rouge-score"}


@dataclass(frozen=True)
class References:
    """The references of one input, and the part of the data that it belongs to ("seen", "unseen" or none)."""

    texts: tuple[str, ...]
    part: str = ""


def references(task: str, places: Places, setting: Setting) -> list[References]:
    """Return the references of a run's evaluated inputs, in the order of `OpenTask.generate`.

    Raises:
        ValueError: if the setting is of another task, or the task writes no texts.
        ValueError, FileNotFoundError, ModuleNotFoundError: as `load_examples`.
    """
    if setting.task != task:
        raise ValueError(f"the setting is of {setting.task}, not of {task}")
    if not task_named(task).writes:
        raise ValueError(f"{task} writes no texts")
    examples = load_examples(setting, places)
    return [References(example.targets, example.part) for example in examples.evaluated]


def score_texts(task: str, texts: Sequence[str], references: Sequence[References]) -> dict[str, float]:
    """Return the scores of a task's texts; WebNLG's also of the seen and of the unseen part, as "BLEU_seen".

    Args:
        task: a name of `tasks.TASKS` that writes texts.
        texts: as `OpenTask.generate` returns them.
        references: of each text.

    Raises:
        ValueError: if the numbers of texts and references differ, or the task writes no texts.
        ModuleNotFoundError, RuntimeError: if a library, or Java for METEOR, is missing or fails.
    """
    names = task_named(task).scores
    if not names:
        raise ValueError(f"{task} writes no texts")
    if len(texts) != len(references):
        raise ValueError(f"{task}: {len(texts)} texts, but {len(references)} inputs with references")
    if not texts:
        raise ValueError(f"{task}: no texts to score")
    found = _scores(names, texts, [reference.texts for reference in references])
    for part in sorted({reference.part for reference in references} - {""}):
        rows = [row for row, reference in enumerate(references) if reference.part == part]
        here = _scores(names, [texts[row] for row in rows], [references[row].texts for row in rows])
        found |= {f"{name}_{part}": value for name, value in here.items()}
    return found


def score_folder(folder: Path, places: Places) -> list[Path]:
    """Add the scores to the result files below a grid's folder that have texts and no scores yet; return the files.

    Raises:
        ValueError: if the data is not the one that the texts were written for.
        ValueError, FileNotFoundError, ModuleNotFoundError, RuntimeError: as `references` and `score_texts`.
    """
    written = []
    for result in read_results(folder):
        setting = result.setting
        if result.texts is None or set(task_named(setting.task).scores) <= result.metrics.keys():
            continue
        wanted = references(setting.task, places, setting)
        here = load_examples(setting, places).fingerprint
        if here != result.data:
            raise ValueError(
                f"{folder / setting.path} was made with the data {result.data}, but {places.data} holds {here}: "
                f"give the folder that the run had (--data)"
            )
        result.metrics = {**result.metrics, **score_texts(setting.task, result.texts, wanted)}
        written.append(write_result(folder, result))
    return written


def _scores(names: Sequence[str], texts: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    if "ROUGE-1" in names:
        return _rouge(texts, wanted)
    found = [tokenised(text) for text in texts]
    expected = [[tokenised(text) for text in several] for several in wanted]
    return {name: SCORES[name](found, expected) for name in names}


def tokenised(text: str) -> str:
    """Return a text as lower-cased tokens with single spaces."""
    return str(_tokenizer()(text)).lower()


@functools.cache
def _tokenizer() -> Any:
    _import("sacrebleu")
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def _import(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ModuleNotFoundError(f"these scores need {PACKAGES[name]}: pip install {PACKAGES[name]}") from error


Expected = Sequence[Sequence[str]]


def _columns(expected: Expected) -> list[list[str | None]]:
    """Return the first references of all texts, the second ones, and so on, as sacrebleu takes them."""
    most = max(map(len, expected))
    return [[several[i] if i < len(several) else None for several in expected] for i in range(most)]


def _bleu(found: Sequence[str], expected: Expected) -> float:
    sacrebleu = _import("sacrebleu")
    scorer = sacrebleu.BLEU(tokenize="none", force=True)
    return float(scorer.corpus_score(list(found), _columns(expected)).score)


def _ter(found: Sequence[str], expected: Expected) -> float:
    counts = [_edits(text, tuple(several)) for text, several in zip(found, expected, strict=True)]
    edits, length = (sum(column) for column in zip(*counts, strict=True))
    return edits / length


@functools.lru_cache(maxsize=2**16)
def _edits(text: str, several: tuple[str, ...]) -> tuple[float, float]:
    """Return the edits to the nearest reference, and the mean length of all: kept, since parts and runs share texts."""
    score = _import("sacrebleu").TER().sentence_score(text, list(several))
    return float(score.num_edits), float(score.ref_length)


def _nist(found: Sequence[str], expected: Expected) -> float:
    _import("nltk")
    from nltk.translate.nist_score import corpus_nist

    texts = [text.split() for text in found]
    # Texts that are all shorter have no 5-grams, whose precision nltk would divide by their number.
    longest = min(5, max(map(len, texts)))
    if longest == 0:
        return 0.0
    return float(corpus_nist([[text.split() for text in several] for several in expected], texts, n=longest))


def _coco(scorer: Any, found: Sequence[str], expected: Expected) -> float:
    """Return a score of pycocoevalcap, without punctuation."""
    texts = {row: [_words(text)] for row, text in enumerate(found)}
    wanted = {row: [_words(text) for text in several] for row, several in enumerate(expected)}
    return float(scorer.compute_score(wanted, texts)[0])


def _words(text: str) -> str:
    """Return the tokens that are no punctuation; a word that no reference has where nothing is left."""
    return " ".join(token for token in text.split() if re.search(r"\w", token)) or "xqzj"


def _rouge_l(found: Sequence[str], expected: Expected) -> float:
    _import("pycocoevalcap")
    from pycocoevalcap.rouge.rouge import Rouge

    return 100 * _coco(Rouge(), found, expected)


def _cider(found: Sequence[str], expected: Expected) -> float:
    _import("pycocoevalcap")
    from pycocoevalcap.cider.cider import Cider

    return _coco(Cider(), found, expected)


def _meteor(found: Sequence[str], expected: Expected) -> float:
    _import("pycocoevalcap")
    if shutil.which("java") is None:
        raise RuntimeError("METEOR is a Java program, and there is no 'java' here: install a Java runtime")
    try:
        return 100 * _coco(_meteor_program(), found, expected)
    except (ValueError, OSError) as error:
        said = _end_meteor()
        raise RuntimeError(f"METEOR failed: {said[0] if said else error}") from error


@functools.cache
def _meteor_program() -> Any:
    """Return the running program, which reads its large table of paraphrases once."""
    from pycocoevalcap.meteor.meteor import Meteor

    atexit.register(_end_meteor)
    return Meteor()


def _end_meteor() -> list[str]:
    """End the program, if it runs, and return what it has said of errors."""
    if not _meteor_program.cache_info().currsize:
        return []
    scorer = _meteor_program()
    _meteor_program.cache_clear()
    process = scorer.meteor_p
    process.kill()
    said = process.stderr.read().decode(errors="replace").strip().splitlines()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(OSError):
            stream.close()
    if scorer.lock.locked():  # left so by an error; the object waits for it when it is deleted
        scorer.lock.release()
    return [str(line) for line in said]


def _rouge(texts: Sequence[str], wanted: Expected) -> dict[str, float]:
    """Return ROUGE-1, -2 and -L; of several references the best one counts."""
    _import("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    kinds = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
    scorer = RougeScorer(list(kinds.values()), use_stemmer=True)
    rows = [scorer.score_multi(list(several), text) for text, several in zip(texts, wanted, strict=True)]
    return {name: 100 * sum(row[kind].fmeasure for row in rows) / len(rows) for name, kind in kinds.items()}


SCORES: Mapping[str, Callable[[Sequence[str], Expected], float]] = {
    "BLEU": _bleu,
    "NIST": _nist,
    "METEOR": _meteor,
    "ROUGE-L": _rouge_l,
    "CIDEr": _cider,
    "TER": _ter,
}
