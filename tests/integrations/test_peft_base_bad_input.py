"""The base by itself where it cannot be: layers whose output is not known, and hooks that somebody has removed."""

import copy
import warnings

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer, find_triples
from tests.support.compare import in_order
from tests.support.peft_layers import (
    CASES,
    assert_step_refused,
    lora_layers,
    mlp,
    output,
    randomised,
    tied_weights_are_meant,
    tiny_llama,
    tokens,
    train_model,
)
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.strategies import each_rule

# isort: split
from peft import LoraConfig, get_peft_model

pytestmark = peft_asks_by_an_old_name

EXACT = {"rtol": 0, "atol": 1e-12}


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    def forward(self, ids):
        return super().forward(ids) * 4


class Shifted(nn.Linear):
    """Computes something of its own."""

    def forward(self, x):
        return super().forward(x) + 1


def own_layers(embedding=ScaledEmbedding):
    return nn.Sequential(embedding(9, 6), Shifted(6, 6), nn.Linear(6, 3))


LAYERS = {
    "subclasses": (own_layers, ["0", "1"]),
    "max_norm": (lambda: nn.Sequential(nn.Embedding(9, 6, max_norm=1.0), nn.Linear(6, 3)), ["0"]),
}
"""A model with the targets "0", "1", ..., and those whose output is not known."""

each_case = pytest.mark.parametrize("case", LAYERS)


def model_of(case):
    """Return a model with an adapter whose product is not zero, and an input."""
    torch.manual_seed(0)
    plain = LAYERS[case][0]()
    targets = [name for name, _ in plain.named_children()]
    model = randomised(get_peft_model(plain, LoraConfig(r=2, lora_alpha=3, target_modules=targets)))
    return model, torch.randint(9, (4, 5))


def optimizer_of(model, **options):
    options = {"lr": 2e-2, "start_step": 1, **options}
    return DeltaLoRAOptimizer(torch.optim.AdamW, find_triples(model), **options)


def warned():
    return pytest.warns(UserWarning, match="once their W has moved")


@torch.no_grad()
def base_output(model, x):
    with model.disable_adapter():
        return output(model, x)


@each_case
def test_layers_whose_output_is_not_known_are_named_when_the_optimizer_is_built(case):
    """All of them in one warning, at the user's line."""
    model, _ = model_of(case)
    triples = find_triples(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=1e-2)
        DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2)
    assert len(caught) == 2
    for warning in caught:
        assert warning.category is UserWarning
        assert warning.filename == __file__
        message = str(warning.message)
        for name, _ in model.base_model.model.named_children():
            named = f"base_model.model.{name}:" in message
            assert named == (name in LAYERS[case][1]), message
        for way_out in ("base_weights()", "keep_base=", 'weight_update="folded"'):
            assert way_out in message


def test_a_group_that_is_added_is_named_too():
    model, _ = model_of("subclasses")
    embedding, shifted, linear = find_triples(model)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [linear], lr=1e-2)
    with pytest.warns(UserWarning, match=r"base_model\.model\.0: what a ScaledEmbedding") as caught:
        optimizer.add_param_group({"triples": [embedding]})
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match=r"base_model\.model\.1: what a Shifted") as caught:
        optimizer.add_param_group({"triples": [shifted]})


@pytest.mark.parametrize("options", [{"weight_update": "folded"}, {"keep_base": "cpu"}])
def test_nothing_is_said_of_layers_that_need_nothing(options):
    """Folded, W is not written where the product is zero; with a copy the output is what the layer computes from it."""
    model, _ = model_of("subclasses")
    optimizer_of(model, **options)  # a warning is an error here


