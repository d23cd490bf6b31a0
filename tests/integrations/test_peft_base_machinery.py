"""The base by itself in the machinery of training: checkpointing, autocast, modes, threads, hooks and transforms."""

import copy
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltaopt import DeltaLoRAOptimizer
from tests.integrations.test_peft_base import EXACT, Frozen, assert_base_by_itself, trained, two_adapters
from tests.support.models import batches, causal_lm, loss_of
from tests.support.peft_layers import lora_layers, output, train_model, weight
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.strategies import each_rule

# isort: split
from peft import LoraConfig

pytestmark = peft_asks_by_an_old_name

EXPERTS = "experts_3_7x5_up_down"
BFLOAT16 = {"rtol": 0.02, "atol": 0.02}
"""Of outputs of order 1."""

each_kind = pytest.mark.parametrize("name", ["linear", "conv2d", EXPERTS])
each_way = pytest.mark.parametrize("keep_base", [None, "cpu"], ids=["by the displacement", "by a copy"])


def gradients(model: nn.Module, x, run) -> list[torch.Tensor]:
    """Train the adapter "other" on the base: the gradients of its factors and of the input, and the output."""
    model.set_adapter("other")
    model.zero_grad()
    inputs = x.clone().requires_grad_()
    out = run(model, inputs)
    out.square().mean().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if ".default." in n)
    return [out, inputs.grad, *(p.grad for n, p in model.named_parameters() if ".other." in n)]


def assert_all_close(ours, theirs, **tolerance) -> None:
    assert len(ours) == len(theirs) > 2
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def stacks_of(model: nn.Module) -> list[nn.Parameter]:
    return [weight(layer) for layer in lora_layers(model).values()]


# Activation checkpointing.


@pytest.mark.parametrize("reentrant", [False, True])
@each_way
@each_kind
def test_a_checkpointed_base_pass_has_the_gradients_of_a_frozen_copy(name, keep_base, reentrant):
    model, x = two_adapters(name)
    frozen = Frozen(model)
    trained(model, x, keep_base=keep_base)
    before = stacks_of(model)
    ours = gradients(model, x, lambda net, inputs: checkpoint(net, inputs, use_reentrant=reentrant))
    assert_all_close(ours, gradients(frozen.model, x, lambda net, inputs: net(inputs)), **EXACT)
    assert all(W is now for W, now in zip(before, stacks_of(model), strict=True))
    model.set_adapter("default")
    assert_base_by_itself(model, frozen, x)


def test_a_recomputation_that_stops_early_gives_the_weights_back():
    """Without reentrance it ends by an exception, as soon as backward has what it needs: here within the experts."""
    model, x = two_adapters(EXPERTS)
    frozen = Frozen(model)
    trained(model, x)
    before = stacks_of(model)
    (experts,) = {id(layer.get_base_layer()): layer.get_base_layer() for layer in lora_layers(model).values()}.values()
    ended = []
    experts.register_forward_hook(lambda *_: ended.append(torch.is_grad_enabled()))
    ours = gradients(model, x, lambda net, inputs: checkpoint(net, inputs, use_reentrant=False))
    assert len(ended) == 1  # the second time it was left by the exception
    assert all(W is now for W, now in zip(before, stacks_of(model), strict=True))
    assert_all_close(ours, gradients(frozen.model, x, lambda net, inputs: net(inputs)), **EXACT)


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
    "ignore:None of the inputs have requires_grad:UserWarning",  # of a reference without gradients
)
@pytest.mark.parametrize("reentrant", [False, True])
@each_rule
def test_a_language_model_with_gradient_checkpointing(rule, reentrant):
    """Policy and reference in turn; at the end another adapter trains on the base."""
    model = causal_lm()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    frozen = copy.deepcopy(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    optimizer = DeltaLoRAOptimizer.for_model(
        model, torch.optim.AdamW, lr=1e-2, update_ratio=2.0, start_step=1, weight_update=rule
    )
    for ids in batches(3):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        with torch.no_grad(), model.disable_adapter(), frozen.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, frozen(input_ids=ids).logits, **EXACT)
        loss.backward()
        optimizer.step()
    results = []
    for net in (model, frozen):
        net.set_adapter("other")
        net.zero_grad()
        loss = loss_of(net, batches(1)[0])
        loss.backward()
        results.append([loss, *(p.grad for n, p in net.named_parameters() if ".other." in n)])
    assert_all_close(*results, **EXACT)


