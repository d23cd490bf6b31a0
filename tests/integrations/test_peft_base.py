"""The base by itself: wherever the adapter that moved W takes no part, PEFT's layers give the base's output."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer
from tests.support.models import batches, causal_lm, loss_of
from tests.support.peft_layers import (
    CASES,
    PEFT_CAN_NOT,
    Experts,
    lora_layers,
    output,
    randomised,
    train_model,
    weight,
)
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.strategies import each_rule

# isort: split
from peft import LoraConfig, PeftModel, get_peft_model

from deltaopt.integrations.peft import save_adapter

pytestmark = peft_asks_by_an_old_name

RATIO = 2.0
EXACT = {"rtol": 0, "atol": 1e-11}
"""Of float64 outputs of order 1."""

KINDS = sorted(CASES.keys() - PEFT_CAN_NOT)
NO_MIXED_BATCHES = {name for name in KINDS if "target_parameters" in CASES[name][3]}
"""PEFT refuses adapter_names for layers that adapt parameters."""


class Frozen:
    """Copies of a model that nothing moves: the base, and the base with each adapter as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)

    @torch.no_grad()
    def base(self, x):
        with self.model.disable_adapter():
            return output(self.model, x)

    @torch.no_grad()
    def with_adapter(self, name, x):
        self.model.set_adapter(name)
        return output(self.model, x)


def two_adapters(name="linear", **config):
    """Build a model of one kind of layer with the adapters "default" and "other", and an input, in float64."""
    build, targets, inputs, of_case = CASES[name]
    settings = {"r": 3, "lora_alpha": 5, "target_modules": list(targets), **of_case, **config}
    model = get_peft_model(build().double(), LoraConfig(**settings))
    model.add_adapter("other", LoraConfig(**settings))
    randomised(model)
    return randomised(model, "other"), inputs()


def trained(model, x, rule="in_place", steps=4, **options):
    """Train the adapter "default" until W has moved; return the optimizer."""
    before = {name: weight(layer).clone() for name, layer in lora_layers(model).items()}
    options = {"lr": 2e-2, "update_ratio": RATIO, "start_step": 1, "weight_update": rule, **options}
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, **options)
    train_model(model, optimizer, x, steps)
    model.eval()
    for name, layer in lora_layers(model).items():
        assert (weight(layer) - before[name]).abs().max() > 1e-3, name
    return optimizer


@torch.no_grad()
def assert_base_by_itself(model, frozen, x):
    """Without the adapter, and with the other one in its place, the output is that of the frozen copy."""
    policy = output(model, x)
    with model.disable_adapter():
        torch.testing.assert_close(output(model, x), frozen.base(x), **EXACT)
    model.set_adapter("other")
    torch.testing.assert_close(output(model, x), frozen.with_adapter("other", x), **EXACT)
    model.set_adapter("default")
    assert torch.equal(output(model, x), policy)
    assert (policy - frozen.with_adapter("default", x)).abs().max() > 1e-2


@each_rule
@pytest.mark.parametrize("name", KINDS)
def test_without_the_adapter_the_output_is_the_bases(name, rule):
    """In place, and folded from a product that is not zero, which is taken from W at step K."""
    model, x = two_adapters(name)
    frozen = Frozen(model)
    optimizer = trained(model, x, rule)
    assert_base_by_itself(model, frozen, x)
    train_model(model, optimizer, x, steps=2)  # what was looked up before is not what W has moved by now
    model.eval()
    assert_base_by_itself(model, frozen, x)


@each_rule
@pytest.mark.parametrize("name", sorted(set(KINDS) - NO_MIXED_BATCHES))
def test_each_row_of_a_batch_has_its_own_base(name, rule):
    model, x = two_adapters(name)
    frozen = Frozen(model)
    trained(model, x, rule)
    names = ["default", "__base__", "other"]
    index = torch.tensor([0, 1, 0])
    rows = {key: value[index] for key, value in x.items()} if isinstance(x, dict) else x[index]
    with torch.no_grad():
        mixed = model(**rows, adapter_names=names) if isinstance(x, dict) else model(rows, adapter_names=names)
        mixed = getattr(mixed, "logits", mixed)
        torch.testing.assert_close(mixed[0], output(model, rows)[0], **EXACT)
        torch.testing.assert_close(mixed[1], frozen.base(rows)[1], **EXACT)
        torch.testing.assert_close(mixed[2], frozen.with_adapter("other", rows)[2], **EXACT)