@pytest.mark.filterwarnings("ignore:the W of 1 layer .* was written by somebody else")  # by max_norm
@each_case
def test_the_forward_pass_without_the_adapter_is_refused_once_W_has_moved(case):
    model, x = model_of(case)
    frozen = copy.deepcopy(model)
    with warned():
        optimizer = optimizer_of(model)
    train_model(model, optimizer, x, 1)
    assert torch.equal(base_output(model, x), base_output(frozen, x))  # W has not moved
    train_model(model, optimizer, x, 2)
    output(model, x)
    named = (
        r"base_model\.model\.0: its W has moved .* cannot be computed: what a .*Embedding .*base_weights.*keep_base="
    )
    with pytest.raises(RuntimeError, match=named):
        base_output(model, x)
    if case == "max_norm":  # which has rewritten rows of W in each forward pass
        with pytest.raises(RuntimeError, match="W minus its displacement is not the base"):
            optimizer.base_weights().__enter__()
    else:
        with optimizer.base_weights():
            torch.testing.assert_close(base_output(model, x), base_output(frozen, x), **EXACT)
    with pytest.raises(RuntimeError, match=named):
        base_output(model, x)


@each_rule
@pytest.mark.parametrize("place", ["cpu", "device"])
def test_with_a_copy_of_the_base_the_output_is_right(place, rule):
    """Whatever the layer computes, and next to another adapter too."""
    model, x = model_of("subclasses")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "1", "2"]))
    randomised(model, "other")
    frozen = copy.deepcopy(model)
    optimizer = optimizer_of(model, keep_base=place, weight_update=rule)
    train_model(model, optimizer, x, 4)
    assert torch.equal(base_output(model, x), base_output(frozen, x))
    for each in (model, frozen):
        each.set_adapter("other")
    with torch.no_grad():
        torch.testing.assert_close(output(model, x), output(frozen, x), **EXACT)


@pytest.mark.parametrize("place", ["cpu", "device"])
def test_the_copy_of_an_embedding_with_max_norm_stays_as_it_is(place):
    """Though the forward pass rewrites rows of the weight that it computes with."""
    model, x = model_of("max_norm")
    seen, new = x % 4, x % 4 + 5
    frozen = copy.deepcopy(model)
    optimizer = optimizer_of(model, keep_base=place)
    train_model(model, optimizer, seen, 3)
    base_output(frozen, seen)
    W0 = frozen.base_model.model[0].base_layer.weight.clone()
    assert torch.equal(base_output(model, new), base_output(frozen, new))
    assert not torch.equal(frozen.base_model.model[0].base_layer.weight, W0)
    with optimizer.base_weights():
        assert torch.equal(model.base_model.model[0].base_layer.weight, W0)


def test_folded_from_a_product_that_is_not_zero_the_forward_pass_is_refused():
    """The constant that is taken from W cannot be left out there; nothing else gives a wrong output."""
    model, x = model_of("subclasses")
    optimizer = optimizer_of(model, weight_update="folded")
    train_model(model, optimizer, x, 3)
    with pytest.raises(RuntimeError, match=r"base_model\.model\.0: its W has moved"):
        base_output(model, x)


# W that is used in another place too.


def tied_model():
    """The embedding is a target, and the head has its W."""
    torch.manual_seed(0)
    plain = tiny_llama(tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    return randomised(get_peft_model(plain, config)), tokens()


@tied_weights_are_meant
@pytest.mark.parametrize("options", [{}, {"keep_base": "cpu"}])
def test_a_tied_weight_is_named_and_refused_with_a_copy_too(options):
    model, x = tied_model()
    frozen = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"embed_tokens: its W is used in another place too") as caught:
        optimizer = DeltaLoRAOptimizer(
            torch.optim.AdamW, find_triples(model, allow_tied=True), lr=2e-2, start_step=1, **options
        )
    assert [warning.filename for warning in caught if "once their W" in str(warning.message)] == [__file__]
    train_model(model, optimizer, x, 1)
    assert torch.equal(base_output(model, x), base_output(frozen, x))
    train_model(model, optimizer, x, 2)
    with pytest.raises(RuntimeError, match=r"embed_tokens: its W has moved .*used in another place .*base_weights\(\)"):
        base_output(model, x)
    with optimizer.base_weights():
        torch.testing.assert_close(base_output(model, x), base_output(frozen, x), rtol=0, atol=1e-10)


# Hooks that somebody has removed.


def experts_model():
    build, _, inputs, config = CASES["experts_3_7x5_up_down"]
    return randomised(get_peft_model(build(), LoraConfig(r=2, target_modules=[], **config))), inputs()


def linear_model():
    return randomised(get_peft_model(mlp(7, 5, 4), LoraConfig(r=2, target_modules=["0", "1"]))), torch.randn(
        3, 7, dtype=torch.float64
    )


