"""Sharded weights that move in place, with one CUDA device: NCCL with one rank, and two ranks that share the device.

`make cuda` runs these on the device; elsewhere the same tests run on a CPU with gloo. Factors and their changes are
small multiples of 2^-4, so that every order of summing up a product gives the same float32.
"""

import copy
import importlib.util
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from deltaopt import DeltaLoRAOptimizer, LoRATriple, RanksDisagreeError
from tests.support import internals
from tests.support.kept_pair import forget_meshes
from tests.support.sharded import S0, S1, WHOLE, R, part
from tests.support.sharded_runs import LAST_PLACES, Replay, whole
from tests.support.threads import on_threads

# What torch says of its own groups and meshes on a device depends on its version.
pytestmark = [pytest.mark.extra, pytest.mark.filterwarnings(r"ignore::Warning:torch\.distributed")]

STEP = 2.0**-4
RATIO, SCALING = 2.0, 0.5
SIZES = [(71, 67, 4) if torch.cuda.is_available() else (23, 19, 4), (9, 7, 1)]
"""(c, d, r): uneven for two ranks, and a B of which one of two ranks has nothing.

On a device there is more than one tile of the kernel, for which the interpreter takes long. No size of a piece is 1 or
a multiple of 16, for which the kernel would be compiled once more.
"""
LIMIT = 60.0

on_devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the device is used, if any")),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ],
)

KINDS = [
    pytest.param(dtype, rounding, kernel, id=f"{dtype}-{rounding}-{'kernel' if kernel else 'blocks'}")
    for dtype, rounding, kernels in (
        (torch.float32, "auto", (True,)),
        (torch.bfloat16, "stochastic", (True, False)),
        (torch.bfloat16, "compensated", (True, False)),
        (torch.bfloat16, "nearest", (True,)),
        (torch.float16, "stochastic", (True, False)),
        (torch.float16, "compensated", (True,)),
        (torch.float16, "nearest", (True, False)),
    )
    for kernel in kernels
]
each_kind = pytest.mark.parametrize(("dtype", "rounding", "kernel"), KINDS)
some_kinds = pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "auto"), (torch.bfloat16, "stochastic"), (torch.float16, "compensated")],
    ids=str,
)
# Of 16 bits rounded to nearest, of which steps this small are lost.
quietly = pytest.mark.filterwarnings("ignore:.*rounding.*:UserWarning", "ignore:.*in one rounded step:UserWarning")


class OneAtATime:
    """The kernel for ranks that are threads: Triton's interpreter, and its compiler, serve one of them at a time."""

    def __init__(self, kernel: Any) -> None:
        lock = threading.Lock()

        class Batch(kernel.Batch):
            def add_(self, *arguments: Any, **options: Any) -> None:
                with lock:
                    super().add_(*arguments, **options)

        self.Batch, self.Product = Batch, kernel.Product


def written_by(kernel: bool, device: str, on_threads: bool = False) -> dict[str, Any]:
    """Return the options with which an optimizer writes as on a GPU: by the kernel, or by blocks of torch operations.

    Args:
        kernel: take the kernel; on a CPU Triton's interpreter runs it.
        device: of W.
        on_threads: several threads step at once.
    """
    if not kernel:
        return {"weight_update": internals.as_on_a_gpu() if device == "cpu" else internals.without_kernel()}
    if importlib.util.find_spec("triton") is None:
        pytest.skip("runs where Triton is installed")
    from deltaopt.rounding import _triton

    assert _triton.is_available(torch.device(device))
    if device == "cuda":
        assert internals.kernel_for(torch.device("cuda", torch.cuda.current_device())) is _triton
        if not on_threads:
            return {}
    return {"weight_update": internals.as_on_a_gpu(kernel=OneAtATime(_triton) if on_threads else _triton)}


