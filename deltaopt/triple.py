"""LoRATriple: which W moves with which factors A and B, and what is wrong with a triple or a set of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import copy
from functools import reduce
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from deltaopt.distributed import is_sharded, local_part
from deltaopt.layouts import LAYOUTS
from deltaopt.scaling import BranchScaling, ScalingSource, SetScaling, holder_of
from deltaopt.tensors import FLOATS, WAY_OUT, is_plain, memory_overlaps, offload_problems, tensor_problems

TensorSource: TypeAlias = "Tensor | tuple[nn.Module, str]"
"""A tensor, or a module and the dotted name of an attribute that is looked up at every step."""


class Stored(NamedTuple):
    """The tensors of a triple as they are stored at one moment."""

    W: Tensor
    A: Tensor
    B: Tensor

    def signature(self) -> tuple[object, ...]:
        """Another one when a tensor was replaced, moved or unfrozen."""
        return tuple((id(t), t.data_ptr() if is_plain(t) else None, t.shape, t.dtype, t.requires_grad) for t in self)

    def compute_dtype(self) -> torch.dtype:
        """What products of the factors are computed in: float32, or float64 where one of the tensors is."""
        return reduce(torch.promote_types, (t.dtype for t in self if t.dtype in FLOATS), torch.float32)


class _Kinds(NamedTuple):
    """Dtype and device of a scaling and of a factor: a cast or a move changes both."""

    scaling: str
    factor: str


class LoRATriple:
    """A frozen weight W and the two factors of the LoRA branch beside it.

    The branch computes ``scaling * A @ B`` next to W (with PEFT's names: A is ``lora_B``, B is
    ``lora_A``). Each of W, A and B is a tensor, or ``(module, "attribute.path")``: then it is looked
    up again at every step, which is right wherever a library may replace Parameter objects
    (device moves, sharding, loading with ``assign=True``). `find_triples` always makes the latter.

    Args:
        W: the frozen weight, float16, bfloat16, float32 or float64, ``requires_grad=False``,
            stored as ``layout`` says. With ``weight_update="folded"`` any tensor, a packed one too, if it is never
            written (see `DeltaLoRAOptimizer`).
        A: (c, r), trained. For ``layout="conv"`` (c, r, 1, ..) too; for stacks of experts (e, c, r),
            or (c, r * e) with the expert's index running fastest, as PEFT packs it.
        B: (r, d), trained. For ``layout="conv"`` (r, d1, *kernel) too; for stacks of experts
            (e, r, d), or (e * r, d) with the expert's index running slowest.
        scaling: what the branch multiplies A @ B by, alpha / r (or alpha / sqrt(r) in rsLoRA).
            Finite and not zero. Default 1.0. With ``weight_update="folded"`` it has to be set, so say where the forward
            pass takes it from: ``(module, "attribute.path")`` of a number or a 0-d tensor, or the 0-d tensor itself.
        name: names the layer in messages and in checkpoints. Default: its place in the list.
        layout: how W is stored: ``"linear"`` (c, d), the default; ``"transposed"`` (d, c), as in
            GPT-2's Conv1D; ``"embedding"`` (rows, width), where the branch is (A @ B) transposed;
            ``"conv"`` (c, d1, *kernel) with groups=1; ``"experts"`` (e, c, d);
            ``"transposed_experts"`` (e, d, c).
        rows: ``(start, stop)``: the branch belongs to these rows of the (c, d) matrix alone, as the
            query part of a fused query-key-value weight.
        columns: the same for its columns.
        set_scaling: for ``weight_update="folded"`` where `scaling` is a plain number: called with what the branch has
            to multiply A @ B by from then on. It sets the scaling of this branch alone.

    Attributes:
        scaling: s, as it was registered.
        folded: the update_ratio that is folded into the branch, which then multiplies A @ B by
            `branch_scaling` = (1 + folded) * scaling; 0.0 where W itself moves.

    Raises:
        ValueError: for an unknown layout, a bad ``rows`` or ``columns``, or a scaling that is zero or
            not finite. What depends on the tensors is checked when an optimizer is built from the
            triple (all layers at once), see `problems`.

    Example:
        >>> import torch
        >>> layer, A, B = torch.nn.Linear(6, 4, bias=False), torch.randn(4, 2), torch.zeros(2, 6)
        >>> triple = LoRATriple(layer.weight.requires_grad_(False), A.requires_grad_(), B.requires_grad_(), scaling=0.5)
        >>> triple
        LoRATriple('unnamed': W (4, 6), A (4, 2), B (2, 6), scaling=0.5)
    """

    def __init__(
        self,
        W: TensorSource,
        A: TensorSource,
        B: TensorSource,
        scaling: ScalingSource = 1.0,
        name: str | None = None,
        layout: str = "linear",
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
        set_scaling: SetScaling | None = None,
    ) -> None:
        self._W, self._A, self._B = (_checked_source(s, letter) for s, letter in ((W, "W"), (A, "A"), (B, "B")))
        self._owners = list({id(s[0]): s[0] for s in (W, A, B) if isinstance(s, tuple)}.values())
        self.name = name
        self._branch = BranchScaling(_registered_buffer(scaling, self._owners), set_scaling, self.label)
        self.scaling = self._branch.first
        if layout not in LAYOUTS:
            raise ValueError(f"{self.label}: layout is one of {', '.join(LAYOUTS)}, got {layout!r}")
        self.layout = layout
        self.rows = _checked_slice(rows, f"{self.label}: rows")
        self.columns = _checked_slice(columns, f"{self.label}: columns")
        self._registered_kinds = self._kinds()
        self.tied = False  # whether W is known to have other users, which `find_triples` finds

    @property
    def label(self) -> str:
        """The name, for messages."""
        return self.name if self.name is not None else "unnamed"

    @property
    def W(self) -> Tensor:
        """The frozen weight as it is stored now."""
        return self._resolve(self._W)

    @property
    def A(self) -> Tensor:
        """The left factor as it is stored now."""
        return self._resolve(self._A)

    @property
    def B(self) -> Tensor:
        """The right factor as it is stored now."""
        return self._resolve(self._B)

    def named(self, name: str) -> LoRATriple:
        """The same triple with a name; this one keeps none."""
        twin = copy(self)
        twin.name = name
        return twin

    def stored(self) -> Stored:
        """W, A and B as they are stored now."""
        return Stored(self.W, self.A, self.B)

    def _resolve(self, source: TensorSource) -> Tensor:
        if isinstance(source, Tensor):
            return source
        module, path = source
        try:
            return attrgetter(path)(module)  # type: ignore[no-any-return]
        except AttributeError as error:
            raise RuntimeError(
                f"{self.label}: {path} is not in its {type(module).__name__} ({error}): it is misspelt, or the adapter "
                "was deleted or renamed, or the layer replaced. Register what is there now"
            ) from error

    def factor_source(self, letter: str) -> TensorSource:
        """What the factor A or B was registered as."""
        return self._A if letter == "A" else self._B

    def weight_module(self) -> nn.Module | None:
        """The module whose attribute W is; None for a triple made of tensors."""
        if isinstance(self._W, Tensor):
            return None
        holder, _ = holder_of(*self._W)
        return holder  # type: ignore[no-any-return]

    def took_from_base(self) -> bool:
        """Whether the start of A and B was taken out of W (PiSSA, OLoRA), so that W was not the pristine weight."""
        return False

    def has_moved(self) -> bool:
        """Whether W is known to have moved already, under another optimizer."""
        return False

    def weight_moves(self) -> None:
        """Told before the first move of W, and when a state is loaded in which it has moved."""

    def weight_rests(self) -> None:
        """Told when W as it is now is the base."""

    @property
    def folded(self) -> float:
        """The update_ratio that is folded into the branch; of this triple and of its twins with another name."""
        return self._branch.folded

    @folded.setter
    def folded(self, ratio: float) -> None:
        self._branch.folded = ratio

    @property
    def branch_scaling(self) -> float:
        """What the branch has to multiply A @ B by now."""
        return self.scaling * (1.0 + self.folded)

    def set_branch_scaling(self, value: float) -> None:
        """Let the branch multiply A @ B by `value`."""
        self._branch.set(value)

    def keep_branch_scaling(self) -> None:
        """Told after `set_branch_scaling` where it is meant to last."""

    def scaling_problems(self) -> list[str]:
        """Whether the branch multiplies by another number than `branch_scaling`, as far as that can be seen."""
        try:
            now = self._branch.differs_from(self.branch_scaling)
        except AttributeError as error:
            return [f"its scaling is not where it was registered: {error}"]
        if now is None:
            return []
        return [
            f"its scaling was {self.branch_scaling:g} when it was registered or last set and is {now:g} now: put it "
            "back, or build the triple and the optimizer again"
        ]

    @property
    def scaling_place(self) -> object:
        """Equal for triples whose branches take their scaling from one place."""
        place = self._branch.place()
        return id(self._branch) if place is None else place

    def folding_problems(self) -> list[str]:
        """Why update_ratio can not be folded into this branch; see `deltaopt.folding`."""
        problem = self._branch.problem()
        if problem is not None:
            return [problem]
        before, now = self._registered_kinds, self._kinds()
        if before is None or now is None or before.factor == now.factor or before.scaling != now.scaling:
            return []
        return [
            f"its scaling was registered as a tensor, and stayed {now.scaling} when A became {now.factor} from "
            f'{before.factor}: a buffer is replaced then. Register (module, "name") of it, or build the triple and the '
            "optimizer after the conversion"
        ]

    def _kinds(self) -> _Kinds | None:
        """Of a scaling that was registered as a tensor, and of A beside it."""
        scaling = self._branch.tensor()
        with suppress(RuntimeError):  # of an A that is not there `problems` tells
            return None if scaling is None else _Kinds(_kind(scaling), _kind(self.A))
        return None

    def precision_problems(self, scaling: float) -> list[str]:
        """Whether the branch's scaling can not be set to this number in the precision that it computes with."""
        rounded = self._branch.rounded(scaling)
        if abs(rounded - scaling) <= torch.finfo(self.stored().compute_dtype()).eps * abs(scaling):
            return []
        return [
            f"its scaling is a tensor in which (1 + update_ratio) * scaling = {scaling:g} is rounded to {rounded:g}: "
            "keep it in the dtype of the computation"
        ]

    def weight_matrix(self, W: Tensor) -> Tensor:
        """W, or the part of it that moves, as a (c, d) or (e, c, d) view of its storage."""
        matrix = LAYOUTS[self.layout].weight(W)
        if self.rows is not None:
            matrix = matrix.narrow(-2, self.rows[0], self.rows[1] - self.rows[0])
        if self.columns is not None:
            matrix = matrix.narrow(-1, self.columns[0], self.columns[1] - self.columns[0])
        return matrix

    def factor_matrices(self, stored: Stored) -> tuple[Tensor, Tensor]:
        """A as (c, r) and B as (r, d), with a leading e for experts. To be read, not written."""
        layout = LAYOUTS[self.layout]
        return layout.left(stored.A, stored.W), layout.right(stored.B, stored.W)

    def columns_of(self, W: Tensor, V: Tensor) -> Tensor:
        """V (r, d) with its columns in the order of `weight_matrix`: another one for convolutions in channels_last."""
        return LAYOUTS[self.layout].columns(V, W)

    def moved_part(self, W: Tensor) -> Tensor:
        """W, or the part of it that moves, in an order that does not depend on strides where it is all of W."""
        return W if self.rows is None and self.columns is None else self.weight_matrix(W)

    def part_matrix(self, part: Tensor) -> Tensor:
        """A tensor like `moved_part` as the (c, d) or (e, c, d) matrix that `weight_matrix` is."""
        return LAYOUTS[self.layout].weight(part) if self.rows is None and self.columns is None else part

    def branch_problems(self) -> list[str]:
        """What is wrong now with the layer that holds the branch; looked at every step."""
        return self.merge_problems() or self.scaling_problems()

    def merge_problems(self) -> list[str]:
        """Whether the branch is in W already: layers of PEFT, loralib, torchtune and litgpt say so in `merged`."""
        if any(getattr(owner, "merged", False) for owner in self._owners):
            return [
                "the branch is merged into W, so that what trains is not what W holds: unmerge it first "
                "(PEFT: unmerge_adapter(); loralib: train())"
            ]
        return []

    def weight_problems(self) -> list[str]:
        """Why W can not be read as a matrix and written in place; empty if it can."""
        W = self.W
        found = tensor_problems("W", W)
        module = self.weight_module()
        if module is not None:
            found += offload_problems(module)
            if self.W is not W:
                found.append(
                    "W is computed anew each time it is read (a parametrization such as weight_norm), so an in-place "
                    "update would be lost: register the tensor it is made from, or remove the parametrization"
                )
        return found

    def problems(self, folded: bool = False) -> list[str]:
        """What is wrong with the tensors of this triple, as sentences; empty when nothing is.

        Args:
            folded: W need not be written, but the branch's scaling.
        """
        W, A, B = stored = self.stored()
        unwritable = self.weight_problems()
        found = self.folding_problems() if folded else [*unwritable]
        if not folded and (not is_plain(W) or W.dtype not in FLOATS):
            found[0] += f". {WAY_OUT}"
        for letter, factor in (("A", A), ("B", B)):
            if folded and is_sharded(factor):
                found += self._sharded_problems(letter)
            else:
                found += tensor_problems(letter, factor)
            if not factor.requires_grad:
                found.append(
                    f"{letter} does not require grad, so no optimizer can train it: call "
                    f"{letter}.requires_grad_(True), or activate the adapter it belongs to"
                )
            if factor.device != W.device and not unwritable:
                found.append(f"{letter} is on {factor.device} and W on {W.device}: move them to one device")
        if W.requires_grad:
            found.append(
                "W requires grad: Delta-LoRA moves a frozen W. Call W.requires_grad_(False), or train "
                "W itself and drop this triple"
            )
        return found or self._shape_problems(stored, readable=not unwritable) or self.branch_problems()

    def _sharded_problems(self, letter: str) -> list[str]:
        if not isinstance(self.factor_source(letter), Tensor):
            return []
        return [
            f"{letter} is sharded and was registered as a tensor, so that what FSDP2 puts in its place in the forward "
            f"pass is not known: register (module, {letter!r}), or use find_triples"
        ]

    def _shape_problems(self, stored: Stored, readable: bool) -> list[str]:
        W, A, B = stored
        if not readable:
            A, B = self.factor_matrices(stored)
            fits = A.dim() == B.dim() >= 2 and A.shape[-1] == B.shape[-2]
            return [] if fits else [f"A {_shape(A)} and B {_shape(B)} have no product: expected (c, r) and (r, d)"]
        layout = LAYOUTS[self.layout]
        if W.dim() not in layout.ndim:
            return [
                f"layout {self.layout!r} expects W stored as {layout.stored}, got {_shape(W)}. If W is a shard of "
                "a flattened parameter (FSDP1, DeepSpeed ZeRO-3), this optimizer can not move it"
            ]
        try:
            matrix = self.weight_matrix(W)
        except RuntimeError as error:
            return [f"no matrix view of W {_shape(W)} with strides {W.stride()}: {error}"]
        if self._fits(matrix, stored):
            return []
        if self._fits(matrix, Stored(W, A=B, B=A)):
            return [
                f"A {_shape(A)} and B {_shape(B)} are swapped: W is {_shape(matrix)} = (c, d), so A is "
                "(c, r) and B is (r, d). PEFT's lora_B is A here, and its lora_A is B"
            ]
        c, d = matrix.shape[-2:]
        return [
            f"A {_shape(A)} and B {_shape(B)} do not fit W {_shape(W)} (layout {self.layout!r}, matrix "
            f"{_shape(matrix)}): expected A of shape ({c}, r) and B of shape (r, {d})"
        ]

    def _fits(self, matrix: Tensor, stored: Stored) -> bool:
        try:
            A, B = self.factor_matrices(stored)
        except (RuntimeError, ValueError, IndexError):
            return False
        *lead, c, d = matrix.shape
        r = A.shape[-1] if A.dim() else 0
        return r > 0 and list(A.shape) == [*lead, c, r] and list(B.shape) == [*lead, r, d]

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of this triple to know it again: plain numbers and strings."""
        A, B = self.factor_matrices(self.stored())
        return {
            "name": self.label,
            "A": list(A.shape),
            "B": list(B.shape),
            "scaling": self.scaling,
            "folded": self.folded,
        }

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.label!r}: W {_shape(self.W)}, A {_shape(self.A)}, "
            f"B {_shape(self.B)}, scaling={self.scaling:g})"
        )


def check_triples(triples: Sequence[LoRATriple], folded: bool = False) -> None:
    """Refuse what can not be moved, all bad layers in one error.

    Args:
        triples: all of an optimizer.
        folded: for ``weight_update="folded"``.

    Raises:
        ValueError: one line for each thing that is wrong, with the layer's name, what was
            expected, what came and what to do.
    """
    found = [f"{t.label}: {problem}" for t in triples for problem in t.problems(folded)]
    if not found:
        found = [*_name_problems(triples), *_sharing_problems(triples)]
    if found:
        raise ValueError("these triples can not be used:\n  " + "\n  ".join(found))


def _registered_buffer(scaling: ScalingSource, modules: Iterable[nn.Module]) -> ScalingSource:
    """A tensor that is a buffer of one of these modules, by its name: `Module.to` replaces buffers."""
    if isinstance(scaling, Tensor):
        for module in modules:
            for name, buffer in module.named_buffers():
                if buffer is scaling:
                    return module, name
    return scaling


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} on {tensor.device}"


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _checked_source(source: object, letter: str) -> TensorSource:
    if isinstance(source, Tensor):
        return source
    if isinstance(source, tuple) and len(source) == 2:
        module, path = source
        if isinstance(module, nn.Module) and isinstance(path, str):
            return module, path
    raise TypeError(f"{letter} is a tensor or (module, 'attribute.path'), got {type(source).__name__}")


def _checked_slice(bounds: object, what: str) -> tuple[int, int] | None:
    if bounds is None:
        return None
    if (
        isinstance(bounds, tuple)
        and len(bounds) == 2
        and all(isinstance(bound, int) for bound in bounds)
        and 0 <= bounds[0] < bounds[1]
    ):
        return bounds
    raise ValueError(f"{what} is (start, stop) with 0 <= start < stop, got {bounds!r}")


def _name_problems(triples: Iterable[LoRATriple]) -> list[str]:
    seen: set[str] = set()
    found = []
    for triple in triples:
        if triple.label in seen:
            found.append(f"{triple.label}: two triples have this name; give each its own")
        seen.add(triple.label)
    return found


def _sharing_problems(triples: Sequence[LoRATriple]) -> list[str]:
    """W that two triples would move, and factors that the inner optimizer would step twice."""
    found = []
    by_storage: dict[int, list[tuple[str, str, Tensor]]] = {}
    for triple in triples:
        tensors = [("A", triple.A), ("B", triple.B)]
        if not triple.weight_problems():
            tensors.insert(0, ("W", triple.weight_matrix(triple.W)))
        for letter, shared in tensors:
            tensor = local_part(shared)
            neighbours = by_storage.setdefault(tensor.untyped_storage().data_ptr(), [])
            for other_label, other_letter, other in neighbours:
                shared_factor = letter != "W" and other is shared
                if not shared_factor and memory_overlaps(tensor, local_part(other)):
                    found.append(_sharing_sentence(triple.label, letter, other_label, other_letter))
            neighbours.append((triple.label, letter, shared))
    return found


def _sharing_sentence(label: str, letter: str, other_label: str, other_letter: str) -> str:
    if letter == other_letter == "W":
        return (
            f"{label}: its W shares memory with the W of {other_label} (a duplicate triple, tied weights or a "
            "replicated layer), which would be moved by both: keep one of them, or register disjoint rows or columns"
        )
    return (
        f"{label}: its {letter} shares memory with {other_letter} of {other_label} though they are two "
        "tensors (tied adapters), so that one step would change it twice: untie them"
    )
