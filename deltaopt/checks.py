"""Every refusal of a triple, of a set of triples and of an inner optimizer, before anything is changed.

``..._problems`` returns sentences; ``check_...`` raises once, with the problems of all layers in one message.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deltaopt.all_or_nothing import Issued
from deltaopt.claims import Use
from deltaopt.factors import INSTEAD_OF_VIEWS, Computed
from deltaopt.flattened import fsdp1_problems
from deltaopt.groups import ParamsInput, as_list
from deltaopt.inner import leaves_frozen_alone
from deltaopt.messages import Problem, layers, names, problem_lines, problems_of, raise_problems, warn_user
from deltaopt.ranks import Ranks
from deltaopt.rule import UpdateRule
from deltaopt.sharding import as_whole, highest, is_sharded, local_part, mesh_problem
from deltaopt.tensors import FLOATS, overlapping_pairs, same_view
from deltaopt.triple import LoRATriple
from deltaopt.unlinked import hashes_of, raise_if_they_differ, take_whether_they_differ, unlinked_parts
from deltaopt.weight import WeightState

PLACES = (None, "cpu", "device")


def check_weights(weights: Sequence[WeightState], rule: UpdateRule, new: Collection[WeightState] = ()) -> None:
    """Raise ValueError if a triple, or the set of them, cannot be moved by this rule.

    Args:
        weights: all of an optimizer, with their tensors resolved.
        rule: of the optimizer.
        new: those that are being registered. Their A and B have to require grad, and their W must not; of the others
            `check_training` asks that at each step.
    """
    unwritable = {weight: weight.weight_problems() for weight in weights}
    problems = [
        problem
        for weight in weights
        for problem in problems_of(
            weight.label,
            _fsdp1_problems(weight, rule)
            or [
                *(frozen_problems(weight) if weight in new else []),
                *triple_problems(weight, rule, unwritable[weight]),
            ],
        )
    ]
    if not problems:
        problems = set_problems(weights, {weight for weight in weights if not unwritable[weight]}, rule)
    raise_problems(ValueError, "these triples cannot be used", problems)


def _fsdp1_problems(weight: WeightState, rule: UpdateRule) -> list[str]:
    factors = zip(weight.triple.parameter_names, weight.tensors.stored, strict=True)
    return fsdp1_problems(weight.tensors.W, factors, divides_gradients=rule.scales_branches)


def set_problems(weights: Sequence[WeightState], readable: set[WeightState], rule: UpdateRule) -> list[Problem]:
    """Say which triples, each of which could be moved by itself, cannot be together.

    Args:
        weights: with their tensors resolved.
        readable: those whose W can be read and written in place.
        rule: of the optimizer.
    """
    return [*_name_problems(weights), *_sharing_problems(weights, readable, rule), *_mesh_problems(weights)]


def _mesh_problems(weights: Sequence[WeightState]) -> list[Problem]:
    """Say which layers have sharded tensors, if the ranks of all of these do not form one group."""
    tensors = {weight: (weight.tensors.W, *weight.tensors.stored) for weight in weights}
    problem = mesh_problem([tensor for held in tensors.values() for tensor in held])
    if problem is None:
        return []
    return [Problem(weight.label, problem) for weight, held in tensors.items() if any(map(is_sharded, held))]


def check_training(weights: Iterable[WeightState]) -> None:
    """Raise ValueError for factors of which nothing requires grad, or a W that does. Asked at every step.

    Between steps it does not matter: PEFT's ``disable_adapter`` freezes the factors, as do users of a trained model.
    """
    if any(
        tensors.W.requires_grad or not any(parameter.requires_grad for parameter in tensors.stored)
        for tensors in (weight.tensors for weight in weights)
    ):
        problems = [problem for w in weights for problem in problems_of(w.label, frozen_problems(w))]
        raise_problems(ValueError, "these triples cannot be trained now (nothing was changed)", problems)


def frozen_problems(weight: WeightState) -> list[str]:
    """Say if nothing of A and B trains, and whether W does. One of them may be frozen on purpose, as in LoRA-FA."""
    found = []
    named = zip(weight.triple.parameter_names, weight.tensors.stored, strict=True)
    computed = {name: parameter.grad_fn.name() for name, parameter in named if parameter.grad_fn is not None}
    if computed:
        found.append(
            f"{' and '.join(computed)} {'are' if len(computed) > 1 else 'is'} computed from other tensors "
            f"({', '.join(sorted(set(computed.values())))}), and an optimizer trains parameters: {INSTEAD_OF_VIEWS}"
        )
    if not any(parameter.requires_grad for parameter in weight.tensors.stored):
        *first, last = weight.triple.parameter_names
        found.append(
            f"neither {', '.join(first)} nor {last} requires grad, so that no optimizer can train it: call "
            "requires_grad_(True) on what is to train (one of them is enough), or activate the adapter it belongs to"
        )
    if weight.tensors.W.requires_grad:
        found.append(
            "W requires grad: Delta-LoRA moves a frozen W. Call W.requires_grad_(False), or train W itself and drop "
            "this triple"
        )
    return found


def triple_problems(weight: WeightState, rule: UpdateRule, unwritable: list[str]) -> list[str]:
    """Say in sentences what is wrong with the tensors of one triple.

    Args:
        weight: with its tensors resolved.
        rule: of the optimizer.
        unwritable: the problems of reading and writing W in place.
    """
    W, view = weight.tensors.W, weight.triple.view
    found = list(rule.weight_problems(weight, unwritable))
    for name, parameter in zip(weight.triple.parameter_names, weight.tensors.stored, strict=True):
        found += rule.factor_problems(weight, name, parameter)
        if parameter.device != W.device and not unwritable:
            found.append(f"{name} is on {parameter.device} and W on {W.device}: move them to one device")
    if W.numel() == 0 and not unwritable:
        found.append(f"W has the shape {tuple(W.shape)} and no elements, so nothing can move: leave this layer out")
    found = found or _computed_problems(weight)
    shapes = view.product_problems if unwritable else view.shape_problems
    if found := found or shapes(*map(as_whole, (W, weight.tensors.A, weight.tensors.B))):
        return found
    return weight.triple.missing_problems() or weight.triple.branch_problems()


def _computed_problems(weight: WeightState) -> list[str]:
    """Say why a computed factor is no matrix of numbers."""
    found = []
    for letter, factor in (("A", weight.tensors.left), ("B", weight.tensors.right)):
        if isinstance(factor, Tensor):
            continue
        made_of = ", ".join(f"{tuple(parameter.shape)}" for parameter in factor.parameters)
        try:
            value: object = factor.value()
        except Exception as error:
            found.append(f"{letter} cannot be computed from parameters of the shapes {made_of}: {error}")
            continue
        if not isinstance(value, Tensor) or value.dtype not in FLOATS:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            found.append(f"{letter} is computed as a {kind}, expected a tensor of floating point numbers")
    return found


def _name_problems(weights: Iterable[WeightState]) -> list[Problem]:
    seen: set[str] = set()
    found = []
    for weight in weights:
        if weight.label in seen:
            found.append(Problem(weight.label, "two triples have this name; give each its own"))
        seen.add(weight.label)
    return found


def _sharing_problems(weights: Sequence[WeightState], readable: set[WeightState], rule: UpdateRule) -> list[Problem]:
    """Find a W that two triples would move, and factors that the inner optimizer would step twice.

    Two adapters may share a W that is not written. Its claims refuse the first write.
    """
    places: list[tuple[WeightState, str, Tensor]] = []
    for weight in weights:
        if is_sharded(weight.tensors.W):
            places.append((weight, "W", weight.tensors.W))
        elif weight in readable:
            places.append((weight, "W", weight.matrix()))
        # A parameter of which both A and B are made is one.
        parameters = dict(zip(weight.tensors.stored, weight.triple.parameter_names, strict=True))
        places += [(weight, name, parameter) for parameter, name in parameters.items()]
    found = []
    for i, j in _overlapping(places):
        (other, other_letter, other_tensor), (weight, letter, tensor) = places[i], places[j]
        shared_factor = letter != "W" and other_tensor is tensor
        shared_weight = (
            letter == other_letter == "W"
            and not (rule.moves_weights or weight.moved or other.moved)
            and _same_part(weight, tensor, other, other_tensor)
            and not _same_factors(weight, other)
        )
        if not (shared_factor or shared_weight):
            sentence = _sharing_sentence(letter, other.label, other_letter)
            if letter == other_letter == "W" and rule.moves_weights and not _share_a_parameter(weight, other):
                sentence += (
                    '. Two adapters of one layer train together with weight_update="folded" from LoRA\'s start, '
                    "start_step=0 and a product A @ B of zero"
                )
            found.append(Problem(weight.label, sentence))
    return found


def _overlapping(places: Sequence[tuple[WeightState, str, Tensor]]) -> list[tuple[int, int]]:
    """Return the index pairs of tensors that share an element.

    A sharded W is compared by what it is and by the part of it that moves, so that all ranks find the same: one whose
    piece is empty too.
    """
    sharded = [i for i, (_, letter, tensor) in enumerate(places) if letter == "W" and is_sharded(tensor)]
    held = set(sharded)
    others = [i for i in range(len(places)) if i not in held]
    pairs = [(others[i], others[j]) for i, j in overlapping_pairs([local_part(places[i][2]) for i in others])]
    users: dict[int, list[int]] = {}
    for j in sharded:
        same = users.setdefault(id(places[j][2]), [])
        pairs += [(i, j) for i in same if places[i][0].triple.view.meets(places[j][0].triple.view)]
        same.append(j)
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))


def _same_part(weight: WeightState, matrix: Tensor, other: WeightState, other_matrix: Tensor) -> bool:
    """Tell if two triples have the same part of the same W."""
    if is_sharded(matrix) or is_sharded(other_matrix):
        return matrix is other_matrix and weight.triple.view == other.triple.view
    return same_view(other_matrix, matrix)


def _share_a_parameter(weight: WeightState, other: WeightState) -> bool:
    """Tell if two triples have trained parameters in common."""
    held = {id(parameter) for parameter in weight.triple.parameters}
    return any(id(parameter) in held for parameter in other.triple.parameters)


def _same_factors(weight: WeightState, other: WeightState) -> bool:
    """Tell if two triples have the same A and B: the same tensors, and the same functions of them."""
    return all(
        one is another
        or (
            isinstance(one, Computed)
            and isinstance(another, Computed)
            and one.factor.is_same(another.factor)
            and all(p is q for p, q in zip(one.parameters, another.parameters, strict=True))
        )
        for one, another in zip(weight.tensors[1:], other.tensors[1:], strict=True)
    )


def _sharing_sentence(letter: str, other_label: str, other_letter: str) -> str:
    if letter == other_letter == "W":
        return (
            f"its W shares memory with the W of {other_label} (a duplicate triple, tied weights or a "
            "replicated layer), which would be moved by both: keep one of them, or register disjoint rows or columns"
        )
    return (
        f"its {letter} shares memory with {other_letter} of {other_label} though they are two "
        "tensors (tied adapters), so that one step would change it twice: untie them"
    )


def check_claims(weights: Iterable[WeightState], what: str, use: Use) -> None:
    """Raise RuntimeError for weights that this optimizer must not use any more, as another one holds them.

    Args:
        weights: of the optimizer.
        what: the event, for the message.
        use: what it does with a W.
    """
    taken = [
        (weight, claim)
        for weight in weights
        if (claim := weight.claim) is not None and not claim.is_settled() and claim.forbids(use)
    ]
    if not taken:
        return
    where = names([weight.label for weight, _ in taken])
    if not any(claim.superseded or claim.base_overwritten for _, claim in taken):
        raise RuntimeError(
            f"{what}: the W of {where} is at its base, within base_weights() of another optimizer on it: leave it first"
        )
    moved = ", and has moved it" if any(claim.base_overwritten for _, claim in taken) else ""
    raise RuntimeError(
        f"{what}: another optimizer was built on the W of {where} since (or has loaded a state there, or "
        f"rebased){moved}. Two that move one W in turn would both be wrong about where it is (nothing was changed). "
        "Continue with the other one; or, to come back to this one, load its weights and then its state with "
        "load_state_dict()"
    )


def check_not_folded(triples: Iterable[LoRATriple]) -> None:
    """Raise ValueError for triples of an optimizer that has folded them: their `scaling` is not the branch's."""
    found = [triple.label for triple in triples if triple.folded]
    if found:
        raise ValueError(
            f"another optimizer has folded its update_ratio into the branch of {names(found)}: make new "
            "triples (find_triples, LoRATriple), with the scaling that the branch has now"
        )


