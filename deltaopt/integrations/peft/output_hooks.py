"""The base's output by itself in PEFT's layers: only they know which adapters take part, for which rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from threading import RLock, get_ident
from typing import Any
from weakref import ReferenceType, ref

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaopt.base import SIXTEEN_BITS, put_back
from deltaopt.base_hooks import Absence, OutputHook, hook_of
from deltaopt.integrations.peft.scaled_copies import are_equal, scale_copies
from deltaopt.layer_output import output_problem, standing_in, stood_in_for
from deltaopt.layouts import MatrixView
from deltaopt.lowrank import joined
from deltaopt.messages import warn_user
from deltaopt.movement import LentMovement, RunningMovement
from deltaopt.pickled import IfInstalled
from deltaopt.rounding.blocks import add_product_
from deltaopt.weight import WeightState

_exchanging = RLock()


class LayerHook(OutputHook):
    """The hook of one adapter on a LoRA layer of PEFT.

    Args:
        layer: PEFT's.
        adapter: the name of the adapter that W moves for.
        name: of W in the base layer.
        view: of W.
        label: names the layer in messages.

    Attributes:
        adapter: as given.
    """

    own_arguments = frozenset(("adapter_names", *getattr(lora, "VARIANT_KWARG_KEYS", ())))

    def __init__(self, layer: lora.LoraLayer, adapter: str, name: str, view: MatrixView, label: str) -> None:
        super().__init__(layer, adapter, view, label)
        self.adapter = adapter
        self.problem = output_problem(layer.get_base_layer(), view)
        self._name = name
        self._known: dict[str, ReferenceType[Any] | None] | None = None  # adapters that are no copies; None: not asked
        self._noted_for: WeightState | None = None  # when it began to move
        self._looked_at: dict[str, ReferenceType[Any] | None] = {}  # adapters, by `scale_copies`
        self.factor: ReferenceType[Any] | None = None  # of the adapter; None: it goes by its name

    def put_on(self) -> None:
        """Put the hook on the layer, and be asked when PEFT takes the layer away."""
        super().put_on()
        # PEFT calls it in the place of its own code, for layers that have it.
        layer: Any = self.module
        layer.unload_and_optionally_merge_module = Unloading(layer)

    def absence(self, module: nn.Module, arguments: Mapping[str, Any]) -> Absence:
        """Tell where the adapter takes no part, as PEFT's own forward pass decides it."""
        layer: Any = module
        if layer.disable_adapters or self.is_replaced(layer):
            return True
        names = arguments.get("adapter_names")
        if names is not None:
            rows = [row for row, name in enumerate(names) if name != self.adapter]
            return rows or False
        if layer.merged:
            return self.adapter not in layer.merged_adapters
        return self.adapter not in layer.active_adapters or self.adapter not in _adapters(layer)

    def holder(self, module: nn.Module) -> tuple[nn.Module, str]:
        """Return the innermost base layer."""
        layer: Any = module
        return layer.get_base_layer(), self._name

    def adds_nothing(self, module: nn.Module) -> bool:
        """Tell if no other adapter adds to the output of the layer."""
        layer: Any = module
        return layer.disable_adapters or not (layer.merged or any(n in _adapters(layer) for n in layer.active_adapters))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Correct the output of a forward pass, for copies of the adapter that are new too."""
        again = not torch.compiler.is_compiling() and self.scale_copies()
        output = (module.forward(*args, **kwargs),) if again else output
        result = super().__call__(module, args, kwargs, *output)
        result = output[0] if again and result is None else result
        if result is not None and not torch.compiler.is_compiling():
            for hook in self._adopted(module):  # torch does not call them in this pass yet
                again = hook(module, args, kwargs, result)
                result = result if again is None else again
        return result

    def attend(self) -> None:
        """Scale copies of the adapter that no forward pass has met yet, and lend them the movement."""
        self.scale_copies()
        self._adopted(self.module)

    def scale_copies(self) -> bool:
        """Scale adapters that are new copies of one whose branch is scaled; return True if there were any."""
        layer: Any = self.module
        present = _adapters(layer)
        new = [name for name, factor in present.items() if not _is_known(self._looked_at, name, factor)]
        if not new or (isinstance(self.movement, RunningMovement) and self.movement.state.at_base):
            return False
        found = scale_copies(layer, new, present, self.label)
        self._looked_at = self._present()
        return found

    def corrected(self, output: Tensor, x: Tensor, rows: list[int] | None) -> Tensor:
        """Return the output without the movement of W, in these rows; with that of copies that are new."""
        result = super().corrected(output, x, rows)
        for hook in self._adopted(self.module) if rows is None else ():
            if hook.absence(self.module, {}):
                result = hook.corrected(result, x, None)
        return result

    def note_adapter(self) -> None:
        """Note which adapter it is: one that is deleted, and another one that gets its name, are two."""
        factor = dict(_adapters(self.module).items()).get(self.adapter)
        self.factor = ref(factor) if isinstance(factor, nn.Module) else None  # loading may replace a Parameter

    def is_replaced(self, layer: Any) -> bool:
        """Tell if another adapter has the name by now."""
        present = _adapters(layer)
        return self.factor is not None and self.adapter in present and self.factor() is not present[self.adapter]

    def note_companions(self) -> None:
        """Note the adapters that the layer holds before W moves: they are made for the base.

        Loading a state calls it again, when there may be copies that no pass has met yet: what was noted stays.
        """
        state = self.movement.state if isinstance(self.movement, RunningMovement) else None
        if self._known is None or self._noted_for is not state:
            self._known, self._noted_for = self._present(), state

    def forget_companions(self) -> None:
        """Forget the adapters that were noted: W as it is now is the base."""
        self._known = self._noted_for = None

    def _present(self) -> dict[str, ReferenceType[Any] | None]:
        return {name: ref(factor) for name, factor in _adapters(self.module).items()}

    def _adopted(self, layer: Any) -> list[LayerHook]:
        """Put hooks on for adapters that are new copies of this one: the model that was copied had W's movement.

        A trainer copies the adapter for its reference model. A copy is known by its factors, which are equal; an
        adapter with others is made for the base.
        """
        present, known = _adapters(layer), self._known
        if known is None or not self.in_weight:
            return []
        if len(present) == len(known) and all(_is_known(known, name, factor) for name, factor in present.items()):
            return []
        if self.movement is None or not self.movement.moved():
            return []
        found = []
        for name in [name for name, factor in present.items() if not _is_known(known, name, factor)]:
            for hook in [hook for hook in hooks_on(layer) if not hook.in_weight and hook.adapter == name]:
                hook.take_off()  # it was of an earlier adapter with this name
            lenders = [self, *(hook for hook in hooks_on(layer) if not hook.in_weight)]
            equal = [hook for hook in lenders if name != hook.adapter and are_equal(layer, name, hook.adapter)]
            found += [hook._lend_to(name) for hook in equal[:1]]
        self._known = self._present()
        return found

    def _lend_to(self, copy: str) -> LayerHook:
        """Put a hook on that gives a copy of the adapter the movement that W has now, for this hook's adapter."""
        kind = ParameterHookOfCopy if isinstance(self, ParameterHook) else LayerHookOfCopy
        hook: _OfCopy = kind(self.module, copy, self._name, self._view, f"{self.label} ({copy})")
        hook.branch = ("copy", copy)  # it may become an adapter that W moves for, with a hook of its own
        hook.movement = LentMovement.of(self)
        hook.factor = ref(_adapters(self.module)[copy])
        hook.put_on()
        return hook

    def not_copied(self) -> dict[str, Any]:
        """Return the attributes that belong to this very hook, as a copy has them."""
        known = None if self._known is None else dict[str, Any].fromkeys(self._known)
        looked_at = dict[str, Any].fromkeys(self._looked_at)
        return {**super().not_copied(), "_known": known, "_looked_at": looked_at, "_noted_for": None, "factor": None}

    def base_of(self, W: Tensor) -> Tensor:
        """Return a copy of W, or of what stands in for it, minus the movement."""
        base, terms = W.detach().clone(), self._terms(self.module)
        if terms:
            A, B, _ = joined([term.to(W.device, torch.float64) for term in terms])
            add_product_(self._view.weight(base), A, self._view.ordered(B, W), -1.0)
        return base


