"""The pictures of the pages about kinds, drawn by the strategies themselves: python docs/pictures.py [FOLDER]."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from robustkit import px
from robustkit.attacks import PGD
from robustkit.core.batch import Batch, Budget, Output, Progress
from robustkit.core.rng import whole
from robustkit.core.strategy import Record
from robustkit.core.world import World
from robustkit.data.augment import Augmentation, augment
from robustkit.datasets import Digits
from robustkit.engine.predictor import ModulePredictor
from robustkit.epsilons import ECAS, Cyclic, CyclicBatch, Linear
from robustkit.evaluation.results import wilson
from robustkit.heads.gaussian_mixture import GaussianMixtureHead
from robustkit.heads.linear import Linear as LinearHead
from robustkit.losses import Align, CrossEntropy, Mart, Trades
from robustkit.schedules import Constant, Cosine, MultiStep, OneCycle, Triangular
from robustkit.targets import Momentum
from robustkit.threats import L1, L2, Linf

FOLDER = Path(__file__).parent / "images"
BLUE, ORANGE, GREEN, GREY = "#33638d", "#d1662a", "#3a8a5f", "#999999"
PALE = ["#c9d8e6", "#f1d9ca", "#cfe5d8"]
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
}


class Bend(nn.Module):
    """Two classes over two pixels, with a curved border between them."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.flatten(1).unbind(1)
        score = 6 * (second - 0.35 - 0.25 * torch.sin(5 * first))
        return torch.stack([score, -score], dim=1)


def pixels(points: object) -> Tensor:
    """(B, 2) points as images of two pixels."""
    return torch.as_tensor(points, dtype=torch.float32).view(-1, 1, 1, 2)


def threats() -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.6))
    far = torch.rand(4000, 1, 1, 2, generator=torch.Generator().manual_seed(0)) * 2 - 0.5
    x = pixels([0.72, 0.5]).expand_as(far)
    for axis, threat in zip(axes, (Linf(epsilon=0.35), L2(epsilon=0.35), L1(epsilon=0.35)), strict=True):
        ball = threat.project(far, x, torch.full((len(far),), threat.epsilon)).view(-1, 2)
        axis.scatter(*ball.numpy().T, s=1.5, color=BLUE, linewidths=0)
        axis.plot(0.72, 0.5, "o", color=ORANGE, markersize=5)
        _box(axis, f"{threat.norm}, ε = {threat.epsilon:g}")
    return figure


def attacks() -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.3))
    model = Bend()
    grid = np.linspace(0, 1, 200)
    points = np.stack(np.meshgrid(grid, grid), axis=-1)
    for axis, threat in zip(axes, (Linf(epsilon=0.28), L2(epsilon=0.28)), strict=True):
        logits = model(pixels(points.reshape(-1, 2)))
        loss = nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none")
        axis.contourf(grid, grid, loss.view(200, 200).numpy(), levels=14, cmap="Greys", alpha=0.7)
        axis.contour(grid, grid, (logits[:, 0] - logits[:, 1]).view(200, 200).numpy(), levels=[0], colors=GREY)
        x, y = pixels([0.5, 0.72]), torch.tensor([0])
        budget = Budget(torch.tensor([threat.epsilon]))
        path = [
            PGD(steps=k, start="clean")(ModulePredictor(model), x, y, budget, threat, whole(x, 0, "picture"))
            for k in range(8)
        ]
        axis.plot(*torch.cat(path).view(-1, 2).numpy().T, "o-", color=ORANGE, markersize=3.5, linewidth=1)
        shape = (
            plt.Rectangle((0.22, 0.44), 0.56, 0.56, fill=False, color=BLUE)
            if threat.norm == "Linf"
            else plt.Circle((0.5, 0.72), 0.28, fill=False, color=BLUE)
        )
        axis.add_patch(shape)
        _box(axis, f"PGD in {threat.norm}, steps of ε / 4")
    return figure


