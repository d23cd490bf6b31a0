"""W that is sharded in another way than in the last event: what is kept next to it goes with it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from deltaopt import DeltaLoRAOptimizer, LoRATriple, merged_weights
from tests.support.distributed import on_all_ranks
from tests.support.sharded import S0, S1, R

WAYS: dict[str, tuple[tuple[int, ...], list[int], list[Any]]] = {
    "rows": ((2,), [0, 1], [S0]),
    "columns": ((2,), [0, 1], [S1]),
    "whole": ((2,), [0, 1], [R]),
    "blocks": ((2, 1), [0, 1], [S1, S0]),
    "one rank": ((1,), [0], [S0]),
}
"""Shape and ranks of a mesh, and placements on it."""


def spread(tensor: Tensor, way: str) -> Tensor:
    shape, ranks, placements = WAYS[way]
    mesh = DeviceMesh("cpu", torch.tensor(ranks).view(shape))
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


class Layer(nn.Module):
    """W, A and B in 16 and 32 bits, whole or spread over the ranks, and an optimizer with compensated rounding."""

    def __init__(self, way: str | None, **view: Any) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(0)
        W, A, B = (torch.randn(shape, generator=numbers) for shape in ((13, 11), (13, 3), (3, 11)))
        self.W0, self.way, self.gradients = W.bfloat16(), way, torch.Generator().manual_seed(1)
        if view:
            A, B = A[slice(*view.get("rows", (0, 13)))], B[:, slice(*view.get("columns", (0, 11)))]
        self.put(self.W0)
        self.A, self.B = (nn.Parameter(t if way is None else spread(t.contiguous(), "rows")) for t in (A, B))
        names = [(self, name) for name in "WAB"]
        self.optimizer = DeltaLoRAOptimizer(
            torch.optim.SGD,
            [LoRATriple(*names, scaling=0.5, name="layer", **view)],
            lr=0.05,
            rounding="compensated",
            keep_base="cpu",
            rank_timeout=20.0,
        )

    def put(self, W: Tensor) -> None:
        self.W = nn.Parameter(W if self.way is None else spread(W, self.way), requires_grad=False)

    def spread_otherwise(self, way: str) -> None:
        if self.way is not None:
            whole, self.way = self.W.detach().full_tensor(), way
            self.put(whole)

    def train(self, steps: int) -> "Layer":
        for _ in range(steps):
            for factor in (self.A, self.B):
                gradient = torch.randn(factor.shape, generator=self.gradients)
                factor.grad = gradient if self.way is None else spread(gradient, "rows")
            self.optimizer.step()
        return self

    def whole(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def base_of(layer: Layer) -> Tensor:
    with layer.optimizer.base_weights(method="copy"):
        return layer.whole(layer.W)


AFTERWARDS: dict[str, Callable[[Layer], Tensor]] = {
    "step": lambda layer: layer.whole(layer.train(1).W),
    "merged_weights": lambda layer: layer.whole(merged_weights(layer.optimizer)["layer"]),
    "residual": lambda layer: layer.whole(layer.optimizer.residual("layer")),
    "base_weights": base_of,
    "report": lambda layer: torch.tensor([layer.optimizer.report().layers[0].kept]),
}


def resharded(way: str | None, view: dict[str, Any], then: str) -> list[Tensor]:
    """What the event gives, and W some steps later; of one process for None."""
    layer = Layer(None if way is None else "rows", **view).train(3)
    if way is not None:
        layer.spread_otherwise(way)
    return [AFTERWARDS[then](layer), layer.whole(layer.train(2).W)]


def resharded_on_rank(rank: int, way: str, view: dict[str, Any]) -> dict[str, list[Tensor]]:
    return {then: resharded(way, view, then) for then in AFTERWARDS}


OTHERS = ["columns", "whole", "blocks"]
PARTS = [
    pytest.param(way, view, id=f"{way}, some {next(iter(view))}", marks=pytest.mark.nightly if way != "columns" else ())
    for way in OTHERS
    for view in ({"rows": (2, 9)}, {"columns": (1, 8)})
]


@pytest.mark.parametrize(("way", "view"), [*(pytest.param(way, {}, id=way) for way in OTHERS), *PARTS])
def test_what_is_kept_of_w_goes_with_it(way, view):
    """The compensation and the copy of the base, each bit, whatever the first event after that."""
    results = on_all_ranks(resharded_on_rank, way, view)
    for then in AFTERWARDS:
        expected, after = resharded(None, view, then)
        for found, W in (result[then] for result in results):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
            assert torch.equal(W, after)
    base = results[0]["base_weights"][0]
    assert torch.equal(base, Layer(None).W0)


def leaves_a_rank_out(rank: int) -> list[str]:
    layer = Layer("rows").train(3)
    rows = layer.W
    layer.spread_otherwise("one rank")
    said = said_in(layer), said_in(layer)
    layer.W = rows
    return [*said, said_in(layer), str(torch.equal(layer.whole(rows), Layer(None).train(4).W))]


def takes_a_copy(rank: int) -> list[str]:
    layer = copy.deepcopy(Layer("rows").train(3))
    layer.spread_otherwise("columns")
    return [said_in(layer), said_in(layer)]


def said_in(layer: Layer) -> str:
    at = layer.gradients.get_state()
    try:
        layer.train(1)
        return "fine"
    except Exception as error:
        layer.gradients.set_state(at)
        return f"{type(error).__name__}: {error}"


def becomes_whole(rank: int) -> list[str]:
    layer = Layer("rows").train(1)
    layer.W = nn.Parameter(layer.whole(layer.W), requires_grad=False)
    return [said_in(layer)]


def test_a_w_that_is_whole_for_good_is_told_to_get_another_optimizer():
    for (said,) in on_all_ranks(becomes_whole):
        assert "layer: W was sharded when this optimizer was built and is a whole tensor now" in said
        assert "build the optimizer again" in said
        assert "reshard()" not in said


def test_what_is_kept_on_ranks_that_w_has_left_is_not_forgotten():
    (one, again, *back), (other, *_) = on_all_ranks(leaves_a_rank_out)
    text = (
        "layer: W was sharded over the ranks [0, 1] and is over the ranks [0] now, and what compensated rounding has "
        "cut off and the copy of keep_base is on the former ones: shard W as it was, or build"
    )
    assert text in one
    assert text in again
    assert back == ["fine", "True"]
    assert "of which this process is none" in other


def test_a_copy_whose_w_is_sharded_in_another_way_then_is_refused():
    for said in on_all_ranks(takes_a_copy):
        assert all("is sharded in another way than where this optimizer was pickled or copied" in text for text in said)
