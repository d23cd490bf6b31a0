"""What a state_dict of a layer says of A while its branch is scaled, and what is taken from one."""

import copy
import io
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support.compare import through_a_file

S, RATIO = 0.5, 2.0
RAW_COPIES = r"has divided what was loaded for A of q, .*\(here 3\).*p\.copy_\(\) under torch\.no_grad\(\)"


class Layer(nn.Module):
    """A LoRA layer of a user, whose forward pass takes the scaling from an attribute."""

    def __init__(self, zero: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(0)
        W, A, B = (torch.randn(*shape, generator=numbers, dtype=torch.float64) for shape in ((5, 7), (5, 2), (2, 7)))
        self.W = nn.Parameter(W.to(dtype), requires_grad=False)
        self.A, self.B = nn.Parameter((A * (not zero)).to(dtype)), nn.Parameter(B.to(dtype))
        self.scaling = S

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.W + self.scaling * self.A @ self.B).mT


def effective(tensors: dict[str, Tensor]) -> Tensor:
    """What a layer that has never been trained multiplies by, with these tensors; dense, in float64."""
    W, A, B = (tensors[name].double() for name in ("W", "A", "B"))
    return W + S * torch.einsum("ir,rj->ij", A, B)


def weight_of(layer: Layer) -> Tensor:
    """What a layer in training multiplies by."""
    return layer(torch.eye(7, dtype=layer.W.dtype)).mT.detach().double()


def optimizer_of(layer: Layer, inner: type = torch.optim.AdamW, **options) -> DeltaLoRAOptimizer:
    triple = LoRATriple((layer, "W"), (layer, "A"), (layer, "B"), scaling=(layer, "scaling"), name="q")
    return DeltaLoRAOptimizer(
        inner, [triple], **{"lr": 0.1, "update_ratio": RATIO, "weight_update": "folded"} | options
    )


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    x = torch.linspace(-1, 1, 21, dtype=next(layer.parameters()).dtype).view(3, 7)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()


def trained(zero: bool = True, steps: int = 3, dtype: torch.dtype = torch.float64, **options):
    layer = Layer(zero, dtype)
    optimizer = optimizer_of(layer, **options)
    train(layer, optimizer, steps)
    return layer, optimizer


def fresh(tensors: dict[str, Tensor], **options) -> Layer:
    layer = Layer(dtype=tensors["W"].dtype)
    layer.load_state_dict(tensors, strict=True, **options)
    return layer


SCHEDULES = {
    "constant": RATIO,
    "grows": lambda step: 0.3 * step,
    "falls to zero": lambda step: max(0.0, 2.0 - step),
    "zero": 0.0,
}


@settings(max_examples=25, deadline=None)
@given(
    zero=st.booleans(),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    start_step=st.integers(0, 3),
    steps=st.integers(0, 5),
)
def test_a_fresh_layer_computes_the_same(zero, schedule, start_step, steps):
    layer, _ = trained(zero, steps, update_ratio=SCHEDULES[schedule], start_step=start_step)
    expected = weight_of(layer)
    for tensors in (layer.state_dict(), through_a_file(layer.state_dict())):
        torch.testing.assert_close(effective(tensors), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weight_of(fresh(tensors)), expected, rtol=1e-12, atol=1e-12)


def test_a_layer_of_16_bits_is_rounded_once():
    layer, _ = trained(dtype=torch.bfloat16, update_ratio=0.7)
    stored = layer.state_dict()["A"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, (layer.A.detach().double() * 1.7).bfloat16())


def test_tensors_of_a_branch_that_is_not_scaled_are_the_parameters():
    """torch.distributed.checkpoint loads into them."""
    layer, optimizer = trained(steps=2, start_step=2)
    assert layer.state_dict()["A"].data_ptr() == layer.A.data_ptr()
    train(layer, optimizer, 1)
    assert layer.state_dict()["A"].data_ptr() != layer.A.data_ptr()
    assert layer.state_dict()["B"].data_ptr() == layer.B.data_ptr()
    with optimizer.base_weights():
        assert layer.state_dict()["A"].data_ptr() == layer.A.data_ptr()


@pytest.mark.parametrize("write", [Tensor.zero_, lambda t: t.copy_(t.clone()), lambda t: t.add_(1)])
def test_a_write_that_would_be_lost_is_refused(write):
    layer, _ = trained()
    before = layer.A.detach().clone()
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        write(layer.state_dict()["A"])
    assert torch.equal(layer.A, before)


def test_what_is_given_can_be_copied_saved_and_read():
    layer, _ = trained()
    given, expected = layer.state_dict(), weight_of(layer)
    for tensors in (copy.deepcopy(given), {name: t.clone() for name, t in given.items()}, through_a_file(given)):
        tensors["A"].mul_(1.0)
        torch.testing.assert_close(weight_of(fresh(tensors, assign=True)), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="inference tensor"):
        fresh(given, assign=True)
    assert given["A"].numpy().shape == (5, 2)


