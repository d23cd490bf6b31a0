"""Examples as tokens: made once a process for each task, model and length, and padded batch by batch."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.evidence.catalogue import task_named
from benchmarks.evidence.examples import Example, load_examples
from benchmarks.evidence.models import find_model, load_tokenizer
from benchmarks.evidence.places import Places
from benchmarks.evidence.setting import Setting

IGNORED = -100
"""The label of a position that no loss is taken of."""


class Ragged:
    """Sequences of unequal length in one tensor."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        held = list(sequences)
        self.lengths = torch.tensor([len(sequence) for sequence in held], dtype=torch.long)
        self._ends = self.lengths.cumsum(0)
        flat = array("i", itertools.chain.from_iterable(held)) or array("i", [0])
        self._flat = torch.frombuffer(flat, dtype=torch.int32).clone()

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, rows: Tensor, fill: int, left: bool = False) -> tuple[Tensor, Tensor]:
        """Return these rows as one tensor of the longest one's length, and where it holds tokens.

        Args:
            rows: numbers of sequences.
            fill: what the rest is filled with.
            left: fill at the left.
        """
        lengths = self.lengths[rows, None]
        longest = int(lengths.max())
        place = torch.arange(longest)[None]
        place = place - (longest - lengths) if left else place
        mask = (place >= 0) & (place < lengths)
        source = (self._ends[rows, None] - lengths + place).clamp_(0, len(self._flat) - 1)
        return self._flat[source].long().masked_fill_(~mask, fill), mask


@dataclass(frozen=True)
class Side:
    """The training or the evaluated examples as tokens.

    Attributes:
        columns: what the model is given, by the name of its argument.
        labels: a number for each example, or a sequence of tokens.
    """

    columns: dict[str, Ragged]
    labels: Tensor | Ragged

    def __len__(self) -> int:
        return len(self.columns["input_ids"])


@dataclass(frozen=True)
class Tokens:
    """All that a run reads.

    Attributes:
        train: the training examples.
        evaluated: the evaluated ones; where texts are written, each input with each of its references.
        parts: the part that each evaluated example belongs to.
        prompts: the evaluated inputs, for tasks that write texts.
        end: the token that ends a written text, and None for other tasks.
        longest: tokens of the longest training target with its end.
    """

    train: Side
    evaluated: Side
    parts: list[str]
    prompts: Ragged
    end: int | None
    longest: int


def load_tokens(setting: Setting, places: Places) -> Tokens:
    """Return the examples of a run as tokens; a second call in the process returns the same ones.

    Raises:
        ValueError, OSError, ModuleNotFoundError: as `load_examples` and `load_tokenizer`.
    """
    source = find_model(setting.model, places)
    key = (setting.task, source, setting.split, setting.max_length, setting.train_examples, setting.test_examples)
    if (key, places) not in _cache:
        while len(_cache) >= 4:
            _cache.pop(next(iter(_cache)))
        _cache[key, places] = _tokens(setting, places, source)
    return _cache[key, places]


_cache: dict[Any, Tokens] = {}


def _tokens(setting: Setting, places: Places, source: str) -> Tokens:
    task, examples = task_named(setting.task), load_examples(setting, places)
    tokenizer = load_tokenizer(setting, places)
    parts = [example.part for example in examples.evaluated]
    if not task.writes:
        sides = [_labelled(side, tokenizer, setting.max_length) for side in (examples.train, examples.evaluated)]
        return Tokens(*sides, parts, Ragged([]), None, 0)
    make = _continued if task.kind == "continue" else _rewritten
    form = Form.of(tokenizer, source)
    pairs = [[(e.text, target) for e in side for target in e.targets] for side in (examples.train, examples.evaluated)]
    train, longest = make(pairs[0], tokenizer, form, setting.max_length)
    evaluated, _ = make(pairs[1], tokenizer, form, setting.max_length)
    inputs = [example.text for example in examples.evaluated]
    return Tokens(train, evaluated, parts, _prompts(inputs, tokenizer, form, task.kind, setting), form.end, longest)


