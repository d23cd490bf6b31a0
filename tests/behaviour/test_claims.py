"""Two optimizers on one W, in turn: each would count the other's moves as its own base, so one of them is refused."""

import copy
import gc

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple, export_adapter, merged_weights
from tests.support.compare import COPIES, assert_close, refused, same, through_a_file
from tests.support.runs import LayerRun
from tests.support.small import HandmadeLayer, random_steps, small_layer, small_triple

EARLIER = "the weights of .* were moved by an earlier optimizer"
pytestmark = pytest.mark.filterwarnings(f"ignore:{EARLIER}:UserWarning")  # what these tests are about

ANOTHER = "another optimizer was built on the W of "


class SharedWeight:
    """One layer whose W two branches would move, each with an optimizer of its own: the first was built first."""

    def __init__(self, first: str = "in_place", second: str = "in_place", **options) -> None:
        torch.manual_seed(0)
        self.layer = HandmadeLayer(dtype=torch.float64)
        self.other = HandmadeLayer(dtype=torch.float64)
        self.first = self.optimizer(self.layer, first, **options)
        self.build_second = lambda: self.optimizer(self.other, second, **options)

    def optimizer(self, branch: HandmadeLayer, rule: str, **options) -> DeltaLoRAOptimizer:
        triple = LoRATriple((self.layer, "weight"), (branch, "A"), (branch, "B"), (branch, "scaling"), "q")
        return DeltaLoRAOptimizer(torch.optim.SGD, [triple], weight_update=rule, **{"lr": 0.1, **options})

    def tensors(self) -> list[torch.Tensor]:
        return [self.layer.weight, *(p.detach() for p in (*self.layer.parameters(), *self.other.parameters()))]


def base_of(optimizer, W) -> torch.Tensor:
    with optimizer.base_weights():
        return W.clone()


READS = {
    "state_dict": lambda o: o.state_dict(),
    "displacement": lambda o: o.displacement("q"),
    "residual": lambda o: o.residual("q"),
    "base_weights": lambda o: base_of(o, torch.zeros(1)),
    "export_adapter": export_adapter,
    "merged_weights": merged_weights,
    "accounts": lambda o: o.accounts(),
    "deepcopy": copy.deepcopy,
}
WRITES = {
    "step": lambda o: o.step(),
    "restart": lambda o: o.restart(),
    "resync": lambda o: o.resync(),
}


@pytest.mark.parametrize("event", WRITES)
def test_an_optimizer_cannot_write_once_another_was_built(event):
    """Refuse every write of the first as soon as the second exists: it has counted W from here."""
    shared = SharedWeight()
    random_steps(shared.first)
    second = shared.build_second()
    for factor in (shared.layer.A, shared.layer.B):
        factor.grad = torch.ones_like(factor)
    message = refused(lambda: WRITES[event](shared.first), RuntimeError, ANOTHER + "q since", kept=shared.tensors)
    assert message.startswith(event)
    assert "moved it" not in message
    assert "load_state_dict()" in message
    random_steps(second)


@pytest.mark.parametrize("event", READS)
def test_an_optimizer_can_be_read_until_another_has_written(event):
    shared = SharedWeight(keep_base="cpu")
    random_steps(shared.first, 2)
    second = shared.build_second()
    READS[event](shared.first)
    random_steps(second)
    refused(lambda: READS[event](shared.first), RuntimeError, ANOTHER + r"q since.*, and has moved it", shared.tensors)
    READS[event](second)


def test_a_weight_at_the_base_of_another_optimizer_is_not_written():
    """Refuse a step of the second within base_weights of the first, which would undo it on leaving."""
    shared = SharedWeight()
    random_steps(shared.first)
    second = shared.build_second()
    with shared.first.base_weights():
        for action in (lambda: random_steps(second), lambda: base_of(second, shared.layer.weight)):
            with pytest.raises(RuntimeError, match=r"the W of q is at its base, within base_weights\(\) of another"):
                action()
    random_steps(second)


def test_the_second_is_right_for_all_it_tells():
    shared = SharedWeight(update_ratio=0.7)
    random_steps(shared.first, 2)
    second, W = shared.build_second(), shared.layer.weight
    before, product = W.clone(), (shared.other.A @ shared.other.B).detach()
    random_steps(second, 3)
    asked = 0.7 * 0.5 * ((shared.other.A @ shared.other.B).detach() - product)
    assert_close(second.displacement("q").product(), asked)
    assert_close(W - before, asked)
    assert_close(base_of(second, W), before)


