"""TRL's trainers with a reference model, run for a few steps, and what their reference was meanwhile.

The model is a small Llama with random weights, and the tokenizer is made here. DELTAOPT_TEST_MODEL=folder takes the
model and the tokenizer of that folder instead.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer
from tests.support.models import peft, transformers
from tests.support.strategies import RULES

datasets = pytest.importorskip("datasets", reason="runs where datasets is installed")
trl = pytest.importorskip("trl", reason="runs where trl is installed")
tokenizers = pytest.importorskip("tokenizers", reason="runs where tokenizers is installed")
trl_utils = pytest.importorskip("trl.trainer.utils")

FOLDER = os.environ.get("DELTAOPT_TEST_MODEL")
VOCABULARY = 512
STEPS = 4
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
LEARNING_RATE = 5e-3
UPDATE_RATIO = 2.0

NOT_COMPARED = ("step_time", "rewards/accuracies")
"""Ends of names of what a trainer logs: at first the rewards are equal, and which is larger turns on a rounding."""

PROMPTS = [
    "Once upon",
    "There was",
    "A red cat",
    "The old man",
    "Tim and Sue",
    "One day the",
    "In the park",
    "My little",
]
CHOSEN = [" a time", " a dog ", " sat on", " smiled", " played", " sun was", " it rain", " friend "]
REJECTED = [" zzz", " the the", " qq", " no no", " xyxy", " !!!", " 12345", " of of"]


def language_model() -> nn.Module:
    """A small Llama in float32; the same bits at each call."""
    if FOLDER is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,  # with the usual 0.02 every token is as likely as the others
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def tokenizer() -> Any:
    """A byte-level tokenizer of 512 tokens: three special ones, the bytes, and pairs of letters."""
    if FOLDER is not None:
        return transformers.AutoTokenizer.from_pretrained(FOLDER)
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    pieces = ["<pad>", "<s>", "</s>", *sorted(byte_level.alphabet())]
    pairs = list(product(ascii_lowercase, repeat=2))[: VOCABULARY - len(pieces)]
    pieces += ["".join(pair) for pair in pairs]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    parts = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
    parts.pre_tokenizer = byte_level(add_prefix_space=False)
    parts.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=parts, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def lora_config() -> Any:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")


def fresh_adapter() -> nn.Module:
    """The model with an adapter whose product is zero."""
    torch.manual_seed(1)
    return peft.get_peft_model(language_model(), lora_config())


def trained_adapter() -> nn.Module:
    """The model with an adapter as fine-tuning leaves it: no product is zero."""
    model = fresh_adapter()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
    return model


FIRST_OPTIMIZERS: WeakKeyDictionary[nn.Module, DeltaLoRAOptimizer] = WeakKeyDictionary()
"""The optimizer of each model's first stage."""


def moved_adapter() -> nn.Module:
    """The model after a first stage that has trained the adapter and moved W."""
    model = fresh_adapter()
    optimizer = FIRST_OPTIMIZERS[model] = delta_lora(model)
    inputs = tokenizer()(PROMPTS, return_tensors="pt", padding=True)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    return model


def delta_lora(model: nn.Module, **options: Any) -> DeltaLoRAOptimizer:
    return DeltaLoRAOptimizer.for_model(
        model, torch.optim.AdamW, lr=LEARNING_RATE, **{"update_ratio": UPDATE_RATIO, **options}
    )


def plain_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


@dataclass(frozen=True)
class Start:
    """What a user hands to the trainer.

    Args:
        model: makes it.
        config: the trainer adds the adapter, with `peft_config=`; the optimizer is built after the trainer then.
        options: of the optimizer.
        product: A B is not zero when W begins to move, so that the folded rule writes W.
        warning: a pattern of what the optimizer warns of when it is built; None if it does not warn.
        optimizer: makes it of the model, in the place of a new one of ours.
    """

    model: Callable[[], nn.Module]
    config: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    product: bool = False
    warning: str | None = None
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None


