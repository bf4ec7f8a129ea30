"""`--workers N`: starts several workers of a sweep on this machine, and sees them to their end.

Each is a process of its own, and as free as one that was started by hand: the sweep's folder is all that they share. So
one that dies takes nobody along.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

from robustkit.core.processes import LAUNCHER
from robustkit.launch import how_it_ended

NUMBER = "ROBUSTKIT_WORKER"
"""A worker's number, in the environment of those that are started here."""

GRAVITY = (1, 2, 130, 75, 0)
"""Exit codes, the most serious first."""


def environments(workers: int, cores: int, gpus: Sequence[str] = ()) -> list[dict[str, str]]:
    """What the environment of each worker has besides ours: its share of the cores and, of several GPUs, one by turns.

    Args:
        gpus: their names, as CUDA_VISIBLE_DEVICES has them. A single one is everybody's.
    """
    found = [{NUMBER: str(n), "OMP_NUM_THREADS": str(max(1, cores // workers))} for n in range(1, workers + 1)]
    if len(gpus) < 2:
        return found
    return [one | {"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} for n, one in enumerate(found)]


def gpus_for(device: str | None) -> list[str]:
    """The GPUs to be shared out, by name; none where `device` is another one, or names a GPU for all."""
    if device not in (None, "cuda"):
        return []
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(n) for n in range(count)] if named is None else [name.strip() for name in named.split(",")][:count]


def run_workers(words: Sequence[str], extra: Sequence[dict[str, str]], say: Callable[[str], None]) -> list[int]:
    """Runs `robustkit WORDS` once in each environment of `extra`. Returns their exit codes, when all have ended.

    Ctrl-C and SIGTERM are handed on. A variable that is set already stays, but for those of GPUs; a worker that dies is
    told of in one line.
    """
    children: dict[int, subprocess.Popen[bytes]] = {}
    with _signals() as come:
        try:
            for number, variables in enumerate(extra, start=1):
                threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", variables["OMP_NUM_THREADS"])}
                ours = {LAUNCHER: str(os.getpid()), "TQDM_DISABLE": "1"}
                children[number] = subprocess.Popen(
                    [sys.executable, "-m", "robustkit", *words],
                    env=os.environ | ours | variables | threads,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is ours to hand on, or it would come twice
                )
            return attend(children, come, say)
        finally:
            for child in children.values():
                child.terminate()  # of those that have ended, nothing comes


def attend(children: dict[int, subprocess.Popen[bytes]], come: list[int], say: Callable[[str], None]) -> list[int]:
    """The exit codes of all, when they have ended: one of `GRAVITY` each. Hands on the signals that `come`."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        while come:
            number = come.pop(0)
            for child in children.values():
                child.send_signal(number)
        for worker, child in children.items():
            if worker in codes or (code := child.poll()) is None:
                continue
            # A signal may have come before anyone listened to it.
            codes[worker] = {-signal.SIGINT: 130, -signal.SIGTERM: 75}.get(code, code if code in GRAVITY else 1)
            if codes[worker] in (1, 2):
                how = f"was {how_it_ended(-code)}" if code < 0 else f"ended with exit code {code}"
                rest = "its trial goes on from its last checkpoint, with another worker or the next command"
                say(f"worker {worker} of {len(children)} {how}; {rest}")
        time.sleep(0.1)
    return list(codes.values())


def most_serious(codes: Iterable[int]) -> int:
    """Of exit codes in `GRAVITY`."""
    return min(codes, key=GRAVITY.index)


def ending(codes: Iterable[int]) -> str:
    """Why workers stopped before the sweep's end, as `work` says it; "lost" where they died; "" where all is done."""
    codes = set(codes)
    if 0 in codes:  # so ends a worker that finds nothing left to do
        return ""
    return "interrupt" if 130 in codes else "time" if 75 in codes else "lost"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM, in the order in which they come."""
    come: list[int] = []

    def note(number: int, frame: Any) -> None:
        come.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield come
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield come
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# In a worker


def is_one() -> bool:
    """Whether this process is one of the workers of a command."""
    return NUMBER in os.environ


def settle_in() -> None:
    """Puts the worker's number before each of its lines, and has it stop as at SIGTERM when its parent dies."""
    sys.stderr = cast(TextIO, Numbered(sys.stderr, f"[{os.environ[NUMBER]}] "))
    threading.Thread(target=_follow, args=(int(os.environ[LAUNCHER]),), name="robustkit-parent", daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


class Numbered(io.TextIOBase):
    """A stream with a mark before each line. Lines are written whole, as others write to the same terminal."""

    def __init__(self, stream: TextIO, mark: str) -> None:
        self._stream, self._mark, self._begun = stream, mark, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        if lines:
            self._stream.write("".join(f"{self._mark}{line}\n" for line in lines))
            self._stream.flush()
        return len(text)
