"""doctor: what would be taken of a folder, what to change, which rule fits; and one line for what is no input."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.models import peft as peft  # skips where they are not installed
from tests.support.models import transformers

# isort: split
from safetensors.torch import load_file, save_file

from deltaopt.__main__ import main
from deltaopt.tables import WIDTH

pytestmark = [pytest.mark.extra, pytest.mark.filterwarnings("ignore::FutureWarning")]

MOVED = "needs_base_weights_moved_by_deltaopt_see_docs_export"
QUANTIZED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def llama(folder, **options):
    options = {"num_hidden_layers": 2, "architectures": ["LlamaForCausalLM"], "vocab_size": 24, **options}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, **options)
    config.save_pretrained(folder)
    return str(folder)


def lora_fields(**options):
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "lora_dropout": 0.0, **options}


def config_alone(folder, fields):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(fields), "utf8")
    return str(folder)


def adapter(folder, grown=False, key=False, **options):
    """A saved adapter for `llama`, with its weights."""
    config_alone(folder, {**lora_fields(**options), **({MOVED: "see the docs"} if key else {})})
    tensors = {}
    for i in range(2):
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 64)
        tensors[f"{name}.lora_B.weight"] = torch.randn(64, 4) if grown else torch.zeros(64, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.fixture
def seen(capsys):
    """Run doctor: its text and its data."""

    def run(*arguments):
        assert main(["doctor", *arguments]) == 0
        text = capsys.readouterr().out
        assert main(["doctor", *arguments, "--json"]) == 0
        assert max(map(len, text.splitlines())) <= WIDTH + 60  # a path is not broken
        return text, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(capsys):
    """Run doctor on what is no input: its one line."""

    def run(*arguments):
        assert main(["doctor", *arguments]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        return line.removeprefix("deltaopt doctor: error: ")

    return run


def taken(data):
    return [row["name"].removeprefix("base_model.model.model.layers.") for row in data["description"]["rows"]]


def test_a_model_alone(seen, tmp_path):
    text, data = seen(llama(tmp_path / "m"))
    assert "the targets that PEFT takes by default: q_proj, v_proj" in " ".join(text.split())
    assert taken(data) == [f"{i}.self_attn.{part}" for i in (0, 1) for part in ("q_proj", "v_proj")]
    assert data["rule"]["weight_update"] == "folded"
    _, data = seen(llama(tmp_path / "n"), "--targets", "o_proj")
    assert taken(data) == ["0.self_attn.o_proj", "1.self_attn.o_proj"]


@pytest.mark.parametrize(
    ("grown", "start_step", "dtype", "rule", "why"),
    [
        (False, "0", "float32", "folded", "A @ B is zero at the start"),
        (False, "0", "bfloat16", "folded", "A @ B is zero at the start"),
        (False, "5", "float32", "in_place", "start_step is 5"),
        (True, "0", "float32", "in_place", "has grown"),
        (True, "0", "bfloat16", "in_place", 'rounding="stochastic" (the default) or "compensated"'),
    ],
)
def test_which_rule_fits(seen, tmp_path, grown, start_step, dtype, rule, why):
    base = llama(tmp_path / "m", dtype=dtype)
    text, data = seen(adapter(tmp_path / "a", grown), "--base", base, "--start-step", start_step)
    assert data["rule"]["weight_update"] == rule
    assert why in data["rule"]["why"]
    numbers = 2 * 4 * (64 + 64)
    assert data["description"]["kept_bytes"] == 4 * numbers
    assert f'"in_place" keeps {4 * numbers // 1024} KiB on a CPU and {12 * numbers // 1024} KiB on a GPU' in text
    assert ('rounding="compensated" keeps 16 KiB more' in text) == (dtype == "bfloat16")
    assert {row["dtype"] for row in data["description"]["rows"]} == {dtype}


@pytest.mark.parametrize(
    ("start", "rule"),
    [(True, "folded"), ("gaussian", "folded"), (False, "in_place"), ("pissa", "in_place"), ("corda", "in_place")],
)
def test_the_start_of_a_new_adapter(seen, tmp_path, start, rule):
    fields = lora_fields(init_lora_weights=start)
    _, data = seen(config_alone(tmp_path / "a", fields), "--base", llama(tmp_path / "m"))
    assert data["rule"]["weight_update"] == rule
    assert (f"with init_lora_weights={start!r} A @ B is not zero" in data["rule"]["why"]) == (rule == "in_place")


@pytest.mark.parametrize(("grown", "says"), [(False, "cannot be written"), (True, "it would have to be written once")])
def test_a_quantized_base_is_folded(seen, tmp_path, grown, says):
    pytest.importorskip("bitsandbytes", reason="runs where bitsandbytes is installed")
    base = llama(tmp_path / "m", quantization_config=QUANTIZED)
    text, data = seen(adapter(tmp_path / "a", grown), "--base", base)
    assert data["rule"]["weight_update"] == "folded"
    assert says in data["rule"]["why"]
    assert [(row["rule"], row["shape"]) for row in data["description"]["rows"]] == [("folded", [64, 64])] * 2
    assert "W is packed (uint8 Params4bit)" in text


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ({"lora_dropout": 0.05}, "lora_dropout: 0.05 -> 0"),
        ({"use_dora": True}, "use_dora: true -> false"),
        ({"lora_bias": True}, "lora_bias: true -> false"),
    ],
)
def test_what_to_change(seen, tmp_path, field, change):
    """The change that is named is enough: with it every layer is taken by both rules."""
    base = llama(tmp_path / "m")
    text, data = seen(config_alone(tmp_path / "a", lora_fields(**field)), "--base", base)
    assert [line.partition(":")[0] for line in data["changes"]] == [change.partition(":")[0]]
    assert data["changes"][0].startswith(change)
    assert ("after these changes: 2 layers (" in text) == ("lora_bias" not in field)
    name, value = change.split(": ")[0], json.loads(change.split("-> ")[1])
    _, mended = seen(config_alone(tmp_path / "b", lora_fields(**{name: value})), "--base", base)
    assert mended["changes"] == []
    assert [row["rule"] for row in mended["description"]["rows"]] == ["either", "either"]
    assert mended["description"]["rows"] == data["after_changes"]["rows"]


def test_adalora(seen, tmp_path):
    """Its orthogonality loss keeps it from being folded; without that loss both rules take it."""
    fields = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["q_proj"]}
    base = llama(tmp_path / "m")
    _, data = seen(config_alone(tmp_path / "a", {**fields, "orth_reg_weight": 0.5}), "--base", base)
    assert data["changes"][0].startswith("orth_reg_weight: 0.5 -> 0")
    assert {row["rule"] for row in data["description"]["rows"]} == {"in_place"}
    assert data["rule"]["weight_update"] == "in_place"
    assert "orth_reg_weight" in data["rule"]["why"]
    _, data = seen(config_alone(tmp_path / "b", {**fields, "orth_reg_weight": 0}), "--base", base)
    assert data["changes"] == []
    assert {row["rule"] for row in data["description"]["rows"]} == {"either"}


def test_tied_embeddings_are_refused_by_name(seen, tmp_path):
    base = llama(tmp_path / "m", tie_word_embeddings=True)
    fields = lora_fields(target_modules=["embed_tokens", "q_proj"])
    _, data = seen(config_alone(tmp_path / "a", fields), "--base", base)
    (left,) = [entry for entry in data["description"]["left_out"] if entry["kind"] == "refused"]
    assert left["name"] == "base_model.model.model.embed_tokens"
    assert "leave it out of target_modules" in left["why"]


def test_an_adapter_that_needs_a_moved_base(seen, tmp_path):
    base = llama(tmp_path / "m")
    text, data = seen(adapter(tmp_path / "a", grown=True, key=True), "--base", base)
    assert data["needs_moved_base"]
    assert "needs a moved base" in text
    text, data = seen(adapter(tmp_path / "b", grown=True), "--base", base)
    assert not data["needs_moved_base"]
    assert "moved base" not in text


def test_where_the_base_is_found(seen, tmp_path):
    """In the same folder, or where the config says; without one the config alone is looked at."""
    base = llama(tmp_path / "m")
    text, data = seen(adapter(tmp_path / "a"))
    assert data["description"] is None
    assert "--base" in text
    _, data = seen(adapter(tmp_path / "b", base_model_name_or_path=base))
    assert len(data["description"]["rows"]) == 2
    both = adapter(tmp_path / "c")
    shutil.copy(tmp_path / "m" / "config.json", both)
    _, data = seen(both)
    assert len(data["description"]["rows"]) == 2


def test_an_adapter_for_a_task_whose_head_is_new(seen, tmp_path):
    """The base's config names the class without a head. The adapter was trained on the class of its task."""
    base = llama(tmp_path / "m", architectures=["LlamaModel"])
    _, data = seen(adapter(tmp_path / "a", task_type="SEQ_CLS", base_model_name_or_path=base))
    assert taken(data) == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}
    _, data = seen(adapter(tmp_path / "b", auto_mapping=mapping, base_model_name_or_path=base))
    assert taken(data) == ["0.self_attn.q_proj", "1.self_attn.q_proj"]


