"""Transfer: against a naive loop, against white-box numbers, and with surrogates that are not what they should be."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustkit import Model, Suite, UserError, evolve, loading, override, px, run
from robustkit.attacks import MIFGSM, PGD, RSFGSM, Calibrated, Within
from robustkit.cli.main import main
from robustkit.core.errors import SpecError
from robustkit.core.model import RobustModel
from robustkit.core.recipe import Recipe, Validation, rehearsed, result_key
from robustkit.core.spec import flatten, from_json, to_json
from robustkit.core.strategy import Measure
from robustkit.core.world import World
from robustkit.datasets import Digits, Synthetic
from robustkit.evaluation import PGD_20, Attacked, Clean, Transfer, evaluate, ldat_transfer, transfer
from robustkit.heads import Linear
from robustkit.losses import Helper, Untrained
from robustkit.published import load
from robustkit.runs import evaluate_run
from robustkit.smoke import smoke
from robustkit.testing import tiny_recipe
from robustkit.threats import L2, Linf

DATA = Synthetic(train=70, test=16, classes=4, size=8, channels=1)
UNTRAINED = Untrained(model=Model(backbone="convnet_small"), head=Linear())
WORLD = World(samples=0, training=0, classes=4, image_shape=(1, 8, 8))


@pytest.fixture(autouse=True)
def nothing_loaded() -> None:
    transfer._loaded.cache_clear()


pytestmark = pytest.mark.usefixtures("no_figures")


class Logits(nn.Module):
    """A network of ours as anybody's module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).logits


def network(noise: float = 0.0) -> RobustModel:
    """Untrained, but no class wins everywhere; those with noise are alike."""
    made = loading.fresh(UNTRAINED.model, UNTRAINED.head, 4, (1, 8, 8)).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        made.head.linear.bias -= made(torch.rand(64, 1, 8, 8)).logits.mean(dim=0)
        for parameter in made.parameters():
            parameter += noise * parameter.abs().mean() * torch.randn_like(parameter)
    return made


@pytest.fixture
def surrogate(monkeypatch: pytest.MonkeyPatch) -> RobustModel:
    """The network that `UNTRAINED` stands for in this test."""
    made = network()
    monkeypatch.setattr(Untrained, "network", lambda self, world: (copy.deepcopy(made), ""))
    return made


def other_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)).eval()


def case(model: nn.Module, count: int = 32) -> tuple[Tensor, Tensor]:
    """Random images; three in four are labelled as the model sees them."""
    torch.manual_seed(1)
    x = torch.rand(count, 1, 8, 8)
    with torch.no_grad():
        logits = model(x)
    return x, torch.where(torch.arange(count) % 4 == 3, logits.argmin(dim=1), logits.argmax(dim=1))


def outcomes(measure: Measure, model: nn.Module, x: Tensor, y: Tensor, threat: Any, **options: Any) -> list[bool]:
    options = {"exact": True, "preflight": False, "batch_size": 8} | options
    return evaluate(model, x, y, threat=threat, suite=[measure], **options)[measure.key].outcomes


# What it says


def test_against_a_naive_loop(surrogate: RobustModel) -> None:
    """Signs of the surrogate's gradients, one image at a time; the model sees the results alone."""
    model, epsilon = Logits(network(noise=0.1)), 0.01
    x, y = case(model)
    expected = []
    for image, label in zip(x.split(1), y.split(1), strict=True):
        x_adv = image.clone()
        for _ in range(5):
            x_adv = x_adv.detach().requires_grad_()
            F.cross_entropy(surrogate(x_adv).logits, label).backward()
            assert x_adv.grad is not None
            x_adv = (x_adv.detach() + 0.003 * x_adv.grad.sign()).clamp(image - epsilon, image + epsilon).clamp(0, 1)
        with torch.no_grad():
            expected.append(bool(model(image).argmax() == label and model(x_adv).argmax() == label))
    measure = Transfer(surrogate=UNTRAINED, attack=PGD(steps=5, step_size=0.003, start="clean"))
    assert outcomes(measure, model, x, y, Linf(epsilon=epsilon)) == expected
    assert 0 < sum(expected) < 24


