"""What a folder holds: a model of transformers or diffusers, a PEFT adapter, or both. No weights are loaded."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaopt.cli.adapters import CONFIG, WEIGHTS
from deltaopt.cli.base_model import quiet
from deltaopt.cli.files import read_json, read_tensors
from deltaopt.cli.outcome import UserError, reason_of

MODEL_CONFIG = "config.json"


def folder(path: str) -> Path:
    """Return a path that is a folder.

    Raises:
        UserError: if it is none.
    """
    found = Path(path)
    if found.is_dir():
        return found
    if found.exists():
        raise UserError(f"{path} is a file: give the folder that it is in")
    raise UserError(f"there is no folder {path}: nothing is downloaded, so give a folder on this machine")


def adapter_tensors(place: Path) -> dict[str, Tensor] | None:
    """Return the tensors of an adapter; None if the folder has none.

    Raises:
        UserError: if they cannot be read.
    """
    file = next((place / name for name in WEIGHTS if (place / name).is_file()), None)
    return None if file is None else read_tensors(file)


def needed(module: str) -> Any:
    """Import a module of another library.

    Raises:
        UserError: if it is not installed.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what they say of optional parts of theirs
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise UserError(f"{library} is needed for this folder and cannot be imported ({error})") from error
    finally:
        logging.disable(disabled)


def empty_model(place: Path, kind: str | None = None) -> nn.Module:
    """Build the model of a folder on the meta device, with the layers of its quantization.

    Args:
        place: the folder.
        kind: the name of the class of transformers that an adapter was trained on. None, or a name that transformers
            has not, takes the class that the model's config says.

    Raises:
        UserError: if the folder has no model, or one that cannot be built without running code of its own.
    """
    if not (place / MODEL_CONFIG).exists():
        inside = [name for name in ("unet", "transformer") if (place / name / MODEL_CONFIG).exists()]
        hint = f": it is a pipeline, give {place / inside[0]}" if inside else ", so it is no model of transformers"
        raise UserError(f"{place} has no {MODEL_CONFIG}{hint}")
    fields = read_json(place / MODEL_CONFIG)
    if "auto_map" in fields and fields.get("model_type") not in needed("transformers").CONFIG_MAPPING:
        raise UserError(f"{place} has code of its own (auto_map), which is not run here: call deltaopt.describe(model)")
    with quiet():
        try:
            return _of_diffusers(fields) if "_class_name" in fields else _of_transformers(place, kind)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{place / MODEL_CONFIG} cannot be built as a model: {reason_of(error)}") from error


def _of_diffusers(fields: Mapping[str, Any]) -> nn.Module:
    kind = getattr(needed("diffusers"), fields["_class_name"], None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"{fields['_class_name']} is no model of diffusers: give the folder of a unet or transformer")
    with torch.device("meta"):
        model: nn.Module = kind.from_config(dict(fields))  # type: ignore[attr-defined]
    return model


def _of_transformers(place: Path, name: str | None) -> nn.Module:
    transformers = needed("transformers")
    config = transformers.AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    kinds = [getattr(transformers, kind, None) for kind in (name or "", *(config.architectures or ()))]
    kind = next((kind for kind in kinds if kind is not None), transformers.AutoModel)
    with torch.device("meta"):
        model: Any = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    if isinstance(dtype := getattr(config, "dtype", None), torch.dtype):
        model = model.to(dtype)
    model.tie_weights()
    if getattr(config, "quantization_config", None) is not None:
        _put_quantized_layers(model, config.quantization_config)
    return model  # type: ignore[no-any-return]


def _put_quantized_layers(model: Any, quantization: Any) -> None:
    """Put the layers of a quantized base in, as transformers does before it loads their weights."""
    quantizers = needed("transformers.quantizers")
    quantizer = quantizers.AutoHfQuantizer.from_config(quantization, pre_quantized=True)
    quantizer.preprocess_model(model, device_map=None, dtype=torch.bfloat16, keep_in_fp32_modules=[])


def lora_config(fields: Mapping[str, Any], place: Path) -> Any:
    """Return the config of a LoRA or AdaLoRA adapter as PEFT's object, for training.

    Raises:
        UserError: for another method than LoRA, or fields that PEFT does not take.
    """
    peft = needed("peft")
    method = fields.get("peft_type")
    if not isinstance(method, str):
        raise UserError(f"{place / CONFIG} has no peft_type, so it is no config of a PEFT adapter")
    kinds = {"LORA": peft.LoraConfig, "ADALORA": peft.AdaLoraConfig}
    if method not in kinds:
        raise UserError(
            f"{place} holds an adapter of {method}, which is another method than LoRA: it has no branch A @ B for W to "
            "follow. Train with a LoraConfig"
        )
    known = {field.name for field in dataclasses.fields(kinds[method])}
    with quiet():
        try:
            config = kinds[method](**{k: v for k, v in fields.items() if k in known and k != "peft_type"})
        except (TypeError, ValueError) as error:
            raise UserError(f"{place / CONFIG} is refused by PEFT: {reason_of(error)}") from error
    for name in ("r", "lora_alpha", "lora_dropout", "orth_reg_weight"):
        if not isinstance(getattr(config, name, 0), int | float):
            raise UserError(f"{place / CONFIG}: {name} is {getattr(config, name)!r}, expected a number")
    config.inference_mode = False
    return config


def with_adapter(model: nn.Module, config: Any, what: str) -> nn.Module:
    """Return the model with an adapter of this config, on the meta device.

    Raises:
        UserError: if PEFT cannot put it there, as where no layer has a name of its targets.
    """
    peft = needed("peft")
    with quiet():
        try:
            return peft.get_peft_model(model, config, low_cpu_mem_usage=True)  # type: ignore[no-any-return]
        except Exception as error:
            raise UserError(f"{what} does not fit this model: {reason_of(error)}") from error


def starts_at_zero(start: bool | str) -> bool:
    """Tell if LoRA's branch adds nothing at the start with this ``init_lora_weights``, as PEFT does it on one layer."""
    peft = needed("peft")
    with quiet():
        try:
            config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=start)
            layer = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).base_model.model[0]
        except Exception:  # a start that needs data or another library: those are taken out of W
            return False
        return not bool(layer.get_delta_weight("default").any())


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise UserError if an adapter's tensors are not those of the adapter that was put on the model.

    Args:
        model: with an adapter of the same config.
        tensors: by the names in the adapter's file; empty if there are none.
        what: names the adapter in the message.
    """
    held = {name.replace(".default", ""): tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items() if "lora_" in name}
    wrong = [name for name, shape in given.items() if held.get(name) != shape]
    if wrong:
        here = f"it is {held[wrong[0]]} in the model" if wrong[0] in held else "the model has no such layer"
        raise UserError(
            f"{what} is an adapter for another model: {len(wrong)} of its {len(given)} tensors do not fit, such as "
            f"{wrong[0]} {given[wrong[0]]}, and {here}"
        )
