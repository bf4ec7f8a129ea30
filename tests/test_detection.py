"""Rejecting what a model is not sure of: scores, thresholds, what became of images, and attacks that know of it."""

from __future__ import annotations

import itertools
import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MultivariateNormal

from robustkit import Model, Recipe, Suite, UserError, Validation, evaluate, evolve, load
from robustkit.attacks import PGD
from robustkit.core.batch import Budget, Output
from robustkit.core.errors import RecipeError, SpecError
from robustkit.core.model import RobustModel
from robustkit.core.rng import whole
from robustkit.core.spec import from_json, to_json
from robustkit.core.strategy import Outcomes, Reference, Slice
from robustkit.datasets import Digits
from robustkit.detection import Rejector, auroc, defence_success, score, shares, threshold_for
from robustkit.engine.predictor import ModulePredictor
from robustkit.evaluation import DETECTION, PGD_40, Attacked, Clean, Detection
from robustkit.evaluation.logits import judging
from robustkit.heads import GaussianMixture, Linear
from robustkit.objectives import ConfidentWrong
from robustkit.opening import load_parts, make_world
from robustkit.reporting.tables import columns, notes
from robustkit.runs import evaluate_run, run
from robustkit.testing import check, tiny_recipe
from robustkit.threats import Linf

FATES = ("classified", "detected", "falsely accepted", "falsely rejected")
B, K, SHAPE = 6, 4, (1, 8, 8)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(count: int = B, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def labels(count: int = B) -> Tensor:
    return torch.arange(count) % K


def tiny_model(seed: int = 0, *, mixture: bool = False) -> RobustModel:
    """In training mode, with running statistics that are not the trivial ones, and not unsure of everything."""
    with torch.random.fork_rng(devices=[]):
        head = GaussianMixture() if mixture else Linear()
        model = Model(backbone="convnet_small").build(head, K, SHAPE, seed).train()
        with torch.no_grad():
            for number in range(3):
                model(images(16, seed=number))
            for parameter in model.head.parameters():
                parameter.mul_(3)
    return model


def output(logits: Tensor) -> Output:
    return Output(logits, logits, logits, logits.new_zeros(len(logits)))


# Scores


def test_scores_are_largest_posteriors() -> None:
    logits = draw(0, 50, K) * torch.logspace(-3, 3, 50)[:, None].double()
    found = score(logits)
    assert found.shape == (50,) and found.dtype == torch.float32
    assert bool((found >= 1 / K).all()) and bool((found <= 1).all())
    for row, value in zip(logits.tolist(), found.tolist(), strict=True):
        weights = [math.exp(z - max(row)) for z in row]
        assert value == pytest.approx(max(weights) / sum(weights), rel=1e-5)
    assert float(score(torch.zeros(1, K))) == 1 / K and score(torch.ones(1, K).half()).dtype == torch.float32


def test_likelihoods_and_posteriors_are_those_of_unit_gaussians() -> None:
    model = tiny_model(mixture=True).eval()
    x = images()
    said = Rejector(model)(x)
    with torch.no_grad():
        features = model(x).features.double()
    centres = model.head.centres.detach().double()
    gaussians = [MultivariateNormal(centre, torch.eye(len(centre)).double()) for centre in centres]
    wanted = torch.stack([g.log_prob(features) - g.log_prob(c) for g, c in zip(gaussians, centres, strict=True)], dim=1)
    assert said.likelihoods is not None and said.likelihoods.shape == (len(x), K)
    torch.testing.assert_close(said.likelihoods.double(), wanted, atol=1e-4, rtol=1e-4)
    assert bool((said.likelihoods <= 0).all())
    torch.testing.assert_close(said.posteriors.double(), Categorical(logits=wanted).probs, atol=1e-5, rtol=1e-4)
    assert torch.equal(said.labels, wanted.argmax(dim=1))
    torch.testing.assert_close(said.scores, said.posteriors.amax(dim=1))


def test_other_heads_have_no_likelihood() -> None:
    assert Rejector(tiny_model().eval())(images()).likelihoods is None
    assert Rejector(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))(images()).likelihoods is None


def test_what_is_not_sure_enough_is_rejected() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 9.0], [math.nan, 0.0]])

    sure = 1 / (1 + math.exp(-2))
    x = torch.zeros(4, 1, 2, 2)
    assert Rejector(Fixed())(x).rejected.tolist() == [False, False, False, True]  # what is no number is never accepted
    assert Rejector(Fixed(), 0.5)(x).rejected.tolist() == [False, False, False, True]
    assert Rejector(Fixed(), sure + 1e-5)(x).rejected.tolist() == [True, True, False, True]
    assert Rejector(Fixed(), 1.01)(x).rejected.tolist() == [True] * 4


