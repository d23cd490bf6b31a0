"""What a state_dict says of the factors of a scaled branch: values that are right for the registered scaling.

The folded rule lets a branch multiply A @ B by f s where s was registered, and no tensor holds f. So `state_dict()` of
the module gives f A in place of A, which any fresh model multiplies by s, whatever tool has carried it; and what is
loaded into a scaled branch is divided by f. The parameters themselves stay as they train.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltaopt.averaged import Follower, Rescale
from deltaopt.checkpoint.fingerprint import content_hash
from deltaopt.messages import warn_user
from deltaopt.pickled import IfInstalled
from deltaopt.sharding import is_sharded, local_part
from deltaopt.tensors import same_view

MARK = "deltaopt"
"""In a module's metadata of a state_dict: by name, the factors that its values were multiplied by."""

KNOWN = 1 << 17
"""The number of hashes that are remembered: of some hundred state_dicts of a large model."""

_known: dict[int, float] = {}
"""By the hashes of values for a first scaling, handed out or loaded: the factor that their branch had then."""

_new: list[tuple[Tensor, float]] = []
"""Those that were added last, on their devices."""


class Load:
    """One call that has loaded values into branches which have another scaling than when these were given.

    Attributes:
        labels: of the layers.
        said: True once somebody was warned of it.
    """

    def __init__(self, call: object) -> None:
        self.call = call
        self.labels: list[str] = []
        self.said = False


def stored_form(A: Tensor, factor: float) -> Tensor:
    """Return factor * A in the dtype of A, computed in float32 at least and rounded once more for a 16-bit A.

    It only multiplies, so that every device gives the same bits.
    """
    return (A.to(torch.promote_types(A.dtype, torch.float32)) * factor).to(A.dtype)


def raw_form(stored: Tensor, factor: float) -> Tensor:
    """Return the A of which `stored` is the stored form, up to rounding."""
    return stored_form(stored, 1.0 / factor)


_WARNED = "deltaopt: warned"
"""In the memo of a deepcopy: what all hooks of the copy share."""


