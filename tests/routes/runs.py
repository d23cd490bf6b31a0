"""The models that leave: how each is built, trained and compared at the other end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer
from tests.support.compare import relative
from tests.support.models import batches, causal_lm, loss_of

COLUMNS: dict[str, dict[str, Any]] = {
    "in place": {"weight_update": "in_place"},
    "folded, zero product": {"weight_update": "folded"},
    "folded, product not zero": {"weight_update": "folded", "start_step": 2},
}
"""The options of the optimizer: W moves; W is never written; W is written once."""

RATIO = 2.0
STEPS = 5

Model = nn.Module | Tensor | Callable[[], Tensor]
"""What a route returns: the model at the other end, or its output on `Run.inputs`."""


class Run:
    """A tiny Llama with PEFT adapters, in training; other kinds of models inherit from it.

    Args:
        column: a key of `COLUMNS`.
        folder: an empty one, for what the route writes.

    Attributes:
        truth: the output of the model that the other end has to give, written down before anything leaves.
    """

    scaling: ClassVar[float] = 2.0
    truth: Tensor

    def __init__(self, column: str, folder: Path) -> None:
        self.column, self.folder = column, folder
        self._history: list[dict[str, Tensor]] = []

    def base(self) -> nn.Module:
        """Build the pretrained model, without adapters."""
        return causal_lm(torch.float32, B_zero=True).unload().eval()

    def fresh(self) -> nn.Module:
        """Build the model as it was before training, with adapters on the pretrained weights."""
        return causal_lm(torch.float32, B_zero=True)

    def optimizer_of(self, model: nn.Module) -> DeltaLoRAOptimizer:
        """Build an optimizer of the settings that the column has."""
        return DeltaLoRAOptimizer.for_model(
            model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO, **COLUMNS[self.column]
        )

    @functools.cached_property
    def model(self) -> nn.Module:
        return self.fresh()

    @functools.cached_property
    def optimizer(self) -> DeltaLoRAOptimizer:
        return self.optimizer_of(self.model)

    @functools.cached_property
    def inputs(self) -> Any:
        return batches(1, seed=9)[0]

    def loss(self, model: nn.Module, step: int) -> Tensor:
        return loss_of(model, batches(step + 1)[step])

    @torch.no_grad()
    def output(self, model: nn.Module) -> Tensor:
        return model.eval()(input_ids=self.inputs).logits.clone()

    def train(
        self,
        each_step: Callable[[], object] = lambda: None,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Train for `STEPS` steps, and write down what the model computes then.

        Args:
            each_step: called after each step.
            model: the run's model as another library wraps it.
            optimizer: the run's optimizer as another library wraps it.
        """
        optimizer, model = optimizer or self.optimizer, model or self.model
        for step in range(STEPS):
            optimizer.zero_grad()
            self.loss(model.train(), step).backward()
            optimizer.step()
            each_step()
        self.is_trained()

    def is_trained(self) -> None:
        """Write down what the model computes now, before anything leaves."""
        self.truth = self.output(self.model)

    # averages

    @property
    def is_averaged(self) -> bool:
        """True from step K on: the folded rule says with other numbers what was before it."""
        return self.optimizer.step_count > COLUMNS[self.column].get("start_step", 0)

    def remember(self) -> None:
        """Write down the parameters that go into an average now."""
        self._history.append({name: p.detach().clone() for name, p in self.model.named_parameters()})

    def mean(self, *, moves_W: bool = False) -> None:
        """Let the truth be the model whose every parameter is the mean of those remembered.

        Args:
            moves_W: only A and B were averaged, and W belongs where the optimizer would have moved it for these.
        """
        means = {name: torch.stack([step[name] for step in self._history]).mean(0) for name in self._history[0]}
        last, model = self._history[-1], self.fresh()
        with torch.no_grad():
            for name, p in model.named_parameters():
                W_stays = moves_W and not p.requires_grad
                p.copy_(last[name] if W_stays else means[name])
            for layer in model.modules():
                if not hasattr(layer, "lora_A"):
                    continue
                if self.column != "in place":
                    layer.scaling["default"] = self.scaling * (1 + RATIO)
                elif moves_W:
                    name = next(n for n, module in model.named_modules() if module is layer)
                    before = last[f"{name}.lora_B.default.weight"] @ last[f"{name}.lora_A.default.weight"]
                    after = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                    layer.base_layer.weight.add_(RATIO * self.scaling * (after - before))
        self.truth = self.output(model)

    def error(self, came_out: Model) -> float:
        """How far the output is from the truth, as a share of what training changed."""
        if isinstance(came_out, nn.Module):
            came_out = self.output(came_out)
        elif not isinstance(came_out, Tensor):
            came_out = came_out()
        untrained = self.output(self.fresh())
        return relative(came_out - untrained, self.truth - untrained)


class UNetRun(Run):
    """A tiny UNet of diffusers."""

    scaling = 1.0

    def base(self) -> nn.Module:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ).eval()

    def fresh(self) -> nn.Module:
        from peft import LoraConfig

        unet = self.base().requires_grad_(False)
        torch.manual_seed(1)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        return unet

    @functools.cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(2)
        return torch.randn(2, 4, 8, 8), torch.tensor(10), torch.randn(2, 6, 8)

    def loss(self, model: nn.Module, step: int) -> Tensor:
        return model(*self.inputs).sample.square().mean()

    @torch.no_grad()
    def output(self, model: nn.Module) -> Tensor:
        return model.eval()(*self.inputs).sample.clone()


class LoralibRun(Run):
    """Two layers of loralib."""

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5))

    def fresh(self) -> nn.Module:
        import loralib

        base = self.base()
        torch.manual_seed(1)
        layers = [loralib.Linear(7, 6, r=2, lora_alpha=4), nn.Tanh(), loralib.Linear(6, 5, r=2, lora_alpha=4)]
        model = nn.Sequential(*layers)
        loralib.mark_only_lora_as_trainable(model)
        model.load_state_dict(base.state_dict(), strict=False)
        return model

    def optimizer_of(self, model: nn.Module) -> DeltaLoRAOptimizer:
        from deltaopt import LoRATriple

        names = ("weight", "lora_B", "lora_A")
        triples = [
            LoRATriple(*((model[i], name) for name in names), scaling=(model[i], "scaling"), name=str(i))
            for i in (0, 2)
        ]
        return DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=5e-2, update_ratio=RATIO, **COLUMNS[self.column])

    @functools.cached_property
    def inputs(self) -> Tensor:
        torch.manual_seed(2)
        return torch.randn(8, 7)

    def loss(self, model: nn.Module, step: int) -> Tensor:
        return (model(self.inputs) - 1).square().mean()

    @torch.no_grad()
    def output(self, model: nn.Module) -> Tensor:
        output = model.eval()(self.inputs).clone()
        model.train()  # loralib merges in eval(), and takes that back here
        return output
