"""The base by itself in layers that tensor parallelism has split: output and gradients as in one process."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from deltaopt.base_hooks import OutputHook
from deltaopt.layouts import MatrixView
from deltaopt.split_output import split_problem
from tests.support.distributed import on_all_ranks
from tests.support.sharded_layers import here
from tests.support.tensor_parallel import Block, batch, block, split, train, triples_of, whole
from tests.support.threads import on_threads

pytestmark = pytest.mark.extra


def with_switch(model: Block) -> list[LoRATriple]:
    """Triples whose branches say if they take part."""
    return [
        LoRATriple(
            (layer.base, "weight"),
            (layer.lora_B, "weight"),
            (layer.lora_A, "weight"),
            scaling=0.5,
            name=name,
            is_active=lambda layer=layer: layer.active,
        )
        for name, layer in (("up", model.up), ("down", model.down))
    ]


def output_and_gradient(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = batch(9).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), x.grad


def base_of_a_split_model(rank: int, plan: str, way: str) -> tuple[Tensor, Tensor]:
    model = block(bias=True)
    if plan == "local":
        split(model, init_device_mesh("cpu", (2,)))
    else:  # what is between the layers is a DTensor too
        plan = {
            "up.base": ColwiseParallel(use_local_output=False),
            "up.lora_B": ColwiseParallel(use_local_output=False),
            "down.base": RowwiseParallel(),
            "down.lora_A": RowwiseParallel(),
        }
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    triples = with_switch(model) if way == "switch" else triples_of(model)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=1e-1)
    train(model, optimizer, range(3))
    assert (whole(model.up.base.weight) - block(bias=True).up.base.weight).abs().max() > 0.05
    model.up.active = model.down.active = False
    if way == "switch":
        return output_and_gradient(model)
    with optimizer.base_weights(method=way):
        return output_and_gradient(model)


@pytest.mark.parametrize("way", ["switch", "hooks", "copy"])
@pytest.mark.parametrize("plan", ["local", "sharded"])
def test_the_output_without_the_branch_is_that_of_the_base(plan, way):
    alone = block(bias=True)
    alone.up.active = alone.down.active = False
    expected = output_and_gradient(alone)
    for found in on_all_ranks(base_of_a_split_model, plan, way):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def with_hooks(rank: int) -> tuple[Block, DeltaLoRAOptimizer]:
    """A split model whose branches are off, after a step that has moved W."""
    model = split(block(), init_device_mesh("cpu", (2,)))
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, with_switch(model), lr=1e-1)
    train(model, optimizer, range(1))
    model.up.active = model.down.active = False
    return model, optimizer


def rows_of_a_batch(rank: int) -> list[Tensor]:
    model, _ = with_hooks(rank)
    hook = next(iter(model.up.base._forward_hooks.values()))
    assert isinstance(hook, OutputHook)
    x, output = batch(0), torch.zeros(4, 8)
    found = hook.corrected(output, x, [0, 2])
    everywhere = hook.corrected(output, x, None)
    return [found, torch.stack([everywhere[0], output[1], everywhere[2], output[3]])]


def test_rows_of_a_batch_are_corrected_alone():
    for found, expected in on_threads(rows_of_a_batch, world_size=2):
        assert found.abs().sum() > 0
        torch.testing.assert_close(found, expected)


def refused_in_the_forward_pass(rank: int, x: Tensor, output: Tensor, compiled: bool) -> str:
    model, _ = with_hooks(rank)
    hook = next(iter(model.up.base._forward_hooks.values()))
    assert isinstance(hook, OutputHook)
    call = hook.pulled_back if compiled else hook.corrected
    with pytest.raises(RuntimeError) as refused:
        call(output, x, None)
    return str(refused.value)


@pytest.mark.parametrize(
    ("x", "output", "compiled", "said"),
    [
        ((4, 8), (2, 8), False, r"over the ranks \[0, 1\] \(tensor parallelism\), .* \(sequence parallelism\)"),
        ((4, 8), (4, 5), False, r"its output has 5 columns, of 16 in all and 8 here"),
        ((4, 3), (4, 8), False, r"its input has 3 columns, of 8 in all"),
        ((4, 8), (4, 8), True, r"in a compiled graph: its W is split over several ranks"),
    ],
)
def test_what_is_not_known_of_an_output_is_refused_in_the_forward_pass(x, output, compiled, said):
    for found in on_threads(refused_in_the_forward_pass, torch.ones(x), torch.ones(output), compiled, world_size=2):
        assert found.startswith("up: its W has moved for a branch that takes no part in this forward pass")
        assert re.search(said, found), found
        assert "Run this pass within optimizer.base_weights()" in found


def problems_of_other_layers(rank: int) -> list[str | None]:
    mesh = init_device_mesh("cpu", (2,))
    unit = fully_shard(nn.Linear(4, 6), mesh=mesh)
    x, output, linear = torch.ones(2, 4), torch.ones(2, 6), MatrixView("linear")
    partial = DTensor.from_local(torch.ones(6, 4), mesh, [Partial()])
    return [
        split_problem(output, x, unit.weight, linear, unit, True),
        split_problem(output, x, unit.weight, MatrixView("embedding"), unit, False),
        split_problem(output, None, unit.weight, linear, unit, False),
        split_problem(output, x, partial, linear, unit, False),
        split_problem(output, x, unit.weight, linear, unit, False),
    ]


def test_layers_of_which_the_parts_are_not_known_are_named():
    for unit, embedding, no_tensor, partial, known in on_threads(problems_of_other_layers, world_size=2):
        assert "sharded by FSDP2 as a unit of its own" in unit
        assert embedding.endswith("which is known here for nn.Linear and Conv1D, not for the layout 'embedding'")
        assert no_tensor.endswith("its input and output are no tensors")
        assert partial.endswith("its parts have yet to be summed up")
        assert known is None


def base_on_two_by_two(rank: int) -> tuple[Tensor, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = split(block(bias=True), mesh["tp"])
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=mesh["dp"])
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, with_switch(model), lr=1e-1)
    train(model, optimizer, range(3))
    model.up.active = model.down.active = False
    return output_and_gradient(model)


def test_the_base_by_itself_under_fsdp2_on_tensor_parallelism():
    alone = block(bias=True)
    alone.up.active = alone.down.active = False
    expected = output_and_gradient(alone)
    for found in on_threads(base_on_two_by_two):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def save_llama(folder: Path) -> None:
    pytest.importorskip("peft", reason="runs where PEFT is installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder)


def load_split(folder: str, **config: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**config))
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"]))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return whole(model(input_ids=torch.arange(12).view(2, 6)).logits)


def peft_on_a_plan(rank: int, folder: str) -> list:
    torch.manual_seed(0)
    model = load_split(folder, tp_size=2)
    base = logits(model)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2)
    assert all(isinstance(triple.W, DTensor) for triple in optimizer.triples)
    ids = torch.arange(12).view(2, 6)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with model.disable_adapter():
        found = logits(model)
    moved = [(whole(triple.W), triple.scaling * whole(triple.A) @ whole(triple.B)) for triple in optimizer.triples]
    return [base, found, logits(model), moved]


def test_peft_on_a_plan_of_transformers(tmp_path):
    save_llama(tmp_path)
    from transformers import LlamaForCausalLM

    layers = LlamaForCausalLM.from_pretrained(tmp_path).model.layers
    starts = [
        projection.weight.detach()
        for layer in layers
        for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.up_proj)
    ]
    for base, found, trained, moved in on_all_ranks(peft_on_a_plan, str(tmp_path)):
        assert (trained - base).abs().max() > 0.01
        torch.testing.assert_close(found, base, rtol=1e-5, atol=1e-5)
        for (W, branch), start in zip(moved, starts, strict=True):
            torch.testing.assert_close(W, start + 2.0 * branch, rtol=1e-5, atol=1e-6)


def factors_that_nobody_averages(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    model = load_split(folder, fsdp_size=2)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2)
    before = [here(triple.W).clone() for triple in optimizer.triples]
    ids = torch.arange(12).view(2, 6) + rank  # each rank has data of its own
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(ValueError, match=r"(?s)not moved, on no rank.*average their gradients over the ranks"):
        optimizer.step()
    assert all(torch.equal(here(triple.W), W) for triple, W in zip(optimizer.triples, before, strict=True))


def test_factors_that_transformers_leaves_whole_next_to_fsdp2_have_to_be_the_same(tmp_path):
    save_llama(tmp_path)
    on_all_ranks(factors_that_nobody_averages, str(tmp_path))
