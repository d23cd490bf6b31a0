"""Which parameters are taken: what `find_triples` and the optimizer make of a model, before anything is built."""

from __future__ import annotations

import itertools
import types
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from deltaopt.checks import frozen_problems, set_problems, triple_problems
from deltaopt.description import (
    NO_WEIGHT,
    OTHER,
    REFUSED,
    UNBRANCHED,
    Description,
    FactorParameter,
    LeftOut,
    TakenLayer,
    short_name,
)
from deltaopt.groups import DeltaGroup, Settings, parse_triples
from deltaopt.integrations import surveyed, tied_places
from deltaopt.modules import class_of
from deltaopt.naming import names_without_wrappers
from deltaopt.optimizer import RULES, DeltaLoRAOptimizer
from deltaopt.sharding import as_whole, is_sharded, local_part
from deltaopt.tensors import FLOATS, NOT_LOADED, is_plain, overlapping_pairs
from deltaopt.triple import LoRATriple, named_apart
from deltaopt.weight import WeightState
from deltaopt.wrappers import unwrap

SETTINGS = Settings(update_ratio=2.0, start_step=0, scaling=1.0)
"""Of the optimizer, where none is given."""

TIED = "leave it out of target_modules, or say allow_tied=True"


def describe(model_or_triples: Any, adapter: str = "default") -> Description:
    """Tell which parameters an optimizer takes, and what it leaves out and why.

    Layers that `find_triples` or the optimizer would refuse are listed with their reasons; nothing is raised for them,
    and the layers of libraries stay as they are. Of a model on the meta device shapes and settings
    are described, as if its weights were loaded.

    Args:
        model_or_triples: a model with LoRA layers; or triples, as `DeltaLoRAOptimizer` takes them; or an optimizer
            that was built, also within a wrapper (see `unwrap`).
        adapter: of a model, the adapter whose factors train.

    Returns:
        A `Description`: printed it is a table, in which layers that are alike share a row. `rows` and `left_out` are
        its data, `as_dict()` gives plain JSON types.

    Raises:
        TypeError: for something else than these three.

    Example:
        >>> import torch, deltaopt
        >>> W, A, B = torch.randn(4, 6), torch.zeros(4, 2, requires_grad=True), torch.randn(2, 6, requires_grad=True)
        >>> print(deltaopt.describe([deltaopt.LoRATriple(W, A, B, scaling=torch.tensor(0.5), name="q")]))
        1 LoRA layer taken of these triples
        layers  W                   r  scaling  layout  trained   rule
        q       1 x (4, 6) float32  2  0.5      linear  20: A, B  either
        in total: 1 layer; trained: 20 numbers; W that moves: 24 numbers; "in_place" keeps 80 bytes from step to step
        either: weight_update="in_place" or "folded"
    """
    if isinstance(model_or_triples, nn.Module):
        return _of_model(model_or_triples, adapter)
    if not isinstance(model_or_triples, Iterable):
        return _of_optimizer(model_or_triples)
    groups, _ = parse_triples(model_or_triples, SETTINGS)
    triples = [triple for group in groups for triple in group.triples]
    rows, left_out = _sorted_out(named_apart(triples, ()), tuple(RULES))
    return Description("these triples", rows, left_out)


def _of_model(model: nn.Module, adapter: str) -> Description:
    found = surveyed(model, adapter)
    parameters = dict(model.named_parameters())
    loaded = not parameters or not all(parameter.is_meta for parameter in parameters.values())
    tied = {id(triple): places for triple, places in _tied(model, found.triples, loaded)}
    names_of = names_without_wrappers(model, parameters)
    free = [triple for triple in found.triples if id(triple) not in tied]
    rows, bad = _sorted_out(free, tuple(RULES), loaded, {id(p): names_of[name] for name, p in parameters.items()})
    refused = [LeftOut(REFUSED, label, why) for label, why in found.refused]
    refused += [
        LeftOut(REFUSED, triple.label, f"its W is {' and '.join(tied[id(triple)])}, which would move together: {TIED}")
        for triple in found.triples
        if id(triple) in tied
    ]
    elsewhere = [LeftOut(OTHER, label, why) for label, why in found.elsewhere]
    known = {id(p) for triple in found.triples for p in _parameters(triple)}
    known |= {id(p) for layer in found.refused_layers for p in layer.parameters()}
    others = {names_of[name]: p for name, p in parameters.items() if p.requires_grad and id(p) not in known}
    left_out = [*refused, *bad, *elsewhere, *_without_weight(others)]
    left_out += _unbranched(model, found.triples, found.layers)
    return Description(f"this {class_of(model).__name__} (adapter {adapter!r})", rows, left_out, loaded)


