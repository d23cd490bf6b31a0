"""AdaLoRA's layers: W follows P diag(E) Q through the whole budget schedule; states, copies, exports, refusals."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from deltaopt import DeltaLoRAOptimizer, Factor, LoRATriple, export_adapter, find_triples, merged_weights
from tests.support.compare import COPIES, relative, through_a_file
from tests.support.internals import as_on_a_gpu
from tests.support.strategies import each_rule

peft = pytest.importorskip("peft", reason="runs where peft is installed")
pytestmark = pytest.mark.extra

STEPS = 14
SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": STEPS, "lora_alpha": 8}
ADAMW = {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.1}


def adalora_model(orth_reg_weight: float = 0.5, dtype: torch.dtype = torch.float64, **options):
    """Two layers with an AdaLoRA branch whose product is not zero."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 6))
    config = peft.AdaLoraConfig(target_modules=["0", "2"], orth_reg_weight=orth_reg_weight, **{**SCHEDULE, **options})
    model = peft.get_peft_model(base, config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.3 if "_E" in name else 0.5))
    return model


def layers_of(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, peft.tuners.adalora.SVDLinear)]


def batch(t: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + t)
    x, y = (torch.randn(9, n, generator=generator, dtype=torch.float64) for n in (7, 6))
    return x.to(dtype), y.to(dtype)


def loss_of(model: nn.Module, t: int, orth: float) -> Tensor:
    """A loss with PEFT's own orthogonality term, as the forward pass of its AdaLoraModel adds it."""
    x, y = batch(t, next(model.parameters()).dtype)
    value = (model(x) - y).square().mean()
    for layer in layers_of(model) if orth else ():
        P, Q = layer.lora_B["default"], layer.lora_A["default"]
        for gram in (P.T @ P, Q @ Q.T):
            value = value + orth / 4 * torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype))
    return value


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, orth: float = 0.5, after=None) -> None:
    for t in steps:
        optimizer.zero_grad()
        loss_of(model, t, orth).backward()
        optimizer.step()
        model.base_model.update_and_allocate(t)
        if after is not None:
            after()


def products(model: nn.Module) -> list[Tensor]:
    """Each layer's scaling * P diag(E) Q, from PEFT's numbers."""
    return [layer.get_delta_weight("default").detach().clone() for layer in layers_of(model)]


class DenseLoop:
    """The paper's loop on another model: a plain optimizer, and W moved by dense products.

    Args:
        at_once: W follows a masked product at once, and not with the next step.
    """

    def __init__(self, model: nn.Module, ratio: float, start_step: int, at_once: bool, orth: float) -> None:
        self.model, self.ratio, self.start, self.at_once, self.orth = model, ratio, start_step, at_once, orth
        self.inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
        self.last = None

    def move(self) -> None:
        now = products(self.model)
        for layer, before, after in zip(layers_of(self.model), self.last, now, strict=True):
            layer.base_layer.weight.data += self.ratio * (after - before)
        self.last = now

    def step(self, t: int) -> None:
        self.inner.zero_grad()
        loss_of(self.model, t, self.orth).backward()
        if t == self.start:
            self.last = products(self.model)
        self.inner.step()
        if self.last is not None:
            self.move()
        self.model.base_model.update_and_allocate(t)
        if self.last is not None and self.at_once:
            self.move()


def masked(model: nn.Module) -> int:
    return sum(int((layer.lora_E["default"] == 0).sum()) for layer in layers_of(model))


@pytest.mark.parametrize("way", ["host", "device", "resync"])
@pytest.mark.parametrize("start_step", [0, 4])
def test_W_follows_the_masked_product_through_the_whole_schedule(start_step, way):
    model, plain = adalora_model(), adalora_model()
    rule = as_on_a_gpu() if way == "device" else "in_place"
    optimizer = DeltaLoRAOptimizer.for_model(
        model, torch.optim.AdamW, update_ratio=0.7, start_step=start_step, weight_update=rule, **ADAMW
    )
    loop = DenseLoop(plain, 0.7, start_step, way == "resync", 0.5)
    for t in range(STEPS):
        after = optimizer.resync if way == "resync" and t >= start_step else None
        train(model, optimizer, range(t, t + 1), after=after)
        loop.step(t)
        for layer, its in zip(layers_of(model), layers_of(plain), strict=True):
            assert relative(layer.base_layer.weight, its.base_layer.weight) < 1e-12
            for name in ("lora_A", "lora_B", "lora_E"):
                assert relative(getattr(layer, name)["default"], getattr(its, name)["default"]) < 1e-12
    assert masked(model) == 4
    optimizer.resync()
    for number, (layer, before) in enumerate(zip(layers_of(model), layers_of(adalora_model()), strict=True)):
        asked = optimizer.displacement(optimizer.triples[number].label).product()
        assert relative(layer.base_layer.weight - before.base_layer.weight, asked) < 1e-12


