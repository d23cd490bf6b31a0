"""Runs with a history: a rule, and what happens between the steps, as far as the rule takes it."""

from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

from tests.support.runs import LayerRun
from tests.support.strategies import EVENTS, RULES


def histories(min_size: int = 0, max_size: int = 8) -> st.SearchStrategy[tuple[str, list[str]]]:
    """Draw a rule, and events that can happen to a run of it."""
    return st.one_of(
        [
            st.tuples(st.just(rule), st.lists(st.sampled_from(EVENTS[rule]), min_size=min_size, max_size=max_size))
            for rule in RULES
        ]
    )


def random_run(rule: str, layout: str = "linear", seed: int = 0, **options: Any) -> LayerRun:
    """A run whose product is not zero at first, unless `zero` says so; see `LayerRun`.

    Gradients are noise where the rule takes gradients that no backward pass has made.
    """
    gradients = "noise" if rule == "in_place" else "loss"
    options = {"zero": False, "gradients": gradients, "update_ratio": 1.5, **options}
    return LayerRun(rule, layout, seed=seed, **options)


def after(run: LayerRun, events: Iterable[str]) -> LayerRun:
    """The same run once all of it has happened."""
    for event in events:
        run.happen(event)
    return run
