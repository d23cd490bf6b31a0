"""The folded rule in other people's training loops: the factors and outputs of W moved in place."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import swa_utils

from deltaopt import DeltaLoRAOptimizer
from tests.support.compare import COPIES, bits, refused, relative, same
from tests.support.models import RATIO, batches, causal_lm, loss_of, optimizer_for, peft, plain_loop, weights
from tests.support.peft_runs import (
    EXACT,
    FIRST_SCALING,
    STARTS,
    K,
    ModelRun,
    assert_models_follow,
    both_rules,
    branch_scalings,
    each_start,
    peft_asks_by_an_old_name,
)
from tests.support.strategies import RULES

pytestmark = [
    peft_asks_by_an_old_name,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


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
        with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
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
    folded, in_place = both_rules(WAYS[way], start, inner=torch.optim.SGD, lr=0.05, momentum=0.9)
    assert_models_follow(folded.model, in_place.model, 1e-5 if way == "cast" else EXACT)


@each_start
@pytest.mark.parametrize("way", ["plain", "accumulation_and_clipping"])
def test_a_folded_run_with_adamw_follows_the_one_in_place(way, start):
    folded, in_place = both_rules(WAYS[way], start, eps=1e-4, weight_decay=0.1)
    assert_models_follow(folded.model, in_place.model)


@each_start
def test_a_penalty_on_the_gradients_of_the_factors_is_refused_from_step_k_on(start):
    """The second derivative has a part that is 1 + update_ratio times as large and a part that is not.

    Before step K nothing is divided, and the run follows the one in place.
    """

    def step(run, ids):
        with sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(run.model, ids)
        grads = torch.autograd.grad(loss, run.factors(), create_graph=True)
        (loss + 0.1 * sum(grad.square().sum() for grad in grads)).backward()
        run.step()

    data, begin = batches(K + 2), STARTS[start]["start_step"]
    runs = [ModelRun(rule, start, inner=torch.optim.SGD, lr=0.05) for rule in RULES]
    for run in runs:
        for ids in data[:begin]:
            step(run, ids)
    in_place, folded = runs
    assert same(bits(folded.model), bits(in_place.model))
    step(in_place, data[begin])
    folded.train(data[begin : begin + 1])  # the step that folds
    refused(
        lambda: step(folded, data[begin + 1]),
        RuntimeError,
        r"a second derivative through its gradient \(create_graph=True\) .*weight_update=\"in_place\"",
        lambda: [bits(folded.model), branch_scalings(folded.model)],
    )
    step(in_place, data[begin + 1])


@each_start
def test_the_ratio_is_in_the_branch_and_w_is_written_at_k_alone(start):
    run = ModelRun("folded", start)
    begin = STARTS[start]["start_step"]
    W0, written = weights(run.model), []
    for i, ids in enumerate(batches(6)):
        assert branch_scalings(run.model) == {FIRST_SCALING if i <= begin else FIRST_SCALING * (1 + RATIO)}
        before = weights(run.model)
        run.train([ids])
        written.append(not same(weights(run.model), before))
    assert written == [start == "later" and i == begin for i in range(6)]
    assert same(weights(run.model), W0) == (start == "zero")


def test_the_comparison_would_see_undivided_gradients():
    runs = [ModelRun(mode, inner=torch.optim.SGD, lr=0.05) for mode in RULES[::-1]]
    for run in runs:
        run.train(batches(1))
    for p in runs[0].factors():
        p._backward_hooks.clear()
    for run in runs:
        run.train(batches(4))
    with pytest.raises(AssertionError, match="lora_"):
        assert_models_follow(runs[0].model, runs[1].model, 1e-3)


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

    first = ModelRun("folded", start, torch.float32)
    folded, in_place = both_rules(train, start, torch.float32, inner=torch.optim.SGD, lr=0.01)
    for p, q, before in zip(folded.factors(), in_place.factors(), first.factors(), strict=True):
        assert relative(p - before, q - before) < tolerance
    assert branch_scalings(folded.model) == {FIRST_SCALING * (1 + RATIO)}


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
    for mode in RULES[::-1]:
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

    folded, in_place = both_rules(train, start)
    assert_models_follow(folded.model, in_place.model)
    for p, q in zip(folded.average.module.parameters(), in_place.average.module.parameters(), strict=True):
        if p.requires_grad:
            assert relative(p, q) <= EXACT


@each_start
def test_an_average_of_the_last_model_alone_is_that_model(start):
    """Made after step K: an earlier copy has the scaling of then, as docs/folded.md says."""
    run, ids = ModelRun("folded", start), batches(1, seed=9)[0]
    run.train(batches(K + 1))
    averaged = swa_utils.AveragedModel(run.model, avg_fn=lambda average, now, count: now)
    run.train(batches(2, seed=2))
    averaged.update_parameters(run.model)
    assert relative(averaged(input_ids=ids).logits, run.model(input_ids=ids).logits) <= EXACT


@pytest.mark.parametrize("registered", ["before", "after"])
def test_a_hook_of_the_users_sees_the_divided_gradient(registered):
    """One that clips must clip what it would clip in place, whichever hook came first."""

    def clip(model):
        for p in model.parameters():
            if p.requires_grad:
                p.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))

    runs = []
    for mode in RULES[::-1]:
        model = causal_lm(B_zero=True)
        if registered == "before":
            clip(model)
        optimizer = optimizer_for(model, torch.optim.SGD, lr=0.05, weight_update=mode)
        if registered == "after":
            clip(model)
        plain_loop(model, optimizer, batches(8))
        runs.append(model)
    assert_models_follow(*runs)


@pytest.mark.filterwarnings("ignore:the weights of 10 layers .* were moved by an earlier optimizer:UserWarning")
@each_start
def test_an_optimizer_in_place_that_is_built_later_gets_whole_gradients(start):
    """Though the folded one is still there: its factors are taken over, with the scaling that the branch has now."""
    run = ModelRun("folded", start, inner=torch.optim.SGD, lr=0.05)
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
    run, whole = ModelRun("folded"), ModelRun("folded")
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


each_copy = pytest.mark.parametrize("way", COPIES)


@each_copy
def test_a_copy_whose_original_is_gone_still_divides(way):
    data, run, whole = batches(8), ModelRun("folded"), ModelRun("folded")
    run.train(data[:5])
    run = COPIES[way](run)
    run.train(data[5:])
    whole.train(data)
    assert same(bits(run.model), bits(whole.model))


@each_copy
def test_a_copy_continues_where_the_loop_zeroes_the_model(way):
    """`model.zero_grad()` and a `backward` before the copied optimizer is called for the first time."""
    data, run, whole = batches(8), ModelRun("folded", inner=torch.optim.SGD), ModelRun("folded", inner=torch.optim.SGD)
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
def test_a_copy_of_the_optimizer_alone_continues_with_the_same_gradients(way, start):
    """Its triples are copies, with layers of their own."""
    data, run = batches(8), ModelRun("folded", start)
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
        assert all(map(torch.equal, triple.tensors(), twin.tensors()))
        assert all(a is not b for a, b in zip(triple.tensors(), twin.tensors(), strict=True))
        assert twin.layer.scaling == triple.layer.scaling
        (twin.A.sum() + twin.B.sum()).backward()  # divided, in the copy too
        for factor in (twin.A, twin.B):
            torch.testing.assert_close(factor.grad, torch.ones_like(factor) / (1 + RATIO))
