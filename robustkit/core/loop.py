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
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from robustkit.core.batch import Batch, Budget, Mode, Output, Part, Passes, Prepared, Progress
from robustkit.core.collapse import Seen, collapsed
from robustkit.core.faults import Evidence, Fault, Piece, Report, Size, describe
from robustkit.core.leap import lengths
from robustkit.core.model import RobustModel
from robustkit.core.order import epoch_order, micro_parts
from robustkit.core.overfitting import overfitting
from robustkit.core.parts import Parts, Totals, fold_backbone, parameter_groups
from robustkit.core.recipe import Recipe
from robustkit.core.registry import registry
from robustkit.core.rng import derive, whole
from robustkit.core.strategy import Attack, LossRuntime, Record, Scene
from robustkit.core.world import Poll, World
from robustkit.data.ahead import Ahead
from robustkit.data.loader import make_batch
from robustkit.engine import GlobalStatistics, Predictor
from robustkit.functional import is_right


class Failure(Exception):
    """Training went wrong: the numbers, not the user's words. Exit code 1."""


class Display(Protocol):
    """Who watches. Reading `totals.means()` waits for the device, so look seldom."""

    def step(self, progress: Progress, totals: Totals) -> None: ...

    def epoch(self, report: dict[str, Any]) -> None: ...

    def say(self, text: str) -> None: ...


class Outlook(NamedTuple):
    """What the pure pass is made on, decided once before it."""

    prepared: Prepared
    images: Tensor | None  # that the target is read from
    target: Tensor | None  # where it is a constant of the pass


class Pass(NamedTuple):
    """What one pure pass gives."""

    outputs: dict[str, Output]
    target: Tensor | None
    terms: dict[str, Tensor]
    objective: Tensor


def train_step(parts: Parts, rows: Tensor) -> None:
    """One optimiser step on the images in `rows` (the global batch), of which this process works through its part.

    Raises:
        Fault: its objective or gradient is not a finite number, or on a GPU that of the step before was not.
    """
    recipe, world, progress = parts.recipe, parts.world, parts.progress
    _set_rates(parts.optimizer, recipe, progress)
    parts.optimizer.zero_grad()
    parts.model.train()
    pieces = micro_parts(len(rows), world.rank, world.size, recipe.accumulate)
    adopting = parts.model.adopting(recipe.model.adopt_first_batch and parts.made == 0)
    done: list[Piece] = []
    size = None
    with adopting, GlobalStatistics() if world.size > 1 else nullcontext():
        for part in pieces:
            earlier = [piece.objective for piece in done]
            images = rows[part.start : part.stop]
            piece, size = _work_through(parts, images, part, progress, earlier, last=part is pieces[-1])
            done.append(piece)
    assert size is not None
    if world.rank == 0:  # the same in every process
        parts.totals.gradients[progress.step % parts.steps_per_epoch] = size.norm
    parts.step += 1
    if parts.averaged is not None and recipe.average is not None:
        share = 1 - recipe.average.decay(parts.step, progress.total_steps)
        with torch.no_grad():
            torch._foreach_lerp_(list(parts.averaged.parameters()), list(parts.model.parameters()), share)
    parts.watch.see(Evidence(progress, parts.optimizer.param_groups[0]["lr"], done, size))


def _set_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, progress: Progress) -> None:
    rates = recipe.schedule(progress)
    for group in optimizer.param_groups:
        group["lr"] = recipe.optimizer.lr * rates.lr_scale * group.get("lr_scale", 1.0)
        if rates.momentum is not None:
            group["momentum"] = rates.momentum


