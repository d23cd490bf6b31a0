"""The examples of a run: read, checked, and divided into those that train and those that are evaluated."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import finetune_data
from benchmarks.evidence.catalogue import Task, task_named
from benchmarks.evidence.places import Places
from benchmarks.evidence.setting import Setting

HELD_OUT = 1000
"""Examples of the training data that a tuning run is measured on, about; a fifth of them where the data is small."""


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        text: the input, `pair` its second text.
        label: a class, or a number for regression; None where a text is written.
        targets: the texts to write: one where the example trains, all references where it is evaluated.
        part: of the evaluated examples that it belongs to: "seen" or "unseen", or the ending of a second split.
    """

    text: str
    pair: str | None = None
    label: float | None = None
    targets: tuple[str, ...] = ()
    part: str = ""


@dataclass(frozen=True)
class Examples:
    """The examples of a run, in their fixed order, and the number of classes."""

    train: list[Example]
    evaluated: list[Example]
    labels: int | None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that tell sets of examples apart."""
        digest = hashlib.sha256()
        for side in (self.train, self.evaluated):
            for example in side:
                row = (example.text, example.pair, example.label, example.targets, example.part)
                digest.update(json.dumps(row).encode() + b"\n")
            digest.update(b"\n")
        return digest.hexdigest()[:16]


def load_examples(setting: Setting, places: Places) -> Examples:
    """Return the examples of a run.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: if the task is unknown, or its data is missing or does not
            fit; the message says what to do.
    """
    return _examples(setting.task, setting.split == "tuning", setting.train_examples, setting.test_examples, places)


@functools.lru_cache(maxsize=8)
def _examples(name: str, tuning: bool, train_limit: int | None, test_limit: int | None, places: Places) -> Examples:
    task = task_named(name)
    if name == "docstrings":
        train, test, labels = _docstrings(places)
    else:
        rows, labels = _read(name, task, places, "train"), None if task.writes else task.labels
        train = [_example(name, task, row, where) for row, where in rows]
        test = _test(name, task, places)
    if tuning:  # the test split has been read, so that one that is missing is noticed before the tuning
        train, test = hold_out(train)
    for side, found in (("train on", train), ("measure on", test)):
        if not found:
            raise ValueError(f"{name}: no example is left to {side}")
    return Examples(train[:train_limit], _limited(test, test_limit), labels)


def hold_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Divide training examples into those that train and about a thousand, a fifth at most, to tune on.

    The input alone decides, so that no input is on both sides, on any machine. References of one input are joined.
    """
    share = min(0.2, HELD_OUT / max(len(examples), 1))
    train: list[Example] = []
    held: dict[str, Example] = {}
    for number, example in enumerate(examples):
        key = _key(example)
        if int(_digest("tuning", key)[:8], 16) >= share * 16**8:
            train.append(example)
        elif example.targets and key in held:
            held[key] = dataclasses.replace(held[key], targets=held[key].targets + example.targets)
        else:
            held[key if example.targets else f"{number}"] = example
    return train, list(held.values())


def _limited(test: Sequence[Example], limit: int | None) -> list[Example]:
    """Return so many examples of each split, spread over it: some are sorted, WebNLG's by size and category."""
    if limit is None:
        return list(test)
    endings = dict.fromkeys(example.part for example in test) if all(e.label is not None for e in test) else {}
    if len(endings) < 2:
        return _spread(test, limit)
    return [example for part in endings for example in _spread([e for e in test if e.part == part], limit)]


def _spread(examples: Sequence[Example], limit: int) -> list[Example]:
    count = min(limit, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def _key(example: Example) -> str:
    return "\n".join((example.text, example.pair or "")).casefold()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _docstrings(places: Places) -> tuple[list[Example], list[Example], int]:
    """Return the docstrings of the data folder, or else those of the running interpreter's library."""
    folder = places.data / "docstrings" if places.data is not None else None
    if folder is not None and folder.is_dir():
        sides = [finetune_data.read_jsonl(_file(folder, "docstrings", name)) for name in ("train", "test")]
        read = finetune_data.encode("docstrings", *sides)
    else:
        read = finetune_data.docstring_task()
    train, test = (
        [Example(example.text, example.pair, example.label) for example in side] for side in (read.train, read.test)
    )
    return _mixed(train), _mixed(test), len(read.labels)


def _mixed(examples: Iterable[Example]) -> list[Example]:
    """Return examples that were sorted by label in an order in which the first ones are of every label."""
    return sorted(examples, key=lambda example: (_digest("order", _key(example)), example.text))


def write_docstrings(folder: Path) -> list[Path]:
    """Write the docstrings of the running interpreter's library below a data folder: Python versions differ in them."""
    read = finetune_data.docstring_task()
    written = []
    for name, side in (("train", read.train), ("test", read.test)):
        path = folder / "docstrings" / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"sentence1": example.text, "label": read.labels[example.label]} for example in side]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
        written.append(path)
    return written


