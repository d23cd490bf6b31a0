"""Ranks that meet on the host: they agree, or every one of them raises. The only file with collectives of the host.

Each meeting exchanges messages of fixed sizes in a gloo group of its own, so that no rank can take them for another
collective's, and notes in the job's store who has come, so that those who have not can be named.
"""

from __future__ import annotations

import hashlib
import json
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deltaopt.all_or_nothing import Issued, note_result

FACTS = 6
"""Facts that a meeting can compare."""

WIDTH = 8192
"""Bytes in which a rank says what differs."""

GRACE = 3.0
"""Seconds for the others to come, once the connection to one rank is closed."""

SIGNALS = timedelta(seconds=0.5)
"""How long a signal handler waits for its turn at most, while this rank waits for the others."""

NAMED = 8
"""Ranks that one sentence names; it counts the others."""

THREADED = "threaded"
"""The backend of torch's own tests, whose ranks are threads: gloo does not connect them."""

SIMULATED = "fake"
"""The backend of torch that has one real rank, which the others are taken to agree with."""

HINTS = {"step count": "a rank has left out a step()"}
"""What a fact that differs is a sign of."""


class RanksDisagreeError(RuntimeError):
    """The ranks of a distributed job are not in the same call, or not with the same values; or one did not come.

    Every rank that came raises it, with the same message.
    """


class Ranks:
    """Some ranks of the default process group, by their global numbers. It may be copied and pickled.

    A call of any method but the constructor is a collective: all of these ranks have to make it, in the same order.
    Without an initialised process group, and for one rank, each returns at once.

    Args:
        ranks: the global numbers; this process is one of them.
        timeout: seconds that a meeting waits for a rank. Default: as long as the default group does.
    """

    def __init__(self, ranks: Sequence[int], timeout: float | None = None) -> None:
        self.ranks = tuple(sorted(ranks))
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"Ranks({list(self.ranks)}, timeout={self.timeout})"

    @property
    def is_first(self) -> bool:
        """True on the lowest of these ranks."""
        return self._alone() or dist.get_rank() == self.ranks[0]

    @property
    def group(self) -> Any:
        """A process group of these ranks for tensors on the device. The first use of it is a collective."""
        if len(self.ranks) == dist.get_world_size():
            return dist.group.WORLD
        control = self._control()
        if control.device_group is None:
            control.device_group = dist.new_group(list(self.ranks), use_local_synchronization=True)
        return control.device_group

    def meet(
        self,
        event: str,
        facts: Mapping[str, object] | None = None,
        error: BaseException | None = None,
        meeting: Meeting | None = None,
    ) -> None:
        """Return once all ranks are in `event` with the same `facts` and no `error`; else raise on all of them.

        Args:
            event: where this rank is, for example "step()".
            facts: at most 6 values by name that are equal on all ranks, compared as text.
            error: what this rank failed with.
            meeting: of an event that makes this call again after an exception, which then continues it.

        Raises:
            RanksDisagreeError: if another rank failed, is in another event or has another fact; if a rank does not
                come within the timeout or its process has ended. After the latter every later meeting raises it.
            BaseException: `error`, on the rank that handed it in.
        """
        facts = {} if facts is None else facts
        if len(facts) > FACTS:
            raise ValueError(f"a meeting compares at most {FACTS} facts, got {len(facts)}")
        if self._alone():
            if error is not None:
                raise error
            return
        control, meeting = self._control(), Meeting() if meeting is None else meeting
        issued = meeting.issued.again()
        texts = {name: _text(value) for name, value in facts.items()}
        if not issued.begun:
            control.arrive(event, meeting)
        hashes = [_hash(f"{name}={text}") for name, text in texts.items()]
        words = [meeting.number, _hash(event), int(error is not None), len(texts), *hashes]
        vector = torch.zeros(4 + FACTS, dtype=torch.int64)
        vector[: len(words)] = torch.tensor(words, dtype=torch.int64)
        vectors = control.exchange(event, vector, issued)
        if not any(int(other[2]) for other in vectors) and all(torch.equal(other, vectors[0]) for other in vectors):
            return
        said = {"count": meeting.number, "event": _clipped(event, 128)}
        if error is not None:
            said["error"] = _clipped(f"{type(error).__name__}: {_first_line(error)}", 1024)
        clipped = {_clipped(name, 64): _clipped(text, 512) for name, text in texts.items()}
        found = control.exchange_json(event, {**said, "facts": clipped}, issued=issued)
        all_said = dict(zip(self.ranks, found, strict=True))
        if error is not None:
            raise error
        raise RanksDisagreeError(_difference(all_said))

    def gather(self, event: str, value: Any, error: BaseException | None = None) -> dict[int, Any]:
        """Return the value of each rank, by its global number, on all ranks.

        Args:
            event: as in `meet`.
            value: of numbers, strings, lists and dicts with strings as keys.
            error: as in `meet`.

        Raises:
            RanksDisagreeError: as `meet` does.
            BaseException: as `meet` does.
        """
        self.meet(event, error=error)
        if self._alone():
            return dict.fromkeys(self.ranks[:1], json.loads(json.dumps(value)))
        control = self._control()
        data = json.dumps(value).encode()
        sizes = control.exchange(event, torch.tensor([len(data)]))
        return dict(zip(self.ranks, control.exchange_json(event, value, max(map(int, sizes))), strict=True))

    def _alone(self) -> bool:
        if not (dist.is_available() and dist.is_initialized()) or len(self.ranks) < 2:
            return True
        return dist.get_backend() == SIMULATED or dist.get_rank() not in self.ranks

    def _control(self) -> _Control:
        """Return the control group of these ranks, which all optimizers of this process share."""
        world: Any = dist.group.WORLD
        controls = _controls.setdefault(world, {})
        key = self.ranks, self.timeout
        if key not in controls:
            controls[key] = _Control(self.ranks, self.timeout)
        return controls[key]


