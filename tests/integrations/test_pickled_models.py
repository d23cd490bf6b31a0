"""Models that were pickled whole in the middle of a run load, and compute the same, where this package is missing."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support.compare import same
from tests.support.elsewhere import Server, run_without_this_package
from tests.support.models import batches, causal_lm, loss_of, optimizer_for, plain_loop
from tests.support.peft_runs import ModelRun, peft_asks_by_an_old_name

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]

LOADING = """
import torch
models = torch.load(files[0], weights_only=False)
outputs = {}
for name, (model, x) in models.items():
    with torch.no_grad():
        found = model(x)
    outputs[name] = found if isinstance(found, torch.Tensor) else found.logits
    model(x)  # with gradients
torch.save(outputs, files[1])
"""


def of_peft(rule: str, start: str = "zero") -> tuple[nn.Module, Tensor]:
    run = ModelRun(rule, start, dtype=torch.float32).train(batches(5))
    return run.model.eval(), batches(1, seed=7)[0]


def with_gradients(rule: str) -> tuple[nn.Module, Tensor]:
    """Between backward() and step(), with the hooks that divide gradients on the factors."""
    run = ModelRun(rule, dtype=torch.float32).train(batches(2))
    run.backward(batches(1)[0])
    return run.model, batches(1, seed=7)[0]


def compiled_and_run(rule: str) -> tuple[nn.Module, Tensor]:
    model = causal_lm(torch.float32)
    optimizer = optimizer_for(model, weight_update=rule)
    plain_loop(model, optimizer, batches(2))
    ids = batches(1, seed=7)[0]
    torch.compile(model, backend="eager")(ids)
    return model, ids


def by_hand(rule: str) -> tuple[nn.Module, Tensor]:
    """Triples of torch's own modules: W's module has the hook of `is_active`, which asks a method of a module."""
    torch.manual_seed(0)
    layer, A, B = nn.Linear(6, 4), nn.Linear(2, 4, bias=False), nn.Linear(6, 2, bias=False)
    layer.requires_grad_(False)
    model, scaling = nn.Sequential(layer, nn.ReLU()), torch.tensor(0.5)
    model.A, model.B = A, B
    triple = LoRATriple(
        (layer, "weight"), (A, "weight"), (B, "weight"), scaling=scaling, name="q", is_active=A.extra_repr
    )
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update=rule)
    x = torch.randn(3, 6)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) + scaling * A(B(x))).square().sum().backward()
        optimizer.step()
    return nn.Sequential(layer, nn.ReLU()), x


MAKERS = [(of_peft, ("zero",)), (of_peft, ("later",)), (with_gradients, ()), (by_hand, ())]
CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    f"{make.__name__}, {rule}, {rest}": partial(make, rule, *rest)
    for rule in ("in_place", "folded")
    for make, rest in MAKERS
} | {"compiled": partial(compiled_and_run, "in_place")}


def test_they_load_where_this_package_is_missing(tmp_path: Path):
    models = {name: make() for name, make in CASES.items()}
    with torch.no_grad():
        expected = {name: model(x) for name, (model, x) in models.items()}
    expected = {name: found if isinstance(found, Tensor) else found.logits for name, found in expected.items()}
    torch.save(models, tmp_path / "models.pt")
    run_without_this_package(LOADING, tmp_path / "models.pt", tmp_path / "outputs.pt")
    outputs = torch.load(tmp_path / "outputs.pt")
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected[name], rtol=1e-5, atol=1e-6)


def test_the_other_process_imports_nothing_of_ours_and_tells_each_time_what_happens():
    for package in ("deltaopt", "tests.support"):
        with pytest.raises(AssertionError, match="No module named 'deltaopt'" if package == "deltaopt" else "'tests"):
            run_without_this_package(f"import {package}")
    for _ in range(2):
        said = run_without_this_package("import warnings; assert 'found' not in globals(); found = warnings.warn('x')")
        assert "UserWarning: x" in said
    with pytest.raises(AssertionError, match="ended, with 3"):
        Server().run("import os; os._exit(3)", [])


def test_a_model_is_not_pickled_while_hooks_correct_it(tmp_path: Path):
    """It would compute with the moved W where it is loaded; a deep copy computes with the base."""
    run = ModelRun(dtype=torch.float32).train(batches(3))
    (ids,) = batches(1, seed=7)
    with run.optimizer.base_weights(method="hooks"):
        with pytest.raises(RuntimeError, match=r"cannot be pickled while base_weights\(\) corrects"):
            torch.save(run.model, tmp_path / "model.pt")
        copied = copy.deepcopy(run.model)
        base = loss_of(run.model, ids)
    torch.save(run.model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert same(loss_of(loaded, ids), loss_of(run.model, ids))
    assert same(loss_of(copied, ids), base)
    assert not same(loss_of(loaded, ids), base)