class Layer(nn.Module):
    """W, A and B of one layer, the same numbers for each seed; of A and B multiples of `STEP`."""

    def __init__(self, size: tuple[int, int, int], dtype: torch.dtype, numbers: torch.Generator) -> None:
        super().__init__()
        c, d, r = size
        W, A, B = (torch.randn(shape, generator=numbers) for shape in ((c, d), (c, r), (r, d)))
        self.base = nn.Linear(d, c, bias=False, device="meta")
        self.base.weight = nn.Parameter(W.to(dtype), requires_grad=False)
        self.A, self.B = nn.Parameter((A * 4).round() * STEP), nn.Parameter((B * 4).round() * STEP)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x.to(self.base.weight.dtype)).to(x.dtype)
        return y + SCALING * (x @ self.B.mT) @ self.A.mT


class Run:
    """Some steps on a model, whole or sharded, with gradients of small integers.

    Args:
        device: of all tensors.
        dtype: of W.
        mesh: of the ranks; None for the whole model.
        placements: of W, A and B; None for `fully_shard`.
        inner: trains A and B.
        **options: of the optimizer.
    """

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        mesh: DeviceMesh | None = None,
        placements: Any = None,
        inner: Any = None,
        **options: Any,
    ) -> None:
        numbers = torch.Generator().manual_seed(0)
        self.device, self.mesh, self.gradients = device, mesh, torch.Generator().manual_seed(1)
        self.model = nn.Sequential(*(Layer(size, dtype, numbers) for size in SIZES)).to(device)
        if mesh is not None and placements is None:
            for layer in self.model:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        elif mesh is not None:
            for layer in self.model:
                self._place(layer.base, "weight", placements[0])
                self._place(layer, "A", placements[1])
                self._place(layer, "B", placements[2])
        options = {"update_ratio": RATIO, "rounding_seed": 3, **options}
        inner = inner or (lambda params: torch.optim.SGD(params, lr=STEP))
        self.optimizer = DeltaLoRAOptimizer(inner(self.factors), self.triples(), **options)

    def _place(self, module: nn.Module, name: str, placements: Any) -> None:
        p = getattr(module, name)
        setattr(module, name, nn.Parameter(self.placed(p.detach(), placements), p.requires_grad))

    def placed(self, tensor: Tensor, placements: Any) -> Tensor:
        if self.mesh is None or placements is WHOLE:
            return tensor
        return distribute_tensor(tensor, self.mesh, placements, src_data_rank=None)

    def triples(self) -> list[LoRATriple]:
        return [
            LoRATriple((layer.base, "weight"), (layer, "A"), (layer, "B"), scaling=SCALING, name=f"l{i}")
            for i, layer in enumerate(self.model)
        ]

    @property
    def weights(self) -> list[Tensor]:
        return [layer.base.weight for layer in self.model]

    @property
    def factors(self) -> list[Tensor]:
        return [p for layer in self.model for p in (layer.A, layer.B)]

    def steps(self, count: int = 1) -> Self:
        for _ in range(count):
            self.draw()
            self.optimizer.step()
        return self

    def draw(self) -> None:
        """Give A and B the gradients of the next step."""
        for p in self.factors:
            gradient = torch.randint(-2, 3, p.shape, generator=self.gradients).to(self.device, torch.float32)
            p.grad = self.placed(gradient, p.placements if isinstance(p, DTensor) else WHOLE)

    def displacements(self) -> list[Tensor]:
        return [self.optimizer.displacement(triple.label).product() for triple in self.optimizer.triples]


def copied(tensor: Tensor) -> Tensor:
    """Return all of a tensor in memory of its own, which `full_tensor` of one rank is not."""
    return whole(tensor).clone()


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.element_size() == 2 else tensor


def assert_same_weights(found: list[Tensor], expected: list[Tensor]) -> None:
    """16 bits are equal, float32 to its last places."""
    for W, other in zip(found, expected, strict=True):
        if W.dtype == torch.float32:
            torch.testing.assert_close(W, other, **LAST_PLACES)
        else:
            assert torch.equal(bits(W), bits(other))


