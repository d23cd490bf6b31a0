"""Every moment of a run on PEFT's layers can be saved, merged, resumed and copied, whatever its adapter started from.

The suite takes every moment and every start with both rules, but not all of them with each other; `make nightly` does.
"""

import copy
import itertools
import os
import typing
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")

from peft import LoraConfig, PeftModel
from transformers.pytorch_utils import Conv1D

import deltaopt
from deltaopt import DeltaLoRAOptimizer
from deltaopt.integrations.peft import save_adapter
from tests.support.compare import COPIES, naming, refused, relative, same, through_a_file
from tests.support.peft_layers import GUARD, layer_weights, lora_layers, output, peft_deltas, weight
from tests.support.peft_runs import adapter_of, peft_asks_by_an_old_name
from tests.support.peft_starts import LEAVING, STARTS, TAKEN_OUT, from_a_start, three_layers
from tests.support.strategies import RULES

pytestmark = [
    pytest.mark.extra,
    peft_asks_by_an_old_name,
    # At some moments A and B are changed and W has not followed.
    pytest.mark.filterwarnings("ignore:A and B of .* are not those that the last move:UserWarning"),
    pytest.mark.filterwarnings("ignore:A and B of .* changed between two steps:UserWarning"),
]

MOMENTS = {
    "before the first step": ("", 0),
    "after a first step at lr 0": ("still", 0),
    "after steps before K": ("step step", 4),
    "before step K": ("step step", 2),
    "after step K at lr 0": ("step step still", 2),
    "after step K": ("step step step", 2),
    "after step K of 0": ("step", 0),
    "long after step K": ("step step step step step", 2),
    "a skipped first step": ("skipped", 0),
    "a skipped step K": ("step skipped", 1),
    "a step after a skipped one": ("step step skipped step", 0),
    "restarted before the first step": ("restart", 0),
    "restarted": ("step step restart", 0),
    "a step after a restart": ("step step restart step", 0),
    "rebased before the first step": ("rebase", 0),
    "rebased": ("step step rebase", 0),
    "a step after a rebase": ("step step rebase step", 0),
    "changed from outside": ("step step outside", 0),
    "resynced": ("step step outside resync", 0),
    "resynced before the first step": ("outside resync", 0),
    "a step after a resync": ("step step outside resync step", 0),
    "a new ratio": ("step step ratio", 0),
    "a step at a new ratio": ("step step ratio step", 0),
    "a ratio of 0": ("step step off", 0),
    "a step at a ratio of 0": ("step step off step", 0),
    "a ratio of 0 from the start": ("off step", 0),
    "a step at a ratio up again": ("step step off step ratio step", 1),
    "all of it": ("step ratio step restart step outside resync off step skipped ratio step", 1),
}

SOME = ("before the first step", "after step K", "a step after a restart", "a step at a ratio up again")
"""What every start is tried with; each test takes two of them, `make nightly` all."""

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def cases(offset):
    """Return the moments, rules and starts that a test takes; another offset pairs them in another way."""
    if NIGHTLY:
        return [*itertools.product(MOMENTS, RULES, STARTS)]
    some = SOME[offset % 2 :: 2]
    found = [
        *((name, RULES[(i + offset) % 2], STARTS[(i + offset) % len(STARTS)]) for i, name in enumerate(MOMENTS)),
        *((name, RULES[(i + j + offset) % 2], start) for i, name in enumerate(some) for j, start in enumerate(STARTS)),
    ]
    return list(dict.fromkeys(found))


def each_case(offset):
    return pytest.mark.parametrize(("name", "rule", "start"), cases(offset))


def cases_of_16_bits():
    starts, roundings = (True, "orthogonal", "pissa"), ("stochastic", "compensated")
    if NIGHTLY:
        return [*itertools.product(MOMENTS, RULES, starts, roundings)]
    choices = itertools.cycle(itertools.product(RULES, starts, roundings))
    return [(name, *next(choices)) for name in (*MOMENTS, *SOME)]


