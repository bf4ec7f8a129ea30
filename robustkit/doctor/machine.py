"""What torch can compute on here, whether processes can talk, and whether there is room for runs."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from robustkit.core.device import has_fast_bfloat16
from robustkit.doctor.finding import Finding, told
from robustkit.launch import cores as usable_cores

GB = 1e9
ROOM = 5 * GB
"""Less room than this is worth a warning: a run of a wide network keeps about 1 GB."""
LEAST = 0.5 * GB
"""With less room than this no run will get far."""


def devices() -> Iterator[Finding]:
    """Threads of the CPU, and each accelerator, which is tried with a product of two matrices."""
    cores = usable_cores()
    threads = torch.get_num_threads()
    many = threads > cores
    remedy = f"set OMP_NUM_THREADS={cores}: threads that wait for each other are slow" if many else ""
    found = f"{threads} threads on {cores} cores, {platform.machine()}"
    yield Finding("CPU", "warning" if many else "ok", found, remedy)
    yield _precision(torch.device("cpu"))
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield from _cuda(torch.device("cuda", number))
    elif shutil.which("nvidia-smi"):
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        found = f"there is a driver, but torch {torch.__version__}, built {built}, sees no GPU"
        yield Finding("GPU", "warning", found, "look at nvidia-smi and CUDA_VISIBLE_DEVICES; or install another build")
    else:
        yield Finding("GPU", "ok", "none")
    if torch.backends.mps.is_available():
        yield _tried(torch.device("mps"), "Apple's Metal")


def _cuda(device: torch.device) -> Iterator[Finding]:
    try:
        facts = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
    except Exception as error:
        yield Finding(str(device), "problem", told(error), "look at nvidia-smi: is it in use, or lost?")
        return
    words = f"{facts.name}, capability {facts.major}.{facts.minor}, "
    yield _tried(device, words + f"{free / GB:.1f} of {total / GB:.1f} GB free")
    yield _precision(device)


def _tried(device: torch.device, words: str) -> Finding:
    try:
        ones = torch.ones(8, 8, device=device)
        right = (ones @ ones).sum().item() == 8**3
    except Exception as error:
        remedy = "install a build of torch for this device, or choose another by --device"
        return Finding(str(device), "problem", f"{words}: {told(error)}", remedy)
    return Finding(
        str(device), "ok" if right else "problem", words if right else f"{words}: it computes wrong products"
    )


def _precision(device: torch.device) -> Finding:
    """What precision=auto means there."""
    fast = has_fast_bfloat16(device)
    chosen = "bf16 (fp32 for tiny networks)" if fast else "fp32"
    hardware = "multiplied in hardware" if fast else "not multiplied in hardware"
    return Finding(f"bfloat16 on {device}", "ok", f"{hardware}: --precision auto means {chosen}")


def processes() -> Iterator[Finding]:
    """A process group of one, made and used; NCCL where there are GPUs."""
    if not dist.is_available():
        yield Finding("processes", "warning", "torch is built without torch.distributed", "train in one process")
        return
    if dist.is_initialized():
        yield Finding("processes", "ok", f"a group of {dist.get_world_size()} by {dist.get_backend()} is there")
        return
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        try:
            one = torch.ones(1)
            dist.all_reduce(one)
        finally:
            dist.destroy_process_group()
        yield Finding("processes", "ok", "gloo works")
    except Exception as error:
        remedy = "set GLOO_SOCKET_IFNAME to a network interface of this machine, e.g. lo; or train in one process"
        yield Finding("processes", "problem", f"gloo: {told(error)}", remedy)
    if torch.cuda.is_available() and not dist.is_nccl_available():
        yield Finding("processes", "warning", "torch is built without NCCL", "several GPUs need another build of torch")


def disk(runs: Path) -> Iterator[Finding]:
    """Whether runs can be written, and how much room there is."""
    there = next((folder for folder in (runs, *runs.absolute().parents) if folder.exists()), Path())
    subject = f"disk at {runs}"
    try:
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is no folder")
        with tempfile.TemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        words = error.strerror or told(error)
        yield Finding(subject, "problem", f"cannot be written: {words}", "name another folder by --out")
        return
    verdict = "ok" if free >= ROOM else "warning" if free >= LEAST else "problem"
    yield Finding(subject, verdict, f"{free / GB:.1f} GB free", "" if verdict == "ok" else "make room, or use --out")  # type: ignore[arg-type]
