"""The code of the how-to pages runs as it is printed, top to bottom, without a warning."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from deltaopt import DeltaLoRAOptimizer

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    *("folded", "sixteen-bits", "resume", "reference-models", "base-weights", "export", "restart", "did-w-move"),
    "averages",
]
SCRIPTS = {"reference-models": ["dpo.py"], "trainer": ["train.py"]}
"""Blocks that have a title are files, which run by themselves."""


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


@pytest.mark.skipif(find_spec("trl") is None, reason="runs where trl is installed")
@pytest.mark.parametrize(("page", "title"), [(page, title) for page, titles in SCRIPTS.items() for title in titles])
def test_a_script_runs_by_itself(page, title, tmp_path):
    """In a folder and a process of its own, without a network. Warnings that the script causes are errors."""
    (tmp_path / title).write_text(scripts_of(page)[title], "utf8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(DOCS.parent)}
    command = [sys.executable, "-W", "error:::__main__", title]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def scripts_of(page):
    text = (DOCS / f"{page}.md").read_text("utf8")
    return dict(re.findall(r'```python title="([^"]+)"\n(.*?)```', text, re.DOTALL))


def test_every_page_is_named_and_linked():
    """Every page and every script is run here, and the README links to the pages."""
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert {page: [*scripts_of(page)] for page in pages if scripts_of(page)} == SCRIPTS
    assert pages == {*PAGES, *SCRIPTS, "method", "architecture", "routes", "command-line"}
    readme = (DOCS.parent / "README.md").read_text("utf8")
    assert all(f"docs/{page}.md" in readme for page in pages)
