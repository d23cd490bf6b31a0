"""Every refusal of a triple, of a set of triples and of an inner optimizer comes before anything changes."""

import re

import pytest
import torch
from torch import nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support import strategies
from tests.support.compare import refused
from tests.support.small import refuses_triples, small_layer, small_triple
from tests.support.strategies import RULES

# One triple.


def test_refuses_a_weight_that_requires_grad():
    W, A, B = small_layer()
    message = refuses_triples(LoRATriple(W.requires_grad_(), A, B, name="q"))
    assert "q: W requires grad: Delta-LoRA moves a frozen W" in message


def test_refuses_factors_that_do_not_require_grad():
    triple = small_triple()
    for factor in (triple.A, triple.B):
        factor.requires_grad_(False)
    assert "q: neither A nor B requires grad, so that no optimizer can train it" in refuses_triples(triple)


def test_refuses_factors_on_another_device():
    W, _, B = small_layer()
    A = torch.empty(4, 2, device="meta", requires_grad=True)
    message = refuses_triples(LoRATriple(W, A, B, name="q"))
    assert "q: A is on meta and W on cpu: move them to one device" in message


def test_moves_a_weight_that_was_sharded_since(tmp_path):
    """Put a DTensor in place of the Parameter after the optimizer was built, as FSDP2 and tensor parallelism do."""
    dist = pytest.importorskip("torch.distributed.tensor", reason="runs where torch is built with distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        linear = nn.Linear(6, 4, bias=False).requires_grad_(False)
        W, (_, A, B) = linear.weight.clone(), small_layer()
        triple = LoRATriple((linear, "weight"), A, B, name="q")
        optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, update_ratio=2.0)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = dist.distribute_tensor(linear.weight, mesh, [dist.Shard(0)])
        linear.weight = nn.Parameter(sharded, requires_grad=False)
        A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
        before = (A @ B).detach()
        optimizer.step()
        torch.testing.assert_close(linear.weight.full_tensor(), W + 2.0 * ((A @ B).detach() - before))
    finally:
        torch.distributed.destroy_process_group()


def test_refuses_a_weight_that_was_unfrozen_since():
    triple = small_triple()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
    triple.W.requires_grad_()
    refused(optimizer.step, ValueError, "q: W requires grad", kept=lambda: [t.detach() for t in triple.tensors()])


def test_refuses_a_weight_that_became_unusable():
    model = nn.Linear(6, 4, bias=False).requires_grad_(False)
    triple = LoRATriple((model, "weight"), *small_layer()[1:], name="q")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
    model.weight = nn.Parameter(torch.empty(4, 6, device="meta"), requires_grad=False)
    with pytest.raises(ValueError, match="q: W is on the meta device"):
        optimizer.step()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("layout", "W", "A", "B"),
    [
        ("linear", (0, 6), (0, 2), (2, 6)),
        ("linear", (4, 0), (4, 2), (2, 0)),
        ("experts", (0, 4, 6), (0, 4, 2), (0, 2, 6)),
        ("conv", (4, 3, 0), (4, 2), (2, 3, 0)),
    ],
)
def test_refuses_a_weight_without_elements(rule, layout, W, A, B):
    """Refuse it when it is registered: the events of the other layers would fail half-way."""
    factors = [torch.zeros(size, requires_grad=True) for size in (A, B)]
    scale = torch.tensor(1.0)
    empty = LoRATriple(torch.zeros(W), *factors, scaling=scale, name="empty", layout=layout)
    fine = LoRATriple(*small_layer(), scaling=scale, name="fine")
    message = refused(
        lambda: DeltaLoRAOptimizer(torch.optim.SGD, [fine, empty], lr=0.1, weight_update=rule),
        ValueError,
        re.escape(f"empty: W has the shape {W} and no elements, so nothing can move: leave this layer out"),
    )
    assert "fine" not in message


# A set of triples.


def test_lists_all_bad_layers_at_once():
    W, A, B = small_layer()
    message = refuses_triples(
        LoRATriple(W, B, A, name="first"), LoRATriple(W.int(), A, B, name="second"), small_triple("fine")
    )
    assert "first: " in message
    assert "second: " in message
    assert "fine" not in message


def test_refuses_a_duplicate_triple():
    first, second = small_triple("q"), small_triple("k")
    message = refuses_triples(first, LoRATriple(first.W, second.A, second.B, name="k"))
    assert "k: its W shares memory with the W of q" in message


def test_refuses_overlapping_rows():
    W, A, B = small_layer(c=8)
    message = refuses_triples(
        LoRATriple(W, A[:5].detach().requires_grad_(), B, rows=(0, 5), name="q"),
        LoRATriple(W, A[4:].detach().requires_grad_(), B, rows=(4, 8), name="k"),
    )
    assert "k: its W shares memory with the W of q" in message


def test_takes_disjoint_rows_of_a_stack_of_experts():
    """Register gate and up, fused in one weight."""
    W = torch.zeros(2, 8, 6)

    def half(start):
        A, B = torch.randn(2, 4, 2, requires_grad=True), torch.randn(2, 2, 6, requires_grad=True)
        return LoRATriple(W, A, B, layout="experts", rows=(start, start + 4), name=str(start))

    assert len(DeltaLoRAOptimizer(torch.optim.SGD, [half(0), half(4)]).triples) == 2
    assert "its W shares memory" in refuses_triples(half(0), half(3))