class Run:
    """A small model in training, from a moment on."""

    def __init__(self, name, rule, start, dtype=torch.float32, **options):
        events, self.K = MOMENTS[name]
        torch.manual_seed(1)
        self.plain, self.x = three_layers().to(dtype), torch.randn(32, 6).to(dtype)
        self.rule, self.start, self.dtype, self.options = rule, start, dtype, options
        self.t, self.rebased = 0, False
        self.model = self.new_model()
        self.base = layer_weights(self.model)
        self.optimizer = self.new_optimizer(self.model)
        for event in events.split():
            self.happen(event)

    def new_model(self):
        """Build the model as a new process does, on the pristine weights."""
        return from_a_start(self.start, self.plain, self.x)

    def new_optimizer(self, model, **options):
        options = {"lr": 2e-2, "update_ratio": 1.5, "start_step": self.K, **self.options, **options}
        return DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, weight_update=self.rule, **options)

    def factors(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def logits(self):
        with torch.no_grad():
            return output(self.model.eval(), self.x)

    def train(self, steps=1, spoil=False):
        self.model.train()
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.t)
            x = torch.randn(8, 6, generator=generator).to(self.dtype)
            self.optimizer.zero_grad()
            (output(self.model, x) - 0.5).square().mean().mul(float("nan") if spoil else 1.0).backward()
            self.optimizer.step()
            self.t += 1
        return self

    @torch.no_grad()
    def happen(self, event):
        group = self.optimizer.groups[0]
        if event in ("step", "still", "skipped"):
            before = [factor.clone() for factor in self.factors()]
            rate, self.optimizer.param_groups[0]["lr"] = self.optimizer.param_groups[0]["lr"], 0.0
            if event != "still":
                self.optimizer.param_groups[0]["lr"] = rate
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "a LoRA factor became NaN")
                self.train(spoil=event == "skipped")
            self.optimizer.param_groups[0]["lr"] = rate
            if event == "skipped":  # put back as a user does
                torch._foreach_copy_(self.factors(), before)
                self.optimizer.state.clear()
        elif event == "restart":
            self.optimizer.restart(generator=torch.Generator().manual_seed(self.t))
        elif event == "rebase":
            self.optimizer.rebase()
            self.base, self.rebased = layer_weights(self.model), True
        elif event == "outside":
            torch._foreach_mul_(self.factors(), 1.25)
        elif event == "resync":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"resync\(\) moved the 16-bit weights")
                self.optimizer.resync()
        else:
            group.update_ratio = 0.0 if event == "off" else 0.75 * group.update_ratio + 0.5

    def model_at_its_base(self):
        """Return a new model, of whose layers every W is what the optimizer counts from."""
        model = self.new_model()
        put(model, self.base)
        return model

    def pristine(self):
        """Return the model without adapters that a saved adapter is for."""
        plain = copy.deepcopy(self.plain)
        if self.rebased:
            put_plain(plain, self.base)
        return plain


@torch.no_grad()
def put(model, weights):
    for name, layer in lora_layers(model).items():
        weight(layer).copy_(weights[name])


@torch.no_grad()
def put_plain(plain, weights):
    for name, W in weights.items():
        plain.get_submodule(name.removeprefix("base_model.model.")).weight.copy_(W)


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float64: 1e-5}


def assert_gives(model, run):
    with torch.no_grad():
        found = output(model.eval(), run.x)
    torch.testing.assert_close(found, run.logits(), rtol=0, atol=TOLERANCE[run.dtype])


@each_case(0)
def test_plain_peft_loads_the_adapter_onto_the_pristine_base(name, rule, start, tmp_path):
    run = Run(name, rule, start)
    why = {"loftq": "LoftQ has replaced its base weight"}.get(start)
    if start in TAKEN_OUT and run.rebased:
        why = r"takes the start of A and B out of W, but what that was is not known: .*rebase\(\) was called"
    if why is not None:
        match = naming("model.0", "model.2") + why
        refused(lambda: save_adapter(run.model, run.optimizer, tmp_path), ValueError, match)
        return
    for rank in (None, 4):
        if run.rebased:
            with pytest.warns(UserWarning, match=r"the base of .* is what their weights were at rebase\(\)"):
                errors = save_adapter(run.model, run.optimizer, tmp_path / str(rank), rank)
        else:
            errors = save_adapter(run.model, run.optimizer, tmp_path / str(rank), rank)
        if not any(errors.values()):
            assert_gives(PeftModel.from_pretrained(run.pristine(), tmp_path / str(rank)), run)
    assert rank is None or max(errors.values()) < 1