ATTACKS = [
    (PGD(steps=5, start="clean"), {"steps": 5}),
    (RSFGSM(noise=0.0, step=1.0, mode="eval"), {"steps": 1, "step_size": 0.004}),
    (MIFGSM(steps=5, decay=0.0, step_size=0.001), {"steps": 5}),
]


@pytest.mark.parametrize(("attack", "settings"), ATTACKS)
def test_a_model_as_its_own_surrogate_is_a_white_box(
    attack: Any, settings: dict[str, Any], surrogate: RobustModel
) -> None:
    model = Logits(surrogate)
    x, y = case(model)
    threat = Linf(epsilon=0.004)
    found = outcomes(Transfer(surrogate=UNTRAINED, attack=attack), model, x, y, threat)
    assert found == outcomes(Attacked(start="clean", **settings), model, x, y, threat)
    assert found != outcomes(Clean(), model, x, y, threat)


def test_examples_stay_in_the_ball_and_do_not_depend_on_the_model() -> None:
    """Whatever the attack returns; and an image that is wrong as it is stays wrong."""
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.detach().clone())
            return self.inner(images)

    x, y = case(other_net(), 8)
    measure = Transfer(surrogate=UNTRAINED, attack=Within(threat=Linf(epsilon=0.5), inner=PGD(steps=3)))
    made = []
    for model in (other_net(), Logits(network())):
        seen.clear()
        found = outcomes(measure, Watching(model), x, y, Linf(epsilon=0.05))
        clean = outcomes(Clean(), model, x, y, Linf())
        assert all(right or not robust for right, robust in zip(clean, found, strict=True))
        made.append(seen[-1])
    assert torch.equal(made[0], made[1]) and 0.04 < (made[0] - x).abs().max() <= 0.05 + 1e-6
    assert made[0].min() >= 0 and made[0].max() <= 1


def test_the_surrogate_stays_as_it_was() -> None:
    model = other_net()
    x, y = case(model)
    state = torch.random.get_rng_state()
    first, second = (outcomes(Transfer(surrogate=UNTRAINED), model, x, y, L2(epsilon=0.5)) for _ in range(2))
    assert first == second and torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_black_box_takes_less_than_a_white_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two natural networks for the digits that saw other batches; but it does take something."""
    data = Digits().load()
    train = data.train.fetch(torch.arange(len(data.train))) / 255
    x, y = data.test.fetch(torch.arange(120)) / 255, data.test.labels[:120]
    world = World(samples=0, training=0, classes=10, image_shape=data.train.shape)
    networks = []
    for seed in (0, 1):
        network = UNTRAINED.network(world)[0].train()
        torch.manual_seed(seed)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
        for _ in range(100):
            rows = torch.randint(len(train), (128,))
            optimizer.zero_grad()
            F.cross_entropy(network(train[rows]).logits, data.train.labels[rows]).backward()
            optimizer.step()
        networks.append(network.eval())
    monkeypatch.setattr(Untrained, "network", lambda self, world: (networks[1], ""))
    suite = [Clean(), PGD_20, Transfer(surrogate=UNTRAINED, attack=PGD(steps=20))]
    found = evaluate(Logits(networks[0]), x, y, threat=Linf(epsilon=0.1), suite=suite)
    assert found["pgd-20"].accuracy < found["transfer-pgd-40"].accuracy < found["clean"].accuracy


# Surrogates that are runs


def recipe(**changes: Any) -> Recipe:
    held_out = Validation(images=12, train_images=0, attack=None)
    return tiny_recipe(**{"data": DATA, "epochs": 2, "evaluation": (), "validation": held_out, **changes})


def go(given: Recipe, out: str | Path, **options: Any) -> Any:
    return run(given, out=out, device="cpu", preflight=False, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three finished runs."""
    folder = tmp_path_factory.mktemp("surrogates")
    go(recipe(attack=None, seed=1), folder / "natural")
    go(recipe(seed=2), folder / "robust")
    go(recipe(seed=3, evaluation=(Suite(measures=(Clean(),)),)), folder / "judged")
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with all of them in it."""
    for name in ("natural", "robust", "judged"):
        shutil.copytree(trained / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sha256_of(folder: str, name: str = "best") -> str:
    return str(json.loads(Path(folder, "checkpoints", f"{name}.json").read_text())["sha256"])


def test_a_run_is_judged_on_examples_of_others(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says which they were; what was there before is kept; it stands beside the paper's row."""
    suites = ldat_transfer(Helper(run="natural"), Helper(run="robust", checkpoint="last"))
    outcome = evaluate_run("judged", suite=suites, device="cpu")
    results = json.loads(Path("judged/results.json").read_text())["last"]
    assert outcome.results["last"] == results and "clean" in results
    for name, said in (("undefended", "natural, best"), ("defended", "robust, last")):
        digest = sha256_of(*said.split(", "))
        for attack in ("fgsm", "mi-fgsm", "pgd-40"):
            found = results[f"{name}/transfer-{attack}"]
            assert found["notes"] == [f"the examples were made on {said}, sha256 {digest}"]
            assert found["n"] == 16 and found["accuracy"] <= results["clean"]["accuracy"]
    capsys.readouterr()
    assert main(["compare", "judged", "--paper", "ldat-table4", "--row", "LDAT", "--json"]) == 0
    (beside,) = json.loads(capsys.readouterr().out)["runs"]
    published = {entry["key"]: entry["published"] for entry in beside["measures"] if entry["checkpoint"] != "best"}
    assert len(published) == 6 and published["defended/transfer-pgd-40"] == 0.6716


