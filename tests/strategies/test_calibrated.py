"""DAAT from its abstract (ECAS sheet, section 8.3): perturbations cut to where a natural network is still right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_passes import BATCH, one_step, parts_of, recipe, rows
from tiny import CLASSES, LinearModel, Plain, assert_same, images, labels, snapshot, tiny_model, world
from torch import Tensor

from robustkit import Model, Recipe, UserError, evolve, registry, resume, run, setting, spec
from robustkit.attacks import PGD, Calibrated, Friendly
from robustkit.core import checkpoint
from robustkit.core.batch import Budget, Passes, Progress
from robustkit.core.loop import step_passes, train_step
from robustkit.core.model import RobustModel
from robustkit.core.recipe import Suite, Validation
from robustkit.core.rng import whole
from robustkit.core.spec import digest, from_json, to_json
from robustkit.core.strategy import Attack
from robustkit.datasets import Synthetic
from robustkit.engine import count_passes
from robustkit.epsilons import Curriculum
from robustkit.evaluation import Clean
from robustkit.heads import Linear
from robustkit.losses import Helper, Untrained
from robustkit.runs import evaluate_run
from robustkit.smoke import smoke
from robustkit.testing import tiny_recipe
from robustkit.threats import L2, Linf

TINY = Untrained(model=Model(backbone="convnet_small"), head=Linear())
RADII = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)


pytestmark = pytest.mark.usefixtures("no_figures")


class Scripted(torch.nn.Module):
    """A helper that is right about image i where its furthest pixel has moved as far as in `right[i]`, in tenths."""

    def __init__(self, x: Tensor, y: Tensor, right: list[set[int]]) -> None:
        super().__init__()
        self.x, self.y, self.right = x, y, right
        self.calls: list[int] = []

    def forward(self, tried: Tensor) -> Tensor:
        self.calls.append(len(tried))
        assert not tried.requires_grad and tried.min() >= 0 and tried.max() <= 1
        logits = torch.zeros(len(tried), CLASSES)
        for row, image in enumerate(tried):
            i = row % len(self.x)
            moved = round(10 * float((image - self.x[i]).abs().max()))
            logits[row, (self.y[i] + (moved not in self.right[i])) % CLASSES] = 1
        return logits


def test_the_largest_radius_at_which_the_helper_is_right() -> None:
    """Right again beyond a radius where it was wrong: the largest counts. Never right: the smallest radius."""
    x, y = 0.3 + 0.4 * images(6), labels(6)  # no box within 0.3
    right = [{1, 2, 3}, {1, 2}, {1}, set(), {3}, {2}]
    wanted = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.3, 0.2])
    for radii in ((0.1, 0.2, 0.3), (0.3, 0.1, 0.2)):
        runtime = Calibrated(inner=PGD(steps=3), helper=TINY, radii=radii).build(world())
        runtime.helper = Scripted(x, y, right)
        model = LinearModel(CLASSES, x[0].numel())
        budget = Budget(torch.full((6,), 0.3), step_size=torch.full((6,), 0.3))
        found = runtime(Plain(model), x, y, budget, Linf(), whole(x, 1))
        torch.testing.assert_close((found - x).flatten(1).abs().amax(dim=1), wanted)
        inner = PGD(steps=3)(Plain(model), x, y, budget, Linf(), whole(x, 1))
        cut = wanted.view(-1, 1, 1, 1)
        torch.testing.assert_close(found, x + (inner - x).clamp(-cut, cut))
        assert runtime.helper.calls == [18]  # all radii at once


def test_no_radius_at_all_is_one_of_them() -> None:
    x, y = 0.3 + 0.4 * images(2), labels(2)
    runtime = Calibrated(helper=TINY, radii=(0.0, 0.1)).build(world())
    runtime.helper = Scripted(x, y, [set(), {0}])
    model, budget = LinearModel(CLASSES, x[0].numel()), Budget(torch.full((2,), 0.3))
    assert torch.equal(runtime(Plain(model), x, y, budget, Linf(), whole(x, 1)), x)


def one_by_one(network: Any, x: Tensor, x_adv: Tensor, y: Tensor, radii: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The sheet's definition, image by image and radius by radius."""
    result, chosen = x.clone(), torch.zeros(len(x))
    for i in range(len(x)):
        d = x_adv[i] - x[i]
        passed = []
        for e in radii:
            with torch.no_grad():
                if int(network((x[i] + d.clamp(-e, e))[None]).logits.argmax()) == int(y[i]):
                    passed.append(e)
        chosen[i] = max(passed) if passed else min(radii)
        result[i] = (x[i] + d.clamp(-chosen[i], chosen[i])).clamp(0, 1)
    return result, chosen


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_a_naive_loop(seed: int) -> None:
    count = 48
    spec_ = Calibrated(inner=PGD(steps=4), helper=TINY, radii=RADII)
    runtime = spec_.build(world(seed=seed))
    assert runtime.ready() == {"calibration": ""}
    network = runtime.helper._network[0]
    x = images(count, seed)
    with torch.no_grad():  # of its own it says the same of every image
        network.head.linear.bias -= network(x).logits.mean(dim=0)
        logits = network(x).logits
    y = logits.argmax(dim=1)
    y[::6] = logits[::6].argsort(dim=1)[:, -2]  # some that it gets wrong as they are
    # Climbs the helper itself, so that it gives way at all; of half of the images within a smaller ball.
    budget = Budget(torch.tensor([0.3, 0.01] * (count // 2)))
    before = snapshot(network)
    predict = Plain(network)
    x_adv = spec_.inner(predict, x, y, budget, Linf(), whole(x, 9))
    found = runtime(predict, x, y, budget, Linf(), whole(x, 9))
    wanted, chosen = one_by_one(network, x, x_adv, y, RADII)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert len(set(chosen.tolist())) >= 4 and float(chosen.min()) == pytest.approx(min(RADII))
    size = (found - x).flatten(1).abs().amax(dim=1)
    assert bool((size <= torch.minimum(budget.epsilon, torch.tensor(max(RADII))) + 1e-6).all())
    assert found.min() >= 0 and found.max() <= 1 and not found.requires_grad
    assert_same(before, snapshot(network))
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_the_inner_attack_keeps_its_settings_of_the_moment() -> None:
    """One that changes in training (`at`) does so inside, too; the helper is the same."""
    inner = Friendly(tau=(0, 3), switch=(0.5,))
    runtime = Calibrated(inner=inner, helper=TINY).build(world())
    late = Progress.at(9, 10, 1)
    then = runtime.at(late)
    assert then.spec.inner == inner.at(late) == Friendly(tau=(3,), switch=())
    assert then.helper is runtime.helper and runtime.spec.inner == inner
    assert then.state_dict().keys() == runtime.state_dict().keys()
    plain = Calibrated(helper=TINY).build(world())
    assert plain.at(late) is plain


# In a recipe


def daat(**changes: Any) -> Recipe:
    return recipe(attack=Calibrated(helper=TINY), **changes)


def test_a_step_costs_pgd_at_and_the_helper_s_forwards() -> None:
    parts = parts_of(daat())
    declared = step_passes(parts.recipe, parts.progress)
    counted, norms = one_step(parts)
    assert counted == declared == Passes(11 + 8, 10, 1) and norms == 1
    few = parts_of(recipe(attack=Calibrated(inner=PGD(steps=3), helper=TINY, radii=(0.01, 0.02))))
    assert one_step(few)[0] == step_passes(few.recipe, few.progress) == Passes(3 + 2 + 1, 3, 1)


def test_the_helper_is_neither_trained_nor_saved() -> None:
    parts = parts_of(daat())
    parts.strategies["attack"].ready()
    network = parts.strategies["attack"].helper._network[0]
    kept = snapshot(network)
    for _ in range(3):
        train_step(parts, rows(parts))
    assert_same(kept, snapshot(network))
    trained = {id(p) for group in parts.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in parts.model.parameters()}
    assert [key for key in parts.tensors() if key.startswith("strategies.")] == ["strategies.attack.helper.sha256"]


def test_with_a_curriculum() -> None:
    """Clean images stay clean, whatever the helper says of them."""
    given = daat(epsilon=Curriculum(rule="training"))
    parts = parts_of(given)
    with count_passes(parts.model) as count:
        train_step(parts, rows(parts))
    assert count.per_batch(BATCH) == Passes(1 + 8, 0, 1)


@spec
class Elsewhere:
    """A measure that holds an attack."""

    attack: Attack = PGD()
    key: str = "elsewhere"

    def outcomes(self, subject: Any, part: Any, seed: int, before: Any = None) -> Any:
        raise NotImplementedError


@spec
class Around:
    """An attack that holds another."""

    inner: Attack = PGD()
    steps: int = setting(default=2)
    reach: ClassVar[float] = 1.0

    def __call__(self, *arguments: Any) -> Tensor:
        return self.inner(*arguments)

    def passes(self, progress: Progress) -> Passes:
        return self.inner.passes(progress)


def test_it_can_only_be_the_attack_of_training() -> None:
    """Validation, measures and other attacks call the specification itself."""
    registry("measure").register("test-elsewhere")(Elsewhere)
    registry("attack").register("test-around")(Around)
    stateful = Calibrated(helper=TINY)
    places: dict[str, dict[str, Any]] = {
        "validation.attack": {"validation": Validation(images=4, attack=stateful)},
        "evaluation.0.measures.0.attack": {"evaluation": (Suite(measures=(Elsewhere(attack=stateful),)),)},
        "attack.inner": {"attack": Around(inner=stateful)},
    }
    for place, parts in places.items():
        with pytest.raises(UserError) as caught:
            recipe(**parts)
        assert str(caught.value).startswith(f"{place}: the attack 'calibrated' has a state"), caught.value
        assert f"{place}=pgd" in str(caught.value) and "\n" not in str(caught.value)
    assert recipe(attack=stateful, control=recipe(attack=stateful)).attack == stateful
    assert recipe(attack=Around(), evaluation=(Suite(measures=(Elsewhere(),)),)).attack == Around()


def test_refused_with_a_reason() -> None:
    with pytest.raises(UserError, match="for L-inf, the threat model is L2"):
        daat(threat=L2())
    with pytest.raises(UserError, match="at least one radius"):
        Calibrated(radii=())
    with pytest.raises(UserError, match=r"attack\.inner\.step_size: both"):
        recipe(attack=Calibrated(inner=PGD(step_size=0.01), helper=TINY), epsilon=Curriculum(rule="training"))


# The helper of a run


DATA = Synthetic(train=70, test=16, classes=4, size=8, channels=1)
NATURAL = Validation(images=12, train_images=0, attack=None)


def go(given: Recipe, out: str | Path, **options: Any) -> Any:
    return run(given, out=out, device="cpu", preflight=False, **options)


def with_helper(**helper: Any) -> Recipe:
    plain = tiny_recipe(data=DATA, epochs=2, evaluation=(Suite(measures=(Clean(),)),))
    return evolve(plain, attack=Calibrated(inner=PGD(steps=2), helper=Helper(run="helper", **helper)))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a finished natural run in it, and another one."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("helper", 1), ("another", 2)):
        go(tiny_recipe(data=DATA, attack=None, epochs=2, validation=NATURAL, seed=seed), name)
    return tmp_path


def test_a_run_with_a_helper(here: Path) -> None:
    """It says and notes which network it is, resumes with that one alone, and is judged without it."""
    sha256 = json.loads(Path("helper/checkpoints/best.json").read_text())["sha256"]
    go(with_helper(), "whole")
    assert json.loads(Path("whole/environment.json").read_text())["calibration"] == f"helper, best, sha256 {sha256}"
    go(with_helper(sha256=sha256), "parts", max_steps=3)
    shutil.move("helper", "kept")
    with pytest.raises(UserError, match="the helper's run is not there"):
        resume("parts", device="cpu")
    shutil.copytree("another", "helper")
    with pytest.raises(UserError, match="the helper is another one"):
        resume("parts", device="cpu")
    shutil.rmtree("helper")
    shutil.move("kept", "helper")
    resume("parts", device="cpu")
    one, other = (checkpoint.read(Path(f, "checkpoints/last.safetensors"))[0] for f in ("whole", "parts"))
    assert [key for key in one if key.startswith("strategies.")] == ["strategies.attack.helper.sha256"]
    assert bytes(one["strategies.attack.helper.sha256"].tolist()).hex() == sha256
    assert all(torch.equal(one[key], other[key]) for key in one)
    shutil.rmtree("helper")
    assert evaluate_run("whole", again=True, device="cpu").results["last"]["clean"]["n"] == 16


def test_smoke_runs_and_digests_need_no_helper() -> None:
    given = with_helper()
    tried = smoke(given)
    assert tried.attack == Calibrated(inner=PGD(steps=2), helper=Untrained(model=given.model, head=given.head))
    assert from_json(Recipe, json.loads(json.dumps(to_json(given)))) == given
    moved = evolve(given, attack=evolve(given.attack, helper=Helper(run="elsewhere")))
    assert digest(moved) == digest(given) != digest(tried)


def test_the_model_is_left_alone() -> None:
    model = tiny_model()
    before = snapshot(model)
    x, y = images(6), labels(6)
    runtime = Calibrated(inner=PGD(steps=2), helper=TINY).build(world())
    runtime(Plain(model), x, y, Budget(torch.full((6,), 0.1)), Linf(), whole(x, 1))
    assert_same(before, snapshot(model))
    assert isinstance(runtime.helper._network[0], RobustModel) and not list(runtime.parameters())
