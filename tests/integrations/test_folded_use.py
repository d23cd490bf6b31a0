"""weight_update="folded" among other people's code: it gives the factors and the outputs of W moved in place."""

import contextlib
import copy
import gc
import json
import pickle
import re
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler, swa_utils

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.integrations import test_resume
from tests.integrations.test_real_use import SCHEDULERS
from tests.integrations.test_resume import effective, same, trainer_for
from tests.support.compare import bits
from tests.support.models import (
    RATIO,
    batches,
    causal_lm,
    layers,
    loss_of,
    optimizer_for,
    peft,
    plain_loop,
    weights,
)

pytestmark = [
    # PEFT asks transformers models by a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]

MODES = "folded", "in_place"
K = 3
STARTS = {"zero": {"B_zero": True, "start_step": 0}, "later": {"B_zero": False, "start_step": K}}
"""LoRA's usual start, where W is never written; and a product at step K that is taken from W once."""
each_start = pytest.mark.parametrize("start", STARTS)

EXACT = 1e-10
"""Relative, Frobenius norm: two float64 runs that are equal but for the order of their sums."""

FIRST_SCALING = 2.0
"""Of the adapters of `causal_lm`."""


class Run:
    """A model in training in one of the modes."""

    def __init__(self, mode: str, start: str = "zero", dtype: torch.dtype = torch.float64, **options) -> None:
        settings = {**STARTS[start], "weight_update": mode, **options}
        self.model = causal_lm(dtype, B_zero=settings.pop("B_zero"))
        self.optimizer = optimizer_for(self.model, **settings)

    def factors(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def backward(self, ids: Tensor, factor: float = 1.0) -> None:
        (loss_of(self.model, ids) * factor).backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, data: list[Tensor]) -> None:
        plain_loop(self.model, self.optimizer, data)


def relative(a: Tensor, b: Tensor) -> float:
    return test_resume.relative(a.detach(), b.detach())


@torch.no_grad()
def assert_follows(folded: nn.Module, in_place: nn.Module, tolerance: float = EXACT) -> None:
    """The factors, the effective weights and the output are equal; W and the scaling of the branch are not."""
    for (name, p), (_, q) in zip(folded.named_parameters(), in_place.named_parameters(), strict=True):
        if p.requires_grad:
            assert relative(p, q) <= tolerance, name
    expected, moved = effective(in_place), weights(in_place)
    for name, W in effective(folded).items():
        assert relative(W, expected[name]) <= tolerance, name
    for name, W in weights(folded).items():
        assert relative(W, moved[name]) > 10 * tolerance, name
    ids = batches(1, seed=9)[0]
    assert relative(folded(input_ids=ids).logits, in_place(input_ids=ids).logits) <= tolerance


def scalings(model: nn.Module) -> set[float]:
    return {layer.scaling["default"] for layer in layers(model).values()}


def both(way, *arguments, **options) -> tuple[Run, Run]:
    """A folded and an in-place run of the same data: what `way` returns is equal too."""
    runs = [Run(mode, *arguments, **options) for mode in MODES]
    told = [way(run) for run in runs]
    if told[0] is not None:
        assert told[0] == pytest.approx(told[1], rel=1e-8, abs=1e-12)
    return runs[0], runs[1]


# ways to train


def plain(run):
    return plain_loop(run.model, run.optimizer, batches(8))


def accumulating(run):
    """K lies between two steps of three micro-batches each."""
    for i, ids in enumerate(batches(18)):
        run.backward(ids, 1 / 3)
        if i % 3 == 2:
            run.step()


def keeping(run):
    """The gradients are never zeroed, so those of before K are summed with those of after it."""
    for ids in batches(8):
        run.backward(ids)
        run.optimizer.step()


def clipping_norms(run):
    norms = []
    for ids in batches(8):
        run.backward(ids)
        norms.append(float(nn.utils.clip_grad_norm_(run.factors(), 0.05)))
        run.step()
    assert min(norms) > 0.05
    return norms


def clipping_values(run):
    for ids in batches(8):
        run.backward(ids)
        nn.utils.clip_grad_value_(run.factors(), 1e-3)
        run.step()


def clipping_accumulated_gradients(run):
    for i, ids in enumerate(batches(16)):
        run.backward(ids, 0.5)
        if i % 2:
            nn.utils.clip_grad_norm_(run.factors(), 0.05)
            run.step()


def checkpointing(reentrant):
    def train(run):
        run.model.enable_input_require_grads()
        run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        run.model.train()
        losses = plain(run)
        run.model.eval()  # in which nothing is checkpointed
        return losses

    return train


def by_closures(run):
    losses = []
    for ids in batches(8):

        def closure(ids=ids):
            run.optimizer.zero_grad()
            loss = loss_of(run.model, ids)
            loss.backward()
            return loss

        losses.append(float(run.optimizer.step(closure).detach()))
    return losses


def by_autograd_grad(run):
    """Gradients that are asked for and set by hand."""
    for ids in batches(8):
        grads = torch.autograd.grad(loss_of(run.model, ids), run.factors())
        for p, grad in zip(run.factors(), grads, strict=True):
            p.grad = grad
        run.step()


def penalising_gradients_of_inputs(run):
    for ids in batches(6):
        inputs = run.model.get_input_embeddings()(ids).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the others can not be differentiated twice
            loss = run.model(inputs_embeds=inputs, labels=ids).loss
        (grad,) = torch.autograd.grad(loss, inputs, create_graph=True)
        (loss + grad.square().sum()).backward()
        run.step()


def penalising_factors(run):
    """As docs/folded.md says: a term of A and B themselves, as O-LoRA has, is multiplied by 1 + update_ratio."""
    for ids in batches(8):
        weight = 0.1 * (1 + run.optimizer.triples[0].folded)
        (loss_of(run.model, ids) + weight * sum(p.square().sum() for p in run.factors())).backward()
        run.step()


def with_hooks_after_accumulation(run):
    """Each sees the gradient as it is in place."""
    seen = []
    for p in run.factors():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.norm())))
    plain(run)
    return seen


