"""base_weights: every W as it was before its first move, and back, bit for bit."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaopt import DeltaLoRAOptimizer, LoRATriple, update
from tests.support import strategies
from tests.unit.test_ledger import lost

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SOURCES = ["cpu", "device", "state_dict", "file", "safetensors", "folder"]


def train(optimizer, stored, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for factor in (stored.A, stored.B):
            factor.grad = torch.randn(factor.shape, generator=generator).to(factor.dtype)
        optimizer.step()


def trained(layout="linear", dtype=torch.float32, steps=4, seed=0, **options):
    """A layer in the middle of a run, its optimizer, and what W was before."""
    stored = strategies.make(layout, seed, dtype=dtype)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple(0.5, name="q")], lr=0.05, **options)
    W0 = stored.W.clone()
    train(optimizer, stored, steps)
    assert not torch.equal(stored.W, W0)
    return stored, optimizer, W0


def source_for(kind, W0, folder):
    """The argument of base_weights that stands for `kind`; the tensor goes by another name among others."""
    tensors = {"other.weight": torch.randn(3, 3), "layer.7.weight": torch.randn(W0.shape).to(W0.dtype), "w": W0}
    if kind == "state_dict":
        return tensors
    path = folder / ("base.pt" if kind == "file" else "model-00001-of-00001.safetensors")
    if kind == "file":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return folder if kind == "folder" else path


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_with_a_copy_or_a_source_the_pristine_bits_come_and_the_moved_ones_come_back(layout, dtype, kind, tmp_path):
    keep = kind if kind in ("cpu", "device") else None
    stored, optimizer, W0 = trained(layout, dtype, keep_base=keep)
    source = None if keep else source_for(kind, W0, tmp_path)
    for steps in (0, 3):
        train(optimizer, stored, steps, seed=1)
        moved = stored.W.clone()
        with optimizer.base_weights(source):
            assert torch.equal(stored.W, W0)
        assert torch.equal(stored.W, moved)


@given(
    layout=strategies.layouts,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    start_step=st.integers(0, 3),
    restarts=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_without_either_it_is_computed_to_rounding(layout, dtype, start_step, restarts, seed):
    stored, optimizer, W0 = trained(layout, dtype, seed=seed, start_step=start_step)
    for i in range(restarts):
        optimizer.groups[0].update_ratio = 0.5 + i
        optimizer.restart(generator=torch.Generator().manual_seed(seed))
        train(optimizer, stored, 3, seed=i)
    moved = stored.W.clone()
    with optimizer.base_weights():
        error = (stored.W - W0).double().norm() / W0.double().norm()
        assert float(error) < 8 * torch.finfo(dtype).eps
    assert torch.equal(stored.W, moved)


@pytest.mark.parametrize("options", [{}, {"keep_base": "cpu"}])
def test_before_the_first_move_W_is_its_base(options):
    stored = strategies.make("linear", dtype=torch.bfloat16)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [stored.triple()], start_step=5, **options)
    W0 = stored.W.clone()
    with optimizer.base_weights():
        assert torch.equal(stored.W, W0)


def test_weights_that_are_loaded_before_the_first_move_are_the_base():
    """An optimizer may be built before a checkpoint of the base is loaded."""
    stored = strategies.make("linear", dtype=torch.float32)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [stored.triple()], lr=0.1, start_step=1, keep_base="cpu")
    train(optimizer, stored, 1)
    stored.W.copy_(torch.randn(5, 7))
    W0 = stored.W.clone()
    train(optimizer, stored, 2)
    with optimizer.base_weights():
        assert torch.equal(stored.W, W0)


def test_an_exception_within_puts_the_moved_bits_back():
    stored, optimizer, W0 = trained(keep_base="cpu")
    moved = stored.W.clone()

    def fail():
        with optimizer.base_weights():
            assert torch.equal(stored.W, W0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(stored.W, moved)
    train(optimizer, stored, 1)  # and it may be stepped, and entered, again
    with optimizer.base_weights():
        assert torch.equal(stored.W, W0)


@pytest.mark.parametrize(
    "action",
    [
        lambda optimizer: optimizer.step(),
        lambda optimizer: optimizer.state_dict(),
        lambda optimizer: optimizer.load_state_dict({}),
        lambda optimizer: optimizer.restart(),
        lambda optimizer: optimizer.resync(),
        lambda optimizer: optimizer.rebase(),
        lambda optimizer: optimizer.accounts(),
        lambda optimizer: copy.deepcopy(optimizer),
        lambda optimizer: optimizer.base_weights().__enter__(),
    ],
    ids=["step", "state_dict", "load_state_dict", "restart", "resync", "rebase", "accounts", "copy", "nested"],
)
@pytest.mark.parametrize("method", ["copy", "hooks"])
def test_what_reads_or_moves_W_is_refused_within(action, method):
    _, optimizer, layer = trained_layer("linear")
    moved, steps = layer.weight.clone(), optimizer.step_count
    with optimizer.base_weights(method=method), pytest.raises(RuntimeError, match=r"within base_weights\(\)"):
        action(optimizer)
    assert torch.equal(layer.weight, moved)
    assert optimizer.step_count == steps


def refused(optimizer, stored, message, error=RuntimeError, **arguments):
    moved = stored.W.clone()
    with pytest.raises(error, match=message):
        optimizer.base_weights(**arguments).__enter__()
    assert torch.equal(stored.W, moved)
    optimizer.state_dict()  # it was not entered


def test_a_source_without_the_base_is_refused_by_name(tmp_path):
    stored, optimizer, W0 = trained()
    wrong = W0.clone()
    wrong[2, 3] += 1e-3
    message = r"q: no tensor of the source, taken as float32, .* \(5, 7\) .*hand in the checkpoint"
    refused(optimizer, stored, message, source={"a": wrong, "b": torch.zeros(3)})
    refused(optimizer, stored, message, source=nn.Linear(7, 5))


def test_other_arguments(tmp_path):
    stored, optimizer, _ = trained()
    refused(optimizer, stored, "method is one of", ValueError, method="swap")
    refused(optimizer, stored, "exclude each other", ValueError, method="hooks", source={})
    refused(optimizer, stored, "source is a state_dict, a model, a file or a folder", TypeError, source=3)
    refused(optimizer, stored, "no .safetensors file in", FileNotFoundError, source=tmp_path)
    (tmp_path / "cut.pt").write_bytes(b"PK")
    refused(optimizer, stored, "cut.pt can not be read", ValueError, source=tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="keep_base is one of"):
        DeltaLoRAOptimizer(torch.optim.AdamW, [stored.triple()], keep_base="gpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_never_come_back_by_subtracting(dtype):
    """A triple of tensors has no module that could carry a hook."""
    stored, optimizer, _ = trained(dtype=dtype)
    refused(optimizer, stored, r"q: it was registered by its tensors.*source=.*keep_base=\"cpu\"")
    refused(optimizer, stored, "in which adding and then subtracting does not lead back.*hooks", method="copy")


@pytest.mark.parametrize("options", [{}, {"keep_base": "cpu"}])
def test_a_displacement_that_is_not_known_needs_a_copy(options):
    optimizer, W, W0 = lost(**options)
    if options:
        with optimizer.base_weights():
            assert torch.equal(W, W0)
    else:
        with pytest.raises(RuntimeError, match=r"triple0: the displacement is not known.*base_weights\(source=...\)"):
            optimizer.base_weights().__enter__()
        with optimizer.base_weights({"W": W0}):
            assert torch.equal(W, W0)


def test_a_copy_of_a_W_that_had_moved_is_not_taken_for_the_base():
    """An optimizer that resumes with the whole model in the checkpoint never saw the base."""
    stored, optimizer, W0 = trained()
    resumed = DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple(0.5, name="q")], keep_base="cpu")
    with pytest.warns(RuntimeWarning, match=r"keep_base: the W of 1 layers \(q, ..\) had moved.*kept from then on"):
        resumed.load_state_dict(optimizer.state_dict())
    with resumed.base_weights():
        assert torch.allclose(stored.W, W0, atol=1e-5)
        assert not torch.equal(stored.W, W0)  # computed
    for source in ({"W": W0.clone()}, None):
        with resumed.base_weights(source):
            assert torch.equal(stored.W, W0)


def test_a_copy_from_before_the_whole_model_was_loaded_is_the_base():
    stored, optimizer, W0 = trained()
    moved = stored.W.clone()
    stored.W.copy_(W0)
    resumed = DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple(0.5, name="q")], keep_base="cpu")
    stored.W.copy_(moved)
    resumed.load_state_dict(optimizer.state_dict())
    with resumed.base_weights():
        assert torch.equal(stored.W, W0)
    assert torch.equal(stored.W, moved)


def test_a_copy_of_the_base_that_a_resume_moved_is_one():
    stored, optimizer, W0 = trained()
    state = optimizer.state_dict()
    stored.W.zero_()
    resumed = DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple(0.5, name="q")], keep_base="cpu")
    stored.W.copy_(W0)  # the base is loaded after the optimizer was built
    resumed.load_state_dict(state)
    assert not torch.equal(stored.W, W0)
    with resumed.base_weights():
        assert torch.equal(stored.W, W0)


@pytest.mark.parametrize("place", ["cpu", "device"])
def test_the_bytes_of_copies_are_counted(place):
    stored, plain, _ = trained()
    _, keeping, _ = trained(keep_base=place)
    assert keeping.buffer_bytes == plain.buffer_bytes + stored.W.nbytes


# Layers as modules: what their hooks give is compared with the layer as it was.


def _kernel(cls, ndim):
    return lambda: (cls(4, 5, [3, 2, 1][:ndim], padding=1, padding_mode="circular"), (2, 4, *[6] * ndim))


LAYERS = {
    "linear": lambda: (nn.Linear(7, 5), (2, 3, 7)),
    "transposed": lambda: (Conv1D(5, 7), (2, 3, 7)),
    "embedding": lambda: (nn.Embedding(9, 5), (2, 3)),
    "conv1d": _kernel(nn.Conv1d, 1),
    "conv2d": _kernel(nn.Conv2d, 2),
    "conv3d": _kernel(nn.Conv3d, 3),
    "rows": lambda: (nn.Linear(7, 15), (4, 7)),
    "columns": lambda: (nn.Linear(12, 5), (4, 12)),
    "transposed_rows": lambda: (Conv1D(15, 7), (4, 7)),
}
OPTIONS = {
    "rows": {"layout": "linear", "rows": (3, 8)},
    "columns": {"layout": "linear", "columns": (1, 8)},
    "transposed_rows": {"layout": "transposed", "rows": (3, 8)},
}


def layer_and_input(kind, dtype=torch.float32):
    module, shape = LAYERS[kind]()
    if kind == "transposed":
        nn.init.normal_(module.weight)  # Conv1D starts very small
    x = torch.randint(9, shape) if kind == "embedding" else torch.randn(shape, dtype=dtype)
    return module.to(dtype).requires_grad_(False), x


def trained_layer(kind, dtype=torch.float32, **options):
    """(factors, optimizer, module) after some steps; the module holds W, A and B."""
    module, _ = layer_and_input(kind, dtype)
    layout = OPTIONS.get(kind, {"layout": "conv" if kind.startswith("conv") else kind})
    W = module.weight
    d1 = W.shape[1:] if layout["layout"] == "conv" else (9,) if kind == "embedding" else (7,)
    module.A, module.B = nn.Parameter(torch.randn(5, 3) / 3), nn.Parameter(torch.randn(3, *d1) / 3)
    triple = LoRATriple((module, "weight"), (module, "A"), (module, "B"), scaling=0.5, name="q", **layout)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [triple], lr=0.05, **options)
    train(optimizer, module, 3)
    return module, optimizer, module


@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_give_the_pristine_output_and_touch_nothing(kind):
    torch.manual_seed(1)
    _, x = layer_and_input(kind)
    torch.manual_seed(0)
    pristine, _ = layer_and_input(kind)
    torch.manual_seed(0)
    _, optimizer, module = trained_layer(kind)
    moved, version = module.weight.clone(), module.weight._version
    after = module(x)
    assert not torch.allclose(after, pristine(x), atol=1e-3)
    with optimizer.base_weights(method="hooks"):
        assert torch.allclose(module(x), pristine(x), atol=1e-5)
    assert torch.equal(module(x), after)
    assert (module.weight._version, torch.equal(module.weight, moved)) == (version, True)
    assert not module._forward_hooks


def test_hooks_by_keyword_without_batch_and_through_gradients():
    torch.manual_seed(0)
    pristine, _ = layer_and_input("linear")
    torch.manual_seed(0)
    _, optimizer, module = trained_layer("linear")
    x = torch.randn(7, requires_grad=True)
    with optimizer.base_weights(method="hooks"):
        (grad,) = torch.autograd.grad(module(input=x).sum(), x)
    (expected,) = torch.autograd.grad(pristine(input=x).sum(), x)
    assert torch.allclose(grad, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_layer_takes_hooks_by_itself(dtype):
    """What is subtracted is what W was asked to move by, in float32, rounded once with the output."""
    _, optimizer, module = trained_layer("linear", dtype)
    moved, x = module.weight.clone(), torch.randn(4, 7).to(dtype)
    with optimizer.base_weights():
        assert torch.equal(module.weight, moved)
        found = module(x)
    assert found.dtype == dtype
    asked = optimizer.displacement("q").product()
    expected = (moved.float() - asked) @ x.float().T + module.bias.float()[:, None]
    assert torch.allclose(found.float(), expected.T, atol=8 * torch.finfo(dtype).eps)


def test_hooks_under_autocast_keep_their_precision():
    torch.manual_seed(0)
    pristine, _ = layer_and_input("linear")
    torch.manual_seed(0)
    _, optimizer, module = trained_layer("linear")
    x = torch.randn(4, 7)
    with optimizer.base_weights(method="hooks"), torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved = module(x)
    expected = moved.float() - (x @ optimizer.displacement("q").product().mT).detach()
    assert torch.equal(found, expected.bfloat16())
    assert torch.allclose(found.float(), pristine(x), atol=0.1)


def test_a_layer_that_hooks_do_not_know_is_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 7), requires_grad=False)

    module = Own()
    module.A, module.B = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3, 7))
    triple = LoRATriple((module, "weight"), (module, "A"), (module, "B"), name="q")
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [triple], lr=0.1)
    train(optimizer, module, 1)
    with pytest.raises(RuntimeError, match=r"q: what a Own with the layout 'linear' computes.*keep_base"):
        optimizer.base_weights(method="hooks").__enter__()


class Scaled(nn.Embedding):
    """As Gemma's: what a subclass computes is its own."""

    def forward(self, ids):
        return super().forward(ids) * 4


