"""Training, on one page: look outward, one pure pass, step, look back; after an epoch, measure and keep.

There are no hooks and no subclassed trainers. What a method needs it gets through the contracts of `core.strategy`,
at four places: `prepare` before the pass, the pass itself (which may run twice), the parameters that are trained, and
`observe` after the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, NamedTuple, Protocol

import attrs
import torch
from torch import Tensor, nn

from robustkit.core.batch import Batch, Budget, Mode, Output, Part, Passes, Prepared, Progress
from robustkit.core.errors import RecipeError
from robustkit.core.model import RobustModel
from robustkit.core.order import batches_per_epoch, epoch_order, micro_parts
from robustkit.core.recipe import Recipe
from robustkit.core.rng import derive, whole
from robustkit.core.strategy import Attack, Record, Scene, build
from robustkit.core.world import World
from robustkit.data.images import Data, Images, InMemory
from robustkit.data.loader import make_batch, validation_split
from robustkit.engine import GlobalStatistics, Predictor, autocast, float_output

RESIDENT_BYTES = 4 << 30
"""Training images of at most so many bytes live on the accelerator."""


class Failure(Exception):
    """Training went wrong: the numbers, not the user's words. Exit code 1."""


class Display(Protocol):
    """Who watches. Reading `totals.means()` waits for the device, so look seldom."""

    def step(self, progress: Progress, totals: Totals) -> None: ...

    def epoch(self, report: dict[str, Any]) -> None: ...


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
    )


def _near(images: Images, device: torch.device) -> Images:
    """On an accelerator, images that fit in memory live there: batches are then cut out and augmented in place."""
    if device.type == "cpu" or not isinstance(images, InMemory) or images.pixels.numel() > RESIDENT_BYTES:
        return images
    return images.to(device)


class Pass(NamedTuple):
    """What one pure pass gives."""

    outputs: dict[str, Output]
    target: Tensor | None
    terms: dict[str, Tensor]
    objective: Tensor


def train_step(parts: Parts, rows: Tensor) -> None:
    """One optimiser step on the images in `rows` (the global batch), of which this process works through its part."""
    recipe, world, progress = parts.recipe, parts.world, parts.progress
    rates = recipe.schedule(progress)
    for group in parts.optimizer.param_groups:
        group["lr"] = recipe.optimizer.lr * rates.lr_scale * group.get("lr_scale", 1.0)
        if rates.momentum is not None:
            group["momentum"] = rates.momentum
    parts.optimizer.zero_grad()
    parts.model.train()
    pieces = micro_parts(len(rows), world.rank, world.size, recipe.accumulate)
    with GlobalStatistics() if world.size > 1 else nullcontext():
        for part in pieces:
            _work_through(parts, rows[part.start : part.stop], part, progress, last=part is pieces[-1])
    parts.step += 1
    if parts.averaged is not None and recipe.average is not None:
        share = 1 - recipe.average.decay(parts.step, progress.total_steps)
        with torch.no_grad():
            torch._foreach_lerp_(list(parts.averaged.parameters()), list(parts.model.parameters()), share)


