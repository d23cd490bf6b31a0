"""The step benchmark measures what it says: equal work in the rows that are compared, and real peaks of memory."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import step_overhead
from benchmarks.memory import peak_allocation
from benchmarks.step_overhead import (
    NARROW,
    PARTS,
    RATIOS,
    ROWS,
    WIDE,
    Case,
    main,
    make_layers,
    make_weights,
    ratios_of,
    rows_of,
)

MIB = 1 << 20
NUMBERS = 64  # bytes of Python numbers, which become tensors in an expression
CASE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TINY_CASES = tuple(Case("tiny", 3, 48, 40, 2, dtype) for dtype in CASE_DTYPES)


def test_peak_of_one_tensor():
    assert peak_allocation(lambda: torch.empty(MIB)) == 4 * MIB


def test_peak_counts_what_lives_at_the_same_time():
    def nested() -> None:
        outer = torch.empty(MIB)
        outer.copy_(torch.empty(2 * MIB)[:MIB])  # gone after this line
        torch.empty(MIB)

    assert peak_allocation(nested) == 12 * MIB


def test_peak_is_not_the_sum_of_temporaries():
    def in_turn() -> None:
        for _ in range(5):
            torch.empty(MIB)

    assert peak_allocation(in_turn) == 4 * MIB


def test_peak_sees_the_temporaries_inside_an_expression():
    a = torch.ones(MIB)
    assert 8 * MIB <= peak_allocation(lambda: 2 * (a - a * a)) < 8 * MIB + NUMBERS


def test_work_in_place_allocates_nothing():
    W, U, V = torch.zeros(512, 512), torch.ones(512, 4), torch.ones(4, 512)
    assert peak_allocation(lambda: W.mul_(2.0)) < NUMBERS
    assert peak_allocation(lambda: W.addmm_(U, V)) < NUMBERS


@pytest.mark.cuda
def test_peak_on_a_gpu():
    def nested() -> None:
        outer = torch.empty(MIB, device="cuda")
        outer.copy_(torch.empty(2 * MIB, device="cuda")[:MIB])

    torch.cuda.empty_cache()  # a cached block that is larger would be counted whole
    assert peak_allocation(nested, "cuda") == 12 * MIB


def run_two_steps(name: str, case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all W and all factors after two calls of a row that has the weights for itself."""
    layers = make_layers(case, make_weights(case, torch.device(device)))
    row = ROWS[name](layers)
    row.run()
    row.run()
    return torch.stack(layers.W).float(), torch.cat([factor.detach().flatten() for factor in layers.factors])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(
    ("rival", "case"),
    [(name, case) for case in TINY_CASES for name in rows_of(case) if name not in (*PARTS, "wrapped")],
    ids=str,
)
def test_rival_does_our_work(rival, case, device, monkeypatch):
    monkeypatch.setattr(step_overhead, "LEARNING_RATE", 1e-2)  # far above the rounding of bfloat16
    before = torch.stack(make_weights(case, torch.device(device))).float()
    (W, factors), (rival_W, rival_factors) = (run_two_steps(name, case, device) for name in ("wrapped", rival))
    assert (W - before).abs().mean() > 5e-4
    # Two steps, each rounded to one of two neighbours.
    rounding = {torch.float32: 5e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}[case.dtype]
    tolerance = {"rtol": 2 * rounding, "atol": 1e-7 if case.dtype == torch.float32 else 5e-5}
    torch.testing.assert_close(rival_W, W, **tolerance)
    assert torch.equal(rival_factors, factors)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("step_overhead") / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_overhead, "FLUSH_BYTES", MIB)
        main(["--rounds", "2", "--out", str(out)], TINY_CASES)
    return json.loads(out.read_text())


def test_results_name_the_machine_and_the_settings(results):
    settings = results["settings"]
    assert settings["torch"] == torch.__version__
    assert settings["threads"] == torch.get_num_threads()
    assert settings["rounds"] == 2
    assert settings["device_name"]


def test_results_hold_every_row_and_ratio(results):
    assert [entry["case"]["dtype"] for entry in results["cases"]] == [str(dtype) for dtype in CASE_DTYPES]
    for entry in results["cases"]:
        case = Case(**entry["case"] | {"dtype": getattr(torch, entry["case"]["dtype"].removeprefix("torch."))})
        assert list(entry["rows"]) == list(rows_of(case))
        assert list(entry["ratios"]) == list(ratios_of(case))
        assert all(0 < row["p10"] <= row["median"] <= row["p90"] for row in entry["rows"].values())


