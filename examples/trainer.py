"""Fine-tune a causal language model with transformers' Trainer and Delta-LoRA, and use the adapter it leaves.

    python examples/trainer.py                                # a small model made here, in seconds on a CPU
    python examples/trainer.py --model HuggingFaceTB/SmolLM2-135M --text my.txt --steps 500

The text is cut into pieces of equal length. The last checkpoint's folder "export" holds the adapter to use: plain PEFT
loads it onto the base, and gives the trained model.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from deltaopt.integrations.trainer import DeltaLoRACallback, DeltaLoRAFactory


def load_base(name: str | None) -> torch.nn.Module:
    """Load a pretrained model, or make a small one that reads bytes."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.1, **sizes))


def pieces(text: str, name: str | None, length: int) -> list[dict[str, list[int]]]:
    """Cut the tokens of a text into pieces."""
    ids = list(text.encode()) if name is None else AutoTokenizer.from_pretrained(name)(text).input_ids
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    """Train, and compare the exported adapter on the base with the trained model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, or a name on the Hub. Default: a small model made here")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="a text file. Default: this file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=64, help="tokens of a piece")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--update-ratio", type=float, default=2.0)
    parser.add_argument("--start-step", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out-trainer"))
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, ...")
    options = parser.parse_args()

    model = get_peft_model(load_base(options.model), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    args = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=options.lr,
        save_steps=options.steps,
        logging_steps=max(1, options.steps // 4),
        report_to=options.report_to,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=pieces(options.text.read_text("utf8"), options.model, options.length),
        optimizer_cls_and_kwargs=(
            DeltaLoRAFactory,
            {
                "inner": torch.optim.AdamW,
                "args": args,  # for their learning_rate and weight_decay
                "update_ratio": options.update_ratio,
                "start_step": options.start_step,
            },
        ),
        callbacks=[DeltaLoRACallback()],
    )
    trainer.train()

    export = options.output / f"checkpoint-{options.steps}" / "export"
    served = PeftModel.from_pretrained(load_base(options.model), export).eval()
    trained, ids = trainer.model.eval(), torch.tensor([trainer.train_dataset[0]["input_ids"]])
    with torch.no_grad():
        logits = trained(ids.to(trained.device)).logits.cpu()
        difference = (served(ids).logits - logits).abs().max()
        with served.disable_adapter():
            change = (served(ids).logits - logits).abs().max()
    print(f"{export}: logits within {difference:.1e} of the trained model's, which has moved by {change:.2g}")


if __name__ == "__main__":
    main()
