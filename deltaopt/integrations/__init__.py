"""Finding the triples of a model, with the libraries that are already imported.

A model can hold layers of a library only if that library was imported, so nothing is imported here that the
program did not import itself. One file or folder a library.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce

from torch import Tensor, nn

from deltaopt.integrations import adapter_saves as adapter_saves
from deltaopt.integrations import inner_optimizers as inner_optimizers
from deltaopt.integrations import protocol
from deltaopt.integrations.absence import why_none
from deltaopt.integrations.survey import Survey
from deltaopt.messages import Problem, raise_problems
from deltaopt.modules import modules_of
from deltaopt.sharding import is_sharded
from deltaopt.sharers import keep_base_of_sharers
from deltaopt.tensors import is_plain, overlapping_pairs
from deltaopt.triple import LoRATriple

LIBRARIES = {
    "peft": "deltaopt.integrations.peft",
    "loralib": "deltaopt.integrations.loralib",
    "litgpt.lora": "deltaopt.integrations.litgpt",
    "torchtune.modules.peft": "deltaopt.integrations.torchtune",
}
"""The module that has a library's LoRA layers, and ours that reads them.

Ours has ``survey(model, adapter, allow_dropout, attach) -> Survey`` and the ``HEADLINE`` over the layers that it
refuses. With `attach` the triples put the hooks on the model that an optimizer needs, unless a layer is refused;
without, the model stays as it is. Where nothing is found, its ``why_none(model, adapter)`` is asked for the reason, if
it has one.
"""


def find_triples(
    model: nn.Module,
    adapter: str = "default",
    *,
    allow_dropout: bool = False,
    allow_tied: bool = False,
) -> list[LoRATriple]:
    """Return all LoRA layers of a model as triples, library by library in the order of ``model.named_modules()``.

    - PEFT: ``Linear`` (on ``nn.Linear`` and GPT-2's ``Conv1D``), ``Embedding``, ``Conv1d``/``2d``/``3d`` and
      ``target_parameters``, and AdaLoRA's ``SVDLinear``; with ``PeftModel``, transformers' ``add_adapter`` or
      diffusers. Layers on a quantized base (bitsandbytes, torchao, GPTQ, AWQ, ...) are found too, for
      ``weight_update="folded"``.
    - loralib: ``Linear``, ``Embedding``, ``MergedLinear``, and ``Conv2d`` with groups=1.
    - litgpt: ``LoRALinear`` and ``LoRAQKVLinear``.
    - torchtune: ``LoRALinear``.
    - Any class with a method ``lora_triples(self)``, which returns its triples; see docs/containers.md.

    A layer with branches on several parts of one W, as a fused query, key and value, gives a triple for each part.

    Args:
        model: the model, with its adapters in place and initialised.
        adapter: the adapter of PEFT whose factors train. Layers of other libraries have one branch, without a name.
        allow_dropout: accept dropout in the low-rank branch. It makes the gradients of W and of A @ B differ,
            so that the method loses its ground (section 4.2 and Eq. 7 of the paper); for ablations.
        allow_tied: accept a W that another module uses too (tied embeddings). That module moves with it.

    Returns:
        The triples, named as their modules; those of parts as "module.q", or "module.0" where parts have no names.

    Raises:
        ValueError: if there is no LoRA layer, or for layers that cannot be moved, all in one message.
        TypeError: if a method ``lora_triples`` returns something else.
    """
    triples: list[LoRATriple] = []
    for headline, found in _surveys(model, adapter, allow_dropout, attach=True):
        raise_problems(ValueError, headline, found.refused)
        triples += found.triples
    if not triples:
        raise ValueError(why_none(model, adapter, LIBRARIES))
    tied = tied_places(model, triples)
    if not allow_tied:
        _refuse_tied(tied)
    for triple, _ in tied:
        triple.tie()
    keep_base_of_sharers(model, triples)
    return triples


def surveyed(model: nn.Module, adapter: str) -> Survey:
    """Return all LoRA layers of a model, good and bad ones; nothing is raised for the bad ones.

    Layers of the libraries stay as they are. A method ``lora_triples`` may put a hook on its module.
    """
    return reduce(Survey.joined, (found for _, found in _surveys(model, adapter, allow_dropout=False, attach=False)))


def other_parameters(model: nn.Module, triples: Iterable[LoRATriple]) -> list[nn.Parameter]:
    """Return what else of `model` trains: every parameter that requires grad and is no factor of a triple.

    Classifier heads, biases, norms, ``modules_to_save``: hand them to the optimizer as `params`, or they are
    left as they are.
    """
    factors = {id(factor) for triple in triples for factor in triple.parameters}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in factors]


def tied_places(model: nn.Module, triples: Iterable[LoRATriple]) -> list[tuple[LoRATriple, list[str]]]:
    """Return each triple whose W is in more than one place of `model`, with the names of the places.

    Sharded weights are told by what they are, so that all ranks find the same: one whose piece is empty too.
    """
    places = [
        (f"{module_name}.{name}".lstrip("."), parameter)
        for module_name, module in modules_of(model).items()  # a module under two names is one place
        if module._parameters
        for name, parameter in module.named_parameters(recurse=False)
    ]
    triples = list(triples)
    moving = [triple for triple in triples if _has_memory(triple.W)]  # others: refused later
    memory = [(name, parameter) for name, parameter in places if _has_memory(parameter)]
    users: dict[int, list[str]] = {}
    for i, j in overlapping_pairs([*(parameter for _, parameter in memory), *(triple.W for triple in moving)]):
        if i < len(memory) <= j:
            users.setdefault(id(moving[j - len(memory)]), []).append(memory[i][0])
    sharded: dict[int, list[str]] = {}
    for name, parameter in places:
        if is_sharded(parameter):
            sharded.setdefault(id(parameter), []).append(name)
    found = [(triple, users.get(id(triple), sharded.get(id(triple.W), []))) for triple in triples]
    return [(triple, names) for triple, names in found if len(names) > 1]


def _has_memory(tensor: Tensor) -> bool:
    return is_plain(tensor) and not tensor.is_meta


def _surveys(model: nn.Module, adapter: str, allow_dropout: bool, attach: bool) -> Iterator[tuple[str, Survey]]:
    """Yield what the modules are that describe themselves, and the layers of each library that is imported.

    Each comes with the headline over what is refused.
    """
    yield protocol.HEADLINE, protocol.survey(model, (ValueError,) if attach else (ValueError, TypeError))
    for library, name in LIBRARIES.items():
        if library in sys.modules:
            integration = importlib.import_module(name)
            yield integration.HEADLINE, integration.survey(model, adapter, allow_dropout, attach)


def _refuse_tied(tied: Sequence[tuple[LoRATriple, list[str]]]) -> None:
    raise_problems(
        ValueError,
        "these weights are used in more than one place, and moving them for their LoRA branch would move the "
        "others too. Leave them out of target_modules, or pass allow_tied=True",
        [Problem(triple.label, f"its W is {' and '.join(places)}") for triple, places in tied],
    )
