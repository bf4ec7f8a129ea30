"""All that is alive in a run: what it is built from, what it keeps, and how that is saved and restored."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from robustkit.core.batch import Progress
from robustkit.core.errors import RecipeError
from robustkit.core.model import RobustModel
from robustkit.core.order import batches_per_epoch
from robustkit.core.recipe import Recipe
from robustkit.core.strategy import Record, build
from robustkit.core.world import World
from robustkit.data.images import Data, Images, InMemory
from robustkit.data.loader import validation_split
from robustkit.engine.folding import Folding, fold

RESIDENT_BYTES = 4 << 30
"""Training images of at most so many bytes live on the accelerator."""


class Totals:
    """Sums over the images of an epoch, kept on the device until somebody asks."""

    BINS = 129

    def __init__(self, epsilon: float, device: torch.device) -> None:
        self.unit = epsilon / 32  # of the histogram of radii: bin k counts radii near k * unit
        self.device = device
        self.sums: dict[str, Tensor] = {"images": self._zero()}
        self.radii = torch.zeros(self.BINS, dtype=torch.float64, device=device)

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def add(self, record: Record, objective: Tensor) -> None:
        """Adds a record, whose terms are means over its images."""
        count = len(record.batch.y)
        values: dict[str, Tensor | float] = {"images": float(count), "objective": objective.detach() * count}
        values |= {f"term {name}": term.detach() * count for name, term in record.terms.items()}
        for view, output in record.outputs.items():
            values[f"right {view}"] = (output.logits.argmax(dim=1) == record.batch.y).sum()
        values["epsilon"] = record.budget.epsilon.sum()
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, self._zero()) + value
        low, high = -self.unit / 2, self.unit * (self.BINS - 0.5)
        radii = record.budget.epsilon.detach().float()
        self.radii += torch.histc(radii, self.BINS, low, high).to(torch.float64)

    def means(self) -> dict[str, float]:
        """Means per image, of this process's images."""
        images = max(1.0, float(self.sums["images"]))
        return {name: float(value) / images for name, value in self.sums.items() if name != "images"}

    def tensors(self) -> dict[str, Tensor]:
        return {**self.sums, "radii": self.radii}

    def load(self, tensors: dict[str, Tensor]) -> None:
        moved = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self.radii = moved.pop("radii")
        self.sums = moved

    def summed(self, world: World) -> Totals:
        """The totals of all processes."""
        total = Totals(self.unit * 32, self.device)
        total.sums = {name: world.sum(self.sums[name].clone()) for name in sorted(self.sums)}
        total.radii = world.sum(self.radii.clone())
        return total


@attrs.define
class Parts:
    """All that is alive in a run: built from the recipe, saved as `tensors()`, restored by `load()`."""

    recipe: Recipe
    world: World
    data: Data
    train: Images
    rows: Tensor  # (n,) rows of the training set that are trained on
    validation_rows: Tensor  # (m,) rows held out
    model: RobustModel
    averaged: RobustModel | None
    optimizer: torch.optim.Optimizer
    strategies: dict[str, Any]  # field of the recipe -> runtime
    totals: Totals
    folding: Folding | None = None  # of the model's backbone, for passes in eval mode
    step: int = 0  # optimiser steps done
    best: dict[str, Any] = attrs.field(factory=dict)  # epoch and accuracy of the best checkpoint

    @property
    def steps_per_epoch(self) -> int:
        return batches_per_epoch(len(self.rows), self.recipe.batch_size)

    @property
    def progress(self) -> Progress:
        return Progress.at(self.step, self.recipe.epochs, self.steps_per_epoch)

    @property
    def final(self) -> RobustModel:
        """The weights that are validated, kept and evaluated."""
        return self.model if self.averaged is None else self.averaged

    def new_totals(self) -> Totals:
        return Totals(self.recipe.threat.epsilon, self.world.device)

    def modules(self) -> dict[str, nn.Module]:
        """Everything with state, under the name that its tensors have in a checkpoint."""
        found: dict[str, nn.Module] = {"model": self.model}
        if self.averaged is not None:
            found["average"] = self.averaged
        for name, part in self.strategies.items():
            if isinstance(part, nn.Module):
                found[f"strategies.{name}"] = part
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The whole state of all processes, flat: every process must ask for it, one may write it."""
        state: dict[str, Tensor] = {}
        for name, module in self.modules().items():
            state |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
        for name, parameter in self._trained().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    state[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
        totals = self.totals.summed(self.world)
        return state | {f"totals.{name}": tensor for name, tensor in totals.tensors().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `tensors()` gave, in place."""
        for name, module in self.modules().items():
            prefix = f"{name}."
            module.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
        self.optimizer.state.clear()
        trained = self._trained()
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                name, _, entry = key.removeprefix("optimizer.").rpartition(".")
                parameter = trained[name]
                if tensor.shape == parameter.shape:  # in the parameter's own layout, or sums round differently
                    tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
                self.optimizer.state[parameter][entry] = tensor
        prefix = "totals."
        totals = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        if self.world.rank > 0:  # they are sums over all processes: one goes on with them, the others from zero
            totals = {name: torch.zeros_like(total) for name, total in totals.items()}
        self.totals.load(totals)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{key}": p
            for name, module in self.modules().items()
            if name != "average"
            for key, p in module.named_parameters()
        }


