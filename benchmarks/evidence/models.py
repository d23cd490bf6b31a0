"""Pretrained models: found, loaded once a process, and given a fresh head by the seed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.evidence.catalogue import Kind, task_named
from benchmarks.evidence.places import Places
from benchmarks.evidence.setting import Setting
from benchmarks.finetune import default_model

__all__ = ["Places", "load_model", "load_tokenizer", "projections"]

CLASSES: dict[Kind, Any] = {
    "classify": transformers.AutoModelForSequenceClassification,
    "regress": transformers.AutoModelForSequenceClassification,
    "continue": transformers.AutoModelForCausalLM,
    "rewrite": transformers.AutoModelForSeq2SeqLM,
}
PROJECTIONS = {
    "query": ("query", "q_proj", "q_lin", "query_proj", "q"),
    "value": ("value", "v_proj", "v_lin", "value_proj", "v"),
}
"""The last part of the name of an attention layer's projection, in BERT, Llama and BART, DistilBERT, DeBERTa, T5."""


def load_model(setting: Setting, places: Places, labels: int | None) -> nn.Module:
    """Return the pretrained model of a run, in float32 on the CPU, in evaluation mode.

    A second call in the process reads no file. What the pretrained model lacks, such as the head of a classifier, is
    drawn from `setting.seed`. GPT-2's fused projection is split, so that the model has a query and a value layer.

    Args:
        setting: names the task and the model.
        places: where model folders are.
        labels: `OpenTask.labels`.

    Raises:
        OSError: if the model is in no folder and cannot be loaded from the hub.
        ValueError: for a folder whose model does not suit the task.
    """
    kind = task_named(setting.task).kind
    source = find_model(setting.model, places)
    template, fresh = _template(source, kind, labels, setting.model_dropout, _missing(setting.model, places))
    model = copy.deepcopy(template)
    draw(model, fresh, setting.seed)
    return model


def load_tokenizer(setting: Setting, places: Places) -> Any:
    """Return the tokenizer of a run's model, with a pad token.

    Raises:
        OSError: as `load_model`.
    """
    return _tokenizer(find_model(setting.model, places), _missing(setting.model, places))


def find_model(name: str, places: Places) -> str:
    """Return the folder of a model, or the name itself, which is then one of the hub."""
    for folder in (*(folder / name for folder in _folders(places)), Path(name)):
        if (folder / "config.json").is_file():
            return str(folder)
    return default_model() if name == "all-MiniLM-L6-v2" else name


def projections(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the query and value layers, for example ``{"query": ["encoder.layer.0..."], ...}``.

    Raises:
        ValueError: for an architecture whose projections have no known names or are no `nn.Linear`.
    """
    found: dict[str, list[str]] = {name: [] for name in PROJECTIONS}
    for name, module in model.named_modules():
        for projection, endings in PROJECTIONS.items():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in endings:
                found[projection].append(name)
    if not found["query"] or len(found["query"]) != len(found["value"]):
        raise ValueError(
            f"{type(model).__name__}: {len(found['query'])} query and {len(found['value'])} value layers found. "
            f"Layers are known as nn.Linear with the names {', '.join(PROJECTIONS['query'])}: add the architecture's "
            f"to PROJECTIONS, or split its fused projection"
        )
    return found


class SplitProjection(nn.Module):
    """GPT-2's fused projection as three layers: the same function of the same numbers."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        weights, biases = fused.weight.detach().chunk(3, dim=1), fused.bias.detach().chunk(3)
        self.query, self.key, self.value = (_linear(*pair) for pair in zip(weights, biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.query(x), self.key(x), self.value(x)), dim=-1)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return the layer of a weight that is stored inputs first."""
    layer = nn.Linear(*weight.shape, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.t().contiguous())
    layer.bias = nn.Parameter(bias.clone())
    return layer


def split_projections(model: nn.Module) -> None:
    """Replace the fused projection of every self-attention of GPT-2."""
    for module in list(model.modules()):
        fused = getattr(module, "c_attn", None)
        if isinstance(fused, nn.Module) and fused.weight.shape[1] == 3 * fused.weight.shape[0]:
            module.c_attn = SplitProjection(fused)


def draw(model: nn.Module, names: tuple[str, ...], seed: int) -> None:
    """Draw the matrices of these parameters from a seed, as Hugging Face's models begin; vectors stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    std = getattr(model.config, "initializer_range", None) or getattr(model.config, "init_std", 0.02)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            if parameters[name].dim() > 1:
                parameters[name].normal_(0.0, std, generator=generator)


@functools.lru_cache(maxsize=2)
def _template(
    source: str, kind: Kind, labels: int | None, dropout: bool, missing: str
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model of a folder, and the names of the parameters that the folder does not have."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = _from_pretrained(transformers.AutoConfig, source, missing)
    if labels is not None:
        config.num_labels = labels
    if not dropout:
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
    config.pad_token_id = _tokenizer(source, missing).pad_token_id
    model, info = _from_pretrained(
        CLASSES[kind], source, missing, config=config, dtype=torch.float32, output_loading_info=True
    )
    # Training keeps no keys and values; decoding asks for them by itself.
    model.config.use_cache = False
    split_projections(model)
    known = {name for name, _ in model.named_parameters()}
    return model.eval(), tuple(sorted(known & set(info["missing_keys"])))


@functools.lru_cache(maxsize=8)
def _tokenizer(source: str, missing: str) -> Any:
    tokenizer = _from_pretrained(transformers.AutoTokenizer, source, missing)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_pretrained(loader: Any, source: str, missing: str, **options: Any) -> Any:
    """Load from a folder or the hub, with a message of one line where that fails."""
    local = Path(source).is_dir()
    try:
        return loader.from_pretrained(source, local_files_only=local, **options)
    except Exception as error:  # a library's own errors, several lines long, of many types
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if local:
            raise ValueError(f"{source} is no {loader.__name__[4:]} that transformers can load: {reason}") from error
        raise OSError(f"{missing} ({reason})") from error


def _missing(name: str, places: Places) -> str:
    """Return the message for a model that is nowhere."""
    looked = [str(folder) for folder in _folders(places)] or ["no folder, for none is given"]
    return (
        f"model {name!r} is not in {' nor in '.join(looked)}, and could not be loaded from the hub: where there is a "
        f"network, run 'hf download {name} --local-dir DIR/{name}', and give DIR as the folder of models"
    )


def _folders(places: Places) -> Iterator[Path]:
    if places.models is not None:
        yield places.models
    if places.data is not None:
        yield places.data / "models"
