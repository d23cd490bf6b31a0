"""The command line: ``python -m benchmarks.evidence --help``."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import RESULTS
from benchmarks.evidence import parts
from benchmarks.evidence.grid import Grid
from benchmarks.evidence.grids import GRIDS
from benchmarks.evidence.packing import workers_for, workers_option
from benchmarks.evidence.places import Places
from benchmarks.evidence.result import Result, read_result, read_results
from benchmarks.evidence.workers import InUseError, Job, as_a_worker, commit_of, locked, make, work
from benchmarks.machine import machine, usable_device
from benchmarks.unfinished import check_writable

NUMBERS = ("data", "losses", "layers", "texts", "forgetting", "trained", "total", "diverged")
"""What `again` compares in addition to the metrics, to which the scores of texts were added later."""

DRY_RUNS = Path("evidence-out/dry-run")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 if a run failed or differed, 2 for a call that cannot be taken."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.command(options, parser)
    except (ValueError, OSError, ImportError, InUseError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return code


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description="Compare Delta-LoRA with others."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=function)
        return added

    run = command("run", run_grid, "Make the runs of a grid that have no result file yet.")
    run.add_argument("grid", choices=GRIDS, help="which grid")
    run.add_argument("--out", type=Path, help=f"folder of the result files (default: {RESULTS}/evidence/GRID)")
    workers = "processes of one thread (default: 2); 0: this one; auto: as many as cores and the GPU's memory allow"
    run.add_argument("--workers", type=workers_option, default=2, metavar="N", help=workers)
    run.add_argument("--seconds", type=float, default=math.inf, help="stop after this time; the next call continues")
    run.add_argument("--commit", help="of the code, where there is no checkout")
    status = command("status", show_status, "Say how many runs a grid has, and which can be made next.")
    status.add_argument("grid", choices=GRIDS)
    status.add_argument("--out", type=Path)
    for each in (run, status):
        each.add_argument("--only", nargs="+", default=[], metavar="NAME", help="tasks and rows (default: all)")
        each.add_argument("--precision", choices=("float32", "bfloat16"), help="other than the grid's")
        dry_run = f"so many steps, examples and rows that it shows whether a grid runs (folder: {DRY_RUNS}/GRID)"
        each.add_argument("--dry-run", type=int, metavar="STEPS", help=dry_run)
    again = command("again", run_again, "Make the runs of result files once more, and compare the numbers.")
    again.add_argument("files", type=Path, nargs="+", help="result files")
    score = command("score", score_texts, "Add the metrics of written texts to the result files of a grid.")
    score.add_argument("folder", type=Path, help="folder of a grid's result files")
    cost = command("cost", measure_cost, "Measure the time and the memory of a step of every method, side by side.")
    cost.add_argument("grid", choices=GRIDS, help="its first experiment is measured")
    cost.add_argument("--out", type=Path, help=f"the file to write (default: {RESULTS}/evidence/cost_DEVICE.json)")
    cost.add_argument("--rounds", type=int, default=15, help="turns of each row (default: 15)")
    table = command("table", print_tables, "Print the tables of a grid's results, complete or not.")
    table.add_argument("grid", choices=GRIDS)
    table.add_argument("--out", type=Path, help=f"folder of the result files (default: {RESULTS}/evidence/GRID)")
    table.set_defaults(dry_run=None)
    docstrings = command("docstrings", write_data, "Write the docstrings of this Python's library as data.")
    docstrings.add_argument("folder", type=Path, help="the data folder")
    command("page", write_page, "Write the tables and pictures of docs/evidence.md.")
    for each in (run, again, score, cost):
        each.add_argument("--data", type=Path, help="folder of the data sets")
        each.add_argument("--models", type=Path, help="folder of model folders")
    for each in (run, again, cost):
        each.add_argument("--device", default="cpu", help="where to train (default: cpu)")
    return parser


def run_grid(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    usable_device(options.device, parser)
    grid, folder = _grid(options), _folder(options)
    workers = workers_for(grid, options.device) if options.workers is None else options.workers
    commit = options.commit or commit_of(Path(__file__).parent)
    job = Job(folder, _places(options), options.device, time.monotonic() + options.seconds, commit)
    failures = count = 0
    with locked(folder):
        for done in work(grid, job, workers):
            count += 1
            if isinstance(done, Result):
                print(f"{count:4d}  {describe(done)}", flush=True)
            else:
                setting, error = done
                failures += 1
                print(f"{count:4d}  {setting.path}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        left = len(grid.needed(read_results(folder)))
    print(f"{left} runs can be made next." if left else "The grid is complete.")
    return int(failures > 0)


def describe(result: Result) -> str:
    """Return one line of what a run has found."""
    setting = result.setting
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    run = f"{setting.task} {setting.row} {setting.split} lr {setting.lr:g} seed {setting.seed}"
    return f"{run}: {'diverged' if result.diverged else metrics} ({result.seconds:.0f} s)"


def show_status(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    grid, results = _grid(options), read_results(_folder(options))
    needed = grid.needed(results)
    print(f"{len(results)} result files; {len(needed)} runs can be made next" + ("" if needed else ": complete"))
    for setting in needed:
        print(f"  {setting.path}")
    return 0


def run_again(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Make runs once more, in a folder of its own, and compare what does not depend on the clock."""
    from tempfile import TemporaryDirectory

    usable_device(options.device, parser)
    different = 0
    for path in options.files:
        held = read_result(path)
        if held is None:
            raise ValueError(f"{path}: no such file, or one that was cut off")
        with TemporaryDirectory() as folder, as_a_worker():
            job = Job(Path(folder), _places(options), options.device, math.inf, commit_of(Path(__file__).parent))
            make(held.setting, job)
            now = read_result(Path(folder) / held.setting.path)
        assert now is not None
        apart = [name for name in NUMBERS if getattr(now, name) != getattr(held, name)]
        if any(held.metrics.get(name) != value for name, value in now.metrics.items()):
            apart.append(f"metrics ({held.metrics} then, {now.metrics} now)")
        different += bool(apart)
        print(f"{path}: " + (f"DIFFERENT in {', '.join(apart)}" if apart else "the same numbers"))
    return int(different > 0)


