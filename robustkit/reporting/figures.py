"""Pictures of a run: learning curves, the radii it trained with, and a few images as they are and as attacked."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from robustkit.attacks.pgd import PGD
from robustkit.core import checkpoint
from robustkit.core.batch import Batch, Budget
from robustkit.core.parts import Parts
from robustkit.core.rng import whole
from robustkit.core.strategy import Predict
from robustkit.data.loader import make_batch
from robustkit.engine import Predictor
from robustkit.folder import read_metrics
from robustkit.objectives.inverse import InverseObjective

EXAMPLES = 6
STORED_PIXELS = 64
"""Longer sides of examples are stored smaller."""
ROWS_OF_RADII = 24
"""At most so many different radii are told apart; more are binned."""

BLUE, VERMILLION, _PURPLE = "#0072B2", "#D55E00", "#CC79A7"  # Okabe and Ito's colours, which everybody can tell apart
_TERMS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a class may be called $1$
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 150,
}


def draw(folder: Path, parts: Parts) -> list[Path]:
    """Writes curves.png, epsilon.png (of an attacked training) and examples.png into `folder`/figures.

    What the examples show goes to examples.json in `folder`, too: pictures, predicted classes, probabilities.
    """
    reports = read_metrics(folder)
    figures: dict[str, Figure] = {}
    with rc_context(STYLE):
        if reports:
            figures["curves"] = curves(reports, parts.best.get("epoch"))
            if parts.recipe.attack is not None:
                figures["epsilon"] = radii(reports)
        batch, shown = _examples(parts)
        figures["examples"] = examples(parts, batch, shown)
        checkpoint.write_text(folder / "examples.json", json.dumps(_stored(parts, batch, shown)) + "\n")
        target = folder / "figures"
        target.mkdir(exist_ok=True)
        paths = [target / f"{name}.png" for name in figures]
        for path, figure in zip(paths, figures.values(), strict=True):
            partial = path.with_name(f"{path.name}.partial")
            figure.savefig(partial, format="png")
            partial.replace(path)  # a kill leaves the whole figure or none
    return paths


def curves(reports: Sequence[dict[str, Any]], best: int | None) -> Figure:
    """Accuracy on held-out and training images, the terms of the loss, and the learning rate, by epoch."""
    figure = new_figure(10.5, 3.2)
    accuracy, loss, rate = figure.subplots(1, 3, width_ratios=(1.25, 1, 0.8))
    for part, label, style in (("validation", "held out", "-"), ("training", "training", "--")):
        for kind, colour in (("natural", BLUE), ("robust", VERMILLION), ("fgsm", _PURPLE)):
            points = [(r["epoch"], 100 * r[part][kind]) for r in reports if kind in r.get(part, {})]
            draw_line(accuracy, points, f"{kind}, {label}", color=colour, linestyle=style)
    accuracy.set(title="Accuracy", ylabel="%", ylim=(0, 101.5))
    if best is not None:
        accuracy.axvline(best, color="#555555", linewidth=1.2, linestyle=":", label="best checkpoint", zorder=0)
    if accuracy.get_legend_handles_labels()[1]:
        accuracy.legend(loc="best")
    else:
        accuracy.text(0.5, 0.5, "no images were held out", transform=accuracy.transAxes, ha="center", color="#555555")
    draw_line(loss, [(r["epoch"], r["train"]["objective"]) for r in reports], "objective", color="black", linewidth=1.8)
    terms = list(dict.fromkeys(name for r in reports for name in r["train"] if name.startswith("term ")))
    for number, name in enumerate(terms if len(terms) > 1 else ()):
        points = [(r["epoch"], r["train"][name]) for r in reports if name in r["train"]]
        draw_line(loss, points, name.removeprefix("term "), color=_TERMS[number % len(_TERMS)])
    loss.set(title="Training loss", ylabel="nats")
    loss.legend(loc="best")
    draw_line(rate, [(r["epoch"], r["lr"]) for r in reports], "", color="#555555")
    rate.set(title="Learning rate", ylabel="at the end of the epoch")
    rate.set_ylim(bottom=0)
    for axes in (accuracy, loss, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    return figure


def radii(reports: Sequence[dict[str, Any]]) -> Figure:
    """Which share of an epoch's images was attacked with which radius."""
    values, shares = _histogram(reports)
    figure = new_figure(6.6, 1.6 + 0.17 * max(5, len(values)))
    axes = figure.subplots()
    epochs = [report["epoch"] for report in reports]
    image = axes.imshow(
        100 * shares,
        aspect="auto",
        origin="lower",
        cmap="Blues",
        vmin=0,
        vmax=100,
        interpolation="nearest",
        extent=(0.5, len(epochs) + 0.5, -0.5, len(values) - 0.5),
    )
    means = [report["train"]["epsilon"] * 255 for report in reports]
    heights = np.interp(means, values, np.arange(len(values))) if len(values) > 1 else np.zeros(len(means))
    axes.plot(range(1, len(epochs) + 1), heights, color="white", linewidth=3)
    axes.plot(range(1, len(epochs) + 1), heights, color=VERMILLION, linewidth=1.5, marker=".", label="mean")
    axes.set_yticks(range(len(values)), [f"{value:.3g}" for value in values])
    axes.set(title="Radii of the training attack", xlabel="epoch", ylabel="radius (1/255)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(False)
    axes.legend(loc="best")
    figure.colorbar(image, ax=axes, label="share of the epoch's images (%)")
    return figure


def _histogram(reports: Sequence[dict[str, Any]]) -> tuple[list[float], NDArray[np.float64]]:
    """Radii in 255ths, ascending, and the share of each in each epoch, (radii, epochs)."""
    unit = reports[0]["radii"]["unit"] * 255
    counts = np.array([report["radii"]["counts"] for report in reports], dtype=np.float64).T
    occupied = np.flatnonzero(counts.sum(axis=1))
    if len(occupied) == 0:
        return [0.0], np.zeros((1, len(reports)))
    first, last = int(occupied[0]), int(occupied[-1])
    if len(occupied) > ROWS_OF_RADII:
        groups = np.array_split(np.arange(first, last + 1), ROWS_OF_RADII)
    else:
        groups = [np.array([index]) for index in occupied]
    values = [float(group.mean()) * unit for group in groups]
    rows = np.stack([counts[group].sum(axis=0) for group in groups])
    return values, rows / np.maximum(1, counts.sum(axis=0))


@attrs.frozen
class _Row:
    """One row of the picture of examples, images by column; what the model says of them where it was asked."""

    label: str
    images: Tensor
    probabilities: Tensor | None = None


def _examples(parts: Parts) -> tuple[Batch, list[_Row]]:
    """Test images: natural, perturbation, adversarial (PGD-20), inverse adversarial; what the model makes of each."""
    batch = make_batch(parts.data.test, varied(parts.data.test.labels), device=parts.world.device)
    predict = Predictor(parts.final, parts.world.device)
    with torch.no_grad(), predict.using("eval") as forward:
        return batch, _example_rows(parts, forward, batch)


def _stored(parts: Parts, batch: Batch, shown: Sequence[_Row]) -> dict[str, Any]:
    """The examples as JSON data."""
    rows = []
    for row in shown:
        pictures: list[dict[str, Any]] = [{"image": _png(image)} for image in row.images]
        if row.probabilities is not None:
            for picture, probabilities, label in zip(pictures, row.probabilities, batch.y.tolist(), strict=True):
                picture["predicted"] = parts.data.classes[int(probabilities.argmax())]
                picture["probability"] = float(probabilities[label])
        rows.append({"label": row.label, "pictures": pictures})
    threat = parts.recipe.threat
    true = [parts.data.classes[label] for label in batch.y.tolist()]
    return {"true": true, "norm": threat.norm, "epsilon": threat.epsilon, "rows": rows}


def _png(image: Tensor) -> str:
    """An image (C, H, W) as a PNG file in base 64; of channel counts other than 3 the first, in grey."""
    pixels = image.detach().float().cpu()[None, : 3 if len(image) == 3 else 1]
    longest = max(pixels.shape[2:])
    if longest > STORED_PIXELS:
        size = [max(1, side * STORED_PIXELS // longest) for side in pixels.shape[2:]]
        pixels = nn.functional.interpolate(pixels, size=size, mode="area")
    values = (255 * pixels[0]).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).squeeze(2).numpy()
    file = io.BytesIO()
    Image.fromarray(values).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def examples(parts: Parts, batch: Batch, shown: Sequence[_Row]) -> Figure:
    """The examples as a picture."""
    count = len(batch.y)
    figure = new_figure(1.0 + 1.35 * count, 0.5 + 1.6 * len(shown))
    grid = figure.subplots(len(shown), count, squeeze=False)
    for row, line in zip(shown, grid, strict=True):
        for column, axes in enumerate(line):
            draw_picture(axes, row.images[column])
            if row.probabilities is not None:
                axes.set_title(*_verdict(parts, row.probabilities[column], int(batch.y[column])))
        line[0].set_ylabel(row.label, fontsize=8)
    for axes, label in zip(grid[-1], batch.y.tolist(), strict=True):
        axes.set_xlabel(f"true: {parts.data.classes[label][:12]}", fontsize=8)
    radius = f"{parts.recipe.threat.epsilon * 255:.3g}/255"
    figure.suptitle(
        f"Test images within {parts.recipe.threat.norm} {radius}: predicted class, and the probability of the true one",
        fontsize=9,
        fontweight="bold",
    )
    return figure


def _example_rows(parts: Parts, forward: Predict, batch: Batch) -> list[_Row]:
    threat = parts.recipe.threat

    def attacked(attack: PGD, radius: float) -> Tensor:
        budget = Budget(batch.x.new_full((len(batch.y),), radius))
        return attack(forward, batch.x, batch.y, budget, threat, whole(batch.x, parts.recipe.seed, "figure"))

    def probabilities(images: Tensor) -> Tensor:
        return forward(images).logits.softmax(dim=1).cpu()

    adversarial = attacked(PGD(steps=20), threat.epsilon)
    difference = adversarial - batch.x
    largest = float(difference.abs().max())
    factor = 0.5 / largest if largest else 1.0
    perturbations = _class_perturbations(parts.strategies.get("target"))
    if perturbations is None:
        inverse, label = attacked(PGD(steps=5, objective=InverseObjective(beta=0)), threat.epsilon / 2), "inverse"
    else:
        inverse, label = (batch.x + perturbations[batch.y]).clamp(0, 1), "inverse, by class"
    return [
        _Row("natural", batch.x, probabilities(batch.x)),
        _Row(f"perturbation x {factor:.2g}", (0.5 + factor * difference).clamp(0, 1)),
        _Row("adversarial, PGD-20", adversarial, probabilities(adversarial)),
        _Row(label, inverse, probabilities(inverse)),
    ]


def _class_perturbations(target: Any) -> Tensor | None:
    """z (K, C, H, W) of a universal target, however deep it is wrapped."""
    modules = target.modules() if isinstance(target, nn.Module) else ()
    found = (getattr(module, "z", None) for module in modules)
    return next((z for z in found if isinstance(z, Tensor)), None)


def varied(labels: Tensor, count: int = EXAMPLES) -> Tensor:
    """Rows of `count` test images: the first of each class, then the second of each, and so on."""
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    turn = torch.empty_like(labels)
    turn[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return turn.argsort(stable=True)[:count]


def draw_picture(axes: Axes, image: Tensor) -> None:
    pixels = image.detach().float().cpu().permute(1, 2, 0).numpy()
    if pixels.shape[2] == 3:
        axes.imshow(pixels, vmin=0, vmax=1, interpolation="nearest")
    else:  # grey; of other channel counts the first
        axes.imshow(pixels[:, :, 0], vmin=0, vmax=1, cmap="gray", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _verdict(parts: Parts, probabilities: Tensor, label: int) -> tuple[str, dict[str, Any]]:
    predicted = int(probabilities.argmax())
    colour = BLUE if predicted == label else VERMILLION
    text = f"{parts.data.classes[predicted][:12]}\n{100 * float(probabilities[label]):.0f} %"
    return text, {"fontsize": 8, "fontweight": "normal", "color": colour}


def draw_line(axes: Axes, points: Sequence[tuple[float, float]], label: str, **style: Any) -> None:
    if points:
        marker = "o" if len(points) <= 30 else None
        axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3, **style)


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
