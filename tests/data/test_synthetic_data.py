"""Generated images beside a data set's own: the file, the mixture, training on it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from robustkit import evolve, resume, run
from robustkit.core import checkpoint
from robustkit.core.errors import DataError, SpecError
from robustkit.core.order import Mixture, micro_parts
from robustkit.core.parts import assemble
from robustkit.core.recipe import Precision, Recipe
from robustkit.core.spec import digest, from_json, to_json
from robustkit.core.strategy import Dataset
from robustkit.data import Data, InMemory, Joined, Stored
from robustkit.data.images import resident
from robustkit.datasets import Cifar10, Synthetic, WithSynthetic, npz
from robustkit.datasets.npz import read_npz
from robustkit.opening import load_parts, make_world
from robustkit.targets import Momentum, Universal
from robustkit.testing import tiny_recipe

OWN = Synthetic(train=70, test=16, classes=4, size=8, channels=1, augment="crop-flip-rotate")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ROBUSTKIT_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    stub = ModuleType("robustkit.reporting.figures")
    stub.draw = lambda *arguments: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "robustkit.reporting.figures", stub)


def pictures(count: int, size: int = 8, channels: int = 1, classes: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(seed)
    image = draws.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    return {"image": image, "label": draws.integers(0, classes, count)}


def write(path: Path, compressed: bool = True, **arrays: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def members(path: Path, **contents: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.npy", content)
    return path


def header(shape: tuple[int, ...], descr: str = "|u1", fortran: bool = False) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return stream.getvalue()


# The file


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("chunk", [1, 500, 8 << 20])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, ">i4"])
def test_conversion_keeps_every_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool, chunk: int, dtype: Any
) -> None:
    monkeypatch.setattr(npz, "CHUNK", chunk)
    wanted = pictures(23, size=5, channels=3)
    wanted["label"] = wanted["label"].astype(dtype)
    images = read_npz(write(tmp_path / "made.npz", compressed, **wanted))
    assert (len(images), images.shape, images.labels.dtype) == (23, (3, 5, 5), torch.int64)
    assert images.labels.tolist() == wanted["label"].tolist()
    index = torch.tensor([22, 0, 7, 7, 3])
    pixels = images.fetch(index)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    for place, row in enumerate(index.tolist()):
        for channel in range(3):
            assert np.array_equal(pixels[place, channel].numpy(), wanted["image"][row, :, :, channel])
    assert images.fetch(index[:0]).shape == (0, 3, 5, 5)


def test_conversion_is_done_once_and_again_for_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "made.npz", **pictures(9))
    read_npz(path)
    (first,) = tmp_path.glob("*.npy")
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted([path.name, first.name])  # nothing half made
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(npz, "_convert", lambda *arguments: pytest.fail("converted again"))
    read_npz(path)
    assert first.stat().st_mtime_ns == before
    monkeypatch.undo()
    write(path, **pictures(9, seed=1))
    images = read_npz(path)
    assert len(list(tmp_path.glob("*.npy"))) == 2
    wanted = torch.from_numpy(pictures(9, seed=1)["image"]).permute(0, 3, 1, 2)
    assert torch.equal(images.fetch(torch.arange(9)), wanted)


def test_conversion_goes_where_there_is_room(tmp_path: Path) -> None:
    path = write(tmp_path / "here" / "made.npz", **pictures(9))
    read_npz(path, tmp_path / "there")
    assert len(list((tmp_path / "there").glob("made-*.npy"))) == 1 and len(list(path.parent.iterdir())) == 1
    (tmp_path / "a file").write_text("")
    with pytest.raises(DataError, match=r"a file.*cannot write the converted images.*data\.cache"):
        read_npz(path, tmp_path / "a file")


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "made.npz", **pictures(9))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(npz, "replace", full)
    with pytest.raises(DataError, match=r"No space left on device.*make room"):
        read_npz(path)
    monkeypatch.setattr(npz, "replace", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        read_npz(path)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_conversion_holds_a_piece_at_a_time(tmp_path: Path) -> None:
    """200 MB of zeros unpack to 200 MB; the process must not hold them."""
    import tracemalloc

    path = write(tmp_path / "big.npz", image=np.zeros((65_000, 32, 32, 3), np.uint8), label=np.zeros(65_000, np.int64))
    tracemalloc.start()
    try:
        images = read_npz(path)
        images.fetch(torch.arange(0, 65_000, 130))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6


GOOD = pictures(6)
LABELS = header((6,), "<i8") + GOOD["label"].astype("<i8").tobytes()


class Bomb:
    """Unpickling it would end the process."""

    def __reduce__(self) -> Any:
        import os

        return os._exit, (7,)


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"label": GOOD["label"]}, "holds no 'image', but label"),
        ({"image": GOOD["image"]}, "holds no 'label', but image"),
        (GOOD | {"image": GOOD["image"].astype(np.float32)}, r"'image' must be \(N, H, W, C\) uint8, got .*float32"),
        (GOOD | {"image": GOOD["image"][:, :, :, 0]}, r"'image' must be \(N, H, W, C\) uint8, got \(6, 8, 8\)"),
        (GOOD | {"image": np.asfortranarray(GOOD["image"])}, "Fortran order"),
        (GOOD | {"image": GOOD["image"][:0]}, r"got \(0, 8, 8, 1\)"),
        (GOOD | {"image": np.array([Bomb()] * 6, dtype=object)}, "'image' must be .* got .*object"),
        (GOOD | {"label": np.array([Bomb()] * 6, dtype=object)}, r"'label' must be \(6,\) whole numbers, got .*object"),
        (GOOD | {"label": GOOD["label"][:5]}, r"'label' must be \(6,\) whole numbers, got \(5,\)"),
        (GOOD | {"label": np.eye(6)}, r"whole numbers, got \(6, 6\) float64"),
        (GOOD | {"label": GOOD["label"] * 0.5}, "whole numbers, got .*float64"),
    ],
)
def test_odd_arrays_are_one_line(tmp_path: Path, arrays: dict[str, Any], fault: str) -> None:
    path = write(tmp_path / "odd.npz", **arrays)
    with pytest.raises(DataError, match=rf"odd\.npz: .*{fault}") as error:
        read_npz(path)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == [path]


def test_odd_archives_are_one_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.npz", compressed=False, **pictures(60)).read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 1  # a pixel: only the checksum knows
    first = header((6, 8, 8, 1)) + GOOD["image"].tobytes()
    odd = tmp_path / "odd.npz"
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:-1], bytes(damaged)):
        odd.write_bytes(content)
        with pytest.raises(DataError, match=r"odd\.npz: is no npz file that can be read .*fetch it again") as error:
            read_npz(odd)
        assert "\n" not in str(error.value)
    for image, label, fault in (
        (first[:-1], LABELS, "'image' is not as long as"),
        (first + b"x", LABELS, "'image' is not as long as"),
        (header((10**15, 32, 32, 3)) + b"x", LABELS, "'image' is not as long as"),
        (first, LABELS[:-1], "'label' is not as long as"),
        (first, LABELS + b"x", "'label' is not as long as"),
        (b"\x93NUMPY\x09\x00", LABELS, "is no npz file that can be read"),
        (b"", LABELS, "is no npz file that can be read"),
    ):
        members(odd, image=image, label=label)
        with pytest.raises(DataError, match=rf"odd\.npz: {fault}"):
            read_npz(odd)
    assert {found.name for found in tmp_path.iterdir()} == {"whole.npz", "odd.npz"}


def test_names_in_the_archive_lead_nowhere(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "made.npz", compressed=False, **GOOD)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../escaped.npy", b"x")
        archive.writestr("/absolute.npy", b"x")
    read_npz(path)
    assert [found.name for found in tmp_path.iterdir()] == ["in"]


def test_a_converted_file_that_is_damaged_or_goes_away_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "made.npz", **GOOD)
    images = read_npz(path)
    whole = images.path.read_bytes()
    images.path.write_bytes(whole[:-10])  # while it is used
    assert images.fetch(torch.tensor([0, 4])).shape == (2, 1, 8, 8)
    with pytest.raises(DataError, match=r"cannot be read any more .it ends before image 5"):
        images.fetch(torch.tensor([5, 0]))
    with pytest.raises(DataError, match=r"\.npy: cannot be read .*delete the file: it is made anew"):
        read_npz(path)
    images.path.unlink()
    with pytest.raises(DataError, match="No such file"):
        images.fetch(torch.tensor([0]))
    assert torch.equal(read_npz(path).fetch(torch.tensor([5]))[0, 0], torch.from_numpy(GOOD["image"][5, :, :, 0]))
    np.save(images.path, np.zeros((5, 1, 8, 8), np.uint8))
    with pytest.raises(DataError, match=r"must be \(6, C, H, W\) uint8, got \(5, 1, 8, 8\) uint8"):
        Stored(images.path, images.labels)


# The data set


def with_synthetic(tmp_path: Path, count: int = 90, original: float = 0.3, **changes: Any) -> WithSynthetic:
    write(tmp_path / "made.npz", **pictures(count))
    return WithSynthetic(inner=OWN, file="made.npz", root=str(tmp_path), original=original, **changes)


def test_own_images_first_synthetic_ones_after(tmp_path: Path) -> None:
    spec, made = with_synthetic(tmp_path), pictures(90)
    data, plain = spec.load(), OWN.load()
    assert (len(data.train), len(data.test), data.train.shape) == (160, 16, (1, 8, 8))
    assert data.mixture == Mixture(own=70, share=0.3)
    assert torch.equal(data.train.fetch(torch.arange(70)), plain.train.pixels)
    assert torch.equal(data.train.labels[:70], plain.train.labels)
    rows = torch.tensor([159, 3, 70, 69])
    expected = [made["image"][89], None, made["image"][0], None]
    for found, row, wanted in zip(data.train.fetch(rows), rows.tolist(), expected, strict=True):
        own = plain.train.pixels[row] if wanted is None else torch.from_numpy(wanted).permute(2, 0, 1)
        assert torch.equal(found, own)
    assert data.train.labels[70:].tolist() == made["label"].tolist()
    assert torch.equal(data.test.pixels, plain.test.pixels) and data.classes == plain.classes
    assert spec.augmentation == OWN.augmentation and spec.facts == OWN.facts and spec.augment == OWN.augment


def test_it_is_a_value() -> None:
    spec = WithSynthetic(inner=Cifar10(), file="cifar10_ddpm.npz", original=0.3)
    assert from_json(Dataset, to_json(spec)) == spec and to_json(spec)["name"] == "with-synthetic"
    assert digest(evolve(spec, root="elsewhere", cache="there")) == digest(spec)
    assert digest(evolve(spec, inner=Cifar10(root="elsewhere"))) == digest(spec)
    assert digest(evolve(spec, original=0.4)) != digest(spec) != digest(evolve(spec, file="other.npz"))
    for wrong in (0.0, 1.0, -0.1):
        with pytest.raises(SpecError, match="original"):
            WithSynthetic(original=wrong)


def test_a_missing_file_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npz: .*'image' \(N, H, W, C\) uint8 and 'label'.*data\.root") as error:
        WithSynthetic(inner=OWN, file="none.npz", root=str(tmp_path)).load()
    assert "\n" not in str(error.value) and "cifar10_ddpm.npz" in str(error.value)


def test_images_of_other_classes_or_sizes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "made.npz", **pictures(90, classes=9))
    spec = WithSynthetic(inner=OWN, file="made.npz", root=str(tmp_path))
    with pytest.raises(DataError, match=r"made\.npz: label [4-8] of image \d+ is not one of 0\.\.3"):
        spec.load()
    labels = np.full(90, -1)
    write(tmp_path / "made.npz", **pictures(90) | {"label": labels})
    with pytest.raises(DataError, match="label -1 of image 0"):
        spec.load()
    write(tmp_path / "made.npz", **pictures(90, channels=3))
    with pytest.raises(DataError, match=r"made\.npz: images are 3x8x8, those of the data set 1x8x8"):
        spec.load()


def test_all_pixels_may_live_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustkit.data.images.CHUNK", 7)
    train = with_synthetic(tmp_path).load().train
    held = resident(train, torch.device("cpu"))
    everything = torch.arange(len(train))
    assert isinstance(train, Joined) and isinstance(held, InMemory)
    assert torch.equal(held.fetch(everything), train.fetch(everything)) and torch.equal(held.labels, train.labels)


# The mixture


@pytest.mark.parametrize(("share", "own", "made"), [(0.3, 154, 358), (0.4, 205, 307)])
def test_batches_are_as_published(share: float, own: int, made: int) -> None:
    """50,000 CIFAR images, 1,024 of them held out, one million synthetic ones, batches of 512."""
    mixture = Mixture(own=50_000, share=share)
    rows = torch.cat([torch.arange(1024, 50_000), torch.arange(50_000, 1_050_000)])
    order = mixture.epoch_order(rows, 512, seed=1, epoch=3)
    assert mixture.batches_per_epoch(512) == 98 and order.shape == (98 * 512,)
    batches = order.view(98, 512)
    assert ((batches < 50_000).sum(dim=1) == own).all() and ((batches >= 50_000).sum(dim=1) == made).all()
    real = order[order < 50_000]
    assert len(real.unique()) == len(real) == 98 * own and real.min() >= 1024
    synthetic = order[order >= 50_000]
    expected = 1e6 * (1 - (1 - 1e-6) ** len(synthetic))  # with replacement some come twice
    assert abs(len(synthetic.unique()) - expected) < 150 < len(synthetic) - expected
    assert abs(float(synthetic.float().mean()) - 550_000) < 10_000
    places = (batches < 50_000).float().mean(dim=0)  # shuffled within the batch: no place prefers a source
    assert places.max() < 0.65 and places.min() > 0.05 and abs(float(places[:own].mean()) - share) < 0.03


def test_order_is_a_function_of_seed_and_epoch() -> None:
    mixture, rows = Mixture(own=60, share=0.5), torch.arange(100)
    orders = [mixture.epoch_order(rows, 16, seed, epoch) for seed in (1, 2) for epoch in range(3)]
    assert len({tuple(order.tolist()) for order in orders}) == 6
    state = torch.get_rng_state()
    assert torch.equal(mixture.epoch_order(rows, 16, 2, 1), orders[4])
    assert torch.equal(torch.get_rng_state(), state)


def test_own_images_in_order_of_their_permutation() -> None:
    """Against the rule written out: consecutive slices of one permutation, the last one topped up."""
    mixture, rows = Mixture(own=40, share=0.8), torch.cat([torch.arange(0, 40, 2), torch.arange(40, 90)])
    order = mixture.epoch_order(rows, 10, seed=5, epoch=0).view(4, 10)  # 8 own and 2 synthetic a batch
    assert [(batch < 40).sum().item() for batch in order] == [8, 8, 4, 0]  # 20 of them are trained on
    assert sorted(order[order < 40].tolist()) == list(range(0, 40, 2))


@pytest.mark.parametrize(("size", "share", "made"), [(10, 0.9, 1), (10, 0.7, 3), (7, 0.3, 4), (512, 0.999, 0)])
def test_synthetic_images_of_a_batch(size: int, share: float, made: int) -> None:
    order = Mixture(own=1000, share=share).epoch_order(torch.arange(2000), size, 0, 0)
    assert int((order[:size] >= 1000).sum()) == made


# Training


def recipe_of(data: Dataset, **parts: Any) -> Recipe:
    return tiny_recipe(data=data, target=Momentum(inner=Universal(), start=0.5), **parts)


def test_validation_images_are_own_ones_and_the_same_as_without(tmp_path: Path) -> None:
    recipe = recipe_of(with_synthetic(tmp_path))
    parts, plain = (load_parts(r, make_world(r, "cpu")) for r in (recipe, evolve(recipe, data=OWN)))
    assert torch.equal(parts.validation_rows, plain.validation_rows) and len(parts.validation_rows) == 12
    assert torch.equal(parts.own_rows, plain.rows) and len(parts.rows) == 58 + 90
    assert (parts.steps_per_epoch, plain.steps_per_epoch) == (5, 4)  # of 70 own images, and of 58
    assert parts.strategies["target"].memory.values.shape == (160, 4)
    seen = set(torch.cat([parts.order(epoch) for epoch in range(4)]).tolist())
    assert not seen & set(parts.validation_rows.tolist())
    assert (parts.world.samples, parts.world.training) == (160, 148)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(folder / "checkpoints" / "last.safetensors")[0]


def test_resumed_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    recipe = recipe_of(with_synthetic(tmp_path))
    run(recipe, out=tmp_path / "whole", device="cpu", preflight=False)
    assert run(recipe, out=tmp_path / "parts", device="cpu", max_steps=7, preflight=False).stopped == "steps"
    assert resume(tmp_path / "parts", device="cpu", max_steps=13).stopped == "steps"
    assert resume(tmp_path / "parts", device="cpu").stopped == ""
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    visited = whole["strategies.target.memory.visited"]
    assert 0 < visited[:70].sum() <= 58 and 0 < visited[70:].sum() < 90


def test_two_processes_see_parts_of_the_same_batch(tmp_path: Path) -> None:
    recipe = recipe_of(with_synthetic(tmp_path), precision=Precision(attack="fp32", outer="fp32"))
    data = recipe.data.load()
    world = attrs.evolve(make_world(recipe, "cpu"), samples=160, classes=4, image_shape=(1, 8, 8), size=2)
    first, second = (assemble(recipe, data, attrs.evolve(world, rank=rank)) for rank in range(2))
    for epoch in range(2):
        assert torch.equal(first.order(epoch), second.order(epoch))
    seen: list[list[list[int]]] = []
    for parts in (first, second):
        rows = []
        for batch in parts.order(0).split(recipe.batch_size):
            (part,) = micro_parts(len(batch), parts.world.rank, 2, 1)
            rows.append(batch[part.start : part.stop].tolist())
        seen.append(rows)
    for mine, theirs, whole in zip(*seen, first.order(0).split(recipe.batch_size), strict=True):
        assert len(mine) == len(theirs) == 8 and mine + theirs == whole.tolist()
        assert not {row for row in mine if row < 70} & {row for row in theirs if row < 70}


def test_batches_are_never_short(tmp_path: Path) -> None:
    """So few synthetic images that all images together would fill fewer batches."""
    recipe = recipe_of(with_synthetic(tmp_path, count=3), batch_size=32)
    parts = load_parts(recipe, make_world(recipe, "cpu"))
    assert parts.steps_per_epoch == 3 and len(parts.order(0)) == 96


def test_a_mixture_has_two_sources() -> None:
    data = OWN.load()
    assert data.mixture is None
    for own in (0, 70, 71):
        with pytest.raises(DataError, match="nothing to mix"):
            attrs.evolve(data, mixture=Mixture(own=own, share=0.5))
    assert isinstance(attrs.evolve(data, mixture=Mixture(own=69, share=0.5)), Data)


@pytest.mark.slow
def test_the_script_that_measures_scale_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "scale.py"
    words = [sys.executable, str(script), "--folder", str(tmp_path / "files"), "--images", "2000"]
    words += ["--out", str(tmp_path / "scale.json"), "--only", "conversion", "batches", "order", "targets"]
    subprocess.run(words, check=True, timeout=250, stdout=subprocess.DEVNULL)
    answers = json.loads((tmp_path / "scale.json").read_text())
    assert set(answers) == {"conversion", "batches", "order", "targets"} and not (tmp_path / "files").exists()