def cast_in_the_middle(run):
    """A cast keeps the Parameter objects and their hooks."""
    run.train(batches(5))
    run.model.float()
    run.model.double()
    run.optimizer.zero_grad()
    run.train(batches(3, seed=2))


def switching_adapters(run):
    """PEFT takes requires_grad off the adapter that is not active, and gives it back."""
    run.model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    run.model.set_adapter("default")
    for i, ids in enumerate(batches(8)):
        if i in (2, 5):
            run.model.set_adapter("other")
            assert not any(triple.A.requires_grad or triple.B.requires_grad for triple in run.optimizer.triples)
            run.model.set_adapter("default")
        run.train([ids])


def freezing_between_steps(run):
    for ids in batches(8):
        for p in (factors := run.factors()):
            p.requires_grad_(False)
        loss_of(run.model, ids)
        for p in factors:
            p.requires_grad_(True)
        run.train([ids])


WAYS = {
    "plain": plain,
    "accumulation": accumulating,
    "kept_gradients": keeping,
    "clip_grad_norm": clipping_norms,
    "clip_grad_value": clipping_values,
    "accumulation_and_clipping": clipping_accumulated_gradients,
    "checkpointing": checkpointing(False),
    "reentrant_checkpointing": checkpointing(True),
    "closures": by_closures,
    "autograd.grad": by_autograd_grad,
    "penalty_on_gradients_of_inputs": penalising_gradients_of_inputs,
    "penalty_on_factors": penalising_factors,
    "post_accumulate_hooks": with_hooks_after_accumulation,
    "cast": cast_in_the_middle,
    "set_adapter": switching_adapters,
    "requires_grad": freezing_between_steps,
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@each_start
@pytest.mark.parametrize("way", WAYS)
def test_a_folded_run_follows_the_one_in_place(way, start):
    # SGD shows a gradient that is too large by a factor; Adam hardly does.
    folded, in_place = both(WAYS[way], start, inner=torch.optim.SGD, lr=0.05, momentum=0.9)
    assert_follows(folded.model, in_place.model, 1e-5 if way == "cast" else EXACT)


@each_start
@pytest.mark.parametrize("way", ["plain", "accumulation_and_clipping"])
def test_a_folded_run_with_adamw_follows_the_one_in_place(way, start):
    folded, in_place = both(WAYS[way], start, eps=1e-4, weight_decay=0.1)
    assert_follows(folded.model, in_place.model)


@each_start
def test_a_penalty_on_the_gradients_of_the_factors_is_refused_or_follows(start):
    """The second derivative has a part that is 1 + update_ratio times as large and a part that is not."""

    def train(run):
        for ids in batches(6):
            with sdpa_kernel(SDPBackend.MATH):
                loss = loss_of(run.model, ids)
            grads = torch.autograd.grad(loss, run.factors(), create_graph=True)
            (loss + 0.1 * sum(grad.square().sum() for grad in grads)).backward()
            run.step()

    with contextlib.suppress(RuntimeError, ValueError):
        folded, in_place = both(train, start, inner=torch.optim.SGD, lr=0.05)
        assert_follows(folded.model, in_place.model)


@each_start
def test_the_ratio_is_in_the_branch_and_w_is_written_at_k_alone(start):
    run = Run("folded", start)
    begin = STARTS[start]["start_step"]
    W0, written = weights(run.model), []
    for i, ids in enumerate(batches(6)):
        assert scalings(run.model) == {FIRST_SCALING if i <= begin else FIRST_SCALING * (1 + RATIO)}
        before = weights(run.model)
        run.train([ids])
        written.append(not same(weights(run.model), before))
    assert written == [start == "later" and i == begin for i in range(6)]
    assert same(weights(run.model), W0) == (start == "zero")


def test_the_comparison_would_see_undivided_gradients():
    runs = [Run(mode, inner=torch.optim.SGD, lr=0.05) for mode in MODES]
    for run in runs:
        run.train(batches(1))
    for p in runs[0].factors():
        p._backward_hooks.clear()
    for run in runs:
        run.train(batches(4))
    with pytest.raises(AssertionError):
        assert_follows(runs[0].model, runs[1].model, 1e-3)


@each_start
def test_two_hundred_steps_in_float32(start):
    """An eps for which the runs are not chaotic: with a small one a float32 run leaves the float64 one just as fast."""

    def train(run):
        run.train(batches(5) * 40)

    folded, in_place = both(train, start, torch.float32, lr=1e-3, eps=1e-2)
    assert folded.optimizer.step_count == 200
    assert_follows(folded.model, in_place.model, 1e-4)


# GradScaler, autocast, torch.compile


@each_start
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_with_steps_that_are_left_out(start, unscale):
    """At K, right after it and later; a step that is left out folds nothing."""
    begin = STARTS[start]["start_step"]

    def train(run):
        scaler, kept = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2), 0
        scales = []
        for i, ids in enumerate(batches(10)):
            factor = float("inf") if i in (begin, begin + 2, begin + 5) else 1.0
            before = bits(run.model), scalings(run.model)
            scaler.scale(loss_of(run.model, ids) * factor).backward()
            if unscale:
                scaler.unscale_(run.optimizer)
                nn.utils.clip_grad_norm_(run.factors(), 0.05)
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
            kept += factor == 1.0
            assert run.optimizer.step_count == kept
            assert (factor == 1.0) or same((bits(run.model), scalings(run.model)), before)
            scales.append(scaler.get_scale())
        return scales

    folded, in_place = both(train, start, inner=torch.optim.SGD, lr=0.05)
    assert_follows(folded.model, in_place.model)


