"""Pictures of `robustkit.evaluation.curves`: one figure for each curve, with its 95 % intervals as a band."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from torch import nn

from robustkit.core import checkpoint
from robustkit.core.errors import UserError
from robustkit.core.reading import read_object
from robustkit.core.registry import hint
from robustkit.core.strategy import ThreatModel
from robustkit.evaluation.curves import ALONG, ClassAccuracy, Curve, by_class, curve
from robustkit.reporting import formats
from robustkit.reporting.figures import STYLE, VERMILLION, new_figure

CURVES = (*ALONG, "classes")
"""What may be asked for."""
_PALE = "#b3d5e8"
ROWS = 50
"""Classes in a column; more stand in further columns."""


def draw_curves(
    folder: Path,
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    threat: ThreatModel,
    names: tuple[str, ...],
    wanted: tuple[str, ...],
    limit: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Measures and draws curves: figures/curve-<name>.png and curves.json in `folder`.

    Args:
        model, images, labels, limit, seed, device: as of `robustkit.evaluate`.
        threat: the ball at whose radius all but the curve along epsilon is measured.
        names: of the classes.
        wanted: some of "epsilon", "steps", "restarts", "classes". Others that curves.json holds already stay there.
        say: told of every figure, when it is there.

    Raises:
        UserError: there is no such curve.
    """
    for name in wanted:
        if name not in CURVES:
            remedy = f"{hint(name, CURVES)} (there are {', '.join(CURVES)})"
            raise UserError(f"there is no curve '{name}'", place="curves", remedy=remedy)
    target, store = folder / "figures", folder / "curves.json"
    target.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = stored(store)
    paths = []
    options: dict[str, Any] = {"threat": threat, "limit": limit, "seed": seed, "device": device}
    for name in dict.fromkeys(wanted):
        with rc_context(STYLE):
            if name == "classes":
                classes = by_class(model, images, labels, names=names, **options)
                data[name] = {key: [entry.to_json() for entry in found] for key, found in classes.items()}
                figure, words = classes_figure(classes, threat), _worst(classes)
            else:
                found = curve(model, images, labels, along=name, **options)
                data[name] = found.to_json()
                figure, words = curve_figure(found), _course(found)
            path = target / f"curve-{name}.png"
            figure.savefig(path)
        checkpoint.write_text(store, json.dumps(data, indent=2, sort_keys=True) + "\n")
        paths.append(path)
        say(f"{name}: {words}")
    return paths


def curve_figure(found: Curve) -> Figure:
    """Accuracy along radii, steps or restarts; the radius that results are reported at is marked."""
    figure = new_figure(5.6, 3.4)
    axes = figure.subplots()
    in_255ths = found.along == "epsilon" and found.norm == "Linf"
    values = [255 * value if in_255ths else value for value in found.values]
    low, high = ([100 * interval[end] for interval in found.ci95] for end in (0, 1))
    shares = [100 * accuracy for accuracy in found.accuracies]
    axes.fill_between(values, low, high, color=VERMILLION, alpha=0.18, linewidth=0, label="95 % interval")
    axes.plot(values, shares, color=VERMILLION, marker="o", markersize=4, label=found.key)
    radius = formats.in_255ths(found.epsilon) if found.norm == "Linf" else f"{found.epsilon:.3g}"
    if found.along == "epsilon":
        mark = 255 * found.epsilon if in_255ths else found.epsilon
        axes.axvline(mark, color="#555555", linewidth=1.2, linestyle=":", label=f"reported at {radius}", zorder=0)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{found.norm} radius" + (" (1/255)" if in_255ths else ""))
        axes.set_title("Accuracy by radius")
    else:
        _counts(axes, values)
        axes.set_xlabel(f"{found.along} of the attack" + (" (0: as it is)" if found.values[0] == 0 else ""))
        axes.set_title(f"Accuracy by {found.along}, {found.norm} {radius}")
    axes.set_ylabel(f"accuracy on {found.n:,} images (%)")
    _room(axes, low, high, whole=found.along == "epsilon")
    axes.legend(loc="best")
    return figure