def epsilons() -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8), width_ratios=[3, 2])
    epochs = range(30)
    for schedule, name, color in ((Linear(), "linear", GREY), (Cyclic(), "cyclic", BLUE)):
        radii = [255 * schedule.value(Progress.at(epoch * 100, 30, 100)) for epoch in epochs]
        left.step([e + 1 for e in epochs], radii, where="mid", color=color, label=name)
    steps = [255 * CyclicBatch().value(Progress.at(step, 30, 100)) for step in range(12)]
    left.plot([1 + step / 12 for step in range(12)], steps, ".", color=GREEN, markersize=3, label="cyclic-batch")
    left.set(xlabel="epoch", ylabel="radius, 255ths")
    left.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), columnspacing=1)
    entropies = torch.linspace(0, np.log(10), 300)
    budget = ECAS().adjust(entropies, 8 * px, 11 * px)
    right.plot(entropies.numpy(), 255 * budget.epsilon.numpy(), color=ORANGE)
    right.axhline(8, color=BLUE, linestyle=":")
    right.set(xlabel="entropy of the prediction, nats", title="ecas, cycle at 8, drawn 11", ylim=(0, 13))
    return figure


def targets() -> Figure:
    figure, axis = plt.subplots(figsize=(7.2, 2.6))
    epochs, batch = 40, Batch(torch.zeros(1, 1, 1, 2), torch.tensor([0]), torch.tensor([0]))
    draws = np.random.default_rng(3)
    read = np.clip(0.35 + 0.012 * np.arange(epochs) + 0.14 * draws.standard_normal(epochs), 0.02, 0.98)
    for start, color in ((0.5, GREEN), (0.025, BLUE)):
        memory = Momentum(gamma=0.9, start=start).build(World(samples=1, training=1, classes=2, image_shape=(1, 1, 2)))
        rows = []
        for epoch, p in enumerate(read):
            logits = torch.tensor([[p, 1 - p]], dtype=torch.float32).log()
            progress = Progress.at(epoch, epochs, 1)
            row = memory(Output(logits, logits, logits, logits[:, 0]), batch, progress)
            memory.observe(Record(batch, progress, Budget(torch.tensor([8 * px])), batch.x, {}, row, {}))
            rows.append(float(row[0, 0]))
        axis.plot(range(1, epochs + 1), rows, color=color, label=f"momentum from epoch {max(1, round(start * epochs))}")
    axis.plot(range(1, epochs + 1), read, ".", color=GREY, label="read in the epoch")
    axis.set(xlabel="epoch", ylabel="true class in an image's row")
    axis.legend(frameon=False)
    return figure


def heads() -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.2))
    centres = torch.tensor([[-1.6, -0.8], [1.6, -0.6], [0.1, 1.7]])
    grid = torch.linspace(-4, 4, 220)
    points = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), dim=-1).view(-1, 2)
    linear = LinearHead().build(2, 3)
    with torch.no_grad():
        linear.linear.weight.copy_(centres)
        linear.linear.bias.copy_(-centres.square().sum(1) / 2)
    line = grid.numpy()
    mixture = GaussianMixtureHead(centres, margin=0.1)
    for axis, head, name in zip(axes, (linear, mixture), ("linear", "gaussian-mixture"), strict=True):
        with torch.no_grad():
            logits = head(points).logits
        axis.contourf(
            line,
            line,
            logits.argmax(1).view(220, 220).numpy(),
            levels=[-0.5, 0.5, 1.5, 2.5],
            colors=PALE,
        )
        if name != "linear":
            nearest = logits.exp().amax(1).view(220, 220).numpy()
            axis.contour(line, line, nearest, levels=[0.05, 0.3, 0.7], colors="black", linewidths=0.7)
            axis.plot(*centres.numpy().T, "k+")
        axis.set(title=name, xlabel="first feature", ylabel="second feature", aspect="equal")
    return figure


