"""base_weights: every W as it was before its first move, and back, bit for bit."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from torch import nn

from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support import internals, strategies
from tests.support.compare import refused, relative
from tests.support.histories import random_run
from tests.support.runs import noisy_step
from tests.support.small import HandmadeLayer, run_without_displacement
from tests.support.strategies import RULES

SOURCES = [
    *("cpu", "device", "state_dict", "file"),
    *(pytest.param(kind, marks=pytest.mark.extra) for kind in ("safetensors", "folder")),
]


def moved_run(layout="linear", dtype=torch.float32, rule="in_place", steps=4, **options):
    """Train a layer until its W has moved."""
    options = {"inner": torch.optim.SGD, "lr": 0.05, "dtype": dtype, **options}
    run = random_run(rule, layout, **options).train(steps)
    assert not torch.equal(run.stored.W, run.W0)
    return run


def noisy_training(optimizer, holder, steps, seed=0):
    """Step on random gradients of the factors that `holder` has as A and B."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for factor in (holder.A, holder.B):
            factor.grad = torch.randn(factor.shape, generator=generator).to(factor.dtype)
        optimizer.step()


def source_for(kind, W0, folder):
    """Return the argument of base_weights that stands for `kind`; the base has another name among other tensors."""
    tensors = {"other.weight": torch.randn(3, 3), "layer.7.weight": torch.randn(W0.shape).to(W0.dtype), "w": W0}
    if kind == "state_dict":
        return tensors
    path = folder / ("base.pt" if kind == "file" else "model-00001-of-00001.safetensors")
    if kind == "file":
        torch.save(tensors, path)
    else:
        safetensors = pytest.importorskip("safetensors.torch", reason="runs where safetensors is installed")
        safetensors.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return folder if kind == "folder" else path


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_a_copy_or_a_source_gives_the_pristine_bits_and_the_moved_ones_come_back(layout, dtype, kind, tmp_path):
    keep = kind if kind in ("cpu", "device") else None
    run = moved_run(layout, dtype, keep_base=keep)
    source = None if keep else source_for(kind, run.W0, tmp_path)
    for steps in (0, 3):
        run.train(steps)
        moved = run.stored.W.clone()
        with run.optimizer.base_weights(source):
            assert torch.equal(run.stored.W, run.W0)
        assert torch.equal(run.stored.W, moved)


