"""PEFT: its LoRA layers as triples, and the trained change as a PEFT adapter.

Layers are recognised by their class, not by ``PeftModel``: transformers and diffusers inject them without one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from deltaopt.checkpoint.files import PathLike
from deltaopt.export import export_adapter
from deltaopt.integrations import tied_places
from deltaopt.integrations.layer_triple import dropout_problems, first_of
from deltaopt.integrations.peft import adalora
from deltaopt.integrations.peft.absence import frozen_adapter, lora_adapters
from deltaopt.integrations.peft.absence import why_none as why_none
from deltaopt.integrations.peft.adapter_files import LayerChange, configs_of, with_config, write_adapter
from deltaopt.integrations.peft.moved_config import configs_by_layer
from deltaopt.integrations.peft.saved_adapter import SavedAdapter
from deltaopt.integrations.peft.triple import CONVOLUTIONS, PeftTriple, has_moved
from deltaopt.integrations.protocol import describes_itself
from deltaopt.integrations.survey import Survey
from deltaopt.messages import Problem, layers, names, problems_of, raise_problems
from deltaopt.modules import class_of, modules_of
from deltaopt.naming import names_without_wrappers
from deltaopt.optimizer import DeltaLoRAOptimizer
from deltaopt.ranks import Ranks
from deltaopt.roll_call import RollCall
from deltaopt.save_watch import SaveWatch
from deltaopt.sharding import ranks_of
from deltaopt.triple import LoRATriple
from deltaopt.weight import WeightState
from deltaopt.wrappers import unwrap

SUPPORTED = (lora.Linear, lora.Embedding, *CONVOLUTIONS, lora.ParamWrapper, *adalora.LAYERS)
QUANTIZED = [f"peft.tuners.lora.{name}" for name in ("bnb", "torchao", "gptq", "awq", "eetq", "hqq", "aqlm", "inc")]
"""PEFT's modules of layers on a quantized base, with the branch of lora.Linear."""


HEADLINE = "these PEFT layers cannot be used"


def survey(model: nn.Module, adapter: str, allow_dropout: bool, attach: bool) -> Survey:
    """Return the layers of PEFT that hold `adapter`, and what the others are; see `deltaopt.integrations.LIBRARIES`."""
    tuned = {
        name: module
        for name, module in modules_of(model).items()
        if isinstance(module, BaseTunerLayer) and not describes_itself(module) and adalora.has_rank(module, adapter)
    }
    names_of = names_without_wrappers(model, tuned)
    holders = [(names_of[name], module) for name, module in tuned.items() if adapter in lora_adapters(module)]
    reasons = [_refusal(layer, adapter, allow_dropout) for _, layer in holders]
    if not any(reasons):
        reasons = [frozen_adapter(model, [layer for _, layer in holders], adapter)] * len(holders)
    refused = [Problem(name, why) for (name, _), why in zip(holders, reasons, strict=True) if why is not None]
    elsewhere = [
        Problem(names_of[name], _other_content(module))
        for name, module in tuned.items()
        if adapter not in lora_adapters(module)
    ]
    attach = attach and not refused
    start = _start(model, adapter)
    saves, configs = SaveWatch.of(model) if attach else None, configs_by_layer(modules_of(model).values(), adapter)
    triples: list[LoRATriple] = [
        kind_of(layer)(
            layer, adapter, _label(name, layer), allow_dropout, start, saves, configs.get(id(layer), []), attach=attach
        )
        for (name, layer), why in zip(holders, reasons, strict=True)
        if why is None
    ]
    bad = [layer for (_, layer), why in zip(holders, reasons, strict=True) if why is not None]
    return Survey(triples, refused, elsewhere, list(tuned.values()), bad)


def kind_of(layer: lora.LoraLayer) -> type[PeftTriple]:
    """Return the class of a layer's triples."""
    return adalora.AdaLoraTriple if adalora.is_adalora(layer) else PeftTriple


