"""The processes of a run: how they meet, what they exchange, how they notice that one is missing, and how they part.

Every collective goes through `exchange`. Beside the process group each process keeps a line of its own to the store
where they met: there it says every other second that it lives, and how many exchanges it has begun. When an exchange
fails or takes too long, that tells who is missing; and the first to fail leaves the reason there for all others.

An exchange with a machine that has lost its power or its network does not fail, as nothing says so: each process also
watches the one before it, and the store, and ends where either is silent for too long.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # they come from C++

from robustkit.core.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")

TIMEOUT = 7200
"""Seconds that an exchange may take: in an evaluation, one process may be a slice of AutoAttack behind the others."""

BEAT = 2.0
"""Seconds between two signs of life."""

LOOK = 3 * BEAT
"""Seconds without one, after which a process counts as gone, once an exchange has failed."""

SILENCE = 30.0
"""Seconds without a sign of life, or an answer of the store, after which a process is looked after unasked."""

LAUNCHER = "ROBUSTKIT_LAUNCHER"
"""The process id of `robustkit --processes`, in the environment of those that it started."""


class End(NamedTuple):
    """Why a run of several processes ended: exit code, a line of text ("": there is nothing to say), and who failed."""

    code: int
    text: str
    rank: int = 0


class Lost(Exception):
    """Another process failed, is gone, or does not come: `end` says which, and why."""

    def __init__(self, end: End) -> None:
        super().__init__(end.text)
        self.end = end


class Noticeboard:
    """Why the run ended, in the store where the processes meet: the first notice stays.

    Raises:
        RuntimeError: there is no such store, or not any more.
    """

    def __init__(self, store: Store | None = None) -> None:
        self.store = store or TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=5),
        )
        self.place = f"robustkit/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def read(self) -> End | None:
        key = f"{self.place}/end"
        return End(*json.loads(self.store.get(key))) if self.store.check([key]) else None

    def write(self, end: End) -> bool:
        """False where a notice was there already."""
        words = json.dumps(end)
        return bool(self.store.compare_set(f"{self.place}/end", "", words) == words.encode())


class Meeting:
    """This process among the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.begun = 0  # exchanges
        self.board = Noticeboard()
        self.ending = threading.Lock()  # held by the thread that ends this process
        self._over = threading.Event()
        self._answered = self._alive = time.monotonic()  # when the store, and the process before this one, did so last
        self._ended: End | None = None
        self._threads = [
            threading.Thread(target=target, name=f"robustkit-{name}", daemon=True)
            for name, target in (("beat", self._live), ("watch", self._watch))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Gives no more signs of life, having said so, and watches nobody."""
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=LOOK)  # longer than the store may take to answer: on a busy machine, too

    def _live(self) -> None:
        told, heard = 0, 0
        before = (self.rank - 1) % self.size
        try:
            while not self._over.is_set():
                begun = self.begun
                self._count("beats", self.rank, 1)
                self._count("begun", self.rank, begun - told)
                told = begun
                self._ended = self.board.read()
                beats, left = self._count("beats", before), self._count("left", before)
                self._answered = time.monotonic()
                if beats != heard or left:
                    heard, self._alive = beats, self._answered
                self._over.wait(BEAT)
            self._count("left", self.rank, 1)
        except RuntimeError:  # nobody keeps the store any more, and so exchanges fail by themselves
            launcher = os.environ.get(LAUNCHER)
            if launcher is not None and str(os.getppid()) != launcher and not self._over.is_set():
                os.kill(os.getpid(), signal.SIGTERM)  # our launcher was killed: stop as if time were up
            self._over.set()

    def _watch(self) -> None:
        """Ends this process where an exchange would wait for hours for one that will not come."""
        looked = time.monotonic()
        while not self._over.wait(BEAT):
            now = time.monotonic()
            if now - looked > 3 * BEAT:  # this process was stopped itself, or busy in one long call
                self._answered = self._alive = now
            found, looked = self._missed(now), time.monotonic()
            if found is not None and not self._over.is_set():
                end(found)

    def _missed(self, now: float) -> End | None:
        if self._ended is not None:
            return None if self._over.wait(LOOK) else self._ended  # an exchange may have told of it already
        if now - self._answered > SILENCE:
            return End(1, f"{self._name(0)} does not answer: {GONE}")
        return self.look(0.0) if now - self._alive > SILENCE else None

    def _count(self, what: str, rank: int, more: int = 0) -> int:
        return int(self.board.store.add(f"{self.board.place}/{what}/{rank}", more))

    def look(self, waited: float) -> End | None:
        """After an exchange failed, `waited` seconds on: why the run ended elsewhere, else who is missing, or None.

        Takes `LOOK` seconds, less where another process has left a notice.
        """
        otherwise: End | None = End(1, f"{self._name(0)} does not answer: {GONE}")
        return _promptly(lambda: self._find(waited), otherwise)

    def _find(self, waited: float) -> End | None:
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            before = {rank: self._count("beats", rank) for rank in others}
            until = time.monotonic() + LOOK
            while time.monotonic() < until:
                if end := self.board.read():
                    return end
                time.sleep(BEAT / 8)
            silent = [rank for rank in others if self._count("beats", rank) == before[rank]]
            behind = [rank for rank in others if self._count("begun", rank) < self.begun]
        except RuntimeError:
            return End(1, f"{self._name(0)} is gone, and with it the place where processes meet: {GONE}")
        if silent:
            return End(1, f"{self._name(*silent)} gives no sign of life: {GONE}", silent[0])
        if behind and waited > timeout() / 2:  # else it failed for another reason, and they are but slower
            fault = f"did not come to an exchange within {timeout()} s: stuck, or busy for longer"
            return End(1, f"{self._name(*behind)} {fault} (ROBUSTKIT_TIMEOUT=SECONDS sets the limit)", behind[0])
        return None

    def _name(self, *ranks: int) -> str:
        return name(*ranks, of=self.size)


def _promptly(action: Callable[[], T], otherwise: T) -> T:
    """What `action` returns, or `otherwise` where the store does not answer, because its keeper is stopped."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(action()), daemon=True)
    thread.start()
    thread.join(timeout=3 * LOOK)
    return found[0] if found else otherwise


GONE = "killed, out of memory, stopped, or its machine lost"

_meeting: Meeting | None = None  # one in each process, as there is one process group


def name(*ranks: int, of: int) -> str:
    """'process 1 of 4': they count from 0."""
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {of}"


def several() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def timeout() -> int:
    """Seconds that an exchange may take, as ROBUSTKIT_TIMEOUT says.

    Raises:
        UserError: it is no whole number of at least 1.
    """
    text = os.environ.get("ROBUSTKIT_TIMEOUT", str(TIMEOUT))
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"must be a whole number of seconds, got '{text}'", place="ROBUSTKIT_TIMEOUT")
    return int(text)


