"""Compensated rounding under Trainer: the checkpoint of an adapter does not hold what rounding cut off from W."""

import copy

import pytest
import torch
from torch import Tensor, nn

from deltaopt import leave_out_compensation, unwrap
from tests.integrations.test_trainer import STEPS, trainer_for
from tests.support.compare import relative, same, through_a_file
from tests.support.internals import full_weight
from tests.support.models import causal_lm, optimizer_for, transformers, weights
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.small import random_steps

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]


def full_weights(optimizer) -> list[Tensor]:
    return [full_weight(optimizer, index) for index in range(len(optimizer.triples))]


def has_compensation(state: dict) -> bool:
    return any(key.startswith("deltaopt.compensation.") for entries in state["state"].values() for key in entries)


def compensated() -> nn.Module:
    """Build a bfloat16 model with float32 factors, as PEFT has them."""
    return causal_lm(torch.bfloat16, factors=torch.float32)


class FullWeights(transformers.TrainerCallback):
    """Notes every W with what was cut off from it: as training begins, and after each step."""

    def __init__(self, trainer: transformers.Trainer) -> None:
        self.trainer, self.at = trainer, dict[int, list[Tensor]]()
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        self.at[state.global_step] = full_weights(unwrap(self.trainer.optimizer))

    def on_step_end(self, args, state, control, **kwargs):
        self.on_train_begin(args, state, control)


def test_a_run_resumes_from_the_adapter_without_it(accelerator_of, tmp_path):
    """As exactly as in float32: W is rebuilt from the base with all that was cut off from it.

    The steps after that differ where a bit of W does.
    """

    def ran(name: str, resume_from: str | None = None) -> dict[int, list[Tensor]]:
        trainer, _ = trainer_for(compensated(), tmp_path / name, start_step=1, rounding="compensated")
        leave_out_compensation(trainer.optimizer)
        notes = FullWeights(trainer)
        trainer.train(resume_from_checkpoint=resume_from)
        return notes.at

    whole = ran("whole")
    middle = tmp_path / "whole" / "checkpoint-3"
    assert not has_compensation(torch.load(middle / "optimizer.pt", weights_only=True))
    resumed = ran("resumed", str(middle))
    assert list(resumed) == list(range(3, STEPS + 1))
    base = [W.float() for W in weights(compensated()).values()]
    for step, tolerance in (3, 1e-5), (STEPS, 1e-2):
        for W, again, W0 in zip(whole[step], resumed[step], base, strict=True):
            assert relative(again - W0, W - W0) < tolerance
            assert relative(W, W0) > 1e-3


def test_the_handle_brings_complete_states_back():
    optimizer = optimizer_for(compensated(), rounding="compensated")
    random_steps(optimizer, 2)
    handle = leave_out_compensation(optimizer)
    assert not has_compensation(optimizer.state_dict())
    assert has_compensation(copy.deepcopy(optimizer).state_dict())
    handle.remove()
    assert has_compensation(optimizer.state_dict())


def test_without_a_word_the_state_is_complete_next_to_the_whole_model():
    """Bit for bit: the same bits of W and the same remainders follow."""
    model = compensated()
    optimizer = optimizer_for(model, rounding="compensated")
    random_steps(optimizer, 2)
    twin = causal_lm(torch.bfloat16, factors=torch.float32)
    twin.load_state_dict(model.state_dict())
    resumed = optimizer_for(twin, rounding="compensated")
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for each in (optimizer, resumed):
        random_steps(each, 2, seed=3)
    assert same(full_weights(resumed), full_weights(optimizer))


def test_another_optimizer_is_refused():
    with pytest.raises(TypeError, match="no DeltaLoRAOptimizer in this SGD"):
        leave_out_compensation(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
