"""`--processes N`: starts the N processes of a command on this machine, and sees them to their end.

torch's elastic launcher, the engine under torchrun, starts and stops them. Its agent is left out: it would turn every
exit code into 1, give a run that is to stop thirty seconds for that, and print a page for each failure.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from robustkit.core.errors import UserError

if TYPE_CHECKING:
    from robustkit.core.processes import End, Noticeboard

GRACE, CLOSING = 15.0, 10
"""Seconds that the others get to end by themselves once one has failed; and to obey when they are told to."""

ENDS = (1, 75, 130)
"""Exit codes other than 0 with which commands end although nothing failed (see `robustkit.cli.outcome`)."""

SIGNALS = [signal.SIGINT, signal.SIGTERM] + [getattr(signal, n) for n in ("SIGHUP", "SIGQUIT") if hasattr(signal, n)]


def wanted(processes: int) -> bool:
    """Whether this process is to start others, being none of them.

    Raises:
        UserError: another launcher has started another number.
    """
    started = os.environ.get("WORLD_SIZE")
    if started is None and processes == 1:
        return False
    if started is not None and int(started) != processes:
        fault = f"{processes} processes are asked for, but another launcher has started {started}"
        raise UserError(fault, place="--processes", remedy="leave it out under torchrun, accelerate and srun")
    return started is None


def launch(words: list[str], processes: int, device: str | None) -> int:
    """Runs `robustkit WORDS` in several processes. Returns their exit code; a failure is told in one line.

    Raises:
        UserError: the device is not for several, or there are fewer GPUs.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch tells of a lost connection in C++
    cpu = _on_cpu(processes, device)

    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes
    from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext

    from robustkit.core.processes import Noticeboard

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives each of the processes
    quiet = Std.NONE if "--debug" in words else Std.ALL
    logs = tempfile.mkdtemp(prefix="robustkit-processes-")
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        context = start_processes(
            name="robustkit",
            entrypoint=sys.executable,
            args=dict.fromkeys(range(processes), ("-m", "robustkit", *words)),
            envs={rank: _environment(rank, processes, store.port, cpu) for rank in range(processes)},
            logs_specs=DefaultLogsSpecs(logs, redirects=dict.fromkeys(range(1, processes), quiet)),
        )
        assert isinstance(context, SubprocessContext)
        children = {rank: handler.proc for rank, handler in context.subprocess_handlers.items()}
        try:
            codes = _attend(children, Noticeboard(store), before)
        finally:
            context.close(timeout=CLOSING)
    except SignalException as stopped:  # before it was for us to hand on
        return 128 + stopped.sigval
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code, rank = _report(codes, processes, Noticeboard(store))
    log = context.stderrs.get(rank)
    if code == 1 and log and os.path.getsize(log):
        print(f"its last words are in {log}", file=sys.stderr)
    else:
        shutil.rmtree(logs, ignore_errors=True)
    return code


def _on_cpu(processes: int, device: str | None) -> bool:
    import torch

    kind, _, number = (device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")
    if kind not in ("cpu", "cuda") or number:
        fault = f"'{device}' is not for several processes: each has a GPU of its own, or some cores"
        raise UserError(fault, place="--device", remedy="leave it out, or --device cpu")
    if kind == "cuda" and processes > torch.cuda.device_count():
        fault = f"{processes} processes, but {torch.cuda.device_count()} GPUs"
        raise UserError(fault, place="--processes", remedy="one for each GPU at most, or --device cpu")
    return kind == "cpu"


def _environment(rank: int, processes: int, port: int, cpu: bool) -> dict[str, str]:
    """What torch's env:// and accelerate read."""
    found: dict[str, str | int] = {"RANK": rank, "LOCAL_RANK": rank}
    found |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ROBUSTKIT_LAUNCHER": os.getpid()}
    found |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0}  # the store is the launcher's
    found["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", max(1, cores() // processes))
    if cpu and sys.platform == "linux":  # else gloo asks the network for this machine's own name
        found["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return {name: str(value) for name, value in found.items()}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _attend(children: dict[int, subprocess.Popen[bytes]], board: Noticeboard, before: dict[int, Any]) -> dict[int, int]:
    """Waits until all have ended, or `GRACE` seconds after the first failure; hands on signals not ignored `before`.

    What a process could not say itself is noted on `board` for the others: that it was killed, or left them.
    """
    asked: set[int] = set()

    def forward(number: int, frame: Any) -> None:
        asked.add(number)
        for child in children.values():
            child.send_signal(number)

    for number, handler in before.items():
        signal.signal(number, signal.SIG_IGN if handler is signal.SIG_IGN else forward)
    codes: dict[int, int] = {}
    until = float("inf")
    while len(codes) < len(children) and time.monotonic() < until:
        for rank in sorted(children.keys() - codes.keys()):
            code = children[rank].poll()
            if code is None:
                continue
            codes[rank] = code
            if code != 0:
                until = min(until, time.monotonic() + GRACE)
            if code < 0 and -code not in asked:
                board.write(_killed(rank, len(children), -code))
            elif code > 0 and code not in ENDS:
                board.write(_left(rank, len(children), code))
        time.sleep(0.1)
    return codes


def _left(rank: int, processes: int, code: int) -> End:
    from robustkit.core.processes import End, name

    return End(code, f"{name(rank, of=processes)} ended with exit code {code}", rank)


def _killed(rank: int, processes: int, number: int) -> End:
    from robustkit.core.processes import End, name

    fault = f"{name(rank, of=processes)} was {how_it_ended(number)}"
    return End(1, f"{fault}; what is saved is whole: go on with `robustkit resume RUN`", rank)


def how_it_ended(number: int) -> str:
    """A process that a signal put an end to was ... ."""
    if number == signal.SIGKILL:
        return "killed by SIGKILL: out of memory, or by hand"
    return f"ended by {signal.Signals(number).name}"


def _report(codes: dict[int, int], processes: int, board: Noticeboard) -> tuple[int, int]:
    """The exit code of all, and who failed first; in one line why, where that is not what all of them wanted."""
    rank, code = next(((rank, code) for rank, code in codes.items() if code), (0, 0))
    end = board.read()
    if end is None and (code <= 0 or set(codes.values()) == {code}):
        return 128 - code if code < 0 else code, 0  # a signal that we handed on came before anyone listened to it
    end = end or _left(rank, processes, code)
    if end.text:
        print(f"error: {end.text}", file=sys.stderr)
    return end.code, end.rank
