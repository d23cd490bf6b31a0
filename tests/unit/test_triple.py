"""Layouts are views, and every refusal of a triple says what came, what was expected and what to do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from deltaopt.tensors import memory_overlaps
from deltaopt.triple import check_triples
from tests.support import strategies


def tensors(c=4, d=6, r=2, **options):
    """W (c, d) frozen, A (c, r) and B (r, d) trained."""
    W = torch.randn(c, d, **options)
    A, B = torch.randn(c, r, requires_grad=True), torch.randn(r, d, requires_grad=True)
    return W, A, B


def refusal(*triples):
    """The message with which an optimizer refuses these triples; nothing may have changed."""
    with pytest.raises(ValueError, match="these triples can not be used") as caught:
        DeltaLoRAOptimizer(torch.optim.SGD, list(triples), lr=0.1)
    return str(caught.value)


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_the_matrix_of_W_is_a_view(layout):
    stored = strategies.make(layout)
    triple = stored.triple()
    view = triple.weight_matrix(stored.W)
    assert torch.equal(view, stored.matrix(stored.W)) or layout == "conv2d_channels_last"
    view.fill_(42.0)
    assert bool((stored.matrix(stored.W) == 42.0).all())


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_the_factors_multiply_in_the_order_of_the_weight(layout):
    """Also where the columns of W's matrix stand in another order than in storage."""
    stored = strategies.make(layout)
    triple = stored.triple()
    A, B = (factor.detach() for factor in triple.factor_matrices(triple.stored()))
    stored.W.zero_()
    triple.weight_matrix(stored.W).add_(A @ triple.columns_of(stored.W, B))
    _, dense_A, dense_B = stored.matrices()
    assert torch.allclose(stored.matrix(stored.W), dense_A @ dense_B, atol=1e-14)


def test_repr_shows_name_shapes_and_scaling():
    assert repr(LoRATriple(*tensors(), scaling=0.5, name="layer0.q")) == (
        "LoRATriple('layer0.q': W (4, 6), A (4, 2), B (2, 6), scaling=0.5)"
    )


def test_module_and_name_follow_a_replaced_parameter():
    linear = nn.Linear(6, 4, bias=False).requires_grad_(False)
    _, A, B = tensors()
    triple = LoRATriple((linear, "weight"), A, B, name="q")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
    old = linear.weight
    linear.weight = nn.Parameter(old.detach().clone(), requires_grad=False)
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    optimizer.step()
    assert not torch.equal(linear.weight, old)


def test_a_dotted_name_leads_through_submodules():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 4, bias=False)))
    assert LoRATriple((model, "0.0.weight"), *tensors()[1:]).W is model[0][0].weight


@pytest.mark.parametrize("scaling", [0.0, 0, float("nan"), float("inf"), -float("inf")])
def test_scaling_is_finite_and_not_zero(scaling):
    with pytest.raises(ValueError, match=r"layer0.q: scaling must be finite and not zero, got"):
        LoRATriple(*tensors(), scaling=scaling, name="layer0.q")
    with pytest.raises(ValueError, match="scaling must be finite and not zero"):
        DeltaLoRAOptimizer(torch.optim.SGD, [tensors()], scaling=scaling)


@pytest.mark.parametrize("scaling", ["2", None, True, 1j])
def test_scaling_is_a_number(scaling):
    with pytest.raises(TypeError, match=r"scaling is a number \(alpha / r\), got"):
        LoRATriple(*tensors(), scaling=scaling)


def test_layout_is_a_known_one():
    with pytest.raises(ValueError, match=r"layout is one of linear, transposed, .*, got 'diagonal'"):
        LoRATriple(*tensors(), layout="diagonal")


@pytest.mark.parametrize("bounds", [(2, 2), (-1, 2), (3, 1), (0,), [0, 2], (0.0, 2.0), 3])
def test_rows_and_columns_are_ranges(bounds):
    with pytest.raises(ValueError, match=r"rows is \(start, stop\) with 0 <= start < stop"):
        LoRATriple(*tensors(), rows=bounds)
    with pytest.raises(ValueError, match=r"columns is \(start, stop\) with 0 <= start < stop"):
        LoRATriple(*tensors(), columns=bounds)


def test_swapped_factors_are_told_as_such():
    W, A, B = tensors()
    message = refusal(LoRATriple(W, B, A, name="layer0.q"))
    assert "layer0.q: A (2, 6) and B (4, 2) are swapped: W is (4, 6) = (c, d)" in message
    assert "PEFT's lora_B is A here" in message


