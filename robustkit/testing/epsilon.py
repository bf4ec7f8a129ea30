"""What an epsilon schedule must do."""

from __future__ import annotations

from copy import deepcopy

import torch

from robustkit.core.batch import Batch, Budget
from robustkit.core.strategy import EpsilonSchedule, Record, build
from robustkit.engine import count_passes
from robustkit.testing.common import (
    CHARGE,
    KEEP,
    listed,
    mode_of,
    name_of,
    rebuilt,
    same,
    same_state,
    state_of,
    variants,
)
from robustkit.testing.spec import check_spec
from robustkit.testing.stage import Stage, elsewhere, left_as_found
from robustkit.testing.tiny import BATCH, EPOCHS, STEPS


def check_epsilon(schedule: EpsilonSchedule) -> None:
    """A budget with one entry for each image, reproducible, at the declared price; state in buffers."""
    check_spec(schedule)
    for variant in variants(schedule):
        _check_epsilon(variant)


def _check_epsilon(schedule: EpsilonSchedule) -> None:
    who, stage = name_of(schedule), Stage.set()
    tracked = mode_of(schedule) != "train"
    runtime = build(schedule, stage.world)
    for step in range(EPOCHS * STEPS):
        stage.model.train()
        weights = deepcopy(stage.model.state_dict())
        other = rebuilt(schedule, stage.world, runtime)
        with (
            left_as_found(stage.model, who, statistics=tracked),
            count_passes(stage.model) as count,
            torch.random.fork_rng(devices=[]),
        ):
            torch.seed()
            scene = stage.scene(step)
            arguments = [tensor.clone() for tensor in scene.batch]
            budget: Budget = runtime(scene)
        for field, before, after in zip(Batch._fields, arguments, scene.batch, strict=True):
            assert torch.equal(before, after), f"{who} changes the batch's {field}; work on a copy"
        declared, counted = schedule.passes(stage.progress(step)), count.per_batch(BATCH)
        assert declared == counted, f"{who} declares {declared}, but makes {counted}; {CHARGE}"
        _check_budget(budget, schedule, who)
        stage.model.load_state_dict(weights)
        with elsewhere():
            again: Budget = other(stage.scene(step))
        for name, was, now in zip(Budget._fields, budget, again, strict=True):
            assert same(was, now), f"{who}: {name} is another after the state went through a checkpoint; {KEEP}"
        if hasattr(runtime, "observe"):
            x_adv = stage.adversarial(scene.batch, step)
            with torch.no_grad():
                outputs = {"adversarial": stage.model(x_adv)}
            stage.model.load_state_dict(weights)
            for one in (runtime, other):
                one.observe(Record(scene.batch, scene.progress, budget, x_adv, outputs, None, {}))
        assert same_state(state_of(runtime), state_of(other)), f"{who}: its state is another after a checkpoint; {KEEP}"


def _check_budget(budget: Budget, schedule: EpsilonSchedule, who: str) -> None:
    for name in ("epsilon", "step_size", "weight", "steps"):
        values = getattr(budget, name)
        if values is None:
            continue
        wanted = torch.int64 if name == "steps" else torch.float32
        remedy = "give a number for each image, such as x.new_full((len(x),), radius)"
        assert values.shape == (BATCH,), f"{who}: {name} must be (B,), is {tuple(values.shape)}; {remedy}"
        assert values.dtype == wanted, f"{who}: {name} must be {wanted}, is {values.dtype}"
        assert values.device.type == "cpu", f"{who}: {name} is on {values.device}, the images are on the CPU"
        assert not values.requires_grad, f"{who}: {name} must be detached"
        assert bool(values.isfinite().all()), f"{who}: {name} is not finite"
        assert bool((values >= 0).all()), f"{who}: {name} is negative: {listed(values)}"
    assert (budget.step_size is not None) == schedule.sets_step_size, (
        f"{who}: sets_step_size is {schedule.sets_step_size}, but the budget's step size is {budget.step_size}"
    )
    if budget.steps is not None:
        most = int(budget.steps.max())
        assert budget.max_steps >= most, f"{who}: max_steps is {budget.max_steps}, the largest of steps {most}"
    if budget.adjusted is not None:
        assert budget.adjusted.shape == (BATCH,), f"{who}: adjusted must be (B,), is {tuple(budget.adjusted.shape)}"
        assert budget.adjusted.dtype == torch.int64, f"{who}: adjusted must be torch.int64, is {budget.adjusted.dtype}"
        assert set(budget.adjusted.tolist()) <= {-1, 0, 1}, f"{who}: adjusted is another than -1, 0, 1"