def test_keep_vars_gives_the_parameters_and_says_what_they_are_not():
    layer, optimizer = trained(steps=1, start_step=1)
    assert layer.state_dict(keep_vars=True)["A"] is layer.A
    train(layer, optimizer, 1)
    model = nn.Sequential(layer, trained()[0])
    with pytest.warns(
        UserWarning, match=r"keep_vars=True.* branch of q, .* by 3 times its registered scaling"
    ) as caught:
        assert model.state_dict(keep_vars=True)["0.A"] is layer.A
    assert len(caught) == 1


def test_the_layer_takes_back_what_it_gave_bit_for_bit():
    layer, optimizer = trained(update_ratio=1.7)
    before = layer.A.detach().clone()
    for tensors in (layer.state_dict(), through_a_file(layer.state_dict()), dict(layer.state_dict())):
        layer.load_state_dict(tensors)
        assert torch.equal(layer.A, before)
    saved = copy.deepcopy(layer.state_dict()), through_a_file(optimizer.state_dict())
    train(layer, optimizer)
    after = layer.A.detach().clone()
    layer.load_state_dict(saved[0])
    torch.testing.assert_close(layer.A.detach(), before, rtol=1e-12, atol=1e-12)
    optimizer.load_state_dict(saved[1])
    assert torch.equal(layer.A, before)
    train(layer, optimizer)
    assert torch.equal(layer.A, after)


def test_raw_copies_are_warned_of_once_for_the_model():
    layer, optimizer = trained()
    model = nn.Sequential(layer, trained(steps=2)[0])
    raw = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(raw)  # those that are there
    assert torch.equal(model[0].A, raw["0.A"])
    train(layer, optimizer)
    raw["1.A"] += 1
    with pytest.warns(UserWarning, match=RAW_COPIES) as caught:
        model.load_state_dict(raw)
    assert len(caught) == 1
    torch.testing.assert_close(layer.A.detach(), raw["0.A"] / 3)


@pytest.mark.extra
def test_values_stay_known_over_many_state_dicts():
    """A best checkpoint may be loaded that is older than many saves of a model of some hundred layers."""
    layer, _ = trained()
    expected, best = weight_of(layer), {name: value.clone() for name, value in layer.state_dict().items()}
    for _ in range(5000):
        layer.A.data += 1e-3
        layer.state_dict()
    layer.load_state_dict(best)
    torch.testing.assert_close(weight_of(layer), expected, rtol=1e-12, atol=1e-12)


def test_values_of_a_file_that_was_loaded_before_are_known():
    """As the adapter that is loaded again into the resumed run, of which the dict has lost its marks."""
    layer, optimizer = trained()
    expected, tensors = weight_of(layer), {name: t + 0.0 for name, t in layer.state_dict().items()}
    other = fresh(tensors)
    second = optimizer_of(other)
    second.load_state_dict(optimizer.state_dict())
    train(other, second)
    other.load_state_dict(tensors)
    torch.testing.assert_close(weight_of(other), expected, rtol=1e-12, atol=1e-12)


def test_a_dict_from_before_the_ratio_is_for_the_registered_scaling_too():
    layer, optimizer = trained(zero=False, steps=1, start_step=1)
    tensors, expected = copy.deepcopy(layer.state_dict()), weight_of(layer)
    state, A = optimizer.state_dict(), layer.A.detach().clone()
    train(layer, optimizer)
    layer.load_state_dict(tensors)
    torch.testing.assert_close(weight_of(layer), expected, rtol=1e-12, atol=1e-12)
    optimizer.load_state_dict(state)
    assert torch.equal(layer.A, A)
    assert layer.scaling == S


def test_parameters_that_are_loaded_into_themselves_stay():
    layer, optimizer = trained(zero=False, steps=1, start_step=1)
    tensors = layer.state_dict()
    train(layer, optimizer)
    expected = copy.deepcopy(dict(layer.named_parameters()))
    layer.load_state_dict(tensors)
    assert all(torch.equal(p, expected[name]) for name, p in layer.named_parameters())


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("form", ["stored", "raw", "raw and scaled"])
def test_a_state_finds_A_in_each_form(form, zero):
    layer, optimizer = trained(zero, update_ratio=1.7)
    state = through_a_file(optimizer.state_dict())
    other = fresh(layer.state_dict())
    if form != "stored":
        with torch.no_grad():
            other.A.copy_(layer.A)
    if form == "raw and scaled":
        other.scaling = layer.scaling
    second = optimizer_of(other, update_ratio=1.7)
    second.load_state_dict(state)
    for run in ((layer, optimizer), (other, second)):
        train(*run)
    assert other.scaling == layer.scaling
    assert all(map(torch.equal, layer.parameters(), other.parameters()))


def test_another_A_is_refused():
    layer, optimizer = trained()
    other = fresh(layer.state_dict())
    with torch.no_grad():
        other.A[0, 0] *= 1 + 1e-12
    second = optimizer_of(other)
    with pytest.raises(deltaopt.WeightMismatchError, match="q: A has other contents than when the state was saved"):
        second.load_state_dict(optimizer.state_dict())


