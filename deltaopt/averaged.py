"""Copies of a folded model that average its parameters, and were made before its branches were scaled.

`AveragedModel` copies the model and writes averages of the parameters into the copy, whose branch keeps the scaling
that it was copied with. The parameters are those of a scaled branch, so the copy's branch has to be scaled as well.
That happens at the first forward pass or state_dict after its A was written without a gradient of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaopt.checkpoint.fingerprint import content_hash
from deltaopt.messages import warn_user
from deltaopt.sharding import local_part
from deltaopt.tensors import FLOATS, is_plain

if TYPE_CHECKING:
    from deltaopt.stored_factors import StoredFactor

Rescale = Callable[[nn.Module, float], object]
"""Multiplies the scaling of the branch in a module by a number; holds no module itself."""


class _Seen(NamedTuple):
    """What recognizes an A that was not written since: its version, and a hash, as ``.data.copy_()`` has no version.

    The hash is of the numbers: a copy that was cast to a wider dtype holds the same ones.
    """

    version: int | None
    content: int

    @classmethod
    def of(cls, A: Tensor) -> _Seen | None:
        """Look at A; None if its numbers cannot be read: a copy may be quantized, or on the meta device."""
        part = local_part(A.detach())
        if part.is_meta or not is_plain(part) or part.dtype not in FLOATS:
            return None
        return cls(None if A.is_inference() else A._version, int(content_hash(part.double())))


class Follower:
    """Lets one branch of a copy take over the scaling of the original's, when its A was averaged.

    Args:
        hook: of the copy, on what a state_dict says of A.
        origin: the hook that it was copied from.
        holder: the copied module that has A.
        owner: the copied module that has the scaling.
        rescale: multiplies it there.
        warned: what all branches of one copy share, to warn once.
    """

    def __init__(
        self,
        hook: StoredFactor,
        origin: StoredFactor,
        holder: nn.Module,
        owner: nn.Module,
        rescale: Rescale,
        warned: list[str],
    ) -> None:
        self._hook, self._origin = weakref.ref(hook), weakref.ref(origin)
        self._holder, self._owner = weakref.ref(holder), weakref.ref(owner)
        self._rescale = rescale
        self._warned = warned
        self._copied: _Seen | None = None  # at the copy, when it is known
        self._seen: _Seen | None = None
        self._written: str | None = None  # why the values in A may not be averages of parameters alone
        self._handles: list[Any] = []
        self._watches_gradient = False

    def note_copy(self, A: Tensor) -> None:
        """Note A as it was copied."""
        self._copied = _Seen.of(A)

    def watch(self) -> None:
        """Watch the copy, as the original's branch has got another scaling."""
        A = self._A()
        if A is None or self._handles:
            return
        self._seen = _Seen.of(A)
        copied, seen = self._copied, self._seen
        if copied is not None and seen is not None and seen.content != copied.content and self._written is None:
            self._written = "were written before and after the original's branch was scaled"
        owner, holder = self._owner(), self._holder()
        assert owner is not None
        assert holder is not None
        self._handles = [
            owner.register_forward_pre_hook(self, prepend=True),
            holder.register_state_dict_pre_hook(self),
        ]

    def note_load(self) -> None:
        """Note that a state_dict is loaded: its values are for the first scaling, and this is no average's write."""
        self._seen, self._written = None, "were loaded before others were written to them"

    def note_given(self) -> None:
        """Note that a state_dict was taken, of tensors that may be written: by values of either kind."""
        self._written = self._written or "were written after its state_dict was taken, maybe through that"

    def cut(self, *_: object) -> None:
        """Leave the copy alone: it trains by itself."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        hook = self._hook()
        if hook is not None:
            hook.follower = None

    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Look at A; torch calls this before a forward pass of the copy, and before a state_dict of it."""
        look: Callable[[], None] = self._look
        if torch.compiler.is_compiling():
            look = torch.compiler.disable(look)
        look()

    def _look(self) -> None:
        A, hook, origin = self._A(), self._hook(), self._origin()
        if A is None or hook is None or origin is None or hook.factor == origin.factor:
            return
        if A.grad is not None:
            self.cut()
            return
        now = _Seen.of(A)
        if now is None or self._seen is None or now == self._seen:
            self._seen = now
            self._watch_gradient(A)
            return
        self._seen = now
        if self._written is None:
            self._take_over(hook, origin.factor)
        elif not self._warned:
            self._warned.append(hook.label)
            warn_user(
                f"this copy of a model was made before the branch of {hook.label}, among others, was scaled by "
                f"{origin.factor:g} there, and its A and B {self._written}. If these are averages of parameters, the "
                "copy is another model than their average, since its branch has the scaling of before: make it "
                "(AveragedModel, an EMA) after step K, and again after each change of update_ratio. If all of it "
                "comes from state_dict(), it is right"
            )

    def _take_over(self, hook: StoredFactor, factor: float) -> None:
        owner = self._owner()
        assert owner is not None
        ratio = factor / hook.factor
        self._rescale(owner, ratio)
        hook.note(hook.scaling * ratio, by_itself=False)

    def _watch_gradient(self, A: Tensor) -> None:
        """Leave the copy alone once A gets a gradient: it trains by itself."""
        if A.requires_grad and torch.is_grad_enabled() and not self._watches_gradient:
            self._watches_gradient = True
            follower = weakref.ref(self)
            self._handles.append(A.register_hook(partial(_cut, follower)))

    def _A(self) -> Tensor | None:
        holder, hook = self._holder(), self._hook()
        return None if holder is None or hook is None else holder._parameters.get(hook.name)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the copy, and a pickle, does not follow: its hook does nothing.
        return partial, (nullcontext().__exit__,)


def _cut(follower: weakref.ref[Follower], grad: Tensor) -> None:
    if (living := follower()) is not None:
        living.cut()
