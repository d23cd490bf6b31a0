"""A run saved by torch.save or deltaopt.save, or copied, resumes as if it had not stopped; else it is refused."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltaopt
from deltaopt import WeightMismatchError
from tests.support.compare import bits, refused, relative, same
from tests.support.models import batches, peft, weights
from tests.support.nightly import one_in
from tests.support.peft_runs import (
    DATA,
    FIRST_SCALING,
    KINDS,
    RATIO,
    REBUILT,
    STARTS,
    STOP,
    ModelRun,
    ScheduledRun,
    adapter_of,
    assert_rebuilds_bfloat16_with_one_rounding,
    assert_resumes_bit_for_bit,
    assert_resumes_to_rounding,
    assert_same_runs,
    begun,
    each_kind,
    fresh,
    peft_asks_by_an_old_name,
    scramble,
)
from tests.support.strategies import RULES

pytestmark = peft_asks_by_an_old_name


def torch_save(run: ScheduledRun, folder: Path) -> None:
    torch.save(run.state(), folder / "last.pt")


def torch_load(run: ScheduledRun, folder: Path) -> None:
    run.load(torch.load(folder / "last.pt", weights_only=True))


def deltaopt_save(run: ScheduledRun, folder: Path) -> None:
    deltaopt.save(run.state(), folder / "last.pt")


def deltaopt_load(run: ScheduledRun, folder: Path) -> None:
    run.load(deltaopt.load(folder / "last.pt"))


def adapter_save(run: ScheduledRun, folder: Path) -> None:
    torch.save({**run.state(), "model": peft.get_peft_model_state_dict(run.model)}, folder / "last.pt")


def adapter_load(run: ScheduledRun, folder: Path) -> None:
    state = torch.load(folder / "last.pt", weights_only=True)
    peft.set_peft_model_state_dict(run.model, state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.load_small(state)


FILES = {"torch.save": (torch_save, torch_load), "deltaopt.save": (deltaopt_save, deltaopt_load)}
ADAPTER_FILE = adapter_save, adapter_load
with_the_state = pytest.mark.filterwarnings("ignore:get_peft_model_state_dict returns the adapter alone:UserWarning")
"""The adapter leaves without the movement of W, and the optimizer's state with it."""


@pytest.mark.parametrize(("way", "dtype", "rounding"), one_in(2, FILES, KINDS))
def test_with_the_whole_model_a_run_resumes_bit_for_bit(way, dtype, rounding, tmp_path):
    assert_resumes_bit_for_bit(FILES[way], tmp_path, dtype, rounding)


@pytest.mark.parametrize("start_step", [1, STOP + 2])
@with_the_state
def test_from_the_base_and_the_adapter_a_run_resumes_to_rounding(start_step, tmp_path):
    """W had moved when it was saved, or had not yet."""
    assert_resumes_to_rounding(ADAPTER_FILE, tmp_path, start_step)


@with_the_state
def test_a_bfloat16_weight_is_rebuilt_with_one_rounding_and_says_so(tmp_path):
    assert_rebuilds_bfloat16_with_one_rounding(ADAPTER_FILE, tmp_path)


@each_kind
def test_a_run_returns_to_its_own_checkpoint_bit_for_bit(dtype, rounding):
    """In the same process, with the same objects."""
    run = begun(dtype, rounding=rounding)
    run.train(DATA[:STOP])
    state = copy.deepcopy(run.state())
    run.train(DATA[STOP:])
    end = copy.deepcopy(run.state())
    run.load(state)
    run.train(DATA[STOP:])
    assert same(run.state(), end)


COPIES_OF_RUNS = {"deepcopy": copy.deepcopy, "pickle": lambda run: pickle.loads(pickle.dumps(run))}


