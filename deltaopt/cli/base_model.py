"""The pretrained model that was fine-tuned, loaded by transformers, with an adapter of PEFT's on it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaopt.cli.adapters import AdapterFolder
from deltaopt.cli.movement import SavedWeight
from deltaopt.cli.outcome import UserError, reason_of
from deltaopt.messages import Problem, problem_lines

PREFIX = "base_model.model."
"""What PEFT puts in front of the names of the base's modules."""

AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""By PEFT's task type, the class of transformers that loads the model."""

LABELLED = ("SEQ_CLS", "TOKEN_CLS")
"""The tasks whose head has one row for each label, which the base's config does not know."""


def load_base(base: str, adapter: AdapterFolder, dtype: torch.dtype) -> nn.Module:
    """Return the pretrained model in the class that the adapter was trained on.

    Args:
        base: a folder, or a name on the Hub.
        adapter: whose config says the class or the task; else the base's own config does.
        dtype: of its weights.

    Raises:
        UserError: if there is none, or it cannot be read.
    """
    with quiet():
        import transformers
        from safetensors import SafetensorError

    if Path(base).is_file():
        raise UserError(f"--base {base} is a file: give the folder of the pretrained model")
    what = base if Path(base).is_dir() else f"--base {base} is no folder on this machine, and as a model of the Hub it"
    with quiet(), _short(what, OSError, ValueError, RuntimeError, KeyError, SafetensorError):
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
        name = _class_name(adapter, config)
        kind: Any = getattr(transformers, name, None)
        if name not in ("AutoModel", *AUTO.values()) and not _is_model(kind):
            raise ValueError(f"transformers has no model {name}, which the adapter was trained on")
        labels = _labels(adapter)
        if labels is not None:
            config.num_labels = labels
        return kind.from_pretrained(base, config=config, dtype=dtype).eval()  # type: ignore[no-any-return]


def with_adapter(base: nn.Module, adapter: AdapterFolder) -> nn.Module:
    """Put an adapter on the model, to be trained: returns the PeftModel.

    Raises:
        UserError: if PEFT refuses it.
    """
    with quiet():
        from peft import PeftModel
        from safetensors import SafetensorError

    with quiet(), _short(str(adapter.path), OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError):
        return PeftModel.from_pretrained(base, str(adapter.path), is_trainable=True).eval()  # type: ignore[no-any-return]


def check_fits(base: nn.Module, saved: Mapping[str, SavedWeight], name: str) -> None:
    """Raise UserError, in one sentence for many layers, if the base has not the layers that trained.

    Args:
        base: without an adapter.
        saved: by the triples' names.
        name: of the base, for messages.
    """
    modules = dict(base.named_modules())
    problems = []
    for label, (ledger, _) in saved.items():
        W = _weight(modules, label.removeprefix(PREFIX))
        if W is None:
            problems.append(Problem(label, "it has no such layer"))
        elif ledger.W is not None and list(W.shape) != ledger.W["shape"]:
            problems.append(
                Problem(label, f"its W is {tuple(W.shape)}, and was {tuple(ledger.W['shape'])} in training")
            )
    if problems:
        raise UserError(f"--base {name} is not the model that was fine-tuned: " + "; ".join(problem_lines(problems)))


def _weight(modules: Mapping[str, nn.Module], name: str) -> Tensor | None:
    """Return the weight of the module of this name, or the parameter (``target_parameters``); None if there is none."""
    owner, _, attribute = name.rpartition(".")
    found = modules[name].weight if name in modules else getattr(modules.get(owner), attribute, None)
    return found if isinstance(found, Tensor) else None


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor | None:
    """Return what a language model or a classifier computes for eight tokens; None of another model."""
    config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) != "input_ids" or getattr(config, "is_encoder_decoder", False):
        return None
    size = getattr(config.get_text_config(), "vocab_size", 0)
    if size < 2:
        return None
    ids = torch.arange(1, 9).remainder(size).unsqueeze(0)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    first = output.get("logits", output.get("last_hidden_state"))
    return first if isinstance(first, Tensor) else None


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out progress bars, the notes of other libraries, and PEFT's warning of the key for a moved W."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.utils import logging as transformers_logging

            bars = transformers_logging.is_progress_bar_enabled()
            transformers_logging.disable_progress_bar()
            try:
                yield
            finally:
                if bars:
                    transformers_logging.enable_progress_bar()
    finally:
        logging.disable(disabled)


@contextmanager
def _short(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn what another library says of an input into a UserError of one short line."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what} cannot be loaded: {reason_of(error)}") from error


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "from_pretrained")


def _class_name(adapter: AdapterFolder, config: Any) -> str:
    mapping = adapter.config.get("auto_mapping")
    if isinstance(mapping, dict) and mapping.get("base_model_class"):
        return str(mapping["base_model_class"])
    task = adapter.config.get("task_type")
    return AUTO.get(str(task)) or next(iter(config.architectures or []), "AutoModel")


def _labels(adapter: AdapterFolder) -> int | None:
    """Return the number of rows of the head that was trained with the adapter; None if none was."""
    if adapter.config.get("task_type") not in LABELLED:
        return None
    heads = [
        tensor.shape[0]
        for name, tensor in adapter.tensors.items()
        if "lora_" not in name and name.endswith(".weight") and tensor.dim() == 2
    ]
    return heads[-1] if heads else None
