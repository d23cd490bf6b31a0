"""Writing texts with beams, many inputs at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.evidence.setting import Setting
from benchmarks.evidence.tokens import Ragged

TOKENS = 65_536
"""Tokens of prompt and text that a batch of beams may have, over all its beams; more on a GPU if the cache is small."""

CACHE_BYTES = 2**31
"""Of the keys and values of a batch on a GPU, in float32, if it has more than `TOKENS`."""


class NoRepeat(LogitsProcessor):
    """Forbid every token that would repeat a run of `size` tokens of the written text; the prompt does not count.

    As in the LoRA paper's code. Transformers' own processor counts the prompt, and loops over the beams on the host.

    Args:
        size: tokens in a run.
        prompt: the length of the prompt, which all rows share.
    """

    def __init__(self, size: int, prompt: int) -> None:
        self.size, self.prompt = size, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        written = input_ids[:, self.prompt :]
        if written.shape[1] < self.size:
            return scores
        runs = written.unfold(1, self.size, 1)
        last = written[:, None, written.shape[1] - self.size + 1 :]
        repeats = (runs[:, :, :-1] == last).all(-1)
        # A run that repeats nothing forbids a column that is then cut off.
        column = torch.where(repeats, runs[:, :, -1], scores.shape[1])
        forbidden = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
        return scores.masked_fill(forbidden.scatter_(1, column, True)[:, :-1], -torch.inf)


def write(
    model: Any, prompts: Ragged, tokenizer: Any, setting: Setting, end: int, new_tokens: int, device: torch.device
) -> list[str]:
    """Return what the model writes for each prompt.

    Args:
        model: with `generate`: a decoder, or an encoder-decoder.
        prompts: the inputs, in the order of the texts.
        tokenizer: with a pad token.
        setting: names the beams.
        end: the token that ends a text.
        new_tokens: tokens of a text at most.
        device: where the model is.
    """
    decoder = not model.config.is_encoder_decoder
    context = getattr(model.config, "max_position_embeddings", None)
    texts = [""] * len(prompts)
    for rows in _batches(prompts.lengths.tolist(), setting.beams, new_tokens, _budget(model.config, device)):
        ids, mask = prompts.padded(torch.tensor(rows), tokenizer.pad_token_id, left=decoder)
        width = ids.shape[1] if decoder else 1
        room = new_tokens if context is None else min(new_tokens, context - width)
        config = _decoding(model, setting, end, tokenizer.pad_token_id, max(room, 1))
        processors = [NoRepeat(setting.no_repeat, width)] if setting.no_repeat else []
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.long().to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
        )[:, width:].tolist()
        for row, tokens in zip(rows, written, strict=True):
            kept = tokens[: tokens.index(end)] if end in tokens else tokens
            texts[row] = " ".join(tokenizer.decode(kept, skip_special_tokens=True).split())
    return texts


def _budget(config: Any, device: torch.device) -> int:
    """Return the tokens that a batch may have."""
    if device.type != "cuda":
        return TOKENS
    of_token = 2 * 4 * config.num_hidden_layers * config.hidden_size
    return max(TOKENS, CACHE_BYTES // of_token)


def _batches(lengths: Sequence[int], beams: int, new_tokens: int, budget: int) -> list[list[int]]:
    """Return the numbers of the prompts in batches of like length, the longest ones first."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if not batches or (len(batches[-1]) + 1) * beams * (lengths[batches[-1][0]] + new_tokens) > budget:
            batches.append([])
        batches[-1].append(row)
    return batches


def _decoding(model: Any, setting: Setting, end: int, pad: int, new_tokens: int) -> Any:
    """Return the model's own generation config with the beams of the setting."""
    config = copy.deepcopy(model.generation_config)
    config.update(
        max_length=None,
        min_length=0,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=setting.beams,
        length_penalty=setting.length_penalty,
        early_stopping=False,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return config