def _labelled(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Side:
    pairs = [example.pair or "" for example in examples] if any(example.pair for example in examples) else None
    texts = [example.text for example in examples]
    read = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    labels = [example.label for example in examples]
    whole = all(isinstance(label, int) for label in labels)
    columns = {name: Ragged(read[name]) for name in ("input_ids", "token_type_ids") if name in read}
    return Side(columns, torch.tensor(labels, dtype=torch.long if whole else torch.float32))


@dataclass(frozen=True)
class Form:
    """How a decoder sees an example: ``start input separator target end``, as in the LoRA paper's code.

    The separator is the token that begins a text and the end the one that ends a text in the pretrained model: for
    GPT-2 both are "<|endoftext|>".

    Attributes:
        start: what the tokenizer puts before every text; empty for GPT-2.
        separator, end: one token each.
        lead: what a target begins with: a space, where the vocabulary tells "The" from " The".
        decoder_start: the first token that an encoder-decoder's decoder reads.
    """

    start: tuple[int, ...]
    separator: int
    end: int
    lead: str
    decoder_start: int | None

    @classmethod
    def of(cls, tokenizer: Any, source: str) -> Form:
        try:
            generation = transformers.GenerationConfig.from_pretrained(source)
        except OSError:
            generation = transformers.GenerationConfig()
        ends = generation.eos_token_id
        end = ends[0] if isinstance(ends, list) else ends
        end = end if end is not None else tokenizer.eos_token_id
        if end is None:
            raise ValueError(
                f"{source}: neither its generation config nor its tokenizer names a token that ends a text"
            )
        separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
        read = tokenizer("a").input_ids
        start = (read[0],) if read[0] == tokenizer.bos_token_id else ()
        plain = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)[0]
        lead = "" if plain.startswith(("▁", "Ġ")) else " "
        config = transformers.AutoConfig.from_pretrained(source)
        return cls(start, separator, end, lead, getattr(config, "decoder_start_token_id", None))


def _ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of texts without special ones; each distinct text is read once."""
    distinct = list(dict.fromkeys(texts))
    read: list[list[int]] = tokenizer(distinct, add_special_tokens=False).input_ids if distinct else []
    of = dict(zip(distinct, read, strict=True))
    return [of[text] for text in texts]


def _prompt(ids: Sequence[int], form: Form, room: int) -> list[int]:
    """Return the tokens before a target, at most `room`: the end of a long input is left out."""
    room -= len(form.start) + 1
    return [*form.start, *ids[: max(room, 0)], form.separator]


def _continued(pairs: Sequence[tuple[str, str]], tokenizer: Any, form: Form, max_length: int) -> tuple[Side, int]:
    """Return inputs, and labels that are moved to the position that predicts them; and the longest target."""
    inputs = _ids([text for text, _ in pairs], tokenizer)
    targets = _ids([form.lead + target for _, target in pairs], tokenizer)
    read, labels = [], []
    longest = 0
    for text, target in zip(inputs, targets, strict=True):
        written = [*target, form.end][: max_length - len(form.start) - 1]
        longest = max(longest, len(written))
        prompt = _prompt(text, form, max_length - len(written))
        read.append([*prompt, *written[:-1]])
        labels.append([IGNORED] * (len(prompt) - 1) + written)
    return Side({"input_ids": Ragged(read)}, Ragged(labels)), longest


def _rewritten(pairs: Sequence[tuple[str, str]], tokenizer: Any, form: Form, max_length: int) -> tuple[Side, int]:
    """Return inputs of the encoder and of the decoder, and the labels; and the longest target."""
    if form.decoder_start is None:
        raise ValueError("the model's config has no decoder_start_token_id: it is no encoder-decoder")
    inputs = tokenizer([text for text, _ in pairs], truncation=True, max_length=max_length).input_ids
    targets = tokenizer(text_target=[target for _, target in pairs], truncation=True, max_length=max_length).input_ids
    columns = {
        "input_ids": Ragged(inputs),
        "decoder_input_ids": Ragged([form.decoder_start, *target[:-1]] for target in targets),
    }
    return Side(columns, Ragged(targets)), max(map(len, targets), default=0)


def _prompts(texts: Sequence[str], tokenizer: Any, form: Form, kind: str, setting: Setting) -> Ragged:
    if kind == "rewrite":
        return Ragged(tokenizer(texts, truncation=True, max_length=setting.max_length).input_ids)
    return Ragged(_prompt(ids, form, setting.max_length - 1) for ids in _ids(texts, tokenizer))
