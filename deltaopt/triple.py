"""LoRATriple: where W, A, B and the scaling of one LoRA branch are, and what their layer says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltaopt.base_hooks import TIED_WAY_OUT, WAYS_OUT, ModuleHook, OutputHook
from deltaopt.factors import (
    Computed,
    Factor,
    FactorSource,
    TensorSource,
    checked_factor,
    checked_source,
    looked_up,
    shown,
)
from deltaopt.layer_output import TIED
from deltaopt.layouts import MatrixView, shape
from deltaopt.movement import Movement
from deltaopt.save_watch import SaveWatch, leave
from deltaopt.scaling import BranchScaling, ScalingSource, SetScaling, holder_of
from deltaopt.stored_factors import Load, StoredFactor
from deltaopt.triple_tensors import Tensors


class _Kinds(NamedTuple):
    """Dtype and device of a scaling and of a factor: a cast or a move changes both."""

    scaling: str
    factor: str


class LoRATriple:
    """A frozen weight W and the two factors of the LoRA branch next to it.

    The branch computes ``scaling * A @ B`` next to W (with PEFT's names: A is ``lora_B``, B is
    ``lora_A``). Each of W, A and B is a tensor, or ``(module, "attribute.path")``: then it is looked
    up again at every step, which is right wherever a library may replace Parameter objects
    (device moves, sharding, loading with ``assign=True``). `find_triples` always makes the latter. A and B may also be
    computed from trained parameters, see `deltaopt.Factor`.

    Args:
        W: the frozen weight, float16, bfloat16, float32 or float64, ``requires_grad=False``,
            stored as ``layout`` says. With ``weight_update="folded"`` any tensor, a packed one too, if it is never
            written (see `DeltaLoRAOptimizer`).
        A: (c, r), trained. For ``layout="conv"`` (c, r, 1, ...) too; for stacks of experts (e, c, r),
            or (c, r * e) with the expert's index running fastest, as PEFT packs it.
        B: (r, d), trained. For ``layout="conv"`` (r, d1, *kernel) too; for stacks of experts
            (e, r, d), or (e * r, d) with the expert's index running slowest.
        scaling: what the branch multiplies A @ B by, alpha / r (or alpha / sqrt(r) in rsLoRA).
            Finite and not zero. Default 1.0. With ``weight_update="folded"`` the optimizer sets it, so say where the
            forward pass takes it from: ``(module, "attribute.path")`` of a number or a 0-d tensor, or the 0-d tensor.
        name: names the layer in messages and in checkpoints, a string that UTF-8 can hold. Default: its place in the
            list.
        layout: how W is stored: ``"linear"`` (c, d), the default; ``"transposed"`` (d, c), as in
            GPT-2's Conv1D; ``"embedding"`` (rows, width), where the branch is (A @ B) transposed;
            ``"conv"`` (c, d1, *kernel) with groups=1; ``"conv_in_order"`` the same with a square kernel k x k, where
            the branch is (A @ B).view(W.shape) with A (c * k, r) and B (r, d1 * k), as in loralib; ``"experts"``
            (e, c, d); ``"transposed_experts"`` (e, d, c).
        rows: ``(start, stop)``: the branch belongs to these rows of the (c, d) matrix alone, as the
            query part of a fused query-key-value weight.
        columns: the same for its columns.
        set_scaling: for ``weight_update="folded"`` where `scaling` is a plain number: a function that is called with
            the new scaling and sets it, for this branch alone.
        is_active: tells if the branch takes part in the forward pass that has just run: called without arguments,
            after each forward pass of W's module. Where it returns False, the movement of W is left out of the
            module's output, which is then the base's: as a reference, or next to another branch. It takes a W that is
            registered as ``(module, "name")``, whose forward pass takes x first and applies W to it as `layout` says;
            not for experts. A copy of the model asks a method of the copy, where it is a method of a module, and the
            same function in all other cases. Default: the output is that of the moved W.

    Attributes:
        scaling: s, as it was registered.
        folded: the update_ratio that is folded into the branch, which then multiplies A @ B by
            `branch_scaling` = (1 + folded) * scaling; 0.0 where W itself moves.
        layout, rows, columns: as given.
        view: the same three, with what they make of tensors (a `MatrixView`).
        W_source: what W was registered as.
        factor_sources: by letter, what A and B were registered as.
        parameter_sources: what the parameters of A, then of B, were registered as: those themselves, or the parameters
            of a `Factor`.
        parameter_names: of these, for messages.
        follows_between_steps: False as a rule: what somebody changes of A and B between two steps is no step, W stays,
            and a warning says so. True where a library does so on purpose (AdaLoRA's budget): the next move of W then
            counts from where the last one ended. May be set before the optimizer is built.
        branch: where the branch's scaling is.
        output_hook: what leaves the movement of W out where the branch takes no part; None if nothing does.

    Raises:
        ValueError: for an unknown layout, a bad ``rows`` or ``columns``, a scaling that is zero or
            not finite, a name that UTF-8 cannot hold, or an `is_active` for experts, for a convolution that is not
            derived from torch's, or for an embedding with ``max_norm``. What depends on the tensors is checked when an
            optimizer is built from the triple, for all layers at once.
        TypeError: for a source that is no tensor and no place of one, a scaling that is no number, a name that
            is no string, or an `is_active` that is no function or that the module of W is missing for.

    Example:
        >>> import torch
        >>> layer, A, B = torch.nn.Linear(6, 4, bias=False), torch.randn(4, 2), torch.zeros(2, 6)
        >>> triple = LoRATriple(layer.weight.requires_grad_(False), A.requires_grad_(), B.requires_grad_(), scaling=0.5)
        >>> triple
        LoRATriple('unnamed': W (4, 6), A (4, 2), B (2, 6), scaling=0.5)
    """

    follows_between_steps = False

    def __init__(
        self,
        W: TensorSource,
        A: FactorSource,
        B: FactorSource,
        scaling: ScalingSource = 1.0,
        name: str | None = None,
        layout: str = "linear",
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
        set_scaling: SetScaling | None = None,
        is_active: Callable[[], bool] | None = None,
    ) -> None:
        self.W_source = checked_source(W, "W")
        self.factor_sources = {letter: checked_factor(source, letter) for letter, source in (("A", A), ("B", B))}
        self.parameter_sources = [place for letter in "AB" for place in _parameters_of(self.factor_sources[letter])]
        self.parameter_names = tuple(name for letter in "AB" for name in _names(self.factor_sources[letter], letter))
        places = (self.W_source, *self.parameter_sources)
        self._owners = list({id(place[0]): place[0] for place in places if isinstance(place, tuple)}.values())
        self._written: dict[str, Tensor] = {}  # while a restart writes computed factors
        self.name = None if name is None else _checked_name(name)
        self.branch = BranchScaling(_registered_buffer(scaling, self._owners), set_scaling, self.label)
        self.scaling = self.branch.first
        self.view = MatrixView.checked(layout, rows, columns, self.label)
        self.layout, self.rows, self.columns = self.view
        self._registered_kinds = self._kinds()
        self.tied = False  # True where `find_triples` found other users of W, see `tie`
        self.saves: SaveWatch | None = None  # of the model, or of the optimizer
        self.output_hook: OutputHook | None = None
        if is_active is not None:
            self.output_hook = ModuleHook.on(self.W_source, is_active, self.factor_sources["A"], self.view, self.label)

    @property
    def label(self) -> str:
        """The name, for messages."""
        return self.name if self.name is not None else "unnamed"

    @property
    def W(self) -> Tensor:
        """The frozen weight as it is stored now."""
        return looked_up(self.W_source, self.label)

    @property
    def A(self) -> Tensor:
        """The left factor as it is stored now, or as it is computed from what is."""
        return self._factor("A")

    @property
    def B(self) -> Tensor:
        """The right factor as it is stored now, or as it is computed from what is."""
        return self._factor("B")

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that A and B are made of as they are stored now, each once: A and B themselves, as a rule."""
        return tuple(dict.fromkeys(self.stored))

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that A is made of as they are stored now, then those of B, in the order of `parameter_names`."""
        return tuple(looked_up(place, self.label) for place in self.parameter_sources)

    @property
    def is_looked_up(self) -> bool:
        """True if all parameters of A and B were registered by their places."""
        return not any(isinstance(place, Tensor) for place in self.parameter_sources)

    def tensors(self) -> Tensors:
        """Look up W, and A and B or their parameters, as they are stored now."""
        label = self.label
        left, right = self.factor_sources.values()
        return Tensors(looked_up(self.W_source, label), _read(left, label), _read(right, label))

    @contextmanager
    def written(self) -> Iterator[None]:
        """Let A and B be written in place within it: what is written into a computed one is assigned at its end.

        Raises:
            ValueError: if it is not known how the parameters of a computed factor have to be written.
        """
        tensors = self.tensors()
        computed = {
            letter: factor
            for letter, factor in (("A", tensors.left), ("B", tensors.right))
            if isinstance(factor, Computed) and not factor.factor.is_view
        }
        before = {letter: factor.value().clone() for letter, factor in computed.items()}
        self._written = {letter: value.clone() for letter, value in before.items()}
        try:
            yield
            written = self._written
        finally:
            self._written = {}
        for letter, factor in computed.items():
            if torch.equal(written[letter], before[letter]):
                continue  # nobody has, or the parameters themselves were written
            if factor.factor.assign is None:
                raise ValueError(
                    f"{self.label}: its {letter} is computed from {', '.join(map(shown, factor.factor.sources))}, and "
                    "how these have to be written for a new start is not known (nothing was changed): give the Factor "
                    "a function assign=, or hand over a function `reinit` that writes the parameters themselves"
                )
            factor.factor.assign(written[letter], *factor.parameters)

    def named(self, name: str) -> LoRATriple:
        """Return the same triple with a name; this one keeps none."""
        twin = copy(self)
        twin.name = _checked_name(name)
        return twin

    @property
    def longer_name(self) -> str | None:
        """The name that tells it from a triple of another adapter of the same layer; None if there are no others."""
        return None

    def weight_module(self) -> nn.Module | None:
        """Return the module whose attribute W is; None for a triple made of tensors."""
        if isinstance(self.W_source, Tensor):
            return None
        holder, _ = holder_of(*self.W_source)
        return holder  # type: ignore[no-any-return]

    def took_from_base(self, tensors: Tensors) -> bool:
        """Tell if A and B are a start whose product was taken out of W (PiSSA, OLoRA): W is not the pristine weight."""
        return False

    def has_moved(self) -> bool:
        """Tell if an earlier optimizer is known to have moved W."""
        hook = self.output_hook
        return hook is not None and hook.movement is not None and hook.movement.moved()

    def weight_moves(self) -> None:
        """Note that W is about to move for the first time, or that a state was loaded in which it has moved.

        A library's save of the factors alone warns from now on, where A is registered as an attribute of a module.
        """
        place = self._place_of_A()
        if place is not None:
            self._watch_saves(*place)

    def weight_rests(self) -> None:
        """Note that W as it is now is the base."""
        place = self._place_of_A()
        if place is not None:
            leave(*place)

    def _watch_saves(self, module: nn.Module, branch: str) -> SaveWatch:
        self.saves = (self.saves or SaveWatch()).watch(module, branch)
        return self.saves

    def count_movement(self, movement: Movement) -> None:
        """Leave this movement of W out of the layer's output from now on, where the branch takes no part in it."""
        if self.output_hook is not None:
            self.output_hook.movement = movement

    def tie(self) -> None:
        """Note that W is used in another place too."""
        self.tied = True
        if self.output_hook is not None:
            self.output_hook.tied = True

    def output_problem(self, base_kept: bool) -> str | None:
        """Say why the output cannot be corrected where the branch takes no part, and what to do about it.

        None if it can be corrected, or if nobody asked.

        Args:
            base_kept: a copy of the base is kept.
        """
        hook = self.output_hook
        if hook is None or (base_kept and not hook.tied):
            return None
        if hook.tied:
            return f"{TIED}: {TIED_WAY_OUT}"
        return None if hook.problem is None else f"{hook.problem}: {WAYS_OUT}"

    @property
    def folded(self) -> float:
        """The update_ratio that is folded into the branch; of this triple and of its twins with another name."""
        return self.branch.folded

    @folded.setter
    def folded(self, ratio: float) -> None:
        self.branch.folded = ratio

    @property
    def branch_scaling(self) -> float:
        """The factor by which the branch has to multiply A @ B now."""
        return self.scaling * (1.0 + self.folded)

    def set_branch_scaling(self, value: float) -> None:
        """Let the branch multiply A @ B by `value`, and a state_dict say of A what is right without that."""
        self._set_branch(value)
        if (hook := self._stored_hook()) is not None:
            hook.note(value * self.branch.in_hook)

    def _set_branch(self, value: float) -> None:
        self.branch.set(value)

    def store_for_first_scaling(self) -> None:
        """Let a state_dict give A for the scaling that the branch has had before any optimizer scaled it.

        Nothing is done where the scaling is in the state_dict too, or A is no parameter of a known module.
        """
        place = self._place_of_A()
        if place is None or self.branch.is_stored():
            return
        hook = StoredFactor.on(*place)
        if hook is None:
            hook = StoredFactor(place[1], self.branch_scaling, self.label)
            hook.put_on(place[0], *self._scaling_of_copies())
        self.branch.in_hook = hook.begin(self.branch_scaling)

    def _scaling_of_copies(self) -> tuple[nn.Module | None, Callable[[nn.Module, float], object] | None]:
        """Return the module that has the scaling, and what multiplies it in that module or in a copy."""
        return self.branch.module(), self.branch.rescale_in_copies()

    @property
    def stores_A(self) -> bool:
        """True if a state_dict gives A for the first scaling, see `store_for_first_scaling`."""
        return self._stored_hook() is not None

    @property
    def stored_factor(self) -> float:
        """The factor of A in a state_dict: the present scaling by the first one."""
        return self.stored_factor_at(self.branch_scaling)

    def stored_factor_at(self, scaling: float) -> float:
        """Return what `stored_factor` would be if the branch had this scaling."""
        hook = self._stored_hook()
        return 1.0 if hook is None else hook.factor_at(scaling * self.branch.in_hook)

    @property
    def load(self) -> Load | None:
        """The last load of A, if its value was given when the branch had another scaling; else None."""
        hook = self._stored_hook()
        return None if hook is None else hook.load

    def forget_load(self) -> None:
        """Forget how A was loaded: W belongs to it."""
        hook = self._stored_hook()
        if hook is not None:
            hook.load = None

    def _stored_hook(self) -> StoredFactor | None:
        place = self._place_of_A()
        return None if place is None else StoredFactor.on(*place)

    def _place_of_A(self) -> tuple[nn.Module, str] | None:
        """Return the module that has A as a parameter, and its name there; None if it is not known.

        Of a computed A it is the place of its first parameter.
        """
        source = self.parameter_sources[0]
        if isinstance(source, tuple):
            with suppress(AttributeError):  # the adapter was deleted
                module, name = holder_of(*source)
                return (module, name) if isinstance(module, nn.Module) and name in module._parameters else None
            return None
        for module in (inner for owner in self._known_modules() for inner in owner.modules()):
            for name, parameter in module._parameters.items():
                if parameter is source:
                    return module, name
        return None

    def _known_modules(self) -> Iterator[nn.Module]:
        """Yield the modules that tensors or the scaling were registered with."""
        yield from self._owners
        if (owner := self.branch.module()) is not None:
            yield owner

    def start(self, generator: torch.Generator) -> bool:
        """Write the start of a library's own into A and B; return False if LoRA's is meant."""
        return False

    def missing_problems(self) -> list[str]:
        """Say if the layer multiplies by a parameter that is not registered: AdaLoRA's singular values."""
        for owner in self._owners:
            E = getattr(owner, "lora_E", None)
            if not isinstance(E, nn.ParameterDict) or not len(E):
                continue
            if not any(value is parameter for value in E.values() for parameter in self.stored):
                name = next(iter(E))
                return [
                    f"its branch multiplies by lora_E too (a {type(owner).__name__} of AdaLoRA), which is no part of A "
                    f"or B: take find_triples(model), or B=Factor(torch.mul, (layer, 'lora_E.{name}'), "
                    f"(layer, 'lora_A.{name}')) and what the layer divides by in scaling"
                ]
        return []

    def branch_problems(self) -> list[str]:
        """Say what is wrong now with the layer that holds the branch; asked at every step."""
        return self.merge_problems() or self.scaling_problems()

    def merge_problems(self) -> list[str]:
        """Say if the branch is in W already: layers of PEFT, loralib, torchtune and litgpt tell by `merged`."""
        if any(getattr(owner, "merged", False) for owner in self._owners):
            return [
                "the branch is merged into W, so that what trains is not what W holds: unmerge it first "
                "(PEFT: unmerge_adapter(); loralib: train()). PEFT's merge_and_unload() leaves no adapter to train: to "
                "go on, load the base and the adapter of a checkpoint, build the optimizer, and load its state"
            ]
        return []

    def scaling_problems(self) -> list[str]:
        """Say if the branch multiplies by another number than `branch_scaling`, as far as that can be seen."""
        try:
            now = self.branch.differs_from(self.branch_scaling)
        except AttributeError as error:
            return [f"its scaling is not where it was registered: {error}"]
        if now is None:
            return []
        return [
            f"its scaling was {self.branch_scaling:g} when it was registered or last set and is {now:g} now: put it "
            "back, or build the triple and the optimizer again"
        ]

    def folding_problems(self) -> list[str]:
        """Say why update_ratio cannot be folded into this branch; see `deltaopt.folded`."""
        problem = self.branch.problem()
        if problem is not None:
            return [problem]
        source = self.factor_sources["A"]
        if isinstance(source, Factor) and not source.is_view:
            return [
                f"its A is computed from {', '.join(map(shown, source.sources))}, so that no parameter could stand for "
                'it in a state_dict, which has to hold (1 + update_ratio) * A: use weight_update="in_place"'
            ]
        before, now = self._registered_kinds, self._kinds()
        if before is None or now is None or before.factor == now.factor or before.scaling != now.scaling:
            return []
        return [
            f"its scaling was registered as a tensor, and stayed {now.scaling} when A became {now.factor} from "
            f'{before.factor}: a buffer is replaced then. Register (module, "name") of it, or build the triple and the '
            "optimizer after the conversion"
        ]

    def __repr__(self) -> str:
        W, A, B = self.W, self.A, self.B
        return (
            f"{type(self).__name__}({self.label!r}: W {shape(W)}, A {shape(A)}, B {shape(B)}, scaling={self.scaling:g})"
        )

    def _factor(self, letter: str) -> Tensor:
        source = self.factor_sources[letter]
        if not isinstance(source, Factor):
            return looked_up(source, self.label)
        if letter in self._written:
            return self._written[letter]
        value: Tensor = source.compute(*(looked_up(place, self.label) for place in source.sources))
        return value

    def _kinds(self) -> _Kinds | None:
        """Return the kinds of a scaling that was registered as a tensor, and of A."""
        scaling = self.branch.tensor()
        with suppress(RuntimeError):  # where A is missing, the checks of the optimizer say so
            return None if scaling is None else _Kinds(_kind(scaling), _kind(self.parameters[0]))
        return None


def named_apart(triples: Iterable[LoRATriple], taken: Iterable[str]) -> list[LoRATriple]:
    """Give a triple whose name is taken its longer one; the others keep theirs, which are in saved states.

    Args:
        triples: to be registered.
        taken: names of triples that were registered before.
    """
    names, found = set(taken), []
    for triple in triples:
        if triple.label in names and triple.longer_name is not None:
            triple = triple.named(triple.longer_name)
        names.add(triple.label)
        found.append(triple)
    return found


def _registered_buffer(scaling: ScalingSource, modules: Iterable[nn.Module]) -> ScalingSource:
    """Return the place of a tensor that is a buffer of one of these modules: `Module.to` replaces buffers."""
    if isinstance(scaling, Tensor):
        for module in modules:
            for name, buffer in module.named_buffers():
                if buffer is scaling:
                    return module, name
    return scaling


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} on {tensor.device}"


def _checked_name(name: object) -> str:
    """Return a name as a plain str: it becomes a key in checkpoints, which take no subclass such as numpy's."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a triple is a str, got {name!r}")
    name = str.__str__(name)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name {name!r} cannot be written in UTF-8: {error.reason}. Give another name") from error
    return name


def _parameters_of(source: FactorSource) -> tuple[TensorSource, ...]:
    return source.sources if isinstance(source, Factor) else (source,)


def _names(source: FactorSource, letter: str) -> Iterator[str]:
    """Yield what messages call the parameters of a factor: its letter, or their paths where it is computed."""
    if not isinstance(source, Factor):
        yield letter
        return
    for number, place in enumerate(source.sources):
        yield f"parameter {number} of {letter}" if isinstance(place, Tensor) else f"{place[1]} (of {letter})"


def _read(source: FactorSource, label: str) -> Tensor | Computed:
    if isinstance(source, Factor):
        return Computed(source, tuple(looked_up(place, label) for place in source.sources))
    return looked_up(source, label)
