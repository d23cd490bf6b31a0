"""Every method of the evidence on a tiny model: what trains, what it computes, and that a cut run continues exactly."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.evidence.adapters import moved_changes
from benchmarks.evidence.methods import METHODS, prepare
from deltaopt import DeltaLoRAOptimizer, LoRATriple, schedules
from deltaopt.analysis import layer_changes
from tests.support.evidence_runs import LABELS, LAYERS, NAMES, WIDTH, Run, effective_weights, setting_of, tiny_model

HEAD = LABELS * (WIDTH + 1)
WHOLE = sum(p.numel() for p in tiny_model().parameters())
FACTORS = 2 * LAYERS * 2 * 4 * WIDTH
STARTS_AS_LORA = ["lora", "lora-plus", "rslora", "alpha", "delta", "ratio-up", "ratio-down", "restarts", "dylora"]


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_and_the_changes_are_those_of_the_weights(method):
    run = Run(setting_of(method, steps=40, lr=0.5 if method == "sgd" else 2e-2)).train()
    assert sum(run.losses[-4:]) < 0.9 * sum(run.losses[:4])

    old, new = effective_weights(tiny_model()), effective_weights(run.model)
    changes = run.prepared.changes()
    assert [change.name for change in changes] == NAMES
    for change in changes:
        W0, W = old[change.name].double(), new[change.name].double()
        sigma = torch.linalg.svdvals(W - W0)
        share = sigma / sigma.sum()
        assert change.base_norm == pytest.approx(float(W0.norm()), rel=1e-5)
        assert change.change_norm == pytest.approx(float((W - W0).norm()), rel=1e-4)
        assert change.cosine == pytest.approx(float((W * W0).sum() / W.norm() / W0.norm()), abs=1e-5)
        assert change.effective_rank == pytest.approx(float((-share * (share + 1e-30).log()).sum().exp()), rel=1e-3)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("full", WHOLE),
        ("full-frozen-embeddings", WHOLE - (12 + 8 + 2) * WIDTH),
        ("full-qv", 2 * LAYERS * WIDTH**2 + HEAD),
        ("sgd", WHOLE),
        ("adalora", FACTORS + 2 * LAYERS * 4 + HEAD),
        *((method, FACTORS + HEAD) for method in [*STARTS_AS_LORA, "delta-restarts"]),
    ],
)
def test_number_of_parameters_that_train_and_that_the_optimizer_holds(method, expected):
    prepared = prepare(setting_of(method), tiny_model())
    trained = [p for p in prepared.model.parameters() if p.requires_grad]
    held = [p for group in prepared.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in trained) == expected
    assert {id(p) for p in held} == {id(p) for p in trained}
    assert len(held) == len(trained)
    assert all(p.requires_grad for p in prepared.model.classifier.parameters())


def test_each_method_has_a_case_above():
    assert set(METHODS) == {"full", "full-frozen-embeddings", "full-qv", "sgd", "adalora", "delta-restarts"} | set(
        STARTS_AS_LORA
    )


CUTS = [(method, 6) for method in METHODS] + [("adalora", 4), ("adalora", 9)]


@pytest.mark.parametrize(("method", "cut"), CUTS)
def test_a_run_that_was_cut_continues_bit_for_bit(method, cut):
    setting = setting_of(method, start=0.25 if "delta" in method else 0.0)
    whole = Run(setting).train()
    file = Run(setting).train(stop=cut).saved()
    torch.manual_seed(77)  # nothing may come from the global generator
    rest = Run(setting).load(file).train(start=cut)
    assert rest.losses == whole.losses[cut:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, rest.model.state_dict()[name]), name
    assert rest.prepared.changes() == whole.prepared.changes()


def test_with_a_constant_ratio_from_step_0_delta_lora_is_its_alpha_control():
    runs = {}
    for method in ("delta", "alpha", "lora"):
        # float64 and a tiny eps: what remains is the mathematics
        setting = setting_of(method, steps=30, clip=None, eps=1e-20, update_ratio=2.0)
        runs[method] = Run(setting, tiny_model().double()).train()
    assert runs["delta"].losses == pytest.approx(runs["alpha"].losses, rel=1e-8)
    assert abs(runs["delta"].losses[-1] / runs["lora"].losses[-1] - 1) > 1e-2
    weights = {method: effective_weights(run.model) for method, run in runs.items()}
    for name in NAMES:
        assert torch.allclose(weights["delta"][name], weights["alpha"][name], rtol=0, atol=1e-8)
        assert not torch.allclose(weights["delta"][name], weights["lora"][name], rtol=0, atol=1e-3)


def test_in_float32_and_with_the_usual_eps_they_stay_close():
    losses = [Run(setting_of(method, steps=30, clip=None)).train().losses for method in ("delta", "alpha")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_start_is_that_of_the_seed_alone_and_the_global_generator_stays():
    starts = {}
    for method in [*STARTS_AS_LORA, "delta-restarts"]:
        model = tiny_model()
        torch.manual_seed(len(starts))
        state = torch.get_rng_state()
        prepare(setting_of(method), model)
        assert torch.equal(torch.get_rng_state(), state)
        factors = [p.detach() for p in model.parameters() if 4 in p.shape and p.dim() == 2]
        assert len(factors) == 4 * LAYERS
        starts[method] = {tuple(p.flatten().tolist()) for p in factors}
    assert all(start == starts["lora"] for start in starts.values())
    values = torch.tensor([start for start in starts["lora"] if any(start)])
    assert values.shape == (2 * LAYERS, 4 * WIDTH)  # and each A is zero
    assert 0.9 * WIDTH**-0.5 < values.abs().max() <= WIDTH**-0.5
    assert abs(values.mean()) < 0.05
    other = tiny_model()
    prepare(setting_of("lora", seed=4), other)
    assert {tuple(p.flatten().tolist()) for p in other.parameters()}.isdisjoint(map(tuple, values.tolist()))


@pytest.mark.parametrize(
    ("method", "scaling"),
    [("lora", 2.0), ("lora-plus", 2.0), ("delta", 2.0), ("restarts", 2.0), ("alpha", 6.0), ("rslora", 4.0)],
)
def test_scaling_of_the_branch(method, scaling):
    model = tiny_model()
    prepare(setting_of(method, alpha=8.0, rank=4, update_ratio=2.0), model)
    assert {model.get_submodule(name).scaling["default"] for name in NAMES} == {scaling}


@pytest.mark.parametrize("method", METHODS)
def test_options_of_the_optimizer(method):
    setting = setting_of(method, lr=3e-3, weight_decay=0.1, eps=1e-6, update_ratio=0.5)
    optimizer = prepare(setting, tiny_model()).optimizer
    rates = {group["lr"] for group in optimizer.param_groups}
    assert sorted(rates) == pytest.approx([3e-3, 4.5e-3] if method == "lora-plus" else [3e-3])
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    if method == "sgd":
        assert type(optimizer) is torch.optim.SGD
        assert {group["momentum"] for group in optimizer.param_groups} == {0}
    else:
        inner = optimizer.inner if isinstance(optimizer, DeltaLoRAOptimizer) else optimizer
        assert type(inner) is torch.optim.AdamW
        assert {group["eps"] for group in optimizer.param_groups} == {1e-6}


def test_lora_plus_is_faster_for_the_factor_that_starts_at_zero():
    prepared = prepare(setting_of("lora-plus"), tiny_model())
    faster = [group for group in prepared.optimizer.param_groups if group["lr"] > 2e-2]
    assert [len(group["params"]) for group in faster] == [2 * LAYERS]
    assert not any(p.any() for p in faster[0]["params"])


def test_sgd_keeps_no_state():
    run = Run(setting_of("sgd", steps=3)).train()
    kept = [value for state in run.optimizer.state.values() for value in state.values()]
    assert all(value is None for value in kept)


def test_frozen_embeddings_stay_and_the_rest_moves():
    run = Run(setting_of("full-frozen-embeddings", steps=3)).train()
    pretrained = dict(tiny_model().named_parameters())
    stayed = {name for name, p in run.model.named_parameters() if torch.equal(p, pretrained[name])}
    tables = {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    assert stayed == tables


@pytest.mark.parametrize(
    ("method", "start", "expected"),
    [
        ("delta", 0.0, [2.0] * 20),
        ("delta", 0.25, [0.0] * 5 + [2.0] * 15),
        ("ratio-up", 0.0, [0.0] + [2 * k / 10 for k in range(1, 10) for _ in (0, 1)] + [2.0]),
        ("ratio-down", 0.0, [2.0] + [2 - 2 * k / 10 for k in range(1, 10) for _ in (0, 1)] + [0.0]),
        ("ratio-down", 0.5, [0.0] * 10 + [2 - 2 * k / 10 for k in range(10)]),
        ("restarts", 0.0, [0.0] * 20),
        ("delta-restarts", 0.0, [2.0] * 20),
    ],
)
def test_ratio_of_each_step(method, start, expected):
    """Read off W: how far it moves for the move of the product, of one layer."""
    run, name, ratios = Run(setting_of(method, steps=20, start=start, clip=None)), NAMES[0], []
    layer = run.model.get_submodule(name)

    def product():
        return (2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()

    for step in range(20):
        run.prepared.before_step(step)
        run.backward(step)
        W, P = layer.base_layer.weight.clone(), product()
        run.optimizer.step()
        ratios.append(float((layer.base_layer.weight - W).norm() / (product() - P).norm()))
        run.prepared.after_step(step)
        run.optimizer.zero_grad()
    assert ratios == pytest.approx(expected, abs=2e-3)


def test_ranks_of_a_change_that_the_optimizer_keeps_as_a_matrix():
    W0 = torch.randn(40, 48)
    W, A, B = W0.clone(), torch.zeros(40, 8, requires_grad=True), torch.randn(8, 48, requires_grad=True)
    ramp = schedules.linear(0.0, 2.0, steps=40)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [LoRATriple(W, A, B, 0.5, "q")], lr=0.1, update_ratio=ramp)
    for _ in range(40):
        A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
        optimizer.step()
    (without,) = layer_changes(optimizer)
    assert without.effective_rank is None
    (change,) = moved_changes(optimizer, ["q"])
    sigma = torch.linalg.svdvals((W + 0.5 * A @ B - W0).detach().double())
    share = sigma / sigma.sum()
    assert change.effective_rank == pytest.approx(float((-share * share.log()).sum().exp()), rel=1e-4)
    assert change.numerical_rank == 40
    assert change[:-2] == without[:-2]


def test_dropout_in_the_branch_is_taken_for_the_ablation():
    for method in ("lora", "delta", "adalora", "dylora"):
        run = Run(setting_of(method, dropout=0.5)).train()
        assert all(math.isfinite(loss) for loss in run.losses)
        run.model.train()
        layer = run.model.get_submodule(NAMES[0])
        x = torch.ones(64, WIDTH)
        assert len({tuple(row) for row in layer(x).tolist()}) > 1


def test_an_unknown_method_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"cell: no method is called 'lorra'\. There are full, .*, delta-restarts"):
        prepare(setting_of("lorra", row="cell"), tiny_model())


def test_a_model_without_projections_is_refused():
    with pytest.raises(ValueError, match="0 query and 0 value layers"):
        prepare(setting_of("lora"), torch.nn.Sequential(torch.nn.Linear(3, 3)))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "sgd"])
def test_the_head_may_have_a_learning_rate_of_its_own(method):
    """Nothing but the head differs after the first step, whose gradients are the same."""
    runs = [Run(setting_of(method, steps=3, lr=1e-3, head_lr=head_lr)) for head_lr in (None, 1e-3, 1e-2)]
    shared, same, fast = (run.train(stop=1) for run in runs)
    assert not torch.equal(fast.model.classifier.weight, shared.model.classifier.weight)
    for name, held in shared.model.state_dict().items():
        assert torch.equal(same.model.state_dict()[name], held), name
        assert name.startswith("classifier") or torch.equal(fast.model.state_dict()[name], held), name


def test_a_rate_of_the_head_is_refused_with_sgd():
    with pytest.raises(ValueError, match=r"head_lr=0\.01 is a learning rate of AdamW, in whose scale SGD's is not"):
        prepare(setting_of("sgd", head_lr=0.01), tiny_model())


def test_settings_without_a_head_lr_are_written_as_before_there_was_one():
    setting = setting_of("lora")
    assert "head_lr" not in setting.as_json()
    other = replace(setting, head_lr=0.1)
    assert other.as_json()["head_lr"] == 0.1
    assert other.path != setting.path
