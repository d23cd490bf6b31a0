"""All routes, in the order of the page, and the cells that are known to be wrong."""

from types import ModuleType

from tests.routes import (
    through_accelerate,
    through_averages,
    through_deltaopt,
    through_diffusers,
    through_lightning,
    through_loralib,
    through_peft,
    through_torch,
    through_transformers,
)
from tests.routes.route import Route, routes_of
from tests.routes.runs import COLUMNS

MODULES: list[ModuleType] = [
    through_peft,
    through_transformers,
    through_accelerate,
    through_lightning,
    through_diffusers,
    through_loralib,
    through_torch,
    through_averages,
    through_deltaopt,
]
ROUTES: list[Route] = [way for module in MODULES for way in routes_of(module)]
CELLS = [(way, column) for way in ROUTES for column in COLUMNS]

BEING_MENDED: set[tuple[str, str]] = {
    ("peft_state_dict", "in place"),
    ("peft_state_dict", "folded, product not zero"),
    ("trainer_checkpoint", "in place"),
    ("trainer_checkpoint", "folded, product not zero"),
    ("trainer_push", "in place"),
    ("trainer_push", "folded, product not zero"),
    ("save_pretrained_of_a_state", "in place"),
    ("save_pretrained_of_a_state", "folded, product not zero"),
    ("save_lora_weights", "in place"),
    ("save_lora_weights", "folded, product not zero"),
    ("save_lora_adapter", "in place"),
    ("save_lora_adapter", "folded, product not zero"),
    ("lora_state_dict", "in place"),
    ("lora_state_dict", "folded, product not zero"),
    ("averaged_from_before", "folded, zero product"),
    ("averaged_from_before", "folded, product not zero"),
    ("averaged_and_state_dict", "folded, zero product"),
    ("averaged_and_state_dict", "folded, product not zero"),
    ("average_of_all_saved", "in place"),
}
"""Wrong without a word at present: (route, column). A cell of these that is mended has to be taken out."""
