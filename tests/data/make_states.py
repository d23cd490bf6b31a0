"""Write what runs of earlier versions saved in the middle, and what they came to when they went on.

`tests/behaviour/test_earlier_states.py` loads the files and compares. They are never made with a later version, as
they say what the earlier one did: the commit 6f8145d for schema 4, and 877b9ea for schema 5. To make them again, from
the root of the repository:

    commit=877b9ea schema=5
    git worktree add ../deltaopt-$commit $commit
    script=$PWD/tests/data/make_states.py folder=$PWD/tests/data
    cd ../deltaopt-$commit && PYTHONPATH=. python $script $folder $schema

Each file is a dict for `torch.load(weights_only=True)`:

    config        what `rebuilt_run` needs to build the run again, with the run's own settings
    base          every tensor of the run before its first step
    saved         the same tensors at the moment of saving
    adapter       what is kept of them where the base is not: A and B, and what else trains
    optimizer     `state_dict()` of the optimizer
    settings, scalings, displacements    what the optimizer and the branches said then
    data          gradients of every A and B (plain triples), or inputs and targets (PEFT), one row for each later step
    expected      the tensors and the losses after those steps
    rebuilt       the same, where the run had gone on from base and adapter; only of weights that are rounded at random

Nothing depends on the initialisation of a library. All numbers come from generators with a seed, and are in the files.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple

MODES = {
    "float32": {"dtype": "float32", "rounding": "auto", "weight_update": "in_place"},
    "bfloat16_stochastic": {"dtype": "bfloat16", "rounding": "stochastic", "weight_update": "in_place"},
    "bfloat16_compensated": {"dtype": "bfloat16", "rounding": "compensated", "weight_update": "in_place"},
    "folded": {"dtype": "float32", "rounding": "auto", "weight_update": "folded"},
}
CASES = {f"{kind}_{mode}": (kind, mode) for kind in ("plain", "peft") for mode in MODES}
OF_SCHEMA_5 = ("plain_float32", "plain_bfloat16_compensated", "peft_bfloat16_compensated", "peft_folded")
STATES = CASES | {f"schema_5_{case}": CASES[case] for case in OF_SCHEMA_5}

CHANGE, RESTART, SAVE, END = 4, 6, 9, 13
"""Steps before which update_ratio changes, A and B start afresh (in place only), the run is saved, and it ends."""

# Of plain triples: (shapes of W, A and B; options). c, d and r are three numbers, in both groups.
PLAIN_LAYERS: dict[str, tuple[tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "linear": (((8, 11), (8, 2), (2, 11)), {"scaling": 0.5}),
    "transposed": (((11, 7), (7, 3), (3, 11)), {"scaling": 2.0, "layout": "transposed"}),
    "conv": (((6, 3, 2, 2), (6, 2, 1, 1), (2, 3, 2, 2)), {"scaling": 0.5, "layout": "conv"}),
    "experts": (((2, 7, 9), (7, 3 * 2), (2 * 3, 9)), {"scaling": 1.5, "layout": "experts"}),
    "rows": (((3 * 6, 10), (6, 2), (2, 10)), {"scaling": -0.7, "rows": (6, 12)}),
}
PLAIN: dict[str, Any] = {
    "layers": {name: options for name, (_, options) in PLAIN_LAYERS.items()},
    "groups": [
        {"layers": ["linear", "transposed", "conv"], "lr": 2e-2, "update_ratio": 2.0, "start_step": 2},
        {"layers": ["experts", "rows"], "lr": 1e-2, "update_ratio": 0.6, "start_step": 3},
    ],
}
PEFT: dict[str, Any] = {
    "widths": (10, 13, 7, 4),
    "r": 3,
    "lora_alpha": 4,
    "groups": [{"lr": 1e-2, "update_ratio": 0.8, "start_step": 2}],
}


class Plain:
    """Triples of tensors, in two groups of other settings. Gradients are given, so they ask nothing of W."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        dtype, folded = getattr(torch, config["dtype"]), config["weight_update"] == "folded"
        self._tensors = {
            name: tensor.to(dtype if name.endswith(".W") else tensor.dtype, copy=True).requires_grad_(name[-1] in "AB")
            for name, tensor in tensors.items()
        }
        self._scalings: dict[str, Any] = {name: options["scaling"] for name, options in config["layers"].items()}
        if folded:  # the forward pass multiplies by a tensor of no dimensions
            self._scalings = {name: torch.tensor(scaling) for name, scaling in self._scalings.items()}
        triples = {
            name: LoRATriple(
                *(self._tensors[f"{name}.{letter}"] for letter in "WAB"),
                name=name,
                **{**options, "scaling": self._scalings[name]},
            )
            for name, options in config["layers"].items()
        }
        groups = [
            {"triples": [triples[name] for name in group["layers"]]}
            | {key: value for key, value in group.items() if key != "layers"}
            for group in config["groups"]
        ]
        self.optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, groups, **_options(config))

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors.items()}

    def adapter(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors().items() if name[-1] in "AB"}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._tensors[name].copy_(tensor)

    load_adapter = load

    def scalings(self) -> dict[str, float]:
        return {name: float(scaling) for name, scaling in self._scalings.items()}

    def train(self, data: dict[str, Tensor]) -> list[float]:
        """One step for each row. The loss is linear, so that backward() brings the row as the gradient."""
        for step in range(len(next(iter(data.values())))):
            self.optimizer.zero_grad()
            sum((self._tensors[name] * gradients[step]).sum() for name, gradients in data.items()).backward()
            self.optimizer.step()
        return []


