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