def _work_through(
    parts: Parts, rows: Tensor, part: Part, progress: Progress, earlier: list[Tensor], *, last: bool
) -> tuple[Piece, Size | None]:
    recipe, world, model = parts.recipe, parts.world, parts.model
    epsilon, attack, target, loss = (parts.strategies[name] for name in ("epsilon", "attack", "target", "loss"))
    augmenting = world.generator("augmentation", progress, part)
    batch = make_batch(
        parts.train, rows, device=world.device, augmentation=recipe.data.augmentation, generator=augmenting
    )
    predict = Predictor(model, world.device, parts.precision.attack, parts.folding, parts.graphs)

    # 1. Look outward: nothing here changes a weight; statistics move only in a pass whose mode is "train".
    _seed_torch(world, progress, part, "outward")
    if hasattr(attack, "at"):
        attack = attack.at(progress)
    scene = Scene(predict, batch, progress, recipe.threat, attack, world, part, partial(_rehearse, parts))
    budget: Budget = epsilon(scene)
    x_adv = batch.x
    if attack is not None:
        x_adv = attack(predict, batch.x, batch.y, budget, recipe.threat, scene.generator("attack"))
    outlook = _look(parts, model, loss, scene, budget, x_adv)

    # 2. One pure pass. 3. Step, possibly from displaced weights.
    done, size = _step(parts, model, parts.optimizer if last else None, loss, scene, outlook, earlier)

    # 4. Look back.
    outputs = {name: Output(*(value.detach() for value in output)) for name, output in done.outputs.items()}
    kept = None if done.target is None else done.target.detach()
    record = Record(batch, progress, budget, x_adv, outputs, kept, {n: t.detach() for n, t in done.terms.items()})
    with torch.no_grad():
        for strategy in (epsilon, attack, target, loss):
            if hasattr(strategy, "observe"):
                strategy.observe(record)
        parts.totals.add(record, done.objective)
        logits = {name: output.logits for name, output in outputs.items()}
        objective = _share(part, batch) * done.objective.detach()
        return Piece(part, batch, x_adv, budget.epsilon, logits, record.terms, objective), size


def _look(
    parts: Parts,
    model: RobustModel,
    loss: LossRuntime,
    scene: Scene,
    budget: Budget,
    x_adv: Tensor,
    *,
    advance: bool = True,
) -> Outlook:
    """What target and loss prepare; `advance`: whether the target's own state may move."""
    target = parts.strategies["target"]
    images = None if target is None else target.prepare(scene, budget, x_adv, advance=advance)
    prepared = loss.prepare(scene, budget, x_adv)
    if target is None or not (parts.recipe.loss.detach_target or images is None):
        return Outlook(prepared, images, None)
    output = None
    if images is not None:
        folding = parts.folding if model is parts.model else None
        outer = Predictor(model, parts.world.device, parts.precision.outer, folding)
        with torch.no_grad(), outer.using(target.mode) as forward:
            output = forward(images)
    with torch.no_grad():
        return Outlook(prepared, images, target(output, scene.batch, scene.progress))


def _pure_pass(parts: Parts, model: RobustModel, loss: LossRuntime, scene: Scene, outlook: Outlook, mode: Mode) -> Pass:
    """A function of the weights. A weight perturbation may run it once more to probe, with statistics left alone."""
    target, batch, progress = parts.strategies["target"], scene.batch, scene.progress
    _seed_torch(parts.world, progress, scene.part, "pass")
    distribution = outlook.target
    if outlook.images is not None and distribution is None:
        probing = mode == "train-frozen" and target.mode == "train"
        with model.using("train-frozen" if probing else target.mode):
            distribution = target(_forward(parts, model, outlook.images, None), batch, progress)
    outputs = _forward_views(parts, model, outlook.prepared, batch, mode)
    terms = loss(outputs, distribution, batch, outlook.prepared.extras, progress)
    weight = parts.recipe.head.penalty_weight(progress)
    if weight:
        terms = terms | {"penalty": weight * _penalty(outputs, outlook.prepared)}
    return Pass(outputs, distribution, terms, torch.stack(list(terms.values())).sum())


def _step(
    parts: Parts,
    model: RobustModel,
    optimizer: torch.optim.Optimizer | None,
    loss: LossRuntime,
    scene: Scene,
    outlook: Outlook,
    earlier: Sequence[Tensor] = (),
) -> tuple[Pass, Size | None]:
    """One pure pass, its gradients, and the optimiser's step (None: not yet), possibly from displaced weights.

    `earlier` are the objectives of the batch's pieces before. Returns what the pass gave, and how large the step was.
    """
    world, size = parts.world, None
    share = _share(scene.part, scene.batch)

    def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
        with torch.enable_grad():  # whatever the caller is in
            objective = _pure_pass(parts, model, loss, scene, outlook, "train-frozen").objective * share
            found = list(torch.autograd.grad(objective, parameters, allow_unused=True, materialize_grads=True))
        world.sum_all(found)
        return found

    with parts.strategies["weights"].displaced(model, gradients, scene.progress):
        done = _pure_pass(parts, model, loss, scene, outlook, "train")
        objective = done.objective * share
        objective.backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            total = torch.stack([*earlier, objective.detach()]).sum()
            world.sum_all([*(p.grad for p in trained), total])
            size = _measured(trained, total, getattr(parts.recipe.optimizer, "clip_norm", None))
            optimizer.step()
    return done, size


