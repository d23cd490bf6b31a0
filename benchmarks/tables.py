"""Tables of the pages, made from the files in `benchmarks/results/`.

    python -m benchmarks.tables     # after a run: replaces the tables of all `PAGES`, and the numbers in sentences

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; `TABLES` has the names. The
sentences are those of `evidence/passages.py` and of `STEP_PASSAGES`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import RESULTS, drift, first_use
from benchmarks.evidence.facts import Facts
from benchmarks.evidence.page import evidence_tables
from benchmarks.evidence.passages import PASSAGES
from benchmarks.evidence.prose import Passage, filled_in
from benchmarks.evidence.standing import Evidence
from benchmarks.markdown import table

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE / "README.md", HERE.parent / "docs" / "evidence.md")

TIMES = ("inner", "wrapped", "lora", "folded", "addmm", "pass", "dense", "product")
TIMES_16 = ("nearest", "compensated", "write", "write_nearest", "write_compensated")
TIMES_32 = ("training", "folded_training")
RATIOS = (
    "folded / lora",
    "(wrapped - inner) / addmm",
    "(wrapped - inner) / pass",
    "(dense - inner) / (wrapped - inner)",
    "(product - inner) / (wrapped - inner)",
)
RATIOS_16 = (
    "write / addmm",
    "write / write_nearest",
    "write / pass",
    "write_compensated / addmm",
    "write_compensated / pass",
)
RATIOS_32 = ("folded_training / training",)
MEMORY = (
    *("inner", "wrapped", "nearest", "compensated", "lora", "folded", "training", "folded_training"),
    *("addmm", "dense", "product"),
)
KEPT = ("wrapped", "compensated", "folded")

Cell: TypeAlias = Callable[[Mapping[str, Any]], str]
"""Makes one cell of a table from a case of `step_overhead`."""


def overhead(device: str) -> str:
    """Return the times and ratios of `step_overhead`: for all weights, for float32 alone and for 16 bits alone."""
    found = _results(f"step_overhead_{device}")
    if found is None:
        return "Not measured yet."
    s = found["settings"]
    threads = f", {s['threads']} thread{'s' * (s['threads'] != 1)}" if s["device"] == "cpu" else ""
    told = (
        f"{s['device_name']}{threads}, {s['rounds']} rounds, torch {s['torch']}, Python {s['python']}, load "
        f"{s['load_average']:.1f} at the start. Times in ms, median (10th .. 90th percentile)."
    )
    wide = [case for case in found["cases"] if _dtype(case) == "float32"]
    narrow = [case for case in found["cases"] if _dtype(case) != "float32"]
    tables = [
        _cases(found["cases"], {name: partial(_spread, "rows", name, 1) for name in TIMES}),
        _cases(
            wide,
            {name: partial(_spread, "rows", name, 1) for name in TIMES_32}
            | {name: partial(_spread, "ratios", name, 3) for name in RATIOS_32},
        ),
        _cases(narrow, {name: partial(_spread, "rows", name, 1) for name in TIMES_16}),
        _cases(found["cases"], {name: partial(_spread, "ratios", name, 2) for name in RATIOS}),
        _cases(narrow, {name: partial(_spread, "ratios", name, 2) for name in RATIOS_16}),
    ]
    return "\n\n".join([told, *tables])


def memory(device: str) -> str:
    """Return the peak memory of one call, and the memory kept from step to step, in MiB."""
    found = _results(f"step_overhead_{device}")
    if found is None:
        return "Not measured yet."
    peaks = {name: partial(_mebibytes, name, "peak_extra_bytes") for name in MEMORY}
    kept = {f"kept by {name}": partial(_mebibytes, name, "buffer_bytes") for name in KEPT}
    return _cases(found["cases"], peaks | kept)


def costs() -> str:
    """Return the main figures of `step_overhead`: the cost of a step here and in public code."""
    found = _results("step_overhead_cpu")
    assert found is not None
    cells: dict[str, Cell] = {
        "inner step": lambda case: f"{_median(case, 'inner'):.1f} ms",
        "with deltaopt": lambda case: f"{_median(case, 'wrapped'):.1f} ms",
        "folded mode": lambda case: f"{_median(case, 'folded') - _median(case, 'lora'):.1f} ms more",
        "update / bare `addmm_` calls": partial(_spread, "ratios", "(wrapped - inner) / addmm", 2),
        "dense pattern / ours": partial(_middle, "(dense - inner) / (wrapped - inner)"),
        "kept product / ours": partial(_middle, "(product - inner) / (wrapped - inner)"),
        "extra memory: ours, dense, kept product (MiB)": lambda case: ", ".join(
            f"{_extra(case, name):.1f}" for name in ("wrapped", "dense", "product")
        ),
    }
    return _cases([case for case in found["cases"] if _dtype(case) != "float16"], cells)


def costs_in_short() -> str:
    """Return the table of the front page: a step with each optimizer, and the memory that it takes."""
    found = _results("step_overhead_cpu")
    assert found is not None
    rows = [
        (
            _shapes(case),
            _dtype(case),
            f"{_median(case, 'inner'):.1f}",
            f"{_median(case, 'wrapped'):.1f}",
            f"+ {_median(case, 'folded') - _median(case, 'lora'):.1f}",
            f"{_median(case, 'dense'):.1f}",
            " / ".join(f"{_extra(case, name):.0f}" for name in ("wrapped", "dense")),
        )
        for case in found["cases"]
        if _dtype(case) != "float16"
    ]
    return table(("layers", "W", "AdamW, ms", "in place", "folded", "dense", "MiB"), rows)


def around_the_steps() -> str:
    """Return the times of `first_use`, with the lowest and the highest of all runs."""
    found = _results("first_use")
    if found is None:
        return "Not measured yet."
    s, mebibytes = found["settings"], {name: row["median"] / 2**20 for name, row in found["bytes"].items()}
    told = (
        f"{s['device_name']}, {s['threads']} thread{'s' * (s['threads'] != 1)}, {s['runs']} processes, torch "
        f"{s['torch']}, Python {s['python']}, load {s['load_average']:.1f} at the start. Milliseconds of the processor."
    )
    rows = [
        (text, f"{1e3 * row['median']:.0f}", f"{1e3 * row['low']:.0f} .. {1e3 * row['high']:.0f}")
        for text, row in ((text, found["seconds"][name]) for name, text in first_use.ROWS.items())
    ]
    small = {name: f"{row['median']:.0f}" for name, row in found["small"].items()}
    memory = [
        ("every W", mebibytes["W"]),
        ("A and B", mebibytes["factors"]),
        ("AdamW's state", mebibytes["AdamW"]),
        ("`optimizer.buffer_bytes`", mebibytes["buffers"]),
        ("ledgers in a saved state", mebibytes["state"]),
    ]
    return "\n\n".join(
        [
            told,
            table(("event", "median", "lowest .. highest"), rows),
            f"{first_use.SMALL_TRIPLES} triples of {first_use.SMALL_SIDE} x {first_use.SMALL_SIDE}: a step takes "
            f"{small['wrapped']} microseconds a triple, one of AdamW alone {small['inner']}.",
            table(("memory", "MiB"), [(text, f"{size:.1f}") for text, size in memory]),
        ]
    )


def kept(device: str) -> str:
    """Return every row of `drift`."""
    found = _drifts(device)
    if not found:
        return "Not measured yet."
    rows = [
        drift.table_row(name, setting, found[setting])
        for name, group in drift.settings().items()
        for setting in group
        if setting in found
    ]
    return "\n".join([drift.HEAD, *rows])


NAMES = {
    "nearest": "nearest, as public code does",
    "stochastic": "stochastic (default)",
    "compensated": "compensated",
}


def kept_at_the_reference() -> str:
    """Return the short table of `drift`: the reference setting, with feedback from the rounded W and without."""
    found = _drifts("cpu")
    head = (
        "W",
        "rounding",
        "share of the movement kept in W",
        "the same share, training with an unrounded W",
        "relative error",
    )
    rows = []
    for dtype in ("bfloat16", "float16"):
        for rounding, name in NAMES.items():
            run, equal = (
                drift.summary(found[drift.Setting(rounding, dtype, feedback=feedback)]) for feedback in (True, False)
            )
            rows.append((dtype, name, _percent(run), _percent(equal), f"{run.error:.2g}"))
    return table(head, rows)


def kept_in_short() -> str:
    """Return the table of the front page: what W keeps of its movement in a run of the reference setting."""
    found = _drifts("cpu")
    rows = []
    for rounding, name in NAMES.items():
        runs = [drift.summary(found[drift.Setting(rounding, dtype)]) for dtype in ("bfloat16", "float16")]
        rows.append((name, *map(_percent, runs), f"{runs[0].error:.2g}"))
    return table(("`rounding`", "kept, bfloat16", "kept, float16", "error, bfloat16"), rows)


EVIDENCE = RESULTS / "evidence"


@cache
def _evidence() -> Evidence:
    """Return the results of the evidence; a thousand files are read once."""
    return Evidence.read(EVIDENCE)


TABLES: dict[str, Callable[[], str]] = {
    "costs, in short": costs_in_short,
    "kept, in short": kept_in_short,
    "costs": costs,
    "kept at the reference": kept_at_the_reference,
    "step_overhead, 2 threads": partial(overhead, "cpu"),
    "step_overhead, 1 thread": partial(overhead, "cpu_1_thread"),
    "step_overhead, CUDA": partial(overhead, "cuda"),
    "memory": partial(memory, "cpu"),
    "memory, CUDA": partial(memory, "cuda"),
    "first_use": around_the_steps,
    "drift": partial(kept, "cpu"),
    "drift, CUDA": partial(kept, "cuda"),
    **evidence_tables(EVIDENCE, _evidence),
}


STEP_PASSAGES: Mapping[str, Sequence[Passage]] = {
    "README.md": (
        Passage(
            "The dense one rounds to nearest and loses {} % of it:",
            lambda _: [f"{100 - _kept(drift.Setting(drift.DENSE)):.0f}"],
        ),
        Passage("A whole training step takes {} to {} of plain LoRA's time with the folded rule.", lambda _: _folded()),
        Passage(
            "after 4000 steps in bfloat16 stochastic rounding keeps {} %.",
            lambda _: [f"{_kept(drift.Setting('stochastic', steps=4000)):.1f}"],
        ),
        Passage(
            "At lr 1e-5 the bits of a compensated bfloat16 W show {} % of the movement;",
            lambda _: [f"{_kept(drift.Setting('compensated', lr=1e-5)):.0f}"],
        ),
    )
}
"""What the pages say of `step_overhead` and `drift`."""


def _kept(setting: drift.Setting) -> float:
    """Return how many percent of its movement W kept in a run on a CPU."""
    return 100 * drift.summary(_drifts("cpu")[setting]).kept


def _folded() -> list[str]:
    """Return the lowest and the highest time of a training step with the folded rule, LoRA's as 1, over the shapes."""
    found = [case["ratios"] for case in _results("step_overhead_cpu")["cases"]]
    name = RATIOS_32[0]
    ratios = [each[name]["median"] for each in found if name in each]
    return [f"{min(ratios):.2f}", f"{max(ratios):.2f}"]


