"""``deltaopt export``: plain PEFT with what it wrote, on the pristine base, computes what the trained model did."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.compare import relative
from tests.support.models import TARGETS, batches, causal_lm, deltas, optimizer_for, peft, plain_loop, weights
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.trainer_runs import distance, logits_from, logits_of

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]

RANKS = {"in place": 3, "in place from step 1": 6, "folded": 3, "folded from step 1": 6, "small": 6}
"""With LoRA's usual start and K = 0 the change has the rank that trained, else twice that."""

CLOSE = 2e-5
"""Of logits, in float32."""


@pytest.mark.parametrize("name", RANKS)
def test_a_checkpoint_of_trainer(name, runs, base, call, tmp_path):
    run, out = runs[name], tmp_path / "out"
    text = call("export", run.checkpoint, "--base", base, "--out", out)
    assert f"{out}: adapter of rank {RANKS[name]}" in text
    assert "largest relative error 0; vLLM: --max-lora-rank 8" in text
    assert "of step 4, 10 layers" in text
    assert "checked: it loads on the base; its output differs from the trained model's by" in text
    expected = logits_of(run.model)
    assert distance(logits_from(out), expected) < CLOSE
    assert "needs_base_weights" not in (out / "adapter_config.json").read_text("utf8")
    # Without the movement the adapter of the checkpoint is another model, except where the branch holds it.
    if name != "folded":
        with pytest.warns(UserWarning, match="needs_base_weights"):
            alone = logits_from(run.checkpoint)
        assert distance(alone, expected) > 1e-3


def test_the_data_says_ranks_errors_and_the_difference(runs, base, data_of, tmp_path):
    """With a smaller rank each layer's error is that of the best approximation of its dense change."""
    run = runs["in place from step 1"]
    data = data_of("export", run.checkpoint, "--base", base, "--out", tmp_path / "out", "--rank", 2)
    start, change = weights(causal_lm(torch.float32)), deltas(run.model)
    assert (data["rank"], data["trained_rank"], data["step"], data["dtype"]) == (2, 3, 4, "float32")
    for name, W in weights(run.model).items():
        sigma = torch.linalg.svdvals(W.double() - start[name].double() + change[name].double())
        found = data["layers"][f"base_model.model.model.layers.{name}"]
        assert found["error"] == pytest.approx(float(sigma[2:].norm() / sigma.norm()), rel=1e-3)
        assert found["rank"] == 2
    expected = logits_of(run.model)
    written = logits_from(tmp_path / "out")
    assert data["error"] == max(layer["error"] for layer in data["layers"].values())
    assert 0.001 < data["output_difference"] < 1
    assert distance(written, expected) > CLOSE


def saved_by_hand(model, folder, rule="in_place", dtype=torch.float32, **options):
    """Train, save the state and the adapter, and return the optimizer."""
    optimizer = optimizer_for(model, weight_update=rule, start_step=1, **options)
    plain_loop(model, optimizer, batches(3))
    torch.save({"optimizer": optimizer.state_dict()}, folder / "mine.pt")
    with pytest.warns(UserWarning, match="moved"):
        model.save_pretrained(folder / "adapter")
    return optimizer


@pytest.mark.parametrize("rule", ["in_place", "folded"])
def test_a_file_and_an_adapter(rule, base, call, tmp_path):
    model = causal_lm(torch.float32)
    saved_by_hand(model, tmp_path, rule)
    call("export", tmp_path / "mine.pt", "--adapter", tmp_path / "adapter", "--base", base, "--out", tmp_path / "out")
    assert distance(logits_from(tmp_path / "out"), logits_of(model)) < CLOSE


def test_sixteen_bits(data_of, tmp_path):
    """The base is loaded in the dtype that trained; the float32 W that compensated rounding follows is exported."""
    model = causal_lm(torch.bfloat16, factors=torch.float32)
    pristine = weights(model)
    causal_lm(torch.float32).unload().save_pretrained(tmp_path / "base")  # stored in float32, as many are
    optimizer = saved_by_hand(model, tmp_path, rounding="compensated")
    out = tmp_path / "out"
    arguments = ("--adapter", tmp_path / "adapter", "--base", tmp_path / "base", "--out", out)
    data = data_of("export", tmp_path / "mine.pt", *arguments)
    assert data["dtype"] == "bfloat16"
    change = deltas(model)
    tensors = load_file(out / "adapter_model.safetensors")
    for name, W0 in pristine.items():
        prefix = f"base_model.model.model.layers.{name}"
        A, B = (tensors[f"{prefix}.lora_{letter}.weight"].double() for letter in "BA")
        expected = optimizer.displacement(prefix).product().double() + change[name].double()
        assert relative(A @ B, expected) < 1e-5
        assert relative(weights(model)[name], W0) > 1e-3


