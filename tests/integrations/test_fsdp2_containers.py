"""FSDP2 in place with the layers of other libraries, and with every way in which a W is stored."""

import copy
import importlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from deltaopt import DeltaLoRAOptimizer, LoRATriple, describe, export_adapter, merged_weights
from deltaopt.integrations.peft import save_adapter
from tests.support import containers
from tests.support.compare import close, relative
from tests.support.distributed import on_all_ranks, shares
from tests.support.models import batches, causal_lm
from tests.support.models import optimizer_for as optimizer_of_model
from tests.support.peft_runs import K, ModelRun, peft_asks_by_an_old_name
from tests.support.sharded_runs import Replay, whole
from tests.support.strategies import LAYOUTS, make

pytestmark = peft_asks_by_an_old_name

EXACT = {"rtol": 0.0, "atol": 1e-12}
"""Of float64 numbers of order 1."""


class Layer(nn.Module):
    """W, A and B of one layout, under names."""

    def __init__(self, stored) -> None:
        super().__init__()
        self.weight = nn.Parameter(stored.W, requires_grad=False)
        self.A, self.B = nn.Parameter(stored.A.detach()), nn.Parameter(stored.B.detach())


def sharded_layer(layout: str, options: dict) -> tuple[Layer, Layer, list[LoRATriple]]:
    """A sharded layer, a whole one with the same numbers, and their triples."""
    layers = [Layer(make(layout, 3, torch.float64, None, False, "cpu")) for _ in range(2)]
    fully_shard(layers[0])
    triples = [
        LoRATriple((layer, "weight"), (layer, "A"), (layer, "B"), scaling=0.5, name="q", **options) for layer in layers
    ]
    return *layers, triples


def whole_layouts() -> list[str]:
    """The layouts whose factors are parameters themselves."""
    found = []
    for layout in LAYOUTS:
        stored = make(layout, 0)
        # FSDP2 takes no channels_last.
        if stored.factors(stored.A, stored.B) == (stored.A, stored.B) and stored.W.is_contiguous():
            found.append(layout)
    return found


@pytest.mark.parametrize("layout", whole_layouts())
def test_every_layout_moves_as_in_one_process(layout):
    on_all_ranks(layout_on_rank, layout)


def layout_on_rank(rank: int, layout: str) -> None:
    options = make(layout, 0).options
    sharded, alone, triples = sharded_layer(layout, options)
    before = alone.weight.clone()
    optimizer, reference = (
        DeltaLoRAOptimizer(Replay([layer.A, layer.B]), [triple], keep_base="cpu")
        for layer, triple in zip((sharded, alone), triples, strict=True)
    )
    numbers = torch.Generator().manual_seed(1)
    for _ in range(3):
        values = [torch.randn(p.shape, generator=numbers, dtype=p.dtype) for p in (alone.A, alone.B)]
        reference.inner.values = values
        reference.step()
        optimizer.inner.values = [distributed(v, p) for v, p in zip(values, (sharded.A, sharded.B), strict=True)]
        optimizer.step()
    torch.testing.assert_close(whole(sharded.weight), alone.weight.detach(), **EXACT)
    assert (alone.weight - before).abs().max() > 0.1
    assert str(optimizer.report()) == str(reference.report())
    for found, expected in (
        (merged_weights(optimizer)["q"], merged_weights(reference)["q"]),
        (optimizer.residual("q"), reference.residual("q")),
        (export_adapter(optimizer)["q"].product(), export_adapter(reference)["q"].product()),
    ):
        torch.testing.assert_close(whole(found), expected, **EXACT)
    with optimizer.base_weights():
        torch.testing.assert_close(whole(sharded.weight), before, rtol=0, atol=0)
    with optimizer.base_weights(source={"a": before + 1, "b": before}):
        torch.testing.assert_close(whole(sharded.weight), before, rtol=0, atol=0)
    optimizer.restart()
    reference.restart()
    for p, q in zip(sharded.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach(), **EXACT)


def distributed(value: Tensor, like: DTensor) -> DTensor:
    return distribute_tensor(value, like.device_mesh, like.placements)


CASES = {
    "tests.support.loralib_layers": ["linear", "embedding", "conv2d_3x3", "merged_q_v", "merged_k_v"],
    "tests.integrations.test_containers_litgpt": ["linear", "qv_of_2", "qkv_of_4"],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in CASES.items() for name in names])
def test_layers_of_other_libraries_follow_the_dense_loop(module, name):
    importlib.import_module(module)  # skips where the library is missing
    on_all_ranks(library_on_rank, module, name)