def test_an_exported_model_serves_as_well(here: Path) -> None:
    assert main(["export", "natural", "--to", "safetensors", "--checkpoint", "best", "--out", "exported"]) == 0
    model = other_net()
    x, y = case(model)
    by_run, by_export = (
        outcomes(Transfer(surrogate=Helper(run=folder)), model, x, y, Linf(epsilon=0.1))
        for folder in ("natural", "exported")
    )
    assert by_run == by_export


def test_the_digest_of_the_surrogate_is_filled_in(here: Path) -> None:
    measure = Transfer(surrogate=Helper(run="natural"))
    ready = measure.ready(Linf(), WORLD)
    assert ready == evolve(measure, surrogate=Helper(run="natural", sha256=sha256_of("natural")))
    assert ready.ready(Linf(), WORLD) == ready
    untrained = Transfer(surrogate=UNTRAINED)
    assert untrained.ready(Linf(), WORLD) == untrained


def test_gone_on_with_after_a_stop(here: Path) -> None:
    model = other_net()
    x, y = case(model)
    measure = Transfer(surrogate=Helper(run="natural"), attack=PGD(steps=3))
    options: dict[str, Any] = {"threat": Linf(epsilon=0.2), "suite": [measure], "batch_size": 8, "preflight": False}
    whole = evaluate(model, x, y, **options)[measure.key]

    def stopped_after_a_slice(folder: str) -> None:
        stops = iter([False, True])
        assert len(evaluate(model, x, y, folder=folder, should_stop=lambda: next(stops), **options)) == 0

    def total(folder: str) -> tuple[list[bool], int]:
        told: list[int] = []
        found = evaluate(model, x, y, folder=folder, watch=lambda _, news: told.append(news.total), **options)
        return found[measure.key].outcomes, told[0]

    stopped_after_a_slice("same")
    assert total("same") == (whole.outcomes, 24)
    stopped_after_a_slice("another")
    shutil.rmtree("natural")
    Path("robust").rename("natural")  # what was judged before the stop was judged by another one's examples
    assert total("another") == (evaluate(model, x, y, **options)[measure.key].outcomes, 32)