@each_rule
@pytest.mark.parametrize("name", KINDS)
def test_both_adapters_together_have_the_movement(name, rule):
    """The adapter takes part, whoever else does."""
    model, x = two_adapters(name)
    trained(model, x, rule)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        model.base_model.set_adapter(["default", "other"])
        dense = plain.merge_and_unload(adapter_names=["default", "other"])
        torch.testing.assert_close(output(model, x), output(dense, x), **EXACT)


@pytest.mark.parametrize("event", ["ratio", "restart", "resync", "rebase", "reload", "base_weights"])
@each_rule
def test_after_every_event(event, rule, tmp_path):
    model, x = two_adapters()
    frozen = Frozen(model)
    optimizer = trained(model, x, rule)
    if event == "ratio":
        optimizer.groups[0].update_ratio = 0.5
    elif event == "restart":
        optimizer.restart()
    elif event == "resync":
        with torch.no_grad():
            for triple in optimizer.triples:
                triple.A.add_(0.1)
        optimizer.resync()
    elif event == "rebase":
        moved = copy.deepcopy(model).base_model.model
        optimizer.rebase()
        for path, layer in lora_layers(frozen.model).items():
            with torch.no_grad():
                weight(layer).copy_(weight(lora_layers(model)[path]))
        del moved
    elif event == "reload":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        with torch.no_grad(), optimizer.base_weights(), model.disable_adapter():
            torch.testing.assert_close(output(model, x), frozen.base(x), **EXACT)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(output(model, x), frozen.base(x), **EXACT)
    train_model(model, optimizer, x, steps=2)
    model.eval()
    assert_base_by_itself(model, frozen, x)


@pytest.mark.parametrize("method", ["copy", "hooks"])
def test_within_base_weights_nothing_is_subtracted_twice(method):
    model, x = two_adapters()
    frozen = Frozen(model)
    optimizer = trained(model, x)
    with torch.no_grad():
        with optimizer.base_weights(method=method), model.disable_adapter():
            torch.testing.assert_close(output(model, x), frozen.base(x), **EXACT)
        with model.disable_adapter(), optimizer.base_weights(method=method):
            torch.testing.assert_close(output(model, x), frozen.base(x), **EXACT)
        with model.disable_adapter():
            torch.testing.assert_close(output(model, x), frozen.base(x), **EXACT)


@each_rule
def test_it_outlives_the_optimizer(rule):
    """W keeps its movement when the optimizer is gone, and the layer knows of it; the optimizer's memory is freed."""
    model, x = two_adapters()
    frozen = Frozen(model)
    gone = weakref.ref(trained(model, x, rule))
    gc.collect()
    assert gone() is None
    assert_base_by_itself(model, frozen, x)


def test_gradients_flow_through_the_base():
    """Another adapter that trains on the base gets the gradients that it would get there, and so does the input."""
    model, x = two_adapters()
    frozen = Frozen(model)
    trained(model, x)
    grads = []
    for net in (model, frozen.model):
        net.set_adapter("other")
        inputs = x.clone().requires_grad_()
        output(net, inputs).square().mean().backward()
        grads.append([inputs.grad, *(p.grad for n, p in net.named_parameters() if ".other." in n)])
    assert len(grads[0]) > 2
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


# Adapters that are merged, taken away or deleted.


@each_rule
def test_a_merged_adapter_takes_part(rule):
    model, x = two_adapters()
    frozen = Frozen(model)
    trained(model, x, rule)
    with torch.no_grad():
        policy = output(model, x)
        model.merge_adapter()
        torch.testing.assert_close(output(model, x), policy, **EXACT)
        with model.disable_adapter():  # PEFT unmerges in the forward pass
            torch.testing.assert_close(output(model, x), frozen.base(x), **EXACT)
        torch.testing.assert_close(output(model, x), policy, **EXACT)
        model.set_adapter("other")
        model.merge_adapter()
        torch.testing.assert_close(output(model, x), frozen.with_adapter("other", x), **EXACT)
        model.unmerge_adapter()
    model.set_adapter("default")
    assert_base_by_itself(model, frozen, x)


@each_rule
@pytest.mark.parametrize("name", KINDS)
def test_merge_and_unload_subtracts_nothing(name, rule):
    model, x = two_adapters(name)
    trained(model, x, rule)
    with torch.no_grad():
        policy = output(model, x)
        torch.testing.assert_close(output(model.merge_and_unload(), x), policy, **EXACT)


