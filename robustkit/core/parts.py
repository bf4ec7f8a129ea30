"""All that is alive in a run: what it is built from, what it keeps, and how that is saved and restored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustkit.core.batch import Progress
from robustkit.core.device import has_fast_bfloat16, widest
from robustkit.core.errors import RecipeError
from robustkit.core.faults import Watch
from robustkit.core.model import RobustModel
from robustkit.core.order import Mixture, Shuffled
from robustkit.core.recipe import Precision, Recipe
from robustkit.core.spec import evolve
from robustkit.core.strategy import Record, build
from robustkit.core.world import World
from robustkit.data.ahead import Ahead
from robustkit.data.images import Data, Images, InMemory, resident
from robustkit.data.loader import validation_split
from robustkit.engine.folding import Folding, fold
from robustkit.engine.graphs import Graphs, graphs_for

RESIDENT_BYTES = 4 << 30
"""Training images of at most so many bytes live on the accelerator."""
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Modules whose parameters form a group of their own, which an optimiser may leave undecayed."""
TINY = 10e6
"""Floating-point operations of an image's forward below which a network is too small for bfloat16 to matter."""


class Totals:
    """Sums over the images of an epoch, kept on the device until somebody asks."""

    BINS = 129

    def __init__(self, epsilon: float, device: torch.device, steps: int = 0) -> None:
        self.unit = epsilon / 32  # of the histogram of radii: bin k counts radii near k * unit
        self.device, self.dtype = device, widest(device)
        self.sums: dict[str, Tensor] = {"images": self._zero()}
        self.radii = torch.zeros(self.BINS, dtype=self.dtype, device=device)
        self.gradients = torch.zeros(steps, device=device)  # the norm of each step's; 0: not made, or another's to say

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=self.device)

    def add(self, record: Record, objective: Tensor) -> None:
        """Adds a record, whose terms are means over its images."""
        count = len(record.batch.y)
        values: dict[str, Tensor | float] = {"images": float(count), "objective": objective.detach() * count}
        values |= {f"term {name}": term.detach() * count for name, term in record.terms.items()}
        for view, output in record.outputs.items():
            values[f"right {view}"] = (output.logits.argmax(dim=1) == record.batch.y).sum()
        values["epsilon"] = record.budget.epsilon.sum()
        if record.budget.adjusted is not None:
            values["radius raised"] = (record.budget.adjusted > 0).sum()
            values["radius lowered"] = (record.budget.adjusted < 0).sum()
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, self._zero()) + value
        low, high = -self.unit / 2, self.unit * (self.BINS - 0.5)
        radii = record.budget.epsilon.detach().float()
        self.radii += torch.histc(radii, self.BINS, low, high).to(self.dtype)

    def means(self) -> dict[str, float]:
        """Means per image, of this process's images."""
        images = max(1.0, float(self.sums["images"]))
        return {name: float(value) / images for name, value in self.sums.items() if name != "images"}

    def tensors(self) -> dict[str, Tensor]:
        return {**self.sums, "radii": self.radii, "gradients": self.gradients}

    def load(self, tensors: dict[str, Tensor]) -> None:
        moved = {name: tensor.to(self.dtype).to(self.device) for name, tensor in tensors.items()}
        self.radii = moved.pop("radii")
        self.gradients = moved.pop("gradients", self.gradients).float()  # older checkpoints have none
        self.sums = moved

    def summed(self, world: World) -> Totals:
        """The totals of all processes."""
        total = Totals(self.unit * 32, self.device)
        total.sums = {name: world.sum(self.sums[name].clone()) for name in sorted(self.sums)}
        total.radii = world.sum(self.radii.clone())
        total.gradients = world.sum(self.gradients.clone())
        return total


