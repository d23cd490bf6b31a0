"""Delta-LoRA (arXiv 2309.02411) as an optimizer: trains LoRA factors and moves the frozen weight with them."""

from deltaopt.integrations import find_triples, other_parameters
from deltaopt.optimizer import DeltaLoRAOptimizer
from deltaopt.triple import LoRATriple

__version__ = "0.1.0"

__all__ = ["DeltaLoRAOptimizer", "LoRATriple", "find_triples", "other_parameters"]