@pytest.mark.parametrize(("way", "dtype", "rounding"), one_in(2, ["pickle", "deepcopy"], KINDS))
def test_a_copy_with_scheduler_and_scaler_continues_bit_for_bit(way, dtype, rounding):
    """The copy is made in the middle of a run and shares nothing with it."""
    run = begun(dtype, rounding=rounding)
    run.train(DATA[:STOP])
    other = COPIES_OF_RUNS[way](run)
    middle = copy.deepcopy(run.state())
    other.train(DATA[STOP:])
    assert same(run.state(), middle)
    run.train(DATA[STOP:])
    assert_same_runs(run, other)


@pytest.mark.parametrize(("stop", "start", "rule", "way"), one_in(2, [0, 2, 5], STARTS, RULES, COPIES_OF_RUNS))
def test_a_copy_of_model_and_optimizer_continues_bit_for_bit(way, stop, start, rule):
    """The copy is made on either side of K and shares nothing with the run."""
    data, run = batches(8), ModelRun(rule, start)
    run.train(data[:stop])
    other = COPIES_OF_RUNS[way](run)
    middle = copy.deepcopy((bits(run.model), run.scalings()))
    other.train(data[stop:])
    assert same((bits(run.model), run.scalings()), middle)
    run.train(data[stop:])
    assert_same_runs(run, other)
    assert run.scalings() == {FIRST_SCALING * (1 + RATIO) if rule == "folded" else FIRST_SCALING}


# what is refused


@pytest.fixture(scope="module")
def saved_run() -> tuple[dict[str, Any], str]:
    """A whole state of a run at STOP, and the name of one of its layers."""
    run = begun()
    run.train(DATA[:STOP])
    return run.state(), run.optimizer.triples[3].name


def target(model_state: dict[str, Tensor] | None = None) -> ScheduledRun:
    """Build what a state is loaded into: a model, and an optimizer with moments and a step count of its own."""
    run = fresh(pristine=True)
    run.optimizer.groups[0].update_ratio = 0.0
    run.train(DATA[:2])
    if model_state is not None:
        run.model.load_state_dict(model_state, strict=False)
    return run


def assert_load_refused(run: ScheduledRun, state: Any, error: type[Exception], match: str) -> str:
    """Loading `state` raises and leaves the model and the optimizer as they are; return the message."""

    def objects() -> list[int]:
        return [id(run.optimizer.inner), id(run.optimizer.state), *map(id, run.model.parameters())]

    before = objects()
    message = refused(lambda: run.optimizer.load_state_dict(state), error, match, lambda: everything_of(run))
    assert objects() == before
    return message


def everything_of(run: ScheduledRun) -> list[Any]:
    groups = [[group.update_ratio, group.start_step] for group in run.optimizer.groups]
    counts = [run.optimizer.step_count, run.optimizer.skipped_updates]
    return [bits(run.model), run.state(), groups, counts]


def mentioned(message: str, run: ScheduledRun, letter: str) -> list[str]:
    """The layers, in their order, whose W, A or B the message says to have other contents."""
    lines = [line for line in message.splitlines() if line.startswith("  ") and f"{letter} has other" in line]
    if any(names_all(line, run) for line in lines):
        return layer_names(run)
    return [name for name in layer_names(run) if any(name in line for line in lines)]


def names_all(text: str, run: ScheduledRun) -> bool:
    """Tell if the text names every layer, or counts them all and names the first ones."""
    names = layer_names(run)
    counted = f"{len(names)} layers" in text and all(name in text for name in names[:3])
    return counted or all(name in text for name in names)


def layer_names(run: ScheduledRun) -> list[str]:
    return [triple.name for triple in run.optimizer.triples]


def test_an_optimizer_state_loaded_before_the_adapter_is_refused(saved_run):
    run, match = target(), "Load the model's weights .* before the opt"
    message = assert_load_refused(run, saved_run[0]["optimizer"], WeightMismatchError, match)
    assert mentioned(message, run, "A") == mentioned(message, run, "B") == layer_names(run)
    assert mentioned(message, run, "W") == []


