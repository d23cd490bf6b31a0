"""``doctor``: what Delta-LoRA would take of a model or an adapter, what to change, and which rule fits."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from deltaopt.cli import folders
from deltaopt.cli.adapters import CONFIG, NEEDS_MOVED, WEIGHTS
from deltaopt.cli.base_model import AUTO
from deltaopt.cli.files import read_json
from deltaopt.cli.outcome import Outcome, UserError
from deltaopt.describe import describe
from deltaopt.description import Description, in_bytes
from deltaopt.messages import layers
from deltaopt.tables import paragraph

EXAMPLES = """examples:
  deltaopt doctor models/llama                            a model, with the targets that PEFT takes for it
  deltaopt doctor models/llama --targets q_proj,v_proj
  deltaopt doctor my-adapter --base models/llama          an adapter, or an adapter_config.json alone
"""


class Advice(NamedTuple):
    """The rule that fits, and why.

    Attributes:
        weight_update: the value of that argument.
        why: in a sentence.
        memory: what the rules keep in addition to the optimizer's own state, in sentences.
    """

    weight_update: str
    why: str
    memory: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of the command."""
    parser.description = "Say which layers Delta-LoRA would take, what is refused and what to change. Loads no weights."
    parser.epilog = EXAMPLES
    parser.add_argument("path", metavar="MODEL_OR_ADAPTER", help="folder of a model, of a PEFT adapter, or of both")
    parser.add_argument("--base", metavar="MODEL", help="folder of the model that the adapter is for")
    parser.add_argument(
        "--targets",
        metavar="NAMES",
        help='target_modules for a model without an adapter: names by commas, or "all-linear"',
    )
    parser.add_argument("--start-step", type=steps, default=0, metavar="K", help="steps before W moves (default: 0)")


def steps(text: str) -> int:
    """Return a number of steps that was given on the command line."""
    try:
        count = int(text)
    except ValueError:
        count = -1
    if count < 0:
        raise argparse.ArgumentTypeError(f"a number of steps, 0 or more, got {text!r}")
    return count


def run(arguments: argparse.Namespace) -> Outcome:
    """Look at the folder.

    Raises:
        UserError: if there is nothing to look at, or it cannot be read.
    """
    place = folders.folder(arguments.path)
    if (place / CONFIG).exists():
        return _of_adapter(place, arguments)
    if (place / folders.MODEL_CONFIG).exists():
        return _of_model(place, arguments)
    weights = next((name for name in WEIGHTS if (place / name).exists()), None)
    if weights is not None:
        raise UserError(f"{place} has {weights} and no {CONFIG}: copy the config too")
    folders.empty_model(place)
    raise AssertionError("a folder without a config was built")


def _of_model(place: Path, arguments: argparse.Namespace) -> Outcome:
    if arguments.base is not None:
        raise UserError(f"{place} has no {CONFIG}, so it is no adapter for --base {arguments.base}")
    peft = folders.needed("peft")
    model: Any = folders.empty_model(place)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    targets = None if arguments.targets is None else _targets(arguments.targets, model, place)
    chosen = "--targets" if targets else "the targets that PEFT takes by default"
    targets = targets or peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if targets is None:
        raise UserError(
            f"{place} holds no LoRA, and PEFT has no default targets for a {kind}: name them with --targets, for "
            f"example {_a_few_targets(model)}; or give an adapter folder with --base {place}"
        )
    config = peft.LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    opening = f"{place}: a model without an adapter, looked at with a new LoRA of rank {config.r} on {chosen}: "
    shown = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    return _outcome(_Case(place, opening + shown, config), place, arguments)


def _targets(text: str, model: Any, place: Path) -> list[str] | str:
    """Return the names that were given, or "all-linear".

    Raises:
        UserError: if no layer has one of the names. PEFT leaves that one out without a word.
    """
    if text.strip() == "all-linear":
        return "all-linear"
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    modules = [f".{name}" for name, _ in model.named_modules()]
    unknown = [name for name in wanted if not any(module.endswith(f".{name}") for module in modules)]
    if unknown or not wanted:
        named = f"{place} has no layer named {' or '.join(unknown)}" if wanted else "no name"
        raise UserError(
            f"--targets: {named}. It takes names by commas, for example {_a_few_targets(model)}, or all-linear"
        )
    return wanted


