"""Labelled texts for the fine-tuning demonstration: docstrings of the standard library, a file, or a hub data set."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Folders whose texts do not document their package. Python 3.12 removed distutils, so older versions leave it out too.
NOT_PACKAGES = {"site-packages", "test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "distutils", "__pycache__"}
PACKAGES = 12
SHORTEST = 20
TEST_SHARE = 5
"""One text in this many is a test text."""


@dataclass(frozen=True)
class Row:
    """One example as read: a text, an optional second text, and the label as written."""

    text: str
    pair: str | None
    label: str | int


@dataclass(frozen=True)
class Example:
    """One example as trained: the label is its index in `Task.labels`."""

    text: str
    pair: str | None
    label: int


@dataclass(frozen=True)
class Task:
    """A classification task: a description, the labels, and two sets of examples."""

    description: str
    labels: list[str]
    train: list[Example]
    test: list[Example]

    def majority_accuracy(self) -> float:
        """Return the test accuracy of always answering with the commonest label of the training texts."""
        return self._accuracy([self._commonest()] * len(self.test))

    def named_accuracy(self) -> float | None:
        """Return the accuracy of answering with the label that the text names, or else with the commonest.

        It shows how far the texts alone give the answer away. None for numbered labels.
        """
        if all(label.lstrip("-").isdigit() for label in self.labels):
            return None
        patterns = [re.compile(rf"\b{re.escape(label)}\b", re.IGNORECASE) for label in self.labels]
        guesses = []
        for example in self.test:
            named = [i for i, pattern in enumerate(patterns) if pattern.search(example.text)]
            guesses.append(named[0] if named else self._commonest())
        return self._accuracy(guesses)

    def _commonest(self) -> int:
        return Counter(example.label for example in self.train).most_common(1)[0][0]

    def _accuracy(self, guesses: Sequence[int]) -> float:
        return sum(g == example.label for g, example in zip(guesses, self.test, strict=True)) / len(self.test)


def load_task(data: str | None, test_data: str | None = None) -> Task:
    """Return the task that the options ``--data`` and ``--test-data`` name.

    Args:
        data: a JSONL file, a hub data set (``name`` or ``name:config``), or None for the docstrings.
        test_data: the test examples, a JSONL file or a hub data set; None takes a fifth of `data`, or the
            validation or test split of a hub data set.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: if the data cannot be used; the message says what to do.
    """
    if data is None:
        if test_data is not None:
            raise ValueError("--test-data goes with --data: the docstrings bring their own test texts")
        return docstring_task()
    train, test = read_splits(data)
    if test_data is not None:
        train, test = [*train, *test] if is_file(data) else train, read_all(test_data)
    return encode(f"the labels of {Path(data).name if is_file(data) else data}", train, test)


def docstring_task(stdlib: Path | None = None) -> Task:
    """Return the default task: tell from which package of the standard library a docstring comes.

    The labels are the 12 packages with most docstrings. Nothing is masked: a docstring may name its package.
    `Task.named_accuracy` says how far that alone goes, and the report prints it.

    Args:
        stdlib: the folder of the library. Default: that of the running interpreter.
    """
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    packages: dict[str, set[str]] = defaultdict(set)
    for folder in sorted(stdlib.iterdir()):
        if folder.name not in NOT_PACKAGES and (folder / "__init__.py").is_file():
            packages[folder.name] = set(docstrings(folder))
    homes = Counter(text for texts in packages.values() for text in texts)
    distinct = {name: sorted(t for t in texts if homes[t] == 1) for name, texts in packages.items()}
    largest = sorted(distinct, key=lambda name: (-len(distinct[name]), name))[:PACKAGES]
    train, test = split([Row(text, None, name) for name in sorted(largest) for text in distinct[name]])
    return encode("from which package of Python's standard library a docstring comes", train, test)


def docstrings(folder: Path) -> Iterator[str]:
    """Yield the docstrings below a folder, except those of its tests, with white space collapsed."""
    for path in sorted(folder.rglob("*.py")):
        if {"test", "tests"} & set(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # some files of the library are templates
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = " ".join((ast.get_docstring(node, clean=False) or "").split())
                if len(text) >= SHORTEST:
                    yield text


def split(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Split into train and test rows. The text alone decides, so equal texts are on the same side on every machine."""
    sides: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        text = "\n".join((row.text, row.pair or "")).casefold()
        digest = hashlib.sha256(text.encode()).digest()
        sides[digest[0] % TEST_SHARE == 0].append(row)
    return sides