@each_start
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str)
def test_autocast(dtype, tolerance, start):
    """The scaling is rounded in another place, so the runs are as far apart as each is from float32."""

    def train(run):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype is torch.float16)
        for ids in batches(2) * 10:
            with torch.autocast("cpu", dtype):
                loss = loss_of(run.model, ids)
            scaler.scale(loss).backward()
            assert all(bool(p.grad.isfinite().all()) for p in run.factors())
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()

    first = Run("folded", start, torch.float32)
    folded, in_place = both(train, start, torch.float32, inner=torch.optim.SGD, lr=0.01)
    for p, q, before in zip(folded.factors(), in_place.factors(), first.factors(), strict=True):
        assert relative(p - before, q - before) < tolerance
    assert scalings(folded.model) == {FIRST_SCALING * (1 + RATIO)}


class Small(nn.Module):
    """Two linear layers, to be given adapters and compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def small(start: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    model = peft.get_peft_model(Small(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"])).to(dtype)
    if start == "later":
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.normal_().mul_(0.3)
    return model


@each_start
@pytest.mark.parametrize("whole_graph", [False, True])
def test_a_compiled_model_sees_the_new_scaling(start, whole_graph):
    """The scaling is a number in the compiled graph, which a guard watches."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(8, 4, 6, generator=generator, dtype=torch.float64)
    results = []
    for mode in MODES:
        torch.compiler.reset()
        model = small(start)
        optimizer = DeltaLoRAOptimizer.for_model(
            model,
            torch.optim.SGD,
            lr=0.1,
            update_ratio=RATIO,
            start_step=STARTS[start]["start_step"],
            weight_update=mode,
        )
        compiled = torch.compile(model, backend="aot_eager", fullgraph=whole_graph)
        for x in data:
            optimizer.zero_grad()
            compiled(x).square().mean().backward()
            optimizer.step()
        assert relative(compiled(data[0]), model(data[0])) <= EXACT
        results.append([*(p for p in model.parameters() if p.requires_grad), model(data[0]), compiled(data[0])])
    for p, q in zip(*results, strict=True):
        assert relative(p, q) <= EXACT


# Accelerate, Trainer, Lightning


@each_start
def test_accelerate_with_accumulation_and_clipping(start, accelerator_of):
    runs = []
    for mode in MODES:
        accelerator, run = accelerator_of(gradient_accumulation_steps=2), Run(mode, start)
        model, optimizer = accelerator.prepare(run.model, run.optimizer)
        for ids in batches(14):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, ids))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
        assert run.optimizer.step_count == 7
        runs.append(run)
        accelerator.free_memory()
    assert_follows(runs[0].model, runs[1].model)


@each_start
@pytest.mark.parametrize("stop", [2, 5])
def test_accelerate_saves_and_resumes(start, stop, accelerator_of, tmp_path):
    """From before K, where the branch of a fresh model fits, and from after it, where it does not."""
    data, accelerator = batches(8), accelerator_of()

    def prepared():
        run = Run("folded", start)
        return run, accelerator.prepare(run.model, run.optimizer)

    run, objects = prepared()
    plain_loop(*objects, data[:stop])
    accelerator.save_state(tmp_path)
    plain_loop(*objects, data[stop:])
    in_place = Run("in_place", start)
    in_place.train(data)
    assert_follows(run.model, in_place.model)

    accelerator.free_memory()
    other, objects = prepared()
    accelerator.load_state(tmp_path)
    assert other.optimizer.step_count == stop
    plain_loop(*objects, data[stop:])
    assert same(bits(other.model), bits(run.model))
    assert scalings(other.model) == scalings(run.model)

    accelerator.load_state(tmp_path)  # the same objects go back, maybe to before K
    plain_loop(*objects, data[stop:])
    assert same(bits(other.model), bits(run.model))


class Factory:
    """No Optimizer class, hence called as `Factory()(model, **options)`, with the adapters loaded already."""

    def __call__(self, model: nn.Module, **options) -> DeltaLoRAOptimizer:
        return DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, **options)


ROUTES = {
    "optimizers": lambda model, **options: {"optimizers": (optimizer_for(model, **options), None)},
    "factory": lambda model, **options: {
        "optimizer_cls_and_kwargs": (Factory, {"lr": 1e-2, "update_ratio": RATIO, **options})
    },
}
each_route = pytest.mark.parametrize("route", ROUTES)


@pytest.fixture
def trainer_of(monkeypatch, accelerator_of, tmp_path):
    """Trainers of test_resume, in a mode."""

    def build(name: str, mode: str, start: str, route: str, **options):
        settings = {**STARTS[start], "weight_update": mode}
        model = causal_lm(B_zero=settings.pop("B_zero"))
        monkeypatch.setitem(test_resume.ROUTES, "built", lambda model: ROUTES[route](model, **settings))
        return trainer_for(model, tmp_path / name, "built", **options)[0]

    return build


@each_start
@each_route
def test_trainer_follows_and_resumes(route, start, trainer_of, tmp_path):
    """From either side of K; the checkpoints hold the adapter alone."""

    def ran(name, mode="folded", resume_from=None):
        trainer = trainer_of(name, mode, start, route)
        trainer.train(resume_from_checkpoint=resume_from)
        assert trainer.optimizer.optimizer.step_count == 8
        return trainer.model

    whole, in_place = ran("whole"), ran("in_place", "in_place")
    assert_follows(whole, in_place)
    for step in (3, 6):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert not (checkpoint / "model.safetensors").exists()
        assert_follows(ran(f"from-{step}", resume_from=str(checkpoint)), in_place)


