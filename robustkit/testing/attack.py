"""What an attack must do."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit.core.batch import Budget, Part
from robustkit.core.registry import registry
from robustkit.core.strategy import Attack, ThreatModel, build
from robustkit.engine import count_passes
from robustkit.testing.common import CHARGE, check_in_ball, differ, mode_of, name_of, variants
from robustkit.testing.spec import check_spec
from robustkit.testing.stage import Draws, Stage, Stop, Watched, elsewhere, left_as_found
from robustkit.testing.tiny import BATCH, tiny_recipe


def check_attack(attack: Attack) -> None:
    """Detached images within reach, reproducible, at the declared price, and a model left as it was found."""
    check_spec(attack)
    assert attack.reach > 0, f"{name_of(attack)}: reach must be above 0, is {attack.reach}"
    for threat in (registry("threat").get("linf")(), registry("threat").get("l2")()):
        stage = Stage.set(threat)
        for variant in variants(attack):
            _check_attack(variant, stage)


def _check_attack(attack: Attack, stage: Stage) -> None:
    who, threat = name_of(attack), stage.threat
    batch = stage.batch()
    x, y = batch.x, batch.y
    runtime = build(attack.rehearsed(tiny_recipe()) if hasattr(attack, "rehearsed") else attack, stage.world)
    tracked = mode_of(attack) != "train"
    ball: ThreatModel = getattr(attack, "threat", threat)
    whole = Part(0, BATCH, BATCH)
    epsilon = stage.threat.epsilon * torch.tensor([1.0, 0.5, 0.0, 1.0, 1.5, 0.25])
    steps = torch.tensor([2, 1, 2, 0, 1, 2])
    budgets = {
        "a radius for each image": Budget(epsilon),
        "a radius and a step size for each image": Budget(epsilon, step_size=epsilon / 3),
        "a number of steps for each image": Budget(epsilon, steps=steps, max_steps=2),
    }

    def call(budget: Budget, seed: int, part: Part = whole, predict: Watched | None = None) -> tuple[Tensor, Draws]:
        stage.model.load_state_dict(weights)
        generator = Draws(seed, part, x.device)
        rows = slice(part.start, part.stop)
        with torch.random.fork_rng(devices=[]):
            torch.seed()  # nothing may depend on torch's global generator
            return (
                runtime(predict or stage.predict(), x[rows], y[rows], _rows(budget, rows), threat, generator),
                generator,
            )

    weights = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    before = [tensor.clone() for tensor in (x, y, epsilon, steps)]
    for words, budget in budgets.items():
        for training in (True, False):
            stage.model.train(training)
            with left_as_found(stage.model, f"{who} with {words}", statistics=tracked):
                first, generator = call(budget, seed=1)
        check_in_ball(first, x, ball, attack.reach * ball.epsilon / threat.epsilon * epsilon, f"{who} with {words}")
        with elsewhere():
            second = call(budget, seed=1)[0]
        third = call(budget, seed=2)[0]
        differ([first, second, third], f"{who} with {words}", drew=generator.drew)
    for was, tensor, name in zip(before, (x, y, epsilon, steps), ("x", "y", "epsilon", "steps"), strict=True):
        assert torch.equal(was, tensor), f"{who} changes its argument {name}; work on a copy"

    plain = budgets["a radius for each image"]
    watched = stage.predict()
    stage.model.train()
    with count_passes(stage.model) as count:
        result, _ = call(plain, seed=1, predict=watched)
    declared, counted = attack.passes(stage.progress()), count.per_batch(BATCH)
    if getattr(attack, "stops_early", False):
        assert declared.units >= counted.units, f"{who} declares at most {declared}, but makes {counted}; {CHARGE}"
    else:
        assert declared == counted, f"{who} declares {declared}, but makes {counted}; {CHARGE}"
    with torch.no_grad():
        assert torch.equal(call(plain, seed=1)[0], result), f"{who} gives something else under torch.no_grad()"
    for number in {0, watched.calls // 2, watched.calls - 1} if watched.calls else set():
        broken = stage.predict()
        broken.gives_up_after = number
        with left_as_found(stage.model, f"{who}, stopped by an error in predict,", statistics=tracked):
            try:
                call(plain, seed=1, predict=broken)
            except Stop:
                pass
            else:
                raise AssertionError(f"{who} hides an error that predict raised")
    if watched.modes == {"eval"}:
        pieces = [call(plain, 1, part)[0] for part in (Part(0, 4, BATCH), Part(4, BATCH, BATCH))]
        # Sums round differently in batches of another size, so that the sign of a gradient near zero may flip.
        moved = ((torch.cat(pieces) - result).abs() > 1e-4).float().mean().item()
        assert moved < 0.02, f"{who}: {moved:.0%} of the pixels differ when a batch is split over processes"
    stage.model.load_state_dict(weights)


def _rows(budget: Budget, rows: slice) -> Budget:
    def cut(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    return budget._replace(
        epsilon=budget.epsilon[rows],
        step_size=cut(budget.step_size),
        steps=cut(budget.steps),
        weight=cut(budget.weight),
    )