@each_case(1)
def test_it_can_be_merged(name, rule, start):
    run = Run(name, rule, start)
    merged = copy.deepcopy(run.model).merge_and_unload()
    assert_gives(merged, run)
    plain = run.pristine()
    found = deltaopt.merged_weights(run.optimizer)
    put_plain(plain, found)
    assert_gives(plain, run)
    for name, W in found.items():
        assert relative(merged.get_submodule(name.removeprefix("base_model.model.")).weight, W) < 1e-6
    changes, deltas = deltaopt.export_adapter(run.optimizer), peft_deltas(run.model)
    for name, W in layer_weights(run.model).items():
        assert relative(run.base[name] + changes[name].product(), W + deltas[name]) < 1e-5


@each_case(2)
def test_the_base_comes_back(name, rule, start):
    run = Run(name, rule, start)
    expected = run.logits()
    with run.optimizer.base_weights():
        with run.model.disable_adapter():
            found = run.logits()
        for name, W in layer_weights(run.model).items():
            assert relative(W, run.base[name]) < 1e-5
    plain = run.pristine()
    put_plain(plain, run.base)
    torch.testing.assert_close(found, output(plain, run.x), rtol=0, atol=1e-5)
    assert torch.equal(run.logits(), expected)


def assert_same(other, run):
    assert same(other.model.state_dict(), run.model.state_dict())
    assert torch.equal(other.logits(), run.logits())
    assert same(other.optimizer.state_dict(), run.optimizer.state_dict())


def resumed(run, model, state):
    """Return another run of `model` that has loaded a state."""
    other = copy.copy(run)
    other.model = model
    other.optimizer = run.new_optimizer(model, update_ratio=9.0, start_step=77)
    other.optimizer.load_state_dict(through_a_file(state))
    return other


@each_case(3)
def test_with_the_whole_model_it_resumes_bit_for_bit(name, rule, start):
    run = Run(name, rule, start)
    model = run.new_model()
    model.load_state_dict(through_a_file(run.model.state_dict()))
    other = resumed(run, model, run.optimizer.state_dict())
    for steps in (0, 2):
        assert_same(other.train(steps), run.train(steps))


@each_case(4)
def test_with_the_adapter_alone_it_resumes_to_rounding(name, rule, start):
    run = Run(name, rule, start)
    model = run.model_at_its_base()
    model.load_state_dict(adapter_of(through_a_file(run.model.state_dict())), strict=False)
    other = resumed(run, model, run.optimizer.state_dict())
    for steps in (0, 2):
        torch.testing.assert_close(other.train(steps).logits(), run.train(steps).logits(), rtol=0, atol=2e-5)
        for name, W in layer_weights(other.model).items():
            assert relative(W, layer_weights(run.model)[name]) < 1e-5


@each_case(5)
def test_a_copy_continues(name, rule, start):
    run = Run(name, rule, start)
    others = [make_copy(run) for make_copy in COPIES.values()]
    for steps in (0, 2):
        run.train(steps)
        for other in others:
            assert_same(other.train(steps), run)


