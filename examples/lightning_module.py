"""Delta-LoRA in Lightning: train, save, resume bit for bit, and load the trained model.

    python examples/lightning_module.py

Needs `pip install "deltaopt[peft]" lightning transformers`. The model is a tiny one that is made here, so that the
script runs in seconds and without a network: put your own in `load_base`.
"""

import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from deltaopt import DeltaLoRAOptimizer
from deltaopt.integrations.peft import save_adapter


def load_base() -> LlamaForCausalLM:
    """Make the pretrained model; the same at each call, as `from_pretrained` gives it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    return LlamaForCausalLM(config)


class DeltaLoRAModule(lightning.LightningModule):
    """A language model with adapters.

    Args:
        lr: the learning rate of A and B.
        update_ratio: how far W moves for each movement of the product A B (lambda in the paper).
        start_step: from which step on W moves (K in the paper).
    """

    def __init__(self, lr: float = 1e-2, update_ratio: float = 2.0, start_step: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()  # so that load_from_checkpoint builds the same module
        self.model = get_peft_model(load_base(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))

    def training_step(self, ids: torch.Tensor, _: int) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):
        optimizer = DeltaLoRAOptimizer.for_model(
            self.model,
            torch.optim.AdamW,
            lr=self.hparams.lr,
            update_ratio=self.hparams.update_ratio,
            start_step=self.hparams.start_step,
        )
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=8)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def fit(module: DeltaLoRAModule, folder: Path, epochs: int, resume_from: Path | None = None) -> lightning.Trainer:
    """Train for 4 steps an epoch and save at the end of each."""
    lightning.seed_everything(0, verbose=False)
    data = torch.randint(0, 32, (16, 12), generator=torch.Generator().manual_seed(1))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=resume_from)
    return trainer


def main(folder: Path) -> None:
    trained = DeltaLoRAModule()
    trainer = fit(trained, folder / "whole", epochs=2)
    optimizer = trainer.optimizers[0]
    name = optimizer.triples[0].name
    print(f"W of {name} was asked to move by {optimizer.displacement(name).product().norm():.2f} (Frobenius norm)")

    # Lightning saves the whole model, with the W that has moved, and the optimizer's state. A run that is resumed goes
    # on as if it had not stopped.
    resumed = DeltaLoRAModule()
    fit(resumed, folder / "resumed", epochs=2, resume_from=folder / "whole" / "epoch=0.ckpt")
    assert all(map(torch.equal, trained.parameters(), resumed.parameters()))
    print("the resumed run equals the one that was not interrupted, bit for bit")

    # For evaluation in another process no optimizer is needed.
    loaded = DeltaLoRAModule.load_from_checkpoint(folder / "whole" / "epoch=1.ckpt").eval()
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        expected = trained.eval().model(input_ids=ids).logits
        error = (loaded.model(input_ids=ids).logits - expected).abs().max()
    print(f"load_from_checkpoint gives logits within {error:.0e} of the trained model's")

    # For other tools: one plain LoRA adapter for the pretrained model (examples/serve.py loads one).
    save_adapter(trained.model, optimizer, folder / "adapter")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        main(Path(directory))
