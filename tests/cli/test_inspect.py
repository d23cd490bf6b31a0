"""``deltaopt inspect``: the step, the rule, how far each W moved and which adapter is right, of what users have."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import deltaopt
from deltaopt.__main__ import main
from deltaopt.checkpoint.format import SCHEMA
from deltaopt.cli.inspect import by_last_name
from deltaopt.cli.movement import Layer
from tests.data.make_states import schema_of
from tests.support.models import RATIO, batches, causal_lm, deltas, optimizer_for, peft, plain_loop, weights
from tests.support.peft_runs import peft_asks_by_an_old_name

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]

DATA = Path(__file__).parents[1] / "data"
TOLERANCE = 1e-4
"""Relative: float32 weights whose difference from the base is a hundredth of them."""


def layers_of(data):
    (state,) = data["states"]
    return {layer["name"].split("model.layers.")[-1]: layer for layer in state["layers"]}


def norms(model, other):
    before = {name: W.double() for name, W in weights(other).items()}
    return {name: (W.double() - before[name]).norm() for name, W in weights(model).items()}


@pytest.mark.parametrize("name", ["in place", "in place from step 1", "small"])
def test_a_checkpoint_of_trainer(name, runs, base, call, data_of):
    run = runs[name]
    data = data_of("inspect", run.checkpoint, "--base", base)
    expected, start = norms(run.model, causal_lm(torch.float32)), weights(causal_lm(torch.float32))
    for layer, found in layers_of(data).items():
        assert found["asked"] == pytest.approx(float(expected[layer]), rel=TOLERANCE), layer
        assert found["relative"] == pytest.approx(float(expected[layer] / start[layer].double().norm()), rel=TOLERANCE)
        assert found["moved"]
        assert found["moves"] == (4 if name == "in place" else 3)
    assert len(layers_of(data)) == 10
    (state,) = data["states"]
    assert (data["trainer_step"], state["step"], state["schema"], state["weight_update"]) == (4, 4, SCHEMA, "in_place")
    assert state["groups"] == [{"update_ratio": RATIO, "start_step": 0 if name == "in place" else 1, "layers": 10}]
    assert data["use"] == str(run.checkpoint / "export")
    assert data["adapter"]["needs_moved_weights"]

    text = call("inspect", run.checkpoint)
    assert "a checkpoint of transformers' Trainer, global step 4" in text
    assert "layers whose W was asked to move: 10 of 10; rank 3; W is in float32, and not in this checkpoint" in text
    assert f"use: {run.checkpoint}/export, on the pristine base" in text
    assert " of W " not in text.splitlines()[4]


def test_a_folded_run(runs, base, data_of, call):
    """The branch holds what W would have moved by: lambda / (1 + lambda) of what PEFT says it adds."""
    run = runs["folded"]
    data = data_of("inspect", run.checkpoint, "--base", base)
    start = weights(causal_lm(torch.float32))
    for layer, delta in deltas(run.model).items():
        found, expected = layers_of(data)[layer], float(RATIO / (1 + RATIO) * delta.double().norm())
        assert found["asked"] == pytest.approx(expected, rel=TOLERANCE)
        assert found["relative"] == pytest.approx(expected / float(start[layer].double().norm()), rel=TOLERANCE)
        assert (found["moved"], found["folded"]) == (False, RATIO)
    assert (data["use"], data["use_on"]) == (str(run.checkpoint), "base")
    assert "on the base as it is (its factors hold the folded ratio)" in call("inspect", run.checkpoint)


def test_a_folded_w_that_was_written_needs_the_export(runs, data_of):
    run = runs["folded from step 1"]
    data = data_of("inspect", run.checkpoint)
    assert data["use"] == str(run.checkpoint / "export")
    assert all(layer["moved"] for layer in layers_of(data).values())


def test_without_the_export_it_says_how_to_write_it(runs, call, tmp_path):
    shutil.copytree(runs["in place"].checkpoint, tmp_path / "c", ignore=shutil.ignore_patterns("export"))
    text = call("inspect", tmp_path / "c")
    assert f"the adapter in {tmp_path}/c is right only next to the moved W" in text
    assert f"deltaopt export {tmp_path}/c --base MODEL --out DIR" in text


def trained(dtype=torch.float32, steps=3, **options):
    model = causal_lm(dtype)
    optimizer = optimizer_for(model, start_step=1, **options)
    plain_loop(model, optimizer, batches(steps))
    return model, optimizer


def test_the_command_can_be_pasted(runs, base, data_of, tmp_path):
    source = runs["in place"].checkpoint
    copied = shutil.copytree(source, tmp_path / "my run ü", ignore=shutil.ignore_patterns("export"))
    command = data_of("inspect", copied, "--base", base)["command"]
    assert shlex.split(command) == ["deltaopt", "export", str(copied), "--base", str(base), "--out", "DIR"]


def test_an_adapter_of_another_moment(runs, call, capsys, tmp_path):
    run = runs["in place"].checkpoint.parent
    message = call("inspect", run / "checkpoint-4" / "optimizer.pt", "--adapter", run / "checkpoint-2", code=1)
    assert message.startswith(f"--adapter {run}/checkpoint-2 is not the adapter of this state: none of its tensors is")

    # A folder with the state and what save_adapter has written.
    exported = shutil.copytree(run / "checkpoint-4" / "export", tmp_path / "c")
    shutil.copy(run / "checkpoint-4" / "optimizer.pt", exported)
    assert main(["inspect", str(exported), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"warning: the adapter in {exported} was left out: none of its tensors is an A or B of")
    assert json.loads(out)["adapter"] is None
    assert "--adapter DIR" in json.loads(out)["command"]


def test_adalora_has_no_form_for_an_export(data_of, call, tmp_path):
    fields = {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(causal_lm(torch.float32).unload(), peft.AdaLoraConfig(**fields))
    optimizer = optimizer_for(model, start_step=1)
    plain_loop(model, optimizer, batches(3))
    with pytest.warns(UserWarning, match="save_pretrained writes the adapter alone"):
        model.save_pretrained(tmp_path / "c")
    torch.save(optimizer.state_dict(), tmp_path / "c" / "optimizer.pt")
    assert data_of("inspect", tmp_path / "c")["command"] is None
    text = call("inspect", tmp_path / "c")
    assert "take deltaopt.export_adapter(optimizer): PEFT's files of ADALORA cannot hold the change of W" in text


def test_a_folder_of_accelerate(accelerator_of, data_of, call, tmp_path):
    """It holds the whole model, so that all of its weights together are the trained model."""
    accelerator = accelerator_of()
    model = causal_lm(torch.float32)
    model, optimizer = accelerator.prepare(model, optimizer_for(model, start_step=1))
    plain_loop(model, optimizer, batches(3))
    accelerator.save_state(str(tmp_path / "state"))
    data = data_of("inspect", tmp_path / "state")
    expected = norms(model, causal_lm(torch.float32))
    for layer, W in weights(model).items():
        found = layers_of(data)[layer]
        assert found["weight"] == "moved"
        assert found["relative"] == pytest.approx(float(expected[layer] / W.double().norm()), rel=TOLERANCE)
    assert (data["use"], data["use_on"]) == (None, "moved weights")
    text = call("inspect", tmp_path / "state")
    assert "a folder of Accelerate's save_state" in text
    assert "use: all weights of this checkpoint together" in text


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*is lower than the logging interval.*")
def test_a_checkpoint_of_lightning(data_of, tmp_path):
    pytest.importorskip("lightning", reason="runs where lightning is installed")
    from tests.integrations.test_lightning import AdapterModule, fit

    module = AdapterModule(torch.float32)
    fit(module, tmp_path, steps=3).save_checkpoint(tmp_path / "last.ckpt")
    data = data_of("inspect", tmp_path / "last.ckpt")
    assert data["kind"] == "a Lightning checkpoint"
    assert data["states"][0]["place"] == "last.ckpt['optimizer_states'][0]"
    expected = norms(module.model, causal_lm(torch.float32))
    for layer, found in layers_of(data).items():
        assert found["asked"] == pytest.approx(float(expected[layer]), rel=TOLERANCE)
        assert found["weight"] == "moved"


@pytest.mark.parametrize("place", ["", "optimizer", "optim"])
def test_a_file_with_the_state_alone(place, call, data_of, tmp_path):
    """A and B, which the last move ends with, are in the adapter's folder."""
    model, optimizer = trained()
    state = optimizer.state_dict()
    torch.save({place: state, "epoch": 3} if place else state, tmp_path / "mine.pt")
    text = call("inspect", tmp_path / "mine.pt")
    assert "follows from A and B, which the checkpoint does not hold" in text
    with pytest.warns(UserWarning, match="moved"):
        model.save_pretrained(tmp_path / "adapter")
    data = data_of("inspect", tmp_path / "mine.pt", "--adapter", tmp_path / "adapter")
    expected = norms(model, causal_lm(torch.float32))
    for layer, found in layers_of(data).items():
        assert found["asked"] == pytest.approx(float(expected[layer]), rel=TOLERANCE)
        assert found["weight"] == "absent"


