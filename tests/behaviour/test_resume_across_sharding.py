"""A state of a folded run whose W was sharded, next to one that is not, and the other way round.

FSDP2 shards over a group of one process here. What several ranks do differently is in tests/integrations.
"""

import copy
import types
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from deltaopt import DeltaLoRAOptimizer, LoRATriple, WeightMismatchError
from tests.support.compare import assert_close, refused, through_a_file
from tests.support.folded import ScaledLayer, folded_optimizer
from tests.support.internals import change_ledger, compensation_of
from tests.support.small import small_layer


@pytest.fixture(autouse=True)
def _one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    """A layer in training by the folded rule, sharded or not."""

    def __init__(self, sharded: bool, dtype: torch.dtype = torch.float64, zero: bool = True) -> None:
        self.layer = ScaledLayer("attribute").to(dtype)
        if not zero:
            torch.nn.init.constant_(self.layer.lora_B, 0.25)
        self.start: list[Tensor] = [whole(p) for p in self.layer.parameters()]
        if sharded:
            fully_shard(self.layer, mesh=init_device_mesh("cpu", (1,)))
        self.optimizer = folded_optimizer(self.layer.triple(), lr=0.02)

    def train(self, steps: int, seed: int = 0) -> "Run":
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            x = torch.randn(5, 6, generator=generator, dtype=torch.float64).to(self.layer.weight.dtype)
            self.layer(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def tensors(self) -> list[Tensor]:
        return [whole(p) for p in self.layer.parameters()]

    @torch.no_grad()
    def take(self, other: "Run") -> "Run":
        """Load the weights of another run, as a checkpoint of the model brings them."""
        for p, value in zip(self.layer.parameters(), other.tensors(), strict=True):
            (p.to_local() if isinstance(p, dist.tensor.DTensor) else p).copy_(value)
        return self


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, dist.tensor.DTensor) else p).detach().clone()


@pytest.mark.parametrize("saved", [True, False], ids=["sharded at first", "sharded later"])
def test_a_weight_that_was_never_written_is_taken(saved):
    run = Run(saved).train(3)
    twin = Run(not saved).take(run)
    twin.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    assert twin.optimizer.step_count == 3
    assert twin.layer.scaling == run.layer.scaling == 1.5
    for r in (run, twin):
        r.train(3, seed=1)
    for here, there in zip(twin.tensors(), run.tensors(), strict=True):
        assert_close(here, there)
    assert float((run.tensors()[1] - run.start[1]).norm()) > 1e-3
    assert_close(twin.optimizer.displacement("q").product(), run.optimizer.displacement("q").product())


def without_reason(record: dict) -> None:
    del record["unreadable"]


def test_a_state_of_an_earlier_version_does_not_say_why_and_is_taken_with_a_warning():
    run = Run(sharded=True).train(3)
    state = run.optimizer.state_dict()
    change_ledger(state, "q", without_reason)
    change_ledger(state, "q", lambda record: record.update(W=None))
    twin = Run(sharded=False).take(run)
    match = r"the W of 1 layer \(q\) could not be read when .* \(it was sharded, quantized or offloaded\)"
    with pytest.warns(RuntimeWarning, match=match):
        twin.optimizer.load_state_dict(state)
    again = Run(sharded=True).take(run)
    with pytest.warns(RuntimeWarning, match=match):
        again.optimizer.load_state_dict(state)
    assert twin.optimizer.step_count == again.optimizer.step_count == 3


WRITTEN = (
    r"q: W can be read now \(it was {}\) .* was written in the saved run, so that its contents have to be compared"
)
EDITS: dict[str, tuple[Callable[[dict], None], str]] = {
    "written": (lambda record: record.update(W=None, unreadable="sharded"), WRITTEN.format("sharded")),
    "written, no reason": (
        lambda record: record.update(W=None, unreadable=None),
        WRITTEN.format("sharded, quantized or offloaded"),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_weight_that_was_written_is_not_taken_unread(edit):
    run = Run(sharded=False, zero=False).train(3)
    assert run.optimizer.weights()[0].base is not None
    change, match = EDITS[edit]
    state = run.optimizer.state_dict()
    change_ledger(state, "q", change)
    refused(lambda: run.optimizer.load_state_dict(state), WeightMismatchError, match)


def offloaded(run: Run) -> Run:
    """Say of the layer what accelerate says of one that it keeps elsewhere."""
    run.layer._hf_hook = types.SimpleNamespace(offload=True)
    return run


def test_an_offloaded_weight_is_taken_unless_it_was_written_or_is_of_another_dtype():
    run, written = Run(sharded=False).train(2), Run(sharded=False, zero=False).train(2)
    twin = offloaded(Run(sharded=False).take(run))
    twin.optimizer.load_state_dict(run.optimizer.state_dict())
    assert twin.optimizer.step_count == 2
    twin = offloaded(Run(sharded=False, zero=False).take(written))
    match = r"q: W cannot be read now \(W is offloaded by .*\) and could when the state was saved: was written in the"
    refused(lambda: twin.optimizer.load_state_dict(written.optimizer.state_dict()), WeightMismatchError, match)
    twin = offloaded(Run(sharded=False, dtype=torch.float32).take(run))
    match = "q: .*W has the dtype float32, saved was float64"
    refused(lambda: twin.optimizer.load_state_dict(run.optimizer.state_dict()), WeightMismatchError, "(?s)" + match)


def test_of_a_sharded_compensation_the_local_part_is_taken():
    W, A, B = small_layer()
    W = W.bfloat16()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [LoRATriple(W, A, B, name="q")], lr=0.1, rounding="compensated")
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    [(entries, key)] = [(e, key) for e in state["state"].values() for key in e if "compensation" in key]
    kept = compensation_of(optimizer).clone()
    entries[key] = distribute_tensor(entries[key], init_device_mesh("cpu", (1,)), [Shard(0)])
    compensation_of(optimizer).zero_()
    optimizer.load_state_dict(state)
    assert kept.any()
    assert torch.equal(compensation_of(optimizer), kept)
