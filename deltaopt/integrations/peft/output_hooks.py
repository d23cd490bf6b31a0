"""The base's output by itself in PEFT's layers: only they know which adapters take part, for which rows of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from threading import RLock, get_ident
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from deltaopt import compiled
from deltaopt.base import put_back
from deltaopt.base_hooks import Absence, OutputHook, hook_of, output_problem, standing_in
from deltaopt.layouts import MatrixView
from deltaopt.lowrank import joined
from deltaopt.movement import RunningMovement
from deltaopt.rounding.blocks import add_product_

_exchanging = RLock()


class LayerHook(OutputHook):
    """The hook of one adapter on a LoRA layer of PEFT.

    Args:
        layer: PEFT's.
        adapter: the name of the adapter that W moves for.
        name: of W in the base layer.
        view: of W.
        label: names the layer in messages.
    """

    def __init__(self, layer: lora.LoraLayer, adapter: str, name: str, view: MatrixView, label: str) -> None:
        super().__init__(layer, adapter, view, label)
        self.problem = output_problem(layer.get_base_layer(), view)
        self._name = name

    def put_on(self) -> None:
        """Put the hook on the layer, and be asked when PEFT takes the layer away."""
        super().put_on()
        # PEFT calls it in the place of its own code, for layers that have it.
        layer: Any = self.module
        layer.unload_and_optionally_merge_module = Unloading(layer)

    def absence(self, module: nn.Module, arguments: Mapping[str, Any]) -> Absence:
        """Tell where the adapter takes no part, as PEFT's own forward pass decides it."""
        layer: Any = module
        if layer.disable_adapters:
            return True
        names = arguments.get("adapter_names")
        if names is not None:
            rows = [row for row, name in enumerate(names) if name != self.branch]
            return rows or False
        if layer.merged:
            return self.branch not in layer.merged_adapters
        return self.branch not in layer.active_adapters or self.branch not in _adapters(layer)

    def holder(self, module: nn.Module) -> tuple[nn.Module, str]:
        """Return the innermost base layer."""
        layer: Any = module
        return layer.get_base_layer(), self._name

    def adds_nothing(self, module: nn.Module) -> bool:
        """Tell if no other adapter adds to the output of the layer."""
        layer: Any = module
        return layer.disable_adapters or not (layer.merged or any(n in _adapters(layer) for n in layer.active_adapters))

    def take_back(self) -> None:
        """Write the base into W for good: the adapter that W moved for is taken away."""
        movement, layer = self.movement, self.module
        if self._shared or self.tied or movement is None or not movement.moved():
            return
        state = movement.state if isinstance(movement, RunningMovement) else None
        if state is not None and not layer.merged:
            reason = put_back(state)
        else:  # in a copy of the model, or under another adapter that is merged into W
            reason = self._subtract_movement()
            if reason is None and state is not None:
                state.rebase()
            elif reason is None:
                self.movement = None
        if reason is not None:
            warnings.warn(
                "unload() has taken adapters away whose weights Delta-LoRA has moved, and these weights keep the "
                f"movement: {reason}. Load the base's weights again",
                stacklevel=4,
            )

    @torch.no_grad()
    def _subtract_movement(self) -> str | None:
        """Subtract the movement from W, or return why that does not give the base."""
        owner, name = self.holder(self.module)
        W = getattr(owner, name)
        if W.element_size() <= 2:
            return f"W is {W.dtype}, in which adding and then subtracting does not lead back"
        W.copy_(self._base_of(W))
        return None

    def _base_of(self, W: Tensor) -> Tensor:
        """Return a copy of W minus its movement."""
        assert self.movement is not None
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

    def put_on(self) -> None:
        """Put one hook before the layer and one after it, also where the forward pass raises."""
        super().put_on()
        for handle in self._handles:
            handle.remove()
        self._handles = [
            self.module.register_forward_pre_hook(self, with_kwargs=True),
            self.module.register_forward_hook(self, with_kwargs=True, always_call=True),
        ]
        compiled.renew_graphs(self.module)

    def is_on(self) -> bool:
        """Tell if both hooks are still where they were put."""
        return super().is_on() and any(hook is self for hook in self.module._forward_pre_hooks.values())

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        """Let the base stand in for W before a forward pass, and W be back after it."""
        if output:
            if self._standing:
                self._end(module)
        elif self._shared or self.absence(module, kwargs):
            self._begin(module)
        elif self._standing:
            self._end(module)

    # Within a compiled graph the exchange of a parameter would be taken for a change of the model at each call.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, module: nn.Module) -> None:
        if torch.compiler.is_exporting():
            self._moves_in_export()
        owner, name = self.holder(module)
        with _exchanging:
            self._end(module)  # a signal that ended the last forward pass of this thread left it open
            exchange, threads = self._standing.get(id(owner), (None, set()))
            movement = self.movement
            if exchange is None:
                if movement is None or not movement.moved():
                    return
                with torch.no_grad():
                    base = self._base(module)
                    base = self._base_of(getattr(owner, name)) if base is None else base
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

    def __deepcopy__(self, memo: dict[int, Any]) -> OutputHook:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, ParameterHook)
        twin._standing = {}
        return twin


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
            for hook in hooks_on(wrapper):
                if hook.branch not in merged:
                    hook.take_back()
        own = getattr(type(layer), "unload_and_optionally_merge_module", None)
        if own is not None:
            return own(layer, merge=merge, safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[no-any-return]
        if merge:
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return layer.get_base_layer()  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Unloading:
        return Unloading(deepcopy(self.layer, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled layer is taken away by PEFT's code alone, which is installed wherever its layers are.
        return partial, (lora.ParamWrapper.unload_and_optionally_merge_module, self.layer)


def hook_for(layer: lora.LoraLayer, adapter: str, name: str, view: MatrixView, label: str) -> LayerHook:
    """Return the hook of an adapter on its layer; it is put there if there is none yet."""
    kind = ParameterHook if isinstance(layer, lora.ParamWrapper) else LayerHook
    hook = hook_of(layer, kind, adapter)
    if hook is None:
        hook = kind(layer, adapter, name, view, label)
        hook.put_on()
    return hook


def hooks_on(layer: nn.Module) -> list[LayerHook]:
    """Return the hooks of all adapters on a layer."""
    return [hook for hook in layer._forward_hooks.values() if isinstance(hook, LayerHook)]


def _wrappers(layer: nn.Module) -> Iterator[Any]:
    """Yield a LoRA layer, and those that it wraps."""
    inside: Any = layer
    while isinstance(inside, lora.LoraLayer):
        yield inside
        inside = inside.base_layer


def _adapters(layer: Any) -> Any:
    """Return PEFT's dict of the adapters that a layer holds."""
    return layer.lora_embedding_A if isinstance(layer, lora.Embedding) else layer.lora_A