def _test(name: str, task: Task, places: Places) -> list[Example]:
    """Return the examples of the test split, and those of a second one where it is given."""
    test = [_example(name, task, row, where) for row, where in _read(name, task, places, task.test)]
    if task.more is not None:
        split, ending = task.more
        rows = _read(name, task, places, split, needed=False)
        test += [dataclasses.replace(_example(name, task, row, where), part=ending) for row, where in rows]
    return test


def _read(
    name: str, task: Task, places: Places, split: str, needed: bool = True
) -> list[tuple[Mapping[str, Any], str]]:
    """Return the rows of a split, each with the place that messages name: from the data folder, or else the hub."""
    folder = places.data / task.folder if places.data is not None else None
    if folder is not None and folder.is_dir():
        if not needed and _found(folder, split) is None:
            return []
        return _read_file(_file(folder, name, split))
    if not task.hub:
        where = f"{places.data} has no folder {task.folder}" if places.data is not None else "no data folder is given"
        raise FileNotFoundError(f"{name}: {where}: give the folder that holds {task.folder}/ (--data)")
    return _read_hub(name, task, split, places)


def _found(folder: Path, split: str) -> Path | None:
    paths = (folder / f"{split}.jsonl.gz", folder / f"{split}.jsonl")
    return next((path for path in paths if path.is_file()), None)


def _file(folder: Path, name: str, split: str) -> Path:
    path = _found(folder, split)
    if path is None:
        held = ", ".join(sorted(path.name for path in folder.glob("*.jsonl*"))) or "nothing"
        raise FileNotFoundError(f"{name}: {folder} has no {split}.jsonl.gz, only {held}")
    return path


def _read_file(path: Path) -> list[tuple[Mapping[str, Any], str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    rows: list[tuple[Mapping[str, Any], str]] = []
    try:
        with opener(path, "rt", encoding="utf8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append((json.loads(line), f"{path}, line {number}"))
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be read after {len(rows)} rows: {error}") from error
    return rows


def _read_hub(name: str, task: Task, split: str, places: Places) -> list[tuple[Mapping[str, Any], str]]:
    where = f"{places.data} has no folder {task.folder}" if places.data is not None else "no data folder is given"
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{name}: {where}, and the hub's data needs a package: pip install datasets"
        ) from error
    hub_split = {task.test: task.hub_splits[0], **({task.more[0]: task.hub_splits[-1]} if task.more else {})}
    try:
        rows = datasets.load_dataset(*task.hub, split=hub_split.get(split, split))
    except Exception as error:  # whatever the hub's client raises without a network, or for a data set that is gone
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"{name}: {where}, and {'/'.join(task.hub)} could not be loaded from the hub: {reason[0]}"
        ) from error
    files = ("input", "target") if task.writes else ("sentence1", "sentence2")
    renamed = dict(zip(task.columns, files, strict=False))
    return [
        ({renamed.get(key, key): value for key, value in row.items()}, f"{'/'.join(task.hub)}, row {number}")
        for number, row in enumerate(rows)
    ]


def _example(name: str, task: Task, row: Mapping[str, Any], where: str) -> Example:
    """Return the example of a row.

    Raises:
        ValueError: for a row without a text, and for a label or a target that does not fit the task.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
    if task.writes:
        return _written(row, where)
    text, pair, label = row.get("sentence1"), row.get("sentence2"), row.get("label")
    if not isinstance(text, str):
        raise ValueError(f"{where}: no sentence1")
    number = isinstance(label, (int, float)) and not isinstance(label, bool)
    if task.kind == "regress":
        if not number:
            raise ValueError(f"{where}: label {label!r}; {name} is regression and expects a number")
    elif not number or label not in range(task.labels or 0):
        raise ValueError(f"{where}: label {label!r}; {name} expects one of 0 to {(task.labels or 0) - 1}")
    return Example(text, pair, label)


def _written(row: Mapping[str, Any], where: str) -> Example:
    text = row.get("input")
    targets = row.get("references", [row.get("target")])
    if not isinstance(text, str):
        raise ValueError(f"{where}: no input")
    if not targets or not all(isinstance(target, str) and target for target in targets):
        raise ValueError(f"{where}: no target and no references")
    seen = row.get("seen")
    return Example(text, targets=tuple(targets), part="" if seen is None else "seen" if seen else "unseen")
