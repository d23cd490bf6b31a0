"""The command line as a whole: exit codes, one line for what a user got wrong, JSON, help."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import deltaopt
from deltaopt.__main__ import COMMANDS, main
from deltaopt.cli import inspect
from deltaopt.cli.base_model import check_fits
from deltaopt.cli.outcome import Outcome, UserError, one_line, refusals
from tests.support.models import causal_lm, transformers
from tests.support.peft_runs import peft_asks_by_an_old_name

pytestmark = [pytest.mark.extra, peft_asks_by_an_old_name]


def cut(source: Path, target: Path, part: float = 0.6) -> Path:
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * part)])
    return target


@pytest.fixture
def checkpoint(runs, tmp_path) -> Path:
    return shutil.copytree(runs["in place"].checkpoint, tmp_path / "checkpoint")


def test_a_path_that_is_not_there(call, base, tmp_path):
    expected = f"{tmp_path}/no: there is no such file or folder"
    assert call("inspect", tmp_path / "no", code=1) == expected
    assert call("export", tmp_path / "no", "--base", base, "--out", tmp_path / "out", code=1) == expected


def test_an_adapter_folder_without_weights(call, checkpoint):
    (checkpoint / "adapter_model.safetensors").unlink()
    match = r".*checkpoint has an adapter_config.json and no weights \(adapter_model.safetensors or .*: the folder was"
    assert re.match(match, call("inspect", checkpoint, code=1))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no JSON (Expecting"),
        ("[]", "is no JSON object"),
        ("[" * 100_000, "is no JSON (maximum recursion"),
        ("{}", "has no peft_type"),
        ('{"peft_type": ["LORA"]}', "has no peft_type"),
    ],
)
def test_a_config_of_something_else(text, says, call, checkpoint):
    (checkpoint / "adapter_config.json").write_text(text, "utf8")
    assert f"{checkpoint}/adapter_config.json {says}" in call("inspect", checkpoint, code=1)


def test_an_adapter_without_names(call, checkpoint, base, tmp_path):
    (checkpoint / "adapter_model.safetensors").unlink()
    torch.save([torch.zeros(3)], checkpoint / "adapter_model.bin")
    expected = f"{checkpoint}/adapter_model.bin holds a list, expected the tensors of an adapter by their names"
    assert call("inspect", checkpoint, code=1) == expected
    assert call("export", checkpoint, "--base", base, "--out", tmp_path / "out", code=1) == expected


@pytest.mark.parametrize("pattern", [[1], {"a": "b"}, {"q_proj": 7}])
def test_the_rank_of_a_config_with_other_fields(pattern, data_of, checkpoint):
    config = json.loads((checkpoint / "adapter_config.json").read_text("utf8"))
    (checkpoint / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": pattern}), "utf8")
    assert data_of("inspect", checkpoint)["adapter"]["rank"] == (7 if pattern == {"q_proj": 7} else config["r"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"global_step": "x"}'])
def test_a_state_of_trainer_that_is_none(text, call, checkpoint):
    (checkpoint / "trainer_state.json").write_text(text, "utf8")
    assert f"{checkpoint}/trainer_state.json is no" in call("inspect", checkpoint, code=1)


def test_truncated_safetensors(call, checkpoint, base, tmp_path):
    file = checkpoint / "adapter_model.safetensors"
    cut(file, file)
    expected = f"{file} cannot be read: it was cut off, or is not safetensors' format"
    assert call("inspect", checkpoint, code=1) == expected
    assert call("export", checkpoint, "--base", base, "--out", tmp_path / "out", code=1) == expected
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_file_of_something_else_in_place_of_the_state(call, checkpoint):
    torch.save(torch.nn.Linear(2, 2).state_dict(), checkpoint / "optimizer.pt")
    says = f"{checkpoint / 'optimizer.pt'} holds no state of an optimizer, as optimizer.state_dict() returns it"
    assert call("inspect", checkpoint, code=1) == says
    assert call("inspect", checkpoint / "optimizer.pt", code=1) == f"{says}: give its folder, {checkpoint}"


@pytest.mark.parametrize("part", [0.0, 0.6])
def test_a_truncated_file_of_torch(part, call, checkpoint):
    file = cut(checkpoint / "optimizer.pt", checkpoint / "optimizer.pt", part)
    expected = f"{file} cannot be read: it was cut off, or is not what torch.save writes"
    assert call("inspect", checkpoint, code=1) == expected


def test_a_file_of_something_else(call, tmp_path):
    (tmp_path / "x.pt").write_text("hello", "utf8")
    assert "is not what torch.save writes" in call("inspect", tmp_path / "x.pt", code=1)
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pt")
    assert "x.pt holds no state of an optimizer, as optimizer.state_dict() returns it" in call(
        "inspect", tmp_path / "x.pt", code=1
    )


def test_nothing_in_a_file_is_executed(call, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"optimizer": Evil()}, tmp_path / "x.pt")
    message = call("inspect", tmp_path / "x.pt", code=1)
    assert re.match(r".*x.pt holds an object of posix.mkdir, and torch.load\(weights_only=True\) reads", message)
    assert not (tmp_path / "executed").exists()


def test_a_folder_that_is_no_checkpoint(call, runs, tmp_path):
    message = call("inspect", tmp_path, code=1)
    assert message.startswith(f"{tmp_path} is no checkpoint: it has no optimizer.pt, deltaopt_state.pt, optimizer*.bin")
    run = runs["in place"].checkpoint.parent
    assert call("inspect", run, code=1) == f"{run} holds 2 checkpoints: give one of them, such as {run}/checkpoint-4"
    torch.save({}, tmp_path / "mine.pt")
    assert call("inspect", tmp_path, code=1).endswith(f"give a file, such as {tmp_path}/mine.pt")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_a_distributed_checkpoint_names_the_converter(call, runs, tmp_path):
    """It is read by unpickling alone; torch's own tool makes a file of it, which can be read."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    state = torch.load(runs["in place"].checkpoint / "optimizer.pt", weights_only=True)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    message = call("inspect", tmp_path / "dcp", code=1)
    assert f"format_utils dcp_to_torch {tmp_path}/dcp checkpoint.pt" in message
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "mine.pt")
    assert "steps: 4; update_ratio 0.7" in call("inspect", tmp_path / "mine.pt")


