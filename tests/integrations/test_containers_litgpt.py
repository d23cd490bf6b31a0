"""litgpt's layers: found, followed, saved, exported, also within its GPT."""

import itertools

import pytest
import torch
from torch import nn

import deltaopt
from deltaopt import find_triples
from tests.support import containers
from tests.support.containers import Case, each_rule, optimizer_for, train

lora = pytest.importorskip("litgpt.lora", reason="runs where litgpt is installed")
pytestmark = pytest.mark.extra

rows = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def build(*layers):
    model = nn.Sequential(*layers)
    lora.mark_only_lora_as_trainable(model)
    return model


def linear_case():
    def deltas(model):
        layers = {"0": model[0], "2": model[2]}
        return {name: (x.linear.weight, x.scaling * x.lora_B @ x.lora_A) for name, x in layers.items()}

    def layers():
        return build(
            lora.LoRALinear(7, 5, r=3, lora_alpha=2, bias=True), nn.Tanh(), lora.LoRALinear(5, 4, r=2, lora_alpha=3)
        )

    return Case(layers, rows, ["0", "2"], deltas)


def qkv_case(enable_lora, groups):
    """4 heads of size 3; as many rows of q, and 3 * groups of k and of v."""
    sizes = dict(zip("qkv", (12, 3 * groups, 3 * groups), strict=True))
    letters = [letter for letter, enabled in zip("qkv", enable_lora, strict=True) if enabled]
    first = {"q": 0, "k": 12, "v": 12 + 3 * groups}

    def deltas(model):
        layer = model[0]
        W, B = layer.linear.weight, layer.lora_B.split([sizes[letter] for letter in letters])
        return {
            f"0.{letter}": (W[first[letter] : first[letter] + sizes[letter]], layer.scaling * b @ a)
            for letter, b, a in zip(letters, B, layer.lora_A.split(2), strict=True)
        }

    def layer():
        options = {"head_size": 3, "n_head": 4, "n_query_groups": groups, "r": 2, "lora_alpha": 3, "bias": True}
        return build(lora.LoRAQKVLinear(7, sum(sizes.values()), enable_lora=enable_lora, **options))

    return Case(layer, rows, [f"0.{letter}" for letter in letters], deltas)


SUBSETS = {
    "".join(letter for letter, enabled in zip("qkv", enabled, strict=True) if enabled): enabled
    for enabled in itertools.product((True, False), repeat=3)
    if any(enabled)
}
CASES = {
    "linear": linear_case(),
    **{f"{name}_of_{groups}": qkv_case(enabled, groups) for name, enabled in SUBSETS.items() for groups in (2, 4)},
}
FEW = {name: CASES[name] for name in ("linear", "qv_of_2", "qkv_of_4")}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
some_cases = pytest.mark.parametrize("case", FEW.values(), ids=FEW)


@each_case
@each_rule
def test_follows_the_dense_loop(case, rule):
    containers.check_follows(case, rule)


@some_cases
def test_moves_a_16_bit_weight(case):
    containers.check_16_bits(case)


@some_cases
@each_rule
def test_resumes_bit_for_bit(case, rule):
    containers.check_resumes(case, rule)


@some_cases
@each_rule
def test_copies_and_states_are_the_trained_model(case, rule):
    containers.check_leaves(case, rule)


@some_cases
@each_rule
def test_exports(case, rule):
    containers.check_exports(case, rule)


@each_rule
def test_refuses_dropout(rule):
    def set_dropout(model):
        model[0].lora_dropout = nn.Dropout(0.25)

    match = r"0: it has lora_dropout=0\.25, .*section 4\.2.*set lora_dropout=0, or pass allow_dropout=True"
    containers.check_dropout(CASES["linear"], rule, set_dropout, match)


@each_rule
def test_a_merged_model_is_refused_with_the_way_out(rule):
    case = CASES["linear"]
    model = case.model()
    optimizer = optimizer_for(model, rule)
    train(case, model, optimizer, range(3))
    for layer in (model[0], model[2]):
        layer.merge()
    match = r"(?s)merged into W, .*: litgpt's merge\(\) has no way back\. Load the weights and the factors again"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    with pytest.raises(ValueError, match=match):
        optimizer_for(model, rule)


def test_a_forward_pass_of_ones_own_is_refused():
    class Twice(lora.LoRALinear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match=r"0: Twice has a forward pass of its own.*lora_triples"):
        find_triples(build(Twice(7, 5, r=2)))


