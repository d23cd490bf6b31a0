"""Delta-LoRA next to LoRA: the statements of docs/method.md."""

import pytest
import torch

from tests.support import strategies
from tests.support.folded import DEFAULT_RATIO
from tests.support.runs import LayerRun
from tests.support.strategies import RULES


def plain_lora(alpha, seed=0, inner=torch.optim.AdamW, steps=200, groups=None, clip=None, **options):
    """Plain LoRA with this scaling of the branch, and gradients clipped at this norm."""
    stored = strategies.make("linear", seed, zero_A=True)
    loss = strategies.Problem(stored.W.shape, seed + 1)
    params = groups(stored) if groups else [stored.A, stored.B]
    optimizer = inner(params, **options)
    for t in range(steps):
        optimizer.zero_grad()
        loss(stored.W + alpha * (stored.A @ stored.B), t).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([stored.A, stored.B], clip)
        optimizer.step()
    return (stored.W + alpha * (stored.A @ stored.B)).detach()


def delta_lora_run(rule="in_place", steps=200, **options):
    return LayerRun(rule, **options).train(steps).effective().detach()


def apart(now, expected):
    """Their distance, by the distance that training went."""
    W0 = strategies.make("linear", 0).W
    return float((now - expected).norm() / (expected - W0).norm())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("rule", RULES)
def test_with_adam_it_is_lora_with_a_larger_alpha(rule, weight_decay):
    """Adam divides the scale of gradients out (eps -> 0), with decoupled weight decay too; SGD does not."""
    options = {"lr": 0.02, "eps": 1e-30, "weight_decay": weight_decay}
    assert apart(delta_lora_run(rule, **options), plain_lora(0.5 * (1 + DEFAULT_RATIO), **options)) < 1e-9
    options = {"inner": torch.optim.SGD, "lr": 0.02}
    assert apart(delta_lora_run(rule, **options), plain_lora(1.5, **options)) > 1e-2


@pytest.mark.parametrize("rule", RULES)
def test_a_norm_that_is_clipped_now_and_then_tells_them_apart(rule):
    """The gradients of the larger alpha are 1 + lambda times as large; at a norm as much larger they are cut alike."""
    options = {"lr": 0.02, "eps": 1e-30, "weight_decay": 0.0}
    norms = [torch.cat([g.flatten() for g in pair]).norm() for pair in LayerRun(rule, **options).train(200).gradients]
    clip, ratio = float(torch.stack(norms).median()), 1 + DEFAULT_RATIO
    run = LayerRun(rule, **options)
    for _ in range(200):
        run.backward()
        torch.nn.utils.clip_grad_norm_(run.factors, clip)
        run.step()
    clipped = run.effective().detach()
    assert apart(clipped, plain_lora(0.5 * ratio, clip=clip, **options)) > 1e-2
    assert apart(clipped, plain_lora(0.5 * ratio, clip=clip * ratio, **options)) < 1e-5


def test_with_adam_it_is_lora_plus_without_weight_decay():
    """A learning rate of (1 + lambda) times the other's for the factor that starts at zero; with weight decay not."""

    def plus(decay):
        groups = lambda s: [{"params": [s.A], "lr": 0.02 * (1 + DEFAULT_RATIO)}, {"params": [s.B]}]  # noqa: E731
        return plain_lora(0.5, groups=groups, lr=0.02, eps=1e-30, weight_decay=decay)

    assert apart(delta_lora_run(lr=0.02, eps=1e-30, weight_decay=0.0), plus(0.0)) < 1e-9
    assert apart(delta_lora_run(lr=0.02, eps=1e-30, weight_decay=0.1), plus(0.1)) > 1e-2


def test_the_papers_control_is_another_thing():
    """LoRA with three times the learning rate."""
    options = {"eps": 1e-30, "weight_decay": 0.0}
    assert apart(delta_lora_run(lr=0.02, **options), plain_lora(0.5, lr=0.06, **options)) > 1e-2


@pytest.mark.parametrize("beyond", ["a changing ratio", "a restart", "K > 0"])
def test_what_goes_beyond_a_larger_alpha(beyond):
    """No constant alpha gives it: the change of the effective weight has a rank above r."""
    options = {"lr": 0.02, "eps": 1e-30, "weight_decay": 0.0}
    if beyond == "a changing ratio":
        run = LayerRun("in_place", **options | {"update_ratio": lambda t: 2.0 if t % 2 else 0.5}).train(60)
    elif beyond == "a restart":
        run = LayerRun("in_place", **options).train(30)
        run.optimizer.restart(generator=torch.Generator().manual_seed(0))
        run.train(30)
    else:
        run = LayerRun("in_place", start_step=20, **options).train(60)
    change = run.effective().detach() - run.W0
    singular = torch.linalg.svdvals(change)
    assert float(singular[strategies.R]) > 1e-3 * float(singular[0])
    plain = torch.linalg.svdvals(LayerRun("in_place", **options).train(60).effective().detach() - run.W0)
    assert float(plain[strategies.R]) < 1e-12 * float(plain[0])


def test_an_eps_that_is_not_small_goes_beyond_a_larger_alpha():
    """Adam then sees the scale of the gradients, so that A and B differ."""
    options = {"lr": 0.02, "eps": 1e-2, "weight_decay": 0.0, "steps": 60}
    assert apart(delta_lora_run(**options), plain_lora(1.5, **options)) > 1e-3