def test_other_models(seen, tmp_path):
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20}
    transformers.GPT2Config(**sizes, **ids, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "gpt2")
    _, data = seen(str(tmp_path / "gpt2"))
    assert {row["layout"] for row in data["description"]["rows"]} == {"transposed"}
    vit = transformers.ViTConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48)
    vit.save_pretrained(tmp_path / "vit")
    _, data = seen(str(tmp_path / "vit"), "--targets", "q_proj, projection")
    assert {row["layout"] for row in data["description"]["rows"]} == {"linear", "conv"}


def cut_off(tmp_path):
    file = tmp_path / "a" / "adapter_model.safetensors"
    adapter(tmp_path / "a")
    file.write_bytes(file.read_bytes()[:-20])
    return str(tmp_path / "a")


def of_another_model(tmp_path):
    path = tmp_path / "a"
    adapter(path)
    tensors = load_file(path / "adapter_model.safetensors")
    save_file(
        {name: tensor[..., :3].contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors"
    )
    return str(path)


def list_of_tensors(tmp_path):
    path = config_alone(tmp_path / "a", lora_fields())
    torch.save([torch.zeros(3)], tmp_path / "a" / "adapter_model.bin")
    return path


def file_with(tmp_path, name, text):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / name).write_text(text, "utf8")
    return str(tmp_path / "f")