@attrs.define
class Parts:
    """All that is alive in a run: built from the recipe, saved as `tensors()`, restored by `load()`."""

    recipe: Recipe
    world: World
    data: Data
    train: Images
    rows: Tensor  # (n,) rows of the training set that are trained on
    own: int  # rows below are the data set's own, others synthetic
    sampling: Shuffled | Mixture  # which of them make an epoch
    validation_rows: Tensor  # (m,) rows held out
    model: RobustModel
    averaged: RobustModel | None
    optimizer: torch.optim.Optimizer
    strategies: dict[str, Any]  # field of the recipe -> runtime
    totals: Totals
    watch: Watch
    precision: Precision  # without "auto"
    folding: Folding | None = None  # of the model's backbone, for passes in eval mode
    graphs: Graphs | None = None  # recorded attacks
    step: int = 0  # optimiser steps done
    best: dict[str, Any] = attrs.field(factory=dict)  # epoch and score of the best one; collapse, rewind since
    skipped: list[int] = attrs.field(factory=list)  # steps, counted from 1, that were or will be passed over
    course: dict[str, Any] = attrs.field(factory=dict)  # what `core.leap` and `core.overfitting` remember

    @property
    def steps_per_epoch(self) -> int:
        return self.sampling.batches_per_epoch(self.recipe.batch_size)

    @property
    def own_rows(self) -> Tensor:
        """Those of `rows` that are no synthetic images."""
        return self.rows[self.rows < self.own]

    def order(self, epoch: int) -> Tensor:
        """The rows of an epoch, batch after batch: a function of (seed, epoch)."""
        return self.sampling.epoch_order(self.rows, self.recipe.batch_size, self.recipe.seed, epoch)

    @property
    def progress(self) -> Progress:
        return Progress.at(self.step, self.recipe.epochs, self.steps_per_epoch)

    @property
    def made(self) -> int:
        """Steps done that were not skipped."""
        return self.step - sum(number <= self.step for number in self.skipped)

    @property
    def collapsed(self) -> bool:
        """Whether training has ended because robustness collapsed."""
        return self.recipe.validation.ended_by(self.best)

    @property
    def finished(self) -> bool:
        """Whether training has come to its end."""
        return self.collapsed or self.step >= self.recipe.epochs * self.steps_per_epoch

    @property
    def final(self) -> RobustModel:
        """The weights that are validated, kept and evaluated."""
        return self.model if self.averaged is None else self.averaged

    @property
    def path(self) -> str:
        """How images are forwarded in training, in words."""
        folded = 0 if self.folding is None else self.folding.folded
        recorded = "" if self.graphs is None else self.graphs.path
        return (
            f"attack {self.precision.attack}, outer pass {self.precision.outer}, channels-last, "
            f"{folded} batch normalisations folded in eval mode{recorded and ', ' + recorded}"
        )

    def new_totals(self) -> Totals:
        return Totals(self.recipe.threat.epsilon, self.world.device, self.steps_per_epoch)

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
        totals = self.totals.summed(self.world)
        return self._state() | {f"totals.{name}": tensor for name, tensor in totals.tensors().items()}

    def copied(self) -> dict[str, Tensor]:
        """A copy of this process's own state, for `put_back`."""
        totals = {f"totals.{name}": tensor for name, tensor in self.totals.tensors().items()}
        return {name: tensor.clone() for name, tensor in (self._state() | totals).items()}

    def _state(self) -> dict[str, Tensor]:
        """Of modules and the optimiser: the same in every process."""
        state: dict[str, Tensor] = {}
        for name, module in self.modules().items():
            state |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
        for name, parameter in self._trained().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    state[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
        return state

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `tensors()` gave, in place."""
        if self.world.rank > 0:  # totals are sums over all processes: one goes on with them, the others from zero
            zeros = {k: torch.zeros_like(t) for k, t in tensors.items() if k.startswith("totals.")}
            tensors = tensors | zeros
        self.put_back(tensors)

    def put_back(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `copied()` gave, in place."""
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
        self.totals.load({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})

    def rewind(self, tensors: dict[str, Tensor]) -> None:
        """Weights, their average and the optimiser's state as `tensors()` gave them; all else stays.

        Weights are those of networks trained beside the model, too.
        """
        beside = [f"strategies.{name}." for name in companions(self.strategies)]
        names = ("model.", "average.", "optimizer.", *beside)
        self.load(self.tensors() | {key: tensor for key, tensor in tensors.items() if key.startswith(names)})

    def names(self) -> dict[nn.Parameter, str]:
        """What the parameters that are trained are called."""
        return {parameter: name for name, parameter in self._trained().items()}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{key}": p
            for name, module in self.modules().items()
            if name != "average"
            for key, p in module.named_parameters()
        }


