"""Tests that only a CUDA device can make. `make cuda` runs these."""

import pytest
import torch

from benchmarks.memory import peak_allocation
from deltaopt import DeltaLoRAOptimizer, LoRATriple
from tests.support import internals, strategies
from tests.support.compare import relative
from tests.support.runs import RATIO, SCALING, LayerRun
from tests.support.strategies import INNERS, LAYOUTS, ROUNDINGS, RULES

pytestmark = pytest.mark.cuda


def on_cuda(layout="linear", seed=3, dtype=torch.float32, factor_dtype=None):
    return strategies.make(layout, seed=seed, dtype=dtype, factor_dtype=factor_dtype, device="cuda")


def triples_on_cuda(count=3, c=512, d=384, r=4, dtype=torch.float32):
    triples = []
    for i in range(count):
        A, B = (torch.randn(s, device="cuda", requires_grad=True) for s in ((c, r), (r, d)))
        A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
        triples.append(LoRATriple(torch.randn(c, d, device="cuda", dtype=dtype), A, B, name=str(i)))
    return triples


# A capturable AdamW keeps its step count, and with it the bias correction, in float32.
CLOSE = {"SGD": 1e-10, "AdamW_foreach": 1e-10, "AdamW_fused": 1e-10, "AdamW_capturable": 1e-4, "Adafactor": 1e-10}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CLOSE)
@pytest.mark.parametrize("rule", RULES)
def test_follows_the_cpu_in_float64(rule, name, layout):
    """The CPU run is the one compared with the dense reference."""
    inner, options = INNERS.get(name, (torch.optim.AdamW, {"lr": 0.01, "capturable": True}))
    here, there = (
        LayerRun(
            rule,
            layout,
            seed=3,
            inner=inner,
            zero=False,
            device=device,
            update_ratio=RATIO,
            start_step=3,
            **{key: value for key, value in options.items() if device == "cuda" or key != "capturable"},
        ).train(100, by_closure=True)
        for device in ("cpu", "cuda")
    )
    for a, b in zip(here.tensors, there.tensors, strict=True):
        assert relative(b.cpu(), a) < CLOSE[name]


NARROW = [
    pytest.param(dtype, rounding, kernel, id=f"{dtype}-{rounding}-{'kernel' if kernel else 'blocks'}")
    for dtype in (torch.bfloat16, torch.float16)
    for rounding in ROUNDINGS
    for kernel in (True, False)
]
WIDE = [pytest.param(torch.float32, "auto", True, id="torch.float32")]


def choose(kernel):
    """Return the options with which an optimizer uses the kernel; without it blocks of torch operations do its work."""
    if not kernel:
        return {"weight_update": internals.without_kernel()}
    assert internals.kernel_for(torch.device("cuda", torch.cuda.current_device())) is not None
    return {}


@pytest.mark.parametrize(("dtype", "rounding", "kernel"), WIDE + NARROW)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_step_is_the_exact_sum_rounded_once(layout, dtype, rounding, kernel):
    options = choose(kernel)
    stored = on_cuda(layout, dtype=dtype, factor_dtype=torch.float32)
    stored.A.grad, stored.B.grad = torch.randn_like(stored.A), torch.randn_like(stored.B)
    W, A, B = (t.double() for t in stored.matrices())
    options |= {"update_ratio": RATIO, "rounding": rounding}
    DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple(SCALING)], lr=0.1, **options).step()
    W_new, A_new, B_new = (t.double() for t in stored.matrices())
    exact = W + RATIO * SCALING * (A_new @ B_new - A @ B)
    spacing = torch.finfo(dtype).eps * exact.abs()
    noise = 1e-6 * (A.abs() @ B.abs() + A_new.abs() @ B_new.abs())
    assert bool(((W_new - exact).abs() <= (1.01 if rounding == "stochastic" else 0.51) * spacing + noise).all())


@pytest.mark.parametrize(("dtype", "rounding", "kernel"), NARROW)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_16_bit_weights_are_those_of_the_cpu(layout, dtype, rounding, kernel):
    """Bit for bit, noise and compensation too: factors of integers, whose products every order of summing gives."""
    options = choose(kernel)
    runs = []
    for device in ("cpu", "cuda"):
        stored = strategies.make(layout, 3, dtype, torch.float32, device=device)
        with torch.no_grad():
            stored.A.round_()
            stored.B.round_()
        triple = stored.triple(2.0**-9, name="q")
        optimizer = DeltaLoRAOptimizer(
            torch.optim.SGD, [triple], update_ratio=1.0, rounding=rounding, lr=1.0, **options
        )
        for t in range(3):
            generator = torch.Generator().manual_seed(t)
            for factor in (stored.A, stored.B):
                factor.grad = torch.randint(-2, 3, factor.shape, generator=generator).to(factor)
            optimizer.step()
        kept = internals.compensation_of(optimizer)
        runs.append((stored.W.cpu(), torch.zeros(1) if kept is None else kept.cpu()))
    (W, kept), (W_there, kept_there) = runs
    assert torch.equal(W.view(torch.int16), W_there.view(torch.int16))
    assert torch.equal(kept, kept_there)