@pytest.mark.parametrize("keep", ["cpu", "device", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", RULES)
def test_the_branch_has_its_own_scaling_within(rule, dtype, keep):
    """Take what the folded rule put into the branch out of it, and put it back."""
    run = moved_run(dtype=dtype, rule=rule, keep_base=keep)
    moved, scale = run.stored.W.clone(), float(run.scale)
    assert (scale == run.scaling) == (rule == "in_place")
    with run.optimizer.base_weights(None if keep else {"w": run.W0}):
        assert torch.equal(run.stored.W, run.W0)
        assert float(run.scale) == run.scaling
        base = run.stored.matrix(run.W0.double())
        assert torch.equal(run.effective_exactly(), base + run.scaling * run.product())
    assert torch.equal(run.stored.W, moved)
    assert float(run.scale) == scale
    before = run.displacement()
    run.train(2)
    assert not torch.equal(run.displacement(), before)


@given(
    rule=strategies.rules,
    layout=strategies.layouts,
    dtype=strategies.wide_dtypes,
    start_step=strategies.early_start_steps,
    restarts=strategies.restarts,
    seed=strategies.seeds,
)
def test_without_either_it_is_computed_to_rounding(rule, layout, dtype, start_step, restarts, seed):
    run = moved_run(layout, dtype, rule, seed=seed, start_step=start_step)
    for i in range(restarts):
        if rule == "in_place":
            run.optimizer.groups[0].update_ratio = 0.5 + i
        run.optimizer.restart(generator=torch.Generator().manual_seed(seed))
        run.train(3)
    moved = run.stored.W.clone()
    with run.optimizer.base_weights():
        assert relative(run.stored.W, run.W0) < 8 * torch.finfo(dtype).eps
        assert float(run.scale) == run.scaling
    assert torch.equal(run.stored.W, moved)


@pytest.mark.parametrize("options", [{}, {"keep_base": "cpu"}])
@pytest.mark.parametrize("rule", RULES)
def test_before_the_first_move_W_is_its_base(rule, options):
    run = random_run(rule, dtype=torch.bfloat16, start_step=5, **options).train(1)
    with run.optimizer.base_weights():
        assert torch.equal(run.stored.W, run.W0)


@pytest.mark.parametrize("method", [None, "copy", "hooks"])
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("zero", [True, False])
def test_after_steps_that_moved_nothing_W_is_its_base(zero, rounding, method):
    """As after the first step of a warm-up, whose learning rate is 0."""
    run = random_run("in_place", zero=zero, dtype=torch.bfloat16, rounding=rounding, lr=0.0).train(2)
    assert run.optimizer.displacement("q").rank == 0
    with run.optimizer.base_weights(method=method):
        assert torch.equal(run.stored.W, run.W0)
    assert torch.equal(run.stored.W, run.W0)


@pytest.mark.parametrize("rule", RULES)
def test_weights_that_are_loaded_before_the_first_move_are_the_base(rule):
    """Build the optimizer before a checkpoint of the base is loaded."""
    run = random_run(rule, dtype=torch.float32, start_step=1, keep_base="cpu").train(1)
    run.stored.W.copy_(torch.randn(5, 7))
    W0 = run.stored.W.clone()
    run.train(2)
    assert not torch.equal(run.stored.W, W0)
    with run.optimizer.base_weights():
        assert torch.equal(run.stored.W, W0)


@pytest.mark.parametrize("rule", RULES)
def test_an_exception_within_puts_the_moved_bits_back(rule):
    run = moved_run(rule=rule, keep_base="cpu")
    before = [t.clone() for t in (*run.tensors, run.scale)]

    def fail():
        with run.optimizer.base_weights():
            assert torch.equal(run.stored.W, run.W0)
            raise KeyError("evaluation failed")

    with pytest.raises(KeyError, match="evaluation failed"):
        fail()
    assert all(map(torch.equal, before, (*run.tensors, run.scale)))
    run.train(1)  # and it may be stepped, and entered, again
    with run.optimizer.base_weights():
        assert torch.equal(run.stored.W, run.W0)


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
def test_refuses_what_reads_or_moves_W_within(action, method):
    optimizer, module = module_run("linear")
    moved, steps = module.weight.clone(), optimizer.step_count
    with optimizer.base_weights(method=method), pytest.raises(RuntimeError, match=r"within base_weights\(\)"):
        action(optimizer)
    assert torch.equal(module.weight, moved)
    assert optimizer.step_count == steps


def base_refused(run, error, message, **arguments):
    """Assert that base_weights refuses and was not entered."""
    refused(lambda: run.optimizer.base_weights(**arguments).__enter__(), error, message, kept=lambda: run.tensors)
    assert run.optimizer.state_dict()["param_groups"]


def test_refuses_a_source_without_the_base_by_name():
    run = moved_run()
    wrong = run.W0.clone()
    wrong[2, 3] += 1e-3
    message = r"q: no tensor of the source, taken as float32, .* \(5, 7\) .*hand in the checkpoint"
    base_refused(run, RuntimeError, message, source={"a": wrong, "b": torch.zeros(3)})
    base_refused(run, RuntimeError, message, source=nn.Linear(7, 5))


def test_refuses_other_arguments(tmp_path):
    run = moved_run()
    base_refused(run, ValueError, "method is one of", method="swap")
    base_refused(run, ValueError, "exclude each other", method="hooks", source={})
    base_refused(run, TypeError, "source is a state_dict, a model, a file or a folder", source=3)
    base_refused(run, FileNotFoundError, "no .safetensors file in", source=tmp_path)
    (tmp_path / "cut.pt").write_bytes(b"PK")
    base_refused(run, ValueError, r"cut.pt cannot be read", source=tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="keep_base is one of"):
        run.new_optimizer(keep_base="gpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_never_come_back_by_subtracting(dtype):
    """Register tensors: such a triple has no module that could carry a hook."""
    run = moved_run(dtype=dtype)
    base_refused(run, RuntimeError, r"q: it was registered by its tensors.*source=.*keep_base=\"cpu\"")
    base_refused(run, RuntimeError, "adding and then subtracting does not lead back.*hooks", method="copy")


@pytest.mark.parametrize("options", [{}, {"keep_base": "cpu"}])
def test_a_displacement_that_is_not_known_needs_a_copy(options):
    optimizer, W, W0 = run_without_displacement(**options)
    if options:
        with optimizer.base_weights():
            assert torch.equal(W, W0)
    else:
        with pytest.raises(RuntimeError, match=r"triple0: the displacement is not known.*base_weights\(source=...\)"):
            optimizer.base_weights().__enter__()
        with optimizer.base_weights({"W": W0}):
            assert torch.equal(W, W0)


def on_the_layer_of(run, **options):
    """Build an optimizer of another triple of the same layer."""
    return DeltaLoRAOptimizer(torch.optim.SGD, [run.stored.triple(run.scaling, name="q")], **options)


def test_a_copy_of_a_W_that_had_moved_is_not_taken_for_the_base():
    """Resume with the whole model in the checkpoint: that optimizer never saw the base."""
    run = moved_run()
    state = run.optimizer.state_dict()
    del run.optimizer  # while it exists, another one on its W says that W has moved
    resumed = on_the_layer_of(run, keep_base="cpu")
    with pytest.warns(RuntimeWarning, match=r"keep_base: .* of 1 layer \(q\) had moved"):
        resumed.load_state_dict(state)
    with resumed.base_weights():
        assert torch.allclose(run.stored.W, run.W0, atol=1e-5)
        assert not torch.equal(run.stored.W, run.W0)  # computed
    for source in ({"W": run.W0.clone()}, None):
        with resumed.base_weights(source):
            assert torch.equal(run.stored.W, run.W0)


def test_a_copy_from_before_the_whole_model_was_loaded_is_the_base():
    run = moved_run()
    moved = run.stored.W.clone()
    run.stored.W.copy_(run.W0)
    resumed = on_the_layer_of(run, keep_base="cpu")
    run.stored.W.copy_(moved)
    resumed.load_state_dict(run.optimizer.state_dict())
    with resumed.base_weights():
        assert torch.equal(run.stored.W, run.W0)
    assert torch.equal(run.stored.W, moved)


def test_a_copy_of_the_base_that_a_resume_moved_is_one():
    run = moved_run()
    state = run.optimizer.state_dict()
    del run.optimizer
    run.stored.W.zero_()
    resumed = on_the_layer_of(run, keep_base="cpu")
    run.stored.W.copy_(run.W0)  # the base is loaded after the optimizer was built
    resumed.load_state_dict(state)
    assert not torch.equal(run.stored.W, run.W0)
    with resumed.base_weights():
        assert torch.equal(run.stored.W, run.W0)


@pytest.mark.parametrize("place", ["cpu", "device"])
@pytest.mark.parametrize("rule", RULES)
def test_the_bytes_of_copies_are_counted(rule, place):
    plain, keeping = moved_run(rule=rule), moved_run(rule=rule, keep_base=place)
    assert keeping.optimizer.buffer_bytes == plain.optimizer.buffer_bytes + plain.stored.W.nbytes


# Layers as modules: compare what their hooks give with the layer as it was.


def _kernel(cls, ndim):
    return lambda: (cls(4, 5, [3, 2, 1][:ndim], padding=1, padding_mode="circular"), (2, 4, *[6] * ndim))


def conv1d_of_gpt2(out_features, in_features):
    utilities = pytest.importorskip("transformers.pytorch_utils", reason="runs where transformers is installed")
    return utilities.Conv1D(out_features, in_features)


LAYERS = {
    "linear": lambda: (nn.Linear(7, 5), (2, 3, 7)),
    "transposed": lambda: (conv1d_of_gpt2(5, 7), (2, 3, 7)),
    "embedding": lambda: (nn.Embedding(9, 5), (2, 3)),
    "conv1d": _kernel(nn.Conv1d, 1),
    "conv2d": _kernel(nn.Conv2d, 2),
    "conv3d": _kernel(nn.Conv3d, 3),
    "rows": lambda: (nn.Linear(7, 15), (4, 7)),
    "columns": lambda: (nn.Linear(12, 5), (4, 12)),
    "transposed_rows": lambda: (conv1d_of_gpt2(15, 7), (4, 7)),
}
PARTS = {
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


def module_run(kind, dtype=torch.float32, **options):
    """Return (optimizer, module) after some steps; the module holds W, A and B."""
    module, _ = layer_and_input(kind, dtype)
    layout = PARTS.get(kind, {"layout": "conv" if kind.startswith("conv") else kind})
    W = module.weight
    d1 = W.shape[1:] if layout["layout"] == "conv" else (9,) if kind == "embedding" else (7,)
    module.A, module.B = nn.Parameter(torch.randn(5, 3) / 3), nn.Parameter(torch.randn(3, *d1) / 3)
    triple = LoRATriple((module, "weight"), (module, "A"), (module, "B"), scaling=0.5, name="q", **layout)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [triple], lr=0.05, **options)
    noisy_training(optimizer, module, 3)
    return optimizer, module


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.extra] * kind.startswith("transposed")) for kind in LAYERS]
)
def test_hooks_give_the_pristine_output_and_touch_nothing(kind):
    torch.manual_seed(1)
    _, x = layer_and_input(kind)
    torch.manual_seed(0)
    pristine, _ = layer_and_input(kind)
    torch.manual_seed(0)
    optimizer, module = module_run(kind)
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
    optimizer, module = module_run("linear")
    x = torch.randn(7, requires_grad=True)
    with optimizer.base_weights(method="hooks"):
        (grad,) = torch.autograd.grad(module(input=x).sum(), x)
    (expected,) = torch.autograd.grad(pristine(input=x).sum(), x)
    assert torch.allclose(grad, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_layer_takes_hooks_by_itself(dtype):
    """Subtract what W was asked to move by, in float32, rounded once with the output."""
    optimizer, module = module_run("linear", dtype)
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
    optimizer, module = module_run("linear")
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
    noisy_training(optimizer, module, 1)
    with pytest.raises(RuntimeError, match=r"q: what a Own with the layout 'linear' computes.*keep_base"):
        optimizer.base_weights(method="hooks").__enter__()


class Scaled(nn.Embedding):
    """Compute something of its own, as Gemma's embedding does."""

    def forward(self, ids):
        return super().forward(ids) * 4


@pytest.mark.parametrize("module", [Scaled(9, 5), nn.Embedding(9, 5, max_norm=1.0)])
def test_layers_that_compute_something_of_their_own_are_refused(module):
    module.requires_grad_(False)
    module.A, module.B = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3, 9))
    triple = LoRATriple((module, "weight"), (module, "A"), (module, "B"), name="q", layout="embedding")
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, [triple], lr=0.1)
    noisy_training(optimizer, module, 1)
    with pytest.raises(
        RuntimeError, match=r"q: what a \w+ with the layout 'embedding' computes.*inherit their forward pass"
    ):
        optimizer.base_weights(method="hooks").__enter__()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_cast_within_gets_its_moved_weights_back(dtype):
    """Look up its W, which is another tensor then."""
    optimizer, module = module_run("linear", dtype, keep_base="cpu")
    moved = module.weight.clone()
    with optimizer.base_weights():
        module.double()
        module.to(dtype)
    assert torch.equal(module.weight, moved)