def test_a_checkpoint_of_a_trainer_is_a_plain_adapter_for_the_base(trainer_of, tmp_path):
    """Its config has the larger alpha, PEFT alone loads it, and no save warns: a warning would be an error."""
    trainer = trainer_of("run", "folded", "zero", "optimizers", save_only_model=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    ids = batches(1, seed=9)[0]
    for folder in (tmp_path / "run" / "checkpoint-8", tmp_path / "final"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["lora_alpha"] == pytest.approx(6 * (1 + RATIO), rel=1e-12)
        assert config["alpha_pattern"] == {}
        base = causal_lm(B_zero=True).unload()
        loaded = peft.PeftModel.from_pretrained(base, folder).double()
        assert scalings(loaded) == scalings(trainer.model)
        assert relative(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits) <= EXACT


def test_a_trainer_warns_where_the_product_at_k_was_taken_from_w(trainer_of, tmp_path):
    trainer = trainer_of("run", "folded", "later", "optimizers")
    trainer.train()
    with pytest.warns(UserWarning, match="save_pretrained writes the adapter alone"):
        trainer.save_model(str(tmp_path / "final"))


@each_route
def test_load_best_model_at_end_needs_no_resync(route, trainer_of):
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = trainer_of(
        "run", "folded", "zero", route, load_best_model_at_end=True, metric_for_best_model="score", **every_step
    )
    watch = test_resume.Watch()
    trainer.compute_metrics = lambda predictions: {"score": -abs(trainer.state.global_step - 5)}
    trainer.add_callback(watch)
    trainer.train()
    assert trainer.state.best_global_step == 5
    expected, last = watch.effective[5], watch.effective[8]
    now = effective(trainer.model)
    assert all(relative(W, expected[name]) <= EXACT for name, W in now.items())
    assert all(relative(W, last[name]) > 1000 * EXACT for name, W in now.items())
    trainer.optimizer.optimizer.resync()
    assert same(effective(trainer.model), now)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*is lower than the logging interval.*")
@pytest.mark.parametrize("adapter_only", [False, True])
def test_lightning_follows_and_resumes(adapter_only, tmp_path):
    pytest.importorskip("lightning", reason="runs where lightning is installed")
    from tests.integrations.test_lightning import Module, fit

    class InMode(Module):
        def __init__(self, mode):
            super().__init__(torch.float64, adapter_only)
            self.mode = mode

        def configure_optimizers(self):
            return optimizer_for(self.model, start_step=1, weight_update=self.mode)

    folded, in_place, half, resumed = (InMode(mode) for mode in ("folded", "in_place", "folded", "folded"))
    for module in (folded, in_place):
        fit(module, tmp_path, 6)
    assert_follows(folded.model, in_place.model)
    fit(half, tmp_path, 3).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path, 6, tmp_path / "half.ckpt")
    assert_follows(resumed.model, in_place.model)


@each_start
@pytest.mark.parametrize("stop", [2, 5])
def test_a_distributed_checkpoint_round_trip(start, stop):
    data, run = batches(8), Run("folded", start)
    run.train(data[:stop])
    run.optimizer.zero_grad()
    model_state = copy.deepcopy(dcp.get_model_state_dict(run.model))
    state = copy.deepcopy(dcp.get_optimizer_state_dict(run.model, run.optimizer))
    run.train(data[stop:])
    other = Run("folded", start)
    dcp.set_model_state_dict(other.model, model_state)
    dcp.set_optimizer_state_dict(other.model, other.optimizer, state)
    assert other.optimizer.step_count == stop
    other.train(data[stop:])
    assert same(bits(other.model), bits(run.model))
    assert scalings(other.model) == scalings(run.model)


@each_start
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, start):
    def train(run):
        scheduler, lrs = SCHEDULERS[name](run.optimizer), []
        for ids in batches(6):
            run.train([ids])
            scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])
            lrs.append(run.optimizer.inner.param_groups[0]["lr"])
        return lrs

    folded, in_place = both(train, start, inner=torch.optim.SGD, lr=0.05, momentum=0.9)
    assert_follows(folded.model, in_place.model)


def test_a_schedule_that_reaches_zero_stops_the_effective_weights():
    run = Run("folded")
    scheduler = lr_scheduler.LambdaLR(run.optimizer, lambda step: float(step < 2))
    ends = []
    for ids in batches(4):
        run.train([ids])
        scheduler.step()
        ends.append(effective(run.model))
    assert not same(ends[0], ends[1])
    assert same(ends[1], ends[3])


# several processes


WORLD = 2


def _worker(rank: int, init: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=WORLD)
    _data_parallel_equals_one_process_on_the_whole_batch(rank)
    for mode in MODES:
        _factors_that_are_sharded_too_late_are_refused(mode)
    _sharded_factors_are_refused_in_place()
    _a_product_that_is_not_zero_is_refused_beside_sharded_weights()
    for way in SHARDED:
        _sharded_factors_follow(rank, way)
    _a_sharded_factor_that_was_replaced_is_followed(rank)
    _whole_parameters_that_were_kept_are_told_from_replaced_ones(rank)
    _a_conversion_that_would_lose_the_hooks_is_refused()
    for start in STARTS:
        _factors_that_stay_whole_beside_sharded_weights(rank, start)
    dist.destroy_process_group()


def test_data_parallel_and_fully_sharded_models(tmp_path):
    """In processes of their own, started once: what each function that begins with an underscore says."""
    torch.multiprocessing.spawn(_worker, (str(tmp_path / "init"),), nprocs=WORLD)


def shares(data: list[Tensor], rank: int) -> list[Tensor]:
    return [ids.chunk(WORLD)[rank] for ids in data]


def assert_same_on_all_ranks(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        first = p.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, p), name