def test_the_model_stays_as_it_was() -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = Rejector(model)(images())
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(said.posteriors, Rejector(model.eval())(images()).posteriors)  # in eval mode either way
    x = images().requires_grad_()
    assert not Rejector(model)(x).scores.requires_grad and Rejector(model).scores(x).requires_grad


# Thresholds


@pytest.mark.parametrize("count", [1, 7, 20, 100])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.29, 0.5, 0.99])
def test_a_threshold_is_the_highest_that_rejects_no_more(count: int, share: float) -> None:
    scores = draw(count, count).float().sigmoid()
    if count > 7:
        scores[3] = scores[5] = scores[9]
    found = threshold_for(scores, share)
    allowed = [t for t in scores.tolist() if sum(s < t for s in scores.tolist()) <= share * count + 1e-9]
    assert found == max(allowed)
    assert int((scores < found).sum()) <= share * count + 1e-9


def test_thresholds_of_known_scores() -> None:
    scores = torch.arange(1, 101) / 100
    assert threshold_for(scores) == pytest.approx(0.06)  # 0.01 to 0.05 are rejected
    assert threshold_for(scores.flip(0), 0.1) == pytest.approx(0.11)
    assert threshold_for(scores, 0) == pytest.approx(0.01)
    assert threshold_for(torch.full((10,), 0.7), 0.5) == pytest.approx(0.7)  # none is below itself


def test_scores_that_give_no_threshold() -> None:
    for scores, share, said in (
        (torch.ones(0), 0.05, "there are none"),
        (torch.tensor([0.5, math.nan]), 0.05, "NaN"),
        (torch.ones(3), 1.0, "0, 1"),
        (torch.ones(3), -0.1, "0, 1"),
    ):
        with pytest.raises(UserError, match=said):
            threshold_for(scores, share)


# What became of images


def test_shares_count_every_image_once() -> None:
    right, accepted = torch.tensor(list(itertools.product([True, False], repeat=2)) * 3 + [(True, True)]).T
    found = shares(right, accepted)
    assert found == {name: n / 13 for name, n in zip(FATES, (4, 3, 3, 3), strict=True)}
    assert sum(found.values()) == pytest.approx(1) and defence_success(found) == pytest.approx(7 / 13)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.01])
def test_defence_success(threshold: float) -> None:
    """Without a threshold it is accuracy; beyond 1, where everything is rejected, the error rate (sheet 28)."""
    logits, y = draw(3, 200, K) * 2, torch.arange(200) % K
    right, accepted = logits.argmax(dim=1) == y, score(logits) >= threshold
    found = shares(right, accepted)
    assert sum(found.values()) == pytest.approx(1)
    accuracy = float(right.double().mean())
    success = sum(r == a for r, a in zip(right.tolist(), accepted.tolist(), strict=True)) / 200
    assert defence_success(found) == pytest.approx(success)
    if threshold == 0:
        assert success == pytest.approx(accuracy)
    if threshold > 1:
        assert success == pytest.approx(1 - accuracy)


def test_auroc_is_the_chance_that_the_natural_one_scores_higher() -> None:
    natural, adversarial = (draw(0, 30) + 0.7).round(decimals=1), draw(1, 40).round(decimals=1)
    pairs = list(itertools.product(natural.tolist(), adversarial.tolist()))
    wanted = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
    assert auroc(natural, adversarial) == pytest.approx(wanted) and 0.5 < wanted < 1
    assert any(a == b for a, b in pairs)
    assert auroc(torch.ones(3), torch.zeros(5)) == 1 and auroc(torch.ones(3), torch.ones(5)) == 0.5


# What the adaptive attack climbs


def test_confidence_in_a_wrong_class() -> None:
    objective, logits, y = ConfidentWrong(), draw(0, B, K) * 3, labels(B)
    check(objective)
    values = objective(output(logits), y, Reference())
    for row, label, value in zip(logits.tolist(), y.tolist(), values.tolist(), strict=True):
        total = sum(math.exp(z) for z in row)
        wanted = max(math.log(math.exp(z) / total) for k, z in enumerate(row) if k != label)
        assert value == pytest.approx(wanted, rel=1e-9)
    assert not objective.needs_reference