def test_a_state_without_its_ledger_keeps_what_the_model_computes():
    layer, optimizer = trained()
    other, expected = fresh(layer.state_dict()), weight_of(layer)
    second = optimizer_of(other)
    second.load_state_dict(deltaopt.without_ledger(optimizer.state_dict()))
    assert other.scaling == layer.scaling
    torch.testing.assert_close(weight_of(other), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["folded", "in_place"])
def test_two_optimizers_in_turn(rule):
    """The factors multiply; a fresh layer has the first scaling of all."""
    layer, _ = trained()
    with pytest.warns(UserWarning, match="an earlier optimizer has folded"):
        second = optimizer_of(layer, weight_update=rule)
    train(layer, second)
    assert layer.scaling == S * (9 if rule == "folded" else 3)
    expected = weight_of(layer)
    torch.testing.assert_close(effective(layer.state_dict()), expected, rtol=1e-12, atol=1e-12)
    other = fresh(layer.state_dict())
    resumed = optimizer_of(other, weight_update=rule)
    resumed.load_state_dict(through_a_file(second.state_dict()))
    for run in ((layer, second), (other, resumed)):
        train(*run)
    assert other.scaling == layer.scaling
    assert all(map(torch.equal, layer.parameters(), other.parameters()))
    torch.testing.assert_close(effective(other.state_dict()), weight_of(layer), rtol=1e-12, atol=1e-12)


def test_a_scaling_that_a_user_sets_between_optimizers_is_not_stored():
    """As without any optimizer: no state_dict has it."""
    layer, _ = trained()
    layer.scaling *= 2
    optimizer_of(layer)
    torch.testing.assert_close(layer.state_dict()["A"], 3 * layer.A.detach())


def test_a_scaling_that_is_a_buffer_travels_by_itself():
    layer = Layer()
    del layer.scaling
    layer.register_buffer("scaling", torch.tensor(S, dtype=torch.float64))
    train(layer, optimizer_of(layer))
    assert layer.state_dict()["A"].data_ptr() == layer.A.data_ptr()
    assert float(layer.state_dict()["scaling"]) == 1.5


def test_a_buffer_that_is_not_persistent_does_not():
    layer = Layer()
    del layer.scaling
    layer.register_buffer("scaling", torch.tensor(S, dtype=torch.float64), persistent=False)
    train(layer, optimizer_of(layer))
    torch.testing.assert_close(effective(layer.state_dict()), weight_of(layer), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", ["its place", "a function"])
def test_a_factor_that_is_registered_as_a_tensor_is_found(scaling):
    layer = Layer()
    place = {"scaling": (layer, "scaling")}
    W = layer.W
    if scaling == "a function":
        place, W = {"scaling": S, "set_scaling": lambda value: setattr(layer, "scaling", value)}, (layer, "W")
    triple = LoRATriple(W, layer.A, layer.B, name="q", **place)
    train(layer, DeltaLoRAOptimizer(torch.optim.AdamW, [triple], lr=0.1, weight_update="folded"))
    torch.testing.assert_close(effective(layer.state_dict()), weight_of(layer), rtol=1e-12, atol=1e-12)


def test_copies_and_pickles_store_for_themselves():
    layer, optimizer = trained()
    expected = weight_of(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        torch.testing.assert_close(effective(twin.state_dict()), expected, rtol=1e-12, atol=1e-12)
    twin, its = copy.deepcopy((layer, optimizer))
    train(twin, its, 1)
    its.groups[0].update_ratio = 0.0
    train(twin, its, 1)
    assert (twin.scaling, layer.scaling) == (S, 3 * S)
    for one in (layer, twin):
        torch.testing.assert_close(effective(one.state_dict()), weight_of(one), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight_of(layer), expected, rtol=0, atol=0)


def test_nothing_is_warned_of_in_a_whole_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer, optimizer = trained()
        layer.load_state_dict(layer.state_dict())
        train(layer, optimizer)


class Sharing(nn.Module):
    """Two layers with one A, of different scalings; a state_dict has it under both names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Layer(), Layer()
        self.other.A, self.other.scaling = self.one.A, 2 * S

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("place", ["one", "each"])
def test_branches_of_different_scalings_that_share_A(order, place):
    model = Sharing()
    triples = [
        LoRATriple(
            (layer, "W"),
            (layer if place == "each" else model.one, "A"),
            (layer, "B"),
            scaling=(layer, "scaling"),
            name=name,
        )
        for name, layer in model.named_children()
    ]
    train(
        model,
        DeltaLoRAOptimizer(torch.optim.AdamW, triples[::order], lr=0.1, update_ratio=RATIO, weight_update="folded"),
        2,
    )
    assert [t.stored_factor for t in triples] == [3.0, 3.0]
    given = model.state_dict()
    torch.testing.assert_close(given["one.A"], 3 * model.one.A.detach())
    if place == "each":
        fresh = Sharing()
        fresh.load_state_dict(given)
        for name, layer in model.named_children():
            torch.testing.assert_close(weight_of(getattr(fresh, name)), weight_of(layer), rtol=1e-12, atol=1e-12)
