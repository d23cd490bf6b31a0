"""Evaluate an exponential moving average of the adapter in a Delta-LoRA run, and go on training.

Run it with `python examples/ema.py`. It needs torch alone.
"""

import torch

from deltaopt import DeltaLoRAOptimizer


class LoRALinear(torch.nn.Linear):
    """A frozen layer and a low-rank branch."""

    def __init__(self, d: int, c: int, r: int = 4, scaling: float = 2.0) -> None:
        super().__init__(d, c, bias=False)
        self.weight.requires_grad_(False)
        self.A = torch.nn.Parameter(torch.zeros(c, r))
        self.B = torch.nn.Parameter(torch.randn(r, d) / d**0.5)
        self.scaling = scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return W x + scaling * A B x."""
        return super().forward(x) + self.scaling * (x @ self.B.mT @ self.A.mT)


def main() -> None:
    """Train, evaluate the average in between, and show that W follows it there and back."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(LoRALinear(16, 32), torch.nn.Tanh(), LoRALinear(32, 8))
    layers = [layer for layer in model if isinstance(layer, LoRALinear)]
    triples = [
        {"triples": [((layer, "weight"), (layer, "A"), (layer, "B"))], "scaling": layer.scaling} for layer in layers
    ]
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=1e-2, update_ratio=1.0)
    factors = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in factors]
    x, target = torch.randn(64, 16), torch.randn(64, 8)

    def loss() -> torch.Tensor:
        return (model(x) - target).square().mean()

    @torch.no_grad()
    def exchange() -> None:
        """Exchange A and B for their average, or back, and let every W follow."""
        for p, kept in zip(factors, average, strict=True):
            now = p.clone()
            p.copy_(kept)
            kept.copy_(now)
        optimizer.resync()

    for step in range(1, 101):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        for p, mean in zip(factors, average, strict=True):
            mean.lerp_(p.detach(), 0.1)
        if step % 25 == 0:
            trained, before = loss().item(), model(x).detach()
            exchange()
            averaged = loss().item()
            exchange()
            error = float((model(x).detach() - before).abs().max())  # W is where it was
            print(f"step {step}: loss {trained:.4f}, of the average {averaged:.4f}")
            print(f"and back: logits within {error:.1e} of the trained model's")


if __name__ == "__main__":
    main()