BAD = {
    "missing": (lambda p: [str(p / "none")], "there is no folder"),
    "file": (lambda p: [file_with(p, "x", "") + "/x"], "is a file: give the folder"),
    "empty": (lambda p: [str(p)], "has no config.json, so it is no model"),
    "weights alone": (lambda p: [file_with(p, "adapter_model.bin", "")], "and no adapter_config.json"),
    "no weights": (lambda p: [config_alone(p / "a", lora_fields())], "has adapter_config.json and no weights"),
    "no weights next to the model": (
        lambda p: [config_alone(p / "a", lora_fields(base_model_name_or_path=llama(p / "m")))],
        "name the model with --base",
    ),
    "no weights of a run": (
        lambda p: [config_alone(p / "a", lora_fields(**{MOVED: "see the docs"})), "--base", llama(p / "m")],
        "the folder was copied or downloaded in part",
    ),
    "cut off": (lambda p: [cut_off(p)], "adapter_model.safetensors cannot be read: it was cut off"),
    "no json": (lambda p: [file_with(p, "adapter_config.json", "{")], "is no JSON"),
    "a list": (lambda p: [file_with(p, "adapter_config.json", "[]")], "is no JSON object"),
    "very deep": (lambda p: [file_with(p, "adapter_config.json", "[" * 100_000)], "is no JSON (maximum recursion"),
    "a list as type": (lambda p: [file_with(p, "adapter_config.json", '{"peft_type": ["LORA"]}')], "has no peft_type"),
    "a list of tensors": (lambda p: [list_of_tensors(p)], "adapter_model.bin holds a list, expected the tensors of an"),
    "no type": (lambda p: [file_with(p, "adapter_config.json", "{}")], "has no peft_type"),
    "no model type": (lambda p: [file_with(p, "config.json", "{}")], "cannot be built as a model"),
    "own code": (lambda p: [file_with(p, "config.json", '{"auto_map": {}}')], "has code of its own (auto_map)"),
    "another model": (lambda p: [of_another_model(p), "--base", llama(p / "m")], "is an adapter for another model"),
    "no such targets": (
        lambda p: [config_alone(p / "a", lora_fields(target_modules=["qkv"])), "--base", llama(p / "m")],
        "does not fit this model: Target modules",
    ),
    "no lora": (lambda p: [vit_of(p)], "holds no LoRA, and PEFT has no default targets for a vit: name them with"),
    "no number": (
        lambda p: [config_alone(p / "a", lora_fields(lora_dropout="x"))],
        "lora_dropout is 'x', expected a number",
    ),
    "an unknown target": (
        lambda p: [llama(p / "m"), "--targets", "q_proj,nope"],
        "has no layer named nope. It takes names by commas, for example q_proj,k_proj, or all-linear",
    ),
    "no target": (lambda p: [llama(p / "m"), "--targets", " ,"], "--targets: no name. It takes names by commas"),
    "base of a model": (lambda p: [llama(p / "m"), "--base", "x"], "so it is no adapter for --base x"),
    "targets of an adapter": (lambda p: [adapter(p / "a"), "--targets", "x"], "--targets is for a model without"),
    **{
        method: (
            lambda p, method=method: [config_alone(p / "a", {"peft_type": method})],
            f"holds an adapter of {method}",
        )
        for method in ("LOHA", "OFT", "IA3", "VERA")
    },
}


def vit_of(tmp_path):
    config = transformers.ViTConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=48)
    config.save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_1(refused, tmp_path, case):
    arguments, says = BAD[case]
    assert says in refused(*arguments(tmp_path))


def test_a_mapping_that_is_a_text_says_no_class(seen, tmp_path):
    adapter_alone = config_alone(tmp_path / "a", lora_fields(auto_mapping="x"))
    assert len(taken(seen(adapter_alone, "--base", llama(tmp_path / "m"))[1])) > 0


def test_all_linear_layers_as_targets(seen, tmp_path):
    text, data = seen(llama(tmp_path / "m"), "--targets", "all-linear")
    assert "on --targets: all-linear" in text
    assert {row["name"].rpartition(".")[2] for row in data["description"]["rows"]} >= {"q_proj", "o_proj", "down_proj"}


def test_a_model_of_transformers_that_brings_code_too(seen, tmp_path):
    """Models that transformers took in have kept their auto_map; its own class needs none of that code."""
    place = Path(llama(tmp_path / "m"))
    config = json.loads((place / "config.json").read_text("utf8"))
    (place / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}), "utf8"
    )
    assert len(taken(seen(str(place))[1])) > 0


def test_a_start_step_is_not_negative(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", str(tmp_path), "--start-step", "-1"])
    assert "argument --start-step: a number of steps, 0 or more, got '-1'" in capsys.readouterr().err
