"""The changes of layers, against dense float64 matrices, and what the figures show of them."""

import copy
import json
import sys

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer
from deltaopt.analysis import History, LayerChange, dense_changes, layer_changes, plot_cosines, plot_history, plot_ranks
from deltaopt.analysis.plots import place_of
from tests.support.internals import keep_few_terms
from tests.support.strategies import each_rule
from tests.unit.test_metrics import RATIO, SCALING, Layer, random_steps


def cosine(W: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(W.flatten(), other.flatten(), 0))


def effective_rank(matrix: Tensor) -> float:
    p = torch.linalg.svdvals(matrix)
    p = p / p.sum(-1, keepdim=True)
    return float(torch.exp(-(p * p.clamp_min(1e-300).log()).sum(-1)).mean())


def trained(rule: str, *layers: Layer, **settings) -> DeltaLoRAOptimizer:
    optimizer = DeltaLoRAOptimizer(
        torch.optim.AdamW,
        [layer.triple for layer in layers],
        lr=0.05,
        update_ratio=RATIO,
        weight_update=rule,
        **settings,
    )
    random_steps(optimizer, 6)
    return optimizer


@each_rule
def test_the_figures_of_a_layer_are_those_of_dense_matrices(rule):
    layers = [Layer("q", 7, 5), Layer("value", 4, 9), Layer("experts", 3, 5, 6)]
    optimizer = trained(rule, *layers)
    for layer, change in zip(layers, layer_changes(optimizer), strict=True):
        D, AB = layer.asked(), SCALING * layer.product()
        assert change.name == layer.triple.label
        whole = D + AB
        found = torch.tensor(change[1:8], dtype=torch.float64)
        expected = [
            float(layer.base.norm()),
            float(D.norm()),
            float(AB.norm()),
            float(whole.norm()),
            cosine(layer.base + whole, layer.base),
            cosine(layer.base + D, layer.base),
            effective_rank(whole),
        ]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)
        # The change is a sum of A_t B_t and A_K B_K: of rank 2 r, or of the smaller side.
        assert change.numerical_rank == int(torch.linalg.matrix_rank(whole).max())


def test_plain_lora_is_given_by_its_triples():
    layer = Layer("q", 7, 5)
    changes = layer_changes([layer.triple])
    (change,) = changes
    AB = SCALING * layer.product()
    assert (change.weight_norm, change.weight_cosine) == (0.0, pytest.approx(1.0, abs=1e-14))
    assert change.change_norm == pytest.approx(float(AB.norm()), rel=1e-12)
    assert change.cosine == pytest.approx(cosine(layer.base + AB, layer.base), rel=1e-12)
    assert change.numerical_rank == 3


def test_nothing_has_changed_at_loras_start():
    layer = Layer("q", 7, 5, zero=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [layer.triple], lr=0.1)
    (change,) = layer_changes(optimizer)
    assert change[2:5] == (0.0, 0.0, 0.0)
    assert change[7:] == (None, None)


def test_a_change_that_is_kept_as_a_matrix_has_no_rank(monkeypatch):
    keep_few_terms(monkeypatch)
    layer = Layer("q", 7, 5)
    optimizer = DeltaLoRAOptimizer(
        torch.optim.AdamW, [layer.triple], lr=0.05, update_ratio=lambda step: 0.1 + 0.2 * step
    )
    random_steps(optimizer, 8)
    assert optimizer.weights()[0].ledger.is_matrix
    (change,) = layer_changes(optimizer)
    D = layer.W - layer.base
    assert change.weight_norm == pytest.approx(float(D.norm()), rel=1e-10)
    assert change.change_norm == pytest.approx(float((D + SCALING * layer.product()).norm()), rel=1e-10)
    assert change[7:] == (None, None)


@pytest.mark.parametrize("given", [torch.zeros(3), nn.Linear(2, 2), [], [3], None])
def test_what_has_no_layers_is_refused(given):
    with pytest.raises(TypeError, match="expected a DeltaLoRAOptimizer"):
        layer_changes(given)


def test_fine_tuning_is_given_by_two_models():
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(2, 3, 3), nn.LayerNorm(4)).double()
    after = copy.deepcopy(before)
    left, right = torch.randn(4, 2).double(), torch.randn(2, 6).double()
    with torch.no_grad():
        after[0].weight += left @ right
        after[0].bias += 1
    linear, conv = dense_changes(before, after)
    assert (linear.name, linear.numerical_rank, linear.branch_norm) == ("0.weight", 2, 0.0)
    assert linear.change_norm == linear.weight_norm == pytest.approx(float((left @ right).norm()), rel=1e-12)
    assert linear.cosine == pytest.approx(cosine(after[0].weight.detach(), before[0].weight.detach()), rel=1e-12)
    assert linear.effective_rank == pytest.approx(effective_rank(left @ right), rel=1e-9)
    assert (conv.name, conv.change_norm, conv.effective_rank) == ("1.weight", 0.0, None)
    assert dense_changes(before.state_dict(), after.state_dict(), ["0.weight"]) == [linear]
    with pytest.raises(ValueError, match=r"2\.wight cannot be compared"):
        dense_changes(before, after, ["2.wight"])