class StoredFactor:
    """The hook of one module on what its state_dict says of one A.

    It is registered with the module that has A as a parameter, for `state_dict()` and for `load_state_dict()`, and is
    copied and pickled with it. A model that was saved whole can be loaded where this package is missing; there its
    state_dict gives the parameters as they are.

    Args:
        name: of the parameter in the module.
        scaling: that the branch has now. What is stored is right for this one.
        label: names the layer in messages.

    Attributes:
        name, label: as given.
        follower: what lets a copy that averages parameters follow the original; None of a model in training.
        load: the last one, if its value of A was given when the branch had another scaling; else None.
    """

    _last_load = Load(None)

    _warned_in: Any = None  # an object of the last call of a whole model's (load_)state_dict in which one hook warned

    def __init__(self, name: str, scaling: float, label: str) -> None:
        self.name = name
        self.label = label
        self._first = self._now = scaling
        self.follower: Follower | None = None
        self.load: Load | None = None
        self._copies: weakref.WeakSet[Follower] = weakref.WeakSet()
        self._places: tuple[Any, ...] = ()

    @staticmethod
    def on(module: nn.Module, name: str) -> StoredFactor | None:
        """Return the hook that a module has for this parameter; None if it has none."""
        for hook in module._state_dict_hooks.values():
            if isinstance(hook, StoredFactor) and hook.name == name:
                return hook
        return None

    def put_on(self, module: nn.Module, owner: nn.Module | None = None, rescale: Rescale | None = None) -> None:
        """Register with the module of A.

        Args:
            module: that has A.
            owner: that has the scaling.
            rescale: multiplies it there, in this module and in a copy; None if that is not possible.
        """
        if owner is not None and rescale is not None:
            self._places = weakref.ref(module), weakref.ref(owner), rescale
        module.register_state_dict_post_hook(self)
        module.register_load_state_dict_pre_hook(self)

    @property
    def scaling(self) -> float:
        """The scaling of the branch, as it was noted."""
        return self._now

    @property
    def factor(self) -> float:
        """What a state_dict multiplies A by; exactly 1.0 while the branch has its first scaling."""
        return self.factor_at(self._now)

    def factor_at(self, scaling: float) -> float:
        """Return what it would be with this scaling."""
        factor = scaling / self._first
        return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-9) else factor

    def begin(self, scaling: float) -> float:
        """Return what the scalings of a triple have to be multiplied by for `note`; `scaling` is its present one.

        That is not 1 where a user has set another scaling since, which no state_dict says, and where branches of
        different scalings share A.
        """
        if self.follower is not None:
            self.follower.cut()
        ratio = self._now / scaling
        return 1.0 if math.isclose(ratio, 1.0, rel_tol=1e-9) else ratio

    def note(self, scaling: float, by_itself: bool = True) -> None:
        """Note the scaling that the branch was given, by its own optimizer if not said otherwise."""
        if by_itself and self.follower is not None:
            self.follower.cut()
        self._now = scaling
        for copied in list(self._copies):
            copied.watch()

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *loading: Any,
    ) -> None:
        """Do what torch asks of a hook: after a state_dict was made, or, with more arguments, before one is loaded."""
        A, key = module._parameters.get(self.name), prefix + self.name
        if A is None or not isinstance(state_dict.get(key), Tensor):
            return
        if self.follower is not None and loading:
            self.follower.note_load()
        elif self.follower is not None and self.factor == 1.0:
            self.follower.note_given()
        if loading:
            state_dict[key] = self._taken(A, state_dict[key], local_metadata.get(MARK), call=loading[-1])
        else:
            self._give(A, state_dict, key, local_metadata)

    def _give(self, A: Tensor, state_dict: dict[str, Any], key: str, metadata: dict[str, Any]) -> None:
        """Put into a state_dict what it says of A, in place of A itself, and mark it."""
        factor = self.factor
        if state_dict[key] is not A:
            metadata.setdefault(MARK, {})[self.name] = factor
        if factor == 1.0:
            _remember(A, factor)
            return
        if state_dict[key] is A:
            self._warn_once(
                getattr(state_dict, "_metadata", None),
                f"state_dict(keep_vars=True) gives the parameters themselves, and the branch of {self.label}, among "
                f"others, multiplies them by {factor:g} times its registered scaling: another model that loads them "
                "is not this one. Take state_dict() for that",
            )
            return
        # A write into a tensor that is not A would be lost; torch refuses to write one that was made like this.
        with torch.inference_mode():
            state_dict[key] = stored_form(state_dict[key], factor)
        _remember(state_dict[key], factor)

    @torch.no_grad()
    def _taken(self, A: Tensor, value: Tensor, mark: Mapping[str, float] | None, call: object) -> Tensor:
        """Return what A becomes by loading this value, which is for the first scaling."""
        factor = self.factor
        if value.shape != A.shape:  # torch refuses it
            return value
        # A dict that was made of an unscaled branch holds A itself, which has the numbers of the scaled branch by now.
        if mark is not None and factor != 1.0 and same_view(local_part(value.detach()), local_part(A.detach())):
            self.load = None
            return value
        given_at = _factor_of(value.to(A.dtype)) if mark is None else mark.get(self.name)  # files have other dtypes
        self._note_load(given_at, call)
        if factor == 1.0:
            _remember(value.to(A.dtype), factor if given_at is None else given_at)
            return value
        # torch's loading of full states has written them into a sharded A already, and hands that over.
        if mark is None and not is_sharded(A) and _is_same(value, A):
            return value
        if _is_same(value, stored_form(A, factor)):
            return A.detach().clone()
        if given_at is None and value.any():
            self._warn_once(
                call,
                f"load_state_dict() has divided what was loaded for A of {self.label}, and of every other scaled "
                f"branch, by its factor (here {factor:g}): it took the values for those of a state_dict() or of an "
                "adapter file, which are for the registered scaling. If they were copies of the parameters "
                "({name: p.clone()}), the model is now another one: put such copies back with p.copy_() under "
                "torch.no_grad(), or keep copies of model.state_dict() as it is",
            )
        return raw_form(value, factor)

    def _note_load(self, given_at: float | None, call: object) -> None:
        """Note whether the branch had another scaling when a value that is loaded was given."""
        self.load = None
        if given_at is not None and not math.isclose(given_at, self.factor, rel_tol=1e-9):
            if StoredFactor._last_load.call is not call:
                StoredFactor._last_load = Load(call)
            self.load = StoredFactor._last_load
            self.load.labels.append(self.label)

    @classmethod
    def _warn_once(cls, call: object, text: str) -> None:
        """Warn, once for all layers of a model: `call` is an object of the call that they have in common."""
        if call is None or StoredFactor._warned_in is not call:
            StoredFactor._warned_in = call
            warn_user(text)

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredFactor:
        twin = memo[id(self)] = unpickled(None, self.name, self._first, self._now, self.label)
        if self._places:
            holder, owner, rescale = self._places
            # Both are being copied with the hook, unless a part of the layer is copied by itself.
            its_holder, its_owner = memo.get(id(holder())), memo.get(id(owner()))
            if isinstance(its_holder, nn.Module) and isinstance(its_owner, nn.Module):
                twin._follow(self, its_holder, its_owner, rescale, memo)
        return twin

    def _follow(
        self, origin: StoredFactor, holder: nn.Module, owner: nn.Module, rescale: Rescale, memo: dict[Any, Any]
    ) -> None:
        self._places = weakref.ref(holder), weakref.ref(owner), rescale
        self.follower = Follower(self, origin, holder, owner, rescale, memo.setdefault(_WARNED, []))
        origin._copies.add(self.follower)
        A = origin._places[0]()._parameters.get(self.name)
        if A is not None and not A.is_meta:
            self.follower.note_copy(A)

    def __reduce__(self) -> tuple[Any, ...]:
        # Where this package is missing, `partial` makes a hook of the first argument, which does nothing.
        return IfInstalled(__name__, "unpickled", partial), (
            nullcontext().__exit__,
            self.name,
            self._first,
            self._now,
            self.label,
        )