@pytest.mark.parametrize("module", [Scaled(9, 5), nn.Embedding(9, 5, max_norm=1.0)])
def test_layers_that_compute_something_of_their_own_are_refused(module):
    module.requires_grad_(False)
    module.A, module.B = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3, 9))
    triple = LoRATriple((module, "weight"), (module, "A"), (module, "B"), name="q", layout="embedding")
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [triple], lr=0.1)
    train(optimizer, module, 1)
    with pytest.raises(RuntimeError, match=r"q: what a \w+ with the layout 'embedding' computes.*no classes made from"):
        optimizer.base_weights(method="hooks").__enter__()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_cast_within_gets_its_moved_weights_back(dtype):
    """Its W is another tensor then, which is looked up."""
    _, optimizer, module = trained_layer("linear", dtype, keep_base="cpu")
    moved = module.weight.clone()
    with optimizer.base_weights():
        module.double()
        module.to(dtype)
    assert torch.equal(module.weight, moved)


def test_a_source_in_the_dtype_it_was_is_found_after_a_cast():
    stored, _, W0 = trained()
    twin = nn.Linear(7, 5, bias=False).requires_grad_(False)
    twin.weight.copy_(W0)
    twin.A, twin.B = nn.Parameter(stored.A.detach().clone()), nn.Parameter(stored.B.detach().clone())
    triple = LoRATriple((twin, "weight"), (twin, "A"), (twin, "B"), name="q")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
    train(optimizer, twin, 1)
    twin.bfloat16()
    with optimizer.base_weights(source={"W": W0}):
        assert torch.equal(twin.weight, W0.bfloat16())


