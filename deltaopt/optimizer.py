"""DeltaLoRAOptimizer: what happens when in a Delta-LoRA step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deltaopt.accounts import Account, Accounts, Reinit, lora_start
from deltaopt.base import BaseSource
from deltaopt.folding import (
    Folding,
    checked_weight_update,
    evaluated_once,
    leave_whole,
    refuse_folded,
    refuse_groups,
    refuse_inner,
    warn_of_folded,
)
from deltaopt.groups import (
    DeltaGroup,
    ParamsInput,
    Settings,
    TriplesInput,
    UpdateRatio,
    as_list,
    inner_groups,
    parse_triples,
)
from deltaopt.guard import FiniteGuard
from deltaopt.inner import (
    build_inner,
    check_membership,
    global_hooks_held,
    is_state_initialisation,
    refuse_unused,
    refuse_weights,
)
from deltaopt.lowrank import LowRank
from deltaopt.state import (
    add_ledgers,
    add_record,
    check_record,
    restore_settings,
    split_ledgers,
    split_record,
)
from deltaopt.triple import LoRATriple, Stored, check_triples
from deltaopt.update import BufferKind, FactoredDelta, Move
from deltaopt.writing import Rounding, checked_rounding


class DeltaLoRAOptimizer(Optimizer):
    r"""Trains LoRA factors with any optimizer and moves the frozen weights by the delta of their product.

    .. math::
        &\textbf{for } t = 0, 1, 2, \dots \textbf{ do}\\
        &\quad A_{t+1}, B_{t+1} \leftarrow \text{inner step on } A_t, B_t\\
        &\quad \textbf{if } t \geq K\!:\quad
            W_{t+1} \leftarrow W_t + \lambda s \, (A_{t+1} B_{t+1} - A_t B_t)

    This is Algorithm 1 and Eq. 6 of Delta-LoRA (arXiv 2309.02411). W needs no gradient and gets no optimizer
    state; the update is one `torch.addmm_` of inner size 2r per W, inside `step()`.

    The printed algorithm writes ``if t > K`` with t from 0, its text "after K iterations". Here the first
    `start_step` calls of `step()` leave W alone and the next one moves it; the printed condition is
    ``start_step = K + 1``.

    Args:
        inner: an optimizer class (or a callable that returns an optimizer), which is built here from the
            factors, `params` and `inner_kwargs`; or a built optimizer that already holds every A and B.
        triples: `LoRATriple`s, plain ``(W, A, B)`` tuples, or dicts ``{"triples": [...]}`` with their own
            ``update_ratio``, ``start_step``, ``scaling`` and inner options such as ``lr``.
        params: what else trains, as the inner optimizer takes it: tensors (they share the factors' options)
            or param groups. Factors among plain tensors are not repeated. Only with an inner class.
        update_ratio: lambda, at least 0; or a callable that gets the number of the step, counted from 0,
            and returns it. Default 2.0. With 0 the optimizer is its inner optimizer, bit for bit.
        start_step: K, the number of calls of `step()` that leave W alone. Default 0.
        scaling: s of plain tuples: what their branch multiplies A @ B by. Default 1.0.
        rounding: how a 16-bit W is written; the sum is always formed in float32. ``"stochastic"``: rounded up or
            down at random so that the mean is right, no memory. ``"compensated"``: rounded to nearest, and what was
            cut off is kept for the next step, 2 bytes for each element; W then follows a float32 W. ``"nearest"``
            loses what is small beside the spacing of W's values, which is most of it. ``"auto"``, the default, is
            ``"stochastic"``. A W in float32 or float64 is rounded to nearest whatever this is.
        rounding_seed: of the noise of stochastic rounding, the same on every rank. Default 0. The global generator is
            not touched.
        weight_update: ``"in_place"``, the default, moves W. ``"folded"`` comes to the same A, B and effective weights
            without writing W: at step K it takes lambda s A_K B_K from W, which is nothing at LoRA's usual start with
            K = 0, scales the branch by (1 + lambda) s from then on, and divides what reaches the gradients of A and B
            by 1 + lambda. It needs a constant `update_ratio` and triples whose scaling can be set (those of
            `find_triples` can), and takes quantized W's too, if the product at step K is zero. See docs/folded.md.
        keep_base: ``"cpu"`` or ``"device"`` keeps a copy of every W from before its first move, there or beside W,
            for `base_weights`. Default None: no copy, no memory.
        **inner_kwargs: ``lr``, ``weight_decay``, .. for an inner class.

    Raises:
        ValueError, TypeError: for triples that can not be moved (all of them in one message), for factors
            that the inner optimizer does not hold, and for values out of range. Nothing is changed then.

    Example:
        >>> import torch
        >>> linear = torch.nn.Linear(6, 4, bias=False).requires_grad_(False)
        >>> A, B = torch.zeros(4, 2, requires_grad=True), torch.randn(2, 6, requires_grad=True)
        >>> optimizer = DeltaLoRAOptimizer(
        ...     torch.optim.AdamW, [(linear.weight, A, B)], lr=1e-2, update_ratio=2.0, scaling=0.5
        ... )
        >>> x, before = torch.randn(8, 6), linear.weight.clone()
        >>> loss = (linear(x) + 0.5 * x @ (A @ B).mT).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> torch.allclose(linear.weight - before, 2.0 * 0.5 * (A @ B), atol=1e-6)
        True
    """

    # GradScaler must unscale the gradients and leave out steps itself: told that scaling is supported, it would
    # hand the scale to this object, where a fused inner optimizer does not look for it.
    _step_supports_amp_scaling = False

    _delta: FactoredDelta
    _rounding: Rounding

    def __init__(
        self,
        inner: type[Optimizer] | Callable[..., Optimizer] | Optimizer,
        triples: TriplesInput,
        params: ParamsInput = (),
        *,
        update_ratio: UpdateRatio = 2.0,
        start_step: int = 0,
        scaling: float = 1.0,
        rounding: str = "auto",
        rounding_seed: int = 0,
        weight_update: str = "in_place",
        keep_base: str | None = None,
        **inner_kwargs: Any,
    ) -> None:
        if isinstance(inner, DeltaLoRAOptimizer):
            raise TypeError(
                "inner is a DeltaLoRAOptimizer already, which would move W twice: wrap its `inner`, or use "
                "add_param_group for more triples"
            )
        settings = Settings(update_ratio, start_step, scaling)
        rounds = checked_rounding(rounding, rounding_seed)
        folding = Folding() if checked_weight_update(weight_update) == "folded" else None
        groups, options = parse_triples(triples, settings)
        registered = [triple for group in groups for triple in group.triples]
        refuse_folded(registered)
        check_triples(registered, folding is not None)
        if isinstance(inner, Optimizer):
            refuse_unused(options, params, inner_kwargs)
        else:
            inner = build_inner(inner, inner_groups(groups, options, params), inner_kwargs)
        if any(group.get("differentiable") for group in inner.param_groups):
            raise ValueError(
                "the inner optimizer is differentiable=True, but W is moved without a graph: use differentiable=False"
            )
        if folding is not None:
            refuse_inner(inner)
            refuse_groups(groups)
        accounts = Accounts(registered, keep_base)
        self._settings = settings
        self._become(inner, groups, accounts, rounds, folding, step_count=0, skipped_updates=0)
        self._remember([triple.stored() for triple in self.triples])  # checked above
        self._look_up()
        self._take_over(registered)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        inner: type[Optimizer] | Callable[..., Optimizer],
        *,
        adapter: str = "default",
        allow_dropout: bool = False,
        allow_tied: bool = False,
        **kwargs: Any,
    ) -> DeltaLoRAOptimizer:
        """The optimizer for everything in `model` that trains: its LoRA layers, and what else requires grad.

        Args:
            model: a model with LoRA layers of a library that `find_triples` knows.
            inner: an optimizer class.
            adapter: the adapter's name.
            allow_dropout: see `find_triples`.
            allow_tied: see `find_triples`.
            **kwargs: ``update_ratio``, ``start_step`` and the options of the inner optimizer.

        Raises:
            ValueError: as `find_triples` and `DeltaLoRAOptimizer` do.
        """
        from deltaopt.integrations import find_triples, other_parameters

        triples = find_triples(model, adapter, allow_dropout=allow_dropout, allow_tied=allow_tied)
        return cls(inner, triples, other_parameters(model, triples), **kwargs)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One inner step on A and B, then W <- W + lambda s (A'B' - AB) once K steps have passed.

        With ``weight_update="folded"`` the inner step alone; step number K first scales the branches.

        Args:
            closure: evaluates the model again and returns the loss; handed to the inner optimizer.

        Returns:
            What the inner optimizer's ``step`` returns.

        Raises:
            ValueError: if a factor or W was replaced by something that can not be used, or `update_ratio` or
                `start_step` is out of range.
            RuntimeError: if the branch was merged, rescaled or deleted, the step is being captured into a CUDA
                graph, or it is called in `base_weights`. In each case nothing has changed.
        """
        self._refuse_at_base("step()")
        stored = self._look_up()
        counts = not is_state_initialisation(self._inner)
        if counts and self._folding is not None:
            self._fold(self._folding, stored, closure is not None)  # once, at t = K: then the branch does what follows
        moves = self._moves(stored) if counts and self._folding is None else []

        self._delta.snapshot(moves)  # A_t, B_t
        loss = self._inner_step(closure)  # A_{t+1}, B_{t+1}
        if moves:
            self._accounts.open(move.ledger for move in moves)
            self._delta.apply_(self._guard, self._rounding.during("move", self._step_count))  # W_{t+1}

        self._step_count += counts
        self._repeats = 0
        return loss

    @property
    def inner(self) -> Optimizer:
        """The optimizer that trains A, B and the other parameters. Its `step` must not be called directly."""
        return self._inner

    @property
    def groups(self) -> tuple[DeltaGroup, ...]:
        """The groups of triples; their `update_ratio` and `start_step` may be set between steps."""
        return tuple(self._groups)

    @property
    def triples(self) -> list[LoRATriple]:
        """All registered triples, in order."""
        return [triple for group in self._groups for triple in group.triples]

    @property
    def weight_update(self) -> str:
        """How the weights are updated, "in_place" or "folded"."""
        return "in_place" if self._folding is None else "folded"

    @property
    def step_count(self) -> int:
        """How many calls of `step()` there have been; t in the algorithm."""
        return self._step_count

    @property
    def skipped_updates(self) -> int:
        """How many steps left every W alone because a factor was NaN or infinite. Waits for the device."""
        return self._guard.skipped

    @property
    def buffer_bytes(self) -> int:
        """Bytes held beside the inner optimizer's state: 3 r (c + d) numbers for each triple, and the ledgers.

        A ledger has r (c + d) numbers for each term; with a constant `update_ratio` that is one, or none where the
        product at `start_step` was zero. What compensated rounding keeps (2 c d bytes) and copies of the base
        (`keep_base`) are counted too.
        """
        return self._delta.nbytes + self._accounts.nbytes

    def displacement(self, name: str) -> LowRank:
        """How far a W was asked to move since its first move (or the last `rebase`), as low-rank factors.

        With ``weight_update="folded"``, how far it would have moved in place; the branch has it.

        Args:
            name: of the triple.

        Returns:
            A (c, R) and B (R, d), or (e, c, R) and (e, R, d), whose `product()` is the displacement of W's matrix. With
            a constant `update_ratio`, R is 2r, or r where the product at `start_step` was zero.

        Raises:
            KeyError: if there is no such triple.
            RuntimeError: if it is not known any more, with the reason.
        """
        self._delta.settle()
        return self._accounts.displacement(name)

    def residual(self, name: str, source: BaseSource | None = None) -> Tensor:
        """What rounding did to a W: where it is, minus where it was asked to be.

        Computed anew, in float64, from W, the base and the displacement; for looking at, not for every step.

        Args:
            name: of the triple.
            source: pristine weights, as for `base_weights`. Default: the copy of `keep_base`; with compensated rounding
                what was cut off, if the base that follows from it has the base's fingerprint.

        Returns:
            (c, d), or (e, c, d) for experts, in float32 (float64 for a float64 W), as W's matrix is: zero to rounding
            for float32 and float64; within half a spacing of W's values with compensated rounding; a mean of zero with
            stochastic rounding; most of minus the displacement with rounding to nearest.

        Raises:
            KeyError: if there is no such triple.
            ValueError: if W's base is not in `source`.
            RuntimeError: if there is no base at hand, or the displacement is not known any more; in `base_weights`.
        """
        self._between_steps("residual()")
        return self._accounts.residual(name, source)

    @contextmanager
    def base_weights(self, source: BaseSource | None = None, method: str | None = None) -> Iterator[None]:
        """Within it every W is what it was before its first move; after it, what it is now, bit for bit.

        For the reference model of DPO or GRPO, or an evaluation of the base; with PEFT together with
        ``model.disable_adapter()``, which leaves out the branch. (A folded branch adds scaling * A @ B within it, as
        beside a W that moves.) W's bits come from the first of these that there is:

        1. `source`: exact;
        2. the copy of `keep_base`: exact;
        3. a float32 or float64 W: W minus its displacement, equal to rounding; so for a 16-bit W with compensated
           rounding, if what comes out has the base's fingerprint: exact then;
        4. another 16-bit W stays, and a hook takes displacement @ x off its layer's output. What rounding did to W
           while it moved stays in it.

        Args:
            source: pristine weights: a state_dict, a model, a file, or a folder of .safetensors files. A tensor is
                found by its contents, whatever its name, and verified by the fingerprint of W.
            method: "copy": never hooks. "hooks": hooks for all, which copies nothing, writes nothing, and costs two
                thin products for each forward pass of a layer. Default: as above.

        Raises:
            RuntimeError: if the base of a layer can not be had so, for all of them in one message; if a branch is
                merged; if it is nested. Within it `step()`, saving and whatever reads or moves W through this optimizer
                raise it.
            ValueError, TypeError: for other arguments than these.
        """
        self._between_steps("base_weights()")
        self._look_up()
        self._at_base = True
        try:
            with ExitStack() as stack:
                stack.enter_context(self._accounts.at_base(source, method))
                if self._folding is not None:
                    stack.enter_context(self._folding.unfolded(self.triples))
                yield
        finally:
            self._at_base = False

    def rebase(self) -> None:
        """Take every W as it is now as its base: after it was loaded, merged or pruned by hand.

        The displacement begins at zero, a copy of the base (`keep_base`) is taken anew before the next move. Adapters
        that are exported later are for this base, not for the pristine weights.
        """
        self._between_steps("rebase()")
        self._accounts.rebase()

    def restart(self, reinit: Reinit | None = None, *, generator: torch.Generator | None = None) -> None:
        """Add every branch to its W and start A and B afresh, as ReLoRA does: the total rank can grow.

        W += what the branch adds, scaling * A @ B, then A and B as LoRA starts them, with no gradients and no inner
        state. The effective weight is as before, up to rounding. The ledgers go on, so that export and resume still
        count from the base.

        Args:
            reinit: gets each triple and writes its A and B in place, under `torch.no_grad`. Default: A zero, B uniform
                in +- 1 / sqrt(d); in embeddings B zero, A standard normal. Their product should be zero, or the
                effective weight jumps. If it raises, A, B and W are as before.
            generator: of the default's random numbers.

        Raises:
            ValueError: if a factor is NaN or infinite. Nothing is changed then.
            RuntimeError: if a branch is merged, a W can not be written (quantized), or in `base_weights`.
        """
        self._between_steps("restart()")
        self._look_up()
        write = self._rounding.during("restart", self._step_count, self._repeats)
        self._repeats += 1
        self._accounts.restart(reinit if reinit is not None else lora_start(generator), write)
        for triple in self.triples:
            for factor in (triple.A, triple.B):
                factor.grad = None
                self.state.pop(factor, None)
        if isinstance(self._inner, torch.optim.LBFGS):  # keeps all of its history under one parameter
            self.state.clear()

    def resync(self) -> None:
        """Move every W to where it belongs for the present A and B, after these were changed by other means.

        W += coef * (A_now B_now - A B), with A and B as the last move left them: after `load_best_model_at_end`, an
        averaged adapter, or a step of an engine that this optimizer did not see. It is right for factors of the time
        since `update_ratio` last changed, the last `restart` and `start_step`; for older ones load that checkpoint with
        its optimizer state. Where `update_ratio` is 0 now, W stays. A 16-bit W becomes base + displacement, rounded
        once, if `keep_base` has kept its base; else it keeps the roundings of its way, and a warning says so. With
        compensated rounding it is as good as float32.

        Without it a change of A and B from outside is no step: W stays, and the next step's delta counts from there.
        With ``weight_update="folded"`` there is nothing to do: what W would move by is in the branch, which follows.

        Raises:
            ValueError: if a factor is NaN or infinite. Nothing is changed then.
            RuntimeError: if a branch is merged, or in `base_weights`.
        """
        self._between_steps("resync()")
        self._look_up()
        ratios = [group.ratio_at(self._step_count) for group in self._groups]
        follows = [r > 0 for group, r in zip(self._groups, ratios, strict=True) for _ in group.triples]
        self._accounts.resync(follows, self._rounding.during("resync", self._step_count, self._repeats))
        self._repeats += 1

    def accounts(self) -> list[Account]:
        """Each triple with the ledger of its W, for export and analysis.

        Raises:
            RuntimeError: in `base_weights`; or if a folded branch has another scaling than it was given.
        """
        self._between_steps("reading the ledgers")
        if self._folding is not None:
            self._look_up()
        return list(self._accounts)

    # The inner optimizer's own lists and dicts, always: `load_state_dict` makes new ones, and a scheduler
    # that wrote into old ones would have no effect.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's param groups: the very list, so that schedulers reach it."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        return self._inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self._inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return getattr(self._inner, "defaults", {})

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._inner.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of everything that trains, as the inner optimizer does."""
        self._inner.zero_grad(set_to_none=set_to_none)
        if self._folding is not None:
            with suppress(RuntimeError):  # of what is wrong with the factors `step` tells
                attach = self._folding.check if self._signatures else self._folding.attach  # a copy has none at first
                attach(self.triples)

    def release(self) -> None:
        """Let go of A and B, so that an optimizer of another kind may train them: their gradients are whole then.

        That is of use with ``weight_update="folded"``, whose hooks stay while this optimizer exists, and after
        `start_step`; the branches keep their scaling. Another DeltaLoRAOptimizer takes the factors over by itself. The
        next `zero_grad` or `step` of this one takes them again.
        """
        if self._folding is not None:
            self._folding.leave()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, or triples, while training goes on.

        Args:
            param_group: ``{"params": [...], options}`` as for any optimizer; or ``{"triples": [...], options}``
                as in the constructor, whose ``start_step`` still counts from the first step of the optimizer.

        Raises:
            ValueError, TypeError: as the constructor does. Nothing is changed then.
        """
        if "triples" not in param_group:
            param_group = {**param_group, "params": as_list(param_group["params"])}
            refuse_weights(self.triples, param_group["params"])
            self._inner.add_param_group(param_group)
            return
        groups, options = parse_triples([param_group], self._settings, first=len(self.triples))
        refuse_folded(groups[0].triples)
        check_triples([*self.triples, *groups[0].triples], self._folding is not None)
        refuse_weights(self.triples, options[0].get("params", ()))
        if self._folding is not None:
            refuse_groups([*self._groups, *groups])
        self._inner.add_param_group(inner_groups(groups, options, ())[0])
        self._take_over(groups[0].triples)
        self._groups += groups
        self._accounts.add(groups[0].triples)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and under the key "deltaopt" what is needed to go on.

        That is the settings, in each param group, and the ledger of each W, in the state of its A: a string with the
        anchors and with fingerprints of W, A and B. With compensated rounding what was cut off is there too, as large
        as the W's: see `deltaopt.without_compensation`. It holds tensors, numbers, strings, lists and dicts only, so it
        loads with ``weights_only=True``. It holds neither W nor A nor B: save the whole model with it, or the adapter,
        from which and the base W can be rebuilt.

        Raises:
            RuntimeError: if a branch is merged, or in `base_weights`.
        """
        self._between_steps("state_dict()")
        self._look_up()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        accounts = self._accounts
        state_dict = add_record(
            self._inner.state_dict(),
            self._groups,
            self._step_count,
            self.skipped_updates,
            self._rounding.seed,
            self.weight_update,
        )
        state_dict = add_ledgers(
            state_dict,
            self._inner,
            accounts.triples,
            accounts.records(),
            accounts.compensations(self._rounding.during("move", self._step_count), self._folding is None),
        )
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Load the model's weights first: all of them, or the adapter's.

        Each W is compared with its saved fingerprints. If it is what it was when the state was saved, it is left
        alone; if it is what it was before its first move (only the adapter was saved), it is moved by its saved
        displacement, which gives what it was up to rounding; if it is neither, it is taken from the copy of the base
        (`keep_base`) and moved, or the state is refused. Loading twice moves nothing twice.

        As with other optimizers the saved options replace the present ones, `update_ratio` and `start_step`
        among them. A callable `update_ratio` is code and not saved: where the saved run or this one has a
        callable, this one's `update_ratio` stays. So does this one's `rounding`, with the saved seed: what compensated
        rounding had cut off is taken from the state, or computed where `keep_base` has the base, or starts at zero with
        a warning. With ``weight_update="folded"`` the branches are scaled as they were in the saved run; they may have
        been registered with their first scaling or, from an adapter that was saved in that run, with the later one.

        Raises:
            WeightMismatchError: a ValueError that names the layers whose W, A or B do not belong to the state.
            ValueError: if the state is of other triples, of a plain optimizer, of the other `weight_update`, of another
                schema, or damaged.
            RuntimeError: if a branch is merged, or in `base_weights`. In each case nothing is changed.
        """
        self._between_steps("load_state_dict()")
        self._look_up(rescaled=True)
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        record, inner_state = split_record(state_dict)
        check_record(record, self._groups, self.weight_update)
        ledgers, compensations, inner_state = split_ledgers(inner_state)
        rounding = self._rounding._replace(seed=record["rounding_seed"])
        write = rounding.during("resume", record["step_count"])
        resume = self._accounts.rebase
        if record["ledgers"]:
            resume = self._accounts.resumption(ledgers, compensations, write)
        with ExitStack() as stack:
            if self._folding is not None:
                records = [t for group in record["groups"] for t in group["triples"]]
                stack.enter_context(self._folding.restored(self.triples, records))
            self._inner.load_state_dict(inner_state)
        resume()
        restore_settings(record, self._groups)
        self._rounding = rounding
        self._step_count = int(record["step_count"])
        self._guard = FiniteGuard(record["skipped_updates"])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._between_steps("copying and pickling")
        return {
            "inner": self._inner,
            "groups": self._groups,
            "accounts": self._accounts,
            "settings": self._settings,
            "rounding": self._rounding,
            "folding": self._folding,
            "step_count": self._step_count,
            "skipped_updates": self.skipped_updates,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._settings = state["settings"]
        names = ("inner", "groups", "accounts", "rounding", "folding", "step_count", "skipped_updates")
        self._become(*(state[name] for name in names))
        with suppress(RuntimeError):  # where a module is not complete yet; then `zero_grad` or `step` does it
            self._take_over(self.triples)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self._groups):
            lines += [
                f"Triples {i}: {len(group.triples)}, update_ratio={group.update_ratio}, start_step={group.start_step}"
            ]
        return "\n".join([*lines, f"inner: {self._inner!r}", ")"])

    def _become(
        self,
        inner: Optimizer,
        groups: list[DeltaGroup],
        accounts: Accounts,
        rounding: Rounding,
        folding: Folding | None,
        step_count: int,
        skipped_updates: int,
    ) -> None:
        self._inner = inner
        self._groups = groups
        self._accounts = accounts
        self._rounding = rounding
        self._folding = folding
        self._at_base = False
        self._step_count = step_count
        self._repeats = 0  # restarts and resyncs since the last step
        self._guard = FiniteGuard(skipped_updates)
        self._delta = FactoredDelta()
        super().__setstate__({})  # the hooks of torch's Optimizer; its __init__ would make groups of its own
        # Not looked up here: in a copy of a model that holds its optimizer, modules are not complete yet.
        self._signatures: list[tuple[object, ...]] = []

    def _moves(self, stored: Sequence[Stored]) -> list[Move]:
        """What this step will move: nothing before `start_step`, and nothing where the ratio is 0."""
        ratios = [group.ratio_at(self._step_count) for group in self._groups]
        of_triples = [(t, r) for group, r in zip(self._groups, ratios, strict=True) for t in group.triples]
        return [
            Move(triple, tensors, ratio * triple.scaling, kind, ledger)
            for (triple, ratio), tensors, kind, ledger in zip(
                of_triples, stored, self._kinds, self._accounts.ledgers, strict=True
            )
            if ratio > 0
        ]

    def _take_over(self, triples: Sequence[LoRATriple]) -> None:
        """From now on these factors' gradients are divided for this optimizer, or for nobody."""
        warn_of_folded(triples, stacklevel=3)
        if self._folding is not None:
            self._folding.take_over(triples)
        else:
            leave_whole(triples, self)

    def _fold(self, folding: Folding, stored: Sequence[Stored], with_closure: bool) -> None:
        """Let the branches take up the ratio, if it is time; see `deltaopt.folding`."""
        folding.refuse_undivided(self.triples, stored)
        due = folding.due(self._groups, self._accounts.ledgers, self._step_count, with_closure)
        if due:
            folding.begin(due, self._accounts, self._rounding.during("move", self._step_count))

    def _inner_step(self, closure: Callable[[], float] | None) -> float | None:
        if closure is not None and any(triple.folded for triple in self.triples):
            closure = evaluated_once(closure, self.triples)
        watching = nullcontext() if self._folding is None else self._folding.watching(self._groups, self._step_count)
        with watching, global_hooks_held():
            return self._inner.step() if closure is None else self._inner.step(closure)

    def _remember(self, stored: Sequence[Stored]) -> None:
        """Keep what tells a change of the tensors, and what holds until there is one."""
        self._signatures = [tensors.signature() for tensors in stored]
        if self._folding is None:
            self._kinds = [BufferKind.of(t, tensors) for t, tensors in zip(self.triples, stored, strict=True)]

    def _look_up(self, rescaled: bool = False) -> list[Stored]:
        """The tensors of all triples as they are now; after a change since the last step, with all checks again.

        Args:
            rescaled: folded branches may have another scaling than expected: it is about to be set.
        """
        triples = self.triples
        stored = [triple.stored() for triple in triples]
        if self._signatures != [tensors.signature() for tensors in stored]:
            check_triples(triples, self._folding is not None)
            if self._folding is not None:
                self._folding.attach(triples)
            self._remember(stored)
        rescaled &= self._folding is not None
        problems = [
            f"{t.label}: {problem}"
            for t in triples
            for problem in (t.merge_problems() if rescaled else t.branch_problems())
        ]
        if problems:
            raise RuntimeError("W can not be moved now:\n  " + "\n  ".join(problems))
        check_membership(self._inner, triples, stored)
        if self._folding is not None:
            self._folding.check(triples)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() is being captured into a CUDA graph, which would freeze the test t >= start_step "
                "and update_ratio: capture forward and backward only"
            )
        return stored

    def _between_steps(self, what: str) -> None:
        """Before `what`: nobody is in `base_weights`, and the ledgers know of every step."""
        self._refuse_at_base(what)
        self._delta.settle()

    def _refuse_at_base(self, what: str) -> None:
        if self._at_base:
            raise RuntimeError(
                f"{what} within base_weights(), where no W is what this optimizer moved it to: leave it first"
            )