def unpickled(instead: object, name: str, first: float, now: float, label: str) -> StoredFactor:
    """Return the hook of a module that is copied or unpickled.

    Args:
        instead: what takes its place where this package is not installed.
        name: of the parameter.
        first: the scaling that stored values are for.
        now: that of the branch.
        label: names the layer.
    """
    hook = StoredFactor(name, first, label)
    hook.note(now)
    return hook


def _is_same(value: Tensor, other: Tensor) -> bool:
    """Compare, bit for bit, what may be on another device or in a wider dtype."""
    value, other = local_part(value.detach()), local_part(other.detach())
    if value.shape != other.shape:
        return False
    dtype = torch.promote_types(value.dtype, other.dtype)
    return torch.equal(value.to(other.device, dtype), other.to(dtype))


def _remember(value: Tensor, factor: float) -> None:
    _new.append((_hash(value), factor))
    if len(_new) >= 4096:
        _read_new()


def _factor_of(value: Tensor) -> float | None:
    """Return the factor that a branch had when this value was given for its first scaling; None if not known."""
    _read_new()
    return _known.get(int(_hash(value))) if value.any() else None


def _read_new() -> None:
    """Wait for the devices, and forget the oldest hashes where there are too many."""
    for content, factor in _new:
        _known[int(content)] = factor
    _new.clear()
    if len(_known) > KNOWN:
        for oldest in list(_known)[:-KNOWN]:
            del _known[oldest]


def _hash(tensor: Tensor) -> Tensor:
    """Return a hash, on the tensor's device: nothing waits for it until something is loaded."""
    return content_hash(local_part(tensor.detach()))