def _share(part: Part, batch: Batch) -> float:
    """With it, means over a piece become a mean over the global batch."""
    return len(batch.y) / part.total


def _measured(trained: list[Tensor], objective: Tensor, clip_norm: float | None) -> Size:
    """How large the step is, whose gradients are shortened to `clip_norm`; nothing here waits for the device."""
    gradients = [p.grad for p in trained if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    norm = torch.linalg.vector_norm(norms)
    if clip_norm is not None:
        torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp_max(1))  # as torch's clip_grad_norm_
    return Size(objective, norm, norms, trained)


def _rehearse(parts: Parts, scene: Scene, budget: Budget, x_adv: Tensor, loss: LossRuntime | None) -> Predictor:
    """What `Scene.rehearse` promises."""
    model, loss = deepcopy(parts.model), deepcopy(loss or parts.strategies["loss"])
    model.zero_grad()
    optimizer = parts.recipe.optimizer.build(parameter_groups(parts.recipe, model, {"loss": loss}))
    _set_rates(optimizer, parts.recipe, scene.progress)
    with torch.enable_grad():
        outlook = _look(parts, model, loss, scene, budget, x_adv, advance=False)
        _step(parts, model, optimizer, loss, scene, outlook)
    model.zero_grad()
    return Predictor(model, parts.world.device, parts.precision.attack)


def _forward(parts: Parts, model: RobustModel, images: Tensor, y: Tensor | None) -> Output:
    precision = "fp32" if images.requires_grad else parts.precision.outer  # a gradient is part of the loss: exactly
    return Predictor(model, parts.world.device, precision)(images, y)


