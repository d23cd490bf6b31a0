"""Ranks that meet on the host: they agree, or all of them raise the same error. None aborts or waits for ever."""

import copy
import os
import pickle
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from deltaopt.ranks import Ranks
from tests.support.distributed import WORLD, on_all_ranks
from tests.support.threads import on_threads

TIMEOUT = 1.0


def told(call: Callable[[], object]) -> str:
    """What this rank is told: the class of the exception and its message; or that it was fine."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def both(text: str) -> list[str]:
    return [f"RanksDisagreeError: {text}"] * WORLD


def test_ranks_that_agree_go_on():
    assert on_all_ranks(meetings_on_rank) == ["fine"] * WORLD


def meetings_on_rank(rank: int) -> str:
    ranks = Ranks(range(WORLD))
    for step in range(3):
        said = told(lambda step=step: ranks.meet("step()", {"step count": step, "seed": 2**63, "ratio": 0.1}))
    return said


@pytest.mark.parametrize(
    ("event", "facts", "text"),
    [
        (
            ["step()", "state_dict()"],
            [{}, {}],
            "rank 0 is in step(), rank 1 is in state_dict(): all ranks have to call the same together",
        ),
        (
            ["step()"] * 2,
            [{"step count": 5}, {"step count": 6}],
            "the ranks are in step() with different values:\n"
            "  step count: 5 on rank 0, 6 on rank 1: a rank has left out a step()",
        ),
        (
            ["load_state_dict()"] * 2,
            [{"rounding_seed": 0, "b": 1, "c": "same"}, {"rounding_seed": 1, "b": 1.0, "c": "same"}],
            "the ranks are in load_state_dict() with different values:\n"
            "  rounding_seed: 0 on rank 0, 1 on rank 1\n  b: 1 on rank 0, 1.0 on rank 1",
        ),
        (
            ["step()"] * 2,
            [{"ratio": 2.0}, {"lambda": 2.0}],
            "the ranks are in step() with different values:\n"
            "  ratio: 2.0 on rank 0, nothing on rank 1\n  lambda: nothing on rank 0, 2.0 on rank 1",
        ),
    ],
    ids=["events", "step count", "two facts", "names of facts"],
)
def test_ranks_that_differ_all_say_how_and_can_meet_again(event, facts, text):
    assert on_all_ranks(one_meeting_on_rank, event, facts) == [(said, "fine") for said in both(text)]


def one_meeting_on_rank(rank: int, event: list[str], facts: list[dict]) -> tuple[str, str]:
    ranks = Ranks(range(WORLD))
    return told(lambda: ranks.meet(event[rank], facts[rank])), told(lambda: ranks.meet("step()"))


def test_the_error_of_one_rank_is_raised_there_and_named_on_the_others():
    def text(kind: str) -> str:
        return f"{kind} in step(): its call was given up on every rank"

    assert on_all_ranks(failing_on_rank) == [
        (f"RanksDisagreeError: {text('rank 1 raised ValueError: lr is 0,')}", "RuntimeError: of rank 0"),
        ("ValueError: lr is 0\nor less", "KeyError: 'of rank 1'"),
    ]


def failing_on_rank(rank: int) -> tuple[str, str]:
    ranks = Ranks(range(WORLD))
    error = ValueError("lr is 0\nor less") if rank == 1 else None
    both_fail = KeyError("of rank 1") if rank == 1 else RuntimeError("of rank 0")
    return told(lambda: ranks.meet("step()", {"n": rank}, error)), told(lambda: ranks.meet("step()", error=both_fail))


def test_long_texts_are_cut_to_the_width_of_a_message():
    first, second = on_all_ranks(long_texts_on_rank)
    assert first == second
    assert "x..." in first
    assert '"..."' not in first
    assert len(first) < 8192


def long_texts_on_rank(rank: int) -> str:
    ranks = Ranks(range(WORLD))
    facts = {f"{i}" * 500: f"{rank}" + "\N{SNOWMAN}x" * 5000 for i in range(6)}
    return told(lambda: ranks.meet("state_dict()" * 200, facts))


def test_values_of_any_length_are_gathered_on_every_rank():
    found = on_all_ranks(gathering_on_rank)
    assert found[0] == found[1] == {0: ["", 0, None], 1: ["\N{SNOWMAN}" * 10_000, 1, None]}


def gathering_on_rank(rank: int) -> dict:
    return Ranks(range(WORLD)).gather("check_synced()", ["\N{SNOWMAN}" * 10_000 * rank, rank, None])


def test_a_rank_that_does_not_come_is_named_within_the_timeout_and_from_then_on():
    text = (
        "rank 1 did not come to step() within 1 seconds: all ranks have to call it together "
        "(rank 1 was last in state_dict())"
    )
    for said, again, seconds in on_all_ranks(late_on_rank, 3 * TIMEOUT):
        assert [said, again] == both(text)
        assert seconds < 2 * TIMEOUT


def late_on_rank(rank: int, delay: float) -> tuple[str, str, float]:
    ranks = Ranks(range(WORLD), TIMEOUT)
    ranks.meet("state_dict()")
    if rank == 1:
        time.sleep(delay)
    began = time.monotonic()
    said = told(lambda: ranks.meet("step()"))
    return said, told(lambda: copy.copy(ranks).meet("report()")), time.monotonic() - began


def test_a_rank_that_is_in_another_collective_is_named_and_no_process_aborts():
    text = (
        "rank 1 did not come to step() within 1 seconds: all ranks have to call it together "
        "(rank 1 has been in none of its calls)"
    )
    assert on_all_ranks(mixed_collectives_on_rank) == [f"RanksDisagreeError: {text}", "fine"]


def mixed_collectives_on_rank(rank: int) -> str:
    if rank == 1:
        return told(lambda: dist.all_reduce(torch.ones(100_000)))
    said = told(lambda: Ranks(range(WORLD), TIMEOUT).meet("step()"))
    dist.all_reduce(torch.ones(100_000))
    return said


def test_a_rank_whose_process_has_ended_is_named():
    with pytest.raises(AssertionError, match="rank 1: the process has ended, with 3") as error:
        on_all_ranks(killed_on_rank)
    assert "rank 0" not in str(error.value)  # whose assertions have passed


def killed_on_rank(rank: int) -> None:
    ranks = Ranks(range(WORLD), 3 * TIMEOUT)
    ranks.meet("state_dict()")
    if rank == 1:
        os._exit(3)
    began = time.monotonic()
    said = told(lambda: ranks.meet("step()"))
    assert said.startswith("RanksDisagreeError: rank 1 did not come to step()"), said
    assert "(rank 1 was last in state_dict())" in said
    assert told(lambda: ranks.meet("step()")) == said
    assert time.monotonic() - began < 5 * TIMEOUT


def test_a_group_that_is_made_again_after_the_default_group_was():
    assert on_all_ranks(new_default_group_on_rank) == ["fine"] * WORLD


def new_default_group_on_rank(rank: int) -> str:
    ranks = Ranks(range(WORLD))
    ranks.meet("step()")
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    return told(lambda: ranks.meet("step()"))


def test_copies_meet_with_the_originals():
    assert on_all_ranks(copies_on_rank) == ["fine"] * WORLD


def copies_on_rank(rank: int) -> str:
    ranks = Ranks(range(WORLD))
    ranks.meet("step()")
    twin = pickle.loads(pickle.dumps(ranks)) if rank else copy.deepcopy(ranks)
    return told(lambda: (twin if rank else ranks).meet("step()"))


def test_some_of_the_ranks_meet_by_themselves_on_a_mesh():
    pairs = on_threads(mesh_on_rank)
    assert [told for told, *_ in pairs] == ["fine"] * 4
    assert [found for _, found, *_ in pairs] == [{0: 0, 2: 2}, {1: 1, 3: 3}] * 2
    assert [total for *_, total, _ in pairs] == [2.0, 4.0, 2.0, 4.0]
    text = "RanksDisagreeError: the ranks are in step() with different values:\n  lead: yes on rank 0, no on ranks 1-3"
    assert [said for *_, said in pairs] == [text] * 4


def mesh_on_rank(rank: int) -> tuple[str, dict, float, str]:
    column, everyone = Ranks([rank % 2 + 2, rank % 2]), Ranks(range(4))
    said = told(lambda: column.meet("step()", {"column": rank % 2}))
    found = column.gather("step()", rank)
    total = torch.tensor(float(rank))
    dist.all_reduce(total, group=column.group)
    assert column.group is column.group
    assert everyone.group is dist.group.WORLD
    return said, found, total.item(), told(lambda: everyone.meet("step()", {"lead": "no" if rank else "yes"}))


@pytest.mark.parametrize("ranks", [[0], [0, 1], []])
def test_a_process_without_a_group_is_alone(ranks):
    Ranks(ranks).meet("step()", {"step count": 1})
    assert Ranks(ranks).gather("step()", {"a": [1]}) in ({0: {"a": [1]}}, {})
    with pytest.raises(ZeroDivisionError, match="own"):
        Ranks(ranks).meet("step()", error=ZeroDivisionError("own"))


def test_the_only_real_rank_of_a_simulated_group_is_alone():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        Ranks(range(8)).meet("step()", {"step count": 1})
        assert Ranks(range(8)).gather("step()", "a") == {0: "a"}
    finally:
        dist.destroy_process_group()


def test_more_facts_than_a_meeting_compares_are_refused():
    with pytest.raises(ValueError, match="at most 6 facts, got 7"):
        Ranks([0]).meet("step()", dict.fromkeys("abcdefg"))


def test_the_ranks_are_shown():
    assert repr(Ranks([1, 0], timeout=2.0)) == "Ranks([0, 1], timeout=2.0)"


def is_interrupted_on_rank(rank: int) -> tuple[str, float]:
    ranks = Ranks(range(WORLD), timeout=30.5)
    ranks.meet("step()")
    if rank == 1:
        time.sleep(3)
        return "", 0.0
    begin = time.monotonic()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        ranks.meet("step()")
    except KeyboardInterrupt:
        return "interrupted", time.monotonic() - begin
    finally:
        signal.signal(signal.SIGALRM, before)
    return "fine", time.monotonic() - begin


def test_a_signal_ends_the_wait_for_a_rank_that_does_not_come():
    (said, seconds), _ = on_all_ranks(is_interrupted_on_rank)
    assert said == "interrupted"
    assert seconds < 2