def _data_parallel_equals_one_process_on_the_whole_batch(rank: int) -> None:
    for start in STARTS:
        for wrapped_first, options in ((False, {}), (True, {"gradient_as_bucket_view": True})):
            run, alone = Run("folded", start), Run("in_place", start)
            ddp = DistributedDataParallel(run.model, **options)
            if wrapped_first:
                run.optimizer = optimizer_for(run.model, weight_update="folded", start_step=STARTS[start]["start_step"])
            data = batches(14)
            for i, ids in enumerate(shares(data, rank)):
                with contextlib.nullcontext() if i % 2 else ddp.no_sync():
                    (loss_of(ddp, ids) / 2).backward()
                if i % 2:
                    nn.utils.clip_grad_norm_(run.factors(), 0.05)
                    run.optimizer.step()
                    run.optimizer.zero_grad(set_to_none=not options)
            for i, ids in enumerate(data):
                alone.backward(ids, 0.5)
                if i % 2:
                    nn.utils.clip_grad_norm_(alone.factors(), 0.05)
                    alone.step()
            assert_follows(run.model, alone.model)
            assert_same_on_all_ranks(run.model)
            assert scalings(run.model) == {FIRST_SCALING * (1 + RATIO)}


def shard(model: nn.Module, parts: Callable[[nn.Module], Iterable[nn.Module]] | None = None, **options) -> None:
    for part in model.base_model.model.model.layers if parts is None else list(parts(model)):
        fully_shard(part, **options)
    fully_shard(model, **options)