def _forward_views(parts: Parts, model: RobustModel, prepared: Prepared, batch: Batch, mode: Mode) -> dict[str, Output]:
    """Each distinct view of each network once, one after the other or all in one batch."""
    outputs: dict[str, Output] = {}
    for network in dict.fromkeys([model, *prepared.networks.values()]):
        views = {name: x for name, x in prepared.views.items() if prepared.networks.get(name, model) is network}
        distinct = list({id(images): images for images in views.values()}.values())
        if prepared.joint and len(distinct) > 1:
            with network.using(mode):
                joined = _forward(parts, network, torch.cat(distinct), batch.y.repeat(len(distinct)))
            pieces = zip(*(value.chunk(len(distinct)) for value in joined), strict=True)
            found = [Output(*piece) for piece in pieces]
        else:
            tracked = {id(images) for name, images in views.items() if name not in prepared.untracked}
            found = []
            for images in distinct:
                with network.using(mode if id(images) in tracked else "train-frozen"):
                    found.append(_forward(parts, network, images, batch.y))
        by_identity = {id(images): output for images, output in zip(distinct, found, strict=True)}
        outputs |= {name: by_identity[id(images)] for name, images in views.items()}
    return outputs


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
    rewind: Callable[[str], None],
    go_back: Callable[[], None],
    set_aside: Callable[[Report], Path],
    record: Callable[[dict[str, Any]], None],
    should_stop: Callable[[], bool],
    should_save: Callable[[], bool],
    until: int | None = None,
) -> bool:
    """Train from where `parts` stands to the end, or to a collapse that is to end it; false if stopped before.

    Args:
        save: writes a checkpoint of that name ("last", "best", "kept", "before-...").
        rewind: takes weights and the optimiser's state, and nothing else, from the checkpoint of that name.
        go_back: takes everything from the checkpoint "last".
        set_aside: keeps what is known of a fault, and says where.
        record: appends an epoch's report to the metrics.
        should_stop, should_save: asked after each step (see `Poll`); a stop saves first.
        until: stop after that many steps, too.

    Raises:
        Failure: a step's numbers are not finite, and the recipe's `health` says to stop.
    """
    recipe, world, health = parts.recipe, parts.world, parts.recipe.health
    order_of = lru_cache(maxsize=2)(parts.order)

    def rows(step: int) -> Tensor:
        epoch, position = divmod(step, parts.steps_per_epoch)
        return order_of(epoch)[position * recipe.batch_size : (position + 1) * recipe.batch_size]

    began, first, poll = time.perf_counter(), parts.step, Poll(world)
    while not parts.finished:
        progress = parts.progress
        before = parts.copied() if health.on_fault == "skip" else None
        try:
            if parts.step + 1 in parts.skipped:
                save(f"before-{parts.step + 1:06d}")
                pass_over(parts)
            else:
                if parts.step + 1 < progress.total_steps:
                    _fetch_ahead(parts, rows(parts.step + 1))
                train_step(parts, rows(parts.step))
                display.step(progress, parts.totals)
            stop, saving = poll(should_stop(), should_save())
            stop = stop or (until is not None and parts.step >= until)
            at_end = parts.step % parts.steps_per_epoch == 0
            keeping = at_end or stop or saving
            if keeping:
                parts.watch.settle()
        except Fault as fault:
            found = describe(fault, parts.names(), world)
            line = f"{found.line}; the batch is in {set_aside(found)}"
            skipped = sorted({*parts.skipped, fault.number})
            if health.on_fault == "stop":
                raise Failure(f"{line}; to go on all the same, begin with health.on_fault=skip") from None
            if len(skipped) > health.most_skipped:
                raise Failure(f"{line}; health.most_skipped={health.most_skipped} steps are skipped already") from None
            if before is not None:
                parts.put_back(before)
                parts.step = progress.step
                display.say(f"{line}; this step is skipped")
            else:
                go_back()
                display.say(f"{line}; back to step {parts.step}, and then past this one")
            parts.skipped = skipped
            continue
        if at_end:
            report = finish_epoch(parts, progress)
            seconds = time.perf_counter() - began
            report |= {"seconds": seconds, "images_per_second": (parts.step - first) * recipe.batch_size / seconds}
            began, first = time.perf_counter(), parts.step
            if report.pop("is best", False):
                save("best")
            verdicts = {part.after_epoch(report) for part in parts.strategies.values() if hasattr(part, "after_epoch")}
            if "rewind" in verdicts:
                rewind("kept")
                parts.best = parts.best | {"rewound": parts.step}  # its weights are not those of this step
            elif "keep" in verdicts:
                save("kept")
            record(report)
            display.epoch(report)
            save("last")
        elif keeping:
            save("last")
        if stop:
            return parts.finished
    return True


def pass_over(parts: Parts) -> None:
    """A step that is not made: rates and counters go on, nothing else does."""
    _set_rates(parts.optimizer, parts.recipe, parts.progress)
    parts.step += 1


def _fetch_ahead(parts: Parts, rows: Tensor) -> None:
    """Begins to fetch the pieces of the batch of `rows` that this process will work through, where that takes time."""
    if isinstance(parts.train, Ahead):
        pieces = micro_parts(len(rows), parts.world.rank, parts.world.size, parts.recipe.accumulate)
        parts.train.expect(rows[part.start : part.stop] for part in pieces)