def save_adapter(
    model: nn.Module,
    optimizer: DeltaLoRAOptimizer,
    directory: PathLike,
    rank: int | None = None,
    *,
    adapter: str | None = None,
) -> SavedAdapter:
    """Write the whole change, W's and the branch's, as a PEFT adapter for the base as it was before fine-tuning.

    ``PeftModel.from_pretrained(base, directory)`` on those weights then computes what `model` computes now. With a
    constant `update_ratio` the adapter has twice the rank that trained, and the same rank where the product was zero
    at `start_step`, as at LoRA's usual start. Biases, `modules_to_save` and trained tokens are written as PEFT writes
    them. An adapter of AdaLoRA is written as one of plain LoRA, with a rank for each layer. For a model of diffusers
    ``pytorch_lora_weights.safetensors`` is written too, which its pipelines load by ``load_lora_weights(directory)``.

    It counts from the base of the optimizer: after `DeltaLoRAOptimizer.rebase` that is another weight than the pristine
    one, and a warning says so. After PiSSA, OLoRA, CorDA and LoRA-GA, which change the base, the adapter is for the
    base before that. The weight of an embedding that is a target is not written: after ``resize_token_embeddings``
    save the resized base too.

    Files of the same names are replaced, other files in the folder stay. A process that is killed while it writes
    leaves the old adapter, the new one, or a folder without ``adapter_config.json``. With several processes, call it
    in one of them; where parameters are sharded (FSDP2, tensor parallelism), in all of them: the first one writes.

    Args:
        model: a PeftModel, or a model with transformers' ``add_adapter``; it is not changed.
        optimizer: whose triples are all layers of `model` that hold the adapter; a wrapped one too, see
            `deltaopt.unwrap`.
        directory: the folder for ``adapter_config.json`` and ``adapter_model.safetensors`` (float32 factors, or
            float64 for a float64 model).
        rank: compress each layer to this rank; see `deltaopt.export_adapter`. Default: exact.
        adapter: its name in `model`. Default: the one that the optimizer trains.

    Returns:
        By name of the triple: the relative error (Frobenius norm) of the layer's change; 0.0 where it is exact.
        Printed, it says the rank, which servers limit: it is `.rank`, and `.ranks` by name of the triple.

    Raises:
        ValueError: if the optimizer's triples are not the layers of `model` that hold the adapter, or a layer is
            merged or rescaled, or its displacement or what it was before fine-tuning is not known. All layers in one
            message.
        TypeError: for a model without an adapter, or another optimizer.
        RuntimeError: in `base_weights`. In each case nothing is written.
        NotADirectoryError: if `directory` is a file.
    """
    optimizer = unwrap(optimizer)
    holders = () if optimizer.ranks is not None else ranks_of(list(model.parameters()))
    roll_call = RollCall(Ranks(holders) if holders else optimizer.ranks, "save_adapter()")
    with roll_call.told():
        saved = _save_adapter(with_config(model), optimizer, directory, rank, adapter, roll_call.is_first)
        roll_call.meet()
    return saved


def _save_adapter(
    model: nn.Module,
    optimizer: DeltaLoRAOptimizer,
    directory: PathLike,
    rank: int | None,
    adapter: str | None,
    writes: bool,
) -> SavedAdapter:
    """Do what `save_adapter` does on one rank, which writes the files or leaves that to another one."""
    weights = _peft_weights(optimizer)
    adapter = _adapter_to_save(model, sorted({triple.adapter for triple in weights}), adapter)
    weights = {triple: weight for triple, weight in weights.items() if triple.adapter == adapter}
    _check_savable(model, weights, adapter)
    exported = export_adapter(optimizer, rank, from_pristine=True)
    _warn_of_other_bases(weights.values())
    changes = [LayerChange(triple.layer, exported[triple.label], triple.branch_scaling) for triple in weights]
    without = [LayerChange(layer, adalora.no_change(layer), 1.0) for _, layer in _without_rank(model, adapter, weights)]
    ranks = write_adapter(model, adapter, changes + without, directory, writes)[: len(changes)]
    return SavedAdapter(
        {triple.label: exported[triple.label].error for triple in weights},
        {triple.label: rank for triple, rank in zip(weights, ranks, strict=True)},
        trained=max(triple.layer.r[adapter] for triple in weights),
    )