@each_rule
def test_a_history_notes_norms_and_can_be_kept_in_a_file(rule):
    layers = [Layer("q", 7, 5), Layer("value", 4, 9)]
    optimizer = DeltaLoRAOptimizer(
        torch.optim.AdamW, [layer.triple for layer in layers], lr=0.05, update_ratio=RATIO, weight_update=rule
    )
    history, norms = History(optimizer), []
    for seed in range(3):
        random_steps(optimizer, 2, seed)
        history.record()
        norms.append([float(layer.asked().norm()) for layer in layers])
    assert history.steps == [2, 4, 6]
    for i, values in enumerate(history.series("weight_norm").values()):
        assert values == pytest.approx([row[i] for row in norms], rel=1e-10)
    read = History.from_dict(json.loads(json.dumps(history.as_dict())))
    assert (read.steps, read.changes) == (history.steps, history.changes)
    with pytest.raises(RuntimeError, match=r"History\(optimizer\)"):
        read.record()
    with pytest.raises(ValueError, match=r"figure is one of base_norm, .*got 'loss'"):
        read.series("loss")


def test_places_of_layers():
    assert place_of("bert.encoder.layer.3.attention.self.query.weight") == (3, "attention.self.query")
    assert place_of("base_model.model.transformer.h.11.attn.c_attn") == (11, "attn.c_attn")
    assert place_of("base_model.model.classifier") == (None, "classifier")
    assert place_of("weight") == (None, "weight")


def changes(prefix: str, value: float, kinds=("q", "v"), blocks: int = 4) -> list[LayerChange]:
    return [
        LayerChange(f"{prefix}.{i}.{kind}", 2.0, 1.0, 1.0, 1.0, value + i / 10, value, 3.5, 4)
        for i in range(blocks)
        for kind in kinds
    ]


def lines(figure) -> dict[str, dict[str, list[float]]]:
    return {
        axis.get_title(): {line.get_label(): [float(y) for y in line.get_ydata()] for line in axis.get_lines()}
        for axis in figure.get_axes()
    }


@pytest.mark.extra
def test_the_papers_figure_in_one_call(tmp_path):
    runs = {
        "fine-tuning": changes("encoder.layer", 0.5, ("q", "k", "v")),
        "Delta-LoRA": changes("base_model.model.encoder.layer", 0.7),
    }
    figure = plot_cosines(runs)
    expected = {
        run: pytest.approx([start + i / 10 for i in range(4)]) for run, start in zip(runs, (0.5, 0.7), strict=True)
    }
    assert lines(figure) == {"q": expected, "v": expected}
    assert [list(line.get_xdata()) for line in figure.get_axes()[0].get_lines()] == [[0, 1, 2, 3]] * 2
    assert lines(plot_cosines(runs, kinds=["v"], weight=True)) == {
        "v": {"fine-tuning": [0.5] * 4, "Delta-LoRA": [0.7] * 4}
    }
    assert lines(plot_ranks(runs, ["q"])) == {"q": dict.fromkeys(runs, [3.5] * 4)}
    assert lines(plot_ranks(runs, ["q"], numerical=True)) == {"q": dict.fromkeys(runs, [4.0] * 4)}
    figure.savefig(tmp_path / "cosines.png")
    assert (tmp_path / "cosines.png").stat().st_size > 1000


@pytest.mark.extra
def test_the_figure_of_a_history(tmp_path):
    layer = Layer("q", 7, 5)
    optimizer = trained("in_place", layer)
    history = History(optimizer)
    history.record()
    (drawn,) = lines(plot_history(history)).values()
    assert drawn == {"q": [pytest.approx(float(layer.asked().norm() / layer.base.norm()), rel=1e-10)]}
    with pytest.raises(ValueError, match=r"call history\.record\(\)"):
        plot_history(History(optimizer))


@pytest.mark.extra
@pytest.mark.parametrize(
    ("runs", "kinds", "message"),
    [
        ({}, None, "runs is empty"),
        (
            {"a": changes("h", 0.5, ("q",)), "b": changes("h", 0.5, ("v",))},
            None,
            "no kind of layer in common .a: q; b: v",
        ),
        ({"a": changes("h", 0.5)}, ["k"], "no layer of 'a' ends with 'k': it has q, v"),
        ({"a": []}, None, "no kind of layer in common"),
    ],
)
def test_runs_that_cannot_be_drawn_together(runs, kinds, message):
    with pytest.raises(ValueError, match=message):
        plot_cosines(runs, kinds)


def test_matplotlib_is_asked_for_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        plot_cosines({"a": changes("h", 0.5)})
