"""Averages that libraries make of a model or an adapter under training: what it computes then, and what is saved of it.

Each is right, or something says that it is not.
"""

import contextlib
import copy
import itertools
import logging

import pytest
import torch
from torch.optim import swa_utils

from deltaopt import merged_weights
from deltaopt.integrations.peft import save_adapter
from tests.support.compare import assert_close, assert_same_bits, bits
from tests.support.models import RATIO, batches, deltas, loss_of, optimizer_for, peft, transformers, weights
from tests.support.peft_runs import EXACT, ModelRun, effective, peft_asks_by_an_old_name

pytestmark = [
    peft_asks_by_an_old_name,
    pytest.mark.extra,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

DATA = batches(6)
BETWEEN_STEPS = r"A and B of 10 layers \(.*\) were changed between two steps"
NOT_THE_MODEL = r"an exported adapter counts .* W of 10 layers \(.*\) was written by somebody else since"
MAYBE_NOT = r"A and B of 10 layers \(.*\) .*rounding hides whether their 16-bit W was replaced too"


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=DATA[0]).logits


def saved_and_loaded(run_or_model, optimizer, folder):
    """Return plain PEFT on the pristine base, with what `save_adapter` has written."""
    save_adapter(run_or_model, optimizer, folder)
    base = transformers.LlamaForCausalLM(run_or_model.config)
    state = {k.replace("base_layer.", ""): v for k, v in ModelRun().model.get_base_model().state_dict().items()}
    base.to(torch.float64).load_state_dict({k: v for k, v in state.items() if "lora_" not in k})
    return peft.PeftModel.from_pretrained(base, folder)


def follows(model, expected):
    """Tell if a model whose adapter was saved in float32 computes the same."""
    return float((logits(model) - expected).abs().max()) < 1e-5


# Lookahead


def looked_ahead(run, after=lambda: None):
    """Train a run with Lookahead around its optimizer; call `after` after each step."""
    library = pytest.importorskip("pytorch_optimizer", reason="runs where pytorch_optimizer is installed")
    lookahead = library.Lookahead(run.optimizer, k=2, alpha=0.5)
    for ids in DATA:
        lookahead.zero_grad()
        loss_of(run.model, ids).backward()
        lookahead.step()
        after()
    return run


def test_lookahead_in_place_says_so_once():
    run = ModelRun()
    with pytest.warns(UserWarning, match=BETWEEN_STEPS) as caught:
        looked_ahead(run)
    assert len(caught) == 1


def test_lookahead_with_resync_and_folded():
    """With `resync` W belongs to the slow weights at any time; the folded rule does the same by itself."""
    pristine = weights(ModelRun().model)
    run = ModelRun()
    looked_ahead(run, run.optimizer.resync)
    for name, change in deltas(run.model).items():
        assert_close(weights(run.model)[name], pristine[name] + RATIO * change, EXACT)
    folded = looked_ahead(ModelRun("folded"))
    for name, W in run.effective().items():
        assert_close(folded.effective()[name], W, EXACT)


# Averages of all parameters, by hand, as timm's ModelEma makes them


def average_into(twin, run):
    """Average the values of two state_dicts, as timm's ModelEma does: into those of the copy."""
    with torch.no_grad():
        for kept, value in zip(twin.state_dict().values(), run.model.state_dict().values(), strict=True):
            kept.copy_(kept * 0.5 + value * 0.5)


def test_an_average_over_the_values_of_the_state_dict(tmp_path):
    """W is averaged too: the adapter alone says that it is not the model, and merged weights are."""
    run = ModelRun()
    twin = copy.deepcopy(run.model)
    for ids in DATA:
        run.train([ids])
        average_into(twin, run)
    before = copy.deepcopy(run.model.state_dict())
    run.model.load_state_dict(twin.state_dict())
    expected = logits(run.model)  # says nothing: W belongs to A and B
    with pytest.warns(UserWarning, match=NOT_THE_MODEL):
        loaded = saved_and_loaded(run.model, run.optimizer, tmp_path)
    assert not follows(loaded, expected)
    merged, computed = merged_weights(run.optimizer), effective(run.model)
    for name, W in merged.items():
        assert_close(W, computed[name.split("model.layers.")[1]], EXACT)
    run.model.load_state_dict(before)
    assert follows(saved_and_loaded(run.model, run.optimizer, tmp_path), logits(run.model))
    run.train(DATA[:1])