def assemble(recipe: Recipe, data: Data, world: World) -> Parts:
    """Build a run from its recipe: every weight, perturbation and memory, a function of the recipe's seed."""
    train_rows, validation_rows = validation_split(len(data.train), recipe.validation.images)
    if len(train_rows) < recipe.batch_size:
        raise RecipeError(
            f"batches of {recipe.batch_size} are more than the {len(train_rows)} training images",
            place="batch_size",
            remedy=f"at most {len(train_rows)}",
        )
    steps = batches_per_epoch(len(train_rows), recipe.batch_size)
    smallest = min(recipe.batch_size, len(train_rows) - (steps - 1) * recipe.batch_size)
    if world.size > smallest:
        raise RecipeError(
            f"the smallest batch has {smallest} images for {world.size} processes",
            place="batch_size",
            remedy=f"use at most {smallest} processes, or another batch_size",
        )
    world = attrs.evolve(world, training=len(train_rows))
    model = recipe.model.build(recipe.head, world.classes, world.image_shape, recipe.seed)
    model = model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    fields = ("epsilon", "attack", "target", "loss", "weights")
    strategies = {name: build(getattr(recipe, name), world) for name in fields}
    for name, part in strategies.items():
        if isinstance(part, nn.Module):
            strategies[name] = part.to(world.device)
    companions = [p for part in strategies.values() if isinstance(part, nn.Module) for p in part.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [*model.backbone.parameters(), *companions]},
        {"params": list(model.head.parameters()), **recipe.head.parameter_options()},
    ]
    return Parts(
        recipe=recipe,
        world=world,
        data=data,
        train=_near(data.train, world.device),
        rows=train_rows,
        validation_rows=validation_rows,
        model=model,
        averaged=deepcopy(model) if recipe.average is not None else None,
        optimizer=recipe.optimizer.build([group for group in groups if group["params"]]),
        strategies=strategies,
        totals=Totals(recipe.threat.epsilon, world.device),
        folding=fold_backbone(model, world),
    )


def fold_backbone(model: RobustModel, world: World) -> Folding | None:
    """The folding of the model's backbone, tried on a picture that depends on nothing."""
    channels, height, width = world.image_shape
    probe = torch.linspace(0, 1, 2 * channels * height * width, device=world.device)
    with model.using("eval"):
        return fold(model.backbone, probe.view(2, channels, height, width))


def _near(images: Images, device: torch.device) -> Images:
    """On an accelerator, images that fit in memory live there: batches are then cut out and augmented in place."""
    if device.type == "cpu" or not isinstance(images, InMemory) or images.pixels.numel() > RESIDENT_BYTES:
        return images
    return images.to(device)