def test_swapped_factors_of_a_square_weight():
    W, A, B = tensors(c=6, d=6)
    assert "are swapped" in refusal((W, B, A))


@pytest.mark.parametrize(
    ("A_shape", "B_shape"), [((4, 2), (3, 6)), ((5, 2), (2, 6)), ((4, 2), (2, 5)), ((4, 0), (0, 6)), ((4,), (2, 6))]
)
def test_mismatched_shapes(A_shape, B_shape):
    A, B = torch.randn(A_shape, requires_grad=True), torch.randn(B_shape, requires_grad=True)
    message = refusal(LoRATriple(torch.randn(4, 6), A, B, name="layer0.q"))
    assert f"layer0.q: A {A_shape} and B {B_shape} do not fit W (4, 6)" in message
    assert "expected A of shape (4, r) and B of shape (r, 6)" in message


def test_a_weight_of_other_dimensions_than_its_layout():
    message = refusal(LoRATriple(torch.randn(24), *tensors()[1:], name="flat"))
    assert "flat: layout 'linear' expects W stored as (c, d), got (24,)" in message
    assert "FSDP1" in message


def test_a_slice_beyond_the_weight():
    message = refusal(LoRATriple(*tensors(), rows=(2, 9), name="q"))
    assert "q: no matrix view of W (4, 6)" in message


def test_a_convolution_that_can_not_be_viewed_as_a_matrix():
    W = torch.randn(4, 3, 2, 5)[..., :2]
    A, B = torch.randn(4, 2, requires_grad=True), torch.randn(2, 3, 2, 2, requires_grad=True)
    assert "no matrix view of W (4, 3, 2, 2)" in refusal(LoRATriple(W, A, B, layout="conv"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn])
def test_dtypes_that_can_not_be_moved(dtype):
    W = torch.zeros(4, 6).to(dtype)
    assert f"q: W has dtype {dtype}, expected float16, bfloat16" in refusal(LoRATriple(W, *tensors()[1:], name="q"))


def test_complex_factors():
    A = torch.randn(4, 2, dtype=torch.complex64, requires_grad=True)
    assert "q: A has dtype torch.complex64" in refusal(LoRATriple(tensors()[0], A, tensors()[2], name="q"))


def test_a_weight_that_requires_grad():
    W, A, B = tensors()
    assert "q: W requires grad: Delta-LoRA moves a frozen W" in refusal(LoRATriple(W.requires_grad_(), A, B, name="q"))


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_factor_that_does_not_require_grad(letter):
    W, A, B = tensors()
    (A if letter == "A" else B).requires_grad_(False)
    assert f"q: {letter} does not require grad, so no optimizer can train it" in refusal(LoRATriple(W, A, B, name="q"))


def test_a_weight_on_the_meta_device():
    message = refusal(LoRATriple(torch.empty(4, 6, device="meta"), *tensors()[1:], name="q"))
    assert "q: W is on the meta device (offloaded, or not loaded yet)" in message


def test_factors_on_another_device():
    A = torch.empty(4, 2, device="meta", requires_grad=True)
    assert "q: A is on meta and W on cpu: move them to one device" in refusal(
        LoRATriple(tensors()[0], A, tensors()[2], name="q")
    )


def test_an_inference_tensor():
    with torch.inference_mode():
        W = torch.randn(4, 6)
    assert "q: W was made under torch.inference_mode()" in refusal(LoRATriple(W, *tensors()[1:], name="q"))


def test_a_tensor_that_only_looks_plain():
    class Packed(torch.Tensor):
        pass

    W = torch.randn(4, 6).as_subclass(Packed)
    assert "Packed, expected a plain tensor or Parameter: quantized, sharded" in refusal(
        LoRATriple(W, *tensors()[1:], name="q")
    )


def test_a_deepspeed_partition():
    W, A, B = tensors()
    W.ds_id = 7  # how ZeRO-3 marks its parameters
    assert "q: W is partitioned by DeepSpeed ZeRO-3" in refusal(LoRATriple(W, A, B, name="q"))


def test_an_offloaded_layer():
    class Hook:
        offload = True

    class Chain:
        hooks = (Hook(),)

    for hook in (Hook(), Chain()):
        linear = nn.Linear(6, 4, bias=False).requires_grad_(False)
        linear._hf_hook = hook  # how accelerate marks a module
        triple = LoRATriple((linear, "weight"), *tensors()[1:], name="q")
        assert "q: W is offloaded by an accelerate hook" in refusal(triple)