def test_takes_layers_of_the_same_numbers():
    assert len(DeltaLoRAOptimizer(torch.optim.SGD, [small_triple("q"), small_triple("k")]).triples) == 2


def test_refuses_factors_tied_through_storage():
    W, A, B = small_layer(c=6, d=6)
    tied = nn.Parameter(A.detach().T)
    message = refuses_triples(
        LoRATriple(W, A, B, name="q"), LoRATriple(torch.randn(6, 6), small_layer(c=6)[1], tied, name="head")
    )
    assert "head: its B shares memory with A of q though they are two tensors (tied adapters)" in message


def test_takes_one_factor_for_two_weights():
    W, A, B = small_layer()
    other = torch.randn(4, 6), A, torch.randn(2, 6, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B), other])
    assert len(optimizer.param_groups[0]["params"]) == 3


def test_refuses_two_triples_of_one_name():
    message = refuses_triples(small_triple("q"), small_triple("q"))
    assert "q: two triples have this name; give each its own" in message


# An inner optimizer.


def test_refuses_an_inner_optimizer_without_a_factor():
    triple = small_triple()
    with pytest.raises(ValueError, match="q: B is not among the parameters of the inner SGD"):
        DeltaLoRAOptimizer(torch.optim.SGD([triple.A]), [triple])


def test_refuses_flattened_copies():
    """Hold one flat tensor in place of A and B, as the optimizers of DeepSpeed and FSDP1 do."""
    W, A, B = small_layer()
    flat = torch.cat([A.detach().flatten(), B.detach().flatten()]).requires_grad_()
    with pytest.raises(ValueError, match=r"flattened copies \(DeepSpeed ZeRO, FSDP1, CPU offload\) cannot be"):
        DeltaLoRAOptimizer(torch.optim.SGD([flat]), [(W, A, B)])


def test_refuses_an_optimizer_of_deepspeed_by_name():
    class DeepSpeedZeroOptimizer:
        __module__ = "deepspeed.runtime.zero.stage_1_and_2"

        def __call__(self):
            raise AssertionError

    with pytest.raises(TypeError, match="DeepSpeed's optimizers step flattened copies"):
        DeltaLoRAOptimizer(DeepSpeedZeroOptimizer(), [small_layer()])


def test_refuses_W_in_the_inner_optimizer():
    triple = small_triple()
    with pytest.raises(ValueError, match="q: W is among the parameters of the inner SGD"):
        DeltaLoRAOptimizer(torch.optim.SGD(triple.tensors()), [triple])
    with pytest.raises(ValueError, match="q: W is among the parameters"):
        DeltaLoRAOptimizer(torch.optim.SGD, [triple], [triple.W])


def test_refuses_a_differentiable_inner_optimizer():
    with pytest.raises(ValueError, match="differentiable=True, but W is moved without a graph"):
        DeltaLoRAOptimizer(torch.optim.SGD, [small_layer()], lr=0.1, differentiable=True)


def test_refuses_an_inner_delta_lora_optimizer():
    W, A, B = small_layer()
    with pytest.raises(TypeError, match="inner is a DeltaLoRAOptimizer already"):
        DeltaLoRAOptimizer(DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)]), [(W, A, B)])


@pytest.mark.parametrize("rule", RULES)
def test_refuses_factors_replaced_in_the_groups(rule):
    """Replace them as the preparation of XLA and FSDP2 does; W would silently stay where it is."""
    W, A, B = small_layer()
    triple = LoRATriple(W, A, B, scaling=torch.tensor(1.0), name="q")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update=rule)
    optimizer.param_groups[0]["params"] = [p.detach().clone().requires_grad_() for p in (A, B)]
    refused(optimizer.step, ValueError, r"q: A is not among .*\n.*q: B is not among", kept=lambda: optimizer.step_count)


def test_W_among_named_parameters_is_refused():
    stored = strategies.make("linear")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple(name="q")], lr=0.1)
    for params in ([("base", stored.W)], [stored.W]):
        with pytest.raises(ValueError, match="params holds the W of q, which this optimizer moves itself"):
            optimizer.add_param_group({"params": params})


def test_a_problem_of_many_layers_is_one_line():
    """Two hundred layers with dropout or frozen factors make one sentence, not two hundred."""
    triples = []
    for i in range(200):
        stored = strategies.make("linear", seed=i)
        for factor in (stored.A, stored.B):
            factor.requires_grad_(False)
        triples.append(stored.triple(name=f"layers.{i}.q_proj"))
    with pytest.raises(
        ValueError, match=r"neither A nor B requires grad.*\(200 layers: layers\.0\.q_proj, .*\.\.\.\)"
    ) as caught:
        DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1)
    assert len(str(caught.value).splitlines()) == 2
    assert len(str(caught.value)) < 500


def test_a_capture_into_a_cuda_graph_is_refused(monkeypatch):
    """Act as a machine with a GPU; tests/cuda has the real thing."""
    stored = strategies.make("linear")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple(name="q")], lr=0.1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    refused(optimizer.step, RuntimeError, "being captured into a CUDA graph", kept=lambda: stored.W)
    assert optimizer.step_count == 0
