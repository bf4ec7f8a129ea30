"""Models that leave their run: loaded without data, handed on as safetensors, contributed to RobustBench."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import robustkit
from robustkit import Model, Recipe, Suite, UserError, digest, evolve, load_recipe
from robustkit.cli.main import main
from robustkit.core import checkpoint
from robustkit.core.recipe import Validation
from robustkit.core.registry import registry
from robustkit.core.spec import from_json
from robustkit.datasets import Cifar10, Digits, ImageFolder, Synthetic
from robustkit.datasets.cifar import CIFAR10_CLASSES
from robustkit.engine import Predictor
from robustkit.evaluation import AutoAttack, Clean
from robustkit.export import export
from robustkit.export.robustbench import FILL_IN
from robustkit.folder import read_outcomes
from robustkit.heads import GaussianMixture
from robustkit.loading import load
from robustkit.opening import load_parts, make_world, restore
from robustkit.runs import run
from robustkit.testing import tiny_recipe
from robustkit.threats import L2
from robustkit.weights import Exponential

QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 32, "validation": Validation(images=8, train_images=0)}
RECIPE = '''"""A head of its own."""

import attrs
from torch import nn
from robustkit import registry, setting, spec
from robustkit.core.batch import Output
from robustkit.testing import tiny_recipe


class Module(nn.Module):
    def __init__(self, width, classes, scale):
        super().__init__()
        self.scale, self.weight = scale, nn.Linear(width, classes, bias=False)

    def forward(self, features, y=None):
        logits = self.scale * self.weight(features)
        return Output(logits, logits, features, features.new_zeros(len(features)))


@registry("head").register("test-scaled")
@spec
class Scaled:
    scale: float = setting(default=3.0)

    def build(self, width, classes):
        return Module(width, classes, self.scale)

    def penalty_weight(self, progress):
        return 0.0

    def parameter_options(self):
        return {}


recipe = tiny_recipe(head=Scaled(), epochs=1)
'''


def made(folder: Path, recipe: Recipe) -> Path:
    with torch.random.fork_rng(devices=[]):
        run(recipe, out=folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an average, a mixture head and results, for reading."""
    recipe = tiny_recipe(
        data=Digits(),
        head=GaussianMixture(),
        average=Exponential(rate=0.9),
        evaluation=(Suite(measures=(Clean(),)),),
        **QUICK | {"epochs": 2, "batch_size": 256},
    )
    return made(tmp_path_factory.mktemp("digits") / "run", recipe)