def test_a_source_in_the_dtype_it_was_is_found_after_a_cast():
    layer = HandmadeLayer()
    W0 = layer.weight.clone()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [layer.triple()], lr=0.1)
    noisy_training(optimizer, layer, 1)
    layer.bfloat16()
    assert not torch.equal(layer.weight, W0.bfloat16())
    with optimizer.base_weights(source={"W": W0}):
        assert torch.equal(layer.weight, W0.bfloat16())


@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_fails_before_anything_moved_fixes_no_base(rule):
    run = random_run(rule, dtype=torch.float32, zero=True, keep_base="cpu")
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        run.optimizer.step(lambda: 1 / 0)
    run.stored.W.copy_(torch.randn(5, 7))
    W0 = run.stored.W.clone()
    run.train(1)
    with run.optimizer.base_weights():
        assert torch.equal(run.stored.W, W0)


@pytest.mark.parametrize("action", ["base_weights", "state_dict", "load_state_dict"])
def test_a_merged_branch_is_refused(action):
    optimizer, module = module_run("linear")
    state = optimizer.state_dict()
    module.merged = True
    with pytest.raises(RuntimeError, match="q: the branch is merged into W"):
        {
            "base_weights": lambda: optimizer.base_weights().__enter__(),
            "state_dict": optimizer.state_dict,
            "load_state_dict": lambda: optimizer.load_state_dict(state),
        }[action]()


