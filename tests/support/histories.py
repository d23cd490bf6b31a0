"""Runs with a history: a rule, and what happens between the steps, as far as the rule takes it."""

from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

from tests.support.runs import LayerRun, noisy_run
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
    """A `noisy_run` of this rule."""
    return noisy_run(layout, seed, rule=rule, **options)


def after(run: LayerRun, events: Iterable[str]) -> LayerRun:
    """Return the same run once all of it has happened."""
    for event in events:
        run.happen(event)
    return run