@pytest.fixture
def spoilt(digits: Path, tmp_path: Path) -> Path:
    """The same, for spoiling."""
    return Path(shutil.copytree(digits, tmp_path / "spoilt"))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on something that passes for CIFAR-10, normalised, with an evaluation in two balls."""
    root = tmp_path_factory.mktemp("cifar")
    pictures(root / "data", CIFAR10_CLASSES, 32)
    recipe = tiny_recipe(
        data=Cifar10(root=str(root / "data")),
        model=Model(backbone="convnet_small", normalization="cifar10"),
        validation=Validation(images=0, train_images=0),
        epochs=1,
        batch_size=20,
    )
    folder = made(root / "run 1", recipe)
    judged = evolve(recipe, evaluation=(Suite(measures=(Clean(), AutoAttack())), Suite(name="l2", threat=L2())))
    rewrite(folder, judged)
    return folder


def pictures(root: Path, classes: tuple[str, ...], size: int) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 1)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")


def rewrite(folder: Path, recipe: Recipe) -> None:
    """The run as if it had been trained with `recipe`, which differs in what does not matter for the weights."""
    from robustkit.core.recipe import save_recipe
    from robustkit.core.spec import to_json

    save_recipe(recipe, folder / "recipe.json")
    for path in (folder / "checkpoints").glob("*.safetensors"):
        tensors, facts = checkpoint.read(path)
        checkpoint.write(path, tensors, facts | {"recipe": to_json(recipe), "digest": digest(recipe)})


def own_logits(folder: Path, name: str, images: Tensor) -> Tensor:
    """What the run itself says of images."""
    recipe = load_recipe(folder / "recipe.json")
    parts = load_parts(recipe, make_world(recipe, "cpu"))
    restore(parts, folder / "checkpoints" / f"{name}.safetensors", weights_only=True)
    with torch.no_grad(), Predictor(parts.final, torch.device("cpu")).using("eval") as predict:
        return predict(images).logits


def some(shape: tuple[int, int, int], count: int = 12) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(5))


def entry(accuracy: float, n: int, **more: Any) -> dict[str, Any]:
    return {"accuracy": accuracy, "n": n, "ci95": [accuracy - 0.01, accuracy + 0.01], "seconds": 1.0} | more


def with_results(folder: Path, results: dict[str, Any], to: Path) -> Path:
    """A copy of a run that has measured `results` of its last checkpoint."""
    copy = Path(shutil.copytree(folder, to))
    (copy / "results.json").write_text(json.dumps({"last": results}))
    return copy


def fails(capsys: pytest.CaptureFixture[str], words: list[str], *said: str) -> None:
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and len(lines) == 1 and lines[0].startswith("error: "), captured.err
    for text in said:
        assert text in lines[0]


# Loading


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_loaded_model_says_what_its_run_says(digits: Path, name: str) -> None:
    before = torch.get_rng_state()
    model = load(digits, name)
    assert torch.equal(torch.get_rng_state(), before)
    images = some((1, 8, 8))
    logits = model(images)
    assert torch.equal(logits, own_logits(digits, name, images)) and logits.dtype == torch.float32
    assert isinstance(model, nn.Module) and not any(module.training for module in model.modules())
    assert logits.requires_grad and all(parameter.requires_grad for parameter in model.parameters())
    assert model.classes == tuple("0123456789") and model.image_shape == (1, 8, 8)
    assert model.recipe["head"]["name"] == "gaussian-mixture" and model.facts["checkpoint"] == name
    assert from_json(Recipe, model.recipe) == load_recipe(digits / "recipe.json")


def test_averaged_weights_are_loaded(digits: Path) -> None:
    tensors, _ = checkpoint.read(digits / "checkpoints" / "last.safetensors")
    state = load(digits).network.state_dict()
    for key, tensor in state.items():
        assert torch.equal(tensor, tensors[f"average.{key}"]), key
    assert any(not torch.equal(tensor, tensors[f"model.{key}"]) for key, tensor in state.items())


def test_robustkit_has_it_by_name(digits: Path) -> None:
    assert robustkit.load is load
    assert torch.equal(robustkit.load(str(digits), device="cpu")(some((1, 8, 8))), load(digits)(some((1, 8, 8))))


@pytest.mark.parametrize("size", [None, 8])
def test_the_data_may_be_gone(tmp_path: Path, size: int | None) -> None:
    """Neither its images nor, for image folders, the names and number of its classes are asked for again."""
    pictures(tmp_path / "data", ("ant", "bee", "cat"), 8)
    recipe = tiny_recipe(data=ImageFolder(root=str(tmp_path / "data"), size=size), epochs=1, batch_size=4)
    recipe = evolve(recipe, validation=Validation(images=2, train_images=0))
    folder = made(tmp_path / "run", recipe)
    images = some((3, 8, 8))
    wanted = own_logits(folder, "last", images)
    shutil.rmtree(tmp_path / "data")
    for path in (folder, export(folder, "safetensors").folder):
        model = load(path)
        assert model.classes == ("ant", "bee", "cat") and model.image_shape == (3, 8, 8)
        assert torch.equal(model(images), wanted)


def test_older_checkpoints_ask_the_data(spoilt: Path, tmp_path: Path) -> None:
    def forget(folder: Path) -> None:
        path = folder / "checkpoints" / "last.safetensors"
        tensors, facts = checkpoint.read(path)
        del facts["classes"], facts["image_shape"]
        checkpoint.write(path, tensors, facts)

    forget(spoilt)
    assert load(spoilt).classes == tuple("0123456789")
    pictures(tmp_path / "data", ("ant", "bee", "cat"), 8)
    recipe = tiny_recipe(data=ImageFolder(root=str(tmp_path / "data")), epochs=1, batch_size=4)
    folder = made(tmp_path / "run", evolve(recipe, validation=Validation(images=2, train_images=0)))
    forget(folder)
    assert load(folder).classes == ("ant", "bee", "cat")


def test_pretrained_weights_are_not_fetched_again(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    asked = []
    create = timm.create_model

    def watched(name: str, **options: Any) -> nn.Module:
        asked.append(options["pretrained"])
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", watched)
    recipe = load_recipe(spoilt / "recipe.json")
    rewrite(spoilt, evolve(recipe, model=evolve(recipe.model, pretrained=True)))
    assert torch.equal(load(spoilt)(some((1, 8, 8))), load(spoilt)(some((1, 8, 8))))
    assert asked and not any(asked)


def test_a_loaded_model_can_be_attacked_and_tuned(digits: Path) -> None:
    model = load(digits)
    images = some((1, 8, 8)).requires_grad_()
    model(images).logsumexp(dim=1).sum().backward()
    assert images.grad is not None and bool(images.grad.abs().sum() > 0)
    before = model(images.detach())
    model.train()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval()
    assert not torch.equal(model(images.detach()), before)


def test_a_head_of_the_recipe_s_own_comes_from_its_file(tmp_path: Path) -> None:
    """The run's copy of the file is executed, which defines it; without the file one line says what is missing."""
    source = tmp_path / "own.py"
    source.write_text(RECIPE)
    with torch.random.fork_rng(devices=[]):
        run(load_recipe(source), out=tmp_path / "run", source=source, device="cpu")
    images = some((1, 8, 8))
    wanted = own_logits(tmp_path / "run", "last", images)

    def forget() -> None:
        heads = registry("head")
        del heads._names[heads._classes.pop("test-scaled")]

    forget()
    assert torch.equal(load(tmp_path / "run")(images), wanted)
    (tmp_path / "run" / "recipe.py").unlink()
    assert torch.equal(load(tmp_path / "run")(images), wanted)  # it is known now
    forget()
    with pytest.raises(UserError, match="unknown head 'test-scaled'"):
        load(tmp_path / "run")