@each_rule
@pytest.mark.parametrize("name", KINDS)
def test_unload_gives_the_base_back(name, rule):
    """And so does merging another adapter alone."""
    model, x = two_adapters(name)
    frozen = Frozen(model)
    optimizer = trained(model, x, rule)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = frozen.with_adapter("other", x)
        torch.testing.assert_close(output(twin.merge_and_unload(adapter_names=["other"]), x), expected, **EXACT)
        torch.testing.assert_close(output(model.unload(), x), frozen.base(x), **EXACT)
    if rule == "in_place":
        assert all(optimizer.displacement(triple.label).rank == 0 for triple in optimizer.triples)


def test_unload_of_16_bit_weights_warns_unless_the_base_is_kept():
    for keep in (None, "cpu"):
        model = causal_lm(torch.bfloat16)
        frozen = Frozen(model)
        optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, keep_base=keep)
        for ids in batches(3):
            optimizer.zero_grad()
            loss_of(model, ids).backward()
            optimizer.step()
        ids = batches(1)[0]
        if keep is None:
            with pytest.warns(UserWarning, match="these weights keep the movement, as W is torch.bfloat16"):
                model.unload()
            continue
        base = model.unload()
        with torch.no_grad():
            assert torch.equal(base(ids).logits, frozen.base({"input_ids": ids}))


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")
@each_rule
def test_a_deleted_adapter_takes_no_part(rule):
    model, x = two_adapters()
    frozen = Frozen(model)
    trained(model, x, rule)
    model.delete_adapter("default")
    model.set_adapter("other")
    with torch.no_grad():
        torch.testing.assert_close(output(model, x), frozen.with_adapter("other", x), **EXACT)


# Copies.


@each_rule
@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_a_copy_of_the_model_has_the_same_base(name, rule):
    """Whatever the original does afterwards."""
    model, x = two_adapters(name)
    frozen = Frozen(model)
    optimizer = trained(model, x, rule)
    twin = copy.deepcopy(model)
    train_model(model, optimizer, x, steps=2)
    model.eval()
    assert_base_by_itself(twin, frozen, x)
    assert_base_by_itself(model, frozen, x)


@each_rule
def test_a_copy_of_model_and_optimizer_goes_its_own_way(rule):
    model, x = two_adapters()
    frozen = Frozen(model)
    twin, optimizer = copy.deepcopy((model, trained(model, x, rule)))
    train_model(twin, optimizer, x, steps=2)
    twin.eval()
    assert_base_by_itself(twin, frozen, x)
    assert_base_by_itself(model, frozen, x)


@each_rule
def test_a_pickled_model_has_the_same_base(rule):
    model, x = two_adapters()
    frozen = Frozen(model)
    trained(model, x, rule)
    assert_base_by_itself(pickle.loads(pickle.dumps(model)), frozen, x)


def test_a_copy_whose_weights_were_written_since_is_refused():
    """As an average of models is: nobody counts what its W has moved by."""
    model, x = two_adapters()
    optimizer = trained(model, x)
    average = torch.optim.swa_utils.AveragedModel(model)
    train_model(model, optimizer, x, steps=1)
    average.update_parameters(model)
    average.update_parameters(model)
    with torch.no_grad(), average.module.disable_adapter(), pytest.raises(RuntimeError, match="was written since"):
        average(x)


def test_a_copy_is_made_though_the_movement_is_not_known():
    """As after a state of an earlier version that had lost it; the base's output is refused then, in the copy too."""
    model, x = two_adapters()
    optimizer = trained(model, x)
    for account in optimizer.accounts():
        account.ledger.lost = "the displacement is not known any more"
    for net, match in (
        (model, "base_model.model.0: the displacement is not known"),
        (copy.deepcopy(model), "this W is a copy that was written since"),
        (pickle.loads(pickle.dumps(model)), "this W is a copy that was written since"),
    ):
        output(net, x)
        with net.disable_adapter(), pytest.raises(RuntimeError, match=match):
            output(net, x)


