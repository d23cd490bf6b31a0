"""PEFT layers under the folded rule: A, B and outputs as in place; which alpha a layer has; what is refused."""

import copy
import re

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple, find_triples

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")

from peft import (
    LoraConfig,
    get_peft_model,
)

from deltaopt.integrations.peft import save_adapter
from tests.support.peft_folded import (
    ALPHA,
    FOLDED_RATIO,
    LARGER,
    NAMES,
    SOME,
    Trained,
    adapted,
    alphas,
    assert_alike,
    assert_near,
    assert_trained_alike,
    both_rules_on,
    folded,
    grouped,
    layer_scalings,
    optimizer_of,
)
from tests.support.peft_layers import (
    CASES,
    HOOKS_CAN_NOT,
    assert_loads,
    assert_step_refused,
    image,
    layer_weights,
    lora_layers,
    mlp,
    output,
    tied_weights_are_meant,
    tiny_llama,
    train_model,
)
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.strategies import SCHEDULES

pytestmark = peft_asks_by_an_old_name


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_layer_from_a_zero_product(name):
    build, targets, inputs, config = CASES[name]
    model, x = adapted(build(), *targets, **config), inputs()
    start = layer_weights(model)
    mine, its = both_rules_on(model, x)
    for label, W in layer_weights(mine.model).items():
        assert torch.equal(W, start[label])
        assert not torch.equal(layer_weights(its.model)[label], start[label])
    assert alphas(mine.model) == [LARGER] * len(start)
    assert_alike(mine, its, x)


