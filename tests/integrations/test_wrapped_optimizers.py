"""Optimizers that other libraries have wrapped: every function of ours finds the one within."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import deltaopt
from deltaopt.integrations.peft import save_adapter
from tests.support.compare import relative
from tests.support.models import batches, loss_of, peft
from tests.support.peft_runs import ModelRun, peft_asks_by_an_old_name

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]


def accelerated(run: ModelRun, accelerator_of: Callable[..., object]) -> object:
    return accelerator_of().prepare(run.optimizer)


def of_lightning(run: ModelRun, accelerator_of: Callable[..., object]) -> object:
    lightning = pytest.importorskip("lightning", reason="runs where lightning is installed")
    return lightning.pytorch.core.optimizer.LightningOptimizer(run.optimizer)


def of_fabric(run: ModelRun, accelerator_of: Callable[..., object]) -> object:
    lightning = pytest.importorskip("lightning", reason="runs where lightning is installed")
    return lightning.Fabric(accelerator="cpu", devices=1).setup_optimizers(run.optimizer)


def lookahead(run: ModelRun, accelerator_of: Callable[..., object]) -> object:
    library = pytest.importorskip("pytorch_optimizer", reason="runs where pytorch_optimizer is installed")
    return library.Lookahead(run.optimizer, k=1000)


def lookahead_accelerated(run: ModelRun, accelerator_of: Callable[..., object]) -> object:
    return accelerator_of().prepare(lookahead(run, accelerator_of))


WRAPPERS = {
    "accelerate": accelerated,
    "Lightning": of_lightning,
    "Fabric": of_fabric,
    "Lookahead": lookahead,
    "Lookahead in accelerate": lookahead_accelerated,
}


@pytest.fixture(params=WRAPPERS)
def wrapped_run(request, accelerator_of) -> tuple[ModelRun, nn.Module, object]:
    """A run, its model as it was, and its optimizer in a wrapper, after some steps of the optimizer itself."""
    run = ModelRun(dtype=torch.float32)
    base = copy.deepcopy(run.model)
    run.train(batches(3))
    return run, base, WRAPPERS[request.param](run, accelerator_of)


def test_unwrap_finds_the_optimizer(wrapped_run):
    run, _, wrapped = wrapped_run
    assert wrapped is not run.optimizer
    assert deltaopt.unwrap(wrapped) is run.optimizer
    assert deltaopt.unwrap(run.optimizer) is run.optimizer


def test_exports_take_the_wrapped_one(wrapped_run):
    run, base, wrapped = wrapped_run
    exported, merged = deltaopt.export_adapter(wrapped), deltaopt.merged_weights(wrapped)
    before = {name: module for name, module in base.named_modules() if hasattr(module, "get_delta_weight")}
    for name, layer in run.model.named_modules():
        if name in before:
            effective = layer.get_base_layer().weight.double() + layer.get_delta_weight("default").double()
            W0 = before[name].get_base_layer().weight.double()
            assert relative(merged[name], effective) < 1e-6
            assert relative(exported[name].product(), effective - W0) < 1e-5
    assert exported.keys() == merged.keys() == before.keys()


def test_save_adapter_takes_the_wrapped_one(wrapped_run, tmp_path):
    run, base, wrapped = wrapped_run
    save_adapter(run.model, wrapped, tmp_path)
    served = peft.PeftModel.from_pretrained(base.unload(), tmp_path)
    (ids,) = batches(1, seed=7)
    with torch.no_grad():
        assert relative(loss_of(served, ids), loss_of(run.model, ids)) < 1e-5


def refuses(thing: object, match: str) -> None:
    for function in (deltaopt.unwrap, deltaopt.export_adapter, deltaopt.merged_weights):
        with pytest.raises(TypeError, match=match):
            function(thing)


def test_what_holds_no_such_optimizer_is_refused(accelerator_of, tmp_path):
    run = ModelRun()
    adam = run.optimizer.inner
    scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0)
    accelerator = accelerator_of()
    prepared = accelerator.prepare(adam)
    refuses(prepared, r"no DeltaLoRAOptimizer in this AcceleratedOptimizer \(looked at AcceleratedOptimizer, AdamW\)")
    refuses(adam, r"no DeltaLoRAOptimizer in this AdamW \(looked at AdamW\): hand in the optimizer that trains")
    refuses(scheduler, r"got a LambdaLR: hand in the optimizer, its \.optimizer$")
    refuses(accelerator, re.escape("got a Accelerator: hand in the optimizer, its ._optimizers[0]"))
    refuses(deltaopt.DeltaLoRAOptimizer, "got the class DeltaLoRAOptimizer: hand in the optimizer$")
    refuses(None, "got a NoneType: hand in the optimizer$")
    refuses(run.model, "got a PeftModelForCausalLM: hand in the optimizer$")
    with pytest.raises(TypeError, match="no DeltaLoRAOptimizer in this AdamW"):
        save_adapter(run.model, adam, tmp_path)


def test_a_trainer_is_no_optimizer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="runs where transformers is installed")
    run = ModelRun(dtype=torch.float32)
    arguments = transformers.TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    with_one = transformers.Trainer(run.model, arguments, optimizers=(run.optimizer, None))
    refuses(with_one, r"got a Trainer: hand in the optimizer, its \.optimizer$")
    assert deltaopt.unwrap(with_one.optimizer) is run.optimizer
    without = transformers.Trainer(run.model, arguments)
    refuses(without, r"which this one makes when it begins to train \(its \.optimizer is None as yet\)")


class Ring:
    """Two optimizers that hold each other, as an engine and its optimizer do; `inner` raises."""

    def __init__(self) -> None:
        self.optimizer = self

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...

    @property
    def inner(self) -> object:
        raise RuntimeError("not initialised")


def test_a_ring_of_wrappers_ends():
    ring, run = Ring(), ModelRun()
    refuses(ring, r"no DeltaLoRAOptimizer in this Ring \(looked at Ring\)")
    ring.base_optimizer, run.optimizer.engine = run.optimizer, ring
    assert deltaopt.unwrap(ring) is run.optimizer
