"""Supervised fine-tuning with TRL, then DPO of the result, both with Delta-LoRA.

    python examples/sft_then_dpo.py                           # a small model made here, in seconds on a CPU
    python examples/sft_then_dpo.py --model HuggingFaceTB/SmolLM2-135M --steps 200

The adapter that the first stage exports is merged into the base, so that the second stage begins with a pristine W and
a new adapter, and its reference is the model of the first stage. At the end both adapters on the base give the result.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from deltaopt.integrations.trainer import DeltaLoRACallback, DeltaLoRAFactory

FACTS = {"sky": ("blue", "green"), "grass": ("green", "blue"), "snow": ("white", "black"), "coal": ("black", "white")}
PAIRS = [
    {"prompt": f"the {thing} is", "chosen": f" {right}", "rejected": f" {wrong}"}
    for thing, (right, wrong) in FACTS.items()
]
WORDS = ["<pad>", "<eos>", "the", "is", *FACTS, "blue", "green", "white", "black"]


def load_base(name: str | None) -> torch.nn.Module:
    """Load a pretrained model, or make a small one of a dozen words."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), initializer_range=0.1, **sizes, **ids))


def load_tokenizer(name: str | None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model, or make one of the words above."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def main() -> None:
    """Train twice, and compare both adapters on the base with the trained model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a name on the Hub. Default: a small model made here")
    parser.add_argument("--steps", type=int, default=16, help="of each stage")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--output", type=Path, default=Path("out-sft-then-dpo"))
    options = parser.parse_args()

    tokenizer = load_tokenizer(options.model)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    optimizer = (DeltaLoRAFactory, {"inner": torch.optim.AdamW, "lr": options.lr, "update_ratio": 2.0})
    common = {
        "max_steps": options.steps,
        "per_device_train_batch_size": 4,
        "save_steps": options.steps,
        "bf16": False,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
    }

    sft = SFTTrainer(
        load_base(options.model),
        args=SFTConfig(output_dir=str(options.output / "sft"), **common),
        train_dataset=Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in PAIRS]),
        processing_class=tokenizer,
        peft_config=lora,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[DeltaLoRACallback()],
    )
    sft.train()
    first = options.output / "sft" / f"checkpoint-{options.steps}" / "export"

    dpo = DPOTrainer(
        PeftModel.from_pretrained(load_base(options.model), first).merge_and_unload(),
        args=DPOConfig(output_dir=str(options.output / "dpo"), **common),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[DeltaLoRACallback()],
    )
    dpo.optimizer_cls_and_kwargs = optimizer  # this trainer has no argument for it
    dpo.train()
    second = options.output / "dpo" / f"checkpoint-{options.steps}" / "export"

    served = PeftModel.from_pretrained(load_base(options.model), first).merge_and_unload()
    served = PeftModel.from_pretrained(served, second).eval()
    trained, ids = dpo.model.eval(), tokenizer(PAIRS[0]["prompt"], return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (served(ids).logits - trained(ids.to(trained.device)).logits.cpu()).abs().max()
        for row in PAIRS:
            ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
            print(row["prompt"], "->", tokenizer.decode(served(ids).logits[0, -1].argmax()))
    print(f"{first} and {second}: logits within {difference:.1e} of the trained model's")


if __name__ == "__main__":
    main()
