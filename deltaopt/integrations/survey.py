"""What a library's layers are to one adapter: those that are taken, and those that are not, with the reasons."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from deltaopt.messages import Problem
from deltaopt.triple import LoRATriple


class Survey(NamedTuple):
    """What a library's layers are to one adapter.

    Attributes:
        triples: of the layers that are taken.
        refused: the reasons for those that are refused.
        elsewhere: why layers of the same library have nothing to do with the adapter.
        layers: all of these layers.
        refused_layers: those that are refused.
    """

    triples: list[LoRATriple]
    refused: list[Problem]
    elsewhere: list[Problem]
    layers: list[nn.Module]
    refused_layers: list[nn.Module]

    def joined(self, other: Survey) -> Survey:
        """Return this survey and another one as one."""
        return Survey(
            self.triples + other.triples,
            self.refused + other.refused,
            self.elsewhere + other.elsewhere,
            self.layers + other.layers,
            self.refused_layers + other.refused_layers,
        )
