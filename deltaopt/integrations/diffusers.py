"""diffusers: an adapter as one file that its pipelines load by themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for an adapter in a folder."""

METADATA = "lora_adapter_metadata"
"""The key of the adapter's config in the file's own metadata."""


def component_of(model: nn.Module) -> str | None:
    """Return the name of this model in a pipeline, with which its tensors begin; None if it is not of diffusers."""
    if all(kind.__module__.partition(".")[0] != "diffusers" for kind in type(model).__mro__):
        return None
    return "unet" if "unet" in type(model).__name__.lower() else "transformer"


def lora_file(
    component: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], prefix: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return an adapter's tensors and metadata, as diffusers names them.

    Args:
        component: of the pipeline.
        tensors: by PEFT's names.
        config: the adapter's, as a dict.
        prefix: with which PEFT's names begin.
    """
    fields = {f"{component}.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    named = {f"{component}.{name.removeprefix(prefix)}": tensor for name, tensor in tensors.items()}
    return named, {"format": "pt", METADATA: json.dumps(fields, indent=2, sort_keys=True)}