def test_names_all_layers_without_a_base_at_once_and_changes_none():
    runs = [random_run("in_place", seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    triples = [run.stored.triple(name=f"layer{i}") for i, run in enumerate(runs)]
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=0.1)
    for run in runs:
        run.set_gradients()
    optimizer.step()
    refused(
        lambda: optimizer.base_weights({"W": runs[1].W0}).__enter__(),
        RuntimeError,
        r"no tensor of the source.*\(2 layers: layer0, layer2\)",
        kept=lambda: [run.stored.W for run in runs],
    )


def test_the_path_of_a_gpu_is_settled_before_the_base_is_asked_for():
    run = moved_run(weight_update=internals.as_on_a_gpu(reports=itertools.repeat(False)))
    with run.optimizer.base_weights():
        assert torch.allclose(run.stored.W, run.W0, atol=1e-5)


@pytest.mark.parametrize(("module", "layout"), [(nn.Linear(7, 5, bias=False), "transposed"), (None, "linear")])
def test_hooks_are_refused_for_a_layout_that_the_class_does_not_have(module, layout):
    """A Conv1D is transposed, and a Linear is not."""

    class Conv1D(nn.Linear):
        def forward(self, x):
            return x @ self.weight

    module = Conv1D(7, 5, bias=False) if module is None else module
    module.weight.requires_grad_(False)
    c, d = module.weight.shape if layout == "linear" else module.weight.shape[::-1]
    A, B = torch.randn(c, 2, requires_grad=True), torch.randn(2, d, requires_grad=True)
    triple = LoRATriple((module, "weight"), A, B, name="q", layout=layout)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
    noisy_step(optimizer, A, B)
    with (
        pytest.raises(RuntimeError, match=f"q: what a .* with the layout '{layout}' computes"),
        optimizer.base_weights(method="hooks"),
    ):
        pass


@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_a_base_computed_in_one_pass_is_the_base_to_rounding_after_large_products(layout):
    """The products are much larger than their change, and than W."""
    tensors = strategies.make(layout, dtype=torch.float32)
    with torch.no_grad():
        tensors.A.mul_(300.0)
        tensors.B.mul_(300.0)
    optimizer, W0 = DeltaLoRAOptimizer(torch.optim.SGD, [tensors.triple()], lr=1e-4), tensors.W.clone()
    noisy_training(optimizer, tensors, 3)
    moved = (tensors.W - W0).abs().max()
    with optimizer.base_weights():
        assert float((tensors.W - W0).abs().max()) < 1e-5 * float(W0.abs().max() + moved)
    assert moved > 0


def test_W_is_not_read_to_see_if_it_came_back_from_its_base(monkeypatch):
    layer = HandmadeLayer()
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [layer.triple()], lr=0.1)
    noisy_training(optimizer, layer, 2)
    with optimizer.base_weights():
        pass
    taken = internals.fingerprints_of_weights(monkeypatch)
    noisy_training(optimizer, layer, 1)
    with optimizer.base_weights():
        pass
    assert taken == []
    with torch.no_grad():
        layer.weight.mul_(1.0)
    noisy_training(optimizer, layer, 1)
    assert len(taken) == 1  # somebody else has written W