def test_all_bad_layers_are_listed_at_once():
    W, A, B = tensors()
    message = refusal(
        LoRATriple(W, B, A, name="first"), LoRATriple(W.int(), A, B, name="second"), LoRATriple(*tensors(), name="fine")
    )
    assert "first: " in message
    assert "second: " in message
    assert "fine" not in message


def test_a_duplicate_triple():
    W, A, B = tensors()
    other = tensors()
    message = refusal(LoRATriple(W, A, B, name="q"), LoRATriple(W, other[1], other[2], name="k"))
    assert "k: its W shares memory with the W of q" in message


def test_overlapping_rows():
    W, A, B = tensors(c=8)
    message = refusal(
        LoRATriple(W, A[:5].detach().requires_grad_(), B, rows=(0, 5), name="q"),
        LoRATriple(W, A[4:].detach().requires_grad_(), B, rows=(4, 8), name="k"),
    )
    assert "k: its W shares memory with the W of q" in message


def test_factors_tied_through_storage():
    W, A, B = tensors(c=6, d=6)
    tied = nn.Parameter(A.detach().T)
    message = refusal(LoRATriple(W, A, B, name="q"), LoRATriple(torch.randn(6, 6), tensors(c=6)[1], tied, name="head"))
    assert "head: its B shares memory with A of q though they are two tensors (tied adapters)" in message


def test_one_factor_may_serve_two_weights():
    W, A, B = tensors()
    other = torch.randn(4, 6)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B), (other, A, torch.randn(2, 6, requires_grad=True))])
    assert len(optimizer.param_groups[0]["params"]) == 3


def test_two_triples_of_one_name():
    message = refusal(LoRATriple(*tensors(), name="q"), LoRATriple(*tensors(), name="q"))
    assert "q: two triples have this name; give each its own" in message


ranges = st.tuples(st.integers(0, 7), st.integers(1, 5)).map(lambda r: (r[0], min(8, r[0] + r[1])))


@given(st.tuples(*[ranges] * 3), st.tuples(*[ranges] * 3))
def test_overlap_of_blocks_of_a_stack_is_exact(first_block, second_block):
    base = torch.zeros(8, 8, 8)
    first, second = (base[tuple(slice(*r) for r in block)] for block in (first_block, second_block))
    first.add_(1)
    second.add_(1)
    shared = bool((base > 1).any())
    assert memory_overlaps(first, second) == shared


@given(ranges, ranges, ranges, ranges, st.booleans(), st.booleans())
def test_overlap_of_slices_is_exact(rows_1, columns_1, rows_2, columns_2, turn_1, turn_2):
    base = torch.zeros(8, 8)
    first, second = base[slice(*rows_1), slice(*columns_1)], base[slice(*rows_2), slice(*columns_2)]
    base.zero_()
    first.add_(1)
    second.add_(1)
    shared = bool((base > 1).any())
    first, second = first.T if turn_1 else first, second.T if turn_2 else second
    if min(*first.shape, *second.shape) > 1:
        assert memory_overlaps(first, second) == shared
    else:  # a single row or column has no leading stride to compare: never called disjoint when it is not
        assert memory_overlaps(first, second) or not shared


def test_overlap_of_two_shapes_of_one_memory():
    """The columns 0 and 1 of an (8, 8) are in part the columns 8 and 9 of the same memory as (4, 16)."""
    base = torch.zeros(64)
    assert memory_overlaps(base.view(8, 8)[:, :2], base.view(4, 16)[:, 8:10])
    around_the_edge = base.as_strided((2, 3), (8, 1), 6)  # columns 6, 7 and then 0 of the next row
    assert memory_overlaps(around_the_edge, base.view(8, 8)[:, :2])


def test_separate_tensors_do_not_overlap():
    check_triples([LoRATriple(*tensors(), name="q"), LoRATriple(*tensors(), name="k")])
    assert not memory_overlaps(torch.zeros(3), torch.zeros(3))


class MergingLinear(nn.Linear):
    """Keeps W and its branch in one module and says in `merged` whether W holds the branch, as loralib does."""

    def __init__(self):
        super().__init__(6, 4, bias=False)
        self.weight.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(4, 2))
        self.merged = False


