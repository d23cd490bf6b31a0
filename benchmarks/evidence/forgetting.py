"""How far a decoder has left its pretrained self: its loss on texts that the pretrained model wrote."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.unfinished import write_whole

BATCH = 16

Texts = list[list[int]]
"""Texts as tokens, the first of which began each."""

_cache: dict[str, Texts] = {}


def own_texts(
    model: Any, tokenizer: Any, seed: int, count: int, length: int = 128, folder: Path | None = None
) -> Texts:
    """Return texts that a pretrained decoder writes, drawn from its own probabilities, on the CPU.

    A second call with equal weights returns the same texts at once.

    Args:
        model: before it is trained, on the CPU.
        tokenizer: names the token that texts begin with.
        seed: of the draws.
        count: number of texts.
        length: tokens of a text at most, after the first; fewer where the model's context ends.
        folder: keeps the texts for other processes. Default: they are kept for this one alone.

    Raises:
        ValueError: if the model is not on the CPU: other devices draw other texts.
    """
    parameters = list(model.parameters())
    if any(parameter.device.type != "cpu" for parameter in parameters):
        raise ValueError("own_texts() is called with the model on the CPU, so that every machine draws the same texts")
    length = min(length, (getattr(model.config, "max_position_embeddings", None) or length + 1) - 1)
    with torch.no_grad():
        weights = torch.stack([p.double().square().sum() for p in parameters]).sum().item()
    key = f"{weights.hex()}-{seed}-{count}-{length}"
    if key not in _cache:
        path = None if folder is None else folder / f"own-texts-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if path is not None and path.exists():
            _cache[key] = json.loads(path.read_text("utf8"))
        else:
            _cache[key] = _drawn(model, tokenizer, seed, count, length)
            if path is not None:
                write_whole(path, json.dumps(_cache[key]))
    return _cache[key]


@torch.no_grad()
def text_loss(model: Any, texts: Texts) -> float:
    """Return the mean loss of a token of these texts but for the first ones. The caller sets the evaluation mode."""
    device = next(model.parameters()).device
    sums = []
    by_length = sorted(texts, key=len)
    for start in range(0, len(texts), BATCH):
        ids, labels = _padded(by_length[start : start + BATCH])
        logits = model(input_ids=ids.to(device)).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.to(device).flatten(), reduction="sum")
        sums.append(loss.double())
    return torch.stack(sums).sum().item() / sum(len(text) - 1 for text in texts)


def _padded(texts: Texts) -> tuple[Tensor, Tensor]:
    """Return all but the last token of each text, and the next tokens, filled with what no loss is taken of."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(text[:-1]) for text in texts], batch_first=True)
    labels = nn.utils.rnn.pad_sequence([torch.tensor(text[1:]) for text in texts], batch_first=True, padding_value=-100)
    return ids, labels


def _drawn(model: Any, tokenizer: Any, seed: int, count: int, length: int) -> Texts:
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=True, num_beams=1, temperature=1.0, top_k=0, top_p=1.0, use_cache=True)
    config.update(max_length=None, max_new_tokens=length, pad_token_id=tokenizer.pad_token_id)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    texts: Texts = []
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, count, BATCH):
            ids = torch.full((min(BATCH, count - start), 1), begin)
            written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
            texts += [_ended(row, ends) for row in written.tolist()]
    model.train(training)
    return texts


def _ended(row: list[int], ends: list[int]) -> list[int]:
    """Return a text up to the token that ends it, that included."""
    last = next((i for i, token in enumerate(row) if i > 0 and token in ends), len(row) - 1)
    return row[: last + 1]
