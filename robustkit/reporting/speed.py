"""What `robustkit bench` found, as a table."""

from __future__ import annotations

from rich.console import Console

from robustkit.bench import Bench
from robustkit.reporting.tables import plain_table


def print_speed(console: Console, found: Bench) -> None:
    table = plain_table("", f"On {found.device}, batches of {found.batch_size}")
    low, high = found.spread
    passes = found.passes
    table.add_row("images a second", f"{found.images_per_second:,.1f}")
    table.add_row("step", f"{found.seconds:.3g} s (windows: {low:.3g} to {high:.3g} s, {found.windows} of them)")
    if found.plain_seconds is not None and found.ratio_to_plain is not None:
        table.add_row("usual script", f"{found.plain_seconds:.3g} s a step: {found.ratio_to_plain:.2f} times as long")
    table.add_row(
        "passes",
        f"{passes.forward} forwards, {passes.input_backward} back to the images, {passes.parameter_backward} to the "
        f"weights: {found.units} units",
    )
    share = found.flops_per_second / found.ceiling
    table.add_row("arithmetic", f"{found.flops / 1e9:,.0f} GFLOP a step, {found.flops_per_second / 1e9:,.0f} GFLOP/s")
    table.add_row("ceiling", f"{found.ceiling / 1e9:,.0f} GFLOP/s in a matrix product; reached {100 * share:.0f} %")
    total = sum(found.split.values())
    parts = ", ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in found.split.items())
    table.add_row("time", parts)
    table.add_row("peak memory", f"{found.memory / 2**30:.2f} GiB")
    table.add_row("path", found.path)
    console.print(table)