@pytest.mark.parametrize("then", ["forward", "step", "state"])
def test_experts_have_their_w_back_after_a_signal_within_them(then, monkeypatch):
    """Torch calls hooks after an exception, but not after a KeyboardInterrupt."""
    model, x = two_adapters("experts_3_7x5_up_down")
    frozen = Frozen(model)
    first, second = trained_as(model, "default", x), trained_as(model, "other", x)
    del first
    with torch.no_grad():
        policy = output(model, x)
    stored = {name: weight(layer) for name, layer in lora_layers(model).items()}

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, model.disable_adapter():
        patch.setattr(Experts, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            output(model, x)
    if then == "step":
        train_model(model, second, x, steps=1)
    elif then == "state":
        second.state_dict()
    else:
        with torch.no_grad():
            torch.testing.assert_close(output(model, x), policy, **EXACT)
            with model.disable_adapter():
                torch.testing.assert_close(output(model, x), frozen.base(x), **EXACT)
    assert all(weight(layer) is stored[name] for name, layer in lora_layers(model).items())


# Several adapters, several optimizers, and weights that somebody loads.


def trained_as(model, adapter, x, rule="in_place", **options):
    """Train one of the adapters alone; return its optimizer."""
    model.set_adapter(adapter)
    options = {"lr": 2e-2, "update_ratio": RATIO, "weight_update": rule, "adapter": adapter, **options}
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, **options)
    train_model(model, optimizer, x, steps=3)
    model.eval()
    return optimizer


@pytest.mark.parametrize("keep_base", [None, "cpu"])
@each_rule
@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d", "experts_3_7x5_up_down"])
def test_two_adapters_that_train_in_turn_move_w_for_themselves_alone(name, rule, keep_base, tmp_path):
    """Each trains next to the base; its adapter is right there; the first optimizer is refused once W has moved on."""
    model, x = two_adapters(name)
    plain, alone = copy.deepcopy(model), {}
    for adapter in ("default", "other"):  # on a model of its own
        single = copy.deepcopy(plain)
        trained_as(single, adapter, x, rule)
        with torch.no_grad():
            alone[adapter] = output(single, x)
    first = trained_as(model, "default", x, rule, keep_base=keep_base)
    second = trained_as(model, "other", x, rule, keep_base=keep_base)
    with torch.no_grad():
        torch.testing.assert_close(output(model, x), alone["other"], **EXACT)
        model.set_adapter("default")
        torch.testing.assert_close(output(model, x), alone["default"], **EXACT)
        with model.disable_adapter():
            torch.testing.assert_close(output(model, x), Frozen(plain).base(x), **EXACT)
        model.set_adapter("other")
        save_adapter(model, second, tmp_path, adapter="other")
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain).unload(), tmp_path)
        torch.testing.assert_close(output(loaded.eval(), x), alone["other"], **EXACT)
    if rule == "in_place":
        model.set_adapter("default")
        with pytest.raises(RuntimeError, match="another optimizer was built on the W"):
            train_model(model, first, x, steps=1)
        with pytest.raises(RuntimeError, match="another optimizer was built on the W"):
            save_adapter(model, first, tmp_path / "first", adapter="default")


@pytest.mark.filterwarnings("ignore:an earlier optimizer has folded its update_ratio:UserWarning")
@each_rule
def test_a_second_optimizer_of_the_adapter_takes_w_as_its_base_and_says_so(rule):
    model, x = two_adapters()
    trained(model, x, rule)
    moved = copy.deepcopy(model)
    for layer in lora_layers(moved).values():
        layer._forward_hooks.clear()  # its W as it is stored
    with pytest.warns(UserWarning, match="were moved by an earlier optimizer"):
        second = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO)
    with torch.no_grad(), model.disable_adapter(), moved.disable_adapter():
        torch.testing.assert_close(output(model, x), output(moved, x), **EXACT)
    train_model(model, second, x, steps=2)
    model.eval()
    with torch.no_grad(), model.disable_adapter(), moved.disable_adapter():
        torch.testing.assert_close(output(model, x), output(moved, x), **EXACT)


@each_rule
def test_weights_that_are_loaded_again_are_the_base(rule):
    """Load the model's first state again: nothing is subtracted, and no warning says that it has moved.

    The state was taken before the optimizer was built, so that a scaled branch says how it takes the values.
    """
    model, x = two_adapters()
    state, frozen = copy.deepcopy(model.state_dict()), Frozen(model)
    trained(model, x, rule)
    for assign in (False, True):
        says = pytest.warns(UserWarning, match="has divided what was loaded")
        with says if rule == "folded" else contextlib.nullcontext():
            model.load_state_dict(copy.deepcopy(state), assign=assign)
        model.requires_grad_(False)
        model.set_adapter("default")
        with torch.no_grad(), model.disable_adapter():
            torch.testing.assert_close(output(model, x), frozen.base(x), **EXACT)
        if rule == "in_place":
            trained(model, x, rule)  # a warning would be an error
            assert_base_by_itself(model, frozen, x)


