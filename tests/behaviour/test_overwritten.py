"""A W that somebody else has written since it moved: an export says so, and resync() refuses it."""

import copy

import pytest
import torch

from deltaopt import export_adapter
from tests.support.compare import close
from tests.support.runs import noisy_run
from tests.support.strategies import LAYOUTS

TOLD = r"an exported adapter counts .* W of 1 layer \(q\) was written by somebody else since"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_average_that_was_copied_in(layout, dtype):
    """Say nothing of W as training has left it, whatever happened; and all of one that holds the mean of two models."""
    run = noisy_run(layout, dtype=dtype).train(2)
    early = run.stored.W.clone()
    run.train(3)
    run.optimizer.restart(generator=torch.Generator().manual_seed(0))
    run.train(2)
    export_adapter(run.optimizer)
    kept = run.stored.W.clone()
    run.stored.W.data.lerp_(early, 0.5)
    with pytest.warns(UserWarning, match=TOLD):
        export_adapter(run.optimizer)
    run.stored.W.data.copy_(kept)  # exchanged for an evaluation, and put back
    export_adapter(run.optimizer)
    run.stored.W.data.lerp_(early, 0.5)
    run.optimizer.rebase()
    run.train(1)
    export_adapter(run.optimizer)


def test_in_a_resumed_run():
    run = noisy_run().train(3)
    state = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.load_state_dict(state)
    run.train(1)
    export_adapter(run.optimizer)
    run.stored.W.data.mul_(0.9)
    with pytest.warns(UserWarning, match=TOLD):
        export_adapter(run.optimizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_is_none(dtype):
    run = noisy_run(dtype=torch.float32).train(3)
    run.stored.W.data = run.stored.W.data.to(dtype).float()
    exported = export_adapter(run.optimizer)
    assert close(exported["q"].product().double(), run.effective_exactly() - run.base(), 1e-2)


@pytest.mark.parametrize("with_state", [False, True])
def test_resync_refuses_a_w_that_was_loaded_with_its_factors(with_state):
    """W is in its place already, so that moving it would make another model."""
    run = noisy_run().train(2)
    model = [tensor.clone() for tensor in run.tensors]
    state = copy.deepcopy(run.optimizer.state_dict())
    run.train(2)
    with torch.no_grad():
        for tensor, kept in zip(run.tensors, model, strict=True):
            tensor.copy_(kept)
    with pytest.raises(ValueError, match=r"resync\(\).* \(q\) was written.*load_state_dict\(\).*rebase\(\)"):
        run.optimizer.resync(*[state] * with_state)
    assert all(map(torch.equal, run.tensors, model))
    run.optimizer.load_state_dict(state)
    run.optimizer.resync()
    assert all(map(torch.equal, run.tensors, model))
