"""TRL's trainers: their reference model stays the model that they were given, whichever way W moves.

TRL's reference is the model as it is handed over. With `peft_config=` that is the base, so TRL disables the adapter it
adds. A PeftModel may have an adapter that was trained before, so TRL adds a frozen copy of it, "ref".
"""

import gc
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.support.nightly import later
from tests.support.strategies import RULES
from tests.support.trl_runs import CASES, FOLDER, GENERATING, STARTS, STEPS, Run, run

pytestmark = [
    pytest.mark.extra,
    pytest.mark.usefixtures("accelerator_of"),
    # TRL 1.16 asks transformers 5.23 by the old names.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.*is deprecated:FutureWarning:transformers"),
]

LOGITS = 1e-5
"""The logits are as large as 4: a few roundings in float32."""
LOGGED = 5e-5
"""Relative to a number that is larger than 1. Roundings of the reference change the later steps a little."""


def is_one_more_case(kind: str, start: str, rule: str) -> bool:
    """Tell if the suite leaves a case out; it takes each kind with each start, and each start with both rules."""
    kinds = list(dict.fromkeys(each for each, its_start, _ in CASES if its_start == start))
    return (kinds.index(kind) + [*STARTS].index(start) + RULES.index(rule)) % 2 == 1


def parametrized(cases: list[tuple[str, str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("kind", "start", "rule"), [later(*case) if is_one_more_case(*case) else case for case in cases]
    )


each_case = parametrized(CASES)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory) -> Iterator[Callable[..., Run]]:
    """Runs a trainer; what two tests look at is run once."""
    folder = tmp_path_factory.mktemp("trl")
    gc.collect()
    gc.freeze()  # each trainer collects garbage, and half of the time would go into looking through what was imported
    yield cache(lambda *arguments, **options: run(*arguments, folder, **options))
    gc.unfreeze()


@each_case
def test_the_reference_is_the_model_at_the_start(kind, start, rule, run_of):
    """In each forward pass that the trainer makes of it, and in logits after each step."""
    found = run_of(kind, start, rule)
    assert min(found.moved) > 0.1
    # Where W moves, or the folded rule takes a product from it, the reference cannot do with W alone.
    writes_W = rule == "in_place" or STARTS[start].product
    if start != "continued_plainly":  # there W stays, and it is the copy of the adapter that has to know of it
        assert found.uncorrected > 0.1 if writes_W else found.uncorrected == 0
    assert len(found.passes) == STEPS * (2 if kind == "kto" else 1)  # KTO makes one more for its estimate of the KL
    assert_exact(found)


@each_case
def test_losses_equal_those_with_a_frozen_reference(kind, start, rule, run_of):
    """All that the trainer logs: losses, rewards, KL divergence, norms of gradients.

    Both runs sample the same completions, as their policies and seeds are equal.
    """
    frozen = run_of(kind, start, rule, reference="frozen")
    assert frozen.passes == []
    assert_logged_alike(run_of(kind, start, rule), frozen)


@parametrized([case for case in CASES if case[0] not in GENERATING])
def test_losses_equal_those_with_a_precomputed_reference(kind, start, rule, run_of):
    precomputed = run_of(kind, start, rule, reference="precomputed")
    assert precomputed.passes == []
    assert_logged_alike(run_of(kind, start, rule), precomputed)


@pytest.mark.parametrize("kept", ["cpu", "device"])
def test_a_kept_base_is_the_reference_bit_for_bit(kept, run_of):
    found = run_of("dpo", "config", "in_place", keep_base=kept)
    assert min(found.moved) > 0.1
    assert found.off == [0] * STEPS


# torch says so of the test's own forward passes without gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [{"gradient_checkpointing": False}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}],
    ids=["none", "reentrant"],
)
def test_other_gradient_checkpointing_gives_the_same_run(settings, run_of, tmp_path):
    """TRL checkpoints by default, without reentrance, as the other tests do."""
    found = run("dpo", "trained", "in_place", tmp_path, settings=settings)
    assert_exact(found)
    assert_logged_alike(found, run_of("dpo", "trained", "in_place", reference="frozen"))


def assert_exact(found: Run) -> None:
    """The reference is right to float32's rounding, which a model of the user's may have more of."""
    tolerance = LOGITS if FOLDER is None else LOGITS * found.largest
    assert max(found.passes) <= tolerance
    assert max(found.off) <= tolerance


def assert_logged_alike(actual: Run, expected: Run) -> None:
    for step, numbers in enumerate(expected.logged):
        assert numbers.keys() > {"loss", "grad_norm"}
        assert actual.logged[step] == pytest.approx(numbers, rel=LOGGED, abs=LOGGED), step