def test_nothing_runs_that_the_model_does_not_need(spoilt: Path) -> None:
    """A run's file is left alone where robustkit has its head and backbone; so are other strategies it may name."""
    (spoilt / "recipe.py").write_text("raise SystemExit('executed')\n")
    path = spoilt / "checkpoints" / "last.safetensors"
    tensors, facts = checkpoint.read(path)
    facts["recipe"]["loss"] = {"name": "not-installed"}
    checkpoint.write(path, tensors, facts)
    load(spoilt)


# Mistakes


def test_what_is_no_model(tmp_path: Path, digits: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="neither a run nor an exported model"):
            load(path)
    with pytest.raises(UserError, match=r"no checkpoint 'bst'.*did you mean 'best'"):
        load(digits, "bst")
    with pytest.raises(UserError, match="device 'gpu'"):
        load(digits, device="gpu")


def test_a_missing_checkpoint_names_those_there(cifar: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint 'best'; it has: last"):  # nothing was held out
        load(cifar, "best")


def flipped(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_tampered_files_are_found(spoilt: Path, tmp_path: Path) -> None:
    out = export(spoilt, "safetensors", out=tmp_path / "out").folder
    flipped(out / "model.safetensors")
    with pytest.raises(UserError, match="checksum"):
        load(out)
    flipped(out / "model.safetensors")
    load(out)
    facts = (out / "model.json").read_text()
    (out / "model.json").write_text(facts.replace('"0"', '"zero"'))
    with pytest.raises(UserError, match=r"model\.json: does not say what model\.safetensors says"):
        load(out)
    (out / "model.json").write_text("{")
    with pytest.raises(UserError, match="does not say"):
        load(out)
    (out / "model.json").unlink()
    load(out)  # it is a copy for reading
    flipped(spoilt / "checkpoints" / "last.safetensors")
    with pytest.raises(UserError, match="checksum"):
        load(spoilt)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """Other safetensors, pickles under our name, and checkpoints that lack what a model needs."""
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not a robustkit checkpoint"):
        load(tmp_path)

    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"weight": Bomb()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="truncated or damaged"):
        load(tmp_path)
    assert not (tmp_path / "executed").exists()
    for facts in ({}, {"checkpoint": "last", "recipe": {}}, {"checkpoint": "last", "recipe": 3}):
        checkpoint.write(tmp_path / "model.safetensors", {"weight": torch.zeros(2)}, facts)
        with pytest.raises(UserError, match="lacks what a model needs"):
            load(tmp_path)


def test_weights_of_another_network_are_refused(spoilt: Path) -> None:
    path = spoilt / "checkpoints" / "last.safetensors"
    tensors, facts = checkpoint.read(path)
    facts["recipe"]["head"] = {"name": "linear"}
    checkpoint.write(path, tensors, facts)
    with pytest.raises(UserError, match="weights do not fit its recipe"):
        load(spoilt)
    with pytest.raises(UserError, match="belongs to another recipe") as error:
        facts["digest"] = "0" * 12
        checkpoint.write(path, tensors, facts)
        export(spoilt, "safetensors")
    assert "\n" not in str(error.value)


# safetensors


@pytest.mark.parametrize("name", ["last", "best"])
def test_an_exported_model_says_what_its_run_says(digits: Path, tmp_path: Path, name: str) -> None:
    written = export(digits, "safetensors", checkpoint=name, out=tmp_path / "out")
    assert set(written.files) == {"model.safetensors", "model.json", "README.md"}
    images = some((1, 8, 8))
    moved = Path(shutil.move(written.folder, tmp_path / "elsewhere"))
    model = load(moved)
    assert torch.equal(model(images), own_logits(digits, name, images))
    assert (model.classes, model.image_shape) == (tuple("0123456789"), (1, 8, 8))
    assert model.facts["checkpoint"] == name
    assert load_file(moved / "model.safetensors").keys() == model.network.state_dict().keys()
    load(moved, name)
    with pytest.raises(UserError, match=f"holds the checkpoint '{name}'"):
        load(moved, "best" if name == "last" else "last")


def test_an_exported_model_says_where_it_comes_from(digits: Path, tmp_path: Path) -> None:
    results = json.loads((digits / "results.json").read_text())["best"]
    written = export(digits, "safetensors", checkpoint="best", out=tmp_path / "out")
    facts = json.loads((written.folder / "model.json").read_text())
    recipe = load_recipe(digits / "recipe.json")
    assert digest(from_json(Recipe, facts["recipe"])) == facts["digest"] == digest(recipe)
    assert facts["results"] == results and facts["robustkit"] == robustkit.__version__
    assert facts["normalization"] == {"name": "none", "mean": None, "std": None, "inside_the_model": True}
    assert facts["threat"]["norm"] == "Linf"
    for file, sha256 in written.files.items():
        assert hashlib.sha256((written.folder / file).read_bytes()).hexdigest() == sha256
    card = (written.folder / "README.md").read_text()
    low, high = (f"{100 * bound:.1f}" for bound in results["clean"]["ci95"])
    assert f"| clean | {100 * results['clean']['accuracy']:.2f} ({low}-{high}) | 360 |" in card
    for text in ("robustkit.load(", "8 training images that were held out", "Linf 8/255", facts["digest"], "Seed 1"):
        assert text in card
    assert written.files["model.safetensors"] in card
    images = read_outcomes(digits).get("best", {}).get("clean", {}).get("images", "")
    assert facts["test_images"].get("clean", "") == images and images in card


def test_a_card_says_what_is_missing(spoilt: Path, tmp_path: Path) -> None:
    (spoilt / "results.json").unlink()
    card = (export(spoilt, "safetensors", out=tmp_path / "out").folder / "README.md").read_text()
    assert "was not measured" in card and "nothing was selected" in card
    recipe = tiny_recipe(**QUICK | {"epochs": 3, "batch_size": 16})
    with torch.random.fork_rng(devices=[]):
        run(recipe, out=tmp_path / "part", device="cpu", max_steps=1)
    card = (export(tmp_path / "part", "safetensors").folder / "README.md").read_text()
    assert "not finished: epoch 0 of 3, step 1" in card


def test_places_of_the_machine_stay_at_home(cifar: Path, tmp_path: Path) -> None:
    for form in ("safetensors", "robustbench"):
        written = export(cifar, form, out=tmp_path / form)
        for file in written.files:
            assert str(cifar.parent).encode() not in (written.folder / file).read_bytes(), file
    facts = json.loads((tmp_path / "safetensors" / "model.json").read_text())
    assert "root" not in facts["recipe"]["data"]
    assert facts["normalization"]["mean"] == [0.4914, 0.4822, 0.4465]


def test_nothing_is_overwritten(spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(spoilt), "--to", "safetensors"]
    assert main(words) == 0
    assert "export/safetensors-last" in capsys.readouterr().out
    fails(capsys, words, "exists already", "--out")
    (tmp_path / "file").write_text("")
    (spoilt / "export" / "safetensors-best.partial").mkdir()
    fails(capsys, [*words, "--out", str(tmp_path / "file")], "exists already")
    fails(capsys, [*words, "--out", str(tmp_path / "file" / "deeper")], "cannot be written", "choose another --out")
    assert (tmp_path / "file").read_text() == ""
    assert main([*words, "--checkpoint", "best", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["folder"].endswith("export/safetensors-best") and data["checkpoint"] == "best"
    assert set(data["files"]) == {"model.safetensors", "model.json", "README.md"}
    assert [path.name for path in spoilt.rglob("*.partial")] == ["safetensors-best.partial"]  # not ours


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    assert 2 <= capsys.readouterr().out.partition("examples:\n")[2].count("robustkit export ") <= 4


def test_mistakes_take_one_line(tmp_path: Path, cifar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["export", str(tmp_path), "--to", "safetensors"], str(tmp_path), "is not a run folder")
    fails(capsys, ["export", str(cifar), "--to", "onnx"], "--to", "safetensors")
    fails(capsys, ["export", str(cifar)], "--to")
    fails(capsys, ["export", str(cifar), "--to", "safetensors", "--checkpoint", "best"], "no checkpoint 'best'")
    with pytest.raises(UserError, match="did you mean 'robustbench'"):
        export(cifar, "robustbnech")


# RobustBench


def rebuilt(folder: Path) -> nn.Module:
    """The network that the exported text defines, with the exported weights."""
    (weights,) = folder.glob("*.pt")
    net: nn.Module = runpy.run_path(str(folder / "model.py"))["Net"]()
    net.load_state_dict(torch.load(weights, weights_only=True), strict=True)
    return net.eval()


@pytest.mark.parametrize("run_name", ["digits", "cifar"])
def test_robustbench_gets_the_same_network(run_name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(run_name)
    written = export(folder, "robustbench", out=tmp_path / "out")
    model = load(folder)
    images = some(model.image_shape)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(written.folder)(images), model(images), atol=1e-5, rtol=1e-5)
    state = torch.load(next(written.folder.glob("*.pt")), weights_only=True)
    assert all(type(tensor) is Tensor for tensor in state.values())


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "resnet10t"])
def test_robustbench_gets_timm_s_networks(backbone: str, tmp_path: Path) -> None:
    """Without robustkit: those of timm, with what they want to know of the images."""
    patch = 4 if backbone.startswith("vit") else None
    recipe = tiny_recipe(
        data=Synthetic(train=40, test=4, classes=3, size=16),
        model=Model(backbone=backbone, patch_size=patch, normalization="imagenet"),
        validation=Validation(images=0, train_images=0),
        epochs=1,
        batch_size=20,
    )
    folder = tmp_path / "run"
    with torch.random.fork_rng(devices=[]):
        run(recipe, out=folder, device="cpu", max_steps=1)
    written = export(folder, "robustbench")
    assert "robustkit" not in (written.folder / "model.py").read_text()
    images = some((3, 16, 16), 2)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(written.folder)(images), load(folder)(images), atol=1e-5, rtol=0)