def test_its_gradient_pushes_one_wrong_class_against_all_others() -> None:
    logits = draw(1, B, K).requires_grad_()
    (gradient,) = torch.autograd.grad(ConfidentWrong()(output(logits), labels(B), Reference()).sum(), logits)
    masked = logits.detach().clone()
    masked[torch.arange(B), labels(B)] = -math.inf
    wanted = torch.nn.functional.one_hot(masked.argmax(dim=1), K) - logits.detach().softmax(dim=1)
    torch.testing.assert_close(gradient, wanted)


def test_it_goes_on_where_cross_entropy_is_flat() -> None:
    """A logit scale of 1e4 takes cross-entropy's gradient away at a sure right answer, and not this one."""
    logits = torch.tensor([[1e4, 0.0, -1e4]]).requires_grad_()
    value = ConfidentWrong()(output(logits), torch.tensor([0]), Reference())
    assert float(value.detach()) == -1e4
    assert torch.autograd.grad(value.sum(), logits)[0].tolist() == [[-1, 1, 0]]


# The measure


class Two(nn.Module):
    """Two classes and an affine map: every attack that climbs far enough ends in one known corner of the ball."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(5, 64).float() / 4)

    def forward(self, x: Tensor) -> Tensor:
        z = (x.flatten(1) - 0.5) @ self.weight
        return torch.stack([z, -z], dim=1)


def inside(count: int = 60) -> tuple[Tensor, Tensor]:
    """Images far from the box's faces, one in five with the wrong label."""
    x = 0.3 + 0.4 * images(count, seed=2)
    with torch.no_grad():
        y = Two()(x).argmax(dim=1)
    return x, torch.where(torch.arange(count) % 5 == 0, 1 - y, y)


@pytest.mark.parametrize("threshold", [0.0, 0.55, 0.7, 0.9, 1.0])
def test_a_linear_model_in_closed_form(threshold: float) -> None:
    """sigma(2 m) is the posterior of a margin m, and an attack of radius e takes e |w|_1 from it."""
    epsilon, model, (x, y) = 0.02, Two(), inside()
    w = model.weight.detach().double()
    margins = ((x.flatten(1).double() - 0.5) @ w) * torch.where(y == 0, 1, -1)
    reached = margins - epsilon * w.abs().sum()

    def fates(m: Tensor) -> dict[str, float]:
        kept = {name: 0 for name in FATES}
        for value in m.tolist():
            sure = 1 / (1 + math.exp(-2 * abs(value))) >= threshold
            kept[
                {(True, True): FATES[0], (False, False): FATES[1], (False, True): FATES[2]}.get(
                    (value > 0, sure), FATES[3]
                )
            ] += 1
        return {name: n / len(m) for name, n in kept.items()}

    found = evaluate(model, x, y, threat=Linf(epsilon=epsilon), suite=[Detection(threshold=threshold)])["detection"]
    for stage, m in (("natural", margins), ("attack", reached), ("adaptive", reached)):
        wanted = fates(m)
        wanted["defence success"] = wanted["classified"] + wanted["detected"]
        assert found.shares[stage] == pytest.approx(wanted), stage
    survives = [
        m > 0 and 1 / (1 + math.exp(-2 * m)) >= threshold and not (r < 0 and 1 / (1 + math.exp(2 * r)) >= threshold)
        for m, r in zip(margins.tolist(), reached.tolist(), strict=True)
    ]
    assert found.outcomes == survives
    assert list(found.breakdown) == ["natural", "attack", "adaptive"]
    assert found.breakdown["adaptive"] == pytest.approx(found.accuracy) == pytest.approx(sum(survives) / len(x))


def test_without_a_threshold_it_is_accuracy_under_attack() -> None:
    model, (x, y) = Two(), inside()
    suite = [Clean(), Attacked(key="same", steps=40), Detection(threshold=0.0), Detection(key="none", threshold=1.0)]
    found = evaluate(model, x, y, threat=Linf(epsilon=0.02), suite=suite)
    assert found["detection"].accuracy == found["same"].accuracy < found["clean"].accuracy
    assert found["detection"].shares["natural"]["defence success"] == pytest.approx(found["clean"].accuracy)
    assert found["none"].shares["natural"]["defence success"] == pytest.approx(1 - found["clean"].accuracy)
    assert found["none"].accuracy == 0  # whoever rejects everything is of no use