def _of_adapter(place: Path, arguments: argparse.Namespace) -> Outcome:
    if arguments.targets is not None:
        raise UserError(f"--targets is for a model without an adapter, and {place} has {CONFIG}")
    fields = read_json(place / CONFIG)
    config = folders.lora_config(fields, place)
    tensors = folders.adapter_tensors(place)
    base = _base_of(place, fields, arguments.base)
    if tensors is None and NEEDS_MOVED in fields:
        raise UserError(
            f"{place} has {CONFIG} of a trained adapter and no weights ({' or '.join(WEIGHTS)}): the folder was copied "
            "or downloaded in part. Save or copy the adapter again"
        )
    if tensors is None and arguments.base is None:
        raise UserError(
            f"{place} has {CONFIG} and no weights ({' or '.join(WEIGHTS)}): copy them "
            "too; or, to look at a config before training, name the model with --base"
        )
    state = "its config alone, no weights" if tensors is None else f"{len(tensors)} tensors"
    rank = getattr(config, "init_r", config.r)
    opening = f"{place}: an adapter of type {config.peft_type.value} and rank {rank} ({state})"
    case = _Case(place, opening, config, tensors, NEEDS_MOVED in fields)
    return _outcome(case, base, arguments)


def _base_of(place: Path, fields: Mapping[str, Any], named: str | None) -> Path | None:
    """Return the folder of the adapter's model: as named, the same one, or the one in its config if that is here."""
    if named is not None:
        return folders.folder(named)
    if (place / folders.MODEL_CONFIG).exists():
        return place
    said = fields.get("base_model_name_or_path")
    here = isinstance(said, str) and said and (Path(said) / folders.MODEL_CONFIG).exists()
    return Path(said) if here else None  # type: ignore[arg-type]


class _Case(NamedTuple):
    """What was given.

    Attributes:
        place: the folder.
        opening: what it is, in a sentence.
        config: of the adapter.
        tensors: of the adapter; None if it has none.
        needs_moved_base: it was saved without the movement of its W.
    """

    place: Path
    opening: str
    config: Any
    tensors: Mapping[str, Tensor] | None = None
    needs_moved_base: bool = False


def _outcome(case: _Case, base: Path | None, arguments: argparse.Namespace) -> Outcome:
    changes = _changes(case.config)
    told = mended = None
    if base is not None:
        adapted = folders.with_adapter(
            folders.empty_model(base, _trained_class(case.config)), _buildable(case.config), str(case.place)
        )
        folders.check_fit(adapted, case.tensors or {}, str(case.place))
        told = describe(adapted)
        if changes:
            model = folders.with_adapter(
                folders.empty_model(base, _trained_class(case.config)), _mended(case.config), str(case.place)
            )
            mended = describe(model)
    seen = mended if mended is not None and told is not None and len(mended.rows) > len(told.rows) else told
    lines = paragraph(case.opening)
    if case.needs_moved_base:
        lines += paragraph(
            "needs a moved base: it was saved without the movement of its W, so on the pristine base it is another "
            "model than the one that was trained. Load the optimizer's state with it, or take an adapter that "
            "save_adapter (or `deltaopt export`) has written"
        )
    lines += [line for change in changes for line in paragraph(f"change: {change}")]
    if told is None:
        lines += ["which layers it takes: not known without the model, name its folder with --base"]
    else:
        lines += str(told).splitlines()
        if seen is not told and seen is not None:
            lines += paragraph(f"after these changes: {_refused(seen)}")
    advice = _advice(case, seen, arguments.start_step)
    if advice is not None:
        lines += paragraph(f"rule: {advice.weight_update}, because {advice.why}")
        lines += [line for sentence in advice.memory for line in paragraph(sentence, "  ")]
    return Outcome(
        "\n".join(lines),
        {
            "path": str(case.place),
            "what": case.opening,
            "needs_moved_base": case.needs_moved_base,
            "changes": changes,
            "description": None if told is None else told.as_dict(),
            "after_changes": None if mended is None else mended.as_dict(),
            "rule": None if advice is None else advice._asdict(),
        },
    )


def _trained_class(config: Any) -> str | None:
    """Return the name of the class that an adapter was trained on where the base's own config may name another one."""
    if isinstance(mapping := getattr(config, "auto_mapping", None), dict):
        return str(mapping.get("base_model_class"))
    return AUTO[config.task_type] if config.task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else None