def _work_through(parts: Parts, rows: Tensor, part: Part, progress: Progress, *, last: bool) -> None:
    recipe, world, model = parts.recipe, parts.world, parts.model
    epsilon, attack, target, loss, weights = (
        parts.strategies[name] for name in ("epsilon", "attack", "target", "loss", "weights")
    )
    augmenting = world.generator("augmentation", progress, part)
    batch = make_batch(
        parts.train, rows, device=world.device, augmentation=recipe.data.augmentation, generator=augmenting
    )
    predict = Predictor(model, world.device, recipe.precision.attack)

    # 1. Look outward: nothing here changes a weight; statistics move only in a pass whose mode is "train".
    _seed_torch(world, progress, part, "outward")
    if hasattr(attack, "at"):
        attack = attack.at(progress)
    scene = Scene(predict, batch, progress, recipe.threat, attack, world, part)
    budget: Budget = epsilon(scene)
    x_adv = batch.x
    if attack is not None:
        x_adv = attack(predict, batch.x, batch.y, budget, recipe.threat, scene.generator("attack"))
    images = None if target is None else target.prepare(scene, budget, x_adv)
    prepared: Prepared = loss.prepare(scene, budget, x_adv)
    constant: Tensor | None = None
    if target is not None and (loss.detach_target or images is None):
        output = None
        if images is not None:
            outer = Predictor(model, world.device, recipe.precision.outer)
            with torch.no_grad(), outer.using(target.mode) as forward:
                output = forward(images)
        with torch.no_grad():
            constant = target(output, batch, progress)

    # 2. One pure pass. A weight perturbation may run it once more to probe, with statistics left alone.
    def pure_pass(mode: Mode) -> Pass:
        _seed_torch(world, progress, part, "pass")
        distribution = constant
        if images is not None and distribution is None:
            probing = mode == "train-frozen" and target.mode == "train"
            with model.using("train-frozen" if probing else target.mode):
                distribution = target(_forward(parts, images, None), batch, progress)
        with model.using(mode):
            outputs = _forward_views(parts, prepared, batch)
        terms = loss(outputs, distribution, batch, prepared.extras, progress)
        weight = recipe.head.penalty_weight(progress)
        if weight:
            terms = terms | {"penalty": weight * _penalty(outputs, prepared)}
        return Pass(outputs, distribution, terms, torch.stack(list(terms.values())).sum())

    share = len(batch.y) / part.total  # means over a piece become a mean over the global batch

    def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
        with torch.enable_grad():  # whatever the caller is in
            objective = pure_pass("train-frozen").objective * share
            found = list(torch.autograd.grad(objective, parameters, allow_unused=True, materialize_grads=True))
        world.sum_all(found)
        return found

    # 3. Step, possibly from displaced weights.
    with weights.displaced(model, gradients, progress):
        done = pure_pass("train")
        (done.objective * share).backward()  # type: ignore[no-untyped-call]
        if last:
            trained = [p for group in parts.optimizer.param_groups for p in group["params"]]
            world.sum_all(p.grad for p in trained if p.grad is not None)
            parts.optimizer.step()

    # 4. Look back.
    outputs = {name: Output(*(value.detach() for value in output)) for name, output in done.outputs.items()}
    kept = None if done.target is None else done.target.detach()
    record = Record(batch, progress, budget, x_adv, outputs, kept, {n: t.detach() for n, t in done.terms.items()})
    with torch.no_grad():
        for strategy in (epsilon, attack, target, loss):
            if hasattr(strategy, "observe"):
                strategy.observe(record)
        parts.totals.add(record, done.objective)


def _forward(parts: Parts, images: Tensor, y: Tensor | None) -> Output:
    with autocast(parts.world.device, parts.recipe.precision.outer):
        return float_output(parts.model(images.contiguous(memory_format=torch.channels_last), y))


def _forward_views(parts: Parts, prepared: Prepared, batch: Batch) -> dict[str, Output]:
    """Each distinct view once, one after the other or all in one batch."""
    distinct = list({id(images): images for images in prepared.views.values()}.values())
    if prepared.joint and len(distinct) > 1:
        joined = _forward(parts, torch.cat(distinct), batch.y.repeat(len(distinct)))
        pieces = zip(*(value.chunk(len(distinct)) for value in joined), strict=True)
        outputs = [Output(*piece) for piece in pieces]
    else:
        outputs = [_forward(parts, images, batch.y) for images in distinct]
    by_identity = {id(images): output for images, output in zip(distinct, outputs, strict=True)}
    return {name: by_identity[id(images)] for name, images in prepared.views.items()}


def _penalty(outputs: dict[str, Output], prepared: Prepared) -> Tensor:
    shares = prepared.shares or {name: 1 / len(outputs) for name in outputs}
    return torch.stack([shares[name] * output.penalty.mean() for name, output in outputs.items()]).sum()


def _seed_torch(world: World, progress: Progress, part: Part, purpose: str) -> None:
    """Dropout and its kin draw from torch's global generator: give it a place in the counters, too."""
    torch.manual_seed(derive(world.seed, "torch", purpose, progress.epoch, progress.step, part.start))