def rewritten(checkpoint, change):
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    change(state)
    torch.save(state, checkpoint / "optimizer.pt")


@pytest.mark.parametrize("key", ["step_count", "rounding_seed", "groups", "start_step", "triples", "name", "B"])
@pytest.mark.parametrize("value", ["gone", [1], None])
def test_a_damaged_record(key, value, call, checkpoint):
    def damaged(state):
        record = state["param_groups"][0]["deltaopt"]
        for entry in (record, record["groups"][0], record["groups"][0]["triples"][0]):
            if key in entry:
                entry.pop(key) if value == "gone" else entry.update({key: value})
                return

    rewritten(checkpoint, damaged)
    message = call("inspect", checkpoint, code=1)
    assert message.startswith(f"{checkpoint}/optimizer.pt: the record of the run was edited or damaged: its ")


def test_a_record_of_something_else(call, checkpoint):
    rewritten(checkpoint, lambda state: [group.update(deltaopt="x") for group in state["param_groups"]])
    assert "the record of the run was edited or damaged: its schema is 'x'" in call("inspect", checkpoint, code=1)


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_a_newer_schema(command, call, checkpoint, base, tmp_path):
    def newer(state):
        for group in state["param_groups"]:
            group["deltaopt"] = {**group["deltaopt"], "schema": 7}

    rewritten(checkpoint, newer)
    more = () if command == "inspect" else ("--base", base, "--out", tmp_path / "out")
    assert call(command, checkpoint, *more, code=1) == (
        f"{checkpoint}/optimizer.pt: this state has the schema 7, this version of deltaopt reads 4, 5 and 6: load it "
        "with the version that wrote it"
    )


