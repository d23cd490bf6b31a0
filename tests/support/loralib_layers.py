"""A table of models of loralib's layers, as cases of `containers`."""

import pytest
import torch
from torch import nn

from tests.support.containers import Case

loralib = pytest.importorskip("loralib", reason="runs where loralib is installed")

images = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def linear_delta(layer):
    product = layer.scaling * layer.lora_B @ layer.lora_A
    return layer.weight, product.T if layer.fan_in_fan_out else product


def two_layers(**options):
    return nn.Sequential(
        loralib.Linear(7, 5, r=3, lora_alpha=2, **options), nn.Tanh(), loralib.Linear(5, 4, r=2, **options)
    )


def linear_case(fan_in_fan_out):
    def add(W, product):
        return product.T if fan_in_fan_out else product

    def deltas(model):
        return {name: linear_delta(model[int(name)]) for name in "02"}

    return Case(lambda: two_layers(fan_in_fan_out=fan_in_fan_out), rows, ["0", "2"], deltas, add)


def embedding_case():
    def deltas(model):
        layer = model[0]
        return {"0": (layer.weight, (layer.scaling * layer.lora_B @ layer.lora_A).T)}

    return Case(
        lambda: nn.Sequential(loralib.Embedding(9, 5, r=3, lora_alpha=2, padding_idx=2)),
        torch.arange(9).repeat(2),
        ["0"],
        deltas,
        lambda W, product: product.T,
    )


def conv_case(kind, kernel, x, **options):
    def deltas(model):
        conv = model[0]
        delta = (conv.lora_B @ conv.lora_A).view(conv.conv.weight.shape) * conv.scaling
        return {"0": (conv.conv.weight, delta)}

    return Case(
        lambda: nn.Sequential(getattr(loralib, kind)(4, 5, kernel, r=2, lora_alpha=3, **options)), x, ["0"], deltas
    )


def merged_case(enable_lora, fan_in_fan_out=False):
    parts = [part for part, enabled in enumerate(enable_lora) if enabled]

    def part_of(W, part):
        return (W.T if fan_in_fan_out else W)[4 * part : 4 * part + 4]

    def deltas(model):
        layer = model[0]
        factors = zip(parts, layer.lora_B.split(4), layer.lora_A.split(2), strict=True)
        return {f"0.{part}": (part_of(layer.weight.data, part), layer.scaling * B @ A) for part, B, A in factors}

    def build():
        options = {"enable_lora": enable_lora, "fan_in_fan_out": fan_in_fan_out}
        model = nn.Sequential(loralib.MergedLinear(7, 4 * len(enable_lora), r=2, lora_alpha=3, **options))
        loralib.mark_only_lora_as_trainable(model)
        return model

    return Case(build, rows, [f"0.{part}" for part in parts], deltas)


MERGED_LINEARS = {
    "q": [True, False, False],
    "q_v": [True, False, True],
    "k_v": [False, True, True],
    "q_k_v": [True, True, True],
    "two_of_four": [False, True, False, True],
}
CASES = {
    "linear": linear_case(False),
    "linear_fan_in_fan_out": linear_case(True),
    "embedding": embedding_case(),
    "conv2d_3x3": conv_case("Conv2d", 3, images, stride=2, padding=1, padding_mode="circular"),
    "conv2d_1x1": conv_case("Conv2d", 1, images),
    "conv1d_1": conv_case("Conv1d", 1, images[:, :, 0]),
    "conv3d_1": conv_case("Conv3d", 1, images.unsqueeze(-1)),
    **{f"merged_{name}": merged_case(enabled) for name, enabled in MERGED_LINEARS.items()},
    "merged_q_v_fan_in_fan_out": merged_case([True, False, True], fan_in_fan_out=True),
}
