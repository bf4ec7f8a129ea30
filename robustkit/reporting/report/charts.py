"""Charts that stand in the page: matplotlib draws them as SVG, which is then made to live there.

Colours become the page's own, so that a chart follows light and dark; each marker says its numbers when pointed at;
text is text. Legends are the page's, which can break their lines. No script is needed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import attrs
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from robustkit.reporting.report.html import Html, joined, tag

BLUE, VERMILLION, PURPLE, GREEN = "#0072B2", "#D55E00", "#CC79A7", "#009E73"
COLOURS = (VERMILLION, BLUE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's, which everybody can tell apart, for runs; black is the page's own text colour."""

_INK, _GRID, _MUTED = "#000000", "#e6e6e6", "#555555"
_THEME = {_INK: "currentColor", _GRID: "var(--grid)", _MUTED: "var(--muted)"}
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": _GRID,
    "svg.fonttype": "none",
    "svg.hashsalt": "robustkit",
    "text.parse_math": False,
    "path.simplify": False,
}
_SIZE = (5.0, 2.9)
_SVG, _LINK = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}href"
_MARKED = 250
"""More points than these have no markers of their own."""

ElementTree.register_namespace("", _SVG)


@attrs.frozen
class Line:
    """Points (x, y) in the chart's units; `tips` say each in words; `band`: lower and upper ends."""

    label: str
    points: Sequence[tuple[float, float]]
    tips: Sequence[str]
    colour: str
    dashed: bool = False
    band: Sequence[tuple[float, float]] = ()


@attrs.frozen
class Mark:
    """A vertical line at `x`."""

    x: float
    label: str


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    whole: bool = False,
    marks: Sequence[Mark] = (),
    counted: bool = True,
) -> Html:
    """A chart of lines.

    Args:
        x, y: what the axes show, with units.
        whole: show all of 0 to 100.
        counted: whether x counts something: ticks are whole numbers.
    """
    with rc_context(_STYLE):
        figure = _figure()
        axes = figure.subplots()
        for number, line in enumerate(lines):
            across = [point[0] for point in line.points]
            if line.band:
                low, high = zip(*line.band, strict=True)
                axes.fill_between(across, low, high, color=line.colour, alpha=0.18, linewidth=0)
            marker = "o" if len(line.points) <= _MARKED else None
            axes.plot(
                across,
                [point[1] for point in line.points],
                color=line.colour,
                linestyle="--" if line.dashed else "-",
                marker=marker,
                markersize=3.5 if len(across) <= 40 else 2,
                linewidth=1.6,
                gid=f"line-{number}",
            )
        for mark in marks:
            axes.axvline(mark.x, color=_MUTED, linewidth=1.1, linestyle=":", zorder=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if whole:
            axes.set_ylim(0, 102)
        if counted:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
        drawn = _svg(figure, title, {f"line-{number}": line.tips for number, line in enumerate(lines)})
    entries = [_entry(line.label, line.colour, "dashed" if line.dashed else "solid") for line in lines]
    entries += [_entry(mark.label, _MUTED, "dotted") for mark in marks]
    return _framed(title, drawn, entries)


def share_map(
    title: str,
    columns: Sequence[int],
    rows: Sequence[str],
    shares: Sequence[Sequence[float]],
    means: Sequence[float],
    tips: Sequence[str],
    *,
    x: str,
    y: str,
) -> Html:
    """A field for each row and column, the darker the larger its share, with a line of means.

    Args:
        columns: what stands below the columns: whole numbers in a row.
        shares: of each row, the share in [0, 1] in each column.
        means: for each column, how high its mean stands, in rows from 0.
    """
    with rc_context(_STYLE):
        figure = _figure(0.16 * len(rows))
        axes = figure.subplots()
        ends = (columns[0] - 0.5, columns[-1] + 0.5)
        field = [[(0, 0x72 / 255, 0xB2 / 255, share) for share in row] for row in shares]
        axes.imshow(field, aspect="auto", origin="lower", interpolation="none", extent=(*ends, -0.5, len(rows) - 0.5))
        axes.plot(columns, means, color=VERMILLION, marker="o", markersize=3, linewidth=1.4, gid="line-0")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
        drawn = _svg(figure, title, {"line-0": tips})
    return _framed(title, drawn, [_entry("share of the epoch's images", BLUE, "field"), _entry("mean", VERMILLION)])


def _figure(more: float = 0.0) -> Figure:
    figure = Figure(figsize=(_SIZE[0], max(_SIZE[1], 1.0 + more)), layout="constrained")
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure)
    return figure