# Modes.


@each_way
@each_kind
def test_within_autocast(name, keep_base):
    model, x = two_adapters(name)
    model, x = model.float(), x.float()
    frozen = Frozen(model)
    trained(model, x, keep_base=keep_base)

    def run(net, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return net(inputs)

    ours, theirs = gradients(model, x, run), gradients(frozen.model, x, run)
    assert ours[0].dtype == theirs[0].dtype
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02 * float(other.detach().abs().max()))
    with torch.no_grad(), model.disable_adapter(), frozen.model.disable_adapter():
        got, expected = run(model, x), run(frozen.model, x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    if keep_base is not None:
        assert torch.equal(got, expected)


@each_rule
@each_kind
def test_within_inference_mode(name, rule):
    """And in training and without gradients after it."""
    model, x = two_adapters(name)
    frozen = Frozen(model)
    optimizer = trained(model, x, rule)
    for _ in range(2):
        with torch.inference_mode():
            assert_base_by_itself(model, frozen, x)
        train_model(model, optimizer, x, steps=1)
        model.eval()
        assert_base_by_itself(model, frozen, x)
    assert_all_close(*(gradients(net, x, lambda net, inputs: net(inputs)) for net in (model, frozen.model)), **EXACT)


def test_a_copy_that_was_made_in_inference_mode():
    model, x = two_adapters()
    frozen = Frozen(model)
    trained(model, x)
    with torch.inference_mode():
        twin = copy.deepcopy(model)
        for layer in lora_layers(twin).values():
            layer.set_adapter("other", inference_mode=True)
        torch.testing.assert_close(output(twin, x), frozen.with_adapter("other", x), **EXACT)
        weight(lora_layers(twin)["base_model.model.0"]).add_(0.1)
        with pytest.raises(RuntimeError, match="was written since"):
            output(twin, x)


@each_kind
def test_with_another_default_device_and_dtype(name):
    model, x = two_adapters(name)
    frozen = Frozen(model)
    trained(model, x)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    try:
        assert_base_by_itself(model, frozen, x)
        assert_base_by_itself(copy.deepcopy(model), frozen, x)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


# Threads, and forward passes that do not end.


@each_way
@each_kind
def test_several_threads_have_the_base_at_once(name, keep_base):
    model, x = two_adapters(name)
    frozen = Frozen(model)
    trained(model, x, keep_base=keep_base)
    before, expected, results = stacks_of(model), frozen.base(x), []

    def work() -> None:
        with torch.no_grad():
            results.extend(output(model, x) for _ in range(40))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with model.disable_adapter():
            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(results) == 120
    for result in results:
        torch.testing.assert_close(result, expected, **EXACT)
    assert all(W is now for W, now in zip(before, stacks_of(model), strict=True))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_experts_whose_forward_pass_was_ended_are_right_in_the_next_one(error):
    """Torch calls hooks after an error, and not after a signal."""
    model, x = two_adapters(EXPERTS)
    frozen = Frozen(model)
    trained(model, x)
    before = stacks_of(model)
    with torch.no_grad():
        policy = output(model, x)

    def end(*_):
        raise error("ended")

    for state in ("disabled", "default"):
        handle = next(iter(lora_layers(model).values())).get_base_layer().register_forward_hook(end)
        with pytest.raises(error, match="ended"), torch.no_grad(), model.disable_adapter():
            output(model, x)
        handle.remove()
        if error is ValueError:
            assert all(W is now for W, now in zip(before, stacks_of(model), strict=True))
        if state == "disabled":
            assert_base_by_itself(model, frozen, x)
        else:
            with torch.no_grad():
                assert torch.equal(output(model, x), policy)
        assert all(W is now for W, now in zip(before, stacks_of(model), strict=True))


# Hooks and calls of other people.


@each_way
def test_other_hooks_see_the_base_and_may_change_it(keep_base):
    """Whether they were there before the layers were found or came after it."""
    model, x = two_adapters()
    seen = {"before": [], "after": []}

    def doubles(when):
        def hook(module, args, out):
            seen[when].append(out)
            return 2 * out.tanh()

        return hook

    for layer in lora_layers(model).values():
        layer.register_forward_hook(doubles("before"))
    frozen = Frozen(model)
    trained(model, x, keep_base=keep_base)
    for layer in [*lora_layers(model).values(), *lora_layers(frozen.model).values()]:
        layer.register_forward_hook(doubles("after"))
    assert_base_by_itself(model, frozen, x)
    for found in seen.values():
        found.clear()
    with torch.no_grad(), model.disable_adapter():
        output(model, x)
    ours = {when: list(found) for when, found in seen.items()}
    for found in seen.values():
        found.clear()
    frozen.base(x)
    for when, found in seen.items():
        assert_all_close([x, *ours[when]], [x, *found], **EXACT)


def test_an_input_that_another_hook_has_changed():
    model, x = two_adapters()
    frozen = Frozen(model)
    trained(model, x)
    for layer in [*lora_layers(model).values(), *lora_layers(frozen.model).values()]:
        layer.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    assert_base_by_itself(model, frozen, x)


@each_kind
def test_a_layer_that_is_called_by_keyword(name):
    model, x = two_adapters(name)
    frozen = Frozen(model)
    trained(model, x)
    for path, layer in lora_layers(model).items():
        if path.endswith((".1", ".up")):  # inside another one, or behind it
            continue
        with torch.no_grad(), model.disable_adapter(), frozen.model.disable_adapter():
            torch.testing.assert_close(layer(x=x), lora_layers(frozen.model)[path](x=x), **EXACT)


@each_kind
def test_a_shallow_copy_of_the_layers(name):
    """As `nn.DataParallel` makes them for each device: modules of their own, with the same hooks."""
    model, x = two_adapters(name)
    frozen = Frozen(model)
    trained(model, x)
    replica = copy.copy(model)
    replica._modules = {"base_model": copy.copy(model.base_model)}
    inside = copy.copy(model.base_model.model)
    inside._modules = {key: copy.copy(module) for key, module in inside._modules.items()}
    replica.base_model._modules = {"model": inside}
    assert inside[0] is not model.base_model.model[0]
    with torch.no_grad(), replica.disable_adapter():
        torch.testing.assert_close(output(replica, x), frozen.base(x), **EXACT)


# Transforms.


@each_kind
def test_transforms_of_the_base_pass(name):
    model, x = two_adapters(name)
    frozen = Frozen(model)
    trained(model, x)
    results = []
    for net in (model, frozen.model):
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        with net.disable_adapter():
            results.append(
                [
                    torch.func.vmap(net)(x),
                    torch.func.functional_call(net, parameters, (x,)),
                    torch.func.jacrev(net)(x[:1]),
                    torch.func.jvp(net, (x,), (x.cos(),))[1],
                ]
            )
    assert_all_close(*results, **EXACT)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_of_the_base_pass():
    """It holds the numbers of the moment when it was made, as every trace does."""
    model, x = two_adapters()
    frozen = Frozen(model)
    optimizer = trained(model, x)
    with torch.no_grad(), model.disable_adapter():
        model(x)
        trace = torch.jit.freeze(torch.jit.trace(model, (x,)))
    train_model(model, optimizer, x, steps=2)
    torch.testing.assert_close(trace(2 * x), frozen.base(2 * x), **EXACT)