class Wide(nn.Linear):
    """A linear layer that computes in float32 whatever its weight is in: a step then depends on float32 sums alone."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float(), self.bias.float())


class Network(nn.Module):
    def __init__(self, a: int, b: int, c: int, d: int) -> None:
        super().__init__()
        self.first, self.second, self.head = Wide(a, b), Wide(b, c), Wide(c, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Peft:
    """A tiny network under PEFT, with a head that trains next to the adapter."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        import peft

        adapter = peft.LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            target_modules=["first", "second"],
            modules_to_save=["head"],
        )
        network = Network(*config["widths"])
        for layer in (network.first, network.second):
            layer.to(getattr(torch, config["dtype"]))
        self.model = peft.get_peft_model(network, adapter)
        self.model.load_state_dict(tensors)
        (group,) = config["groups"]
        self.optimizer = DeltaLoRAOptimizer.for_model(self.model, torch.optim.AdamW, **group, **_options(config))

    def tensors(self) -> dict[str, Tensor]:
        """As they train: the state_dict of a model whose branch is scaled has other values of A."""
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: tensor.detach().clone() for name, tensor in tensors}

    def adapter(self) -> dict[str, Tensor]:
        import peft

        return {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(self.model).items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.model.load_state_dict(tensors)

    def load_adapter(self, tensors: dict[str, Tensor]) -> None:
        import peft

        peft.set_peft_model_state_dict(self.model, tensors)

    def scalings(self) -> dict[str, float]:
        layers = {name: module for name, module in self.model.named_modules() if hasattr(module, "lora_A")}
        return {name: float(layer.scaling["default"]) for name, layer in layers.items()}

    def train(self, data: dict[str, Tensor]) -> list[float]:
        losses = []
        for x, y in zip(data["x"], data["y"], strict=True):
            self.optimizer.zero_grad()
            loss = (self.model(x) - y).square().mean()
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return losses


def _options(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("rounding", "rounding_seed", "weight_update")}


def rebuilt_run(kind: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Plain | Peft:
    """A run with a new optimizer and these tensors."""
    return {"plain": Plain, "peft": Peft}[kind](config, tensors)


def settings_of(optimizer: DeltaLoRAOptimizer) -> dict[str, Any]:
    """Return what loading a state restores besides the moments."""
    return {
        "step_count": optimizer.step_count,
        "update_ratio": [group.update_ratio for group in optimizer.groups],
        "start_step": [group.start_step for group in optimizer.groups],
        "lr": [group["lr"] for group in optimizer.param_groups],
    }


def displacements_of(optimizer: DeltaLoRAOptimizer) -> dict[str, Tensor]:
    return {triple.name: optimizer.displacement(triple.name).product() for triple in optimizer.triples}


def _start(kind: str, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Every tensor before the first step. A and B are not zero, and neither is their product at `start_step`."""
    if kind == "plain":
        shapes = {
            f"{name}.{letter}": shape
            for name, (three, _) in PLAIN_LAYERS.items()
            for letter, shape in zip("WAB", three, strict=True)
        }
    else:
        import peft

        adapter = peft.LoraConfig(r=PEFT["r"], target_modules=["first", "second"], modules_to_save=["head"])
        model = peft.get_peft_model(Network(*PEFT["widths"]), adapter)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    drawn = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if kind == "plain":
        return {name: tensor.to(dtype) if name.endswith(".W") else tensor for name, tensor in drawn.items()}
    return {name: tensor.to(dtype) if "base_layer" in name else tensor for name, tensor in drawn.items()}


def _data(kind: str, start: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    def new(*shape: int) -> Tensor:
        return torch.randn(END, *shape, generator=generator)

    if kind == "plain":
        return {name: new(*tensor.shape) for name, tensor in start.items() if name[-1] in "AB"}
    first, *_, last = PEFT["widths"]
    return {"x": new(5, first), "y": new(5, last)}


def _slices(data: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: rows[start:stop].clone() for name, rows in data.items()}


def schema_of(case: str) -> int:
    """Return the schema of the state in the file of a case."""
    return 5 if case.startswith("schema_5_") else 4


def made(kind: str, mode: str, schema: int) -> dict[str, Any]:
    """The contents of one file."""
    generator = torch.Generator().manual_seed(1 + list(CASES).index(f"{kind}_{mode}"))
    config = {**(PLAIN if kind == "plain" else PEFT), **MODES[mode], "rounding_seed": 5}
    base = _start(kind, getattr(torch, config["dtype"]), generator)
    data = _data(kind, base, generator)
    run = rebuilt_run(kind, config, base)
    run.train(_slices(data, 0, CHANGE))
    if mode == "folded":
        run.train(_slices(data, CHANGE, SAVE))
    else:
        run.optimizer.groups[0].update_ratio = 1.4
        run.train(_slices(data, CHANGE, RESTART))
        run.optimizer.restart(generator=generator)
        run.train(_slices(data, RESTART, SAVE))
    saved = {
        "config": config,
        "base": base,
        "saved": run.tensors(),
        "adapter": run.adapter(),
        "optimizer": run.optimizer.state_dict(),
        "settings": settings_of(run.optimizer),
        "scalings": run.scalings(),
        "displacements": displacements_of(run.optimizer),
        "data": _slices(data, SAVE, END),
    }
    schemas = {group["deltaopt"]["schema"] for group in saved["optimizer"]["param_groups"]}
    if schemas != {schema}:
        raise SystemExit(f"{deltaopt.__file__} saves states of schema {schemas}, not {schema}: run the commit above")
    saved["optimizer"] = _copied(saved["optimizer"])
    losses = run.train(saved["data"])
    saved["expected"] = {"tensors": run.tensors(), "losses": losses}
    if config["rounding"] == "stochastic":
        again = rebuilt_run(kind, config, base)
        again.load_adapter(saved["adapter"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the 16-bit W of .* was rebuilt as base", RuntimeWarning)
            again.optimizer.load_state_dict(_copied(saved["optimizer"]))
        losses = again.train(saved["data"])
        saved["rebuilt"] = {"tensors": again.tensors(), "losses": losses}
    return saved


def _copied(state: Any) -> Any:
    """Copy a state with tensors of its own: an optimizer still changes those that it gave or was given."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list) else state


def main(folder: Path, schema: int) -> None:
    torch.set_num_threads(1)
    for name in [name for name in STATES if schema_of(name) == schema]:
        torch.save(made(*STATES[name], schema), folder / f"{name}.pt")
        print(f"{name}.pt: {(folder / f'{name}.pt').stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