def check_branches(weights: Iterable[WeightState], rescaled: bool = False) -> None:
    """Raise RuntimeError if a branch was merged, or rescaled or given dropout since it was registered.

    Args:
        weights: of the optimizer.
        rescaled: accept another scaling, which is about to be set.
    """
    raise_problems(
        RuntimeError,
        "W cannot be moved now",
        [
            problem
            for weight in weights
            if (found := weight.triple.merge_problems() if rescaled else weight.triple.branch_problems())
            for problem in problems_of(weight.label, found)
        ],
    )


def check_output_hooks(weights: Iterable[WeightState]) -> None:
    """Raise RuntimeError if somebody has removed the hooks that keep the base's output; they are put on again."""
    removed = [w for w in weights if (hook := w.triple.output_hook) is not None and not hook.is_on()]
    for weight in removed:
        assert weight.triple.output_hook is not None
        weight.triple.output_hook.put_on()
    if removed:
        raise RuntimeError(
            f"the forward hooks of {layers([weight.label for weight in removed])} were removed. With them these layers "
            "give the base's output wherever their adapter takes no part; without them such passes, as those of a "
            "reference model, had the moved weights. The hooks are back now (nothing else was changed): call this "
            "again to continue"
        )


def warn_of_outputs(weights: Iterable[WeightState]) -> None:
    """Warn of layers whose output is not the base's by itself where their branch takes no part."""
    found = [
        Problem(weight.label, problem)
        for weight in weights
        if (problem := weight.triple.output_problem(weight.copies_base)) is not None
    ]
    if found:
        lines = "\n  ".join(problem_lines(found))
        warn_user(
            "once their W has moved, the forward pass of these layers raises RuntimeError wherever their adapter takes "
            "no part (it is disabled, or another one is active), except within optimizer.base_weights(): the base's "
            f"output cannot be computed there.\n  {lines}"
        )