def test_a_step_that_fails_before_anything_moved_fixes_no_base():
    stored = strategies.make("linear", dtype=torch.float32)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple()], lr=0.1, keep_base="cpu")
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    stored.W.copy_(torch.randn(5, 7))
    W0 = stored.W.clone()
    train(optimizer, stored, 1)
    with optimizer.base_weights():
        assert torch.equal(stored.W, W0)


@pytest.mark.parametrize("action", ["base_weights", "state_dict", "load_state_dict"])
def test_a_merged_branch_is_refused(action):
    _, optimizer, module = trained_layer("linear")
    state = optimizer.state_dict()
    module.merged = True
    with pytest.raises(RuntimeError, match="q: the branch is merged into W"):
        {
            "base_weights": lambda: optimizer.base_weights().__enter__(),
            "state_dict": optimizer.state_dict,
            "load_state_dict": lambda: optimizer.load_state_dict(state),
        }[action]()


def test_all_layers_that_can_not_are_named_at_once_and_none_is_changed():
    stored = [strategies.make("linear", seed, dtype=torch.bfloat16) for seed in range(3)]
    W0 = stored[1].W.clone()
    triples = [s.triple(name=f"layer{i}") for i, s in enumerate(stored)]
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=0.1)
    for s in stored:
        s.A.grad, s.B.grad = torch.ones_like(s.A), torch.ones_like(s.B)
    optimizer.step()
    moved = [s.W.clone() for s in stored]
    with pytest.raises(RuntimeError, match=r"(?s)layer0: .*layer2: "):
        optimizer.base_weights({"W": W0}).__enter__()
    assert all(torch.equal(s.W, m) for s, m in zip(stored, moved, strict=True))


def test_the_path_of_a_gpu_is_settled_before_the_base_is_asked_for(monkeypatch):
    monkeypatch.setattr(update, "_known_to_host", lambda device: False)
    monkeypatch.setattr(update._Entry, "arrived", lambda self: False)
    stored, optimizer, W0 = trained()
    with optimizer.base_weights():
        assert torch.allclose(stored.W, W0, atol=1e-5)