def measure_cost(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from benchmarks.evidence import cost

    usable_device(options.device, parser)
    experiment = GRIDS[options.grid].experiments[0]
    path = options.out or RESULTS / "evidence" / f"cost_{options.device.partition(':')[0]}.json"
    check_writable(path)
    with as_a_worker():
        found = cost.measure(experiment, cost.rows_of(experiment), _places(options), options.device, options.rounds)
        where = machine(options.device)  # with the threads of a worker
    cost.write(path, found, experiment, where, commit_of(Path(__file__).parent))
    print(f"Written: {path}")
    return 0


def score_texts(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from benchmarks.evidence.scores import score_folder

    score_folder(options.folder, _places(options))
    return 0


def write_data(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from benchmarks.evidence.examples import write_docstrings

    for path in write_docstrings(options.folder):
        print(f"Written: {path}")
    return 0


def print_tables(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from benchmarks.evidence import page

    print(page.report(GRIDS[options.grid], read_results(_folder(options))))
    return 0


def write_page(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from benchmarks import tables
    from benchmarks.evidence import pictures

    pictures.write_all(RESULTS / "evidence")
    tables.main()
    return 0


def _grid(options: argparse.Namespace) -> Grid:
    """Return the grid, or the part of it that the options ask for."""
    grid = GRIDS[options.grid]
    if options.only:
        grid = parts.only(grid, options.only)
    if options.precision:
        grid = parts.in_precision(grid, options.precision)
    return grid if options.dry_run is None else parts.dry(grid, options.dry_run)


def _folder(options: argparse.Namespace) -> Path:
    usual = RESULTS / "evidence" if options.dry_run is None else DRY_RUNS
    return options.out or usual / options.grid


def _places(options: argparse.Namespace) -> Places:
    for name in ("data", "models"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{name} {folder} is no folder")
    return Places(options.data, options.models)


if __name__ == "__main__":
    sys.exit(main())