class Blank(nn.Module):
    """Says nothing where an image is dark."""

    def forward(self, x: Tensor) -> Tensor:
        z = (x.flatten(1) - 0.5).mean(dim=1, keepdim=True) * torch.tensor([[9.0, -9.0]])
        return torch.where(z < -4, math.nan, z) if not torch.is_grad_enabled() else z


def test_what_is_no_number_is_neither_right_nor_accepted() -> None:
    x, y = torch.rand(4, 1, 3, 3), torch.tensor([0, 0, 1, 1])
    x[3] = 0
    measure = Detection(threshold=0.0, steps=1)
    with judging(Blank(), Linf(epsilon=1e-6), x, exact=True) as subject:
        natural, *_ = measure.outcomes(subject, Slice(x, y), seed=0)
    assert not natural.right[3] and natural.shares["natural"]["detected"] == 0.25


def test_it_goes_on_after_every_stage() -> None:
    model, x = tiny_model(4).eval(), images(32, seed=3)
    with torch.no_grad():
        y = model(x).logits.argmax(dim=1)
    measure = Detection(threshold=0.3, steps=3, restarts=2)
    with judging(model, Linf(epsilon=0.08), x) as subject:
        every = list(measure.outcomes(subject, Slice(x, y), seed=1))
        assert [list(found.breakdown)[-1] for found in every] == ["natural", "attack", "adaptive"]
        rights = [int(found.right.sum()) for found in every]
        assert rights == sorted(rights, reverse=True) and len(set(rights)) == 3  # each stage takes images away
        for number, before in enumerate(every):
            again = list(measure.outcomes(subject, Slice(x, y), 1, Outcomes(before.right.clone(), *before[1:])))
            assert len(again) == 2 - number
            for one, other in zip(again, every[number + 1 :], strict=True):
                assert torch.equal(one.right, other.right) and one[1:] == other[1:]


def test_the_measure_says_what_it_costs() -> None:
    passes = Detection(steps=10, restarts=3).passes("Linf", 10)
    assert (passes.forward, passes.input_backward) == (1 + 4 * 11, 40)
    assert from_json(Suite, to_json(DETECTION)) == DETECTION


def test_a_threshold_there_must_be() -> None:
    model, (x, y) = Two(), inside()
    with pytest.raises(SpecError, match=r"detection.*no threshold.*threshold_for"):
        evaluate(model, x, y, suite=DETECTION)
    with pytest.raises(RecipeError, match=r"no images are held out.*validation\.images"):
        tiny_recipe(evaluation=(DETECTION,), validation=Validation(images=0))
    fixed = Suite(measures=(Detection(threshold=0.6),))
    assert tiny_recipe(evaluation=(fixed,), validation=Validation(images=0)).measures()
    with pytest.raises(SpecError, match="at most 1"):
        Detection(threshold=1.5)


# A run


