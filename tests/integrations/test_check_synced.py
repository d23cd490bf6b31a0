"""check_synced: whatever lets W become another one on some ranks is found, and told alike on all of them."""

import warnings
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from deltaopt import DeltaLoRAOptimizer, LoRATriple, RanksDisagreeError
from tests.support import sharded
from tests.support.distributed import WORLD, on_all_ranks
from tests.support.nightly import one_in
from tests.support.threads import on_threads

NAMES = ("first", "second", "third")
OF_ALL = " of 3 layers (first, second, third)"


class Layer(nn.Module):
    """One frozen W and the LoRA branch next to it."""

    def __init__(self, seed: int, c: int, d: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(c, d, generator=numbers).to(dtype), requires_grad=False)
        self.A = nn.Parameter(torch.randn(c, 2, generator=numbers))
        self.B = nn.Parameter(torch.randn(2, d, generator=numbers))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.float().mT + x @ self.B.mT @ self.A.mT


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    sizes = (5, 6, 7, 4)
    return nn.Sequential(*(Layer(i, c, d, dtype) for i, (d, c) in enumerate(pairwise(sizes))))


def optimizer_of(model: nn.Module, **options) -> DeltaLoRAOptimizer:
    names = options.pop("names", NAMES)
    layers = options.pop("layers", range(len(names)))
    triples = [LoRATriple(model[i].weight, model[i].A, model[i].B, name=names[i]) for i in layers]
    others = [p for i in range(3) if i not in layers for p in (model[i].A, model[i].B)]
    return DeltaLoRAOptimizer(options.pop("inner", torch.optim.AdamW), triples, others, **{"lr": 0.01, **options})


class Run:
    """A data-parallel model and its optimizer."""

    def __init__(self, rank: int, model: nn.Module | None = None, wrap: dict | None = None, **options) -> None:
        self.model = model_of() if model is None else model
        self.ddp = DistributedDataParallel(self.model, **(wrap or {}))
        self.optimizer = optimizer_of(self.model, **options)
        self.numbers = torch.Generator().manual_seed(rank)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.ddp(torch.randn(8, 5, generator=self.numbers)).square().mean().backward()

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            self.backward()
            self.optimizer.step()
        return self

    def told(self) -> str:
        return told(self.optimizer.check_synced)


def told(call: Callable[[], object]) -> str:
    try:
        call()
    except RanksDisagreeError as error:
        return str(error)
    return "in sync"


def lines_of(work: Callable, *arguments) -> list[str]:
    """What all ranks are told, which has to be the same: a line for each difference."""
    first, *others = on_all_ranks(work, *arguments)
    assert all(other == first for other in others)
    headline, *lines, closing = first.splitlines()
    assert headline == "the ranks are not in sync:"
    assert closing.startswith("What differs stays different: load one checkpoint")
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("rule", "dtype", "rounding"),
    one_in(2, ["folded", "in_place"], [torch.float32, torch.bfloat16], ["compensated", "stochastic"]),
)
def test_ranks_of_a_data_parallel_run_are_in_sync(rule, dtype, rounding):
    assert on_all_ranks(in_sync_on_rank, rule, dtype, rounding) == ["in sync"] * WORLD


def in_sync_on_rank(rank: int, rule: str, dtype: torch.dtype, rounding: str) -> str:
    torch.manual_seed(rank)
    if rule == "folded":
        return told(scaled_run(rank).train(3).optimizer.check_synced)
    options = {"rounding": rounding, "keep_base": "cpu", "start_step": 1}
    run = Run(rank, model_of(dtype), update_ratio=lambda t: 1.0 + t % 2, **options)
    run.optimizer.check_synced()
    run.train(3).optimizer.check_synced()
    run.optimizer.restart()  # the ranks have other global seeds
    run.train(3)
    with run.optimizer.base_weights():
        pass
    return run.told()


def scaled_run(rank: int, **options) -> Run:
    run = Run(rank)
    scalings = [torch.tensor(1.0) for _ in NAMES]
    triples = [
        LoRATriple(layer.weight, layer.A, layer.B, scaling=scaling, name=name)
        for layer, scaling, name in zip(run.model, scalings, NAMES, strict=True)
    ]
    options = {"lr": 0.01, "weight_update": "folded", "start_step": 2, **options}
    run.optimizer = DeltaLoRAOptimizer(torch.optim.AdamW, triples, **options)
    return run