def assemble(recipe: Recipe, data: Data, world: World) -> Parts:
    """Build a run from its recipe: every weight, perturbation and memory, a function of the recipe's seed."""
    train_rows, validation_rows = validation_split(data.own, recipe.validation.images)
    train_rows = torch.cat([train_rows, torch.arange(data.own, len(data.train))])
    if len(train_rows) < recipe.batch_size:
        raise RecipeError(
            f"batches of {recipe.batch_size} are more than the {len(train_rows)} training images",
            place="batch_size",
            remedy=f"at most {len(train_rows)}",
        )
    sampling = data.mixture or Shuffled(len(train_rows))
    smallest = sampling.smallest_batch(recipe.batch_size)
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
    return Parts(
        recipe=recipe,
        world=world,
        data=data,
        train=_at_hand(data.train, world.device),
        rows=train_rows,
        own=data.own,
        sampling=sampling,
        validation_rows=validation_rows,
        model=model,
        averaged=deepcopy(model) if recipe.average is not None else None,
        optimizer=recipe.optimizer.build(parameter_groups(recipe, model, strategies)),
        strategies=strategies,
        totals=Totals(recipe.threat.epsilon, world.device, sampling.batches_per_epoch(recipe.batch_size)),
        watch=Watch(world.device, at_once=recipe.health.on_fault == "skip"),
        precision=_settled(recipe.precision, model, world),
        folding=fold_backbone(model, world),
        graphs=graphs_for(world.device),
    )


def parameter_groups(recipe: Recipe, model: RobustModel, strategies: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the optimiser is built from: the parameters of backbone and companion networks, their norms', the head's.

    A strategy that trains its parameters itself (`trains_itself`) keeps them.
    """
    bodies = nn.ModuleList([model.backbone, *companions(strategies).values()])
    norms = {id(p): p for m in bodies.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in bodies.parameters() if id(p) not in norms]},
        {"params": list(norms.values()), "norm": True},
        {"params": list(model.head.parameters()), **recipe.head.parameter_options()},
    ]
    return [group for group in groups if group["params"]]


def companions(strategies: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Strategies with parameters that the recipe's optimiser trains, by field of the recipe."""
    modules = {name: part for name, part in strategies.items() if isinstance(part, nn.Module)}
    return {
        name: module
        for name, module in modules.items()
        if not getattr(module, "trains_itself", False) and next(module.parameters(), None) is not None
    }


def _settled(precision: Precision, model: RobustModel, world: World) -> Precision:
    """What "auto" means for this model here: in all processes what it means in the first."""
    if "auto" not in (precision.attack, precision.outer):
        return precision
    fast = has_fast_bfloat16(world.device) and forward_operations(model, world) >= TINY
    chosen = world.share("bf16" if fast else "fp32")
    attack, outer = (chosen if value == "auto" else value for value in (precision.attack, precision.outer))
    return evolve(precision, attack=attack, outer=outer)


def forward_operations(model: RobustModel, world: World) -> float:
    """Floating-point operations of one image's forward; a multiplication and an addition count as two."""
    image = torch.zeros(1, *world.image_shape, device=world.device)
    with model.using("eval"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return float(counter.get_total_flops())


def fold_backbone(model: RobustModel, world: World) -> Folding | None:
    """The folding of the model's backbone, tried on a picture that depends on nothing."""
    channels, height, width = world.image_shape
    probe = torch.linspace(0, 1, 2 * channels * height * width, device=world.device)
    with model.using("eval"):
        return fold(model.backbone, probe.view(2, channels, height, width))


def _at_hand(images: Images, device: torch.device) -> Images:
    """Images that fit live on an accelerator, where batches are cut out and augmented; others are fetched ahead."""
    if device.type != "cpu" and len(images) * math.prod(images.shape) <= RESIDENT_BYTES:
        return resident(images, device)
    if device.type == "cpu" and isinstance(images, InMemory):
        return images
    return Ahead(images, pin=device.type == "cuda")