def assert_follows(run: Run, alone: Run) -> None:
    for p, q in zip(run.factors, alone.factors, strict=True):
        assert torch.equal(whole(p), q.detach())
    assert_same_weights([whole(W) for W in run.weights], [whole(W) for W in alone.weights])
    for found, expected in zip(run.displacements(), alone.displacements(), strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def start_again(run: Run) -> None:
    """Round the factors of a restart, one of which is random, to multiples of `STEP`."""
    with torch.no_grad():
        for p in run.factors:
            here = p.to_local() if isinstance(p, DTensor) else p
            here.copy_((here / STEP).round() * STEP)


# one rank: NCCL on the device


@pytest.fixture(scope="module")
def of_one_rank() -> Iterator[Any]:
    """Return meshes of this process alone, by device: NCCL for the device, and gloo for the host, as on many ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")  # nothing has to resolve the host's name
        patch.setenv("NCCL_SOCKET_IFNAME", "lo")
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(0)
            torch.zeros((), device="cuda")
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield lambda device: init_device_mesh(device, (1,))
        finally:
            dist.destroy_process_group()
            forget_meshes()


def both_runs(mesh: DeviceMesh, device: str, dtype: torch.dtype, **options: Any) -> tuple[Run, Run]:
    return Run(device, dtype, mesh, **options), Run(device, dtype, **options)


@on_devices
@each_kind
@quietly
def test_five_steps_under_fully_shard_are_those_of_the_whole_model(of_one_rank, device, dtype, rounding, kernel):
    run, alone = both_runs(of_one_rank(device), device, dtype, rounding=rounding, **written_by(kernel, device))
    start = [copied(W) for W in run.weights]
    assert all(isinstance(p, DTensor) and p.device.type == device for p in run.model.parameters())
    run.steps(5)
    alone.steps(5)
    assert_follows(run, alone)
    assert not any(torch.equal(whole(W), before) for W, before in zip(run.weights, start, strict=True))
    for i in range(len(SIZES)):
        kept, other = (internals.compensation_of(each.optimizer, i) for each in (run, alone))
        assert (kept is not None) == (rounding == "compensated")
        assert kept is None or torch.equal(kept, other)


@on_devices
@some_kinds
@quietly
def test_events_of_one_rank_end_as_on_the_whole_model(of_one_rank, device, dtype, rounding):
    """With restarts, a change of the ratio, and steps in between."""
    run, alone = both_runs(of_one_rank(device), device, dtype, rounding=rounding)
    for each in (run, alone):
        each.steps(2).optimizer.restart()
        start_again(each)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of that change, and of the rounding
            each.optimizer.resync()
            each.steps(2)
            each.optimizer.groups[0].update_ratio = 1.0
            each.steps(2)
            each.optimizer.rebase()
            each.steps(1)
    assert_follows(run, alone)


@on_devices
@some_kinds
@quietly
def test_a_state_of_one_rank_resumes_bit_for_bit(of_one_rank, device, dtype, rounding):
    mesh = of_one_rank(device)
    run, resumed = (Run(device, dtype, mesh, rounding=rounding) for _ in range(2))
    state = copy.deepcopy((run.steps(3).model.state_dict(), run.optimizer.state_dict()))
    resumed.model.load_state_dict(state[0])
    resumed.optimizer.load_state_dict(state[1])
    resumed.gradients.set_state(run.gradients.get_state())
    run.steps(2)
    resumed.steps(2)
    for p, q in zip(run.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(bits(whole(p)), bits(whole(q)))
    for found, expected in zip(resumed.displacements(), run.displacements(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@on_devices
@pytest.mark.parametrize(
    ("dtype", "rounding", "keep_base"),
    [(torch.float32, "auto", None), (torch.bfloat16, "stochastic", "cpu"), (torch.bfloat16, "compensated", None)],
    ids=str,
)
def test_the_base_of_one_rank_comes_back_and_goes_again(of_one_rank, device, dtype, rounding, keep_base):
    run = Run(device, dtype, of_one_rank(device), rounding=rounding, keep_base=keep_base)
    start = [copied(W) for W in run.weights]
    run.steps(3)
    moved = [copied(W) for W in run.weights]
    with run.optimizer.base_weights():
        for W, base in zip(run.weights, start, strict=True):
            torch.testing.assert_close(whole(W), base, **({"rtol": 1e-5, "atol": 1e-5} if keep_base is None else {}))
    assert all(torch.equal(bits(whole(W)), bits(before)) for W, before in zip(run.weights, moved, strict=True))


@on_devices
def test_a_report_of_one_rank_is_that_of_the_whole_model(of_one_rank, device):
    run, alone = both_runs(of_one_rank(device), device, torch.bfloat16, rounding="stochastic", keep_base="device")
    found, expected = run.steps(3).optimizer.report(), alone.steps(3).optimizer.report()
    for layer, other in zip(found.layers, expected.layers, strict=True):
        assert layer.moves == other.moves == 3
        assert layer.asked == pytest.approx(other.asked, rel=1e-5)
        assert layer.kept == pytest.approx(other.kept, rel=1e-4)


@on_devices
def test_a_factor_that_is_not_finite_leaves_every_shard(of_one_rank, device):
    run = Run(device, torch.bfloat16, of_one_rank(device), rounding="stochastic").steps(2)
    before = [copied(W) for W in run.weights]
    run.draw()
    run.factors[1].grad.to_local()[0, 0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it comes now, or with a later step
        run.optimizer.step()
    assert run.optimizer.skipped_updates == 1
    assert all(torch.equal(bits(whole(W)), bits(old)) for W, old in zip(run.weights, before, strict=True))


@on_devices
@some_kinds
def test_training_by_forward_and_backward_passes_is_followed(of_one_rank, device, dtype, rounding):
    """Factors of any numbers, trained by FSDP2 and replayed into the whole model."""
    run = Run(
        device, dtype, of_one_rank(device), inner=lambda params: torch.optim.AdamW(params, lr=1e-2), rounding=rounding
    )
    replays: list[Replay] = []
    alone = Run(device, dtype, inner=lambda params: replays.append(Replay(params)) or replays[0], rounding=rounding)
    for t in range(5):
        run.optimizer.zero_grad()
        for layer in run.model:
            x = torch.randn(8, layer.base.in_features, generator=torch.Generator().manual_seed(t)).to(device)
            layer(x).square().mean().backward()
        run.optimizer.step()
        replays[0].values = [copied(p) for p in run.factors]
        alone.optimizer.step()
    for W, other in zip(run.weights, alone.weights, strict=True):
        found, expected = whole(W), other.detach()
        if dtype == torch.float32:
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
            continue
        # A sum in another order may differ in float32's last place, which rounding to 16 bits shows seldom.
        off = (bits(found).int() - bits(expected).int()).abs()
        assert int(off.max()) <= 1
        assert int(off.count_nonzero()) <= 0.01 * off.numel()


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@each_kind
@quietly
def test_a_sharded_step_waits_once_for_the_device(of_one_rank, dtype, rounding, kernel):
    """For what all ranks have found of their factors, which the host has to know; whatever the number of layers."""
    run = Run("cuda", dtype, of_one_rank("cuda"), rounding=rounding, **written_by(kernel, "cuda")).steps(3)
    for _ in range(3):
        run.draw()
        torch.cuda.synchronize()
        with waits() as places:
            run.optimizer.step()
        assert len(places) == 1, places
        assert "sharded_moves.py" in places[0]


@contextmanager
def waits() -> Iterator[list[str]]:
    """List where the host waits for the device, as "file:line"."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places += [f"{it.filename}:{it.lineno}" for it in found if "synchronizing CUDA operation" in str(it.message)]


# two ranks as threads, with their tensors on one device


PLACEMENTS = {
    "rows": ([S0], [S0], [S0]),
    "columns": ([S1], [S0], [S1]),
    "columns, factors along their other sides": ([S1], [S1], [S0]),
    "rows, factors whole": ([S0], WHOLE, WHOLE),
    "factors replicated": ([S0], [R], [R]),
}
PIECES = [
    pytest.param(name, *kind.values, id=f"{name}-{kind.id}")
    for name in PLACEMENTS
    for kind in KINDS
    if name in ("rows", "columns") or kind.values == (torch.bfloat16, "stochastic", True)
]


def pieces_on_rank(
    rank: int, device: str, dtype: torch.dtype, placements: Any, options: Any, expected: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return this rank's part of every W with its part of what is expected."""
    run = Run(device, dtype, init_device_mesh(device, (2,)), placements, **options).steps(2)
    run.optimizer.restart()
    start_again(run)
    run.steps(3)
    for found, moved in zip(run.displacements(), run.optimizer.triples, strict=True):
        assert found.shape == moved.W.shape
        assert found.any()
    return [(part(W), part(run.placed(W_0, placements[0]))) for W, W_0 in zip(run.weights, expected, strict=True)]


@on_devices
@pytest.mark.parametrize(("name", "dtype", "rounding", "kernel"), PIECES)
def test_pieces_of_two_ranks_have_the_bits_of_the_whole_model(device, name, dtype, rounding, kernel):
    if device == "cuda":
        torch.zeros((), device=device)  # a mesh takes the device that is in use
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of changes from outside, and of rounding to nearest
        alone = Run(device, dtype, rounding=rounding, **written_by(kernel, device)).steps(2)
        alone.optimizer.restart()
        start_again(alone)
        alone.steps(3)
        expected = [copied(W) for W in alone.weights]
        options = {"rounding": rounding, **written_by(kernel, device, on_threads=True)}
        ranks = on_threads(
            pieces_on_rank, device, dtype, PLACEMENTS[name], options, expected, world_size=2, limit=LIMIT
        )
    for pieces in ranks:
        assert all(found.device.type == device for found, _ in pieces)
        assert_same_weights(*zip(*pieces, strict=True))


# two processes: the ranks meet over gloo, while the weights are on the device


@on_devices
def test_two_processes_meet_over_gloo_and_move_their_pieces(device, tmp_path):
    if device == "cuda" and torch.__version__ < "2.12":
        pytest.skip(
            "torch 2.11 ends with a segmentation fault where gloo sends tensors of a GPU; to be seen with a later one"
        )
    alone = Run(device, torch.bfloat16, rounding="stochastic").steps(4)
    torch.save([W.detach().cpu() for W in alone.weights], tmp_path / "expected")
    context = torch.multiprocessing.spawn(in_a_process, (device, str(tmp_path)), nprocs=2, join=False)
    end = time.monotonic() + 2 * LIMIT
    try:
        while not context.join(1.0):
            assert time.monotonic() < end, "the processes have not ended"
    finally:
        for process in context.processes:
            process.kill()


def in_a_process(rank: int, device: str, folder: str) -> None:
    """Gloo sends what is on the device, as NCCL refuses two ranks there; what is sent by the host is its in any job."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(0)
        torch.zeros((), device=device)
    store = dist.FileStore(str(Path(folder, "store")), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT))
    mesh = DeviceMesh.from_group(dist.group.WORLD, device)  # a new mesh would take NCCL for the device
    run = Run(device, torch.bfloat16, mesh, ([S0], [S0], [S0]), rounding="stochastic").steps(4)
    expected = [W.to(device) for W in torch.load(Path(folder, "expected"))]
    for W, W_0 in zip(run.weights, expected, strict=True):
        assert torch.equal(bits(part(W)), bits(part(run.placed(W_0, [S0]))))
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    with run.optimizer.base_weights():
        pass
    run.draw()
    with pytest.raises(RanksDisagreeError, match=r"rank 0 is in step\(\), rank 1 is in restart\(\)"):
        run.optimizer.step() if rank == 0 else run.optimizer.restart()
    for W, W_0 in zip(run.weights, expected, strict=True):
        assert torch.equal(bits(part(W)), bits(part(run.placed(W_0, [S0]))))
    dist.destroy_process_group()