def added_copy(model):
    """Add a frozen copy of the adapter as TRL's trainers do."""
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ref" in name:
                parameter.copy_(model.get_parameter(name.replace(".ref", ".default")))
    return model


def test_a_copy_of_the_adapter_from_before_the_first_move_is_the_model_of_that_time():
    model, x = two_adapters()
    frozen = Frozen(model)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO)
    train_model(added_copy(model), optimizer, x)
    model.eval()
    model.set_adapter("ref")
    with torch.no_grad():
        torch.testing.assert_close(output(model, x), frozen.with_adapter("default", x), **EXACT)


@each_rule
@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d", "experts_3_7x5_up_down"])
def test_a_copy_of_the_adapter_has_the_movement_that_w_had_then(name, rule):
    """A trainer copies it for a reference model after an earlier stage has moved W: it is the model that was copied."""
    model, x = two_adapters(name)
    frozen = Frozen(model)
    optimizer = trained(model, x, rule)
    with torch.no_grad():
        policy = output(model, x)
        added_copy(model).set_adapter("ref")
        for _ in range(2):
            torch.testing.assert_close(output(model, x), policy, **EXACT)
    model.set_adapter("default")
    train_model(model, optimizer, x)
    for net in (model.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        net.set_adapter("ref")
        with torch.no_grad():
            torch.testing.assert_close(output(net, x), policy, **EXACT)
            merged = copy.deepcopy(net).merge_and_unload(adapter_names=["ref"])
            torch.testing.assert_close(output(merged, x), policy, **EXACT)
            if name not in NO_MIXED_BATCHES:
                mixed = net(x, adapter_names=["ref", "__base__"])
                torch.testing.assert_close(mixed[0], policy[0], **EXACT)
                torch.testing.assert_close(mixed[1], frozen.base(x)[1], **EXACT)
        net.set_adapter("default")
        assert_base_by_itself(net, frozen, x)
        with torch.no_grad():
            torch.testing.assert_close(output(copy.deepcopy(net).unload(), x), frozen.base(x), **EXACT)


def test_a_new_copy_of_the_same_name_has_its_own_movement():
    model, x = two_adapters()
    optimizer = trained(model, x)
    for _ in range(2):
        with torch.no_grad():
            policy = output(model, x)
            added_copy(model).set_adapter("ref")
            torch.testing.assert_close(output(model, x), policy, **EXACT)
        model.set_adapter("default")
        model.delete_adapter("ref")
        train_model(model, optimizer, x)
        model.eval()


@pytest.mark.parametrize("event", ["rebase", "optimizer"])
def test_a_copy_of_the_adapter_is_refused_after_w_has_got_another_base(event):
    model, x = two_adapters()
    optimizer = trained(model, x)
    with torch.no_grad():
        policy = output(model, x)
        added_copy(model).set_adapter("ref")
        output(model, x)
    model.set_adapter("default")
    if event == "rebase":
        optimizer.rebase()
    else:
        with pytest.warns(UserWarning, match="were moved by an earlier optimizer"):
            DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO)
    model.set_adapter("ref")
    with pytest.raises(RuntimeError, match=r"model.0 \(ref\).*another base since.*copy the adapter again"):
        output(model, x)
    model.set_adapter("default")
    model.delete_adapter("ref")
    added_copy(model).set_adapter("ref")
    with torch.no_grad():
        torch.testing.assert_close(output(model, x), policy, **EXACT)


@pytest.mark.parametrize("when", ["after_a_restart", "before_a_step", "within_base_weights", "of_a_copy"])
@each_rule
def test_a_copy_of_the_adapter_is_known_whenever_it_was_made(when, rule):
    model, x = two_adapters()
    optimizer = trained(model, x, rule)
    if when == "after_a_restart":
        optimizer.restart(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy = output(model, x)
        added_copy(model)
        if when == "of_a_copy":
            model.set_adapter("ref")
            output(model, x)
            model.add_adapter("ref2", model.peft_config["ref"])
            for name, parameter in model.named_parameters():
                if ".ref2" in name:
                    parameter.copy_(model.get_parameter(name.replace(".ref2", ".ref")))
        if when == "within_base_weights":
            with optimizer.base_weights():
                model.set_adapter("ref")
                output(model, x)
    model.set_adapter("default")
    train_model(model, optimizer, x, steps=1)
    model.eval()
    model.set_adapter("ref2" if when == "of_a_copy" else "ref")
    with torch.no_grad():
        torch.testing.assert_close(output(model, x), policy, **EXACT)


def test_a_copy_is_right_again_once_w_has_its_base_again():
    """As with a new optimizer that loads the state of the one before."""
    model, x = two_adapters()
    optimizer = trained(model, x)
    with torch.no_grad():
        policy = output(model, x)
        added_copy(model).set_adapter("ref")
        output(model, x)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="were moved by an earlier optimizer"):
        second = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO)
    second.load_state_dict(optimizer.state_dict())
    model.set_adapter("ref")
    with torch.no_grad():
        torch.testing.assert_close(output(model, x), policy, **EXACT)


