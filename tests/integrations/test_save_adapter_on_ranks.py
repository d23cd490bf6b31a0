"""save_adapter on several ranks: all gather what is sharded, and one writes."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from deltaopt.integrations.peft import save_adapter
from tests.support.distributed import on_all_ranks, shares
from tests.support.models import batches, loss_of, optimizer_for, peft, transformers
from tests.support.peft_runs import peft_asks_by_an_old_name

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]

IDS = batches(1, seed=9)[0]


def base_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=24, num_hidden_layers=2, **sizes))


def test_all_ranks_of_a_sharded_model_save_and_the_first_one_writes(tmp_path):
    on_all_ranks(save_on_rank, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["rank 0"]


def save_on_rank(rank: int, folder: str) -> None:
    """A head trains too: it is sharded, and is in the file."""
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(base_model(), config)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = optimizer_for(model, weight_update="folded")
    for ids in shares(batches(4), rank):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()
    saved = save_adapter(model, optimizer, Path(folder) / f"rank {rank}")
    assert saved.rank == 3
    assert max(saved.values()) == 0.0
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    if rank == 0:
        loaded = peft.PeftModel.from_pretrained(base_model(), str(Path(folder) / "rank 0"))
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
        assert (base_model()(input_ids=IDS).logits - expected).abs().max() > 1e-2