def linears(model: nn.Module) -> list[nn.Module]:
    """Parts of the layers too, the factors among them."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def factors_of_one_layer(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if re.search(r"layers\.1\..*down_proj\.lora_.\.", name)]


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def _factors_that_are_sharded_too_late_are_refused(mode: str) -> None:
    run = Run(mode, "later", start_step=0)
    shard(run.model)
    before = whole(run.model)
    loss_of(run.model, batches(1)[0]).backward()
    message = "q_proj: A is not among the parameters" if mode == "folded" else "q_proj: W is a .*DTensor"
    with pytest.raises(ValueError, match=message):
        run.optimizer.step()
    assert same(whole(run.model), before)
    assert scalings(run.model) == {FIRST_SCALING}


def _sharded_factors_are_refused_in_place() -> None:
    run = Run("in_place")
    shard(run.model)
    with pytest.raises(
        ValueError, match=r"q_proj: W is a torch.distributed.tensor.DTensor.*Take weight_update=.folded"
    ):
        optimizer_for(run.model)
    layer = next(iter(layers(run.model).values()))
    W, A, B = layer.base_layer.weight, layer.lora_B["default"].weight, layer.lora_A["default"].weight
    triple = LoRATriple(W, A, B, scaling=torch.tensor(1.0), name="q")
    with pytest.raises(ValueError, match=r"q: A is sharded and was registered as a tensor.*register \(module, 'A'\)"):
        DeltaLoRAOptimizer(torch.optim.SGD, [triple], weight_update="folded")


def _a_product_that_is_not_zero_is_refused_beside_sharded_weights() -> None:
    run = Run("folded", "later", start_step=0)
    shard(run.model)
    optimizer = optimizer_for(run.model, weight_update="folded")
    before = whole(run.model)
    loss_of(run.model, batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match=r"the product A @ B is not zero at start_step.*\n.*is a .*DTensor"):
        optimizer.step()
    assert same(whole(run.model), before)
    assert scalings(run.model) == {FIRST_SCALING}


def _a_sharded_factor_that_was_replaced_is_followed(rank: int) -> None:
    """FSDP2 keeps its unsharded parameter, with the hook of the first one, when ``assign=True`` replaces the shards."""
    run = Run("folded")
    shard(run.model)
    run.optimizer = optimizer_for(run.model, weight_update="folded")
    data = batches(2)
    run.train(shares(data, rank))
    del run.optimizer
    gc.collect()
    trained = {id(p) for p in run.factors()}
    names = [name for name, p in run.model.named_parameters() if id(p) in trained]
    run.model.load_state_dict({name: p.clone() for name, p in run.model.state_dict().items()}, assign=True)
    for name, p in run.model.named_parameters():
        p.requires_grad_(name in names)
        if "lora_B" in name:
            nn.init.zeros_(p)
    run.optimizer = optimizer_for(run.model, torch.optim.SGD, weight_update="folded", lr=0.0)
    run.backward(shares(data, rank)[0])
    run.optimizer.step()
    whole_ones = [p.grad.full_tensor() for p in run.factors()]
    run.optimizer.zero_grad()
    run.backward(shares(data, rank)[0])
    for p, before in zip(run.factors(), whole_ones, strict=True):
        # With a product of zero the branch is as it was, but for its scaling, by which the gradient is divided.
        torch.testing.assert_close(p.grad.full_tensor(), before)


SHARDED: dict[str, dict] = {
    "plain": {},
    "not resharded after forward": {"reshard_after_forward": False},
    "checkpointing": {},
    "reentrant checkpointing": {},
    "accumulation": {},
    "every linear layer by itself": {"parts": linears},
    "the factors of one layer by themselves": {"parts": factors_of_one_layer},
    "one piece": {"parts": lambda model: []},
}


def _sharded_factors_follow(rank: int, way: str) -> None:
    """FSDP2 brings gradients to the shards past the hooks of the sharded parameters."""

    def new() -> Run:
        run = Run("folded")
        if "checkpointing" in way:
            run.model.enable_input_require_grads()
            run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": "reent" in way})
            run.model.train()
        shard(run.model, **SHARDED[way])
        run.optimizer = optimizer_for(run.model, torch.optim.SGD, weight_update="folded", momentum=0.9, lr=0.05)
        return run

    micro = 2 if way == "accumulation" else 1

    def train(run: Run, data: list[Tensor]) -> None:
        for i, ids in enumerate(data):
            last = i % micro == micro - 1
            if isinstance(run.factors()[0], dist.tensor.DTensor):
                run.model.set_requires_gradient_sync(last)
                ids = ids.chunk(WORLD)[rank]
            run.backward(ids, 1 / micro)
            if last:
                nn.utils.clip_grad_norm_(run.factors(), 0.05)
                run.step()

    run, alone = new(), Run("in_place")
    alone.optimizer = optimizer_for(alone.model, torch.optim.SGD, momentum=0.9, lr=0.05)
    train(run, batches(4))
    state, trained = copy.deepcopy(run.optimizer.state_dict()), whole(run.model)
    twin = new()
    with torch.no_grad():
        for name, p in twin.model.named_parameters():
            p.copy_(dist.tensor.distribute_tensor(trained[name], p.device_mesh, p.placements))
    twin.optimizer.load_state_dict(state)
    for each in (run, twin):
        train(each, batches(4, seed=2))
    train(alone, batches(4) + batches(4, seed=2))
    for sharded, resumed, p in zip(run.factors(), twin.factors(), alone.factors(), strict=True):
        assert relative(sharded.full_tensor(), p) <= EXACT, way
        assert torch.equal(sharded.full_tensor(), resumed.full_tensor()), way
    assert scalings(run.model) == scalings(twin.model) == {FIRST_SCALING * (1 + RATIO)}
    name = run.optimizer.triples[0].label
    moved = [r.optimizer.displacement(name).product() for r in (run, alone)]
    assert relative(*moved) <= EXACT


def _whole_parameters_that_were_kept_are_told_from_replaced_ones(rank: int) -> None:
    """The outermost module of FSDP2 keeps them after a forward pass, and a backward pass is not to come."""
    run, twin = Run("folded"), Run("folded")
    for r in (run, twin):
        shard(r.model, lambda model: [])
        r.optimizer = optimizer_for(r.model, torch.optim.SGD, weight_update="folded", lr=0.05)
        r.train(shares(batches(2), rank))
    with torch.no_grad():
        loss_of(run.model, batches(1)[0])
    with pytest.raises(ValueError, match=r"(?s)q_proj: A is not among.*are shards of FSDP2.*model\.reshard\(\) first"):
        run.optimizer.state_dict()
    run.optimizer.zero_grad()
    run.model.reshard()
    run.optimizer.state_dict()
    for r in (run, twin):
        r.train(shares(batches(2), rank))
    assert same(whole(run.model), whole(twin.model))


def _a_conversion_that_would_lose_the_hooks_is_refused() -> None:
    """FSDP2 exchanges the inside of its parameters; torch refuses that while something refers to them weakly."""
    run = Run("folded")
    shard(run.model)
    run.optimizer = optimizer_for(run.model, weight_update="folded")
    with pytest.raises(RuntimeError, match="Couldn't swap"):
        run.model.float()


def _factors_that_stay_whole_beside_sharded_weights(rank: int, start: str) -> None:
    run = Run("folded", start)
    shard(run.model, ignored_params=set(run.factors()))
    sharded = [layer.base_layer.weight for layer in layers(run.model).values()]
    assert all(isinstance(W, dist.tensor.DTensor) for W in sharded)
    run.optimizer = optimizer_for(run.model, weight_update="folded", start_step=STARTS[start]["start_step"])

    def train(data):
        for ids in shares(data, rank):
            run.backward(ids)
            for p in run.factors():
                dist.all_reduce(p.grad)
                p.grad /= WORLD
            nn.utils.clip_grad_norm_(run.factors(), 0.05)
            run.step()

    if start == "later":
        train(batches(K))
        before = [p.detach().clone() for p in run.factors()]
        with pytest.raises(RuntimeError, match=r"the product A @ B is not zero at start_step.*\n.*is a .*DTensor"):
            train(batches(1))
        assert same([p.detach() for p in run.factors()], before)
        assert scalings(run.model) == {FIRST_SCALING}
        return
    alone = Run("in_place", start)
    train(batches(8))
    for ids in batches(8):
        alone.backward(ids)
        nn.utils.clip_grad_norm_(alone.factors(), 0.05)
        alone.step()
    for p, q in zip(run.factors(), alone.factors(), strict=True):
        assert relative(p, q) <= EXACT
    assert scalings(run.model) == {FIRST_SCALING * (1 + RATIO)}
    assert run.optimizer.state_dict()["state"].keys() == alone.optimizer.state_dict()["state"].keys()


# closures, sparse gradients, averages, copies


class Twice(torch.optim.SGD):
    """Evaluates the loss twice within a step."""

    def step(self, closure):
        closure()
        return super().step(closure)


@each_start
def test_a_second_closure_call_in_one_step_is_refused_once_folded(start):
    run = Run("folded", start, inner=Twice, lr=0.05)

    def closure():
        run.optimizer.zero_grad()
        loss = loss_of(run.model, batches(1)[0])
        loss.backward()
        return loss

    for _ in range(STARTS[start]["start_step"]):
        run.optimizer.step(closure)
    with pytest.raises(RuntimeError, match=r'closure a second time within a step.*weight_update="in_place"'):
        run.optimizer.step(closure)


def test_lbfgs_is_refused():
    with pytest.raises(ValueError, match=r'LBFGS evaluates the loss several times.*weight_update="in_place"'):
        Run("folded", inner=torch.optim.LBFGS)


class Rows(nn.Module):
    """Rows of a table and of A, whose gradient is sparse."""

    def __init__(self, zero: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.base = nn.Embedding(12, 4, dtype=torch.float64).requires_grad_(False)
        self.A = nn.Embedding(12, 2, sparse=True, dtype=torch.float64)
        self.B = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))
        self.scaling = 0.5
        if zero:
            nn.init.zeros_(self.A.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.base(ids) + self.scaling * self.A(ids) @ self.B

    def triple(self) -> LoRATriple:
        return LoRATriple((self.base, "weight"), (self.A, "weight"), (self, "B"), scaling=(self, "scaling"), name="t")


class SparseAndDense(torch.optim.Optimizer):
    """SparseAdam for the first parameter and SGD for the second."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})
        A, B = self.param_groups[0]["params"]
        self.parts = torch.optim.SparseAdam([A], lr=lr), torch.optim.SGD([B], lr=lr)

    def step(self, closure=None):
        for part in self.parts:
            part.step()


