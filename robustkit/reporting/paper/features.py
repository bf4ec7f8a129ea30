"""Features of test images, as they are and attacked, in two dimensions (LDAT, Fig. 7).

Up to 100 images of each class and their PGD-40 examples are embedded together by t-SNE (van der Maaten and Hinton, JMLR
2008) from the head's input. What the picture suggests is measured beside it where distances mean something: in the
features themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from robustkit.attacks.pgd import PGD
from robustkit.core.batch import Budget
from robustkit.core.errors import UserError
from robustkit.core.rng import whole
from robustkit.core.spec import to_json
from robustkit.evaluation import Clean
from robustkit.evaluation.evaluate import rows_of
from robustkit.reporting.paper.finished import SEED, FinishedRun
from robustkit.reporting.paper.panels import GREY, panels, radius_in_words

PER_CLASS = 100
PERPLEXITY = 30.0
"""Of fewer than 92 vectors a third of them: it must be well below their number."""
ATTACK = PGD(steps=40)
KINDS = ("natural", "attacked")
NAMED = 20
"""So many classes are named; more have colours only."""


def collect(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """A panel for each run: {"natural" | "attacked": {"points": [[x, y], ...], "silhouette", "within / between"}}.

    `labels` are the images' classes. Silhouette (Rousseeuw 1987), between -1 and 1, and the ratio of the mean distance
    of two images of one class to that of two images of different classes are of Euclidean distances of features;
    `shift` is the mean distance of an image's features from those of its adversarial example, `relative shift` the same
    in units of the mean distance between natural images of different classes.

    Raises:
        UserError: there are too few images.
    """
    facts = [to_json(ATTACK), PER_CLASS, PERPLEXITY]
    return {
        "panels": [
            {"run": run.name}
            | run.remember("features", [*facts, to_json(run.recipe.threat)], partial(_panel, run))
            | {"classes": list(run.facts["classes"])}
            for run in runs
        ]
    }


def _panel(run: FinishedRun) -> dict[str, Any]:
    threat = run.recipe.threat
    natural, attacked, labels = _features(run)
    vectors = torch.cat([natural, attacked]).numpy()
    perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
    points = embedded(vectors, perplexity).round(3).tolist()
    between = _distances(natural, labels)[1]
    shift = float((natural - attacked).norm(dim=1).mean())
    return {
        "norm": threat.norm,
        "epsilon": threat.epsilon,
        "attack": f"pgd-{ATTACK.steps}",
        "perplexity": perplexity,
        "labels": labels.tolist(),
        "natural": {"points": points[: len(labels)]} | _numbers(natural, labels),
        "attacked": {"points": points[len(labels) :]} | _numbers(attacked, labels),
        "shift": shift,
        "relative shift": shift / between,
    }


def _features(run: FinishedRun) -> tuple[Tensor, Tensor, Tensor]:
    """Of the images and of their examples, (N, D) float64, and their labels (N,); by class."""
    threat, labels = run.recipe.threat, run.data.test.labels
    natural: list[Tensor] = []
    attacked: list[Tensor] = []
    with run.opened(threat) as (subject, source, world):
        rows = _chosen(labels, rows_of(Clean(), run.images, len(source)))
        for number, part in enumerate(torch.split(rows, run.recipe.batch_size)):
            x, y = (tensor.to(world.device) for tensor in source.rows(part))
            budget = Budget(x.new_full((len(y),), threat.epsilon))
            x_adv = ATTACK(subject.predict, x, y, budget, threat, whole(x, SEED, "features", number))
            for images, found in ((x, natural), (x_adv, attacked)):
                found.append(run.model.network(images).features.cpu().double())
    return torch.cat(natural), torch.cat(attacked), labels[rows].long()


def _chosen(labels: Tensor, rows: Tensor) -> Tensor:
    """Of the test images in `rows` (n,) the first `PER_CLASS` of each class.

    Raises:
        UserError: they are of one class, or no two of them are of the same.
    """
    shown = labels[rows]
    chosen = [rows[shown == label][:PER_CLASS] for label in sorted(set(shown.tolist()))]
    if len(chosen) < 2 or len(chosen) == sum(map(len, chosen)):
        fault = f"too few images: {len(rows)}, and two classes are needed, and two images of one of them"
        raise UserError(fault, place="--images", remedy="give more, e.g. 100")
    return torch.cat(chosen)


def embedded(vectors: NDArray[np.float64], perplexity: float) -> NDArray[np.float64]:
    """(N, D) vectors in two dimensions, (N, 2), by t-SNE from their principal components."""
    from sklearn.manifold import TSNE

    made: NDArray[np.float64] = TSNE(perplexity=perplexity, init="pca", random_state=SEED).fit_transform(vectors)
    return made


def _numbers(features: Tensor, labels: Tensor) -> dict[str, float]:
    from sklearn.metrics import silhouette_score

    within, between = _distances(features, labels)
    silhouette = float(silhouette_score(features.numpy(), labels.numpy()))
    return {"silhouette": silhouette, "within / between": within / between}


def _distances(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """The mean distance of two different images of one class, and of two of different classes."""
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels
    pairs = same & ~torch.eye(len(labels), dtype=torch.bool)
    return float(distances[pairs].mean()), float(distances[~same].mean())


def draw(data: dict[str, Any]) -> Figure:
    """A colour for each class; points are images as they are, crosses attacked ones. Axes have no unit."""
    figure, grid = panels(len(data["panels"]), width=4.0, height=4.6, one_axis=False)
    for axes, panel in zip(grid, data["panels"], strict=True):
        colours = _colours(len(panel["classes"]))
        of_points = [colours[label] for label in panel["labels"]]
        for kind, marker, size in zip(KINDS, ("o", "x"), (9, 12), strict=True):
            x, y = zip(*panel[kind]["points"], strict=True)
            axes.scatter(x, y, s=size, c=of_points, marker=marker, linewidths=0 if marker == "o" else 0.8, alpha=0.8)
        axes.set(title=panel["run"], xticks=[], yticks=[])
        axes.set_xlabel(_words(panel), fontsize=8)
        axes.grid(False)
    first = data["panels"][0]
    handles = [Line2D([], [], color=GREY, linestyle="none", marker="o", markersize=4, label="natural")]
    radius = radius_in_words(first["norm"], first["epsilon"])
    label = f"{first['attack'].upper()}, {first['norm']} {radius}"
    handles.append(Line2D([], [], color=GREY, linestyle="none", marker="x", markersize=5, label=label))
    names = first["classes"] if len(first["classes"]) <= NAMED else []
    for name, colour in zip(names, _colours(len(first["classes"])), strict=False):
        handles.append(Line2D([], [], color=colour, linestyle="none", marker="s", markersize=5, label=name[:12]))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
    return figure


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    if count <= 10:
        return [colormaps["tab10"](number) for number in range(count)]
    return [colormaps["turbo"](number / (count - 1)) for number in range(count)]


def _words(panel: dict[str, Any]) -> str:
    natural, attacked = (panel[kind] for kind in KINDS)
    return "\n".join(
        [
            f"silhouette {natural['silhouette']:.2f}, attacked {attacked['silhouette']:.2f}",
            f"within / between classes {natural['within / between']:.2f}, attacked {attacked['within / between']:.2f}",
            f"mean |f(x) - f(x')| {panel['shift']:.3g}, {panel['relative shift']:.2f} of the distance between classes",
            f"{len(panel['labels']):,} images, perplexity {panel['perplexity']:.3g}",
        ]
    )