def mixture_recipe(**parts: Any) -> Recipe:
    return tiny_recipe(
        data=Digits(),
        head=GaussianMixture(),
        threat=Linf(epsilon=0.1),
        attack=PGD(steps=3),
        epochs=5,
        batch_size=64,
        validation=Validation(images=100, train_images=0, attack=PGD(steps=1)),
        **parts,
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, adversarially trained run with a mixture head, judged with and without a threshold of its own."""
    fixed = Detection(key="fixed", threshold=0.6, steps=10)
    suite = Suite(images=120, measures=(Clean(), Detection(steps=10), fixed))
    folder = tmp_path_factory.mktemp("digits") / "run"
    with torch.random.fork_rng(devices=[]):
        run(mixture_recipe(evaluation=(suite,)), out=folder, device="cpu")
    return folder


def test_a_run_finds_its_threshold_on_held_out_images(digits: Path) -> None:
    results = json.loads((digits / "results.json").read_text())["last"]
    found = results["detection"]
    assert list(found["breakdown"]) == list(found["shares"]) == ["natural", "attack", "adaptive"]
    for shares_ in found["shares"].values():
        assert sum(shares_[name] for name in FATES) == pytest.approx(1)
    recipe = mixture_recipe()
    parts = load_parts(recipe, make_world(recipe, "cpu"))
    held_out = parts.train.fetch(parts.validation_rows).float() / 255
    threshold = threshold_for(Rejector(load(digits))(held_out).scores)
    (note,) = found["notes"]
    assert float(re.search(r"posterior of (\S+)", note)[1]) == pytest.approx(threshold, rel=1e-4)
    assert "0.6" in results["fixed"]["notes"][0]
    natural = found["shares"]["natural"]
    assert natural["detected"] + natural["falsely rejected"] < 0.15  # 5 % of the held-out ones, and luck
    assert found["breakdown"]["natural"] == pytest.approx(natural["classified"])
    assert results["clean"]["accuracy"] == pytest.approx(natural["classified"] + natural["falsely rejected"])


def test_eval_measures_it_of_any_run(digits: Path) -> None:
    outcome = evaluate_run(digits, suite="detection", keys=["detection"], limit=20, checkpoints=("last",), device="cpu")
    assert outcome.results["last"]["detection"]["n"] == 20


def test_the_table_shows_it_with_and_without_the_adaptive_attack(digits: Path) -> None:
    text = "\n".join(notes(columns("model", json.loads((digits / "results.json").read_text()))))
    assert re.search(r"detection, accuracy after natural [\d.]+, attack [\d.]+, adaptive [\d.]+\.", text)
    assert re.search(r"detection, adaptive: defence success [\d.]+, classified [\d.]+, detected", text)


def test_the_adaptive_attack_is_surer_and_gets_past_more(digits: Path) -> None:
    """On a network that was trained against PGD, where images of low confidence are many."""
    model = load(digits)
    data = Digits().load().test
    x, y = data.pixels[:120].float() / 255, data.labels[:120]
    threat = Linf(epsilon=0.1)
    budget = Budget(epsilon=torch.full((len(x),), threat.epsilon))

    def wrong(attack: PGD) -> Tensor:
        x_adv = attack(ModulePredictor(model), x, y, budget, threat, whole(x, 0))
        posteriors = Rejector(model)(x_adv).posteriors
        return posteriors.scatter(1, y[:, None], 0).amax(dim=1)

    plain, adaptive = wrong(PGD(steps=20)), wrong(PGD(steps=20, objective=ConfidentWrong()))
    assert float(adaptive.mean()) > float(plain.mean())
    threshold = float(plain.quantile(0.9))
    found = evaluate(model, x, y, threat=threat, suite=[Detection(threshold=threshold, steps=20)])["detection"]
    before, after = found.shares["attack"], found.shares["adaptive"]
    assert after["falsely accepted"] > before["falsely accepted"]
    assert after["defence success"] < before["defence success"]
    assert found.breakdown["adaptive"] < found.breakdown["attack"]


def test_restarts_and_knowledge_only_take_away(digits: Path) -> None:
    """More random points let no fewer wrong images be accepted; who knows the detector may do as who does not."""
    data = Digits().load().test
    x, y = data.pixels.float() / 255, data.labels
    measures = [Detection(threshold=0.5, steps=2, restarts=n) for n in (1, 2, 6)]  # six begin as one does
    model, threat = load(digits), Linf(epsilon=0.15)
    found = [evaluate(model, x, y, threat=threat, suite=[measure])["detection"] for measure in measures]
    for stage in ("attack", "adaptive"):
        past = [one.shares[stage]["falsely accepted"] for one in found]
        assert past[0] <= past[1] <= past[2] and past[0] < past[2]
    for one in found:
        plain, knowing = one.shares["attack"], one.shares["adaptive"]
        assert plain["falsely accepted"] < knowing["falsely accepted"]
        assert knowing["defence success"] < plain["defence success"]
        for fate in FATES[:2] + FATES[3:]:
            assert knowing[fate] <= plain[fate]
        assert sum(knowing[fate] for fate in FATES) == pytest.approx(1)


def test_numbers_are_float32(digits: Path) -> None:
    said = Rejector(load(digits))(images(3))
    assert said.likelihoods is not None
    assert {said.scores.dtype, said.posteriors.dtype, said.likelihoods.dtype} == {torch.float32}


# Its page


def test_the_page_s_examples_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "detection.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    examples = [block for block in blocks if "\nmodel = " in block]  # the other one wants a run: test_docs_commands
    assert len(examples) == 2
    for example in examples:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            path = tmp_path / "example.py"
            path.write_text(example, encoding="utf-8")
            runpy.run_path(str(path))
        assert capsys.readouterr().out
    for share in (*FATES, "defence success"):
        assert f"`{share}`" in page


def test_the_ready_made_ones() -> None:
    assert [measure.key for measure in DETECTION.measures] == ["clean", "detection"]
    assert DETECTION.measures[1] == evolve(Detection(), steps=PGD_40.steps)
