"""Load what earlier versions saved in the middle of their runs, and go on as they went on.

`tests/data/make_states.py` wrote the files, says what is in them and builds the runs.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.data.make_states import END, SAVE, STATES, Peft, Plain, displacements_of, rebuilt_run, settings_of
from tests.support.compare import relative

FOLDER = Path(__file__).parents[1] / "data"

CLOSE_TO_RECORDED = 1e-6
"""What float32 tensors, losses and displacements may differ by: relative, Frobenius norm."""

FLIPPED = 0.02
"""Which part of a file's 16-bit elements may differ from the recorded ones, each by one spacing.

The sum that is rounded is formed in float32. Another order of its terms, or another processor, changes it by some
2 ** -16 of a spacing, and an element that lies so close to where rounding turns goes the other way. That is less than
one element in a file: the version that wrote the files differs in none.
"""

FED_BACK = 2e-3
"""What A, B and losses may differ by next to a 16-bit W that is not the recorded one in `FLIPPED` of its elements.

The gradients of the PEFT model know W. With 2 elements of each W changed by hand it was 1e-3 at most.
"""

ROUNDED_ONCE = {"spacings": 4, "relative": 0.01}
"""How far a stochastic W that was rebuilt may be from one that was rounded at each step.

Every element within so many spacings of W's largest value, and W as a whole (Frobenius norm). Both were rounded at
random around the same displacement. Measured: 3 spacings and 0.0075 at most.
"""

# The layers of the PEFT model are a class of their own, whose output nobody else can correct.
pytestmark = pytest.mark.filterwarnings("ignore:once their W has moved, the forward pass:UserWarning")

each_way = pytest.mark.parametrize("way", ["weights", "adapter"])
each_case = pytest.mark.parametrize("case", STATES)


def opened(case: str) -> dict[str, Any]:
    kind, _ = STATES[case]
    if kind == "peft":
        pytest.importorskip("peft", reason="runs where peft is installed")
    return torch.load(FOLDER / f"{case}.pt", weights_only=True)


def resumed(case: str, way: str, file: dict[str, Any]) -> Plain | Peft:
    """A run with settings of its own that has loaded the state, with the saved weights or next to base and adapter."""
    kind, mode = STATES[case]
    others = {"lr": 0.5, "update_ratio": 3.0, "start_step": 99}
    config = {**file["config"], "groups": [group | others for group in file["config"]["groups"]], "rounding_seed": 77}
    run = rebuilt_run(kind, config, file["base"])
    if way == "weights":
        run.load(file["saved"])
        run.optimizer.load_state_dict(file["optimizer"])
        return run
    run.load_adapter(file["adapter"])
    if mode == "bfloat16_stochastic":
        with pytest.warns(RuntimeWarning, match=r"16-bit W of .* was rebuilt as base \+ displacement, rounded once"):
            run.optimizer.load_state_dict(file["optimizer"])
    else:
        run.optimizer.load_state_dict(file["optimizer"])
    return run


def spacings(found: Tensor, expected: Tensor, *others: Tensor) -> Tensor:
    """Return how far apart elements are, in spacings of bfloat16 at the largest value that they had on the way."""
    largest = torch.stack([t.double().abs() for t in (found, expected, *others)]).amax(0)
    spacing = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 8)
    return (found.double() - expected.double()).abs() / spacing


def tolerance(file: dict[str, Any], differing: int) -> float:
    """Return the tolerance of float32 tensors and losses. Plain triples are given their gradients, whatever W is."""
    return FED_BACK if differing and "x" in file["data"] else CLOSE_TO_RECORDED


def compared(found: dict[str, Tensor], expected: dict[str, Tensor], file: dict[str, Any]) -> int:
    """Count the 16-bit elements that differ, which are few, each by one spacing. All other tensors are close."""
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype for name in expected)
    narrow = [name for name in expected if expected[name].dtype == torch.bfloat16]
    apart = [spacings(found[name], expected[name], file["base"][name], file["saved"][name]) for name in narrow]
    assert all(bool((one <= 1).all()) for one in apart)
    differing = sum(int((one > 0).sum()) for one in apart)
    assert differing <= FLIPPED * sum(one.numel() for one in apart)
    for name in expected.keys() - narrow:
        assert relative(found[name], expected[name]) <= tolerance(file, differing), name
    return differing


def test_there_is_a_file_for_each_case():
    assert len(STATES) == 12
    assert {path.stem for path in FOLDER.glob("*.pt")} == set(STATES)


@each_case
def test_the_files_hold_runs_in_the_middle_with_closed_terms(case):
    """A product that was not zero at start_step, and in place a ratio that changed in one group, and a restart."""
    file = opened(case)
    run = resumed(case, "weights", file)
    in_place = run.optimizer.weight_update == "in_place"
    counts = {triple.name: len(ledger.terms) for triple, ledger in run.optimizer.accounts()}
    assert counts.keys() == file["displacements"].keys()
    assert min(counts.values()) >= (2 if in_place else 1)
    assert max(counts.values()) >= (3 if in_place else 1)
    assert all(0 < start_step < SAVE for start_step in file["settings"]["start_step"])
    weights = [name for name in file["base"] if name.endswith((".W", ".base_layer.weight"))]
    assert len(weights) == len(counts)
    for name in weights:
        before, then, end = file["base"][name], file["saved"][name], file["expected"]["tensors"][name]
        assert relative(then, before) > 1e4 * CLOSE_TO_RECORDED
        assert torch.equal(end, then) != in_place


@each_way
@each_case
def test_loading_restores_the_settings_the_scalings_and_the_displacements(case, way):
    file = opened(case)
    run = resumed(case, way, file)
    assert settings_of(run.optimizer) == file["settings"]
    assert file["settings"]["step_count"] == SAVE
    assert run.scalings() == pytest.approx(file["scalings"], rel=1e-6)
    found = displacements_of(run.optimizer)
    assert found.keys() == file["displacements"].keys()
    for name, expected in file["displacements"].items():
        assert relative(found[name], expected) <= CLOSE_TO_RECORDED, name


@each_way
@each_case
def test_a_run_continues_as_it_continued(case, way):
    """From base and adapter too, where only a W that is rounded at random is not what it was: see the next test."""
    file = opened(case)
    run = resumed(case, way, file)
    recorded = file["rebuilt" if way == "adapter" and "rebuilt" in file else "expected"]
    if recorded is file["expected"]:
        compared(run.tensors(), file["saved"], file)
    losses = run.train(file["data"])
    differing = compared(run.tensors(), recorded["tensors"], file)
    assert losses == pytest.approx(recorded["losses"], rel=tolerance(file, differing))
    assert run.optimizer.step_count == END


@pytest.mark.parametrize("case", [case for case in STATES if case.endswith("stochastic")])
def test_a_stochastic_weight_that_is_rebuilt_stays_beside_the_one_that_was_not(case):
    file = opened(case)
    run = resumed(case, "adapter", file)
    assert_beside(run.tensors(), file["saved"])
    run.train(file["data"])
    assert_beside(run.tensors(), file["expected"]["tensors"])


def assert_beside(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in [name for name in expected if name.endswith((".W", ".base_layer.weight"))]:
        largest = expected[name].abs().max().expand_as(expected[name])
        apart = spacings(found[name], expected[name], largest)
        assert float(apart.max()) <= ROUNDED_ONCE["spacings"], name
        assert relative(found[name], expected[name]) <= ROUNDED_ONCE["relative"], name
