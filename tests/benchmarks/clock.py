"""How long does it take? What the scripts of this folder share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def seconds(action: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds for one of `times` actions in a row, between two moments at which the device has nothing left to do."""
    wait(device)
    began = time.perf_counter()
    for _ in range(times):
        action()
    wait(device)
    return (time.perf_counter() - began) / times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def middle(windows: Sequence[float]) -> dict[str, float]:
    """Median of the windows, the fastest, and the slowest."""
    return {"seconds": statistics.median(windows), "fastest": min(windows), "slowest": max(windows)}