def test_an_average_over_the_values_of_a_folded_state_dict(tmp_path):
    """Values that are not the parameters cannot be written; into a copy from before they are right, with a hint."""
    run = ModelRun("folded")
    twin = copy.deepcopy(run.model)
    run.train(DATA[:1])
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        average_into(copy.deepcopy(run.model), run)
    average_into(twin, run)
    with pytest.warns(UserWarning, match=r"If all of it comes from state_dict\(\), it is right"):
        average_into(twin, run)
    run.model.load_state_dict(twin.state_dict())
    assert_close(logits(run.model), logits(twin), 1e-9)
    assert follows(saved_and_loaded(run.model, run.optimizer, tmp_path), logits(run.model))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_torch_averaged_models_are_the_mean_of_models(moment):
    """Nothing is said: every parameter is the mean of what it was, and no statistics of batches depend on that."""
    run = ModelRun().train(DATA[:1])
    averaged = swa_utils.AveragedModel(ModelRun().model if moment == "before" else run.model)
    seen = []
    for ids in DATA:
        run.train([ids])
        averaged.update_parameters(run.model)
        seen.append(bits(run.model))
    for name, p in averaged.module.named_parameters():
        assert_close(p, sum(one[name] for one in seen) / len(seen), 1e-12)
    logits(averaged)
    logits(run.model)
    before = bits(averaged.module)
    swa_utils.update_bn([DATA[0]], averaged)
    assert_same_bits(averaged.module, before)


# Lightning's callbacks


def fitted(callback, rule, folder, dtype=torch.float64, **options):
    """Return a module after an epoch for each two steps with this callback, and all parameters after each step."""
    lightning = pytest.importorskip("lightning", reason="runs where lightning is installed")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seen = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = ModelRun(rule, dtype=dtype).model

        def training_step(self, ids, _):
            return loss_of(self.model, ids)

        def validation_step(self, ids, _):
            loss_of(self.model, ids)

        def configure_optimizers(self):
            self.optimizer = optimizer_for(self.model, weight_update=rule, **options)
            return self.optimizer

    class Look(lightning.Callback):
        def on_train_epoch_start(self, trainer, module):
            seen.append(bits(module.model))

        def on_train_batch_end(self, trainer, module, *_):
            seen.append(bits(module.model))

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[Look(), callback(lightning.pytorch.callbacks)],
    )
    load = torch.utils.data.DataLoader
    trainer.fit(module, load(torch.cat(DATA[:2]), batch_size=4), load(DATA[0], batch_size=4))
    return module, seen


def mean(values):
    return sum(values) / len(values)


def ema(values):
    return list(itertools.accumulate(values, lambda kept, value: 0.5 * kept + 0.5 * value))[-1]


# `seen` has the model at the start of each epoch and after each of its two steps.
CALLBACKS = {
    "WeightAveraging": (lambda c: c.WeightAveraging(), [1, 2, 4, 5, 7, 8], mean),
    "EMAWeightAveraging": (lambda c: c.EMAWeightAveraging(decay=0.5), [1, 2, 4, 5, 7, 8], ema),
    "StochasticWeightAveraging": (
        lambda c: c.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
        [0, 3, 6],
        mean,
    ),
}


@pytest.mark.parametrize("rule", ["in_place", "folded"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_lightning_callbacks(name, rule, tmp_path):
    """In place and folded the model ends as the mean of all parameters. Evaluations on the way say nothing."""
    callback, moments, average = CALLBACKS[name]
    module, seen = fitted(callback, rule, tmp_path)
    for key, p in bits(module.model).items():
        assert_close(p, average([seen[i][key] for i in moments]), 1e-12)
    expected = logits(module.model)
    told = pytest.warns(UserWarning, match=NOT_THE_MODEL) if rule == "in_place" else contextlib.nullcontext()
    with told:
        loaded = saved_and_loaded(module.model, module.optimizer, tmp_path)
    assert follows(loaded, expected) == (rule == "folded")


def test_lightning_in_16_bits(tmp_path):
    """Rounding hides W; A and B tell that something was averaged."""
    callback, *_ = CALLBACKS["EMAWeightAveraging"]
    with pytest.warns(UserWarning, match=r"\(If every W was replaced with A and B"):
        module, _ = fitted(callback, "in_place", tmp_path, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=MAYBE_NOT):
        save_adapter(module.model, module.optimizer, tmp_path)
