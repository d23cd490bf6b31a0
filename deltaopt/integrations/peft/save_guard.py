"""The warning that an adapter is about to be saved without the movement of W."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any

from torch import nn

from deltaopt.pickled import IfInstalled

LIBRARIES = ("peft", "transformers")
"""Whose ``save_pretrained`` writes an adapter and leaves out the weight under it."""


class SaveGuard:
    """A ``state_dict`` pre-hook of the layers whose W has moved: warns once, within a ``save_pretrained``.

    A library's save is known by the functions that are running when it asks the layers for their tensors, so that
    nothing of the library is replaced; ``model.state_dict()``, copies and pickles say nothing. One guard serves all
    layers of a model. It is copied and pickled with them. A model that was saved whole can be loaded where
    this package is missing; nothing warns there.
    """

    def __init__(self) -> None:
        self._has_warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> SaveGuard:
        guard = memo[id(self)] = SaveGuard()
        guard._has_warned = self._has_warned
        return guard

    def __reduce__(self) -> tuple[Any, ...]:
        # slice takes what torch hands to the hook, three arguments, and does nothing. All names are of Python's own.
        return IfInstalled(__name__, UNPICKLED, slice).__reduce__()

    def watch(self, layer: nn.Module) -> None:
        """Watch a layer whose W moves, or has moved; replace the guard of an earlier search of the model."""
        _remove(layer)
        layer.register_state_dict_pre_hook(self)

    @staticmethod
    def watches(layer: nn.Module) -> bool:
        """Tell if W of this layer is known to have moved."""
        return any(isinstance(hook, SaveGuard) for hook in layer._state_dict_pre_hooks.values())

    def leave(self, layer: nn.Module) -> None:
        """Leave a layer whose W, as it is, is the base."""
        if _remove(layer):
            self._has_warned = False

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Warn if an adapter is being saved; torch calls this before it collects the layer's tensors."""
        if self._has_warned:
            return
        stacklevel = _stacklevel_of_an_adapter_save(sys._getframe(1))
        if stacklevel is None:
            return
        self._has_warned = True
        warnings.warn(
            "save_pretrained writes the adapter alone, but Delta-LoRA has moved the weights under it too, and that "
            "movement is not in these files: on the pristine base they do not give the trained model. Write an adapter "
            "that does with deltaopt.integrations.peft.save_adapter(model, optimizer, directory), or all weights with "
            "model.merge_and_unload().save_pretrained(directory). To *resume* training these files are enough, as long "
            "as optimizer.state_dict() is saved with them",
            UserWarning,
            stacklevel=stacklevel,
        )


UNPICKLED = "unpickled_guard"


def __getattr__(name: str) -> SaveGuard:
    """Make the guard of a model that is unpickled, which asks this module for an attribute."""
    if name == UNPICKLED:
        return SaveGuard()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _remove(layer: nn.Module) -> bool:
    """Remove the guard of a layer; return True if there was one."""
    hooks = layer._state_dict_pre_hooks
    found = [key for key, hook in hooks.items() if isinstance(hook, SaveGuard)]
    for key in found:
        del hooks[key]
    return bool(found)


def _stacklevel_of_an_adapter_save(frame: FrameType | None) -> int | None:
    """Return the stack level of the call of a library's adapter save, for a warning; None if none is running.

    Args:
        frame: of the caller of the hook, which is level 2.
    """
    level = 2
    while frame is not None:
        library = frame.f_globals.get("__name__", "").partition(".")[0]
        if frame.f_code.co_name == "save_pretrained" and library in LIBRARIES:
            quiet = _saves_everything(library, frame.f_locals.get("self")) or _saves_the_optimizer_too(frame)
            return None if quiet else level + 1
        frame, level = frame.f_back, level + 1
    return None


def _saves_everything(library: str, model: Any) -> bool:
    """Transformers saves the adapter alone only of models that got it by its own ``add_adapter``."""
    return library == "transformers" and not getattr(model, "_hf_peft_config_loaded", False)


def _saves_the_optimizer_too(frame: FrameType) -> bool:
    """Tell if this is a checkpoint of Trainer's to resume from, with ``optimizer.pt`` next to the adapter."""
    caller = frame.f_back
    while caller is not None:
        if caller.f_code.co_name == "_save_checkpoint" and caller.f_globals.get("__name__") == "transformers.trainer":
            return not getattr(getattr(caller.f_locals.get("self"), "args", None), "save_only_model", True)
        caller = caller.f_back
    return False
