"""Numbers as people read them: radii in 255ths, shares in per cent, durations, sparklines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-~=*%#"
_RADII = ("epsilon", "radius", "step_size")
_RADII_EXACTLY = ("value", "values", "first", "last")


def setting(name: str, value: Any) -> str:
    """The value of a setting (JSON data) called `name`: radii also in 255ths, lists without brackets."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        if _is_radius(name) and value and all(_fraction(item).startswith("= ") for item in value):
            return ", ".join(_fraction(item).removeprefix("= ") for item in value)
        return ", ".join(setting("", item) for item in value) or "(none)"
    if isinstance(value, float):
        fraction = _fraction(value) if _is_radius(name) else ""
        return f"{value:.4g} {fraction}".strip()
    return str(value) or '""'


def _is_radius(name: str) -> bool:
    return name in _RADII_EXACTLY or any(word in name for word in _RADII)


def _fraction(value: Any) -> str:
    """'= 8/255', '~ 7.905/255' where it nearly is such a fraction, else ''."""
    if not isinstance(value, float) or not 0 < value <= 1:
        return ""
    units = value * 255
    if round(units) < 1 or abs(units - round(units)) > 0.1:
        return ""
    return f"= {round(units)}/255" if abs(units - round(units)) < 1e-6 else f"~ {units:.4g}/255"


def in_255ths(value: float) -> str:
    """A radius in pixels of [0, 1] as '7.2/255'; one above 1, of another norm than L-infinity, as it is."""
    return f"{value * 255:.3g}/255" if value <= 1 else f"{value:.3g}"


def percent(share: float) -> str:
    """0.8312 -> '83.1'."""
    return f"{100 * share:.1f}"


def duration(seconds: float) -> str:
    """'0.4 s', '42 s', '9:05 min', '3:07 h'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def sparkline(values: Sequence[float], *, width: int = 60, ascii_only: bool = False) -> str:
    """One character for each value, evenly thinned to `width`."""
    if len(values) > width:
        values = [values[number * len(values) // width] for number in range(width)]
    marks = _ASCII if ascii_only else _BLOCKS
    low, high = min(values), max(values)
    if high == low:
        return marks[len(marks) // 2] * len(values)
    return "".join(marks[round((value - low) / (high - low) * (len(marks) - 1))] for value in values)


def course(values: Sequence[float], *, width: int = 60, ascii_only: bool = False) -> list[str]:
    """A sparkline in lines of at most `width` characters, each after the numbers of its values, which count from 1.

    Lines hold whole tens of values, so that a cycle of ten looks the same in each.
    """
    digits = len(str(len(values)))
    room = max(10, (width - 2 * digits - 2) // 10 * 10)
    marks = sparkline(values, width=len(values), ascii_only=ascii_only) if values else ""
    ends = [(first, min(first + room, len(values))) for first in range(0, len(values), room)]
    return [f"{first + 1:>{digits}}-{last:<{digits}} {marks[first:last]}" for first, last in ends]
