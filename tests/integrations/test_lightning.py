"""Lightning's Trainer: its checkpoints hold the whole model, or what a module leaves in them."""

import pytest
import torch

from tests.support.models import batches, causal_lm, loss_of, optimizer_for

lightning = pytest.importorskip("lightning", reason="runs where lightning is installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*is lower than the logging interval.*"),
]


class Module(lightning.LightningModule):
    """A tiny Llama with adapters; `adapter_only` keeps the frozen weights out of the checkpoint."""

    def __init__(self, dtype, adapter_only=False):
        super().__init__()
        self.model, self.adapter_only = causal_lm(dtype), adapter_only
        self.strict_loading = not adapter_only

    def training_step(self, ids, _):
        return loss_of(self.model, ids)

    def configure_optimizers(self):
        optimizer = optimizer_for(self.model, start_step=1)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8), "interval": "step"}
        ]

    def on_save_checkpoint(self, checkpoint):
        if self.adapter_only:
            trained = {name for name, p in self.named_parameters() if p.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


def fit(module, folder, steps, checkpoint=None):
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = torch.utils.data.DataLoader(
        batches(1)[0], batch_size=4
    )  # one batch: where Lightning goes on in the data is its own
    trainer.fit(module, data, ckpt_path=checkpoint)
    assert trainer.global_step == steps
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fit_that_is_resumed_goes_on_bit_for_bit(tmp_path, dtype):
    whole = Module(dtype)
    fit(whole, tmp_path, 6)
    half = Module(dtype)
    fit(half, tmp_path, 3).save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module(dtype)
    trainer = fit(resumed, tmp_path, 6, tmp_path / "half.ckpt")
    assert trainer.optimizers[0].step_count == 6
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_checkpoint_with_the_adapter_alone_is_rebuilt(tmp_path):
    whole = Module(torch.float32)
    fit(whole, tmp_path, 6)
    half = Module(torch.float32, adapter_only=True)
    fit(half, tmp_path, 3).save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name for name in saved)
    resumed = Module(torch.float32, adapter_only=True)
    fit(resumed, tmp_path, 6, tmp_path / "half.ckpt")
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert float((p - q).detach().norm()) <= 1e-6 * float(p.detach().norm()), name
