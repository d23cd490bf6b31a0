"""DeltaLoRAFactory: builds the optimizer where Trainer has the model ready."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from deltaopt.integrations.trainer.small_state import saves_adapter_alone
from deltaopt.messages import names
from deltaopt.optimizer import DeltaLoRAOptimizer
from deltaopt.small_states import leave_out_compensation

ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
"""Options of inner optimizers, and where `TrainingArguments` has them."""

RESERVED = ("self", "cls", "model", "inner", "triples", "params", "scaling")
"""Parameters of ours that the factory fills in, or that are for other triples than a model's."""


class DeltaLoRAFactory:
    """Builds a `DeltaLoRAOptimizer` for the model that Trainer is about to train.

    Trainer calls what is no Optimizer class as ``DeltaLoRAFactory()(model, **kwargs)`` when the model is ready: made by
    `model_init`, with the adapter of TRL's `peft_config`, with the adapter of the checkpoint that is resumed. A factory
    gets nothing of `TrainingArguments`, so give it the learning rate, or the arguments themselves.

    Example:
        >>> import torch
        >>> from transformers import Trainer
        >>> def trainer_of(model, args, dataset):
        ...     options = {"inner": torch.optim.AdamW, "args": args, "update_ratio": 2.0, "start_step": 500}
        ...     return Trainer(model, args, train_dataset=dataset, optimizer_cls_and_kwargs=(DeltaLoRAFactory, options))
    """

    def __call__(
        self,
        model: nn.Module | None = None,
        *,
        inner: type[Optimizer] | Callable[..., Optimizer] = AdamW,
        args: Any = None,
        **options: Any,
    ) -> DeltaLoRAOptimizer:
        """Return the optimizer for everything in `model` that trains, as `DeltaLoRAOptimizer.for_model`.

        Where Trainer saves the adapter alone, the optimizer's states leave out what compensated rounding cut off.

        Args:
            model: a model with LoRA layers; Trainer hands it over.
            inner: the class of the optimizer that trains A and B. Default: torch's AdamW.
            args: the `TrainingArguments`. Their `learning_rate` and `weight_decay` are used where `options` do not have
                ``lr`` and ``weight_decay`` and `inner` takes them, with the values of this moment: a hyperparameter
                search sets them for each trial. All parameters get the same weight decay.
            **options: ``update_ratio``, ``start_step`` and the other arguments of `DeltaLoRAOptimizer` and `for_model`,
                and the options of `inner`.

        Raises:
            TypeError: without a model, for an option that neither knows, or an `inner` that is no class, or a missing
                learning rate.
            ValueError: as `for_model`, for a model without LoRA layers among others. Nothing is changed then.
        """
        if model is None:
            raise TypeError(
                "DeltaLoRAFactory: the model is missing, as Trainer was given a DeltaLoRAFactory that was made "
                "already. Give it the class: "
                'optimizer_cls_and_kwargs=(DeltaLoRAFactory, {"inner": torch.optim.AdamW, "lr": 2e-4})'
            )
        if not callable(inner):
            raise TypeError(
                f"DeltaLoRAFactory: `inner` is {inner!r}, expected the class of the optimizer that trains A and B: "
                'optimizer_cls_and_kwargs=(DeltaLoRAFactory, {"inner": torch.optim.AdamW, "lr": 2e-4})'
            )
        name = getattr(inner, "__name__", repr(inner))
        own, inners, takes_any = _ours(), *_parameters(inner)
        unknown = [option for option in options if option not in own | inners and not takes_any]
        if unknown:
            known = sorted(own | inners | {"args"})
            near = {match for option in unknown for match in get_close_matches(option, known, n=1)}
            raise TypeError(
                f"DeltaLoRAFactory: neither DeltaLoRAOptimizer nor {name} takes {names(unknown)}"
                + (f" (did you mean {names(sorted(near))}?)" if near else "")
                + f". They take {', '.join(known)}"
            )
        if args is not None:
            here = {option: getattr(args, field) for option, field in ARGUMENTS.items() if option in inners}
            options = {**here, **options}
        elif "lr" in inners and "lr" not in options:
            raise TypeError(
                f"DeltaLoRAFactory: the learning rate of {name} is missing. Trainer gives no arguments to a factory, "
                'not even args.learning_rate: add "lr": 2e-4, or "args": args for the learning_rate and weight_decay '
                "of the TrainingArguments"
            )
        optimizer = DeltaLoRAOptimizer.for_model(model, inner, **options)
        if saves_adapter_alone(model):
            leave_out_compensation(optimizer)
        return optimizer


def _ours() -> set[str]:
    """Return the names of our own options."""
    functions = (DeltaLoRAOptimizer.__init__, DeltaLoRAOptimizer.for_model)
    return {name for function in functions for name in _parameters(function)[0]} - {*RESERVED}


def _parameters(function: Callable[..., Any]) -> tuple[set[str], bool]:
    """Return the names of a function's arguments, and whether it takes any others."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a function in C
        return set(), True
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}, takes_any
