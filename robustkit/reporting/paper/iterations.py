"""Accuracy against the attack's iterations, several runs in one panel (LDAT, Fig. 5): does more still find more?

PGD in L-infinity, and in L2 the attack of Carlini and Wagner, whose iterations are those of each of its nine searches;
an image is broken by it if what it found is no further away than the radius. That one is foolbox's: without foolbox its
panel is left out, and a line says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from robustkit.core.errors import LibraryError
from robustkit.core.strategy import Measure, ThreatModel
from robustkit.evaluation import Attacked, MinimumNorm
from robustkit.reporting.paper.finished import FinishedRun, Judged, on_the_same_data
from robustkit.reporting.paper.lines import draw_lines, lines_of
from robustkit.reporting.paper.panels import panels, radius_in_words, remarks
from robustkit.threats.l2 import L2
from robustkit.threats.linf import Linf

ITERATIONS = (1, 5, 10, 20, 40, 60, 80, 100, 200, 500)
TICKS = (1, 5, 10, 20, 40, 100, 200, 500)
"""Those of them that have room."""


def pgd(steps: int) -> Measure:
    """PGD in steps of a quarter of the radius."""
    return Attacked(key=f"pgd-{steps}", steps=steps)


def carlini_wagner(steps: int) -> Measure:
    """That of Carlini and Wagner, in L2."""
    return MinimumNorm(key=f"cw-{steps}", attack="cw", steps=steps)


ATTACKS = (("PGD", pgd, Linf(epsilon=8 / 255)), ("C&W", carlini_wagner, L2(epsilon=0.5)))
"""A panel each; their radii where the first run reports nothing in that norm."""


def collect(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """A panel for each attack that can be had, and in it a line for each run; `missing` says what cannot, and why.

    Raises:
        UserError: the runs are not on the same data.
    """
    on_the_same_data(runs)
    made: list[dict[str, Any]] = []
    missing: list[str] = []
    for name, attack, usual in ATTACKS:
        ball: ThreatModel = runs[0].ball(usual)

        def judge(run: FinishedRun, steps: float, attack: Any = attack, ball: ThreatModel = ball) -> Judged:
            return run.judged(attack(int(steps)), ball)

        try:
            lines = lines_of(runs, ITERATIONS, judge)
        except LibraryError as error:
            missing.append(f"without {name}: {error}")
        else:
            made.append({"attack": name, "norm": ball.norm, "epsilon": ball.epsilon, "lines": lines})
    return {"panels": made, "missing": missing}


def draw(data: dict[str, Any]) -> Figure:
    """A line for each run, over iterations on a logarithmic axis."""
    figure, grid = panels(len(data["panels"]), width=4.2)
    for axes, panel in zip(grid, data["panels"], strict=True):
        words = f"{panel['norm']} {radius_in_words(panel['norm'], panel['epsilon'])}"
        draw_lines(axes, panel["lines"])
        axes.set(title=f"{panel['attack']}, {words}", ylim=(0, 101.5), xscale="log", xlabel="iterations")
        axes.xaxis.set_major_locator(FixedLocator(TICKS))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
    grid[0].set_ylabel(f"accuracy of {data['panels'][0]['lines'][0]['n']:,} images (%)")
    figure.legend(
        *grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, **remarks(figure, data["missing"])
    )
    return figure
