"""The kernel does what `deltaopt.rounding.blocks` does, bit for bit where the sums are exact.

On a CPU it runs in Triton's interpreter. What only a compiler refuses is found by compiling for devices that are not
there.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deltaopt.rounding import blocks as rounding
from deltaopt.rounding.noise import Keys, noise_factors
from tests.support import strategies
from tests.support.sixteen_bits import BOTH_DTYPES, int16_of, normal, spacing
from tests.support.strategies import ROUNDINGS

triton = pytest.importorskip("triton", reason="runs where Triton is installed")

from deltaopt.rounding import _triton  # noqa: E402
from deltaopt.rounding._triton import Batch, Product  # noqa: E402

pytestmark = pytest.mark.extra

on_devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the device is used, if any")),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ],
)
in_every_rounding = pytest.mark.parametrize("rounded", ROUNDINGS)
in_both_dtypes = pytest.mark.parametrize("dtype", BOTH_DTYPES)
# In the interpreter numpy warns of these.
beyond_float32 = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
KEYS = Keys(-1234567890, 987654321)

STRIDES = {
    "plain": lambda new, c, d: new(c, d),
    "transposed": lambda new, c, d: new(d, c).mT,
    "rows": lambda new, c, d: new(c + 3, d)[2 : 2 + c],
    "columns": lambda new, c, d: new(c, d + 7)[:, 3 : 3 + d],
    "transposed_columns": lambda new, c, d: new(d, c + 7)[:, 3 : 3 + c].mT,
    "strided": lambda new, c, d: new(2 * c, 3 * d)[::2, ::3],
}
AROUND = 77

kernel_sides = st.sampled_from([1, 2, 15, 17, 40, 64, 65, 90])
stridings = st.sampled_from(sorted(STRIDES))
int32 = st.integers(-(2**31), 2**31 - 1)


@dataclass(frozen=True)
class Kind:
    c: int
    d: int
    k: int
    dtype: torch.dtype
    scale: float
    coef: float
    layout: str
    factor_layout: str
    kept_layout: str
    count: int


kinds = st.builds(
    Kind,
    kernel_sides,
    kernel_sides,
    st.sampled_from([1, 2, 3, 15, 16, 17, 33]),
    strategies.narrow_dtypes,
    st.sampled_from([1.0, 2.0**-8, 2.0**-16]),
    st.sampled_from([1.0, -0.5]),
    stridings,
    stridings,
    stridings,
    st.integers(1, 2),
)


def laid_out(values, layout, device):
    """Lay out the values, (c, d), among other numbers."""
    new = lambda *shape: torch.full(shape, AROUND, dtype=values.dtype, device=device)  # noqa: E731
    return STRIDES[layout](new, *values.shape).copy_(values)


def exact_product(kind, generator, rounded, device, place):
    """Make a product all sums of which are exact in float32, in any order: of integers times powers of two.

    W is up to 2^7, the product up to 2^-2, and everything a multiple of 2^-14, times a scale that leads into
    float16's subnormal numbers.
    """

    def integers(most, *shape):
        return torch.randint(-most, most + 1, shape, generator=generator).to(torch.float32)

    c, d, k, scale = kind.c, kind.d, kind.k, kind.scale
    W = (integers(127, c, d) * torch.exp2(integers(5, c, d) - 5) * scale).to(kind.dtype)
    return Product(
        laid_out(W, kind.layout, device),
        laid_out(integers(4, c, k) * 2.0**-8, kind.factor_layout, device),
        laid_out(integers(4, k, d) * (2.0**-5 * scale), kind.factor_layout, device),
        laid_out(torch.zeros(c, d, dtype=torch.int16), kind.kept_layout, device) if rounded == "compensated" else None,
        int(torch.randint(-(2**31), 2**31, (), generator=generator)),
        place,
    )


def kernel_product(W, U, V, rounded="nearest", hash=0, place=0):
    kept = torch.zeros(W.shape, dtype=torch.int16, device=W.device) if rounded == "compensated" else None
    return Product(W, U, V, kept, hash, place)


def add(products, rounded, coef=1.0, keep=None, keys=KEYS):
    keep = torch.tensor(keep or [True] * len(products), device=products[0].W.device)
    Batch(products).add_([coef] * len(products), keep, keys if rounded == "stochastic" else None)


def expected(product, rounded, coef=1.0, keys=KEYS):
    """Return W and the compensation by blocks of torch operations on the CPU."""
    W, U, V, kept = (
        t if t is None else t.cpu().clone() for t in (product.W, product.U, product.V, product.compensation)
    )
    noise = noise_factors(keys, torch.tensor(product.hash, dtype=torch.int32), *W.shape)
    rounding.add_product_(W, U, V, coef, noise if rounded == "stochastic" else None, kept)
    return W, kept


@on_devices
@in_every_rounding
@settings(max_examples=settings.default.max_examples // 2)
@given(st.lists(kinds, min_size=1, max_size=2), strategies.seeds, st.builds(Keys, int32, int32))
@example([Kind(65, 130, 256, torch.float16, 2.0**-16, -0.5, "columns", "transposed", "strided", 2)], 0, KEYS)
@example([Kind(1, 300, 127, torch.bfloat16, 1.0, 1.0, "transposed", "strided", "rows", 1)], 1, Keys(1, -1))
def test_has_the_bits_of_the_blocks(rounded, device, kinds, seed, keys):
    """Hold where all sums are exact, after two steps with other coefficients; write W and its compensation alone."""
    generator = torch.Generator().manual_seed(seed)
    wanted = [kind for kind in kinds for _ in range(kind.count)]
    products = [exact_product(kind, generator, rounded, device, i) for i, kind in enumerate(wanted)]
    keep = (torch.rand(len(wanted), generator=generator) < 0.8).tolist()
    want = []
    for p, kind, moves in zip(products, wanted, keep, strict=True):
        W, kept = p.W, p.compensation
        for coef in (kind.coef, -2 * kind.coef) if moves else ():
            W, kept = expected(p._replace(W=W, compensation=kept), rounded, coef, keys)
        want += [t.cpu().clone() for t in (W, kept) if t is not None]
    batch = Batch(products)
    for factor in (1, -2):
        coefs = [factor * kind.coef for kind in wanted]
        batch.add_(coefs, torch.tensor(keep, device=device), keys if rounded == "stochastic" else None)
    written = [t for p in products for t in (p.W, p.compensation) if t is not None]
    for got, wanted_bits in zip(written, want, strict=True):
        assert torch.equal(int16_of(got), int16_of(wanted_bits))
        got.fill_(AROUND)
        everything = torch.empty(0, dtype=got.dtype, device=device).set_(got.untyped_storage())
        assert bool((everything == AROUND).all())


def blocks_of(product, row_cuts, column_cuts):
    """Cut a product into blocks of W, empty ones too. They say where they begin."""
    W, U, V, kept = product[:4]
    sides = [list(pairwise([0, *sorted(cuts), n])) for cuts, n in zip((row_cuts, column_cuts), W.shape, strict=True)]
    return [
        product._replace(
            W=W[r0:r1, c0:c1],
            U=U[r0:r1],
            V=V[:, c0:c1],
            compensation=None if kept is None else kept[r0:r1, c0:c1],
            first_row=r0,
            first_column=c0,
        )
        for (r0, r1), (c0, c1) in itertools.product(*sides)
    ]


@on_devices
@in_every_rounding
@settings(max_examples=settings.default.max_examples // 2)
@given(st.data(), kinds, strategies.seeds, st.booleans())
def test_blocks_of_a_weight_come_out_as_the_whole_does(rounded, device, data, kind, seed, copies):
    """Cut W into blocks, uneven, of one row or column, or empty: each in a tensor of its own, or as views of W."""
    row_cuts, column_cuts = (data.draw(st.lists(st.integers(0, n), max_size=2)) for n in (kind.c, kind.d))
    whole = exact_product(kind, torch.Generator().manual_seed(seed), rounded, device, 0)
    W, kept = expected(whole, rounded, kind.coef)
    blocks = blocks_of(whole, row_cuts, column_cuts)
    if copies:
        blocks = [
            block._replace(
                W=block.W.clone(), compensation=None if block.compensation is None else block.compensation.clone()
            )
            for block in blocks
        ]
    keep = torch.ones(1, dtype=torch.bool, device=device)
    Batch(blocks).add_([kind.coef] * len(blocks), keep, KEYS if rounded == "stochastic" else None)
    for block in blocks:
        place = (slice(block.first_row, None), slice(block.first_column, None))
        for got, wanted in ((block.W, W), (block.compensation, kept)):
            if got is not None:
                there = wanted[place][: block.W.shape[0], : block.W.shape[1]]
                assert torch.equal(int16_of(got), int16_of(there))


@on_devices
@in_both_dtypes
@pytest.mark.parametrize("turned", [False, True])
def test_noise_of_a_block_begins_at_its_place(dtype, turned, device):
    """Start the noise of a block elsewhere, and it is another block's; a transposed W is looked at transposed."""
    start, U, V = normal(33, 70).to(device, dtype), *(1e-3 * normal(*s, seed=1).to(device) for s in ((33, 4), (4, 70)))

    def moved(r0, r1, c0, c1, **place):
        block = start[r0:r1, c0:c1]
        block = block.mT.contiguous().mT if turned else block.clone()
        p = kernel_product(block, U[r0:r1], V[:, c0:c1])._replace(**place)
        add([p], "stochastic")
        return int16_of(p.W)

    whole = moved(0, 33, 0, 70)
    block = whole[5:20, 30:70]
    assert torch.equal(moved(5, 20, 30, 70, first_row=5, first_column=30), block)
    for place in ({}, {"first_row": 5}, {"first_column": 30}, {"first_row": 30, "first_column": 5}):
        assert not torch.equal(moved(5, 20, 30, 70, **place), block)


