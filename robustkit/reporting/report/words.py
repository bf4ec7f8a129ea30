"""How a report says things: shares with their intervals, radii, checkpoints, commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from robustkit.core.strategy import ThreatModel
from robustkit.reporting import formats

NORMS = {"Linf": "L-infinity", "L2": "L2", "L1": "L1"}


def interval(ci95: Sequence[float]) -> str:
    """'69.2 to 90.2'."""
    return " to ".join(formats.percent(end) for end in ci95)


def accuracy(entry: dict[str, Any]) -> str:
    """'82.0 (69.2 to 90.2)', in per cent."""
    return f"{formats.percent(entry['accuracy'])} ({interval(entry['ci95'])})"


def radius(value: float, norm: str) -> str:
    """'8/255' where it is one, of the L-infinity norm; else '0.15'."""
    units = 255 * value
    if norm == "Linf" and round(units) > 0 and abs(units - round(units)) < 1e-6:
        return f"{round(units)}/255"
    return f"{value:.4g}"


def ball(threat: ThreatModel) -> str:
    """'L-infinity 8/255'."""
    return f"{NORMS[threat.norm]} {radius(threat.epsilon, threat.norm)}"


def command(name: str, *arguments: str) -> str:
    """A command line of robustkit."""
    return shlex.join(["robustkit", name, *arguments])


def listed(parts: Sequence[str]) -> str:
    """'a, b and c'."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