class Meeting:
    """One meeting of this rank, which may be interrupted and continued.

    Attributes:
        number: of the meetings of these ranks, counted from 1; 0 until this rank has come.
        issued: what it has sent to the others.
    """

    def __init__(self) -> None:
        self.number = 0
        self.issued = Issued()


class _Control:
    """The meetings of these ranks: their number, their group, and why there can be no more of them."""

    def __init__(self, ranks: tuple[int, ...], timeout: float | None) -> None:
        self.ranks = ranks
        self.rank = dist.get_rank()
        self.timeout = _default_timeout() if timeout is None else timeout
        self.store: Any = dist.distributed_c10d._get_default_store()
        self.backend = dist.get_backend()
        self.groups: list[Any] = []
        self.starts: list[int] = []
        self.device_group: Any = None
        self.count = 0
        self.broken: str | None = None
        self.began = 0.0
        self.family = f"deltaopt/{_hash(f'{ranks} {timeout}')}"

    def arrive(self, event: str, meeting: Meeting) -> None:
        """Note in the store that this rank has come, and make the group at the first meeting.

        It may be called again after an exception: `meeting` knows its number then, and whatever must not be done twice
        is noted.
        """
        if self.broken is not None:
            raise RanksDisagreeError(self.broken)
        meeting.number = meeting.number or self.count + 1
        self.count = max(self.count, meeting.number)
        self.began = time.monotonic()
        try:
            if not self.starts:  # 1 in this store, unless the default group was destroyed and made again
                note_result(self.starts, partial(self.store.add, f"{self.family}/{self.rank}", 1))
            self.store.set(f"{self.name}/at/{self.rank}", f"{meeting.number} {event}")
            if not self.groups:
                note_result(self.groups, self._new_group())
        except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
            raise self._broke(event, error) from error

    @property
    def name(self) -> str:
        """What the keys in the store begin with."""
        return f"{self.family}/{next(iter(self.starts), 0)}"

    def _new_group(self) -> Callable[[], Any]:
        """Return the call that makes the group: all of these ranks make it once, so that it has to be noted."""
        if self.backend == THREADED:
            return partial(dist.new_group, list(self.ranks), use_local_synchronization=True)
        # Not by `new_group`: its name depends on how many groups this rank has made, which may differ between ranks.
        store = dist.distributed_c10d.PrefixStore(f"{self.name}/gloo", self.store)
        timeout = timedelta(seconds=self.timeout)
        return partial(dist.ProcessGroupGloo, store, self.ranks.index(self.rank), len(self.ranks), timeout)

    def exchange(self, event: str, tensor: Tensor, issued: Issued | None = None) -> list[Tensor]:
        """Return the tensors of all ranks, which have one shape and dtype."""
        issued = Issued() if issued is None else issued
        output = [torch.empty_like(tensor) for _ in self.ranks]
        try:
            found: list[Tensor] = issued.output(output, partial(self.groups[0].allgather, [output], [tensor]), _wait)
        except RuntimeError as error:
            raise self._broke(event, error) from error
        return found

    def exchange_json(self, event: str, value: Any, width: int = WIDTH, issued: Issued | None = None) -> list[Any]:
        """Return the values of all ranks, each of which takes at most `width` bytes."""
        data = json.dumps(value).encode()
        sent = torch.frombuffer(bytearray(data.ljust(width)), dtype=torch.uint8)
        return [json.loads(bytes(other.tolist())) for other in self.exchange(event, sent, issued)]

    def _broke(self, event: str, error: Exception) -> RanksDisagreeError:
        """Return what all ranks raise from now on, after the ranks that are late have had a moment to come."""
        try:
            self.broken = self._cause(event, error)
        except RuntimeError:  # the store is gone with its process
            others = [rank for rank in self.ranks if rank != self.rank]
            holder = 0 if self.rank != 0 and 0 in self.ranks else None
            self.broken = (
                f"{named(others if holder is None else [holder])} did not come to {event}, and the store of the job "
                f"cannot be reached: the process that holds it{' (rank 0)' if holder == 0 else ''} has ended"
            )
        return RanksDisagreeError(self.broken)

    def _cause(self, event: str, error: Exception) -> str:
        now = time.monotonic()
        in_time = now - self.began < 0.9 * self.timeout
        deadline = min(self.began + self.timeout, now + GRACE)
        while True:
            if self.store.check([f"{self.name}/broken"]):  # another rank has found out before
                return str(self.store.get(f"{self.name}/broken").decode())
            last = {rank: self._last(rank) for rank in self.ranks}
            absent = [rank for rank, (count, _) in last.items() if count < self.count]
            if not absent or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        if absent:
            how = (
                ": the connection to it is closed, so its process has ended"
                if in_time
                else f" within {self.timeout:g} seconds: all ranks have to call it together"
            )
            where = ", ".join(
                f"rank {rank} {f'was last in {last[rank][1]}' if last[rank][0] else 'has been in none of its calls'}"
                for rank in absent[:NAMED]
            )
            text = f"{named(absent)} did not come to {event}{how} ({where})"
        else:
            text = f"the ranks lost their connection in {event}, to which all of them came: {_first_line(error)}"
        self.store.set(f"{self.name}/broken", text)
        return text

    def _last(self, rank: int) -> tuple[int, str]:
        """Return the number and the event of the last meeting that a rank came to."""
        key = f"{self.name}/at/{rank}"
        if not self.store.check([key]):
            return 0, ""
        count, event = self.store.get(key).decode().split(" ", 1)
        return int(count), event