@on_devices
@in_every_rounding
@in_both_dtypes
@pytest.mark.parametrize("shape", [(1, 300, 8), (70, 90, 31), (40, 20, 0)])
def test_is_the_exact_sum_rounded_once(shape, dtype, rounded, device):
    """Stay within half a spacing to nearest and a spacing otherwise, and nearly always at what the blocks have."""
    c, d, k = shape
    start, U, V = normal(c, d).to(dtype), normal(c, k, seed=1), normal(k, d, seed=2)
    p = kernel_product(start.to(device, copy=True), U.to(device), V.to(device), rounded)
    W_blocks, _ = expected(p, rounded, 0.7)
    add([p], rounded, 0.7)
    exact = start.double() + 0.7 * (U.double() @ V.double())
    in_float32 = 1e-6 * (exact.abs() + U.double().abs() @ V.double().abs())
    error = (p.W.cpu().double() - exact).abs()
    assert bool((error <= (1.0 if rounded == "stochastic" else 0.5) * spacing(exact, dtype) + in_float32).all())
    assert int((int16_of(p.W) != int16_of(W_blocks)).sum()) <= 2e-3 * c * d


@on_devices
@in_both_dtypes
def test_noise_is_that_of_the_keys_and_the_hash(dtype, device):
    U, V = (1e-3 * normal(*shape, seed=1).to(device) for shape in ((33, 4), (4, 70)))

    def moved(hash, keys):
        p = kernel_product(normal(33, 70).to(device, dtype), U, V, hash=hash)
        add([p], "stochastic", keys=keys)
        return int16_of(p.W)

    first = moved(5, KEYS)
    assert torch.equal(first, moved(5, KEYS))
    for other in (moved(6, KEYS), moved(5, Keys(KEYS.rows + 1, KEYS.columns)), moved(5, Keys(KEYS.rows, 1))):
        assert not torch.equal(first, other)


