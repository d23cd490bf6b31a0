"""The drift benchmark measures what it says, compares like with like, and continues where it stopped."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import drift
from benchmarks.drift import DENSE, Setting, main, make_layers, settings, summary, train

CPU = torch.device("cpu")
TINY_SETTING = Setting("nearest", steps=60, rank=4, shapes=((24, 256), (40, 320), (32, 256)), feedback=False)


@pytest.fixture(autouse=True)
def _few_examples(monkeypatch):
    monkeypatch.setattr(drift, "EXAMPLES", 64)


def test_all_that_was_asked_for_landed():
    D = torch.randn(5, 7)
    assert drift.drift(D, D) == (1.0, 0.0)


def test_nothing_landed():
    D = torch.randn(5, 7)
    assert drift.drift(torch.zeros(5, 7), D) == (0.0, 1.0)


def test_what_is_across_the_displacement_is_error_and_not_kept():
    D, across = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert drift.drift(0.5 * D + across, D) == pytest.approx((0.5, math.hypot(1.5, 4) / 3))


def test_small_differences_of_16_bit_weights_are_measured_in_float64():
    D = torch.full((4, 4), 2.0**-40, dtype=torch.float64)
    assert drift.drift(D * (1 + 2.0**-30), D).kept == 1 + 2.0**-30


def test_summary_over_layers():
    rows = [{"step": 9, "kept": [0.9, 1.0, 1.2], "error": [0.1, 0.2, 0.6], "kept_with_remainder": [1.0, 1.0, 1.3]}]
    s = summary({"layers": ["a", "b", "c"], "checkpoints": rows})
    standard_error = math.sqrt((0.4**2 + 0.1**2 + 0.5**2) / 9 / 2 / 3)
    assert (s.worst, s.worst_kept) == ("c", 1.2)
    assert s.kept == pytest.approx(3.1 / 3)
    assert s.standard_error == pytest.approx(standard_error)
    assert s.distance == pytest.approx(0.1 / 3 / standard_error)
    assert (s.error, s.kept_with_remainder) == pytest.approx((0.3, 1.1))


def test_checkpoints_end_with_the_last_step():
    assert drift.checkpoints(400) == [1, 2, 5, 10, 20, 50, 100, 200, 400]
    assert drift.checkpoints(10) == [1, 2, 5, 10]
    assert drift.checkpoints(1) == [1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stochastic_and_compensated_keep_what_nearest_loses(dtype):
    setting = replace(TINY_SETTING, dtype=dtype, std=0.02 if dtype == "bfloat16" else 0.1)
    nearest, stochastic, compensated = (
        summary(train(replace(setting, method=method), CPU)) for method in drift.ROUNDINGS
    )
    assert nearest.kept < 0.5
    assert stochastic.kept == pytest.approx(1, abs=max(0.03, 4 * stochastic.standard_error))
    assert compensated.kept > 0.7  # of the bits alone: many elements were asked to move by less than half a spacing
    assert compensated.kept_with_remainder == pytest.approx(1, abs=1e-4)
    assert nearest.error > compensated.error


def test_same_factors_whatever_the_rounding():
    asked = [
        train(replace(TINY_SETTING, method=m), CPU)["checkpoints"][-1]["asked_rms"] for m in (*drift.ROUNDINGS, DENSE)
    ]
    assert asked[0] == asked[1] == asked[2] == pytest.approx(asked[3], rel=1e-6)


def weights_after(setting, steps=5):
    layers = make_layers(setting, CPU)
    method = (drift.DensePattern if setting.method == DENSE else drift.Delta)(layers, setting)
    for _ in range(steps):
        method.optimizer.zero_grad()
        sum(layer.loss(torch.arange(8), setting) for layer in layers).backward()
        method.step()
    return [layer.W for layer in layers], list(method.displacements()), layers


def test_dense_pattern_moves_a_float64_weight_as_the_optimizer_does():
    setting = replace(TINY_SETTING, dtype="float64", factors="float64", lr=1e-3, feedback=True)
    (W, D, layers), (dense_W, dense_D, _) = (weights_after(replace(setting, method=m)) for m in ("nearest", DENSE))
    for ours, theirs, asked, asked_of_them, layer in zip(W, dense_W, D, dense_D, layers, strict=True):
        assert not torch.equal(ours, layer.W_0)
        torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(asked_of_them, asked, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(ours - layer.W_0, asked, rtol=1e-9, atol=1e-14)


def test_without_feedback_the_forward_pass_has_what_w_was_asked_to_be():
    setting = replace(TINY_SETTING, dtype="float64", factors="float64", lr=1e-3)
    _, _, (layer, *_) = weights_after(setting)
    batch = torch.arange(16)
    torch.testing.assert_close(layer.loss(batch, setting), layer.loss(batch, replace(setting, feedback=True)))


def test_settings_are_all_different_and_vary_one_thing():
    groups = settings()
    every = [setting for group in groups.values() for setting in group]
    assert len(set(every)) == len(every)
    assert len(groups["reference"]) == 10
    for name, group in groups.items():
        changes = drift.VARIATIONS[name]
        undone = {key: getattr(Setting("nearest"), key) for key in changes}
        assert all(replace(setting, **undone) in groups["reference"] for setting in group)


TWO_GROUPS = {
    "reference": [replace(TINY_SETTING, method=method, steps=3) for method in (*drift.ROUNDINGS, DENSE)],
    "longer": [replace(TINY_SETTING, method=method, steps=6) for method in drift.ROUNDINGS],
}


def test_writes_a_row_for_every_setting_and_resumes(tmp_path, capsys, monkeypatch):
    out = tmp_path / "drift.json"
    main(["--out", str(out)], TWO_GROUPS)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(printed) == 1 + 7
    written = json.loads(out.read_text())
    methods = [entry["setting"]["method"] for entry in written["results"]]
    assert methods == [*drift.ROUNDINGS, DENSE, *drift.ROUNDINGS]
    assert written["machine"]["torch"] == torch.__version__
    assert out.with_suffix(".png").stat().st_size > 0

    runs = []
    monkeypatch.setattr(drift, "train", lambda setting, device: runs.append(setting) or train(setting, device))
    main(["--out", str(out)], TWO_GROUPS)
    again = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert (runs, again) == ([], printed)

    written["results"] = written["results"][1:]
    written["results"][0]["environment"]["torch"] = "another"
    out.write_text(json.dumps(written))
    main(["--out", str(out)], TWO_GROUPS)
    assert runs == TWO_GROUPS["reference"][:2]
    assert len(json.loads(out.read_text())["results"]) == 7

    main(["--out", str(out), "--fresh"], {"reference": TWO_GROUPS["reference"][:1]})
    assert runs[2:] == TWO_GROUPS["reference"][:1]


def test_no_matplotlib_no_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main(["--out", str(tmp_path / "drift.json")], {"reference": TWO_GROUPS["reference"][:1]})
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "drift.png").exists()


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(drift, "train", None)
    with pytest.raises(SystemExit, match="2"):
        drift.main(["--out", str(tmp_path)])
    assert "is a folder, expected a file" in capsys.readouterr().err