def test_robustbench_gets_heads_of_plugins(tmp_path: Path) -> None:
    source = tmp_path / "own.py"
    source.write_text(RECIPE)
    with torch.random.fork_rng(devices=[]):
        run(load_recipe(source), out=tmp_path / "run", source=source, device="cpu")
    written = export(tmp_path / "run", "robustbench")
    images = some((1, 8, 8), 2)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(written.folder)(images), load(tmp_path / "run")(images))


STANDARD = entry(0.5012, 10_000, breakdown={"apgd-ce": 0.51})


def claim_of(folder: Path, results: dict[str, Any], to: Path, recipe: Recipe | None = None) -> tuple[Any, str]:
    copy = with_results(folder, results, to)
    if recipe is not None:
        rewrite(copy, recipe)
    written = export(copy, "robustbench")
    (path,) = written.folder.glob("model_info/*/*/*.json")
    return json.loads(path.read_text()), (written.folder / "README.md").read_text()


def test_the_claim_has_what_was_measured(cifar: Path, tmp_path: Path) -> None:
    results = {"clean": entry(0.8234, 10_000), "autoattack": STANDARD}
    claim, note = claim_of(cifar, results, tmp_path / "a run")
    assert claim == {
        "link": claim["link"],
        "name": claim["name"],
        "authors": claim["authors"],
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": "cifar10",
        "venue": claim["venue"],
        "architecture": "convnet_small",
        "eps": "8/255",
        "clean_acc": "82.34",
        "reported": "50.12",
        "autoattack_acc": "50.12",
        "unreliable": False,
    }
    for field in ("link", "name", "authors", "venue"):
        assert claim[field].startswith(FILL_IN)
    assert (tmp_path / "a run/export/robustbench-last/model_info/cifar10/Linf/a_run_last.json").is_file()
    assert (tmp_path / "a run/export/robustbench-last/a_run_last.pt").is_file()
    assert "is null" not in note and "no leaderboard" not in note and "50.12" in note


