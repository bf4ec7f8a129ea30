"""What a target distribution must do."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, get_args

import torch
from torch import Tensor

from robustkit.core.batch import Budget, Mode, Output
from robustkit.core.strategy import Record, Scene, TargetDistribution, build
from robustkit.engine import count_passes
from robustkit.testing.common import (
    CHARGE,
    DRAW,
    KEEP,
    check_images,
    listed,
    name_of,
    rebuilt,
    same_state,
    state_of,
    variants,
)
from robustkit.testing.spec import check_spec
from robustkit.testing.stage import Stage, elsewhere, left_as_found
from robustkit.testing.tiny import BATCH, CLASSES, EPOCHS, STEPS


def check_target(target: TargetDistribution) -> None:
    """Rows of probabilities through all of training, at the declared price; state in buffers, moved by `prepare` once
    and by `observe`, and by nothing else.
    """
    check_spec(target)
    for variant in variants(target):
        _check_target(variant)


def _check_target(target: TargetDistribution) -> None:
    who, stage = name_of(target), Stage.set()
    assert target.mode in get_args(Mode), f"{who}: mode must be one of {get_args(Mode)}, is {target.mode!r}"
    tracked = target.mode != "train"
    runtime = build(target, stage.world)
    for step in range(EPOCHS * STEPS):
        stage.model.train()
        scene, progress = stage.scene(step), stage.progress(step)
        batch, x_adv = scene.batch, stage.adversarial(scene.batch, step)
        budget = Budget(stage.epsilon(batch))
        other = rebuilt(target, stage.world, runtime)
        weights = deepcopy(stage.model.state_dict())

        before = state_of(runtime)
        with left_as_found(stage.model, who, statistics=tracked):
            runtime.prepare(scene, budget, x_adv, advance=False)
        assert same_state(before, state_of(runtime)), (
            f"{who}: prepare(advance=False) changes its state; let it look, not move"
        )
        stage.model.load_state_dict(weights)

        with count_passes(stage.model) as count:
            rows, images = _target_rows(runtime, target, stage, scene, budget, x_adv, who, tracked=tracked)
        declared, counted = target.passes(progress), count.per_batch(BATCH)
        assert declared == counted, (
            f"{who} declares {declared} in epoch {progress.epoch}, but makes {counted}; {CHARGE}"
        )
        remedy = "give a row of probabilities for each image, such as logits.softmax(dim=1)"
        assert rows.shape == (BATCH, CLASSES), f"{who} must give (B, K), gave {tuple(rows.shape)}; {remedy}"
        assert rows.dtype == torch.float32, f"{who} must give float32, gave {rows.dtype}; {remedy}"
        assert bool((rows >= 0).all()), f"{who} gave negative probabilities; {remedy}"
        sums = rows.sum(dim=1)
        assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5), f"{who}: rows sum to {listed(sums)}; {remedy}"
        if images is not None:
            check_images(images, batch.x, f"{who}.prepare")

        stage.model.load_state_dict(weights)
        with elsewhere():
            again, _ = _target_rows(other, target, stage, scene, budget, x_adv, who, tracked=tracked)
        fault = f"{who} gives another target after its state went through a checkpoint"
        assert torch.equal(rows, again), f"{fault}; {KEEP}"
        with torch.no_grad():
            output = stage.model(batch.x)
            record = Record(batch, progress, budget, x_adv, {"adversarial": output}, rows, {})
            for one in (runtime, other):
                one.observe(record)
        assert same_state(state_of(runtime), state_of(other)), f"{who}: its state is another after a checkpoint"


def _target_rows(
    runtime: Any,
    target: TargetDistribution,
    stage: Stage,
    scene: Scene,
    budget: Budget,
    x_adv: Tensor,
    who: str,
    *,
    tracked: bool,
) -> tuple[Tensor, Tensor | None]:
    """What the loop does with a target before the pure pass."""
    arguments = [scene.batch.x.clone(), x_adv.clone()]
    with left_as_found(stage.model, who, statistics=tracked), torch.random.fork_rng(devices=[]):
        torch.seed()
        images: Tensor | None = runtime.prepare(scene, budget, x_adv)
    assert torch.equal(arguments[0], scene.batch.x), f"{who}.prepare changes the images; work on a copy"
    assert torch.equal(arguments[1], x_adv), f"{who}.prepare changes the adversarial images; work on a copy"
    output: Output | None = None
    prepared = state_of(runtime)
    with torch.no_grad():
        if images is not None:
            with stage.predict().using(target.mode) as predict:
                output = predict(images)
        rows: Tensor = runtime(output, scene.batch, scene.progress)
        twice: Tensor = runtime(output, scene.batch, scene.progress)
    assert torch.equal(rows, twice), f"{who}: asked twice, it gives two targets; {DRAW}"
    assert same_state(prepared, state_of(runtime)), f"{who}: giving the target changes its state; do that in observe"
    return rows, images