def train(
    parts: Parts,
    *,
    display: Display,
    save: Callable[[str], None],
    record: Callable[[dict[str, Any]], None],
    should_stop: Callable[[Parts], bool],
    should_save: Callable[[], bool],
) -> bool:
    """Train from where `parts` stands to the end; false if stopped before.

    Args:
        save: writes a checkpoint of that name ("last", "best").
        record: appends an epoch's report to the metrics.
        should_stop, should_save: asked after each step; a stop saves first.
    """
    recipe, world = parts.recipe, parts.world
    order = torch.empty(0, dtype=torch.int64)
    loaded = -1
    began, first = time.perf_counter(), parts.step
    while parts.step < recipe.epochs * parts.steps_per_epoch:
        progress = parts.progress
        if progress.epoch != loaded:
            order, loaded = epoch_order(parts.rows, recipe.seed, progress.epoch), progress.epoch
        position = progress.step % parts.steps_per_epoch
        train_step(parts, order[position * recipe.batch_size : (position + 1) * recipe.batch_size])
        display.step(progress, parts.totals)
        stop = world.any(should_stop(parts))
        if parts.step % parts.steps_per_epoch == 0:
            report = finish_epoch(parts, progress)
            seconds = time.perf_counter() - began
            report |= {"seconds": seconds, "images_per_second": (parts.step - first) * recipe.batch_size / seconds}
            began, first = time.perf_counter(), parts.step
            if report.pop("is best", False):
                save("best")
            record(report)
            display.epoch(report)
            save("last")
        elif stop or world.any(should_save()):
            save("last")
        if stop:
            return parts.step >= recipe.epochs * parts.steps_per_epoch
    return True


def finish_epoch(parts: Parts, progress: Progress) -> dict[str, Any]:
    """The epoch's report: what training saw, and accuracies on held-out and on training images."""
    recipe, world = parts.recipe, parts.world
    totals = parts.totals.summed(world)
    means = totals.means()
    parts.totals = parts.new_totals()
    if not all(math.isfinite(value) for value in means.values()):
        raise Failure(f"the objective is not a finite number in epoch {progress.epoch + 1}: lower optimizer.lr")
    if parts.averaged is not None:
        for kept, current in zip(parts.averaged.buffers(), parts.model.buffers(), strict=True):
            kept.copy_(current)
    report: dict[str, Any] = {
        "epoch": progress.epoch + 1,
        "step": parts.step,
        "lr": parts.optimizer.param_groups[0]["lr"],
        "train": means,
        "radii": {"unit": totals.unit, "counts": [int(count) for count in totals.radii.tolist()]},
    }
    final = progress.epoch + 1 == recipe.epochs
    if len(parts.validation_rows) and (final or (progress.epoch + 1) % recipe.validation.every == 0):
        settings = recipe.validation
        held_out = measure(parts, parts.validation_rows, settings.attack)
        report["validation"] = held_out
        sample = epoch_order(parts.rows, 0, -1)[: settings.train_images]  # the same in every epoch and run
        if len(sample):
            report["training"] = measure(parts, sample, settings.attack)
        # Robust accuracy decides (natural accuracy where nothing is attacked), the other breaks ties, then the later.
        score = [held_out.get("robust", 0.0), held_out["natural"]]
        if recipe.attack is None:
            score.reverse()
        if score >= parts.best.get("score", [-1.0, -1.0]):
            parts.best = {"epoch": progress.epoch + 1, "score": score}
            report["is best"] = True
    return report


def measure(parts: Parts, rows: Tensor, attack: Attack | None) -> dict[str, float]:
    """Natural and robust accuracy on training-set rows, without augmentation: shares of all rows, on every process."""
    recipe, world = parts.recipe, parts.world
    predict = Predictor(parts.final, world.device, recipe.precision.attack)
    right = torch.zeros(2, dtype=torch.float64, device=world.device)
    for number, piece in _pieces(rows, recipe.batch_size):
        if number % world.size != world.rank:
            continue
        batch = make_batch(parts.train, piece, device=world.device, augmentation=None, generator=None)
        with torch.no_grad(), predict.using("eval") as forward:
            right[0] += (forward(batch.x).logits.argmax(dim=1) == batch.y).sum()
            if attack is not None:
                budget = Budget(batch.x.new_full((len(piece),), recipe.threat.epsilon))
                generator = whole(batch.x, recipe.seed, "validation", number)
                x_adv = attack(predict, batch.x, batch.y, budget, recipe.threat, generator)
                right[1] += (forward(x_adv).logits.argmax(dim=1) == batch.y).sum()
    natural, robust = (world.sum(right) / len(rows)).tolist()
    return {"natural": natural} if attack is None else {"natural": natural, "robust": robust}


def _pieces(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    yield from enumerate(torch.split(rows, size))


def step_passes(recipe: Recipe, progress: Progress) -> Passes:
    """All passes of one step."""
    return sum(recipe.passes(progress).values(), Passes())