def library_on_rank(rank: int, module: str, name: str) -> None:
    case = importlib.import_module(module).CASES[name]
    model, dense = case.model(), case.model()
    start = {key: W.detach().clone() for key, (W, _) in case.deltas(dense).items()}
    fully_shard(model)
    optimizer = containers.optimizer_for(model, adapter=case.adapter)
    assert [triple.label for triple in optimizer.triples] == case.names
    inner = torch.optim.AdamW([p for p in dense.parameters() if p.requires_grad], lr=0.02)
    for t in range(6):
        containers.train(case, model, optimizer, range(t, t + 1))
        containers.dense_step(case, dense, inner, t)
        for (key, ours), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
            assert close(whole(ours), theirs), (t, key)
    for key, (W, _) in case.deltas(dense).items():
        assert relative(W, start[key]) > 1e-2, key


PEFT_LAYERS = ["conv1d_gpt2", "embedding", "conv1d", "conv2d", "experts_3_7x5_up_down"]


@pytest.mark.parametrize("name", PEFT_LAYERS)
def test_layers_of_peft_move_by_pefts_own_delta_weight(name):
    on_all_ranks(peft_layer_on_rank, name)


def peft_layer_on_rank(rank: int, name: str) -> None:
    from tests.integrations.test_peft import RATIO, case
    from tests.support.peft_layers import layer_weights, peft_deltas, train_model

    torch.manual_seed(0)
    _, model, x = case(name)
    alone = copy.deepcopy(model)
    before, deltas = layer_weights(alone), peft_deltas(alone)
    fully_shard(model)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO)
    train_model(model, optimizer, x)
    alone.load_state_dict({key: whole(tensor) for key, tensor in model.state_dict().items()})
    after, deltas_after = layer_weights(alone), peft_deltas(alone)
    for key, W in before.items():
        asked = RATIO * (deltas_after[key] - deltas[key])
        assert asked.abs().max() > 1e-4
        torch.testing.assert_close(after[key], W + asked, **EXACT)


def test_a_saved_adapter_is_of_the_whole_model_and_written_by_one_rank(tmp_path):
    on_all_ranks(saved_on_rank, tmp_path)


def saved_on_rank(rank: int, folder: Path) -> None:
    from peft import PeftModel

    run = ModelRun("in_place", "later")
    for part in run.model.base_model.model.model.layers:
        fully_shard(part)
    fully_shard(run.model)
    run.optimizer = optimizer_of_model(run.model, start_step=1)
    run.train(shares(batches(K), rank))
    ids = batches(1, seed=9)[0]
    with torch.no_grad():
        expected = run.model(input_ids=ids).logits
    run.model.reshard()
    # Each rank hands in a folder of its own, to show who writes.
    saved = save_adapter(run.model, run.optimizer, folder / str(rank))
    assert saved.rank == 6
    dist.barrier()
    assert (folder / "0" / "adapter_model.safetensors").exists()
    assert not (folder / "1").exists()
    loaded = PeftModel.from_pretrained(causal_lm().unload(), folder / "0")
    with torch.no_grad():
        found = loaded(input_ids=ids).logits
        assert relative(found, expected) <= 1e-10
        assert relative(found, causal_lm()(input_ids=ids).logits) > 1e-3


def test_an_error_in_writing_reaches_every_rank(tmp_path):
    (tmp_path / "0").write_text("a file")
    on_all_ranks(unsaved_on_rank, tmp_path)


def unsaved_on_rank(rank: int, folder: Path) -> None:
    run = ModelRun("in_place", "later")
    fully_shard(run.model)
    run.optimizer = optimizer_of_model(run.model)
    run.train(shares(batches(1), rank))
    error, message = (NotADirectoryError, "0") if rank == 0 else (RuntimeError, "rank 0 raised NotADirectoryError")
    with pytest.raises(error, match=message):
        save_adapter(run.model, run.optimizer, folder / "0")


@pytest.mark.parametrize("name", ["linear", "conv1d_gpt2", "conv2d"])
def test_layers_that_are_sharded_by_themselves_are_known_by_their_class(name):
    on_all_ranks(by_themselves_on_rank, name)


def by_themselves_on_rank(rank: int, name: str) -> None:
    """FSDP2 gives a module a class of its own, whose name is another one."""
    from tests.integrations.test_peft import RATIO, case
    from tests.support.peft_layers import lora_layers, output, train_model

    torch.manual_seed(0)
    plain, model, x = case(name)
    for layer in lora_layers(model).values():
        fully_shard(layer.base_layer)
        fully_shard(layer)
    fully_shard(model)
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=2e-2, update_ratio=RATIO)
    assert len(optimizer.triples) == len(lora_layers(model))
    train_model(model, optimizer, x)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(output(model, x), output(plain, x), rtol=0, atol=1e-11)
    with torch.no_grad():
        assert (output(model, x) - output(plain, x)).abs().max() > 1e-2
    assert "FSDP" not in str(describe(model))