def test_rounding_is_measured_where_it_does_something():
    wide, narrow = TINY_CASES[0], TINY_CASES[1]
    assert ROWS.keys() - rows_of(wide).keys() == set(NARROW)
    assert RATIOS.keys() - ratios_of(wide).keys() == {name for name in RATIOS if name.startswith("write")}
    assert ROWS.keys() - rows_of(narrow).keys() == set(WIDE)
    assert RATIOS.keys() - ratios_of(narrow).keys() == {"folded_training / training"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(("plain", "folded", "times"), [("lora", "folded", 3), ("training", "folded_training", 1)])
def test_the_folded_rows_fold_once_and_divide(plain, folded, times, device, monkeypatch):
    """With SGD, since Adam hides a factor in the gradients; W stays.

    Gradients that are given take the factors a third as far; those of a model are as without the mode.
    """
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    monkeypatch.setattr(step_overhead, "LEARNING_RATE", 1.0 if times == 1 else 1e-4)
    case = TINY_CASES[0]
    ends = []
    for name in (plain, folded):
        layers = make_layers(case, make_weights(case, torch.device(device)))
        if times == 1:  # the step that folds leaves the factors then, and so the effective weights
            for factor in layers.factors:
                factor.grad.zero_()
        row = ROWS[name](layers)
        W, start = torch.stack(layers.W), [factor.detach().clone() for factor in layers.factors]
        row.run()
        assert torch.equal(torch.stack(layers.W), W)
        ends.append([factor.detach() - before for factor, before in zip(layers.factors, start, strict=True)])
    for expected, now in zip(*ends, strict=True):
        assert bool(expected.any())
        torch.testing.assert_close(times * now, expected, rtol=1e-3, atol=1e-7)
    assert row.buffer_bytes() == case.count * case.rank * (case.c + case.d) * 4  # the anchors of a start at random


@pytest.mark.parametrize("name", ["write", "write_nearest", "write_compensated"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("case", TINY_CASES[1:], ids=str)
def test_a_write_adds_the_product(case, device, name):
    layers = make_layers(case, make_weights(case, torch.device(device)))
    before = torch.stack(layers.W).double()
    row = ROWS[name](layers)
    for _ in range(2):
        row.run()
    product = torch.stack([2 * A.double() @ B.double() for A, B in zip(layers.A, layers.B, strict=True)])
    expected = before + 2 * 1e-4 * product
    spacing = torch.finfo(case.dtype).eps * expected.abs()
    assert bool(((torch.stack(layers.W).double() - expected).abs() <= 2.01 * spacing + 1e-7).all())


def test_measuring_memory_prints_nothing(capfd):
    """Torch's profiler writes two lines to the terminal at each use, unless it is asked not to."""
    assert peak_allocation(lambda: torch.empty(1000)) == 4000
    assert capfd.readouterr() == ("", "")


def test_measurements_before_an_interruption_are_kept(tmp_path, monkeypatch):
    out, measured = tmp_path / "found.json", []

    def interrupted(case, *others):
        measured.append(case)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return {"case": str(case), "rows": {}, "ratios": {}}

    monkeypatch.setattr(step_overhead, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["--out", str(out)], TINY_CASES[:2])
    assert not out.exists()
    main(["--out", str(out)], TINY_CASES[:2])
    assert measured == [TINY_CASES[0], TINY_CASES[1], TINY_CASES[1]]
    assert [entry["case"] for entry in json.loads(out.read_text())["cases"]] == [str(case) for case in TINY_CASES[:2]]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_overhead, "measure", None)
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path)])
    assert "is a folder, expected a file" in capsys.readouterr().err


def test_memory_columns(results):
    rows, case = results["cases"][0]["rows"], TINY_CASES[0]
    W_bytes = case.c * case.d * 4
    # U and V, the factors of the last move, and one anchor in the ledger.
    assert rows["wrapped"]["buffer_bytes"] == case.count * 2 * case.rank * (case.c + case.d) * 4  # with the anchors
    assert rows["wrapped"]["peak_extra_bytes"] < rows["inner"]["peak_extra_bytes"] + W_bytes
    assert rows["product"]["peak_extra_bytes"] >= case.count * W_bytes
    assert rows["dense"]["peak_extra_bytes"] >= 2 * W_bytes
    assert rows["pass"]["peak_extra_bytes"] < NUMBERS