@pytest.mark.parametrize("pristine", [True, False])
def test_the_factors_of_another_adapter_are_refused(saved_run, pristine):
    """They differ in one layer; the other layers' W would be rebuilt, or is what was saved."""
    state, name = saved_run
    run = target(adapter_of(state["model"]) if pristine else state["model"])
    scramble(run.model, lambda parameter: parameter.startswith(name) and "lora_" in parameter)
    match = "A has other contents than when the state was sav"
    message = assert_load_refused(run, state["optimizer"], WeightMismatchError, match)
    assert [mentioned(message, run, letter) for letter in "ABW"] == [[name], [name], []]


@pytest.mark.parametrize("pristine", [True, False])
def test_a_pruned_weight_is_refused(saved_run, pristine):
    """The message names the layers; as the new base the pruned weights are trained on."""
    state, name = saved_run
    run = target(adapter_of(state["model"]) if pristine else state["model"])
    pruned = [name, layer_names(run)[-1]]
    for triple in run.optimizer.triples:
        if triple.name in pruned:
            triple.W[0, 0] = 0.0
    match = r"deltaopt.without_ledger\(state\)"
    message = assert_load_refused(run, state["optimizer"], WeightMismatchError, match)
    assert [mentioned(message, run, letter) for letter in "ABW"] == [[], [], pruned]

    W = weights(run.model)
    run.optimizer.load_state_dict(deltaopt.without_ledger(state["optimizer"]))
    assert same(weights(run.model), W)
    assert run.optimizer.step_count == STOP
    moments = {key: value["exp_avg"] for key, value in state["optimizer"]["state"].items()}
    assert same({key: value["exp_avg"] for key, value in run.optimizer.state_dict()["state"].items()}, moments)
    before = {triple.name: triple.W.clone() for triple in run.optimizer.triples}
    run.train(DATA[STOP:])
    for triple in run.optimizer.triples:
        moved = run.optimizer.displacement(triple.name).product()
        assert relative(before[triple.name] + moved, triple.W) <= REBUILT
        assert float(moved.norm()) > 1000 * REBUILT * float(triple.W.norm())


def test_a_checkpoint_that_was_cut_off_is_refused(tmp_path):
    """A plain torch.save that is killed leaves it so, cut anywhere."""
    run = begun()
    run.train(DATA[:2])
    complete, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save(run.state(), complete)
    content = complete.read_bytes()
    deltaopt.load(complete)
    for size in {*range(0, len(content), len(content) // 60), *range(8), *(len(content) - n for n in range(1, 30))}:
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut\.pt .*it was cut off"):
            deltaopt.load(cut)


def first_ledger(state: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Find the first ledger: the state of the parameter that holds it, and its key there."""
    return next(
        (entries, key) for entries in state["state"].values() for key in entries if key.startswith("deltaopt.ledger.")
    )


def test_an_edited_ledger_is_refused(saved_run):
    state = copy.deepcopy(saved_run[0]["optimizer"])
    run = target(saved_run[0]["model"])
    entries, key = first_ledger(state)
    text, match = entries[key], "a saved ledger was edited or cut off: its checksum differs"
    for place in range(0, len(text), max(1, len(text) // 12)):
        entries[key] = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        assert_load_refused(run, state, ValueError, match)
    entries[key] = text[:-1]
    assert_load_refused(run, state, ValueError, match)
    entries[key] = text
    run.optimizer.load_state_dict(state)


def test_a_missing_ledger_is_refused(saved_run):
    state, run = copy.deepcopy(saved_run[0]["optimizer"]), target(saved_run[0]["model"])
    entries, key = first_ledger(state)
    del entries[key]
    match = rf"no ledger for .*{re.escape(layer_names(run)[0])}.* dropped or cut the optimizer's `state`"
    assert_load_refused(run, state, ValueError, match)


def test_a_state_without_its_states_is_refused(saved_run):
    """Some tools keep the param groups alone."""
    state, run = saved_run[0]["optimizer"], target(saved_run[0]["model"])
    message = assert_load_refused(
        run, {**state, "state": {}}, ValueError, "has no ledger for .* dropped or cut the opt"
    )
    assert names_all(message, run)