@each_start
@pytest.mark.parametrize("inner", [torch.optim.SGD, SparseAndDense])
def test_sparse_gradients(inner, start):
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, 12, (8, 5), generator=generator)
    ends = []
    for mode in MODES:
        model = Rows(zero=start == "zero")
        W0 = model.base.weight.clone()
        optimizer = DeltaLoRAOptimizer(
            inner,
            [model.triple()],
            lr=0.1,
            update_ratio=RATIO,
            start_step=STARTS[start]["start_step"],
            weight_update=mode,
        )
        for ids in data:
            optimizer.zero_grad()
            (model(ids) - 1).square().mean().backward()
            assert model.A.weight.grad.is_sparse
            optimizer.step()
        assert model.scaling == (0.5 * (1 + RATIO) if mode == "folded" else 0.5)
        assert torch.equal(model.base.weight, W0) == (mode == "folded" and start == "zero")
        ends.append((model.A.weight, model.B, model(torch.arange(12))))
    for p, q in zip(*ends, strict=True):
        assert relative(p, q) <= EXACT


def test_a_copy_with_sparse_gradients_goes_on():
    model = Rows(zero=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [model.triple()], lr=0.1, weight_update="folded")
    ids = torch.arange(5)

    def train(model, optimizer):
        optimizer.zero_grad()
        (model(ids) - 1).square().mean().backward()
        optimizer.step()

    train(model, optimizer)
    train(model, optimizer)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer)
    train(other, other_optimizer)
    assert same(bits(other), bits(model))


def test_a_gradient_of_a_copy_that_was_made_undivided_is_refused_though_sparse():
    """Before the copy of the optimizer has seen the copied factor."""
    model = Rows(zero=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [model.triple()], lr=0.1, weight_update="folded")
    for _ in range(2):
        optimizer.zero_grad()
        (model(torch.arange(5)) - 1).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    model.A.weight = nn.Parameter(model.A.weight.detach().clone())
    optimizer.param_groups[0]["params"][0] = model.A.weight
    (model(torch.arange(5)) - 1).square().mean().backward()
    with pytest.raises(RuntimeError, match="too large"):
        optimizer.step()


@each_start
@pytest.mark.parametrize("built_at", ["start", "after_k"])
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_an_average_of_the_factors(kind, built_at, start):
    """Whenever the averaged model is made, A and B are averaged as in place."""

    def train(run):
        options = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.6)} if kind == "ema" else {}
        if built_at == "start":
            run.average = swa_utils.AveragedModel(run.model, **options)
        run.train(batches(K + 1))
        if built_at == "after_k":
            run.average = swa_utils.AveragedModel(run.model, **options)
        for ids in batches(4, seed=2):
            run.train([ids])
            run.average.update_parameters(run.model)

    folded, in_place = both(train, start)
    assert_follows(folded.model, in_place.model)
    for p, q in zip(folded.average.module.parameters(), in_place.average.module.parameters(), strict=True):
        if p.requires_grad:
            assert relative(p, q) <= EXACT


@each_start
def test_an_average_of_the_last_model_alone_is_that_model(start):
    """Made after step K: an earlier copy has the scaling of then, as docs/folded.md says."""
    run, ids = Run("folded", start), batches(1, seed=9)[0]
    run.train(batches(K + 1))
    averaged = swa_utils.AveragedModel(run.model, avg_fn=lambda average, now, count: now)
    run.train(batches(2, seed=2))
    averaged.update_parameters(run.model)
    assert relative(averaged(input_ids=ids).logits, run.model(input_ids=ids).logits) <= EXACT


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda objects: pickle.loads(pickle.dumps(objects))}
each_copy = pytest.mark.parametrize("way", COPIES)


@each_start
@each_copy
@pytest.mark.parametrize("stop", [0, 2, 5])
def test_a_copy_of_the_model_and_the_optimizer_goes_on_bit_for_bit(way, stop, start):
    """And the two have nothing in common."""
    data, run = batches(8), Run("folded", start)
    run.train(data[:stop])
    other = COPIES[way](run)
    middle = copy.deepcopy((bits(run.model), scalings(run.model)))
    other.train(data[stop:])
    assert same((bits(run.model), scalings(run.model)), middle)
    run.train(data[stop:])
    assert same(bits(other.model), bits(run.model))
    assert scalings(other.model) == scalings(run.model) == {FIRST_SCALING * (1 + RATIO)}
    assert same(other.optimizer.state_dict(), run.optimizer.state_dict())


@each_copy
def test_a_copy_whose_original_is_gone_still_divides(way):
    data, run, whole = batches(8), Run("folded"), Run("folded")
    run.train(data[:5])
    run = COPIES[way](run)
    run.train(data[5:])
    whole.train(data)
    assert same(bits(run.model), bits(whole.model))


