"""W in 16 bits through the optimizer: what is kept, what a checkpoint holds of it, and what is refused."""

import copy
import io
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
from deltaopt.ledger import full_part
from deltaopt.rounding import lifted
from tests.support import strategies

AdamW = torch.optim.AdamW
MODES = ["nearest", "stochastic", "compensated"]
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
each_mode = pytest.mark.parametrize("mode", MODES)
C, D, R = 48, 40, 4


class Run:
    """One layer as language models have it: small weights, small steps, A zero at first, gradients with a direction."""

    def __init__(self, dtype=torch.bfloat16, seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        self.W = (0.02 * torch.randn(C, D, generator=generator)).to(dtype)
        self.A = torch.zeros(C, R, requires_grad=True)
        self.B = ((torch.rand(R, D, generator=generator) * 2 - 1) * D**-0.5).requires_grad_()
        self.goal = torch.randn(C, D, generator=generator)
        self.W0, self.seed, self.t = self.W.clone(), seed, 0
        self.options = {"lr": 2e-5, "update_ratio": 0.5, "scaling": 2.0} | options
        triple = LoRATriple(self.W, self.A, self.B, scaling=self.options["scaling"], name=f"q{seed}")
        self.optimizer = DeltaLoRAOptimizer(AdamW, [triple], **self.options)

    def train(self, steps):
        for _ in range(steps):
            generator = torch.Generator().manual_seed(1000 * self.seed + self.t)
            G = self.goal + 2 * torch.randn(C, D, generator=generator)
            with torch.no_grad():
                self.A.grad, self.B.grad = G @ self.B.mT, self.A.mT @ G
            self.optimizer.step()
            self.t += 1
        return self

    @property
    def name(self):
        return f"q{self.seed}"

    def asked(self):
        return self.optimizer.displacement(self.name).product().double()

    def landed(self):
        return self.W.double() - self.W0.double()

    def kept(self):
        """The fraction of the asked-for displacement that W has made."""
        asked = self.asked()
        return float((self.landed() * asked).sum() / asked.square().sum())

    def full(self):
        """W with what was cut off."""
        ((triple, ledger),) = self.optimizer.accounts()
        return full_part(triple, ledger)

    def twin(self, whole=True, **options):
        """A fresh layer and optimizer that have loaded this run's state, with W or on the base."""
        twin = Run(self.W.dtype, self.seed, **{**self.options, **options})
        if whole:
            twin.W.copy_(self.W)
        with torch.no_grad():
            twin.A.copy_(self.A)
            twin.B.copy_(self.B)
        twin.t = self.t
        twin.optimizer.load_state_dict(saved(self.optimizer.state_dict()))
        return twin

    def same_as(self, other):
        return all(torch.equal(getattr(self, t), getattr(other, t)) for t in "WAB")


def saved(state):
    """What a file gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_dtype
def test_what_is_kept_of_small_steps(dtype):
    """Over 6 layers: nearest loses much of it, the other two are within 2.5 standard errors of all."""
    kept = {
        mode: torch.tensor([Run(dtype, seed, rounding=mode).train(120).kept() for seed in range(6)]) for mode in MODES
    }
    assert float(kept["nearest"].mean()) < (0.3 if dtype == torch.bfloat16 else 0.9)
    for mode in ("stochastic", "compensated"):
        assert abs(float(kept[mode].mean()) - 1) < max(2.5 * float(kept[mode].std()) / 6**0.5, 0.01)
    assert float((kept["nearest"].mean() - 1).abs()) > 10 * float(kept["nearest"].std()) / 6**0.5


@each_dtype
def test_auto_is_stochastic_in_16_bits(dtype):
    default, stochastic, nearest = Run(dtype), Run(dtype, rounding="stochastic"), Run(dtype, rounding="nearest")
    for run in (default, stochastic, nearest):
        run.train(5)
    assert default.same_as(stochastic)
    assert not torch.equal(default.W, nearest.W)


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_and_float64_weights_are_not_affected(dtype, mode):
    plain, asked = Run(dtype).train(5), Run(dtype, rounding=mode).train(5)
    assert plain.same_as(asked)
    assert asked.optimizer.buffer_bytes == plain.optimizer.buffer_bytes
    assert not any(
        "compensation" in key for entries in asked.optimizer.state_dict()["state"].values() for key in entries
    )


def test_two_seeds_differ_and_one_repeats():
    first, again, other = (Run(rounding_seed=seed).train(5) for seed in (3, 3, 4))
    assert first.same_as(again)
    assert not torch.equal(first.W, other.W)


def test_layers_and_steps_have_noise_of_their_own():
    """Two layers with the same tensors, and one layer whose same move comes at another step."""
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


@each_mode
def test_the_global_generator_is_not_touched(mode):
    run = Run(rounding=mode)
    before = torch.get_rng_state()
    run.train(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_process_makes_the_same_weights():
    """Ranks differ in their global seed and in Python's hashes; their W's must not."""
    code = (
        "import torch; torch.manual_seed(1234); torch.set_num_threads(1);"
        "from tests.behaviour.test_sixteen_bits import Run; print(Run().train(4).W.double().sum().item())"
    )
    there = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert there.stdout == f"{Run().train(4).W.double().sum().item()}\n"


@given(
    layout=strategies.layouts,
    seed=strategies.seeds,
    steps=st.integers(1, 12),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_compensated_W_is_a_float32_W_rounded_once(layout, seed, steps, dtype):
    """In every layout: the same factors beside a float32 W."""
    narrow = strategies.make(layout, seed, dtype=dtype, factor_dtype=torch.float32)
    wide = copy.deepcopy(narrow)
    wide.W = wide.W.float()
    runs = [
        DeltaLoRAOptimizer(AdamW, [s.triple(name="q")], lr=1e-3, rounding="compensated", scaling=1.0)
        for s in (narrow, wide)
    ]
    for step in range(steps):
        for s, optimizer in zip((narrow, wide), runs, strict=True):
            generator = torch.Generator().manual_seed(step)
            for factor in (s.A, s.B):
                factor.grad = torch.randn(factor.shape, generator=generator)
            optimizer.step()
    ((triple, ledger),) = runs[0].accounts()
    expected = triple.moved_part(wide.W)
    torch.testing.assert_close(full_part(triple, ledger), expected, rtol=1e-6, atol=1e-6)
    spacing = torch.finfo(dtype).eps * expected.abs() + 1e-7
    assert bool(((triple.moved_part(narrow.W).float() - expected).abs() <= 0.51 * spacing).all())
    assert runs[0].buffer_bytes == runs[1].buffer_bytes + 2 * expected.numel()


@each_mode
@each_dtype
def test_with_W_in_the_checkpoint_a_run_goes_on_bit_for_bit(dtype, mode):
    run = Run(dtype, rounding=mode, rounding_seed=7).train(6)
    twin = run.twin(rounding_seed=0)  # the state's seed is taken
    run.train(6)
    twin.train(6)
    assert run.same_as(twin)
    assert torch.equal(run.full(), twin.full())


def test_from_the_adapter_a_compensated_run_goes_on_as_in_float32():
    """W is rebuilt with what is missing to float32, without a warning; and a second load changes nothing."""
    run = Run(rounding="compensated").train(40)
    twin = run.twin(whole=False)
    torch.testing.assert_close(twin.full(), run.full(), rtol=1e-6, atol=1e-8)
    before = twin.W.clone()
    twin.optimizer.load_state_dict(saved(run.optimizer.state_dict()))
    assert torch.equal(twin.W, before)
    torch.testing.assert_close(twin.full(), run.full(), rtol=1e-6, atol=1e-8)
    run.train(40)
    twin.train(40)
    torch.testing.assert_close(twin.full(), run.full(), rtol=1e-6, atol=1e-8)
    assert float((twin.W != run.W).double().mean()) < 0.01


def test_from_the_adapter_a_stochastic_run_has_the_right_mean():
    """Rounded to nearest, base + displacement would have lost most of it."""
    kept = []
    for seed in range(8):
        run = Run(seed=seed, rounding="stochastic").train(10)
        with pytest.warns(RuntimeWarning, match=rf"16-bit W of 1 layers \(q{seed}, ..\) was rebuilt as base"):
            kept.append(run.twin(whole=False).kept())
    kept = torch.tensor(kept)
    assert abs(float(kept.mean()) - 1) < 2.5 * float(kept.std()) / 8**0.5
    nearest = (Run(seed=7).W0.double() + run.asked()).bfloat16().double() - run.W0.double()
    assert float((nearest * run.asked()).sum() / run.asked().square().sum()) < 0.7


def test_a_state_without_compensation():
    """It starts at zero, with a warning; with the base at hand it is computed."""
    run = Run(rounding="compensated").train(40)
    state = run.optimizer.state_dict()
    small = without_compensation(state)
    assert any("compensation" in key for entries in state["state"].values() for key in entries)
    assert not any("compensation" in key for entries in small["state"].values() for key in entries)

    def loaded(**options):
        twin = Run(rounding="compensated", **options)
        for t in "WAB":
            getattr(twin, t).data.copy_(getattr(run, t))
        twin.optimizer.load_state_dict(saved(small))
        return twin

    with pytest.warns(RuntimeWarning, match=r"cut off from the 16-bit W of 1 layers \(q0, ..\) is not in the state"):
        twin = loaded()
    assert torch.equal(twin.full(), run.W.float())
    twin = loaded(keep_base="cpu")  # keeps W when it is built, which was the base then
    torch.testing.assert_close(twin.full(), run.full(), rtol=1e-6, atol=1e-8)


def test_a_state_of_another_optimizer_has_no_compensation_to_leave_out():
    with pytest.raises(ValueError, match="was not saved by a DeltaLoRAOptimizer"):
        without_compensation(AdamW([torch.zeros(1, requires_grad=True)]).state_dict())


def test_a_run_may_go_on_with_another_rounding():
    run = Run(rounding="stochastic").train(6)
    with pytest.warns(RuntimeWarning, match="it starts at zero"):
        twin = run.twin(rounding="compensated")
    twin.train(3)
    assert twin.full().dtype == torch.float32
    back = twin.twin(rounding="stochastic")
    assert back.full().dtype == torch.bfloat16


@pytest.mark.parametrize("damage", ["shape", "dtype", "type"])
def test_a_damaged_compensation_is_refused(damage):
    run = Run(rounding="compensated").train(3)
    state = copy.deepcopy(run.optimizer.state_dict())
    (entries,) = (e for e in state["state"].values() if any("compensation" in key for key in e))
    (key,) = (key for key in entries if "compensation" in key)
    entries[key] = {"shape": entries[key][1:], "dtype": entries[key].float(), "type": "?"}[damage]
    before = run.full().clone()
    with pytest.raises(ValueError, match=r"q0: its saved compensation is damaged, expected torch.int16 of shape"):
        run.optimizer.load_state_dict(state)
    assert torch.equal(run.full(), before)


@each_dtype
def test_the_base_of_a_compensated_weight_comes_back_bit_for_bit(dtype):
    """Without a copy: W, what was cut off, minus the displacement is the base to float32 rounding."""
    run = Run(dtype, rounding="compensated").train(80)
    moved = run.W.clone()
    with run.optimizer.base_weights():
        assert torch.equal(run.W, run.W0)
    assert torch.equal(run.W, moved)
    before = run.full().clone()
    run.train(0)
    assert torch.equal(run.full(), before)


@pytest.mark.parametrize("what", ["zeros", "saturated"])
def test_a_base_that_a_compensation_does_not_lead_back_to(what):
    """A zero has no float32 neighbours a spacing away, and what saturated is gone: the base is asked for by name."""
    run = Run(torch.float16, rounding="compensated", lr=1e-3 if what == "zeros" else 1.0)
    run.W[:, ::2] = 0.0 if what == "zeros" else torch.finfo(torch.float16).max
    run.optimizer.rebase()
    base = run.W.clone()
    run.train(30)
    moved = run.W.clone()
    with pytest.raises(RuntimeError, match=r"q0: .*source="), run.optimizer.base_weights():
        pass
    with pytest.raises(RuntimeError, match=r"q0: what rounding did is known .* source="):
        run.optimizer.residual("q0")
    with run.optimizer.base_weights(source={"w": base}):
        assert torch.equal(run.W, base)
    assert torch.equal(run.W, moved)
    residual = run.optimizer.residual("q0", source={"w": base})
    asked = run.asked()
    exact = (moved.double() - base.double() - asked).float()
    torch.testing.assert_close(residual, exact, rtol=1e-6, atol=1e-6 * float(asked.abs().max()))


@each_dtype
def test_the_residual(dtype):
    """Against its definition, from a kept copy, from pristine weights, and for compensation without any."""
    runs = {mode: Run(dtype, rounding=mode, keep_base="cpu").train(40) for mode in MODES}
    for run in runs.values():
        expected = (run.landed() - run.asked()).float()
        for found in (run.optimizer.residual("q0"), run.optimizer.residual("q0", source={"w": run.W0})):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    half = 0.501 * torch.finfo(dtype).eps * runs["compensated"].W.float().abs() + 1e-7
    without = Run(dtype, rounding="compensated").train(40)
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


def test_the_residual_asks_for_a_base():
    run = Run(rounding="stochastic").train(3)
    with pytest.raises(RuntimeError, match=r'q0: what rounding did is known .* source=.* keep_base="cpu"'):
        run.optimizer.residual("q0")
    with pytest.raises(ValueError, match="no tensor of the source"):
        run.optimizer.residual("q0", source={"w": run.W})
    with pytest.raises(KeyError, match="no triple 'k'; there are q0"):
        run.optimizer.residual("k")
    run = Run(keep_base="cpu").train(3)
    with run.optimizer.base_weights(), pytest.raises(RuntimeError, match=r"residual\(\) within base_weights"):
        run.optimizer.residual("q0")


@each_dtype
def test_a_restart_does_not_lose_a_small_branch(dtype):
    """Branches of a tenth of a spacing, folded 40 times: rounded to nearest nothing of them is left."""

    def fold(mode):
        W = torch.ones(C, D, dtype=dtype)
        A, B = torch.zeros(C, 1, requires_grad=True), torch.zeros(1, D, requires_grad=True)
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
    assert not fold("nearest").any()
    assert bool((fold("compensated") == asked).all())
    stochastic = fold("stochastic")
    assert abs(float(stochastic.mean()) - asked) < 4.5 * float(stochastic.std()) / (C * D) ** 0.5


def test_resync_of_a_compensated_weight_is_exact():
    """As in float32, with no copy of the base and no warning."""
    run = Run(rounding="compensated").train(20)
    best = run.A.detach().clone(), run.B.detach().clone(), run.full().clone()
    run.train(20)
    with torch.no_grad():
        run.A.copy_(best[0])
        run.B.copy_(best[1])
    run.optimizer.resync()
    torch.testing.assert_close(run.full(), best[2], rtol=1e-6, atol=1e-8)


def test_rebase_and_a_cast_begin_without_compensation():
    run = Run(rounding="compensated").train(5)
    run.optimizer.rebase()
    assert torch.equal(run.full(), run.W)
    layer = torch.nn.Linear(D, C, bias=False).requires_grad_(False).bfloat16()
    A, B = torch.randn(C, R, requires_grad=True), torch.randn(R, D, requires_grad=True)
    triple = LoRATriple((layer, "weight"), A, B, name="q")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=1e-3, rounding="compensated")
    for dtype in (torch.bfloat16, torch.float16):
        layer.to(dtype)
        A.grad = torch.ones_like(A)
        optimizer.step()
        ((_, ledger),) = optimizer.accounts()
        assert ledger.compensation.dtype == dtype
        assert bool(lifted(layer.weight, ledger.compensation.bits).isfinite().all())


def test_merged_weights_count_what_was_cut_off():
    run = Run(rounding="compensated").train(40)
    exact = run.W0.double() + run.asked() + 2.0 * (run.A @ run.B).double()
    (merged,) = deltaopt.merged_weights(run.optimizer).values()
    assert bool(((merged.double() - exact).abs() <= 0.501 * torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-9).all())


@each_mode
def test_float16_saturates(mode):
    """A W near the largest value that is pushed over it stays finite, step after step, and comes back."""
    W = torch.full((2, 2), 65000.0, dtype=torch.float16)
    A, B = torch.ones(2, 1, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=1.0, update_ratio=1.0, rounding=mode)
    for grad, expected in ((-3e4, 65504.0), (-3e4, 65504.0), (6e4, 65504.0 - 6e4)):
        A.grad, B.grad = torch.full_like(A, grad), torch.zeros_like(B)
        optimizer.step()
        assert bool((W.double() - expected).abs().le(4).all())
    assert optimizer.skipped_updates == 0


@pytest.mark.parametrize(("mode", "error"), [("down", ValueError), (None, ValueError), ("Nearest", ValueError)])
def test_roundings_that_do_not_exist(mode, error):
    with pytest.raises(error, match="rounding is one of auto, nearest, stochastic, compensated, got"):
        Run(rounding=mode)


@pytest.mark.parametrize("seed", [1.5, "0", None, True])
def test_seeds_that_are_no_ints(seed):
    with pytest.raises(TypeError, match="rounding_seed is an int, the same on every rank, got"):
        Run(rounding_seed=seed)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_of_more_than_64_bits(seed):
    """Taken modulo 2^64 they would be another seed's twin."""
    with pytest.raises(ValueError, match=r"rounding_seed is at least 0 and below 2\^64, got"):
        Run(rounding_seed=seed)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_integer_and_float8_weights_are_refused_with_a_way_out(dtype):
    W = torch.zeros(C, D).to(dtype)
    A, B = torch.zeros(C, R, requires_grad=True), torch.zeros(R, D, requires_grad=True)
    with pytest.raises(ValueError, match=rf"q: W has dtype {dtype}, expected .*weight_update=.folded.*16 or 32 bits"):
        DeltaLoRAOptimizer(AdamW, [LoRATriple(W, A, B, name="q")], lr=1e-3)


def test_packed_weights_are_refused_with_a_way_out():
    """With quant_storage=bfloat16 the packed numbers pass every test of the dtype."""
    bnb = pytest.importorskip("bitsandbytes", reason="runs where bitsandbytes is installed")
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_storage=torch.bfloat16)
    A, B = torch.zeros(32, R, requires_grad=True), torch.zeros(R, 64, requires_grad=True)
    with pytest.raises(ValueError, match=r"q: W is a bitsandbytes.*Params4bit, .*weight_update=.folded.*16 or 32 bits"):
        DeltaLoRAOptimizer(AdamW, [LoRATriple(layer.weight, A, B, name="q")], lr=1e-3)