def test_an_edited_ledger(call, checkpoint):
    def edit(state):
        (entries,) = [entries for entries in state["state"].values() if any("ledger" in key for key in entries)][:1]
        key = next(key for key in entries if "ledger" in key)
        entries[key] = entries[key][:-9]

    rewritten(checkpoint, edit)
    assert "a saved ledger was edited or cut off: its checksum differs" in call("inspect", checkpoint, code=1)


def test_weights_that_were_quantized(call, runs, base, tmp_path):
    """They have no fingerprint and do not move: the adapter of the checkpoint is right on them."""
    checkpoint = shutil.copytree(runs["folded"].checkpoint, tmp_path / "checkpoint")

    def quantize(state):
        for entries in state["state"].values():
            for key in [key for key in entries if key.startswith("deltaopt.ledger.")]:
                ledgers = json.loads(entries[key].partition(" ")[2])
                text = json.dumps({name: {**ledger, "W": None, "base": None} for name, ledger in ledgers.items()})
                entries[key] = f"{zlib.crc32(text.encode()):08x} {text}"

    rewritten(checkpoint, quantize)
    message = call("export", checkpoint, "--base", base, "--out", tmp_path / "out", code=1)
    assert message.startswith("the W of 10 layers (base_model.model.model.layers.0.self_attn.q_proj, ")
    assert message.endswith(
        f"could not be read in training (quantized), and so did not move: use the adapter in {checkpoint} as it is, on "
        "the base"
    )
    assert f"use: {checkpoint}, on the base as it is (its factors hold the folded ratio)" in call("inspect", checkpoint)


def test_a_state_of_another_optimizer(call, checkpoint):
    plain = torch.optim.AdamW([torch.zeros(2, requires_grad=True)])
    torch.save(plain.state_dict(), checkpoint / "optimizer.pt")
    assert "optimizer.pt holds the state of another optimizer than a DeltaLoRAOptimizer" in call(
        "inspect", checkpoint, code=1
    )


def llama(folder, **sizes):
    """Save a model like that of `causal_lm`, with other numbers or other sizes."""
    config = causal_lm(torch.float32).get_base_model().config
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(type(config)(**{**config.to_dict(), **sizes})).save_pretrained(folder)
    return folder


def test_the_base_of_another_run(call, checkpoint, tmp_path):
    """Of the same shapes: the fingerprints tell."""
    base = llama(tmp_path / "base")
    message = call("export", checkpoint, "--base", base, "--out", tmp_path / "out", code=1)
    assert message.startswith(
        f"--base {base} and the adapter are not those of this state (another model, another step,"
    )
    assert "10 layers: base_model.model.model.layers.0.self_attn.q_proj, " in message
    assert message.count("W has other contents than when the state was saved") == 1
    assert not (tmp_path / "out").exists()
    message = call("inspect", checkpoint, "--base", base, code=1)
    assert message.endswith("is not the model that was fine-tuned: no tensor in it is a W of this state")


def test_an_adapter_of_another_step(call, runs, base, tmp_path):
    checkpoint = runs["in place"].checkpoint
    adapter = checkpoint.parent / "checkpoint-2"
    message = call("export", checkpoint, "--adapter", adapter, "--base", base, "--out", tmp_path / "out", code=1)
    assert "A has other contents than when the state was saved (10 layers: " in message


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (
            {"num_hidden_layers": 1},
            "it has no such layer (5 layers: base_model.model.model.layers.1.self_attn.q_proj, ",
        ),
        ({"intermediate_size": 32}, "its W is (32, 16), and was (20, 16) in training (and likewise in 3 layers: "),
    ],
    ids=["missing", "shapes"],
)
def test_a_base_without_the_layers(sizes, sentence, call, checkpoint, tmp_path):
    base = llama(tmp_path / "base", **sizes)
    message = call("export", checkpoint, "--base", base, "--out", tmp_path / "out", code=1)
    assert message.startswith(f"--base {base} is not the model that was fine-tuned: ")
    assert sentence in message


