"""Delta-LoRA in a model of one's own, with triples made by hand: torch alone, no other library.

    pip install .
    python examples/own_model.py

A small language model learns the code of one module of Python, byte by byte. Then LoRA branches of its query and its
value learn the code of another one. Query, key and value share one weight, so each branch belongs to some of its rows.
"""

import random
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple

WIDTH, LENGTH, RANK, ALPHA = 48, 64, 4, 8


class Attention(nn.Module):
    """Causal attention with one weight for query, key and value, and a LoRA branch for query and for value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.A = nn.ParameterDict({part: torch.zeros(WIDTH, RANK) for part in "qv"})
        self.B = nn.ParameterDict({part: torch.randn(RANK, WIDTH) / WIDTH**0.5 for part in "qv"})
        self.scaling = ALPHA / RANK

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q + self.scaling * (x @ self.B["q"].mT @ self.A["q"].mT)
        v = v + self.scaling * (x @ self.B["v"].mT @ self.A["v"].mT)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def triples(self, name: str) -> list[LoRATriple]:
        """Say which rows of the weight each branch belongs to."""
        W = (self.qkv, "weight")  # a module and a name: looked up at every step, so the model may be moved or cast
        rows = {"q": (0, WIDTH), "v": (2 * WIDTH, 3 * WIDTH)}
        return [
            LoRATriple(W, (self.A, part), (self.B, part), self.scaling, name=f"{name}.{part}", rows=rows[part])
            for part in "qv"
        ]


class Model(nn.Module):
    """A language model of bytes, with two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.attention = nn.ModuleList([Attention(), Attention()])
        self.mlp = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH)) for _ in "12"])
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place(torch.arange(ids.shape[1]))
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(nn.functional.layer_norm(x, [WIDTH]))
            x = x + mlp(nn.functional.layer_norm(x, [WIDTH]))
        return self.head(x)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, steps: int) -> None:
    losses = []
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - LENGTH - 1, (16,))
        rows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % (steps // 4) == 0:
            print(f"  step {step}: mean loss {statistics.mean(losses[-steps // 4 :]):.3f}")


def code_of(module) -> Tensor:
    return torch.tensor([byte for byte in Path(module.__file__).read_bytes() if byte < 128])


def main() -> None:
    torch.manual_seed(0)
    model = Model()
    whole = [p for name, p in model.named_parameters() if ".A." not in name and ".B." not in name]
    print("pretraining on the code of random.py")
    train(model, torch.optim.AdamW(whole, lr=1e-2), code_of(random), steps=160)
    pretrained = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    for p in whole:
        p.requires_grad_(False)
    triples = [triple for i, layer in enumerate(model.attention) for triple in layer.triples(f"attention.{i}")]
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=3e-3, update_ratio=2.0, start_step=20)
    print("Delta-LoRA on the code of statistics.py")
    train(model, optimizer, code_of(statistics), steps=120)
    print(optimizer.report())  # did W move, and how far?

    # Elsewhere: the pretrained model, and for each branch one pair of factors with everything that was learned.
    served = Model()
    served.load_state_dict(pretrained)
    for name, adapter in deltaopt.export_adapter(optimizer).items():
        _, layer, part = name.split(".")
        branch = served.attention[int(layer)]
        branch.A[part], branch.B[part] = nn.Parameter(adapter.A), nn.Parameter(adapter.B)
        branch.scaling = 1.0
    ids = code_of(statistics)[:LENGTH].view(1, -1)
    with torch.no_grad():
        difference = (served(ids) - model(ids)).abs().max()
    print(f"the pretrained model and the exported factors: logits within {difference:.1e} of the trained model's")


if __name__ == "__main__":
    main()
