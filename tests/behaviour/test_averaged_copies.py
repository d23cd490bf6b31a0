"""Copies of a folded layer that average its parameters: they get the scaling of the branch that was averaged."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.behaviour.test_stored_factors import RATIO, Layer, S, effective, optimizer_of, train, weight_of


def averaged_by_hand(snapshots: list[dict], scaling: float) -> torch.Tensor:
    """What a layer of this scaling multiplies by, with the means of these parameters."""
    mean = {name: torch.stack([s[name] for s in snapshots]).mean(0) for name in snapshots[0]}
    return mean["W"] + scaling * torch.einsum("ir,rj->ij", mean["A"], mean["B"])


def parameters_of(layer: Layer) -> dict:
    return {name: p.detach().clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("made", ["before", "after"])
def test_an_averaged_model_of_after_step_k(made, zero):
    layer = Layer(zero)
    optimizer = optimizer_of(layer)
    average = AveragedModel(layer) if made == "before" else None
    train(layer, optimizer, 1)
    average = average or AveragedModel(layer)
    snapshots = []
    for _ in range(3):
        train(layer, optimizer, 1)
        average.update_parameters(layer)
        snapshots.append(parameters_of(layer))
    expected = averaged_by_hand(snapshots, S * (1 + RATIO))
    torch.testing.assert_close(effective(average.module.state_dict()), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight_of(average.module), expected, rtol=1e-12, atol=1e-12)


def test_the_first_forward_pass_sees_it_too():
    layer = Layer()
    optimizer = optimizer_of(layer)
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    train(layer, optimizer)
    assert average.module.scaling == S
    average.update_parameters(layer)
    torch.testing.assert_close(weight_of(average.module), weight_of(layer), rtol=1e-12, atol=1e-12)
    optimizer.groups[0].update_ratio = 0.5
    train(layer, optimizer, 1)
    average.update_parameters(layer)
    weight_of(average.module)
    assert average.module.scaling == layer.scaling == S * 1.5


def test_a_write_to_data_is_seen():
    layer = Layer()
    optimizer = optimizer_of(layer)
    average = copy.deepcopy(layer)
    train(layer, optimizer)
    for its, p in zip(average.parameters(), layer.parameters(), strict=True):
        its.data.copy_(p.data)
    torch.testing.assert_close(weight_of(average), weight_of(layer), rtol=1e-12, atol=1e-12)


def test_an_average_in_a_wider_dtype():
    layer = Layer().bfloat16()
    optimizer = optimizer_of(layer, start_step=1)
    average = copy.deepcopy(layer).float()
    train(layer, optimizer)
    with torch.no_grad():
        for its, p in zip(average.parameters(), layer.parameters(), strict=True):
            its.copy_(p)
    torch.testing.assert_close(weight_of(average), weight_of(copy.deepcopy(layer).float()), rtol=1e-6, atol=1e-6)


def of_eight_bits(layer: Layer) -> None:
    layer.A = torch.nn.Parameter((10 * layer.A).to(torch.int8), requires_grad=False)


@pytest.mark.parametrize("change", [of_eight_bits, lambda layer: layer.to("meta")])
def test_a_copy_without_numbers_does_not_keep_the_original_from_training(change):
    layer = Layer()
    optimizer = optimizer_of(layer, start_step=1)
    change(copied := copy.deepcopy(layer))
    train(layer, optimizer)
    assert layer.scaling == S * (1 + RATIO)
    assert copied.scaling == S


def test_a_copy_of_inference_mode_follows_too():
    layer = Layer()
    optimizer = optimizer_of(layer, start_step=1)
    with torch.inference_mode():
        average = copy.deepcopy(layer)
    train(layer, optimizer)
    with torch.inference_mode():
        for its, p in zip(average.parameters(), layer.parameters(), strict=True):
            its.copy_(p)
        torch.testing.assert_close(weight_of(average), weight_of(layer), rtol=1e-12, atol=1e-12)


def test_an_average_of_before_and_after_step_k_is_warned_of():
    layer = Layer()
    optimizer = optimizer_of(layer, start_step=2)
    average = AveragedModel(layer)
    for _ in range(4):
        train(layer, optimizer, 1)
        average.update_parameters(layer)
    with pytest.warns(
        UserWarning, match=r"copy of a model .* branch of q, .* scaled by 3 there.* before and after"
    ) as w:
        weight_of(average.module)
    assert len(w) == 1
    weight_of(average.module)  # once


@torch.no_grad()
def test_an_average_of_state_dicts_is_right_and_is_asked_about():
    """As timm's ModelEma has it: the values are for the first scaling."""
    layer = Layer()
    optimizer = optimizer_of(layer)
    average = copy.deepcopy(layer)
    with torch.enable_grad():
        train(layer, optimizer)
    for its, value in zip(average.state_dict().values(), layer.state_dict().values(), strict=True):
        its.copy_(value)
    with pytest.warns(UserWarning, match=r"If all of it comes from state_dict\(\), it is right"):
        found = weight_of(average)
    torch.testing.assert_close(found, weight_of(layer), rtol=1e-12, atol=1e-12)


def test_a_copy_that_loads_state_dicts_stays_as_it_is():
    """Without a warning, which would be an error here."""
    layer = Layer()
    optimizer = optimizer_of(layer)
    twin = copy.deepcopy(layer)
    for _ in range(3):
        train(layer, optimizer, 1)
        twin.load_state_dict(layer.state_dict())
        torch.testing.assert_close(weight_of(twin), weight_of(layer), rtol=1e-12, atol=1e-12)
    assert twin.scaling == S


@pytest.mark.parametrize("inner", ["plain", "folded"])
def test_a_copy_that_trains_by_itself_stays_as_it_is(inner):
    layer, alone = Layer(), Layer()
    optimizer = optimizer_of(layer)
    twin = copy.deepcopy(layer)
    train(layer, optimizer)
    for run in (twin, alone):
        if inner == "plain":
            train(run, torch.optim.SGD([run.A, run.B], lr=0.1))
        else:
            train(run, optimizer_of(run))
    assert twin.scaling == alone.scaling
    torch.testing.assert_close(weight_of(twin), weight_of(alone), rtol=0, atol=0)


def test_a_copy_of_a_copy_and_a_pickle_do_not_follow():
    layer = Layer()
    optimizer = optimizer_of(layer)
    average = AveragedModel(layer)
    train(layer, optimizer)
    average.update_parameters(layer)
    assert weight_of(average.module).shape == (5, 7)
    torch.testing.assert_close(weight_of(copy.deepcopy(average).module), weight_of(layer), rtol=1e-12, atol=1e-12)
    part = copy.deepcopy(layer.A)
    assert torch.equal(part, layer.A)