@pytest.mark.parametrize("how", ["after the constructor", "init_sync=False"])
def test_a_w_that_differs_is_found_before_the_first_step_and_after_it(how):
    [line] = lines_of(another_weight_on_rank, how, 0)
    assert line.startswith("W of 1 layer (second): rank 1 differs from rank 0: load or broadcast the weights before")
    [line] = lines_of(another_weight_on_rank, how, 2)
    assert line.startswith("W, the base of 1 layer (second): rank 1 differs from rank 0: load or broadcast the weights")


def another_weight_on_rank(rank: int, how: str, steps: int) -> str:
    model = model_of()
    if how == "init_sync=False":
        model[1].weight.data[0, 0] += rank
        run = Run(rank, model, {"init_sync": False})
    else:
        run = Run(rank, model)
        model[1].weight.data[0, 0] += rank
    # The gradients are those of both: A and B stay the same on the ranks.
    return run.train(steps).told()


def test_a_w_that_differs_before_the_constructor_is_made_the_same_by_it():
    assert on_all_ranks(broadcast_weight_on_rank) == ["in sync"] * WORLD


def broadcast_weight_on_rank(rank: int) -> str:
    model = model_of()
    model[1].weight.data += rank
    return Run(rank, model).train(2).told()


def test_a_nan_on_one_rank_after_the_gradients_were_averaged_is_found():
    lines = lines_of(nan_on_rank)
    assert lines[0].startswith(
        "skipped updates: 0 on rank 0, 1 on rank 1: a factor became NaN or infinite on some ranks only, after the "
        "gradients were averaged"
    )
    assert lines[1:] == [
        "A and B of 1 layer (first): rank 1 differs from rank 0",
        f"W, the ledger{OF_ALL}: rank 1 differs from rank 0",
    ]


def nan_on_rank(rank: int) -> str:
    run = Run(rank).train(2)
    run.backward()
    if rank == 1:
        run.model[0].A.grad[0, 0] = torch.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.optimizer.step()
    said = [str(warning.message) for warning in caught]
    if rank == 1:
        assert len(said) == 1
        assert said[0].startswith(
            "a LoRA factor became NaN or infinite on rank 1: the update of every W there was skipped, and W is as it "
            "was. Where the other ranks did not skip it, W is another one there: optimizer.check_synced()"
        )
    else:
        assert said == []
    return run.told()


def test_a_rank_that_left_out_a_step_is_found():
    lines = lines_of(left_out_on_rank)
    assert lines[0].startswith("step count: 3 on rank 0, 2 on rank 1: a rank has left out a step()")
    assert lines[1:] == [f"A and B, W, the ledger{OF_ALL}: rank 1 differs from rank 0"]


def left_out_on_rank(rank: int) -> str:
    run = Run(rank).train(2)
    run.backward()
    if rank == 0:
        run.optimizer.step()
    return run.told()


def test_uneven_inputs_under_join_are_found():
    """The rank that ends first takes over the last one's model, but has taken fewer steps with its optimizer."""
    lines = lines_of(joined_on_rank)
    assert lines[0].startswith("step count: 2 on rank 0, 4 on rank 1: a rank has left out a step()")
    assert "Join with uneven inputs" in lines[0]
    assert lines[1:] == [f"the ledger{OF_ALL}: rank 1 differs from rank 0"]


def joined_on_rank(rank: int) -> str:
    run = Run(rank)
    with Join([run.ddp]):
        run.train(2 + 2 * rank)
    return run.told()


SETTINGS = {
    "update_ratio": (1.0, 3.0, OF_ALL, "W, the ledger"),
    "start_step": (0, 2, OF_ALL, "W, the base, the ledger"),
    "rounding_seed": (0, 7, "", "W"),
    "rounding": ("compensated", "nearest", "", "W, the compensation"),
    "keep_base": (None, "cpu", "", ""),
}
"""By name: its value on each rank, the layers it is told of, and what has become different after two steps."""


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_differs_is_found(name):
    on_first, on_second, of, follows = SETTINGS[name]
    lines = lines_of(setting_on_rank, {name: on_first}, {name: on_second})
    assert lines[0] == f"{name}{of}: {on_first} on rank 0, {on_second} on rank 1: give every rank the same"
    assert lines[1:] == ([f"{follows}{OF_ALL}: rank 1 differs from rank 0"] if follows else [])


