"""Where ECAS's thresholds come from: how uncertain an untrained and a trained network are of training images.

The paper (BMVC 2023) sets `h_high` to the mean entropy of an untrained network's predictions and `h_low` to that of a
well-trained one. Both depend on the network, and on the mode: the published numbers fit a WRN-34-10 whose batch
normalisation uses the batch's statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import attrs
import torch
from torch import Tensor

from robustkit.core.batch import Mode, Part, Progress
from robustkit.core.model import RobustModel
from robustkit.core.parts import Parts
from robustkit.core.recipe import Recipe
from robustkit.data.loader import make_batch
from robustkit.engine import Predictor
from robustkit.epsilons import ECAS
from robustkit.functional import entropy
from robustkit.opening import load_parts, make_world, restore

BATCHES = 20
PUBLISHED = {10: (1.3, 2.274), 100: (3.35, 4.582)}
"""Number of classes -> (h_low, h_high) of ECAS's code."""
MODES: tuple[Mode, ...] = ("train-frozen", "eval")
"""The batch's statistics, as the entropy pass of ECAS's code has them, but untracked; and the running ones."""


class Reading(NamedTuple):
    """What a network says of the same images in one mode: (N,) entropies in nats."""

    network: str
    mode: Mode
    entropies: Tensor

    @property
    def mean(self) -> float:
        return float(self.entropies.mean())

    def below(self, threshold: float) -> float:
        """The share of images that lie below."""
        return float((self.entropies < threshold).double().mean())

    def above(self, threshold: float) -> float:
        """The share of images that lie above."""
        return float((self.entropies > threshold).double().mean())


class Threshold(NamedTuple):
    """A value of "h_low" or "h_high", and whose it is: "published", the "recipe"'s, or "measured" here."""

    name: str
    source: str
    value: float

    def beyond(self, reading: Reading) -> float:
        """The share of images whose radius it would adjust: those below `h_low`, those above `h_high`."""
        return reading.below(self.value) if self.name == "h_low" else reading.above(self.value)


@attrs.frozen
class Calibration:
    """Entropies of a recipe's network on the same augmented training images: untrained, and trained where there is one.

    `readings` has each in both `MODES`, the untrained first; `recipe` is the recipe's own (h_low, h_high), if it has
    some.
    """

    classes: int
    batches: int
    readings: tuple[Reading, ...]
    recipe: tuple[float, float] | None = None

    @property
    def images(self) -> int:
        return len(self.readings[0].entropies)

    def thresholds(self) -> Iterator[Threshold]:
        """Published, the recipe's where they are others, measured: `h_high` untrained, `h_low` trained, train mode."""
        measured = [reading.mean for reading in self.readings if reading.mode == "train-frozen"]
        published = PUBLISHED.get(self.classes)
        for place, name in enumerate(("h_low", "h_high")):
            if published is not None:
                yield Threshold(name, "published", published[place])
            if self.recipe is not None and self.recipe != published:
                yield Threshold(name, "recipe", self.recipe[place])
            if name == "h_high":
                yield Threshold(name, "measured", measured[0])
            elif len(measured) > 1:
                yield Threshold(name, "measured", measured[1])


def entropies(model: RobustModel, batches: Iterable[Tensor], mode: Mode) -> Tensor:
    """How uncertain the model is of each image: (N,) entropies of its predictions in nats, in float64 on the CPU.

    Args:
        batches: images (B, C, H, W) in [0, 1], on the model's device. In the training modes they share statistics.
        mode: only "train" moves the running statistics.
    """
    found = []
    for images in batches:
        with torch.no_grad(), Predictor(model, images.device).using(mode) as predict:
            found.append(entropy(predict(images).logits).cpu().double())
    return torch.cat(found)


def mean_entropy(model: RobustModel, batches: Iterable[Tensor], mode: Mode = "train-frozen") -> float:
    """The mean of `entropies`: `h_high` of an untrained model, `h_low` of a trained one (ECAS, BMVC 2023)."""
    return float(entropies(model, batches, mode).mean())


def first_batches(parts: Parts, count: int) -> Iterator[Tensor]:
    """The images (B, C, H, W) that the first `count` steps of training see, augmented as there."""
    recipe, world = parts.recipe, parts.world
    for step in range(count):
        progress = Progress.at(step, recipe.epochs, parts.steps_per_epoch)
        start = step % parts.steps_per_epoch * recipe.batch_size
        rows = parts.order(progress.epoch)[start : start + recipe.batch_size]
        generator = world.generator("augmentation", progress, Part(0, len(rows), len(rows)))
        batch = make_batch(
            parts.train, rows, device=world.device, augmentation=recipe.data.augmentation, generator=generator
        )
        yield batch.x


def calibrate_entropy(
    recipe: Recipe, *, run: Path | None = None, batches: int = BATCHES, device: str | None = None
) -> Calibration:
    """Measure the entropies that ECAS's thresholds are said to come from.

    Args:
        recipe: whose network, data and augmentation; of any epsilon schedule.
        run: its folder, whose last checkpoint, if there is one, is the trained network.
        batches: so many of the recipe's, the first that training sees.
        device: as of `robustkit.run`.

    Raises:
        UserError: the data are missing, or the checkpoint is damaged or of another recipe.
    """
    parts = load_parts(recipe, make_world(recipe, device))
    networks = {"untrained": parts.final}
    last = None if run is None else run / "checkpoints" / "last.safetensors"
    if last is not None and last.is_file():
        networks["untrained"] = deepcopy(parts.final)
        facts = restore(parts, last, weights_only=True)
        networks[f"after {facts['epoch']} of {recipe.epochs} epochs"] = parts.final
    return Calibration(
        classes=parts.world.classes,
        batches=batches,
        readings=tuple(
            Reading(name, mode, entropies(model, first_batches(parts, batches), mode))
            for name, model in networks.items()
            for mode in MODES
        ),
        recipe=_own(recipe),
    )


def _own(recipe: Recipe) -> tuple[float, float] | None:
    schedule = recipe.epsilon
    if not (isinstance(schedule, ECAS) and math.isfinite(schedule.h_low) and math.isfinite(schedule.h_high)):
        return None
    return schedule.h_low, schedule.h_high
