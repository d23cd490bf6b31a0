"""Pickles of models that hold objects of this package: they load where it is not installed, and do without it there."""

from __future__ import annotations

import importlib
from typing import Any


class IfInstalled:
    """Pickled in place of an attribute of a module of this package.

    Args:
        module: its name.
        name: of the attribute.
        fallback: comes back where the module cannot be imported; pickled by a name of Python's own.
    """

    def __init__(self, module: str, name: str, fallback: Any) -> None:
        self._module = module
        self._name = name
        self._fallback = fallback

    def __call__(self, *args: Any) -> Any:
        """Call the attribute: `copy` does, where a pickle would be loaded."""
        return getattr(importlib.import_module(self._module), self._name)(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (_ModuleIfInstalled(self._module), self._name, self._fallback)


class _ModuleIfInstalled:
    """Pickled in place of a module; None comes back where it is not installed."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> tuple[Any, ...]:
        import pydoc  # only here: it brings a dozen modules in

        return pydoc.locate, (self._name,)