def test_a_merged_branch_is_refused_at_registration_and_at_a_step():
    module = MergingLinear()
    triple = LoRATriple((module, "weight"), (module, "lora_B"), (module, "lora_A"), name="q")
    module.merged = True
    assert "q: the branch is merged into W" in refusal(triple)
    module.merged = False
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
    module.lora_A.grad, module.lora_B.grad = torch.ones(2, 6), torch.ones(4, 2)
    before = [p.detach().clone() for p in module.parameters()]
    module.merged = True
    with pytest.raises(RuntimeError, match="W can not be moved now:\n  q: the branch is merged into W"):
        optimizer.step()
    assert all(map(torch.equal, before, module.parameters()))
    module.merged = False
    optimizer.step()
    assert not torch.equal(module.weight, before[0])


def test_an_attribute_that_is_gone():
    module = MergingLinear()
    triple = LoRATriple((module, "weight"), (module, "lora_B"), (module, "lora_A"), name="q")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
    del module.lora_A
    with pytest.raises(
        RuntimeError, match=r"q: lora_A is not in its MergingLinear .*misspelt, or the adapter was deleted"
    ):
        optimizer.step()


def test_a_sharded_weight(tmp_path):
    """FSDP2 and tensor parallelism put a DTensor in place of the Parameter, under the optimizer's feet."""
    dist = pytest.importorskip("torch.distributed.tensor", reason="runs where torch is built with distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        linear = nn.Linear(6, 4, bias=False).requires_grad_(False)
        optimizer = DeltaLoRAOptimizer(
            torch.optim.SGD, [LoRATriple((linear, "weight"), *tensors()[1:], name="q")], lr=0.1
        )
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = dist.distribute_tensor(linear.weight, mesh, [dist.Shard(0)])
        linear.weight = nn.Parameter(sharded, requires_grad=False)
        with pytest.raises(ValueError, match=r"q: W is a torch.distributed.tensor.DTensor, expected a plain tensor"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def test_a_weight_that_is_computed():
    """Its parametrization makes a new tensor at each access, in which an update is lost."""
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4, bias=False)).requires_grad_(False)
    message = refusal(LoRATriple((linear, "weight"), *tensors()[1:], name="q"))
    assert "q: W is computed anew each time it is read (a parametrization such as weight_norm)" in message


def test_an_expanded_weight():
    W = torch.randn(1, 6).expand(4, 6)
    assert "q: W is expanded (strides (0, 1))" in refusal(LoRATriple(W, *tensors()[1:], name="q"))


@pytest.mark.parametrize(
    ("position", "source"), [(0, "weight"), (1, nn.Linear(2, 4)), (2, None), (0, (nn.Linear(6, 4), 3)), (0, (1, 2, 3))]
)
def test_what_is_no_tensor_and_no_place_of_one(position, source):
    sources = list(tensors())
    sources[position] = source
    with pytest.raises(TypeError, match=rf"{'WAB'[position]} is a tensor or \(module, 'attribute.path'\), got a?"):
        LoRATriple(*sources)


def test_a_name_of_its_own_is_not_written_into_the_users_triple():
    first, second = LoRATriple(*tensors()), LoRATriple(*tensors())
    one = DeltaLoRAOptimizer(torch.optim.SGD, [first, second])
    other = DeltaLoRAOptimizer(torch.optim.SGD, [second, first])
    assert first.name is None
    assert [t.name for t in one.triples] == [t.name for t in other.triples] == ["triple0", "triple1"]


def test_disjoint_rows_of_a_stack_of_experts():
    """As gate and up, fused in one weight."""
    W = torch.zeros(2, 8, 6)

    def half(start):
        A, B = torch.randn(2, 4, 2, requires_grad=True), torch.randn(2, 2, 6, requires_grad=True)
        return LoRATriple(W, A, B, layout="experts", rows=(start, start + 4), name=str(start))

    assert len(DeltaLoRAOptimizer(torch.optim.SGD, [half(0), half(4)]).triples) == 2
    assert "its W shares memory" in refusal(half(0), half(3))


def test_factors_that_shrink_in_place_get_other_buffers():
    W, A, B = tensors()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=0.1)
    for rank in (2, 1):
        A.data, B.data = A.data[:, :rank], B.data[:rank]
        A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
        before = W.clone(), (A @ B).detach()
        optimizer.step()
        assert torch.allclose(W - before[0], 2.0 * ((A @ B).detach() - before[1]), atol=1e-5)