STARTS = {
    "fresh": Start(fresh_adapter),
    "trained": Start(trained_adapter, product=True),
    "moved": Start(moved_adapter, product=True, warning="As they are now they are the base of this one"),
    "continued": Start(moved_adapter, optimizer=lambda model: FIRST_OPTIMIZERS[model]),
    "continued_plainly": Start(moved_adapter, optimizer=lambda model: plain_optimizer(model)),
    "config": Start(language_model, config=True),
    "config_later": Start(language_model, config=True, options={"start_step": 2}, product=True),
    "config_merged": Start(lambda: trained_adapter().merge_and_unload(), config=True),
}
"""In each of them TRL's reference is the model as it is handed over."""
FEW = ("moved", "continued", "continued_plainly", "config_merged")
"""Starts that two kinds of trainers are enough for."""


def token_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward a completion by its tokens alone; nearly every other completion gets another reward."""
    return [sum(token % 7 for token in tokens) / max(1, len(tokens)) for tokens in completion_ids]


PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]
LABELLED = [
    {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
    for row, kind in zip(PAIRS, ["chosen", "rejected"] * 4, strict=True)
]
GENERATION = {"num_generations": 4, "max_completion_length": 8}


@dataclass(frozen=True)
class Kind:
    """One of TRL's trainers, its configuration, and what it trains on."""

    trainer: type
    config: type
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "dpo": Kind(trl.DPOTrainer, trl.DPOConfig, PAIRS, {"max_length": 32}),
    "kto": Kind(trl.KTOTrainer, trl.KTOConfig, LABELLED, {"max_length": 32, "train_sampling_strategy": "sequential"}),
    "grpo": Kind(trl.GRPOTrainer, trl.GRPOConfig, PAIRS, GENERATION, {"reward_funcs": token_reward}),
    "rloo": Kind(trl.RLOOTrainer, trl.RLOOConfig, PAIRS, GENERATION, {"reward_funcs": token_reward}),
}
GENERATING = ("grpo", "rloo")
CASES = [
    (kind, start, rule)
    for kind, start, rule in product(KINDS, STARTS, RULES)
    if (start not in FEW or kind in ("dpo", "grpo")) and (STARTS[start].optimizer is None or rule == "in_place")
]
"""Of each kind every start, but for `FEW`; both rules, unless the optimizer is not a new one."""


def trainer_for(
    kind: str,
    start: str,
    rule: str,
    folder: Path,
    model: nn.Module,
    ref_model: nn.Module | None,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """Build a trainer of `model` that takes `STEPS` steps with `rule`.

    Args:
        kind: of `KINDS`.
        start: of `STARTS`; `model` is one of its.
        rule: of the optimizer.
        folder: the trainer's.
        model: trains.
        ref_model: the reference in place of TRL's own; TRL replaces its forward pass.
        settings: of the trainer's configuration.
        options: of the optimizer, next to those of the start.
    """
    chosen, begin = KINDS[kind], STARTS[start]

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        if begin.optimizer is not None:
            return begin.optimizer(model)
        with nullcontext() if begin.warning is None else pytest.warns(UserWarning, match=begin.warning):
            return delta_lora(model, weight_update=rule, **begin.options, **options)

    args = chosen.config(
        output_dir=str(folder),
        beta=0.1,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
        **{**chosen.settings, **settings},
    )
    arguments: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": datasets.Dataset.from_list(chosen.rows),
        "processing_class": tokenizer(),
        **chosen.arguments,
    }
    if ref_model is not None and kind not in GENERATING:
        arguments["ref_model"] = ref_model
    if begin.config:
        trainer = chosen.trainer(**arguments, peft_config=lora_config())
        trainer.optimizer = optimizer_of(trainer.model)
    else:
        trainer = chosen.trainer(**arguments, optimizers=(optimizer_of(model), None))
    if ref_model is not None and kind in GENERATING:
        # These trainers read the attribute, but take no argument for it.
        trl_utils.add_fused_lm_head(ref_model, temperature=trainer.temperature)
        trainer.ref_model = ref_model.eval()
    return trainer


@dataclass(frozen=True)
class Run:
    """What a run showed: of each forward pass of the reference, of each step, and of its end."""

    passes: list[float]
    """How far the reference's log-probabilities were off in each forward pass that the trainer made of it, at most."""
    off: list[float]
    """How far the reference's logits were off after each step, at most."""
    moved: list[float]
    """How far the policy's logits had moved after each step, at most."""
    largest: float
    """The largest logit of the reference."""
    uncorrected: float
    """How far the logits of a reference with the W of the trained model are off in the end, at most."""
    logged: list[dict[str, float]]
    """What the trainer logged of each step, without what is `NOT_COMPARED`."""