def test_a_model_whose_weights_still_train_is_refused():
    model = nn.Sequential(*[lora.LoRALinear(7, 7, r=3) for _ in range(400)])
    with pytest.raises(ValueError, match=r"litgpt\.lora\.mark_only_lora_as_trainable\(model\) first") as refused:
        find_triples(model)
    assert len(str(refused.value).splitlines()) == 2
    assert len(str(refused.value)) < 400
    lora.mark_only_lora_as_trainable(model)
    assert len(find_triples(model)) == 400


def test_rows_that_are_not_consecutive_are_several_triples():
    """Each group has its own q, k and v, as in older versions: 2 groups of 2 q, 1 k and 1 v, of size 3."""

    class Interleaved(lora.LoRAQKVLinear):
        @property
        def lora_ind(self):
            return torch.tensor([*range(6), *range(12, 18), *range(9, 12), *range(21, 24)])

    def layer():
        options = {"head_size": 3, "n_head": 4, "n_query_groups": 2, "r": 2, "lora_alpha": 3}
        return build(Interleaved(7, 24, enable_lora=(True, False, True), **options))

    places = {"q.0": (0, 0, 6, 0), "q.1": (6, 12, 18, 0), "v.0": (12, 9, 12, 2), "v.1": (15, 21, 24, 2)}

    def deltas(model):
        x = model[0]
        W, B, A = x.linear.weight, x.lora_B, x.lora_A
        return {
            f"0.{name}": (W[start:stop], x.scaling * B[row : row + stop - start] @ A[a : a + 2])
            for name, (row, start, stop, a) in places.items()
        }

    containers.check_follows(Case(layer, rows, [f"0.{name}" for name in places], deltas), "in_place")


@each_rule
def test_a_gpt_trains_and_merges(rule):
    """The whole model: fused attention with query groups, projections and the MLP."""
    config = lora.Config(
        block_size=8,
        vocab_size=19,
        padded_vocab_size=19,
        n_layer=2,
        n_embd=12,
        n_head=4,
        n_query_groups=2,
        intermediate_size=10,
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        lora_r=2,
        lora_alpha=4,
        lora_query=True,
        lora_value=True,
        lora_mlp=True,
    )
    torch.manual_seed(0)
    model = lora.GPT(config).double()
    lora.mark_only_lora_as_trainable(model)
    optimizer = optimizer_for(model, rule)
    attention = [f"transformer.h.{i}.attn.qkv.{letter}" for i in range(2) for letter in "qv"]
    labels = [triple.label for triple in optimizer.triples]
    assert set(attention) <= set(labels)
    assert len(labels) == 2 * (2 + 3)
    ids = torch.arange(16).view(2, 8)
    for _ in range(5):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()
    trained, weights = model(ids), deltaopt.merged_weights(optimizer)
    lora.merge_lora_weights(model)
    torch.testing.assert_close(model(ids), trained, rtol=0, atol=1e-12)
    for i in range(2):
        merged = model.transformer.h[i].attn.qkv.linear.weight
        torch.testing.assert_close(merged, weights[attention[2 * i]], rtol=0, atol=1e-12)


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = build(lora.LoRAQKVLinear(7, 24, head_size=3, n_head=4, n_query_groups=2, r=2, enable_lora=True))
    with pytest.raises(ValueError, match=r"0: its weight is on the meta device, .*: load the weights first"):
        find_triples(model)


ALONE = r"{} the adapter alone, but Delta-LoRA has moved the weights .* Save all weights with model\.state_dict\(\)"


@pytest.mark.parametrize("name", ["linear", "qv_of_2"])
def test_a_checkpoint_of_the_factors_alone_says_so(name, tmp_path):
    lightning = pytest.importorskip("lightning", reason="runs where lightning is installed")
    scripts = pytest.importorskip("litgpt.finetune.lora", reason="runs where litgpt is installed")
    fabric, case = lightning.Fabric(accelerator="cpu", devices=1), FEW[name]
    model = case.model()
    optimizer = optimizer_for(model)
    scripts.save_lora_checkpoint(fabric, model, tmp_path / "before")
    train(case, model, optimizer, range(4))
    fabric.save(tmp_path / "whole", {"model": model})
    with pytest.warns(UserWarning, match=ALONE.format("save_lora_checkpoint writes")):
        scripts.save_lora_checkpoint(fabric, model, tmp_path / "factors")