def finish_epoch(parts: Parts, progress: Progress) -> dict[str, Any]:
    """The epoch's report: what training saw, and accuracies on held-out and on training images."""
    recipe, world = parts.recipe, parts.world
    totals = parts.totals.summed(world)
    means = totals.means()
    parts.totals = parts.new_totals()
    if not totals.sums["images"]:
        raise Failure(f"every step of epoch {progress.epoch + 1} was skipped: lower optimizer.lr")
    for name, value in means.items():
        if not math.isfinite(value):
            raise Failure(f"the mean of {name} is not a finite number in epoch {progress.epoch + 1}")
    if parts.averaged is not None:
        for kept, current in zip(parts.averaged.buffers(), parts.model.buffers(), strict=True):
            kept.copy_(current)
    report: dict[str, Any] = {
        "epoch": progress.epoch + 1,
        "step": parts.step,
        "lr": parts.optimizer.param_groups[0]["lr"],
        "train": means,
        "gradient": lengths(totals.gradients.tolist(), parts.step, parts.course),
        "radii": {"unit": totals.unit, "counts": [int(count) for count in totals.radii.tolist()]},
    }
    skipped = [number for number in parts.skipped if number > parts.step - parts.steps_per_epoch]
    if skipped:
        report["skipped"] = skipped
    final = progress.epoch + 1 == recipe.epochs
    if len(parts.validation_rows) and (final or (progress.epoch + 1) % recipe.validation.every == 0):
        settings = recipe.validation
        attacks = {} if settings.attack is None else {"robust": settings.attack}
        watched = [part.watched() for part in parts.strategies.values() if hasattr(part, "watched")]
        further = {name: attack for found in watched for name, attack in found.items()}
        held_out = measure(parts, parts.validation_rows, attacks | _single_step(recipe, progress) | further)
        report["validation"] = held_out
        sample = epoch_order(parts.own_rows, 0, -1)[: settings.train_images]  # the same in every epoch and run
        if len(sample):
            report["training"] = measure(parts, sample, attacks)
            if recipe.attack is not None and attacks:
                sizes = len(parts.validation_rows), len(sample)
                report |= overfitting(report, *sizes, parts.course)
        # Robust accuracy decides (natural accuracy where nothing is attacked), the other breaks ties, then the later.
        score = [held_out.get("robust", 0.0), held_out["natural"]]
        if recipe.attack is None:
            score.reverse()
        if score >= parts.best.get("score", [-1.0, -1.0]):
            parts.best = {"epoch": progress.epoch + 1, "score": score}
            report["is best"] = True
            if "fgsm" in held_out:
                parts.best["seen"] = Seen(held_out["robust"], held_out["fgsm"])
        elif "fgsm" in held_out and "seen" in parts.best:
            now, best = Seen(held_out["robust"], held_out["fgsm"]), Seen(*parts.best["seen"])
            if collapsed(now, best, len(parts.validation_rows)):
                report["collapse"] = {"epoch": parts.best["epoch"], **best._asdict()}
                parts.best = {"collapse": progress.epoch + 1} | parts.best  # the first epoch of it stays
    return report


def _single_step(recipe: Recipe, progress: Progress) -> dict[str, Attack]:
    """FGSM, where training attacks in a single step: it sees what such training protects against."""
    attack, validation = recipe.attack, recipe.validation.attack
    if attack is None or validation is None or attack.passes(progress).input_backward != 1:
        return {}
    return {"fgsm": registry("attack").get("rs-fgsm")(noise=0.0, step=1.0, mode="eval")}


def measure(parts: Parts, rows: Tensor, attacks: dict[str, Attack]) -> dict[str, float]:
    """Accuracy on training-set rows without augmentation, "natural" and under each attack, by its name.

    Shares of all rows, the same on every process.
    """
    recipe, world = parts.recipe, parts.world
    folding, graphs = parts.folding, parts.graphs
    if parts.averaged is not None:  # another network than the one whose attacks are recorded
        folding, graphs = fold_backbone(parts.final, world), None
    predict = Predictor(parts.final, world.device, parts.precision.attack, folding, graphs)
    right = torch.zeros(1 + len(attacks), dtype=torch.int64, device=world.device)
    for number, piece in _pieces(rows, recipe.batch_size):
        if number % world.size != world.rank:
            continue
        batch = make_batch(parts.train, piece, device=world.device, augmentation=None, generator=None)
        with torch.no_grad(), predict.using("eval") as forward:
            right[0] += is_right(forward(batch.x).logits, batch.y).sum()
            for place, attack in enumerate(attacks.values(), start=1):
                budget = Budget(batch.x.new_full((len(piece),), recipe.threat.epsilon))
                generator = whole(batch.x, recipe.seed, "validation", number)
                x_adv = attack(predict, batch.x, batch.y, budget, recipe.threat, generator)
                right[place] += is_right(forward(x_adv).logits, batch.y).sum()
    counts = world.sum(right).tolist()
    return {name: count / len(rows) for name, count in zip(("natural", *attacks), counts, strict=True)}


def _pieces(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    yield from enumerate(torch.split(rows, size))


def step_passes(recipe: Recipe, progress: Progress) -> Passes:
    """All passes of one step."""
    return sum(recipe.passes(progress).values(), Passes())
