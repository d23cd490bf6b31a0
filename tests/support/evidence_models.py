"""Folders of tiny models and small data, for the tests of the evidence's runner."""

import gzip
import json

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.evidence.setting import Setting

WORDS = ["red", "green", "blue", "round", "square", "large", "small", "cold", "warm", "loud", "a", "|", ":"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
COMMON = {"vocab_size": len(SPECIAL) + len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(max_position_embeddings=32, **SIZES, **COMMON),
    "roberta": lambda: transformers.RobertaConfig(max_position_embeddings=32, **SIZES, **COMMON),
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=1, max_position_embeddings=64, **SIZES, **COMMON),
    "gpt2": lambda: transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=64, **COMMON),
    "bart": lambda: transformers.BartConfig(
        d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=12, decoder_ffn_dim=12, max_position_embeddings=64, decoder_start_token_id=2,
        forced_eos_token_id=None, **COMMON,
    ),
    "neox": lambda: transformers.GPTNeoXConfig(max_position_embeddings=64, **SIZES, **COMMON),
}  # fmt: skip
PRETRAINED = {
    "bert": transformers.BertModel,
    "roberta": transformers.RobertaModel,
    "llama": transformers.LlamaForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "bart": transformers.BartForConditionalGeneration,
    "neox": transformers.GPTNeoXForCausalLM,
}


def write_model(folder, kind):
    """Write the folder of a random model with a vocabulary of words; return the pretrained model."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(3)
    model = PRETRAINED[kind](CONFIGS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)  # the usual start makes all tokens alike
        if kind in ("gpt2", "llama"):
            model.lm_head.weight[2] = 0.0  # or the beams would end all texts at once
        if kind == "bart":
            model.final_logits_bias[0, 2] = -5.0
    model.save_pretrained(folder)
    return model.eval()


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()))


def words(number, count=2):
    """Return a text of so many words."""
    return " ".join(WORDS[(number // 10**place) % 10] for place in range(count))


def pairs(count, labels=2, first=0):
    """Return rows of two texts and a label."""
    return [
        {"sentence1": words(i, 2 + i % 3), "sentence2": words(3 * i), "label": i % labels}
        for i in range(first, first + count)
    ]


def targets(count, each=1, first=0):
    """Return rows of an input and a target: `each` targets of every input."""
    return [
        {"input": f"{words(i, 3)} | {words(i)}", "target": words(7 * i + k, 2 + (i + k) % 4)}
        for i in range(first, first + count)
        for k in range(each)
    ]


def prompts(count, first=1000, **more):
    """Return rows of an input and two references."""
    return [
        {"input": words(i, 3 + i % 2), "references": [words(i, 3), words(i + 1, 2)], **more}
        for i in range(first, first + count)
    ]


def setting(task, model="llama", **given):
    values = {"row": "row", "method": "lora", "lr": 1e-3, "seed": 0, "split": "test", "steps": 10}
    return Setting(task=task, model=model, **{**values, "batch_size": 4, "max_length": 24, **given})
