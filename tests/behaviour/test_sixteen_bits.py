"""W in 16 bits through the optimizer: what is kept, what a checkpoint holds of it, and what is refused."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deltaopt
from deltaopt import DeltaLoRAOptimizer, LoRATriple, without_compensation
from tests.support import internals, strategies
from tests.support.compare import refused, through_a_file
from tests.support.histories import random_run
from tests.support.runs import SmallSteps
from tests.support.small import HandmadeLayer
from tests.support.strategies import ROUNDINGS

in_16_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
each_rounding = pytest.mark.parametrize("mode", ROUNDINGS)


def full(run):
    """Return W with what rounding cut off from it."""
    return internals.full_weight(run.optimizer)


def assert_near_in_float32(actual, expected, atol=1e-8):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=atol)


@in_16_bits
def test_what_is_kept_of_small_steps(dtype):
    """Train 6 layers: nearest loses much of it, the other two are within 2.5 standard errors of all."""
    kept = {
        mode: torch.tensor([SmallSteps(dtype, seed, rounding=mode).train(120).kept() for seed in range(6)])
        for mode in ROUNDINGS
    }
    assert float(kept["nearest"].mean()) < (0.3 if dtype == torch.bfloat16 else 0.9)
    for mode in ("stochastic", "compensated"):
        assert abs(float(kept[mode].mean()) - 1) < max(2.5 * float(kept[mode].std()) / 6**0.5, 0.01)
    assert float((kept["nearest"].mean() - 1).abs()) > 10 * float(kept["nearest"].std()) / 6**0.5


@in_16_bits
def test_auto_is_stochastic_in_16_bits(dtype):
    default, stochastic, nearest = (
        SmallSteps(dtype),
        SmallSteps(dtype, rounding="stochastic"),
        SmallSteps(dtype, rounding="nearest"),
    )
    for run in (default, stochastic, nearest):
        run.train(5)
    assert default.same_as(stochastic)
    assert not torch.equal(default.stored.W, nearest.stored.W)


@each_rounding
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_and_float64_weights_are_not_affected(dtype, mode):
    plain, asked = SmallSteps(dtype).train(5), SmallSteps(dtype, rounding=mode).train(5)
    assert plain.same_as(asked)
    assert asked.optimizer.buffer_bytes == plain.optimizer.buffer_bytes
    assert not any(
        "compensation" in key for entries in asked.optimizer.state_dict()["state"].values() for key in entries
    )


def test_two_seeds_differ_and_one_repeats():
    first, again, other = (SmallSteps(rounding_seed=seed).train(5) for seed in (3, 3, 4))
    assert first.same_as(again)
    assert not torch.equal(first.stored.W, other.stored.W)


def test_layers_and_steps_have_noise_of_their_own():
    """Move two layers with the same tensors, and one layer whose same move comes at another step."""
    stored = [strategies.make("linear", dtype=torch.bfloat16) for _ in range(3)]
    optimizers = [
        DeltaLoRAOptimizer(torch.optim.SGD, [s.triple(name=name)], lr=1e-3)
        for s, name in zip(stored, ("a", "b", "a"), strict=True)
    ]
    optimizers[2].step()  # moves nothing
    for s, optimizer in zip(stored, optimizers, strict=True):
        s.A.grad, s.B.grad = torch.ones_like(s.A), torch.ones_like(s.B)
        optimizer.step()
    assert torch.equal(stored[0].A, stored[1].A)
    assert torch.equal(stored[0].A, stored[2].A)
    assert not torch.equal(stored[0].W, stored[1].W)
    assert not torch.equal(stored[0].W, stored[2].W)


@each_rounding
def test_the_global_generator_is_not_touched(mode):
    run = SmallSteps(rounding=mode)
    before = torch.get_rng_state()
    run.train(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.extra
def test_every_process_makes_the_same_weights():
    """Differ in the global seed and in Python's hashes, as ranks do, and in no weight."""
    total = "SmallSteps().train(4).stored.W.double().sum().item()"
    code = (
        "import torch; torch.manual_seed(1234); torch.set_num_threads(1);"
        f"from tests.support.runs import SmallSteps; print({total})"
    )
    there = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert there.stdout == f"{SmallSteps().train(4).stored.W.double().sum().item()}\n"