@on_devices
@in_both_dtypes
@pytest.mark.parametrize("scale", [1.0, 2.0**-15])
def test_stochastic_rounding_keeps_the_mean(scale, dtype, device):
    """Take the mean over hashes: it is the float64 sum within its standard error, also for subnormal numbers.

    What is added is a tenth of a spacing: to nearest nearly all of it is lost, and cut off all of it, dozens of errors.
    """
    n = 128
    start = (scale * (0.5 + torch.rand(16, 16))).to(dtype).to(device)
    U, V = torch.rand(16, 2, device=device), torch.rand(2, 16, device=device)
    coef = 0.2 * scale * torch.finfo(dtype).eps
    exact = start.double() + coef * (U.double() @ V.double())
    step = spacing(exact, dtype)
    up = (exact / step) % 1
    error = (up * (1 - up) / n).sum().sqrt()
    products = [kernel_product(start.clone(), U, V, hash=i, place=i) for i in range(n)]
    add(products, "stochastic", coef)
    nearest = kernel_product(start.clone(), U, V)
    add([nearest], "nearest", coef)
    mean = torch.stack([p.W for p in products]).double().mean(0)
    away = [float(((W - exact) / step).sum() / error) for W in (mean, nearest.W.double(), start.double())]
    assert abs(away[0]) < 4
    assert max(away[1:]) < -25


def every_number(dtype):
    W = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return W.masked_fill(~W.isfinite(), 0.0).view(256, 256)


@on_devices
@in_every_rounding
@in_both_dtypes
def test_adding_nothing_keeps_every_number(dtype, rounded, device):
    """Keep negative zeros and subnormal numbers too."""
    start = every_number(dtype)
    U, V = torch.zeros(256, 3), normal(3, 256)
    p = kernel_product(start.to(device, copy=True), U.to(device), V.to(device), rounded)
    add([p], rounded, -0.7)
    assert torch.equal(int16_of(p.W), int16_of(start))
    assert p.compensation is None or not p.compensation.any()