def test_the_claim_has_nothing_that_was_not_measured(cifar: Path, tmp_path: Path) -> None:
    recipe = load_recipe(cifar / "recipe.json")
    clean = {"clean": entry(0.8, 10_000)}

    def judged(name: str, results: dict[str, Any], **changes: Any) -> tuple[Any, str]:
        return claim_of(cifar, results, tmp_path / name, evolve(recipe, **changes))

    claim, note = judged("nothing", {})
    assert claim["clean_acc"] is claim["autoattack_acc"] is claim["reported"] is claim["unreliable"] is None
    assert "`clean_acc` is null" in note and "`autoattack_acc` and `reported` are null" in note

    claim, note = judged("few", {"clean": entry(0.8, 500), "autoattack": entry(0.5, 256)})
    assert claim["clean_acc"] is claim["autoattack_acc"] is None
    assert "256 of 10,000 test images" in note

    plus = (Suite(measures=(Clean(), AutoAttack(version="plus"))),)
    claim, _ = judged("plus", clean | {"autoattack": STANDARD}, evaluation=plus)
    assert claim["autoattack_acc"] is None and claim["clean_acc"] == "80.00"

    other = (Suite(measures=(Clean(),)), Suite(name="l2", threat=L2(), measures=(AutoAttack(),)))
    claim, _ = judged("other ball", clean | {"l2/autoattack": STANDARD}, evaluation=other)
    assert claim["autoattack_acc"] is None

    some_only = (Suite(measures=(Clean(), AutoAttack(attacks=("apgd-ce",)))),)
    claim, note = judged("some", clean | {"autoattack": STANDARD}, evaluation=some_only)
    assert claim["autoattack_acc"] is None and "apgd-ce only" in note

    warned = STANDARD | {"notes": ["AutoAttack: zero gradients"]}
    claim, note = judged("warned", clean | {"autoattack": warned})
    assert claim["autoattack_acc"] == "50.12" and claim["unreliable"] is None
    assert "for you to decide: AutoAttack: zero gradients" in note

    claim, note = judged("radius", clean | {"autoattack": STANDARD}, threat=L2(epsilon=1.0))
    assert claim["eps"] == "1" and "no leaderboard for L2 1" in note


def test_a_claim_about_other_data_says_so(digits: Path, tmp_path: Path) -> None:
    written = export(digits, "robustbench", checkpoint="best", out=tmp_path / "out")
    note = (written.folder / "README.md").read_text()
    assert "no leaderboard for `digits`" in note and "held out" in note
    assert any(file.startswith("model_info/digits/Linf/") for file in written.files)


# Documentation


def test_the_page_s_example_runs(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shutil.copytree(digits, tmp_path / "runs" / "quickstart-1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(block)
    runpy.run_path("example.py")
    assert "'linf'" in capsys.readouterr().out
    for line in re.findall(r"^robustkit (export runs/quickstart-1 .*)$", page, re.MULTILINE):
        assert main(line.split()) == 0
    load("models/digits")
    for file in re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)[:3]:
        assert Path("models/digits", file).is_file()
