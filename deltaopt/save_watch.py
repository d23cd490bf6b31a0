"""The warning that an adapter leaves without the movement of W, by the functions that take the adapter alone."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from deltaopt.modules import modules_of
from deltaopt.pickled import IfInstalled


class AdapterSave(NamedTuple):
    """A function of a library that writes or returns an adapter without the weight under it.

    Attributes:
        does: the verb for the warning.
        instead: a sentence that says what to do instead.
        is_whole: tells of the `self` of a call if it takes all weights this time.
        takes_notes: the config that it writes may have a key that its readers do not know: they warn of it. Others
            would refuse the whole file.
        adapter: the local variable of the function that names the adapter, where a model may have several.
    """

    does: str
    instead: str
    is_whole: Callable[[Any], bool] = lambda model: False
    takes_notes: bool = True
    adapter: str | None = None


ADAPTER_SAVES: dict[tuple[str, str], AdapterSave] = {}
"""By library and name of the function. The integrations fill it; the core knows no library."""

RESUMABLE_SAVES: dict[tuple[str, str], Callable[[Any], bool]] = {}
"""Functions that write the movement of W next to an adapter; asked with their `self` whether they do this time."""


class SaveWatch:
    """What the layers of one model have in common: whether a W has moved, and whether the warning was given.

    A copy of the model has one of its own, which has not warned yet. A copy that was made without the layers, of a
    config for example, has none that moved.
    """

    def __init__(self) -> None:
        self.said = False
        self._guards: WeakSet[SaveGuard] = WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        # The guards of a copy enter by themselves.
        return IfInstalled(__name__, "SaveWatch", object), ()

    @classmethod
    def of(cls, model: nn.Module) -> SaveWatch:
        """Return the one of a model: that of its modules, if a W has moved, or of an earlier call."""
        there = next((guard.watch for module in modules_of(model).values() for guard in _guards_on(module)), None)
        return there or _of_models.setdefault(model, cls())

    def watch(self, module: nn.Module, branch: str) -> SaveWatch:
        """Watch a module, as the W under one of its branches is about to move.

        Args:
            module: that holds the branch's factors.
            branch: names it among those of the module.

        Returns:
            What watches the module now: another one, if another one did before.
        """
        there = _guards_on(module)
        watch = there[0].watch if there else self
        if all(guard.branch != branch for guard in there):
            module.register_state_dict_pre_hook(SaveGuard(watch, branch))
        return watch

    def note_save(self, factor: str | None = None) -> AdapterSave | None:
        """Return the save of an adapter that is running while its W has moved, and warn of it once; None if none is.

        A save that has the movement of W next to it is enough to resume from, so it does not warn.

        Args:
            factor: the name of the factor that is asked for. The save of another adapter than its own does not count.
        """
        if not self._guards:
            return None
        save = _running_save(sys._getframe(1))
        if save is None or not (factor is None or save.adapter is None or f".{save.adapter}." in f".{factor}."):
            return None
        if not self.said and not save.resumable:
            self.said = True
            warnings.warn(save.text, UserWarning, stacklevel=save.stacklevel)
        return save.of


_of_models: WeakKeyDictionary[nn.Module, SaveWatch] = WeakKeyDictionary()


class SaveGuard:
    """A ``state_dict`` pre-hook of a module with a branch whose W has moved.

    A save is known by the functions that are running when the module is asked for its tensors, so that nothing of a
    library is replaced; ``model.state_dict()``, copies and pickles say nothing. It is copied and pickled with its
    module. A model that was saved whole can be loaded where this package is missing; nothing warns there.
    """

    def __init__(self, watch: SaveWatch, branch: str) -> None:
        self.watch = watch
        self.branch = branch
        watch._guards.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # Where this package is missing, the hook makes a `partial` of what torch hands to it, and does nothing.
        return IfInstalled(__name__, "unpickled_guard", partial), (partial, slice, self.watch, self.branch)

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Warn if an adapter is being saved; torch calls this before it collects the module's tensors."""
        if not self.watch.said:
            self.watch.note_save(prefix + self.branch)


def unpickled_guard(instead: object, of: object, watch: SaveWatch, branch: str) -> SaveGuard:
    """Return the guard of a module that is copied or unpickled.

    Args:
        instead: with `of`, what takes its place where this package is not installed.
        of: see `instead`.
        watch: of the model.
        branch: see `SaveWatch.watch`.
    """
    return SaveGuard(watch, branch)


def is_watched(module: nn.Module) -> bool:
    """Tell if a W under a branch of this module is known to have moved."""
    return bool(_guards_on(module))


def leave(module: nn.Module, branch: str) -> None:
    """Watch a branch no longer: W, as it is, is the base."""
    hooks = module._state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if isinstance(hook, SaveGuard) and hook.branch == branch:
            del hooks[key]
            hook.watch._guards.discard(hook)
            hook.watch.said = False


def is_saving() -> bool:
    """Tell if a library is saving an adapter."""
    return _running_save(sys._getframe(1)) is not None


class _RunningSave(NamedTuple):
    of: AdapterSave
    text: str
    resumable: bool
    stacklevel: int
    adapter: str | None


def _running_save(frame: FrameType | None) -> _RunningSave | None:
    """Return the outermost save of an adapter that is running; None if there is none.

    Args:
        frame: of the caller, which has the stack level 2 for a warning.
    """
    found: tuple[str, AdapterSave] | None = None
    adapter: str | None = None
    libraries = {"torch", *(library for library, _ in ADAPTER_SAVES)}
    resumable, level, stacklevel = False, 2, 2
    while frame is not None:
        library, name = frame.f_globals.get("__name__", "").partition(".")[0], frame.f_code.co_name
        save = ADAPTER_SAVES.get((library, name))
        if save is not None and not save.is_whole(frame.f_locals.get("self")):
            found, stacklevel = (name, save), level
            if adapter is None and save.adapter is not None:
                adapter = frame.f_locals.get(save.adapter)
        elif found is not None and stacklevel == level - 1 and library in libraries:
            stacklevel = level  # a library's own function that called it, as Trainer's
        saves_the_rest = RESUMABLE_SAVES.get((library, name))
        resumable = resumable or (saves_the_rest is not None and saves_the_rest(frame.f_locals.get("self")))
        frame, level = frame.f_back, level + 1
    if found is None:
        return None
    name, save = found
    text = (
        f"{name} {save.does} the adapter alone, but Delta-LoRA has moved the weights under it too, and that movement "
        f"is not in it: on the pristine base it does not give the trained model. {save.instead}. To *resume* training "
        "the adapter is enough, as long as optimizer.state_dict() is saved with it"
    )
    return _RunningSave(save, text, resumable, stacklevel + 1, adapter)


def _guards_on(module: nn.Module) -> list[SaveGuard]:
    return [hook for hook in module._state_dict_pre_hooks.values() if isinstance(hook, SaveGuard)]