@pytest.mark.parametrize("count", [0, 400], ids=["missing", "shapes"])
def test_four_hundred_layers_that_do_not_fit_are_one_sentence(count):
    base = nn.Sequential(*(nn.Linear(3, 3) for _ in range(count)))
    saved = {f"base_model.model.{i}": (SimpleNamespace(W={"shape": [4, 4]}), None) for i in range(400)}
    problem = "its W is (3, 3), and was (4, 4) in training" if count else "it has no such layer"
    names = ", ".join(f"base_model.model.{i}" for i in range(8))
    expected = f"--base llama is not the model that was fine-tuned: {problem} (400 layers: {names}, ...)"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        check_fits(base, saved, "llama")


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("no/such-model", "--base no/such-model is no folder on this machine, and as a model of the Hub it cannot be"),
        (".", ". cannot be loaded: "),
        ("file", "--base file is a file: give the folder of the pretrained model"),
    ],
)
def test_a_base_that_is_none(base, says, call, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    message = call("export", checkpoint, "--base", base, "--out", tmp_path / "out", code=1)
    assert message.startswith(says)
    assert len(message) < 500


@pytest.mark.parametrize("named", ["logging", "LlamaConfig", "nn", 3])
def test_an_adapter_of_no_class_of_a_model(named, call, checkpoint, base, tmp_path):
    """Any name of the library could be in that field."""
    config = json.loads((checkpoint / "adapter_config.json").read_text("utf8"))
    mapping = {"auto_mapping": {"base_model_class": named}, "task_type": None}
    (checkpoint / "adapter_config.json").write_text(json.dumps({**config, **mapping}), "utf8")
    message = call("export", checkpoint, "--base", base, "--out", tmp_path / "out", code=1)
    assert message == f"{base} cannot be loaded: transformers has no model {named}, which the adapter was trained on"


def test_a_base_that_is_cut_off(call, checkpoint, base, tmp_path):
    copied = shutil.copytree(base, tmp_path / "base")
    cut(copied / "model.safetensors", copied / "model.safetensors")
    assert call("export", checkpoint, "--base", copied, "--out", tmp_path / "out", code=1).startswith(
        f"{copied} cannot be loaded: "
    )


def test_an_output_that_is_a_file(call, checkpoint, base, tmp_path):
    (tmp_path / "out").write_text("mine", "utf8")
    message = call("export", checkpoint, "--base", base, "--out", tmp_path / "out", code=1)
    assert message == f"--out {tmp_path}/out is a file: name a folder"
    assert (tmp_path / "out").read_text("utf8") == "mine"


def test_an_output_that_cannot_be_made(call, checkpoint, base, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = {
        "file/sub/out": f"cannot be made: {tmp_path}/file is a file",
        "loop": f"cannot be made: {tmp_path}/loop is a link to itself",
    }
    for out, says in cases.items():
        message = call("export", checkpoint, "--base", base, "--out", tmp_path / out, code=1)
        assert message == f"--out {tmp_path}/{out} {says}"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    message = call("export", checkpoint, "--base", base, "--out", tmp_path / "a" / "b", code=1)
    assert message == f"--out {tmp_path}/a/b cannot be written: no permission for {tmp_path}"


def test_an_adapter_alone_cannot_be_exported(call, checkpoint, base, tmp_path):
    (checkpoint / "optimizer.pt").unlink()
    message = call("export", checkpoint, "--base", base, "--out", tmp_path / "out", code=1)
    assert "is an adapter without a state of a DeltaLoRAOptimizer: it was saved alone, and needs the" in message
    file = shutil.copy(checkpoint.parent / "checkpoint" / "scheduler.pt", tmp_path / "scheduler.pt")
    assert "holds no state of an optimizer" in call("inspect", file, code=1)


def test_a_file_without_an_adapter(call, checkpoint, base, tmp_path):
    file = shutil.copy(checkpoint / "optimizer.pt", tmp_path)
    message = call("export", file, "--base", base, "--out", tmp_path / "out", code=1)
    expected = f"{file} holds no adapter: name the folder of the one that was saved with it, --adapter DIR. "
    assert message.startswith(expected)
    assert "deltaopt.export_adapter(optimizer)" in message
    message = call("export", file, "--adapter", tmp_path, "--base", base, "--out", tmp_path / "out", code=1)
    assert message == f"--adapter {tmp_path} is no folder of an adapter: it has no adapter_config.json"


def test_errors_are_json_too(capsys, tmp_path):
    assert main(["inspect", str(tmp_path / "no"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": f"{tmp_path}/no: there is no such file or folder"}
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["look"], "invalid choice: 'look'"),
        (["inspect"], "the following arguments are required: CHECKPOINT"),
        (["export", "c"], "the following arguments are required: --base, --out"),
        (["export", "c", "--base", "b", "--out", "o", "--rank", "0"], "argument --rank: a positive number, got '0'"),
        (
            ["export", "c", "--base", "b", "--out", "o", "--rank", "few"],
            "argument --rank: a positive number, got 'few'",
        ),
    ],
)
def test_a_wrong_usage_has_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_help_has_examples_that_can_be_parsed(capsys):
    from deltaopt.__main__ import parser

    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        examples = re.findall(rf"^  deltaopt ({command} .*?)(?:  +.*)?$", capsys.readouterr().out, re.MULTILINE)
        assert len(examples) >= 2
        for example in examples:
            assert parser().parse_args(example.split()).command == command


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"deltaopt {deltaopt.__version__}\n"


def test_a_warning_is_one_line_on_stderr_and_a_defect_keeps_its_traceback(capsys, monkeypatch, tmp_path):
    def run(arguments):
        warnings.warn("two\n lines", UserWarning, stacklevel=1)
        warnings.warn("for programmers", DeprecationWarning, stacklevel=1)
        return Outcome("text", {})

    monkeypatch.setattr(inspect, "run", run)
    assert main(["inspect", "x"]) == 0
    assert capsys.readouterr() == ("text\n", "warning: two; lines\n")

    monkeypatch.setattr(inspect, "run", lambda arguments: {}["a defect"])
    with pytest.raises(KeyError, match="a defect"):
        main(["inspect", "x"])


def test_refusals_are_errors_of_the_user():
    with pytest.raises(UserError, match="here: no"), refusals(prefix="here: "):
        raise ValueError("no")
    with pytest.raises(KeyError), refusals():
        raise KeyError("a defect")
    assert one_line("cannot be used:\n  q: why\n  k: why\nDo that") == "cannot be used: q: why; k: why; Do that"


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "deltaopt", "inspect", "no"]
    environment = {**os.environ, "PYTHONPATH": str(Path(deltaopt.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "deltaopt inspect: error: no: there is no such file or folder\n"


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_an_output_that_is_closed_early_or_full_leaves_no_traceback(extra, monkeypatch, capfd):
    """As with ``| head``, and on a full disk."""
    from deltaopt import __main__

    monkeypatch.setattr(inspect, "run", lambda arguments: Outcome("x" * 100_000, {"x": "x" * 100_000}))
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(__main__.sys, "stdout", closed)
        assert main(["inspect", "x", *extra]) == 1
    assert capfd.readouterr() == ("", "")
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(__main__.sys, "stdout", full)
            assert main(["inspect", "x", *extra]) == 1
        expected = "deltaopt: error: the result cannot be printed: No space left on device\n"
        assert capfd.readouterr() == ("", expected)


def test_an_interruption_is_quiet(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "run", interrupted)
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr() == ("", "")


def test_json_has_null_for_what_is_no_number(monkeypatch, capsys):
    data = {"a": float("nan"), "b": [float("inf"), 1.5, ("c",)], "d": {"e": -float("inf")}}
    monkeypatch.setattr(inspect, "run", lambda arguments: Outcome("", data))
    assert main(["inspect", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5, ["c"]], "d": {"e": None}}