def test_schedules_that_differ_are_found_by_their_last_value():
    lines = lines_of(schedule_on_rank)
    assert lines[0].startswith(
        f"update_ratio{OF_ALL}: a callable, last 1.0 on rank 0, a callable, last 2.0 on rank 1: "
    )


def schedule_on_rank(rank: int) -> str:
    return Run(rank, update_ratio=lambda t: 1.0 + rank).train(2).told()


def setting_on_rank(rank: int, *options: dict) -> str:
    return Run(rank, model_of(torch.bfloat16), **{"rounding": "auto", **options[rank]}).train(2).told()


CAUSES = {
    "another W": "W, the base of 3 layers (first, second, third): rank 1 differs from rank 0",
    "a NaN after the average": "A and B of 1 layer (first): rank 1 differs from rank 0",
    "a step left out": "step count: 3 on rank 0, 2 on rank 1: a rank has left out a step()",
    "another ratio": f"update_ratio{OF_ALL}: 2.0 on rank 0, 3.0 on rank 1: give every rank the same",
}


@pytest.mark.parametrize("cause", CAUSES)
def test_what_differs_in_a_folded_run_is_found(cause):
    assert any(line.startswith(CAUSES[cause]) for line in lines_of(folded_difference_on_rank, cause))


def folded_difference_on_rank(rank: int, cause: str) -> str:
    run = scaled_run(rank, **({"update_ratio": 3.0} if cause == "another ratio" and rank == 1 else {})).train(2)
    run.backward()
    if rank == 1 and cause == "another W":
        for layer in run.model:
            layer.weight.data[0, 0] += 1
    if rank == 1 and cause == "a NaN after the average":
        run.model[0].A.grad[0, 0] = torch.nan
    if rank == 0 or cause != "a step left out":
        run.optimizer.step()
    return run.told()


def test_triples_of_other_names_or_of_another_set_are_found():
    names = lines_of(other_triples_on_rank, {}, {"names": ("first", "second", "last")})
    assert names[0] == (
        "1 layer (third) only on rank 0: register the same triples, under the same names, on every rank"
    )
    assert names[1].startswith("1 layer (last) only on rank 1: ")
    fewer = lines_of(other_triples_on_rank, {}, {"layers": [0, 2]})
    assert fewer[0].startswith("1 layer (second) only on rank 0: register the same triples")


def test_triples_in_another_order_are_found():
    [line] = lines_of(other_triples_on_rank, {}, {"layers": [1, 0, 2]})
    assert line == (
        "the order of the triples: rank 1 has another one than rank 0: hand them over in the same order on every rank"
    )


def other_triples_on_rank(rank: int, *options: dict) -> str:
    return Run(rank, **options[rank]).told()


def test_other_shapes_dtypes_layouts_and_inner_optimizers_are_found():
    lines = lines_of(other_layers_on_rank)
    assert lines[0].startswith(
        "the inner optimizer: torch.optim.sgd.SGD on rank 0, torch.optim.adamw.AdamW on rank 1: give every rank"
    )
    layout = "linear, rows=None, columns=None on rank 0, linear, rows=(0, 2), columns=None on rank 1"
    assert {line.removesuffix(": give every rank the same") for line in lines} >= {
        "dtypes of 1 layer (first): float32, float32, float32 on rank 0, float64, float32, float32 on rank 1",
        "scaling of 1 layer (second): 1.0 on rank 0, 2.0 on rank 1",
        f"layout of 1 layer (third): {layout}",
        "shapes of 1 layer (third): (4, 7), (4, 2), (2, 7) on rank 0, (4, 7), (2, 2), (2, 7) on rank 1",
    }