@given(
    rule=strategies.rules,
    layout=strategies.layouts,
    seed=strategies.seeds,
    steps=st.integers(1, 12),
    dtype=strategies.narrow_dtypes,
)
def test_compensated_W_is_a_float32_W_rounded_once(rule, layout, seed, steps, dtype):
    """Compare with the same factors next to a float32 W, in every layout."""
    options = {"seed": seed, "factor_dtype": torch.float32, "lr": 1e-3, "update_ratio": 2.0, "rounding": "compensated"}
    narrow, wide = (random_run(rule, layout, dtype=W, **options) for W in (dtype, torch.float32))
    wide.stored.W.copy_(narrow.stored.W)
    for run in (narrow, wide):
        run.train(steps)
    expected = wide.triple.view.part(wide.stored.W)
    assert_near_in_float32(full(narrow), expected, atol=1e-6)
    spacing = torch.finfo(dtype).eps * expected.abs() + 1e-7
    part = narrow.triple.view.part(narrow.stored.W)
    assert bool(((part.float() - expected).abs() <= 0.51 * spacing).all())
    assert narrow.optimizer.buffer_bytes == wide.optimizer.buffer_bytes + 2 * expected.numel()


@each_rounding
@in_16_bits
def test_with_W_in_the_checkpoint_a_run_continues_bit_for_bit(dtype, mode):
    run = SmallSteps(dtype, rounding=mode, rounding_seed=7).train(6)
    twin = run.twin(rounding_seed=0)  # the state's seed is taken
    run.train(6)
    twin.train(6)
    assert run.same_as(twin)
    assert torch.equal(full(run), full(twin))


def test_from_the_adapter_a_compensated_run_continues_as_in_float32():
    """Rebuild W with what is missing to float32, without a warning; a second load changes nothing."""
    run = SmallSteps(rounding="compensated").train(40)
    twin = run.twin(whole=False)
    assert_near_in_float32(full(twin), full(run))
    before = twin.stored.W.clone()
    twin.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    assert torch.equal(twin.stored.W, before)
    assert_near_in_float32(full(twin), full(run))
    run.train(40)
    twin.train(40)
    assert_near_in_float32(full(twin), full(run))
    assert float((twin.stored.W != run.stored.W).double().mean()) < 0.01


def test_from_the_adapter_a_stochastic_run_has_the_right_mean():
    """Show that rounding base + displacement to nearest would have lost most of it."""
    kept = []
    for seed in range(8):
        run = SmallSteps(seed=seed, rounding="stochastic").train(10)
        with pytest.warns(RuntimeWarning, match=rf"16-bit .* of 1 layer \(q{seed}\) .*rebuilt"):
            kept.append(run.twin(whole=False).kept())
    kept = torch.tensor(kept)
    assert abs(float(kept.mean()) - 1) < 2.5 * float(kept.std()) / 8**0.5
    nearest = (SmallSteps(seed=7).W0.double() + run.displacement()).bfloat16().double() - run.W0.double()
    assert float((nearest * run.displacement()).sum() / run.displacement().square().sum()) < 0.7


def test_a_state_without_compensation():
    """Start it at zero, with a warning; with the base at hand, compute it."""
    run = SmallSteps(rounding="compensated").train(40)
    state = run.optimizer.state_dict()
    small = without_compensation(state)
    assert any("compensation" in key for entries in state["state"].values() for key in entries)
    assert not any("compensation" in key for entries in small["state"].values() for key in entries)

    def loaded(**options):
        twin = SmallSteps(rounding="compensated", **options)
        for here, there in zip(twin.tensors, run.tensors, strict=True):
            here.copy_(there)
        twin.optimizer.load_state_dict(through_a_file(small))
        return twin

    with pytest.warns(RuntimeWarning, match=r"the state does not hold .* of 1 layer \(q0\) that compensated"):
        twin = loaded()
    assert torch.equal(full(twin), run.stored.W.float())
    twin = loaded(keep_base="cpu")  # keeps W when it is built, which was the base then
    assert_near_in_float32(full(twin), full(run))