def _start(model: nn.Module, adapter: str) -> bool | str:
    """`init_lora_weights` of the adapter's config, which PeftModel, its tuner or transformers' model holds."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and adapter in configs:
            return getattr(configs[adapter], "init_lora_weights", True)
    return True


def _peft_weights(optimizer: DeltaLoRAOptimizer) -> dict[PeftTriple, WeightState]:
    weights = {weight.triple: weight for weight in optimizer.weights() if isinstance(weight.triple, PeftTriple)}
    foreign = [triple.label for triple in optimizer.triples if not isinstance(triple, PeftTriple)]
    if foreign:
        raise ValueError(
            f"the triples {names(foreign)} are no layers of PEFT (found by find_triples), so a PEFT adapter cannot "
            "hold their change: give them an optimizer of their own, or take all changes from export_adapter()"
        )
    return weights


def _adapter_to_save(model: nn.Module, trained: list[str], adapter: str | None) -> str:
    if adapter is None and len(trained) > 1:
        raise ValueError(
            f"the optimizer trains several adapters ({', '.join(trained)}): save each to a folder of its own, "
            f"save_adapter(..., adapter={trained[0]!r})"
        )
    adapter = adapter if adapter is not None else trained[0]
    for place, known in (("the optimizer trains", trained), ("the model holds", sorted(configs_of(model)))):
        if adapter not in known:
            raise ValueError(f"adapter {adapter!r} cannot be saved: {place} {', '.join(known)}. Name one of these")
    return adapter


def _without_rank(model: nn.Module, adapter: str, weights: Iterable[PeftTriple]) -> list[tuple[str, lora.LoraLayer]]:
    """Return the layers, with their names, that hold an adapter of AdaLoRA of which nothing is left, and no triple."""
    saved = {id(triple.layer) for triple in weights}
    return [
        (name, layer)
        for name, layer in modules_of(model).items()
        if adalora.is_adalora(layer)
        and id(layer) not in saved
        and adapter in lora_adapters(layer)
        and not adalora.has_rank(layer, adapter)
    ]


def _check_savable(model: nn.Module, weights: Mapping[PeftTriple, WeightState], adapter: str) -> None:
    """Raise ValueError if the change of a layer is not known, or not expressible as an adapter of this model."""
    modules, saved = {id(module) for module in modules_of(model).values()}, {id(triple.layer) for triple in weights}
    without_rank = _without_rank(model, adapter, weights)
    saved |= {id(layer) for _, layer in without_rank}
    problems: list[Problem] = []
    for triple, weight in weights.items():
        found = triple.change_problems() + triple.pristine_problems(origin_known=weight.origin is not None)
        found += [weight.ledger.lost] if weight.ledger.lost is not None else []
        if id(triple.layer) not in modules:
            found = [
                f"it is no layer of this {type(model).__name__} (a copy, another model, or the adapter was unloaded): "
                "hand in the model whose triples the optimizer has"
            ]
        problems += problems_of(triple.label, found)
    problems += [
        Problem(
            name,
            f"it holds {adapter!r} and is no triple of the optimizer: register it too; in a group of its own, "
            '{"triples": [...], "update_ratio": 0.0}, it is plain LoRA',
        )
        for name, layer in modules_of(model).items()
        if isinstance(layer, lora.LoraLayer) and adapter in lora_adapters(layer) and id(layer) not in saved
    ]
    problems += [
        Problem(
            name,
            f"AdaLoRA has taken all of its rank, so that it is no triple of this optimizer, and its W has moved for "
            f"{adapter!r}, which no adapter on the pristine base would hold: save it with the optimizer that moved it, "
            "or save all weights, merge_and_unload().save_pretrained(directory)",
        )
        for name, layer in without_rank
        if has_moved(layer, adapter)
    ]
    problems += [
        Problem(
            triple.label,
            f"its W is {' and '.join(places)}, and has moved in all of these places, which an adapter of "
            "one layer cannot express: save all weights, merge_and_unload().save_pretrained(directory)",
        )
        for triple, places in tied_places(model, [triple for triple, weight in weights.items() if weight.moved])
    ]
    raise_problems(ValueError, "this adapter cannot be saved (nothing was written)", problems)


def _warn_of_other_bases(weights: Iterable[WeightState]) -> None:
    others = [weight.label for weight in weights if weight.rebased]
    if others:
        warnings.warn(
            f"the base of {layers(others)} is what their weights were at rebase() or without_ledger(), or when this "
            "optimizer was built on weights that another one had moved. This adapter is right on those weights, and "
            "not on the pristine ones",
            stacklevel=3,
        )


def _refusal(layer: lora.LoraLayer, adapter: str, allow_dropout: bool) -> str | None:
    kind = class_of(layer)
    if kind not in SUPPORTED and kind.__module__ not in QUANTIZED:
        supported = ", ".join(cls.__name__ for cls in SUPPORTED)
        return (
            f"it is a {kind.__module__}.{kind.__qualname__} (another method than LoRA, or an unknown base). W can be "
            f'moved in lora.{supported}, and with weight_update="folded" the base may be quantized '
            f"({', '.join(QUANTIZED)})"
        )
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        return f"its branch is a LoRA variant ({variant}), which is not scaling * B @ A: use plain LoRA"
    if getattr(layer.get_base_layer(), "groups", 1) != 1:
        return "its convolution has groups, for which scaling * B @ A is no change of W: leave it out of target_modules"
    if getattr(layer.get_base_layer(), "padding_mode", "zeros") != "zeros":
        return (
            f"its convolution has padding_mode={layer.get_base_layer().padding_mode!r} and PEFT's branch pads with "
            "zeros, so that scaling * B @ A is no change of W: leave it out of target_modules"
        )
    return first_of([] if allow_dropout else dropout_problems(layer.lora_dropout[adapter], "lora_dropout"))


def _other_content(layer: BaseTunerLayer) -> str:
    """Say what a layer holds that does not hold the adapter."""
    if others := sorted(lora_adapters(layer)):
        return f"it holds {', '.join(map(repr, others))} only"
    kind = class_of(layer)
    return f"it is a {kind.__module__}.{kind.__qualname__}, which is another method than LoRA"


def _label(name: str, layer: lora.LoraLayer) -> str:
    # Wrappers of several parameters of one module are nested: "experts", "experts.base_layer".
    return f"{name}.{layer.parameter_name}" if isinstance(layer, lora.ParamWrapper) else name