def warn_of_moved(weights: Iterable[WeightState]) -> None:
    """Warn of weights that an earlier optimizer has moved, which are the base of the one that is built now."""
    moved = [weight.label for weight in weights if weight.rebased]
    if moved:
        warn_user(
            f"the weights of {layers(moved)} were moved by an earlier optimizer. As they are now they are the base of "
            "this one: disable_adapter(), base_weights() and exported adapters count from here. To count from what "
            "they were before, load the state of the earlier optimizer with load_state_dict(), or continue with that "
            "optimizer; to start from the pristine weights, load the model again"
        )


def shared_movements(weights: Iterable[WeightState]) -> list[str]:
    """Return the labels of weights that have moved, and hold movements that other optimizers count.

    Args:
        weights: all of an optimizer.
    """
    hooks = [(weight, hook) for weight in weights if (hook := weight.triple.output_hook) is not None]
    own = {id(hook) for _, hook in hooks}
    return [
        weight.label
        for weight, hook in hooks
        if weight.moved and any(id(other) not in own for other in hook.others_that_moved(hook.module))
    ]


def warn_of_shared_base(labels: Sequence[str]) -> None:
    """Warn that a `rebase` gives other branches another base."""
    if labels:
        warn_user(
            f"W of {layers(labels)} has moved for other adapters too. After rebase() these stand on W as this "
            "optimizer has moved it, so that each of them gives another output than before: save them first, with "
            "save_adapter()"
        )