def test_a_state_of_another_optimizer_has_no_compensation_to_leave_out():
    state = torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).state_dict()
    with pytest.raises(ValueError, match="was not saved by a DeltaLoRAOptimizer"):
        without_compensation(state)


def test_a_run_may_continue_with_another_rounding():
    run = SmallSteps(rounding="stochastic").train(6)
    with pytest.warns(RuntimeWarning, match="it starts at zero"):
        twin = run.twin(rounding="compensated")
    twin.train(3)
    assert full(twin).dtype == torch.float32
    back = twin.twin(rounding="stochastic")
    assert full(back).dtype == torch.bfloat16


def compensation_in(state):
    """Return the entries of the one parameter that has it in its state, and its key there."""
    [(entries, key)] = [(e, key) for e in state["state"].values() for key in e if "compensation" in key]
    return entries, key


@in_16_bits
def test_a_state_holds_the_compensation_as_bytes(dtype):
    run = SmallSteps(dtype, rounding="compensated").train(5)
    entries, key = compensation_in(run.optimizer.state_dict())
    kept = internals.compensation_of(run.optimizer)
    assert (entries[key].dtype, entries[key].shape) == (torch.uint8, (*run.stored.W.shape, 2))
    words = entries[key].to(torch.int32)
    assert kept.any()
    assert torch.equal((words[..., 0] | words[..., 1] << 8).to(torch.int16), kept)
    assert entries[key].data_ptr() == kept.data_ptr()  # no copy, as with other tensors of a state


@in_16_bits
def test_a_compensation_of_an_earlier_version_is_read(dtype):
    """States of schema 4 and 5 hold it as int16."""
    run = SmallSteps(dtype, rounding="compensated").train(5)
    state = through_a_file(run.optimizer.state_dict())
    entries, key = compensation_in(state)
    entries[key] = internals.compensation_of(run.optimizer).clone()
    twin = SmallSteps(dtype, rounding="compensated")
    for here, there in zip(twin.tensors, run.tensors, strict=True):
        here.copy_(there)
    twin.optimizer.load_state_dict(state)
    assert torch.equal(internals.compensation_of(twin.optimizer), internals.compensation_of(run.optimizer))


@pytest.mark.parametrize("damage", ["shape", "dtype", "type"])
def test_refuses_a_damaged_compensation(damage):
    run = SmallSteps(rounding="compensated").train(3)
    state = copy.deepcopy(run.optimizer.state_dict())
    entries, key = compensation_in(state)
    entries[key] = {"shape": entries[key][1:], "dtype": entries[key].float(), "type": "?"}[damage]
    refused(
        lambda: run.optimizer.load_state_dict(state),
        ValueError,
        r"q0: its saved compensation is damaged, expected torch.uint8 of shape \(.*, 2\) \(or, .* torch.int16 of shape",
        kept=lambda: (full(run), run.optimizer.state_dict()),
    )


@in_16_bits
def test_the_base_of_a_compensated_weight_comes_back_bit_for_bit(dtype):
    """Need no copy: W with what was cut off, minus the displacement, is the base to float32 rounding."""
    run = SmallSteps(dtype, rounding="compensated").train(80)
    moved = run.stored.W.clone()
    with run.optimizer.base_weights():
        assert torch.equal(run.stored.W, run.W0)
    assert torch.equal(run.stored.W, moved)
    before = full(run).clone()
    run.train(0)
    assert torch.equal(full(run), before)