def test_a_notebook_cell_can_run_twice():
    """Build the optimizer again on the same tensors, with the old one still in scope: the new one trains."""
    run = LayerRun(zero=False).train(3)
    with pytest.warns(UserWarning, match=EARLIER):
        old, run.optimizer = run.optimizer, run.new_optimizer()
    run.W0, run.start = run.stored.W.clone(), run.product()
    run.asked.zero_()
    run.train(3)
    assert_close(run.displacement(), run.asked)
    with pytest.raises(RuntimeError, match=ANOTHER):
        old.step()


@pytest.mark.parametrize("collect", [False, True], ids=["by reference count", "by collector"])
def test_a_deleted_optimizer_claims_nothing(collect):
    """Step the first again once the second is gone without having moved W; W would be wrong if it had."""
    for steps in (0, 1):
        shared = SharedWeight()
        second = shared.build_second()
        random_steps(second, steps)
        if collect:
            second.itself = second
        del second
        gc.collect() if collect else None
        if steps:
            with pytest.raises(RuntimeError, match=ANOTHER + r"q since.*, and has moved it"):
                random_steps(shared.first)
        else:
            random_steps(shared.first)


def test_loading_a_state_claims_the_weights_again():
    """Go back to the first with its weights and its state: the run ends as one without the second does."""
    shared, alone = SharedWeight(), SharedWeight()
    for each in (shared, alone):
        random_steps(each.first, 2)
    weights, state = copy.deepcopy(shared.layer.state_dict()), through_a_file(shared.first.state_dict())
    second = shared.build_second()
    random_steps(second, 2)
    shared.layer.load_state_dict(weights)
    shared.first.load_state_dict(state)
    for each in (shared, alone):
        random_steps(each.first, 2, seed=1)
    assert same(dict(shared.layer.state_dict()), dict(alone.layer.state_dict()))
    assert_close(shared.first.displacement("q").product(), alone.first.displacement("q").product())
    with pytest.raises(RuntimeError, match=ANOTHER + "q since"):
        second.step()


def test_a_state_rebuilds_the_weight_under_another_optimizer():
    """Load the base and the adapter alone: the first moves W, and what the second knows of W is void."""
    shared = SharedWeight()
    base = shared.layer.weight.clone()
    random_steps(shared.first, 2)
    state, moved = through_a_file(shared.first.state_dict()), shared.layer.weight.clone()
    shared.layer.weight.data.copy_(base)
    second = shared.build_second()
    shared.first.load_state_dict(state)
    assert_close(shared.layer.weight, moved)
    with pytest.raises(RuntimeError, match=ANOTHER + r"q since.*, and has moved it"):
        second.state_dict()


def test_rebase_claims_the_weights_again():
    shared = SharedWeight()
    second = shared.build_second()
    random_steps(second, 2)
    base = shared.layer.weight.clone()
    shared.first.rebase()
    random_steps(shared.first, 2)
    assert_close(base_of(shared.first, shared.layer.weight), base)
    with pytest.raises(RuntimeError, match=ANOTHER):
        second.step()


def test_rows_of_one_weight_in_two_optimizers_do_not_compete():
    W, A, B = small_layer(c=8)
    optimizers = [
        DeltaLoRAOptimizer(
            torch.optim.SGD,
            [
                LoRATriple(
                    W, A[rows[0] : rows[1]].detach().requires_grad_(), B.detach().clone().requires_grad_(), rows=rows
                )
            ],
            lr=0.1,
        )
        for rows in ((0, 4), (4, 8), (3, 5))[:2]
    ]
    for optimizer in (*optimizers, *optimizers):
        random_steps(optimizer)
        optimizer.state_dict()
    overlapping = LoRATriple(W, A[3:5].detach().requires_grad_(), B.detach().requires_grad_(), rows=(3, 5), name="mid")
    _third = DeltaLoRAOptimizer(torch.optim.SGD, [overlapping], lr=0.1)
    for optimizer in optimizers:
        with pytest.raises(RuntimeError, match=ANOTHER):
            optimizer.step()


