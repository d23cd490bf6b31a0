"""DeltaLoRAOptimizer: torch's protocol of an optimizer, and the order of a Delta-LoRA step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deltaopt import base, claims, restarts, synced, usage
from deltaopt.all_or_nothing import Events, note_result
from deltaopt.around import check_local_sgd, check_not_stepped_within
from deltaopt.base import BaseSource
from deltaopt.checkpoint import resume
from deltaopt.checkpoint.format import (
    add_ledgers,
    add_record,
    check_complete,
    check_record,
    inner_state,
    own_form,
    present_names,
    repeats_of,
    restore_settings,
    split_ledgers,
    split_record,
)
from deltaopt.checkpoint.records import branch_record
from deltaopt.checks import (
    check_branches,
    check_claims,
    check_keep_base,
    check_membership,
    check_no_weight_trains,
    check_not_capturing,
    check_not_differentiable,
    check_not_folded,
    check_nothing_unused,
    check_output_hooks,
    check_training,
    check_weights,
    shared_movements,
    warn_of_moved,
    warn_of_outputs,
    warn_of_shared_base,
)
from deltaopt.claims import Claim, Claimant, Use
from deltaopt.folded import FoldedUpdate
from deltaopt.gradient_hooks import warn_of_folded
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
from deltaopt.in_backward import BackwardWatch, check_not_in_backward, check_outside_backward, check_steps_by_itself
from deltaopt.in_place import InPlaceUpdate
from deltaopt.inner import (
    build_inner,
    check_no_schedule_free_around,
    forget_state,
    is_in_mode,
    is_state_initialisation,
    step_inner,
)
from deltaopt.ledger import Ledger
from deltaopt.lowrank import LowRank
from deltaopt.messages import names, problems_of, raise_problems
from deltaopt.movement import RunningMovement
from deltaopt.naming import under_present_names
from deltaopt.overwritten import refuse_overwritten
from deltaopt.plain import plain
from deltaopt.ranks import Ranks
from deltaopt.recall import Recall
from deltaopt.report import Report, at_a_glance, report_of
from deltaopt.restarts import Reinit, lora_start
from deltaopt.roll_call import RollCall, checked_timeout, look_at_written, ranks_that_share
from deltaopt.rounding.writer import Rounding, Writer, checked_rounding
from deltaopt.rule import Closure, UpdateRule
from deltaopt.save_watch import SaveWatch
from deltaopt.sharding import put_whole_
from deltaopt.tensors import outside_inference_mode
from deltaopt.triple import LoRATriple, named_apart
from deltaopt.unlinked import FactorsDifferError
from deltaopt.weight import WeightState, off_base

RULES: dict[str, type[UpdateRule]] = {rule.name: rule for rule in (InPlaceUpdate, FoldedUpdate)}


class Account(NamedTuple):
    """A triple and the ledger of its W."""

    triple: LoRATriple
    ledger: Ledger


class _Saved(NamedTuple):
    """A state_dict, taken apart.

    Attributes:
        record: the settings, and what is known of each triple.
        ledgers: the record of each ledger, by the name that its triple has now.
        compensations: what rounding had cut off, by the same names.
        inner: the inner optimizer's state.
    """

    record: dict[str, Any]
    ledgers: dict[str, Any]
    compensations: dict[str, Any]
    inner: dict[str, Any]


class DeltaLoRAOptimizer(Optimizer):
    r"""An optimizer that trains LoRA factors with any other one and moves the frozen weights by their product's delta.

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
            or param groups, of which empty ones are left out. Factors among plain tensors are not repeated. A built
            inner optimizer has to hold them already.
        update_ratio: lambda, at least 0; or a callable that gets the number of the step, counted from 0,
            and returns it. Default 2.0. With 0 the optimizer is its inner optimizer, bit for bit.
        start_step: K, the number of calls of `step()` that leave W alone. Default 0.
        scaling: s of plain tuples: what their branch multiplies A @ B by. Default 1.0.
        rounding: how a 16-bit W is written; the sum is always formed in float32. ``"stochastic"``: rounded up or
            down at random so that the mean is right, no memory. ``"compensated"``: rounded to nearest, and what was
            cut off is kept for the next step, 2 bytes for each element; W then follows a float32 W. ``"nearest"``
            loses what is small compared with the spacing of W's values, which is most of it. ``"auto"``, the default,
            is ``"stochastic"``. A W in float32 or float64 is always rounded to nearest.
        rounding_seed: the seed of all that is random here, stochastic rounding and `restart`, the same on every rank:
            then every rank has the same numbers. Default 0. The global generator is not touched.
        weight_update: ``"in_place"``, the default, moves W. ``"folded"`` gives the same A, B and effective weights
            and writes W only where the ratio changes: from `old` (0 before step K) to `new` it takes
            (new - old) s A B from W (zero at LoRA's usual start with K = 0), scales the branch by (1 + new) s, and
            divides what reaches the gradients of A and B by 1 + new. It needs triples whose scaling can be set (those
            of `find_triples` can). It takes quantized weights too, if `update_ratio` is a number and the product is
            zero at step K. See docs/folded.md. A callable that makes a `deltaopt.rule.UpdateRule` is also accepted;
            tests use it to give a rule arguments.
        keep_base: ``"cpu"`` or ``"device"`` keeps a copy of every W from before its first move, in host memory or on
            W's device, for `base_weights`. Default None: no copy, no memory.
        rank_timeout: seconds that a rank waits for the others where W, A or B are sharded (FSDP2, tensor parallelism),
            before it raises an error that names who has not come. Default: as long as the default process group waits.
        **inner_kwargs: ``lr``, ``weight_decay``, ... for an inner class.

    Raises:
        ValueError, TypeError: for triples that cannot be moved (all of them in one message), for factors
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

    # GradScaler must unscale the gradients and leave out steps itself. If scaling were supported, it would
    # hand the scale to this object, where a fused inner optimizer does not look for it.
    _step_supports_amp_scaling = False

    _rounding: Rounding
    _groups: list[DeltaGroup]
    _rule: UpdateRule
    _roll_call: RollCall  # of the event under way
    _weights: list[WeightState]

    def __new__(cls, *args: Any, **kwargs: Any) -> DeltaLoRAOptimizer:  # noqa: D102
        usage.check_call(args, kwargs)
        return super().__new__(cls)

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
        weight_update: str | Callable[[], UpdateRule] = "in_place",
        keep_base: str | None = None,
        rank_timeout: float | None = None,
        **inner_kwargs: Any,
    ) -> None:
        check_steps_by_itself(inner)
        usage.check_inner(inner)
        usage.check_triples(triples)
        usage.check_params(params)
        settings = Settings(update_ratio, start_step, scaling)
        rounds = checked_rounding(rounding, rounding_seed)
        rule = _rule_of(weight_update)
        check_keep_base(keep_base)
        groups, options = parse_triples(triples, settings)
        weights = _registered(groups, keep_base, ())
        check_not_folded([weight.triple for weight in weights])
        for weight in weights:
            weight.resolve()
        check_weights(weights, rule, new=weights)
        rule.rank_timeout = checked_timeout(rank_timeout)
        rule.ranks = ranks_that_share(weights, rule.rank_timeout)
        if isinstance(inner, Optimizer):
            check_nothing_unused(inner, options, params, inner_kwargs)
        else:
            with outside_inference_mode():
                inner = build_inner(inner, inner_groups(groups, options, params), plain(inner_kwargs))
        check_not_differentiable(inner)
        check_steps_by_itself(inner)
        check_membership(inner, weights)
        check_not_in_backward(weights)
        check_not_capturing()
        check_local_sgd(inner, weights, rule, rounds)
        rule.check_inner(inner)
        rule.check_groups(groups)
        with outside_inference_mode():
            for weight in weights:
                weight.register()
        self._settings = settings
        self._keep_base = keep_base
        self._become(inner, groups, weights, rounds, rule, step_count=0)
        self._seen = True
        warn_of_folded([weight.triple for weight in weights])
        self._warn_of_bases(weights)
        self._take(weights)

    @classmethod
    def for_model(
        cls,
        model: nn.Module | None = None,
        inner: type[Optimizer] | Callable[..., Optimizer] | None = None,
        *,
        adapter: str = "default",
        allow_dropout: bool = False,
        allow_tied: bool = False,
        **kwargs: Any,
    ) -> DeltaLoRAOptimizer:
        """Return the optimizer for everything in `model` that trains: its LoRA layers, and what else requires grad.

        Args:
            model: a model with LoRA layers of a library that `find_triples` knows.
            inner: an optimizer class; or a built optimizer that already holds everything that trains.
            adapter: the adapter's name.
            allow_dropout: see `find_triples`.
            allow_tied: see `find_triples`.
            **kwargs: ``update_ratio``, ``start_step`` and the options of the inner optimizer.

        Raises:
            ValueError: as `find_triples` and `DeltaLoRAOptimizer` do.
            TypeError: without a model or an inner optimizer.
        """
        usage.check_model(model, inner)
        assert model is not None
        assert inner is not None
        from deltaopt.integrations import find_triples, other_parameters

        triples = find_triples(model, adapter, allow_dropout=allow_dropout, allow_tied=allow_tied)
        return cls(inner, triples, other_parameters(model, triples), **kwargs)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One inner step on A and B, then W <- W + lambda s (A'B' - AB) once K steps have passed.

        With ``weight_update="folded"`` the inner step alone; where `update_ratio` is not that of the last step, the
        branches are scaled first.

        Args:
            closure: evaluates the model again and returns the loss; handed to the inner optimizer.

        Returns:
            What the inner optimizer's ``step`` returns.

        Raises:
            ValueError, TypeError: if a factor or W was replaced by something that cannot be used, or a callable
                `update_ratio` returns a value out of range.
            RuntimeError: if the branch was merged, rescaled or deleted, the step is being captured into a CUDA
                graph, it is called in `base_weights`, within a backward pass or by an optimizer around it that changes
                A and B too, another optimizer trains A and B within the backward pass, or a folded ratio changes and a
                W cannot be written. In each case nothing has changed.
        """
        if torch.compiler.is_compiling() and self._rule.ranks is not None:
            # torch can trace neither what is asked of process groups nor the parts of sharded tensors.
            return torch.compiler.disable(self._step)(closure)  # type: ignore[no-any-return]
        return self._step(closure)

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        with self._called_together("step()"):  # where one rank alone is refused, the others are told of it
            check_outside_backward()
            check_not_stepped_within(self._rule)
        with self._resolved("step()", waiting=False) as weights:
            roll_call = self._roll_call
            check_training(weights)
            check_no_schedule_free_around(self._inner)
            if closure is None:
                self._backward_watch.look(weights)
            if is_state_initialisation(self._inner, self._rule.ranks):
                return self._inner_step(weights, closure, [])
            roll_call.facts["update_ratio"] = self._set_ratios()  # lambda_t; 0 for t < K
            losses: list[Any] = []
            writer = self._writer("move")
            self._rule.before_step(weights, writer, closure)  # A_t, B_t
            finish = partial(self._follow, weights, writer, losses, self._step_count, roll_call)
            follow = roll_call.before(finish, succeeded=lambda: bool(losses))
            with self._events.begin("step()", follow, self._rule.unwritten, losses):
                loss = self._inner_step(weights, closure, losses)  # A_{t+1}, B_{t+1}; then `follow`: W_{t+1}
            self._backward_watch.note()
            self._rule.warn(stacklevel=4)  # torch wraps `step`
            return loss

    def _follow(
        self, weights: Sequence[WeightState], writer: Writer, losses: list[Any], t: int, roll_call: RollCall
    ) -> None:
        """Compute W_{t+1} = W_t + lambda_t s (A_{t+1} B_{t+1} - A_t B_t), and count the step.

        An inner step that raised may have changed some factors: their W follow them, and the step is not counted. Of
        sharded weights none moves if a rank has failed.
        """
        if roll_call.failed:
            self._rule.forget()
            return
        try:
            self._rule.after_step(weights, writer, whole=bool(losses))
        except FactorsDifferError:
            roll_call.failed = True
            raise
        if losses:
            self._step_count, self._repeats = t + 1, 0

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
    def ranks(self) -> Ranks | None:
        """The ranks that share sharded weights or factors, as the last event has found them; None if there are none."""
        return self._rule.ranks

    @property
    def weight_update(self) -> str:
        """The name of the update rule, "in_place" or "folded"."""
        return self._rule.name

    @property
    def step_count(self) -> int:
        """The number of calls of `step()`; t in the algorithm."""
        return self._step_count

    @property
    def skipped_updates(self) -> int:
        """The number of steps that left every W alone because a factor was NaN or infinite. Waits for the device."""
        return self._rule.skipped_updates

    @property
    def buffer_bytes(self) -> int:
        """Bytes that stay from step to step in addition to the inner optimizer's state.

        On a CPU these are r (c + d) numbers for each triple, its factors as the last move left them; on a GPU
        3 r (c + d). They are float32, or float64 where W or a factor is. A ledger has r (c + d) numbers for each closed
        term: with a constant `update_ratio` that is one, or none where the product at `start_step` was zero. With one
        that changes often it becomes a matrix as large as W in that dtype, and up to half as much again while terms
        wait. What compensated rounding keeps (2 c d bytes) and copies of the base (`keep_base`) are counted too.
        """
        return self._rule.nbytes + sum(weight.nbytes for weight in self._weights)

    @property
    def is_sharded(self) -> bool:
        """True if W, A or B was sharded at the last event, so that all ranks have to take part in the next one."""
        return self._rule.ranks is not None

    def report(self) -> Report:
        """Tell if W moved: for each layer how often, how far, what rounding kept of it, and what the next step does.

        ``print(optimizer.report())`` shows a short table, ``optimizer.report().as_dict()`` is data. It reads every W
        once and waits for the device. It may be called at any time, within `base_weights` too. With sharded factors
        call it on all ranks.

        Raises:
            RuntimeError: if another optimizer has moved a W since.
        """
        with outside_inference_mode(), self._called_together("report()") as roll_call:
            check_claims(self._weights, "report()", "read")
            self._events.complete()
            self._rule.flush()
            self._look_up_if_sharded_otherwise(roll_call)
            roll_call.meet()
            at_base = self._claimant.at_base
            return report_of(self._weights, self._step_count, self.weight_update, self.skipped_updates, at_base)

    def check_synced(self, group: Any = None) -> None:
        """Raise on all ranks if this optimizer is not the same on each of them.

        It is a collective: all ranks of `group` have to call it, at the same place. One process alone returns at once.
        It compares W, A, B, what compensated rounding keeps, the bases and the ledgers bit for bit, the settings, the
        triples with their names and order, the counts of steps, the class of the inner optimizer, and the versions of
        torch and deltaopt. It reads every W once and waits for the device. Packed tensors are left out. Of sharded
        ones the ranks that hold the same part are compared. A step does not do that, so call it where a difference has
        to be found: before the first step, and before a checkpoint is written. Not for ranks that have other triples on
        purpose (pipeline stages).

        Args:
            group: the ranks to compare. Default: all.

        Raises:
            RanksDisagreeError: with everything that differs, where, and what to do. Also if a rank does not come within
                the timeout of the default group, which it names, or fails in this call.
            RuntimeError: in `base_weights`.
            ValueError: if tensors are sharded over ranks that are not in `group`.
        """
        ranks = synced.ranks_of(group)
        if len(ranks.ranks) < 2:
            return
        facts, failed = None, None
        if self._rule.ranks is not None and not {*self._rule.ranks.ranks} <= {*ranks.ranks}:
            raise ValueError(
                f"check_synced() of the ranks {list(ranks.ranks)}, and W, A and B are sharded over the ranks "
                f"{list(self._rule.ranks.ranks)}: give it a group that holds all of these"
            )
        try:
            with self._between_steps(synced.EVENT, None):
                facts = synced.facts_of(self._run_facts(), self._groups, self._weights)
        except Exception as error:
            failed = error
        synced.check(ranks, facts, failed)

    def _run_facts(self) -> dict[str, object]:
        """Return what holds for the whole run, for `check_synced`."""
        inner = type(self._inner)
        return {
            "step count": self._step_count,
            "skipped updates": self.skipped_updates,
            "restarts and resyncs": self._repeats,
            "weight_update": self.weight_update,
            "rounding": self._rounding.mode,
            "rounding_seed": self._rounding.seed,
            "keep_base": self._keep_base,
            "the inner optimizer": f"{inner.__module__}.{inner.__qualname__}",
        }

    def displacement(self, name: str) -> LowRank:
        """Return the movement that was asked of a W since its base, as low-rank factors.

        The base is W before its first move, or at the last `rebase`. With ``weight_update="folded"`` it is the movement
        that W would have made in place; the branch holds it.

        Args:
            name: of the triple.

        Returns:
            A (c, R) and B (R, d), or (e, c, R) and (e, R, d), whose `product()` is the displacement of W's matrix. With
            a constant `update_ratio`, R is 2r, or r where the product at `start_step` was zero. It is at most
            min(c, d) where the ratio changes often.

        Raises:
            KeyError: if there is no such triple.
            RuntimeError: if it is not known any more, with the reason.
        """
        with outside_inference_mode(), self._called_together("displacement()") as roll_call:
            weight, roll_call.facts["layer"] = self._weight(name), name
            check_claims(self._weights, "displacement()", "read")
            self._events.complete()
            self._rule.flush()
            roll_call.meet()
            return weight.asked_movement()

    def residual(self, name: str, source: BaseSource | None = None) -> Tensor:
        """Return what rounding did to a W: where it is, minus where it was asked to be.

        Computed in float64 from W, the base and the displacement, at each call: for inspection, not for every step.

        Args:
            name: of the triple.
            source: pristine weights, as for `base_weights`. Default: the copy of `keep_base`; with compensated rounding
                what was cut off, if the base that follows from it has the base's fingerprint.

        Returns:
            (c, d), or (e, c, d) for experts, in float32 (float64 for a float64 W), ordered as `displacement`: zero to
            rounding for float32 and float64; within half a spacing of W's values with compensated rounding; a mean of
            zero with stochastic rounding; most of minus the displacement with rounding to nearest.

        Raises:
            KeyError: if there is no such triple.
            ValueError: if W's base is not in `source`.
            RuntimeError: if there is no base at hand, or the displacement is not known any more; in `base_weights`.
        """
        with self._called_together("residual()"):
            weight, pristine = self._weight(name), base.pristine_in(source)
        with self._between_steps("residual()", "base", layer=name, source=pristine):
            return base.residual(weight, pristine)

    @contextmanager
    def base_weights(self, source: BaseSource | None = None, method: str | None = None) -> Iterator[None]:
        """Give back the base for a while: within it every W is what it was before its first move.

        On leaving, every W has the bits it has now. It is for whatever reads W itself, and for layers whose output does
        not become the base's when their branch is off (docs/reference-models.md): those of PEFT do so by themselves,
        and other triples with `is_active`. With PEFT use it together with ``model.disable_adapter()``, which leaves
        out the branch. (A folded branch adds scaling * A @ B within it, as next to a W that moves.) The bits of W come
        from the first of these that is available:

        1. `source`: exact;
        2. the copy of `keep_base`: exact;
        3. W minus its displacement: equal to rounding for a float32 or float64 W; exact for a 16-bit W with compensated
           rounding, and used there only if the result has the base's fingerprint;
        4. hooks: another 16-bit W stays, and a hook takes displacement @ x off its layer's output. What rounding did
           to W while it moved stays in the output.

        Args:
            source: pristine weights: a state_dict, a model, a file, or a folder of .safetensors files. A tensor is
                found by its contents, whatever its name, and verified by the fingerprint of W.
            method: "copy": never hooks. "hooks": hooks for all, which copy nothing, write nothing, and cost two
                thin products for each forward pass of a layer. Default: as above.

        Raises:
            RuntimeError: if the base of a layer cannot be brought back, with all such layers in one message; if a
                branch is merged; if it is nested. Within it `step()`, saving and whatever reads or moves W through this
                optimizer raise it.
            ValueError, TypeError: for other arguments than these.
        """
        callers_mode = torch.inference_mode if torch.is_inference_mode_enabled() else nullcontext
        with self._called_together("base_weights()"):
            pristine = base.pristine_in(source, method)
        with self._resolved("base_weights()", use="base", source=pristine, method=method) as weights:
            visit = base.Visit(weights, pristine, method)

            def leave() -> None:
                visit.leave()
                self._rule.fold_again(weights)
                self._claimant.at_base = False

            with self._events.begin("base_weights()", leave, visit.unfinished):
                for weight in weights:
                    if weight.moved:
                        weight.note_write()
                self._claimant.at_base = True
                visit.enter()
                self._rule.unfold(weights)
                with callers_mode():
                    yield

    def rebase(self) -> None:
        """Take every W as it is now as its base: after it was loaded, merged or pruned by hand.

        The displacement begins at zero. The next move takes a new copy of the base, if `keep_base` asks for one.
        Adapters that are exported later are for this base, not for the pristine weights.
        """
        with self._between_steps("rebase()", None):
            others = shared_movements(self._weights)
            with self._events.begin("rebase()", self._finish_rebase):
                pass
        warn_of_shared_base(others)

    def _finish_rebase(self) -> None:
        for weight in self._weights:
            weight.rebase()
        self._hold(self._weights)

    def restart(self, reinit: Reinit | None = None, *, generator: torch.Generator | None = None) -> None:
        """Add every branch to its W and start A and B afresh, as ReLoRA does, so that the total rank can grow.

        W takes up what the branch adds, scaling * A @ B. Then A and B start as LoRA starts them, with no gradients and
        no inner state, also in optimizers that the inner one holds. The effective weight is as before, up to rounding.
        The ledgers continue, so that export and resume still count from the base.

        Args:
            reinit: a function that gets each triple and writes its A and B in place, under `torch.no_grad`. Default: A
                zero, B uniform in +- 1 / sqrt(d); in embeddings B zero, A standard normal. Their product should be
                zero, or the effective weight jumps. If it raises, A, B and W are as before.
            generator: for the default's random numbers. Default: one of its own for each triple, which depends on
                `rounding_seed`, the number of the step and the triple's name alone. So all ranks start alike, whatever
                their seeds, a resumed run starts as the uninterrupted one, and the global generator is not touched.

        Raises:
            ValueError: if a factor is NaN or infinite. Nothing is changed then.
            RuntimeError: if a branch is merged, a W cannot be written (quantized), or in `base_weights`.
        """
        with self._resolved("restart()") as weights:
            self._backward_watch.forget()
            writer = self._writer("restart")
            start = reinit if reinit is not None else lora_start(generator, writer)
            restart, repeats = restarts.Restart(weights, writer, self._rule.ranks), self._repeats

            together = RollCall(self._rule.ranks, "the new start of A and B in restart()")

            def finish() -> None:
                if together.failed:
                    restart.give_up()
                if not restart.carry_out():
                    return
                self._repeats = repeats + 1
                factors = [parameter for weight in weights for parameter in weight.tensors.parameters]
                for factor in factors:
                    factor.grad = None
                forget_state(self._inner, factors)

            with self._events.begin("restart()", together.before(finish, restart.has_start), restart.unfinished):
                restart.make_start(start, together)

    def resync(self, state_dict: dict[str, Any] | None = None) -> None:
        """Move every W to where it belongs for the present A and B, after these were changed from outside.

        Call it after `load_best_model_at_end`, an averaged adapter, or a step of an engine that this optimizer did not
        see. It computes W += coef * (A_now B_now - A B), with A and B as the last move left them. That is right for
        factors that are not older than the last change of `update_ratio`, the last `restart` and `start_step`. For
        older ones, and for any that were saved, hand in the `state_dict` of that moment: W then gets the displacement
        that it had, whatever has happened since. The inner optimizer's state and the step count stay.

        Where `update_ratio` is 0 now, W stays. A 16-bit W becomes base + displacement, rounded once, if `keep_base` has
        kept its base; otherwise it keeps the roundings of all steps, and a warning says so. With compensated rounding
        it is as good as float32.

        Without this call a change of A and B from outside is no step: W stays, and the next delta counts from there.
        With ``weight_update="folded"`` the branch holds what W would move by, and follows, so that nothing needs to be
        done, except for A and B from before `start_step` or a change of the ratio: hand in the state of that moment.

        Args:
            state_dict: of this very optimizer, saved when A and B were what they are now. Default: see above.

        Raises:
            ValueError: if a factor is NaN or infinite, if a W was written by somebody else since the last move, or for
                a state that `load_state_dict` would not take.
            WeightMismatchError: if the state is not one of this run, or A and B are not those of the state.
            RuntimeError: if a branch is merged, or in `base_weights`. In each case nothing is changed.
        """
        with self._resolved("resync()") as weights:
            resync, repeats = self._resync(weights, state_dict), self._repeats

            def finish() -> None:
                resync.carry_out()
                self._repeats = repeats + 1

            with self._events.begin("resync()", finish, resync.unfinished):
                pass
            resync.warn()

    def train(self) -> None:
        """Put the inner optimizer into its training mode, if it has modes (schedule-free); every W follows A and B.

        Such an optimizer keeps two points, and `eval` and `train` put one of them into A and B. In place, a W that has
        moved with A and B is moved by coef * (A_now B_now - A_before B_before), as by a step; before `start_step` it
        stays. With ``weight_update="folded"`` the branch does that by itself. Without modes nothing happens.

        Raises:
            RuntimeError: if a branch is merged, or in `base_weights`. Nothing is changed then.
        """
        self._set_mode("train")

    def eval(self) -> None:
        """Put the inner optimizer into its evaluation mode, if it has modes; see `train`.

        `step` then raises what the inner optimizer raises, and changes nothing.
        """
        self._set_mode("eval")

    def _set_mode(self, mode: str) -> None:
        self._backward_watch.forget()
        switch = getattr(self._inner, mode, None)
        if mode == "eval" and self._rule.watch is not None:
            self._rule.watch.look()
        if not callable(switch):
            return
        if not self._rule.moves_weights or is_in_mode(self._inner, mode):  # trainers call it before each batch
            switch()
            return
        with self._resolved(f"{mode}()") as weights:
            following = restarts.Following(weights, self._writer("resync"), self._rule.ranks)
            repeats = self._repeats

            def finish() -> None:
                following.carry_out()
                self._repeats = repeats + 1

            with self._events.begin(f"{mode}()", finish, following.unfinished):
                note_result([], switch)

    def _resync(self, weights: Sequence[WeightState], state_dict: dict[str, Any] | None) -> restarts.Resync:
        if state_dict is None:
            refuse_overwritten(weights, "resync()")
            self._set_ratios()
            return restarts.Resync(weights, self._writer("resync"), self._rule.ranks)
        roll_call = RollCall(self._rule.ranks, "resync()")
        with roll_call.told():
            record, ledgers, *_ = self._read(state_dict, weights)
            roll_call.meet({"step count": record["step_count"], "the saved ledgers": [record, ledgers]})
        branches = [triple for group in record["groups"] for triple in group["triples"]]
        restore = partial(self._rule.restore, weights, branches)
        return Recall(weights, ledgers, self._writer("resync"), self._rule.ranks, restore)

    def accounts(self) -> list[Account]:
        """Return each triple with the ledger of its W, for analysis.

        Raises:
            RuntimeError: in `base_weights`; or if a folded branch has another scaling than it was given.
        """
        return [Account(weight.triple, weight.ledger) for weight in self.weights()]

    def weights(self) -> list[WeightState]:
        """Return all that is known of each W, for export and for the integrations of other libraries.

        Raises:
            RuntimeError: as `accounts`.
        """
        with self._between_steps("reading the ledgers", "read"):
            if self._rule.scales_branches:
                with self._resolved("reading the ledgers", use="read"):
                    pass
            return list(self._weights)

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
        with suppress(RuntimeError):  # `step` tells what is wrong with the factors
            self._rule.follow(self._weights, replaced=not self._seen)  # those of a copy are new ones

    def release(self) -> None:
        """Stop dividing the gradients of A and B, so that another optimizer can train them.

        Needed with ``weight_update="folded"``, whose hooks stay while this optimizer exists, and after `start_step`;
        the branches keep their scaling. Another DeltaLoRAOptimizer claims the factors by itself. The next `zero_grad`
        or `step` of this one claims them again.
        """
        self._rule.release()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, or triples, in the middle of a run.

        Args:
            param_group: ``{"params": [...], options}`` as for any optimizer; or ``{"triples": [...], options}``
                as in the constructor, whose ``start_step`` still counts from the first step of the optimizer.

        Raises:
            ValueError, TypeError: as the constructor does. Nothing is changed then.
            RuntimeError: in `base_weights`.
        """
        with self._between_steps("add_param_group()", None):
            self._add_param_group(param_group)

    def _add_param_group(self, param_group: dict[str, Any]) -> None:
        if "triples" not in param_group:
            param_group = {**param_group, "params": as_list(param_group["params"])}
            check_no_weight_trains(self._weights, param_group["params"])
            self._inner.add_param_group(param_group)
            return
        groups, options = parse_triples([param_group], self._settings, first=len(self._weights))
        added = _registered(groups, self._keep_base, [weight.label for weight in self._weights])
        weights = [*self._weights, *added]
        check_not_folded([weight.triple for weight in added])
        for weight in added:
            weight.resolve()
        check_weights(weights, self._rule, new=added)
        check_local_sgd(self._inner, added, self._rule, self._rounding)
        check_no_weight_trains(self._weights, options[0].get("params", ()))
        self._rule.check_groups([*self._groups, *groups])
        all_groups = [*self._groups, *groups]
        held, before = list[Any](), len(self._inner.param_groups)

        def finish() -> None:
            if held or len(self._inner.param_groups) > before:
                self._groups, self._weights = all_groups, weights
                self._take(added)
                self._rule.ranks = ranks_that_share(weights, self._rule.rank_timeout, self._rule.ranks)

        warn_of_folded([weight.triple for weight in added])
        for weight in added:
            weight.register()
        self._warn_of_bases(added)
        with self._events.begin("add_param_group()", finish):
            note_result(held, partial(self._inner.add_param_group, inner_groups(groups, options, ())[0]))

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state, and under keys that begin with "deltaopt" what a resumed run needs.

        Each param group holds the settings. The ledger of each W is a string under the triple's name, with the anchors
        and with fingerprints of W, A and B. With compensated rounding the state also holds what was cut off, as large
        as the weights: see `deltaopt.without_compensation`. All of it is tensors, numbers, strings, lists and dicts, so
        it loads with ``weights_only=True``. It holds neither W nor A nor B: save the whole model with it, or the
        adapter; W can be rebuilt from the adapter and the base.

        Raises:
            RuntimeError: if a branch is merged, in `base_weights`, or if the inner optimizer's state has no place for
                these entries: it holds other param groups than the optimizer.
        """
        with self._resolved("state_dict()", use="read") as weights:
            if self._optimizer_state_dict_pre_hooks:
                roll_call = RollCall(self._rule.ranks, "the hooks of state_dict()")
                with roll_call.told():
                    for pre_hook in self._optimizer_state_dict_pre_hooks.values():
                        pre_hook(self)
                        self._look_up(roll_call)  # a hook may gather or replace parameters
                    roll_call.meet()
            state_dict = add_record(
                inner_state(self._inner),
                self._groups,
                weights,
                self._step_count,
                self._repeats,
                self.skipped_updates,
                self._rounding.seed,
                self.weight_update,
            )
            state_dict = add_ledgers(state_dict, self._inner, weights, self._compensations())
            for post_hook in self._optimizer_state_dict_post_hooks.values():
                state_dict = post_hook(self, state_dict) or state_dict
            return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Load the model's weights first: all of them, or the adapter's.

        Each W is compared with its saved fingerprints.

        - W is what it was when the state was saved: it is left alone.
        - W is what it was before its first move (only the adapter was saved): it is moved by its saved displacement,
          which gives the saved W up to rounding.
        - W is neither: it is taken from the copy of the base (`keep_base`) and moved, or the state is refused.

        Loading twice moves nothing twice.

        As with other optimizers the saved options replace the present ones, `update_ratio` and `start_step`
        among them. A callable `update_ratio` is code and not saved: where the saved run or this one has a
        callable, this one's `update_ratio` stays. So does this one's `rounding`, with the saved seed. What compensated
        rounding had cut off is taken from the state, or computed where `keep_base` has the base, or starts at zero with
        a warning. With ``weight_update="folded"`` the branches are scaled as they were in the saved run. They may have
        been registered with their first scaling or, from an adapter that was saved in that run, with the later one.

        Raises:
            WeightMismatchError: a ValueError that names the layers whose W, A or B do not belong to the state.
            ValueError: if the state is of other triples, of a plain optimizer, of the other `weight_update`, of another
                schema, or damaged.
            RuntimeError: if a branch is merged, or in `base_weights`. In each case nothing is changed.
        """
        rescaled = self._rule.scales_branches
        # An event that was interrupted is not completed here: the weights were loaded just now.
        self._backward_watch.forget()
        with self._resolved("load_state_dict()", rescaled, waiting=False, use=None) as weights:
            roll_call = RollCall(self._rule.ranks, "load_state_dict()")
            with roll_call.told():
                state_dict = state_dict.copy()
                for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                    state_dict = pre_hook(self, state_dict) or state_dict
                    self._look_up(roll_call, rescaled)  # a hook may load or replace parameters
                record, ledgers, compensations, inner_state = self._read(state_dict, weights)
                forms = resume.forms_of_compensations(weights, compensations) if record["ledgers"] else []
                contents = {"the saved ledgers": [record, ledgers], "the saved compensations": forms}
                roll_call.meet({"step count": record["step_count"], **contents})
            decided = resume.plan(weights, ledgers, compensations) if record["ledgers"] else []
            rounding = self._rounding._replace(seed=record["rounding_seed"])
            writer = rounding.during("resume", record["step_count"])
            before = [branch_record(weight.triple) for weight in weights]
            saved = [triple for group in record["groups"] for triple in group["triples"]]
            factors = [] if record["ledgers"] else resume.rescaled_factors(weights, saved)
            groups, loaded = self._inner.param_groups, list[Any]()
            uncompensated: list[str] = []
            together = RollCall(self._rule.ranks, "the inner optimizer's part of load_state_dict()")

            def finish() -> None:
                # By what has happened: hooks of the inner optimizer can raise after it has loaded.
                has_loaded = bool(loaded) or self._inner.param_groups is not groups
                has_loaded = has_loaded and not together.failed
                self._rule.restore(weights, saved if has_loaded else before)
                if not has_loaded:
                    return
                self._events.supersede()
                self._rule.forget()
                self._hold(weights)
                if not record["ledgers"]:
                    for weight, A in factors:
                        put_whole_(weight.tensors.stored[0], A)
                    for weight in weights:
                        weight.rebase()
                uncompensated[:] = resume.carry_out(decided, writer)
                self._hold([weight for weight in weights if weight.moved])  # those of a folded run too
                restore_settings(record, self._groups)
                self._rounding = rounding
                self._step_count, self._repeats = int(record["step_count"]), repeats_of(record)
                self._rule.skipped_updates = record["skipped_updates"]

            unfinished = partial(resume.unfinished, decided)
            finish = together.before(finish, succeeded=lambda: bool(loaded))
            with self._events.begin("load_state_dict()", finish, unfinished):
                self._rule.restore(weights, saved)
                note_result(loaded, partial(self._inner.load_state_dict, own_form(inner_state)))
            resume.warn(decided, uncompensated, writer)
            for post_hook in self._optimizer_load_state_dict_post_hooks.values():
                post_hook(self)

    def _read(self, state_dict: dict[str, Any], weights: Sequence[WeightState]) -> _Saved:
        """Take a state apart, with the names that its triples have now.

        Raises:
            ValueError: if it is not a state for these triples and this update rule, or damaged.
        """
        record, inner = split_record(state_dict)
        check_record(record, self._groups, weights, self.weight_update)
        check_complete(inner)
        ledgers, compensations, inner = split_ledgers(inner, record["schema"])
        names = present_names(record, weights)
        return _Saved(record, under_present_names(ledgers, names), under_present_names(compensations, names), inner)

    def __setattr__(self, name: str, value: Any) -> None:
        # Some wrappers (Lightning's, Fabric's) derive their class from ours, so that our methods run on the wrapper. It
        # reads what is ours from the optimizer that it holds, and so has to write it there.
        held = vars(self).get("_optimizer")
        if isinstance(held, DeltaLoRAOptimizer) and name.startswith("_") and name in vars(held):
            setattr(held, name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        with self._between_steps("copying and pickling", "read"):
            return {
                "inner": self._inner,
                "groups": self._groups,
                "weights": self._weights,
                "settings": self._settings,
                "keep_base": self._keep_base,
                "rounding": self._rounding,
                "rule": self._rule,
                "rank_timeout": self._rule.rank_timeout,
                "step_count": self._step_count,
                "repeats": self._repeats,
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._settings, self._keep_base = state["settings"], state["keep_base"]
        self._become(*(state[name] for name in ("inner", "groups", "weights", "rounding", "rule", "step_count")))
        self._repeats = state["repeats"]
        self._rule.rank_timeout = state["rank_timeout"]
        with suppress(RuntimeError):  # where a module is not complete yet; then `zero_grad` or `step` does it
            self._hold(self._weights)
            warn_of_folded([weight.triple for weight in self._weights])
            self._rule.attach(self._weights)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self._groups):
            lines += [
                f"Triples {i}: {len(group.triples)}, update_ratio={group.update_ratio}, start_step={group.start_step}"
            ]
        line = at_a_glance(self._weights, self._step_count, self._rule.skipped_at_a_glance())
        return "\n".join([*lines, line, f"inner: {self._inner!r}", ")"])

    def _become(
        self,
        inner: Optimizer,
        groups: list[DeltaGroup],
        weights: list[WeightState],
        rounding: Rounding,
        rule: UpdateRule,
        step_count: int,
    ) -> None:
        self._inner = inner
        self._groups = groups
        self._weights = weights
        self._rounding = rounding
        self._rule = rule
        self._events = Events()
        self._claimant = Claimant()
        self._compared: Ranks | None = None  # whose settings were the same
        self._backward_watch = BackwardWatch()
        self._seen = False  # no tensors yet: in a copy of a model that holds its optimizer, modules are not complete
        self._step_count = step_count
        self._repeats = 0  # restarts and resyncs since the last step
        super().__setstate__({})  # the hooks of torch's Optimizer; its __init__ would make groups of its own

    def _take(self, weights: Sequence[WeightState]) -> None:
        """Accept the tensors of these weights, whose checks have passed, and claim their factors."""
        for weight in weights:
            weight.accept()
            weight.forget()
        self._hold(weights)
        self._rule.attach(weights)

    def _warn_of_bases(self, weights: Sequence[WeightState]) -> None:
        if self._rule.moves_weights:
            warn_of_outputs(weights)
        moved = claims.moved_by_others([weight.triple for weight in weights])
        for weight in weights:
            weight.rebased |= weight.triple in moved
        warn_of_moved(weights)

    def _hold(self, weights: Sequence[WeightState]) -> None:
        """Claim each W for this optimizer, whoever held it before, and let its layer leave out what it counts."""
        settle = _Settlement(self._events, self._rule.settler())
        saves = next((weight.triple.saves for weight in weights if weight.triple.saves is not None), SaveWatch())
        for weight in weights:
            weight.triple.saves = weight.triple.saves or saves
            weight.triple.count_movement(RunningMovement(weight, settle, self._rule.watch))
            waits = not self._rule.moves_weights and not weight.moved
            weight.claim = Claim(weight.triple, self._claimant, waits, off_base(weight))
        claims.take([weight.claim for weight in weights if weight.claim is not None])

    def _set_ratios(self) -> list[float]:
        """Give every weight the update_ratio of this step, and return that of each group; a callable is asked once."""
        ratios = {group: group.ratio_at(self._step_count) for group in self._groups}
        for weight in self._weights:
            weight.ratio = ratios[weight.group]
        return list(ratios.values())

    def _writer(self, event: str) -> Writer:
        """Return the writer of an event, with noise of its own."""
        return self._rounding.during(event, self._step_count, 0 if event == "move" else self._repeats)

    def _inner_step(self, weights: Sequence[WeightState], closure: Closure | None, losses: list[Any]) -> float | None:
        """Let the inner optimizer step; `losses` gets what it returns, with its return."""
        with self._rule.inner_step(weights, closure) as closure:
            return note_result(losses, partial(step_inner, self._inner, closure))  # type: ignore[no-any-return]

    @contextmanager
    def _resolved(
        self, what: str, rescaled: bool = False, waiting: bool = True, use: Use | None = "write", **facts: object
    ) -> Iterator[list[WeightState]]:
        """Yield the weights with their current tensors, and let go of these at the end.

        Args:
            what: the event that is under way, for messages.
            rescaled: folded branches may have another scaling than expected: it is about to be set.
            waiting: wait until the ledgers hold every step.
            use: what it does with the weights, which another optimizer may hold by now; None if it claims them.
            **facts: arguments of the event, which have to be the same on all ranks.
        """
        with outside_inference_mode(), self._called_together(what, **facts) as roll_call:
            try:
                if use is not None:
                    self._events.complete()
                self._refuse_at_base(what)
                if waiting:
                    self._rule.flush()
                self._look_up(roll_call, rescaled)
                if use is not None:
                    check_claims(self._weights, what, use)
                self._compare_settings(what, roll_call)
                if what != "step()":  # which meets after its inner step
                    roll_call.meet()
                    if roll_call.ranks is not None:
                        look_at_written(self._weights, roll_call.ranks)
                self._roll_call = roll_call
                yield self._weights
            finally:
                for weight in self._weights:
                    weight.forget()

    def _compare_settings(self, what: str, roll_call: RollCall) -> None:
        """Raise RanksDisagreeError on all ranks if they have set sharded weights up differently; in the first event."""
        ranks = self._rule.ranks
        if ranks is not self._compared and ranks is not None:
            facts = synced.facts_of(self._run_facts(), self._groups, self._weights, False)
            with roll_call.instead():
                synced.check(ranks, facts, None, what)
        self._compared = ranks

    def _facts(self) -> dict[str, object]:
        """Return what has to be the same on all ranks in each event of sharded weights."""
        return {} if self._rule.ranks is None else {"step count": self._step_count}

    def _look_up(self, roll_call: RollCall, rescaled: bool = False) -> None:
        """Look the tensors of all weights up; run all checks again if any of them changed.

        Args:
            roll_call: gets the ranks of parameters that were sharded since the last event, before the checks.
            rescaled: see `_resolved`.
        """
        weights = self._weights
        for weight in weights:
            if weight.triple.output_hook is not None:
                weight.triple.output_hook.attend()
        replaced = [weight for weight in weights if weight.resolve()]
        if replaced:
            ranks = ranks_that_share(weights, self._rule.rank_timeout, self._rule.ranks)
            roll_call.ranks = ranks
            check_weights(weights, self._rule)
            self._rule.ranks = ranks
            check_local_sgd(self._inner, weights, self._rule, self._rounding)
        check_branches(weights, rescaled)
        check_output_hooks(weights)
        check_membership(self._inner, weights)
        check_not_capturing()
        self._rule.follow(weights, replaced=bool(replaced))
        if replaced:
            claims.follow([weight.claim for weight in replaced if weight.claim is not None])
        self._bring_what_was_left(roll_call)
        for weight in replaced:
            weight.accept()
        self._seen = True

    def _look_up_if_sharded_otherwise(self, roll_call: RollCall) -> None:
        """Find the pieces of every W again for an event that looks no tensors up, if W is sharded in another way."""
        if any(weight.is_sharded_otherwise for weight in self._weights):
            try:
                self._look_up(roll_call)
            finally:
                for weight in self._weights:
                    weight.forget()

    def _bring_what_was_left(self, roll_call: RollCall) -> None:
        """Bring what is kept next to every W that is sharded in another way now to where it is.

        Args:
            roll_call: in which an exception is told.

        Raises:
            ValueError: with the layers of which that cannot be done. The next event tries it again.
        """
        left = [weight for weight in self._weights if weight.left_behind]
        if not left:
            return
        problems = [problem for weight in left for problem in problems_of(weight.label, weight.left_behind_problems())]
        raise_problems(ValueError, "these weights are sharded in another way now", problems)
        with roll_call.instead():
            event = "the move of what is kept next to W to its new sharding"
            RollCall(self._rule.ranks, event).meet({"layers": [(weight.label, weight.left_behind) for weight in left]})
        for weight in left:
            weight.bring_what_was_left()

    def _compensations(self) -> dict[WeightState, Tensor | None]:
        """Return what a checkpoint keeps of each compensation; zeros where W has none yet and may be written.

        So the state of a fresh optimizer has a place for all that a distributed checkpoint may hold.
        """
        writer = self._writer("move")
        keeps = [self._rule.moves_weights or weight.compensation is not None for weight in self._weights]
        return {
            weight: writer.compensation(weight) if kept else writer.no_compensation(weight)
            for weight, kept in zip(self._weights, keeps, strict=True)
        }

    def _weight(self, name: str) -> WeightState:
        for weight in self._weights:
            if weight.label == name:
                return weight
        raise KeyError(f"no triple {name!r}; there are {names([weight.label for weight in self._weights])}")

    @contextmanager
    def _between_steps(self, what: str, use: Use | None, **facts: object) -> Iterator[None]:
        """Refuse `what` in `base_weights` or where another optimizer holds W; let the ledgers hold every step.

        The arguments are those of `_resolved`.
        """
        with outside_inference_mode(), self._called_together(what, **facts) as roll_call:
            self._events.complete()
            self._refuse_at_base(what)
            if use is not None:
                check_claims(self._weights, what, use)
            self._rule.flush()
            self._look_up_if_sharded_otherwise(roll_call)
            roll_call.meet()
            yield

    @contextmanager
    def _called_together(self, what: str, **facts: object) -> Iterator[RollCall]:
        """Give the roll call of an event; an exception before it is told to the other ranks."""
        roll_call = RollCall(self._rule.ranks, what, lambda: {**self._facts(), **facts})
        with roll_call.told():
            yield roll_call

    def _refuse_at_base(self, what: str) -> None:
        if self._claimant.at_base:
            raise RuntimeError(
                f"{what} within base_weights(), where no W is what this optimizer moved it to: leave it first"
            )


class _Settlement:
    """Completes what an optimizer has left open, for hooks on its layers; it does not keep the optimizer alive."""

    def __init__(self, events: Events, flush: Callable[[], None]) -> None:
        self._events = events
        self._flush = flush

    def __call__(self) -> None:
        self._events.complete()
        self._flush()


def _rule_of(weight_update: str | Callable[[], UpdateRule]) -> UpdateRule:
    """Return a new rule of this name; or the one that a callable makes.

    Raises:
        ValueError: if there is no such rule.
        TypeError: if the callable makes something else.
    """
    if not callable(weight_update) and weight_update not in tuple(RULES):
        raise ValueError(f"weight_update is one of {', '.join(RULES)}, got {weight_update!r}")
    rule = weight_update() if callable(weight_update) else RULES[weight_update]()
    if not isinstance(rule, UpdateRule):
        raise TypeError(f"weight_update made a {type(rule).__name__}, expected an UpdateRule: InPlaceUpdate, say")
    return rule


def _registered(groups: Sequence[DeltaGroup], keep_base: str | None, taken: Sequence[str]) -> list[WeightState]:
    """Return the weights of these groups, in order; the names of the triples that are there already are `taken`."""
    weights: list[WeightState] = []
    for group in groups:
        group.triples = named_apart(group.triples, [*taken, *(weight.label for weight in weights)])
        weights += [WeightState(triple, group, keep_base) for triple in group.triples]
    return weights