@pytest.mark.parametrize("what", ["zeros", "saturated"])
def test_a_base_that_a_compensation_does_not_lead_back_to(what):
    """Ask for the base by name: a zero has no float32 neighbours a spacing away, and what saturated is gone."""
    run = SmallSteps(torch.float16, rounding="compensated", lr=1e-3 if what == "zeros" else 1.0)
    run.stored.W[:, ::2] = 0.0 if what == "zeros" else torch.finfo(torch.float16).max
    run.optimizer.rebase()
    base = run.stored.W.clone()
    run.train(30)
    moved = run.stored.W.clone()
    with pytest.raises(RuntimeError, match=r"q0: .*source="):
        run.optimizer.base_weights().__enter__()
    with pytest.raises(RuntimeError, match=r"q0: what rounding did is known .* source="):
        run.optimizer.residual("q0")
    with run.optimizer.base_weights(source={"w": base}):
        assert torch.equal(run.stored.W, base)
    assert torch.equal(run.stored.W, moved)
    residual = run.optimizer.residual("q0", source={"w": base})
    asked = run.displacement()
    exact = (moved.double() - base.double() - asked).float()
    torch.testing.assert_close(residual, exact, rtol=1e-6, atol=1e-6 * float(asked.abs().max()))


@in_16_bits
def test_the_residual(dtype):
    """Check its definition, from a kept copy, from pristine weights, and for compensation without any."""
    runs = {mode: SmallSteps(dtype, rounding=mode, keep_base="cpu").train(40) for mode in ROUNDINGS}
    for run in runs.values():
        expected = (run.landed() - run.displacement()).float()
        for found in (run.optimizer.residual("q0"), run.optimizer.residual("q0", source={"w": run.W0})):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    half = 0.501 * torch.finfo(dtype).eps * runs["compensated"].stored.W.float().abs() + 1e-7
    without = SmallSteps(dtype, rounding="compensated").train(40)
    torch.testing.assert_close(
        without.optimizer.residual("q0"), runs["compensated"].optimizer.residual("q0"), rtol=0, atol=1e-7
    )
    assert bool((without.optimizer.residual("q0").abs() <= half).all())
    size = {mode: float(run.optimizer.residual("q0").norm()) for mode, run in runs.items()}
    assert size["compensated"] < min(size["nearest"], size["stochastic"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["transposed", "experts", "rows", "conv2d_channels_last"])
def test_the_residual_of_a_wide_weight_is_rounding(layout, dtype):
    stored = strategies.make(layout, dtype=dtype)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [stored.triple(name="q")], lr=0.1, keep_base="device")
    assert not optimizer.residual("q").any()
    stored.A.grad = torch.ones_like(stored.A)
    optimizer.step()
    found = optimizer.residual("q")
    assert found.dtype == dtype
    assert found.shape == stored.matrices()[0].shape
    assert float(found.abs().max()) < 50 * torch.finfo(dtype).eps


@in_16_bits
@pytest.mark.parametrize("layout", strategies.LAYOUTS)
def test_the_residual_is_in_the_order_of_the_displacement(layout, dtype):
    run = random_run("in_place", layout, dtype=dtype, factor_dtype=torch.float32, keep_base="cpu").train(2)
    expected = run.stored.matrix(run.stored.W).double() - run.base() - run.displacement()
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(run.optimizer.residual("q").double(), expected, rtol=0, atol=1e-5)


def test_the_residual_asks_for_a_base():
    run = SmallSteps(rounding="stochastic").train(3)
    with pytest.raises(RuntimeError, match=r'q0: what rounding did is known .* source=.* keep_base="cpu"'):
        run.optimizer.residual("q0")
    with pytest.raises(ValueError, match="no tensor of the source"):
        run.optimizer.residual("q0", source={"w": run.stored.W})
    with pytest.raises(KeyError, match="no triple 'k'; there are q0"):
        run.optimizer.residual("k")
    run = SmallSteps(keep_base="cpu").train(3)
    with run.optimizer.base_weights(), pytest.raises(RuntimeError, match=r"residual\(\) within base_weights"):
        run.optimizer.residual("q0")


