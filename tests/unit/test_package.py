"""The package as a whole: what importing it brings in, which way imports run, and its examples."""

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deltaopt

ROOT = Path(deltaopt.__file__).parent
MODULES = [
    pytest.param(module.name, marks=[pytest.mark.extra] * (module.name.startswith("deltaopt.integrations.")))
    for module in pkgutil.walk_packages(deltaopt.__path__, "deltaopt.")
]
# A module may import from those that stand after it.
ORDER = [
    "__main__",
    *("cli.doctor", "cli.folders"),
    *("cli.export", "cli.inspect", "cli.base_model", "cli.movement", "cli.checkpoint", "cli.adapters", "cli.files"),
    "cli.outcome",
    "describe",
    "analysis",
    "integrations",
    "sharers",
    "export",
    "small_states",
    "metrics",
    "wrappers",
    "optimizer",
    "synced",
    *("folded", "in_place", "sharded_moves", "factor_buffers", "host", "recall", "restarts", "roll_call"),
    *("checks", "rule", "gradient_hooks", "usage", "around", "unlinked"),
    *("report", "base", "checkpoint.resume", "checkpoint.format", "checkpoint.records"),
    *("rounding.batch", "rounding.writer", "norms"),
    *("weight", "claims", "groups", "inner", "in_backward", "triple", "triple_tensors"),
    *("base_hooks", "movement", "split_output", "layer_output"),
    *("stored_factors", "averaged", "save_watch"),
    *("upkeep", "outside", "overwritten", "ledger", "rounding._triton", "rounding.blocks", "rounding.noise"),
    *("checkpoint.fingerprint", "checkpoint.compensation", "checkpoint.files", "checkpoint.readable"),
    "random_starts",
    *("guard", "lowrank", "sharding", "layouts", "scaling", "factors", "compiled", "tensors", "flattened", "ranks"),
    *("description", "tables", "all_or_nothing", "plain", "pickled", "messages", "naming", "modules", "schedules"),
]
FOLDERS = ("analysis", "integrations")
"""Folders whose modules may import each other."""


def name_of(path):
    """Return the name of a module in the package; each of `FOLDERS` is one."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] in FOLDERS else ".".join(parts)


def imported(path):
    """Yield the names of the package's modules that a file imports at its top."""
    for node in ast.parse(path.read_text("utf8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deltaopt"):
            place = ROOT.joinpath(*node.module.split(".")[1:])
            inner = [place / name.name for name in node.names] if place.is_dir() else []
            modules = [file for file in (i.with_suffix(".py") for i in inner) if file.exists()]
            yield from map(name_of, modules or [place.with_suffix(".py")])


@pytest.mark.extra
def test_importing_it_imports_torch_and_nothing_else():
    code = (
        "import sys, torch; before = {m.split('.')[0] for m in sys.modules};"
        "import deltaopt; print(sorted({m.split('.')[0] for m in sys.modules} - before))"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['deltaopt']"


def test_the_order_names_every_module():
    files = [path for path in ROOT.rglob("*.py") if path.name != "__init__.py"]
    assert {name_of(path) for path in files} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("path", [p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem != "__init__"], ids=str)
def test_imports_run_one_way(path):
    if path.name == "__init__.py" and name_of(path) not in FOLDERS:
        assert list(imported(path)) == []
        return
    own = name_of(path)
    allowed = ORDER[ORDER.index(own) + (own not in FOLDERS) :]  # those may import each other
    for other in imported(path):
        assert other in allowed, f"{own} imports {other}"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("ledger", {"all_or_nothing", "lowrank", "rounding.blocks"}),
        ("rounding.blocks", {"all_or_nothing"}),
        ("upkeep", {"ledger"}),
    ],
)
def test_the_arithmetic_knows_nothing_above_it(name, known):
    """None of it knows a triple, a weight or an optimizer."""
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    assert set(imported(path)) == known


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


@pytest.mark.extra
def test_the_cuda_target_collects_tests_from_each_of_its_paths():
    """Nothing else would tell of a file that was moved, where no test of the suite needs a CUDA device."""
    root = Path(__file__).parents[2]
    (command,) = [line for line in (root / "Makefile").read_text("utf8").splitlines() if "-m cuda" in line]
    paths = re.findall(r"tests/\S+", command)
    assert paths
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", "cuda", *paths]
    done = subprocess.run(collect, cwd=root, capture_output=True, text=True, check=True)
    for path in paths:
        assert re.search(rf"^{re.escape(path)}(/\S+)?::", done.stdout, re.M), f"{path} has no test for a CUDA device"


@pytest.mark.extra
def test_the_cuda_benchmarks_take_the_options_they_are_given(capsys):
    """Look at the commands of the target, with one more option, which must be the only one that is not known."""
    root = Path(__file__).parents[2]
    target = (root / "Makefile").read_text("utf8").split("\ncuda-benchmarks:\n")[1].split("\n\n")[0]
    target = target.replace("$(if $(MODEL),", "").replace("$(MODEL)", "folder")
    commands = re.findall(r"-m (benchmarks\.\w+) ([^)\n]*)", target)
    assert [module for module, _ in commands] == [
        f"benchmarks.{name}" for name in ("step_overhead", "drift", "finetune")
    ]
    for module, options in commands:
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module(module).main([*options.split(), "--no-such-option"])
        assert capsys.readouterr().err.rstrip().endswith("error: unrecognized arguments: --no-such-option")


def test_public_names():
    assert sorted(deltaopt.__all__) == deltaopt.__all__
    assert all(getattr(deltaopt, name).__doc__ for name in deltaopt.__all__)