def join(*, cpu: bool) -> PartialState:
    """Device and process group, as accelerate finds them; on CPUs where no accelerator takes several processes.

    Raises:
        Lost: the others did not come.
        UserError: ROBUSTKIT_TIMEOUT is no whole number.
    """
    global _meeting
    from accelerate import PartialState

    if not several():
        return PartialState(cpu=cpu)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    alone = accelerator is None or accelerator.type == "mps"
    try:
        state = PartialState(cpu=cpu or alone, timeout=timedelta(seconds=timeout()))
    except dist.DistError as error:
        raise Lost(End(1, f"not all processes came together: {str(error).splitlines()[0]}")) from error
    if _meeting is None and state.num_processes > 1:
        with suppress(RuntimeError, KeyError):  # they met by other means (MPI): then nobody can be named
            _meeting = Meeting(state.process_index, state.num_processes)
            atexit.register(_part)
    return state


def exchange(collective: Callable[..., object], *arguments: object) -> None:
    """Does a collective of torch.distributed.

    Raises:
        Lost: it failed, or took too long, because another process is missing.
    """
    if _meeting is None:
        collective(*arguments)
        return
    _meeting.begun += 1
    began = time.monotonic()
    try:
        collective(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if end := _meeting.look(time.monotonic() - began):
            raise Lost(end) from error
        raise


def all_reduce(tensor: Tensor) -> None:
    """The sum over processes, in place."""
    exchange(dist.all_reduce, tensor)


def leave() -> None:
    """Parts from the others, once all are done: nobody is missed from then on.

    Raises:
        Lost: another one did not come that far.
    """
    if _meeting is not None:
        exchange(dist.barrier)
        _part()


def _part() -> None:
    """In time: threads of a process group, or ours, abort an interpreter that goes down while they live."""
    global _meeting
    if _meeting is not None:
        _meeting.close()
        _meeting = None
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(code: int, text: str) -> int:
    """Ends this process after its own failure: one of all says why, and only once. Returns as `end` does."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(BEAT / 2)  # what goes wrong in all processes is the first one's to tell
    return end(End(code, text and f"{name(rank, of=int(os.environ['WORLD_SIZE']))}: {text}" if rank else text, rank))


def end(because: End) -> int:
    """Ends this process because the run has ended: the first to know tells the others, and the user.

    Returns the exit code where this process has not met the others yet; else there is no way back, as threads may hang
    in an exchange that nobody will answer.
    """
    if _meeting is not None:
        _meeting.ending.acquire()  # by the first of two threads to know: it does not come back
    alone = os.environ.get("LOCAL_RANK", "0") == "0"  # where the others cannot be asked, one of each machine speaks

    def tell() -> tuple[bool, End]:
        try:
            board = Noticeboard() if _meeting is None else _meeting.board
            return board.write(because), board.read() or because
        except (RuntimeError, KeyError):
            return alone, because

    speaks, known = _promptly(tell, (alone, because))
    if speaks and known.text and LAUNCHER not in os.environ:
        print(f"error: {known.text}", file=sys.stderr)
    if _meeting is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(known.code)
    return known.code