def classes_figure(classes: dict[str, tuple[ClassAccuracy, ...]], threat: ThreatModel) -> Figure:
    """Clean and attacked accuracy of each class, the least robust at the bottom."""
    (clean_key, clean), (key, robust) = classes.items()
    order = sorted(range(len(robust)), key=lambda number: (robust[number].accuracy, clean[number].accuracy))
    columns = -(-len(order) // ROWS)
    rows = -(-len(order) // columns)
    figure = new_figure(5.6 if columns == 1 else 4.2 * columns, 1.2 + (0.3 if rows <= 20 else 0.17) * max(4, rows))
    grid = figure.subplots(1, columns, squeeze=False, sharex=True)[0]
    for column, axes in enumerate(grid):
        part = order[::-1][column * rows : (column + 1) * rows][::-1]
        heights = range(rows - len(part), rows)
        shown = [100 * clean[number].accuracy for number in part]
        axes.barh(heights, shown, height=0.78, color=_PALE, label=clean_key)
        shown = [100 * robust[number].accuracy for number in part]
        axes.barh(heights, shown, height=0.78, color=VERMILLION, label=key)
        ends = [[100 * robust[number].ci95[end] for number in part] for end in (0, 1)]
        axes.hlines(heights, *ends, color="black", linewidth=0.8, label="95 % interval")
        axes.set_yticks(heights, [_short(robust[number]) for number in part], fontsize=8 if rows <= 20 else 6)
        axes.set(xlim=(0, 100), ylim=(-0.7, rows - 0.3), xlabel="accuracy (%); images in brackets")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    radius = formats.in_255ths(threat.epsilon) if threat.norm == "Linf" else f"{threat.epsilon:.3g}"
    figure.suptitle(f"Accuracy by class, {threat.norm} {radius}", fontsize=10, fontweight="bold")
    return figure


def _short(entry: ClassAccuracy) -> str:
    name = entry.name if len(entry.name) <= 20 else entry.name[:19] + "…"
    return f"{name} ({entry.n})"


def _counts(axes: Axes, values: Sequence[float]) -> None:
    """An axis of whole numbers: logarithmic above 1 where they span decades."""
    if max(values) >= 50:
        axes.set_xscale("symlog", linthresh=1, linscale=0.6)
        axes.xaxis.set_major_locator(FixedLocator(list(values)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(list(values), [f"{value:g}" for value in values])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _room(axes: Axes, low: Sequence[float], high: Sequence[float], *, whole: bool) -> None:
    """All of 0 to 100 %, or, where the curve is flat, what there is with room to see it."""
    bottom, top = min(low), max(high)
    if whole or top - bottom > 40:
        axes.set_ylim(0, 101.5)
    else:
        space = max(2.0, 0.15 * (top - bottom))
        axes.set_ylim(max(0.0, bottom - space), min(101.5, top + space))


def _course(found: Curve) -> str:
    """'98.3 % at 0, 81.9 % at 8/255, ...' of the first, the reported and the last point."""
    chosen = sorted({0, len(found.values) - 1, *(n for n, v in enumerate(found.values) if v == found.epsilon)})
    words = []
    for number in chosen:
        value = found.values[number]
        in_255ths = found.along == "epsilon" and found.norm == "Linf"
        at = formats.in_255ths(value) if in_255ths else f"{value:.3g}"
        words.append(f"{formats.percent(found.accuracies[number])} % at {at}")
    return f"{', '.join(words)} ({found.key}, {found.n:,} images)"


def _worst(classes: dict[str, tuple[ClassAccuracy, ...]]) -> str:
    words = []
    for key, entries in classes.items():
        seen = [entry for entry in entries if entry.n]
        worst = min(seen, key=lambda entry: entry.accuracy)
        best = max(seen, key=lambda entry: entry.accuracy)
        words.append(
            f"{key} from {formats.percent(worst.accuracy)} % ({worst.name}) to "
            f"{formats.percent(best.accuracy)} % ({best.name})"
        )
    return ", ".join(words)


def stored(path: Path) -> dict[str, Any]:
    """The curves that are there already; none where the file is not ours to read."""
    try:
        return read_object(path)
    except UserError:
        return {}