def test_tf32_does_not_reach_the_delta():
    exact, low = triples_on_cuda(1, c=1024, d=1024, r=16), triples_on_cuda(1, c=1024, d=1024, r=16)
    with torch.no_grad():
        for mine, other in zip((low[0].W, low[0].A, low[0].B), (exact[0].W, exact[0].A, exact[0].B), strict=True):
            mine.copy_(other)
        low[0].A.grad, low[0].B.grad = exact[0].A.grad.clone(), exact[0].B.grad.clone()
    DeltaLoRAOptimizer(torch.optim.SGD, exact, lr=0.1).step()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        DeltaLoRAOptimizer(torch.optim.SGD, low, lr=0.1).step()
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(exact[0].W, low[0].W)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(("dtype", "rounding", "kernel"), WIDE + NARROW)
def test_step_never_waits_for_the_device(dtype, rounding, kernel):
    options = choose(kernel)
    optimizer = DeltaLoRAOptimizer(
        torch.optim.SGD, triples_on_cuda(dtype=dtype), lr=0.1, momentum=0.9, rounding=rounding, **options
    )
    optimizer.step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_neither_does_the_first_move_nor_a_changed_ratio():
    """The fingerprint of the base is taken, and a term closed."""
    optimizer = DeltaLoRAOptimizer(
        torch.optim.SGD, triples_on_cuda(), lr=0.1, momentum=0.9, start_step=1, update_ratio=lambda t: 1.0 + t
    )
    optimizer.step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(4):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(internals.terms_of(optimizer)) == 4


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_folded_rule_does_not_wait_where_a_ratio_changes_again():
    """The first write of a W waits, to leave it alone where its product is zero."""
    triples = [
        LoRATriple(t.W, t.A, t.B, scaling=torch.tensor(0.5, device="cuda"), name=t.name) for t in triples_on_cuda()
    ]
    for triple in triples:
        triple.A.grad = triple.B.grad = None
    optimizer = DeltaLoRAOptimizer(
        torch.optim.SGD, triples, lr=0.1, momentum=0.9, update_ratio=lambda t: 1.0 + t, weight_update="folded"
    )

    def step():
        optimizer.zero_grad()
        sum(factor.square().sum() for triple in triples for factor in (triple.A, triple.B)).backward()
        optimizer.step()

    step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(4):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(internals.terms_of(optimizer)) == 5


@pytest.mark.filterwarnings("ignore:a LoRA factor became NaN", "ignore:A and B of 1 layer")
def test_the_ledger_knows_of_skipped_steps_and_outside_changes():
    triples = triples_on_cuda()
    starts = [t.W.double() for t in triples]
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=1e-3, update_ratio=1.5)
    for t in range(12):
        with torch.no_grad():
            if t == 4:
                kept = triples[0].A.clone(), triples[0].A.grad.clone()
                triples[0].A.grad.fill_(float("nan"))
            if t == 5:
                triples[0].A.copy_(kept[0])
                triples[0].A.grad.copy_(kept[1])
            if t == 8:
                triples[1].B.mul_(1.5)
        optimizer.step()
    for triple, W in zip(triples, starts, strict=True):
        found = optimizer.displacement(triple.name).product().double()
        assert relative(W + found, triple.W.double()) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_may_be_resumed_on_the_other_device(layout):
    """Fingerprints do not depend on the device, and a ledger is put where W is."""
    here, there = strategies.make(layout, seed=3), on_cuda(layout, dtype=torch.float64)
    optimizers = [DeltaLoRAOptimizer(torch.optim.SGD, [s.triple(SCALING, name="q")], lr=0.1) for s in (here, there)]
    W0 = there.W.clone()
    for _ in range(3):
        here.A.grad, here.B.grad = torch.ones_like(here.A), torch.ones_like(here.B)
        optimizers[0].step()
    with torch.no_grad():
        there.A.copy_(here.A)
        there.B.copy_(here.B)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert relative(there.W.cpu(), here.W) < 1e-12
    with optimizers[1].base_weights():
        assert relative(there.W, W0) < 1e-12
    there.W.copy_(here.W)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert torch.equal(there.W.cpu(), here.W)