def _of_optimizer(candidate: Any) -> Description:
    try:
        optimizer: DeltaLoRAOptimizer = unwrap(candidate)
    except TypeError as error:
        raise TypeError(
            f"describe() takes a model, a list of triples or an optimizer, got a {type(candidate).__name__} ({error})"
        ) from error
    rows, left_out = _sorted_out(optimizer.triples, (optimizer.weight_update,))
    factors = {id(p) for triple in optimizer.triples for p in _parameters(triple)}
    held = [
        (name, p)
        for group in optimizer.param_groups
        for name, p in zip(group.get("param_names", itertools.repeat(None)), group["params"], strict=False)
        if id(p) not in factors
    ]
    left_out += _without_weight({name or f"parameter {i}": p for i, (name, p) in enumerate(held)})
    return Description(f"this optimizer (weight_update={optimizer.weight_update!r})", rows, left_out)


def _sorted_out(
    triples: Sequence[LoRATriple],
    rules: Sequence[str],
    loaded: bool = True,
    names_of: Mapping[int, str] = types.MappingProxyType({}),
) -> tuple[list[TakenLayer], list[LeftOut]]:
    """Return the triples that one of these rules takes as rows, and the others with the reasons.

    Args:
        triples: with names of their own.
        rules: names of rules.
        loaded: False if the tensors have shapes alone.
        names_of: the names of parameters, by their id, as far as they are known.
    """
    left_out, weights = [], []
    for triple in triples:
        weight = WeightState(triple, DeltaGroup([triple], SETTINGS))
        try:
            weight.resolve()
        except (RuntimeError, AttributeError) as error:
            left_out.append(LeftOut(REFUSED, triple.label, str(error).removeprefix(f"{triple.label}: ")))
        else:
            weights.append(weight)
    problems = {rule: _problems(weights, rule, loaded) for rule in rules}
    takes = {weight: [rule for rule in rules if weight not in problems[rule]] for weight in weights}
    left_out += [LeftOut(REFUSED, w.label, problems[rules[0]][w]) for w in weights if not takes[w]]
    taken = [weight for weight in weights if takes[weight]]
    shared = _shared(taken, loaded, names_of)
    return [_row(weight, takes[weight], problems, shared[weight]) for weight in taken], left_out


def _problems(weights: Sequence[WeightState], rule_name: str, loaded: bool) -> dict[WeightState, str]:
    """Return what the optimizer would say of each weight that it refuses with this rule."""
    rule = RULES[rule_name]()
    found: dict[WeightState, list[str]] = {}
    unwritable = {weight: weight.weight_problems() for weight in weights}
    for weight in weights:
        sentences = [*frozen_problems(weight), *triple_problems(weight, rule, unwritable[weight])]
        found[weight] = sentences if loaded else _apart_from_loading(sentences, weight.tensors.W)
    good = [weight for weight in weights if not found[weight]]
    if loaded:  # tensors without memory share none
        by_label = {weight.label: weight for weight in good}
        for label, sentence in set_problems(good, {w for w in good if not unwritable[w]}, rule):
            found[by_label[label]].append(sentence)
    return {weight: "; ".join(sentences) for weight, sentences in found.items() if sentences}


def _apart_from_loading(sentences: Iterable[str], W: Tensor) -> list[str]:
    """Return the problems that stay when the model is loaded."""
    packed = f"W is packed ({_dtype(W)}) and cannot be read and written as a matrix"
    return [s.replace(f"W {NOT_LOADED}", packed) for s in sentences if not s.endswith(NOT_LOADED)]


def _row(
    weight: WeightState, takes: Sequence[str], problems: Mapping[str, Mapping[WeightState, str]], shared: Shared
) -> TakenLayer:
    triple, tensors = weight.triple, weight.tensors
    A, B = weight.triple.view.factors(*map(as_whole, (tensors.W, tensors.A, tensors.B)))
    shape = tuple(tensors.W.shape) if _is_numbers(tensors.W) else (A.shape[-2], B.shape[-1])
    r, size = A.shape[-1], tensors.compute_dtype().itemsize
    kept = size * (A.numel() + B.numel()) * (1 if tensors.W.device.type in ("cpu", "meta") else 3)
    if weight.is_sharded:  # what is here of them, as they are
        kept = sum(local_part(parameter).nbytes for parameter in tensors.parameters)
    return TakenLayer(
        name=triple.label,
        shape=shape,
        dtype=_dtype(tensors.W),
        device=str(tensors.W.device),
        r=r,
        scaling=triple.scaling,
        layout=triple.layout,
        rows=triple.rows,
        columns=triple.columns,
        parameters=shared.parameters,
        rule=takes[0] if len(takes) == 1 else "either",
        why=next((found[weight] for found in problems.values() if weight in found), ""),
        sharing=shared.sentences,
        moves=A.numel() // r * B.shape[-1],
        kept_bytes=kept,
    )


