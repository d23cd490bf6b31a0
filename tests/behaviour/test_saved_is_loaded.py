"""Whatever can be built and saved can be loaded, and the run that resumes takes the same next step."""

import tempfile
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deltaopt
from deltaopt import DeltaLoRAOptimizer
from tests.support import strategies
from tests.support.compare import same

numpy = pytest.importorskip("numpy", reason="runs where numpy is installed")


class Word(str):
    __slots__ = ()


FLOATS = [float, numpy.float64, numpy.float32, numpy.float16, numpy.longdouble, torch.tensor, Fraction]
INTS = [int, numpy.int64, numpy.uint8, torch.tensor]
RATES = [float, numpy.float64, numpy.float32]
NOTES = [
    None,
    "a note",
    Word("a word"),
    numpy.str_("of numpy"),
    numpy.bool_(True),
    numpy.longdouble(1),
    (numpy.float64(0.1), [numpy.int32(3), {"deep": numpy.float32(0.5)}]),
    OrderedDict({numpy.str_("key"): numpy.float64(1)}),
    {1, 2},
    2**70,
    2**3000,
    torch.ones(2),
    numpy.ones(2),
    frozenset({1}),
    Fraction(1, 3),
    range(3),
    object,
    lambda step: step,
]
"""What may stand among the options of an inner optimizer; the last ones cannot be loaded."""

names = st.one_of(
    st.text(),
    st.sampled_from(["", ".", "model.layers.0.q", "q" * 3000, "層.重み", "a\nb", "deltaopt.ledger.q", "0"]),
    st.builds(numpy.str_, st.sampled_from(["of numpy", "x.y"])),
)


def numbers(kinds, values):
    """Draw a number as Python, numpy or torch has it."""
    return st.builds(lambda kind, value: kind(value), st.sampled_from(kinds), st.sampled_from(values))


groups = st.fixed_dictionaries(
    {"names": st.lists(names, min_size=1, max_size=2)},
    optional={
        "update_ratio": numbers(FLOATS, [0.0, 0.5, 2.0]),
        "start_step": numbers(INTS, [0, 1, 2]),
        "scaling": numbers(FLOATS, [-1.5, 0.5]),
        "lr": numbers(RATES, [0.01, 0.02]),
    },
)
settings = st.fixed_dictionaries(
    {},
    optional={
        "update_ratio": numbers(FLOATS, [0.25, 1.0]),
        "start_step": numbers(INTS, [0, 1, 3]),
        "rounding": st.sampled_from(["auto", *strategies.ROUNDINGS]).map(numpy.str_),
        "rounding_seed": numbers(INTS, [0, 7]) | st.just(2**64 - 1),
    },
)
changes = st.fixed_dictionaries(
    {},
    optional={
        "update_ratio": numbers(FLOATS, [0.5, 3.0]),
        "start_step": numbers(INTS, [0, 5]),
        "lr": numbers(RATES, [0.015]),
        "note": st.sampled_from(NOTES),
        "state": numbers(RATES, [0.5]),
    },
)
"""What is set in mid-run."""


class Run:
    """Layers in groups, another parameter, and an optimizer of all of them.

    Args:
        rule: a value of `weight_update`.
        inner: a key of `strategies.INNERS`.
        dtype: of every W.
        groups: the names of the triples of each group, and its settings.
        options: of the optimizer, over those of the inner one.
    """

    def __init__(self, rule, inner, dtype, groups, options):
        self.tensors, self.t = [], 0
        entries, taken = [], []
        for group in groups:
            own = {key: value for key, value in group.items() if key != "names"}
            triples = []
            for name in group["names"]:
                name = name if name not in taken else f"{name} {len(taken)}"
                layer = strategies.make("linear", len(taken), dtype, torch.float32)
                taken.append(name)
                scaling = own.get("scaling", 0.5)
                if rule == "folded":  # its scaling is set
                    scaling = torch.tensor(float(scaling), dtype=torch.float64)
                triples.append(layer.triple(scaling, name))
                self.tensors += [layer.W, layer.A, layer.B]
            entries.append({**own, "triples": triples})
        head = torch.ones(2, 3, requires_grad=True)
        self.tensors.append(head)
        factory, defaults = strategies.INNERS[inner]
        self.optimizer = DeltaLoRAOptimizer(factory, entries, [head], weight_update=rule, **{**defaults, **options})

    def train(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            generator = torch.Generator().manual_seed(self.t)
            for p in (p for group in self.optimizer.param_groups for p in group["params"]):
                (p * torch.randn(p.shape, generator=generator)).sum().backward()
            self.optimizer.step()
            self.t += 1

    def change(self, changes):
        for name in ("update_ratio", "start_step"):
            if name in changes and self.optimizer.weight_update == "in_place":  # the folded rule refuses another one
                setattr(self.optimizer.groups[-1], name, changes[name])
        for name in ("lr", "note"):
            if name in changes:
                self.optimizer.param_groups[-1][name] = changes[name]
        if "state" in changes and self.t:
            self.optimizer.state[self.tensors[1]]["mine"] = changes["state"]

    def put(self, tensors):
        with torch.no_grad():
            for mine, saved in zip(self.tensors, tensors, strict=True):
                mine.copy_(saved)


@given(
    rule=strategies.rules,
    inner=strategies.inners,
    dtype=strategies.dtypes,
    groups=st.lists(groups, min_size=1, max_size=3),
    options=settings,
    changes=changes,
    steps=st.integers(0, 3),
)
def test_what_can_be_built_and_saved_is_loaded_and_continues(rule, inner, dtype, groups, options, changes, steps):
    run = Run(rule, inner, dtype, groups, options)
    run.train(steps)
    run.change(changes)
    state = {"tensors": run.tensors, "optimizer": run.optimizer.state_dict()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pt"
        refusal = refusal_of(state, path)
        if refusal is not None:
            assert "['note']" in refusal
            assert not path.exists()
            with pytest.raises(Exception, match=r"weights_only|Weights only|pickle|local"):
                torch_save_and_load(state, path)
            return
        loaded = deltaopt.load(path)
    plain = [{"names": group["names"], "lr": 7.0} for group in groups]
    for group, scaled in zip(plain, groups, strict=True):
        group.update({"scaling": float(scaled["scaling"])} if "scaling" in scaled else {})
    kept = {name: options[name] for name in ("rounding",) if name in options}
    twin = Run(rule, inner, dtype, plain, {"update_ratio": 9.0, "start_step": 77, **kept})
    twin.put(loaded["tensors"])
    twin.t = run.t
    twin.optimizer.load_state_dict(loaded["optimizer"])
    for _ in range(2):
        assert same(twin.tensors, run.tensors)
        assert same(twin.optimizer.state_dict(), run.optimizer.state_dict())
        run.train(1)
        twin.train(1)


def refusal_of(state, path):
    """Save the state; return the message if it is refused."""
    try:
        deltaopt.save(state, path)
    except TypeError as error:
        return str(error)
    return None


def torch_save_and_load(state, path):
    torch.save(state, path)
    torch.load(path, weights_only=True)