@pytest.mark.parametrize("start_step", [0, 4])
def test_a_folded_branch_follows_the_masked_product_at_once(start_step):
    model, plain = adalora_model(0.0), adalora_model(0.0)
    optimizer = DeltaLoRAOptimizer.for_model(
        model, torch.optim.AdamW, update_ratio=0.7, start_step=start_step, weight_update="folded", **ADAMW
    )
    loop = DenseLoop(plain, 0.7, start_step, True, 0.0)
    x, _ = batch(0)
    for t in range(STEPS):
        train(model, optimizer, range(t, t + 1), orth=0.0)
        loop.step(t)
        assert relative(model(x), plain(x)) < 1e-12
        for layer, its in zip(layers_of(model), layers_of(plain), strict=True):
            for name in ("lora_A", "lora_B", "lora_E"):
                assert relative(getattr(layer, name)["default"], getattr(its, name)["default"]) < 1e-11
    assert masked(model) == 4
    fresh = adalora_model(0.0)
    fresh.load_state_dict(model.state_dict())
    assert relative(fresh(x), model(x)) < 1e-12


def test_the_orthogonality_loss_cannot_be_folded():
    message = r"orth_reg_weight=0.5\) reaches lora_A and lora_B past the branch.*weight_update=\"in_place\""
    with pytest.raises(ValueError, match=message):
        DeltaLoRAOptimizer.for_model(adalora_model(), torch.optim.AdamW, lr=0.1, weight_update="folded")


def trained(rule: str = "in_place", steps: int = 9, **options):
    orth = 0.0 if rule == "folded" else 0.5
    model = adalora_model(orth, **options)
    optimizer = DeltaLoRAOptimizer.for_model(
        model, torch.optim.AdamW, update_ratio=0.7, start_step=3, weight_update=rule, **ADAMW
    )
    train(model, optimizer, range(steps), orth)
    return model, optimizer


def continue_both(pairs, rule: str) -> None:
    """Continue after the last budget, which alone the allocator's own numbers do not matter for."""
    for model, optimizer in pairs:
        train(model, optimizer, range(11, STEPS), 0.0 if rule == "folded" else 0.5)


@pytest.mark.parametrize("whole", [True, False])
@each_rule
def test_a_run_resumes(rule, whole):
    model, optimizer = trained(rule, 11)
    weights = {n: p for n, p in model.state_dict().items() if whole or "lora_" in n or "ranknum" in n}
    fresh = adalora_model(0.0 if rule == "folded" else 0.5)
    fresh.load_state_dict(copy.deepcopy(weights), strict=False)
    fresh.peft_config["default"].rank_pattern = model.peft_config["default"].rank_pattern
    resumed = DeltaLoRAOptimizer.for_model(
        fresh, torch.optim.AdamW, update_ratio=0.7, start_step=3, weight_update=rule, **ADAMW
    )
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    continue_both([(model, optimizer), (fresh, resumed)], rule)
    for name, p in model.named_parameters():
        other = fresh.get_parameter(name)
        assert torch.equal(p, other) if whole else relative(other, p) < 1e-12, name


@pytest.mark.parametrize("step", [1, 5, 8])
@each_rule
def test_a_run_resumes_in_the_middle_of_the_budget(rule, step):
    """Before and after start_step, with the averages of PEFT's allocator, which are in no state_dict."""
    orth = 0.0 if rule == "folded" else 0.5
    model, optimizer = trained(rule, step)
    fresh = adalora_model(orth)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh.base_model.rankallocator = copy.deepcopy(model.base_model.rankallocator)
    resumed = DeltaLoRAOptimizer.for_model(
        fresh, torch.optim.AdamW, update_ratio=0.7, start_step=3, weight_update=rule, **ADAMW
    )
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for each, its in ((model, optimizer), (fresh, resumed)):
        train(each, its, range(step, STEPS), orth)
        assert masked(each) == 4
    for name, p in model.named_parameters():
        assert torch.equal(p, fresh.get_parameter(name)), name


@each_rule
def test_an_export_is_a_plain_adapter_on_the_base(rule):
    model, optimizer = trained(rule)
    if rule == "in_place":
        optimizer.resync()
    base, merged = adalora_model(), merged_weights(optimizer)
    for triple, layer, its in zip(optimizer.triples, layers_of(model), layers_of(base), strict=True):
        effective = layer.base_layer.weight + layer.get_delta_weight("default")
        change = export_adapter(optimizer)[triple.label].product()
        assert relative(its.base_layer.weight + change, effective) < 1e-12
        assert relative(merged[triple.label], effective) < 1e-12


def test_peft_s_own_save_warns(tmp_path):
    model, _ = trained()
    with pytest.warns(UserWarning, match="save_pretrained.*adapter"):
        model.save_pretrained(tmp_path / "own")