@on_devices
@in_both_dtypes
def test_compensation_is_restored_as_the_blocks_do(dtype, device):
    """Restore every number and all that rounding may have kept; below a zero nothing is kept."""
    start = every_number(dtype)
    most = 1 << (15 if dtype == torch.bfloat16 else 12)
    kept = torch.randint(-most, most, start.shape)
    kept = torch.where(start == 0, kept.abs().clamp(max=most - 1), kept).to(torch.int16)
    p = Product(start, torch.zeros(256, 1), torch.zeros(1, 256), kept, 0, 0)
    W_blocks, kept_blocks = expected(p, "compensated", -1.0)
    p = p._replace(**{name: getattr(p, name).to(device, copy=True) for name in ("W", "U", "V", "compensation")})
    add([p], "compensated", -1.0)
    assert torch.equal(int16_of(p.W), int16_of(W_blocks))
    assert torch.equal(int16_of(p.compensation), int16_of(kept_blocks))


@on_devices
def test_compensation_of_a_weight_that_was_zeroed_since_is_dropped(device):
    """Drop what is kept below a zero, which would be the bits of a NaN."""
    W, U = torch.zeros(4, 4, dtype=torch.bfloat16, device=device), torch.ones(4, 1, device=device)
    p = kernel_product(W, U, U.mT, rounded="compensated")
    p.compensation.fill_(-5)
    add([p], "compensated")
    assert bool((p.W == 1).all())
    assert not p.compensation.any()


@on_devices
@in_every_rounding
def test_leaves_what_is_not_kept(rounded, device):
    U, V = torch.full((20, 2), torch.nan, device=device), torch.ones(2, 30, device=device)
    left = kernel_product(torch.ones(20, 30, dtype=torch.float16, device=device), U, V, rounded=rounded)
    moved = kernel_product(
        torch.ones(20, 30, dtype=torch.float16, device=device), V.mT[:20], V, rounded=rounded, place=1
    )
    add([left, moved], rounded, keep=[False, True])
    assert bool((left.W == 1).all())
    assert bool((moved.W == 3).all())


@beyond_float32
@on_devices
@in_every_rounding
@in_both_dtypes
@pytest.mark.parametrize("excess", [1e-3, 1.0, torch.inf])
def test_ends_at_the_largest_number(excess, dtype, rounded, device):
    largest = torch.finfo(dtype).max
    signs = torch.tensor([[1.0], [-1.0]], device=device)
    W = (signs * torch.ones(2, 40, device=device) * largest).to(dtype)
    U = signs * min(largest * excess, torch.finfo(torch.float32).max)
    p = kernel_product(W, U, torch.full((1, 40), 4.0 if excess == torch.inf else 1.0, device=device), rounded=rounded)
    add([p], rounded)
    assert torch.equal(p.W, (signs * largest).to(dtype).expand(2, 40))
    assert p.compensation is None or not p.compensation.any()


@beyond_float32
@on_devices
@in_every_rounding
@in_both_dtypes
def test_nan_stays_nan(dtype, rounded, device):
    """Set a NaN in W and one of all bits in U: it reaches that element and that row, and no other."""
    W = torch.ones(40, 50, dtype=dtype, device=device)
    U, V = torch.zeros(40, 3, device=device), torch.ones(3, 50, device=device)
    W[7, 9] = torch.nan
    U.view(torch.int32)[20, 1] = 0x7FFFFFFF
    p = kernel_product(W, U, V, rounded=rounded)
    add([p], rounded)
    assert bool(p.W[7, 9].isnan())
    assert bool(p.W[20].isnan().all())
    assert int(p.W.isnan().sum()) == 51


@on_devices
@pytest.mark.parametrize("turned", [False, True])
def test_reaches_beyond_2_to_31_elements(turned, device):
    storage = torch.empty(2**31 + 2**12, dtype=torch.bfloat16, device=device)  # 4 GiB, three pages of which are touched
    W = storage.as_strided((3, 40), (2**30, 1)).fill_(1.0)
    U, V = torch.ones(3, 1, device=device), torch.ones(1, 40, device=device)
    add([kernel_product(W.mT, V.mT, U.mT) if turned else kernel_product(W, U, V)], "nearest")
    assert bool((W == 2).all())


