"""A folded run with PEFT that is saved and resumed: the branch is scaled by the optimizer's state."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import deltaopt

pytest.importorskip("peft", reason="runs where peft is installed")
pytest.importorskip("transformers", reason="runs where transformers is installed")

from peft import (
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from deltaopt.integrations.peft import save_adapter
from tests.support.peft_folded import (
    ALPHA,
    LARGER,
    Trained,
    adapted,
    alphas,
    assert_alike,
    assert_trained_alike,
    folded,
    layer_scalings,
    optimizer_of,
    state_of,
)
from tests.support.peft_layers import (
    GUARD,
    assert_loads,
    image,
    mlp,
    output,
    train_model,
)
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.strategies import SCHEDULES

pytestmark = [
    peft_asks_by_an_old_name,
    # PEFT says of a folder that W had moved; here the optimizer's state moves it.
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'needs_base_weights_moved_by:UserWarning"),
]


def from_code(plain: nn.Module, folder, **config) -> nn.Module:
    """A new model with the adapter's weights, and the alpha of its config."""
    model = adapted(plain, "0", "1", **config)
    model.load_adapter(folder, "default", is_trainable=True)
    return model


def from_files(plain: nn.Module, folder, **config) -> nn.Module:
    """PEFT's model of a saved adapter."""
    return PeftModel.from_pretrained(copy.deepcopy(plain), folder, is_trainable=True)


ways = pytest.mark.parametrize("way", [from_code, from_files])


@ways
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"0": 3}, "rank_pattern": {"1": 3}}])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, way, config):
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1", **config)
    optimizer = folded(model, x)
    model.save_pretrained(tmp_path / "first")
    other = way(plain, tmp_path / "first", **config)
    resumed = optimizer_of(other, update_ratio=0.25)
    resumed.load_state_dict(state_of(optimizer))
    assert layer_scalings(other) == layer_scalings(model)
    assert alphas(other) == pytest.approx(alphas(model), rel=1e-11)
    train_model(model, optimizer, x)
    train_model(other, resumed, x)
    assert_trained_alike(model, other, x)
    other.save_pretrained(tmp_path / "second")
    assert_loads(plain, tmp_path / "second", model, x, tolerance=1e-10)


@ways
def test_a_resumed_run_whose_w_was_written(tmp_path, way):
    """The adapter, the pristine base and the optimizer's state are enough."""
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1", zero=False)
    optimizer = folded(model, x, start_step=1)
    with pytest.warns(UserWarning, match=GUARD):
        model.save_pretrained(tmp_path / "peft")
    other = way(plain, tmp_path / "peft")
    resumed = optimizer_of(other)
    resumed.load_state_dict(state_of(optimizer))
    train_model(model, optimizer, x)
    train_model(other, resumed, x)
    assert_alike(Trained(other, resumed), Trained(model, optimizer), x, 1e-12)
    save_adapter(other, resumed, tmp_path / "ours")
    assert_loads(plain, tmp_path / "ours", model, x, tolerance=1e-10)


@ways
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_resumes_in_the_middle_of_a_schedule(tmp_path, way, schedule, zero):
    """From the adapter as PEFT saves it, the pristine base and the optimizer's state."""
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1", zero=zero)
    optimizer = folded(model, x, 6, update_ratio=SCHEDULES[schedule])
    written = any(weight.moved for weight in optimizer.weights())
    with pytest.warns(UserWarning, match=GUARD) if written else contextlib.nullcontext():
        model.save_pretrained(tmp_path / "peft")
    other = way(plain, tmp_path / "peft")
    resumed = optimizer_of(other, update_ratio=SCHEDULES[schedule])
    resumed.load_state_dict(state_of(optimizer))
    assert layer_scalings(other) == layer_scalings(model)
    train_model(model, optimizer, x, 4)
    train_model(other, resumed, x, 4)
    assert_alike(Trained(other, resumed), Trained(model, optimizer), x, 1e-12)
    save_adapter(other, resumed, tmp_path / "ours")
    assert_loads(plain, tmp_path / "ours", model, x, tolerance=1e-10)


@ways
def test_a_run_that_was_saved_before_step_k_is_resumed(tmp_path, way):
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1")
    optimizer = folded(model, x, 2, start_step=3)
    model.save_pretrained(tmp_path)
    other = way(plain, tmp_path)
    resumed = optimizer_of(other)
    resumed.load_state_dict(state_of(optimizer))
    assert alphas(other) == [ALPHA] * 2
    train_model(model, optimizer, x)
    train_model(other, resumed, x)
    assert_trained_alike(model, other, x)