@each_rule
def test_a_disabled_adapter_gives_the_base(rule):
    model, optimizer = trained(rule)
    x, _ = batch(3)
    plain = adalora_model()
    with model.disable_adapter(), plain.disable_adapter():
        assert relative(model(x), plain(x)) < 1e-12
    with optimizer.base_weights():
        for layer, its in zip(layers_of(model), layers_of(plain), strict=True):
            assert relative(layer.base_layer.weight, its.base_layer.weight) < 1e-12


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_trains_by_itself(way):
    model, optimizer = trained(steps=11)
    twin, its = COPIES[way]((model, optimizer))
    continue_both([(model, optimizer), (twin, its)], "in_place")
    for name, p in model.named_parameters():
        assert torch.equal(p, twin.get_parameter(name)), name


@each_rule
def test_restart_gives_the_start_of_the_library(rule):
    model, optimizer = trained(rule)
    x, _ = batch(5)
    if rule == "in_place":
        optimizer.resync()
    before = model(x).detach()
    optimizer.restart(generator=torch.Generator().manual_seed(0))
    assert relative(model(x), before) < 1e-12
    for layer in layers_of(model):
        assert not layer.lora_E["default"].any()
        assert 0.01 < float(layer.lora_A["default"].detach().std()) < 0.03
    train(model, optimizer, range(9, 10), 0.0 if rule == "folded" else 0.5)


def test_a_sixteen_bit_W_follows():
    """W is where Eq. 6 puts it for the masked products, computed here in float64, to the last place of bfloat16."""
    model = adalora_model(dtype=torch.bfloat16)
    before = [layer.get_base_layer().weight.detach().double().clone() for layer in layers_of(model)]
    start = doubled_products(model)
    optimizer = DeltaLoRAOptimizer.for_model(
        model, torch.optim.AdamW, update_ratio=0.7, rounding="compensated", **ADAMW
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(STEPS))
    ends: list[list[Tensor]] = []
    optimizer.register_step_post_hook(lambda *_: ends.append(doubled_products(model)))
    train(model, optimizer, range(STEPS, STEPS + 1))
    for layer, W, first, end in zip(layers_of(model), before, start, ends[0], strict=True):
        asked = 0.7 * (end - first)
        moved = layer.get_base_layer().weight.detach().double() - W
        assert asked.norm() > 1e-2 * W.norm()
        assert (moved - asked).abs().max() < 2**-7 * W.abs().max()


def doubled_products(model: nn.Module) -> list[Tensor]:
    """Each layer's scaling * P diag(E) Q, of the numbers as they are, in float64."""
    found = []
    for layer in layers_of(model):
        P, E, Q = (getattr(layer, name)["default"].detach().double() for name in ("lora_B", "lora_E", "lora_A"))
        found.append(layer.scaling["default"] / float(layer.ranknum["default"] + 1e-5) * P @ (E * Q))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_number_of_ranks_does_not_train_on_a_base_of_another_dtype(dtype):
    """PEFT makes it a parameter that trains where it casts it to the base's dtype."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 6)).to(dtype)
    model = peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=["0", "2"], **SCHEDULE))
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, **ADAMW)
    for t in range(3):
        train(model, optimizer, range(t, t + 1))
        assert [float(layer.ranknum["default"]) for layer in layers_of(model)] == [4.0, 4.0]
    assert all(weight.moved for weight in optimizer.weights())


def test_a_rescaled_layer_is_noticed():
    model, optimizer = trained(steps=4)
    layers_of(model)[0].ranknum["default"].data.fill_(2.0)
    optimizer.zero_grad()
    loss_of(model, 4, 0.5).backward()
    with pytest.raises(RuntimeError, match=r"its scaling was 2 when it was registered and is 3.99998"):
        optimizer.step()


def test_layers_without_a_rank_are_left_out():
    """PEFT loads a layer whose budget is 0 with factors of no rank."""
    model = adalora_model()
    layers_of(model)[0].update_layer("default", 0, 8, model.peft_config["default"])
    assert [triple.label for triple in find_triples(model)] == ["base_model.model.2"]


def test_by_hand_the_singular_values_are_not_left_out():
    layer = layers_of(adalora_model())[0]
    W, P, Q, E = (layer, "base_layer.weight"), (layer, "lora_B.default"), (layer, "lora_A.default"), layer.lora_E
    scaling = 8 / (4 + 1e-5)
    with pytest.raises(ValueError, match=r"q: its branch multiplies by lora_E too .*B=Factor\(torch.mul, "):
        DeltaLoRAOptimizer(torch.optim.SGD, [LoRATriple(W, P, Q, scaling, "q")], lr=0.1)
    triple = LoRATriple(W, P, Factor(torch.mul, (layer, "lora_E.default"), Q), scaling, "q")
    DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
    assert triple.parameters[1] is E["default"]