def other_layers_on_rank(rank: int) -> str:
    model = model_of()
    first, second, third = model
    triples = [
        LoRATriple(first.weight.data.double() if rank else first.weight, first.A, first.B, name="first"),
        LoRATriple(second.weight, second.A, second.B, 1.0 + rank, name="second"),
        LoRATriple(
            third.weight,
            third.A.data[:2].clone().requires_grad_() if rank else third.A,
            third.B,
            rows=(0, 2) if rank else None,
            name="third",
        ),
    ]
    inner = torch.optim.AdamW if rank else torch.optim.SGD
    return told(DeltaLoRAOptimizer(inner, triples, lr=0.1).check_synced)


def test_many_layers_are_told_in_one_line_and_the_odd_rank_of_many_is_named():
    first, *others = on_threads(odd_rank_on_thread)
    assert others == [first] * 3
    _, line, *_ = first.splitlines()
    eight = ", ".join(f"triple{i}" for i in range(8))
    assert line.startswith(f"  W of 12 layers ({eight}, ...): rank 2 differs from ranks 0-1, 3: load or broadcast")


def odd_rank_on_thread(rank: int) -> str:
    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=numbers)

    numbers = torch.Generator().manual_seed(0)
    triples = [
        (randn(4, 6) + (rank == 2), randn(4, 2).requires_grad_(), randn(2, 6).requires_grad_()) for _ in range(12)
    ]
    return told(DeltaLoRAOptimizer(torch.optim.SGD, triples, lr=0.1).check_synced)


def test_a_group_compares_its_own_ranks():
    results = on_threads(grouped_on_thread)
    assert [result[0] for result in results] == ["in sync"] * 4
    assert all("W of 1 layer (triple0): ranks 2-3 differ from ranks 0-1" in result[1] for result in results)