def check_factors(weights: Sequence[WeightState], ranks: Ranks | None = None) -> None:
    """Raise ValueError for factors whose product must not be added to W.

    Args:
        weights: with their tensors resolved.
        ranks: that share sharded weights: they all raise, though only one may have such a factor.

    Raises:
        ValueError: if one is NaN or infinite.
        FactorsDifferError: if one that nothing keeps equal differs between the ranks of its sharded W.
    """
    found, differing = on_any_rank([not _finite(weight) for weight in weights], weights, ranks)
    bad = [weight.label for weight, is_bad in zip(weights, found, strict=True) if is_bad]
    if bad:
        raise ValueError(
            f"a factor of {names(bad)} is NaN or infinite, which would reach W (nothing was changed): load A and B of "
            "a checkpoint, or give these layers another start"
        )
    raise_if_they_differ(differing, "nothing was changed, on no rank")


def on_any_rank(
    found: Sequence[bool], weights: Sequence[WeightState], ranks: Ranks | None, issued: Issued | None = None
) -> tuple[list[bool], list[WeightState]]:
    """Return what holds on any of the ranks, all of which have to call this, and whose factors differ between them.

    Args:
        found: what holds on this one.
        weights: all of the optimizer.
        ranks: that share sharded weights or factors; None where nothing is sharded.
        issued: of a call that an exception may let begin again.
    """
    devices = [weight.tensors.W.device for weight in weights if weight.is_sharded]
    if ranks is None or not devices:
        return list(found), []
    unlinked = {weight: unlinked_parts(weight) for weight in weights}
    facts = [torch.tensor(found, device=devices[0]).long()]
    for parts in unlinked.values():
        facts += [hashes.to(devices[0]) for hashes in hashes_of(parts)]
    agreed = highest(torch.cat(facts), ranks.group, issued).tolist()
    flags = [bool(number) for number in agreed[: len(found)]]
    del agreed[: len(found)]
    return flags, [weight for weight, parts in unlinked.items() if take_whether_they_differ(agreed, parts)]


