"""How the metrics are written, and which difference of each is too small to matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Measure:
    """One metric in tables.

    Attributes:
        title: of the column.
        factor: what a stored value is multiplied by: 100 for a share that is written in percent.
        digits: after the point.
        margin: in the units of the table. Two methods whose difference is within it are taken as equal.
    """

    title: str
    factor: float
    digits: int
    margin: float

    def number(self, value: float) -> str:
        return f"{self.factor * value:.{self.digits}f}"

    def signed(self, value: float) -> str:
        text = f"{self.factor * value:+.{self.digits}f}"
        return text if text.strip("+-0.") else self.number(0.0)  # no sign before a zero

    @property
    def stored_margin(self) -> float:
        return self.margin / self.factor


PUBLIC_LORA_BLEU = (68.9, 70.4)
"""Lowest and highest of the public runs of plain LoRA with GPT-2 Medium on E2E."""

MEASURES: Mapping[str, Measure] = {
    "accuracy": Measure("accuracy, %", 100, 2, 1.0),
    "f1": Measure("F1, %", 100, 2, 1.0),
    "matthews": Measure("Matthews, %", 100, 2, 1.0),
    "pearson": Measure("Pearson, %", 100, 2, 1.0),
    "spearman": Measure("Spearman, %", 100, 2, 1.0),
    "loss": Measure("loss", 1, 3, 0.02),
    "BLEU": Measure("BLEU", 1, 2, 1.0),
    "NIST": Measure("NIST", 1, 3, 0.1),
    "METEOR": Measure("METEOR", 1, 2, 1.0),
    "ROUGE-L": Measure("ROUGE-L", 1, 2, 1.0),
    "CIDEr": Measure("CIDEr", 1, 3, 0.1),
    "TER": Measure("TER", 1, 4, 0.01),
    "ROUGE-1": Measure("ROUGE-1", 1, 2, 1.0),
    "ROUGE-2": Measure("ROUGE-2", 1, 2, 1.0),
    "forgetting": Measure("forgetting", 1, 4, 0.02),
}
"""Margins were fixed before any run. One point is less than what separates public runs of one and the same method
(`PUBLIC_LORA_BLEU`). 0.02 of a loss is 2 % of a perplexity."""


def measure(metric: str) -> Measure:
    """Return how a metric is written.

    A part of the test data has the ending of its name: "BLEU_seen". A metric that is not known has four digits.
    """
    name, _, part = metric.partition("_")
    found = MEASURES.get(name, Measure(name, 1, 4, 0.02))
    return replace(found, title=f"{found.title}, {part}") if part else found
