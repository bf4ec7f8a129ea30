"""LAS-AT: the contract of schedules, the reward by plain loops, REINFORCE, costs, and life inside robustkit."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from robustkit_las_at import LASAT
from robustkit_las_at.policy import pick
from robustkit_las_at.schedule import Learner
from torch import Tensor, nn

from robustkit import Recipe, UserError, evolve, load_recipe, override, px, registry
from robustkit.attacks import PGD, RSFGSM
from robustkit.core.batch import Batch, Budget, Part, Passes, Progress
from robustkit.core.loop import step_passes, train_step
from robustkit.core.model import RobustModel
from robustkit.core.parts import Parts
from robustkit.core.rng import whole
from robustkit.core.strategy import Scene
from robustkit.engine import Predictor, count_passes
from robustkit.losses import Align, CrossEntropy, Trades
from robustkit.objectives import KL
from robustkit.opening import load_parts, make_world
from robustkit.optimizers import SGD
from robustkit.reporting.composition import phases
from robustkit.schedules import MultiStep
from robustkit.targets import Natural, Universal
from robustkit.testing import check, check_steps, tiny_recipe
from robustkit.threats import Linf
from robustkit.weights import AWP

BATCH = 16


def learned(**settings: Any) -> LASAT:
    """A small LAS-AT: three steps at most, learning in every step."""
    given = {"radii": (4 * px, 8 * px, 12 * px), "steps": (1, 2, 3), "interval": 1, "backbone": "convnet_small"}
    return LASAT(**(given | settings))


METHODS: dict[str, dict[str, Any]] = {
    "pgd-at": {
        "epsilon": learned(),
        "attack": PGD(steps=3, start_epsilon=8 * px),
        "loss": CrossEntropy(label_smoothing=1 / 3),
    },
    "trades": {
        "epsilon": learned(weights=(5, 6, 7), mode="train", robust_reward=8, natural_reward=4, momentum=0.9),
        "attack": PGD(steps=3, objective=KL(), start="gaussian"),
        "loss": Trades(weight=1.0),
    },
    "awp": {
        "epsilon": learned(rehearsal_loss=CrossEntropy(label_smoothing=1 / 3), stop_when_fooled=False),
        "attack": PGD(steps=3, start_epsilon=8 * px, final_epsilon=8 * px),
        "weights": AWP(gamma=0.01),
    },
}


def parts_of(**given: Any) -> Parts:
    recipe = tiny_recipe(**given)
    return load_parts(recipe, make_world(recipe, "cpu"))


def step(parts: Parts) -> None:
    position = parts.step % parts.steps_per_epoch
    size = parts.recipe.batch_size
    train_step(parts, parts.order(parts.progress.epoch)[position * size : (position + 1) * size])


def learner_of(parts: Parts) -> Learner:
    learner = parts.strategies["epsilon"]
    assert isinstance(learner, Learner)
    return learner


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def same(before: dict[str, Tensor], module: nn.Module) -> bool:
    after = module.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def weights_of(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


class Rewarded(NamedTuple):
    """One asking for a reward: what was asked, the model of that moment, and the answer."""

    scene: Scene
    budget: Budget
    model: RobustModel
    rewards: Tensor


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Rewarded]:
    """Every reward that is asked for."""
    found: list[Rewarded] = []
    plain = Learner.reward

    def reward(self: Learner, scene: Scene, budget: Budget) -> Tensor:
        assert isinstance(scene.predict, Predictor)
        model = deepcopy(scene.predict.model)
        found.append(Rewarded(scene, budget, model, plain(self, scene, budget)))
        return found[-1].rewards

    monkeypatch.setattr(Learner, "reward", reward)
    return found


# The contract, and what is refused


@pytest.mark.parametrize(
    "schedule",
    [
        LASAT(),
        learned(steps=tuple(range(3, 15)), interval=2, momentum=0.9, weight_decay=5e-4),
        learned(weights=(5.0, 6.0), mode="train"),
        learned(rehearsal_loss=Trades(), stop_when_fooled=False, schedule=MultiStep(at=(0.5,))),
    ],
    ids=["as published", "with momentum", "with weights", "with another loss"],
)
def test_contract(schedule: LASAT) -> None:
    check(schedule)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_a_device(name: str) -> None:
    check_steps(tiny_recipe(**METHODS[name]), name)


def test_registered() -> None:
    assert registry("epsilon").get("las-at") is LASAT
    command = [sys.executable, "-m", "robustkit", "list", "epsilon", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (entry,) = [entry for entry in json.loads(done.stdout) if entry["name"] == "las-at"]
    assert entry["origin"].startswith("robustkit-las-at") and "LAS-AT" in entry["description"]


def test_by_override() -> None:
    words = ["epsilon=las-at", "attack.steps=14", "epsilon.interval=5", "epsilon.schedule=multi-step"]
    recipe = override(tiny_recipe(), [*words, "epsilon.rehearsal_loss=cross-entropy"])
    assert recipe.epsilon == LASAT(interval=5, schedule=MultiStep(), rehearsal_loss=CrossEntropy())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"attack": PGD(steps=2)}, "makes 2 steps, but las-at chooses up to 3; set attack.steps=3"),
        ({"attack": None}, "there is none; e.g. attack=pgd attack.steps=3"),
        ({"attack": RSFGSM()}, "this attack has none; e.g. attack=pgd attack.steps=3"),
        ({"attack": PGD(steps=3, step_size=0.01)}, "both the attack and the epsilon schedule set a step size"),
        ({"epsilon": learned(weights=(6,))}, "TRADES' KL alone; set loss=trades loss.weight=1"),
        ({"epsilon": learned(weights=(6,)), "loss": Trades()}, "TRADES' KL alone"),
        ({"epsilon": learned(rehearsal_loss=Align())}, "one of rehearsal_loss and the recipe's loss uses a target"),
        ({"accumulate": 2}, "one step per batch"),
    ],
)
def test_refused_with_a_reason(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        tiny_recipe(**{"epsilon": learned(), "attack": PGD(steps=3)} | parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"radii": ()}, "LASAT.radii: must hold at least one value"),
        ({"steps": ()}, "LASAT.steps: must hold"),
        ({"steps": (0, 1)}, "at least 1"),
        ({"rehearsal_loss": registry("loss").get("hat")()}, "a loss without state"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LASAT(**settings)


def test_an_unknown_backbone_is_named_where_it_stands() -> None:
    with pytest.raises(UserError, match=r"^epsilon\.backbone: timm knows no model 'resnet18_cifra'; did you mean"):
        parts_of(epsilon=learned(backbone="resnet18_cifra"), attack=PGD(steps=3))


# Draws


def test_each_option_is_picked_as_often_as_it_is_likely() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    logs, count = probabilities.log().expand(20_000, 4), 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(pick(logs, uniform), minlength=4) / count
    assert torch.allclose(shares, probabilities, atol=4 * 0.5 / count**0.5)
    assert shares[1] == 0
    edges = torch.tensor([0.0, 0.4999, 0.5001, 0.7001, 1 - 2**-24])
    assert pick(probabilities.log().expand(5, 4), edges).tolist() == [0, 0, 2, 3, 3]


@pytest.mark.parametrize("name", METHODS)
def test_budgets_are_drawn_from_the_spaces(name: str) -> None:
    parts = parts_of(**METHODS[name])
    spec, seen = parts.recipe.epsilon, []
    learner_of(parts).register_forward_hook(lambda module, inputs, budget: seen.append(budget))
    for _ in range(8):
        step(parts)
    for field, values in (("epsilon", spec.radii), ("steps", spec.steps), ("step_size", spec.step_sizes)):
        drawn = torch.cat([getattr(budget, field) for budget in seen])
        assert set(drawn.tolist()) == set(torch.tensor(values).tolist())
    assert all(budget.max_steps == 3 and (budget.weight is not None) == bool(spec.weights) for budget in seen)


def test_draws_are_those_of_the_global_batch() -> None:
    """Two processes that hold halves of a batch choose what one chooses (the policy in eval mode)."""
    parts = parts_of(**METHODS["trades"])
    learner, x = learner_of(parts).eval(), torch.rand(BATCH, 1, 8, 8)
    scene = scene_of(parts, x)
    together, _ = learner.choose(scene, "test")
    for part in (Part(0, 10, BATCH), Part(10, BATCH, BATCH)):
        alone, _ = learner.choose(scene_of(parts, x[part.start : part.stop], part=part), "test")
        for field in ("epsilon", "steps", "step_size", "weight"):
            assert torch.equal(getattr(alone, field), getattr(together, field)[part.start : part.stop])


def scene_of(parts: Parts, x: Tensor, step: int = 0, part: Part | None = None) -> Scene:
    y = torch.arange(len(x)) % 4
    return Scene(
        predict=Predictor(parts.model, x.device),
        batch=Batch(x, y, torch.arange(len(x))),
        progress=Progress.at(step, 4, 4),
        threat=Linf(),
        attack=parts.recipe.attack,
        world=parts.world,
        part=part or Part(0, len(x), len(x)),
    )


# The reward (sheet 4.3, 4.4), by plain loops


def attacked(model: RobustModel, seen: Rewarded, recipe: Recipe) -> Tensor:
    """Sheet 4.3: each image by its own radius, steps and step size, in eval mode."""
    (x, y, _), draws = seen.scene.batch, seen.scene.generator("las-at attack")
    trades = isinstance(recipe.loss, Trades)
    model.eval()
    with torch.no_grad():
        natural = model(x).logits.softmax(dim=1)
    x_adv = x + 0.001 * draws.normal(x) if trades else (x + (2 * draws.uniform(x) - 1) * 8 * px).clamp(0, 1)
    assert seen.budget.steps is not None and seen.budget.step_size is not None
    for t in range(3):
        x_adv = x_adv.detach().requires_grad_()
        logs = model(x_adv).logits.log_softmax(dim=1)
        value = (natural * (natural.log() - logs)).sum() if trades else -logs[range(len(y)), y].sum()
        (gradient,) = torch.autograd.grad(value, x_adv)
        moved = x_adv.detach().clone()
        for i in range(len(y)):
            if t < seen.budget.steps[i]:
                radius = float(seen.budget.epsilon[i])
                d = moved[i] + float(seen.budget.step_size[i]) * gradient[i].sign() - x[i]
                moved[i] = (x[i] + d.clamp(-radius, radius)).clamp(0, 1)
        x_adv = moved
    if recipe.attack.final_epsilon is not None:
        x_adv = (x + (x_adv - x).clamp(-8 * px, 8 * px)).clamp(0, 1)
    return x_adv.detach()


def objective(model: RobustModel, seen: Rewarded, recipe: Recipe, x_adv: Tensor, *, smoothed: bool) -> Tensor:
    """The training loss at `model`, in the mode that it is in."""
    x, y, _ = seen.scene.batch
    if isinstance(recipe.loss, Trades):
        logits = model(x).logits
        p = logits.softmax(dim=1)
        kl = (p * (p.log() - model(x_adv).logits.log_softmax(dim=1))).sum(dim=1)
        return F.cross_entropy(logits, y) + (seen.budget.weight * kl).mean()
    soft = F.one_hot(y, 4).float()
    if smoothed:
        soft = (1 - 1 / 3) * soft + 1 / 12
    return -(soft * model(x_adv).logits.log_softmax(dim=1)).sum(dim=1).mean()


def one_step_on(model: RobustModel, seen: Rewarded, recipe: Recipe, x_adv: Tensor) -> RobustModel:
    """A copy after one step of a fresh optimiser; for AWP from displaced weights."""
    after = deepcopy(model).train()
    after.zero_grad()
    optimizer = torch.optim.SGD(after.parameters(), lr=recipe.optimizer.lr, momentum=0.9, weight_decay=5e-4)
    moves: dict[str, Tensor] = {}
    if isinstance(recipe.weights, AWP):
        proxy = deepcopy(after)
        value = objective(proxy, seen, recipe, x_adv, smoothed=True)
        gradients = torch.autograd.grad(value, list(proxy.parameters()))
        for (name, w), gradient in zip(after.named_parameters(), gradients, strict=True):
            if "weight" in name and w.ndim > 1:
                moves[name] = 0.01 * w.detach().norm() * gradient / gradient.norm()
    named = dict(after.named_parameters())
    with torch.no_grad():
        for name, move in moves.items():
            named[name].add_(move)
    objective(after, seen, recipe, x_adv, smoothed=True).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    with torch.no_grad():
        for name, move in moves.items():
            named[name].sub_(move)
    return after


def probed(after: RobustModel, seen: Rewarded, recipe: Recipe) -> Tensor:
    """PGD-10, 8/255, 2/255, two restarts, in training mode."""
    (x, y, _), draws = seen.scene.batch, seen.scene.generator("las-at probe")
    best, losses = x.clone(), torch.full((len(y),), -1.0)
    for _ in range(2):
        d = (x + (2 * draws.uniform(x) - 1) * 8 * px).clamp(0, 1) - x
        for _ in range(10):
            d.requires_grad_()
            logits = after(x + d).logits
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), d)
            d = d.detach()
            for i in range(len(y)):
                if logits[i].argmax() == y[i] or not recipe.epsilon.stop_when_fooled:
                    d[i] = (d[i] + 2 * px * gradient[i].sign()).clamp(-8 * px, 8 * px)
                    d[i] = (x[i] + d[i]).clamp(0, 1) - x[i]
        with torch.no_grad():
            values = F.cross_entropy(after(x + d).logits, y, reduction="none")
        for i in range(len(y)):
            if values[i] >= losses[i]:
                best[i], losses[i] = x[i] + d[i], values[i]
    return best


def by_the_sheet(seen: Rewarded, recipe: Recipe) -> list[float]:
    model, (x, y, _) = deepcopy(seen.model), seen.scene.batch
    x_adv = attacked(model, seen, recipe)
    trades = isinstance(recipe.loss, Trades)
    model.train(trades)
    with torch.no_grad():
        strength = float(objective(model, seen, recipe, x_adv, smoothed=False))
    after = one_step_on(model, seen, recipe, x_adv)
    worst = probed(after, seen, recipe)
    after.eval()
    with torch.no_grad():
        robust, natural = (float((after(images).logits.argmax(1) == y).float().mean()) for images in (worst, x))
    rho2, rho3 = (8, 4) if trades else (4, 2)
    return [min(max(strength, 0.0), 20.0 if trades else 10.0), rho2 * robust, rho3 * natural]


@pytest.mark.parametrize("name", METHODS)
def test_rewards_are_those_of_the_sheet(name: str, asked: list[Rewarded]) -> None:
    parts = parts_of(**METHODS[name], optimizer=SGD(lr=0.05))
    for _ in range(4):
        step(parts)
    assert len(asked) == 4
    for seen in asked:
        assert seen.rewards.tolist() == pytest.approx(by_the_sheet(seen, parts.recipe), rel=1e-4, abs=1e-6)
    assert len({tuple(seen.rewards.tolist()) for seen in asked}) > 1
    assert torch.equal(learner_of(parts).rewards, asked[-1].rewards)


@pytest.mark.parametrize(("name", "most"), [("pgd-at", 10.0), ("trades", 20.0)])
def test_the_first_reward_has_a_limit(name: str, most: float, asked: list[Rewarded]) -> None:
    parts = parts_of(**METHODS[name])
    with torch.no_grad():
        for parameter in parts.model.head.parameters():
            parameter.mul_(1e5)
    step(parts)
    assert asked[0].rewards[0] == most


@pytest.mark.parametrize(("name", "steps"), [("pgd-at", 2), ("trades", 1)])
def test_images_stop_after_their_steps(name: str, steps: int) -> None:
    """Sheet 16: T_i = t for all is the attack of t steps, however many it could make."""
    parts = parts_of(**METHODS[name])
    learner, x = learner_of(parts).eval(), torch.rand(BATCH, 1, 8, 8)
    with torch.no_grad():
        bias = learner.policy.heads[learner.chosen.index("steps")].bias
        bias.copy_(torch.full_like(bias, -100.0))
        bias[learner.spec.steps.index(steps)] = 100.0
    scene = scene_of(parts, x)
    budget, _ = learner.choose(scene, "test")
    assert budget.max_steps == 3 and set(budget.steps.tolist()) == {steps}
    plain = budget._replace(steps=None, max_steps=0)
    found, wanted = (
        attack(scene.predict, x, scene.batch.y, given, scene.threat, whole(x, 0))
        for attack, given in ((scene.attack, budget), (evolve(scene.attack, steps=steps), plain))
    )
    assert torch.equal(found, wanted)


def test_las_awp_ends_within_the_radius_of_the_threat() -> None:
    """Radii above 8/255 change the way there alone."""
    parts = parts_of(**METHODS["awp"] | {"epsilon": learned(radii=(15 * px,), step_sizes=(12 * px,))})
    seen: list[Tensor] = []
    loss = parts.strategies["loss"]

    class Watching:
        def prepare(self, scene: Scene, budget: Budget, x_adv: Tensor) -> Any:
            seen.append(scene.threat.size(x_adv - scene.batch.x))
            return loss.prepare(scene, budget, x_adv)

        def __call__(self, *arguments: Any) -> Any:
            return loss(*arguments)

    parts.strategies["loss"] = Watching()
    step(parts)
    assert len(seen) == 2  # of the rehearsed step, and of the one that is made
    assert all(float(sizes.max()) == pytest.approx(8 * px, abs=1e-6) for sizes in seen)


# REINFORCE


def test_the_likelihood_of_what_was_rewarded_grows() -> None:
    """Sheet 17: reward 1 where a head picks its first option, batches of one image. (An attack-type head, which the
    sheet also names, has one option and is not built here.)"""
    for field in ("epsilon", "steps", "step_size"):
        parts = parts_of(epsilon=learned(lr=0.05), attack=PGD(steps=3))
        learner, x = learner_of(parts), torch.rand(1, 1, 8, 8)
        head = learner.chosen.index(field)
        first = getattr(learner, field)[0]

        def likelihood(learner: Learner = learner, x: Tensor = x, head: int = head) -> float:
            learner.policy.train()  # as it is while learning
            with torch.no_grad():
                return float(learner.policy(x)[head][0, 0].exp())

        before = likelihood()
        for number in range(30):
            learner.policy.train()
            scene = scene_of(parts, x, step=number)
            budget, log_probability = learner.choose(scene, "test")
            learner.reinforce(scene, log_probability, (getattr(budget, field)[0] == first).float())
        assert likelihood() > before + 0.1


def test_without_reward_the_policy_stays() -> None:
    """Sheet 16."""
    parts = parts_of(epsilon=learned(momentum=0.9), attack=PGD(steps=3))
    learner, x = learner_of(parts), torch.rand(BATCH, 1, 8, 8)
    before = weights_of(learner.policy)
    for number in range(3):
        scene = scene_of(parts, x, step=number)
        _, log_probability = learner.choose(scene, "test")
        learner.reinforce(scene, log_probability, torch.tensor(0.0))
    assert torch.equal(weights_of(learner.policy), before)


def test_the_gradient_is_that_of_the_formula() -> None:
    """-sum over heads of the mean log-probability, times the reward: the first head's bias, in closed form."""
    parts = parts_of(epsilon=learned(lr=1e-2), attack=PGD(steps=3))
    learner, x = learner_of(parts), torch.rand(BATCH, 1, 8, 8)
    scene, reward = scene_of(parts, x), torch.tensor(1e-3)  # so small that nothing is clipped
    learner.policy.train()
    budget, log_probability = learner.choose(scene, "test")
    with torch.no_grad():
        probabilities = [logs.exp() for logs in learner.policy(x)]
    taken = torch.stack([(learner.epsilon == radius).float() for radius in budget.epsilon])
    wanted = (taken - probabilities[0]).mean(dim=0) * reward * 1e-2
    before = learner.policy.heads[0].bias.detach().clone()
    learner.reinforce(scene, log_probability, reward)
    assert torch.allclose(learner.policy.heads[0].bias - before, wanted, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_the_policy_steps_as_torch_s_sgd_with_clipping(settings: dict[str, float]) -> None:
    parts = parts_of(epsilon=learned(lr=0.1, **settings), attack=PGD(steps=3))
    learner, x = learner_of(parts), torch.rand(BATCH, 1, 8, 8)
    twin = deepcopy(learner)
    optimizer = torch.optim.SGD(twin.policy.parameters(), lr=0.1, **settings)
    norms = []
    for number, reward in enumerate((0.01, 50.0, 3.0)):
        scene = scene_of(parts, x, step=number)
        learner.policy.train()
        twin.policy.train()
        _, log_probability = learner.choose(scene, "test")
        learner.reinforce(scene, log_probability, torch.tensor(reward))
        optimizer.zero_grad()
        (-twin.choose(scene, "test")[1].mean() * reward).backward()  # type: ignore[no-untyped-call]
        norms.append(float(nn.utils.clip_grad_norm_(twin.policy.parameters(), 1.0)))
        optimizer.step()
        assert torch.allclose(weights_of(learner.policy), weights_of(twin.policy), rtol=1e-5, atol=1e-6)
    assert min(norms) < 1 < max(norms)


def test_the_policy_s_rate_follows_its_schedule() -> None:
    moved = {}
    for rate, schedule in ((0.1, MultiStep(at=(0.5,))), (0.1, MultiStep(at=(0.9,)))):
        parts = parts_of(epsilon=learned(lr=rate, schedule=schedule), attack=PGD(steps=3))
        learner, x = learner_of(parts), torch.rand(BATCH, 1, 8, 8)
        before = weights_of(learner.policy)
        scene = scene_of(parts, x.new_full(x.shape, 0.3) + 0.1 * x, step=8)
        learner.reinforce(scene, learner.choose(scene, "test")[1], torch.tensor(100.0))
        moved[schedule.at] = float((weights_of(learner.policy) - before).norm())
    assert moved[(0.5,)] == pytest.approx(0.01, rel=1e-3)  # the gradient is clipped to length 1
    assert moved[(0.9,)] == pytest.approx(0.1, rel=1e-3)


# What may move


@pytest.mark.parametrize("name", METHODS)
def test_the_model_does_not_notice(name: str, asked: list[Rewarded]) -> None:
    """Weights, gradients, modes, and statistics but those of `mode` "train"; the copy is gone afterwards."""
    parts = parts_of(**METHODS[name])
    step(parts)
    scene, learner, model = asked[0].scene, learner_of(parts), parts.model
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    asked.clear()
    gc.collect()
    networks = sum(type(o) is RobustModel for o in gc.get_objects())
    before, policy = copied(model), weights_of(learner.policy)
    learner.learn(scene)
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    statistics = {key for key in before if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert changed == (statistics if name == "trades" else set())
    assert all(bool((p.grad == 0.25).all()) and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not torch.equal(weights_of(learner.policy), policy)
    asked.clear()
    gc.collect()
    assert sum(type(o) is RobustModel for o in gc.get_objects()) == networks


@pytest.mark.parametrize(("mode", "batches"), [("train", 4), ("train-frozen", 2), ("eval", 2)])
def test_statistics_of_las_trades_see(mode: Any, batches: int) -> None:
    """Two forwards of the step, and two of the reward where its mode is "train" (the code's)."""
    parts = parts_of(**METHODS["trades"] | {"epsilon": learned(weights=(6,), mode=mode)})
    norm = next(m for m in parts.model.modules() if isinstance(m, nn.BatchNorm2d))
    before = int(norm.num_batches_tracked)
    step(parts)
    assert int(norm.num_batches_tracked) - before == batches


def test_the_policy_learns_in_every_so_many_steps_and_is_nobody_else_s() -> None:
    parts = parts_of(**METHODS["pgd-at"] | {"epsilon": learned(interval=3, lr=0.1)})
    learner = learner_of(parts)
    held = {id(p) for group in parts.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in learner.parameters()}
    for number in range(7):
        before = copied(learner)
        step(parts)
        assert same(before, learner) == (number % 3 != 0)
        assert not learner.policy.training and all(p.grad is None for p in learner.parameters())


# LAS-TRADES


def test_trades_with_weights_of_images() -> None:
    """CE + mean of beta_i KL_i, by a loop."""
    parts = parts_of(**METHODS["trades"])
    with torch.no_grad():
        for parameter in parts.model.head.parameters():
            parameter.mul_(100)  # so that predictions differ
    x, x_adv, weight = torch.rand(6, 1, 8, 8), torch.rand(6, 1, 8, 8), torch.tensor([5.0, 6, 7, 8, 9, 0])
    scene = scene_of(parts, x)
    for factor in (1.0, 0.5):
        loss = Trades(weight=factor)
        prepared = loss.prepare(scene, Budget(torch.full((6,), 8 * px), weight=weight), x_adv)
        with parts.model.using("eval"):
            outputs = {name: parts.model(images) for name, images in prepared.views.items()}
        terms = loss(outputs, None, scene.batch, prepared.extras, scene.progress)
        p, q = (outputs[name].logits.detach().softmax(dim=1).tolist() for name in ("natural", "adversarial"))
        total = 0.0
        for i in range(6):
            total += float(weight[i]) * sum(a * math.log(a / b) for a, b in zip(p[i], q[i], strict=True))
        assert float(terms["consistency"].detach()) == pytest.approx(factor * total / 6, rel=1e-4)


def test_equal_weights_are_trades() -> None:
    """Sheet 16: all betas equal to b are TRADES with beta = b."""
    one = {"radii": (8 * px,), "steps": (2,), "step_sizes": (2 * px,), "weights": (6.0,)}
    attack = PGD(steps=2, objective=KL(), start="gaussian")
    las = parts_of(epsilon=learned(**one), attack=attack, loss=Trades(weight=1.0))
    plain = parts_of(attack=attack, loss=Trades(weight=6.0))
    for _ in range(3):
        step(las)
        step(plain)
        for ours, theirs in zip(las.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


# Costs


def published(name: str, dataset: str = "cifar10") -> dict[str, Any]:
    """A published configuration around tiny networks."""
    path = Path(__file__).parents[1] / "recipes" / f"las_{name}.py"
    recipe = load_recipe(f"{path}:{dataset}-rn18")
    epsilon = evolve(recipe.epsilon, backbone="convnet_small", schedule=registry("schedule").get("constant")())
    return {"epsilon": epsilon, "attack": recipe.attack, "loss": recipe.loss, "weights": recipe.weights}


# (forwards, input backwards, parameter backwards) of a step, and of what learning adds. The sheet (4.6) has one forward
# more in the rewards of PGD-AT and AWP: of the natural images, which nothing uses.
COSTS = {
    ("pgd_at", "cifar10"): ((15, 14, 1), (14 + 1 + 1 + 22 + 2, 14 + 20, 1), 20),
    ("pgd_at", "cifar100"): ((13, 12, 1), (12 + 1 + 1 + 22 + 2, 12 + 20, 1), 20),
    ("trades", "cifar10"): ((15 + 2, 14, 2), (15 + 2 + 2 + 22 + 2, 14 + 20, 2), 1),
    ("trades", "cifar100"): ((15 + 2, 14, 2), (15 + 2 + 2 + 22 + 2, 14 + 20, 2), 1),
    ("awp", "cifar10"): ((16 + 2, 16, 2), (16 + 1 + 2 + 22 + 2, 16 + 20, 2), 1),
    ("awp", "cifar100"): ((15 + 2, 15, 2), (15 + 1 + 2 + 22 + 2, 15 + 20, 2), 10),
}
AVERAGE = {
    ("pgd_at", "cifar10"): 34.8,
    ("pgd_at", "cifar100"): 30.6,
    ("trades", "cifar10"): 116,
    ("trades", "cifar100"): 116,
    ("awp", "cifar10"): 121,
    ("awp", "cifar100"): 44.1,
}


@pytest.mark.parametrize(("name", "dataset"), COSTS)
def test_a_step_costs_what_the_sheet_says(name: str, dataset: str) -> None:
    """Hooks count, the recipe declares, and both equal the sheet. The policy: one forward, one more to learn."""
    plain, learning, interval = COSTS[name, dataset]
    parts = parts_of(**published(name, dataset), optimizer=SGD(lr=0.01))
    policy: list[bool] = []
    learner_of(parts).policy.register_forward_hook(lambda module, inputs, output: policy.append(module.training))
    for number in (0, 1) if interval > 1 else (0,):
        learns = number % interval == 0
        wanted = Passes(*plain) + Passes(*learning) * learns
        declared = step_passes(parts.recipe, parts.progress)
        policy.clear()
        with count_passes(parts.model) as count:
            step(parts)
        assert count.per_batch(BATCH) == declared == wanted
        assert policy == ([True, False] if learns else [False])
    found = phases(parts.recipe)
    assert {round(phase.total.units, 6) for phase in found} == {AVERAGE[name, dataset]}


@pytest.mark.parametrize(
    "parts",
    [
        {"target": Natural(), "loss": Align()},
        {"target": Natural(), "loss": Align(detach=False), "weights": AWP()},
        {"loss": Trades(), "epsilon": learned(rehearsal_loss=CrossEntropy())},
        {"attack": PGD(steps=3, objective=KL())},
    ],
)
def test_with_other_strategies_it_costs_what_it_says(parts: dict[str, Any]) -> None:
    alive = parts_of(**{"epsilon": learned(), "attack": PGD(steps=3)} | parts)
    for _ in range(2):
        declared = step_passes(alive.recipe, alive.progress)
        with count_passes(alive.model) as count:
            step(alive)
        assert count.per_batch(BATCH) == declared


def test_targets_that_move_in_each_step_cost_what_it_says_at_most() -> None:
    """In the rehearsal they stay."""
    alive = parts_of(epsilon=learned(), attack=PGD(steps=3), target=Universal(), loss=Align())
    declared = step_passes(alive.recipe, alive.progress)
    with count_passes(alive.model) as count:
        step(alive)
    assert count.per_batch(BATCH).units == declared.units - (Universal().passes(alive.progress).units - 1)