def save_by_peft(run, folder):
    """Let PEFT write the adapter alone; return whether a warning said that the movement of W is left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.model.save_pretrained(folder)
    return any(str(warning.message).startswith(GUARD) for warning in caught)


@each_case(6)
def test_what_peft_alone_saves_is_right_or_a_warning_says_that_it_is_not(name, rule, start, tmp_path):
    run = Run(name, rule, start)
    warned = save_by_peft(run, tmp_path)
    moved = any(not torch.equal(W, run.base[name]) for name, W in layer_weights(run.model).items())
    assert warned or not moved
    if start in LEAVING and not warned:
        assert_gives(PeftModel.from_pretrained(run.pristine(), tmp_path), run)


# PEFT says of the folder that W had moved; here the optimizer's state moves it.
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'needs_base_weights_moved_by:UserWarning")
@pytest.mark.parametrize(
    ("name", "rule", "start"),
    [case for case in cases(6) if case[2] not in ("corda", "loftq")],  # which PEFT itself does not load without more
)
def test_with_pefts_own_files_it_resumes_to_rounding_or_is_refused_by_name(name, rule, start, tmp_path):
    """PEFT takes a start out of the base again when it loads the adapter; only the same bits are the same base."""
    run = Run(name, rule, start)
    save_by_peft(run, tmp_path)
    model = PeftModel.from_pretrained(run.pristine(), tmp_path, is_trainable=True)
    base = layer_weights(model)
    if all(torch.equal(W, run.base[name]) for name, W in base.items()):
        other = resumed(run, model, run.optimizer.state_dict())
        for steps in (0, 2):
            torch.testing.assert_close(other.train(steps).logits(), run.train(steps).logits(), rtol=0, atol=2e-5)
        return
    assert start in TAKEN_OUT
    assert rule == "folded" or run.rebased or start in ("pissa_niter_4", "lora_ga")  # of another scaling, or random
    match = r"W has other contents than when the state was saved.*model\.0.*model\.2.*onto the base that was fine-tuned"
    state = through_a_file(run.optimizer.state_dict())
    refused(
        lambda: run.new_optimizer(model).load_state_dict(state),
        deltaopt.WeightMismatchError,
        "(?s)" + match,
        kept=model.state_dict,
    )


@pytest.mark.parametrize(("name", "rule", "start", "rounding"), cases_of_16_bits())
def test_in_16_bits(name, rule, start, rounding, tmp_path):
    run = Run(name, rule, start, torch.bfloat16, rounding=rounding)
    plain = run.pristine()
    put_plain(plain, deltaopt.merged_weights(run.optimizer))
    assert_gives(plain, run)
    assert_gives(copy.deepcopy(run.model).merge_and_unload(), run)
    if not run.rebased:
        save_adapter(run.model, run.optimizer, tmp_path)
        assert_gives(PeftModel.from_pretrained(run.pristine(), tmp_path), run)
    expected = run.logits()
    with run.optimizer.base_weights(), run.model.disable_adapter():
        found = run.logits()
    plain = run.pristine()
    put_plain(plain, run.base)
    torch.testing.assert_close(found, output(plain, run.x), rtol=0, atol=TOLERANCE[torch.bfloat16])
    assert torch.equal(run.logits(), expected)
    model = run.new_model()
    model.load_state_dict(through_a_file(run.model.state_dict()))
    others = [resumed(run, model, run.optimizer.state_dict()), copy.deepcopy(run)]
    for steps in (0, 2):
        run.train(steps)
        for other in others:
            assert_same(other.train(steps), run)


def test_the_starts_are_those_that_peft_knows():
    """Name the one that is no start of A and B alone."""
    names = {
        value
        for part in typing.get_args(typing.get_type_hints(LoraConfig)["init_lora_weights"])
        for value in typing.get_args(part)
    }
    assert names <= {*STARTS, "mica", "pissa_niter_[number of iters]"}


@pytest.mark.parametrize(
    ("start", "kind", "match"),
    [
        ("mica", nn.Linear, naming("model.0", "model.2") + r"LoRA variant \(MiCALinearVariant\).*: use plain LoRA"),
        ("olora", Conv1D, r"model\.0: A \(6, 2\) and B \(2, 8\) do not fit W \(6, 8\) \(layout 'transposed'"),
    ],
)
def test_starts_with_which_a_layer_is_not_the_weight_and_its_branch_are_refused(start, kind, match):
    """PEFT's OLoRA makes factors of wrong shapes on a Conv1D."""
    plain, x = three_layers(kind), torch.randn(32, 6)
    model = from_a_start(start, plain, x, fan_in_fan_out=kind is Conv1D)
    refused(lambda: DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW), ValueError, match, kept=model.state_dict)
