"""The tables of the pages say what the result files say."""

import json

import pytest

from benchmarks import tables
from benchmarks.tables import PAGES, TABLES, current, filled

PAGE = "Before.\n\n<!-- table: {} -->\n\n| old |\n\n<!-- end of table -->\n\nAfter.\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_a_page_has_the_tables_of_the_results(page):
    text = page.read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end of table -->") > 0
    assert current(page) == text, "run python -m benchmarks.tables"


def test_every_table_is_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in TABLES if f"<!-- table: {name} -->" not in text] == []


def test_a_table_that_does_not_exist():
    with pytest.raises(KeyError, match="no such table"):
        filled(PAGE.format("no such table"))


def test_what_is_not_measured_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name in ("step_overhead, CUDA", "memory, CUDA", "drift, CUDA"):
        assert filled(PAGE.format(name)) == PAGE.format(name).replace("| old |", "Not measured yet.")


def test_the_numbers_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    row = {"median": 2.04, "p10": 1.0, "p90": 3.96, "peak_extra_bytes": 2**20, "buffer_bytes": 2**21}
    rows = dict.fromkeys((*tables.TIMES, *tables.TIMES_16, *tables.TIMES_32), row)
    rows |= {"folded": {**row, "median": 2.54}, "dense": {**row, "peak_extra_bytes": 5 * 2**20}}
    ratios = dict.fromkeys((*tables.RATIOS, *tables.RATIOS_16, *tables.RATIOS_32), row)
    settings = {"device": "cpu", "device_name": "a machine", "threads": 3, "rounds": 7, "load_average": 0.25}
    settings |= {"torch": "2", "python": "3"}
    cases = [
        {"case": {"name": name, "count": 4, "c": 5, "d": 6, "rank": 1, "dtype": f"torch.{dtype}"}} for name, dtype in
        [("big", "float32"), ("5 x 6", "bfloat16"), ("big", "float16")]
    ]  # fmt: skip
    cases = [case | {"rows": rows, "ratios": ratios} for case in cases]
    (tmp_path / "step_overhead_cpu.json").write_text(json.dumps({"settings": settings, "cases": cases}))

    told = tables.overhead("cpu")
    assert told.startswith("a machine, 3 threads, 7 rounds, torch 2, Python 3, load 0.2 at the start.")
    parts = [part.split("\n") for part in told.split("\n\n")[1:]]
    assert [len(part) for part in parts] == [5, 3, 4, 5, 4]  # all, float32, 16 bits, all, 16 bits
    assert parts[0][2].startswith("| big: 4 of 5 x 6, r 1 | float32 | 2.0 (1.0 .. 4.0) |")
    assert parts[0][3].startswith("| 4 of 5 x 6, r 1 | bfloat16 | ")
    assert parts[1][2].endswith("| 2.040 (1.000 .. 3.960) |")
    assert all(line.count("|") == part[0].count("|") for part in parts for line in part)

    head, _, first, second = tables.costs().split("\n")
    assert first.startswith("| big: 4 of 5 x 6, r 1 | float32 | 2.0 ms | 2.0 ms | 0.5 ms more | 2.04 (1.00 .. 3.96) |")
    assert first.endswith("| 2.0 | 2.0 | 3.0, 7.0, 3.0 |")
    assert "bfloat16" in second
    assert head.count("|") == first.count("|")
    assert "| 1.00 | 5.00 | 1.00 |" in tables.memory("cpu").split("\n")[2]


def test_the_kept_fractions_are_those_of_the_file():
    reference = json.loads((tables.RESULTS / "drift_cpu.json").read_text())["results"]
    found = next(
        entry["summary"]
        for entry in reference
        if entry["setting"]["method"] == "nearest" and entry["setting"]["dtype"] == "bfloat16"
    )
    row = tables.kept_at_the_reference().split("\n")[2]
    assert row.startswith("| bfloat16 | nearest")
    assert float(row.split("|")[3].split("±")[0]) == pytest.approx(100 * found["kept"], abs=0.01)
    assert float(row.split("|")[5]) == pytest.approx(found["error"], abs=0.01)
