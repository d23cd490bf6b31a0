"""The code of the how-to pages runs as it is printed, top to bottom, without a warning."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from deltaopt import DeltaLoRAOptimizer

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["folded", "sixteen-bits", "resume", "base-weights", "export", "restart"]


def load_base():
    """Build a pretrained model for the pages; the same bits at each call."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def train_for_a_page(model, optimizer, scheduler=None, steps=1):
    for step in range(steps):
        ids = torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page(page, tmp_path):
    names = {
        "torch": torch,
        "DeltaLoRAOptimizer": DeltaLoRAOptimizer,
        "get_peft_model": get_peft_model,
        "load_base": load_base,
        "train": train_for_a_page,
        "config": LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
        "ids": torch.arange(12).view(2, 6),
        "folder": tmp_path,
    }
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text("utf8"), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(block, names)
    assert names["optimizer"].step_count > 0


def test_every_page_is_named_and_linked():
    """Every page is run here, and the README links to it."""
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert pages == {*PAGES, "method", "architecture"}
    readme = (DOCS.parent / "README.md").read_text("utf8")
    assert all(f"docs/{page}.md" in readme for page in pages)