def run(
    kind: str,
    start: str,
    rule: str,
    folder: Path,
    reference: str = "own",
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Train for `STEPS` steps.

    Args:
        kind: of `KINDS`.
        start: of `STARTS`.
        rule: of the optimizer.
        folder: the trainer's; nothing is written into it.
        reference: "own" leaves it to the trainer; "frozen" hands it a frozen copy of the model, "precomputed" lets the
            trainer compute its log-probabilities before the first step.
        settings: of the trainer's configuration.
        **options: of the optimizer, next to those of the start.
    """
    model = STARTS[start].model()
    frozen = frozen_copy(model)
    ref_model = merged_copy(model) if reference == "frozen" else None
    settings = {"precompute_ref_log_probs": True} if reference == "precomputed" else settings or {}
    trainer = trainer_for(kind, start, rule, folder, model, ref_model, settings, options)
    record = ReferenceRecord(trainer, frozen)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == len(record.off) == STEPS
    logged = [{name: value for name, value in entry.items() if not name.endswith(NOT_COMPARED)} for entry in steps]
    largest = float(record.expected.abs().max())
    return Run(record.passes, record.off, record.moved, largest, record.uncorrected(), logged)


class ReferenceRecord(transformers.TrainerCallback):
    """Compare the trainer's reference with a frozen copy of the model, in its forward passes and after each step.

    Args:
        trainer: records itself there.
        frozen: the model that the reference has to be, in which nothing trains.
    """

    def __init__(self, trainer: Any, frozen: nn.Module) -> None:
        self.model, self.frozen = trainer.model, frozen
        self.ids = trainer.processing_class(PROMPTS, return_tensors="pt", padding=True)
        self.expected = _logits(frozen, self.ids)
        self.passes: list[float] = []
        self.off: list[float] = []
        self.moved: list[float] = []
        self._own_pass = False
        trainer.model.register_forward_hook(self._after_forward, with_kwargs=True)
        trainer.add_callback(self)

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], outputs: Any) -> None:
        if self._own_pass or not inputs.get("fused_lm_head") or not adapter_rests(model):
            return
        targets = inputs["labels"][:, 1:]
        logits = _logits(self.frozen, inputs)[:, :-1]
        expected = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        self.passes.append(float((outputs.log_probs - expected)[targets != -100].abs().max()))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._own_pass = True
        with reference_of(self.model):
            self.off.append(float((_logits(self.model, self.ids) - self.expected).abs().max()))
        self.moved.append(float((_logits(self.model, self.ids) - self.expected).abs().max()))
        self._own_pass = False

    def uncorrected(self) -> float:
        """How far the reference is off, at most, if it has the W that the model has now."""
        model = copy.deepcopy(self.frozen)
        inside = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        with torch.no_grad():
            for name, layer in lora_layers(self.model).items():
                base = inside.get_submodule(name)
                getattr(base, "base_layer", base).weight.copy_(layer.base_layer.weight)
        return float((_logits(model, self.ids) - self.expected).abs().max())


def frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def merged_copy(model: nn.Module) -> nn.Module:
    """A frozen copy without PEFT, as TRL takes it for `ref_model`."""
    model = frozen_copy(model)
    return model.merge_and_unload() if isinstance(model, peft.PeftModel) else model


@contextmanager
def reference_of(model: nn.Module) -> Iterator[None]:
    """Let the model be the trainer's reference, by TRL's own means."""
    with trl_utils.use_adapter(model, "ref" if "ref" in model.peft_config else None):
        yield


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers, by their names in the model below PEFT's."""
    return {
        name: layer
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


def adapter_rests(model: nn.Module) -> bool:
    """Tell if the trained adapter takes no part in a forward pass now."""
    layer = next(iter(lora_layers(model).values()))
    return layer.disable_adapters or "default" not in layer.active_adapters


@torch.no_grad()
def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of the tokens that are no padding; of the others, zeros."""
    mask = inputs["attention_mask"]
    logits = model(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False).logits
    return logits * mask[..., None]
