"""What the tests of several ranks stand on: the kept pair of processes, and the ranks that are threads."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.support import kept_pair
from tests.support.distributed import on_all_ranks
from tests.support.threads import on_threads

pytestmark = pytest.mark.extra


def who(rank: int, *words: str) -> tuple:
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    return rank, dist.get_rank(), os.getpid(), int(total), words


def test_results_come_in_the_order_of_the_ranks_from_processes_that_are_kept():
    first, second = on_all_ranks(who, "a", "b"), on_all_ranks(who)
    assert [answer[:2] for answer in first] == [(0, 0), (1, 1)]
    assert [answer[3:] for answer in first] == [(3, ("a", "b"))] * 2
    assert [answer[2] for answer in first] == [answer[2] for answer in second]
    assert len({os.getpid(), *(answer[2] for answer in first)}) == 3


def raise_on(rank: int, raising: list[int]) -> None:
    if rank in raising:
        raise ValueError(f"no luck on {rank}")


@pytest.mark.parametrize("raising", [[0], [1], [0, 1]])
def test_an_exception_names_its_rank_and_place(raising):
    with pytest.raises(AssertionError) as caught:
        on_all_ranks(raise_on, raising)
    for rank in (0, 1):
        assert (f"ValueError: no luck on {rank}" in str(caught.value)) == (rank in raising)
        assert (f"rank {rank}: Traceback" in str(caught.value)) == (rank in raising)
    assert "in raise_on" in str(caught.value)
    on_all_ranks(who)


def raise_while_the_other_waits(rank: int) -> None:
    if rank:
        raise ValueError("the other waits")
    wait_for_the_other(rank)


def wait_for_the_other(rank: int) -> None:
    if rank == 0:
        print("so much is done", flush=True)
        dist.barrier()
    else:
        time.sleep(1000)


def end(rank: int, how: str) -> None:
    if rank == 0:
        wait_for_the_other(rank)
    elif how == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_exception_ends_the_wait_of_the_other_rank(monkeypatch):
    monkeypatch.setattr(kept_pair, "GRACE", 0.5)
    with pytest.raises(AssertionError, match=r"(?s)rank 0: still waited .*barrier.*rank 1: .*the other waits"):
        on_all_ranks(raise_while_the_other_waits)
    on_all_ranks(who)


def test_a_hang_is_ended_and_shows_where_it_was():
    before = [answer[2] for answer in on_all_ranks(who)]
    start = time.monotonic()
    places = r"(?s)rank 0: took longer than 2 s.*in barrier.*so much is done.*rank 1: took .*in wait_for_the_other"
    with pytest.raises(AssertionError, match=places):
        on_all_ranks(wait_for_the_other, limit=2.0)
    assert time.monotonic() - start < 30
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not set(before) & {answer[2] for answer in on_all_ranks(who)}


@pytest.mark.parametrize(("how", "code"), [("exit", 3), ("kill", -9)])
def test_a_process_that_ends_is_noticed(monkeypatch, how, code):
    monkeypatch.setattr(kept_pair, "GRACE", 0.5)
    with pytest.raises(AssertionError, match=f"rank 1: the process has ended, with {code}"):
        on_all_ranks(end, how)
    on_all_ranks(who)


def test_a_process_that_was_killed_between_tests_is_noticed(monkeypatch):
    monkeypatch.setattr(kept_pair, "GRACE", 0.5)
    os.kill(on_all_ranks(who)[1][2], signal.SIGKILL)
    with pytest.raises(AssertionError, match="rank 1: the process has ended, with -9"):
        on_all_ranks(who)
    on_all_ranks(who)


def crash(rank: int, times: int, folder: Path) -> int:
    """Crash on rank 1, for the first few times."""
    if rank == 0:
        dist.barrier()
        return 0
    before = len(list(folder.iterdir()))
    if before < times:
        folder.joinpath(f"{before}").touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()
    return before


def test_a_call_that_crashes_is_made_again_in_new_processes_and_its_stack_is_shown(tmp_path):
    with pytest.warns(UserWarning, match=r"(?s)a rank has crashed in crash.*Segmentation fault.*in crash"):
        assert on_all_ranks(crash, 1, tmp_path) == [0, 1]


@pytest.mark.filterwarnings("ignore:a rank has crashed")
def test_a_call_that_crashes_twice_has_failed(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)rank 1: the process has ended, with -11.*Segmentation fault"):
        on_all_ranks(crash, 2, tmp_path)
    on_all_ranks(who)


def test_what_cannot_be_sent_is_refused_and_the_pair_is_kept():
    before = on_all_ranks(who)
    with pytest.raises(AttributeError, match="local object"):
        on_all_ranks(lambda rank: None)
    assert on_all_ranks(who) == before


def return_a_function(rank: int):
    return lambda: None


def test_a_result_that_cannot_be_sent_is_an_exception():
    with pytest.raises(AssertionError, match=r"(?s)rank 0: .*local object.*rank 1: .*local object"):
        on_all_ranks(return_a_function)


def leave_a_mess(rank: int) -> None:
    os.environ["MESS"] = "1"
    os.environ.pop("RANK")
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (2, 1))
    distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]).mul_(2).full_tensor()
    if rank:
        dist.destroy_process_group()


def state(rank: int) -> tuple:
    assert dist.get_world_size() == 2
    mesh = init_device_mesh("cpu", (1, 2))
    product = distribute_tensor(torch.eye(4), mesh, [Shard(0), Shard(1)]).mul_(2).full_tensor()
    drawn = torch.rand(2).tolist()
    settings = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return product.tolist(), drawn, settings, os.getcwd(), environment


def test_a_test_leaves_nothing_to_the_next():
    before = on_all_ranks(state)
    on_all_ranks(leave_a_mess)
    assert on_all_ranks(state) == before
    assert before[0][0] == (2 * torch.eye(4)).tolist()
    assert before[0][2] == (torch.float32, 1, True)
    assert [answer[4]["RANK"] for answer in before] == ["0", "1"]


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_the_processes_end_with_the_one_that_started_them(how):
    code = """
        import os, signal, sys
        from tests.support import kept_pair
        from tests.integrations.test_several_ranks import on_all_ranks, wait_for_the_other, who
        if __name__ == "__main__":
            kept_pair.PRELOADED[:] = ["torch.distributed"]
            print(*(answer[2] for answer in on_all_ranks(who)), flush=True)
            if sys.argv[1] == "is killed":
                signal.setitimer(signal.ITIMER_REAL, 0.3)
                on_all_ranks(wait_for_the_other)
    """
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(code), how], capture_output=True, text=True)
    assert finished.returncode == (-signal.SIGALRM if how == "is killed" else 0), finished.stderr
    pids = [int(pid) for pid in finished.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while pids and time.monotonic() < deadline:
        pids = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
        time.sleep(0.05)
    assert not pids


def meet_on_a_mesh(rank: int, W: torch.Tensor) -> tuple:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    sharded = distribute_tensor(W, mesh, [Shard(0), Shard(1)])
    product = sharded @ sharded.T
    assert isinstance(product, DTensor)
    return rank, dist.get_rank(), sharded.to_local().shape, product.full_tensor()


def test_threads_are_ranks_of_a_mesh():
    W = torch.arange(30.0).view(6, 5)
    for _ in range(2):
        results = on_threads(meet_on_a_mesh, W)
        assert [result[:2] for result in results] == [(rank, rank) for rank in range(4)]
        assert [tuple(result[2]) for result in results] == [(3, 3), (3, 2)] * 2
        assert all(torch.equal(result[3], W @ W.T) for result in results)
    assert not dist.is_initialized()


def test_threads_differentiate():
    def loss_on(rank: int) -> torch.Tensor:
        mesh = init_device_mesh("cpu", (2,))
        W = distribute_tensor(torch.arange(6.0).view(2, 3), mesh, [Shard(0)]).requires_grad_()
        (W * W).sum().backward()
        return W.grad.full_tensor()

    for grad in on_threads(loss_on, world_size=2):
        assert torch.equal(grad, 2 * torch.arange(6.0).view(2, 3))


def test_an_exception_in_a_thread_ends_the_wait_of_the_others():
    def raise_on_1(rank: int) -> None:
        if rank == 1:
            raise ValueError("no luck")
        dist.barrier()

    with pytest.raises(AssertionError, match=r"(?s)\Arank 1: Traceback.*in raise_on_1.*no luck\s*\Z"):
        on_threads(raise_on_1)
    assert not dist.is_initialized()
    on_threads(meet_on_a_mesh, torch.ones(2, 2))


def test_a_thread_that_does_not_come_is_named():
    def leave_out(rank: int) -> None:
        if rank != 2:
            dist.barrier()

    with pytest.raises(AssertionError, match="after 1 s these had not ended: rank 0, rank 1, rank 3"):
        on_threads(leave_out, limit=1.0)
    on_threads(meet_on_a_mesh, torch.ones(2, 2))