@pytest.mark.parametrize(
    ("helper", "said"),
    [
        (
            {"run": "nowhere", "made_by": "recipes/natural.py"},
            "nowhere: .*robustkit run recipes/natural.py --out nowhere",
        ),
        ({"run": "natural", "sha256": 64 * "a"}, f"natural: .*not {64 * 'a'}"),
        ({"run": "unfinished"}, "unfinished: .* stands at epoch 1 of 2; robustkit resume unfinished"),
        ({"run": "others"}, "others: .* for 5 classes of .*, the data have 4 of"),
    ],
)
def test_surrogates_that_cannot_serve(helper: dict[str, str], said: str, here: Path) -> None:
    if helper["run"] == "unfinished":
        go(recipe(attack=None), "unfinished", max_steps=4)
    if helper["run"] == "others":
        go(recipe(data=Synthetic(train=70, test=16, classes=5, size=8, channels=1), attack=None, epochs=1), "others")
    measure = Transfer(surrogate=Helper(**helper))
    model, told = other_net(), []
    x, y = case(model)
    with pytest.raises(UserError, match=said):
        evaluate(model, x, y, suite=[Clean(), measure], watch=lambda key, _: told.append(key))
    assert told == []
    asks = evolve(recipe(), evaluation=(Suite(measures=(Clean(), measure)),))
    with pytest.raises(UserError, match=said):  # before it trains, not after
        go(asks, "run")
    assert not Path("run").exists()


def test_one_line_on_the_command_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asks = evolve(recipe(), evaluation=(Suite(measures=(Transfer(surrogate=Helper(run="nowhere")),)),))
    Path("asks.json").write_text(json.dumps(to_json(asks)))
    assert main(["run", "asks.json", "--device", "cpu", "--quiet", "--out", "run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: nowhere: ")


# Settings


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (RSFGSM(), "attacks in mode 'train'"),
        (Within(inner=PGD(mode="train-frozen")), "Transfer.attack: attacks in mode 'train-frozen'"),
        (Calibrated(), "has a state"),
    ],
)
def test_attacks_that_would_change_the_surrogate_are_refused(attack: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Transfer(attack=attack)


def test_it_is_a_value() -> None:
    for measure in (Transfer(), Transfer(key="a", surrogate=UNTRAINED, attack=MIFGSM(), images=5)):
        assert from_json(Measure, to_json(measure)) == measure and len({measure, copy.copy(measure)}) == 1
    assert Transfer().surrogate == Helper(run="runs/surrogate", made_by="recipes/natural.py")
    given = evolve(recipe(), evaluation=(Suite(measures=(Transfer(),)),))
    words = ["evaluation.0.measures.0.surrogate.run=mine", "evaluation.0.measures.0.attack=mi-fgsm"]
    (_, measure), *_ = override(given, words).measures()
    assert measure == Transfer(surrogate=Helper(run="mine", made_by="recipes/natural.py"), attack=MIFGSM())
    passes = Transfer(attack=MIFGSM(steps=7)).passes("Linf", 10)
    assert (passes.forward, passes.input_backward) == (9, 7)


def test_a_rehearsal_takes_an_untrained_network(tmp_path: Path) -> None:
    given = evolve(recipe(), evaluation=ldat_transfer(Helper(run="nowhere"), Helper(run="nowhere")))
    untrained = Untrained(model=given.model, head=given.head)
    assert {measure.surrogate for _, measure in rehearsed(given).measures()} == {untrained}
    results = go(smoke(given), tmp_path / "run", rehearse=True, max_steps=2).results["last"]
    assert len(results) == 6 and all("notes" not in entry for entry in results.values())


@pytest.mark.parametrize("number", [4, 5])
def test_the_columns_of_the_paper(number: int) -> None:
    suites = ldat_transfer(Helper(run="natural"), Helper(run="robust"))
    measures = {result_key(suite, measure): (suite, measure) for suite in suites for measure in suite.measures}
    columns = load(f"ldat-table{number}").columns
    assert {column.key for column in columns} == measures.keys()
    for column in columns:
        suite, measure = measures[column.key]
        assert measure.surrogate.run == ("natural" if suite.name == "undefended" else "robust")
        facts = flatten(to_json(measure) | {"threat": to_json(suite.threat)})
        for path, expected in column.settings.items():
            assert facts[path] == (pytest.approx(expected) if isinstance(expected, float) else expected)
    table = load(f"ldat-table{number}")
    for row in table.rows:  # near the clean accuracy where the surrogate is undefended: the footnotes say the opposite
        for attack in ("fgsm", "mi-fgsm", "pgd-40"):
            assert row.values[f"undefended/transfer-{attack}"] - row.values[f"defended/transfer-{attack}"] > 12
    assert measures["defended/transfer-pgd-40"][1].attack == PGD(steps=40, step_size=2 * px)
