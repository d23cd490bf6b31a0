"""Lightning's Trainer: its checkpoints hold the whole model, or what a module leaves in them."""

from typing import Any

import pytest
import torch

from tests.support.models import batches, causal_lm, loss_of, optimizer_for
from tests.support.peft_runs import (
    EXACT,
    REBUILT,
    assert_models_close,
    assert_models_follow,
    assert_same_models,
    peft_asks_by_an_old_name,
)

lightning = pytest.importorskip("lightning", reason="runs where lightning is installed")

pytestmark = [
    peft_asks_by_an_old_name,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*is lower than the logging interval.*"),
]


class AdapterModule(lightning.LightningModule):
    """A tiny Llama with adapters; `adapter_only` keeps the frozen weights out of the checkpoint."""

    def __init__(self, dtype: torch.dtype, rule: str = "in_place", adapter_only: bool = False) -> None:
        super().__init__()
        self.model, self.rule, self.adapter_only = causal_lm(dtype), rule, adapter_only
        self.strict_loading = not adapter_only

    def training_step(self, ids, _):
        return loss_of(self.model, ids)

    def configure_optimizers(self):
        optimizer = optimizer_for(self.model, start_step=1, weight_update=self.rule)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint):
        if self.adapter_only:
            trained = {name for name, p in self.named_parameters() if p.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


def fit(
    module: AdapterModule, folder, steps: int, checkpoint=None, batch: int = 4, **options: Any
) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    # One batch: where in the data a resumed fit continues is Lightning's own matter.
    data = torch.utils.data.DataLoader(batches(1)[0], batch_size=batch)
    trainer.fit(module, data, ckpt_path=checkpoint)
    assert trainer.global_step == steps
    return trainer


def fitted_and_resumed(folder, *arguments) -> tuple[AdapterModule, AdapterModule]:
    """A module after 6 steps, and one that was saved after 3 of them and resumed."""
    whole, half, resumed = (AdapterModule(*arguments) for _ in range(3))
    fit(whole, folder, 6)
    fit(half, folder, 3).save_checkpoint(folder / "half.ckpt")
    trainer = fit(resumed, folder, 6, folder / "half.ckpt")
    assert trainer.optimizers[0].step_count == 6
    return whole, resumed


@pytest.mark.parametrize(
    ("dtype", "rule"),
    [(torch.float32, "in_place"), (torch.bfloat16, "in_place"), (torch.float64, "folded")],
    ids=["float32", "bfloat16", "folded"],
)
def test_a_resumed_fit_continues_bit_for_bit(dtype, rule, tmp_path):
    whole, resumed = fitted_and_resumed(tmp_path, dtype, rule)
    assert_same_models(whole.model, resumed.model)


@pytest.mark.parametrize(
    ("dtype", "rule", "tolerance"),
    [(torch.float32, "in_place", REBUILT), (torch.float64, "folded", EXACT)],
    ids=["in_place", "folded"],
)
def test_a_checkpoint_with_the_adapter_alone_is_resumed(dtype, rule, tolerance, tmp_path):
    whole, resumed = fitted_and_resumed(tmp_path, dtype, rule, True)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name for name in saved)
    assert_models_close(whole.model, resumed.model, tolerance)


@pytest.mark.parametrize("adapter_only", [False, True])
def test_a_folded_fit_and_a_resumed_one_follow_the_one_in_place(adapter_only, tmp_path):
    in_place = AdapterModule(torch.float64)
    fit(in_place, tmp_path, 6)
    for folded in fitted_and_resumed(tmp_path, torch.float64, "folded", adapter_only):
        assert_models_follow(folded.model, in_place.model)
