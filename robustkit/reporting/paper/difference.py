"""How much more robust one run is than another, against the radius they are tested at (UIAT, Fig. 5).

Image by image on the same test images, so that the interval is that of a paired difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
from matplotlib.figure import Figure

from robustkit.core.errors import UserError
from robustkit.core.registry import hint
from robustkit.core.spec import evolve
from robustkit.core.strategy import Measure, ThreatModel
from robustkit.evaluation import PGD_20, AutoAttack, Clean
from robustkit.evaluation.statistics import paired
from robustkit.reporting.figures import BLUE, new_figure
from robustkit.reporting.paper.finished import FinishedRun, on_the_same_data, on_the_same_images
from robustkit.reporting.paper.panels import GREY, quarters_of, radius_in_words, radius_label, unit_of

QUARTERS = range(1, 9)
"""Radii, in quarters of the first run's: of 8/255, from 2/255 to 16/255 in steps of 2/255."""
ATTACKS: dict[str, Measure] = {"pgd-20": PGD_20, "autoattack": AutoAttack()}


def collect(runs: Sequence[FinishedRun], attack: str = "pgd-20") -> dict[str, Any]:
    """First run minus second, natural and at each radius: accuracies, their difference, Tango's interval, McNemar's p.

    Raises:
        UserError: there are not two runs, or they are not judged in the same norm on the same images.
    """
    if len(runs) != 2:
        raise UserError(f"a difference is between two runs, not {len(runs)}", place="difference")
    if attack not in ATTACKS:
        raise UserError(f"there is no attack '{attack}' for it", place="--attack", remedy=hint(attack, ATTACKS))
    first, second = runs
    threat, other = first.recipe.threat, second.recipe.threat
    if threat.norm != other.norm:
        raise UserError(f"is judged in {other.norm}, {first.folder} in {threat.norm}", place=str(second.folder))
    on_the_same_data(runs)
    natural = _difference(first, second, Clean(), threat)
    points = [
        {"radius": radius} | _difference(first, second, ATTACKS[attack], evolve(threat, epsilon=radius))
        for radius in quarters_of(threat, QUARTERS)
    ]
    return {
        "first": first.name,
        "second": second.name,
        "attack": attack,
        "norm": threat.norm,
        "epsilon": threat.epsilon,
        "natural": natural,
        "points": points,
    }


def _difference(first: FinishedRun, second: FinishedRun, measure: Measure, threat: ThreatModel) -> dict[str, Any]:
    one, two = (run.judged(measure, threat) for run in (first, second))
    on_the_same_images(first, one, second, two)
    n = len(one.right)
    shares = {"first": one.right.count("1") / n, "second": two.right.count("1") / n}
    pair = attrs.asdict(paired(one.right, two.right))
    return shares | pair | {"ci95": list(pair["ci95"])}


def draw(data: dict[str, Any]) -> Figure:
    """Points of accuracy above 0 where the first run is the more robust one."""
    figure = new_figure(5.6, 3.4)
    axes = figure.subplots()
    unit, norm = unit_of(data["norm"]), data["norm"]
    radii = [point["radius"] / unit for point in data["points"]]
    low, high = ([100 * point["ci95"][end] for point in data["points"]] for end in (0, 1))
    values = [100 * point["difference"] for point in data["points"]]
    axes.axhline(0, color="black", linewidth=0.8)
    mark = data["epsilon"] / unit
    words = f"reported at {radius_in_words(norm, data['epsilon'])}"
    axes.axvline(mark, color=GREY, linewidth=1.2, linestyle=":", label=words, zorder=0)
    axes.fill_between(radii, low, high, color=BLUE, alpha=0.18, linewidth=0, label="95 % interval, paired")
    axes.plot(
        radii,
        values,
        color=BLUE,
        marker="o",
        markersize=4,
        label=f"{data['attack']}, {data['points'][0]['n']:,} images",
    )
    axes.set_xticks(radii, [f"{radius:.3g}" for radius in radii])
    axes.set(title=f"{data['first']} minus {data['second']}", xlabel=radius_label(norm))
    axes.set_ylabel("difference in accuracy (points)")
    axes.legend(loc="best")
    return figure
