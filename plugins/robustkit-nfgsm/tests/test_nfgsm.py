"""N-FGSM: the contract of attacks, the paper's arithmetic, and life inside robustkit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from robustkit_nfgsm import NFGSM
from torch import Tensor, nn

from robustkit import UserError, load_recipe, override, px, registry
from robustkit.core.batch import Budget, Part, Passes, Progress
from robustkit.core.loop import step_passes, train_step
from robustkit.core.model import RobustModel
from robustkit.core.rng import Generator, whole
from robustkit.core.spec import from_json, to_json
from robustkit.engine import Predictor, count_passes
from robustkit.heads import Linear
from robustkit.opening import load_parts, make_world
from robustkit.runs import run
from robustkit.smoke import smoke
from robustkit.testing import check, tiny_recipe
from robustkit.threats import L2, Linf

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.py"))
EPSILON = 8 * px


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(dim=(2, 3))


@pytest.fixture
def model() -> RobustModel:
    torch.manual_seed(0)
    return RobustModel(Backbone(), Linear().build(6, 5), None).double()


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(16, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(16) % 5


def attacked(attack: NFGSM, model: RobustModel, images: tuple[Tensor, Tensor], epsilon: float = EPSILON) -> Tensor:
    x, y = images
    predict = Predictor(model, x.device)
    return attack(predict, x, y, Budget(x.new_full((16,), epsilon)), Linf(epsilon=epsilon), whole(x, 7, "attack"))


def by_the_paper(model: RobustModel, images: tuple[Tensor, Tensor], k: float, alpha: float) -> Tensor:
    """Algorithm 1 of the paper, plainly, on the same draw of noise."""
    x, y = images
    eta = (2 * whole(x, 7, "attack").uniform(x) - 1) * k * EPSILON
    start = (x + eta).clamp(0, 1).requires_grad_()
    model.train()
    F.cross_entropy(model(start).logits, y).backward()
    assert start.grad is not None
    return (start.detach() + alpha * start.grad.sign()).clamp(0, 1)


@pytest.mark.parametrize("attack", [NFGSM(), NFGSM(noise=0.5, step=0.5), NFGSM(noise=1.0, step=1.25, mode="eval")])
def test_contract(attack: NFGSM) -> None:
    check(attack)


@pytest.mark.parametrize("k", [0.0, 1.0, 2.0])
def test_equals_the_paper(model: RobustModel, images: tuple[Tensor, Tensor], k: float) -> None:
    expected = by_the_paper(model, images, k, EPSILON)
    assert torch.allclose(attacked(NFGSM(noise=k), model, images), expected, rtol=0, atol=1e-12)


def test_clipped_with_noise_of_epsilon_it_is_rs_fgsm(model: RobustModel, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    eta = (2 * whole(x, 7, "attack").uniform(x) - 1) * EPSILON
    eta = (x + eta).clamp(0, 1) - x
    eta.requires_grad_()
    model.train()
    F.cross_entropy(model(x + eta).logits, y).backward()
    assert eta.grad is not None
    delta = (eta.detach() + 1.25 * EPSILON * eta.grad.sign()).clamp(-EPSILON, EPSILON)
    rs_fgsm = (x + delta).clamp(0, 1)

    found = attacked(NFGSM(noise=1.0, step=1.25), model, images)
    clipped = Linf(epsilon=EPSILON).project(found, x, x.new_full((16,), EPSILON))
    # The box is applied before the ball here and after it there, which is the same for x in the box.
    assert torch.allclose(clipped, rs_fgsm, rtol=0, atol=1e-12)


def test_goes_beyond_epsilon_but_not_beyond_three(model: RobustModel, images: tuple[Tensor, Tensor]) -> None:
    sizes = Linf().size(attacked(NFGSM(), model, images) - images[0])
    assert (sizes > EPSILON).all()
    assert (sizes <= 3 * EPSILON + 1e-12).all()
    assert NFGSM().reach == 3


def test_without_noise_it_is_fgsm(model: RobustModel, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    model.train()
    start = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(start).logits, y), start)
    assert torch.allclose(attacked(NFGSM(noise=0.0), model, images), (x + EPSILON * gradient.sign()).clamp(0, 1))


def test_one_forward_one_input_backward(model: RobustModel, images: tuple[Tensor, Tensor]) -> None:
    with count_passes(model) as count:
        attacked(NFGSM(), model, images)
    assert count.per_batch(16) == NFGSM().passes(Progress(0, 0, 1, 1)) == Passes(forward=1, input_backward=1)


def test_mode_decides_on_statistics(model: RobustModel, images: tuple[Tensor, Tensor]) -> None:
    for mode, moved in (("train", 1), ("train-frozen", 0), ("eval", 0)):
        before = int(model.backbone.layers[1].num_batches_tracked)
        attacked(NFGSM(mode=mode), model, images)
        assert int(model.backbone.layers[1].num_batches_tracked) - before == moved


def test_in_other_norms(model: RobustModel, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    threat = L2(epsilon=0.5)
    generator = Generator(3, Part(0, 16, 16), x.device)
    found = NFGSM()(Predictor(model, x.device), x, y, Budget(x.new_full((16,), 0.5)), threat, generator)
    assert (threat.size(found - x) <= 3 * 0.5 + 1e-9).all()


def test_registered() -> None:
    assert registry("attack").get("n-fgsm") is NFGSM
    assert registry("attack").name_of(NFGSM) == "n-fgsm"


def test_listed_with_its_origin() -> None:
    command = [sys.executable, "-m", "robustkit", "list", "attack", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (entry,) = [entry for entry in json.loads(done.stdout) if entry["name"] == "n-fgsm"]
    assert entry["kind"] == "attack"
    assert entry["origin"].startswith("robustkit-nfgsm")
    assert "N-FGSM" in entry["description"]


def test_by_override() -> None:
    recipe = override(tiny_recipe(), ["attack=n-fgsm", "attack.noise=1.5", "threat.epsilon=4/255"])
    assert recipe.attack == NFGSM(noise=1.5)
    with pytest.raises(UserError, match=r"attack.*noise"):
        override(recipe, ["attack.noise=-1"])


def test_trains_a_step_at_the_declared_price() -> None:
    recipe = tiny_recipe(attack=NFGSM())
    parts = load_parts(recipe, make_world(recipe, "cpu"))
    before = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
    with count_passes(parts.model) as count:
        train_step(parts, parts.rows[:16])
    assert count.per_batch(16) == step_passes(recipe, Progress.at(0, 4, 4)) == Passes(2, 1, 1)
    assert count.per_batch(16).units == 5
    assert all(not torch.equal(p, before[name]) for name, p in parts.model.named_parameters())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(path.parents[1])))
def test_recipes_load_and_survive_json(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe.attack, NFGSM)
    assert from_json(type(recipe), json.loads(json.dumps(to_json(recipe)))) == recipe
    docstring = path.read_text(encoding="utf-8").split('"""')[1]
    for word in ("Run:", "Paper:", "Cost:", "Measured:"):
        assert word in docstring


def test_the_number_of_recipes() -> None:
    assert len(RECIPES) == 3


def test_costs_with_one_off_targets() -> None:
    recipe = load_recipe(next(path for path in RECIPES if "uiat" in path.name))
    units = {epoch: step_passes(recipe, Progress.at(epoch, 30, 1)).units for epoch in (22, 23, 24)}
    assert units == {22: 6, 23: 8, 24: 5}  # epochs 23, 24 and 25, counted from 1 (UIAT sheet 9.2)


def test_smoke(tmp_path: Path) -> None:
    recipe = smoke(load_recipe(next(path for path in RECIPES if path.parent.name == "cpu")))
    outcome = run(recipe, out=tmp_path / "run", device="cpu", max_steps=2)
    assert outcome.stopped == "steps"
    assert (tmp_path / "run" / "checkpoints" / "last.safetensors").is_file()
