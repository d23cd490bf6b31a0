"""The base by itself under torch.compile: nothing goes stale, and nothing is compiled for each layer or each step."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from deltaopt import DeltaLoRAOptimizer
from tests.integrations.test_peft_base import EXACT, Frozen, trained, two_adapters
from tests.support.models import batches, causal_lm, loss_of
from tests.support.nightly import later, one_in
from tests.support.peft_layers import lora_layers, output, randomised, train_model, weight
from tests.support.peft_runs import peft_asks_by_an_old_name
from tests.support.strategies import each_rule

# isort: split
from peft import LoraConfig, get_peft_model

pytestmark = [
    peft_asks_by_an_old_name,
    # torch.compile asks tensors that are no leaves for their gradients.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

BFLOAT16 = {"rtol": 0.02, "atol": 0.02}
"""Of outputs of order 1."""

each_way = pytest.mark.parametrize("keep_base", [None, "cpu"], ids=["by the displacement", "by a copy"])


@pytest.fixture(autouse=True)
def _nothing_is_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    """A layer of a model whose layers are compiled one by one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def assert_differ(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() > 1e-2


def by_method(model: nn.Module, **options) -> nn.Module:
    model.compile(**options)
    return model


@torch.no_grad()
def assert_compiled_base(compiled: nn.Module, model: nn.Module, frozen: Frozen, x, tolerance=None) -> None:
    """Like `assert_base_by_itself`, of a model and what was compiled from it."""
    tolerance = EXACT if tolerance is None else tolerance
    with model.disable_adapter():
        torch.testing.assert_close(output(compiled, x), frozen.base(x), **tolerance)
    model.set_adapter("other")
    torch.testing.assert_close(output(compiled, x), frozen.with_adapter("other", x), **tolerance)
    model.set_adapter("default")
    policy = output(compiled, x)
    assert (policy - frozen.with_adapter("default", x)).abs().max() > 1e-2
    torch.testing.assert_close(policy, output(copy.deepcopy(model), x), **tolerance)


@pytest.mark.parametrize(
    ("when", "compile_model", "rule"),
    one_in(
        2,
        ["before the layers are found", "after the optimizer is built"],
        [(torch.compile, "in_place"), (by_method, "folded")],
    ),
)
def test_a_compiled_model_gives_the_base(when, compile_model, rule):
    """Graphs of both states that were made before there were hooks are not run any more."""
    model, x = two_adapters()
    frozen = Frozen(model)
    options = {"backend": "aot_eager", "fullgraph": True}
    if when == "before the layers are found":
        compiled = compile_model(model, **options)
        for state in ("default", "other"):
            model.set_adapter(state)
            compiled(x).sum().backward()
            with torch.no_grad():
                compiled(x)
                with model.disable_adapter():
                    compiled(x)
        model.set_adapter("default")
        trained(model, x, rule)
    else:
        trained(model, x, rule)
        compiled = compile_model(model, **options)
    assert_compiled_base(compiled, model, frozen, x)


def test_inductor_gives_the_base():
    model, x = two_adapters("conv2d")
    frozen = Frozen(model)
    model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    trained(model, x)
    assert_compiled_base(torch.compile(model, backend="inductor", fullgraph=True), model, frozen, x)


@each_rule
@each_way
def test_the_correction_does_not_go_stale_and_nothing_is_compiled_again(rule, keep_base):
    """While W moves, as the ratio changes, and over a restart, which changes the rank of the displacement."""
    model, x = two_adapters()
    frozen = Frozen(model)
    optimizer = trained(model, x, rule, keep_base=keep_base)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def base():
        with torch.no_grad(), model.disable_adapter():
            torch.testing.assert_close(compiled(x), frozen.base(x), **EXACT)

    base()
    assert counter.frame_count == 1
    W = weight(lora_layers(model)["base_model.model.0"])
    for event in ("step", "step", "ratio", "step", "restart", "step"):
        before = W.clone()
        if event == "ratio":
            optimizer.groups[0].update_ratio = 0.5
        elif event == "restart":
            optimizer.restart()
        else:
            train_model(model, optimizer, x, steps=1)
        assert rule == "folded" or event == "ratio" or not torch.equal(W, before)
        model.eval()
        base()
    assert counter.frame_count == 1


def test_a_compiled_optimizer_model_trains_on_its_own_graphs():
    """The optimizer is built for what torch.compile returns; training and reference have two graphs for all steps."""
    model, x = two_adapters()
    frozen = Frozen(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = DeltaLoRAOptimizer.for_model(compiled, torch.optim.AdamW, lr=2e-2, update_ratio=2.0)
    for _ in range(4):
        with torch.no_grad(), model.disable_adapter():
            torch.testing.assert_close(compiled(x), frozen.base(x), **EXACT)
        train_model(compiled, optimizer, x, steps=1)
    assert counter.frame_count == 2
    model.eval()
    assert_compiled_base(compiled, model, frozen, x)


def test_layers_that_are_compiled_one_by_one_have_one_graph():
    """As in regional compilation: a graph for each of them would soon be more than torch makes."""
    blocks = nn.Sequential(*[Block(5) for _ in range(torch._dynamo.config.recompile_limit + 2)]).double()
    model = randomised(get_peft_model(blocks, LoraConfig(r=2, target_modules=["linear"])))
    frozen, x = Frozen(model), torch.randn(3, 5, dtype=torch.float64)
    trained(model, x)
    counter = CompileCounter()
    for block in model.base_model.model:
        block.compile(backend=counter, fullgraph=True)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(x), frozen.base(x), **EXACT)
    assert counter.frame_count == 1


def test_models_with_the_same_code_have_their_own_corrections():
    model, x = two_adapters()
    frozen = Frozen(model)
    optimizer = trained(model, x)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    train_model(twin, its_optimizer, x, steps=3)
    twin.eval()
    compiled = {net: torch.compile(net, backend="eager", fullgraph=True) for net in (model, twin)}
    for net in (model, twin, model):
        assert_compiled_base(compiled[net], net, frozen, x)


@pytest.mark.parametrize(
    ("name", "parts"), one_in(2, ["experts_3_7x5_up", "conv2d", "linear", "embedding"], ["model", "layers"])
)
def test_a_plain_model_with_the_same_code_is_told_apart(name, parts):
    """Torch does not check for hooks before it runs a graph: those of the plain model would do for ours."""
    model, x = two_adapters(name)
    plain, frozen = copy.deepcopy(model).eval(), Frozen(model)
    trained(model, x)
    run = {}
    for net in (plain, model):
        if parts == "model":
            run[net] = torch.compile(net, backend="eager")
        else:
            run[net] = net
            for layer in lora_layers(net).values():
                layer.compile(backend="eager")
    with torch.no_grad():
        for net in (plain, model, plain, model):
            with net.disable_adapter():
                torch.testing.assert_close(output(run[net], x), frozen.base(x), **EXACT)
            net.set_adapter("other")
            torch.testing.assert_close(output(run[net], x), frozen.with_adapter("other", x), **EXACT)
            net.set_adapter("default")
            (torch.testing.assert_close if net is plain else assert_differ)(
                output(run[net], x), frozen.with_adapter("default", x)
            )


# Gradients.


@pytest.mark.parametrize(("backend", "keep_base"), one_in(2, ["eager", "aot_eager", "inductor"], [None, "cpu"]))
def test_gradients_flow_through_the_compiled_base(keep_base, backend):
    """Another adapter trains on the base, and the input has a gradient too."""
    model, x = two_adapters()
    frozen = Frozen(model)
    trained(model, x, keep_base=keep_base)
    grads = []
    for net, run in ((model, torch.compile(model, backend=backend, fullgraph=True)), (frozen.model, frozen.model)):
        net.set_adapter("other")
        net.zero_grad()
        inputs = x.clone().requires_grad_()
        run(inputs).square().mean().backward()
        grads.append([inputs.grad, *(p.grad for n, p in net.named_parameters() if ".other." in n)])
        assert all(p.grad is None for n, p in net.named_parameters() if ".default." in n)
    assert len(grads[0]) > 2
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize(("name", "keep_base"), one_in(2, ["linear_square", "conv2d", "embedding"], [None, "cpu"]))
def test_rows_of_a_compiled_batch_have_their_own_base(name, keep_base):
    """Values and gradients, of a layer: PEFT's own code for whole models breaks the graph."""
    model, x = two_adapters(name)
    frozen = Frozen(model)
    trained(model, x, keep_base=keep_base)
    names, index = ["default", "__base__", "other"], torch.tensor([0, 1, 0])

    def found(net, names, rows, **options):
        (layer,) = lora_layers(net.eval()).values()
        inputs = x[rows]
        if inputs.is_floating_point():
            inputs.requires_grad_()
        out = torch.compile(layer, **options)(inputs, adapter_names=names) if options else layer(inputs)
        out.square().sum().backward()
        return out, inputs.grad

    mixed, grad = found(model, names, index, backend="aot_eager", fullgraph=True)
    expected, expected_grad = found(frozen.model, names, index, backend="eager")
    policy, policy_grad = found(model, None, index)
    torch.testing.assert_close(mixed[1:], expected[1:], **EXACT)
    torch.testing.assert_close(mixed[0], policy[0], **EXACT)
    assert (mixed[0] - expected[0]).abs().max() > 1e-2
    if grad is not None:
        torch.testing.assert_close(grad[1:], expected_grad[1:], **EXACT)
        torch.testing.assert_close(grad[0], policy_grad[0], **EXACT)
    whole = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(whole(x[index], adapter_names=names), mixed, **EXACT)


@pytest.mark.parametrize(("backend", "keep_base"), one_in(2, ["eager", "aot_eager"], [None, "cpu"]))
def test_a_compiled_base_within_autocast(keep_base, backend):
    """The casts of autocast are part of the graph, and autocast is off while it runs."""
    model, x = two_adapters()
    model, x = model.float(), x.float()
    frozen = Frozen(model)
    trained(model, x, keep_base=keep_base)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    grads = []
    for net, run in ((model, compiled), (frozen.model, frozen.model)):
        inputs = x.clone().requires_grad_()
        with net.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
            out = run(inputs)
        out.float().square().mean().backward()
        grads.append((out, inputs.grad))
    (ours, our_grad), (theirs, their_grad) = grads
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, **BFLOAT16)
    torch.testing.assert_close(our_grad, their_grad, **BFLOAT16)


