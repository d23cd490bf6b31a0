"""A plain training loop of a tiny Llama with PEFT's adapters: it learns, and W moves by the telescoped delta."""

import torch

from tests.support.compare import assert_same_bits, bits
from tests.support.models import batches, causal_lm, deltas, loss_of, optimizer_for, plain_loop, weights
from tests.support.peft_runs import assert_telescoped, peft_asks_by_an_old_name

pytestmark = peft_asks_by_an_old_name


def test_a_plain_loop_learns_and_moves_w_by_the_telescoped_delta():
    model, K = causal_lm(), 4
    optimizer = optimizer_for(model, start_step=K, lr=5e-2, weight_decay=0.02)
    data = batches(1) * 30
    W0 = weights(model)
    losses = plain_loop(model, optimizer, data[:K])
    for name, W in weights(model).items():
        assert torch.equal(W, W0[name])
    delta_K = deltas(model)
    losses += plain_loop(model, optimizer, data[K:])
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.step_count == len(data)
    assert_telescoped(model, W0, delta_K)


def test_from_the_usual_start_w_moves_by_the_whole_delta():
    """PEFT's init makes the branch zero: W has moved by RATIO times the whole delta."""
    model = causal_lm(B_zero=True)
    W0, zero = weights(model), deltas(model)
    assert all(float(delta.abs().max()) == 0 for delta in zero.values())
    plain_loop(model, optimizer_for(model), batches(5))
    assert_telescoped(model, W0, zero)


def test_gradient_clipping_and_accumulation_in_a_plain_loop():
    """W moves once per step, however many micro-batches there were, and never in zero_grad or backward."""
    model = causal_lm()
    optimizer = optimizer_for(model)
    W0, delta0 = weights(model), deltas(model)
    for i, ids in enumerate(batches(6)):
        before = bits(model)
        (loss_of(model, ids) / 2).backward()
        assert_same_bits(model, before)
        if i % 2:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.step_count == 3
    assert_telescoped(model, W0, delta0)