@pytest.mark.parametrize(("zero", "start_step"), [(False, 0), (True, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_layer_where_the_product_is_not_zero(name, zero, start_step):
    """W is written at step K, and not before or after."""
    build, targets, inputs, config = CASES[name]
    model, x = adapted(build(), *targets, zero=zero, **config), inputs()
    start, expected = layer_weights(model), layer_scalings(model)
    mine, its = both_rules_on(model, x, steps=start_step, start_step=start_step)
    assert layer_scalings(mine.model) == expected
    assert all(torch.equal(W, start[label]) for label, W in layer_weights(mine.model).items())
    train_model(*mine, x, 1)
    train_model(*its, x, 1)
    assert layer_scalings(mine.model) == [s * (1 + FOLDED_RATIO) for s in expected]
    once = layer_weights(mine.model)
    assert not any(torch.equal(W, start[label]) for label, W in once.items())
    train_model(*mine, x, 3)
    train_model(*its, x, 3)
    assert all(torch.equal(W, once[label]) for label, W in layer_weights(mine.model).items())
    assert_alike(mine, its, x)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_layer_with_a_ratio_that_changes(name, zero):
    build, targets, inputs, config = CASES[name]
    model, x = adapted(build(), *targets, zero=zero, **config), inputs()
    ratio = SCHEDULES["random"]
    mine, its = both_rules_on(model, x, steps=7, update_ratio=ratio)
    assert len({ratio(step) for step in range(7)}) > 2
    assert layer_scalings(mine.model) == pytest.approx([s * (1 + ratio(6)) for s in layer_scalings(model)], rel=1e-12)
    assert_alike(mine, its, x)


def test_groups_of_different_schedules():
    model, x = adapted(mlp(7, 5, 6, 4), "0", "1", "2", zero=False), image(7)
    ratios = [SCHEDULES["ramp"], 0.5, SCHEDULES["oscillating"]]
    runs = both_rules_on(model, x, 6, make=lambda twin, **options: grouped(twin, ratios, **options))
    assert_alike(*runs, x)
    for run in runs:
        run.optimizer.groups[1].update_ratio = 0.0
        run.optimizer.restart(generator=torch.Generator().manual_seed(0))
        train_model(*run, x, 3)
    assert_alike(*runs, x)


def test_the_gradients_are_those_of_a_w_that_moves():
    model, x = adapted(mlp(7, 5, 4), "0", "1", zero=False), image(7)
    mine, its = both_rules_on(model, x, inner=torch.optim.SGD)
    for model, optimizer in (mine, its):
        optimizer.zero_grad()
        output(model, x).square().mean().backward()
    for one, other in zip(mine.optimizer.triples, its.optimizer.triples, strict=True):
        assert other.A.grad.abs().max() > 1e-3
        assert_near(one.A.grad, other.A.grad)
        assert_near(one.B.grad, other.B.grad)


@pytest.mark.parametrize("zero", [True, False])
def test_groups_of_different_ratios(zero):
    model, x = adapted(mlp(7, 5, 6, 4), "0", "1", "2", zero=zero), image(7)
    mine, its = both_rules_on(model, x, make=lambda twin, **options: grouped(twin, [0.5, 0.0, 2.0], **options))
    assert alphas(mine.model) == [1.5 * ALPHA, ALPHA, 3 * ALPHA]
    assert_alike(mine, its, x)


def test_copies_of_model_and_optimizer_train_alike():
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    optimizer = folded(model, x, 1)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    other_optimizer.zero_grad()
    for _ in range(2):
        train_model(model, optimizer, x, 1)
        train_model(other, other_optimizer, x, 1)
    assert_trained_alike(model, other, x)
    assert alphas(model) == alphas(other) == [LARGER] * 2


def test_a_copy_that_is_folded_leaves_the_first_models_alpha_alone():
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    optimizer = optimizer_of(model)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    train_model(other, other_optimizer, x)
    assert alphas(model) == [ALPHA] * 2
    assert alphas(other) == [LARGER] * 2
    assert model.peft_config["default"].lora_alpha == other.peft_config["default"].lora_alpha == ALPHA
    train_model(model, optimizer, x)
    assert_trained_alike(model, other, x)


def test_a_compiled_model_sees_the_other_scaling():
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    mine, its = both_rules_on(model, x, steps=0, start_step=1)
    compiled = torch.compile(mine.model, backend="eager")
    train_model(compiled, mine.optimizer, x)
    train_model(*its, x)
    assert_alike(mine, its, x)
    with torch.no_grad():
        assert_near(output(compiled, x), output(its.model, x))


def test_the_users_own_config_does_not_change():
    """A second model made with it starts as the first one did."""
    config = LoraConfig(r=2, lora_alpha=ALPHA, target_modules=["0"])
    folded(get_peft_model(mlp(7, 5), config).double(), image(7))
    assert layer_scalings(get_peft_model(mlp(7, 5), config)) == [ALPHA / 2]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_are_taken_out_of_the_base(tmp_path, start):
    plain, x = mlp(7, 5, 4), image(7)
    runs = both_rules_on(adapted(plain, "0", "1", init_lora_weights=start), x)
    assert_alike(*runs, x)
    save_adapter(*runs[0], tmp_path)
    assert_loads(plain.double(), tmp_path, runs[0].model, x, tolerance=1e-6)  # PEFT's start is of float32


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_merge_and_unload_gives_the_same_outputs(name, zero):
    build, targets, inputs, config = CASES[name]
    model, x = adapted(build(), *targets, zero=zero, **config), inputs()
    for run in both_rules_on(model, x):
        with torch.no_grad():
            expected = output(run.model, x)
            assert_near(output(run.model.merge_and_unload(), x), expected)


def test_training_continues_after_unmerging():
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    runs = both_rules_on(model, x)
    for run in runs:
        run.model.merge_adapter()
        assert_step_refused(*run, RuntimeError, r"is merged into W.*\(2 layers: .*\.0, .*\.1\)")
        run.model.unmerge_adapter()
        train_model(*run, x)
    assert_alike(*runs, x)


@pytest.mark.parametrize("name", NAMES)
def test_disable_adapter_gives_the_pristine_bits_after_a_zero_product(name):
    build, targets, inputs, config = CASES[name]
    plain, x = build().double(), inputs()
    model = adapted(plain, *targets, **config)
    folded(model, x)
    with torch.no_grad():
        trained = output(model, x)
        with model.disable_adapter():
            assert torch.equal(output(model, x), output(plain, x))
        assert torch.equal(output(model, x), trained)
    assert not torch.equal(trained, output(plain, x))


@pytest.mark.parametrize("method", [None, "hooks"])
def test_the_base_comes_back_in_the_middle_of_a_schedule(method):
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1", zero=False)
    optimizer = folded(model, x, 5, update_ratio=SCHEDULES["ramp"])
    with torch.no_grad():
        trained = output(model, x)
        with optimizer.base_weights(method=method), model.disable_adapter():
            assert_near(output(model, x), output(plain, x))
        assert_near(output(model, x), trained)
    for layer, W in ((0, plain[0].weight), (1, plain[1].weight)):
        assert (model.base_model.model[layer].base_layer.weight - W).abs().max() > 1e-3


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize(
    ("name", "method"), [(name, m) for name in SOME for m in (None, "hooks") if m is None or name not in HOOKS_CAN_NOT]
)
def test_base_weights_computes_what_it_does_in_place(name, zero, method):
    build, targets, inputs, config = CASES[name]
    plain, x = build().double(), inputs()
    runs = both_rules_on(adapted(plain, *targets, zero=zero, **config), x)
    found = []
    for model, optimizer in runs:
        before, config = layer_scalings(model), copy.deepcopy(model.peft_config["default"])
        with torch.no_grad():
            trained = output(model, x)
            with optimizer.base_weights(method=method):
                found.append(output(model, x))
                with model.disable_adapter():
                    assert_near(output(model, x), output(plain, x))
            assert torch.equal(output(model, x), trained)
        assert (found[-1] - trained).abs().max() > 1e-3
        assert layer_scalings(model) == before
        assert model.peft_config["default"] == config
        train_model(model, optimizer, x)
    assert_near(*found)
    assert_alike(*runs, x)


def test_base_weights_before_step_k():
    model, x = adapted(mlp(7, 5), "0"), image(7)
    optimizer = folded(model, x, 2, start_step=3)
    with torch.no_grad():
        trained = output(model, x)
        with optimizer.base_weights():
            assert torch.equal(output(model, x), trained)


def refused_folded(model: nn.Module, *parts: str, **options) -> None:
    """The optimizer raises, with all of `parts` in this order, and has changed nothing."""
    before = alphas(model)
    with pytest.raises(ValueError, match="(?s)" + ".*".join(re.escape(part) for part in parts)):
        optimizer_of(model, **options)
    assert alphas(model) == before


def test_dropout_is_refused():
    model = adapted(mlp(7, 5), "0", lora_dropout=0.25)
    with pytest.raises(ValueError, match=r"base_model\.model\.0: it has lora_dropout=0\.25"):
        find_triples(model)
    refused_folded(model, "base_model.model.0: it has lora_dropout=0.25", "set lora_dropout=0")
    ways = "set lora_dropout=0", 'use weight_update="in_place" with allow_dropout=True'
    refused_folded(model, 'model.0: it has lora_dropout, which weight_update="folded"', *ways, allow_dropout=True)
    assert optimizer_of(model, weight_update="in_place", allow_dropout=True).step_count == 0


def test_a_bias_in_the_branch_is_refused():
    model = adapted(mlp(7, 5), "0", lora_bias=True)
    refused_folded(model, "model.0: its branch has a bias (lora_bias=True)", 'use weight_update="in_place"')


@tied_weights_are_meant
def test_a_tied_weight_is_refused():
    """In place the other user of W moves too, which no branch can do."""
    model = adapted(tiny_llama(tie_word_embeddings=True), "lm_head")
    refused_folded(model, "base_model.model.lm_head: ", 'use weight_update="in_place"', allow_tied=True)


def test_a_convolution_whose_branch_pads_otherwise_is_refused():
    """PEFT's branch pads with zeros always, so that it is no change of W."""
    model = adapted(nn.Sequential(nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular")), "0")
    refused_folded(model, "base_model.model.0: ", "padding_mode")


@pytest.mark.parametrize("allow_dropout", [False, True])
def test_dropout_that_is_set_later_is_refused_at_the_step(allow_dropout):
    model, x = adapted(mlp(7, 5), "0"), image(7)
    optimizer = folded(model, x, 1, allow_dropout=allow_dropout)
    model.base_model.model[0].lora_dropout["default"] = nn.Dropout(0.1)
    assert_step_refused(model, optimizer, RuntimeError, r"model\.0: it has lora_dropout=0\.1")


@pytest.mark.parametrize("start_step", [0, 2])
def test_dropout_that_is_set_before_step_k_is_not_folded(start_step):
    """Though it is allowed, as for in place."""
    model, x = adapted(mlp(7, 5), "0"), image(7)
    optimizer = folded(model, x, start_step, start_step=start_step, allow_dropout=True)
    model.base_model.model[0].lora_dropout["default"] = nn.Dropout(0.1)
    output(model, x).square().mean().backward()
    assert_step_refused(model, optimizer, RuntimeError, r"model\.0: it has lora_dropout")
    assert alphas(model) == [ALPHA]


RESCALED = {
    "set_scale": (lambda layer: layer.set_scale("default", 0.5), r"2\.0", r"5\.0"),
    "scale_layer": (lambda layer: layer.scale_layer(0.5), r"2\.0", r"5\.0"),
    "slightly": (
        lambda layer: layer.scaling.update(default=layer.scaling["default"] * (1 + 1e-6)),
        r"(4\.000004|4\.000003999\d+)",
        r"(10\.00001|10\.00000999\d+)",
    ),
}


@pytest.mark.parametrize("how", RESCALED)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_changed_scaling_is_refused(how, steps):
    rescale, *expected = RESCALED[how]
    model, x = adapted(mlp(7, 5), "0", lora_alpha=8), image(7)
    optimizer = folded(model, x, steps)
    output(model, x).square().mean().backward()
    rescale(model.base_model.model[0])
    was, now = ("10 when it was folded" if steps else "4 when it was registered"), expected[steps]
    match = rf"model\.0: its scaling was {was} and is {now} now.*build the optimizer again, or put the scaling back"
    assert_step_refused(model, optimizer, RuntimeError, match)


@pytest.mark.parametrize("ratio", [0.7, 1.5, 2.0])
@pytest.mark.parametrize("config", [{"r": 3, "lora_alpha": 5}, {"r": 3, "lora_alpha": 7, "use_rslora": True}])
@pytest.mark.parametrize("back", [lambda layer: layer.set_scale("default", 1.0), lambda layer: layer.unscale_layer()])
def test_a_scaling_that_peft_puts_back_is_accepted(config, ratio, back):
    """PEFT computes it from lora_alpha, in another order of operations."""
    model, x = adapted(mlp(7, 5), "0", **config), image(7)
    optimizer = folded(model, x, 1, update_ratio=ratio)
    (layer,) = lora_layers(model).values()
    layer.set_scale("default", 0.5)
    assert_step_refused(model, optimizer, RuntimeError, r"model\.0: its scaling was")
    back(layer)
    train_model(model, optimizer, x, 1)
    assert optimizer.step_count == 2


def with_larger_alpha(model: nn.Module) -> nn.Module:
    """A model with the very parameters of a folded one, and the larger alpha from its config."""
    other = adapted(mlp(7, 5, 4), "0", "1", lora_alpha=LARGER)
    other.load_state_dict({name: p.detach() for name, p in model.named_parameters()})
    return other


@pytest.mark.parametrize("mode", ["folded", "in_place"])
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
def test_a_second_optimizer_continues_from_the_present_scaling(inner, mode):
    """The first one still lives, and does not divide the second one's gradients, nor step."""
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    first = folded(model, x, inner=inner)
    with pytest.warns(
        UserWarning, match=r"an earlier optimizer .*model\.0 \(2\.5, now 6\.25\), .* the ratios multiply"
    ):
        second = optimizer_of(model, inner, update_ratio=0.5, weight_update=mode)
    other = with_larger_alpha(model)
    reference = optimizer_of(other, inner, update_ratio=0.5, weight_update="in_place")
    train_model(model, second, x)
    train_model(other, reference, x)
    assert_alike(Trained(model, second), Trained(other, reference), x)
    rescaled, claimed = (
        r"its scaling was .* when it was folded .*\(2 layers: .*\.0, ",
        r"\.0: another optimizer was built on",
    )
    with pytest.raises(RuntimeError, match=rescaled if mode == "folded" else claimed):
        first.step()
    assert first.step_count == 3
    train_model(model, second, x)
    train_model(other, reference, x)
    assert_alike(Trained(model, second), Trained(other, reference), x)


def test_a_second_optimizer_after_the_first_one_is_gone():
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    folded(model, x)
    other = with_larger_alpha(model)
    for run in (model, other):
        train_model(run, torch.optim.SGD([p for p in run.parameters() if p.requires_grad], lr=0.1), x)
    assert_trained_alike(model, other, x)


def test_triples_made_by_hand_in_a_peft_layer():
    """The layer's scaling by its place: the output is right, PEFT's alpha does not follow."""
    model, x = adapted(mlp(7, 5), "0"), image(7)

    def by_hand(layer: nn.Module) -> LoRATriple:
        A, B = (layer, "lora_B.default.weight"), (layer, "lora_A.default.weight")
        set_scaling = lambda value: layer.scaling.update(default=value)  # noqa: E731
        return LoRATriple((layer, "base_layer.weight"), A, B, layer.scaling["default"], "0", set_scaling=set_scaling)

    def make(twin: nn.Module, **options) -> DeltaLoRAOptimizer:
        return DeltaLoRAOptimizer(
            torch.optim.AdamW, [by_hand(twin.base_model.model[0])], lr=2e-2, update_ratio=FOLDED_RATIO, **options
        )

    assert_alike(*both_rules_on(model, x, make=make), x)


def test_an_embedding_that_rewrites_its_rows_is_refused():
    model = adapted(nn.Sequential(nn.Embedding(9, 5, max_norm=1.0)), "0")
    with pytest.raises(ValueError, match=r"its embedding has max_norm.*weight_update=\"in_place\""):
        optimizer_of(model)


def test_the_triples_of_a_part_of_a_model():
    """Where no config is in sight, the layers alone are scaled."""
    model, x = adapted(mlp(7, 5), "0"), image(7)
    optimizer = optimizer_of(model.base_model.model[0])
    train_model(model, optimizer, x, 2)
    assert alphas(model) == [LARGER]
    assert model.peft_config["default"].lora_alpha == ALPHA
