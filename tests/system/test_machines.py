"""Two machines, each a network of its own on this one: joined by a cable that can be cut. For root, where `ip` is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_many_processes import DEADLINE, RECIPE, ended, file_of, same_run

from robustkit import resume, run

BRIDGE = "robustkit0"
ADDRESSES = {"robustkit-1": "10.213.7.1", "robustkit-2": "10.213.7.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def remove() -> None:
    for words in (("link", "del", BRIDGE), *(("netns", "del", machine) for machine in ADDRESSES)):
        subprocess.run(["ip", *words], capture_output=True, check=False)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Their names; the cable of the second is `cable-2`."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("networks are for root to make, with iproute2")
    remove()
    try:
        try:
            ip("link", "add", BRIDGE, "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no networks can be made here: {error.stderr.strip()}")
        ip("link", "set", BRIDGE, "up")
        for number, (machine, address) in enumerate(ADDRESSES.items(), 1):
            ip("netns", "add", machine)
            ip("link", "add", f"cable-{number}", "type", "veth", "peer", "name", "eth0", "netns", machine)
            ip("link", "set", f"cable-{number}", "master", BRIDGE, "up")
            ip("-n", machine, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", machine, "link", "set", device, "up")
        yield list(ADDRESSES)
    finally:
        remove()


def start(machine: str, rank: int, *words: str) -> subprocess.Popen[str]:
    """As docs/runs.md says for several machines."""
    command = ["ip", "netns", "exec", machine, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--node-rank", str(rank), "--nproc-per-node", "1", "--master-addr", ADDRESSES["robustkit-1"]]
    command += ["--master-port", "29500", "-m", "robustkit", *words, "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, no_figures: None) -> Path:
    """The run of one process that never stopped."""
    return run(RECIPE, out=tmp_path_factory.mktemp("one") / "run", device="cpu").folder


@pytest.mark.slow
def test_two_machines(machines: list[str], tmp_path: Path, one: Path) -> None:
    words = ("run", file_of(tmp_path), "--out", str(tmp_path / "run"))
    both = [start(machine, rank, *words) for rank, machine in enumerate(machines)]
    assert [ended(process)[0] for process in both] == [0, 0]
    same_run(tmp_path / "run", one)


@pytest.mark.slow
def test_a_machine_that_is_lost(machines: list[str], tmp_path: Path, one: Path) -> None:
    """Nothing breaks, nobody answers: each machine ends within a minute, in one line, and one process goes on."""
    cut, folder = tmp_path / "cut", tmp_path / "run"
    trouble = f"open({str(cut)!r}, 'w').close(); time.sleep(5)"
    words = ("run", file_of(tmp_path, trouble=trouble), "--out", str(folder))
    both = [start(machine, rank, *words) for rank, machine in enumerate(machines)]
    deadline = time.monotonic() + DEADLINE
    while not cut.is_file():
        assert time.monotonic() < deadline and both[1].poll() is None
        time.sleep(0.1)
    ip("link", "set", "cable-2", "down")
    began = time.monotonic()
    said = [ended(process)[1] for process in both]
    assert time.monotonic() - began < 75  # of which torchrun takes up to 15
    for lines, expected in zip(said, ("process 1 of 2 gives no sign of life", "process 0 of 2 does not"), strict=True):
        (line,) = [line for line in lines if line.startswith("error: ")]
        assert line.startswith(f"error: {expected}")
    resume(folder, device="cpu")
    same_run(folder, one)
