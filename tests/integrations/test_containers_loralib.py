"""loralib's layers: found, followed, saved, exported; and their merging in evaluation."""

import re

import pytest
import torch
from torch import nn

import deltaopt
from deltaopt import export_adapter, find_triples
from tests.support import containers
from tests.support.compare import assert_same_bits, bits, relative, same, through_a_file
from tests.support.containers import each_rule, optimizer_for, train
from tests.support.loralib_layers import CASES, images, loralib, rows

pytestmark = pytest.mark.extra

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
@each_rule
def test_follows_the_dense_loop(case, rule):
    containers.check_follows(case, rule)


@each_case
def test_moves_a_16_bit_weight(case):
    containers.check_16_bits(case)


@each_case
@each_rule
def test_resumes_bit_for_bit(case, rule):
    containers.check_resumes(case, rule)


@each_case
@each_rule
def test_copies_and_states_are_the_trained_model(case, rule):
    containers.check_leaves(case, rule)


@each_case
@each_rule
def test_exports(case, rule):
    containers.check_exports(case, rule)


@each_rule
def test_refuses_dropout(rule):
    def set_dropout(model):
        model[0].lora_dropout = nn.Dropout(0.25)

    match = r"0: it has lora_dropout=0\.25, .*section 4\.2.*set lora_dropout=0, or pass allow_dropout=True"
    containers.check_dropout(CASES["linear"], rule, set_dropout, match)


def evaluate(model, x):
    """What training loops do between steps: loralib merges the branches, and takes them out again."""
    model.eval()
    with torch.no_grad():
        output = model(x)
    model.train()
    return output


@each_case
@each_rule
def test_evaluation_between_steps_changes_nothing_but_rounding(case, rule):
    """Merging in float64 rounds W to 1e-16: before the first move of W, between moves, and after them."""
    plain, model = case.model(), case.model()
    expected, optimizer = optimizer_for(plain, rule), optimizer_for(model, rule)
    for t in range(8):
        train(case, plain, expected, range(t, t + 1))
        train(case, model, optimizer, range(t, t + 1))
        assert relative(evaluate(model, case.x), plain(case.x)) <= 1e-12
    assert relative(model(case.x), plain(case.x)) <= 1e-12
    for name in case.names:
        assert relative(optimizer.displacement(name).product(), expected.displacement(name).product()) <= 1e-12
    pristine = case.model()
    with optimizer.base_weights():
        for name, (W, _) in case.deltas(model).items():
            assert relative(W, case.deltas(pristine)[name][0]) <= 1e-12


@each_rule
def test_a_run_that_was_evaluated_resumes_with_its_bits(rule):
    case = CASES["linear"]
    whole, second = case.model(), case.model()
    optimizer = optimizer_for(whole, rule)
    for t in range(5):
        train(case, whole, optimizer, range(t, t + 1))
        evaluate(whole, case.x)
    second.load_state_dict(whole.state_dict())
    resumed = optimizer_for(second, rule)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    train(case, whole, optimizer, range(5, 8))
    train(case, second, resumed, range(5, 8))
    assert same(dict(whole.named_parameters()), dict(second.named_parameters()))


@pytest.mark.parametrize("first", [0, 3])
def test_a_run_resumes_from_the_factors_unless_it_was_evaluated_before_its_first_move(first):
    case = CASES["linear"]
    model, second = case.model(), case.model()
    optimizer = optimizer_for(model, start_step=first)
    for t in range(6):
        train(case, model, optimizer, range(t, t + 1))
        evaluate(model, case.x)
    factors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    second.load_state_dict(factors, strict=False)
    resumed, state = optimizer_for(second, start_step=first), through_a_file(optimizer.state_dict())
    if first == 0:
        resumed.load_state_dict(state)
        assert relative(second(case.x), model(case.x)) <= 1e-12
    else:
        with pytest.raises(deltaopt.WeightMismatchError, match="Load the model's weights"):
            resumed.load_state_dict(state)
        second.load_state_dict(model.state_dict())  # the way out
        resumed.load_state_dict(state)
        assert torch.equal(second(case.x), model(case.x))


MERGED = r"(?s)the branch is merged into W, .*: loralib's eval\(\) did that, .* call model\.train\(\)"