def test_a_compiled_step_moves_W_as_the_eager_one():
    eager, compiled = Run(), Run()
    torch.compiler.reset()
    step = torch.compile(compiled.optimizer.step, backend="eager")
    for run, do in ((eager, eager.optimizer.step), (compiled, step)):
        for t in range(4):
            run.A.grad, run.B.grad = torch.full_like(run.A, 1.0 + t), torch.full_like(run.B, 0.5)
            do()
    assert torch.equal(eager.W, compiled.W)
    assert not torch.equal(eager.W, eager.W0)


def test_a_compensation_that_began_later_does_not_make_a_base():
    """After a resume without it: what it had cut off before is unknown, however many steps follow."""
    run = Run(rounding="stochastic").train(20)
    with pytest.warns(RuntimeWarning, match="it starts at zero"):
        twin = run.twin(rounding="compensated")
    twin.train(3).optimizer.state_dict()
    with pytest.raises(RuntimeError, match="the base can not be had"), twin.optimizer.base_weights(method="copy"):
        pass
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
    ((triple, ledger),) = optimizer.accounts()
    asked = optimizer.displacement("q")
    exact = W0 + (asked.A.double() @ asked.B.double()).view_as(W0)
    assert float((full_part(triple, ledger).double() - exact).abs().max()) < 1e-5


