"""Measured entropies, and beside them the thresholds of ECAS that they are for."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console

from robustkit.calibration import Calibration, Threshold
from robustkit.reporting import formats
from robustkit.reporting.tables import plain_table

_SIDE = {"h_low": "below", "h_high": "above"}


def to_data(found: Calibration) -> dict[str, Any]:
    """As JSON data; `beyond` are shares of images, in the order of `readings`."""
    return {
        "classes": found.classes,
        "batches": found.batches,
        "images": found.images,
        "readings": [{"network": r.network, "mode": r.mode, "mean": r.mean} for r in found.readings],
        "thresholds": [one._asdict() | {"beyond": _beyond(found, one)} for one in found.thresholds()],
    }


def print_calibration(console: Console, found: Calibration, title: str) -> None:
    """A column for each network and mode: its mean entropy, and the share of images beyond each threshold."""
    console.print(f"{title}: entropy of predictions on augmented training images", style="bold", soft_wrap=True)
    most = f"ln {found.classes} = {math.log(found.classes):.3f}"
    batches = f"{found.batches} batch{'' if found.batches == 1 else 'es'}"
    console.print(f"{found.images:,} images in {batches}; nats, at most {most}", soft_wrap=True)
    table = plain_table("Threshold", "")
    for heading in ("Nats", *(f"{reading.network}\n{reading.mode}" for reading in found.readings)):
        table.add_column(heading, justify="right")
    table.add_row("", "mean entropy", "", *(f"{reading.mean:.3f}" for reading in found.readings), style="bold")
    for one in found.thresholds():
        shares = [f"{formats.percent(share)} % {_SIDE[one.name]}" for share in _beyond(found, one)]
        table.add_row(one.name, one.source, f"{one.value:.3f}", *shares)
    console.print(table)
    if not any(one.name == "h_low" and one.source == "measured" for one in found.thresholds()):
        console.print("To measure h_low, give the folder of a run that has trained.", style="dim")


def _beyond(found: Calibration, threshold: Threshold) -> list[float]:
    return [threshold.beyond(reading) for reading in found.readings]