class ParameterHook(LayerHook):
    """The hook of one adapter on a layer that adapts a parameter: routed experts, whose output is no product with W.

    While the layer is called without the adapter, W minus its movement stands in for W: a second W for that time.
    """

    def __init__(self, layer: lora.ParamWrapper, adapter: str, name: str, view: MatrixView, label: str) -> None:
        super().__init__(layer, adapter, name, view, label)
        self.problem = None
        # By module, as data parallel replicas have one hook: what stands in there, and the threads that are inside.
        self._standing: dict[int, tuple[Any, set[int]]] = {}

    def register(self) -> list[RemovableHandle]:
        """Put one hook before the layer and one after it, also where the forward pass raises.

        The one after it comes before those of earlier adapters, as the exchanges of W are undone in reverse.
        """
        return [
            self.module.register_forward_pre_hook(self, with_kwargs=True),
            self.module.register_forward_hook(self, with_kwargs=True, always_call=True, prepend=True),
        ]

    def is_on(self) -> bool:
        """Tell if both hooks are still where they were put."""
        return super().is_on() and any(hook is self for hook in self.module._forward_pre_hooks.values())

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        """Let the base stand in for W before a forward pass, and W be back after it."""
        if output:
            if self._standing:
                self._end(module)
            return
        if self._standing and self._comes_first(module):
            self._undo()
        if not torch.compiler.is_compiling():
            self.scale_copies()
        absence = self._shared or self.absence(module, kwargs)
        if absence is not True:
            self.look(module)
        if absence:
            self._begin(module)
            for hook in self._adopted(module):  # torch does not call them in this pass yet
                hook(module, args, kwargs)

    def attend(self) -> None:
        """Undo what a forward pass that was interrupted has left behind, too."""
        self._undo()
        super().attend()

    def _comes_first(self, module: nn.Module) -> bool:
        """Tell if it is the first hook of its kind that a forward pass of the module calls."""
        return self is next(hook for hook in module._forward_pre_hooks.values() if isinstance(hook, ParameterHook))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _undo(self) -> None:
        """Let W be back where a signal has ended a forward pass of this thread, and torch has not called the hooks."""
        owner, name = self.holder(self.module)
        with _exchanging:
            hooks = [hook for hook in hooks_on(self.module) if isinstance(hook, ParameterHook)]
            if any(get_ident() in hook._standing.get(id(owner), (None, ()))[1] for hook in hooks):
                for hook in hooks:
                    hook._standing.pop(id(owner), None)
                owner._parameters[name] = stood_in_for(owner._parameters[name])

    # Within a compiled graph the exchange of a parameter would be taken for a change of the model at each call.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, module: nn.Module) -> None:
        if torch.compiler.is_exporting():
            self._moves_in_export()
        owner, name = self.holder(module)
        with _exchanging:
            exchange, threads = self._standing.get(id(owner), (None, set()))
            movement = self.movement
            if exchange is None:
                if movement is None or not movement.moved():
                    return
                with torch.no_grad():
                    base = self._base(module)
                    base = self.base_of(getattr(owner, name)) if base is None else base
                exchange = standing_in(owner, name, base)
                exchange.__enter__()
            self._standing[id(owner)] = exchange, {*threads, get_ident()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, module: nn.Module) -> None:
        """Let W be back, unless another thread is in a forward pass of the module."""
        owner, _ = self.holder(module)
        with _exchanging:
            exchange, threads = self._standing.pop(id(owner), (None, set()))
            threads = threads - {get_ident()}
            if threads:
                self._standing[id(owner)] = exchange, threads
            elif exchange is not None:
                exchange.__exit__(None, None, None)

    def not_copied(self) -> dict[str, Any]:
        """Return the attributes that belong to this very hook, as a copy has them."""
        return {**super().not_copied(), "_standing": {}}