_controls: weakref.WeakKeyDictionary[Any, dict[Any, _Control]] = weakref.WeakKeyDictionary()
"""By the default group: another one after `destroy_process_group` has others."""


def _wait(work: Any) -> None:
    """Wait for what has been sent, in short stretches: a signal handler, that of Ctrl-C too, runs only between them.

    A rank that does not come would else keep the others from being ended for the whole timeout.
    """
    while isinstance(work, dist.Work) and not work.is_completed():
        try:
            work.wait(SIGNALS)
        except RuntimeError:
            if work.is_completed():  # it has failed; else only this stretch has ended
                break
    work.wait()  # raises what has failed


def _default_timeout() -> float:
    world: Any = dist.group.WORLD
    for device in getattr(world, "_device_types", ()):
        options = getattr(world._get_backend(device), "options", None)
        if isinstance(found := getattr(options, "_timeout", None), timedelta):
            return found.total_seconds()
    return float(dist.distributed_c10d.default_pg_timeout.total_seconds())


def _difference(said: dict[int, dict[str, Any]]) -> str:
    """Return one message from what the ranks said: errors, else events, else facts."""
    if failed := {rank: it["error"] for rank, it in said.items() if "error" in it}:
        event = said[min(failed)]["event"]
        others = "its call was given up on every rank"
        return "; ".join(f"{named(ranks)} raised {e}" for e, ranks in alike(failed)) + f", in {event}: {others}"
    events = {rank: it["event"] for rank, it in said.items()}
    if len(set(events.values())) > 1:
        where = ", ".join(f"{named(ranks)} {_is(ranks)} in {event}" for event, ranks in alike(events))
        return f"{where}: all ranks have to call the same together"
    lines = []
    for name in dict.fromkeys(name for it in said.values() for name in it["facts"]):
        values = {rank: it["facts"].get(name, "nothing") for rank, it in said.items()}
        if len(set(values.values())) > 1:
            lines.append(fact_difference(name, values))
    event = next(iter(events.values()))
    if not lines:
        counts = {rank: str(it["count"]) for rank, it in said.items()}
        lines = [fact_difference("number of calls", counts)]
    return f"the ranks are in {event} with different values:\n" + "\n".join(f"  {line}" for line in lines)


def fact_difference(name: str, values: Mapping[int, str]) -> str:
    """Return for example "step count: 5 on rank 0, 6 on rank 1: a rank has left out a step()"."""
    return f"{name}: {on_ranks(values)}" + (f": {HINTS[name]}" if name in HINTS else "")


def on_ranks(values: Mapping[int, str]) -> str:
    """Return for example "5 on ranks 0-2, 6 on rank 3"."""
    return ", ".join(f"{value} on {named(ranks)}" for value, ranks in alike(values))


def alike(values: Mapping[int, str]) -> list[tuple[str, list[int]]]:
    """Return each value with its ranks, in the order of the first of them."""
    found: dict[str, list[int]] = {}
    for rank in sorted(values):
        found.setdefault(values[rank], []).append(rank)
    return list(found.items())


def named(ranks: Sequence[int]) -> str:
    """Return for example "rank 3" or "ranks 0-2, 5"."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    more = ", ..." * (len(texts) > NAMED)
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(texts[:NAMED])}{more}"


def _is(ranks: Sequence[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _text(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _clipped(text: str, width: int) -> str:
    """Cut a text so that it takes at most `width` bytes as JSON."""
    if len(json.dumps(text)) <= width:
        return text
    kept = text[:width]
    while len(json.dumps(f"{kept}...")) > width:
        kept = kept[: -max(1, len(kept) // 16)]
    return f"{kept}..."