def _finite(weight: WeightState) -> bool:
    _, A, B = weight.branch()
    return bool(A.isfinite().all()) and bool(B.isfinite().all())


def weight_problems(weights: Iterable[WeightState]) -> list[Problem]:
    """Say which weights cannot be read as a matrix and written in place, and why: quantized or offloaded ones."""
    return [problem for weight in weights for problem in problems_of(weight.label, weight.weight_problems())]


def check_writable(weights: Sequence[WeightState]) -> None:
    """Raise RuntimeError for weights that cannot be written: quantized, offloaded, or held by another optimizer."""
    raise_problems(
        RuntimeError,
        "these W cannot be written (nothing was changed)",
        weight_problems(weights) + claim_problems(weights),
    )


def claim_problems(weights: Iterable[WeightState]) -> list[Problem]:
    """Say which weights cannot be written for the first time now, because another optimizer holds them."""
    return [
        problem
        for weight in weights
        if weight.claim is not None
        for problem in problems_of(weight.label, weight.claim.first_write_problems())
    ]


def check_keep_base(place: object) -> None:
    """Raise ValueError for another place than `PLACES`."""
    if place not in PLACES:
        raise ValueError(f"keep_base is one of {PLACES}, got {place!r}")


def check_not_capturing() -> None:
    """Raise RuntimeError while a CUDA graph is captured."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step() is being captured into a CUDA graph, which would freeze the test t >= start_step "
            "and update_ratio: capture forward and backward only"
        )


def check_nothing_unused(
    inner: Optimizer, options: Iterable[Mapping[str, Any]], params: ParamsInput, inner_kwargs: Mapping[str, Any]
) -> None:
    """Raise TypeError for options and parameters that an inner optimizer that is already built would never see."""
    entries = list(params)
    in_groups = [key for entry in entries if isinstance(entry, Mapping) for key in entry if key != "params"]
    unused = {*(key for rest in options for key in rest), *in_groups, *inner_kwargs}
    if unused:
        raise TypeError(
            f"{', '.join(sorted(unused))}: no effect, because the inner optimizer is already built. Set "
            "them where it is built, or hand over its class"
        )
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    lists = [as_list(entry["params"]) if isinstance(entry, Mapping) else [entry] for entry in entries]
    given = [p[1] if isinstance(p, tuple) else p for entry in lists for p in entry]
    if missing := [tuple(p.shape) for p in given if id(p) not in held]:
        raise TypeError(
            f"the inner {type(inner).__name__} is already built and does not hold {len(missing)} of the {len(given)} "
            f"other parameters that train (shapes {names([str(shape) for shape in missing])}): build it from all that "
            "require grad, [p for p in model.parameters() if p.requires_grad], or hand over its class"
        )


def check_not_differentiable(inner: Optimizer) -> None:
    """Raise ValueError for an inner optimizer that builds a graph of its step."""
    if any(group.get("differentiable") for group in inner.param_groups):
        raise ValueError(
            "the inner optimizer has differentiable=True, but W is moved without a graph: use differentiable=False"
        )


def check_membership(inner: Optimizer, weights: Sequence[WeightState]) -> None:
    """Raise ValueError unless the inner optimizer holds the very Parameter objects of every A and B, and no W.

    Those that are frozen it need not hold. Optimizers that are known to leave a frozen W alone may hold it.
    """
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    may_hold = leaves_frozen_alone(inner)
    taken = {id(w.tensors.W) for w in weights if not may_hold or w.tensors.W.grad is not None} & held
    if not taken and all(
        all(id(p) in held or not p.requires_grad for p in tensors.stored)
        for tensors in (weight.tensors for weight in weights)
    ):
        return
    parameters = f"the parameters of the inner {type(inner).__name__}"
    problems = []
    for weight in weights:
        if id(weight.tensors.W) in taken:
            problems.append(
                Problem(
                    weight.label,
                    f"W is among {parameters}; give it what requires grad only, "
                    "[p for p in model.parameters() if p.requires_grad]",
                )
            )
        problems += [
            Problem(weight.label, f"{name} is not among {parameters}")
            for name, parameter in zip(weight.triple.parameter_names, weight.tensors.stored, strict=True)
            if id(parameter) not in held and parameter.requires_grad
        ]
    closing = ""
    if any(is_sharded(p) for group in inner.param_groups for p in group["params"]) and not any(
        is_sharded(parameter) for weight in weights for parameter in weight.tensors.stored
    ):
        closing = (
            "Its parameters are shards of FSDP2, and those of the layers are whole: a forward pass has put these in "
            "their place and kept them, as one without gradients does for the outermost module. Call model.reshard() "
            "first, and continue with this optimizer"
        )
    raise_problems(
        ValueError,
        "the inner optimizer does not fit the triples. It must hold the very Parameter objects of every A and B "
        "and no W. If they were replaced after it was built (sharding, XLA, assign=True, low_cpu_mem_usage=True), "
        "build the optimizer afterwards, and load a state that was saved before; if they were frozen then, freeze them "
        "again; optimizers that step flattened copies (DeepSpeed ZeRO, FSDP1, CPU offload) cannot be wrapped",
        problems,
        closing,
    )


def check_no_weight_trains(weights: Iterable[WeightState], params: Iterable[Any]) -> None:
    """Raise ValueError for a W among parameters that the inner optimizer is to train."""
    labels = {id(weight.tensors.W): weight.label for weight in weights}
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    taken = [labels[id(p)] for p in tensors if id(p) in labels]
    if taken:
        raise ValueError(f"params holds the W of {names(taken)}, which this optimizer moves itself: leave it out")
