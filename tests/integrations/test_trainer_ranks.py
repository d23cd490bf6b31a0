"""Trainer in two processes: DeltaLoRACallback compares them when training begins, at each save and at the end."""

import warnings
from pathlib import Path

import pytest

from deltaopt import RanksDisagreeError
from deltaopt.integrations.trainer import DeltaLoRACallback, DeltaLoRAFactory
from tests.support.distributed import WORLD, on_all_ranks
from tests.support.models import transformers
from tests.support.trainer_runs import OPTIONS, arguments, ours, trainer_of

pytestmark = pytest.mark.extra


class Counted(DeltaLoRACallback):
    """Notes after how many steps the processes were compared."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.compared: list[int] = []

    def _check(self, args, optimizer):
        super()._check(args, optimizer)
        if args.world_size > 1 and self._check_ranks:
            self.compared.append(optimizer.step_count)


class AnotherWeight(transformers.TrainerCallback):
    """Writes into a W of rank 1 after two steps."""

    def on_step_end(self, args, state, control, optimizer=None, model=None, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            weight = next(p for name, p in model.named_parameters() if "q_proj.base_layer.weight" in name)
            weight.data[0, 0] += 1


def run_on_rank(rank: int, folder: str, differs: bool = False, check_ranks: bool = True) -> list:
    warnings.simplefilter("ignore")
    callback = Counted(check_ranks=check_ranks)
    args = arguments(Path(folder), max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1)
    trainer = trainer_of(
        args, (DeltaLoRAFactory, OPTIONS), callbacks=[callback, *([AnotherWeight()] if differs else [])]
    )
    try:
        trainer.train()
    except RanksDisagreeError as error:
        return [callback.compared, str(error)]
    return [callback.compared, ours(trainer).step_count]


def test_the_processes_are_compared_at_the_beginning_at_saves_and_at_the_end(tmp_path):
    assert on_all_ranks(run_on_rank, str(tmp_path)) == [[[0, 2, 4, 4], 4]] * WORLD


def test_a_w_that_differs_stops_all_processes_at_the_save(tmp_path):
    first, second = on_all_ranks(run_on_rank, str(tmp_path), True)
    assert first == second
    compared, told = first
    assert compared == [0]
    assert "W of 1 layer (base_model.model.model.layers.0.self_attn.q_proj): rank 1 differs from rank 0" in told


def test_the_comparison_can_be_turned_off(tmp_path):
    assert on_all_ranks(run_on_rank, str(tmp_path), True, False) == [[[], 4]] * WORLD