@on_devices
def test_like_matrices_share_a_launch(device, monkeypatch):
    launches = []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return _add[grid]

    _add = _triton._add
    monkeypatch.setattr(_triton, "_add", Counted())
    ones = lambda *shape, dtype=torch.float32: torch.ones(shape, dtype=dtype, device=device)  # noqa: E731
    products = [
        kernel_product(ones(65, 20, dtype=torch.bfloat16), ones(65, 2), ones(2, 20), place=i) for i in range(50)
    ]
    products.append(kernel_product(ones(20, 65, dtype=torch.bfloat16), ones(20, 2), ones(2, 65), place=50))
    products.append(kernel_product(ones(0, 65, dtype=torch.bfloat16), ones(0, 2), ones(2, 65), place=51))
    batch = Batch(products)
    batch.add_([1.0] * 52, torch.ones(52, dtype=torch.bool, device=device), None)
    assert launches == [(100,), (2,)]
    assert len(batch.groups) == 2
    assert all(bool((p.W == 3).all()) for p in products)


@on_devices
@pytest.mark.parametrize(("shifted", "aligned"), [("W", False), ("U", False), ("compensation", False), (None, True)])
def test_alignment_is_relied_on_only_where_all_tensors_have_it(shifted, aligned, device):
    """Launch matrices that are alike except for where one of their tensors starts."""

    def at(name, i, dtype):
        return torch.ones(17, 32, dtype=dtype, device=device)[:16, i if name == shifted else 0 :][:, :16]

    products = [
        Product(
            at("W", i, torch.bfloat16),
            at("U", i, torch.float32),
            at("V", i, torch.float32),
            at("compensation", i, torch.int16),
            0,
            i,
        )
        for i in range(2)
    ]
    [group] = Batch(products).groups
    assert group.options["ALIGNED"] == aligned
    add(products, "compensated")
    assert all(bool((p.W == 17).all()) for p in products)


def test_is_available_where_triton_is_and_runs(monkeypatch):
    assert _triton.is_available(torch.device("cpu")) == _triton.INTERPRETED
    assert _triton.is_available(torch.device("cuda")) == (torch.cuda.is_available() and not _triton.INTERPRETED)
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("deltaopt._without_triton", _triton.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    assert not without.is_available(torch.device("cuda"))


@pytest.mark.skipif(
    "nvidia" not in triton.backends.backends, reason="Triton's compiler for NVIDIA devices is not there"
)
def test_compiles_without_a_device(tmp_path):
    """Find what the interpreter accepts and the compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [
        sys.executable,
        "-W",
        "error::UserWarning",
        "-c",
        "from tests.unit import test_triton as t; t.compile_all()",
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compile_all():
    for rounded in ROUNDINGS:
        for dtype in BOTH_DTYPES:
            for architecture in (80, 90):
                ptx = compiled(dtype, rounded, architecture, "contiguous")
                # W is written 16 bytes at a time; no TF32, no subnormal number taken for zero.
                assert "st.global.v4.b32" in ptx
                assert "mma" not in ptx
                assert "ftz" not in ptx
        for sizes in ("strided", "ones"):
            compiled(torch.float16, rounded, 90, sizes)


def compiled(dtype, rounded, architecture, sizes):
    """Compile as Triton does at a call: arguments that are 1 are constants, and multiples of 16 are known."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    side = 1 if sizes == "ones" else 4096
    alike = _triton._Likeness(dtype, side, side, side, (), rounded == "compensated", turned=False)
    constants = {**_triton.options(alike, aligned=sizes == "contiguous"), "STOCHASTIC": rounded == "stochastic"}
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    keys, units = ("row_key", "column_key"), ("W_1", "U_1", "V_1", "kept_1")
    special = {"table": "*i64", "coefs": "*fp32", "keep": "*i1", **dict.fromkeys(keys, "i32")}
    types, attributes = {}, {}
    for parameter in _triton._add.params:
        name = parameter.name
        assert parameter.do_not_specialize == (name in keys)
        if name not in {**special, **constants} and (sizes == "ones" or (sizes == "contiguous" and name in units)):
            constants[name] = 1
        number = "i64" if sizes == "strided" and name[-2:] in ("_0", "_1") else "i32"
        types[name] = "constexpr" if name in constants else special.get(name, number)
        if sizes == "contiguous" and types[name] in ("i32", "*i64", "*fp32", "*i1") and name not in keys:
            attributes[parameter.num,] = [["tt.divisibility", 16]]
    source = ASTSource(_triton._add, types, constants, attributes)
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["ptx"]