def losses() -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.6), sharey=True)
    p = torch.linspace(0.01, 0.99, 99)
    batch = Batch(torch.zeros(1, 1, 1, 2), torch.tensor([0]), torch.tensor([0]))

    def output(value: Tensor | float) -> Output:
        value = torch.as_tensor(value)
        logits = torch.stack([value, 1 - value])[None].log()
        return Output(logits, logits, logits, torch.zeros(1))

    def values(loss: object, natural: float) -> list[float]:
        row = torch.tensor([[natural, 1 - natural]])
        views = [{"natural": output(natural), "adversarial": output(each), "input": output(each)} for each in p]
        return [float(sum(loss(view, row, batch, {}, Progress.at(0, 2, 1)).values())) for view in views]

    for axis, natural in zip(axes, (0.3, 0.6, 0.95), strict=True):
        axis.plot(p.numpy(), values(CrossEntropy(), natural), color=GREY, label="cross-entropy")
        axis.plot(p.numpy(), values(Align(weight=3.5), natural), color=ORANGE, label="align, λ = 3.5")
        axis.plot(p.numpy(), values(Trades(weight=6.0), natural), color=BLUE, label="trades, 6")
        axis.plot(p.numpy(), values(Mart(weight=5.0), natural), color=GREEN, label="mart, 5")
        axis.axvline(natural, color=GREY, linestyle=":", linewidth=0.8)
        axis.set(title=f"target, or f(x): {natural:g}", ylim=(0, 8), xlabel="f(x̂), true class")
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def weights() -> Figure:
    figure, axis = plt.subplots(figsize=(7.2, 2.8))
    w = np.linspace(-2.2, 3.2, 400)

    def height(w: np.ndarray) -> np.ndarray:
        return 0.25 * (w - 1.6) ** 2 - 1.1 * np.exp(-60 * (w + 0.6) ** 2) + 0.6

    worst = np.max([height(w + v) for v in np.linspace(-0.35, 0.35, 71)], axis=0)
    axis.plot(w, height(w), color=BLUE, label="still: the objective")
    axis.plot(w, worst, color=ORANGE, label="awp: its largest value near")
    for values, color in ((height(w), BLUE), (worst, ORANGE)):
        lowest = [k for k in range(1, len(w) - 1) if values[k - 1] > values[k] < values[k + 1]]
        axis.plot(w[lowest], values[lowest], "o", color=color, markersize=4)
    axis.set(xlabel="a weight", ylabel="objective")
    axis.legend(frameon=False)
    return figure


def optimizers() -> Figure:
    figure, axis = plt.subplots(figsize=(7.2, 2.6))
    shown = {
        "constant": Constant(),
        "multi-step": MultiStep(at=(75, 90)),
        "one-cycle": OneCycle(),
        "triangular": Triangular(),
        "cosine": Cosine(),
    }
    for (name, schedule), line in zip(shown.items(), ("-", "--", "-", "-.", ":"), strict=True):
        rates = [schedule(Progress.at(epoch, 100, 1)).lr_scale for epoch in range(100)]
        axis.plot(range(1, 101), rates, line, label=name)
    axis.set(xlabel="epoch of 100", ylabel="share of the learning rate")
    axis.legend(frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def data() -> Figure:
    figure, axes = plt.subplots(1, 9, figsize=(7.2, 1.1))
    images = Digits().load().train.fetch(torch.tensor([0])).expand(8, -1, -1, -1) / 255
    moved = augment(images, Augmentation(padding=2), whole(images, 1, "picture"))
    for axis, image, title in zip(axes, [images[0], *moved], ["stored", *[""] * 8], strict=True):
        axis.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])
    return figure


def evaluation() -> Figure:
    figure, axis = plt.subplots(figsize=(7.2, 2.6))
    counts = np.unique(np.logspace(1.3, 4, 60).astype(int))
    for share, color in ((0.3, BLUE), (0.5, ORANGE)):
        ends = np.array([wilson(round(share * n), n) for n in counts]) * 100
        axis.fill_between(counts, *ends.T, color=color, alpha=0.3, label=f"{share:.0%} measured", linewidth=0)
    axis.axvline(1000, color=GREY, linestyle=":")
    axis.set(xscale="log", xlabel="test images", ylabel="95 % interval, %")
    axis.legend(frameon=False)
    return figure


def _box(axis: Axes, title: str) -> None:
    axis.add_patch(plt.Rectangle((0, 0), 1, 1, fill=False, color=GREY, linestyle=":"))
    axis.set(title=title, xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), aspect="equal", xlabel="first pixel", ylabel="second")


PICTURES = (threats, epsilons, attacks, targets, heads, losses, weights, optimizers, data, evaluation)


def draw(folder: Path) -> list[Path]:
    """One picture for each page of docs/kinds."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with plt.rc_context(STYLE):
        for picture in PICTURES:
            figure = picture()
            paths.append(folder / f"{picture.__name__}.png")
            figure.savefig(paths[-1], dpi=130, metadata={"Software": None})
            plt.close(figure)
    return paths


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
