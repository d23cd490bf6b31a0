"""A small run that saves after every step and continues from its file, and is killed many times on the way.

python -m tests.support.crash_loop FILE whole|adapter STEPS KILLS SEED

It prints how many of the kills fell into a save, which leaves the unfinished file behind.
"""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # every process would load it in its first step, which takes it a second
from torch import Tensor, nn

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple


class LoRALinear(nn.Linear):
    """A frozen linear layer with a branch, as one writes it by hand."""

    def __init__(self, d: int, c: int, r: int = 3) -> None:
        super().__init__(d, c, bias=False)
        self.weight.requires_grad_(False)
        self.A, self.B = nn.Parameter(0.3 * torch.randn(c, r)), nn.Parameter(0.3 * torch.randn(r, d))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * x @ self.B.mT @ self.A.mT

    def triple(self, name: str) -> LoRATriple:
        return LoRATriple((self, "weight"), (self, "A"), (self, "B"), scaling=0.5, name=name)


def train(path: Path, keeps: str, steps: int, saves: Callable[[], object] = lambda: None) -> nn.Module:
    """Train from the file, or from the beginning where there is none; `saves` is called before each save."""
    torch.manual_seed(0)
    model = nn.Sequential(LoRALinear(16, 24), nn.Tanh(), LoRALinear(24, 10))
    triples = [model[0].triple("first"), model[2].triple("last")]
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=5e-3, eps=1e-4, update_ratio=0.8, start_step=3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps + 1)
    done = 0
    if path.exists():
        state = deltaopt.load(path)
        model.load_state_dict(state["model"], strict=keeps == "whole")
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        done = state["step"]
    for step in range(done, steps):
        x, y = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - y[:, :10]).square().mean().backward()
        optimizer.step()
        scheduler.step()
        kept = {key: value for key, value in model.state_dict().items() if keeps == "whole" or "weight" not in key}
        state = {"model": kept, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        saves()
        deltaopt.save({**state, "step": step + 1}, path)
    return model


def killed_run(path: Path, keeps: str, steps: int, kills: int, seed: int) -> int:
    """Kill `kills` runs one after the other, each at some moment after its first save, then let one finish.

    Returns:
        How many were killed in a save.
    """
    chance, in_a_save = random.Random(seed), 0
    for _ in range(kills):
        hears, tells = os.pipe()
        process = os.fork()
        if process == 0:
            _child(path, keeps, steps, tells)
        os.close(tells)
        for _ in range(chance.randint(2, 4)):
            os.read(hears, 1)
        time.sleep(chance.uniform(0.0, chance.choice([0.003, 0.02])))
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        os.close(hears)
        if not os.WIFSIGNALED(status):
            sys.exit("a run ended before it was killed: it failed, or there are too few steps")
        in_a_save += len(_parts(path))  # of this run alone: the next one's save removes them
    train(path, keeps, steps)
    if _parts(path):
        sys.exit("a save has left a part of a file")
    return in_a_save


def _parts(path: Path) -> list[Path]:
    return list(path.parent.glob(".*.part"))


def _child(path: Path, keeps: str, steps: int, tells: int) -> None:
    try:
        train(path, keeps, steps, lambda: os.write(tells, b"."))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    file, keeps, *numbers = sys.argv[1:]
    torch.set_num_threads(1)
    print(killed_run(Path(file), keeps, *map(int, numbers)))
