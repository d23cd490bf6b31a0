"""The measurement of everything around the steps, on a small model."""

import json

import pytest

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")
pytest.importorskip("accelerate", reason="runs where accelerate is installed")

from benchmarks import first_use, tables
from tests.support.peft_runs import peft_asks_by_an_old_name

pytestmark = peft_asks_by_an_old_name


@pytest.fixture
def small(monkeypatch):
    sizes = {"HIDDEN": 32, "INTERMEDIATE": 48, "LAYERS": 1, "SMALL_TRIPLES": 3, "SMALL_STEPS": 2, "LATER_STEPS": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(first_use, name, size)


def test_it_measures_each_row_and_its_table_says_so(small, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(first_use, "in_processes", lambda runs, threads: [first_use.measure() for _ in range(runs)])
    first_use.main(["--runs", "1", "--out", str(tmp_path / "first_use.json")])
    found = json.loads((tmp_path / "first_use.json").read_text("utf8"))
    assert set(found["seconds"]) == set(first_use.ROWS)
    assert all(
        row["low"] <= row["median"] <= row["high"] for kind in ("seconds", "small") for row in found[kind].values()
    )
    numbers = {name: row["median"] for name, row in found["bytes"].items()}
    assert numbers["W"] == 4 * (4 * 32 * 32 + 3 * 32 * 48)
    assert numbers["factors"] == 4 * first_use.RANK * (4 * 64 + 3 * 80)
    assert numbers["buffers"] == numbers["AdamW"] == 2 * numbers["factors"]  # their product was not zero at first
    assert "`save_adapter(...)`" in tables.around_the_steps()