def filled(page: str) -> str:
    """Return a page with its tables replaced by those of the present results.

    Raises:
        KeyError: if the page names a table that `TABLES` does not have.
    """
    return re.sub(
        r"(<!-- table: ([^>]*) -->\n).*?(\n<!-- end of table -->)",
        lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


def current(page: Path) -> str:
    """Return a page with the tables and the numbers of the present results.

    Raises:
        KeyError: as `filled`.
        ValueError: if a sentence does not hold any more, or is not there (`evidence/passages.py`).
    """
    name, text = page.relative_to(HERE.parent).as_posix(), filled(page.read_text())
    passages = [*PASSAGES.get(name, ()), *STEP_PASSAGES.get(name, ())]
    return filled_in(text, passages, _facts()) if passages else text


def main() -> None:
    """Write tables and numbers into all pages."""
    for page in PAGES:
        page.write_text(current(page))


@cache
def _facts() -> Facts:
    return Facts(_evidence(), EVIDENCE)


def _results(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _drifts(device: str) -> dict[drift.Setting, Any]:
    entries = [(entry["setting"], entry) for entry in (_results(f"drift_{device}") or {"results": []})["results"]]
    return {drift.Setting(**{**s, "shapes": tuple(map(tuple, s["shapes"]))}): entry for s, entry in entries}


def _cases(cases: Iterable[Mapping[str, Any]], cells: Mapping[str, Cell]) -> str:
    rows = [[_layers(case), _dtype(case), *(cell(case) for cell in cells.values())] for case in cases]
    return table(["layers", "W", *cells], rows)


def _layers(case: Mapping[str, Any]) -> str:
    return f"{_shapes(case)}, r {case['case']['rank']}"


def _shapes(case: Mapping[str, Any]) -> str:
    c = case["case"]
    shape = f"{c['count']} of {c['c']} x {c['d']}"
    return shape if c["name"] in shape else f"{c['name']}: {shape}"


def _dtype(case: Mapping[str, Any]) -> str:
    return str(case["case"]["dtype"]).removeprefix("torch.")


def _median(case: Mapping[str, Any], row: str) -> float:
    return float(case["rows"][row]["median"])


def _middle(ratio: str, case: Mapping[str, Any]) -> str:
    return f"{case['ratios'][ratio]['median']:.1f}"


def _spread(kind: str, name: str, digits: int, case: Mapping[str, Any]) -> str:
    found = case[kind][name]
    return f"{found['median']:.{digits}f} ({found['p10']:.{digits}f} .. {found['p90']:.{digits}f})"


def _extra(case: Mapping[str, Any], row: str) -> float:
    return _bytes(case, row, "peak_extra_bytes") + _bytes(case, row, "buffer_bytes")


def _bytes(case: Mapping[str, Any], row: str, what: str) -> float:
    return float(case["rows"][row][what]) / 2**20


def _mebibytes(row: str, what: str, case: Mapping[str, Any]) -> str:
    return f"{_bytes(case, row, what):.2f}" if row in case["rows"] else ""


def _percent(summary: drift.Summary) -> str:
    digits = drift.decimals(100 * summary.standard_error)
    return f"{100 * summary.kept:.{digits}f} ± {100 * summary.standard_error:.{digits}f} %"


if __name__ == "__main__":
    main()
