"""Delta-LoRA (arXiv 2309.02411) as an optimizer: trains LoRA factors and moves the frozen weight with them."""

from deltaopt import schedules
from deltaopt.checkpoint.files import load, save
from deltaopt.checkpoint.format import without_compensation, without_ledger
from deltaopt.checkpoint.resume import WeightMismatchError
from deltaopt.describe import describe
from deltaopt.export import export_adapter, merged_weights
from deltaopt.factors import Factor
from deltaopt.integrations import find_triples, other_parameters
from deltaopt.lowrank import LowRank
from deltaopt.optimizer import DeltaLoRAOptimizer
from deltaopt.ranks import RanksDisagreeError
from deltaopt.small_states import leave_out_compensation
from deltaopt.triple import LoRATriple
from deltaopt.wrappers import unwrap

__version__ = "0.1.0"

__all__ = [
    "DeltaLoRAOptimizer",
    "Factor",
    "LoRATriple",
    "LowRank",
    "RanksDisagreeError",
    "WeightMismatchError",
    "describe",
    "export_adapter",
    "find_triples",
    "leave_out_compensation",
    "load",
    "merged_weights",
    "other_parameters",
    "save",
    "schedules",
    "unwrap",
    "without_compensation",
    "without_ledger",
]
