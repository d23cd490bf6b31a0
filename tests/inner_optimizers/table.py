"""All rows, in the order of the page."""

from types import ModuleType

from tests.inner_optimizers import of_few_bits, of_peft, of_pytorch_optimizer, of_small_libraries, of_torch
from tests.inner_optimizers.row import RULES, Row

MODULES: list[ModuleType] = [of_torch, of_peft, of_small_libraries, of_few_bits, of_pytorch_optimizer]
ROWS: list[Row] = [row for module in MODULES for row in module.ROWS]
CELLS = [(row, rule) for row in ROWS for rule in RULES]