@each_rule
def test_an_adapter_with_the_name_of_a_deleted_one_is_another_adapter(rule):
    model, x = two_adapters()
    frozen = Frozen(model)
    trained(model, x, rule)
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", model.peft_config["other"])
    randomised(model)
    model.set_adapter("default")
    plain = copy.deepcopy(frozen.model).unload()
    fresh = get_peft_model(plain, LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1"])).double().eval()
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if "lora_" in name:
                parameter.copy_(model.get_parameter(name))
        torch.testing.assert_close(output(model, x), output(fresh, x), **EXACT)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO)  # without a warning
    train_model(model, optimizer, x)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(output(model, x), frozen.base(x), **EXACT)


def test_an_optimizer_of_a_copy_says_that_its_base_has_moved(tmp_path):
    model, x = two_adapters()
    trained(model, x)
    added_copy(model).set_adapter("ref")
    with torch.no_grad():
        output(model, x)
    with pytest.warns(UserWarning, match="were moved by an earlier optimizer"):
        DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, adapter="ref", lr=2e-2)


@pytest.mark.parametrize("keep_base", [None, "cpu"])
def test_merging_one_of_two_adapters_that_have_moved_w(keep_base):
    """A kept copy of the base lacks what the other one has moved."""
    model, x = two_adapters()
    trained_as(model, "default", x, keep_base=keep_base)
    second = trained_as(model, "other", x, keep_base=keep_base)
    with torch.no_grad():
        policy = output(model, x)
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=["other"])
        torch.testing.assert_close(output(merged, x), policy, **EXACT)
        with pytest.warns(UserWarning, match=r"W of 2 layers .* has moved for other adapters too. After rebase\(\)"):
            second.rebase()
        model.set_adapter("default")
        with model.disable_adapter():
            base = output(model, x)
    model.set_adapter("other")
    train_model(model, second, x, steps=1)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(output(model, x), base, **EXACT)
    with torch.no_grad():
        policy = output(model, x)
        torch.testing.assert_close(output(model.merge_and_unload(adapter_names=["other"]), x), policy, **EXACT)


def test_a_kept_base_in_another_dtype_than_the_model_has_now():
    model, x = two_adapters()
    frozen = Frozen(model)
    model.float()
    trained(model, x.float(), keep_base="cpu")
    model.double()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(output(model, x), frozen.base(x), rtol=0, atol=1e-6)


def test_an_adapter_that_is_loaded_later_is_made_for_the_base(tmp_path):
    """Nothing is said of it."""
    model, x = two_adapters()
    frozen = Frozen(model)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    trained(model, x)
    model.load_adapter(tmp_path / "other", adapter_name="late")
    model.set_adapter("late")
    with torch.no_grad():
        torch.testing.assert_close(output(model, x), frozen.with_adapter("other", x), rtol=0, atol=1e-6)


@each_rule
@pytest.mark.parametrize("name", ["linear", "embedding_square", "conv2d", "experts_3_7x5_up"])
def test_a_model_that_shares_the_weights_has_the_base(name, rule):
    """A copy that has its own modules and the same Parameters, made before the adapter was added."""
    build, targets, inputs, config = CASES[name]
    plain, x = build().double(), inputs()
    shared, base = (copy.deepcopy(plain, {id(p): p for p in plain.parameters()}) for _ in range(2))
    adapted = get_peft_model(base, LoraConfig(target_modules=list(targets), **config))
    pristine = copy.deepcopy(plain)
    trained(randomised_adapter(adapted), x, rule)
    with torch.no_grad():
        if name.startswith("experts"):
            with pytest.raises(RuntimeError, match="its W has moved for a branch that takes no part"):
                output(shared, x)
            return
        for model in (plain, shared, copy.deepcopy(shared)):
            torch.testing.assert_close(output(model, x), output(pristine, x), **EXACT)


def randomised_adapter(model):
    """Give an adapter random factors, and leave the base alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float64) * 0.3
    return model