def test_an_adapter_of_transformers(call, base, tmp_path):
    """`add_adapter` names its layers without PEFT's prefix."""
    model = causal_lm(torch.float32, B_zero=True).unload()
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    saved_by_hand(model, tmp_path)
    call("export", tmp_path / "mine.pt", "--adapter", tmp_path / "adapter", "--base", base, "--out", tmp_path / "out")
    assert distance(logits_from(tmp_path / "out"), logits_of(model)) < CLOSE


def test_a_classifier_keeps_its_head(call, base, tmp_path):
    """Its base is a language model, whose config knows no labels."""
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(3)
    options = {"num_labels": 5, "pad_token_id": 0, "dtype": torch.float32}
    config = peft.LoraConfig(r=3, target_modules=TARGETS, task_type="SEQ_CLS")
    model = peft.get_peft_model(LlamaForSequenceClassification.from_pretrained(base, **options), config)
    optimizer = optimizer_for(model)
    for ids in batches(3):
        model(input_ids=ids, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(optimizer.state_dict(), tmp_path / "mine.pt")
    with pytest.warns(UserWarning, match="moved"):
        model.save_pretrained(tmp_path / "adapter")
    call("export", tmp_path / "mine.pt", "--adapter", tmp_path / "adapter", "--base", base, "--out", tmp_path / "out")
    fresh = LlamaForSequenceClassification.from_pretrained(base, **options)
    assert distance(logits_of(peft.PeftModel.from_pretrained(fresh, tmp_path / "out")), logits_of(model)) < CLOSE


def test_a_start_that_was_taken_out_of_the_base(call, base, tmp_path):
    """PiSSA: the adapter that is written is for the base before that."""
    model = causal_lm(torch.float32, B_zero=True).unload()
    config = peft.LoraConfig(r=3, target_modules=TARGETS, init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    saved_by_hand(model, tmp_path)
    call("export", tmp_path / "mine.pt", "--adapter", tmp_path / "adapter", "--base", base, "--out", tmp_path / "out")
    assert distance(logits_from(tmp_path / "out"), logits_of(model)) < CLOSE


def test_a_folder_that_is_not_empty_needs_force(runs, base, call, tmp_path):
    """Then files of the same names are replaced, and others stay."""
    run, out = runs["in place"], tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", "utf8")
    (out / "adapter_config.json").write_text("{}", "utf8")
    arguments = ("export", run.checkpoint, "--base", base, "--out", out)
    message = call(*arguments, code=1)
    assert message == f"--out {out} is not empty: name another folder, or say --force to replace what is written"
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "notes.txt"]
    call(*arguments, "--force")
    assert (out / "notes.txt").read_text("utf8") == "mine"
    assert distance(logits_from(out), logits_of(run.model)) < CLOSE


@pytest.mark.parametrize("what", ["checkpoint", "--base"])
def test_what_is_read_is_not_overwritten(what, runs, base, call, tmp_path):
    checkpoint = shutil.copytree(runs["in place"].checkpoint, tmp_path / "c")
    out = checkpoint if what == "checkpoint" else base
    message = call("export", checkpoint, "--base", base, "--out", out, "--force", code=1)
    assert message == f"--out {out} is the folder of the {what}, which would be overwritten: name another one"


@pytest.mark.parametrize(("fill", "difference"), [(float("nan"), None), (0.0, 0.0)])
def test_an_output_that_cannot_be_compared(fill, difference, runs, base, call, data_of, tmp_path):
    """The head is no part of the run, so its contents are the base's own affair."""
    copied = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(copied / "model.safetensors")
    tensors["lm_head.weight"].fill_(fill)
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    checkpoint = runs["in place"].checkpoint
    text = call("export", checkpoint, "--base", copied, "--out", tmp_path / "a")
    assert ("the trained model's output is NaN or infinite, so it was not compared" in text) == (difference is None)
    assert data_of("export", checkpoint, "--base", copied, "--out", tmp_path / "b")["output_difference"] == difference
