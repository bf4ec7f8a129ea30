"""Learning rates against torch's schedulers, formulas, and the sheet's table."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from robustkit.core.batch import Progress
from robustkit.core.errors import SpecError
from robustkit.core.override import override
from robustkit.core.recipe import Recipe
from robustkit.core.spec import from_json, to_json
from robustkit.schedules import Constant, Cosine, MultiStep, OneCycle, Triangular
from robustkit.testing import tiny_recipe

SIZES = [(100, 391), (30, 573), (7, 13), (1, 10), (2, 2), (3, 1)]


def torchs(
    make: Callable[[torch.optim.Optimizer], Any], total: int, lr: float, momentum: float = 0.9
) -> list[tuple[float, float]]:
    """Rate and momentum that torch uses in each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=momentum)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about calling a scheduler before the optimiser
        schedule = make(optimizer)
        found = []
        for step in range(total):
            found.append((float(optimizer.param_groups[0]["lr"]), float(optimizer.param_groups[0]["momentum"])))
            if step + 1 < total:
                schedule.step()
    return found


def ours(schedule: Any, epochs: int, steps_per_epoch: int) -> list[Any]:
    return [schedule(Progress.at(step, epochs, steps_per_epoch)) for step in range(epochs * steps_per_epoch)]


@pytest.mark.parametrize(("epochs", "steps"), SIZES)
@pytest.mark.parametrize("warm_up", [0.25, 0.5, 0.3])
def test_one_cycle_is_torchs(epochs: int, steps: int, warm_up: float) -> None:
    total = epochs * steps
    if warm_up * total <= 1:
        pytest.skip("torch divides by zero where the rise is no longer than a step")
    theirs = torchs(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, epochs=epochs, steps_per_epoch=steps, pct_start=warm_up),
        total,
        0.1,
    )
    for rates, (lr, momentum) in zip(ours(OneCycle(warm_up=warm_up), epochs, steps), theirs, strict=True):
        assert 0.1 * rates.lr_scale == pytest.approx(lr, abs=1e-9, rel=1e-7)
        assert rates.momentum == pytest.approx(momentum, abs=1e-9)


def test_one_cycle_table_of_the_sheet() -> None:
    """UIAT 23: the check values of section 12.1."""
    table = {
        0: (0.00400, 0.950),
        5: (0.01317, 0.9405),
        10: (0.03717, 0.9154),
        25: (0.1, 0.85),
        50: (0.0750, 0.875),
        75: (0.0250, 0.925),
        80: (0.01654, 0.9335),
        90: (0.00432, 0.9457),
        95: (0.00109, 0.949),
    }
    for epoch, (lr, momentum) in table.items():
        rates = OneCycle()(Progress.at(391 * epoch, 100, 391))
        assert 0.1 * rates.lr_scale == pytest.approx(lr, abs=1e-5)
        assert rates.momentum == pytest.approx(momentum, abs=5e-4 if epoch == 95 else 6e-5)
    last = OneCycle()(Progress.at(39099, 100, 391))
    assert (0.1 * last.lr_scale, last.momentum) == pytest.approx((4e-7, 0.95), rel=1e-6)


def test_one_cycle_settings() -> None:
    assert all(rates.momentum is None for rates in ours(OneCycle(cycle_momentum=False), 3, 4))
    theirs = torchs(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o,
            0.2,
            total_steps=400,
            pct_start=0.025,
            div_factor=10,
            final_div_factor=50,
            base_momentum=0.7,
            max_momentum=0.99,
        ),
        400,
        0.2,
    )
    mine = OneCycle(warm_up=0.025, start_divisor=10, end_divisor=500, base_momentum=0.7, max_momentum=0.99)
    for rates, (lr, momentum) in zip(ours(mine, 400, 1), theirs, strict=True):
        assert (0.2 * rates.lr_scale, rates.momentum) == pytest.approx((lr, momentum), rel=1e-6)


@pytest.mark.parametrize(("epochs", "steps"), [*SIZES, (1, 1), (1, 2), (1, 3)])
@pytest.mark.parametrize(
    "schedule",
    [
        OneCycle(),
        Triangular(),
        Cosine(),
        Cosine(every="step"),
        MultiStep(),
        Constant(),
        OneCycle(warm_up=0.01),
        Triangular(peak=0.9),
    ],
    ids=str,
)
def test_rates_are_sane_in_runs_of_any_length(schedule: Any, epochs: int, steps: int) -> None:
    for rates in ours(schedule, epochs, steps):
        assert 0 <= rates.lr_scale <= 1 + 1e-9 and math.isfinite(rates.lr_scale)
        assert rates.momentum is None or 0 <= rates.momentum < 1


