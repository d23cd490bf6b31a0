"""A look at all LoRA layers of a model, good and bad ones: it raises nothing and leaves the model as it is."""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

from torch import nn

from deltaopt.integrations import LIBRARIES
from deltaopt.integrations.protocol import ask_all
from deltaopt.messages import Problem
from deltaopt.triple import LoRATriple


class Survey(NamedTuple):
    """What a library's layers are to one adapter.

    Attributes:
        triples: of the layers that `find_triples` takes.
        refused: its reasons for those that it refuses.
        elsewhere: why layers of the same library have nothing to do with the adapter.
        layers: all of these layers.
        refused_layers: those that are refused.
    """

    triples: list[LoRATriple]
    refused: list[Problem]
    elsewhere: list[Problem]
    layers: list[nn.Module]
    refused_layers: list[nn.Module]


def survey(model: nn.Module, adapter: str) -> Survey:
    """Return what is in a model: modules that describe themselves, and layers of the libraries that are imported."""
    asked = ask_all(model, (ValueError, TypeError))
    found = Survey(asked.triples, asked.refused, [], asked.modules, asked.refused_modules)
    for library, integration in LIBRARIES.items():
        if library in sys.modules:
            more: Survey = importlib.import_module(integration).survey(model, adapter)
            found = Survey(
                found.triples + more.triples,
                found.refused + more.refused,
                found.elsewhere + more.elsewhere,
                found.layers + more.layers,
                found.refused_layers + more.refused_layers,
            )
    return found