def test_a_cast_to_float32_and_back_forgets_the_compensation():
    layer = torch.nn.Linear(D, C, bias=False).requires_grad_(False).bfloat16()
    A, B = torch.randn(C, R, requires_grad=True), torch.randn(R, D, requires_grad=True)
    triple = LoRATriple((layer, "weight"), A, B, name="q")
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=1e-3, rounding="compensated")
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        layer.to(dtype)
        ((_, ledger),) = optimizer.accounts()
        if dtype == torch.float32:
            assert ledger.compensation is not None
        A.grad = torch.ones_like(A)
        optimizer.step()
        assert (ledger.compensation is None) == (dtype == torch.float32)


def test_events_within_one_step_have_noise_of_their_own():
    """An averaged adapter that is put in and taken out again and again: errors add up as a random walk, no faster."""
    W, B = torch.ones(32, 32, dtype=torch.bfloat16), torch.ones(1, 32, requires_grad=True)
    A = torch.zeros(32, 1, requires_grad=True)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A, B)], lr=1.0, update_ratio=1.0)
    A.grad = torch.full_like(A, -1e-3)
    optimizer.step()
    first = W.clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the 16-bit W of 1 layers .* was moved back at once")
        for change in 30 * (1.3e-3, -1.3e-3):
            A.data.add_(change)
            optimizer.resync()
    drift = (W.double() - first.double()) / torch.finfo(torch.bfloat16).eps
    assert 0 < float(drift.square().mean().sqrt()) < 8  # 20 with one noise for all


def test_merged_weights_saturate():
    W = torch.full((2, 2), 65000.0, dtype=torch.float16)
    A, B = torch.full((2, 1), 1e3, requires_grad=True), torch.full((1, 2), 10.0, requires_grad=True)
    for mode in MODES:
        optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W.clone(), A, B)], lr=1.0, rounding=mode)
        A.grad = torch.zeros_like(A)
        optimizer.step()
        assert bool((deltaopt.merged_weights(optimizer)["triple0"] == 65504).all())


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_the_first_and_the_last_seed_are_taken(seed):
    Run(rounding_seed=seed)