def _entry(label: str, colour: str, kind: str = "solid") -> Html:
    style = f"--swatch: {_THEME.get(colour, colour)}"
    return tag("li", tag("span", class_=f"swatch {kind}", style=style), label)


def _framed(title: str, drawn: Html, entries: Sequence[Html]) -> Html:
    return tag("figure", tag("figcaption", title), drawn, tag("ul", *entries, class_="legend"), class_="chart")


def _svg(figure: Figure, title: str, tips: dict[str, Sequence[str]]) -> Html:
    """The figure as an element of the page."""
    for axes in figure.axes:
        _bare(axes)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": f"{title}: a chart; its numbers stand in a table below"}
    for child in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(child)
    for group in root.iter(f"{{{_SVG}}}g"):
        if group.get("id") in tips:
            _tell(group, tips[group.attrib["id"]])
    _own_names(root, re.sub(r"\W+", "-", title.lower()))
    for element in root.iter():
        _dress(element)
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _dress(element: ElementTree.Element) -> None:
    """Colours and letters of the page, in attributes alone: texts may be anything; and no idle space."""
    for name in ("style", "fill"):
        held = element.get(name)
        if held is not None:
            for colour, own in _THEME.items():
                held = held.replace(colour, own)
            element.set(name, re.sub(r"font-family: [^;]*;? ?", "", held))
    if (path := element.get("d")) is not None:
        element.set("d", " ".join(path.split()))
    if len(element) and not (element.text or "").strip():
        element.text = None
    if not (element.tail or "").strip():
        element.tail = None


def _bare(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(color=_MUTED)


def _tell(group: ElementTree.Element, tips: Sequence[str]) -> None:
    """Gives each marker its words, and a larger area to point at."""
    markers = list(group.iter(f"{{{_SVG}}}use"))
    if len(markers) != len(tips):  # drawn without markers
        return
    for path in group.iter(f"{{{_SVG}}}path"):
        if path.get("id") is not None:
            path.attrib.pop("style", None)
    group.set("class", "points")
    for marker, tip in zip(markers, tips, strict=True):
        style = marker.attrib.pop("style", "")
        colour = re.search(r"(?:fill|stroke): (#\w+)", style)
        marker.set("fill", "#000000" if colour is None else colour[1])
        ElementTree.SubElement(marker, f"{{{_SVG}}}title").text = tip


def _own_names(root: ElementTree.Element, prefix: str) -> None:
    """Names are those of the whole page: each chart's get its prefix, and those that nothing refers to go."""
    used = {element.attrib[_LINK].removeprefix("#") for element in root.iter() if "#" in element.get(_LINK, "")[:1]}
    used |= set(re.findall(r"url\(#([\w-]+)\)", " ".join(e.get("clip-path", "") for e in root.iter())))
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{prefix}-{name}")
        if (link := element.attrib.pop(_LINK, None)) is not None:
            element.set("href", f"#{prefix}-{link[1:]}" if link.startswith("#") else link)
        if (clip := element.get("clip-path")) is not None:
            element.set("clip-path", clip.replace("#", f"#{prefix}-"))


def side_by_side(*parts: Html | None) -> Html:
    """Charts in a row, as many as there is room for."""
    return tag("div", joined(parts), class_="charts")