def _refused(told: Description) -> str:
    refused = [entry.name for entry in told.left_out if entry.kind == "refused"]
    taken = layers([row.name for row in told.rows])
    return f"{taken} taken, {f'{layers(refused)} still refused' if refused else 'none refused'}"


def _changes(config: Any) -> list[str]:
    """Say which fields of a config to change, and why."""
    found = []
    if config.peft_type.value == "ADALORA" and getattr(config, "orth_reg_weight", 0):
        found.append(
            f'orth_reg_weight: {config.orth_reg_weight:g} -> 0 for weight_update="folded": that loss reaches the '
            'factors without the branch\'s scaling; or stay with "in_place"'
        )
    if config.lora_dropout:
        found.append(
            f"lora_dropout: {config.lora_dropout:g} -> 0: with dropout in the branch the gradients of W and of A @ B "
            "differ"
        )
    if getattr(config, "use_dora", False):
        found.append("use_dora: true -> false: DoRA's branch is not scaling * B @ A")
    if getattr(config, "lora_bias", False):
        found.append(
            'lora_bias: true -> false for weight_update="folded", which would scale the bias of the branch too'
        )
    return found


def _buildable(config: Any) -> Any:
    """Return a copy of a config with a start that needs no weights."""
    built = copy.deepcopy(config)
    built.init_lora_weights = True
    return built


def _mended(config: Any) -> Any:
    mended = _buildable(config)
    mended.lora_dropout = 0.0
    for field in ("use_dora", "lora_bias"):
        if hasattr(mended, field):
            setattr(mended, field, False)
    return mended


def _advice(case: _Case, told: Description | None, start_step: int) -> Advice | None:
    """Say which rule fits; None where no layer is taken."""
    if told is None or not told.rows:
        return None
    grown = _grown(case)
    only_folded = [row for row in told.rows if row.rule == "folded"]
    only_in_place = [row for row in told.rows if row.rule == "in_place"]
    sixteen = [row for row in told.rows if row.dtype in ("bfloat16", "float16")]
    memory = _memory(told, math.fsum(row.moves for row in sixteen))
    if only_folded:
        why = f"the W of {len(only_folded)} of {len(told.rows)} layers cannot be written (a quantized base)"
        if grown or start_step:
            why += f". But {grown or 'start_step > 0'}: it would have to be written once, which is refused. " + (
                "Start a new adapter, with start_step=0"
            )
        return Advice("folded", why, memory)
    if only_in_place:
        return Advice("in_place", f"{len(only_in_place)} layers cannot be folded: {only_in_place[0].why}", memory)
    if not grown and not start_step:
        why = (
            "A @ B is zero at the start and start_step is 0: with a constant update_ratio W is never written, nothing "
            "is rounded, and PEFT's own save is right. Both rules train the same"
        )
        return Advice("folded", why, memory)
    why = f"{grown or f'start_step is {start_step}, when A @ B has grown'}, so both rules write W"
    if sixteen:
        why += '; in 16 bits take rounding="stochastic" (the default) or "compensated"'
    return Advice("in_place", why, memory)


def _grown(case: _Case) -> str:
    """Say that A @ B is not zero at the start; empty if it is, or if it is a new adapter."""
    if case.tensors is not None:
        zero = "lora_E" if case.config.peft_type.value == "ADALORA" else "lora_B", "lora_embedding_B"
        grown = any(bool(tensor.any()) for name, tensor in case.tensors.items() if any(part in name for part in zero))
        return "the product A @ B of this adapter has grown" if grown else ""
    start = getattr(case.config, "init_lora_weights", True)
    return "" if folders.starts_at_zero(start) else f"with init_lora_weights={start!r} A @ B is not zero at the start"


def _memory(told: Description, sixteen: float) -> list[str]:
    lines = [
        '"folded" keeps nothing from step to step',
        f'"in_place" keeps {in_bytes(told.kept_bytes)} on a CPU and {in_bytes(3 * told.kept_bytes)} on a GPU',
    ]
    if sixteen:
        lines.append(f'rounding="compensated" keeps {in_bytes(2 * sixteen)} more, "stochastic" nothing')
    return lines


def _a_few_targets(model: Any) -> str:
    names = {name.rpartition(".")[2]: None for name, module in model.named_modules() if _is_linear(module)}
    usual = [name for name in names if not name.isdigit()]
    return ",".join(usual[:2]) or "its linear layers"


def _is_linear(module: Any) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and "Embedding" not in type(module).__name__