def encode(description: str, train: Sequence[Row], test: Sequence[Row]) -> Task:
    """Return the task of these rows, with labels numbered in the order of their names.

    Raises:
        ValueError: for an empty side, fewer than two labels, or a test label that no training row has.
    """
    if not train or not test:
        raise ValueError(f"{len(train)} training and {len(test)} test examples: both must be there")
    labels = sorted({row.label for row in train}, key=lambda label: (isinstance(label, str), label))
    number = {label: i for i, label in enumerate(labels)}
    unknown = sorted({str(row.label) for row in test if row.label not in number})
    if unknown:
        raise ValueError(f"no training example has the test labels {', '.join(unknown)}")
    if len(labels) < 2:
        raise ValueError(f"every training example has the label {labels[0]!r}: there is nothing to learn")
    sides = [[Example(row.text, row.pair, number[row.label]) for row in rows] for rows in (train, test)]
    return Task(description, [str(label) for label in labels], *sides)


def is_file(data: str) -> bool:
    return data.endswith((".jsonl", ".json", ".gz")) or Path(data).exists()


def read_splits(data: str) -> tuple[list[Row], list[Row]]:
    """Read train and test rows of a file (split by hash) or of a hub data set (its own splits)."""
    if is_file(data):
        return split(read_jsonl(Path(data)))
    splits = load_hub(data)
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    if "train" not in splits:
        raise ValueError(f"{data} has no split 'train', only {', '.join(splits)}")
    train = hub_rows(splits["train"], data)
    return (train, hub_rows(splits[held_out], data)) if held_out else split(train)


def read_all(data: str) -> list[Row]:
    """Read all rows of a file, or the test side of a hub data set."""
    return read_jsonl(Path(data)) if is_file(data) else read_splits(data)[1]


def read_jsonl(path: Path) -> list[Row]:
    """Read rows of ``{"sentence1", "sentence2" (optional), "label"}``, one JSON object a line, plain or gzip."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf8") as lines:
        return [
            make_row(json.loads(line), ("sentence1", "sentence2"), f"{path.name}, line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]


def load_hub(data: str) -> Any:
    """Load the splits of a hub data set, ``name`` or ``name:config``, with the package `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--data {data} is no file, and loading it from the hub needs a package: pip install datasets"
        ) from error
    name, _, config = data.partition(":")
    return datasets.load_dataset(name, config or None)


def hub_rows(rows: Iterable[dict[str, Any]], data: str) -> list[Row]:
    """Read the rows of one split. The first one or two columns of strings are the texts, "label" is the label."""
    rows = list(rows)
    columns = [key for key, value in rows[0].items() if isinstance(value, str) and key != "label"][:2] if rows else []
    if rows and not columns:
        raise ValueError(f"{data} has no column of texts, only {', '.join(rows[0])}")
    return [make_row(row, tuple(columns), f"{data}, row {number}") for number, row in enumerate(rows)]


def make_row(row: dict[str, Any], columns: tuple[str, ...], where: str) -> Row:
    """Return one row, checked.

    Raises:
        ValueError: for a missing text or label, and for a label that is neither an int nor a string.
    """
    missing = [key for key in (columns[0], "label") if row.get(key) is None]
    if missing:
        raise ValueError(f"{where}: no {' and no '.join(missing)}; expected sentence1, label and perhaps sentence2")
    label = row["label"]
    if isinstance(label, float):
        raise ValueError(
            f"{where}: label {label} is a float, which is regression; this program only classifies. "
            "Give labels as ints or strings"
        )
    if not isinstance(label, (int, str)):
        raise ValueError(f"{where}: label is a {type(label).__name__}; expected an int or a string")
    return Row(row[columns[0]], row.get(columns[1]) if len(columns) > 1 else None, label)