# Other layers and models.


@pytest.mark.parametrize(("when", "rule"), [("before", "in_place"), later("after", "folded")])
def test_experts_are_right_through_a_graph_break(when, rule):
    model, x = two_adapters("experts_3_7x5_up")
    frozen = Frozen(model)
    compiled = torch.compile(model, backend="eager")
    if when == "before":
        with torch.no_grad():
            compiled(x)
            with model.disable_adapter():
                compiled(x)
    optimizer = trained(model, x, rule)
    (layer,) = lora_layers(model).values()
    W = weight(layer)
    for _ in range(2):
        assert_compiled_base(compiled, model, frozen, x)
        assert weight(layer) is W
        train_model(model, optimizer, x, steps=1)
        model.eval()


def test_experts_cannot_be_in_one_graph():
    model, x = two_adapters("experts_3_7x5_up_down")
    trained(model, x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), model.disable_adapter(), pytest.raises(RuntimeError, match=r"compiler\.disable"):
        compiled(x)


def test_a_compiled_language_model_gives_the_base():
    model = causal_lm()
    frozen = copy.deepcopy(model).eval()
    optimizer = DeltaLoRAOptimizer.for_model(model, torch.optim.AdamW, lr=1e-2, update_ratio=2.0)
    for block in model.base_model.model.model.layers:
        block.compile(backend="aot_eager")
    ids = batches(1, seed=9)[0]
    with torch.no_grad(), frozen.disable_adapter():
        expected = frozen(input_ids=ids).logits
    for batch in batches(3):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad(), model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, expected, **EXACT)


# What leaves the process, and what cannot be run here.


def test_an_exported_program_holds_the_base_or_is_refused():
    """It would look the movement up in another process."""
    for name in ("linear", "experts_3_7x5_up_down"):
        model, x = two_adapters(name)
        frozen = Frozen(model)
        optimizer = trained(model, x)
        with torch.no_grad(), model.disable_adapter():
            with pytest.raises(
                RuntimeError, match=r"exported program .* export and save within optimizer\.base_weights"
            ):
                torch.export.export(model, (x,))
            with optimizer.base_weights():
                torch.export.save(torch.export.export(model, (x,)), file := io.BytesIO())
        file.seek(0)
        torch.testing.assert_close(torch.export.load(file).module()(x), frozen.base(x), **EXACT)


def test_the_correction_is_kept_out_of_cuda_graphs():
    """They would replay the numbers of their first run."""
    for name in ("corrected", "pulled_back"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.deltaopt, name).default.tags
