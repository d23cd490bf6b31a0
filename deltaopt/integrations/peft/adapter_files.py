"""The files of a PEFT adapter: its tensors under PEFT's own names, and a config with alpha = r for each layer."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import EMBEDDING_LAYER_NAMES
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from deltaopt.checkpoint.files import PathLike, replacing_together
from deltaopt.integrations.diffusers import LORA_FILE, component_of, lora_file
from deltaopt.integrations.peft.adalora import as_lora, is_adalora, is_adalora_config
from deltaopt.integrations.peft.moved_config import plain
from deltaopt.lowrank import LowRank
from deltaopt.modules import class_of, modules_of
from deltaopt.naming import names_without_wrappers, short_names
from deltaopt.sharding import gathered

PREFIX = "base_model.model."
"""The prefix of the names of the base model's modules in a PeftModel, and in every adapter file."""


class LayerChange(NamedTuple):
    """The change that training made to one layer.

    Attributes:
        layer: PEFT's.
        change: of W and the branch together, to be multiplied by 1.
        scaling: what the layer multiplied its branch by.
    """

    layer: lora.LoraLayer
    change: LowRank
    scaling: float


def write_adapter(
    model: nn.Module, adapter: str, changes: Sequence[LayerChange], directory: PathLike, writes: bool = True
) -> list[int]:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` with these changes as the adapter's factors.

    A model of diffusers gets ``pytorch_lora_weights.safetensors`` too. An adapter of AdaLoRA is written as one of LoRA.
    With a sharded model all ranks call this, and rank 0 writes.

    Args:
        model: with a `peft_config` that holds `adapter`.
        adapter: its name in the model.
        changes: of every layer that holds it.
        directory: the folder; other files in it stay.
        writes: False where another rank writes the files. What is sharded is gathered on all of them.

    Returns:
        The rank that was written for each change.
    """
    changes = [_without_zeros(change) for change in _parameters_padded(changes)]
    names = _names(model)
    tensors = _tensors(model, adapter, changes, names)
    config = _config(model, adapter, changes, names)
    ranks = [change.rank for _, change, _ in changes]
    if not writes:
        return ranks
    with replacing_together(directory, last=CONFIG_NAME) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        component = component_of(_base_model(model))
        if component is not None:
            named, metadata = lora_file(component, tensors, config.to_dict(), PREFIX)
            save_file(named, folder / LORA_FILE, metadata=metadata)
        config.save_pretrained(folder, auto_mapping_dict=_auto_mapping(model, config))
    return ranks


def _tensors(
    model: nn.Module, adapter: str, changes: Sequence[LayerChange], names: dict[int, str]
) -> dict[str, Tensor]:
    """Return the factors, and whatever else PEFT saves: biases, modules_to_save, trainable tokens."""
    # PEFT itself picks from the state_dict and names what it picks, so the factors are exchanged before.
    state = model.state_dict()
    keys = {short: key for key, short in short_names(model, state).items()}
    factors: dict[str, Tensor] = {}
    replaced: set[str] = set()
    for layer, change, scaling in changes:
        prefix = f"{names[id(layer)]}."
        stored = {prefix + key: factor for key, factor in _stored(layer, adapter, change).items()}
        if is_adalora(layer):
            replaced |= {f"{prefix}{name}" for name in ("lora_A", "lora_B", "lora_E")}
        else:
            state |= {keys[key]: factor for key, factor in stored.items()}
        factors |= {_without_adapter(key, adapter): factor for key, factor in stored.items()}
        bias = keys.get(f"{prefix}lora_B.{adapter}.bias")
        if bias is not None:  # lora_bias=True
            state[bias] = state[bias] * scaling
    # "auto" would write the moved W of an embedding that is a target.
    embeddings = any(_is_embedding(model, names[id(layer)], layer) for layer, _, _ in changes)
    with _whole(configs_of(model)[adapter]):
        picked = get_peft_model_state_dict(
            model, state_dict=state, adapter_name=adapter, save_embedding_layers=False if embeddings else "auto"
        )
    prefix = "" if isinstance(model, PeftModel) else PREFIX
    # PEFT misses layers within modules that leave a wrapper out of their state_dict, as checkpoint wrappers do.
    short = short_names(model, picked)
    picked = {short[key]: tensor for key, tensor in picked.items()}
    picked = {key: tensor for key, tensor in picked.items() if key not in replaced} | factors
    return _separate({prefix + key: gathered(tensor.detach()).contiguous() for key, tensor in picked.items()})


@contextmanager
def _whole(config: LoraConfig) -> Iterator[None]:
    """Let PEFT pick the tensors of AdaLoRA as they are: it would cut them to their budget, and write in the config."""
    if not is_adalora_config(config):
        yield
        return
    budget = config.rank_pattern
    config.rank_pattern = None
    try:
        yield
    finally:
        config.rank_pattern = budget


def _stored(layer: lora.LoraLayer, adapter: str, change: LowRank) -> dict[str, Tensor]:
    """Return the factors in the shapes and under the names in which PEFT holds them."""
    A, B, _ = change
    if isinstance(layer, lora.Embedding):
        return {f"lora_embedding_B.{adapter}": A, f"lora_embedding_A.{adapter}": B}
    if A.dim() == 3:  # lora_B packs the experts with their index running fastest, lora_A slowest
        A, B = A.permute(1, 2, 0).flatten(1), B.flatten(0, 1)
    kernel = () if is_adalora(layer) else layer.lora_A[adapter].weight.shape[2:]
    A = A.view(*A.shape, *[1] * len(kernel)) if kernel else A
    B = B.unflatten(1, (-1, *kernel)) if kernel else B
    return {f"lora_B.{adapter}.weight": A, f"lora_A.{adapter}.weight": B}


def _without_adapter(key: str, adapter: str) -> str:
    """Return the key in a file of a factor that a model holds under `key`: without the adapter's name."""
    return f"{key.removesuffix('.weight').removesuffix(f'.{adapter}')}{'.weight' * key.endswith('.weight')}"


def _parameters_padded(changes: Sequence[LayerChange]) -> list[LayerChange]:
    """Append zeros to the factors of ``target_parameters``, so that all of those have one rank.

    Then they need no entry in ``rank_pattern``; PEFT takes such entries for mistakes and says so when it loads them.
    """
    rank = max((change.rank for layer, change, _ in changes if isinstance(layer, lora.ParamWrapper)), default=0)
    return [
        LayerChange(layer, _padded(change, rank), scaling) if isinstance(layer, lora.ParamWrapper) else whole
        for whole in changes
        for layer, change, scaling in [whole]
    ]


def _padded(change: LowRank, rank: int) -> LowRank:
    more = rank - change.rank
    return LowRank(functional.pad(change.A, (0, more)), functional.pad(change.B, (0, 0, 0, more)), change.error)


def _without_zeros(whole: LayerChange) -> LayerChange:
    """Leave out what a budget of AdaLoRA has taken away, columns of A next to rows of zeros in B. One is left."""
    layer, change, _ = whole
    if not is_adalora(layer):
        return whole
    kept = (change.A != 0).any(0) & (change.B != 0).any(1)
    if not kept.any():
        kept = torch.arange(max(1, change.rank), device=kept.device) == 0
        change = _padded(change, 1) if change.rank == 0 else change
    return whole._replace(change=LowRank(change.A[:, kept], change.B[kept], change.error))


def _config(model: nn.Module, adapter: str, changes: Sequence[LayerChange], names: dict[int, str]) -> LoraConfig:
    """Return the adapter's config with the ranks of these factors, a scaling of 1, and a start that leaves the base."""
    config = copy.deepcopy(plain(configs_of(model)[adapter]))
    config = as_lora(config) if is_adalora_config(config) else config
    parameters = [change.rank for layer, change, _ in changes if isinstance(layer, lora.ParamWrapper)]
    ranks = {
        name_in_base(model, names[id(layer)]): change.rank
        for layer, change, _ in changes
        if not isinstance(layer, lora.ParamWrapper)
    }
    config.r = config.lora_alpha = parameters[0] if parameters else Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes the keys for regular expressions that fit the end of a name, and for all of it with a "^".
    config.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora = False
    config.init_lora_weights = True
    config.loftq_config = {}
    config.eva_config = config.corda_config = config.lora_ga_config = None  # they belong to other starts
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(_base_model(model), "name_or_path", None) or None
    for field in ("target_modules", "exclude_modules", "target_parameters"):
        if isinstance(getattr(config, field), set):
            setattr(config, field, sorted(getattr(config, field)))
    return config


def _auto_mapping(model: nn.Module, config: LoraConfig) -> dict[str, str] | None:
    """Return the class of the base, by which PEFT's AutoPeftModel finds it where there is no task type."""
    if config.task_type is not None:
        return None
    base = class_of(_base_model(model))
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share their storage with another one, which safetensors refuses."""
    seen: set[tuple[torch.device, int]] = set()
    separate = {}
    for key, tensor in tensors.items():
        storage = tensor.device, tensor.untyped_storage().data_ptr()
        separate[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def _is_embedding(model: nn.Module, name: str, layer: nn.Module) -> bool:
    """Tell if PEFT takes this for one of the model's embeddings, which it may save as a whole."""
    if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES:
        return True
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # not of transformers, or without such a layer
            if getattr(_base_model(model), getter)() is layer:
                return True
    return False


def name_in_base(model: nn.Module, name: str) -> str:
    """Return the name in the base model of a module of `model`."""
    name = name.removeprefix(PREFIX) if isinstance(model, PeftModel) else name
    return name.replace(".base_layer", "")  # of a module within one whose parameters are targets


def _names(model: nn.Module) -> dict[int, str]:
    """Return by id the name of each module, as an unwrapped model has it."""
    modules = modules_of(model)
    names = names_without_wrappers(model, modules)
    return {id(module): names[name] for name, module in modules.items()}


def _base_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def with_config(model: nn.Module) -> nn.Module:
    """Return the model without the wrappers of DistributedDataParallel and torch.compile, and without PEFT's tuner."""
    children = dict(model.named_children())
    if "_orig_mod" in children:
        return with_config(children["_orig_mod"])
    if isinstance(model, BaseTuner):
        return with_config(model.model)
    if isinstance(getattr(model, "peft_config", None), dict):
        return model
    if "module" in children:
        return with_config(children["module"])
    raise TypeError(
        f"a {type(model).__name__} without a peft_config has no adapter to save: hand in the PeftModel, or the model "
        "that add_adapter was called on"
    )


def configs_of(model: Any) -> dict[str, LoraConfig]:
    """Return the configs of a model's adapters, by their names."""
    return model.peft_config  # type: ignore[no-any-return]
