"""Models within torch.compile, DDP, DataParallel and checkpoint wrappers: names, states and noise are the model's."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import deltaopt
from deltaopt import DeltaLoRAOptimizer, find_triples
from deltaopt.integrations.peft import save_adapter
from tests.support.compare import relative, same
from tests.support.models import RATIO, batches, causal_lm, loss_of, optimizer_for, peft
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.small import random_steps

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_layers(model: nn.Module) -> nn.Module:
    """Each block in a module of torch.compile, as it is done by hand; a block of its own in another wrapper too."""
    blocks = model.base_model.model.model.layers
    blocks[0], blocks[1] = compiled(blocks[0]), compiled(checkpoint_wrapper(blocks[1]))
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    for block in model.base_model.model.model.layers:
        block.compile(backend="eager")
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "compiled layers": compiled_layers,
    "layers compiled in place": compiled_in_place,
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "compile of DDP": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "DDP of compile": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "DDP of compiled layers": lambda model: nn.parallel.DistributedDataParallel(compiled_layers(model)),
}


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def plain_names() -> list[str]:
    """The names of the LoRA layers, as the unwrapped model has them."""
    return [name for name, module in causal_lm().named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def lora_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_names_are_those_of_the_model(wrapper):
    assert [triple.label for triple in find_triples(WRAPPERS[wrapper](causal_lm()))] == plain_names()


def trained(
    wrap: Callable[[nn.Module], nn.Module], prefix: str = "", **options
) -> tuple[nn.Module, DeltaLoRAOptimizer]:
    """A model and its optimizer after a few steps, with `prefix` in front of all names, as wrappers once put it there.

    The gradients are random, so that no forward pass has to be compiled.
    """
    model = causal_lm(options.pop("dtype", torch.float32))
    triples = find_triples(wrap(model))
    if prefix:
        triples = [triple.named(prefix + triple.label) for triple in triples]
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=1e-2, update_ratio=RATIO, **options)
    random_steps(optimizer, 3)
    return model, optimizer


def moved(optimizer: DeltaLoRAOptimizer) -> list[Tensor]:
    return [triple.W.clone() for triple in optimizer.triples]


@pytest.mark.parametrize("wrapper", ["compile", "compiled layers", "DDP", "DDP of compile"])
def test_the_noise_of_rounding_is_the_same(wrapper):
    """It is keyed by the name."""
    _, optimizer = trained(lambda model: model, dtype=torch.bfloat16)
    _, wrapped = trained(WRAPPERS[wrapper], dtype=torch.bfloat16)
    assert same(moved(wrapped), moved(optimizer))
    _, other = trained(lambda model: model, prefix="_orig_mod.", dtype=torch.bfloat16)
    assert not same(moved(other), moved(optimizer))


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("saved_with_it", [True, False])
def test_a_state_with_the_names_of_a_wrapper_loads_without_and_the_reverse(saved_with_it, prefix, rounding):
    """Earlier versions had these names. The whole model is loaded too, so that W is the same to the last bit."""
    settings = {"dtype": torch.bfloat16, "rounding": rounding}
    model, optimizer = trained(lambda model: model, prefix * saved_with_it, **settings)
    other, resumed = trained(lambda model: model, prefix * (not saved_with_it), **settings)
    random_steps(resumed)
    state = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    assert [triple.label for triple in resumed.triples] != [triple.label for triple in optimizer.triples]
    for triple, own in zip(optimizer.triples, resumed.triples, strict=True):
        asked, found = optimizer.displacement(triple.label), resumed.displacement(own.label)
        assert same(found.product(), asked.product())
    if rounding == "compensated":  # which has no noise
        for each in (optimizer, resumed):
            random_steps(each, 2, seed=5)
        assert same(moved(resumed), moved(optimizer))


@pytest.mark.parametrize("wrapped_later", [False, True])
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_a_run_changes_between_a_model_and_its_wrapper(rounding, wrapped_later):
    """`for_model` of a model in DDP and of the model itself: the states fit, and so does the noise to come."""
    options = {"rounding": rounding, "rounding_seed": 3}
    ddp = nn.parallel.DistributedDataParallel
    model, other = causal_lm(torch.bfloat16, factors=torch.float32), causal_lm(torch.bfloat16, factors=torch.float32)
    first = optimizer_for(model if wrapped_later else ddp(model), **options)
    second = optimizer_for(ddp(other) if wrapped_later else other, **options)
    assert [triple.label for triple in first.triples] == [triple.label for triple in second.triples] == plain_names()
    random_steps(first, 3)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for each in (first, second):
        random_steps(each, 3, seed=5)
    assert same(moved(second), moved(first))


def test_a_state_of_other_layers_is_refused():
    _, optimizer = trained(lambda model: model, prefix="decoder.")
    _, other = trained(lambda model: model)
    with pytest.raises(ValueError, match="the saved state belongs to other triples"):
        other.load_state_dict(optimizer.state_dict())


class Pair(nn.Module):
    """Holds one part as `module` and another under its own name, neither of them in a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.proj = nn.ModuleDict({"proj": nn.Linear(6, 4)}), nn.Linear(6, 4)


def adapted(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["proj"]))


def labels(model: nn.Module) -> list[str]:
    return [triple.label for triple in find_triples(model)]


def test_a_module_of_that_name_is_no_wrapper():
    model = adapted(Pair())
    expected = ["base_model.model.module.proj", "base_model.model.proj"]
    assert labels(model) == expected
    assert labels(nn.DataParallel(model)) == labels(torch.optim.swa_utils.AveragedModel(model)) == expected


def test_names_that_would_be_equal_stay_apart():
    model = Pair()
    model._orig_mod = nn.ModuleDict({"proj": nn.Linear(6, 4)})
    model = adapted(model)
    assert labels(model) == ["base_model.model.module.proj", "base_model.model.proj", "base_model.model._orig_mod.proj"]
    optimizer = optimizer_for(model)
    random_steps(optimizer, 2)
    assert len(deltaopt.export_adapter(optimizer)) == 3


@pytest.mark.parametrize("wrapper", ["compiled layers", "layers compiled in place"])
def test_an_adapter_of_a_compiled_model_is_one_for_the_plain_base(wrapper, tmp_path):
    model, optimizer = trained(WRAPPERS[wrapper])
    save_adapter(model, optimizer, tmp_path)
    served = peft.PeftModel.from_pretrained(causal_lm(torch.float32).unload(), tmp_path)
    (ids,) = batches(1, seed=7)
    reference = causal_lm(torch.float32)
    for triple, layer in zip(optimizer.triples, lora_layers(reference), strict=True):
        layer.get_base_layer().weight.data = triple.W.detach() + triple.scaling * (triple.A @ triple.B).detach()
    with torch.no_grad(), reference.disable_adapter():
        assert relative(loss_of(served, ids), loss_of(reference, ids)) < 1e-6