@pytest.mark.parametrize("place", ["cpu", "device"])
def test_a_kept_base_comes_back(place):
    triples = triples_on_cuda(dtype=torch.bfloat16)
    before = [t.W.clone() for t in triples]
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1, keep_base=place)
    optimizer.step()
    moved = [t.W.clone() for t in triples]
    with optimizer.base_weights():
        assert all(torch.equal(t.W, w) for t, w in zip(triples, before, strict=True))
    assert all(torch.equal(t.W, w) for t, w in zip(triples, moved, strict=True))


@pytest.mark.filterwarnings("ignore:a LoRA factor became NaN")
def test_a_bad_factor_leaves_every_W_alone_and_is_reported_later():
    triples = triples_on_cuda()
    before = [t.W.clone() for t in triples]
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1)
    triples[1].A.grad[0, 0] = float("nan")
    optimizer.step()
    torch.cuda.synchronize()
    with pytest.warns(RuntimeWarning, match="became NaN or infinite"):
        optimizer.step()
    torch.cuda.synchronize()
    assert "skipped updates: 2 or more" in repr(optimizer)
    assert all(torch.equal(t.W, w) for t, w in zip(triples, before, strict=True))
    assert optimizer.skipped_updates == 2


@pytest.mark.parametrize("scaling", [0.5, -0.5])
@pytest.mark.parametrize(
    ("dtype", "rounding", "kernel"), [*WIDE, pytest.param(torch.float64, "auto", True, id="torch.float64"), *NARROW]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unchanged_factor_leaves_W(layout, dtype, rounding, kernel, scaling):
    """The kernel leaves every bit. Products of cuBLAS may turn -0.0 into 0.0, and leave every value."""
    options = choose(kernel)
    stored = on_cuda(layout, dtype=dtype)
    stored.W.copy_(torch.where(stored.W > 0.5, -0.0, stored.W))
    before = stored.W.clone()
    stored.A.grad, stored.B.grad = torch.randn_like(stored.A), torch.randn_like(stored.B)
    DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple(scaling)], rounding=rounding, lr=0.0, **options).step()
    assert torch.equal(stored.W, before)
    if kernel and stored.W.element_size() == 2:
        assert torch.equal(stored.W.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_delta_is_never_allocated(dtype):
    """In 16 bits there is not even a block: the kernel lifts a tile in registers."""
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, triples_on_cuda(c=2048, d=2048, dtype=dtype), lr=1e-3)
    optimizer.step()
    assert peak_allocation(optimizer.step, "cuda") < 2048 * 2048 * 4 / 20


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_into_a_graph_is_refused():
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples_on_cuda(1), lr=1e-3, capturable=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="captured into a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_grad_scaler_with_a_fused_inner_optimizer():
    triples = triples_on_cuda(1)
    optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    scaler.scale(torch.ones((), device="cuda"))
    before = [t.detach().clone() for t in (triples[0].W, triples[0].A, triples[0].B)]
    triples[0].A.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before, (triples[0].W, triples[0].A, triples[0].B)))
    assert optimizer.step_count == 0


def test_the_model_may_move_between_devices():
    model = torch.nn.Linear(6, 4, bias=False).requires_grad_(False)
    model.A, model.B = torch.nn.Parameter(torch.randn(4, 2)), torch.nn.Parameter(torch.randn(2, 6))
    triple = LoRATriple((model, "weight"), (model, "A"), (model, "B"), name="q")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1)
    for device in ("cpu", "cuda", "cpu"):
        model.to(device)
        model.A.grad, model.B.grad = torch.ones_like(model.A), torch.ones_like(model.B)
        before = model.weight.clone()
        optimizer.step()
        assert not torch.equal(model.weight, before)


@pytest.mark.filterwarnings("ignore:a LoRA factor became NaN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_is_that_of_the_cpu(dtype):
    """The device tells the host later which steps moved a W: one is skipped, and one changes nothing."""
    reports = []
    for device in ("cpu", "cuda"):
        options = {"dtype": dtype, "factor_dtype": torch.float32, "rounding": "nearest", "keep_base": "device"}
        run = LayerRun(device=device, seed=3, zero=False, start_step=1, **options).train(3)
        run.optimizer.param_groups[0]["lr"] = 0.0
        run.train()
        run.optimizer.param_groups[0]["lr"] = 0.02
        run.happen("skipped")
        reports.append(run.train().optimizer.report())
    here, there = (report.layers[0] for report in reports)
    assert here.moves == there.moves == 3
    assert [report.skipped_updates for report in reports] == [1, 1]
    for name in ("asked", "asked_relative", "kept"):
        assert getattr(there, name) == pytest.approx(getattr(here, name), rel=1e-3)
