"""A result file is read as it was written."""

from dataclasses import replace

from benchmarks.evidence.grids import GRIDS
from benchmarks.evidence.result import read_results, write_result
from benchmarks.evidence.rows import ROWS
from tests.benchmarks.made_results import made


def test_the_settings_of_all_grids_are_found_again(tmp_path):
    """Numbers that are measured are rounded in the file; a setting is not, as it names the file."""
    for grid in GRIDS.values():
        for number, experiment in enumerate(grid.experiments):
            setting = experiment._setting(ROWS[experiment.rows[0]], 1 / 3, 0, "test")
            folder = tmp_path / f"{grid.name} {number}"
            write_result(folder, made(setting))
            assert [result.setting for result in read_results(folder)] == [setting]


def test_what_was_measured_has_seven_digits(tmp_path):
    experiment = GRIDS["full"].experiments[0]
    setting = experiment._setting(ROWS["lora"], 1e-3, 0, "test")
    write_result(tmp_path, replace(made(setting), losses=[1 / 3]))
    assert read_results(tmp_path)[0].losses == [0.3333333]