def test_two_views_of_one_flat_buffer_compete_where_they_overlap():
    flat = torch.randn(40)
    layers = {start: flat[start : start + 24].view(4, 6) for start in (0, 10)}
    first, second = (
        DeltaLoRAOptimizer(torch.optim.SGD, [LoRATriple(W, *small_layer()[1:], name=f"from {start}")], lr=0.1)
        for start, W in layers.items()
    )
    second.step()
    with pytest.raises(RuntimeError, match=ANOTHER + "from 0 since"):
        first.step()


def test_only_the_layers_that_are_shared_are_named():
    triples = [small_triple(name, seed) for seed, name in enumerate("qkv")]
    first = DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1)
    shared = LoRATriple(triples[1].W, *small_layer(seed=9)[1:], name="other")
    second = DeltaLoRAOptimizer(torch.optim.SGD, [small_triple("z", 5)], lr=0.1)
    first.step()
    second.add_param_group({"triples": [shared]})
    with pytest.raises(RuntimeError, match=ANOTHER + "k since"):
        first.step()


@pytest.mark.parametrize("way", COPIES)
def test_copies_claim_their_own_weights(way):
    run = LayerRun(zero=False).train(2)
    twin = COPIES[way](run)
    for each in (run, twin, run, twin):
        each.train(1)
        each.optimizer.state_dict()
    assert_close(twin.displacement(), twin.asked)
    with pytest.raises(RuntimeError, match=ANOTHER):
        (twin.new_optimizer(), twin.train(1))
    run.train(1)


def test_claims_follow_parameters_that_were_replaced():
    """Share a weight with assign=True after both optimizers were built: the claims meet at the next look-up."""
    one, other = (nn.Linear(6, 4, bias=False).requires_grad_(False) for _ in range(2))
    first, second = (
        DeltaLoRAOptimizer(torch.optim.SGD, [LoRATriple((layer, "weight"), *small_layer()[1:], name="q")], lr=0.1)
        for layer in (one, other)
    )
    for optimizer in (first, second, first, second):
        optimizer.step()
    one.load_state_dict(other.state_dict(), assign=True)
    one.requires_grad_(False)
    assert one.weight.data_ptr() == other.weight.data_ptr()
    with pytest.raises(RuntimeError, match=ANOTHER + r"q since.*, and has moved it"):
        first.step()
    second.step()
    one.weight = nn.Parameter(one.weight.detach().clone(), requires_grad=False)
    first.rebase()
    for optimizer in (first, second):
        optimizer.step()


# The folded rule claims a W when it writes it, which it may never do.


def test_folded_optimizers_that_write_nothing_do_not_compete():
    shared = SharedWeight("folded", "folded")
    for layer in (shared.layer, shared.other):
        layer.A.data.zero_()
    W, second = shared.layer.weight.clone(), shared.build_second()
    for optimizer in (shared.first, second, shared.first, second):
        random_backward(optimizer)
        optimizer.step()
        optimizer.state_dict()
        base_of(optimizer, W)
    assert torch.equal(shared.layer.weight, W)


def test_a_folded_optimizer_claims_a_weight_when_it_writes_it():
    """Build the folded one last, with a product that is not zero: it writes W at its first step, and holds it then."""
    shared = SharedWeight("in_place", "folded")
    random_steps(shared.first)
    second = shared.build_second()
    random_steps(shared.first)
    random_backward(second)
    second.step()
    with pytest.raises(RuntimeError, match=ANOTHER + r"q since.*, and has moved it"):
        shared.first.state_dict()
    random_backward(second)
    second.step()


@pytest.mark.parametrize("event", ["step", "restart"])
def test_a_folded_optimizer_cannot_write_a_weight_that_another_holds(event):
    shared = SharedWeight("folded", "in_place")
    second = shared.build_second()
    random_steps(second)
    random_backward(shared.first)
    scaling = shared.layer.scaling
    message = refused(
        lambda: WRITES[event](shared.first),
        RuntimeError,
        "q: W would have to be written, and another optimizer was built on it since",
        kept=shared.tensors,
    )
    assert "nothing was changed" in message
    assert shared.layer.scaling == scaling
    random_steps(second)


