"""Models with PEFT's layers of every kind, and how the tests of PEFT train, save and load them."""

import copy
import itertools
import json

import pytest
import torch
from torch import Tensor, nn

from tests.support.models import peft as peft
from tests.support.models import transformers  # skips where they are not installed

# isort: split
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
GUARD = "save_pretrained writes the adapter alone"
READ = r"Unexpected keyword arguments \['needs_base_weights_moved_by_deltaopt_see_docs_export'\] for class LoraConfig"
"""What plain PEFT says of a folder that was written with that warning."""

# PEFT itself speaks up about tied weights, which is the subject of these tests.
tied_weights_are_meant = pytest.mark.filterwarnings(
    "ignore:Model (with|has) `?tie", "ignore:.*tied:UserWarning:peft", "ignore:.*tie_word_embeddings:UserWarning:peft"
)

tied_outputs_are_named = pytest.mark.filterwarnings("ignore:once their W has moved, the forward pass:UserWarning")
"""An in-place optimizer names the layers whose output it cannot keep at the base."""


class Experts(nn.Module):
    """Two stacks of matrices, stored (e, out, in) or, where `is_transposed`, (e, in, out) as PEFT calls it."""

    def __init__(self, e: int, width: int, inner: int, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(e, width, inner) if is_transposed else torch.randn(e, inner, width))
        self.down = nn.Parameter(torch.randn(e, inner, width) if is_transposed else torch.randn(e, width, inner))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-3)
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return (x @ up).tanh() @ down


class Bare(nn.Module):
    """One plain 2-d parameter (5, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 7))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


class Classifier(nn.Module):
    """An embedding, a hidden layer, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.hidden = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(self.embed(x)).tanh()))


def mlp(*widths: int, **options) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*[nn.Linear(a, b, **options) for a, b in pairs])


def randomised(model: nn.Module, adapter: str = "default") -> nn.Module:
    """The model in float64 with every adapter tensor random: A @ B is not zero, and no two are alike."""
    model = model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and f".{adapter}" in name:
                parameter.normal_().mul_(0.3)
    return model


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {
        f"{name}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else name: layer
        for name, layer in found.items()
    }


def weight(layer: LoraLayer) -> Tensor:
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


def layer_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight(layer).detach().clone() for name, layer in lora_layers(model).items()}


def peft_deltas(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Return what PEFT would merge: scaling and orientation are its own."""
    with torch.no_grad():
        return {name: layer.get_delta_weight(adapter).clone() for name, layer in lora_layers(model).items()}


def output(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x) if isinstance(x, Tensor) else model(**x)
    return result if isinstance(result, Tensor) else result.logits


def train_model(model: nn.Module, optimizer: torch.optim.Optimizer, x, steps: int = 3) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (output(model, x) - 0.5).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def assert_loads(plain: nn.Module, folder, model: nn.Module, x, tolerance: float = 1e-5) -> PeftModel:
    """Plain PEFT on a copy of the pristine base gives the trained output, which is another one than the base's."""
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), folder)  # a warning is an error here
    model.eval()
    loaded.eval()
    expected = output(model, x)
    assert (output(plain.eval(), x) - expected).abs().max() > 1e-3
    torch.testing.assert_close(output(loaded, x), expected, rtol=0, atol=tolerance)
    return loaded


def config_in(folder) -> dict:
    return json.loads((folder / CONFIG).read_text("utf8"))


def tokens(high: int = 20) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, high, (2, 6))}


def rows_of_tokens(rows: int = 7) -> Tensor:
    return torch.arange(rows).repeat(2).view(2, rows)


def image(*size: int) -> Tensor:
    return torch.randn(2, *size, dtype=torch.float64)


CASES = {
    "linear": (lambda: mlp(7, 5, 4), ["0", "1"], lambda: image(7), {}),
    "linear_square": (lambda: mlp(6, 6), ["0"], lambda: image(6), {}),
    "conv1d_gpt2": (lambda: nn.Sequential(Conv1D(5, 7)), ["0"], lambda: image(7), {"fan_in_fan_out": True}),
    "conv1d_gpt2_square": (lambda: nn.Sequential(Conv1D(6, 6)), ["0"], lambda: image(6), {"fan_in_fan_out": True}),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 5)), ["0"], rows_of_tokens, {}),
    "embedding_square": (lambda: nn.Sequential(nn.Embedding(6, 6)), ["0"], lambda: rows_of_tokens(6), {}),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 5, 3, padding=1)), ["0"], lambda: image(4, 6), {}),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 5, (2, 3), stride=2)), ["0"], lambda: image(4, 6, 6), {}),
    "conv2d_1x1": (lambda: nn.Sequential(nn.Conv2d(4, 5, 1)), ["0"], lambda: image(4, 3, 3), {}),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 5, (1, 2, 3))), ["0"], lambda: image(4, 2, 3, 4), {}),
    "parameter_2d": (lambda: nn.Sequential(Bare()), [], lambda: image(7), {"target_parameters": ["0.matrix"]}),
}
for e in (1, 3):
    for is_transposed in (False, True):
        for width, inner in ((7, 5), (6, 6)):
            for stacks in (["up"], ["up", "down"]):
                kind = "transposed_experts" if is_transposed else "experts"
                CASES[f"{kind}_{e}_{width}x{inner}_{'_'.join(stacks)}"] = (
                    lambda e=e, w=width, i=inner, t=is_transposed: nn.Sequential(Experts(e, w, i, t)),
                    [],
                    lambda width=width: image(4, width),
                    {"target_parameters": [f"0.{stack}" for stack in stacks]},
                )
# PEFT adds the (out, in) delta of one expert to a W stored (1, in, out): its own forward pass fails then.
PEFT_CAN_NOT = {name for name in CASES if name.startswith("transposed_experts_1_7x5")}
HOOKS_CAN_NOT = {name for name in CASES if "experts" in name or name == "parameter_2d"}


def gpt2_config(**config):
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16, n_inner=12, use_cache=False, **ids, **config
    )


def tiny_llama(**config) -> nn.Module:
    config = {"num_hidden_layers": 2, "use_cache": False, **config}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1, **config
        )
    )


def assert_step_refused(model: nn.Module, optimizer: torch.optim.Optimizer, error: type, match: str) -> None:
    """`step` raises, and leaves every bit of the model and the step count as they are."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    count = optimizer.step_count
    with pytest.raises(error, match=match):
        optimizer.step()
    assert optimizer.step_count == count
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def quantized(bits: int, **options) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="runs where bitsandbytes is installed")
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(64, 32, bias=False, **options)
    layer.load_state_dict({"weight": torch.randn(32, 64)})
    return layer.to("cpu")