@in_16_bits
def test_a_restart_does_not_lose_a_small_branch(dtype):
    """Restart 40 times with branches of a tenth of a spacing: rounded to nearest nothing of them is left."""
    c, d = 48, 40

    def restarted(mode):
        W = torch.ones(c, d, dtype=dtype)
        A, B = torch.zeros(c, 1, requires_grad=True), torch.zeros(1, d, requires_grad=True)
        optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=1.0, update_ratio=0.0, rounding=mode)

        @torch.no_grad()
        def small(triple):
            triple.A.fill_(torch.finfo(dtype).eps / 10)
            triple.B.fill_(1.0)

        for _ in range(41):
            optimizer.restart(small)
            optimizer.step()  # a restart within the same step would have the same noise
        return W.double() - 1

    asked = 4 * torch.finfo(dtype).eps
    assert not restarted("nearest").any()
    assert bool((restarted("compensated") == asked).all())
    stochastic = restarted("stochastic")
    assert abs(float(stochastic.mean()) - asked) < 4.5 * float(stochastic.std()) / (c * d) ** 0.5


def test_resync_of_a_compensated_weight_is_exact():
    """Need no copy of the base and no warning, as in float32."""
    run = SmallSteps(rounding="compensated").train(20)
    best = run.stored.A.detach().clone(), run.stored.B.detach().clone(), full(run).clone()
    run.train(20)
    with torch.no_grad():
        run.stored.A.copy_(best[0])
        run.stored.B.copy_(best[1])
    run.optimizer.resync()
    assert_near_in_float32(full(run), best[2])


def test_rebase_starts_without_compensation():
    run = SmallSteps(rounding="compensated").train(5)
    assert not torch.equal(full(run), run.stored.W)
    run.optimizer.rebase()
    assert torch.equal(full(run), run.stored.W)


def cast_between_steps(*dtypes):
    """Yield the optimizer and the layer before and after each step, whose W is cast to these dtypes in turn."""
    layer = HandmadeLayer(dtype=torch.bfloat16)
    factors = [p.detach().float().requires_grad_() for p in (layer.A, layer.B)]
    triple = LoRATriple((layer, "weight"), *factors, name="q")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=1e-3, rounding="compensated")
    for dtype in dtypes:
        layer.to(dtype)
        yield optimizer, layer, "before"
        factors[0].grad = torch.ones_like(factors[0])
        optimizer.step()
        yield optimizer, layer, "after"


def test_a_cast_to_another_16_bit_dtype_starts_without_compensation():
    for optimizer, layer, when in cast_between_steps(torch.bfloat16, torch.float16):
        if when == "after":
            found = internals.full_weight(optimizer)
            assert found.dtype == torch.float32  # with a compensation of this dtype
            assert bool(found.isfinite().all())
            assert torch.equal(found.to(layer.weight.dtype), layer.weight)


def test_a_cast_to_float32_and_back_forgets_the_compensation():
    for optimizer, layer, when in cast_between_steps(torch.bfloat16, torch.float32, torch.bfloat16):
        wide = layer.weight.dtype == torch.float32
        if wide and when == "before":
            assert internals.compensation_of(optimizer) is not None
        if when == "after":
            assert (internals.compensation_of(optimizer) is None) == wide


def test_merged_weights_count_what_was_cut_off():
    run = SmallSteps(rounding="compensated").train(40)
    exact = run.W0.double() + run.displacement() + 2.0 * (run.stored.A @ run.stored.B).double()
    (merged,) = deltaopt.merged_weights(run.optimizer).values()
    assert bool(((merged.double() - exact).abs() <= 0.501 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-9).all())