@ways
def test_a_state_from_before_step_k_unfolds(tmp_path, way):
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1", alpha_pattern={"1": 3})
    optimizer = optimizer_of(model)
    first, first_state = copy.deepcopy(get_peft_model_state_dict(model)), state_of(optimizer)
    train_model(model, optimizer, x)
    model.save_pretrained(tmp_path / "later")
    other = way(plain, tmp_path / "later", alpha_pattern={"1": 3})
    resumed = optimizer_of(other)
    resumed.load_state_dict(state_of(optimizer))
    for run in (Trained(model, optimizer), Trained(other, resumed)):
        set_peft_model_state_dict(run.model, first)
        run.optimizer.load_state_dict(first_state)
        assert layer_scalings(run.model) == [ALPHA / 2, 1.5]
        assert alphas(run.model) == [ALPHA, 3]
        run.model.save_pretrained(tmp_path / "unfolded")
        assert output(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "unfolded"), x).equal(plain(x))
    assert model.peft_config["default"].lora_alpha == ALPHA
    assert model.peft_config["default"].alpha_pattern == {"1": 3}
    fresh = adapted(plain, "0", "1", alpha_pattern={"1": 3})
    set_peft_model_state_dict(fresh, first)
    for run in (Trained(model, optimizer), Trained(other, resumed), Trained(fresh, optimizer_of(fresh))):
        train_model(*run, x)
        assert_trained_alike(run.model, model, x)


def test_a_state_from_before_a_written_w_unfolds_with_the_whole_model():
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    optimizer = folded(model, x, 1, start_step=2)
    whole, state = copy.deepcopy(model.state_dict()), state_of(optimizer)
    train_model(model, optimizer, x)
    expected = copy.deepcopy(model)
    with pytest.raises(deltaopt.WeightMismatchError, match=r"W has other contents .*\(2 layers: .*\.0, .*\.1\)"):
        optimizer.load_state_dict(state)
    assert alphas(model) == [LARGER] * 2
    model.load_state_dict(whole)
    optimizer.load_state_dict(state)
    assert alphas(model) == [ALPHA] * 2
    train_model(model, optimizer, x)
    assert_trained_alike(model, expected, x)


@pytest.mark.parametrize("saved", ["folded", "in_place"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_state_of_the_other_weight_update_is_refused(saved, steps):
    here = {"folded": "in_place", "in_place": "folded"}[saved]
    model, x = adapted(mlp(7, 5, 4), "0", "1"), image(7)
    optimizer = folded(model, x, steps, weight_update=saved)
    state = state_of(optimizer)
    other = adapted(mlp(7, 5, 4), "0", "1")
    other_optimizer = folded(other, x, 1, weight_update=here)
    before, before_alphas = copy.deepcopy(other.state_dict()), alphas(other)
    match = f"saved with weight_update='{saved}', this optimizer has '{here}'"
    with pytest.raises(ValueError, match=match):
        other_optimizer.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert alphas(other) == before_alphas
    assert other_optimizer.step_count == 1


def test_a_state_of_another_scaling_is_refused():
    plain, x = mlp(7, 5, 4).double(), image(7)
    model = adapted(plain, "0", "1")
    state = state_of(folded(model, x))
    other = adapted(plain, "0", "1", lora_alpha=7)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    with pytest.raises(
        ValueError, match=r"(?s)other triples.*model\.0: saved .*scaling 2\.5.*registered .*scaling 3\.5"
    ):
        optimizer_of(other).load_state_dict(state)
    assert alphas(other) == [7] * 2


def test_the_config_stays_the_users(tmp_path):
    """Its patterns too, which are regular expressions of the user's."""
    plain, x = mlp(7, 5, 6, 4).double(), image(7)
    model = adapted(plain, "0", "1", "2", alpha_pattern={"[12]": 16})
    before = copy.deepcopy(model.peft_config["default"])
    folded(model, x)
    assert alphas(model) == [LARGER, 16 * 2.5, 16 * 2.5]
    assert model.peft_config["default"] == before
    model.save_pretrained(tmp_path)
    assert_loads(plain, tmp_path, model, x, tolerance=1e-10)
