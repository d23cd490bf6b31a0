"""A sharded W in two places, or in two triples, is found on every rank: on one whose piece is empty too."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from deltaopt import LoRATriple, find_triples
from deltaopt.checks import set_problems
from deltaopt.folded import FoldedUpdate
from deltaopt.groups import Settings, parse_triples
from deltaopt.in_place import InPlaceUpdate
from deltaopt.integrations import tied_places
from deltaopt.weight import WeightState
from tests.support.distributed import on_all_ranks
from tests.support.models import peft, transformers
from tests.support.small_ranks import LoRALinear, triples_of

pytestmark = pytest.mark.extra


def test_a_tied_and_sharded_lm_head_is_refused():
    on_all_ranks(tied_lm_head_on_rank)


def tied_lm_head_on_rank(rank: int) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=24, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    adapter = peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapter)
    fully_shard(model)
    with pytest.raises(ValueError, match=r"lm_head: its W is .*embed_tokens.weight and .*lm_head.base_layer.weight"):
        find_triples(model)
    tied = {triple.label: triple.tied for triple in find_triples(model, allow_tied=True)}
    assert {name.rpartition(".")[2]: found for name, found in tied.items()} == {"q_proj": False, "lm_head": True}


def one_row() -> nn.Sequential:
    """Its W of one row is in two places. On two ranks the piece of the second one is empty."""
    model = nn.Sequential(LoRALinear(8, 1, torch.float32), nn.Linear(8, 1, bias=False))
    model[1].weight = model[0].base.weight
    fully_shard(model)
    return model


def test_a_tied_weight_with_an_empty_piece_is_found():
    on_all_ranks(empty_piece_on_rank)


def empty_piece_on_rank(rank: int) -> None:
    model = one_row()
    assert (model[1].weight.to_local().numel() == 0) == (rank == 1)
    ((_, names),) = tied_places(model, triples_of(model))
    assert names == ["0.base.weight", "1.weight"]


def test_two_triples_of_one_sharded_weight_are_refused():
    on_all_ranks(two_triples_on_rank)


def two_triples_on_rank(rank: int) -> None:
    model = one_row()
    layer = model[0]
    other = LoRALinear(8, 1, torch.float32)

    def problems(rule, *parts: tuple[LoRALinear, tuple[int, int]]) -> list[str]:
        """What is said of triples of the one W: the factors, and the columns that move."""
        triples = [
            LoRATriple((layer.base, "weight"), (own, "A"), (own, "B"), columns=columns, name=f"part{i}")
            for i, (own, columns) in enumerate(parts)
        ]
        (group,), _ = parse_triples(triples, Settings(1.0, 0, 1.0))
        weights = [WeightState(triple, group) for triple in group.triples]
        for weight in weights:
            weight.resolve()
        return [problem.sentence for problem in set_problems(weights, set(), rule)]

    (sentence,) = problems(InPlaceUpdate(), (layer, (0, 5)), (other, (4, 8)))
    assert sentence.startswith("its W shares memory with the W of part0 (a duplicate triple")
    assert problems(InPlaceUpdate(), (layer, (0, 4)), (other, (4, 8))) == []
    assert problems(FoldedUpdate(), (layer, (0, 8)), (other, (0, 8))) == []  # two adapters: nothing is written
    assert len(problems(FoldedUpdate(), (layer, (0, 8)), (layer, (0, 8)))) == 1
    assert len(problems(FoldedUpdate(), (layer, (0, 8)), (other, (0, 5)))) == 1
