"""Serve a model that was trained with Delta-LoRA as a plain LoRA adapter, where deltaopt is not installed.

    python examples/serve.py

Needs `pip install "deltaopt[peft]" transformers`. The script trains a tiny model that is made here, writes the adapter,
and loads it in a second process with PEFT alone.

vLLM takes the same folder:

    vllm serve BASE_MODEL --enable-lora --max-lora-rank 16 --lora-modules my-adapter=FOLDER

Requests choose it by `"model": "my-adapter"`. `max-lora-rank` has to be at least the rank of the adapter, and vLLM
takes 1, 8, 16, 32, 64, 128, 256, 320 and 512; its default is 16. As the adapter holds the movement of W too, its rank
is up to twice that of the training, with a constant `update_ratio` and LoRA's usual start; it is the same where
`start_step` was 0 as well. Each change of the ratio and each restart adds up to the rank of the training.
`save_adapter(..., rank=16)` makes it smaller and returns the errors. BASE_MODEL is the pretrained model. vLLM takes no
`modules_to_save`. (From vLLM's documentation; this script does not run vLLM.)
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def load_base() -> LlamaForCausalLM:
    """Make the pretrained model; the same at each call, as `from_pretrained` gives it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    return LlamaForCausalLM(config)


def train(folder: Path) -> None:
    """Train, and write the adapter and what the trained model computes."""
    from peft import LoraConfig, get_peft_model

    from deltaopt import DeltaLoRAOptimizer
    from deltaopt.integrations.peft import save_adapter

    model = get_peft_model(load_base(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, update_ratio=2.0, start_step=2)
    for step in range(8):
        ids = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    save_adapter(model, optimizer, folder)
    with torch.no_grad():
        torch.save(model.eval()(input_ids=inputs()).logits, folder / "expected.pt")


def serve(folder: Path) -> None:
    """Load the adapter onto the pretrained model, with PEFT alone."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(), folder).eval()
    with torch.no_grad():
        logits = model(input_ids=inputs()).logits
        base = load_base().eval()(input_ids=inputs()).logits
    expected = torch.load(folder / "expected.pt")
    assert "deltaopt" not in sys.modules
    print(f"the base model's logits differ by {(base - expected).abs().max():.2f}")
    print(f"plain PEFT gives logits within {(logits - expected).abs().max():.0e} of the trained model's")


def vllm_command(folder: Path) -> str:
    """Return the command that serves the adapter, with room for its largest rank."""
    config = json.loads((folder / "adapter_config.json").read_text("utf8"))
    rank = max(config["r"], *config["rank_pattern"].values(), 0)
    allowed = min(allowed for allowed in VLLM_RANKS if allowed >= rank)
    return f"vllm serve BASE_MODEL --enable-lora --max-lora-rank {allowed} --lora-modules my-adapter={folder}"


def inputs() -> torch.Tensor:
    return torch.arange(12).view(1, 12)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder))
        subprocess.run([sys.executable, __file__, "--serve", folder], check=True)
        print("with vLLM:", vllm_command(Path(folder)))


if __name__ == "__main__":
    main()