@each_rule
def test_while_it_is_merged_steps_and_saving_are_refused(rule):
    case = CASES["linear"]
    model = case.model()
    optimizer = optimizer_for(model, rule)
    train(case, model, optimizer, range(4))
    model.eval()
    before = bits(model)
    for action in (optimizer.step, optimizer.state_dict, lambda: optimizer.base_weights().__enter__()):
        with pytest.raises(RuntimeError, match=MERGED):
            action()
    with pytest.raises(ValueError, match=MERGED):
        optimizer_for(model, rule)
    assert_same_bits(model, before)
    model.train()  # the way out
    train(case, model, optimizer, range(4, 6))


@each_case
def test_what_is_read_while_it_is_merged_is_right_or_refused(case):
    model = case.model()
    optimizer = optimizer_for(model)
    train(case, model, optimizer, range(4))
    exported, merged = export_adapter(optimizer), deltaopt.merged_weights(optimizer)
    model.eval()
    again = export_adapter(optimizer)
    for triple in optimizer.triples:
        name = triple.label
        assert relative(again[name].product(), exported[name].product()) <= 1e-12
        assert relative(triple.W, merged[name]) <= 1e-12
    with pytest.raises(RuntimeError, match=MERGED):
        deltaopt.merged_weights(optimizer)


def test_a_16_bit_weight_that_evaluation_rounds_is_named():
    model = CASES["linear"].model().to(torch.bfloat16)
    advice = r"2 layers \(0, 2\) merge .* in evaluation .* 16 bits .* layer\.merge_weights = False"
    with pytest.warns(UserWarning, match=advice):
        find_triples(model)
    for layer in model.modules():
        layer.merge_weights = False
    find_triples(model)
    before = bits(model)
    evaluate(model, rows.to(torch.bfloat16))
    assert_same_bits(model, before)


def test_unknown_layers_are_refused_together():
    class Mine(nn.Module, loralib.LoRALayer):
        def __init__(self):
            super().__init__()
            loralib.LoRALayer.__init__(self, 2, 2, 0.0, True)
            self.lora_A = nn.Parameter(torch.zeros(2, 3))

    model = nn.Sequential(
        loralib.Conv2d(4, 4, 3, r=2, groups=2),
        loralib.Conv1d(4, 5, 3, r=2),
        loralib.Embedding(4, 5, r=2, max_norm=1.0),
        Mine(),
        loralib.Conv2d(4, 4, 3, r=2).to(memory_format=torch.channels_last),
        loralib.Linear(4, 4, r=2),
        loralib.Linear(4, 4),
    )
    with pytest.raises(ValueError, match="these loralib layers cannot be used") as refused:
        find_triples(model)
    expected = {
        "0": "it is a Conv2d with groups=2",
        "1": r"it is a Conv1d with kernel_size=\(3,\): .* so its own forward pass fails too",
        "2": "it has max_norm, with which loralib's forward pass rewrites lora_A",
        "3": r"Mine is no class of loralib itself: .* lora_triples\(self\)",
        "4": r"stored in channels_last.*model\.to\(memory_format=torch\.contiguous_format\)",
    }
    lines = str(refused.value).splitlines()[1:]
    assert len(lines) == len(expected)
    for line, (name, sentence) in zip(lines, expected.items(), strict=True):
        assert re.search(rf"^  {name}: .*{sentence}", line), line
    with pytest.raises(RuntimeError, match="shape"):
        model[1](images[:, :, 0].float())


def test_a_forward_pass_of_ones_own_is_refused_and_a_subclass_without_one_is_taken():
    class Twice(loralib.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(loralib.Linear):
        pass

    with pytest.raises(ValueError, match=r"0: Twice has a forward pass of its own.*lora_triples"):
        find_triples(nn.Sequential(Twice(7, 5, r=2)))
    assert len(find_triples(nn.Sequential(Named(7, 5, r=2)))) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_a_layer_without_a_branch_is_left_out(count):
    model = nn.Sequential(loralib.Linear(4, 4), *[loralib.Linear(4, 4, r=2)] * count)
    if count:
        assert [triple.label for triple in find_triples(model)] == ["1"]
        assert [triple.label for triple in find_triples(model[1])] == ["Linear"]
    else:
        with pytest.raises(ValueError, match="no LoRA layer in this Sequential"):
            find_triples(model)


@each_case
def test_a_state_of_the_factors_alone_says_so(case):
    model = case.model()
    optimizer = optimizer_for(model)
    loralib.lora_state_dict(model)
    train(case, model, optimizer, range(4))
    with pytest.warns(UserWarning, match=r"lora_state_dict returns the adapter alone, but .* moved the weights"):
        loralib.lora_state_dict(model)
