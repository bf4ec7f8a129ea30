"""`robustkit predict`: pictures of any kind, what is printed, mistakes; and the same in Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from robustkit import Recipe, UserError, Validation, load
from robustkit.cli.main import main
from robustkit.datasets import ImageFolder, Synthetic
from robustkit.datasets.image_folder import decode
from robustkit.detection import Rejector, threshold_for
from robustkit.export import export
from robustkit.heads import GaussianMixture
from robustkit.opening import load_parts, make_world
from robustkit.prediction import Predicted, Unreadable, find_pictures, held_out_threshold, predict
from robustkit.runs import run
from robustkit.testing import tiny_recipe

CLASSES = [str(number) for number in range(4)]


def recipe(**parts: Any) -> Recipe:
    given = {
        "data": Synthetic(train=70, test=16, classes=4, size=8, channels=3),
        "epochs": 1,
        "validation": Validation(images=20, train_images=0),
    }
    return tiny_recipe(**given | parts)


def made(folder: Path, recipe: Recipe) -> Path:
    with torch.random.fork_rng(devices=[]):
        run(recipe, out=folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on colour pictures with a linear head."""
    return made(tmp_path_factory.mktemp("plain") / "run", recipe())


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on grey pictures with a mixture head."""
    data = Synthetic(train=70, test=16, classes=4, size=8, channels=1)
    return made(tmp_path_factory.mktemp("mixture") / "run", recipe(data=data, head=GaussianMixture()))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures at several depths, and files that are none."""
    folder = tmp_path / "photos"
    (folder / "below" / "deeper").mkdir(parents=True)
    (folder / ".thumbnails").mkdir()
    for number, name in enumerate(("b.png", "a.JPG", "below/deeper/c.bmp", "below/d.gif", ".thumbnails/e.png")):
        Image.fromarray(noise(20 + number, 13, 3, seed=number)).save(folder / name)
    Image.fromarray(noise(8, 8, 3)).save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def ask(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["predict", *words, "--device", "cpu"]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on standard error."""
    out, err = ask(capsys, *words, code=2)
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1
    return err


# What it says


def test_a_table(plain: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = ask(capsys, str(plain), str(photos / "b.png"))
    heading, _, row = [line for line in out.splitlines() if line.strip()]
    assert heading.split() == ["Picture", "Label", "Posterior", "Second", "best"] and err == ""
    (said,) = predict(load(plain), [photos / "b.png"])
    assert isinstance(said, Predicted) and said.rejected is None and said.likelihoods is None
    names = list(said.posteriors)
    wanted = [said.label, f"{said.score:.3f}", names[1], f"{said.posteriors[names[1]]:.3f}"]
    assert row.split() == [str(photos / "b.png"), *wanted]


def test_a_table_with_likelihoods_and_verdicts(mixture: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [said.score for said in predict(load(mixture), find_pictures([photos]))]
    between = sorted(scores)[1] + 1e-6
    out, err = ask(capsys, str(mixture), str(photos), "--reject", repr(between))
    assert "Log-likelihood" in out and "Verdict" in out
    assert (out.count("rejected"), out.count("accepted")) == (2, 2)
    assert "2 of 4 rejected below" in err


def test_json_is_the_model_asked_by_hand(mixture: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [photos / "a.JPG", photos / "below" / "d.gif"]
    out, _ = ask(capsys, str(mixture), *map(str, files), "--json", "--reject", "0.3")
    data = json.loads(out)
    model = load(mixture)
    assert (data["model"], data["checkpoint"], data["threshold"]) == (str(mixture), "last", 0.3)
    for file, entry in zip(files, data["images"], strict=True):
        with Image.open(file) as picture:
            fitted = ImageOps.fit(picture.convert("RGB").convert("L"), (8, 8), Image.Resampling.BILINEAR)
        x = torch.tensor(np.asarray(fitted))[None, None].float() / 255
        with torch.no_grad():
            logits = model(x)[0]
        posteriors = {name: float(share) for name, share in zip(CLASSES, logits.softmax(dim=0), strict=True)}
        assert entry["file"] == str(file)
        assert entry["posteriors"] == pytest.approx(posteriors, abs=1e-5)
        assert list(entry["posteriors"].values()) == sorted(entry["posteriors"].values(), reverse=True)
        assert entry["label"] == max(posteriors, key=posteriors.__getitem__) == next(iter(entry["posteriors"]))
        assert entry["score"] == max(entry["posteriors"].values())
        assert entry["log_likelihoods"] == pytest.approx(dict(zip(CLASSES, logits.tolist(), strict=True)), abs=1e-4)
        assert list(entry["log_likelihoods"]) == list(entry["posteriors"])
        assert entry["rejected"] == (entry["score"] < 0.3)


def test_a_folder_is_searched_to_the_bottom(plain: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = ask(capsys, str(plain), str(photos), str(photos / "notes.txt"), "--json", code=1)
    files = [Path(entry["file"]).relative_to(photos).as_posix() for entry in json.loads(out)["images"]]
    assert files == ["a.JPG", "b.png", "below/d.gif", "below/deeper/c.bmp", "notes.txt"]


def test_batches_are_of_no_consequence(plain: Path, photos: Path) -> None:
    model, files = load(plain), find_pictures([photos])
    broken = photos / "notes.txt"
    mixed = [broken, *files[:2], broken, *files[2:]]
    one, all_ = (list(predict(model, mixed, threshold=0.3, batch_size=size)) for size in (1, 64))
    assert [said.file for said in one] == [said.file for said in all_] == mixed
    for first, second in zip(one, all_, strict=True):
        if isinstance(first, Unreadable):
            assert first == second
        else:
            assert isinstance(second, Predicted) and first.posteriors == pytest.approx(second.posteriors, abs=1e-5)


def test_an_exported_model_and_the_other_checkpoint(
    plain: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(photos / "b.png")
    folder = export(plain, "safetensors", checkpoint="best", out=tmp_path / "out").folder
    own, _ = ask(capsys, str(plain), picture, "--checkpoint", "best", "--json")
    moved, _ = ask(capsys, str(folder), picture, "--json")
    file, _ = ask(capsys, str(plain / "checkpoints" / "best.safetensors"), picture, "--json")
    assert json.loads(own)["images"] == json.loads(moved)["images"] == json.loads(file)["images"]
    assert json.loads(own)["checkpoint"] == json.loads(moved)["checkpoint"] == "best"


# Thresholds


def test_a_threshold_from_held_out_images(mixture: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(mixture)
    own = recipe(data=Synthetic(train=70, test=16, classes=4, size=8, channels=1), head=GaussianMixture())
    parts = load_parts(own, make_world(own, "cpu"))
    scores = Rejector(model)(parts.data.train.fetch(parts.validation_rows).float() / 255).scores
    found, count = held_out_threshold(mixture, model, 0.1)
    assert count == 20 and found == pytest.approx(threshold_for(scores, 0.1), rel=1e-6)
    assert int((scores < found - 1e-6).sum()) == 2
    out, err = ask(capsys, str(mixture), str(photos), "--false-rejections", "0.1", "--json")
    assert json.loads(out)["threshold"] == found
    assert f"Threshold {found:.4f}: rejects at most 10 % of 20 held-out images" in err


def test_thresholds_that_cannot_be_found(
    plain: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(plain, "safetensors", out=tmp_path / "out").folder
    said = refused(capsys, str(folder), str(photos), "--false-rejections", "0.05")
    assert "brings no held-out images" in said and "--reject" in said
    none = Path(shutil.copytree(plain, tmp_path / "none"))
    data = json.loads((none / "recipe.json").read_text())
    data["validation"]["images"] = 0
    (none / "recipe.json").write_text(json.dumps(data))
    assert "held out no images" in refused(capsys, str(none), str(photos), "--false-rejections", "0.05")


# Pictures


def test_what_cannot_be_read_gets_a_line(plain: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = photos / "cut.png"
    cut.write_bytes((photos / "b.png").read_bytes()[:200])
    missing = photos / "missing.png"
    out, err = ask(capsys, str(plain), str(missing), str(cut), str(photos / "b.png"), code=1)
    lines = err.splitlines()
    assert len(lines) == 2 and "b.png" in out and "missing.png" not in out
    assert lines[0].startswith(f"{missing}: is no readable picture (FileNotFoundError")
    assert lines[1].startswith(f"{cut}: is no readable picture")
    out, err = ask(capsys, str(plain), str(missing), code=1)
    assert out == "" and len(err.splitlines()) == 1
    out, _ = ask(capsys, str(plain), str(cut), str(photos / "b.png"), "--json", code=1)
    broken, whole = json.loads(out)["images"]
    assert broken.keys() == {"file", "error"} and whole["file"] == str(photos / "b.png")


def saved(folder: Path, picture: Image.Image, name: str = "picture.png", **options: Any) -> np.ndarray:
    """The same picture, as it is read from a file."""
    picture.save(folder / name, **options)
    return decode(folder / name)


def test_greys_of_16_bits(tmp_path: Path) -> None:
    greys = np.array([[0, 257, 128 * 257], [65535, 65535, 300]], dtype=np.uint16)
    found = saved(tmp_path, Image.fromarray(greys))
    assert found.shape == (3, 2, 3) and found[0].tolist() == [[0, 1, 128], [255, 255, 1]]
    assert (found == found[:1]).all()
    assert decode(tmp_path / "picture.png", grey=True).shape == (1, 2, 3)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (10, 20, 30, 0)
    pixels[1, 0] = (0, 0, 0, 128)
    found = saved(tmp_path, Image.fromarray(pixels))
    assert found[:, 0, 0].tolist() == [10, 20, 30] and found[:, 0, 1].tolist() == [255] * 3
    assert abs(int(found[0, 1, 0]) - 127) <= 1
    grey = np.array([[[100, 255], [100, 0]]], np.uint8)
    assert saved(tmp_path, Image.fromarray(grey))[0].tolist() == [[100, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpixel((1, 0), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    found = saved(tmp_path, palette, transparency=1)
    assert found[:, 0].T.tolist() == [[255, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    """As Exif defines: 2 mirrored, 3 upside down, 6 and 8 on their side, ..."""
    upright = noise(5, 3, 3)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert (found.transpose(1, 2, 0) == upright).all()


KINDS = [("1", "png"), ("L", "bmp"), ("P", "gif"), ("CMYK", "jpg"), ("RGB", "webp")]


@pytest.mark.parametrize(("mode", "ending"), KINDS)
def test_pictures_of_any_kind(plain: Path, tmp_path: Path, mode: str, ending: str) -> None:
    file = tmp_path / f"picture.{ending}"
    Image.fromarray(noise(12, 9, 3)).convert(mode).save(file)
    (said,) = predict(load(plain), [file])
    assert isinstance(said, Predicted) and 0.25 <= said.score <= 1
    with Image.open(file) as picture:
        assert (decode(file).transpose(1, 2, 0) == np.asarray(picture.convert("RGB"))).all()


def test_numbers_without_a_range_are_refused(tmp_path: Path) -> None:
    for picture in (Image.fromarray(np.ones((2, 2), np.float32)), Image.fromarray(np.full((2, 2), 70_000, np.int32))):
        with pytest.raises(UserError, match="no readable picture"):
            saved(tmp_path, picture, "picture.tiff")


def test_pictures_are_cut_as_a_data_set_cuts_them(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(noise(30, 17, 3)).save(tmp_path / part / name / "0.png")
    data = ImageFolder(root=str(tmp_path), size=8).load()
    file = tmp_path / "test" / "ant" / "0.png"
    assert torch.equal(data.test.fetch(torch.tensor([0]))[0], torch.tensor(decode(file, (8, 8))))
    assert decode(file, (4, 10)).shape == (3, 4, 10)


# Mistakes


def test_mistakes_take_one_line(plain: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(photos / "b.png")
    (tmp_path / "empty").mkdir()
    for words, said in (
        ((str(tmp_path / "nowhere"), picture), "neither a run nor an exported model"),
        ((str(plain), str(tmp_path / "empty")), "there are no pictures in it"),
        ((str(plain), picture, "--reject", "1.2"), "must be a number from 0 to 1"),
        ((str(plain), picture, "--reject", "high"), "must be a number from 0 to 1, got 'high'"),
        ((str(plain), picture, "--reject", "nan"), "must be a number from 0 to 1"),
        ((str(plain), picture, "--false-rejections", "1"), "false_rejections"),
        ((str(plain), picture, "--reject", "0.5", "--false-rejections", "0.1"), "not allowed with"),
        ((str(plain),), "IMAGE"),
        ((str(plain / "checkpoints" / "best.safetensors"), picture, "--checkpoint", "last"), "leave out --checkpoint"),
    ):
        assert said in refused(capsys, *words)


def test_models_of_other_channels(photos: Path) -> None:
    from robustkit.core.model import Model
    from robustkit.heads import Linear
    from robustkit.loading import Classifier, fresh

    network = fresh(Model(backbone="convnet_small"), Linear(), 4, (2, 8, 8))
    model = Classifier(network, {"recipe": {}, "classes": CLASSES, "image_shape": [2, 8, 8]})
    with pytest.raises(UserError, match="2 channels, not pictures"):
        next(predict(model, [photos / "b.png"]))


def test_find_pictures(photos: Path) -> None:
    names = [file.relative_to(photos).as_posix() for file in find_pictures([photos / "below", photos / "none", photos])]
    below = ["below/d.gif", "below/deeper/c.bmp"]
    assert names == [*below, "none", "a.JPG", "b.png", *below]