def grouped_on_thread(rank: int) -> tuple[str, str]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    W, A, B = torch.full((4, 6), float(rank // 2)), torch.zeros(4, 2), torch.ones(2, 6)
    optimizer = DeltaLoRAOptimizer(torch.optim.SGD, [(W, A.requires_grad_(), B.requires_grad_())], lr=0.1)
    optimizer.check_synced(groups[1 - rank // 2])  # of which this rank is none
    return told(lambda: optimizer.check_synced(groups[rank // 2])), told(optimizer.check_synced)


def test_a_rank_that_cannot_say_what_it_has_fails_on_all_ranks():
    first, second = on_all_ranks(at_base_on_rank)
    assert first == "RuntimeError: check_synced() within base_weights(), where no W is what this optimizer moved it to"
    assert second.startswith(f"RanksDisagreeError: rank 0 raised {first}")
    assert second.endswith("in check_synced(): its call was given up on every rank")


def at_base_on_rank(rank: int) -> str:
    run = Run(rank, keep_base="cpu").train(1)
    try:
        if rank == 0:
            with run.optimizer.base_weights():
                run.optimizer.check_synced()
        else:
            run.optimizer.check_synced()
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
        return said.split(": leave it first")[0] if rank == 0 else said
    return "in sync"


def test_a_rank_that_does_not_come_is_named():
    said = on_all_ranks(absent_on_rank)
    assert said[0].startswith("rank 1 did not come to check_synced() within 1 seconds: all ranks have to call it")


def absent_on_rank(rank: int) -> str:
    store = dist.PrefixStore("short", dist.distributed_c10d._get_default_store())
    dist.destroy_process_group()
    timeout = timedelta(seconds=1)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timeout)
    run = Run(rank)
    return "" if rank else run.told()


def test_no_step_and_no_state_of_a_data_parallel_run_needs_the_other_ranks():
    assert on_all_ranks(alone_on_rank) == ["done"] * WORLD


def alone_on_rank(rank: int) -> str:
    run = Run(rank).train(1)
    run.backward()
    if rank == 0:  # nobody answers
        run.optimizer.step()
        run.optimizer.load_state_dict(run.optimizer.state_dict())
        run.optimizer.restart()
        run.optimizer.report()
    dist.barrier()
    return "done"


def test_one_process_returns_at_once():
    optimizer = optimizer_of(model_of())
    optimizer.check_synced()


def test_packed_weights_are_left_out():
    assert on_all_ranks(unreadable_on_rank) == ["in sync"] * WORLD


def unreadable_on_rank(rank: int) -> str:
    W = (torch.randn(4, 6) * 10 + rank).to(torch.int8)
    A, B = torch.zeros(4, 2, requires_grad=True), torch.ones(2, 6, requires_grad=True)
    triple = LoRATriple(W, A, B, scaling=torch.tensor(1.0))
    return told(DeltaLoRAOptimizer(torch.optim.SGD, [triple], lr=0.1, weight_update="folded").check_synced)


# Sharded tensors: four ranks, two of which hold the same part of each.

WAYS = {
    "HSDP": ([sharded.R, sharded.S0],) * 3,
    "HSDP with whole factors": ([sharded.R, sharded.S0], sharded.WHOLE, sharded.WHOLE),
    "tensor parallel, by columns": ([sharded.R, sharded.S0], [sharded.R, sharded.S0], [sharded.R, sharded.R]),
    "tensor parallel, by rows": ([sharded.R, sharded.S1], [sharded.R, sharded.R], [sharded.R, sharded.S1]),
}
SIZES = [sharded.linear(7, 6, 3), sharded.linear(5, 7, 1)]
BOTH = " of 2 layers (layer 0, layer 1)"


def sharded_run(way: str, **options) -> sharded.Run:
    mesh = init_device_mesh("cpu", (2, 2))
    return sharded.Run(SIZES, torch.bfloat16, WAYS[way], mesh, rounding="compensated", **options)


@pytest.mark.parametrize("way", WAYS)
def test_sharded_ranks_are_in_sync(way):
    assert on_threads(sharded_in_sync_on_thread, way) == ["in sync"] * 4


def sharded_in_sync_on_thread(rank: int, way: str) -> str:
    run = sharded_run(way, keep_base="cpu")
    run.optimizer.check_synced()
    run.steps(3)
    return told(run.optimizer.check_synced)


@pytest.mark.parametrize("way", WAYS)
def test_a_block_that_differs_from_that_of_its_replicas_is_found(way):
    first, *others = on_threads(block_differs_on_thread, way)
    assert others == [first] * 3
    _, line, *more, _ = first.splitlines()
    assert line.startswith("  W of 1 layer (layer 1): rank 2 differs from rank 0: load or broadcast the weights")
    assert more == []


def block_differs_on_thread(rank: int, way: str) -> str:
    run = sharded_run(way)
    run.steps(2)
    if rank == 2:  # the other rank with the first block is 0
        run.tensors[1][0].detach().to_local()[0, 0] += 1
    return told(run.optimizer.check_synced)


def test_replicas_of_factors_compensations_and_settings_that_differ_are_found():
    first, *others = on_threads(replicas_differ_on_thread)
    assert others == [first] * 3
    lines = [line.strip() for line in first.splitlines()[1:-1]]
    assert lines == [
        f"update_ratio{BOTH}: 2.0 on ranks 0-1, 3, 1.5 on rank 2: give every rank the same",
        "A and B of 1 layer (layer 0): rank 3 differs from rank 1",
        "the compensation of 1 layer (layer 1): rank 2 differs from rank 0",
    ]


def replicas_differ_on_thread(rank: int) -> str:
    run = sharded_run("HSDP")
    run.steps(2)
    if rank == 3:
        run.tensors[0][1].detach().to_local()[0, 0] += 1
    if rank == 2:
        run.optimizer._weights[1].compensation.bits[0, 0] += 1
        run.optimizer.groups[0].update_ratio = 1.5
    return told(run.optimizer.check_synced)


def test_a_group_without_ranks_that_hold_parts_is_refused():
    assert on_threads(part_of_the_ranks_on_thread) == ["refused", "refused", "in sync", "in sync"]


def part_of_the_ranks_on_thread(rank: int) -> str:
    run, group = sharded_run("HSDP"), dist.new_group([0, 1])
    if rank < 2:
        with pytest.raises(ValueError, match=r"over the ranks \[0, 1, 2, 3\]: give it a group that holds all of these"):
            run.optimizer.check_synced(group)
        return "refused"
    run.optimizer.check_synced(group)  # of which this rank is none
    return "in sync"