class Shared(NamedTuple):
    """The parameters of one triple, and what it shares with others, in sentences."""

    parameters: tuple[FactorParameter, ...]
    sentences: tuple[str, ...]


def _shared(weights: Sequence[WeightState], loaded: bool, known: Mapping[int, str]) -> dict[WeightState, Shared]:
    """Return it for all triples that are taken."""
    parameters = {weight: _parameters(weight.triple) for weight in weights}
    users = Counter(id(p) for held in parameters.values() for p in held)
    scalings = Counter(weight.triple.branch.place() for weight in weights)
    names_of = dict(known)
    sentences: dict[WeightState, list[str]] = {weight: [] for weight in weights}
    for weight, held in parameters.items():
        for p in held:
            own = _own_name(weight.triple, p)
            names_of.setdefault(id(p), f"{weight.label}.{own}")
            if users[id(p)] > 1:
                sentences[weight].append(f"{short_name(own)} is in {users[id(p)]} triples")
        if (count := scalings[weight.triple.branch.place()]) > 1:
            sentences[weight].append(f"one number is the scaling of {count} triples")
        if weight.triple.tied:
            sentences[weight].append("W is used in another place too, which moves with it")
    for weight, count in _on_one_weight(weights).items() if loaded else ():
        sentences[weight].append(f"one W is in {count} triples")
    return {
        weight: Shared(
            tuple(_factor_parameter(weight.triple, p, names_of[id(p)]) for p in held), tuple(sentences[weight])
        )
        for weight, held in parameters.items()
    }


def _on_one_weight(weights: Sequence[WeightState]) -> dict[WeightState, int]:
    """Return the weights that share the memory of their W with others, and with how many, themselves included.

    Two triples of one sharded W are refused.
    """
    readable = [weight for weight in weights if is_plain(weight.tensors.W)]
    pairs = overlapping_pairs([weight.tensors.W for weight in readable])
    return {readable[i]: count + 1 for i, count in Counter(i for pair in pairs for i in pair).items()}


def _parameters(triple: LoRATriple) -> tuple[Tensor, ...]:
    """Return the parameters that the factors are made of; none where the adapter was deleted."""
    try:
        return triple.parameters
    except RuntimeError:
        return ()


def _own_name(triple: LoRATriple, parameter: Tensor) -> str:
    """Return the name of a parameter in the module that it was registered with; "A" or "B" of a tensor."""
    places = zip(triple.parameter_sources, triple.parameter_names, strict=True)
    for place, name in places:
        if isinstance(place, tuple) and attrgetter(place[1])(place[0]) is parameter:
            return place[1]
        if place is parameter:
            return name
    return "parameter"


def _factor_parameter(triple: LoRATriple, parameter: Tensor, name: str) -> FactorParameter:
    factor = next((letter for letter in "AB" if getattr(triple, letter) is parameter), "")
    return FactorParameter(name, factor, tuple(parameter.shape), _dtype(parameter), parameter.requires_grad)


def _is_numbers(tensor: Tensor) -> bool:
    """Tell if the shape of this tensor is that of a matrix of numbers, and not of a packed one."""
    return tensor.dtype in FLOATS


def _dtype(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    if is_sharded(tensor):
        return f"{_dtype(local_part(tensor.detach()))}, sharded"
    return kind if is_plain(tensor) else f"{kind} {type(tensor).__name__}"


def _tied(model: nn.Module, triples: Sequence[LoRATriple], loaded: bool) -> list[tuple[LoRATriple, list[str]]]:
    """Return the triples whose W has several places in the model; without memory, Parameters tell."""
    if loaded:
        return tied_places(model, triples)
    places: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append(f"{module_name}.{name}".lstrip("."))
    return [(triple, found) for triple in triples if len(found := places.get(id(triple.W), [])) > 1]


def _without_weight(parameters: Mapping[str, Tensor]) -> list[LeftOut]:
    why = "trained by the inner optimizer, with no W to move"
    return [LeftOut(NO_WEIGHT, name, why, parameter.numel()) for name, parameter in parameters.items()]


def _unbranched(model: nn.Module, triples: Iterable[LoRATriple], lora_layers: Iterable[nn.Module]) -> list[LeftOut]:
    """Return the layers with a frozen matrix that no branch is next to, as linear ones and embeddings are."""
    inside = {id(module) for layer in lora_layers for module in layer.modules()}
    taken = {id(tensor) for triple in triples for tensor in (triple.W, *_parameters(triple))}
    found = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() < 2 or weight.requires_grad or id(module) in inside or id(weight) in taken:
            continue
        if all(id(parameter) not in taken for parameter in module._parameters.values()):
            found[name] = class_of(module).__name__
    names_of = names_without_wrappers(model, found)
    return [LeftOut(UNBRANCHED, names_of[name] or "the model itself", kind) for name, kind in found.items()]