def test_the_base_of_a_folded_weight_is_gone_once_another_has_moved_it():
    """Refuse the base of a folded optimizer, W as it was registered, after an optimizer in place has moved W."""
    shared = SharedWeight("folded", "in_place")
    shared.layer.A.data.zero_()
    second = shared.build_second()
    base_of(shared.first, shared.layer.weight)
    random_steps(second)
    with pytest.raises(RuntimeError, match=ANOTHER + r"q since.*, and has moved it"):
        base_of(shared.first, shared.layer.weight)
    random_backward(shared.first)
    shared.first.step()


def random_backward(optimizer: torch.optim.Optimizer) -> None:
    """Give gradients by a backward pass, as the folded rule asks for."""
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(0)
    for p in optimizer.param_groups[0]["params"]:
        (p * torch.randn(p.shape, generator=generator, dtype=p.dtype)).sum().backward()


# Two adapters of one folded optimizer, on one W.


def two_adapters(zero: bool = True, **options):
    """(optimizer, layer, other): the branches of both layers belong to the W of the first."""
    layer, other = (HandmadeLayer(dtype=torch.float64) for _ in range(2))
    if zero:
        layer.A.data.zero_()
        other.A.data.zero_()
    triples = [
        LoRATriple((layer, "weight"), (branch, "A"), (branch, "B"), (branch, "scaling"), name)
        for branch, name in ((layer, "first"), (other, "second"))
    ]
    options = {"weight_update": "folded", "update_ratio": 0.7, "lr": 0.1, **options}
    return DeltaLoRAOptimizer(torch.optim.SGD, triples, **options), layer, other


def test_two_adapters_of_one_folded_optimizer_share_a_weight():
    """Train both and ask for everything: each one's movement is its own, and W keeps its bits."""
    optimizer, layer, other = two_adapters()
    W = layer.weight.clone()
    for _ in range(3):
        random_backward(optimizer)
        optimizer.step()
    assert torch.equal(layer.weight, W)
    exported = export_adapter(optimizer)
    for name, branch in (("first", layer), ("second", other)):
        product = branch.A.detach() @ branch.B.detach()
        assert_close(optimizer.displacement(name).product(), 0.7 * 0.5 * product)
        assert_close(exported[name].product(), 1.7 * 0.5 * product)
    both = W + sum(change.product() for change in exported.values())
    assert_close(merged_weights(optimizer)["first"], both)
    assert_close(merged_weights(optimizer)["second"], both)
    assert torch.equal(base_of(optimizer, layer.weight), W)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


@pytest.mark.parametrize("event", ["step", "restart"])
def test_a_weight_of_two_adapters_is_not_written(event):
    """Refuse it where the product is not zero: the other adapter would compute with what was taken from W."""
    optimizer, layer, other = two_adapters(zero=False)
    random_backward(optimizer)
    parameters = [*layer.parameters(), *other.parameters()]
    message = refused(
        lambda: WRITES[event](optimizer),
        RuntimeError,
        "first: W would have to be written, and it is the W of second too",
        lambda: [p.detach() for p in parameters],
    )
    assert "nothing was changed" in message
    assert layer.scaling == other.scaling == 0.5


def test_two_adapters_cannot_share_a_weight_in_place_or_in_part():
    with pytest.raises(ValueError, match="second: its W shares memory with the W of first"):
        two_adapters(weight_update="in_place")
    W, A, B = small_layer(c=8)
    triples = [
        LoRATriple(W, A[:5].detach().requires_grad_(), B, torch.tensor(1.0), "q", rows=(0, 5)),
        LoRATriple(W, A[3:].detach().requires_grad_(), B, torch.tensor(1.0), "k", rows=(3, 8)),
    ]
    with pytest.raises(ValueError, match="k: its W shares memory with the W of q"):
        DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1, weight_update="folded")


def test_an_adapter_is_not_added_to_a_weight_that_was_written():
    shared = SharedWeight("folded")
    random_backward(shared.first)
    shared.first.step()
    other = shared.other
    triple = LoRATriple((shared.layer, "weight"), (other, "A"), (other, "B"), (other, "scaling"), name="k")
    with pytest.raises(ValueError, match="k: its W shares memory with the W of q"):
        shared.first.add_param_group({"triples": [triple]})