def test_a_run_that_has_not_moved_a_w(data_of, tmp_path):
    model = causal_lm(torch.float32)
    optimizer = optimizer_for(model, start_step=9)
    plain_loop(model, optimizer, batches(2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "mine.pt")
    data = data_of("inspect", tmp_path / "mine.pt")
    assert not data["moved"]
    assert data["use_on"] == "base"
    assert all((layer["asked"], layer["weight"]) == (0.0, "base") for layer in layers_of(data).values())


@pytest.mark.parametrize("path", sorted(DATA.glob("*.pt")), ids=lambda path: path.stem)
def test_states_of_an_earlier_schema(path, data_of):
    """The files hold what the version that wrote them said of its displacements."""
    saved = torch.load(path, weights_only=True)
    (state,) = data_of("inspect", path)["states"]
    assert state["schema"] == schema_of(path.stem)
    assert state["step"] == 9
    found = {layer["name"]: layer["asked"] for layer in state["layers"]}
    assert found.keys() == saved["displacements"].keys()
    for name, displacement in saved["displacements"].items():
        assert found[name] == pytest.approx(float(displacement.double().norm()), rel=TOLERANCE)


def test_a_state_without_ledgers_says_so(call, tmp_path):
    _, optimizer = trained()
    torch.save(deltaopt.without_ledger(optimizer.state_dict()), tmp_path / "mine.pt")
    assert "saved without its ledgers: how far W had moved is not known" in call("inspect", tmp_path / "mine.pt")


def test_an_adapter_by_itself(runs, call, data_of, tmp_path):
    shutil.copytree(runs["in place"].checkpoint, tmp_path / "moved", ignore=shutil.ignore_patterns("*.pt", "export"))
    assert "use: not by itself. It was saved alone after Delta-LoRA had moved W" in call("inspect", tmp_path / "moved")
    assert data_of("inspect", tmp_path / "moved")["use"] is None

    causal_lm(torch.float32).save_pretrained(tmp_path / "plain")
    text = call("inspect", tmp_path / "plain")
    assert "a PEFT adapter (LORA), without a state of a DeltaLoRAOptimizer" in text
    assert "rank 3, alpha 6, 20 tensors" in text
    assert "Nothing in the folder says that a W has moved under it" in text

    exported = data_of("inspect", runs["in place"].checkpoint / "export")
    assert exported["kind"] == "an adapter that DeltaLoRACallback has exported"
    assert exported["use"] == str(runs["in place"].checkpoint / "export")


def test_many_layers_are_shown_by_the_last_part_of_their_names():
    layers = [
        Layer(f"model.layers.{i}.{name}", 4, 2.0, "float32", 9, float(i), None, 0.0, True, "absent", "")
        for i in range(200)
        for name in ("q_proj", "v_proj")
    ]
    assert [(name, len(row)) for name, row in by_last_name(layers)] == [
        ("200: ...q_proj", 200),
        ("200: ...v_proj", 200),
    ]
    assert [name for name, _ in by_last_name(layers[:2])] == ["model.layers.0.q_proj", "model.layers.0.v_proj"]