class _OfCopy(LayerHook):
    """The hook of a copy of the adapter that W moves for: adds the movement of that time where the copy is active."""

    in_weight = False

    def absence(self, module: nn.Module, arguments: Mapping[str, Any]) -> Absence:
        """Tell where the copy takes part; nowhere, if another adapter has its name by now."""
        if self.adapter not in _adapters(module) or self.is_replaced(module):
            return False
        absence = super().absence(module, arguments)
        if isinstance(absence, bool):
            return not absence
        rows = [row for row in range(len(arguments["adapter_names"])) if row not in absence]
        return rows or False


class LayerHookOfCopy(_OfCopy, LayerHook):
    """See `_OfCopy`."""


class ParameterHookOfCopy(_OfCopy, ParameterHook):
    """See `_OfCopy`; next to what stands in for W without the adapter."""


class Unloading:
    """Takes a layer away, in the place of PEFT's code: W is the base then, unless the adapter it moved for was merged.

    Args:
        layer: PEFT's.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """Return the base layer, with adapters merged into it if `merge`."""
        layer: Any = self.layer
        for wrapper in _wrappers(layer):
            merged = {*wrapper.merged_adapters, *((adapter_names or wrapper.active_adapters) if merge else ())}
            _take_back([hook for hook in hooks_on(wrapper) if (hook.adapter in merged) is not hook.in_weight])
        own = getattr(type(layer), "unload_and_optionally_merge_module", None)
        if own is not None:
            return own(layer, merge=merge, safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[no-any-return]
        if merge:
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return layer.get_base_layer()  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Unloading:
        return Unloading(deepcopy(self.layer, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        # Where this package is missing, a layer is taken away by PEFT's code alone.
        instead = lora.ParamWrapper.unload_and_optionally_merge_module
        return IfInstalled(__name__, "unpickled_unloading", partial), (instead, self.layer)


def unpickled_unloading(instead: object, layer: nn.Module) -> Unloading:
    """Return what takes an unpickled layer away.

    Args:
        instead: what takes its place where this package is not installed.
        layer: PEFT's.
    """
    return Unloading(layer)


def hook_for(layer: lora.LoraLayer, adapter: str, name: str, view: MatrixView, label: str) -> LayerHook:
    """Return the hook of an adapter on its layer; it is put there if there is none yet."""
    kind = ParameterHook if isinstance(layer, lora.ParamWrapper) else LayerHook
    hook = hook_of(layer, kind, adapter)
    if hook is not None and hook.is_replaced(layer):
        hook.branch = ("earlier", id(hook), adapter)
        hook = None
    if hook is None:
        hook = kind(layer, adapter, name, view, label)
        hook.put_on()
    return hook


def hooks_on(layer: nn.Module) -> list[LayerHook]:
    """Return the hooks of all adapters on a layer."""
    return [hook for hook in layer._forward_hooks.values() if isinstance(hook, LayerHook)]


@torch.no_grad()
def _take_back(hooks: Sequence[LayerHook]) -> None:
    """Write what a layer computes without these hooks' movements into its W for good: adapters are taken away."""
    moved = [(hook, m) for hook in hooks if not hook._shared and (m := hook.movement) is not None and m.moved()]
    if not moved:
        return
    if any(hook.tied for hook, _ in moved):
        _warn_of_rest("a W is used in another place too")
        return
    (first, movement), layer = moved[0], moved[0][0].module
    alone = len(moved) == 1 and not layer.merged and not first.others_that_moved(layer)
    if alone and isinstance(movement, RunningMovement) and not movement.is_overwritten():
        reason = put_back(movement.state)
    else:
        owner, name = first.holder(layer)
        W = getattr(owner, name)
        if W.element_size() <= 2:
            reason = SIXTEEN_BITS.format(W.dtype)
        else:
            base, reason = W, None
            for hook, _ in moved:
                base = hook.base_of(base)
            W.copy_(base)
            for hook, movement in moved:
                if isinstance(movement, RunningMovement):
                    movement.state.rebase()
                else:
                    hook.movement = None
    if reason is not None:
        _warn_of_rest(reason)


def _warn_of_rest(reason: str) -> None:
    warn_user(
        "adapters were taken away (unload) whose weights Delta-LoRA has moved, and these weights keep the movement, as "
        f"{reason}. Load the base's weights again"
    )


def _wrappers(layer: nn.Module) -> Iterator[Any]:
    """Yield a LoRA layer, and those that it wraps."""
    inside: Any = layer
    while isinstance(inside, lora.LoraLayer):
        yield inside
        inside = inside.base_layer


def _is_known(known: Mapping[str, ReferenceType[Any] | None], name: str, factor: object) -> bool:
    """Tell if an adapter is the one that was known by this name; in a copy of the model the name is enough."""
    return name in known and ((reference := known[name]) is None or reference() is factor)


def _adapters(layer: Any) -> Any:
    """Return PEFT's dict of the adapters that a layer holds."""
    return layer.lora_embedding_A if isinstance(layer, lora.Embedding) else layer.lora_A