@pytest.mark.parametrize("milestones", [(0.5, 0.75), (99, 104), (0.29, 0.57, 0.58), (1, 2, 3), (), (75, 0.9, 100)])
def test_multi_step_is_torchs(milestones: tuple[float, ...]) -> None:
    epochs, steps = (110 if 104 in milestones else 100), 7
    at = [round((m * epochs if m < 1 else m) * steps) for m in milestones]
    theirs = torchs(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, at, gamma=0.1), epochs * steps, 0.1)
    for rates, (lr, _) in zip(ours(MultiStep(at=milestones), epochs, steps), theirs, strict=True):
        assert 0.1 * rates.lr_scale == pytest.approx(lr, rel=1e-9) and rates.momentum is None


def test_multi_step_drops_at_the_first_step_of_its_epoch() -> None:
    schedule = MultiStep(at=(99, 104))
    for epoch, position, power in ((98, 390, 0), (99, 0, 1), (103, 390, 1), (104, 0, 2), (109, 390, 2)):
        scale = schedule(Progress.at(391 * epoch + position, 110, 391)).lr_scale
        assert scale == pytest.approx(0.1**power)


def test_multi_step_with_a_factor_for_each_drop() -> None:
    """FAT: 0.1, 0.01 from epoch 60, 0.001 from 90, 0.0005 from 110, counted from 1."""
    schedule = MultiStep(at=(59, 89, 109), factor=(0.1, 0.1, 0.5))
    for epoch, wanted in ((1, 0.1), (59, 0.1), (60, 0.01), (89, 0.01), (90, 0.001), (110, 0.0005), (120, 0.0005)):
        assert 0.1 * schedule(Progress.at(7 * (epoch - 1), 120, 7)).lr_scale == pytest.approx(wanted, rel=1e-12)
    same = ours(MultiStep(factor=(0.1, 0.1)), 8, 3)
    assert same == ours(MultiStep(), 8, 3)
    with pytest.raises(SpecError, match="2 drops need as many factors, got 1"):
        MultiStep(factor=(0.1,))
    changed = override(tiny_recipe(), ["schedule=multi-step", "schedule.at=0.5,0.9", "schedule.factor=0.1,0.5"])
    assert changed.schedule == MultiStep(at=(0.5, 0.9), factor=(0.1, 0.5))
    assert from_json(Recipe, to_json(changed)) == changed


@pytest.mark.parametrize("peak", [0.5, 0.4])
def test_triangular_is_torchs_cyclic(peak: float) -> None:
    epochs, steps = 15, 10
    total = epochs * steps
    theirs = torchs(
        lambda o: torch.optim.lr_scheduler.CyclicLR(
            o, base_lr=0.0, max_lr=0.3, step_size_up=total * peak, step_size_down=total * (1 - peak)
        ),
        total,
        0.3,
    )
    for rates, (lr, momentum) in zip(ours(Triangular(peak=peak), epochs, steps), theirs, strict=True):
        assert 0.3 * rates.lr_scale == pytest.approx(lr, abs=1e-9)
        assert rates.momentum == pytest.approx(momentum, abs=1e-9)
    assert all(rates.momentum is None for rates in ours(Triangular(cycle_momentum=False), 3, 4))


def test_cosine_by_formula() -> None:
    epochs, steps = 30, 11
    theirs = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs * steps), epochs * steps, 0.1)
    for step in range(epochs * steps):
        progress = Progress.at(step, epochs, steps)
        t = step // steps + 1
        by_epoch = 0.5 * (1 + math.cos(math.pi * (t - 1) / epochs))
        assert Cosine()(progress).lr_scale == pytest.approx(by_epoch, abs=1e-12)
        assert 0.1 * Cosine(every="step")(progress).lr_scale == pytest.approx(theirs[step][0], abs=1e-9)
        assert Cosine()(progress).momentum is None


def test_constant() -> None:
    assert {(rates.lr_scale, rates.momentum) for rates in ours(Constant(), 3, 4)} == {(1.0, None)}


def test_refused() -> None:
    for wrong in ({"warm_up": 0.0}, {"warm_up": 1.0}, {"start_divisor": 0}):
        with pytest.raises(SpecError):
            OneCycle(**wrong)
    with pytest.raises(SpecError):
        MultiStep(at=(0.0,))
    with pytest.raises(SpecError):
        Triangular(peak=1)
    with pytest.raises(SpecError, match=r"epoch.*step"):
        Cosine(every="batch")


@pytest.mark.parametrize("warm_up", [0.0, 0.1, 0.25])
def test_cosine_after_a_rise(warm_up: float) -> None:
    """Straight up from 0, then torch's cosine over what is left (Rebuffi et al. 2021: 10 of 400 epochs)."""
    epochs, steps = 8, 5
    total, rise = epochs * steps, round(warm_up * epochs * steps)
    rates = [rates.lr_scale for rates in ours(Cosine(every="step", warm_up=warm_up), epochs, steps)]
    assert rates[:rise] == pytest.approx([step / rise for step in range(rise)])
    theirs = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, total - rise), total - rise, 1.0)
    assert rates[rise:] == pytest.approx([lr for lr, _ in theirs], abs=1e-9)