@each_rule
@pytest.mark.parametrize(
    ("build", "kinds"),
    [
        (linear_model, ["_forward_hooks"]),
        (experts_model, ["_forward_hooks"]),
        (experts_model, ["_forward_pre_hooks"]),
        (experts_model, ["_forward_hooks", "_forward_pre_hooks"]),
    ],
)
def test_a_hook_that_was_removed_is_named_at_the_next_step(build, kinds, rule):
    """Once: it is back then, and nothing else was changed."""
    torch.manual_seed(0)
    model, x = build()
    frozen = copy.deepcopy(model)
    optimizer = optimizer_of(model, weight_update=rule)
    train_model(model, optimizer, x, 3)
    for layer in lora_layers(model).values():
        for kind in kinds:
            getattr(layer, kind).clear()
    assert len(optimizer.triples) == 2
    (output(model, x) - 0.5).square().mean().backward()
    first, second = (triple.label for triple in optimizer.triples)
    assert_step_refused(
        model, optimizer, RuntimeError, in_order(f"2 layers ({first}, {second})", "removed", "hooks are back")
    )
    torch.testing.assert_close(base_output(model, x), base_output(frozen, x), **EXACT)
    train_model(model, optimizer, x, 2)
    torch.testing.assert_close(base_output(model, x), base_output(frozen, x), **EXACT)


def test_only_the_layers_whose_hooks_were_removed_are_named():
    torch.manual_seed(0)
    model, x = linear_model()
    optimizer = optimizer_of(model)
    train_model(model, optimizer, x, 3)
    _, second = lora_layers(model).values()
    second._forward_hooks.clear()
    assert_step_refused(model, optimizer, RuntimeError, r"1 layer \(base_model\.model\.1\)")
    train_model(model, optimizer, x, 1)


def test_a_hook_that_was_removed_is_named_by_base_weights_and_state_dict_too():
    torch.manual_seed(0)
    model, x = linear_model()
    optimizer = optimizer_of(model)
    train_model(model, optimizer, x, 3)
    for event in (optimizer.state_dict, lambda: optimizer.base_weights().__enter__(), optimizer.restart):
        for layer in lora_layers(model).values():
            layer._forward_hooks.clear()
        with pytest.raises(RuntimeError, match=r"2 layers .* were removed"):
            event()
    optimizer.state_dict()


def test_hooks_that_read_outputs_see_the_bases():
    """Put on before the optimizer was built or after it: ours comes first."""
    torch.manual_seed(0)
    model, x = linear_model()
    frozen = copy.deepcopy(model)
    first, _ = lora_layers(model).values()
    seen = []
    first.register_forward_hook(lambda module, args, out: seen.append(out))
    optimizer = optimizer_of(model)
    first.register_forward_hook(lambda module, args, out: seen.append(out))
    train_model(model, optimizer, x, 3)
    seen.clear()
    base_output(model, x)
    with torch.no_grad():
        expected = lora_layers(frozen)["base_model.model.0"].base_layer(x)
    for out in seen:
        torch.testing.assert_close(out, expected, **EXACT)
    assert len(seen) == 2


@pytest.mark.parametrize("keep", [None, "cpu"])
def test_further_arguments_reach_the_base_layer(keep):
    """As where a layer of its own takes them; without a copy of the base it is refused."""

    class Gained(nn.Linear):
        def forward(self, x, gain=1.0):
            return super().forward(x) * gain

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Gained(6, 6)

        def forward(self, x):
            return self.layer(x, 3.0)

    torch.manual_seed(0)
    model = randomised(get_peft_model(Model(), LoraConfig(r=2, target_modules=["layer"])))
    frozen, x = copy.deepcopy(model), torch.randn(3, 6, dtype=torch.float64)
    if keep is None:
        with warned():
            optimizer = optimizer_of(model)
        train_model(model, optimizer, x, 3)
        with pytest.raises(RuntimeError, match="what a Gained"):
            base_output(model, x)
        return
    optimizer = optimizer_of(model, keep_base=keep)
    train_model(model, optimizer, x, 3)
    assert torch.equal(base_output(model, x), base_output(frozen, x))