@each_copy
def test_a_copy_goes_on_where_the_loop_zeroes_the_model(way):
    """`model.zero_grad()` and a `backward` before the copied optimizer is called for the first time."""
    data, run, whole = batches(8), Run("folded", inner=torch.optim.SGD), Run("folded", inner=torch.optim.SGD)
    run.train(data[:5])
    run = COPIES[way](run)
    for ids in data[5:]:
        run.model.zero_grad()
        run.backward(ids)
        run.optimizer.step()
    whole.train(data)
    assert same(bits(run.model), bits(whole.model))


@each_start
@each_copy
def test_a_copy_of_the_optimizer_alone_goes_on_with_the_same_gradients(way, start):
    """Its triples are copies, with layers of their own."""
    data, run = batches(8), Run("folded", start)
    run.train(data[:5])
    other = COPIES[way](run.optimizer)
    for ids in data[5:]:
        run.backward(ids)
        for triple, twin in zip(run.optimizer.triples, other.triples, strict=True):
            twin.A.grad, twin.B.grad = triple.A.grad.clone(), triple.B.grad.clone()
        run.step()
        other.step()
        other.zero_grad()
    for triple, twin in zip(run.optimizer.triples, other.triples, strict=True):
        assert all(map(torch.equal, triple.stored(), twin.stored()))
        assert all(a is not b for a, b in zip(triple.stored(), twin.stored(), strict=True))
        assert twin.layer.scaling == triple.layer.scaling
        (twin.A.sum() + twin.B.sum()).backward()  # divided, in the copy too
        for factor in (twin.A, twin.B):
            torch.testing.assert_close(factor.grad, torch.ones_like(factor) / (1 + RATIO))


@each_copy
def test_triples_of_plain_tensors_are_copied_without_a_warning(way):
    torch.manual_seed(0)
    W, A, B = torch.randn(4, 6), torch.zeros(4, 2).requires_grad_(), torch.randn(2, 6).requires_grad_()
    scaling = torch.tensor(1.0)
    triple = LoRATriple(W, A, B, scaling=scaling, name="t")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update="folded")
    x = torch.randn(3, 6)

    def train(optimizer, scaling):
        (t,) = optimizer.triples
        optimizer.zero_grad()
        (x @ t.W.mT + scaling * x @ (t.A @ t.B).mT - 1).square().mean().backward()
        optimizer.step()
        return t

    for _ in range(3):
        train(optimizer, scaling)
    other, other_scaling = COPIES[way]((optimizer, scaling))
    original, twin = train(optimizer, scaling), train(other, other_scaling)
    assert float(other_scaling) == 3.0
    assert all(map(torch.equal, original.stored(), twin.stored()))


def test_factors_are_saved_without_a_warning(tmp_path):
    """torch.save warns of tensors with hooks, unless these say that they need not be saved."""
    A = torch.zeros(4, 2).requires_grad_()
    triple = LoRATriple(torch.randn(4, 6), A, torch.randn(2, 6).requires_grad_(), scaling=torch.tensor(1.0))
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update="folded")
    torch.save(A, tmp_path / "A.pt")
    assert torch.equal(torch.load(tmp_path / "A.pt", weights_only=True), A)
    assert optimizer.step_count == 0


@pytest.mark.parametrize("registered", ["before", "after"])
def test_a_hook_of_the_users_sees_the_divided_gradient(registered):
    """One that clips must clip what it would clip in place, whichever hook came first."""

    def clip(model):
        for p in model.parameters():
            if p.requires_grad:
                p.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))

    runs = []
    for mode in MODES:
        model = causal_lm(B_zero=True)
        if registered == "before":
            clip(model)
        optimizer = optimizer_for(model, torch.optim.SGD, lr=0.05, weight_update=mode)
        if registered == "after":
            clip(model)
        plain_loop(model, optimizer, batches(8))
        runs.append(model)
    assert_follows(*runs)


@each_start
def test_an_optimizer_in_place_that_is_built_later_gets_whole_gradients(start):
    """Though the folded one is still there: its factors are taken over, with the scaling that the branch has now."""
    run = Run("folded", start, inner=torch.optim.SGD, lr=0.05)
    run.train(batches(K + 1))
    run.optimizer.zero_grad()
    loss_of(run.model, batches(1)[0]).backward()
    divided = [p.grad.clone() for p in run.factors()]
    with pytest.warns(UserWarning, match=r"an earlier optimizer .*q_proj \(2, now 3\.4\)"):
        later = optimizer_for(run.model, torch.optim.SGD, lr=0.05, weight_update="in_place")
    later.zero_grad()
    loss_of(run.model, batches(1)[0]).backward()
    for p, grad in zip(run.factors(), divided, strict=True):
        assert relative(p.grad, (1 + RATIO) * grad) <= EXACT


def test_an_optimizer_that_could_not_be_built_leaves_the_gradients_of_the_first_one_alone():
    run, whole = Run("folded"), Run("folded")
    data = batches(6)
    for r in (run, whole):
        r.train(data[:3])
        r.optimizer.zero_grad()
        if r is run:
            with pytest.raises(ValueError, match="keep_base is one of"):
                optimizer_for(run.model, weight_update="folded", keep_base="nowhere")
        r.backward(data[3])
        r.step()
        r.train(data[4:])
    assert same(bits(run.model), bits(whole.model))


def test_triples_of_tensors_that_the_model_has_replaced_are_not_folded():
    """As fully_shard and assign=True replace them: nothing would train, and the branch of the others be scaled."""
    model = Rows(zero=False)
    triple = LoRATriple(model.base.weight, model.A.weight, model.B, scaling=(model, "scaling"), name="t")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update="folded")
    ids = torch.arange(12)
    for module, name in ((model.base, "weight"), (model.A, "weight"), (model, "B")):
        p = getattr(module, name)
        setattr(module, name, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))
    before = model(ids)
    before.square().mean().backward()
    with contextlib.suppress(RuntimeError, ValueError):
        optimizer.step()
    assert torch.equal(model(ids), before)
