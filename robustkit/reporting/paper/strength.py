"""Accuracy against attack strength, apart for the images that a model finds easy and hard (UIAT, Figs. 1 and 4).

Test images are ranked by the model's own cross-entropy on them as they are; the lower half is the top 50 %. Positive
strengths are radii of PGD-20, negative ones of the same descent made to help: inverse perturbations, image by image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustkit.attacks.pgd import PGD
from robustkit.core.batch import Budget
from robustkit.core.errors import UserError
from robustkit.core.rng import derive, whole
from robustkit.core.spec import evolve
from robustkit.core.strategy import Outcomes, Slice, Subject
from robustkit.evaluation import PGD_20, Clean, wilson
from robustkit.evaluation.evaluate import rows_of
from robustkit.evaluation.ledger import digest_of_images
from robustkit.evaluation.logits import is_right
from robustkit.evaluation.results import fingerprint
from robustkit.objectives.inverse import InverseObjective
from robustkit.reporting.figures import BLUE, VERMILLION
from robustkit.reporting.paper.finished import FinishedRun, Judged
from robustkit.reporting.paper.panels import GREEN, GREY, panels, quarters_of, radius_label, unit_of

QUARTERS = range(-4, 9)
"""Strengths, in quarters of the threat model's radius: of 8/255, from -8/255 to 16/255 in steps of 2/255."""


@attrs.frozen
class Helped:
    """Accuracy after PGD down the cross-entropy with the label, in steps of epsilon / 4, on every image."""

    key: str = "inverse-pgd-20"
    steps: int = 20

    def outcomes(self, subject: Subject, part: Slice, seed: int, before: Outcomes | None = None) -> Iterator[Outcomes]:
        descent = PGD(steps=self.steps, objective=InverseObjective(beta=0))
        budget = Budget(part.x.new_full((len(part.y),), subject.threat.epsilon))
        generator = whole(part.x, derive(seed, self.key, part.number))
        images = descent(subject.predict, part.x, part.y, budget, subject.threat, generator)
        yield Outcomes(is_right(subject.logits(images), part.y))


def collect(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """A panel for each run: strengths in pixels of [0, 1], and for each half its accuracies with 95 % intervals."""
    return {"panels": [_panel(run) for run in runs]}


def _panel(run: FinishedRun) -> dict[str, Any]:
    threat = run.recipe.threat
    strengths = quarters_of(threat, QUARTERS)
    easy = _easy(run)
    found = [_judged(run, strength) for strength in strengths]
    top, bottom = (_half(found, easy, half) for half in ("1", "0"))
    at = strengths.index(threat.epsilon)
    return {
        "run": run.name,
        "norm": threat.norm,
        "epsilon": threat.epsilon,
        "strengths": strengths,
        "top": top,
        "bottom": bottom,
        "gap": top["accuracies"][at] - bottom["accuracies"][at],
    }


def _easy(run: FinishedRun) -> Judged:
    """ "1" for each image of the half with the lower natural cross-entropy (of an odd number, the smaller half)."""

    def rank() -> dict[str, Any]:
        losses, names = [], []
        with run.opened(run.recipe.threat) as (subject, source, world):
            rows = rows_of(Clean(), run.images, len(source))
            if len(rows) < 2:
                raise UserError("one image has no halves", place="--images", remedy="give at least 2")
            for part in torch.split(rows, run.recipe.batch_size):
                x, y = source.rows(part)
                names.append(digest_of_images(x, y))
                losses.append(F.cross_entropy(subject.logits(x.to(world.device)).cpu(), y, reduction="none"))
        easy = torch.zeros(len(rows), dtype=torch.int64)
        easy[torch.cat(losses).argsort(stable=True)[: len(rows) // 2]] = 1
        return {"images": fingerprint("".join(names)), "easy": "".join(map(str, easy.tolist()))}

    found = run.remember("easy half", None, rank)
    return Judged(found["images"], found["easy"])


def _judged(run: FinishedRun, strength: float) -> Judged:
    threat = run.recipe.threat
    if strength == 0:
        return run.judged(Clean(), threat)
    return run.judged(PGD_20 if strength > 0 else Helped(), evolve(threat, epsilon=abs(strength)))


def _half(found: Sequence[Judged], easy: Judged, half: str) -> dict[str, Any]:
    """Of the images that `easy` marks with `half`."""
    n = easy.right.count(half)
    right = []
    for judged in found:
        assert judged.images == easy.images
        right.append(sum(pair == ("1", half) for pair in zip(judged.right, easy.right, strict=True)))
    return {"n": n, "accuracies": [count / n for count in right], "ci95": [list(wilson(count, n)) for count in right]}


def draw(data: dict[str, Any]) -> Figure:
    """Two lines a panel; the gap between them is written at the threat model's radius, in points."""
    figure, grid = panels(len(data["panels"]))
    for axes, panel in zip(grid, data["panels"], strict=True):
        unit = unit_of(panel["norm"])
        strengths = [strength / unit for strength in panel["strengths"]]
        axes.axvline(0, color=GREEN, linewidth=1.2, label="natural", zorder=0)
        for half, colour in (("top", BLUE), ("bottom", VERMILLION)):
            low, high = ([100 * interval[end] for interval in panel[half]["ci95"]] for end in (0, 1))
            axes.fill_between(strengths, low, high, color=colour, alpha=0.15, linewidth=0)
            shares = [100 * accuracy for accuracy in panel[half]["accuracies"]]
            label = f"{half} 50 % ({panel[half]['n']:,} images)"
            axes.plot(strengths, shares, color=colour, marker="o", markersize=3, label=label)
        _mark_gap(axes, panel)
        axes.set(title=panel["run"], ylim=(0, 101.5), xlabel=f"{radius_label(panel['norm'])}; negative: made to help")
        axes.legend(loc="lower left")
    grid[0].set_ylabel("accuracy (%)")
    return figure


def _mark_gap(axes: Axes, panel: dict[str, Any]) -> None:
    at = panel["strengths"].index(panel["epsilon"])
    ends = [100 * panel[half]["accuracies"][at] for half in ("top", "bottom")]
    place = panel["epsilon"] / unit_of(panel["norm"])
    axes.vlines(place, *sorted(ends), color=GREY, linestyle=":", linewidth=1.2)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.text(place, sum(ends) / 2, f"gap {100 * panel['gap']:.1f}", fontsize=8, ha="center", va="center", bbox=white)