@each_rounding
def test_float16_saturates(mode):
    """Push a W near the largest value over it: it stays finite, step after step, and comes back."""
    W = torch.full((2, 2), 65000.0, dtype=torch.float16)
    A, B = torch.ones(2, 1, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=1.0, update_ratio=1.0, rounding=mode)
    for grad, expected in ((-3e4, 65504.0), (-3e4, 65504.0), (6e4, 65504.0 - 6e4)):
        A.grad, B.grad = torch.full_like(A, grad), torch.zeros_like(B)
        optimizer.step()
        assert bool((W.double() - expected).abs().le(4).all())
    assert optimizer.skipped_updates == 0


def test_a_compiled_step_has_the_bits_of_the_eager_one():
    eager, compiled = SmallSteps(), SmallSteps()
    torch.compiler.reset()
    step = torch.compile(compiled.optimizer.step, backend="eager")
    for run, do in ((eager, eager.optimizer.step), (compiled, step)):
        for t in range(4):
            run.stored.A.grad, run.stored.B.grad = (
                torch.full_like(run.stored.A, 1.0 + t),
                torch.full_like(run.stored.B, 0.5),
            )
            do()
    assert torch.equal(eager.stored.W, compiled.stored.W)
    assert not torch.equal(eager.stored.W, eager.W0)


def test_a_compensation_that_began_later_does_not_make_a_base():
    """Resume without it: what it had cut off before is unknown, however many steps follow."""
    run = SmallSteps(rounding="stochastic").train(20)
    with pytest.warns(RuntimeWarning, match="it starts at zero"):
        twin = run.twin(rounding="compensated")
    assert twin.train(3).optimizer.state_dict()["state"]
    with pytest.raises(RuntimeError, match=r"q0: .*source="):
        twin.optimizer.base_weights(method="copy").__enter__()
    with pytest.raises(RuntimeError, match="what rounding did is known"):
        twin.optimizer.residual("q0")


def test_a_changed_memory_format_keeps_each_compensation_at_its_element():
    stored = strategies.make("conv2d", dtype=torch.bfloat16, factor_dtype=torch.float32)
    layer = torch.nn.Module()
    layer.W = torch.nn.Parameter(stored.W, requires_grad=False)
    triple = LoRATriple((layer, "W"), stored.A, stored.B, name="q", layout="conv")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=1e-3, rounding="compensated")
    W0 = layer.W.double()
    for memory in (torch.contiguous_format, torch.channels_last):
        layer.W.data = layer.W.data.contiguous(memory_format=memory)
        stored.A.grad, stored.B.grad = torch.ones_like(stored.A), torch.ones_like(stored.B)
        optimizer.step()
    asked = optimizer.displacement("q")
    exact = W0 + (asked.A.double() @ asked.B.double()).view_as(W0)
    assert float((internals.full_weight(optimizer).double() - exact).abs().max()) < 1e-5


def test_events_within_one_step_have_noise_of_their_own():
    """Put an averaged adapter in and out again and again: errors add up as a random walk, no faster."""
    W, B = torch.ones(32, 32, dtype=torch.bfloat16), torch.ones(1, 32, requires_grad=True)
    A = torch.zeros(32, 1, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=1.0, update_ratio=1.0)
    A.grad = torch.full_like(A, -1e-3)
    optimizer.step()
    first = W.clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*16-bit .* of 1 layer ")
        for change in 30 * (1.3e-3, -1.3e-3):
            A.data.add_(change)
            optimizer.resync()
    drift = (W.double() - first.double()) / torch.finfo(torch.bfloat16).eps
    assert 0 < float(drift.square().mean().sqrt()) < 8  # 20 with one noise for all


def test_merged_weights_saturate():
    W = torch.full((2, 2), 65000.0, dtype=torch.float16)
    A, B = torch.full((2, 1), 1e3, requires_grad=True), torch.full((1, 2), 10.0, requires_grad=True)
    for mode in ROUNDINGS:
        optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W.clone(), A, B)], lr=1.0, rounding=mode)
        A.grad = torch.zeros_like(A)
        optimizer.step()
        assert bool((deltaopt.merged_weights(optimizer)["triple0"] == 65504).all())
