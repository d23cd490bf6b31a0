"""What a step of each method costs: every method once, and the bytes that can be counted by hand."""

import pytest

from benchmarks.evidence import cost, page
from benchmarks.evidence.grid import Experiment
from benchmarks.evidence.places import Places
from benchmarks.evidence.rows import MAIN, ROWS
from tests.support.evidence_models import SIZES, pairs, write_model, write_rows

pytest.importorskip("sklearn", reason="runs where scikit-learn is installed")
pytest.importorskip("scipy", reason="runs where scipy is installed")

RANK, LABELS, FLOAT = 2, 2, 4
WIDTH, LAYERS = SIZES["hidden_size"], SIZES["num_hidden_layers"]
FACTORS = FLOAT * LAYERS * 2 * 2 * WIDTH * RANK  # of the query and the value of each layer, two factors
HEAD = FLOAT * (LABELS * WIDTH + LABELS)
ROUNDS = 2


def experiment(rows):
    setting = {"steps": 5, "batch_size": 4, "max_length": 16, "rank": RANK}
    return Experiment("mrpc", "bert", rows, setting, dict.fromkeys(("adapter", "dense", "sgd"), (1e-3,)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    for split in ("train", "dev"):
        write_rows(folder / f"glue/mrpc/{split}.jsonl.gz", pairs(12, LABELS))
    write_model(folder / "models" / "bert", "bert")
    asked = experiment(("full", "lora", "delta", "ratio-down", "restarts", "sgd"))
    return asked, cost.measure(asked, cost.rows_of(asked), Places(folder), "cpu", ROUNDS)


def test_each_method_is_measured_once_but_the_ratio_that_begins_at_zero():
    rows = cost.rows_of(experiment([row.name for row in MAIN]))
    methods = [row.method for row in rows]
    assert len(set(methods)) == len(methods)
    assert set(methods) == {row.method for row in MAIN} - {"ratio-up"}
    assert ROWS["lora"] in rows
    assert ROWS["delta"] in rows


def test_times_are_compared_within_a_round(measured):
    rows = measured[1]
    assert all(len(row["seconds"]) == ROUNDS and min(row["seconds"]) > 0 for row in rows.values())
    assert rows["lora"]["ratio"] == {"median": 1.0, "lowest": 1.0, "highest": 1.0}
    ratios = [own / other for own, other in zip(rows["full"]["seconds"], rows["lora"]["seconds"], strict=True)]
    assert rows["full"]["ratio"]["lowest"] == min(ratios)
    assert rows["full"]["ratio"]["highest"] == max(ratios)


@pytest.mark.parametrize("row", ["lora", "delta", "ratio-down", "restarts"])
def test_adapters_have_gradients_of_the_factors_and_of_the_head_alone(measured, row):
    found = measured[1][row]
    assert found["gradient_bytes"] == FACTORS + HEAD == FLOAT * found["trained"]


def test_what_optimizers_keep(measured):
    """AdamW keeps two numbers of each parameter and a count of each tensor; Delta-LoRA the factors of its last move."""
    rows, counts = measured[1], FLOAT * (LAYERS * 2 * 2 + 2)
    assert rows["lora"]["state_bytes"] == 2 * (FACTORS + HEAD) + counts
    assert rows["delta"]["state_bytes"] == rows["lora"]["state_bytes"] + FACTORS
    assert rows["sgd"]["state_bytes"] == 0


def test_the_peak_of_a_step_has_the_gradients_in_it(measured):
    for name, row in measured[1].items():
        assert row["peak_bytes"] > row["gradient_bytes"], name


def test_the_file_is_what_the_page_reads(measured, tmp_path):
    asked, found = measured
    cost.write(tmp_path / "cost_cpu.json", found, asked, {"device": "cpu", "cpu": "A Processor"}, "abc")
    text = page.cost(tmp_path, "cpu")
    assert "bert on mrpc, 4 texts of at most 16 tokens; A Processor, 1 thread; commit abc." in text
    assert all(ROWS[name].title in text for name in found)
